"""A comparison as a table of text and as sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nblora.reporting.sweep import (
    available_methods,
    both_text,
    has_kept,
    has_one_seed,
    label_of,
    means,
    picked_at_reference,
    scales_of,
)
from nblora.reporting.words import Scale, Score, finite_number, fixed_text, look_up, rate_text


@dataclass(frozen=True)
class Column:
    """A column of the main table.

    Attributes:
        group: which of the questions (a) to (f) it answers.
        path: keys to a number, or to a mean and a standard deviation, in a method's findings.
        scale: how a score is shown; other numbers are shown as they are.
        digits: after the point; None for few characters.
        better: 1 if higher numbers are better, -1 if lower ones are, 0 if neither.
    """

    group: str
    heading: str
    path: tuple[str, ...]
    scale: Scale | None = None
    digits: int | None = None
    better: int = 0

    def value(self, findings: Mapping[str, Any]) -> float | None:
        """The number as shown."""
        found = look_up(findings, *self.path)
        found = found.get("mean") if isinstance(found, Mapping) else found
        return finite_number(found) if self.scale is None else self.scale.shown(found)

    def text(self, findings: Mapping[str, Any]) -> str:
        """The cell."""
        value, deviation = self.value(findings), finite_number(look_up(findings, *self.path, "std"))
        if self.digits is None:
            return rate_text(value)
        if value is None or deviation is None:
            return fixed_text(value, self.digits)
        deviation *= 1 if self.scale is None else abs(self.scale.factor)
        return f"{fixed_text(value, self.digits)} ± {fixed_text(deviation, self.digits)}"


def _score_column(group: str, heading: str, path: tuple[str, ...], scale: Scale) -> Column:
    return Column(group, heading, path, scale, scale.digits, 1 if scale.higher_is_better else -1)


def _findings(entry: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns show of a method."""
    picked, size = picked_at_reference(entry, reference) or {}, finite_number(entry.get("peak_memory_bytes"))
    return {
        "label": label_of(entry),
        "picked": picked,
        "whole_grid": entry.get("whole_grid"),
        "near_best": {
            which: None
            if (share := finite_number(look_up(entry, "near_best", which))) is None
            else 100 * share
            for which in ("target", "both")
        },
        "reused": {
            "target_lost": max(_transfers(entry, "target_lost"), default=None),
            "kept": min(_transfers(entry, "kept", "mean"), default=None),
        },
        "hypervolume": entry.get("hypervolume"),
        "seconds": entry.get("seconds"),
        "memory": None if size is None else size / 2**20,
    }


def _transfers(entry: Mapping[str, Any], *keys: str) -> list[float]:
    found = (finite_number(look_up(transfer, *keys)) for transfer in entry.get("transfer") or [])
    return [number for number in found if number is not None]


def _columns(comparison: Mapping[str, Any]) -> list[Column]:
    """The main table's columns after the method's name; those of kept scores only where there are some."""
    shown, kept = scales_of(comparison), has_kept(comparison)
    scores: tuple[Score, ...] = ("target", "kept") if kept else ("target",)
    group = "(a) picked on target validation"
    columns = [Column(group, "learning rate", ("picked", "learning_rate"))]
    if len(look_up(comparison, "grid", "bounds") or []) > 1:
        columns.append(Column(group, "bound", ("picked", "bound")))
    columns += [_score_column(group, shown[score].title, ("picked", score), shown[score]) for score in scores]
    columns += [
        _score_column(
            "(b) whole grid", f"{which} {shown[score].title}", ("whole_grid", score, which), shown[score]
        )
        for score in scores
        for which in ("mean", "worst")
    ]
    group = "(c) near the best"
    columns.append(Column(group, "target (% of settings)", ("near_best", "target"), digits=0, better=1))
    if kept:
        columns.append(Column(group, "both (% of settings)", ("near_best", "both"), digits=0, better=1))
    if any(entry.get("transfer") for entry in comparison["methods"]):
        group, unit = "(d) learning rate reused", shown["target"].difference
        lost = replace(shown["target"], factor=abs(shown["target"].factor), offset=0, higher_is_better=False)
        columns.append(_score_column(group, f"most lost on target ({unit})", ("reused", "target_lost"), lost))
        if kept:
            columns.append(
                _score_column(group, f"worst {shown['kept'].title}", ("reused", "kept"), shown["kept"])
            )
    if kept:
        columns.append(Column("(e) front", "hypervolume", ("hypervolume",), digits=3, better=1))
    columns.append(Column("(f) cost", "seconds", ("seconds",), digits=1, better=-1))
    columns.append(Column("(f) cost", "memory (MiB)", ("memory",), digits=0, better=-1))
    columns += [
        Column("lost", f"{word} runs", ("whole_grid", word), digits=0)
        for word in ("diverged", "failed")
        if any(look_up(entry, "whole_grid", word) for entry in comparison["methods"])
    ]
    return columns


def columns_and_findings(comparison: Mapping[str, Any]) -> tuple[list[Column], dict[str, dict[str, Any]]]:
    """The columns, and by method what they show."""
    reference = comparison["reference"]
    findings = {entry["method"]: _findings(entry, reference) for entry in available_methods(comparison)}
    if has_one_seed(comparison):
        findings = {method: _without_deviations(found) for method, found in findings.items()}
    return _columns(comparison), findings


def _without_deviations(value: Any) -> Any:
    """Findings without the standard deviations, which one seed does not have."""
    if isinstance(value, Mapping):
        return {key: _without_deviations(item) for key, item in value.items() if key != "std"}
    return value


