"""Adapters on quantized base models: trained, merged, taken out again, saved, and always within the bound."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from conftest import assert_loss_falls_from_a_gradient_start, assert_same_certificate
from nblora import NBLoraConfig, certify, export_lora
from nblora.spectral import spectral_norm
from nblora.tuner import NBLoraLayer, nblora_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:Merge lora module to .-bit linear:UserWarning",
    "ignore:MatMul8bitLt.*cast:UserWarning",
)

# the relative rounding of a weight that is quantized: steps of one are much larger than of the other
ROUNDING = {
    "bnb4": 0.15,
    "bnb4-double": 0.15,
    "bnb8": 0.02,
    "hqq4": 0.15,
    "hqq8": 0.02,
    "ao8": 0.02,
    "ao-float8": 0.05,
}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(3))


def library(kind: str) -> str:
    return {"bnb": "bitsandbytes", "hqq": "hqq", "ao8": "torchao", "ao-": "torchao"}[kind[:3]]


def cases(*, devices: tuple[str, ...] = ("cpu", "cuda")) -> list[Any]:
    """Every kind on every device, with what it needs to run."""
    found = []
    for device in devices:
        for kind in ROUNDING:
            lacking = importlib.util.find_spec(library(kind)) is None
            marks = [pytest.mark.skipif(lacking, reason=f"needs {library(kind)}")]
            if device == "cuda":
                marks.append(pytest.mark.gpu)
            found.append(pytest.param(kind, device, marks=marks, id=f"{kind}-{device}"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model on disk, as it is before it is quantized."""
    found = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(found)
    return found


def quantized(kind: str, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    options: dict[str, Any] = {"dtype": dtype, "device_map": device}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries' imports deprecate
        if kind.startswith("bnb"):
            options["quantization_config"] = (
                BitsAndBytesConfig(load_in_8bit=True)
                if kind == "bnb8"
                else BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_compute_dtype=dtype,
                    bnb_4bit_use_double_quant=kind == "bnb4-double",
                )
            )
        elif kind.startswith("ao"):
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

            recipe = {"ao8": Int8WeightOnlyConfig, "ao-float8": Float8WeightOnlyConfig}[kind]()
            options["quantization_config"] = TorchAoConfig(quant_type=recipe)
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        if kind.startswith("hqq"):  # transformers 5 loads it no more
            from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

            recipe = BaseQuantizeConfig(nbits=int(kind[3:]), group_size=64, axis=1)
            for name, module in list(model.named_modules()):
                parent, _, child = name.rpartition(".")
                if child in LAYERS:
                    layer = HQQLinear(module, recipe, compute_dtype=dtype, device=device)
                    setattr(model.get_submodule(parent), child, layer)
    return model


def adapted(base: nn.Module, **choices: Any) -> PeftModel:
    """A model with a random, non-zero update in every quantized layer."""
    torch.manual_seed(5)
    options = {"r": 4, "target_modules": LAYERS, "task_type": "CAUSAL_LM", "init_weights": False} | choices
    return get_peft_model(base, NBLoraConfig(**options)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=BATCH.to(model.device)).logits.float()


