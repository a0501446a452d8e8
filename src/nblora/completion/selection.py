"""Which bound and which rank: what predicts entries best that were held out.

Half the squared error + multiplier * ||Y||_nuclear is solved for falling multipliers, each from the last
solution; each solution is the one in the ball that it touches, so the path over multipliers is a path over
bounds. For another norm than the nuclear, the solution in its ball is found from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nblora.bounds import Schatten
from nblora.completion import fitting
from nblora.completion.entries import Entries, squares
from nblora.completion.fitting import Model, Problem, Ridge, Watch

FALL = 0.6  # of the multiplier from one point of a path to the next
FIRST = 0.5  # of a path: share of the multiplier from which on Y is zero
POINTS = 40  # of a path, at most
PATIENCE = 2  # points without a better error before a path ends
SWEEPS = 8  # at each point
NEGLIGIBLE = 1e-4  # of a bound, over the norm of the leading part of the data
BACKFITTINGS = 5  # of the row and column means, for the ridge on biases
RESUMED = 2  # sweeps from a model that is nearly the solution
NEAR = (10, 30), (20, 60)  # iterations of L-BFGS, and steps, then: where sweeps know the norm, where not
SMALL = 0.05, 0.1, 0.2, 0.4  # shares of the largest singular value; those above count for a rank to try
GAIN = 5e-4  # relative: less is no better error
HOPELESS = 1.1  # times the best error, at the start of a path
WORSE = 1.02  # times the best error: larger ranks are not tried then
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
        ridge: on biases, mean over the splits; None without biases.
    """

    k: int
    multiplier: float
    radius: float
    rmse: float
    errors: NDArray[np.float64]
    ridge: Ridge | None


@dataclass(frozen=True)
class Selection:
    """The best candidate, and all."""

    best: Candidate
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class _Point:
    """What one split gave at one multiplier, which is `share` of the `largest` of the split.

    `size` is that of the problem, for all points of a path.
    """

    share: float
    largest: float
    size: float
    radius: float
    errors: Tensor
    model: Model
    ridge: Ridge | None

    @property
    def noise(self) -> float:
        """Mean squared error of the entries held out."""
        return self.errors.square().mean().item()


@dataclass(frozen=True)
class _Tried:
    candidate: Candidate
    points: tuple[_Point, ...]

    @staticmethod
    def of(k: int, points: Sequence[_Point]) -> _Tried:
        errors = torch.cat([point.errors for point in points]).double().cpu().numpy()
        candidate = Candidate(
            k=k,
            multiplier=float(np.mean([point.share for point in points])),
            radius=float(np.mean([point.radius for point in points])),
            rmse=float(np.sqrt(np.mean(errors**2))),
            errors=errors,
            ridge=_mean([point.ridge for point in points]),
        )
        return _Tried(candidate, tuple(points))


def select(splits: Sequence[Split], *, two_stage: bool, radius: float | None, watch: Watch) -> Selection:
    """Choose the bound (unless it is given), and in two stages the rank too.

    Singular values of the nuclear solution that predicts best are counted: those above some shares of the
    largest. At each count, from the smallest on, bounds are tried again, as long as that helps. Then
    neighbours of the best rank and bound are tried.

    Args:
        splits: at least one, all of one rank k, norm and matrix.
        two_stage: whether ranks below k may be chosen.
        radius: the bound, or None to choose it.
    """
    k, norm = splits[0].problem.k, splits[0].problem.norm
    nuclear = Schatten(1.0)
    first: list[_Tried] = []
    if two_stage or norm == nuclear:
        convex = [replace(split, problem=replace(split.problem, norm=nuclear)) for split in splits]
        first = _at_rank(convex, k, radius if norm == nuclear else None, None, watch)
    ranks = _counts(min(first, key=_error)) if two_stage else []
    if norm == nuclear:
        tried, starts = list(first), min(first, key=_error).points
        ranks = [rank for rank in ranks if rank < k]
    else:
        tried, starts = [], None
        ranks = sorted({*ranks, k})
    lowest = float("inf")
    for rank in ranks:
        hopeless = HOPELESS * min(map(_error, tried), default=float("inf"))
        found = _at_rank(splits, rank, radius, starts, watch, hopeless)
        tried += found
        error = min(map(_error, found))
        if error > WORSE * lowest:
            break
        lowest = min(lowest, error)
    best = min(tried, key=_error)
    if two_stage:
        best = _neighbour_ranks(splits, best, tried, k, radius, watch)
    if radius is None:
        shares = [best.points[0].share * factor for factor in (FALL**0.5, FALL**-0.5)]
        tried += [_again(splits, best, best.candidate.k, share, None, watch) for share in shares]
    best = min(tried, key=_error)  # neighbours that are better by less than a gain included
    return Selection(best.candidate, tuple(one.candidate for one in tried))


