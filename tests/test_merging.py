"""Merged adapters: the exact mean of the updates, truncated and bounded as asked, whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nblora
from conftest import TwoLayers, tiny_gpt2, tiny_llama
from lora_samples import CONFIG, WEIGHTS, Everything, change_config, factors, peft_folder, product
from nblora import NBLoraConfig, certify, check_engines, import_lora, merge_adapters
from nblora.bounds import parse_norm
from nblora.checkpoints import AdapterError, open_lora
from nblora.lowrank import LowRank
from nblora.merging import MergeReport

F32 = torch.finfo(torch.float32).eps
EXACT = 1e-6  # of the norms of the parts; the factors are float32, so a few roundings of 6e-8


def randomized(model: PeftModel, seed: int, size: float = 0.3) -> PeftModel:
    """A LoRA with a random update in every layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def everything(kind: str, seed: int, **options: Any) -> PeftModel:
    """An adapter with a random update on every kind of layer."""
    torch.manual_seed(seed)
    chosen = {
        "target_modules": ["embed", "conv", "head"],
        "target_parameters": ["experts.up", "experts.down"],
    }
    if kind == "lora":
        lora: dict[str, Any] = {"r": 3, "lora_alpha": 5} | chosen | options
        return randomized(get_peft_model(Everything(), LoraConfig(**lora)), seed)
    ours: dict[str, Any] = {"r": 2, "bound": 1.5, "init_weights": False, "rank_pattern": {"head": 4}}
    return get_peft_model(Everything(), NBLoraConfig(**(ours | chosen | options))).eval()


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """What the model adds to each weight, by PEFT's own methods, in float64."""
    return {
        name: module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "r", {"default": 0})
    }


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def written(folder: Path) -> dict[str, Tensor]:
    """Every update of a PEFT folder as a dense matrix, by hand: lora_alpha = r, so B A alone."""
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            up = tensors[key.replace("lora_A", "lora_B")]
            assert len(down) == config["r"]
            found[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = product(up, down)
    return found


def close(found: Tensor, expected: Tensor, size: float, tolerance: float = EXACT) -> None:
    """Equal up to a share of the size of what was added."""
    assert torch.linalg.vector_norm(found - expected).item() <= tolerance * size


def norm_of(update: Tensor) -> float:
    return torch.linalg.vector_norm(update).item()


# --- the sum is exact -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kinds", [("nblora", "nblora"), ("lora", "lora"), ("nblora", "lora", "lora")], ids=str
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_merged_update_is_the_sum_of_the_updates(
    weighted: bool, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    """Of every kind of layer, as PEFT's own LoRA computes it."""
    models = [everything(kind, seed) for seed, kind in enumerate(kinds)]
    paths = [saved(model, tmp_path / str(i)) for i, model in enumerate(models)]
    weights = [0.7, -1.3, 0.4][: len(kinds)] if weighted else None
    report = merge_adapters(paths, tmp_path / "out", weights=weights)
    used = weights or [1 / len(kinds)] * len(kinds)
    assert report.weights == tuple(used)
    loaded = PeftModel.from_pretrained(Everything(), tmp_path / "out")
    assert loaded.peft_config["default"].peft_type == "LORA"
    parts = [deltas(model) for model in models]
    found = deltas(loaded)
    assert len(found) == 5
    for name, update in found.items():
        terms = [weight * part[name] for weight, part in zip(used, parts)]
        expected = sum(terms[1:], terms[0])
        assert norm_of(expected) > 0.05
        close(update, expected, sum(map(norm_of, terms)))
    assert len(report.layers) == 3 + 2 * 3
    assert all(layer.removed < EXACT for layer in report.layers)


def test_ranks_add_up_and_are_padded_to_one(tmp_path: Path) -> None:
    first = peft_folder(tmp_path / "a", {"a.q": factors(9, 7, 2, 1.0), "a.v": factors(9, 7, 2, 1.0)}, r=2)
    second = peft_folder(tmp_path / "b", {"a.q": factors(9, 7, 3, 1.0, seed=1)}, r=3, lora_alpha=6)
    report = merge_adapters([first, second], tmp_path / "out")
    assert [layer.rank for layer in report.layers] == [5, 2]
    assert report.rank == 5
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {t.shape[0 if "lora_A" in k else 1] for k, t in tensors.items()} == {5}
    assert not tensors["base_model.model.a.v.lora_A.weight"][2:].any()
    assert not tensors["base_model.model.a.v.lora_B.weight"][:, 2:].any()


def test_ranks_stop_at_the_sizes_of_a_layer(tmp_path: Path) -> None:
    paths, expected = [], torch.zeros(4, 6, dtype=torch.float64)
    for seed in range(5):
        up, down = factors(4, 6, 3, 1.0, seed=seed)
        paths.append(peft_folder(tmp_path / str(seed), {"a.q": (up, down)}, torch.float64, r=3, lora_alpha=3))
        expected += product(up, down) / 5
    assert merge_adapters(paths, tmp_path / "out").rank == 4
    close(written(tmp_path / "out")["a.q"], expected, 1.0)


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"up_proj": 7}}],
    ids=str,
)
def test_scales_of_the_adapters_count(options: dict[str, Any], tmp_path: Path) -> None:
    models = []
    for seed, choice in enumerate([options, {}]):
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], **choice)
        models.append(randomized(get_peft_model(tiny_llama(), config), seed))
    paths = [saved(model, tmp_path / str(i)) for i, model in enumerate(models)]
    merge_adapters(paths, tmp_path / "out")
    found = deltas(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out"))
    assert len(found) == 4
    for name, update in found.items():
        terms = [deltas(model)[name] / 2 for model in models]
        close(update, terms[0] + terms[1], sum(map(norm_of, terms)))


def test_transposed_base_weights(tmp_path: Path) -> None:
    """GPT-2 stores them as (in, out); PEFT warns unless the configuration says so."""
    paths = []
    for seed in range(2):
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        paths.append(saved(randomized(get_peft_model(tiny_gpt2(), config), seed), tmp_path / str(seed)))
    merge_adapters(paths, tmp_path / "out")
    found = deltas(PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "out"))
    first, second = (deltas(PeftModel.from_pretrained(tiny_gpt2(), path)) for path in paths)
    for name, update in found.items():
        close(update, (first[name] + second[name]) / 2, norm_of(first[name]) + norm_of(second[name]))


