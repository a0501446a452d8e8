"""The figures of a comparison against counts by other means, and on records as odd as real ones are."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nblora.summary import (
    RUN_FIELDS,
    hypervolume,
    hypervolume_corner,
    pareto_front,
    summarise_method,
    worst_scores,
)

SCORES = ("validation", "target", "kept_validation", "kept")


def run(target: float | None = 0.5, **fields: Any) -> dict[str, Any]:
    """The record of a run; scores that are not given follow the target's."""
    record: dict[str, Any] = {
        "method": "lora",
        "learning_rate": 0.01,
        "rank": 8,
        "epochs": 5.0,
        "bound": None,
        "seed": 0,
        "status": "done",
        "error": None,
        "validation": target,
        "target": target,
        "kept_validation": None,
        "kept": None,
        "seconds": 1.0,
        "peak_memory_bytes": 100,
        **fields,
    }
    assert sorted(record) == sorted(RUN_FIELDS)
    return record


def failed(**fields: Any) -> dict[str, Any]:
    return run(None, status="failed", error="why", seconds=None, peak_memory_bytes=None, **fields)


def summary(
    runs: list[dict[str, Any]],
    *,
    reference: tuple[int | None, float] = (8, 5.0),
    worst: Mapping[str, float] | None = None,
    tolerance: float = 0.02,
    corner: Any = (0.0, 0.0),
) -> dict[str, Any]:
    worst = worst_scores(runs) if worst is None else worst
    found = summarise_method(runs, reference=reference, worst=worst, tolerance=tolerance, corner=corner)
    json.dumps(found, allow_nan=False)
    return found


# --- the front and its hypervolume ---

# on a grid, so that ties and equal points come up, and areas can be counted
GRID = 12
POINTS = st.lists(st.tuples(st.integers(-2, GRID), st.integers(-2, GRID)), max_size=12)


@given(POINTS)
def test_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front(points)
    beaten = {
        point
        for point in points
        if any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
    }
    assert set(front) == set(points) - beaten
    assert len(set(front)) == len(front)
    assert front == sorted(front, reverse=True), "by falling first coordinate"


@given(POINTS, st.tuples(st.integers(-1, 3), st.integers(-1, 3)))
def test_hypervolume_is_the_number_of_dominated_unit_squares(
    points: list[tuple[int, int]], corner: tuple[int, int]
) -> None:
    squares = sum(
        any(x + 1 <= a and y + 1 <= b for a, b in points)
        for x, y in itertools.product(range(corner[0], GRID), range(corner[1], GRID))
    )
    assert hypervolume(points, corner) == squares


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8), st.integers(0, 99))
def test_hypervolume_is_a_probability(points: list[tuple[float, float]], seed: int) -> None:
    """Monte Carlo: a random point of the unit square is dominated with that probability."""
    rng, count = random.Random(seed), 4000
    samples = [(rng.random(), rng.random()) for _ in range(count)]
    share = sum(any(x <= a and y <= b for a, b in points) for x, y in samples) / count
    assert hypervolume(points, (0.0, 0.0)) == pytest.approx(share, abs=5 * 0.5 / math.sqrt(count))


@given(POINTS, st.tuples(st.integers(-2, GRID), st.integers(-2, GRID)), st.randoms())
def test_hypervolume_grows_with_points_in_any_order(points: Any, more: Any, rng: random.Random) -> None:
    before = hypervolume(points, (0, 0))
    after = [*points, more]
    rng.shuffle(after)
    assert hypervolume(after, (0, 0)) >= before
    assert hypervolume(points[::-1] + points, (0, 0)) == before


def test_hypervolume_of_nothing_and_of_what_only_touches_the_corner() -> None:
    assert hypervolume([], (0.0, 0.0)) == 0
    assert hypervolume([(0.0, 5.0), (5.0, 0.0), (-1.0, 9.0)], (0.0, 0.0)) == 0


