"""NB-LoRA as a PEFT method: starts, adapters, merging, dtypes, and loud refusals."""

from __future__ import annotations

import copy
import enum
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nblora.tuner
from conftest import TwoLayers, tiny_gpt2, tiny_llama, tokens
from nblora import NBLoraConfig, NBLoraModel, RunawayWarning, certify, export_lora
from nblora.bounds import parse_norm
from nblora.cayley import tall_cayley
from nblora.tuner import NBLoraLayer, NBLoraType, nblora_layers

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


def plain_inputs() -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(4))


MODELS = {
    "plain": (TwoLayers, plain_inputs, ["first", "second"]),
    "llama": (tiny_llama, tokens, "all-linear"),
    "gpt2": (tiny_gpt2, tokens, ["c_attn", "c_proj", "c_fc"]),  # Conv1D, weights are (in, out)
}
every_model = pytest.mark.parametrize("kind", MODELS)
every_parametrization = pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(kind: str) -> tuple[nn.Module, Tensor, Any]:
    """A base model in eval mode, its inputs and layers to adapt."""
    build, inputs, targets = MODELS[kind]
    torch.manual_seed(1)
    return build().eval(), inputs(), targets


def plain(**choices: Any) -> PeftModel:
    """TwoLayers with an adapter on both layers."""
    config = {"r": 3, "target_modules": ["first", "second"]} | choices
    return get_peft_model(TwoLayers().eval(), NBLoraConfig(**config))


def out(model: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        y = model(x, **kwargs)
    return getattr(y, "logits", y)


def scatter(model: nn.Module, adapter: str = "default", scale: float = 0.5) -> None:
    """Give the free parameters of an adapter random values: all values are allowed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".nblora_" in name and f".{adapter}." in name:
                parameter.normal_(std=scale)


def layers(model: nn.Module, adapter: str = "default") -> list[NBLoraLayer]:
    found = list(nblora_layers(model, adapter).values())
    assert found
    return found


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.get_base_weight().clone() for layer in layers(model)]


def bits(weight: Tensor) -> Tensor:
    """What torch.equal does not see: the sign of zero, the payload of NaN."""
    return weight.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])


def changed(model: nn.Module, before: list[Tensor]) -> int:
    """How many entries of the base weights are not bitwise what they were."""
    after = weights(model)
    assert len(after) == len(before)
    return sum(int((bits(a) != bits(b)).sum()) for a, b in zip(after, before))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Equal up to the rounding of a few layers in a dtype."""
    eps = torch.finfo(dtype).eps
    scale = expected.float().abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), rtol=50 * eps, atol=50 * eps * scale)


def spectral(matrix: Tensor) -> float:
    return torch.linalg.svdvals(matrix.detach().double())[0].item()


# --- the start ---------------------------------------------------------------------------------------


@every_model
@every_parametrization
@pytest.mark.parametrize("norm", ["spectral", "frobenius", "nuclear", 3.5, "ky-fan-2"])
def test_the_start_is_exactly_the_base_model(kind: str, parametrization: str, norm: Any) -> None:
    base, x, targets = make(kind)
    expected = out(base, x)
    config = NBLoraConfig(r=4, target_modules=targets, parametrization=parametrization, norm=norm)
    model = get_peft_model(base, config)
    assert torch.equal(out(model, x), expected)
    for layer in layers(model):
        assert not layer.get_delta_weight("default").any()


@every_model
@every_parametrization
def test_only_the_adapter_is_trainable_and_its_names_are_safe(kind: str, parametrization: str) -> None:
    base, _, targets = make(kind)
    base_names = {name for name, _ in base.named_parameters()}
    model = get_peft_model(base, NBLoraConfig(r=4, target_modules=targets, parametrization=parametrization))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    adapter = {name for name, _ in model.named_parameters() if ".nblora_" in name}
    assert trainable == adapter
    assert len(dict(model.named_parameters())) == len(base_names) + len(adapter)
    for name in adapter:
        assert ".default." in name  # TRL and PEFT find adapters by it
        assert "lora_A" not in name  # LoRA+ would multiply their learning rate
        assert "lora_B" not in name
    for layer in layers(model):  # FSDP wraps leaf modules with a weight
        for part in layer.adapter_layer_names:
            for leaf in getattr(layer, part).values():
                assert not list(leaf.children())
                assert [name for name, _ in leaf.named_parameters()] == ["weight"]


