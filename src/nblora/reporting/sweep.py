"""What a comparison says, apart from how it is drawn.

Plotly's figures, matplotlib's and the HTML tables are drawn from the same curves, fronts and maps.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nblora.reporting.looks import HEAT, Style
from nblora.reporting.words import (
    Scale,
    Score,
    epochs_text,
    finite_number,
    fixed_text,
    look_up,
    plural,
    rate_text,
    scales,
)


def styles(comparison: Mapping[str, Any]) -> dict[str, Style]:
    """A style for each available method, ours first."""
    available = available_methods(comparison)
    ordered = sorted(available, key=lambda entry: not str(entry["method"]).startswith("nblora"))
    places = {entry["method"]: index for index, entry in enumerate(ordered)}
    return {
        entry["method"]: Style(entry["method"], label_of(entry), places[entry["method"]])
        for entry in available
    }


def scales_of(comparison: Mapping[str, Any]) -> dict[Score, Scale]:
    return scales(comparison["metric"], comparison.get("before"))


@dataclass(frozen=True)
class Spread:
    """Of one setting over its seeds."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Setting:
    """All seeds of one method at one choice of hyper-parameters; scores None where no run has one."""

    method: str
    learning_rate: float
    rank: int | None
    epochs: float
    bound: float | None
    target: Spread | None
    kept: Spread | None
    diverged: int
    failed: int

    def score(self, name: Score) -> Spread | None:
        return self.target if name == "target" else self.kept

    @property
    def lost_in_words(self) -> str:
        parts = [
            f"{plural(count, 'run')} {word}"
            for count, word in ((self.diverged, "diverged"), (self.failed, "failed"))
            if count
        ]
        return ", ".join(parts)


@dataclass(frozen=True)
class Curve:
    """A method's scores by learning rate, at one rank, epoch count and bound; settings by learning rate."""

    style: Style
    score: Score
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Front:
    """A method's runs and those of them that no other of its runs beats in both scores.

    Attributes:
        points: (target, kept) scores of the front, by target.
        picked: (target, kept) at the learning rate that does best on target validation, means over seeds.
        picked_text: what was picked.
        runs: (text, (target, kept)) of every run that has both scores.
    """

    style: Style
    points: tuple[tuple[float, float], ...]
    picked: tuple[float, float] | None
    picked_text: str
    runs: tuple[tuple[str, tuple[float, float]], ...]

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """All (target, kept) scores."""
        return [*(pair for _, pair in self.runs), *self.points]


@dataclass(frozen=True)
class HeatMap:
    """A method's scores by learning rate (columns) and another setting (rows); None where nothing ran."""

    style: Style
    score: Score
    along: str
    rows: tuple[Any, ...]
    columns: tuple[float, ...]
    cells: tuple[tuple[Setting | None, ...], ...]


def _spread(values: Iterable[Any]) -> Spread | None:
    numbers = [number for value in values if (number := finite_number(value)) is not None]
    return Spread(statistics.fmean(numbers), min(numbers), max(numbers), len(numbers)) if numbers else None


def settings(comparison: Mapping[str, Any]) -> list[Setting]:
    """Runs that differ in nothing but their seed as one, sorted."""
    names = ("method", "learning_rate", "rank", "epochs", "bound")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in comparison["runs"]:
        key = tuple(run.get(name) for name in names)
        groups.setdefault(key, []).append(run)
    found = [
        Setting(
            **dict(zip(names, key)),
            target=_spread(run.get("target") for run in runs),
            kept=_spread(run.get("kept") for run in runs),
            diverged=sum(run["status"] == "diverged" for run in runs),
            failed=sum(run["status"] == "failed" for run in runs),
        )
        for key, runs in groups.items()
    ]
    return sorted(found, key=lambda s: (s.method, s.epochs, s.rank or 0, s.bound or 0, s.learning_rate))


