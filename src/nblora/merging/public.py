"""What is known of a private merge before anyone looks at an update: layers, shapes, ranks, bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nblora.bounds import Norm, Schatten, parse_norm
from nblora.checkpoints.clipping import check_bound
from nblora.checkpoints.storage import AdapterError, PathLike
from nblora.checkpoints.writing import check_component
from nblora.merging.sources import Slot, Source, Term, match, open_source
from nblora.privacy import frobenius_bound

RADII_AGREE = 0.02
"""Relative difference of radii that is one of machines: relative bounds are measured to within 1 %."""


@dataclass(frozen=True)
class PublicLayers:
    """The layers of a private merge and what a client's update is at most; of experts each for itself.

    Attributes:
        sources: whose configurations these are.
        slots: the layers.
        norm: in which updates are bounded.
        bounds: absolute, in that norm, by label.
        frobenius: what follows from them for the Frobenius norm.
        shapes: (m, n).
        rank: no update has more factors.
    """

    sources: tuple[Source, ...]
    slots: tuple[Slot, ...]
    norm: Norm
    bounds: dict[str, float]
    frobenius: dict[str, float]
    shapes: dict[str, tuple[int, int]]
    rank: int


def public_layers(
    reference: PathLike,
    *,
    bound: float | None = None,
    norm: str | float = "frobenius",
    component: str | None = None,
) -> PublicLayers:
    """The layers, shapes, ranks and bounds of a public adapter.

    Args:
        reference: an NB-LoRA adapter, or a LoRA that notes its bounds; any LoRA where `bound` is given.
        bound: absolute, on every update, in place of what the adapter notes.
        norm: of `bound`.
        component: which component of a pipeline.

    Raises:
        AdapterError: if it cannot be read, or notes no bounds and none is given.
        ValueError: for options outside their rules.
    """
    check_component(component)
    return describe([open_source(reference)], bound=bound, norm=norm, component=component)


def describe(
    sources: Sequence[Source], *, bound: float | None, norm: str | float, component: str | None
) -> PublicLayers:
    """What adapters say of themselves, all of them the same.

    Raises:
        AdapterError: if they do not agree, or note no bounds and none is given.
        ValueError: for options outside their rules.
    """
    named = parse_norm(parse_norm(norm).name)
    if bound is None and named != Schatten(2.0):
        raise ValueError(
            "norm is that of bound: without one updates are bounded in the norm that files note, got "
            f"norm={norm!r} and bound=None"
        )
    if bound is not None:
        check_bound(bound, "absolute", None)
    slots = match(sources, component)
    norms: dict[str, Norm] = {}
    bounds: dict[str, float] = {}
    frobenius: dict[str, float] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for slot in slots:
        rank = _rank(slot, len(sources))
        if bound is None:
            of_slot, radii = _noted(slot)
            norms[of_slot.name] = of_slot
        else:
            of_slot, radii = named, (float(bound),) * len(slot.labels)
        for label, radius in zip(slot.labels, radii, strict=True):
            bounds[label] = radius
            frobenius[label] = frobenius_bound(of_slot, radius, min(rank, *slot.form.shape))
            shapes[label] = slot.form.shape
    if len(norms) > 1:
        raise AdapterError(
            f"adapters of a private merge must be bounded in one norm, got {' and '.join(sorted(norms))}"
        )
    ranks = [term.rank for slot in slots for term in slot.terms.values()]
    one_norm = named if bound is not None else next(iter(norms.values()))
    return PublicLayers(tuple(sources), tuple(slots), one_norm, bounds, frobenius, shapes, max(ranks))


_ELSE = "give a public adapter, which says what is expected, as reference"


def _rank(slot: Slot, count: int) -> int:
    """The rank of a layer, if all adapters have it with the same one."""
    if len(slot.terms) < count:
        raise AdapterError(
            "adapters of a private merge must adapt the same layers, got "
            f"{slot.full_name!r} in {len(slot.terms)} of {count}: {_ELSE}"
        )
    ranks = {term.rank for term in slot.terms.values()}
    if len(ranks) > 1:
        raise AdapterError(
            "adapters of a private merge must have the same ranks, got "
            f"{' and '.join(map(str, sorted(ranks)))} in layer {slot.full_name!r}: {_ELSE}"
        )
    return ranks.pop()


def _noted(slot: Slot) -> tuple[Norm, tuple[float, ...]]:
    """The norm and the bounds that all adapters note for a layer, the largest of nearly equal ones."""
    terms = list(slot.terms.values())
    norm, radii = _of_term(slot, terms[0])
    for term in terms[1:]:
        other, others = _of_term(slot, term)
        if other.name != norm.name or not all(
            abs(a - b) <= RADII_AGREE * max(a, b) for a, b in zip(radii, others, strict=True)
        ):
            raise AdapterError(
                "adapters of a private merge must note the same bounds, got "
                f"{norm.name} {radii} and {other.name} {others} for layer {slot.full_name!r}: {_ELSE}, or "
                "a bound"
            )
        radii = tuple(map(max, radii, others))
    return norm, radii


def _of_term(slot: Slot, term: Term) -> tuple[Norm, tuple[float, ...]]:
    noted = term.noted()
    if noted is None or len(noted[1]) != len(slot.labels):
        raise AdapterError(
            "a bound must be given where an adapter of a private merge notes none, got none for layer "
            f"{slot.full_name!r} in {slot.file}"
        )
    return noted
