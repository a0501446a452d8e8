"""Norms of updates, bounds on them, and projections (MATH.md §4).

A unitarily invariant norm of a matrix is a symmetric gauge function of its singular values (its
*spectrum*). Each `Norm` here knows that function, how free logits become explicit bounds s_j on the
singular values that keep the norm under a radius, the way back, and the projection of a spectrum onto
the ball. Everything is pure and batched over leading axes; the last axis is the spectrum.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

_BISECTIONS = 100  # halvings; float64 is exhausted after about 60
_STEPS = 200  # of methods that need a tenth
_EPS = 4 * torch.finfo(torch.float64).eps


class Norm(ABC):
    """A symmetric gauge function of the singular values, and the bounds that it implies."""

    learnable: ClassVar[bool]
    """Whether the bounds s_j depend on logits that training moves."""

    def learns(self, rank: int) -> bool:
        """Whether there is anything to learn: the bound of a single singular value is the radius."""
        return self.learnable and rank > 1

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `parse_norm` understands, where it has one."""

    @abstractmethod
    def value(self, spectrum: Tensor) -> Tensor:
        """The norm (...,) of singular values (..., k), k >= 1, all >= 0, in any order."""

    @abstractmethod
    def scales(self, logits: Tensor | None, radius: Tensor, rank: int, temperature: float = 1.0) -> Tensor:
        """Explicit bounds s (..., rank) with value(s) <= radius (...,).

        Args:
            logits: (..., rank), any real values; ignored (and may be None) unless `learns(rank)`.
            radius: (...,) the radius of the ball, >= 0.
            rank: number of singular values.
            temperature: eta > 0; the larger, the slower bounds move with the logits.
        """

    @abstractmethod
    def project(self, spectrum: Tensor, radius: Tensor) -> Tensor:
        """The nearest spectrum (..., k), in Euclidean distance, whose norm is at most radius (...,)."""

    def logits_containing(self, spectrum: Tensor, radius: Tensor, temperature: float = 1.0) -> Tensor | None:
        """Logits (..., k) whose bounds contain a spectrum of norm <= radius; None unless `learns(k)`.

        What the spectrum leaves of the radius is spread evenly: s = spectrum + t with value(s) =
        radius, so that singular values that are zero can grow.
        """
        if not self.learns(spectrum.shape[-1]):
            return None
        unit = spectrum / _safe(radius)[..., None]
        low = torch.zeros_like(radius)
        high = torch.ones_like(radius)  # value(t * 1) >= t for a gauge with value(e_j) >= 1
        while bool((outside := self.value(unit + high[..., None]) < 1).any()):
            high = torch.where(outside, 2 * high, high)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            inside = self.value(unit + middle[..., None]) <= 1
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        shares = (unit + low[..., None]).clamp(min=torch.finfo(spectrum.dtype).eps)
        return self._logits(shares, temperature)

    def _logits(self, shares: Tensor, temperature: float) -> Tensor:
        """Logits whose scales are radius * shares, for shares of norm 1."""
        return temperature * shares.log()


@dataclass(frozen=True)
class Spectral(Norm):
    """The largest singular value: every s_j is the radius, nothing is learned."""

    learnable: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "spectral"

    def value(self, spectrum: Tensor) -> Tensor:
        return spectrum.amax(-1)

    def scales(self, logits: Tensor | None, radius: Tensor, rank: int, temperature: float = 1.0) -> Tensor:
        return radius[..., None].expand(*radius.shape, rank)

    def project(self, spectrum: Tensor, radius: Tensor) -> Tensor:
        return torch.minimum(spectrum, radius[..., None])


