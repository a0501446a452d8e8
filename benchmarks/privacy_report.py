"""What the privacy benchmark says about its rows: tables in Markdown, margins and gates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from privacy_methods import BALL, CLIPPED, LORA, METHODS, OURS, OURS_JOINT, OURS_STARTED, STARTED


@dataclass(frozen=True)
class Block:
    """A task with its clients: what is trained once for all epsilons."""

    task: str
    clients: int
    skewed: bool

    def __str__(self) -> str:
        return f"{self.task}, N = {self.clients} {'skewed' if self.skewed else 'IID'}"


@dataclass
class Row:
    """A method on a block with one seed and one epsilon, which is None without privacy."""

    task: str
    clients: int
    skewed: bool
    epsilon: float | None
    method: str
    seed: int
    settings: int  # from which one was chosen
    setting: dict[str, Any]
    validation: float
    accuracies: list[float]  # on the test data, one for each draw of the noise
    changed: int  # clients whose update the guard did not take as it came

    @property
    def block(self) -> Block:
        return Block(self.task, self.clients, self.skewed)

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["validation"] = round(self.validation, 4)
        content["accuracies"] = [round(value, 4) for value in self.accuracies]
        return content


@dataclass(frozen=True)
class Estimate:
    """In points: a mean over seeds and its standard error, NaN with one seed."""

    mean: float
    error: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.error:.1f}" if self.seeds > 1 else f"{self.mean:.1f}"

    @property
    def tie(self) -> bool:
        """Whether the 95 % interval for the mean of these seeds contains zero."""
        if self.seeds < 2:
            return True
        from scipy.stats import t

        return not abs(self.mean) > t.ppf(0.975, self.seeds - 1) * self.error  # NaN is a tie


def _estimate(values: Sequence[float]) -> Estimate | None:
    if not values:
        return None
    points = [100 * value for value in values]
    mean, error = statistics.fmean(points), math.nan
    if len(points) > 1:  # not by statistics.stdev, which fails on NaN
        error = math.sqrt(sum((point - mean) ** 2 for point in points) / (len(points) - 1) / len(points))
    return Estimate(mean, error, len(points))


def _by_seed(rows: Sequence[Row], block: Block, method: str, epsilon: float | None) -> dict[int, float]:
    private = METHODS[method].private if method in METHODS else False
    wanted = (block, method, epsilon if private else None)
    return {row.seed: row.accuracy for row in rows if (row.block, row.method, row.epsilon) == wanted}


def accuracy(rows: Sequence[Row], block: Block, method: str, epsilon: float | None) -> Estimate | None:
    """On the test data."""
    return _estimate(list(_by_seed(rows, block, method, epsilon).values()))


def margin(rows: Sequence[Row], block: Block, epsilon: float, of: str, over: str) -> Estimate | None:
    """Of one method over another, paired by seed (split, base model and noise are the same)."""
    mine, theirs = _by_seed(rows, block, of, epsilon), _by_seed(rows, block, over, epsilon)
    return _estimate([mine[seed] - theirs[seed] for seed in mine if seed in theirs])


MARGINS = (
    *((OURS, over) for over in (LORA, STARTED, OURS_JOINT, CLIPPED, BALL)),
    (OURS_STARTED, LORA),
    (OURS_STARTED, STARTED),
)


def show(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each task and number of clients, with a column for each split and epsilon; then margins."""
    for task, clients in dict.fromkeys((row.task, row.clients) for row in rows):
        some = [row for row in rows if (row.task, row.clients) == (task, clients)]
        budgets = {(row.block, row.epsilon) for row in some if row.epsilon is not None}
        cells = sorted(budgets, key=lambda cell: (cell[0].skewed, cell[1]))
        if not cells:
            continue
        seeds = ", ".join(map(str, sorted({row.seed for row in some})))
        yield f"\n### {task}, N = {clients}: test accuracy in %, seeds {seeds}\n"
        heads = [f"{'skewed' if block.skewed else 'IID'}, ε = {epsilon:g}" for block, epsilon in cells]
        yield f"| method | {' | '.join(heads)} |"
        yield "|---" * (len(cells) + 1) + "|"
        for method in dict.fromkeys(row.method for row in some):
            found = [accuracy(some, block, method, epsilon) for block, epsilon in cells]
            yield f"| {method} | {' | '.join('–' if each is None else str(each) for each in found)} |"
        for of, over in MARGINS:
            found = [margin(some, block, epsilon, of, over) for block, epsilon in cells]
            if any(found):
                yield f"| *{of} − {over}* | {' | '.join(map(_signed, found))} |"


def _signed(found: Estimate | None) -> str:
    if found is None:
        return "–"
    sign = "+" if found.mean >= 0 else "−"
    text = str(Estimate(abs(found.mean), found.error, found.seeds))
    return f"{sign}{text}{' (tie)' if found.tie else ''}"


# --- gates ---


@dataclass(frozen=True)
class Gate:
    """At least this many points over clipped LoRA, by the mean over the seeds."""

    block: Block
    epsilon: float
    points: float


def gates(task: str) -> tuple[Gate, ...]:
    return Gate(Block(task, 20, False), 4.0, 2.0), Gate(Block(task, 100, True), 1.0, 1.0)


@dataclass(frozen=True)
class Verdict:
    gate: Gate
    reached: Estimate

    @property
    def met(self) -> bool:
        return self.reached.mean >= self.gate.points  # NaN is not

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def verdicts(rows: Sequence[Row], task: str) -> list[Verdict]:
    """Of the gates that were measured."""
    found = []
    for gate in gates(task):
        reached = margin(rows, gate.block, gate.epsilon, OURS, LORA)
        if reached is not None:
            found.append(Verdict(gate, reached))
    return found


def show_verdicts(found: Sequence[Verdict]) -> Iterator[str]:
    if not found:
        yield "\nNo gate was measured."
        return
    yield f"\n### Gates: {OURS} over {LORA}, points, means over the seeds\n"
    yield "| cell | at least | reached | |"
    yield "|---|---|---|---|"
    for verdict in found:
        gate = verdict.gate
        yield (
            f"| {gate.block}, ε = {gate.epsilon:g} | +{gate.points:g} | {_signed(verdict.reached)} "
            f"({verdict.reached.seeds} seeds) | {'met' if verdict.met else 'not met'} |"
        )
