"""A bound and a learning rate for a given model and data, from a short probe."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, set_seed

from nblora.settings import SettingsError, overlay, training_arguments
from nblora.training import BoundedTrainer, FinetuneConfig, adapt
from nblora.tuner import nblora_layers

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BOUNDS = (0.1, 0.2, 0.3, 0.6, 1.0)
BOUND_OF_RATES = 0.3
"""The relative bound at which learning rates are tried."""

ENOUGH = 0.95
"""Without kept data: the share of the largest gain that the suggested bound must have."""


@dataclass(frozen=True)
class Probe:
    """What a short training reached on validation data.

    Attributes:
        learning_rate: peak of the schedule.
        bound: relative.
        target: score on the target: accuracy, or minus nats per token.
        kept: score on the kept data, or None.
    """

    learning_rate: float
    bound: float
    target: float
    kept: float | None

    @property
    def healthy(self) -> bool:
        """Whether every score is a number."""
        return math.isfinite(self.target) and (self.kept is None or math.isfinite(self.kept))


@dataclass(frozen=True)
class Suggestion:
    """A learning rate, a bound, and why.

    Attributes:
        learning_rate: the best on target validation data at a bound of 0.3.
        bound: relative, see `suggest`.
        metric: what scores are: "accuracy", or "nats" (minus nats per token).
        before: scores of the base model, as a probe with bound 0.
        rates: probes at several learning rates.
        bounds: probes at several bounds, smallest first.
        steps: of every probe.
    """

    learning_rate: float
    bound: float
    metric: str
    before: Probe
    rates: tuple[Probe, ...]
    bounds: tuple[Probe, ...]
    steps: int


def suggest(
    settings: Mapping[str, Any] | FinetuneConfig,
    *,
    steps: int = 60,
    learning_rates: Sequence[float] = LEARNING_RATES,
    bounds: Sequence[float] = BOUNDS,
    advance: Callable[[int, int], None] | None = None,
) -> Suggestion:
    """Propose a bound and a learning rate for `finetune`.

    Trains `steps` steps at each learning rate, and takes the one with the best score on target validation
    data; then as many at each bound. The suggested bound is the one with the best mean of the target and
    the kept score; without kept data the smallest that has 95 % of the largest gain.

    The probe is short: a training many times as long may want a smaller learning rate, and gains more at
    small bounds than the probe did.

    Args:
        settings: as in `FinetuneConfig`; a bound and a learning rate among them are ignored.
        steps: for each learning rate.
        learning_rates: to try.
        bounds: to try, relative.
        advance: called with the step and the number of steps of the whole probe.

    Raises:
        ValueError: for settings, data or a model that cannot be used.
    """
    if steps < 1:
        raise SettingsError(f"steps must be an integer >= 1, got {steps!r}")
    for name, tried in (("learning rates", learning_rates), ("bounds", bounds)):
        if not tried or not all(0 < value < math.inf for value in tried):
            raise SettingsError(f"{name} must be positive numbers, at least one, got {list(tried)}")
    given = settings.to_dict() if isinstance(settings, FinetuneConfig) else dict(settings)
    limits = {"max_eval_samples": given.get("max_eval_samples") or 512}
    config = FinetuneConfig.of(overlay(given, {**limits, "adapter": {"bound": 1.0}}))
    adapter = config.nblora_config()
    if adapter.bound_kind != "relative" or adapter.bound_pattern:
        raise SettingsError(
            "the probe suggests one relative bound; bound_kind and bound_pattern must be left out"
        )
    values = {
        **config.train,
        "max_steps": steps,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
    }
    data = config.prepare()
    set_seed(config.seed)
    base = config.load_model(data)
    model = adapt(base, adapter, config.task)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    layers = nblora_layers(model, "default").values()
    radii = [layer.radius("default").clone() for layer in layers]  # of a relative bound of 1
    total = (len(learning_rates) + len(bounds) - (BOUND_OF_RATES in bounds)) * steps
    done = 0

    def probe(rate: float, bound: float, train: bool = True) -> Probe:
        nonlocal done
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
            for layer, radius in zip(layers, radii):
                layer.radius("default").copy_(bound * radius)
            trainer = BoundedTrainer(
                model, base, data, training_arguments({**values, "learning_rate": rate}, folder)
            )
            trainer.remove_callback(PrinterCallback)
            if train:
                set_seed(config.seed)
                with torch.enable_grad():
                    trainer.train()
                done += steps
                if advance is not None:
                    advance(done, total)
            measured = trainer.measure("validation")
        target, kept = measured["target"], measured["keep"]
        assert target is not None
        return Probe(rate, bound, target["score"], None if kept is None else kept["score"])

    before = probe(learning_rates[0], 0.0, train=False)
    rates = [probe(rate, BOUND_OF_RATES) for rate in learning_rates]
    healthy = [tried for tried in rates if tried.healthy]
    if not healthy:
        raise SettingsError("every learning rate of the probe gave scores that are not numbers")
    best = max(healthy, key=lambda tried: tried.target)
    tried_bounds = [
        best if bound == BOUND_OF_RATES else probe(best.learning_rate, bound) for bound in sorted(bounds)
    ]
    return Suggestion(
        learning_rate=best.learning_rate,
        bound=choose_bound(before, tried_bounds),
        metric=data.metric,
        before=before,
        rates=tuple(rates),
        bounds=tuple(tried_bounds),
        steps=steps,
    )


def choose_bound(before: Probe, bounds: Sequence[Probe]) -> float:
    """The bound to suggest, by the rule of `suggest`.

    Args:
        before: the base model.
        bounds: probes, smallest bound first; those whose scores are no numbers are passed over.

    Raises:
        SettingsError: if no probe has scores that are numbers.
    """
    healthy = [tried for tried in bounds if tried.healthy]
    if not healthy:
        raise SettingsError("every bound of the probe gave scores that are not numbers")
    if before.kept is not None:
        return max(healthy, key=lambda tried: tried.target + (tried.kept or 0.0)).bound
    gained = max(tried.target for tried in healthy) - before.target
    enough = ENOUGH * gained if gained > 0 else gained  # of a loss, 95 % would be better than the best
    return next(tried for tried in healthy if tried.target - before.target >= enough).bound
