"""Several adapters at once: mixed batches, sums, scales, and factors that are kept but never stale."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from conftest import TwoLayers, tiny_llama, tokens
from nblora import NBLoraConfig, certify
from nblora.checkpoints import AdapterError
from nblora.tuner import NBLoraLayer, nblora_layers
from test_tuner import layers, out, plain, plain_inputs, scatter


def dense(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    return [layer.get_delta_weight(adapter).detach() for layer in layers(model, adapter)]


def spectra(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    return [torch.linalg.svdvals(delta.double()) for delta in dense(model, adapter)]


def three(**options: Any) -> PeftModel:
    """TwoLayers with random adapters "default", "two" and "three", the last on one layer only."""
    model = plain(**options)
    for name, r, targets in (("two", 2, ["first", "second"]), ("three", 4, ["first"])):
        model.add_adapter(name, NBLoraConfig(**({"r": r, "target_modules": targets} | options)))
    for name in ("default", "two", "three"):
        scatter(model, name)
    return model.eval()


# --- a different adapter for each sample ------------------------------------------------------------


def logits(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(x, **options).logits


def two_on_llama(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = {"r": 2, "init_weights": False, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(tiny_llama().eval(), NBLoraConfig(**config))
    model.add_adapter("other", NBLoraConfig(**(config | {"r": 3})))
    return model.eval()


def test_a_mixed_batch_is_each_sample_by_its_adapter() -> None:
    model, x = two_on_llama(target_modules="all-linear"), tokens().repeat(3, 1)
    names = ["other", "__base__", "default", "default", "__base__", "other"]
    mixed = logits(model, x, adapter_names=names)
    for i, name in enumerate(names):
        alone = logits(model, x[i : i + 1], adapter_names=[name])
        torch.testing.assert_close(mixed[i : i + 1], alone, atol=2e-6, rtol=1e-5)
    model.set_adapter("other")
    torch.testing.assert_close(mixed[[0, 5]], logits(model, x[[0, 5]]), atol=2e-6, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[[1, 4]], logits(model, x[[1, 4]]), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(mixed[0], mixed[2], atol=1e-3)
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_generates(beams: int) -> None:
    model, x = two_on_llama(), tokens()
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    mixed = model.generate(input_ids=x, adapter_names=["other", "default"], **options)
    for i, name in enumerate(["other", "default"]):
        alone = model.generate(input_ids=x[i : i + 1], adapter_names=[name], **options)
        assert torch.equal(mixed[i : i + 1], alone)


def test_mixed_batches_go_through_trained_copies_of_modules_too() -> None:
    model, x = two_on_llama(modules_to_save=["lm_head"]), tokens()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.other" in name:
                parameter.add_(0.1)
    mixed = logits(model, x, adapter_names=["other", "default"])
    model.set_adapter("other")
    torch.testing.assert_close(mixed[:1], logits(model, x[:1]), atol=2e-6, rtol=1e-5)


def test_wrong_mixed_batches_are_refused() -> None:
    model, x = two_on_llama(), tokens()
    with pytest.raises(ValueError, match="same as the number of inputs, but got 3 and 2"):
        model(x, adapter_names=["other", "default", "default"])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody, typo"):
        model(x, adapter_names=["typo", "nobody"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(x, adapter_names=["other", "default"])
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model.train()(x, adapter_names=["other", "default"])
    assert all(not module._forward_pre_hooks for module in model.modules())


# --- factors kept between calls ---------------------------------------------------------------------


def keeps(layer: NBLoraLayer) -> bool:
    return any(slot.kept is not None for slots in layer._slots.values() for slot in slots.values())


def every_change(x: Tensor, tmp_path: Path) -> dict[str, Callable[[PeftModel], object]]:
    """Each way in which what an adapted layer computes can change."""

    def optimizer_step(model: PeftModel) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(x).sum().backward()
        optimizer.step()

    def fused_step(model: PeftModel) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model(x).sum().backward()
        optimizer.step()

    def in_place(model: PeftModel) -> None:
        with torch.no_grad():
            layers(model)[0].nblora_out["default"].weight.mul_(0.5)

    def through_data(model: PeftModel) -> None:  # no version counter sees it
        layers(model)[0].nblora_out["default"].weight.data.mul_(0.5)

    def through_numpy(model: PeftModel) -> None:
        layers(model)[0].nblora_in["default"].weight.detach().numpy()[0, 5] += 1

    def new_data(model: PeftModel) -> None:
        weight = layers(model)[0].nblora_out["default"].weight
        weight.data = 0.5 * weight.data

    def new_parameter(model: PeftModel) -> None:
        leaf = layers(model)[0].nblora_out["default"]
        leaf.weight = nn.Parameter(0.5 * leaf.weight.detach())

    def new_bound(model: PeftModel) -> None:
        layers(model)[0].nblora_radius["default"].weight.mul_(0.5)

    def other_state(model: PeftModel) -> dict[str, Tensor]:
        other = copy.deepcopy(model)
        scatter(other)
        return other.state_dict()

    def reload(model: PeftModel) -> None:
        model.load_state_dict(other_state(model))

    def reload_assigning(model: PeftModel) -> None:
        model.load_state_dict(other_state(model), assign=True)

    def reload_by_peft(model: PeftModel) -> None:
        other = copy.deepcopy(model)
        scatter(other)
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))

    def load_adapter(model: PeftModel) -> None:
        other = copy.deepcopy(model)
        scatter(other)
        other.save_pretrained(tmp_path, selected_adapters=["default"])
        model.load_adapter(tmp_path, "default")

    def switch(model: PeftModel) -> None:
        model.set_adapter("two")

    def replace(model: PeftModel) -> None:
        model.set_adapter("two")
        model.delete_adapter("default")
        model.add_adapter("default", NBLoraConfig(target_modules=["first"], init_weights=False))
        model.set_adapter("default")

    def rescale(model: PeftModel) -> None:
        for layer in layers(model):
            layer.set_scale("default", 0.5)

    def to_double(model: PeftModel) -> None:
        scatter(model)
        model.double()

    def swap(model: PeftModel) -> None:
        leaf = layers(model)[0].nblora_out["default"]
        torch.utils.swap_tensors(leaf.weight, nn.Parameter(0.5 * leaf.weight.detach()))

    return {change.__name__: change for change in locals().values() if callable(change)} | {
        "combine": lambda model: (
            model.base_model.add_weighted_adapter(["default", "two"], [1, 1], "sum"),
            model.set_adapter("sum"),
        ),
    }


CHANGES = sorted(every_change(plain_inputs(), Path()).keys() - {"other_state", "x", "tmp_path"})


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
def test_kept_factors_are_never_stale(change: str, parametrization: str, tmp_path: Path) -> None:
    model, x = three(parametrization=parametrization), plain_inputs()
    before = out(model, x)
    assert keeps(layers(model)[0]), "nothing was kept, so nothing is tested"
    every_change(x, tmp_path)[change](model)
    x = x.to(next(model.parameters()).dtype)
    now = out(model, x)
    fresh = pickle.loads(pickle.dumps(model))  # copies start without kept factors
    assert all(not keeps(m) for m in fresh.modules() if isinstance(m, NBLoraLayer))
    assert torch.equal(now, out(fresh, x))
    with torch.enable_grad():
        assert torch.equal(now, model(x).detach())
    assert now.dtype != before.dtype or not torch.allclose(now, before, atol=1e-4), "the change had no effect"


def test_factors_are_made_once_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    import nblora.tuner.weights as weights

    made = []
    original = weights.bounded_updates
    monkeypatch.setattr(weights, "bounded_updates", lambda *a, **k: made.append(1) or original(*a, **k))
    model, x = three(), plain_inputs()
    for _ in range(3):
        out(model, x)
    assert len(made) == 1  # for both layers together
    with torch.inference_mode():
        model(x)
    assert len(made) == 1
    model.train()
    model.eval()
    out(model, x)
    assert len(made) == 2
    with torch.enable_grad():
        model(x).sum().backward()  # what was kept had no gradients
    assert len(made) == 3
    assert layers(model)[0].nblora_out["default"].weight.grad is not None


def test_factors_kept_in_inference_mode_serve_training_and_saving() -> None:
    model, x = three(), plain_inputs()
    with torch.inference_mode():
        model(x)
    out(model, x)
    model.train()(x).sum().backward()
    torch.save(model, io.BytesIO())
    model.eval()
    with torch.inference_mode():
        model(x)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


def test_adapters_made_or_loaded_in_inference_mode_run(tmp_path: Path) -> None:
    three().save_pretrained(tmp_path)
    with torch.inference_mode():
        made = plain(init_weights=False).eval()
        loaded = PeftModel.from_pretrained(TwoLayers(), tmp_path).eval()
    for model in (made, loaded):
        first = out(model, plain_inputs())
        assert keeps(layers(model)[0])
        assert torch.equal(out(model, plain_inputs()), first)


def test_stacked_adapters_run_under_vmap() -> None:
    models, x = [three(), three()], plain_inputs()
    model = models[0]
    stacked = {
        name: torch.stack([dict(one.named_parameters())[name].detach() for one in models])
        for name, _ in model.named_parameters()
        if ".nblora_" in name
    }
    with torch.no_grad():
        results = torch.vmap(lambda weights: torch.func.functional_call(model, weights, (x,)))(stacked)
        torch.testing.assert_close(results[0], model(x), atol=2e-6, rtol=1e-5)


def test_what_is_offloaded_runs_and_says_why_it_is_not_certified() -> None:
    model, x = three(), plain_inputs()
    expected = out(model, x)
    cpu_offload(model, execution_device="cpu", offload_buffers=True)
    torch.testing.assert_close(out(model, x), expected)
    with pytest.raises(AdapterError, match="must be in memory, got tensors that are offloaded"):
        certify(model)


def test_an_adapter_that_was_never_loaded_is_not_used() -> None:
    with torch.device("meta"):
        base = TwoLayers()
    model = get_peft_model(base, NBLoraConfig(target_modules=["first"])).eval()
    layer = layers(model)[0]
    layer.base_layer.to_empty(device="cpu")
    with pytest.raises(ValueError, match="adapter 'default' must be loaded before it is used"):
        layer(plain_inputs())


def test_moved_modules_are_not_read_but_called() -> None:
    """Offloading and FSDP have hooks that bring a tensor for the time of a call."""
    model, x = three(), plain_inputs()
    layer = layers(model)[0]
    calls = []
    layer.nblora_out["default"].register_forward_pre_hook(lambda *_: calls.append(1))
    out(model, x)
    out(model, x)
    assert len(calls) == 2
    assert not keeps(layer)


# --- scale ------------------------------------------------------------------------------------------


def test_scales_multiply_updates_and_move_the_bound() -> None:
    model, x = three(), plain_inputs()
    before, exact, base = dense(model), out(model, x), None
    with model.disable_adapter():
        base = out(model, x)
    radii = [layer.bound for layer in certify(model).layers]
    for layer in layers(model):
        layer.set_scale("default", 2.5)
        layer.set_scale("nobody", 3.0)  # PEFT and diffusers call every layer with every name
    for scaled, delta in zip(dense(model), before):
        torch.testing.assert_close(scaled, 2.5 * delta)
    assert not torch.allclose(out(model, x), exact)
    certificate = certify(model)
    assert certificate.holds
    assert [layer.bound for layer in certificate.layers] == pytest.approx([2.5 * r for r in radii])
    assert "2.5" in certificate.to_table()
    for layer in layers(model):
        layer.scale_layer(2.0)
        assert layer.scaling["default"] == 5.0
        layer.unscale_layer(4.0)
        assert layer.scaling["default"] == 1.25
        layer.unscale_layer()
        assert layer.scaling["default"] == 1.0
    assert torch.equal(out(model, x), exact)
    for layer in layers(model):
        layer.set_scale("default", 0.0)
    assert torch.equal(out(model, x), base)
    layer = layers(model)[0]
    layer.set_scale("default", 1.0)
    for wrong in (
        lambda: layer.set_scale("default", math.nan),
        lambda: layer.scale_layer(math.inf),
        lambda: [layer.scale_layer(1e200) for _ in range(2)],
        lambda: layer.unscale_layer(0),
    ):
        with pytest.raises(ValueError, match=r"scale must be a finite number, got scale=(nan|inf)"):
            wrong()
        assert math.isfinite(layer.scaling["default"])


def test_scaled_adapters_merge_and_unmerge() -> None:
    model, x = three(), plain_inputs()
    for layer in layers(model):
        layer.set_scale("default", -1.5)
    before, weights = out(model, x), [layer.get_base_weight().clone() for layer in layers(model)]
    model.merge_adapter()
    torch.testing.assert_close(out(model, x), before, atol=2e-6, rtol=1e-5)
    for layer in layers(model):
        layer.set_scale("default", 1.0)  # what was merged is taken out, not what would be now
    model.unmerge_adapter()
    assert all(torch.equal(w, layer.get_base_weight()) for w, layer in zip(weights, layers(model)))


def test_peft_refuses_its_scaling_helper_with_a_reason() -> None:
    model = three()
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 0.5),
    ):
        pass


def test_diffusers_set_adapters() -> None:
    """What `pipe.set_adapters(names, weights)` does to the layers of a pipeline's model."""
    utils = pytest.importorskip("diffusers.utils.peft_utils")
    model, x = three(), plain_inputs()
    expected = [0.7 * a + 0.2 * b for a, b in zip(dense(model), dense(model, "two"))]
    utils.set_weights_and_activate_adapters(model, ["default", "two"], [0.7, 0.2])
    assert layers(model)[0].active_adapters == ["default", "two"]
    base = copy.deepcopy(model).unload()
    with torch.no_grad():
        base.first.weight += expected[0]
        base.second.weight += expected[1]
    torch.testing.assert_close(out(model, x), out(base, x), atol=2e-6, rtol=1e-5)


