"""The tuner that PEFT instantiates for an `NBLoraConfig`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from nblora.tuner.config import NBLoraConfig, pattern_value
from nblora.tuner.layer import MIXED_BATCH_MESSAGE, NBLoraLayer, NBLoraLinear


class NBLoraModel(BaseTuner):
    """Adds bounded low-rank updates to the layers of a model.

    Made by `peft.get_peft_model(model, NBLoraConfig(...))`, not by hand.
    """

    prefix: str = "nblora_"
    tuner_layer_cls = NBLoraLayer
    # LoRA's choice of layers is the field's default for every architecture that PEFT knows
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        unmatched = [
            pattern
            for pattern in self.peft_config[adapter_name].bound_pattern
            # PEFT's own rule for patterns, see get_pattern_key
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in self.targeted_module_names)
        ]
        if unmatched:
            warnings.warn(
                f"bound_pattern has keys that match no adapted layer and are ignored: {sorted(unmatched)}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _create_and_replace(
        self,
        peft_config: NBLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "r": pattern_value(peft_config.rank_pattern, current_key, peft_config.r),
            "bound": pattern_value(peft_config.bound_pattern, current_key, peft_config.bound),
            "config": peft_config,
            "layer_name": current_key,
        }
        if isinstance(target, NBLoraLayer):
            target.update_layer(adapter_name, **options)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise TypeError(
                "NB-LoRA adapts torch.nn.Linear and transformers Conv1D layers, "
                f"got {type(base).__name__} at {current_key!r}"
            )
        if isinstance(base, Conv1D):
            peft_config.fan_in_fan_out = True
        layer = NBLoraLinear(target, adapter_name, **options)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is trained only once it is set active
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops adapter_names silently where a method has no such hook
        if kwargs.get("adapter_names") is not None:
            raise ValueError(MIXED_BATCH_MESSAGE)
        yield


def nblora_layers(model: nn.Module, adapter_name: str) -> dict[str, NBLoraLayer]:
    """The adapted layers of a model that have an adapter of this name, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NBLoraLayer) and adapter_name in module.nblora_in
    }
