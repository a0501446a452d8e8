"""Tables with named columns, CSV and Parquet files: what is an id, what a value, and how they are written.

A wide table has a line for each row of the matrix and a column for each of its columns, beside columns that
say which row it is. A long table has a line for each entry: row id, column id, value.
"""

from __future__ import annotations

import csv
import numbers
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nblora.completion.table import Form, Layout, Lines, Table, TableError, Values

# what pandas reads as missing
MARKERS = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
    "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip

_INDEX_NAMES = {
    "", "id", "index", "idx", "key", "row", "rows", "rowid", "rowname", "rownames", "user", "customer",
    "item", "sample", "subject", "patient", "name", "code", "date", "datetime", "time", "timestamp", "day",
    "month", "year",
}  # fmt: skip
_ROW_NAMES = {
    "row", "rows", "rowid", "i", "user", "users", "userid", "uid", "customer", "customerid", "person",
    "personid", "reader", "readerid", "reviewer", "reviewerid",
}  # fmt: skip
_COLUMN_NAMES = {
    "col", "cols", "colid", "column", "columns", "columnid", "j", "item", "items", "itemid", "iid", "movie",
    "movieid", "film", "filmid", "product", "productid", "book", "bookid", "isbn", "asin", "song", "songid",
    "track", "trackid", "artist", "artistid", "business", "businessid", "joke", "jokeid",
}  # fmt: skip
_VALUE_NAMES = {
    "value", "values", "val", "rating", "ratings", "score", "stars", "data", "entry", "count", "plays",
}  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """What the user says about a table, where the default is to look.

    Attributes:
        layout: "wide", "long" or "auto".
        header: whether the first line of a CSV file names the columns; None to look.
        index: columns that say which row of a wide table a line is; None to look, empty for none.
        row: the column with the row ids of a long table.
        column: the column with its column ids.
        value: the column with its values.
        missing: what stands for a missing entry, beside an empty cell and what pandas takes for missing.
    """

    layout: str = "auto"
    header: bool | None = None
    index: tuple[str, ...] | None = None
    row: str | None = None
    column: str | None = None
    value: str | None = None
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.layout not in ("auto", "wide", "long"):
            raise TableError(f"layout must be auto, wide or long, got {self.layout!r}")
        for name in ("row", "column", "value"):
            if getattr(self, name) is not None and self.layout == "wide":
                raise TableError(f"{name} must be given for a long table only, got {getattr(self, name)!r}")
        if self.index is not None and self.layout == "long":
            raise TableError(f"index must be given for a wide table only, got {', '.join(self.index)!r}")


@dataclass(frozen=True, eq=False)
class Sheet:
    """A table with named columns, as it is in a file.

    Attributes:
        source: the file.
        frame: (lines, columns), with columns numbered from 0. Cells of a text file are text, as they were.
        names: of the columns, which may repeat.
        header: whether the file says the names; otherwise they are the numbers.
        index: of a data frame that was saved with one: columns of it that come before the others.
        separator: of a text file.
    """

    source: Path
    frame: pd.DataFrame
    names: tuple[Hashable, ...]
    header: bool = True
    index: int = 0
    separator: str = ""

    @property
    def stray(self) -> bool:
        """Whether the index says nothing: it has no name and only numbers, as when lines were taken out."""
        return self.index == 1 and self.names[0] == "" and self.frame[0].dtype.kind in "iu"

    @property
    def first(self) -> int:
        """Number of the first column that may say something."""
        return 1 if self.stray else 0


@dataclass(frozen=True)
class FrameForm(Form):
    """How a CSV or Parquet file was written.

    Attributes:
        sheet: it, to take over what is observed.
        ids: numbers of the columns with row ids of a wide table, or of the three columns of a long one.
        beside: numbers of the columns without values, of a wide table: those with row ids, and a stray index.
        lines: the line of each row of a wide table, where each row has one line; else None.
    """

    sheet: Sheet | None = None
    ids: tuple[int, ...] = ()
    beside: tuple[int, ...] = ()
    lines: bool = False


# --- reading ---


