"""Completing tables in files: what is recognised, what is written, and that nothing else changes."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from PIL import Image

from nblora.completion import files, job
from nblora.completion.estimator import NBMatrixCompletion
from nblora.completion.files import read_table
from nblora.completion.frames import Choices
from nblora.completion.job import complete_file
from nblora.completion.table import Table, TableError

M, N = 14, 9
QUICK: dict[str, Any] = {
    "rank": 2,
    "bound": 30.0,
    "rank_selection": None,
    "max_iter": 20,
    "test_fraction": 0,
    "dtype": "float64",
}


def matrix(m: int = M, n: int = N, share: float = 0.7, seed: int = 0) -> np.ndarray:
    """(m, n) of rank 2 with NaN; every row and column has an entry."""
    random = np.random.default_rng(seed)
    whole = random.normal(size=(m, 2)) @ random.normal(size=(2, n))
    missing = random.random((m, n)) > share
    missing[:, 0] &= np.arange(m) % 2 == 0
    missing[0] &= np.arange(n) % 2 == 1
    return np.where(missing, np.nan, whole)


X = matrix()
SEEN = ~np.isnan(X)
ROWS, COLUMNS = np.nonzero(SEEN)


def expected(x: np.ndarray = X, **options: Any) -> np.ndarray:
    """The completed matrix by the estimator alone."""
    given = {key: value for key, value in {**QUICK, **options}.items() if key != "test_fraction"}
    seen = ~np.isnan(x)
    rows, columns = np.nonzero(seen)
    estimator = NBMatrixCompletion(random_state=0, **given).fit_coo(rows, columns, x[seen], x.shape)
    places = np.indices(x.shape).reshape(2, -1)
    return np.where(seen, x, estimator.predict(*places).reshape(x.shape))


@pytest.fixture(scope="module")
def filled() -> np.ndarray:
    return expected()


def frame(x: np.ndarray = X) -> pd.DataFrame:
    return pd.DataFrame(x, columns=[f"f{j}" for j in range(x.shape[1])])


def with_ids(x: np.ndarray = X) -> pd.DataFrame:
    table = frame(x)
    table.insert(0, "city", [f"city {i}" for i in range(len(x))])
    return table


def long(x: np.ndarray = X, rows: Any = None, columns: Any = None) -> pd.DataFrame:
    """Row id, column id, value of what is observed."""
    i, j = np.nonzero(~np.isnan(x))
    rows = [f"u{k}" for k in range(x.shape[0])] if rows is None else rows
    columns = [f"i{k}" for k in range(x.shape[1])] if columns is None else columns
    return pd.DataFrame(
        {"user": pd.Index(rows).take(i), "item": pd.Index(columns).take(j), "rating": x[i, j]}
    )


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """With numbers to the last digit, which not every version of pandas reads."""
    table = pd.read_csv(path, dtype=str, **options)
    for name in table.columns:
        with contextlib.suppress(ValueError):
            table[name] = table[name].to_numpy(object).astype(float)
    return table


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as loaded:
        return dict(loaded)


def pixels_of(path: Path, mode: str | None = None) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture if mode is None else picture.convert(mode))


# --- matrices and wide tables come back with blanks filled ---


def write_npz(path: Path) -> None:
    np.savez(path, M=X)


WIDE: dict[str, tuple[str, Callable[[Path], Any], Callable[[Path], Any]]] = {
    "csv with ids": (
        "t.csv",
        lambda path: with_ids().to_csv(path, index=False),
        lambda path: read_csv(path, index_col="city"),
    ),
    "csv of numbers": ("t.csv", lambda path: frame().to_csv(path, index=False), read_csv),
    "csv as pandas writes it": (
        "t.csv",
        lambda path: frame().to_csv(path),
        lambda path: read_csv(path, index_col=0),
    ),
    "csv with numbered columns": (
        "t.csv",
        lambda path: pd.DataFrame(X).to_csv(path, index=False),
        read_csv,
    ),
    "csv without names": (
        "t.csv",
        lambda path: np.savetxt(path, X, delimiter=","),
        lambda path: read_csv(path, header=None),
    ),
    "tsv": (
        "t.tsv",
        lambda path: with_ids().to_csv(path, index=False, sep="\t"),
        lambda path: read_csv(path, sep="\t", index_col="city"),
    ),
    "parquet with ids": (
        "t.parquet",
        lambda path: with_ids().to_parquet(path),
        lambda path: pd.read_parquet(path).set_index("city"),
    ),
    "parquet with an index": (
        "t.parquet",
        lambda path: frame().set_axis(pd.date_range("2020-01-01", periods=M, name="day")).to_parquet(path),
        pd.read_parquet,
    ),
    "parquet with two index levels": (
        "t.parquet",
        lambda path: (
            frame()
            .set_axis(pd.MultiIndex.from_tuples([(f"a{i // 3}", i % 3) for i in range(M)]))
            .to_parquet(path)
        ),
        pd.read_parquet,
    ),
    "npz": ("t.npz", write_npz, lambda path: arrays(path)["M"]),
    "npy": ("t.npy", lambda path: np.save(path, X), np.load),
    **{
        f"sparse {kind}": (
            "t.npz",
            lambda path, kind=kind: scipy.sparse.save_npz(
                path, scipy.sparse.coo_array((X[SEEN], (ROWS, COLUMNS)), shape=X.shape).asformat(kind)
            ),
            lambda path: arrays(path)["X"],
        )
        for kind in ("csr", "csc", "coo")
    },
}


@pytest.mark.parametrize("kind", WIDE)
def test_wide_tables(kind: str, tmp_path: Path, filled: np.ndarray) -> None:
    """Observed entries stay to the last digit, the others are the estimator's, names and ids are the same."""
    name, write, read = WIDE[kind]
    (tmp_path / "in").mkdir()
    source, out = tmp_path / "in" / name, tmp_path / "out" / name
    write(source)
    report = complete_file(source, out, **QUICK)
    assert report.shape == (M, N)
    assert (report.observed, report.predicted) == (SEEN.sum(), (~SEEN).sum())
    completed = read(out)
    values = np.asarray(completed)
    assert np.array_equal(values[SEEN], X[SEEN])
    np.testing.assert_allclose(values, filled, rtol=1e-7)
    if isinstance(completed, pd.DataFrame):
        before = read(source)
        assert before.columns.equals(completed.columns)
        assert before.index.equals(completed.index)
        assert before.index.names == completed.index.names
    assert [path.name for path in out.parent.iterdir()] == [name], "no temporary file is left"


