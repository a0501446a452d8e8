"""TRL's trainers: supervised fine-tuning, preferences, rewards, and the copy that they compare with."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from nblora import NBLoraConfig, certify
from test_tasks import byte_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its imports deprecate
    trl = pytest.importorskip("trl")
    from trl import (
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        KTOConfig,
        KTOTrainer,
        RewardConfig,
        RewardTrainer,
        SFTConfig,
        SFTTrainer,
    )

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.2,  # enough for a few steps to show
}
BATCH = torch.randint(3, 260, (3, 12), generator=torch.Generator().manual_seed(3))
ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 4}


def llama(dtype: torch.dtype = torch.float32, kind: Any = LlamaForCausalLM, **choices: Any) -> nn.Module:
    torch.manual_seed(1)
    return kind(LlamaConfig(**SIZES, **choices)).to(dtype)


def moved(base: nn.Module, **choices: Any) -> PeftModel:
    """A model with an adapter that has been trained already: no update is zero."""
    torch.manual_seed(5)
    return get_peft_model(base, NBLoraConfig(**(ALL | {"init_weights": False} | choices)))


def sentences() -> Dataset:
    return Dataset.from_dict(
        {"text": [f"number {i} is {'even' if i % 2 == 0 else 'odd'}" for i in range(16)]}
    )


def preferences() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [f"{i}:" for i in range(16)],
            "chosen": [" yes" * (1 + i % 2) for i in range(16)],
            "rejected": [" no" * (1 + i % 3) for i in range(16)],
        }
    )


def settings(folder: Path, **choices: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | choices


def logits(model: nn.Module) -> Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model(input_ids=BATCH).logits.float()
    model.train(was_training)
    return out


def tensors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of everything that an adapter is made of, buffers included, under names without its name."""
    found = {
        name.replace(f".{adapter}.", "."): value.detach().clone()
        for name, value in model.state_dict().items()
        if f".{adapter}." in name
    }
    assert found
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name])
        for name, value in first.items()
    )


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value.detach().clone()
        for name, value in model.state_dict().items()
        if ".nblora_" not in name
    }


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def check_what_was_trained(trainer: Any, base: dict[str, Tensor], folder: Path) -> PeftModel:
    """Only float32 adapter parameters moved, the bound holds, and what is saved is the model."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    assert trainer.state.global_step == trainer.args.max_steps
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    for name, parameter in trainable.items():
        assert ".nblora_" in name
        assert ".default." in name
        assert parameter.dtype == torch.float32, name
    assert same(base_weights(model), base)
    certificate = certify(model)
    assert certificate.holds
    assert max(layer.share for layer in certificate.layers) > 0.01
    trainer.save_model(folder)
    assert certify(folder) == certificate
    return model


# --- supervised fine-tuning -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("door", "dtype", "autocast"),
    [
        ("config", torch.float32, False),
        ("model", torch.bfloat16, False),
        ("config", torch.bfloat16, True),
        ("model", torch.float32, True),
    ],
)
def test_supervised_fine_tuning(door: str, dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    base = llama(dtype)
    weights = base_weights(base)
    config = NBLoraConfig(**ALL)
    trainer = SFTTrainer(
        base if door == "config" else get_peft_model(base, config),
        args=SFTConfig(**settings(tmp_path / "run", bf16=autocast, max_length=32)),
        train_dataset=sentences(),
        processing_class=byte_tokenizer(),
        peft_config=config if door == "config" else None,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    model = check_what_was_trained(trainer, weights, tmp_path / "saved")
    loaded = PeftModel.from_pretrained(llama(dtype), tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), logits(llama(dtype)))


# --- preferences ------------------------------------------------------------------------------------


def preference_trainer(kind: str, model: nn.Module, folder: Path, **options: Any) -> Any:
    """A trainer that compares the policy with a reference."""
    if kind == "dpo":
        return DPOTrainer(
            model,
            args=DPOConfig(**settings(folder, max_length=32)),
            train_dataset=preferences(),
            processing_class=byte_tokenizer(),
            **options,
        )
    if kind == "kto":
        return KTOTrainer(
            model,
            args=KTOConfig(**settings(folder, max_length=32)),
            train_dataset=preferences(),
            processing_class=byte_tokenizer(),
            **options,
        )
    return GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=GRPOConfig(
            **settings(folder, max_steps=3, num_generations=4, max_completion_length=6, beta=0.1)
        ),
        train_dataset=preferences().remove_columns(["chosen", "rejected"]),
        processing_class=byte_tokenizer(),
        **options,
    )


KINDS = ["dpo", "kto", "grpo"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_compared_with_the_base_model(kind: str, tmp_path: Path) -> None:
    base = llama()
    weights = base_weights(base)
    trainer = preference_trainer(kind, base, tmp_path / "run", peft_config=NBLoraConfig(**ALL))
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()
    first, *_, last = losses(trainer)
    if kind == "dpo":
        assert first == pytest.approx(math.log(2), abs=1e-4)  # the policy is its reference
        assert last < first - 0.05
    model = check_what_was_trained(trainer, weights, tmp_path / "saved")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trained_adapter_is_compared_with_a_copy_of_itself(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """TRL copies parameters whose names have ".default." in them to the adapter "ref"."""
    policy = moved(llama(dtype), norm="nuclear", parametrization="svd")
    before, weights, start = tensors(policy), base_weights(policy), logits(policy)
    assert not torch.equal(start, logits(llama(dtype)))
    trainer = preference_trainer(kind, policy, tmp_path / "run")
    model = trainer.model
    assert list(model.peft_config) == ["default", "ref"]
    assert model.active_adapters == ["default"]
    assert same(tensors(model, "ref"), before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)

    trainer.train()
    if kind == "dpo":
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    model = check_what_was_trained(trainer, weights, tmp_path / "saved")
    assert same(tensors(model, "ref"), before)
    assert not same(tensors(model), before)
    model.set_adapter("ref")
    assert torch.equal(logits(model), start)
    assert certify(model, "ref").holds


def test_the_copy_has_the_radius_that_was_loaded(tmp_path: Path) -> None:
    """A loaded adapter keeps its radius over other base weights, and so must its copy."""
    moved(llama()).save_pretrained(tmp_path / "adapter")
    base = llama()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.5)
    policy = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    before, start = tensors(policy), logits(policy)
    trainer = preference_trainer("dpo", policy, tmp_path / "run")
    assert same(tensors(trainer.model, "ref"), before)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    trainer.model.set_adapter("ref")
    assert torch.equal(logits(trainer.model), start)


# --- rewards ----------------------------------------------------------------------------------------


def test_a_reward_model_trains_its_head_too(tmp_path: Path) -> None:
    base = llama(kind=LlamaForSequenceClassification, num_labels=1)
    config = NBLoraConfig(target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    trainer = RewardTrainer(
        base,
        args=RewardConfig(**settings(tmp_path / "run", max_length=32)),
        train_dataset=preferences(),
        processing_class=byte_tokenizer(),
        peft_config=config,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    model = trainer.model
    assert {
        name.split(".default.")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad
    } == {
        "nblora_in",
        "nblora_out",
        "nblora_scale",
        "modules_to_save",
    }
    assert certify(model).holds
    trainer.save_model(tmp_path / "saved")
    again = llama(kind=LlamaForSequenceClassification, num_labels=1)
    loaded = PeftModel.from_pretrained(again, tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
