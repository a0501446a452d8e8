"""What a merge writes: a plain LoRA, layer by layer, or the base weights with the merged update added."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nblora.bounds import Norm
from nblora.checkpoints.base import BaseWeights
from nblora.checkpoints.layouts import Layout
from nblora.checkpoints.storage import DTYPES, AdapterError, PathLike, TensorFile, TensorWriter
from nblora.checkpoints.writing import (
    FileNames,
    PeftNames,
    bounds_metadata,
    exported_file,
    padded,
    plain_config,
)
from nblora.lowrank import LowRank
from nblora.merging.sources import Slot

Names = PeftNames | FileNames

# weights in forms that the merged update is not added to, and what speaks of them
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"}
_OTHER_INDEX = ".bin.index.json"


def names_in(slots: Sequence[Slot], layout: Layout) -> dict[str | None, Names]:
    """How the layout names the layers of each component."""
    components = sorted({slot.component or "" for slot in slots})
    if layout == "peft":
        if len(components) > 1:
            raise ValueError(f"component must be one of {components} in PEFT's layout, got component=None")
        return {name or None: PeftNames() for name in components}
    if "" in components:
        raise ValueError(
            "component must name the component of the pipeline (unet, transformer, text_encoder, ...) in the "
            f"layout {layout!r} where no adapter does, got component=None"
        )
    return {name: FileNames(layout, name) for name in components}


class LoraWriter:
    """A plain LoRA that is written layer by layer into a folder; one rank for all, known at the end.

    Each layer lies in a file of its own until then, so that one of them is in memory.

    Args:
        folder: of `atomic_folder`.
        slots: the layers.
        layout: of the file.
        dtype: of its tensors.

    Raises:
        AdapterError: if the layout has no names for the layers, or one for two of them.
        ValueError: if a component has to be named.
    """

    def __init__(self, folder: Path, slots: Sequence[Slot], layout: Layout, dtype: torch.dtype) -> None:
        self.folder, self.slots, self.layout, self.dtype = folder, slots, layout, dtype
        self.names = names_in(slots, layout)
        self._entries(1)  # refuses what the layout cannot hold, before there is anything to write
        self.rank = 1
        self._parts = folder / ".parts"
        self._parts.mkdir()
        self._written = 0

    def add(self, factors: Sequence[LowRank]) -> None:
        """Write the next layer.

        Args:
            factors: one for each expert, in `dtype`.
        """
        tensors = {}
        for number, factor in enumerate(factors):
            tensors[f"left.{number}"] = factor.left.contiguous()
            tensors[f"right.{number}"] = factor.right.contiguous()
            self.rank = max(self.rank, factor.rank)
        save_file(tensors, self._part(self._written))
        self._written += 1

    def finish(
        self,
        norm: Norm | None,
        bounds: Sequence[Sequence[float]] | None,
        options: dict[str, Any] | None,
    ) -> None:
        """Join the layers in one file.

        Args:
            norm, bounds: to note for `certify`: absolute, for each layer one for each expert; None without.
            options: of PEFT's configuration; None writes none.
        """
        metadata = {"format": "pt"}
        if norm is not None and bounds is not None:
            noted = {
                self.names[slot.component].noted(slot.name): list(each) if slot.form.experts else each[0]
                for slot, each in zip(self.slots, bounds, strict=True)
            }
            metadata |= bounds_metadata(norm, noted)
        file = exported_file(self.folder, self.layout)
        with TensorWriter(file, self._entries(self.rank), metadata) as writer:
            for index, slot in enumerate(self.slots):
                part = TensorFile(self._part(index))
                factors = [
                    padded(LowRank(part.read(f"left.{i}"), part.read(f"right.{i}")), self.rank)
                    for i in range(len(slot.labels))
                ]
                named = self.names[slot.component].tensors(slot.name, slot.form, factors)
                for key, tensor in named.items():
                    writer.write(key, tensor)
                self._part(index).unlink()
        shutil.rmtree(self._parts)
        if options is not None:
            plain_config(self.rank, **options).save_pretrained(self.folder)

    def _part(self, index: int) -> Path:
        return self._parts / f"{index}.safetensors"

    def _entries(self, rank: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every tensor of the file."""
        entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for slot in self.slots:
            m, n = slot.form.shape
            shapes = ((m, rank), (rank, n))
            empty = LowRank(*(torch.empty(shape, dtype=self.dtype, device="meta") for shape in shapes))
            tensors = self.names[slot.component].tensors(slot.name, slot.form, [empty] * len(slot.labels))
            if repeated := entries.keys() & tensors.keys():
                raise AdapterError(
                    f"layers must have different names in the layout, got {min(repeated)!r} of {slot.name!r} "
                    "and of another one"
                )
            entries |= {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        return entries


@dataclass(frozen=True)
class _Target:
    """A base weight in the copy of a model's folder."""

    file: TensorFile
    key: str
    transposed: bool


class BaseWriter:
    """A copy of a model's folder, to whose weights updates are added layer by layer.

    Configuration, tokenizer and all other files are copied; weights in other forms than safetensors are
    left out, and so are folders and hidden files. Only adapted weights change.

    Args:
        folder: of `atomic_folder`.
        base: a folder with safetensors files, one or in shards; or one with such folders named after
            components.
        slots: the layers.
        transposed: whether linear layers store their weights as (in, out), as transformers' Conv1D do.

    Raises:
        AdapterError: if a layer has no weight of its own and of its shape in the files, or it is not of
            floating-point numbers.
        OSError: if it cannot be copied.
    """

    def __init__(self, folder: Path, base: PathLike, slots: Sequence[Slot], transposed: bool) -> None:
        self.folder = folder
        (component,) = {slot.component for slot in slots}
        weights = BaseWeights(base, component)
        source = Path(weights.source)
        if not source.is_dir():
            raise AdapterError(f"the base of merged weights must be a folder of a model, got {source}")
        self._targets: list[_Target] = []
        taken: dict[str, Slot] = {}
        for slot in slots:
            target = _target(weights, slot, transposed)
            if target.key in taken:
                raise AdapterError(
                    f"each layer must have a weight of its own in {source}, got {target.key!r} of "
                    f"{taken[target.key].name!r} and {slot.name!r}"
                )
            taken[target.key] = slot
            self._targets.append(target)
        for file in sorted(source.iterdir()):
            if _belongs(file):
                shutil.copyfile(file, folder / file.name)

    def add(self, updates: Sequence[Tensor]) -> None:
        """Add the update of the next layer: (m, n) in float64, one for each expert.

        Raises:
            AdapterError: if the sum is not finite in the type of the weight.
        """
        target = self._targets.pop(0)
        weight = target.file.read(target.key)
        matrices = weight if len(updates) > 1 else weight[None]
        for matrix, update in zip(matrices, updates, strict=True):
            added = update.mT if target.transposed else update
            matrix.copy_(matrix.double() + added.reshape(matrix.shape))  # rounded once, here
        if not bool(weight.isfinite().all()):
            raise AdapterError(f"the merged weight {target.key!r} must be finite in {weight.dtype}")
        with open(self.folder / target.file.path.name, "r+b") as copy:
            target.file.overwrite(copy, target.key, weight)

    def finish(self) -> None:
        """Force the weights to the disk."""
        assert not self._targets
        for file in self.folder.glob("*.safetensors"):
            with open(file, "r+b") as copy:
                os.fsync(copy.fileno())


def _belongs(file: Path) -> bool:
    """Whether a file of a model's folder is right for the merged model too."""
    hidden = file.name.startswith(".") or file.name.endswith(_OTHER_INDEX)
    return file.is_file() and not hidden and file.suffix not in _OTHER_WEIGHTS


def _target(weights: BaseWeights, slot: Slot, transposed: bool) -> _Target:
    """Where the update of a layer is added, and whether as its transpose."""
    file, key = weights.stored(slot.place)
    entry, (m, n) = file.entries[key], slot.form.shape
    if not DTYPES.get(entry.dtype, torch.bool).is_floating_point:
        raise AdapterError(f"{file.path} must have floating-point weights, got {entry.dtype} at {key!r}")
    if slot.form.experts is not None:
        if m == n:
            raise AdapterError(
                f"experts must not be square for their files to tell rows from columns, got {entry.shape} at "
                f"{key!r} in {file.path}"
            )
        return _Target(file, key, entry.shape[1:] == (n, m))
    if m != n:
        # with a kernel the inputs are counted over it
        return _Target(file, key, len(entry.shape) == 2 and entry.shape == (n, m))
    return _Target(file, key, slot.form.embedding or (transposed and not slot.parameters))
