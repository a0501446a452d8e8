"""Federated rounds without an engine: plan, client, and the server's guard, mean, ledger and checkpoints."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import TwoLayers, tiny_gpt2, tiny_llama, tokens
from nblora import NBLoraConfig
from nblora.bounds import parse_norm
from nblora.federated import (
    Budget,
    FederatedClient,
    Federation,
    FederationPlan,
    PlannedLayer,
    Refused,
    Task,
    adapted_model,
    add_updates,
    apply_updates,
    client_updates,
    pack,
    unpack,
)
from nblora.lowrank import LowRank
from nblora.privacy import PrivacyLedger, compose, compose_subsampled, gaussian_epsilon, gaussian_mu

BUDGET = Budget(8.0, 1e-5, "add-remove")
LAYERS = {"a": PlannedLayer((6, 4), 1.0), "b": PlannedLayer((3, 5), 0.5)}


def plan(**options: Any) -> FederationPlan:
    return FederationPlan(
        **{"layers": LAYERS, "norm": "frobenius", "max_rank": 4, "rounds": 3, "n_total": 5} | options
    )


def update(seed: int, rank: int = 2, share: float = 0.9) -> dict[str, LowRank]:
    """An honest one: each layer has `share` of its bound."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in LAYERS.items():
        m, n = layer.shape
        left, right = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
        made[name] = LowRank(left * (share * layer.radius / (left @ right).norm()), right)
    return made


def dense(updates: Mapping[str, LowRank | Tensor]) -> dict[str, Tensor]:
    return {
        name: (value.dense() if isinstance(value, LowRank) else value).double()
        for name, value in updates.items()
    }


def assert_close(updates: Mapping[str, LowRank | Tensor], expected: Mapping[str, Tensor]) -> None:
    found = dense(updates)
    assert set(found) == set(expected)
    for name, value in expected.items():
        # float32 results of sums of a few numbers below the bound
        assert (found[name] - value).abs().max() <= 1e-6 * LAYERS[name].radius


def mean(updates: list[dict[str, LowRank]], n_total: int) -> dict[str, Tensor]:
    return {name: sum(dense(u)[name] for u in updates) / n_total for name in LAYERS}  # type: ignore[misc]


# --- plan ---


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "nuclear", "ky-fan-2", 3.0])
def test_plan_of_a_model(norm: str | float) -> None:
    """Radii are what an adapter of the same configuration gets, and the model stays as it was."""
    model = TwoLayers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.first.weight.requires_grad_(False)
    made = FederationPlan.for_model(
        model,
        NBLoraConfig(r=3, norm=norm, bound=0.4, target_modules="all-linear"),
        rounds=2,
        n_total=7,
        budget=BUDGET,
    )
    assert set(made.layers) == {"first", "second"}
    for name, layer in made.layers.items():
        weight = before[f"{name}.weight"]
        assert layer.shape == tuple(weight.shape)
        assert layer.radius == pytest.approx(0.4 * torch.linalg.matrix_norm(weight, 2).item(), rel=1e-5)
    assert (made.max_rank, made.norm) == (3, norm)
    assert type(model.first) is nn.Linear
    assert not model.first.weight.requires_grad
    assert model.second.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert FederationPlan.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"modules_to_save": ["second"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"target_parameters": ["first.weight"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_has_no_bound_is_refused(options: dict[str, Any], error: str) -> None:
    config = NBLoraConfig(**{"target_modules": ["first"]} | options)
    with pytest.raises(ValueError, match=error):
        FederationPlan.for_model(TwoLayers(), config, rounds=1, n_total=1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"layers": {}}, "at least one layer"),
        ({"layers": {"a": PlannedLayer((2, 2), math.nan)}}, "radius of a"),
        ({"layers": {"a": PlannedLayer((2, 2), 0.0)}}, "at least one radius"),
        ({"rounds": 0}, "rounds"),
        ({"n_total": 0}, "n_total"),
        ({"max_rank": True}, "max_rank"),
        ({"sampling_probability": 0.0}, "sampling_probability"),
        ({"sampling_probability": math.nan}, "sampling_probability"),
        ({"on_excess": "clip"}, "on_excess"),
        ({"release_rank": 0}, "release_rank"),
        ({"norm": "operator"}, "norm"),
        ({"budget": Budget(1.0, 1e-5, "replace-one"), "sampling_probability": 0.5}, "add-remove"),
    ],
)
def test_plans_outside_their_rules_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        plan(**options)


