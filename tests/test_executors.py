"""Executors: every job gives a record, whatever happens to the process that does it, and none is left behind.

Real processes do pretended jobs: `serve` starts the real worker loop with `execute` of this module, which
spares each process seconds of imports (torch's too).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nblora import executors
from nblora.executors import LocalExecutor, RayExecutor

_real_serve = executors._serve


# --- what happens in the workers ---


def execute(job: dict[str, Any]) -> dict[str, Any]:
    do = job["do"]
    record = {"name": job["name"], "pid": os.getpid(), "status": "done"}
    if do == "exit":
        os._exit(3)
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "raise":
        raise SystemExit("whatever")
    if do == "wait":
        Path(job["started"]).touch()
        while not Path(job["until"]).exists():
            time.sleep(0.01)
    if do == "leave":  # the process ends on its own, a little later
        threading.Timer(0.2, os._exit, [0]).start()
    if do == "large":
        record["data"] = "x" * 2**21
    if do == "children":
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
        child.start()
        child.join()
        record["data"] = child.exitcode
    if do == "look":
        import torch

        record["data"] = {
            "threads": torch.threads,
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "temporary": tempfile.gettempdir(),
            "child's": os.environ["TMPDIR"],
            "start": multiprocessing.get_start_method(),
        }
    return record


class PretendedTorch(types.ModuleType):
    threads = 0

    def set_num_threads(self, threads: int) -> None:
        self.threads = threads


def serve(*arguments: Any) -> None:
    pretended = types.ModuleType("nblora.comparison")
    pretended.execute = execute  # type: ignore[attr-defined]
    sys.modules["nblora.comparison"] = pretended
    sys.modules["nblora.training"] = types.ModuleType("nblora.training")
    sys.modules["torch"] = PretendedTorch("torch")
    _real_serve(*arguments)


def serve_not(*arguments: Any) -> None:
    sys.exit(7)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_serve", serve)


def job(name: str, do: str = "nothing", **more: Any) -> dict[str, Any]:
    return {"name": name, "do": do, "setting": {"method": name}, **more}


def waiting(name: str, folder: Path) -> dict[str, Any]:
    return job(name, "wait", started=str(folder / f"{name}-started"), until=str(folder / f"{name}-until"))


def alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def soon(condition: Callable[[], bool], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# --- processes on this machine ---


@pytest.mark.usefixtures("pretended")
def test_dying_processes_cost_their_jobs_and_records_come_when_they_are_done(tmp_path: Path) -> None:
    """The first job ends only after the consumer has had the records of all others."""
    doings = ["nothing", "exit", "nothing", "kill", "large", "raise", "children", "nothing"]
    jobs = [waiting("slow", tmp_path), *(job(f"{do}-{i}", do) for i, do in enumerate(doings))]
    records = []
    for record in LocalExecutor(2, 1).run(jobs):
        records.append(record)
        if len(records) == len(doings):
            (tmp_path / "slow-until").touch()
    assert records[-1]["name"] == "slow"
    lost = {record["method"]: record for record in records if record["status"] == "failed"}
    assert {name: record["error"] for name, record in lost.items()} == {
        "exit-1": "its process ended with status 3",
        "kill-3": "its process was killed by SIGKILL, perhaps for lack of memory",
        "raise-5": "its process ended with status 1",
    }
    assert all(record["job"]["do"] == name.partition("-")[0] for name, record in lost.items())
    done = {record["name"]: record for record in records if record["status"] == "done"}
    assert sorted(done) == ["children-6", "large-4", "nothing-0", "nothing-2", "nothing-7", "slow"]
    assert len(done["large-4"]["data"]) == 2**21
    assert done["children-6"]["data"] == 0, "a run may start processes that load data"
    assert done["nothing-2"]["pid"] != done["nothing-0"]["pid"], "a new process after one has died"
    assert done["nothing-7"]["pid"] == done["children-6"]["pid"], "but the same one after another job"
    assert not any(alive(record["pid"]) for record in done.values())


@pytest.mark.usefixtures("pretended")
def test_a_consumer_that_stops_early_leaves_nothing_behind(tmp_path: Path) -> None:
    executor = LocalExecutor(2, 1)
    executor.gpus = ["GPU-a", "7"]
    executor.threads = 3
    records = executor.run([waiting("slow", tmp_path), job("look", "look"), job("never"), job("never")])
    first = next(records)
    assert first["name"] == "look"
    assert soon((tmp_path / "slow-started").exists)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    found = first["data"]
    assert found["threads"] == 3
    assert found["gpu"] in ("GPU-a", "7")
    assert found["temporary"] == found["child's"] != tempfile.gettempdir()
    assert Path(found["temporary"]).is_dir()
    assert found["start"] == multiprocessing.get_context().get_start_method(), "of processes that load data"
    started = time.monotonic()
    records.close()
    assert time.monotonic() - started < 30
    assert multiprocessing.active_children() == []
    assert not any(alive(worker.pid) for worker in workers)
    assert not Path(found["temporary"]).exists()


@pytest.mark.usefixtures("pretended")
def test_a_process_that_dies_between_jobs_costs_none() -> None:
    records = LocalExecutor(1, 1).run([job("first", "leave"), job("second"), job("third")])
    first = next(records)
    assert soon(lambda: not alive(first["pid"]))
    rest = list(records)
    assert [record["name"] for record in [first, *rest]] == ["first", "second", "third"]
    assert rest[0]["pid"] == rest[1]["pid"] != first["pid"]


def test_processes_that_do_not_start_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_serve", serve_not)
    with pytest.raises(ChildProcessError, match="must be able to start") as caught:
        list(LocalExecutor(3, 1).run([job(str(i)) for i in range(5)]))
    assert str(caught.value) == (
        "worker processes must be able to start, the last of 3 ended with status 7; "
        "a script must run under if __name__ == '__main__'"
    )
    assert multiprocessing.active_children() == []


def test_without_jobs_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalExecutor, "_start", None)
    assert list(LocalExecutor(2, 1).run([])) == []


def test_no_more_processes_than_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(self: LocalExecutor, slot: int, folder: str) -> Any:
        started.append(slot)
        raise OSError("no memory to start a process")

    monkeypatch.setattr(LocalExecutor, "_start", start)
    with pytest.raises(OSError, match="no memory"):
        list(LocalExecutor(8, 1).run([job("one")]))
    assert started == [0]

    class Started:
        started, job = False, None

    workers: dict[int, Any] = {}
    monkeypatch.setattr(LocalExecutor, "_start", lambda *arguments: Started())
    LocalExecutor(8, 1)._employ(workers, [job(str(i)) for i in range(3)], "folder")
    assert sorted(workers) == [0, 1, 2]
    LocalExecutor(8, 1)._employ(workers, [job(str(i)) for i in range(3)], "folder")
    assert sorted(workers) == [0, 1, 2], "those that are about to be ready count"


MAIN = """
import pathlib, sys
from nblora import executors
import test_executors as t
executors._serve, executors._gpus = t.serve, list
folder = pathlib.Path(sys.argv[1])
for record in executors.LocalExecutor(2, 1).run([t.waiting("a", folder), t.waiting("b", folder)]):
    print(record)