@pytest.mark.parametrize(("r", "ranks"), [(1, (1, 1)), (5, (5, 5)), (8, (8, 5)), (400, (12, 5))])
@every_parametrization
def test_effective_rank_is_the_smallest_of_rank_and_sizes(
    r: int, ranks: tuple[int, int], parametrization: str
) -> None:
    model = plain(r=r, parametrization=parametrization)
    scatter(model)
    for layer, rank, (m, n) in zip(layers(model), ranks, [(20, 12), (5, 20)]):
        assert layer.r["default"] == rank
        free = layer.free_parameters("default")
        assert free.out.shape == (rank, m)
        assert free.into.shape == (rank, n)
        sigma = torch.linalg.svdvals(layer.get_delta_weight("default").detach())
        rounding = 10 * max(m, n) * torch.finfo(sigma.dtype).eps * sigma[0]
        assert (sigma > rounding).sum() == rank


@every_parametrization
@pytest.mark.parametrize("norm", ["spectral", "frobenius", "nuclear", "ky-fan-2"])
def test_random_start_is_not_zero_and_strictly_inside(parametrization: str, norm: str) -> None:
    model = plain(init_weights=False, parametrization=parametrization, norm=norm)
    for layer in layers(model):
        sigma = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double())
        share = parse_norm(norm).value(sigma) / layer.radius("default")
        assert 0.05 < share < 0.95


@every_parametrization
@pytest.mark.parametrize("norm", ["spectral", "frobenius", "nuclear"])
def test_weight_decay_without_gradient_creates_no_update(norm: str, parametrization: str) -> None:
    """An expert that is never routed to must stay what it was."""
    model = plain(parametrization=parametrization, norm=norm)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=1.0)
    for _ in range(50):
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for layer in layers(model):
        assert not layer.get_delta_weight("default").any()


def test_a_seed_gives_the_same_start() -> None:
    starts = []
    for _ in range(2):
        torch.manual_seed(5)
        base = TwoLayers()
        torch.manual_seed(6)
        starts.append(get_peft_model(base, NBLoraConfig(target_modules=["first"])).state_dict())
    assert all(torch.equal(value, starts[1][key]) for key, value in starts[0].items())


# --- which layers, ranks and bounds -----------------------------------------------------------------


def names(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in nblora_layers(model, "default")}


def test_rank_pattern_sets_the_rank_of_single_layers() -> None:
    config = NBLoraConfig(
        r=4, target_modules="all-linear", rank_pattern={"q_proj": 2, r"layers\.1\.mlp.*": 3}
    )
    model = get_peft_model(tiny_llama(), config)
    for name, layer in nblora_layers(model, "default").items():
        expected = 2 if name.endswith("q_proj") else 3 if "layers.1.mlp" in name else 4
        assert layer.r["default"] == expected, name


def test_bound_pattern_sets_the_bound_of_single_layers() -> None:
    pattern = {"q_proj": 0.01, r"layers\.1\.mlp.*": 2.5}
    config = NBLoraConfig(
        target_modules="all-linear", bound=0.2, bound_pattern=pattern, bound_kind="absolute"
    )
    model = get_peft_model(tiny_llama(), config)
    for name, layer in nblora_layers(model, "default").items():
        bound = 0.01 if name.endswith("q_proj") else 2.5 if "layers.1.mlp" in name else 0.2
        assert layer.radius("default").item() == pytest.approx(bound, rel=1e-7), name
        assert layer.radius("default").item() <= bound, name


def test_patterns_that_match_no_layer_warn() -> None:
    with pytest.warns(RuntimeWarning, match=r"bound_pattern has keys .* ignored: \['third'\]"):
        plain(bound_pattern={"first": 0.1, "third": 0.2})
    with pytest.warns(RuntimeWarning, match=r"rank_pattern .*third"):
        plain(rank_pattern={"third": 2})


@every_dtype
def test_relative_radius_is_the_bound_times_the_spectral_norm(dtype: torch.dtype) -> None:
    model = get_peft_model(tiny_llama(dtype), NBLoraConfig(target_modules="all-linear", bound=0.7))
    eps = torch.finfo(torch.float32).eps
    for layer in layers(model):
        weight = layer.get_base_weight()
        slack = 10 * max(weight.shape) * eps
        exact = 0.7 * spectral(weight)
        assert layer.radius("default").dtype == torch.float32
        assert exact * (1 - slack) <= layer.radius("default").item() <= exact * (1 + slack)


def test_absolute_radius_is_never_above_the_bound() -> None:
    for bound in (0.1, 0.3, 1 / 3, 1e-3, 7.7):  # none of them a float32
        for layer in layers(plain(bound=bound, bound_kind="absolute")):
            radius = layer.radius("default").item()
            assert bound * (1 - 2**-23) <= radius <= bound