def test_text_of_observed_cells_stays(tmp_path: Path) -> None:
    """Integers, exponents, quotes, ids such as 007 and NA; only blanks are written."""
    text = 'id;"a;b";c;d\n007;3;1e2;+4.50\nNA;;2;5\nä "q";1.0;NA;n/a\nx; 7 ;6;4\ny;2;NULL;3\nz;1;2;3\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8-sig")
    report = complete_file(tmp_path / "t.csv", tmp_path / "out.csv", **{**QUICK, "dtype": "float32"})
    assert (report.observed, report.predicted) == (14, 4)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == 'id;"a;b";c;d'
    assert lines[1] == "007;3;1e2;+4.50"
    assert lines[2].startswith("NA;")
    assert lines[2].endswith(";2;5")
    assert lines[3].startswith('"ä ""q""";1.0;')
    assert lines[4].split(";") in (["x", "7 ", "6", "4"], ["x", "7", "6", "4"])
    assert lines[6] == "z;1;2;3"
    number = lines[5].split(";")[2]
    assert float(number) == float(f"{float(number):.9g}"), "no more digits than a float32 has"


def test_types_of_parquet_columns(tmp_path: Path) -> None:
    """Integers stay where nothing is missing; single precision stays; the rest is double."""
    table = pd.DataFrame(
        {
            "id": np.arange(M),
            "whole": np.arange(M) + 2**53 + 1,
            "blanks": pd.array([None, *range(1, M)], dtype="Int32"),
            "single": X[:, 1].astype(np.float32),
            "double": X[:, 2],
        }
    )
    table.to_parquet(tmp_path / "t.parquet")
    complete_file(tmp_path / "t.parquet", tmp_path / "o.parquet", **{**QUICK, "bound": 1e18})
    done = pd.read_parquet(tmp_path / "o.parquet")
    assert done["id"].equals(table["id"])
    assert done["whole"].equals(table["whole"])
    assert done["blanks"].dtype == np.float64
    assert done["blanks"][1:].tolist() == list(range(1, M))
    assert done["single"].dtype == np.float32
    assert done["single"][SEEN[:, 1]].equals(table["single"][SEEN[:, 1]])
    assert not done.isna().any().any()
    complete_file(tmp_path / "t.parquet", tmp_path / "o.csv", **{**QUICK, "bound": 1e18})
    assert pd.read_csv(tmp_path / "o.csv")["whole"].tolist() == table["whole"].tolist()


def test_other_types_of_parquet(tmp_path: Path) -> None:
    """Decimals are numbers; categories are ids; a column of nothing is a column."""
    table = pd.DataFrame(
        {
            "kind": pd.Categorical([f"k{i}" for i in range(M)]),
            "decimal": [decimal.Decimal(i) / 4 if i % 2 else None for i in range(M)],
            "nothing": [None] * M,
            **{f"f{j}": X[:, j] for j in range(4)},
        }
    )
    table.to_parquet(tmp_path / "t.parquet")
    report = complete_file(tmp_path / "t.parquet", tmp_path / "o.parquet", **QUICK)
    assert report.shape == (M, 6)
    assert report.empty_columns == 1
    done = pd.read_parquet(tmp_path / "o.parquet")
    assert done["kind"].dtype == "category"
    assert done["decimal"][1::2].tolist() == [i / 4 for i in range(1, M, 2)]
    assert done.notna().all(axis=None)
    ids = pd.Categorical(["b", "a", "b", "a"]), pd.Categorical(["x", "x", "y", "z"])
    pd.DataFrame({"user": ids[0], "item": ids[1], "rating": [1.0, 2, 3, 4]}).to_parquet(
        tmp_path / "l.parquet"
    )
    complete_file(tmp_path / "l.parquet", tmp_path / "o.parquet", **QUICK)
    done = pd.read_parquet(tmp_path / "o.parquet")
    assert done[["user", "item"]].to_numpy().tolist() == [["b", "z"], ["a", "y"]]


