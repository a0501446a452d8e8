"""Plain LoRA from NB-LoRA, in the layouts that other programs read (MATH.md §5)."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from nblora.bounds import Norm
from nblora.checkpoints.adapter import BOUNDS_KEY, Adapter, BoundedLayer, read_adapter
from nblora.checkpoints.layouts import LAYOUTS, PEFT_PREFIX, Layout
from nblora.checkpoints.lora import DIFFUSERS_WEIGHTS_NAME
from nblora.checkpoints.storage import AdapterError, PathLike, atomic_folder
from nblora.contract import TOLERANCE
from nblora.lowrank import LowRank
from nblora.tuner import NBLoraConfig, NBLoraConv, nblora_layers

KOHYA_WEIGHTS_NAME = "lora.safetensors"
_KOHYA_PREFIXES = {
    "unet": "lora_unet",
    "transformer": "lora_unet",  # what kohya's scripts call every denoiser
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}


def export_lora(
    source: nn.Module | PathLike,
    out_dir: PathLike,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | str | None = None,
    layout: Layout = "peft",
    rank: int | None = None,
    component: str | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write an NB-LoRA adapter as a plain LoRA, which is read without this library.

    The update is the same matrix: no decomposition, no approximation. One rank for all layers (padded
    with zeros) and lora_alpha = r, as serving engines want it. After rounding to `dtype` the spectrum
    is measured in float64, and the factors are shrunk by the little that is needed until the bound
    holds for what is written. MATH.md §5.

    PEFT's LoRA has no convolutions with groups, dilation or another padding than zeros. Those of a model
    are refused; of a saved adapter nothing tells, so export it only where there are none.

    Args:
        source: a model with an NB-LoRA adapter, or a saved adapter.
        out_dir: folder to write; files of the same names in it are replaced.
        adapter_name: which adapter of a model.
        dtype: torch.float32 (the default), torch.bfloat16, torch.float16, torch.float64, or a name.
        layout: "peft" writes adapter_model.safetensors and adapter_config.json, "diffusers"
            pytorch_lora_weights.safetensors, "kohya" lora.safetensors.
        rank: of all layers; the largest of the adapter without it. A smaller one is an error unless every
            update has a rank as small.
        component: of the pipeline that the adapted model is, for the layouts of diffusers and kohya:
            "unet", "transformer", "text_encoder", ... Needed where the model does not tell.
        advance: called with the layers done and their number.

    Returns:
        out_dir.

    Raises:
        AdapterError: if the source cannot be read or is not NB-LoRA, an update is not finite or has a
            higher rank, two layers have one name in the layout, or the folder cannot be written. Nothing is
            half written.
        ValueError: for an unknown dtype, layout or component, or a rank that is no positive integer.
    """
    dtype = _export_dtype(dtype)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got layout={layout!r}")
    if rank is not None:
        rank = _checked_rank(rank)
    if component is not None and not re.fullmatch(r"\w+", component):
        raise ValueError(f"component must be a name without dots or slashes, got component={component!r}")
    adapter = read_adapter(source, adapter_name)
    if not isinstance(source, nn.Module):
        _check_apart(Path(source), Path(out_dir))
    config = adapter.config
    if not isinstance(config, NBLoraConfig):
        raise AdapterError("the adapter to export must be NB-LoRA, got a plain LoRA")
    _check_convertible(source, adapter_name, adapter)
    names: _PeftNames | _FileNames
    if layout == "peft":
        names = _PeftNames()
    else:
        if component is None:
            component = _component(source, config)
        names = _FileNames(layout, component)
        if adapter.others:
            raise AdapterError(
                f"the {layout} layout must be of LoRA factors alone, got {next(iter(adapter.others))!r} too"
            )
    if rank is None:
        rank = max(layer.update.rank for layer in adapter.layers.values())
    tensors: dict[str, Tensor] = {}
    for done, (name, layer) in enumerate(adapter.layers.items(), start=1):
        factors = [
            _padded(_certified_rounding(_of_rank(matrix, rank, label), layer.norm, bound, dtype, label), rank)
            for matrix, bound, label in zip(layer.matrices, layer.bounds, layer.labels(name), strict=True)
        ]
        named = names.tensors(name, layer, factors)
        if repeated := tensors.keys() & named.keys():
            raise AdapterError(
                f"layers must have different names in the {layout} layout, got {min(repeated)!r} of {name!r} "
                "and of another one"
            )
        tensors.update(named)
        advance(done, len(adapter.layers))
    metadata = {"format": "pt", BOUNDS_KEY: json.dumps(_noted(adapter, names))}
    with atomic_folder(Path(out_dir)) as folder:
        if layout == "peft":
            # copies, since tied modules to save share memory, which a file cannot
            tensors.update((PEFT_PREFIX + key, value.clone()) for key, value in adapter.others.items())
            _lora_config(config, rank).save_pretrained(folder)
        contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(contiguous, exported_file(folder, layout), metadata=metadata)
    return Path(out_dir)


