"""The mean of clients' updates with Gaussian noise: guarded, noised, charged to a ledger (MATH.md §7).

Note [Sums on a grid]. Floating-point numbers undo differential privacy in two known ways. A sum of floats
depends on the order and is more sensitive than the sum of real numbers (Casacuberta et al., arXiv
2207.10635). And a float plus float noise can only take values that depend on the float, so that the last bits
of a release tell neighbours apart (Mironov, CCS 2012; Jin et al., arXiv 2112.05307). Here every entry of
every client is first rounded towards zero to a multiple of a public power of two g (about bound / 2^32),
which never makes a norm larger. Integers are then added, exactly. The noise is drawn in float64, rounded to
the nearest integer multiple of g and added as an integer: that is the same as rounding the exact sum plus the
noise, so free post-processing, and the values that can come out are the same whatever the clients sent. Only
then comes the division by the public denominator.

What is left is the sampler: the continuous Gaussian is imitated with 64 random bits in each of two draws,
summed, so that probabilities of grid points are off by a relative error that we estimate (not prove) to be
far below 2^-20, and nothing beyond 12.95 standard deviations occurs (probability 2e-38 if Gaussian). An
exact discrete Gaussian sampler would close this. How long a release takes is not hidden either.

Note [Nothing that clients do stops a release]. An exception would tell neighbours apart for sure. So whatever
a client sends, be it NaN, a wrong shape or nothing at all, is counted as zero and reported to the server;
exceptions are for what is public.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nblora.bounds import Norm, Schatten
from nblora.lowrank import LowRank
from nblora.privacy._checks import (
    Adjacency,
    check_adjacency,
    check_bound,
    check_count,
    check_delta,
    check_epsilon,
    check_mu,
    check_probability,
    check_shapes,
)
from nblora.privacy.gaussian import gaussian_epsilon, gaussian_mu
from nblora.privacy.ledger import PrivacyLedger, as_ledger
from nblora.privacy.sensitivity import largest_share, mu_of, sensitivity, split_noise

_LOG = logging.getLogger(__name__)

Update = Mapping[str, "LowRank | Tensor"]
"""What one client sends: for each layer its update, dense (m, n) or as thin factors."""
Status = Literal["accepted", "projected", "rejected", "refused", "absent"]

HONEST = 1e-6
"""Relative excess over a bound that is rounding of float32 factors. It is removed without a word."""
_CAUTION = 1e-9  # relative: norms are brought this far below the bound, more than their measurement is off
_FRACTION_BITS = 32  # bound / g
_NOISE_BITS = 40  # at most this for tau / g, so that sum and noise together stay below 2^53
_CHUNK = 2**20  # entries of noise at a time


@dataclass(frozen=True)
class ClientReport:
    """What the guard found of one client's update. Private: it depends on the data and is not noised.

    Attributes:
        index: in the sequence of updates.
        status: "accepted"; "projected": scaled back to the bound where it was over it; "rejected": over the
            bound and counted as zero; "refused": not a set of finite matrices of the right shapes, and
            counted as zero; "absent": nothing came, counted as zero.
        reason: in words, empty where accepted.
        norms: the measured Frobenius norm of each layer that could be measured, before any scaling.
        missing: layers that the client did not send, or that could be read only the first time; they count
            as zero.
    """

    index: int
    status: Status
    reason: str
    norms: Mapping[str, float]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrivateMean:
    """A private merged update and what it cost.

    All but `clients` may be published, which is why `repr` leaves those out.

    Attributes:
        updates: for each layer the merged update, dense (m, n), or LowRank if a rank was asked for; empty
            where `receive` got them.
        tau: standard deviation of the noise on each entry of a layer's dense merged update.
        sensitivities: how far one client can move each layer.
        mu: of all layers together; with sampling, as if there were none.
        epsilon, delta: of this release alone, without sampling.
        adjacency: what they protect.
        sampling_probability: what the caller said of how clients were drawn.
        secure: whether the noise came from the system's randomness; seeded noise protects nothing from those
            who know the seed.
        release: the identifier in the ledger, None without one.
        clients: one report for each client. Private.
    """

    updates: Mapping[str, LowRank | Tensor] = field(repr=False)
    tau: Mapping[str, float]
    sensitivities: Mapping[str, float]
    mu: float
    epsilon: float
    delta: float
    adjacency: Adjacency
    sampling_probability: float
    secure: bool
    release: str | None
    clients: tuple[ClientReport, ...] = field(repr=False)


class ReleaseLost(Exception):
    """A release was charged to its ledger and then not completed: the budget stays spent.

    `__cause__` says why.
    """


@dataclass(frozen=True)
class _Layer:
    """What is public about a layer. The noise is on the sum, before the scale of the mean."""

    name: str
    shape: tuple[int, int]
    bound: float
    tau: float  # on the mean
    deviation: float  # on the sum of updates, each with a norm up to `bound`
    grid: float  # a power of two


def private_mean(
    updates: Sequence[Update | None],
    *,
    bounds: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    adjacency: Adjacency,
    delta: float,
    epsilon: float | None = None,
    mu: float | None = None,
    n_total: int | None = None,
    weights: Sequence[float] | None = None,
    on_excess: Literal["reject", "project"] = "reject",
    sampling_probability: float = 1.0,
    rank: int | None = None,
    project: tuple[Norm, float | Mapping[str, float]] | None = None,
    dtype: torch.dtype = torch.float32,
    rng: int | np.random.Generator | None = None,
    ledger: PrivacyLedger | str | os.PathLike[str] | Callable[[], PrivacyLedger] | None = None,
    receive: Callable[[str, LowRank | Tensor], None] | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> PrivateMean:
    """Merge clients' updates so that the result says little about any one client.

    The dense updates are summed, layer by layer, over a fixed denominator; Gaussian noise is added to every
    entry; low rank and a norm ball are imposed afterwards, which costs no privacy. Every update is measured
    first, as what is added and in float64: no client can move the sum farther than `bounds`, whatever it
    sends.

    Everything but `updates` must be public, chosen without looking at them.

    Args:
        updates: one mapping {layer: LowRank (m, k), (k, n) or dense (m, n)} per client, None for one that is
            absent. A client that appears twice is protected half as well. A mapping may read what it gives
            when it is asked: that is twice, to measure it and to add it.
        bounds: for each layer, what a client's Frobenius norm is at most (`frobenius_bound`); 0 for a layer
            that stays zero.
        shapes: (m, n) of the same layers.
        adjacency: "add-remove" or "replace-one", see `sensitivity`.
        delta: of the guarantee, in (0, 1).
        epsilon: of the guarantee; or
        mu: the same in Gaussian differential privacy, for rounds that share a budget. Exactly one of both.
        n_total: the fixed public denominator. Under "replace-one" it is len(updates) if left out, which is
            public there; under "add-remove" it has to be given, and more or fewer updates may come.
        weights: public numbers, one per invited client, in place of `n_total`: the release is the weighted
            sum. len(weights) clients must be listed, absent ones as None.
        on_excess: what happens to a client with a layer over its bound: "reject" counts all of it as zero,
            "project" scales the layer back. Up to 1e-6 relative is rounding and always scaled back.
        sampling_probability: of each client, if they were drawn by `sample_clients` and the sample is secret.
            It changes only what the ledger adds up; epsilon here stays that of one release without sampling.
        rank: keep the best approximation of this rank of each noised layer, as LowRank.
        project: (norm, radius) or (norm, {layer: radius}): the nearest matrix in that ball, after `rank`; up
            to rounding to `dtype`.
        dtype: of the result.
        rng: None takes the system's randomness. A seed or generator makes the noise reproducible, by
            those who know it as well: a warning says so, and the ledger.
        ledger: or its path, or what opens it once all else is checked: the release is charged to it before
            the noise is drawn.
        receive: called with the name and the merged update of each layer, in the order of `bounds`, as soon
            as there is one, so that a single layer is in memory.
        advance: called with the steps done and their number, which is that of clients and layers.

    Returns:
        The merged update and what it cost; see `PrivateMean` for what of it is private.

    Raises:
        BudgetExceeded: if the ledger cannot pay for it; nothing is released.
        ReleaseLost: if anything fails after the ledger was charged.
        ValueError, TypeError: for public arguments that break a rule. Never because of what a client sent.
        ImportError: if dp-accounting is missing and `epsilon` was given.

    Warns:
        UserWarning: where noise is seeded. Updates that were not used as they came go to the log, which is
            private like the reports.
    """
    check_adjacency(adjacency)
    delta = check_delta(delta)
    if (epsilon is None) == (mu is None):
        raise ValueError(
            f"exactly one of epsilon and mu must be given, got epsilon={epsilon!r} and mu={mu!r}"
        )
    if mu is None:
        epsilon = check_epsilon(epsilon)
        mu = gaussian_mu(epsilon=epsilon, delta=delta)
    else:
        mu = check_mu(mu, zero=False)
    probability = check_probability(sampling_probability)
    if probability < 1 and adjacency != "add-remove":
        raise ValueError(f'sampling is accounted for under adjacency="add-remove" only, got {adjacency!r}')
    if on_excess not in ("reject", "project"):
        raise ValueError(f'on_excess must be "reject" or "project", got on_excess={on_excess!r}')
    if rank is not None:
        rank = check_count("rank", rank)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be of real floating-point numbers, got dtype={dtype}")
    if n_total is None and weights is None and adjacency == "replace-one":
        n_total = len(updates)
    if weights is not None and len(weights) != len(updates):
        raise ValueError(
            "there must be one weight for each invited client, with None in updates for an absent one, "
            f"got {len(weights)} weights and {len(updates)} updates"
        )
    share = largest_share(n_total=n_total, weights=weights)
    layers, sensitivities = _layers(bounds, shapes, adjacency, n_total, weights, share, mu)
    radii = _radii(project, bounds)
    spent = mu_of([sensitivities[layer.name] for layer in layers], [layer.tau for layer in layers])
    draw = _normal_from_system if rng is None else _normal_from_seed(rng)
    book = None if ledger is None else as_ledger(ledger)

    step = advance or (lambda done, total: None)
    steps = len(updates) + len(layers)
    clients = []
    for index, update in enumerate(updates):
        clients.append(_inspect(index, update, layers, on_excess))
        step(index + 1, steps)
    factors = [1.0] * len(updates) if weights is None else [weight / share for weight in weights]
    used = [client.index for client in clients if client.status in ("accepted", "projected")]
    usable = [(update, factors[index]) for index in used if (update := updates[index]) is not None]
    _log(clients)

    release = None
    if book is not None:  # Note [Spent first] in ledger.py
        release = book.spend(
            mu=spent,
            adjacency=adjacency,
            secure=rng is None,
            sampling_probability=probability,
            details={
                "epsilon": epsilon,
                "delta": delta,
                "n_total": None if n_total is None else int(n_total),
                "largest_weight": None if weights is None else share,
                "bounds": {layer.name: layer.bound for layer in layers},
                "tau": {layer.name: layer.tau for layer in layers},
            },
        )
    merged: dict[str, LowRank | Tensor] = {}
    hand_over = merged.__setitem__ if receive is None else receive
    try:
        for done, layer in enumerate(layers, start=len(updates) + 1):
            gone: list[int] = []
            noised = _noised_sum(layer, usable, draw, gone.append) * share
            for position in gone:
                client = clients[used[position]]
                clients[client.index] = replace(client, missing=(*client.missing, layer.name))
            hand_over(
                layer.name,
                _processed(noised, rank, project[0] if project else None, radii.get(layer.name), dtype),
            )
            step(done, steps)
        if book is not None and release is not None:
            book.confirm(release)
    except Exception as error:
        if release is None:
            raise
        raise ReleaseLost(
            f"release {release} was not completed, and its budget stays spent: "
            f"{type(error).__name__}: {error}"
        ) from error
    return PrivateMean(
        updates=merged,
        tau={layer.name: layer.tau for layer in layers},
        sensitivities=sensitivities,
        mu=spent,
        epsilon=gaussian_epsilon(mu=spent, delta=delta) if epsilon is None else epsilon,
        delta=delta,
        adjacency=adjacency,
        sampling_probability=probability,
        secure=rng is None,
        release=release,
        clients=tuple(clients),
    )


# --- what is public ---


def _layers(
    bounds: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    adjacency: Adjacency,
    n_total: int | None,
    weights: Sequence[float] | None,
    share: float,
    mu: float,
) -> tuple[list[_Layer], dict[str, float]]:
    sizes = check_shapes(bounds, shapes)
    names = list(bounds)
    deltas = sensitivity(
        [bounds[name] for name in names], adjacency=adjacency, n_total=n_total, weights=weights
    )
    taus = split_noise(deltas, [math.prod(sizes[name]) for name in names], mu=mu)
    layers = []
    for name, tau in zip(names, taus):
        bound = check_bound("bound", bounds[name])
        finest = max(bound * 2.0**-_FRACTION_BITS, tau / share * 2.0**-_NOISE_BITS)
        grid = 2.0 ** math.ceil(math.log2(finest)) if finest > 0 else 1.0
        layers.append(_Layer(name, sizes[name], bound, tau, tau / share, grid))
    return layers, dict(zip(names, deltas))


def _radii(
    project: tuple[Norm, float | Mapping[str, float]] | None, bounds: Mapping[str, float]
) -> dict[str, float]:
    if project is None:
        return {}
    norm, radius = project
    if not isinstance(norm, Norm):
        raise TypeError(f"project must be a pair of a Norm and a radius, got {project!r}")
    if not isinstance(radius, Mapping):
        radius = dict.fromkeys(bounds, radius)
    if set(radius) != set(bounds):
        raise ValueError(f"radii must be given for the layers {sorted(bounds)}, got {sorted(radius)}")
    return {name: check_bound("radius", value) for name, value in radius.items()}


# --- what clients sent ---


def _inspect(index: int, update: object, layers: Sequence[_Layer], on_excess: str) -> ClientReport:
    """Measure one client's update and say what becomes of it. Never raises for what it finds."""
    if update is None:
        return ClientReport(index, "absent", "", {})
    norms: dict[str, float] = {}
    try:
        if not isinstance(update, Mapping):
            return ClientReport(index, "refused", f"not a mapping but {type(update).__name__}", {})
        extra = sorted(str(name) for name in set(update) - {layer.name for layer in layers})
        if extra:
            return ClientReport(index, "refused", f"layers must be among those announced, got {extra}", {})
        missing = tuple(layer.name for layer in layers if layer.name not in update)
        for layer in layers:
            if layer.name not in missing:
                norms[layer.name] = _norm(_dense(update[layer.name], layer))
    except Exception as error:  # Note [Nothing that clients do stops a release]
        return ClientReport(index, "refused", f"{type(error).__name__}: {error}", norms)
    for layer in layers:
        if not math.isfinite(norms.get(layer.name, 0.0)):
            return ClientReport(
                index, "refused", f"entries must be finite, got others in {layer.name}", norms
            )
    over = {
        layer.name: layer.bound
        for layer in layers
        if not norms.get(layer.name, 0.0) <= layer.bound * (1 + HONEST)
    }
    if not over:
        return ClientReport(index, "accepted", "", norms, missing)
    reason = "norms must be at most the bounds, got " + ", ".join(
        f"{norms[name]:.6g} > {bound:.6g} in {name}" for name, bound in over.items()
    )
    return ClientReport(index, "projected" if on_excess == "project" else "rejected", reason, norms, missing)


