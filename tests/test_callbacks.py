"""What NBLoraCallback measures, to whom it reports it, when it warns, and that training doesn't notice."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from conftest import TwoLayers, tiny_gpt2, tiny_llama
from nblora import NBLoraConfig, certify
from nblora.bounds import Gauge
from nblora.callbacks import BoundUseWarning, NBLoraCallback
from nblora.cayley import random_frame
from nblora.lowrank import LowRank
from nblora.parametrizations import pull_back
from nblora.tuner import NBLoraLayer

ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 4}
Layers = dict[str, dict[str, Any]]


class Sentences(torch.utils.data.Dataset):
    """Random token sequences."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randint(0, 50, (7,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": x, "labels": x}


def adapted(base: nn.Module | None = None, **choices: Any) -> nn.Module:
    """A PeftModel whose updates start at random inside their balls."""
    torch.manual_seed(5)
    return get_peft_model(
        tiny_llama() if base is None else base, NBLoraConfig(**(ALL | {"init_weights": False} | choices))
    )


def trainer(
    model: nn.Module, folder: Path, callbacks: list[TrainerCallback] | None = None, **arguments: Any
) -> Trainer:
    choices: dict[str, Any] = {
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    } | arguments
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **choices),
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        callbacks=callbacks,
    )


def quiet(**choices: Any) -> NBLoraCallback:
    """A callback that warns of nothing that happens in these tests."""
    return NBLoraCallback(**({"saturated": 1.0, "unused": 0.0} | choices))


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "spectral": lambda sigma: sigma[0],
    "frobenius": lambda sigma: (sigma**2).sum().sqrt(),
    "nuclear": lambda sigma: sigma.sum(),
    "ky-fan-2": lambda sigma: sigma[:2].sum(),
}


@torch.no_grad()
def independent(model: nn.Module, norm: str = "frobenius", adapter: str = "default", top: int = 3) -> Layers:
    """What the callback should measure, from dense updates."""
    measured = {}
    for name, layer in model.named_modules():
        if isinstance(layer, NBLoraLayer) and adapter in layer.nblora_in:
            sigma = torch.linalg.svdvals(layer.get_delta_weight(adapter).double())
            value, radius = NORMS[norm](sigma).item(), layer.radius(adapter).item()
            measured[name.removeprefix("base_model.model.")] = {
                "norm": value,
                "share": value / radius,
                "top": sigma[: min(top, layer.r[adapter])].tolist(),
            }
    assert measured
    return measured


def close(value: Any) -> Any:
    """Equal up to float32 rounding of factors, in any nesting."""
    if isinstance(value, dict):
        return {key: close(item) for key, item in value.items()}
    if isinstance(value, list):
        return [close(item) for item in value]
    return value if value is None else pytest.approx(value, rel=1e-5, abs=1e-8, nan_ok=True)


def flat(layers: Layers) -> dict[str, float]:
    """The documented keys."""
    entry = {}
    for name, layer in layers.items():
        entry[f"nblora/{name}/norm"] = layer["norm"]
        entry[f"nblora/{name}/share"] = layer["share"]
        for i, sigma in enumerate(layer["top"]):
            entry[f"nblora/{name}/sigma_{i + 1}"] = sigma
    shares = torch.tensor([layer["share"] for layer in layers.values()], dtype=torch.float64)
    entry["nblora/share_max"] = shares.max().item()
    entry["nblora/share_mean"] = shares.mean().item()
    entry["nblora/share_min"] = shares.min().item()
    return entry


