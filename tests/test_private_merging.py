"""Private merges of saved adapters: the noised mean, the guard, the ledger, and whole files or none."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import nblora
from conftest import TwoLayers, tiny_gpt2, tiny_llama
from job_samples import forked
from lora_samples import CONFIG, WEIGHTS, Everything, change_config, factors, peft_folder
from nblora import NBLoraConfig, certify, export_lora
from nblora.bounds import parse_norm
from nblora.checkpoints import AdapterError, open_lora, read_adapter
from nblora.checkpoints.storage import TensorFile
from nblora.merging import PrivateMergeReport, merge_privately, private, public_layers, writing
from nblora.privacy import (
    BudgetExceeded,
    PrivacyLedger,
    ReleaseLost,
    frobenius_bound,
    gaussian_noise_multiplier,
    private_mean,
)

DELTA = 1e-5
BASE = {"epsilon": 4.0, "delta": DELTA, "adjacency": "add-remove"}


def merge(adapters: Any, out: Path, **changes: Any) -> PrivateMergeReport:
    arguments: dict[str, Any] = {**BASE, "rank": 8, **changes}
    return merge_privately(adapters, out, **arguments)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise, so that what is released can be compared."""
    monkeypatch.setattr(
        "nblora.privacy.release._normal_from_system", lambda count: torch.zeros(count, dtype=torch.float64)
    )


def ours(model: nn.Module, folder: Path, seed: int, **options: Any) -> Path:
    """A saved NB-LoRA adapter with a random update."""
    chosen: dict[str, Any] = {"r": 3, "bound": 0.5, "init_weights": False}
    torch.manual_seed(seed)
    get_peft_model(model, NBLoraConfig(**(chosen | options))).save_pretrained(
        folder, save_embedding_layers=False
    )
    return folder


def two_layers() -> nn.Module:
    torch.manual_seed(7)
    return TwoLayers()


def client(folder: Path, seed: int, **options: Any) -> Path:
    return ours(two_layers(), folder, seed, **{"target_modules": ["first", "second"], **options})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients' adapters and what the server handed out: the same layers, another update."""
    home = tmp_path_factory.mktemp("originals")
    for seed in range(3):
        client(home / f"client-{seed}", seed)
    client(home / "reference", 99)
    return home


@pytest.fixture
def three(originals: Path, tmp_path: Path) -> list[Path]:
    names = [f"client-{seed}" for seed in range(3)]
    return [Path(shutil.copytree(originals / name, tmp_path / name)) for name in names]


@pytest.fixture
def reference(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "reference", tmp_path / "reference"))


def updates(folder: Path) -> dict[str, Tensor]:
    """Every update of an NB-LoRA folder or a plain LoRA of PEFT, dense in float64."""
    if json.loads((folder / CONFIG).read_text())["peft_type"] == "NBLORA":
        return {name: layer.update.dense().double() for name, layer in read_adapter(folder).layers.items()}
    file = open_lora(folder)
    return {layer.name: next(file.updates(layer)).dense() for layer in file.layers}


def mean_of(folders: list[Path], count: int) -> dict[str, Tensor]:
    parts = [updates(folder) for folder in folders]
    return {name: torch.stack([part[name] for part in parts]).sum(0) / count for name in parts[0]}


def norm_of(matrix: Tensor) -> float:
    return torch.linalg.vector_norm(matrix).item()


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        assert norm_of(found[name] - matrix) <= tolerance * max(norm_of(matrix), 1e-3), name


# --- what is released ---


@pytest.mark.parametrize("with_reference", [True, False])
def test_without_noise_it_is_the_mean(
    with_reference: bool, three: list[Path], reference: Path, tmp_path: Path, silent: None
) -> None:
    report = merge(three, tmp_path / "out", rank=9, reference=reference if with_reference else None)
    check_close(updates(tmp_path / "out"), mean_of(three, 3))
    assert report.n_total == 3
    assert [each.status for each in report.clients] == ["accepted"] * 3
    assert [layer.name for layer in report.layers] == ["first", "second"]
    assert report.rank == 9
    for layer in report.layers:
        assert layer.written == pytest.approx(norm_of(mean_of(three, 3)[layer.name]), rel=1e-5)


def test_the_noise_is_that_of_the_report(three: list[Path], tmp_path: Path) -> None:
    """Standard deviations of what is added to the mean, and the split that `private_mean` makes."""

    def model() -> nn.Module:
        torch.manual_seed(7)
        return TwoLayers(80, 60, 90)

    paths = [
        ours(model(), tmp_path / f"{i}", i, target_modules=["first", "second"], bound_kind="absolute")
        for i in range(2)
    ]
    (tmp_path / "base").mkdir()
    weights = model().state_dict()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    report = merge(paths, tmp_path / "out", rank=None, base=tmp_path / "base", project=False)
    merged, mean = load_file(tmp_path / "out" / "model.safetensors"), mean_of(paths, 2)
    for layer in report.layers:
        before = weights[f"{layer.name}.weight"]
        noise = merged[f"{layer.name}.weight"].double() - before.double() - mean[layer.name]
        spread = 6 / math.sqrt(2 * noise.numel())
        assert noise.std().item() == pytest.approx(layer.tau, rel=spread)
        assert noise.mean().abs().item() < 6 * layer.tau / math.sqrt(noise.numel())
        assert layer.written == pytest.approx(norm_of(noise + mean[layer.name]), rel=1e-4)
    whole = math.hypot(*(layer.sensitivity / layer.tau for layer in report.layers))
    assert 1 / whole == pytest.approx(gaussian_noise_multiplier(epsilon=4.0, delta=DELTA))
    assert report.mu == pytest.approx(whole)


def test_truncation_is_the_best_of_its_rank(three: list[Path], tmp_path: Path, silent: None) -> None:
    merge(three, tmp_path / "out", rank=2)
    for name, mean in mean_of(three, 3).items():
        u, sigma, v = torch.linalg.svd(mean, full_matrices=False)
        best = (u[:, :2] * sigma[:2]) @ v[:2]
        assert norm_of(updates(tmp_path / "out")[name] - best) <= 1e-5 * norm_of(best)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("norm", ["frobenius", "spectral", "nuclear"])
