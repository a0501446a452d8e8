"""What runs at every client."""

from flwr.app import Context
from torch import nn

from federated_digits.task import RANKS, load_model, part, train
from nblora.federated.flower import client_app


def index(context: Context) -> int:
    return int(context.node_config["partition-id"])


def fit(model: nn.Module, context: Context, server_round: int) -> None:
    config = context.run_config
    train(
        model,
        part(index(context), int(context.node_config["num-partitions"])),
        epochs=int(config["epochs"]),
        learning_rate=float(config["learning-rate"]),
        seed=server_round,
    )


app = client_app(
    lambda context: load_model(str(context.run_config["base"])),
    fit,
    rank=lambda context: RANKS[index(context) % len(RANKS)],  # as much as each can afford
)
