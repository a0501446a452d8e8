"""What was measured of one bounded matrix against its bound; shared by adapters and estimators."""

from __future__ import annotations

import math
from dataclasses import dataclass

TOLERANCE = 1e-6
"""Relative excess over a bound that counts as rounding of float32 factors (float64 has far less)."""


@dataclass(frozen=True)
class LayerCertificate:
    """What was measured of one layer's update.

    Attributes:
        name: module name in the base model.
        shape: (m, n) of the update, (out, in).
        rank: number of thin factors k; the rank of the update is at most this.
        singular_values: min(k, m, n) of them, in descending order, measured in float64 from the thin
            factors.
        norm: of the update, in the certificate's norm.
        bound: the absolute bound.
        scale: what the model multiplies the update by (`set_scale`); norm and bound include it.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    singular_values: tuple[float, ...]
    norm: float
    bound: float
    scale: float = 1.0

    @property
    def slack(self) -> float:
        """What is left: bound - norm."""
        return self.bound - self.norm

    @property
    def share(self) -> float:
        """How much of the bound is used: norm / bound, 0 where both are zero."""
        return self.norm / self.bound if self.bound else (0.0 if self.norm == 0 else math.inf)

    @property
    def holds(self) -> bool:
        """Whether norm <= bound up to rounding (`TOLERANCE`). NaN never holds."""
        return self.norm <= self.bound * (1 + TOLERANCE)
