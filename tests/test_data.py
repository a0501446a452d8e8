"""Reading data: every kind of source, awkward contents, splits, and one line for everything that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers
from datasets import Dataset, DatasetDict
from PIL import Image

from nblora import data
from nblora.data import DataError, kept_splits, load_rows, one_line, quietly, split_role, target_splits

ROWS = {"text": ["grüße", "two\nlines, and a comma", '"quoted"'], "label": [0, 1, 0]}


@pytest.fixture(autouse=True)
def hub_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder into which `datasets` would write; the user's own stays out of the tests."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    """Of the writing that tests do themselves."""
    datasets.disable_progress_bars()


def write(path: Path, rows: dict[str, list[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows_of_dicts = [dict(zip(rows, values)) for values in zip(*rows.values())]
    if path.suffix in (".csv", ".tsv"):
        Dataset.from_dict(rows).to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        Dataset.from_dict(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows_of_dicts), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of_dicts), encoding="utf-8")
    return path


def numbers(count: int, start: int = 0) -> dict[str, list[Any]]:
    return {"number": [*range(start, start + count)]}


def saved(folder: Path, **lengths: int) -> str:
    """A data set on disk whose splits have consecutive numbers."""
    start, splits = 0, DatasetDict()
    for name, length in lengths.items():
        splits[name] = Dataset.from_dict(numbers(length, start))
        start += length
    splits.save_to_disk(str(folder))
    return str(folder)


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)
    return path


# --- files ---


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    rows = load_rows(str(write(tmp_path / f"rows{suffix}", ROWS)))
    assert list(rows) == ["train"]
    assert rows["train"][:] == ROWS


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    """A byte order mark, quoted line breaks, and words that pandas takes for missing values."""
    file = tmp_path / "rows.csv"
    file.write_bytes('\ufefftext,label\r\n"a\r\nb",None\r\nNA,n/a\r\n,NULL\r\n'.encode())
    assert load_rows(str(file))["train"][:] == {
        "text": ["a\r\nb", "NA", None],
        "label": ["None", "n/a", None],
    }


def test_kind_of_a_csv_column_does_not_depend_on_its_first_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("label\n" + "1\n" * 20_000 + "unknown\n")
    assert set(load_rows(str(file))["train"]["label"]) == {"1", "unknown"}


def test_nested_messages(tmp_path: Path) -> None:
    """Chats whose messages do not all have the same fields, or contents of the same kind."""
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "calls": [1]}],
    ]
    rows = load_rows(str(write(tmp_path / "chats.jsonl", {"messages": chats})))
    assert rows["train"][:]["messages"] == chats


@pytest.mark.parametrize("name", ["a [x] *b.csv", "ünï code?.csv", "50%.csv"])
def test_names_are_not_patterns(tmp_path: Path, name: str) -> None:
    assert len(load_rows(str(write(tmp_path / "new [1]" / name, ROWS)))["train"]) == 3


def test_text_becomes_passages_of_whole_lines(tmp_path: Path) -> None:
    text = "".join(f"line {number} of the text\n" for number in range(5000)) + "no line break at the end"
    file = tmp_path / "text.txt"
    file.write_text(text)
    rows = load_rows(str(file))["train"]
    assert "".join(rows["text"]) == text
    assert rows["document"][:] == [0] * len(rows)
    assert rows["passage"][:] == [*range(len(rows))]
    assert all(passage.endswith("\n") and 2000 <= len(passage) < 2100 for passage in rows["text"][:-1])


@pytest.mark.parametrize("text", ["word " * 2000, "x" * 10_000, "\n\n\n" + "x y\n" * 3 + "\u2028" * 900])
def test_text_with_odd_lines_is_kept_whole(tmp_path: Path, text: str) -> None:
    """No line breaks, no spaces, empty lines, other separators."""
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    rows = load_rows(str(file))["train"]
    assert "".join(rows["text"]) == text
    assert 3 <= len(rows) <= 51
    assert max(map(len, rows["text"])) <= 2 * max(200, len(text) // 50)


def test_text_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfhello\n")
    assert load_rows(str(tmp_path / "text.txt"))["train"]["text"][:] == ["hello\n"]


# --- folders ---


def test_files_named_after_splits_in_several_formats(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", numbers(3))
    write(tmp_path / "validation.jsonl", numbers(2))
    write(tmp_path / "test-00.parquet", numbers(1))
    write(tmp_path / "test-01.parquet", numbers(1, 1))
    write(tmp_path / "notes.json", {"other": [1]})
    rows = load_rows(str(tmp_path))
    assert {name: split["number"][:] for name, split in rows.items()} == {
        "train": [0, 1, 2],
        "validation": [0, 1],
        "test": [0, 1],
    }


def test_files_without_splits_are_one(tmp_path: Path) -> None:
    write(tmp_path / "one.csv", numbers(2))
    write(tmp_path / "test the water.csv", numbers(2, 2))
    assert load_rows(str(tmp_path))["train"]["number"][:] == [0, 1, 2, 3]


def test_saved_to_disk(tmp_path: Path) -> None:
    Dataset.from_dict(numbers(3)).save_to_disk(str(tmp_path / "one"))
    assert load_rows(str(tmp_path / "one"))["train"]["number"][:] == [0, 1, 2]
    assert set(load_rows(saved(tmp_path / "two", train=3, odd=2))) == {"train", "odd"}


def test_folder_as_the_hub_has_it(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00001.parquet", numbers(3))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", numbers(2))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Numbers\n")
    assert {name: len(split) for name, split in load_rows(str(tmp_path)).items()} == {"train": 3, "test": 2}


def test_configurations_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", numbers(3))
    write(tmp_path / "b.jsonl", numbers(2))
    configs = "\n".join(f"- config_name: {name}\n  data_files: {name}.jsonl" for name in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    assert len(load_rows(f"{tmp_path}:b")["train"]) == 2
    with pytest.raises(DataError, match=r"must be named with one of \['a', 'b'\], such as .*:NAME, got "):
        load_rows(str(tmp_path))


def test_text_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in "ab":
            file = tmp_path / split / f"{name}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{split} {name}\n")
    rows = load_rows(str(tmp_path))
    assert set(rows) == {"train", "test"}
    assert rows["test"][:] == {"text": ["test a\n", "test b\n"], "document": [0, 1], "passage": [0, 0]}
    assert load_rows(str(tmp_path / "train"))["train"]["text"][:] == ["train a\n", "train b\n"]


def test_image_folder(tmp_path: Path) -> None:
    """Classes and images with names of splits are no splits."""
    for label, name in [("cat", "train_1.png"), ("cat", "test_2.JPG"), ("test", "a.png"), ("übung", "b.bmp")]:
        picture(tmp_path / label / name)
    (tmp_path / "README.txt").write_text("about")
    rows = load_rows(str(tmp_path))
    assert list(rows) == ["train"]
    assert rows["train"].features["label"].names == ["cat", "test", "übung"]
    assert rows["train"]["label"][:] == [0, 0, 1, 2]
    assert rows["train"][0]["image"].size == (4, 4)


def test_image_folder_with_splits(tmp_path: Path) -> None:
    for split, label in [("train", "a"), ("train", "b"), ("val", "b"), ("test", "a")]:
        picture(tmp_path / split / label / "1.png")
    rows = load_rows(str(tmp_path))
    assert {name: split["label"][:] for name, split in rows.items()} == {
        "train": [0, 1],
        "validation": [1],
        "test": [0],
    }
    assert all(split.features["label"].names == ["a", "b"] for split in rows.values())


def test_image_folder_without_classes(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    assert load_rows(str(tmp_path))["train"].column_names == ["image"]


def test_images_with_metadata(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    picture(tmp_path / "two.png")
    write(tmp_path / "metadata.csv", {"file_name": ["one.png", "two.png"], "label": ["x", "y"]})
    rows = load_rows(str(tmp_path))["train"]
    assert rows["label"][:] == ["x", "y"]
    assert rows[0]["image"].size == (4, 4)
    (tmp_path / "two.png").unlink()
    with pytest.raises(DataError, match=r"must name files that exist, got .*two\.png in .*metadata\.csv"):
        load_rows(str(tmp_path))
    write(tmp_path / "metadata.csv", {"file": ["one.png"]})
    with pytest.raises(
        DataError, match=r"metadata\.csv must have a column 'file_name', got columns \['file'\]"
    ):
        load_rows(str(tmp_path))


# --- what is wrong ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"must have at least one row, got an empty file .*a\.csv"),
        ("a.csv", b"text,label\n", r"must have at least one row, got none in .*a\.csv"),
        ("a.csv", b"text,label\na,b\na,b,c\n", r"readable: .*Expected 2 fields in line 3, saw 3 in .*a\.csv"),
        ("a.csv", b"text\n\xff\xfe\n", r"readable: 'utf-8' codec can't decode .* in .*a\.csv"),
        ("a.jsonl", b'{"a": 1}\n{"a":\n', r"readable: JSON parse error.* in .*a\.jsonl"),
        ("a.json", b"[]", r"must have at least one row, got none in .*a\.json|readable: .*a\.json"),
        ("a.parquet", b"PAR1", r"readable: .*a\.parquet"),
        ("a.txt", b"\xff\xff", r"readable: 'utf-8' codec can't decode .* in .*a\.txt"),
        ("a.txt", b" \n", r"must have at least one row, got no text in .*a\.txt"),
        ("a.xlsx", b"PK", r"a data file must be one of \.csv, .*, got .*a\.xlsx"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "must be a file, a folder or a hub data set, got an empty name"),
        ("missing.csv", "a hub data set, got missing.csv, which does not exist"),
        ("/no/such/folder", "a hub data set, got /no/such/folder, which does not exist"),
        ("./folder", "a hub data set, got ./folder, which does not exist"),
        ("json", "a hub data set, got json, which is a format"),
        ("owner/name", "readable: Couldn't reach 'owner/name' on the Hub .* in owner/name"),
        ("owner/name:part", "readable: Couldn't reach 'owner/name' on the Hub .* in owner/name:part"),
    ],
)
def test_sources_that_are_not_there(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_rows(source)
    assert "\n" not in str(caught.value)


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"must have at least one row, got an empty folder {tmp_path}"):
        load_rows(str(tmp_path))
    write(tmp_path / "parts" / "a.csv", numbers(1))
    write(tmp_path / "parts" / "b.csv", {"other": [1]})
    with pytest.raises(DataError, match=r"same columns, got \['number'\] in a.csv and \['other'\] in b.csv"):
        load_rows(str(tmp_path / "parts"))
    write(tmp_path / "kinds" / "a.csv", numbers(1))
    write(tmp_path / "kinds" / "b.csv", {"number": ["x"]})
    with pytest.raises(DataError, match=r"columns of the same kind: .* in .*kinds"):
        load_rows(str(tmp_path / "kinds"))
    picture(tmp_path / "images" / "a" / "1.png")
    picture(tmp_path / "images" / "b" / "deep" / "1.png")
    with pytest.raises(DataError, match=r"one folder of images for each class, got b/deep/1\.png in"):
        load_rows(str(tmp_path / "images"))
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "model.bin").write_bytes(b"0")
    with pytest.raises(DataError, match=r"readable: .* in .*others"):
        load_rows(str(tmp_path / "others"))


def test_empty_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one row in every split, got none in"):
        load_rows(saved(tmp_path / "rows", train=3, test=0))


# --- splits ---


def everything(splits: data.Splits) -> list[int]:
    return [*splits.train["number"], *splits.validation["number"], *splits.test["number"]]


def test_one_split_is_cut_80_10_10(tmp_path: Path) -> None:
    source = saved(tmp_path / "rows", train=50)
    splits = target_splits(source, seed=3)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 5, 5)
    assert sorted(everything(splits)) == [*range(50)]
    assert splits.train["number"][:] == sorted(splits.train["number"])
    assert everything(target_splits(source, seed=3)) == everything(splits)
    assert everything(target_splits(source, seed=4)) != everything(splits)


@pytest.mark.parametrize(("present", "made"), [("test", "validation"), ("validation", "test")])
def test_a_missing_split_is_a_tenth_of_the_training_rows(tmp_path: Path, present: str, made: str) -> None:
    splits = target_splits(saved(tmp_path / "rows", train=20, **{present: 5}), seed=0)
    assert getattr(splits, present)["number"][:] == [20, 21, 22, 23, 24]
    assert len(getattr(splits, made)) == 2
    assert len(splits.train) == 18
    assert sorted(everything(splits)) == [*range(25)]


def test_splits_that_exist_are_used_as_they_are(tmp_path: Path) -> None:
    splits = target_splits(saved(tmp_path / "rows", test=2, train=3, validation=4), seed=0)
    assert splits.test["number"][:] == [0, 1]
    assert splits.train["number"][:] == [2, 3, 4]
    assert splits.validation["number"][:] == [5, 6, 7, 8]


@pytest.mark.parametrize("count", [3, 4, 5, 10, 11])
def test_small_data_still_makes_three_splits(tmp_path: Path, count: int) -> None:
    splits = target_splits(saved(tmp_path / "rows", all=count), seed=0)
    assert min(len(splits.train), len(splits.validation), len(splits.test)) >= 1
    assert sorted(everything(splits)) == [*range(count)]


def test_too_few_rows_or_no_training_split(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"at least 3 rows to train on and to make a validation and a test .* got 2"
    ):
        target_splits(saved(tmp_path / "two", train=2), seed=0)
    with pytest.raises(DataError, match=r"must have a split 'train', got splits \['validation', 'test'\]"):
        target_splits(saved(tmp_path / "rows", validation=2, test=2), seed=0)
    with pytest.raises(DataError, match=r"at least 2 rows to make a validation and a test split of, got 1"):
        kept_splits(saved(tmp_path / "one", test=1), seed=0)
    with pytest.raises(DataError, match=r"a split 'test' or a single one, got splits \['a', 'b'\]"):
        kept_splits(saved(tmp_path / "odd", a=1, b=1), seed=0)


def test_kept_data_with_both_splits(tmp_path: Path) -> None:
    validation, test = kept_splits(saved(tmp_path / "rows", train=5, validation=2, test=3), seed=0)
    assert validation["number"][:] == [5, 6]
    assert test["number"][:] == [7, 8, 9]


@pytest.mark.parametrize("name", ["train", "test", "anything"])
def test_kept_data_with_one_split_is_halved(tmp_path: Path, name: str) -> None:
    source = saved(tmp_path / "rows", **{name: 11})
    validation, test = kept_splits(source, seed=1)
    assert (len(validation), len(test)) == (5, 6)
    assert sorted([*validation["number"], *test["number"]]) == [*range(11)]
    assert validation["number"][:] == kept_splits(source, seed=1)[0]["number"][:]
    assert validation["number"][:] != kept_splits(source, seed=2)[0]["number"][:]


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_kept_data_needs_no_training_rows(tmp_path: Path, held_out: str) -> None:
    validation, test = kept_splits(saved(tmp_path / "rows", train=5, **{held_out: 4}), seed=0)
    assert sorted([*validation["number"], *test["number"]]) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train", "train"), ("Training", "train"), ("train_sft", "train"), ("train-00000-of-00002", "train"),
        ("dev", "validation"), ("valid", "validation"), ("val", "validation"), ("dev_2", "validation"),
        ("test", "test"), ("eval", "test"), ("testing.1", "test"),
        ("trainer", None), ("value", None), ("latest", None), ("contest", None),
    ],
)  # fmt: skip
def test_names_of_splits(name: str, role: str | None) -> None:
    assert split_role(name) == role


def test_of_several_splits_the_plain_name_wins(tmp_path: Path) -> None:
    source = saved(
        tmp_path / "rows", train_gen=1, train=2, validation_matched=3, validation_other=4, test=5, eval=6
    )
    splits = target_splits(source, seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2, 3, 5)


def test_evaluation_beside_a_test_split_is_validation(tmp_path: Path) -> None:
    splits = target_splits(saved(tmp_path / "rows", train=2, eval=3, test=4), seed=0)
    assert (len(splits.validation), len(splits.test)) == (3, 4)


# --- disk, noise ---


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_reading_leaves_nothing_on_the_disk(
    tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    source = tmp_path / "source"
    write(source / "csv" / "train.csv", numbers(30))
    write(source / "hub" / "data" / "train-00000-of-00001.parquet", numbers(30))
    (source / "text.txt").parent.mkdir(exist_ok=True)
    (source / "text.txt").write_text("line\n" * 500)
    picture(source / "images" / "a" / "1.png")
    picture(source / "images" / "b" / "1.png")
    picture(source / "images" / "b" / "2.png")
    saved(source / "saved", train=30)
    before = files_below(source)
    for name in ("csv", "hub", "text.txt", "images", "saved"):
        splits = target_splits(str(source / name), seed=0)
        assert splits.train[0]
        kept_splits(str(source / name), seed=0)
    assert files_below(source) == before
    assert not files_below(hub_cache)
    assert not files_below(temporary)


def test_large_files_go_through_the_cache(
    tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    file = write(tmp_path / "rows.csv", numbers(30))
    assert load_rows(str(file))["train"]["number"][:] == [*range(30)]
    assert files_below(hub_cache)
    file.write_text("number\n7\n")
    assert load_rows(str(file))["train"]["number"][:] == [7], "a changed file is read again"


def test_two_processes_read_a_large_file_at_once(tmp_path: Path, hub_cache: Path) -> None:
    file = write(tmp_path / "rows.csv", numbers(20_000))
    code = (
        "from nblora import data; data.IN_MEMORY = 0; "
        f"print(sum(data.target_splits({str(file)!r}, seed=0).train['number']))"
    )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(hub_cache)}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for _ in range(2)
    ]
    answers = [process.communicate() for process in running]
    assert answers[0] == answers[1]
    assert int(answers[0][0]) == sum(target_splits(str(file), seed=0).train["number"])
    assert answers[0][1] == "", "and say nothing"


def test_quiet_and_then_as_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    levels = datasets.logging.get_verbosity(), transformers.logging.get_verbosity()
    datasets.enable_progress_bars()
    try:
        load_rows(str(write(tmp_path / "rows.jsonl", ROWS)))
        (tmp_path / "bad.csv").write_text("a\n1,2,3\n4,5,6,7\n")
        with pytest.raises(DataError):
            load_rows(str(tmp_path / "bad.csv"))
        with quietly():
            assert datasets.are_progress_bars_disabled()
        assert not datasets.are_progress_bars_disabled()
    finally:
        datasets.disable_progress_bars()
    assert (datasets.logging.get_verbosity(), transformers.logging.get_verbosity()) == levels
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert not caplog.records


def test_one_line_tells_the_root_of_an_error() -> None:
    error = RuntimeError("something happened")
    error.__cause__ = ValueError("it\n  is   broken")
    assert one_line(error) == "it is broken"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(one_line(ValueError("x" * 1000))) == 300


def test_draws_are_sorted_and_without_replacement() -> None:
    drawn = data.draw(100, 30, seed=0)
    assert len(set(drawn)) == 30
    assert (np.diff(drawn) > 0).all()
