"""Clipped LoRA files: the nearest update inside the ball, nothing else moved, old or new and never half."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import tiny_llama
from lora_samples import CONFIG, WEIGHTS, change_config, factors, peft_folder, product
from nblora.bounds import Profile, parse_norm
from nblora.checkpoints import AdapterError, clip_lora, inspect_lora, spectra
from nblora.checkpoints.base import BaseWeights, Place
from nblora.checkpoints.base import _Index as Index
from nblora.checkpoints.spectra import clip_in_place, spectrum
from nblora.demo import small_vit

F64 = torch.finfo(torch.float64).eps


def clipped_svd(update: Tensor, norm: Any, bound: float) -> Tensor:
    """The Euclidean projection of a dense update, by the book."""
    u, sigma, vh = torch.linalg.svd(update, full_matrices=False)
    return u * parse_norm(norm).project(sigma, torch.tensor(bound, dtype=sigma.dtype)) @ vh


def byte_ranges(file: Path) -> dict[str, bytes]:
    """The bytes of every tensor."""
    return {key: tensor.view(torch.uint8).numpy().tobytes() for key, tensor in load_file(file).items()}


# --- the arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        *((norm, (24, 17, 5)) for norm in ("spectral", "frobenius", "nuclear", 3.5, "ky-fan-2")),
        *(("nuclear", shape) for shape in ((3, 40, 8), (40, 3, 8), (6, 6, 6), (1, 9, 1))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_projection_is_the_nearest_update_inside(
    shape: tuple[int, int, int], dtype: torch.dtype, norm: Any
) -> None:
    m, n, k = shape
    scale = 0.7
    up, down = (side.to(dtype) for side in factors(m, n, k, 5.0))
    update = scale * product(up, down)
    bound = 0.3 * parse_norm(norm).value(torch.linalg.svdvals(update)).item()
    expected = clipped_svd(update, norm, bound)
    before, after = clip_in_place(up, down, scale, parse_norm(norm), bound)
    found = scale * product(up, down)
    torch.testing.assert_close(before, torch.linalg.svdvals(update)[: len(before)], rtol=1e-9, atol=1e-12)
    value = parse_norm(norm).value(torch.linalg.svdvals(found)).item()
    assert value <= bound * (1 + 10 * max(m, n) * F64)
    assert parse_norm(norm).value(after).item() <= bound
    coarse = max(8 * k * torch.finfo(dtype).eps, 1e-9)
    assert torch.linalg.matrix_norm(found - expected) <= coarse * torch.linalg.matrix_norm(expected)


@pytest.mark.parametrize("chunk", [1, 64])
def test_chunks_change_nothing_but_rounding(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = factors(50, 70, 4, 3.0)
    monkeypatch.setattr(spectra, "_CHUNK", chunk)
    expected = clipped_svd(product(up, down), "nuclear", 1.0)
    torch.testing.assert_close(spectrum(up, down, 1.0), torch.linalg.svdvals(product(up, down))[:4])
    clip_in_place(up, down, 1.0, parse_norm("nuclear"), 1.0)
    torch.testing.assert_close(product(up, down), expected)


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "nuclear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_badly_scaled_and_dependent_factors(dtype: torch.dtype, norm: str) -> None:
    """Rows of A of sizes 1e-3 to 1e3 against columns of B of 1e3 to 1e-3, one of them twice, one of zeros."""
    up, down = factors(30, 20, 6, 1.0)
    sizes = torch.logspace(-3, 3, 6, dtype=torch.float64)
    up, down = up / sizes, down * sizes[:, None]
    up[:, 4], up[:, 5] = up[:, 3], 0
    up, down = up.to(dtype), down.to(dtype)
    update = product(up, down)
    bound = 0.2 * parse_norm(norm).value(torch.linalg.svdvals(update)).item()
    expected = clipped_svd(update, norm, bound)
    clip_in_place(up, down, 1.0, parse_norm(norm), bound)
    coarse = 50 * torch.finfo(dtype).eps
    assert torch.linalg.matrix_norm(product(up, down) - expected) <= coarse * torch.linalg.matrix_norm(
        expected
    )


def test_inside_the_ball_not_a_bit_moves() -> None:
    up, down = (side.float() for side in factors(9, 7, 3, 1.0))
    copies = up.clone(), down.clone()
    bound = spectrum(up, down, 1.0)[0].item()  # exactly on the bound is inside
    before, after = clip_in_place(up, down, 1.0, parse_norm("spectral"), bound)
    assert torch.equal(up, copies[0])
    assert torch.equal(down, copies[1])
    assert torch.equal(before, after)


def test_a_zero_bound_leaves_zero() -> None:
    up, down = factors(9, 7, 3, 1.0)
    _, after = clip_in_place(up, down, 1.0, parse_norm("spectral"), 0.0)
    assert not product(up, down).any()
    assert not after.any()


# --- files ------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A PEFT LoRA: two layers outside a bound of 1, one inside, and something that is no LoRA."""
    layers = {
        "model.layers.0.q_proj": factors(24, 32, 4, 5.0, seed=1),
        "model.layers.1.q_proj": factors(24, 32, 4, 0.9, seed=2),
        "model.layers.10.q_proj": factors(24, 32, 4, 80.0, seed=3),
    }
    folder = peft_folder(tmp_path / "in", layers, torch.bfloat16, r=4, lora_alpha=4)
    file = folder / WEIGHTS
    others = {"base_model.model.score.weight": torch.randn(3, 24), "base_model.model.steps": torch.arange(3)}
    save_file(load_file(file) | others, file, metadata={"format": "pt", "made by": "hand; ümläut"})
    (folder / "README.md").write_text("mine")
    return folder


