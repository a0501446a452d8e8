"""The fine-tuning job: what it writes, that its numbers are right, and that no work is lost."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForTokenClassification,
    BertModel,
    Trainer,
    TrainerCallback,
)

from job_samples import classifier, fork, forked, review_folder, status_of
from nblora import certify, training
from nblora.training import FinetuneResult, finetune
from test_tasks import bert, llama, named, pictures, t5, table, vit

LABELS = {"bad": 0, "good": 1}
VOLATILE = ("seconds", "peak_memory_bytes")
PROMISED = {
    "adapter",
    "lora",
    "certificate.json",
    "metrics.json",
    "config.yaml",
    "report.html",
    "checkpoints",
}


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A classifier of two classes, data to learn and data to keep."""
    folder = tmp_path_factory.mktemp("samples")
    return {
        "model": classifier(folder / "model", "bad", "good"),
        "data": review_folder(folder / "data"),
        "keep": review_folder(folder / "keep", ("good", "bad"), first=7),
    }


def settings(samples: dict[str, str], **others: Any) -> dict[str, Any]:
    """Twelve steps, two epochs, checkpoints between their ends; dropout is on."""
    train = {
        "learning_rate": 0.05,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "use_cpu": True,
    }
    common = {"task": "seq-cls", "adapter": {"r": 2, "bound": 0.5}, **samples}
    return {**common, **others, "train": {**train, **others.get("train", {})}}


