"""NBLoraConfig refuses what breaks its rules, documents its defaults and survives the disk."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftConfig, TaskType

from nblora import NBLoraConfig
from nblora.bounds import KyFan, Schatten, Spectral, parse_norm

NAN, INF = math.nan, math.inf

# field, the rule that the message must state, values that break it
BROKEN: list[tuple[str, str, list[Any]]] = [
    ("r", "r must be an integer >= 1", [0, -1, 2.0, NAN, INF, True, "8", None]),
    (
        "norm",
        'norm must be "spectral", "frobenius", "nuclear", "ky-fan-q" with an integer q >= 1, '
        "or a number p >= 1",
        [0.5, 0, -2, NAN, -INF, True, None, "operator", "Spectral", "ky-fan-0", "ky-fan--1", "ky-fan-", ""],
    ),
    ("bound", "bound must be a number, positive and finite", [0, -0.3, NAN, INF, -INF, True, "0.3", None]),
    ("bound_kind", "bound_kind must be 'relative' or 'absolute'", ["Relative", "", None, True, NAN, 1]),
    (
        "parametrization",
        "parametrization must be one of 'joint', 'svd', 'radial'",
        ["SVD", "cayley", None, False, NAN],
    ),
    ("temperature", "temperature must be a number, positive and finite", [0, -1, NAN, INF, True, "1", None]),
    ("dropout", "dropout must be in [0, 1)", [-0.1, 1, 1.5, NAN, INF, -INF, True, "0.1", None]),
    ("init_weights", "init_weights must be True or False", [0, 1, 1.0, "gaussian", None, NAN]),
    ("bias", "bias must be 'none' or 'all' or 'nblora_only'", ["lora_only", "", None, False, NAN]),
    ("rank_pattern", "rank_pattern must map layer names to values", [8, "first", ["first"], True]),
    ("bound_pattern", "bound_pattern must map layer names to values", [0.1, "first", ["first"], True]),
]


@pytest.mark.parametrize(
    ("field", "rule", "value"),
    [
        pytest.param(field, rule, value, id=f"{field}={value!r}")
        for field, rule, values in BROKEN
        for value in values
    ],
)
def test_broken_value_is_refused_with_the_rule_and_then_the_value(field: str, rule: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}, got {field}={re.escape(repr(value))}"):
        NBLoraConfig(**{field: value})


@pytest.mark.parametrize("value", [0, -1, 2.0, True, NAN, "4", None])
def test_broken_rank_of_a_pattern_is_refused(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^rank_pattern\['q_proj'\] must be an integer >= 1, got .*="
    ) as error:
        NBLoraConfig(rank_pattern={"v_proj": 4, "q_proj": value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF, True, "0.3", None])
def test_broken_bound_of_a_pattern_is_refused(value: Any) -> None:
    rule = r"^bound_pattern\['q_proj'\] must be a number, positive and finite, got .*="
    with pytest.raises(ValueError, match=rule) as error:
        NBLoraConfig(bound_pattern={"v_proj": 0.1, "q_proj": value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "choices",
    [
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        {"target_modules": "all-linear", "layers_to_transform": 1},
        {"target_modules": ".*q_proj", "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    ],
)
def test_choices_of_layers_that_contradict_each_other_are_refused(choices: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"layers_(to_transform|pattern) needs .*, got "):
        NBLoraConfig(**choices)


def test_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="lora_alpha"):
        NBLoraConfig(lora_alpha=16)


def test_defaults_are_the_documented_ones() -> None:
    config = NBLoraConfig()
    assert (config.r, config.norm, config.bound, config.bound_kind) == (8, "frobenius", 0.3, "relative")
    assert (config.parametrization, config.temperature) == ("joint", 1.0)
    assert (config.dropout, config.init_weights, config.bias) == (0.0, True, "none")
    assert config.rank_pattern == {}
    assert config.bound_pattern == {}
    assert config.target_modules is None
    assert config.exclude_modules is None
    assert config.layers_to_transform is None
    assert config.layers_pattern is None
    assert config.modules_to_save is None
    assert config.fan_in_fan_out is False
    assert config.inference_mode is False
    assert config.peft_type.value == "NBLORA"


def test_every_field_is_documented() -> None:
    for name in NBLoraConfig.__annotations__:
        assert re.search(rf"^        {name}: ", NBLoraConfig.__doc__ or "", re.MULTILINE), name


def test_no_pattern_means_an_empty_one_of_its_own() -> None:
    first, second = NBLoraConfig(rank_pattern=None, bound_pattern=None), NBLoraConfig()
    assert first.rank_pattern == second.rank_pattern == {}
    assert first.rank_pattern is not second.rank_pattern
    assert first.bound_pattern is not second.bound_pattern


def test_lists_of_layers_become_sets() -> None:
    config = NBLoraConfig(target_modules=["q_proj", "v_proj", "q_proj"], exclude_modules=["v_proj"])
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.exclude_modules == {"v_proj"}


@pytest.mark.parametrize(
    ("spelling", "norm"),
    [
        ("spectral", Spectral()),
        ("frobenius", Schatten(2.0)),
        ("nuclear", Schatten(1.0)),
        ("ky-fan-3", KyFan(3)),
        (1, Schatten(1.0)),
        (2, Schatten(2.0)),
        (3.5, Schatten(3.5)),
        (INF, Spectral()),
        ("schatten-3.5", Schatten(3.5)),
    ],
)
@pytest.mark.parametrize("door", [NBLoraConfig, PeftConfig])
def test_every_spelling_of_a_norm_survives_the_disk(
    spelling: Any, norm: Any, door: type[PeftConfig], tmp_path: Path
) -> None:
    NBLoraConfig(norm=spelling).save_pretrained(str(tmp_path))
    loaded = door.from_pretrained(str(tmp_path))
    assert isinstance(loaded, NBLoraConfig)
    assert loaded.norm == ("spectral" if spelling == INF else spelling)  # infinity is not JSON
    assert parse_norm(loaded.norm) == norm


@pytest.mark.parametrize("door", [NBLoraConfig, PeftConfig])
def test_every_field_survives_the_disk(door: type[PeftConfig], tmp_path: Path) -> None:
    config = NBLoraConfig(
        r=5,
        norm="nuclear",
        bound=1.25,
        bound_kind="absolute",
        parametrization="svd",
        temperature=0.5,
        dropout=0.1,
        init_weights=False,
        rank_pattern={"q_proj": 2, r".*\.1\..*v_proj": 3},
        bound_pattern={"q_proj": 0.5, r".*\.1\..*v_proj": 2.0},
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["lm_head"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
        bias="nblora_only",
        fan_in_fan_out=True,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path="somewhere",
        revision="main",
        inference_mode=True,
    )
    config.save_pretrained(str(tmp_path))
    loaded = door.from_pretrained(str(tmp_path))
    assert isinstance(loaded, NBLoraConfig)
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj", None])
def test_targets_given_as_text_survive_the_disk(targets: str | None, tmp_path: Path) -> None:
    NBLoraConfig(target_modules=targets).save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).target_modules == targets


def test_a_saved_configuration_names_its_method_in_plain_json(tmp_path: Path) -> None:
    NBLoraConfig().save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "NBLORA"


def test_a_tampered_configuration_is_refused(tmp_path: Path) -> None:
    NBLoraConfig().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"bound": NAN}))  # Python's json writes and reads NaN
    with pytest.raises(ValueError, match="bound must be a number, positive and finite, got bound=nan"):
        PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("norm", [Schatten(3.0), Spectral()])
def test_norm_objects_are_refused_since_they_cannot_be_saved(norm: Any) -> None:
    with pytest.raises(ValueError, match=r"norm must be a name or a number, which can be saved, got "):
        NBLoraConfig(norm=norm)


def test_numpy_numbers_become_plain_ones(tmp_path: Path) -> None:
    config = NBLoraConfig(norm=np.float32(2.5), r=np.int64(3), bound=np.float32(0.5))
    assert [type(value) for value in (config.norm, config.r, config.bound)] == [float, int, float]
    config.save_pretrained(str(tmp_path))
    assert NBLoraConfig.from_pretrained(str(tmp_path)).norm == 2.5


@pytest.mark.parametrize("name", ["rank_pattern", "bound_pattern"])
def test_patterns_that_are_no_regular_expressions_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"keys of {name} must be names or regular expressions, got "):
        NBLoraConfig(**{name: {"(": 1}})
