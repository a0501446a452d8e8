"""What an adapter of one layer consists of: its tensors, and what turns them into its update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nblora.bounds import Norm, parse_norm
from nblora.lowrank import LowRank
from nblora.parametrizations import (
    FreeParameters,
    Parametrization,
    bounded_update,
    bounded_updates,
    has_run_away,
    pull_back,
)
from nblora.tuner.config import NBLoraConfig


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

    def updates(self, batches: Sequence[FreeParameters], radii: Sequence[Tensor]) -> list[LowRank]:
        return bounded_updates(
            batches,
            norm=self.norm,
            radii=radii,
            parametrization=self.parametrization,
            temperature=self.temperature,
        )

    def pull_back(self, update: LowRank, r: int, radius: Tensor) -> FreeParameters:
        return pull_back(
            update,
            r,
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


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 keeps in shards; then all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
        return whole(self.weight).clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also from checkpoints whose vectors are (k,), not (k, 1)."""
        saved = state_dict.get(f"{prefix}weight")
        if isinstance(saved, Tensor) and saved.shape == self.weight.shape[:-1]:
            state_dict[f"{prefix}weight"] = saved[..., None]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}"


class Radius(nn.Module):
    """The absolute radius of one layer's ball (a buffer, 0-dimensional, or one for each expert).

    A cast of the model to half precision must not move the bound, so casts pass this buffer by.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self) -> Tensor:
        """The radius. Called where it is computed with: offloaded buffers are there only then."""
        return self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Radius:
        before = self.weight
        super()._apply(fn, recurse)
        if self.weight.dtype != before.dtype:
            self.weight = before.to(self.weight.device)
        return self


def stored(module: nn.Module) -> Tensor | None:
    """The tensor of a leaf module; None where it can't be read without calling the module and compared later.

    It looks where modules keep things, past their attribute access, as it is asked for every layer and step.
    """
    members = module.__dict__
    if type(module) is FreeWeight:
        weight = members["_parameters"].get("weight")
        known = type(weight) is nn.Parameter
    else:
        weight = members["_buffers"].get("weight")
        known = type(weight) is Tensor and type(module) is Radius
    away = "weight" in members or "forward" in members  # FSDP's views, offloading
    if not known or away or members["_forward_pre_hooks"] or members["_forward_hooks"] or weight.is_meta:
        return None
    if weight.device.type != "cpu" and weight.is_inference():  # which have no versions
        return None
    tensor: Tensor = weight
    return tensor
