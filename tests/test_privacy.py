"""Private merging: sensitivity, exact noise, accounting, guard, releases, and their audit (MATH.md §7)."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import dp_accounting
import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

import nblora.privacy
import shared_norms
from nblora.bounds import Gauge, KyFan, Norm, Profile, Schatten, Spectral
from nblora.lowrank import LowRank
from nblora.privacy import (
    PrivateMean,
    compose,
    compose_subsampled,
    frobenius_bound,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    gaussian_noise_multiplier,
    private_mean,
    release,
    sample_clients,
    sensitivity,
    split_noise,
)

NAN, INF = math.nan, math.inf
every_adjacency = pytest.mark.parametrize("adjacency", ["add-remove", "replace-one"])
seeded = pytest.mark.filterwarnings("ignore:seeded noise:UserWarning")  # asked for, in the tests that have it


# --- sensitivity ---


def test_sensitivity_follows_the_table() -> None:
    assert sensitivity([3.0, 1.0], adjacency="add-remove", n_total=10) == pytest.approx((0.3, 0.1))
    assert sensitivity([3.0, 1.0], adjacency="replace-one", n_total=10) == pytest.approx((0.6, 0.2))
    weights = [0.5, 0.25, 0.25]
    assert sensitivity([3.0], adjacency="add-remove", weights=weights) == pytest.approx((1.5,))
    assert sensitivity([3.0], adjacency="replace-one", weights=weights) == pytest.approx((3.0,))


@every_adjacency
def test_sensitivity_is_reached_and_never_exceeded(adjacency: Any) -> None:
    """By brute force over neighbours: the worst pair is at Delta, random ones below."""
    clients = torch.randn(5, 6, dtype=torch.float64)
    clients = 2.0 * clients / clients.norm(dim=-1, keepdim=True)
    (delta,) = sensitivity([2.0], adjacency=adjacency, n_total=5)
    others = [torch.zeros(6, dtype=torch.float64)]
    if adjacency == "replace-one":
        others = [-clients[0], *clients[1:]]
    moved = [((clients[0] - other) / 5).norm().item() for other in others]
    assert max(moved) == pytest.approx(delta, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"adjacency": "zero-out"}, "adjacency must be"),
        ({"adjacency": None}, "adjacency must be"),
        ({"n_total": None}, "exactly one of n_total"),
        ({"weights": [1.0]}, "exactly one of n_total"),
        ({"n_total": 0}, "n_total must be an integer >= 1"),
        ({"n_total": 2.0}, "n_total must be an integer >= 1"),
        ({"n_total": NAN}, "n_total must be an integer >= 1"),
        ({"n_total": 2**20 + 1}, "n_total must be at most"),
        ({"bounds": [NAN]}, "bound must be 0 or between"),
        ({"bounds": [INF]}, "bound must be 0 or between"),
        ({"bounds": [-1.0]}, "bound must be 0 or between"),
        ({"n_total": None, "weights": [NAN, 1.0]}, "weight must be 0 or between"),
        ({"n_total": None, "weights": [-1.0, 1.0]}, "weight must be 0 or between"),
        ({"n_total": None, "weights": [0.0]}, "at least one of them positive"),
        ({"n_total": None, "weights": []}, "at least one of them positive"),
    ],
)
def test_sensitivity_refuses(changes: dict[str, Any], rule: str) -> None:
    arguments: dict[str, Any] = {"bounds": [1.0], "adjacency": "add-remove", "n_total": 2, **changes}
    with pytest.raises(ValueError, match=rule):
        sensitivity(arguments.pop("bounds"), **arguments)


def test_weights_that_were_computed_are_refused() -> None:
    """A tensor is what a weight looks like that was made from data; a published number is not one."""
    with pytest.raises(TypeError, match="weight must be a real number"):
        sensitivity([1.0], adjacency="add-remove", weights=torch.tensor([0.5, 0.5]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [name for name in nblora.privacy.__all__ if name.startswith(("g", "s", "pri"))]
)
def test_privacy_arguments_are_keywords_only_and_adjacency_has_no_default(name: str) -> None:
    private = {
        "epsilon",
        "delta",
        "mu",
        "adjacency",
        "n_total",
        "weights",
        "sampling_probability",
        "probability",
    }
    for parameter in inspect.signature(getattr(nblora.privacy, name)).parameters.values():
        if parameter.name in private:
            assert parameter.kind is parameter.KEYWORD_ONLY
        if parameter.name == "adjacency":
            assert parameter.default is parameter.empty


# --- what a bound says of the Frobenius norm ---


def mixed(spectrum: Tensor) -> Tensor:
    return torch.linalg.vector_norm(spectrum, dim=-1) + spectrum.sum(-1) / 2


NORMS: dict[str, Norm] = {
    **shared_norms.NORMS,
    "mixed": Gauge(mixed),
    "profile": Profile((3.0, 2.0, 1.0, 0.5, 0.25, 0.125)),
}
GAUGES = {"schatten-1": 1.0, "schatten-1.5": 1.5, "schatten-2": 2.0, "schatten-4": 4.0, "schatten-inf": INF}


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
@pytest.mark.parametrize("name", NORMS)
def test_frobenius_bound_holds(name: str, rank: int) -> None:
    """Over random spectra of every concentration, ones included, scaled to the sphere of the norm."""
    norm = NORMS[name]
    spectra = torch.rand(20_000, rank, dtype=torch.float64) ** torch.logspace(-3, 3, 20_000)[:, None].double()
    spectra[: rank + 1] = torch.ones(rank + 1, rank, dtype=torch.float64).tril()
    spectra = spectra[spectra.amax(-1) > 1e-9]
    spectra = 0.7 * spectra / norm.value(spectra)[:, None]
    reached = torch.linalg.vector_norm(spectra, dim=-1).amax().item()
    bound = frobenius_bound(norm, 0.7, rank)
    assert reached <= bound * (1 + 1e-9)
    if isinstance(norm, (Spectral, Schatten, KyFan)):
        assert reached >= bound * (1 - 1e-6)  # and nothing less would hold


def test_frobenius_bound_of_a_profile_is_reached() -> None:
    profile = Profile((1.0, 3.0, 2.0))
    assert frobenius_bound(profile, 0.5, 2) == pytest.approx(0.5 * math.hypot(3, 2))
    assert frobenius_bound(profile, 0.5, 9) == pytest.approx(0.5 * math.hypot(3, 2, 1))


@pytest.mark.parametrize("rank", [1, 4, 64])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 4.0, INF])
def test_frobenius_bound_of_a_gauge_against_the_truth(p: float, rank: int) -> None:
    """The same norm as an anonymous gauge: never below the truth, exact at both ends."""
    gauge = Gauge(lambda spectrum: torch.linalg.vector_norm(spectrum, ord=p, dim=-1))
    truth = frobenius_bound(Spectral() if p == INF else Schatten(p), 1.0, rank)
    ratio = frobenius_bound(gauge, 1.0, rank) / truth
    assert 1 - 1e-9 <= ratio <= (1 + 1e-9 if p in (1.0, INF) else 1.5)


class Unknown(Schatten.__mro__[1]):  # type: ignore[misc]
    name = "unknown"
    learnable = False

    def value(self, spectrum: Tensor) -> Tensor:
        return spectrum.sum(-1)

    scales = project = value  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("norm", "radius", "rank", "rule"),
    [
        (Spectral(), NAN, 1, "radius must be"),
        (Spectral(), -1.0, 1, "radius must be"),
        (Spectral(), INF, 1, "radius must be"),
        (Spectral(), 1.0, 0, "rank must be"),
        (Unknown(), 1.0, 1, "norm must be Spectral"),
    ],
)
def test_frobenius_bound_refuses(norm: Norm, radius: float, rank: int, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        frobenius_bound(norm, radius, rank)


# --- split of the noise ---


def test_split_has_the_asked_mu_and_the_least_noise() -> None:
    deltas, sizes, mu = [0.3, 1.0, 0.05], [100, 7, 4000], 1.3
    tau = np.array(split_noise(deltas, sizes, mu=mu))
    assert math.hypot(*(np.array(deltas) / tau)) == pytest.approx(mu, rel=1e-12)
    assert tau**2 * np.sqrt(sizes) / deltas == pytest.approx((tau**2 * np.sqrt(sizes) / deltas)[0])
    least = (tau**2 * sizes).sum()
    for shift in itertools.product([-0.05, 0.0, 0.05], repeat=3):
        other = tau * np.exp(shift)
        other *= math.hypot(*(np.array(deltas) / other)) / mu  # back to the same mu
        assert (other**2 * sizes).sum() >= least * (1 - 1e-12)


def test_split_of_one_layer_and_of_a_layer_that_stays_zero() -> None:
    assert split_noise([0.3], [100], mu=0.5) == pytest.approx((0.6,))
    assert split_noise([0.0, 0.3], [9, 100], mu=0.5) == pytest.approx((0.0, 0.6))


@pytest.mark.parametrize(
    ("deltas", "sizes", "mu"),
    [
        ([1.0], [1, 2], 1.0),
        ([0.0], [1], 1.0),
        ([], [], 1.0),
        ([NAN], [1], 1.0),
        ([1.0], [0], 1.0),
        ([1.0], [1], 0.0),
        ([1.0], [1], NAN),
        ([1.0], [1], INF),
    ],
)
def test_split_refuses(deltas: list[float], sizes: list[int], mu: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        split_noise(deltas, sizes, mu=mu)


# --- the Gaussian mechanism: two oracles for every number ---

EPSILONS = [0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 10.0, 25.0, 50.0]
DELTAS = [1e-12, 1e-8, 1e-5, 1e-3, 0.1]


def exact_delta(mu: float, epsilon: float) -> mpmath.mpf:
    """MATH.md §7 as it stands, with 80 digits."""
    with mpmath.workdps(80):
        mu_, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return mpmath.ncdf(mu_ / 2 - e / mu_) - mpmath.exp(e) * mpmath.ncdf(-mu_ / 2 - e / mu_)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("delta", DELTAS)
def test_noise_multiplier_agrees_with_both_oracles(epsilon: float, delta: float) -> None:
    multiplier = gaussian_noise_multiplier(epsilon=epsilon, delta=delta)
    assert multiplier == pytest.approx(dp_accounting.get_sigma_gaussian(epsilon, delta), rel=1e-6)
    assert exact_delta(1 / multiplier, epsilon) <= delta  # enough
    assert exact_delta(1 / (multiplier * (1 - 1e-6)), epsilon) > delta  # and no more than that


@pytest.mark.parametrize(("epsilon", "expected"), [(1, 3.7306), (4, 1.0812), (8, 0.6002), (10, 0.4999)])
def test_noise_multiplier_of_the_reference(epsilon: float, expected: float) -> None:
    assert gaussian_noise_multiplier(epsilon=epsilon, delta=1e-5) == pytest.approx(expected, abs=5e-5)


def test_classical_formula_would_add_too_little_noise() -> None:
    """At epsilon = 8 it still happens to be enough, at 10 no longer."""
    classical = math.sqrt(2 * math.log(1.25 / 1e-5)) / 10
    assert classical < gaussian_noise_multiplier(epsilon=10, delta=1e-5)
    assert exact_delta(1 / classical, 10) > 1e-5


@pytest.mark.parametrize("mu", [1e-17, 1e-9, 1e-6, 1e-4, 1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, 40.0, 1000.0])
@pytest.mark.parametrize("ratio", [0.0, 1e-6, 0.1, 0.5, 1.0, 2.0, 10.0])
def test_delta_is_stable(mu: float, ratio: float) -> None:
    """Where e^epsilon overflows and where both terms nearly cancel, as far as float64 can name the number."""
    epsilon = ratio * max(mu, mu**2)
    exact = exact_delta(mu, epsilon)
    measured = gaussian_delta(mu=mu, epsilon=epsilon)
    if exact < 1e-290:
        assert measured <= 1e-280
    else:
        tolerance = 1e-9 + 1e-14 * abs(float(mpmath.log(exact)))
        assert measured == pytest.approx(float(exact), rel=tolerance, abs=0)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("mu", [1e-4, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0])
def test_epsilon_agrees_with_both_oracles(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu=mu, delta=delta)
    assert epsilon == pytest.approx(dp_accounting.get_epsilon_gaussian(1 / mu, delta), rel=1e-6, abs=1e-9)
    assert exact_delta(mu, epsilon) <= delta * (1 + 1e-9)
    if epsilon > 0:
        assert exact_delta(mu, epsilon * (1 - 1e-6)) > delta
        # and back
        assert gaussian_delta(mu=mu, epsilon=epsilon) == pytest.approx(delta, rel=1e-6)
        assert gaussian_mu(epsilon=epsilon, delta=delta) == pytest.approx(mu, rel=1e-6)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("delta", DELTAS)
def test_epsilon_computed_back_is_not_above(epsilon: float, delta: float) -> None:
    """So that one release of the whole budget fits into it."""
    assert epsilon * (1 - 1e-8) <= gaussian_epsilon(mu=gaussian_mu(epsilon=epsilon, delta=delta), delta=delta)
    assert gaussian_epsilon(mu=gaussian_mu(epsilon=epsilon, delta=delta), delta=delta) <= epsilon


def test_no_mu_costs_nothing() -> None:
    assert gaussian_epsilon(mu=0.0, delta=1e-5) == 0
    assert gaussian_delta(mu=0.0, epsilon=0.0) == 0
    assert compose([]) == 0


BAD = [NAN, INF, -INF, -1.0]


@pytest.mark.parametrize(
    ("call", "bad"),
    [
        *(
            (call, bad)
            for bad in BAD
            for call in (
                lambda x: gaussian_noise_multiplier(epsilon=x, delta=1e-5),
                lambda x: gaussian_noise_multiplier(epsilon=1.0, delta=x),
                lambda x: gaussian_delta(mu=x, epsilon=1.0),
                lambda x: gaussian_delta(mu=1.0, epsilon=x),
                lambda x: gaussian_epsilon(mu=x, delta=1e-5),
                lambda x: gaussian_epsilon(mu=1.0, delta=x),
                lambda x: compose([1.0, x]),
                lambda x: compose_subsampled([x], sampling_probability=1, delta=1e-5, adjacency="add-remove"),
                lambda x: compose_subsampled(
                    [1.0], sampling_probability=x, delta=1e-5, adjacency="add-remove"
                ),
                lambda x: compose_subsampled([1.0], sampling_probability=1, delta=x, adjacency="add-remove"),
                lambda x: sample_clients(3, probability=x),
            )
        ),
        (lambda x: gaussian_noise_multiplier(epsilon=x, delta=1e-5), 0.0),
        (lambda x: gaussian_noise_multiplier(epsilon=1.0, delta=x), 0.0),
        (lambda x: gaussian_noise_multiplier(epsilon=1.0, delta=x), 1.0),
        (lambda x: compose([x, x]), 1.7e308),
    ],
)
def test_nan_and_nonsense_never_pass_as_private(call: Callable[[float], object], bad: float) -> None:
    with pytest.raises(ValueError, match=r"must be .*got"):
        call(bad)


@pytest.mark.parametrize("mu", [1e-300, 1e-200, 1e200, 1.7e308])
def test_extreme_numbers_are_answered(mu: float) -> None:
    """As no privacy or as perfect privacy, not by an overflow."""
    no_privacy = mu > 1
    assert gaussian_delta(mu=mu, epsilon=1.0) == no_privacy
    assert gaussian_epsilon(mu=mu, delta=1e-5) == (INF if no_privacy else 0.0)


def test_numbers_that_are_not_plain_are_refused() -> None:
    for value in (True, "4", None, torch.tensor(4.0), 4j):
        with pytest.raises(TypeError, match="epsilon must be a real number"):
            gaussian_noise_multiplier(epsilon=value, delta=1e-5)  # type: ignore[arg-type]
    assert gaussian_noise_multiplier(epsilon=np.float32(4), delta=1e-5) > 1  # type: ignore[arg-type]


def test_numbers_of_dp_accounting_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classical formula in dp-accounting's place is noticed; so is NaN."""
    for wrong in (math.sqrt(2 * math.log(1.25 / 1e-5)) / 10, NAN, 0.0, INF):
        monkeypatch.setattr(dp_accounting, "get_sigma_gaussian", lambda *_, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="at most the asked delta"):
            gaussian_noise_multiplier(epsilon=10.0, delta=1e-5)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # dp-accounting's
