"""The adapted layer: a frozen base layer plus bounded low-rank updates."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from nblora.lowrank import LowRank, plain_operations_only
from nblora.parametrizations import FreeParameters, effective_rank, random_start, zero_start
from nblora.spectral import spectral_norm
from nblora.tuner.config import NBLoraConfig
from nblora.tuner.factors import Factors, Slots, Sources
from nblora.tuner.quantized import (
    KeptWeight,
    is_packed,
    put_scales_right,
    quantization_backend,
    weight_by_its_action,
)
from nblora.tuner.weights import FreeWeight, Method, Radius

_MEASURING = threading.RLock()
_names_only = ContextVar("names_only", default=False)


@contextmanager
def names_only() -> Iterator[None]:
    """Meanwhile a state_dict() is asked for its names, and values need not be there."""
    before = _names_only.set(True)
    try:
        yield
    finally:
        _names_only.reset(before)


FEW_ROWS = 16
"""Of an input: one token, a few samples."""


class RunawayWarning(UserWarning):
    """The free parameters of a layer are so large that its update hardly learns any more."""


class _Merged(NamedTuple):
    """What unmerging needs."""

    update: LowRank  # as merged
    wrong: Tensor  # (c,) flat indices at which subtracting the update does not restore the weight
    values: Tensor  # (c,) the base weight there
    merged: Tensor  # (c,) the merged weight there: if another layer has changed it since, values are old
    kept: KeptWeight | None = None  # where it is quantized


class _Bound(NamedTuple):
    """What the radius of an adapter is measured from, apart from the base weight."""

    bound: float
    config: NBLoraConfig
    layer_name: str


class NBLoraLayer(nn.Module, BaseTunerLayer):
    """What every adapted layer has, whatever its base layer is.

    A kind of layer says how its weight is a matrix (m, n), or a batch of them, and how an update of
    that matrix acts on an input.

    Args:
        base_layer: the layer to adapt, or a tuner layer around it.
        adapter_name: of the first adapter; the other arguments are its options.
        r: its rank.
        bound: its bound.
        config: where all else comes from.
        layer_name: for messages.
        twin: see `update_layer`.
        get_apply_tensor_subclass: of torchao's quantization, which merging needs.
        factors: what the layers of a model share.

    Raises:
        TypeError: for a base layer that this kind cannot adapt.
        ValueError: for options that this kind does not have.
    """

    if TYPE_CHECKING:  # PEFT is not typed; what of it is used here

        def get_base_layer(self) -> nn.Module: ...
        def _get_embed_scale(self) -> Tensor | None: ...
        def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None: ...

        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        weight: Tensor

    base_name: str = "weight"
    """The name of the parameter of the base layer."""
    in_name: ClassVar[str] = "nblora_in"
    out_name: ClassVar[str] = "nblora_out"
    adapter_layer_names: tuple[str, ...] = ("nblora_in", "nblora_out", "nblora_angle", "nblora_scale")
    other_param_names = (
        "r",
        "method",
        "scaling",
        "nblora_radius",
        "nblora_dropout",
        "_merged",
        "_watches",
        "_slots",
        "_unmeasured",
    )

    base_layer: nn.Module
    nblora_angle: nn.ModuleDict
    nblora_scale: nn.ModuleDict
    nblora_radius: nn.ModuleDict
    nblora_dropout: nn.ModuleDict

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        r: int,
        bound: float,
        config: NBLoraConfig,
        layer_name: str,
        twin: str | None = None,
        get_apply_tensor_subclass: Any = None,
        factors: Factors | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend(self.get_base_layer(), get_apply_tensor_subclass)
        self.r: dict[str, int] = {}
        self.method: dict[str, Method] = {}
        self.scaling: dict[str, float] = {}
        for name in (*self.adapter_layer_names, "nblora_radius", "nblora_dropout"):
            setattr(self, name, nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged: dict[str, _Merged] = {}
        self._watches: dict[str, list[int]] = {}
        self._factors = Factors() if factors is None else factors
        self._factors.add(self)
        self._slots = Slots()
        self._unmeasured: dict[str, _Bound] = {}
        self.register_load_state_dict_post_hook(_measure)
        self._active_adapter = adapter_name
        self._check_base_layer(layer_name)
        self.update_layer(adapter_name, r=r, bound=bound, config=config, layer_name=layer_name, twin=twin)

    # ------------------------------------------------------------- what a kind of layer says

    @property
    def out_in_features(self) -> tuple[int, int]:
        """(m, n) of the matrix that the update is added to."""
        raise NotImplementedError

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """() for one matrix, (E,) for a batch of E experts, each of which has its own bound."""
        return ()

    def _check_base_layer(self, layer_name: str) -> None:
        """Refuse what this kind cannot adapt."""

    def _check_options(self, config: NBLoraConfig, layer_name: str) -> None:
        """Refuse options that this kind does not have."""

    def _in_shape(self, k: int) -> tuple[int, ...]:
        """The shape in which the input side is stored; (..., k, n) once its last axes are flattened."""
        return (*self.batch_shape, k, self.out_in_features[1])

    def _matrix(self, weight: Tensor) -> Tensor:
        """The base weight as a matrix (..., m, n)."""
        raise NotImplementedError

    def _dense(self, update: LowRank) -> Tensor:
        """An update (..., m, n) as a dense tensor in the layout of the base weight."""
        raise NotImplementedError

    def _apply_update(self, update: LowRank, x: Tensor) -> Tensor:
        """What an update adds to the output for an input x, after dropout."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------ adapters

    @property
    def in_features(self) -> int:
        return self.out_in_features[1]

    @property
    def out_features(self) -> int:
        return self.out_in_features[0]

    def target(self, module_name: str) -> str:
        """What a configuration calls the adapted layer or parameter, from the name of this module."""
        return module_name.replace(".base_layer", "")

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.method

    def update_layer(
        self,
        adapter_name: str,
        *,
        r: int,
        bound: float,
        config: NBLoraConfig,
        layer_name: str,
        twin: str | None = None,
    ) -> None:
        """Add (or replace) an adapter.

        Args:
            twin: an adapter of the same configuration, whose radius the new one takes where the layer has
                it. A radius can have come with a checkpoint, from other base weights than these, and TRL
                copies the parameters of an adapter to its reference adapter, but not the radius.

        Raises:
            ValueError: if the bound is relative and the base weight is not finite, or for options that
                this kind of layer does not have.
        """
        self._check_options(config, layer_name)
        m, n = self.out_in_features
        method = Method.of(config)
        _, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = torch.float64 if base_dtype == torch.float64 else torch.float32
        start = zero_start if config.init_weights else random_start
        # made on the CPU whatever the device, so that a seed gives the same start everywhere
        free = start(
            m,
            n,
            r,
            norm=method.norm,
            parametrization=method.parametrization,
            batch_shape=self.batch_shape,
            dtype=dtype,
            device="cpu",
        )
        self.r[adapter_name] = effective_rank(r, m, n)
        self.method[adapter_name] = method
        self.scaling[adapter_name] = 1.0
        for name, tensor in self._stored(free).items():
            container = getattr(self, name)
            if tensor is not None:
                container[adapter_name] = FreeWeight(tensor)
            elif adapter_name in container:
                del container[adapter_name]
        dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.nblora_dropout[adapter_name] = dropout
        if _weight(getattr(self, self.in_name)[adapter_name]).is_meta:
            # the layer awaits a checkpoint, which holds the radius
            radius = torch.empty(self.batch_shape, dtype=dtype, device="meta")
        elif twin is not None and twin in self.nblora_radius:
            radius = self.radius(twin).clone()
        elif config.comes_with_weights and config.bound_kind == "relative":
            radius = torch.full(self.batch_shape, torch.nan, dtype=dtype, device="cpu")
            self._unmeasured[adapter_name] = _Bound(bound, config, layer_name)
        else:
            radius = rounded_down(self._new_radius(bound, config, layer_name), dtype)
        self.nblora_radius[adapter_name] = Radius(radius)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _stored(self, free: FreeParameters) -> dict[str, Tensor | None]:
        """Free parameters by the name of their container, in the shapes in which they are stored."""
        return {
            self.in_name: free.into.reshape(self._in_shape(free.rank)),
            self.out_name: free.out,
            # not vectors: LoRA+ and others take those for biases
            "nblora_angle": None if free.angle is None else free.angle[..., None],
            "nblora_scale": None if free.logits is None else free.logits[..., None],
        }

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

    def _measure(self) -> None:
        """Measure radii that were left to a checkpoint, where none came.

        Measuring takes several passes over the base weights, and loading an adapter should not wait for them.
        """
        if not self._unmeasured:
            return
        if plain_operations_only():
            raise RuntimeError(
                "an adapter must have measured its bounds before it is compiled, exported or transformed, "
                "got a new one with the configuration of a saved one: load weights, or call the model first"
            )
        with _MEASURING:
            for adapter_name, (bound, config, layer_name) in list(self._unmeasured.items()):
                radius = _weight(self.nblora_radius[adapter_name])
                if not radius.is_meta and bool(radius.isnan().all()):
                    measured = self._new_radius(bound, config, layer_name)
                    with torch.no_grad():
                        radius.copy_(rounded_down(measured, radius.dtype))
                del self._unmeasured[adapter_name]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not _names_only.get():
            self._measure()
        super()._save_to_state_dict(*args, **kwargs)

    def _new_radius(self, bound: float, config: NBLoraConfig, layer_name: str) -> Tensor:
        """The absolute radius (float64), NaN where only a checkpoint can tell it."""
        radius = torch.full(self.batch_shape, bound, dtype=torch.float64, device="cpu")
        if config.bound_kind == "absolute":
            return radius
        weight = self._measurable_weight()
        if weight.is_meta:
            return torch.full_like(radius, torch.nan)
        for merged in self.merged_adapters:
            weight = weight - self._dense(self._merged[merged].update)
        try:
            radius = radius * spectral_norm(self._matrix(weight))
        except ValueError as error:
            raise ValueError(
                f"the base weight of layer {layer_name!r} must be finite for a relative bound, "
                "got NaN or infinity"
            ) from error
        if bool((radius == 0).any()):
            warnings.warn(
                f"The base weight of layer {layer_name!r} is zero, so its relative bound is zero "
                'and it cannot learn: use bound_kind="absolute", or exclude the layer.',
                stacklevel=2,
            )
        return radius

    def get_base_weight(self) -> Tensor:
        """The base weight, dequantized where it is quantized."""
        base = self.get_base_layer()
        weight: Tensor
        if self.quantization_backend is None:
            weight = getattr(base, self.base_name).data
            return weight
        put_scales_right(base)
        if is_packed(base):  # Note [4-bit weights on a CPU]
            device, dtype = self._get_base_layer_device_and_dtype(base)
            weight = weight_by_its_action(base, self.in_features, device, dtype).to(dtype)
        else:
            weight = BaseTunerLayer.get_base_weight(self)
        return weight

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Change the base weight, which is quantized again where it was."""
        if self.quantization_backend is None:
            getattr(self.get_base_layer(), self.base_name).data = weight_data
        else:
            BaseTunerLayer.set_base_weight(self, weight_data)

    def _measurable_weight(self) -> Tensor:
        """The base weight, also where only its action can be had."""
        return self.get_base_weight()

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        if self.base_name != "weight":  # the only parameter that PEFT looks at
            weight = self.get_base_weight()
            return weight.device, weight.dtype
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None and isinstance(packed := getattr(base_layer, "W_q", None), Tensor):  # HQQ
            device = packed.device
        return device, dtype

    def free_parameters(self, adapter_name: str) -> FreeParameters:
        """Copies of the free parameters of an adapter, through which gradients flow to them.

        Raises:
            ValueError: if the layer has no such adapter.
        """
        if not self.has_adapter(adapter_name):
            raise ValueError(f"the adapter must be one of {sorted(self.method)}, got {adapter_name!r}")
        called = [
            container[adapter_name]() if adapter_name in container else None for container in self._containers
        ]
        return Sources(*called).free()  # type: ignore[arg-type]

    def sources(self, adapter_name: str) -> Sources | None:
        """The tensors of an adapter as they are stored; None where they are not always there."""
        if self._unmeasured:
            self._measure()
        return self._slots.read(adapter_name, self._containers)

    @property
    def _containers(self) -> list[Any]:
        """Of the modules that hold the tensors of adapters, in the order of `Sources`."""
        names = (self.out_name, self.in_name, "nblora_angle", "nblora_scale", "nblora_radius")
        modules = self._modules
        return [modules[name] for name in names]

    def radius(self, adapter_name: str) -> Tensor:
        """The absolute radius of an adapter's ball: 0-dimensional, or (E,) for E experts."""
        self._measure()
        return _weight(self.nblora_radius[adapter_name])

    # ------------------------------------------------------------------------------- updates

    def low_rank_update(self, adapter_name: str) -> LowRank:
        """The update ΔW (..., m, n) as the layer applies it, its scale included.

        Thin factors in float32 or float64, also under autocast. The one home of the formula: forward,
        merge, certify and export start here.
        """
        return self._scaled(adapter_name, self._unscaled_update(adapter_name))

    def _unscaled_update(self, adapter_name: str) -> LowRank:
        self._measure()
        free = self.free_parameters(adapter_name)
        return self.method[adapter_name].update(free, self.nblora_radius[adapter_name]())

    def _scaled(self, adapter_name: str, update: LowRank) -> LowRank:
        scale = self.scaling[adapter_name]
        return update if scale == 1 else LowRank(update.left * scale, update.right)

    def _current_update(
        self, adapter_name: str, dtype: torch.dtype | None = None, *, glance: bool = False
    ) -> LowRank:
        """`low_rank_update` in a dtype; Note [Factors are kept]."""
        if dtype is None:
            stored = _weight(getattr(self, self.out_name)[adapter_name]).dtype
            dtype = torch.float64 if stored == torch.float64 else torch.float32
        if plain_operations_only():
            return LowRank(*self.low_rank_update(adapter_name).balanced_for(dtype))
        update = self._factors.update(self, adapter_name, dtype, glance=glance)
        if update is None:
            update = LowRank(*self._unscaled_update(adapter_name).balanced_for(dtype))
        return self._scaled(adapter_name, update)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._factors.add(self)

    def _replicate_for_data_parallel(self) -> NBLoraLayer:
        replica: NBLoraLayer = super()._replicate_for_data_parallel()
        replica._slots, replica._factors = Slots(), Factors()  # its tensors are others
        return replica

    def train(self, mode: bool = True) -> NBLoraLayer:
        if not (mode and self.training):  # trainers repeat train() before every step
            self._slots.drop()
        return super().train(mode)

    @torch.no_grad()
    def set_update(self, adapter_name: str, update: LowRank) -> None:
        """Give an adapter the free parameters of an update (..., m, n), at scale 1.

        Args:
            update: inside the adapter's ball and of at most its rank.

        Raises:
            ValueError: if it is neither.
        """
        exact = LowRank(update.left.double(), update.right.double())
        radius = self.radius(adapter_name).to(exact.left)
        free = self.method[adapter_name].pull_back(exact, self.r[adapter_name], radius)
        self.set_free_parameters(adapter_name, free)
        self.scaling[adapter_name] = 1.0

    @torch.no_grad()
    def set_free_parameters(self, adapter_name: str, free: FreeParameters) -> None:
        """Copy free parameters into those of an adapter."""
        for name, tensor in self._stored(free).items():
            if tensor is not None:
                _weight(getattr(self, name)[adapter_name]).copy_(tensor)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The update ΔW as a dense tensor in the layout of the base weight."""
        return self._dense(self.low_rank_update(adapter_name))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # --------------------------------------------------------------------------------- scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale the update of an adapter; beyond 1 it may leave its ball, at most `scale` times."""
        if self.has_adapter(adapter):
            self.scaling[adapter] = _scale(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of all active adapters."""
        for adapter_name in filter(self.has_adapter, self.active_adapters):
            self.scaling[adapter_name] = _scale(self.scaling[adapter_name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of all active adapters; without a number, set them to 1."""
        for adapter_name in filter(self.has_adapter, self.active_adapters):
            before = self.scaling[adapter_name]
            self.scaling[adapter_name] = (
                1.0 if scale is None else _scale(before / scale if scale else math.nan)
            )

    # --------------------------------------------------------------------------------- merge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters to the base weight.

        A quantized weight is dequantized for it and quantized again, which rounds the sum to what it can
        hold; the old one is kept for `unmerge`.

        Args:
            safe_merge: Refuse to merge an update that comes from NaN or infinity, or would make the base
                weight so.
            adapter_names: Which adapters; the active ones without it.

        Raises:
            ValueError: for `safe_merge` with such an update; the base weight is then unchanged.
                Also for a quantized weight that can't be quantized again.
        """
        self.check_mergeable()
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if not self.has_adapter(adapter_name):
                continue
            self.warn_if_run_away(adapter_name)
            weight = self.get_base_weight()
            with torch.no_grad():
                current = self._current_update(adapter_name)
                update = LowRank(current.left.clone(), current.right.clone())
            delta = self._dense(update).to(weight.device)
            merged = (weight + delta).to(weight.dtype)
            if safe_merge and not self._is_finite(adapter_name, merged):
                raise ValueError(
                    "the merged weight must be finite, got NaN or infinity: NaNs detected in the merged "
                    f"weights. The adapter {adapter_name} seems to be broken"
                )
            if self.quantization_backend is None:
                # (W + d) - d is not always W in floating point. Remembering the few entries where it
                # differs makes unmerging exact without a second copy of the weight.
                wrong = (_bits(self._without(merged, delta)) != _bits(weight)).flatten().nonzero()[:, 0]
                values = weight.flatten()[wrong], merged.flatten()[wrong]
                self._merged[adapter_name] = _Merged(update, wrong, *values)
            else:
                nothing = torch.zeros(0, dtype=torch.long)
                self._merged[adapter_name] = _Merged(update, nothing, nothing, nothing, KeptWeight.of(self))
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter_name)

    def check_mergeable(self) -> None:
        """Refuse base weights that cannot be changed.

        Raises:
            ValueError: if the weight can't be quantized again, or is computed from other parameters.
        """
        backend, base = self.quantization_backend, self.get_base_layer()
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                "an update can be merged only into a weight that can be quantized again, which "
                f"{backend.backend_name} can't do here: use the adapter unmerged, or export it as a LoRA"
            )
        if backend is None and not isinstance(base._parameters.get(self.base_name), nn.Parameter):
            raise ValueError(
                "an update can be merged only into a weight that is a parameter of its layer, not computed "
                f"from others as by weight normalization, got such a {self.base_name!r} of "
                f"{type(base).__name__}: use the adapter unmerged, or remove the parametrization first"
            )

    def unmerge(self) -> None:
        """Take every merged update out of the base weight again.

        The weight becomes bitwise what it was (up to rounding if it moved to another device meanwhile, or
        adapted layers share it), also if the adapter was trained on or loaded anew since.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            update, wrong, values, merged, kept = self._merged.pop(adapter_name)
            if kept is not None:
                kept.put_back(self)
                continue
            weight = self.get_base_weight()
            restored = self._without(weight, self._dense(update).to(weight.device))
            untouched = _bits(weight.flatten()[wrong.to(weight.device)]) == _bits(merged.to(weight))
            restored.view(-1)[wrong.to(weight.device)[untouched]] = values.to(weight)[untouched]
            self.set_base_weight(restored)

    @torch.no_grad()
    def _is_finite(self, adapter_name: str, merged: Tensor) -> bool:
        # infinite free parameters may stand for a finite update, but nobody means them to
        free = self.free_parameters(adapter_name)
        tensors = (merged, free.out, free.into, free.angle, free.logits)
        return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)

    @staticmethod
    def _without(merged: Tensor, delta: Tensor) -> Tensor:
        return (merged - delta).to(merged.dtype).contiguous()

    # ------------------------------------------------------------------------------- runaway

    def warn_if_run_away(self, adapter_name: str) -> None:
        """Warn if the free parameters of an adapter have run away. Waits for the device."""
        free = self.free_parameters(adapter_name)
        if not free.out.is_meta and bool(self.method[adapter_name].has_run_away(free).any()):
            # the same text for every layer, so that Python shows it once and not once per layer
            warnings.warn(
                "The free parameters of an NB-LoRA layer have run away: they are so large that its "
                "update hardly moves any more, or (except in the svd parametrization) shrinks to zero. The "
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

    # ------------------------------------------------------------------------------- forward

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """The base layer's output plus the updates of the active adapters.

        Args:
            adapter_names: the adapter of each sample of the batch, "__base__" for none.

        Raises:
            ValueError: for a wrong number of names, or names while adapters are merged.
        """
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.quantization_backend is not None:
            put_scales_right(self.get_base_layer())
        if self.disable_adapters or self.merged:
            base_output: Tensor = self.base_layer(x, *args, **kwargs)
            return base_output
        if adapter_names is not None:
            return self._mixed_batch(self.base_layer(x, *args, **kwargs), x, adapter_names)
        return self._adapted(x, *args, **kwargs)

    def _adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter_name in filter(self.has_adapter, self.active_adapters):
            result = self._add(result, self._update_for(adapter_name, x), self._dropped(adapter_name, x))
        return result

    def _add(self, result: Tensor, update: LowRank, x: Tensor) -> Tensor:
        """An output plus what an update makes of the input x, after dropout."""
        return result + self._apply_update(update, x).to(result.dtype)

    def _update_for(self, adapter_name: str, x: Tensor) -> LowRank:
        """The update of an adapter in the dtype in which it acts on x."""
        self._watch(adapter_name)
        glance = x.numel() <= FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()
        update = self._current_update(adapter_name, self._dtype_for(x), glance=glance)
        if update.left.is_meta and not x.is_meta:  # PyTorch would compute with whatever is in memory
            raise ValueError(
                f"adapter {adapter_name!r} must be loaded before it is used, got it on the meta device"
            )
        return update

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        """What an operation with x computes in."""
        device = x.device.type
        lowers = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if lowers and x.dtype != torch.float64 else x.dtype

    def _dropped(self, adapter_name: str, x: Tensor) -> Tensor:
        dropped: Tensor = self.nblora_dropout[adapter_name](x)
        return dropped

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """The base weight plus the updates of the active adapters, with their gradients.

        For modules that use a weight without calling a layer. What is disabled or merged changes nothing.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return weight
        for adapter_name in filter(self.has_adapter, self.active_adapters):
            self._watch(adapter_name)
            weight = self._plus(weight, self._current_update(adapter_name))
        return weight

    def _plus(self, weight: Tensor, update: LowRank) -> Tensor:
        return weight + self._dense(update).to(weight.dtype)

    def _check_mixed_batch(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )

    def _mixed_batch(self, result: Tensor, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        for adapter_name in filter(self.has_adapter, dict.fromkeys(adapter_names)):
            rows = [i for i, name in enumerate(adapter_names) if name == adapter_name]
            index = torch.tensor(rows, device=x.device)
            some = x[index]
            update = self._update_for(adapter_name, some)
            added = self._apply_update(update, self._dropped(adapter_name, some))
            result = result.index_add(0, index.to(result.device), added.to(result.dtype))
        return result

    def extra_repr(self) -> str:
        text: str = quantization_extra_repr(self)
        return text

    def __repr__(self) -> str:
        return "nblora." + super().__repr__()


def _measure(layer: NBLoraLayer, _: object) -> None:
    layer._measure()


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def rounded_down(radius: Tensor, dtype: torch.dtype) -> Tensor:
    """The radius (float64) in another precision, rounded down; NaN stays."""
    rounded = radius.to(dtype)
    return torch.where(rounded > radius, rounded.nextafter(torch.zeros_like(rounded)), rounded)


def _scale(scale: float) -> float:
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got scale={scale!r}")
    return float(scale)


def _bits(weight: Tensor) -> Tensor:
    """Entries as integers of their size, which tell the signs of zeros apart."""
    return weight.contiguous().view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    )


def nblora_layers(model: nn.Module, adapter_name: str) -> dict[str, NBLoraLayer]:
    """The adapted layers of a model that have an adapter of this name, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NBLoraLayer) and module.has_adapter(adapter_name)
    }