def test_which_layers_are_adapted() -> None:
    attention = {f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "v_proj")}

    def adapted(**choices: Any) -> set[str]:
        return names(get_peft_model(tiny_llama(), NBLoraConfig(**choices)))

    assert adapted() == attention  # the architecture's default, that of LoRA
    assert adapted(target_modules=["q_proj", "v_proj"]) == attention
    assert adapted(target_modules=r".*self_attn\.(q|v)_proj") == attention
    every = adapted(target_modules="all-linear")
    assert len(every) == 14
    assert "lm_head" not in every
    assert adapted(target_modules="all-linear", exclude_modules=["q_proj"]) == {
        name for name in every if not name.endswith("q_proj")
    }
    second = {name for name in attention if ".1." in name}
    assert adapted(target_modules=["q_proj", "v_proj"], layers_to_transform=1) == second
    assert adapted(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1]) == attention
    assert (
        adapted(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers")
        == second
    )


def test_default_layers_of_gpt2_are_those_of_lora() -> None:
    model = get_peft_model(tiny_gpt2(), NBLoraConfig())
    assert names(model) == {"transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"}
    assert model.peft_config["default"].fan_in_fan_out is True


def test_a_model_of_no_known_architecture_needs_target_modules() -> None:
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(TwoLayers(), NBLoraConfig())


def test_modules_to_save_are_trained_fully() -> None:
    model = plain(target_modules=["first"], modules_to_save=["second"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and ".nblora_" not in name}
    assert trainable == {f"base_model.model.second.modules_to_save.default.{p}" for p in ("weight", "bias")}
    assert names(model) == {"first"}


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("all", {"base_model.model.first.base_layer.bias", "base_model.model.second.bias"}),
        ("nblora_only", {"base_model.model.first.base_layer.bias"}),
    ],
)
def test_biases_train_as_asked(bias: str, expected: set[str]) -> None:
    model = plain(target_modules=["first"], bias=bias)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and ".nblora_" not in name}
    assert trainable == expected


# --- training ---------------------------------------------------------------------------------------


def train(
    model: nn.Module, x: Tensor, steps: int, lr: float, parameters: Iterator[nn.Parameter] | None = None
) -> None:
    """Fit random outputs with AdamW."""
    optimizer = torch.optim.AdamW(parameters or model.parameters(), lr=lr)
    model.train()
    target = torch.randn(out(model.eval(), x).shape)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x)
        nn.functional.mse_loss(getattr(y, "logits", y), target).backward()
        optimizer.step()
    model.eval()


@every_model
@every_parametrization
@pytest.mark.parametrize("norm", ["spectral", "frobenius", "ky-fan-2"])
def test_gradient_reaches_every_free_parameter(kind: str, parametrization: str, norm: str) -> None:
    base, x, targets = make(kind)
    config = NBLoraConfig(r=3, target_modules=targets, parametrization=parametrization, norm=norm)
    model = get_peft_model(base, config)
    train(model, x, steps=1, lr=1e-2)  # at zero the update does not depend on some of them
    model.zero_grad()
    y = model(x)
    getattr(y, "logits", y).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


@every_parametrization
def test_dropout_is_active_in_training_only(parametrization: str) -> None:
    model = plain(dropout=0.5, parametrization=parametrization)
    scatter(model)
    x = plain_inputs()
    sure = out(model.eval(), x)
    assert torch.equal(out(model, x), sure)
    model.train()
    assert not torch.equal(out(model, x), out(model, x))
    model.eval()
    assert torch.equal(out(model, x), sure)
    without = plain(parametrization=parametrization)
    without.load_state_dict(model.state_dict())
    assert torch.equal(out(without, x), sure)
    assert torch.equal(out(without.train(), x), sure)


@every_parametrization
def test_training_that_runs_away_warns(parametrization: str) -> None:
    model = plain(parametrization=parametrization)
    with pytest.warns(RunawayWarning, match="Use a smaller learning rate"):
        train(model, plain_inputs(), steps=40, lr=100.0)


def test_merging_a_runaway_warns() -> None:
    model = plain()
    scatter(model, scale=1e6)
    with pytest.warns(RunawayWarning, match="have run away"):
        model.merge_adapter()


@every_parametrization
@pytest.mark.parametrize("lr", [1e-3, 3e-2])
def test_healthy_training_does_not_warn_and_learns(parametrization: str, lr: float) -> None:
    model = plain(parametrization=parametrization)  # any warning is an error in this suite
    x = plain_inputs()
    before = out(model, x)
    train(model, x, steps=80, lr=lr)
    model.merge_adapter()
    assert not torch.equal(out(model, x), before)


