"""From free parameters to bounded low-rank updates and back (MATH.md §2, §3, §5).

`FreeParameters` are what an optimizer moves, without constraints. `bounded_update` maps them to a
`LowRank` update whose j-th singular value is at most the j-th largest bound, whatever they are.
Everything is pure, differentiable and batched over leading axes.

Letters: the update is (m, n), m = out_features and n = in_features; k = min(r, m, n) is the effective
rank. "out" is the paper's A and acts on outputs, "in" is the paper's B and acts on inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from nblora.bounds import Norm, Schatten
from nblora.cayley import inverse_tall_cayley, random_frame, tall_cayleys
from nblora.lowrank import LowRank, full_precision

Parametrization = Literal["joint", "svd", "radial"]
PARAMETRIZATIONS: tuple[Parametrization, ...] = get_args(Parametrization)


@dataclass(frozen=True)
class FreeParameters:
    """Unconstrained parameters of one update (or, with leading axes, of several).

    Attributes:
        out: (..., k, m) output side.
        into: (..., k, n) input side.
        angle: (..., k) in the svd parametrization, in units of 1/sqrt(m) radians, else None.
        logits: (..., k) where the norm has learnable bounds and k > 1, else None; None in the radial
            parametrization.
    """

    out: Tensor
    into: Tensor
    angle: Tensor | None = None
    logits: Tensor | None = None

    @property
    def rank(self) -> int:
        """k, the effective rank."""
        return self.out.shape[-2]

    def map(self, function: Callable[[Tensor], Tensor]) -> FreeParameters:
        """The parameters with `function` applied to each tensor that is there."""
        return FreeParameters(
            function(self.out),
            function(self.into),
            None if self.angle is None else function(self.angle),
            None if self.logits is None else function(self.logits),
        )


def check_parametrization(parametrization: str, norm: Norm) -> None:
    """Raise ValueError unless there is such a parametrization of the norm's ball."""
    if parametrization not in PARAMETRIZATIONS:
        raise ValueError(
            f"parametrization must be one of {', '.join(map(repr, PARAMETRIZATIONS))}, "
            f"got parametrization={parametrization!r}"
        )
    if parametrization == "radial" and norm != Schatten(2.0):
        raise ValueError(
            f'parametrization="radial" needs norm="frobenius", whose ball needs no decomposition, '
            f"got norm={norm.name!r}"
        )


