"""Comparisons: which runs there are, that none is done twice or lost, and whose numbers are reported."""

from __future__ import annotations

import csv
import gc
import itertools
import json
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nblora import comparison as module
from nblora.comparison import (
    ComparisonConfig,
    Setting,
    compare,
    execute,
    failed,
    summarise,
)
from nblora.executors import LocalExecutor
from nblora.methods import METHODS
from nblora.settings import SettingsError

BASE: dict[str, Any] = {"model": "owner/model", "task": "seq-cls", "data": "owner/data"}


def refusal(**settings: Any) -> str:
    """The message of the error that settings get, which must be one line."""
    with pytest.raises(SettingsError) as caught:
        ComparisonConfig.of({**BASE, **settings})
    message = str(caught.value)
    assert message == " ".join(message.split())
    return message


# --- settings ---


def test_defaults_are_a_whole_comparison() -> None:
    config = ComparisonConfig.of(BASE)
    assert config.methods == {"nblora": {}, "lora": {}}
    assert config.learning_rates == (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    assert (config.ranks, config.epochs, config.bounds, config.seeds) == ((8,), (3,), (0.3,), (0,))
    assert config.reference == {"rank": 8, "epochs": 3}
    assert (config.grid, config.tolerance, config.data_seed) == ("full", 0.02, 0)
    assert len(config.settings()) == 14


@pytest.mark.parametrize(
    ("name", "value", "clue"),
    [
        ("no_such", 1, "a setting must be one of model, task"),
        ("learning_rate", [1], "did you mean 'learning_rates'?"),
        ("model", "", "the settings must have a model"),
        ("model", None, "the settings must have a model, got None"),
        ("data", 3, "the settings must have a data"),
        ("task", "classify", "the task must be one of causal-lm"),
        ("keep", 3, "keep must be a file, a folder or a hub name, got 3"),
        ("train", [1], "train must map names to values"),
        ("columns", "label", "columns must map names to values"),
        ("max_length", 0, "max_length must be an integer >= 1, got 0"),
        ("max_eval_samples", 1.5, "max_eval_samples must be an integer >= 1"),
        ("learning_rates", [1e-3, -1], "learning_rates must be positive numbers, got -1"),
        ("learning_rates", [0], "learning_rates must be positive numbers, got 0"),
        ("learning_rates", [math.nan], "learning_rates must be positive numbers, got nan"),
        ("learning_rates", [math.inf], "learning_rates must be positive numbers, got inf"),
        ("learning_rates", "1e-3", "learning_rates must be positive numbers, got '1e-3'"),
        ("learning_rates", [True], "learning_rates must be positive numbers, got True"),
        ("learning_rates", {"a": 1}, "learning_rates must be positive numbers"),
        ("learning_rates", [[1e-3]], "learning_rates must be positive numbers, got [0.001]"),
        ("learning_rates", [], "learning_rates must have values, each once, got []"),
        ("learning_rates", [1e-3, 0.001], "learning_rates must have values, each once"),
        ("ranks", [8, 2.5], "ranks must be positive integers, got 2.5"),
        ("ranks", [8.0], "ranks must be positive integers, got 8.0"),
        ("ranks", [0], "ranks must be positive integers, got 0"),
        ("ranks", None, "ranks must be positive integers, got None"),
        ("ranks", [True], "ranks must be positive integers, got True"),
        ("epochs", [0.0], "epochs must be positive numbers, got 0.0"),
        ("epochs", [1, 1.0], "epochs must have values, each once"),
        ("bounds", [-0.1], "bounds must be positive numbers, got -0.1"),
        ("seeds", [-1], "seeds must be integers from 0 to 2^32 - 1, got -1"),
        ("seeds", [2**32], "seeds must be integers from 0 to 2^32 - 1"),
        ("seeds", [0.0], "seeds must be integers from 0 to 2^32 - 1, got 0.0"),
        ("seeds", [False], "seeds must be integers from 0 to 2^32 - 1, got False"),
        ("data_seed", -1, "data_seed must be integers from 0 to 2^32 - 1, got -1"),
        ("data_seed", [0], "data_seed must be integers from 0 to 2^32 - 1, got [0]"),
        ("grid", "some", "grid must be 'full' or 'star', got 'some'"),
        ("grid", ["full"], "grid must be 'full' or 'star'"),
        ("tolerance", -0.1, "tolerance must be a number >= 0, got -0.1"),
        ("tolerance", math.nan, "tolerance must be a number >= 0, got nan"),
        ("tolerance", "0.1", "tolerance must be a number >= 0, got '0.1'"),
        ("tolerance", True, "tolerance must be a number >= 0, got True"),
        ("reference", {"rank": 9}, "the reference's rank must be one of (8,), got 9"),
        ("reference", {"epochs": 9}, "the reference's epochs must be one of (3,), got 9"),
        ("reference", {"ranks": 8}, "did you mean 'rank'?"),
        ("reference", 8, "reference must map rank and epochs to values, got 8"),
        ("train", {"num_train_epochs": 1}, "train.num_train_epochs is an axis"),
        ("train", {"max_steps": 1}, "train.max_steps is an axis"),
        ("train", {"learning_rate": 1}, "train.learning_rate is an axis"),
        ("train", {"seed": 1}, "train.seed is an axis"),
        ("train", {"output_dir": "x"}, "train.output_dir is an axis of the comparison or set by it"),
        ("train", {"warmup": 1}, "train.warmup is no field"),
        ("train", {"weight_decay": "much"}, "train.weight_decay must suit transformers"),
        ("load", {"dtype": torch.float32}, "settings must be text, numbers, lists and mappings"),
        ("methods", [], "methods must have at least one, got none"),
        ("methods", {}, "methods must have at least one, got none"),
        ("methods", 3, "methods must be names or a mapping from names to options, got 3"),
        ("methods", None, "methods must be names or a mapping from names to options, got None"),
        ("methods", [3], "methods must be names or a mapping from names to options, got [3]"),
        ("methods", ["lora", "lora"], "methods must be named once each"),
        ("methods", ["lorra"], "did you mean 'lora'?"),
        ("methods", {"mine": {}}, "a method must be one of"),
        ("methods", {"mine": {"method": "lorra"}}, "did you mean 'lora'?"),
        ("methods", {"mine": {"method": 3}}, "the method of 'mine' must be a name, got 3"),
        ("methods", {"lora": 3}, "options of method 'lora' must map names to values, got 3"),
        ("methods", {"lora": {"lora_alfa": 3}}, "did you mean 'lora_alpha'?"),
        ("methods", {"lora": {"r": 4}}, "r of method 'lora' is an axis of the comparison: use ranks"),
        ("methods", {"oft": {"oft_block_size": 4}}, "is an axis of the comparison: use ranks"),
        ("methods", {"nblora": {"bound": -1}}, "bound must be"),
        ("methods", {"nblora": {"norm": "nucular"}}, "norm must be"),
        ("methods", {"a/b": {"method": "lora"}}, "a method's name must be of at most 60 letters"),
        ("methods", {"../up": {"method": "lora"}}, "a method's name must be of at most 60 letters"),
        ("methods", {" lora": {"method": "lora"}}, "a method's name must be of at most 60 letters"),
        ("methods", {"x" * 61: {"method": "lora"}}, "a method's name must be of at most 60 letters"),
        ("methods", {"x\0": {"method": "lora"}}, "a method's name must be of at most 60 letters"),
    ],
)
def test_every_rule_is_one_line(name: str, value: Any, clue: str) -> None:
    assert clue in refusal(**{name: value})


@pytest.mark.parametrize("name", ["model", "task", "data"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match=f"must have a {name}, got None"):
        ComparisonConfig.of({key: value for key, value in BASE.items() if key != name})


def test_axes_may_be_single_values_and_any_numbers_and_are_sorted() -> None:
    config = ComparisonConfig.of(
        {
            **BASE,
            "learning_rates": np.array([1e-1, 1e-3]),
            "ranks": range(3, 0, -1),
            "epochs": 2,
            "bounds": (0.5, np.float32(0.25)),
            "seeds": np.arange(2),
            "methods": "nblora",
        }
    )
    assert config.learning_rates == (1e-3, 1e-1)
    assert (config.ranks, config.epochs, config.bounds) == ((1, 2, 3), (2,), (0.25, 0.5))
    assert config.seeds == (0, 1)
    assert config.reference == {"rank": 2, "epochs": 2}
    numbers = itertools.chain(config.learning_rates, config.ranks, config.bounds, config.seeds)
    assert {type(number) for number in numbers} == {int, float}


def test_methods_of_ones_own_have_options_and_labels() -> None:
    config = ComparisonConfig.of(
        {
            **BASE,
            "methods": {
                "lora": None,
                "lora 16": {"method": "lora", "lora_alpha": 16},
                "named": {"method": "nblora-svd", "label": "NB-LoRA, δ = 0.1 / mine", "bound": 0.1},
                "wara": {},
            },
            "learning_rates": [0.1],
            "bounds": [0.3, 0.6],
        }
    )
    settings = config.settings()
    assert [(s.method, s.bound) for s in settings] == [("lora", None), ("lora 16", None), ("named", 0.1)]
    assert config.job(settings[1])["options"] == {"method": "lora", "lora_alpha": 16}
    found = summarise(config, [], {"metric": "accuracy", "target": 0.1, "kept": None})
    assert [(m["method"], m["label"], m["available"]) for m in found["methods"]] == [
        ("lora", "LoRA", True),
        ("lora 16", "lora 16", True),
        ("named", "NB-LoRA, δ = 0.1 / mine", True),
        ("wara", "WaRA", False),
    ]
    assert found["methods"][3]["reason"] == METHODS["wara"].reason
    assert set(found["methods"][3]) == {"method", "label", "available", "reason"}


def test_what_is_saved_is_the_same_comparison() -> None:
    config = ComparisonConfig.of(
        {
            **BASE,
            "keep": "owner/kept",
            "methods": {"mine": {"method": "lora", "lora_alpha": 3}, "full": {}},
            "ranks": [2, 4],
            "tolerance": 0,
            "train": {"warmup_steps": 0.1},
            "reference": {"rank": 2},
            "grid": "star",
            "max_length": 7,
        }
    )
    saved = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert ComparisonConfig.of(saved) == config
    assert saved["tolerance"] == 0
    assert "load" not in saved


# --- the grid ---

GRID = {
    **BASE,
    "methods": ["nblora", "nblora-svd", "lora", "full", "rasa"],
    "learning_rates": [1e-3, 1e-2, 1e-1],
    "ranks": [2, 8, 32],
    "epochs": [1, 5],
    "bounds": [0.2, 0.4],
    "seeds": [3, 1],
    "reference": {"rank": 8, "epochs": 5},
}


def test_full_grid_has_every_combination_once() -> None:
    settings = ComparisonConfig.of(GRID).settings()
    rates, ranks, epochs, bounds, seeds = 3, 3, 2, 2, 2
    bounded, ranked, unranked = 2, 1, 1
    assert len(settings) == seeds * rates * epochs * (bounded * ranks * bounds + ranked * ranks + unranked)
    assert len(set(settings)) == len({setting.key for setting in settings}) == len(settings) == 192
    own = [s for s in settings if s.method == "nblora-svd"]
    axes = {(s.learning_rate, s.rank, s.epochs, s.bound, s.seed) for s in own}
    assert axes == set(
        itertools.product(
            GRID["learning_rates"], GRID["ranks"], GRID["epochs"], GRID["bounds"], GRID["seeds"]
        )
    )
    assert {(s.rank, s.bound) for s in settings if s.method == "full"} == {(None, None)}
    assert {(s.rank, s.bound) for s in settings if s.method == "lora"} == {(2, None), (8, None), (32, None)}
    assert not any(s.method == "rasa" for s in settings)
    assert [s.seed for s in settings] == sorted(s.seed for s in settings), "whole seeds first"


def test_star_grid_varies_ranks_or_epochs_but_not_both() -> None:
    full = ComparisonConfig.of(GRID).settings()
    star = ComparisonConfig.of({**GRID, "grid": "star"}).settings()
    places = 4  # (2, 5), (8, 5), (32, 5), (8, 1)
    assert len(star) == 2 * 3 * (2 * places * 2 + places + 2) == 132
    assert set(full) - set(star) == {s for s in full if s.rank in (2, 32) and s.epochs == 1}


def test_keys_tell_all_settings_apart() -> None:
    rates = [1e-3, 0.0010000001, 1 / 3, 0.333333, 1e-30, 5.0]
    settings = [
        Setting(method, rate, rank, epochs, bound, seed)
        for method, rate, rank, epochs, bound, seed in itertools.product(
            ["lora", "lora+"], rates, [None, 8, 16], [1, 1.5], [None, 0.3, 0.1 + 0.2], [0, 12]
        )
    ]
    assert len({setting.key for setting in settings}) == len(settings)
    assert Setting("lora", 1e-3, 8, 5, 0.3, 0).key == "lora_r8_e5_b0.3_lr0.001_s0"
    assert Setting("lora", 1e-3, 8, 5.0, 0.3, 0).key == "lora_r8_e5_b0.3_lr0.001_s0"


def test_a_job_is_all_of_a_run_with_its_seeds_paths() -> None:
    config = ComparisonConfig.of(
        {
            **BASE,
            "model": "m-{seed}",
            "data": "d/{seed}/{seed}",
            "keep": "k-{seed}",
            "data_seed": 5,
            "train": {"warmup_steps": 3},
            "seeds": [7],
        }
    )
    setting = config.settings()[0]
    job = config.job(setting)
    assert (job["model"], job["data"], job["keep"]) == ("m-7", "d/7/7", "k-7")
    assert job["setting"] == {
        "method": "nblora",
        "learning_rate": 1e-4,
        "rank": 8,
        "epochs": 3,
        "bound": 0.3,
        "seed": 7,
    }
    assert (job["data_seed"], job["train"], job["options"]) == (5, {"warmup_steps": 3}, {})
    assert json.loads(json.dumps(job)) == job
    assert ComparisonConfig.of(BASE).job(setting)["keep"] is None


# --- runs that are pretended ---


def record_of(job: Mapping[str, Any], **scores: Any) -> dict[str, Any]:
    """A record whose scores follow from its setting."""
    setting = job["setting"]
    rng = random.Random(json.dumps(setting, sort_keys=True))
    measured = {name: rng.random() for name in ("validation", "target", "kept_validation", "kept")}
    cost = {"seconds": 1.5, "peak_memory_bytes": 7}
    return {**failed(job, None), "status": "done", **cost, **measured, **scores}


class Pretended:
    """An executor that does jobs in a random order and remembers which."""

    def __init__(self, stop_after: int | None = None, seed: int = 0, **scores: Any) -> None:
        self.jobs: list[Mapping[str, Any]] = []
        self.stop_after, self.scores, self.rng = stop_after, scores, random.Random(seed)
        self.closed = False

    def run(self, jobs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        try:
            for job in self.rng.sample(list(jobs), len(jobs)):
                if len(self.jobs) == self.stop_after:
                    raise KeyboardInterrupt
                self.jobs.append(job)
                yield record_of(job, **self.scores)
        finally:
            self.closed = True


SMALL = {**BASE, "methods": ["nblora", "lora"], "learning_rates": [1e-3, 1e-2], "epochs": [1, 2.5]}


@pytest.fixture(autouse=True)
def measured_before(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Any]:
    """Which base models are measured; not really measured but in tests of real runs."""
    jobs: list[Any] = []

    def before(job: Mapping[str, Any]) -> dict[str, Any]:
        jobs.append(job)
        return {"target": 0.1, "kept": 0.9, "metric": "accuracy", "samples": {"train": 3}}

    if "task" not in request.fixturenames:
        monkeypatch.setattr(module, "_before", before)
    return jobs


def pretend(settings: Mapping[str, Any], out: Path, **options: Any) -> tuple[dict[str, Any], int]:
    """The comparison, and how many runs were done for it."""
    executor = options.pop("executor", None) or Pretended()
    found = compare(settings, out, executor=executor, report=False, **options)
    return found, len(executor.jobs)


def test_a_finished_run_is_never_repeated(tmp_path: Path, measured_before: list[Any]) -> None:
    first, count = pretend(SMALL, tmp_path)
    assert count == 8
    assert len(list((tmp_path / "runs").iterdir())) == 8
    again, count = pretend(SMALL, tmp_path, executor=Pretended(seed=5))
    assert count == 0
    assert again == first
    assert len(measured_before) == 1


def test_the_order_of_runs_and_interruptions_change_nothing(tmp_path: Path) -> None:
    expected, _ = pretend(SMALL, tmp_path / "whole")
    for stop_after in (0, 1, 5):
        executor = Pretended(stop_after, seed=stop_after)
        with pytest.raises(KeyboardInterrupt):
            compare(SMALL, tmp_path / "stopped", executor=executor, report=False)
        assert not (tmp_path / "stopped" / "comparison.json").exists()
    assert len(list((tmp_path / "stopped" / "runs").iterdir())) == 6
    found, count = pretend(SMALL, tmp_path / "stopped", executor=Pretended(seed=9))
    assert count == 2
    assert found == expected
    for name in ("comparison.json", "runs.csv", "comparison.csv", "config.yaml", "before.json"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_interruptions_in_on_run_keep_the_run_and_end_the_others(tmp_path: Path) -> None:
    def on_run(record: Mapping[str, Any] | None, share: float) -> None:
        if record is not None:
            raise KeyboardInterrupt

    executor = Pretended()
    with pytest.raises(KeyboardInterrupt) as caught:  # holds on to the frames
        compare(SMALL, tmp_path, executor=executor, report=False, on_run=on_run)
    assert caught.traceback
    assert executor.closed
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_full_disk_ends_the_comparison_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, executor = module._write_json, Pretended()

    def full(path: Path, value: Any) -> None:
        if path.parent.name == "runs" and len(executor.jobs) > 3:
            raise OSError("No space left on device")
        write(path, value)

    monkeypatch.setattr(module, "_write_json", full)
    with pytest.raises(OSError, match="No space left"):
        compare(SMALL, tmp_path, executor=executor, report=False)
    assert executor.closed
    monkeypatch.setattr(module, "_write_json", write)
    assert pretend(SMALL, tmp_path)[1] == 5


@pytest.mark.parametrize(
    ("more", "new"),
    [
        ({"methods": ["nblora", "lora", "full"]}, 4),
        ({"methods": {"nblora": {"label": "ours"}, "lora": {}, "mine": {"method": "lora"}}}, 4),
        ({"learning_rates": [1e-2, 1e-1]}, 4),
        ({"ranks": [4, 8]}, 8),
        ({"epochs": [1, 2.5, 9]}, 4),
        ({"bounds": [0.3, 0.6]}, 4),
        ({"seeds": [0, 1]}, 8),
        ({"grid": "star", "tolerance": 0.5, "reference": {"epochs": 1}}, 0),
        ({"methods": ["lora"], "epochs": [1]}, 0),
    ],
    ids=str,
)
def test_other_axes_run_only_what_is_new(tmp_path: Path, more: dict[str, Any], new: int) -> None:
    pretend(SMALL, tmp_path)
    executor = Pretended()
    found, count = pretend({**SMALL, **more}, tmp_path, executor=executor)
    assert count == new
    fresh, _ = pretend({**SMALL, **more}, tmp_path / "fresh")
    assert found == fresh, "as if all had been done at once"
    assert len(found["runs"]) == len(ComparisonConfig.of({**SMALL, **more}).settings())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model": "owner/other"}, "model"),
        ({"data": "owner/other"}, "data"),
        ({"keep": "owner/kept"}, "keep"),
        ({"task": "image-cls"}, "task"),
        ({"train": {"warmup_steps": 3}}, "train"),
        ({"load": {"dtype": "bfloat16"}}, "load"),
        ({"columns": {"label": "y"}}, "columns"),
        ({"keep_columns": {"label": "y"}}, "keep_columns"),
        ({"max_length": 5}, "max_length"),
        ({"max_train_samples": 5}, "max_train_samples"),
        ({"max_eval_samples": 5}, "max_eval_samples"),
        ({"data_seed": 5}, "data_seed"),
        ({"methods": {"nblora": {"temperature": 2.0}, "lora": {}}}, "options"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rates", [[1e-2, 1e-3], [0.5]], ids=["same grid", "other grid"])
def test_the_folder_of_another_comparison_is_refused(
    tmp_path: Path, change: dict[str, Any], name: str, rates: list[float]
) -> None:
    pretend(SMALL, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    executor = Pretended()
    with pytest.raises(SettingsError, match=f"holds runs of another comparison: {name}=") as caught:
        pretend({**SMALL, **change, "learning_rates": rates}, tmp_path, executor=executor)
    assert "choose another folder" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert executor.jobs == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_the_paths_of_seeds_are_compared_seed_by_seed(tmp_path: Path) -> None:
    template = {**SMALL, "model": "owner/model-{seed}", "seeds": [3]}
    pretend(template, tmp_path)
    _, count = pretend({**template, "model": "owner/model-3"}, tmp_path)
    assert count == 0
    with pytest.raises(SettingsError, match="model='owner/model-3' there, got 'owner/model-x'"):
        pretend({**template, "model": "owner/model-x"}, tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "null", "[]", '"text"', "{}", '{"job": {}}', '{"method": "lora", "job": null}', "\0\0\0"],
)
def test_a_broken_file_of_a_run_is_done_again(tmp_path: Path, content: str) -> None:
    expected, _ = pretend(SMALL, tmp_path)
    files = sorted((tmp_path / "runs").iterdir())
    files[2].write_text(content)
    files[5].write_bytes(files[5].read_bytes()[:-20])
    (tmp_path / "before.json").write_text(content)
    found, count = pretend(SMALL, tmp_path)
    assert count == 2
    assert found == expected
    assert json.loads(files[2].read_text())["status"] == "done"


def test_a_record_with_odd_fields_is_done_again(tmp_path: Path) -> None:
    pretend(SMALL, tmp_path)
    file = min((tmp_path / "runs").iterdir())
    record = json.loads(file.read_text())
    for change in ({"epochs": "many"}, {"job": 3}, {"job": {"options": None}}, {"seed": []}):
        file.write_text(json.dumps({**record, **change}))
        assert pretend(SMALL, tmp_path)[1] == 1
    del record["status"]
    file.write_text(json.dumps(record))
    assert pretend(SMALL, tmp_path)[1] == 1


def test_failed_runs_are_data_points_that_can_be_retried(tmp_path: Path) -> None:
    class Failing(Pretended):
        def run(self, jobs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
            for record in super().run(jobs):
                bad = record["method"] == "lora"
                yield failed(record["job"], "OutOfMemoryError: no") if bad else record

    found, count = pretend(SMALL, tmp_path, executor=Failing())
    assert count == 8
    assert [entry["whole_grid"]["failed"] for entry in found["methods"]] == [0, 4]
    assert {run["error"] for run in found["runs"] if run["method"] == "lora"} == {"OutOfMemoryError: no"}
    assert pretend(SMALL, tmp_path)[1] == 0, "not repeated unasked"
    executor = Pretended()
    found, count = pretend(SMALL, tmp_path, executor=executor, retry_failed=True)
    assert count == 4
    assert {job["setting"]["method"] for job in executor.jobs} == {"lora"}
    assert [entry["whole_grid"]["failed"] for entry in found["methods"]] == [0, 0]
    assert pretend(SMALL, tmp_path, retry_failed=True)[1] == 0


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_when_every_run_is_lost_the_comparison_says_so(tmp_path: Path, status: str) -> None:
    scores = dict.fromkeys(("validation", "target", "kept_validation", "kept"), math.nan)
    executor = Pretended(status=status, error="why", **scores)
    found, count = pretend(SMALL, tmp_path, executor=executor)
    assert count == 8
    for entry in found["methods"]:
        assert entry["whole_grid"][status] == 4
        assert entry["picked"] == []
    assert {run["target"] for run in found["runs"]} == {None}
    assert pretend(SMALL, tmp_path)[0] == found, "from files as from memory"
    assert (tmp_path / "comparison.csv").is_file()


def test_on_run_hears_of_every_run_and_shares_end_at_one(tmp_path: Path) -> None:
    settings = {**SMALL, "epochs": [0.1, 0.2, 0.7], "seeds": [0, 1, 2]}
    executor = Pretended(stop_after=11)
    heard: list[tuple[Any, float]] = []
    with pytest.raises(KeyboardInterrupt):
        pretend(settings, tmp_path, executor=executor, on_run=lambda *what: heard.append(what))
    assert heard[0] == (None, 0.0)
    assert [record["method"] for record, _ in heard[1:]] == [
        job["setting"]["method"] for job in executor.jobs
    ]
    done = sum(job["setting"]["epochs"] for job in executor.jobs)
    assert heard[-1][1] == pytest.approx(done / (3 * 2 * 2 * 1.0))

    more: list[tuple[Any, float]] = []
    pretend(settings, tmp_path, on_run=lambda *what: more.append(what))
    assert more[0] == (None, heard[-1][1])
    shares = [share for _, share in more]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0, "exactly"
    assert len(more) == 1 + 36 - 11

    nothing: list[tuple[Any, float]] = []
    pretend(settings, tmp_path, on_run=lambda *what: nothing.append(what))
    assert nothing == [(None, 1.0)]


def test_base_models_are_measured_once_for_each_seeds_own(
    tmp_path: Path, measured_before: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = {**SMALL, "model": "owner/model-{seed}", "seeds": [0, 1]}
    pretend({**template, "seeds": [0]}, tmp_path)
    found, _ = pretend(template, tmp_path)
    assert [job["model"] for job in measured_before] == ["owner/model-0", "owner/model-1"]
    assert found["before"] == {"target": 0.1, "kept": 0.9}
    assert found["samples"] == {"train": 3}
    scores = iter([0.2, 0.6])
    monkeypatch.setattr(
        module,
        "_before",
        lambda job: {"target": next(scores), "kept": None, "metric": "nats", "samples": {}},
    )
    found, _ = pretend(template, tmp_path / "other")
    assert found["before"] == {"target": pytest.approx(0.4), "kept": None}
    assert found["metric"] == "nats"


def test_base_models_are_measured_again_for_other_settings(
    tmp_path: Path, measured_before: list[Any]
) -> None:
    """The folder has no runs yet, so that it is not another comparison's."""
    for samples in (10, 20):
        with pytest.raises(KeyboardInterrupt):
            pretend({**SMALL, "max_eval_samples": samples}, tmp_path, executor=Pretended(stop_after=0))
    assert [job["max_eval_samples"] for job in measured_before] == [10, 20]


def test_bad_data_is_found_before_anything_is_written_or_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(job: Mapping[str, Any]) -> dict[str, Any]:
        raise SettingsError("the data must have a column 'label'")

    monkeypatch.setattr(module, "_before", before)
    executor = Pretended()
    with pytest.raises(SettingsError, match="must have a column"):
        pretend(SMALL, tmp_path / "out", executor=executor)
    assert executor.jobs == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("methods", "clue"),
    [
        (["rasa", "wara"], "methods must have one that can be run, got rasa, wara"),
        (
            {"lora": {}, "lora_r8": {"method": "full"}},
            "names of methods must make different files, got lora, lora_r8",
        ),
    ],
)
def test_methods_that_make_no_comparison_are_refused(tmp_path: Path, methods: Any, clue: str) -> None:
    with pytest.raises(SettingsError, match=clue):
        pretend({**SMALL, "methods": methods}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_and_the_folder_of_another_job_are_refused(tmp_path: Path, measured_before: list[Any]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=f"the folder to write must not be a file, got {tmp_path}/file"):
        pretend(SMALL, tmp_path / "file")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "config.yaml").write_text("model: of a fine-tuning job")
    with pytest.raises(SettingsError, match=r"must be new or that of a comparison, got .*job"):
        pretend(SMALL, tmp_path / "job")
    assert [file.name for file in (tmp_path / "job").iterdir()] == ["config.yaml"]
    assert measured_before == []


def test_a_configuration_object_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    config = ComparisonConfig("model", "seq-cls", "owner/data", methods={"lora": {}}, learning_rates=(0.1,))
    found, count = pretend(config, tmp_path / "out")
    assert count == 1
    assert found["model"] == str(tmp_path / "model"), "absolute, for workers elsewhere"
    with pytest.raises(SettingsError, match="ranks must be"):
        pretend(ComparisonConfig(**{**BASE, "methods": {"lora": {}}, "ranks": (0,)}), tmp_path / "other")


def test_files_say_what_is_returned(tmp_path: Path) -> None:
    found, _ = pretend({**SMALL, "keep": "owner/kept"}, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == found
    assert ComparisonConfig.of(yaml.safe_load((tmp_path / "config.yaml").read_text())).to_dict() == {
        **found["config"]
    }
    with open(tmp_path / "runs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["runs"]) == 8
    for row, run in zip(rows, found["runs"]):
        assert row == {name: "" if value is None else str(value) for name, value in run.items()}
    with open(tmp_path / "comparison.csv", newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert [row[0] for row in table] == ["method", "NB-LoRA", "LoRA"]
    assert len({len(row) for row in table}) == 1
    assert not [path.name for path in tmp_path.rglob(".*")], "no temporary files"
    assert found["grid"] == {
        "learning_rates": [1e-3, 1e-2],
        "ranks": [8],
        "epochs": [1, 2.5],
        "bounds": [0.3],
        "seeds": [0],
        "kind": "full",
    }


def test_errors_with_commas_and_quotes_survive_csv(tmp_path: Path) -> None:
    error = 'ValueError: a, "b"; ö\n'
    found, _ = pretend(SMALL, tmp_path, executor=Pretended(status="failed", error=error))
    with open(tmp_path / "runs.csv", newline="", encoding="utf-8") as file:
        assert {row["error"] for row in csv.DictReader(file)} == {error}
    assert {run["error"] for run in found["runs"]} == {error}


def test_reports_need_their_libraries_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    executor = Pretended()
    with pytest.raises(ImportError, match=r"pip install 'nblora\["):
        compare(SMALL, tmp_path / "out", executor=executor)
    assert executor.jobs == []
    pretend(SMALL, tmp_path / "out", executor=executor)
    assert len(executor.jobs) == 8


def test_the_summary_is_the_records(tmp_path: Path) -> None:
    """Each method's own runs, its reference, and the worst of all methods for what diverged."""
    settings = {**SMALL, "methods": ["nblora", "full"], "keep": "k", "ranks": [2, 8], "epochs": [1, 2]}
    config = ComparisonConfig.of(settings)
    assert config.reference == {"rank": 8, "epochs": 2}
    records = []
    for setting in config.settings():
        kind = {"target": 0.5, "validation": 0.5, "kept": 0.25, "kept_validation": 0.5}
        if setting.method == "full":
            kind = {"target": 0.75, "validation": 0.75, "kept": 0.125, "kept_validation": 0.5}
        if setting.method == "nblora" and setting.learning_rate == 1e-2:
            kind = {**dict.fromkeys(kind), "status": "diverged"}
        records.append(record_of(config.job(setting), **kind))
    found = summarise(config, records, {"metric": "accuracy", "target": 0.1, "kept": 0.9})
    ours, full = found["methods"]
    assert ours["whole_grid"]["kept"] == {"mean": (0.25 + 0.125) / 2, "worst": 0.125}
    assert ours["whole_grid"]["diverged"] == 4
    assert full["whole_grid"]["target"] == {"mean": 0.75, "worst": 0.75}
    assert [(t["rank"], t["epochs"]) for t in ours["transfer"]] == [(2, 1), (2, 2), (8, 1)]
    assert [(t["rank"], t["epochs"]) for t in full["transfer"]] == [(None, 1)]
    assert ours["hypervolume"]["mean"] == 0.5 * 0.25
    assert found["before"] == {"target": 0.1, "kept": 0.9}
    assert found["hypervolume_corner"] == [0.0, 0.0]
    assert [run["method"] for run in found["runs"]] == ["nblora"] * 8 + ["full"] * 4


# --- real runs ---

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(12))]
CLASSES = ["zero", "one", "two"]


def write_rows(file: Path, count: int, seed: int, shift: int) -> None:
    """Texts of six words, half of which tell the class; `shift` changes which words do."""
    rng = random.Random(seed)
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["text", "label"])
        for i in range(count):
            words = [f"w{(i + shift) % 3 + 3 * rng.randrange(4)}" for _ in range(3)]
            words += [f"w{rng.randrange(12)}" for _ in range(3)]
            rng.shuffle(words)
            writer.writerow([" ".join(words), CLASSES[i % 3]])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A small BERT with classes of its own, texts that it is to learn and others that it is to keep."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("task")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
        initializer_range=0.3,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for seed, (name, count) in enumerate({"train": 48, "validation": 24, "test": 30}.items()):
        write_rows(folder / "data" / f"{name}.csv", count, seed, shift=1)
    write_rows(folder / "keep.csv", 40, 7, shift=0)
    gc.collect()
    gc.freeze()  # as workers do: each run collects garbage among all of the libraries otherwise
    yield {
        "model": str(folder / "model"),
        "task": "seq-cls",
        "data": str(folder / "data"),
        "keep": str(folder / "keep.csv"),
        "train": {"per_device_train_batch_size": 16, "use_cpu": True, "dataloader_pin_memory": False},
    }
    gc.unfreeze()


def job_of(task: Mapping[str, Any], method: str, options: Any = None, **setting: Any) -> dict[str, Any]:
    config = ComparisonConfig.of({**task, "methods": {method: options or {}}, "learning_rates": [0.01]})
    job = config.job(config.settings()[0])
    return {**job, "setting": {**job["setting"], "rank": 4, "epochs": 1, **setting}}


RUNNABLE = ["nblora", "nblora-svd", *(name for name, method in METHODS.items() if method.reason is None)]


@pytest.mark.parametrize("method", RUNNABLE)
def test_every_method_does_a_real_run(task: dict[str, Any], method: str) -> None:
    job = job_of(task, method)
    record = execute(job)
    assert record["status"] == "done", record.get("traceback")
    assert record["error"] is None
    assert {name: record[name] for name in job["setting"]} == job["setting"]
    assert record["job"] == job
    for name, count in {"validation": 24, "target": 30, "kept_validation": 20, "kept": 20}.items():
        assert 0 <= record[name] <= 1
        assert record[name] * count == pytest.approx(round(record[name] * count)), "a share of the samples"
    assert record["metrics"]["test"]["target"]["accuracy"] == record["target"]
    assert record["metric"] == "accuracy"
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 2**20
    everything = sum(tensor.numel() for tensor in model_of(task).parameters())
    if method == "full":
        assert record["trainable_parameters"] == everything
    else:
        assert 0 < record["trainable_parameters"] < everything


def model_of(task: Mapping[str, Any]) -> torch.nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(task["model"])


def test_seeds_and_learning_rates_reach_the_training(task: dict[str, Any]) -> None:
    records = [
        execute(job_of(task, "lora", **change))
        for change in ({}, {"seed": 1}, {"learning_rate": 0.03}, {"rank": 2}, {"epochs": 2})
    ]
    assert execute(job_of(task, "lora"))["metrics"] == records[0]["metrics"], "the same run, the same numbers"
    nats = [record["metrics"]["test"]["target"]["nats"] for record in records]
    assert len(set(nats)) == len(nats)
    assert records[3]["trainable_parameters"] * 2 == records[0]["trainable_parameters"]
    plain = execute(job_of(task, "nblora", bound=0.3))
    wider = execute(job_of(task, "nblora", bound=3.0))
    started = execute(job_of(task, "nblora-gradient", bound=0.3))
    assert plain["metrics"] != wider["metrics"]
    assert started["status"] == "done"
    assert plain["metrics"] != started["metrics"]


@pytest.mark.parametrize(
    ("change", "clue"),
    [
        ({"options": {"init_lora_weights": "bogus"}}, "bogus"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"load": {"no_such": 1}}, "no_such"),
        ({"train": {"per_device_train_batch_size": -1}}, ""),
        ({"options": {"target_modules": ["no_such"]}}, "no_such"),
    ],
    ids=str,
)
def test_what_goes_wrong_in_a_run_is_in_its_record(task: dict[str, Any], change: Any, clue: str) -> None:
    job = {**job_of(task, "lora"), **change}
    record = execute(job)
    assert record["status"] == "failed"
    assert clue in record["error"]
    assert record["error"] == " ".join(record["error"].split())
    assert len(record["error"]) <= 500
    assert record["error"].split(":")[0] in record["traceback"]
    assert {record[name] for name in ("validation", "target", "kept_validation", "kept", "seconds")} == {None}
    assert record["job"] == job


class InThisProcess:
    """An executor that does real runs here."""

    def __init__(self) -> None:
        self.count = 0

    def run(self, jobs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for job in jobs:
            self.count += 1
            yield execute(job)


def settings_of(task: Mapping[str, Any]) -> dict[str, Any]:
    """Twelve runs: one method that diverges at the higher rate, one that always fails, one not available."""
    return {
        **task,
        "methods": {
            "nblora": {"bound": 2.0},
            "lora": {},
            "full": {},
            "broken": {"method": "lora", "init_lora_weights": "bogus"},
            "rasa": {},
        },
        "learning_rates": [0.02, 1e30],
        "ranks": [2, 4],
        "epochs": [1],
        "seeds": [0],
        "reference": {"rank": 4},
    }


def test_a_real_comparison_is_its_records(
    task: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In processes of its own, with a report; every figure is worked out again from the files of the runs."""
    settings = settings_of(task)
    capfd.readouterr()
    found = compare(settings, tmp_path, executor=LocalExecutor(1, 1))
    assert capfd.readouterr() == ("", ""), "libraries say nothing in between"
    records = [json.loads(file.read_text()) for file in (tmp_path / "runs").iterdir()]
    assert len(records) == len(found["runs"]) == 14
    by_method = {name: [r for r in records if r["method"] == name] for name in settings["methods"]}
    entries = {entry["method"]: entry for entry in found["methods"]}
    assert {r["status"] for r in by_method["broken"]} == {"failed"}
    assert {r["status"] for r in by_method["full"] if r["learning_rate"] > 1} == {"diverged"}
    assert {r["status"] for r in records if r["learning_rate"] < 1 and r["method"] != "broken"} == {"done"}
    assert "bogus" in by_method["broken"][0]["error"]

    worst = {
        name: min(r[name] for r in records if r[name] is not None)
        for name in ("validation", "target", "kept")
    }
    for name in ("nblora", "lora", "full"):
        counted = {}
        for record in by_method[name]:
            place = record["rank"], record["learning_rate"]
            counted[place] = {key: worst[key] if record[key] is None else record[key] for key in worst}
        entry, rank = entries[name], None if name == "full" else 4
        grid = entry["whole_grid"]
        assert grid["settings"] == len(counted)
        assert grid["failed"] == 0
        assert grid["diverged"] == sum(r["status"] == "diverged" for r in by_method[name])
        for score in ("target", "kept"):
            values = [scores[score] for scores in counted.values()]
            assert grid[score] == {"mean": pytest.approx(sum(values) / len(values)), "worst": min(values)}
        picks = {(p["rank"], p["epochs"]): p for p in entry["picked"]}
        assert sorted(picks, key=str) == sorted({(place[0], 1) for place in counted}, key=str)
        for (at, _), pick in picks.items():
            best = max(scores["validation"] for place, scores in counted.items() if place[0] == at)
            chosen = counted[at, pick["learning_rate"]]
            assert chosen["validation"] == best
            assert pick["target"] == {"mean": chosen["target"], "std": 0.0}
            assert pick["kept"] == {"mean": chosen["kept"], "std": 0.0}
            assert pick["bound"] == (2.0 if name == "nblora" else None)
        best = max(scores["target"] for scores in counted.values())
        near = [scores["target"] >= best - 0.02 for scores in counted.values()]
        assert entry["near_best"]["target"] == pytest.approx(sum(near) / len(near))
        points = [(scores["target"], scores["kept"]) for scores in counted.values()]
        side = np.linspace(0, 1, 400, endpoint=False) + 1 / 800
        covered = np.zeros((400, 400), dtype=bool)
        for x, y in points:
            covered |= (side <= x)[:, None] & (side <= y)
        assert entry["hypervolume"]["mean"] == pytest.approx(covered.mean(), abs=0.01)
        if name != "full":
            (moved,) = entry["transfer"]
            reused = counted[2, picks[4, 1]["learning_rate"]]
            assert moved["target"]["mean"] == reused["target"]
            lost = counted[2, picks[2, 1]["learning_rate"]]["target"] - reused["target"]
            assert moved["target_lost"] == pytest.approx(lost)
        at_reference = [r["seconds"] for r in by_method[name] if r["rank"] == rank]
        assert entry["seconds"] == pytest.approx(float(np.median(at_reference)))
    assert entries["broken"]["whole_grid"]["failed"] == 4
    assert entries["broken"]["picked"] == []
    assert entries["rasa"]["available"] is False

    base = execute_nothing(task)
    assert found["before"] == {"target": pytest.approx(base[0]), "kept": pytest.approx(base[1])}
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {"front.png", "front.svg"}
    again = InThisProcess()
    assert compare(settings, tmp_path, executor=again, report=False) == found
    assert again.count == 0


@pytest.mark.slow
def test_runs_may_load_data_in_processes_of_their_own(task: dict[str, Any], tmp_path: Path) -> None:
    settings = {**task, "methods": ["lora"], "learning_rates": [0.02], "epochs": [1]}
    plain = compare(settings, tmp_path / "plain", executor=InThisProcess(), report=False)
    settings["train"] = {**settings["train"], "dataloader_num_workers": 2}
    found = compare(settings, tmp_path / "workers", executor=LocalExecutor(1, 1), report=False)
    assert found["runs"][0]["status"] == "done", found["runs"][0]["error"]
    for name in ("validation", "target", "kept"):
        assert found["runs"][0][name] == plain["runs"][0][name]


def execute_nothing(task: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy of the base model on target and kept test data, by hand."""
    from transformers import AutoTokenizer

    from nblora.data import kept_splits, target_splits

    tokenizer, model = AutoTokenizer.from_pretrained(task["model"]), model_of(task).eval()
    accuracies = []
    for rows in (target_splits(task["data"], seed=0).test, kept_splits(task["keep"], seed=0)[1]):
        right = 0
        for row in rows:
            with torch.no_grad():
                logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
            right += CLASSES[int(logits.argmax())] == row["label"]
        accuracies.append(right / len(rows))
    return accuracies[0], accuracies[1]


def test_bad_data_is_one_error_before_any_run(task: dict[str, Any], tmp_path: Path) -> None:
    executor = InThisProcess()
    for change, clue in (
        ({"data": str(tmp_path / "nowhere.csv")}, "nowhere.csv"),
        ({"columns": {"label": "no_such"}}, "no_such"),
        ({"model": str(tmp_path)}, str(tmp_path)),
        ({"keep_columns": {"label": "no_such"}}, "no_such"),
    ):
        with pytest.raises(ValueError, match=clue) as caught:
            compare({**settings_of(task), **change}, tmp_path / "out", executor=executor, report=False)
        assert "\n" not in str(caught.value)
    assert executor.count == 0
    assert not (tmp_path / "out").exists()