def _checked_rank(rank: Any) -> int:
    """A Python int, also of NumPy's integers, which JSON cannot hold."""
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise ValueError(f"rank must be an integer >= 1, got rank={rank!r}")
    return int(rank)


def _check_apart(source: Path, out_dir: Path) -> None:
    """Refuse to replace the adapter that is exported, which can be trained further, and a LoRA cannot."""
    if not source.exists() or not out_dir.is_dir():
        return
    if (source if source.is_dir() else source.parent).samefile(out_dir):
        raise AdapterError(f"the folder to write must be another one than that of the adapter, got {out_dir}")


def _check_convertible(source: nn.Module | PathLike, adapter_name: str, adapter: Adapter) -> None:
    """Refuse layers that PEFT's LoRA would compute otherwise, as far as the source tells them."""
    if isinstance(source, nn.Module):
        for name, layer in nblora_layers(source, adapter_name).items():
            if isinstance(layer, NBLoraConv) and not layer.supports_lora_conversion(adapter_name):
                raise AdapterError(
                    "a convolution to export must have groups=1, dilation=1 and be padded with zeros, for "
                    f"PEFT's LoRA has no other, got {name!r}: merge it instead"
                )
    for name in adapter.layers:
        if name.endswith(".base_layer.out_proj"):
            raise AdapterError(
                "nn.MultiheadAttention cannot be exported, for PEFT's LoRA applies the update of its output "
                f"projection twice, got {name.removesuffix('.base_layer.out_proj')!r}: merge it instead"
            )


def exported_file(out_dir: PathLike, layout: Layout) -> Path:
    """The weights that `export_lora` writes."""
    names: dict[Layout, str] = {
        "peft": SAFETENSORS_WEIGHTS_NAME,
        "diffusers": DIFFUSERS_WEIGHTS_NAME,
        "kohya": KOHYA_WEIGHTS_NAME,
    }
    return Path(out_dir) / names[layout]


def _noted(adapter: Adapter, names: _PeftNames | _FileNames) -> dict[str, Any]:
    """What the metadata says of the bounds, for `certify`."""
    bounds = {
        names.noted(name): layer.bounds[0] if layer.update.left.ndim == 2 else list(layer.bounds)
        for name, layer in sorted(adapter.layers.items())
    }
    return {"norm": next(iter(adapter.layers.values())).norm.name, "bounds": bounds}


class _PeftNames:
    """Names and shapes of PEFT's layout."""

    def noted(self, name: str) -> str:
        return name

    def tensors(self, name: str, layer: BoundedLayer, factors: list[LowRank]) -> dict[str, Tensor]:
        down, up = _shaped(layer, factors)
        if layer.embedding:
            return {
                f"{PEFT_PREFIX}{name}.lora_embedding_A": down,
                f"{PEFT_PREFIX}{name}.lora_embedding_B": up,
            }
        return {f"{PEFT_PREFIX}{name}.lora_A.weight": down, f"{PEFT_PREFIX}{name}.lora_B.weight": up}


