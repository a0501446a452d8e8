"""Private merges of saved adapters: guarded, noised, charged to a ledger, written whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from nblora.bounds import Norm, Schatten
from nblora.checkpoints.base import BaseWeights
from nblora.checkpoints.clipping import Advance
from nblora.checkpoints.layouts import Layout
from nblora.checkpoints.storage import AdapterError, PathLike, atomic_folder, one_line
from nblora.checkpoints.writing import check_component, checked_layout, checked_rank, export_dtype, rounded
from nblora.lowrank import LowRank
from nblora.merging.guard import OnExcess, SentUpdate, guarded, of_slot, open_client
from nblora.merging.merge import placed
from nblora.merging.public import PublicLayers, describe, public_layers
from nblora.merging.report import PrivateMergeReport, Released
from nblora.merging.sources import check_paths, common_options, open_source
from nblora.merging.writing import BaseWriter, LoraWriter, names_in
from nblora.privacy import (
    Adjacency,
    BudgetExceeded,
    ClientReport,
    PrivacyLedger,
    PrivateMean,
    ReleaseLost,
    compose_subsampled,
    gaussian_mu,
    private_mean,
)
from nblora.privacy._checks import check_epsilon
from nblora.privacy.ledger import as_ledger
from nblora.privacy.sensitivity import largest_share


def merge_privately(
    adapters: Sequence[PathLike],
    out: PathLike,
    *,
    epsilon: float,
    delta: float,
    adjacency: Adjacency,
    n_total: int | None = None,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    base: PathLike | None = None,
    reference: PathLike | None = None,
    bound: float | None = None,
    norm: str | float = "frobenius",
    on_excess: OnExcess = "reject",
    project: bool = True,
    sampling_probability: float = 1.0,
    ledger: PrivacyLedger | PathLike | None = None,
    budget: float | None = None,
    layout: Layout = "peft",
    dtype: torch.dtype | str | None = None,
    component: str | None = None,
    rng: int | np.random.Generator | None = None,
    advance: Advance | None = None,
) -> PrivateMergeReport:
    """Write the mean of saved adapters with noise that hides each of them: an adapter, or base weights.

    `private_mean` over files. What is public must not come from clients. With a `reference`, an adapter that
    the server handed out, its layers, shapes, ranks and bounds are what is expected, and no client's file
    stops the merge: one that is missing, damaged, pickled, of another base, with other layers, shapes or
    tensors, or not finite counts as zero and is reported. Without one the configurations of all adapters are
    taken as public; they must be the same, and all files must be there.

    Args:
        adapters: one path for each client that was invited, NB-LoRA or LoRA as in `merge_adapters`, no names
            on the hub. The list is public, unless clients are sampled; what lies at the paths is not.
        out: folder to write, of an adapter or, new or empty, of a model.
        epsilon, delta: of the guarantee.
        adjacency: "add-remove" or "replace-one", see `nblora.privacy.sensitivity`.
        n_total: the fixed public denominator. The number of adapters if left out, but for sampled ones.
        weights: public numbers, one for each adapter, in place of `n_total`: the release is the weighted sum.
        rank: of the adapter to write. Without it base weights are written, with the dense update added.
        base: the folder of the base model, for base weights and for kohya's names. Without it the one that
            the reference, or all adapters, name, if it is here.
        reference: a public NB-LoRA adapter, or a LoRA that notes its bounds.
        bound: absolute, on every update, in place of the bounds that the reference or the adapters note.
        norm: of `bound`.
        on_excess: a client over a bound is counted as zero ("reject"), or its update is replaced by the
            nearest one inside ("project").
        project: project the release onto the ball in which the merged update lies, whose radius is noted as
            its bound. Costs no privacy.
        sampling_probability: of each client, as in `private_mean`; then the list of adapters is secret.
        ledger: a ledger or its path: the release is charged to it before the noise is drawn. One that does
            not exist is started.
        budget: epsilon of a ledger that is started, `epsilon` if left out.
        layout, component: as in `merge_adapters`.
        dtype: of the adapter, float32 if left out; base weights keep theirs.
        rng: as in `private_mean`: a seed is for studies only, and warns.
        advance: called with the steps done and their number, which is that of adapters and layers.

    Returns:
        What was released, what it cost, and, not to be published, what the guard found.

    Raises:
        AdapterError: if the reference, the base or the ledger cannot be used, adapters without a reference do
            not agree, or the folder cannot be written. Nothing is spent.
        BudgetExceeded: if the ledger cannot pay; nothing is spent and nothing written.
        ReleaseLost: if writing fails after the ledger was charged. The budget stays spent.
        ValueError, TypeError: for options outside their rules.
        ImportError: if dp-accounting is missing.

    Memory: the dense matrices of one layer in float64, a few times; base weights of one layer; of experts,
        the factors of one layer of all clients.
    """
    paths = _checked_paths(adapters, Path(out), base, reference)
    layout = checked_layout(layout)
    check_component(component)
    if weights is not None and not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights must be a list of plain numbers, which are public, got weights={weights!r}")
    if rank is not None:
        rank = checked_rank(rank)
    elif dtype is not None or layout != "peft":
        raise ValueError(
            "rank must be given for an adapter; layout and dtype are not for base weights, got rank=None, "
            f"layout={layout!r} and dtype={dtype!r}"
        )
    if n_total is None and weights is None:
        if sampling_probability != 1:
            raise ValueError("n_total must be given where clients are sampled: their number is secret")
        n_total = len(paths)
    if budget is not None and ledger is None:
        raise ValueError(f"budget is of a ledger that is started, got budget={budget!r} and ledger=None")
    public, clients = _opened(paths, reference, bound, norm, component, on_excess)
    base = _base(base, public, needed=rank is None)
    share = largest_share(n_total=n_total, weights=weights)
    # the sum of all weights, as far as the number of clients is public
    total = math.fsum(weights or ()) or (1.0 if sampling_probability != 1 else share * len(paths))
    radii = {label: radius * total for label, radius in public.bounds.items()}
    started = isinstance(ledger, (str, os.PathLike)) and not Path(ledger).exists()
    books: list[PrivacyLedger] = []

    def opened() -> PrivacyLedger:
        """So late that no ledger is started in vain."""
        assert ledger is not None
        try:
            books.append(_book(ledger, started, budget, epsilon, delta, adjacency, sampling_probability))
        except OSError as error:  # not of the folder to write
            raise AdapterError(f"the ledger {ledger} cannot be used: {one_line(error)}") from error
        return books[0]

    spent = False
    try:
        with atomic_folder(Path(out)) as folder:
            receiver: _Receiver
            if rank is None:
                receiver = _BaseReceiver(Path(out), folder, public, base)
            else:
                receiver = _LoraReceiver(
                    folder, public, base, layout, export_dtype(dtype), radii if project else None
                )
            mean = private_mean(
                [client if isinstance(client, SentUpdate) else None for client in clients],
                bounds=public.frobenius,
                shapes=public.shapes,
                adjacency=adjacency,
                epsilon=epsilon,
                delta=delta,
                n_total=n_total,
                weights=weights,
                on_excess=on_excess,
                sampling_probability=sampling_probability,
                rank=rank,
                project=(public.norm, radii) if project else None,
                dtype=torch.float64,
                rng=rng,
                ledger=None if ledger is None else opened,
                receive=receiver.receive,
                advance=advance,
            )
            spent = mean.release is not None
            receiver.finish()
    except Exception as error:
        if not spent:
            raise
        raise ReleaseLost(f"the release was not written, and its budget stays spent: {error}") from error
    book = books[0] if books else None
    found = [
        replace(client, index=report.index) if isinstance(client, ClientReport) else report
        for client, report in zip(clients, mean.clients, strict=True)
    ]
    return PrivateMergeReport(
        out=str(out),
        rank=receiver.rank,
        base=None if receiver.rank is not None else str(base),
        norm_name=public.norm.name,
        projected=project,
        epsilon=mean.epsilon,
        delta=mean.delta,
        mu=mean.mu,
        adjacency=mean.adjacency,
        adapters=None if sampling_probability != 1 and weights is None else len(paths),
        n_total=None if n_total is None else int(n_total),
        weights=None if weights is None else tuple(map(float, weights)),
        sampling_probability=mean.sampling_probability,
        secure=mean.secure,
        release=mean.release,
        ledger=None if book is None else str(book.path),
        budget=None if book is None else book.epsilon,
        started=started,
        spent=None if book is None else book.spent(),
        layers=tuple(_released(label, public, mean, receiver.written[label]) for label in public.bounds),
        clients=tuple(
            guarded(str(path), report, client, public)
            for path, report, client in zip(paths, found, clients, strict=True)
        ),
    )


def _checked_paths(adapters: Any, out: Path, base: PathLike | None, reference: PathLike | None) -> list[Path]:
    """The paths of the clients, each of them once and none of them `out`."""
    check_paths(adapters)
    paths = [Path(path) for path in adapters]
    # with a reference by name alone: what lies there, be it a link, must not stop the merge
    places = [_place(path if reference is not None else path.resolve()) for path in paths]
    for place, path in zip(places, paths):
        if places.count(place) > 1 or _folder(place) in set(places) - {place}:
            raise ValueError(f"each client must be listed once, for it would count twice, got {path} again")
    if reference is not None:
        places.append(_place(Path(reference).resolve()))
    read = {*places, *map(_folder, places)}
    if base is not None:
        read.add(_place(Path(base).resolve()))
    if not read.isdisjoint((_place(out), out.resolve())):
        raise AdapterError(f"the folder to write must be another one than those that are read, got {out}")
    return paths


def _place(path: Path) -> Path:
    """The folder of an adapter, or a file that stands alone, by its name."""
    path = Path(os.path.abspath(path))
    return path.parent if path.name == SAFETENSORS_WEIGHTS_NAME else path


def _folder(place: Path) -> Path:
    """In which folder a place is, by its name."""
    return place.parent if place.suffix == ".safetensors" else place


def _opened(
    paths: Sequence[Path],
    reference: PathLike | None,
    bound: float | None,
    norm: str | float,
    component: str | None,
    on_excess: OnExcess,
) -> tuple[PublicLayers, list[SentUpdate | ClientReport | None]]:
    """What is public, and the update of each client, or why there is none."""
    if reference is not None:
        public = public_layers(reference, bound=bound, norm=norm, component=component)
        return public, [open_client(path, public, component, on_excess) for path in paths]
    for path in paths:
        if not path.exists():
            raise AdapterError(f"every adapter must be there, unless there is a reference, got no {path}")
    sources = [open_source(path) for path in paths]
    public = describe(sources, bound=bound, norm=norm, component=component)
    clients: list[SentUpdate | ClientReport | None] = []
    for index in range(len(paths)):
        terms = {}
        for slot in public.slots:
            terms.update(of_slot(slot, slot.terms[index], public))
        clients.append(SentUpdate(terms, public, on_excess))
    return public, clients


def _base(base: PathLike | None, public: PublicLayers, *, needed: bool) -> Path | None:
    """The folder of the base model: the given one, or the one that configurations name."""
    if base is not None or not needed:
        return None if base is None else Path(base)
    names = (getattr(source.config, "base_model_name_or_path", None) for source in public.sources)
    named = next(filter(None, names), None)
    if not named or not Path(named).is_dir():
        raise ValueError(
            "rank must be given for an adapter, or for base weights a folder as base where the adapters name "
            f"none that is here, got rank=None, base=None and {named!r} in the configuration"
        )
    return Path(named)


def _book(
    ledger: PrivacyLedger | PathLike,
    started: bool,
    budget: float | None,
    epsilon: float,
    delta: float,
    adjacency: Adjacency,
    sampling_probability: float,
) -> PrivacyLedger:
    """The ledger, started where there is none and the release is within its budget."""
    if started and not isinstance(ledger, PrivacyLedger):
        if budget is not None and check_epsilon(budget) < epsilon:
            total = compose_subsampled(
                [gaussian_mu(epsilon=epsilon, delta=delta)],
                sampling_probability=sampling_probability,
                delta=delta,
                adjacency=adjacency,
            )
            if not total <= budget:
                raise BudgetExceeded(
                    f"budget must be at least that of this release, {total!r}, got {budget!r}"
                )
        return PrivacyLedger.create(
            ledger, epsilon=epsilon if budget is None else budget, delta=delta, adjacency=adjacency
        )
    book = as_ledger(ledger)
    if budget is not None and budget != book.epsilon:
        raise ValueError(
            f"budget must be left out or that of the ledger, {book.epsilon!r}, got budget={budget!r}"
        )
    return book


class _Receiver:
    """Takes the noised matrices of a release as they come, and writes each layer once it is whole."""

    rank: int | None = None

    def __init__(self, public: PublicLayers) -> None:
        self.public = public
        self.written: dict[str, float] = {}
        self._labels = iter([slot.labels for slot in public.slots])
        self._waiting: list[str] = []
        self._done: list[Any] = []

    def receive(self, label: str, matrix: LowRank | Tensor) -> None:
        """Take the matrix of the next label."""
        if not self._waiting:
            self._waiting = list(next(self._labels))
        assert self._waiting.pop(0) == label
        self._done.append(self.ready(label, matrix))
        if not self._waiting:
            done, self._done = self._done, []
            self.write(done)

    def ready(self, label: str, matrix: LowRank | Tensor) -> LowRank | Tensor:
        """The matrix as it is written; notes its norm."""
        raise NotImplementedError

    def write(self, matrices: list[Any]) -> None:
        """Write a layer."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write the rest."""
        raise NotImplementedError


