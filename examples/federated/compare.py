"""Federated NB-LoRA against Flower's DifferentialPrivacyServerSideFixedClipping, same (epsilon, delta).

    python compare.py --clients 5 50 --epsilon 0 8 32 --seeds 5

Same base model, clients, data, local training and rounds, in one process through Flower's own strategy
classes. Flower's wrapper is put around FedAvg on the LoRA parameters A and B, of one rank for all.

What is the same, and what not:
- Flower adds noise of standard deviation noise_multiplier * clipping_norm / num_sampled_clients to every
  entry of the averaged A and B, and accounts for it as a Gaussian mechanism with that noise multiplier. Here
  noise_multiplier = sqrt(rounds) / mu(epsilon, delta), the exact value for its definition. (Its own
  accountant, by Renyi orders, would ask for more noise.) That takes clipping_norm / num_sampled_clients for
  the sensitivity of the average.
- NB-LoRA adds noise to the entries of the mean of the products B A, of sensitivity bound / n_total, for
  neighbours that differ in the presence of one client. All clients of this study come, so both denominators
  are the same number; Flower's is the number of replies, and would change with it.
- Each method takes the best of its settings in one tuning run (which does not count towards epsilon, for
  neither): bound or clipping norm, learning rate, and rank, of the release or of the LoRA.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from federated_digits.task import RANKS, Data, accuracy, new_model, plan_for, split, train
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from nblora.federated import apply_updates
from nblora.federated.flower import InProcessGrid, NBLoraStrategy, client_app, from_arrays
from nblora.privacy import gaussian_mu

DELTA, ROUNDS, EPOCHS = 1e-5, 3, 10


@dataclass(frozen=True)
class Study:
    """One run's circumstances.

    Attributes:
        clients: how many there are; each comes in each round.
        epsilon: of all rounds together; 0 for no privacy.
        seed: of the split between clients and of their training. Noise is seeded by nobody.
    """

    clients: int
    epsilon: float
    seed: int

    def data(self) -> list[Data]:
        pixels, labels = split()[2]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        return [(pixels[rows], labels[rows]) for rows in order.tensor_split(self.clients)]

    def train(
        self, model: nn.Module, data: list[Data], setting: Setting, context: Context, index: int
    ) -> None:
        """What the client of a context does in a round."""
        client = int(context.node_config["partition-id"])
        seed = 1000 * self.seed + 10 * client + index
        train(model, data[client], epochs=EPOCHS, learning_rate=setting.learning_rate, seed=seed)

    def nodes(self) -> list[dict[str, int]]:
        return [{"partition-id": index} for index in range(self.clients)]


@dataclass(frozen=True)
class Setting:
    """What is tuned: size is NB-LoRA's relative bound or Flower's clipping norm, rank that of NB-LoRA's
    release (0 for all) or of Flower's LoRA."""

    size: float
    learning_rate: float
    rank: int


def ours(base: nn.Module, study: Study, setting: Setting) -> float:
    data = study.data()
    plan = plan_for(
        base,
        {
            "epsilon": study.epsilon,
            "bound": setting.size,
            "rounds": ROUNDS,
            "clients": study.clients,
            "release-rank": setting.rank,
        },
    )

    def fit(model: nn.Module, context: Context, index: int) -> None:
        study.train(model, data, setting, context, index)

    app = client_app(
        lambda _: copy_of(base), fit, rank=lambda c: RANKS[int(c.node_config["partition-id"]) % len(RANKS)]
    )
    with tempfile.TemporaryDirectory() as folder:
        result = NBLoraStrategy(plan, folder).start(InProcessGrid(app, study.nodes()))
    return accuracy(apply_updates(copy_of(base), plan, from_arrays(result.arrays)), split()[1])


def flowers(base: nn.Module, study: Study, setting: Setting) -> float:
    data = study.data()

    def lora() -> nn.Module:
        torch.manual_seed(study.seed)  # one start for all
        config = LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules="all-linear")
        model: nn.Module = get_peft_model(copy_of(base), config)
        return model

    def arrays(model: nn.Module) -> ArrayRecord:
        return ArrayRecord({k: Array(v.numpy()) for k, v in get_peft_model_state_dict(model).items()})

    def loaded(record: ArrayRecord) -> nn.Module:
        model = lora()
        set_peft_model_state_dict(model, {k: torch.from_numpy(v.numpy().copy()) for k, v in record.items()})
        return model

    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        model = loaded(message.content["arrays"])
        study.train(model, data, setting, context, int(message.content["config"]["server-round"]))
        content = {"arrays": arrays(model), "metrics": MetricRecord({"num-examples": 1})}  # equal weights
        return Message(RecordDict(content), reply_to=message)

    strategy: Any = FedAvg(fraction_evaluate=0.0)
    if study.epsilon:
        multiplier = math.sqrt(ROUNDS) / gaussian_mu(epsilon=study.epsilon, delta=DELTA)
        strategy = DifferentialPrivacyServerSideFixedClipping(
            strategy, multiplier, setting.size, study.clients
        )
    result = strategy.start(InProcessGrid(app, study.nodes()), arrays(lora()), num_rounds=ROUNDS)
    return accuracy(loaded(result.arrays), split()[1])


def copy_of(model: nn.Module) -> nn.Module:
    fresh = new_model()
    fresh.load_state_dict(model.state_dict())
    return fresh


METHODS: dict[str, tuple[Callable[[nn.Module, Study, Setting], float], dict[str, Sequence[Any]]]] = {
    "nblora, ranks 2-8": (
        ours,
        {"size": (0.3, 1.0, 3.0), "learning_rate": (0.02, 0.05), "rank": (0, 4)},
    ),
    "Flower, FedAvg on LoRA": (
        flowers,
        {"size": (1.0, 3.0, 10.0, 30.0), "learning_rate": (0.02, 0.05), "rank": (2, 8)},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[5, 50])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0, 8, 32], help="0 for no privacy")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", type=int, help="only this many of the settings")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    upright, test, _ = split()
    torch.manual_seed(0)
    base = new_model()
    train(base, upright, epochs=40, learning_rate=0.003)
    print(f"base model on rotated digits: {accuracy(base, test):.3f}\n")
    print("| clients | epsilon | method | accuracy, mean of seeds | lowest to highest | setting |")
    print("|---|---|---|---|---|---|")
    rows = []
    for clients, epsilon in itertools.product(options.clients, options.epsilon):
        for name, (method, grid) in METHODS.items():
            settings = [Setting(*values) for values in itertools.product(*grid.values())][: options.tune]
            if not epsilon and method is flowers:  # clips nothing
                settings = [setting for setting in settings if setting.size == grid["size"][0]]
            best = max(settings, key=lambda setting: method(base, Study(clients, epsilon, 0), setting))
            scores = [method(base, Study(clients, epsilon, 1 + seed), best) for seed in range(options.seeds)]
            rows.append(
                {"clients": clients, "epsilon": epsilon, "method": name, "scores": scores} | vars(best)
            )
            print(
                f"| {clients} | {epsilon or 'none'} | {name} | {statistics.mean(scores):.3f} | "
                f"{min(scores):.3f} to {max(scores):.3f} | size {best.size}, learning rate "
                f"{best.learning_rate}, rank {best.rank or 'all'} |",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps({"delta": DELTA, "rounds": ROUNDS, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
