"""Methods of the privacy benchmark: how clients train, and how their updates are released."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from privacy_tasks import Examples, Task, Update
from torch import Tensor

from nblora.bounds import parse_norm
from nblora.lowrank import LowRank
from nblora.parametrizations import (
    FreeParameters,
    Parametrization,
    bounded_updates,
    descent_step,
    pull_back,
    zero_start,
)
from nblora.privacy import PrivateMean, gaussian_mu, private_mean, sensitivity, split_noise

FROBENIUS = parse_norm("frobenius")
DELTA = 1e-5
STEPS = (5, 10, 20, 40, 80)
REHEARSALS = 8
"""Draws of the noise by which settings are compared; the same for all of them, none is used in a result."""
TRUNCATIONS = (2, 4, 8)
FIRST_STEP = 0.05
"""Of what starts at the gradient, as a share of the bound; by trials on other seeds."""


# --- how clients train ---


@dataclass(frozen=True)
class Adapter:
    """What is trained, and whether its bound holds while it is."""

    kind: Literal["dense", "LoRA", "NB-LoRA"]
    rank: int | None = None
    inside: bool = False
    from_gradient: bool = False
    parametrization: Parametrization = "radial"  # of NB-LoRA

    @property
    def rates(self) -> tuple[tuple[str, float], ...]:
        """Optimizers and learning rates to choose from."""
        return RATES["NB-LoRA, joint" if self.parametrization == "joint" else self.kind]


RATES = {
    "dense": (("sgd", 0.03), ("sgd", 0.1), ("sgd", 0.3), ("adam", 3e-3), ("adam", 1e-2), ("adam", 3e-2)),
    "LoRA": (
        ("sgd", 0.01),
        ("sgd", 0.03),
        ("sgd", 0.1),
        ("sgd", 0.3),
        ("adam", 1e-2),
        ("adam", 3e-2),
        ("adam", 1e-1),
    ),
    "NB-LoRA": (("sgd", 0.03), ("sgd", 0.1), ("sgd", 0.3), ("sgd", 1.0), ("adam", 1e-2), ("adam", 3e-2)),
    "NB-LoRA, joint": (("sgd", 0.1), ("sgd", 1.0), ("adam", 1e-2), ("adam", 3e-2), ("adam", 1e-1)),
}
"""Around what trials on other seeds had found."""


def bounds(count: int) -> tuple[float, ...]:
    """Times the spectral norm of a base weight; the noise is in proportion to bound / N."""
    return (
        (0.035, 0.05, 0.08, 0.12, 0.18, 0.27, 0.4) if count < 50 else (0.12, 0.18, 0.27, 0.4, 0.6, 0.9, 1.35)
    )


@dataclass(frozen=True)
class Setting:
    """What a row has chosen."""

    bound: float
    optimizer: str
    rate: float
    steps: int
    rank: int | None = None  # that the release is cut to


def train(
    task: Task, adapter: Adapter, optimizer: str, rate: float, bound: float, seed: int
) -> Iterator[tuple[int, list[Update]]]:
    """All clients at once, each on its own data from its own start: updates (N, m, n) after each of STEPS."""
    parameters, updates, keep_inside = _trainable(task, adapter, bound, seed)
    stepper: torch.optim.Optimizer = (
        torch.optim.Adam(parameters, lr=rate)
        if optimizer == "adam"
        else torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    )
    for step in range(1, max(STEPS) + 1):
        stepper.zero_grad()
        _losses(task, updates()).backward()
        stepper.step()
        keep_inside()
        if step in STEPS:
            with torch.no_grad():
                yield step, [_copy(update) for update in updates()]


def _trainable(
    task: Task, adapter: Adapter, bound: float, seed: int
) -> tuple[list[Tensor], Callable[[], list[Update]], Callable[[], None]]:
    """Parameters, the updates that they stand for, and what is to be done after a step."""
    generator = torch.Generator().manual_seed(seed)
    count, shapes, radii = task.count, list(task.shapes.values()), task.radii(bound)
    if adapter.kind == "dense":
        dense = [torch.zeros(count, m, n, requires_grad=True) for m, n in shapes]

        @torch.no_grad()
        def project() -> None:
            for update, radius in zip(dense, radii):
                update.mul_(_shrink(update, radius))

        return dense, lambda: list(dense), project if adapter.inside else _nothing
    rank = adapter.rank or 1
    if adapter.kind == "LoRA":
        starts = (
            [_rows_of(gradient, rank) for gradient in _gradients(task)]
            if adapter.from_gradient
            else [_uniform(generator, count, rank, n) for _, n in shapes]
        )
        rights = [start.requires_grad_() for start in starts]
        lefts = [torch.zeros(count, m, rank, requires_grad=True) for m, _ in shapes]
        pairs = list(zip(lefts, rights))
        return [*lefts, *rights], lambda: [LowRank(left, right) for left, right in pairs], _nothing
    limits = [torch.full((count,), radius) for radius in radii]
    inside = (
        [
            _descended(gradient, rank, limit, adapter.parametrization)
            for gradient, limit in zip(_gradients(task), limits)
        ]
        if adapter.from_gradient
        else [
            zero_start(
                m,
                n,
                rank,
                norm=FROBENIUS,
                parametrization=adapter.parametrization,
                batch_shape=(count,),
                generator=generator,
            )
            for m, n in shapes
        ]
    )
    free = [start.map(Tensor.requires_grad_) for start in inside]

    def bounded() -> list[Update]:
        return [*bounded_updates(free, norm=FROBENIUS, radii=limits, parametrization=adapter.parametrization)]

    tensors = [tensor for each in free for tensor in (each.out, each.into, each.logits) if tensor is not None]
    return tensors, bounded, _nothing


def _uniform(generator: torch.Generator, count: int, rank: int, n: int) -> Tensor:
    """PEFT's start of lora_A."""
    return (torch.rand(count, rank, n, generator=generator) * 2 - 1) / math.sqrt(n)


