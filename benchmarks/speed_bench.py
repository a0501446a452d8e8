"""One cell of `speed.py`: its models, and the rows that measuring them gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from speed_figures import (
    Action,
    Failure,
    Quartiles,
    attempt,
    interleaved,
    paired,
)
from speed_models import (
    REFERENCE,
    Cell,
    adapt,
    base_model,
    batch,
    trainable,
    trainable_count,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Row:
    """One figure of one method in one cell.

    Attributes:
        unit: "s" or "bytes".
        samples: the figure of every round; empty where there is none.
        figure: their quartiles.
        ratio: of the figure to the reference's in the same round, quartiles over the rounds.
        reference: whose figure the ratio is to.
        trainable: parameters.
        reason: why there is no figure.
        more: what only this kind has.
    """

    kind: str
    method: str
    cell: Cell
    unit: str = "s"
    samples: tuple[float, ...] = ()
    figure: Quartiles | None = None
    ratio: Quartiles | None = None
    reference: str = REFERENCE
    trainable: int | None = None
    reason: str | None = None
    more: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """One cell: its models, and the measurements of them.

    Args:
        methods: names in METHODS.
        rounds: that count.
        warmup: rounds that do not.
        patience: seconds that a round of one method may take.
        ceilings: of the device, to tell shares of them; see `speed_figures.ceilings`.
    """

    def __init__(
        self,
        cell: Cell,
        methods: Sequence[str],
        *,
        rounds: int,
        warmup: int,
        patience: float = math.inf,
        ceilings: Mapping[str, float] | None = None,
    ) -> None:
        self.cell = cell
        self.methods = methods
        self.rounds = rounds
        self.warmup = warmup
        self.patience = patience
        self.ceilings = ceilings

    @functools.cached_property
    def base(self) -> nn.Module:
        return base_model(self.cell)

    @functools.cached_property
    def inputs(self) -> Tensor:
        return batch(self.cell)

    @functools.cached_property
    def built(self) -> tuple[dict[str, nn.Module], dict[str, str]]:
        return self.build(self.methods)

    def build(
        self, methods: Sequence[str], *, own_weights: bool = False
    ) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """Models by method, and why there is none."""
        models, missing = {}, {}
        for method in methods:
            make = functools.partial(adapt, self.base, self.cell, method, own_weights=own_weights)
            model = attempt(make)
            if isinstance(model, Failure):
                missing[method] = model.reason
            else:
                models[method] = model
        return models, missing

    @functools.cached_property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        # fused, as transformers' Trainer has it by default
        models = {name: trainable(model) for name, model in self.built[0].items()}
        return {name: torch.optim.AdamW(p, lr=1e-5, fused=True) for name, p in models.items() if p}

    def measured(
        self,
        kind: str,
        actions: Mapping[str, Action],
        missing: Mapping[str, str],
        *,
        reference: str = REFERENCE,
        times: int = 1,
        more: Callable[[str, Quartiles], Mapping[str, Any]] = lambda name, figure: {},
    ) -> list[Row]:
        """Rows of actions that take turns, and of methods that are missing."""
        seconds, failed = interleaved(
            actions,
            rounds=self.rounds * times,
            warmup=self.warmup,
            device=self.cell.device,
            patience=self.patience,
        )
        models = self.__dict__.get("built", ({}, {}))[0]
        rows = []
        for name in (*self.methods, *(name for name in actions if name not in self.methods)):
            count = trainable_count(models[name]) if name in models else None
            row = Row(kind, name, self.cell, reference=reference, trainable=count)
            if name in seconds:
                figure = Quartiles.of(seconds[name])
                row = replace(row, samples=tuple(seconds[name]), figure=figure, more=more(name, figure))
                if reference in seconds:
                    row = replace(row, ratio=paired(seconds[name], seconds[reference]))
            else:
                row = replace(row, reason=failed.get(name) or missing.get(name, "not measured by this kind"))
            rows.append(row)
        return rows

    def refused(self, kind: str, why: str, unit: str = "s") -> list[Row]:
        return [Row(kind, method, self.cell, unit=unit, reason=why) for method in self.methods]

    def rate(
        self, tokens: int, flops: Mapping[str, int | Failure]
    ) -> Callable[[str, Quartiles], Mapping[str, Any]]:
        """Tokens per second, and the share of the matrix-product ceiling where it was measured."""

        def more(name: str, figure: Quartiles) -> Mapping[str, Any]:
            found: dict[str, Any] = {"tokens_per_second": tokens / figure.median}
            count = flops.get(name)
            if isinstance(count, Failure):
                found["no_matmul_share"] = count.reason
            elif self.ceilings and count is not None:
                per_second = count / figure.median
                found["matmul_share"] = per_second / self.ceilings["matmul_flops_per_second"]
            return found

        return more

    def flops(self, actions: Mapping[str, Action]) -> dict[str, int | Failure]:
        """Matrix-product FLOPs of each action, or why torch cannot count; where ceilings are asked for."""
        if self.ceilings is None or self.cell.compile:
            return {}
        return {name: attempt(functools.partial(_flops, action)) for name, action in actions.items()}


def _flops(action: Action) -> int:
    with FlopCounterMode(display=False) as counter:
        action.before()
        action.after(action.run())
    count: int = counter.get_total_flops()
    return count
