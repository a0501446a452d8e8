"""Matrix completion: NBMatrixCompletion against its peers on the same observed entries, one thread.

    python benchmarks/completion.py --quick             # T1 and T2, one seed, few settings: a minute
    python benchmarks/completion.py                     # every task, three seeds: hours
    python benchmarks/completion.py --tasks T3 --methods NB-LoRA cmfrec --seeds 0
    python benchmarks/completion.py --scale             # 10⁷ entries of 10⁵ × 10⁵, two threads

Every method chooses its setting on a tenth of the observed entries: the cheapest of those within 0.2 % of
the best. Then it is fitted to all of them, in a process of its own, `--repeats` times in turn with the
others. CPU seconds are the median of those fits, memory the largest growth of the resident set. A method
without figures has a row that says why. `--resume` keeps what is in the JSON file and measures the rest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import completion_tasks as tasks
from completion_methods import CMFREC, METHODS, OURS
from completion_report import Row, show, show_targets, targets
from completion_settings import QUICK, Setting
from completion_tasks import Task

RANKS = {"T1 rank 20", "T1 rank 50"}
UNSEEN = {"T1 unseen": 200, "T3 unseen": 1000}
TASKS = ("T1", "T2", "T3", *sorted(RANKS), *UNSEEN)
MAKE = {"T1": tasks.synthetic, "T2": tasks.picture, "T3": tasks.ratings, "scale": tasks.large}
SLACK = 1.002
"""Of the validation error: more rounds for less than this are not worth their time."""
LONG = 10.0
"""CPU seconds from which on one fit is enough."""


class Bench:
    """The methods on one task and seed; its data lies in `folder`, for the processes that fit."""

    def __init__(
        self, task: str, seed: int, options: argparse.Namespace, folder: Path, threads: int = 1
    ) -> None:
        self.task, self.seed, self.options, self.folder, self.threads = task, seed, options, folder, threads
        whole = MAKE[task.split()[0]](seed)
        parts: dict[str, Any] = {}
        self.kind = "final"
        if task in UNSEEN:
            self.kind = "unseen"
            split = tasks.unseen(whole, seed, UNSEEN[task])
            whole, parts = split.task, {"given": split.given, "rest": split.rest}
        self.observed = len(whole.observed)
        self._save("whole", whole, **parts)
        self._save("validation", whole.validation(seed))

    def _save(self, name: str, task: Task, **more: Any) -> None:
        tasks.save(self._file(name), task.shape, observed=task.observed, test=task.test, **more)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def grid(self, method: str) -> list[Setting]:
        """What the method may choose from; empty where it takes no part."""
        return (QUICK[method] if self.options.quick else METHODS[method].grids).get(self.task, [])

    def measure(self, methods: Iterable[str]) -> list[Row]:
        """Choose, then fit in turns."""
        rows: dict[str, Row] = {}
        for method in methods:
            if grid := self.grid(method):
                rows[method] = self._chosen(method, grid)
        fits: dict[str, list[dict[str, Any]]] = {name: [] for name, row in rows.items() if not row.reason}
        names = list(fits)
        for turn in range(self.options.repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
                row, done = rows[name], fits[name]
                if row.reason or (done and (done[0]["cpu_s"] > LONG or self.task in METHODS[name].slow)):
                    continue
                found = self._run(name, self.kind, "whole", [row.setting])
                if "error" in found:
                    row.reason = found["error"]
                else:
                    done.append(found)
        for name, done in fits.items():
            if not rows[name].reason:
                rows[name].figures = _combined(done)
        return list(rows.values())

    def _chosen(self, method: str, grid: list[Setting]) -> Row:
        row = Row(self.task, method, self.seed, settings=len(grid))
        if reason := METHODS[method].missing():
            row.reason = reason
        elif len(grid) == 1:
            row.setting = grid[0]
        else:
            tried = self._run(method, "tune", "validation", grid)
            if isinstance(tried, dict):
                row.reason = tried["error"]
                return row
            row.tuning_cpu_s = sum(figures["cpu_s"] for figures in tried)
            able = [figures for figures in tried if "rmse" in figures and figures["rmse"] == figures["rmse"]]
            if not able:
                row.reason = tried[0].get("error", "every setting diverged")
                return row
            best = min(figures["rmse"] for figures in able)
            good = [figures for figures in able if figures["rmse"] <= SLACK * best]
            row.setting = min(good, key=lambda figures: float(figures["cpu_s"]))["setting"]
        return row

    def _run(self, method: str, kind: str, data: str, settings: list[Setting]) -> Any:
        out = self.folder / "figures.json"
        out.unlink(missing_ok=True)
        job = {
            "method": method,
            "kind": kind,
            "data": str(self._file(data)),
            "settings": settings,
            "seed": self.seed,
            "threads": self.threads,
            "out": str(out),
        }
        limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
        try:
            done = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("completion_fit.py"))],
                input=json.dumps(job),
                env={**os.environ, **dict.fromkeys(limits, str(self.threads))},
                timeout=self.options.patience,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"more than {self.options.patience:.0f} s"}
        if done.returncode or not out.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"error": f"exit status {done.returncode}: {last}"}
        return json.loads(out.read_text())


def _combined(fits: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians of times, the largest memory; what is the same in all is taken from the first."""
    found = dict(fits[0])
    for name in found:
        if name.endswith("_s"):
            found[name] = statistics.median(fit[name] for fit in fits)
        elif name.endswith("_mb"):
            found[name] = max(fit[name] for fit in fits)
    return found