# --- weighted sums ----------------------------------------------------------------------------------

WEIGHTS = {"default": 0.7, "two": -1.3, "three": 0.4}


def weighted(model: PeftModel, layer: NBLoraLayer) -> tuple[Tensor, float]:
    """Σ w ΔW and Σ |w| radius of a layer, over the adapters that it has."""
    present = [name for name in WEIGHTS if layer.has_adapter(name)]
    total = sum(WEIGHTS[name] * layer.get_delta_weight(name).double() for name in present)
    return total.detach(), sum(abs(WEIGHTS[n]) * layer.radius(n).item() for n in present)


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "nuclear", "ky-fan-2", 3.0])
@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
@pytest.mark.parametrize("bound_kind", ["relative", "absolute"])
def test_a_weighted_sum_is_exact_and_has_the_bound_of_the_triangle(
    norm: str | float, parametrization: str, bound_kind: str
) -> None:
    model = three(norm=norm, parametrization=parametrization, bound_kind=bound_kind)
    model.base_model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum")
    bounds = {layer.name: layer.bound for layer in certify(model, "sum").layers}
    for name, layer in nblora_layers(model, "sum").items():
        total, radius = weighted(model, layer)
        torch.testing.assert_close(layer.get_delta_weight("sum").double(), total, atol=1e-5, rtol=1e-4)
        assert layer.radius("sum").item() == pytest.approx(radius, rel=1e-6)
        assert bounds[name.removeprefix("base_model.model.")] == pytest.approx(radius, rel=1e-6)
    assert certify(model, "sum").holds
    assert model.active_adapters == ["default"]


