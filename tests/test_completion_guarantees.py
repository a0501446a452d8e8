"""What matrix completion promises: bound and rank, optimum, selection, new rows, intervals, new entries.

Norms are computed from numpy's singular values of the dense matrix that the estimator predicts, optima by
another algorithm with a duality gap, and the truth is known. What the estimator takes and refuses is the
business of test_completion_estimator.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.model_selection import KFold, ShuffleSplit

import shared_norms
from completion_samples import Sample, rms, sample
from nblora.bounds import Gauge, Profile
from nblora.completion import NBMatrixCompletion
from nblora.completion.entries import Entries

Array = NDArray[np.float64]
NORMS = ("nuclear", "frobenius", "spectral", 3.5, "ky-fan-2")
PARAMETRIZATIONS = ("joint", "svd")
DTYPES = ("float32", "float64")
CHEAP = ("nuclear", "frobenius", "spectral")  # whose projections have closed forms
every_norm = pytest.mark.parametrize("norm", NORMS)
every_cheap_norm = pytest.mark.parametrize("norm", CHEAP)
every_parametrization = pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def norm_of(sigma: Array, norm: str | float) -> float:
    """Norms by their textbook definitions."""
    if norm == "spectral":
        return float(sigma.max())
    if norm == "nuclear":
        return float(sigma.sum())
    if norm == "ky-fan-2":
        return float(np.sort(sigma)[::-1][:2].sum())
    p = exponent(norm)
    return float((sigma**p).sum() ** (1 / p))


def exponent(norm: str | float) -> float:
    """p where the norm is Schatten's, else 1."""
    return {"frobenius": 2.0, 3.5: 3.5}.get(norm, 1.0)


def dual_of(sigma: Array, norm: str | float) -> float:
    """The dual norms by theirs."""
    if norm == "spectral":
        return float(sigma.sum())
    if norm == "nuclear":
        return float(sigma.max())
    if norm == "ky-fan-2":
        return float(max(sigma.max(), sigma.sum() / 2))
    q = exponent(norm) / (exponent(norm) - 1)
    return float((sigma**q).sum() ** (1 / q))


def everywhere(model: NBMatrixCompletion) -> Array:
    """The completed matrix of the last fit."""
    m, n = len(model.row_factors_), model.n_features_in_
    rows, columns = np.divmod(np.arange(m * n), n)
    return model.predict(rows, columns).reshape(m, n)


def bounded_part(model: NBMatrixCompletion, X: Array) -> Array:
    """What has the bound: without biases, and weighted by how often rows and columns are observed."""
    part = everywhere(model) - model.row_bias_[:, None] - model.column_bias_ - model.offset_
    if model.weighting == "popularity":
        observed = ~np.isnan(X)
        for axis in (0, 1):
            counts = observed.sum(1 - axis)
            weights = np.sqrt(np.maximum(counts, 1) / counts.mean())
            part *= weights[:, None] if axis == 0 else weights
    return part


def check_bound_and_rank(model: NBMatrixCompletion, X: Array, norm: Callable[[Array], float]) -> None:
    part = bounded_part(model, X)
    assert np.isfinite(part).all()
    sigma = np.linalg.svd(part, compute_uv=False)
    rounding = np.finfo(np.float64).eps * max(X.shape) * np.abs(everywhere(model)).max() * math.sqrt(X.size)
    assert norm(sigma) <= model.bound_ * (1 + (1e-4 if model.dtype == "float32" else 1e-5)) + rounding
    assert model.rank_ <= min(model.rank, *X.shape)
    assert (sigma[model.rank_ :] <= max(X.shape) * np.finfo(model.dtype).eps * sigma[0] + rounding).all()
    assert model.certificate_.holds
    np.testing.assert_allclose(model.certificate_.norm, norm(sigma), rtol=1e-4, atol=rounding)


# --- known defects ---

# Each must fail until it is mended, and then leave this list (strict).
# --- bound and rank after every fit ---

SHAPES = ((1, 7), (7, 1), (8, 8), (6, 20))
SHARES = (1e-30, 1e-8, 1e-3, 0.3, 3.0, 1e30)  # of the norm of the data with zeros for what is missing
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": None},
    {"weighting": "popularity"},
    {"bias": None, "weighting": "popularity"},
)