@dataclass(frozen=True)
class Schatten(Norm):
    """(sum_j sigma_j^p)^(1/p), 1 <= p < infinity: nuclear for p = 1, Frobenius for p = 2."""

    p: float
    learnable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not 1 <= self.p < math.inf:
            raise ValueError(f"p of a Schatten norm must be in [1, inf), got p={self.p!r}")
        object.__setattr__(self, "p", float(self.p))  # also of NumPy's numbers

    @property
    def name(self) -> str:
        return {1.0: "nuclear", 2.0: "frobenius"}.get(self.p, f"schatten-{self.p!r}".removesuffix(".0"))

    def value(self, spectrum: Tensor) -> Tensor:
        largest = spectrum.amax(-1, keepdim=True)
        shares = spectrum / _safe(largest)  # powers of numbers <= 1 never overflow
        return largest[..., 0] * (shares**self.p).sum(-1) ** (1 / self.p)

    def scales(self, logits: Tensor | None, radius: Tensor, rank: int, temperature: float = 1.0) -> Tensor:
        logits = _required(logits, self, radius, rank)
        # not softmax ** (1 / p), whose gradient is NaN where the softmax underflows
        return radius[..., None] * (torch.log_softmax(logits / temperature, -1) / self.p).exp()

    def _logits(self, shares: Tensor, temperature: float) -> Tensor:
        return self.p * temperature * shares.log()

    def project(self, spectrum: Tensor, radius: Tensor) -> Tensor:
        if self.p == 2:
            shrink = (radius / _safe(torch.linalg.vector_norm(spectrum, dim=-1))).clamp(max=1)
            return spectrum * shrink[..., None]
        if self.p == 1:
            descending = spectrum.sort(-1, descending=True).values
            count = torch.arange(1, spectrum.shape[-1] + 1, device=spectrum.device)
            level = (descending.cumsum(-1) - radius[..., None]) / count
            # the largest level is the soft threshold; a negative one means inside the ball
            projected = (spectrum - level.amax(-1, keepdim=True).clamp(min=0)).clamp(min=0)
            # the difference of large numbers may have left the ball by rounding
            return projected * (radius / _safe(self.value(projected))).clamp(max=1)[..., None]
        return self._project_by_multiplier(spectrum, radius)

    def _project_by_multiplier(self, spectrum: Tensor, radius: Tensor) -> Tensor:
        """Solve x + weight * x^(p-1) = spectrum for the weight at which x reaches the ball."""
        unit = (spectrum / _safe(radius)[..., None]).double()

        def excess(log_weight: Tensor) -> Tensor:
            return self.value(self._shrunk(unit, log_weight.exp()[..., None])).log()

        low = torch.full_like(unit[..., 0], -80.0)
        high = torch.zeros_like(low)
        while bool((outside := excess(high) > 0).any()):
            high = torch.where(outside, high + 10, high)
        log_weight = _root(excess, low, high)
        return _inside(self, spectrum, self._shrunk(unit, log_weight.exp()[..., None]), radius)

    def _shrunk(self, unit: Tensor, weight: Tensor) -> Tensor:
        """x (..., k) with x + weight * x^(p-1) = unit, by Newton's method.

        For p < 2 it is y^(1 / (p-1)) + weight * y = unit for y = x^(p-1), so that the left side is convex in
        any case and the steps, which come from the right, never overshoot.
        """
        power = self.p - 1 if self.p >= 2 else 1 / (self.p - 1)
        one, other = (torch.ones_like(weight), weight) if self.p >= 2 else (weight, torch.ones_like(weight))
        # one * y + other * y^power = unit
        y = torch.minimum(unit / one, (unit / other) ** (1 / power))
        for _ in range(_STEPS):
            slope = one + other * power * y ** (power - 1)
            new = (y - (one * y + other * y**power - unit) / slope).clamp(min=0)
            done = bool(((y - new).abs() <= _EPS * y).all())
            y = new
            if done:
                break
        return y if self.p >= 2 else y**power


class _GaugeScaled(Norm):
    """A gauge without a closed form for its bounds: s = radius * u / value(u) with u = exp(logits)."""

    learnable: ClassVar[bool] = True

    def scales(self, logits: Tensor | None, radius: Tensor, rank: int, temperature: float = 1.0) -> Tensor:
        logits = _required(logits, self, radius, rank) / temperature
        # value(c u) = c value(u): shifting the logits changes nothing but keeps exp() finite
        u = (logits - logits.amax(-1, keepdim=True).detach()).exp()
        return radius[..., None] * u / self.value(u)[..., None]


