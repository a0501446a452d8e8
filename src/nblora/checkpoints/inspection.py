"""What is in a LoRA file: spectra, norms and stable ranks, the most dangerous layers first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from nblora.checkpoints.adapter import Adapter, is_ours, read_adapter
from nblora.checkpoints.base import BaseWeights
from nblora.checkpoints.clipping import Advance
from nblora.checkpoints.engines import EngineReport, judge
from nblora.checkpoints.lora import LoraFile, open_lora
from nblora.checkpoints.spectra import spectrum
from nblora.checkpoints.storage import AdapterError, PathLike
from nblora.checkpoints.tables import json_text, text_table


@dataclass(frozen=True)
class LayerSpectrum:
    """What was measured of one update.

    Attributes:
        name: of the layer.
        shape: (m, n) of the update.
        rank: number of factors.
        scale: that the factors are multiplied by (alpha over rank); measures include it.
        singular_values: in descending order, in float64.
        base_norm: spectral norm of the base weight, None without a base.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scale: float
    singular_values: tuple[float, ...]
    base_norm: float | None

    @property
    def spectral(self) -> float:
        """The largest singular value: how far the update can move an output."""
        return self.singular_values[0]

    @property
    def frobenius(self) -> float:
        """The root of the sum of squares."""
        return math.hypot(*self.singular_values)

    @property
    def nuclear(self) -> float:
        """The sum of the singular values."""
        return math.fsum(self.singular_values)

    @property
    def stable_rank(self) -> float:
        """Frobenius norm over spectral norm, squared: between 1 and the rank; 0 of a zero update."""
        return (self.frobenius / self.spectral) ** 2 if self.spectral else 0.0

    @property
    def danger(self) -> float:
        """The spectral norm; with a base, over the spectral norm of the layer's base weight."""
        if self.base_norm is None:
            return self.spectral
        return self.spectral / self.base_norm if self.base_norm else (math.inf if self.spectral else 0.0)


@dataclass(frozen=True)
class Inspection:
    """What is in a LoRA.

    Attributes:
        source: what was inspected.
        layout: "peft", "diffusers", "kohya", or "nblora" for an NB-LoRA adapter.
        layers: by descending danger.
        others: names of further tensors.
        engines: which engines serve it, None for NB-LoRA.
    """

    source: str
    layout: str
    layers: tuple[LayerSpectrum, ...]
    others: tuple[str, ...]
    engines: EngineReport | None

    @property
    def relative(self) -> bool:
        """Whether danger is relative to base weights."""
        return self.layers[0].base_norm is not None

    @property
    def summary(self) -> str:
        """Two sentences."""
        first = self.layers[0]
        size = f"{first.danger:.3g} times its base weight's" if self.relative else f"{first.spectral:.4g}"
        whole = math.hypot(*(layer.frobenius for layer in self.layers))
        return (
            f"{len(self.layers)} layers in the {self.layout} layout, Frobenius norm of them all {whole:.4g}. "
            f"Most dangerous is {first.name!r} with a spectral norm of {size}."
        )

    def rows(self) -> list[tuple[str, ...]]:
        """A heading and a row of text for each layer."""
        heading = ["layer", "shape", "rank", "scale", "spectral", "frobenius", "nuclear", "stable rank"]
        rows = [
            [
                layer.name,
                "×".join(map(str, layer.shape)),
                str(layer.rank),
                f"{layer.scale:.4g}",
                f"{layer.spectral:.4g}",
                f"{layer.frobenius:.4g}",
                f"{layer.nuclear:.4g}",
                f"{layer.stable_rank:.2f}",
            ]
            for layer in self.layers
        ]
        if self.relative:
            heading.append("spectral/base")
            for row, layer in zip(rows, self.layers):
                row.append(f"{layer.danger:.3g}")
        return [tuple(row) for row in (heading, *rows)]

    def to_table(self) -> str:
        """A plain-text table with the summary below it."""
        return f"{text_table(self.rows())}\n\n{self.summary}"

    def content(self) -> dict[str, Any]:
        """All of it, in types that JSON has."""
        measures = ("spectral", "frobenius", "nuclear", "stable_rank", "danger")
        layers = [
            asdict(layer) | {measure: getattr(layer, measure) for measure in measures}
            for layer in self.layers
        ]
        engines = None
        if self.engines is not None:
            engines = [asdict(v) | {"accepts": v.accepts} for v in self.engines.verdicts]
        return {
            "source": self.source,
            "layout": self.layout,
            "layers": layers,
            "others": self.others,
            "engines": engines,
        }

    def to_json(self) -> str:
        """All of it as JSON."""
        return json_text(self.content())


def inspect_lora(
    source: PathLike,
    *,
    base: nn.Module | PathLike | None = None,
    advance: Advance = lambda done, total: None,
) -> Inspection:
    """Measure every update of a LoRA, or of an NB-LoRA adapter.

    Args:
        source: a safetensors file of any layout, a folder, or a hub repository with a PEFT adapter.
        base: the base model, or its files: updates are then compared with the weights they are added to.
        advance: called with the layers done and their number.

    Raises:
        AdapterError: if files are missing, damaged, pickled, of another method or of another base model,
            or a tensor is not finite.
    """
    if is_ours(source):
        adapter = read_adapter(source)
        measured = _of_nblora(adapter, str(source), base, advance)
        return Inspection(str(source), "nblora", _sorted(measured), tuple(adapter.others), None)
    file = open_lora(source)
    measured = _of_lora(file, base, advance)
    return Inspection(str(source), file.layout, _sorted(measured), file.others, judge(file))


def _sorted(layers: Iterator[LayerSpectrum]) -> tuple[LayerSpectrum, ...]:
    return tuple(sorted(layers, key=lambda layer: -layer.danger))


def _of_nblora(
    adapter: Adapter, source: str, base: nn.Module | PathLike | None, advance: Advance
) -> Iterator[LayerSpectrum]:
    weights = None if base is None else BaseWeights(base)
    for done, (name, layer) in enumerate(adapter.layers.items(), start=1):
        norms: list[float] | list[None] = [None] * len(layer.bounds)
        if weights is not None:
            norms = weights.norms(adapter.place(name, source))
        for label, norm, update in zip(layer.labels(name), norms, layer.matrices, strict=True):
            sigma = update.singular_values()
            _check(sigma, f"{source} must have finite updates, at layer {label!r}")
            m, n = update.shape
            yield LayerSpectrum(label, (m, n), update.rank, 1.0, tuple(sigma.tolist()), norm)
        advance(done, len(adapter.layers))


def _of_lora(file: LoraFile, base: nn.Module | PathLike | None, advance: Advance) -> Iterator[LayerSpectrum]:
    components = {layer.component for layer in file.layers}
    bases = {c: BaseWeights(base, c) for c in components} if base is not None else {}
    for done, layer in enumerate(file.layers, start=1):
        norms: list[float] | list[None] = [None] * len(layer.labels)
        if bases:
            norms = bases[layer.component].norms(file.place(layer))
        for label, norm, (left, right) in zip(layer.labels, norms, file.factors(layer), strict=True):
            sigma = spectrum(left, right, layer.scale)
            _check(
                sigma, f"{file.tensors.path} must have finite updates, from {layer.down!r} and {layer.up!r}"
            )
            values = tuple(sigma.tolist())
            yield LayerSpectrum(label, layer.shape, layer.rank, layer.scale, values, norm)
        advance(done, len(file.layers))


def _check(sigma: Tensor, rule: str) -> None:
    if not bool(sigma.isfinite().all()):
        raise AdapterError(f"{rule}, got NaN or infinity")
