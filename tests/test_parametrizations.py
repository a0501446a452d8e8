"""Free parameters: whatever they are, the update stays in the ball, and the whole ball is reached
(MATH.md §2, §3, §5)."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import shared_norms
from nblora.bounds import Norm, Profile, Schatten, Spectral
from nblora.cayley import random_frame
from nblora.lowrank import LowRank
from nblora.parametrizations import (
    FreeParameters,
    Parametrization,
    bounded_update,
    effective_rank,
    has_run_away,
    pull_back,
    random_start,
    zero_start,
)

NORMS = {**shared_norms.NORMS, "profile": Profile([3.0, 2.0, 1.0, 0.5, 0.25, 0.2, 0.15, 0.1])}
PARAMETRIZATIONS = get_args(Parametrization)
SIZES = {  # m, n, r, leading axes
    "row": (1, 7, 2, ()),
    "column": (7, 1, 2, ()),
    "square": (8, 8, 8, ()),
    "rank beyond the smaller side": (5, 12, 20, ()),
    "thin": (30, 20, 6, ()),
    "batch": (6, 9, 4, (3,)),
}

every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
every_parametrization = pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
every_size = pytest.mark.parametrize(("m", "n", "r", "batch"), SIZES.values(), ids=SIZES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def slack(update: LowRank) -> float:
    return 10 * max(update.shape[-2:]) * torch.finfo(update.left.dtype).eps


def tensors(free: FreeParameters) -> list[Tensor]:
    return [t for t in (free.out, free.into, free.angle, free.logits) if t is not None]


def trainable(free: FreeParameters) -> FreeParameters:
    return free.map(lambda tensor: tensor.detach().clone().requires_grad_())


def radii(batch: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(0.7, 1.9, math.prod(batch), dtype=dtype).reshape(batch)


def having_a_ball(parametrization: Parametrization, norm: Norm) -> Norm:
    """The norm where the parametrization exists for it, else the Frobenius norm, for which all exist."""
    return Schatten(2.0) if parametrization == "radial" else norm


def explicit_bounds(
    free: FreeParameters,
    norm: Norm,
    radius: Tensor,
    parametrization: Parametrization,
    temperature: float = 1.0,
) -> Tensor:
    """s_j (..., k): learned from logits, or, in the radial parametrization, the radius for every j."""
    if parametrization == "radial":
        return radius[..., None].expand(*radius.shape, free.rank)
    return norm.scales(free.logits, radius, free.rank, temperature)


def assert_inside(
    update: LowRank,
    free: FreeParameters,
    norm: Norm,
    radius: Tensor,
    parametrization: Parametrization,
    temperature: float = 1.0,
) -> None:
    """The promise: sigma_j <= s_[j] for every j, and the norm is at most the radius; measured in float64."""
    assert update.left.isfinite().all()
    assert update.right.isfinite().all()
    sigma = update.singular_values()
    scales = explicit_bounds(free, norm, radius.to(free.out), parametrization, temperature)
    bounds = scales.detach().double().sort(descending=True).values
    measured = 10 * max(update.shape[-2:]) * torch.finfo(torch.float64).eps * bounds[..., :1]
    assert (sigma <= bounds * (1 + slack(update)) + measured).all()
    assert (norm.value(sigma) <= radius.double() * (1 + slack(update))).all()


# --- starts ---


@every_size
@every_norm
@every_parametrization
def test_zero_start(
    parametrization: Parametrization, norm: Norm, m: int, n: int, r: int, batch: tuple[int, ...]
) -> None:
    """Exactly zero, with gradients that leave it."""
    free = trainable(zero_start(m, n, r, norm=norm, parametrization=parametrization, batch_shape=batch))
    update = bounded_update(free, norm=norm, radius=radii(batch), parametrization=parametrization)
    assert update.shape == (*batch, m, n)
    assert update.rank == free.rank == min(r, m, n)
    assert update.dense().abs().max() == 0
    (update.dense() * torch.randn(m, n)).sum().backward()
    gradients = [tensor.grad for tensor in tensors(free)]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    moving = free.out.grad if free.angle is None else free.angle.grad
    assert moving is not None
    assert moving.reshape(*batch, -1).abs().amax(-1).min() > 0  # of every member of the batch


@every_parametrization
def test_zero_start_survives_weight_decay(parametrization: Parametrization) -> None:
    """A layer without gradient, such as an expert that is never routed to, must not wake up by decay."""
    norms = [norm for norm in NORMS.values() if having_a_ball(parametrization, norm) == norm]
    cases = [(norm, SIZES["thin"]) for norm in norms]
    cases += [(NORMS["frobenius"], size) for size in SIZES.values()]
    starts = [
        trainable(zero_start(m, n, r, norm=norm, parametrization=parametrization, batch_shape=batch))
        for norm, (m, n, r, batch) in cases
    ]
    before = [start.map(Tensor.clone) for start in starts]
    parameters = [tensor for start in starts for tensor in tensors(start)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(1000):
        optimizer.step()
    for (norm, (*_, batch)), start, old in zip(cases, starts, before):
        update = bounded_update(start, norm=norm, radius=radii(batch), parametrization=parametrization)
        assert update.dense().abs().max() == 0
        if old.into.any():
            assert not torch.equal(start.into, old.into)  # the decay did act


@every_parametrization
def test_zero_start_sees_random_directions(parametrization: Parametrization) -> None:
    """The input side is a random orthonormal frame, not a fixed one such as [I 0]."""
    norm = having_a_ball(parametrization, Spectral())

    def start(seed: int) -> Tensor:
        free = zero_start(
            6,
            9,
            4,
            norm=norm,
            parametrization=parametrization,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(seed),
        )
        radius = torch.tensor(1.0)
        return bounded_update(free, norm=norm, radius=radius, parametrization=parametrization).right

    right = start(0)
    assert (right @ right.mT - torch.eye(4)).abs().max() <= 10 * 9 * torch.finfo(torch.float64).eps
    assert (right[:, 4:].abs().amax(0) > 0.01).all()
    assert torch.equal(start(0), right)
    assert not torch.equal(start(1), right)


@every_size
@every_norm
@every_parametrization
def test_random_start(
    parametrization: Parametrization, norm: Norm, m: int, n: int, r: int, batch: tuple[int, ...]
) -> None:
    """Strictly inside and of full rank: every sigma_j / s_j is in [0.1, 0.9).

    The radial parametrization starts as if its s_j were radius / sqrt(k).
    """
    free = random_start(m, n, r, norm=norm, parametrization=parametrization, batch_shape=batch)
    radius = radii(batch)
    update = bounded_update(free, norm=norm, radius=radius, parametrization=parametrization)
    assert update.shape == (*batch, m, n)
    scales = explicit_bounds(free, norm, radius, parametrization).double()
    scales = scales / math.sqrt(free.rank) if parametrization == "radial" else scales
    sigma, bounds = update.singular_values(), scales.sort(descending=True).values
    assert (sigma <= 0.9 * bounds * (1 + slack(update)) + slack(update) * bounds[..., :1]).all()
    assert (sigma >= 0.1 * bounds * (1 - slack(update)) - slack(update) * bounds[..., :1]).all()
    assert (norm.value(sigma) < radius).all()


@every_parametrization
def test_random_starts_follow_their_generator(parametrization: Parametrization) -> None:
    def start(seed: int) -> FreeParameters:
        generator = torch.Generator().manual_seed(seed)
        return random_start(6, 9, 4, norm=Schatten(2.0), parametrization=parametrization, generator=generator)

    state = torch.get_rng_state()
    first, again, other = start(3), start(3), start(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again)))
    assert not torch.equal(first.out, other.out)


@every_parametrization
@pytest.mark.parametrize("start", [zero_start, random_start])
def test_members_of_a_batch_start_apart(start: Any, parametrization: Parametrization) -> None:
    norm = having_a_ball(parametrization, Spectral())
    free = start(6, 9, 4, norm=norm, parametrization=parametrization, batch_shape=(2, 3))
    assert free.into.shape == (2, 3, 4, 9)
    assert free.out.shape == (2, 3, 4, 6)
    assert not torch.equal(free.into[0, 0], free.into[1, 2])


# --- the bound ---


@st.composite
def free_parameters(draw: st.DrawFn) -> tuple[FreeParameters, Norm, Tensor, Parametrization, float]:
    """Free parameters of every scale: mixed rows, mixed sides, rows from independent to identical."""
    parametrization = draw(st.sampled_from(PARAMETRIZATIONS))
    norm = having_a_ball(parametrization, NORMS[draw(st.sampled_from(sorted(NORMS)))])
    m, n, r, batch = SIZES[draw(st.sampled_from(sorted(SIZES)))]
    k = effective_rank(r, m, n)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    exponent = st.floats(-8, 12)
    apart = draw(st.sampled_from([0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1.0]))
    signs_only = draw(st.booleans())  # what the first steps of Adam make
    row_exponents = (
        draw(st.lists(st.floats(-8, 0), min_size=k, max_size=k)) if draw(st.booleans()) else [0.0] * k
    )

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    def side(size: int) -> Tensor:
        rows = gaussian(1, size) + apart * gaussian(k, size)
        scale = 10 ** (torch.tensor(row_exponents, dtype=torch.float64) + draw(exponent))
        return (rows.sign() if signs_only else rows) * scale[:, None]

    free = FreeParameters(
        out=side(m),
        into=side(n),
        angle=gaussian(k) * 10 ** draw(exponent) if parametrization == "svd" else None,
        logits=gaussian(k) * 10 ** draw(exponent) if norm.learnable and parametrization != "radial" else None,
    )
    radius = 10 ** draw(st.floats(-3, 3)) * torch.ones(batch, dtype=dtype)
    return (
        free.map(lambda t: t.to(dtype)),
        norm,
        radius,
        parametrization,
        draw(st.sampled_from([0.1, 1.0, 10.0])),
    )


@given(free_parameters())
@settings(max_examples=300, deadline=None)
def test_updates_never_leave_the_ball(
    drawn: tuple[FreeParameters, Norm, Tensor, Parametrization, float],
) -> None:
    free, norm, radius, parametrization, temperature = drawn
    update = bounded_update(
        free, norm=norm, radius=radius, parametrization=parametrization, temperature=temperature
    )
    assert_inside(update, free, norm, radius, parametrization, temperature)


@every_size
@every_parametrization
@every_dtype
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e2, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("shape", ["identical rows", "nearly parallel rows", "triangular"])
def test_updates_never_leave_the_ball_where_the_textbook_formula_does(
    parametrization: Parametrization,
    m: int,
    n: int,
    r: int,
    batch: tuple[int, ...],
    shape: str,
    size: float,
    dtype: torch.dtype,
) -> None:
    """And gradients stay finite, or one step would end the training."""
    k, norm, radius = effective_rank(r, m, n), Schatten(2.0), radii(batch, dtype)

    def side(columns: int) -> Tensor:
        rows = torch.ones(k, columns, dtype=dtype).expand(*batch, k, columns)
        if shape == "triangular":
            return size * rows.triu(1)
        return size * (rows + 1e-4 * torch.randn_like(rows) if shape == "nearly parallel rows" else rows)

    angle = size * torch.randn(*batch, k, dtype=dtype) if parametrization == "svd" else None
    logits = size * torch.randn(*batch, k, dtype=dtype) if parametrization != "radial" else None
    free = trainable(FreeParameters(side(m), side(n), angle, logits))
    update = bounded_update(free, norm=norm, radius=radius, parametrization=parametrization)
    assert_inside(update, free, norm, radius, parametrization)
    (update.dense() * torch.randn(m, n, dtype=dtype)).sum().backward()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in tensors(free))


@every_norm
@every_parametrization
@every_dtype
@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_bound_is_kept_at_any_temperature(
    parametrization: Parametrization, norm: Norm, temperature: float, dtype: torch.dtype
) -> None:
    free = random_start(6, 9, 4, norm=norm, parametrization=parametrization, batch_shape=(50,), dtype=dtype)
    free = free.map(lambda t: t + 3 * torch.randn_like(t))
    radius = radii((50,), dtype)
    update = bounded_update(
        free, norm=norm, radius=radius, parametrization=parametrization, temperature=temperature
    )
    assert_inside(update, free, norm, radius, parametrization, temperature)


def test_huge_angles_are_no_nan() -> None:
    free = random_start(8, 6, 4, norm=Spectral(), parametrization="svd")
    huge = torch.full((4,), torch.finfo(torch.float32).max)
    update = bounded_update(
        FreeParameters(free.out, free.into, huge),
        norm=Spectral(),
        radius=torch.ones(()),
        parametrization="svd",
    )
    assert update.dense().isfinite().all()


@every_norm
def test_spectrum_of_the_svd_parametrization_can_be_read_off(norm: Norm) -> None:
    """MATH.md §3: |s_j sin(phi_j)| are the singular values; an angle is in units of 1/sqrt(m)."""
    free = random_start(8, 6, 4, norm=norm, parametrization="svd", dtype=torch.float64)
    assert free.angle is not None
    free = FreeParameters(free.out, free.into, 5 * torch.randn_like(free.angle), free.logits)
    radius = radii((), torch.float64)
    update = bounded_update(free, norm=norm, radius=radius, parametrization="svd")
    assert free.angle is not None
    read_off = (norm.scales(free.logits, radius, 4) * (free.angle * math.sqrt(8)).sin()).abs()
    torch.testing.assert_close(update.singular_values(), read_off.sort(descending=True).values)


@every_norm
@every_parametrization
def test_radius_zero_leaves_nothing(parametrization: Parametrization, norm: Norm) -> None:
    free = random_start(6, 9, 4, norm=norm, parametrization=parametrization)
    update = bounded_update(free, norm=norm, radius=torch.zeros(()), parametrization=parametrization)
    assert (update.dense() == 0).all()


@every_norm
@every_parametrization
def test_gradient(parametrization: Parametrization, norm: Norm) -> None:
    free = random_start(5, 4, 3, norm=norm, parametrization=parametrization, dtype=torch.float64)
    free = free.map(lambda t: t + 0.3 * torch.randn_like(t))  # away from ties, where gauges have kinks
    names = [name for name in ("out", "into", "angle", "logits") if getattr(free, name) is not None]

    def dense(*values: Tensor) -> Tensor:
        moved = FreeParameters(**dict(zip(names, values)))  # type: ignore[arg-type]
        radius = torch.tensor(1.3, dtype=torch.float64)
        return bounded_update(
            moved, norm=norm, radius=radius, parametrization=parametrization, temperature=0.7
        ).dense()

    assert torch.autograd.gradcheck(dense, tuple(tensors(trainable(free))))


@every_norm
@every_parametrization
def test_members_of_a_batch_are_independent(parametrization: Parametrization, norm: Norm) -> None:
    free = random_start(
        6, 9, 4, norm=norm, parametrization=parametrization, batch_shape=(3,), dtype=torch.float64
    )
    radius = radii((3,), torch.float64)
    together = bounded_update(free, norm=norm, radius=radius, parametrization=parametrization).dense()
    for i in range(3):
        one = free.map(lambda t, i=i: t[i])  # type: ignore[misc]
        alone = bounded_update(one, norm=norm, radius=radius[i], parametrization=parametrization).dense()
        torch.testing.assert_close(together[i], alone)


@every_parametrization
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters_are_computed_with_in_float32(
    parametrization: Parametrization, half: torch.dtype
) -> None:
    norm, radius = Schatten(2.0), torch.tensor(1.3)
    free = random_start(6, 9, 4, norm=norm, parametrization=parametrization).map(lambda t: t.to(half))
    update = bounded_update(free, norm=norm, radius=radius.to(half), parametrization=parametrization)
    assert update.left.dtype == update.right.dtype == torch.float32
    exact = bounded_update(
        free.map(Tensor.float),
        norm=norm,
        radius=radius.to(half).float(),
        parametrization=parametrization,
    )
    assert torch.equal(update.dense(), exact.dense())


@every_norm
@every_parametrization
def test_autocast_has_no_effect(parametrization: Parametrization, norm: Norm) -> None:
    """The bound is a matter of float32: products in bfloat16 would leave the ball by up to a percent."""
    free = random_start(6, 9, 4, norm=norm, parametrization=parametrization)
    options: dict[str, Any] = {"norm": norm, "radius": radii(()), "parametrization": parametrization}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = bounded_update(free, **options)
    outside = bounded_update(free, **options)
    assert inside.left.dtype == torch.float32
    assert torch.equal(inside.left, outside.left)
    assert torch.equal(inside.right, outside.right)


# --- the way back ---


def update_with_spectrum(m: int, n: int, spectrum: Tensor) -> LowRank:
    """Random singular vectors; spectrum (..., k) in any order."""
    *batch, k = spectrum.shape
    u, v = (random_frame(size, k, batch_shape=tuple(batch), dtype=spectrum.dtype) for size in (m, n))
    return LowRank(u * spectrum[..., None, :], v.mT)


def spectrum_inside(kind: str, norm: Norm, k: int, radius: Tensor) -> Tensor:
    """(..., k) float64 in the ball: "inside" and "zeros" reach 60 % of the radius, the rest all of it."""
    shape = (*radius.shape, k)
    if kind == "equal to its bounds":
        return norm.scales(torch.randn(shape, dtype=torch.float64), radius, k)
    spectrum = torch.ones(shape, dtype=torch.float64) if kind == "flat" else 0.1 + torch.rand(shape).double()
    if "zero" in kind:
        spectrum[..., k // 2 :] = 0
    if not spectrum.any():
        return spectrum
    fill = 0.6 if kind in ("inside", "zeros") else 1.0
    return spectrum * (fill * radius / norm.value(spectrum))[..., None]


KINDS = ["inside", "zeros", "boundary", "boundary with zeros", "flat", "equal to its bounds"]


@every_size
@every_norm
@every_parametrization
@pytest.mark.parametrize("kind", KINDS)
def test_pull_back_round_trip(
    parametrization: Parametrization,
    norm: Norm,
    m: int,
    n: int,
    r: int,
    batch: tuple[int, ...],
    kind: str,
) -> None:
    k, radius = effective_rank(r, m, n), radii(batch, torch.float64)
    update = update_with_spectrum(m, n, spectrum_inside(kind, norm, k, radius))
    options: dict[str, Any] = {"norm": norm, "radius": radius, "parametrization": parametrization}
    free = pull_back(update, r, **options)
    assert free.rank == k
    assert all(tensor.isfinite().all() for tensor in tensors(free))
    again = bounded_update(free, **options)
    assert (again.dense() - update.dense()).abs().max() <= 1e-10
    assert_inside(again, free, norm, radius, parametrization)


@every_norm
@every_parametrization
@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_pull_back_round_trip_at_any_temperature(
    parametrization: Parametrization, norm: Norm, temperature: float
) -> None:
    radius = torch.tensor(1.3, dtype=torch.float64)
    update = update_with_spectrum(9, 6, spectrum_inside("zeros", norm, 4, radius))
    options: dict[str, Any] = {
        "norm": norm,
        "radius": radius,
        "parametrization": parametrization,
        "temperature": temperature,
    }
    again = bounded_update(pull_back(update, 4, **options), **options)
    assert (again.dense() - update.dense()).abs().max() <= 1e-10


@every_norm
@every_parametrization
@pytest.mark.parametrize("kind", KINDS)
def test_pull_back_round_trip_in_single_precision(
    parametrization: Parametrization, norm: Norm, kind: str
) -> None:
    radius = torch.tensor(1.3, dtype=torch.float64)
    update = update_with_spectrum(9, 6, spectrum_inside(kind, norm, 4, radius).float())
    options: dict[str, Any] = {"norm": norm, "radius": radius.float(), "parametrization": parametrization}
    free = pull_back(update, 4, **options)
    assert free.out.dtype == torch.float32
    again = bounded_update(free, **options)
    # logits of size log(1 / eps) are rounded, and the inverse has a condition number of a few units
    rounding = slack(update) * math.log(1 / torch.finfo(torch.float32).eps)
    assert (again.dense() - update.dense()).abs().max() <= rounding


@every_parametrization
@pytest.mark.parametrize("columns", [1, 2, 9], ids="{} columns".format)
def test_pull_back_takes_any_number_of_factors(parametrization: Parametrization, columns: int) -> None:
    """Fewer columns than r, or more of them with the same rank of at most 2."""
    norm, radius = Schatten(2.0), torch.tensor(2.0, dtype=torch.float64)
    two = update_with_spectrum(7, 8, torch.tensor([1.0, 0.5], dtype=torch.float64)[: min(columns, 2)])
    mixing = torch.linalg.qr(torch.randn(columns, two.rank, dtype=torch.float64)).Q.mT
    update = LowRank(two.left @ mixing, mixing.mT @ two.right)
    assert update.rank == columns
    options: dict[str, Any] = {"norm": norm, "radius": radius, "parametrization": parametrization}
    free = pull_back(update, 4, **options)
    assert free.rank == 4
    again = bounded_update(free, **options)
    assert (again.dense() - update.dense()).abs().max() <= 1e-10
    assert_inside(again, free, norm, radius, parametrization)


@every_norm
@every_parametrization
def test_pull_back_of_nothing(parametrization: Parametrization, norm: Norm) -> None:
    """A LoRA checkpoint at its start."""
    update = LowRank(torch.zeros(6, 2), torch.randn(2, 9))
    options: dict[str, Any] = {"norm": norm, "radius": radii(()), "parametrization": parametrization}
    again = bounded_update(pull_back(update, 4, **options), **options)
    assert again.dense().abs().max() <= slack(again)


@every_norm
@every_parametrization
def test_every_matrix_in_the_ball_is_reached(parametrization: Parametrization, norm: Norm) -> None:
    """Completeness. Gaussian matrices have full rank and no structure; the last ones touch the boundary."""
    matrices = torch.randn(20, 6, 8, dtype=torch.float64)
    radius = radii((20,), torch.float64)
    fill = torch.linspace(0.01, 1, 20, dtype=torch.float64)
    matrices *= (fill * radius / norm.value(torch.linalg.svdvals(matrices)))[:, None, None]
    options: dict[str, Any] = {"norm": norm, "radius": radius, "parametrization": parametrization}
    free = pull_back(LowRank.from_dense(matrices), 6, **options)
    assert (bounded_update(free, **options).dense() - matrices).abs().max() <= 1e-10


@every_norm
@every_parametrization
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_pull_back_refuses_what_is_outside(
    parametrization: Parametrization, norm: Norm, batch: tuple[int, ...]
) -> None:
    radius = radii(batch, torch.float64)
    spectrum = spectrum_inside("boundary", norm, 4, radius)
    spectrum.reshape(-1, 4)[-1] *= 1.001
    with pytest.raises(
        ValueError, match=rf"the {norm.name} norm of the update must be at most radius=.*, got"
    ):
        pull_back(
            update_with_spectrum(6, 9, spectrum), 4, norm=norm, radius=radius, parametrization=parametrization
        )


@every_parametrization
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_pull_back_refuses_what_is_not_finite(
    parametrization: Parametrization, value: float, batch: tuple[int, ...]
) -> None:
    update = update_with_spectrum(6, 9, torch.full((*batch, 2), 0.1))
    update.left[(-1,) * update.left.ndim] = value  # of one member of the batch
    norm = having_a_ball(parametrization, Spectral())
    with pytest.raises(ValueError, match="the update must be finite, got NaN or infinity"):
        pull_back(update, 4, norm=norm, radius=radii(batch), parametrization=parametrization)


@every_parametrization
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_pull_back_refuses_a_rank_too_large(parametrization: Parametrization, batch: tuple[int, ...]) -> None:
    spectrum = torch.tensor([0.5, 0.2, 0.05], dtype=torch.float64).expand(*batch, 3)
    update = update_with_spectrum(6, 9, spectrum)
    message = r"must have rank at most 2, got a singular value number 3 of 0\.1 times the largest"
    norm = having_a_ball(parametrization, Spectral())
    with pytest.raises(ValueError, match=message):
        pull_back(update, 2, norm=norm, radius=radii(batch), parametrization=parametrization)


# --- refusals ---


def test_effective_rank() -> None:
    assert effective_rank(3, 5, 7) == 3
    assert effective_rank(9, 5, 7) == 5
    assert effective_rank(9, 8, 7) == 7


@pytest.mark.parametrize("r", [0, -1, True, 2.0, "3", None])
def test_effective_rank_refuses(r: Any) -> None:
    with pytest.raises(ValueError, match="r must be an integer >= 1, got r=") as error:
        effective_rank(r, 5, 7)
    assert str(error.value).endswith(f"got r={r!r}")


def test_unknown_parametrizations_are_refused() -> None:
    free = zero_start(6, 9, 4, norm=Spectral(), parametrization="joint")
    update = LowRank(torch.zeros(6, 2), torch.zeros(2, 9))
    other: Any = {"norm": Spectral(), "parametrization": "polar"}
    message = "must be one of 'joint', 'svd', 'radial', got parametrization='polar'"
    for start in (zero_start, random_start):
        with pytest.raises(ValueError, match=message):
            start(6, 9, 4, **other)
    with pytest.raises(ValueError, match=message):
        bounded_update(free, radius=torch.tensor(1.0), **other)
    with pytest.raises(ValueError, match=message):
        pull_back(update, 4, radius=torch.tensor(1.0), **other)


def test_svd_parametrization_needs_angles() -> None:
    free = zero_start(6, 9, 4, norm=Spectral(), parametrization="joint")
    with pytest.raises(ValueError, match="needs angles, got angle=None"):
        bounded_update(free, norm=Spectral(), radius=torch.tensor(1.0), parametrization="svd")


def test_learnable_bounds_need_logits() -> None:
    free = zero_start(6, 9, 4, norm=Spectral(), parametrization="joint")
    with pytest.raises(ValueError, match="needs logits, got None"):
        bounded_update(free, norm=Schatten(2.0), radius=torch.tensor(1.0), parametrization="joint")


# --- training ---

TRAINED = ("spectral", "frobenius", "ky-fan-3")


def after_training(parametrization: Parametrization, norm: Norm, learning_rate: float) -> FreeParameters:
    """Parameters after 200 steps of AdamW on a regression whose solution is outside the ball."""
    m, n, radius = 10, 14, torch.tensor(1.0)
    free = trainable(zero_start(m, n, 4, norm=norm, parametrization=parametrization))
    x, target = torch.randn(64, n), torch.randn(m, n) / 3
    optimizer = torch.optim.AdamW(
        tensors(free), lr=learning_rate, weight_decay=0.0
    )  # decay pulls runaways back
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        update = bounded_update(free, norm=norm, radius=radius, parametrization=parametrization)
        loss = (update.apply(x) - x @ target.mT).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if learning_rate <= 0.1:
        assert losses[-1] < 0.8 * losses[0]  # it does learn
    free = free.map(Tensor.detach)
    update = bounded_update(free, norm=norm, radius=radius, parametrization=parametrization)
    assert_inside(update, free, norm, radius, parametrization)
    return free


@every_parametrization
@pytest.mark.parametrize("norm", [NORMS[name] for name in TRAINED], ids=TRAINED)
def test_healthy_training_has_not_run_away(parametrization: Parametrization, norm: Norm) -> None:
    free = after_training(parametrization, norm, 1e-2)
    assert not has_run_away(free, norm=norm, parametrization=parametrization)


@pytest.mark.parametrize("name", TRAINED)
def test_absurd_learning_rate_runs_away(name: str) -> None:
    """Safe, but it no longer learns: the update has shrunk to a few percent of its bound."""
    free = after_training("joint", NORMS[name], 10.0)
    assert has_run_away(free, norm=NORMS[name], parametrization="joint")


@every_size
@every_norm
@every_parametrization
def test_starts_have_not_run_away(
    parametrization: Parametrization, norm: Norm, m: int, n: int, r: int, batch: tuple[int, ...]
) -> None:
    options: dict[str, Any] = {"norm": norm, "parametrization": parametrization}
    starts = [start(m, n, r, batch_shape=batch, **options) for start in (zero_start, random_start)]
    update = update_with_spectrum(m, n, spectrum_inside("flat", norm, min(r, m, n), radii(batch).double()))
    starts.append(pull_back(update, r, radius=radii(batch), **options))
    for free in starts:
        verdict = has_run_away(free, **options)
        assert verdict.shape == batch
        assert verdict.dtype == torch.bool
        assert not verdict.any()


@every_parametrization
def test_each_member_of_a_batch_runs_away_alone(parametrization: Parametrization) -> None:
    norm = Schatten(2.0)
    free = random_start(6, 9, 4, norm=norm, parametrization=parametrization, batch_shape=(3,))
    free.out[1] *= 1e6
    free.into[1] *= 1e6
    assert has_run_away(free, norm=norm, parametrization=parametrization).tolist() == [False, True, False]
    halves = free.map(Tensor.bfloat16)
    assert has_run_away(halves, norm=norm, parametrization=parametrization).tolist() == [False, True, False]


@every_parametrization
def test_autocast_has_no_effect_on_the_way_back(parametrization: Parametrization) -> None:
    """Neither on the way to an update nor on the way back."""
    options: dict[str, Any] = {"norm": Schatten(2.0), "parametrization": parametrization}
    radius = torch.tensor(0.5)
    free = random_start(12, 9, 4, **options)
    plain = bounded_update(free, radius=radius, **options)
    with torch.autocast("cpu", torch.bfloat16):
        update = bounded_update(free, radius=radius, **options)
        back = pull_back(update, 4, radius=radius, **options)
        dense = update.dense()
    assert torch.equal(dense, plain.dense())
    again = bounded_update(back, radius=radius, **options).dense()
    torch.testing.assert_close(again, dense, rtol=0, atol=10 * 12 * torch.finfo(torch.float32).eps)
