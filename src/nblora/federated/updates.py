"""Updates of many layers: their sum, and their form as named tensors for files and messages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nblora.lowrank import LowRank

Updates = Mapping[str, "LowRank | Tensor"]
"""For each layer its update, as thin factors or dense (m, n)."""

_PARTS = ("left", "right", "dense")


def add_updates(total: Updates, more: Updates) -> dict[str, LowRank | Tensor]:
    """The sum of both, layer by layer; a layer that one of them lacks counts as zero there.

    Factors are put beside each other, which is exact, as long as they take less memory than the matrix; from
    there on, and where one of both is dense, the sum is dense in float32, computed in float64.
    """
    return {
        name: _sum(total[name], more[name])
        if name in total and name in more
        else (total[name] if name in total else more[name])
        for name in dict.fromkeys((*total, *more))
    }


def _sum(first: LowRank | Tensor, second: LowRank | Tensor) -> LowRank | Tensor:
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        m, n = first.shape
        if (first.rank + second.rank) * (m + n) < m * n:
            left = torch.cat([first.left, second.left.to(first.left)], -1)
            return LowRank(left, torch.cat([first.right, second.right.to(first.right)], -2))
    return (_dense(first) + _dense(second)).float()


def _dense(update: LowRank | Tensor) -> Tensor:
    if isinstance(update, LowRank):
        return LowRank(update.left.double(), update.right.double()).dense()
    return update.double()


def pack(updates: Updates) -> dict[str, Tensor]:
    """Named tensors: NAME.left (m, k) and NAME.right (k, n), or NAME.dense (m, n)."""
    packed = {}
    for name, update in updates.items():
        if isinstance(update, LowRank):
            packed[f"{name}.left"] = update.left.detach().cpu().contiguous()
            packed[f"{name}.right"] = update.right.detach().cpu().contiguous()
        else:
            packed[f"{name}.dense"] = update.detach().cpu().contiguous()
    return packed


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, LowRank | Tensor]:
    """The updates that `pack` made tensors of.

    Raises:
        ValueError: for another name, a factor without its other, or factors that don't fit.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if not name or part not in _PARTS:
            raise ValueError(f"names of tensors must end in .left, .right or .dense, got {key!r}")
        parts.setdefault(name, {})[part] = tensor
    updates: dict[str, LowRank | Tensor] = {}
    for name, found in parts.items():
        if set(found) == {"dense"}:
            updates[name] = found["dense"]
        elif set(found) == {"left", "right"}:
            updates[name] = LowRank(found["left"], found["right"])
        else:
            raise ValueError(f"an update must be left and right, or dense, got {sorted(found)} of {name!r}")
    return updates