def layers(model: nn.Module) -> dict[str, NBLoraLayer]:
    found = nblora_layers(model, "default")
    assert len(found) == 14
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base weights of the adapted layers, dequantized."""
    return {name: layer.get_base_weight().clone() for name, layer in layers(model).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def train(model: nn.Module, steps: int = 8) -> list[float]:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    found = []
    for _ in range(steps):
        x = BATCH.to(model.device)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    model.eval()
    return found


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "device"), cases())
def test_starts_along_the_gradient(kind: str, device: str, folder: Path) -> None:
    """Nobody ever sees the gradient of a quantized weight; the loss falls all the same."""
    model: Any = get_peft_model(quantized(kind, folder, device), NBLoraConfig(r=4, target_modules=LAYERS))
    assert_loss_falls_from_a_gradient_start(model, BATCH.to(device))


@pytest.mark.parametrize(("kind", "device"), cases())
def test_training_on_top_learns_and_leaves_the_base_alone(kind: str, device: str, folder: Path) -> None:
    model = adapted(quantized(kind, folder, device), init_weights=True)
    before = weights(model)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.3
    assert same(weights(model), before)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * 14
    for name, parameter in trainable:
        assert ".nblora_" in name
        assert parameter.dtype == torch.float32, name
        assert parameter.device.type == device, name
    certificate = certify(model)
    assert certificate.holds
    assert max(layer.share for layer in certificate.layers) > 0.2


@pytest.mark.parametrize(("kind", "device"), cases())
def test_the_start_is_exactly_the_base_model(kind: str, device: str, folder: Path) -> None:
    model = adapted(quantized(kind, folder, device), init_weights=True)
    assert torch.equal(logits(model), logits(quantized(kind, folder, device)))


@pytest.mark.parametrize(("kind", "device"), cases())
def test_a_relative_radius_is_that_of_the_dequantized_weight(kind: str, device: str, folder: Path) -> None:
    """Also of an adapter added later: bitsandbytes repacks weights in the first forward on some CPUs."""
    model = adapted(quantized(kind, folder, device), bound=0.4)
    logits(model)
    model.add_adapter("later", NBLoraConfig(r=2, target_modules=LAYERS, bound=0.7))
    exact = LlamaForCausalLM.from_pretrained(folder)
    for name, layer in layers(model).items():
        weight = layer.get_base_weight()
        original = exact.get_submodule(name.removeprefix("base_model.model.")).weight.to(weight)
        error = torch.linalg.matrix_norm(weight.float() - original.float())
        assert error <= ROUNDING[kind] * torch.linalg.matrix_norm(original.float()), name
        norm = spectral_norm(weight).item()
        rounding = 5e-3 if kind.startswith("bnb4") else 1e-6  # packed weights are known to bfloat16
        assert layer.radius("default").item() == pytest.approx(0.4 * norm, rel=rounding)
        assert layer.radius("later").item() == pytest.approx(0.7 * norm, rel=rounding)


@pytest.mark.parametrize("kind", ["bnb4", "bnb8"])
def test_models_prepared_for_training_in_few_bits(kind: str, folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = prepare_model_for_kbit_training(quantized(kind, folder), use_gradient_checkpointing=False)
    model = adapted(base, init_weights=True)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.3
    assert certify(model).holds


def test_trl_casts_parameters_over_few_bits_and_the_bound_holds(folder: Path, tmp_path: Path) -> None:
    """TRL trains adapters of quantized models in bfloat16; the update is still computed in float32."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("trl")
    from datasets import Dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import SFTConfig, SFTTrainer

    from test_tasks import byte_tokenizer

    rows = [{"input_ids": row.tolist()} for row in BATCH]
    trainer = SFTTrainer(
        quantized("bnb4", folder),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
        peft_config=NBLoraConfig(r=4, target_modules=LAYERS, task_type="CAUSAL_LM"),
    )
    trainer.train()
    dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert dtypes == {torch.bfloat16}
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    for layer in layers(trainer.model).values():
        assert layer.low_rank_update("default").left.dtype == torch.float32
        assert layer.radius("default").dtype == torch.float32
    certificate = certify(trainer.model)
    assert certificate.holds
    assert max(layer.share for layer in certificate.layers) > 0.2