def _dense(value: object, layer: _Layer) -> Tensor:
    """(m, n) in float64 on the CPU: what is measured is what is added.

    Not from the thin factors: a client can choose large ones that cancel, whose product in float64 is then
    far from the matrix whose norm thin factorisations measure.
    """
    parts = [value.left, value.right] if isinstance(value, LowRank) else [value]
    tensors = [part.detach() for part in parts if isinstance(part, Tensor)]
    if len(tensors) != len(parts) or not all(
        tensor.layout == torch.strided and tensor.is_floating_point() for tensor in tensors
    ):
        raise TypeError(f"{layer.name} must be LowRank or a dense real Tensor, got {type(value).__name__}")
    first, *rest = tensors
    shape = (*first.shape[:-1], rest[0].shape[-1]) if rest else tuple(first.shape)
    if shape != layer.shape:
        raise ValueError(f"{layer.name} must have shape {layer.shape}, got {shape}")
    first, *rest = (tensor.cpu().double() for tensor in tensors)
    return LowRank(first, rest[0]).dense() if rest else first


def _norm(dense: Tensor) -> float:
    """The Frobenius norm, without overflow; NaN or infinite where an entry is."""
    largest = dense.abs().amax().item()
    if largest == 0 or not math.isfinite(largest):
        return float(largest)
    return float(largest * torch.linalg.vector_norm(dense / largest).item())