@pytest.mark.parametrize("values", [(math.nan, 1e-5), (0.0, 1e-5), (1.0, 0.0), (1.0, math.nan)])
def test_budgets_outside_their_rules_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"epsilon|delta"):
        Budget(*values, "add-remove")


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 50])
def test_noise_is_split_evenly(rounds: int) -> None:
    mu = plan(budget=Budget(4.0, 1e-6, "replace-one"), rounds=rounds).mu
    assert mu is not None
    assert compose([mu] * rounds) == pytest.approx(gaussian_mu(epsilon=4.0, delta=1e-6), rel=1e-9)
    assert gaussian_epsilon(mu=compose([mu] * rounds), delta=1e-6) <= 4.0


def test_sampling_makes_the_noise_smaller_and_spends_the_budget() -> None:
    budget = Budget(0.5, 1e-5, "add-remove")
    mu, unsampled = (plan(budget=budget, sampling_probability=share).mu for share in (0.2, 1.0))
    assert mu is not None
    assert unsampled is not None
    assert mu > 1.5 * unsampled
    epsilon = compose_subsampled([mu] * 3, sampling_probability=0.2, delta=1e-5, adjacency="add-remove")
    assert 0.99 * 0.5 <= epsilon <= 0.5


def test_without_a_budget_there_is_no_noise_to_plan() -> None:
    assert plan().mu is None


# --- updates ---


def test_updates_are_added_exactly() -> None:
    first, second = update(1), update(2, rank=3)
    total = add_updates(first, second)
    assert_close(total, {name: dense(first)[name] + dense(second)[name] for name in LAYERS})
    assert isinstance(total["a"], Tensor)  # 5 * (6 + 4) numbers are more than 6 * 4
    tall = {"w": LowRank(torch.randn(50, 1), torch.randn(1, 40))}
    doubled = add_updates(tall, tall)["w"]
    assert isinstance(doubled, LowRank)
    assert doubled.rank == 2
    assert torch.equal(doubled.dense(), 2 * tall["w"].dense())
    assert add_updates({}, tall) == tall
    assert add_updates(tall, {}) == tall


def test_updates_are_packed_and_unpacked() -> None:
    updates: dict[str, LowRank | Tensor] = {"x.left": torch.randn(2, 3), "x": update(0)["a"]}
    again = unpack(pack(updates))
    assert set(again) == set(updates)
    assert torch.equal(again["x.left"], updates["x.left"])  # type: ignore[arg-type]
    assert torch.equal(dense(again)["x"], dense(updates)["x"])


@pytest.mark.parametrize(
    "names", [["a"], ["a.middle"], ["a.left"], ["a.left", "a.right", "a.dense"], [".left"]]
)
def test_names_that_are_no_update_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"left.* (right|dense)|\.left, \.right or \.dense"):
        unpack({name: torch.zeros(2, 2) for name in names})


# --- client ---


class Everything(nn.Module):
    """One layer of each kind; a name that ends in another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 4, 3)
        self.head = nn.Linear(4, 5)
        self.inner = nn.ModuleDict({"head": nn.Linear(5, 7)})

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.conv(self.table(x).mT).mean(-1)
        return self.inner["head"](torch.tanh(self.head(hidden)))  # type: ignore[no-any-return]


def everything_plan(**options: Any) -> FederationPlan:
    config = NBLoraConfig(
        r=4,
        norm="spectral",
        bound=0.5,
        bound_pattern={"inner.head": 0.1},
        target_modules=["table", "conv", "head"],
    )
    return FederationPlan.for_model(Everything(), config, **{"rounds": 3, "n_total": 2} | options)


def descend(model: nn.Module, index: int) -> None:
    """A few steps of a loop of one's own."""
    x = torch.randint(0, 11, (32, 9))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().neg().backward()
        optimizer.step()


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_a_client_stays_inside_its_bounds_at_its_rank(rank: int) -> None:
    made = everything_plan()
    sent = FederatedClient(Everything, descend, rank=rank).fit(Task(1, made, {}))
    assert set(sent) == {"table", "conv", "head", "inner.head"} == set(made.layers)
    for name, one in sent.items():
        layer = made.layers[name]
        assert one.shape == layer.shape
        assert one.rank == min(rank, 4, *layer.shape)
        assert one.left.dtype == one.right.dtype == torch.float32
        norm = parse_norm("spectral").value(one.singular_values()).item()
        assert 0 < norm <= layer.radius * (1 + 1e-6)


