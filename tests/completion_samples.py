"""Matrices with missing entries whose truth is known, for the tests of matrix completion."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Sample(NamedTuple):
    """A matrix as observed and as it is.

    Attributes:
        X: (m, n) with NaN for missing entries.
        truth: (m, n) without noise.
        noisy: (m, n) with the noise that an observation would have, also where there is none.
    """

    X: Array
    truth: Array
    noisy: Array

    @property
    def missing(self) -> NDArray[np.bool_]:
        return np.isnan(self.X)

    def error(self, predicted: Array) -> float:
        """Root mean square of predicted - truth over the missing entries."""
        return rms((predicted - self.truth)[self.missing])

    def coordinates(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
        rows, columns = np.nonzero(~self.missing)
        return rows, columns, self.X[rows, columns]

    def sparse(self) -> scipy.sparse.csr_array:
        """Stored where observed, observed zeros too."""
        rows, columns, values = self.coordinates()
        return scipy.sparse.coo_array((values, (rows, columns)), shape=self.X.shape).tocsr()


def sample(
    m: int,
    n: int,
    rank: int,
    *,
    rate: float = 0.5,
    noise: float = 0.1,
    effects: float = 0.0,
    popularity: float = 0.0,
    seed: int = 0,
) -> Sample:
    """A random matrix of a rank with entries of variance `rank`.

    Args:
        effects: standard deviation of additive effects of rows and of columns, around a mean of 3 of these.
        popularity: how much more some rows and columns are observed than others.
    Every row and column has an entry.
    """
    random = np.random.default_rng(seed)
    truth = random.normal(size=(m, rank)) @ random.normal(size=(rank, n))
    truth += effects * (3 + random.normal(size=(m, 1)) + random.normal(size=(1, n)))
    noisy = truth + noise * random.normal(size=(m, n))
    likely = np.exp(popularity * (random.normal(size=(m, 1)) + random.normal(size=(1, n))))
    observed = random.random((m, n)) < rate * likely / likely.mean()
    diagonal = np.arange(max(m, n))
    observed[diagonal % m, diagonal % n] = True
    return Sample(np.where(observed, noisy, np.nan), truth, noisy)


def rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
