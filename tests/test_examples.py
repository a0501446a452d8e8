"""The recipes in examples/ are read, and run on small stand-ins of their models and data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as PIL

from nblora.comparison import ComparisonConfig, compare
from nblora.settings import read_yaml
from test_tasks import llama, named, three, vit

RECIPES = sorted((Path(__file__).parent.parent / "examples" / "compare").glob("*.yaml"))


class InThisProcess:
    """Does jobs one after another, here."""

    def run(self, jobs: Sequence[Mapping[str, Any]]) -> Any:
        from nblora.comparison import execute

        return map(execute, copy.deepcopy(list(jobs)))


def images(folder: Path, column: str, label: str, names: tuple[str, ...]) -> str:
    """As on the hub: pictures, and classes by number with their names beside."""
    generator = np.random.default_rng(len(names))
    pixels = [PIL.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(12)]
    features = Features({column: Image(), label: ClassLabel(names=list(names))})
    return three(folder, {column: pixels, label: [i % len(names) for i in range(12)]}, features)


def stand_ins(settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """A model and data with the columns that a recipe names."""
    columns, kept = settings["columns"], settings["keep_columns"]
    if settings["task"] == "image-cls":
        return {
            "model": vit(folder / "model", channels=3, **named("tench", "goldfish")),
            "data": images(folder / "data", columns["image"], columns["label"], ("ape", "bee", "cow")),
            "keep": images(folder / "keep", kept["image"], kept["label"], ("tench", "goldfish")),
        }
    text = Features({name: Value("string") for name in columns.values()})
    questions = {
        columns["prompt"]: [f"what is {i} and {i}?" for i in range(12)],
        columns["completion"]: [f"it is {2 * i}" for i in range(12)],
    }
    english = {kept["text"]: ["The quick brown fox jumps over the lazy dog, and then it sleeps. " * 20] * 12}
    return {
        "model": llama(folder / "model"),
        "data": three(folder / "data", questions, text),
        "keep": three(folder / "keep", english),
    }


def test_there_are_recipes() -> None:
    assert len(RECIPES) == 4


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe: Path, tmp_path: Path) -> None:
    settings = read_yaml(recipe)
    # on a machine without a GPU, transformers takes bf16 for the CPU only when told so
    whole = ComparisonConfig.of({**settings, "train": {**settings["train"], "use_cpu": True}})
    assert {"nblora", "lora", "dora", "pissa"} <= {*whole.methods}
    assert whole.reference["rank"] in whole.ranks
    assert whole.settings()
    assert f"--config examples/compare/{recipe.name}" in recipe.read_text()
    small = {
        **settings,
        **stand_ins(settings, tmp_path),
        "methods": ["nblora", "lora"],
        "learning_rates": [1e-2],
        "ranks": [2],
        "epochs": [1],
        "bounds": [0.3],
        "seeds": [0],
        "reference": {},
        "load": {},
        "max_length": settings.get("max_length") and 64,
        "train": {
            **{
                name: value
                for name, value in settings["train"].items()
                if name not in ("bf16", "dataloader_num_workers")
            },
            "use_cpu": True,
        },
    }
    comparison = compare(small, tmp_path / "out", executor=InThisProcess(), report=False)
    assert [(run["method"], run["status"], run["error"]) for run in comparison["runs"]] == [
        ("nblora", "done", None),
        ("lora", "done", None),
    ]
    assert all(run["kept"] is not None for run in comparison["runs"])