@dataclass(frozen=True)
class KyFan(_GaugeScaled):
    """The sum of the q largest singular values (of all of them, where there are fewer)."""

    q: int

    def __post_init__(self) -> None:
        if isinstance(self.q, bool) or not isinstance(self.q, int) or self.q < 1:
            raise ValueError(f"q of a Ky Fan norm must be an integer >= 1, got q={self.q!r}")

    @property
    def name(self) -> str:
        return f"ky-fan-{self.q}"

    def value(self, spectrum: Tensor) -> Tensor:
        return spectrum.topk(min(self.q, spectrum.shape[-1]), dim=-1).values.sum(-1)

    def project(self, spectrum: Tensor, radius: Tensor) -> Tensor:
        # Optimality: x_j = spectrum_j - multiplier * w_j with weights w_j in [0, 1] that sum to q,
        # 1 above a level, 0 below and anything on it: x = max(spectrum - multiplier, min(spectrum,
        # level)). The level is found for a multiplier, and the multiplier for the radius.
        unit = (spectrum / _safe(radius)[..., None]).double()
        q = min(self.q, spectrum.shape[-1])
        ascending = unit.sort(-1).values
        above = ascending.flip(-1).cumsum(-1).flip(-1)  # sum of a value and all larger ones

        def shrunk(multiplier: Tensor) -> Tensor:
            level = _level(ascending, above, multiplier, q)
            return torch.maximum(unit - multiplier[..., None], torch.minimum(unit, level[..., None]))

        low, high = torch.zeros_like(unit[..., 0]), unit.sum(-1)
        multiplier = _root(lambda multiplier: self.value(shrunk(multiplier)) - 1, low, high)
        return _inside(self, spectrum, shrunk(multiplier), radius)


def _level(ascending: Tensor, above: Tensor, multiplier: Tensor, q: int) -> Tensor:
    """The level (...,) >= 0 with sum_j clamp(x_j - level, 0, multiplier) = q * multiplier, or 0.

    The sum falls with the level, and is linear between the levels x_j and x_j - multiplier.

    Args:
        ascending: (..., k) x, sorted.
        above: (..., k) sums of x_j and all larger ones.
        multiplier: (...,).
    """
    k = ascending.shape[-1]

    def over(levels: Tensor) -> Tensor:
        """sum_j max(x_j - level, 0) for levels (..., c)."""
        place = torch.searchsorted(ascending, levels, right=True)
        sums = torch.gather(above, -1, place.clamp(max=k - 1))
        return torch.where(place < k, sums - (k - place) * levels, 0.0)

    shift = multiplier[..., None]
    levels = torch.cat([ascending, (ascending - shift).clamp(min=0)], dim=-1).sort(-1).values.contiguous()
    sums = over(levels) - over(levels + shift)  # descending
    target = q * multiplier
    last = (sums >= target[..., None]).sum(-1, keepdim=True).clamp(1, 2 * k - 1)  # of the interval
    (at, below), (sum_at, sum_below) = (
        (torch.gather(each, -1, last - 1)[..., 0], torch.gather(each, -1, last)[..., 0])
        for each in (levels, sums)
    )
    share = (sum_at - target) / _safe(sum_at - sum_below)
    return torch.where(sums[..., 0] >= target, at + share.clamp(0, 1) * (below - at), 0.0)