def test_corner_is_nothing_for_accuracy_and_the_base_model_for_nats() -> None:
    assert hypervolume_corner({"metric": "accuracy", "target": 0.1, "kept": 0.9}) == [0.0, 0.0]
    assert hypervolume_corner({"metric": "accuracy", "target": None, "kept": None}) == [0.0, 0.0]
    assert hypervolume_corner({"metric": "nats", "target": -2.5, "kept": -1.5}) == [-2.5, -2.5]
    assert hypervolume_corner({"metric": "nats", "target": -2.5, "kept": None}) is None
    assert hypervolume_corner({"metric": "nats", "target": math.nan, "kept": -1.5}) is None


def test_hypervolume_is_of_the_test_scores_and_for_each_seed() -> None:
    runs = [
        run(0.5, kept=0.8, kept_validation=0.1, validation=0.1, seed=0),
        run(0.8, kept=0.5, kept_validation=0.1, validation=0.1, seed=0, learning_rate=0.1),
        run(0.5, kept=0.5, kept_validation=0.9, validation=0.9, seed=1),
    ]
    areas = 0.5 * 0.8 + 0.3 * 0.5, 0.25
    mean = sum(areas) / 2
    spread = math.sqrt(sum((area - mean) ** 2 for area in areas))  # n - 1 = 1
    found = summary(runs)
    assert found["hypervolume"] == pytest.approx({"mean": mean, "std": spread})
    assert found["front"] == [[0.8, 0.5], [0.5, 0.8]]
    assert summary(runs[:2])["hypervolume"] == pytest.approx({"mean": areas[0], "std": 0.0})
    shifted = summary(runs[:1], corner=[0.4, 0.6])["hypervolume"]
    assert shifted["mean"] == pytest.approx(0.1 * 0.2)


# --- what a user would pick ---


def test_settings_are_picked_by_target_validation_and_nothing_else() -> None:
    runs = [
        run(0.7, learning_rate=0.1, validation=0.6, kept=0.9, kept_validation=0.9),
        run(0.2, learning_rate=0.01, validation=0.8, kept=0.1, kept_validation=0.1),
        run(0.9, learning_rate=0.001, validation=0.7, kept=0.8, kept_validation=0.8),
    ]
    (picked,) = summary(runs)["picked"]
    assert picked == {
        "rank": 8,
        "epochs": 5.0,
        "learning_rate": 0.01,
        "bound": None,
        "target": {"mean": 0.2, "std": 0.0},
        "kept": {"mean": 0.1, "std": 0.0},
        "seeds": 1,
    }


def test_the_mean_over_seeds_picks_and_its_spread_is_that_of_a_sample() -> None:
    runs = [
        *(
            run(t, learning_rate=0.1, seed=s, validation=v)
            for s, (t, v) in enumerate([(0.1, 0.9), (0.2, 0.1)])
        ),
        *(run(t, learning_rate=0.2, seed=s, validation=0.6) for s, t in enumerate([0.3, 0.6])),
    ]
    (picked,) = summary(runs)["picked"]
    assert picked["learning_rate"] == 0.2
    assert picked["seeds"] == 2
    assert picked["target"]["mean"] == pytest.approx(0.45)
    assert picked["target"]["std"] == pytest.approx(0.3 / math.sqrt(2))
    assert picked["kept"] is None


def test_of_equals_the_smallest_learning_rate_and_then_bound_is_picked() -> None:
    axes = list(itertools.product([0.1, 0.01, 1.0], [0.5, 0.2, 0.3]))
    runs = [run(learning_rate=rate, bound=bound) for rate, bound in axes]
    for shuffled in (runs, runs[::-1], runs[4:] + runs[:4]):
        (picked,) = summary(shuffled)["picked"]
        assert (picked["learning_rate"], picked["bound"]) == (0.01, 0.2)


