"""Exported plain LoRA: the same function without this library, inside the bound in every precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nblora.checkpoints.exporting
from conftest import TwoLayers, tiny_gpt2, tiny_llama, tokens
from nblora import NBLoraConfig, certify, export_lora
from nblora.bounds import parse_norm
from nblora.cayley import random_frame
from nblora.checkpoints import AdapterError
from nblora.lowrank import LowRank
from nblora.parametrizations import pull_back
from nblora.tuner import nblora_layers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
TARGETS = {"llama": "all-linear", "gpt2": ["c_attn", "c_fc", "c_proj"]}
SMALLER = {"llama": {"q_proj": 2}, "gpt2": {"c_attn": 2}}  # rank patterns
PARAMETRIZATIONS = ("joint", "svd", "radial")


def out(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        y = model(tokens() if x is None else x)
    return getattr(y, "logits", y)


def adapted(kind: str = "llama", dtype: torch.dtype = torch.float32, **choices: Any) -> PeftModel:
    """A model with a random update in every layer."""
    torch.manual_seed(5)
    config = {"target_modules": TARGETS[kind], "r": 4, "init_weights": False} | choices
    return get_peft_model(BUILDERS[kind](dtype), NBLoraConfig(**config)).eval()


def to_the_boundary(model: nn.Module) -> None:
    """Set free parameters of random updates whose norm is the radius."""
    for layer in nblora_layers(model, "default").values():
        method, k, (m, n) = layer.method["default"], layer.r["default"], layer.out_in_features
        radius = layer.radius("default").double()
        sigma = 0.1 + torch.rand(k, dtype=torch.float64)
        sigma = sigma * radius / method.norm.value(sigma)
        u, v = (random_frame(size, k, dtype=torch.float64) for size in (m, n))
        free = pull_back(
            LowRank(u * sigma, v.mT),
            k,
            norm=method.norm,
            radius=radius,
            parametrization=method.parametrization,
            temperature=method.temperature,
        )
        with torch.no_grad():
            for target, value in zip(
                (layer.nblora_out, layer.nblora_in, layer.nblora_angle, layer.nblora_scale),
                (free.out, free.into, free.angle, free.logits),
            ):
                if value is not None:
                    weight = target["default"].weight
                    weight.copy_(value.view_as(weight))


def written_updates(folder: Path) -> dict[str, Tensor]:
    """What a folder of plain LoRA stands for, by hand: scale * B @ A in float64."""
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scale
        * tensors[key.replace("lora_A", "lora_B")].double()
        @ tensors[key].double()
        for key in tensors
        if key.endswith(".lora_A.weight")
    }


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def meaning(folder: Path) -> tuple[bytes, dict[str, str], dict[str, bytes]]:
    """The configuration, the metadata (which safetensors writes in random order) and the tensors."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: t.view(torch.uint8).numpy().tobytes() for name, t in load_file(folder / WEIGHTS).items()}
    return (folder / CONFIG).read_bytes(), metadata, tensors


# --- the same function ------------------------------------------------------------------------------


LOADER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from conftest import tiny_gpt2, tiny_llama, tokens
from peft import PeftModel

for folder in map(Path, sys.argv[2:]):
    base = tiny_llama() if folder.name.startswith("llama") else tiny_gpt2()
    model = PeftModel.from_pretrained(base, folder)
    assert model.peft_config["default"].peft_type == "LORA"
    with torch.no_grad():
        logits = model(tokens()).logits
        merged = model.merge_and_unload()(tokens()).logits
    torch.save([logits, merged], folder / "logits.pt")
