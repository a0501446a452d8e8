"""Weighted sums of saved adapters, written as one plain LoRA (MATH.md §5)."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils import merge_utils
from torch import Tensor, nn

from nblora.bounds import Norm, parse_norm
from nblora.checkpoints.base import BaseWeights
from nblora.checkpoints.clipping import Advance, BoundKind, check_bound
from nblora.checkpoints.layouts import Layout
from nblora.checkpoints.storage import AdapterError, PathLike, atomic_folder
from nblora.checkpoints.writing import (
    check_apart,
    check_component,
    checked_layout,
    checked_rank,
    export_dtype,
    rounded,
)
from nblora.lowrank import LowRank, ThinSVD
from nblora.merging.report import Merged, MergeReport
from nblora.merging.sources import Slot, check_paths, common_options, match, open_source, weighted_sum
from nblora.merging.writing import LoraWriter, names_in

MergeMethod = Literal["exact", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
Combine = Callable[[list[Tensor], Tensor, float], Tensor]

_PEFT_METHODS: dict[str, Combine] = {
    "ties": merge_utils.ties,
    "dare_linear": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": merge_utils.magnitude_prune,
}
_AVERAGING = ("ties", "dare_ties")  # divide by the number of adapters that agree, entry by entry


def merge_adapters(
    adapters: Sequence[PathLike],
    out: PathLike,
    *,
    weights: Sequence[float] | None = None,
    rank: int | float | None = None,
    bound: float | None = None,
    norm: str | float = "frobenius",
    bound_kind: BoundKind = "absolute",
    base: nn.Module | PathLike | None = None,
    layout: Layout = "peft",
    dtype: torch.dtype | str = "float32",
    method: MergeMethod = "exact",
    density: float | None = None,
    seed: int = 0,
    component: str | None = None,
    advance: Advance | None = None,
) -> MergeReport:
    """Write the mean, or a weighted sum, of the updates of saved adapters as one plain LoRA.

    The sum is of the matrices ΔW, not of their factors, and exact: factors are put beside each other, so
    ranks add up. `rank` truncates it by two thin QRs and one small SVD, `bound` then projects it onto a
    ball; an (m, n) matrix is formed only by the methods that are PEFT's. One layer is in memory at a
    time. MATH.md §5.

    Args:
        adapters: NB-LoRA folders, and LoRA of any layout that `open_lora` reads, mixed as wanted. They may
            differ in ranks and in the layers that they adapt; a layer that one lacks is zero there.
        out: folder to write; files of the same names in it are replaced.
        weights: one finite number for each adapter, negative ones too; the mean without them. For "ties" and
            "dare_ties", which divide by the number of adapters that agree, 1 for each.
        rank: an integer is the largest rank of a layer; a float in (0, 1] the share of the squared Frobenius
            norm of a layer that is kept, with the smallest rank that does. Without it all is kept ("exact"),
            or the largest rank that an adapter has there (the other methods, as in PEFT).
        bound: on every merged update, > 0; noted in the file, for `certify`.
        norm: in which updates are measured and bounded, as in `NBLoraConfig`.
        bound_kind: "absolute", or "relative": times the spectral norm of the layer's base weight.
        base: the base model, or its files: for a relative bound, and for names in kohya's layout, where "_"
            stands for "." too. Where it is given, every layer must fit it.
        layout: "peft", "diffusers" or "kohya", as in `export_lora`; one rank and lora_alpha = r everywhere.
        dtype: torch.float32, torch.bfloat16, torch.float16, torch.float64, or a name. A bound holds after
            rounding.
        method: "exact", or how PEFT combines dense updates: "ties", "dare_linear", "dare_ties",
            "magnitude_prune". Those keep no bound unless `bound` is given.
        density: share of entries that these methods keep, in (0, 1].
        seed: of the entries that DARE drops.
        component: which component of a pipeline is merged, and to which one adapters belong whose names tell
            none ("unet", "transformer", "text_encoder", ...).
        advance: called with the layers done and their number.

    Returns:
        What was merged, and what was cut.

    Raises:
        AdapterError: if an adapter cannot be read, has more than low-rank updates (modules_to_save, biases,
            DoRA, ...) or numbers that are not finite; if they are of different base models, or a layer has
            different shapes in them; or if the folder is one of theirs or cannot be written. Nothing is half
            written.
        ValueError: for options outside their rules.
    """
    check_paths(adapters)
    job = _Job(
        weights=_checked_weights(weights, len(adapters), method),
        rank=_checked_limit(rank),
        norm=_checked_norm(norm),
        bound=bound,
        bound_kind=bound_kind,
        dtype=export_dtype(dtype),
        combine=_checked_method(method, density, seed),
        density=density,
    )
    layout = checked_layout(layout)
    check_component(component)
    if bound is not None:
        check_bound(bound, bound_kind, base)
    sources = [open_source(path) for path in adapters]
    for path in adapters:
        check_apart(Path(path), Path(out))
    slots = match(sources, component)
    bases = {} if base is None else {c: BaseWeights(base, c) for c in {slot.component for slot in slots}}
    names_in(slots, layout)  # refuses what is missing for names
    slots = [placed(slot, bases.get(slot.component), layout) for slot in slots]
    options = common_options(sources, slots) if layout == "peft" else None
    layers: list[Merged] = []
    radii: list[Sequence[float]] = []
    with atomic_folder(Path(out)) as folder, _seeded(seed):
        writer = LoraWriter(folder, slots, layout, job.dtype)
        for index, slot in enumerate(slots):
            bounds = job.radii(slot, bases.get(slot.component))
            radii += [] if bounds is None else [bounds]
            layers += job.merge(slot, bounds, writer)
            if advance is not None:
                advance(index + 1, len(slots))
        writer.finish(job.norm, radii or None, options)
    return MergeReport(
        job.norm.name,
        method,
        tuple(source.path for source in sources),
        job.weights,
        writer.rank,
        tuple(layers),
    )


def placed(slot: Slot, weights: BaseWeights | None, layout: Layout) -> Slot:
    """The layer under its name in the base model, as far as the layout has to tell it."""
    found = None if weights is None else weights.module_name(slot.place)  # refuses what does not fit
    if not slot.flattened or layout == "kohya":
        return slot
    if found is None:
        raise ValueError(
            "names of kohya's layout, in which '_' stands for '.' too, need the base model, or its files, as "
            f"base, got base=None and {slot.name!r} in {slot.file}"
        )
    return replace(slot, name=found, flattened=False)


@dataclass(frozen=True)
class _Job:
    """What to do with each layer."""

    weights: tuple[float, ...]
    rank: int | float | None
    norm: Norm
    bound: float | None
    bound_kind: BoundKind
    dtype: torch.dtype
    combine: Combine | None
    density: float | None

    def radii(self, slot: Slot, weights: BaseWeights | None) -> list[float] | None:
        """The absolute bounds of a layer, one for each expert; None without a bound."""
        if self.bound is None:
            return None
        if self.bound_kind == "absolute":
            return [float(self.bound)] * len(slot.labels)
        assert weights is not None
        return [float(self.bound) * norm for norm in weights.norms(slot.place)]

    def merge(self, slot: Slot, radii: Sequence[float] | None, writer: LoraWriter) -> list[Merged]:
        """Combine the updates of one layer, and write it.

        A function of its own, so that the factors of the layer before are gone.
        """
        done, factors = [], []
        totals = weighted_sum(slot, self.weights) if self.combine is None else self._combined(slot)
        bounds: Sequence[float | None] = radii or [None] * len(slot.labels)
        for label, bound, total in zip(slot.labels, bounds, totals):
            _check_finite(total.left, label)
            before, reduced = self._reduced(slot, total, bound)
            factors.append(rounded(reduced, self.norm, bound, self.dtype, label))
            done.append(_merged(label, slot, factors[-1], bound, before, self.norm))
        writer.add(factors)
        return done

    def _combined(self, slot: Slot) -> Iterator[LowRank]:
        """The updates of a layer combined by PEFT, as dense matrices; one for each expert."""
        assert self.combine is not None
        assert self.density is not None
        weights = torch.tensor([self.weights[index] for index in slot.terms])
        updates = [term.read() for term in slot.terms.values()]
        for matrices in zip(*updates, strict=True):
            dense = [matrix.dense().float() for matrix in matrices]  # the precision of PEFT
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The density")  # of 1 is what was asked for
                merged = self.combine(dense, weights, self.density)
            del dense
            _check_finite(merged, slot.full_name)
            yield LowRank.from_dense(merged.double())

    def _reduced(self, slot: Slot, total: LowRank, bound: float | None) -> tuple[Tensor, LowRank]:
        """The singular values, and factors of the truncated and projected matrix."""
        svd = total.svd()
        sigma = svd.sigma
        limit = self.rank
        if limit is None and self.combine is not None:
            limit = max(term.rank for term in slot.terms.values())
        kept = sigma[: _kept(sigma, limit)]
        if bound is not None:
            kept = self.norm.project(kept, torch.tensor(bound, dtype=sigma.dtype))
        if total.rank <= len(sigma) == len(kept) and torch.equal(kept, sigma):
            return sigma, total  # as it is: the concatenation
        return sigma, _factors(svd, kept)


def _check_finite(merged: Tensor, label: str) -> None:
    if not bool(merged.isfinite().all()):
        raise AdapterError(f"the merged update of layer {label!r} must be finite, got NaN or infinity")


def _factors(svd: ThinSVD, kept: Tensor) -> LowRank:
    """The matrix with other singular values, those that are zero left out."""
    count = max(1, int((kept > 0).sum()))
    return LowRank(svd.u[:, :count] * kept[:count], svd.v[:, :count].mT)


def _kept(sigma: Tensor, limit: int | float | None) -> int:
    """How many singular values to keep: at most a number, or the least that hold a share of the energy."""
    if not isinstance(limit, float):
        return len(sigma) if limit is None else limit
    energy = sigma.square().cumsum(0)
    # squares of what is rounding itself vanish in the sum, so that a share of 1 leaves them out
    return int((energy >= limit * energy[-1]).int().argmax()) + 1


def _merged(
    label: str, slot: Slot, written: LowRank, bound: float | None, before: Tensor, norm: Norm
) -> Merged:
    after = written.singular_values()
    size = max(len(before), len(after))
    first, second = (nn.functional.pad(spectrum, (0, size - len(spectrum))) for spectrum in (before, after))
    whole = torch.linalg.vector_norm(first).item()
    removed = torch.linalg.vector_norm(first - second).item()
    return Merged(
        name=label,
        shape=slot.form.shape,
        adapters=len(slot.terms),
        rank=written.rank,
        bound=bound,
        before=norm.value(before).item(),
        after=norm.value(after).item(),
        removed=removed / whole if whole else 0.0,
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of PyTorch from a seed, and afterwards as if none had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _checked_weights(weights: Any, count: int, method: str) -> tuple[float, ...]:
    if weights is None:
        return (1.0 if method in _AVERAGING else 1 / count,) * count
    try:
        found = () if isinstance(weights, (str, bytes)) else tuple(map(float, weights))
    except (TypeError, ValueError):
        found = ()
    if len(found) != count or not all(map(math.isfinite, found)):
        raise ValueError(f"weights must be one finite number for each of {count} adapters, got {weights!r}")
    return found


def _checked_limit(rank: Any) -> int | float | None:
    if rank is None or not isinstance(rank, numbers.Real) or isinstance(rank, numbers.Integral):
        return None if rank is None else checked_rank(rank)
    if not 0 < float(rank) <= 1:
        raise ValueError(
            "rank must be an integer >= 1, or a float in (0, 1], a share of the squared Frobenius norm, "
            f"got rank={rank!r}"
        )
    return float(rank)


def _checked_norm(norm: Any) -> Norm:
    """A norm that the file can name."""
    return parse_norm(parse_norm(norm).name)


def _checked_method(method: Any, density: Any, seed: Any) -> Combine | None:
    if method != "exact" and method not in _PEFT_METHODS:
        raise ValueError(f"method must be one of exact, {', '.join(_PEFT_METHODS)}, got method={method!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer >= 0 and below 2^64, got seed={seed!r}")
    if method == "exact":
        if density is not None:
            raise ValueError(f"density must be None for the exact sum, got density={density!r}")
        return None
    number = isinstance(density, numbers.Real) and not isinstance(density, bool)
    if not number or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1] for method={method!r}, got density={density!r}")
    return _PEFT_METHODS[method]
