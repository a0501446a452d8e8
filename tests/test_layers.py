"""Every kind of layer and parameter that NB-LoRA adapts, by one contract."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.utils import parametrize
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from conftest import tokens
from nblora import NBLoraConfig, certify, export_lora
from nblora.checkpoints import AdapterError
from nblora.tuner import nblora_layers


class ScaledEmbedding(nn.Embedding):
    """Multiplies what it looks up, as Gemma's does."""

    embed_scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


class Experts(nn.Module):
    """A mixture of linear experts in two bare parameters, each sample through one of them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = torch.randn(4, 6, 5), torch.randn(4, 7, 6)  # (experts, out, in)
        self.up = nn.Parameter(up.mT.contiguous() if transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if transposed else down)
        self.mix = nn.Parameter(torch.randn(7, 7))

    def forward(self, x: Tensor) -> Tensor:
        expert = torch.arange(len(x)) % 4
        up, down = (w if self.is_transposed else w.mT for w in (self.up, self.down))
        hidden = torch.einsum("bi,bio->bo", x, up[expert]).tanh()
        return torch.einsum("bi,bio->bo", hidden, down[expert]) @ self.mix.mT


class Around(nn.Module):
    """A module with one layer to adapt, named `layer`, between others that are not adapted."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


@dataclass(frozen=True)
class Kind:
    """How to make a layer and inputs; its parameters to adapt, and each as matrices (..., m, n)."""

    layer: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    matrices: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=lambda: {"weight": rows})
    bare: bool = False  # by target_parameters

    def config(self, **options: Any) -> NBLoraConfig:
        if self.bare:
            targets: dict[str, Any] = {"target_parameters": [f"layer.{name}" for name in self.matrices]}
            targets["target_modules"] = []
        else:
            targets = {"target_modules": ["layer"]}
        return NBLoraConfig(**({"r": 3} | targets | options))


def rows(weight: Tensor) -> Tensor:
    return weight.reshape(len(weight), -1)


def as_is(weight: Tensor) -> Tensor:
    return weight


def transpose(weight: Tensor) -> Tensor:
    return weight.mT


def indices() -> Tensor:
    return torch.randint(11, (5, 4), generator=torch.Generator().manual_seed(0))


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(0))