def _log(clients: Sequence[ClientReport]) -> None:
    odd = [client.index for client in clients if client.status in ("projected", "rejected", "refused")]
    if odd:  # not by `warnings`, which a filter can turn into exceptions
        _LOG.warning(
            "%d of %d updates were not used as they came: see `clients` of the result. Private, like this.",
            len(odd),
            len(clients),
        )


# --- the noised sum ---


def _noised_sum(
    layer: _Layer,
    usable: Sequence[tuple[Update, float]],
    draw: Callable[[int], Tensor],
    gone: Callable[[int], None] = lambda position: None,
) -> Tensor:
    """(m, n) in float64: sum of factor * update plus noise. Note [Sums on a grid].

    Args:
        gone: called with the position of an update that has the layer no longer; it counts as zero there.
    """
    total = torch.zeros(layer.shape, dtype=torch.int64)
    for position, (update, factor) in enumerate(usable):
        steps = _read_steps(update, layer, factor)
        if steps is None:
            gone(position)
        else:
            total += steps
    total = total.flatten()
    for start in range(0, total.numel(), _CHUNK):
        chunk = total[start : start + _CHUNK]  # a view
        chunk += (draw(chunk.numel()) * (layer.deviation / layer.grid)).round().to(torch.int64)
    return total.double().reshape(layer.shape) * layer.grid


