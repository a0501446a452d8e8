"""What a user calls a matrix with missing entries, as sorted coordinates.

Dense arrays, data frames, sparse matrices and coordinates all become the same `Observations`, so that a fit
cannot depend on how the entries were given.
"""

from __future__ import annotations

import numbers
import operator
import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

Index = NDArray[np.int32] | NDArray[np.int64]
Duplicates = Literal["error", "mean"]
_NAMED = 3  # so many of the offending entries are named in an error


@dataclass(frozen=True, eq=False)
class Observations:
    """N observed entries of an (m, n) matrix, sorted by row and then by column, each once.

    Attributes:
        shape: (m, n).
        rows: (N,), 0 <= row < m, and columns: (N,), 0 <= column < n; int32 where that is enough, else int64.
        values: (N,) float64, finite.
    """

    shape: tuple[int, int]
    rows: Index
    columns: Index
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.values)

    def only(self, chosen: NDArray[Any]) -> Observations:
        """Those at some positions, or where a mask is true; the order stays."""
        if chosen.dtype != bool:
            chosen = np.sort(chosen)
        return Observations(self.shape, self.rows[chosen], self.columns[chosen], self.values[chosen])

    def row_starts(self) -> NDArray[np.int64]:
        """(m + 1,) where the entries of each row begin."""
        counts = np.bincount(self.rows, minlength=self.shape[0])
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

    def updated(self, new: Observations) -> Observations:
        """These and the new ones, which count where both have an entry; the shape is the larger one's."""
        m, n = (max(a, b) for a, b in zip(self.shape, new.shape))
        rows = np.concatenate([new.rows, self.rows])
        columns = np.concatenate([new.columns, self.columns])
        values = np.concatenate([new.values, self.values])
        order = np.lexsort((columns, rows))  # stable: of equal entries the new one is first
        first = ~_repeats(rows[order], columns[order])
        chosen = order[first]
        return Observations((m, n), rows[chosen], columns[chosen], values[chosen])


def from_coordinates(
    rows: ArrayLike,
    columns: ArrayLike,
    values: ArrayLike,
    shape: tuple[int, int] | None = None,
    *,
    duplicates: Duplicates = "error",
) -> Observations:
    """Observations from the coordinates of entries, in any order.

    Args:
        rows, columns: (N,) integers >= 0.
        values: (N,) finite numbers.
        shape: (m, n); by default as small as the coordinates allow.
        duplicates: "error", or "mean" to average the values of entries that are given more than once.

    Raises:
        ValueError: for anything else.
    """
    row, column = _indices(rows, "rows"), _indices(columns, "cols")
    value = _numbers(values)
    if not len(row) == len(column) == len(value):
        raise ValueError(
            f"rows, cols and values must have the same length, got {len(row)}, {len(column)} and {len(value)}"
        )
    if shape is None:
        shape = (int(row.max(initial=-1)) + 1, int(column.max(initial=-1)) + 1)
    m, n = _checked_shape(shape)
    _refuse_beyond(row, column, (m, n))
    return _sorted((m, n), row, column, value, duplicates)


def from_places(rows: ArrayLike, columns: ArrayLike, shape: tuple[int, int]) -> tuple[Index, Index]:
    """Checked indices (N,) of places in a matrix of this shape, in the order given, repeats allowed."""
    row, column = _indices(rows, "rows"), _indices(columns, "cols")
    if len(row) != len(column):
        raise ValueError(f"rows and cols must have the same length, got {len(row)} and {len(column)}")
    _refuse_beyond(row, column, shape)
    return row, column


def _refuse_beyond(rows: Index, columns: Index, shape: tuple[int, int]) -> None:
    for name, index, size in zip(("rows", "cols"), (rows, columns), shape):
        if len(index) and index.max() >= size:
            raise ValueError(f"{name} must be below {size}, the size in shape={shape}, got {index.max()}")


