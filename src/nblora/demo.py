"""The demo: what a bound does to forgetting, on real images, in two minutes on two cores.

A small vision transformer is pretrained on scikit-learn's handwritten digits, then adapted to the same
digits rotated by 90° with LoRA and with NB-LoRA at several learning rates, through transformers'
Trainer. Reported are the accuracy on the rotated digits (target) and what is left of the accuracy on
upright ones (source).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from nblora.certificate import certify
from nblora.checkpoints import export_lora
from nblora.spectral import spectral_norm
from nblora.tuner import NBLoraConfig

Advance = Callable[[], None]


@dataclass(frozen=True)
class Recipe:
    """What is run; together with the versions of the libraries it determines the result.

    Attributes:
        seed: of the split of the data, the pretraining and every adaptation.
        rank: of both methods.
        bound: on the Frobenius norm of every update, times the spectral norm of the layer's weight.
        learning_rates: tried by both methods.
        epochs: of every adaptation.
        pretraining_epochs: of the base model.
    """

    seed: int = 0
    rank: int = 8
    bound: float = 0.566
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    epochs: int = 5
    pretraining_epochs: int = 30

    def methods(self) -> dict[str, PeftConfig]:
        """The configurations that are compared, both with the classification head frozen."""
        shared: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": ["classifier"]}
        return {
            "LoRA": LoraConfig(r=self.rank, lora_alpha=2 * self.rank, **shared),
            "NB-LoRA": NBLoraConfig(r=self.rank, norm="frobenius", bound=self.bound, **shared),
        }


@dataclass(frozen=True)
class Run:
    """One adaptation.

    Attributes:
        method: "LoRA" or "NB-LoRA".
        learning_rate: peak of a linear decay.
        validation: accuracy on rotated validation digits, by which a user would choose.
        target: accuracy on rotated test digits.
        source: accuracy on upright test digits.
        update: the largest over the layers of ||ΔW||_F / ||W0||_2.
        bound: on that number, or None.
    """

    method: str
    learning_rate: float
    validation: float
    target: float
    source: float
    update: float
    bound: float | None


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo measured.

    Attributes:
        recipe: what was run.
        source_before: accuracy of the base model on upright test digits.
        target_before: and on rotated ones.
        runs: all adaptations, by learning rate, then method.
    """

    recipe: Recipe
    source_before: float
    target_before: float
    runs: tuple[Run, ...]

    def chosen(self, method: str) -> Run:
        """The run of a method with the best target validation accuracy; of equals, the first."""
        return max((run for run in self.runs if run.method == method), key=lambda run: run.validation)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


class _Digits(Dataset[dict[str, Tensor]]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images  # (count, 1, 8, 8) in [-1, 1]
        self.labels = labels  # (count,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    def rotated(self) -> _Digits:
        return _Digits(self.images.rot90(1, (-2, -1)), self.labels)


@dataclass(frozen=True)
class _Data:
    source: _Digits  # 800 to pretrain on
    target: _Digits  # 400 to adapt to, rotated
    validation: _Digits  # 200, rotated
    test: _Digits  # 397


def _load_data(seed: int) -> _Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    order = torch.tensor(np.random.default_rng(seed).permutation(len(labels)))
    source, target, validation, test = (
        _Digits(images[part], labels[part]) for part in order.split([800, 400, 200, 397])
    )
    return _Data(source, target.rotated(), validation.rotated(), test)


def run_demo(
    out_dir: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    advance: Advance = lambda: None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> DemoResult:
    """Run the demo and write its folder.

    Args:
        out_dir: gets `results.json`, `tradeoff.png`, and of the chosen NB-LoRA run `adapter/`,
            `certificate.json` and the plain-LoRA export `lora/`.
        recipe: what to run.
        advance: called after each of the `training_steps` of a recipe.
        cache_dir: where the pretrained model is kept; the user's cache folder without it.

    Raises:
        ValueError: for a rank or a bound that a method refuses.
        OSError: if a folder cannot be written.
    """
    recipe = recipe or Recipe()
    recipe.methods()  # an impossible recipe is refused before anything is written
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that threads would wait for each other
    try:
        return _run(out, recipe, advance, Path(cache_dir) if cache_dir else _cache_dir())
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, recipe: Recipe, advance: Advance, cache_dir: Path) -> DemoResult:
    data = _load_data(recipe.seed)
    base = _pretrained(recipe, data, advance, cache_dir)
    runs: list[Run] = []
    chosen: PeftModel | None = None
    for learning_rate in recipe.learning_rates:
        for method, config in recipe.methods().items():
            model, run = _adapt(base, method, config, learning_rate, recipe, data, advance)
            best = max((r.validation for r in runs if r.method == method), default=-1.0)
            if method == "NB-LoRA" and run.validation > best:
                chosen = model
            runs.append(run)
    model = ViTForImageClassification.from_pretrained(base)
    result = DemoResult(
        recipe,
        source_before=_accuracy(model, data.test),
        target_before=_accuracy(model, data.test.rotated()),
        runs=tuple(runs),
    )
    assert chosen is not None
    chosen.save_pretrained(out / "adapter")
    certificate = certify(out / "adapter")
    (out / "certificate.json").write_text(certificate.to_json())
    export_lora(out / "adapter", out / "lora")
    (out / "results.json").write_text(result.to_json())
    plot(result, out / "tradeoff.png")
    return result


def training_steps(recipe: Recipe) -> int:
    """How often `run_demo` calls `advance` at most (less where the pretrained model is cached)."""
    adaptations = len(recipe.learning_rates) * len(recipe.methods())
    return 25 * recipe.pretraining_epochs + 13 * recipe.epochs * adaptations


def _pretrained(recipe: Recipe, data: _Data, advance: Advance, cache_dir: Path) -> Path:
    """The folder of the pretrained model, from the cache or trained now."""
    fixed = replace(recipe, rank=0, bound=0.0, learning_rates=(), epochs=0)
    key = repr((fixed, torch.__version__, transformers.__version__))
    folder = cache_dir / f"demo-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        for _ in range(25 * recipe.pretraining_epochs):
            advance()
        return folder
    set_seed(recipe.seed)
    model = small_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=25 * recipe.pretraining_epochs
    )
    _train(model, data.source, recipe.pretraining_epochs, 3e-3, recipe.seed, advance, (optimizer, schedule))
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as temporary:
        model.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(temporary, folder)
    return folder


