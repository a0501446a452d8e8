"""What fine-tuning learns and what it forgets: every method, on two real tasks that need no download.

Vision: a small vision transformer, pretrained on scikit-learn's handwritten digits, learns digits
rotated by 90°; kept are the upright ones. Language: a small byte-level Llama, pretrained on English text
that ships with Python, learns Python source of the standard library; kept is the English.
All runs go through `nblora.comparison.compare`; done ones are never repeated.

    python benchmarks/forgetting.py --quick     # minutes; exits with 1 if a gate is missed
    python benchmarks/forgetting.py             # the full grid; resumable
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import shutil
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)

from nblora.comparison import ComparisonConfig, compare
from nblora.demo import small_vit
from nblora.executors import LocalExecutor

HERE = Path(__file__).parent
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


# --- the two tasks: base models and data on disk, one of each for a seed ---


def make_vision(folder: Path, seed: int) -> None:
    """A ViT pretrained on 800 upright digits; 400 rotated ones to learn; 200 and 397 to judge by."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(images))
    source, target, validation, test = np.split(order, [800, 1200, 1400])

    def rows(index: np.ndarray, turns: int) -> Dataset:
        from PIL import Image as PIL

        pictures = [PIL.fromarray(np.rot90(images[i], turns).copy()) for i in index]
        data = {"image": pictures, "label": [str(digits.target[i]) for i in index]}
        return Dataset.from_dict(data).cast_column("image", Image())

    target_data = {"train": rows(target, 1), "validation": rows(validation, 1), "test": rows(test, 1)}
    DatasetDict(target_data).save_to_disk(str(folder / "target"))
    DatasetDict({"validation": rows(validation, 0), "test": rows(test, 0)}).save_to_disk(str(folder / "keep"))
    processor = ViTImageProcessorPil(
        do_resize=False, size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]
    )
    processor.save_pretrained(folder / "model")
    set_seed(seed)
    digit_names = {i: str(i) for i in range(10)}
    model = small_vit(id2label=digit_names, label2id={name: i for i, name in digit_names.items()})
    pixels = torch.tensor(images[source], dtype=torch.float32)[:, None] / 127.5 - 1
    labels = torch.tensor(digits.target[source])
    train = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels)]
    _pretrain(model, train, epochs=30, batch=32, learning_rate=3e-3, seed=seed)
    model.save_pretrained(folder / "model")


LANGUAGE_BLOCK = 64


def make_language(folder: Path, seed: int) -> None:
    """A byte-level Llama pretrained on English; 160 blocks of Python source to learn."""
    english, code = _english(), _python_source()
    rng = np.random.default_rng(seed)

    def blocks(text: str, count: int) -> list[str]:
        whole = [text[i : i + LANGUAGE_BLOCK] for i in range(0, len(text) - LANGUAGE_BLOCK, LANGUAGE_BLOCK)]
        return [whole[i] for i in rng.permutation(len(whole))[:count]]

    cut = int(0.9 * len(english))
    code_cut = int(0.5 * len(code))

    def rows(texts: Sequence[str]) -> Dataset:
        return Dataset.from_dict({"text": list(texts)})

    held_out = blocks(code[code_cut:], 384)
    target = {
        "train": rows(blocks(code[:code_cut], 160)),
        "validation": rows(held_out[:128]),
        "test": rows(held_out[128:]),
    }
    DatasetDict(target).save_to_disk(str(folder / "target"))
    kept = blocks(english[cut:], 384)
    DatasetDict({"validation": rows(kept[:128]), "test": rows(kept[128:])}).save_to_disk(str(folder / "keep"))
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    set_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=LANGUAGE_BLOCK,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.072,
    )
    model = LlamaForCausalLM(config)
    ids = [tokenizer(text)["input_ids"] for text in blocks(english[:cut], 16384)]
    train = [{"input_ids": torch.tensor(i), "labels": torch.tensor(i)} for i in ids]
    _pretrain(model, train, epochs=2, batch=16, learning_rate=3e-3, seed=seed)
    model.save_pretrained(folder / "model")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.model_max_length = LANGUAGE_BLOCK
    return fast


