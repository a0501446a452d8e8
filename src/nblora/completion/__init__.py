"""Low-rank matrix completion under a norm bound, as a scikit-learn estimator (MATH.md §8)."""

from __future__ import annotations

try:
    import scipy  # noqa: F401
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"matrix completion needs scikit-learn and SciPy, and {error.name} is missing: "
        "pip install 'nblora[completion]'"
    ) from error

from nblora.completion.estimator import NBMatrixCompletion

__all__ = ["NBMatrixCompletion"]
