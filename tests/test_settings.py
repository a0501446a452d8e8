"""Settings: YAML as people write it, options on top of it, and every field of TrainingArguments."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from nblora.settings import (
    SettingsError,
    check_names,
    dotted_options,
    overlay,
    parse_yaml,
    portable,
    read_yaml,
    training_arguments,
    write_yaml,
)


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """The message of the SettingsError that a call raises, which must be one line."""
    with pytest.raises(SettingsError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message == " ".join(message.split()), "the message must be one line"
    return message


# --- YAML ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("0x10", 16),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("1.5e+3", 1.5e3),
        ("-2e-05", -2e-5),
        ("3.", 3.0),
        (".5", 0.5),
        ("-.5", -0.5),
        (".5e1", 5.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # names and other text that YAML 1.1 takes for something else
        ("no", "no"),
        ("off", "off"),
        ("Yes", "Yes"),
        ("007", "007"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-01-31", "2026-01-31"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".", "."),
        ("frobenius", "frobenius"),
        ("owner/name:part", "owner/name:part"),
        ("[1e-3, no, {a: 2}]", [1e-3, "no", {"a": 2}]),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_yaml(".nan"))


@pytest.mark.parametrize(
    ("text", "clue"),
    [
        ("[1, 2", "line 1, column"),
        ("a: 1\nb: [", "line 2"),
        ("{a: 1, a: 2}", "'a' must be given once"),
        ("{a: {b: 1, b: 2}}", "'b' must be given once"),
        ("*unknown", "unknown"),
        ("{[a]: 1}", "unhashable"),
        ("!!python/object/apply:os.getcwd []", "python/object"),
        ("!!int abc", "abc"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("\x00", "special characters"),
        ("[" * 800, "recursion"),
    ],
    ids=range(11),
)
def test_what_is_not_yaml_is_refused_in_one_line(text: str, clue: str) -> None:
    assert clue in refusal(parse_yaml, text)


def test_anchors_may_be_overridden() -> None:
    text = "base: &base {a: 1, b: 2}\nmore: &more {<<: *base, b: 3}\nmost: {<<: *more, a: 4}\n"
    parsed = parse_yaml(text)
    assert parsed["more"] == {"a": 1, "b": 3}
    assert parsed["most"] == {"a": 4, "b": 3}


def test_the_first_of_several_merged_mappings_wins() -> None:
    text = "one: &one {lora: 1}\ntwo: &two {lora: 2, rank: 2}\nboth: {bound: 3, <<: [*one, *two]}\n"
    assert parse_yaml(text)["both"] == {"bound": 3, "lora": 1, "rank": 2}


@pytest.mark.parametrize("text", ["a: {<<: 1}", "b: &b {c: 1}\na: {<<: [*b, 2]}"])
def test_only_mappings_are_merged(text: str) -> None:
    assert "expected a mapping" in refusal(parse_yaml, text)


def test_other_loaders_keep_their_own_rules() -> None:
    assert yaml.safe_load("[no, 1e-3]") == [False, "1e-3"]
    assert yaml.safe_dump({"a": "1e-3"}) == "a: 1e-3\n"


def test_a_file_is_a_mapping_of_names(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("train:\n  learning_rate: 1e-3\n  eval_strategy: no\nname: naïve\n", encoding="utf-8")
    assert read_yaml(file) == {
        "train": {"learning_rate": 1e-3, "eval_strategy": "no"},
        "name": "naïve",
    }
    file.write_text("# nothing\n")
    assert read_yaml(file) == {}


@pytest.mark.parametrize(
    ("content", "clue"),
    [
        (b"- a\n- b\n", "must map names to values, got list"),
        (b"just text", "must map names to values, got str"),
        (b"1: a\n", "got 1 in place of a name"),
        (b"a: [1\n", "must be YAML: expected ',' or ']'"),
        (b"a: \xff\xfe\n", "must be a readable YAML file"),
    ],
)
def test_an_unusable_file_is_named_in_one_line(tmp_path: Path, content: bytes, clue: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    message = refusal(read_yaml, file)
    assert clue in message
    assert message.startswith(str(file))


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    assert str(tmp_path / name) in refusal(read_yaml, tmp_path / name)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]))
    | st.sampled_from(
        ["no", "1e-3", "12:30", "2026-01-31", "007", "0x1f", "null", "~", ".inf", "<<", "a: b"]
    ),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc", min_size=1), inner),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text("abcdefgh_", min_size=1), PLAIN))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    file = tmp_path_factory.mktemp("yaml") / "config.yaml"
    write_yaml(file, values)
    assert read_yaml(file) == values


def test_other_programs_read_the_same_text(tmp_path: Path) -> None:
    """What is text here must not be a number, date or truth value for a YAML 1.1 reader."""
    values = {"a": "no", "b": "12:30", "c": "2026-01-31", "d": "1_000", "e": 1e-5, "f": "1e-3"}
    write_yaml(tmp_path / "config.yaml", values)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == values


def test_writing_keeps_order_and_repeats_shared_values(tmp_path: Path) -> None:
    shared = [1, 2]
    write_yaml(tmp_path / "new" / "config.yaml", {"z": shared, "a": shared})
    assert (tmp_path / "new" / "config.yaml").read_text() == "z:\n- 1\n- 2\na:\n- 1\n- 2\n"


def test_a_value_that_yaml_cannot_hold_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_yaml(file, {"a": 1})
    assert "plain values" in refusal(write_yaml, file, {"a": object()})
    assert read_yaml(file) == {"a": 1}
    assert os.listdir(tmp_path) == ["config.yaml"]


# --- options ---


def test_dotted_options_are_yaml_by_group() -> None:
    found = dotted_options(
        [
            *("--train.learning_rate", "1e-3"),
            "--train.per-device-train-batch-size=4",
            *("--load.dtype", "bfloat16"),
            "--train.fp16",
            *("--train.report_to", "tensorboard", "wandb"),
            *("--train.eval_strategy", "no"),
            *("--train.lr_scheduler_kwargs", "{min_lr: 1e-6}"),
            *("--train.max_steps", "-1"),
            "--train.run_name=a=b --c",
            "--train.hub_token=",
        ],
        ("train", "load"),
    )
    assert found == {
        "train": {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "fp16": True,
            "report_to": ["tensorboard", "wandb"],
            "eval_strategy": "no",
            "lr_scheduler_kwargs": {"min_lr": 1e-6},
            "max_steps": -1,
            "run_name": "a=b --c",
            "hub_token": None,
        },
        "load": {"dtype": "bfloat16"},
    }


def test_no_options_and_repeated_ones() -> None:
    assert dotted_options([], ("train", "load")) == {"train": {}, "load": {}}
    repeated = ["--train.seed", "1", "--train.seed", "2"]
    assert dotted_options(repeated, ("train",)) == {"train": {"seed": 2}}


@pytest.mark.parametrize(
    ("arguments", "clue"),
    [
        (["stray"], "got 'stray'"),
        (["--other.seed", "1"], "--train.NAME VALUE, --load.NAME VALUE, got '--other.seed'"),
        (["--train"], "got '--train'"),
        (["--train.", "1"], "got '--train.'"),
        (["--train.seed", "1", "--seed", "2"], "got '--seed'"),
        (["--train.a", "[1"], "the value of --train.a must be YAML, got '[1'"),
        (["--train.a=[1"], "the value of --train.a must be YAML, got '[1'"),
    ],
)
def test_other_options_are_refused(arguments: list[str], clue: str) -> None:
    assert clue in refusal(dotted_options, arguments, ("train", "load"))


def test_overlay_merges_mappings_one_level_deep() -> None:
    below = {"train": {"a": 1, "b": {"x": 1}}, "keep": "k", "list": [1], "load": {"c": 1}}
    above = {"train": {"b": {"y": 2}}, "list": [2], "new": 3, "load": None}
    assert overlay(below, above) == {
        "train": {"a": 1, "b": {"y": 2}},
        "keep": "k",
        "list": [2],
        "load": None,
        "new": 3,
    }
    assert below["train"] == {"a": 1, "b": {"x": 1}}, "the lower settings must stay as they were"


def test_paths_that_exist_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "data [1]-0.csv").touch()
    values = {
        "model": Path("model"),
        "data": "data [1]-{seed}.csv",
        "keep": "owner/name",
        "task": "model",
        "train": {"a": 1},
    }
    found = portable(values)
    assert found == {
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "data [1]-{seed}.csv"),
        "keep": "owner/name",
        "task": "model",
        "train": {"a": 1},
    }
    assert portable(found) == found
    assert portable({"data": "other-{seed}.csv", "keep": None, "model": 3}) == {
        "data": "other-{seed}.csv",
        "keep": None,
        "model": 3,
    }


def test_unknown_names_come_with_the_nearest_known_one() -> None:
    check_names(["a", "b"], iter(["a", "b", "c"]), "a letter")
    message = refusal(check_names, ["model", "modle"], ["model", "data"], "a setting")
    assert message == "a setting must be one of model, data, got 'modle'; did you mean 'model'?"
    assert refusal(check_names, ["zzz"], ["model"], "a setting").endswith("got 'zzz'")


# --- TrainingArguments ---

FIELDS = [f for f in dataclasses.fields(TrainingArguments) if f.init and f.name != "output_dir"]

# values for fields for which "another one of its type" is not enough, and what becomes of them
PLAUSIBLE: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"min_lr": 1e-6, "nested": {"a": "5"}},
    "optim": "sgd",
    "optim_target_modules": ["query", "value"],
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "liger_kernel_config": {"rope": True},
    "logging_strategy": "no",
    "include_num_input_tokens_seen": "non_padding",
    "log_level": "error",
    "log_level_replica": "info",
    "report_to": ["tensorboard", "wandb"],
    "trackio_static_space_id": "owner/space",
    "eval_strategy": "epoch",
    "include_for_metrics": ["inputs", "loss"],
    "save_strategy": "no",
    "hub_strategy": "end",
    "accelerator_config": {"split_batches": True},
    "dataloader_multiprocessing_context": "spawn",
    "label_names": ["labels", "other"],
    "train_sampling_strategy": "sequential",
    "fsdp_config": {"min_num_params": 7},
    "debug": ["underflow_overflow"],
    "dataloader_prefetch_factor": 2,
    "seed": 1e3,
}
WITH = {
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "bf16": {"use_cpu": True},
    "bf16_full_eval": {"use_cpu": True},
    "load_best_model_at_end": {"save_strategy": "best"},
}
# they need hardware, packages or processes that are not here
ELSEWHERE = {"tf32": True, "deepspeed": {"zero_optimization": {"stage": 2}}, "ddp_backend": "gloo"}
NOTED_BY_NAME = {"parallelism_config": {"tp_size": 1}, "fsdp": True}


def plausible(field: dataclasses.Field[Any]) -> Any:
    """A value of the field's type that differs from its default."""
    if field.name in PLAUSIBLE:
        return PLAUSIBLE[field.name]
    kind = str(field.type)
    if "bool" in kind:
        return not field.default
    if "int" in kind:
        return 7
    if "float" in kind:
        return 0.125
    assert "str" in kind, f"no plausible value for {field.name}: {kind}"
    return "some-text"


def plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


@pytest.mark.parametrize(
    "field", [f for f in FIELDS if f.name not in {*ELSEWHERE, *NOTED_BY_NAME}], ids=lambda field: field.name
)
def test_every_training_argument_is_reachable_with_its_type(
    field: dataclasses.Field[Any], tmp_path: Path
) -> None:
    value = plausible(field)
    with warnings.catch_warnings():
        # the older name of activation_checkpointing
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        arguments = training_arguments({field.name: value, **WITH.get(field.name, {})}, tmp_path)
        written = training_arguments(
            {**parse_yaml(yaml.safe_dump({field.name: value})), **WITH.get(field.name, {})}, tmp_path
        )
    found = plain(getattr(arguments, field.name))
    if field.name == "accelerator_config":
        assert found.split_batches is True
    elif field.name == "fsdp_config":
        assert found["min_num_params"] == 7
    else:
        assert found == value
        assert type(found) is (int if field.name == "seed" else type(value))
        assert plain(getattr(written, field.name)) == found
    assert arguments.output_dir == str(tmp_path)


def test_fields_with_values_of_their_own_kind(tmp_path: Path) -> None:
    assert training_arguments({"fsdp": True}, tmp_path).fsdp is True
    parallel = training_arguments({"parallelism_config": {"tp_size": 1}}, tmp_path).parallelism_config
    assert parallel is not None
    assert parallel.tp_size == 1


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_this_machine_cannot_do_is_one_line(name: str, tmp_path: Path) -> None:
    message = refusal(training_arguments, {name: ELSEWHERE[name]}, tmp_path)
    assert message.startswith("the training arguments must suit transformers: ")


