"""Capping the spectra of LoRA files."""

from __future__ import annotations

import math
import numbers
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from nblora.bounds import Norm, Profile, parse_norm
from nblora.checkpoints.base import BaseWeights
from nblora.checkpoints.layouts import LoraLayer
from nblora.checkpoints.lora import LoraFile, open_lora
from nblora.checkpoints.spectra import clip_in_place
from nblora.checkpoints.storage import AdapterError, PathLike, atomic_file, atomic_folder, one_line
from nblora.checkpoints.tables import json_text, text_table

BoundKind = Literal["absolute", "relative"]
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Cut:
    """What a projection onto a ball did to one update.

    Attributes:
        name: of the layer.
        shape: (m, n) of the update.
        rank: number of factors.
        bound: absolute.
        before: norm of the update as it was.
        after: norm of what was written, measured in float64 from the written numbers.
        removed: Frobenius norm of the difference of both spectra, over the Frobenius norm before.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    bound: float
    before: float
    after: float
    removed: float

    @property
    def changed(self) -> bool:
        """Whether the update was outside the ball."""
        return self.before > self.bound


@dataclass(frozen=True)
class CutReport:
    """What was cut from a LoRA to keep a bound.

    Attributes:
        norm_name: which norm is bounded.
        layers: in the order of the file.
        unbounded: names of further tensors, which have no bound.
    """

    norm_name: str
    layers: tuple[Cut, ...]
    unbounded: tuple[str, ...]

    @property
    def summary(self) -> str:
        """What was done, in one or two sentences."""
        changed = [layer for layer in self.layers if layer.changed]
        if changed:
            worst = max(changed, key=lambda layer: layer.before / layer.bound if layer.bound else math.inf)
            text = (
                f"{len(changed)} of {len(self.layers)} layers were outside their bound and are on it now, "
                f"furthest {worst.name!r} with norm {worst.before:.4g} and bound {worst.bound:.4g}."
            )
        else:
            text = f"All {len(self.layers)} layers were inside their bound: nothing is cut."
        if self.unbounded:
            text += f" {len(self.unbounded)} tensors that are no LoRA factors have no bound."
        return text

    def rows(self) -> list[tuple[str, ...]]:
        """A heading and a row of text for each layer."""
        heading = ("layer", "shape", "rank", f"{self.norm_name} norm", "bound", "norm now", "removed")
        return [
            heading,
            *(
                (
                    layer.name,
                    "×".join(map(str, layer.shape)),
                    str(layer.rank),
                    f"{layer.before:.4g}",
                    f"{layer.bound:.4g}",
                    f"{layer.after:.4g}",
                    f"{layer.removed:.1%}" if layer.changed else "",
                )
                for layer in self.layers
            ),
        ]

    def to_table(self) -> str:
        """A plain-text table with the summary below it."""
        return f"{text_table(self.rows())}\n\n{self.summary}"

    def to_json(self) -> str:
        """All of it as JSON."""
        layers = [asdict(layer) | {"changed": layer.changed} for layer in self.layers]
        return json_text({"norm_name": self.norm_name, "layers": layers, "unbounded": self.unbounded})


def clip_lora(
    src: PathLike,
    dst: PathLike,
    *,
    norm: str | float | Norm = "spectral",
    bound: float,
    bound_kind: BoundKind = "absolute",
    base: nn.Module | PathLike | None = None,
    advance: Advance = lambda done, total: None,
) -> CutReport:
    """Cap the spectrum of every update of a LoRA, and write a LoRA of the same layout.

    Every update (alpha and rank included) is projected onto the ball, rounded to the type that it has in
    the file, and measured afterwards. Names, types, metadata and all tensors that need no change stay byte
    for byte. Memory: two factors of one layer at a time. The new file takes its place when it is whole; a
    process killed on the way leaves the old one.

    Args:
        src: a safetensors file of any layout, a folder, or a hub repository with a PEFT adapter.
        dst: a folder, which gets the weights and adapter_config.json; where `src` is a file, else a file,
            unless it is a folder or ends with a slash. May be `src`.
        norm: as in `NBLoraConfig`, or a `Norm`.
        bound: on every update, > 0.
        bound_kind: "absolute", or "relative": times the spectral norm of the layer's base weight.
        base: the base model, or its files; for a relative bound.
        advance: called with the layers done and their number.

    Raises:
        AdapterError: if files are missing, damaged, pickled, of another method or of another base model,
            or the new one cannot be written.
        ValueError: for a norm or a bound outside its rule.
    """
    norm = parse_norm(norm)
    check_bound(bound, bound_kind, base)
    file = open_lora(src)
    name = file.tensors.path.name
    # Path would drop a slash at the end
    if not Path(src).is_file() or Path(dst).is_dir() or os.fspath(dst).endswith(("/", os.sep)):
        with atomic_folder(Path(dst)) as folder:
            report = _clip(file, folder / name, norm, bound, bound_kind, base, advance)
            if file.config_file is not None:
                shutil.copyfile(file.config_file, folder / CONFIG_NAME)
        return report
    try:
        with atomic_file(dst) as temporary:
            return _clip(file, temporary, norm, bound, bound_kind, base, advance)
    except OSError as error:
        raise AdapterError(f"{dst} cannot be written: {one_line(error)}") from error


def check_bound(bound: Any, bound_kind: str, base: object) -> None:
    """Refuse a bound outside its rule."""
    is_number = isinstance(bound, numbers.Real) and not isinstance(bound, bool)
    if not is_number or not 0 < bound < math.inf:
        raise ValueError(f"bound must be a number, positive and finite, got bound={bound!r}")
    if bound_kind not in ("absolute", "relative"):
        raise ValueError(f"bound_kind must be 'absolute' or 'relative', got bound_kind={bound_kind!r}")
    if bound_kind == "relative" and base is None:
        raise ValueError("a relative bound needs the base model, or its files, as base, got base=None")


class Radii:
    """The absolute bounds of layers.

    Args:
        bound: absolute, or relative to the base weight's spectral norm.
    """

    def __init__(
        self, file: LoraFile, bound: float, bound_kind: BoundKind, base: nn.Module | PathLike | None
    ) -> None:
        self.file = file
        self.bound = float(bound)
        self.bases: dict[str | None, BaseWeights] = {}
        if bound_kind == "relative":
            assert base is not None
            for component in {layer.component for layer in file.layers}:
                self.bases[component] = BaseWeights(base, component)

    def of(self, index: int) -> list[float]:
        """Of the layer at an index of the file, one for each expert."""
        layer = self.file.layers[index]
        if not self.bases:
            return [self.bound] * len(layer.labels)
        return [self.bound * norm for norm in self.bases[layer.component].norms(self.file.place(layer))]


def cut(
    name: str, shape: tuple[int, int], rank: int, bound: float, spectra: Sequence[Tensor], norm: Norm
) -> Cut:
    """A `Cut` from the spectra before and after."""
    before, after = spectra
    whole = torch.linalg.vector_norm(before).item()
    removed = torch.linalg.vector_norm(before - after).item()
    return Cut(
        name=name,
        shape=shape,
        rank=rank,
        bound=bound,
        before=norm.value(before).item(),
        after=norm.value(after).item(),
        removed=removed / whole if whole else 0.0,
    )


def _clip(
    file: LoraFile,
    target: Path,
    norm: Norm,
    bound: float,
    bound_kind: BoundKind,
    base: nn.Module | PathLike | None,
    advance: Advance,
) -> CutReport:
    """Write a copy of the file in which the factors of updates outside the ball are replaced."""
    radii = Radii(file, bound, bound_kind, base)
    shutil.copyfile(file.tensors.path, target)
    cuts: list[Cut] = []
    with target.open("r+b") as copy:
        for index, layer in enumerate(file.layers):
            cuts += _clip_layer(file, layer, norm, radii.of(index), copy)
            advance(index + 1, len(file.layers))
        copy.flush()
        os.fsync(copy.fileno())
    return CutReport(norm.name, tuple(cuts), file.others)


def _clip_layer(
    file: LoraFile, layer: LoraLayer, norm: Norm, bounds: Sequence[float], copy: BinaryIO
) -> list[Cut]:
    """Replace the factors of one layer in an open copy of the file, if its update is outside the ball.

    A function of its own, so that the factors of the layer before are gone.
    """
    up, down = file.tensors.read(layer.up), file.tensors.read(layer.down)
    cuts = []
    for label, bound, (left, right) in zip(layer.labels, bounds, layer.matrices(up, down), strict=True):
        try:
            spectra = clip_in_place(left, right, layer.scale, norm, bound)
        except ArithmeticError as error:
            rule = "updates of finite norm" if isinstance(norm, Profile) else "finite updates"
            raise AdapterError(
                f"{file.tensors.path} must have {rule}, from {layer.down!r} and {layer.up!r}, {error}"
                + " (a profile must have a bound > 0 for every singular value)" * isinstance(norm, Profile)
            ) from error
        cuts.append(cut(label, layer.shape, layer.rank, bound, spectra, norm))
    if any(each.changed for each in cuts):
        file.tensors.overwrite(copy, layer.up, up)
        file.tensors.overwrite(copy, layer.down, down)
    return cuts