def small_vit(**options: Any) -> ViTForImageClassification:
    """A vision transformer for 8x8 digits, at random; 127,000 parameters.

    Args:
        options: further fields of its configuration.
    """
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        # nn.Linear's own scale at 64 inputs; the default 0.02 is meant for models 12 times as wide, and
        # leaves weights so small that a bound relative to them leaves little to learn with
        initializer_range=0.072,
        **options,
    )
    return ViTForImageClassification(config)


def _cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "nblora"


def _adapt(
    base: Path,
    method: str,
    config: PeftConfig,
    learning_rate: float,
    recipe: Recipe,
    data: _Data,
    advance: Advance,
) -> tuple[PeftModel, Run]:
    set_seed(recipe.seed)
    model = get_peft_model(ViTForImageClassification.from_pretrained(base), config)
    _train(model, data.target, recipe.epochs, learning_rate, recipe.seed, advance)
    run = Run(
        method=method,
        learning_rate=learning_rate,
        validation=_accuracy(model, data.validation),
        target=_accuracy(model, data.test.rotated()),
        source=_accuracy(model, data.test),
        update=_largest_update(model),
        bound=recipe.bound if isinstance(config, NBLoraConfig) else None,
    )
    return model, run


class _Progress(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.advance()


def _train(
    model: torch.nn.Module,
    data: _Digits,
    epochs: int,
    learning_rate: float,
    seed: int,
    advance: Advance,
    optimizers: tuple[Any, Any] = (None, None),
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            output_dir=temporary,
            per_device_train_batch_size=32,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            weight_decay=0.0,
            lr_scheduler_type="linear",
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            optimizers=optimizers,
            callbacks=[_Progress(advance)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@torch.no_grad()
def _accuracy(model: torch.nn.Module, data: _Digits) -> float:
    model.eval()
    predicted = model(pixel_values=data.images).logits.argmax(-1)
    return float((predicted == data.labels).float().mean())


@torch.no_grad()
def _largest_update(model: torch.nn.Module) -> float:
    """The largest over the adapted layers of ||ΔW||_F / ||W0||_2."""
    return max(
        float(module.get_delta_weight("default").double().norm() / spectral_norm(module.get_base_weight()))
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    )


def plot(result: DemoResult, file: Path) -> None:
    """Draw the trade-off of target and source accuracy, and both against the learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    trade_off, rates = figure.subplots(1, 2)
    for method, color, marker, below in (("LoRA", "#c44e52", "s", False), ("NB-LoRA", "#2a6fbb", "o", True)):
        runs = [run for run in result.runs if run.method == method]
        target = [100 * run.target for run in runs]
        source = [100 * run.source for run in runs]
        trade_off.plot(target, source, color=color, marker=marker, label=method)
        best = result.chosen(method)
        trade_off.scatter(
            [100 * best.target], [100 * best.source], s=220, facecolors="none", edgecolors=color
        )
        trade_off.annotate(
            f"chosen: {best.learning_rate:g}",
            (100 * best.target, 100 * best.source),
            xytext=(-8, -20 if below else 12),
            textcoords="offset points",
            ha="right",
            color=color,
        )
        learning_rates = [run.learning_rate for run in runs]
        rates.plot(learning_rates, target, color=color, marker=marker, label=f"{method}, target")
        rates.plot(
            learning_rates, source, color=color, marker=marker, linestyle="--", label=f"{method}, source kept"
        )
    for axes in (trade_off, rates):
        axes.axhline(100 * result.source_before, color="0.6", linestyle=":", label="source before")
        axes.set_ylim(0, 104)
    trade_off.set(
        title="What is learned against what is kept",
        xlabel="target accuracy: digits rotated by 90° (%)",
        ylabel="source accuracy kept: upright digits (%)",
        xlim=(0, 104),
    )
    rates.set(title="Careless learning rates", xlabel="learning rate", ylabel="accuracy (%)", xscale="log")
    trade_off.legend(loc="lower right")
    rates.legend(loc="lower left")
    figure.savefig(file, dpi=110)