class _FileNames:
    """Names and shapes of diffusers' and kohya's layouts."""

    def __init__(self, layout: Layout, component: str) -> None:
        self.layout = layout
        self.component = component
        if layout == "kohya" and component not in _KOHYA_PREFIXES:
            raise ValueError(
                f"component must be one of {', '.join(_KOHYA_PREFIXES)} in kohya's layout, "
                f"got component={component!r}"
            )

    def noted(self, name: str) -> str:
        if self.layout == "diffusers":
            return f"{self.component}.{name}"
        component = {"lora_unet": "unet"}.get(_KOHYA_PREFIXES[self.component], self.component)
        return f"{component}.{name.replace('.', '_')}"

    def tensors(self, name: str, layer: BoundedLayer, factors: list[LowRank]) -> dict[str, Tensor]:
        if layer.embedding or len(factors) > 1:
            raise AdapterError(
                f"the {self.layout} layout must be of linear layers and convolutions, got {name!r}, "
                + ("an embedding" if layer.embedding else "of experts")
            )
        down, up = _shaped(layer, factors)
        if self.layout == "diffusers":
            key = f"{self.component}.{name}"
            return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        key = f"{_KOHYA_PREFIXES[self.component]}_{name.replace('.', '_')}"
        alpha = torch.tensor(float(up.shape[1]))  # in half precision 259 would be 260
        return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}


def _shaped(layer: BoundedLayer, factors: list[LowRank]) -> tuple[Tensor, Tensor]:
    """A and B as LoRA stores them."""
    down = torch.cat([factor.right for factor in factors])  # experts after each other
    up = torch.stack([factor.left for factor in factors], -1).flatten(1)  # and side by side
    if not layer.kernel:
        return down, up
    return down.reshape(len(down), -1, *layer.kernel), up.reshape(*up.shape, *(1 for _ in layer.kernel))


def _component(source: nn.Module | PathLike, config: NBLoraConfig) -> str:
    """Which component of a pipeline the adapted model is, from its class."""
    if isinstance(source, nn.Module):
        base = source.get_base_model() if isinstance(source, PeftModel) else source
        name = type(base).__name__
    else:
        mapping = config.auto_mapping
        name = str(mapping.get("base_model_class") if isinstance(mapping, dict) else mapping)
    if name.startswith("UNet"):
        return "unet"
    if "Transformer" in name and "Model" in name:
        return "transformer"
    raise ValueError(
        "component must name the component of the pipeline (unet, transformer, text_encoder, ...) where the "
        f"class of the model does not tell, got component=None and the class {name!r}"
    )


def _lora_config(config: NBLoraConfig, rank: int) -> LoraConfig:
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
        target_parameters=config.target_parameters,
        trainable_token_indices=config.trainable_token_indices,
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
    return lora


def _of_rank(update: LowRank, rank: int, name: str) -> LowRank:
    """The same matrix with at most `rank` factors."""
    if update.rank <= rank:
        return update
    u, sigma, v = LowRank(update.left.double(), update.right.double()).svd()
    rounding = 32 * torch.finfo(update.left.dtype).eps * sigma[0]
    if sigma[rank:].numel() and not bool(sigma[rank] <= rounding):
        raise AdapterError(
            f"rank must be at least the rank of every update, got rank={rank} for layer {name!r} with "
            f"{int((sigma > rounding).sum())} singular values"
        )
    return LowRank(u[:, :rank] * sigma[:rank], v[:, :rank].mT)


def _padded(factors: LowRank, rank: int) -> LowRank:
    missing = rank - factors.rank
    pad = nn.functional.pad
    return LowRank(pad(factors.left, (0, missing)), pad(factors.right, (0, 0, 0, missing)))


def _certified_rounding(update: LowRank, norm: Norm, bound: float, dtype: torch.dtype, name: str) -> LowRank:
    """Factors in `dtype` whose product, measured in float64, keeps the bound."""
    exact = norm.value(update.singular_values()).item()
    if not exact <= bound * (1 + TOLERANCE):
        raise AdapterError(
            f"the update of layer {name!r} must be finite and keep its bound, got norm {exact!r} and bound "
            f"{bound!r}"
        )
    left, right = update.left.double(), update.right.double()
    # equal norms of both sides round best; a zero side stays as it is
    ratio = left.norm(dim=-2) / right.norm(dim=-1)
    balance = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0).sqrt()
    left, right = left / balance, right * balance[:, None]
    shrink = 1.0
    while True:
        rounded = LowRank((left * shrink).to(dtype), right.to(dtype))
        value = norm.value(rounded.singular_values()).item()
        if value <= bound:
            return rounded
        if not value < math.inf:
            raise AdapterError(f"the update of layer {name!r} must be finite in {dtype}, got norm {value!r}")
        shrink *= bound / value * (1 - torch.finfo(dtype).eps / 8)


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
