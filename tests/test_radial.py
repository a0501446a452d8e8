"""The radial parametrization: one bound for the whole update and none for single singular values."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from typer.testing import CliRunner

from conftest import TwoLayers
from lora_samples import WEIGHTS, factors, peft_folder
from nblora import NBLoraConfig, certify, import_lora
from nblora.bounds import Gauge, KyFan, Norm, Profile, Schatten, Spectral
from nblora.cayley import inverse_tall_cayley, random_frame, tall_cayley
from nblora.cli import app
from nblora.lowrank import LowRank
from nblora.parametrizations import (
    FreeParameters,
    Parametrization,
    bounded_update,
    has_run_away,
    pull_back,
    random_start,
    zero_start,
)
from nblora.tuner import nblora_layers

FROBENIUS = Schatten(2.0)
REACH = 3  # radii that the joint formula spans before it is cut
RADIAL: dict[str, Any] = {"norm": FROBENIUS, "parametrization": "radial"}
OTHER_NORMS: dict[str, Norm] = {
    "spectral": Spectral(),
    "nuclear": Schatten(1.0),
    "almost frobenius": Schatten(2.0001),
    "ky-fan-2": KyFan(2),
    "profile": Profile([3.0, 2.0, 1.0, 0.5]),
    "gauge": Gauge(lambda spectrum: spectrum.sum(-1)),
    "gauge of that name": Gauge(lambda spectrum: spectrum.sum(-1), label="frobenius"),
}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_other_norm = pytest.mark.parametrize("norm", OTHER_NORMS.values(), ids=OTHER_NORMS)
every_start = pytest.mark.parametrize("start", [zero_start, random_start])


def joint_formula(free: FreeParameters, radius: Tensor) -> Tensor:
    """2 s A^T B (..., m, n) with s = REACH * radius for every singular value."""
    unit = REACH * math.sqrt(free.rank)
    columns = tall_cayley(torch.cat([free.into, free.out / unit], dim=-1).mT)
    n = free.into.shape[-1]
    return 2 * REACH * radius[..., None, None] * columns[..., n:, :] @ columns[..., :n, :].mT


def gaussian(
    m: int, n: int, k: int, size: float = 1.0, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
) -> FreeParameters:
    out, into = (size * torch.randn(*batch, k, columns, dtype=torch.float64) for columns in (m, n))
    return FreeParameters(out.to(dtype), into.to(dtype))


def within(share: float, batch: tuple[int, ...] = ()) -> FreeParameters:
    """Free parameters whose joint formula has about this share of the radius; it can be up to 3 or so."""
    free = random_start(7, 9, 4, batch_shape=batch, dtype=torch.float64, **RADIAL)
    for _ in range(100):  # the share grows with `out`, but not in proportion
        norm = torch.linalg.matrix_norm(joint_formula(free, torch.ones(batch, dtype=torch.float64)))
        free = FreeParameters(free.out * (share / norm)[..., None, None], free.into)
    return free


def trainable(free: FreeParameters) -> FreeParameters:
    return free.map(lambda tensor: tensor.detach().clone().requires_grad_())


def tensors(free: FreeParameters) -> list[Tensor]:
    return [t for t in (free.out, free.into, free.angle, free.logits) if t is not None]


def size_of(update: LowRank) -> Tensor:
    return FROBENIUS.value(update.singular_values())


# --- the map ---


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("share", [1e-6, 0.1, 0.7, 0.999])
def test_inside_the_ball_it_is_the_joint_formula(share: float, batch: tuple[int, ...]) -> None:
    free, radius = within(share, batch), 0.3 + torch.rand(batch, dtype=torch.float64)
    expected = joint_formula(free, radius)
    torch.testing.assert_close(torch.linalg.matrix_norm(expected), share * radius, rtol=1e-6, atol=0)
    update = bounded_update(free, radius=radius, **RADIAL).dense()
    assert ((update - expected).abs().amax((-2, -1)) <= 1e-14 * share * radius).all()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("share", [1.001, 1.5, 2.0])
def test_outside_it_is_the_joint_formula_scaled_back_to_the_sphere(
    share: float, batch: tuple[int, ...]
) -> None:
    free, radius = within(share, batch), 0.3 + torch.rand(batch, dtype=torch.float64)
    joint = joint_formula(free, radius)
    norm = torch.linalg.matrix_norm(joint)
    assert (norm > radius).all()
    found = bounded_update(free, radius=radius, **RADIAL)
    scaled_back = joint * (radius / norm)[..., None, None]
    assert ((found.dense() - scaled_back).abs().amax((-2, -1)) <= 1e-12 * radius).all()
    torch.testing.assert_close(size_of(found), radius, rtol=1e-6, atol=0)
    u, sigma, v = found.svd()
    around = u.mT @ joint @ v  # diagonal where the singular vectors are the same
    assert (around - torch.diag_embed(sigma * (norm / radius)[..., None])).abs().max() <= 1e-10


@every_dtype
def test_on_the_sphere_to_1e_6_in_any_precision(dtype: torch.dtype) -> None:
    free = gaussian(20, 30, 4, 0.3, (50,), dtype)
    radius = torch.ones(50, dtype=dtype)
    assert (torch.linalg.matrix_norm(joint_formula(free, radius)) > 1.1).all()
    size = size_of(bounded_update(free, radius=radius, **RADIAL))
    assert ((size - 1).abs() <= 1e-6).all()


def test_members_of_a_batch_are_cut_alone() -> None:
    free = [within(share) for share in (0.2, 0.9, 1.5)]
    together = FreeParameters(torch.stack([f.out for f in free]), torch.stack([f.into for f in free]))
    size = size_of(bounded_update(together, radius=torch.ones(3, dtype=torch.float64), **RADIAL))
    torch.testing.assert_close(size, torch.tensor([0.2, 0.9, 1.0], dtype=torch.float64), rtol=1e-6, atol=0)


# --- the bound ---


@every_dtype
@pytest.mark.parametrize("radius", [0.0, 1e-20, 1.0, 1e10])
@pytest.mark.parametrize("size", [10.0**power for power in range(-30, 31, 5)])
def test_the_norm_is_at_most_the_radius_whatever_the_free_parameters(
    size: float, radius: float, dtype: torch.dtype
) -> None:
    """Sizes of both sides, and one of them alone; gradients are finite, or one step would end a training."""
    for m, n, k in ((1, 7, 1), (8, 8, 8), (12, 40, 5)):
        for out_size, into_size in ((size, size), (size, 1.0), (1.0, size)):
            free = trainable(gaussian(m, n, k, batch=(4,), dtype=dtype))
            free = trainable(FreeParameters(free.out * out_size, free.into * into_size))
            own = torch.full((4,), radius, dtype=dtype)
            update = bounded_update(free, radius=own, **RADIAL)
            assert (size_of(update) <= own.double() * (1 + 1e-6)).all()
            (update.dense() * torch.randn(m, n, dtype=dtype)).sum().backward()
            for side in (free.out, free.into):
                assert side.grad is not None
                assert side.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(20_000, 300), (300, 20_000), (5000, 5000)], ids=str)
def test_long_sums_in_single_precision_do_not_leave_the_ball(shape: tuple[int, int]) -> None:
    for k in (1, 2, 16):
        for size in (0.003, 0.01, 0.03):
            update = bounded_update(
                gaussian(*shape, k, size, dtype=torch.float32), radius=torch.ones(()), **RADIAL
            )
            assert size_of(update) <= 1 + 1e-6


# --- gradients ---


@every_dtype
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_the_zero_start_has_a_finite_gradient_that_leaves_it(
    batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    free = trainable(zero_start(6, 9, 4, batch_shape=batch, dtype=dtype, **RADIAL))
    update = bounded_update(free, radius=torch.ones(batch, dtype=dtype), **RADIAL)
    assert update.dense().abs().max() == 0
    (update.dense() * torch.randn(6, 9, dtype=dtype)).sum().backward()
    assert free.out.grad is not None
    assert free.into.grad is not None
    assert free.out.grad.isfinite().all()
    assert free.out.grad.abs().amax((-2, -1)).min() > 0
    assert free.into.grad.isfinite().all()


def test_gradients_are_finite_where_nothing_is_left_and_on_the_sphere() -> None:
    zeros = FreeParameters(torch.zeros(4, 6), torch.zeros(4, 9))
    at_the_sphere = pull_back(LowRank(torch.eye(6, 1), torch.eye(1, 9)), 4, radius=torch.ones(()), **RADIAL)
    for start in (zeros, at_the_sphere):
        free = trainable(start)
        update = bounded_update(free, radius=torch.ones(()), **RADIAL)
        (update.dense() * torch.randn(6, 9)).sum().backward()
        assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors(free))


@pytest.mark.parametrize("share", [0.3, 0.9, 1.2, 2.0])
def test_gradients_are_right_inside_and_outside(share: float) -> None:
    free, radius = trainable(within(share, (2,))), torch.tensor([0.8, 1.3], dtype=torch.float64)

    def dense(out: Tensor, into: Tensor, radius: Tensor) -> Tensor:
        return bounded_update(FreeParameters(out, into), radius=radius, **RADIAL).dense()

    assert torch.autograd.gradcheck(dense, (free.out, free.into, radius.requires_grad_()))


def test_outside_no_gradient_is_spent_on_the_norm() -> None:
    """The update cannot grow there, so its own direction says nothing to the free parameters."""
    free = trainable(within(1.5))
    update = bounded_update(free, radius=torch.ones((), dtype=torch.float64), **RADIAL).dense()
    along, across = update.detach(), torch.randn(7, 9, dtype=torch.float64)
    grown = torch.autograd.grad((update * along).sum(), [free.out, free.into], retain_graph=True)
    turned = torch.autograd.grad((update * across).sum(), [free.out, free.into])
    assert all(gradient.abs().max() < 1e-10 for gradient in grown)
    assert all(gradient.abs().max() > 1e-3 for gradient in turned)


# --- the way back ---

SPECTRA = {
    "all of the radius in one singular value": [1.0],
    "nearly all in one": [0.9999, 1e-4],
    "a rank lower than r": [0.5, 0.2],
    "flat on the sphere": [0.5] * 4,
    "full rank inside": [0.6, 0.3, 0.2, 0.1],
    "tiny": [1e-12, 1e-13],
    "zero": [0.0],
}


@every_dtype
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_every_update_of_the_ball_comes_back(
    spectrum: list[float], batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    radius = torch.linspace(0.7, 1.9, math.prod(batch), dtype=dtype).reshape(batch)
    u, v = (random_frame(size, len(spectrum), batch_shape=batch, dtype=dtype) for size in (6, 9))
    sigma = radius[..., None] * torch.tensor(spectrum, dtype=dtype)
    update = LowRank(u * sigma[..., None, :], v.mT)
    free = pull_back(update, 4, radius=radius, **RADIAL)
    assert free.rank == 4
    assert free.angle is None
    assert free.logits is None
    again = bounded_update(free, radius=radius, **RADIAL)
    rounding = 100 * torch.finfo(dtype).eps
    assert (again.dense() - update.dense()).abs().max() <= rounding
    assert (size_of(again) <= radius.double() * (1 + 1e-6)).all()


def test_a_radius_of_zero_comes_back() -> None:
    radius = torch.zeros(())
    free = pull_back(LowRank(torch.zeros(6, 2), torch.randn(2, 9)), 4, radius=radius, **RADIAL)
    assert all(tensor.isfinite().all() for tensor in tensors(free))
    assert (bounded_update(free, radius=radius, **RADIAL).dense() == 0).all()


def test_one_singular_value_needs_all_of_joints_logits_and_none_here() -> None:
    """Joint without logits gives a direction 1/sqrt(k) of the radius; all of it is reached at large ones."""
    radius = torch.ones((), dtype=torch.float64)
    update = LowRank(torch.eye(6, 1, dtype=torch.float64), torch.eye(1, 9, dtype=torch.float64))
    joint: dict[str, Any] = {"norm": FROBENIUS, "parametrization": "joint", "radius": radius}
    free = pull_back(update, 4, **joint)
    assert free.logits is not None
    assert free.logits.amax() - free.logits.amin() > 30
    even = FreeParameters(free.out, free.into, logits=torch.zeros_like(free.logits))
    assert bounded_update(even, **joint).singular_values()[0] <= 0.5 + 1e-9
    own = bounded_update(pull_back(update, 4, radius=radius, **RADIAL), radius=radius, **RADIAL)
    assert own.singular_values()[0] == pytest.approx(1, rel=1e-12)


# --- for the Frobenius norm only ---

REFUSAL = r'parametrization="radial" needs norm="frobenius", .*, got norm='


@every_other_norm
@every_start
def test_other_norms_have_no_radial_start(start: Callable[..., FreeParameters], norm: Norm) -> None:
    with pytest.raises(ValueError, match=REFUSAL + repr(norm.name)):
        start(6, 9, 4, norm=norm, parametrization="radial")


@every_other_norm
def test_other_norms_have_no_radial_update(norm: Norm) -> None:
    with pytest.raises(ValueError, match=REFUSAL + repr(norm.name)):
        bounded_update(gaussian(6, 9, 4), norm=norm, radius=torch.ones(()).double(), parametrization="radial")


@every_other_norm
def test_nothing_is_pulled_back_for_other_norms(norm: Norm) -> None:
    update = LowRank(torch.zeros(6, 2), torch.zeros(2, 9))
    with pytest.raises(ValueError, match=REFUSAL + repr(norm.name)):
        pull_back(update, 4, norm=norm, radius=torch.ones(()), parametrization="radial")


OTHER_NAMES = ["spectral", "nuclear", 1.0, 3.5, 2.5, math.inf, "ky-fan-2"]


@pytest.mark.parametrize("norm", OTHER_NAMES)
def test_a_config_refuses_other_norms(norm: Any) -> None:
    with pytest.raises(ValueError, match=REFUSAL):
        NBLoraConfig(norm=norm, parametrization="radial")


@pytest.mark.parametrize("norm", ["frobenius", 2, 2.0])
def test_every_spelling_of_the_frobenius_norm_is_taken(norm: Any) -> None:
    config = NBLoraConfig(norm=norm, parametrization="radial", r=2, target_modules=["first", "second"])
    model = get_peft_model(TwoLayers(), config)
    assert certify(model).holds
    assert {layer.method["default"].norm for layer in nblora_layers(model, "default").values()} == {FROBENIUS}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A PEFT LoRA on the two layers of `TwoLayers`, one of them inside a bound of 1 and one outside."""
    layers = {
        name: factors(*getattr(TwoLayers(), name).weight.shape, 2, size, seed=i)
        for i, (name, size) in enumerate([("first", 0.5), ("second", 50.0)])
    }
    return peft_folder(tmp_path / "lora", layers, r=2, lora_alpha=2)


