"""The speed benchmark measures what it says; how fast anything is, is no test."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    import speed
    import speed_bench as bench
    import speed_figures as figures
    import speed_models as models
    import speed_targets as targets
    import speed_training
    import speed_use
finally:
    sys.path.remove(BENCHMARKS)

TINY = ("--hidden", "64", "--layers", "1", "--tokens", "16", "--rank", "4", "--rounds", "3", "--warmup", "1")


def run(file: Path, *arguments: str) -> dict[str, Any]:
    speed.main([*arguments, "--json", str(file)])
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def rows_of(content: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in content["rows"] if row["kind"] == kind}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All methods, in a few kinds of measurement."""
    what = ("train", "memory", "decode", "merge", "load", "create", "export", "certify", "cayley")
    return run(tmp_path_factory.mktemp("speed") / "speed.json", *TINY, "--what", *what)


def test_every_method_has_a_figure_or_a_reason(content: dict[str, Any]) -> None:
    for kind in ("train", "saved", "held", "peak", "decode", "merge", "load", "create", "export", "cayley"):
        rows = rows_of(content, kind)
        assert set(models.METHODS) <= set(rows), kind
        for row in rows.values():
            assert (row["figure"] is None) == bool(row["reason"]), row
    for method in (models.REFERENCE, models.JOINT, models.SVD):
        for kind in ("train", "saved", "held", "peak", "decode", "merge", "load", "create", "export"):
            assert rows_of(content, kind)[method]["reason"] is None, (kind, method)
    for kind in ("certify", "cayley"):
        assert rows_of(content, kind)[models.JOINT]["reason"] is None, kind
    assert set(models.STARTS) <= set(rows_of(content, "create"))


def test_ratios_are_paired_by_round(content: dict[str, Any]) -> None:
    rows = rows_of(content, "train")
    reference = rows[models.REFERENCE]["samples"]
    assert len(reference) == 3
    for row in rows.values():
        if row["figure"] is not None:
            ratios = [a / b for a, b in zip(row["samples"], reference, strict=True)]
            assert row["ratio"]["median"] == pytest.approx(statistics.median(ratios))
            assert row["figure"]["median"] == pytest.approx(statistics.median(row["samples"]))
            assert row["figure"]["low"] <= row["figure"]["median"] <= row["figure"]["high"]


def test_what_cannot_be_counted_costs_the_share_and_not_the_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(action: object) -> int:
        raise AssertionError("shapes are incompatible")

    monkeypatch.setattr(bench, "_flops", refuse)
    what = ("--what", "train", "forward", "prefill", "--methods", models.REFERENCE, "--ceilings")
    content = run(tmp_path / "speed.json", *TINY, *what)
    for kind in ("train", "forward", "prefill"):
        row = rows_of(content, kind)[models.REFERENCE]
        assert row["figure"]["median"] > 0
        assert "shapes are incompatible" in row["more"]["no_matmul_share"]
        assert "matmul_share" not in row["more"]


def test_decode_has_more_rounds_and_the_cayley_part_is_compared_with_its_own_step(
    content: dict[str, Any],
) -> None:
    assert len(rows_of(content, "decode")[models.JOINT]["samples"]) == 3 * speed_use.DECODE_STEPS
    assert rows_of(content, "cayley")[models.SVD]["reference"] == "train step of NB-LoRA svd"


def test_the_json_says_what_the_figures_depend_on(content: dict[str, Any]) -> None:
    assert {"torch", "peft", "threads", "cpu_capability", "bf16_instructions"} <= set(content["machine"])
    assert content["rows"][0]["cell"]["hidden"] == 64
    per_layer = 4 * (2 * (64 + 64) + 2 * (64 + 64) + 3 * (64 + 256))  # q, o; k, v of one head; the MLP
    assert rows_of(content, "train")[models.REFERENCE]["trainable"] == per_layer
    assert {line["verdict"] for line in content["targets"]} <= {"yes", "no", "not measured", "no GPU"}


def test_a_method_that_cannot_be_built_has_a_row_with_the_reason(tmp_path: Path) -> None:
    arguments = ("--hidden", "64", "--model", "stack", "--layers", "1", "--tokens", "8", "--rank", "48")
    content = run(tmp_path / "speed.json", *arguments, "--rounds", "1", "--methods", models.REFERENCE, "BOFT")
    assert "must be divisible" in rows_of(content, "train")["BOFT"]["reason"]
    assert rows_of(content, "train")[models.REFERENCE]["reason"] is None