def test_radii_of_names_that_end_in_one_another_are_kept_apart() -> None:
    made = everything_plan()
    adapted_model(Everything(), made, {}, rank=2)  # compares every radius with the plan's
    weight = Everything().inner["head"].weight
    assert made.layers["inner.head"].radius == pytest.approx(
        0.1 * torch.linalg.matrix_norm(weight, 2).item(), rel=1e-5
    )


def test_a_client_starts_from_the_global_update() -> None:
    """Before training the adapted model is the base model plus the global update, in every kind of layer."""
    made = everything_plan()
    updates: dict[str, LowRank | Tensor] = {
        name: torch.randn(layer.shape) / 10 for name, layer in made.layers.items()
    }
    updates["head"] = LowRank(torch.randn(5, 2), torch.randn(2, 4))
    expected = Everything()
    with torch.no_grad():
        expected.table.weight += updates["table"].mT  # type: ignore[union-attr]
        expected.conv.weight += updates["conv"].reshape(4, 6, 3)  # type: ignore[union-attr]
        expected.head.weight += dense(updates)["head"].float()
        expected.inner["head"].weight += updates["inner.head"]
    x = torch.randint(0, 11, (3, 9))
    adapted = adapted_model(Everything(), made, updates, rank=3)
    assert torch.allclose(adapted(x), expected(x), atol=1e-6)
    assert all(not one.dense().any() for one in client_updates(adapted).values())
    plain = apply_updates(Everything().eval(), made, updates)
    assert torch.allclose(plain(x), expected(x), atol=1e-6)
    assert not plain.training
    assert type(plain.head) is nn.Linear
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_conv1d_of_transformers_takes_its_transpose() -> None:
    model = tiny_gpt2()
    config = NBLoraConfig(r=2, bound=0.5, target_modules=["c_attn"])
    made = FederationPlan.for_model(model, config, rounds=1, n_total=1)
    name = "transformer.h.0.attn.c_attn"
    assert made.layers[name].shape == (96, 32)
    added = torch.randn(96, 32)
    before = model.get_submodule(name).weight.detach().clone()
    after = apply_updates(model, made, {name: added}).get_submodule(name).weight
    assert torch.allclose(after, before + added.mT)


