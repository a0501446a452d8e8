"""Data: from what a user has to splits of rows.

A source is a file (CSV, TSV, JSON, JSON Lines, Parquet, text), a folder (of such files, of class folders of
images, of text files, or written by `save_to_disk`) or the name of a data set on the Hugging Face hub. Rows
are `datasets.Dataset`s. Splits that a source lacks are made from those that it has, the same ones for the
same seed.

Note [Disk and cache]: `datasets` copies every local file that it reads into the user's cache folder, and
writes what it derives from rows beside them. Here files up to `IN_MEMORY` are read through a temporary
folder, which is gone afterwards: nothing stays on the disk, nothing stale is found there, and processes that
read the same file at the same time share nothing. Only larger files go through the cache, which `datasets`
guards with a lock. Rows are never mapped, filtered or shuffled, only selected, which writes nothing.
"""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

IN_MEMORY = (
    2**29
)  # bytes of files; more than this is read through the cache of `datasets`, see Note [Disk and cache]

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
TEXTS = (".txt",)
IMAGES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
ARCHIVES = (".zip", ".tar", ".gz", ".tgz")
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<configuration>[\w.+-]+))?")

# cells of a CSV file that stand for nothing; pandas counts "None", "NA" and "n/a" too: answers and classes
MISSING_CELLS = ["", "NaN", "nan", "-NaN", "-nan", "NULL", "null", "<NA>", "#N/A", "#NA"]

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class DataError(ValueError):
    """Data that cannot be used; the message is one line that states the rule, then what was found."""


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to choose by and to report on; no row is in two of them."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load_rows(source: str) -> DatasetDict:
    """All splits that a source has, under its own names; a source without splits is one split, "train".

    Args:
        source: a file, a folder, or a hub name ("owner/name" or "owner/name:configuration").

    A text file becomes passages of whole lines with the columns `text`, `document` and `passage` (its place
    in the document), so that a single long file can be split like any other data. An image folder has the
    columns `image` and `label`, the name of the folder in which an image lies.

    Raises:
        DataError: if there is no such source, or it is empty or cannot be read.
    """
    source = os.fspath(source)
    path = Path(source).expanduser()
    if not source:
        raise DataError("the data must be a file, a folder or a hub data set, got an empty name")
    with quietly():
        if path.is_file():
            rows = DatasetDict({"train": _read_files([path], source)})
        elif path.is_dir():
            rows = _read_folder(path, source)
        else:
            rows = _read_elsewhere(source)
    for name, split in rows.items():
        if not len(split):
            raise DataError(f"the data must have at least one row, got none in split {name!r} of {source}")
    return rows


def target_splits(source: str, *, seed: int) -> Splits:
    """Training, validation and test rows of a source; see `target_parts`.

    Raises:
        DataError: as `load_rows`, and for fewer rows than the splits need.
    """
    rows = load_rows(source)
    parts = target_parts({name: len(split) for name, split in rows.items()}, source, seed=seed)
    return Splits(**{role: rows[part.split].select(part.indices) for role, part in parts.items()})


def kept_splits(source: str, *, seed: int) -> tuple[Dataset, Dataset]:
    """Validation and test rows of data that a model has learned before; see `kept_parts`.

    Raises:
        DataError: as `load_rows`, and for fewer than two rows.
    """
    rows = load_rows(source)
    parts = kept_parts({name: len(split) for name, split in rows.items()}, source, seed=seed)
    validation, test = (rows[part.split].select(part.indices) for part in parts.values())
    return validation, test


@dataclass(frozen=True)
class Part:
    """Some rows of a split: what is used for one purpose.

    Attributes:
        split: its name in the source.
        indices: (count,) of its rows, increasing.
    """

    split: str
    indices: Any


