"""What stands in for another method in PEFT's tests: classes that make an NBLoraConfig, and names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import peft
from peft.tuners import lora

from nblora import NBLoraConfig, tuner

# the option's name there: its name here
SAME = (
    "r",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "modules_to_save",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_type",
    "auto_mapping",
    "peft_version",
)
NAMES: dict[str, dict[str, str]] = {
    "delora": {
        **{name: name for name in SAME},
        "delora_lambda": "bound",
        "lambda_pattern": "bound_pattern",
        "module_dropout": "dropout",
        "init_weights": "init_weights",
        "bias": "bias",
    },
    "lora": {
        **{name: name for name in SAME},
        "lora_dropout": "dropout",
        "init_lora_weights": "init_weights",
        "bias": "bias",
        "fan_in_fan_out": "fan_in_fan_out",
        "target_parameters": "target_parameters",
        "trainable_token_indices": "trainable_token_indices",
        "ensure_weight_tying": "ensure_weight_tying",
    },
    "lokr": {**{name: name for name in SAME}, "init_weights": "init_weights"},
}
# options that only set the size of an update, which is the bound's business here
SIZES: dict[str, tuple[str, ...]] = {
    "delora": (),
    "lora": ("lora_alpha", "use_rslora"),
    "lokr": ("alpha",),
}
# methods whose stand-in is a class of their own in PEFT's tests, by the name of the substitution
ORIGINALS = {"delora": peft.DeloraConfig, "lora": peft.LoraConfig, "lokr": peft.LoKrConfig}


# what PEFT's tests tell LoRA's layers by
LAYERS = (
    (lora.LoraLayer, tuner.NBLoraLayer),
    (lora.Linear, tuner.NBLoraLinear),
    (lora.Embedding, tuner.NBLoraEmbedding),
    (lora.Conv2d, tuner.NBLoraConv),
    (lora.Conv3d, tuner.NBLoraConv),
    (lora.ParamWrapper, tuner.ParamWrapper),
    (lora.LoraModel, tuner.NBLoraModel),
)
# LoRA has no norm. With the spectral one NB-LoRA has as many parameters, two factors; a generous bound
# makes it move as far as PEFT's tests of training expect.
DEFAULTS: dict[str, dict[str, Any]] = {
    "delora": {},
    "lora": {"norm": "spectral", "bound": 3.0},
    "lokr": {"bound": 10.0},
}


# names that PEFT's tests write out: of parameters (the factors of the inputs and of the outputs), of
# classes, and of sizes too small for a rank of 8
NAMES_IN_TESTS: dict[str, tuple[tuple[str, str], ...]] = {
    "delora": (),
    "lokr": (
        (r'"\.lokr"', '".nblora"'),
        (r'rsplit\("\.", 2\)(?=\[0\] for k in lokr)', 'rsplit(".", 3)'),
    ),
    "lora": (
        (r"\blora_embedding_A\b", "nblora_embedding_in"),
        (r"\blora_embedding_B\b", "nblora_embedding_out"),
        (r"\blora_A\b", "nblora_in"),
        (r"\blora_B\b", "nblora_out"),
        (r"(\.nblora_embedding_(?:in|out)\.\w+)(?=[\"'])", r"\1.weight"),
        (r'"LoraModel"', '"NBLoraModel"'),
        (r'(?<!peft_type\.value == )"LORA"', '"NBLORA"'),
        (r'"lora\.(Linear|Embedding)\b', r'"nblora.NBLora\1'),
        (r'"lora\.Conv[123]d\b', '"nblora.NBLoraConv'),
        (r'"lora\.ParamWrapper\b', '"nblora.ParamWrapper'),
        (r'"lora\.MultiheadAttention\b', '"nblora.NBLoraMultiheadAttention'),
        (r"peft\.tuners\.lora\.layer\.Embedding", "nblora.tuner.embedding.NBLoraEmbedding"),
        (r"nn\.Linear\(1, 1\)", "nn.Linear(64, 64)"),
    ),
}


class NoCounterpartError(ValueError):
    """An option of the original method that NB-LoRA has nothing for."""


def translated(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of another method as options of NBLoraConfig.

    Raises:
        NoCounterpartError: for an option, or a start, that only the other has.
    """
    known = NBLoraConfig.__dataclass_fields__
    result: dict[str, Any] = dict(DEFAULTS[method])
    for name, value in options.items():
        if name in SIZES[method]:
            continue
        ours = NAMES[method].get(name)
        if ours is None or ours not in known:
            if not value:
                continue  # switched off, so nothing is lost
            raise NoCounterpartError(name)
        if ours == "init_weights" and not isinstance(value, bool):
            raise NoCounterpartError(f"{name}={value!r}")
        if ours == "bias" and value == f"{method}_only":
            value = "nblora_only"
        result[ours] = value
    return result


class _StandInType(type(NBLoraConfig)):  # type: ignore[misc]
    """Makes `StandIn(...)` an NBLoraConfig, and an NBLoraConfig an instance of the stand-in."""

    method: str
    no_counterpart: Callable[[NoCounterpartError], Any]

    def __call__(cls, *args: Any, **options: Any) -> Any:
        try:
            ours = translated(cls.method, options)
        except NoCounterpartError as error:
            return cls.no_counterpart(error) or ORIGINALS[cls.method](*args, **options)
        return NBLoraConfig(*args, **ours)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, NBLoraConfig)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or NBLoraConfig in subclass.__mro__


def stand_in(method: str, no_counterpart: Callable[[NoCounterpartError], Any]) -> type:
    """A class that stands in for the configuration class of `method`.

    Where an option has no counterpart, `no_counterpart` is told. If it returns, the result is a
    configuration of the original method.
    """
    cls = _StandInType(NBLoraConfig.__name__, (NBLoraConfig,), {"__module__": NBLoraConfig.__module__})
    cls.method = method
    cls.no_counterpart = staticmethod(no_counterpart)
    return cls


def our_layer(value: Any) -> Any:
    """NB-LoRA's class for a class of LoRA's layers; anything else unchanged."""
    for theirs, ours in LAYERS:
        if value is theirs:
            return ours
    return value


def renamed(source: str, method: str) -> str:
    """Source code of a test with NB-LoRA's names of parameters and classes for those of the method."""
    for pattern, name in NAMES_IN_TESTS[method]:
        source = re.sub(pattern, name, source)
    return source


def holds(values: Iterable[Any], wanted: Callable[[Any], bool]) -> bool:
    """Whether one of the values, or of what lists, tuples and dicts among them hold, is wanted."""
    for value in values:
        if wanted(value):
            return True
        if isinstance(value, dict) and holds(value.values(), wanted):
            return True
        if isinstance(value, (list, tuple)) and holds(value, wanted):
            return True
    return False
