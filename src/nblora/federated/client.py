"""The client's side of a round: a bounded adapter on top of the global update, as plain thin factors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from nblora.federated.updates import Updates
from nblora.lowrank import LowRank
from nblora.tuner import NBLoraConfig, NBLoraLayer, nblora_layers

if TYPE_CHECKING:
    from nblora.federated.plan import FederationPlan

_ADAPTER = "default"
_PREFIX = "base_model.model."  # PEFT's, before names in the base model


@dataclass(frozen=True)
class Task:
    """What a server asks of a client in one round.

    Attributes:
        round: 1 for the first.
        plan: bounds and layers.
        updates: the global update so far, to be added to the base weights; empty in the first round.
    """

    round: int
    plan: FederationPlan
    updates: Updates


class FederatedClient:
    """Trains one client's adapter.

    Args:
        make_model: builds the public base model, on the device to train on.
        train: trains the adapted model in place, called with it and the number of the round. A loop of its
            own, or a `transformers.Trainer`; only the adapter requires gradients.
        rank: of this client's adapter; more than the plan's `max_rank` is cut to it.
        options: of `NBLoraConfig`, which are the client's own choice: parametrization, temperature, dropout.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        train: Callable[[nn.Module, int], object],
        *,
        rank: int,
        **options: Any,
    ) -> None:
        self.make_model, self.train, self.rank, self.options = make_model, train, rank, options

    def fit(self, task: Task) -> dict[str, LowRank]:
        """This client's update (m, k), (k, n) of every layer, in float32 on the CPU; inside the bounds.

        Raises:
            ValueError: if the base model is not the plan's.
        """
        rank = min(self.rank, task.plan.max_rank)
        model = adapted_model(self.make_model(), task.plan, task.updates, rank=rank, **self.options)
        self.train(model, task.round)
        return client_updates(model)


def adapted_model(
    model: nn.Module, plan: FederationPlan, updates: Updates, *, rank: int, **options: Any
) -> nn.Module:
    """A base model with the global update in its weights, and a fresh bounded adapter that starts at zero.

    Args:
        model: the base model, which is changed.
        updates: the global update; layers that it lacks are left alone.
        rank: of the adapter; where a layer has fewer inputs or outputs, their number.
        options: of `NBLoraConfig`: parametrization, temperature, dropout.

    Returns:
        A `peft.PeftModel` in training mode.

    Raises:
        ValueError: if the model's layers or weights are not the plan's, or are quantized.
    """
    missing = sorted(set(plan.layers) - {name for name, _ in model.named_modules()})
    if missing:
        raise ValueError(f"the base model must have the layers of the plan, got none named {missing}")
    if plan.base is not None and (found := base_fingerprint(model, plan.layers)) != plan.base:
        raise ValueError(
            "the base weights must be those of the plan, bit by bit, "
            f"got the fingerprint {found[:16]} instead of {plan.base[:16]}"
        )
    radii = {name: layer.radius for name, layer in plan.layers.items() if layer.radius > 0}
    config = NBLoraConfig(
        r=rank,
        norm=plan.norm,
        bound_kind="absolute",
        # the longest first: a pattern also matches names that end in it
        bound_pattern={re.escape(name): radii[name] for name in sorted(radii, key=len, reverse=True)},
        target_modules="|".join(f"(?:{re.escape(name)})" for name in radii),
        **options,
    )
    adapted: nn.Module = get_peft_model(model, config)
    layers = _layers(adapted)
    for name, layer in layers.items():
        planned = plan.layers[name]
        if layer.out_in_features != tuple(planned.shape) or not (
            0 < (radius := float(layer.radius(_ADAPTER))) <= planned.radius
        ):
            raise ValueError(
                f"layer {name!r} must have the shape {planned.shape} and radius {planned.radius!r} of the "
                f"plan, got {layer.out_in_features} and {radius!r}"
            )
    for name, update in updates.items():
        if name in layers:  # the others have radius 0, so their update is 0
            _add_to_base(layers[name], update)
    adapted.train()
    return adapted


def client_updates(model: nn.Module) -> dict[str, LowRank]:
    """The updates of an adapted model's layers, by their names in the base model; float32 on the CPU."""
    with torch.no_grad():
        found = {name: layer.low_rank_update(_ADAPTER) for name, layer in _layers(model).items()}
        return {name: LowRank(u.left.float().cpu(), u.right.float().cpu()) for name, u in found.items()}


def apply_updates(model: nn.Module, plan: FederationPlan, updates: Updates) -> nn.Module:
    """The base model with a global update in its weights, for use or evaluation; the model is changed.

    Raises:
        ValueError: as `adapted_model`.
    """
    training = model.training
    with _requiring_gradients_as_before(model):
        adapted: Any = adapted_model(model, plan, updates, rank=1)
        plain: nn.Module = adapted.unload()
    return plain.train(training)


def base_fingerprint(model: nn.Module, layers: Iterable[str]) -> str:
    """SHA-256 of the weights of some layers, with their names, types and shapes."""
    digest = hashlib.sha256()
    modules = dict(model.named_modules())
    for name in sorted(layers):
        for key, tensor in modules[name].state_dict().items():
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def measured_radii(model: nn.Module, config: NBLoraConfig) -> dict[str, tuple[tuple[int, int], float]]:
    """Shape and absolute radius of every layer that a configuration adapts; the model stays as it was.

    Raises:
        ValueError: if it trains what has no bound, or batches of matrices.
    """
    unbounded = {
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": None if config.bias == "none" else config.bias,
    }
    for option, value in unbounded.items():
        if value:
            raise ValueError(f"federated clients must train only what has a bound, got {option}={value!r}")
    if config.target_parameters:
        raise ValueError(
            "federated layers must have one matrix each, got "
            f"target_parameters={sorted(config.target_parameters)}"
        )
    with _requiring_gradients_as_before(model):
        adapted: Any = get_peft_model(model, config)
        try:
            return {
                name: (layer.out_in_features, float(layer.radius(_ADAPTER)))
                for name, layer in _layers(adapted).items()
            }
        finally:
            adapted.unload()


def _layers(model: nn.Module) -> dict[str, NBLoraLayer]:
    layers = {}
    for name, layer in nblora_layers(model, _ADAPTER).items():
        plain = layer.target(name).removeprefix(_PREFIX)
        if layer.quantization_backend is not None:
            raise ValueError(
                "base weights must not be quantized, since rounding would lose the global update, "
                f"got {plain!r} of type {type(layer.get_base_layer()).__name__}"
            )
        layers[plain] = layer
    return layers


@torch.no_grad()
def _add_to_base(layer: NBLoraLayer, update: LowRank | Tensor) -> None:
    weight = layer.get_base_weight()
    changed = weight.clone(memory_format=torch.contiguous_format)
    dense = update.dense() if isinstance(update, LowRank) else update
    layer._matrix(changed).add_(dense.to(changed))  # a view
    layer.set_base_weight(changed)


@contextmanager
def _requiring_gradients_as_before(model: nn.Module) -> Iterator[None]:
    before: Mapping[nn.Parameter, bool] = {p: p.requires_grad for p in model.parameters()}
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