def test_the_list_of_fields_is_the_whole_of_them() -> None:
    assert len(FIELDS) > 100
    assert {*PLAUSIBLE, *WITH, *ELSEWHERE, *NOTED_BY_NAME} <= {field.name for field in FIELDS}


def test_none_and_nothing_mean_the_defaults(tmp_path: Path) -> None:
    arguments = training_arguments({"learning_rate": None, "report_to": None}, tmp_path)
    defaults = TrainingArguments(str(tmp_path))
    for field in FIELDS:
        found, default = getattr(arguments, field.name), getattr(defaults, field.name)
        assert str(found) == str(default), field.name


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("learning_rate", 1, 1.0),
        ("weight_decay", -1e-5, -1e-5),
        ("max_steps", 1e3, 1000),
        ("max_steps", -1, -1),
        ("run_name", 8, "8"),
        ("run_name", "-x --learning_rate=3", "-x --learning_rate=3"),
        ("run_name", "{a: 1}", "{a: 1}"),
        ("fp16", "yes", True),
        ("logging_nan_inf_filter", False, False),
        ("report_to", "none", []),
        ("report_to", [], []),
        ("report_to", ("tensorboard",), ["tensorboard"]),
        ("label_names", [], []),
        ("include_num_input_tokens_seen", True, "all"),
        ("debug", "underflow_overflow", ["underflow_overflow"]),
        ("lr_scheduler_kwargs", '{"min_lr": 0.5}', {"min_lr": 0.5}),
    ],
)
def test_values_as_people_write_them(name: str, value: Any, found: Any, tmp_path: Path) -> None:
    got = plain(getattr(training_arguments({name: value}, tmp_path), name))
    assert got == found
    assert type(got) is type(found)


