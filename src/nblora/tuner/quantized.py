"""Quantized base layers: their weight as numbers, and exactly what it was after unmerging.

What PEFT has for them (`peft.utils.quantization_utils`) is used where it is right.
"""

from __future__ import annotations

from dataclasses import dataclass
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


# Note [4-bit weights on a CPU]
#
# Where the CPU has bfloat16 instructions, the first forward of a bitsandbytes 4-bit layer in eval mode packs
# its weight into another layout, from which it is dequantized to wrong numbers (bitsandbytes 0.50, so LoRA
# merges into a wrong weight there). Its state_dict(), also when only an adapter is saved, packs it back, but
# leaves the scales of blocks in the other order. So a packed weight is measured by its action, and scales
# left in the wrong order are put right.


def is_packed(base_layer: nn.Module) -> bool:
    """Whether a 4-bit weight is in the layout that can't be dequantized."""
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def put_scales_right(base_layer: nn.Module) -> None:
    """Undo what saving does to the scales of a 4-bit weight that was packed."""
    state: Any = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    scales = getattr(state, "absmax", None)
    if scales is not None and scales.ndim == 2 and not is_packed(base_layer):
        state.absmax = scales.T.reshape(-1).float()


@dataclass(frozen=True)
class KeptWeight:
    """A quantized weight as it was before merging, bit by bit.

    Changing the weight makes new tensors, so keeping the old ones is enough.
    """

    replaced: nn.Module | None  # the base layer, where it is replaced as a whole
    weight: Any
    attributes: dict[str, Any]  # of the weight: PEFT writes into those of the old one
    scales: dict[str, Any]  # of bitsandbytes' 8-bit layers

    @staticmethod
    def of(layer: Any) -> KeptWeight:
        if layer.quantization_backend.backend_name == "hqq":
            return KeptWeight(layer.base_layer, None, {}, {})
        base = layer.get_base_layer()
        state = getattr(base, "state", None)
        scales = {name: getattr(state, name) for name in ("CB", "SCB") if hasattr(state, name)}
        return KeptWeight(None, base.weight, dict(getattr(base.weight, "__dict__", {})), scales)

    def put_back(self, layer: Any) -> None:
        if self.replaced is not None:
            layer.base_layer = self.replaced
            return
        base = layer.get_base_layer()
        del base.weight  # torchao does not let a weight be assigned over another
        self.weight.__dict__.update(self.attributes)
        base.weight = self.weight
        for name, value in self.scales.items():
            setattr(base.state, name, value)


@torch.no_grad()
def weight_by_its_action(base: Any, n: int, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """The weight (out, n) of a linear layer that can't be dequantized: what it does to unit vectors."""
    floating = dtype if dtype is not None and dtype.is_floating_point else torch.float16
    columns: Tensor = base(torch.eye(n, device=device, dtype=floating)).float()
    bias = getattr(base, "bias", None)
    return (columns if bias is None else columns - bias.float()).mT
