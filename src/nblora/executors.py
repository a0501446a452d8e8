"""Where the runs of a comparison are done: processes on this machine, or a Ray cluster."""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

Job = Mapping[str, Any]
Record = dict[str, Any]


class Executor(Protocol):
    """Does jobs in any order."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Record]:
        """The record of each job, as soon as it is there."""
        ...


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    started: bool = False
    job: Job | None = None

    def message(self) -> Any:
        """What the process has sent, or None if it has ended instead."""
        try:
            # a process of its own may hold the connection open when it has ended
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, OSError):
            pass
        self.process.join()
        return None

    def end(self) -> str:
        """How the process ended."""
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"ended with status {code}"
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        return f"was killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")


class LocalExecutor:
    """Processes on this machine, each of which does one job after another.

    A process that dies (killed for memory, say) costs the job that it was at, which counts as failed.
    Processes start anew, so a script must call what runs jobs under `if __name__ == "__main__"`.

    Args:
        workers: number of processes; without it one for each GPU, or half as many as there are cores.
        threads: of each process; without it the cores are shared out.
    """

    _STARTS = 3  # processes in a row that may die before they are ready for a job

    def __init__(self, workers: int | None = None, threads: int | None = None) -> None:
        for name, value in (("workers", workers), ("threads", threads)):
            if value is not None:
                _check_count(name, value)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.gpus = _gpus()
        self.workers = workers or len(self.gpus) or max(1, cores // 2)
        self.threads = threads or max(1, cores // self.workers)

    def run(self, jobs: Sequence[Job]) -> Iterator[Record]:
        """The record of each job, as soon as it is there; processes end with the iterator.

        Raises:
            ChildProcessError: if processes do not start.
        """
        waiting = list(reversed(jobs))
        workers: dict[int, _Worker] = {}

        # what runs leave behind when they are ended in their midst lies in this folder
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            stop = functools.partial(_stop, workers)
            atexit.register(stop)  # for an iterator that nobody closes
            try:
                failed_starts = 0
                while waiting or any(worker.job is not None for worker in workers.values()):
                    self._employ(workers, waiting, folder)
                    for slot in _heard(workers):
                        worker = workers[slot]
                        message = worker.message()
                        if message == _READY:
                            worker.started, failed_starts = True, 0
                        elif message is not None:
                            worker.job = None
                            yield message
                        else:
                            del workers[slot]
                            failed_starts += not worker.started
                            if failed_starts == self._STARTS:
                                raise ChildProcessError(
                                    f"worker processes must be able to start, the last of {failed_starts} "
                                    f"{worker.end()}; a script must run under if __name__ == '__main__'"
                                )
                            if worker.job is not None:
                                yield died(worker.job, f"its process {worker.end()}")
            finally:
                stop()
                atexit.unregister(stop)

    def _employ(self, workers: dict[int, _Worker], waiting: list[Job], folder: str) -> None:
        """Start processes where they are lacking, and give the next job to each that has none."""
        starting = sum(not worker.started for worker in workers.values())
        for slot in range(self.workers):
            if slot in workers:
                worker = workers[slot]
                if worker.started and worker.job is None and waiting:
                    with suppress(OSError):  # it has just died, which is heard next
                        worker.connection.send(waiting[-1])
                        worker.job = waiting.pop()
            elif starting < len(waiting):
                starting += 1
                workers[slot] = self._start(slot, folder)

    def _start(self, slot: int, folder: str) -> _Worker:
        here, there = multiprocessing.Pipe()
        gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
        # not daemonic, because a run may have processes of its own that load data
        process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(there, self.threads, gpu, folder), name=f"nblora-worker-{slot}"
        )
        with _no_interrupts():
            process.start()
        there.close()
        return _Worker(process, here)


_READY = "ready"


def _heard(workers: Mapping[int, _Worker]) -> list[int]:
    """Slots of processes that have sent something or have ended, after waiting for the first one."""
    sources: dict[Any, int] = {worker.connection: slot for slot, worker in workers.items()}
    sources |= {worker.process.sentinel: slot for slot, worker in workers.items()}
    return sorted({sources[source] for source in wait(list(sources))})


def _stop(workers: dict[int, _Worker]) -> None:
    for worker in workers.values():
        worker.process.terminate()
    while workers:
        _, worker = workers.popitem()
        worker.process.join(5)
        worker.process.kill()
        worker.process.join()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes that start here ignore Ctrl-C, which is for the process that the user started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _serve(connection: Connection, threads: int, gpu: str | None, folder: str) -> None:
    """Do jobs until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # processes that load data start as they would in a program of the user's, not as this one did
    multiprocessing.set_start_method(None, force=True)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    import torch

    import nblora.training  # noqa: F401
    from nblora.comparison import execute

    torch.set_num_threads(threads)
    # the libraries stay: walking them in every garbage collection took a fifth of a small model's run
    gc.collect()
    gc.freeze()
    connection.send(_READY)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(execute(job))


def _end_with_parent() -> None:
    """A process whose parent was killed must not go on for hours."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class RayExecutor:
    """An existing Ray cluster, on whose nodes nblora is installed and the model and data have the same paths.

    Args:
        address: of the cluster, as `ray.init` takes it, or "local" for one on this machine.
        threads: cores that a run uses.
        gpus: that a run uses, may be a fraction.
    """

    def __init__(self, address: str = "auto", threads: int = 1, gpus: float = 0.0) -> None:
        _check_count("threads", threads)
        if isinstance(gpus, bool) or not isinstance(gpus, (int, float)) or not 0 <= gpus < math.inf:
            raise ValueError(f"gpus must be a number >= 0, got {gpus!r}")
        try:
            import ray
        except ImportError as error:
            raise ImportError("a comparison on Ray needs ray: pip install 'nblora[ray]'") from error
        self._ray = ray
        self._resources = {"num_cpus": threads, "num_gpus": gpus, "max_retries": 0}
        self._threads = threads
        try:
            _check_reachable(address)
            ray.init(
                address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR
            )
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ConnectionError(f"the Ray cluster must be reachable, got {address!r}: {reason}") from error

    def run(self, jobs: Sequence[Job]) -> Iterator[Record]:
        """The record of each job, as soon as it is there; runs end with the iterator."""
        remote = self._ray.remote(_execute_with_threads).options(**self._resources)
        pending = {remote.remote(dict(job), self._threads): job for job in jobs}
        try:
            while pending:
                ready, _ = self._ray.wait(list(pending))
                for reference in ready:
                    job = pending.pop(reference)
                    try:
                        record = self._ray.get(reference)
                    except self._ray.exceptions.RayError as error:
                        # the last line says what it was, those before it where
                        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
                        record = died(job, f"Ray lost it: {reason}")
                    yield record
        finally:
            for reference in pending:
                self._ray.cancel(reference, force=True)


def _check_reachable(address: str) -> None:
    """Raise an OSError where nothing listens, of which Ray itself is sure only after minutes."""
    place = re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address)
    if place:
        socket.create_connection((place[1], int(place[2])), timeout=10).close()


def _execute_with_threads(job: Job, threads: int) -> Record:
    import torch

    from nblora.comparison import execute

    torch.set_num_threads(threads)
    return execute(job)


def died(job: Job, reason: str) -> Record:
    """The record of a job whose process did not live to write one."""
    from nblora.comparison import failed

    return failed(job, reason)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    count = torch.cuda.device_count()
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return visible if len(visible) == count and all(visible) else [str(index) for index in range(count)]
