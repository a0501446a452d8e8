"""The promise of this library, through every door: no update ever exceeds its bound.

Training with random data at careful, usual and absurd learning rates, in layers of awkward shapes. Then
the update is obtained in every way that users have, always as a difference of what models really do,
and its norm is computed from torch.linalg.svdvals, not with this library's own formulas.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from conftest import tiny_gpt2, tokens
from nblora import NBLoraConfig, RunawayWarning, certify, export_lora
from nblora.tuner import NBLoraLayer, nblora_layers

SHAPES = {"row": (1, 7), "column": (7, 1), "square": (8, 8), "wide": (6, 20)}
NORMS = ("spectral", "frobenius", "nuclear", 3.5, "ky-fan-2")
PARAMETRIZATIONS = ("joint", "svd", "radial")
LEARNING_RATES = (1e-4, 1e-2, 1.0)
RANK = 40  # more than any layer has
BOUND = 0.3

Updates = dict[str, Tensor]


class Awkward(nn.Module):
    """One linear layer of each shape, side by side."""

    def __init__(self) -> None:
        super().__init__()
        for name, (m, n) in SHAPES.items():
            self.add_module(name, nn.Linear(n, m))

    def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        return [self.get_submodule(name)(x) for name, x in inputs.items()]


def norm_of(sigma: Tensor, norm: str | float) -> float:
    """Norms by their textbook definitions."""
    if norm == "spectral":
        value = sigma.max()
    elif norm == "frobenius":
        value = sigma.square().sum().sqrt()
    elif norm == "nuclear":
        value = sigma.sum()
    elif norm == "ky-fan-2":
        value = sigma.sort(descending=True).values[:2].sum()
    else:
        assert isinstance(norm, float)
        value = (sigma**norm).sum() ** (1 / norm)
    return value.item()


def value_of(update: Tensor, norm: str | float) -> float:
    assert update.isfinite().all()
    return norm_of(torch.linalg.svdvals(update.detach().double()), norm)


def base_weights(model: nn.Module) -> Updates:
    """Base weights (out, in) of the adapted layers, in float64."""
    return {name: weight_of(layer) for name, layer in nblora_layers(model, "default").items()}


def weight_of(layer: NBLoraLayer) -> Tensor:
    weight = layer.get_base_weight().double().clone()
    return weight.mT if layer.fan_in_fan_out else weight


@contextmanager
def runaways_allowed(allowed: bool = True) -> Iterator[None]:
    """Exactly this warning is allowed; the suite makes errors of all others."""
    with warnings.catch_warnings():
        if allowed:
            warnings.simplefilter("ignore", RunawayWarning)
        yield


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    scale: float = 1.0,
    autocast: bool = False,
) -> None:
    """Fit far too large random outputs, which pushes every update against its bound."""
    generator = torch.Generator().manual_seed(2)
    layers = nblora_layers(model, "default")
    inputs, targets = {}, []
    for name, (m, n) in SHAPES.items():
        dtype = layers[f"base_model.model.{name}"].get_base_weight().dtype
        inputs[name] = torch.randn(16, n, generator=generator).to(dtype)
        targets.append(10 * torch.randn(16, m, generator=generator))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            outputs = model(inputs)
        loss = sum(nn.functional.mse_loss(y.float(), t) for y, t in zip(outputs, targets))
        (scale * loss).backward()
        optimizer.step()
    model.eval()


def build(dtype: torch.dtype = torch.float32, **choices: Any) -> PeftModel:
    torch.manual_seed(1)
    config = NBLoraConfig(**({"r": RANK, "bound": BOUND, "target_modules": list(SHAPES)} | choices))
    return get_peft_model(Awkward().to(dtype), config)


@functools.cache
def trained(
    norm: str | float,
    parametrization: str,
    lr: float,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
) -> PeftModel:
    """Fifty steps of AdamW; doors must not change the model, which they share."""
    model = build(dtype, norm=norm, parametrization=parametrization)
    with runaways_allowed(lr == 1.0):
        train(model, torch.optim.AdamW(model.parameters(), lr=lr), steps=50, autocast=autocast)
    return model


# --- the doors --------------------------------------------------------------------------------------
# Each gives the update (out, in) of every layer. What a door itself rounds is the business of `slack`.


def by_layer(model: PeftModel, folder: Path) -> Updates:
    updates = {}
    for name, layer in nblora_layers(model, "default").items():
        delta = layer.get_delta_weight("default")
        updates[name] = delta.mT if layer.fan_in_fan_out else delta
    return updates


def by_merging(model: PeftModel, folder: Path) -> Updates:
    before = base_weights(model)
    merged = copy.deepcopy(model)
    merged.merge_adapter(safe_merge=True)
    after = base_weights(merged)
    return {name: after[name] - before[name] for name in before}


def by_merging_in_double(model: PeftModel, folder: Path) -> Updates:
    return by_merging(copy.deepcopy(model).double(), folder)


def by_output(model: PeftModel, folder: Path) -> Updates:
    """What the layers do with the identity, minus what their base layers do."""
    updates = {}
    for name, layer in nblora_layers(model, "default").items():
        _, n = layer.out_in_features
        identity = torch.eye(n, dtype=layer.get_base_weight().dtype)
        with torch.no_grad():
            updates[name] = (layer(identity).double() - layer.base_layer(identity).double()).mT
    return updates


def by_checkpoint(model: PeftModel, folder: Path) -> Updates:
    model.save_pretrained(folder)
    dtype = next(iter(nblora_layers(model, "default").values())).get_base_weight().dtype
    return by_layer(PeftModel.from_pretrained(Awkward().to(dtype), folder), folder)


def by_export(model: PeftModel, folder: Path) -> Updates:
    export_lora(model, folder)
    return lora_updates(PeftModel.from_pretrained(Awkward(), folder))


def by_conversion(model: PeftModel, folder: Path) -> Updates:
    peft.save_as_lora(folder, model, rank=1.0)
    return lora_updates(PeftModel.from_pretrained(Awkward(), folder))


def lora_updates(model: nn.Module) -> Updates:
    updates = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            updates[name] = b.double() @ a.double() * module.scaling["default"]
    return updates


# the dtype in which a door adds the update to the base weight, None where it shows the update itself
DOORS: dict[Callable[[PeftModel, Path], Updates], torch.dtype | None] = {
    by_layer: None,
    by_merging: torch.float32,
    by_merging_in_double: torch.float64,
    by_output: torch.float32,
    by_checkpoint: None,
    by_export: None,
    by_conversion: None,
}


def assert_inside(
    model: nn.Module,
    updates: Updates,
    norm: str | float,
    bounds: dict[str, float],
    summed_in: torch.dtype | None = None,
) -> dict[str, float]:
    """Every update keeps its absolute bound up to rounding; returns the used shares.

    A sum W + ΔW rounded to a dtype is off by eps/2 of each entry, so by at most eps/2 ‖W + ΔW‖_F, and any
    norm here is at most √min(m, n) times the Frobenius norm. In a forward pass the two factors, what is
    between them and the update itself are rounded too, each by no more than that.
    """
    weights = base_weights(model)
    assert updates.keys() == bounds.keys() == weights.keys()
    shares = {}
    for name, update in updates.items():
        weight, bound = weights[name], bounds[name]
        assert update.shape == weight.shape, name
        value = value_of(update, norm)
        slack = 10 * max(update.shape) * torch.finfo(torch.float32).eps * bound
        if summed_in is not None:
            size = torch.linalg.matrix_norm(weight) + torch.linalg.matrix_norm(update.double())
            slack += 5 * torch.finfo(summed_in).eps / 2 * min(update.shape) ** 0.5 * size.item()
        assert value <= bound + slack, f"{name}: {value} > {bound}"
        shares[name] = value / bound
    return shares


def relative_bounds(model: nn.Module, share: float = BOUND) -> dict[str, float]:
    """share times the spectral norm of each base weight, computed here."""
    return {
        name: share * torch.linalg.svdvals(weight).max().item()
        for name, weight in base_weights(model).items()
    }


# --- the contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", LEARNING_RATES)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_the_bound_holds_through_every_door(
    door: Callable[[PeftModel, Path], Updates],
    norm: str | float,
    parametrization: str,
    lr: float,
    tmp_path: Path,
) -> None:
    model = trained(norm, parametrization, lr)
    with runaways_allowed(lr == 1.0):
        updates = door(model, tmp_path)
    shares = assert_inside(model, updates, norm, relative_bounds(model), DOORS[door])
    assert min(shares.values()) > 0
    if lr == 1e-2 and parametrization != "svd":  # nothing would be shown if no update came near its bound
        assert max(shares.values()) > 0.9
    assert certify(model).holds


@pytest.mark.parametrize("lr", LEARNING_RATES)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bound_holds_in_half_precision(
    dtype: torch.dtype, norm: str | float, parametrization: str, lr: float, tmp_path: Path
) -> None:
    model = trained(norm, parametrization, lr, dtype)
    bounds = relative_bounds(model)
    with runaways_allowed(lr == 1.0):
        # what float32 parameters stand for is exact, whatever the dtype of the base model
        for door in (by_layer, by_checkpoint, by_export, by_conversion, by_merging_in_double):
            assert_inside(model, door(model, tmp_path / door.__name__), norm, bounds, DOORS[door])
        for door in (by_merging, by_output):
            assert_inside(model, door(model, tmp_path), norm, bounds, dtype)


@pytest.mark.parametrize("lr", LEARNING_RATES)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_bound_holds_tightly_in_double_precision(
    norm: str | float, parametrization: str, lr: float
) -> None:
    model = trained(norm, parametrization, lr, torch.float64)
    weights = base_weights(model)
    for name, bound in relative_bounds(model).items():
        delta = by_layer(model, Path())[name]
        assert delta.dtype == torch.float64
        slack = 10 * max(delta.shape) * torch.finfo(torch.float64).eps
        assert value_of(delta, norm) <= bound * (1 + slack)
    with runaways_allowed(lr == 1.0):
        merged = by_merging(model, Path())
    for name, update in merged.items():
        total = torch.linalg.matrix_norm(weights[name]) + torch.linalg.matrix_norm(update)
        slack = 10 * max(update.shape) * torch.finfo(torch.float64).eps * total.item()
        assert value_of(update, norm) <= relative_bounds(model)[name] + slack


@pytest.mark.parametrize("lr", LEARNING_RATES)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_bound_holds_under_autocast(norm: str | float, parametrization: str, lr: float) -> None:
    model = trained(norm, parametrization, lr, autocast=True)
    bounds = relative_bounds(model)
    with runaways_allowed(lr == 1.0), torch.autocast("cpu", torch.bfloat16):
        inside = by_layer(model, Path())
        merged = by_merging(model, Path())
        output = by_output(model, Path())
    assert_inside(model, inside, norm, bounds)
    assert_inside(model, merged, norm, bounds, torch.float32)
    assert_inside(model, output, norm, bounds, torch.bfloat16)


# --- bounds of other kinds --------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-2, 1.0])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bound", [1e-6, 0.05, 30.0])
def test_absolute_bounds_hold(norm: str | float, bound: float, lr: float) -> None:
    model = build(norm=norm, bound=bound, bound_kind="absolute")
    with runaways_allowed(lr == 1.0):
        train(model, torch.optim.AdamW(model.parameters(), lr=lr), steps=30)
    bounds = {f"base_model.model.{name}": bound for name in SHAPES}
    shares = assert_inside(model, by_layer(model, Path()), norm, bounds)
    assert min(shares.values()) > 0


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize("norm", ["spectral", "nuclear"])
def test_bounds_of_single_layers_hold(norm: str, kind: str, tmp_path: Path) -> None:
    pattern = {"row": 0.001, "squ.*": 5.0}
    model = build(norm=norm, bound=0.1, bound_kind=kind, bound_pattern=pattern)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), steps=50)
    numbers = {"row": 0.001, "column": 0.1, "square": 5.0, "wide": 0.1}
    bounds = {
        f"base_model.model.{name}": number * (1.0 if kind == "absolute" else relative_one(model, name))
        for name, number in numbers.items()
    }
    for door in (by_layer, by_checkpoint, by_export):
        shares = assert_inside(model, door(model, tmp_path / door.__name__), norm, bounds)
        assert min(shares.values()) > 0
    for layer in certify(model).layers:
        assert layer.bound == pytest.approx(bounds[f"base_model.model.{layer.name}"], rel=1e-5)


def relative_one(model: nn.Module, name: str) -> float:
    return relative_bounds(model, share=1.0)[f"base_model.model.{name}"]


# --- violence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_enormous_steps_on_enormous_gradients_stay_inside(
    norm: str | float, parametrization: str, tmp_path: Path
) -> None:
    model = build(norm=norm, parametrization=parametrization)
    bounds = relative_bounds(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
    with runaways_allowed():
        for _ in range(10):
            train(model, optimizer, steps=2, scale=1e6)
            for door in (by_layer, by_merging, by_output):
                assert_inside(model, door(model, tmp_path), norm, bounds, DOORS[door])
        assert certify(model).holds
    largest = max(p.abs().max().item() for p in model.parameters() if p.requires_grad)
    assert largest > 1e3  # it was violent


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e3, 1e8, 1e20, 1e38])
@pytest.mark.parametrize("draw", ["normal", "signs"])
def test_any_free_parameters_are_inside(
    draw: str, norm: str | float, parametrization: str, scale: float
) -> None:
    """Adam makes parameters of equal size and different signs; some such matrices are singular."""
    model = build(norm=norm, parametrization=parametrization)
    for seed in range(5):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
                    parameter.copy_(scale * (parameter.sign() if draw == "signs" else parameter))
        assert_inside(model, by_layer(model, Path()), norm, relative_bounds(model))


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("lr", LEARNING_RATES)
def test_the_bound_holds_in_layers_that_store_transposed_weights(
    lr: float, parametrization: str, tmp_path: Path
) -> None:
    config = NBLoraConfig(
        r=6, bound=BOUND, target_modules=["c_attn", "c_fc", "c_proj"], parametrization=parametrization
    )
    model = get_peft_model(tiny_gpt2(), config)
    bounds = relative_bounds(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    x = tokens()
    with runaways_allowed(lr == 1.0):
        model.train()
        for _ in range(25):
            optimizer.zero_grad()
            model(input_ids=x, labels=x).loss.backward()
            optimizer.step()
        model.eval()
        export_lora(model, tmp_path)
        for door in (by_layer, by_merging, by_merging_in_double, by_output):
            shares = assert_inside(model, door(model, tmp_path), "frobenius", bounds, DOORS[door])
            assert min(shares.values()) > 0
        lora = PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    assert_inside(model, lora_updates(lora), "frobenius", bounds)


def test_the_formulas_of_this_test_are_right() -> None:
    sigma = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    assert [norm_of(sigma, norm) for norm in ("spectral", "frobenius", "nuclear", "ky-fan-2")] == [4, 5, 7, 7]
    assert norm_of(sigma, 3.5) == pytest.approx((3**3.5 + 4**3.5) ** (1 / 3.5))
    assert math.isclose(value_of(torch.diag(sigma), "nuclear"), 7)
