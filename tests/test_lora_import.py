"""Imported LoRA: the same update inside the ball, the nearest one outside, and training goes on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import tiny_gpt2, tiny_llama, tokens
from lora_samples import CONFIG, WEIGHTS, Everything, change_config, factors, peft_folder
from nblora import certify, import_lora
from nblora.bounds import parse_norm
from nblora.checkpoints import AdapterError
from nblora.spectral import spectral_norm

METHODS = [
    ("spectral", "joint"),
    ("spectral", "svd"),
    ("frobenius", "joint"),
    ("frobenius", "radial"),
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
    loaded.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    written, again = (load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "again"))
    assert {key: tensor.shape for key, tensor in written.items()} == {
        key: tensor.shape for key, tensor in again.items()
    }
    assert all(torch.equal(written[key], again[key]) for key in written)
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


@pytest.mark.parametrize("choice", ["modules_to_save", "bias"])
def test_what_is_trained_beside_the_updates_stays(choice: str, tmp_path: Path) -> None:
    options = {"modules_to_save": ["ln_f"]} if choice == "modules_to_save" else {"bias": "lora_only"}
    lora = trained_lora(
        tiny_gpt2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1, **options
    )
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.normal_()
    lora.save_pretrained(tmp_path / "lora")
    report = import_lora(tmp_path / "lora", tmp_path / "ours", bound=99.0, bound_kind="absolute")
    assert report.unbounded
    assert "have no bound" in report.summary
    loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "ours").eval()
    torch.testing.assert_close(out(loaded), out(lora), rtol=0, atol=2e-5)
    config = loaded.peft_config["default"]
    assert (config.bias, config.dropout, config.task_type) == (
        "none" if choice == "modules_to_save" else "nblora_only",
        0.1,
        "CAUSAL_LM",
    )


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_layers_of_experts_keep_their_rank(tmp_path: Path) -> None:
    everything_lora(rank_pattern={r"experts\.\w+": 2}).save_pretrained(
        tmp_path / "lora", save_embedding_layers=False
    )
    import_lora(tmp_path / "lora", tmp_path / "ours", bound=9.0, bound_kind="absolute")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(Everything(), tmp_path / "ours")
    ranks = {layer.name: layer.rank for layer in certify(loaded).layers}
    assert ranks["head"] == ranks["conv"] == ranks["embed"] == 3
    assert ranks["experts[0]"] == ranks["experts.base_layer[2]"] == 2


def pipeline_file(path: Path) -> Path:
    tensors = {}
    for seed, name in enumerate(("unet.first", "text_encoder.first")):
        up, down = factors(6, 4, 2, 1.0, seed)
        tensors |= {f"{name}.lora_A.weight": down.float(), f"{name}.lora_B.weight": up.float()}
    save_file(tensors, path)
    return path


def test_one_component_of_a_pipeline_is_imported(tmp_path: Path) -> None:
    source = pipeline_file(tmp_path / "a.safetensors")
    options: dict[str, Any] = {"bound": 9.0, "bound_kind": "absolute"}
    with pytest.raises(ValueError, match=r"component must be one of \['text_encoder', 'unet'\], of which"):
        import_lora(source, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="got component='vae'"):
        import_lora(source, tmp_path / "out", component="vae", **options)
    report = import_lora(source, tmp_path / "out", component="unet", **options)
    assert [layer.name for layer in report.layers] == ["unet.first"]
    model = nn.ModuleDict({"first": nn.Linear(4, 6), "inner": nn.ModuleDict({"first": nn.Linear(4, 6)})})
    loaded = PeftModel.from_pretrained(model, tmp_path / "out")
    assert [layer.name for layer in certify(loaded).layers] == ["first"]  # and not inner.first too
    up, down = factors(6, 4, 2, 1.0, 0)
    found = loaded.get_submodule("base_model.model.first").get_delta_weight("default").detach()
    torch.testing.assert_close(found, (up @ down).float(), rtol=1e-4, atol=1e-5)


def test_what_nblora_does_not_have_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    options: dict[str, Any] = {"bound": 1.0, "bound_kind": "absolute"}
    layers = {"a.q_proj": factors(6, 8, 2, 1.0)}
    peft_folder(tmp_path / "lora", layers, r=2, lora_alpha=2)
    for values, message in (
        ({"use_dora": True}, "must not use DoRA"),
        ({"lora_bias": True}, "must not use lora_bias"),
        ({"layer_replication": [[0, 1]]}, "must not use layer_replication"),
        (
            {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
            "must not use alora_invocation_tokens",
        ),
    ):
        before = (tmp_path / "lora" / CONFIG).read_text()
        change_config(tmp_path / "lora", **values)
        with pytest.raises(AdapterError, match=message):
            import_lora(tmp_path / "lora", target, **options)
        (tmp_path / "lora" / CONFIG).write_text(before)
    with pytest.raises(ValueError, match="parametrization must be"):
        import_lora(tmp_path / "lora", target, parametrization="polar", **options)
    with pytest.raises(ValueError, match="a relative bound needs the base model"):
        import_lora(tmp_path / "lora", target, bound=1.0)
    with pytest.raises(AdapterError, match=r"is it the base model of this adapter\?"):
        import_lora(tmp_path / "lora", target, base=tiny_llama(), **options)
    assert not target.exists()
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    assert json.loads((tmp_path / "lora" / CONFIG).read_text())["r"] == 2
    tensors["base_model.model.a.q_proj.lora_B.weight"][0, 0] = torch.inf
    save_file(tensors, tmp_path / "lora" / WEIGHTS)
    with pytest.raises(AdapterError, match=r"must have finite tensors, got '.*lora_B\.weight'"):
        import_lora(tmp_path / "lora", target, **options)
    assert not target.exists()


def test_numbers_of_the_report(tmp_path: Path) -> None:
    """A spectrum of 3 and 4, capped at 3.5: a tenth of the Frobenius norm 5 is removed."""
    up = torch.zeros(6, 2)
    up[0, 0], up[1, 1] = 4, 3
    peft_folder(tmp_path / "lora", {"a.q_proj": (up, torch.eye(2, 8))}, r=2, lora_alpha=2)
    report = import_lora(
        tmp_path / "lora", tmp_path / "out", norm="spectral", bound=3.5, bound_kind="absolute"
    )
    (layer,) = report.layers
    assert (layer.name, layer.shape, layer.rank, layer.bound, layer.changed) == (
        "a.q_proj",
        (6, 8),
        2,
        3.5,
        True,
    )
    assert (layer.before, layer.after, layer.removed) == pytest.approx((4, 3.5, 0.1), rel=1e-4)
    assert report.rows()[1] == ("a.q_proj", "6×8", "2", "4", "3.5", "3.5", "10.0%")
    assert report.to_table().endswith(report.summary)
    assert json.loads(report.to_json())["layers"][0]["removed"] == layer.removed
