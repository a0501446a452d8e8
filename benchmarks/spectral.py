"""Spectral norms of base weights: time, tightness, and the share of loading a model of 1 B parameters.

    python benchmarks/spectral.py [--quick] [--json results/spectral.json]

First single matrices, like trained weights (rows, columns and some directions of very different sizes) and
Gaussian ones, as at the start of pretraining, where no gap tells the largest singular value apart: against
torch.linalg.matrix_norm, and against Golub-Kahan-Lanczos with one vector from below, which proves nothing.
Then all linear layers of a model in the shape of Llama 3.2 1B, in bfloat16, against loading it from a local
safetensors file through transformers. `--quick` leaves out the model and what takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from nblora import spectral
from nblora.spectral import spectral_norm, spectral_norm_interval

SHAPES = ((768, 768), (2048, 2048), (4096, 11008))
DECOMPOSED = 2048  # the largest smaller side that is decomposed too
STEPS = 300  # of the peer, at most


def trained_like(m: int, n: int) -> Tensor:
    weight = torch.randn(m, n) * (0.5 * torch.randn(m, 1)).exp() * (0.5 * torch.randn(n)).exp()
    directions = torch.randn(m, 16) * torch.arange(1.0, 17) ** -0.5
    return weight / m**0.5 + directions @ torch.randn(16, n) / (m * n) ** 0.5 * 3


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "trained-like": trained_like,
    "gaussian": lambda m, n: torch.randn(m, n) / m**0.5,
}


def from_below(weight: Tensor) -> float:
    """Golub-Kahan-Lanczos with full reorthogonalization until the residual is 1e-6 of the norm."""
    weight = weight.float()
    right = torch.randn(weight.shape[1])
    rights, lefts, alphas, betas = [right / right.norm()], [], [], []
    sigma = torch.zeros(1)
    for step in range(min(STEPS, *weight.shape)):
        left = weight @ rights[-1]
        right = weight.new_zeros(0)
        for _ in range(2 * bool(lefts)):
            basis = torch.stack(lefts)
            left = left - basis.mT @ (basis @ left)
        alphas.append(left.norm())
        lefts.append(left / alphas[-1])
        right = weight.mT @ lefts[-1]
        for _ in range(2):
            basis = torch.stack(rights)
            right = right - basis.mT @ (basis @ right)
        if step % 5 == 4:
            u, sigma, _ = torch.linalg.svd(torch.diag(torch.stack(alphas)) + _above(betas, step + 1))
            if right.norm() * u[-1, 0].abs() <= 1e-6 * sigma[0]:
                break
        betas.append(right.norm())
        rights.append(right / betas[-1])
    return sigma[0].item()


def _above(betas: list[Tensor], size: int) -> Tensor:
    return torch.diag(torch.stack(betas), 1) if betas else torch.zeros(size, size)


def seconds(act: Callable[[], Any], rounds: int = 3) -> float:
    """The median."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def passes(weight: Tensor) -> int:
    """How often a weight is read."""
    count, apply_gram = 0, spectral._apply_gram

    def counting(matrix: Tensor, vectors: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return apply_gram(matrix, vectors)

    spectral._apply_gram = counting
    try:
        spectral_norm(weight)
    finally:
        spectral._apply_gram = apply_gram
    return count


def measure_matrices(quick: bool) -> list[dict[str, Any]]:
    print(f"{'kind':<13} {'shape':<12} {'dtype':<9} {'ms':>8} {'passes':>6} {'upper/lower-1':>13} ", end="")
    print(f"{'SVD ms':>9} {'upper/SVD-1':>12} {'from below ms':>13}")
    records = []
    for kind, make in KINDS.items():
        for shape in SHAPES[: 2 if quick else None]:
            torch.manual_seed(0)
            whole = make(*shape)
            for dtype in (torch.float32, torch.bfloat16):
                weight = whole.to(dtype)
                lower, upper = spectral_norm_interval(weight)
                record: dict[str, Any] = {
                    "kind": kind,
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "seconds": seconds(lambda weight=weight: spectral_norm(weight)),
                    "passes": passes(weight),
                    "width": (upper / lower - 1).item(),
                }
                if dtype == torch.float32:
                    record["from_below_seconds"] = seconds(lambda weight=weight: from_below(weight), 1)
                    if min(shape) <= DECOMPOSED:
                        start = time.perf_counter()
                        exact = torch.linalg.matrix_norm(weight, 2)
                        record["svd_seconds"] = time.perf_counter() - start
                        record["excess"] = (upper / exact - 1).item()
                records.append(record)
                print(_row(record), flush=True)
    return records


def _row(record: dict[str, Any]) -> str:
    def ms(key: str, width: int) -> str:
        return f"{1e3 * record[key]:{width}.1f}" if key in record else "-".rjust(width)

    excess = f"{record['excess']:12.1e}" if "excess" in record else "-".rjust(12)
    shape = "x".join(map(str, record["shape"]))
    return (
        f"{record['kind']:<13} {shape:<12} {record['dtype']:<9} {ms('seconds', 8)} {record['passes']:>6} "
        f"{record['width']:13.1e} {ms('svd_seconds', 9)} {excess} {ms('from_below_seconds', 13)}"
    )


def measure_model() -> dict[str, Any]:
    """All linear layers of a model of 1.2 B parameters against loading it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        model.tie_weights()
        for name, parameter in model.named_parameters():
            parameter.data.fill_(0.02)
            if name.endswith("_proj.weight"):
                parameter.data.copy_(trained_like(*parameter.shape))
        model.save_pretrained(folder)
        del model
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))

        def load() -> Any:
            model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
            for parameter in model.parameters():
                parameter.data.aminmax()  # a mapped file is read when its entries are
            return model

        loading = seconds(load)
        model = load()
    weights = [p.detach() for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(weights),
        "file_gb": size / 1e9,
        "load_seconds": loading,
        "one_pass_seconds": seconds(lambda: [weight.aminmax() for weight in weights]),
        "norms_seconds": seconds(lambda: [spectral_norm(weight) for weight in weights], 1),
        "passes_mean": sum(map(passes, weights)) / len(weights),
    }
    print(
        f"\n{record['layers']} linear layers of a model of {record['parameters'] / 1e9:.2f} B parameters "
        f"({size / 1e9:.1f} GB, bfloat16, file in memory):\n"
        f"  loading                   {loading:8.2f} s\n"
        f"  reading each weight once  {record['one_pass_seconds']:8.2f} s  "
        f"{record['one_pass_seconds'] / loading:7.0%} of loading\n"
        f"  spectral norms            {record['norms_seconds']:8.2f} s  "
        f"{record['norms_seconds'] / loading:7.0%} of loading, {record['passes_mean']:.1f} passes"
    )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small matrices, no model")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "matrices": measure_matrices(arguments.quick),
    }
    if not arguments.quick:
        results["model"] = measure_model()
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
