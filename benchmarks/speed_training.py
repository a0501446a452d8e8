"""What `speed.py` measures of training: one row for every method, a figure or why there is none."""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from speed_bench import Bench, Row
from speed_figures import (
    Action,
    Broken,
    Failure,
    Quartiles,
    attempt,
    held_bytes,
    paired,
    require_finite,
    resident_bytes,
    saved_bytes,
)
from speed_models import (
    FROZEN,
    JOINT,
    REFERENCE,
    SVD,
    adapt,
    loss_of,
    trainable,
    trainable_count,
)
from torch import Tensor, nn

from nblora.tuner import nblora_layers

# ----------------------------------------------------------------------------------------- training


def _compiled(call: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """A function compiled apart from those of other methods, which would otherwise share its cache."""
    own = types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, call.__defaults__)
    compiled: Callable[[nn.Module, Tensor], Tensor] = torch.compile(own)
    return compiled


def _compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _probe(model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], inputs: Tensor) -> dict[str, Any]:
    """A first backward pass, which must reach every trainable parameter; and what compiling it took."""
    counters = torch._dynamo.utils.counters
    breaks, graphs, start = sum(counters["graph_break"].values()), _compilations(), time.perf_counter()
    loss = call(model, inputs)
    loss.backward()
    spent = time.perf_counter() - start
    require_finite(loss)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.isfinite().all())):
            raise Broken(f"every trainable parameter must get a finite gradient, {name} did not")
        parameter.grad = None
    if _compilations() == graphs:
        return {}
    return {
        "compile_seconds": spent,
        "graphs": _compilations() - graphs,
        "graph_breaks": sum(counters["graph_break"].values()) - breaks,
    }


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    call: Callable[[nn.Module, Tensor], Tensor],
    inputs: Tensor,
    accumulation: int,
) -> Tensor:
    for _ in range(accumulation):
        loss = call(model, inputs) / accumulation
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _train(bench: Bench) -> list[Row]:
    """Forward and backward passes and AdamW of the trainable parameters."""
    models, missing = bench.built[0], dict(bench.built[1])
    accumulation, inputs = bench.cell.accumulation, bench.inputs
    actions: dict[str, Action] = {}
    compiled: dict[str, Mapping[str, Any]] = {}
    recompiled: dict[str, int] = {}
    for name, model in models.items():
        call = _compiled(loss_of) if bench.cell.compile else loss_of
        if name == FROZEN:

            def floor(model: nn.Module = model, call: Any = call) -> Tensor:
                with torch.no_grad():
                    for _ in range(accumulation):
                        loss = call(model, inputs)
                return loss

            actions[name] = Action(floor, after=require_finite)
            continue
        found = attempt(functools.partial(_probe, model.train(), call, inputs))
        if isinstance(found, Failure):
            missing[name] = found.reason
            continue
        if found:
            compiled[name] = found
        run = functools.partial(_step, model, bench.optimizers[name], call, inputs, accumulation)
        actions[name] = (
            _watched(name, run, recompiled) if bench.cell.compile else Action(run, after=require_finite)
        )
    rate = bench.rate(bench.cell.tokens * accumulation, bench.flops(actions))

    def more(name: str, figure: Quartiles) -> Mapping[str, Any]:
        found: dict[str, Any] = {**rate(name, figure), **compiled.get(name, {})}
        if name in compiled:
            found["recompiled"] = recompiled.get(name, 0)
        return found

    return bench.measured("train", actions, missing, more=more)


def _watched(name: str, run: Callable[[], Tensor], recompiled: dict[str, int]) -> Action:
    """An action that notes how often it compiled again."""
    before = 0

    def note() -> None:
        nonlocal before
        before = _compilations()

    def check(loss: Tensor) -> None:
        recompiled[name] = recompiled.get(name, 0) + _compilations() - before
        require_finite(loss)

    return Action(run, note, check)


def _forward(bench: Bench) -> list[Row]:
    """The forward pass alone, without gradients, in eval mode."""
    models, missing = bench.built[0], dict(bench.built[1])

    def action(model: nn.Module) -> Action:
        call = _compiled(loss_of) if bench.cell.compile else loss_of

        def run() -> Tensor:
            with torch.no_grad():
                return call(model, bench.inputs)

        return Action(run, after=require_finite)

    actions = {name: action(model.eval()) for name, model in models.items()}
    more = bench.rate(bench.cell.tokens, bench.flops(actions))
    return bench.measured("forward", actions, missing, more=more)


