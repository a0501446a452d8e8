"""Exports of every kind of layer, in every layout and rank, read by PEFT and diffusers themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import tiny_llama, tokens
from lora_samples import CONFIG, WEIGHTS, Everything
from nblora import NBLoraConfig, certify, check_engines, export_lora
from nblora.checkpoints import AdapterError, open_lora
from nblora.tuner import nblora_layers
from test_lora_layouts import small_unet


def out(model: nn.Module, *inputs: Any) -> Tensor:
    with torch.no_grad():
        y = model(*inputs)
    return getattr(y, "logits", getattr(y, "sample", y))


def everything(**options: Any) -> PeftModel:
    """An adapter with a random update on every kind of layer."""
    torch.manual_seed(3)
    config = {
        "target_modules": ["embed", "conv", "head"],
        "target_parameters": ["experts.up", "experts.down"],
        "r": 3,
        "bound": 2.0,
        "init_weights": False,
        "rank_pattern": {"head": 2},
    }
    return get_peft_model(Everything(), NBLoraConfig(**(config | options))).eval()


LOADER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from lora_samples import Everything
from peft import PeftModel

model = PeftModel.from_pretrained(Everything(), sys.argv[2]).eval()
assert model.peft_config["default"].peft_type == "LORA"
with torch.no_grad():
    results = [model(torch.arange(11)[None]), model.merge_and_unload()(torch.arange(11)[None])]
torch.save(results, sys.argv[2] + "/results.pt")
assert "nblora" not in sys.modules
"""


