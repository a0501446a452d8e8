"""How far one client can move a merged update, and how noise is best split between layers (MATH.md §7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from nblora.bounds import Gauge, KyFan, Norm, Profile, Schatten, Spectral
from nblora.privacy._checks import Adjacency, check_adjacency, check_bound, check_count, check_mu, real

MOST_CLIENTS = 2**20
"""Sums of this many updates are still exact (see Note [Sums on a grid] in release.py)."""


def sensitivity(
    bounds: Sequence[float],
    *,
    adjacency: Adjacency,
    n_total: int | None = None,
    weights: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """L2 sensitivity of each layer of a merged update: the farthest that one client moves it.

    The merged update is the sum of the clients' updates over `n_total`, or the sum with `weights`; a client
    that is absent counts as zero. The sensitivity of all layers together is the root of the sum of squares.

    Args:
        bounds: what the Frobenius norm of a client's update is at most, for each layer.
        adjacency: "add-remove" (neighbours differ in the presence of one client) or "replace-one" (in one
            client's update: twice as far).
        n_total: the fixed denominator. It must be public: the number of clients that came is not, under
            "add-remove", and a mean over it would be twice as sensitive and have a noise that gives it away.
        weights: one for each client that was invited, present or not, in place of `n_total`. They must be
            public: a weight that is computed from a client's data (a number of examples, a validation loss)
            reveals that data, and nothing here accounts for it.

    Returns:
        One number per layer, in the units of `bounds`.

    Raises:
        ValueError: for an unknown adjacency, a bound that is negative, not finite, or out of the range of
            float64's squares, and unless exactly one of `n_total` and `weights` is given.
        TypeError: for bounds or weights that are not plain numbers.

    Source: MATH.md §7.
    """
    check_adjacency(adjacency)
    radii = [check_bound("bound", bound) for bound in bounds]
    share = largest_share(n_total=n_total, weights=weights)
    factor = 2.0 if adjacency == "replace-one" else 1.0
    return tuple(factor * share * radius for radius in radii)


def largest_share(*, n_total: int | None, weights: Sequence[float] | None) -> float:
    """The largest weight of any client in the sum: 1 / n_total, or the largest of the public weights."""
    if (n_total is None) == (weights is None):
        raise ValueError(
            "exactly one of n_total, a public denominator, and weights, public numbers, must be given, "
            f"got n_total={n_total!r} and weights={weights!r}"
        )
    if weights is None:
        count = check_count("n_total", n_total)
        if count > MOST_CLIENTS:
            raise ValueError(f"n_total must be at most {MOST_CLIENTS}, got n_total={n_total!r}")
        return 1 / count
    shares = [check_bound("weight", weight) for weight in weights]
    if not shares or not max(shares) > 0 or len(shares) > MOST_CLIENTS:
        raise ValueError(
            f"weights must be 1 to {MOST_CLIENTS} numbers, at least one of them positive, got {len(shares)} "
            f"with the largest {max(shares, default=0)!r}"
        )
    return max(shares)


def frobenius_bound(norm: Norm, radius: float, rank: int) -> float:
    """The least C with ||X||_F <= C if norm(X) <= radius; for a `Gauge`, an upper bound on it.

    A gauge f that is convex, as it has to be, gives for the j largest singular values: their sum is at most
    b_j = j radius / f(1, ..., 1, 0, ...), by averaging over their order. The squares then sum to at most
    those of the steps of the least concave function above b. That is exact for spectral and nuclear, and 13 %
    above the truth for Frobenius at rank 4.

    Args:
        norm: the norm that is bounded.
        radius: the bound, absolute, >= 0.
        rank: the rank of the update is at most this.

    Raises:
        ValueError: for a radius that is negative or not finite, a rank < 1 or a norm of an unknown kind.

    Source: MATH.md §7; for Ky Fan norms the extreme points of the ball, e_j and (1, ..., 1) / q.
    """
    radius = check_bound("radius", radius)
    rank = check_count("rank", rank)
    match norm:
        case Spectral():
            return math.sqrt(rank) * radius
        case Schatten(p=p):
            return float(radius * rank ** max(0.0, 1 / 2 - 1 / p))
        case KyFan(q=q):
            return radius * max(1.0, math.sqrt(rank) / q)
        case Profile(bounds=bounds):
            return radius * math.hypot(*bounds[:rank])
        case Gauge():
            return radius * _frobenius_of_gauge(norm, rank)
    raise ValueError(
        "norm must be Spectral, Schatten, KyFan, Profile or Gauge for its Frobenius bound to be known, "
        f"got norm={norm!r}"
    )


def _frobenius_of_gauge(norm: Gauge, rank: int) -> float:
    ones = torch.ones(rank, rank, dtype=torch.float64).tril()  # row j: j + 1 ones
    values = [real("value of the gauge", value) for value in norm.value(ones).tolist()]
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"a gauge must be positive and finite away from zero, got {values} for ones")
    hull = [(0, 0.0)]  # the least concave function above the points (j, b_j)
    for count, value in enumerate(values, start=1):
        point = (count, count / value)
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    # b may fall again where the gauge is not monotone: sums of what is >= 0 do not
    steps = [(after[0] - before[0], max(0.0, _slope(before, after))) for before, after in pairwise(hull)]
    return math.sqrt(sum(width * slope**2 for width, slope in steps))


def _slope(before: tuple[int, float], after: tuple[int, float]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


def split_noise(sensitivities: Sequence[float], sizes: Sequence[int], *, mu: float) -> tuple[float, ...]:
    """Standard deviations tau_l with the least total noise sum_l d_l tau_l^2 that are mu-GDP together.

    tau_l^2 = (Delta_l / sqrt(d_l)) * sum_j Delta_j sqrt(d_j) / mu^2, so that
    sqrt(sum_l (Delta_l / tau_l)^2) = mu.

    Args:
        sensitivities: Delta_l, one per layer; a layer with 0 gets no noise and must be constant.
        sizes: d_l, the number of entries of each layer.
        mu: > 0, of all layers together.

    Raises:
        ValueError: for lists of different lengths, no positive sensitivity, sizes < 1, or mu <= 0.

    Source: MATH.md §7.
    """
    mu = check_mu(mu, zero=False)
    deltas = [check_bound("sensitivity", value) for value in sensitivities]
    counts = [check_count("size", size) for size in sizes]
    if len(deltas) != len(counts) or not any(deltas):
        raise ValueError(
            "there must be one size for each sensitivity and a sensitivity above 0, got "
            f"sensitivities={list(sensitivities)} and sizes={list(sizes)}"
        )
    total = math.fsum(delta * math.sqrt(count) for delta, count in zip(deltas, counts))
    # two roots and not the root of the product, which could leave float64's range
    return tuple(
        math.sqrt(delta / math.sqrt(count)) * math.sqrt(total) / mu for delta, count in zip(deltas, counts)
    )


def mu_of(sensitivities: Sequence[float], tau: Sequence[float]) -> float:
    """mu = sqrt(sum_l (Delta_l / tau_l)^2) of a release of all layers; infinite where noise is missing."""
    ratios = []
    for delta, deviation in zip(sensitivities, tau, strict=True):
        if not (delta >= 0 and deviation >= 0):
            raise ValueError(f"sensitivity and tau must not be negative, got {delta!r} and {deviation!r}")
        ratios.append(0.0 if delta == 0 else math.inf if deviation == 0 else delta / deviation)
    return math.hypot(*ratios)