assert "nblora" not in sys.modules
print("without nblora")
"""


def test_peft_alone_loads_an_export_and_computes_the_same(tmp_path: Path) -> None:
    expected = {}
    for kind in BUILDERS:
        for parametrization in PARAMETRIZATIONS:
            model = adapted(kind, parametrization=parametrization, bound=1.0, task_type="CAUSAL_LM")
            folder = export_lora(model, tmp_path / f"{kind}-{parametrization}")
            expected[folder] = out(model)
            assert (out(BUILDERS[kind]()) - expected[folder]).abs().max() > 1e-3
    result = subprocess.run(
        [sys.executable, "-c", LOADER, str(Path(__file__).parent), *map(str, expected)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "without nblora"
    for folder, logits in expected.items():
        for found in torch.load(folder / "logits.pt"):
            torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("kind", BUILDERS)
def test_the_update_is_the_same_matrix(kind: str, parametrization: str, tmp_path: Path) -> None:
    model = adapted(kind, parametrization=parametrization, rank_pattern=SMALLER[kind])
    updates = written_updates(export_lora(model, tmp_path))
    layers = nblora_layers(model, "default")
    assert {f"base_model.model.{name}" for name in updates} == layers.keys()
    for name, update in updates.items():
        exact = layers[f"base_model.model.{name}"].low_rank_update("default").dense().detach().double()
        slack = 10 * max(exact.shape) * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(exact)
        assert torch.linalg.matrix_norm(update - exact) <= slack
        assert exact.any()


def test_the_parts_of_the_checkpoint_are_what_servers_read(tmp_path: Path) -> None:
    model = adapted(task_type="CAUSAL_LM", norm="nuclear")
    model.peft_config["default"].base_model_name_or_path = "somewhere/base"
    assert export_lora(model, str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    folder = tmp_path / "a" / "b"
    assert {file.name for file in folder.iterdir()} == {WEIGHTS, CONFIG}
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 4
    assert config["use_rslora"] is False
    assert config["use_dora"] is False
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "somewhere/base"
    assert config["inference_mode"] is True
    assert config["bias"] == "none"
    # in an order that does not depend on the process
    assert config["target_modules"] == sorted(model.peft_config["default"].target_modules)
    tensors = load_file(folder / WEIGHTS)
    assert len(tensors) == 28
    for name, layer in nblora_layers(model, "default").items():
        m, n = layer.out_in_features
        assert tensors[f"{name}.lora_A.weight"].shape == (4, n)
        assert tensors[f"{name}.lora_B.weight"].shape == (m, 4)
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    bounds = json.loads(metadata["nblora_bounds"])
    assert bounds["norm"] == "nuclear"
    assert bounds["bounds"] == {layer.name: layer.bound for layer in certify(model).layers}


@pytest.mark.parametrize(
    ("choices", "rank"),
    [
        ({"r": 3, "rank_pattern": {"q_proj": 1, r".*\.1\.mlp.*": 6}}, 6),
        ({"r": 400}, 32),  # the largest of min(m, n)
        ({"r": 400, "rank_pattern": {"up_proj": 2}}, 32),
        ({"r": 2, "rank_pattern": {"k_proj": 100}}, 16),
    ],
)
def test_all_tensors_have_one_rank(choices: dict[str, Any], rank: int, tmp_path: Path) -> None:
    model = adapted(**choices)
    export_lora(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == rank
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        assert tensor.shape[0 if "lora_A" in key else 1] == rank, key
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(out(loaded), out(model), rtol=0, atol=1e-5)
    assert certify(tmp_path).holds


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_and_its_folder_export_the_same_files(kind: str, dtype: str | None, tmp_path: Path) -> None:
    model = adapted(kind, bound_kind="absolute", rank_pattern=SMALLER[kind])
    model.save_pretrained(tmp_path / "saved")
    export_lora(model, tmp_path / "from_model", dtype=dtype)
    expected = meaning(tmp_path / "from_model")
    for attempt in range(4):
        source = model if attempt % 2 else tmp_path / "saved"
        export_lora(source, tmp_path / f"again-{attempt}", dtype=dtype)
        assert meaning(tmp_path / f"again-{attempt}") == expected


def test_a_merged_model_exports_the_same_update(tmp_path: Path) -> None:
    model = adapted()
    export_lora(model, tmp_path / "before")
    model.merge_adapter()
    export_lora(model, tmp_path / "after")
    before, after = written_updates(tmp_path / "before"), written_updates(tmp_path / "after")
    assert len(before) == 14
    assert all(torch.equal(after.pop(name), update) for name, update in before.items())
    assert not after


def test_one_of_several_adapters_is_exported(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", NBLoraConfig(target_modules=["q_proj"], r=2, init_weights=False))
    export_lora(model, tmp_path, adapter_name="other")
    assert len(written_updates(tmp_path)) == 2
    model.set_adapter("other")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(out(loaded), out(model), rtol=0, atol=1e-5)
    with pytest.raises(AdapterError, match=r"\['default', 'other'\], got 'third'"):
        export_lora(model, tmp_path / "third", adapter_name="third")


def test_an_untrained_adapter_exports_a_zero_update(tmp_path: Path) -> None:
    export_lora(adapted(init_weights=True), tmp_path)
    assert not any(update.any() for update in written_updates(tmp_path).values())
    assert certify(tmp_path).holds
    assert torch.equal(out(PeftModel.from_pretrained(tiny_llama(), tmp_path)), out(tiny_llama()))


@pytest.mark.parametrize("choice", ["modules_to_save", "bias_all", "bias_only", "both"])
def test_modules_to_save_and_biases_survive(choice: str, tmp_path: Path) -> None:
    choices: dict[str, Any] = {"target_modules": ["c_attn"]}
    if choice in ("modules_to_save", "both"):
        choices["modules_to_save"] = ["ln_f"]
    if choice != "modules_to_save":
        choices["bias"] = "all" if choice == "bias_all" else "nblora_only"
    model = adapted("gpt2", **choices)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".nblora_" not in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "saved")
    for source, folder in ((model, tmp_path / "a"), (tmp_path / "saved", tmp_path / "b")):
        export_lora(source, folder)
        loaded = PeftModel.from_pretrained(tiny_gpt2(), folder)
        torch.testing.assert_close(out(loaded), out(model), rtol=0, atol=1e-5)
        assert certify(folder).holds
    bias = {"bias_all": "all", "bias_only": "lora_only", "both": "lora_only"}.get(choice, "none")
    config = PeftConfig.from_pretrained(tmp_path / "a")
    assert config.bias == bias
    assert config.modules_to_save == choices.get("modules_to_save")
    # the update without the rest would not have passed
    assert (out(model) - out(adapted("gpt2", target_modules=["c_attn"]))).abs().max() > 1e-2


def test_the_choice_of_blocks_survives(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    export_lora(model, tmp_path)
    assert set(written_updates(tmp_path)) == {"model.layers.1.self_attn.q_proj"}
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(out(loaded), out(model), rtol=0, atol=1e-5)


# --- the bound of what is written -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["spectral", "frobenius", "nuclear", 3.5, "ky-fan-2"])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_rounded_factors_keep_the_bound(
    parametrization: str, norm: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = adapted(norm=norm, parametrization=parametrization)
    to_the_boundary(model)
    before = certify(model)
    eps = torch.finfo(torch.float32).eps
    assert all(1 - 10 * 48 * eps < layer.share for layer in before.layers)
    export_lora(model, tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    certificate = certify(tmp_path)
    assert certificate.holds
    updates = written_updates(tmp_path)
    assert len(updates) == len(certificate.layers) == 14
    for layer, source in zip(certificate.layers, before.layers, strict=True):
        value = parse_norm(norm).value(torch.linalg.svdvals(updates[layer.name])).item()
        slack = 10 * max(layer.shape) * torch.finfo(torch.float64).eps
        assert layer.bound == source.bound
        assert value <= layer.bound * (1 + slack), layer.name
        assert layer.norm == pytest.approx(value, rel=slack)
        # and no more is given away than rounding in the dtype costs
        assert value >= layer.bound * (1 - 4 * torch.finfo(dtype).eps - 10 * 48 * eps), layer.name
        exact = nblora_layers(model, "default")[f"base_model.model.{layer.name}"].get_delta_weight("default")
        apart = torch.linalg.matrix_norm(updates[layer.name] - exact.detach().double())
        coarse = 4 * torch.finfo(dtype).eps + 10 * 48 * eps
        assert apart <= coarse * torch.linalg.matrix_norm(exact.detach()), layer.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bound", [1e-9, 1e-4, 1.0, 1e4])
def test_rounded_factors_keep_bounds_of_every_size(bound: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(bound=bound, bound_kind="absolute", norm="spectral")
    to_the_boundary(model)
    export_lora(model, tmp_path, dtype=dtype)
    for update in written_updates(tmp_path).values():
        slack = 10 * max(update.shape) * torch.finfo(torch.float64).eps
        assert 0 < torch.linalg.svdvals(update)[0].item() <= bound * (1 + slack)
    assert certify(tmp_path).holds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_export_computes_nearly_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(dtype=dtype)
    to_the_boundary(model)
    export_lora(model, tmp_path, dtype=dtype)
    loaded = PeftModel.from_pretrained(BUILDERS["llama"](dtype), tmp_path)
    expected = out(model).float()
    atol = 20 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(out(loaded).float(), expected, rtol=0, atol=atol)


def test_names_of_dtypes(tmp_path: Path) -> None:
    model = adapted()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for spelling in (dtype, name, f"torch.{name}"):
            export_lora(model, tmp_path / "out", dtype=spelling)
            assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {dtype}
    export_lora(model, tmp_path / "default")
    assert {t.dtype for t in load_file(tmp_path / "default" / WEIGHTS).values()} == {torch.float32}


@pytest.mark.parametrize("tampered", ["lora_B", "lora_A", "lora_alpha", "alpha_pattern", "use_rslora"])
def test_a_scaled_export_is_found_out(tampered: str, tmp_path: Path) -> None:
    model = adapted()
    to_the_boundary(model)
    export_lora(model, tmp_path)
    assert certify(tmp_path).holds
    if tampered.startswith("lora_") and tampered != "lora_alpha":
        with safe_open(tmp_path / WEIGHTS, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(tmp_path / WEIGHTS)
        key = f"base_model.model.model.layers.1.mlp.up_proj.{tampered}.weight"
        tensors[key] = 2 * tensors[key]
        save_file(tensors, tmp_path / WEIGHTS, metadata=metadata)
        broken = ["model.layers.1.mlp.up_proj"]
    else:
        config = json.loads((tmp_path / CONFIG).read_text())
        value = {"lora_alpha": 8, "alpha_pattern": {"up_proj": 8}, "use_rslora": True}[tampered]
        (tmp_path / CONFIG).write_text(json.dumps(config | {tampered: value}))
        names = list(written_updates(tmp_path))
        broken = [name for name in names if tampered != "alpha_pattern" or name.endswith("up_proj")]
    certificate = certify(tmp_path)
    assert not certificate.holds
    assert {layer.name for layer in certificate.layers if not layer.holds} == set(broken)
    assert all(layer.share == pytest.approx(2, rel=1e-4) for layer in certificate.layers if not layer.holds)


def test_an_export_turned_into_dora_is_refused(tmp_path: Path) -> None:
    export_lora(adapted(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(AdapterError, match="must not use DoRA"):
        certify(tmp_path)


def test_a_layer_added_to_an_export_is_refused(tmp_path: Path) -> None:
    export_lora(adapted(), tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 32)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.ones(50, 4)
    save_file(tensors, tmp_path / WEIGHTS, metadata=metadata)
    with pytest.raises(AdapterError, match=r"must belong to a layer with a bound, got .*lm_head"):
        certify(tmp_path)


# --- nothing half written ---------------------------------------------------------------------------


@pytest.fixture
def occupied(tmp_path: Path) -> Path:
    """An earlier export with a file of the user beside it."""
    export_lora(adapted(norm="nuclear"), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    return tmp_path / "out"


def test_an_export_replaces_its_own_files_only(occupied: Path) -> None:
    before = content(occupied)
    export_lora(adapted(), occupied)
    after = content(occupied)
    assert after.keys() == before.keys() == {WEIGHTS, CONFIG, "notes.txt"}
    assert after["notes.txt"] == b"mine"
    assert after[WEIGHTS] != before[WEIGHTS]
    assert certify(occupied).norm_name == "frobenius"
    assert [path.name for path in occupied.parent.iterdir()] == ["out"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for target in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(AdapterError, match=str(tmp_path / "out")) as error:
            export_lora(adapted(), target)
        assert "\n" not in str(error.value)
        assert content(tmp_path) == {"out": b"mine"}
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("failure", ["weights", "config", "folder"])
def test_a_failed_write_leaves_nothing_behind(
    failure: str, occupied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device\nreally")

    if failure == "weights":
        monkeypatch.setattr(nblora.checkpoints.exporting, "save_file", full)
    elif failure == "config":
        monkeypatch.setattr(LoraConfig, "save_pretrained", full)
    else:
        monkeypatch.setattr(Path, "mkdir", full)
    model, before = adapted(), content(occupied.parent)
    with pytest.raises(AdapterError, match=r"cannot be written: No space left on device$"):
        export_lora(model, occupied)
    assert content(occupied.parent) == before
    with pytest.raises(AdapterError, match=r"cannot be written: No space left on device$"):
        export_lora(model, occupied.parent / "new")
    assert [path.name for path in occupied.parent.iterdir()] == ["out"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(AdapterError, match="cannot be written"):
        export_lora(adapted(), closed / "out")
    assert not list(closed.iterdir())


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_folder_in_place_of_a_file_leaves_the_other_file_intact(name: str, occupied: Path) -> None:
    (occupied / name).unlink()
    (occupied / name).mkdir()
    before = content(occupied.parent)
    with pytest.raises(AdapterError, match="cannot be written"):
        export_lora(adapted(), occupied)
    assert content(occupied.parent) == before
    assert [path.name for path in occupied.parent.iterdir()] == ["out"]


def test_an_interrupted_export_leaves_nothing_behind(occupied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    before = content(occupied.parent)
    monkeypatch.setattr(LoraConfig, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_lora(adapted(), occupied)
    assert content(occupied.parent) == before
    assert [path.name for path in occupied.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("part", ["in", "out", "scale", "radius"])
def test_an_update_that_is_not_finite_is_refused(part: str, tmp_path: Path) -> None:
    model = adapted()
    layer = nblora_layers(model, "default")["base_model.model.model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        getattr(layer, f"nblora_{part}")["default"].weight.view(-1)[0] = torch.nan
    with pytest.raises(AdapterError, match=r"layer 'model\.layers\.1\.mlp\.up_proj' must be finite"):
        export_lora(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_update_that_overflows_the_dtype_is_refused(tmp_path: Path) -> None:
    model = adapted(bound=1e12, bound_kind="absolute")
    with pytest.raises(AdapterError, match=r"must be finite in torch\.float16"):
        export_lora(model, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())
    assert certify(export_lora(model, tmp_path / "out", dtype="bfloat16")).holds


@pytest.mark.parametrize(
    "dtype", ["half", "int8", "", torch.int8, torch.float8_e4m3fn, torch.complex64, 16, True]
)
def test_a_dtype_that_is_none_of_ours_is_refused(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"dtype must be one of float32, bfloat16, float16, float64, got dtype="
    ):
        export_lora(adapted(), tmp_path / "out", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_no_adapter_of_ours_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    exported = export_lora(adapted(), tmp_path / "exported")
    lora = get_peft_model(TwoLayers(), LoraConfig(target_modules=["first"]))
    lora.save_pretrained(tmp_path / "lora")
    for source in (exported, lora, tmp_path / "lora", TwoLayers(), tmp_path / "nowhere"):
        with pytest.raises(AdapterError) as error:
            export_lora(source, target)
        assert "\n" not in str(error.value)
        assert not target.exists()


def test_the_revision_of_the_base_model_survives(tmp_path: Path) -> None:
    export_lora(adapted(revision="v2"), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["revision"] == "v2"