def cayley_part(model: nn.Module) -> Callable[[], object]:
    """The updates of all layers, forward and backward, as in a train step, without their use."""
    layers = nblora_layers(model, "default").values()

    def factors() -> list[Tensor]:
        for layer in layers:
            layer._slots.drop()  # as after a step of the optimizer
        updates = [layer._current_update("default") for layer in layers]
        return [factor for update in updates for factor in (update.left, update.right)]

    gradients, parameters = [torch.ones_like(factor) for factor in factors()], trainable(model)

    def run() -> None:
        _Use.apply(gradients, *factors()).backward()
        for parameter in parameters:
            parameter.grad = None

    return run


class _Use(torch.autograd.Function):
    """What gives gradients to factors, in place of the layers."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *factors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return factors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def device_seconds(run: Callable[[], object]) -> float:
    """How long kernels run on the GPU, without what it waits for them."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) * 1e-6


def _cayley(bench: Bench) -> list[Row]:
    """The Cayley part of a train step; the ratio is its share of the step.

    On a GPU also how long its kernels run, and their share of the time that the step's kernels do: in a
    step that keeps the GPU busy, the host has prepared the part before the GPU comes to it.
    """
    models, missing = bench.built[0], dict(bench.built[1])
    rows = []
    for name in bench.methods:
        if name not in (JOINT, SVD):
            rows.append(Row("cayley", name, bench.cell, reason="it has none"))
            continue
        if name not in models:
            rows.append(Row("cayley", name, bench.cell, reason=missing[name]))
            continue
        model, step = models[name].train(), f"train step of {name}"
        run = functools.partial(
            _step, model, bench.optimizers[name], loss_of, bench.inputs, bench.cell.accumulation
        )
        only = Bench(bench.cell, [name], rounds=bench.rounds, warmup=bench.warmup)
        part = cayley_part(model)
        more: dict[str, Any] = {"layers": bench.cell.adapted}
        if bench.cell.device.startswith("cuda"):
            more["device_seconds"] = device_seconds(part)
            more["device_share"] = more["device_seconds"] / device_seconds(run)
        actions = {step: Action(run, after=require_finite), name: Action(part)}
        rows += only.measured("cayley", actions, {}, reference=step, more=lambda *_, found=more: found)[:1]
    return rows


# ------------------------------------------------------------------------------------------- memory


def _memory(bench: Bench) -> list[Row]:
    """Bytes saved for backward, held between forward and backward, and at most until backward is done."""
    models, missing = bench.built
    found: dict[str, dict[str, int]] = {}
    failed = dict(missing)
    if bench.cell.compile:
        failed |= dict.fromkeys(models, "memory is measured uncompiled only")
    for name in models:
        if name in failed:
            continue
        if name == FROZEN:
            failed[name] = "it keeps nothing: no gradients"
            continue
        figures = attempt(functools.partial(_bytes, bench, name))
        if isinstance(figures, Failure):
            failed[name] = figures.reason
        else:
            found[name] = figures
    rows = []
    for kind in ("saved", "held", "peak"):
        for name in bench.methods:
            row = Row(kind, name, bench.cell, unit="bytes", reason=failed.get(name))
            if name in found:
                value = float(found[name][kind])
                row = replace(
                    row,
                    samples=(value,),
                    figure=Quartiles.of([value]),
                    trainable=trainable_count(models[name]),
                    more={"resident_bytes": found[name]["resident"]} if kind == "peak" else {},
                )
                if REFERENCE in found:
                    row = replace(row, ratio=paired([value], [float(found[REFERENCE][kind])]))
            rows.append(row)
    return rows


def _bytes(bench: Bench, name: str) -> dict[str, int]:
    model, optimizer = bench.built[0][name].train(), bench.optimizers[name]
    _step(model, optimizer, loss_of, bench.inputs, 1)  # the optimizer's state
    resident = [*model.parameters(), *model.buffers()]
    saved = saved_bytes(lambda: loss_of(model, bench.inputs), resident)
    optimizer.zero_grad()
    fresh = adapt(bench.base, bench.cell, name)
    held = held_bytes(lambda: loss_of(fresh, bench.inputs), Tensor.backward, bench.cell.device)
    if held.after_forward <= 0 or held.peak < held.after_forward:
        raise Broken(f"a forward pass must allocate, and with the backward pass no less, got {held}")
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    return {
        "saved": saved,
        "held": held.after_forward,
        "peak": held.peak,
        "resident": resident_bytes([*resident, *state]),
    }


KINDS: dict[str, Callable[[Bench], list[Row]]] = {
    "train": _train,
    "forward": _forward,
    "memory": _memory,
    "cayley": _cayley,
}
"""By the name of `--what`."""