@pytest.mark.parametrize("kind", [np.float32, np.int16], ids=str)
def test_types_of_arrays(kind: Any, tmp_path: Path) -> None:
    x = np.where(SEEN, np.rint(10 * X), -99).astype(kind)
    np.save(tmp_path / "t.npy", x)
    complete_file(tmp_path / "t.npy", tmp_path / "o.npy", missing=[-99], **{**QUICK, "bound": 300.0})
    done = np.load(tmp_path / "o.npy")
    assert done.dtype == (np.float32 if kind is np.float32 else np.float64)
    assert np.array_equal(done[SEEN], x[SEEN])


def test_other_endings_convert(tmp_path: Path, filled: np.ndarray) -> None:
    with_ids().to_csv(tmp_path / "t.csv", index=False)
    for name in ("o.parquet", "o.npz", "o.npy", "o.tsv"):
        complete_file(tmp_path / "t.csv", tmp_path / name, **QUICK)
    assert pd.read_parquet(tmp_path / "o.parquet")["city"].tolist() == with_ids()["city"].tolist()
    done = arrays(tmp_path / "o.npz")
    np.testing.assert_allclose(done["X"], filled, rtol=1e-7)
    assert done["row_ids"].tolist() == with_ids()["city"].tolist()
    assert done["column_ids"].tolist() == [f"f{j}" for j in range(N)]
    np.testing.assert_allclose(np.load(tmp_path / "o.npy"), filled, rtol=1e-7)
    assert (tmp_path / "o.tsv").read_text().startswith("city\tf0\t")
    np.save(tmp_path / "t.npy", X)
    complete_file(tmp_path / "t.npy", tmp_path / "o.csv", **QUICK)
    np.testing.assert_allclose(read_csv(tmp_path / "o.csv"), filled, rtol=1e-7)
    again = read_table(tmp_path / "o.npz")
    assert again.shape == (M, N)


def test_replaced_observed_entries(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", X)
    report = complete_file(tmp_path / "t.npy", tmp_path / "o.npy", replace_observed=True, **QUICK)
    done = np.load(tmp_path / "o.npy")
    assert report.predicted == X.size
    assert not np.isnan(done).any()
    assert not np.array_equal(done[SEEN], X[SEEN])
    np.save(tmp_path / "whole.npy", np.nan_to_num(X))
    complete_file(tmp_path / "whole.npy", tmp_path / "o.npy", replace_observed=True, **QUICK)


def test_empty_rows_and_columns(tmp_path: Path) -> None:
    x = X.copy()
    x[3], x[:, 4] = np.nan, np.nan
    with_ids(x).to_csv(tmp_path / "t.csv", index=False)
    report = complete_file(tmp_path / "t.csv", tmp_path / "o.csv", **QUICK)
    assert (report.empty_rows, report.empty_columns) == (1, 1)
    assert "1 row has no observed entry" in report.summary
    assert np.isfinite(read_csv(tmp_path / "o.csv", index_col="city")).all(axis=None)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (2, 2), (30, 3)])
def test_awkward_shapes(shape: tuple[int, int], tmp_path: Path) -> None:
    x = np.arange(float(shape[0] * shape[1])).reshape(shape)
    x[0, -1] = np.nan
    for name in ("t.csv", "t.npy", "t.parquet"):
        if name == "t.npy":
            np.save(tmp_path / name, x)
        elif name == "t.csv":
            frame(x).to_csv(tmp_path / name, index=False)
        else:
            frame(x).to_parquet(tmp_path / name)
        report = complete_file(
            tmp_path / name,
            tmp_path / f"o-{name}",
            index=() if "n" not in name else None,
            **{**QUICK, "bound": 9.0},
        )
        assert report.shape == shape
        assert report.predicted == 1


# --- long tables ---

