"""The fine-tuning job: what it writes, that its numbers are right, and that no work is lost."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback

from job_samples import classifier, forked, review_folder
from nblora import certify, training
from nblora.training import FinetuneResult, finetune

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
    assert {path.name for path in folder.iterdir()} == PROMISED


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
    finetune(training.read_yaml(saved), tmp_path / "again")
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
        finetune(settings(samples), out)

    assert forked(work, tmp_path / "log") == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (out / "metrics.json").exists()
    finetune({}, out, resume=True)
    assert_same_result(out, whole.folder)


@pytest.mark.parametrize("step", [5, 6])
def test_killed_between_checkpoints_with_a_torn_one(
    step: int, whole: FinetuneResult, samples: dict[str, str], tmp_path: Path
) -> None:
    """And the newest checkpoint holds half a state."""
    out = tmp_path / "out"
    status = forked(lambda: finetune(settings(samples), out, callbacks=[At(step, die)]), tmp_path / "log")
    assert status == -signal.SIGKILL, (tmp_path / "log").read_text()
    torn = out / "checkpoints" / "checkpoint-11"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 11, "log_hist')
    steps: list[int] = []
    finetune({}, out, resume=True, advance=lambda done, last: steps.append(done))
    assert steps[:2] == [4, 5], "from the last whole checkpoint"
    assert_same_result(out, whole.folder)


@pytest.mark.parametrize("step", [5, 6], ids=["within an epoch", "at its end"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_continue_and_ends_the_same(
    step: int, number: signal.Signals, whole: FinetuneResult, samples: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = signal.getsignal(number)
    stop = At(step, lambda: os.kill(os.getpid(), number), ended=False)
    with pytest.raises(training.Interrupted) as stopped:
        finetune(settings(samples), out, callbacks=[stop])
    assert signal.getsignal(number) is before
    assert str(stopped.value) == (
        f"stopped after step {step} of 12; continue with: nblora finetune --resume --out {out}"
    )
    assert (out / "checkpoints" / f"checkpoint-{step}").is_dir()
    steps: list[int] = []
    finetune({}, out, resume=True, advance=lambda done, last: steps.append(done))
    assert steps[0] == step
    assert_same_result(out, whole.folder)
