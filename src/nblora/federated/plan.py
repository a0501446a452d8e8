"""What is public about a federation, and fixed before its first round."""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

from nblora.bounds import Norm, parse_norm
from nblora.federated.client import base_fingerprint, measured_radii
from nblora.privacy import Adjacency, frobenius_bound, round_mu
from nblora.privacy._checks import (
    check_adjacency,
    check_bound,
    check_count,
    check_delta,
    check_epsilon,
    check_probability,
)
from nblora.tuner import NBLoraConfig


@dataclass(frozen=True)
class PlannedLayer:
    """One adapted layer.

    Attributes:
        shape: (m, n) of its update, (out, in).
        radius: absolute bound on the norm of a client's update, in the norm of the plan.
    """

    shape: tuple[int, int]
    radius: float


@dataclass(frozen=True)
class Budget:
    """Privacy of all rounds together.

    Attributes:
        epsilon, delta: of the guarantee.
        adjacency: "add-remove" or "replace-one", see `nblora.privacy.sensitivity`.

    Raises:
        ValueError, TypeError: for epsilon that is not positive and finite, delta outside (0, 1), or an
            unknown adjacency.
    """

    epsilon: float
    delta: float
    adjacency: Adjacency

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        check_delta(self.delta)
        check_adjacency(self.adjacency)


@dataclass(frozen=True)
class FederationPlan:
    """Everything that server and clients agree on. All of it is public and must not come from clients' data.

    Attributes:
        layers: by module name in the base model.
        norm: what `PlannedLayer.radius` bounds, as in `NBLoraConfig`.
        max_rank: clients choose ranks up to this.
        rounds: how many releases there will be at most; the noise is split evenly between them.
        n_total: the fixed denominator of every mean. With sampling, sampling_probability times the expected
            number of clients makes the mean unbiased.
        budget: None for no privacy.
        sampling_probability: each client takes part in a round with this probability ("add-remove" only).
        on_excess: "reject" counts a client over its bound as zero, "project" scales it back.
        release_rank: keep the best approximation of this rank of each round's mean.
        project: whether each round's mean is projected back onto the clients' ball, which at most `n_total`
            clients leave only by noise. As `release_rank` it costs no privacy.
        base: fingerprint of the base weights of the layers, see `base_fingerprint`; None is not checked.

    Raises:
        ValueError, TypeError: for values outside their rules.
    """

    layers: Mapping[str, PlannedLayer]
    norm: str | float
    max_rank: int
    rounds: int
    n_total: int
    budget: Budget | None = None
    sampling_probability: float = 1.0
    on_excess: Literal["reject", "project"] = "reject"
    release_rank: int | None = None
    project: bool = True
    base: str | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a plan must have at least one layer, got none")
        for name, layer in self.layers.items():
            m, n = layer.shape
            check_count(f"m of {name}", m)
            check_count(f"n of {name}", n)
            check_bound(f"radius of {name}", layer.radius)
        if not any(layer.radius for layer in self.layers.values()):
            raise ValueError("at least one radius must be positive, got 0 for every layer")
        parse_norm(self.norm)
        for field in ("max_rank", "rounds", "n_total"):
            check_count(field, getattr(self, field))
        if self.release_rank is not None:
            check_count("release_rank", self.release_rank)
        if self.on_excess not in ("reject", "project"):
            raise ValueError(f'on_excess must be "reject" or "project", got on_excess={self.on_excess!r}')
        if check_probability(self.sampling_probability) < 1 and (
            self.budget is not None and self.budget.adjacency != "add-remove"
        ):
            raise ValueError(
                'sampling is accounted for under adjacency="add-remove" only, got '
                f"adjacency={self.budget.adjacency!r} and "
                f"sampling_probability={self.sampling_probability!r}"
            )

    @classmethod
    def for_model(cls, model: nn.Module, config: NBLoraConfig, **options: Any) -> FederationPlan:
        """A plan for a public base model.

        Args:
            model: the base model. It is adapted for a moment to measure its radii, and is then as before.
            config: which layers, the norm and the bounds; `r` becomes `max_rank`.
            options: the other attributes (`rounds`, `n_total`, `budget`, ...).

        Raises:
            ValueError: if the configuration trains anything that has no bound, or layers with a batch of
                matrices (`target_parameters`); if the base model is quantized.
        """
        measured = measured_radii(model, config)
        layers = {name: PlannedLayer(shape, radius) for name, (shape, radius) in measured.items()}
        base = base_fingerprint(model, layers)
        return cls(layers=layers, norm=config.norm, max_rank=config.r, base=base, **options)

    @property
    def parsed_norm(self) -> Norm:
        return parse_norm(self.norm)

    @cached_property
    def mu(self) -> float | None:
        """Of one round, as if there were no sampling; None without a budget. Takes seconds with sampling.

        Raises:
            ImportError: if there is a budget and dp-accounting is missing.
        """
        if self.budget is None:
            return None
        return round_mu(
            rounds=self.rounds, sampling_probability=self.sampling_probability, **asdict(self.budget)
        )

    def frobenius_bounds(self) -> dict[str, float]:
        """What the Frobenius norm of a client's update is at most, for each layer."""
        return {
            name: frobenius_bound(self.parsed_norm, layer.radius, min(self.max_rank, *layer.shape))
            for name, layer in self.layers.items()
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False, default=_of_numpy)

    @classmethod
    def from_json(cls, text: str) -> FederationPlan:
        """Raises: ValueError, TypeError, KeyError for what is no plan."""
        content = json.loads(text)
        layers = {
            name: PlannedLayer(tuple(layer["shape"]), layer["radius"])
            for name, layer in content.pop("layers").items()
        }
        budget = content.pop("budget")
        return cls(layers=layers, budget=budget and Budget(**budget), **content)


def _of_numpy(number: Any) -> int | float:
    """A NumPy number as one that JSON can hold."""
    if isinstance(number, numbers.Integral):
        return int(number)
    if isinstance(number, numbers.Real):
        return float(number)
    raise TypeError(f"a plan must be of plain values, got {number!r}")
