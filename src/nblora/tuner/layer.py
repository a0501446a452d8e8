"""The adapted layer: a frozen base layer plus bounded low-rank updates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nblora.bounds import Norm, parse_norm, spectral_norm
from nblora.lowrank import LowRank
from nblora.parametrizations import (
    FreeParameters,
    Parametrization,
    bounded_update,
    effective_rank,
    has_run_away,
    random_start,
    zero_start,
)
from nblora.tuner.config import NBLoraConfig


class RunawayWarning(UserWarning):
    """The free parameters of a layer are so large that its update hardly learns any more."""


@dataclass(frozen=True)
class Method:
    """What turns the tensors of one adapter into its update, apart from the tensors."""

    norm: Norm
    parametrization: Parametrization
    temperature: float

    @staticmethod
    def of(config: NBLoraConfig) -> Method:
        return Method(parse_norm(config.norm), config.parametrization, config.temperature)

    def update(self, free: FreeParameters, radius: Tensor) -> LowRank:
        return bounded_update(
            free,
            norm=self.norm,
            radius=radius,
            parametrization=self.parametrization,
            temperature=self.temperature,
        )

    def has_run_away(self, free: FreeParameters) -> Tensor:
        return has_run_away(
            free,
            norm=self.norm,
            parametrization=self.parametrization,
            temperature=self.temperature,
        )


class FreeWeight(nn.Module):
    """A leaf module that holds one trainable tensor as `.weight`.

    Not a bare nn.Parameter in a ParameterDict: FSDP's wrap policy isolates leaf modules with
    `.weight`, and TRL finds adapters by the ".name." inside parameter names. To be called, not read,
    where its value is computed with: FSDP gathers the shards only around calls.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """A copy of the weight: what FSDP gathered is gone after the call."""
        return self.weight.clone()

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}"


