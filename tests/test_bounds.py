"""Norms, the bounds they imply, projections onto their balls, and the norm of a base weight (MATH.md §4)."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import shared_norms
from nblora.bounds import Gauge, KyFan, Norm, Profile, Schatten, Spectral, parse_norm


def elastic(spectrum: Tensor) -> Tensor:
    """The Frobenius norm plus half the nuclear norm."""
    return torch.linalg.vector_norm(spectrum, dim=-1) + spectrum.sum(-1) / 2


PROFILE = (3.0, 2.0, 1.0, 0.5, 0.25, 0.125)
CONVEX = {**shared_norms.NORMS, "elastic": Gauge(elastic, label="elastic")}
NORMS: dict[str, Norm] = {**CONVEX, "profile": Profile(PROFILE)}
LEARNABLE = {name: norm for name, norm in NORMS.items() if norm.learnable}

every_norm = pytest.mark.parametrize("name", NORMS)
every_convex_norm = pytest.mark.parametrize("name", CONVEX)
every_learnable_norm = pytest.mark.parametrize("name", LEARNABLE)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def slack(spectrum: Tensor) -> float:
    return 10 * spectrum.shape[-1] * torch.finfo(spectrum.dtype).eps


# --- the value of a norm ---


def schatten_of_matrix(p: float) -> Callable[[np.ndarray], float]:
    """Through the trace of (A^T A)^(p/2), without singular values."""
    return lambda a: float((np.linalg.eigvalsh(a.T @ a).clip(0) ** (p / 2)).sum() ** (1 / p))


def largest_of_matrix(q: int) -> Callable[[np.ndarray], float]:
    return lambda a: float(np.sort(np.linalg.svd(a, compute_uv=False))[::-1][:q].sum())


OF_MATRIX: dict[str, Callable[[np.ndarray], float]] = {
    "spectral": lambda a: np.linalg.norm(a, 2),
    "nuclear": lambda a: np.linalg.norm(a, "nuc"),
    "schatten-1.5": schatten_of_matrix(1.5),
    "frobenius": lambda a: np.linalg.norm(a, "fro"),
    "schatten-3.7": schatten_of_matrix(3.7),
    "schatten-50": schatten_of_matrix(50),
    "ky-fan-1": largest_of_matrix(1),
    "ky-fan-3": largest_of_matrix(3),
    "ky-fan-100": largest_of_matrix(100),
    "capped": lambda a: max(np.linalg.norm(a, 2), np.linalg.norm(a, "nuc") / 2),
    "elastic": lambda a: np.linalg.norm(a, "fro") + np.linalg.norm(a, "nuc") / 2,
    "profile": lambda a: (np.linalg.svd(a, compute_uv=False) / PROFILE).max(),
}


@every_norm
def test_value_is_the_norm_of_a_matrix(name: str) -> None:
    matrix = torch.randn(9, 6, dtype=torch.float64)
    spectrum = torch.linalg.svdvals(matrix)[torch.randperm(6)]  # in any order
    assert NORMS[name].value(spectrum).item() == pytest.approx(OF_MATRIX[name](matrix.numpy()), rel=1e-12)


@every_norm
def test_value_is_batched(name: str) -> None:
    norm, spectra = NORMS[name], torch.rand(2, 3, 6, dtype=torch.float64)
    one_by_one = torch.stack([norm.value(spectrum) for spectrum in spectra.flatten(0, 1)])
    torch.testing.assert_close(norm.value(spectra), one_by_one.reshape(2, 3))


@every_norm
@every_dtype
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_value_is_homogeneous(name: str, size: float, dtype: torch.dtype) -> None:
    """A power of 1e15 or of 1e-15 is beyond float32 for most p: the sum must not over- or underflow."""
    norm, spectrum = NORMS[name], torch.rand(6, dtype=dtype)
    torch.testing.assert_close(
        norm.value(size * spectrum), size * norm.value(spectrum), rtol=slack(spectrum), atol=0
    )


@every_norm
def test_value_of_zero_is_zero(name: str) -> None:
    assert (NORMS[name].value(torch.zeros(2, 6)) == 0).all()


@every_norm
def test_value_of_one_entry(name: str) -> None:
    """Rank one: every norm of a single singular value is a multiple of it, and never NaN."""
    norm, largest = NORMS[name], torch.tensor([2.0], dtype=torch.float64)
    unit = norm.value(torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(norm.value(largest), 2 * unit)


# --- the bounds that a norm implies ---


def logits_and_radii(size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = size * torch.randn(40, 6, dtype=dtype)
    logits[0] = size  # all equal
    logits[1] = -size
    return logits, 10 ** (4 * torch.rand(40, dtype=dtype) - 2)


@every_norm
@every_dtype
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("size", [0.0, 1e-8, 1.0, 1e3, 1e12])
def test_bounds_stay_in_the_ball(name: str, size: float, temperature: float, dtype: torch.dtype) -> None:
    norm = NORMS[name]
    logits, radius = logits_and_radii(size, dtype)
    scales = norm.scales(logits, radius, 6, temperature)
    assert scales.shape == logits.shape
    assert scales.dtype == dtype
    assert (scales >= 0).all()
    assert (norm.value(scales) <= radius * (1 + slack(scales))).all()


@every_learnable_norm
@every_dtype
@pytest.mark.parametrize("size", [0.0, 1e-8, 1.0, 1e3, 1e12])
def test_learnable_bounds_use_the_whole_radius(name: str, size: float, dtype: torch.dtype) -> None:
    norm = NORMS[name]
    logits, radius = logits_and_radii(size, dtype)
    scales = norm.scales(logits, radius, 6)
    torch.testing.assert_close(norm.value(scales), radius, rtol=slack(scales), atol=0)


@every_learnable_norm
@every_dtype
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e2, 1e3, 1e6, 1e12])
def test_learnable_bounds_have_finite_gradients(name: str, size: float, dtype: torch.dtype) -> None:
    logits, radius = logits_and_radii(size, dtype)
    logits.requires_grad_()
    weights = torch.randn(6, dtype=dtype)
    (LEARNABLE[name].scales(logits, radius, 6) * weights).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_power_of_softmax_has_nan_gradients() -> None:
    """Why Schatten bounds take the exponential of a log-softmax instead."""
    logits = torch.tensor([0.0, 1e3], requires_grad=True)
    torch.softmax(logits, -1).pow(1 / 2).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isnan().any()


@every_learnable_norm
def test_learnable_bounds_move_with_their_logits(name: str) -> None:
    """Against central differences; the values are apart, since Ky Fan norms have kinks at ties."""
    norm = LEARNABLE[name]
    logits = torch.tensor([[0.3, -0.4, 1.1, 0.7], [-1.0, 2.0, 0.1, 0.5]], dtype=torch.float64)
    radius = torch.tensor([0.7, 3.0], dtype=torch.float64)

    def scales(free: Tensor) -> Tensor:
        return norm.scales(free, radius, 4, 0.8)

    assert torch.autograd.gradcheck(scales, (logits.requires_grad_(),))
    assert (torch.autograd.functional.jacobian(scales, logits) != 0).any()


@every_learnable_norm
@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_temperature_divides_logits(name: str, temperature: float) -> None:
    norm, (logits, radius) = LEARNABLE[name], logits_and_radii(1.0, torch.float64)
    torch.testing.assert_close(
        norm.scales(logits, radius, 6, temperature), norm.scales(logits / temperature, radius, 6)
    )


@every_learnable_norm
def test_equal_logits_give_equal_bounds(name: str) -> None:
    scales = LEARNABLE[name].scales(torch.zeros(6), torch.tensor(2.0), 6)
    assert (scales == scales[0]).all()


@pytest.mark.parametrize("logits", [None, torch.tensor([5.0, 0.0, -5.0, 1.0])], ids=["none", "ignored"])
def test_fixed_bounds(logits: Tensor | None) -> None:
    radius = torch.tensor([2.0, 0.5])
    assert Spectral().scales(logits, radius, 4).tolist() == [[2.0] * 4, [0.5] * 4]
    profile = Profile([1.0, 4.0, 2.0, 3.0])  # in any order
    assert profile.scales(logits, radius, 4).tolist() == [[8.0, 6.0, 4.0, 2.0], [2.0, 1.5, 1.0, 0.5]]
    assert profile.scales(None, radius, 2).tolist() == [[8.0, 6.0], [2.0, 1.5]]


@every_norm
def test_zero_radius_gives_zero_bounds(name: str) -> None:
    assert (NORMS[name].scales(torch.randn(2, 6), torch.zeros(2), 6) == 0).all()


@every_learnable_norm
def test_learnable_bounds_need_logits(name: str) -> None:
    with pytest.raises(ValueError, match="has learnable bounds and needs logits, got None"):
        LEARNABLE[name].scales(None, torch.tensor(1.0), 6)


def test_profile_needs_a_bound_for_each_singular_value() -> None:
    with pytest.raises(ValueError, match="a bound for each of the 3 singular values, got 2"):
        Profile([1.0, 2.0]).scales(None, torch.tensor(1.0), 3)


# --- the nearest spectrum in the ball ---


def dual_elastic(x: Tensor) -> float:
    """x is in t times (Frobenius ball + spectral ball of radius 1/2) just when (x - t/2)+ is in t times
    the Frobenius ball, so the dual of a sum of norms is one root."""
    if not x.any():
        return 0.0
    root = scipy.optimize.brentq(
        lambda t: (x - t / 2).clamp(min=0).norm().item() - t, 0, x.norm().item(), xtol=1e-15
    )
    return float(root)


DUAL: dict[str, Callable[[Tensor], float]] = {
    "spectral": lambda x: x.sum().item(),
    "nuclear": lambda x: x.max().item(),
    "schatten-1.5": lambda x: x.norm(3).item(),
    "frobenius": lambda x: x.norm().item(),
    "schatten-3.7": lambda x: x.norm(3.7 / 2.7).item(),
    "schatten-50": lambda x: x.norm(50 / 49).item(),
    "ky-fan-1": lambda x: x.sum().item(),
    "ky-fan-3": lambda x: max(x.max().item(), x.sum().item() / 3),
    "ky-fan-100": lambda x: x.max().item(),
    "capped": lambda x: x.topk(2).values.sum().item(),
    "elastic": dual_elastic,
}


@functools.cache
def spectra_and_radii() -> tuple[Tensor, Tensor]:
    """(24, 6) unsorted spectra, most of them outside their balls of radius (24,)."""
    generator = torch.Generator().manual_seed(7)
    random = torch.rand(16, 6, generator=generator, dtype=torch.float64)
    awkward = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
            [0.0, 3.0, 0.0, 0.0, 0.0, 0.0],
            [2.0, 1.0, 2.0, 1.0, 2.0, 1.0],
            [5.0, 0.0, 4.9, 0.1, 4.9, 5.0],
            [1e-3, 1e6, 1.0, 1e3, 0.0, 1e6],
            [0.3, 0.2, 0.1, 0.6, 0.5, 0.4],
            [0.3, 0.2, 0.1, 0.6, 0.5, 0.4],
        ],
        dtype=torch.float64,
    )
    radius = torch.tensor(
        [*[0.1, 0.5, 1.0, 1.5, 2.0, 3.0] * 3, 1.0, 0.2, 1.0, 1.0, 1e-6, 0.0], dtype=torch.float64
    )
    return torch.cat([random, awkward]), radius


@functools.cache
def projected(name: str) -> Tensor:
    return NORMS[name].project(*spectra_and_radii())


def gap_tolerance(spectra: Tensor, radius: Tensor) -> Tensor:
    """What iterations (1e-9 of the radius) and cancellation (rounding of the spectrum) leave open."""
    return 1e-9 * radius + 1000 * torch.finfo(spectra.dtype).eps * spectra.norm(dim=-1)


def position_tolerance(spectra: Tensor, radius: Tensor) -> Tensor:
    """The distance to the nearest point that such a gap allows: its square is at most gap * |x - p|."""
    return (gap_tolerance(spectra, radius) * spectra.norm(dim=-1)).sqrt()


@every_norm
def test_projection_is_inside(name: str) -> None:
    spectra, radius = spectra_and_radii()
    result = projected(name)
    assert result.shape == spectra.shape
    assert (result >= 0).all()
    assert (NORMS[name].value(result) <= radius * (1 + slack(spectra))).all()


@every_norm
def test_projection_leaves_the_inside_alone(name: str) -> None:
    spectra, radius = spectra_and_radii()
    inside = NORMS[name].value(spectra) <= radius
    assert 1 < inside.sum() < len(spectra) - 1  # the cases are of both kinds
    assert torch.equal(projected(name)[inside], spectra[inside])


@every_convex_norm
def test_projection_reaches_the_boundary_from_outside(name: str) -> None:
    """A case of its own, because zero would be inside too."""
    spectra, radius = spectra_and_radii()
    missing = torch.minimum(CONVEX[name].value(spectra), radius) - CONVEX[name].value(projected(name))
    assert (
        missing <= 6 * gap_tolerance(spectra, radius)
    ).all()  # no norm here is more than 6 times the largest


@every_convex_norm
def test_projection_is_the_nearest_point(name: str) -> None:
    """Optimality against the dual norm, which knows nothing of how the projection was found.

    p is nearest to x in the ball just when <x - p, y> <= <x - p, p> for every y in the ball. The largest
    left side is radius * dual(x - p), and a gap between the two is at least |p - nearest|^2.
    """
    spectra, radius = spectra_and_radii()
    tolerance = gap_tolerance(spectra, radius)
    for x, r, p, t in zip(spectra, radius, projected(name), tolerance):
        gap = r.item() * DUAL[name](x - p) - ((x - p) @ p).item()
        assert gap <= t * (x - p).norm()


def test_projection_onto_a_profile_is_the_nearest_point() -> None:
    """Not a convex set: try every assignment of bounds to entries."""
    norm = Profile([2.0, 1.0, 0.5, 0.0])
    spectra = 3 * torch.rand(30, 4, dtype=torch.float64)
    radius = 2 * torch.rand(30, dtype=torch.float64)
    bounds = torch.tensor(list(itertools.permutations(norm.bounds)), dtype=torch.float64)  # (24, 4)
    candidates = torch.minimum(spectra[:, None], radius[:, None, None] * bounds)  # (30, 24, 4)
    nearest = (spectra[:, None] - candidates).norm(dim=-1).amin(-1)
    torch.testing.assert_close((spectra - norm.project(spectra, radius)).norm(dim=-1), nearest)


def test_projection_of_more_singular_values_than_bounds() -> None:
    result = Profile([2.0, 1.0]).project(torch.tensor([1.0, 5.0, 3.0]), torch.tensor(1.0))
    assert result.tolist() == [0.0, 2.0, 1.0]


@every_norm
def test_projection_is_idempotent(name: str) -> None:
    spectra, radius = spectra_and_radii()
    again = NORMS[name].project(projected(name), radius)
    assert ((again - projected(name)).abs() <= slack(spectra) * radius[:, None]).all()


@every_norm
def test_projection_keeps_the_order_of_entries(name: str) -> None:
    spectra, radius = spectra_and_radii()
    larger = spectra[:, :, None] > spectra[:, None, :]
    result = projected(name)
    overtaken_by = result[:, None, :] - result[:, :, None]
    assert (overtaken_by <= 2 * position_tolerance(spectra, radius)[:, None, None])[larger].all()


@every_norm
def test_projection_is_symmetric_and_batched(name: str) -> None:
    """Entries in another order and leading axes of another shape give the same spectra."""
    spectra, radius = spectra_and_radii()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = NORMS[name].project(spectra[:, order].reshape(2, 12, 6), radius.reshape(2, 12)).reshape(24, 6)
    expected = projected(name)[:, order]
    if name == "profile":  # equal entries may have different bounds, in either order
        moved, expected = moved.sort().values, expected.sort().values
    assert ((moved - expected).norm(dim=-1) <= 2 * position_tolerance(spectra, radius)).all()


@every_norm
def test_projection_onto_radius_zero_is_zero(name: str) -> None:
    spectra, radius = spectra_and_radii()
    assert radius[-1] == 0
    assert spectra[-1].any()
    assert (projected(name)[-1] == 0).all()


@every_norm
@pytest.mark.parametrize("radius", [0.5, 1e-3])
def test_projection_in_single_precision(name: str, radius: float) -> None:
    """One spectrum without leading axes, without gradients, as an import of a checkpoint makes it."""
    norm, spectrum, limit = NORMS[name], 100 * torch.tensor([0.3, 4.0, 0.0, 2.0]), torch.tensor(radius)
    with torch.no_grad():
        result = norm.project(spectrum, limit)
        exact = norm.project(spectrum.double(), limit.double())
    assert result.dtype == torch.float32
    assert norm.value(result) <= limit * (1 + slack(spectrum))
    assert (result - exact).abs().max() <= slack(spectrum) * spectrum.max()


def test_projection_onto_a_gauge_needs_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    gauge, radius = Gauge(shared_norms.capped), torch.tensor(1.0)
    with pytest.raises(ImportError, match="needs SciPy: pip install scipy"):
        gauge.project(torch.tensor([3.0, 1.0]), radius)
    inside = torch.tensor([0.5, 0.1])
    assert torch.equal(gauge.project(inside, radius), inside)  # nothing to solve, nothing to need


# --- from a spectrum back to bounds ---


def spectra_inside(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Spectra from zero to the boundary of their balls, some with zeros."""
    spectra = torch.rand(40, 6, dtype=dtype)
    spectra[::2] *= torch.rand(20, 6) > 0.5
    spectra[0] = 0
    spectra[1] = 1
    radius = 10 ** (4 * torch.rand(40, dtype=dtype) - 2)
    fill = torch.linspace(0, 1, 40, dtype=dtype).roll(-5)  # of the radius
    value = norm.value(spectra)
    return spectra * (fill * radius / torch.where(value > 0, value, 1))[:, None], radius


