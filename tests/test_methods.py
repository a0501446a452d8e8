"""Every method's name gives the PEFT configuration that its documentation promises."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import peft.tuners
import pytest
import torch
from peft import DeloraConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from conftest import TwoLayers, tiny_llama, tokens
from nblora import NBLoraConfig
from nblora.bounds import parse_norm
from nblora.methods import METHODS, NAMES, find_method
from nblora.settings import SettingsError

RUNNABLE = ["nblora", *(name for name, method in METHODS.items() if method.reason is None)]
UNAVAILABLE = ["rasa", "wara"]


def refusal(name: str, options: dict[str, Any] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        find_method(name).config(8, 0.3, options or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_issues_methods_are_all_there() -> None:
    assert {"lora", "rslora", "dora", "pissa", "lora+", "delora", "oft", "hra", "full"} == set(RUNNABLE) - {
        "nblora"
    }
    assert set(METHODS) == {*RUNNABLE, *UNAVAILABLE} - {"nblora"}
    assert set(NAMES) >= set(METHODS)
    labels = [find_method(name).label for name in [*RUNNABLE, *UNAVAILABLE]]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("lora", LoraConfig, {"r": 6, "lora_alpha": 12, "use_rslora": False, "use_dora": False}),
        ("rslora", LoraConfig, {"r": 6, "lora_alpha": 16, "use_rslora": True, "use_dora": False}),
        ("dora", LoraConfig, {"r": 6, "lora_alpha": 12, "use_rslora": False, "use_dora": True}),
        ("pissa", LoraConfig, {"r": 6, "lora_alpha": 6, "init_lora_weights": "pissa", "use_dora": False}),
        ("lora+", LoraConfig, {"r": 6, "lora_alpha": 12, "use_rslora": False, "use_dora": False}),
        ("delora", DeloraConfig, {"r": 6, "delora_lambda": 3}),
        ("oft", OFTConfig, {"r": 0, "oft_block_size": 6}),
        ("hra", HRAConfig, {"r": 6}),
        ("nblora", NBLoraConfig, {"r": 6, "bound": 0.7}),
    ],
)
def test_documented_settings(name: str, kind: type[PeftConfig], fields: dict[str, Any]) -> None:
    config = find_method(name).config(6, 0.7, {})
    assert type(config) is kind
    found = {field: getattr(config, field) for field in fields}
    assert found == fields
    # everything else is PEFT's default
    given = {"target_modules", "peft_type", *fields}
    for field in dataclasses.fields(kind):
        if field.name not in given:
            assert getattr(config, field.name) == getattr(kind(), field.name), field.name
    assert config.target_modules == "all-linear"


def test_full_fine_tuning_has_no_configuration_and_no_rank() -> None:
    full = find_method("full")
    assert full.config(None, None, {}) is None
    assert not full.ranked


def test_only_nblora_has_a_bound_and_only_lora_plus_an_optimizer() -> None:
    assert [name for name in RUNNABLE if find_method(name).bounded] == ["nblora"]
    assert [name for name in RUNNABLE if find_method(name).make_optimizer is not None] == ["lora+"]
    assert [name for name in RUNNABLE if not find_method(name).ranked] == ["full"]


@pytest.mark.parametrize(
    ("name", "parametrization", "norm", "label"),
    [
        ("nblora", None, None, "NB-LoRA"),
        ("nblora-joint", "joint", None, "NB-LoRA, joint"),
        ("nblora-svd", "svd", None, "NB-LoRA, svd"),
        ("nblora-radial", "radial", None, "NB-LoRA, radial"),
        ("nblora-spectral", None, "spectral", "NB-LoRA, spectral"),
        ("nblora-frobenius", None, "frobenius", "NB-LoRA, frobenius"),
        ("nblora-nuclear", None, "nuclear", "NB-LoRA, nuclear"),
        ("nblora-svd-nuclear", "svd", "nuclear", "NB-LoRA, svd, nuclear"),
        ("nblora-joint-ky-fan-4", "joint", "ky-fan-4", "NB-LoRA, joint, ky-fan-4"),
        ("nblora-ky-fan-2", None, "ky-fan-2", "NB-LoRA, ky-fan-2"),
        ("nblora-radial-frobenius", "radial", "frobenius", "NB-LoRA, radial, frobenius"),
        ("nblora-3", None, 3.0, "NB-LoRA, schatten-3"),
        ("nblora-svd-2.5", "svd", 2.5, "NB-LoRA, svd, schatten-2.5"),
        ("nblora-gradient", None, None, "NB-LoRA, gradient start"),
        ("nblora-gradient-svd-nuclear", "svd", "nuclear", "NB-LoRA, gradient start, svd, nuclear"),
        ("nblora-gradient-radial", "radial", None, "NB-LoRA, gradient start, radial"),
    ],
)
def test_variants_of_nblora(
    name: str, parametrization: str | None, norm: str | float | None, label: str
) -> None:
    method, default = find_method(name), NBLoraConfig()
    assert method.label == label
    assert method.bounded
    assert method.ranked
    assert method.gradient_start == ("gradient" in name)
    config = method.config(4, 0.25, {})
    assert isinstance(config, NBLoraConfig)
    assert (config.r, config.bound) == (4, 0.25)
    assert config.parametrization == (parametrization or default.parametrization)
    assert parse_norm(config.norm) == parse_norm(default.norm if norm is None else norm)


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "full"])
def test_options_override_and_keep_the_rest(name: str) -> None:
    options = {"target_modules": ["first"], "exclude_modules": ["second"]}
    plain, config = find_method(name).config(4, 0.3, {}), find_method(name).config(4, 0.3, options)
    assert set(config.target_modules) == {"first"}
    assert set(config.exclude_modules) == {"second"}
    for field in dataclasses.fields(config):
        if field.name not in options:
            assert getattr(config, field.name) == getattr(plain, field.name)
    assert options == {"target_modules": ["first"], "exclude_modules": ["second"]}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", {"lora_alpha": 16}),
        ("rslora", {"lora_alpha": 5, "use_rslora": False}),
        ("dora", {"lora_dropout": 0.1}),
        ("pissa", {"init_lora_weights": "pissa_niter_4"}),
        ("delora", {"delora_lambda": 15}),
        ("nblora-svd", {"temperature": 2.0, "norm": "nuclear", "bound_kind": "absolute"}),
        ("nblora-svd", {"parametrization": "joint"}),
    ],
)
def test_an_option_beats_what_the_method_says(name: str, options: dict[str, Any]) -> None:
    config = find_method(name).config(8, 0.3, options)
    assert {field: getattr(config, field) for field in options} == options


@pytest.mark.parametrize(
    ("name", "clue"),
    [
        ("LoRA", "got 'LoRA'; did you mean 'lora'?"),
        ("NB-LoRA", "got 'NB-LoRA'; did you mean 'nblora'?"),
        ("loras", "did you mean 'lora'?"),
        ("rsLora", "did you mean 'rslora'?"),
        ("something else", "got 'something else'"),
        ("", "got ''"),
        ("nblora-", "norm must be"),
        ("nblora-svd-", "norm must be"),
        ("nblora-nucular", "norm must be"),
        ("nblora-0.5", "norm=0.5"),
        ("nblora-nan", "norm=nan"),
        ("nblora-ky-fan-0", "ky-fan-0"),
        ("nblora-radial-nuclear", 'needs norm="frobenius"'),
    ],
)
def test_unknown_names_get_one_line_with_all_names(name: str, clue: str) -> None:
    message = refusal(name)
    assert clue in message
    assert all(known in message for known in NAMES)


@pytest.mark.parametrize(
    ("name", "options", "clue"),
    [
        ("lora", {"lora_alfa": 8}, "did you mean 'lora_alpha'?"),
        ("nblora", {"lora_alpha": 8}, "an option of NB-LoRA must be one of"),
        ("nblora", {"norm": "nucular"}, "norm must be"),
        ("nblora", {"temperature": -1}, "temperature must be"),
        ("lora", {"layers_pattern": "layers"}, "the options of LoRA must suit PEFT"),
        ("lora", {"init_lora_weights": "loftq", "loftq_config": 3}, "the options of LoRA must suit PEFT"),
        ("oft", {"r": 3}, "the options of OFT must suit PEFT"),
        ("full", {"r": 3}, "full fine-tuning must have no options, got 'r'"),
        ("lora", {"peft_type": "LORA"}, "an option of LoRA must be one of"),
        ("lora", {"task_type": "CAUSAL_LM"}, "an option of LoRA must be one of"),
    ],
)
def test_bad_options_get_one_line(name: str, options: dict[str, Any], clue: str) -> None:
    assert clue in refusal(name, options)


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_methods_that_are_not_available_say_why(name: str) -> None:
    method = find_method(name)
    assert method.reason == "not in PEFT, and no maintained package has it"
    assert method.label.lower() == name


def test_peft_still_lacks_what_is_said_not_to_be_available() -> None:
    tuners = {module.name for module in pkgutil.iter_modules(peft.tuners.__path__)}
    assert {"lora", "oft", "hra", "delora"} <= tuners
    assert not set(UNAVAILABLE) & tuners
    lora = importlib.import_module("peft.tuners.lora.config")
    assert not any(
        name in field.name for field in dataclasses.fields(lora.LoraConfig) for name in UNAVAILABLE
    )


# --- on models ---


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "full"])
def test_every_method_starts_at_the_base_model_and_trains_every_linear_layer(name: str) -> None:
    base = tiny_llama()
    linear = {
        key for key, module in base.named_modules() if isinstance(module, nn.Linear) and key != "lm_head"
    }
    with torch.no_grad():
        before = base(input_ids=tokens()).logits
    model = get_peft_model(copy.deepcopy(base), find_method(name).config(4, 0.3, {}))
    with torch.no_grad():
        after = model(input_ids=tokens()).logits
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5)
    trained = {
        key.removeprefix("base_model.model.") for key, p in model.named_parameters() if p.requires_grad
    }
    assert linear == {layer for layer in linear if any(key.startswith(f"{layer}.") for key in trained)}
    assert not any(key.startswith("lm_head") for key in trained)


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        learning_rate=1e-3,
        weight_decay=0.05,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        **fields,
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_lora_plus_learns_b_sixteen_times_as_fast(tmp_path: Path, optim: str) -> None:
    method = find_method("lora+")
    assert method.make_optimizer is not None
    model = get_peft_model(TwoLayers(), method.config(4, None, {}))
    optimizer = method.make_optimizer(model, arguments(tmp_path, optim=optim))
    assert isinstance(optimizer, Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim=optim))[0])
    rates = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(rates) == len(trained) == 4
    for name, parameter in trained.items():
        rate, decay = rates[parameter]
        assert rate == pytest.approx(16e-3 if "lora_B" in name else 1e-3), name
        assert decay == 0.05


def test_lora_plus_keeps_its_ratio_under_a_schedule(tmp_path: Path) -> None:
    method = find_method("lora+")
    assert method.make_optimizer is not None
    model = get_peft_model(TwoLayers(), method.config(4, None, {}))
    given = arguments(tmp_path, lr_scheduler_type="cosine", warmup_steps=3)
    trainer = Trainer(model, given, optimizers=(method.make_optimizer(model, given), None))
    scheduler = trainer.create_scheduler(20)
    for _ in range(12):
        slow, fast = (trainer.optimizer.param_groups[i]["lr"] for i in (0, 2))
        assert fast == pytest.approx(16 * slow)
        trainer.optimizer.step()
        scheduler.step()
    assert 0 < slow < 1e-3


def test_no_parameter_of_nblora_looks_like_a_lora_b(tmp_path: Path) -> None:
    """All of NB-LoRA trains at one rate: its names must not be taken for those that LoRA+ speeds up."""
    for name in ("nblora", "nblora-svd", "nblora-svd-nuclear"):
        method = find_method(name)
        assert method.make_optimizer is None
        model = get_peft_model(TwoLayers(), method.config(4, 0.3, {}))
        trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained
        assert not any("lora_B" in key or "lora_A" in key for key in trained)
        groups = Trainer(model, arguments(tmp_path)).create_optimizer().param_groups
        assert {group["lr"] for group in groups} == {1e-3}
        assert sum(len(group["params"]) for group in groups) == len(trained)
