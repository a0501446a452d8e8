"""Files on disk: safetensors read one tensor at a time, and writes that are whole or not there."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PathLike = str | os.PathLike[str]


class AdapterError(ValueError):
    """An adapter that cannot be read or written; the message is one line that says where and why."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies in a safetensors file, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file of which only the header is in memory.

    Tensors are read when asked for, into memory of their own: a mapped file would count as used memory.

    Attributes:
        path: of the file.
        metadata: the free text entries of the header.
        entries: by tensor name, in the order of the file.

    Raises:
        AdapterError: if it is not an intact safetensors file.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt"):
                pass  # checks the header against the size of the file
            with self.path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except (OSError, SafetensorError, ValueError) as error:
            raise AdapterError(
                f"{self.path} must be an intact safetensors file: {one_line(error)}"
            ) from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        begin = 8 + size
        entries = (
            (key, Entry(e["dtype"], tuple(e["shape"]), *(begin + offset for offset in e["data_offsets"])))
            for key, e in header.items()
        )
        self.entries = dict(sorted(entries, key=lambda item: item[1].start))

    def read(self, key: str) -> Tensor:
        """One tensor.

        Raises:
            AdapterError: if it cannot be read, or its type is none of PyTorch's usual ones.
        """
        entry = self.entries[key]
        if entry.dtype not in DTYPES:
            raise AdapterError(
                f"{self.path}: tensor {key!r} must have one of the types {', '.join(DTYPES)}, "
                f"got {entry.dtype}"
            )
        data = bytearray(entry.stop - entry.start)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                view, done = memoryview(data), 0
                while done < len(data):  # an unbuffered read may be short
                    count = file.readinto(view[done:])
                    if not count:
                        raise OSError("the file ends early")
                    done += count
        except OSError as error:
            raise AdapterError(f"{self.path}: tensor {key!r} cannot be read: {one_line(error)}") from error
        dtype = DTYPES[entry.dtype]
        if not data:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)

    def overwrite(self, copy: BinaryIO, key: str, tensor: Tensor) -> None:
        """Write a tensor into an open copy of this file, in place of the one with the same name."""
        entry = self.entries[key]
        data = tensor.contiguous().view(torch.uint8).flatten()
        assert len(data) == entry.stop - entry.start
        copy.seek(entry.start)
        copy.write(data.numpy().data)


class TensorWriter:
    """A new safetensors file that is written one tensor at a time.

    Args:
        path: of the file.
        entries: type and shape of every tensor to write.
        metadata: free text entries of the header.

    Raises:
        OSError: if it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self._waiting: dict[str, Entry] = {}
        stop = 0
        # wide types first, so that every tensor is aligned
        for key, (dtype, shape) in sorted(entries.items(), key=lambda item: -item[1][0].itemsize):
            start, stop = stop, stop + math.prod(shape) * dtype.itemsize
            name = _TYPE_NAMES[dtype]
            header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [start, stop]}
            self._waiting[key] = Entry(name, shape, start, stop)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._begin = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, key: str, tensor: Tensor) -> None:
        """Write one of the tensors that were announced."""
        entry = self._waiting.pop(key)
        assert (DTYPES[entry.dtype], entry.shape) == (tensor.dtype, tuple(tensor.shape))
        self._file.seek(self._begin + entry.start)
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                assert not self._waiting
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A fresh folder that becomes `target`, or whose files move into it, once all of them are written.

    A target that is new appears in one step; in one that is there each file is replaced in one step.
    """
    if target.exists() and not target.is_dir():
        raise AdapterError(f"the folder to write must not be a file, got {target}")
    made: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.parent / f".{target.name}-{secrets.token_hex(4)}"
        made.mkdir()
        yield made
        if not target.exists():
            os.rename(made, target)
            return
        files = list(made.iterdir())
        for file in files:  # before the first of them moves
            _check_replaceable(target / file.name)
        for file in files:
            _replace(target / file.name, file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{target} cannot be written: {one_line(error)}") from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_file():
        raise OSError(f"{target.name} is no regular file there")


def _replace(target: Path, made: Path) -> None:
    """Move a file that is whole to its place; it takes the mode of the one that was there."""
    if target.exists():
        shutil.copymode(target, made)
    os.replace(made, target)


@contextmanager
def atomic_file(target: PathLike) -> Iterator[Path]:
    """A path to write to, which becomes `target` once the block has ended without an error.

    Raises:
        OSError: if the target cannot be written, or is a folder, a device or a pipe.
    """
    target = Path(target)
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}-{secrets.token_hex(4)}"
    try:
        yield temporary
        _replace(target, temporary)
    finally:
        temporary.unlink(missing_ok=True)


def find_file(source: PathLike, file_name: str) -> Path:
    """A file of an adapter in a folder or a hub repository."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / file_name).is_file():
            raise AdapterError(f"the folder of an adapter must have {file_name}, got {folder} without it")
        return folder / file_name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise AdapterError(f"an adapter must be a folder or a hub repository, got {str(source)!r}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), file_name))
    except Exception as error:  # whatever the network raises
        raise AdapterError(
            f"{str(source)!r} is no folder here, and {file_name} cannot be had from a hub repository of "
            f"that name: {one_line(error)}"
        ) from error


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: if it is none, is nested too deeply, or has an integer above every float.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _integer(digits: str) -> int:
    value = int(digits)
    try:
        float(value)
    except OverflowError as error:
        raise ValueError(f"numbers must be finite floats, got one of {len(digits)} digits") from error
    return value


def read_json(file: Path, rule: str) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        rule: what the file must be, for the error.
    """
    try:
        content = parse_json(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"got {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} must be {rule}: {one_line(error)}") from error
    return content