@every_norm
@every_parametrization
def test_bound_and_rank(norm: Any, parametrization: Any) -> None:
    """In awkward shapes, with more rank than there is; bounds from nothing to no bound at all."""
    turn = 0
    for shape in SHAPES if norm in CHEAP else SHAPES[::2]:
        X = sample(*shape, 2, rate=0.7, effects=1.0, popularity=0.5).X
        size = norm_of(np.linalg.svd(np.nan_to_num(X), compute_uv=False), norm)
        for share in SHARES if norm in CHEAP else SHARES[3:4]:
            model = NBMatrixCompletion(
                rank=40,
                norm=norm,
                bound=share * size,
                parametrization=parametrization,
                rank_selection=None,
                dtype=DTYPES[turn // len(VARIANTS) % 2],
                max_iter=6,
                **VARIANTS[turn % len(VARIANTS)],
            ).fit(X)
            assert model.bound_ == pytest.approx(share * size, rel=1e-12)
            check_bound_and_rank(model, X, functools.partial(norm_of, norm=norm))
            turn += 1  # shapes and bounds meet another variant and precision each


@every_cheap_norm
@every_parametrization
def test_bound_that_was_selected_and_is_kept_by_new_entries(norm: Any, parametrization: Any) -> None:
    given = sample(20, 12, 2, rate=0.6, effects=1.0, noise=0.5, popularity=0.5)
    for variant in VARIANTS[::3]:
        model = NBMatrixCompletion(
            rank=6, norm=norm, parametrization=parametrization, max_iter=10, random_state=0, **variant
        ).fit(given.X)
        check_bound_and_rank(model, given.X, functools.partial(norm_of, norm=norm))
        bound, rank = model.bound_, model.rank_
        more = np.where(given.missing, 100.0, given.X)  # which a smaller matrix can't explain
        model.partial_fit(more)
        assert model.bound_ == pytest.approx(bound, rel=1e-12)
        assert model.rank_ <= max(rank, 6)
        check_bound_and_rank(model, more, functools.partial(norm_of, norm=norm))


@every_parametrization
def test_other_norms(parametrization: Any) -> None:
    """A gauge of one's own and a bound for each singular value."""
    X = sample(10, 8, 3, rate=0.7, noise=0.5).X
    gauge = Gauge(shared_norms.capped, label="capped")
    profile = Profile([4.0, 1.0, 0.5])

    def capped(sigma: Array) -> float:
        return float(max(sigma[0], sigma.sum() / 2))

    def profiled(sigma: Array) -> float:
        rest = sigma[3:].max(initial=0.0)
        assert rest <= 1e-5 * sigma[0]
        return float((sigma[:3] / [4.0, 1.0, 0.5]).max())

    for norm, value in ((gauge, capped), (profile, profiled)):
        for bound in (0.5, 5.0):
            model = NBMatrixCompletion(
                rank=3,
                norm=norm,
                bound=bound,
                parametrization=parametrization,
                rank_selection=None,
                max_iter=10,
            ).fit(X)
            check_bound_and_rank(model, X, value)
            assert model.certificate_.share > 0.5  # and the bound is used


@pytest.mark.parametrize(
    "norm", [*CHEAP, *(pytest.param(norm, marks=pytest.mark.slow) for norm in NORMS[3:])]
)
@every_dtype
def test_tight_bound_is_used_and_loose_bound_is_not(norm: Any, dtype: str) -> None:
    given = sample(20, 15, 2, rate=0.8, noise=0.1)
    size = norm_of(np.linalg.svd(given.truth, compute_uv=False), norm)
    errors = []
    for share in (0.01, 0.1, 0.5, 2.0):
        model = NBMatrixCompletion(
            rank=2, norm=norm, bound=share * size, bias=None, rank_selection=None, dtype=dtype
        ).fit(given.X)
        sigma = np.linalg.svd(everywhere(model), compute_uv=False)
        if share < 1:
            assert norm_of(sigma, norm) > 0.98 * share * size
        else:
            assert norm_of(sigma, norm) == pytest.approx(size, rel=0.05)
        errors.append(rms((everywhere(model) - given.X)[~given.missing]))
    assert errors == sorted(errors, reverse=True)  # in larger balls lie better fits
    assert errors[-1] < 0.1 * 1.05  # the noise


# --- units ---


@pytest.mark.parametrize("choices", [{}, {"norm": "spectral", "bound": 8.0, "rank_selection": None}], ids=str)
@every_dtype
def test_powers_of_two_are_exact_units(choices: dict[str, Any], dtype: str) -> None:
    given = sample(15, 12, 2, rate=0.6, effects=1.0).X
    new = sample(3, 12, 2, rate=0.6, effects=1.0, seed=1).X
    settings: dict[str, Any] = {"rank": 4, "random_state": 0, "max_iter": 20, "dtype": dtype} | choices
    one = NBMatrixCompletion(**settings).fit(given)
    for unit in (2.0**-40, 2.0**40):
        if "bound" in choices:
            settings["bound"] = choices["bound"] * unit
        other = NBMatrixCompletion(**settings).fit(unit * given)
        np.testing.assert_array_equal(everywhere(other), unit * everywhere(one))
        np.testing.assert_allclose(other.transform(unit * new), unit * one.transform(new), rtol=1e-9)
        assert other.bound_ == unit * one.bound_
        assert other.rank_ == one.rank_
        assert other.validation_rmse_ == (one.validation_rmse_ and unit * one.validation_rmse_)
        np.testing.assert_allclose(other.loss_curve_, unit**2 * np.array(one.loss_curve_), rtol=1e-12)


@every_cheap_norm
@every_dtype
def test_extreme_units(norm: Any, dtype: str) -> None:
    given = sample(15, 12, 2, rate=0.6, effects=1.0)
    for unit in (1e-12, 1e12):
        settings: dict[str, Any] = {"norm": norm, "dtype": dtype, "rank": 3, "rank_selection": None}
        model = NBMatrixCompletion(bound=9.0 * unit, max_iter=20, **settings).fit(unit * given.X)
        check_bound_and_rank(model, unit * given.X, functools.partial(norm_of, norm=norm))
        assert rms((everywhere(model) / unit - given.X)[~given.missing]) < 0.5 * np.nanstd(given.X)


@every_dtype
@pytest.mark.parametrize("offset", [-1e6, 1e6, 1e9])
def test_large_offset(offset: float, dtype: str) -> None:
    """Learned with biases as if it were not there: only what the values lose by its addition may differ."""
    given = sample(20, 15, 2, rate=0.6, effects=1.0)
    near, far = (
        NBMatrixCompletion(rank=4, random_state=0, dtype=dtype, max_iter=50).fit(given.X + shift)
        for shift in (0.0, offset)
    )
    assert far.rank_ == near.rank_
    assert far.bound_ == pytest.approx(near.bound_, rel=0.1)  # of two nearly as good the other may be taken
    assert rms(everywhere(far) - offset - everywhere(near)) < 0.05  # half of the noise
    check_bound_and_rank(far, given.X + offset, functools.partial(norm_of, norm="nuclear"))


# --- the optimum ---


class Optimum(NamedTuple):
    """The least squares in a ball: its radius, half the sum of squares, and how much less may be possible."""

    radius: float
    loss: float
    gap: float


def residual(X: Array, completed: Array) -> Array:
    return np.where(np.isnan(X), 0.0, completed - X)


def duality_gap(X: Array, completed: Array, norm: str | float, radius: float) -> float:
    """By how much the loss can at most be above the least in the ball, by convexity.

    f(Z) >= f(Y) + <G, Z - Y> for the gradient G = residual, and <G, Z> >= -radius * dual(G). It is zero just
    where the Karush-Kuhn-Tucker conditions hold.
    """
    gradient = residual(X, completed)
    dual = dual_of(np.linalg.svd(gradient, compute_uv=False), norm)
    return float((gradient * completed).sum()) + radius * dual


def shrunk(sigma: Array, weight: float, norm: str | float) -> Array:
    """argmin (x - sigma)^2 / 2 + weight * norm(x)^p / p for x >= 0, with p of `exponent`."""
    if norm == "nuclear":
        return np.maximum(sigma - weight, 0)
    if norm == "frobenius":
        return sigma / (1 + weight)
    if norm == 3.5:
        return bisected(lambda x: x + weight * x**2.5 - sigma, np.zeros_like(sigma), sigma)
    # sigma less its projection onto the ball of radius weight in the dual norm: no entry above `cap`, and a
    # sum of at most `total`
    cap, total = {"spectral": (math.inf, weight), "ky-fan-2": (weight, 2 * weight)}[norm]
    outside = np.clip(sigma, 0, cap).sum() > total
    cut = np.zeros(1)
    if outside:
        cut = bisected(lambda c: total - np.clip(sigma - c, 0, cap).sum(), cut, sigma.max(keepdims=True))
    return sigma - np.clip(sigma - cut, 0, cap)


def bisected(rising: Callable[[Array], Array], low: Array, high: Array) -> Array:
    for _ in range(60):
        middle = (low + high) / 2
        above = rising(middle) > 0
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


@functools.cache
def full_rank_data(seed: int) -> Array:
    return sample(12, 10, 3, rate=0.7, noise=0.3, seed=seed).X


@functools.cache
def optimum(norm: str | float, strength: float, seed: int) -> Optimum:
    """By accelerated proximal gradients with restarts; the solution for a multiplier is that for a radius."""
    X = full_rank_data(seed)
    sigma = np.linalg.svd(np.nan_to_num(X), compute_uv=False)
    weight = strength * dual_of(sigma, norm) / norm_of(sigma, norm) ** (exponent(norm) - 1)
    last = ahead = np.zeros_like(X)
    momentum = 1.0
    for step in range(3000):
        u, s, vt = np.linalg.svd(ahead - residual(X, ahead), full_matrices=False)
        new = (u * shrunk(s, weight, norm)) @ vt
        if ((ahead - new) * (new - last)).sum() > 0:
            momentum = 1.0
        next_momentum = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / next_momentum * (new - last)
        last, momentum = new, next_momentum
        if step % 20 == 0:
            radius = norm_of(np.linalg.svd(new, compute_uv=False), norm)
            loss = float((residual(X, new) ** 2).sum()) / 2
            gap = duality_gap(X, new, norm, radius)
            if gap <= 1e-6 * loss:
                return Optimum(radius, loss, gap)
    raise AssertionError("the reference has not converged")


def check_optimal(norm: Any, parametrization: Any, dtype: str, strength: float, seed: int) -> None:
    """The problem is convex where the rank is not bounded: within 1 % of the least squares in the ball."""
    X, best = full_rank_data(seed), optimum(norm, strength, seed)
    model = NBMatrixCompletion(
        rank=20,
        norm=norm,
        bound=best.radius,
        parametrization=parametrization,
        rank_selection=None,
        bias=None,
        dtype=dtype,
    ).fit(X)
    loss = float((residual(X, everywhere(model)) ** 2).sum()) / 2
    assert loss >= best.loss * (1 - 1e-5 - 1e-3)  # what the tolerance of the bound may gain
    assert loss <= 1.01 * best.loss


@every_cheap_norm
@every_parametrization
@every_dtype
@pytest.mark.parametrize("strength", [0.2, 0.03])
def test_solution_is_optimal(norm: Any, parametrization: Any, dtype: str, strength: float) -> None:
    for seed in (0, 1):
        check_optimal(norm, parametrization, dtype, strength, seed)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [3.5, "ky-fan-2"])