# --- several adapters -------------------------------------------------------------------------------


def two_adapters(kind: str = "plain") -> tuple[PeftModel, Tensor, nn.Module]:
    """A model with the scattered adapters "default" and "other", inputs, and its base model."""
    base, x, targets = make(kind)
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, NBLoraConfig(r=3, target_modules=targets))
    model.add_adapter("other", NBLoraConfig(r=2, target_modules=targets, norm="spectral", bound=0.6))
    scatter(model, "default")
    scatter(model, "other")
    return model.eval(), x, untouched


def with_updates(untouched: nn.Module, model: PeftModel, *adapters: str) -> nn.Module:
    """The base model with the updates of adapters added to its weights."""
    result = copy.deepcopy(untouched)
    for name, layer in nblora_layers(model, "default").items():
        target: Any = result.get_submodule(name.removeprefix("base_model.model."))
        for adapter in adapters:
            target.weight.data += layer.get_delta_weight(adapter).detach()
    return result


@every_model
def test_several_active_adapters_add_up(kind: str) -> None:
    model, x, untouched = two_adapters(kind)
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        close(out(model, x), out(with_updates(untouched, model, *active), x))
        assert not torch.allclose(out(model, x), out(untouched, x), atol=1e-4)


def test_an_added_adapter_waits_to_be_set_active() -> None:
    model, x, untouched = two_adapters()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".default." in name}
    assert model.active_adapters == ["default"]
    model.set_adapter("other")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".other." in name}
    close(out(model, x), out(with_updates(untouched, model, "other"), x))


