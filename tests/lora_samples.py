"""LoRA files of every layout, written by hand, and their updates by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def factors(m: int, n: int, k: int, size: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """B (m, k) and A (k, n) whose product has the spectral norm `size`."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(m, k, generator=generator, dtype=torch.float64)
    down = torch.randn(k, n, generator=generator, dtype=torch.float64)
    return up * (size / torch.linalg.matrix_norm(up @ down, 2)), down


def peft_folder(
    folder: Path,
    layers: dict[str, tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
    **options: Any,
) -> Path:
    """A saved PEFT LoRA with these B and A."""
    tensors = {}
    for name, (up, down) in layers.items():
        keys = ("lora_A.weight", "lora_B.weight")
        if "embed" in name:
            keys = ("lora_embedding_A", "lora_embedding_B")
        tensors[f"base_model.model.{name}.{keys[0]}"] = down.to(dtype).contiguous()
        tensors[f"base_model.model.{name}.{keys[1]}"] = up.to(dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata=metadata or {"format": "pt"})
    config = {"target_modules": sorted(name.rpartition(".")[2] for name in layers), "inference_mode": True}
    LoraConfig(**(config | options)).save_pretrained(folder)
    return folder


def change_config(folder: Path, **values: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def product(up: Tensor, down: Tensor) -> Tensor:
    """B A in float64, as (m, n) with the inputs counted over the kernel of a convolution."""
    return up.double().flatten(1) @ down.double().flatten(1)


class Everything(nn.Module):
    """One layer of every kind that a LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.experts = Experts()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(self.embed(x).mT).mT
        return self.head(self.experts(hidden))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 8) / 3)
        self.down = nn.Parameter(torch.randn(3, 8, 10) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("blc,efc->blef", x, self.up).relu()
        return torch.einsum("blef,ecf->blc", hidden, self.down)
