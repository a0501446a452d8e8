"""How `speed.py` measures: taking turns, paired ratios, bytes."""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function


class Broken(Exception):
    """A measurement that did not do what it is named after."""


class Unavailable(Exception):
    """Why a method cannot be measured, in one line."""


def nothing(*_: Any) -> None: ...


@dataclass(frozen=True)
class Action:
    """What is timed (`run`), with what goes before it and what checks its result and cleans up after it."""

    run: Callable[[], Any]
    before: Callable[[], Any] = nothing
    after: Callable[[Any], Any] = nothing


@dataclass(frozen=True)
class Quartiles:
    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Quartiles:
        if len(values) == 1:
            return Quartiles(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Quartiles(median, low, high)


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"[:300]


T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    reason: str


def attempt(function: Callable[[], T]) -> T | Failure:
    """The result, or why there is none: whatever a method fails of becomes its row, never its silence."""
    try:
        return function()
    except Exception as error:
        failure = Failure(reason(error))
    # what the error's frames held must not weigh on the others
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleaved(
    actions: Mapping[str, Action], *, rounds: int, warmup: int, device: str, patience: float = math.inf
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Let actions take turns, so that a disturbance meets all of them.

    Every round runs each action once. Every second one goes backwards, and starts one action later than
    the second last, so that none has the same place, nor the same one before it. An action that takes more
    than `patience` seconds has failed.

    Returns:
        Seconds of every round by name, without the first `warmup` rounds; and why an action failed, for
        those that did in any round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    failed: dict[str, str] = {}
    names = list(actions)
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there already need not be searched in every round
    try:
        for number in range(warmup + rounds):
            gc.collect()
            gc.disable()
            turn = number // 2 % len(names) if names else 0
            order = names[turn:] + names[:turn]
            for name in order[::-1] if number % 2 else order:
                if name in failed:
                    continue
                spent = attempt(functools.partial(_timed, actions[name], device))
                if isinstance(spent, Failure):
                    failed[name] = spent.reason
                elif spent > patience:
                    failed[name] = f"a round took {spent:.1f} s, more than the patience of {patience:g} s"
                elif number >= warmup:
                    seconds[name].append(spent)
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return {name: times for name, times in seconds.items() if name not in failed}, failed


def _timed(action: Action, device: str) -> float:
    action.before()
    synchronize(device)
    start = time.perf_counter()
    result = action.run()
    synchronize(device)
    spent = time.perf_counter() - start
    action.after(result)
    if not (math.isfinite(spent) and spent > 0):
        raise Broken(f"the time must be positive, got {spent}")
    return spent


def paired(times: Sequence[float], reference: Sequence[float]) -> Quartiles:
    """The ratio to a reference in the same round, over the rounds."""
    return Quartiles.of([a / b for a, b in zip(times, reference, strict=True)])


def require_finite(value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise Broken("the result must be finite, got NaN or infinity")


# -------------------------------------------------------------------------------------------- bytes


class _Holder:
    """In a saved tensor's place: it dies with the graph's node."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Tensor], resident: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between a forward and its backward pass.

    Each storage counts once, however many nodes or views keep it; those of resident tensors (parameters
    and buffers) do not count. What a custom function keeps elsewhere is not seen: `held_bytes` sees it.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in resident}
    holders: weakref.WeakSet[_Holder] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Holder:
        holder = _Holder(tensor)
        holders.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = forward()
    storages = {s.data_ptr(): s.nbytes() for s in (h.tensor.untyped_storage() for h in holders)}
    kept = sum(size for address, size in storages.items() if address not in known)
    loss.backward()
    return kept


@dataclass(frozen=True)
class Held:
    """Bytes beyond those that were allocated before, parameters and buffers.

    Attributes:
        after_forward: between the forward and the backward pass, the loss apart.
        peak: at most until the end of the backward pass.
    """

    after_forward: int
    peak: int


_START, _MIDDLE = "benchmark: forward starts", "benchmark: forward is done"


def held_bytes(forward: Callable[[], Tensor], backward: Callable[[Tensor], Any], device: str) -> Held:
    """What a forward and backward pass allocate, as the allocator counts it: whatever keeps it.

    Of a model that has not run before: what an earlier step left behind would be there already, and not
    count, however long the model keeps it.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        loss = forward()
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated() - start
        backward(loss)
        torch.cuda.synchronize()
        return Held(after, torch.cuda.max_memory_allocated() - start)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiled:
        with record_function(_START):
            pass
        loss = forward()
        with record_function(_MIDDLE):
            pass
        backward(loss)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    level = start = highest = 0
    seen = []
    for event in events:
        if event.name() == _START:
            start = highest = level
            seen.append(_START)
        elif event.name() == _MIDDLE:
            after = level - start
            seen.append(_MIDDLE)
        elif event.name() == "[memory]":
            level += event.nbytes()
            highest = max(highest, level)
    if seen != [_START, _MIDDLE]:
        raise Broken(f"the profiler must report both marks in order, got {seen}")
    return Held(after, highest - start)


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# ----------------------------------------------------------------------------------------- ceilings


def ceilings(device: str, dtype: torch.dtype, rounds: int = 10) -> dict[str, float]:
    """What the device does at best: FLOP/s of a square matrix product, bytes/s read and written by a copy."""
    n = 8192 if device.startswith("cuda") else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    source = torch.zeros((2**30 if device.startswith("cuda") else 2**28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    actions = {"matmul": Action(lambda: torch.mm(a, b)), "copy": Action(lambda: target.copy_(source))}
    seconds, failed = interleaved(actions, rounds=rounds, warmup=3, device=device)
    if failed:
        raise Broken(f"the ceilings must be measurable, got {failed}")
    return {
        "matmul_flops_per_second": 2 * n**3 / statistics.median(seconds["matmul"]),
        "copy_bytes_per_second": 2 * source.numel() / statistics.median(seconds["copy"]),
    }