def test_export_and_certify_of_a_whole_adapter(tmp_path: Path) -> None:
    content = run(tmp_path / "speed.json", *TINY, "--layers", "3", "--what", "export+certify")
    rows = rows_of(content, "export+certify")
    for method in (models.JOINT, models.SVD):
        assert rows[method]["more"] == {"layers": 21}
        assert rows[method]["figure"]["median"] > 0
    assert rows[models.REFERENCE]["reason"]


@pytest.mark.parametrize("how", ["non-reentrant", "reentrant"])
def test_checkpointing_keeps_less(tmp_path: Path, how: str) -> None:
    arguments = (*TINY, "--what", "memory", "--methods", models.REFERENCE, "--checkpointing", "off", how)
    content = run(tmp_path / "speed.json", *arguments)
    for kind in ("saved", "held"):
        plain, checkpointed = (row for row in content["rows"] if row["kind"] == kind)
        assert checkpointed["cell"]["checkpointing"] == how
        assert checkpointed["figure"]["median"] < 0.5 * plain["figure"]["median"], kind


# --------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_lora_saves_is_what_can_be_counted_by_hand(dtype: str) -> None:
    t, n, k = 24, 64, 4
    cell = models.Cell("stack", hidden=n, layers=1, tokens=t, rank=k, dtype=dtype)
    model = models.adapt(models.base_model(cell), cell, models.REFERENCE)
    x = models.batch(cell)
    saved = figures.saved_bytes(lambda: models.loss_of(model, x), [*model.parameters(), *model.buffers()])
    size = cell.torch_dtype.itemsize
    # the input and A x, in float32, in which LoRA computes; the tanh, and the sum that is squared
    assert saved == 4 * (t * n + t * k) + size * 2 * t * n


def test_held_memory_sees_what_autograd_does_not() -> None:
    kept = torch.zeros(0)

    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.hidden = x.exp()
            return x.sum()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * ctx.hidden

    weight = nn.Parameter(torch.zeros(1000))

    def forward() -> torch.Tensor:
        loss: torch.Tensor = Hides.apply(weight)
        return loss

    def backward(loss: torch.Tensor) -> None:
        nonlocal kept
        loss.backward()
        weight.grad = None
        temporary = torch.empty(5000)
        kept = temporary[:1].clone()

    assert figures.saved_bytes(forward, [weight]) == 0
    weight.grad = None
    held = figures.held_bytes(forward, backward, "cpu")
    assert 4000 <= held.after_forward <= 4000 + 64  # and the loss
    assert 20000 <= held.peak <= 20000 + 8000


def test_what_a_model_keeps_from_step_to_step_is_held() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000))

        def forward(self) -> torch.Tensor:
            self.kept = self.weight.detach().exp()
            return self.weight.sum()

    assert 4000 <= figures.held_bytes(Keeps(), torch.Tensor.backward, "cpu").after_forward <= 4000 + 64


def test_saved_storages_count_once_and_only_while_their_graph_lives() -> None:
    weight = nn.Parameter(torch.ones(100))
    x = torch.randn(50, 100)

    def forward() -> torch.Tensor:
        (x.exp() * weight).sum()  # dropped
        return (x * weight + x[:] * weight).sum()

    assert figures.saved_bytes(forward, [weight]) == x.nbytes


# ------------------------------------------------------------------------------------- taking turns


def test_actions_take_turns_and_failures_do_not_pass_as_figures() -> None:
    order: list[str] = []

    def broken(result: Any) -> None:
        figures.require_finite(torch.tensor(math.nan))

    actions = {name: figures.Action(lambda name=name: order.append(name)) for name in "abc"}
    actions["d"] = figures.Action(lambda: None, after=broken)
    seconds, failed = figures.interleaved(actions, rounds=3, warmup=1, device="cpu")
    assert [order[i : i + 3] for i in range(0, 12, 3)] == [list("abc"), list("cba"), list("bca"), list("acb")]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert failed == {"d": "Broken: the result must be finite, got NaN or infinity"}


