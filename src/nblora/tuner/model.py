"""The tuner that PEFT instantiates for an `NBLoraConfig`."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from nblora.tuner.attention import NBLoraMultiheadAttention
from nblora.tuner.combination import Combination, combine
from nblora.tuner.config import NBLoraConfig, pattern_value
from nblora.tuner.conv import NBLoraConv
from nblora.tuner.embedding import NBLoraEmbedding
from nblora.tuner.factors import Factors
from nblora.tuner.layer import NBLoraLayer, names_only, nblora_layers
from nblora.tuner.linear import NBLoraLinear
from nblora.tuner.parameter import ParamWrapper

BASE = "__base__"
"""In `adapter_names`: no adapter for this sample."""


class NBLoraModel(BaseTuner):
    """Adds bounded low-rank updates to the layers of a model.

    Made by `peft.get_peft_model(model, NBLoraConfig(...))`, not by hand.
    """

    prefix: str = "nblora_"
    tuner_layer_cls = NBLoraLayer
    # LoRA's choice of layers is the field's default for every architecture that PEFT knows
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        layers = (module for module in model.modules() if isinstance(module, NBLoraLayer))
        first = next(layers, None)
        self._factors = Factors() if first is None else first._factors
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        names = [layer.target(name) for name, layer in nblora_layers(model, adapter_name).items()]
        for module in model.modules():
            # decides from its base weights whether its layers are given nested tensors
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
        unmatched = [
            pattern
            for pattern in self.peft_config[adapter_name].bound_pattern
            # PEFT's own rule for patterns, see get_pattern_key
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        ]
        if unmatched:
            warnings.warn(
                f"bound_pattern has keys that match no adapted layer and are ignored: {sorted(unmatched)}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _check_new_adapter_config(self, config: NBLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        # where a parameter's adapter is stored depends on how the wrappers of a module are nested
        for name, other in self.peft_config.items():
            if other is config or not (config.target_parameters and other.target_parameters):
                continue
            if set(other.target_parameters) != set(config.target_parameters):
                raise ValueError(
                    "all adapters of a model must have the same target_parameters, got "
                    f"{sorted(config.target_parameters)}, and {sorted(other.target_parameters)} for {name!r}"
                )

    def _prepare_adapter_config(
        self, peft_config: NBLoraConfig, model_config: dict[str, Any]
    ) -> NBLoraConfig:
        known = model_config.get("model_type") in self.target_module_mapping
        if peft_config.target_modules is None and peft_config.target_parameters and not known:
            return peft_config
        prepared: NBLoraConfig = super()._prepare_adapter_config(peft_config, model_config)
        return prepared

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
            "twin": next(
                (
                    name
                    for name, config in self.peft_config.items()
                    if name != adapter_name and config == peft_config
                ),
                None,
            ),
        }
        around_another = (
            isinstance(target, ParamWrapper) and parameter_name is not None
        ) and target.parameter_name != parameter_name
        if isinstance(target, NBLoraLayer) and not around_another:
            target.update_layer(adapter_name, **options)
            return
        options |= get_quantization_kwargs(self.model) | {"factors": self._factors}
        layer: NBLoraLayer
        if parameter_name is not None:
            layer = ParamWrapper(target, adapter_name, parameter_name=parameter_name, **options)
        else:
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            layer = _layer_class(base, current_key)(target, adapter_name, **options)
            if isinstance(base, Conv1D):
                peft_config.fan_in_fan_out = True
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is trained only once it is set active
        if isinstance(parent, nn.TransformerEncoderLayer):
            # in eval mode it takes the weight out of a layer without a hook, and leaves the update
            layer.register_forward_pre_hook(_nothing)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for module in self.model.modules():  # before the first of them is merged
            if isinstance(module, NBLoraLayer):
                module.check_mergeable()

    @classmethod
    def _get_adapter_state_dict(
        cls, *, adapter_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        # PEFT picks entries by the names of modules, which FSDP changes, so that nothing would be saved
        found: dict[str, Any] = super()._get_adapter_state_dict(
            adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )
        ours = re.compile(rf"\.{cls.prefix}\w+\.{re.escape(adapter_name)}\.weight$")
        return found | {key: value for key, value in state_dict.items() if ours.search(key)}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with names_only():
            remapped: dict[str, Any] = super()._remap_adapter_state_dict_for_load(*args, **kwargs)
        return remapped

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's also copies the weight, which not every layer has, and moves adapters, which ours do
        setattr(parent, child_name, new_module)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: Combination = "cat",
        svd_rank: int | None = None,
        *,
        bound: float | None = None,
        **lora_options: Any,
    ) -> None:
        """Add an adapter whose updates are the weighted sums of the updates of others.

        The sum is exact, not a sum of factors. By the triangle inequality it has a bound again, in every
        layer the sum of |weight · scale| times the radius, which becomes the absolute bound of the new
        adapter. Like any adapter that is added, the new one is inactive until `set_adapter`.

        Args:
            adapters: names of NB-LoRA adapters that bound the same norm.
            weights: as many numbers, of any sign.
            adapter_name: a new name.
            combination_type: "cat" keeps the sum as it is, of rank at most the sum of the ranks; "svd"
                keeps its best approximation of rank `svd_rank`.
            svd_rank: for "svd"; the largest rank of the adapters without it.
            bound: a smaller bound, times the radius that the triangle inequality gives, in (0, 1]: sums
                outside are projected onto their ball. Without it nothing is changed.
            lora_options: what else `LoraModel.add_weighted_adapter` takes (density, svd_driver, ...): for
                other combination types, or without effect on an exact sum.

        Raises:
            ValueError: for anything else; the model is then unchanged.
        """
        unknown = sorted(lora_options.keys() - inspect.signature(LoraModel.add_weighted_adapter).parameters)
        if unknown or lora_options.get("svd_clamp") is not None:
            raise ValueError(
                "add_weighted_adapter takes the arguments of LoraModel.add_weighted_adapter, except "
                f"svd_clamp, since sums are exact, got {unknown or ['svd_clamp']}"
            )
        combine(
            self,
            adapters,
            weights,
            adapter_name,
            combination_type=combination_type,
            svd_rank=svd_rank,
            bound=bound,
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` to every layer for the time of one call (PEFT drops it otherwise)."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {
            name for module in self.modules() if isinstance(module, NBLoraLayer) for name in module.method
        }
        unknown = sorted(set(adapter_names) - known - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        beams = beams if isinstance(beams, int) else 1
        repeated = [name for name in adapter_names for _ in range(beams)]
        # the encoder sees every sample once, the decoder once for each beam
        get_encoder: Callable[[], nn.Module | None] = getattr(self.model, "get_encoder", lambda: None)
        encoder = get_encoder()
        encoding = set() if encoder is None or encoder is self.model else set(encoder.modules())
        handles = [
            module.register_forward_pre_hook(
                partial(_with_names, adapter_names=adapter_names if module in encoding else repeated),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, (NBLoraLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _nothing(module: nn.Module, args: Any) -> None: ...


def _with_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"adapter_names": adapter_names}


def _layer_class(base: nn.Module, layer_name: str) -> type[NBLoraLayer]:
    if isinstance(base, NonDynamicallyQuantizableLinear):
        warnings.warn(
            f"{layer_name!r} is the output projection of an nn.MultiheadAttention, which reads its weight "
            "without calling it, so an adapter there has no effect: exclude it, or target the attention "
            "itself.",
            stacklevel=2,
        )
    if isinstance(base, nn.MultiheadAttention):
        return NBLoraMultiheadAttention
    if isinstance(base, (nn.Linear, Conv1D)):
        return NBLoraLinear
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return NBLoraConv
    if isinstance(base, nn.Embedding):
        return NBLoraEmbedding
    backend = resolve_quantization_backend(base)
    if backend is not None and backend.layer_type == "linear":
        return NBLoraLinear
    raise TypeError(
        "NB-LoRA adapts torch.nn.Linear, Conv1d, Conv2d, Conv3d, Embedding and MultiheadAttention, "
        f"transformers' Conv1D and quantized linear layers, got {type(base).__name__} at {layer_name!r}"
    )
