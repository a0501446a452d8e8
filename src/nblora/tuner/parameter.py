"""NB-LoRA on bare parameters, such as the experts of a mixture."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nblora.lowrank import LowRank
from nblora.tuner.config import NBLoraConfig
from nblora.tuner.layer import NBLoraLayer

_LOCK = threading.RLock()


def one_at_a_time() -> AbstractContextManager[Any]:
    """What threads hold while weights of a module are replaced. (torch.compile traces no locks.)"""
    return nullcontext() if torch.compiler.is_compiling() else _LOCK


def call_with(weights: Sequence[tuple[nn.Module, str, Tensor]], call: Callable[[], Any]) -> Any:
    """Call something while other tensors stand in for weights of modules.

    Attributes of the instance go before its parameters, and FSDP itself puts its views there, which
    torch.func.functional_call would not replace.

    Args:
        weights: (module, name of the parameter, tensor to stand in for it).
    """
    before = [module.__dict__.get(name) for module, name, _ in weights]
    for module, name, tensor in weights:
        module.__dict__[name] = tensor
    try:
        return call()
    finally:
        for (module, name, _), old in zip(weights, before):
            if old is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = old


class _Instead(nn.Module):
    """A parametrization that gives the same tensor whatever it gets."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weights = [weight]  # in a list, so as not to become a parameter

    def forward(self, _: Tensor) -> Tensor:
        return self.weights[0]


class ParamWrapper(NBLoraLayer):
    """NB-LoRA on a parameter that its module uses itself (`target_parameters`), not through a layer.

    A 2-dimensional parameter is a matrix (out, in). A 3-dimensional one is a batch of E experts, (E, out,
    in), or (E, in, out) where the module says `is_transposed`; each expert has its own update and its own
    bound. While the module runs, its parameter is replaced by the adapted one, so an input costs as much as
    merging does. Several parameters of one module are wrapped one around the other.

    The name is the one that PEFT looks for.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, parameter_name: str, **options: Any
    ) -> None:
        self.base_name = self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, **options)

    def target(self, module_name: str) -> str:
        return f"{super().target(module_name)}.{self.parameter_name}"

    def _check_base_layer(self, layer_name: str) -> None:
        parameter = self.get_base_weight()
        if parameter.ndim not in (2, 3) or not parameter.is_floating_point():
            raise TypeError(
                f"parameter {layer_name!r} must be a floating-point matrix (out, in) or a batch of them "
                f"(experts, out, in), got shape {tuple(parameter.shape)} and {parameter.dtype}"
            )

    def _check_options(self, config: NBLoraConfig, layer_name: str) -> None:
        if config.dropout > 0:
            raise ValueError(
                f"dropout must be 0 for target_parameters, whose inputs are out of reach, got "
                f"dropout={config.dropout} for {layer_name!r}"
            )

    @property
    def _transposed(self) -> bool:
        base = self.get_base_layer()
        return self.get_base_weight().ndim == 3 and bool(getattr(base, "is_transposed", False))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.get_base_weight().shape[:-2])

    @property
    def out_in_features(self) -> tuple[int, int]:
        m, n = self.get_base_weight().shape[-2:]
        return (n, m) if self._transposed else (m, n)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self._transposed else weight

    def _dense(self, update: LowRank) -> Tensor:
        return self._matrix(update.dense())

    def _plus(self, weight: Tensor, update: LowRank) -> Tensor:
        # in one go, for all experts of a layer are large
        left, right = update.balanced_for(weight.dtype)
        if self._transposed:
            left, right = right.mT, left.mT
        add = torch.addmm if weight.ndim == 2 else torch.baddbmm
        return add(weight, left, right)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        if adapter_names is not None:
            raise ValueError(
                f"nblora.{type(self).__name__} does not support mixed adapter batches yet. All samples of a "
                "batch share the adapted weight: call the model without adapter_names, after set_adapter"
            )
        with one_at_a_time():
            return self._forward(x, *args, **kwargs)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module, name = self.get_base_layer(), self.parameter_name
        weight = self.adapted_weight(getattr(module, name))
        if not parametrize.is_parametrized(module, name):
            return call_with([(module, name, weight)], partial(self.base_layer, x, *args, **kwargs))
        # what is computed by somebody's parametrization cannot be replaced, but another one added
        parametrize.register_parametrization(module, name, _Instead(weight), unsafe=True)
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            all_steps: Any = module.parametrizations
            del all_steps[name][-1]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT calls to unload a layer: all wrappers around one module go at once."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"
