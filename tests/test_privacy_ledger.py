"""The ledger of private releases: nothing over the budget, nothing forgotten, whatever dies when."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from nblora.privacy import (
    BudgetExceeded,
    PrivacyLedger,
    PrivateMean,
    compose_subsampled,
    gaussian_epsilon,
    gaussian_mu,
    private_mean,
)

DELTA = 1e-5
FIT = gaussian_mu(epsilon=4.0, delta=DELTA)  # the mu of the whole budget


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    return PrivacyLedger.create(tmp_path / "ledger.json", epsilon=4.0, delta=DELTA, adjacency="add-remove")


def spend(ledger: PrivacyLedger, mu: float = FIT / 4, **changes: Any) -> str:
    arguments: dict[str, Any] = {"adjacency": "add-remove", "secure": True, **changes}
    return ledger.spend(mu=mu, **arguments)


def merge(ledger: PrivacyLedger | str | Path, count: int = 2, **changes: Any) -> PrivateMean:
    arguments: dict[str, Any] = {
        "bounds": {"a": 1.0},
        "shapes": {"a": (2, 3)},
        "adjacency": "add-remove",
        "n_total": 2,
        "epsilon": 1.0,
        "delta": DELTA,
        "ledger": ledger,
        **changes,
    }
    return private_mean([{"a": torch.full((2, 3), 0.1)}] * count, **arguments)


# --- adding up ---


def test_total_is_that_of_the_composition(ledger: PrivacyLedger) -> None:
    assert ledger.spent().epsilon == ledger.spent().mu == ledger.spent().releases == 0
    for mu in (0.1, 0.2, 0.2):
        spend(ledger, mu)
    spent = ledger.spent()
    assert spent.mu == pytest.approx(0.3)
    assert spent.epsilon == pytest.approx(gaussian_epsilon(mu=0.3, delta=DELTA))
    assert (spent.delta, spent.releases, spent.secure) == (DELTA, 3, True)


def test_sampled_releases_are_added_up_as_sampled(ledger: PrivacyLedger) -> None:
    for _ in range(3):
        spend(ledger, 0.8, sampling_probability=0.1)
    spent = ledger.spent()
    assert spent.epsilon == compose_subsampled(
        [0.8] * 3, sampling_probability=0.1, delta=DELTA, adjacency="add-remove"
    )
    assert spent.epsilon < gaussian_epsilon(mu=spent.mu, delta=DELTA)


def test_a_release_of_the_whole_budget_fits_and_nothing_after_it(ledger: PrivacyLedger) -> None:
    merge(ledger, epsilon=4.0)
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetExceeded, match=r"must stay within 4\.0 at delta=1e-05, got 4\."):
        merge(ledger, epsilon=0.1)
    assert ledger.path.read_bytes() == before


def test_rounds_that_share_a_budget_fit_exactly(ledger: PrivacyLedger) -> None:
    for _ in range(9):
        merge(ledger, epsilon=None, mu=FIT / 3)
    with pytest.raises(BudgetExceeded):
        merge(ledger, epsilon=None, mu=FIT / 100)


@pytest.mark.parametrize("mu", [math.nan, math.inf, -1.0])
def test_nan_is_never_let_through(ledger: PrivacyLedger, mu: float) -> None:
    before = ledger.path.read_bytes()
    with pytest.raises(ValueError, match="mu must be"):
        spend(ledger, mu)
    with pytest.raises(ValueError, match="sampling_probability must be"):
        spend(ledger, sampling_probability=mu)
    with pytest.raises(ValueError, match="JSON"):
        spend(ledger, details={"tau": math.nan})
    assert ledger.path.read_bytes() == before


def test_a_total_that_is_nan_is_over_the_budget(
    ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nblora.privacy.ledger.compose_subsampled", lambda *_, **__: math.nan)
    with pytest.raises(BudgetExceeded):
        spend(ledger)


def test_the_other_adjacency_is_refused(ledger: PrivacyLedger) -> None:
    with pytest.raises(ValueError, match="adjacency must be the ledger's, 'add-remove', got 'replace-one'"):
        merge(ledger, adjacency="replace-one")
    assert ledger.spent().releases == 0


@pytest.mark.parametrize(
    "budget",
    [
        {"epsilon": math.nan},
        {"epsilon": 0.0},
        {"epsilon": math.inf},
        {"delta": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"adjacency": "x"},
    ],
)
def test_budgets_that_are_refused(tmp_path: Path, budget: dict[str, Any]) -> None:
    arguments = {"epsilon": 1.0, "delta": DELTA, "adjacency": "add-remove", **budget}
    with pytest.raises(ValueError, match="must be"):
        PrivacyLedger.create(tmp_path / "new.json", **arguments)
    assert not (tmp_path / "new.json").exists()


# --- what is written ---


def test_a_release_is_recorded(ledger: PrivacyLedger) -> None:
    result = merge(str(ledger.path))
    (entry,) = PrivacyLedger(ledger.path).releases
    assert entry.identifier == result.release
    assert entry.confirmed
    assert entry.secure
    assert entry.mu == result.mu
    assert entry.details["tau"] == result.tau
    content = json.loads(ledger.path.read_text())
    assert content["budget"] == {"epsilon": 4.0, "delta": DELTA, "adjacency": "add-remove"}
    assert (ledger.epsilon, ledger.delta, ledger.adjacency) == (4.0, DELTA, "add-remove")


def test_seeded_noise_is_marked(ledger: PrivacyLedger) -> None:
    merge(ledger)
    assert ledger.spent().secure
    with pytest.warns(UserWarning, match="seeded noise"):
        merge(ledger, rng=1)
    assert [entry.secure for entry in ledger.releases] == [True, False]
    assert not ledger.spent().secure


def test_nothing_in_it_depends_on_the_clients(tmp_path: Path) -> None:
    """Neighbours leave the same entry: it tells neither who came nor who was rejected."""
    entries = []
    for count in (0, 1, 2, 3):
        ledger = PrivacyLedger.create(
            tmp_path / f"{count}.json", epsilon=4.0, delta=DELTA, adjacency="add-remove"
        )
        merge(ledger, count)
        (entry,) = json.loads(ledger.path.read_text())["releases"]
        entries.append({name: entry[name] for name in entry if name not in ("identifier", "time")})
    assert all(entry == entries[0] for entry in entries)


def test_no_ledger_is_overwritten_or_taken_for_empty(ledger: PrivacyLedger, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="must be new"):
        PrivacyLedger.create(ledger.path, epsilon=9.0, delta=DELTA, adjacency="add-remove")
    with pytest.raises(FileNotFoundError):
        PrivacyLedger(tmp_path / "missing.json")
    with pytest.raises(FileNotFoundError):
        merge(tmp_path / "missing.json")


def test_a_link_is_the_same_ledger(ledger: PrivacyLedger, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(ledger.path)
    spend(PrivacyLedger(link))
    assert link.is_symlink()
    assert ledger.spent().releases == 1


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "nan": lambda text: text.replace('"mu": 0', '"mu": NaN, "old": 0'),
    "nan alone": lambda text: text.replace('"mu": 0.3', '"mu": NaN'),
    "negative": lambda text: text.replace('"mu": 0', '"mu": -0'),
    "text": lambda text: text.replace('"mu": 0.3', '"mu": "0.3"'),
    "infinite budget": lambda text: text.replace('"epsilon": 4.0', '"epsilon": 1e999'),
    "nan budget": lambda text: text.replace('"epsilon": 4.0', '"epsilon": NaN'),
    "no releases": lambda text: text.replace('"releases"', '"other"'),
    "format": lambda text: text.replace('"format": 1', '"format": 2'),
    "field": lambda text: text.replace('"time"', '"when"'),
    "list": lambda text: "[]",
    "secure": lambda text: text.replace('"secure": true', '"secure": "no"'),
}


@pytest.mark.parametrize("change", DAMAGES)
def test_a_damaged_ledger_is_refused(ledger: PrivacyLedger, change: str) -> None:
    spend(ledger, 0.3)
    whole = ledger.path.read_text()
    ledger.path.write_text(DAMAGES[change](whole))
    damaged = ledger.path.read_text()
    assert damaged != whole
    with pytest.raises(ValueError, match="must be whole and valid"):
        PrivacyLedger(ledger.path)
    with pytest.raises(ValueError, match="must be whole and valid"):
        spend(ledger)
    assert ledger.path.read_text() == damaged


def test_confirming_what_was_never_spent(ledger: PrivacyLedger) -> None:
    with pytest.raises(KeyError, match="identifier must be of a release"):
        ledger.confirm("x")


# --- the disk ---


def test_the_disk_has_it_before_it_counts(ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contents are forced to the disk, moved over the ledger, the move is forced too; then noise."""
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        steps.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "fsync file")
        fsync(handle)

    def noted_replace(source: Any, target: Any) -> None:
        assert Path(source).parent == Path(target).parent
        steps.append("replace")
        replace(source, target)

    def noted_noise(count: int) -> torch.Tensor:
        steps.append("noise")
        return torch.zeros(count)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr("nblora.privacy.release._normal_from_system", noted_noise)
    merge(ledger)
    written = ["fsync file", "replace", "fsync folder"]
    assert steps == [*written, "noise", *written]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_what_cannot_be_written_is_not_released(
    ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk full")

    drawn: list[int] = []
    monkeypatch.setattr(os, broken, fails)
    monkeypatch.setattr("nblora.privacy.release._normal_from_system", drawn.append)
    with pytest.raises(OSError, match="disk full"):
        merge(ledger)
    assert not drawn
    monkeypatch.undo()
    assert ledger.spent().releases == 0
    merge(ledger)  # and what was left behind is in nobody's way


KILLED = '''
"""Kill a release at every line of nblora.privacy in turn, and compare what got out with what is spent."""
import json, os, signal, sys
from pathlib import Path
import torch
from nblora.privacy import PrivacyLedger, private_mean, release

folder, honest = Path(sys.argv[1]), sys.argv[2] == "honest"
stride = 1 if honest else 10
torch.set_num_threads(1)
if not honest:  # the mistake that this is to find: the ledger is written when all is done
    spend, confirm = PrivacyLedger.spend, PrivacyLedger.confirm
    PrivacyLedger.spend = lambda self, **arguments: setattr(self, "later", arguments) or "x"
    PrivacyLedger.confirm = lambda self, identifier: spend(self, **self.later)

def one(path, line):
    """In a child: a release that is killed at its line-th line; noise that is drawn is told at once."""
    ledger = PrivacyLedger(path)
    draw = release._normal_from_system
    def told(count):
        noise = draw(count)
        os.write(told_to, b"n")
        return noise
    release._normal_from_system = told
    left = line
    def trace(frame, event, argument):
        nonlocal left
        if os.sep + "privacy" + os.sep not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    private_mean([{"a": torch.full((2, 3), 0.1)}], bounds={"a": 1.0}, shapes={"a": (2, 3)},
                 adjacency="add-remove", n_total=2, mu=0.1, delta=1e-5, ledger=ledger)
    sys.settrace(None)
    os._exit(0)

result = dict(killed=0, lost=0, unused=0, released=0, unreadable=0)
line = 0
path = folder / "ledger.json"
PrivacyLedger.create(path, epsilon=1000.0, delta=1e-5, adjacency="add-remove")
while True:
    line += stride
    before = len(PrivacyLedger(path).releases)
    told_from, told_to = os.pipe()
    child = os.fork()
    if not child:
        one(path, line)
    os.close(told_to)
    status = os.waitpid(child, 0)[1]
    drawn = len(os.read(told_from, 10))
    os.close(told_from)
    spent = len(PrivacyLedger(path).releases) - before
    result["lost"] += drawn > spent
    result["unused"] += spent > drawn
    result["released"] += drawn
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    result["killed"] += 1
    # short, so that reading it stays quick
    if before > 20:
        path.unlink()
        PrivacyLedger.create(path, epsilon=1000.0, delta=1e-5, adjacency="add-remove")
print(json.dumps(result))
'''


def killed_everywhere(folder: Path, order: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), order], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_killed_at_any_line_never_less_is_spent_than_released(tmp_path: Path) -> None:
    """SIGKILL at each line that a release executes: the ledger stays whole, unlocked, and never behind."""
    result = killed_everywhere(tmp_path, "honest")
    assert result["killed"] > 200
    assert result["lost"] == 0
    assert result["unused"] > 0  # killed between the two: spent, and lost
    assert result["released"] > 0


def test_killing_finds_a_ledger_that_is_written_afterwards(tmp_path: Path) -> None:
    """The test of the test above."""
    assert killed_everywhere(tmp_path, "late")["lost"] > 0


# --- at once ---


def _spend_often(path: Path, count: int) -> int:
    ledger, spent = PrivacyLedger(path), 0
    for _ in range(count):
        with suppress(BudgetExceeded):
            spend(ledger, FIT / 4)
            spent += 1
    return spent


def test_processes_do_not_overspend_together(ledger: PrivacyLedger) -> None:
    """Sixteen releases fit; two processes try to make forty."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        spent = sum(pool.starmap(_spend_often, [(ledger.path, 20)] * 2, chunksize=1))
    assert spent == len(ledger.releases) == 16
    assert ledger.spent().epsilon <= 4.0


def test_threads_do_not_overspend_together(ledger: PrivacyLedger) -> None:
    spent: list[int] = []
    threads = [threading.Thread(target=lambda: spent.append(_spend_often(ledger.path, 10))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(spent) == len(ledger.releases) == 16