def comparison_rows(
    comparison: Mapping[str, Any], *, brief: bool = False
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The main table of a comparison as text: a heading, and a row for each available method.

    Units are in the heading; "–" stands for what was not measured.

    Args:
        comparison: as `comparison.json` holds it.
        brief: only what fits a terminal: what a user would pick, the worst of the grid, seconds.
    """
    columns, findings = columns_and_findings(comparison)
    if brief:
        columns = [
            column
            for column in columns
            if column.path[0] in ("picked", "seconds") or column.path[-1] == "worst"
        ]
    letters = [column.group.split()[0] if column.group.startswith("(") else "" for column in columns]
    heading = [f"{letter} {column.heading}".strip() for letter, column in zip(letters, columns)]
    rows = [
        # a spreadsheet reads no typographic minus
        (found["label"], *(column.text(found).replace("−", "-") for column in columns))
        for found in findings.values()
    ]
    return ("method", *heading), rows


def _ranked(comparison: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(method, picked) at the reference, best mean of scores first; target alone where nothing is kept."""
    kept = has_kept(comparison)
    found = [
        (entry, picked)
        for entry in available_methods(comparison)
        if (picked := picked_at_reference(entry, comparison["reference"])) is not None
        and (not kept or finite_number(look_up(picked, "kept", "mean")) is not None)
    ]
    return sorted(found, key=lambda pair: -_mean(pair[1], kept))


def _mean(picked: Mapping[str, Any], kept: bool) -> float:
    """Of target and kept score, or the target's alone."""
    return statistics.fmean(means(picked)) if kept else float(picked["target"]["mean"])


def answer_sentence(comparison: Mapping[str, Any]) -> str:
    """Which method at which learning rate, and what it learns and keeps."""
    ranked, shown, kept = _ranked(comparison), scales_of(comparison), has_kept(comparison)
    if not ranked:
        return "No method finished a run at the reference rank and epochs, so there is no answer yet."
    entry, picked = ranked[0]
    choice = f"{label_of(entry)} at learning rate {rate_text(picked['learning_rate'])}"
    if picked.get("bound") is not None and len((comparison.get("grid") or {}).get("bounds") or []) > 1:
        choice += f" and bound {rate_text(picked['bound'])}"
    target = shown["target"].phrase(picked["target"]["mean"])
    if not kept:
        return f"{choice} learns most: {target}." if len(ranked) > 1 else f"{choice} has {target}."
    both = f"{target} and {shown['kept'].phrase(picked['kept']['mean'])}"
    before = look_up(comparison, "before", "kept")
    if comparison["metric"] == "accuracy" and finite_number(before) is not None:
        both += f", of {shown['kept'].measure(before)} before"
    if len(ranked) == 1:
        return f"{choice} has {both}."
    leader = max(ranked, key=lambda pair: float(pair[1]["target"]["mean"]))[0]
    if leader is entry:
        return f"{choice} is best on the target, and on target and kept together: {both}."
    return f"{choice} is best on target and kept together: {both}."


def _runner_up(
    comparison: Mapping[str, Any], ranked: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> str:
    """How far the second is behind the first, and whether that could be chance."""
    scale, kept = scales_of(comparison)["target"], has_kept(comparison)
    (_, picked), (second, other) = ranked[:2]
    lead = _mean(picked, kept) - _mean(other, kept)
    deviations = [
        number
        for pick in (picked, other)
        for score in ("target", "kept")[: 2 if kept else 1]
        if (number := finite_number(look_up(pick, score, "std"))) is not None
    ]
    spread = math.hypot(*deviations) / (2 if kept else 1)
    what = "in the mean of target and kept" if kept else "on the target"
    line = f"Next is {label_of(second)}, {scale.lost(lead)} behind {what}"
    if has_one_seed(comparison) or not deviations:
        return f"{line}; with one seed, nobody can say how much of that is chance."
    if lead < spread:
        return f"{line}: a tie, for the seeds spread by {scale.lost(spread)}."
    return f"{line}; the seeds spread by {scale.lost(spread)}."


def further_sentences(comparison: Mapping[str, Any]) -> list[str]:
    """What else a user asks: who leads on the target, how sure that is, careless and reused rates."""
    ranked, shown, kept = _ranked(comparison), scales_of(comparison), has_kept(comparison)
    lines = []
    if ranked:
        best, _ = ranked[0]
        if len(ranked) > 1:
            lines.append(_runner_up(comparison, ranked))
        leader, leading = max(ranked, key=lambda pair: float(pair[1]["target"]["mean"]))
        if kept and leader is not best:
            lines.append(
                f"On the target alone {label_of(leader)} leads at learning rate "
                f"{rate_text(leading['learning_rate'])}: "
                f"{both_text(means(leading), shown)}."
            )
    score: Score = "kept" if kept else "target"
    worst = [
        (number, entry)
        for entry in available_methods(comparison)
        if (number := finite_number(look_up(entry, "whole_grid", score, "worst"))) is not None
    ]
    if len(worst) > 1:
        worst.sort(key=lambda pair: -pair[0])
        (best_score, safest), (next_score, follower), (last_score, last) = worst[0], worst[1], worst[-1]
        line = (
            f"Worst run anywhere in the grid: {label_of(safest)} {shown[score].phrase(best_score)}, "
            f"then {label_of(follower)} {shown[score].measure(next_score)}"
        )
        if len(worst) > 2:
            line += f", and last {label_of(last)} {shown[score].measure(last_score)}"
        lines.append(f"{line}.")
    return lines
