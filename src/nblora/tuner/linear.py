"""NB-LoRA on linear layers."""

from __future__ import annotations

from typing import Any

from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from nblora.lowrank import LowRank
from nblora.tuner.layer import NBLoraLayer
from nblora.tuner.quantized import weight_by_its_action


class NBLoraLinear(NBLoraLayer):
    """NB-LoRA on nn.Linear, transformers' Conv1D or a quantized linear layer."""

    def _check_base_layer(self, layer_name: str) -> None:
        if self.quantization_backend is not None:
            return
        m, n = self.out_in_features
        expected = (n, m) if self.fan_in_fan_out else (m, n)
        if tuple(self.weight.shape) != expected or not self.weight.is_floating_point():
            raise TypeError(
                f"layer {layer_name!r} must have a floating-point weight of shape {expected}, or one that is "
                f"quantized in a way that PEFT knows, got {tuple(self.weight.shape)} {self.weight.dtype}"
            )

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return isinstance(self.get_base_layer(), Conv1D)

    @property
    def out_in_features(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        if self.fan_in_fan_out:
            return base.nf, base.nx
        return base.out_features, base.in_features

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.fan_in_fan_out else weight

    def _dense(self, update: LowRank) -> Tensor:
        return self._matrix(update.dense())

    def _apply_update(self, update: LowRank, x: Tensor) -> Tensor:
        return update.apply(x)

    def _measurable_weight(self) -> Tensor:
        if not isinstance(self.quantization_backend, ForwardOnlyQuantizationBackend):
            return self.get_base_weight()
        base = self.get_base_layer()
        return weight_by_its_action(
            base, self.out_in_features[1], *self._get_base_layer_device_and_dtype(base)
        )