def test_scales_count_in_a_sum() -> None:
    model = three()
    expected = [3.0 * 0.5 * a - b for a, b in zip(dense(model), dense(model, "two"))]
    radii = [1.5 * one.radius("default") + one.radius("two") for one in layers(model)]
    for layer in layers(model):
        layer.set_scale("default", 3.0)
    model.base_model.add_weighted_adapter(["default", "two"], [0.5, -1.0], "sum")
    for layer, delta, radius in zip(layers(model, "sum"), expected, radii):
        torch.testing.assert_close(layer.get_delta_weight("sum"), delta, atol=1e-5, rtol=1e-4)
        assert layer.radius("sum").item() == pytest.approx(radius.item(), rel=1e-6)


def test_a_sum_on_a_smaller_ball_is_projected() -> None:
    model = three(norm="frobenius")
    model.base_model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "small", bound=0.05)
    for layer in layers(model, "small"):
        total = layer.get_delta_weight("default") + layer.get_delta_weight("two")
        radius = 0.05 * (layer.radius("default") + layer.radius("two")).item()
        assert total.norm() > 2 * radius, "the sum must be outside for this test"
        assert layer.radius("small").item() == pytest.approx(radius, rel=1e-6)
        torch.testing.assert_close(  # the nearest point of a Frobenius ball
            layer.get_delta_weight("small"), total * (radius / total.norm()), atol=1e-6, rtol=1e-4
        )


