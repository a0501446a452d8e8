"""Plans of private releases: the noise of `private_mean`, budgets over rounds, what is left of a ledger."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nblora.checkpoints.tables import json_text
from nblora.privacy import (
    NoisyLayer,
    PrivacyLedger,
    account_of,
    compose_subsampled,
    gaussian_epsilon,
    gaussian_mu,
    plan_release,
    private_mean,
    round_mu,
)
from nblora.privacy.planning import layer_rows, plan_rows

DELTA = 1e-5
BOUNDS, SHAPES = {"q": 0.8, "v": 0.2}, {"q": (30, 20), "v": (20, 40)}


def plan(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "bounds": BOUNDS,
        "shapes": SHAPES,
        "adjacency": "add-remove",
        "epsilon": 4.0,
        "delta": DELTA,
        "clients": 100,
        **changes,
    }
    return plan_release(**arguments)


@pytest.mark.parametrize("adjacency", ["add-remove", "replace-one"])
def test_the_noise_is_that_of_the_release(adjacency: Any) -> None:
    planned = plan(adjacency=adjacency)
    released = private_mean(
        [None] * 100,
        bounds=BOUNDS,
        shapes=SHAPES,
        adjacency=adjacency,
        epsilon=4.0,
        delta=DELTA,
        n_total=100,
    )
    assert {layer.name: layer.tau for layer in planned.layers} == pytest.approx(released.tau)
    assert {layer.name: layer.sensitivity for layer in planned.layers} == pytest.approx(
        released.sensitivities
    )
    assert planned.mu == pytest.approx(released.mu)


def test_the_figures_of_one_layer() -> None:
    """The reference case of MATH.md §7: relative errors 7.9 and 2.0, 1.58 and 0.40 are 1 / SNR of a mean
    whose norm is 0.7 of the bound."""
    one: dict[str, Any] = {"bounds": {"q": 1.0}, "shapes": {"q": (512, 512)}, "rank": 8}
    for clients, dense in ((100, 7.9), (500, 1.58), (2000, 0.40)):
        planned = plan(clients=clients, **one)
        assert planned.multiplier == pytest.approx(1.0812, abs=1e-4)
        assert planned.sensitivity == pytest.approx(1 / clients)
        (layer,) = planned.layers
        assert layer.tau == pytest.approx(planned.multiplier / clients)
        assert planned.noise == pytest.approx(512 * layer.tau)
        assert 1 / planned.snr == pytest.approx(0.7 * dense, rel=0.02)
    assert 1 / plan(clients=100, **one).truncated_snr == pytest.approx(0.7 * 2.0, rel=0.02)
    assert plan().truncated_snr is None


def test_norms_of_the_noise_against_noise() -> None:
    layer = NoisyLayer("q", (60, 90), 1.0, 1.0, 0.3)
    noise = 0.3 * torch.randn(200, 60, 90, dtype=torch.float64)
    sizes = torch.linalg.vector_norm(noise, dim=(-1, -2))
    assert layer.frobenius == pytest.approx(sizes.square().mean().sqrt().item(), rel=0.01)
    spectra = torch.linalg.svdvals(noise)
    assert layer.spectral * 0.95 < spectra[:, 0].mean().item() <= layer.spectral
    left = torch.linalg.vector_norm(spectra[:, :5], dim=-1).mean().item()
    assert 0.9 * layer.truncated(5) < left <= layer.truncated(5)
    assert layer.truncated(60) == layer.frobenius
    assert layer.truncated(1000) == layer.frobenius


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 10.0, 100.0])
def test_truncated_noise_is_about_the_error_of_the_truncated_release(size: float) -> None:
    """Whether the signal (m, n) of rank r is below the noise, near it or far above."""
    rank, (m, n) = 4, (80, 60)
    layer = NoisyLayer("q", (m, n), 1.0, 1.0, 1.0)
    errors = []
    for _ in range(10):
        u, v = torch.linalg.qr(torch.randn(m, rank))[0], torch.linalg.qr(torch.randn(n, rank))[0]
        signal = size * layer.spectral * (u @ v.mT)
        left, sigma, right = torch.linalg.svd(signal + torch.randn(m, n), full_matrices=False)
        errors.append(
            torch.linalg.vector_norm((left[:, :rank] * sigma[:rank]) @ right[:rank] - signal).item()
        )
    assert 0.6 < sum(errors) / len(errors) / layer.truncated(rank) < 1.2


def test_signal_to_noise_grows_with_clients_and_epsilon() -> None:
    first = plan(rank=3)
    assert plan(rank=3, clients=300).snr == pytest.approx(3 * first.snr)
    assert plan(rank=3, clients=300).truncated_snr == pytest.approx(3 * first.truncated_snr)
    assert plan(epsilon=8.0).snr > first.snr
    assert plan(adjacency="replace-one").snr == pytest.approx(first.snr / 2)
    assert first.truncated_snr > first.snr
    assert first.signal == pytest.approx(math.hypot(0.8, 0.2))


def test_rounds_share_the_budget_and_use_all_of_it() -> None:
    planned = plan(rounds=10)
    assert planned.mu == pytest.approx(gaussian_mu(epsilon=4.0, delta=DELTA) / math.sqrt(10))
    assert gaussian_epsilon(mu=planned.mu * math.sqrt(10), delta=DELTA) == pytest.approx(4.0, rel=1e-6)
    assert planned.round_epsilon == pytest.approx(gaussian_epsilon(mu=planned.mu, delta=DELTA))
    assert planned.snr == pytest.approx(plan().snr / math.sqrt(10))


def test_a_ledger_lets_planned_rounds_through_and_no_other(tmp_path: Path) -> None:
    ledger = PrivacyLedger.create(tmp_path / "l.json", epsilon=4.0, delta=DELTA, adjacency="add-remove")
    printed = float(plan_rows([plan(rounds=5)])[1][2])
    for _ in range(5):
        ledger.spend(
            mu=gaussian_mu(epsilon=printed, delta=DELTA), adjacency="add-remove", secure=True
        )  # what the table says, though it is rounded
    assert ledger.spent().epsilon == pytest.approx(4.0, rel=2e-3)
    assert ledger.spent().epsilon <= 4.0


def test_sampling_leaves_more_for_each_round() -> None:
    planned = plan(rounds=2, sampling_probability=0.4)
    mu = planned.mu
    reached = compose_subsampled([mu] * 2, sampling_probability=0.4, delta=DELTA, adjacency="add-remove")
    assert 4.0 * (1 - 2e-3) <= reached <= 4.0
    assert mu > 1.2 * plan(rounds=2).mu
    assert planned.sensitivity == pytest.approx(math.hypot(0.8, 0.2) / 40)  # forty of a hundred are expected


def test_what_is_left_of_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "l.json"
    ledger = PrivacyLedger.create(path, epsilon=4.0, delta=DELTA, adjacency="add-remove")
    assert account_of(path).left == pytest.approx(4.0)
    ledger.spend(mu=0.5, adjacency="add-remove", secure=True)
    account = account_of(ledger)
    assert account.spent.epsilon == pytest.approx(gaussian_epsilon(mu=0.5, delta=DELTA))
    ledger.spend(mu=gaussian_mu(epsilon=account.left, delta=DELTA), adjacency="add-remove", secure=False)
    account = account_of(path)
    assert account.left < 0.01
    assert account.spent.releases == 2
    assert "SEEDED NOISE" in account.summary
    assert "of 4 is spent at delta 1e-05 under add-remove" in account.summary


@pytest.mark.parametrize("share", [1.0, 1.1])
def test_nothing_is_left_of_a_spent_budget(share: float) -> None:
    whole = gaussian_mu(epsilon=4.0, delta=DELTA)
    arguments: dict[str, Any] = {"epsilon": 4.0, "delta": DELTA, "adjacency": "add-remove"}
    assert round_mu(spent=[(share * whole, 1.0)], **arguments) == 0


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"epsilon": math.nan}, "epsilon must be positive and finite"),
        ({"epsilon": 0}, "epsilon must be positive and finite"),
        ({"delta": math.nan}, "delta must be between 0 and 1"),
        ({"adjacency": "none"}, "adjacency must be"),
        ({"clients": 0}, "clients must be an integer >= 1"),
        ({"rounds": 0}, "rounds must be an integer >= 1"),
        ({"rank": 0}, "rank must be an integer >= 1"),
        ({"sampling_probability": math.nan}, "sampling_probability must be in"),
        ({"sampling_probability": 0.5, "adjacency": "replace-one"}, 'adjacency="add-remove" only'),
        ({"bounds": {"q": math.nan, "v": 1.0}}, "bound must be 0 or between"),
        ({"bounds": {"q": 1.0}}, "bounds and shapes must name the same layers"),
        ({"bounds": {}, "shapes": {}}, "bounds and shapes must name the same layers"),
        ({"shapes": {"q": (0, 3), "v": (2, 2)}}, "m must be an integer >= 1"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        plan(**changes)


def test_rows_and_content() -> None:
    plans = [plan(rank=2), plan(rank=2, clients=1000)]
    heading, *rows = plan_rows(plans)
    assert heading[0] == "epsilon"
    assert all(len(row) == len(heading) for row in rows)
    assert rows[0][heading.index("clients")] == "100"
    assert rows[0][heading.index("τ/Δ")] == "1.0812"
    assert float(rows[1][heading.index("SNR")]) == pytest.approx(plans[1].snr, rel=0.01)
    assert "rounds" not in heading
    assert [row[0] for row in layer_rows(plans[0])] == ["layer", "q", "v"]
    content = json.loads(json_text(plans[0].content()))
    assert content["snr"] == pytest.approx(plans[0].snr)
    assert content["layers"][1]["shape"] == [20, 40]