def test_a_guarantee_next_to_perfect_is_not_given_by_rounding() -> None:
    """Where both terms of delta are the same float, it would seem to be zero."""
    assert exact_delta(2.8e-16, 1e-20) > 1e-17
    with pytest.raises(ValueError, match="at most the asked delta"):
        gaussian_noise_multiplier(epsilon=1e-20, delta=1e-20)


@pytest.mark.parametrize(("mu", "delta"), [(1e-6, 1e-12), (1e-9, 1e-12), (1e-12, 1e-15), (1e-15, 1e-18)])
def test_epsilon_of_a_small_mu_is_not_too_low(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu=mu, delta=delta)
    assert exact_delta(mu, epsilon) <= delta * (1 + 1e-11)
    assert exact_delta(mu, epsilon * (1 - 1e-9)) > delta


def test_missing_dp_accounting_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"pip install 'nblora\[privacy\]'"):
        gaussian_noise_multiplier(epsilon=1.0, delta=1e-5)


# --- composition ---


def pld_epsilon(mus: list[float], delta: float, probability: float = 1.0) -> float:
    accountant = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for mu in mus:
        event: Any = dp_accounting.GaussianDpEvent(1 / mu)
        accountant.compose(
            event if probability == 1 else dp_accounting.PoissonSampledDpEvent(probability, event)
        )
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("mus", [[0.5], [0.2, 0.9, 0.4], [0.1] * 20, [1.5, 1.5]])
@pytest.mark.parametrize("delta", [1e-8, 1e-5])
def test_gaussian_composition_agrees_with_loss_distributions(mus: list[float], delta: float) -> None:
    epsilon = gaussian_epsilon(mu=compose(mus), delta=delta)
    assert epsilon == pytest.approx(pld_epsilon(mus, delta), rel=1e-3)
    assert compose_subsampled(mus, sampling_probability=1.0, delta=delta, adjacency="replace-one") == epsilon