def _english() -> str:
    """Python's language reference, and the docstrings of half of the standard library, as ASCII."""
    from pydoc_data.topics import topics

    docstrings: list[str] = []
    for tree in map(ast.parse, _modules()[::2]):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        docstrings += [ast.get_docstring(node) or "" for node in nodes]
    text = "\n".join([*topics.values(), *docstrings])
    return text.encode("ascii", "ignore").decode()


def _python_source() -> str:
    """The other half of the standard library."""
    return "\n".join(_modules()[1::2]).encode("ascii", "ignore").decode()


def _modules() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text(encoding="utf-8") for file in files]


def _pretrain(
    model: torch.nn.Module, data: list[Any], *, epochs: int, batch: int, learning_rate: float, seed: int
) -> None:
    steps = epochs * -(-len(data) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            output_dir=temporary,
            per_device_train_batch_size=batch,
            num_train_epochs=epochs,
            weight_decay=0.0,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, schedule)).train()


MAKERS: dict[str, Callable[[Path, int], None]] = {"vision": make_vision, "language": make_language}


def made(task: str, seed: int, work: Path) -> Path:
    """The folder of a task's base model and data, made if it is not there."""
    folder = work / task / f"seed-{seed}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            MAKERS[task](Path(temporary), seed)
            shutil.copytree(temporary, folder.with_suffix(".partial"), dirs_exist_ok=True)
        os.replace(folder.with_suffix(".partial"), folder)
    return folder


# --- the grids ---

SHARED: dict[str, dict[str, Any]] = {
    "vision": {
        "task": "image-cls",
        "train": {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 200},
    },
    "language": {
        "task": "causal-lm",
        "train": {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 128},
        "max_length": LANGUAGE_BLOCK,
    },
}
BOUND = {"vision": 0.566, "language": 0.283}
"""Frobenius bounds, times each weight's spectral norm."""


def methods(task: str) -> dict[str, dict[str, Any]]:
    bound = BOUND[task]
    return {
        "nblora": {},
        "nblora-svd": {},
        # at rank 8 the same largest Frobenius norm as above
        "nblora-spectral": {"bound": round(bound / 8**0.5, 3), "label": "NB-LoRA, spectral"},
        # and the same nuclear norm as a flat spectrum of that Frobenius norm at rank 8
        "nblora-nuclear": {"bound": round(bound * 8**0.5, 3), "label": "NB-LoRA, nuclear"},
        "lora": {},
        "lora-16": {"method": "lora", "lora_alpha": 16, "label": "LoRA, α = 16"},
        "rslora": {},
        "dora": {},
        "pissa": {},
        "lora+": {},
        "delora": {},
        "oft": {},
        "hra": {},
        "full": {},
        "rasa": {},
        "wara": {},
    }


