"""The methods that a comparison knows: each a PEFT configuration, none of them implemented here."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import DeloraConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Trainer, TrainingArguments

from nblora.bounds import parse_norm
from nblora.parametrizations import PARAMETRIZATIONS, check_parametrization
from nblora.settings import SettingsError, check_names
from nblora.tuner import NBLoraConfig

MakeOptimizer = Callable[[nn.Module, TrainingArguments], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        label: what tables call it.
        make: the PEFT configuration of a rank, a bound and further fields; None trains every parameter.
        fields: names of the further fields, those that the configuration adds to PEFT's bookkeeping.
        ranked: whether it has a rank.
        bounded: whether it has a bound.
        make_optimizer: of an optimizer of its own, or None.
        gradient_start: whether its adapter begins along the gradient of training samples.
        reason: why it cannot be run, or None where it can.
    """

    label: str
    make: Callable[[int, float, Mapping[str, Any]], PeftConfig | None]
    fields: tuple[str, ...] = ()
    ranked: bool = True
    bounded: bool = False
    make_optimizer: MakeOptimizer | None = None
    gradient_start: bool = False
    reason: str | None = None

    def config(self, rank: int | None, bound: float | None, options: Mapping[str, Any]) -> PeftConfig | None:
        """The configuration of a run; every linear layer is adapted unless `options` says otherwise.

        Raises:
            SettingsError: for what the configuration refuses.
        """
        if options and not self.fields:
            raise SettingsError(f"{self.label} must have no options, got {next(iter(options))!r}")
        check_names(options, self.fields, f"an option of {self.label}")
        try:
            return self.make(rank or 0, bound or 0.0, {"target_modules": "all-linear", **options})
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"the options of {self.label} must suit PEFT: {reason}") from error


def _fields(config: type[PeftConfig]) -> tuple[str, ...]:
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    return tuple(field.name for field in dataclasses.fields(config) if field.name not in inherited)


def _lora(**fixed: Any) -> Callable[[int, float, Mapping[str, Any]], PeftConfig]:
    """LoRA with alpha = 2r, its usual choice, unless said otherwise.

    rsLoRA has a fixed alpha, 16, because its scale alpha / sqrt(r) is meant to leave r's part to the root.
    """

    def make(rank: int, bound: float, options: Mapping[str, Any]) -> PeftConfig:
        return LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, **fixed, **options})

    return make


def _pissa(rank: int, bound: float, options: Mapping[str, Any]) -> PeftConfig:
    # its start is the leading part of the weight itself, so its scale must be 1
    return LoraConfig(**{"r": rank, "lora_alpha": rank, "init_lora_weights": "pissa", **options})


def _delora(rank: int, bound: float, options: Mapping[str, Any]) -> PeftConfig:
    # PEFT's default of 15 fails on every task tried; 3 was the best of several
    return DeloraConfig(**{"r": rank, "delora_lambda": 3, **options})


def _oft(rank: int, bound: float, options: Mapping[str, Any]) -> PeftConfig:
    # OFT has no rank: its size is that of the blocks of its rotation
    return OFTConfig(**{"r": 0, "oft_block_size": rank, **options})


def _hra(rank: int, bound: float, options: Mapping[str, Any]) -> PeftConfig:
    return HRAConfig(**{"r": rank, **options})


def _full(rank: int, bound: float, options: Mapping[str, Any]) -> None:
    return None


def _loraplus_optimizer(model: nn.Module, arguments: TrainingArguments) -> torch.optim.Optimizer:
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    options.pop("lr")
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model,
        optimizer_class,
        lr=arguments.learning_rate,
        loraplus_lr_ratio=16,  # the paper's recommendation
        loraplus_weight_decay=arguments.weight_decay,
        **options,
    )
    return optimizer


def _unavailable(label: str, reason: str) -> Method:
    return Method(label, _full, reason=reason)


_LORA_FIELDS = _fields(LoraConfig)

METHODS: dict[str, Method] = {
    "lora": Method("LoRA", _lora(), _LORA_FIELDS),
    "rslora": Method("rsLoRA", _lora(use_rslora=True, lora_alpha=16), _LORA_FIELDS),
    "dora": Method("DoRA", _lora(use_dora=True), _LORA_FIELDS),
    "pissa": Method("PiSSA", _pissa, _LORA_FIELDS),
    "lora+": Method("LoRA+", _lora(), _LORA_FIELDS, make_optimizer=_loraplus_optimizer),
    "delora": Method("DeLoRA", _delora, _fields(DeloraConfig)),
    "oft": Method("OFT", _oft, _fields(OFTConfig)),
    "hra": Method("HRA", _hra, _fields(HRAConfig)),
    "full": Method("full fine-tuning", _full, ranked=False),
    "rasa": _unavailable("RaSA", "not in PEFT, and no maintained package has it"),
    "wara": _unavailable("WaRA", "not in PEFT, and no maintained package has it"),
}
"""By the name that a user gives; NB-LoRA's variants come on top, see `find_method`."""

NAMES = (f"nblora[-gradient][-{'|-'.join(PARAMETRIZATIONS)}][-NORM]", *METHODS)


def find_method(name: str) -> Method:
    """The method of a name.

    NB-LoRA is `nblora`, with its start, its parametrization and its norm where they are not the default's:
    `nblora-gradient` (see `nblora.start_at_gradient`), `nblora-svd`, `nblora-radial`, `nblora-spectral`,
    `nblora-svd-nuclear`, `nblora-ky-fan-4`, `nblora-3` (Schatten-3).

    Raises:
        SettingsError: if there is none.
    """
    if name in METHODS:
        return METHODS[name]
    match = re.fullmatch(rf"nblora(?:-(gradient))?(?:-({'|'.join(PARAMETRIZATIONS)}))?(?:-(.*))?", name)
    if match is None:
        near = difflib.get_close_matches(name.lower().replace("nb-", "nb"), ["nblora", *METHODS], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SettingsError(f"a method must be one of {', '.join(NAMES)}, got {name!r}{hint}")
    fixed: dict[str, Any] = {}
    if match[2]:
        fixed["parametrization"] = match[2]
    if match[3] is not None:
        fixed["norm"] = _norm(match[3], name)
    if match[2]:
        try:
            check_parametrization(match[2], parse_norm(fixed.get("norm", NBLoraConfig.norm)))
        except ValueError as error:
            raise _unknown(name, error) from error

    def make(rank: int, bound: float, options: Mapping[str, Any]) -> PeftConfig:
        return NBLoraConfig(**{"r": rank, "bound": bound, **fixed, **options})

    variant = [parse_norm(value).name if field == "norm" else value for field, value in fixed.items()]
    start = ["gradient start"] if match[1] else []
    label = ", ".join(["NB-LoRA", *start, *variant])
    return Method(label, make, _fields(NBLoraConfig), bounded=True, gradient_start=bool(match[1]))


def _norm(text: str, name: str) -> str | float:
    try:
        norm: str | float = float(text)
    except ValueError:
        norm = text
    try:
        parse_norm(norm)
    except ValueError as error:
        raise _unknown(name, error) from error
    return norm


def _unknown(name: str, reason: object) -> SettingsError:
    return SettingsError(f"a method must be one of {', '.join(NAMES)}, got {name!r}: {reason}")
