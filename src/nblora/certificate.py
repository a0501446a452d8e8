"""Certificates: measured spectra of updates against the bounds that they were promised to keep."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from torch import nn

from nblora.checkpoints import TOLERANCE, PathLike, read_adapter


@dataclass(frozen=True)
class LayerCertificate:
    """What was measured of one layer's update.

    Attributes:
        name: module name in the base model.
        shape: (m, n) of the update, (out, in).
        rank: number of thin factors k; the rank of the update is at most this.
        singular_values: min(k, m, n) of them, in descending order, measured in float64 from the thin
            factors.
        norm: of the update, in the certificate's norm.
        bound: the absolute bound.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    singular_values: tuple[float, ...]
    norm: float
    bound: float

    @property
    def slack(self) -> float:
        """What is left: bound - norm."""
        return self.bound - self.norm

    @property
    def share(self) -> float:
        """How much of the bound is used: norm / bound, 0 where both are zero."""
        return self.norm / self.bound if self.bound else (0.0 if self.norm == 0 else math.inf)

    @property
    def holds(self) -> bool:
        """Whether norm <= bound up to rounding (`TOLERANCE`). NaN never holds."""
        return self.norm <= self.bound * (1 + TOLERANCE)


@dataclass(frozen=True)
class Certificate:
    """Measured spectra of every adapted layer against its bound.

    Attributes:
        norm_name: which norm is bounded.
        layers: sorted by name, numbers by value.
    """

    norm_name: str
    layers: tuple[LayerCertificate, ...]

    @property
    def holds(self) -> bool:
        """Whether every layer keeps its bound."""
        return all(layer.holds for layer in self.layers)

    @property
    def summary(self) -> str:
        """One sentence."""
        broken = [layer for layer in self.layers if not layer.holds]
        if broken:
            return f"{len(broken)} of {len(self.layers)} layers break their bound, first {broken[0].name!r}."
        fullest = max(self.layers, key=lambda layer: layer.share)
        return (
            f"All {len(self.layers)} layers keep their bound; {fullest.name!r} uses the most of it, "
            f"{fullest.share:.1%}."
        )

    def to_json(self) -> str:
        """All of it as JSON; numbers that are not finite become null."""
        layers = [
            asdict(layer) | {"slack": layer.slack, "share": layer.share, "holds": layer.holds}
            for layer in self.layers
        ]
        content = {"holds": self.holds, "norm_name": self.norm_name, "tolerance": TOLERANCE, "layers": layers}
        return json.dumps(finite(content), indent=2, allow_nan=False)

    def rows(self) -> list[tuple[str, ...]]:
        """A heading and a row of text for each layer."""
        heading = ("layer", "shape", "rank", f"{self.norm_name} norm", "bound", "used", "holds")
        return [
            heading,
            *(
                (
                    layer.name,
                    "×".join(map(str, layer.shape)),
                    str(layer.rank),
                    f"{layer.norm:.4g}",
                    f"{layer.bound:.4g}",
                    f"{layer.share:.1%}",
                    "yes" if layer.holds else "NO",
                )
                for layer in self.layers
            ),
        ]

    def to_table(self) -> str:
        """A plain-text table with the summary below it."""
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, "", self.summary])


def certify(model_or_adapter_path: nn.Module | PathLike, adapter_name: str = "default") -> Certificate:
    """Measure the update of every layer and compare it with its bound.

    Singular values are computed in float64 from the thin factors that the model uses, never from an
    (m, n) product. The bound is the absolute radius that the adapter stores, or the configured number
    where that is absolute. That a stored radius is the configured multiple of the base weight's spectral
    norm can't be told without the base weight, and is not checked.

    Args:
        model_or_adapter_path: a model with an NB-LoRA adapter; the folder or hub repository of a saved
            one; or of a plain LoRA that `export_lora` wrote. A model and its saved adapter give the
            same certificate.
        adapter_name: which adapter of a model.

    Raises:
        AdapterError: if it cannot be read.
    """
    adapter = read_adapter(model_or_adapter_path, adapter_name)
    norm = next(iter(adapter.layers.values())).norm
    layers = []
    for name, layer in sorted(adapter.layers.items(), key=lambda item: _natural(item[0])):
        sigma = layer.update.singular_values()
        m, n = layer.update.shape
        layers.append(
            LayerCertificate(
                name=name,
                shape=(m, n),
                rank=layer.update.rank,
                singular_values=tuple(sigma.tolist()),
                norm=norm.value(sigma).item(),
                bound=layer.bound,
            )
        )
    return Certificate(norm.name, tuple(layers))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def finite(value: object) -> object:
    """The same with None in place of numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