# --- merging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize(("kind", "device"), cases())
def test_merging_quantizes_the_sum_and_unmerging_restores_every_bit(
    kind: str, device: str, used: bool, folder: Path
) -> None:
    """Whether or not the model has been used before, which changes how bitsandbytes keeps a weight."""
    few_bits = ROUNDING[kind] > 0.1  # where much of a small update is less than half a step and rounded away
    bound = 5.0 if few_bits else 0.3
    base = logits(quantized(kind, folder, device))
    expected = logits(adapted(quantized(kind, folder, device), bound=bound))
    model = adapted(quantized(kind, folder, device), bound=bound)
    if used:
        logits(model)
    before = weights(model)
    model.merge_adapter()
    for name, layer in layers(model).items():
        delta = layer.get_delta_weight("default")
        exact = before[name].float() + delta
        merged = layer.get_base_weight()
        assert merged.dtype == before[name].dtype
        error = torch.linalg.matrix_norm(merged.float() - exact)
        assert error <= ROUNDING[kind] * torch.linalg.matrix_norm(exact), name
        moved = merged.float() - before[name].float()
        left = ((moved * delta).sum() / (delta * delta).sum()).item()
        assert left == pytest.approx(1, abs=0.2), name
    assert (logits(model) - expected).norm() < 0.6 * (expected - base).norm()
    assert not torch.equal(logits(model), base)
    assert certify(model).holds
    model.unmerge_adapter()
    assert same(weights(model), before)
    for layer in layers(model).values():
        layer.get_base_layer().to(device)
    assert same(weights(model), before)
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize(("kind", "device"), cases())
def test_what_is_less_than_half_a_step_is_lost_in_merging(kind: str, device: str, folder: Path) -> None:
    """The share of the updates that is in the merged weights: what the documentation says of it."""
    model = adapted(quantized(kind, folder, device))
    before = weights(model)
    model.merge_adapter()
    shares = []
    for name, layer in layers(model).items():
        delta = layer.get_delta_weight("default")
        moved = layer.get_base_weight().float() - before[name].float()
        shares.append(((moved * delta).sum() / (delta * delta).sum()).item())
    print(f"{kind}: {min(shares):.1%} to {max(shares):.1%} of the updates is left")
    if ROUNDING[kind] > 0.1:
        assert max(shares) < 0.6
    else:
        assert min(shares) > 0.7


@pytest.mark.parametrize(("kind", "device"), cases())
def test_merged_weights_are_those_of_a_merged_lora(
    kind: str, device: str, folder: Path, tmp_path: Path
) -> None:
    model = adapted(quantized(kind, folder, device))
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(quantized(kind, folder, device), tmp_path)
    lora.merge_adapter()  # before any forward, after which PEFT's LoRA may read packed weights
    model.merge_adapter()
    for name, layer in layers(model).items():
        theirs = lora.get_submodule(name)
        theirs.quantization_backend = layer.quantization_backend
        ours = layer.get_base_weight().float()
        difference = torch.linalg.matrix_norm(theirs.get_base_weight().float() - ours)
        assert difference <= ROUNDING[kind] * torch.linalg.matrix_norm(ours), name


@pytest.mark.parametrize(("kind", "device"), cases())
def test_several_adapters_merge_and_unmerge(kind: str, device: str, folder: Path) -> None:
    model = adapted(quantized(kind, folder, device))
    model.add_adapter("other", NBLoraConfig(r=2, target_modules=LAYERS, init_weights=False))
    expected, before = logits(model), weights(model)
    model.merge_adapter(["default", "other"])
    assert not torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert same(weights(model), before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("kind", "device"), cases(devices=("cpu",)))
def test_copies_of_merged_models_unmerge_on_their_own(kind: str, device: str, folder: Path) -> None:
    model = adapted(quantized(kind, folder, device), bound=5.0)
    expected = logits(model)
    model.merge_adapter()
    merged = logits(model)
    copied = copy.deepcopy(model)
    copied.unmerge_adapter()
    assert torch.equal(logits(copied), expected)
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("merge", [False, True], ids=["unload", "merge_and_unload"])
@pytest.mark.parametrize(("kind", "device"), cases())
def test_unloading_leaves_a_model_of_quantized_layers(
    kind: str, device: str, merge: bool, folder: Path
) -> None:
    base = quantized(kind, folder, device)
    classes = {name: type(module) for name, module in base.named_modules()}
    original = logits(base)
    model = adapted(base)
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    plain = model.merge_and_unload() if merge else model.unload()
    assert {name: type(module) for name, module in plain.named_modules()} == classes
    assert not [name for name, _ in plain.named_parameters() if "nblora" in name]
    assert torch.equal(logits(plain), merged if merge else original)


