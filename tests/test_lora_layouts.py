"""The layouts of LoRA files: right pairs, names and scales, and refusals that say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_samples import CONFIG, WEIGHTS, change_config, factors, peft_folder, product
from nblora.checkpoints import AdapterError, LoraFile, open_lora

UP, DOWN = factors(6, 8, 2, 1.0)


def file_with(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(
        {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata=metadata or None
    )
    return path


def updates(file: LoraFile) -> dict[str, Tensor]:
    """Every update as a dense matrix, by the name of its layer."""
    found = {}
    for layer in file.layers:
        for label, update in zip(layer.labels, file.updates(layer), strict=True):
            found[label] = update.dense()
    return found


# --- PEFT -------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """Layers of every kind that PEFT's LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.conv2 = nn.Conv2d(3, 5, (3, 2))
        self.blocks = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
        self.experts = nn.Module()
        self.experts.first = nn.Parameter(torch.zeros(4, 6, 8))
        self.experts.second = nn.Parameter(torch.zeros(4, 8, 6))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_folders_mean_what_peft_computes(rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        rank_pattern={} if rslora else {"blocks.1": 2, "conv2": 3},
        alpha_pattern={} if rslora else {"blocks.1": 5, "embed": 1},
        target_modules=["embed", "conv2", "0", "1", "2"],
        target_parameters=["experts.first", "experts.second"],
    )
    model = get_peft_model(Kinds(), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    file = open_lora(tmp_path)
    assert file.layout == "peft"
    assert not file.others
    found = updates(file)
    assert len(found) == 1 + 1 + 3 + 2 * 4
    for layer in file.layers:
        module = model.get_submodule(f"base_model.model.{layer.name}")
        expected = module.get_delta_weight("default").detach().double()
        if layer.experts is None:
            expected = expected.mT if layer.name == "embed" else expected.flatten(1)
            torch.testing.assert_close(found[layer.name], expected, rtol=1e-5, atol=1e-5)
            assert layer.shape == expected.shape
        else:
            assert layer.experts == 4
            for index, label in enumerate(layer.labels):
                assert label == f"{layer.name}[{index}]"
                torch.testing.assert_close(found[label], expected[index], rtol=1e-5, atol=1e-5)


def test_the_weights_file_of_a_folder_is_enough(tmp_path: Path) -> None:
    peft_folder(tmp_path, {"a.q": (UP, DOWN)}, r=2, lora_alpha=3)
    assert updates(open_lora(tmp_path / WEIGHTS)).keys() == {"a.q"}
    assert open_lora(tmp_path / WEIGHTS).layers[0].scale == 1.5


# --- diffusers --------------------------------------------------------------------------------------

FORMS = {
    "new": ("unet.mid.attn1.to_k.lora_B.weight", "unet.mid.attn1.to_k.lora_A.weight", "mid.attn1.to_k"),
    "down and up": (
        "unet.mid.attn1.to_k.lora.up.weight",
        "unet.mid.attn1.to_k.lora.down.weight",
        "mid.attn1.to_k",
    ),
    "processor": (
        "unet.mid.attn1.processor.to_out_lora.up.weight",
        "unet.mid.attn1.processor.to_out_lora.down.weight",
        "mid.attn1.to_out.0",
    ),
    "newer processor": (
        "unet.mid.attn1.processor.to_q.lora.up.weight",
        "unet.mid.attn1.processor.to_q.lora.down.weight",
        "mid.attn1.to_q",
    ),
    "text encoder": (
        "text_encoder.layers.0.self_attn.v_proj.lora_linear_layer.up.weight",
        "text_encoder.layers.0.self_attn.v_proj.lora_linear_layer.down.weight",
        "layers.0.self_attn.v_proj",
    ),
    "old text encoder": (
        "text_encoder.layers.0.self_attn.to_out_lora.up.weight",
        "text_encoder.layers.0.self_attn.to_out_lora.down.weight",
        "layers.0.self_attn.out_proj",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_of_diffusers(form: str, tmp_path: Path) -> None:
    up, down, name = FORMS[form]
    file = open_lora(file_with(tmp_path / "a.safetensors", {up: UP, down: DOWN}))
    (layer,) = file.layers
    assert (file.layout, layer.component, layer.name) == ("diffusers", up.partition(".")[0], name)
    assert (layer.up, layer.down, layer.rank, layer.scale, layer.shape) == (up, down, 2, 1.0, (6, 8))
    torch.testing.assert_close(updates(file)[f"{layer.component}.{name}"], product(UP, DOWN))


@pytest.mark.parametrize("form", FORMS)
def test_names_are_those_of_diffusers_own_converters(form: str) -> None:
    convert = pytest.importorskip("diffusers.utils.state_dict_utils")
    up, down, name = FORMS[form]
    component = up.partition(".")[0]
    keys = {key.removeprefix(f"{component}."): 0 for key in (up, down)}
    if component == "unet":
        converted = convert.convert_unet_state_dict_to_peft(keys)
    else:
        if form == "old text encoder":  # which it recognises by this key
            assert any("to_out_lora" in key for key in keys)
        converted = convert.convert_state_dict_to_peft(keys)
    assert {key.removesuffix(".weight") for key in converted} == {f"{name}.lora_B", f"{name}.lora_A"}


def test_metadata_and_alphas_of_diffusers(tmp_path: Path) -> None:
    tensors = {}
    for name in ("transformer.a", "transformer.b", "text_encoder.a"):
        tensors |= {f"{name}.lora_A.weight": DOWN, f"{name}.lora_B.weight": UP}
    metadata = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"b": 1}}
    tensors["text_encoder.a.alpha"] = torch.tensor(3.0)
    path = file_with(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=json.dumps(metadata))
    scales = {(layer.component, layer.name): layer.scale for layer in open_lora(path).layers}
    assert scales == {("transformer", "a"): 2.0, ("transformer", "b"): 0.5, ("text_encoder", "a"): 1.5}
    assert not open_lora(path).others


def test_a_file_that_diffusers_writes(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = small_unet(diffusers)
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["to_q", "to_out.0", "conv1"], rank_pattern={"conv1": 3}
    )
    model.add_adapter(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_lora_adapter(tmp_path / "model")
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "pipeline",
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata={"r": 2, "lora_alpha": 5, "rank_pattern": {"conv1": 3}},
    )
    for folder, component in (("model", None), ("pipeline", "unet")):
        file = open_lora(tmp_path / folder)
        assert {layer.component for layer in file.layers} == {component}
        for layer in file.layers:
            expected = model.get_submodule(layer.name).get_delta_weight("default")
            (found,) = file.updates(layer)
            torch.testing.assert_close(
                found.dense(), expected.detach().double().flatten(1), rtol=1e-4, atol=1e-4
            )


def small_unet(diffusers: Any) -> nn.Module:
    """A U-Net of Stable Diffusion's kind, at random."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


# --- kohya ------------------------------------------------------------------------------------------


def test_names_and_alphas_of_kohya(tmp_path: Path) -> None:
    conv_up, conv_down = UP[..., None, None], torch.randn(2, 4, 3, 3, dtype=torch.float64)
    tensors = {
        "lora_unet_down_blocks_0_to_q.lora_down.weight": DOWN.half(),
        "lora_unet_down_blocks_0_to_q.lora_up.weight": UP.half(),
        "lora_unet_down_blocks_0_to_q.alpha": torch.tensor(1.0).bfloat16(),
        "lora_te1_layers_0.lora_down.weight": DOWN.bfloat16(),
        "lora_te1_layers_0.lora_up.weight": UP.bfloat16(),
        "lora_te2_layers_0.lora_down.weight": DOWN,
        "lora_te2_layers_0.lora_up.weight": UP,
        "lora_te2_layers_0.alpha": torch.tensor([4], dtype=torch.int64),
        "lora_unet_conv1.lora_down.weight": conv_down,
        "lora_unet_conv1.lora_up.weight": conv_up,
        "lora_unet_conv1.alpha": torch.tensor(2.0),
    }
    file = open_lora(file_with(tmp_path / "any name.safetensors", tensors, ss_network_dim="2"))
    assert file.layout == "kohya"
    assert not file.others
    assert {(layer.component, layer.name): layer.scale for layer in file.layers} == {
        ("unet", "down_blocks_0_to_q"): 0.5,
        ("text_encoder", "layers_0"): 1.0,
        ("text_encoder_2", "layers_0"): 2.0,
        ("unet", "conv1"): 1.0,
    }
    assert {layer.name: layer.shape for layer in file.layers}["conv1"] == (6, 36)
    torch.testing.assert_close(updates(file)["unet.conv1"], product(conv_up, conv_down))


def test_a_kohya_file_that_diffusers_reads(tmp_path: Path) -> None:
    """The same names and alphas as diffusers' own converter."""
    convert = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    tensors = {}
    for name in (
        "down_blocks_1_attentions_0_proj_in",
        "mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
    ):
        key = f"lora_unet_{name}"
        tensors |= {
            f"{key}.lora_down.weight": DOWN,
            f"{key}.lora_up.weight": UP,
            f"{key}.alpha": torch.tensor(1.0),
        }
    file = open_lora(file_with(tmp_path / "a.safetensors", tensors))
    theirs, alphas = convert._convert_non_diffusers_lora_to_diffusers(dict(tensors))
    assert set(alphas.values()) == {1.0}
    flat = {key.removeprefix("unet.").replace(".processor", "").replace(".", "_") for key in theirs}
    for layer in file.layers:
        assert layer.scale == 0.5
        assert any(key.startswith(layer.name.removesuffix("_to_out_0")) for key in flat)


# --- what is refused --------------------------------------------------------------------------------

PAIR = {"a.lora_A.weight": DOWN, "a.lora_B.weight": UP}
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "DoRA of PEFT": (PAIR | {"a.lora_magnitude_vector.weight": UP[:, 0]}, "DoRA rescales the whole weight"),
    "DoRA of kohya": (PAIR | {"a.dora_scale": UP}, "'a.dora_scale': DoRA"),
    "LoHa": ({"a.hada_w1_a": UP, "a.hada_w1_b": DOWN}, "LoHa multiplies"),
    "LoKr": ({"a.lokr_w1": UP, "a.lokr_w2": DOWN}, "LoKr is a Kronecker product"),
    "LoCon in three factors": (
        {"a.lora_mid.weight": DOWN, "a.lora_down.weight": DOWN, "a.lora_up.weight": UP},
        "CP decomposition",
    ),
    "no LoRA": ({"model.weight": UP}, "must have LoRA factors"),
    "half a pair": (
        {"a.lora_A.weight": DOWN},
        "must have both factors of a layer, got 'a.lora_A.weight' alone",
    ),
    "rank 0": ({"a.lora_A.weight": DOWN[:0], "a.lora_B.weight": UP[:, :0]}, "with k >= 1, got shapes (0, 8)"),
    "ranks that differ": (
        PAIR | {"a.lora_B.weight": UP[:, :1]},
        "with the same k, got shapes (2, 8) of 'a.lora_A",
    ),
    "a vector": (PAIR | {"a.lora_B.weight": UP[0]}, "got shapes (2, 8) of 'a.lora_A.weight' and (2,)"),
    "integers": (PAIR | {"a.lora_A.weight": DOWN.long()}, "got I64 in 'a.lora_A.weight'"),
    "grouped convolution": (
        {"a.lora_A.weight": torch.ones(4, 3, 3, 3), "a.lora_B.weight": torch.ones(6, 2, 1, 1)},
        "grouped convolutions are not supported",
    ),
    "two pairs": (PAIR | {"a.lora.down.weight": DOWN}, "must have one pair of factors for a layer"),
    "alpha that is none": (PAIR | {"a.alpha": torch.tensor(torch.nan)}, "one finite number in 'a.alpha'"),
    "alphas": (PAIR | {"a.alpha": torch.ones(2)}, "one finite number in 'a.alpha'"),
    "PEFT without its configuration": (
        {f"base_model.model.{key}": tensor for key, tensor in PAIR.items()},
        "needs its adapter_config.json",
    ),
}


