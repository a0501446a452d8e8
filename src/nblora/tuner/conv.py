"""NB-LoRA on convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nblora.lowrank import LowRank
from nblora.tuner.layer import NBLoraLayer


class NBLoraConv(NBLoraLayer):
    """NB-LoRA on nn.Conv1d, nn.Conv2d or nn.Conv3d.

    What is bounded is the weight reshaped to (out_channels, in_channels / groups · kernel size): one row
    for each output channel, which acts on one patch of the input. The update of a patch so keeps the
    bound, and that of the whole image at most √(number of patches that a pixel is in) times as much.
    """

    def _check_base_layer(self, layer_name: str) -> None:
        if not self.weight.is_floating_point():
            raise TypeError(
                f"convolution {layer_name!r} must have a floating-point weight, got {self.weight.dtype}"
            )

    @property
    def out_in_features(self) -> tuple[int, int]:
        shape = self.weight.shape
        return shape[0], shape[1:].numel()

    def _in_shape(self, k: int) -> tuple[int, ...]:
        return (k, *self.weight.shape[1:])

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _dense(self, update: LowRank) -> Tensor:
        return update.dense().reshape(self.weight.shape)

    def _apply_update(self, update: LowRank, x: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        left, right = update.left, update.right
        into = right.reshape(self._in_shape(update.rank))
        out = left.reshape(*left.shape, *(1,) * (into.ndim - 2))
        # every group reads its own channels through the same `into`
        hidden = base._conv_forward(x, into.repeat(base.groups, *(1,) * (into.ndim - 1)), None)
        convolve = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}[into.ndim]
        return convolve(hidden, out, groups=base.groups)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's LoRA has other convolutions where there are groups, dilation or another padding mode."""
        base: Any = self.get_base_layer()
        return base.groups == 1 and base.padding_mode == "zeros" and set(base.dilation) == {1}