def _mean(ridges: Sequence[Ridge | None]) -> Ridge | None:
    known = [ridge for ridge in ridges if ridge is not None]
    if not known:
        return None
    row, column, noise, alone = (float(np.mean([ridge[i] for ridge in known])) for i in range(4))
    return Ridge(row, column, noise, alone, fitted=all(ridge.fitted for ridge in known))


def _error(tried: _Tried) -> float:
    return tried.candidate.rmse


def _counts(best: _Tried) -> list[int]:
    """Ranks worth a try, ascending: singular values above some shares of the largest."""
    counts = set()
    for share in SMALL:
        for point in best.points:
            sigma = point.model.sigma
            counts.add(int((sigma > share * sigma[0]).sum()) if sigma[0] > 0 else 0)
    return sorted(counts - {0})


def _neighbour_ranks(
    splits: Sequence[Split], best: _Tried, tried: list[_Tried], k: int, radius: float | None, watch: Watch
) -> _Tried:
    """Walk to ranks one less, or one more, as long as the error falls."""
    for step in (-1, 1):
        while 1 <= best.candidate.k + step <= k:
            rank = best.candidate.k + step
            if any(one.candidate.k == rank for one in tried) and rank in (1, k):
                break
            next_one = _again(splits, best, rank, best.points[0].share, radius, watch)
            tried.append(next_one)
            if not _error(next_one) < (1 - GAIN) * _error(best):
                break
            best = next_one
    return best


def _again(
    splits: Sequence[Split], near: _Tried, rank: int, share: float, radius: float | None, watch: Watch
) -> _Tried:
    """One candidate from a near one: at a rank, and a share of the multiplier unless the bound is given."""
    points = []
    for split, old in zip(splits, near.points):
        problem = replace(split.problem, k=rank, ridge=old.ridge)
        if radius is None:
            points.append(_point(problem, split.held_out, share, old, watch))
        else:
            points.append(_inside(problem, split.held_out, radius, old, watch))
    return _Tried.of(rank, points)


def _at_rank(
    splits: Sequence[Split],
    k: int,
    radius: float | None,
    starts: Sequence[_Point] | None,
    watch: Watch,
    hopeless: float = float("inf"),
) -> list[_Tried]:
    """What was tried at rank k: a path of bounds, as far as all splits went, or the given bound alone.

    Args:
        starts: where paths start; by default at a small bound.
        hopeless: error that ends a path which is not below it after some points.
    """
    paths = []
    for place, split in enumerate(splits):
        problem = replace(split.problem, k=k)
        start = None if starts is None else starts[place]
        if radius is None:
            paths.append(_path(problem, split.held_out, start, watch, hopeless))
        else:
            paths.append([_inside(problem, split.held_out, radius, start, watch)])
    return [_Tried.of(k, points) for points in zip(*paths)]


def _path(
    problem: Problem, held_out: Entries, start: _Point | None, watch: Watch, hopeless: float
) -> list[_Point]:
    """Solutions for falling multipliers until the held-out error does not fall any more."""
    if start is None:
        model = fitting.spectral_start(problem, watch)
        largest = fitting.largest_multiplier(problem, model)
        size = problem.norm.value(model.sigma).item()
        first = FIRST
        if problem.norm != Schatten(1.0) and fitting.solves(problem.norm):
            first *= 20  # of these norms no multiplier makes Y quite zero
        lower = (model.sigma - FIRST * model.sigma[0]).clamp(min=0)
        start = _Point(first, largest, size, 0.0, held_out.values, model.with_spectrum(lower), problem.ridge)
    share, last = start.share, start
    points: list[_Point] = []
    best, waited = float("inf"), 0
    for _ in range(POINTS):
        last = _point(replace(problem, ridge=last.ridge), held_out, share, last, watch)
        points.append(last)
        rmse = last.noise**0.5
        waited = 0 if rmse < best * (1 - GAIN) else waited + 1
        best = min(best, rmse)
        if waited > PATIENCE or share < fitting.SMALLEST_MULTIPLIER:
            break
        if len(points) > PATIENCE and best > hopeless:
            break
        share *= FALL
    return points


def _point(problem: Problem, held_out: Entries, share: float, start: _Point, watch: Watch) -> _Point:
    """The solution for one multiplier, and in the ball that it touches."""
    problem = replace(problem, size=start.size)
    model = start.model.truncated(problem.k)
    if start.largest > 0:  # else nothing is left to explain
        problem, model = fitting.settle(problem, model, share * start.largest, watch, SWEEPS, learn=True)
    radius = problem.norm.value(model.sigma).item()
    inside = fitting.solves(problem.norm) or not radius > 0
    judged = model if inside else _finished(problem, model, radius, watch)
    errors = _errors(judged, problem, held_out)
    point = _Point(share, start.largest, start.size, radius, errors, model, problem.ridge)
    return replace(point, ridge=problem.learned(judged, point.noise).ridge)