def settings(task: str, work: Path, grid: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The comparison of a task on a grid: "full", "quick", "start", "parametrizations" or one of DEFAULTS."""
    folder = str(work / task / "seed-{seed}")
    chosen = methods(task)
    axes: dict[str, Any] = {"learning_rates": RATES, "ranks": [2, 8, 32], "epochs": [1, 5, 20]}
    if grid == "quick":
        chosen = {name: chosen[name] for name in ("nblora", "lora")}
        axes = {"learning_rates": [3e-3, 1e-2, 3e-2, 1e-1], "ranks": [2, 8, 32], "epochs": [5, 20]}
        if task == "language":
            axes = {"learning_rates": [1e-3, 3e-3, 1e-2, 3e-2], "ranks": [8], "epochs": [5]}
    bounds = [BOUND[task]]
    if grid == "start":
        chosen = {"nblora": {}, "nblora-gradient": {}, "lora": {}}
        axes = {"learning_rates": RATES[1:6], "ranks": [8], "epochs": [1, 5]}
    if grid == "parametrizations":
        chosen = {"nblora": {}, "nblora-svd": {}, "nblora-radial": {}}
    if grid.startswith("defaults"):
        axes = {"learning_rates": [3e-3, 1e-2, 3e-2], "ranks": [8], "epochs": [5, 20]}
        chosen = {"nblora": {"label": "weight decay 0.1" if grid == "defaults-decay" else "NB-LoRA"}}
    if grid == "defaults-temperature":
        chosen = {
            "cold": {"method": "nblora", "temperature": 0.3, "label": "temperature 0.3"},
            "warm": {"method": "nblora", "temperature": 3.0, "label": "temperature 3"},
        }
    if grid == "defaults-bounds":
        bounds = [0.1, 0.2, 0.3, 0.6, 1.0]
    decay = {"weight_decay": 0.1} if grid == "defaults-decay" else {}
    return {
        **SHARED[task],
        **axes,
        "model": f"{folder}/model",
        "data": f"{folder}/target",
        "keep": f"{folder}/keep",
        "methods": chosen,
        "bounds": bounds,
        "grid": "star",
        "reference": {"rank": 8, "epochs": 5},
        "seeds": list(seeds),
        "train": {**SHARED[task]["train"], "use_cpu": True, "dataloader_pin_memory": False, **decay},
    }


DEFAULTS = ("defaults-bounds", "defaults-temperature", "defaults-decay")
SEEDS = {"full": (0, 1, 2), "quick": (0, 1), "start": (0, 1, 2), "parametrizations": (0, 1, 2)}


# --- gates on the quick vision benchmark ---


def gates(comparison: Mapping[str, Any]) -> list[tuple[str, float, str, float]]:
    """Name, value in percent or points on seed means, "≥" or "≤", limit."""
    runs = comparison["runs"]

    def mean(score: str, method: str, rate: float, rank: int = 8, epochs: float = 5) -> float:
        values = [
            run[score]
            for run in runs
            if (run["method"], run["learning_rate"], run["rank"], run["epochs"])
            == (method, rate, rank, epochs)
        ]
        if not values or any(value is None for value in values):
            return float("nan")
        return 100 * float(np.mean(values))

    def both(method: str, rate: float) -> float:
        return (mean("target", method, rate) + mean("kept", method, rate)) / 2

    def best(method: str) -> float:
        return max(both(method, rate) for rate in (3e-3, 1e-2, 3e-2, 1e-1))

    best_rate = max((1e-2, 3e-2, 1e-1), key=lambda rate: mean("validation", "nblora", rate))
    spread = [mean("target", "nblora", best_rate, rank) for rank in (2, 8, 32)]
    unhealthy = sum(run["status"] != "done" for run in runs)
    nb, lora = "nblora", "lora"
    return [
        (
            "NB-LoRA, worst kept of rates 1e-2…1e-1",
            min(mean("kept", nb, r) for r in (1e-2, 3e-2, 1e-1)),
            "≥",
            85,
        ),
        ("NB-LoRA, target at 1e-2, r 8, 20 epochs", mean("target", nb, 1e-2, epochs=20), "≥", 88),
        ("best mean of target and kept, NB-LoRA − LoRA", best(nb) - best(lora), "≥", -1),
        ("NB-LoRA, drop of that mean 1e-2 → 1e-1", both(nb, 1e-2) - both(nb, 1e-1), "≤", 8),
        ("LoRA, drop of that mean 3e-3 → 3e-2", both(lora, 3e-3) - both(lora, 3e-2), "≥", 30),
        ("NB-LoRA, target spread over ranks 2–32", max(spread) - min(spread), "≤", 8),
        ("runs that failed or diverged", unhealthy, "≤", 0),
    ]


def holds(value: float, sign: str, limit: float) -> bool:
    """Whether a gate is kept; NaN never is."""
    return value >= limit if sign == "≥" else value <= limit


# --- the documentation's tables ---


def table(comparison: Mapping[str, Any]) -> str:
    """What a comparison found, in Markdown: accuracies in percent, or nats gained and lost."""
    nats = comparison["metric"] == "nats"
    before = comparison["before"]
    seeds = {run["seed"] for run in comparison["runs"]}

    def pair(place: Mapping[str, Any] | None) -> str:
        if place is None:
            return "–"
        target, kept = place["target"]["mean"], place["kept"]["mean"]
        if nats:
            return f"{target - before['target']:.3f}/{before['kept'] - kept:.3f}"
        return f"{100 * target:.1f}/{100 * kept:.1f}"

    def spread(place: Mapping[str, Any]) -> str:
        target, kept = place["target"]["std"], place["kept"]["std"]
        return f"{target:.3f}/{kept:.3f}" if nats else f"{100 * target:.1f}/{100 * kept:.1f}"

    def at(places: Sequence[Mapping[str, Any]], rank: int | None, epochs: float) -> Mapping[str, Any] | None:
        found = [place for place in places if (place["rank"], place["epochs"]) == (rank, epochs)]
        return found[0] if found else None

    heading = [
        "method",
        "r 8, 5 epochs (rate)",
        "± seeds",
        "r 8, 20 epochs",
        "that rate at r 2 · r 32 · 20 epochs",
        "mean of all settings",
        "worst lost of all settings" if nats else "worst kept of all settings",
        "near best",
        "hypervolume",
        "s",
    ]
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    for entry in comparison["methods"]:
        if not entry["available"]:
            lines.append(
                f"| {entry['label']} | not available: {entry['reason']} |" + " |" * (len(heading) - 2)
            )
            continue
        rank = None if entry["method"] == "full" else 8
        picked = at(entry["picked"], rank, 5)
        if picked is None:
            continue
        reused = [at(entry["transfer"], *place) for place in ((2, 5), (32, 5), (rank, 20))]
        whole = entry["whole_grid"]
        worst = before["kept"] - whole["kept"]["worst"] if nats else 100 * whole["kept"]["worst"]
        near, volume = entry["near_best"]["both"], entry["hypervolume"]
        cells = [
            entry["label"],
            f"{pair(picked)} ({picked['learning_rate']:g})",
            spread(picked) if len(seeds) > 1 else "one seed",
            pair(at(entry["picked"], rank, 20)),
            " · ".join(map(pair, reused)),
            pair({name: {"mean": whole[name]["mean"]} for name in ("target", "kept")}),
            f"{worst:.2f}" if nats else f"{worst:.0f}",
            f"{near:.0%}",
            f"{volume['mean']:.3f}",
            f"{entry['seconds']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- the command line ---


def _show(progress: Progress, bar: TaskID, record: Mapping[str, Any] | None, share: float) -> None:
    progress.update(bar, completed=share)


def run(
    task: str, grid: str, seeds: Sequence[int], work: Path, workers: int, console: Console
) -> dict[str, Any]:
    """Do a comparison, or what of it is missing; its figures also go to results/."""
    start = time.perf_counter()
    for seed in seeds:
        made(task, seed, work)
    config = ComparisonConfig.of(settings(task, work, grid, seeds))
    out = work / f"{task}-{grid}"
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %")
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(f"{task}, {grid}", total=1.0)
        comparison = compare(
            config,
            out,
            executor=LocalExecutor(workers, threads=1),
            on_run=functools.partial(_show, progress, bar),
        )
    console.print(
        f"{time.perf_counter() - start:.0f} s; see {out}/report.html", highlight=False, soft_wrap=True
    )
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    shutil.copy(out / "runs.csv", results / f"forgetting-{task}-{grid}.csv")
    return comparison


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grids = parser.add_mutually_exclusive_group()
    for name, chosen, text in (
        ("quick", ("quick",), "NB-LoRA against LoRA, with gates"),
        ("start", ("start",), "NB-LoRA from random directions and the gradient"),
        ("parametrizations", ("parametrizations",), "joint, svd and radial"),
        ("defaults", DEFAULTS, "NB-LoRA's bound, temperature and weight decay"),
    ):
        grids.add_argument(f"--{name}", dest="grids", action="store_const", const=chosen, help=text)
    parser.set_defaults(grids=("full",))
    parser.add_argument("--task", choices=[*MAKERS], action="append", help="both without it")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="0 1 2 without it; fewer with --quick, --defaults"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="models, data and runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    work = options.work.absolute()
    missed = 0
    for task in options.task or MAKERS:
        for grid in options.grids:
            seeds = options.seeds or (
                SEEDS.get(grid, (0,)) if (task, grid) != ("language", "quick") else (0,)
            )
            comparison = run(task, grid, seeds, work, options.workers, console)
            print(table(comparison))
            if (task, grid) != ("vision", "quick"):
                continue
            for name, value, sign, limit in gates(comparison):
                kept = holds(value, sign, limit)
                missed += not kept
                console.print(
                    f"{'ok    ' if kept else 'MISSED'} {name}: {value:.1f} {sign} {limit}", highlight=False
                )
    return 1 if missed else 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
    raise SystemExit(main())
