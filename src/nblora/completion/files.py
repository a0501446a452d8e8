"""Tables that are to be completed, in files: CSV, Parquet, arrays of NumPy and SciPy, pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nblora.checkpoints.storage import PathLike, one_line
from nblora.completion import arrays, frames, pictures
from nblora.completion.arrays import ArrayForm
from nblora.completion.frames import Choices, FrameForm
from nblora.completion.pictures import PictureForm
from nblora.completion.table import Layout, Positions, Table, TableError, Values

TEXTS = (".csv", ".tsv")
TABLES = (*TEXTS, ".parquet", ".npz", ".npy")
PLOTS = (".png", ".pdf", ".svg")

_LINES = 2**12  # of a wide table that are text in memory at once


def read_table(path: PathLike, choices: Choices | None = None, *, duplicates: str = "error") -> Table:
    """The observed entries of a table with missing ones.

    CSV, TSV and Parquet files hold wide tables (a line for each row of the matrix, blanks for missing
    entries) or long ones (a line for each entry: row id, column id, value); .npy and .npz files a matrix
    with NaN, a sparse matrix whose stored entries are observed, or coordinates; pictures the pixels that are
    not missing.

    Args:
        path: its ending says the format.
        choices: what the user says about it; by default everything is recognised.
        duplicates: what to do with a pair that is given several times: "error", or "mean" to take the mean.

    Raises:
        TableError: if it cannot be used; the message is one line.
    """
    path, choices = Path(path), choices or Choices()
    if not path.is_file():
        what = "which is a folder" if path.is_dir() else "which does not exist"
        raise TableError(f"the table must be a file, got {path}, {what}")
    suffix = path.suffix.lower()
    try:
        table = _read(path, suffix, choices, duplicates)
    except OSError as error:
        raise TableError(f"{path} cannot be read: {one_line(error)}") from error
    except MemoryError as error:
        raise TableError(f"the table must fit into memory, got {path}") from error
    return table.checked().unique(duplicates)


def _read(path: Path, suffix: str, choices: Choices, duplicates: str) -> Table:
    if suffix in TEXTS:
        return frames.to_table(frames.read_text(path, choices.header), choices, duplicates=duplicates)
    if suffix == ".parquet":
        return frames.to_table(frames.read_parquet(path), choices, duplicates=duplicates)
    for name in ("index", "row", "column", "value"):
        if getattr(choices, name):
            raise TableError(f"{name} must be given for a CSV or Parquet file only, got {path}")
    if suffix in (".npz", ".npy"):
        table = arrays.read_arrays(path, tuple(map(_number, choices.missing)))
    elif suffix in pictures.READ:
        table = pictures.read_picture(path, choices.missing)
    else:
        raise TableError(f"the table must be one of {', '.join(TABLES)} or a picture, got {path}")
    if choices.layout not in ("auto", table.layout):
        raise TableError(f"layout must be {table.layout} for what is in {path}, got {choices.layout}")
    return table


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TableError(f"missing must be a number for an array, got {text!r}") from None


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a row and a column to predict.

    Attributes:
        rows: (P,) numbers of rows, -1 for ids that the table lacks.
        columns: (P,) numbers of columns, the same.
        row_ids: (P,) ids of the rows, in the type of the table's, unless the table lacks some of them.
        column_ids: (P,) ids of the columns.
    """

    rows: Positions
    columns: Positions
    row_ids: pd.Index
    column_ids: pd.Index

    @staticmethod
    def of(table: Table, rows: Positions, columns: Positions) -> Pairs:
        """Pairs of the table."""
        return Pairs(rows, columns, table.row_ids.take(rows), table.column_ids.take(columns))


