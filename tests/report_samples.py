"""Inputs of reports: what a fine-tuning job and a comparison write, with plausible numbers."""

from __future__ import annotations

import math
import random
from typing import Any

from nblora.certificate import Certificate, LayerCertificate
from nblora.summary import hypervolume_corner, summarise_method, worst_scores

LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
VIT = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")


def certificate(
    blocks: int = 3,
    kinds: tuple[str, ...] = VIT,
    prefix: str = "vit.layers",
    rank: int = 8,
    share: float = 0.8,
) -> Certificate:
    """Updates whose Frobenius norm uses about a share of the bound, more of it deeper in the model."""
    dice = random.Random(0)
    layers = []
    for block in range(blocks):
        for k, kind in enumerate(kinds):
            bound = 0.2 + 0.05 * k
            used = min(0.995, share * (0.7 + 0.3 * (block + 1) / blocks) * dice.uniform(0.8, 1.15))
            sigma = sorted((math.exp(-0.5 * j) * dice.uniform(0.8, 1.2) for j in range(rank)), reverse=True)
            scale = used * bound / math.hypot(*sigma)
            values = tuple(scale * s for s in sigma)
            name = f"{prefix}.{block}.{kind}"
            layers.append(LayerCertificate(name, (64, 64), rank, values, math.hypot(*values), bound))
    return Certificate("frobenius", tuple(layers))


def finetuning(**changes: Any) -> dict[str, Any]:
    """The metrics of a small vision transformer that learned rotated digits."""
    dice = random.Random(1)
    history: list[dict[str, Any]] = []
    spectra: list[dict[str, Any]] = []
    for step in range(5, 131, 5):
        loss = 2.3 * math.exp(-step / 45) + 0.25 + dice.uniform(-0.06, 0.06)
        rate = 0.01 * (1 - step / 131)
        history.append(
            {"step": step, "epoch": step / 13, "loss": loss, "learning_rate": rate, "grad_norm": 0.4}
        )
    for epoch in range(1, 11):
        step, done = 13 * epoch, 1 - math.exp(-epoch / 3)
        target, kept = 0.11 + 0.76 * done + dice.uniform(-0.01, 0.01), 0.984 - 0.055 * done
        history.append(
            {
                "step": step,
                "epoch": float(epoch),
                "target": {"score": target, "accuracy": target, "nats": 2.3 - 1.8 * done},
                "keep": {"score": kept, "accuracy": kept, "nats": 0.05 + 0.2 * done},
            }
        )
        layers = {
            layer.name: {
                "norm": layer.norm * done,
                "share": layer.share * done,
                "top": [value * done for value in layer.singular_values[:2]],
            }
            for layer in certificate().layers
        }
        spectra.append({"step": step, "layers": layers})
    history.sort(key=lambda entry: entry["step"])
    metrics: dict[str, Any] = {
        "nblora": "0.1.0",
        "task": "image-cls",
        "model": "models/digits-vit",
        "data": "data/rotated-digits",
        "keep": "data/upright-digits",
        "metric": "accuracy",
        "method": "NB-LoRA",
        "adapter": {
            "norm": "frobenius",
            "bound": 0.566,
            "bound_kind": "relative",
            "r": 8,
            "parametrization": "joint",
        },
        "train": {"learning_rate": 0.01, "num_train_epochs": 10},
        "before": {
            "target": {"score": 0.101, "accuracy": 0.101, "nats": 2.312},
            "keep": {"score": 0.985, "accuracy": 0.985, "nats": 0.052},
        },
        "after": {
            "target": {"score": 0.863, "accuracy": 0.863, "nats": 0.571},
            "keep": {"score": 0.932, "accuracy": 0.932, "nats": 0.241},
        },
        "history": history,
        "spectra": spectra,
        "samples": {"train": 400, "validation": 200, "test": 397, "keep": 397},
        "trainable_parameters": 24576,
        "parameters": 126794,
        "seconds": 83.4,
        "peak_memory_bytes": 431_000_000,
        "seed": 0,
    }
    return metrics | changes


def language_finetuning(**changes: Any) -> dict[str, Any]:
    """The metrics of a language model that learned code."""
    before = {"target": {"score": -2.114, "nats": 2.114, "perplexity": 8.281}}
    before["keep"] = {"score": -1.402, "nats": 1.402, "perplexity": 4.063}
    after = {"target": {"score": -1.81, "nats": 1.81, "perplexity": 6.11}}
    after["keep"] = {"score": -1.567, "nats": 1.567, "perplexity": 4.792}
    history = []
    for epoch in range(1, 6):
        done = 1 - math.exp(-epoch / 1.7)
        history.append({"step": 40 * epoch, "epoch": epoch, "loss": 2.1 - 0.35 * done, "learning_rate": 1e-3})
        history.append(
            {
                "step": 40 * epoch,
                "epoch": epoch,
                "target": {"score": -2.11 + 0.31 * done},
                "keep": {"score": -1.4 - 0.17 * done},
            }
        )
    changed = {
        "task": "causal-lm",
        "model": "meta-llama/Llama-3.2-1B",
        "data": "data/python.jsonl",
        "keep": "data/english.txt",
        "metric": "nats",
        "before": before,
        "after": after,
        "history": history,
        "spectra": [],
        "seconds": 15_130.0,
        "peak_memory_bytes": 13_300_000_000,
        "trainable_parameters": 11_272_192,
        "parameters": 1_247_086_592,
        "samples": {"train": 12_400, "validation": 1550, "test": 1550, "keep": 1800},
    }
    return finetuning() | changed | changes


