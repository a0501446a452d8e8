"""Weighted sums of adapters of one model, with a bound of their own."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from nblora.lowrank import LowRank
from nblora.tuner.config import NBLoraConfig
from nblora.tuner.layer import NBLoraLayer, nblora_layers, rounded_down
from nblora.tuner.parameter import ParamWrapper

if TYPE_CHECKING:
    from nblora.tuner.model import NBLoraModel

Combination = Literal["cat", "svd"]


@torch.no_grad()
def combine(
    tuner: NBLoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    *,
    combination_type: Combination,
    svd_rank: int | None,
    bound: float | None,
) -> None:
    """`NBLoraModel.add_weighted_adapter`."""
    _check(tuner, adapters, weights, adapter_name, combination_type, svd_rank, bound)
    configs: list[NBLoraConfig] = [tuner.peft_config[name] for name in adapters]
    terms = dict(zip(adapters, map(float, weights)))
    layers: dict[str, NBLoraLayer] = {}
    for name in adapters:
        layers |= nblora_layers(tuner.model, name)
    ranks = [max([config.r, *config.rank_pattern.values()]) for config in configs]
    rank = sum(ranks) if combination_type == "cat" else svd_rank or max(ranks)
    sums, radii = {}, {}
    for name, layer in layers.items():
        sums[name], reach = _weighted_sum(layer, terms)
        radii[name] = reach * (bound or 1.0)
    largest = {layers[name].target(name): radius.max().item() for name, radius in radii.items()}
    tuner.peft_config[adapter_name] = replace(
        configs[0],
        r=rank,
        rank_pattern={},
        bound_kind="absolute",
        bound=max(largest.values()) or 1.0,
        # anchored, for PEFT lets a pattern match the end of a name too
        bound_pattern={f"^{re.escape(name)}": value for name, value in largest.items() if value > 0},
        **_targets(configs, layers),
    )
    tuner.peft_config[adapter_name].inference_mode = False
    tuner.inject_adapter(tuner.model, adapter_name)
    for name, layer in layers.items():
        radius = layer.radius(adapter_name)
        radius.copy_(rounded_down(radii[name], radius.dtype))
        u, sigma, v = sums[name].svd()
        # also undoes the rounding that may carry a sum over the bound it has by the triangle inequality
        sigma = layer.method[adapter_name].norm.project(sigma[..., :rank], radius.to(sigma))
        layer.set_update(adapter_name, LowRank(u[..., :rank] * sigma[..., None, :], v[..., :rank].mT))


def _weighted_sum(layer: NBLoraLayer, terms: dict[str, float]) -> tuple[LowRank, Tensor]:
    """Σ weight · update, and Σ |weight · scale| · radius, over the adapters that a layer has."""
    lefts, rights, reach = [], [], torch.zeros(layer.batch_shape, dtype=torch.float64)
    for name, weight in terms.items():
        if not layer.has_adapter(name):
            continue
        update = layer.low_rank_update(name)
        lefts.append(weight * update.left.double())
        rights.append(update.right.double())
        reach = reach.to(update.left.device) + abs(weight * layer.scaling[name]) * layer.radius(name).double()
    total = LowRank(torch.cat(lefts, dim=-1), torch.cat(rights, dim=-2))
    small = reach.max() < torch.finfo(torch.float32).max
    if not bool(total.left.isfinite().all() & total.right.isfinite().all() & small):
        raise ValueError(f"the sum of adapters must be finite, got NaN or infinity from {terms}")
    return total, reach


def _targets(configs: list[NBLoraConfig], layers: dict[str, NBLoraLayer]) -> dict[str, Any]:
    """The options of a configuration that names all of the layers."""
    fields = (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "target_parameters",
    )
    first, *others = ({field: getattr(config, field) for field in fields} for config in configs)
    if all(other == first for other in others):
        return first
    modules = sorted(name for name, layer in layers.items() if not isinstance(layer, ParamWrapper))
    return dict.fromkeys(fields) | {
        "target_modules": "|".join(map(re.escape, modules)) or [],
        "target_parameters": next((c.target_parameters for c in configs if c.target_parameters), None),
    }


def _check(
    tuner: NBLoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
    bound: float | None,
) -> None:
    known = tuner.peft_config
    if not adapters or len(set(adapters)) != len(adapters) or not set(adapters) <= known.keys():
        raise ValueError(f"adapters must be different names out of {sorted(known)}, got {list(adapters)}")
    numbers = isinstance(weights, Sequence) and all(isinstance(w, (int, float)) for w in weights)
    if not numbers or len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"weights must be one finite number for each of {len(adapters)} adapters, got {weights!r}"
        )
    if adapter_name in known or "." in adapter_name or not adapter_name:
        raise ValueError(f"adapter_name must be new and without dots, got {adapter_name!r}")
    if combination_type not in ("cat", "svd"):
        raise ValueError(
            'combination_type must be "cat" or "svd", which add updates; LoRA\'s other types work on single '
            f"factors, which here have no meaning of their own, got {combination_type!r}"
        )
    if svd_rank is not None and (combination_type != "svd" or svd_rank < 1):
        raise ValueError(
            f'svd_rank must be an integer >= 1, and is only for "svd", got svd_rank={svd_rank!r} and '
            f"{combination_type!r}"
        )
    if bound is not None and (isinstance(bound, bool) or not 0 < bound <= 1):
        raise ValueError(
            f"bound must be in (0, 1], times the bound that the sum has anyway, got bound={bound!r}"
        )
    norms = {name: known[name].norm for name in adapters}
    if len(set(norms.values())) > 1:
        raise ValueError(f"adapters to add must bound the same norm, got {norms}")
    shared = [
        module
        for module in tuner.model.modules()
        if isinstance(module, ModulesToSaveWrapper) and sum(a in module.modules_to_save for a in adapters) > 1
    ]
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)."
        )