@pytest.mark.parametrize(("kind", "device"), cases(devices=("cpu",)))
def test_safe_merging_refuses_nan_and_changes_nothing(kind: str, device: str, folder: Path) -> None:
    model = adapted(quantized(kind, folder, device))
    name, layer = next(iter(layers(model).items()))
    before = weights(model)
    with torch.no_grad():
        layer.nblora_out["default"].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="must be finite"):
        model.merge_adapter(safe_merge=True)
    model.unmerge_adapter() if layer.merged else None
    assert torch.equal(layer.get_base_weight(), before[name])


# --- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("kind", "device"), cases())
def test_a_saved_adapter_loads_bitwise(
    kind: str, device: str, low_cpu_mem_usage: bool, folder: Path, tmp_path: Path
) -> None:
    model = adapted(quantized(kind, folder, device), init_weights=True)
    train(model, steps=2)
    model.save_pretrained(tmp_path)
    base = quantized(kind, folder, device)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert certify(loaded) == certify(model)
    assert_same_certificate(certify(tmp_path), certify(model), exactly=device == "cpu")


@pytest.mark.parametrize(("kind", "device"), cases())
def test_saving_leaves_the_base_as_it_was(kind: str, device: str, folder: Path, tmp_path: Path) -> None:
    """bitsandbytes takes a weight out of its CPU layout to save it, and puts it back in the next forward."""
    model = adapted(quantized(kind, folder, device))
    expected = logits(model)
    before = weights(model)
    model.save_pretrained(tmp_path)
    found = weights(model)
    for name, weight in before.items():
        torch.testing.assert_close(found[name].float(), weight.float(), rtol=0.02, atol=1e-3)
    if kind != "bnb4-double":  # whose scales are rounded anew
        assert torch.equal(logits(model), expected)


def test_an_adapter_keeps_its_radius_over_other_precisions(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    adapted(quantized("bnb4", folder)).save_pretrained(tmp_path)
    expected = certify(tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(folder)
    for base in (exact, quantized("bnb8", folder)):
        assert certify(PeftModel.from_pretrained(base, tmp_path)) == expected


# --- what can't be merged into ----------------------------------------------------------------------


def test_torchao_without_a_recipe_trains_and_refuses_to_merge(folder: Path) -> None:
    pytest.importorskip("torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    base = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(base.model, Int8WeightOnlyConfig())
    model = adapted(base, init_weights=True)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.3
    before, expected = weights(model), logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="only into a weight that can be quantized again, which torchao"):
            merge()
        assert same(weights(model), before)
        assert torch.equal(logits(model), expected)
    assert certify(model).holds


@pytest.fixture
def packed_class(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """A layer that PEFT takes for one of gptqmodel's: its weight can be used but not had."""

    class BaseQuantLinear(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int32))
            self.register_buffer("scales", scale)
            self.bias = linear.bias

        def forward(self, x: Tensor) -> Tensor:
            weight = (self.qweight * self.scales).to(x.dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, weight, bias)

    for name in ("gptqmodel", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["gptqmodel.nn_modules.qlinear"].BaseQuantLinear = BaseQuantLinear
    monkeypatch.setattr("peft.utils.quantization_utils.is_gptqmodel_available", lambda: True)
    return BaseQuantLinear


@pytest.mark.parametrize("bias", [False, True])
def test_weights_that_can_only_be_used(bias: bool, packed_class: type[nn.Module], tmp_path: Path) -> None:
    """GPTQ, AWQ and others: trained on, saved and loaded; the radius is measured by what the layer does."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.first = packed_class(nn.Linear(12, 20, bias=bias))
            self.second = packed_class(nn.Linear(20, 5, bias=bias))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    config = NBLoraConfig(r=3, target_modules=["first", "second"], bound=0.5)
    model = get_peft_model(Net(), config)
    for name, layer in nblora_layers(model, "default").items():
        packed = model.get_submodule(name).base_layer
        norm = spectral_norm(packed.qweight * packed.scales).item()
        assert layer.radius("default").item() == pytest.approx(0.5 * norm, rel=2e-3)  # measured in float16
    x, y = torch.randn(16, 12), torch.randn(16, 5)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert certify(model).holds
    model.eval()
    expected = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="only into a weight that can be quantized again, which gptq"):
            merge()
        assert torch.equal(model(x), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(loaded(x), expected)
    assert certify(loaded) == certify(model)
