"""Certificates: measured spectra of updates against the bounds that they were promised to keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from nblora.checkpoints import PathLike, read_adapter
from nblora.checkpoints.tables import finite as finite
from nblora.checkpoints.tables import json_text, natural, text_table
from nblora.contract import TOLERANCE as TOLERANCE
from nblora.contract import LayerCertificate as LayerCertificate


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
        text = (
            f"All {len(self.layers)} layers keep their bound; {fullest.name!r} uses the most of it, "
            f"{fullest.share:.1%}."
        )
        if self.scaled:
            largest = max((layer.scale for layer in self.layers), key=abs)
            text += f" Bounds are those of the adapter times the scales that are set, up to {largest:g}."
        return text

    @property
    def scaled(self) -> bool:
        """Whether the model scales any update, and with it the bound."""
        return any(layer.scale != 1 for layer in self.layers)

    def to_json(self) -> str:
        """All of it as JSON; numbers that are not finite become null."""
        layers = [
            asdict(layer) | {"slack": layer.slack, "share": layer.share, "holds": layer.holds}
            for layer in self.layers
        ]
        content = {"holds": self.holds, "norm_name": self.norm_name, "tolerance": TOLERANCE, "layers": layers}
        return json_text(content)

    def rows(self) -> list[tuple[str, ...]]:
        """A heading and a row of text for each layer."""
        heading = ["layer", "shape", "rank", f"{self.norm_name} norm", "bound", "used", "holds"]
        rows = [
            [
                layer.name,
                "×".join(map(str, layer.shape)),
                str(layer.rank),
                f"{layer.norm:.4g}",
                f"{layer.bound:.4g}",
                f"{layer.share:.1%}",
                "yes" if layer.holds else "NO",
            ]
            for layer in self.layers
        ]
        if self.scaled:
            heading.insert(4, "scale")
            for row, layer in zip(rows, self.layers):
                row.insert(4, f"{layer.scale:g}")
        return [tuple(row) for row in (heading, *rows)]

    def to_table(self) -> str:
        """A plain-text table with the summary below it."""
        return f"{text_table(self.rows())}\n\n{self.summary}"


def certify(model_or_adapter_path: nn.Module | PathLike, adapter_name: str = "default") -> Certificate:
    """Measure the update of every layer, as the model applies it, and compare it with its bound.

    Singular values are computed in float64 from the thin factors that the model uses, never from an
    (m, n) product. The bound is the absolute radius that the adapter stores, or the configured number
    where that is absolute. That a stored radius is the configured multiple of the base weight's spectral
    norm can't be told without the base weight, and is not checked. A scale that is set on a model
    (`set_scale`) multiplies both; checkpoints have none. Experts have a bound each.

    Args:
        model_or_adapter_path: a model with an NB-LoRA adapter; the folder or hub repository of a saved
            one; or a plain LoRA that `export_lora` wrote, in any layout. A model and its saved adapter
            give the same certificate, up to rounding where the model is on another device.
        adapter_name: which adapter of a model.

    Raises:
        AdapterError: if it cannot be read.
    """
    adapter = read_adapter(model_or_adapter_path, adapter_name)
    norm = next(iter(adapter.layers.values())).norm
    layers = []
    for name, layer in sorted(adapter.layers.items(), key=lambda item: natural(item[0])):
        for label, update, bound in zip(layer.labels(name), layer.matrices, layer.bounds, strict=True):
            sigma = update.singular_values()
            m, n = update.shape
            layers.append(
                LayerCertificate(
                    name=label,
                    shape=(m, n),
                    rank=update.rank,
                    singular_values=tuple(sigma.tolist()),
                    norm=norm.value(sigma).item(),
                    bound=bound,
                    scale=layer.scale,
                )
            )
    return Certificate(norm.name, tuple(layers))
