"""The server's guard: what clients sent is measured, not believed, and nothing of it stops a merge.

Files of clients are untrusted. They are never unpickled and name nothing that is executed or fetched; what
their headers and configurations claim is compared with the public layers before a tensor is read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nblora.bounds import Schatten
from nblora.checkpoints.lora import locate
from nblora.checkpoints.storage import AdapterError, read_json
from nblora.contract import TOLERANCE
from nblora.lowrank import LowRank
from nblora.merging.public import PublicLayers
from nblora.merging.sources import Slot, Source, Term, match, open_source
from nblora.privacy import ClientReport
from nblora.privacy.release import Status

OnExcess = Literal["reject", "project"]

_PATTERNS = ("rank_pattern", "alpha_pattern", "bound_pattern")
_OF_EACH_LAYER = (*_PATTERNS, "target_parameters")  # each entry is tried on each layer
_LITERAL = re.compile(r"[\w.\-^$\\]*")  # nothing that repeats, so that a match takes no time


@dataclass(frozen=True)
class Guarded:
    """What the guard found of one adapter. Private: it depends on the data and is not noised.

    Attributes:
        path: as it was given.
        status: as in `ClientReport`.
        reason: in words, empty where accepted.
        norms: of each layer that could be measured, in the public norm.
        share: the largest norm over its bound, None where nothing could be measured.
        missing: layers that count as zero.
    """

    path: str
    status: Status
    reason: str
    norms: Mapping[str, float]
    share: float | None
    missing: tuple[str, ...]


class _OverBound(Exception):
    """An update outside the ball of the public norm."""


@dataclass
class SentUpdate(Mapping[str, LowRank]):
    """One client's update, read from its file when it is asked for, and measured then.

    In norms other than Frobenius, which `private_mean` measures itself.

    Args:
        terms: for each layer what to read, and which expert of it.
        public: the layers.
        on_excess: "reject" refuses to give a layer that is over its bound, "project" gives the nearest matrix
            inside.

    Attributes:
        norms: what was measured.
    """

    terms: Mapping[str, tuple[Term, int]]
    public: PublicLayers
    on_excess: OnExcess
    norms: dict[str, float] = field(default_factory=dict)
    _experts: tuple[Term, list[LowRank]] | None = None

    def __getitem__(self, label: str) -> LowRank:
        update = self._read(*self.terms[label])
        norm, bound = self.public.norm, self.public.bounds[label]
        if norm == Schatten(2.0):
            return update
        u, sigma, v = update.svd()
        self.norms[label] = norm.value(sigma).item()
        if self.norms[label] <= bound * (1 + TOLERANCE):
            return update
        if self.on_excess == "reject":
            raise _OverBound(over_bound({label: self.norms[label]}, self.public))
        return LowRank(u * norm.project(sigma, sigma.new_tensor(bound)), v.mT)

    def _read(self, term: Term, expert: int) -> LowRank:
        if term.form.experts is None:
            (update,) = term.read()
            return update
        if self._experts is None or self._experts[0] is not term:
            self._experts = term, term.read()  # all experts of a layer lie in one tensor
        return self._experts[1][expert]

    def __contains__(self, label: object) -> bool:
        return label in self.terms

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)


def over_bound(norms: Mapping[str, float], public: PublicLayers) -> str:
    """Which norms are over their bounds, in words; empty where none is."""
    over = [
        f"{norm:.6g} > {public.bounds[name]:.6g} in {name}"
        for name, norm in norms.items()
        if not norm <= public.bounds[name] * (1 + TOLERANCE)
    ]
    return f"{public.norm.name} norms must be at most the bounds, got {', '.join(over)}" if over else ""


def check_file(path: Path, public: PublicLayers, known: frozenset[str]) -> None:
    """Refuse a file that is none, or whose header or configuration is out of proportion.

    Args:
        known: names of layers and parameters in the reference's configuration; only they may be expressions.

    Raises:
        AdapterError: if it is refused.
    """
    if not (path.is_file() or path.is_dir()):  # also a name that the hub might have
        raise AdapterError(f"an adapter must be a file or a folder, got {path}")
    weights, config = locate(path)
    for place in (path, weights, config):  # to the adapter of another client, who would count twice
        if place is not None and place.is_symlink():
            raise AdapterError(f"an adapter must not be a symbolic link, got {place}")
    most = 2**20 + 2**12 * len(public.slots) + 2**8 * len(public.bounds)
    with weights.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    size = config.stat().st_size if config is not None else 0
    for what, found in (("header", header), ("configuration", size)):
        if found > most:
            raise AdapterError(f"the {what} of {path} must be of at most {most} bytes, got {found}")
    if config is None:
        return
    raw = read_json(config, "a PEFT adapter configuration")
    for name in _OF_EACH_LAYER:
        entries = raw.get(name) or {}
        if len(entries) > len(public.slots) + len(known):
            raise AdapterError(f"{config} must have no more {name} than layers, got {len(entries)}")
    for name in _PATTERNS:
        for key in raw.get(name) or {}:
            if key not in known and not _LITERAL.fullmatch(str(key)):
                raise AdapterError(
                    f"{config} must have names of layers, or the reference's expressions, as {name}, "
                    f"got {key!r}"
                )


def patterns_of(public: PublicLayers) -> frozenset[str]:
    """The names and expressions of layers and parameters in the configurations that are public."""
    return frozenset(
        key
        for source in public.sources
        for name in _OF_EACH_LAYER
        for key in getattr(source.config, name, None) or ()
    )


def open_client(
    path: Path, public: PublicLayers, component: str | None, on_excess: OnExcess
) -> SentUpdate | ClientReport | None:
    """A client's adapter as an update of the reference's layers.

    Returns:
        The update; None where there is no such path; or why the adapter was refused.
    """
    try:
        if not path.exists():
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of configurations, about which nothing can be done here
            check_file(path, public, patterns_of(public))
            terms = _matched(public, open_source(path), component)
        return SentUpdate(terms, public, on_excess)
    except Exception as error:  # Note [Nothing that clients do stops a release] in release.py
        return ClientReport(0, "refused", f"{type(error).__name__}: {error}", {})


def _matched(public: PublicLayers, source: Source, component: str | None) -> dict[str, tuple[Term, int]]:
    """What to read for each of the reference's layers.

    Raises:
        AdapterError: if the adapter has other layers, other shapes, a larger rank or another base model.
    """
    (reference,) = public.sources
    # by what reads them: names may have got a component
    known = {id(slot.terms[0].read): slot for slot in public.slots}
    terms: dict[str, tuple[Term, int]] = {}
    for slot in match([reference, source], component):
        if 0 not in slot.terms or id(slot.terms[0].read) not in known:
            raise AdapterError(
                f"layers must be among those of the reference, got {slot.full_name!r} in {source.path}"
            )
        if 1 in slot.terms:
            terms |= of_slot(known[id(slot.terms[0].read)], slot.terms[1], public)
    return terms


def of_slot(slot: Slot, term: Term, public: PublicLayers) -> dict[str, tuple[Term, int]]:
    """What to read for the matrices of a layer.

    Raises:
        AdapterError: if the rank is larger than any that is public.
    """
    if term.rank > public.rank:
        raise AdapterError(
            f"ranks must be at most {public.rank}, as in the reference, got {term.rank} in {slot.full_name!r}"
        )
    return {label: (term, expert) for expert, label in enumerate(slot.labels)}


def guarded(path: str, report: ClientReport, sent: object, public: PublicLayers) -> Guarded:
    """The report of one adapter, from what was found on opening it and by `private_mean`."""
    norms = dict(report.norms)
    status, reason = report.status, report.reason
    if isinstance(sent, SentUpdate) and public.norm != Schatten(2.0):
        norms = dict(sent.norms)
        over = over_bound(norms, public)
        if over and sent.on_excess == "reject":  # which ended the inspection
            status, reason = "rejected", over
        elif over and status == "accepted":
            status, reason = "projected", over
    shares = [
        norm / public.bounds[name] if public.bounds[name] else (0.0 if norm == 0 else float("inf"))
        for name, norm in norms.items()
    ]
    return Guarded(path, status, reason, norms, max(shares, default=None), report.missing)