def _inside(problem: Problem, held_out: Entries, radius: float, start: _Point | None, watch: Watch) -> _Point:
    """The solution for a given bound."""
    found = solve(problem, radius, watch, share=0.1 if start is None else start.share)
    errors = _errors(found.model, problem, held_out)
    return _Point(found.share, found.largest, radius, radius, errors, found.model, found.ridge)


def _errors(model: Model, problem: Problem, held_out: Entries) -> Tensor:
    left, right = model.factors(problem.weights, biases=problem.ridge is not None)
    return held_out.products(left, right, less_values=True).abs()


class Solution(NamedTuple):
    """The model in a ball, and what a later fit may start from.

    Attributes:
        model: inside.
        share: the multiplier at which the regressions ended, relative to
        largest: the one from which on Y is zero.
        ridge: on biases; None without.
    """

    model: Model
    share: float
    largest: float
    ridge: Ridge | None

    @staticmethod
    def of(problem: Problem, model: Model, share: float, largest: float) -> Solution:
        return Solution(model, share, largest, problem.ridge)


def solve(problem: Problem, radius: float, watch: Watch, *, share: float = 0.1) -> Solution:
    """The model in a ball: alternating regressions towards its boundary, then what finishes it inside.

    Args:
        share: the multiplier to start with, relative to the one from which on Y is zero.
    """
    problem = replace(problem, size=radius)
    start = fitting.spectral_start(problem, watch)
    largest = fitting.largest_multiplier(problem, start)
    if not largest > 0:  # nothing is left to explain: a constant, or biases alone
        zero = Model.zero(problem.entries, problem.k, centred=problem.ridge is not None)
        return Solution.of(problem, zero, share, largest)
    if radius < NEGLIGIBLE * problem.norm.value(start.sigma).item():
        return Solution.of(problem, fitting.barely(problem, radius, watch), share, largest)
    inside = start.with_spectrum(problem.norm.project(start.sigma, start.sigma.new_tensor(radius)))
    smallest = fitting.SMALLEST_MULTIPLIER * largest
    problem, model, multiplier = fitting.approach(problem, radius, inside, share * largest, smallest, watch)
    model = _finished(problem, model, radius, watch)
    return Solution.of(problem, model, multiplier / largest, largest)


def _finished(
    problem: Problem, model: Model, radius: float, watch: Watch, most: tuple[int, int] | None = None
) -> Model:
    """L-BFGS in the free parameters, then projected gradients; at most `most` iterations of each."""
    solvers = fitting.descend, fitting.polish
    for finish, limit in zip(solvers, most or (problem.max_iter, problem.max_iter)):
        limited = replace(problem, max_iter=min(problem.max_iter, limit))
        model = finish(limited, model, radius, watch)
    return model


def resume(problem: Problem, radius: float, last: Solution, watch: Watch) -> Solution:
    """As `solve`, from what is nearly the solution: few sweeps, at its multiplier, and the bound is known."""
    model, share, largest, ridge = last
    if not largest > 0 or not problem.norm.value(model.sigma).item() > NEGLIGIBLE * largest:
        return solve(problem, radius, watch)
    problem = replace(problem, size=radius, ridge=ridge)
    unknown = ridge is not None and not ridge.fitted
    problem, model = fitting.settle(problem, model, share * largest, watch, RESUMED, learn=unknown)
    model = _finished(problem, model, radius, watch, NEAR[not fitting.solves(problem.norm)])
    return Solution.of(problem, model, share, largest)


def bias_ridge(entries: Entries) -> Ridge:
    """Ridges for biases alone: variance of an entry beside them, over that of the rows' (columns') means.

    Beside a low-rank matrix, which explains some of both variances, they are wrong; `Ridge.refitted` mends
    them once there is a fit. The variance of means is what is left of it beyond chance (the moment estimator
    of a random effect); where nothing is left, the ridge is so large that biases are as good as switched off.
    """
    sides = entries, entries.mT
    counts = [side.row_counts for side in sides]
    filled = [int((count > 0).sum()) for count in counts]
    free = len(entries) - sum(filled) + 1
    if free <= 0 or min(filled) < 2:  # nothing tells a mean from an entry
        return Ridge(1.0, 1.0, 0.0, 0.0)
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
        ridges.append(fitting.ridge_on_bias(noise, spread))
    return Ridge(ridges[0], ridges[1], noise, noise)
