"""Configuration of the NB-LoRA method for PEFT."""

from __future__ import annotations

import enum
import math
import numbers
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from nblora.bounds import Norm, parse_norm
from nblora.parametrizations import Parametrization, check_parametrization


class NBLoraType(str, enum.Enum):
    """Our member of PEFT's `PeftType`, which cannot be extended; PEFT and transformers read `.value`."""

    NBLORA = "NBLORA"


@dataclass
class NBLoraConfig(PeftConfig):
    """Configuration of norm-bounded low-rank adaptation (NB-LoRA, arXiv 2501.19050).

    The update ΔW (out, in) of every adapted layer has rank at most `r`, and its norm never exceeds the
    layer's bound, whatever the optimizer does. Updates start at exactly zero.

    Args:
        r: Rank of the updates. Where a layer has fewer inputs or outputs, their number.
        norm: Norm that is bounded: "spectral", "frobenius", "nuclear", "ky-fan-q" (the sum of the q
            largest singular values) or a number p >= 1 (Schatten-p).
        bound: The bound, > 0.
        bound_kind: "relative": `bound` times the spectral norm of the layer's base weight, whatever
            `norm` is. "absolute": `bound` itself.
        parametrization: "joint" (the paper's), "svd" (singular values are explicit parameters) or "radial"
            (for norm="frobenius": one bound for the whole update and none for single singular values; see
            docs/choosing-a-bound.md).
        temperature: How reluctantly learnable bounds of single singular values move, > 0. No effect
            on the spectral norm and the radial parametrization, which have none.
        dropout: Probability of dropping an input of the update while training.
        init_weights: True starts at a zero update. False starts at a random one inside the ball.
        rank_pattern: Ranks of single layers, from layer names or regular expressions.
        bound_pattern: Bounds of single layers, from layer names or regular expressions.
        target_modules: Layers to adapt: names, a regular expression, or "all-linear". Without it the
            layers that PEFT's LoRA adapts by default in the same architecture.
        exclude_modules: Layers not to adapt.
        layers_to_transform: Indices of blocks to adapt.
        layers_pattern: Name of the list of blocks that `layers_to_transform` counts in.
        modules_to_save: Further modules to train fully and to save.
        target_parameters: Names of parameters that are not the weight of a layer of their own, such as
            the experts of a mixture, stored as (experts, out, in): every expert has its own bound.
        trainable_token_indices: Rows of the token embedding to train fully, without a bound: a list, or
            lists by the names of embeddings.
        bias: "none", "all" or "nblora_only": which biases to train. Biases have no bound.
        fan_in_fan_out: Set by the library where layers store their weight as (in, out), such as
            transformers' Conv1D; accepted for symmetry with LoraConfig.

    Raises:
        ValueError: for any value outside its rule.

    Source: MATH.md §2-§4.
    """

    r: int = field(default=8, metadata={"help": "Rank of the updates."})
    norm: str | float = field(
        default="frobenius",
        metadata={"help": 'Norm: "spectral", "frobenius", "nuclear", "ky-fan-q" or a number p >= 1.'},
    )
    bound: float = field(default=0.3, metadata={"help": "Bound on the norm of every update."})
    bound_kind: Literal["relative", "absolute"] = field(
        default="relative",
        metadata={"help": "Whether the bound is times the spectral norm of the layer's base weight."},
    )
    parametrization: Parametrization = field(
        default="joint", metadata={"help": '"joint", "svd" or, for the Frobenius norm, "radial".'}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "How reluctantly bounds of single singular values move."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the inputs of the updates."})
    init_weights: bool = field(
        default=True, metadata={"help": "Start at a zero update (True) or a random one (False)."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks of single layers by name or regular expression."}
    )
    bound_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Bounds of single layers by name or regular expression."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": 'Layers to adapt, or "all-linear".'}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers not to adapt."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of blocks to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train fully and to save."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt, such as those of experts."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings to train fully and to save."}
    )
    bias: Literal["none", "all", "nblora_only"] = field(
        default="none", metadata={"help": "Which biases to train."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether layers store (in, out) weights; set by the library."}
    )

    @property
    def comes_with_weights(self) -> bool:
        """Whether it is the configuration of a saved adapter, whose radii so need not be measured."""
        return "_comes_with_weights" in self.__dict__

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NBLoraConfig:
        """The configuration of a saved adapter: see `PeftConfig.from_pretrained`."""
        config: NBLoraConfig = super().from_pretrained(*args, **kwargs)
        config.__dict__["_comes_with_weights"] = True
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NBLoraType.NBLORA
        self.r = _integer("r", self.r)
        self.norm = _norm(self.norm)
        self.bound = _positive("bound", self.bound)
        _check_choice("bound_kind", self.bound_kind, ("relative", "absolute"))
        check_parametrization(self.parametrization, parse_norm(self.norm))
        self.temperature = _positive("temperature", self.temperature)
        if not _is_real(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got dropout={self.dropout!r}")
        _check_choice("init_weights", self.init_weights, (True, False))
        _check_choice("bias", self.bias, ("none", "all", "nblora_only"))
        self.rank_pattern = self._checked_pattern("rank_pattern", _integer)
        self.bound_pattern = self._checked_pattern("bound_pattern", _positive)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_parameters, str):
            raise ValueError(
                f"target_parameters must be a list of names, got target_parameters={self.target_parameters!r}"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform needs target_modules as a list of names, "
                f"got target_modules={self.target_modules!r}"
            )
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError(
                "layers_pattern needs target_modules as a list of names, "
                f"got target_modules={self.target_modules!r}"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "layers_pattern needs layers_to_transform, the indices of the blocks, "
                f"got layers_pattern={self.layers_pattern!r} and layers_to_transform=None"
            )

    def _checked_pattern(self, name: str, check: Any) -> dict[str, Any]:
        pattern = getattr(self, name)
        if pattern is None:
            return {}
        if not isinstance(pattern, dict):
            raise ValueError(f"{name} must map layer names to values, got {name}={pattern!r}")
        try:
            for key in pattern:
                re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"keys of {name} must be names or regular expressions, got {pattern!r}: {error}"
            ) from error
        return {key: check(f"{name}[{key!r}]", value) for key, value in pattern.items()}


def pattern_value(patterns: dict[str, Any] | None, layer_name: str, default: Any) -> Any:
    """What a pattern such as `bound_pattern` says of a layer, by PEFT's rule, else the default."""
    patterns = patterns or {}
    return patterns.get(get_pattern_key(patterns.keys(), layer_name), default)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _norm(value: Any) -> str | float:
    """A norm in a form that JSON can hold; `parse_norm` says which there are."""
    if isinstance(value, Norm):
        raise ValueError(
            f"norm must be a name or a number, which can be saved, got {value!r}; norms of your own "
            "work with nblora.parametrizations"
        )
    if _is_real(value):
        value = float(value)
    return "spectral" if parse_norm(value).name == "spectral" else value


def _integer(name: str, value: Any) -> int:
    """A Python int, also of NumPy's integers."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {name}={value!r}")
    return int(value)


def _positive(name: str, value: Any) -> float:
    """A Python float, also of NumPy's numbers."""
    if not _is_real(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number, positive and finite, got {name}={value!r}")
    return float(value)


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
        allowed = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {allowed}, got {name}={value!r}")
