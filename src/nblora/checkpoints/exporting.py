"""Plain LoRA from NB-LoRA, in the layouts that other programs read (MATH.md §5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from nblora.checkpoints.adapter import Adapter, read_adapter
from nblora.checkpoints.layouts import PEFT_PREFIX, Layout
from nblora.checkpoints.storage import AdapterError, PathLike, atomic_folder
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
from nblora.lowrank import LowRank
from nblora.tuner import NBLoraConfig, NBLoraConv, nblora_layers


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
    dtype = export_dtype(dtype)
    layout = checked_layout(layout)
    if rank is not None:
        rank = checked_rank(rank)
    check_component(component)
    adapter = read_adapter(source, adapter_name)
    if not isinstance(source, nn.Module):
        check_apart(Path(source), Path(out_dir))
    config = adapter.config
    if not isinstance(config, NBLoraConfig):
        raise AdapterError("the adapter to export must be NB-LoRA, got a plain LoRA")
    _check_convertible(source, adapter_name, adapter)
    names: PeftNames | FileNames
    if layout == "peft":
        names = PeftNames()
    else:
        if component is None:
            component = _component(source, config)
        names = FileNames(layout, component)
        if adapter.others:
            raise AdapterError(
                f"the {layout} layout must be of LoRA factors alone, got {next(iter(adapter.others))!r} too"
            )
    if rank is None:
        rank = max(layer.update.rank for layer in adapter.layers.values())
    tensors: dict[str, Tensor] = {}
    for done, (name, layer) in enumerate(adapter.layers.items(), start=1):
        factors = [
            padded(rounded(_of_rank(matrix, rank, label), layer.norm, bound, dtype, label), rank)
            for matrix, bound, label in zip(layer.matrices, layer.bounds, layer.labels(name), strict=True)
        ]
        named = names.tensors(name, layer.form, factors)
        if repeated := tensors.keys() & named.keys():
            raise AdapterError(
                f"layers must have different names in the {layout} layout, got {min(repeated)!r} of {name!r} "
                "and of another one"
            )
        tensors.update(named)
        advance(done, len(adapter.layers))
    bounds = {
        names.noted(name): layer.bounds[0] if layer.update.left.ndim == 2 else layer.bounds
        for name, layer in adapter.layers.items()
    }
    metadata = {"format": "pt"} | bounds_metadata(next(iter(adapter.layers.values())).norm, bounds)
    with atomic_folder(Path(out_dir)) as folder:
        if layout == "peft":
            # copies, since tied modules to save share memory, which a file cannot
            tensors.update((PEFT_PREFIX + key, value.clone()) for key, value in adapter.others.items())
            _lora_config(config, rank).save_pretrained(folder)
        contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(contiguous, exported_file(folder, layout), metadata=metadata)
    return Path(out_dir)


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
    return plain_config(
        rank,
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
    )


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
