"""Rows that a fit has not seen, from their observed entries and the columns' factors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nblora.completion.observations import Observations

Array = NDArray[np.float64]
_BATCH = 2048  # rows at once: their (d, d) systems are all that is large


@dataclass(frozen=True)
class RowPrior:
    """Normal distribution of a row's coefficients, and the variance of the noise.

    Attributes:
        mean: (d,).
        precision: (d, d) inverse covariance times the variance of the noise: the ridge.
    """

    mean: Array
    precision: Array

    @staticmethod
    def of(rows: Array, noise: float) -> RowPrior:
        """From the coefficients (m, d) of fitted rows, and the variance of the noise of an entry.

        The posterior mean under this prior is the ridge regression that shrinks towards the mean row, most
        along those directions in which fitted rows differ least.
        """
        d = rows.shape[1]
        mean = rows.mean(0)
        centred = rows - mean
        covariance = centred.T @ centred / max(len(rows) - 1, 1)
        # directions in which rows do not differ keep a ridge that is large but finite
        spread = np.trace(covariance)
        floor = 1e-10 * (spread if spread > 1e-280 else 1.0) * np.eye(d)  # whose inverse is finite
        precision = noise * np.linalg.pinv(covariance + floor, hermitian=True)
        return RowPrior(mean, (precision + precision.T) / 2)


def fold_in(new: Observations, design: Array, known: Array, prior: RowPrior) -> Array:
    """Coefficients (rows, d) of the rows of `new`: ridge regressions on the columns' factors.

    Args:
        new: entries of (rows, n).
        design: (n, d) factors of the columns.
        known: (n,) what is added to every row whatever its coefficients.
        prior: what the ridge shrinks to; a row without entries gets its mean.
    """
    m, d = new.shape[0], design.shape[1]
    coefficients = np.tile(prior.mean, (m, 1))
    starts = new.row_starts()
    residual = new.values - known[new.columns] - design[new.columns] @ prior.mean
    for first in range(0, m, _BATCH):
        last = min(first + _BATCH, m)
        begin, end = starts[first], starts[last]
        if begin == end:
            continue
        factors = design[new.columns[begin:end]]  # (e, d)
        filled = np.flatnonzero(np.diff(starts[first : last + 1])) + first
        cuts = starts[filled] - begin
        systems = np.empty((len(filled), d, d))
        for i in range(d):
            systems[:, i] = np.add.reduceat(factors[:, i : i + 1] * factors, cuts, axis=0)
        targets = np.add.reduceat(factors * residual[begin:end, None], cuts, axis=0)
        systems += prior.precision
        # a system can be singular only where there is no noise and nothing to learn: the least change then
        scale = np.einsum("rii->r", systems)[:, None, None] / d
        systems += 1e-12 * np.where(scale > 0, scale, 1.0) * np.eye(d)
        coefficients[filled] += np.linalg.solve(systems, targets[..., None])[..., 0]
    return coefficients
