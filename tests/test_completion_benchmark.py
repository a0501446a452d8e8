"""The completion benchmark measures what it says; how good or fast anything is, is no test."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    import completion
    import completion_fit as fit
    import completion_methods as methods
    import completion_peers as peers
    import completion_report as report
    import completion_settings as settings
    import completion_tasks as tasks
finally:
    sys.path.remove(BENCHMARKS)

TINY: dict[str, Any] = {"shape": (60, 50), "rank": 2, "share": 0.5}
SMALL_RATINGS: dict[str, Any] = {"shape": (200, 150), "observed": 5000, "test": 500}

MAKERS = {
    "T1": lambda seed: tasks.synthetic(seed, **TINY),
    "T2": tasks.picture,
    "T3": lambda seed: tasks.ratings(seed, **SMALL_RATINGS),
    "scale": lambda seed: tasks.large(seed, (300, 200), 5000, 500),
}


def places(task: tasks.Task, entries: tasks.Entries) -> set[int]:
    assert entries.rows.min() >= 0
    assert entries.cols.min() >= 0
    assert entries.rows.max() < task.shape[0]
    assert entries.cols.max() < task.shape[1]
    return set((entries.rows.astype(np.int64) * task.shape[1] + entries.cols).tolist())


# -------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", MAKERS)
def test_no_test_entry_is_observed_and_a_seed_decides(name: str) -> None:
    task, again, other = MAKERS[name](0), MAKERS[name](0), MAKERS[name](1)
    seen, judged = places(task, task.observed), places(task, task.test)
    assert len(seen) == len(task.observed)
    assert len(judged) == len(task.test)
    assert not seen & judged
    for part in ("observed", "test"):
        for kind in tasks.KINDS:
            mine, same = getattr(getattr(task, part), kind), getattr(getattr(again, part), kind)
            np.testing.assert_array_equal(mine, same)
            assert mine.dtype == (np.float32 if kind == "values" else np.int32)
    assert places(other, other.observed) != seen


def test_synthetic_has_unit_variance_and_a_noise_free_test() -> None:
    task = tasks.synthetic(0, shape=(300, 200), rank=3)
    assert len(task.observed) + len(task.test) == 300 * 200
    assert task.test.values.var() == pytest.approx(1, abs=0.2)
    exact = np.zeros(task.shape)
    exact[task.test.rows, task.test.cols] = task.test.values
    hidden = tasks.synthetic(0, shape=(300, 200), rank=3, share=0.0)
    whole = np.zeros(task.shape)
    whole[hidden.test.rows, hidden.test.cols] = hidden.test.values
    # the truth is of rank 3, and the observed entries are the truth and noise of 0.1
    assert np.linalg.matrix_rank(whole, tol=1e-3) == 3
    noise = task.observed.values - whole[task.observed.rows, task.observed.cols]
    assert noise.std() == pytest.approx(0.1, rel=0.05)
    np.testing.assert_array_equal(exact[exact != 0], whole[exact != 0])


def test_ratings_are_between_one_and_five_and_some_rows_are_popular() -> None:
    task = tasks.ratings(0, **SMALL_RATINGS)
    assert len(task.observed) == 5000
    assert len(task.test) == 500
    assert task.observed.values.min() >= 1
    assert task.observed.values.max() <= 5
    counts = np.bincount(task.observed.rows, minlength=200)
    assert np.quantile(counts, 0.95) > 2 * np.median(counts)


def test_validation_splits_the_observed_entries() -> None:
    task = tasks.synthetic(0, **TINY)
    split = task.validation(0)
    assert len(split.test) == round(0.1 * len(task.observed))
    assert places(split, split.observed) | places(split, split.test) == places(task, task.observed)
    assert not places(split, split.observed) & places(split, split.test)


def test_unseen_rows_are_not_in_the_fit_and_seen_ones_lose_half() -> None:
    task = tasks.synthetic(0, **TINY)
    split = tasks.unseen(task, 0, count=10)
    assert split.task.shape == (50, 50)
    assert not places(split.task, split.task.observed) & places(split.task, split.task.test)
    assert not places(task, split.given) & places(task, split.rest)
    for part in (split.task.test, split.given, split.rest):
        assert set(part.rows.tolist()) == set(range(10))
    # values tell where an entry was: no two are the same
    before = dict(zip(task.observed.values.tolist(), task.observed.rows.tolist()))
    whole = np.bincount(task.observed.rows)
    left = np.bincount(split.task.observed.rows)
    for part, counts in ((split.task.observed, left), (split.given, np.bincount(split.given.rows))):
        for row in range(len(counts)):
            (old,) = {before[value] for value in part.values[part.rows == row].tolist()}
            halved = part is split.given or row < 10
            assert (counts[row] < 0.8 * whole[old]) if halved else (counts[row] == whole[old])


def test_saved_parts_come_back(tmp_path: Path) -> None:
    task = tasks.synthetic(0, **TINY)
    tasks.save(tmp_path / "task.npz", task.shape, observed=task.observed, test=task.test)
    shape, parts = tasks.load(tmp_path / "task.npz")
    assert shape == task.shape
    assert set(parts) == {"observed", "test"}
    np.testing.assert_array_equal(parts["test"].values, task.test.values)


# ------------------------------------------------------------------------------- peers written here


def full(task: tasks.Task) -> tasks.Task:
    """Every entry observed."""
    rows, cols = np.divmod(np.arange(math.prod(task.shape), dtype=np.int32), np.int32(task.shape[1]))
    values = np.random.default_rng(0).standard_normal(len(rows)).astype(np.float32)
    everything = tasks.Entries(rows, cols, values)
    return replace(task, observed=everything, test=everything)


def test_soft_impute_of_a_full_matrix_is_its_soft_thresholded_svd() -> None:
    task = full(tasks.synthetic(0, **TINY))
    matrix = task.observed.values.reshape(task.shape).astype(float)
    u, singular, vt = np.linalg.svd(matrix, full_matrices=False)
    penalty = float(singular[10])
    expected = (u * np.maximum(singular - penalty, 0)) @ vt
    found = peers.soft_impute_als(
        task.observed, task.shape, rank=30, penalty=penalty, max_iter=500, tol=1e-14
    )
    np.testing.assert_allclose(found.left @ found.right.T, expected, atol=1e-4)


def test_soft_impute_and_torch_factors_minimize_the_same() -> None:
    """½ ‖·‖² + λ nuclear norm = ½ (‖·‖² + λ (‖A‖² + ‖B‖²)) at its minimum."""
    task = tasks.synthetic(0, **TINY)
    kwargs: dict[str, Any] = {"rank": 8, "penalty": 2.0}
    soft = peers.soft_impute_als(task.observed, task.shape, max_iter=2000, tol=1e-13, **kwargs)
    free = peers.torch_factors(task.observed, task.shape, steps=2000, **kwargs)
    np.testing.assert_allclose(free.left @ free.right.T, soft.left @ soft.right.T, atol=0.01)


@pytest.mark.parametrize("solver", [peers.soft_impute_als, peers.torch_factors])
@pytest.mark.parametrize("bias", [False, True])
def test_the_peers_recover_a_low_rank_matrix(solver: Any, bias: bool) -> None:
    task = tasks.synthetic(0, **TINY)
    shifted = replace(task.observed, values=task.observed.values + np.float32(3 if bias else 0))
    # biases that are fitted beforehand leave a matrix of a higher rank behind
    found = solver(shifted, task.shape, rank=4 if bias else 2, penalty=0.3, bias=bias)
    error = found.predict(task.test.rows, task.test.cols) - task.test.values - (3 if bias else 0)
    assert np.sqrt(np.mean(error**2)) < 0.15
    assert (found.offset != 0) == bias


def test_biases_of_an_additive_matrix_are_found() -> None:
    task = full(tasks.synthetic(0, **TINY))
    row, col = np.linspace(-1, 1, 60), np.linspace(-2, 2, 50)
    values = 5 + row[task.observed.rows] + col[task.observed.cols]
    entries = replace(task.observed, values=values.astype(np.float32))
    row_bias, col_bias, offset = peers.biases(entries, task.shape, ridge=0.0)
    np.testing.assert_allclose(row_bias, row, atol=1e-5)
    np.testing.assert_allclose(col_bias, col, atol=1e-5)
    assert offset == pytest.approx(5, abs=1e-5)


# ------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_fits_with_its_first_quick_setting(name: str) -> None:
    method = methods.METHODS[name]
    if reason := method.missing():
        pytest.skip(reason)
    task = tasks.synthetic(0, (120, 100), 2, 0.5)
    (figures,) = fit.tune(method, task, settings.QUICK[name]["T1"][:1], 0)
    assert "error" not in figures, figures
    assert figures["rmse"] < task.test.values.std()
    assert figures["cpu_s"] > 0


@pytest.mark.parametrize("name", [methods.OURS, methods.CMFREC])
def test_rows_that_are_folded_in_are_predicted(name: str) -> None:
    method = methods.METHODS[name]
    if reason := method.missing():
        pytest.skip(reason)
    split = tasks.unseen(tasks.synthetic(0, (120, 100), 2, 0.5), 0, count=20)
    setting = settings.QUICK[name]["T1"][0]
    model = method.fit(method.prepare(split.task), setting, 0)
    assert method.fold_in is not None
    predicted = method.fold_in(model, split.given, (20, 100), split.rest.rows, split.rest.cols)
    assert fit.rmse(predicted, split.rest) < 0.5 * split.rest.values.std()


def test_a_setting_that_fails_says_why() -> None:
    method = methods.METHODS["softImpute-ALS"]
    bad, good = fit.tune(method, tasks.synthetic(0, **TINY), [{"rank": 2}, {"rank": 2, "penalty": 0.1}], 0)
    assert bad["error"].startswith("TypeError")
    assert "error" not in good


def test_an_absent_peer_is_left_out_with_the_reason() -> None:
    method = replace(methods.METHODS["cmfrec"], needs="a_package_that_is_not_there")
    assert "a_package_that_is_not_there" in (method.missing() or "")


def test_growth_of_the_resident_set_sees_what_was_allocated() -> None:
    def hungry(data: Any, setting: Any, seed: int) -> Any:
        block = np.ones((2000, 2000)) if data == (60, 50) else np.ones(1)  # 30.5 MiB, gone after the fit
        return peers.Factors(
            np.zeros((60, 1)), np.zeros((50, 1)), np.zeros(60), np.zeros(50), block[0].sum() * 0
        )

    method = methods.Method("scipy", {}, lambda task: task.shape, hungry)
    figures, _ = fit.final(method, tasks.synthetic(0, **TINY), {}, 0)
    assert 25 < figures["memory_mb"] < 60


def test_tuned_grids_are_there_for_every_task_a_method_takes_part_in() -> None:
    for name, method in methods.METHODS.items():
        assert {"T1", "T2", "T3"} <= set(method.grids), name
        assert set(settings.QUICK[name]) >= {"T1", "T2"}
        assert set(method.grids) <= {*completion.TASKS, "scale"}
        for task, grid in method.grids.items():
            assert len({json.dumps(each, sort_keys=True) for each in grid}) == len(grid) > 0, (name, task)


# ----------------------------------------------------------------------------------------- a whole run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(completion.MAKE, "T1", MAKERS["T1"])


@pytest.mark.usefixtures("small")
def test_a_run_writes_rows_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = "cmfrec" if importlib.util.find_spec("cmfrec") else "torch factors"
    file = tmp_path / "completion.json"
    order = ("--quick", "--tasks", "T1", "--methods", "softImpute-ALS", peer, "--json", str(file))
    completion.main(order)
    content = json.loads(file.read_text())
    rows = {row["method"]: row for row in content["rows"]}
    assert set(rows) == {"softImpute-ALS", peer}
    for row in rows.values():
        assert row["reason"] is None
        assert row["figures"]["rmse"] < 0.5
        assert row["figures"]["cpu_s"] > 0
        assert row["figures"]["memory_mb"] >= 0
        assert row["setting"] in settings.QUICK[row["method"]]["T1"]
    assert rows["softImpute-ALS"]["tuning_cpu_s"] > 0
    assert "| softImpute-ALS |" in capsys.readouterr().out
    # nothing is measured twice
    before = file.read_text()
    completion.main((*order, "--resume"))
    assert file.read_text() == before


@pytest.mark.usefixtures("small")
def test_a_process_that_takes_too_long_is_a_reason(tmp_path: Path) -> None:
    options = completion._checked(["--quick", "--tasks", "T1", "--patience", "0.01"])
    (row,) = completion.Bench("T1", 0, options, tmp_path).measure(["torch factors"])
    assert row.reason == "more than 0 s"
    assert not row.figures


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--quick", "--scale"], "exclude"),
        (["--resume"], "--json"),
        (["--repeats", "0"], "at least 1, got 0"),
        (["--patience", "nan"], "positive, got nan"),
        (["--quick", "--tasks", "T3"], "T1 and T2 only, got T3"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        completion.main(arguments)
    assert rule in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- report


def row(task: str, method: str, seed: int = 0, **figures: float) -> report.Row:
    return report.Row(task, method, seed, figures=figures)


def test_targets_are_judged_by_the_mean_next_to_the_peers() -> None:
    rows = [
        row("T1", report.OURS, 0, rmse=0.035, cpu_s=0.5, memory_mb=1),
        row("T1", report.OURS, 1, rmse=0.039, cpu_s=0.7, memory_mb=1),
        row("T1", report.CMFREC, 0, rmse=0.034, cpu_s=2, memory_mb=1),
        report.Row("T1", "KNNImputer", 0, reason="not installed"),
    ]
    error, seconds = report.targets(rows)
    assert error.reached == pytest.approx(0.037)
    assert not error.met
    assert error.best_peer == (report.CMFREC, 0.034)
    assert seconds.met
    assert seconds.best_peer == (report.CMFREC, 2)
    text = "\n".join([*report.show(rows, list(methods.METHODS)), *report.show_targets([error, seconds])])
    assert "0.0370 (0.0350–0.0390)" in text
    assert "| KNNImputer | –: not installed |" in text
    assert "not met" in text


def test_the_ratio_of_unseen_rows_is_taken_seed_by_seed() -> None:
    rows = [
        row("T1 unseen", report.OURS, 0, rmse=1.0, unseen_rmse=1.2),
        row("T1 unseen", report.OURS, 1, rmse=2.0, unseen_rmse=2.0),
    ]
    (verdict,) = report.targets(rows)
    assert verdict.reached == pytest.approx(1.1)


def test_nan_misses_a_target() -> None:
    (verdict,) = report.targets([row("T1 rank 20", report.AUTO, rmse=math.nan)])
    assert not verdict.met
