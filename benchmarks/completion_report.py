"""What the completion benchmark says about its rows: tables in Markdown, and the targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from completion_methods import AUTO, CMFREC, OURS
from completion_settings import Setting


@dataclass
class Row:
    """A method on a task with one seed."""

    task: str
    method: str
    seed: int
    settings: int = 1  # that were tried
    setting: Setting = field(default_factory=dict)
    tuning_cpu_s: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    reason: str | None = None  # why there are no figures

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        # six digits keep the file small, and its differences readable
        content["figures"] = {name: float(f"{value:.6g}") for name, value in self.figures.items()}
        content["tuning_cpu_s"] = float(f"{self.tuning_cpu_s:.4g}")
        return content


@dataclass(frozen=True)
class Column:
    title: str
    name: str
    digits: int


COLUMNS = {
    "final": (
        Column("test RMSE", "rmse", 4),
        Column("CPU s", "cpu_s", 2),
        Column("MB", "memory_mb", 1),
    ),
    "unseen": (
        Column("RMSE of unseen rows", "unseen_rmse", 4),
        Column("of seen rows", "rmse", 4),
        Column("ratio", "ratio", 3),
        Column("CPU s of the folding in", "fold_in_cpu_s", 2),
    ),
    "scale": (
        Column("test RMSE", "rmse", 4),
        Column("wall s", "wall_s", 1),
        Column("CPU s", "cpu_s", 1),
        Column("MB of the fit", "memory_mb", 0),
        Column("MB of the process", "peak_mb", 0),
    ),
}


def columns(task: str) -> tuple[Column, ...]:
    return COLUMNS["unseen" if task.endswith("unseen") else "scale" if task == "scale" else "final"]


def values(rows: Sequence[Row], task: str, method: str, name: str) -> list[float]:
    """One for each seed that has it."""
    figures = [row.figures for row in rows if (row.task, row.method) == (task, method) and row.figures]
    if name == "ratio":
        return [each["unseen_rmse"] / each["rmse"] for each in figures if "unseen_rmse" in each]
    return [each[name] for each in figures if name in each]


def show(rows: Sequence[Row], order: Sequence[str]) -> Iterator[str]:
    """A table for each task: the mean over the seeds, and in brackets the smallest and the largest."""
    for task in dict.fromkeys(row.task for row in rows):
        some = [row for row in rows if row.task == task]
        shown = columns(task)
        titles = [column.title for column in shown]
        yield f"\n### {task}, seeds {', '.join(map(str, sorted({row.seed for row in some})))}\n"
        yield f"| method | {' | '.join(titles)} | tuning, CPU s (settings) | chosen with the first seed |"
        yield "|---" * (len(titles) + 3) + "|"
        for method in sorted({row.method for row in some}, key=lambda name: _place(name, order)):
            mine = [row for row in some if row.method == method]
            done = [row for row in mine if row.figures]
            if not done:
                yield f"| {method} | –: {mine[0].reason} |" + " |" * (len(titles) + 1)
                continue
            cells = [_spread(values(rows, task, method, column.name), column.digits) for column in shown]
            tuning = "not tuned"
            if done[0].settings > 1:
                seconds = statistics.fmean(row.tuning_cpu_s for row in done)
                tuning = f"{seconds:.0f} ({done[0].settings})"
            failed = [f"; seed {row.seed} failed: {row.reason}" for row in mine if row.reason]
            yield f"| {method} | {' | '.join(cells)} | {tuning} | {_setting(done[0])}{''.join(failed)} |"


def _place(method: str, order: Sequence[str]) -> int:
    return order.index(method) if method in order else len(order)


def _spread(found: Sequence[float], digits: int) -> str:
    if not found:
        return "–"
    middle = f"{statistics.fmean(found):.{digits}f}"
    return middle if len(found) == 1 else f"{middle} ({min(found):.{digits}f}–{max(found):.{digits}f})"


def _setting(row: Row) -> str:
    text = ", ".join(f"{name} {value}" for name, value in row.setting.items())
    learned = [f"{name} {row.figures[name]:.4g}" for name in ("rank", "bound") if name in row.figures]
    return text + (f" → {', '.join(learned)}" if row.method == AUTO and learned else "")


# ------------------------------------------------------------------------------------------ targets


@dataclass(frozen=True)
class Target:
    """At most `limit`, by the mean over the seeds."""

    task: str
    name: str
    limit: float
    method: str = OURS
    digits: int = 4


TARGETS = (
    Target("T1", "rmse", 0.0360),
    Target("T1", "cpu_s", 1.0, digits=2),
    Target("T2", "rmse", 0.1130),
    Target("T2", "cpu_s", 2.1, digits=2),
    Target("T3", "rmse", 0.6086),
    Target("T3", "cpu_s", 5.0, digits=2),
    Target("T3", "memory_mb", 120, digits=1),
    Target("T1 rank 20", "rmse", 0.037, AUTO),
    Target("T1 rank 50", "rmse", 0.037, AUTO),
    Target("T1 unseen", "ratio", 1.10, digits=3),
    Target("T3 unseen", "ratio", 1.10, digits=3),
    Target("scale", "peak_mb", 4096, digits=0),
)
NAMES = {
    "rmse": "RMSE",
    "cpu_s": "CPU s",
    "memory_mb": "MB",
    "ratio": "unseen / seen",
    "peak_mb": "MB of the process",
}


@dataclass(frozen=True)
class Verdict:
    target: Target
    reached: float
    auto: float | None  # not tuned
    cmfrec: float | None
    best_peer: tuple[str, float] | None  # the peer with the smallest error, and its figure

    @property
    def met(self) -> bool:
        return self.reached <= self.target.limit  # NaN is not

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def targets(rows: Sequence[Row]) -> list[Verdict]:
    """Those that were measured."""
    found = []
    for target in TARGETS:

        def mean(method: str, name: str = target.name, task: str = target.task) -> float | None:
            some = values(rows, task, method, name)
            return statistics.fmean(some) if some else None

        reached = mean(target.method)
        if reached is None:
            continue
        error = "unseen_rmse" if target.name == "ratio" else "rmse"
        peers = {row.method for row in rows if row.task == target.task} - {OURS, AUTO}
        errors = {peer: value for peer in sorted(peers) if (value := mean(peer, error)) is not None}
        best = None
        if errors:
            name = min(errors, key=lambda peer: errors[peer])
            figure = mean(name)
            best = None if figure is None else (name, figure)
        found.append(Verdict(target, reached, mean(AUTO), mean(CMFREC), best))
    return found


def show_targets(found: Sequence[Verdict]) -> Iterator[str]:
    if not found:
        return
    yield "\n### Targets, means over the seeds\n"
    yield "| task | figure | at most | reached | | cmfrec | NB-LoRA auto | peer with the smallest error |"
    yield "|---|---|---|---|---|---|---|---|"
    for line in found:
        target = line.target
        auto, cmfrec = (_number(value, target.digits) for value in (line.auto, line.cmfrec))
        peer = (
            "–"
            if line.best_peer is None
            else f"{line.best_peer[0]} {_number(line.best_peer[1], target.digits)}"
        )
        verdict = "met" if line.met else "not met"
        yield (
            f"| {target.task} | {NAMES[target.name]} | {target.limit:g} | {line.reached:.{target.digits}f} "
            f"({target.method}) | {verdict} | {cmfrec} | {auto} | {peer} |"
        )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