@pytest.mark.parametrize("rank", [2, 4])
def test_a_client_may_train_with_transformers_trainer(rank: int, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def fit(model: nn.Module, index: int) -> None:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            learning_rate=0.01,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        data = [{"input_ids": row, "labels": row} for row in tokens(8)]
        Trainer(model, arguments, train_dataset=data).train()  # type: ignore[arg-type]

    config = NBLoraConfig(r=4, bound=0.3, target_modules=["q_proj", "down_proj"])
    made = FederationPlan.for_model(tiny_llama(), config, rounds=1, n_total=1)
    sent = FederatedClient(tiny_llama, fit, rank=rank).fit(Task(1, made, {}))
    assert len(sent) == 4
    for name, one in sent.items():
        assert one.rank == rank
        assert 0 < one.dense().norm() <= made.layers[name].radius * (1 + 1e-6)


def test_another_base_model_is_refused() -> None:
    made = everything_plan()

    def other() -> nn.Module:
        model = Everything()
        with torch.no_grad():
            model.conv.weight[0, 0, 0] += 1e-6
        return model

    with pytest.raises(ValueError, match="base weights must be those of the plan"):
        FederatedClient(other, descend, rank=2).fit(Task(1, made, {}))
    FederatedClient(other, descend, rank=2).fit(Task(1, replace(made, base=None), {}))
    with pytest.raises(ValueError, match="must have the layers of the plan"):
        FederatedClient(TwoLayers, descend, rank=2).fit(Task(1, made, {}))


# --- server: the mean ---


def test_exact_mean_over_the_fixed_denominator(tmp_path: Path) -> None:
    """Of different ranks; who does not come counts as zero; rounds add up."""
    updates = [update(seed, rank) for seed, rank in enumerate([1, 2, 4])]
    with Federation(tmp_path, plan()) as federation:
        federation.finish_round(dict(enumerate(updates)) | {7: None, 8: None})
        assert_close(federation.updates, mean(updates, 5))
        assert federation.clients[8].status == "absent"
        federation.finish_round({"x": updates[0]})
        assert_close(federation.updates, mean([*updates, updates[0]], 5))
        assert not (tmp_path / "ledger.json").exists()
        assert federation.spent() == math.inf


class Unreadable(dict[str, Tensor]):
    """An update that is decoded when it is asked for, and cannot be."""

    def items(self) -> Any:
        raise OSError("cut short")


LIES: dict[str, Any] = {
    "decoding": Unreadable(a=torch.zeros(6, 4)),
    "NaN": {"a": torch.full((6, 4), math.nan), "b": torch.zeros(3, 5)},
    "infinity": {"a": torch.full((6, 4), math.inf)},
    "NaN in a factor": {"a": LowRank(torch.full((6, 1), math.nan), torch.zeros(1, 4))},
    "shape": {"a": torch.zeros(4, 6)},
    "three axes": {"a": torch.zeros(1, 6, 4)},
    "extra": {"a": torch.zeros(6, 4), "c": torch.zeros(6, 4)},
    "names": {1: torch.zeros(6, 4)},
    "norm": {"a": torch.full((6, 4), 1.0)},
    "a little too much": update(9, share=1.0001),
    "huge factors": {"a": LowRank(torch.full((6, 2), 1e30), torch.tensor([[1e30] * 4, [-9e29] * 4]))},
    "rank": {"a": LowRank(torch.zeros(6, 99), torch.zeros(99, 4))},
    "integers": {"a": torch.zeros(6, 4, dtype=torch.int64)},
    "complex": {"a": torch.zeros(6, 4, dtype=torch.complex64)},
    "meta": {"a": torch.zeros(6, 4, device="meta")},
    "sparse": {"a": torch.zeros(6, 4).to_sparse()},
    "no tensor": {"a": [[0.0] * 4] * 6},
    "text": "nothing useful",
    "number": 3,
    "unreadable": Refused("it was garbage"),
    "nothing": None,
    "empty": {},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_client_counts_as_zero_and_stops_nothing(lie: str, tmp_path: Path) -> None:
    honest = [update(1), update(2)]
    with Federation(tmp_path, plan()) as federation:
        federation.finish_round({"first": honest[0], "liar": LIES[lie], "second": honest[1]})
        assert_close(federation.updates, mean(honest, 5))
        reports = federation.clients
    assert reports["first"].status == reports["second"].status == "accepted"
    expected = {"nothing": "absent", "empty": "accepted"}
    assert reports["liar"].status in (expected.get(lie), "refused", "rejected")
    if lie not in expected:
        assert reports["liar"].status != "accepted"
        assert reports["liar"].reason
    if lie == "unreadable":
        assert reports["liar"].reason == "it was garbage"
    assert {key.name for key in tmp_path.iterdir()} == {"state.json", "server.lock", "round-0001.safetensors"}


def test_excess_can_be_scaled_back(tmp_path: Path) -> None:
    large = update(3, share=30.0)
    with Federation(tmp_path, plan(on_excess="project", n_total=1)) as federation:
        federation.finish_round({0: large})
        assert federation.clients[0].status == "projected"
        for name, layer in LAYERS.items():
            direction = dense(large)[name] / dense(large)[name].norm()
            assert (dense(federation.updates)[name] - layer.radius * direction).norm() < 1e-5


def test_spectral_bounds_are_turned_into_frobenius_ones(tmp_path: Path) -> None:
    made = plan(norm="spectral", max_rank=3)
    assert made.frobenius_bounds() == pytest.approx({"a": math.sqrt(3), "b": 0.5 * math.sqrt(3)})
    full = {"a": LowRank(torch.eye(6, 3), torch.eye(3, 4))}  # three singular values 1
    with Federation(tmp_path, replace(made, n_total=1)) as federation:
        federation.finish_round({0: full})
        assert federation.clients[0].status == "accepted"
        assert_close(federation.updates, dense(full) | {"b": torch.zeros(3, 5)})


def test_release_rank_is_kept_as_factors(tmp_path: Path) -> None:
    layers = {"w": PlannedLayer((40, 30), 1.0)}
    made = plan(layers=layers, release_rank=2, budget=BUDGET)
    with Federation(tmp_path, made) as federation:
        for expected in (2, 4, 6):
            federation.finish_round({})
            value = federation.updates["w"]
            assert isinstance(value, LowRank)
            assert value.rank == expected
    with Federation(tmp_path, made) as federation:
        again = federation.updates["w"]
        assert isinstance(again, LowRank)
        assert torch.equal(again.dense(), value.dense())


def test_each_release_is_projected_onto_the_ball(tmp_path: Path) -> None:
    layers = {"w": PlannedLayer((40, 30), 1.0)}
    loud = plan(layers=layers, budget=Budget(0.1, 1e-5, "add-remove"), n_total=1)
    for project, inside in ((True, True), (False, False)):
        with Federation(tmp_path / str(project), replace(loud, project=project)) as federation:
            federation.finish_round({})
            assert (dense(federation.updates)["w"].norm().item() <= 1 + 1e-6) is inside


# --- server: privacy ---


def test_noise_has_the_size_that_the_budget_asks_for(tmp_path: Path) -> None:
    """From the released numbers: the sum of squares over tau^2 is chi-squared."""
    layers = {"w": PlannedLayer((60, 50), 2.0), "v": PlannedLayer((10, 10), 0.1)}
    made = plan(layers=layers, budget=BUDGET, n_total=4, rounds=4, project=False)
    with Federation(tmp_path, made) as federation:
        done = federation.finish_round({})
        # MATH.md §7: of both layers together mu = sqrt(sum (Delta / tau)^2), Delta = bound / n_total
        mu = math.hypot(2.0 / 4 / done.tau["w"], 0.1 / 4 / done.tau["v"])
        assert mu == pytest.approx(gaussian_mu(epsilon=8.0, delta=1e-5) / 2, rel=1e-6)
        for name, count in (("w", 3000), ("v", 100)):
            ratio = dense(federation.updates)[name].square().sum().item() / done.tau[name] ** 2
            assert abs(ratio - count) < 6 * math.sqrt(2 * count)


@pytest.mark.parametrize("rounds", [1, 3, 6])
def test_all_rounds_together_spend_the_budget_and_no_more(rounds: int, tmp_path: Path) -> None:
    with Federation(tmp_path, plan(budget=BUDGET, rounds=rounds)) as federation:
        for index in range(1, rounds + 1):
            assert federation.next_round == index
            assert federation.finish_round({0: update(index), 1: update(9)}).status == "released"
        assert federation.next_round is None
        assert 0.999 * 8 <= federation.spent() <= 8
        ledger = PrivacyLedger(tmp_path / "ledger.json")
        assert (ledger.epsilon, ledger.delta, ledger.adjacency) == (8.0, 1e-5, "add-remove")
        assert [r.identifier for r in ledger.releases] == [r.release for r in federation.rounds]
        assert ledger.spent().secure
        with pytest.raises(RuntimeError, match=f"has all of its {rounds} rounds"):
            federation.finish_round({0: update(1)})
        assert len(ledger.releases) == rounds


def test_replacement_needs_twice_the_noise(tmp_path: Path) -> None:
    tau = {}
    for adjacency in ("add-remove", "replace-one"):
        made = plan(budget=Budget(8.0, 1e-5, adjacency))  # type: ignore[arg-type]
        with Federation(tmp_path / adjacency, made) as federation:
            tau[adjacency] = federation.finish_round({0: update(0)}).tau["a"]
    assert tau["replace-one"] == pytest.approx(2 * tau["add-remove"])


def test_what_is_saved_does_not_depend_on_who_came(tmp_path: Path) -> None:
    """But for the released numbers themselves: no counts, no names, no reasons."""
    texts = []
    for name, messages in (("none", {}), ("some", {"ann": update(1), "bob": LIES["NaN"], "cy": None})):
        with Federation(tmp_path / name, plan(budget=BUDGET)) as federation:
            done = federation.finish_round(messages)
            assert "ann" not in repr(done)
        state = (tmp_path / name / "state.json").read_text()
        ledger = (tmp_path / name / "ledger.json").read_text()
        text = re.sub(r"[0-9a-f]{32}|\d{4}-\d\d-\d\dT[^\"]*", "", state + ledger)  # identifiers, times
        texts.append((text, sorted(path.name for path in (tmp_path / name).iterdir())))
    assert texts[0] == texts[1]


def test_the_log_is_told_what_was_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Federation(tmp_path, plan()) as federation:
        federation.finish_round({"ann": update(1), "bob": LIES["NaN"]})
    assert "round 1, client bob: refused: entries must be finite" in caplog.text
    assert "ann" not in caplog.text


def test_clients_are_sampled_and_the_ledger_knows(tmp_path: Path) -> None:
    budget = Budget(1.0, 1e-5, "add-remove")  # the larger epsilon, the longer the accounting
    made = plan(budget=budget, sampling_probability=0.25, rounds=2)
    with Federation(tmp_path, made) as federation:
        sizes = [len(federation.sample(range(400))) for _ in range(3)]
        assert all(48 < size < 152 for size in sizes)  # 100 +- 6 standard deviations
        assert federation.sample([]) == []
        assert set(federation.sample(["a", "b"])) <= {"a", "b"}
        for _ in range(2):
            federation.finish_round({})
        assert [r.sampling_probability for r in federation.ledger.releases] == [0.25] * 2  # type: ignore[union-attr]
        assert 0.99 <= federation.spent() <= 1
    with Federation(tmp_path / "all", plan()) as federation:
        assert federation.sample([3, 1]) == [3, 1]


# --- server: checkpoints ---


@pytest.mark.parametrize("budget", [None, BUDGET])
def test_a_federation_goes_on_where_it_was(budget: Budget | None, tmp_path: Path) -> None:
    made = plan(budget=budget)
    with Federation(tmp_path, made) as federation:
        federation.finish_round({0: update(1)})
        federation.finish_round({0: update(2)})
        rounds, updates = federation.rounds, dense(federation.updates)
    with Federation(tmp_path, made) as federation:
        assert federation.rounds == rounds
        assert all(torch.equal(value, updates[name]) for name, value in dense(federation.updates).items())
        assert federation.next_round == 3
        federation.finish_round({0: update(3)})
        assert federation.next_round is None
    assert len(list(tmp_path.glob("round-*.safetensors"))) == 3


def test_one_server_at_a_time(tmp_path: Path) -> None:
    with Federation(tmp_path, plan()), pytest.raises(RuntimeError, match="open in one server at a time"):
        Federation(tmp_path, plan())
    Federation(tmp_path, plan()).close()


def test_the_plan_is_fixed(tmp_path: Path) -> None:
    with Federation(tmp_path, plan(budget=BUDGET)) as federation:
        federation.finish_round({})
    for other in (
        {"budget": Budget(9.0, 1e-5, "add-remove")},
        {"budget": None},
        {"budget": BUDGET, "rounds": 2},
        {"budget": BUDGET, "n_total": 6},
    ):
        with pytest.raises(ValueError, match="plan must be that of the federation"):
            Federation(tmp_path, plan(**other))


def test_a_plan_may_be_of_numpys_numbers_and_lists(tmp_path: Path) -> None:
    layers = {"a": PlannedLayer([6, 4], np.float32(0.3))}  # type: ignore[arg-type]
    made = plan(budget=BUDGET, layers=layers, n_total=np.int64(5), max_rank=np.int64(2))
    for _ in range(2):
        with Federation(tmp_path, made) as federation:
            federation.finish_round({})
    assert [entry.status for entry in federation.rounds] == ["released"] * 2


def test_a_ledger_that_is_gone_or_of_another_is_refused(tmp_path: Path) -> None:
    made = plan(budget=BUDGET)
    with Federation(tmp_path, made) as federation:
        federation.finish_round({})
    ledger = tmp_path / "ledger.json"
    kept = ledger.read_text()
    ledger.unlink()
    with pytest.raises(FileNotFoundError):
        Federation(tmp_path, made)
    PrivacyLedger.create(ledger, epsilon=8.0, delta=1e-5, adjacency="add-remove")
    with pytest.raises(ValueError, match="ledger must tell of every round"):
        Federation(tmp_path, made)
    ledger.write_text(kept.replace("8.0", "80.0"))
    with pytest.raises(ValueError, match="ledger's budget must be the plan's"):
        Federation(tmp_path, made)


def test_a_state_that_is_gone_does_not_give_the_budget_back(tmp_path: Path) -> None:
    made = plan(budget=BUDGET)
    with Federation(tmp_path, made) as federation:
        federation.finish_round({})
        federation.finish_round({})
    (tmp_path / "state.json").unlink()
    with Federation(tmp_path, made) as federation:
        assert [entry.status for entry in federation.rounds] == ["lost", "lost"]
        assert federation.updates == {}
        federation.finish_round({})
        assert federation.next_round is None
        assert federation.spent() <= 8


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format=2),
        lambda content: content.pop("rounds"),
        lambda content: content["rounds"][0].update(tensors="../other.safetensors"),
        lambda content: content["plan"].pop("layers"),
    ],
)
def test_a_damaged_state_is_refused(change: Any, tmp_path: Path) -> None:
    with Federation(tmp_path, plan()) as federation:
        federation.finish_round({0: update(1)})
    file = tmp_path / "state.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must be whole and valid"):
        Federation(tmp_path, plan())