def sampled_delta(mu: float, q: float, epsilon: float) -> float:
    """One sampled release by numerical integration of both directions, without any accountant."""
    x = np.linspace(-12 / mu - 12, 12 / mu + 12, 2_000_001)
    without = scipy.stats.norm.pdf(x, 0, 1 / mu)
    present = (1 - q) * without + q * scipy.stats.norm.pdf(x, 1, 1 / mu)
    directions = (present - math.exp(epsilon) * without, without - math.exp(epsilon) * present)
    return max(float(np.trapezoid(difference.clip(0), x)) for difference in directions)


@pytest.mark.parametrize(("mu", "q"), [(1.0, 0.1), (0.5, 0.5), (2.0, 0.01)])
def test_one_sampled_release_agrees_with_integration(mu: float, q: float) -> None:
    epsilon = compose_subsampled([mu], sampling_probability=q, delta=1e-5, adjacency="add-remove")
    assert sampled_delta(mu, q, epsilon * 1.001) <= 1e-5 <= sampled_delta(mu, q, epsilon * 0.99)


def test_sampling_helps_and_rounds_cost() -> None:
    def of(mus: list[float], q: float | list[float]) -> float:
        return compose_subsampled(mus, sampling_probability=q, delta=1e-5, adjacency="add-remove")

    assert of([1.0] * 3, 0.1) < 0.7 * of([1.0] * 3, 1.0)
    assert of([1.0] * 3, 0.1) < of([1.0] * 6, 0.1)
    assert of([1.0] * 3, 0.1) == pytest.approx(pld_epsilon([1.0] * 3, 1e-5, 0.1), rel=1e-9)
    assert of([1.0, 0.5], [0.1, 1.0]) < of([1.0, 0.5], [1.0, 1.0])
    assert of([1.0, 0.0], [0.1, 0.1]) == of([1.0], 0.1)
    assert of([50.0], 0.5) == gaussian_epsilon(mu=50.0, delta=1e-5)  # not worth gigabytes


