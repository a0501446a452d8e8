"""Model and data: digits upright for everybody, rotated by a quarter turn at the clients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nblora import NBLoraConfig
from nblora.federated import Budget, FederationPlan

RANKS = (2, 4, 4, 8, 8)
Data = tuple[Tensor, Tensor]  # pixels (N, 64) from 0 to 1, labels (N,)


def new_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def load_model(base: str | Path) -> nn.Module:
    model = new_model()
    model.load_state_dict(load_file(base))
    return model


def split() -> tuple[Data, Data, Data]:
    """597 upright digits, public; 400 rotated ones to test on, public; 800 rotated ones, the clients'."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order] / 16, torch.tensor(digits.target[order])
    upright = torch.tensor(images.reshape(-1, 64), dtype=torch.float32)
    rotated = torch.tensor(np.rot90(images, axes=(1, 2)).reshape(-1, 64).copy(), dtype=torch.float32)
    return (
        (upright[:597], labels[:597]),
        (rotated[597:997], labels[597:997]),
        (rotated[997:], labels[997:]),
    )


def part(index: int, count: int) -> Data:
    """One client's own digits."""
    pixels, labels = split()[2]
    return pixels[index::count], labels[index::count]


def train(model: nn.Module, data: Data, *, epochs: int, learning_rate: float, seed: int = 0) -> None:
    """Train whatever requires gradients, in batches of 32."""
    pixels, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(32):
            optimizer.zero_grad()
            cross_entropy(model(pixels[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    pixels, labels = data
    return (model.eval()(pixels).argmax(-1) == labels).double().mean().item()


def plan_for(model: nn.Module, config: Mapping[str, Any]) -> FederationPlan:
    """What the run's configuration says, as a plan."""
    epsilon = float(config["epsilon"])
    return FederationPlan.for_model(
        model,
        NBLoraConfig(
            r=max(RANKS), norm="frobenius", bound=float(config["bound"]), target_modules="all-linear"
        ),
        rounds=int(config["rounds"]),
        n_total=int(config["clients"]),
        budget=Budget(epsilon, 1e-5, "add-remove") if epsilon else None,
        release_rank=int(config["release-rank"]) or None,
    )