@every_learnable_norm
@every_dtype
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_bounds_contain_the_spectrum(name: str, temperature: float, dtype: torch.dtype) -> None:
    norm = LEARNABLE[name]
    spectra, radius = spectra_inside(norm, dtype)
    logits = norm.logits_containing(spectra, radius, temperature)
    assert logits is not None
    assert logits.isfinite().all()
    scales = norm.scales(logits, radius, 6, temperature)
    # logits of size log(1 / eps) are rounded before they are exponentiated
    rounding = slack(spectra) * math.log(1 / torch.finfo(dtype).eps)
    assert (scales >= spectra - rounding * radius[:, None]).all()
    assert (scales > 0).all()  # also on the boundary: what is zero can grow
    assert (norm.value(scales) <= radius * (1 + slack(spectra))).all()


@every_learnable_norm
def test_bounds_spread_what_is_left_evenly(name: str) -> None:
    norm = LEARNABLE[name]
    spectra = torch.tensor([[0.2, 0.0, 0.1], [0.05, 0.05, 0.0]], dtype=torch.float64)
    radius = torch.tensor([1.0, 2.0], dtype=torch.float64)
    logits = norm.logits_containing(spectra, radius)
    left = norm.scales(logits, radius, 3) - spectra
    assert (left > 0.1).all()
    torch.testing.assert_close(left, left[:, :1].expand(2, 3), rtol=1e-9, atol=0)