@pytest.fixture(scope="session")
def whole(samples: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """A run that nothing disturbed."""
    return finetune(settings(samples), tmp_path_factory.mktemp("whole") / "out")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def metrics(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in values.items() if name not in VOLATILE}


def assert_same_result(folder: Path, other: Path) -> None:
    """Bitwise the same adapter, and the same metrics but for seconds."""
    ours, theirs = tensors(folder), tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    found, expected = metrics(folder), metrics(other)
    assert found == expected
    assert {path.name for path in folder.iterdir()} | {"report.html"} == PROMISED


def accuracy(model: nn.Module, source: str, split: str, labels: dict[str, int]) -> dict[str, float]:
    """Accuracy and mean nats of a sequence classifier, one row at a time, without any of our code."""
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    model.eval()
    with open(Path(source) / f"{split}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    right, nats = 0, 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        label = labels[row["label"]]
        right += int(logits.argmax() == label)
        nats -= float(logits.log_softmax(-1)[label])
    return {"accuracy": right / len(rows), "nats": nats / len(rows)}


# --- what is written ---


def test_every_promised_file_and_nothing_else(whole: FinetuneResult) -> None:
    assert {path.name for path in whole.folder.iterdir()} == PROMISED
    adapter = {path.name for path in (whole.folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= adapter
    assert "training_args.bin" not in adapter
    assert {path.name for path in (whole.folder / "checkpoints").iterdir()} == {
        "before.json",
        "checkpoint-10",
        "checkpoint-12",
    }
    assert "<html" in (whole.folder / "report.html").read_text()
    assert whole.metrics["seconds"] > 0
    assert whole.metrics["peak_memory_bytes"] > 2**20


def test_scores_are_those_of_the_base_model_and_of_the_saved_adapter(
    whole: FinetuneResult, samples: dict[str, str]
) -> None:
    found = metrics(whole.folder)
    model = AutoModelForSequenceClassification.from_pretrained(samples["model"])
    for when in ("before", "after"):
        if when == "after":
            model = PeftModel.from_pretrained(model, whole.folder / "adapter")
        for name, source in (("target", samples["data"]), ("keep", samples["keep"])):
            expected = accuracy(model, source, "test", LABELS)
            measured = found[when][name]
            assert measured["accuracy"] == pytest.approx(expected["accuracy"])
            assert measured["nats"] == pytest.approx(expected["nats"], rel=1e-4)
            assert measured["score"] == measured["accuracy"]
    expected = accuracy(model, samples["data"], "validation", LABELS)
    assert found["validation"]["target"]["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["before"]["target"]["nats"] != pytest.approx(found["after"]["target"]["nats"], rel=1e-2)


def test_metrics_follow_the_contract(whole: FinetuneResult, samples: dict[str, str]) -> None:
    found = metrics(whole.folder)
    assert (found["task"], found["metric"], found["method"]) == ("seq-cls", "accuracy", "NB-LoRA")
    assert {name: found[name] for name in samples} == samples
    assert found["samples"] == {"train": 24, "validation": 10, "test": 17, "keep": 17}
    assert found["adapter"]["r"] == 2
    assert found["adapter"]["bound"] == 0.5
    trained = sum(tensor.numel() for name, tensor in tensors(whole.folder).items() if "radius" not in name)
    assert found["trainable_parameters"] == trained
    steps = [entry["step"] for entry in found["history"] if "loss" in entry]
    assert steps == [3, 6, 9, 12]
    evaluated = [entry for entry in found["history"] if "target" in entry]
    assert [entry["step"] for entry in evaluated] == [6, 12]
    assert all(entry.keys() >= {"epoch", "target", "keep"} for entry in evaluated)
    assert evaluated[-1]["target"]["score"] == found["validation"]["target"]["score"]
    assert [entry["step"] for entry in found["spectra"]] == [3, 6, 9, 12]
    certified = {layer.name: layer for layer in certify(whole.folder / "adapter").layers}
    last = found["spectra"][-1]["layers"]
    assert last.keys() == certified.keys()
    for name, layer in certified.items():
        assert last[name]["norm"] == pytest.approx(layer.norm, rel=1e-4)


def test_certificate_is_that_of_the_adapter_and_holds(whole: FinetuneResult) -> None:
    written = json.loads((whole.folder / "certificate.json").read_text())
    assert written == json.loads(certify(whole.folder / "adapter").to_json())
    assert written["holds"] is True
    assert whole.certificate.holds
    assert certify(whole.folder / "lora").holds


def test_plain_lora_has_the_logits_of_the_adapter(whole: FinetuneResult, samples: dict[str, str]) -> None:
    inputs = AutoTokenizer.from_pretrained(whole.folder / "adapter")("warm good", return_tensors="pt")
    logits = []
    for name in ("adapter", "lora"):
        base = AutoModelForSequenceClassification.from_pretrained(samples["model"])
        with torch.no_grad():
            before = base(**inputs).logits
            logits.append(PeftModel.from_pretrained(base, whole.folder / name).eval()(**inputs).logits)
    assert torch.allclose(*logits, atol=1e-5)
    assert not torch.allclose(before, logits[0], atol=1e-2)


def test_saved_configuration_reproduces_the_run(whole: FinetuneResult, tmp_path: Path) -> None:
    saved = whole.folder / "config.yaml"
    finetune(training.read_yaml(saved), tmp_path / "again", report=False)
    assert (tmp_path / "again" / "config.yaml").read_text() == saved.read_text()
    assert_same_result(tmp_path / "again", whole.folder)


# --- nothing is lost ---


class At(TrainerCallback):
    """Does something in a step, or once it has ended."""

    def __init__(self, step: int, action: Callable[[], object], *, ended: bool = True) -> None:
        self.step, self.action, self.ended = step, action, ended

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1 and not self.ended:
            self.action()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.ended:
            self.action()


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_when_called_again(owner: Any, name: str, times: int) -> None:
    """Kill this process at a certain call of a function, before it does anything."""
    original, count = getattr(owner, name), 0

    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == times:
            die()
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def die_when_removed(name: str) -> None:
    original = training.shutil.rmtree

    def replacement(path: Any, *args: Any, **kwargs: Any) -> None:
        original(path, *args, **kwargs)
        if Path(path).name == name:
            die()

    training.shutil.rmtree = replacement


MOMENTS: dict[str, Callable[[], object]] = {
    "before anything is measured": lambda: die_when_called_again(training.BoundedTrainer, "measure", 1),
    "while a checkpoint is written": lambda: die_when_called_again(Trainer, "_save_rng_state", 3),
    "before the state of a checkpoint": lambda: die_when_called_again(
        training.TrainerState, "save_to_json", 3
    ),
    "while the adapter is replaced": lambda: die_when_removed("adapter"),
    "before the plain LoRA is written": lambda: die_when_called_again(training, "export_lora", 1),
    "before the certificate is written": lambda: die_when_called_again(training, "certify", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_resumes_to_the_same_result(
    moment: str, whole: FinetuneResult, samples: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def work() -> None:
        MOMENTS[moment]()
        finetune(settings(samples), out, report=False)

    assert forked(work, tmp_path / "log") == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (out / "metrics.json").exists()
    finetune({}, out, resume=True, report=False)
    assert_same_result(out, whole.folder)


def test_killed_between_checkpoints_with_a_torn_one(
    whole: FinetuneResult, samples: dict[str, str], tmp_path: Path
) -> None:
    """And the newest checkpoint holds half a state."""
    out = tmp_path / "out"
    status = forked(lambda: finetune(settings(samples), out, callbacks=[At(5, die)]), tmp_path / "log")
    assert status == -signal.SIGKILL, (tmp_path / "log").read_text()
    torn = out / "checkpoints" / "checkpoint-11"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 11, "log_hist')
    steps: list[int] = []
    finetune({}, out, resume=True, report=False, advance=lambda done, last: steps.append(done))
    assert steps[:2] == [4, 5], "from the last whole checkpoint"
    assert_same_result(out, whole.folder)


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 5), (signal.SIGTERM, 6)],
    ids=["SIGINT within an epoch", "SIGTERM at its end"],
)
def test_a_stopped_run_says_how_to_continue_and_ends_the_same(
    number: signal.Signals, step: int, whole: FinetuneResult, samples: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = signal.getsignal(number)
    stop = At(step, lambda: os.kill(os.getpid(), number), ended=False)
    with pytest.raises(training.Interrupted) as stopped:
        finetune(settings(samples), out, callbacks=[stop], report=False)
    assert signal.getsignal(number) is before
    assert str(stopped.value) == (
        f"stopped after step {step} of 12; continue with: nblora finetune --resume --out {out}"
    )
    assert (out / "checkpoints" / f"checkpoint-{step}").is_dir()
    steps: list[int] = []
    finetune({}, out, resume=True, report=False, advance=lambda done, last: steps.append(done))
    assert steps[0] == step
    assert_same_result(out, whole.folder)


class Begin(TrainerCallback):
    """What the model is when training begins."""

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.share = max(layer.share for layer in certify(model).layers)


def test_a_start_along_the_gradient_is_measured_against_the_base_model_and_resumed(
    whole: FinetuneResult, samples: dict[str, str], tmp_path: Path
) -> None:
    wanted, begin = settings(samples, start="gradient"), Begin()
    expected = finetune(wanted, tmp_path / "whole", callbacks=[begin])
    assert begin.share == pytest.approx(0.03, rel=1e-3)  # its default step
    assert expected.metrics["before"] == whole.metrics["before"]
    assert (expected.metrics["start"], whole.metrics["start"]) == ("gradient", "random")
    assert not all(
        torch.equal(t, tensors(whole.folder)[name]) for name, t in tensors(expected.folder).items()
    )
    out = tmp_path / "out"
    stop = At(5, lambda: os.kill(os.getpid(), signal.SIGINT), ended=False)
    with pytest.raises(training.Interrupted):
        finetune(wanted, out, callbacks=[stop], report=False)
    finetune({}, out, resume=True, report=False)
    assert_same_result(out, expected.folder)


def test_a_finished_run_resumes_to_itself(whole: FinetuneResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole.folder, out)
    (out / "metrics.json").unlink()
    shutil.rmtree(out / "adapter")
    finetune({}, out, resume=True, report=False)
    assert_same_result(out, whole.folder)


def test_a_full_disk_is_one_line_and_loses_no_checkpoint(
    whole: FinetuneResult, samples: dict[str, str], tmp_path: Path
) -> None:
    """Files can suddenly not grow beyond a few bytes, as on a disk that is full."""
    out = tmp_path / "out"

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

    def work() -> None:
        try:
            finetune(settings(samples), out, callbacks=[At(5, fill)], report=False)
        except OSError as error:
            sys.stdout.write(str(error))
            sys.exit(7)

    assert forked(work, tmp_path / "log") == 7, (tmp_path / "log").read_text()
    assert "cannot be written" in (tmp_path / "log").read_text()
    assert training.last_checkpoint(out / "checkpoints") == out / "checkpoints" / "checkpoint-4"
    finetune({}, out, resume=True, report=False)
    assert_same_result(out, whole.folder)


# --- refusals ---


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"learning_rate": 0.1}},
        {"adapter": {"bound": 0.6}},
        {"keep": None},
        {"seed": 1},
        {"max_length": 8},
    ],
    ids=str,
)
def test_a_run_is_resumed_with_its_own_settings_only(change: dict[str, Any], whole: FinetuneResult) -> None:
    before = contents(whole.folder)
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"resumed with its own settings.*got {name}="):
        finetune(change, whole.folder, resume=True)
    assert contents(whole.folder) == before


def test_a_used_folder_is_refused(whole: FinetuneResult, samples: dict[str, str], tmp_path: Path) -> None:
    before = contents(whole.folder)
    with pytest.raises(ValueError, match=r"must be new or empty, got .*; continue it with --resume, or"):
        finetune(settings(samples), whole.folder)
    assert contents(whole.folder) == before
    (tmp_path / "thesis.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"must be new or empty, got .*; choose another"):
            finetune(settings(samples), tmp_path, resume=resume)
    with pytest.raises(ValueError, match="must be new or empty"):
        finetune(settings(samples), tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_a_run_killed_at_its_start_leaves_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".config.yaml-12345678").write_text("")
    with pytest.raises(ValueError, match="the settings must have a model"):
        finetune({"task": "seq-cls"}, tmp_path)
    with pytest.raises(ValueError, match=r"a run to resume must have a config\.yaml"):
        finetune({}, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "must have a model"),
        ({"modell": "x"}, "did you mean 'model'"),
        ({"task": "seq-clf"}, "did you mean 'seq-cls'"),
        ({"train": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate must suit"),
        (
            {"train": {"per_device_train_batch_size": 0}},
            "train_batch_size must be at least 1, got 0",
        ),
        ({"train": {"save_only_model": True}}, "save_only_model must be false"),
        ({"train": {"output_dir": "x"}}, "use --out"),
        ({"adapter": {"rank": 3}}, "a setting of the adapter must be one of r, "),
        ({"adapter": {"bound": -1}}, "bound must be"),
        ({"adapter": {"target_modules": ["nope"]}}, "'nope'.* not found in the base model"),
        ({"load": {"dtpye": "bfloat16"}}, "load must have arguments of from_pretrained.*dtpye"),
        ({"load": {"dtype": "bfloat17"}}, "load must have arguments of from_pretrained.*bfloat17"),
        ({"columns": {"label": "stars"}}, "must have a column 'stars', got columns"),
        ({"data": "nowhere.csv"}, "nowhere.csv"),
        ({"model": "/nowhere"}, "the model must be .*/nowhere"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"start": "warm"}, 'start must be "random" or "gradient", got \'warm\''),
        ({"max_length": 0}, "max_length must be an integer >= 1, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    change: dict[str, Any], message: str, samples: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        finetune(settings(samples, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("train", [5, None, []], ids=str)
def test_groups_of_settings_must_be_mappings(train: Any, samples: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"train must map names to values, got {re.escape(str(train))}"):
        finetune({**settings(samples), "train": train}, tmp_path / "out")


# --- heads ---


def test_new_classes_get_a_head_and_kept_data_the_models_own(
    whole: FinetuneResult, samples: dict[str, str], tmp_path: Path
) -> None:
    """Three classes in place of two."""
    data = review_folder(tmp_path / "data", ("bad", "good", "odd"))
    out = tmp_path / "out"
    finetune(settings(samples, data=data, train={"learning_rate": 0.1}), out, report=False)
    found = metrics(out)
    assert found["before"]["keep"] == metrics(whole.folder)["before"]["keep"]
    assert found["after"]["target"]["accuracy"] > found["before"]["target"]["accuracy"] + 0.2
    start = AutoModelForSequenceClassification.from_pretrained(samples["model"])
    own_head = start.classifier
    wanted = {"bad": 0, "good": 1, "odd": 2}
    for folder in ("adapter", "lora"):
        assert any("classifier" in name for name in load_file(out / folder / "adapter_model.safetensors"))
        base = AutoModelForSequenceClassification.from_pretrained(
            samples["model"], num_labels=3, ignore_mismatched_sizes=True
        )
        model = PeftModel.from_pretrained(base, out / folder)
        expected = accuracy(model, data, "test", wanted)
        assert found["after"]["target"]["accuracy"] == pytest.approx(expected["accuracy"])
        assert found["after"]["target"]["nats"] == pytest.approx(expected["nats"], rel=1e-4)
        base.classifier = own_head
        expected = accuracy(model, samples["keep"], "test", LABELS)
        assert found["after"]["keep"]["accuracy"] == pytest.approx(expected["accuracy"])
        assert found["after"]["keep"]["nats"] == pytest.approx(expected["nats"], rel=1e-4)


def test_a_model_without_a_trained_head_gets_one_that_is_trained(
    samples: dict[str, str], tmp_path: Path
) -> None:
    """As every pretrained language model; a random head that stayed frozen would teach it nothing."""
    model = bert(tmp_path / "bare", BertModel)
    out = tmp_path / "out"
    finetune(settings({**samples, "model": model, "keep": None}), out, report=False)
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert any("classifier" in name for name in saved)
    base = AutoModelForSequenceClassification.from_pretrained(model)
    expected = accuracy(PeftModel.from_pretrained(base, out / "adapter"), samples["data"], "test", LABELS)
    assert metrics(out)["after"]["target"]["nats"] == pytest.approx(expected["nats"], rel=1e-4)


# --- every task ---


def job(task: str, folder: Path) -> dict[str, Any]:
    words = [f"{'good' if index % 2 else 'bad'} number {index}" for index in range(40)]
    if task == "causal-lm":
        return {"model": llama(folder / "model"), "data": table(folder / "rows.jsonl", text=words)}
    if task == "token-cls":
        model = bert(folder / "model", BertForTokenClassification, **named("O", "NAME"))
        rows = table(folder / "rows.jsonl", tokens=[w.split() for w in words], tags=[["O", "NAME", "O"]] * 40)
        return {"model": model, "data": rows}
    if task == "seq2seq":
        return {
            "model": t5(folder / "model"),
            "data": table(folder / "rows.jsonl", source=words, target=words),
        }
    return {
        "model": vit(folder / "model", num_labels=10),
        "data": pictures(folder / "images", 40, tuple("0123456789")),
    }


@pytest.mark.parametrize("task", ["causal-lm", "token-cls", "seq2seq", "image-cls"])
def test_every_task_end_to_end(task: str, tmp_path: Path) -> None:
    files = job(task, tmp_path)
    out = tmp_path / "out"
    train = {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no"}
    length = {} if task == "image-cls" else {"max_length": 64}
    finetune(settings({**files, "keep": files["data"]}, task=task, train=train, **length), out)
    assert {path.name for path in out.iterdir()} == PROMISED
    found = metrics(out)
    assert found["metric"] == ("nats" if task in ("causal-lm", "seq2seq") else "accuracy")
    for when in ("before", "after"):
        for name in ("target", "keep"):
            scores = found[when][name]
            assert scores["score"] == (-scores["nats"] if found["metric"] == "nats" else scores["accuracy"])
    assert found["before"] != found["after"]
    assert certify(out / "lora").holds


# --- several batches, several processes ---


@pytest.mark.parametrize("task", ["seq-cls", "causal-lm", "seq2seq"])
def test_accumulated_batches_count_as_one(task: str, samples: dict[str, str], tmp_path: Path) -> None:
    """Their gradients are averaged, not added."""
    files = job(task, tmp_path) if task != "seq-cls" else {**samples}
    if task == "seq-cls":
        files["model"] = classifier(tmp_path / "model", "bad", "good", dropout=0.0)
    config = json.loads((Path(files["model"]) / "config.json").read_text())
    (Path(files["model"]) / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0}))
    found = []
    for size in (4, 2):
        train = {
            "max_steps": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 4 // size,
        }
        out = tmp_path / f"{size}"
        finetune(settings({**files, "keep": None}, task=task, train=train, max_length=32), out, report=False)
        found.append(metrics(out)["history"])
    for one, two in zip(*found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=0.02)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.2)


def assert_same_but_for_rounding(folder: Path, other: Path, processes: int = 2) -> None:
    ours, theirs = tensors(folder), tensors(other)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
    found, expected = metrics(folder), metrics(other)
    assert (found["processes"], expected["processes"]) == (processes, 1)
    for when, name in itertools.product(("before", "after"), ("target", "keep")):
        assert found[when][name]["nats"] == pytest.approx(expected[when][name]["nats"], rel=1e-4)
    for one, two in zip(expected["history"], found["history"], strict=True):
        assert two.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=1e-3)


@pytest.fixture(scope="session")
def alone(samples: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The settings of a run in two processes, and the folder of one process with the same batches."""
    folder = tmp_path_factory.mktemp("alone")
    files = {**samples, "model": classifier(folder / "model", "bad", "good", dropout=0.0)}
    finetune(settings(files), folder / "out", report=False)
    return settings(files, train={"per_device_train_batch_size": 2}), folder / "out"


def test_two_processes_start_along_the_gradient(alone: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Not to the digit as one does: directions that the gradient hardly has are rounding errors."""
    together, out, port = {**alone[0], "start": "gradient"}, tmp_path / "out", free_port()
    alone_too = {**together, "train": {**together["train"], "per_device_train_batch_size": 4}}
    expected = finetune(alone_too, tmp_path / "alone", report=False)

    def process(rank: int) -> None:
        become_one_of_two(rank, port)
        finetune(together, out, report=False)

    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    processes = [fork(functools.partial(process, rank), log) for rank, log in enumerate(logs)]
    assert [status_of(one) for one in processes] == [0, 0], [log.read_text() for log in logs]
    found = metrics(out)
    assert found["processes"] == 2
    for one, two in zip(expected.metrics["history"], found["history"], strict=True):
        assert two.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=0.05)
    assert certify(out / "adapter").holds


def become_one_of_two(rank: int, port: int) -> None:
    """As torchrun starts processes; in one that was forked."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    AcceleratorState._reset_state(reset_partial_state=True)


def free_port() -> int:
    """One that was free a moment ago: launchers take 0 for a port that they then wait at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_two_processes_learn_what_one_does_and_resume(
    alone: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """The environment is that of torchrun; one of the two is asked to stop, and both do."""
    together, expected = alone
    out = tmp_path / "out"

    def process(rank: int, port: int, resume: bool) -> None:
        become_one_of_two(rank, port)
        stop = [At(5, lambda: os.kill(os.getpid(), signal.SIGINT))] if rank == 1 else []
        if resume:
            finetune(together, out, report=False, resume=True)
            return
        with pytest.raises(training.Interrupted, match="stopped after step 8 of 12"):
            finetune(together, out, callbacks=stop, report=False)

    for resume in (False, True):
        port = free_port()
        logs = [tmp_path / f"log-{rank}" for rank in range(2)]
        processes = [
            fork(functools.partial(process, rank, port, resume), log) for rank, log in enumerate(logs)
        ]
        assert [status_of(one) for one in processes] == [0, 0], [log.read_text() for log in logs]
    assert_same_but_for_rounding(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["torch.distributed.run", "--nproc_per_node=2", "--master_port"], 2),
        # on a CPU it starts several processes by MPI only
        (["accelerate.commands.launch", "--cpu", "--num_processes=1", "--main_process_port"], 1),
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_launchers_work_unchanged(
    launcher: list[str], processes: int, alone: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    together, expected = alone
    job_file, out = tmp_path / "job.yaml", tmp_path / "out"
    train = {**together["train"], "per_device_train_batch_size": 4 // processes}
    training.write_yaml(job_file, {**together, "train": train})
    command = ["-m", "nblora", "finetune", "--config", str(job_file), "--out", str(out)]
    finished = subprocess.run(
        [sys.executable, "-m", *launcher, str(free_port()), *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert {path.name for path in out.iterdir()} == PROMISED
    assert finished.stdout.count("Wrote to") == 1, "one process speaks for all"
    assert_same_but_for_rounding(out, expected, processes)
