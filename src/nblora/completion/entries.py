"""The observed entries of a matrix on a device, and the two products with them that a fit is made of.

Nothing here forms an (m, n) array: a pass over the entries costs their number times the rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nblora.completion.observations import Observations


@dataclass(frozen=True, eq=False)
class Entries:
    """N observed entries, sorted by row and then by column.

    Attributes:
        shape: (m, n) of the matrix.
        values: (N,).
        columns: (N,) of each entry.
        row_starts: (m + 1,) where each row begins.
    """

    shape: tuple[int, int]
    values: Tensor
    columns: Tensor
    row_starts: Tensor

    @staticmethod
    def of(observations: Observations, *, device: torch.device | str, dtype: torch.dtype) -> Entries:
        """The entries on a device, in the precision of the fit."""
        largest = max(len(observations), *observations.shape)
        index = torch.int32 if largest < 2**31 else torch.int64  # half the memory, where it is enough
        return Entries(
            shape=observations.shape,
            values=torch.as_tensor(observations.values, device=device).to(dtype),
            columns=torch.as_tensor(observations.columns, device=device).to(index),
            row_starts=torch.as_tensor(observations.row_starts(), device=device).to(index),
        )

    @cached_property
    def by_column(self) -> Tensor:
        """(N,) the entries' numbers sorted by column and then by row."""
        return torch.argsort(self.columns, stable=True).to(self.columns.dtype)

    @property
    def row_of_entry(self) -> Tensor:
        """(N,) the row of each."""
        rows = torch.arange(self.shape[0], dtype=self.columns.dtype, device=self.columns.device)
        return torch.repeat_interleave(rows, self.row_starts.diff())

    @cached_property
    def mT(self) -> Entries:
        """The entries of the transposed matrix, in their own order."""
        m, n = self.shape
        starts = torch.zeros(n + 1, dtype=torch.int64, device=self.columns.device)
        starts[1:] = torch.bincount(self.columns, minlength=n).cumsum(0)
        return Entries(
            (n, m),
            self.values[self.by_column],
            self.row_of_entry[self.by_column],
            starts.to(self.columns.dtype),
        )

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def row_counts(self) -> Tensor:
        """(m,) entries of each row."""
        return self.row_starts.diff().to(self.values)

    @cached_property
    def _scratch(self) -> Tensor:
        return self._sparse(torch.empty_like(self.values))

    def products(self, left: Tensor, right: Tensor, *, less_values: bool = False) -> Tensor:
        """(N,) entries of left @ right.T for left (m, k) and right (n, k), less `values` if asked for.

        What is returned is overwritten by the next call: half the time would else go into new memory.
        """
        torch.sparse.sampled_addmm(
            self._sparse(self.values), left, right.mT, beta=-1.0 if less_values else 0.0, out=self._scratch
        )
        return self._scratch.values()

    def times_right(self, values: Tensor, right: Tensor) -> Tensor:
        """(m, k): the sparse matrix with these values (N,) times right (n, k)."""
        product: Tensor = self._sparse(values) @ right
        return product

    def transposed_times_left(self, values: Tensor, left: Tensor) -> Tensor:
        """(n, k): the transpose of the sparse matrix with these values (N,) times left (m, k)."""
        return self.mT.times_right(values[self.by_column], left)

    def _sparse(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(
            self.row_starts, self.columns, values, self.shape, check_invariants=False
        )


@contextmanager
def torch_sparse() -> Iterator[None]:
    """Where sparse tensors are used: without PyTorch's notice that their compressed layouts are young."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)", category=UserWarning)
        yield


class HalfSquares(torch.autograd.Function):
    """Half the sum of squares of left @ right.T less the values at the entries, and its gradients.

    In float64, since a line search compares sums whose difference float32 does not show.
    """

    @staticmethod
    def forward(ctx: Any, entries: Entries, left: Tensor, right: Tensor) -> Tensor:
        residual = entries.products(left, right, less_values=True)
        ctx.entries = entries
        ctx.save_for_backward(left, right)
        ctx.residual = residual  # valid until the next pass, so backward comes before it
        return squares(residual) / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        left, right = ctx.saved_tensors
        entries: Entries = ctx.entries
        residual = ctx.residual.mul_(grad.to(left.dtype))
        return None, entries.times_right(residual, right), entries.transposed_times_left(residual, left)


def squares(values: Tensor) -> Tensor:
    """() the sum of squares of (N,), in float64, without another array as large."""
    return (values @ values).double() if values.dtype == torch.float64 else _in_parts(values)


def _in_parts(values: Tensor) -> Tensor:
    parts = [part.double() for part in values.split(1 << 16)]
    return torch.stack([part @ part for part in parts]).sum()