IDS: dict[str, tuple[list[Any], list[Any]]] = {
    "strings": ([f"u{i}" for i in range(M)], [f"i{j}" for j in range(N)]),
    "integers": ([10 * i for i in range(M)], [3 + j for j in range(N)]),
    "negative integers": ([-i for i in range(M)], [j - 4 for j in range(N)]),
    "large integers": ([2**62 + i for i in range(M)], [-(2**62) - j for j in range(N)]),
    "floats": ([i / 4 for i in range(M)], [-j / 8 for j in range(N)]),
    "dates": (
        list(pd.date_range("2024-02-27", periods=M)),
        [datetime.date(2024, 1, 1 + j) for j in range(N)],
    ),
    "texts that mean missing elsewhere": (
        ["NA", "null", "None", "nan", *(f"u{i}" for i in range(M - 4))],
        [*(f"i{j}" for j in range(N - 2)), "N/A", "n/a"],
    ),
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("kind", IDS)
def test_long_tables_with_ids_of_any_type(kind: str, suffix: str, tmp_path: Path, filled: np.ndarray) -> None:
    """All missing pairs, in the type of the ids."""
    rows, columns = IDS[kind]
    table = long(rows=rows, columns=columns).sample(frac=1, random_state=0)
    source, out = tmp_path / f"t{suffix}", tmp_path / f"o{suffix}"
    separator = "\t" if suffix == ".tsv" else ","
    if suffix == ".parquet":
        table.to_parquet(source, index=False)
        before, after = table, None
    else:
        table.to_csv(source, index=False, sep=separator)
        before = pd.read_csv(source, sep=separator, dtype=str, keep_default_na=False)
    report = complete_file(source, out, layout="long", **QUICK)
    if suffix == ".parquet":
        after = pd.read_parquet(out)
        assert after.dtypes.astype(str).tolist() == pd.read_parquet(source).dtypes.astype(str).tolist()
        names = pd.Index(rows), pd.Index(columns)
    else:
        after = pd.read_csv(out, sep=separator, dtype={"user": str, "item": str}, keep_default_na=False)
        words = pd.DataFrame({"user": pd.Series(rows), "n": range(M)}).to_csv(index=False)
        names = (
            pd.Index(pd.read_csv(io.StringIO(words), dtype=str, keep_default_na=False)["user"]),
            pd.Index([str(c) for c in columns]),
        )
    assert list(after.columns) == list(before.columns) == ["user", "item", "rating"]
    assert report.predicted == len(after) == (~SEEN).sum()
    i = names[0].get_indexer(after["user"])
    j = names[1].get_indexer(after["item"])
    assert sorted(zip(i, j)) == sorted(zip(*np.nonzero(~SEEN)))
    # rows are numbered as they come, which is not the order of the matrix: the fit is close, not the same
    np.testing.assert_allclose(after["rating"], filled[i, j], atol=0.05 * np.abs(filled).max())


def test_long_table_with_blanks_comes_back_whole(tmp_path: Path) -> None:
    """Line by line, with further columns."""
    whole = long(np.nan_to_num(X, nan=-7.0))
    whole["time"] = [f"t{k}" for k in range(len(whole))]
    whole.loc[whole["rating"] == -7.0, "rating"] = np.nan
    whole = whole.drop(index=[5])
    for name in ("t.csv", "t.parquet"):
        source, out = tmp_path / name, tmp_path / f"o-{name}"
        read = pd.read_parquet if name.endswith("parquet") else read_csv
        whole.to_parquet(source) if name.endswith("parquet") else whole.to_csv(source, index=False)
        report = complete_file(source, out, **QUICK)
        done = read(out)
        given = read(source)
        assert done[["user", "item", "time"]].equals(given[["user", "item", "time"]])
        kept = given["rating"].notna()
        assert done["rating"][kept].equals(given["rating"][kept])
        assert done["rating"].notna().all()
        assert report.predicted == (~kept).sum()
        assert "1 other column not used" in report.description


def test_coordinates_in_npz(tmp_path: Path, filled: np.ndarray) -> None:
    np.savez(tmp_path / "t.npz", row=ROWS, col=COLUMNS, data=X[SEEN])
    complete_file(tmp_path / "t.npz", tmp_path / "o.npz", **QUICK)
    done = arrays(tmp_path / "o.npz")
    assert np.array_equal(np.array([done["row"], done["col"]]), np.nonzero(~SEEN))
    np.testing.assert_allclose(done["data"], filled[~SEEN], rtol=1e-7)
    assert done["shape"].tolist() == [M, N]
    complete_file(tmp_path / "t.npz", tmp_path / "o.csv", **QUICK)
    table = pd.read_csv(tmp_path / "o.csv")
    assert list(table.columns) == ["row", "column", "value"]
    np.savez(tmp_path / "t.npz", rows=ROWS, cols=COLUMNS, values=X[SEEN], shape=(M + 2, N))
    assert complete_file(tmp_path / "t.npz", tmp_path / "o.npz", **QUICK).empty_rows == 2
    i, j = np.indices(X.shape).reshape(2, -1)
    np.savez(tmp_path / "t.npz", row=i, col=j, data=X.ravel())  # with NaN: what to fill
    complete_file(tmp_path / "t.npz", tmp_path / "o.npz", **QUICK)
    np.testing.assert_allclose(arrays(tmp_path / "o.npz")["data"], filled.ravel(), rtol=1e-7)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
def test_listed_pairs(suffix: str, tmp_path: Path, filled: np.ndarray) -> None:
    """In their order, observed ones as they were."""
    long().to_csv(tmp_path / "t.csv", index=False)
    table = read_table(tmp_path / "t.csv")
    i, j = np.array([3, 0, 13, 5, 3]), np.array([2, 0, 8, 1, 2])
    pairs = pd.DataFrame({"more": 1, "item": [f"i{k}" for k in j], "user": [f"u{k}" for k in i]})
    if suffix == ".npz":
        np.savez(
            tmp_path / "p.npz",
            row=table.row_ids.get_indexer(pairs["user"]),
            col=table.column_ids.get_indexer(pairs["item"]),
        )
        np.save(tmp_path / "t.npy", np.where(SEEN, X, np.nan))
    elif suffix == ".csv":
        pairs.to_csv(tmp_path / "p.csv", index=False)
    else:
        pairs.to_parquet(tmp_path / "p.parquet")
    source = tmp_path / ("t.npy" if suffix == ".npz" else "t.csv")
    if suffix == ".npz":
        np.savez(tmp_path / "p.npz", row=i, col=j)
    report = complete_file(source, tmp_path / "o.csv", predict=tmp_path / f"p{suffix}", **QUICK)
    done = read_csv(tmp_path / "o.csv")
    if suffix == ".npz":
        assert list(done.columns) == ["row", "column", "value"]
        assert np.array_equal(done[["row", "column"]].to_numpy(), np.stack([i, j], axis=1))
        np.testing.assert_allclose(done["value"], filled[i, j], rtol=1e-7)
    else:
        assert done[["user", "item"]].equals(pairs[["user", "item"]])
    values = done[done.columns[2]]
    assert report.predicted == (~SEEN[i, j]).sum()
    assert np.array_equal(values[SEEN[i, j]], X[i, j][SEEN[i, j]])


def test_pairs_beside_the_table_get_biases(tmp_path: Path) -> None:
    with_ids().to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "p.csv").write_text("city,column\ncity 1,f2\nelsewhere,f2\ncity 1,f99\nelsewhere,f99\n")
    report = complete_file(tmp_path / "t.csv", tmp_path / "o.csv", predict=tmp_path / "p.csv", **QUICK)
    assert report.unknown_pairs == 3
    assert "3 pairs have ids that the table lacks" in report.summary
    done = read_csv(tmp_path / "o.csv")
    assert done["city"].tolist() == ["city 1", "elsewhere", "city 1", "elsewhere"]
    given = {key: value for key, value in QUICK.items() if key != "test_fraction"}
    estimator = NBMatrixCompletion(random_state=0, **given).fit_coo(ROWS, COLUMNS, X[SEEN], X.shape)
    row, column, offset = estimator.row_bias_, estimator.column_bias_, estimator.offset_
    np.testing.assert_allclose(done["value"][1:], [offset + column[2], offset + row[1], offset], rtol=1e-7)