def test_an_adapter_minus_itself_is_zero(tmp_path: Path) -> None:
    path = saved(everything("nblora", 0), tmp_path / "a")
    report = merge_adapters([path, path], tmp_path / "out", weights=[1, -1])
    for update in deltas(PeftModel.from_pretrained(Everything(), tmp_path / "out")).values():
        assert norm_of(update) <= 10 * F32
    assert all(layer.before < 1e-12 for layer in report.layers)


def test_one_adapter_may_be_negated_and_weights_may_be_zero(tmp_path: Path) -> None:
    up, down = factors(9, 7, 2, 1.0)
    path = peft_folder(tmp_path / "a", {"a.q": (up, down)}, torch.float64, r=2, lora_alpha=2)
    merge_adapters([path], tmp_path / "minus", weights=[-2])
    close(written(tmp_path / "minus")["a.q"], -2 * product(up, down), 2.0)
    report = merge_adapters([path, path], tmp_path / "zero", weights=[0, 0.0], bound=1.0)
    assert not written(tmp_path / "zero")["a.q"].any()
    assert report.rank == 1
    assert certify(tmp_path / "zero").holds


@pytest.mark.parametrize(("alike", "size"), [(1.0, 2.0), (0.5, 1.90), (0.0, 1.41)])
def test_peft_linear_is_not_the_mean(alike: float, size: float, tmp_path: Path) -> None:
    """It averages the factors, whose product has B of one adapter times A of the other in it too. The
    figures of docs/merging.md: the norm over that of the mean, and the error."""
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["first"])
    model = get_peft_model(TwoLayers(256, 256, 256), config)
    model.add_adapter("other", config)
    module = model.base_model.model.first
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for side in (module.lora_A, module.lora_B):
            x, y = (torch.randn(side.default.weight.shape, generator=generator) for _ in range(2))
            side.default.weight.copy_(x)
            side.other.weight.copy_(alike * x + (1 - alike**2) ** 0.5 * y)
    model.save_pretrained(tmp_path / "in")
    merge_adapters([tmp_path / "in", tmp_path / "in" / "other"], tmp_path / "out")
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "linear", combination_type="linear")
    model.load_adapter(tmp_path / "out", "ours")
    mean, linear, ours = (
        product(module.lora_B[name].weight, module.lora_A[name].weight)
        for name in ("default", "linear", "ours")
    )
    mean = (mean + product(module.lora_B.other.weight, module.lora_A.other.weight)) / 2
    close(ours, mean, norm_of(mean), 1e-7)
    assert norm_of(linear) / norm_of(mean) == pytest.approx(size, abs=0.01)
    assert norm_of(linear - mean) / norm_of(mean) == pytest.approx(1.0, abs=0.01)


# --- which layers -----------------------------------------------------------------------------------