@pytest.mark.parametrize(
    ("values", "clue"),
    [
        ({"learning_rat": 1e-3}, "train.learning_rat is no field"),
        ({"learning_rat": 1e-3}, "did you mean 'learning_rate'?"),
        ({"no_such_thing_at_all": 1}, "no field of transformers' TrainingArguments"),
        ({"output_dir": "elsewhere"}, "use --out"),
        (
            {"learning_rate": "fast"},
            "train.learning_rate must suit transformers: invalid float value: 'fast'",
        ),
        ({"learning_rate": math.nan}, "train.learning_rate must be a number, got nan"),
        ({"learning_rate": [1e-3, 1e-2]}, "train.learning_rate must be a single value, got [0.001, 0.01]"),
        ({"learning_rate": {"a": 1}}, "train.learning_rate must suit transformers"),
        ({"max_steps": 1.5}, "train.max_steps must suit transformers: invalid int value: '1.5'"),
        ({"max_steps": True}, "train.max_steps must suit transformers"),
        ({"fp16": "perhaps"}, "train.fp16 must suit transformers"),
        ({"lr_scheduler_type": "cos"}, "invalid choice: 'cos'"),
        ({"save_strategy": False}, "train.save_strategy must suit transformers"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"fp16": True, "bf16": True, "use_cpu": True}, "not both"),
        ({"accelerator_config": {"no_such": 1}}, "no_such"),
        ({"accelerator_config": "nowhere.json"}, "nowhere.json"),
        ({"lr_scheduler_kwargs": "{broken"}, "must suit transformers"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"}, "to match"),
    ],
)
def test_what_transformers_refuses_is_one_line(values: dict[str, Any], clue: str, tmp_path: Path) -> None:
    assert clue in refusal(training_arguments, values, tmp_path)


def test_refusals_never_end_the_process_nor_print(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for field in FIELDS:
        for value in ("no such value", -7.5, {"a": 1}, ["a", "b"]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with suppress(SettingsError):
                    training_arguments({field.name: value}, tmp_path)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "usage:" not in printed.err


def test_a_file_of_arguments_beside_the_program_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own way of parsing reads PROGRAM.args, which a job must not depend on."""
    (tmp_path / "job.args").write_text("--learning_rate 3.0")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "job.py")])
    assert training_arguments({}, tmp_path).learning_rate == 5e-5