def _gradients(task: Task) -> list[Tensor]:
    """(N, m, n): each client's first."""
    nothing = [torch.zeros(task.count, m, n, requires_grad=True) for m, n in task.shapes.values()]
    return list(torch.autograd.grad(_losses(task, list(nothing)), nothing))


def _rows_of(gradient: Tensor, rank: int) -> Tensor:
    """lora_A (N, r, n) that spans what a gradient wants, as in LoRA-GA (arXiv 2407.05000).

    In the scale of `_uniform`; without LoRA-GA's start of lora_B, so that the update starts at zero.
    """
    return torch.linalg.svd(gradient, full_matrices=False)[2][:, :rank] / math.sqrt(3)


def _descended(
    gradient: Tensor, rank: int, radius: Tensor, parametrization: Parametrization
) -> FreeParameters:
    """What `nblora.start_at_gradient` does, for all clients at once."""
    step = descent_step(LowRank.from_dense(gradient), rank, norm=FROBENIUS, radius=radius, step=FIRST_STEP)
    return pull_back(step, rank, norm=FROBENIUS, radius=radius, parametrization=parametrization)


def _losses(task: Task, updates: list[Update]) -> Tensor:
    """The sum over clients of each one's mean: none of them feels the others."""
    logits = task.logits(task.clients.images, updates)
    labels = task.clients.labels
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]


def _nothing() -> None:
    pass


def _copy(update: Update) -> Update:
    if isinstance(update, LowRank):
        return LowRank(update.left.detach().clone(), update.right.detach().clone())
    return update.detach().clone()


def _shrink(update: Tensor, radius: float) -> Tensor:
    """(..., 1, 1): what brings a matrix into the Frobenius ball."""
    norm = torch.linalg.matrix_norm(update, keepdim=True)
    return (radius / norm.clamp(min=1e-12)).clamp(max=1)


# --- how updates are released ---


def release(
    task: Task, updates: list[Update], setting: Setting, adapter: Adapter, epsilon: float, seed: int
) -> PrivateMean:
    """What the library publishes. What has a bound by training is never clipped but rejected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="seeded noise", category=UserWarning)
        return private_mean(
            [
                {name: _of_client(update, client) for name, update in zip(task.shapes, updates)}
                for client in range(task.count)
            ],
            bounds=dict(zip(task.shapes, task.radii(setting.bound))),
            shapes=task.shapes,
            adjacency="add-remove",
            n_total=task.count,
            epsilon=epsilon,
            delta=DELTA,
            on_excess="reject" if adapter.inside else "project",
            rank=setting.rank,
            rng=seed,
        )


def _of_client(update: Update, client: int) -> Update:
    return (
        LowRank(update.left[client], update.right[client]) if isinstance(update, LowRank) else update[client]
    )


def dense(update: Update) -> Tensor:
    return update.dense() if isinstance(update, LowRank) else update


def clipped_mean(task: Task, updates: list[Update], bound: float) -> list[Tensor]:
    """What a release is without noise."""
    matrices = [dense(update) for update in updates]
    return [(each * _shrink(each, radius)).mean(0) for each, radius in zip(matrices, task.radii(bound))]


def deviations(task: Task, bound: float, epsilon: float) -> tuple[float, ...]:
    """Of a release's noise."""
    moved = sensitivity(task.radii(bound), adjacency="add-remove", n_total=task.count)
    sizes = [m * n for m, n in task.shapes.values()]
    return split_noise(moved, sizes, mu=_mu(epsilon))


@functools.cache
def _mu(epsilon: float) -> float:
    return gaussian_mu(epsilon=epsilon, delta=DELTA)


def truncated(
    matrices: list[Tensor], ranks: tuple[int | None, ...]
) -> Iterator[tuple[int | None, list[Tensor]]]:
    """The best approximation of each rank, None for the matrices as they are."""
    parts = []
    if set(ranks) != {None}:
        parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    for rank in ranks:
        if rank is None:
            yield None, matrices
        else:
            yield rank, [(u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :] for u, s, vh in parts]


# --- rows of the table ---


