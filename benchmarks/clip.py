"""What clipping does to a trained LoRA: the accuracy that it gives back, and the accuracy that it costs.

The demo's task (nblora.demo): a small vision transformer, pretrained on upright digits, learns rotated
ones with plain LoRA at several learning rates. Every trained LoRA is then clipped with `clip_lora` at
several bounds and loaded again with PEFT; no training happens after that. And every one becomes NB-LoRA
with `import_lora`, at the demo's bound, and is trained for two epochs more. Prints a table of target and
source accuracy, writes results/clip.json.

    python benchmarks/clip.py [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import ViTForImageClassification
from transformers.utils import logging

from nblora import clip_lora, import_lora, inspect_lora
from nblora.demo import Recipe, _accuracy, _adapt, _cache_dir, _load_data, _pretrained, _train

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BOUNDS = (2.0, 1.0, 0.7, 0.5, 0.3, 0.15)
EPOCHS = 2  # of training after an import, at IMPORTED_RATE
IMPORTED_RATE = 3e-2
NORMS = ("frobenius", "spectral")
RESULTS = Path(__file__).parent / "results" / "clip.json"


def measure(seed: int) -> list[dict[str, Any]]:
    """Accuracies of every LoRA of one seed, unclipped (bound None) and at every bound."""
    recipe = Recipe(seed=seed)
    data = _load_data(seed)
    base = _pretrained(recipe, data, lambda: None, _cache_dir())

    def accuracies(model: torch.nn.Module) -> dict[str, float]:
        return {
            "validation": _accuracy(model, data.validation),
            "target": _accuracy(model, data.test.rotated()),
            "source": _accuracy(model, data.test),
        }

    plain = ViTForImageClassification.from_pretrained(base)
    records: list[dict[str, Any]] = [{"seed": seed, "learning_rate": None, **accuracies(plain)}]
    for rate in LEARNING_RATES:
        model, _ = _adapt(base, "LoRA", recipe.methods()["LoRA"], rate, recipe, data, lambda: None)
        with tempfile.TemporaryDirectory() as temporary:
            folder, clipped = Path(temporary) / "lora", Path(temporary) / "clipped"
            model.save_pretrained(folder)
            largest = inspect_lora(folder, base=base).layers[0].danger
            record = {"seed": seed, "learning_rate": rate, "largest": largest}
            records.append({**record, "norm": None, "bound": None, **accuracies(model)})
            import_lora(folder, clipped, bound=recipe.bound, base=base)
            imported = PeftModel.from_pretrained(
                ViTForImageClassification.from_pretrained(base), clipped, is_trainable=True
            )
            records.append({**record, "norm": "imported", "bound": recipe.bound, **accuracies(imported)})
            _train(imported, data.target, EPOCHS, IMPORTED_RATE, seed, lambda: None)
            records.append({**record, "norm": "continued", "bound": recipe.bound, **accuracies(imported)})
            for norm in NORMS:
                for bound in BOUNDS:
                    clip_lora(folder, clipped, norm=norm, bound=bound, bound_kind="relative", base=base)
                    loaded = PeftModel.from_pretrained(
                        ViTForImageClassification.from_pretrained(base), clipped
                    )
                    records.append({**record, "norm": norm, "bound": bound, **accuracies(loaded)})
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Mean target/source accuracy over the seeds, in %, by learning rate and bound."""

    def mean(**wanted: Any) -> str:
        found = [r for r in records if all(r.get(key) == value for key, value in wanted.items())]
        target, source = (100 * sum(r[part] for r in found) / len(found) for part in ("target", "source"))
        return f"{target:.1f}/{source:.1f}"

    lines = [f"base model: {mean(learning_rate=None)}  (target/source accuracy in %)"]
    for norm in NORMS:
        lines.append(f"\n{norm} norm of every update, times the spectral norm of its base weight")
        lines.append(f"{'learning rate':>13s} {'as trained':>11s} " + "".join(f"{b:>11g}" for b in BOUNDS))
        for rate in LEARNING_RATES:
            cells = [mean(learning_rate=rate, norm=norm, bound=bound) for bound in BOUNDS]
            whole = mean(learning_rate=rate, norm=None)
            lines.append(f"{rate:>13g} {whole:>11s} " + "".join(f"{cell:>11s}" for cell in cells))
    lines.append(f"\nimported as NB-LoRA at {Recipe().bound} (Frobenius), and after {EPOCHS} epochs more")
    for rate in LEARNING_RATES:
        imported, continued = (mean(learning_rate=rate, norm=norm) for norm in ("imported", "continued"))
        lines.append(f"{rate:>13g} {imported:>11s} {continued:>10s}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    records = [record for seed in seeds for record in measure(seed)]
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "records": records}, indent=1) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