def draw(total: int, count: int, *, seed: int) -> Any:
    """`count` of the numbers below `total`, drawn without replacement, increasing."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def target_parts(lengths: Mapping[str, int], source: str, *, seed: int) -> dict[str, Part]:
    """What to train on, to choose by and to report on: 80 : 10 : 10 where the source has a single split.

    A validation or test split that is missing beside a training split is a tenth of the training rows, drawn
    without replacement; the rest stays to train on.

    Args:
        lengths: of the splits of the source, by name.
        source: its name, for errors.
        seed: of the drawing.

    Returns:
        The parts "train", "validation" and "test".
    """
    found = _by_role(lengths)
    if "train" not in found:
        if len(lengths) != 1:
            raise DataError(f"the data must have a split 'train', got splits {list(lengths)} in {source}")
        found = {"train": next(iter(lengths))}
    train, total = found["train"], lengths[found["train"]]
    missing = [role for role in ("validation", "test") if role not in found]
    if total <= len(missing):
        raise DataError(
            f"the data must have at least {1 + len(missing)} rows to train on and to make a "
            f"{' and a '.join(missing)} split of, got {total} in {source}"
        )
    tenth = min(max(1, round(total / 10)), (total - 1) // max(1, len(missing)))
    order = np.random.default_rng(seed).permutation(total)
    parts = {role: Part(name, np.arange(lengths[name])) for role, name in found.items()}
    for position, role in enumerate(missing):
        parts[role] = Part(train, np.sort(order[position * tenth : (position + 1) * tenth]))
    if missing:
        parts["train"] = Part(train, np.sort(order[len(missing) * tenth :]))
    return {role: parts[role] for role in ("train", "validation", "test")}


def kept_parts(lengths: Mapping[str, int], source: str, *, seed: int) -> dict[str, Part]:
    """What to choose by and to report on, of data that a model has learned before.

    Where the source has both splits, these; where it has one of them, its halves, because the model may know
    the training rows by heart; where it has neither, the halves of its single split or of its training rows.

    Returns:
        The parts "validation" and "test".
    """
    found = _by_role(lengths)
    if {"validation", "test"} <= set(found):
        return {role: Part(found[role], np.arange(lengths[found[role]])) for role in ("validation", "test")}
    name = next((found[role] for role in ("test", "validation", "train") if role in found), None)
    if len(lengths) == 1:
        name = next(iter(lengths))
    if name is None:
        raise DataError(
            f"the data must have a split 'test' or a single one, got splits {list(lengths)} in {source}"
        )
    if lengths[name] < 2:
        raise DataError(
            f"the data must have at least 2 rows to make a validation and a test split of, got 1 in {source}"
        )
    order = np.random.default_rng(seed).permutation(lengths[name])
    half = len(order) // 2
    return {"validation": Part(name, np.sort(order[:half])), "test": Part(name, np.sort(order[half:]))}


@contextmanager
def quietly() -> Iterator[None]:
    """Libraries inside say nothing below an error and draw no progress bars; afterwards they are as before.

    Bars that the user asked for by HF_DATASETS_DISABLE_PROGRESS_BARS=0 stay.
    """
    bars = not datasets.are_progress_bars_disabled()
    forced = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None
    levels = datasets.logging.get_verbosity(), transformers.logging.get_verbosity()
    model_bars = transformers.logging.is_progress_bar_enabled()
    if bars and not forced:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised as well
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars and not forced:
            datasets.enable_progress_bars()
        datasets.logging.set_verbosity(levels[0])
        transformers.logging.set_verbosity(levels[1])
        if model_bars:
            transformers.logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """What went wrong at the root of an error, in one line of at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


# --- files ---


def _read_files(paths: Sequence[Path], source: str) -> Dataset:
    """The rows of files, one after another."""
    if all(_suffix(path) in TEXTS for path in paths):
        return _read_texts(paths)
    parts = [_read_table(path) for path in paths]
    if len(parts) == 1:
        return parts[0]
    names = sorted(parts[0].column_names)
    for path, part in zip(paths, parts):
        if sorted(part.column_names) != names:
            raise DataError(
                f"files of one split must have the same columns, got {names} in {paths[0].name} and "
                f"{sorted(part.column_names)} in {path.name} of {source}"
            )
    try:
        return datasets.concatenate_datasets(parts)
    except (ValueError, TypeError, OSError) as error:
        raise DataError(
            f"files of one split must have columns of the same kind: {one_line(error)} in {source}"
        ) from error


def _read_table(path: Path) -> Dataset:
    suffix = _suffix(path)
    if suffix not in TABLES:
        raise DataError(f"a data file must be one of {', '.join(TABLES + TEXTS)}, got {path}")
    if not path.stat().st_size:
        raise DataError(f"the data must have at least one row, got an empty file {path}")
    small = path.stat().st_size <= IN_MEMORY
    reader: Callable[..., Dataset]
    options: dict[str, Any] = {}
    if suffix in (".csv", ".tsv"):
        reader = Dataset.from_csv
        options = {
            "sep": "\t" if suffix == ".tsv" else ",",
            "keep_default_na": False,
            "na_values": MISSING_CELLS,
        }
        if small:  # in one piece, so that the kind of a column does not depend on its first rows
            options["chunksize"] = 2**31
    elif suffix == ".parquet":
        reader = Dataset.from_parquet
    else:
        reader = Dataset.from_json
    pattern = glob.escape(str(path.resolve()))  # `datasets` takes names for patterns
    with _reading(str(path)), _cache(small) as cache:
        return reader(pattern, keep_in_memory=small, cache_dir=cache, **options)