def test_a_round_whose_release_was_not_saved_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk: the same object goes on with the next round, and so does one that is opened again."""
    made = plan(budget=BUDGET)

    def full(self: Federation, *_: Any) -> None:
        raise OSError("no space left")

    with Federation(tmp_path, made) as federation:
        first = federation.finish_round({0: update(1)})
        before = dense(federation.updates)
        with monkeypatch.context() as patch:
            patch.setattr(Federation, "_save", full)
            with pytest.raises(OSError, match="no space left"):
                federation.finish_round({0: update(2)})
        assert all(torch.equal(value, before[name]) for name, value in dense(federation.updates).items())
        done = federation.finish_round({0: update(2)})
        assert done.index == 3
        assert "round 2 was paid for and not saved: it is lost" in caplog.text
        assert [entry.status for entry in federation.rounds] == ["released", "lost", "released"]
        assert federation.rounds[0] == first
        assert federation.next_round is None
        assert federation.spent() <= 8


KILLS = """
import os, signal, sys
from pathlib import Path
import torch
from nblora.federated import Budget, Federation, FederationPlan, PlannedLayer
from nblora.lowrank import LowRank

update = {"a": LowRank(torch.full((6, 1), 0.1), torch.full((1, 4), 0.1))}
calls = 0

def deadly(function, at):
    def count():
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
    def wrapped(*args, **kwargs):
        count()
        result = function(*args, **kwargs)
        count()
        return result
    return wrapped

