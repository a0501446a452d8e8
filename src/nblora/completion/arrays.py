"""Matrices in NumPy's and SciPy's files: dense with NaN, sparse, or as coordinates."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
from numpy.typing import NDArray

from nblora.completion.table import Form, Layout, Lines, Positions, Table, TableError, Values

_ROWS, _COLUMNS, _VALUES = ("row", "rows"), ("col", "cols", "column", "columns"), ("data", "value", "values")
_IDS = ("row_ids", "column_ids")  # written beside a matrix that has ids, so that nothing is lost


@dataclass(frozen=True)
class ArrayForm(Form):
    """How an array file was written.

    Attributes:
        keys: of the arrays in an npz file: of the matrix, or of rows, columns and values.
        dtype: of the values; the completed ones have it too where it is a floating type.
    """

    keys: tuple[str, ...] = ()
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float64))


def read_arrays(path: Path, missing: tuple[float, ...]) -> Table:
    """The observed entries in a .npy or .npz file.

    Args:
        missing: what stands for a missing entry, beside NaN.

    Raises:
        TableError: if the file is none, or has no matrix.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _dense(path, loaded, (), missing)
        with loaded:
            if "format" in loaded and "shape" in loaded:
                return _sparse(path, missing)
            arrays = {key: loaded[key] for key in loaded.files}
    except TableError:
        raise
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise TableError(
            f"the file must be an array file of NumPy or SciPy: {' '.join(str(error).split())} in {path}"
        ) from error
    trio = tuple(next((key for key in keys if key in arrays), "") for keys in (_ROWS, _COLUMNS, _VALUES))
    if all(trio):
        return _coordinates(path, arrays, trio, missing)
    matrices = [key for key, array in arrays.items() if array.ndim == 2 and key not in _IDS]
    if len(matrices) != 1:
        found = ", ".join(f"{key} {array.shape}" for key, array in arrays.items()) or "nothing"
        raise TableError(
            "an .npz file must have one two-dimensional array, the arrays row, col and data, or a sparse "
            f"matrix of scipy.sparse.save_npz, got {found} in {path}"
        )
    return _dense(path, arrays[matrices[0]], (matrices[0],), missing)