def refused(source: Path, *parts: str) -> None:
    with pytest.raises(AdapterError) as error:
        open_lora(source)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(source), *parts):
        assert part in message


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused(case: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[case]
    refused(file_with(tmp_path / "a.safetensors", tensors), message)


@pytest.mark.parametrize("keep", [0, 7, 60, -3])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = file_with(tmp_path / "a.safetensors", PAIR)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "must be an intact safetensors file")


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt"])
def test_pickles_are_never_loaded(suffix: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"bomb": Bomb()}, tmp_path / f"a.{suffix}")
    refused(tmp_path / f"a.{suffix}", "pickled weights are never loaded")
    assert not (tmp_path / "exploded").exists()


PATTERNS = {"rank_pattern": {"q": 2}, "alpha_pattern": {"q": 3}}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "must not use DoRA"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "an unchanged base weight"),
    "OLoRA": ({"init_lora_weights": "OLoRA"}, "an unchanged base weight"),
    "LoftQ": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        "got init_lora_weights='loftq', which changes it",
    ),
    "another method": ({"peft_type": "IA3"}, "must be of a LoRA, got peft_type='IA3'"),
    "another rank": ({"r": 3}, "must have the rank 3 of the configuration, got 2 in"),
    "no rank": ({"r": 0}, "must have an integer r >= 1, got r=0"),
    "a rank in words": ({"r": "two"}, "must have an integer r >= 1, got r='two'"),
    "a rank that no layer has": ({"r": "3"} | PATTERNS, "must have an integer r >= 1, got r='3'"),
    "an infinite alpha": ({"lora_alpha": float("inf")}, "must have a finite number lora_alpha"),
    "no number": ({"lora_alpha": "much"}, "must have a finite number lora_alpha, got lora_alpha='much'"),
    "an alpha that no layer has": ({"lora_alpha": None} | PATTERNS, "got lora_alpha=None"),
    "a large integer": ({"lora_alpha": 10**400}, "numbers must be finite floats, got one of 401 digits"),
    "a rank of a pattern": ({"rank_pattern": {"q": 0}}, "the rank must be an integer >= 1, got 0"),
    "an alpha of a pattern": ({"alpha_pattern": {"q": "6"}}, "needs a configuration with ranks and alphas"),
    "an infinite alpha of a pattern": ({"alpha_pattern": {"q": float("inf")}}, "lora_alpha must be finite"),
    "targets that are none": ({"target_parameters": 5}, "needs a configuration"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    values, message = CONFIGS[case]
    peft_folder(tmp_path, {"a.q": (UP, DOWN)}, r=2, lora_alpha=3)
    change_config(tmp_path, **values)
    refused(tmp_path, message)


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    peft_folder(tmp_path / "a", {"a.q": (UP, DOWN)}, r=2, lora_alpha=3)
    (tmp_path / "a" / CONFIG).write_text(f'{{"peft_type": {deep}}}')
    refused(tmp_path / "a", "nested too deeply")
    for text, message in {
        deep: "nested too deeply",
        "[[1, 2]]": "a JSON object",
        f'{{"r": 2, "lora_alpha": {10**400}}}': "numbers must be finite floats",
    }.items():
        refused(file_with(tmp_path / "b.safetensors", PAIR, lora_adapter_metadata=text), message)


@pytest.mark.parametrize("missing", ["r", "lora_alpha"])
def test_missing_fields_of_a_configuration_are_named(missing: str, tmp_path: Path) -> None:
    peft_folder(tmp_path, {"a.q": (UP, DOWN)}, r=2, lora_alpha=3)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config[missing]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    refused(tmp_path, f"must have r and lora_alpha, got none of {missing}")


def test_a_factor_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    bad = DOWN.clone()
    bad[1, 3] = torch.nan
    file = open_lora(file_with(tmp_path / "a.safetensors", PAIR | {"a.lora_A.weight": bad}))
    with pytest.raises(
        AdapterError, match=r"a\.safetensors must have finite tensors, got 'a\.lora_A\.weight'"
    ):
        list(file.updates(file.layers[0]))


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    file_with(tmp_path / "mine.safetensors", PAIR)
    assert open_lora(tmp_path).tensors.path == tmp_path / "mine.safetensors"
    file_with(tmp_path / "pytorch_lora_weights.safetensors", PAIR)
    assert open_lora(tmp_path).tensors.path == tmp_path / "pytorch_lora_weights.safetensors"
