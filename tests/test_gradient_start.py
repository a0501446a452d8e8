"""Starts along the gradient: the directions, the step, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from conftest import (
    TwoLayers,
    assert_loss_falls_from_a_gradient_start,
    tiny_gpt2,
    tiny_llama,
    tokens,
)
from nblora import NBLoraConfig, certify, start_at_gradient
from nblora.bounds import parse_norm
from nblora.lowrank import LowRank
from nblora.parametrizations import descent_step
from nblora.tuner import nblora_layers

NORMS = ("spectral", "frobenius", "nuclear", "ky-fan-2", 3.0)


def adapted(**choices: Any) -> Any:
    torch.manual_seed(2)
    config = {"r": 3, "target_modules": ["first", "second"]} | choices
    return get_peft_model(TwoLayers(), NBLoraConfig(**config))


def samples(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 12, generator=generator), torch.randn(count, 5, generator=generator)


def step_of(model: nn.Module, count: int = 40) -> Callable[[], None]:
    x, y = samples(count)
    return lambda: (model(x) - y).square().mean().backward()


def true_gradients(model: nn.Module, step: Callable[[], object]) -> dict[str, Tensor]:
    """Of the base weights, as (m, n), by the usual way."""
    layers = nblora_layers(model, "default")
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_()
    step()
    found = {name: layers[name]._matrix(weight.grad.clone()) for name, weight in weights.items()}
    for parameter in model.parameters():
        parameter.grad = None
    for weight in weights.values():
        weight.requires_grad_(False)
    return found


def updates(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {n: x.low_rank_update("default").dense() for n, x in nblora_layers(model, "default").items()}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
def test_update_is_a_step_against_the_top_of_the_gradient(norm: Any, parametrization: str) -> None:
    model = adapted(norm=norm, parametrization=parametrization)
    gradients = true_gradients(model, step_of(model))
    start_at_gradient(model, step_of(model), step=0.25, rounds=40)
    for name, update in updates(model).items():
        u, sigma, vh = torch.linalg.svd(gradients[name])
        shape = (sigma[:3] / sigma[0]).sqrt()
        radius = nblora_layers(model, "default")[name].radius("default")
        expected = -(u[:, :3] * shape) @ vh[:3] * 0.25 * radius / parse_norm(norm).value(shape)
        torch.testing.assert_close(update, expected, atol=1e-4 * float(radius), rtol=1e-3)


def test_one_round_finds_a_gradient_of_low_rank_exactly() -> None:
    model = adapted(r=3)
    step = step_of(model, count=3)  # three samples: gradients of rank 3
    gradients = true_gradients(model, step)
    start_at_gradient(model, step, step=0.5)
    for name, update in updates(model).items():
        u, sigma, vh = torch.linalg.svd(gradients[name], full_matrices=False)
        cosine = -(update * ((u * sigma.sqrt()) @ vh)).sum() / update.norm() / sigma.sum().sqrt()
        assert cosine > 0.99999


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_loss_of_a_language_model_falls_at_once(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    targets = "all-linear" if build is tiny_llama else ["c_attn", "c_proj", "c_fc"]
    model: Any = get_peft_model(build(), NBLoraConfig(r=4, target_modules=targets))
    assert_loss_falls_from_a_gradient_start(model, tokens(4))


class Kinds(nn.Module):
    """A layer of each kind that is no linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.embedding(x).mT).mT
        return self.attention(y, y, y, need_weights=False)[0]


def test_other_kinds_of_layers_step_against_their_gradients() -> None:
    torch.manual_seed(4)
    model: Any = get_peft_model(Kinds(), NBLoraConfig(r=3, target_modules=["embedding", "conv", "attention"]))
    x = torch.randint(0, 11, (6, 9))

    def loss() -> Tensor:
        found: Tensor = (model(x) - 1).square().mean()
        return found

    before = loss().item()
    start_at_gradient(model, lambda: loss().backward(), step=0.2, rounds=2)
    assert all(bool((update != 0).any()) for update in updates(model).values())
    assert loss().item() < before
    assert certify(model).holds


def test_nothing_but_the_update_changes() -> None:
    model = adapted(r=2)
    x, _ = samples()
    model(x).sum().backward()
    adapter = {p for layer in nblora_layers(model, "default").values() for p in layer.parameters()}
    others = {n: p.detach().clone() for n, p in model.named_parameters() if p not in adapter}
    base = {n: layer.get_base_weight().clone() for n, layer in nblora_layers(model, "default").items()}
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    radii = {n: layer.radius("default").clone() for n, layer in nblora_layers(model, "default").items()}
    start_at_gradient(model, step_of(model))
    for name, parameter in model.named_parameters():
        if name in others:
            assert torch.equal(parameter, others[name])
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    for name, layer in nblora_layers(model, "default").items():
        assert torch.equal(layer.get_base_weight(), base[name])
        assert torch.equal(layer.radius("default"), radii[name])


