"""Imported LoRA: the same update inside the ball, the nearest one outside, and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from conftest import tiny_gpt2, tiny_llama, tokens
from lora_samples import Everything
from nblora import certify, import_lora
from nblora.bounds import parse_norm, spectral_norm

METHODS = [
    ("spectral", "joint"),
    ("spectral", "svd"),
    ("frobenius", "joint"),
    ("nuclear", "svd"),
    (3.5, "joint"),
    ("ky-fan-2", "svd"),
]


def out(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        y = model(tokens() if x is None else x)
    return getattr(y, "logits", y)


def everything_lora(**options: Any) -> PeftModel:
    """A LoRA with random updates on `Everything`."""
    config = {
        "target_modules": ["embed", "conv", "head"],
        "target_parameters": ["experts.up", "experts.down"],
        "r": 3,
        "lora_alpha": 5,
    }
    model = get_peft_model(Everything(), LoraConfig(**(config | options)))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_().mul_(0.5)
    return model.eval()


def trained_lora(build: Callable[[], nn.Module], **options: Any) -> PeftModel:
    """A LoRA with a random update in every layer."""
    torch.manual_seed(2)
    model = get_peft_model(
        build(), LoraConfig(**({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_().mul_(0.1)
    return model.eval()


@pytest.mark.parametrize(("norm", "parametrization"), METHODS)
def test_inside_the_ball_it_is_the_same_function(norm: Any, parametrization: str, tmp_path: Path) -> None:
    lora = trained_lora(tiny_llama, target_modules="all-linear", rank_pattern={"q_proj": 2, "up_proj": 40})
    lora.save_pretrained(tmp_path / "lora")
    report = import_lora(
        tmp_path / "lora",
        tmp_path / "ours",
        norm=norm,
        bound=500.0,
        bound_kind="absolute",
        parametrization=parametrization,
    )
    assert len(report.layers) == 14
    assert not any(layer.changed for layer in report.layers)
    assert all(layer.removed < 1e-4 for layer in report.layers)
    assert "nothing is cut" in report.summary
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert loaded.peft_config["default"].peft_type == "NBLORA"
    torch.testing.assert_close(out(loaded), out(lora), rtol=0, atol=2e-5)
    assert (out(lora) - out(tiny_llama())).abs().max() > 1e-2
    assert certify(tmp_path / "ours").holds


@pytest.mark.parametrize(("norm", "parametrization"), METHODS)
def test_outside_the_ball_it_is_the_nearest_update(norm: Any, parametrization: str, tmp_path: Path) -> None:
    lora = trained_lora(tiny_gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    lora.save_pretrained(tmp_path / "lora")
    report = import_lora(
        tmp_path / "lora",
        tmp_path / "ours",
        norm=norm,
        bound=0.02,
        base=tiny_gpt2(),
        parametrization=parametrization,
    )
    assert all(layer.changed and 0 < layer.removed < 1 for layer in report.layers)
    assert f"All {len(report.layers)}" not in report.summary
    loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "ours").eval()
    certificate = certify(loaded)
    assert certificate.holds
    modules = dict(loaded.named_modules())
    for layer in certificate.layers:
        name = f"base_model.model.{layer.name}"
        base = modules[name].get_base_layer().weight
        assert layer.bound == pytest.approx(0.02 * spectral_norm(base).item(), rel=1e-6)
        assert layer.share > 1 - 1e-5
        original = lora.get_submodule(name).get_delta_weight("default").double()
        u, sigma, vh = torch.linalg.svd(original, full_matrices=False)
        nearest = u * parse_norm(norm).project(sigma, torch.tensor(layer.bound).double()) @ vh
        found = modules[name].get_delta_weight("default").double()
        assert torch.linalg.matrix_norm(found - nearest) <= 1e-4 * torch.linalg.matrix_norm(nearest)


@pytest.mark.parametrize("bound", [100.0, 0.3])
def test_every_kind_of_layer(bound: float, tmp_path: Path) -> None:
    lora = everything_lora(rank_pattern={"head": 2})
    lora.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    report = import_lora(
        tmp_path / "lora",
        tmp_path / "ours",
        norm="nuclear",
        bound=bound,
        base=Everything(),
        parametrization="svd",
    )
    assert len(report.layers) == 3 + 2 * 3
    loaded = PeftModel.from_pretrained(Everything(), tmp_path / "ours").eval()
    certificate = certify(tmp_path / "ours")
    assert certificate.holds
    assert certificate == certify(loaded)
    x = torch.arange(11)[None]
    if bound > 1:
        torch.testing.assert_close(out(loaded, x), out(lora, x), rtol=1e-4, atol=1e-4)
        assert (out(lora, x) - out(Everything(), x)).abs().max() > 0.1
    else:
        assert all(layer.share > 1 - 1e-4 for layer in certificate.layers)


def test_training_continues(tmp_path: Path) -> None:
    trained_lora(tiny_llama, target_modules="all-linear").save_pretrained(tmp_path / "lora")
    import_lora(tmp_path / "lora", tmp_path / "ours", norm="frobenius", bound=2.0, base=tiny_llama())
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours", is_trainable=True)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    x, losses = tokens(8, 12), []
    for _ in range(20):
        loss = model(x, labels=x).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert certify(model).holds