def test_ids_are_matched_across_types(tmp_path: Path) -> None:
    """Integers and dates of a Parquet file are texts in a CSV file."""
    days = pd.date_range("2024-01-01", periods=N)
    long(rows=list(range(100, 100 + M)), columns=days).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "p.csv").write_text("user,item\n100,2024-01-02\n103,2024-01-03 00:00:00\n")
    report = complete_file(
        tmp_path / "t.parquet", tmp_path / "o.parquet", predict=tmp_path / "p.csv", **QUICK
    )
    assert report.unknown_pairs == 0
    done = pd.read_parquet(tmp_path / "o.parquet")
    assert done["user"].tolist() == [100, 103]
    assert done["item"].tolist() == [days[1], days[2]]


def test_layouts_convert(tmp_path: Path) -> None:
    long().to_csv(tmp_path / "l.csv", index=False)
    complete_file(tmp_path / "l.csv", tmp_path / "w.csv", out_layout="wide", **QUICK)
    wide = read_csv(tmp_path / "w.csv", index_col="user")
    assert wide.shape == (M, N)
    assert wide.loc["u1", "i0"] == X[1, 0]
    with_ids().to_csv(tmp_path / "t.csv", index=False)
    complete_file(tmp_path / "t.csv", tmp_path / "o.csv", out_layout="long", **QUICK)
    done = pd.read_csv(tmp_path / "o.csv")
    assert list(done.columns) == ["city", "column", "value"]
    assert len(done) == (~SEEN).sum()


def test_means_of_duplicates(tmp_path: Path) -> None:
    twice = pd.concat([long(), long().assign(rating=lambda table: table["rating"] + 1)])
    twice.to_csv(tmp_path / "t.csv", index=False)
    table = read_table(tmp_path / "t.csv", duplicates="mean")
    assert len(table) == SEEN.sum()
    i = table.row_ids.get_indexer([f"u{k}" for k in ROWS])
    j = table.column_ids.get_indexer([f"i{k}" for k in COLUMNS])
    np.testing.assert_allclose(table.values[table.find(i, j)], X[SEEN] + 0.5)
    doubled = pd.concat([with_ids(), with_ids().iloc[:3]])
    doubled.to_csv(tmp_path / "w.csv", index=False)
    report = complete_file(tmp_path / "w.csv", tmp_path / "o.csv", duplicates="mean", **QUICK)
    assert report.shape == (M, N)
    done = read_csv(tmp_path / "o.csv", index_col="city")
    np.testing.assert_allclose(done.to_numpy()[SEEN], X[SEEN], rtol=1e-12)


# --- what is recognised ---


def described(text: str, tmp_path: Path, name: str = "t.csv", **choices: Any) -> Table:
    (tmp_path / name).write_text(text)
    return read_table(tmp_path / name, Choices(**choices))


