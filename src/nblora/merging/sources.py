"""Saved adapters as terms of sums: opened by their headers, and matched layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from peft import LoraConfig

from nblora.bounds import Norm, parse_norm
from nblora.checkpoints.adapter import BoundedFile, frozen_keys, is_ours, noted_bounds, open_nblora
from nblora.checkpoints.base import Place
from nblora.checkpoints.layouts import PEFT_PREFIX, Form, Layout, LoraLayer, adapted_parameters
from nblora.checkpoints.lora import FURTHER_OPTIONS, LoraFile, open_lora
from nblora.checkpoints.storage import AdapterError, PathLike
from nblora.checkpoints.tables import natural
from nblora.lowrank import LowRank
from nblora.tuner import NBLoraConfig

_SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Term:
    """One adapter's update of one layer.

    Attributes:
        component: of a pipeline, None where names have none.
        name: module name in the component; with kohya's layout "_" stands for "." too.
        form: what the update is.
        rank: k.
        parameters: full names of the parameters that are adapted there, where it is not a module's weight.
        read: reads scale B A, in float64, one for each expert.
        noted: reads the norm and the absolute bounds that the file notes, one for each expert; None where it
            notes none.
    """

    component: str | None
    name: str
    form: Form
    rank: int
    parameters: tuple[str, ...]
    read: Callable[[], list[LowRank]]
    noted: Callable[[], tuple[Norm, tuple[float, ...]] | None]


@dataclass(frozen=True)
class Source:
    """A saved adapter.

    Attributes:
        path: of its weights, for errors.
        layout: of the file.
        config: PEFT's, None for a file without one.
        terms: in the order of the file.
    """

    path: str
    layout: Layout
    config: NBLoraConfig | LoraConfig | None
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Slot:
    """A layer of the merged adapter.

    Attributes:
        component, name, form, parameters: as in `Term`.
        flattened: whether "_" in the name stands for "." too.
        terms: of the adapters that have the layer, by their number.
        file: one of them, for errors.
    """

    component: str | None
    name: str
    form: Form
    parameters: tuple[str, ...]
    flattened: bool
    terms: dict[int, Term]
    file: str

    @property
    def full_name(self) -> str:
        """The name with its component in front."""
        return self.name if self.component is None else f"{self.component}.{self.name}"

    @property
    def labels(self) -> list[str]:
        """How reports name the matrices."""
        if self.form.experts is None:
            return [self.full_name]
        return [f"{self.full_name}[{i}]" for i in range(self.form.experts)]

    @property
    def place(self) -> Place:
        """How the base weight is recognised."""
        parameters = self.parameters or (".weight",)
        return Place(
            self.name,
            self.form.shape,
            self.form.experts,
            frozenset(name.rpartition(".")[2] for name in parameters),
            self.flattened,
            self.file,
        )


def check_paths(adapters: Any) -> None:
    """Refuse what is no list of adapters."""
    if isinstance(adapters, (str, os.PathLike)) or not adapters:
        raise ValueError(f"adapters must be a sequence of one or more paths, got adapters={adapters!r}")


def open_source(path: PathLike) -> Source:
    """Read what a saved adapter says of itself, without its tensors.

    Raises:
        AdapterError: if it cannot be read, or has more than low-rank updates.
    """
    return _of_nblora(open_nblora(path)) if is_ours(path) else _of_lora(open_lora(path))


def _of_nblora(file: BoundedFile) -> Source:
    path = str(file.tensors.path)
    _refuse_others(path, file.others)
    terms = []
    for name in file.parts:
        if name.endswith(".base_layer.out_proj"):
            raise AdapterError(
                f"{path} must not adapt nn.MultiheadAttention, for PEFT's LoRA applies the update of its "
                f"output projection twice, got {name.removesuffix('.base_layer.out_proj')!r}"
            )
        form, rank = file.form(name)
        parameters = tuple(adapted_parameters(file.config.target_parameters, name))
        form = replace(form, experts=None) if form.experts == 1 else form
        terms.append(
            Term(
                None,
                name,
                form,
                rank,
                parameters,
                partial(_read_nblora, file, name),
                partial(_noted_nblora, file, name),
            )
        )
    return Source(path, "peft", file.config, tuple(terms))


def _noted_nblora(file: BoundedFile, name: str) -> tuple[Norm, tuple[float, ...]]:
    return parse_norm(file.config.norm), file.bounds(name)


def _read_nblora(file: BoundedFile, name: str) -> list[LowRank]:
    matrices = file.layer(name).matrices
    for matrix in matrices:
        if not bool(matrix.left.isfinite().all() & matrix.right.isfinite().all()):
            raise AdapterError(
                f"{file.tensors.path} must have finite updates, got NaN or infinity at {name!r}"
            )
    return [LowRank(matrix.left.double(), matrix.right.double()) for matrix in matrices]


def _of_lora(file: LoraFile) -> Source:
    path = str(file.tensors.path)
    for field in FURTHER_OPTIONS:
        if getattr(file.config, field, None):
            raise AdapterError(
                f"{file.config_file} must not use {field}, whose update is no product B A alone"
            )
    frozen = frozen_keys((layer.name for layer in file.layers), getattr(file.config, "bias", "none"))
    _refuse_others(path, (key for key in file.others if key.removeprefix(PEFT_PREFIX) not in frozen))
    noted = cache(partial(noted_bounds, file))
    terms = tuple(_lora_term(file, layer, noted) for layer in file.layers)
    return Source(path, file.layout, file.config, terms)


def _lora_term(
    file: LoraFile,
    layer: LoraLayer,
    all_noted: Callable[[], tuple[Norm, dict[str, tuple[float, ...]]] | None],
) -> Term:
    def noted() -> tuple[Norm, tuple[float, ...]] | None:
        found = all_noted()
        if found is None or layer.full_name not in found[1]:
            return None
        return found[0], found[1][layer.full_name]

    targets = None if file.config is None else file.config.target_parameters
    parameters = tuple(adapted_parameters(targets, layer.name))
    return Term(
        layer.component,
        layer.name,
        file.form(layer),
        layer.rank,
        parameters,
        lambda: list(file.updates(layer)),
        noted,
    )


def _refuse_others(path: str, others: Iterable[str]) -> None:
    for key in others:
        raise AdapterError(
            "an adapter to merge must have low-rank updates alone, no modules_to_save, biases or trained "
            f"tokens, got {key!r} in {path}"
        )


def match(sources: Sequence[Source], component: str | None) -> list[Slot]:
    """The layers that any of the adapters has.

    Args:
        component: the one to merge, which is also that of adapters whose names have none.

    Raises:
        AdapterError: if adapters are of different base models, or a layer has two shapes or kinds.
        ValueError: for a component that is not there, or is needed.
    """
    check_one_base(sources)
    flattened = any(source.layout == "kohya" for source in sources)
    found: dict[tuple[str | None, str], dict[int, Term]] = {}
    for index, terms in enumerate(_of_components(sources, component)):
        for term in terms:
            key = term.component, term.name.replace(".", "_") if flattened else term.name
            slot = found.setdefault(key, {})
            if index in slot:
                raise AdapterError(
                    "layers must have different names with '_' in place of '.', as in kohya's layout, got "
                    f"{slot[index].name!r} and {term.name!r} in {sources[index].path}"
                )
            slot[index] = term
    slots = [_slot(sources, terms) for terms in found.values()]
    return sorted(slots, key=lambda slot: natural(slot.full_name))


def _of_components(sources: Sequence[Source], component: str | None) -> list[list[Term]]:
    """The terms of each adapter, with the components that they are of."""
    tables = [list(source.terms) for source in sources]
    elsewhere = {
        term.component for source in sources if source.layout != "kohya" for term in source.terms
    } | {component}
    if (
        "transformer" in elsewhere and "unet" not in elsewhere
    ):  # kohya's scripts call every denoiser lora_unet
        for table, source in zip(tables, sources):
            if source.layout == "kohya":
                table[:] = [
                    replace(t, component="transformer") if t.component == "unet" else t for t in table
                ]
    named = {term.component for table in tables for term in table if term.component is not None}
    nameless = any(term.component is None for table in tables for term in table)
    if component is None and nameless and len(named) > 1:
        raise ValueError(
            f"component must be one of {sorted(named)} where the names of an adapter tell none, got "
            "component=None"
        )
    if component is not None and not nameless and component not in named:
        raise ValueError(f"component must be one of {sorted(named)}, got component={component!r}")
    one = component or (next(iter(named)) if len(named) == 1 else None)
    tables = [[replace(t, component=t.component or one) for t in table] for table in tables]
    return [[term for term in table if component in (None, term.component)] for table in tables]


def _slot(sources: Sequence[Source], terms: dict[int, Term]) -> Slot:
    (first, term), *_ = terms.items()
    names = {
        other.name: sources[index].path for index, other in terms.items() if sources[index].layout != "kohya"
    }
    if len(names) > 1:
        (a, file_a), (b, file_b), *_ = names.items()
        raise AdapterError(
            f"layers must have different names with '_' in place of '.', as in kohya's layout, got {a!r} in "
            f"{file_a} and {b!r} in {file_b}"
        )
    name = next(iter(names), term.name)
    for index, other in terms.items():
        rules: list[tuple[str, object, object]] = [
            ("shape", term.form, other.form),
            ("list of adapted parameters", [*term.parameters], [*other.parameters]),
        ]
        if term.parameters and other.parameters:
            rules.reverse()  # shapes then differ because parameters do
        for rule, mine, theirs in rules:
            if mine != theirs:
                raise AdapterError(
                    f"layer {name!r} must have one {rule} in all adapters of a merge, got {mine} in "
                    f"{sources[first].path} and {theirs} in {sources[index].path}"
                )
    return Slot(term.component, name, term.form, term.parameters, not names, terms, sources[first].path)


def check_one_base(sources: Sequence[Source]) -> None:
    """Refuse adapters that name different base models."""
    for field, rule in (
        ("base_model_name_or_path", "base model"),
        ("revision", "revision of the base model"),
    ):
        named: dict[Any, str] = {}
        for source in sources:
            if value := getattr(source.config, field, None):
                named.setdefault(value, source.path)
        if len(named) > 1:
            (a, file_a), (b, file_b), *_ = named.items()
            raise AdapterError(
                f"adapters to merge must be of one {rule}, got {a!r} in {file_a} and {b!r} in {file_b}"
            )


def common_options(sources: Sequence[Source], slots: Sequence[Slot]) -> dict[str, Any]:
    """The options of PEFT's configuration that say to which modules the merged adapter belongs.

    Raises:
        AdapterError: if no configuration can say it.
    """
    configs = [source.config for source in sources if source.config is not None]
    parameters = list(dict.fromkeys(name for c in configs for name in c.target_parameters or ()))
    for slot in slots:
        if tuple(adapted_parameters(parameters, slot.name)) != slot.parameters:
            raise AdapterError(
                "target_parameters of adapters to merge must not name parameters of each other's layers, "
                f"got {parameters} in all, and layer {slot.name!r} in {slot.file}"
            )
    return {
        **_selection(sources, slots),
        "target_parameters": parameters or None,
        "fan_in_fan_out": any(config.fan_in_fan_out for config in configs),
        "task_type": _only(config.task_type for config in configs),
        "base_model_name_or_path": _only(config.base_model_name_or_path for config in configs),
        "revision": _only(config.revision for config in configs),
    }


def _selection(sources: Sequence[Source], slots: Sequence[Slot]) -> dict[str, Any]:
    """Which modules are adapted; lists rather than expressions, which not every engine takes."""
    configs = [source.config for source in sources]
    first, *others = (
        {field: getattr(config, field, None) for field in ("target_modules", *_SELECTION)}
        for config in configs
    )
    if None not in configs and all(other == first for other in others):
        return first
    lists: list[Any] = [getattr(config, "target_modules", None) for config in configs]
    narrowed = any(getattr(config, field, None) for config in configs for field in _SELECTION)
    if not narrowed and all(isinstance(each, (list, set)) for each in lists):
        return {"target_modules": sorted({name for each in lists for name in each})}
    return {"target_modules": [slot.name for slot in slots if not slot.parameters] or None}


def _only(values: Iterable[Any]) -> Any:
    """The one value that there is beside None, None if there are several."""
    found = {value for value in values if value}
    return found.pop() if len(found) == 1 else None


def weighted_sum(slot: Slot, weights: Sequence[float]) -> list[LowRank]:
    """Σ weight · update as a concatenation of factors in float64, one for each expert."""
    columns: list[list[LowRank]] = [[] for _ in slot.labels]
    for index, term in slot.terms.items():
        if weights[index] == 0:
            continue
        for column, update in zip(columns, term.read(), strict=True):
            column.append(LowRank(update.left * weights[index], update.right))
    m, n = slot.form.shape
    zero = LowRank(torch.zeros(m, 1, dtype=torch.float64), torch.zeros(1, n, dtype=torch.float64))
    return [
        LowRank(torch.cat([u.left for u in column], dim=1), torch.cat([u.right for u in column]))
        if column
        else zero
        for column in columns
    ]