def test_the_release_is_projected_onto_the_ball_of_the_mean(norm: str, dtype: str, tmp_path: Path) -> None:
    """However loud the noise, the bound that is noted holds, after rounding."""
    paths = [client(tmp_path / f"{seed}", seed, norm=norm) for seed in range(2)]
    report = merge(paths, tmp_path / "out", dtype=dtype, n_total=4)
    certificate = certify(tmp_path / "out")
    assert certificate.holds
    radii = public_layers(paths[0]).bounds
    for layer in certificate.layers:
        assert layer.bound == pytest.approx(radii[layer.name] * 2 / 4)  # two of four can send something
        assert layer.norm > 0.9 * layer.bound
    assert report.norm_name == norm
    assert report.projected
    merge(paths, tmp_path / "loud", project=False)
    with pytest.raises(AdapterError, match="no bounds to certify"):
        certify(tmp_path / "loud")
    assert norm_of(updates(tmp_path / "loud")["first"]) > 2 * radii["first"]


def test_weights_are_those_of_the_sum(three: list[Path], tmp_path: Path, silent: None) -> None:
    report = merge(three, tmp_path / "out", rank=9, weights=[0.5, 0.25, 0.0])
    parts = [updates(path) for path in three]
    expected = {name: 0.5 * parts[0][name] + 0.25 * parts[1][name] for name in parts[0]}
    check_close(updates(tmp_path / "out"), expected)
    assert report.n_total is None
    for layer in report.layers:
        assert layer.sensitivity == pytest.approx(0.5 * layer.bound)
    assert "weights were taken as public" in report.summary


def test_adjacency_doubles_the_noise(three: list[Path], tmp_path: Path) -> None:
    taus = [
        merge(three, tmp_path / adjacency, adjacency=adjacency).layers[0].tau
        for adjacency in ("add-remove", "replace-one")
    ]
    assert taus[1] == pytest.approx(2 * taus[0])


def test_the_sensitivity_is_that_of_the_references_bounds(tmp_path: Path) -> None:
    """Norm, absolute radius and rank of each layer, from the file."""
    options = {"norm": "spectral", "rank_pattern": {"second": 2}}
    paths = [client(tmp_path / f"{seed}", seed, **options) for seed in range(2)]
    report = merge(paths, tmp_path / "out", reference=paths[0])
    tensors = load_file(paths[0] / WEIGHTS)
    for layer, rank in zip(report.layers, (3, 2), strict=True):
        radius = tensors[f"base_model.model.{layer.name}.nblora_radius.weight"].item()
        assert layer.bound == pytest.approx(frobenius_bound(parse_norm("spectral"), radius, rank))
        assert layer.sensitivity == pytest.approx(layer.bound / 2)


def test_a_bound_of_ones_own_serves_plain_loras(tmp_path: Path, silent: None) -> None:
    """Whose files note none: then it has to be given."""
    paths = [
        peft_folder(tmp_path / f"{seed}", {"a.q": factors(12, 10, 2, 0.5, seed)}, r=2, lora_alpha=2)
        for seed in range(3)
    ]
    with pytest.raises(AdapterError, match=r"a bound must be given where an adapter .* notes none"):
        merge(paths, tmp_path / "out")
    report = merge(paths, tmp_path / "out", bound=0.6, norm="spectral")
    check_close(updates(tmp_path / "out"), mean_of(paths, 3))
    assert report.layers[0].bound == pytest.approx(0.6 * math.sqrt(2))
    assert certify(tmp_path / "out").layers[0].bound == pytest.approx(0.6)
    assert [each.share for each in report.clients] == pytest.approx([0.5 / 0.6] * 3)


def test_exported_and_merged_loras_note_their_bounds(three: list[Path], tmp_path: Path, silent: None) -> None:
    """So rounds can go on: a release is the reference of the next one, and clients may send plain LoRA."""
    exported = [export_lora(path, tmp_path / f"lora-{i}") for i, path in enumerate(three)]
    merge(three, tmp_path / "first", rank=9, reference=three[0])
    merge(exported, tmp_path / "second", rank=9, reference=tmp_path / "first")
    check_close(updates(tmp_path / "second"), mean_of(three, 3), 1e-5)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_layouts_are_mixed_and_chosen(
    layout: Any, three: list[Path], reference: Path, tmp_path: Path, silent: None
) -> None:
    file = export_lora(three[1], tmp_path / "other", layout=layout, component="unet")
    paths = [three[0], next(file.iterdir()), three[2]]
    report = merge(paths, tmp_path / "out", rank=9, reference=reference)
    assert [each.status for each in report.clients] == ["accepted"] * 3
    check_close(updates(tmp_path / "out"), mean_of(three, 3))
    merge(three, tmp_path / "pipeline", rank=9, reference=reference, layout=layout, component="unet")
    written = open_lora(tmp_path / "pipeline")
    mean = mean_of(three, 3)
    assert {layer.component for layer in written.layers} == {"unet"}
    for layer in written.layers:
        found = next(written.updates(layer)).dense()
        assert norm_of(found - mean[layer.name]) <= 1e-6 * norm_of(found)


# --- base weights ---


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A sharded base model with a tokenizer and weights in another form, and three adapters."""
    home = tmp_path_factory.mktemp("llamas")
    tiny_llama(torch.bfloat16).save_pretrained(home / "base", max_shard_size="20KB")
    (home / "base" / "tokenizer.json").write_text("{}")
    (home / "base" / "pytorch_model.bin").write_bytes(b"stale")
    (home / "base" / "pytorch_model.bin.index.json").write_text("{}")
    (home / "base" / ".hidden").write_text("x")
    (home / "base" / "folder").mkdir()
    targets = ["q_proj", "down_proj", "embed_tokens"]
    return home / "base", [ours(tiny_llama(), home / f"{i}", i, target_modules=targets) for i in range(3)]


def test_base_weights_load_in_transformers(
    llamas: tuple[Path, list[Path]], tmp_path: Path, silent: None
) -> None:
    """Adapted weights are the base's plus the mean, rounded once; all others are the same to the bit."""
    base, paths = llamas
    report = merge(paths, tmp_path / "out", rank=None, base=base, reference=paths[0])
    before = AutoModelForCausalLM.from_pretrained(base, dtype="auto").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    mean = mean_of(paths, 3)
    assert before.keys() == after.keys()
    changed = set()
    for name, weight in before.items():
        assert after[name].dtype == torch.bfloat16
        module = name.removesuffix(".weight")
        if module not in mean:
            assert torch.equal(after[name], weight), name
            continue
        changed.add(module)
        delta = mean[module].mT if "embed" in module else mean[module]
        exact = weight.double() + delta
        assert (after[name].double() - exact).abs().max() <= 2**-8 * exact.abs().max()
        assert (after[name].double() - exact).abs().mean() < 0.3 * delta.abs().mean()
    assert changed == mean.keys()
    assert len(changed) == 5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    kept = {path.name for path in base.iterdir()}
    assert names == kept - {"pytorch_model.bin", "pytorch_model.bin.index.json", ".hidden", "folder"}
    assert (report.rank, report.base) == (None, str(base))
    assert {layer.name for layer in report.layers} == changed