def test_a_sum_of_lower_rank_is_the_best_approximation() -> None:
    model = three(norm="spectral")
    model.base_model.add_weighted_adapter(["default", "two"], [1.0, 2.0], "low", "svd", 2)
    for layer in layers(model, "low"):
        total = (layer.get_delta_weight("default") + 2 * layer.get_delta_weight("two")).double().detach()
        u, s, vh = torch.linalg.svd(total)
        best = u[:, :2] * s[:2] @ vh[:2]
        torch.testing.assert_close(layer.get_delta_weight("low").double(), best, atol=1e-5, rtol=1e-4)
        assert layer.r["low"] == 2


def test_a_sum_is_an_adapter_like_any_other(tmp_path: Path) -> None:
    model, x = three(), plain_inputs()
    model.base_model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert not any(".sum." in name for name in trainable)
    model.set_adapter("sum")
    expected = out(model, x)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "sum").eval()
    assert torch.equal(out(loaded, x), expected)
    certificate = certify(tmp_path / "sum")
    assert certificate.holds
    assert [layer.bound for layer in certificate.layers] == pytest.approx(
        [layer.radius("sum").item() for layer in layers(model, "sum")]
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=100.0)
    model.train()(x).sum().backward()  # trains on, inside its own ball
    optimizer.step()
    assert certify(model, "sum").holds
    assert not torch.equal(out(model.eval(), x), expected)