# ---------------------------------------------------------------------------------------------- main


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    names = ("numpy", "scipy", "torch", "cmfrec", "scikit-learn", "scikit-surprise")
    versions = {name: _version(name) for name in names}
    return {"python": platform.python_version(), **versions, "load_average": os.getloadavg()[0]}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="T1 and T2, one seed, few settings, one fit")
    parser.add_argument("--scale", action="store_true", help="10⁷ entries, two threads")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 2 if not given")
    parser.add_argument("--repeats", type=int, help="fits that are timed; 3 if not given")
    parser.add_argument("--patience", type=float, default=3600.0, help="seconds that one process may take")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in that file")
    return parser


def _checked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.quick and options.scale:
        parser.error("--quick and --scale exclude each other")
    if options.resume and not options.json:
        parser.error("--resume needs --json, the file to resume")
    if options.repeats is None:
        options.repeats = 1 if options.quick or options.scale else 3
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if not options.patience > 0:
        parser.error(f"--patience must be positive, got {options.patience}")
    if options.tasks is None:
        options.tasks = ("T1", "T2") if options.quick else TASKS
    elif options.scale:
        parser.error("--scale has a task of its own, so --tasks must not be given")
    if options.scale:
        options.tasks, options.methods = ("scale",), options.methods or [OURS, CMFREC]
    if options.quick and (others := [name for name in options.tasks if name not in ("T1", "T2")]):
        parser.error(f"--quick has T1 and T2 only, got {', '.join(others)}")
    options.methods = options.methods or list(METHODS)
    options.seeds = options.seeds or ([0] if options.quick or options.scale else [0, 1, 2])
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _checked(arguments)
    start = time.perf_counter()
    rows = []
    if options.resume and options.json.exists():
        rows = [Row(**row) for row in json.loads(options.json.read_text())["rows"]]
    for task in options.tasks:
        for seed in options.seeds:
            done = {row.method for row in rows if (row.task, row.seed) == (task, seed)}
            wanted = [name for name in options.methods if name not in done]
            slow = seed != options.seeds[0]
            wanted = [name for name in wanted if not (slow and task in METHODS[name].slow)]
            if not wanted:
                continue
            print(f"{task}, seed {seed}: {', '.join(wanted)}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="completion-") as folder:
                threads = 2 if options.scale else 1
                rows += Bench(task, seed, options, Path(folder), threads).measure(wanted)
            if options.json:  # after each: an interrupted run keeps what it has
                _write(options.json, options, rows)
    print("\n".join(show(rows, options.methods)))
    print("\n".join(show_targets(targets(rows))))
    print(f"\n{time.perf_counter() - start:.0f} s")


def _write(file: Path, options: argparse.Namespace, rows: Sequence[Row]) -> None:
    content = {
        "machine": machine(),
        "quick": options.quick,
        "rows": [row.to_json() for row in rows],
        "targets": [target.to_json() for target in targets(rows)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)


if __name__ == "__main__":
    main()