def test_rounding_of_means_breaks_no_tie() -> None:
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in floating point."""
    scores = [0.1, 0.2, 0.3]
    assert sum(scores) != sum(scores[::-1])
    for order in (scores, scores[::-1]):
        runs = [run(t, learning_rate=0.1, seed=s) for s, t in enumerate(order)]
        runs += [run(t, learning_rate=0.2, seed=s) for s, t in enumerate(order[::-1])]
        assert summary(runs)["picked"][0]["learning_rate"] == 0.1


def test_each_rank_and_epoch_count_is_picked_for_itself_across_bounds() -> None:
    best = {(2, 1.0): (0.1, 0.3), (2, 5.0): (0.2, 0.6), (16, 1.0): (0.2, 0.3), (16, 5.0): (0.1, 0.6)}
    runs = [
        run(
            0.9 if best[rank, epochs] == (rate, bound) else 0.3,
            rank=rank,
            epochs=epochs,
            learning_rate=rate,
            bound=bound,
        )
        for (rank, epochs), rate, bound in itertools.product(best, [0.1, 0.2], [0.3, 0.6])
    ]
    random.Random(0).shuffle(runs)
    picked = summary(runs)["picked"]
    assert [(p["rank"], p["epochs"]) for p in picked] == sorted(best), "in order, ranks as numbers"
    assert {(p["rank"], p["epochs"]): (p["learning_rate"], p["bound"]) for p in picked} == best


def test_a_method_without_rank_or_bound() -> None:
    runs = [
        run(t, rank=None, epochs=e, learning_rate=0.1 * (i + 1))
        for e in (10.0, 5.0)
        for i, t in enumerate((0.5, 0.7, 0.6))
    ]
    found = summary(runs, reference=(None, 5.0))
    assert [(p["rank"], p["epochs"], p["learning_rate"]) for p in found["picked"]] == [
        (None, 5.0, 0.2),
        (None, 10.0, 0.2),
    ]
    assert [t["epochs"] for t in found["transfer"]] == [10.0]
    assert found["seconds"] == 1.0


# --- the whole grid ---


def test_mean_and_worst_are_over_all_runs_that_did_not_fail() -> None:
    runs = [
        run(0.9, kept=0.2, seed=0),
        run(0.6, kept=0.9, seed=1),
        run(0.3, kept=0.7, learning_rate=0.1),
        failed(learning_rate=0.2),
        failed(learning_rate=0.2, seed=1),
    ]
    grid = summary(runs)["whole_grid"]
    assert grid["target"] == pytest.approx({"mean": 0.6, "worst": 0.3})
    assert grid["kept"] == pytest.approx({"mean": 0.6, "worst": 0.2})
    assert {name: grid[name] for name in ("settings", "runs", "diverged", "failed")} == {
        "settings": 3,
        "runs": 5,
        "diverged": 0,
        "failed": 2,
    }


def test_failed_runs_change_no_score() -> None:
    runs = [run(t, learning_rate=r, kept=0.5) for t, r in [(0.8, 0.1), (0.5, 0.2)]]
    more = [*runs, failed(learning_rate=0.1, seed=1), failed(learning_rate=0.3)]
    without, found = summary(runs), summary(more)
    assert found.pop("whole_grid") != without.pop("whole_grid")
    assert found == without


@pytest.mark.parametrize("lost", [None, math.nan, math.inf, -math.inf])
def test_a_diverged_run_counts_as_the_worst_of_all_runs(lost: float | None) -> None:
    """The worst of any method's, so that diverging is never better than not diverging."""
    scores = dict.fromkeys(SCORES, lost)
    own = [
        run(0.9, kept=0.9, kept_validation=0.9),
        run(**{**scores, "status": "diverged", "learning_rate": 0.1}),
    ]
    others = [
        run(0.2, kept=0.4, kept_validation=0.3, validation=0.1, method="full"),
        failed(method="full"),
        run(**{**scores, "status": "diverged", "method": "full"}),
    ]
    worst = worst_scores(own + others)
    assert worst == {"validation": 0.1, "target": 0.2, "kept_validation": 0.3, "kept": 0.4}
    found = summary(own, worst=worst)
    assert found["whole_grid"]["target"] == pytest.approx({"mean": 0.55, "worst": 0.2})
    assert found["whole_grid"]["kept"] == pytest.approx({"mean": 0.65, "worst": 0.4})
    assert found["whole_grid"]["diverged"] == 1
    assert found["picked"][0]["learning_rate"] == 0.01
    assert found["near_best"] == {"target": 0.5, "both": 0.5}
    assert found["front"] == [[0.9, 0.9]]