def test_sampling_is_refused_under_replacement() -> None:
    with pytest.raises(ValueError, match='adjacency="add-remove" only'):
        compose_subsampled([1.0], sampling_probability=0.5, delta=1e-5, adjacency="replace-one")
    with pytest.raises(ValueError, match="one sampling probability for each"):
        compose_subsampled([1.0, 1.0], sampling_probability=[0.5], delta=1e-5, adjacency="add-remove")


def test_accountant_that_says_nan_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_accounting.pld.PLDAccountant, "get_epsilon", lambda *_: NAN)
    epsilon = compose_subsampled([1.0], sampling_probability=0.1, delta=1e-5, adjacency="add-remove")
    assert epsilon == gaussian_epsilon(mu=1.0, delta=1e-5)  # what holds without sampling


def test_doubling_of_replacement_happens_once() -> None:
    """dp-accounting doubles under REPLACE_ONE; we double the sensitivity and stay on ADD_OR_REMOVE_ONE."""
    (added,) = sensitivity([1.0], adjacency="add-remove", n_total=10)
    (replaced,) = sensitivity([1.0], adjacency="replace-one", n_total=10)
    tau = 0.4
    accountant = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(tau / added))
    ours = compose_subsampled([replaced / tau], sampling_probability=1, delta=1e-5, adjacency="replace-one")
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)


def test_samples_are_poisson() -> None:
    sizes = [len(sample_clients(50, probability=0.3)) for _ in range(2000)]
    assert np.mean(sizes) == pytest.approx(15, abs=5 * math.sqrt(10.5 / 2000))
    assert np.var(sizes) == pytest.approx(10.5, rel=0.2)
    assert sample_clients(4, probability=1.0) == [0, 1, 2, 3]


# --- the noise ---


def test_secure_noise_is_standard_normal() -> None:
    count = 400_000
    noise = release._normal_from_system(count).numpy()
    assert noise.dtype == np.float64
    assert scipy.stats.kstest(noise, "norm").pvalue > 1e-6
    assert noise.std() == pytest.approx(1, abs=6 / math.sqrt(2 * count))
    assert (abs(noise) > 4).sum() == pytest.approx(count * 2 * scipy.stats.norm.sf(4), abs=30)
    neighbours = np.corrcoef(noise[:-1], noise[1:])[0, 1]
    assert abs(neighbours) < 6 / math.sqrt(count)