def test_seed_and_data_settle_the_start() -> None:
    found = []
    for _ in range(2):
        model = adapted()
        start_at_gradient(model, step_of(model))
        found.append(updates(model))
    for name, update in found[0].items():
        assert torch.equal(update, found[1][name])


def test_training_goes_on_from_the_start() -> None:
    model = adapted(r=2)
    start_at_gradient(model, step_of(model))
    start = updates(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        step_of(model)()
        optimizer.step()
    assert all(bool((update != start[name]).any()) for name, update in updates(model).items())
    assert certify(model).holds


def test_layers_without_a_gradient_keep_their_start() -> None:
    model = adapted()
    first, second = nblora_layers(model, "default").values()
    before = [p.detach().clone() for p in second.parameters()]
    x, _ = samples()
    start_at_gradient(model, lambda: first(x).square().sum().backward())
    assert all(torch.equal(p, q) for p, q in zip(second.parameters(), before, strict=True))
    assert bool((first.low_rank_update("default").left != 0).any())


def test_layers_whose_gradient_is_zero_keep_their_start() -> None:
    model = adapted()
    first, second = nblora_layers(model, "default").values()
    before = [p.detach().clone() for p in second.parameters()]
    x, _ = samples()
    start_at_gradient(model, lambda: (first(x).square().sum() + 0 * model(x).sum()).backward())
    assert all(torch.equal(p, q) for p, q in zip(second.parameters(), before, strict=True))


@pytest.mark.parametrize("calls", [1, 2])
def test_failing_step_leaves_everything_as_it_was(calls: int) -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    methods = [layer.method["default"] for layer in nblora_layers(model, "default").values()]
    done = []

    def fails() -> None:
        done.append(1)
        step_of(model)()
        if len(done) == calls:
            raise KeyError("data ended")

    with pytest.raises(KeyError, match="data ended"):
        start_at_gradient(model, fails)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert [layer.method["default"] for layer in nblora_layers(model, "default").values()] == methods


def infinite(model: nn.Module) -> Callable[[], None]:
    x, y = samples()
    return lambda: (model(x * torch.inf) - y).square().mean().backward()


def test_gradients_that_are_not_finite_are_refused() -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="gradients must be finite, got NaN or infinity in layer"):
        start_at_gradient(model, infinite(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0}, "step must be above 0 and at most 1, got step=0"),
        ({"step": 1.5}, "step must be above 0 and at most 1, got step=1.5"),
        ({"step": float("nan")}, "step must be above 0"),
        ({"rounds": 0}, "rounds must be an integer >= 1, got rounds=0"),
        ({"rounds": True}, "rounds must be an integer >= 1, got rounds=True"),
        ({"adapter_name": "other"}, "must have an NB-LoRA adapter, got none named 'other'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=message):
        start_at_gradient(model, step_of(model), **options)


def test_steps_without_backward_are_refused() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"train_step must call backward\(\).*got no gradient"):
        start_at_gradient(model, lambda: model(samples()[0]))


def test_frozen_adapters_are_refused() -> None:
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="must be trainable, got a frozen one in layer"):
        start_at_gradient(model, step_of(model))


def test_experts_without_tokens_keep_their_start() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x: Tensor, expert: int) -> Tensor:
            return x @ self.weight[expert]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(x, 1)

    torch.manual_seed(5)
    config = NBLoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
    model: Any = get_peft_model(Model(), config)
    (layer,) = nblora_layers(model, "default").values()
    before = layer.free_parameters("default").map(Tensor.detach)
    x = torch.randn(8, 6)
    start_at_gradient(model, lambda: model(x).square().sum().backward())
    after = layer.free_parameters("default").map(Tensor.detach)
    for expert in (0, 2):
        assert torch.equal(after.into[expert], before.into[expert])
        assert torch.equal(after.out[expert], before.out[expert])
    assert not torch.equal(after.into[1], before.into[1])
    assert bool((layer.low_rank_update("default").dense()[1] != 0).any())


def test_descent_steps_of_batches_and_of_zero() -> None:
    gradient = torch.randn(3, 7, 5, dtype=torch.float64)
    gradient[1] = 0
    radius = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    norm = parse_norm("nuclear")
    found = descent_step(LowRank.from_dense(gradient), 2, norm=norm, radius=radius, step=0.5)
    sizes = norm.value(found.singular_values()[..., :2])
    torch.testing.assert_close(sizes, torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64))
    assert (found.dense() * gradient).sum((-2, -1))[0] < 0
