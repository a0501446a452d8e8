"""What `speed.py` measures of adapters in use: generation, merging, files, creation."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from speed_bench import Bench, Row
from speed_figures import (
    Action,
    Broken,
    Failure,
    Quartiles,
    attempt,
    require_finite,
    resident_bytes,
)
from speed_models import (
    FROZEN,
    JOINT,
    METHODS,
    REFERENCE,
    STARTS,
    SVD,
    Cell,
    attach,
    base_model,
    with_own_parameters,
)
from torch import Tensor, nn

from nblora import NBLoraConfig, certify, export_lora

DECODE_STEPS = 5
"""Decode steps take little time: as many in each round."""


# --------------------------------------------------------------------------------------- generation


def _generation(bench: Bench, kind: str) -> list[Row]:
    """Prefill of one sequence, or a decode step after it with a cache; "-merged" with merged adapters."""
    if bench.cell.model != "llama":
        return bench.refused(kind, "the bare layers generate nothing")
    if bench.cell.compile:
        return bench.refused(kind, "generation is measured uncompiled only")
    merged = kind.endswith("-merged")
    models, missing = _merged_models(bench) if merged else bench.built
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
    rate = bench.rate(1 if decode else prompt.shape[1], {} if decode else bench.flops(actions))

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
    if FROZEN in bench.methods and FROZEN in bench.built[0]:
        models[FROZEN] = bench.built[0][FROZEN]
        missing.pop(FROZEN, None)
    return models, missing


def _mergeable(bench: Bench) -> tuple[dict[str, nn.Module], dict[str, str]]:
    adapters = [method for method in bench.methods if METHODS[method] is not None]
    models, missing = bench.build(adapters, own_weights=True)
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
    models, missing = bench.built[0], dict(bench.built[1])
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
    "prefill": functools.partial(_generation, kind="prefill"),
    "decode": functools.partial(_generation, kind="decode"),
    "prefill-merged": functools.partial(_generation, kind="prefill-merged"),
    "decode-merged": functools.partial(_generation, kind="decode-merged"),
    "export": functools.partial(_files, kind="export"),
    "certify": functools.partial(_files, kind="certify"),
    "load": functools.partial(_files, kind="load"),
    "merge": _merge,
    "create": _create,
    "export+certify": _export_certify,
}
"""By the name of `--what`."""
