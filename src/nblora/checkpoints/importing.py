"""NB-LoRA from trained LoRA, to be trained further (MATH.md §5)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from nblora.checkpoints.base import BaseWeights
from nblora.checkpoints.clipping import Advance, BoundKind, Cut, CutReport, Radii, check_bound, cut
from nblora.checkpoints.layouts import PEFT_PREFIX, LoraLayer, adapted_parameters
from nblora.checkpoints.lora import FURTHER_OPTIONS, LoraFile, open_lora
from nblora.checkpoints.storage import AdapterError, PathLike, atomic_folder
from nblora.lowrank import LowRank
from nblora.parametrizations import FreeParameters, Parametrization
from nblora.tuner import NBLoraConfig
from nblora.tuner.layer import rounded_down
from nblora.tuner.weights import Method

_KEPT_OPTIONS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "fan_in_fan_out",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
)


def import_lora(
    source: PathLike,
    out_dir: PathLike,
    *,
    norm: str | float = "frobenius",
    bound: float,
    bound_kind: BoundKind = "relative",
    base: nn.Module | PathLike | None = None,
    parametrization: Parametrization = "joint",
    temperature: float = 1.0,
    component: str | None = None,
    advance: Advance = lambda done, total: None,
) -> CutReport:
    """Write a trained LoRA as an NB-LoRA adapter, which loads with PEFT and continues training.

    An update inside its ball is the same, up to rounding in float32. One outside is replaced by the
    nearest one inside: its singular values are projected, its singular vectors stay.

    Args:
        source: a safetensors file of any layout, a folder, or a hub repository with a PEFT adapter.
        out_dir: folder to write; files of the same names in it are replaced.
        norm, bound, bound_kind, parametrization, temperature: as in `NBLoraConfig`.
        base: the base model, or its files: for a relative bound, and for names in kohya's layout, where
            "_" stands for "." too.
        component: which component of a pipeline, where the file has several ("unet", "text_encoder", ...).
        advance: called with the layers done and their number.

    Returns:
        What was cut.

    Raises:
        AdapterError: if files are missing, damaged, pickled, of another method (DoRA rescales the whole
            weight, which no bounded update does) or of another base model, or the folder cannot be written.
        ValueError: for options outside their rules.
    """
    check_bound(bound, bound_kind, base)
    file = _of_component(open_lora(source), component)
    r = _usual_rank(file)
    radii = Radii(file, bound, bound_kind, base)
    weights = radii.bases.get(file.layers[0].component)
    if weights is None and base is not None:
        weights = BaseWeights(base, file.layers[0].component)
    names = _module_names(file, weights)
    config = NBLoraConfig(
        r=r,
        norm=norm,
        bound=bound,
        bound_kind=bound_kind,
        parametrization=parametrization,
        temperature=temperature,
        rank_pattern={
            _pattern(file, name): layer.rank for name, layer in zip(names, file.layers) if layer.rank != r
        },
        **_kept_options(file, names),
    )
    config.inference_mode = True
    method = Method.of(config)
    tensors: dict[str, Tensor] = {}
    cuts: list[Cut] = []
    for index, (name, layer) in enumerate(zip(names, file.layers)):
        free, radius, layer_cuts = _imported(file, layer, radii.of(index), method)
        tensors.update(_tensors(file, layer, name, free, radius))
        cuts += layer_cuts
        advance(index + 1, len(file.layers))
    for key in file.others:
        tensors[PEFT_PREFIX + key.removeprefix(PEFT_PREFIX)] = file.tensors.read(key)
    with atomic_folder(Path(out_dir)) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(folder)
    return CutReport(method.norm.name, tuple(cuts), file.others)


def _of_component(file: LoraFile, component: str | None) -> LoraFile:
    """The layers of one component of a pipeline."""
    components = sorted({layer.component or "" for layer in file.layers})
    if component is None and len(components) > 1:
        raise ValueError(f"component must be one of {components}, of which {file.tensors.path} has layers")
    if component is not None and component not in components:
        raise ValueError(f"component must be one of {components}, got component={component!r}")
    if file.layout != "peft" and file.others:
        raise AdapterError(f"{file.tensors.path} must have LoRA factors alone, got {file.others[0]!r} too")
    chosen = components[0] if component is None else component
    layers = tuple(layer for layer in file.layers if (layer.component or "") == chosen)
    return LoraFile(file.tensors, file.layout, layers, file.others, file.config_file, file.config)


def _usual_rank(file: LoraFile) -> int:
    """The rank that needs no patterns: the most common one of parameters, on which PEFT warns of patterns."""
    targets = None if file.config is None else file.config.target_parameters
    parameters = [layer for layer in file.layers if adapted_parameters(targets, layer.name)]
    return Counter(layer.rank for layer in parameters or file.layers).most_common(1)[0][0]


def _module_names(file: LoraFile, weights: BaseWeights | None) -> list[str]:
    """Names of the adapted modules in the base model."""
    if file.layout != "kohya":
        if weights is not None:
            for layer in file.layers:
                weights.module_name(file.place(layer))  # refuses what does not fit
        return [layer.name for layer in file.layers]
    if weights is None:
        raise ValueError(
            "kohya's layout, in which '_' stands for '.' too, needs the base model, or its files, as base, "
            "got base=None"
        )
    return [weights.module_name(file.place(layer)) for layer in file.layers]


def _pattern(file: LoraFile, name: str) -> str:
    """A pattern for one layer; anchored, since PEFT lets patterns match the end of a name too."""
    if file.config is not None and adapted_parameters(file.config.target_parameters, name):
        return rf"^{re.escape(name.replace('.base_layer', ''))}\.\w+"
    return f"^{re.escape(name)}"


def _kept_options(file: LoraFile, names: Iterable[str]) -> dict[str, Any]:
    """Options of the configuration that have nothing to do with the method."""
    lora = file.config
    if lora is None:
        return {"target_modules": "|".join(map(re.escape, names))}
    for field in FURTHER_OPTIONS:
        if getattr(lora, field, None):
            raise AdapterError(f"{file.config_file} must not use {field}, which NB-LoRA does not have")
    options = {field: getattr(lora, field) for field in _KEPT_OPTIONS}
    bias = "nblora_only" if lora.bias == "lora_only" else lora.bias
    return options | {"bias": bias, "dropout": lora.lora_dropout}


def _imported(
    file: LoraFile, layer: LoraLayer, bounds: list[float], method: Method
) -> tuple[FreeParameters, Tensor, list[Cut]]:
    """Free parameters in float32 of a layer's projected update, their radius, and what was cut."""
    updates = list(file.updates(layer))
    update = LowRank(torch.stack([u.left for u in updates]), torch.stack([u.right for u in updates]))
    radius = rounded_down(torch.tensor(bounds, dtype=torch.float64), torch.float32)
    u, sigma, v = update.svd()
    projected = method.norm.project(sigma, radius.to(sigma))
    free = method.pull_back(LowRank(u * projected[..., None, :], v.mT), layer.rank, radius.to(sigma))
    free = free.map(Tensor.float)
    written = method.update(free, radius).singular_values()
    cuts = [
        cut(label, layer.shape, layer.rank, bound, (before, after[: len(before)]), method.norm)
        for label, bound, before, after in zip(layer.labels, bounds, sigma, written, strict=True)
    ]
    if layer.experts is None:
        return free.map(lambda tensor: tensor[0]), radius[0], cuts
    return free, radius, cuts


def _tensors(
    file: LoraFile, layer: LoraLayer, name: str, free: FreeParameters, radius: Tensor
) -> dict[str, Tensor]:
    """The tensors of an NB-LoRA checkpoint."""
    embedding = "embedding_" if "lora_embedding_" in layer.down else ""
    kernel = file.tensors.entries[layer.down].shape[2:]
    into = free.into.reshape(free.into.shape[0], -1, *kernel) if kernel else free.into
    parts = {
        f"{embedding}in": into,
        f"{embedding}out": free.out,
        "angle": None if free.angle is None else free.angle[..., None],
        "scale": None if free.logits is None else free.logits[..., None],
        "radius": radius,
    }
    return {
        f"{PEFT_PREFIX}{name}.nblora_{part}.weight": tensor.contiguous().clone()
        for part, tensor in parts.items()
        if tensor is not None
    }
