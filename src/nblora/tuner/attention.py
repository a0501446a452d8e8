"""NB-LoRA on PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from nblora.lowrank import LowRank
from nblora.tuner.config import NBLoraConfig, pattern_value
from nblora.tuner.layer import NBLoraLayer
from nblora.tuner.linear import NBLoraLinear
from nblora.tuner.parameter import call_with, one_at_a_time


class NBLoraMultiheadAttention(NBLoraLayer):
    """NB-LoRA on nn.MultiheadAttention: its packed projections (3 · embed_dim, embed_dim) and its output's.

    Both have an update and a bound of their own. The attention reads its weights without calling layers, so
    while it runs they are replaced by the adapted ones, as by `ParamWrapper`.
    """

    base_name = "in_proj_weight"
    # PyTorch's encoder layers would else skip this module in eval mode and compute with the base weights
    _qkv_same_embed_dim = False

    def _check_base_layer(self, layer_name: str) -> None:
        base: Any = self.get_base_layer()
        if not base._qkv_same_embed_dim:
            raise TypeError(
                f"attention {layer_name!r} must have keys and values of its embedding's dimension, got "
                f"embed_dim={base.embed_dim}, kdim={base.kdim} and vdim={base.vdim}"
            )

    def _check_options(self, config: NBLoraConfig, layer_name: str) -> None:
        if config.dropout > 0:
            raise ValueError(
                "dropout must be 0 for nn.MultiheadAttention, whose inputs are shared with the base weight, "
                f"got dropout={config.dropout} for {layer_name!r}"
            )

    def update_layer(
        self, adapter_name: str, *, r: int, bound: float, config: NBLoraConfig, layer_name: str, **more: Any
    ) -> None:
        super().update_layer(adapter_name, r=r, bound=bound, config=config, layer_name=layer_name, **more)
        base: Any = self.get_base_layer()
        options: dict[str, Any] = {
            "r": pattern_value(config.rank_pattern, f"{layer_name}.out_proj", r),
            "bound": pattern_value(config.bound_pattern, f"{layer_name}.out_proj", bound),
            "config": config,
            "layer_name": f"{layer_name}.out_proj",
            **more,
        }
        if isinstance(base.out_proj, NBLoraLinear):
            base.out_proj.update_layer(adapter_name, **options)
        else:
            base.out_proj = NBLoraLinear(base.out_proj, adapter_name, factors=self._factors, **options)

    @property
    def out_in_features(self) -> tuple[int, int]:
        m, n = self.get_base_weight().shape
        return m, n

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight

    def _dense(self, update: LowRank) -> Tensor:
        return update.dense()

    def forward(  # type: ignore[override]  # callers name their arguments
        self, query: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        if adapter_names is not None:
            raise TypeError(
                f"nblora.{type(self).__name__} does not support mixed adapter batches. All samples of a "
                "batch share the adapted weight: call the model without adapter_names, after set_adapter"
            )
        base: Any = self.get_base_layer()
        out_proj = base.out_proj.get_base_layer()
        with one_at_a_time():
            weights = [
                (base, "in_proj_weight", self.adapted_weight(base.in_proj_weight)),
                (out_proj, "weight", base.out_proj.adapted_weight(out_proj.weight)),
            ]
            return call_with(weights, partial(base, query, *args, **kwargs))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's LoRA applies the update of the output projection twice (0.21.2)."""
        return False

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT calls to unload a layer: both projections at once."""
        base: Any = self.get_base_layer()
        if merge:
            for layer in (self, base.out_proj):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base.out_proj = base.out_proj.get_base_layer()
        attention: nn.Module = base
        return attention

    def __getattr__(self, name: str) -> Any:
        """What modules around an attention ask it: batch_first, num_heads, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)
