"""The job commands, as a newcomer with a CSV file and a model folder uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from job_samples import classifier, review_folder, reviews, write_csv
from nblora import certify
from nblora.cli import app
from test_tasks import vit

FAST = ["--train.use_cpu", "--train.num_train_epochs", "2", "--train.learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return classifier(tmp_path_factory.mktemp("model"), "bad", "good")


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(write_csv(tmp_path / "reviews.csv", reviews(0, 60)))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *words: str) -> None:
    """One line, exit status 2."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("nblora: ")
    for word in words:
        assert word in lines[0]


def test_finetune_on_a_table(model: str, table: str, tmp_path: Path) -> None:
    other = review_folder(tmp_path / "other", first=500)
    out = tmp_path / "result"
    result = run(
        "finetune", "--model", model, "--task", "seq-cls", "--data", table, "--keep", other,
        "--norm", "spectral", "--bound", 0.2, "--r", 4, "--out", out, "--max-length", 48, *FAST,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = {path.name for path in out.iterdir()}
    promised = {
        "adapter",
        "lora",
        "certificate.json",
        "metrics.json",
        "config.yaml",
        "report.html",
        "checkpoints",
    }
    assert promised <= written
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["adapter"]["norm"] == "spectral"
    assert (metrics["adapter"]["bound"], metrics["adapter"]["r"]) == (0.2, 4)
    assert metrics["train"]["learning_rate"] == 1e-2
    assert f"{metrics['after']['target']['accuracy']:.1%}" in result.output
    assert f"{metrics['after']['keep']['accuracy']:.1%}" in result.output
    assert certify(out / "adapter").holds

    # the same folder again is refused and left as it is; its configuration does the same elsewhere
    before = (out / "metrics.json").read_bytes()
    refused(
        run("finetune", "--config", out / "config.yaml", "--out", out), "must be new or empty", "--resume"
    )
    assert (out / "metrics.json").read_bytes() == before
    again = run("finetune", "--config", out / "config.yaml", "--out", tmp_path / "again", "--no-report")
    assert again.exit_code == 0, again.output
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert not (tmp_path / "again" / "report.html").exists()


def test_compare_on_a_table(model: str, table: str, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    arguments = [
        "compare", "--model", model, "--task", "seq-cls", "--data", table, "--out", out,
        "--methods", "nblora,lora,rasa", "--ranks", "2", "--epochs", "1", "--max-length", 48,
        "--workers", 1, "--threads", 1, "--train.use_cpu",
    ]  # fmt: skip
    result = run(*arguments, "--learning-rates", "1e-3")
    assert result.exit_code == 0, result.output
    assert "NB-LoRA" in result.output
    assert {"comparison.json", "runs.csv", "report.html", "figures"} <= {path.name for path in out.iterdir()}
    first = {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert len(first) == 2
    assert run(*arguments, "--learning-rates", "1e-3,1e-2").exit_code == 0
    second = {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert len(second) == 4
    assert {name: second[name] for name in first} == first
    rasa = next(
        m for m in json.loads((out / "comparison.json").read_text())["methods"] if m["method"] == "rasa"
    )
    assert not rasa["available"]


def test_suggest_on_a_table(model: str, table: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run(
        "suggest", "--model", model, "--task", "seq-cls", "--data", table, "--steps", 1, "--max-length", 48,
        "--train.use_cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "--train.learning_rate" in result.output
    assert "--bound" in result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["finetune", "compare", "suggest"])
def test_what_cannot_be_used_gets_one_line(command: str, model: str, table: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "heading.csv").write_text("text,label\n")
    write = [] if command == "suggest" else ["--out", out]

    def tried(
        *, task: str = "seq-cls", data: object = table, base: object = model, more: list[str] | None = None
    ) -> Result:
        given = ["--model", base, "--task", task, "--data", data, *write, "--train.use_cpu", *(more or [])]
        return run(command, *given)

    refused(tried(data=write_csv(tmp_path / "other.csv", [{"a": 1, "b": 2}] * 20)), "column", "'a', 'b'")
    refused(tried(data=tmp_path / "empty.csv"), "empty.csv")
    refused(tried(data=tmp_path / "heading.csv"), "heading.csv")
    refused(tried(data=tmp_path / "nothing.csv"), "nothing.csv")
    refused(tried(task="translate"), "causal-lm", "'translate'")
    refused(tried(base=tmp_path / "no-model"), "no-model")
    refused(tried(more=["--train.learning_rat", "1"]), "learning_rat", "did you mean 'learning_rate'")
    refused(tried(more=["--bond", "1"]), "--bond")
    assert not out.exists()


def test_a_model_without_matching_layers(model: str, table: str, tmp_path: Path) -> None:
    result = run(
        "finetune", "--model", model, "--task", "seq-cls", "--data", table, "--out", tmp_path / "out",
        "--adapter.target_modules", "no_such_layer", *FAST,
    )  # fmt: skip
    refused(result, "no_such_layer")
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind(table: str, tmp_path: Path) -> None:
    images = vit(tmp_path / "vit", num_labels=2)
    refused(
        run("finetune", "--model", images, "--task", "seq-cls", "--data", table, "--out", tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["finetune", "compare", "suggest"])
def test_help_names_the_options_that_typer_does_not_know(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--train.NAME" in result.output
    assert "--load.NAME" in result.output
