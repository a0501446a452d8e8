"""Training-step time of NB-LoRA against PEFT's LoRA, interleaved in one process.

    python benchmarks/speed.py [--json FILE]

Prints, for stacks of linear layers of several widths, the median time of a training step (forward,
backward, AdamW) of each method and its ratio to LoRA's. Methods take turns step by step, so that a noisy
machine disturbs them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from nblora import NBLoraConfig

TARGET = r"layers\.\d+"


class Stack(nn.Module):
    """Residual linear layers of one width."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def methods(rank: int) -> dict[str, PeftConfig]:
    return {
        "LoRA": LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGET),
        "NB-LoRA joint": NBLoraConfig(r=rank, target_modules=TARGET),
        "NB-LoRA svd": NBLoraConfig(r=rank, parametrization="svd", target_modules=TARGET),
    }


def measure(width: int, depth: int, tokens: int, rank: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each method, after two that do not count."""
    trainers = {}
    for name, config in methods(rank).items():
        model = get_peft_model(Stack(width, depth), config)
        trainable = [p for p in model.parameters() if p.requires_grad]
        trainers[name] = (model, torch.optim.AdamW(trainable, lr=1e-3))
    x = torch.randn(tokens, width)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(steps + 2):
        for name, (model, optimizer) in trainers.items():
            start = time.perf_counter()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[2:] for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
    rows = []
    print(
        f"{'width':>5} {'depth':>5} {'tokens':>6}  {'method':<14} {'ms':>8} {'quartiles':>17} {'× LoRA':>7}"
    )
    for width, depth, tokens in ((64, 18, 160), (512, 4, 1024), (1024, 2, 1024), (2048, 1, 1024)):
        seconds = measure(width, depth, tokens, options.rank, options.steps)
        reference = statistics.median(seconds["LoRA"])
        for name, times in seconds.items():
            low, middle, high = (1e3 * q for q in statistics.quantiles(times, n=4))
            ratio = middle / (1e3 * reference)
            print(
                f"{width:>5} {depth:>5} {tokens:>6}  {name:<14} {middle:>8.2f} {low:>8.2f}–{high:<8.2f} "
                f"{ratio:>7.2f}"
            )
            row = {"width": width, "depth": depth, "tokens": tokens, "rank": options.rank}
            rows.append({**row, "method": name, "milliseconds": middle, "ratio": ratio})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
