"""Factors computed for all layers at once and kept while they are right: the same numbers as one by one."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from conftest import tiny_llama, tokens
from nblora import NBLoraConfig, certify
from nblora.tuner import NBLoraLayer, factors, linear, nblora_layers

PARAMETRIZATIONS = ["joint", "svd", "radial"]


class Mixed(nn.Module):
    """Layers of three shapes, two of them alike, and one that is used only where `skips` is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 12)
        self.c, self.d = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.extra = nn.Linear(12, 12)
        self.skips = False
        self.checkpointing: dict[str, Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self._block(self._first, x)
        x = self._block(self._second, x)
        return x if self.skips else x + torch.tanh(self.extra(x))

    def _block(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.checkpointing is None:
            return block(x)
        output: Tensor = checkpoint(block, x, **self.checkpointing)
        return output

    def _first(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))

    def _second(self, x: Tensor) -> Tensor:
        return x + self.d(torch.tanh(self.c(x)))


LINEAR = ["a", "b", "c", "d", "extra"]


def mixed(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = NBLoraConfig(**({"r": 3, "target_modules": LINEAR, "init_weights": False} | options))
    return get_peft_model(Mixed().to(dtype), config)


def inputs(dtype: torch.dtype = torch.float32, count: int = 6) -> Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def leaves(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {n: None if g is None else g.clone() for n, g in found.items()}


@contextmanager
def one_by_one() -> Iterator[None]:
    """Every layer by itself, at every call anew, with PyTorch's own operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors.Factors, "update", lambda *_, **__: None)
        patch.setattr(linear, "_is_bare_linear", lambda *_: False)
        yield


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the matrices that are inverted."""
    shapes: list[tuple[int, ...]] = []
    original = torch.linalg.inv_ex

    def counting(matrix: Tensor) -> Any:
        shapes.append(tuple(matrix.shape))
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "inv_ex", counting)
    return shapes


@pytest.fixture(params=["compared", "not compared"])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to tell what is stale: by values as on the CPU, by signs as on accelerators."""
    if request.param == "not compared":
        monkeypatch.setattr(factors, "_compared", lambda _: False)
    return str(request.param)


def same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None, name
        else:
            assert found[name] is not None, name
            torch.testing.assert_close(found[name], grad, **tolerance)


# --- the same as one by one -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "nuclear", "ky-fan-2"])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_all_layers_at_once_are_what_they_are_one_by_one(parametrization: str, norm: str) -> None:
    model = mixed(torch.float64, norm=norm, parametrization=parametrization)
    x = inputs(torch.float64).requires_grad_()
    loss = model(x).square().sum()
    loss.backward()
    found, into = grads(model), x.grad
    x.grad = None
    with one_by_one():
        expected = model(x).square().sum()
        expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(into, x.grad)
    same(found, grads(model))


def test_one_solve_for_all_layers_of_a_rank(solves: list[tuple[int, ...]]) -> None:
    model = mixed(rank_pattern={"c": 2, "d": 2})
    solves.clear()  # a random start inverts, too
    model(inputs()).sum().backward()
    assert sorted(solves) == [(2, 2, 2), (3, 3, 3)]
    model = mixed(parametrization="svd")
    solves.clear()
    model(inputs()).sum().backward()
    assert solves == [(10, 3, 3)]


def test_a_language_model_takes_one_solve(solves: list[tuple[int, ...]]) -> None:
    config = NBLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    x = tokens()
    solves.clear()
    model(input_ids=x, labels=x).loss.backward()
    count = len(nblora_layers(model, "default"))
    assert solves == [(count, 4, 4)]
    assert all(p.grad is not None for p in leaves(model))


def test_batches_change_nothing_when_a_model_is_copied_or_reloaded() -> None:
    """A resumed run must go on bit by bit, so its first step is computed as every step is."""
    model, x = mixed(), inputs()
    optimizer = torch.optim.AdamW(leaves(model), lr=0.01)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    other = copy.deepcopy(model)
    fresh = mixed()
    fresh.load_state_dict(model.state_dict())
    expected = model(x)
    assert torch.equal(other(x), expected)
    assert torch.equal(fresh(x), expected)


# --- reuse, and never stale -------------------------------------------------------------------------


def micro_batches() -> list[Tensor]:
    return [inputs(count=count) for count in (2, 5, 3, 6)]


def test_micro_batches_share_the_factors(solves: list[tuple[int, ...]], devices: str) -> None:
    model = mixed()
    optimizer = torch.optim.AdamW(leaves(model), lr=0.05)
    for step in range(3):
        solves.clear()
        model.train()
        for x in micro_batches():
            model.train()  # as trainers do
            model(x).square().sum().backward()
        assert solves == [(5, 3, 3)]
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.zero_grad()
        with one_by_one():
            for x in micro_batches():
                model(x).square().sum().backward()
        same(found, grads(model), atol=1e-4 * (step + 1), rtol=1e-4)
        for name, parameter in model.named_parameters():
            parameter.grad = found.get(name)
        optimizer.step()
        optimizer.zero_grad()


class ThroughData(torch.optim.Optimizer):
    """Writes past version counters, as some optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.7)


def sgd(model: nn.Module) -> None:
    torch.optim.SGD(leaves(model), lr=0.3).step()


def fused(model: nn.Module) -> None:
    torch.optim.AdamW(leaves(model), lr=0.3, fused=True).step()


def foreach(model: nn.Module) -> None:
    torch.optim.AdamW(leaves(model), lr=0.3, foreach=True).step()


def past_counters(model: nn.Module) -> None:
    ThroughData(leaves(model)).step()


def past_counters_without_step(model: nn.Module) -> None:
    """As the first half of a sharpness-aware step."""
    for parameter in leaves(model):
        parameter.data.mul_(0.7)
    model.zero_grad()


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        first(model).nblora_in["default"].weight.mul_(0.7)


def new_data(model: nn.Module) -> None:
    weight = first(model).nblora_in["default"].weight
    weight.data = 0.7 * weight.data


def new_parameter(model: nn.Module) -> None:
    leaf = first(model).nblora_in["default"]
    leaf.weight = nn.Parameter(0.7 * leaf.weight.detach())


def new_bound(model: nn.Module) -> None:
    first(model).nblora_radius["default"].weight.mul_(0.5)


def new_scale(model: nn.Module) -> None:
    first(model).set_scale("default", 0.5)


def reload(model: nn.Module) -> None:
    model.load_state_dict({name: 0.7 * tensor for name, tensor in model.state_dict().items()})


def reload_assigning(model: nn.Module) -> None:
    model.load_state_dict({name: 0.7 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def replaced(model: nn.Module) -> None:
    assert isinstance(model, PeftModel)
    model.delete_adapter("default")
    model.add_adapter("default", NBLoraConfig(r=2, target_modules=LINEAR, init_weights=False))
    model.set_adapter("default")


def through_numpy(model: nn.Module) -> None:
    first(model).nblora_in["default"].weight.detach().numpy()[0, 5] += 1


def through_data(model: nn.Module) -> None:
    first(model).nblora_in["default"].weight.data.mul_(0.7)


def other_layer_through_data(model: nn.Module) -> None:
    list(nblora_layers(model, "default").values())[3].nblora_in["default"].weight.data.mul_(0.7)


def first(model: nn.Module) -> NBLoraLayer:
    return next(iter(nblora_layers(model, "default").values()))


SEEN_EVERYWHERE = [
    sgd,
    fused,
    foreach,
    past_counters,
    past_counters_without_step,
    in_place,
    new_data,
    new_parameter,
    new_bound,
    new_scale,
    reload,
    reload_assigning,
    replaced,
]
SEEN_BY_VALUE = [through_numpy, through_data, other_layer_through_data]


def check_not_stale(change: Callable[[nn.Module], None], parametrization: str) -> None:
    """Between two micro-batches: outputs, gradients of what is there now, and the certificate."""
    model = mixed(parametrization=parametrization)
    model(inputs()).square().sum().backward()
    before = model(inputs()).detach()
    change(model)
    model.zero_grad()
    now = model(inputs())
    now.square().sum().backward()
    found = grads(model)
    with one_by_one():
        expected = model(inputs())
        expected.square().sum().backward()
    torch.testing.assert_close(now, expected, atol=1e-5, rtol=1e-4)
    same(found, grads(model), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(now, before, atol=1e-4), "the change had no effect, so nothing is tested"
    assert certify(model).holds


@pytest.mark.parametrize("change", SEEN_EVERYWHERE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_training_never_uses_stale_factors(
    change: Callable[[nn.Module], None], parametrization: str, devices: str
) -> None:
    check_not_stale(change, parametrization)


@pytest.mark.parametrize("change", SEEN_BY_VALUE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_training_never_uses_stale_factors_on_a_cpu(
    change: Callable[[nn.Module], None], parametrization: str
) -> None:
    check_not_stale(change, parametrization)


def test_a_parameter_that_starts_to_learn_gets_gradients(devices: str) -> None:
    model = mixed()
    frozen = [p for n, p in model.named_parameters() if ".b.nblora_" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model(inputs()).sum().backward()
    assert all(p.grad is None for p in frozen)
    for parameter in frozen:
        parameter.requires_grad_()
    model(inputs()).sum().backward()
    assert all(p.grad is not None for p in frozen if p.is_floating_point() and p.requires_grad)


def test_what_learns_in_part_learns_that_part() -> None:
    model = mixed()
    for name, parameter in model.named_parameters():
        if "nblora_in" in name:
            parameter.requires_grad_(False)
    model(inputs()).square().sum().backward()
    found = grads(model)
    with one_by_one():
        model(inputs()).square().sum().backward()
    same(found, grads(model), atol=1e-5, rtol=1e-4)


def wide(rows: int) -> tuple[PeftModel, Tensor]:
    torch.manual_seed(0)
    config = NBLoraConfig(r=16, target_modules=["0", "2"], init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(600, 700), nn.Tanh(), nn.Linear(700, 600)), config)
    return model.eval(), torch.randn(rows, 600)


@pytest.mark.parametrize("change", [through_data, past_counters, in_place, new_data, reload])
@torch.no_grad()
def test_a_token_never_meets_stale_factors(change: Callable[[nn.Module], None]) -> None:
    """Of a large adapter only a part is compared for every token."""
    model, x = wide(rows=1)
    before = model(x)
    assert torch.equal(model(x), before)
    change(model)
    with one_by_one():
        expected = model(x)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, before, atol=1e-4)


@torch.no_grad()
def test_a_secret_change_of_one_entry_is_seen_in_the_end() -> None:
    model, x = wide(rows=20)
    model(x)
    first(model).nblora_in["default"].weight.detach().numpy()[7, 599] += 3
    with one_by_one():
        expected = model(x)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)  # more rows than a glance is for
    first(model).nblora_in["default"].weight.detach().numpy()[9, 1] += 3
    tensor = first(model).nblora_in["default"].weight
    for _ in range(tensor.nbytes // factors._WINDOW + 1):
        got = model(x[:1])
    with one_by_one():
        torch.testing.assert_close(got, model(x[:1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("disturbed", [False, True], ids=["", "evaluated in between"])
def test_checkpointing_computes_again_with_the_same_factors(
    reentrant: bool, disturbed: bool, solves: list[tuple[int, ...]], devices: str
) -> None:
    model, x = mixed(), inputs().requires_grad_()
    optimizer = torch.optim.AdamW(leaves(model), lr=0.05)
    for _ in range(2):
        with one_by_one():
            model(x).square().sum().backward()
        expected = grads(model)
        model.get_base_model().checkpointing = {"use_reentrant": reentrant}
        solves.clear()
        loss = model(x).square().sum()
        if disturbed:  # what was kept is dropped
            model.eval().train()
        loss.backward()
        model.get_base_model().checkpointing = None
        if not disturbed and not reentrant:
            assert solves == [(5, 3, 3)]
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        same(found, expected, atol=1e-4, rtol=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None


def test_reentrant_checkpointing_solves_once_and_only_for_what_ran(solves: list[tuple[int, ...]]) -> None:
    model = mixed()
    model.get_base_model().checkpointing = {"use_reentrant": True}
    solves.clear()
    model(inputs().requires_grad_()).square().sum().backward()
    # all forward; then each part of the backward pass solves for its own layers
    assert solves[0] == (5, 3, 3)
    assert sorted(shape[0] for shape in solves[1:]) == [1, 2, 2]


# --- autograd ---------------------------------------------------------------------------------------


def test_a_layer_that_is_not_used_gets_no_gradient() -> None:
    model = mixed()
    model.get_base_model().skips = True
    model(inputs()).sum().backward()
    unused = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and ".extra." in n}
    assert unused
    assert all(grad is None for grad in unused.values())
    found = grads(model)
    with one_by_one():
        model(inputs()).sum().backward()
    same(found, grads(model), atol=1e-5, rtol=1e-4)


def test_a_graph_can_be_used_again() -> None:
    model = mixed()
    loss = model(inputs()).square().sum()
    loss.backward(retain_graph=True)
    once = grads(model)
    loss.backward()
    same(grads(model), once)
    (weight,) = [p for n, p in model.named_parameters() if n.endswith(".a.nblora_in.default.weight")]
    (alone,) = torch.autograd.grad(model(inputs()).square().sum(), [weight])
    torch.testing.assert_close(alone, once["base_model.model.a.nblora_in.default.weight"])


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_gradients_can_be_differentiated(parametrization: str) -> None:
    model = mixed(torch.float64, parametrization=parametrization)
    x = inputs(torch.float64).requires_grad_()

    def penalty() -> Tensor:
        wanted = [x, *leaves(model)]
        first_order = torch.autograd.grad(model(x).square().sum(), wanted, create_graph=True)
        return torch.stack([grad.square().sum() for grad in first_order]).sum()

    penalty().backward()
    found = grads(model)
    with one_by_one():
        penalty().backward()
    same(found, grads(model))


def test_gradients_of_what_changed_meanwhile_are_not_differentiated() -> None:
    model = mixed()
    loss = model(inputs()).square().sum()
    with torch.no_grad():
        for parameter in leaves(model):
            parameter.mul_(0.5)
    with pytest.raises(RuntimeError, match="must not change between a forward pass and a backward pass"):
        torch.autograd.grad(loss, leaves(model), create_graph=True)


def test_an_optimizer_step_between_forward_and_backward_does_not_change_the_gradient() -> None:
    model = mixed()
    model(inputs()).square().sum().backward()
    expected = grads(model)
    loss = model(inputs()).square().sum()
    with torch.no_grad():
        for parameter in leaves(model):
            parameter.mul_(0.5)
    loss.backward()
    same(grads(model), expected)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_transforms_and_forward_mode_find_plain_operations(parametrization: str) -> None:
    model, x = mixed(torch.float64, parametrization=parametrization), inputs(torch.float64)
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(given: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(model, given, (x,))
        return output.square().sum()

    by_transform = torch.func.grad(loss)(weights)
    model(x).square().sum().backward()
    same(grads(model), dict(by_transform))
    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}
    _, along = torch.func.jvp(loss, (weights,), (direction,))
    torch.testing.assert_close(along, sum((by_transform[n] * direction[n]).sum() for n in weights))
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(dual).tangent
    _, expected = torch.autograd.functional.jvp(lambda given: model(given), x, tangent)
    torch.testing.assert_close(found, expected)


def test_memory_is_given_back_after_training() -> None:
    model = mixed()
    model(inputs()).sum().backward()
    update = first(model)._current_update("default")
    node = weakref.ref(update.left)
    assert update.left.requires_grad
    del update
    model.eval()
    gc.collect()
    assert node() is None


def test_layers_of_a_deleted_model_are_not_kept_alive() -> None:
    model = mixed()
    model(inputs()).sum().backward()
    layer = weakref.ref(first(model))
    del model
    gc.collect()
    assert layer() is None


CHANGES_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: nn.functional.relu(y, inplace=True),
    "add": lambda y: y.add_(1),
    "masked": lambda y: y.masked_fill_(y > 0, 0.0),
}


@pytest.mark.parametrize("change", CHANGES_IN_PLACE)
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7)], ids=str)
def test_outputs_can_be_changed_in_place(change: str, shape: tuple[int, ...]) -> None:
    model, _ = adapted(nn.Linear(7, 5))
    x = torch.randn(shape)
    CHANGES_IN_PLACE[change](model(x)).square().sum().backward()
    found = grads(model)
    with one_by_one():
        CHANGES_IN_PLACE[change](model(x)).square().sum().backward()
    same(found, grads(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_backward_inside_autocast(reentrant: bool | None) -> None:
    model, x = mixed(), inputs().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    expected = grads(model)
    if reentrant is not None:
        model.get_base_model().checkpointing = {"use_reentrant": reentrant}
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().sum().backward()
    same(grads(model), expected, atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16), one_by_one():
        model(x).float().square().sum().backward()
    same(grads(model), expected, atol=0.1, rtol=0.1)


def test_half_precision_parameters_under_another_autocast() -> None:
    model = mixed().to(torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        output = model(inputs(torch.bfloat16))
        output.float().sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is not None for p in leaves(model))


@pytest.mark.parametrize("norm", ["frobenius", "ky-fan-2", 3.0])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_steps_leave_no_tensors_behind(parametrization: str, norm: Any) -> None:
    model = mixed(parametrization=parametrization, norm=norm)
    optimizer = torch.optim.SGD(leaves(model), lr=0.01)

    def count(steps: int) -> int:
        for _ in range(steps):
            model(inputs()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    count(3)
    assert count(5) == count(10)


@pytest.mark.parametrize("backward", [False, True])
def test_adapters_that_are_gone_are_freed(backward: bool) -> None:
    model = mixed()
    loss = model(inputs()).sum()
    if backward:
        loss.backward()
    weight = weakref.ref(first(model).nblora_in["default"].weight)
    model.delete_adapter("default")
    del loss
    gc.collect()
    assert weight() is None


def test_inference_mode_of_a_model_in_training() -> None:
    model = mixed()
    with torch.inference_mode():
        before = model(inputs())
    after = model(inputs())
    torch.testing.assert_close(after, before.clone())
    after.sum().backward()
    assert all(p.grad is not None for p in leaves(model))


def test_what_is_frozen_has_no_graph() -> None:
    model = mixed()
    assert model(inputs()).requires_grad
    for parameter in leaves(model):
        parameter.requires_grad_(False)
    assert not model(inputs()).requires_grad


def test_replicas_have_their_own_tensors() -> None:
    model = mixed()
    model(inputs())
    layer = first(model)
    replica = layer._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(module) for name, module in layer._modules.items()}
    with torch.no_grad():
        replica._modules["nblora_out"]["default"].weight.mul_(3)
    found = replica.sources("default")
    assert found is not None
    assert torch.equal(found.out, 3 * layer.nblora_out["default"].weight)


def test_hooks_on_saved_tensors_can_be_forbidden() -> None:
    model = mixed()
    model(inputs()).sum().backward()
    expected = grads(model)
    model.eval().train()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        model(inputs()).sum().backward()
    same(grads(model), expected, atol=1e-5, rtol=1e-4)


def test_eval_in_another_thread_disturbs_nothing() -> None:
    model, x = mixed().eval(), inputs()
    with torch.no_grad():
        expected = model(x)
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            model.eval()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with torch.no_grad():
            for _ in range(300):
                assert torch.equal(model(x), expected)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)


# --- one product after the other, in place ----------------------------------------------------------


def adapted(base: nn.Module, **options: Any) -> tuple[PeftModel, NBLoraLayer]:
    torch.manual_seed(2)
    config = NBLoraConfig(**({"r": 3, "target_modules": ["0"], "init_weights": False} | options))
    model = get_peft_model(nn.Sequential(base), config)
    return model, first(model)


def is_one_node(output: Tensor) -> bool:
    """Whether a layer's output comes from the layer's own autograd function, reshaped at most."""
    node = output.grad_fn
    assert node is not None
    if type(node).__name__ in ("ViewBackward0", "UnsafeViewBackward0"):
        node = node.next_functions[0][0]
    return type(node).__name__ == "_AdaptedLinearBackward"


@pytest.mark.parametrize("base", [nn.Linear(7, 5), nn.Linear(7, 5, bias=False), Conv1D(5, 7)], ids=str)
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7)], ids=str)
def test_a_linear_layer_is_one_node(base: nn.Module, shape: tuple[int, ...]) -> None:
    model, layer = adapted(copy.deepcopy(base).double())
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weight = layer.get_base_layer().weight.requires_grad_()
    wanted = [x, weight, *leaves(model)]
    output = model(x)
    assert is_one_node(output)
    reached = torch.randn_like(output)
    found = torch.autograd.grad(output, wanted, reached)
    with one_by_one():
        expected = model(x)
        assert not is_one_node(expected)
    torch.testing.assert_close(output, expected)
    for got, want in zip(found, torch.autograd.grad(expected, wanted, reached)):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert torch.autograd.gradcheck(model, (x,))
    assert torch.autograd.gradgradcheck(model, (x,))


def test_inputs_that_are_not_contiguous_and_several_adapters() -> None:
    model, layer = adapted(nn.Linear(7, 5))
    model.add_adapter("other", NBLoraConfig(r=2, target_modules=["0"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(7, 3, 2).permute(1, 2, 0).requires_grad_()
    output = model(x)
    assert is_one_node(output)
    dense = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    base = layer.get_base_layer()
    torch.testing.assert_close(output, nn.functional.linear(x, base.weight + dense, base.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast_agree(dtype: torch.dtype) -> None:
    model, layer = adapted(nn.Linear(64, 48), norm="spectral")
    x = torch.randn(9, 64, requires_grad=True)
    with one_by_one():
        exact = model(x)
        exact.square().sum().backward()
    expected = grads(model)
    with torch.autocast("cpu", dtype):
        cast = model(x)
    assert cast.dtype == dtype
    assert is_one_node(cast)
    cast.float().square().sum().backward()
    same(grads(model), expected, atol=0.1, rtol=0.05)
    torch.testing.assert_close(cast.float(), exact, atol=0.05, rtol=0.05)
    layer.get_base_layer().to(dtype)
    half = model(x.detach().to(dtype))
    assert half.dtype == dtype
    assert is_one_node(half)
    half.float().square().sum().backward()
    same(grads(model), expected, atol=0.1, rtol=0.05)
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)


def test_hooks_on_the_base_layer_are_called() -> None:
    model, layer = adapted(nn.Linear(7, 5))
    x, seen = torch.randn(4, 7), []
    expected = model(x)
    handle = layer.get_base_layer().register_forward_hook(lambda _, __, output: seen.append(output))
    output = model(x)
    torch.testing.assert_close(output, expected)
    base = nn.functional.linear(x, layer.get_base_layer().weight, layer.get_base_layer().bias)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], base)  # not changed in place afterwards
    handle.remove()
    assert is_one_node(model(x))
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(x)
    finally:
        everywhere.remove()
    assert layer.get_base_layer() in seen[1:]


def test_dropout_drops_only_what_the_update_sees() -> None:
    model, layer = adapted(nn.Linear(400, 5), dropout=0.5)
    x = torch.randn(3, 400)
    with model.disable_adapter():
        base = model(x)
    torch.manual_seed(3)
    output = model(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    expected = base + dropped @ layer.get_delta_weight("default").mT
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def saved_bytes(call: Callable[[], Tensor], ignored: list[Tensor]) -> int:
    """What is kept for the backward pass, in bytes of storage; not counting the ignored tensors."""
    storages: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in ignored}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    return sum(storages.values())


def test_a_layer_keeps_its_input_as_it_is_and_k_numbers_a_row() -> None:
    model, layer = adapted(nn.Linear(256, 128).to(torch.bfloat16), r=4)
    x = torch.randn(1000, 256).to(torch.bfloat16).requires_grad_()
    model(x)
    update = layer._current_update("default", torch.bfloat16)
    ignored = [*model.parameters(), update.left, update.right]
    assert saved_bytes(lambda: model(x), ignored) == x.nbytes + 1000 * 4 * 2


# --- on an accelerator ------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_a_gpu_computes_the_same_and_is_not_waited_for(parametrization: str) -> None:
    model, x = mixed(parametrization=parametrization).cuda(), inputs().cuda()
    optimizer = torch.optim.AdamW(leaves(model), lr=0.05)
    for step in range(3):
        if step:
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss = model(x).square().sum() + model(2 * x).square().sum()
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = grads(model)
        with one_by_one():
            expected = model(x).square().sum() + model(2 * x).square().sum()
            expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
        same({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, found, atol=1e-3, rtol=1e-3)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_keeps_factors_while_nothing_changes(solves: list[tuple[int, ...]]) -> None:
    model, x = mixed().cuda().eval(), inputs().cuda()
    solves.clear()
    before = [model(x) for _ in range(3)][-1]
    assert len(solves) == 1
    in_place(model)
    assert not torch.allclose(model(x), before, atol=1e-4)
