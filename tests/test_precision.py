"""Bounds and inverses hold where users let float32 products be rounded to TF32 or bfloat16, for speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import TwoLayers
from nblora import NBLoraConfig, certify
from nblora.bounds import Norm, parse_norm
from nblora.cayley import inverse_tall_cayley, random_frame, tall_cayley
from nblora.lowrank import LowRank, precise_dtype
from nblora.parametrizations import bounded_update, pull_back
from nblora.spectral import spectral_norm_interval

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NORMS = ("spectral", "frobenius", "nuclear")


def by_the_old_setting() -> None:
    torch.set_float32_matmul_precision("medium")


def by_the_setting_of_all_backends() -> None:
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this PyTorch has only the old setting")
    torch.backends.fp32_precision = "bf16" if not torch.cuda.is_available() else "tf32"


@pytest.fixture(params=[by_the_old_setting, by_the_setting_of_all_backends])
def _rounded(request: pytest.FixtureRequest) -> Iterator[None]:
    backends = [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    new = hasattr(torch.backends, "fp32_precision")
    before = [backend.fp32_precision for backend in backends] if new else torch.get_float32_matmul_precision()
    try:
        if new:  # settings of their own that other tests have left
            for backend in backends:
                backend.fp32_precision = "none"
        request.param()
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        if new:
            for backend, setting in zip(backends, before):
                backend.fp32_precision = setting


pytestmark = pytest.mark.usefixtures("_rounded")


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """A device whose products are rounded now, as plain ones show; many CPUs cannot do it."""
    name: str = request.param
    assert precise_dtype(torch.zeros(1, device=name)) == torch.float64
    assert precise_dtype(torch.zeros(1, device=name, dtype=torch.float64)) == torch.float64
    a, b = torch.randn(256, 512, device=name), torch.randn(512, 256, device=name)
    if error(a @ b, a.double() @ b.double()) < 1e-5:
        pytest.skip("this processor does not round float32 products")
    return name


def test_columns_are_orthonormal_and_come_back(device: str) -> None:
    frame = random_frame(700, 24, device=device)
    free, signs = inverse_tall_cayley(frame)
    assert free.dtype == signs.dtype == torch.float32
    columns = tall_cayley(free)
    assert columns.dtype == torch.float32
    assert error(columns, frame * signs) < 1e-5
    assert error(columns.double().mT @ columns.double(), torch.eye(24, device=device)) < 1e-5


@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
@pytest.mark.parametrize("norm", [parse_norm(name) for name in NORMS], ids=NORMS)
def test_an_update_at_its_bound_comes_back(norm: Norm, parametrization: Any, device: str) -> None:
    radius = torch.tensor(2.0, device=device)
    u, v = random_frame(500, 16, device=device), random_frame(300, 16, device=device)
    sigma = torch.linspace(1, 0.3, 16, device=device)
    sigma = sigma * (radius / norm.value(sigma)) * (1 - 1e-6)
    update = LowRank(u * sigma, v.mT)
    choices: dict[str, Any] = {"norm": norm, "radius": radius, "parametrization": parametrization}
    found = bounded_update(pull_back(update, 16, **choices), **choices)
    assert found.left.dtype == torch.float32
    exact = u.double() * sigma.double() @ v.double().mT
    assert error(found.left.double() @ found.right.double(), exact) < 2e-5
    assert norm.value(found.singular_values()).item() <= 2 * (1 + 1e-6)
    dense = found.dense()
    assert error(dense, found.left.double() @ found.right.double()) < 1e-6
    assert error(found.svd().sigma.cpu(), found.singular_values()) < 1e-6


def test_gradients_are_those_in_full_precision(device: str) -> None:
    free, use = torch.randn(300, 8, device=device) / 17, torch.randn(300, 8, device=device)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = free.detach().to(dtype, copy=True).requires_grad_()
        (tall_cayley(leaf) * use).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert error(gradient(torch.float32), gradient(torch.float64)) < 1e-5


@pytest.mark.parametrize("shape", [(700, 300), (300, 1100)], ids=str)
def test_limits_of_a_spectral_norm_are_limits(shape: tuple[int, int], device: str) -> None:
    top = random_frame(shape[0], 2), random_frame(shape[1], 2)
    matrix = torch.randn(shape) + 80 * top[0] @ top[1].mT
    lower, upper = spectral_norm_interval(matrix.to(device))
    exact = torch.linalg.matrix_norm(matrix.double(), 2)
    assert lower * (1 - 1e-12) <= exact <= upper * (1 + 1e-12) <= lower * 1.01


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_trained_updates_are_what_is_loaded_without(compile_it: bool, device: str) -> None:
    """A start in full precision, and where products are rounded, are one adapter."""
    from peft import get_peft_model

    config = NBLoraConfig(r=4, target_modules=["first", "second"], init_weights=False, bound=0.5)
    model = get_peft_model(TwoLayers(80, 600, 40).to(device), config)
    call: Callable[[Tensor], Tensor] = torch.compile(model, backend="eager") if compile_it else model
    x = torch.randn(9, 80, device=device)
    call(x)
    layer = model.base_model.model.first
    found = layer.get_delta_weight("default")
    assert certify(model).holds
    expected = model.double().base_model.model.first.get_delta_weight("default")
    assert error(found, expected) < 1e-5