class _LoraReceiver(_Receiver):
    def __init__(
        self,
        folder: Path,
        public: PublicLayers,
        base: Path | None,
        layout: Layout,
        dtype: torch.dtype,
        radii: dict[str, float] | None,
    ) -> None:
        super().__init__(public)
        names_in(public.slots, layout)  # refuses what is missing for names
        bases = {} if base is None else {c: BaseWeights(base, c) for c in {s.component for s in public.slots}}
        slots = [placed(slot, bases.get(slot.component), layout) for slot in public.slots]
        self.options = common_options(public.sources, slots) if layout == "peft" else None
        self.writer = LoraWriter(folder, slots, layout, dtype)
        self.radii, self.dtype = radii, dtype

    def ready(self, label: str, matrix: LowRank | Tensor) -> LowRank:
        assert isinstance(matrix, LowRank)
        bound = None if self.radii is None else self.radii[label]
        factors = rounded(matrix, self.public.norm, bound, self.dtype, label)
        self.written[label] = Schatten(2.0).value(factors.singular_values()).item()
        return factors

    def write(self, matrices: list[LowRank]) -> None:
        self.writer.add(matrices)

    def finish(self) -> None:
        norm: Norm | None = None if self.radii is None else self.public.norm
        bounds = [[(self.radii or {}).get(label, 0.0) for label in slot.labels] for slot in self.public.slots]
        self.writer.finish(norm, bounds, self.options)
        self.rank = self.writer.rank


class _BaseReceiver(_Receiver):
    def __init__(self, out: Path, folder: Path, public: PublicLayers, base: Path | None) -> None:
        super().__init__(public)
        assert base is not None
        if out.is_dir() and any(out.iterdir()):  # files of another model would be loaded in place of these
            raise AdapterError(f"the folder of a model to write must be new or empty, got {out}")
        names_in(public.slots, "peft")  # refuses several components
        transposed = any(source.config.fan_in_fan_out for source in public.sources if source.config)
        self.writer = BaseWriter(folder, base, public.slots, transposed)

    def ready(self, label: str, matrix: LowRank | Tensor) -> Tensor:
        assert isinstance(matrix, Tensor)
        self.written[label] = torch.linalg.vector_norm(matrix).item()
        return matrix

    def write(self, matrices: list[Tensor]) -> None:
        self.writer.add(matrices)

    def finish(self) -> None:
        self.writer.finish()


def _released(label: str, public: PublicLayers, mean: PrivateMean, written: float) -> Released:
    return Released(
        name=label,
        shape=public.shapes[label],
        bound=public.frobenius[label],
        sensitivity=mean.sensitivities[label],
        tau=mean.tau[label],
        written=written,
    )