def test_the_base_that_adapters_name_is_taken(
    llamas: tuple[Path, list[Path]], tmp_path: Path, silent: None
) -> None:
    base, _ = llamas
    named = ours(tiny_llama(), tmp_path / "named", 0, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"rank must be given for an adapter, or .* a folder as base"):
        merge([named], tmp_path / "out", rank=None)
    change_config(named, base_model_name_or_path=str(base))
    report = merge([named], tmp_path / "out", rank=None)
    assert report.base == str(base)
    assert (tmp_path / "out" / "config.json").is_file()


def test_square_transposed_weights(tmp_path: Path, silent: None) -> None:
    """GPT-2's Conv1D store (in, out), also where both are the same; the configuration says so."""
    tiny_gpt2().save_pretrained(tmp_path / "base")
    paths = [ours(tiny_gpt2(), tmp_path / f"{i}", i, target_modules=["c_proj", "c_attn"]) for i in range(2)]
    merge(paths, tmp_path / "out", rank=None, base=tmp_path / "base")
    before = tiny_gpt2().state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    mean = mean_of(paths, 2)
    assert any(matrix.shape[0] == matrix.shape[1] for matrix in mean.values())
    for name, matrix in mean.items():
        difference = (after[f"{name}.weight"] - before[f"{name}.weight"]).double()
        assert norm_of(difference - matrix.mT) <= 1e-4 * norm_of(matrix), name


@pytest.mark.parametrize("kind", ["nblora", "lora"])
def test_every_kind_of_layer_is_added_as_peft_does(kind: str, tmp_path: Path, silent: None) -> None:
    """Embeddings, convolutions, experts, linear layers: what merge_and_unload makes of the same adapter."""
    # which of two parameters of one module is which, files alone do not tell
    chosen = {"target_modules": ["embed", "conv", "head"], "target_parameters": ["experts.up"]}
    if kind == "nblora":
        model = get_peft_model(
            Everything(), NBLoraConfig(r=2, bound=1.5, bound_kind="absolute", init_weights=False, **chosen)
        )
    else:
        model = get_peft_model(Everything(), LoraConfig(r=2, init_lora_weights=False, **chosen))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "base").mkdir()
    save_file(Everything().state_dict(), tmp_path / "base" / "weights.safetensors")
    bound = {} if kind == "nblora" else {"bound": 100.0}
    report = merge(
        [tmp_path / "adapter"],
        tmp_path / "out",
        rank=None,
        base=tmp_path / "base",
        epsilon=8.0,
        **bound,
    )
    expected = model.merge_and_unload().state_dict()
    found = load_file(tmp_path / "out" / "weights.safetensors")
    before = Everything().state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-5), name
        assert torch.equal(found[name], before[name]) == name.endswith(("bias", "down"))
    assert len(report.layers) == 3 + 3


def test_base_weights_that_cannot_be_changed_are_refused_before_anything_is_spent(
    llamas: tuple[Path, list[Path]], three: list[Path], tmp_path: Path
) -> None:
    base, paths = llamas
    ledger = PrivacyLedger.create(tmp_path / "ledger.json", **BASE)  # type: ignore[arg-type]
    common: dict[str, Any] = {"rank": None, "ledger": ledger}
    (tmp_path / "square").mkdir()
    save_file({"m.up": torch.zeros(2, 4, 4)}, tmp_path / "square" / "a.safetensors")
    (tmp_path / "integers").mkdir()
    save_file(
        {name: torch.zeros_like(weight).to(torch.int8) for name, weight in TwoLayers().state_dict().items()},
        tmp_path / "integers" / "a.safetensors",
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.safetensors").write_bytes(b"x")
    cases: list[tuple[list[Path], Path, Path, str]] = [
        (three, base, tmp_path / "out", "is it the base model of this adapter"),
        (three, tmp_path / "integers", tmp_path / "out", "must have floating-point weights"),
        (paths, base / "config.json", tmp_path / "out", "intact safetensors file|a folder of a model"),
        (paths, base, tmp_path / "full", "must be new or empty"),
        (paths, base, base, "must be another one"),
    ]
    for adapters, source, out, rule in cases:
        with pytest.raises(AdapterError, match=rule):
            merge(adapters, out, base=source, **common)
    assert not ledger.releases
    assert not (tmp_path / "out").exists()


# --- the guard ---


def _pickled(path: Path) -> None:
    """Weights whose unpickling would be seen."""

    class Seen:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (path.parent / "executed",)

    (path / WEIGHTS).unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Seen()))


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})

    return apply


def _header(path: Path, entries: dict[str, tuple[str, list[int]]]) -> None:
    """A safetensors file that claims tensors; the system keeps its zeros nowhere."""
    sizes = {"F32": 4}
    header, stop = {}, 0
    for key, (dtype, shape) in entries.items():
        start, stop = stop, stop + math.prod(shape) * sizes[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stop)


def _million(path: Path) -> None:
    rank = 10**6
    entries = {}
    for name, (m, n) in {"first": (20, 12), "second": (5, 20)}.items():
        entries[f"base_model.model.{name}.lora_A.weight"] = ("F32", [rank, n])
        entries[f"base_model.model.{name}.lora_B.weight"] = ("F32", [m, rank])
    _header(path / WEIGHTS, entries)
    (path / CONFIG).unlink()
    LoraConfig(r=rank, lora_alpha=rank, target_modules=["first", "second"]).save_pretrained(path)


def _huge(path: Path) -> None:
    (path / CONFIG).unlink()
    _header(path / WEIGHTS, {"a.lora_down.weight": ("F32", [2**20, 2**10]), "a.alpha": ("F32", [2**30])})
    (path / WEIGHTS).rename(path / "lora.safetensors")


def _pipe(path: Path) -> None:
    """Reading it would never end."""
    for file in path.iterdir():
        file.unlink()
    os.mkfifo(path / "x.safetensors")


def _plain(path: Path, **options: Any) -> None:
    """A LoRA of the same layers in place of the adapter."""
    layers = {"first": factors(20, 12, 2, 1e-3), "second": factors(5, 20, 2, 1e-3)}
    peft_folder(path, layers, r=2, lora_alpha=2, **options)