def test_a_diverged_run_with_scores_keeps_them() -> None:
    own = [run(0.9), run(0.5, learning_rate=0.1, status="diverged", validation=None)]
    found = summary(own)["whole_grid"]
    assert found["target"] == pytest.approx({"mean": 0.7, "worst": 0.5})
    assert found["diverged"] == 1


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [failed(), failed(learning_rate=0.1)],
        [run(None, status="diverged"), run(math.nan, status="diverged", learning_rate=0.1, kept=math.nan)],
        [failed(), run(None, status="diverged", learning_rate=0.1)],
        [run(None, status="diverged", validation=0.5)],
    ],
    ids=["none", "all failed", "all diverged", "both", "without test scores"],
)
@pytest.mark.parametrize("corner", [(0.0, 0.0), None])
def test_a_method_without_any_score_has_empty_figures(runs: list[dict[str, Any]], corner: Any) -> None:
    found = summary(runs, corner=corner)
    counts = found.pop("whole_grid")
    assert counts.pop("settings") == len(runs)
    assert counts.pop("runs") == len(runs)
    assert counts.pop("failed") == sum(r["status"] == "failed" for r in runs)
    assert counts.pop("diverged") == sum(r["status"] == "diverged" for r in runs)
    assert counts == {"target": None, "kept": None}
    times = found.pop("seconds"), found.pop("peak_memory_bytes")
    assert times == ((1.0, 100) if any(r["seconds"] for r in runs) else (None, None))
    assert found == {
        "picked": [],
        "near_best": {"target": None, "both": None},
        "transfer": [],
        "front": [],
        "hypervolume": None,
    }


def test_without_kept_data_nothing_is_said_of_it() -> None:
    found = summary([run(0.5), run(0.9, learning_rate=0.1), run(None, status="diverged", learning_rate=1.0)])
    assert found["whole_grid"]["kept"] is None
    assert found["near_best"]["both"] is None
    assert found["near_best"]["target"] == pytest.approx(1 / 3)
    assert found["picked"][0]["kept"] is None
    assert (found["front"], found["hypervolume"]) == ([], None)


def test_without_a_corner_there_is_a_front_but_no_hypervolume() -> None:
    found = summary([run(-1.0, kept=-2.0)], corner=None)
    assert (found["front"], found["hypervolume"]) == ([[-1.0, -2.0]], None)


# --- near the best ---


def test_near_best_counts_settings_within_the_tolerance() -> None:
    """0.26 - 0.02 is more than 0.24 in floating point, and 0.24 counts."""
    assert 0.26 - 0.02 > 0.24
    targets = [(0.26, 0.1), (0.24, 0.2), (0.2399, 0.3), (0.1, 0.4)]
    runs = [run(target, learning_rate=rate, kept=1.0) for target, rate in targets]
    assert summary(runs)["near_best"] == {"target": 0.5, "both": 0.75}
    assert summary(runs, tolerance=0.0)["near_best"]["target"] == 0.25
    assert summary(runs, tolerance=1.0)["near_best"]["target"] == 1.0


def test_near_best_is_of_the_means_over_seeds_and_both_is_the_mean_of_target_and_kept() -> None:
    runs = [
        run(0.9, kept=0.1, learning_rate=0.1, seed=0),
        run(0.7, kept=0.1, learning_rate=0.1, seed=1),
        run(0.8, kept=0.5, learning_rate=0.2, seed=0),
        run(0.8, kept=0.5, learning_rate=0.2, seed=1),
        run(0.5, kept=0.79, learning_rate=0.3, seed=0),
        run(0.5, kept=0.75, learning_rate=0.4, seed=0),
    ]
    # means of target and kept: 0.45, 0.65, 0.645, 0.625
    assert summary(runs)["near_best"] == pytest.approx({"target": 1 / 2, "both": 1 / 2})