@pytest.mark.parametrize(
    ("text", "layout", "row_ids", "column_ids"),
    [
        ("a,b\n1,\n,2\n", "wide", [0, 1], ["a", "b"]),
        ("id,a,b\n7,1,\n9,,2\n", "wide", ["7", "9"], ["a", "b"]),
        ("userId,a,b\n7,1,\n9,,2\n", "wide", ["7", "9"], ["a", "b"]),
        ("n,a,b\n1,1,\n2,,2\n3,5,1\n", "wide", ["1", "2", "3"], ["a", "b"]),
        (",2001,2002\nx,1,\ny,,2\n", "wide", ["x", "y"], ["2001", "2002"]),
        ("2001,2002\n1,\n,2\n", "wide", [0, 1], ["2001", "2002"]),
        ("5,4,\n3,,2\n", "wide", [0, 1], [0, 1, 2]),
        ("1.5,2.5\n3,nan\n", "wide", [0, 1], [0, 1]),
        ("city,a\nx,1\ny,2\nz,\n", "wide", ["x", "y", "z"], ["a"]),
        ("name,1,2\nx,3,4\ny,,4\nz,1,4\n", "wide", ["x", "y", "z"], ["1", "2"]),
        ("user,item,rating\nu,i,3\nv,j,4\n", "long", ["u", "v"], ["i", "j"]),
        ("rating,movieId,userId\n3,8,7\n4,9,6\n", "long", ["7", "6"], ["8", "9"]),
        ("who,what,how\nu,i,3\nv,j,4\n", "long", ["u", "v"], ["i", "j"]),
        ("who,what,how\n1,5,3\n1,6,4\n2,5,1\n", "long", ["1", "2"], ["5", "6"]),
        ("who,what,how\n1.5,5,3\n1.5,6,4\n2,5,1\n", "wide", [0, 1, 2], ["who", "what", "how"]),
        ("ticker,day,price\nA,2020-01-02,5\nA,2020-01-03,\n", "long", ["A"], ["2020-01-02", "2020-01-03"]),
    ],
)
def test_what_is_recognised(
    text: str, layout: str, row_ids: list[Any], column_ids: list[Any], tmp_path: Path
) -> None:
    table = described(text, tmp_path)
    assert table.layout == layout
    assert [str(label) for label in table.row_ids] == [str(label) for label in row_ids]
    assert [str(label) for label in table.column_ids] == [str(label) for label in column_ids]


def test_choices_win(tmp_path: Path) -> None:
    ratings = "196\t242\t3\t881250949\n186\t302\t3\t891717742\n196\t302\t1\t878887116\n"
    table = described(ratings, tmp_path, "u.tsv", layout="long")
    assert table.row_ids.tolist() == ["196", "186"], "a first line of numbers that do not increase is data"
    assert table.values.tolist() == [3, 3, 1]
    table = described(ratings, tmp_path, "u.tsv", layout="long", header=False, value="3", row="1")
    assert table.values[0] == 881250949
    assert table.row_ids.tolist() == ["242", "302"]
    text = "user,item,rating\n1,2,3\n4,5,\n"
    assert described(text, tmp_path, layout="wide", index=()).shape == (2, 3)
    assert described(text, tmp_path, index=("item",)).column_ids.tolist() == ["user", "rating"]
    assert described("g,h,a\nx,1,2\nx,2,\n", tmp_path, index=("g", "h")).row_ids.tolist() == [
        ("x", "1"),
        ("x", "2"),
    ]
    assert described("a,b\n1,2\n3,\n", tmp_path, header=False, missing=("a", "b")).shape == (3, 2)
    table = described("a,b\n-999,2\n3,?\n1,-999.0\n", tmp_path, missing=("-999", "?"))
    assert table.values.tolist() == [3, 1, 2]


def test_missing_markers_are_those_of_pandas(tmp_path: Path) -> None:
    from pandas._libs.parsers import STR_NA_VALUES

    from nblora.completion.frames import MARKERS

    assert MARKERS == STR_NA_VALUES | {""}  # noqa: SIM300
    cells = "\n".join(f"{marker},1" for marker in sorted(MARKERS))
    assert len(described(f"a,b\n2,1\n{cells}\n3,5\n4,5\n", tmp_path)) == 6 + len(MARKERS) - 1 + 1


# --- pictures ---


def photo(channels: int, alpha: bool = True, depth: int = 255) -> np.ndarray:
    """(24, 20, channels [+ 1]) smooth, with transparent pixels."""
    y, x = np.mgrid[:24, :20] / 24
    planes = [np.sin(3 * x + k) * np.cos(2 * y) + y for k in range(channels)]
    pixels = np.stack(planes, axis=2)
    pixels = np.rint(depth * (pixels - pixels.min()) / np.ptp(pixels)).astype(
        np.uint8 if depth == 255 else np.uint16
    )
    if not alpha:
        return pixels
    opaque = np.where(np.random.default_rng(0).random((24, 20)) < 0.6, 255, 0).astype(np.uint8)
    pixels = np.where(opaque[:, :, None] > 0, pixels, 0)
    return np.concatenate([pixels, opaque[:, :, None]], axis=2)