@every_learnable_norm
def test_bounds_of_nothing_in_a_ball_of_radius_zero(name: str) -> None:
    norm, radius = LEARNABLE[name], torch.zeros(())
    logits = norm.logits_containing(torch.zeros(6), radius)
    assert logits is not None
    assert logits.isfinite().all()
    assert (norm.scales(logits, radius, 6) == 0).all()


@pytest.mark.parametrize("norm", [Spectral(), Profile(PROFILE)], ids=lambda norm: norm.name)
def test_fixed_bounds_have_no_logits(norm: Norm) -> None:
    assert norm.logits_containing(torch.zeros(6), torch.tensor(1.0)) is None


# --- names ---


@pytest.mark.parametrize(
    ("given", "norm"),
    [
        ("spectral", Spectral()),
        ("frobenius", Schatten(2.0)),
        ("nuclear", Schatten(1.0)),
        ("ky-fan-1", KyFan(1)),
        ("ky-fan-100", KyFan(100)),
        (1, Schatten(1.0)),
        (2.0, Schatten(2.0)),
        (3.7, Schatten(3.7)),
        (np.float64(3.7), Schatten(3.7)),
        (math.inf, Spectral()),
    ],
)
def test_parse_norm(given: str | float, norm: Norm) -> None:
    assert parse_norm(given) == norm


