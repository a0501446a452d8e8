"""The kinds of measurement of `speed.py`: one row for every method each, a figure or why there is none."""

from __future__ import annotations

import functools
import math
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from speed_figures import (
    Action,
    Broken,
    Failure,
    Quartiles,
    attempt,
    held_bytes,
    interleaved,
    paired,
    require_finite,
    resident_bytes,
    saved_bytes,
)
from speed_models import (
    FROZEN,
    JOINT,
    METHODS,
    REFERENCE,
    STARTS,
    SVD,
    Cell,
    adapt,
    attach,
    base_model,
    batch,
    loss_of,
    trainable,
    trainable_count,
    with_own_parameters,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nblora import NBLoraConfig, certify, export_lora
from nblora.tuner import nblora_layers

DECODE_STEPS = 5
"""Decode steps take little time: as many in each round."""


@dataclass(frozen=True)
class Row:
    """One figure of one method in one cell.

    Attributes:
        unit: "s" or "bytes".
        samples: the figure of every round; empty where there is none.
        figure: their quartiles.
        ratio: of the figure to the reference's in the same round, quartiles over the rounds.
        reference: whose figure the ratio is to.
        trainable: parameters.
        reason: why there is no figure.
        more: what only this kind has.
    """

    kind: str
    method: str
    cell: Cell
    unit: str = "s"
    samples: tuple[float, ...] = ()
    figure: Quartiles | None = None
    ratio: Quartiles | None = None
    reference: str = REFERENCE
    trainable: int | None = None
    reason: str | None = None
    more: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """One cell: its models, and the measurements of them.

    Args:
        methods: names in METHODS.
        rounds: that count.
        warmup: rounds that do not.
        patience: seconds that a round of one method may take.
        ceilings: of the device, to tell shares of them; see `speed_figures.ceilings`.
    """

    def __init__(
        self,
        cell: Cell,
        methods: Sequence[str],
        *,
        rounds: int,
        warmup: int,
        patience: float = math.inf,
        ceilings: Mapping[str, float] | None = None,
    ) -> None:
        self.cell = cell
        self.methods = methods
        self.rounds = rounds
        self.warmup = warmup
        self.patience = patience
        self.ceilings = ceilings

    @functools.cached_property
    def base(self) -> nn.Module:
        return base_model(self.cell)

    @functools.cached_property
    def inputs(self) -> Tensor:
        return batch(self.cell)

    @functools.cached_property
    def _built(self) -> tuple[dict[str, nn.Module], dict[str, str]]:
        return self._build(self.methods)

    def _build(
        self, methods: Sequence[str], *, own_weights: bool = False
    ) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """Models by method, and why there is none."""
        models, missing = {}, {}
        for method in methods:
            make = functools.partial(adapt, self.base, self.cell, method, own_weights=own_weights)
            model = attempt(make)
            if isinstance(model, Failure):
                missing[method] = model.reason
            else:
                models[method] = model
        return models, missing

    @functools.cached_property
    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        # fused, as transformers' Trainer has it by default
        models = {name: trainable(model) for name, model in self._built[0].items()}
        return {name: torch.optim.AdamW(p, lr=1e-5, fused=True) for name, p in models.items() if p}

    def rows(self, kind: str) -> list[Row]:
        """One row for every method, in several kinds of figures where the kind has them."""
        rows: list[Row] = KINDS[kind](self)
        return rows

    def measured(
        self,
        kind: str,
        actions: Mapping[str, Action],
        missing: Mapping[str, str],
        *,
        reference: str = REFERENCE,
        times: int = 1,
        more: Callable[[str, Quartiles], Mapping[str, Any]] = lambda name, figure: {},
    ) -> list[Row]:
        """Rows of actions that take turns, and of methods that are missing."""
        seconds, failed = interleaved(
            actions,
            rounds=self.rounds * times,
            warmup=self.warmup,
            device=self.cell.device,
            patience=self.patience,
        )
        models = self.__dict__.get("_built", ({}, {}))[0]
        rows = []
        for name in (*self.methods, *(name for name in actions if name not in self.methods)):
            count = trainable_count(models[name]) if name in models else None
            row = Row(kind, name, self.cell, reference=reference, trainable=count)
            if name in seconds:
                figure = Quartiles.of(seconds[name])
                row = replace(row, samples=tuple(seconds[name]), figure=figure, more=more(name, figure))
                if reference in seconds:
                    row = replace(row, ratio=paired(seconds[name], seconds[reference]))
            else:
                row = replace(row, reason=failed.get(name) or missing.get(name, "not measured by this kind"))
            rows.append(row)
        return rows

    def refused(self, kind: str, why: str, unit: str = "s") -> list[Row]:
        return [Row(kind, method, self.cell, unit=unit, reason=why) for method in self.methods]

    def rate(self, tokens: int, flops: Mapping[str, int]) -> Callable[[str, Quartiles], Mapping[str, Any]]:
        """Tokens per second, and the share of the matrix-product ceiling where it was measured."""

        def more(name: str, figure: Quartiles) -> Mapping[str, Any]:
            found: dict[str, Any] = {"tokens_per_second": tokens / figure.median}
            if self.ceilings and name in flops:
                per_second = flops[name] / figure.median
                found["matmul_share"] = per_second / self.ceilings["matmul_flops_per_second"]
            return found

        return more

    def flops(self, actions: Mapping[str, Action], missing: dict[str, str]) -> dict[str, int]:
        """Matrix-product FLOPs of each action; only where ceilings are asked for."""
        counts: dict[str, int] = {}
        if self.ceilings is None or self.cell.compile:
            return counts
        for name, action in actions.items():
            count = attempt(functools.partial(_flops, action))
            if isinstance(count, Failure):
                missing[name] = count.reason
            else:
                counts[name] = count
        return counts


def _flops(action: Action) -> int:
    with FlopCounterMode(display=False) as counter:
        action.before()
        action.after(action.run())
    count: int = counter.get_total_flops()
    return count


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
    models, missing = bench._built[0], dict(bench._built[1])
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
        run = functools.partial(_step, model, bench._optimizers[name], call, inputs, accumulation)
        actions[name] = (
            _watched(name, run, recompiled) if bench.cell.compile else Action(run, after=require_finite)
        )
    flops = bench.flops(actions, missing)
    actions = {name: action for name, action in actions.items() if name not in missing}
    rate = bench.rate(bench.cell.tokens * accumulation, flops)

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
    models, missing = bench._built[0], dict(bench._built[1])

    def action(model: nn.Module) -> Action:
        call = _compiled(loss_of) if bench.cell.compile else loss_of

        def run() -> Tensor:
            with torch.no_grad():
                return call(model, bench.inputs)

        return Action(run, after=require_finite)

    actions = {name: action(model.eval()) for name, model in models.items()}
    flops = bench.flops(actions, missing)
    actions = {name: action for name, action in actions.items() if name not in missing}
    return bench.measured("forward", actions, missing, more=bench.rate(bench.cell.tokens, flops))


def cayley_part(model: nn.Module) -> Callable[[], object]:
    """The updates of all layers, forward and backward, as in a train step, without their use."""
    layers = nblora_layers(model, "default").values()

    def factors() -> list[Tensor]:
        updates = [layer.low_rank_update("default") for layer in layers]
        return [factor for update in updates for factor in (update.left, update.right)]

    gradients = [torch.ones_like(factor) for factor in factors()]

    def run() -> None:
        torch.autograd.backward(factors(), gradients)
        for parameter in trainable(model):
            parameter.grad = None

    return run


def _cayley(bench: Bench) -> list[Row]:
    """The Cayley part of a train step; the ratio is its share of the step."""
    models, missing = bench._built[0], dict(bench._built[1])
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
            _step, model, bench._optimizers[name], loss_of, bench.inputs, bench.cell.accumulation
        )
        only = Bench(bench.cell, [name], rounds=bench.rounds, warmup=bench.warmup)
        actions = {step: Action(run, after=require_finite), name: Action(cayley_part(model))}
        rows += only.measured(
            "cayley", actions, {}, reference=step, more=lambda *_: {"layers": bench.cell.adapted}
        )[:1]
    return rows


