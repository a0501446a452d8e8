"""`nblora complete`: what it prints, the same numbers as the function, and one line for every mistake."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from PIL import Image
from typer.testing import CliRunner, Result

from nblora.cli import app
from nblora.completion import NBMatrixCompletion
from nblora.completion.job import complete_file
from test_completion_files import X, long, matrix, photo, with_ids

ROOT = Path(__file__).parent.parent
FAST = ("--rank", 2, "--bound", 30, "--rank-selection", "none", "--max-iter", 10)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout.strip() == ""
    assert result.stderr.startswith("nblora: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def test_the_command_is_the_function(tmp_path: Path) -> None:
    with_ids(matrix(30, 20)).to_csv(tmp_path / "t.csv", index=False)
    result = run("complete", tmp_path / "t.csv", "-o", tmp_path / "a.csv", "--rank", 4, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    report = complete_file(tmp_path / "t.csv", tmp_path / "b.csv", rank=4, seed=3)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert report.rmse is not None
    for row in report.rows():
        assert all(cell in result.stdout for cell in row)
    assert f"Error on {report.held_out} entries held out" in result.stdout
    assert report.summary in result.stdout
    assert f"Rank {report.rank};" in result.stdout
    assert f"is at most {report.bound:.4g} (chosen on validation entries)" in result.stdout
    text = run("complete", tmp_path / "t.csv", "-o", tmp_path / "a.csv", "--rank", 4, "--seed", 3, "--json")
    parsed, own = json.loads(text.stdout), json.loads(report.to_json())
    for given in (parsed, own):
        del given["seconds"], given["out"]
    assert parsed == own


def test_options_are_those_of_the_estimator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def look(source: Path, out: Path, **options: Any) -> None:
        seen.clear()
        seen.update(options)
        raise ValueError("seen")

    monkeypatch.setattr("nblora.completion.job.complete_file", look)
    np.save(tmp_path / "t.npy", X)
    command = ["complete", tmp_path / "t.npy", "-o", tmp_path / "o.npy"]
    names = inspect.signature(NBMatrixCompletion).parameters
    run(*command)
    assert not {*seen} & {*names} - {"duplicates"}, "defaults are the estimator's"
    options = "--rank 3 --bound 2.5 --norm 2 --parametrization svd --rank-selection none --bias none"
    more = "--weighting popularity --max-iter 7 --device cpu --dtype float64 --duplicates mean"
    run(*command, *options.split(), *more.split())
    expected = {
        "rank": 3, "bound": 2.5, "norm": 2.0, "parametrization": "svd", "rank_selection": None, "bias": None,
        "weighting": "popularity", "max_iter": 7, "device": "cpu", "dtype": "float64", "duplicates": "mean",
    }  # fmt: skip
    assert {name: seen[name] for name in expected} == expected
    assert {*expected} <= {*names}
    run(*command, "--bound", "auto", "--norm", "ky-fan-2", "--weighting", "none", "--no-index", "--no-header")
    assert (seen["bound"], seen["norm"], seen["weighting"]) == ("auto", "ky-fan-2", None)
    assert (seen["index"], seen["header"]) == ((), False)


def test_help_says_the_defaults_of_the_estimator() -> None:
    text = " ".join(re.sub(r"[│\n]", " ", run("complete", "--help").stdout).split())
    for name, parameter in inspect.signature(NBMatrixCompletion).parameters.items():
        if f"--{name.replace('_', '-')} " in text and name != "duplicates":
            assert f"Default: {str(parameter.default).lower()}." in text, name
    assert "Share of the entries that is held out from a fit of its own" in text


@pytest.mark.parametrize("kind", ["picture", "table"])
def test_plot_and_picture(kind: str, tmp_path: Path) -> None:
    if kind == "picture":
        Image.fromarray(photo(3)).save(tmp_path / "t.png")
        bound, source, out = 60000, tmp_path / "t.png", tmp_path / "o.png"
    else:
        with_ids().to_csv(tmp_path / "t.csv", index=False)
        bound, source, out = 30, tmp_path / "t.csv", tmp_path / "o.csv"
    result = run("complete", source, "-o", out, *FAST, "--bound", bound, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    assert f"Wrote {out} and {tmp_path / 'plot.png'}" in result.stdout
    assert len((tmp_path / "plot.png").read_bytes()) > 10_000


# --- mistakes ---


def csv(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "t.csv").write_text(text)
        return folder / "t.csv"

    return write


def made(name: str, write: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / name)
        return folder / name

    return make


def npz(**arrays: Any) -> Callable[[Path], Path]:
    return made("t.npz", lambda path: np.savez(path, **arrays))


def parquet(**columns: Any) -> Callable[[Path], Path]:
    return made("t.parquet", lambda path: pd.DataFrame(columns).to_parquet(path))


def picture(pixels: np.ndarray) -> Callable[[Path], Path]:
    return made("t.png", lambda path: Image.fromarray(pixels).save(path))


LONG = "user,item,rating\n"
WIDE = "id,a,b\n"
SPARSE = scipy.sparse.coo_array(([1.0, 2.0], ([0, 1], [0, 1])), shape=(4, 4))
MISTAKES: dict[str, tuple[Callable[[Path], Path], list[object], list[str]]] = {
    "no file": (lambda folder: folder / "none.csv", [], ["none.csv, which does not exist"]),
    "a folder": (lambda folder: folder, [], ["the table must be a file", "which is a folder"]),
    "unknown ending": (made("t.xlsx", lambda path: path.touch()), [], ["must be one of .csv", "t.xlsx"]),
    "empty": (csv(""), [], ["at least one row, got an empty file"]),
    "only a heading": (csv(WIDE), [], ["at least one row, got none"]),
    "only ids": (csv("id\n1\n2\n"), ["--index", "id"], ["must have columns with values"]),
    "text in wide": (csv(WIDE + "x,1,\ny,oops,3\n"), [], ["got 'oops' in column 'a', line 3 of"]),
    "text in the first column": (
        csv("a,b\n1,2\noops,3\n4,\n5,6\n"),
        [],
        ["got 'oops' in column 'a', line 3", "--index names columns with row ids"],
    ),
    "text in long": (csv(LONG + "u,i,5\nv,j,five\n"), [], ["got 'five' in column 'rating', line 3"]),
    "underscore": (csv(WIDE + "x,1_000,\ny,,3\n"), [], ["got '1_000' in column 'a'"]),
    "decimal comma": (csv("id;a;b\nx;1,5;\ny;2;3\n"), [], ["got '1,5'", "decimals are written with a point"]),
    "text in parquet": (parquet(a=[1.0, None], b=["x", "y"]), [], ["got 'x' in column 'b', line 1"]),
    "numbers as text in parquet": (parquet(a=[1.0, None], b=["1", "2"]), [], ["got '1' in column 'b'"]),
    "truth values": (parquet(a=[1.0, None], b=[True, False]), [], ["got bool in column 'b'"]),
    "dates as values": (
        parquet(a=[1.0, None], b=pd.date_range("2020", periods=2)),
        [],
        ["got datetime64", "in column 'b'"],
    ),
    "inf in wide": (csv(WIDE + "x,1,\ny,2,inf\n"), [], ["must be finite, got inf in row 'y', column 'b'"]),
    "inf without ids": (
        csv("a,b\n1,\n2,-Infinity\n"),
        [],
        ["got -inf in row 1 (counted from 0), column 'b'"],
    ),
    "too large for a float": (csv(LONG + "u,i,1e999\n"), [], ["got inf in row 'u', column 'i'"]),
    "inf in npy": (made("t.npy", lambda path: np.save(path, [[1, np.inf], [np.nan, 1]])), [], ["column 1"]),
    "inf in parquet": (parquet(a=[1.0, np.inf], b=[1.0, None]), [], ["got inf in row 1", "column 'a'"]),
    "all missing in wide": (csv(WIDE + "x,,\ny,NA,\n"), [], ["must have observed entries, got none"]),
    "all missing in long": (csv(LONG + "u,i,\nv,j,\n"), [], ["must have observed entries, got none"]),
    "all missing in npz": (npz(M=np.full((3, 3), np.nan)), [], ["must have observed entries, got none"]),
    "nothing missing": (csv(WIDE + "x,1,2\ny,3,4\n"), [], ["must have missing entries, got all 2 × 2"]),
    "nothing missing in long": (csv(LONG + "u,i,2\nu,j,4\n"), [], ["must have missing entries"]),
    "duplicates": (
        csv(LONG + "ann,dune,5\nbob,dune,4\nann,dune,3\nbob,dune,4\nbob,dune,1\n"),
        [],
        ["got row 'ann', column 'dune' 2 times and 1 more pairs several times", "--duplicates mean"],
    ),
    "duplicates of numbers": (
        parquet(user=[-7, 8, -7], item=[2, 2, 2], rating=[1.0, 2.0, 3.0]),
        [],
        ["got row -7, column 2 2 times in", "--duplicates mean"],
    ),
    "duplicates in npz": (
        npz(row=[0, 0], col=[1, 1], data=[1.0, 2.0]),
        [],
        ["row 0 (counted from 0), column 1 (counted from 0) 2 times"],
    ),
    "duplicates in a sparse matrix": (
        made(
            "t.npz",
            lambda path: scipy.sparse.save_npz(
                path, scipy.sparse.coo_array(([1.0, 2.0], ([0, 0], [1, 1])), shape=(3, 3))
            ),
        ),
        [],
        ["row 0 (counted from 0), column 1 (counted from 0) 2 times"],
    ),
    "row ids twice": (
        csv(WIDE + "x,1,\ny,,3\nx,1,2\n"),
        [],
        ["got 'x' in lines 2 and 4", "--duplicates mean"],
    ),
    "column names twice": (csv("id,a,a\nx,1,\ny,,3\n"), [], ["got 'a' 2 times", "--duplicates mean"]),
    "blank row id": (csv(WIDE + "x,1,\n,2,3\n"), [], ["ids must not be missing", "column 'id', line 3"]),
    "blank id in long": (csv(LONG + "u,i,1\nv,,2\n"), [], ["got a blank in column 'item', line 3"]),
    "missing id in parquet": (
        parquet(user=["u", None], item=["i", "j"], rating=[1.0, 2.0]),
        [],
        ["got a blank in column 'user', line 2"],
    ),
    "ragged": (csv(WIDE + "x,1,2\ny,1,2,3\n"), [], ["must be a table", "line 3"]),
    "latin-1": (made("t.csv", lambda path: path.write_bytes(b"id,a\n\xe4,1\nb,\n")), [], ["text in UTF-8"]),
    "no parquet": (made("t.parquet", lambda path: path.write_bytes(b"noise")), [], ["must be Parquet"]),
    "no npz": (made("t.npz", lambda path: path.write_bytes(b"noise")), [], ["must be an array file"]),
    "pickled": (
        made("t.npy", lambda path: np.save(path, np.array([[{}]], dtype=object), allow_pickle=True)),
        [],
        ["must be an array file"],
    ),
    "three dimensions": (made("t.npy", lambda path: np.save(path, np.ones((2, 2, 2)))), [], ["(2, 2, 2)"]),
    "complex": (
        made("t.npy", lambda path: np.save(path, np.ones((2, 2)) * 1j)),
        [],
        ["must be real numbers"],
    ),
    "two matrices": (npz(a=np.ones((2, 2)), b=np.ones((2, 2))), [], ["one two-dimensional array"]),
    "negative coordinates": (
        npz(row=[0, -1], col=[0, 1], data=[1.0, 2.0]),
        [],
        ["at least 0, got -1 in row"],
    ),
    "coordinates beyond the shape": (
        npz(row=[0, 5], col=[0, 1], data=[1.0, 2.0], shape=[3, 3]),
        [],
        ["must be below shape (3, 3), got 5 in row"],
    ),
    "coordinates that are no integers": (
        npz(row=[0.5, 1], col=[0, 1], data=[1.0, 2.0]),
        [],
        ["must be integers, got row of type float64"],
    ),
    "coordinates of several lengths": (npz(row=[0], col=[0, 1], data=[1.0, 2]), [], ["of one length"]),
    "diagonals": (
        made("t.npz", lambda path: scipy.sparse.save_npz(path, SPARSE.todia())),
        [],
        ["csr, csc or coo", "format dia"],
    ),
    "no picture": (made("t.png", lambda path: path.write_bytes(b"noise")), [], ["must be a picture"]),
    "picture without holes": (
        picture(photo(3, alpha=False)),
        [],
        ["no pixel is transparent", "--missing names their colour"],
    ),
    "no colour": (picture(photo(3)), ["--missing", "pink"], ["colour must be", "got 'pink'"]),
    "all transparent": (picture(np.zeros((4, 4, 4), np.uint8)), [], ["must have observed entries"]),
    "unknown index": (csv(WIDE + "x,1,\ny,,3\n"), ["--index", "name"], ["('id', 'a', 'b'), got 'name'"]),
    "index twice": (csv(WIDE + "x,1,\n"), ["--index", "id", "--no-index"], ["--no-index must not be given"]),
    "unknown column": (
        csv(LONG + "u,i,1\n"),
        ["--value", "stars"],
        ["value must be a column", "got 'stars'"],
    ),
    "same column": (
        csv(LONG + "u,i,1\n"),
        ["--row", "user", "--column", "user"],
        ["must be different columns"],
    ),
    "long with two columns": (csv("a,b\nx,1\n"), ["--layout", "long"], ["must have three columns", "got 2"]),
    "layout": (csv(WIDE + "x,1,\n"), ["--layout", "tall"], ["auto, wide or long, got 'tall'"]),
    "layout of an array": (npz(M=X), ["--layout", "long"], ["layout must be wide for what is in"]),
    "row of an array": (npz(M=X), ["--row", "user"], ["must be given for a CSV or Parquet file only"]),
    "missing of an array": (npz(M=X), ["--missing", "?"], ["must be a number for an array, got '?'"]),
    "out layout": (npz(M=X), ["--out-layout", "tall"], ["out_layout must be wide or long"]),
    "duplicates option": (npz(M=X), ["--duplicates", "first"], ["must be 'error' or 'mean', got 'first'"]),
    "test fraction": (npz(M=X), ["--test-fraction", "1"], ["test_fraction must be", "got 1.0"]),
    "test fraction nan": (npz(M=X), ["--test-fraction", "nan"], ["test_fraction must be", "got nan"]),
    "plot ending": (npz(M=X), ["--plot", "p.gif"], [".png, .pdf or .svg file, got p.gif"]),
    "rank": (npz(M=X), ["--rank", "0"], ["rank must be an integer >= 1"]),
    "bound": (npz(M=X), ["--bound", "-1"], ["bound must be", "> 0"]),
    "bound nan": (npz(M=X), ["--bound", "nan"], ["bound must be"]),
    "bound in words": (npz(M=X), ["--bound", "large"], ["bound must be", "large"]),
    "norm": (npz(M=X), ["--norm", "frob"], ["norm must be"]),
    "bias": (npz(M=X), ["--bias", "rows"], ["bias must be"]),
    "weighting": (npz(M=X), ["--weighting", "mean"], ["weighting must be"]),
    "device": (npz(M=X), ["--device", "abacus"], ["device must be", "abacus"]),
    "dtype": (npz(M=X), ["--dtype", "int8"], ["dtype must be"]),
    "no pairs": (npz(M=X), ["--predict", "none.csv"], ["pairs to predict must be a file, got none.csv"]),
    "pairs and wide": (
        npz(M=X),
        ["--predict", "p.csv", "--out-layout", "wide"],
        ["out_layout must be long where pairs"],
    ),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(mistake: str, here: Path) -> None:
    make, options, parts = MISTAKES[mistake]
    source = make(here)
    suffix = source.suffix if source.is_file() and source.suffix != ".xlsx" else ".csv"
    out = here / f"out{suffix}"
    out.write_bytes(b"an earlier result")
    before = contents(here.parent)
    one_line(run("complete", source, "-o", out, *options), *parts)
    one_line(run("complete", source, "-o", here / "new" / f"out{suffix}", *options), *parts)
    assert contents(here.parent) == before
    assert not (here / "new").exists()


def test_mistakes_about_the_output(here: Path) -> None:
    long().to_csv("l.csv", index=False)
    with_ids().to_csv("w.csv", index=False)
    Image.fromarray(photo(3)).save("t.png")
    Path("p.csv").write_text("user,item\nx,y\n")
    Path("half.csv").write_text("user,item\nu1,\n")
    Path("one.csv").write_text("user\nu1\n")
    Path("empty.csv").write_text("user,item\n")
    before = contents(here.parent)
    one_line(run("complete", "w.csv", "-o", "o.txt"), "must be written as one of .csv", "got o.txt")
    one_line(run("complete", "w.csv", "-o", "o.png"), "must be written as one of .csv")
    one_line(run("complete", "w.csv", "-o", "in"), "must be written as one of", "got in")
    Path("folder.csv").mkdir()
    one_line(
        run("complete", "w.csv", "-o", "folder.csv"), "folder.csv cannot be written: it is no regular file"
    )
    one_line(run("complete", "w.csv", "-o", "w.csv/o.csv"), "w.csv is no folder that can be written to")
    one_line(run("complete", "l.csv", "-o", "o.npy"), "a long table must be written as .csv")
    one_line(run("complete", "t.png", "-o", "o.csv"), "a picture must be written as one of .png")
    one_line(run("complete", "t.png", "-o", "o.png", "--predict", "p.csv"), "without pairs to predict")
    one_line(
        run("complete", "w.csv", "-o", "o.png.csv", "--plot", "o.png.csv"),
        "a plot must be a .png, .pdf or .svg",
    )
    one_line(run("complete", "t.png", "-o", "o.png", "--plot", "o.png"), "the plot must be another file")
    one_line(
        run("complete", "l.csv", "-o", "o.csv", "--predict", "p.csv"),
        "must have row ids of l.csv, got none, but 'x'",
    )
    one_line(run("complete", "l.csv", "-o", "o.csv", "--predict", "half.csv"), "got a blank column id")
    one_line(run("complete", "l.csv", "-o", "o.csv", "--predict", "one.csv"), "must have two columns")
    one_line(
        run("complete", "l.csv", "-o", "o.csv", "--predict", "empty.csv"), "must be at least one, got none"
    )
    one_line(
        run("complete", "l.csv", "-o", "o.csv", "--predict", "t.png"),
        "must be a .csv, .tsv, .parquet or .npz",
    )
    Path("folder.csv").rmdir()
    assert contents(here.parent) == before


def test_a_table_that_does_not_fit_says_so_before_the_fit(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NBMatrixCompletion, "fit_coo", None)
    scipy.sparse.save_npz(
        "t.npz", scipy.sparse.coo_array(([1.0, 2.0], ([0, 1], [0, 1])), shape=(10**6, 10**6))
    )
    result = run("complete", "t.npz", "-o", "o.npz")
    one_line(
        result,
        "1,000,000 × 1,000,000 entries, which need 16 TB",
        "list the pairs that you need with --predict",
    )
    assert not Path("o.npz").exists()


def test_a_write_that_fails_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a table without its figure, nor half of either."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with_ids().to_csv("t.csv", index=False)
    Path("o.csv").write_text("earlier")
    before = contents(here.parent)
    for name in ("nblora.completion.job.plot_fit", "pandas.DataFrame.to_csv"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            result = run("complete", "t.csv", "-o", "o.csv", "--plot", "p.png", *FAST, "--test-fraction", 0)
        one_line(result, "o.csv cannot be written", "No space left")
        assert contents(here.parent) == before


def test_the_input_can_be_the_output(here: Path) -> None:
    with_ids().to_csv("t.csv", index=False)
    assert run("complete", "t.csv", "-o", "t.csv", *FAST).exit_code == 0
    assert pd.read_csv("t.csv").notna().all(axis=None)
    one_line(run("complete", "t.csv", "-o", "t.csv", *FAST), "must have missing entries")


def test_missing_extra_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "sklearn" else find(name, *more)
    )
    one_line(
        run("complete", "t.csv", "-o", "o.csv"), "Completion needs sklearn: pip install 'nblora[completion]'"
    )


def test_interrupted(here: Path) -> None:
    """Ctrl-C: status 130, nothing written."""
    np.save(
        "t.npy", np.where(np.random.default_rng(0).random((400, 300)) < 0.5, 1.0, np.nan) * np.arange(300)
    )
    code = (
        "import os, signal, sys\n"
        "from nblora.completion import NBMatrixCompletion\n"
        "fit = NBMatrixCompletion.fit_coo\n"
        "def stopped(*a, **k):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return fit(*a, **k)\n"
        "NBMatrixCompletion.fit_coo = stopped\n"
        "from nblora.__main__ import main\n"
        "sys.argv = ['nblora', 'complete', 't.npy', '-o', 'o.npy']\n"
        "main()\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 130, finished.stderr
    assert finished.stderr.strip() == "nblora: stopped; nothing is written"
    assert [path.name for path in Path.cwd().iterdir() if path.is_file()] == ["t.npy"]


def test_names_with_brackets_are_printed_as_they_are(here: Path) -> None:
    Path("br[").mkdir()
    with_ids().to_csv("br[/x]ack.csv", index=False)
    for colours in ({}, {"FORCE_COLOR": "1", "COLUMNS": "150"}):
        result = CliRunner().invoke(
            app, ["complete", "br[/x]ack.csv", "-o", "o[/b].csv", *map(str, FAST)], env=colours
        )
        assert result.exit_code == 0, result.output
        assert "o[/b].csv" in result.stdout


# --- the documentation ---


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```\n(nblora complete .*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_commands_of_the_documentation_run(here: Path) -> None:
    """On files with the names that it uses."""
    found = commands((ROOT / "docs" / "completion.md").read_text(encoding="utf-8"))
    assert len(found) >= 3
    with_ids().to_csv("weather.csv", index=False)
    long(matrix(40, 25)).to_csv("ratings.csv", index=False)
    Path("pairs.csv").write_text("user,item\nu1,i3\nu2,i0\n")
    Image.fromarray(photo(3)).save("photo.png")
    for command in found:
        result = run(*shlex.split(command, comments=True)[1:], "--max-iter", 20, "--rank", 3)
        assert result.exit_code == 0, (command, result.output)


def test_python_of_the_documentation_runs(here: Path) -> None:
    with_ids().to_csv("weather.csv", index=False)
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "completion.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert blocks
    for block in blocks:
        exec(block, {})