def _read_texts(paths: Sequence[Path]) -> Dataset:
    """Passages of whole lines of text files; each file is a document."""
    texts = []
    for path in paths:
        with _reading(str(path)):
            texts.append(path.read_text(encoding="utf-8-sig"))
    if not any(text.strip() for text in texts):
        raise DataError(
            f"the data must have at least one row, got no text in {', '.join(map(str, paths[:3]))}"
        )
    size = min(2000, max(200, sum(map(len, texts)) // 50))  # so that short texts can be split too
    columns: dict[str, list[Any]] = {"text": [], "document": [], "passage": []}
    for document, text in enumerate(texts):
        for passage, part in enumerate(_passages(text, size)):
            columns["text"].append(part)
            columns["document"].append(document)
            columns["passage"].append(passage)
    return Dataset.from_dict(
        columns, Features(text=Value("large_string"), document=Value("int64"), passage=Value("int64"))
    )


def _passages(text: str, size: int) -> Iterator[str]:
    """Pieces that make up a text: whole lines, at least `size` characters; longer lines are cut."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        while length + len(line) > 2 * size:
            cut = line.rfind(" ", 0, size) + 1 or size
            yield "".join(piece) + line[:cut]
            piece, length, line = [], 0, line[cut:]
        piece.append(line)
        length += len(line)
        if length >= size:
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)


# --- folders ---


def _read_folder(folder: Path, source: str) -> DatasetDict:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        with _reading(source):
            try:
                saved = datasets.load_from_disk(str(folder))
            except IndexError as error:  # there is no file to read the columns from
                raise DataError(
                    f"the data must have at least one row in every split, got none in {source}"
                ) from error
        return saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part[0] in "._" for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(f"the data must have at least one row, got an empty folder {source}")
    images = [path for path in files if _suffix(path) in IMAGES]
    descriptions = [path for path in files if path.stem == "metadata" and _suffix(path) in TABLES]
    card = folder / "README.md"
    configured = card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")
    if images and descriptions and not configured:
        return _read_described_images(folder, descriptions, source)
    if images and not configured:
        return _read_image_folder(folder, images, source)
    if not configured:
        flat = [path for path in files if path.parent == folder and _suffix(path) in TABLES + TEXTS]
        if flat:
            return _read_flat_folder(flat, source)
        texts = [path for path in files if _suffix(path) in TEXTS]
        if texts and not any(_suffix(path) in TABLES for path in files):
            return _read_nested_texts(folder, texts, source)
    return _load(str(folder), None, files, source)


def _read_flat_folder(files: Sequence[Path], source: str) -> DatasetDict:
    """Files named after splits, each of any format; or files without such names, together one split."""
    groups: dict[str, list[Path]] = {}
    for path in files:
        role = split_role(path.name.split(".")[0])
        if role is not None:
            groups.setdefault(role, []).append(path)
    if "train" not in groups and len(groups) != len(files):
        groups = {"train": list(files)}  # a file that happens to be called "test case 7" makes no split
    return DatasetDict({role: _read_files(paths, source) for role, paths in groups.items()})


def _read_nested_texts(folder: Path, files: Sequence[Path], source: str) -> DatasetDict:
    groups: dict[str, list[Path]] = {}
    for path in files:
        role = split_role(path.relative_to(folder).parts[0])
        groups.setdefault(role or "", []).append(path)
    if "train" not in groups or "" in groups:
        groups = {"train": list(files)}
    return DatasetDict({role: _read_files(paths, source) for role, paths in groups.items()})


def _read_image_folder(folder: Path, images: Sequence[Path], source: str) -> DatasetDict:
    """Class folders of images, or folders named after splits that hold class folders.

    Written here and not left to `datasets`, which takes a class or an image called "test" for a split, and
    drops all labels without a word where the folders are not equally deep.
    """
    parts = {path: path.relative_to(folder).parts for path in images}
    splits = any(split_role(part[0]) == "train" and len(part) > 2 for part in parts.values())
    groups: dict[str, list[Path]] = {}
    for path, part in parts.items():
        role = split_role(part[0]) if splits else "train"
        if role is not None:
            groups.setdefault(role, []).append(path)
    depth = 3 if splits else 2
    used = [path for paths in groups.values() for path in paths]
    if all(len(parts[path]) == depth - 1 for path in used):
        features = Features(image=Image())
        return DatasetDict(
            {
                role: Dataset.from_dict({"image": [str(path.resolve()) for path in paths]}, features)
                for role, paths in groups.items()
            }
        )
    for path in used:
        if len(parts[path]) != depth:
            raise DataError(
                f"an image folder must hold one folder of images for each class"
                f"{' of each split' if splits else ''}, got {path.relative_to(folder)} in {source}"
            )
    names = sorted({path.parent.name for path in used})
    features = Features(image=Image(), label=ClassLabel(names=names))
    return DatasetDict(
        {
            role: Dataset.from_dict(
                {
                    "image": [str(path.resolve()) for path in paths],
                    "label": [path.parent.name for path in paths],
                },
                features,
            )
            for role, paths in groups.items()
        }
    )


def _read_described_images(folder: Path, descriptions: Sequence[Path], source: str) -> DatasetDict:
    """Tables that describe the images of their folder, named in the column `file_name`."""
    groups: dict[str, list[Dataset]] = {}
    for path in descriptions:
        rows = _read_table(path)
        if "file_name" not in rows.column_names:
            raise DataError(f"{path} must have a column 'file_name', got columns {rows.column_names}")
        images = [path.parent / str(name) for name in rows["file_name"]]
        for image in images:
            if not image.is_file():
                raise DataError(f"a description of images must name files that exist, got {image} in {path}")
        rows = rows.remove_columns([name for name in ("file_name", "image") if name in rows.column_names])
        rows = rows.add_column("image", [str(image.resolve()) for image in images])
        role = split_role(path.relative_to(folder).parts[0])
        groups.setdefault(role or "train", []).append(rows.cast_column("image", Image()))
    with _reading(source):
        return DatasetDict({role: datasets.concatenate_datasets(parts) for role, parts in groups.items()})


# --- hub ---


def _read_elsewhere(source: str) -> DatasetDict:
    """A hub data set, or a local folder with a configuration ("folder:configuration")."""
    folder, _, configuration = source.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        path = Path(folder).expanduser()
        return _load(str(path), configuration, [*path.rglob("*")], source)
    match = HUB_NAME.fullmatch(source)
    suffix = Path(source).suffix.lower()
    if match is None or suffix in TABLES + TEXTS + IMAGES + ARCHIVES or source[0] in ".~/":
        raise DataError(
            f"the data must be a file, a folder or a hub data set, got {source}, which does not exist"
        )
    if "/" not in source and match["name"] in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        raise DataError(
            f"the data must be a file, a folder or a hub data set, got {source}, which is a format"
        )
    return _load(match["name"], match["configuration"], None, source)


def _load(name: str, configuration: str | None, files: Sequence[Path] | None, source: str) -> DatasetDict:
    """`datasets.load_dataset` of a folder or a hub name."""
    small = (
        files is not None
        and not any(_suffix(path) in ARCHIVES for path in files)  # images stay inside their archives
        and sum(path.stat().st_size for path in files if _suffix(path) not in IMAGES) <= IN_MEMORY
    )
    with _reading(source), _cache(small) as cache:
        try:
            rows = datasets.load_dataset(name, configuration, cache_dir=cache, keep_in_memory=small or None)
        except ValueError as error:
            known = re.search(r"Config name is missing.*?(\[.*?\])", str(error), re.DOTALL)
            if known is None:
                raise
            raise DataError(
                f"data with several configurations must be named with one of {known[1]}, such as "
                f"{source}:NAME, got {source}"
            ) from error
    if not isinstance(rows, DatasetDict):
        raise DataError(f"the data must be a set of splits, got {type(rows).__name__} for {source}")
    return rows


# --- parts ---


def split_role(name: str) -> str | None:
    """The split that a name stands for, by its first word: "train", "validation", "test" or None."""
    for role, words in SPLIT_WORDS.items():
        if re.match(rf"({'|'.join(words)})(?![a-z])", name.lower()):
            return role
    return None


def _by_role(names: Iterable[str]) -> dict[str, str]:
    """Names of splits by what they are for; of several, the one with the plain name, else the first."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: name.lower() not in SPLIT_WORDS):
        role = split_role(name)
        if role == "test" and role in found and name.lower().startswith("eval"):
            role = "validation"  # beside a test split
        if role is not None:
            found.setdefault(role, name)
    return found


def _suffix(path: Path) -> str:
    return path.suffix.lower()


@contextmanager
def _cache(temporary: bool) -> Iterator[str | None]:
    if not temporary:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="nblora-data-", ignore_cleanup_errors=True) as folder:
        yield folder


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Errors of libraries and of the operating system become one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"the data must have at least one row, got none in {what}") from error
        raise DataError(f"the data must be readable: {one_line(error)} in {what}") from error
