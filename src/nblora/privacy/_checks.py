"""What every privacy argument has to satisfy. NaN never passes: each rule is written so that it fails."""

from __future__ import annotations

import importlib
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, get_args

Adjacency = Literal["add-remove", "replace-one"]
"""Which data sets count as neighbours: one client more or less, or one client's update exchanged."""

SMALLEST, LARGEST = 1e-100, 1e100  # beyond these, squares of float64 numbers leave its range


def check_adjacency(adjacency: object) -> None:
    if adjacency not in get_args(Adjacency):
        raise ValueError(f'adjacency must be "add-remove" or "replace-one", got adjacency={adjacency!r}')


def real(name: str, value: object) -> float:
    """A Python or NumPy real number as a float; tensors and arrays are not numbers that were published."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {name}={value!r}")
    return float(value)


def check_bound(name: str, value: object) -> float:
    """Zero, or a size whose square float64 can hold."""
    number = real(name, value)
    if not (number == 0 or SMALLEST <= number <= LARGEST):
        raise ValueError(f"{name} must be 0 or between {SMALLEST:g} and {LARGEST:g}, got {name}={value!r}")
    return number


def check_epsilon(epsilon: object, *, zero: bool = False) -> float:
    number = real("epsilon", epsilon)
    if not (0 < number < math.inf or (zero and number == 0)):
        rule = "finite and not negative" if zero else "positive and finite"
        raise ValueError(f"epsilon must be {rule}, got epsilon={epsilon!r}")
    return number


def check_delta(delta: object) -> float:
    number = real("delta", delta)
    if not 0 < number < 1:
        raise ValueError(f"delta must be between 0 and 1, both excluded, got delta={delta!r}")
    return number


def check_mu(mu: object, *, zero: bool = True) -> float:
    number = real("mu", mu)
    if not (0 < number < math.inf or (zero and number == 0)):
        rule = "finite and not negative" if zero else "positive and finite"
        raise ValueError(f"mu must be {rule}, got mu={mu!r}")
    return number


def check_probability(sampling_probability: object) -> float:
    number = real("sampling_probability", sampling_probability)
    if not 0 < number <= 1:
        raise ValueError(
            f"sampling_probability must be in (0, 1], got sampling_probability={sampling_probability!r}"
        )
    return number


def check_count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {name}={value!r}")
    return int(value)


def check_shapes(
    bounds: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """(m, n) of each layer, in the order of its bounds."""
    if not bounds or set(bounds) != set(shapes):
        raise ValueError(
            "bounds and shapes must name the same layers, at least one, "
            f"got bounds for {sorted(bounds)} and shapes for {sorted(shapes)}"
        )
    sizes = {}
    for name in bounds:
        m, n = shapes[name]
        sizes[name] = (check_count("m", m), check_count("n", n))
    return sizes


def dp_accounting() -> Any:
    """The package dp-accounting, imported when it is needed.

    Raises:
        ImportError: if it is missing.
    """
    try:
        return importlib.import_module("dp_accounting")
    except ImportError as error:
        raise ImportError(
            "noise for (epsilon, delta) comes from dp-accounting: pip install 'nblora[privacy]'"
        ) from error
