"""The Gaussian mechanism: noise, epsilon and delta, exactly, and their composition (MATH.md §7).

mu = Delta / tau is the sensitivity over the standard deviation. A release with it is mu-GDP, which says the
same as (epsilon, delta(epsilon))-DP for every epsilon >= 0 with

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)

(Dong, Roth and Su, arXiv 1905.02383, Corollary 2.13; Balle and Wang, arXiv 1805.06530, Theorem 8). The
classical tau = Delta sqrt(2 ln(1.25 / delta)) / epsilon is proven for epsilon < 1 only and too little beyond
(at delta = 1e-5, for epsilon = 10); it is nowhere used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from nblora.privacy._checks import check_delta, check_epsilon, check_mu, dp_accounting

_CAUTION = (
    1e-10  # relative: noise is rounded up by this, so that an epsilon that is computed back is not above
)
_LAST_CAUTION = 1e-6
_CLOSE = 1e-3  # mu below which the difference of both terms is taken from derivatives


def _erfcx(x: float) -> float:
    """e^(x^2) erfc(x), which neither under- nor overflows for x > -5."""
    return float(torch.special.erfcx(torch.tensor(x, dtype=torch.float64)).item())


def _erfcx_fall(x: float, width: float) -> float:
    """erfcx(x - width/2) - erfcx(x + width/2), which would cancel; relative error width^4 / 60.

    From erfcx' = 2 x erfcx - 2/sqrt(pi) and two derivatives more.
    """
    value = _erfcx(x)
    first = 2 * x * value - 2 / math.sqrt(math.pi)
    second = 2 * value + 2 * x * first
    third = 4 * first + 2 * x * second
    return -(width * first + width**3 / 24 * third)


def _log_delta(mu: float, epsilon: float) -> float:
    """log delta(epsilon); -inf where it is below any float.

    With a, b = epsilon/mu +- mu/2, a^2/2 = b^2/2 + epsilon: both terms have the factor e^(-b^2/2), and what
    is left of them differs by numbers of ordinary size, where e^epsilon Phi(-a) is infinity times zero.
    """
    if mu == 0:
        return -math.inf
    a, b = epsilon / mu + mu / 2, epsilon / mu - mu / 2
    if not b < 1e100:  # its square would overflow
        return -math.inf
    root = math.sqrt(2)
    if b > -5:
        difference = (
            _erfcx_fall(epsilon / mu / root, mu / root)
            if mu < _CLOSE
            else _erfcx(b / root) - _erfcx(a / root)
        )
        return -b * b / 2 + math.log(difference / 2) if difference > 0 else -math.inf
    # Phi(-b) is nearly 1
    return math.log1p(-(math.erfc(-b / root) / 2 + math.exp(-b * b / 2) * _erfcx(a / root) / 2))


def gaussian_delta(*, mu: float, epsilon: float) -> float:
    """The least delta for which mu-GDP implies (epsilon, delta)-DP.

    Raises:
        ValueError: for mu or epsilon that is negative or not finite.
    """
    return math.exp(_log_delta(check_mu(mu), check_epsilon(epsilon, zero=True)))


def gaussian_epsilon(*, mu: float, delta: float) -> float:
    """The least epsilon for which mu-GDP implies (epsilon, delta)-DP, rounded up to the next float.

    Raises:
        ValueError: for mu that is negative or not finite, delta outside (0, 1).
    """
    mu, target = check_mu(mu), math.log(check_delta(delta))
    if _log_delta(mu, 0.0) <= target:
        return 0.0
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(-2 * target)  # Bun and Steinke, arXiv 1605.02065, Prop. 1.3
    while not _log_delta(mu, high) <= target:
        low, high = high, 2 * high
        if high == math.inf:
            raise ValueError(f"mu must be small enough for a finite epsilon, got mu={mu!r}")
    while low < (middle := (low + high) / 2) < high:
        if _log_delta(mu, middle) <= target:
            high = middle
        else:
            low = middle
    return high


def gaussian_noise_multiplier(*, epsilon: float, delta: float) -> float:
    """tau / Delta, the standard deviation over the sensitivity, that makes one release (epsilon, delta)-DP.

    From dp-accounting (`get_sigma_gaussian`), rounded up by 1e-10 relative, and then checked with the formula
    of
    this module: it is returned only if both agree that it is enough.

    Raises:
        ValueError: for epsilon that is not positive and finite, delta outside (0, 1); if dp-accounting's
            number does not pass the check, as for epsilon and delta that are both next to zero.
        ImportError: if dp-accounting is missing.
    """
    epsilon, delta = check_epsilon(epsilon), check_delta(delta)
    proposed = float(dp_accounting().get_sigma_gaussian(epsilon, delta))
    caution = _CAUTION
    while caution <= _LAST_CAUTION:
        multiplier = proposed * (1 + caution)
        if 0 < multiplier < math.inf and _log_delta(1 / multiplier, epsilon) <= math.log(delta):
            return multiplier
        caution *= 10
    raise ValueError(
        "tau / Delta must give at most the asked delta by the exact formula, got "
        f"{proposed!r} from dp-accounting for epsilon={epsilon!r} and delta={delta!r}"
    )


def gaussian_mu(*, epsilon: float, delta: float) -> float:
    """The mu whose release is (epsilon, delta)-DP: 1 / `gaussian_noise_multiplier`."""
    return 1 / gaussian_noise_multiplier(epsilon=epsilon, delta=delta)


def compose(mus: Iterable[float]) -> float:
    """mu of several releases together: sqrt(sum mu_t^2). Later ones may depend on earlier ones.

    Raises:
        ValueError: for any mu that is negative or not finite, and where the sum is not finite.
    """
    return check_mu(math.hypot(*(check_mu(mu) for mu in mus)))