def read_pairs(path: PathLike, table: Table) -> Pairs:
    """Pairs of a row and a column of a table to predict.

    The columns of the file are those with the names of the table's, or else the first two; arrays are row and
    col.

    Raises:
        TableError: if there are none, or none of them has ids of the table.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise TableError(f"the pairs to predict must be a file, got {path}, which does not exist")
    if suffix not in (*TEXTS, ".parquet", ".npz"):
        raise TableError(f"the pairs to predict must be a .csv, .tsv, .parquet or .npz file, got {path}")
    try:
        row, column = _pair_columns(path, suffix, table)
    except OSError as error:
        raise TableError(f"{path} cannot be read: {one_line(error)}") from error
    if not len(row):
        raise TableError(f"the pairs to predict must be at least one, got none in {path}")
    for word, ids in (("row", row), ("column", column)):
        if ids.isna().any() or ids.isin([""]).any():
            raise TableError(f"the pairs to predict must have ids, got a blank {word} id in {path}")
    if isinstance(table.row_ids, pd.MultiIndex):
        raise TableError(f"pairs need row ids in one column, got {table.row_ids.nlevels} in {table.source}")
    rows, columns = table.numbers_of(row, "rows"), table.numbers_of(column, "columns")
    for word, ids, found in (("row", row, rows), ("column", column, columns)):
        if (found < 0).all():
            raise TableError(
                f"the pairs to predict must have {word} ids of {table.source}, got none, but "
                f"{ids.iloc[0]!r}, in {path}"
            )
    known = Pairs.of(table, rows.clip(0), columns.clip(0))
    return replace(
        known,
        rows=rows,
        columns=columns,
        row_ids=pd.Index(row) if (rows < 0).any() else known.row_ids,
        column_ids=pd.Index(column) if (columns < 0).any() else known.column_ids,
    )


def _pair_columns(path: Path, suffix: str, table: Table) -> tuple[pd.Series[Any], pd.Series[Any]]:
    if suffix == ".npz":
        row, column = arrays.read_index(path)
        return pd.Series(row), pd.Series(column)
    sheet = frames.read_text(path, None) if suffix in TEXTS else frames.read_parquet(path)
    names = [str(name) for name in sheet.names]
    if len(names) < 2:
        raise TableError(
            f"the pairs to predict must have two columns, for row ids and column ids, got {len(names)} "
            f"in {path}"
        )
    known = [names.index(name) if name in names else None for name in table.form.names[:2]]
    first, second = (0, 1) if None in known else known
    assert first is not None
    assert second is not None
    return frames.ids_of(sheet, first), frames.ids_of(sheet, second)


# --- writing ---


def check_target(out: PathLike, table: Table, layout: Layout) -> str:
    """The ending of a file that a completed table can be written to; said before a long fit.

    Raises:
        TableError: if it cannot.
    """
    out = Path(out)
    suffix = out.suffix.lower()
    if isinstance(table.form, PictureForm):
        if suffix not in pictures.WRITTEN:
            raise TableError(f"a picture must be written as one of {', '.join(pictures.WRITTEN)}, got {out}")
        if suffix in (".jpg", ".jpeg") and (table.form.alpha is not None or table.form.depth > 255):
            raise TableError(f"a picture with opacity or 16 bits must be written as .png, got {out}")
    elif suffix not in TABLES:
        raise TableError(f"a completed table must be written as one of {', '.join(TABLES)}, got {out}")
    elif suffix == ".npy" and layout == "long":
        raise TableError(f"a long table must be written as .csv, .tsv, .parquet or .npz, got {out}")
    check_place(out)
    return suffix


def check_place(out: Path) -> None:
    """Refuse a place where no file can be written.

    Raises:
        TableError: if it is a folder or something else than a file, or its folder cannot be written to.
    """
    if out.exists() and not out.is_file():
        raise TableError(f"{out} cannot be written: it is no regular file")
    folder = next((place for place in out.absolute().parents if place.exists()), None)
    if folder is None or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise TableError(f"{out} cannot be written: {folder} is no folder that can be written to")


def write_wide(
    path: Path, suffix: str, table: Table, completed: Values, kept: NDArray[np.bool_], digits: int | None
) -> None:
    """Write a completed matrix like the table that it was made from.

    Args:
        path: to write to.
        suffix: the format.
        completed: (m, n).
        kept: (m, n) where the entry is the observed one.
        digits: of predicted numbers in text files; None for as many as they have.
    """
    if isinstance(table.form, PictureForm):
        pictures.write_picture(path, suffix, table.form, completed, ~kept)
    elif suffix in (".npy", ".npz"):
        arrays.write_matrix(path, suffix, table, completed)
    else:
        names, index, named = frames.wide_names(table)
        if suffix == ".parquet":
            frame = frames.wide_frame(table, completed, kept, slice(None), None)
            _write_parquet(path, frame, names, index)
            return
        text = number_text(digits)
        for start in range(0, max(1, len(completed)), _LINES):
            lines = slice(start, start + _LINES)
            frame = frames.wide_frame(table, completed, kept, lines, text)
            _append_text(path, suffix, table, frame, names if named and not start else None)


def write_long(
    path: Path, suffix: str, table: Table, pairs: Pairs, values: Values, digits: int | None
) -> None:
    """Write the values (P,) of pairs, one a line; otherwise as `write_wide`."""
    if suffix == ".npz":
        arrays.write_entries(path, table, pairs.rows, pairs.columns, values)
        return
    text = None if suffix == ".parquet" else number_text(digits)
    frame = frames.long_frame(table, pairs.row_ids, pairs.column_ids, values, text)
    _write_frame(path, suffix, table, frame)


def write_lines(
    path: Path, suffix: str, table: Table, values: Values, kept: NDArray[np.bool_], digits: int | None
) -> None:
    """Write a long table line by line, all of its columns, with values (L,) where they are not kept (L,)."""
    lines = table.lines
    assert lines is not None
    if isinstance(table.form, ArrayForm) or suffix == ".npz":
        write_long(path, suffix, table, Pairs.of(table, lines.rows, lines.columns), values, digits)
        return
    form = table.form
    assert isinstance(form, FrameForm)
    assert form.sheet is not None
    sheet, number = form.sheet, form.ids[2]
    text = None if suffix == ".parquet" else number_text(digits)
    frame = sheet.frame.copy(deep=False)
    frame[number] = frames.filled(frame[number], values, kept, text)
    _write_frame(path, suffix, table, frame.set_axis(list(sheet.names), axis=1), sheet.index, sheet.header)


def number_text(digits: int | None) -> Callable[[float], str]:
    """What writes a number into a text file."""
    return (lambda value: repr(float(value))) if digits is None else lambda value: f"{value:.{digits}g}"


def _write_frame(
    path: Path, suffix: str, table: Table, frame: pd.DataFrame, index: int = 0, named: bool = True
) -> None:
    if suffix == ".parquet":
        _write_parquet(path, frame, list(frame.columns), index)
    else:
        _append_text(path, suffix, table, frame, list(frame.columns) if named else None)


def _write_parquet(path: Path, frame: pd.DataFrame, names: list[Any], index: int) -> None:
    """A Parquet file, the first columns of it as the index of a data frame."""
    columns = [str(name) for name in names[index:]]
    if len({*columns}) < len(columns):
        raise TableError("a Parquet file must have different column names, got some of them twice")
    frame = frame.set_axis([str(n) if isinstance(n, tuple) else n for n in names], axis=1)
    if index:
        labels = [frame.iloc[:, i] for i in range(index)]
        frame = frame.iloc[:, index:].set_axis(pd.Index(labels[0]) if index == 1 else labels, axis=0)
        frame.index.names = [None if name == "" else name for name in names[:index]]
    elif any(not isinstance(name, str) for name in names):
        frame = frame.set_axis([str(name) for name in names], axis=1)
    frame.to_parquet(path, engine="pyarrow", index=bool(index))


def _append_text(path: Path, suffix: str, table: Table, frame: pd.DataFrame, names: list[Any] | None) -> None:
    sheet = table.form.sheet if isinstance(table.form, FrameForm) else None
    separator = "\t" if suffix == ".tsv" else ","
    if sheet is not None and sheet.separator and sheet.source.suffix.lower() == suffix:
        separator = sheet.separator
    if names is not None:
        frame = frame.set_axis(names, axis=1)
    frame.to_csv(path, sep=separator, header=names is not None, index=False, mode="a", lineterminator="\n")
