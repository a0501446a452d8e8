"""transformers' Trainer with an adapted model: what it may do to a run, and what a run must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft.optimizers
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from conftest import tiny_llama
from nblora import NBLoraConfig, certify

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*is deprecated:FutureWarning")


class Sentences(torch.utils.data.Dataset):
    """Sequences of tokens in which every other one follows from the one before."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = torch.randint(0, 25, (5,), generator=torch.Generator().manual_seed(index))
        x = torch.stack([first, first + 25], dim=1).flatten()
        return {"input_ids": x, "labels": x}


def adapted(dtype: torch.dtype = torch.float32, **choices: Any) -> PeftModel:
    torch.manual_seed(5)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | choices
    return get_peft_model(tiny_llama(dtype), NBLoraConfig(**options))


def trainer(folder: Path, model: nn.Module, *, kind: Any = Trainer, **choices: Any) -> Trainer:
    extra = {
        name: choices.pop(name)
        for name in ("callbacks", "optimizers", "eval_dataset", "compute_metrics")
        if name in choices
    }
    return kind(
        model,
        TrainingArguments(
            **{
                "output_dir": str(folder),
                "max_steps": 6,
                "per_device_train_batch_size": 8,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_strategy": "no",
                "use_cpu": True,
                "report_to": "none",
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
                "seed": 3,
            }
            | choices
        ),
        train_dataset=Sentences(),
        **extra,
    )


def logged(run: Trainer, name: str) -> list[float]:
    return [row[name] for row in run.state.log_history if name in row]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name])
        for name, value in first.items()
    )


def check(run: Trainer, base_dtype: torch.dtype = torch.float32) -> PeftModel:
    """What holds at the end of every run."""
    model = run.model
    for name, parameter in model.named_parameters():
        ours = ".nblora_" in name
        assert parameter.dtype == (torch.float32 if ours else base_dtype), name
        assert parameter.requires_grad == ours, name
    before = adapted(base_dtype).state_dict()
    for name, value in model.state_dict().items():
        if ".nblora_" not in name:
            assert torch.equal(value, before[name]), name
    certificate = certify(model)
    assert certificate.holds
    assert max(layer.share for layer in certificate.layers) > 0.01
    losses = logged(run, "loss")
    assert losses[-1] < losses[0]
    return model


# --- batches and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_accumulated_micro_batches_are_one_batch(micro_batches: int, tmp_path: Path) -> None:
    """Gradient descent, since Adam turns the rounding of a gradient near zero into a whole step."""
    runs = []
    for count in (1, micro_batches):
        run = trainer(
            tmp_path / str(count),
            adapted(),
            optim="sgd",
            learning_rate=20.0,
            per_device_train_batch_size=8 // count,
            gradient_accumulation_steps=count,
        )
        run.train()
        check(run)
        runs.append(run)
    whole, accumulated = (tensors(run.model) for run in runs)
    for name, value in whole.items():
        torch.testing.assert_close(accumulated[name], value, rtol=0, atol=1e-4)
    start = tensors(adapted())
    assert max((whole[name] - start[name]).abs().max() for name in start) > 0.1


def test_clipped_gradients_move_no_further_than_the_limit(tmp_path: Path) -> None:
    """A step of gradient descent is the learning rate times the clipped gradient."""
    limit, rate = 1e-3, 20.0
    moves = {}
    for clip in (limit, 0.0):
        run = trainer(
            tmp_path / str(clip),
            adapted(),
            optim="sgd",
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_steps=1,
            max_grad_norm=clip,
        )
        start = tensors(run.model)
        run.train()
        end = tensors(run.model)
        moves[clip] = torch.stack([(end[name] - start[name]).norm() for name in start]).norm().item()
    assert moves[limit] == pytest.approx(rate * limit, rel=1e-3)
    assert moves[0.0] > 3 * moves[limit]


def test_the_gradient_that_is_logged_is_that_of_the_adapter(tmp_path: Path) -> None:
    run = trainer(tmp_path, adapted(), max_steps=1, max_grad_norm=1e-3)
    model = adapted()
    batch = run.data_collator([run.train_dataset[i] for i in range(8)])
    run.train_dataset = torch.utils.data.Subset(run.train_dataset, range(8))
    run.train()
    model(**batch).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    expected = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert logged(run, "grad_norm") == [pytest.approx(expected, rel=1e-3)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_trains_the_same(use_reentrant: bool, tmp_path: Path) -> None:
    runs = []
    for checkpointing in (False, True):
        run = trainer(
            tmp_path / str(checkpointing),
            adapted(dropout=0.1),
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        )
        run.train()
        check(run)
        runs.append(tensors(run.model))
    plain, checkpointed = runs
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=0, atol=1e-4)