PICTURE = {**QUICK, "rank": 4, "bound": 60_000.0}


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_are_filled(channels: int, suffix: str, tmp_path: Path) -> None:
    pixels = photo(channels)
    whole = photo(channels, alpha=False)
    Image.fromarray(pixels).save(tmp_path / "t.png")
    report = complete_file(tmp_path / "t.png", tmp_path / f"o{suffix}", **PICTURE)
    assert report.shape == (24, 20 * channels)
    grey_in_colours = suffix == ".webp" and channels == 1
    done = pixels_of(tmp_path / f"o{suffix}", "L" if grey_in_colours else None).reshape(24, 20, channels)
    seen = pixels[:, :, -1] > 0
    assert np.array_equal(done[seen], whole[seen])
    assert np.abs(done[~seen].astype(float) - whole[~seen]).mean() < 12


def test_colours_that_stand_for_missing(tmp_path: Path) -> None:
    pixels = photo(3)
    holes = pixels[:, :, 3] == 0
    pixels[holes] = (255, 0, 255, 255)
    Image.fromarray(pixels[:, :, :3]).save(tmp_path / "t.png")
    for colour in ("#ff00FF", "255,0,255"):
        report = complete_file(tmp_path / "t.png", tmp_path / "o.png", missing=[colour], **PICTURE)
        assert report.predicted == 3 * holes.sum()
        assert pixels_of(tmp_path / "o.png").shape == (24, 20, 3)
    grey = photo(1)
    Image.fromarray(np.where(grey[:, :, 1] == 0, 0, np.maximum(grey[:, :, 0], 1))).save(tmp_path / "g.png")
    assert (
        complete_file(tmp_path / "g.png", tmp_path / "o.png", missing=[0], **PICTURE).predicted == holes.sum()
    )
    Image.fromarray(np.where(holes, 7, photo(1, alpha=False, depth=65535)[:, :, 0])).save(tmp_path / "d.png")
    complete_file(tmp_path / "d.png", tmp_path / "o.png", missing=[7], **{**PICTURE, "bound": 1e7})
    assert pixels_of(tmp_path / "o.png").max() > 255


def test_half_transparent_pixels_stay(tmp_path: Path) -> None:
    pixels = photo(3)
    pixels[0, 0] = (1, 2, 3, 128)
    Image.fromarray(pixels).save(tmp_path / "t.png")
    complete_file(tmp_path / "t.png", tmp_path / "o.png", **PICTURE)
    done = pixels_of(tmp_path / "o.png")
    assert done[0, 0].tolist() == [1, 2, 3, 128]
    assert (done[:, :, 3] > 0).all()


def test_pixels_are_held_out_whole(tmp_path: Path) -> None:
    """One channel of a pixel nearly tells the others."""
    Image.fromarray(photo(3)).save(tmp_path / "t.png")
    table = read_table(tmp_path / "t.png")
    held = table.held_out(0.25, 0)
    pixels = table.rows * 20 + table.columns % 20
    assert not {*pixels[held]} & {*pixels[~held]}
    assert len({*pixels[held]}) == round(0.25 * len({*pixels}))


# --- held-out entries, the report, figures ---


def test_held_out_errors_are_honest(tmp_path: Path) -> None:
    """By hand: a fit without the held-out entries, judged on them."""
    x = matrix(30, 20)
    np.save(tmp_path / "t.npy", x)
    report = complete_file(
        tmp_path / "t.npy", tmp_path / "o.npy", **{**QUICK, "test_fraction": 0.2, "seed": 3}
    )
    table = read_table(tmp_path / "t.npy")
    held = table.held_out(0.2, 3)
    assert report.held_out == held.sum() == round(0.2 * (~np.isnan(x)).sum())
    rest = x.copy()
    rest[table.rows[held], table.columns[held]] = np.nan
    test = x[table.rows[held], table.columns[held]]
    predicted = expected(rest)[table.rows[held], table.columns[held]]
    means = np.nanmean(rest, axis=0)[table.columns[held]]

    def rmse(of: Any) -> float:
        return float(np.sqrt(np.mean((of - test) ** 2)))

    assert report.rmse == pytest.approx(rmse(predicted), rel=1e-6)
    assert report.rmse_of_column_means == pytest.approx(rmse(means))
    assert report.rmse_of_mean == pytest.approx(rmse(np.nanmean(rest)))
    assert report.rmse < report.rmse_of_column_means
    assert [row[0] for row in report.rows()[1:]] == ["completion", "column means", "mean of all"]


def test_few_entries_are_all_used(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([[1.0, 2, np.nan], [2, 4, 6]]))
    report = complete_file(tmp_path / "t.npy", tmp_path / "o.npy", **{**QUICK, "test_fraction": 0.5})
    assert report.held_out == 0
    assert report.rows() == [("prediction by", "held-out RMSE")]
    assert "No entries were held out" in report.summary


