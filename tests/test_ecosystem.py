"""The doors of PEFT and transformers: saving, loading, converting, and training with their Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from conftest import TwoLayers, tiny_gpt2, tiny_llama, tokens
from nblora import NBLoraConfig, certify
from nblora.tuner import NBLoraLayer, nblora_layers

EVERY = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as it lies on disk."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def out(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        y = model(tokens() if x is None else x)
    return getattr(y, "logits", y)


def adapted(base: nn.Module, **choices: Any) -> PeftModel:
    """A model with a random, non-zero update in every layer."""
    torch.manual_seed(5)
    config = NBLoraConfig(**(EVERY | {"r": 4, "init_weights": False} | choices))
    return get_peft_model(base, config).eval()


def radii(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    found = [layer.radius(adapter).clone() for layer in nblora_layers(model, adapter).values()]
    assert found
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bitwise equal, dtypes included."""
    assert first
    return first.keys() == second.keys() and all(
        value.dtype == second[key].dtype and torch.equal(value, second[key]) for key, value in first.items()
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 7) -> None:
    """Steps of causal language modelling on random tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        x = torch.randint(0, 50, (2, 7), generator=generator)
        optimizer.zero_grad()
        model(x, labels=x).loss.backward()
        optimizer.step()
    model.eval()


# --- PEFT: save and load ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
def test_a_saved_adapter_loads_bitwise(
    kind: str, dtype: torch.dtype, low_cpu_mem_usage: bool, parametrization: str, tmp_path: Path
) -> None:
    model = adapted(BUILDERS[kind](dtype), parametrization=parametrization)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BUILDERS[kind](dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(out(loaded), out(model))
    assert same(loaded.state_dict(), model.state_dict())
    assert not torch.equal(out(model), out(BUILDERS[kind](dtype)))
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.device.type == "cpu", name
        assert parameter.dtype == (torch.float32 if ".nblora_" in name else dtype), name


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "nuclear", 3.5, "ky-fan-2", float("inf")])
def test_every_norm_survives_the_disk(norm: Any, tmp_path: Path) -> None:
    choices = {"norm": norm, "temperature": 0.7, "bound": 0.9, "rank_pattern": {"q_proj": 2}}
    model = adapted(tiny_llama(), **choices, bound_pattern={"v_proj": 0.1})
    model.save_pretrained(tmp_path)
    assert torch.equal(out(PeftModel.from_pretrained(tiny_llama(), tmp_path)), out(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_trains_on(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable != set()
    before = out(model)
    for each in (model, loaded):
        train(each, torch.optim.AdamW(each.parameters(), lr=1e-2), steps=3)
    assert torch.equal(out(loaded), out(model))
    assert not torch.equal(out(model), before)


def test_modules_to_save_and_biases_survive_the_disk(tmp_path: Path) -> None:
    config = NBLoraConfig(target_modules=["c_attn"], modules_to_save=["ln_f"], bias="nblora_only")
    model = get_peft_model(tiny_gpt2(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    assert torch.equal(out(PeftModel.from_pretrained(tiny_gpt2(), tmp_path)), out(model))


def test_an_adapter_finds_its_base_model_by_itself(base_folder: Path, tmp_path: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(base_folder).eval())
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.peft_config["default"].base_model_name_or_path == str(base_folder)
    assert isinstance(loaded.peft_config["default"], NBLoraConfig)
    assert torch.equal(out(loaded), out(model))


def test_a_second_adapter_loads_beside_the_first(tmp_path: Path) -> None:
    first = adapted(tiny_llama())
    torch.manual_seed(11)
    config = NBLoraConfig(**EVERY, r=2, norm="nuclear", parametrization="svd", init_weights=False)
    second = get_peft_model(tiny_llama(), config).eval()
    second.save_pretrained(tmp_path)
    assert not torch.allclose(out(first), out(second))
    both = adapted(tiny_llama())
    both.load_adapter(tmp_path, "other")
    assert both.active_adapters == ["default"]
    assert torch.equal(out(both), out(first))
    both.set_adapter("other")
    assert torch.equal(out(both), out(second))
    both.set_adapter("default")
    assert torch.equal(out(both), out(first))


def test_several_adapters_save_into_folders_of_their_own(tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.add_adapter("other", NBLoraConfig(**EVERY, r=2, init_weights=False))
    model.save_pretrained(tmp_path)
    for folder, adapter in ((tmp_path, "default"), (tmp_path / "other", "other")):
        model.set_adapter(adapter)
        assert torch.equal(out(PeftModel.from_pretrained(tiny_llama(), folder)), out(model))


def test_state_dicts_move_between_models() -> None:
    model, other = adapted(tiny_llama()), adapted(tiny_llama(), init_weights=True)
    assert not torch.equal(out(model), out(other))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "nblora" in key]
    assert torch.equal(out(model), out(other))


# --- the radius -------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_radius_of_every_layer_and_only_the_adapter(tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layers = nblora_layers(model, "default")
    for name, layer in layers.items():
        stored = tensors.pop(f"{name}.nblora_radius.weight")
        assert stored.shape == ()
        assert stored.dtype == torch.float32
        assert torch.equal(stored, layer.radius("default"))
    assert {key.rpartition(".nblora_")[2] for key in tensors} == {"in.weight", "out.weight", "scale.weight"}
    assert len(tensors) == 3 * len(layers)


@pytest.mark.parametrize("door", ["from_pretrained", "low_cpu", "load_adapter", "transformers", "trainable"])
def test_a_loaded_adapter_keeps_its_radius_whatever_the_base_weights(door: str, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(10)
    if door == "from_pretrained":
        loaded = PeftModel.from_pretrained(base, tmp_path)
    elif door == "low_cpu":
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    elif door == "trainable":
        loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    elif door == "load_adapter":
        loaded = adapted(base)
        loaded.load_adapter(tmp_path, "default2")
        assert all(torch.equal(a, b) for a, b in zip(radii(loaded, "default2"), radii(model)))
        assert certify(loaded, "default2") == certify(model)
        return
    else:
        base.load_adapter(str(tmp_path))
        loaded = base
    assert all(torch.equal(a, b) for a, b in zip(radii(loaded), radii(model)))
    for layer in nblora_layers(loaded, "default").values():
        delta = torch.linalg.matrix_norm(layer.get_delta_weight("default"))
        assert 0 < delta < layer.radius("default")


def test_loading_with_little_memory_does_not_look_at_the_base_weights(tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    base.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf  # no relative radius could be computed
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert all(torch.equal(a, b) for a, b in zip(radii(loaded), radii(model)))
    assert certify(loaded) == certify(model)


# --- transformers' own adapter methods --------------------------------------------------------------


def test_transformers_adapter_methods(tmp_path: Path) -> None:
    peft_model = adapted(tiny_llama())
    peft_model.save_pretrained(tmp_path / "saved")
    model = tiny_llama()
    base_out, saved_out = out(model), out(peft_model)

    model.add_adapter(NBLoraConfig(**EVERY, r=3), adapter_name="fresh")
    assert torch.equal(out(model), base_out)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".nblora_" in n
    }
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), steps=2)
    fresh_out = out(model)
    assert not torch.equal(fresh_out, base_out)

    with pytest.warns(UserWarning, match="Already found a `peft_config`"):  # so it is for every method
        model.load_adapter(str(tmp_path / "saved"), adapter_name="saved")
    model.set_adapter("saved")
    assert model.active_adapters() == ["saved"]
    assert torch.equal(out(model), saved_out)
    model.set_adapter("fresh")
    assert torch.equal(out(model), fresh_out)
    model.disable_adapters()
    assert torch.equal(out(model), base_out)
    model.enable_adapters()
    assert torch.equal(out(model), fresh_out)

    model.set_adapter("saved")
    model.delete_adapter("fresh")
    assert not [name for name in model.state_dict() if ".fresh." in name]
    assert torch.equal(out(model), saved_out)
    model.delete_adapter("saved")
    assert torch.equal(out(model), base_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_model_loads_from_the_folder_of_an_adapter(
    base_folder: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype).eval())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert nblora_layers(loaded, "default")
    assert torch.equal(out(loaded), out(model))
    assert all(torch.equal(a, b) for a, b in zip(radii(loaded), radii(model)))


def test_transformers_model_saved_with_its_adapter_loads_again(base_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    model.add_adapter(NBLoraConfig(**EVERY, r=3, init_weights=False))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(out(loaded), out(model))
    assert certify(loaded) == certify(model) == certify(tmp_path)


def test_layers_injected_into_any_module() -> None:
    x = torch.randn(4, 12)
    base = TwoLayers()
    expected = out(base, x)
    model = inject_adapter_in_model(NBLoraConfig(target_modules=["first"]), base)
    assert isinstance(model.first, NBLoraLayer)
    assert torch.equal(out(model, x), expected)
    with torch.no_grad():
        model.first.nblora_out["default"].weight.normal_()
    assert not torch.equal(out(model, x), expected)
    other = inject_adapter_in_model(NBLoraConfig(target_modules=["first"]), TwoLayers())
    other.load_state_dict(model.state_dict())
    assert torch.equal(out(other, x), out(model, x))


# --- training loops ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", BUILDERS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        base = BUILDERS[kind]()
        if kind == "gpt2":  # its dropout is on by default
            for module in base.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        model = adapted(base).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        x = tokens()
        model(input_ids=x, labels=x).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient.any(), name
        slack = 10 * max(gradient.shape) * torch.finfo(gradient.dtype).eps
        torch.testing.assert_close(
            checkpointed[name], gradient, rtol=slack, atol=slack * gradient.abs().max().item()
        )


def test_optimizer_state_survives_the_disk(tmp_path: Path) -> None:
    """Six steps are three steps, a save of adapter and optimizer, and three more."""
    whole, part = adapted(tiny_llama()), adapted(tiny_llama())
    train(whole, optimizer := torch.optim.AdamW(whole.parameters(), lr=1e-2), steps=3, seed=1)
    train(whole, optimizer, steps=3, seed=2)

    train(part, optimizer := torch.optim.AdamW(part.parameters(), lr=1e-2), steps=3, seed=1)
    part.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(resumed, optimizer, steps=3, seed=2)
    assert same(get_peft_model_state_dict(resumed), get_peft_model_state_dict(whole))


class Sentences(torch.utils.data.Dataset):
    """Random token sequences."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randint(0, 50, (7,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": x, "labels": x}