def _read_steps(update: Update, layer: _Layer, factor: float) -> Tensor | None:
    """factor * update on the grid; None where an update that could be read before cannot be any more."""
    try:
        if layer.name not in update:
            return torch.zeros(layer.shape, dtype=torch.int64)
        return _steps(_dense(update[layer.name], layer), layer, factor)
    except Exception:  # Note [Nothing that clients do stops a release]
        return None


def _steps(dense: Tensor, layer: _Layer, factor: float) -> Tensor:
    """factor * update in whole steps of the grid, towards zero; its norm is at most the bound."""
    norm, most = _norm(dense), layer.bound * (1 - _CAUTION)
    if not math.isfinite(norm):  # a tensor that has changed since it was inspected
        return torch.zeros(layer.shape, dtype=torch.int64)
    if norm > most:
        # not by most / norm at once, which can underflow
        dense = dense / norm * most
    return (dense * factor / layer.grid).trunc().to(torch.int64)


def _normal_from_system(count: int) -> Tensor:
    """Standard normal numbers (count,) in float64 from the system's cryptographic generator.

    By the inverse of the distribution function, on random bytes of the system: not by a NumPy or torch
    generator that is seeded from it, since those are no cryptographic ones, and a release reveals much of
    what they put out. One bit is the sign and 63 choose the tail, so that small tail probabilities keep the
    full precision of a float. Two draws over the root of two make the sum's values dense (Holohan and
    Braghin, arXiv 2107.10138, use four).
    """
    bits = torch.frombuffer(bytearray(os.urandom(16 * count)), dtype=torch.int64).reshape(2, count)
    tail = ((bits >> 1) & (2**63 - 1)).double().add_(0.5).mul_(2.0**-64)  # in (0, 1/2]
    normal = torch.special.ndtri(tail)
    return torch.where(bits & 1 == 1, normal, -normal).sum(0).div_(math.sqrt(2))