class Radius(nn.Module):
    """The absolute radius of one layer's ball, a 0-dimensional buffer that keeps its precision.

    A cast of the model to half precision must not move the bound, so casts pass this buffer by.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Radius:
        before = self.weight
        super()._apply(fn, recurse)
        if self.weight.dtype != before.dtype:
            self.weight = before.to(self.weight.device)
        return self


class _Merged(NamedTuple):
    """What unmerging needs."""

    update: LowRank  # as merged
    wrong: Tensor  # (c,) flat indices at which subtracting the update does not restore the weight
    values: Tensor  # (c,) the base weight there


class NBLoraLayer(nn.Module, BaseTunerLayer):
    """What every adapted layer has, whatever its base layer is."""

    if TYPE_CHECKING:  # PEFT is not typed; what of it is used here

        def get_base_layer(self) -> nn.Module: ...
        def get_base_weight(self) -> Tensor: ...
        def _get_base_layer_device_and_dtype(
            self, base_layer: nn.Module
        ) -> tuple[torch.device | None, torch.dtype | None]: ...
        def set_base_weight(self, weight_data: Tensor) -> None: ...
        def set_adapter(self, adapter_names: list[str], inference_mode: bool = False) -> None: ...

        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        weight: Tensor

    adapter_layer_names = ("nblora_in", "nblora_out", "nblora_angle", "nblora_scale")
    other_param_names = ("r", "method", "nblora_radius", "nblora_dropout", "_merged", "_watches")

    base_layer: nn.Module
    nblora_in: nn.ModuleDict
    nblora_out: nn.ModuleDict
    nblora_angle: nn.ModuleDict
    nblora_scale: nn.ModuleDict
    nblora_radius: nn.ModuleDict
    nblora_dropout: nn.ModuleDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.method: dict[str, Method] = {}
        self.nblora_in = nn.ModuleDict()
        self.nblora_out = nn.ModuleDict()
        self.nblora_angle = nn.ModuleDict()
        self.nblora_scale = nn.ModuleDict()
        self.nblora_radius = nn.ModuleDict()
        self.nblora_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged: dict[str, _Merged] = {}
        self._watches: dict[str, list[int]] = {}

    @property
    def out_in_features(self) -> tuple[int, int]:
        raise NotImplementedError

    def update_layer(
        self, adapter_name: str, *, r: int, bound: float, config: NBLoraConfig, layer_name: str
    ) -> None:
        """Add (or replace) an adapter.

        Raises:
            ValueError: if the bound is relative and the base weight is not finite.
        """
        m, n = self.out_in_features
        method = Method.of(config)
        weight = self.get_base_weight()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        start = zero_start if config.init_weights else random_start
        # made on the CPU whatever the device, so that a seed gives the same start everywhere
        free = start(
            m, n, r, norm=method.norm, parametrization=method.parametrization, dtype=dtype, device="cpu"
        )
        self.r[adapter_name] = effective_rank(r, m, n)
        self.method[adapter_name] = method
        self.nblora_in[adapter_name] = FreeWeight(free.into)
        self.nblora_out[adapter_name] = FreeWeight(free.out)
        for container, tensor in (
            (self.nblora_angle, free.angle),
            (self.nblora_scale, free.logits),
        ):
            if tensor is not None:
                container[adapter_name] = FreeWeight(tensor)
            elif adapter_name in container:
                del container[adapter_name]
        dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.nblora_dropout[adapter_name] = dropout
        self.nblora_radius[adapter_name] = Radius(self._radius(adapter_name, bound, config, layer_name))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to the device of the base layer, or the given one, and keep its precision.

        PEFT would cast to the base layer's dtype too. Free parameters are float32 at least: what they
        stand for is computed in float32 anyway, and a checkpoint must load as it was saved.
        """
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for name in (*self.adapter_layer_names, "nblora_radius"):
            container = getattr(self, name)
            if adapter_name not in container or device is None:
                continue
            if not _weight(container[adapter_name]).is_meta:
                container[adapter_name].to(device)

    def _radius(self, adapter_name: str, bound: float, config: NBLoraConfig, layer_name: str) -> Tensor:
        """The absolute radius, rounded down; NaN where only a checkpoint can tell it."""
        weight = self.get_base_weight()
        radius = torch.tensor(bound, dtype=torch.float64, device="cpu")
        if config.bound_kind == "relative":
            # parameters on the meta device: the layer awaits a checkpoint, which holds the radius
            awaits_checkpoint = _weight(self.nblora_in[adapter_name]).is_meta
            if awaits_checkpoint or weight.is_meta:
                radius = torch.full_like(radius, torch.nan)
            else:
                for merged in self.merged_adapters:
                    weight = weight - self._dense(self._merged[merged].update)
                try:
                    radius = radius * spectral_norm(weight)
                except ValueError as error:
                    raise ValueError(
                        f"the base weight of layer {layer_name!r} must be finite for a relative bound, "
                        "got NaN or infinity"
                    ) from error
                if radius == 0:
                    warnings.warn(
                        f"The base weight of layer {layer_name!r} is zero, so its relative bound is zero "
                        'and it cannot learn: use bound_kind="absolute", or exclude the layer.',
                        stacklevel=2,
                    )
        if weight.dtype == torch.float64:
            return radius
        rounded = radius.float()
        return torch.where(rounded > radius, rounded.nextafter(torch.zeros_like(rounded)), rounded)

    def free_parameters(self, adapter_name: str) -> FreeParameters:
        """Copies of the free parameters of an adapter, through which gradients flow to them.

        Raises:
            ValueError: if the layer has no such adapter.
        """
        if adapter_name not in self.nblora_in:
            raise ValueError(f"the adapter must be one of {sorted(self.nblora_in)}, got {adapter_name!r}")
        angle, logits = self.nblora_angle, self.nblora_scale
        return FreeParameters(
            out=self.nblora_out[adapter_name](),
            into=self.nblora_in[adapter_name](),
            angle=angle[adapter_name]() if adapter_name in angle else None,
            logits=logits[adapter_name]() if adapter_name in logits else None,
        )

    def radius(self, adapter_name: str) -> Tensor:
        """The absolute radius of an adapter's ball, 0-dimensional."""
        return _weight(self.nblora_radius[adapter_name])

    def low_rank_update(self, adapter_name: str) -> LowRank:
        """The update ΔW (out, in) as thin factors, in float32 or float64, also under autocast.

        The one home of the formula: forward, merge, certify and export start here.
        """
        free = self.free_parameters(adapter_name)
        return self.method[adapter_name].update(free, self.radius(adapter_name))

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The update ΔW as a dense matrix in the layout of the base weight."""
        return self._dense(self.low_rank_update(adapter_name))

    def _dense(self, update: LowRank) -> Tensor:
        """An update (out, in) as a dense matrix in the layout of the base weight."""
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters to the base weight.

        Args:
            safe_merge: Refuse to merge an update that would make the base weight NaN or infinite.
            adapter_names: Which adapters; the active ones without it.

        Raises:
            ValueError: for `safe_merge` with such an update; the base weight is then unchanged.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.nblora_in:
                continue
            self.warn_if_run_away(adapter_name)
            weight = self.get_base_weight()
            with torch.no_grad():
                update = self.low_rank_update(adapter_name)
            delta = self._dense(update).to(weight.device)
            merged = (weight + delta).to(weight.dtype)
            if safe_merge and not bool(merged.isfinite().all()):
                raise ValueError(
                    f"the merged weight must be finite, got NaN or infinity from adapter {adapter_name!r}"
                )
            # (W + d) - d is not always W in floating point. Remembering the few entries where it
            # differs makes unmerging exact without a second copy of the weight.
            wrong = (_bits(self._without(merged, delta)) != _bits(weight)).flatten().nonzero()[:, 0]
            self._merged[adapter_name] = _Merged(update, wrong, weight.flatten()[wrong])
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Take every merged update out of the base weight again.

        The weight becomes bitwise what it was (up to rounding if it moved to another device meanwhile),
        also if the adapter was trained on or loaded anew since.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            weight = self.get_base_weight()
            update, wrong, values = self._merged.pop(adapter_name)
            restored = self._without(weight, self._dense(update).to(weight.device))
            restored.view(-1)[wrong.to(weight.device)] = values.to(weight)
            self.set_base_weight(restored)

    @staticmethod
    def _without(merged: Tensor, delta: Tensor) -> Tensor:
        return (merged - delta).to(merged.dtype).contiguous()

    def warn_if_run_away(self, adapter_name: str) -> None:
        """Warn if the free parameters of an adapter have run away. Waits for the device."""
        free = self.free_parameters(adapter_name)
        if not free.out.is_meta and bool(self.method[adapter_name].has_run_away(free)):
            # the same text for every layer, so that Python shows it once and not once per layer
            warnings.warn(
                "The free parameters of an NB-LoRA layer have run away: they are so large that its "
                "update hardly moves any more, and in the joint parametrization shrinks to zero. The "
                "bound holds, but the layer has stopped learning. Use a smaller learning rate.",
                RunawayWarning,
                stacklevel=3,
            )

    def _watch(self, adapter_name: str) -> None:
        """Check for a runaway at training forwards 16, 32, 64, ..., then every 1024.

        Rarely enough for the wait on the device not to matter. Not under torch.compile, where a
        counter would force recompilation.
        """
        if not self.training or torch.compiler.is_compiling():
            return
        state = self._watches.setdefault(adapter_name, [16, 16])
        state[0] -= 1
        if state[0] == 0:
            state[0] = state[1]
            state[1] = min(2 * state[1], 1024)
            self.warn_if_run_away(adapter_name)


class NBLoraLinear(NBLoraLayer):
    """NB-LoRA on nn.Linear or transformers' Conv1D."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        r: int,
        bound: float,
        config: NBLoraConfig,
        layer_name: str,
    ) -> None:
        super().__init__(base_layer)
        base = self.get_base_layer()
        self.fan_in_fan_out = isinstance(base, Conv1D)
        m, n = self.out_in_features
        expected = (n, m) if self.fan_in_fan_out else (m, n)
        if tuple(self.weight.shape) != expected or not self.weight.is_floating_point():
            raise TypeError(
                f"layer {layer_name!r} must have a floating-point weight of shape {expected}, got "
                f"{tuple(self.weight.shape)} {self.weight.dtype}; quantized layers are not supported yet"
            )
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r=r, bound=bound, config=config, layer_name=layer_name)

    @property
    def out_in_features(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        if self.fan_in_fan_out:
            return base.nf, base.nx
        return base.out_features, base.in_features

    def _dense(self, update: LowRank) -> Tensor:
        return update.dense().mT if self.fan_in_fan_out else update.dense()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(MIXED_BATCH_MESSAGE)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            result = self.base_layer(x, *args, **kwargs)
            return result
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        for adapter_name in self.active_adapters:
            if adapter_name not in self.nblora_in:
                continue
            self._watch(adapter_name)
            dropped = self.nblora_dropout[adapter_name](x)
            added = self.low_rank_update(adapter_name).apply(dropped)
            result = result + added.to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "nblora." + super().__repr__()


MIXED_BATCH_MESSAGE = (
    "NB-LoRA does not support a different adapter for each sample of a batch yet: call the model "
    "without adapter_names, after set_adapter"
)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _bits(weight: Tensor) -> Tensor:
    """Entries as integers of their size, which tell the signs of zeros apart."""
    return weight.contiguous().view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    )