def effective_rank(r: int, m: int, n: int) -> int:
    """min(r, m, n): a larger rank adds nothing, since the update has no more singular values."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r must be an integer >= 1, got r={r!r}")
    return min(r, m, n)


def bounded_update(
    free: FreeParameters,
    *,
    norm: Norm,
    radius: Tensor,
    parametrization: Parametrization,
    temperature: float = 1.0,
) -> LowRank:
    """The update that free parameters stand for.

    Half-precision parameters are computed with in float32, and autocast has no effect; the result is
    float32 or float64.

    Args:
        free: any real values.
        norm: whose ball the update stays in.
        radius: (...,) of that ball, >= 0.
        parametrization: "joint" (MATH.md §2), "svd" (§3) or "radial" (Note [Into the ball]).
        temperature: of the learnable bounds, > 0.

    Returns:
        left (..., m, k) and right (..., k, n) with sigma_j(left @ right) <= s_[j] (there is no s_j in the
        radial parametrization) and norm <= radius, in the parameters' precision.

    Raises:
        ValueError: by `check_parametrization`.
    """
    batch_shape = free.out.shape[:-2]
    count = batch_shape.numel()
    flat = free.map(lambda tensor: tensor.reshape(count, *tensor.shape[len(batch_shape) :]))
    (update,) = bounded_updates(
        [flat],
        norm=norm,
        radii=[radius.expand(batch_shape).reshape(count)],
        parametrization=parametrization,
        temperature=temperature,
    )
    return LowRank(
        update.left.reshape(*batch_shape, *update.left.shape[1:]),
        update.right.reshape(*batch_shape, *update.right.shape[1:]),
    )


def bounded_updates(
    batches: Sequence[FreeParameters],
    *,
    norm: Norm,
    radii: Sequence[Tensor],
    parametrization: Parametrization,
    temperature: float = 1.0,
) -> list[LowRank]:
    """`bounded_update` for batches of different (m, n) and one k, with one batched inverse for all of them.

    Args:
        batches: each with one leading axis, of any length b; all on one device.
        radii: (b,) for each batch.
        norm, parametrization, temperature: as in `bounded_update`.
    """
    if batches[0].out.dtype != torch.float64:
        batches = [free.map(Tensor.float) for free in batches]
    with full_precision(batches[0].out):
        return _bounded_updates(batches, norm, radii, parametrization, temperature)


def _bounded_updates(
    batches: Sequence[FreeParameters],
    norm: Norm,
    radii: Sequence[Tensor],
    parametrization: Parametrization,
    temperature: float,
) -> list[LowRank]:
    check_parametrization(parametrization, norm)
    rank, sizes = batches[0].rank, [len(free.out) for free in batches]
    radius = torch.cat(list(radii)).to(batches[0].out)
    if parametrization == "radial":
        rows = tall_cayleys([(free.into, free.out / _unit(rank)) for free in batches])
        return [_into_ball(a, b, own) for (b, a), own in zip(rows, radius.split(sizes))]
    logits = [free.logits for free in batches if free.logits is not None]
    scales = norm.scales(torch.cat(logits) if logits else None, radius, rank, temperature).split(sizes)
    if parametrization == "joint":
        rows = tall_cayleys([(free.into, free.out) for free in batches])  # B (b, k, n), A (b, k, m)
        return [LowRank((a * (2 * s)[..., None]).mT, b) for (b, a), s in zip(rows, scales)]
    rows = tall_cayleys([(side,) for free in batches for side in (free.out, free.into)])
    updates = []
    for free, s, (u,), (v,) in zip(batches, scales, rows[::2], rows[1::2]):
        if free.angle is None:
            raise ValueError("the svd parametrization needs angles, got angle=None")
        # Note [The unit of an angle]; clamped, since the sine of an overflow would be NaN
        sine = (free.angle.clamp(-1e30, 1e30) * math.sqrt(u.shape[-1])).sin()
        updates.append(LowRank((u * (s * sine)[..., None]).mT, v))
    return updates


# Note [Into the ball]
#
# The joint and the svd parametrization learn a bound s_j for each singular value. What a direction may have
# is so decided apart from what it wants, by logits that learn slowly, and where one gradient dominates, as
# that of a client with few samples does, its direction first gets 1/sqrt(k) of the radius and has to wait for
# more. The radial parametrization has one bound for all: the joint update with s_j = REACH * radius for every
# j, scaled back by radius / ||update||_F where that is below 1. It too reaches every update of the ball and
# no other, and scaling keeps singular vectors. The Frobenius norm comes from two (k, k) Gram matrices,
# ||A^T B||_F^2 = tr(A A^T B B^T); other norms would need a decomposition in every step.
#
# REACH > 1, since the sine that the joint parametrization is made of flattens where an s_j is used up: beyond
# the ball it may. `out` is stored in units of 1 / (REACH sqrt(k)), so that an update leaves zero as fast as
# in the joint parametrization, whose s_j begin at radius / sqrt(k), and learning rates carry over.

_REACH = 3.0


def _unit(rank: int) -> float:
    return _REACH * math.sqrt(rank)


def _into_ball(a: Tensor, b: Tensor, radius: Tensor) -> LowRank:
    """2 REACH radius (b,) A^T B for A (b, k, m), B (b, k, n), scaled back where its norm is beyond radius."""
    # In float64: the products cancel where directions are used up, and the bound would be missed by 1e-5.
    exact = torch.float32 if a.device.type == "mps" else torch.float64  # which that device does not have
    gram_a, gram_b = (side @ side.mT for side in (a.to(exact), b.to(exact)))
    squared = (gram_a * gram_b).sum((-2, -1)).to(a)
    slack = 1 + (2 if exact == torch.float64 else 64) * a.shape[-2] * torch.finfo(a.dtype).eps
    # clamped before the root, whose gradient at zero would be NaN
    share = (squared * ((2 * _REACH) ** 2 * slack)).clamp(min=1).sqrt()
    return LowRank((a * (2 * _REACH * radius / share)[:, None, None]).mT, b)


def zero_start(
    m: int,
    n: int,
    r: int,
    *,
    norm: Norm,
    parametrization: Parametrization,
    batch_shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> FreeParameters:
    """Free parameters whose update is exactly zero and whose gradient is not.

    The input side (and in the svd parametrization the output side) starts at a uniformly random
    orthonormal frame, so that every direction can be reached. The update stays exactly zero under
    weight decay. MATH.md §2, "Zero start".
    """
    k = effective_rank(r, m, n)
    ratio = torch.zeros(*batch_shape, k, dtype=dtype, device=device)
    free = _random(m, n, ratio, norm, parametrization, generator)
    if parametrization != "svd":
        free = replace(free, out=torch.zeros_like(free.out))
    return free


def random_start(
    m: int,
    n: int,
    r: int,
    *,
    norm: Norm,
    parametrization: Parametrization,
    batch_shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> FreeParameters:
    """Free parameters of a random update strictly inside the ball: sigma_j / s_j uniform in [0.1, 0.9).

    s_j is radius / sqrt(k) in the radial parametrization.
    """
    k = effective_rank(r, m, n)
    uniform = torch.rand(*batch_shape, k, dtype=dtype, device=device, generator=generator)
    ratio = 0.1 + 0.8 * uniform
    return _random(
        m, n, ratio / _unit(k) if parametrization == "radial" else ratio, norm, parametrization, generator
    )


def pull_back(
    update: LowRank,
    r: int,
    *,
    norm: Norm,
    radius: Tensor,
    parametrization: Parametrization,
    temperature: float = 1.0,
) -> FreeParameters:
    """Right inverse of `bounded_update`: free parameters of a given update inside the ball.

    Args:
        update: (..., m, n); its own rank may be smaller or larger than r.
        r: rank of the parametrization.
        norm, radius, parametrization, temperature: as in `bounded_update`.

    Raises:
        ValueError: if the update is outside the ball (project its spectrum first), not finite, or
            has more than r singular values above rounding.
    """
    check_parametrization(parametrization, norm)
    m, n = update.shape[-2:]
    k = effective_rank(r, m, n)
    if not bool(update.left.isfinite().all() & update.right.isfinite().all()):
        raise ValueError("the update must be finite, got NaN or infinity")
    u, sigma, v = _padded(update, k).svd()
    radius = radius.to(sigma)
    slack = 100 * max(m, n) * torch.finfo(sigma.dtype).eps
    largest = sigma[..., 0]
    if sigma.shape[-1] > k and bool((sigma[..., k] > slack * largest).any()):
        raise ValueError(
            f"the update must have rank at most {k}, got a singular value number {k + 1} of "
            f"{(sigma[..., k] / largest).max().item():.3g} times the largest"
        )
    u, sigma, v = u[..., :k], sigma[..., :k], v[..., :k]
    value = norm.value(sigma)
    if not bool((value <= radius * (1 + slack)).all()):
        raise ValueError(
            f"the {norm.name} norm of the update must be at most radius={radius.max().item():.6g}, "
            f"got {value.max().item():.6g}"
        )
    if parametrization == "radial":
        logits, scales = None, (_REACH * radius)[..., None].expand_as(sigma)
    else:
        logits = norm.logits_containing(sigma, radius, temperature)
        scales = norm.scales(logits, radius, k, temperature)
    ratio = torch.where(scales > 0, sigma / scales, torch.zeros_like(sigma)).clamp(max=1)
    return replace(_from_frames(u, ratio, v, parametrization), logits=logits)


def descent_step(gradient: LowRank, r: int, *, norm: Norm, radius: Tensor, step: float) -> LowRank:
    """A step against a gradient, of rank at most r and a given share of the ball.

    The spectrum is the square root of the gradient's: steepest descent in the Frobenius norm would follow the
    gradient's own, in the spectral norm a flat one, and this trained best in Frobenius balls.

    Args:
        gradient: (..., m, n) of the loss by the weight.
        r: of the singular values that are kept, the largest.
        norm: of the ball.
        radius: (...,) of the ball.
        step: norm of the result over the radius, 0 to 1.

    Returns:
        (..., m, n), zero where the gradient is zero.
    """
    k = effective_rank(r, *gradient.shape[-2:])
    u, sigma, v = (factor[..., :k] for factor in gradient.svd())
    shape = torch.where(sigma > 0, sigma / sigma[..., :1], torch.zeros_like(sigma)).sqrt()
    size = norm.value(shape)
    size = torch.where(size > 0, step * radius.to(size) / size, torch.zeros_like(size))
    return LowRank(u * (-shape * size[..., None])[..., None, :], v.mT)


# Note [The unit of an angle]
#
# An optimizer such as Adam moves every entry of a parameter by about the learning rate. In the joint
# parametrization a row of m entries moves with it, whose norm so changes by sqrt(m) times the learning
# rate. An angle is one entry; sqrt(m) as its unit lets svd and joint learn at the same rates
# (measured on the vision task of benchmarks/forgetting.py at 1e-2: without it svd reached 32 % where joint
# reached 79 %, with it 78 %).

_FAR = 50.0


@torch.no_grad()
def has_run_away(
    free: FreeParameters, *, norm: Norm, parametrization: Parametrization, temperature: float = 1.0
) -> Tensor:
    """Whether free parameters (...,) are so large that the update hardly moves any more.

    Frames that `zero_start`, `random_start` and `pull_back` make, and those of healthy training, have
    rows of norm about 1. Optimizer steps far too large let the rows grow without end; the Cayley
    transform then barely reacts, and the update shrinks to zero, except in the svd parametrization. True
    where the typical row of the larger side is beyond 50 and, except in the svd parametrization, the
    update is below 10 % of its bound. Waits for the device.
    """
    if free.out.dtype != torch.float64:
        free = free.map(Tensor.float)
    out = free.out / _unit(free.rank) if parametrization == "radial" else free.out
    rows = torch.stack([out.norm(dim=-1), free.into.norm(dim=-1)])  # (2, ..., k)
    far = rows.median(-1).values.amax(0) > _FAR
    if parametrization == "svd" or not bool(far.any()):
        return far
    one = torch.ones(far.shape, dtype=free.out.dtype, device=free.out.device)
    update = bounded_update(
        free, norm=norm, radius=one, parametrization=parametrization, temperature=temperature
    )
    bounds = (
        one[..., None]
        if parametrization == "radial"
        else norm.scales(free.logits, one, free.rank, temperature)
    )
    # ||left right||_F <= ||left||_F, since ||right||_2 <= 1: no decomposition needed
    shrunk: Tensor = torch.linalg.matrix_norm(update.left) < 0.1 * torch.linalg.vector_norm(bounds, dim=-1)
    return far & shrunk


def _random(
    m: int,
    n: int,
    ratio: Tensor,
    norm: Norm,
    parametrization: Parametrization,
    generator: torch.Generator | None,
) -> FreeParameters:
    """Free parameters with random frames and the given sigma_j / s_j (..., k)."""
    *batch_shape, k = ratio.shape
    u, v = (
        random_frame(
            size,
            k,
            batch_shape=tuple(batch_shape),
            dtype=ratio.dtype,
            device=ratio.device,
            generator=generator,
        )
        for size in (m, n)
    )
    check_parametrization(parametrization, norm)
    free = _from_frames(u, ratio, v, parametrization)
    learns = parametrization != "radial" and norm.learns(k)
    return replace(free, logits=torch.zeros_like(ratio)) if learns else free


def _from_frames(u: Tensor, ratio: Tensor, v: Tensor, parametrization: Parametrization) -> FreeParameters:
    """Free parameters of u diag(s * ratio) v^T for any s; u (..., m, k), v (..., n, k), 0 <= ratio <= 1."""
    if parametrization == "svd":
        with full_precision(u):
            (free_u, signs_u), (free_v, signs_v) = inverse_tall_cayley(u), inverse_tall_cayley(v)
        return FreeParameters(
            out=free_u.mT.contiguous(),
            into=free_v.mT.contiguous(),
            angle=ratio.asin() * signs_u * signs_v / math.sqrt(u.shape[-2]),
        )
    theta = ratio.asin() / 2  # sin(2 theta) = ratio
    # flipping the sign of a column of both sides leaves the update as it is
    stacked = torch.cat([v * theta.cos()[..., None, :], u * theta.sin()[..., None, :]], dim=-2)
    with full_precision(u):
        free, _ = inverse_tall_cayley(stacked)
    n, k = v.shape[-2:]
    out = free[..., n:, :].mT
    if parametrization == "radial":
        out = out * _unit(k)
    return FreeParameters(out=out.contiguous(), into=free[..., :n, :].mT.contiguous())


def _padded(update: LowRank, k: int) -> LowRank:
    """The same update with zero columns up to k, so that its SVD has k singular vectors."""
    missing = k - update.rank
    if missing <= 0:
        return update
    return LowRank(
        torch.nn.functional.pad(update.left, (0, missing)),
        torch.nn.functional.pad(update.right, (0, 0, 0, missing)),
    )
