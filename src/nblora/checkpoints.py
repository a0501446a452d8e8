"""Adapters on disk: reading ours, writing plain LoRA (MATH.md §5)."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nblora.bounds import Norm, parse_norm
from nblora.lowrank import LowRank
from nblora.parametrizations import FreeParameters
from nblora.tuner import NBLoraConfig, NBLoraType
from nblora.tuner.config import pattern_value
from nblora.tuner.layer import Method

PathLike = str | os.PathLike[str]

_PEFT_PREFIX = "base_model.model."
TOLERANCE = 1e-6
"""Relative excess over a bound that counts as rounding of float32 factors (float64 has far less)."""

_BOUNDS_KEY = "nblora_bounds"  # in the safetensors metadata of an exported LoRA


class AdapterError(ValueError):
    """An adapter that cannot be read or written; the message is one line that says where and why."""


@dataclass(frozen=True)
class BoundedLayer:
    """The update of one layer and the bound that it was promised to keep.

    Attributes:
        update: (m, n) as thin factors, in the precision that the model computes it in.
        norm: the norm that is bounded.
        bound: absolute, > 0 (0 for a zero base weight; NaN where no checkpoint told it).
    """

    update: LowRank
    norm: Norm
    bound: float


@dataclass(frozen=True)
class Adapter:
    """What a checkpoint or a model holds of one adapter.

    Attributes:
        config: its PEFT configuration.
        layers: by module name in the base model.
        others: further trained tensors (modules to save, biases) by checkpoint key, without PEFT's
            prefix.
    """

    config: NBLoraConfig | LoraConfig
    layers: dict[str, BoundedLayer]
    others: dict[str, Tensor]


def read_adapter(source: nn.Module | PathLike, adapter_name: str = "default") -> Adapter:
    """The bounded layers of a model, of a saved NB-LoRA adapter, or of an exported LoRA.

    Args:
        source: a model with NB-LoRA adapters (a PeftModel, or one with injected layers), a folder, or
            the name of a hub repository.
        adapter_name: which adapter of a model; a folder has one.

    Raises:
        AdapterError: if there is no such adapter, or files are missing, damaged or not ours. Pickled
            weights are never loaded.
    """
    if isinstance(source, nn.Module):
        return _from_model(source, adapter_name)
    config_file = _find(source, CONFIG_NAME)
    try:
        raw = json.loads(config_file.read_text())
        kind = raw["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{config_file} must be a PEFT adapter configuration: {_one_line(error)}"
        ) from error
    weights_file = _find(source, SAFETENSORS_WEIGHTS_NAME)
    tensors, metadata = _read_tensors(weights_file)
    config_class = {NBLoraType.NBLORA.value: NBLoraConfig, "LORA": LoraConfig}.get(str(kind))
    if config_class is None:
        raise AdapterError(f"{config_file} must be of an NB-LoRA adapter, got peft_type={kind!r}")
    try:
        config = config_class.from_peft_type(**raw)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{config_file} is not valid: {_one_line(error)}") from error
    try:
        if isinstance(config, NBLoraConfig):
            return _adapter(config, tensors)
        return _exported_adapter(config, tensors, metadata)
    except AdapterError as error:
        raise AdapterError(f"{weights_file}: {error}") from error


def _from_model(model: nn.Module, adapter_name: str) -> Adapter:
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model, keep_torch_compile=False)
    configs = getattr(model, "peft_config", {})
    ours = sorted(name for name, config in configs.items() if isinstance(config, NBLoraConfig))
    if adapter_name not in ours:
        raise AdapterError(
            f"the adapter must be one of the model's NB-LoRA adapters {ours}, got {adapter_name!r}"
        )
    # save_embedding_layers=False: else PEFT may ask the hub for the base model's vocabulary
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return _adapter(configs[adapter_name], state)


def _adapter(config: NBLoraConfig, tensors: Mapping[str, Tensor]) -> Adapter:
    """Sort the tensors of an NB-LoRA checkpoint into layers."""
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PEFT_PREFIX)
        if match := re.fullmatch(r"(.+)\.nblora_(in|out|angle|scale|radius)\.weight", name):
            parts.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[name] = tensor
    if not parts:
        raise AdapterError("an NB-LoRA adapter must have adapted layers, got none")
    method = Method.of(config)
    needed = {"in", "out", "radius"}
    needed |= {"angle"} if config.parametrization == "svd" else set()
    needed |= {"scale"} if method.norm.learnable else set()
    layers = {}
    for name, part in parts.items():
        if part.keys() != needed:
            raise AdapterError(f"layer {name!r} must have the tensors {sorted(needed)}, got {sorted(part)}")
        k = part["in"].shape[0]
        shapes = {key: tuple(tensor.shape) for key, tensor in part.items()}
        if (
            not all(tensor.is_floating_point() for tensor in part.values())
            or part["in"].ndim != 2
            or part["out"].ndim != 2
            or not 1 <= k <= min(part["in"].shape[1], part["out"].shape[1])
            or part["out"].shape[0] != k
            or shapes["radius"] != ()
            or any(shapes[key] != (k,) for key in needed & {"angle", "scale"})
        ):
            raise AdapterError(
                f"layer {name!r} must have floating-point tensors in (k, n), out (k, m), radius () and "
                f"angle and scale (k,) where there are any, with k <= min(m, n), got {shapes}"
            )
        free = FreeParameters(part["out"], part["in"], part.get("angle"), part.get("scale"))
        radius = part["radius"].detach()
        if radius < 0:
            raise AdapterError(f"the radius of layer {name!r} must not be negative, got {radius.item()!r}")
        with torch.no_grad():
            update = method.update(free, radius)
        # an absolute bound was promised in the configuration, and a radius above it breaks the promise
        bound = pattern_value(config.bound_pattern, name, config.bound)
        layers[name] = BoundedLayer(
            update, method.norm, radius.item() if config.bound_kind == "relative" else bound
        )
    return Adapter(config, layers, others)


def _exported_adapter(
    config: LoraConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Adapter:
    """The layers of a plain LoRA that `export_lora` wrote, with the bounds that it noted."""
    if _BOUNDS_KEY not in metadata:
        raise AdapterError("a plain LoRA has no bounds to certify, unless nblora exported it")
    if config.use_dora:
        raise AdapterError("a LoRA with bounds must not use DoRA, which rescales the whole weight")
    try:
        noted = json.loads(metadata[_BOUNDS_KEY])
        norm = parse_norm(noted["norm"])
        bounds = {name: float(bound) for name, bound in noted["bounds"].items()}
        if not bounds or not all(0 <= bound < math.inf for bound in bounds.values()):
            raise ValueError(f"bounds must be finite and not negative, got {bounds}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"the metadata entry {_BOUNDS_KEY!r} is damaged: {_one_line(error)}") from error
    layers, used = {}, set()
    for name, bound in bounds.items():
        keys = [f"{_PEFT_PREFIX}{name}.lora_{side}.weight" for side in "BA"]
        try:
            left, right = (tensors[key] for key in keys)
            product = LowRank(left.double() * _lora_scale(config, name), right.double())
        except (KeyError, ValueError, TypeError, ArithmeticError, re.error) as error:
            message = (
                f"layer {name!r} must have matching factors {keys}, ranks and alphas: {_one_line(error)}"
            )
            raise AdapterError(message) from error
        used.update(keys)
        layers[name] = BoundedLayer(product, norm, bound)
    extra = [key for key in tensors if ".lora_" in key and key not in used]
    if extra:
        raise AdapterError(f"every LoRA tensor must belong to a layer with a bound, got {extra[0]!r} too")
    others = {key.removeprefix(_PEFT_PREFIX): t for key, t in tensors.items() if key not in used}
    return Adapter(config, layers, others)


def _lora_scale(config: LoraConfig, name: str) -> float:
    r = pattern_value(config.rank_pattern, name, config.r)
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return float(alpha / (r**0.5 if config.use_rslora else r))


def export_lora(
    source: nn.Module | PathLike,
    out_dir: PathLike,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write an NB-LoRA adapter as a plain LoRA, which PEFT loads without this library.

    The update is the same matrix: no decomposition, no approximation. One rank for all layers (padded
    with zeros) and lora_alpha = r, as serving engines want it. After rounding to `dtype` the spectrum
    is measured in float64, and the factors are shrunk by the little that is needed until the bound
    holds for what is written. MATH.md §5.

    Args:
        source: a model with an NB-LoRA adapter, or a saved adapter.
        out_dir: folder to write; files of the same names in it are replaced.
        adapter_name: which adapter of a model.
        dtype: torch.float32 (the default), torch.bfloat16, torch.float16, torch.float64, or a name.

    Returns:
        out_dir.

    Raises:
        AdapterError: if the source cannot be read or is not NB-LoRA, an update is not finite, or the
            folder cannot be written. Nothing is half written.
    """
    dtype = _export_dtype(dtype)
    adapter = read_adapter(source, adapter_name)
    config = adapter.config
    if not isinstance(config, NBLoraConfig):
        raise AdapterError("the adapter to export must be NB-LoRA, got a plain LoRA")
    rank = max(layer.update.rank for layer in adapter.layers.values())
    tensors = {}
    for name, layer in adapter.layers.items():
        factors = _certified_rounding(layer, dtype, name)
        missing = rank - factors.rank
        tensors[f"{name}.lora_A.weight"] = nn.functional.pad(factors.right, (0, 0, 0, missing))
        tensors[f"{name}.lora_B.weight"] = nn.functional.pad(factors.left, (0, missing))
    tensors.update(adapter.others)
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
        bias="lora_only" if config.bias == "nblora_only" else config.bias,
        fan_in_fan_out=config.fan_in_fan_out,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    for field in ("target_modules", "exclude_modules"):
        if isinstance(names := getattr(lora, field), set):
            setattr(lora, field, sorted(names))  # a set would be written in another order each time
    first = next(iter(adapter.layers.values()))
    noted = {
        "norm": first.norm.name,
        "bounds": {n: layer.bound for n, layer in sorted(adapter.layers.items())},
    }
    with atomic_folder(Path(out_dir)) as folder:
        save_file(
            {_PEFT_PREFIX + key: value.detach().cpu().contiguous() for key, value in tensors.items()},
            folder / SAFETENSORS_WEIGHTS_NAME,
            metadata={"format": "pt", _BOUNDS_KEY: json.dumps(noted)},
        )
        lora.save_pretrained(folder)
    return Path(out_dir)


