"""Which bound and which rank: what predicts entries best that were held out.

Half the squared error + multiplier * ||Y||_nuclear is solved for falling multipliers, each from the last
solution; each solution is the one in the ball that it touches, so the path over multipliers is a path over
bounds. For another norm than the nuclear, the solution in its ball is found from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nblora.completion import fitting
from nblora.completion.entries import Entries, squares
from nblora.completion.fitting import Model, Problem, Watch

FALL = 0.6  # of the multiplier from one point of a path to the next
FIRST = 0.5  # of a path: share of the multiplier from which on Y is zero
POINTS = 40  # of a path, at most
PATIENCE = 2  # points without a better error before a path ends
SWEEPS = 8  # at each point
NEGLIGIBLE = 1e-4  # of a bound, over the norm of the leading part of the data
BACKFITTINGS = 5  # of the row and column means, for the ridge on biases
RESUMED = 2  # sweeps from a model that is nearly the solution
SMALL = 0.05  # share of the largest singular value below which one does not count for the rank
ROOM = 1.05  # a bound that nothing was gained from is given this much more, so that it does not act


@dataclass(frozen=True)
class Split:
    """Entries to fit, and other entries of the same matrix to judge by."""

    problem: Problem
    held_out: Entries


@dataclass(frozen=True)
class Candidate:
    """A rank and a bound, and what they gave.

    Attributes:
        k: rank.
        multiplier: of the nuclear norm, relative to the one from which on Y is zero.
        radius: mean over the splits.
        rmse: of held-out entries, over all splits.
        errors: absolute errors of the held-out entries of all splits.
    """

    k: int
    multiplier: float
    radius: float
    rmse: float
    errors: NDArray[np.float64]


@dataclass(frozen=True)
class Selection:
    """The best candidate, and all."""

    best: Candidate
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class _Point:
    """What one split gave at one multiplier, which is `share` of the `largest` of the split."""

    share: float
    largest: float
    radius: float
    errors: Tensor
    model: Model


@dataclass(frozen=True)
class _Tried:
    candidate: Candidate
    points: tuple[_Point, ...]

    @property
    def rmse(self) -> float:
        return self.candidate.rmse

    @staticmethod
    def of(k: int, points: Sequence[_Point]) -> _Tried:
        errors = torch.cat([point.errors for point in points]).double().cpu().numpy()
        candidate = Candidate(
            k=k,
            multiplier=float(np.mean([point.share for point in points])),
            radius=float(np.mean([point.radius for point in points])),
            rmse=float(np.sqrt(np.mean(errors**2))),
            errors=errors,
        )
        return _Tried(candidate, tuple(points))


def select(splits: Sequence[Split], *, two_stage: bool, radius: float | None, watch: Watch) -> Selection:
    """Choose the bound (unless it is given), and in two stages the rank too.

    The second stage: singular values above 5 % of the largest are counted, and the path is followed at that
    rank. In the end the bound is refined between the points of the path.

    Args:
        splits: at least one, all of one rank k, norm and matrix.
        two_stage: whether ranks below k may be chosen.
        radius: the bound, or None to choose it.
    """
    k = splits[0].problem.k
    tried = _at_rank(splits, k, radius, None, watch)
    best = min(tried, key=lambda one: one.rmse)
    if two_stage:
        count = min(_count(point.model.sigma) for point in best.points)
        if 0 < count < k:
            tried = [*tried, *_at_rank(splits, count, radius, best.points, watch)]
            best = min(tried, key=lambda one: one.rmse)
    if radius is None:
        middle = best.candidate
        for factor in (FALL**0.5, FALL**-0.5):
            points = [
                _point(replace(split.problem, k=middle.k), split.held_out, factor * old.share, old, watch)
                for split, old in zip(splits, best.points)
            ]
            tried.append(_Tried.of(middle.k, points))
        best = min(tried, key=lambda one: one.rmse)
    return Selection(best.candidate, tuple(one.candidate for one in tried))


def _count(sigma: Tensor) -> int:
    return int((sigma > SMALL * sigma[0]).sum()) if sigma[0] > 0 else 0


def _at_rank(
    splits: Sequence[Split],
    k: int,
    radius: float | None,
    starts: Sequence[_Point] | None,
    watch: Watch,
) -> list[_Tried]:
    """What was tried at rank k: a path of bounds, as far as all splits went, or the given bound alone."""
    paths = []
    for place, split in enumerate(splits):
        problem = replace(split.problem, k=k)
        start = None if starts is None else starts[place]
        if radius is None:
            paths.append(_path(problem, split.held_out, start, watch))
        else:
            paths.append([_inside(problem, split.held_out, radius, start, watch)])
    return [_Tried.of(k, points) for points in zip(*paths)]


def _path(problem: Problem, held_out: Entries, start: _Point | None, watch: Watch) -> list[_Point]:
    """Solutions for falling multipliers until the held-out error does not fall any more."""
    if start is None:
        model = fitting.spectral_start(problem, watch)
        largest = fitting.largest_multiplier(problem, model)
        lower = (model.sigma - FIRST * model.sigma[0]).clamp(min=0)
        start = _Point(FIRST, largest, 0.0, held_out.values, model.with_spectrum(lower))
    share, last = start.share, start
    points: list[_Point] = []
    best, waited = float("inf"), 0
    for _ in range(POINTS):
        last = _point(problem, held_out, share, last, watch)
        points.append(last)
        rmse = last.errors.square().mean().sqrt().item()
        waited = 0 if rmse < best * (1 - 1e-4) else waited + 1
        best = min(best, rmse)
        if waited > PATIENCE or share < fitting.SMALLEST_MULTIPLIER:
            break
        share *= FALL
    return points


def _point(problem: Problem, held_out: Entries, share: float, start: _Point, watch: Watch) -> _Point:
    """The solution for one multiplier, and in the ball that it touches."""
    model = start.model.truncated(problem.k)
    if start.largest > 0:  # else nothing is left to explain
        model = fitting.settle(problem, model, share * start.largest, watch, SWEEPS)
    radius = problem.norm.value(model.sigma).item()
    inside = fitting.solves(problem.norm) or not radius > 0
    judged = model if inside else fitting.descend(problem, model, radius, watch)
    return _Point(share, start.largest, radius, _errors(judged, problem, held_out), model)


def _inside(problem: Problem, held_out: Entries, radius: float, start: _Point | None, watch: Watch) -> _Point:
    """The solution for a given bound."""
    model, share, largest = solve(problem, radius, watch, share=0.1 if start is None else start.share)
    return _Point(share, largest, radius, _errors(model, problem, held_out), model)


def _errors(model: Model, problem: Problem, held_out: Entries) -> Tensor:
    left, right = model.factors(problem.weights, biases=problem.ridge is not None)
    return held_out.products(left, right, less_values=True).abs()


def solve(problem: Problem, radius: float, watch: Watch, *, share: float = 0.1) -> tuple[Model, float, float]:
    """The model in a ball: alternating regressions towards its boundary, then L-BFGS inside.

    Args:
        share: the multiplier to start with, relative to the one from which on Y is zero.

    Returns:
        the model, the share at which the regressions ended, and the multiplier from which on Y is zero.
    """
    start = fitting.spectral_start(problem, watch)
    largest = fitting.largest_multiplier(problem, start)
    if not largest > 0:  # nothing is left to explain: a constant, or biases alone
        zero = Model.zero(problem.entries, problem.k, centred=problem.ridge is not None)
        return zero, share, largest
    if radius < NEGLIGIBLE * problem.norm.value(start.sigma).item():
        return fitting.barely(problem, radius, watch), share, largest
    inside = start.with_spectrum(problem.norm.project(start.sigma, start.sigma.new_tensor(radius)))
    smallest = fitting.SMALLEST_MULTIPLIER * largest
    model, multiplier = fitting.approach(problem, radius, inside, share * largest, smallest, watch)
    return fitting.descend(problem, model, radius, watch), multiplier / largest, largest


def resume(
    problem: Problem, radius: float, model: Model, share: float, largest: float, watch: Watch
) -> tuple[Model, float, float]:
    """As `solve`, from a model that is nearly the solution: few sweeps, at its multiplier, then L-BFGS."""
    if not largest > 0 or not problem.norm.value(model.sigma).item() > NEGLIGIBLE * largest:
        return solve(problem, radius, watch)
    model = fitting.settle(problem, model, share * largest, watch, RESUMED)
    return fitting.descend(problem, model, radius, watch), share, largest


def bias_ridge(entries: Entries) -> fitting.Ridge:
    """The ridges on biases: variance of an entry beside its biases, over that of the rows' (columns') means.

    The variance of means is what is left of it beyond chance (the moment estimator of a random effect); where
    nothing is left, the ridge is so large that biases are as good as switched off.
    """
    sides = entries, entries.mT
    counts = [side.row_counts for side in sides]
    filled = [int((count > 0).sum()) for count in counts]
    free = len(entries) - sum(filled) + 1
    if free <= 0 or min(filled) < 2:  # nothing tells a mean from an entry
        return fitting.Ridge(1.0, 1.0)
    ones = torch.ones_like(entries.values)
    centre = entries.values.mean()
    means = [torch.zeros_like(count) for count in counts]
    for _ in range(BACKFITTINGS):  # least squares for both effects
        for one, other in ((0, 1), (1, 0)):
            summed = sides[one].times_right(sides[one].values, torch.ones_like(means[other])[:, None])
            explained = sides[one].times_right(ones, means[other][:, None])
            means[one] = (summed - explained)[:, 0] / counts[one].clamp(min=1) - centre
    left = torch.stack([means[0] + centre, torch.ones_like(means[0])], dim=1)
    right = torch.stack([torch.ones_like(means[1]), means[1]], dim=1)
    noise = squares(entries.products(left, right, less_values=True)).item() / free
    ridges = []
    for mean, count, groups in zip(means, counts, filled):
        mean, count = mean.double(), count.double()
        between = (count @ mean.square()).item() - (count @ mean).item() ** 2 / len(entries)
        size = len(entries) - count.square().sum().item() / len(entries)
        spread = (between - (groups - 1) * noise) / size
        ridges.append(min(max(noise / spread, 1e-6), 1e8) if spread > 0 else 1e8)
    return fitting.Ridge(*ridges)
