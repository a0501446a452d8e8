"""LoRA files of any layout, opened without reading their tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from nblora.checkpoints.base import Place
from nblora.checkpoints.layouts import Form, Layout, LoraLayer, adapted_parameters, parse
from nblora.checkpoints.storage import AdapterError, PathLike, TensorFile, find_file, one_line, read_json
from nblora.lowrank import LowRank

DIFFUSERS_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# fields of LoraConfig under which the update of a layer is not scale B A
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
)
# starts of LoraConfig.init_lora_weights that change the base weight, most of them by the first B A
_CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")

# fields of LoraConfig that say more than which layers have which B A
FURTHER_OPTIONS = ("lora_bias", "layer_replication", "alora_invocation_tokens")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file of any layout.

    Attributes:
        tensors: the weights.
        layout: "peft", "diffusers" or "kohya".
        layers: in the order of the file.
        others: names of tensors that belong to no layer.
        config_file: PEFT's adapter_config.json, for that layout.
        config: what is in it.
    """

    tensors: TensorFile
    layout: Layout
    layers: tuple[LoraLayer, ...]
    others: tuple[str, ...]
    config_file: Path | None
    config: LoraConfig | None

    def factors(self, layer: LoraLayer) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """B (m, k) and A (k, n) of a layer in the precision of the file, one pair for each expert."""
        return layer.matrices(self.tensors.read(layer.up), self.tensors.read(layer.down))

    def form(self, layer: LoraLayer) -> Form:
        """What the update of a layer is, from the header alone."""
        kernel = self.tensors.entries[layer.down].shape[2:]
        return Form(layer.shape, layer.experts, kernel, "lora_embedding_" in layer.down)

    def place(self, layer: LoraLayer) -> Place:
        """How the base weight of a layer is recognised."""
        targets = () if self.config is None else self.config.target_parameters
        parameters = adapted_parameters(targets, layer.name) or [".weight"]
        return Place(
            layer.name,
            layer.shape,
            layer.experts,
            frozenset(name.rpartition(".")[2] for name in parameters),
            self.layout == "kohya",
            str(self.tensors.path),
        )

    def updates(self, layer: LoraLayer) -> Iterator[LowRank]:
        """scale B A of a layer in float64, one for each expert.

        Raises:
            AdapterError: for factors that are not finite.
        """
        for left, right in self.factors(layer):
            for key, factor in ((layer.up, left), (layer.down, right)):
                if not bool(factor.isfinite().all()):
                    raise AdapterError(f"{self.tensors.path} must have finite tensors, got {key!r}")
            yield LowRank(left.double() * layer.scale, right.double())


def locate(source: PathLike) -> tuple[Path, Path | None]:
    """The weights and PEFT's configuration (None without one) of a file, folder or hub repository.

    Raises:
        AdapterError: if there are none. Pickled weights are refused.
    """
    if not isinstance(source, str | os.PathLike):
        raise AdapterError(f"an adapter must be a file, a folder or a hub repository, got {source!r}")
    path = Path(source)
    if path.is_file():
        if path.suffix in _PICKLES:
            raise AdapterError(f"{path} must be a safetensors file; pickled weights are never loaded")
        config = path.parent / CONFIG_NAME
        return path, config if path.name == SAFETENSORS_WEIGHTS_NAME and config.is_file() else None
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        others = [
            file
            for file in sorted(path.glob("*.safetensors"))
            if file.is_file() and file.name != SAFETENSORS_WEIGHTS_NAME  # opening a pipe would wait for ever
        ]
        if path / DIFFUSERS_WEIGHTS_NAME in others:
            return path / DIFFUSERS_WEIGHTS_NAME, None
        if len(others) == 1 and not (path / SAFETENSORS_WEIGHTS_NAME).is_file():
            return others[0], None
    config_file = find_file(path if path.is_dir() else source, CONFIG_NAME)
    return find_file(path if path.is_dir() else source, SAFETENSORS_WEIGHTS_NAME), config_file


def open_lora(source: PathLike) -> LoraFile:
    """Read what a LoRA says of itself, without its tensors.

    Args:
        source: a safetensors file, a folder, or the name of a hub repository with a PEFT adapter.

    Raises:
        AdapterError: if files are missing, damaged, of another method than plain LoRA, or pickled.
    """
    weights_file, config_file = locate(source)
    if config_file is None:
        raw = None
    else:
        raw = read_json(config_file, "a PEFT adapter configuration")
        if raw.get("peft_type") != "LORA":
            raise AdapterError(f"{config_file} must be of a LoRA, got peft_type={raw.get('peft_type')!r}")
    return parse_lora(weights_file, config_file, raw)


def parse_lora(weights_file: Path, config_file: Path | None, raw: dict[str, Any] | None) -> LoraFile:
    """The LoRA in a weights file, with PEFT's configuration as it was read, or None."""
    config = None
    if config_file is not None and raw is not None:
        config = _checked_config(config_file, raw)
    tensors = TensorFile(weights_file)
    layout, layers, others = parse(tensors, raw)
    return LoraFile(tensors, layout, layers, others, config_file, config)


def _checked_config(config_file: Path, raw: dict[str, Any]) -> LoraConfig:
    missing = [field for field in ("r", "lora_alpha") if field not in raw]
    if missing:
        raise AdapterError(f"{config_file} must have r and lora_alpha, got none of {' and '.join(missing)}")
    try:
        config = LoraConfig.from_peft_type(**raw)
    except Exception as error:  # whatever PEFT raises for fields of other types
        raise AdapterError(f"{config_file} is not valid: {one_line(error)}") from error
    if isinstance(config.r, bool) or not isinstance(config.r, int) or config.r < 1:
        raise AdapterError(f"{config_file} must have an integer r >= 1, got r={config.r!r}")
    alpha = config.lora_alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{config_file} must have a finite number lora_alpha, got lora_alpha={alpha!r}")
    for field in _VARIANTS:
        if getattr(config, field, None):
            reason = "which rescales the whole weight" if field == "use_dora" else "another method"
            raise AdapterError(
                f"{config_file} must be of a plain LoRA, must not use {_label(field)}, {reason}"
            )
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        convertible = not start.startswith("loftq")  # which quantizes the base weight
        raise AdapterError(
            f"{config_file} must be of a LoRA on an unchanged base weight, got init_lora_weights={start!r}, "
            "which changes it" + convertible * ": save with path_initial_model_for_weight_conversion"
        )
    return config


def _label(field: str) -> str:
    return {"use_dora": "DoRA", "use_qalora": "QALoRA"}.get(field, field)