@dataclass(frozen=True)
class Gauge(_GaugeScaled):
    """Any symmetric gauge function: a norm on R^k that ignores signs and the order of entries.

    Args:
        function: maps (..., k) >= 0 to (...,); must be positively homogeneous, convex, symmetric in
            its entries and written in differentiable torch operations. Homogeneity and symmetry are
            checked on examples, convexity is the caller's promise.
        label: how reports name it.
    """

    function: Callable[[Tensor], Tensor]
    label: str = "gauge"

    def __post_init__(self) -> None:
        probe = torch.tensor([[0.3, 1.7, 0.9], [2.0, 0.0, 0.4]], dtype=torch.float64)
        result = self.function(probe)
        if result.shape != (2,) or not bool((result > 0).all()):
            raise ValueError(
                "a gauge function must map (..., k) to (...,) and be positive away from zero, "
                f"got shape {tuple(result.shape)} and values {result.tolist()} for an input of shape (2, 3)"
            )
        for changed, expected, rule in (
            (3 * probe, 3 * result, "positively homogeneous, f(c x) = c f(x)"),
            (probe.flip(-1), result, "symmetric in its entries"),
        ):
            if not torch.allclose(self.function(changed), expected, rtol=1e-6):
                raise ValueError(
                    f"a gauge function must be {rule}, got {self.function(changed).tolist()} "
                    f"where {expected.tolist()} was due"
                )

    @property
    def name(self) -> str:
        return self.label

    def value(self, spectrum: Tensor) -> Tensor:
        return self.function(spectrum)

    def project(self, spectrum: Tensor, radius: Tensor) -> Tensor:
        """Cutting planes with SciPy's non-negative least squares, one spectrum at a time.

        Raises:
            ImportError: if SciPy is missing.
        """
        rows = spectrum.detach().reshape(-1, spectrum.shape[-1]).double().cpu()
        radii = radius.detach().expand(spectrum.shape[:-1]).reshape(-1).double().cpu()
        projected = torch.stack([self._project_one(row, r) for row, r in zip(rows, radii)])
        return projected.reshape(spectrum.shape).to(spectrum)

    @torch.enable_grad()
    def _project_one(self, spectrum: Tensor, radius: Tensor) -> Tensor:
        if self.value(spectrum) <= radius:
            return spectrum
        if radius == 0:
            return torch.zeros_like(spectrum)
        try:
            from scipy.optimize import nnls
        except ImportError as error:
            raise ImportError(
                "projecting onto the ball of a user-defined gauge needs SciPy: pip install scipy"
            ) from error
        # The ball is the set where every subgradient g satisfies <g, x> <= radius. Collect the
        # violated ones; the nearest point of the polyhedron is Lawson and Hanson's least-distance
        # problem (Solving Least Squares Problems, ch. 23), one non-negative least squares.
        unit = spectrum / radius
        far = torch.linalg.vector_norm(unit)  # the distance in which the problem is well scaled
        inside = 1 + 1e-12 + 256 * torch.finfo(torch.float64).eps * far.item()
        positive = -torch.eye(len(unit), dtype=torch.float64)  # <-e_j, x> <= 0
        cuts: list[Tensor] = []
        x = unit
        for _ in range(1000):
            point = x.clone().requires_grad_()
            value = self.value(point)
            if value.item() <= inside:
                break
            cuts.append(torch.autograd.grad(value, point)[0])
            planes = torch.cat([torch.stack(cuts), positive])  # (c, k)
            violation = planes @ unit  # (c,)
            violation[: len(cuts)] -= 1
            system = torch.cat([-planes.mT, violation[None] / far])  # (k + 1, c)
            target = torch.zeros(len(system), dtype=torch.float64)
            target[-1] = 1
            weights, _ = nnls(system.numpy(), target.numpy())
            residual = system @ torch.as_tensor(weights) - target
            x = (unit - far * residual[:-1] / residual[-1]).clamp(min=0)
        return x * radius / self.value(x).clamp(min=1)


@dataclass(frozen=True)
class Profile(Norm):
    """One explicit bound for each singular value: the j-th largest is at most radius * bounds[j].

    Not a norm (the set is not convex), but a bound like the others: `value` is the largest ratio of
    a singular value to its bound. Where there are fewer singular values than bounds, the largest
    bounds apply.
    """

    bounds: tuple[float, ...]
    learnable: ClassVar[bool] = False

    def __init__(self, bounds: Sequence[float]) -> None:
        ordered = tuple(sorted((float(b) for b in bounds), reverse=True))
        if not ordered or not all(0 <= b < math.inf for b in ordered):
            raise ValueError(
                f"a profile must list bounds that are finite and not negative, got {list(bounds)!r}"
            )
        object.__setattr__(self, "bounds", ordered)

    @property
    def name(self) -> str:
        return "profile"

    def _bounds(self, like: Tensor, count: int) -> Tensor:
        return torch.tensor(self.bounds[:count], dtype=like.dtype, device=like.device)

    def value(self, spectrum: Tensor) -> Tensor:
        descending = spectrum.sort(-1, descending=True).values
        count = min(len(self.bounds), spectrum.shape[-1])
        bounds = torch.zeros_like(descending)
        bounds[..., :count] = self._bounds(spectrum, count)
        ratio = torch.where(descending > 0, descending / bounds, torch.zeros_like(descending))
        return ratio.amax(-1)

    def scales(self, logits: Tensor | None, radius: Tensor, rank: int, temperature: float = 1.0) -> Tensor:
        if rank > len(self.bounds):
            raise ValueError(
                f"a profile must list a bound for each of the {rank} singular values, got {len(self.bounds)}"
            )
        return radius[..., None] * self._bounds(radius, rank)

    def project(self, spectrum: Tensor, radius: Tensor) -> Tensor:
        descending, order = spectrum.sort(-1, descending=True)
        count = min(len(self.bounds), spectrum.shape[-1])
        bounds = torch.zeros_like(descending)
        bounds[..., :count] = radius[..., None] * self._bounds(spectrum, count)
        clipped = torch.minimum(descending, bounds)
        return torch.empty_like(spectrum).scatter_(-1, order, clipped)