@every_parametrization
@pytest.mark.parametrize("strength", [0.3, 0.1])
def test_solution_is_optimal_in_other_balls(norm: Any, parametrization: Any, strength: float) -> None:
    check_optimal(norm, parametrization, "float32", strength, 0)


def test_conditions_of_karush_kuhn_and_tucker() -> None:
    """At an active nuclear bound: the residual pulls as much along each singular vector of X."""
    for seed in (0, 1):
        X, best = full_rank_data(seed), optimum("nuclear", 0.2, seed)
        model = NBMatrixCompletion(
            rank=20,
            bound=best.radius,
            rank_selection=None,
            bias=None,
            dtype="float64",
            tol=1e-7,
            max_iter=1000,
        ).fit(X)
        completed = everywhere(model)
        pull = -residual(X, completed)
        multiplier = np.linalg.norm(pull, 2)
        assert (pull * completed).sum() / best.radius == pytest.approx(multiplier, rel=2e-2)
        u, s, vt = np.linalg.svd(completed)
        alive = s > 0.05 * s[0]
        assert 0 < alive.sum() < 10
        along = np.einsum("ij,ik,kj->j", u[:, : len(s)], pull, vt.T)[alive]
        np.testing.assert_allclose(along, multiplier, rtol=5e-2)  # each singular value is pulled as much