# ------------------------------------------------------------------------------------------- memory


def _memory(bench: Bench) -> list[Row]:
    """Bytes saved for backward, held between forward and backward, and at most during a train step."""
    models, missing = bench._built
    found: dict[str, dict[str, int]] = {}
    failed = dict(missing)
    if bench.cell.compile:
        failed |= dict.fromkeys(models, "memory is measured uncompiled only")
    for name, model in models.items():
        if name in failed:
            continue
        if name == FROZEN:
            failed[name] = "it keeps nothing: no gradients"
            continue
        measure = functools.partial(
            _bytes, model.train(), bench._optimizers[name], bench.inputs, bench.cell.device
        )
        figures = attempt(measure)
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


def _bytes(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, device: str) -> dict[str, int]:
    def forward() -> Tensor:
        return loss_of(model, inputs)

    def backward(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    backward(forward())  # what is allocated once and kept
    held = held_bytes(forward, backward, device)
    resident = [*model.parameters(), *model.buffers()]
    saved = saved_bytes(forward, resident)
    optimizer.zero_grad()
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    if held.after_forward <= 0 or held.peak < held.after_forward:
        raise Broken(f"a forward pass must allocate, and a step no less, got {held}")
    return {
        "saved": saved,
        "held": held.after_forward,
        "peak": held.peak,
        "resident": resident_bytes([*resident, *state]),
    }


# --------------------------------------------------------------------------------------- generation


def _generation(bench: Bench, kind: str) -> list[Row]:
    """Prefill of one sequence, or a decode step after it with a cache; "-merged" with merged adapters."""
    if bench.cell.model != "llama":
        return bench.refused(kind, "the bare layers generate nothing")
    if bench.cell.compile:
        return bench.refused(kind, "generation is measured uncompiled only")
    merged = kind.endswith("-merged")
    models, missing = _merged_models(bench) if merged else bench._built
    missing = dict(missing)
    prompt = bench.inputs[:1]
    actions: dict[str, Action] = {}
    for name, model in models.items():
        model.eval()
        if kind.startswith("prefill"):
            actions[name] = Action(
                functools.partial(_prefill, model, prompt), after=lambda out: require_finite(out.logits)
            )
            continue
        out = attempt(functools.partial(_prefill, model, prompt))
        if isinstance(out, Failure):
            missing[name] = out.reason
            continue
        cache = out.past_key_values
        actions[name] = Action(
            functools.partial(_decode, model, prompt[:, :1], cache),
            after=functools.partial(_forget, cache, prompt.shape[1]),
        )
    decode = kind.startswith("decode")
    flops = {} if decode else bench.flops(actions, missing)
    actions = {name: action for name, action in actions.items() if name not in missing}
    rate = bench.rate(1 if decode else prompt.shape[1], flops)

    def more(name: str, figure: Quartiles) -> Mapping[str, Any]:
        if not decode or bench.ceilings is None:
            return rate(name, figure)
        # a token reads every weight once, apart from the embedding's other rows
        model = models[name]
        embedding = model.get_input_embeddings().weight
        size = resident_bytes([*model.parameters(), *model.buffers()]) - embedding.untyped_storage().nbytes()
        share = size / figure.median / bench.ceilings["copy_bytes_per_second"]
        return {**rate(name, figure), "copy_share": share}

    return bench.measured(kind, actions, missing, times=DECODE_STEPS if decode else 1, more=more)


@torch.no_grad()
def _prefill(model: nn.Module, prompt: Tensor) -> Any:
    return model(input_ids=prompt, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def _decode(model: nn.Module, token: Tensor, cache: Any) -> Any:
    return model(input_ids=token, past_key_values=cache, use_cache=True)


def _forget(cache: Any, length: int, out: Any) -> None:
    """Take the decoded token out of the cache again, so that every step has the same length."""
    require_finite(out.logits)
    if cache.get_seq_length() != length + 1:
        raise Broken(f"a decode step must add one token to {length}, got {cache.get_seq_length()}")
    cache.crop(-1)


# ------------------------------------------------------------------------ merging, files, creation


def _merged_models(bench: Bench) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Models with merged adapters and weights of their own, and the base model as it is."""
    models, missing = _mergeable(bench)
    for name, model in list(models.items()):
        if isinstance(failure := attempt(model.merge_adapter), Failure):
            missing[name] = failure.reason
            del models[name]
    if FROZEN in bench.methods and FROZEN in bench._built[0]:
        models[FROZEN] = bench._built[0][FROZEN]
        missing.pop(FROZEN, None)
    return models, missing


def _mergeable(bench: Bench) -> tuple[dict[str, nn.Module], dict[str, str]]:
    adapters = [method for method in bench.methods if METHODS[method] is not None]
    models, missing = bench._build(adapters, own_weights=True)
    missing |= {method: "it has no adapter" for method in bench.methods if METHODS[method] is None}
    return models, missing


def _merge(bench: Bench) -> list[Row]:
    """Adding every update to its base weight; taking it out again is not timed."""
    models, missing = _mergeable(bench)

    def action(model: nn.Module) -> Action:
        layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
        before = layer.get_base_layer().weight.detach().clone()

        def run() -> None:
            with torch.no_grad():
                model.merge_adapter()

        def take_out(_: None) -> None:
            if torch.equal(layer.get_base_layer().weight, before):
                raise Broken("merging must change the base weight, it did not")
            with torch.no_grad():
                model.unmerge_adapter()

        return Action(run, after=take_out)

    return bench.measured("merge", {name: action(model) for name, model in models.items()}, missing)


@contextmanager
def _folders(methods: Sequence[str]) -> Iterator[dict[str, Path]]:
    with tempfile.TemporaryDirectory() as temporary:
        yield {method: Path(temporary) / str(number) for number, method in enumerate(methods)}


def _files(bench: Bench, kind: str) -> list[Row]:
    """Writing a plain LoRA ("export"), measuring the bound ("certify"), reading an adapter ("load")."""
    models, missing = bench._built[0], dict(bench._built[1])
    actions: dict[str, Action] = {}
    with _folders(bench.methods) as folders:
        for name, model in models.items():
            folder = folders[name]
            if METHODS[name] is None:
                missing[name] = "it has no adapter"
            elif kind == "load":
                save = functools.partial(model.save_pretrained, folder, save_embedding_layers=False)
                if isinstance(failure := attempt(save), Failure):
                    missing[name] = failure.reason
                else:
                    actions[name] = _load(bench.base, folder)
            elif kind == "certify":
                if name in (JOINT, SVD):
                    actions[name] = Action(functools.partial(certify, model), after=_check_certificate(bench))
                else:
                    missing[name] = "no bound that it certifies"
            elif name in (JOINT, SVD):
                actions[name] = Action(functools.partial(export_lora, model, folder))
            elif name in (REFERENCE, "rsLoRA", "PiSSA"):
                actions[name] = Action(
                    functools.partial(model.save_pretrained, folder, save_embedding_layers=False)
                )
            else:
                missing[name] = "no exact LoRA of it"
        return bench.measured(kind, actions, missing)


def _check_certificate(bench: Bench) -> Callable[[Any], None]:
    def check(certificate: Any) -> None:
        if not certificate.holds or len(certificate.layers) != bench.cell.adapted:
            raise Broken(f"a certificate of {bench.cell.adapted} layers must hold, got {certificate.summary}")

    return check


def _load(base: nn.Module, folder: Path) -> Action:
    fresh: list[nn.Module] = []

    def run() -> nn.Module:
        return PeftModel.from_pretrained(fresh.pop(), folder)

    return Action(run, before=lambda: fresh.append(with_own_parameters(base, own_weights=False)))


def _create(bench: Bench) -> list[Row]:
    """A fresh adapter; PiSSA's exact start and a bound that needs no spectral norms on top."""
    missing = {method: "it has no adapter" for method in bench.methods if METHODS[method] is None}
    makes = {name: make for name in bench.methods if (make := METHODS[name]) is not None}
    makes |= {name: make for name, make in STARTS.items() if name.split(",")[0] in makes}

    def action(make: Any) -> Action:
        fresh: list[nn.Module] = []

        def run() -> nn.Module:
            return attach(fresh.pop(), bench.cell, make)

        def prepare() -> None:
            fresh.append(with_own_parameters(bench.base, own_weights=False))

        return Action(run, before=prepare)

    return bench.measured("create", {name: action(make) for name, make in makes.items()}, missing)


# ----------------------------------------------------------------------------------- whole adapters


def _export_certify(bench: Bench) -> list[Row]:
    """Export and certificate of the saved adapter of a whole model, from its folder.

    All blocks share the base weights of the first, so that the model needs the memory of one.
    """
    missing = dict.fromkeys(bench.methods, "no bound that it certifies")
    actions: dict[str, Action] = {}
    with _folders(bench.methods) as folders:
        for name in bench.methods:
            if name not in (JOINT, SVD):
                continue
            saved, out = folders[name] / "adapter", folders[name] / "lora"
            parametrization = "svd" if name == SVD else "joint"
            save = functools.partial(_save_whole_adapter, bench.cell, parametrization, saved)
            if isinstance(failure := attempt(save), Failure):
                missing[name] = failure.reason
                continue

            def run(saved: Path = saved, out: Path = out) -> Any:
                export_lora(saved, out)
                return certify(saved)

            actions[name] = Action(run, after=_check_certificate(bench))
        only = Bench(bench.cell, bench.methods, rounds=min(bench.rounds, 3), warmup=0)
        return only.measured(
            "export+certify", actions, missing, more=lambda *_: {"layers": bench.cell.adapted}
        )


def _save_whole_adapter(cell: Cell, parametrization: str, folder: Path) -> None:
    block = base_model(replace(cell, layers=1)).model.layers[0]
    model = base_model(replace(cell, layers=0))
    for _ in range(cell.layers):
        model.model.layers.append(with_own_parameters(block, own_weights=False))
    config = NBLoraConfig(
        r=cell.rank,
        bound=1.0,
        bound_kind="absolute",
        parametrization=parametrization,
        init_weights=False,
        target_modules="all-linear",
    )
    get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)


KINDS: dict[str, Callable[[Bench], list[Row]]] = {
    "train": _train,
    "forward": _forward,
    "memory": _memory,
    "prefill": functools.partial(_generation, kind="prefill"),
    "decode": functools.partial(_generation, kind="decode"),
    "prefill-merged": functools.partial(_generation, kind="prefill-merged"),
    "decode-merged": functools.partial(_generation, kind="decode-merged"),
    "merge": _merge,
    "export": functools.partial(_files, kind="export"),
    "certify": functools.partial(_files, kind="certify"),
    "load": functools.partial(_files, kind="load"),
    "create": _create,
    "cayley": _cayley,
    "export+certify": _export_certify,
}
"""By the name of `--what`."""