def test_secure_noise_at_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rarest bytes that the system can give: finite and symmetric; and the middle."""
    for byte, expected in ((b"\x00", 12.95), (b"\xff", 0.0)):
        monkeypatch.setattr(release.os, "urandom", lambda count, byte=byte: byte * count)
        noise = release._normal_from_system(2)
        assert noise.abs().tolist() == pytest.approx([expected] * 2, abs=0.02)
    monkeypatch.setattr(release.os, "urandom", lambda count: (b"\x01" + bytes(7)) * (count // 8))
    assert release._normal_from_system(1).item() == pytest.approx(-12.95, abs=0.02)


def test_secure_noise_ignores_seeds() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(merge([{"a": torch.zeros(4, 5)}]).updates["a"])
    assert not torch.equal(*drawn)


# --- releases ---

SHAPES = {"a": (4, 5), "b": (3, 2)}
BOUNDS = {"a": 1.0, "b": 0.5}


def merge(updates: list[Any], **changes: Any) -> PrivateMean:
    """A release of layer "a", or of what `changes` say."""
    arguments: dict[str, Any] = {
        "bounds": {"a": 1.0},
        "shapes": {"a": SHAPES["a"]},
        "adjacency": "add-remove",
        "n_total": max(len(updates), 1),
        "epsilon": 4.0,
        "delta": 1e-5,
        **changes,
    }
    return private_mean(updates, **arguments)


def quiet(updates: list[Any], **changes: Any) -> dict[str, Tensor]:
    """The dense merged updates of a release with next to no noise."""
    result = merge(updates, epsilon=None, mu=1e6, dtype=torch.float64, **changes)
    return {
        name: value.dense() if isinstance(value, LowRank) else value for name, value in result.updates.items()
    }


def of_norm(norm: float, shape: tuple[int, int] = (4, 5), dtype: torch.dtype = torch.float64) -> Tensor:
    matrix = torch.randn(shape, dtype=torch.float64)
    return (norm * matrix / matrix.norm()).to(dtype)


def thin(norm: float, rank: int = 2, shape: tuple[int, int] = (4, 5)) -> LowRank:
    left, right = torch.randn(shape[0], rank).double(), torch.randn(rank, shape[1]).double()
    return LowRank(norm * left / (left @ right).norm(), right)


@pytest.mark.parametrize("rng", [None, 3], ids=["secure", "seeded"])
@seeded
def test_noise_has_the_claimed_deviation(rng: int | None) -> None:
    """Two layers, over 10^5 entries each: within 2 % of tau, on the mean, as calibrated and split."""
    shapes, bounds = {"a": (400, 500), "b": (300, 400)}, {"a": 1.0, "b": 0.5}
    zero = {name: torch.zeros(shape) for name, shape in shapes.items()}
    result = merge([zero] * 4, shapes=shapes, bounds=bounds, n_total=4, rng=rng)
    for name, noise in result.updates.items():
        assert isinstance(noise, Tensor)
        assert noise.double().std().item() == pytest.approx(result.tau[name], rel=0.02)
        assert noise.double().mean().item() == pytest.approx(
            0, abs=5 * result.tau[name] / math.sqrt(noise.numel())
        )
    deltas = sensitivity([1.0, 0.5], adjacency="add-remove", n_total=4)
    assert tuple(result.sensitivities.values()) == deltas
    mu = gaussian_mu(epsilon=4.0, delta=1e-5)
    assert tuple(result.tau.values()) == pytest.approx(split_noise(deltas, [200_000, 120_000], mu=mu))
    assert result.mu == pytest.approx(mu)
    assert (result.epsilon, result.delta, result.adjacency) == (4.0, 1e-5, "add-remove")
    assert result.secure == (rng is None)


def test_one_layer_gets_the_reference_noise() -> None:
    assert merge([None] * 10, n_total=10).tau["a"] == pytest.approx(1.0812 / 10, rel=1e-4)


def test_merged_update_is_the_mean_over_the_denominator() -> None:
    dense, factors = of_norm(0.9), thin(0.8)
    merged = quiet([{"a": dense}, {"a": factors}, None], n_total=4)["a"]
    torch.testing.assert_close(merged, (dense + factors.dense()) / 4, rtol=0, atol=1e-5)


def test_public_weights() -> None:
    first, second = of_norm(0.9), of_norm(0.8)
    updates = [{"a": first}, None, {"a": second}]
    arguments = {"n_total": None, "weights": [0.2, 0.5, 0.3]}
    merged = quiet(updates, **arguments)["a"]
    torch.testing.assert_close(merged, 0.2 * first + 0.3 * second, rtol=0, atol=1e-5)
    assert merge(updates, **arguments).sensitivities == {
        "a": 0.5
    }  # the absent client's weight counts as well
    with pytest.raises(ValueError, match="one weight for each invited client"):
        merge(updates, n_total=None, weights=[0.2, 0.8])


def test_replacement_takes_the_count_as_denominator() -> None:
    update = of_norm(1.0)
    arguments = {"adjacency": "replace-one", "n_total": None}
    torch.testing.assert_close(quiet([{"a": update}] * 4, **arguments)["a"], update, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="exactly one of n_total"):
        merge([{"a": update}], n_total=None)  # under add-remove it would give the count away


def test_more_clients_than_the_denominator_are_no_exception() -> None:
    """One that is raised at n_total + 1 would tell neighbours apart for sure."""
    update = of_norm(1.0)
    torch.testing.assert_close(quiet([{"a": update}] * 3, n_total=2)["a"], 1.5 * update, rtol=0, atol=1e-5)
    assert merge([], n_total=2).updates["a"].shape == (4, 5)


def test_a_layer_whose_bound_is_zero_stays_zero() -> None:
    result = merge([{"a": of_norm(1.0)}], shapes=SHAPES, bounds={"a": 1.0, "b": 0.0}, on_excess="project")
    assert result.tau["b"] == 0
    assert not result.updates["b"].any()  # type: ignore[union-attr]
    assert math.isfinite(result.mu)


# --- the guard ---


def cancelling() -> LowRank:
    """Thin factors of a small matrix, by design; their product in floats is far from small."""
    column = torch.randn(4, 1, dtype=torch.float64) * 1e20
    row = torch.randn(1, 5, dtype=torch.float64)
    return LowRank(torch.cat([column, column], 1), torch.cat([row, -row * (1 + 2**-40)], 0))


class Trap(dict):  # type: ignore[type-arg]
    def __getitem__(self, key: object) -> object:
        raise RuntimeError("gotcha")


OVERFLOWING = LowRank(1e300 * torch.ones(4, 1).double(), 1e300 * torch.ones(1, 5).double())
HONEST = {"a": torch.full((4, 5), 0.1)}
GUARDED: dict[str, tuple[object, str, str]] = {
    "thin": ({"a": LowRank(torch.full((4, 1), 0.1), torch.ones(1, 5))}, "accepted", ""),
    "rounding": ({"a": (1 + 5e-7) * torch.eye(4, 5, dtype=torch.float64) / 2}, "accepted", ""),
    "missing": ({}, "accepted", ""),
    "absent": (None, "absent", ""),
    "too large": ({"a": torch.ones(4, 5)}, "excess", "norms must be at most the bounds"),
    "overflowing norm": ({"a": 1e200 * torch.ones(4, 5).double()}, "excess", "at most the bounds"),
    "cancelling factors": ({"a": cancelling()}, "excess", "at most the bounds"),
    "nan": ({"a": torch.full((4, 5), NAN)}, "refused", "finite"),
    "one nan": ({"a": torch.eye(4, 5).masked_fill(torch.eye(4, 5) == 0, NAN)}, "refused", "finite"),
    "infinite": ({"a": torch.full((4, 5), INF)}, "refused", "finite"),
    "nan in a factor": ({"a": LowRank(torch.full((4, 1), NAN), torch.zeros(1, 5))}, "refused", "finite"),
    "overflowing factors": ({"a": OVERFLOWING}, "refused", "finite"),
    "shape": ({"a": torch.zeros(5, 4)}, "refused", r"shape \(4, 5\), got \(5, 4\)"),
    "batch": ({"a": LowRank(torch.zeros(2, 4, 1), torch.zeros(2, 1, 5))}, "refused", "shape"),
    "extra layer": ({**HONEST, "z": torch.zeros(1, 1)}, "refused", "announced"),
    "integers": ({"a": torch.zeros(4, 5, dtype=torch.int64)}, "refused", "real"),
    "complex": ({"a": torch.zeros(4, 5, dtype=torch.complex64)}, "refused", "real"),
    "sparse": ({"a": torch.zeros(4, 5).to_sparse()}, "refused", "dense"),
    "meta": ({"a": torch.zeros(4, 5, device="meta")}, "refused", ""),
    "array": ({"a": np.zeros((4, 5))}, "refused", "Tensor"),
    "none": ({"a": None}, "refused", "Tensor"),
    "text": ("update", "refused", "mapping"),
    "raises": (Trap(a=1), "refused", "gotcha"),
    "other keys": ({1: torch.zeros(4, 5)}, "refused", "announced"),
}  # fmt: skip


@pytest.mark.parametrize("on_excess", ["reject", "project"])
@pytest.mark.parametrize("case", GUARDED)
def test_no_client_moves_the_sum_farther_than_its_bound(case: str, on_excess: str) -> None:
    """Against the same release without it; nothing that it sends stops the release or is swallowed."""
    update, status, reason = GUARDED[case]
    if status == "excess":
        status = "rejected" if on_excess == "reject" else "projected"
    arguments = {"n_total": 2, "on_excess": on_excess}
    with_it, without = quiet([HONEST, update], **arguments)["a"], quiet([HONEST], **arguments)["a"]
    moved = 2 * (with_it - without).norm().item()
    noise = 40 / 1e6  # of both
    assert moved <= 1 + noise
    if status in ("rejected", "refused", "absent"):
        assert moved <= noise
    if status == "projected" and case != "cancelling factors":
        assert moved >= 1 - noise
    report = merge([HONEST, update], **arguments).clients
    assert [client.status for client in report] == ["accepted", status]
    assert [client.index for client in report] == [0, 1]
    assert re.search(reason, report[1].reason)
    assert bool(report[1].reason) == (status not in ("accepted", "absent"))


def test_an_honest_update_at_its_bound_is_not_changed() -> None:
    update = of_norm(1.0)
    merged = quiet([{"a": update}])["a"]
    torch.testing.assert_close(merged, update, rtol=0, atol=1e-5)


def test_thin_factors_cannot_hide_what_is_added() -> None:
    """The norm that thin factorisations measure is not the norm of the product that is added."""
    update = cancelling()
    as_computed = update.dense().norm().item()
    assert merge([{"a": update}]).clients[0].norms["a"] == pytest.approx(as_computed)


def test_one_bad_layer_rejects_the_whole_client_and_projects_only_itself() -> None:
    update = {"a": of_norm(3.0), "b": of_norm(0.2, (3, 2))}
    arguments = {"shapes": SHAPES, "bounds": BOUNDS}
    rejected = quiet([update], **arguments)
    projected = quiet([update], on_excess="project", **arguments)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(rejected["a"], torch.zeros(4, 5).double(), **close)
    torch.testing.assert_close(rejected["b"], torch.zeros(3, 2).double(), **close)
    torch.testing.assert_close(projected["a"], update["a"] / 3, **close)
    torch.testing.assert_close(projected["b"], update["b"], **close)


def test_missing_layers_count_as_zero_and_are_reported() -> None:
    result = merge([{"b": of_norm(0.2, (3, 2))}], shapes=SHAPES, bounds=BOUNDS)
    assert result.clients[0].missing == ("a",)
    assert result.clients[0].status == "accepted"
    assert result.clients[0].norms == {"b": pytest.approx(0.2)}


def test_odd_clients_go_to_the_log_and_not_into_what_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="nblora.privacy"):
        odd = merge([HONEST, {"a": torch.full((4, 5), NAN)}])
    assert "1 of 2 updates were not used as they came" in caplog.text
    assert "ClientReport" not in repr(odd)
    assert "tensor" not in repr(odd)


def test_updates_are_not_changed() -> None:
    update = of_norm(3.0).requires_grad_()
    before = update.detach().clone()
    merged = merge([{"a": update}], on_excess="project").updates["a"]
    assert torch.equal(update, before)
    assert isinstance(merged, Tensor)
    assert not merged.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_updates_in_any_precision_are_measured_in_float64(dtype: torch.dtype) -> None:
    update = of_norm(0.9, dtype=dtype)
    measured = merge([{"a": update}]).clients[0].norms["a"]
    assert measured == pytest.approx(update.double().norm().item(), rel=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factors = thin(0.9)
        assert merge([{"a": factors}]).clients[0].norms["a"] == pytest.approx(0.9, rel=1e-12)


# --- floats ---


def in_steps(result: PrivateMean, bound: float, share: float) -> Tensor:
    """A release in float64 in units of its grid."""
    value = result.updates["a"]
    assert isinstance(value, Tensor)
    return value / share / (bound * 2.0**-32)


@pytest.mark.parametrize("update", [0.0, 0.1, 1 / 3 - 1e-17, 1e-12])
def test_every_release_lies_on_the_same_public_grid(update: float) -> None:
    """Whatever the clients sent: the last bits say nothing. With plain floats they are of the data."""
    updates = [{"a": torch.full((4, 5), update, dtype=torch.float64) / 5}]
    steps = in_steps(merge(updates, n_total=4, dtype=torch.float64), 1.0, 0.25)
    assert torch.equal(steps, steps.round())
    assert steps.unique().numel() == 20  # and it is fine


@seeded
def test_order_of_clients_does_not_matter_to_the_last_bit() -> None:
    """Sums of floats depend on it, so that their sensitivity is larger than that of real sums."""
    updates = [{"a": of_norm(10.0 ** -(i % 9))} for i in range(50)]
    plain = torch.stack([update["a"] for update in updates])
    assert not torch.equal(plain.cumsum(0)[-1], plain.flip(0).cumsum(0)[-1])
    forward, backward = (merge(order, rng=1, dtype=torch.float64) for order in (updates, updates[::-1]))
    assert torch.equal(forward.updates["a"], backward.updates["a"])  # type: ignore[arg-type]


def test_rounding_to_the_grid_never_makes_an_update_larger() -> None:
    (layer,), _ = release._layers({"a": 1.0}, {"a": (50, 40)}, "add-remove", 1, None, 1.0, 1.0)
    for _ in range(50):
        steps = release._steps(of_norm(float(torch.rand(())) * 3, (50, 40)), layer, 1.0)
        squares = sum(int(step) ** 2 for step in steps.flatten().tolist())  # exact
        assert squares <= int(layer.bound / layer.grid) ** 2
        assert squares > 0


# --- seeds ---


def test_seeds_warn_and_are_marked() -> None:
    zero = [{"a": torch.zeros(4, 5)}]
    with pytest.warns(UserWarning, match="seeded noise is for tests"):
        first = merge(zero, rng=1)
    with pytest.warns(UserWarning, match="seeded noise"):
        second = merge(zero, rng=np.random.default_rng(1))
    assert torch.equal(first.updates["a"], second.updates["a"])  # type: ignore[arg-type]
    assert not first.secure
    with pytest.raises(TypeError, match="rng must be None, an integer seed"):
        merge(zero, rng=torch.Generator())


# --- post-processing ---


@seeded
def test_rank_and_ball_come_after_the_noise() -> None:
    """The same noise with and without: the best approximation, and the nearest matrix in the ball."""
    updates, arguments = [{"a": thin(0.9, 1)}] * 3, {"rng": 5, "dtype": torch.float64, "n_total": 3}
    noised = merge(updates, **arguments).updates["a"]
    assert isinstance(noised, Tensor)
    u, sigma, vh = torch.linalg.svd(noised, full_matrices=False)
    truncated = merge(updates, rank=2, **arguments).updates["a"]
    assert isinstance(truncated, LowRank)
    assert truncated.rank == 2
    torch.testing.assert_close(truncated.dense(), (u[:, :2] * sigma[:2]) @ vh[:2])
    for norm in (Spectral(), Schatten(2.0), Schatten(1.0)):
        inside = merge(updates, project=(norm, 0.3), **arguments).updates["a"]
        assert isinstance(inside, Tensor)
        expected = (u * norm.project(sigma, torch.tensor(0.3).double())) @ vh
        torch.testing.assert_close(inside, expected)
        both = merge(updates, rank=2, project=(norm, {"a": 0.3}), **arguments).updates["a"]
        assert isinstance(both, LowRank)
        assert norm.value(both.singular_values()).item() <= 0.3 * (1 + 1e-12)


def test_rank_beyond_the_shape_is_cut() -> None:
    merged = merge([HONEST], rank=99).updates["a"]
    assert isinstance(merged, LowRank)
    assert merged.rank == 4
    assert merged.left.dtype == torch.float32


def test_truncation_helps_where_the_mean_is_of_low_rank() -> None:
    """The reference of MATH.md §7 at a quarter of its size: the error falls to about a third."""
    shape = (128, 128)
    mean = thin(1.0, 2, shape)
    arguments = {"shapes": {"a": shape}, "n_total": 500, "dtype": torch.float64}
    dense = merge([{"a": mean}] * 500, **arguments).updates["a"]
    cut = merge([{"a": mean}] * 500, rank=2, **arguments).updates["a"]
    assert isinstance(dense, Tensor)
    assert isinstance(cut, LowRank)
    before, after = (dense - mean.dense()).norm().item(), (cut.dense() - mean.dense()).norm().item()
    assert before == pytest.approx(1.0812 / 500 * 128, rel=0.05)
    assert after < before / 2.5


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"adjacency": "remove"}, "adjacency must be"),
        ({"epsilon": NAN}, "epsilon must be positive"),
        ({"epsilon": None}, "exactly one of epsilon and mu"),
        ({"mu": 1.0}, "exactly one of epsilon and mu"),
        ({"epsilon": None, "mu": NAN}, "mu must be positive"),
        ({"delta": 0.0}, "delta must be between"),
        ({"delta": NAN}, "delta must be between"),
        ({"n_total": None}, "exactly one of n_total"),
        ({"bounds": {"a": NAN}}, "bound must be"),
        ({"bounds": {"b": 1.0}}, "must name the same layers"),
        ({"bounds": {}, "shapes": {}}, "must name the same layers"),
        ({"shapes": {"a": (4, 0)}}, "n must be an integer >= 1"),
        ({"bounds": {"a": 0.0}}, "a sensitivity above 0"),
        ({"on_excess": "ignore"}, "on_excess must be"),
        ({"rank": 0}, "rank must be"),
        ({"dtype": torch.int64}, "dtype must be"),
        ({"sampling_probability": NAN}, "sampling_probability must be"),
        ({"sampling_probability": 0.5, "adjacency": "replace-one"}, "add-remove"),
        ({"project": (Spectral(), NAN)}, "radius must be"),
        ({"project": (Spectral(), {"z": 1.0})}, "radii must be given for"),
    ],
)
def test_public_mistakes_are_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        merge([HONEST], **changes)


def test_a_projection_needs_a_norm() -> None:
    with pytest.raises(TypeError, match="pair of a Norm"):
        merge([HONEST], project=("spectral", 1.0))


def test_rounds_by_mu() -> None:
    result = merge([HONEST], epsilon=None, mu=0.5)
    assert result.mu == pytest.approx(0.5)
    assert result.epsilon == gaussian_epsilon(mu=result.mu, delta=1e-5)


# --- an empirical audit ---

RUNS = 20_000
CONFIDENCE = 1e-6  # the chance that an honest audit fails


def audited_epsilon(outputs: np.ndarray, neighbours: np.ndarray, delta: float) -> float:
    """The largest epsilon that a threshold test proves with Clopper-Pearson limits.

    Thresholds are chosen on the first half of the runs and judged on the second.
    """
    half = len(outputs) // 2
    best, error = 0.0, CONFIDENCE / 8
    for one, other in ((outputs, neighbours), (neighbours, outputs)):
        for sign in (1, -1):
            p, q = sign * one, sign * other

            def proved(p: np.ndarray, q: np.ndarray, threshold: float, error: float) -> float:
                hits, alarms, count = int((p > threshold).sum()), int((q > threshold).sum()), len(p)
                low = scipy.stats.beta.ppf(error, hits, count - hits + 1) if hits else 0.0
                high = scipy.stats.beta.ppf(1 - error, alarms + 1, count - alarms) if alarms < count else 1.0
                return math.log((low - delta) / high) if low > delta else 0.0

            thresholds = np.quantile(np.concatenate([p[:half], q[:half]]), np.linspace(0.01, 0.999, 200))
            chosen = max(thresholds, key=lambda threshold: proved(p[:half], q[:half], threshold, error))
            best = max(best, proved(p[half:], q[half:], chosen, error))
    return best


def parts(
    updates: list[Any], *, adjacency: Any, mu: float
) -> tuple[release._Layer, list[tuple[Any, float]], float]:
    """What `private_mean` makes of its arguments before it draws, over the denominator 2."""
    layers, _ = release._layers({"a": 1.0}, {"a": (1, 2)}, adjacency, 2, None, 0.5, mu)
    assert all(release._inspect(0, update, layers, "reject").status == "accepted" for update in updates)
    return layers[0], [(update, 1.0) for update in updates], 0.5


def released(updates: list[Any], **arguments: Any) -> np.ndarray:
    """<release, direction> of many releases: what tells these neighbours apart best."""
    layer, usable, share = parts(updates, **arguments)
    draw = release._normal_from_system
    sums = torch.stack([release._noised_sum(layer, usable, draw) for _ in range(RUNS)])
    values: np.ndarray = (sums * share * DIRECTION).sum((-1, -2)).numpy()
    return values


@every_adjacency
@seeded
def test_the_audit_looks_at_what_is_released(adjacency: Any) -> None:
    updates = [{"a": DIRECTION}]
    layer, usable, share = parts(updates, adjacency=adjacency, mu=0.7)
    noised = release._noised_sum(layer, usable, release._normal_from_seed(3)) * share
    arguments = {"adjacency": adjacency, "shapes": {"a": (1, 2)}, "n_total": 2, "dtype": torch.float64}
    whole = merge(updates, epsilon=None, mu=0.7, rng=3, **arguments).updates["a"]
    assert torch.equal(noised, whole)  # type: ignore[arg-type]


DIRECTION = torch.tensor([[0.6, 0.8]], dtype=torch.float64)


def neighbours(adjacency: str) -> tuple[list[Any], list[Any]]:
    """One client at its bound: there or not, or turned around."""
    worst = {"a": DIRECTION}
    return [worst], ([] if adjacency == "add-remove" else [{"a": -DIRECTION}])


@pytest.mark.parametrize("noise", [1.0, 0.5])
@every_adjacency
def test_audit(adjacency: str, noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an attack proves stays below the claim; with half the noise it does not, so the audit sees."""
    claimed, delta = 1.0, 1e-2
    if noise != 1:
        draw = release._normal_from_system
        monkeypatch.setattr(release, "_normal_from_system", lambda count: noise * draw(count))
    mu = gaussian_mu(epsilon=claimed, delta=delta)
    one, other = (released(updates, adjacency=adjacency, mu=mu) for updates in neighbours(adjacency))
    proved = audited_epsilon(one, other, delta)
    if noise == 1:
        assert 0.3 * claimed < proved <= claimed
    else:
        assert proved > claimed


def test_audit_sees_the_factor_of_two_of_replacement() -> None:
    """Replaced neighbours under the noise of "add-remove" are twice as far as its claim allows."""
    claimed, delta = 1.0, 1e-2
    mu = gaussian_mu(epsilon=claimed, delta=delta)
    one, other = (released(updates, adjacency="add-remove", mu=mu) for updates in neighbours("replace-one"))
    assert audited_epsilon(one, other, delta) > claimed
    tau = {name: merge([HONEST], adjacency=name).tau["a"] for name in ("add-remove", "replace-one")}
    assert tau["replace-one"] == pytest.approx(2 * tau["add-remove"])