"""


@pytest.fixture
def main_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program with two workers that are at jobs that do not end."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(tmp_path)},
    )
    try:
        assert soon(lambda: (tmp_path / "a-started").exists() and (tmp_path / "b-started").exists())
        yield process
    finally:
        (tmp_path / "a-until").touch()
        (tmp_path / "b-until").touch()
        process.kill()
        process.communicate()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts processes in /proc")
def test_ctrl_c_ends_everything_quietly(main_process: subprocess.Popen[str], tmp_path: Path) -> None:
    workers = children(main_process.pid)
    assert len(workers) >= 2
    os.killpg(main_process.pid, signal.SIGINT)  # a terminal sends it to all of them
    out, err = main_process.communicate(timeout=300)
    assert main_process.returncode == -signal.SIGINT
    assert out == ""
    assert err.count("Traceback") == 1, "the program's own, and none of its workers"
    assert soon(lambda: not any(map(alive, workers)), 120)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts processes in /proc")
def test_workers_end_when_the_program_is_killed(main_process: subprocess.Popen[str]) -> None:
    workers = children(main_process.pid)
    assert len(workers) >= 2
    main_process.kill()
    assert soon(lambda: not any(map(alive, workers)), 120)


def test_starting_processes_leaves_ctrl_c_as_it_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    with executors._no_interrupts():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is before
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with executors._no_interrupts():
                assert signal.getsignal(signal.SIGINT) is before
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert errors == [], "only the main thread may change it"


@pytest.mark.parametrize(("name"), ["workers", "threads"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_numbers_of_workers_and_threads_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got {value!r}"):
        LocalExecutor(**{name: value})


@pytest.mark.parametrize(
    ("cores", "gpus", "given", "workers", "threads"),
    [
        (8, 0, {}, 4, 2),
        (1, 0, {}, 1, 1),
        (3, 0, {}, 1, 3),
        (8, 2, {}, 2, 4),
        (8, 2, {"workers": 4}, 4, 2),
        (8, 0, {"workers": 3}, 3, 2),
        (2, 0, {"workers": 5}, 5, 1),
        (8, 0, {"threads": 5}, 4, 5),
    ],
)
def test_cores_and_gpus_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, given: dict[str, int], workers: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(executors, "_gpus", lambda: [str(i) for i in range(gpus)])
    executor = LocalExecutor(**given)
    assert (executor.workers, executor.threads) == (workers, threads)


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [
        (None, 0, []),
        (None, 2, ["0", "1"]),
        ("", 0, []),
        ("2,5", 2, ["2", "5"]),
        (" 3 , 1", 2, ["3", "1"]),
        ("GPU-8932f937,MIG-1/2", 2, ["GPU-8932f937", "MIG-1/2"]),
        ("0,1,99", 2, ["0", "1"]),
    ],
)
def test_gpus_go_by_the_names_that_this_process_was_given(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, names: list[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert LocalExecutor().gpus == names


# --- Ray ---


def test_missing_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"^a comparison on Ray needs ray: pip install 'nblora\[ray\]'$"):
        RayExecutor("auto")


@pytest.mark.parametrize(
    ("given", "clue"),
    [
        ({"threads": 0}, "threads must be an integer >= 1, got 0"),
        ({"threads": 1.5}, "threads must be an integer >= 1, got 1.5"),
        ({"gpus": -1}, "gpus must be a number >= 0, got -1"),
        ({"gpus": float("nan")}, "gpus must be a number >= 0, got nan"),
        ({"gpus": "1"}, "gpus must be a number >= 0, got '1'"),
    ],
)
def test_rays_resources_are_checked_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], clue: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=clue):
        RayExecutor(**given)


class PretendedRay(types.ModuleType):
    """As much of Ray's interface as the executor uses; tasks are done when asked for, the last one first."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.initialised: dict[str, Any] = {}
        self.options_given: dict[str, Any] = {}
        self.cancelled: list[Any] = []
        self.nowhere = False

        class RayError(Exception):
            pass

        self.exceptions = types.SimpleNamespace(RayError=RayError)

    def init(self, **options: Any) -> None:
        if options["address"] == "auto" and self.nowhere:
            raise ConnectionError("Could not find any\nrunning Ray instance")
        self.initialised = options

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(**given: Any) -> Any:
            self.options_given = given
            return types.SimpleNamespace(remote=lambda *arguments: _Reference(function, arguments))

        return types.SimpleNamespace(options=options)

    def wait(self, references: list[Any]) -> tuple[list[Any], list[Any]]:
        return references[-1:], references[:-1]

    def get(self, reference: Any) -> Any:
        try:
            return reference.function(*reference.arguments)
        except ArithmeticError as error:
            raise self.exceptions.RayError(f"traceback:\n  somewhere\n{error}") from error

    def cancel(self, reference: Any, force: bool) -> None:
        assert force
        self.cancelled.append(reference.arguments[0]["name"])


