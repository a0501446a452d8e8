"""Tasks of the privacy benchmark: a public base model, and clients with data that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nblora.lowrank import LowRank

Update = LowRank | Tensor
"""Of one layer, (..., m, n): leading axes are clients, or draws of the noise."""

PUBLIC, CLIENTS, VALIDATION = 400, 800, 200
"""Pictures; the other 397 of scikit-learn's digits are for the test."""
SIZES = (64, 64, 10)
SKEW = 0.5
"""Of the Dirichlet distribution that a client's labels are drawn from (Hsu et al., arXiv 1909.06335)."""


@dataclass(frozen=True)
class Examples:
    images: Tensor  # (..., b, 64)
    labels: Tensor  # (..., b)

    def __getitem__(self, index: Tensor) -> Examples:
        return Examples(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Task:
    """What may be looked at before the end: there is no test data in here."""

    weights: tuple[Tensor, ...]  # (m, n) each
    biases: tuple[Tensor, ...]  # (m,) each, never adapted
    clients: Examples  # (N, b)
    validation: Examples  # public

    @property
    def count(self) -> int:
        return len(self.clients.labels)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {f"layer {i}": (len(w), w.shape[1]) for i, w in enumerate(self.weights)}

    def radii(self, bound: float) -> list[float]:
        """`bound` times the spectral norm of each base weight, as everywhere in this library."""
        return [bound * float(torch.linalg.matrix_norm(weight, 2)) for weight in self.weights]

    def logits(self, images: Tensor, updates: list[Update]) -> Tensor:
        """(..., b, 10) for images (..., b, 64) and updates with the same leading axes."""
        for i, (weight, bias, update) in enumerate(zip(self.weights, self.biases, updates)):
            change = (
                (images @ update.right.mT) @ update.left.mT
                if isinstance(update, LowRank)
                else images @ update.mT
            )
            images = images @ weight.mT + bias + change
            if i < len(self.weights) - 1:
                images = images.relu()
        return images

    def accuracy(self, examples: Examples, updates: list[Tensor]) -> Tensor:
        """(...,) of updates (..., m, n)."""
        batch = updates[0].shape[:-2]
        found = self.logits(examples.images.expand(*batch, *examples.images.shape), list(updates))
        return (found.argmax(-1) == examples.labels).double().mean(-1)


# --- what the clients' pictures look like; the base model has seen them as they are ---


def _rows_missing(images: Tensor) -> Tensor:
    seen = images.clone()
    seen[:, :3] = 0
    return seen


def _columns_missing(images: Tensor) -> Tensor:
    return _rows_missing(images.mT).mT


def _rotated(images: Tensor) -> Tensor:
    angle = math.radians(20)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    grid = F.affine_grid(turn.expand(len(images), 2, 3), [len(images), 1, 8, 8], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": _rows_missing,
    "columns": _columns_missing,
    "rotated": _rotated,
}


def make(name: str, seed: int, count: int, skewed: bool) -> tuple[Task, Examples]:
    """The task, and the test data that only its final models see.

    Args:
        name: of the change of the pictures, in CHANGES.
        seed: of the split, the base model and the clients' labels.
        count: N, of clients; each has 800 / N pictures.
        skewed: by label.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = torch.tensor(digits.images[order] / 16, dtype=torch.float32)  # (1797, 8, 8)
    labels = torch.tensor(digits.target[order])
    rest = len(labels) - PUBLIC - CLIENTS - VALIDATION
    public, clients, validation, test = torch.arange(len(labels)).split([PUBLIC, CLIENTS, VALIDATION, rest])
    seen = Examples(images.flatten(1), labels)
    changed = Examples(CHANGES[name](images).flatten(1), labels)
    weights, biases = _pretrained(seen[public], seed)
    parts = clients[(_skewed if skewed else _even)(labels[clients], count, seed)]
    return Task(weights, biases, changed[parts], changed[validation]), changed[test]


def _even(labels: Tensor, count: int, seed: int) -> Tensor:
    """Which pictures (N, b) a client has; they come in random order already."""
    return torch.arange(len(labels)).view(count, -1)


def _skewed(labels: Tensor, count: int, seed: int) -> Tensor:
    """Equally many for each client, labels by its own Dirichlet weights as long as there are any left."""
    generator = np.random.default_rng([seed, count])
    pools = [list(generator.permutation(np.flatnonzero(labels.numpy() == label))) for label in range(10)]
    parts = []
    for _ in range(count):
        wanted = generator.dirichlet([SKEW] * 10)
        mine = []
        for _ in range(len(labels) // count):
            left = np.array([bool(pool) for pool in pools])
            weights = wanted * left if (wanted * left).sum() > 1e-9 else left * 1.0
            mine.append(pools[generator.choice(10, p=weights / weights.sum())].pop())
        parts.append(mine)
    return torch.tensor(np.array(parts))


def _pretrained(examples: Examples, seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    weights = [
        ((torch.rand(m, n, generator=generator) * 2 - 1) / math.sqrt(n)).requires_grad_()
        for n, m in pairwise(SIZES)
    ]
    biases = [torch.zeros(m, requires_grad=True) for m in SIZES[1:]]
    optimizer = torch.optim.Adam([*weights, *biases], lr=3e-3, weight_decay=1e-4)
    model = Task(tuple(weights), tuple(biases), examples, examples)
    nothing: list[Update] = [torch.zeros(m, n) for n, m in pairwise(SIZES)]
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model.logits(examples.images, nothing), examples.labels).backward()
        optimizer.step()
    return tuple(w.detach() for w in weights), tuple(b.detach() for b in biases)