# --- precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "choices"),
    [
        (torch.float32, {"bf16": True}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"bf16": True}),
        (torch.float16, {}),
    ],
    ids=["bf16 autocast", "bf16 model", "bf16 model and autocast", "fp16 model"],
)
@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
def test_half_precision_trains_float32_parameters(
    parametrization: str, dtype: torch.dtype, choices: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(dtype, parametrization=parametrization)
    run = trainer(tmp_path, model, gradient_accumulation_steps=2, **choices)
    run.train()
    for name, parameter in run.model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".nblora_" in name else dtype), name
    state = run.optimizer.optimizer.state if hasattr(run.optimizer, "optimizer") else run.optimizer.state
    assert {value.dtype for one in state.values() for value in one.values()} == {torch.float32}
    losses = logged(run, "loss")
    assert losses[-1] < losses[0] - 0.01
    assert certify(run.model).holds


@pytest.mark.gpu
@pytest.mark.parametrize("choices", [{"fp16": True}, {"bf16": True}], ids=str)
def test_mixed_precision_on_a_gpu(choices: dict[str, Any], tmp_path: Path) -> None:
    """With gradient scaling for float16."""
    run = trainer(tmp_path, adapted(), use_cpu=False, gradient_accumulation_steps=2, **choices)
    run.train()
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    losses = logged(run, "loss")
    assert losses[-1] < losses[0] - 0.01
    assert certify(run.model).holds


# --- checkpoints ------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(
    ("choices", "method"),
    [
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_grad_norm": 1e-2}, {}),
        ({"bf16": True, "gradient_checkpointing": True}, {"parametrization": "svd", "norm": "nuclear"}),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}, {"norm": "spectral"}),
        ({"max_grad_norm": 1e-2}, {"parametrization": "radial"}),
    ],
    ids=["accumulation and clipping", "bf16 and checkpointing", "schedule and decay", "radial"],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    choices: dict[str, Any], method: dict[str, Any], tmp_path: Path
) -> None:
    def run(folder: str, resume: bool = False, callbacks: Any = ()) -> Trainer:
        found = trainer(
            tmp_path / folder,
            adapted(dropout=0.1, **method),
            save_strategy="steps",
            save_steps=2,
            callbacks=list(callbacks),
            **choices,
        )
        found.train(resume_from_checkpoint=resume or None)
        return found

    whole = run("whole")
    run("parts", callbacks=[StopAt(2)])
    resumed = run("parts", resume=True)
    assert (whole.state.global_step, resumed.state.global_step) == (6, 6)
    assert same(tensors(resumed.model), tensors(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert certify(resumed.model).holds
    assert certify(tmp_path / "parts" / "checkpoint-6") == certify(whole.model)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.3])
    run = trainer(
        tmp_path,
        adapted(),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        eval_dataset=Sentences(),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    found = tensors(run.model)
    for step in (2, 4, 6):
        saved = PeftModel.from_pretrained(tiny_llama(), tmp_path / f"checkpoint-{step}")
        assert same(tensors(saved), found) == (step == 4)
    assert certify(run.model) == certify(tmp_path / "checkpoint-4")
    check(run)


# --- optimizers -------------------------------------------------------------------------------------


def plus_groups(model: PeftModel) -> dict[str, set[str]]:
    """The groups of LoRA+ by what they do with the learning rate: kinds of parameters."""
    optimizer = peft.optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
    )
    kinds = {
        id(p): name.split(".nblora_")[1].split(".")[0]
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    found: dict[str, set[str]] = {"as asked": set(), "higher": set(), "embedding": set()}
    for group in optimizer.param_groups:
        which = {1e-3: "as asked", 16e-3: "higher"}.get(group["lr"], "embedding")
        found[which] |= {kinds[id(p)] for p in group["params"]}
    return found


@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
def test_lora_plus_does_not_mistake_a_factor_for_lora_b(parametrization: str) -> None:
    groups = plus_groups(adapted(parametrization=parametrization))
    assert {"in", "out"} <= groups["as asked"]
    assert not {"in", "out"} & groups["higher"]
    assert not groups["embedding"]


@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
def test_lora_plus_leaves_vectors_at_the_learning_rate(parametrization: str) -> None:
    assert not plus_groups(adapted(parametrization=parametrization))["higher"]


def test_training_with_lora_plus_keeps_the_bound(tmp_path: Path) -> None:
    model = adapted()
    optimizer = peft.optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0
    )
    run = trainer(tmp_path, model, optimizers=(optimizer, None))
    run.train()
    check(run)


def test_optimizers_for_factors_of_lora_refuse(tmp_path: Path) -> None:
    """LoRA-FA and the Riemannian one need lora_A and lora_B; neither trains something else instead."""
    model = adapted()
    optimizer = peft.optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=4, lr=1e-2)
    start = tensors(model)
    with pytest.raises(TypeError, match="NoneType"):
        trainer(tmp_path, model, optimizers=(optimizer, None)).train()
    assert same(tensors(model), start)
    with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
        peft.optimizers.create_riemannian_optimizer(adapted(), torch.optim.SGD, lr=1e-2)