def child(folder, plan, at):
    with Federation(folder, plan) as federation:
        federation.finish_round({0: update})
        for name in ("replace", "fsync", "open", "urandom"):
            setattr(os, name, deadly(getattr(os, name), at))
        federation.finish_round({0: update})

def kill_everywhere(parent, budget):
    layers = {"a": PlannedLayer((6, 4), 1.0)}
    plan = FederationPlan(layers, "frobenius", 2, rounds=3, n_total=2, budget=budget)
    at, lost, killed = 0, 0, True
    while killed:
        at += 1
        folder = parent / str(at)
        pid = os.fork()
        if pid == 0:
            child(folder, plan, at)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        killed = status != 0
        assert not killed or os.WTERMSIG(status) == signal.SIGKILL, status
        with Federation(folder, plan) as federation:
            rounds = federation.rounds
            assert rounds[0].status == "released", rounds
            assert len(rounds) in (1, 2), rounds
            lost += rounds[-1].status == "lost"
            if budget:
                spent = federation.spent()
                releases = [release.identifier for release in federation.ledger.releases]
                assert releases == [entry.release for entry in rounds], (releases, rounds)
            else:
                assert abs(federation.updates["a"] - 0.005 * len(rounds)).max() < 1e-7
            while federation.next_round is not None:
                federation.finish_round({0: update})
            assert len(federation.rounds) == 3
            if budget:
                assert spent < federation.spent() <= 8, (spent, federation.spent())
                assert len(federation.ledger.releases) == 3
    return at - 1, lost

kills, lost = kill_everywhere(Path(sys.argv[1]) / "private", Budget(8.0, 1e-5, "add-remove"))
assert kills >= 14 and lost >= 6, (kills, lost)
kills, lost = kill_everywhere(Path(sys.argv[1]) / "exact", None)
assert kills >= 8 and lost == 0, (kills, lost)
"""


def test_a_server_killed_anywhere_goes_on_and_never_releases_for_free(tmp_path: Path) -> None:
    """SIGKILL before and after every write, sync and draw of noise of the second round."""
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- import ---


def test_the_core_does_not_load_flower_and_the_door_names_the_extra() -> None:
    code = (
        "import sys; import nblora.federated; assert 'flwr' not in sys.modules\n"
        "sys.modules['flwr'] = None\n"
        "import nblora.federated.flower"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ImportError: nblora.federated.flower needs Flower" in done.stderr
    assert "pip install 'nblora[flower]'" in done.stderr