def read_text(path: Path, header: bool | None) -> Sheet:
    """A CSV or TSV file: UTF-8, separated by tabs (.tsv) or by what its first line has most of.

    Raises:
        TableError: if it is none.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            separator = "\t" if path.suffix.lower() == ".tsv" else _separator(first)
        lines = pd.read_csv(
            path,
            sep=separator,
            header=None,
            dtype=str,
            na_filter=False,  # "NA" may be an id
            skipinitialspace=True,
            skip_blank_lines=separator in first,  # a blank line may be the missing entry of a single column
            encoding="utf-8-sig",
        )
    except pd.errors.EmptyDataError as error:
        raise TableError(f"the table must have at least one row, got an empty file {path}") from error
    except (UnicodeDecodeError, pd.errors.ParserError, csv.Error) as error:
        detail = " ".join(str(error).split())
        what = "text in UTF-8" if isinstance(error, UnicodeDecodeError) else "a table"
        raise TableError(f"the file must be {what}: {detail} in {path}") from error
    heading = [cell.strip() for cell in lines.iloc[0]]
    if header is None:
        header = _is_heading(heading)
    frame = lines.iloc[1:].reset_index(drop=True) if header else lines
    names = tuple(heading) if header else tuple(range(lines.shape[1]))
    return Sheet(path, frame, names, header, separator=separator)


def read_parquet(path: Path) -> Sheet:
    """A Parquet file, with the index of a data frame that was saved with one.

    Raises:
        TableError: if it cannot be read.
    """
    import pyarrow

    try:
        frame = pd.read_parquet(path, engine="pyarrow")
    except (pyarrow.ArrowException, ValueError) as error:
        raise TableError(f"the file must be Parquet: {' '.join(str(error).split())} in {path}") from error
    index = 0
    if not isinstance(frame.index, pd.RangeIndex):
        index = frame.index.nlevels
        levels = pd.DataFrame({i: frame.index.get_level_values(i) for i in range(index)})
        names = [*("" if name is None else name for name in frame.index.names), *frame.columns]
        frame = pd.concat([levels, frame.reset_index(drop=True)], axis=1)
    else:
        names = list(frame.columns)
    return Sheet(path, frame.set_axis(range(len(names)), axis=1), tuple(names), index=index)


def to_table(sheet: Sheet, choices: Choices, *, duplicates: str) -> Table:
    """The observed entries of a wide or long table.

    Args:
        duplicates: "error", or "mean" to join lines and columns of a wide table that have the same id.

    Raises:
        TableError: if ids or values cannot be used.
    """
    if not len(sheet.frame):
        raise TableError(f"the table must have at least one row, got none in {sheet.source}")
    layout, trio = _layout(sheet, choices)
    if layout == "long":
        return _long(sheet, trio, choices)
    return _wide(sheet, choices, duplicates)


def _layout(sheet: Sheet, choices: Choices) -> tuple[Layout, tuple[int, int, int]]:
    """The layout, and the columns of a long table with row ids, column ids and values."""
    given = [
        None if name is None else _number_of(name, sheet, option)
        for option, name in (("row", choices.row), ("column", choices.column), ("value", choices.value))
    ]
    none = (-1, -1, -1)
    if choices.layout == "wide" or (choices.layout == "auto" and choices.index is not None):
        if any(number is not None for number in given):
            raise TableError(
                "index must be given for a wide table only, row, column and value for a long one"
            )
        return "wide", none
    plain = [_plain(name) for name in sheet.names]
    known = [
        next((i for i, name in enumerate(plain) if name in names), None) if number is None else number
        for number, names in zip(given, (_ROW_NAMES, _COLUMN_NAMES, _VALUE_NAMES))
    ]
    different = len({*known}) == 3
    if None not in known and different:
        return "long", (known[0], known[1], known[2])  # type: ignore[return-value]
    if choices.layout == "long" or any(number is not None for number in given):
        return "long", _first_three(sheet, given)
    if len(sheet.names) - sheet.first == 3 and sheet.index == sheet.first and _looks_long(sheet):
        return "long", (sheet.first, sheet.first + 1, sheet.first + 2)
    return "wide", none


def _first_three(sheet: Sheet, given: Sequence[int | None]) -> tuple[int, int, int]:
    """The columns that were named, and for the others the first that are left."""
    count = len(sheet.names) - sheet.first
    if count < 3:
        raise TableError(
            f"a long table must have three columns, for row ids, column ids and values, got {count} in "
            f"{sheet.source}"
        )
    chosen = [number for number in given if number is not None]
    if len({*chosen}) < len(chosen):
        raise TableError("row, column and value must be different columns, got one of them twice")
    left = (i for i in range(sheet.first, len(sheet.names)) if i not in chosen)
    first, second, third = (next(left) if number is None else number for number in given)
    return first, second, third


def _looks_long(sheet: Sheet) -> bool:
    """Whether three columns without telling names are ids, ids and values.

    The first column of a wide table is an id of its own for each line, or has values. Ids repeat in the first
    column of a long one, none is missing, and they are texts, dates or integers.
    """
    first, second = (sheet.frame[sheet.first + i] for i in range(2))
    for column in (first, second):
        if _blank(column, MARKERS).any() or not (_is_id(column) or _are_integers(column)):
            return False
    return _is_id(second) or bool(first.duplicated().any() and second.duplicated().any())


def _long(sheet: Sheet, trio: tuple[int, int, int], choices: Choices) -> Table:
    row, column, value = trio
    rows, row_ids = _codes(sheet, row)
    columns, column_ids = _codes(sheet, column)
    values = values_of(sheet, value, choices.missing)
    names = tuple(str(sheet.names[i]) if sheet.header else _DEFAULT[k] for k, i in enumerate(trio))
    observed = ~np.isnan(values)
    others = len(sheet.names) - sheet.first - 3
    description = "long table: " + ", ".join(
        f"{what} in {_column_word(sheet, i)}" for what, i in zip(("row ids", "column ids", "values"), trio)
    )
    if others:
        description += f"; {others} other column{'s' if others > 1 else ''} not used"
    return Table(
        source=sheet.source,
        layout="long",
        row_ids=row_ids,
        column_ids=column_ids,
        rows=rows[observed],
        columns=columns[observed],
        values=values[observed],
        form=FrameForm(
            names=(names[0], names[1], names[2]),
            description=description,
            has_row_ids=True,
            has_column_ids=True,
            sheet=sheet,
            ids=trio,
        ),
        lines=None if observed.all() else Lines(rows, columns, values),
    )


_DEFAULT = ("row", "column", "value")


def ids_of(sheet: Sheet, number: int) -> pd.Series[Any]:
    """(lines,) the ids in a column."""
    return _stripped(sheet.frame[number])


def _codes(sheet: Sheet, number: int) -> tuple[NDArray[np.int64], pd.Index]:
    """The number of the id in each line (L,), and the different ids in the order in which they come."""
    column = _stripped(sheet.frame[number])
    blank = _blank(column, frozenset({""}))
    if blank.any():
        raise TableError(
            f"ids must not be missing, got a blank in {_column_word(sheet, number)}, "
            f"line {_line(sheet, int(np.flatnonzero(blank)[0]))} of {sheet.source}"
        )
    codes, ids = pd.factorize(column)
    return codes.astype(np.int64), pd.Index(ids)


def _wide(sheet: Sheet, choices: Choices, duplicates: str) -> Table:
    ids = _index_columns(sheet, choices)
    beside = tuple(sorted({*ids, *range(sheet.index)}))
    others = [i for i in range(len(sheet.names)) if i not in beside]
    if not others:
        raise TableError(f"a wide table must have columns with values, got only row ids in {sheet.source}")
    row_codes, row_ids = _row_ids(sheet, ids)
    column_codes, column_ids = pd.factorize(pd.Index([sheet.names[i] for i in others], dtype=object))
    lines = len(row_ids) == len(sheet.frame) and len(column_ids) == len(others)
    if not lines and duplicates != "mean":
        _refuse_repeated(sheet, ids, others)
    parts = []
    for code, number in zip(column_codes, others):
        values = values_of(sheet, number, choices.missing)
        observed = np.flatnonzero(~np.isnan(values))
        parts.append((row_codes[observed], np.full(len(observed), code, np.int64), values[observed]))
    rows, columns, values = (np.concatenate(arrays) for arrays in zip(*parts))
    named = " and ".join(_column_word(sheet, i) for i in ids)
    description = f"wide table: {f'row ids in {named}' if ids else 'rows without ids'}"
    if not sheet.header:
        description += ", no line with names"
    row_name = str(sheet.names[ids[0]]) if len(ids) == 1 and sheet.header else ""
    return Table(
        source=sheet.source,
        layout="wide",
        row_ids=row_ids,
        column_ids=pd.Index(column_ids) if sheet.header else pd.RangeIndex(len(others)),
        rows=rows,
        columns=columns,
        values=values,
        form=FrameForm(
            names=(row_name or "row", "column", "value"),
            description=description,
            has_row_ids=bool(ids),
            has_column_ids=sheet.header,
            sheet=sheet,
            ids=ids,
            beside=beside,
            lines=lines,
        ),
    )


def _index_columns(sheet: Sheet, choices: Choices) -> tuple[int, ...]:
    """Columns of a wide table that say which row a line is."""
    if choices.index is not None:
        found = tuple(dict.fromkeys(_number_of(name, sheet, "index") for name in choices.index))
        return found
    if sheet.index and not sheet.stray:
        return tuple(range(sheet.index))
    number = sheet.first
    if len(sheet.names) - number >= 2:
        first = sheet.frame[number]
        if _is_id(first) or (sheet.header and _is_index_name(sheet.names[number])) or _counts(first):
            return (number,)
    return tuple(range(number))


def _row_ids(sheet: Sheet, ids: tuple[int, ...]) -> tuple[NDArray[np.int64], pd.Index]:
    """The number of the row of each line (L,), and the ids of the rows; tuples from several columns."""
    if not ids:
        return np.arange(len(sheet.frame)), pd.RangeIndex(len(sheet.frame))
    if len(ids) == 1:
        return _codes(sheet, ids[0])
    for number in ids:
        _codes(sheet, number)  # refuses blanks
    tuples = pd.MultiIndex.from_frame(pd.DataFrame({i: _stripped(sheet.frame[i]) for i in ids}))
    codes, found = pd.factorize(tuples)
    return codes.astype(np.int64), pd.Index(found)


def _refuse_repeated(sheet: Sheet, ids: tuple[int, ...], others: Sequence[int]) -> None:
    frame = pd.DataFrame({i: _stripped(sheet.frame[i]) for i in ids})
    if ids and frame.duplicated().any():
        second = int(np.flatnonzero(frame.duplicated())[0])
        first = int(np.flatnonzero((frame == frame.iloc[second]).all(axis=1))[0])
        label = ", ".join(
            repr(value) if isinstance(value, str) else str(value) for value in frame.iloc[second]
        )
        raise TableError(
            f"every row id must be given once, got {label} in lines {_line(sheet, first)} and "
            f"{_line(sheet, second)} of {sheet.source}; --duplicates mean joins them"
        )
    names = [sheet.names[i] for i in others]
    twice = next(name for name in names if names.count(name) > 1)
    raise TableError(
        f"every column must have a name of its own, got {twice!r} {names.count(twice)} times in "
        f"{sheet.source}; --duplicates mean joins them"
    )


def values_of(sheet: Sheet, number: int, missing: Sequence[str] = ()) -> Values:
    """(lines,) the values of a column, NaN where they are missing.

    Args:
        missing: what else stands for a missing value, as text; a number also in another notation.

    Raises:
        TableError: if some are no numbers.
    """
    column = sheet.frame[number]
    kind = column.dtype
    result = np.full(len(column), np.nan)
    if _is_text(column):
        column = _stripped(column)
        present = ~_blank(column, MARKERS | {text.strip() for text in missing})
        cells = column.to_numpy(object)[present]
        # a text file has texts; in a file with types they are no numbers, but decimals are
        is_number = _is_number if sheet.separator else lambda cell: isinstance(cell, numbers.Number)
        try:
            result[present] = cells.astype(np.float64)  # Python's float, which rounds correctly
            wrong = "_" in "".join(cells) if sheet.separator else not all(map(is_number, cells))
        except (TypeError, ValueError):
            wrong = True
        if wrong:
            _refuse_cell(sheet, number, present, cells, is_number)
    elif pd.api.types.is_numeric_dtype(kind) and kind.kind in "iuf":
        result = column.to_numpy(np.float64, na_value=np.nan)
    else:
        raise TableError(
            f"values must be numbers, got {kind} in {_column_word(sheet, number)} of {sheet.source}"
        )
    for text in missing:
        if _is_number(text):
            result[result == float(text)] = np.nan
    return result


def _refuse_cell(sheet: Sheet, number: int, present: Any, cells: Any, is_number: Any) -> None:
    wrong = next(i for i, cell in enumerate(cells) if not is_number(cell))
    line = _line(sheet, int(np.flatnonzero(present)[wrong]))
    hint = "; --index names columns with row ids" if number == 0 or _is_id(sheet.frame[number]) else ""
    if sheet.separator and re.fullmatch(r"-?\d+,\d+", str(cells[wrong])):
        hint = "; decimals are written with a point"
    raise TableError(
        f"values must be numbers, got {cells[wrong]!r} in {_column_word(sheet, number)}, line {line} of "
        f"{sheet.source}{hint}"
    )


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return "_" not in str(cell)


# --- looking ---


def _separator(line: str) -> str:
    """Of comma, semicolon and tab the one that the first line has most of."""
    return max(",;\t", key=line.count)


def _is_heading(cells: Sequence[str]) -> bool:
    """Whether the first line of a text file names the columns.

    Names that are all integers, such as years or the numbers that pandas gives columns, increase; the first
    may be empty, over the ids of the rows. Otherwise numbers and blanks are values.
    """
    named = cells[1:] if cells[0] == "" and len(cells) > 1 else cells
    if any(cell not in MARKERS and not _is_number(cell) for cell in named):
        return True
    if not all(re.fullmatch(r"-?\d+", cell) for cell in named):
        return False
    values = [int(cell) for cell in named]
    return len(values) > 1 and all(a < b for a, b in pairwise(values))


def _is_text(column: pd.Series[Any]) -> bool:
    return bool(column.dtype == object or pd.api.types.is_string_dtype(column.dtype))


def _is_id(column: pd.Series[Any]) -> bool:
    """Whether a column is of texts or dates, and not of numbers; a few texts among numbers are mistakes."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        return False
    if not _is_text(column):
        return True  # dates, categories
    cells = [cell for cell in _stripped(column).to_numpy(object) if cell is not None and cell not in MARKERS]
    return bool(cells) and 2 * sum(map(_is_number, cells)) < len(cells)


