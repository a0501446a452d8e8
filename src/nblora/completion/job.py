"""Complete a table in a file: read, check on held-out entries, fit, write. One function call."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from nblora.bounds import parse_norm
from nblora.checkpoints.storage import PathLike, atomic_file, one_line
from nblora.checkpoints.tables import json_text
from nblora.completion import files
from nblora.completion.estimator import NBMatrixCompletion
from nblora.completion.figures import plot_before_after, plot_fit
from nblora.completion.frames import Choices
from nblora.completion.observations import free_memory
from nblora.completion.pictures import PictureForm
from nblora.completion.table import Layout, Positions, Table, TableError, Values, size_in_words

MOST_PAIRS = 5_000_000  # entries that are written one a line unless the user lists them
VALIDATION = 0.1  # share of pixels to choose rank and bound by, as of entries elsewhere
SMALL = 50_000  # observed entries that one thread fits as fast as several
FEWEST = 20  # observed entries of which some can be held out

OnProgress = Callable[[str, int], None]
"""Called with what is being done, and how many iterations of that were done so far."""


@dataclass(frozen=True)
class CompletionReport:
    """What was completed, and how well that goes on entries that the fit has not seen.

    Attributes:
        source: the file that was read.
        out: the file that was written.
        description: what the source was recognised as.
        shape: (m, n) of the matrix.
        observed: entries, after the mean of duplicates was taken.
        predicted: entries of `out` that were predicted.
        empty_rows: rows without observed entries; what is predicted there rests on the columns alone.
        empty_columns: columns without.
        unknown_pairs: pairs to predict with a row or column that the source lacks; treated like empty ones.
        rank: of the completed matrix without biases.
        norm: that is bounded.
        bound: on it.
        bound_chosen: whether it was chosen on validation entries ("auto").
        weighted: whether the bound is on the matrix weighted by popularity.
        used: the norm of the completed matrix over the bound.
        held_out: entries that were left out of a fit of their own with the same options, 0 for none.
        rmse: root mean squared error of that fit on them, in the units of the table; None without.
        rmse_of_column_means: of the means of the columns' other entries, on the same held-out entries.
        rmse_of_mean: of the mean of all other entries.
        validation_rmse: of the fit, on the entries by which it chose rank and bound: a little too good.
        validation_table: what it tried: rank, bound and rmse.
        seconds: all of it.
    """

    source: str
    out: str
    description: str
    shape: tuple[int, int]
    observed: int
    predicted: int
    empty_rows: int
    empty_columns: int
    unknown_pairs: int
    rank: int
    norm: str
    bound: float
    bound_chosen: bool
    weighted: bool
    used: float
    held_out: int
    rmse: float | None
    rmse_of_column_means: float | None
    rmse_of_mean: float | None
    validation_rmse: float | None
    validation_table: tuple[dict[str, Any], ...]
    seconds: float

    def rows(self) -> list[tuple[str, ...]]:
        """A heading and rows of text: errors on held-out entries; the heading alone where none were."""
        heading = ("prediction by", "held-out RMSE")
        compared = (
            ("completion", self.rmse),
            ("column means", self.rmse_of_column_means),
            ("mean of all", self.rmse_of_mean),
        )
        return [heading, *((name, f"{error:.4g}") for name, error in compared if error is not None)]

    @property
    def summary(self) -> str:
        """A few sentences."""
        m, n = self.shape
        share = self.observed / (m * n)
        chosen = "chosen on validation entries" if self.bound_chosen else "as given"
        if self.bound_chosen and self.validation_rmse is None:
            chosen = "a cautious one: there are too few entries to choose by"
        matrix = "the popularity-weighted matrix" if self.weighted else "the completed matrix"
        text = (
            f"{_capital(self.description)}; {m:,} × {n:,}, {self.observed:,} entries observed ({share:.1%}). "
            f"Rank {self.rank}; the {self.norm} norm of {matrix} is at most {self.bound:.4g} ({chosen}), "
            f"{self.used:.1%} of it used."
        )
        for count, word in ((self.empty_rows, "row"), (self.empty_columns, "column")):
            if count:
                others = "columns" if word == "row" else "rows"
                have = "s have" if count > 1 else " has"
                text += f" {count:,} {word}{have} no observed entry: filled from the {others} alone."
        if self.unknown_pairs:
            text += (
                f" {self.unknown_pairs:,} pairs have ids that the table lacks: predicted from biases alone."
            )
        if not self.held_out:
            text += " No entries were held out."
        return text

    def to_json(self) -> str:
        """All of it as JSON; numbers that are not finite become null."""
        return json_text(asdict(self))


def complete_file(
    source: PathLike,
    out: PathLike,
    *,
    layout: str = "auto",
    header: bool | None = None,
    index: Sequence[str] | None = None,
    row: str | None = None,
    column: str | None = None,
    value: str | None = None,
    missing: Sequence[str | float] = (),
    predict: PathLike | None = None,
    out_layout: str | None = None,
    replace_observed: bool = False,
    duplicates: str = "error",
    test_fraction: float = 0.1,
    plot: PathLike | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> CompletionReport:
    """Complete a table with missing entries by a matrix of low rank and bounded norm.

    What is written has the layout of the source: a wide table, matrix or picture comes back with its missing
    entries filled in and everything else as it was; a long table with blank values likewise, and one without
    becomes the list of all entries that are missing. `predict` and `out_layout` ask for others. The file
    appears when it is whole; in case of an error nothing is written.

    Args:
        source: CSV, TSV, Parquet, .npy, .npz or a picture; see `nblora.completion.files.read_table`.
        out: file to write; its ending says the format.
        layout: "wide", "long" or "auto".
        header: whether the first line of a text file names the columns; None to look.
        index: columns of a wide table that say which row a line is; none if empty, None to look.
        row: of a long table, the column with row ids.
        column: of a long table, the column with column ids.
        value: of a long table, the column with values.
        missing: what else stands for a missing entry; of pictures colours, beside transparent pixels.
        predict: a file with pairs of a row id and a column id to predict; they are written as a long table.
        out_layout: "wide" or "long"; by default that of the source.
        replace_observed: write predictions in place of observed entries too.
        duplicates: "error", or "mean" to take the mean of the values that one pair is given.
        test_fraction: share of the entries that is held out from a first fit with the same options, to
            measure an error that no choice has seen; of pictures, a share of the pixels. 0 for no such fit.
        plot: PNG, PDF or SVG file: before and after of pictures and of tables without ids, else the spectrum.
        seed: of held-out entries and of the fit.
        on_progress: see `OnProgress`.
        options: of `NBMatrixCompletion`: rank, bound, norm, ...

    Raises:
        TableError, ValueError: for a table or options that cannot be used, before anything is written.
        OSError: if a file cannot be written.
    """
    start = perf_counter()
    choices = Choices(
        layout=layout,
        header=header,
        index=None if index is None else tuple(index),
        row=row,
        column=column,
        value=value,
        missing=tuple(text if isinstance(text, str) else f"{text:g}" for text in missing),
    )
    if not 0 <= test_fraction < 1:
        raise TableError(f"test_fraction must be at least 0 and below 1, got {test_fraction}")
    if out_layout not in (None, "wide", "long"):
        raise TableError(f"out_layout must be wide or long, got {out_layout!r}")
    if plot is not None:
        if Path(plot).suffix.lower() not in files.PLOTS:
            raise TableError(f"a plot must be a .png, .pdf or .svg file, got {plot}")
        if Path(plot).absolute() == Path(out).absolute():
            raise TableError(f"the plot must be another file than the completed table, got {plot} for both")
        files.check_place(Path(plot))
    estimator = NBMatrixCompletion(random_state=seed, **options)  # complains of unknown options
    table = files.read_table(source, choices, duplicates=duplicates)
    task = _task(table, Path(out), predict, out_layout, replace_observed)
    errors = _Errors()
    if test_fraction and len(table) >= FEWEST:
        errors = _held_out_errors(
            table,
            NBMatrixCompletion(random_state=seed, **options),
            test_fraction,
            seed,
            _named(on_progress, "held-out check: "),
        )
    _fit(estimator, table, seed, on_progress)
    predicted = _write(task, estimator, table, out, plot)
    m, n = table.shape
    certificate = estimator.certificate_
    return CompletionReport(
        source=str(source),
        out=str(out),
        description=table.form.description,
        shape=(m, n),
        observed=len(table),
        predicted=predicted,
        empty_rows=m - len(np.unique(table.rows)),
        empty_columns=n - len(np.unique(table.columns)),
        unknown_pairs=task.unknown,
        rank=int(estimator.rank_),
        norm=parse_norm(estimator.norm).name,
        bound=float(estimator.bound_),
        bound_chosen=estimator.bound == "auto",
        weighted=estimator.weighting is not None,
        used=certificate.share,
        held_out=errors.count,
        rmse=errors.completion,
        rmse_of_column_means=errors.column_means,
        rmse_of_mean=errors.mean,
        validation_rmse=estimator.validation_rmse_,
        validation_table=tuple(_plain(row) for row in estimator.validation_table_ or ()),
        seconds=perf_counter() - start,
    )


@dataclass(frozen=True, eq=False)
class _Task:
    """What is to be written.

    Attributes:
        kind: "wide" for the matrix, "pairs" for entries one a line, "lines" for a long table whose blanks are
            filled.
        suffix: of the file, which says the format.
        pairs: which; None for all that are not observed.
    """

    kind: str
    suffix: str
    replace_observed: bool
    pairs: files.Pairs | None = None

    @property
    def unknown(self) -> int:
        """Pairs with ids that the table lacks."""
        return 0 if self.pairs is None else int(((self.pairs.rows < 0) | (self.pairs.columns < 0)).sum())


def _task(
    table: Table, out: Path, predict: PathLike | None, out_layout: str | None, replace_observed: bool
) -> _Task:
    """What to write, checked before a fit that may be long."""
    picture = isinstance(table.form, PictureForm)
    if picture and (predict is not None or out_layout == "long"):
        raise TableError(
            f"a picture must be completed as a picture, without pairs to predict, got {table.source}"
        )
    layout: Layout = "long" if predict is not None or (out_layout or table.layout) == "long" else "wide"
    if predict is not None and out_layout == "wide":
        raise TableError("out_layout must be long where pairs to predict are given, got wide")
    suffix = files.check_target(out, table, layout)
    if predict is not None:
        task = _Task("pairs", suffix, replace_observed, files.read_pairs(predict, table))
        if task.unknown and suffix == ".npz":
            raise TableError(
                f"pairs in an .npz file must be of the table, got {task.unknown} others in {predict}; "
                "CSV and Parquet files take any"
            )
        return task
    if layout == "long" and table.lines is not None:
        return _Task("lines", suffix, replace_observed)
    m, n = table.shape
    if not table.absent and not replace_observed:
        hint = "no pixel is transparent, and " if picture else ""
        raise TableError(
            f"the table must have missing entries, got {hint}all {m} × {n} entries in {table.source}"
            + ("; --missing names their colour" if picture else "")
        )
    if layout == "wide":
        _refuse_what_does_not_fit(table)
        return _Task("wide", suffix, replace_observed)
    count = m * n if replace_observed else table.absent
    if count > MOST_PAIRS:
        raise TableError(
            f"a list of all missing entries must have at most {MOST_PAIRS:,}, got {count:,} of {m:,} × {n:,} "
            f"({size_in_words(24 * count)}) in {table.source}; list the pairs that you need with --predict "
            "PAIRS, or write a wide table with --out-layout wide"
        )
    return _Task("pairs", suffix, replace_observed)


def _refuse_what_does_not_fit(table: Table) -> None:
    """A completed matrix and its copy on the way to the file must fit into memory: said before the fit."""
    m, n = table.shape
    needed, free = 2 * 8 * m * n, free_memory()
    if free is not None and needed > free:
        raise TableError(
            f"a completed table must fit into memory, got {m:,} × {n:,} entries, which need "
            f"{size_in_words(needed)} of {size_in_words(free)} free, in {table.source}; list the pairs that "
            "you need with --predict PAIRS"
        )


@dataclass(frozen=True)
class _Errors:
    """Root mean squared errors on held-out entries; None without any."""

    count: int = 0
    completion: float | None = None
    column_means: float | None = None
    mean: float | None = None


def _held_out_errors(
    table: Table, estimator: NBMatrixCompletion, share: float, seed: int, on_progress: OnProgress | None
) -> _Errors:
    """Errors of a fit to the other entries, and of two predictions that anybody would make."""
    held = table.held_out(share, seed)
    if not held.any() or held.all():
        raise TableError(
            f"test_fraction must leave entries to fit and to test, got {share} of {len(table)} entries"
        )
    test, rest = table.only(held), table.only(~held)
    _fit(estimator, rest, seed, on_progress)
    predicted = table.clipped(_predictions(estimator)(test.rows, test.columns))
    mean = float(rest.values.mean())
    counts = np.bincount(rest.columns, minlength=table.shape[1])
    sums = np.bincount(rest.columns, weights=rest.values, minlength=table.shape[1])
    means = np.where(counts > 0, sums / counts.clip(min=1), mean)

    def error(of: Values | float) -> float:
        return math.sqrt(float(np.mean((of - test.values) ** 2)))

    return _Errors(len(test), error(predicted), error(means[test.columns]), error(mean))


def _fit(estimator: NBMatrixCompletion, table: Table, seed: int, on_progress: OnProgress | None) -> None:
    if table.units:  # one channel of a pixel tells of the others, so they are held out together
        held = table.held_out(VALIDATION, seed + 1)  # another draw than of the entries held out before
        if held.any():
            estimator.set_params(cv=[(np.flatnonzero(~held), np.flatnonzero(held))])
    counts: Counter[str] = Counter()

    def count(stage: str, _: float) -> None:
        counts[stage] += 1
        if on_progress is not None:
            on_progress(stage, counts[stage])

    estimator.on_progress = count
    with warnings.catch_warnings(), _threads_for(len(table)):
        warnings.filterwarnings("ignore", message=".* no observed entry")  # the report says so
        estimator.fit_coo(table.rows, table.columns, table.values, table.shape)
    estimator.on_progress = None


@contextmanager
def _threads_for(entries: int) -> Iterator[None]:
    """One thread for a small table: waiting for a second one takes longer than the work."""
    before = torch.get_num_threads()
    if entries < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _named(on_progress: OnProgress | None, what: str) -> OnProgress | None:
    """Progress of a fit that has a name."""
    if on_progress is None:
        return None
    show = on_progress
    return lambda stage, iterations: show(f"{what}{stage}", iterations)


def _predictions(estimator: NBMatrixCompletion) -> Callable[[Positions, Positions], Values]:
    """Predictions also of rows and columns that the table lacks (number -1), by what biases there are."""

    def predict(rows: Positions, columns: Positions) -> Values:
        known = (rows >= 0) & (columns >= 0)
        result = np.full(len(rows), float(estimator.offset_))
        result += np.where(rows >= 0, estimator.row_bias_[rows], 0.0)
        result += np.where(columns >= 0, estimator.column_bias_[columns], 0.0)
        if known.any():
            result[known] = estimator.predict(rows[known], columns[known])
        return result

    return predict


def _write(
    task: _Task, estimator: NBMatrixCompletion, table: Table, out: PathLike, plot: PathLike | None
) -> int:
    """Write the completed table, and the figure; both or none. Returns how many entries are predicted."""
    predict = _predictions(estimator)
    digits = 9 if estimator.dtype == "float32" else None  # a float32 has no more
    again = task.replace_observed
    pictured = plot is not None and not table.form.has_row_ids
    pictured = pictured and task.kind == "wide"
    completed: Values | None = None
    try:
        with ExitStack() as stack:
            target = stack.enter_context(atomic_file(out))
            if task.kind == "wide":
                completed = table.completed(predict, replace_observed=again)
                kept = np.zeros(table.shape, dtype=bool) if again else table.observed()
                files.write_wide(target, task.suffix, table, completed, kept, digits)
                count = int(kept.size - kept.sum())
            elif task.kind == "lines":
                count = _write_lines(target, task, table, predict, digits)
            else:
                count = _write_pairs(target, task, table, predict, digits)
            if plot is not None:
                figure = stack.enter_context(atomic_file(plot))
                suffix = Path(plot).suffix.lower()
                if pictured and completed is not None:
                    plot_before_after(table, completed, figure, suffix)
                else:
                    plot_fit(estimator, figure, suffix)
    except OSError as error:
        raise OSError(f"{out} cannot be written: {one_line(error)}") from error
    except MemoryError as error:
        raise TableError(f"a completed table must fit into memory, got {table.shape} entries") from error
    return count


def _write_lines(target: Path, task: _Task, table: Table, predict: Any, digits: int | None) -> int:
    lines = table.lines
    assert lines is not None
    blank = np.isnan(lines.values) | task.replace_observed
    values = lines.values.copy()
    values[blank] = table.entries(
        lines.rows[blank], lines.columns[blank], predict, replace_observed=task.replace_observed
    )
    files.write_lines(target, task.suffix, table, values, ~blank, digits)
    return int(blank.sum())


def _write_pairs(target: Path, task: _Task, table: Table, predict: Any, digits: int | None) -> int:
    pairs = task.pairs
    if pairs is None and task.replace_observed:
        pairs = files.Pairs.of(table, *(index.ravel() for index in np.indices(table.shape)))
    elif pairs is None:
        pairs = files.Pairs.of(table, *table.absent_pairs())
    values = table.entries(pairs.rows, pairs.columns, predict, replace_observed=task.replace_observed)
    files.write_long(target, task.suffix, table, pairs, values, digits)
    observed = table.find(pairs.rows, pairs.columns) >= 0
    return len(values) if task.replace_observed else int((~observed).sum())


def _plain(row: Any) -> dict[str, Any]:
    """A line of the validation table with Python's own numbers, which JSON takes."""
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in dict(row).items()}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