KEY = "base_model.model.second.nblora_out.weight"
RADIUS = "base_model.model.second.nblora_radius.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda path: path.rename(path.with_name("elsewhere")), "absent", ""),
    "empty": (lambda path: [file.unlink() for file in path.iterdir()], "refused", "must have"),
    "a pickle": (_pickled, "refused", "must have adapter_model.safetensors"),
    "NaN": (_tensors(lambda t: t[KEY].view(-1)[:1].fill_(math.nan)), "refused", "finite"),
    "infinite": (_tensors(lambda t: t[RADIUS].fill_(math.inf)), "refused", "finite"),
    "another shape": (_tensors(lambda t: t.update({KEY: torch.ones(3, 6)})), "refused", "shape"),
    "shapes that do not fit": (_tensors(lambda t: t.update({KEY: torch.ones(2, 5)})), "refused", "shapes|k"),
    "a tensor too many": (
        _tensors(lambda t: t.update({"base_model.model.second.bias": torch.ones(5)})),
        "refused",
        "must have low-rank updates alone",
    ),
    "a layer too many": (
        _tensors(lambda t: t.update({k.replace("second", "third"): v + 0 for k, v in t.items()})),
        "refused",
        "layers must be among those of the reference, got 'third'",
    ),
    "another base": (
        lambda path: change_config(path, base_model_name_or_path="other"),
        "refused",
        "must be of one base model",
    ),
    "a larger rank": (
        lambda path: client(path, 5, r=4),
        "refused",
        "ranks must be at most 3, as in the reference, got 4",
    ),
    "a rank of a million": (_million, "refused", "ranks must be at most 3"),
    "huge tensors": (_huge, "refused", "got a|one finite number|both factors"),
    "a huge header": (
        lambda path: (path / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + b"{}"),
        "refused",
        "the header of .* must be of at most",
    ),
    "a huge configuration": (
        lambda path: (path / CONFIG).write_text(" " * 2**22),
        "refused",
        "the configuration of .* must be of at most",
    ),
    "a nested configuration": (
        lambda path: (path / CONFIG).write_text("[" * 10**5 + "]" * 10**5),
        "refused",
        "nested too deeply",
    ),
    "no JSON": (lambda path: (path / CONFIG).write_text("{"), "refused", "adapter configuration"),
    "more expressions than layers": (
        lambda path: change_config(path, bound_pattern={f"layer{i}": 1.0 for i in range(100)}),
        "refused",
        "must have no more bound_pattern than layers, got 100",
    ),
    "an expression that takes for ever": (
        lambda path: change_config(path, bound_pattern={"(([a-z])+.)+[A-Z]([a-z])+": 1.0}),
        "refused",
        "must have names of layers",
    ),
    "a file cut short": (
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-9]),
        "refused",
        "intact safetensors",
    ),
    "DoRA": (lambda path: _plain(path, use_dora=True), "refused", "DoRA"),
    "too large": (
        _tensors(lambda t: t[RADIUS].mul_(10)),
        "rejected",
        "norms must be at most the bounds",
    ),
    "a pipe": (
        lambda path: (path.rename(path.with_name("elsewhere")), os.mkfifo(path)),
        "refused",
        "must be a file or a folder",
    ),
    "a pipe as weights": (_pipe, "refused", "must have adapter_config.json"),
    "more parameters than layers": (
        lambda path: change_config(path, target_parameters=[f"layer{i}" for i in range(100)]),
        "refused",
        "must have no more target_parameters than layers, got 100",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_clients_file_makes_a_release_fail(
    damage: str,
    three: list[Path],
    reference: Path,
    tmp_path: Path,
    silent: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It counts as zero and is reported; nothing large is read, nothing is unpickled or fetched."""
    read = TensorFile.read

    def noted(self: TensorFile, key: str) -> Tensor:
        entry = self.entries[key]
        assert entry.stop - entry.start < 2**16, "only what may belong to a layer is read"
        return read(self, key)

    def fetched(*arguments: object, **others: object) -> None:
        raise AssertionError(f"asked the hub for {arguments}")

    monkeypatch.setattr(TensorFile, "read", noted)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    before = {path.name for path in tmp_path.iterdir()}
    for path in (reference, *three):
        change_config(path, base_model_name_or_path="base")
    change, status, reason = DAMAGES[damage]
    change(three[1])
    report = merge(three, tmp_path / "out", rank=9, reference=reference, ledger=tmp_path / "l.json")
    assert report.clients[1].status == status
    assert re.search(reason, report.clients[1].reason), report.clients[1].reason
    assert [report.clients[i].status for i in (0, 2)] == ["accepted"] * 2
    check_close(updates(tmp_path / "out"), mean_of([three[0], three[2]], 3))
    assert report.spent is not None
    assert report.spent.releases == 1
    made = {path.name for path in tmp_path.iterdir()} - before
    assert made <= {"out", "l.json", "l.json.lock", "elsewhere"}


def test_a_damage_is_seen_by_loading_it(three: list[Path]) -> None:
    """The test of the test above: that pickle would have left a trace."""
    _pickled(three[0])
    pickle.loads((three[0] / "adapter_model.bin").read_bytes())
    assert (three[0].parent / "executed").exists()


def test_names_on_the_hub_are_paths_here(
    three: list[Path], reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is missing must not be looked for elsewhere: someone else would be it."""
    asked: list[object] = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append(a))
    monkeypatch.chdir(tmp_path)
    report = merge(["clients/seven", *three], tmp_path / "out", reference=reference)
    assert report.clients[0].status == "absent"
    with pytest.raises(AdapterError, match="every adapter must be there"):
        merge(["clients/seven", *three], tmp_path / "out")
    assert not asked


def enlarged(path: Path, factor: float) -> Path:
    _tensors(lambda t: [t[k].mul_(factor) for k in t if k.endswith("nblora_radius.weight")])(path)
    return path


def test_a_client_over_its_bound_is_projected_where_that_is_asked_for(
    three: list[Path], reference: Path, tmp_path: Path, silent: None
) -> None:
    """Onto its ball: the direction stays, whatever the file claims."""
    small = updates(three[1])
    enlarged(three[1], 10)
    report = merge(three, tmp_path / "out", rank=9, reference=reference, on_excess="project")
    assert report.clients[1].status == "projected"
    bounds = public_layers(reference).bounds
    parts = [updates(path) for path in (three[0], three[2])]
    for name, matrix in updates(tmp_path / "out").items():
        share = norm_of(10 * small[name]) / bounds[name]
        assert share > 1
        expected = (parts[0][name] + parts[1][name] + 10 * small[name] / share) / 3
        assert norm_of(matrix - expected) <= 1e-5 * norm_of(expected)
    assert report.clients[1].share == pytest.approx(
        max(norm_of(10 * small[name]) / bounds[name] for name in bounds), rel=1e-5
    )
    assert "norms must be at most the bounds" in report.clients[1].reason


@pytest.mark.parametrize("on_excess", ["reject", "project"])
def test_bounds_are_measured_in_the_norm_that_is_public(on_excess: Any, tmp_path: Path, silent: None) -> None:
    """A single large singular value is inside the Frobenius ball that the noise is for, and yet over."""
    reference = client(tmp_path / "reference", 99, norm="spectral", bound=0.5, bound_kind="absolute")
    honest = client(tmp_path / "honest", 1, norm="spectral", bound=0.5, bound_kind="absolute")
    u, v = torch.randn(20, 1, dtype=torch.float64), torch.randn(1, 12, dtype=torch.float64)
    update = u @ v * (0.8 / (u.norm() * v.norm()))  # 0.5 < 0.8 < 0.5 sqrt(3)
    layers = {"first": (u * (0.8 / (u.norm() * v.norm())), v), "second": factors(5, 20, 1, 0.1)}
    liar = peft_folder(tmp_path / "liar", layers, torch.float64, r=1, lora_alpha=1)
    report = merge([honest, liar], tmp_path / "out", rank=9, reference=reference, on_excess=on_excess)
    assert report.clients[1].share == pytest.approx(1.6)
    assert report.clients[1].reason == "spectral norms must be at most the bounds, got 0.8 > 0.5 in first"
    part = updates(honest)["first"]
    if on_excess == "reject":
        assert report.clients[1].status == "rejected"
        expected = part / 2
    else:
        assert report.clients[1].status == "projected"
        expected = (part + update * (0.5 / 0.8)) / 2
    assert norm_of(updates(tmp_path / "out")["first"] - expected) <= 1e-5 * norm_of(expected)


def test_missing_layers_count_as_zero_and_are_reported(
    three: list[Path], reference: Path, tmp_path: Path, silent: None
) -> None:
    client(three[1], 1, target_modules=["second"])
    report = merge(three, tmp_path / "out", rank=9, reference=reference)
    assert report.clients[1].status == "accepted"
    assert report.clients[1].missing == ("first",)
    parts = [updates(path) for path in three]
    expected = (parts[0]["first"] + parts[2]["first"]) / 3
    assert norm_of(updates(tmp_path / "out")["first"] - expected) <= 1e-6


def test_expressions_that_the_reference_has_are_no_offence(tmp_path: Path) -> None:
    options = {"rank_pattern": {".*second": 2}}
    paths = [client(tmp_path / f"{seed}", seed, **options) for seed in range(3)]
    report = merge(paths[1:], tmp_path / "out", reference=paths[0])
    assert [each.status for each in report.clients] == ["accepted"] * 2


def test_a_file_that_goes_away_between_both_readings_counts_as_zero(
    three: list[Path], reference: Path, tmp_path: Path, silent: None
) -> None:
    def vanish(done: int, total: int) -> None:
        if done == 3:  # all have been inspected
            (three[1] / WEIGHTS).write_bytes(b"")

    report = merge(three, tmp_path / "out", rank=9, reference=reference, advance=vanish)
    assert report.clients[1].missing == ("first", "second")
    check_close(updates(tmp_path / "out"), mean_of([three[0], three[2]], 3))


def test_an_update_that_grows_between_both_readings_is_scaled_back(
    three: list[Path], reference: Path, tmp_path: Path, silent: None
) -> None:
    """Measured and added are two readings; whatever the second one gives, it stays in the ball."""

    def grow(done: int, total: int) -> None:
        if done == 3:
            enlarged(three[1], 1000)

    others = mean_of([three[0], three[2]], 3)
    merge(three, tmp_path / "out", rank=9, reference=reference, advance=grow)
    bounds = public_layers(reference).frobenius
    for name, matrix in updates(tmp_path / "out").items():
        assert norm_of(matrix - others[name]) <= bounds[name] / 3 * (1 + 1e-5)


def test_warnings_about_a_clients_configuration_stop_nothing(
    three: list[Path], reference: Path, tmp_path: Path
) -> None:
    change_config(three[1], a_field_of_the_future=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = merge(three, tmp_path / "out", reference=reference)
    assert [each.status for each in report.clients] == ["accepted"] * 3


# --- without a reference configurations are public, and must agree ---


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"target_modules": ["first"]}, "must adapt the same layers, got 'second' in 2 of 3"),
        ({"r": 2}, "must have the same ranks, got 2 and 3 in layer 'first'"),
        ({"bound": 0.4}, "must note the same bounds, got frobenius"),
        ({"norm": "spectral"}, "must note the same bounds, got frobenius .* and spectral"),
    ],
)
def test_configurations_that_disagree_are_refused(
    options: dict[str, Any], rule: str, three: list[Path], tmp_path: Path
) -> None:
    client(three[1], 1, **options)
    with pytest.raises(AdapterError, match=f"{rule}.*as reference"):
        merge(three, tmp_path / "out", ledger=tmp_path / "ledger.json")
    assert not (tmp_path / "ledger.json").exists()
    assert not (tmp_path / "out").exists()