def _are_integers(column: pd.Series[Any]) -> bool:
    if not _is_text(column):
        return bool(column.dtype.kind in "iu")
    return bool(_stripped(column).str.fullmatch(r"[+-]?\d+").all())


def _counts(column: pd.Series[Any]) -> bool:
    """Whether a column of at least three lines counts them, from 0 or 1."""
    if len(column) < 3 or not _are_integers(column):
        return False
    values = column.to_numpy(object).astype(np.float64)
    return bool(values[0] in (0, 1) and np.all(np.diff(values) == 1))


def _is_index_name(name: Hashable) -> bool:
    text = str(name)
    return _plain(name) in _INDEX_NAMES or bool(re.search(r"([_\-. ]id|[a-z]I[Dd])$", text))


def _plain(name: Hashable) -> str:
    return re.sub(r"[\W_]", "", str(name).lower())


def _stripped(column: pd.Series[Any]) -> pd.Series[Any]:
    if _is_text(column) and column.map(lambda cell: isinstance(cell, str)).any():
        return column.str.strip()
    return column


def _blank(column: pd.Series[Any], markers: frozenset[str]) -> NDArray[np.bool_]:
    """(lines,) where nothing is said."""
    blank: NDArray[np.bool_] = column.isna().to_numpy(bool)
    if _is_text(column):
        blank = blank | column.isin(markers).to_numpy(bool)
    return blank


