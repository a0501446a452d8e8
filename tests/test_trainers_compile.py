"""torch.compile: one graph of the whole model, forward, backward and training, and no recompilation."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from conftest import TwoLayers, tiny_llama, tokens
from nblora import NBLoraConfig, certify

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapted(base: nn.Module, **choices: Any) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(base, NBLoraConfig(**({"r": 4, "init_weights": False} | choices))).train()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def step(model: nn.Module, loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """A step of gradient descent; the gradients that it took."""
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 0.1 * parameter.grad
            parameter.grad = None
    return gradients


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("norm", "parametrization"),
    [
        ("frobenius", "joint"),
        ("nuclear", "svd"),
        ("frobenius", "radial"),
        pytest.param("spectral", "joint", marks=pytest.mark.slow),
        pytest.param("spectral", "svd", marks=pytest.mark.slow),
        pytest.param("ky-fan-2", "joint", marks=pytest.mark.slow),
        pytest.param("ky-fan-2", "svd", marks=pytest.mark.slow),
        pytest.param(3.5, "joint", marks=pytest.mark.slow),
    ],
)
def test_batches_of_any_size_train_in_one_graph(norm: Any, parametrization: str) -> None:
    """Graphs: one for the first size, one for any size; `fullgraph` raises where Python is needed between."""
    choices = {"target_modules": ["first", "second"], "norm": norm, "parametrization": parametrization}
    eager = adapted(TwoLayers(), **choices)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for index, size in enumerate([3, 4, 5, 9, 6, 3]):
        x = torch.randn(size, 12)
        gradients = [
            step(each, one(x).pow(2).mean(), trained(each))
            for each, one in ((eager, eager), (model, compiled))
        ]
        for expected, found in zip(*gradients, strict=True):
            assert expected.any()
            slack = 10 * max(expected.shape) * torch.finfo(expected.dtype).eps
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=slack)
        assert graphs() == min(index + 1, 2)
    assert certify(model).holds
    assert max(layer.share for layer in certify(model).layers) > 0.01


@pytest.mark.parametrize("norm", ["frobenius", pytest.param("nuclear", marks=pytest.mark.slow)])
def test_a_compiled_model_in_eval_mode_follows_its_parameters(norm: str) -> None:
    model = adapted(TwoLayers(), target_modules=["first", "second"], norm=norm).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 12)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        before = graphs()
        for _ in range(3):
            for parameter in trained(model):
                parameter += 0.1 * torch.randn_like(parameter)
            expected = copy.deepcopy(model)(x)
            torch.testing.assert_close(compiled(x), expected)
        assert graphs() == before


@pytest.mark.slow
@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
def test_a_compiled_language_model_trains(parametrization: str) -> None:
    eager = adapted(tiny_llama(), target_modules="all-linear", parametrization=parametrization)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.AdamW(trained(each), lr=1e-3) for each in (eager, model)]
    for index in range(4):
        x = tokens(count=2 + index, length=7 + index)
        losses = []
        for one, optimizer in zip((eager, compiled), optimizers):
            loss = one(input_ids=x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], abs=1e-3)
        assert graphs() <= 2
    assert certify(model).holds


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same() -> None:
    eager = adapted(TwoLayers(), target_modules=["first", "second"])
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 12)
    for _ in range(2):
        gradients = [
            step(each, one(x).pow(2).mean(), trained(each))
            for each, one in ((eager, eager), (model, compiled))
        ]
        for expected, found in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
