"""Quantized base layers: their weight as numbers, and exactly what it was after unmerging.

What PEFT has for them (`peft.utils.quantization_utils`) is used where it is right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn


def quantization_backend(base_layer: nn.Module, get_apply_tensor_subclass: Any = None) -> Any:
    """PEFT's `QuantizationBackend` for a layer, None where it is not quantized.

    torchao weights without the recipe that quantized them can be trained on but not merged into.
    """
    backend = resolve_quantization_backend(
        base_layer, get_apply_tensor_subclass=get_apply_tensor_subclass or _no_recipe
    )
    if backend is not None and backend.backend_name == "torchao" and get_apply_tensor_subclass is None:
        backend.supports_merge = False
    return backend


def _no_recipe() -> None:
    raise NotImplementedError


def unpack(base_layer: nn.Module) -> None:
    """Undo bitsandbytes' repacking of 4-bit weights for CPUs, which it does in the first forward.

    Without it the weight is dequantized to wrong numbers. The next forward packs it again.
    """
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        base_layer.state_dict()  # unpacks in place: the public way to do it


def keep(layer: Any) -> Callable[[], None]:
    """What puts the quantized weight of a tuner layer back as it is now, bit by bit.

    Changing the weight makes new tensors, so keeping the old ones is enough.
    """
    base = layer.get_base_layer()
    if layer.quantization_backend.backend_name == "hqq":  # which replaces the whole layer
        return partial(setattr, layer, "base_layer", layer.base_layer)
    weight, state = base.weight, getattr(base, "state", None)
    # of bitsandbytes' 8-bit layers
    scales = {name: getattr(state, name) for name in ("CB", "SCB") if hasattr(state, name)}

    def restore() -> None:
        del base.weight  # torchao does not let a weight be assigned over another
        base.weight = weight
        for name, value in scales.items():
            setattr(state, name, value)

    return restore


@torch.no_grad()
def weight_by_its_action(base: Any, n: int, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """The weight (out, n) of a linear layer that can't be dequantized: what it does to unit vectors."""
    floating = dtype if dtype is not None and dtype.is_floating_point else torch.float16
    columns: Tensor = base(torch.eye(n, device=device, dtype=floating)).float()
    bias = getattr(base, "bias", None)
    return (columns if bias is None else columns - bias.float()).mT