@every_norm
def test_parse_norm_returns_norms(name: str) -> None:
    assert parse_norm(NORMS[name]) is NORMS[name]


ODD_EXPONENTS = (1.0, 2, 3, 1.5, 2.3456789012, math.pi, 1 + 2**-52, 1e6, 1e16, 1.2345e22, 1e300)
NAMED = (Spectral(), KyFan(1), KyFan(12), KyFan(10**20), *map(Schatten, ODD_EXPONENTS))


@pytest.mark.parametrize("norm", NAMED, ids=lambda norm: norm.name)
def test_names_give_back_their_norm(norm: Norm) -> None:
    assert parse_norm(norm.name) == norm


BAD_NAMES = ["foo", "", "Spectral", "spectral ", "ky-fan", "ky-fan-", "ky-fan-0", "ky-fan-x", "ky-fan--1"]
BAD_NUMBERS = [0.5, 0, -1, math.nan, -math.inf, True, False, None, [2.0], 2j]


@pytest.mark.parametrize(
    "given", [*BAD_NAMES, "ky-fan-1.5", "schatten-0.5", "schatten-", "schatten-1e999", *BAD_NUMBERS]
)
def test_parse_norm_refuses(given: Any) -> None:
    with pytest.raises(ValueError, match=r"norm must be .* or a number p >= 1, got norm=") as error:
        parse_norm(given)
    assert str(error.value).endswith(f"got norm={given!r}")  # the rule, then the value