@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
def test_peft_alone_reads_every_kind_of_layer(parametrization: str, tmp_path: Path) -> None:
    model = everything(parametrization=parametrization)
    x = torch.arange(11)[None]
    assert (out(model, x) - out(Everything(), x)).abs().max() > 0.1
    export_lora(model, tmp_path)
    finished = subprocess.run(
        [sys.executable, "-c", LOADER, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert finished.returncode == 0, finished.stderr
    for found in torch.load(tmp_path / "results.pt"):
        torch.testing.assert_close(found, out(model, x), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == {}


@pytest.mark.parametrize("norm", ["spectral", "nuclear"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_layer_is_certified_after_rounding(dtype: str, norm: str, tmp_path: Path) -> None:
    model = everything(norm=norm)
    export_lora(model, tmp_path, dtype=dtype)
    source, exported = certify(model), certify(tmp_path)
    assert len(exported.layers) == 3 + 2 * 3
    assert exported.holds
    for ours, theirs in zip(source.layers, exported.layers, strict=True):
        assert (ours.name, ours.shape, ours.bound) == (theirs.name, theirs.shape, theirs.bound)
        assert theirs.norm <= theirs.bound
        assert theirs.norm == pytest.approx(ours.norm, rel=0.05)


def test_the_scale_of_a_model_counts(tmp_path: Path) -> None:
    """What a model applies is what is certified and exported: update and bound times the scale."""
    model = everything()
    plain = certify(model)
    assert not plain.scaled
    layers = nblora_layers(model, "default")
    for name, layer in layers.items():
        if name.endswith("head"):
            layer.set_scale("default", -2.5)
    scaled = certify(model)
    assert scaled.holds
    for before, after in zip(plain.layers, scaled.layers, strict=True):
        factor = 2.5 if after.name == "head" else 1.0
        assert after.scale == (-2.5 if after.name == "head" else 1.0)
        assert after.bound == pytest.approx(factor * before.bound)
        assert after.norm == pytest.approx(factor * before.norm)
    assert "scale" in scaled.rows()[0]
    assert "scale" not in plain.rows()[0]
    assert "up to -2.5" in scaled.summary
    assert json.loads(scaled.to_json())["layers"][-1]["scale"] == -2.5
    export_lora(model, tmp_path)
    x = torch.arange(11)[None]
    loaded = PeftModel.from_pretrained(Everything(), tmp_path).eval()
    torch.testing.assert_close(out(loaded, x), out(model, x), rtol=0, atol=1e-5)
    assert certify(tmp_path).holds


# --- ranks ------------------------------------------------------------------------------------------


def adapted(**options: Any) -> PeftModel:
    torch.manual_seed(5)
    config = {"target_modules": ["q_proj", "up_proj"], "r": 4, "init_weights": False}
    return get_peft_model(tiny_llama(), NBLoraConfig(**(config | options))).eval()


@pytest.mark.parametrize("rank", [4, 8, 64])
def test_ranks_are_padded(rank: int, tmp_path: Path) -> None:
    model = adapted(rank_pattern={"q_proj": 2})
    export_lora(model, tmp_path, rank=rank)
    assert {layer.rank for layer in open_lora(tmp_path).layers} == {rank}
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == rank
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(out(loaded, tokens()), out(model, tokens()), rtol=0, atol=1e-5)
    assert certify(tmp_path).holds


def test_a_rank_below_that_of_an_update_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"got rank=3 for layer '.*' with 4 singular values"):
        export_lora(adapted(), tmp_path / "out", rank=3)
    assert not list(tmp_path.iterdir())


def test_a_rank_below_the_factors_is_exact_where_the_update_has_it(tmp_path: Path) -> None:
    model = adapted(parametrization="svd")
    for layer in nblora_layers(model, "default").values():
        with torch.no_grad():
            layer.nblora_angle["default"].weight[1:] = 0
    export_lora(model, tmp_path, rank=1)
    assert {layer.rank for layer in open_lora(tmp_path).layers} == {1}
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(out(loaded, tokens()), out(model, tokens()), rtol=0, atol=1e-5)
    assert (out(loaded, tokens()) - out(tiny_llama(), tokens())).abs().max() > 1e-4
    assert certify(tmp_path).holds


def test_a_small_singular_value_of_a_tall_layer_is_no_rounding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = NBLoraConfig(
        r=2, parametrization="svd", norm="spectral", init_weights=False, target_modules=["0"]
    )
    model = get_peft_model(nn.Sequential(nn.Linear(4, 60_000, bias=False)), config)
    (layer,) = nblora_layers(model, "default").values()
    with torch.no_grad():
        # singular values of 1 and 1 % of the bound, if an angle of pi / 2 is all of it
        layer.nblora_angle["default"].weight.copy_(torch.tensor([[1.5], [0.01]]) / 60_000**0.5)
    values = certify(model).layers[0].singular_values
    assert 0.001 < values[1] / values[0] < 0.05
    with pytest.raises(AdapterError, match=r"got rank=1 for layer '0' with 2 singular values"):
        export_lora(model, tmp_path / "out", rank=1)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4"])
def test_a_rank_that_is_none_is_refused(rank: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank must be an integer >= 1, got rank="):
        export_lora(adapted(), tmp_path / "out", rank=rank)
    assert not list(tmp_path.iterdir())


def test_a_rank_of_numpy(tmp_path: Path) -> None:
    export_lora(adapted(), tmp_path, rank=np.int64(6))
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 6


# --- layouts ----------------------------------------------------------------------------------------


def adapted_unet(diffusers: Any) -> PeftModel:
    torch.manual_seed(6)
    targets = ["to_q", "to_k", "to_out.0", "conv1", "proj_in", "time_emb_proj"]
    config = NBLoraConfig(r=3, bound=0.5, init_weights=False, target_modules=targets)
    return get_peft_model(small_unet(diffusers), config).eval()


@pytest.mark.parametrize("source", ["model", "folder"])
def test_diffusers_reads_what_is_written_for_it(source: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = adapted_unet(diffusers)
    inputs = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 12)
    expected = out(model.get_base_model(), *inputs)
    assert (out(small_unet(diffusers), *inputs) - expected).abs().max() > 1e-2
    if source == "folder":
        model.save_pretrained(tmp_path / "ours")
    export_lora(model if source == "model" else tmp_path / "ours", tmp_path / "out", layout="diffusers")
    plain = small_unet(diffusers)
    plain.load_lora_adapter(
        str(tmp_path / "out"), weight_name="pytorch_lora_weights.safetensors", prefix="unet"
    )
    torch.testing.assert_close(out(plain, *inputs), expected, rtol=0, atol=1e-5)
    assert certify(tmp_path / "out").holds


def test_diffusers_reads_the_kohya_file(tmp_path: Path) -> None:
    """Through its converter for that layout, alphas included."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers as convert

    model = adapted_unet(diffusers)
    inputs = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 12)
    export_lora(model, tmp_path, layout="kohya", rank=5)
    assert certify(tmp_path).holds
    tensors = load_file(tmp_path / "lora.safetensors")
    alphas = {key: tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert len(alphas) * 3 == len(tensors)
    assert {tensor.item() for tensor in alphas.values()} == {5.0}
    converted, network_alphas = convert(tensors)
    plain = small_unet(diffusers)
    plain.load_lora_adapter(converted, network_alphas=network_alphas, prefix="unet")
    torch.testing.assert_close(out(plain, *inputs), out(model.get_base_model(), *inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "component", "start"),
    [
        ("diffusers", "transformer", "transformer.model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("diffusers", "text_encoder_2", "text_encoder_2.model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("kohya", "text_encoder", "lora_te1_model_layers_0_self_attn_q_proj.lora_down.weight"),
        ("kohya", "text_encoder_2", "lora_te2_model_layers_0_self_attn_q_proj.lora_down.weight"),
        ("kohya", "transformer", "lora_unet_model_layers_0_self_attn_q_proj.lora_down.weight"),
    ],
)
def test_components(layout: Any, component: str, start: str, tmp_path: Path) -> None:
    model = adapted()
    export_lora(model, tmp_path, layout=layout, component=component, dtype="bfloat16")
    (file,) = tmp_path.iterdir()
    tensors = load_file(file)
    assert start in tensors
    assert {tensor.dtype for key, tensor in tensors.items() if "alpha" not in key} == {torch.bfloat16}
    certificate = certify(file)
    assert certificate.holds
    assert [layer.bound for layer in certificate.layers] == [layer.bound for layer in certify(model).layers]
    with safe_open(file, framework="pt") as opened:
        assert set(opened.metadata()) == {"format", "nblora_bounds"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_alphas_are_exact_in_every_precision(dtype: str, tmp_path: Path) -> None:
    """2049 is the first integer that neither of the halves has."""
    model = adapted(norm="frobenius")
    export_lora(model, tmp_path, layout="kohya", component="text_encoder", dtype=dtype, rank=2049)
    tensors = load_file(tmp_path / "lora.safetensors")
    alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
    assert {(alpha.item(), alpha.dtype) for alpha in alphas} == {(2049.0, torch.float32)}
    assert {layer.scale for layer in open_lora(tmp_path).layers} == {1.0}


def test_two_layers_of_one_name_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "q": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    adapter = get_peft_model(model, NBLoraConfig(r=2, target_modules=["q_proj", "q.proj"]))
    with pytest.raises(AdapterError, match=r"different names in the kohya layout, got 'lora_unet_q_proj\."):
        export_lora(adapter, tmp_path / "out", layout="kohya", component="unet")
    assert not list(tmp_path.iterdir())
    export_lora(adapter, tmp_path / "out", layout="diffusers", component="unet")
    assert len(certify(tmp_path / "out").layers) == 2


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_frozen_weight_of_an_adapted_embedding_stays_out(tied: bool, bias: Any, tmp_path: Path) -> None:
    """PEFT saves it beside the adapter; engines refuse what is no factor."""
    base = tiny_llama()
    if tied:
        base.tie_weights()
    config = NBLoraConfig(
        r=3, init_weights=False, target_modules=["embed_tokens", "lm_head", "q_proj"], bias=bias
    )
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "ours" / WEIGHTS)
    export_lora(tmp_path / "ours", tmp_path / "lora")
    assert not open_lora(tmp_path / "lora").others
    if bias == "none":
        assert all(verdict.accepts for verdict in check_engines(tmp_path / "lora").verdicts)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(out(loaded, tokens()), out(model, tokens()), rtol=0, atol=1e-5)


def test_trained_biases_of_adapted_layers_are_kept(tmp_path: Path) -> None:
    model = everything(bias="all", target_parameters=None)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    export_lora(tmp_path / "ours", tmp_path / "lora")
    x = torch.arange(11)[None]
    loaded = PeftModel.from_pretrained(Everything(), tmp_path / "lora").eval()
    torch.testing.assert_close(out(loaded, x), out(model, x), rtol=0, atol=1e-5)


def test_layouts_without_a_place_for_it(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for layout in ("diffusers", "kohya"):
        with pytest.raises(ValueError, match="component must name the component"):
            export_lora(adapted(), target, layout=layout)
        with pytest.raises(AdapterError, match=f"the {layout} layout must be of linear layers"):
            export_lora(everything(), target, layout=layout, component="unet")
        with pytest.raises(AdapterError, match=f"the {layout} layout must be of LoRA factors alone"):
            export_lora(adapted(modules_to_save=["lm_head"]), target, layout=layout, component="unet")
    for component in ("a/b", "..", ""):
        with pytest.raises(ValueError, match="component must be a name without dots or slashes, got"):
            export_lora(adapted(), target, layout="diffusers", component=component)
    with pytest.raises(ValueError, match="component must be one of unet, "):
        export_lora(adapted(), target, layout="kohya", component="vae")
    with pytest.raises(ValueError, match="layout must be one of peft, diffusers, kohya, got layout='webui'"):
        export_lora(adapted(), target, layout="webui")
    assert not list(tmp_path.iterdir())


def test_there_and_back(tmp_path: Path) -> None:
    """A pipeline file imported again is the same function; the base is a model or a pipeline folder."""
    diffusers = pytest.importorskip("diffusers")
    from nblora import import_lora

    model = adapted_unet(diffusers)
    inputs = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 12)
    small_unet(diffusers).save_pretrained(tmp_path / "pipeline" / "unet")
    for layout in ("diffusers", "kohya"):
        export_lora(model, tmp_path / layout, layout=layout)
        import_lora(
            tmp_path / layout,
            tmp_path / f"{layout}-ours",
            bound=1.0,
            base=small_unet(diffusers) if layout == "diffusers" else tmp_path / "pipeline",
            norm="nuclear",
        )
        loaded = PeftModel.from_pretrained(small_unet(diffusers), tmp_path / f"{layout}-ours")
        expected = out(model.get_base_model(), *inputs)
        torch.testing.assert_close(out(loaded.get_base_model(), *inputs), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="needs the base model, or its files"):
        import_lora(tmp_path / "kohya", tmp_path / "x", bound=1.0, bound_kind="absolute")
    assert WEIGHTS in {path.name for path in (tmp_path / "kohya-ours").iterdir()}


def test_an_adapter_is_not_replaced_by_its_export(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    for source in (tmp_path / "ours", tmp_path / "ours" / WEIGHTS):
        with pytest.raises(AdapterError, match="must be another one than that of the adapter"):
            export_lora(source, tmp_path / "ours")
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before


def test_trained_tokens_and_tied_modules_survive(tmp_path: Path) -> None:
    for name, options in {
        "tokens": {"trainable_token_indices": [17, 30]},
        "tied": {"modules_to_save": ["embed_tokens", "lm_head"]},
    }.items():
        model = adapted(**options)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and ".nblora_" not in key:
                    parameter.normal_()
        export_lora(model, tmp_path / name)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / name)
        torch.testing.assert_close(out(loaded, tokens()), out(model, tokens()), rtol=0, atol=1e-4)
        assert (out(model, tokens()) - out(adapted(), tokens())).abs().max() > 1e-2
        assert certify(tmp_path / name).holds


def test_a_radius_of_an_expert_above_its_promise_is_found_out(tmp_path: Path) -> None:
    model = everything(
        norm="spectral",
        bound=0.5,
        bound_kind="absolute",
        bound_pattern={"experts.up": 0.2},
        parametrization="svd",
    )
    with torch.no_grad():  # every singular value at its bound
        for layer in nblora_layers(model, "default").values():
            m, _ = layer.out_in_features
            layer.nblora_angle["default"].weight.fill_(torch.pi / 2 / m**0.5)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    honest = certify(tmp_path)
    assert honest.holds
    assert sorted({layer.bound for layer in honest.layers}) == pytest.approx([0.2, 0.5])
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.experts.nblora_radius.weight"][1] = 0.6
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    broken = [layer for layer in certify(tmp_path).layers if not layer.holds]
    assert [(layer.name, layer.bound) for layer in broken] == [("experts[1]", 0.5)]
