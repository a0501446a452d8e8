"""What was merged, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from nblora.checkpoints.tables import json_text, text_table


@dataclass(frozen=True)
class Merged:
    """What became of one layer.

    Attributes:
        name: of the layer; of experts with their number.
        shape: (m, n) of the update.
        adapters: how many of the adapters have the layer; it counts as zero in the others.
        rank: number of factors, before they are padded with zeros to the rank of the file.
        bound: absolute, None where none was asked for.
        before: norm of the combination before truncation, projection and rounding.
        after: norm of what was written, measured in float64 from the written numbers.
        removed: Frobenius norm of the difference of both spectra, over the Frobenius norm before.
    """

    name: str
    shape: tuple[int, int]
    adapters: int
    rank: int
    bound: float | None
    before: float
    after: float
    removed: float


@dataclass(frozen=True)
class MergeReport:
    """What was merged, layer by layer.

    Attributes:
        norm_name: in which norm updates are measured, and bounded where a bound was asked for.
        method: how adapters were combined.
        adapters: where they are from.
        weights: of the adapters, in the same order.
        rank: of every tensor of the file.
        layers: sorted by name, numbers by value.
    """

    norm_name: str
    method: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    rank: int
    layers: tuple[Merged, ...]

    @property
    def incomplete(self) -> tuple[Merged, ...]:
        """The layers that some of the adapters lack, and that count as zero there."""
        return tuple(layer for layer in self.layers if layer.adapters < len(self.adapters))

    @property
    def cut(self) -> tuple[Merged, ...]:
        """The layers that were outside their bound."""
        return tuple(each for each in self.layers if each.bound is not None and each.before > each.bound)

    @property
    def summary(self) -> str:
        """What was done, in a few sentences."""
        text = f"{len(self.adapters)} adapters are merged into {len(self.layers)} layers of rank {self.rank}."
        if self.incomplete:
            first = self.incomplete[0]
            text += (
                f" {len(self.incomplete)} layers are not in every adapter and count as zero where they lack, "
                f"first {first.name!r}, which {first.adapters} of {len(self.adapters)} have."
            )
        if any(layer.bound is not None for layer in self.layers):
            text += f" {len(self.cut)} were outside their bound; all are inside now."
        worst = max(self.layers, key=lambda layer: layer.removed)
        if worst.removed > 1e-6:
            text += f" The most is cut from {worst.name!r}, {worst.removed:.1%} of its Frobenius norm."
        return text

    def rows(self) -> list[tuple[str, ...]]:
        """A heading and a row of text for each layer."""
        heading = (
            "layer",
            "shape",
            "adapters",
            "rank",
            f"{self.norm_name} norm",
            "bound",
            "norm now",
            "removed",
        )
        return [
            heading,
            *(
                (
                    layer.name,
                    "×".join(map(str, layer.shape)),
                    f"{layer.adapters}/{len(self.adapters)}",
                    str(layer.rank),
                    f"{layer.before:.4g}",
                    "" if layer.bound is None else f"{layer.bound:.4g}",
                    f"{layer.after:.4g}",
                    f"{layer.removed:.1%}",
                )
                for layer in self.layers
            ),
        ]

    def to_table(self) -> str:
        """A plain-text table with the summary below it."""
        return f"{text_table(self.rows())}\n\n{self.summary}"

    def to_json(self) -> str:
        """All of it as JSON."""
        return json_text(asdict(self))