def picked_at_reference(entry: Mapping[str, Any], reference: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a user would pick of a method at the reference rank (or none) and epochs."""
    for picked in entry.get("picked") or []:
        if picked.get("rank") in (reference["rank"], None) and picked["epochs"] == reference["epochs"]:
            return picked if finite_number((picked.get("target") or {}).get("mean")) is not None else None
    return None


def _reference_bound(comparison: Mapping[str, Any], method: str) -> float | None:
    """The bound that was picked at the reference, else the first one that ran."""
    entry = next(entry for entry in comparison["methods"] if entry["method"] == method)
    picked = picked_at_reference(entry, comparison["reference"])
    if picked is not None:
        return finite_number(picked.get("bound"))
    return next(
        (finite_number(run.get("bound")) for run in comparison["runs"] if run["method"] == method), None
    )


def has_kept(comparison: Mapping[str, Any]) -> bool:
    return any(finite_number(run.get("kept")) is not None for run in comparison["runs"])


def has_one_seed(comparison: Mapping[str, Any]) -> bool:
    return len({run.get("seed") for run in comparison["runs"]}) < 2


def learning_rate_curves(comparison: Mapping[str, Any], score: Score) -> list[Curve]:
    """A curve for each method at the reference rank and epochs, and its picked bound there."""
    reference, found = comparison["reference"], settings(comparison)
    curves = []
    for method, style in styles(comparison).items():
        bound = _reference_bound(comparison, method)
        chosen = tuple(
            setting
            for setting in found
            if setting.method == method
            and setting.rank in (reference["rank"], None)
            and setting.epochs == reference["epochs"]
            and setting.bound == bound
        )
        if chosen:
            curves.append(Curve(style, score, chosen))
    return curves


def fronts(comparison: Mapping[str, Any]) -> list[Front]:
    """The trade-off of each method that has both scores."""
    looks, found = styles(comparison), []
    for entry in available_methods(comparison):
        method = entry["method"]
        picked = picked_at_reference(entry, comparison["reference"])
        place = _pair(look_up(picked, "target", "mean"), look_up(picked, "kept", "mean"))
        points = [pair for point in entry.get("front") or [] if (pair := _pair(*point))]
        runs = tuple(
            (f"{setting_text(run)}, seed {run.get('seed')}", pair)
            for run in comparison["runs"]
            if run["method"] == method and (pair := _pair(run.get("target"), run.get("kept")))
        )
        if points or runs:
            words = setting_text(picked) if picked else ""
            found.append(Front(looks[method], tuple(sorted(points)), place, words, runs))
    return found


def _pair(target: Any, kept: Any) -> tuple[float, float] | None:
    """Both scores, where both are numbers."""
    first, second = finite_number(target), finite_number(kept)
    return None if first is None or second is None else (first, second)


def heat_maps(comparison: Mapping[str, Any], along: str, score: Score) -> list[HeatMap]:
    """A map for each method that ran with several values of `along`: "rank", "epochs" or "bound".

    What is not along an axis is as in the reference, and the bound as picked there.
    """
    reference, found, maps = comparison["reference"], settings(comparison), []
    for method, style in styles(comparison).items():
        fixed = {"rank": reference["rank"], "epochs": reference["epochs"]}
        fixed["bound"] = _reference_bound(comparison, method)
        fixed.pop(along)
        chosen = [
            setting
            for setting in found
            if setting.method == method
            and all(
                getattr(setting, name) == value or (name == "rank" and setting.rank is None)
                for name, value in fixed.items()
            )
        ]
        rows = sorted({value for s in chosen if (value := getattr(s, along)) is not None})
        columns = sorted({setting.learning_rate for setting in chosen})
        if len(rows) < 2 or not columns:
            continue
        by_place = {(getattr(setting, along), setting.learning_rate): setting for setting in chosen}
        cells = tuple(tuple(by_place.get((row, column)) for column in columns) for row in rows)
        maps.append(HeatMap(style, score, along, tuple(rows), tuple(columns), cells))
    return maps


def visible_range(values: Iterable[float | None], scale: Scale) -> tuple[float, float]:
    """(worst, best) end of an axis: all values, but for far outliers on the worse side.

    One diverged run that lost 6 nats would leave a flat line of what lost 0.1; values beyond three
    interquartile ranges from the quartile are left to leave the chart.
    """
    numbers = sorted(value for value in values if value is not None)
    if not numbers:
        return (0.0, 1.0) if scale.higher_is_better else (1.0, 0.0)
    low, high = numbers[0], numbers[-1]
    if len(numbers) >= 8 and scale.unit != "%":
        first, _, third = statistics.quantiles(numbers, n=4, method="inclusive")
        fence = 3 * max(third - first, 1e-3)
        if scale.higher_is_better:
            low = max(low, first - fence)
        else:
            high = min(high, third + fence)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    low, high = low - margin, high + margin
    if scale.unit == "%":
        low, high = max(low, -2.0), min(high, 102.0)
    return (low, high) if scale.higher_is_better else (high, low)


def count_outside(values: Iterable[float | None], ends: tuple[float, float]) -> int:
    low, high = sorted(ends)
    return sum(value is not None and not low <= value <= high for value in values)


def setting_text(chosen: Any) -> str:
    """The hyper-parameters of a setting."""
    get = chosen.get if isinstance(chosen, Mapping) else lambda name: getattr(chosen, name)
    parts = [f"learning rate {rate_text(get('learning_rate'))}"]
    if get("rank") is not None:
        parts.append(f"rank {get('rank')}")
    parts.append(epochs_text(get("epochs")))
    if get("bound") is not None:
        parts.append(f"bound {rate_text(get('bound'))}")
    return ", ".join(parts)


def both_text(scores: Sequence[Any], shown: Mapping[Score, Scale]) -> str:
    """Of a target and a kept score."""
    target, kept = scores
    return f"{shown['target'].phrase(target)}, {shown['kept'].phrase(kept)}"


def available_methods(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for entry in comparison["methods"] if entry.get("available", True)]


def means(picked: Mapping[str, Any]) -> tuple[float, float]:
    """(target, kept)."""
    return float(picked["target"]["mean"]), float(picked["kept"]["mean"])


def label_of(entry: Mapping[str, Any]) -> str:
    return str(entry.get("label") or entry["method"])


def unbroken_parts(points: Sequence[tuple[float, Spread | None]]) -> list[list[tuple[float, Spread]]]:
    """Neighbours that have a score, in groups between those that have none."""
    parts: list[list[tuple[float, Spread]]] = [[]]
    for rate, spread in points:
        if spread is None:
            parts.append([])
        else:
            parts[-1].append((rate, spread))
    return [part for part in parts if part]


def trade_off_ends(
    found: Sequence[Front], start: tuple[float | None, float | None], shown: Mapping[Score, Scale]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(worst, best) ends of the target's and of the kept axis.

    Accuracies have room for every run; of nats, which fall without limit, only what matters: the
    fronts, what was picked, and where training started.
    """
    if shown["target"].unit == "%":
        pairs = [pair for front in found for pair in front.pairs]
    else:
        picked = [front.picked for front in found if front.picked]
        pairs = [*(pair for front in found for pair in front.points), *picked]
    targets, kepts = zip(*pairs, start)
    return (
        visible_range([shown["target"].shown(score) for score in targets], shown["target"]),
        visible_range([shown["kept"].shown(score) for score in kepts], shown["kept"]),
    )


def shared_maps(comparison: Mapping[str, Any], along: str) -> dict[Score, list[HeatMap]]:
    """Heat maps of the scores that were measured."""
    scores: tuple[Score, ...] = ("target", "kept") if has_kept(comparison) else ("target",)
    found = {score: heat_maps(comparison, along, score) for score in scores}
    return {score: maps for score, maps in found.items() if maps}


def heat_ends(maps: Sequence[HeatMap], scale: Scale) -> tuple[float, float]:
    """(worst, best) of what is shown in all maps, so that colours can be compared; far outliers apart."""
    values = [
        scale.shown(spread.mean)
        for heat_map in maps
        for row in heat_map.cells
        for s in row
        if s is not None and (spread := s.score(heat_map.score))
    ]
    worst, best = visible_range(values, scale)
    numbers = [value for value in values if value is not None]
    if not numbers:
        return worst, best
    low, high = max(min(worst, best), min(numbers)), min(max(worst, best), max(numbers))
    return (low, high) if scale.higher_is_better else (high, low)


def heat_cell(
    setting: Setting | None, score: Score, scale: Scale, ends: tuple[float, float]
) -> tuple[int | None, str]:
    """A level of colour from 0, worst, and the text on it."""
    spread = setting.score(score) if setting is not None else None
    value = scale.shown(spread.mean) if spread is not None else None
    if value is None:
        return None, "" if setting is None else "✗" if setting.lost_in_words else "–"
    worst, best = ends
    share = (value - worst) / (best - worst) if best != worst else 1.0
    level = min(max(int(share * len(HEAT)), 0), len(HEAT) - 1)
    text = fixed_text(value, 0 if scale.unit == "%" else 2)
    return level, text.replace("0.", ".", 1) if scale.unit != "%" and abs(value) < 1 else text