# --- transfer ---


def test_transfer_reuses_the_references_learning_rate_and_bound_elsewhere() -> None:
    scores = {  # (rank, epochs): {(rate, bound): (validation, target)}
        (8, 5.0): {(0.1, 0.3): (0.5, 0.6), (0.1, 0.6): (0.9, 0.2), (0.2, 0.3): (0.4, 0.9)},
        (2, 5.0): {(0.1, 0.3): (0.9, 0.7), (0.1, 0.6): (0.1, 0.4), (0.2, 0.3): (0.2, 0.8)},
        (8, 9.0): {(0.1, 0.3): (0.2, 0.1), (0.1, 0.6): (0.8, 0.5), (0.2, 0.3): (0.1, 0.9)},
        (16, 9.0): {(0.1, 0.3): (0.2, 0.1)},  # where the reference's setting was not run
    }
    runs = [
        run(
            target, validation=validation, rank=rank, epochs=epochs, learning_rate=rate, bound=bound, kept=0.5
        )
        for (rank, epochs), settings in scores.items()
        for (rate, bound), (validation, target) in settings.items()
    ]
    transfer = summary(runs)["transfer"]
    assert [(t["rank"], t["epochs"]) for t in transfer] == [(2, 5.0), (8, 9.0)]
    assert all((t["learning_rate"], t["bound"]) == (0.1, 0.6) for t in transfer)
    assert transfer[0]["target"]["mean"] == 0.4
    assert transfer[0]["target_lost"] == pytest.approx(0.7 - 0.4), "against what would be picked there"
    assert transfer[1]["target_lost"] == pytest.approx(0.0)
    assert transfer[0]["kept"] == {"mean": 0.5, "std": 0.0}


def test_transfer_may_gain_and_needs_a_reference() -> None:
    runs = [
        run(0.5, learning_rate=0.1, validation=0.9),
        run(0.5, learning_rate=0.2, validation=0.1),
        run(0.8, learning_rate=0.1, validation=0.1, rank=2),
        run(0.6, learning_rate=0.2, validation=0.9, rank=2),
    ]
    assert summary(runs)["transfer"][0]["target_lost"] == pytest.approx(-0.2)
    assert summary(runs, reference=(32, 5.0))["transfer"] == []


def test_cost_is_the_median_at_the_reference() -> None:
    runs = [
        run(seconds=1.0, peak_memory_bytes=10),
        run(seconds=2.0, peak_memory_bytes=30, learning_rate=0.1),
        run(seconds=30.0, peak_memory_bytes=21, learning_rate=0.2),
        run(seconds=90.0, peak_memory_bytes=99, rank=2),
        run(seconds=90.0, peak_memory_bytes=99, epochs=9.0),
        failed(learning_rate=0.3),
    ]
    found = summary(runs)
    assert (found["seconds"], found["peak_memory_bytes"]) == (2.0, 21.0)


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=False), st.integers(0, 2**20))
def test_the_order_of_runs_does_not_matter(rng: random.Random, seed: int) -> None:
    values = random.Random(seed)
    runs = []
    for rate, rank, epochs, bound, s in itertools.product(
        [0.1, 0.2], [2, 8], [1.0, 5.0], [0.3, 0.6], range(3)
    ):
        place = {"learning_rate": rate, "rank": rank, "epochs": epochs, "bound": bound, "seed": s}
        chance = values.random()
        if chance < 0.1:
            runs.append(failed(**place))
        elif chance < 0.2:
            runs.append(run(None, status="diverged", **place))
        else:
            scores = {name: values.randint(0, 20) / 20 for name in SCORES}
            runs.append(run(**scores, seconds=values.random(), **place))
    shuffled = rng.sample(runs, len(runs))
    assert summary(shuffled) == summary(runs)