@pytest.mark.parametrize("norm", OTHER_NAMES)
def test_an_import_refuses_other_norms_and_writes_nothing(norm: Any, lora: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bound": 1.0, "bound_kind": "absolute", "parametrization": "radial"}
    with pytest.raises(ValueError, match=REFUSAL):
        import_lora(lora, tmp_path / "out", norm=norm, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("norm", [str(norm) for norm in OTHER_NAMES])
def test_the_import_command_refuses_other_norms_in_one_line(norm: str, lora: Path, tmp_path: Path) -> None:
    arguments = ["import", lora, tmp_path / "out", "--bound", 1, "--absolute", "--parametrization", "radial"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--norm", norm])
    assert result.exit_code == 2, result.output
    assert 'parametrization="radial" needs norm="frobenius"' in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("norm", [[], ["--norm", "frobenius"], ["--norm", "2"], ["--norm", "2.0"]])
def test_the_import_command_writes_a_radial_adapter(norm: list[str], lora: Path, tmp_path: Path) -> None:
    arguments = ["import", lora, tmp_path / "out", "--bound", 1, "--absolute", "--parametrization", "radial"]
    result = CliRunner().invoke(app, [*map(str, arguments), *norm])
    assert result.exit_code == 0, result.output
    model = PeftModel.from_pretrained(TwoLayers(), tmp_path / "out")
    assert model.peft_config["default"].parametrization == "radial"
    assert certify(model).holds
    shares = [layer.norm / layer.bound for layer in certify(model).layers]
    assert max(shares) == pytest.approx(1, abs=1e-5)


# --- adapters ---


def adapted(base: nn.Module | None = None, **choices: Any) -> PeftModel:
    options: dict[str, Any] = {"r": 4, "target_modules": ["first", "second"], "parametrization": "radial"}
    return get_peft_model(base or TwoLayers(), NBLoraConfig(**(options | choices)))


def training(model: nn.Module, learning_rate: float, steps: int) -> Iterator[int]:
    """Steps of Adam on a regression whose solution is outside the ball."""
    x, y = torch.randn(40, 12), 10 * torch.randn(40, 5)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        yield step


@pytest.mark.parametrize("bound_kind", ["relative", "absolute"])
def test_no_bound_of_a_single_singular_value_is_saved(bound_kind: str, tmp_path: Path) -> None:
    base = TwoLayers()
    model = adapted(copy.deepcopy(base), bound_kind=bound_kind, bound=0.4)
    for _ in training(model, 1e-2, 20):
        pass
    assert not any("scale" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as saved:
        names = set(saved.keys())
    assert len(names) == 2 * 3  # in, out and radius of either layer
    assert not any("scale" in name for name in names)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert certify(loaded) == certify(model)
    assert certify(tmp_path).holds
    for one, other in zip(certify(tmp_path).layers, certify(model).layers):
        assert (one.norm, one.bound) == (other.norm, other.bound)
    x = torch.randn(6, 12)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore::nblora.RunawayWarning")  # what a rate of 1e3 is worth
@pytest.mark.parametrize("learning_rate", [10.0**power for power in range(-3, 4)])
def test_the_bound_holds_at_every_step_of_any_training(learning_rate: float) -> None:
    model, largest = adapted(bound=0.3), 0.0
    for _ in training(model, learning_rate, 60):
        certificate = certify(model)
        assert certificate.holds
        largest = max(largest, *(layer.norm / layer.bound for layer in certificate.layers))
    assert largest > 0
    if 1e-2 <= learning_rate <= 1:  # a bound that is never reached shows nothing
        assert largest > 0.9


# --- learning ---


def learner(parametrization: Parametrization, m: int, n: int, r: int) -> FreeParameters:
    generator = torch.Generator().manual_seed(r)
    start = zero_start(m, n, r, norm=FROBENIUS, parametrization=parametrization, generator=generator)
    return trainable(start)


def spectra(
    parametrization: Parametrization,
    gradient: Tensor,
    r: int,
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    steps: int,
) -> Tensor:
    """Singular values (steps, k) of updates of radius 1 that start at zero and follow one gradient."""
    m, n = gradient.shape
    free = learner(parametrization, m, n, r)
    optimizer, found = make(tensors(free)), []

    def update() -> LowRank:
        return bounded_update(free, norm=FROBENIUS, radius=torch.ones(()), parametrization=parametrization)

    for _ in range(steps):
        optimizer.zero_grad()
        (update().dense() * gradient).sum().backward()
        optimizer.step()
        found.append(update().singular_values().detach())
    return torch.stack(found)


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("r", [2, 8, 32])
def test_learning_rates_carry_over_from_joint(r: int, learning_rate: float) -> None:
    gradient = torch.randn(64, 96)
    moved = {
        kind: spectra(kind, gradient, r, lambda p: torch.optim.Adam(p, lr=learning_rate), 1)[0].norm().item()
        for kind in ("joint", "radial")
    }
    assert moved["joint"] > 0
    assert 1 / 2 < moved["radial"] / moved["joint"] < 2


OPTIMIZERS: dict[str, tuple[Callable[[list[Tensor]], torch.optim.Optimizer], int]] = {
    "Adam": (lambda parameters: torch.optim.Adam(parameters, lr=1e-2), 10),
    "SGD": (lambda parameters: torch.optim.SGD(parameters, lr=0.1), 40),
}


@pytest.mark.parametrize(("make", "steps"), OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("r", [8, 16])
def test_one_dominant_direction_gets_the_radius_while_joint_still_holds_it_at_its_share(
    r: int, make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int
) -> None:
    u, v = random_frame(64, 1), random_frame(96, 1)
    gradient = -u @ v.mT
    radial, joint = (spectra(kind, gradient, r, make, steps)[-1, 0] for kind in ("radial", "joint"))
    assert radial > 0.95
    assert joint < 1.2 / math.sqrt(r) < 0.5


def test_a_runaway_is_noticed_and_a_cut_update_is_none() -> None:
    """Outside the ball is a healthy place; free parameters beyond any use are not."""
    assert not has_run_away(within(2.0, (3,)), **RADIAL).any()
    free = gaussian(6, 9, 4, batch=(3,))
    free.out[1] *= 1e6
    free.into[1] *= 1e6
    assert has_run_away(free, **RADIAL).tolist() == [False, True, False]
    long_rows = within(0.7)
    long_rows.into[:, :4] += 1e3 * torch.eye(4)  # a symmetric part, which the Cayley transform ignores
    assert not has_run_away(long_rows, **RADIAL)


def test_an_absurd_learning_rate_runs_away() -> None:
    """Safe, but it no longer learns."""
    gradient = torch.randn(10, 14)
    free = learner("radial", 10, 14, 4)
    optimizer = torch.optim.Adam(tensors(free), lr=1e3)
    for _ in range(50):
        optimizer.zero_grad()
        update = bounded_update(free, radius=torch.ones(()), **RADIAL)
        (update.dense() * gradient).sum().backward()
        optimizer.step()
    assert has_run_away(free.map(Tensor.detach), **RADIAL)


@pytest.mark.parametrize("k", [2, 8, 16, 32])
def test_the_norm_is_measured_where_products_cancel(k: int) -> None:
    """Where directions are used up (angles 0 and pi / 2) beside one that is not, and frames are rotated."""
    m, n, radius = 300, 200, torch.tensor(1.0)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        u, v, turn = (random_frame(size, k, dtype=torch.float64, generator=generator) for size in (m, n, k))
        angles = torch.where(torch.rand(k, generator=generator) > 0.5, math.pi / 2, 0.0).double()
        angles[0] = 0.2
        columns, _ = inverse_tall_cayley(torch.cat([v * angles.cos(), u * angles.sin()]) @ turn)
        free = FreeParameters(
            out=(columns[n:].mT * REACH * math.sqrt(k)).float(), into=columns[:n].mT.float()
        )
        update = bounded_update(free, radius=radius, **RADIAL)
        norm = torch.linalg.vector_norm(update.singular_values()).item()
        assert 1 - 1e-4 <= norm <= 1 + 1e-7