def test_layers_with_alike_names_keep_their_own_bounds() -> None:
    """PEFT lets a pattern match the end of a name, so "lin" must not speak for "block.lin"."""
    base = nn.ModuleDict(
        {"lin": nn.Linear(4, 4), "block": nn.ModuleDict({"lin": nn.Linear(4, 4), "xlin": nn.Linear(4, 4)})}
    )
    with torch.no_grad():
        base["block"]["lin"].weight *= 10
    config = NBLoraConfig(target_modules=["lin", "xlin"], init_weights=False, r=2)
    model = get_peft_model(base, config)
    model.add_adapter("two", config)
    model.base_model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "sum")
    for layer in layers(model, "sum"):
        assert layer.radius("sum").item() == pytest.approx(2 * layer.radius("default").item(), rel=1e-6)
    assert [one.bound for one in certify(model, "sum").layers] == pytest.approx(
        [2 * one.bound for one in certify(model).layers], rel=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (["default", "nobody"], [1, 1], "sum"),
            {},
            r"adapters must be .* out of \['default', 'three', 'two'\], got",
        ),
        ((["two", "two"], [1, 1], "sum"), {}, "adapters must be different names"),
        (([], [], "sum"), {}, "adapters must be different names"),
        ((["default", "two"], [1], "sum"), {}, r"one finite number for each of 2 adapters, got \[1\]"),
        ((["default", "two"], [1, math.inf], "sum"), {}, r"one finite number .*, got \[1, inf\]"),
        ((["default", "two"], [1, 1], "three"), {}, "adapter_name must be new and without dots, got 'three'"),
        ((["default", "two"], [1, 1], "a.b"), {}, "adapter_name must be new and without dots, got 'a.b'"),
        ((["default", "two"], [1, 1], "sum", "linear"), {}, 'must be "cat" or "svd", .* got \'linear\''),
        ((["default", "two"], [1, 1], "sum", "cat", 2), {}, 'svd_rank must be .* only for "svd"'),
        ((["default", "two"], [1, 1], "sum", "svd", 0), {}, "svd_rank must be an integer >= 1"),
        ((["default", "two"], [1, 1], "sum"), {"bound": 1.5}, r"bound must be in \(0, 1\], .* got bound=1.5"),
        ((["default", "two"], 1.0, "sum"), {}, r"one finite number for each of 2 adapters, got 1\.0"),
        ((["default", "two"], [1, "1"], "sum"), {}, r"one finite number for each .*, got \[1, '1'\]"),
        ((["default", "two"], [1, 1e300], "sum"), {}, "the sum of adapters must be finite, got NaN or inf"),
        ((["default", "two"], [1, 1], "sum"), {"bound": True}, r"bound must be in .* got bound=True"),
        ((["default", "two"], [1, 1], "sum"), {"bound": 0}, r"bound must be in \(0, 1\], .* got bound=0"),
    ],
)
def test_wrong_sums_are_refused_and_change_nothing(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    model, x = three(), plain_inputs()
    before, configs = out(model, x), dict(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(*arguments, **options)
    assert torch.equal(out(model, x), before)
    assert model.peft_config == configs
    assert not any("sum" in name for name, _ in model.named_modules())


def test_sums_take_what_loras_take_and_refuse_what_has_no_meaning() -> None:
    model = three()
    add = model.base_model.add_weighted_adapter
    add(["default", "two"], [1, 1], "sum", "svd", svd_rank=2, density=0.5, majority_sign_method="total")
    add(["default", "two"], [1, 1], "same", "svd", 2)
    assert all(torch.equal(a, b) for a, b in zip(dense(model, "sum"), dense(model, "same")))
    for wrong in ({"svd_clamp": 0.9}, {"densty": 0.5}):
        with pytest.raises(ValueError, match=rf"sums are exact, got \['{next(iter(wrong))}'\]"):
            add(["default", "two"], [1, 1], "wrong", **wrong)
    saving = plain(target_modules=["first"], modules_to_save=["second"])
    saving.add_adapter("two", NBLoraConfig(target_modules=["first"], modules_to_save=["second"]))
    with pytest.raises(ValueError, match=r"same module with modules_to_save, but found 1 such instance"):
        saving.base_model.add_weighted_adapter(["default", "two"], [1, 1], "sum")


def test_sums_need_one_norm_and_finite_updates() -> None:
    model = plain(norm="nuclear")
    model.add_adapter("two", NBLoraConfig(target_modules=["first"], norm="frobenius"))
    with pytest.raises(ValueError, match=r"the same norm, got {'default': 'nuclear', 'two': 'frobenius'}"):
        model.base_model.add_weighted_adapter(["default", "two"], [1, 1], "sum")
    model = three()
    with torch.no_grad():
        layers(model)[1].nblora_in["two"].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="the sum of adapters must be finite, got NaN or infinity from"):
        model.base_model.add_weighted_adapter(["default", "two"], [1, 1], "sum")
    assert "sum" not in model.peft_config


# --- doors of PEFT ----------------------------------------------------------------------------------


def test_a_model_can_be_injected_without_a_wrapper() -> None:
    base, x = TwoLayers().eval(), plain_inputs()
    expected = out(base, x)
    model = inject_adapter_in_model(NBLoraConfig(target_modules=["first"], r=2), base)
    assert torch.equal(out(model, x), expected)
    scatter(model)
    assert not torch.equal(out(model, x), expected)
    assert certify(model).holds


def test_peft_refuses_hotswap_and_loading_over_an_adapter_swaps(tmp_path: Path) -> None:
    model, x = plain(), plain_inputs()
    other = copy.deepcopy(model)
    scatter(other)
    other.save_pretrained(tmp_path)
    out(model, x)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but NBLORA was passed"):
        hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    model.load_adapter(tmp_path, "default")
    assert torch.equal(out(model, x), out(other, x))


def test_single_tokens_can_be_trained_fully(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = tiny_llama().eval(), tokens()
    config = NBLoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 7], task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x[0, 0] = 3
    for _ in range(2):
        model(x, labels=x).loss.backward()
        optimizer.step()
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(loaded, x), logits(model, x))
    merged = model.merge_and_unload()
    changed = (merged.model.embed_tokens.weight != base.model.embed_tokens.weight).any(1).nonzero()[:, 0]
    assert set(changed.tolist()) <= {3, 7}
    assert 3 in changed


def test_tied_embeddings_are_warned_about() -> None:
    base = tiny_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    with pytest.warns(UserWarning, match="tie_word_embeddings=True` and a tied layer is part of the adapter"):
        get_peft_model(base, NBLoraConfig(target_modules=["embed_tokens"]))
