"""Clipped LoRA files: the nearest update inside the ball, nothing else moved, old or new and never half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_samples import CONFIG, WEIGHTS, factors, peft_folder, product
from nblora.bounds import parse_norm
from nblora.checkpoints import clip_lora, spectra
from nblora.checkpoints.spectra import clip_in_place, spectrum

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