def _number_of(name: str, sheet: Sheet, option: str) -> int:
    """Which column has a name, or, without a line of names, a number from 0."""
    names = [str(known) for known in sheet.names]
    if name not in names:
        shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
        raise TableError(f"{option} must be a column of {sheet.source} ({shown}), got {name!r}")
    return names.index(name)


def _column_word(sheet: Sheet, number: int) -> str:
    name = sheet.names[number]
    if not sheet.header:
        return f"column {number} (counted from 0)"
    return f"column {name!r}" if isinstance(name, str) else f"column {name}"


def _line(sheet: Sheet, number: int) -> int:
    """The line of a text file, or the row of another one, counted from 1."""
    return number + 1 + bool(sheet.separator and sheet.header)


# --- writing ---


def wide_frame(
    table: Table,
    completed: Values,
    kept: NDArray[np.bool_],
    lines: slice,
    text: Callable[[float], str] | None,
) -> pd.DataFrame:
    """Some lines of a completed wide table, with the columns of the table that it was made from.

    Args:
        completed: (m, n).
        kept: (m, n) where an entry is as it was observed, and so are its cell's text or type.
        text: writes a number, for a text file; None for numbers as they are.
    """
    form = table.form
    columns: list[Any] = []
    if isinstance(form, FrameForm) and form.sheet is not None and form.lines:
        values = iter(range(completed.shape[1]))
        for number in range(len(form.sheet.names)):
            column = form.sheet.frame[number].iloc[lines].reset_index(drop=True)
            if number not in form.beside:
                j = next(values)
                column = filled(column, completed[lines, j], kept[lines, j], text)
            columns.append(column)
    else:
        ids = table.row_ids[lines]
        if isinstance(ids, pd.MultiIndex):
            columns += [ids.get_level_values(k) for k in range(ids.nlevels)]
        elif form.has_row_ids:
            columns.append(ids)
        for j in range(completed.shape[1]):
            values_j = completed[lines, j]
            columns.append(values_j if text is None else pd.Series(list(map(text, values_j)), dtype=object))
    return pd.DataFrame(dict(enumerate(columns)))