def _root(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where a falling function (...,) of (...,) is zero: regula falsi (Illinois), bisected where it is slow.

    Args:
        low: where it is positive, or the result.
        high: where it is not.
    """
    at_low, at_high = function(low), function(high)
    high = torch.where(at_low > 0, high, low)
    moved = torch.zeros_like(low)  # 1 if the low end was the last to move, -1 if the high end
    width = high - low
    slow = torch.zeros_like(low, dtype=torch.bool)
    for step in range(1, _STEPS + 1):
        middle = (high * at_low - low * at_high) / _safe(at_low - at_high)
        outside = ~((middle > low) & (middle < high))
        middle = torch.where(outside | slow, (low + high) / 2, middle)
        value = function(middle)
        exact = value.abs() <= _EPS
        positive = value > 0
        # an end that stays for the second time counts half, so that it moves soon
        at_high = torch.where(positive, torch.where(moved > 0, at_high / 2, at_high), value)
        at_low = torch.where(positive, value, torch.where(moved < 0, at_low / 2, at_low))
        low, high = torch.where(positive, middle, low), torch.where(positive, high, middle)
        low, high = torch.where(exact, middle, low), torch.where(exact, middle, high)
        moved = torch.where(positive, 1.0, -1.0).to(low)
        if bool((high - low <= _EPS * torch.maximum(low.abs(), high.abs())).all()):
            break
        slow = torch.zeros_like(slow)
        if step % 4 == 0:
            slow, width = high - low > width / 4, high - low
    return high


def _inside(norm: Norm, spectrum: Tensor, projected: Tensor, radius: Tensor) -> Tensor:
    """What lies in the ball stays; what rounding has left outside of the projected is scaled back.

    Args:
        spectrum: (..., k).
        projected: (..., k), in units of the radius.
        radius: (...,).
    """
    found = (projected / norm.value(projected).clamp(min=1)[..., None]).to(spectrum.dtype) * radius[..., None]
    return torch.where((norm.value(spectrum) <= radius)[..., None], spectrum, found)


def _safe(divisor: Tensor) -> Tensor:
    """The divisor, with 1 in place of 0: for quotients whose numerator is 0 there too."""
    return torch.where(divisor > 0, divisor, 1.0)


def _required(logits: Tensor | None, norm: Norm, radius: Tensor, rank: int) -> Tensor:
    if logits is None and rank == 1:
        return torch.zeros_like(radius)[..., None]
    if logits is None:
        raise ValueError(f"the {norm.name} norm has learnable bounds and needs logits, got None")
    return logits


_NAMED: dict[str, Norm] = {
    "spectral": Spectral(),
    "frobenius": Schatten(2.0),
    "nuclear": Schatten(1.0),
}


def parse_norm(norm: str | float | Norm) -> Norm:
    """The `Norm` that a name or number stands for.

    Args:
        norm: "spectral", "frobenius", "nuclear", "ky-fan-q" with q an integer >= 1, a number p >= 1
            for the Schatten-p norm (infinity is the spectral norm), or a `Norm`, which is returned.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(norm, Norm):
        return norm
    if isinstance(norm, str):
        if norm in _NAMED:
            return _NAMED[norm]
        if match := re.fullmatch(r"ky-fan-([1-9]\d*)", norm):
            return KyFan(int(match[1]))
        if match := re.fullmatch(r"schatten-(\d[\d.e+]*)", norm):  # what `Schatten.name` gives
            with suppress(ValueError):
                return Schatten(float(match[1]))
    if isinstance(norm, (int, float)) and not isinstance(norm, bool) and norm >= 1:
        return Spectral() if norm == math.inf else Schatten(float(norm))
    raise ValueError(
        'norm must be "spectral", "frobenius", "nuclear", "ky-fan-q" with an integer q >= 1, '
        f"or a number p >= 1, got norm={norm!r}"
    )
