"""What a user does on a GPU from end to end; tests of single parts on a GPU are beside those on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from conftest import TwoLayers, assert_same_certificate, tiny_llama
from nblora import (
    NBLoraConfig,
    certify,
    clip_lora,
    export_lora,
    import_lora,
    merge_adapters,
    start_at_gradient,
)

pytestmark = pytest.mark.gpu

NORMS = ["spectral", "frobenius", "nuclear", 3.0, "ky-fan-2"]
PARAMETRIZATIONS = ["joint", "svd", "radial"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sentences(seed: int = 0) -> Tensor:
    """Every other token follows from the one before."""
    first = torch.randint(0, 25, (16, 6), generator=torch.Generator().manual_seed(seed))
    return torch.stack([first, first + 25], dim=2).flatten(1).cuda()


def adapted(dtype: torch.dtype = torch.float32, **choices: Any) -> PeftModel:
    torch.manual_seed(5)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | choices
    return get_peft_model(tiny_llama(dtype).cuda(), NBLoraConfig(**options))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return found


def train(
    model: nn.Module, *, rate: float = 1e-2, steps: int = 8, call: Callable[..., Tensor] = loss_of
) -> list[float]:
    """The losses of every step, on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = call(model, sentences())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=sentences(9)).logits.float().cpu()
    return found


@pytest.mark.parametrize("allowed", [False, True], ids=["float32", "tf32"])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_bound_holds_whatever_the_optimizer_does(norm: Any, parametrization: Any, allowed: bool) -> None:
    with tf32(allowed):
        for rate in (1e-2, 30.0, 1e5):
            model = adapted(norm=norm, parametrization=parametrization, bound=0.3)
            train(model, rate=rate, steps=5)
            assert certify(model).holds
            for name, module in model.named_modules():  # and in the dense weights, on their own
                if hasattr(module, "get_delta_weight"):
                    delta = module.get_delta_weight("default").double()
                    assert delta.isfinite().all(), name
                    limit = module.radius("default").item()
                    largest = torch.linalg.matrix_norm(delta, 2).item()
                    assert largest <= limit * (1 + 1e-4), name  # of which every norm here is the larger


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_trains_saves_loads_merges_and_moves(
    parametrization: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    model = adapted(dtype, parametrization=parametrization)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.002
    model.eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert_same_certificate(certify(tmp_path), certify(model))
    loaded = PeftModel.from_pretrained(tiny_llama(dtype).cuda(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        on_cpu = model.cpu()
        with torch.no_grad():
            found = on_cpu(input_ids=sentences(9).cpu()).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logits(on_cpu.cuda()), expected, rtol=1e-4, atol=1e-4)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_start_and_training_under_autocast(dtype: torch.dtype) -> None:
    """With a scaled loss, as float16 needs it."""
    model = adapted()
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)

    def call(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=dtype):
            return loss_of(model, ids)

    before = call(model, sentences()).item()
    start_at_gradient(model, lambda: scaler.scale(call(model, sentences())).backward(), step=0.1)
    started = call(model, sentences()).item()
    assert started < before - 0.002
    assert certify(model).holds
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(6):
        scaler.scale(call(model, sentences())).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert call(model, sentences()).item() < started - 0.002
    assert certify(model).holds


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_is_what_it_is_without(mode: str) -> None:
    """reduce-overhead records CUDA graphs."""
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, mode=mode)

    def call(model: nn.Module, ids: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        found: Tensor = compiled(model, ids).clone()
        return found

    plain, other = adapted(), adapted()
    expected, found = train(plain), train(other, call=call)
    assert found == pytest.approx(expected, rel=1e-2)
    assert_same_certificate(certify(other), certify(plain), rel=0.05)


def test_lora_files_and_merging(tmp_path: Path) -> None:
    """Files of adapters that were trained on a GPU."""
    models = []
    for i, scale in enumerate((1.0, 0.5)):
        model = adapted(bound=scale)
        train(model, steps=3 + i)
        model.save_pretrained(tmp_path / f"{i}")
        models.append(model.eval())
    export_lora(models[0], tmp_path / "lora")
    served = PeftModel.from_pretrained(tiny_llama().cuda(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(served), logits(models[0]), rtol=1e-3, atol=1e-3)
    assert_same_certificate(certify(tmp_path / "lora"), certify(models[0]))
    clip_lora(tmp_path / "lora", tmp_path / "clipped", bound=0.01, bound_kind="absolute", norm="frobenius")
    clipped = PeftModel.from_pretrained(tiny_llama().cuda(), tmp_path / "clipped")
    for module in clipped.modules():
        if hasattr(module, "get_delta_weight"):
            assert module.get_delta_weight("default").norm().item() <= 0.01 * (1 + 1e-5)
    import_lora(tmp_path / "lora", tmp_path / "back", bound=2.0, bound_kind="absolute")
    assert certify(tmp_path / "back").holds

    merge_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "mean")
    mean = PeftModel.from_pretrained(tiny_llama().cuda(), tmp_path / "mean")
    deltas = [
        {
            name: m.get_delta_weight("default")
            for name, m in one.named_modules()
            if hasattr(m, "get_delta_weight")
        }
        for one in (mean, *models)
    ]
    assert deltas[0].keys() == deltas[1].keys()
    for name, merged in deltas[0].items():
        torch.testing.assert_close(merged, (deltas[1][name] + deltas[2][name]) / 2, rtol=1e-4, atol=1e-6)


def test_a_model_that_moves_after_its_adapter_was_made() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        TwoLayers(), NBLoraConfig(r=3, target_modules=["first", "second"], init_weights=False)
    )
    x = torch.randn(7, 12)
    expected = model(x)
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.cpu()(x), expected, rtol=1e-5, atol=1e-6)
