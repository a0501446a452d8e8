"""Composition of releases with random subsets of clients, by dp-accounting's privacy loss distributions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from nblora.privacy._checks import (
    Adjacency,
    check_adjacency,
    check_count,
    check_delta,
    check_mu,
    check_probability,
    dp_accounting,
)
from nblora.privacy.gaussian import compose, gaussian_epsilon

LARGEST_SAMPLED_MU = 30.0
"""Above this mu (epsilon in the hundreds) sampling is ignored: the distribution would take gigabytes."""


def compose_subsampled(
    mus: Sequence[float],
    *,
    sampling_probability: float | Sequence[float],
    delta: float,
    adjacency: Adjacency,
) -> float:
    """The epsilon of releases, each over clients that take part independently with a secret probability.

    Each release is a Gaussian mechanism on the updates of a Poisson sample: every client is in with
    probability `sampling_probability`, whoever else is, and nobody learns who was (`sample_clients`). A fixed
    number of clients, those who happen to be online, or a sample that is known, is none; give probability 1
    for it.

    Args:
        mus: mu = Delta / tau of each release as if there were no sampling.
        sampling_probability: one number for all releases, or one for each; in (0, 1].
        delta: in (0, 1).
        adjacency: "replace-one" only without sampling. Sensitivities here are already doubled for it, and a
            sampled replacement is not a sampled removal of twice the size.

    Returns:
        An upper bound on epsilon: exact up to float64 where nothing is sampled, else the smaller of
        dp-accounting's pessimistic estimate under ADD_OR_REMOVE_ONE and what holds without sampling.

    Raises:
        ValueError: for values out of range or lists of different lengths; for "replace-one" with sampling.
        ImportError: if something is sampled and dp-accounting is missing.

    Note: the numbers must be fixed before the first release. Without sampling they may depend on earlier
    releases (Smith and Thakurta, arXiv 2210.17520); with it, no proof for these accountants is known to us.
    """
    check_adjacency(adjacency)
    delta = check_delta(delta)
    sizes = [check_mu(mu) for mu in mus]
    if isinstance(sampling_probability, Sequence):
        probabilities = [check_probability(probability) for probability in sampling_probability]
    else:
        probabilities = [check_probability(sampling_probability)] * len(sizes)
    if len(probabilities) != len(sizes):
        raise ValueError(
            f"there must be one sampling probability for each of the {len(sizes)} releases, "
            f"got {len(probabilities)}"
        )
    unsampled = gaussian_epsilon(mu=compose(sizes), delta=delta)
    if all(probability == 1 for probability in probabilities):
        return unsampled
    if adjacency != "add-remove":
        raise ValueError(f'sampling is accounted for under adjacency="add-remove" only, got {adjacency!r}')
    if compose(sizes) > LARGEST_SAMPLED_MU:
        return unsampled
    return min(unsampled, _by_privacy_loss_distribution(sizes, probabilities, delta))


def _by_privacy_loss_distribution(
    mus: Sequence[float], probabilities: Sequence[float], delta: float
) -> float:
    accounting = dp_accounting()
    # its REPLACE_ONE would double a sensitivity that is doubled already
    accountant = accounting.pld.PLDAccountant(accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    rounds = sorted((mu, probability) for mu, probability in zip(mus, probabilities) if mu > 0)
    for (mu, probability), group in itertools.groupby(rounds):
        event = accounting.GaussianDpEvent(noise_multiplier=1 / mu)
        if probability < 1:
            event = accounting.PoissonSampledDpEvent(probability, event)
        accountant.compose(event, len(list(group)))
    epsilon = float(accountant.get_epsilon(delta))
    return epsilon if epsilon >= 0 else float("inf")  # NaN is no privacy


def sample_clients(count: int, *, probability: float) -> list[int]:
    """Indices of a Poisson sample: each of `count` clients is in with `probability`, drawn securely.

    Keep the sample secret: amplification by sampling holds only for those who do not know it.

    Raises:
        ValueError: for a count < 1 or a probability outside (0, 1].
    """
    count, probability = check_count("count", count), check_probability(probability)
    system = random.SystemRandom()
    return [client for client in range(count) if system.random() < probability]
