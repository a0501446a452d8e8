"""What an adapter of one layer consists of: its tensors, and what turns them into its update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nblora.bounds import Norm, parse_norm
from nblora.lowrank import LowRank
from nblora.parametrizations import (
    FreeParameters,
    Parametrization,
    bounded_update,
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


# Note [Factors are kept while nobody trains]
#
# In eval mode without gradients the thin factors of an update are the same from call to call, and computing
# them is most of what a layer costs when it generates token by token. They are kept until a tensor that
# they come from changes. How to tell: a tensor's version counter misses writes through `.data` (PEFT's
# hotswap, some optimizers) and through NumPy. On the CPU the tensors are therefore compared with copies,
# which is exact and costs a small part of the factors' use. On other devices a comparison would wait for the
# device on every call; there the version and the address decide, and since train() and eval() drop what
# was kept, only a write through `.data` between two calls in eval mode goes unnoticed.
# Tensors that live elsewhere between calls (FSDP, offloading: hooks on the leaf modules) are never kept.


class _Kept(NamedTuple):
    method: Method
    sources: list[Tensor]
    versions: list[int]
    update: LowRank

    def is_of(self, method: Method, sources: Sequence[Tensor]) -> bool:
        return (
            self.method is method
            and len(self.sources) == len(sources)
            and all(map(_same, self.sources, self.versions, sources))
        )


def _same(kept: Tensor, version: int, now: Tensor) -> bool:
    if kept.device != now.device or kept.dtype != now.dtype or kept.shape != now.shape:
        return False
    if now.device.type == "cpu":
        return torch.equal(kept, now)
    return kept.data_ptr() == now.data_ptr() and version == now._version


class Factors(dict[str, _Kept]):
    """The thin factors of adapters by name: Note [Factors are kept while nobody trains]."""

    def get_or_make(
        self, adapter_name: str, method: Method, sources: Sequence[Tensor], make: Callable[[], LowRank]
    ) -> LowRank:
        kept = self.get(adapter_name)
        if kept is None or not kept.is_of(method, sources):
            tensors = [s.clone() if s.device.type == "cpu" else s.detach() for s in sources]
            # keeping the tensors keeps their addresses from being given to others
            versions = [0 if s.device.type == "cpu" else s._version for s in sources]
            kept = self[adapter_name] = _Kept(method, tensors, versions, make())
        return kept.update

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a model start without."""
        return Factors, ()


def readable(module: nn.Module) -> bool:
    """Whether the tensor of a leaf module can be read without calling the module, and compared later."""
    weight: Any = module.weight
    return (
        type(module) in (FreeWeight, Radius)
        and type(weight) in ((nn.Parameter,) if type(module) is FreeWeight else (Tensor,))
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and "forward" not in module.__dict__
        and not weight.is_meta
        and (weight.device.type == "cpu" or not weight.is_inference())  # which have no versions
    )
