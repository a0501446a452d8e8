"""What of PEFT's tests is run, how much of it must be, and what is known to fail and why."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Some of PEFT's test files, with NB-LoRA in place of one method."""

    method: str  # whose place NB-LoRA takes: "delora" or "lora"
    least: dict[str, int]  # test file: how many of its tests must pass
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Skip:
    """Tests that are expected to fail. A test that passes all the same fails the run."""

    pattern: str  # file::class::function[row]; "*" is anything
    reason: str
    methods: tuple[str, ...] = ("delora", "lora")
    run: bool = True  # False where even trying is pointless: the pattern must then only match something


MATRICES: dict[str, Matrix] = {
    "delora": Matrix(
        "delora",
        {
            "test_custom_models.py": 270,
            "test_decoder_models.py": 100,
        },
    ),
    "lora": Matrix("lora", {"test_custom_models.py": 1000}),
    "compile": Matrix("lora", {"test_torch_compile.py": 10}, {"PEFT_DEBUG_WITH_TORCH_COMPILE": "1"}),
}

SKIPS: tuple[Skip, ...] = ()
