"""What the runs of a comparison say of one method: pure functions of records.

A run's scores are higher-is-better: accuracy in [0, 1], or minus the nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, stdev  # of floats, the same in whatever order the runs come
from typing import Any

RUN_FIELDS = (
    "method",
    "learning_rate",
    "rank",
    "epochs",
    "bound",
    "seed",
    "status",
    "error",
    "validation",
    "target",
    "kept_validation",
    "kept",
    "seconds",
    "peak_memory_bytes",
)

Record = Mapping[str, Any]
_SCORES = ("validation", "target", "kept_validation", "kept")
_AXES = ("rank", "epochs", "learning_rate", "bound")


def worst_scores(runs: Iterable[Record]) -> dict[str, float]:
    """The worst finite value of each score, which stands for the scores of a run that diverged to NaN."""
    worst: dict[str, float] = {}
    for run in runs:
        for name in _SCORES:
            value = run[name]
            if value is not None and math.isfinite(value):
                worst[name] = min(value, worst.get(name, value))
    return worst


def hypervolume_corner(before: Mapping[str, Any]) -> list[float] | None:
    """The target and kept score from which the hypervolume is measured.

    (0, 0) for accuracy; for nats the base model on the target, and one nat lost on the kept data. None
    where the base model has no such scores.
    """
    if before["metric"] == "accuracy":
        return [0.0, 0.0]
    scores = before["target"], before["kept"]
    if any(score is None or not math.isfinite(score) for score in scores):
        return None
    return [scores[0], scores[1] - 1.0]


def summarise_method(
    runs: Sequence[Record],
    *,
    reference: tuple[int | None, float],
    worst: Mapping[str, float],
    tolerance: float,
    corner: Sequence[float] | None,
) -> dict[str, Any]:
    """The figures of one method.

    Failed runs have no scores and are left out; so are diverged ones where no run has a score that could
    stand for theirs. Both are counted.

    Args:
        runs: all of the method's.
        reference: rank and epochs at which its learning rate is tuned.
        worst: scores that stand for those of diverged runs, from `worst_scores`.
        tolerance: within which a score counts as near the best.
        corner: of the hypervolume, from `hypervolume_corner`.

    Returns:
        `picked`: for each rank and epochs the setting with the best mean target validation score, and its
        test scores. `whole_grid`: mean and worst over all settings. `near_best`: share of settings
        near the best. `transfer`: the reference's setting reused elsewhere. `front` and `hypervolume`
        of target against kept, empty and None without kept data. `seconds` and `peak_memory_bytes`: medians
        at the reference.
    """
    with_scores = [_counted(run, worst) for run in runs if run["status"] != "failed"]
    counted = [run for run in with_scores if None not in (run["validation"], run["target"])]
    settings = _by(counted, _AXES)
    has_kept = any(run["kept"] is not None for run in counted)
    places = sorted({(key[0], key[1]) for key in settings}, key=lambda place: (place[0] or 0, place[1]))
    picked = {place: _pick(settings, place) for place in places}
    means = {key: _means(group) for key, group in settings.items()}
    both = {key: (m["target"] + m["kept"]) / 2 for key, m in means.items()} if has_kept else {}
    at_reference = [run for run in runs if (run["rank"], run["epochs"]) == reference]
    return {
        "picked": [_chosen(place, key, settings[key]) for place, key in picked.items()],
        "whole_grid": {
            "target": _mean_and_worst(counted, "target"),
            "kept": _mean_and_worst(counted, "kept") if has_kept else None,
            "settings": len({tuple(run[axis] for axis in _AXES) for run in runs}),
            "runs": len(runs),
            "diverged": sum(run["status"] == "diverged" for run in runs),
            "failed": sum(run["status"] == "failed" for run in runs),
        },
        "near_best": {
            "target": _near({key: m["target"] for key, m in means.items()}, tolerance),
            "both": _near(both, tolerance),
        },
        "transfer": _transfer(settings, picked, reference),
        "front": [list(point) for point in pareto_front(_points(counted))] if has_kept else [],
        "hypervolume": _hypervolumes(counted, corner) if has_kept and corner else None,
        "seconds": _median(run["seconds"] for run in at_reference),
        "peak_memory_bytes": _median(run["peak_memory_bytes"] for run in at_reference),
    }


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is at least as good as in both, by falling first coordinate."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def hypervolume(points: Iterable[tuple[float, float]], corner: Sequence[float]) -> float:
    """The area that points dominate above a corner, both coordinates higher-is-better."""
    area, height = 0.0, corner[1]
    for x, y in pareto_front((x, y) for x, y in points if x > corner[0] and y > corner[1]):
        area += (x - corner[0]) * (y - height)
        height = y
    return area


def _counted(run: Record, worst: Mapping[str, float]) -> dict[str, Any]:
    """A run whose scores that diverged to NaN are the worst ones."""
    counted = dict(run)
    for name in _SCORES:
        if run[name] is None or not math.isfinite(run[name]):
            counted[name] = worst.get(name) if run["status"] == "diverged" else None
    return counted


def _by(runs: Iterable[Record], axes: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for run in runs:
        groups.setdefault(tuple(run[axis] for axis in axes), []).append(run)
    return groups


def _means(group: Sequence[Record]) -> dict[str, float]:
    return {
        name: fmean(run[name] for run in group)
        for name in _SCORES
        if all(run[name] is not None for run in group)
    }


def _pick(settings: Mapping[tuple[Any, ...], Sequence[Record]], place: tuple[Any, Any]) -> tuple[Any, ...]:
    """The learning rate and bound that a user would choose there; of equals the smallest."""
    here = sorted((key for key in settings if key[:2] == place), key=lambda key: (key[2], key[3] or 0))
    return max(here, key=lambda key: _means(settings[key])["validation"])


def _spread(group: Sequence[Record], name: str) -> dict[str, float] | None:
    values = [run[name] for run in group]
    if any(value is None for value in values):
        return None
    return _mean_and_std(values)


def _mean_and_std(values: Sequence[float]) -> dict[str, float]:
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def _chosen(place: tuple[Any, Any], key: tuple[Any, ...], group: Sequence[Record]) -> dict[str, Any]:
    return {
        "rank": place[0],
        "epochs": place[1],
        "learning_rate": key[2],
        "bound": key[3],
        "target": _spread(group, "target"),
        "kept": _spread(group, "kept"),
        "seeds": len(group),
    }


def _transfer(
    settings: Mapping[tuple[Any, ...], Sequence[Record]],
    picked: Mapping[tuple[Any, Any], tuple[Any, ...]],
    reference: tuple[Any, Any],
) -> list[dict[str, Any]]:
    if reference not in picked:
        return []
    found = []
    for place, best in picked.items():
        key = (*place, *picked[reference][2:])
        if place != reference and key in settings:
            reused = _chosen(place, key, settings[key])
            lost = _means(settings[best])["target"] - _means(settings[key])["target"]
            found.append({**reused, "target_lost": lost})
    return found


def _mean_and_worst(runs: Sequence[Record], name: str) -> dict[str, float] | None:
    values = [run[name] for run in runs if run[name] is not None]
    return {"mean": fmean(values), "worst": min(values)} if values else None


def _near(scores: Mapping[Any, float], tolerance: float) -> float | None:
    if not scores:
        return None
    best = max(scores.values())
    # a difference of exactly the tolerance counts, whatever its rounding
    return fmean(score >= best - tolerance - 1e-9 for score in scores.values())


def _points(runs: Iterable[Record]) -> list[tuple[float, float]]:
    return [(run["target"], run["kept"]) for run in runs if run["kept"] is not None]


def _hypervolumes(runs: Sequence[Record], corner: Sequence[float]) -> dict[str, float]:
    """Of each seed's own runs, so that more seeds do not make it larger."""
    return _mean_and_std([hypervolume(_points(group), corner) for group in _by(runs, ["seed"]).values()])


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(median(known)) if known else None