METHODS = {  # label, best learning rate, best target, how narrow, kept there, lost a decade above it
    "lora": ("LoRA", 0.003, 0.905, 0.55, 0.62, 0.55),
    "nblora": ("NB-LoRA", 0.015, 0.868, 0.16, 0.93, 0.01),
    "nblora-svd": ("NB-LoRA svd", 0.02, 0.86, 0.2, 0.92, 0.02),
    "dora": ("DoRA", 0.003, 0.912, 0.5, 0.58, 0.5),
    "pissa": ("PiSSA", 0.002, 0.885, 0.6, 0.45, 0.4),
    "delora": ("DeLoRA", 0.02, 0.82, 0.35, 0.89, 0.1),
    "oft": ("OFT", 0.004, 0.87, 0.4, 0.7, 0.3),
    "full": ("full fine-tuning", 0.001, 0.9, 0.7, 0.66, 0.6),
}


def runs(metric: str = "accuracy", seeds: int = 3, kept: bool = True) -> list[dict[str, Any]]:
    """A grid of runs of `METHODS`, some of which diverged or failed."""
    dice, found = random.Random(2), []
    for method, (_, best_rate, top, narrow, keeps, falls) in METHODS.items():
        for rank in (None,) if method == "full" else (2, 8, 32):
            for epochs in (1, 5, 20):
                for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
                    for seed in range(seeds):
                        shift = (
                            0 if rank is None or method.startswith("nblora") else 0.12 * math.log(rank / 8)
                        )
                        off = math.log10(rate / best_rate) + shift + 0.4 * math.log10(epochs / 5)
                        learned = max(0.1, top - narrow * max(off, 0) ** 1.5 - 0.42 * max(-off, 0) ** 1.3)
                        forgot = (0.985 - keeps) / (1 + math.exp(-3 * off)) * 2 + falls * max(off, 0)
                        target = learned + dice.uniform(-0.02, 0.02)
                        remains = min(0.985, max(0.08, 0.985 - forgot)) + dice.uniform(-0.012, 0.0)
                        lost = method in ("lora", "full", "pissa") and rate == 0.1 and seed == 0
                        failed = method == "oft" and rank == 32 and seed == 1 and rate == 1e-4
                        if metric == "nats":
                            target = (
                                -2.1 + 0.4 * (target - 0.1) - (0.8 * max(off, 0) ** 2 if narrow > 0.3 else 0)
                            )
                            remains = (
                                -1.4
                                - 0.45 * (0.985 - remains)
                                - (3 * max(off - 0.6, 0) ** 2 if falls > 0.2 else 0)
                            )
                        scored = not lost and not failed
                        found.append(
                            {
                                "method": method,
                                "learning_rate": rate,
                                "rank": rank,
                                "epochs": epochs,
                                "bound": 0.566 if method.startswith("nblora") else None,
                                "seed": seed,
                                "status": "diverged" if lost else "failed" if failed else "done",
                                "error": "CUDA out of memory: tried to allocate 2 GiB" if failed else None,
                                "validation": target + dice.uniform(-0.02, 0.02) if scored else None,
                                "target": target if scored else None,
                                "kept_validation": remains if scored and kept else None,
                                "kept": remains if scored and kept else None,
                                "seconds": None
                                if failed
                                else 0.6 * epochs * (1.5 if "nb" in method else 1.2),
                                "peak_memory_bytes": None if failed else int(3.9e8 + 2e6 * (rank or 60)),
                            }
                        )
    return found


def comparison(metric: str = "accuracy", seeds: int = 3, kept: bool = True, **changes: Any) -> dict[str, Any]:
    """A whole comparison."""
    found = runs(metric, seeds, kept)
    before: dict[str, Any] = (
        {"target": 0.101, "kept": 0.985} if metric == "accuracy" else {"target": -2.1, "kept": -1.4}
    )
    before["kept"] = before["kept"] if kept else None
    corner = hypervolume_corner({**before, "metric": metric})
    methods: list[dict[str, Any]] = []
    for method, (label, *_) in METHODS.items():
        summary = summarise_method(
            [run for run in found if run["method"] == method],
            reference=(None if method == "full" else 8, 5),
            worst=worst_scores(found),
            tolerance=0.02,
            corner=corner,
        )
        methods.append({"method": method, "label": label, "available": True, "reason": None, **summary})
    for method, label in (("rasa", "RaSA"), ("wara", "WaRA")):
        methods.append(
            {"method": method, "label": label, "available": False, "reason": "no maintained library has it"}
        )
    values: dict[str, Any] = {
        "nblora": "0.1.0",
        "task": "image-cls" if metric == "accuracy" else "causal-lm",
        "model": "models/digits-vit" if metric == "accuracy" else "models/bytes-llama",
        "data": "data/rotated-digits" if metric == "accuracy" else "data/python.txt",
        "keep": ("data/upright-digits" if metric == "accuracy" else "data/english.txt") if kept else None,
        "metric": metric,
        "before": before,
        "reference": {"rank": 8, "epochs": 5},
        "tolerance": 0.02,
        "grid": {
            "learning_rates": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
            "ranks": [2, 8, 32],
            "epochs": [1, 5, 20],
            "bounds": [0.566],
            "seeds": list(range(seeds)),
        },
        "config": {"model": "models/digits-vit", "methods": {method: {} for method in METHODS}},
        "command": ["nblora", "compare", "--config", "sweep.yaml", "--out", "sweep"],
        "hypervolume_corner": corner,
        "runs": found,
        "methods": methods,
    }
    return values | changes