class _Reference:
    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments


def pretended_task(job: dict[str, Any], threads: int) -> dict[str, Any]:
    if job["do"] == "die":
        raise ArithmeticError("the worker died")
    return {"name": job["name"], "threads": threads}


@pytest.fixture
def pretended_ray(monkeypatch: pytest.MonkeyPatch) -> PretendedRay:
    ray = PretendedRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(executors, "_execute_with_threads", pretended_task)
    return ray


def test_ray_gets_jobs_with_their_resources_and_loses_one(pretended_ray: PretendedRay) -> None:
    executor = RayExecutor(threads=3, gpus=0.5)
    assert pretended_ray.initialised["address"] == "auto"
    records = list(executor.run([job("first"), job("second", "die"), job("third")]))
    assert pretended_ray.options_given == {"num_cpus": 3, "num_gpus": 0.5, "max_retries": 0}
    assert records[0] == {"name": "third", "threads": 3}, "in the order in which they are done"
    assert (records[1]["status"], records[1]["method"]) == ("failed", "second")
    assert records[1]["error"] == "Ray lost it: the worker died"
    assert records[2] == {"name": "first", "threads": 3}
    assert pretended_ray.cancelled == []


def test_a_consumer_that_stops_early_cancels_what_ray_has(pretended_ray: PretendedRay) -> None:
    records = RayExecutor().run([job("first"), job("second"), job("third")])
    next(records)
    records.close()
    assert pretended_ray.cancelled == ["first", "second"]