@dataclass(frozen=True)
class Method:
    """A row of the table. Without `private` there is no noise, and a bound only where it helps."""

    adapter: Adapter
    truncates: bool = False
    private: bool = True

    @property
    def ranks(self) -> tuple[int | None, ...]:
        return TRUNCATIONS if self.truncates else (None,)

    def settings(self, count: int) -> int:
        """How many it chooses from."""
        trained = len(self.adapter.rates) * len(STEPS)
        return trained * (len(bounds(count)) * len(self.ranks) if self.private else len(bounds(count)) + 1)


CEILING, CLIPPED, LORA, STARTED, OURS, OURS_STARTED, OURS_JOINT, BALL = (
    "mean without privacy",
    "full rank, clipped",
    "LoRA r=4, clipped",
    "LoRA r=4, gradient start, clipped",
    "NB-LoRA r=8",
    "NB-LoRA r=8, gradient start",
    "NB-LoRA r=8, joint",
    "full rank, in the ball",
)
_LORA4, _LORA8 = Adapter("LoRA", 4), Adapter("LoRA", 8)
_NB4, _NB8 = Adapter("NB-LoRA", 4, inside=True), Adapter("NB-LoRA", 8, inside=True)
METHODS = {
    CEILING: Method(Adapter("dense"), private=False),
    CLIPPED: Method(Adapter("dense")),
    BALL: Method(Adapter("dense", inside=True)),
    LORA: Method(_LORA4),
    STARTED: Method(Adapter("LoRA", 4, from_gradient=True)),
    "LoRA r=4, clipped, truncated": Method(_LORA4, truncates=True),
    "LoRA r=8, clipped": Method(_LORA8),
    "NB-LoRA r=4": Method(_NB4),
    "NB-LoRA r=4, truncated": Method(_NB4, truncates=True),
    OURS: Method(_NB8),
    OURS_STARTED: Method(Adapter("NB-LoRA", 8, inside=True, from_gradient=True)),
    "NB-LoRA r=8, truncated": Method(_NB8, truncates=True),
    OURS_JOINT: Method(Adapter("NB-LoRA", 8, inside=True, parametrization="joint")),
}


@dataclass
class Chosen:
    """The best setting on validation, and the clients' updates that it leads to."""

    validation: float
    setting: Setting
    updates: list[Update]


def choose(
    task: Task, adapter: Adapter, methods: dict[str, Method], epsilons: tuple[float, ...], seed: int
) -> dict[tuple[str, float | None], Chosen]:
    """For each method with this adapter and each epsilon (None without privacy), on validation data only."""
    generator = torch.Generator().manual_seed(10**6 + seed)
    draws = [torch.randn(REHEARSALS, m, n, generator=generator) for m, n in task.shapes.values()]
    best: dict[tuple[str, float | None], Chosen] = {}

    def consider(name: str, epsilon: float | None, value: float, setting: Setting, updates: Any) -> None:
        known = best.get((name, epsilon))
        if known is None or value > known.validation:
            best[name, epsilon] = Chosen(value, setting, updates)

    def judge(updates: list[Update], setting: Setting) -> None:
        mean = clipped_mean(task, updates, setting.bound)
        if not all(each.isfinite().all() for each in mean):
            return  # training diverged
        public = [name for name, method in methods.items() if not method.private]
        if public:
            value = task.accuracy(task.validation, mean).item()
            for name in public:
                consider(name, None, value, setting, updates)
        if math.isinf(setting.bound):
            return
        for epsilon in epsilons:
            scales = deviations(task, setting.bound, epsilon)
            noisy = [each + scale * draw for each, scale, draw in zip(mean, scales, draws)]
            for truncates in {method.truncates for method in methods.values() if method.private}:
                for rank, matrices in truncated(noisy, TRUNCATIONS if truncates else (None,)):
                    value = task.accuracy(task.validation, matrices).mean().item()
                    for name, method in methods.items():
                        if method.private and method.truncates == truncates:
                            consider(name, epsilon, value, replace(setting, rank=rank), updates)

    radii = bounds(task.count)
    for (optimizer, rate), trained_at in product(adapter.rates, radii if adapter.inside else (math.inf,)):
        for steps, updates in train(task, adapter, optimizer, rate, trained_at, seed):
            for bound in (trained_at,) if adapter.inside else (*radii, math.inf):
                judge(updates, Setting(bound, optimizer, rate, steps))
    return best


def final(
    task: Task, test: Examples, method: Method, chosen: Chosen, epsilon: float | None, draws: int, seed: int
) -> tuple[list[float], int]:
    """Test accuracy for each draw of the noise, and how many clients were not used as they came."""
    if epsilon is None:
        mean = clipped_mean(task, chosen.updates, chosen.setting.bound)
        return [task.accuracy(test, mean).item()], 0
    accuracies, changed = [], 0
    for draw in range(draws):
        found = release(task, chosen.updates, chosen.setting, method.adapter, epsilon, 1000 * seed + draw)
        changed = sum(client.status != "accepted" for client in found.clients)
        matrices = [dense(update) for update in found.updates.values()]
        accuracies.append(task.accuracy(test, matrices).item())
    return accuracies, changed
