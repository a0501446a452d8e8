"""The observed entries of a table that is to be completed, with the user's ids, in whatever file it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Layout = Literal["wide", "long"]
Positions = NDArray[np.int64]
Values = NDArray[np.float64]
Predict = Callable[[Positions, Positions], Values]
"""From row numbers (N,) and column numbers (N,) to predicted entries (N,)."""

CHUNK = 2**22  # entries that are predicted at once, so that their places take no memory to speak of


class TableError(ValueError):
    """A table that cannot be used; the message is one line that states the rule, then what was found."""


@dataclass(frozen=True)
class Form:
    """How a table was written, so that the completed one is written alike.

    Attributes:
        names: of the row ids, the column ids and the values, as the columns of a long table.
        description: what was recognised, in words, for the user to check.
        has_row_ids: whether rows have ids, or are counted from 0.
        has_column_ids: the same of columns.
    """

    names: tuple[str, str, str] = ("row", "column", "value")
    description: str = ""
    has_row_ids: bool = False
    has_column_ids: bool = False


@dataclass(frozen=True, eq=False)
class Lines:
    """The lines of a long table, observed or not.

    Attributes:
        rows: (L,) numbers of rows.
        columns: (L,) numbers of columns.
        values: (L,) NaN where there is none.
    """

    rows: Positions
    columns: Positions
    values: Values


@dataclass(frozen=True, eq=False)
class Table:
    """The observed entries of an (m, n) matrix: the one at rows[e], columns[e] is values[e].

    Attributes:
        source: the file that it was read from, for messages.
        layout: of that file.
        row_ids: (m,) different labels of any type.
        column_ids: (n,) different labels of any type.
        rows: (N,) numbers of rows, from 0.
        columns: (N,) numbers of columns, from 0.
        values: (N,) finite.
        form: how to write it back.
        lines: of a long table, its lines as they come, if some of them lack a value; None elsewhere.
        limits: least and largest possible entry, where there are such (of pixels).
        units: columns that stand side by side belong to the same things: column j to thing j modulo this. The
            channels of a pixel are units of one thing, and are held out together. 0 where it is not so.
    """

    source: Path
    layout: Layout
    row_ids: pd.Index
    column_ids: pd.Index
    rows: Positions
    columns: Positions
    values: Values
    form: Form
    lines: Lines | None = None
    limits: tuple[float, float] | None = None
    units: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.row_ids), len(self.column_ids)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def absent(self) -> int:
        """How many of the m·n entries are not observed, where every pair is given once."""
        m, n = self.shape
        return m * n - len(self)

    def observed(self) -> NDArray[np.bool_]:
        """(m, n) where an entry is observed."""
        mask = np.zeros(self.shape, dtype=bool)
        mask[self.rows, self.columns] = True
        return mask

    def place(self, row: int, column: int) -> str:
        """Words for a place in the table, by the user's ids."""
        row_word = _label(self.row_ids[row], "row", self.form.has_row_ids)
        return f"{row_word}, {_label(self.column_ids[column], 'column', self.form.has_column_ids)}"

    def checked(self) -> Table:
        """The same table.

        Raises:
            TableError: if nothing is observed, or an entry is infinite.
        """
        if not len(self):
            raise TableError(f"the table must have observed entries, got none in {self.source}")
        infinite = np.flatnonzero(~np.isfinite(self.values))
        if len(infinite):
            first = infinite[0]
            raise TableError(
                f"entries must be finite, got {self.values[first]:g} in "
                f"{self.place(self.rows[first], self.columns[first])} of {self.source}"
            )
        return self

    def unique(self, duplicates: str) -> Table:
        """The table with every pair of a row and a column once.

        Args:
            duplicates: "error", or "mean" to take the mean of what is given for a pair.

        Raises:
            TableError: if a pair is given several times and that is an error.
        """
        if duplicates not in ("error", "mean"):
            raise TableError(f"duplicates must be 'error' or 'mean', got {duplicates!r}")
        keys = self._keys(self.rows, self.columns)
        found, first, inverse, counts = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        if len(found) == len(keys):
            return self
        if duplicates == "error":
            several = counts > 1
            at = first[several].min()  # the first of the file
            number = counts[inverse[at]]
            more = "" if several.sum() == 1 else f" and {several.sum() - 1} more pairs several times"
            raise TableError(
                f"every pair of a row and a column must be given once, got "
                f"{self.place(self.rows[at], self.columns[at])} {number} times{more} in {self.source}; "
                "--duplicates mean takes the mean"
            )
        means = np.bincount(inverse, weights=self.values) / counts
        return replace(self, rows=self.rows[first], columns=self.columns[first], values=means)

    def only(self, mask: NDArray[np.bool_]) -> Table:
        """The table with some of its entries (N,)."""
        return replace(self, rows=self.rows[mask], columns=self.columns[mask], values=self.values[mask])

    def held_out(self, share: float, seed: int) -> NDArray[np.bool_]:
        """(N,) which entries to hold out: a share of them, at random; of pictures a share of the pixels."""
        things = self.columns % self.units if self.units else self.columns
        _, thing = np.unique(self._keys(self.rows, things), return_inverse=True)
        count = int(thing.max()) + 1
        chosen = np.zeros(count, dtype=bool)
        chosen[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = True
        held: NDArray[np.bool_] = chosen[thing]
        return held

    # --- the completed table ---

    def completed(self, predict: Predict, *, replace_observed: bool = False) -> Values:
        """(m, n) with every entry: observed ones as they are, unless they are to be replaced.

        Columns are done a few at a time, so that beside the result little memory is needed.
        """
        m, n = self.shape
        result = np.full((m, n), np.nan)
        if not replace_observed:
            result[self.rows, self.columns] = self.values
        width = max(1, CHUNK // max(1, m))
        for start in range(0, n, width):
            part = result[:, start : start + width]
            rows, columns = np.nonzero(np.isnan(part))
            part[rows, columns] = self.clipped(predict(rows, columns + start))
        return result

    def entries(
        self, rows: Positions, columns: Positions, predict: Predict, *, replace_observed: bool = False
    ) -> Values:
        """(P,) entries at pairs of rows (P,) and columns (P,): predicted, or as they were observed."""
        result = np.empty(len(rows))
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            result[part] = self.clipped(predict(rows[part], columns[part]))
        if not replace_observed:
            found = self.find(rows, columns)
            result[found >= 0] = self.values[found[found >= 0]]
        return result

    def find(self, rows: Positions, columns: Positions) -> Positions:
        """(P,) the number of the entry at each pair of a row and a column, -1 where there is none.

        A number of -1 stands for a row or column that the table lacks.
        """
        keys = self._keys(self.rows, self.columns)
        order = np.argsort(keys, kind="stable")
        wanted = self._keys(rows, columns)
        place = np.searchsorted(keys, wanted, sorter=order).clip(max=max(0, len(keys) - 1))
        found: Positions = order[place]
        there = (keys[found] == wanted) & (rows >= 0) & (columns >= 0)
        return np.where(there, found, -1)

    def absent_pairs(self) -> tuple[Positions, Positions]:
        """Rows and columns of all entries that are not observed, row by row."""
        rows, columns = np.nonzero(~self.observed())
        return rows, columns

    def clipped(self, values: Values) -> Values:
        """Predicted entries within the limits, where there are some."""
        return values if self.limits is None else np.clip(values, *self.limits)

    def numbers_of(self, given: pd.Series[Any], axis: Literal["rows", "columns"]) -> Positions:
        """(P,) the numbers of the rows or columns with these ids (P,), -1 for ids that the table lacks.

        Ids are compared as text where one file has text and the other has not: in a CSV file all is text.
        """
        ids = self.row_ids if axis == "rows" else self.column_ids
        wanted = pd.Index(given)
        if _is_text(wanted) != _is_text(ids):
            if isinstance(ids, pd.DatetimeIndex):
                wanted = pd.to_datetime(wanted, errors="coerce", format="mixed")
            else:
                wanted, ids = wanted.map(str), ids.map(str)
        numbers: Positions = ids.get_indexer(wanted).astype(np.int64)
        return numbers

    def _keys(self, rows: Positions, columns: Positions) -> Positions:
        return rows * max(1, len(self.column_ids)) + columns


def _label(label: Any, word: str, has_id: bool) -> str:
    if not has_id:
        return f"{word} {label} (counted from 0)"
    if isinstance(label, tuple):
        return f"{word} ({', '.join(map(_shown, label))})"
    return f"{word} {_shown(label)}"


def _shown(label: Any) -> str:
    return repr(label) if isinstance(label, str) else str(label)


def _is_text(ids: pd.Index) -> bool:
    return ids.inferred_type in ("string", "mixed", "empty")


def size_in_words(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 1000 else f"{size:,.0f} TB"
