"""docs/lora-features.md against the installed PEFT and the code: nothing forgotten or claimed in vain."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraModel, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import quantization_utils
from torch import nn
from transformers.pytorch_utils import Conv1D

from nblora import NBLoraConfig
from nblora.tuner import NBLoraLayer, NBLoraModel, nblora_layers

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "lora-features.md").read_text()


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the table below a heading, by the first cell."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows[2:]]
    assert cells
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0].strip("`"): row[1:] for row in cells}


def names(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def test_every_option_of_lora() -> None:
    rows, ours = table("Options of LoraConfig"), names(NBLoraConfig)
    listed = names(LoraConfig) - names(PeftConfig)
    options = {name for name in rows if name in listed}
    assert options == rows.keys(), f"no options of LoraConfig: {rows.keys() - options}"
    hidden = {name for name in listed - options if name.startswith("_")}
    assert listed - options == hidden, "options of LoraConfig that the page does not know"
    for name, (answer, reason) in rows.items():
        if answer == "no":
            assert name not in ours
            assert reason, name
        elif answer == "yes":
            assert name in ours, name
        else:
            assert re.fullmatch(r"as `(\w+)`", answer)[1] in ours, name


def test_every_method_of_lora() -> None:
    rows = table("Methods of LoraModel and LoraLayer")
    methods = {}
    for theirs, ours in ((LoraModel, NBLoraModel), (LoraLayer, NBLoraLayer)):
        for name, member in inspect.getmembers(theirs, callable):
            if not name.startswith("_") and not hasattr(nn.Module, name) and not isinstance(member, type):
                methods[name] = hasattr(ours, name)
    assert rows.keys() == methods.keys()
    for name, (answer, reason) in rows.items():
        assert methods[name] is (answer == "yes"), name
        assert answer == "yes" or reason, name


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "torch.nn.Linear": lambda: nn.Linear(4, 6),
    "transformers.pytorch_utils.Conv1D": lambda: Conv1D(6, 4),
    "torch.nn.Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "torch.nn.Conv2d": lambda: nn.Conv2d(4, 6, 3),
    "torch.nn.Conv3d": lambda: nn.Conv3d(4, 6, 3),
    "torch.nn.Embedding": lambda: nn.Embedding(9, 6),
    "torch.nn.MultiheadAttention": lambda: nn.MultiheadAttention(6, 2),
}


def test_every_layer_that_lora_adapts() -> None:
    rows = table("Layers")
    assert rows.keys() == {*LAYERS, "target_parameters"}
    refusal = inspect.getsource(LoraModel._create_new_module)
    in_lora = set(re.findall(r"`((?:torch|transformers)[\w.]+?)\.?`", refusal))
    assert in_lora, "PEFT's message has changed: where else does it name its layers?"
    assert in_lora == LAYERS.keys()
    for name, build in LAYERS.items():
        assert rows[name][0] == "yes"
        model = get_peft_model(nn.ModuleDict({"layer": build()}), NBLoraConfig(target_modules=["layer"]))
        assert nblora_layers(model, "default")


def test_every_quantization_that_peft_knows() -> None:
    source = inspect.getsource(quantization_utils.resolve_quantization_backend)
    forward_only = set(re.findall(r'ForwardOnlyQuantizationBackend\("(\w+)"\)', source))
    mergeable = {
        backend.backend_name
        for backend in quantization_utils.QuantizationBackend.__subclasses__()
        if backend.supports_merge
    }
    rows = table("Quantized layers")
    assert rows.keys() == forward_only | mergeable
    for name, (trains, merges, _) in rows.items():
        assert trains == "yes"
        assert merges.startswith("yes") is (name in mergeable), name


@pytest.mark.parametrize("feature", table("What users do with LoRA"))
def test_every_claim_names_a_test_or_a_reason(feature: str) -> None:
    answer, where = table("What users do with LoRA")[feature]
    assert answer in ("yes", "no")
    assert where
    for file, test in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", where):
        source = (ROOT / file).read_text()
        assert f"def {test or 'test_'}" in source, (file, test)
    if answer == "yes":
        assert "`tests/" in where or "](" in where


@pytest.mark.parametrize("name", sorted({"gptq", "awq", "aqlm", "eetq", "inc", "te"}))
def test_weights_that_cannot_be_dequantized(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for layers that only run: no weight to read, half-precision outputs."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 8, 5
            full = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
            self.register_buffer("qweight", full.mul(16).round().to(torch.int8))
            self.bias = nn.Parameter(torch.ones(5), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.qweight.to(x.dtype) / 16).mT + self.bias.to(x.dtype)

    backend = quantization_utils.ForwardOnlyQuantizationBackend(name)
    for module in ("nblora.tuner.quantized", "nblora.tuner.model"):
        monkeypatch.setattr(
            f"{module}.resolve_quantization_backend",
            lambda base, **_: backend if isinstance(base, Packed) else None,
        )
    model = get_peft_model(nn.ModuleDict({"layer": Packed()}), NBLoraConfig(target_modules=["layer"], r=2))
    (layer,) = nblora_layers(model, "default").values()
    exact = torch.linalg.matrix_norm(layer.get_base_layer().qweight.float() / 16, 2).item()
    assert layer.radius("default").item() == pytest.approx(0.3 * exact, rel=2e-3)
    x = torch.randn(3, 8)
    expected = layer.get_base_layer()(x)
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    assert layer.nblora_out["default"].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=rf"can be quantized again, which {name} can't do here"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=rf"can be quantized again, which {name} can't do here"):
        model.merge_and_unload()
    assert not layer.merged
    torch.testing.assert_close(layer(x), expected)
    assert name in repr(layer)
