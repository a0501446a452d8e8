"""The privacy benchmark measures what it says; how accurate anything is, is no test."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("dp_accounting")
pytest.importorskip("sklearn")

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    import privacy
    import privacy_methods as methods
    import privacy_report as report
    import privacy_tasks as tasks
finally:
    sys.path.remove(BENCHMARKS)

CELL = report.Block("rotated", 20, False)
QUICK = ["--quick", "--seeds", "0", "--draws", "2"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two runs of four steps for each adapter."""
    monkeypatch.setattr(methods, "STEPS", (2, 4))
    monkeypatch.setattr(methods, "RATES", {kind: rates[1::3] for kind, rates in methods.RATES.items()})
    monkeypatch.setattr(methods, "bounds", lambda count: (0.1, 0.3))
    monkeypatch.setattr(methods, "REHEARSALS", 2)


# --- tasks ---


@pytest.mark.parametrize("name", tasks.CHANGES)
@pytest.mark.parametrize("count", [20, 100])
def test_no_picture_is_used_twice(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_pretrained", lambda examples, seed: ((), ()))
    even, test = tasks.make(name, 0, count, skewed=False)
    skewed, same_test = tasks.make(name, 0, count, skewed=True)
    other, _ = tasks.make(name, 1, count, skewed=False)

    def pictures(*parts: tasks.Examples) -> list[bytes]:
        return sorted(row.numpy().tobytes() for part in parts for row in part.images.reshape(-1, 64))

    everything = pictures(even.clients, even.validation, test)
    assert len(everything) == 800 + 200 + 397
    if name == "rotated":  # all of scikit-learn's digits differ; without some pixels a few do not
        assert len(set(everything)) == len(everything)
    assert pictures(skewed.clients) == pictures(even.clients) != pictures(other.clients)
    assert pictures(same_test) == pictures(test)
    assert even.clients.labels.shape == skewed.clients.labels.shape == (count, 800 // count)

    def share_of_the_most_common(task: tasks.Task) -> float:
        return float(np.mean([np.bincount(labels).max() / len(labels) for labels in task.clients.labels]))

    assert share_of_the_most_common(skewed) > 1.5 * share_of_the_most_common(even)


# --- methods ---


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "adapter", dict.fromkeys(method.adapter for method in methods.METHODS.values()), ids=str
)
def test_bounds_hold_without_clipping_only_where_they_are_said_to(adapter: methods.Adapter) -> None:
    task, _ = tasks.make("rotated", 0, 20, skewed=False)
    optimizer, rate = methods.RATES[adapter.kind][-1]
    bound = 0.02
    *_, (steps, updates) = methods.train(task, adapter, optimizer, 10 * rate, bound, 0)
    setting = methods.Setting(bound, optimizer, rate, steps)
    norms = torch.stack([torch.linalg.matrix_norm(methods.dense(update)) for update in updates])  # (2, N)
    over = norms > torch.tensor(task.radii(bound))[:, None] * (1 + 1e-6)
    found = methods.release(task, updates, setting, adapter, 4.0, 0)
    statuses = {client.status for client in found.clients}
    if adapter.inside:
        assert not over.any()
        assert statuses == {"accepted"}
    else:
        assert over.any(0).all()
        assert statuses == {"projected"}
    # clients differ, and all of them have learned something
    assert (torch.pdist(methods.dense(updates[0]).flatten(1)) > 0).all()


@pytest.mark.usefixtures("tiny")
def test_what_settings_are_chosen_by_is_what_is_released() -> None:
    task, _ = tasks.make("rotated", 0, 20, skewed=False)
    adapter = methods.METHODS[methods.LORA].adapter
    *_, (_, updates) = methods.train(task, adapter, "sgd", 1.0, math.inf, 0)
    mean = methods.clipped_mean(task, updates, 0.1)
    scales = methods.deviations(task, 0.1, 4.0)
    generator = np.random.default_rng(7)
    noise = [torch.from_numpy(generator.standard_normal(each.shape)) for each in mean]
    noisy = [each + scale * draw for each, scale, draw in zip(mean, scales, noise)]
    for rank, expected in methods.truncated(noisy, (None, 2)):
        setting = methods.Setting(0.1, "sgd", 1.0, 4, rank)
        found = methods.release(task, updates, setting, adapter, 4.0, 7)
        for update, matrix in zip(found.updates.values(), expected):
            torch.testing.assert_close(methods.dense(update), matrix, rtol=0, atol=1e-5, check_dtype=False)


@pytest.mark.usefixtures("tiny")
def test_test_data_choose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    make = tasks.make

    def spoiled(*args: Any) -> tuple[tasks.Task, tasks.Examples]:
        task, test = make(*args)
        return task, replace(test, labels=9 - test.labels)

    honest = privacy.measure(CELL, (4.0,), 0, privacy.QUICK, 2)
    monkeypatch.setattr(tasks, "make", spoiled)
    other = privacy.measure(CELL, (4.0,), 0, privacy.QUICK, 2)
    assert [row.method for row in honest] == [privacy.BASE, *privacy.QUICK]
    for mine, theirs in zip(honest, other, strict=True):
        assert (mine.setting, mine.validation) == (theirs.setting, theirs.validation)
        assert mine.accuracies != theirs.accuracies


@pytest.mark.usefixtures("tiny")
def test_draws_differ_and_can_be_repeated() -> None:
    first = privacy.measure(CELL, (1.0, 8.0), 0, [methods.CLIPPED, methods.OURS], 4)
    again = privacy.measure(CELL, (1.0, 8.0), 0, [methods.CLIPPED, methods.OURS], 4)
    assert [row.to_json() for row in first] == [row.to_json() for row in again]
    for row in first[1:]:
        assert len(row.accuracies) == 4
        assert len(set(row.accuracies)) > 1, row


def test_no_peer_chooses_from_fewer_settings() -> None:
    for count in (20, 100):
        ours = methods.METHODS[methods.OURS].settings(count)
        others = [name for name in methods.METHODS if name != methods.OURS_JOINT]  # another of ours
        peers = [methods.METHODS[name] for name in others if methods.METHODS[name].private]
        assert all(peer.settings(count) >= ours for peer in peers)


# --- report ---


def row(
    method: str, accuracy: float, seed: int = 0, block: report.Block = CELL, epsilon: float | None = 4.0
) -> report.Row:
    where = (block.task, block.clients, block.skewed)
    return report.Row(*where, epsilon, method, seed, 1, {}, 0.5, [accuracy - 0.01, accuracy + 0.01], 0)


def pair(block: report.Block, epsilon: float, margins: list[float]) -> list[report.Row]:
    return [
        each
        for seed, margin in enumerate(margins)
        for each in (
            row(methods.LORA, 0.8 + 0.01 * seed, seed, block, epsilon),
            row(methods.OURS, 0.8 + 0.01 * seed + margin, seed, block, epsilon),
        )
    ]


def test_a_table_has_means_errors_and_ties() -> None:
    rows = [
        *(row(privacy.BASE, 0.5, seed, epsilon=None) for seed in (0, 1)),
        *pair(CELL, 4.0, [0.02, 0.03]),
        *pair(CELL, 8.0, [0.0300, 0.0301]),
    ]
    lines = list(report.show(rows))
    assert "| method | IID, ε = 4 | IID, ε = 8 |" in lines
    assert f"| {privacy.BASE} | 50.0 ± 0.0 | 50.0 ± 0.0 |" in lines
    assert f"| {methods.LORA} | 80.5 ± 0.5 | 80.5 ± 0.5 |" in lines
    assert f"| *{methods.OURS} − {methods.LORA}* | +2.5 ± 0.5 (tie) | +3.0 ± 0.0 |" in lines
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1


def test_a_margin_is_paired_by_seed() -> None:
    rows = [*pair(CELL, 4.0, [0.02, 0.02]), row(methods.OURS, 0.1, seed=9)]
    found = report.margin(rows, CELL, 4.0, methods.OURS, methods.LORA)
    assert found is not None
    assert (found.mean, found.error, found.seeds) == (pytest.approx(2), pytest.approx(0, abs=1e-9), 2)
    assert not found.tie
    assert report.margin(rows, CELL, 8.0, methods.OURS, methods.LORA) is None


@pytest.mark.parametrize(
    ("iid", "skewed", "status"),
    [(0.021, 0.011, 0), (0.019, 0.011, 1), (0.021, 0.009, 1), (math.nan, 0.5, 1)],
)
def test_a_missed_gate_fails_the_run(
    iid: float,
    skewed: float,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(block: report.Block, epsilons: tuple[float, ...], seed: int, *_: Any) -> list[report.Row]:
        margin = skewed if block.skewed else iid
        return [replace(each, seed=seed) for each in pair(block, epsilons[0], [margin])]

    monkeypatch.setattr(privacy, "measure", measured)
    assert privacy.main(["--quick", "--seeds", "0", "1"]) == status
    assert ("not met" in capsys.readouterr().out) == bool(status)


# --- a whole run ---


@pytest.mark.usefixtures("tiny")
def test_a_run_writes_rows_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "privacy.json"
    order = [*QUICK, "--json", str(file), "--resume"]
    privacy.main([*order, "--blocks", str(CELL)])
    first = json.loads(file.read_text())
    assert {row["method"] for row in first["rows"]} == {privacy.BASE, *privacy.QUICK}
    assert [gate["gate"]["block"]["clients"] for gate in first["gates"]] == [20]
    for each in first["rows"]:
        assert len(each["accuracies"]) == (2 if each["epsilon"] else 1)
        assert all(0 <= value <= 1 for value in each["accuracies"])
    capsys.readouterr()
    status = privacy.main(order)
    both = json.loads(file.read_text())
    assert both["rows"][: len(first["rows"])] == first["rows"]  # nothing is measured twice
    assert len(both["rows"]) == 2 * len(first["rows"])
    assert status == (0 if all(gate["met"] for gate in both["gates"]) else 1)
    out, err = capsys.readouterr()
    assert f"| {methods.OURS} |" in out
    assert str(CELL) not in err


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--resume"], "--json"),
        (["--draws", "0"], "at least 1, got 0"),
        (["--quick", "--blocks", "rotated, N = 20 skewed"], "only, got rotated, N = 20 skewed"),
        (["--blocks", "rotated"], "invalid choice"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        privacy.main(arguments)
    assert rule in capsys.readouterr().err