def _certified_rounding(layer: BoundedLayer, dtype: torch.dtype, name: str) -> LowRank:
    """Factors in `dtype` whose product, measured in float64, keeps the bound."""
    exact = layer.norm.value(layer.update.singular_values()).item()
    if not exact <= layer.bound * (1 + TOLERANCE):
        raise AdapterError(
            f"the update of layer {name!r} must be finite and keep its bound, got norm {exact!r} and bound "
            f"{layer.bound!r}"
        )
    left, right = layer.update.left.double(), layer.update.right.double()
    # equal norms of both sides round best; a zero side stays as it is
    ratio = left.norm(dim=-2) / right.norm(dim=-1)
    balance = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0).sqrt()
    left, right = left / balance, right * balance[:, None]
    shrink = 1.0
    while True:
        rounded = LowRank((left * shrink).to(dtype), right.to(dtype))
        value = layer.norm.value(rounded.singular_values()).item()
        if value <= layer.bound:
            return rounded
        if not value < math.inf:
            raise AdapterError(f"the update of layer {name!r} must be finite in {dtype}, got norm {value!r}")
        shrink *= layer.bound / value * (1 - torch.finfo(dtype).eps / 8)


def _export_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    named = {
        str(d).removeprefix("torch."): d
        for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    }
    if dtype is None:
        return torch.float32
    found = named.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype must be one of {', '.join(named)}, got dtype={dtype!r}")
    return found


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A fresh folder whose files move into `target` once all of them are written."""
    if target.exists() and not target.is_dir():
        raise AdapterError(f"the folder to write must not be a file, got {target}")
    made: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.parent / f".{target.name}-{secrets.token_hex(4)}"
        made.mkdir()
        yield made
        target.mkdir(exist_ok=True)
        files = list(made.iterdir())
        for file in files:  # before the first of them moves
            if (target / file.name).is_dir():
                raise IsADirectoryError(f"{file.name} is a folder there")
        for file in files:
            os.replace(file, target / file.name)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{target} cannot be written: {_one_line(error)}") from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


@contextmanager
def atomic_file(target: PathLike) -> Iterator[Path]:
    """A path to write to, which becomes `target` once the block has ended without an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}-{secrets.token_hex(4)}"
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _find(source: PathLike, file_name: str) -> Path:
    """A file of an adapter in a folder or a hub repository."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / file_name).is_file():
            raise AdapterError(f"the folder of an adapter must have {file_name}, got {folder} without it")
        return folder / file_name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise AdapterError(f"an adapter must be a folder or a hub repository, got {str(source)!r}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), file_name))
    except Exception as error:  # whatever the network raises
        raise AdapterError(
            f"{str(source)!r} is no folder here, and {file_name} cannot be had from a hub repository of "
            f"that name: {_one_line(error)}"
        ) from error


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors: dict[str, Any] = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file} must be an intact safetensors file: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
