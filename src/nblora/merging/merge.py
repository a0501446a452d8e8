"""Weighted sums of saved adapters, written as one plain LoRA (MATH.md §5)."""

from __future__ import annotations

import math
import numbers
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils import merge_utils
from safetensors.torch import save_file
from torch import Tensor, nn

from nblora.bounds import Norm, parse_norm
from nblora.checkpoints.base import BaseWeights
from nblora.checkpoints.clipping import Advance, BoundKind, check_bound
from nblora.checkpoints.layouts import Layout
from nblora.checkpoints.storage import AdapterError, PathLike, TensorFile, TensorWriter, atomic_folder
from nblora.checkpoints.writing import (
    FileNames,
    PeftNames,
    bounds_metadata,
    check_apart,
    check_component,
    checked_layout,
    checked_rank,
    export_dtype,
    exported_file,
    padded,
    plain_config,
    rounded,
)
from nblora.lowrank import LowRank, ThinSVD
from nblora.merging.report import Merged, MergeReport
from nblora.merging.sources import Slot, common_options, match, open_source, weighted_sum

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
    if isinstance(adapters, (str, os.PathLike)) or not adapters:
        raise ValueError(f"adapters must be a sequence of one or more paths, got adapters={adapters!r}")
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
    names = _names(slots, layout)
    bases = {} if base is None else {c: BaseWeights(base, c) for c in {slot.component for slot in slots}}
    slots = [_placed(slot, bases.get(slot.component), layout) for slot in slots]
    options = common_options(sources, slots) if layout == "peft" else None
    layers: list[Merged] = []
    radii: list[list[float] | None] = []
    with atomic_folder(Path(out)) as folder, _seeded(seed):
        parts = folder / ".parts"
        parts.mkdir()
        for index, slot in enumerate(slots):
            radii.append(job.radii(slot, bases.get(slot.component)))
            layers += job.merge(slot, radii[-1], _part(parts, index))
            if advance is not None:
                advance(index + 1, len(slots))
        file_rank = max(layer.rank for layer in layers)
        metadata = {"format": "pt"}
        if bound is not None:
            noted = {
                names[slot.component].noted(slot.name): bounds if slot.form.experts else bounds[0]
                for slot, bounds in zip(slots, radii)
                if bounds is not None
            }
            metadata |= bounds_metadata(job.norm, noted)
        _assemble(exported_file(folder, layout), parts, slots, names, file_rank, job.dtype, metadata)
        shutil.rmtree(parts)
        if options is not None:
            plain_config(file_rank, **options).save_pretrained(folder)
    return MergeReport(
        job.norm.name,
        method,
        tuple(source.path for source in sources),
        job.weights,
        file_rank,
        tuple(layers),
    )


Names = PeftNames | FileNames


def _names(slots: Sequence[Slot], layout: Layout) -> dict[str | None, Names]:
    """How the layout names the layers of each component."""
    components = sorted({slot.component or "" for slot in slots})
    if layout == "peft":
        if len(components) > 1:
            raise ValueError(f"component must be one of {components} in PEFT's layout, got component=None")
        return {name or None: PeftNames() for name in components}
    if "" in components:
        raise ValueError(
            "component must name the component of the pipeline (unet, transformer, text_encoder, ...) in the "
            f"layout {layout!r} where no adapter does, got component=None"
        )
    return {name: FileNames(layout, name) for name in components}


def _placed(slot: Slot, weights: BaseWeights | None, layout: Layout) -> Slot:
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


def _part(folder: Path, index: int) -> Path:
    return folder / f"{index}.safetensors"


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

    def merge(self, slot: Slot, radii: Sequence[float] | None, part: Path) -> list[Merged]:
        """Combine the updates of one layer, and leave the factors in a file of their own.

        A function of its own, so that the factors of the layer before are gone.
        """
        tensors: dict[str, Tensor] = {}
        done = []
        totals = weighted_sum(slot, self.weights) if self.combine is None else self._combined(slot)
        bounds: Sequence[float | None] = radii or [None] * len(slot.labels)
        for label, bound, total in zip(slot.labels, bounds, totals):
            _check_finite(total.left, label)
            before, factors = self._reduced(slot, total, bound)
            written = rounded(factors, self.norm, bound, self.dtype, label)
            done.append(_merged(label, slot, written, bound, before, self.norm))
            side = len(done)
            tensors |= {
                f"left.{side}": written.left.contiguous(),
                f"right.{side}": written.right.contiguous(),
            }
        save_file(tensors, part)
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


def _assemble(
    file: Path,
    parts: Path,
    slots: Sequence[Slot],
    names: dict[str | None, Names],
    rank: int,
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> None:
    """Write the layers into one file with one rank, reading one of them at a time."""
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for slot in slots:
        m, n = slot.form.shape
        empty = LowRank(*(torch.empty(shape, dtype=dtype, device="meta") for shape in ((m, rank), (rank, n))))
        tensors = names[slot.component].tensors(slot.name, slot.form, [empty] * len(slot.labels))
        if repeated := entries.keys() & tensors.keys():
            raise AdapterError(
                f"layers must have different names in the layout, got {min(repeated)!r} of {slot.name!r} and "
                "of another one"
            )
        entries |= {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    with TensorWriter(file, entries, metadata) as writer:
        for index, slot in enumerate(slots):
            _write_layer(writer, TensorFile(_part(parts, index)), slot, names[slot.component], rank)
            _part(parts, index).unlink()


def _write_layer(writer: TensorWriter, part: TensorFile, slot: Slot, names: Names, rank: int) -> None:
    factors = [
        padded(LowRank(part.read(f"left.{i}"), part.read(f"right.{i}")), rank)
        for i in range(1, len(slot.labels) + 1)
    ]
    for key, tensor in names.tensors(slot.name, slot.form, factors).items():
        writer.write(key, tensor)


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
        found = tuple(map(float, weights))
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
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got seed={seed!r}")
    if method == "exact":
        if density is not None:
            raise ValueError(f"density must be None for the exact sum, got density={density!r}")
        return None
    number = isinstance(density, numbers.Real) and not isinstance(density, bool)
    if not number or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1] for method={method!r}, got density={density!r}")
    return _PEFT_METHODS[method]