def test_radii_may_differ_by_what_machines_leave(three: list[Path], tmp_path: Path) -> None:
    """The largest counts."""
    enlarged(three[1], 1.01)
    largest = public_layers(three[1]).frobenius
    report = merge(three, tmp_path / "out")
    assert [layer.bound for layer in report.layers] == pytest.approx(list(largest.values()))


def test_numbers_of_clients_are_private_without_a_reference_too(
    three: list[Path], tmp_path: Path, silent: None
) -> None:
    DAMAGES["NaN"][0](three[1])
    report = merge(three, tmp_path / "out", rank=9)
    assert report.clients[1].status == "refused"
    check_close(updates(tmp_path / "out"), mean_of([three[0], three[2]], 3))


# --- public arguments ---


@pytest.mark.parametrize(
    ("changes", "error", "rule"),
    [
        ({"weights": "by sample count"}, TypeError, "weights must be a list of plain numbers"),
        ({"weights": torch.tensor([0.5, 0.25, 0.25])}, TypeError, "weights must be a list of plain numbers"),
        ({"weights": lambda adapter: 1.0}, TypeError, "weights must be a list of plain numbers"),
        ({"weights": [torch.tensor(0.5), 0.2, 0.3]}, TypeError, "weight must be a real number"),
        ({"weights": ["0.5", 0.2, 0.3]}, TypeError, "weight must be a real number"),
        ({"weights": [-0.5, 0.2, 0.3]}, ValueError, "weight must be 0 or between"),
        ({"weights": [math.nan, 0.2, 0.3]}, ValueError, "weight must be 0 or between"),
        ({"weights": [0.5, 0.5]}, ValueError, "one weight for each invited client"),
        ({"weights": [0.5, 0.2, 0.3], "n_total": 3}, ValueError, "exactly one of n_total"),
        ({"n_total": 0}, ValueError, "n_total must be an integer >= 1"),
        ({"sampling_probability": 0.5}, ValueError, "n_total must be given where clients are sampled"),
        ({"epsilon": math.nan}, ValueError, "epsilon must be positive and finite"),
        ({"delta": math.nan}, ValueError, "delta must be between 0 and 1"),
        ({"adjacency": "both"}, ValueError, "adjacency must be"),
        ({"on_excess": "ignore"}, ValueError, "on_excess must be"),
        ({"rank": 0.9}, ValueError, "rank must be an integer >= 1"),
        ({"rank": None, "layout": "kohya"}, ValueError, "rank must be given for an adapter"),
        ({"rank": None, "dtype": "float16"}, ValueError, "rank must be given for an adapter"),
        ({"bound": math.nan}, ValueError, "bound must be"),
        ({"bound": -1.0}, ValueError, "bound must be"),
        ({"norm": "frob", "bound": 1.0}, ValueError, "norm must be"),
        ({"norm": "spectral"}, ValueError, "norm is that of bound: without one"),
        ({"layout": "zip"}, ValueError, "layout must be"),
        ({"layout": "kohya"}, ValueError, "component must name"),
        ({"dtype": "int8"}, ValueError, "dtype must be"),
        ({"rng": -1}, ValueError, "rng must be a seed >= 0, got rng=-1"),
    ],
)
def test_public_mistakes_are_refused_and_nothing_is_written(
    changes: dict[str, Any], error: type[Exception], rule: str, three: list[Path], tmp_path: Path
) -> None:
    ledger = PrivacyLedger.create(tmp_path / "ledger.json", **BASE)  # type: ignore[arg-type]
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(error, match=rule):
        merge(three, tmp_path / "out", ledger=ledger, **changes)
    assert not ledger.releases
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("adapters", ["client-0", [], ()])
def test_adapters_that_are_no_list_of_paths_are_refused(adapters: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapters must be a sequence of one or more paths"):
        merge(adapters, tmp_path / "out")


def test_a_client_is_listed_once(three: list[Path], tmp_path: Path) -> None:
    """Twice would be twice its sensitivity."""
    (tmp_path / "link").symlink_to(three[0])
    for twice in (three[0], tmp_path / "link", three[0] / WEIGHTS, three[0].parent / "." / three[0].name):
        with pytest.raises(ValueError, match="each client must be listed once"):
            merge([*three, twice], tmp_path / "out")


@pytest.mark.parametrize("what", ["the folder", "the weights", "the configuration"])
def test_a_client_cannot_send_the_adapter_of_another(
    what: str, three: list[Path], reference: Path, tmp_path: Path, silent: None
) -> None:
    """By a link, which would count another client twice. Nor does it stop the merge."""
    expected = mean_of([three[0], three[2]], 3)
    name = {"the folder": "", "the weights": WEIGHTS, "the configuration": CONFIG}[what]
    (three[1] / name).rename(tmp_path / "away")
    (three[1] / name).symlink_to(three[0] / name)
    report = merge(three, tmp_path / "out", rank=9, reference=reference)
    assert report.clients[1].status == "refused"
    assert "an adapter must not be a symbolic link" in report.clients[1].reason
    check_close(updates(tmp_path / "out"), expected)


def test_a_client_listed_twice_by_name_is_refused_with_a_reference_too(
    three: list[Path], reference: Path, tmp_path: Path
) -> None:
    for twice in (three[0], three[0] / WEIGHTS, three[0].parent / "." / three[0].name):
        with pytest.raises(ValueError, match="each client must be listed once"):
            merge([*three, twice], tmp_path / "out", reference=reference)


def kohya(folder: Path, name: str) -> Path:
    """The file of an adapter in kohya's layout."""
    export_lora(folder, folder.with_name(name), layout="kohya", component="unet")
    return folder.with_name(name) / "lora.safetensors"


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_folder_and_the_file_in_it_are_one_client(
    with_reference: bool, three: list[Path], tmp_path: Path
) -> None:
    file, other = kohya(three[0], "first"), kohya(three[1], "second")
    options: dict[str, Any] = {"reference": other if with_reference else None, "component": "unet"}
    for twice in ([file, file.parent], [file.parent, file]):
        with pytest.raises(ValueError, match="each client must be listed once"):
            merge([*twice, other], tmp_path / "out", layout="kohya", **options)


def test_what_is_read_is_not_replaced(three: list[Path], reference: Path, tmp_path: Path) -> None:
    for out in (three[0], reference):
        with pytest.raises(AdapterError, match="must be another one than those that are read"):
            merge(three, out, reference=reference)
    assert certify(three[0]).holds
    files = [kohya(path, f"kohya-{i}") for i, path in enumerate(three)]
    before = [file.read_bytes() for file in files]
    for adapters, handed_out, out in ((files, None, files[0]), (files[1:], files[0], files[0])):
        with pytest.raises(AdapterError, match="must be another one than those that are read"):
            merge(adapters, out.parent, reference=handed_out, layout="kohya", component="unet")
    assert [file.read_bytes() for file in files] == before


def test_the_list_and_not_what_lies_there_is_public(
    three: list[Path], reference: Path, tmp_path: Path
) -> None:
    """The denominator is the number of the invited, whoever came; and the ledger is the same to the byte."""
    details = []
    for name in ("all", "few"):
        report = merge(three, tmp_path / name, reference=reference, ledger=tmp_path / f"{name}.json")
        assert report.n_total == 3
        content = json.loads((tmp_path / f"{name}.json").read_text())
        for volatile in ("identifier", "time"):
            del content["releases"][0][volatile]
        details.append(content)
        (three[1] / WEIGHTS).unlink(missing_ok=True)
    assert details[0] == details[1]


def test_sampled_clients_are_counted_as_sampled(three: list[Path], reference: Path, tmp_path: Path) -> None:
    report = merge(
        three,
        tmp_path / "out",
        reference=reference,
        n_total=3,
        sampling_probability=0.01,
        ledger=tmp_path / "ledger.json",
    )
    assert report.spent is not None
    assert report.spent.epsilon < 1 < report.epsilon
    assert report.adapters is None  # how many were drawn is secret
    assert certify(tmp_path / "out").layers[0].bound == pytest.approx(
        public_layers(reference).bounds["first"]
    )


# --- what may be published ---


def test_what_depends_on_clients_is_kept_apart(three: list[Path], reference: Path, tmp_path: Path) -> None:
    DAMAGES["NaN"][0](three[1])
    report = merge(three, tmp_path / "out", reference=reference, ledger=tmp_path / "ledger.json")
    public = f"{report!r} {report.summary} {report.to_table()} {report.to_json()}"
    assert "refused" not in public
    assert "client-1" not in public
    private_too = json.loads(report.to_json(private=True))
    assert private_too["private_do_not_publish"]["clients"][1]["status"] == "refused"
    assert report.client_rows()[2][:2] == (str(three[1]), "refused")
    assert report.client_summary == "2 accepted, 1 refused"
    assert report.rows()[1][0] == "first"
    for text in ("under add-remove", "epsilon 4 of 4", "in 1 releases"):
        assert text in report.summary


def test_seeded_noise_warns_and_is_marked(three: list[Path], tmp_path: Path) -> None:
    taken = []
    for name in ("a", "b"):
        with pytest.warns(UserWarning, match="nothing is private"):
            report = merge(three, tmp_path / name, rng=3, ledger=tmp_path / f"{name}.json")
        assert "SEEDED NOISE" in report.summary
        assert not report.secure
        assert report.spent is not None
        assert not report.spent.secure
        taken.append((tmp_path / name / WEIGHTS).read_bytes())
    assert taken[0] == taken[1]
    merge(three, tmp_path / "c")
    assert (tmp_path / "c" / WEIGHTS).read_bytes() != taken[0]


# --- the ledger ---


def test_a_ledger_is_started_and_charged(three: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    first = merge(three, tmp_path / "one", ledger=path, budget=6.0)
    assert first.started
    assert (first.budget, first.spent and first.spent.releases) == (6.0, 1)
    second = merge(three, tmp_path / "two", ledger=path, epsilon=2.0)
    assert not second.started
    assert [release.confirmed for release in PrivacyLedger(path).releases] == [True, True]
    with pytest.raises(ValueError, match="budget must be left out or that of the ledger, 6"):
        merge(three, tmp_path / "three", ledger=path, budget=7.0)
    with pytest.raises(ValueError, match="adjacency must be the ledger's"):
        merge(three, tmp_path / "three", ledger=path, epsilon=0.1, adjacency="replace-one")
    assert not (tmp_path / "three").exists()
    assert PrivacyLedger(path).spent().releases == 2


def test_no_ledger_is_started_in_vain(three: list[Path], tmp_path: Path) -> None:
    """One with the wrong neighbours would stand in the way of the next attempt."""
    wrong: dict[str, Any] = {"adjacency": "replace-one", "sampling_probability": 0.5, "n_total": 3}
    for changes in (wrong, {"on_excess": "ignore"}, {"rng": "x"}):
        with pytest.raises((ValueError, TypeError)):
            merge(three, tmp_path / "out", ledger=tmp_path / "ledger.json", **changes)
    with pytest.raises(ValueError, match="budget is of a ledger that is started"):
        merge(three, tmp_path / "out", budget=4.0)
    with pytest.raises(BudgetExceeded, match=r"budget must be at least that of this release, 3.99.*got 1.0"):
        merge(three, tmp_path / "out", ledger=tmp_path / "ledger.json", budget=1.0)
    assert not (tmp_path / "ledger.json").exists()
    assert "No ledger counts it." in merge(three, tmp_path / "out").summary


def test_sampling_may_bring_a_release_into_its_budget(
    three: list[Path], reference: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"reference": reference, "n_total": 3, "sampling_probability": 0.1}
    report = merge(three, tmp_path / "out", ledger=tmp_path / "ledger.json", budget=3.0, **options)
    assert report.spent is not None
    assert report.spent.epsilon <= 3.0 < report.epsilon


def test_a_ledger_that_cannot_be_used_is_named(three: list[Path], tmp_path: Path) -> None:
    """And not the folder to write, of which nothing is wrong."""
    for ledger in (tmp_path / "nowhere" / "ledger.json", tmp_path):
        with pytest.raises(AdapterError, match=rf"the ledger {ledger} cannot be used: "):
            merge(three, tmp_path / "out", ledger=ledger)


def test_numbers_of_numpy_are_written_down(three: list[Path], tmp_path: Path) -> None:
    report = merge(
        three, tmp_path / "out", ledger=tmp_path / "l.json", n_total=np.int64(3), epsilon=np.float32(4)
    )
    assert json.loads(report.to_json())["n_total"] == 3
    (entry,) = PrivacyLedger(tmp_path / "l.json").releases
    assert (entry.details["n_total"], entry.details["epsilon"]) == (3, 4.0)


def test_a_budget_that_does_not_suffice_leaves_no_output(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    merge(three, tmp_path / "one", ledger=tmp_path / "ledger.json")
    monkeypatch.setattr("nblora.privacy.release._normal_from_system", drawn.append)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(BudgetExceeded, match="the total epsilon must stay within 4"):
        merge(three, tmp_path / "two", ledger=tmp_path / "ledger.json")
    assert not drawn
    assert {path.name for path in tmp_path.iterdir()} == before
    assert PrivacyLedger(tmp_path / "ledger.json").spent().releases == 1


@pytest.mark.parametrize("where", ["add", "finish", "move"])
def test_writing_that_fails_after_spending_says_that_it_is_spent(
    where: str, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk full")

    if where == "move":
        monkeypatch.setattr("nblora.checkpoints.storage.os.rename", fails)
    else:
        monkeypatch.setattr(writing.LoraWriter, where, fails)
    with pytest.raises(ReleaseLost, match=r"its budget stays spent: .*disk full"):
        merge(three, tmp_path / "out", ledger=tmp_path / "ledger.json")
    assert PrivacyLedger(tmp_path / "ledger.json").spent().releases == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out-*"))


def test_without_a_ledger_the_error_is_that_of_writing(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(writing.LoraWriter, "finish", fails)
    with pytest.raises(AdapterError, match="cannot be written: disk full"):
        merge(three, tmp_path / "out")


KILLS: dict[str, tuple[str, str]] = {
    "before the ledger is charged": ("nblora.privacy.ledger.PrivacyLedger", "spend"),
    "before the first layer is written": ("nblora.merging.private._Receiver", "receive"),
    "before the file is put together": ("nblora.merging.writing.LoraWriter", "finish"),
    "before it takes its place": ("os", "rename"),
}


@pytest.mark.parametrize("when", KILLS)
def test_killed_anywhere_no_half_output_and_never_less_spent(
    when: str, three: list[Path], reference: Path, tmp_path: Path
) -> None:
    place, name = KILLS[when]

    def work() -> None:
        from importlib import import_module

        module, _, member = place.rpartition(".")
        owner: Any = getattr(import_module(module), member) if module else import_module(place)

        def killed(*arguments: object, **others: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, killed)
        merge(three, tmp_path / "out", reference=reference, ledger=tmp_path / "ledger.json")

    assert forked(work, tmp_path / "log") == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (tmp_path / "out").exists()
    spent = PrivacyLedger(tmp_path / "ledger.json").spent().releases
    assert spent == (0 if when == "before the ledger is charged" else 1)
    if spent:
        with pytest.raises(BudgetExceeded):
            merge(three, tmp_path / "out", reference=reference, ledger=tmp_path / "ledger.json")
        assert not (tmp_path / "out").exists()
    else:
        merge(three, tmp_path / "out", reference=reference, ledger=tmp_path / "ledger.json")
        assert certify(tmp_path / "out").holds


# --- layer by layer ---


def test_one_layer_is_in_memory_and_all_are_charged_once(
    three: list[Path], reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer is written before the next is noised, after one charge for all."""
    order: list[str] = []
    for owner, name in ((PrivacyLedger, "spend"), (writing.LoraWriter, "add")):
        original = getattr(owner, name)

        def noted(*arguments: Any, original: Any = original, name: str = name, **others: Any) -> Any:
            order.append(name)
            return original(*arguments, **others)

        monkeypatch.setattr(owner, name, noted)
    draw = nblora.privacy.release._normal_from_system
    monkeypatch.setattr(
        "nblora.privacy.release._normal_from_system", lambda count: order.append("noise") or draw(count)
    )
    merge(three, tmp_path / "out", reference=reference, ledger=tmp_path / "ledger.json")
    assert order == ["spend", "noise", "add", "noise", "add"]


def test_layers_are_handed_over_one_by_one() -> None:
    """`private_mean` itself: what is received is what would be returned, in the order of the bounds."""
    sent = [{"b": torch.full((2, 3), 0.1), "a": torch.full((4, 4), 0.1)}] * 2
    arguments: dict[str, Any] = {
        "bounds": {"b": 1.0, "a": 1.0},
        "shapes": {"b": (2, 3), "a": (4, 4)},
        "n_total": 2,
        "rng": 0,
        **BASE,
    }
    received: list[tuple[str, Any]] = []
    steps: list[tuple[int, int]] = []
    with pytest.warns(UserWarning, match="seeded noise"):
        whole = private_mean(sent, **arguments)
    with pytest.warns(UserWarning, match="seeded noise"):
        result = private_mean(
            sent,
            receive=lambda *pair: received.append(pair),
            advance=lambda *pair: steps.append(pair),
            **arguments,
        )
    assert result.updates == {}
    assert [name for name, _ in received] == ["b", "a"]
    for name, matrix in received:
        assert torch.equal(matrix, whole.updates[name])  # type: ignore[arg-type]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_failing_after_the_charge_is_said(tmp_path: Path) -> None:
    ledger = PrivacyLedger.create(tmp_path / "ledger.json", **BASE)  # type: ignore[arg-type]

    def fails(*_: object) -> None:
        raise RuntimeError("nobody takes it")

    arguments: dict[str, Any] = {"bounds": {"a": 1.0}, "shapes": {"a": (2, 3)}, "n_total": 1, **BASE}
    with pytest.raises(ReleaseLost, match="its budget stays spent: RuntimeError: nobody takes it"):
        private_mean([None], ledger=ledger, receive=fails, **arguments)
    (release,) = ledger.releases
    assert not release.confirmed
    with pytest.raises(RuntimeError, match="nobody takes it"):
        private_mean([None], receive=fails, **arguments)


@pytest.mark.parametrize("size", [0.3, 3.0])
def test_the_frobenius_projection_of_a_dense_release_needs_no_singular_values(
    size: float, monkeypatch: pytest.MonkeyPatch, silent: None
) -> None:
    matrix = torch.randn(6, 9, dtype=torch.float64)
    matrix *= size / norm_of(matrix)

    def project(norm: str) -> Tensor:
        result = private_mean(
            [{"a": matrix}],
            bounds={"a": 3.1},
            shapes={"a": (6, 9)},
            n_total=1,
            project=(parse_norm(norm), 1.0),
            dtype=torch.float64,
            **BASE,  # type: ignore[arg-type]
        )
        found = result.updates["a"]
        assert isinstance(found, Tensor)
        return found

    expected = matrix if size < 1 else matrix / size
    monkeypatch.setattr(torch.linalg, "svd", None)
    assert torch.allclose(project("frobenius"), expected, atol=1e-8)
    with pytest.raises(TypeError, match="not callable"):
        project("spectral")


# --- what else was mended on the way ---


def test_a_number_of_a_layout_is_not_read_unless_it_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {
        "a.lora_down.weight": ("F32", [2, 7]),
        "a.lora_up.weight": ("F32", [9, 2]),
        "a.alpha": ("F32", [2**30]),
    }
    _header(tmp_path / "a.safetensors", entries)
    monkeypatch.setattr(TensorFile, "read", None)
    with pytest.raises(
        AdapterError, match=r"one finite number in 'a.alpha', got nan of shape \(1073741824,\)"
    ):
        open_lora(tmp_path / "a.safetensors")


def test_a_new_folder_appears_in_one_step(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    rename = os.rename

    def noted(source: Path, target: Path) -> None:
        seen.append(sorted(path.name for path in Path(source).iterdir()))
        assert not Path(target).exists()
        rename(source, target)

    monkeypatch.setattr("nblora.checkpoints.storage.os.rename", noted)
    merge(three, tmp_path / "out")
    assert seen == [[CONFIG, WEIGHTS]]


def test_the_public_names() -> None:
    assert nblora.merge_privately is merge_privately
    assert private.merge_privately is merge_privately
