"""A matrix of rank k in a norm ball that fits observed entries (MATH.md §8).

The model is X + biases, X = D_r^-1/2 Y D_c^-1/2 with Y in the ball (D = I unless weighted), and the fit
minimises half the squared error at the observed entries plus a ridge on the biases. Three solvers work
together:

1. Alternating ridge regressions, each row's (and then each column's) by a few steps of conjugate gradients.
   They find the solution for a multiplier: half the squared error + multiplier * ||Y||_nuclear, which is the
   solution in the nuclear ball that Y touches. They need a tenth of the passes over the entries of gradient
   methods, but know of no bound.
2. L-BFGS in the free parameters of the bounded parametrization, which start at that solution through the
   inverse map of MATH.md §1-2. Any norm, and every iterate keeps the bound.
3. Projected gradients for the rest. Free parameters are badly scaled where singular values are at their
   bounds (gradients vanish) or far below them; a projection knows no such place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nblora.bounds import Norm, Schatten, Spectral
from nblora.completion.entries import Entries, HalfSquares, squares
from nblora.lowrank import LowRank
from nblora.parametrizations import FreeParameters, Parametrization, bounded_update, pull_back

GRADIENT_STEPS = 2  # of conjugate gradients in each half of a sweep
CHUNK = 10  # iterations of L-BFGS, or steps of projected gradients, between two looks at their progress
MEMORY = 10  # losses above whose largest a step may not rise
SUFFICIENT = 1e-4  # share of the decrease that the gradient promises with which a step is content
FARTHEST = 1e3  # times the usual step, or one over that
BACKTRACKS = 20
HISTORY = 20, 8  # pairs that L-BFGS keeps, for small problems and for large ones
LARGE = 100_000  # free parameters
# Share of the ball that the start of L-BFGS fills at most. On the sphere gradients vanish, and what is
# zero has no room to grow; but where sweeps have solved the very problem, nothing has to.
SATURATION, SOLVED = 0.95, 0.9999
ROOMY = 4.0  # times the norm that Y has without it: a larger bound changes nothing and rounds worse
DEAD = 1e-3  # share of the largest singular value below which one is started afresh
# Share of the variance beside biases alone in that beside Y and biases, so that a model with as many numbers
# as there are entries does not talk itself into less and less noise.
FIRST_GUESS = 0.005
FREE_BIAS, NO_BIAS = 1e-6, 1e8  # the least and the largest ridge on biases
# Times the tolerance: sweeps this slow leave the rest to L-BFGS, where the bound does not act.
HANDOVER = 30.0
SHORTEST = 1e-3  # step of a multiplier's logarithm that is still one
WORTHWHILE = 0.02  # fall of a multiplier's logarithm after which dead directions may have something to do
SMALLEST_MULTIPLIER = 1e-6  # relative to the one at which Y is zero


@dataclass(frozen=True)
class Weights:
    """D_r^-1/2 (m,) and D_c^-1/2 (n,)."""

    row: Tensor
    column: Tensor

    @property
    def mT(self) -> Weights:
        """Of the transposed matrix."""
        return Weights(self.column, self.row)

    @staticmethod
    def ones(entries: Entries) -> Weights:
        m, n = entries.shape
        return Weights(entries.values.new_ones(m), entries.values.new_ones(n))

    @staticmethod
    def by_popularity(entries: Entries) -> Weights:
        """D = entries of the row (or column) over their mean; an empty one counts as one entry."""

        def one(counts: Tensor) -> Tensor:
            return (counts.clamp(min=1) / counts.mean()).rsqrt()

        return Weights(one(entries.row_counts), one(entries.mT.row_counts))


def ridge_on_bias(noise: float, spread: float) -> float:
    """The variance of an entry beside its biases over that of the biases, within what makes a difference."""
    return min(max(noise / spread, FREE_BIAS), NO_BIAS) if spread > 0 else NO_BIAS


class Ridge(NamedTuple):
    """On row and column biases, in units of the squared error.

    Attributes:
        row, column: variance of an entry beside Y and its biases, over that of the biases.
        noise: the first of these variances.
        alone: the variance of an entry beside biases alone; more noise is not believed.
        fitted: whether they are what a fit of Y and the biases tells, and not what biases alone do.
    """

    row: float
    column: float
    noise: float
    alone: float
    fitted: bool = False

    def refitted(self, entries: Entries, model: Model, noise: float) -> Ridge:
        """One step of expectation maximisation from a model that was fitted with this ridge.

        The variance of biases is the mean of their squares and of what is uncertain about them, so that
        biases that Y explains as well fade.

        Args:
            noise: the variance of an entry that the model leaves.
        """

        def one(ridge: float, bias: Tensor, counts: Tensor) -> float:
            if ridge >= NO_BIAS:
                return ridge
            variances = bias.double().square() + self.noise / (counts.double() + ridge)
            spread = variances[counts > 0].mean().item()
            return ridge_on_bias(noise, spread) if spread > 0 else ridge

        if not self.alone > 0:  # nothing told a mean from an entry, or means explain all
            return self._replace(fitted=True)
        noise = min(noise, self.alone)
        return Ridge(
            one(self.row, model.row_bias, entries.row_counts),
            one(self.column, model.column_bias, entries.mT.row_counts),
            noise,
            self.alone,
            fitted=True,
        )

    def scaled(self, unit: float) -> Ridge:
        """With variances in another unit."""
        return self._replace(noise=self.noise * unit, alone=self.alone * unit)

    @property
    def mT(self) -> Ridge:
        """Of the transposed matrix."""
        return self._replace(row=self.column, column=self.row)


@dataclass(frozen=True)
class Model:
    """Y = left @ right.T with balanced factors, and biases.

    Attributes:
        left: (m, k) and right: (n, k), U sqrt(sigma) and V sqrt(sigma) of the decomposition of Y.
        sigma: (k,) singular values of Y, descending.
        row_bias: (m,), column_bias: (n,), offset: ().
    """

    left: Tensor
    right: Tensor
    sigma: Tensor
    row_bias: Tensor
    column_bias: Tensor
    offset: Tensor

    @staticmethod
    def zero(entries: Entries, k: int, *, centred: bool) -> Model:
        """No update, and the mean of the values as offset where there are biases."""
        m, n = entries.shape
        zeros = entries.values.new_zeros
        offset = entries.values.mean() if centred else zeros(())
        return Model(zeros(m, k), zeros(n, k), zeros(k), zeros(m), zeros(n), offset)

    @staticmethod
    def balanced(update: LowRank, row_bias: Tensor, column_bias: Tensor, offset: Tensor) -> Model:
        """From any factors of Y."""
        u, sigma, v = update.svd()
        root = sigma.sqrt()
        return Model(u * root, v * root, sigma, row_bias, column_bias, offset)

    @property
    def mT(self) -> Model:
        """Of the transposed matrix."""
        return Model(self.right, self.left, self.sigma, self.column_bias, self.row_bias, self.offset)

    def truncated(self, k: int) -> Model:
        """With the k largest singular values."""
        return replace(self, left=self.left[:, :k], right=self.right[:, :k], sigma=self.sigma[:k])

    def with_spectrum(self, sigma: Tensor) -> Model:
        """The same singular vectors, other singular values."""
        old = self.sigma.sqrt()
        ratio = torch.where(old > 0, sigma.sqrt() / torch.where(old > 0, old, 1.0), 0.0)
        return replace(self, left=self.left * ratio, right=self.right * ratio, sigma=sigma)

    def factors(self, weights: Weights, *, biases: bool) -> tuple[Tensor, Tensor]:
        """left (m, d) and right (n, d), whose product is the model; d = k + 2 with biases."""
        return (
            _widened(
                self.left * weights.row[:, None], self.row_bias + self.offset if biases else None, last=True
            ),
            _widened(self.right * weights.column[:, None], self.column_bias if biases else None, last=False),
        )


def _widened(side: Tensor, bias: Tensor | None, last: bool) -> Tensor:
    """[side, bias, 1] for the one side and [side, 1, bias] for the other, whose product adds both biases."""
    if bias is None:
        return side
    ones = torch.ones_like(bias)
    return torch.cat([side, torch.stack([bias, ones] if last else [ones, bias], dim=1)], dim=1)


@dataclass(frozen=True)
class Problem:
    """What is fitted.

    Attributes:
        entries: observed entries.
        k: rank, at most min(m, n).
        norm: of Y.
        parametrization: of Y.
        weights: D.
        ridge: on biases; None for none, not even an offset.
        max_iter: sweeps, and iterations of L-BFGS, at most so many each.
        tol: a solver stops where an iteration improves the squared error by less than this share of it.
        size: about the norm that Y will have; see `sweep`.
    """

    entries: Entries
    k: int
    norm: Norm
    parametrization: Parametrization
    weights: Weights
    ridge: Ridge | None
    max_iter: int
    tol: float
    size: float = 1.0

    def learned(self, model: Model, noise: float) -> Problem:
        """With the ridge on biases that a model, and the variance that it leaves, suggest."""
        if self.ridge is None:
            return self
        return replace(self, ridge=self.ridge.refitted(self.entries, model, noise))


class Watch:
    """Counts the passes over the entries, collects the learning curve, and reports progress.

    Attributes:
        iterations: sweeps and iterations of L-BFGS.
        evaluations: passes over the entries; evaluating the squared error with its gradient is one, a step of
            conjugate gradients also.
        curve: half the squared error with the biases' ridge per entry, after each sweep and each iteration of
            L-BFGS that was looked at.
    """

    def __init__(self, report: Callable[[float], None] | None = None) -> None:
        self.iterations = 0
        self.evaluations = 0
        self.curve: list[float] = []
        self.report = report

    def passed(self, loss: float) -> None:
        self.curve.append(loss)
        if self.report is not None:
            self.report(loss)


# --- alternating ridge regressions -----------------------------------------------------------------


def spectral_start(problem: Problem, watch: Watch) -> Model:
    """The leading part of the data with zeros for what is missing, over the rate of observed entries."""
    return refreshed(
        problem, Model.zero(problem.entries, problem.k, centred=problem.ridge is not None), 0.0, watch
    )


@torch.no_grad()
def refreshed(problem: Problem, model: Model, multiplier: float, watch: Watch) -> Model:
    """The model with the leading directions of its residual in place of those that have died.

    A singular value that a large multiplier has made zero would stay there in sweeps and in gradients, also
    where a smaller multiplier gives it something to do: the residual has a singular value above that one
    then.
    """
    entries, weights, k = problem.entries, problem.weights, problem.k
    m, n = entries.shape
    alive = model.sigma > DEAD * model.sigma[0]
    missing = k - int(alive.sum())
    if missing == 0:
        return model
    left, right, sigma = model.left[:, alive], model.right[:, alive], model.sigma[alive]
    u, v = left / sigma.sqrt(), right / sigma.sqrt()
    factors = model.factors(weights, biases=problem.ridge is not None)
    residual = -entries.products(*factors, less_values=True)
    generator = torch.Generator().manual_seed(0)  # only the directions that the iteration starts in
    wide = min(missing + 5, m, n)  # a few more than asked for, so that the leading ones converge
    v_new = torch.randn(n, wide, generator=generator).to(residual)
    for _ in range(3):
        v_new = torch.linalg.qr(v_new - v @ (v.mT @ v_new)).Q
        u_new = weights.row[:, None] * entries.times_right(residual, weights.column[:, None] * v_new)
        u_new = torch.linalg.qr(u_new - u @ (u.mT @ u_new)).Q
        v_new = weights.column[:, None] * entries.transposed_times_left(
            residual, weights.row[:, None] * u_new
        )
        watch.evaluations += 1
    found = LowRank(u_new, v_new.mT).svd()
    rate = len(entries) / (m * n)
    grown = ((found.sigma[:missing] - multiplier) / rate).clamp(min=0)
    if _exponent(problem.norm) == 1 and not bool((grown > 0).any()):
        return model  # as optimal as the sweeps have made it
    floor = 2 * DEAD * torch.cat([sigma, grown]).amax()  # a little of each, so that none is dead at once
    grown = grown.clamp(min=floor)
    root = grown.sqrt()
    sigma, order = torch.cat([sigma, grown]).sort(descending=True)
    return replace(
        model,
        left=torch.cat([left, found.u[:, :missing] * root], dim=1)[:, order],
        right=torch.cat([right, found.v[:, :missing] * root], dim=1)[:, order],
        sigma=sigma,
    )


def solves(norm: Norm) -> bool:
    """Whether sweeps know the norm; for another one they take the nuclear norm and are only a start.

    Weights sigma^(p-1) are found sweep by sweep, which does not converge for large p.
    """
    return isinstance(norm, Schatten) and norm.p <= 2


def largest_multiplier(problem: Problem, start: Model) -> float:
    """The multiplier from which on Y is zero: the dual norm of the weighted data less their mean.

    Args:
        start: `spectral_start` of the problem, of which the k leading singular values are taken.
    """
    m, n = problem.entries.shape
    dual: Norm = Spectral()  # of the nuclear norm
    p = _exponent(problem.norm)
    if p > 1:
        dual = Schatten(p / (p - 1))
    return dual.value(start.sigma).item() * len(problem.entries) / (m * n)


def _exponent(norm: Norm) -> float:
    """p of the Schatten norm that sweeps take for it."""
    return norm.p if isinstance(norm, Schatten) and solves(norm) else 1.0


def _pull(problem: Problem, sigma: Tensor) -> Tensor:
    """(k,) what a multiplier of 1 pulls each singular value with: see `sweep`."""
    p = _exponent(problem.norm)
    if p == 1:
        return torch.ones_like(sigma)
    pull: Tensor = (sigma / problem.size).clamp(max=1e3) ** (p - 1)
    return pull.clamp(min=1e-6)  # a little, so that no regression is singular


def ridge_on(problem: Problem, model: Model, less: Model | None = None) -> float:
    """What the ridge adds to the squared error, 0 without biases; or of the difference to another model."""
    if problem.ridge is None:
        return 0.0
    total = 0.0
    for ridge, name in zip(problem.ridge, ("row_bias", "column_bias")):
        bias = getattr(model, name)
        if less is not None:
            bias = bias - getattr(less, name)
        total += ridge * bias.square().sum(dtype=torch.float64).item()
    return total


@torch.no_grad()
def sweep(problem: Problem, model: Model, multiplier: float, watch: Watch) -> Model:
    """Ridge regressions of all rows and then of all columns, X and biases together.

    What is minimised beside the squared error is multiplier * sum_j sigma_j^p / (p size^(p-1)), whose
    gradient is that of multiplier * norm(Y) where the norm is `size`. With balanced factors the ridge sum_j
    w_j (||left_j||^2 + ||right_j||^2) / 2 has that gradient for w_j = multiplier * (sigma_j / size)^(p-1).
    """
    error = ridge_on(problem, model)
    model, squared = _half(problem, problem.entries, model, multiplier)
    # the columns' half is the rows' half of the transposed
    ridge = None if problem.ridge is None else problem.ridge.mT
    flipped = replace(problem, weights=problem.weights.mT, ridge=ridge)
    model = _half(flipped, problem.entries.mT, model.mT, multiplier)[0].mT
    watch.iterations += 1
    watch.evaluations += 2 * (1 + GRADIENT_STEPS)
    watch.passed((error + squared) / 2 / len(problem.entries))
    return model


def _half(problem: Problem, entries: Entries, model: Model, multiplier: float) -> tuple[Model, float]:
    """The regressions of the rows, and the squared error before."""
    weights = problem.weights
    pull = multiplier * _pull(problem, model.sigma)
    side = _Side(
        entries,
        pull / weights.row.square()[:, None],
        None if problem.ridge is None else problem.ridge.row,
    )
    left, row_bias, offset, squared = side.improved(
        model.left * weights.row[:, None],
        model.row_bias,
        model.right * weights.column[:, None],
        model.column_bias,
        model.offset,
    )
    update = LowRank(left / weights.row[:, None], model.right.mT)
    return Model.balanced(update, row_bias, model.column_bias, offset), squared


class _Side(NamedTuple):
    """The regressions of all rows: entries (m, n), ridge (m, k) on the factors and a number on the bias."""

    entries: Entries
    ridge: Tensor
    ridge_on_bias: float | None

    def improved(
        self, left: Tensor, row_bias: Tensor, right: Tensor, column_bias: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """Better left, row_bias and offset for a given right and column_bias, and the squared error before.

        Conjugate gradients for every row at once; each step is one pass over the entries.
        """
        entries, k = self.entries, left.shape[1]
        if self.ridge_on_bias is None:
            unknown, design, penalty = left, right, self.ridge
            residual = entries.products(left, right, less_values=True)
        else:
            unknown = torch.cat([left, row_bias[:, None]], dim=1)
            design = torch.cat([right, torch.ones_like(column_bias)[:, None]], dim=1)
            penalty = torch.nn.functional.pad(self.ridge, (0, 1), value=self.ridge_on_bias)
            residual = entries.products(
                _widened(left, row_bias + offset, last=True),
                _widened(right, column_bias, last=False),
                less_values=True,
            )
            shift = residual.mean()
            offset = offset - shift
            residual -= shift
        error = squares(residual).item()
        # of the curvature, the diagonal, with the average column in place of those that a row has
        average = (entries.mT.row_counts @ design.square()) / len(entries)
        diagonal = penalty + entries.row_counts[:, None] * average
        gradient = entries.times_right(residual, design) + penalty * unknown
        scaled = gradient / diagonal
        direction = -scaled
        power = (gradient * scaled).sum(1, keepdim=True)
        for step in range(GRADIENT_STEPS):
            bent = entries.times_right(entries.products(direction, design), design) + penalty * direction
            curvature = (direction * bent).sum(1, keepdim=True)
            length = torch.where(curvature > 0, power / torch.where(curvature > 0, curvature, 1.0), 0.0)
            unknown = unknown + length * direction
            if step + 1 < GRADIENT_STEPS:
                gradient = gradient + length * bent
                scaled = gradient / diagonal
                next_power = (gradient * scaled).sum(1, keepdim=True)
                ratio = torch.where(power > 0, next_power / torch.where(power > 0, power, 1.0), 0.0)
                direction, power = ratio * direction - scaled, next_power
        if self.ridge_on_bias is None:
            return unknown, row_bias, offset, error
        return unknown[:, :k], unknown[:, k].contiguous(), offset, error


def barely(problem: Problem, radius: float, watch: Watch) -> Model:
    """The model in a ball so small that Y changes next to nothing: biases alone, then the steepest Y."""
    model = Model.zero(problem.entries, problem.k, centred=problem.ridge is not None)
    if problem.ridge is not None:
        for _ in range(CHUNK):
            model = sweep(problem, model, 1.0, watch)
    model = refreshed(problem, model, 0.0, watch)
    return model.with_spectrum(problem.norm.project(model.sigma, model.sigma.new_tensor(radius)))


def settle(
    problem: Problem, model: Model, multiplier: float, watch: Watch, sweeps: int, *, learn: bool
) -> tuple[Problem, Model]:
    """Sweeps at one multiplier until they improve the squared error by less than the tolerance.

    Args:
        learn: whether the ridge on biases is learned on the way; of a fitted one the spread of biases alone.

    Returns:
        the problem, with the ridge on biases that was learned, and the model.
    """
    known = problem.ridge is not None and problem.ridge.fitted
    model = refreshed(problem, model, multiplier, watch)
    before = math.inf
    for _ in range(sweeps):
        model = sweep(problem, model, multiplier, watch)
        if learn and problem.ridge is not None:
            noise = problem.ridge.noise if known else _noise(problem, model, multiplier, watch)
            problem = problem.learned(model, noise)
        if not abs(before - watch.curve[-1]) > problem.tol * watch.curve[-1]:
            break
        before = watch.curve[-1]
    return problem, model


def approach(
    problem: Problem, radius: float, model: Model, multiplier: float, smallest: float, watch: Watch
) -> tuple[Problem, Model, float]:
    """Sweeps whose multiplier moves until the norm of Y is the radius, or the multiplier is as good as zero.

    Ridges on biases that are not fitted yet move with what the model leaves.

    Args:
        model: where to start; a singular value that is zero stays zero.
        multiplier: where to start.
        smallest: multiplier that counts as zero, > 0.

    Returns:
        the problem with fitted ridges, the model, whose norm may be off the radius by a little, and its
        multiplier.
    """
    learn = problem.ridge is not None and not problem.ridge.fitted
    elasticity = 3.0  # of the multiplier: how much it has to fall, in logarithms, for the norm to rise
    longest = 1.0  # step of the multiplier's logarithm; halved at each turn, so that it ends
    last: tuple[float, float] | None = None
    step = 0.0
    before = math.inf
    for _ in range(problem.max_iter):
        if step < -WORTHWHILE:
            model = refreshed(problem, model, multiplier, watch)
        model = sweep(problem, model, multiplier, watch)
        if learn:
            problem = problem.learned(model, _noise(problem, model, multiplier, watch))
        loss = watch.curve[-1]
        share = problem.norm.value(model.sigma).item() / radius
        # what a smaller multiplier could still gain, by convexity
        gain = multiplier * (radius - share * radius) / len(problem.entries)
        free = share <= 1 and (multiplier <= smallest or gain <= problem.tol * loss)
        at_bound = abs(share - 1) < 0.01 or longest < SHORTEST
        change = abs(before - loss)
        enough = problem.tol * loss
        if (at_bound and not change > enough) or (free and not change > HANDOVER * enough):
            break
        before = loss
        at = (math.log(multiplier), math.log(max(share, 1e-6)))
        if last is not None and abs(at[1] - last[1]) > 1e-4 and abs(at[0] - last[0]) > 1e-3:
            measured = -(at[0] - last[0]) / (at[1] - last[1])
            elasticity = min(max(measured, 1.0), 100.0) if measured > 0 else elasticity
        if last is not None:
            longest = longest / 2 if at[1] * last[1] < 0 else min(longest * 1.2, 1.0)
        last = at
        step = min(max(elasticity * at[1], -longest), longest)
        multiplier = max(multiplier * math.exp(step), smallest)
    return problem, model, multiplier


def _noise(problem: Problem, model: Model, multiplier: float, watch: Watch) -> float:
    """The variance of what the model leaves, with the degrees of freedom that ridges have left to it."""
    entries, ridge = problem.entries, problem.ridge
    m, n = entries.shape
    left, right = model.factors(problem.weights, biases=ridge is not None)
    squared = squares(entries.products(left, right, less_values=True)).item()
    watch.evaluations += 1
    curvature = model.sigma * (len(entries) / (m * n))  # along an entry of a balanced factor
    pull = multiplier * _pull(problem, model.sigma)
    fitted = (m + n) * (curvature / (curvature + pull)).sum().item()
    assert ridge is not None
    fitted += sum(len(entries) / (len(entries) / side + on) for side, on in zip((m, n), ridge))
    noise = residual_variance(squared, len(entries), fitted)
    return noise + FIRST_GUESS * (ridge.alone - noise)


def residual_variance(squared: float, count: int, fitted: float) -> float:
    """Of `count` entries whose squared errors sum to `squared`, after so many numbers were fitted to them."""
    return squared / max(count - fitted, count / 10)


# --- L-BFGS in the ball ----------------------------------------------------------------------------


def descend(problem: Problem, model: Model, radius: float, watch: Watch) -> Model:
    """Train the free parameters of the bounded parametrization, from a model anywhere.

    Args:
        model: where to start; its spectrum is projected onto the ball first.
        radius: of the ball, > 0.

    Returns:
        a model with Y in the ball up to the rounding of the parameters' precision.
    """
    entries, weights, norm, k = problem.entries, problem.weights, problem.norm, problem.k
    m, n = entries.shape
    size = norm.value(model.sigma).item()
    if not size > torch.finfo(entries.values.dtype).eps * math.sqrt(len(entries)):
        return model  # nothing is left for Y to explain, but rounding
    radius = min(radius, ROOMY * size)
    ball = torch.as_tensor(radius, dtype=entries.values.dtype, device=entries.values.device)
    start = model.with_spectrum(norm.project(model.sigma, (SOLVED if solves(norm) else SATURATION) * ball))
    free = pull_back(
        LowRank(start.left, start.right.mT),
        k,
        norm=norm,
        radius=ball,
        parametrization=problem.parametrization,
    )
    unit = math.sqrt(m + n)  # entries of orthonormal frames are of the size 1 / unit
    # The curvature along a moved parameter should be about one, which L-BFGS takes it for at first: a free
    # entry moves X by s_j / unit, and that is seen at the rate of observed entries.
    bounds = norm.scales(free.logits, ball, k)
    scale = unit**2 * m * n / (len(entries) * bounds.double().square().mean().item())
    ridges = (0.0, 0.0, 0.0) if problem.ridge is None else (problem.ridge.row, problem.ridge.column, 0.0)
    sizes = [  # of biases and the offset
        (scale * (len(entries) / count + ridge)) ** -0.5 for count, ridge in zip((m, n, 1), ridges)
    ]
    moved = {
        name: (tensor * unit).contiguous().requires_grad_()
        for name, tensor in vars(free).items()
        if tensor is not None
    }
    biases: list[Tensor] = []
    if problem.ridge is not None:
        biases = [
            (bias / own).clone().requires_grad_()
            for bias, own in zip((model.row_bias, model.column_bias, model.offset), sizes)
        ]

    def state() -> tuple[LowRank, Tensor, Tensor, Tensor]:
        update = bounded_update(
            FreeParameters(**{name: tensor / unit for name, tensor in moved.items()}),
            norm=norm,
            radius=ball,
            parametrization=problem.parametrization,
        )
        if not biases:
            return update, model.row_bias, model.column_bias, model.offset
        row_bias, column_bias, offset = (own * bias for bias, own in zip(biases, sizes))
        return update, row_bias, column_bias, offset

    seen: list[float] = []  # what L-BFGS returns is the loss before its steps

    def loss() -> Tensor:
        optimizer.zero_grad()
        update, row_bias, column_bias, offset = state()
        left = (update.left * weights.row[:, None]).contiguous()
        right = (update.right.mT * weights.column[:, None]).contiguous()
        if problem.ridge is None:
            objective = HalfSquares.apply(entries, left, right)
        else:
            objective = HalfSquares.apply(
                entries,
                _widened(left, row_bias + offset, last=True),
                _widened(right, column_bias, last=False),
            )
            objective = objective + problem.ridge.row / 2 * row_bias.square().sum(dtype=torch.float64)
            objective = objective + problem.ridge.column / 2 * column_bias.square().sum(dtype=torch.float64)
        scaled: Tensor = objective * scale
        scaled.backward()
        watch.evaluations += 1
        seen.append(scaled.item())
        return scaled

    parameters = [*moved.values(), *biases]
    large = sum(parameter.numel() for parameter in parameters) > LARGE
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=CHUNK,
        max_eval=100 * CHUNK,
        history_size=HISTORY[large],
        line_search_fn="strong_wolfe",
        # half its square is what a step may gain; below this it is rounding of the values' own square
        tolerance_grad=torch.finfo(entries.values.dtype).eps * math.sqrt(scale * len(entries)),
        tolerance_change=0.0,
    )
    lowest = math.inf
    for done in range(0, problem.max_iter, CHUNK):
        optimizer.param_groups[0]["max_iter"] = min(CHUNK, problem.max_iter - done)
        try:
            optimizer.step(loss)
        except RuntimeError as error:  # a line search has lost its way, where nothing is left to gain
            if "overflow" not in str(error):
                raise
            return start
        watch.iterations += optimizer.param_groups[0]["max_iter"]
        before = min(lowest, seen[0])
        lowest = min(lowest, *seen)
        seen.clear()
        watch.passed(lowest / scale / len(entries))
        if not before - lowest > CHUNK * problem.tol * lowest:
            break
    with torch.no_grad():
        update, *rest = state()
        if not all(bool(tensor.isfinite().all()) for tensor in (update.left, update.right, *rest)):
            return start  # the same
        return Model.balanced(update, *rest)


# --- projected gradients ---------------------------------------------------------------------------


@torch.no_grad()
def polish(problem: Problem, model: Model, radius: float, watch: Watch) -> Model:
    """Projected gradients from a model in the ball: what the parametrization leaves.

    Each step goes along the gradient's part in the tangent space of the matrices of rank k, which keeps
    products thin, and back to the nearest matrix of rank k in the ball: k leading singular values, projected.
    The step is Barzilai and Borwein's, and a step may rise above the last loss but not above the last few
    (Birgin, Martínez and Raydan, Nonmonotone spectral projected gradient methods, 2000). The squared error
    is quadratic, so that <step, change of gradient> is the squared change of the residual.

    Args:
        model: where to start, projected first; a singular value that is zero stays zero.
        radius: of the ball, > 0.

    Returns:
        the best model on the way.
    """
    norm = problem.norm
    ball = model.sigma.new_tensor(radius)
    model = model.truncated(max(1, int((model.sigma > 0).sum())))
    here = _Place.of(problem, model.with_spectrum(norm.project(model.sigma, ball)), watch)
    best, recent, before, done = here, [here.loss], here.loss, 0
    m, n = problem.entries.shape
    length = usual = m * n / len(problem.entries)
    # where sweeps are no help, the way is long and the steps are small
    worthwhile = problem.tol * (CHUNK if solves(norm) else 1)
    for done in range(problem.max_iter):
        gradient = _TangentGradient.at(problem, here)
        for _ in range(BACKTRACKS):
            there = _Place.of(problem, gradient.step(problem, here.model, length, ball), watch)
            moved = gradient.squared_distance(here.model, there.model)
            if there.loss <= max(recent) - SUFFICIENT * moved / length:
                break
            length /= 3
        else:
            break
        curved = squares(there.residual - here.residual).item() + ridge_on(problem, there.model, here.model)
        length = min(max(moved / curved if curved > 0 else usual, usual / FARTHEST), usual * FARTHEST)
        here, recent = there, [*recent, there.loss][-MEMORY:]
        watch.iterations += 1
        if here.loss < best.loss:
            best = here
        if (done + 1) % CHUNK == 0:
            watch.passed(best.loss / len(problem.entries))
            if not before - best.loss > worthwhile * best.loss:
                break
            before = best.loss
    if done % CHUNK != CHUNK - 1:
        watch.passed(best.loss / len(problem.entries))
    return best.model


class _Place(NamedTuple):
    """A model, what it leaves at the entries (N,), and the loss."""

    model: Model
    residual: Tensor
    loss: float

    @staticmethod
    def of(problem: Problem, model: Model, watch: Watch) -> _Place:
        factors = model.factors(problem.weights, biases=problem.ridge is not None)
        residual = problem.entries.products(*factors, less_values=True).clone()
        watch.evaluations += 1
        return _Place(model, residual, (squares(residual).item() + ridge_on(problem, model)) / 2)


class _TangentGradient(NamedTuple):
    """u @ down.T + across @ v.T of Y, and of the biases.

    Attributes:
        u: (m, k), v: (n, k) singular vectors.
        across: (m, k), G v less its part along u; down: (n, k), G^T u for the gradient G of Y.
        biases: gradients of row biases, column biases and offset.
        units: of the steps along biases, relative to those of Y, so that the curvature is alike.
    """

    u: Tensor
    v: Tensor
    across: Tensor
    down: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None
    units: tuple[float, float, float]

    @staticmethod
    def at(problem: Problem, here: _Place) -> _TangentGradient:
        entries, weights, model = problem.entries, problem.weights, here.model
        m, n = entries.shape
        root = model.sigma.sqrt()
        root = torch.where(root > 0, root, 1.0)
        u, v = model.left / root, model.right / root
        right, left = weights.column[:, None] * v, weights.row[:, None] * u
        biases, on_rows, on_columns = None, 0.0, 0.0
        if problem.ridge is None:
            of_rows = entries.times_right(here.residual, right)
            of_columns = entries.transposed_times_left(here.residual, left)
        else:
            on_rows, on_columns = (m * n / len(entries) * ridge for ridge in problem.ridge[:2])
            # the sums over rows and columns in the same pass
            of_rows = entries.times_right(here.residual, _with_ones(right))
            of_columns = entries.transposed_times_left(here.residual, _with_ones(left))
            biases = (
                of_rows[:, -1] + problem.ridge.row * model.row_bias,
                of_columns[:, -1] + problem.ridge.column * model.column_bias,
                of_rows[:, -1].sum(),
            )
            of_rows, of_columns = of_rows[:, :-1], of_columns[:, :-1]
        across = weights.row[:, None] * of_rows
        return _TangentGradient(
            u=u,
            v=v,
            across=across - u @ (u.mT @ across),
            down=weights.column[:, None] * of_columns,
            biases=biases,
            units=(1 / (n + on_rows), 1 / (m + on_columns), 1 / (m * n)),
        )

    def step(self, problem: Problem, model: Model, length: float, ball: Tensor) -> Model:
        """Down the gradient and back into the ball."""
        left = torch.cat([self.u, self.across], dim=1)
        right = torch.cat([self.v * model.sigma - length * self.down, -length * self.v], dim=1)
        offset = model.row_bias, model.column_bias, model.offset
        if self.biases is not None:
            row, column, one = (
                bias - length * unit * gradient
                for bias, unit, gradient in zip(offset, self.units, self.biases)
            )
            offset = row, column, one
        moved = Model.balanced(LowRank(left, right.mT), *offset).truncated(len(model.sigma))
        return moved.with_spectrum(problem.norm.project(moved.sigma, ball))

    def squared_distance(self, one: Model, other: Model) -> float:
        """Of Y, and of the biases in their units."""
        # that of near matrices is a difference of large numbers
        left = torch.cat([one.left, -other.left], dim=1).double()
        right = torch.cat([one.right, other.right], dim=1).double()
        squared = ((left.mT @ left) * (right.mT @ right)).sum()
        if self.biases is not None:
            biases = one.row_bias, one.column_bias, one.offset
            others = other.row_bias, other.column_bias, other.offset
            for unit, bias, moved in zip(self.units, biases, others):
                squared = squared + (bias - moved).square().sum() / unit
        return max(squared.item(), 0.0)


def _with_ones(side: Tensor) -> Tensor:
    return torch.cat([side, torch.ones_like(side[:, :1])], dim=1)