def test_an_added_adapter_waits_in_layers_that_had_none_too() -> None:
    model = plain(target_modules=["first"])
    model.add_adapter("other", NBLoraConfig(target_modules=["second"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".default." in name}
    scatter(model)
    scatter(model, "other")
    x = plain_inputs()
    both = out(model, x)
    model.set_adapter("other")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".other." in name}
    only_other = out(model, x)
    model.set_adapter("default")
    assert not torch.equal(only_other, both)
    assert not torch.equal(out(model, x), only_other)


@every_model
def test_disabled_adapters_leave_exactly_the_base_model(kind: str) -> None:
    model, x, untouched = two_adapters(kind)
    adapted, expected = out(model, x), out(untouched, x)
    with model.disable_adapter():
        assert torch.equal(out(model, x), expected)
    assert torch.equal(out(model, x), adapted)
    model.base_model.disable_adapter_layers()
    assert torch.equal(out(model, x), expected)
    model.base_model.enable_adapter_layers()
    assert torch.equal(out(model, x), adapted)


def test_disabling_a_merged_adapter_unmerges_it() -> None:
    model, x, untouched = two_adapters()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(out(model, x), out(untouched, x))


def test_a_deleted_adapter_is_gone() -> None:
    model, x, untouched = two_adapters()
    expected = out(with_updates(untouched, model, "other"), x)
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert not [name for name in model.state_dict() if ".default." in name]
    assert list(model.peft_config) == ["other"]
    assert not nblora_layers(model, "default")
    close(out(model, x), expected)
    model.delete_adapter("other")
    assert torch.equal(out(model.base_model.model, x), out(untouched, x))


def test_an_adapter_can_be_added_again_with_other_choices() -> None:
    model, x, untouched = two_adapters()
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", NBLoraConfig(r=1, target_modules=["first"], parametrization="svd"))
    model.set_adapter("default")
    assert torch.equal(out(model, x), out(untouched, x))
    scatter(model)
    assert not torch.equal(out(model, x), out(untouched, x))


@pytest.mark.parametrize("kind", ["plain", "gpt2"])
def test_relative_radius_of_an_adapter_added_while_another_is_merged(kind: str) -> None:
    base, _, targets = make(kind)
    model = get_peft_model(base, NBLoraConfig(target_modules=targets, bound=50.0))
    true_norms = [spectral(weight) for weight in weights(model)]
    scatter(model)
    model.merge_adapter()
    merged = weights(model)
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # only after the new layers are made
        model.add_adapter("other", NBLoraConfig(target_modules=targets, bound=0.5))
    eps = torch.finfo(torch.float32).eps
    for layer, weight, norm in zip(layers(model, "other"), merged, true_norms):
        assert spectral(weight) > 2 * norm  # far larger than the true one, and so is its rounding
        slack = 10 * max(weight.shape) * eps * spectral(weight)
        assert layer.radius("other").item() == pytest.approx(0.5 * norm, abs=slack)


# --- merging ----------------------------------------------------------------------------------------


@every_model
@every_parametrization
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_model_computes_the_same(kind: str, parametrization: str, safe_merge: bool) -> None:
    base, x, targets = make(kind)
    model = get_peft_model(base, NBLoraConfig(r=3, target_modules=targets, parametrization=parametrization))
    scatter(model)
    before, expected = weights(model), out(model, x)
    model.merge_adapter(safe_merge=safe_merge)
    assert all(layer.merged for layer in layers(model))
    close(out(model, x), expected)
    for layer, weight in zip(layers(model), before):
        close(layer.get_base_weight() - weight, layer.get_delta_weight("default").detach())
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert changed(model, before) > 0
    model.unmerge_adapter()
    assert changed(model, before) == 0
    assert torch.equal(out(model, x), expected)


@every_dtype
@pytest.mark.parametrize("kind", ["plain", "llama", "gpt2"])
@pytest.mark.parametrize("share", [0.3, 1e4], ids=["usual", "enormous"])
@pytest.mark.parametrize("count", [1, 2], ids=["one", "two"])
def test_unmerging_restores_the_base_weights_bitwise(
    kind: str, dtype: torch.dtype, share: float, count: int
) -> None:
    base, _, targets = make(kind)
    base = base.to(dtype)
    for parameter in base.parameters():  # zeros and subnormal numbers are weights too
        if parameter.ndim == 2:
            parameter.data[0, :2] = torch.tensor([0.0, torch.finfo(dtype).tiny / 4])
    adapters = ["default", "other"][:count]
    for adapter in adapters:
        config = NBLoraConfig(r=4, target_modules=targets, bound=share, init_weights=False)
        if adapter == "default":
            model = get_peft_model(base, config)
        else:
            model.add_adapter(adapter, config)
    before = weights(model)
    for _ in range(3):
        model.merge_adapter(adapter_names=adapters)
        assert changed(model, before) > 0
        model.unmerge_adapter()
        assert changed(model, before) == 0
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@every_dtype
def test_unmerging_restores_the_sign_of_zero(dtype: torch.dtype) -> None:
    """Masked weights of pruned models have many of them."""
    base = TwoLayers().to(dtype)
    base.first.weight.data.mul_(torch.arange(12) % 2)
    assert (base.first.weight.signbit() & (base.first.weight == 0)).any()
    model = get_peft_model(base, NBLoraConfig(target_modules=["first"], init_weights=False))
    before = weights(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert changed(model, before) == 0


@every_dtype
@pytest.mark.parametrize("share", [0.3, 100.0])
def test_lora_never_unmerges_better(dtype: torch.dtype, share: float, tmp_path: Path) -> None:
    base = tiny_llama(dtype)
    untouched = copy.deepcopy(base)
    model = get_peft_model(
        base,
        NBLoraConfig(target_modules="all-linear", bound=share, init_weights=False, task_type="CAUSAL_LM"),
    )
    before = weights(model)
    lora = PeftModel.from_pretrained(untouched, export_lora(model, tmp_path / "lora"))
    peers = [module for module in lora.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(peers) == len(before)
    for each in (model, lora):
        each.merge_adapter()
        each.unmerge_adapter()
    theirs = sum(int((bits(p.get_base_weight()) != bits(b)).sum()) for p, b in zip(peers, before))
    assert changed(model, before) == 0 <= theirs


def test_unmerging_is_bitwise_under_autocast_too() -> None:
    """Evaluation loops run under autocast, and disabling a merged adapter there unmerges it."""
    model, x, untouched = two_adapters()
    before = weights(model)
    model.merge_adapter()
    with torch.autocast("cpu", torch.bfloat16), model.disable_adapter():
        out(model, x)
    assert changed(model, before) == 0
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
    model.unmerge_adapter()
    assert changed(model, before) == 0
    assert torch.equal(
        layers(model)[0].get_base_weight(), untouched.get_submodule("first").get_parameter("weight")
    )


def test_unmerging_is_bitwise_after_the_adapter_changed() -> None:
    """What was merged is taken out, not what the adapter has become since."""
    model, _, _ = two_adapters()
    before = weights(model)
    model.merge_adapter()
    scatter(model)
    model.unmerge_adapter()
    assert changed(model, before) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerging_weights_that_layers_share_leaves_rounding_alone(dtype: torch.dtype) -> None:
    base = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    base["b"].weight = base["a"].weight
    model = get_peft_model(base.to(dtype), NBLoraConfig(target_modules=["a", "b"], r=4, bound=1.0))
    scatter(model)
    before = layers(model)[0].get_base_weight().clone()
    for _ in range(3):
        model.merge_adapter()
        assert (layers(model)[0].get_base_weight() - before).abs().max() > 0.02
        model.unmerge_adapter()
    change = (layers(model)[0].get_base_weight() - before).abs().max()
    assert change <= 16 * torch.finfo(dtype).eps * before.abs().max()


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_safe_merge_refuses_what_is_not_finite(norm: str, broken: float) -> None:
    model = plain(norm=norm)
    scatter(model)
    before = weights(model)
    for layer in layers(model):
        layer.nblora_in["default"].weight.data[0, 0] = broken
    with pytest.raises(ValueError, match=r"must be finite, .* The adapter default seems"):
        model.merge_adapter(safe_merge=True)
    assert changed(model, before) == 0
    assert not any(layer.merged for layer in layers(model))
    model.merge_adapter()  # as asked: without the check
    model.unmerge_adapter()
    assert changed(model, before) == 0


def test_safe_merge_refuses_an_update_that_overflows() -> None:
    base = TwoLayers().to(torch.float16)
    model = get_peft_model(
        base, NBLoraConfig(target_modules=["first"], bound=1e6, bound_kind="absolute", init_weights=False)
    )
    before = weights(model)
    with pytest.raises(ValueError, match="must be finite"):
        model.merge_adapter(safe_merge=True)
    assert changed(model, before) == 0
    model.merge_adapter()
    assert not layers(model)[0].get_base_weight().isfinite().all()
    model.unmerge_adapter()
    assert changed(model, before) == 0


@every_model
def test_merge_and_unload_gives_a_plain_model(kind: str) -> None:
    model, x, untouched = two_adapters(kind)
    expected = out(with_updates(untouched, model, "other"), x)
    merged = model.merge_and_unload(adapter_names=["other"], safe_merge=True)
    assert not nblora_layers(merged, "default")
    assert [(n, type(m)) for n, m in merged.named_modules()] == [
        (n, type(m)) for n, m in untouched.named_modules()
    ]
    close(out(merged, x), expected)


@every_model
def test_unload_gives_back_the_base_model(kind: str) -> None:
    model, x, untouched = two_adapters(kind)
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == untouched.state_dict().keys()
    assert torch.equal(out(unloaded, x), out(untouched, x))


# --- dtypes -----------------------------------------------------------------------------------------


@every_dtype
@every_model
def test_forward_in_the_dtype_of_the_model(kind: str, dtype: torch.dtype) -> None:
    base, x, targets = make(kind)
    exact = copy.deepcopy(base).to(dtype).float()
    model = get_peft_model(base.to(dtype), NBLoraConfig(r=3, target_modules=targets))
    scatter(model)
    x = x if x.dtype == torch.long else x.to(dtype)
    y = out(model, x)
    assert y.dtype == dtype
    close(y, out(with_updates(exact, model, "default"), x if x.dtype == torch.long else x.float()), dtype)
    for name, parameter in model.named_parameters():
        if ".nblora_" in name:
            assert parameter.dtype == torch.float32, name
        else:
            assert parameter.dtype == dtype, name


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_free_parameters_are_never_rounded_to_half(dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    torch.manual_seed(8)
    base = TwoLayers().to(dtype)
    config = NBLoraConfig(target_modules=["first"], init_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    free = layers(model)[0].free_parameters("default")
    for tensor in (free.out, free.into):
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.to(dtype).float())


def test_a_float64_model_gets_a_float64_adapter() -> None:
    model = get_peft_model(TwoLayers().double(), NBLoraConfig(target_modules=["first"]))
    scatter(model)
    (layer,) = layers(model)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert layer.get_delta_weight("default").dtype == torch.float64
    assert layer.radius("default").dtype == torch.float64
    assert out(model, plain_inputs().double()).dtype == torch.float64


@every_parametrization
def test_factors_keep_their_precision_under_autocast(parametrization: str) -> None:
    norm = "frobenius" if parametrization == "radial" else "spectral"
    model = plain(parametrization=parametrization, norm=norm)
    scatter(model)
    x = plain_inputs()
    exact = out(model, x)
    for layer in layers(model):
        outside = layer.low_rank_update("default")
        delta = layer.get_delta_weight("default")
        with torch.autocast("cpu", torch.bfloat16):
            inside = layer.low_rank_update("default")
            assert torch.equal(layer.get_delta_weight("default"), delta)
        assert inside.left.dtype == inside.right.dtype == torch.float32
        assert torch.equal(inside.left, outside.left)
        assert torch.equal(inside.right, outside.right)
        slack = 10 * max(delta.shape) * torch.finfo(torch.float32).eps
        size = parse_norm(norm).value(torch.linalg.svdvals(delta.double())).item()
        assert size <= layer.radius("default").item() * (1 + slack)
    with torch.autocast("cpu", torch.bfloat16):
        y = out(model, x)
    assert y.dtype == torch.bfloat16
    close(y, exact, torch.bfloat16)


def test_training_under_autocast_moves_float32_parameters() -> None:
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(plain_inputs()).square().mean()
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda c: c.__name__
)
def test_casting_the_model_does_not_move_the_radius(cast: Any) -> None:
    model = plain(norm="spectral")
    scatter(model)
    before = [layer.radius("default").clone() for layer in layers(model)]
    cast(model)
    eps = torch.finfo(torch.float32).eps
    for layer, radius in zip(layers(model), before):
        assert torch.equal(layer.radius("default"), radius)
        assert layer.radius("default").dtype == torch.float32
        delta = layer.get_delta_weight("default")
        assert delta.dtype in (torch.float32, torch.float64)
        assert 0 < spectral(delta) <= radius.item() * (1 + 10 * max(delta.shape) * eps)


# --- copies -----------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(kind: str, merged: bool, copier: Any) -> None:
    base, x, targets = make(kind)
    model = get_peft_model(base, NBLoraConfig(r=3, target_modules=targets, dropout=0.1))
    model.eval()
    scatter(model)
    before = weights(model)
    if merged:
        model.merge_adapter()
    expected = out(model, x)
    twin = copier(model)
    assert torch.equal(out(twin, x), expected)
    if merged:
        twin.unmerge_adapter()
        assert changed(twin, before) == 0
    scatter(twin, scale=0.2)
    assert not torch.equal(out(twin, x), expected)
    assert torch.equal(out(model, x), expected)


# --- refusals and warnings --------------------------------------------------------------------------


def test_a_zero_base_weight_warns() -> None:
    base = TwoLayers()
    nn.init.zeros_(base.first.weight)
    with pytest.warns(UserWarning, match="base weight of layer 'first' is zero"):
        model = get_peft_model(base, NBLoraConfig(target_modules=["first"]))
    scatter(model)
    (layer,) = layers(model)
    assert layer.radius("default") == 0
    assert not layer.get_delta_weight("default").any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_base_weight_that_is_not_finite_is_refused_for_a_relative_bound(value: float) -> None:
    base = TwoLayers()
    base.second.weight.data[1, 2] = value
    with pytest.raises(ValueError, match=r"weight of layer 'second' must be finite .* got NaN or infinity"):
        get_peft_model(base, NBLoraConfig(target_modules=["second"]))


class Many(nn.Module):
    """Layers that NB-LoRA does not adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.shortening = nn.Embedding(7, 4, max_norm=1.0)
        self.packed = nn.Linear(8, 6)
        packed = torch.zeros(6 * 8 // 2, 1, dtype=torch.uint8)  # as 4-bit layers keep it
        self.packed.weight = nn.Parameter(packed, requires_grad=False)
        self.eight_bit = nn.Linear(8, 6)
        self.eight_bit.weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("norm", "adapts torch.nn.Linear, .* quantized linear layers, got LayerNorm at 'norm'"),
        ("shortening", "'shortening' must have max_norm=None, .* got max_norm=1.0"),
        (
            "packed",
            r"'packed' must have a floating-point weight of shape \(6, 8\), .* got \(24, 1\) torch.uint8",
        ),
        ("eight_bit", r"'eight_bit' must have a floating-point weight .*, got \(6, 8\) torch.int8"),
    ],
)
def test_layers_that_are_not_supported_are_refused(name: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        get_peft_model(Many(), NBLoraConfig(target_modules=[name]))


def test_an_unknown_adapter_of_a_layer_is_refused() -> None:
    (layer, *_) = layers(plain())
    with pytest.raises(ValueError, match=r"the adapter must be one of \['default'\], got 'other'"):
        layer.free_parameters("other")
    with pytest.raises(ValueError, match=r"the adapter must be one of \['default'\], got 'other'"):
        layer.low_rank_update("other")


def test_only_one_adapter_may_train_biases() -> None:
    model = plain(bias="all")
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("other", NBLoraConfig(target_modules=["first"], bias="all"))


# --- what PEFT asks of a method ---------------------------------------------------------------------


def test_status_of_model_and_layers() -> None:
    model, _, _ = two_adapters()
    status = model.get_model_status()
    assert status.adapter_model_type == "NBLoraModel"
    assert status.peft_types == {"default": "NBLORA", "other": "NBLORA"}
    assert status.num_adapter_layers == 2
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    first, second = model.get_layer_status()
    assert (first.name, second.name) == ("model.first", "model.second")
    for layer in (first, second):
        assert layer.module_type == "nblora.NBLoraLinear"
        assert layer.merged_adapters == ["default"]
        assert layer.available_adapters == ["default", "other"]
        assert layer.devices == {"default": ["cpu"], "other": ["cpu"]}


def test_the_printed_model_names_the_method() -> None:
    assert "nblora.NBLoraLinear" in repr(plain())


def test_registering_again_changes_nothing() -> None:
    nblora.tuner.register()
    nblora.tuner.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[NBLoraType.NBLORA] is NBLoraConfig
    assert PEFT_TYPE_TO_CONFIG_MAPPING["NBLORA"] is NBLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["NBLORA"] is NBLoraModel
    assert isinstance(plain(), PeftModel)


def test_registering_refuses_a_foreign_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, NBLoraType.NBLORA, LoraConfig)
    with pytest.raises(RuntimeError, match="must not have a method named NBLORA of its own"):
        nblora.tuner.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[NBLoraType.NBLORA] is LoraConfig


def test_registering_refuses_a_future_peft_with_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class FutureType(str, enum.Enum):
        LORA = "LORA"
        NBLORA = "NBLORA"

    monkeypatch.setattr(peft, "PeftType", FutureType)
    with pytest.raises(RuntimeError, match="must not have a method named NBLORA of its own"):
        nblora.tuner.register()


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_temperature_of_the_configuration_reaches_the_layer(temperature: float) -> None:
    """With unequal logits, bounds depend on it; with the formula of MATH.md §4."""
    config = NBLoraConfig(r=4, temperature=temperature, init_weights=False, target_modules=["first"])
    layer = get_peft_model(TwoLayers(), config).base_model.model.first
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    with torch.no_grad():
        layer.nblora_scale["default"].weight.copy_(logits[:, None])
    expected = layer.radius("default") * torch.softmax(logits / temperature, -1).sqrt()
    free = layer.free_parameters("default")
    columns = torch.cat([free.into, free.out], dim=-1).mT
    outer = tall_cayley(columns)[12:]
    torch.testing.assert_close(layer.low_rank_update("default").left, 2 * outer * expected)


def test_no_parameter_is_a_vector_and_checkpoints_that_had_vectors_load(tmp_path: Path) -> None:
    """LoRA+ and others take vectors for biases."""
    model, x = plain(parametrization="svd", init_weights=False), plain_inputs()
    assert all(p.ndim >= 2 for name, p in model.named_parameters() if ".nblora_" in name)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {
        name: tensor[..., 0] if "_angle." in name or "_scale." in name else tensor
        for name, tensor in load_file(file).items()
    }
    assert {
        tuple(old[f"base_model.model.first.nblora_{part}.weight"].shape) for part in ("angle", "scale")
    } == {(3,)}
    certificate = certify(tmp_path)
    save_file(old, file, metadata={"format": "pt"})
    assert certify(tmp_path) == certificate
    for lean in (False, True):
        base = copy.deepcopy(model).unload()
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=lean).eval()
        assert torch.equal(out(loaded, x), out(model, x))


@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
def test_a_model_on_the_meta_device_has_shapes(parametrization: str) -> None:
    config = NBLoraConfig(r=4, parametrization=parametrization, target_modules=["first", "second"])
    with torch.device("meta"):
        model = get_peft_model(TwoLayers(), config)
    model.to("meta")
    assert model(torch.empty(2, 12, device="meta")).shape == (2, 5)


def test_another_default_device_changes_nothing() -> None:
    """Radii and starts are made on the CPU, whatever torch's default device is."""
    config = NBLoraConfig(r=4, target_modules=["first"])
    base = TwoLayers(n=300, hidden=400)
    torch.manual_seed(0)
    plain = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(0)
    with torch.device("meta"):
        other = get_peft_model(base, config)
    for (name, ours), (_, theirs) in zip(plain.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("bound", [1e-2, 1e-4, 1e-6])
def test_small_bounds_are_not_lost_in_float16(bound: float) -> None:
    """One of the factors would be subnormal, or zero, if it carried the whole size of the update."""
    config = NBLoraConfig(
        r=8, bound=bound, bound_kind="absolute", init_weights=False, target_modules=["first"]
    )
    layer = get_peft_model(TwoLayers(n=512, hidden=512).half(), config).base_model.model.first
    update = layer.low_rank_update("default")
    x = torch.randn(64, 512).half()
    expected = x.float() @ update.dense().mT
    got = update.apply(x).float()
    resolution = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    torch.testing.assert_close(got, expected, rtol=0, atol=0.01 * expected.abs().max().item() + resolution)