def test_a_constant_table(tmp_path: Path) -> None:
    """Nothing is left for the matrix beside its offset."""
    np.save(tmp_path / "t.npy", np.where(SEEN, 2.5, np.nan))
    report = complete_file(tmp_path / "t.npy", tmp_path / "o.npy", plot=tmp_path / "p.png")
    assert report.rank == 0
    np.testing.assert_allclose(np.load(tmp_path / "o.npy"), 2.5, rtol=1e-6)
    with_ids(np.where(SEEN, 2.5, np.nan)).to_csv(tmp_path / "t.csv", index=False)
    complete_file(tmp_path / "t.csv", tmp_path / "o.csv", plot=tmp_path / "p.png")  # an empty spectrum
    few = complete_file(tmp_path / "t.npy", tmp_path / "o.npy", missing=[], test_fraction=0)
    assert "chosen on validation entries" in few.summary
    np.save(tmp_path / "t.npy", [[1.0, np.nan], [2.0, 4.0]])
    assert "too few entries to choose by" in complete_file(tmp_path / "t.npy", tmp_path / "o.npy").summary


def test_report_says_rank_and_bound(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", matrix(40, 30))
    stages: list[tuple[str, int]] = []
    report = complete_file(
        tmp_path / "t.npy",
        tmp_path / "o.npy",
        rank=6,
        on_progress=lambda stage, iterations: stages.append((stage, iterations)),
    )
    assert report.bound_chosen
    assert 0 < report.rank <= 6
    assert 0 < report.used <= 1 + 1e-6
    assert f"Rank {report.rank}; the nuclear norm" in report.summary
    assert report.validation_rmse is not None
    assert report.validation_table
    assert stages
    assert any(stage.startswith("held-out check") for stage, _ in stages)
    assert all(iterations >= 1 for _, iterations in stages)
    assert report.rmse < 0.5 * report.rmse_of_column_means


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
@pytest.mark.parametrize("kind", ["picture", "matrix", "table"])
def test_figures(kind: str, suffix: str, tmp_path: Path) -> None:
    source = tmp_path / {"picture": "t.png", "matrix": "t.npy", "table": "t.csv"}[kind]
    if kind == "picture":
        Image.fromarray(photo(3)).save(source)
    elif kind == "matrix":
        np.save(source, X)
    else:
        with_ids().to_csv(source, index=False)
    out = source.with_name(f"out{source.suffix}")
    complete_file(
        source, out, plot=tmp_path / f"plot{suffix}", **{**(PICTURE if kind == "picture" else QUICK)}
    )
    drawn = (tmp_path / f"plot{suffix}").read_bytes()
    start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix]
    assert drawn.startswith(start)
    assert len(drawn) > 5000
    if suffix == ".png":
        pixels = pixels_of(tmp_path / "plot.png", "RGB")
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


# --- too large ---


def test_a_dense_table_that_does_not_fit_is_refused_before_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "t.npz", row=[0, 10], col=[5, 7], data=[1.0, 2.0], shape=(3_000_000, 2_000_000))
    monkeypatch.setattr(NBMatrixCompletion, "fit_coo", None)
    with pytest.raises(
        TableError, match=r"3,000,000 × 2,000,000 entries, which need 96 TB .*--predict PAIRS"
    ):
        complete_file(tmp_path / "t.npz", tmp_path / "o.npz", out_layout="wide")
    with pytest.raises(TableError, match=r"at most 5,000,000, got 5,999,999,999,998 .*144 TB"):
        complete_file(tmp_path / "t.npz", tmp_path / "o.npz")
    scipy.sparse.save_npz(
        tmp_path / "s.npz", scipy.sparse.coo_array(([1.0], ([0], [0])), shape=(3_000_000, 2_000_000))
    )
    with pytest.raises(TableError, match="must fit into memory"):
        complete_file(tmp_path / "s.npz", tmp_path / "o.npz")
    np.save(tmp_path / "t.npy", X)
    monkeypatch.setattr(job, "free_memory", lambda: 16 * X.size - 1)
    with pytest.raises(TableError, match=r"14 × 9 entries, which need 2\.02 kB of 2\.02 kB free"):
        complete_file(tmp_path / "t.npy", tmp_path / "o.npy")
    assert not list(tmp_path.glob("*o.np*"))


def test_listed_pairs_of_a_table_that_does_not_fit(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows, columns = random.integers(0, 3_000, 5000) * 997, random.integers(0, 2_000, 5000) * 991
    table = pd.DataFrame({"row": rows, "column": columns, "value": random.normal(size=5000)})
    table.drop_duplicates(["row", "column"]).to_csv(tmp_path / "t.csv", index=False)
    table.iloc[::100, :2].to_csv(tmp_path / "p.csv", index=False)
    report = complete_file(
        tmp_path / "t.csv", tmp_path / "o.csv", predict=tmp_path / "p.csv", **{**QUICK, "max_iter": 3}
    )
    assert report.predicted == 0
    assert len(pd.read_csv(tmp_path / "o.csv")) == 50


def test_large_tables_are_written_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filled: np.ndarray
) -> None:
    monkeypatch.setattr(files, "_LINES", 4)
    monkeypatch.setattr("nblora.completion.table.CHUNK", 3 * M)
    with_ids().to_csv(tmp_path / "t.csv", index=False)
    complete_file(tmp_path / "t.csv", tmp_path / "o.csv", **QUICK)
    np.testing.assert_allclose(read_csv(tmp_path / "o.csv", index_col="city"), filled, rtol=1e-7)