def test_only_layers_outside_are_rewritten(adapter: Path, tmp_path: Path) -> None:
    report = clip_lora(adapter, tmp_path / "out", norm="spectral", bound=1.0)
    old, new = adapter / WEIGHTS, tmp_path / "out" / WEIGHTS
    assert old.stat().st_size == new.stat().st_size
    header = 8 + int.from_bytes(old.read_bytes()[:8], "little")
    assert old.read_bytes()[:header] == new.read_bytes()[:header]
    before, after = byte_ranges(old), byte_ranges(new)
    moved = {key for key in before if before[key] != after[key]}
    assert {key.split(".")[4] for key in moved} == {"0", "10"}
    assert len(moved) == 4
    assert (tmp_path / "out" / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {WEIGHTS, CONFIG}
    by_name = {layer.name: layer for layer in report.layers}
    assert {name for name, layer in by_name.items() if not layer.changed} == {"model.layers.1.q_proj"}
    assert by_name["model.layers.1.q_proj"].before == by_name["model.layers.1.q_proj"].after
    assert by_name["model.layers.10.q_proj"].before == pytest.approx(80, rel=0.02)
    tensors = load_file(new)
    for name, layer in by_name.items():
        up, down = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
        value = torch.linalg.matrix_norm(product(up, down), 2).item()
        assert value <= 1 + 1e-14
        assert layer.after == pytest.approx(value, rel=1e-12)
        assert value > 0.85
    assert set(report.unbounded) == {"base_model.model.score.weight", "base_model.model.steps"}
    assert "2 of 3 layers were outside" in report.summary
    assert "'model.layers.10.q_proj'" in report.summary
    assert "2 tensors that are no LoRA factors" in report.summary


def test_the_file_may_be_clipped_in_place(adapter: Path, tmp_path: Path) -> None:
    clip_lora(adapter, tmp_path / "out", norm="spectral", bound=1.0)
    clip_lora(adapter, adapter, norm="spectral", bound=1.0)
    assert (adapter / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert {file.name for file in adapter.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    again = clip_lora(adapter, adapter, norm="spectral", bound=1.0)
    assert not any(layer.changed for layer in again.layers)
    assert (adapter / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_a_link_into_a_cache_is_replaced_and_the_cache_kept(adapter: Path, tmp_path: Path) -> None:
    cached = tmp_path / "blob"
    (adapter / WEIGHTS).rename(cached)
    (adapter / WEIGHTS).symlink_to(cached)
    before = cached.read_bytes()
    clip_lora(adapter, adapter, norm="spectral", bound=1.0)
    assert cached.read_bytes() == before
    assert not (adapter / WEIGHTS).is_symlink()
    assert (adapter / WEIGHTS).read_bytes() != before


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}], ids=str)
def test_alpha_and_rank_count(options: dict[str, Any], tmp_path: Path) -> None:
    """The bound is on what a model adds: PEFT's own weights say so."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], **options)
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "in")
    clip_lora(tmp_path / "in", tmp_path / "out", norm="frobenius", bound=0.5)
    model.load_adapter(tmp_path / "out", "clipped")
    count = 0
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            value = module.get_delta_weight("clipped").double().norm().item()
            assert value <= 0.5 * (1 + 1e-6)  # the model multiplies in float32
            assert value > 0.49
            count += 1
    assert count == 4


def kohya_file(path: Path, size: float = 10.0, dtype: torch.dtype = torch.float16) -> Path:
    up, down = factors(6, 8, 2, size)
    conv_up, conv_down = factors(5, 27, 3, size, seed=4)
    tensors = {
        "lora_unet_a_to_q.lora_up.weight": up.to(dtype),
        "lora_unet_a_to_q.lora_down.weight": down.to(dtype),
        "lora_unet_a_to_q.alpha": torch.tensor(1.0, dtype=dtype),
        "lora_te1_conv.lora_up.weight": conv_up.to(dtype)[..., None, None],
        "lora_te1_conv.lora_down.weight": conv_down.to(dtype).reshape(3, 3, 3, 3),
        "lora_te1_conv.alpha": torch.tensor(6.0, dtype=dtype),
    }
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora"})
    return path


def test_a_kohya_file_keeps_its_names_alphas_and_metadata(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "in.safetensors")
    report = clip_lora(source, tmp_path / "out.safetensors", norm="spectral", bound=1.0)
    old, new = load_file(source), load_file(tmp_path / "out.safetensors")
    assert old.keys() == new.keys()
    assert all(old[key].dtype == new[key].dtype and old[key].shape == new[key].shape for key in old)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"ss_network_module": "networks.lora"}
    for name, scale in (("lora_unet_a_to_q", 0.5), ("lora_te1_conv", 2.0)):
        assert torch.equal(old[f"{name}.alpha"], new[f"{name}.alpha"])
        update = scale * product(new[f"{name}.lora_up.weight"], new[f"{name}.lora_down.weight"])
        value = torch.linalg.matrix_norm(update, 2).item()
        assert 0.99 < value <= 1 + 1e-14
    assert {layer.name for layer in report.layers} == {"unet.a_to_q", "text_encoder.conv"}


def test_a_file_goes_into_a_folder_under_its_name(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    clip_lora(kohya_file(tmp_path / "a.safetensors"), tmp_path / "there", bound=1.0)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("slash", [True, False])
def test_the_weights_of_a_folder_take_their_configuration_along(
    slash: bool, adapter: Path, tmp_path: Path
) -> None:
    """Else they would be read with the alpha of whatever lies in the target."""
    target = tmp_path / "out"
    if not slash:
        peft_folder(target, {"a.q": factors(4, 4, 2, 1.0)}, r=2, lora_alpha=64)
    clip_lora(adapter / WEIGHTS, f"{target}/" if slash else target, bound=1.0)
    assert (target / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()
    assert all(layer.spectral <= 1 + 1e-12 for layer in inspect_lora(target).layers)


def test_what_is_no_regular_file_is_not_replaced(adapter: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / WEIGHTS)
    for source, target in ((adapter / WEIGHTS, tmp_path / "pipe"), (adapter, tmp_path / "out")):
        with pytest.raises(AdapterError, match=r"cannot be written: .* is no regular file there"):
            clip_lora(source, target, bound=1.0)
    assert (tmp_path / "pipe").is_fifo()
    assert [path.is_fifo() for path in (tmp_path / "out").iterdir()] == [True]
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "pipe"}


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_that_is_replaced_keeps_its_mode(whole: bool, adapter: Path) -> None:
    (adapter / WEIGHTS).chmod(0o640)
    clip_lora(*([adapter] if whole else [adapter / WEIGHTS]) * 2, bound=1.0)
    assert stat.S_IMODE((adapter / WEIGHTS).stat().st_mode) == 0o640


def test_finding_base_weights_is_linear_in_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: how many names are looked at."""
    seen = 0

    def counted(self: Index, module: str, flattened: bool) -> list[str]:
        nonlocal seen
        found = candidates(self, module, flattened)
        seen += len(found)
        return found

    candidates = Index.of
    monkeypatch.setattr(Index, "of", counted)
    names = [f"layers.{i}.{part}.proj" for i in range(50) for part in ("attn", "mlp")]
    save_file({f"model.{name}.weight": torch.eye(2) for name in names}, tmp_path / "base.safetensors")
    base = BaseWeights(tmp_path / "base.safetensors")
    for flattened, form in ((False, "{}"), (False, "encoder.model.{}"), (True, "model_{}")):
        seen = 0
        for name in names:
            asked = form.format(name.replace(".", "_") if flattened else name)
            place = Place(asked, (2, 2), None, frozenset(["weight"]), flattened, "lora")
            assert base.module_name(place) == f"model.{name}"
        assert seen == len(names)


def test_experts_have_a_bound_each(tmp_path: Path) -> None:
    """Three experts of rank 2, of which one is outside; PEFT's own layout is in test_lora_layouts."""
    sizes = [0.5, 5.0, 0.7]
    pairs = [factors(6, 8, 2, size, seed=i) for i, size in enumerate(sizes)]
    down = torch.cat([pair[1] for pair in pairs])
    up = torch.stack([pair[0] for pair in pairs], -1).flatten(1)
    peft_folder(
        tmp_path,
        {"mlp.experts": (up, down)},
        torch.float64,
        r=2,
        lora_alpha=2,
        target_parameters=["experts.w"],
    )
    change_config(tmp_path, target_modules=[])
    report = clip_lora(tmp_path, tmp_path / "out", norm="spectral", bound=1.0)
    assert [layer.name for layer in report.layers] == [f"mlp.experts[{i}]" for i in range(3)]
    assert [layer.changed for layer in report.layers] == [False, True, False]
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    lefts = tensors["base_model.model.mlp.experts.lora_B.weight"].reshape(6, 2, 3)
    rights = tensors["base_model.model.mlp.experts.lora_A.weight"].reshape(3, 2, 8)
    for i, (left, right) in enumerate(pairs):
        expected = clipped_svd(left @ right, "spectral", 1.0)
        torch.testing.assert_close(lefts[..., i] @ rights[i], expected)


# --- relative bounds --------------------------------------------------------------------------------


class Base(nn.Module):
    def __init__(self, n: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({name: nn.Module() for name in ("0", "1", "10")})
        for i, layer in enumerate(self.model.layers.values()):
            layer.q_proj = nn.Linear(n, 24)
            layer.q_proj.weight.data *= 10.0 ** (i - 1)


@pytest.mark.parametrize("kind", ["model", "file", "folder", "file with other prefixes"])
def test_a_relative_bound_is_of_each_layers_base_weight(kind: str, adapter: Path, tmp_path: Path) -> None:
    base = Base()
    state = base.state_dict()
    (tmp_path / "base").mkdir()
    if kind.endswith("prefixes"):
        state = {key.replace("model.", "transformer.model."): tensor for key, tensor in state.items()}
    if kind == "folder":  # as sharded checkpoints are
        first = {key: state.pop(key) for key in list(state) if ".0." in key}
        save_file(first, tmp_path / "base" / "model-00001-of-00002.safetensors")
    save_file(state, tmp_path / "base" / "model.safetensors")
    source = {"model": base, "folder": tmp_path / "base"}.get(kind, tmp_path / "base" / "model.safetensors")
    report = clip_lora(
        adapter, tmp_path / "out", norm="frobenius", bound=0.5, bound_kind="relative", base=source
    )
    for layer in report.layers:
        weight = base.get_submodule(layer.name).weight.detach()
        assert layer.bound == pytest.approx(0.5 * torch.linalg.matrix_norm(weight, 2).item(), rel=1e-5)
        assert layer.after <= layer.bound


def test_another_base_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    for base in (Base(n=31), nn.Linear(3, 3)):
        with pytest.raises(AdapterError, match=r"is it the base model of this adapter\?") as error:
            clip_lora(adapter, tmp_path / "out", bound=0.5, bound_kind="relative", base=base)
        assert "q_proj" in str(error.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match="the base must be a model"):
        clip_lora(adapter, tmp_path / "out", bound=0.5, bound_kind="relative", base=tmp_path / "nowhere")


# --- old or new, never half -------------------------------------------------------------------------


def test_nan_is_refused_by_name_and_nothing_is_written(adapter: Path, tmp_path: Path) -> None:
    file = adapter / WEIGHTS
    tensors = load_file(file)
    key = "base_model.model.model.layers.10.q_proj.lora_A.weight"
    for value in (torch.nan, torch.inf):
        tensors[key].view(-1)[7] = value
        save_file(tensors, file)
        for target in (adapter, tmp_path / "out"):
            before = file.read_bytes()
            with pytest.raises(AdapterError) as error:
                clip_lora(adapter, target, bound=1.0)
            assert key in str(error.value)
            assert str(file) in str(error.value)
            assert "\n" not in str(error.value)
            assert file.read_bytes() == before
            assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "options",
    [{"bound": 0.0}, {"bound": -1.0}, {"bound": float("nan")}, {"bound": float("inf")}, {"bound": "1"}],
    ids=str,
)
def test_bounds_outside_their_rule_are_refused(options: dict[str, Any], adapter: Path) -> None:
    with pytest.raises(ValueError, match="bound must be a number, positive and finite, got bound="):
        clip_lora(adapter, adapter, **options)


def test_a_profile_without_a_bound_for_each_singular_value(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"updates of finite norm.* \(a profile must have a bound"):
        clip_lora(adapter, tmp_path / "out", norm=Profile([1.0, 0.5]), bound=1.0)


def test_other_options_outside_their_rules_are_refused(adapter: Path) -> None:
    with pytest.raises(ValueError, match="norm must be"):
        clip_lora(adapter, adapter, norm="operator", bound=1.0)
    with pytest.raises(ValueError, match="bound_kind must be"):
        clip_lora(adapter, adapter, bound=1.0, bound_kind="absolut")
    with pytest.raises(ValueError, match="a relative bound needs the base model"):
        clip_lora(adapter, adapter, bound=1.0, bound_kind="relative")


def full_disk(file: Path) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("in_folder", [True, False])
def test_a_full_disk_leaves_the_old_file(
    in_folder: bool, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = adapter if in_folder else kohya_file(tmp_path / "a.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("os.fsync", full_disk)  # the last of the writes
    with pytest.raises(AdapterError, match=r"cannot be written: .*No space left on device"):
        clip_lora(source, source, bound=0.1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_target_that_takes_no_bytes(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be written"):
        clip_lora(kohya_file(tmp_path / "a.safetensors"), "/proc/nothing/out.safetensors", bound=1.0)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match=str(tmp_path / "file")):
        clip_lora(adapter, tmp_path / "file", bound=1.0)
    assert (tmp_path / "file").read_text() == "mine"


SLOWLY = """
import sys, time
from nblora.checkpoints import clipping

clip = clipping.clip_in_place

def slowly(*arguments):
    print("at work", flush=True)
    time.sleep(0.3)
    return clip(*arguments)

clipping.clip_in_place = slowly
clipping.clip_lora(sys.argv[1], sys.argv[1], bound=0.01)
"""


def test_a_kill_in_the_middle_leaves_the_old_file(adapter: Path) -> None:
    before = (adapter / WEIGHTS).read_bytes()
    command = [sys.executable, "-c", SLOWLY, str(adapter)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "at work\n":
            assert process.poll() is None
        process.stdout.readline()  # the first layer is in the copy now
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert (adapter / WEIGHTS).read_bytes() == before
    assert list(adapter.parent.glob(".in-*")), "it was killed in the middle"
    assert clip_lora(adapter, adapter, bound=0.01).layers[0].changed


MEMORY = """
import sys
from pathlib import Path
import torch
from nblora.checkpoints import clip_lora

def status(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])

torch.set_num_threads(1)
small, large, out = map(Path, sys.argv[1:])
clip_lora(small, out / "small.safetensors", norm="nuclear", bound=1e-3)  # loads what is loaded once
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
before = status("VmRSS")
report = clip_lora(large, out / "large.safetensors", norm="nuclear", bound=1e-3)
assert all(layer.changed for layer in report.layers)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_two_factors(tmp_path: Path) -> None:
    """A file of 8 pairs of 16 MB: less than one and a half of them at a time."""
    m, n, k = 2**16, 2**16, 64
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(8):
        tensors[f"unet.{i}.lora_B.weight"] = torch.randn(m, k, generator=generator).bfloat16()
        tensors[f"unet.{i}.lora_A.weight"] = torch.randn(k, n, generator=generator).bfloat16()
    save_file(tensors, tmp_path / "large.safetensors")
    save_file({key: t[:200, :200].clone() for key, t in tensors.items()}, tmp_path / "small.safetensors")
    pair = 2 * (m + n) * k
    assert (tmp_path / "large.safetensors").stat().st_size > 8 * pair
    del tensors
    arguments = [tmp_path / "small.safetensors", tmp_path / "large.safetensors", tmp_path]
    finished = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, arguments)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert 0.9 * pair < int(finished.stdout) < 1.5 * pair


def test_a_transformers_folder_whose_files_have_other_names(tmp_path: Path) -> None:
    """The weights of a ViT are saved under names that its modules do not have."""
    base = small_vit()
    base.save_pretrained(tmp_path / "base")
    name = "vit.layers.1.attention.k_proj"
    weight = base.get_submodule(name).weight.detach()
    assert f"{name}.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    peft_folder(tmp_path / "lora", {name: factors(64, 64, 2, 50.0)}, r=2, lora_alpha=2)
    report = clip_lora(
        tmp_path / "lora", tmp_path / "out", bound=0.5, bound_kind="relative", base=tmp_path / "base"
    )
    assert report.layers[0].bound == pytest.approx(0.5 * torch.linalg.matrix_norm(weight, 2).item(), rel=1e-5)
