"""The settings that each method may choose from, task by task, on a validation split.

Comparable grids: rank, strength of the regularization, biases or not, how long. A single setting is not
tuned. Ranges were narrowed by hand around what was best on validation data.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

Setting = dict[str, Any]
Grids = dict[str, list[Setting]]


def grid(**axes: Sequence[Any]) -> list[Setting]:
    """Every combination; a value that is a dictionary sets several options at once."""
    found: list[Setting] = []
    for values in itertools.product(*axes.values()):
        setting: Setting = {}
        for name, value in zip(axes, values):
            setting |= value if isinstance(value, dict) else {name: value}
        found.append(setting)
    return found


# ------------------------------------------------------------------------------------------ cmfrec

NOTHING = {"user_bias": False, "item_bias": False, "center": False}
MEAN = {"user_bias": False, "item_bias": False, "center": True}
BIASES = {"user_bias": True, "item_bias": True, "center": True}
OFFSETS = (NOTHING, MEAN, BIASES)


def _lambdas(plain: Sequence[float], scaled: Sequence[float]) -> list[Setting]:
    return grid(lambda_=plain, scale_lam=[False]) + grid(lambda_=scaled, scale_lam=[True])


_T1 = _lambdas([0.03, 0.1, 0.3, 1], [3e-4, 1e-3, 3e-3, 1e-2])
_T2 = _lambdas([0.7, 1, 1.5], [6e-3, 8e-3, 1.2e-2])
_T3 = _lambdas([5, 8, 12], [0.03, 0.04, 0.06])
# more rank than there is wants more regularization
_GIVEN = _lambdas([0.3, 1, 2, 3, 5, 8], [3e-3, 6e-3, 1e-2, 2e-2, 4e-2, 8e-2])

CMFREC: Grids = {
    "T1": grid(k=[10], strength=_T1, offset=OFFSETS, niter=[10, 30]),
    "T2": grid(k=[10, 20, 40], strength=_T2, offset=OFFSETS, niter=[20, 40]),
    "T3": grid(k=[10, 20], strength=_T3, offset=[BIASES], niter=[10, 20, 40]),
    "T1 rank 20": grid(k=[20], strength=_GIVEN, offset=[NOTHING, MEAN], niter=[10, 30]),
    "T1 rank 50": grid(k=[50], strength=_GIVEN, offset=[NOTHING, MEAN], niter=[10, 30]),
    "T1 unseen": grid(k=[10], strength=_T1, offset=[NOTHING, MEAN], niter=[20]),
    "T3 unseen": grid(k=[20], strength=_T3, offset=[BIASES], niter=[20]),
    "scale": [{"k": 20, "lambda_": 0.1, **NOTHING}],
}

# -------------------------------------------------------------------------------------------- ours


def _scales(low: float, high: float, count: int) -> list[float]:
    """Geometric; as multiples of the Frobenius norm that the spread of the observed entries suggests."""
    return [float(f"{scale:.4g}") for scale in np.geomspace(low, high, count)]


FIXED: Setting = {"rank_selection": None}
AUTO: Setting = {"bound": "auto", "rank_selection": "two-stage"}

_RATINGS = {"bound_scale": _scales(0.5, 2, 7), "weighting": [None, "popularity"], "bias": ["joint"]}

NBLORA: Grids = {
    "T1": grid(rank=[10], bound_scale=_scales(1, 8, 13), bias=[None, "joint"], fixed=[FIXED]),
    "T2": grid(rank=[10, 20, 40], bound_scale=_scales(0.7, 5.6, 13), bias=[None, "joint"], fixed=[FIXED]),
    "T3": grid(rank=[10, 20], **_RATINGS, fixed=[FIXED]),
    "T1 unseen": grid(rank=[10], bound_scale=_scales(2, 8, 7), bias=[None, "joint"], fixed=[FIXED]),
    "T3 unseen": grid(rank=[20], **_RATINGS, fixed=[FIXED]),
    "scale": [{"rank": 20, "bound_scale": 6.0, "bias": None, **FIXED}],
}
_GIVEN_RANKS = {
    "T1": 20,
    "T2": 40,
    "T3": 40,
    "T1 rank 20": 20,
    "T1 rank 50": 50,
    "T1 unseen": 20,
    "T3 unseen": 40,
}
NBLORA_AUTO: Grids = {name: [{"rank": rank, **AUTO}] for name, rank in _GIVEN_RANKS.items()}

# ------------------------------------------------------------------------------------- other peers

EXACT = {"max_iter": 300, "tol": 1e-7}
SOFT_IMPUTE: Grids = {
    "T1": grid(rank=[10], penalty=[0.01, 0.03, 0.1, 0.3], bias=[False, True], stop=[{}, EXACT]),
    "T2": grid(rank=[10, 20, 40], penalty=[0.5, 0.7, 1, 1.4], bias=[False, True], stop=[EXACT]),
    "T3": grid(rank=[10, 20], penalty=[4, 6, 8, 12], bias=[True], stop=[{"max_iter": 60}]),
}
TORCH: Grids = {
    "T1": grid(rank=[10], penalty=[0.03, 0.1, 0.3], bias=[False, True], steps=[50, 200]),
    "T2": grid(rank=[10, 20], penalty=[0.7, 1, 1.5], bias=[False, True], steps=[50, 200]),
    "T3": grid(rank=[20], penalty=[5, 8], bias=[True], steps=[50, 100]),
}
_SURPRISE = {"reg_all": [0.003, 0.01, 0.03], "biased": [False, True], "lr_all": [0.005, 0.02]}
SURPRISE: Grids = {
    "T1": grid(n_factors=[10], n_epochs=[20, 80], **_SURPRISE),
    "T2": grid(n_factors=[10, 20], n_epochs=[80], **_SURPRISE),
    "T3": grid(n_factors=[20], n_epochs=[20, 40], reg_all=[0.03, 0.06, 0.1], biased=[True], lr_all=[0.02]),
}
_NEIGHBOURS = grid(n_neighbors=[2, 3, 5, 10], weights=["uniform", "distance"])
NEIGHBOURS: Grids = {
    "T1": _NEIGHBOURS,
    "T2": _NEIGHBOURS,
    "T3": [{"n_neighbors": 50, "weights": "distance"}],
}
_ITERATIVE = grid(n_nearest_features=[20, 50], max_iter=[5, 10])
ITERATIVE: Grids = {
    "T1": _ITERATIVE,
    "T2": _ITERATIVE,
    "T3": [{"n_nearest_features": 50, "max_iter": 5}],
}

# ------------------------------------------------------------------------------------------- quick

QUICK: dict[str, Grids] = {
    "NB-LoRA": {
        "T1": grid(rank=[10], bound_scale=_scales(2.83, 8, 4), bias=[None], fixed=[FIXED]),
        "T2": grid(rank=[20], bound_scale=_scales(1, 4, 4), bias=["joint"], fixed=[FIXED]),
    },
    "NB-LoRA auto": NBLORA_AUTO,
    "cmfrec": {
        "T1": grid(k=[10], strength=_lambdas([0.1], [1e-3]), offset=[NOTHING, MEAN], niter=[10]),
        "T2": grid(k=[20], strength=_lambdas([1], [8e-3]), offset=[MEAN, BIASES], niter=[20]),
    },
    "softImpute-ALS": {
        "T1": grid(rank=[10], penalty=[0.03, 0.1], bias=[False], stop=[EXACT]),
        "T2": grid(rank=[20], penalty=[0.7, 1], bias=[False], stop=[EXACT]),
    },
    "torch factors": {
        "T1": grid(rank=[10], penalty=[0.1], bias=[False], steps=[50]),
        "T2": grid(rank=[20], penalty=[1], bias=[False], steps=[50]),
    },
    "Surprise SVD": {
        "T1": grid(n_factors=[10], reg_all=[0.01], biased=[False], lr_all=[0.02], n_epochs=[40]),
        "T2": grid(n_factors=[10], reg_all=[0.01], biased=[True], lr_all=[0.02], n_epochs=[40]),
    },
    "KNNImputer": {name: grid(n_neighbors=[3, 5], weights=["distance"]) for name in ("T1", "T2")},
    "IterativeImputer": {name: grid(n_nearest_features=[20], max_iter=[3]) for name in ("T1", "T2")},
}