def read_index(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """The arrays row and col of an .npz file.

    Raises:
        TableError: if it has none, or they are no integers.
    """
    try:
        with np.load(path, allow_pickle=False) as loaded:
            names = [next((key for key in keys if key in loaded.files), "") for keys in (_ROWS, _COLUMNS)]
            if not all(names):
                found = ", ".join(loaded.files) or "none"
                raise TableError(f"the file must have arrays row and col, got {found} in {path}")
            row, column = (loaded[name] for name in names)
    except TableError:
        raise
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise TableError(
            f"the file must be an .npz file of NumPy: {' '.join(str(error).split())} in {path}"
        ) from error
    if row.ndim != 1 or row.shape != column.shape or {row.dtype.kind, column.dtype.kind} - {*"iu"}:
        raise TableError(
            f"row and col must be arrays of integers of one length, got {row.dtype} {row.shape} and "
            f"{column.dtype} {column.shape} in {path}"
        )
    return row, column


def _dense(path: Path, array: NDArray[Any], keys: tuple[str, ...], missing: tuple[float, ...]) -> Table:
    if array.ndim != 2 or not array.size:
        raise TableError(f"the array must have two dimensions and entries, got shape {array.shape} in {path}")
    _check_numbers(array, path)
    numbers = array.astype(np.float64)
    observed = ~np.isnan(numbers)
    for value in missing:
        observed &= numbers != value
    rows, columns = np.nonzero(observed)
    form = ArrayForm(description="matrix with missing entries", keys=keys, dtype=array.dtype)
    return _table(path, "wide", array.shape, rows, columns, numbers[observed], form)


def _sparse(path: Path, missing: tuple[float, ...]) -> Table:
    matrix = scipy.sparse.load_npz(path)
    if matrix.ndim != 2 or matrix.format not in ("csr", "csc", "coo"):
        raise TableError(
            f"a sparse matrix must have two dimensions and be in format csr, csc or coo, in which all stored "
            f"entries are observed, got shape {matrix.shape} and format {matrix.format} in {path}"
        )
    _check_numbers(matrix.data, path)
    entries = matrix.tocoo()  # keeps entries that are stored twice, and zeros
    form = ArrayForm(
        description=f"sparse matrix ({matrix.format}), stored entries are observed", dtype=matrix.dtype
    )
    rows, columns = (np.asarray(index, dtype=np.int64) for index in (entries.row, entries.col))
    return _observed(path, "wide", matrix.shape, rows, columns, entries.data, form, missing)


def _coordinates(
    path: Path, arrays: dict[str, NDArray[Any]], keys: tuple[str, ...], missing: tuple[float, ...]
) -> Table:
    rows, columns, values = (arrays[key] for key in keys)
    if not rows.ndim == columns.ndim == values.ndim == 1 or not len(rows) == len(columns) == len(values):
        shapes = ", ".join(f"{key} {arrays[key].shape}" for key in keys)
        raise TableError(f"coordinates must be three arrays of one length, got {shapes} in {path}")
    _check_numbers(values, path)
    for key, index in ((keys[0], rows), (keys[1], columns)):
        if index.dtype.kind not in "iu":
            raise TableError(
                f"coordinates in an .npz file must be integers, got {key} of type {index.dtype} in {path}; "
                "a CSV or Parquet file takes ids of any type"
            )
        if len(index) and index.min() < 0:
            raise TableError(
                f"coordinates in an .npz file must be at least 0, got {index.min()} in {key} of {path}; a "
                "CSV or Parquet file takes ids of any type"
            )
    if "shape" in arrays:
        given = arrays["shape"]
        if given.shape != (2,) or given.dtype.kind not in "iu":
            raise TableError(f"shape must be two integers, got {given.tolist()} in {path}")
        shape = (int(given[0]), int(given[1]))
    else:
        shape = (int(rows.max(initial=-1)) + 1, int(columns.max(initial=-1)) + 1)
    for key, index, size in ((keys[0], rows, shape[0]), (keys[1], columns, shape[1])):
        if len(index) and index.max() >= size:
            raise TableError(f"coordinates must be below shape {shape}, got {index.max()} in {key} of {path}")
    form = ArrayForm(description="coordinates of entries", keys=keys, dtype=values.dtype)
    return _observed(
        path, "long", shape, rows.astype(np.int64), columns.astype(np.int64), values, form, missing
    )


def _observed(
    path: Path,
    layout: Layout,
    shape: tuple[int, int],
    rows: Positions,
    columns: Positions,
    data: NDArray[Any],
    form: ArrayForm,
    missing: tuple[float, ...],
) -> Table:
    """A table of the entries that are not missing."""
    values = data.astype(np.float64)
    for value in missing:
        values[values == value] = np.nan
    kept = ~np.isnan(values)
    table = _table(path, layout, shape, rows[kept], columns[kept], values[kept], form)
    if layout == "wide" or kept.all():
        return table
    return replace(table, lines=Lines(rows, columns, values))


def _table(
    path: Path,
    layout: Layout,
    shape: tuple[int, ...],
    rows: Positions,
    columns: Positions,
    values: Values,
    form: ArrayForm,
) -> Table:
    return Table(
        source=path,
        layout=layout,
        row_ids=pd.RangeIndex(shape[0]),
        column_ids=pd.RangeIndex(shape[1]),
        rows=rows,
        columns=columns,
        values=values,
        form=form,
    )


def _check_numbers(array: NDArray[Any], path: Path) -> None:
    if array.dtype.kind not in "iuf":
        raise TableError(f"values must be real numbers, got an array of {array.dtype} in {path}")


def write_matrix(path: Path, suffix: str, table: Table, completed: Values) -> None:
    """A completed matrix as .npy, or as .npz under the name that it had, with the ids if there are some."""
    form = table.form
    dtype = form.dtype if isinstance(form, ArrayForm) and form.dtype.kind == "f" else np.dtype(np.float64)
    matrix = completed.astype(dtype, copy=False)
    with path.open("wb") as file:  # NumPy appends an ending to a name without one
        if suffix == ".npy":
            np.save(file, matrix)
            return
        key = form.keys[0] if isinstance(form, ArrayForm) and len(form.keys) == 1 else "X"
        np.savez_compressed(file, **{key: matrix}, **_ids(table))  # type: ignore[arg-type]


def write_entries(path: Path, table: Table, rows: Positions, columns: Positions, values: Values) -> None:
    """Entries as the arrays row, col and data, with the shape, and the ids if there are some."""
    keys = table.form.keys if isinstance(table.form, ArrayForm) and len(table.form.keys) == 3 else ()
    row, column, value = keys or ("row", "col", "data")
    arrays = {row: rows, column: columns, value: values, "shape": np.array(table.shape)} | _ids(table)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _ids(table: Table) -> dict[str, NDArray[Any]]:
    found = {}
    for key, ids, there in zip(
        _IDS, (table.row_ids, table.column_ids), (table.form.has_row_ids, table.form.has_column_ids)
    ):
        if there:
            plain = ids.to_numpy()
            if plain.dtype == object:  # which NumPy could only pickle
                plain = np.array([" ".join(map(str, i)) if isinstance(i, tuple) else str(i) for i in plain])
            found[key] = plain
    return found