def test_labels_name_gauges() -> None:
    assert Gauge(shared_norms.capped, label="capped").name == "capped"
    assert Profile([1.0]).name == "profile"


# --- refusals ---


@pytest.mark.parametrize("p", [0.5, 0.0, -1.0, math.nan, math.inf])
def test_schatten_refuses(p: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[1, inf\), got p="):
        Schatten(p)


@pytest.mark.parametrize("q", [0, -1, 1.5, 2.0, True])
def test_ky_fan_refuses(q: Any) -> None:
    with pytest.raises(ValueError, match="must be an integer >= 1, got q="):
        KyFan(q)


@pytest.mark.parametrize("bounds", [[], [-1.0], [1.0, math.nan], [math.inf, 1.0]], ids=str)
def test_profile_refuses(bounds: list[float]) -> None:
    with pytest.raises(ValueError, match=r"finite and not negative, got \["):
        Profile(bounds)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda s: s.sum(), r"map \(..., k\) to \(...,\)"),
        (lambda s: s, r"map \(..., k\) to \(...,\)"),
        (lambda s: 0 * s.sum(-1), "positive away from zero"),
        (lambda s: s.sum(-1) * math.nan, "positive away from zero"),
        (lambda s: s.square().sum(-1), "positively homogeneous"),
        (lambda s: s[..., 0] + s.sum(-1), "symmetric in its entries"),
    ],
)
def test_gauge_refuses(function: Callable[[Tensor], Tensor], rule: str) -> None:
    with pytest.raises(ValueError, match=f"a gauge function must .*{rule}"):
        Gauge(function)