KINDS = {
    "linear": Kind(lambda: nn.Linear(6, 5), numbers(5, 6)),
    "Conv1D": Kind(lambda: Conv1D(5, 6), numbers(5, 6), {"weight": transpose}),
    "conv1d": Kind(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), numbers(5, 4, 9)),
    "conv2d": Kind(lambda: nn.Conv2d(3, 6, (3, 5), padding="same"), numbers(5, 3, 7, 8)),
    "conv2d 1x1": Kind(lambda: nn.Conv2d(4, 6, 1, bias=False), numbers(5, 4, 3, 3)),
    "conv2d dilated, circular": Kind(
        lambda: nn.Conv2d(3, 6, 3, stride=(2, 1), dilation=2, padding=2, padding_mode="circular"),
        numbers(5, 3, 9, 9),
    ),
    "conv2d in groups": Kind(lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), numbers(5, 4, 6, 6)),
    "conv1d depthwise": Kind(lambda: nn.Conv1d(6, 6, 4, groups=6), numbers(5, 6, 9)),
    "conv3d": Kind(lambda: nn.Conv3d(2, 4, 2), numbers(5, 2, 4, 5, 3)),
    "embedding": Kind(lambda: nn.Embedding(11, 6, padding_idx=2), indices, {"weight": transpose}),
    "scaled embedding": Kind(lambda: ScaledEmbedding(11, 6), indices, {"weight": transpose}),
    "matrix": Kind(lambda: Experts(False), numbers(5, 5), {"mix": as_is}, bare=True),
    "experts": Kind(lambda: Experts(False), numbers(5, 5), {"up": as_is}, bare=True),
    "experts transposed": Kind(lambda: Experts(True), numbers(5, 5), {"down": transpose}, bare=True),
    "three parameters": Kind(
        lambda: Experts(True), numbers(5, 5), {"up": transpose, "down": transpose, "mix": as_is}, bare=True
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
mixable = pytest.mark.parametrize(
    "kind", [k for k in KINDS.values() if not k.bare], ids=[n for n, k in KINDS.items() if not k.bare]
)


def base_of(kind: Kind) -> nn.Module:
    torch.manual_seed(3)
    return Around(kind.layer()).eval()


def adapted(kind: Kind, **options: Any) -> PeftModel:
    return get_peft_model(base_of(kind), kind.config(**options)).eval()


def out(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(x, **options)


def scatter(model: nn.Module, adapter: str = "default") -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".nblora_" in name and f".{adapter}." in name:
                parameter.normal_(std=0.5)


def deltas(model: PeftModel, kind: Kind, adapter: str = "default") -> dict[str, Tensor]:
    """The dense update of every adapted parameter, in the layout in which it is stored."""
    found = {}
    for layer in nblora_layers(model, adapter).values():
        found[getattr(layer, "parameter_name", "weight")] = layer.get_delta_weight(adapter).detach()
    assert found.keys() == kind.matrices.keys()
    return found


def shifted(base: nn.Module, added: dict[str, Tensor]) -> nn.Module:
    """The base model with updates added to its parameters: what an adapted model must equal."""
    changed = copy.deepcopy(base)
    with torch.no_grad():
        for name, delta in added.items():
            getattr(changed.layer, name).add_(delta)
    return changed


def spectra(matrices: Tensor) -> np.ndarray:
    return np.linalg.svd(matrices.detach().double().numpy(), compute_uv=False)


@every_kind
@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
def test_an_update_starts_at_zero_and_learns(kind: Kind, parametrization: str) -> None:
    base, x = base_of(kind), kind.inputs()
    model = adapted(kind, parametrization=parametrization, bound=1, bound_kind="absolute")
    assert torch.equal(out(model, x), out(base, x))
    target = out(
        shifted(base, {name: 0.1 * torch.ones_like(getattr(base.layer, name)) for name in kind.matrices}), x
    )
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(d, torch.zeros_like(d)) for d in deltas(model, kind).values())


@every_kind
def test_the_output_is_that_of_the_shifted_weight(kind: Kind) -> None:
    model, base, x = adapted(kind, init_weights=False), base_of(kind), kind.inputs()
    expected = out(shifted(base, deltas(model, kind)), x)
    assert not torch.allclose(expected, out(base, x), atol=1e-3)
    torch.testing.assert_close(out(model, x), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(model(x).detach(), expected, atol=2e-6, rtol=1e-5)  # with gradients
    with model.disable_adapter():
        assert torch.equal(out(model, x), out(base, x))


@every_kind
@pytest.mark.parametrize("bound_kind", ["relative", "absolute"])
@pytest.mark.parametrize("norm", ["spectral", "frobenius", "nuclear"])
def test_every_matrix_keeps_its_own_bound(kind: Kind, bound_kind: str, norm: str) -> None:
    model, base = adapted(kind, norm=norm, bound=0.4, bound_kind=bound_kind), base_of(kind)
    scatter(model)
    power = {"spectral": np.inf, "frobenius": 2, "nuclear": 1}[norm]
    for name, delta in deltas(model, kind).items():
        as_matrices = kind.matrices[name]
        sigma = spectra(as_matrices(delta))
        radius = (
            0.4 if bound_kind == "absolute" else 0.4 * spectra(as_matrices(getattr(base.layer, name)))[..., 0]
        )
        values = np.linalg.norm(sigma, ord=power, axis=-1)
        assert (values <= radius * (1 + 1e-5)).all(), name
        assert (values > 0.05 * radius).all(), name  # the bound is not far off
        assert np.linalg.matrix_rank(as_matrices(delta).double().numpy(), tol=1e-6).max() <= 3
    assert certify(model).holds


@every_kind
def test_merging_and_unmerging(kind: Kind) -> None:
    model, base, x = adapted(kind, init_weights=False), base_of(kind), kind.inputs()
    before, weights = out(model, x), {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(out(model, x), before, atol=2e-6, rtol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(out(model, x), before)
    unloaded = copy.deepcopy(model).unload()
    assert torch.equal(out(unloaded, x), out(base, x))
    merged = model.merge_and_unload()
    torch.testing.assert_close(out(merged, x), before, atol=2e-6, rtol=1e-5)
    assert type(merged.layer) is type(base.layer)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in base.named_parameters()}


@every_kind
def test_saving_and_loading(kind: Kind, tmp_path: Path) -> None:
    model, x = adapted(kind, init_weights=False, parametrization="svd"), kind.inputs()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(kind), tmp_path).eval()
    assert torch.equal(out(loaded, x), out(model, x))
    assert certify(tmp_path) == certify(model)
    lean = PeftModel.from_pretrained(base_of(kind), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(out(lean, x), out(model, x))


@every_kind
def test_several_adapters(kind: Kind) -> None:
    model, base, x = adapted(kind, init_weights=False), base_of(kind), kind.inputs()
    model.add_adapter("other", kind.config(r=2, norm="nuclear", init_weights=False))
    one, two = deltas(model, kind), deltas(model, kind, "other")
    model.set_adapter("other")
    torch.testing.assert_close(out(model, x), out(shifted(base, two), x), atol=2e-6, rtol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    both = {name: one[name] + two[name] for name in one}
    torch.testing.assert_close(out(model, x), out(shifted(base, both), x), atol=2e-6, rtol=1e-5)
    model.delete_adapter("other")
    torch.testing.assert_close(out(model, x), out(shifted(base, one), x), atol=2e-6, rtol=1e-5)


@every_kind
def test_half_precision(kind: Kind) -> None:
    base, x = base_of(kind).bfloat16(), kind.inputs()
    x = x if x.dtype == torch.long else x.bfloat16()
    model = get_peft_model(base, kind.config(init_weights=False)).eval()
    expected = out(shifted(base_of(kind), deltas(model, kind)).bfloat16(), x)
    result = out(model, x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected.float(), atol=0.06, rtol=0.02)
    model(x).float().sum().backward()
    for name, parameter in model.named_parameters():
        if ".nblora_" in name:
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None, name


AS_LORA = [n for n in KINDS if not any(word in n for word in ("dilated", "groups", "depthwise"))]


@pytest.mark.parametrize("name", AS_LORA)
@pytest.mark.parametrize("saved", [True, False])
def test_exported_it_is_the_same_in_plain_peft(name: str, saved: bool, tmp_path: Path) -> None:
    kind = KINDS[name]
    model, x = adapted(kind, init_weights=False), kind.inputs()
    source: Any = model
    if saved:
        source = tmp_path / "nblora"
        model.save_pretrained(source)
    export_lora(source, tmp_path / "lora")
    lora = PeftModel.from_pretrained(base_of(kind), tmp_path / "lora").eval()
    assert isinstance(lora.peft_config["default"], LoraConfig)
    torch.testing.assert_close(out(lora, x), out(model, x), atol=1e-5, rtol=1e-5)
    assert certify(tmp_path / "lora").holds


@pytest.mark.parametrize("name", sorted(set(KINDS) - set(AS_LORA)))
def test_convolutions_that_lora_would_compute_otherwise_are_not_exported(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match=r"convolution to export must have groups=1, .* got '.*layer': merge"
    ):
        export_lora(adapted(KINDS[name]), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@mixable
def test_an_adapter_for_each_sample(kind: Kind) -> None:
    model, x = adapted(kind, init_weights=False), kind.inputs()
    model.add_adapter("other", kind.config(r=1, init_weights=False))
    names = ["other", "default", "__base__", "other", "default"]
    mixed = out(model, x, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = out(model, x[i : i + 1])
        else:
            model.set_adapter(name)
            alone = out(model, x[i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], alone, atol=2e-6, rtol=1e-5)


def test_parameters_cannot_be_mixed_in_a_batch() -> None:
    kind = KINDS["experts"]
    with pytest.raises(ValueError, match="does not support mixed adapter batches yet"):
        adapted(kind)(kind.inputs(), adapter_names=["default"] * 5)


def test_a_parameter_that_is_computed_already() -> None:
    """By torch.nn.utils.parametrize, without a way back."""

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    kind = KINDS["three parameters"]
    base, x = base_of(kind), kind.inputs()
    parametrize.register_parametrization(base.layer, "up", Double())
    expected = out(base, x)
    config = NBLoraConfig(target_modules=[], target_parameters=["layer.up", "layer.down"], r=2)
    model = get_peft_model(base, config).eval()
    torch.testing.assert_close(out(model, x), expected)
    scatter(model)
    assert not torch.allclose(out(model, x), expected, atol=1e-3)
    (up,) = [one for one in nblora_layers(model, "default").values() if one.parameter_name == "up"]
    limits = 0.3 * spectra(up.get_base_weight().mT)[..., 0]  # of the parameter as it is computed
    norms = np.linalg.norm(spectra(up.get_delta_weight("default").detach()), axis=-1)
    assert (norms <= limits * (1 + 1e-5)).all()
    model.train()(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if ".nblora_in" in n)
    assert len(up.get_base_layer().parametrizations["up"]) == 1


def test_parameters_have_no_dropout() -> None:
    with pytest.raises(ValueError, match=r"dropout must be 0 for target_parameters, .* got dropout=0.1"):
        adapted(KINDS["experts"], dropout=0.1)


def test_a_parameter_that_is_no_matrix_is_refused() -> None:
    config = NBLoraConfig(target_modules=[], target_parameters=["layer.bias"])
    with pytest.raises(TypeError, match=r"'layer.bias' must be a .* matrix .* got shape \(5,\)"):
        get_peft_model(base_of(KINDS["linear"]), config)


def test_all_adapters_have_the_same_parameters() -> None:
    kind = KINDS["experts"]
    other = NBLoraConfig(target_modules=[], target_parameters=["layer.down"])
    with pytest.raises(ValueError, match=r"same target_parameters, got \['layer.down'\], and \['layer.up'\]"):
        adapted(kind).add_adapter("other", other)


def test_the_output_projection_of_attention_has_no_effect_and_says_so() -> None:
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.warns(UserWarning, match="'attention.out_proj' is the output projection .* has no effect"):
        get_peft_model(base, NBLoraConfig(target_modules=["out_proj"]))


class Attending(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    """PyTorch's own encoder, which in eval mode takes weights out of its attention."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize(("build", "target"), [(Attending, "attention"), (Encoder, "self_attn")])
def test_attention(build: type[nn.Module], target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = build().eval(), torch.randn(2, 5, 8)
    config = NBLoraConfig(target_modules=[target], r=2)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    torch.testing.assert_close(out(model, x), out(base, x))
    scatter(model)
    expected = copy.deepcopy(base)
    for name, layer in nblora_layers(model, "default").items():
        parts = name.removeprefix("base_model.model.").replace("base_layer.", "")
        module = expected.get_submodule(parts)
        weight = getattr(module, "weight", None) if hasattr(module, "weight") else module.in_proj_weight
        delta = layer.get_delta_weight("default").detach()
        limit = 0.3 * spectra(weight)[0]
        assert 0.05 * limit < np.linalg.norm(spectra(delta)) <= limit * (1 + 1e-5)
        weight.data += delta
    torch.testing.assert_close(out(model, x), out(expected, x), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(out(model, x), out(base, x), atol=1e-3)
    assert certify(model).holds
    assert len(certify(model).layers) == 2 * (2 if build is Encoder else 1)
    with model.disable_adapter():
        torch.testing.assert_close(out(model, x), out(base, x))
    model.train()(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if ".nblora_" in n)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(out(loaded, x), out(model, x))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    torch.testing.assert_close(out(model, x), out(expected, x), atol=2e-6, rtol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    merged = model.merge_and_unload()
    torch.testing.assert_close(out(merged, x), out(expected, x), atol=2e-6, rtol=1e-5)
    assert merged.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("kind", ["attention", "experts"])
def test_weights_that_fsdp_keeps_elsewhere_are_replaced(kind: str, tmp_path: Path) -> None:
    """One process suffices: FSDP puts views of its flat parameter over the module's own."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        if kind == "attention":
            torch.manual_seed(0)
            base, x = Attending().eval(), torch.randn(2, 5, 8)
            model = get_peft_model(base, NBLoraConfig(target_modules=["attention"], init_weights=False))
        else:
            model, x = adapted(KINDS["three parameters"], init_weights=False), numbers(5, 5)()
        expected = out(model.eval(), x)
        with model.disable_adapter():
            assert not torch.allclose(out(model, x), expected, atol=1e-3)
        sharded = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy.NO_SHARD,
        )
        torch.testing.assert_close(out(sharded, x), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["experts transposed", "three parameters"])
def test_parameters_compile_into_one_graph(name: str) -> None:
    kind = KINDS[name]
    model, x = adapted(kind, init_weights=False), kind.inputs()
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"], ["self_attn", "linear1"]])
@pytest.mark.parametrize("masked", [False, True])
def test_inside_the_encoder_of_pytorch(targets: list[str], masked: bool) -> None:
    """In eval mode it takes weights out of its layers, or gives them nested tensors."""
    torch.manual_seed(0)
    base, x = Encoder().eval(), torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = masked
    options: dict[str, Any] = {"src_key_padding_mask": mask} if masked else {}
    model = get_peft_model(copy.deepcopy(base), NBLoraConfig(target_modules=targets, r=2))
    scatter(model)
    encoder = model.base_model.model.layers
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    expected = encoder(x, **options).detach()
    model.eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = encoder(x, **options).detach()
        torch.testing.assert_close(found[~mask], expected[~mask], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(base.layers(x, **options)[~mask], expected[~mask], atol=1e-3)
    pickle.loads(pickle.dumps(model))


def test_attention_has_ranks_and_bounds_for_each_projection() -> None:
    config = NBLoraConfig(
        target_modules=["attention"],
        r=2,
        rank_pattern={"attention": 3},
        bound=1.0,
        bound_kind="absolute",
        bound_pattern={"attention.out_proj": 0.25},
    )
    model = get_peft_model(Attending(), config)
    packed, output = nblora_layers(model, "default").values()
    assert (packed.radius("default"), output.radius("default")) == (1.0, 0.25)
    assert [layer.bound for layer in certify(model).layers] == [1.0, 0.25]
    model.add_adapter("other", config)
    model.base_model.add_weighted_adapter(["default", "other"], [1, 1], "sum")  # without a warning
    assert [layer.bound for layer in certify(model, "sum").layers] == [2.0, 0.5]


def test_threads_share_a_model_with_replaced_weights() -> None:
    kind = KINDS["three parameters"]
    model, x = adapted(kind, init_weights=False), kind.inputs()
    expected = out(model, x)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: out(model, x), range(200)))
    assert all(torch.equal(result, expected) for result in results)
    assert torch.equal(out(model, x), expected)


@pytest.mark.parametrize("norm", ["parametrizations.weight_norm", "weight_norm"])
@pytest.mark.parametrize("build", [lambda: nn.Linear(6, 5), lambda: nn.Conv1d(6, 4, 3, groups=2)])
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_a_weight_that_is_computed_from_others_is_not_merged_into(
    norm: str, build: Callable[[], nn.Module]
) -> None:
    normalize = attrgetter(norm)(nn.utils)
    base = nn.ModuleDict({"first": nn.Linear(6, 6), "second": normalize(build())})
    config = NBLoraConfig(target_modules=["first", "second"], init_weights=False)
    model = get_peft_model(base, config)
    weight = nblora_layers(model, "default")["base_model.model.first"].get_base_weight().clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"parameter of its layer, not computed .* such a 'weight'"):
            merge()
    assert torch.equal(nblora_layers(model, "default")["base_model.model.first"].get_base_weight(), weight)


def test_sums_of_experts_show_the_bound_of_each() -> None:
    kind = KINDS["experts"]
    base = base_of(kind)
    with torch.no_grad():
        base.layer.up[2] *= 100
    model = get_peft_model(base, kind.config(init_weights=False))
    model.add_adapter("other", kind.config(init_weights=False))
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    (layer,) = nblora_layers(model, "sum").values()
    assert [one.bound for one in certify(model, "sum").layers] == pytest.approx(layer.radius("sum").tolist())
    assert [one.bound for one in certify(model, "sum").layers] == pytest.approx(
        [one.bound for one in certify(model).layers], rel=1e-6
    )


def test_attention_is_not_exported(tmp_path: Path) -> None:
    model = get_peft_model(Encoder(), NBLoraConfig(target_modules=["self_attn"]))
    model.save_pretrained(tmp_path / "saved")
    for source in (model, tmp_path / "saved"):
        with pytest.raises(
            AdapterError, match=r"cannot be exported, .* got 'layers.layers.0.self_attn': merge"
        ):
            export_lora(source, tmp_path / "lora")


def test_attention_that_cannot_be_adapted() -> None:
    with pytest.raises(TypeError, match=r"'attention' must have keys and values of .* embed_dim=8, kdim=4"):
        get_peft_model(Attending(kdim=4), NBLoraConfig(target_modules=["attention"]))
    with pytest.raises(ValueError, match=r"dropout must be 0 for nn.MultiheadAttention"):
        get_peft_model(Attending(), NBLoraConfig(target_modules=["attention"], dropout=0.1))
    model = get_peft_model(Attending(), NBLoraConfig(target_modules=["attention"])).eval()
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        model(torch.randn(2, 5, 8), adapter_names=["default", "default"])


MIXTURES = {
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    ),
    "gpt-oss": (  # stores its experts as (experts, in, out)
        GptOssForCausalLM,
        GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8},
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_transformers_models(name: str, tmp_path: Path) -> None:
    model_class, config_class, options = MIXTURES[name]
    config = config_class(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        **options,
    )
    torch.manual_seed(0)
    base = model_class(config).eval()
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    method = NBLoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, init_weights=False)
    model = get_peft_model(copy.deepcopy(base), method).eval()
    x = tokens()
    with torch.no_grad():
        logits = model(x).logits
    expected = copy.deepcopy(base)
    found = nblora_layers(model, "default")
    assert len(found) == 2 * 3
    for layer_name, layer in found.items():
        module = expected.get_submodule(
            layer_name.removeprefix("base_model.model.").replace(".base_layer", "")
        )
        parameter = getattr(module, getattr(layer, "parameter_name", "weight"))
        matrices = parameter.mT if name == "gpt-oss" and parameter.ndim == 3 else parameter
        delta = layer.get_delta_weight("default").detach()
        as_matrices = delta.mT if name == "gpt-oss" and parameter.ndim == 3 else delta
        limits = 0.3 * spectra(matrices.detach())[..., 0]
        assert (np.linalg.norm(spectra(as_matrices), axis=-1) <= limits * (1 + 1e-5)).all()
        parameter.data += delta
    with torch.no_grad():
        torch.testing.assert_close(logits, expected(x).logits, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(logits, base(x).logits, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, logits)
    model.train()
    model(x, labels=x).loss.backward()
    missing = [n for n, p in model.named_parameters() if ".nblora_" in n and p.grad is None]
    assert not missing