def test_a_layer_that_an_adapter_lacks_counts_as_zero_there(tmp_path: Path) -> None:
    models, paths = [], []
    for seed, targets in enumerate([["q_proj"], ["q_proj", "v_proj"]]):
        config = LoraConfig(r=2, lora_alpha=2, target_modules=targets)
        models.append(randomized(get_peft_model(tiny_llama(), config), seed))
        paths.append(saved(models[-1], tmp_path / str(seed)))
    report = merge_adapters(paths, tmp_path / "out")
    assert [(layer.name.rpartition(".")[2], layer.adapters) for layer in report.layers] == [
        ("q_proj", 2),
        ("v_proj", 1),
    ] * 2
    assert "2 layers are not in every adapter and count as zero" in report.summary
    assert "'model.layers.0.self_attn.v_proj', which 1 of 2 have" in report.summary
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"] == ["q_proj", "v_proj"]
    found = deltas(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out"))  # a warning would fail
    first, second = map(deltas, models)
    assert found.keys() == second.keys()
    for name, update in found.items():
        expected = (first.get(name, 0) + second[name]) / 2
        close(update, expected, norm_of(expected))


def test_choices_of_blocks_become_names(tmp_path: Path) -> None:
    """An expression or a choice of blocks has no union that a list of suffixes could say."""
    paths = []
    for seed, options in enumerate(
        [{"target_modules": ["q_proj"], "layers_to_transform": [0]}, {"target_modules": r".*\.1\..*up_proj"}]
    ):
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, **options))
        paths.append(saved(randomized(model, seed), tmp_path / str(seed)))
    merge_adapters(paths, tmp_path / "out")
    expected = {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert set(json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"]) == expected
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert {name.removeprefix("base_model.model.") for name in deltas(loaded)} == expected


def test_every_engine_takes_the_result(tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        config = LoraConfig(
            r=2 + seed, lora_alpha=32, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
        )
        paths.append(saved(randomized(get_peft_model(tiny_llama(), config), seed), tmp_path / str(seed)))
    merge_adapters(paths, tmp_path / "out")
    assert all(verdict.accepts for verdict in check_engines(tmp_path / "out").verdicts)


def unet_files(folder: Path) -> tuple[list[Path], Tensor, nn.Module]:
    """The layer blocks.0.to_q in all three layouts, the mean of its updates, and a base that has it."""
    pairs = [factors(6, 8, 2, 1.0 + seed, seed=seed) for seed in range(3)]
    paths = [
        peft_folder(folder / "peft", {"blocks.0.to_q": pairs[0]}, r=2, lora_alpha=2),
        folder / "diffusers.safetensors",
        folder / "kohya.safetensors",
    ]
    (up, down), (half_up, half_down) = (tuple(side.float() for side in pair) for pair in pairs[1:])
    names = {"unet.blocks.0.to_q.lora_A.weight": down, "unet.blocks.0.to_q.lora_B.weight": up}
    save_file(names, paths[1])
    key = "lora_unet_blocks_0_to_q"
    names = {
        f"{key}.lora_down.weight": half_down,
        f"{key}.lora_up.weight": half_up,
        f"{key}.alpha": torch.tensor(1.0),
    }
    save_file(names, paths[2])
    base = nn.Module()
    base.blocks = nn.ModuleList([nn.Module()])
    base.blocks[0].to_q = nn.Linear(8, 6)
    scales = (1.0, 1.0, 0.5)
    mean = sum((s * product(*pair) / 3 for s, pair in zip(scales, pairs)), torch.zeros(6, 8))
    return paths, mean, base


@pytest.mark.parametrize("layout", ["peft", "diffusers", "kohya"])
@pytest.mark.parametrize("chosen", [(0, 1, 2), (0, 1), (1, 2), (0, 2), (2, 2)], ids=str)
def test_layouts_are_mixed_and_chosen(chosen: tuple[int, ...], layout: Any, tmp_path: Path) -> None:
    paths, mean, base = unet_files(tmp_path)
    picked = [paths[i] for i in chosen]
    alone = set(chosen) == {2} and layout != "kohya"
    if alone:
        with pytest.raises(
            ValueError, match=r"kohya's layout, in which '_' stands for '.' too, need the base"
        ):
            merge_adapters(picked, tmp_path / "out", layout=layout)
    report = merge_adapters(picked, tmp_path / "out", layout=layout, bound=0.4, base=base if alone else None)
    assert len(report.layers) == 1
    merged = open_lora(tmp_path / "out")
    assert merged.layout == layout
    (layer,) = merged.layers
    name = "blocks_0_to_q" if layout == "kohya" else "blocks.0.to_q"
    assert (layer.component, layer.name) == (None if layout == "peft" else "unet", name)
    certificate = certify(tmp_path / "out")
    assert certificate.holds
    assert certificate.layers[0].bound == 0.4
    report = merge_adapters(picked, tmp_path / "out", layout=layout, base=base)
    (update,) = open_lora(tmp_path / "out").updates(open_lora(tmp_path / "out").layers[0])
    if chosen == (0, 1, 2):
        close(update.dense(), mean, norm_of(mean))
    assert all(layer.removed < EXACT for layer in report.layers)


def test_components_of_pipelines(tmp_path: Path) -> None:
    sides = {"lora_A": torch.randn(2, 8), "lora_B": torch.randn(6, 2)}
    both = {f"{c}.a.{side}.weight": t.clone() for c in ("unet", "text_encoder") for side, t in sides.items()}
    save_file(both, tmp_path / "both.safetensors")
    report = merge_adapters(
        [tmp_path / "both.safetensors"] * 2, tmp_path / "out", layout="kohya", dtype="float16"
    )
    assert [layer.name for layer in report.layers] == ["text_encoder.a", "unet.a"]
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    assert {key.partition(".")[0] for key in tensors} == {"lora_unet_a", "lora_te1_a"}
    assert tensors["lora_unet_a.alpha"].dtype == torch.float32
    assert tensors["lora_unet_a.lora_up.weight"].dtype == torch.float16
    with pytest.raises(
        ValueError, match=r"component must be one of \['text_encoder', 'unet'\] in PEFT's layout"
    ):
        merge_adapters([tmp_path / "both.safetensors"], tmp_path / "out")
    merge_adapters([tmp_path / "both.safetensors"], tmp_path / "one", component="unet")
    assert written(tmp_path / "one").keys() == {"a"}
    with pytest.raises(ValueError, match=r"component must be one of \['text_encoder', 'unet'\], got"):
        merge_adapters([tmp_path / "both.safetensors"], tmp_path / "out", component="prior")
    nameless = peft_folder(tmp_path / "peft", {"a": factors(6, 8, 2, 1.0)}, r=2)
    with pytest.raises(ValueError, match="where the names of an adapter tell none"):
        merge_adapters([tmp_path / "both.safetensors", nameless], tmp_path / "out", layout="diffusers")
    with pytest.raises(ValueError, match="component must name the component of the pipeline"):
        merge_adapters([nameless], tmp_path / "out", layout="diffusers")
    report = merge_adapters(
        [tmp_path / "both.safetensors", nameless], tmp_path / "u", layout="diffusers", component="unet"
    )
    assert [(layer.name, layer.adapters) for layer in report.layers] == [("unet.a", 2)]


def test_kohyas_name_of_a_transformer(tmp_path: Path) -> None:
    """kohya's scripts call every denoiser lora_unet."""
    up, down = (side.float() for side in factors(6, 8, 2, 1.0))
    save_file(
        {"transformer.a.to_q.lora_A.weight": down, "transformer.a.to_q.lora_B.weight": up},
        tmp_path / "d.safetensors",
    )
    save_file(
        {"lora_unet_a_to_q.lora_down.weight": down, "lora_unet_a_to_q.lora_up.weight": up},
        tmp_path / "k.safetensors",
    )
    paths = [tmp_path / "d.safetensors", tmp_path / "k.safetensors"]
    report = merge_adapters(paths, tmp_path / "out", layout="diffusers")
    assert [(layer.name, layer.adapters) for layer in report.layers] == [("transformer.a.to_q", 2)]


# --- truncated --------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> tuple[list[Path], Tensor]:
    """Three adapters of one layer, and the mean of their updates."""
    paths, mean = [], torch.zeros(20, 30, dtype=torch.float64)
    for seed in range(3):
        up, down = factors(20, 30, 4, 1.0 + seed, seed=seed)
        paths.append(
            peft_folder(tmp_path / f"in{seed}", {"a.q": (up, down)}, torch.float64, r=4, lora_alpha=4)
        )
        mean += product(up, down) / 3
    return paths, mean


@pytest.mark.parametrize("rank", [1, 5, 11, np.int64(5)])
def test_truncation_is_the_best_of_its_rank(
    rank: int, three: tuple[list[Path], Tensor], tmp_path: Path
) -> None:
    """Eckart and Young: the error is the singular values that are left out."""
    paths, mean = three
    report = merge_adapters(paths, tmp_path / "out", rank=rank, dtype="float64")
    sigma = torch.linalg.svdvals(mean)
    assert report.rank == rank
    error = torch.linalg.matrix_norm(written(tmp_path / "out")["a.q"] - mean).item()
    assert error == pytest.approx(sigma[rank:].norm().item(), rel=1e-9)
    assert report.layers[0].removed == pytest.approx(error / norm_of(mean), rel=1e-9)
    assert "The most is cut from 'a.q'" in report.summary


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_a_share_of_the_energy_with_the_smallest_rank(
    energy: float, three: tuple[list[Path], Tensor], tmp_path: Path
) -> None:
    paths, mean = three
    report = merge_adapters(paths, tmp_path / "out", rank=energy)
    squares = torch.linalg.svdvals(mean).square()
    assert squares[: report.rank].sum() >= energy * squares.sum() > squares[: report.rank - 1].sum()
    assert torch.linalg.matrix_rank(written(tmp_path / "out")["a.q"], rtol=1e-6) == report.rank


def test_all_of_the_energy_leaves_out_only_rounding(three: tuple[list[Path], Tensor], tmp_path: Path) -> None:
    """Three times the same adapter has its rank, not three times as much."""
    (path, *_), _ = three
    report = merge_adapters([path] * 3, tmp_path / "out", rank=1.0)
    assert report.rank == 4
    assert merge_adapters([path] * 3, tmp_path / "whole").rank == 12
    close(written(tmp_path / "out")["a.q"], written(tmp_path / "whole")["a.q"], 1.0)


def test_no_dense_matrix_is_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of (131072, 131072) would have 137 GB in float64."""

    def dense(self: LowRank) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(LowRank, "dense", dense)
    size, paths = 2**17, []
    for seed in range(2):
        up, down = torch.randn(size, 2, dtype=torch.float64), torch.randn(2, size, dtype=torch.float64)
        paths.append(peft_folder(tmp_path / str(seed), {"a.q": (up, down)}, r=2, lora_alpha=2))
    report = merge_adapters(paths, tmp_path / "out", rank=3, bound=1.9e5, norm="nuclear")
    assert report.rank == 3
    assert report.layers[0].after <= 1.9e5 < report.layers[0].before


# --- bounded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "nuclear", 3.5, "ky-fan-2"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_bound_holds_after_rounding_and_the_update_is_the_nearest(
    dtype: str, norm: Any, three: tuple[list[Path], Tensor], tmp_path: Path
) -> None:
    paths, mean = three
    u, sigma, vh = torch.linalg.svd(mean, full_matrices=False)
    bound = 0.4 * parse_norm(norm).value(sigma).item()
    report = merge_adapters(paths, tmp_path / "out", norm=norm, bound=bound, dtype=dtype)
    update = written(tmp_path / "out")["a.q"]
    value = parse_norm(norm).value(torch.linalg.svdvals(update)).item()
    assert value <= bound * (1 + 10 * 30 * torch.finfo(torch.float64).eps)
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert value >= bound * (1 - 30 * eps - 1e-9)
    nearest = u * parse_norm(norm).project(sigma, torch.tensor(bound).double()) @ vh
    close(update, nearest, norm_of(nearest), 8 * 12 * eps + 1e-7)
    certificate = certify(tmp_path / "out")
    assert certificate.holds
    assert certificate.norm_name == parse_norm(norm).name == report.norm_name
    assert certificate.layers[0].bound == bound
    assert report.layers[0].after <= bound < report.layers[0].before
    assert "1 were outside their bound" in report.summary


def test_inside_the_ball_it_stays_the_exact_sum(three: tuple[list[Path], Tensor], tmp_path: Path) -> None:
    paths, mean = three
    report = merge_adapters(paths, tmp_path / "out", bound=1.001 * norm_of(mean))
    assert report.rank == 12
    close(written(tmp_path / "out")["a.q"], mean, 2.0)
    assert not report.cut


def test_truncation_and_bound_give_the_nearest_of_that_rank_in_the_ball(
    three: tuple[list[Path], Tensor], tmp_path: Path
) -> None:
    paths, mean = three
    merge_adapters(paths, tmp_path / "out", bound=0.5, norm="nuclear", rank=3, dtype="float64")
    u, sigma, vh = torch.linalg.svd(mean, full_matrices=False)
    projected = parse_norm("nuclear").project(sigma[:3], torch.tensor(0.5).double())
    close(written(tmp_path / "out")["a.q"], u[:, :3] * projected @ vh[:3], 0.5, 1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_layer_is_bounded_relative_to_its_weight(dtype: str, tmp_path: Path) -> None:
    paths = [
        saved(everything(kind, seed), tmp_path / str(seed)) for seed, kind in enumerate(["nblora", "lora"])
    ]
    report = merge_adapters(
        paths,
        tmp_path / "out",
        bound=0.1,
        bound_kind="relative",
        norm="spectral",
        base=Everything(),
        dtype=dtype,
    )
    certificate = certify(tmp_path / "out")
    assert len(certificate.layers) == 3 + 2 * 3
    assert certificate.holds
    base = Everything()
    weights = {
        "embed": base.embed.weight,
        "conv": base.conv.weight.flatten(1),
        "head": base.head.weight,
        **{f"experts[{i}]": base.experts.down[i] for i in range(3)},
        **{f"experts.base_layer[{i}]": base.experts.up[i] for i in range(3)},
    }
    bounds = {layer.name: layer.bound for layer in report.layers}
    for layer in certificate.layers:
        spectral = torch.linalg.matrix_norm(weights[layer.name].double(), 2).item()
        assert layer.bound == pytest.approx(0.1 * spectral, rel=1e-5)
        assert layer.bound == bounds[layer.name]
        assert layer.norm <= layer.bound
        assert layer.share > 0.9


def test_a_zero_base_weight_bounds_at_zero(tmp_path: Path) -> None:
    base = TwoLayers(7, 9, 5)
    nn.init.zeros_(base.first.weight)
    path = peft_folder(tmp_path / "a", {"first": factors(9, 7, 2, 1.0)}, r=2)
    merge_adapters([path], tmp_path / "out", bound=0.5, bound_kind="relative", base=base)
    assert not written(tmp_path / "out")["first"].any()
    assert certify(tmp_path / "out").holds


def test_a_base_that_does_not_fit_is_refused(three: tuple[list[Path], Tensor], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"is it the base model of this adapter\?"):
        merge_adapters(three[0], tmp_path / "out", base=TwoLayers())
    assert not (tmp_path / "out").exists()


def test_the_result_becomes_nblora_again(tmp_path: Path) -> None:
    paths = [
        saved(everything(kind, seed), tmp_path / str(seed)) for seed, kind in enumerate(["nblora", "lora"])
    ]
    merge_adapters(paths, tmp_path / "out", bound=0.5)
    import_lora(tmp_path / "out", tmp_path / "ours", bound=0.5, bound_kind="absolute")
    ours = PeftModel.from_pretrained(Everything(), tmp_path / "ours")
    assert certify(ours).holds
    merged = deltas(PeftModel.from_pretrained(Everything(), tmp_path / "out"))
    for name, update in deltas(ours).items():
        close(update, merged[name], norm_of(merged[name]), 1e-4)  # what import_lora promises
    again = merge_adapters([tmp_path / "ours", tmp_path / "ours"], tmp_path / "again")
    assert all(layer.after <= 0.5 * (1 + 1e-6) for layer in again.layers)


def test_the_mean_of_bounded_adapters_keeps_their_bound(tmp_path: Path) -> None:
    """The triangle inequality; so that nothing is cut from a mean with the bound that all of them have."""
    paths = [
        saved(everything("nblora", seed, bound_kind="absolute"), tmp_path / str(seed)) for seed in range(3)
    ]
    report = merge_adapters(paths, tmp_path / "out", bound=1.5)
    assert not report.cut
    assert all(layer.removed < EXACT for layer in report.layers)


# --- PEFT's methods ---------------------------------------------------------------------------------


def two_llamas(folder: Path) -> tuple[PeftModel, list[Path]]:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("other", config)
    randomized(model, 0)
    model.save_pretrained(folder)
    return model, [folder, folder / "other"]


@pytest.mark.parametrize(("method", "density"), [("ties", 0.3), ("ties", 1), ("magnitude_prune", 0.5)])
@pytest.mark.parametrize("weights", [[1.0, 0.6], [0.5, -0.5]])
def test_pruning_methods_are_those_of_peft(
    weights: list[float], method: Any, density: float, tmp_path: Path
) -> None:
    model, paths = two_llamas(tmp_path / "in")
    report = merge_adapters(paths, tmp_path / "out", weights=weights, method=method, density=density)
    assert (report.method, report.rank) == (method, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(
            ["default", "other"], weights, "peft", combination_type=f"{method}_svd", density=density
        )
    model.load_adapter(tmp_path / "out", "ours")
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            expected = module.get_delta_weight("peft").double()
            # a truncated SVD in float32 moves by its rounding over the gap of singular values
            close(module.get_delta_weight("ours").double(), expected, norm_of(expected), 1e-4)


def test_without_weights_ties_divides_once(tmp_path: Path) -> None:
    """An adapter and itself agree in every entry: their TIES merge is the adapter."""
    up, down = factors(9, 7, 2, 1.0)
    path = peft_folder(tmp_path / "a", {"a.q": (up, down)}, torch.float64, r=2, lora_alpha=2)
    report = merge_adapters([path, path], tmp_path / "out", method="ties", density=1.0)
    assert report.weights == (1.0, 1.0)
    close(written(tmp_path / "out")["a.q"], product(up, down), 1.0)
    merge_adapters([path, path], tmp_path / "mean", method="magnitude_prune", density=1.0)
    close(written(tmp_path / "mean")["a.q"], product(up, down), 1.0)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_random_by_its_seed_alone(method: Any, tmp_path: Path) -> None:
    _, paths = two_llamas(tmp_path / "in")
    results = []
    for run, seed in enumerate([0, 0, 1]):
        torch.manual_seed(run)
        state = torch.get_rng_state()
        merge_adapters(paths, tmp_path / str(run), method=method, density=0.5, seed=seed, rank=40)
        assert torch.equal(torch.get_rng_state(), state)
        results.append((tmp_path / str(run) / WEIGHTS).read_bytes())
    assert results[0] == results[1] != results[2]


def test_dare_keeps_a_share_of_the_entries_and_rescales_them(tmp_path: Path) -> None:
    up, down = factors(40, 50, 2, 1.0)
    path = peft_folder(tmp_path / "a", {"a.q": (up, down)}, r=2, lora_alpha=2)
    merge_adapters([path], tmp_path / "out", method="dare_linear", density=0.25, rank=40, dtype="float64")
    ratio = written(tmp_path / "out")["a.q"] / product(up, down)
    kept = (ratio - 4).abs() < 1e-2
    assert (kept | (ratio.abs() < 1e-2)).all()
    assert (
        abs(kept.double().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    )  # five standard deviations


def test_peft_methods_know_no_bound_unless_it_is_asked_for(tmp_path: Path) -> None:
    paths = [
        saved(everything("nblora", seed, bound_kind="absolute", norm="spectral"), tmp_path / str(seed))
        for seed in range(2)
    ]
    options: dict[str, Any] = {"method": "dare_linear", "density": 0.2, "norm": "spectral"}
    free = merge_adapters(paths, tmp_path / "free", **options)
    assert max(layer.after for layer in free.layers) > 1.5
    with pytest.raises(AdapterError, match="a plain LoRA has no bounds to certify"):
        certify(tmp_path / "free")
    merge_adapters(paths, tmp_path / "out", bound=1.5, **options)
    assert certify(tmp_path / "out").holds
    assert PeftModel.from_pretrained(Everything(), tmp_path / "out")


# --- what is refused --------------------------------------------------------------------------------


def refused(
    adapters: Any, out: Path, match: str, kind: type[Exception] = AdapterError, **options: Any
) -> str:
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=match) as error:
        merge_adapters(adapters, out, **options)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before
    assert not list(out.parent.glob(".*"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_different_base_models_are_refused_by_name(tmp_path: Path) -> None:
    paths = [peft_folder(tmp_path / str(i), {"a.q": factors(9, 7, 2, 1.0)}, r=2) for i in range(3)]
    change_config(paths[1], base_model_name_or_path="base/one")
    merge_adapters(paths, tmp_path / "fine")  # a name and none: nothing speaks against it
    assert json.loads((tmp_path / "fine" / CONFIG).read_text())["base_model_name_or_path"] == "base/one"
    change_config(paths[2], base_model_name_or_path="base/two")
    message = refused(paths, tmp_path / "out", "adapters to merge must be of one base model")
    for part in ("'base/one'", "'base/two'", str(paths[1]), str(paths[2])):
        assert part in message
    change_config(paths[2], base_model_name_or_path="base/one", revision="v2")
    change_config(paths[1], revision="v1")
    refused(paths, tmp_path / "out", "one revision of the base model, got 'v1' in")


@pytest.mark.parametrize(
    ("other", "shapes"),
    [
        ((9, 8, 2), [r"\(9, 7\)", r"\(9, 8\)"]),
        ((7, 9, 2), [r"\(9, 7\)", r"\(7, 9\)"]),
    ],
)
def test_different_shapes_are_refused_by_name(
    other: tuple[int, int, int], shapes: list[str], tmp_path: Path
) -> None:
    paths = [
        peft_folder(tmp_path / "a", {"a.q": factors(9, 7, 2, 1.0)}, r=2),
        peft_folder(tmp_path / "b", {"a.q": factors(*other, 1.0)}, r=2),
    ]
    pattern = rf"layer 'a.q' must have one shape .* got {shapes[0]} in .*a/{WEIGHTS} and {shapes[1]} in .*b/"
    refused(paths, tmp_path / "out", pattern)


def test_different_kinds_of_layers_are_refused(tmp_path: Path) -> None:
    """The matrices would fit: a convolution, an embedding, experts."""
    up, down = factors(6, 12, 2, 1.0)
    linear = peft_folder(tmp_path / "a", {"x": (up, down)}, r=2)
    conv = peft_folder(tmp_path / "b", {"x": (up[..., None], down.reshape(2, 4, 3))}, r=2)
    refused([linear, conv], tmp_path / "out", r"and \(6, 12\) with the kernel \(3,\) in")
    tensors = load_file(linear / WEIGHTS)
    (tmp_path / "c").mkdir()
    embedding = {k.replace("lora_", "lora_embedding_").removesuffix(".weight"): t for k, t in tensors.items()}
    save_file(embedding, tmp_path / "c" / WEIGHTS)
    (tmp_path / "c" / CONFIG).write_bytes((linear / CONFIG).read_bytes())
    refused([linear, tmp_path / "c"], tmp_path / "out", r"and \(6, 12\) of an embedding in")
    experts = peft_folder(
        tmp_path / "d",
        {"x": (torch.cat([up, up], 1), torch.cat([down, down]))},
        r=2,
        target_parameters=["x.w"],
    )
    refused([linear, experts], tmp_path / "out", r"and \(6, 12\) of 2 experts in")


def test_other_parameters_of_one_module_are_refused(tmp_path: Path) -> None:
    """PEFT's names don't say which of the parameters of a module is meant, only their order."""
    first = saved(everything("lora", 0), tmp_path / "a")
    for i, targets in enumerate([["experts.up"], ["experts.down", "experts.up"]]):
        second = saved(everything("lora", 1, target_parameters=targets), tmp_path / f"b{i}")
        refused([first, second], tmp_path / "out", "must have one list of adapted parameters in all adapters")


def test_what_is_no_low_rank_update_is_refused(tmp_path: Path) -> None:
    plain = saved(everything("lora", 0), tmp_path / "plain")
    kinds: dict[str, Callable[[], PeftModel]] = {
        "modules_to_save": lambda: everything("lora", 1, target_modules=["conv"], modules_to_save=["head"]),
        "bias": lambda: everything("lora", 1, bias="lora_only"),
        "ours": lambda: everything(
            "nblora", 1, target_modules=["conv"], rank_pattern={}, modules_to_save=["head"]
        ),
        "our bias": lambda: everything("nblora", 1, bias="nblora_only"),
        "tokens": lambda: everything(
            "lora", 1, target_modules=["head"], trainable_token_indices={"embed": [1]}
        ),
    }
    for name, build in kinds.items():
        path = saved(build(), tmp_path / name)
        refused([plain, path], tmp_path / "out", rf"must have low-rank updates alone.*/{name}/")
    for field, value in (
        ("lora_bias", True),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 1]]),
    ):
        path = peft_folder(tmp_path / field, {"head": factors(5, 8, 2, 1.0)}, r=2)
        change_config(path, task_type="CAUSAL_LM", **{field: value})
        refused([path], tmp_path / "out", f"must not use {field}, whose update")
    dora = saved(everything("lora", 1, target_parameters=None, use_dora=True), tmp_path / "dora")
    refused([plain, dora], tmp_path / "out", "DoRA")
    (tmp_path / "pickle.bin").write_bytes(b"")
    refused([plain, tmp_path / "pickle.bin"], tmp_path / "out", "pickled weights are never loaded")
    refused([plain, tmp_path / "nowhere"], tmp_path / "out", "must be a folder or a hub repository")
    attention = get_peft_model(
        nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}), NBLoraConfig(r=2, target_modules=["attn"])
    )
    path = saved(attention, tmp_path / "attention")
    refused([path], tmp_path / "out", r"must not adapt nn\.MultiheadAttention")


def test_the_frozen_weight_of_an_adapted_embedding_is_no_obstacle(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    for kind, config in (("lora", LoraConfig(**options)), ("nblora", NBLoraConfig(**options))):
        get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / kind, save_embedding_layers=True)
        assert any("base_layer.weight" in key for key in load_file(tmp_path / kind / WEIGHTS))
    merge_adapters([tmp_path / "lora", tmp_path / "nblora"], tmp_path / "out")
    assert not any("base_layer.weight" in key for key in load_file(tmp_path / "out" / WEIGHTS))


@pytest.mark.parametrize("kind", ["lora", "nblora"])
def test_numbers_that_are_not_finite_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = saved(everything(kind, 0), tmp_path / "a")
    tensors = load_file(path / WEIGHTS)
    key = next(key for key in tensors if "head.lora_B" in key or "head.nblora_out" in key)
    tensors[key].view(-1)[3] = torch.nan
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    for method in ({}, {"method": "ties", "density": 0.5}):
        message = refused([path], tmp_path / "out", "must have finite", **method)
        assert "head" in message
        assert str(path) in message


def test_sums_that_overflow_are_refused(three: tuple[list[Path], Tensor], tmp_path: Path) -> None:
    refused(three[0], tmp_path / "out", "layer 'a.q' must be finite, got norm", weights=[1e308] * 3)
    refused(
        three[0], tmp_path / "out", "must be finite in torch.float16", weights=[1e12] * 3, dtype="float16"
    )


def test_the_folder_of_an_input_is_not_replaced(three: tuple[list[Path], Tensor], tmp_path: Path) -> None:
    paths, _ = three
    (tmp_path / "link").symlink_to(paths[1])
    for out in (paths[1], tmp_path / "link"):
        refused(paths, out, "must be another one than that of the adapter")
    refused([paths[0], paths[1] / WEIGHTS], paths[1], "must be another one than that of the adapter")


def test_layers_that_kohyas_layout_cannot_tell_apart(tmp_path: Path) -> None:
    up, down = factors(6, 8, 2, 1.0)
    both = peft_folder(tmp_path / "a", {"a.b_q": (up, down), "a_b.q": (up, down)}, r=2)
    refused([both], tmp_path / "out", "different names in the layout", layout="kohya", component="unet")
    file = tmp_path / "k.safetensors"
    pair = {"lora_unet_a_b_q.lora_down.weight": down.float(), "lora_unet_a_b_q.lora_up.weight": up.float()}
    save_file(pair, file)
    refused([both, file], tmp_path / "out", "different names with '_' in place of '.'")
    one = peft_folder(tmp_path / "b", {"a.b_q": (up, down)}, r=2)
    two = peft_folder(tmp_path / "c", {"a_b.q": (up, down)}, r=2)
    refused([one, two, file], tmp_path / "out", "different names with '_' in place of '.'")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": [1, 2]}, r"weights must be one finite number for each of 3 adapters, got \[1, 2\]"),
        ({"weights": [1, 2, float("nan")]}, "weights must be one finite number"),
        ({"weights": [1, 2, float("inf")]}, "weights must be one finite number"),
        ({"weights": ["a", 1, 1]}, "weights must be one finite number"),
        ({"weights": "111"}, "weights must be one finite number"),
        ({"weights": 1.0}, "weights must be one finite number"),
        ({"rank": 0}, "rank must be an integer >= 1, got rank=0"),
        ({"rank": True}, "rank must be an integer >= 1, got rank=True"),
        ({"rank": "8"}, "rank must be an integer >= 1, got rank='8'"),
        ({"rank": 0.0}, r"a float in \(0, 1\], a share of the squared Frobenius norm, got rank=0.0"),
        ({"rank": 1.5}, "got rank=1.5"),
        ({"rank": float("nan")}, "got rank=nan"),
        ({"bound": 0}, "bound must be a number, positive and finite, got bound=0"),
        ({"bound": float("nan")}, "bound must be a number, positive and finite, got bound=nan"),
        ({"bound": 1.0, "bound_kind": "relative"}, "a relative bound needs the base model"),
        ({"bound": 1.0, "bound_kind": "rel"}, "bound_kind must be 'absolute' or 'relative'"),
        ({"norm": "operator"}, "norm must be"),
        ({"layout": "a1111"}, "layout must be one of peft, diffusers, kohya"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"method": "linear"}, "method must be one of exact, ties, .* got method='linear'"),
        ({"method": "ties"}, r"density must be in \(0, 1\] for method='ties', got density=None"),
        ({"method": "ties", "density": 0}, "got density=0"),
        ({"method": "dare_ties", "density": float("nan")}, "got density=nan"),
        ({"method": "ties", "density": 1.1}, "got density=1.1"),
        ({"density": 0.5}, "density must be None for the exact sum, got density=0.5"),
        ({"seed": -1}, "seed must be an integer >= 0 and below 2.64, got seed=-1"),
        ({"seed": 2**64}, "seed must be an integer >= 0 and below 2.64, got seed=18446744073709551616"),
        ({"component": "a.b"}, "component must be a name without dots or slashes"),
    ],
    ids=str,
)
def test_options_outside_their_rules_are_refused(
    options: dict[str, Any], match: str, three: tuple[list[Path], Tensor], tmp_path: Path
) -> None:
    refused(three[0], tmp_path / "out", match, ValueError, **options)


@pytest.mark.parametrize("adapters", [[], "adapter", Path("adapter")])
def test_adapters_that_are_no_sequence_of_paths_are_refused(adapters: Any, tmp_path: Path) -> None:
    refused(adapters, tmp_path / "out", "adapters must be a sequence of one or more paths", ValueError)


# --- whole or not there, and little memory -----------------------------------------------------------


def test_what_was_in_the_folder_stays_until_the_new_is_whole(
    three: tuple[list[Path], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = three
    merge_adapters(paths, tmp_path / "out", rank=1)
    (tmp_path / "out" / "README.md").write_text("mine")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(paths, tmp_path / "out", r"cannot be written: .*No space left on device")
    monkeypatch.undo()
    (tmp_path / "file").write_text("mine")
    refused(paths, tmp_path / "file", "must not be a file")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt):
        merge_adapters(paths, tmp_path / "out", advance=stop)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    merge_adapters(paths, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    assert not list(tmp_path.glob(".*"))


def test_the_same_call_writes_the_same_bytes(tmp_path: Path) -> None:
    paths = [
        saved(everything(kind, seed), tmp_path / str(seed)) for seed, kind in enumerate(["nblora", "lora"])
    ]
    for run in ("a", "b"):
        merge_adapters(paths, tmp_path / run, bound=0.5)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with safe_open(tmp_path / "a" / WEIGHTS, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"


MEMORY = """
import sys
from pathlib import Path
import torch
from nblora import merge_adapters

def status(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])

torch.set_num_threads(1)
warm, *folders = map(Path, sys.argv[1:])
for folder in (warm, *folders):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    paths = [folder / "lora", folder / "ours"]
    assert merge_adapters(paths, folder / "out", bound=1e-3, rank=12).rank == 12
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_one_layer(tmp_path: Path) -> None:
    """With twelve times the layers the peak is the same, up to a quarter of what is written more."""
    size, k = 2**15, 8
    for count, length in ((1, 64), (2, size), (24, size)):
        folder = tmp_path / f"{count}-{length}"
        layers = {f"a.{i}": (torch.randn(length, k), torch.randn(k, length)) for i in range(count)}
        peft_folder(folder / "lora", layers, r=k)
        tensors = {}
        for name, (up, down) in layers.items():
            tensors[f"base_model.model.{name}.nblora_in.weight"] = down
            tensors[f"base_model.model.{name}.nblora_out.weight"] = up.mT.contiguous()
            tensors[f"base_model.model.{name}.nblora_scale.weight"] = torch.zeros(k, 1)
            tensors[f"base_model.model.{name}.nblora_radius.weight"] = torch.tensor(1.0)
        (folder / "ours").mkdir()
        save_file(tensors, folder / "ours" / WEIGHTS)
        config = NBLoraConfig(
            r=k, bound=1.0, bound_kind="absolute", target_modules=[str(i) for i in range(count)]
        )
        config.save_pretrained(folder / "ours")
        del tensors, layers
    folders = [tmp_path / name for name in ("1-64", f"2-{size}", f"24-{size}")]
    finished = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, folders)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    _, two, many = map(int, finished.stdout.split())
    layer = 2 * 2 * size * k * 4  # both adapters' factors of one layer in float32
    assert two > layer, "the measurement sees what is there"
    results = 22 * 2 * size * 12 * 4  # factors of rank 12 in float32
    assert many <= two + results / 4


def test_numbers_of_the_report(three: tuple[list[Path], Tensor], tmp_path: Path) -> None:
    paths, mean = three
    seen: list[tuple[int, int]] = []
    report = merge_adapters(
        paths, tmp_path / "out", bound=0.5, rank=4, advance=lambda *pair: seen.append(pair)
    )
    assert isinstance(report, MergeReport)
    assert seen == [(1, 1)]
    (layer,) = report.layers
    assert layer.before == pytest.approx(norm_of(mean))
    assert layer.after == pytest.approx(0.5, rel=1e-6)
    assert report.adapters == tuple(str(path / WEIGHTS) for path in paths)
    content = json.loads(report.to_json())
    assert content["layers"][0]["bound"] == 0.5
    assert content["weights"] == [1 / 3] * 3
    heading, row = report.rows()
    assert row[:4] == ("a.q", "20×30", "3/3", "4")
    assert heading[4] == "frobenius norm"
    assert report.summary in report.to_table()
    assert "3 adapters are merged into 1 layers of rank 4" in report.summary


def test_the_public_name() -> None:
    assert nblora.merge_adapters is merge_adapters