def _normal_from_seed(rng: int | np.random.Generator) -> Callable[[int], Tensor]:
    if isinstance(rng, bool) or not isinstance(rng, (int, np.integer, np.random.Generator)):
        raise TypeError(f"rng must be None, an integer seed or a numpy.random.Generator, got {rng!r}")
    if isinstance(rng, (int, np.integer)) and rng < 0:
        raise ValueError(f"rng must be a seed >= 0, got rng={rng!r}")
    warnings.warn(
        "seeded noise is for tests and studies: whoever knows the seed subtracts it, and nothing is private",
        stacklevel=3,
    )
    generator = np.random.default_rng(rng)
    return lambda count: torch.from_numpy(generator.standard_normal(count))


# --- post-processing ---


def _processed(
    noised: Tensor,
    rank: int | None,
    norm: Norm | None,
    radius: float | None,
    dtype: torch.dtype,
) -> LowRank | Tensor:
    """Rank and norm of a noised matrix (m, n), which no longer look at the clients."""
    if rank is None and isinstance(norm, Schatten) and norm.p == 2 and radius is not None:
        size = torch.linalg.vector_norm(noised).item()  # no singular values are needed
        noised, norm = noised * (radius / size if size > radius else 1.0), None
    if rank is None and norm is None:
        dense: Tensor = noised.to(dtype)
        return dense
    u, spectrum, vh = torch.linalg.svd(noised, full_matrices=False)
    if rank is not None:
        u, spectrum, vh = u[:, :rank], spectrum[:rank], vh[:rank]
    if norm is not None and radius is not None:
        spectrum = norm.project(spectrum, torch.tensor(radius, dtype=torch.float64))
    if rank is None:
        dense = ((u * spectrum) @ vh).to(dtype)
        return dense
    root = spectrum.sqrt()
    return LowRank((u * root).to(dtype), (root[:, None] * vh).to(dtype))
