"""The job commands: README's own, every mistake in one line with nothing written, and Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner, Result

from job_samples import classifier, forked, reviews, write_csv
from nblora import comparison, training
from nblora.cli import app
from nblora.comparison import ComparisonConfig
from test_training import PROMISED, contents

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
QUICK = ["--train.use_cpu", "--train.max_steps", "3", "--train.per_device_train_batch_size", "4"]


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What README assumes: model/, reviews.csv and other.csv."""
    folder = tmp_path_factory.mktemp("home")
    classifier(folder / "model", "bad", "good")
    write_csv(folder / "reviews.csv", reviews(0, 40))
    write_csv(folder / "other.csv", reviews(7, 30, ("good", "bad")))
    return folder


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with those files in it."""
    for name in ("model", "reviews.csv", "other.csv"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def words(options: Mapping[str, str | None]) -> list[str]:
    return [word for name, value in options.items() if value is not None for word in (name, value)]


def readme_command(start: str) -> list[str]:
    """A command of README, without `nblora`."""
    text = README[README.index(start) :]
    return shlex.split(text[: text.index("```")].replace("\\\n", " "))[1:]


@pytest.mark.filterwarnings("ignore::nblora.callbacks.BoundUseWarning")
def test_finetune_of_readme(here: Path) -> None:
    result = run(*readme_command("nblora finetune --model model/"), *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert {path.name for path in (here / "result").iterdir()} == PROMISED
    metrics = json.loads((here / "result" / "metrics.json").read_text())
    assert metrics["adapter"]["r"] == 16
    assert "Wrote to result: adapter/" in result.stdout
    assert run("certify", "result/adapter").exit_code == 0


@pytest.mark.filterwarnings("default::nblora.callbacks.BoundUseWarning")
def test_what_a_newcomer_on_a_laptop_sees(here: Path) -> None:
    """Without options for the machine: no warning of a library, and ours in one line."""
    rate = ["--train.learning_rate", "1e-5", "--train.max_steps", "1"]
    result = run("finetune", *words(GOOD), "--out", "out", "--no-report", *rate)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("nblora: No NB-LoRA layer uses 50% of its bound")
    assert result.stderr.count("\n") == 1


def test_compare_of_readme_is_understood(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ComparisonConfig] = []

    def compare(settings: Mapping[str, Any], out: Path, **others: Any) -> None:
        seen.append(ComparisonConfig.of(settings))
        raise ValueError(f"enough of {out}")

    monkeypatch.setattr(comparison, "compare", compare)
    result = run(*readme_command("nblora compare --model model/"))
    assert result.stderr == "nblora: enough of comparison\n"
    assert list(seen[0].methods) == ["nblora", "lora", "dora", "full"]
    assert (seen[0].learning_rates, seen[0].ranks, seen[0].seeds) == ((1e-4, 1e-3, 1e-2), (4, 16), (0, 1, 2))
    assert seen[0].keep == "other.csv"


# --- mistakes ---

GOOD = {"--model": "model", "--task": "seq-cls", "--data": "reviews.csv"}
MISTAKES: dict[str, tuple[dict[str, str | None], str]] = {
    "no model": ({"--model": None}, "must have a model"),
    "no task": ({"--task": None}, "must have a task"),
    "no data": ({"--data": None}, "must have a data"),
    "a folder without a model": ({"--model": "."}, "the model must be a folder or a hub name"),
    "a nearly known task": ({"--task": "seq-clf"}, "got 'seq-clf'; did you mean 'seq-cls'"),
    "a column that is not there": ({"--column": "label=grade"}, "must have a column 'grade', got columns"),
    "half a column": ({"--column": "label"}, "--column must be ROLE=NAME, got 'label'"),
    "kept classes that are unknown": ({"--keep": "strange.csv"}, "must be classes of the model"),
    "no number": ({"--train.weight_decay": "much"}, "train.weight_decay must"),
    "no file of settings": ({"--config": "nowhere.yaml"}, "nowhere.yaml must be a readable YAML file"),
    "a broken file of settings": ({"--config": "broken.yaml"}, "broken.yaml must be YAML"),
    "an unknown setting": ({"--config": "strange.yaml"}, "did you mean 'model'"),
}
OF_THE_ADAPTER: dict[str, tuple[dict[str, str | None], str]] = {
    "a wrong norm": ({"--norm": "frob"}, "norm must be"),
    "a bound below zero": ({"--bound": "-1"}, "bound must be"),
    "an unknown setting of the adapter": ({"--adapter.rank": "4"}, "a setting of the adapter must be one of"),
    "an unknown argument of loading": ({"--load.dtpye": "bfloat16"}, "load must have arguments"),
}


@pytest.fixture
def mistaken(here: Path) -> Iterator[Path]:
    write_csv(here / "strange.csv", reviews(0, 20, ("bad", "odd")))
    (here / "broken.yaml").write_text("train: [1, 2\nmodel: x")
    (here / "strange.yaml").write_text("modell: x")
    before = contents(here), {path.name for path in here.iterdir()}
    yield here
    assert (contents(here), {path.name for path in here.iterdir()}) == before, "nothing is written"


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        *(("finetune", mistake) for mistake in (*MISTAKES, *OF_THE_ADAPTER)),
        *(("compare", mistake) for mistake in MISTAKES),
    ],
)
def test_a_mistake_is_one_line(command: str, mistake: str, mistaken: Path) -> None:
    changes, message = (MISTAKES | OF_THE_ADAPTER)[mistake]
    result = run(command, *words({**GOOD, **changes}), "--out", "out")
    assert result.exit_code == 2, result.output
    assert result.stdout.strip() == ""
    assert result.stderr.startswith("nblora: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


# --- stopping ---


@pytest.mark.filterwarnings("ignore::nblora.callbacks.BoundUseWarning")
def test_ctrl_c_ends_with_130_and_the_command_that_continues(here: Path) -> None:
    def work() -> None:
        original = training.Progress.on_step_end

        def interrupted(self: Any, args: Any, state: Any, *rest: Any, **others: Any) -> None:
            original(self, args, state, *rest, **others)
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

        training.Progress.on_step_end = interrupted
        app(["finetune", *words(GOOD), "--out", "out", "--no-report", *QUICK])

    assert forked(work, here / "log") == 130, (here / "log").read_text()
    said = (here / "log").read_text().strip().splitlines()[-1]
    assert said == "nblora: stopped after step 2 of 3; continue with: nblora finetune --resume --out out"
    result = run(*shlex.split(said.partition("continue with: ")[2])[1:], "--no-report")
    assert result.exit_code == 0, result.output
    assert (here / "out" / "metrics.json").is_file()
    refused = run("finetune", "--resume", "--out", "out", "--train.learning_rate", "0.5")
    assert refused.exit_code == 2
    assert "a run is resumed with its own settings" in refused.stderr
    nothing = run("finetune", "--resume", "--out", "nowhere")
    assert nothing.exit_code == 2
    assert "a run to resume must have a config.yaml" in nothing.stderr
    assert not (here / "nowhere").exists()
