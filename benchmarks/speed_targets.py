"""What is aimed at, and what the rows of `speed.py` say about it; how time grows."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from speed_bench import Row
from speed_models import JOINT, SVD, Cell


@dataclass(frozen=True)
class Target:
    """One promise, about one method at a time.

    Attributes:
        kinds: whose rows are judged; the worst of them counts.
        applies: the cells that the promise is about.
        limit: the value may be as large.
        value: of a row; None where it has no figure.
    """

    name: str
    kinds: tuple[str, ...]
    applies: Callable[[Cell], bool]
    limit: float
    value: Callable[[Row], float | None]
    form: str = "{:.2f}×"
    gpu: bool = False


def _ratio(row: Row) -> float | None:
    return None if row.ratio is None else row.ratio.median


def _seconds(row: Row) -> float | None:
    return None if row.figure is None else row.figure.median


def _device_share(row: Row) -> float | None:
    return (row.more or {}).get("device_share")


def _plain(cell: Cell) -> bool:
    return (
        cell.model == "llama" and cell.checkpointing == "off" and cell.accumulation == 1 and not cell.compile
    )


def _large(cell: Cell) -> bool:
    return cell.hidden >= 512 and cell.tokens >= 1024 and 8 <= cell.rank <= 64


def _on_cpu(cell: Cell) -> bool:
    return cell.device == "cpu"


TARGETS = (
    Target(
        "train step / LoRA's, CPU, float32, hidden >= 512, >= 1024 tokens, r 8-64",
        ("train",),
        lambda c: _plain(c) and _large(c) and _on_cpu(c) and c.dtype == "float32",
        1.00,
        _ratio,
    ),
    Target(
        "train step / LoRA's, CPU, bfloat16 model",
        ("train",),
        lambda c: _plain(c) and _large(c) and _on_cpu(c) and c.dtype == "bfloat16",
        1.00,
        _ratio,
    ),
    Target(
        "train step / LoRA's, GPU, bfloat16 model",
        ("train",),
        lambda c: _plain(c) and _large(c) and not _on_cpu(c) and c.dtype == "bfloat16",
        0.90,
        _ratio,
        gpu=True,
    ),
    Target(
        "bytes kept for backward / LoRA's, bfloat16 model (saved and held, the larger ratio)",
        ("saved", "held"),
        lambda c: _plain(c) and c.dtype == "bfloat16",
        0.80,
        _ratio,
    ),
    Target("decode step, unmerged / LoRA's", ("decode",), _plain, 1.00, _ratio),
    *(
        Target(
            f"Cayley part of a train step, 224 layers, r 16, GPU: {how}",
            ("cayley",),
            lambda c: _plain(c) and not _on_cpu(c) and c.adapted == 224 and c.rank == 16,
            0.02,
            value,
            "{:.1%}",
            gpu=True,
        )
        for how, value in (("alone / step", _ratio), ("share of the kernels' time", _device_share))
    ),
    Target(
        "export + certify, 224 layers, r 16, CPU",
        ("export+certify",),
        lambda c: _on_cpu(c) and c.adapted == 224 and c.rank == 16,
        10.0,
        _seconds,
        "{:.1f} s",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """Of one target and one method.

    Attributes:
        reached: the worst value, None without one.
        verdict: "yes", "no", "failed" (a row has no figure), "not measured" or "no GPU".
        where: the cell of the worst value or of the failure.
        cells: how many rows were judged.
    """

    target: str
    limit: str
    method: str
    reached: float | None
    shown: str
    verdict: str
    where: str = ""
    cells: int = 0

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def judge(target: Target, method: str, rows: Sequence[Row], *, gpu: bool) -> Verdict:
    """Whether every row that a target is about keeps its limit. A row without a figure never does."""
    judged = [
        row
        for row in rows
        if row.method == method
        and row.kind in target.kinds
        and target.applies(row.cell)
        and row.reason != LEFT_OUT
    ]
    blank = Verdict(target.name, target.form.format(target.limit), method, None, "-", "not measured")
    if not judged:
        return replace(blank, verdict="no GPU") if target.gpu and not gpu else blank
    values = [(target.value(row), row) for row in judged]
    for value, row in values:
        if value is None or math.isnan(value):
            where = f"{row.cell}: {row.reason or 'no reference'}"
            return replace(blank, verdict="failed", where=where, cells=len(judged))
    worst, row = max(values, key=lambda pair: pair[0] or 0.0)
    assert worst is not None
    return replace(
        blank,
        reached=worst,
        shown=target.form.format(worst),
        verdict="yes" if worst <= target.limit else "no",
        where=str(row.cell),
        cells=len(judged),
    )


LEFT_OUT = "left out here by the preset"


def verdicts(rows: Sequence[Row], *, gpu: bool) -> list[Verdict]:
    return [judge(target, method, rows, gpu=gpu) for target in TARGETS for method in (JOINT, SVD)]


# ------------------------------------------------------------------------------------------- growth


@dataclass(frozen=True)
class Growth:
    """How a figure grows along one axis, all else equal: figure ~ axis ** slope."""

    kind: str
    method: str
    axis: str
    values: tuple[int, ...]
    slope: float
    cell: str

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def slope(points: Mapping[int, float]) -> float:
    """Least squares in log-log."""
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    return statistics.linear_regression(xs, ys).slope


def growth(rows: Sequence[Row], axes: Sequence[str] = ("rank", "hidden", "layers", "tokens")) -> list[Growth]:
    """Slopes along every axis that has at least three cells which differ in nothing else."""
    found = []
    for axis in axes:
        groups: dict[tuple[str, str, Cell], dict[int, float]] = defaultdict(dict)
        for row in rows:
            if row.figure is not None and row.figure.median > 0:
                rest = replace(row.cell, **{axis: 0})
                groups[row.kind, row.method, rest][getattr(row.cell, axis)] = row.figure.median
        for (kind, method, rest), points in groups.items():
            if len(points) >= 3:
                text = re.sub(r"\b(r 0|hidden 0|0 layers|0 tokens)", f"any {axis}", str(rest), count=1)
                found.append(Growth(kind, method, axis, tuple(sorted(points)), slope(points), text))
    return found
