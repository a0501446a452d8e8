"""Low-rank matrix completion under a norm bound, as a scikit-learn estimator (MATH.md §8)."""

from __future__ import annotations

from nblora.completion.estimator import NBMatrixCompletion

__all__ = ["NBMatrixCompletion"]