def test_a_cluster_that_is_not_there_is_one_line(pretended_ray: PretendedRay) -> None:
    pretended_ray.nowhere = True
    with pytest.raises(ConnectionError) as caught:
        RayExecutor()
    assert str(caught.value) == (
        "the Ray cluster must be reachable, got 'auto': Could not find any running Ray instance"
    )


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_at_which_nothing_listens_is_refused_at_once(
    pretended_ray: PretendedRay, scheme: str
) -> None:
    """Ray itself tries for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        RayExecutor(address)
        assert pretended_ray.initialised["address"] == address
    pretended_ray.initialised = {}
    with pytest.raises(ConnectionError, match=f"must be reachable, got '{address}': .*refused"):
        RayExecutor(address)
    assert pretended_ray.initialised == {}


def real_task(job: dict[str, Any], threads: int) -> dict[str, Any]:
    import torch

    from nblora.comparison import execute

    if job["do"] == "exit":
        os._exit(1)
    torch.set_num_threads(threads)
    return {**execute(job), "threads": torch.get_num_threads()}


@pytest.mark.slow
def test_a_real_ray_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two jobs run (and fail as data points, for want of a model), one takes its process with it."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr(executors, "_execute_with_threads", real_task)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    shared = {"model": str(tmp_path / "nowhere"), "task": "seq-cls", "data": str(tmp_path), "keep": None}
    shared |= dict.fromkeys(["max_length", "max_train_samples", "max_eval_samples"])
    shared |= {"train": {}, "load": {}, "columns": {}, "keep_columns": {}, "data_seed": 0, "options": {}}
    setting = {"learning_rate": 0.1, "rank": 2, "epochs": 1, "bound": None, "seed": 0}
    jobs = [
        {**shared, "do": do, "setting": {**setting, "method": f"lora-{i}"}, "options": {"method": "lora"}}
        for i, do in enumerate(["run", "exit", "run"])
    ]
    try:
        executor = RayExecutor("local", threads=1)
        records = {record["method"]: record for record in executor.run(jobs)}
    finally:
        ray.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert sorted(records) == ["lora-0", "lora-1", "lora-2"]
    assert records["lora-1"]["error"].startswith("Ray lost it: ")
    for name in ("lora-0", "lora-2"):
        assert records[name]["status"] == "failed"
        assert "nowhere" in records[name]["error"] or str(tmp_path) in records[name]["error"]
        assert records[name]["threads"] == 1
