"""What was merged, layer by layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from nblora.checkpoints.tables import json_text, text_table
from nblora.merging.guard import Guarded
from nblora.privacy import Adjacency, NoisyLayer, Spent
from nblora.privacy.planning import LAYER_HEADING


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


@dataclass(frozen=True)
class Released(NoisyLayer):
    """One layer of a private merge; of experts each for itself.

    Attributes:
        written: Frobenius norm of the released update, in the numbers that are in the file; for base weights
            before it is added to them.
    """

    written: float = 0.0


@dataclass(frozen=True)
class PrivateMergeReport:
    """A private merge and what it cost. All but `clients` may be published.

    Attributes:
        out: the folder.
        rank: of every tensor of the file; None where base weights were written.
        base: the folder of the base weights that the update was added to, None for an adapter.
        norm_name: in which norm updates are bounded.
        projected: whether the release was projected onto the ball of that norm.
        epsilon, delta, mu: of this release, as if there were no sampling.
        adjacency: what they protect.
        adapters: how many were invited; None where they are a secret sample.
        n_total: the denominator, None with weights.
        weights: of the adapters, taken as public.
        sampling_probability: of each client.
        secure: whether the noise came from the system's randomness.
        release: identifier in the ledger, None without one.
        ledger: its file.
        budget: its epsilon.
        started: whether it was started for this release.
        spent: all its releases, this one included.
        layers: in the order of the file.
        clients: what the guard found, one for each adapter. Private.
    """

    out: str
    rank: int | None
    base: str | None
    norm_name: str
    projected: bool
    epsilon: float
    delta: float
    mu: float
    adjacency: Adjacency
    adapters: int | None
    n_total: int | None
    weights: tuple[float, ...] | None
    sampling_probability: float
    secure: bool
    release: str | None
    ledger: str | None
    budget: float | None
    started: bool
    spent: Spent | None
    layers: tuple[Released, ...]
    clients: tuple[Guarded, ...] = field(repr=False)

    @property
    def snr(self) -> float:
        """Signal-to-noise at best, as in `nblora.privacy.planning`, after truncation where there is one."""
        noise = (each.frobenius if self.rank is None else each.truncated(self.rank) for each in self.layers)
        return math.hypot(*(layer.bound for layer in self.layers)) / math.hypot(*noise)

    @property
    def summary(self) -> str:
        """What was released and what it cost, in a few sentences, to be published."""
        if self.rank is None:
            text = f"The base weights of {self.base} with {len(self.layers)} noised updates."
        else:
            text = f"{len(self.layers)} noised layers of rank {self.rank}."
        text += (
            f" ({self.epsilon:.6g}, {self.delta:g})-differentially private under {self.adjacency}; "
            f"mu {self.mu:.4g}, in all layers together. The merged update has at most {self.snr:.3g} times "
            "the Frobenius norm of the noise."
        )
        if self.weights is not None:
            text += " The weights were taken as public."
        if self.sampling_probability < 1:
            text += f" Clients are sampled with probability {self.sampling_probability:g}: see the total."
        if self.spent is not None:
            text += (
                f" Spent so far: epsilon {self.spent.epsilon:.6g} of {self.budget:.6g} at delta "
                f"{self.spent.delta:g}, in {self.spent.releases} releases."
            )
        else:
            text += " No ledger counts it."
        if not self.secure or (self.spent is not None and not self.spent.secure):
            text += " SEEDED NOISE: whoever knows the seed subtracts it, and nothing is private."
        return text

    def rows(self) -> list[tuple[str, ...]]:
        """A heading and a row of text for each layer, to be published."""
        return [
            (*LAYER_HEADING, "‖released‖_F"),
            *((*layer.cells(), f"{layer.written:.4g}") for layer in self.layers),
        ]

    @property
    def client_summary(self) -> str:
        """How many adapters were used. Private."""
        counts: dict[str, int] = {}
        for client in self.clients:
            counts[client.status] = counts.get(client.status, 0) + 1
        return ", ".join(f"{count} {status}" for status, count in counts.items())

    def client_rows(self) -> list[tuple[str, ...]]:
        """A heading and a row of text for each adapter. Private."""
        return [
            ("adapter", "status", "norm / bound", "layers missing", "why"),
            *(
                (
                    client.path,
                    client.status,
                    "" if client.share is None else f"{client.share:.4g}",
                    str(len(client.missing) or ""),
                    client.reason,
                )
                for client in self.clients
            ),
        ]

    def to_table(self) -> str:
        """A plain-text table with the summary below it, to be published."""
        return f"{text_table(self.rows())}\n\n{self.summary}"

    def to_json(self, *, private: bool = False) -> str:
        """All of it as JSON.

        Args:
            private: with what the guard found, under "private_do_not_publish".
        """
        content = asdict(self)
        clients = content.pop("clients")
        return json_text(content | ({"private_do_not_publish": {"clients": clients}} if private else {}))
