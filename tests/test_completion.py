"""Matrix completion: bound, rank, optimality, selection, unseen rows and new entries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sklearn")

from nblora.completion import NBMatrixCompletion

Array = NDArray[np.float64]


def noisy(m: int, n: int, rank: int, rate: float, noise: float, seed: int) -> tuple[Array, Array]:
    """The truth (m, n), and what is observed of it, else NaN."""
    random = np.random.default_rng(seed)
    truth = random.normal(size=(m, rank)) @ random.normal(size=(rank, n)) / math.sqrt(rank)
    seen = random.random((m, n)) < rate
    return truth, np.where(seen, truth + noise * random.normal(size=(m, n)), np.nan)


def rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def spectrum(model: NBMatrixCompletion, X: Array) -> Array:
    """Of the completed matrix less its biases, by what `predict` says of every place."""
    rows, columns = (index.ravel() for index in np.indices(X.shape))
    part = model.predict(rows, columns).reshape(X.shape) - model.offset_
    return np.linalg.svd(part - model.row_bias_[:, None] - model.column_bias_, compute_uv=False)


NORMS = {
    "nuclear": lambda sigma: sigma.sum(),
    "frobenius": lambda sigma: math.sqrt((sigma**2).sum()),
    "spectral": lambda sigma: sigma.max(),
    "ky-fan-2": lambda sigma: sigma[:2].sum(),
}


@pytest.mark.parametrize("parametrization", ["joint", "svd"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (8, 8), (30, 21)])
@pytest.mark.filterwarnings("ignore:.*have no observed entry")
def test_rank_and_norm_are_bounded(shape: tuple[int, int], norm: str, parametrization: Any) -> None:
    _, X = noisy(*shape, 3, 0.7, 0.2, 4)
    size = NORMS[norm](np.linalg.svd(np.nan_to_num(X), compute_uv=False))
    for dtype, slack, share in (("float32", 1e-4, 0.4), ("float64", 1e-5, 1e-3), ("float32", 1e-4, 50.0)):
        model = NBMatrixCompletion(
            4,
            norm=norm,
            bound=share * size,
            parametrization=parametrization,
            rank_selection=None,
            dtype=dtype,
        ).fit(X)
        sigma = spectrum(model, X)
        assert NORMS[norm](sigma) <= share * size * (1 + slack)
        assert (sigma[4:] <= 1e-5 * sigma[0]).all()
        assert model.rank_ <= min(4, *shape)
        assert model.certificate_.holds


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_frobenius_solution_is_optimal(share: float) -> None:
    """At full rank the problem is convex: against accelerated projected gradient."""
    random = np.random.default_rng(1)
    X = np.where(random.random((14, 11)) < 0.7, random.normal(size=(14, 11)), np.nan)
    seen, bound = ~np.isnan(X), share * float(np.sqrt(np.nansum(X**2)))
    current = leading = np.zeros(X.shape)
    momentum = 1.0
    for _ in range(3000):
        new = leading - np.where(seen, leading - X, 0.0)
        new *= min(1.0, bound / np.linalg.norm(new))
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        leading = new + (momentum - 1) / following * (new - current)
        current, momentum = new, following
    model = NBMatrixCompletion(11, norm="frobenius", bound=bound, bias=None, rank_selection=None).fit(X)
    reached, best = (np.nansum((Y - X) ** 2) for Y in (model.predict(X), current))
    assert reached <= 1.01 * best


@pytest.mark.parametrize("rank", [20, 50])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_rank_is_found(rank: int, seed: int) -> None:
    truth, X = noisy(200, 150, 6, 0.3, 0.1, seed)
    missing = np.isnan(X)
    found = NBMatrixCompletion(rank, bias=None, random_state=0).fit(X)
    told = NBMatrixCompletion(6, bound=1e4, bias=None, rank_selection=None).fit(X)
    assert found.rank_ == 6
    errors = [rms((model.predict(X) - truth)[missing]) for model in (found, told)]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_unseen_rows_are_completed_like_seen_ones(noise: float) -> None:
    truth, X = noisy(300, 100, 3, 0.4, noise, 0)
    model = NBMatrixCompletion(10, random_state=0).fit(X[:200])
    seen, unseen = (
        rms((model.transform(X[part]) - truth[part])[np.isnan(X[part])])
        for part in (slice(None, 200), slice(200, None))
    )
    assert unseen <= 1.10 * seen


@pytest.mark.parametrize(("norm", "bound"), [("nuclear", 330.0), ("frobenius", 150.0), ("spectral", 80.0)])
def test_new_entries_need_half_the_passes(norm: str, bound: float) -> None:
    truth, X = noisy(200, 150, 5, 0.3, 0.1, 3)
    late = np.random.default_rng(7).random(X.shape) < 0.05
    options: dict[str, Any] = {"norm": norm, "bound": bound, "rank_selection": None}
    warm = NBMatrixCompletion(8, **options).fit(np.where(late, np.nan, X))
    warm.partial_fit(np.where(late, X, np.nan))
    cold = NBMatrixCompletion(8, **options).fit(X)
    assert warm.n_evaluations_ <= cold.n_evaluations_ / 2
    errors = [rms((model.predict(X) - truth)[np.isnan(X)]) for model in (warm, cold)]
    assert errors[0] <= 1.05 * errors[1]