def wide_names(table: Table) -> tuple[list[Hashable], int, bool]:
    """Names of all columns of a wide table, how many of the first are an index, and whether to write them."""
    form = table.form
    if isinstance(form, FrameForm) and form.sheet is not None and table.layout == "wide":
        sheet = form.sheet
        if form.lines:
            return list(sheet.names), sheet.index, sheet.header
        index = len(form.ids) if form.ids == tuple(range(sheet.index)) else 0
        return [*(sheet.names[i] for i in form.ids), *table.column_ids], index, sheet.header
    return [*([form.names[0]] if form.has_row_ids else []), *table.column_ids], 0, True


def long_frame(
    table: Table, row_ids: pd.Index, column_ids: pd.Index, values: Values, text: Callable[[float], str] | None
) -> pd.DataFrame:
    """Lines (P,) of row id, column id and value."""
    cells = values if text is None else pd.Series(list(map(text, values)), dtype=object)
    first: list[pd.Index] = [row_ids]
    names = list(table.form.names)
    if isinstance(row_ids, pd.MultiIndex):
        first = [row_ids.get_level_values(k) for k in range(row_ids.nlevels)]
        assert isinstance(table.form, FrameForm)
        assert table.form.sheet is not None
        names = [str(table.form.sheet.names[i]) for i in table.form.ids] + names[1:]
    frame = pd.DataFrame(dict(enumerate([*first, column_ids, cells])))
    return frame.set_axis(names, axis=1)


def filled(
    column: pd.Series[Any], values: Values, kept: NDArray[np.bool_], text: Callable[[float], str] | None
) -> pd.Series[Any]:
    """A column (L,) whose cells are as they were where they are kept, and else values (L,).

    Args:
        values: whole, also where they are kept.
        text: as for `wide_frame`.
    """
    if text is not None:
        cells = np.empty(len(column), dtype=object)
        if _is_text(column):
            cells[kept] = column.to_numpy(object)[kept]
        elif column.dtype.kind in "iu":  # may be too large for a float
            cells[kept] = [str(cell) for cell in column.to_numpy(object)[kept]]
        else:
            cells[kept] = [repr(float(value)) for value in values[kept]]
        cells[~kept] = list(map(text, values[~kept]))
        return pd.Series(cells, dtype=object)
    if kept.all() and not _is_text(column):
        return column
    return pd.Series(values.astype(np.float32 if column.dtype == np.float32 else np.float64))