def test_a_resumed_trainer_run_ends_where_an_uninterrupted_one_does(
    base_folder: Path, tmp_path: Path
) -> None:
    class StopAfterThree(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    def run(folder: Path, resume: bool = False, callbacks: list[TrainerCallback] | None = None) -> nn.Module:
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        torch.manual_seed(21)
        trainer = Trainer(
            get_peft_model(base, NBLoraConfig(**EVERY, r=4, dropout=0.1)),
            TrainingArguments(
                output_dir=str(folder),
                max_steps=6,
                save_steps=3,
                logging_steps=1,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                seed=3,
            ),
            train_dataset=Sentences(),
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=resume or None)
        assert trainer.state.global_step == (3 if callbacks else 6)
        return trainer.model.eval()

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", callbacks=[StopAfterThree()])
    assert (tmp_path / "parts" / "checkpoint-3" / "adapter_model.safetensors").is_file()
    resumed = run(tmp_path / "parts", resume=True)
    assert same(get_peft_model_state_dict(resumed), get_peft_model_state_dict(whole))
    assert torch.equal(out(resumed), out(whole))
    assert not torch.equal(out(whole), out(tiny_llama()))
    assert certify(whole).holds
    assert certify(tmp_path / "parts" / "checkpoint-6") == certify(whole)


# --- conversion -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT's conversion forgets it
@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_convert_to_lora_reproduces_the_logits(kind: str, parametrization: str, tmp_path: Path) -> None:
    targets = "all-linear" if kind == "llama" else ["c_attn", "c_fc"]
    model = adapted(BUILDERS[kind](), parametrization=parametrization, target_modules=targets)
    assert model.supports_lora_conversion()
    config, state = peft.convert_to_lora(model, rank=4)
    lora = get_peft_model(BUILDERS[kind](), copy.deepcopy(config)).eval()
    assert isinstance(config, LoraConfig)
    result = set_peft_model_state_dict(lora, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(out(lora), out(model), rtol=1e-5, atol=1e-5)
    peft.save_as_lora(tmp_path, model, rank=4)
    loaded = PeftModel.from_pretrained(BUILDERS[kind](), tmp_path)
    torch.testing.assert_close(out(loaded), out(model), rtol=1e-5, atol=1e-5)