def test_one_that_takes_too_long_is_given_up() -> None:
    actions = {"a": figures.Action(lambda: sum(range(1000)))}
    seconds, failed = figures.interleaved(actions, rounds=2, warmup=0, device="cpu", patience=1e-9)
    assert not seconds
    assert "patience" in failed["a"]


def test_a_parameter_without_a_gradient_is_a_broken_measurement() -> None:
    cell = models.Cell("stack", hidden=8, layers=1, tokens=4)
    model = models.base_model(cell)
    model.unused = nn.Parameter(torch.ones(1))
    with pytest.raises(figures.Broken, match="unused"):
        speed_training._probe(model, models.loss_of, models.batch(cell))


# ------------------------------------------------------------------------------------------ targets


def train_row(ratio: float | None, **cell: Any) -> bench.Row:
    quartiles = None if ratio is None else figures.Quartiles(ratio, ratio, ratio)
    reason = "it broke" if ratio is None else None
    return bench.Row(
        "train", models.JOINT, models.Cell(**cell), figure=quartiles, ratio=quartiles, reason=reason
    )


def verdict(*rows: bench.Row, gpu: bool = False) -> targets.Verdict:
    return targets.judge(targets.TARGETS[0], models.JOINT, rows, gpu=gpu)


def test_a_target_is_reached_if_its_worst_figure_is() -> None:
    assert verdict(train_row(0.9), train_row(1.0, hidden=1024)).verdict == "yes"
    found = verdict(train_row(0.9), train_row(1.01, hidden=1024))
    assert (found.verdict, found.reached, found.cells) == ("no", 1.01, 2)
    assert "hidden 1024" in found.where


def test_cells_that_a_target_is_not_about_do_not_count() -> None:
    others = [
        train_row(2.0, hidden=256),
        train_row(2.0, tokens=512),
        train_row(2.0, rank=4),
        train_row(2.0, dtype="bfloat16"),
        train_row(2.0, checkpointing="reentrant"),
        train_row(2.0, compile=True),
        train_row(2.0, model="stack"),
        replace(train_row(2.0), method=models.SVD),
        replace(train_row(2.0), kind="forward"),
        replace(train_row(None), reason=targets.LEFT_OUT),
    ]
    assert verdict(*others).verdict == "not measured"
    assert verdict(train_row(0.9), *others).verdict == "yes"


def test_a_row_without_a_figure_or_with_nan_never_reaches_a_target() -> None:
    assert verdict(train_row(0.9), train_row(None)).verdict == "failed"
    assert verdict(train_row(0.9), train_row(math.nan)).verdict == "failed"
    without_reference = replace(train_row(0.9), ratio=None)
    assert verdict(without_reference).verdict == "failed"


def test_gpu_targets_without_a_gpu() -> None:
    gpu_target = next(target for target in targets.TARGETS if target.gpu)
    assert targets.judge(gpu_target, models.JOINT, [], gpu=False).verdict == "no GPU"
    assert targets.judge(gpu_target, models.JOINT, [], gpu=True).verdict == "not measured"
    row = train_row(0.89, device="cuda", dtype="bfloat16")
    assert targets.judge(gpu_target, models.JOINT, [row], gpu=True).verdict == "yes"


def test_the_quick_preset_measures_every_target() -> None:
    for target in targets.TARGETS:
        preset = speed.gpu(["8b"], "cuda") if target.gpu else speed.quick()
        kind = {"saved": "memory", "held": "memory"}
        covered = [
            job
            for job in preset
            if target.applies(job.cell)
            and all(kind.get(k, k) in job.kinds for k in target.kinds)
            and {models.JOINT, models.SVD} <= set(job.methods)
        ]
        assert covered, target.name


def test_slopes_are_fitted_over_cells_that_differ_in_nothing_else() -> None:
    rows = [
        replace(train_row(1.0, rank=rank), figure=figures.Quartiles(3.0 * rank**2, 0, 0))
        for rank in (4, 8, 16)
    ]
    rows.append(train_row(1.0, rank=4, hidden=64))
    (line,) = targets.growth(rows)
    assert (line.axis, line.values) == ("rank", (4, 8, 16))
    assert line.slope == pytest.approx(2.0)
    assert "any rank" in line.cell
    assert not targets.growth(rows[:2])