@pytest.mark.parametrize("weighting", [None, "popularity"])
def test_biases_are_optimal(weighting: Any) -> None:
    """A ridge regression each: what is left in a row is its bias, times one ridge for all of them."""
    given = sample(40, 30, 2, rate=0.5, noise=0.5, effects=1.0, popularity=0.5)
    model = NBMatrixCompletion(
        rank=5,
        bound=20.0,
        rank_selection=None,
        weighting=weighting,
        dtype="float64",
        tol=1e-7,
        max_iter=300,
    ).fit(given.X)
    left = -residual(given.X, everywhere(model))
    scale = np.abs(left).sum()
    assert abs(left.sum()) < 1e-3 * scale  # no ridge on the offset
    for axis, bias in ((1, model.row_bias_), (0, model.column_bias_)):
        sums = left.sum(axis)
        ridge = (sums @ bias) / (bias @ bias)
        assert ridge > 0
        assert rms(sums - ridge * bias) < 0.05 * rms(ridge * bias) + 1e-3 * rms(np.abs(left).sum(axis))


def test_loss_curve_ends_at_the_loss() -> None:
    given = sample(20, 15, 2, rate=0.6, noise=0.3)
    for norm in ("nuclear", "spectral"):
        for max_iter in (1, 10, 200):
            model = NBMatrixCompletion(
                rank=3, norm=norm, bound=12.0, bias=None, rank_selection=None, max_iter=max_iter
            ).fit(given.X)
            loss = np.mean((everywhere(model) - given.X)[~given.missing] ** 2) / 2
            assert model.loss_curve_[-1] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("choices", [{}, {"norm": "spectral", "bias": None}, {"bound": "auto"}], ids=str)