def row_keys(observations: Observations) -> NDArray[np.uint64]:
    """(m,) a hash of the columns and values of each row's entries."""
    bits = (observations.values + 0.0).view(np.uint64)  # -0.0 + 0.0 is 0.0
    mixed = bits ^ (observations.columns.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    sums = np.zeros(len(mixed) + 1, dtype=np.uint64)
    np.cumsum(mixed, out=sums[1:])  # modulo 2^64, so that differences are the sums of rows
    return np.diff(sums[observations.row_starts()])


def from_sparse(matrix: Any, *, missing_values: float, duplicates: Duplicates) -> Observations:
    """The stored entries of a scipy sparse matrix or array; explicit zeros count.

    Args:
        missing_values: stored entries of this value are not observed, unless it is NaN, which a sparse matrix
            has no need to store and which is refused.
    """
    _refuse_padding(matrix)
    coordinates = scipy.sparse.coo_array(matrix)  # of any format, without adding up repeated entries
    row, column = (np.asarray(index, np.int64) for index in coordinates.coords)
    value = _numbers(coordinates.data)
    if not np.isnan(missing_values):
        kept = ~_is_missing(coordinates.data, missing_values)
        row, column, value = row[kept], column[kept], value[kept]
    m, n = coordinates.shape
    return _sorted((m, n), row, column, value, duplicates)


def _refuse_padding(matrix: Any) -> None:
    """Refuse formats that store blocks or diagonals, where a stored zero may be no entry at all."""
    padded = matrix.format == "bsr" and matrix.blocksize != (1, 1) and np.any(matrix.data == 0)
    if matrix.format == "dia":
        columns = np.arange(matrix.data.shape[1])
        rows = columns - matrix.offsets[:, None]
        inside = (rows >= 0) & (rows < matrix.shape[0]) & (columns < matrix.shape[1])
        padded = bool(np.any(matrix.data[inside] == 0))
    if padded:
        raise ValueError(
            "a sparse X must tell an observed zero from one that is not stored, got zeros in the format "
            f'"{matrix.format}", which pads; build X as "coo", "csr" or "csc"'
        )


def from_dense(array: NDArray[Any], *, missing_values: float) -> Observations:
    """The entries of an (m, n) array that are not `missing_values` (NaN or a number)."""
    observed = ~_is_missing(array, missing_values)
    rows, columns = np.nonzero(observed)
    return _sorted(array.shape, rows, columns, _numbers(array[observed]), "error")


def _is_missing(array: NDArray[Any], missing_values: float) -> NDArray[np.bool_]:
    if np.isnan(missing_values):
        absent: NDArray[np.bool_] = np.isnan(array)
        return absent
    marker: Any = missing_values
    if array.dtype.kind == "f":
        marker = np.asarray(missing_values).astype(array.dtype)  # as the array has it, rounded
    missing: NDArray[np.bool_] = array == marker
    return missing


def frame_as_array(frame: Any, missing_values: float) -> NDArray[np.float64]:
    """A pandas data frame as (m, n) with NaN for what is missing: NA, None, NaN, or `missing_values`.

    Raises:
        ValueError: for a column that is not numeric, or missing entries beside a number that stands for them.
    """
    result = np.empty(frame.shape)
    for place, name in enumerate(frame.columns):
        column = frame.iloc[:, place]
        if getattr(column.dtype, "kind", "O") not in "iufb":
            _refuse_text(column, name)
        missing = column.isna().to_numpy()
        if not np.isnan(missing_values):
            if missing.any():
                raise ValueError(
                    f"observed entries must be finite numbers, got a missing one in column {name!r} beside "
                    f"missing_values={missing_values!r}"
                )
            missing = _is_missing(np.asarray(column), missing_values)
        result[:, place] = np.asarray(column.to_numpy(dtype=np.float64, na_value=np.nan))
        result[missing, place] = np.nan
    return result


def _refuse_text(column: Any, name: object) -> None:
    for value in column[column.notna()]:
        try:
            if not isinstance(value, str):
                float(value)
                continue
        except (TypeError, ValueError):
            pass
        raise ValueError(f"columns must be numeric, got {type(value).__name__} {value!r} in column {name!r}")


def _sorted(
    shape: tuple[int, ...],
    rows: Index,
    columns: Index,
    values: NDArray[np.float64],
    duplicates: Duplicates,
) -> Observations:
    m, n = shape
    wrong = ~np.isfinite(values)
    if wrong.any():
        at = np.flatnonzero(wrong)
        raise ValueError(
            "observed entries must be finite numbers, got "
            + _listed([f"{values[i]} at ({rows[i]}, {columns[i]})" for i in at[:_NAMED]], len(at))
        )
    small = max(shape) < 2**31
    rows, columns = (index.astype(np.int32 if small else np.int64, copy=False) for index in (rows, columns))
    later = rows[1:] > rows[:-1]
    later |= (rows[1:] == rows[:-1]) & (columns[1:] > columns[:-1])
    if not later.all():
        order = np.lexsort((columns, rows))
        rows, columns, values = rows[order], columns[order], values[order]
    else:  # the caller may change what is its own
        rows, columns, values = rows.copy(), columns.copy(), values.copy()
    repeats = _repeats(rows, columns)
    if repeats.any():
        if duplicates != "mean":
            at = np.flatnonzero(repeats)
            raise ValueError(
                "each (row, column) must be given once, got more than one value for "
                + _listed([f"({rows[i]}, {columns[i]})" for i in at[:_NAMED]], len(at))
                + '; duplicates="mean" averages them'
            )
        starts = np.flatnonzero(~repeats)
        counts = np.diff(np.append(starts, len(values)))
        rows, columns = rows[starts], columns[starts]
        values = np.add.reduceat(values, starts) / counts
    return Observations((m, n), rows, columns, values)


def _repeats(rows: Index, columns: Index) -> NDArray[np.bool_]:
    """(N,) whether a sorted entry has the coordinates of the one before."""
    repeats = np.zeros(len(rows), dtype=bool)
    repeats[1:] = (rows[1:] == rows[:-1]) & (columns[1:] == columns[:-1])
    return repeats


def _listed(examples: list[str], count: int) -> str:
    more = f" and {count - len(examples)} more" if count > len(examples) else ""
    return ", ".join(examples) + more


def _indices(given: ArrayLike, name: str) -> Index:
    index = np.asarray(given)
    if index.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {index.shape}")
    if index.size == 0:
        return np.zeros(0, dtype=np.int64)
    whole = index.dtype.kind in "iu"
    if index.dtype.kind == "f":
        wrong = index[~(np.isfinite(index) & (index == np.floor(index)))]
        if len(wrong):
            raise ValueError(f"{name} must be integers, got {wrong[0]!r}")
        whole = True
    if not whole:
        for value in index:
            if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
                raise ValueError(f"{name} must be integers, got {value!r}")
    if index.min() < 0:
        raise ValueError(f"{name} must be at least 0, got {index.min()}")
    if index.max() >= 2**53:  # beyond, floats are no integers, and no matrix is that large
        raise ValueError(f"{name} must be below 2**53, got {index.max()}")
    if index.dtype in (np.int32, np.int64):
        return index
    return index.astype(np.int64)


def _numbers(given: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(given)
    if values.dtype.kind == "c":
        raise ValueError("values must be real numbers, got complex data: Complex data not supported")
    try:
        numbers: NDArray[np.float64] = values.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"values must be numbers, got an array of {values.dtype}: {error}") from None
    if numbers.ndim != 1:
        raise ValueError(f"values must be one-dimensional, got shape {numbers.shape}")
    return numbers


def _checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    try:
        m, n = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        raise ValueError(f"shape must be two integers (m, n), got shape={shape!r}") from None
    if m < 0 or n < 0:
        raise ValueError(f"shape must not be negative, got shape={shape!r}")
    return m, n


def refuse_what_does_not_fit(shape: tuple[int, int], itemsize: int) -> None:
    """A clear refusal before a dense array of this shape is allocated.

    Raises:
        MemoryError: where it needs more than the memory that the system says is free.
    """
    needed = shape[0] * shape[1] * itemsize
    free = free_memory()
    if free is not None and needed > free:
        raise MemoryError(
            f"the completed matrix must fit into memory, got {shape[0]} x {shape[1]} entries of "
            f"{needed / 1e9:.3g} GB where {free / 1e9:.3g} GB are free; predict(rows, cols) gives single "
            "entries, and transform completes some rows"
        )


def free_memory() -> int | None:
    """Bytes of memory that can be had, or None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