class Recorder(TrainerCallback):
    """A reporter: it is called before the user's callbacks if it comes before them, as real ones do."""

    def __init__(self, measure: Callable[[nn.Module], Any] = lambda model: None) -> None:
        self.measure = measure
        self.events: list[tuple[int, dict[str, Any], Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert {"optimizer", "lr_scheduler", "train_dataloader", "processing_class"} <= {*kwargs}
        assert all(type(value) in (int, float) for value in logs.values())
        self.events.append((state.global_step, dict(logs), self.measure(kwargs["model"])))

    @property
    def ours(self) -> list[tuple[int, dict[str, Any], Any]]:
        return [event for event in self.events if any(key.startswith("nblora/") for key in event[1])]


class Stop(TrainerCallback):
    """Training killed after so many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.after


# --- what is measured -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "parametrization"),
    [
        ("spectral", "joint"),
        ("frobenius", "joint"),
        ("frobenius", "radial"),
        ("nuclear", "svd"),
        ("ky-fan-2", "joint"),
    ],
)
def test_every_log_has_what_the_layers_use_at_that_step(
    norm: str, parametrization: str, tmp_path: Path
) -> None:
    """Against singular values of the dense updates, at the same moment."""
    model = adapted(norm=norm, parametrization=parametrization, bound=0.7)
    recorder, callback = Recorder(lambda model: independent(model, norm)), quiet()
    run = trainer(model, tmp_path, [recorder, callback])
    run.train()
    expected = {step: layers for step, logs, layers in recorder.events if "loss" in logs}
    assert [*expected] == [1, 2, 3, 4]
    assert expected[1] != expected[4]
    assert set(expected[1]) == {layer.name for layer in certify(model).layers}
    assert callback.history == [{"step": step, "layers": close(layers)} for step, layers in expected.items()]
    assert [step for step, _, _ in recorder.ours] == [1, 2, 3, 4]
    for step, logs, _ in recorder.ours:
        assert logs == close(flat(expected[step]))
    # and the Trainer's own record, right after the log of the same step
    history = run.state.log_history
    for i, step in enumerate(expected):
        assert history[2 * i]["step"] == step
        assert "loss" in history[2 * i]
        assert history[2 * i + 1] == {
            **recorder.ours[i][1],
            "epoch": pytest.approx(step / 8),
            "step": step,
        }
    assert len(history) == 9  # and the summary


def test_shapes_that_are_odd_and_orders_that_are_kept(tmp_path: Path) -> None:
    """A rank above all sizes, tall and wide layers, Conv1D, ranks that differ: layers as in the model."""
    base = tiny_gpt2()
    model = adapted(
        base,
        r=40,
        target_modules=["c_attn", "c_fc", "c_proj"],
        rank_pattern={"c_fc": 1, r"h\.1\.attn\.c_proj": 5},
        fan_in_fan_out=True,
    )
    recorder = Recorder(lambda model: independent(model, top=50))
    callback = quiet(top=50)
    trainer(model, tmp_path, [recorder, callback], max_steps=1).train()
    expected = recorder.events[0][2]
    assert callback.history == [{"step": 1, "layers": close(expected)}]
    assert [*callback.history[0]["layers"]] == [*expected]
    assert {len(layer["top"]) for layer in expected.values()} == {1, 5, 32}


def measure(model: nn.Module, **choices: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """One measurement of a callback without a Trainer: layers, and what is logged."""
    callback = quiet(**choices)
    logs: dict[str, float] = {"loss": 1.0}
    state = TrainerState(epoch=0.5, global_step=7)
    assert callback.on_log(None, state, TrainerControl(), logs=logs, model=model) is None
    assert [entry["step"] for entry in callback.history] == [7]
    assert logs.pop("loss") == 1.0
    assert state.log_history == [{**logs, "step": 7, "epoch": 0.5}]
    return callback.history[0]["layers"], logs


def test_without_a_trainer_the_numbers_are_added_to_the_logs() -> None:
    model = adapted()
    layers, logs = measure(model)
    assert layers == close(independent(model))
    assert logs == close(flat(layers))


class Operations(TorchDispatchMode):
    """Counts tensor operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("at_once", "batches"), [(1, 14), (2**9, 7), (2**24, 4)])
def test_batches_of_any_size_measure_the_same(
    at_once: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(norm="nuclear", parametrization="svd")
    monkeypatch.setattr("nblora.callbacks._AT_ONCE", at_once)
    with Operations() as operations:
        layers, _ = measure(model)
    assert layers == close(independent(model, "nuclear"))
    assert [*layers] == [*independent(model)]
    assert operations.counts["linalg_qr"] == 2 * batches


def test_it_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy for all layers, no wait before it, equal layers together, no graph, no (m, n) product."""
    model = adapted()
    waits: list[dict[str, int]] = []
    copy = Tensor.cpu

    def counted(tensor: Tensor) -> Tensor:
        assert not tensor.requires_grad
        waits.append(dict(operations.counts))
        return copy(tensor)

    def dense(*_: Any) -> None:
        raise AssertionError("an (m, n) product")

    monkeypatch.setattr(Tensor, "cpu", counted)
    monkeypatch.setattr(LowRank, "dense", dense)
    monkeypatch.setattr(NBLoraLayer, "_dense", dense)
    with Operations() as operations:
        layers, _ = measure(model)
    assert len(layers) == 14
    assert len(waits) == 1
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & {*waits[0]}
    # q and o, k and v, gate and up, down: two factors each
    assert operations.counts["linalg_qr"] == 8
    assert operations.counts["_linalg_svd"] == 4
    largest = max(layer.get_base_layer().weight.numel() for layer in layers_of(model))
    assert largest > 4 * 14  # else the next line says nothing


def layers_of(model: nn.Module) -> list[NBLoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, NBLoraLayer)]


def test_models_in_half_precision_and_under_autocast() -> None:
    """Measured in the precision of the factors, whatever surrounds the measurement."""
    model = adapted()
    expected = independent(model)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert measure(model)[0] == close(expected)
    half = adapted(tiny_llama(torch.bfloat16))
    assert measure(half)[0] == close(independent(half))
    double = adapted(tiny_llama(torch.float64))
    assert measure(double)[0] == close(independent(double))
    both = adapted()
    for layer in layers_of(both)[:3]:
        layer.double()
    assert measure(both)[0] == close(independent(both))


def test_any_gauge_is_a_norm() -> None:
    def largest_and_half(sigma: Tensor) -> Tensor:
        return torch.maximum(sigma.amax(-1), sigma.sum(-1) / 2)

    model = adapted()
    for layer in layers_of(model):
        method = layer.method["default"]
        layer.method["default"] = type(method)(Gauge(largest_and_half), "joint", 1.0)
    for layer in measure(model)[0].values():
        assert layer["norm"] == pytest.approx(max(layer["top"][0], layer["norm"]))
        assert 0 < layer["share"] < 1


def test_nan_is_never_a_number() -> None:
    """One layer of a batch of equal ones is broken: it and what covers all layers are NaN, others are not."""
    model = adapted()
    expected = independent(model)
    for name, broken in (("layers.0.mlp.up_proj", math.nan), ("layers.1.self_attn.k_proj", math.inf)):
        layer = model.base_model.model.model.get_submodule(name)
        layer.nblora_radius["default"].weight.fill_(broken)
        assert set(layer.method) == {"default"}
        expected[f"model.{name}"]["share"] = math.nan
    layer.nblora_radius["default"].weight.fill_(0.1)
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"
    with torch.no_grad():
        layer.nblora_in["default"].weight[0, 0] = math.nan
    layers, logs = measure(model)
    for name in (first, second):
        assert math.isnan(layers[name]["norm"])
        assert math.isnan(layers[name]["share"])
        assert all(math.isnan(sigma) for sigma in layers[name]["top"])
        del layers[name], expected[name]
    assert layers == close(expected)
    assert all(math.isnan(logs[f"nblora/share_{kind}"]) for kind in ("max", "mean", "min"))


@pytest.mark.filterwarnings("ignore:The base weight of layer .* is zero")
def test_a_layer_of_radius_zero_has_no_share() -> None:
    base = TwoLayers()
    nn.init.zeros_(base.first.weight)
    model = get_peft_model(base, NBLoraConfig(target_modules=["first", "second"], init_weights=False))
    layers, logs = measure(model)
    assert layers["first"] == {"norm": 0.0, "share": None, "top": [0.0, 0.0, 0.0]}
    assert "nblora/first/share" not in logs
    assert logs["nblora/first/norm"] == 0
    share = layers["second"]["share"]
    assert share > 0
    assert [logs[f"nblora/share_{kind}"] for kind in ("max", "mean", "min")] == [share] * 3
    nn.init.zeros_(base.second.base_layer.weight)
    nothing = get_peft_model(base.__class__(), NBLoraConfig(target_modules=["first"]))
    nothing.base_model.model.first.nblora_radius["default"].weight.zero_()
    assert [*measure(nothing)[1]] == [
        "nblora/first/norm",
        *(f"nblora/first/sigma_{i}" for i in (1, 2, 3)),
    ]


# --- which adapters, under which names --------------------------------------------------------------


def test_the_same_names_through_every_door(tmp_path: Path) -> None:
    """Adapters of transformers' own integration, compiled and parallel models."""
    plain = tiny_llama()
    plain.add_adapter(NBLoraConfig(**(ALL | {"init_weights": False})))
    recorder, callback = Recorder(independent), quiet()
    trainer(plain, tmp_path, [recorder, callback], max_steps=1).train()
    names = [*callback.history[0]["layers"]]
    assert callback.history[0]["layers"] == close(recorder.events[0][2])
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert len(names) == 14
    model = adapted()
    expected = close(independent(model))
    assert [*measure(model)[0]] == names
    assert measure(nn.DataParallel(model))[0] == expected
    compiled = torch.compile(model, backend="eager")
    assert measure(compiled)[0] == expected
    assert measure(nn.DataParallel(compiled))[0] == expected
    parallel = torch.compile(nn.DataParallel(model), backend="eager")
    assert measure(parallel)[0] == expected
    assert isinstance(parallel._orig_mod, nn.DataParallel)  # not unwrapped for good
    for i, block in enumerate(model.base_model.model.model.layers):
        model.base_model.model.model.layers[i] = torch.compile(block, backend="eager")
    assert [*measure(model)[0]] == names
    assert measure(model)[0] == expected


def test_a_compiled_model_trains(tmp_path: Path) -> None:
    recorder, callback = Recorder(), quiet()
    compiled = trainer(
        adapted(),
        tmp_path,
        [recorder, callback],
        max_steps=2,
        torch_compile=True,
        torch_compile_backend="eager",
    )
    compiled.train()
    assert [step for step, _, _ in recorder.ours] == [1, 2]
    last = callback.history[-1]["layers"]
    assert next(iter(last)) == "model.layers.0.self_attn.q_proj"
    assert last == close(
        independent(compiled.accelerator.unwrap_model(compiled.model, keep_torch_compile=False))
    )


def test_active_adapters_only_and_by_name_if_several() -> None:
    model = adapted()
    model.add_adapter("other", NBLoraConfig(**(ALL | {"init_weights": False, "r": 2, "bound": 0.9})))
    first, second = independent(model), independent(model, adapter="other")
    assert measure(model)[0] == close(first)
    model.set_adapter("other")
    assert measure(model)[0] == close(second)
    model.base_model.set_adapter(["default", "other"])
    layers, logs = measure(model)
    both = {f"{name}/default": layer for name, layer in first.items()}
    both |= {f"{name}/other": layer for name, layer in second.items()}
    assert layers == close(both)
    assert logs == close(flat(both))
    assert "nblora/model.layers.0.self_attn.q_proj/other/norm" in logs


def test_layers_that_lack_an_active_adapter() -> None:
    model = adapted(target_modules=["q_proj", "k_proj"])
    model.add_adapter("other", NBLoraConfig(**(ALL | {"init_weights": False, "target_modules": ["k_proj"]})))
    model.base_model.set_adapter(["default", "other"])
    adapters = ("q_proj/default", "k_proj/default", "k_proj/other")
    expected = {f"model.layers.{i}.self_attn.{adapter}" for i in (0, 1) for adapter in adapters}
    assert set(measure(model)[0]) == expected


def test_a_mixed_model_without_ours_is_refused() -> None:
    from peft import PeftMixedModel

    model = PeftMixedModel(TwoLayers(), LoraConfig(target_modules=["first"]), "default")
    with pytest.raises(ValueError, match="active NB-LoRA adapter"):
        quiet().on_train_begin(None, TrainerState(), TrainerControl(), model=model)


# --- when ------------------------------------------------------------------------------------------------


def test_only_with_training_logs(tmp_path: Path) -> None:
    recorder, callback = Recorder(), quiet()
    run = trainer(
        adapted(), tmp_path, [recorder, callback], logging_steps=2, eval_strategy="steps", eval_steps=1
    )
    run.evaluate()
    run.train()
    run.evaluate()
    assert sum("eval_loss" in logs for _, logs, _ in recorder.events) == 6
    assert [step for step, _, _ in recorder.ours] == [2, 4]
    assert [entry["step"] for entry in callback.history] == [2, 4]


@pytest.mark.parametrize(
    ("every", "steps"), [(None, [2, 4, 6, 8]), (1, [2, 4, 6, 8]), (2, [2, 4, 6, 8]), (3, [2, 6]), (9, [2])]
)
def test_less_often(every: int | None, steps: list[int], tmp_path: Path) -> None:
    recorder, callback = Recorder(), quiet(every=every)
    trainer(adapted(), tmp_path, [recorder, callback], max_steps=8, logging_steps=2).train()
    assert [entry["step"] for entry in callback.history] == steps
    assert [step for step, _, _ in recorder.ours] == steps


def test_two_losses_at_one_step_are_measured_once() -> None:
    model, callback, state = adapted(), quiet(), TrainerState(global_step=1)
    for _ in range(2):
        callback.on_log(None, state, TrainerControl(), logs={"loss": 1.0}, model=model)
    assert len(callback.history) == 1


@pytest.mark.parametrize("top", [0, 1, 4, 9])
def test_as_many_singular_values_as_asked_for(top: int) -> None:
    layers, logs = measure(adapted(), top=top)
    assert all(len(layer["top"]) == min(top, 4) for layer in layers.values())
    assert sum("/sigma_" in key for key in logs) == 14 * min(top, 4)
    assert sum(key.endswith("/norm") for key in logs) == 14


def test_a_resumed_run_has_the_history_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(folder: Path, *more: TrainerCallback, resume: bool = False) -> NBLoraCallback:
        # ten layers and more, and a top beyond nine, are sorted otherwise in a checkpoint
        callback = quiet(top=12)
        model = adapted(tiny_deep(), r=16, dropout=0.1, target_modules=["q_proj"])
        trainer(
            model,
            folder,
            [callback, *more],
            max_steps=6,
            logging_steps=1,
            save_strategy="steps",
            save_steps=3,
        ).train(resume_from_checkpoint=resume or None)
        return callback

    whole = run(tmp_path / "whole")
    stopped = run(tmp_path / "parts", Stop(after=3))
    assert [entry["step"] for entry in stopped.history] == [1, 2, 3]
    resumed = run(tmp_path / "parts", resume=True)
    assert [entry["step"] for entry in resumed.history] == [1, 2, 3, 4, 5, 6]
    assert resumed.history == whole.history
    for mine, theirs in zip(resumed.history, whole.history):
        assert [*mine["layers"]] == [*theirs["layers"]]
    assert len(whole.history[0]["layers"]["model.layers.10.self_attn.q_proj"]["top"]) == 12
    json.dumps(resumed.history)


def tiny_deep() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=12,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=50,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


@pytest.mark.filterwarnings("ignore:The base weight of layer .* is zero")
def test_a_history_without_shares_survives_a_checkpoint(tmp_path: Path) -> None:
    base = tiny_llama()
    nn.init.zeros_(base.model.layers[0].mlp.up_proj.weight)
    model = adapted(base)
    callback = quiet()
    run = trainer(model, tmp_path, [callback], max_steps=2)
    run.train()
    state = json.loads(json.dumps({"log_history": run.state.log_history}, sort_keys=True))
    again = quiet()
    again.on_train_begin(None, TrainerState(**state), TrainerControl(), model=model)
    assert again.history == callback.history
    assert again.history[0]["layers"]["model.layers.0.mlp.up_proj"]["share"] is None


def test_a_new_training_starts_a_new_history(tmp_path: Path) -> None:
    callback = quiet()
    for _ in range(2):
        trainer(adapted(), tmp_path, [callback], max_steps=2).train()
        assert [entry["step"] for entry in callback.history] == [1, 2]


# --- to whom -----------------------------------------------------------------------------------------


def test_tensorboard_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer's own reporter, which it calls before any callback of the user; its files read back."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback = quiet()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="tensorboard|google")
        trainer(adapted(), tmp_path, [callback], report_to="tensorboard").train()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(tmp_path / "board"))
        board.Reload()
    assert len(board.Scalars("train/loss")) == 4
    for entry in callback.history:
        for key, value in flat(entry["layers"]).items():
            points = {point.step: point.value for point in board.Scalars(f"train/{key}")}
            assert [*points] == [1, 2, 3, 4]
            assert points[entry["step"]] == pytest.approx(value, rel=1e-6)


class MyPrinter(PrinterCallback):
    """Prints in a way of its own."""


@pytest.mark.parametrize("bar", [True, False])
def test_printers_are_spared(bar: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    run = trainer(adapted(), tmp_path, [quiet()], disable_tqdm=not bar)
    run.add_callback(recorder)
    run.add_callback(MyPrinter() if bar else ProgressCallback())
    run.train()
    shown = capsys.readouterr()
    assert shown.out.count("'loss'") == 2 * 4
    assert "nblora" not in shown.out + shown.err
    assert len(recorder.ours) == 4


def test_callbacks_on_every_side_get_it_once(tmp_path: Path) -> None:
    """Before and after ours in the list, with two of ours, and with ours inside another callback."""

    class Inside(TrainerCallback):
        def __init__(self) -> None:
            self.inner = quiet()

        def on_log(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner.on_log(*args, **kwargs)

    before, after, inside = Recorder(), Recorder(), Inside()
    run = trainer(adapted(), tmp_path, [before, quiet(), after])
    run.train()
    assert [step for step, _, _ in before.ours] == [step for step, _, _ in after.ours] == [1, 2, 3, 4]
    assert all("loss" not in logs for _, logs, _ in before.ours + after.ours)

    alone = Recorder()
    run = trainer(adapted(), tmp_path, [alone, inside])
    run.train()
    assert [step for step, _, _ in alone.ours] == [1, 2, 3, 4]
    assert len(run.state.log_history) == 9


@pytest.mark.filterwarnings("ignore:.*already one")
def test_two_of_them_do_not_answer_each_other(tmp_path: Path) -> None:
    recorder, first, second = Recorder(), quiet(), quiet(top=1)
    run = trainer(adapted(), tmp_path, [recorder, first, second], max_steps=2)
    run.train()
    assert [step for step, _, _ in recorder.ours] == [1, 1, 2, 2]
    assert len(first.history) == len(second.history) == 2


@pytest.mark.parametrize("returned", [True, False])
def test_what_others_decide_at_our_event_counts(returned: bool, tmp_path: Path) -> None:
    class StopOnShare(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> Any:
            if "nblora/share_max" in logs and state.global_step == 2:
                if returned:
                    return TrainerControl(should_training_stop=True)
                control.should_training_stop = True
            return None

    run = trainer(adapted(), tmp_path, [StopOnShare(), quiet(), Recorder()])
    run.train()
    assert run.state.global_step == 2


def test_a_callback_may_leave_at_our_event(tmp_path: Path) -> None:
    class Leaves(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "nblora/share_max" in logs:
                run.remove_callback(self)

    recorder = Recorder()
    run = trainer(adapted(), tmp_path, [Leaves(), recorder, quiet()])
    run.train()
    assert len(recorder.ours) == 4


# --- training doesn't notice --------------------------------------------------------------------------


class Modes(TrainerCallback):
    """Modes and gradient flags of all modules and tensors after each log, and that autograd is on."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        model = kwargs["model"]
        if "loss" in logs:
            self.seen.append(
                (
                    [module.training for module in model.modules()],
                    [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()],
                    torch.is_grad_enabled(),
                    torch.get_rng_state().tolist(),
                )
            )


@pytest.mark.parametrize(
    "arguments",
    [{}, {"activation_checkpointing": True}, {"bf16": True}],
    ids=["plain", "checkpointing", "bf16"],
)
def test_training_is_bitwise_the_same(arguments: dict[str, Any], tmp_path: Path) -> None:
    """With dropout, whose random numbers a measurement must not use up."""

    def run(*callbacks: TrainerCallback) -> tuple[dict[str, Tensor], Any, list[float]]:
        modes = Modes()
        model = adapted(dropout=0.3)
        done = trainer(model, tmp_path, [*callbacks, modes], **arguments)
        done.train()
        losses = [entry["loss"] for entry in done.state.log_history if "loss" in entry]
        return get_peft_model_state_dict(model), (modes.seen, torch.get_rng_state().tolist()), losses

    callback = quiet()
    alone, with_it = run(), run(callback)
    assert len(callback.history) == 4
    assert alone[0].keys() == with_it[0].keys()
    assert all(torch.equal(tensor, with_it[0][key]) for key, tensor in alone[0].items())
    assert alone[1:] == with_it[1:]
    assert len(alone[1][0]) == 4


def test_measuring_leaves_nothing_behind() -> None:
    """No graph, no cache, no counter: the model's state is the same object for object."""
    model = adapted().train()
    watched = [dict(layer._watches) for layer in layers_of(model)]
    before = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    torch.set_grad_enabled(True)
    measure(model)
    assert torch.is_grad_enabled()
    assert [dict(layer._watches) for layer in layers_of(model)] == watched
    for key, value in model.state_dict().items():
        assert value.data_ptr() == before[key][0]
        assert torch.equal(value, before[key][1])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frames_are_not_kept_alive(tmp_path: Path) -> None:
    """Looking for the handler up the stack must not keep what the frames hold until garbage collection."""
    import gc
    import weakref

    class Big:
        pass

    found: list[weakref.ref[Big]] = []

    class Wraps(TrainerCallback):
        inner = quiet()

        def on_log(self, *args: Any, **kwargs: Any) -> Any:
            big = Big()
            found.append(weakref.ref(big))
            return self.inner.on_log(*args, **kwargs)

    run = trainer(adapted(), tmp_path, [Wraps()], max_steps=1)
    gc.collect()
    gc.disable()
    try:
        run.train()
        assert len(found) == 3
        assert all(reference() is None for reference in found)
    finally:
        gc.enable()


# --- warnings at the end ------------------------------------------------------------------------------


def full(model: nn.Module, share: float) -> nn.Module:
    """The same model with every layer at this share of its bound."""
    for layer in layers_of(model):
        m, n = layer.out_in_features
        k, method, radius = layer.r["default"], layer.method["default"], layer.radius("default")
        frames = LowRank(random_frame(m, k), random_frame(n, k).mT)
        unit = method.norm.value(torch.ones(k))
        update = LowRank(frames.left * (share * radius / unit), frames.right)
        free = pull_back(update, k, norm=method.norm, radius=radius, parametrization=method.parametrization)
        with torch.no_grad():
            layer.nblora_out["default"].weight.copy_(free.out)
            layer.nblora_in["default"].weight.copy_(free.into)
            if free.logits is not None:
                layer.nblora_scale["default"].weight.copy_(free.logits[:, None])
    return model


def using(share: float, **choices: Any) -> nn.Module:
    return full(adapted(**choices), share)


def caught(model: nn.Module, folder: Path, callback: NBLoraCallback, **arguments: Any) -> list[str]:
    """Texts of the warnings of a training run that moves nothing."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", BoundUseWarning)
        trainer(model, folder, [callback], **({"learning_rate": 1e-9, "max_steps": 2} | arguments)).train()
    return [str(warning.message) for warning in record if warning.category is BoundUseWarning]


def test_a_bound_used_up_everywhere_is_warned_of(tmp_path: Path) -> None:
    [text] = caught(using(0.99), tmp_path, NBLoraCallback())
    assert "Every NB-LoRA layer uses at least 95% of its bound (the least 99.0%)" in text
    assert "raise it if the target still improves" in text


def test_a_bound_used_nowhere_is_warned_of(tmp_path: Path) -> None:
    [text] = caught(using(0.2), tmp_path, NBLoraCallback())
    assert "No NB-LoRA layer uses 50% of its bound (the most is 20.0%)" in text
    assert "a lower one would protect more of what the model knows, at no cost" in text


@pytest.mark.parametrize("share", [0.55, 0.9])
def test_a_bound_used_well_is_not(share: float, tmp_path: Path) -> None:
    assert not caught(using(share), tmp_path, NBLoraCallback())


@pytest.mark.parametrize(("most", "exception"), [(0.99, 0.3), (0.1, 0.6)])
def test_one_layer_that_differs_is_enough_not_to_warn(most: float, exception: float, tmp_path: Path) -> None:
    model = using(most)
    full(layers_of(model)[3], exception)
    assert not caught(model, tmp_path, NBLoraCallback())


def test_no_log_is_needed_for_a_warning(tmp_path: Path) -> None:
    """A run shorter than logging_steps, which is 500 unless told."""
    callback = NBLoraCallback()
    assert caught(using(0.99), tmp_path, callback, logging_steps=500)
    assert not callback.history


def test_the_weights_at_the_end_are_judged(tmp_path: Path) -> None:
    """Not those of the last log: the best checkpoint may have been loaded since."""

    class Fills(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "train_runtime" in logs:
                full(kwargs["model"], 0.99)

    callback = NBLoraCallback()
    with pytest.warns(BoundUseWarning, match="the least 99"):
        trainer(using(0.2), tmp_path, [Fills(), callback], max_steps=1, learning_rate=1e-9).train()
    assert callback.history[-1]["layers"]["model.layers.0.self_attn.q_proj"]["share"] < 0.3


def test_training_without_a_step_is_not_judged(tmp_path: Path) -> None:
    def run(callback: NBLoraCallback, resume: bool) -> list[str]:
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always", BoundUseWarning)
            trainer(
                using(0.99), tmp_path, [callback], max_steps=8, learning_rate=1e-9, save_strategy="epoch"
            ).train(resume_from_checkpoint=resume or None)
        return [str(warning.message) for warning in record if warning.category is BoundUseWarning]

    callback = NBLoraCallback()
    assert run(callback, resume=False)
    assert not run(callback, resume=True)  # it was complete; nor does the step of the last run count
    assert not run(NBLoraCallback(), resume=True)


def end(model: nn.Module, main: bool = True, **thresholds: float) -> list[str]:
    """Warnings at the end of training, without a Trainer."""
    callback = NBLoraCallback(**thresholds)
    state = TrainerState(global_step=1, is_world_process_zero=main)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        callback.on_step_end(None, state, TrainerControl(), model=model)
        callback.on_train_end(None, state, TrainerControl(), model=model)
    assert all(warning.category is BoundUseWarning for warning in record)
    return [str(warning.message) for warning in record]


def test_thresholds_are_those_given() -> None:
    """Saturated from its threshold on, unused below its own; to the last digit."""
    model = adapted()
    shares = [layer["share"] for layer in measure(model)[0].values()]
    least, most = min(shares), max(shares)
    assert least < most
    [text] = end(model, saturated=least, unused=0)
    assert text.startswith("Every")
    assert not end(model, saturated=math.nextafter(least, 1), unused=0)
    assert not end(model, saturated=1, unused=most)
    [text] = end(model, saturated=1, unused=math.nextafter(most, 1))
    assert text.startswith("No")


def test_only_the_main_process_warns() -> None:
    assert end(using(0.99))
    assert not end(using(0.99), main=False)


def test_zero_radii_and_nan_are_not_judged() -> None:
    for share, expected in ((0.99, "Every"), (0.2, "No")):
        model = using(share)
        layers_of(model)[2].nblora_radius["default"].weight.zero_()
        assert [text.split()[0] for text in end(model)] == [expected]
        with torch.no_grad():
            layers_of(model)[3].nblora_in["default"].weight.fill_(math.nan)
        assert not end(model)
    for layer in layers_of(model):
        layer.nblora_radius["default"].weight.zero_()
    assert not end(model)


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "lora", "inactive"])
def test_a_model_without_adapters_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    model: nn.Module = tiny_llama()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    if kind == "inactive":
        model = adapted(model)
        model.base_model.set_adapter([])
    with pytest.raises(ValueError, match="must have an active NB-LoRA adapter") as error:
        trainer(model, tmp_path, [NBLoraCallback()]).train()
    assert "\n" not in str(error.value)
    assert type(model).__name__ in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0},
        {"every": -1},
        {"every": 2.0},
        {"every": True},
        {"top": -1},
        {"top": 1.5},
        {"top": True},
        {"top": None},
        {"saturated": 1.1},
        {"saturated": math.nan},
        {"saturated": 0.4},
        {"unused": -0.1},
        {"unused": math.nan},
        {"unused": 0.96},
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    [(name, value)] = arguments.items()
    with pytest.raises(ValueError, match=rf"^.*{name}.* must .*got .*{name}={value!r}"):
        NBLoraCallback(**arguments)


def test_arguments_at_the_edge_are_accepted() -> None:
    NBLoraCallback(every=1, top=0, saturated=1.0, unused=1.0)
    NBLoraCallback(saturated=0.0, unused=0.0)
    default = NBLoraCallback()
    assert (default.every, default.top, default.saturated, default.unused) == (None, 3, 0.95, 0.5)


# --- several processes --------------------------------------------------------------------------------

PROGRAM = """
import json, os, sys, warnings
warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
tests, mode, meeting, rank = *sys.argv[1:4], int(sys.argv[4])
sys.path.insert(0, tests)
from test_callbacks import *
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
model = adapted()
expected = independent(model)
cpu = torch.device("cpu")
if mode == "fsdp2":
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    model = fully_shard(model)
elif mode == "unisolated":
    policy = ModuleWrapPolicy({type(model.base_model.model.model.layers[0])})
    model = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
else:
    policy, original = fsdp_auto_wrap_policy(model), mode == "fsdp-orig"
    model = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=original, device_id=cpu)
x = torch.arange(14).view(2, 7)
model(input_ids=x, labels=x).loss.backward()
try:
    measured = measure(model)[0]
    assert measured == close(expected), measured
    model(input_ids=x, labels=x).loss.backward()  # and training goes on
    print("RESULT same", flush=True)
except ValueError as error:
    print("RESULT", error, flush=True)
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort an orderly exit
"""

TRAINING = """
import os, sys, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, sys.argv[1])
from test_callbacks import *

recorder, callback = Recorder(), NBLoraCallback()
with warnings.catch_warnings(record=True) as record:
    warnings.simplefilter("always", BoundUseWarning)
    run = trainer(using(0.2), Path(sys.argv[2]), [recorder, callback], max_steps=2, report_to="tensorboard",
                  ddp_find_unused_parameters=False)
    run.train()
warned = sum(warning.category is BoundUseWarning for warning in record)
assert callback.history[-1]["layers"] == close(independent(run.model))
assert [step for step, _, _ in recorder.ours] == [1, 2]
print("RESULT", os.environ["RANK"], torch.distributed.get_world_size(), warned, flush=True)
torch.distributed.barrier()
os._exit(0)
"""


def in_two_processes(
    program: str, *arguments: str, environment: Callable[[int], dict[str, str]]
) -> list[str]:
    """What each of two processes prints after RESULT."""
    import os

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(Path(__file__).parent), *arguments, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment(rank),
        )
        for rank in range(2)
    ]
    finished = [process.communicate(timeout=240) for process in processes]
    assert all(process.returncode == 0 for process in processes), finished[0][1][-3000:]
    return [out.split("RESULT", 1)[1].strip() for out, _ in finished]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", "fsdp-orig", "fsdp2", "unisolated"])
def test_sharded_weights_are_gathered(mode: str, tmp_path: Path) -> None:
    """Every process measures whole updates; where the wrapping makes that impossible, it is said."""
    results = in_two_processes(PROGRAM, mode, str(tmp_path / "meeting"), environment=lambda rank: {})
    if mode == "unisolated":
        assert all("fsdp_auto_wrap_policy" in result for result in results)
    else:
        assert results == ["same", "same"]


@pytest.mark.slow
def test_two_processes_measure_and_one_reports(tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def environment(rank: int) -> dict[str, str]:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        folder = {"TENSORBOARD_LOGGING_DIR": str(tmp_path / "board")}
        return {"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting, **folder}

    results = in_two_processes(TRAINING, str(tmp_path / "out"), environment=environment)
    assert results == ["0 2 1", "1 2 0"]
    assert len([*(tmp_path / "board").glob("events*")]) == 1