def test_evaluations_are_counted(choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass is two or three products with the entries, there and back."""
    calls = 0
    for name in ("products", "times_right"):  # what the others are made of
        method = getattr(Entries, name)

        def counted(self: Entries, *given: Any, _method: Any = method, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            return _method(self, *given, **named)

        monkeypatch.setattr(Entries, name, counted)
    settings: dict[str, Any] = {"rank": 3, "bound": 12.0, "rank_selection": None, "random_state": 0} | choices
    model = NBMatrixCompletion(**settings).fit(sample(20, 15, 2, rate=0.6, noise=0.3).X)
    assert 1.5 * model.n_evaluations_ <= calls <= 3 * model.n_evaluations_ + 60  # some for the ridges


def test_iterations_are_not_wasted() -> None:
    """Easy problems are over long before the limit: well-conditioned data at active and inactive bounds."""
    counts = []
    for seed in range(3):
        given = sample(60, 50, 2, rate=0.5, noise=0.1, seed=seed)
        size = norm_of(np.linalg.svd(given.truth, compute_uv=False), "nuclear")
        for share in (0.5, 0.9, 2.0):
            model = NBMatrixCompletion(rank=8, bound=share * size, bias=None, rank_selection=None).fit(
                given.X
            )
            counts.append(model.n_evaluations_)
    assert max(counts) < 600  # of up to 1,200 by the sweeps' limit alone


# --- what is chosen ---


class Task(NamedTuple):
    m: int
    n: int
    rank: int
    rate: float
    noise: float
    effects: float = 0.0

    def sample(self, seed: int) -> Sample:
        return sample(
            self.m, self.n, self.rank, rate=self.rate, noise=self.noise, effects=self.effects, seed=seed
        )


TASKS = (
    Task(60, 50, 3, 0.4, 0.1),
    Task(100, 40, 2, 0.3, 0.3),
    Task(80, 80, 5, 0.5, 0.5),
    Task(60, 60, 2, 0.4, 0.3, effects=1.0),
)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_rank_and_bound_are_found(task: Task) -> None:
    """The true rank, and nearly the error of whoever knows it and tries every bound on the truth."""
    for seed in (0, 1):
        given = task.sample(seed)
        bias = "joint" if task.effects else None
        size = norm_of(np.linalg.svd(given.truth, compute_uv=False), "nuclear")
        known = (
            NBMatrixCompletion(rank=task.rank, bound=share * size, rank_selection=None, bias=bias).fit(
                given.X
            )
            for share in (0.6, 0.8, 0.9, 1.0, 1.1, 1.5)
        )
        best = min(given.error(everywhere(model)) for model in known)
        for rank in (20, 50):
            model = NBMatrixCompletion(rank=rank, bias=bias, random_state=0).fit(given.X)
            assert model.rank_ == task.rank
            assert given.error(everywhere(model)) <= 1.1 * best


@pytest.mark.parametrize(
    "choices",
    [
        {"norm": "frobenius"},
        {"norm": "spectral"},
        {"parametrization": "svd", "dtype": "float64"},
        {"weighting": "popularity"},
    ],
    ids=str,
)
def test_rank_and_bound_are_found_with_other_choices(choices: dict[str, Any]) -> None:
    given = Task(60, 40, 2, 0.5, 0.3).sample(0)
    default = NBMatrixCompletion(rank=10, bias=None, random_state=0).fit(given.X)
    model = NBMatrixCompletion(rank=10, bias=None, random_state=0, **choices).fit(given.X)
    assert model.rank_ == 2
    assert given.error(everywhere(model)) <= 1.1 * given.error(everywhere(default))


@pytest.mark.parametrize("rank_selection", ["two-stage", None])
@pytest.mark.parametrize("cv", [None, 3])
def test_bound_of_the_user_is_kept(rank_selection: Any, cv: Any) -> None:
    given = Task(60, 50, 3, 0.4, 0.1).sample(0)
    for norm, bound in (("nuclear", 100.0), ("spectral", 40.0), ("frobenius", 1e4))[
        :: 1 if cv is None else 2
    ]:
        model = NBMatrixCompletion(
            rank=6, norm=norm, bound=bound, rank_selection=rank_selection, cv=cv, bias=None, max_iter=50
        ).fit(given.X)
        assert model.bound_ == pytest.approx(bound, rel=1e-12)
        assert all(row["bound"] == pytest.approx(bound) for row in model.validation_table_)
        if rank_selection is None:
            assert model.validation_rmse_ is None
        else:
            assert {row["rank"] for row in model.validation_table_} > {model.rank_}
            assert model.validation_rmse_ == min(row["rmse"] for row in model.validation_table_)
        if bound == 1e4:  # which does not help to find the rank
            assert model.rank_ == (3 if rank_selection else 6)


def test_rank_is_kept_without_selection() -> None:
    given = Task(60, 50, 3, 0.4, 0.3).sample(0)
    model = NBMatrixCompletion(rank=2, rank_selection=None, bias=None, random_state=0).fit(given.X)
    assert {row["rank"] for row in model.validation_table_} == {2}
    assert model.rank_ == 2
    assert len({row["bound"] for row in model.validation_table_}) > 3


def splits(count: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    return list(KFold(4, shuffle=True, random_state=1).split(np.arange(count)[:, None]))


@pytest.mark.parametrize("kind", ["folds", "splitter", "once", "pairs", "generator", "lists"])
def test_ways_to_hold_out(kind: str) -> None:
    given = Task(40, 30, 2, 0.6, 0.3).sample(0)
    count = int((~given.missing).sum())

    def pairs() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        yield from splits(count)

    cv: dict[str, Any] = {
        "folds": 4,
        "splitter": KFold(4, shuffle=True, random_state=0),
        "once": ShuffleSplit(1, test_size=0.25, random_state=0),
        "pairs": splits(count),
        "generator": pairs(),
        "lists": [(fitted.tolist(), held_out.tolist()) for fitted, held_out in splits(count)],
    }
    model = NBMatrixCompletion(rank=8, bias=None, random_state=0, cv=cv[kind]).fit(given.X)
    assert given.error(everywhere(model)) < 0.25
    assert 0.3 * 0.9 < model.validation_rmse_ < 0.5  # the noise and some more
    held_out = math.ceil(count / 4) if kind == "once" else count
    interval = functools.partial(model.predict_interval, [0], [0])
    assert np.isfinite(interval(held_out / (held_out + 1) - 1e-9)).all()
    assert np.isinf(interval(held_out / (held_out + 1) + 1e-6)).all()


def test_held_out_error_is_held_out() -> None:
    """Positions are of entries sorted by row and column; the error is that of a fit without them."""
    given = Task(40, 30, 2, 0.6, 0.3).sample(1)
    rows, columns, values = given.coordinates()
    fitted, held_out = splits(len(values))[0]
    order = np.random.default_rng(0).permutation(len(values))
    model = NBMatrixCompletion(rank=8, bias=None, cv=[(fitted, held_out)])
    model.fit_coo(rows[order], columns[order], values[order])
    alone = NBMatrixCompletion(rank=model.rank_, bound=model.bound_, bias=None, rank_selection=None)
    alone.fit_coo(rows[fitted], columns[fitted], values[fitted], given.X.shape)
    error = rms(alone.predict(rows[held_out], columns[held_out]) - values[held_out])
    assert model.validation_rmse_ == pytest.approx(error, rel=0.03)


def test_additive_effects_are_learned_by_biases() -> None:
    """As well as by least squares for the effects alone, where there is nothing else."""
    observed = ~sample(40, 30, 1, rate=0.5).missing
    rows, columns = np.nonzero(observed)
    design = np.concatenate([np.eye(40)[rows], np.eye(30)[columns]], axis=1)
    random = np.random.default_rng(0)
    truth = random.normal(size=(40, 1)) + random.normal(size=(1, 30)) + 3.0
    for noise in (0.1, 1.0):
        X = np.where(observed, truth + noise * random.normal(size=(40, 30)), np.nan)
        effects = np.linalg.lstsq(design, X[rows, columns])[0]
        expected = rms(effects[:40, None] + effects[40:] - truth)
        model = NBMatrixCompletion(rank=10, random_state=0).fit(X)
        assert rms(everywhere(model) - truth) <= 1.2 * expected


def alternating_least_squares(X: Array, rank: int, ridge: float, sweeps: int = 100) -> Array:
    """A plain rank and effects of rows and columns, by ridge regressions of each row and each column."""
    (m, n), seen = X.shape, ~np.isnan(X)
    random = np.random.default_rng(0)
    left = np.concatenate([random.normal(size=(m, rank)), np.zeros((m, 1)), np.ones((m, 1))], axis=1)
    right = np.concatenate([random.normal(size=(n, rank)), np.ones((n, 1)), np.zeros((n, 1))], axis=1)
    for _ in range(sweeps):
        for own, other, mine, theirs, data, known in (
            (left, right, rank, rank + 1, X, seen),
            (right, left, rank + 1, rank, X.T, seen.T),
        ):
            free = [*range(rank), mine]
            for i in range(len(own)):
                design = other[known[i]][:, free]
                target = data[i, known[i]] - other[known[i], theirs]
                own[i, free] = np.linalg.solve(
                    design.T @ design + ridge * np.eye(len(free)), design.T @ target
                )
    completed: Array = left @ right.T
    return completed


def test_biases_beside_a_low_rank_matrix() -> None:
    """Both are there: as good as alternating least squares with the true rank and a small ridge."""
    for seed in range(3):
        given = TASKS[3].sample(seed)
        expected = given.error(alternating_least_squares(given.X, 2, 0.05))
        model = NBMatrixCompletion(rank=2, bound=1e4, rank_selection=None).fit(given.X)
        assert given.error(everywhere(model)) <= 1.1 * expected


# --- rows that were not there ---


FOLDED = (
    Task(200, 60, 3, 0.4, 0.1),
    Task(200, 60, 3, 0.3, 1.0),
    Task(100, 100, 2, 0.3, 0.3, effects=1.0),
    Task(60, 120, 4, 0.4, 0.3),
    Task(200, 60, 3, 0.15, 0.3, effects=1.0),
)


@pytest.mark.parametrize("task", FOLDED, ids=str)
@pytest.mark.parametrize(
    "choices", [{}, *(pytest.param(choices, marks=pytest.mark.slow) for choices in VARIANTS[1:3])], ids=str
)
def test_new_rows_are_completed_like_fitted_ones(task: Task, choices: dict[str, Any]) -> None:
    """At most 1.1 times the error on hidden entries, over three data sets."""
    seen, unseen = [], []
    for seed in range(3):
        given = task._replace(m=task.m + task.m // 2).sample(seed)
        model = NBMatrixCompletion(rank=10, random_state=0, **choices).fit(given.X[: task.m])
        wrong = np.where(given.missing, model.predict(given.X) - given.noisy, np.nan)
        seen.append(wrong[: task.m])
        unseen.append(wrong[task.m :])
    assert math.sqrt(np.nanmean(np.square(unseen))) <= 1.1 * math.sqrt(np.nanmean(np.square(seen)))


@pytest.mark.parametrize(
    "choices",
    [{}, {"weighting": "popularity"}, {"norm": "spectral", "bound": 60.0, "rank_selection": None}],
    ids=str,
)
def test_new_rows_where_some_are_popular(choices: dict[str, Any]) -> None:
    given = sample(300, 40, 2, rate=0.4, noise=0.3, effects=1.0, popularity=0.7)
    model = NBMatrixCompletion(rank=5, random_state=0, **choices).fit(given.X[:200])
    wrong = np.where(given.missing, model.predict(given.X) - given.noisy, np.nan)
    assert math.sqrt(np.nanmean(wrong[200:] ** 2)) <= 1.1 * math.sqrt(np.nanmean(wrong[:200] ** 2))


def test_new_rows_with_few_entries_are_drawn_to_the_mean_row() -> None:
    """Never worse than the columns' means, and better with every entry."""
    given = sample(400, 30, 3, rate=0.6, noise=0.5)
    model = NBMatrixCompletion(rank=3, bias=None, random_state=0).fit(given.X[:200])
    new = given.noisy[200:]
    errors = []
    for count in (0, 1, 2, 4, 8, 16):
        shown = np.where(np.arange(30) < count, new, np.nan)
        errors.append(rms((model.predict(shown) - given.truth[200:])[:, 16:]))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(rms(given.truth[200:, 16:]), rel=0.02)
    assert errors[-1] < 0.5


# --- intervals ---


@pytest.mark.parametrize(
    "task",
    [
        Task(100, 60, 3, 0.4, 0.3),
        Task(60, 50, 2, 0.5, 0.1, effects=1.0),
        Task(80, 80, 4, 0.3, 0.5, effects=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("cv", [None, 4])
def test_intervals_cover(task: Task, cv: Any) -> None:
    """At least what they promise, and not everything: on entries drawn like the observed ones."""
    seeds = 4 if cv is None else 2
    covered: dict[float, list[float]] = {0.5: [], 0.9: []}
    for seed in range(seeds):
        rows, columns, values = task.sample(seed).coordinates()
        hidden = np.random.default_rng(seed).random(len(values)) < 0.2
        model = NBMatrixCompletion(rank=10, cv=cv, random_state=seed)
        model.fit_coo(rows[~hidden], columns[~hidden], values[~hidden], (task.m, task.n))
        for coverage, shares in covered.items():
            low, high = model.predict_interval(rows[hidden], columns[hidden], coverage).T
            shares.append(np.mean((low <= values[hidden]) & (values[hidden] <= high)))
    held_out = (~hidden).sum() * (0.1 if cv is None else 1.0)
    for coverage, shares in covered.items():
        # of a quantile of the held-out errors, and of counting the hidden
        deviation = math.sqrt(coverage * (1 - coverage) * (1 / held_out + 1 / hidden.sum()) / seeds)
        assert np.mean(shares) >= coverage - 3 * deviation
        assert np.mean(shares) <= coverage + 0.8 * (1 - coverage)  # folds have fewer entries than all


# --- new entries ---

COSTLY: tuple[dict[str, Any], ...] = (
    {"parametrization": "svd", "dtype": "float64"},
    {"norm": 3.5},
    {"norm": "ky-fan-2"},
)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"bias": None},
        {"weighting": "popularity"},
        {"norm": "frobenius"},
        {"norm": "spectral"},
        *(pytest.param(choices, marks=pytest.mark.slow) for choices in COSTLY),
    ],
    ids=str,
)
def test_new_entries_are_learned_in_half_the_time(choices: dict[str, Any]) -> None:
    """Than by a fit of all: the last tenth of the entries, at tight and loose bounds, to the same quality."""
    norm = choices.get("norm", "nuclear")
    ratios, warm_errors, cold_errors, warm_fits, cold_fits = [], [], [], [], []
    rank = 8 if norm in CHEAP else 3
    tasks = (TASKS[0], TASKS[3]) if norm in CHEAP else (Task(30, 25, 2, 0.6, 0.3),)
    for seed, task in enumerate(tasks):
        given = task.sample(seed)
        rows, columns, values = given.coordinates()
        known = np.random.default_rng(seed).random(len(values)) < 0.9
        size = norm_of(np.linalg.svd(given.truth - given.truth.mean(), compute_uv=False), norm)
        for share in (0.5, 0.9):
            settings: dict[str, Any] = {"rank": rank, "bound": share * size, "rank_selection": None} | choices
            warm = NBMatrixCompletion(**settings)
            warm.fit_coo(rows[known], columns[known], values[known], (task.m, task.n))
            warm.partial_fit_coo(rows[~known], columns[~known], values[~known])
            cold = NBMatrixCompletion(**settings).fit(given.X)
            ratios.append(warm.n_evaluations_ / cold.n_evaluations_)
            for model, fits, errors in ((warm, warm_fits, warm_errors), (cold, cold_fits, cold_errors)):
                fits.append(rms(model.predict(rows, columns) - values) / np.std(values))
                errors.append(given.error(everywhere(model)))
                assert model.bound_ == pytest.approx(share * size, rel=1e-12)
                check_bound_and_rank(model, given.X, functools.partial(norm_of, norm=norm))
    assert math.exp(np.mean(np.log(ratios))) <= 0.5  # so that no wasteful cold fit counts for all
    assert max(ratios) <= 1
    # at loose bounds of other norms the error falls slowly long after it has stopped to matter
    assert rms(np.array(warm_fits)) <= (1.02 if norm == "nuclear" else 1.1) * rms(np.array(cold_fits))
    assert rms(np.array(warm_errors)) <= 1.05 * rms(np.array(cold_errors))


@pytest.mark.filterwarnings("ignore:.*have no observed entry:UserWarning")
def test_entries_that_arrive_one_by_one() -> None:
    """Many small steps lead where one fit does."""
    given = TASKS[1].sample(0)
    rows, columns, values = given.coordinates()
    order = np.random.default_rng(0).permutation(len(values))
    parts = np.array_split(order, 12)
    size = norm_of(np.linalg.svd(given.truth, compute_uv=False), "nuclear")
    settings: dict[str, Any] = {"rank": 4, "bound": size, "rank_selection": None, "bias": None}
    steps = NBMatrixCompletion(**settings)
    for part in parts:
        steps.partial_fit_coo(rows[part], columns[part], values[part], given.X.shape)
    at_once = NBMatrixCompletion(**settings).fit(given.X)
    assert given.error(everywhere(steps)) <= 1.1 * given.error(everywhere(at_once))
    assert steps.bound_ == pytest.approx(size, rel=1e-12)


@pytest.mark.gpu
@every_norm
def test_bound_on_a_gpu(norm: Any) -> None:
    assert torch.cuda.is_available()
    X = sample(30, 20, 3, rate=0.6, effects=1.0).X
    for dtype in DTYPES:
        for bound in (1e-3, 5.0, 1e6):
            model = NBMatrixCompletion(
                rank=40, norm=norm, bound=bound, rank_selection=None, dtype=dtype, device="cuda", max_iter=20
            ).fit(X)
            check_bound_and_rank(model, X, functools.partial(norm_of, norm=norm))
