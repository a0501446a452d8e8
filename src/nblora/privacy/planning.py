"""What a private release would look like, before any budget is spent: noise against the largest signal.

Signal-to-noise here is the largest Frobenius norm that the merged update can have, which it has if all
clients send the same update and use their whole bound, over the root mean square norm of the noise. So it is
what can be hoped for at best: clients that disagree, or stay inside their bounds, have less. MATH.md §7.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from nblora.privacy._checks import (
    Adjacency,
    check_adjacency,
    check_count,
    check_delta,
    check_epsilon,
    check_probability,
    check_shapes,
)
from nblora.privacy.accounting import compose_subsampled
from nblora.privacy.gaussian import compose, gaussian_epsilon, gaussian_mu
from nblora.privacy.ledger import PrivacyLedger, Spent, as_ledger
from nblora.privacy.sensitivity import sensitivity, split_noise

SNR_IN_WORDS = (
    "SNR: the largest Frobenius norm that the merged update can have (all clients agree and use their whole "
    "bound), over that of the noise; truncated: over that of the noise that is left at this rank."
)
_STEPS = 12
_PRECISION = 1e-3  # relative, of an epsilon that is reached with sampling


LAYER_HEADING = ("layer", "shape", "client at most", "sensitivity Δ", "noise τ", "‖noise‖_F")


@dataclass(frozen=True)
class NoisyLayer:
    """One layer of a release.

    Attributes:
        name: of the layer.
        shape: (m, n).
        bound: what a client's Frobenius norm is at most.
        sensitivity: how far one client moves the merged update, in the Frobenius norm.
        tau: standard deviation of the noise on each entry.
    """

    name: str
    shape: tuple[int, int]
    bound: float
    sensitivity: float
    tau: float

    @property
    def frobenius(self) -> float:
        """The root mean square Frobenius norm of the noise: tau sqrt(m n)."""
        return self.tau * math.sqrt(math.prod(self.shape))

    @property
    def spectral(self) -> float:
        """About the spectral norm of the noise, and its mean at most: tau (sqrt(m) + sqrt(n)).

        Source: Davidson and Szarek, Theorem II.13 (Handbook of the Geometry of Banach Spaces I, 2001).
        """
        return self.tau * sum(map(math.sqrt, self.shape))

    def cells(self) -> tuple[str, ...]:
        """A row of text under `LAYER_HEADING`."""
        values = self.bound, self.sensitivity, self.tau, self.frobenius
        return (self.name, "×".join(map(str, self.shape)), *(f"{value:.4g}" for value in values))

    def truncated(self, rank: int) -> float:
        """About the Frobenius norm of the noise in the best approximation of this rank.

        At most `rank` singular values of at most the spectral norm each, and never more than all of the
        noise. Where the signal is of that rank and far above the noise, the error is
        tau sqrt(rank (m + n - rank)), up to a root of two less.
        """
        return min(self.frobenius, self.spectral * math.sqrt(min(rank, *self.shape)))


@dataclass(frozen=True)
class Plan:
    """A private release of every round, with all clients there.

    Attributes:
        epsilon, delta: of all rounds together.
        adjacency: what they protect.
        clients: how many there are.
        rounds: how many releases share the budget.
        sampling_probability: of each client in each round.
        rank: to which merged updates are truncated, None for dense ones.
        mu: of one round, as if there were no sampling.
        layers: of one round.
    """

    epsilon: float
    delta: float
    adjacency: Adjacency
    clients: int
    rounds: int
    sampling_probability: float
    rank: int | None
    mu: float
    layers: tuple[NoisyLayer, ...]

    def content(self) -> dict[str, Any]:
        """All of it as plain values."""
        derived = (
            "round_epsilon",
            "multiplier",
            "sensitivity",
            "signal",
            "noise",
            "snr",
            "truncated_snr",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}

    @property
    def round_epsilon(self) -> float:
        """The epsilon of one round alone at `delta`, without sampling: what a release is asked for."""
        return gaussian_epsilon(mu=self.mu, delta=self.delta)

    @property
    def multiplier(self) -> float:
        """tau / Delta of a release of one layer."""
        return 1 / self.mu

    @property
    def sensitivity(self) -> float:
        """How far one client moves the merged update of all layers."""
        return math.hypot(*(layer.sensitivity for layer in self.layers))

    @property
    def signal(self) -> float:
        """The largest Frobenius norm that the merged update of all layers can have."""
        return math.hypot(*(layer.bound for layer in self.layers))

    @property
    def noise(self) -> float:
        """The root mean square Frobenius norm of the noise on all layers."""
        return math.hypot(*(layer.frobenius for layer in self.layers))

    @property
    def snr(self) -> float:
        """signal / noise of the dense release."""
        return self.signal / self.noise

    @property
    def truncated_snr(self) -> float | None:
        """The same after truncation, None without a rank."""
        if self.rank is None:
            return None
        return self.signal / math.hypot(*(layer.truncated(self.rank) for layer in self.layers))


def plan_rows(plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    """A heading and a row of text for each plan; several rounds have two columns more."""
    several = any(plan.rounds > 1 for plan in plans)
    truncated = any(plan.rank is not None for plan in plans)
    heading = (
        "epsilon",
        *(("rounds", "epsilon of one") if several else ()),
        "clients",
        "τ/Δ",
        "sensitivity Δ",
        "noise τ",
        "‖noise‖_F",
        "‖noise‖₂",
        "signal",
        "SNR",
        *(("SNR truncated",) if truncated else ()),
    )
    rows = [heading]
    for plan in plans:
        taus = sorted(layer.tau for layer in plan.layers)
        spread = f"{taus[0]:.4g}" + (f" to {taus[-1]:.4g}" if taus[-1] > taus[0] else "")
        snr = plan.truncated_snr
        rows.append(
            (
                f"{plan.epsilon:g}",
                *((str(plan.rounds), _down(plan.round_epsilon)) if several else ()),
                str(plan.clients),
                f"{plan.multiplier:.4f}",
                f"{plan.sensitivity:.4g}",
                spread,
                f"{plan.noise:.4g}",
                f"{max(layer.spectral for layer in plan.layers):.4g}",
                f"{plan.signal:.4g}",
                f"{plan.snr:.3g}",
                *(("" if snr is None else f"{snr:.3g}",) if truncated else ()),
            )
        )
    return rows


def layer_rows(plan: Plan) -> list[tuple[str, ...]]:
    """A heading and a row of text for each layer of a plan."""
    return [
        (*LAYER_HEADING, "‖noise‖₂"),
        *((*layer.cells(), f"{layer.spectral:.4g}") for layer in plan.layers),
    ]


def _down(epsilon: float) -> str:
    """Four digits, rounded down, so that what is copied is within the budget."""
    if epsilon < 1e-6:
        return "0"
    scale = 10.0 ** (3 - math.floor(math.log10(epsilon)))
    return f"{math.floor(epsilon * scale) / scale:g}"


def plan_release(
    *,
    bounds: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    adjacency: Adjacency,
    epsilon: float,
    delta: float,
    clients: int,
    rounds: int = 1,
    sampling_probability: float = 1.0,
    rank: int | None = None,
) -> Plan:
    """The noise of `private_mean`, without spending anything.

    Args:
        bounds: for each layer, what a client's Frobenius norm is at most (`frobenius_bound`).
        shapes: (m, n) of the same layers.
        adjacency: "add-remove" or "replace-one".
        epsilon, delta: of all rounds together.
        clients: N. The denominator is N, with sampling the expected number of those who are drawn.
        rounds: T.
        sampling_probability: of each client in each round (`sample_clients`).
        rank: to which merged updates will be truncated.

    Raises:
        ValueError, TypeError: for arguments that break a rule.
        ImportError: if dp-accounting is missing.
    """
    sizes = check_shapes(bounds, shapes)
    clients = check_count("clients", clients)
    rank = None if rank is None else check_count("rank", rank)
    probability = check_probability(sampling_probability)
    mu = _round_mu(
        epsilon=epsilon,
        delta=delta,
        adjacency=adjacency,
        rounds=rounds,
        sampling_probability=probability,
    )
    names = list(bounds)
    deltas = sensitivity(
        [bounds[name] for name in names],
        adjacency=adjacency,
        n_total=max(1, round(probability * clients)),
    )
    taus = split_noise(deltas, [math.prod(sizes[name]) for name in names], mu=mu)
    return Plan(
        epsilon=float(epsilon),
        delta=float(delta),
        adjacency=adjacency,
        clients=clients,
        rounds=rounds,
        sampling_probability=probability,
        rank=rank,
        mu=mu,
        layers=tuple(
            NoisyLayer(name, sizes[name], float(bounds[name]), change, tau)
            for name, change, tau in zip(names, deltas, taus)
        ),
    )


def round_mu(
    *,
    epsilon: float,
    delta: float,
    adjacency: Adjacency,
    rounds: int = 1,
    sampling_probability: float = 1.0,
    spent: Sequence[tuple[float, float]] = (),
) -> float:
    """The largest mu of each of several further rounds within a budget, as if there were no sampling.

    Args:
        epsilon, delta: the budget.
        adjacency: "replace-one" only without sampling.
        rounds: T equal ones.
        sampling_probability: of each client in each of them.
        spent: (mu, sampling probability) of the releases so far.

    Returns:
        mu, 0 where nothing is left. With sampling slightly less than would just fit, and much less where that
        were beyond `LARGEST_SAMPLED_MU`.

    Raises:
        ValueError: for arguments that break a rule.
        ImportError: if dp-accounting is missing.
    """
    check_adjacency(adjacency)
    epsilon, delta = check_epsilon(epsilon), check_delta(delta)
    rounds, probability = check_count("rounds", rounds), check_probability(sampling_probability)
    before = compose([mu for mu, _ in spent])
    whole = gaussian_mu(epsilon=epsilon, delta=delta)
    # sqrt(whole^2 - before^2) without its cancellation
    low = math.sqrt(max(0.0, whole - before) * (whole + before) / rounds)
    probabilities = [share for _, share in spent] + [probability] * rounds
    if all(share == 1 for share in probabilities):
        return low

    def total(mu: float) -> float:
        return compose_subsampled(
            [size for size, _ in spent] + [mu] * rounds,
            sampling_probability=probabilities,
            delta=delta,
            adjacency=adjacency,
        )

    # between a mu that fits and one that does not, by secants where they help, for each step takes a second
    high = 2 * low or 1e-3 * whole
    below, above = total(low), total(high)
    while above <= epsilon:
        low, below, high = high, above, 2 * high
        above = total(high)
    for _ in range(_STEPS):
        if below >= epsilon * (1 - _PRECISION):
            break
        share = (epsilon - below) / (above - below) if above < 4 * epsilon else 0.5
        middle = low + share * (high - low)
        reached = total(middle)
        if reached <= epsilon:
            low, below = middle, reached
        else:
            high, above = middle, reached
    return low


_round_mu = lru_cache(round_mu)  # the same for any number of clients, and with sampling seconds


@dataclass(frozen=True)
class Account:
    """What of a ledger's budget is spent and left.

    Attributes:
        budget: epsilon.
        adjacency: of all releases.
        spent: all releases together.
        left: the largest epsilon, at the same delta, of one more release over all clients; 0 for none.
    """

    budget: float
    adjacency: Adjacency
    spent: Spent
    left: float

    @property
    def summary(self) -> str:
        """In two sentences."""
        spent = self.spent
        text = (
            f"epsilon {spent.epsilon:.6g} of {self.budget:.6g} is spent at delta {spent.delta:g} under "
            f"{self.adjacency} (mu {spent.mu:.4g}), in {spent.releases} releases. One more over all "
            f"clients may have epsilon {_down(self.left)}."
        )
        return text if spent.secure else f"{text} SEEDED NOISE was among them: nothing is private."


def account_of(ledger: PrivacyLedger | str | os.PathLike[str]) -> Account:
    """What of a budget is spent and left. Where releases were sampled this takes seconds.

    Raises:
        FileNotFoundError, ValueError: as `PrivacyLedger`.
        ImportError: if dp-accounting is missing.
    """
    book = as_ledger(ledger)
    mu = round_mu(
        epsilon=book.epsilon,
        delta=book.delta,
        adjacency=book.adjacency,
        spent=[(release.mu, release.sampling_probability) for release in book.releases],
    )
    return Account(book.epsilon, book.adjacency, book.spent(), gaussian_epsilon(mu=mu, delta=book.delta))
