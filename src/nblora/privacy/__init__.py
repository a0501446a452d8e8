"""Private merging: what one client's update can change, the noise that hides it, and what that costs.

Sensitivity comes from norm bounds that hold by construction (MATH.md §7), noise and accounting from the exact
Gaussian mechanism and dp-accounting (`pip install 'nblora[privacy]'`). All privacy arguments are
keyword-only, and NaN never passes as private. What is promised, and what is not: docs/privacy.md.
"""

from nblora.privacy._checks import Adjacency
from nblora.privacy.accounting import compose_subsampled, sample_clients
from nblora.privacy.gaussian import (
    compose,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    gaussian_noise_multiplier,
)
from nblora.privacy.ledger import BudgetExceeded, PrivacyLedger, Release, Spent
from nblora.privacy.planning import (
    SNR_IN_WORDS,
    Account,
    NoisyLayer,
    Plan,
    account_of,
    plan_release,
    round_mu,
)
from nblora.privacy.release import ClientReport, PrivateMean, ReleaseLost, private_mean
from nblora.privacy.sensitivity import frobenius_bound, sensitivity, split_noise

__all__ = [
    "SNR_IN_WORDS",
    "Account",
    "Adjacency",
    "BudgetExceeded",
    "ClientReport",
    "NoisyLayer",
    "Plan",
    "PrivacyLedger",
    "PrivateMean",
    "Release",
    "ReleaseLost",
    "Spent",
    "account_of",
    "compose",
    "compose_subsampled",
    "frobenius_bound",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_mu",
    "gaussian_noise_multiplier",
    "plan_release",
    "private_mean",
    "round_mu",
    "sample_clients",
    "sensitivity",
    "split_noise",
]
