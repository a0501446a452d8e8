"""What inspection measures and what it says of serving engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import TwoLayers, tiny_llama
from lora_samples import WEIGHTS, Everything, change_config, factors, peft_folder, product
from nblora import NBLoraConfig, certify, check_engines, export_lora, inspect_lora
from nblora.checkpoints import AdapterError
from nblora.checkpoints.figures import plot_spectra

LAYERS = {
    "model.layers.0.q_proj": factors(24, 32, 4, 0.3, seed=1),
    "model.layers.2.q_proj": factors(24, 32, 4, 9.0, seed=2),
    "model.layers.10.q_proj": factors(24, 32, 4, 2.0, seed=3),
}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return peft_folder(
        tmp_path / "lora", LAYERS, torch.float64, r=4, lora_alpha=2, base_model_name_or_path="b"
    )


def test_measures_are_those_of_the_dense_update(lora: Path) -> None:
    inspection = inspect_lora(lora)
    assert inspection.layout == "peft"
    assert not inspection.relative
    assert len(inspection.layers) == 3
    assert [layer.danger for layer in inspection.layers] == pytest.approx([4.5, 1.0, 0.15])
    for layer in inspection.layers:
        update = 0.5 * product(*LAYERS[layer.name])
        sigma = torch.linalg.svdvals(update)
        torch.testing.assert_close(torch.tensor(layer.singular_values).double(), sigma[:4])
        assert (layer.shape, layer.rank, layer.scale) == ((24, 32), 4, 0.5)
        assert layer.spectral == pytest.approx(torch.linalg.matrix_norm(update, 2).item())
        assert layer.frobenius == pytest.approx(torch.linalg.matrix_norm(update).item())
        assert layer.nuclear == pytest.approx(torch.linalg.matrix_norm(update, "nuc").item())
        assert layer.stable_rank == pytest.approx((sigma.square().sum() / sigma[0] ** 2).item())
    assert "Most dangerous is 'model.layers.2.q_proj' with a spectral norm of 4.5." in inspection.summary
    parsed = json.loads(inspection.to_json(), parse_constant=pytest.fail)
    assert [layer["name"] for layer in parsed["layers"]] == [layer.name for layer in inspection.layers]
    assert parsed["layers"][0]["danger"] == inspection.layers[0].danger
    table = inspection.to_table()
    assert table.index("layers.2.") < table.index("layers.10.") < table.index("layers.0.")


def test_danger_is_relative_to_the_base(lora: Path) -> None:
    base = nn.Module()
    base.model = nn.Module()
    base.model.layers = nn.ModuleList(nn.Module() for _ in range(11))
    for index, size in ((0, 1e-3), (2, 1.0), (10, 0.0)):
        base.model.layers[index].q_proj = nn.Linear(32, 24)
        base.model.layers[index].q_proj.weight.data *= size
    inspection = inspect_lora(lora, base=base)
    assert inspection.relative
    assert [layer.name.split(".")[2] for layer in inspection.layers] == ["10", "0", "2"]
    weight = base.model.layers[0].q_proj.weight.detach()
    expected = 0.15 / torch.linalg.matrix_norm(weight, 2).item()
    assert inspection.layers[1].danger == pytest.approx(expected, rel=1e-5)
    assert inspection.layers[0].danger == float("inf")
    json.loads(inspection.to_json(), parse_constant=pytest.fail)


def test_a_zero_update_is_no_danger(tmp_path: Path) -> None:
    peft_folder(tmp_path, {"a.q": (torch.zeros(6, 2), torch.ones(2, 8))}, r=2, lora_alpha=2)
    (layer,) = inspect_lora(tmp_path).layers
    assert (layer.danger, layer.stable_rank, layer.nuclear) == (0.0, 0.0, 0.0)


def test_our_own_adapters_are_inspected_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = NBLoraConfig(
        r=3,
        init_weights=False,
        target_modules=["embed", "conv", "head"],
        target_parameters=["experts.up", "experts.down"],
    )
    model = get_peft_model(Everything(), config)
    model.save_pretrained(tmp_path)
    inspection = inspect_lora(tmp_path, base=Everything())
    assert inspection.layout == "nblora"
    assert inspection.engines is None
    certified = {layer.name: layer for layer in certify(model).layers}
    assert certified.keys() == {layer.name for layer in inspection.layers}
    for layer in inspection.layers:
        assert layer.singular_values == certified[layer.name].singular_values
        assert layer.frobenius == pytest.approx(certified[layer.name].norm)
        # the bound is relative to the same base weight
        assert layer.base_norm == pytest.approx(certified[layer.name].bound / 0.3, rel=1e-5)
    exported = inspect_lora(export_lora(model, tmp_path / "lora"), base=Everything())
    for ours, theirs in zip(inspection.layers, exported.layers, strict=True):
        assert ours.name == theirs.name
        assert ours.danger == pytest.approx(theirs.danger, rel=1e-4)


def test_nan_is_refused_by_name(lora: Path) -> None:
    tensors = load_file(lora / WEIGHTS)
    key = "base_model.model.model.layers.2.q_proj.lora_A.weight"
    tensors[key][0, 0] = torch.nan
    save_file(tensors, lora / WEIGHTS)
    with pytest.raises(AdapterError, match=key) as error:
        inspect_lora(lora)
    assert str(lora / WEIGHTS) in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_plots(suffix: str, lora: Path, tmp_path: Path) -> None:
    inspection = inspect_lora(lora)
    plot_spectra([inspection, inspection], tmp_path / f"plot.{suffix}")
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert (tmp_path / f"plot.{suffix}").read_bytes().startswith(start)
    with pytest.raises(AdapterError, match="cannot be written"):
        plot_spectra([inspection], "/proc/no/such/plot.png")


def test_names_in_plots_are_no_formulas(tmp_path: Path) -> None:
    peft_folder(tmp_path / "a$x^$", {"b$\\frac{$.q": factors(6, 4, 2, 1.0)}, r=2, lora_alpha=2)
    plot_spectra([inspect_lora(tmp_path / "a$x^$")], tmp_path / "plot.svg")


# --- serving engines --------------------------------------------------------------------------------

ENGINES = ("vLLM", "SGLang", "llama.cpp")


def verdicts(folder: Path) -> dict[str, str]:
    """The problems of every engine, in one text."""
    return {verdict.engine: "; ".join(verdict.problems) for verdict in check_engines(folder).verdicts}


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"q_proj": 2}}, {"norm": "spectral"}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_exports_are_accepted(dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = NBLoraConfig(r=4, target_modules="all-linear", init_weights=False, **options)
    model = get_peft_model(tiny_llama(), config)
    export_lora(model, tmp_path, dtype=dtype)
    report = check_engines(tmp_path)
    assert [verdict.engine for verdict in report.verdicts] == list(ENGINES)
    assert all(verdict.accepts for verdict in report.verdicts), report.to_table()
    assert report.summary == "vLLM: yes, SGLang: yes, llama.cpp: yes."
    export_lora(model, tmp_path, rank=48)
    assert "start it with --max-lora-rank 64" in check_engines(tmp_path).to_table()


def no(*engines: str) -> dict[str, bool]:
    return {engine: engine not in engines for engine in ENGINES}


CASES: dict[str, tuple[dict[str, Any], dict[str, bool], str]] = {
    "as it was": ({}, no(), ""),
    "rsLoRA": ({"use_rslora": True}, no("SGLang", "llama.cpp"), "use_rslora"),
    "alphas": ({"alpha_pattern": {"layers.2.q_proj": 8}}, no(*ENGINES), "alpha_pattern"),
    "an expression": ({"target_modules": ".*q_proj"}, no("SGLang"), "must be a list of names"),
    "biases": ({"bias": "all"}, no(*ENGINES), "bias must be 'none', got 'all'"),
    "further modules": ({"modules_to_save": ["score"]}, no(*ENGINES), "modules_to_save must be null"),
    "activated LoRA": (
        {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
        no(*ENGINES),
        "alora_invocation_tokens must be",
    ),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 3]]}, no(*ENGINES), "layer_replication must be"),
    "no targets": ({"target_modules": None}, no(*ENGINES), "target_modules must name"),
}


@pytest.mark.parametrize("case", CASES)
def test_rules_of_configurations(case: str, lora: Path) -> None:
    values, accepts, message = CASES[case]
    change_config(lora, **values)
    report = check_engines(lora)
    assert {verdict.engine: verdict.accepts for verdict in report.verdicts} == accepts
    for verdict in report.verdicts:
        assert verdict.accepts or message in "; ".join(verdict.problems)
    assert json.loads(report.to_json())[0]["accepts"] == accepts["vLLM"]
    assert inspect_lora(lora).engines == report


def saved(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    peft_model = get_peft_model(model, LoraConfig(**options))
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return peft_model


def test_rules_of_tensors(tmp_path: Path) -> None:
    ranks = {"rank_pattern": {"second": 2}, "alpha_pattern": {"second": 2}}
    saved(TwoLayers(), tmp_path / "ranks", r=4, lora_alpha=4, target_modules=["first", "second"], **ranks)
    problems = verdicts(tmp_path / "ranks")
    assert "layers of several ranks" in problems["SGLang"]
    assert problems["vLLM"] == ""  # scale 1 everywhere
    assert "lora_alpha over the tensor's rank" in problems["llama.cpp"]
    saved(Everything(), tmp_path / "conv", target_modules=["conv"])
    assert all("got the convolution 'conv'" in text for text in verdicts(tmp_path / "conv").values())
    saved(Everything(), tmp_path / "experts", target_modules=[], target_parameters=["experts.up"])
    problems = verdicts(tmp_path / "experts")
    assert "experts must have factors of their own" in problems["llama.cpp"]
    assert "experts must have factors of their own" in problems["SGLang"]
    assert problems["vLLM"] == ""
    saved(nn.Sequential(nn.Linear(600, 600)), tmp_path / "large", r=520, target_modules=["0"])
    assert "ranks must be at most 512, got 520" in verdicts(tmp_path / "large")["vLLM"]


def test_a_tensor_that_is_no_factor(lora: Path) -> None:
    tensors = load_file(lora / WEIGHTS)
    save_file(tensors | {"base_model.model.embed_tokens.weight": torch.ones(3, 3)}, lora / WEIGHTS)
    assert all("embed_tokens" in text for text in verdicts(lora).values())


def test_other_layouts_are_for_no_engine(tmp_path: Path) -> None:
    up, down = LAYERS["model.layers.0.q_proj"]
    save_file(
        {"unet.a.lora_A.weight": down.contiguous(), "unet.a.lora_B.weight": up.contiguous()},
        tmp_path / "a.safetensors",
    )
    assert all("not the diffusers layout" in text for text in verdicts(tmp_path / "a.safetensors").values())


def test_notes_say_what_else_is_needed(lora: Path) -> None:
    change_config(lora, base_model_name_or_path=None)
    report = check_engines(lora)
    assert all(verdict.accepts for verdict in report.verdicts)
    assert "needs --base" in report.to_table()
