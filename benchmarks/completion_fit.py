"""One method on one task in a process of its own, so that no memory and no threads leak to another.

Reads a job as JSON from the standard input and writes the figures to the file that it names. `completion.py`
starts it, with the number of threads in the environment.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from completion_methods import METHODS, Method, Values
from completion_tasks import Entries, Task, load, synthetic

Figures = dict[str, Any]


def rmse(predicted: Values, entries: Entries) -> float:
    return float(np.sqrt(np.mean(np.square(predicted - entries.values, dtype=np.float64))))


def tune(method: Method, task: Task, settings: list[dict[str, Any]], seed: int) -> list[Figures]:
    """Every setting once; one that fails is worth nothing, and says why."""
    data = method.prepare(task)
    found = []
    for setting in settings:
        start = time.process_time()
        try:
            model = method.fit(data, setting, seed)
            figures: Figures = {"cpu_s": time.process_time() - start}
            figures["rmse"] = rmse(model.predict(task.test.rows, task.test.cols), task.test)
        except Exception as error:  # a peer's, of any kind
            figures = {"cpu_s": time.process_time() - start, "error": f"{type(error).__name__}: {error}"}
        found.append({"setting": setting, **figures})
    return found


def final(method: Method, task: Task, setting: dict[str, Any], seed: int) -> tuple[Figures, Any]:
    """The fit that counts: CPU seconds, wall seconds and growth of the resident set."""
    # what a library sets up at its first call is not the fit's
    tiny = synthetic(0, (120, 100), 2, 0.5)
    method.fit(method.prepare(tiny), setting, seed)
    data = method.prepare(task)
    before = _settled()
    wall, cpu = time.perf_counter(), time.process_time()
    model = method.fit(data, setting, seed)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = _peak()
    figures: Figures = {
        "cpu_s": cpu,
        "wall_s": wall,
        "memory_mb": (peak - before) / 2**20,
        "peak_mb": peak / 2**20,
        "rmse": rmse(model.predict(task.test.rows, task.test.cols), task.test),
    }
    for name in ("rank_", "bound_", "n_iter_"):
        if hasattr(model, name):
            figures[name.strip("_")] = float(getattr(model, name))
    return figures, model


def _settled() -> int:
    """The resident set in bytes, free pages given back and the record of the peak begun anew."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return _peak()  # then growth counts from the old peak on
        return _status("VmRSS")
    return _peak()


def _peak() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"the system must report {name}")


def run(job: dict[str, Any]) -> Any:
    method = METHODS[job["method"]]
    if reason := method.missing():
        return {"error": reason}
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(job["threads"])
    shape, parts = load(Path(job["data"]))
    task = Task(shape, parts["observed"], parts["test"])
    if job["kind"] == "tune":
        return tune(method, task, job["settings"], job["seed"])
    figures, model = final(method, task, job["settings"][0], job["seed"])
    if job["kind"] == "unseen":
        given, rest = parts["given"], parts["rest"]
        if method.fold_in is None:
            return {"error": "cannot fold in rows"}
        count = int(max(given.rows.max(), rest.rows.max())) + 1
        start = time.process_time()
        predicted = method.fold_in(model, given, (count, shape[1]), rest.rows, rest.cols)
        figures |= {"fold_in_cpu_s": time.process_time() - start, "unseen_rmse": rmse(predicted, rest)}
    return figures


if __name__ == "__main__":
    order = json.loads(sys.stdin.read())
    Path(order["out"]).write_text(json.dumps(run(order)))
