"""Time and memory of NB-LoRA against full fine-tuning and PEFT's methods, interleaved in one process.

    python benchmarks/speed.py --quick                  # minutes on two cores, every target of the table
    python benchmarks/speed.py --full                   # every axis, hours
    python benchmarks/speed.py --gpu [1b] [8b]          # Llamas of these shapes in bfloat16
    python benchmarks/speed.py --hidden 512 1024 --rank 16 --what train memory --methods LoRA "NB-LoRA joint"

All methods of a cell take turns, round by round, in changing order; warm-up rounds do not count. Printed are
medians and quartiles, of the figure and of its ratio to LoRA's in the same round. `--what`, `--methods`,
`--rounds` and `--warmup` also narrow or change a preset. A method that cannot be measured somewhere has a row
that says why.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the profiler counts bytes, and should not talk
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import speed_training
import speed_use
import torch
from speed_bench import Bench, Row
from speed_figures import Failure, attempt, ceilings
from speed_models import FROZEN, FULL, JOINT, METHODS, NOTES, REFERENCE, SVD, Cell
from speed_targets import LEFT_OUT, Growth, Verdict, growth, verdicts

KINDS = {**speed_training.KINDS, **speed_use.KINDS}
OURS = (REFERENCE, JOINT, SVD)
"""What a cell of a preset measures that is there for an axis or a target."""


@dataclass(frozen=True)
class Job:
    """Kinds of measurement of some methods in one cell."""

    cell: Cell
    kinds: tuple[str, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    rounds: int = 9


def quick() -> list[Job]:
    """Every target, and every method once."""
    main = Cell()
    wide = replace(main, hidden=1024, layers=1)
    half = replace(main, dtype="bfloat16")
    return [
        Job(main, ("train", "memory"), rounds=7),
        Job(main, ("forward", "prefill", "decode", "decode-merged"), rounds=5),
        Job(main, FILES, rounds=5),
        Job(main, ("cayley",), OURS, rounds=5),
        Job(half, ("train", "memory"), rounds=5),
        Job(half, ("decode",), (FROZEN, *OURS), rounds=5),
        *(Job(replace(wide, rank=rank), ("train",), OURS, rounds=11) for rank in (8, 16, 64)),
        *(Job(replace(main, layers=layers), ("train",), OURS, rounds=7) for layers in (1, 4)),
        Job(replace(main, tokens=256), ("train",), OURS, rounds=7),
        Job(replace(main, tokens=2048), ("train",), OURS, rounds=7),
        *(
            Job(replace(main, checkpointing=how), ("train", "memory"), OURS, rounds=5)
            for how in CHECKPOINTING[1:]
        ),
        Job(replace(main, accumulation=4), ("train",), OURS, rounds=5),
        Job(replace(main, model="stack", layers=4), ("train", "memory"), OURS),
        Job(replace(main, model="stack", layers=16, hidden=64), ("train",), OURS),
        whole_adapter(),
    ]


def full() -> list[Job]:
    """Every axis from its middle, with all methods; compiled with those that matter."""
    main = Cell(hidden=1024)
    kinds = ("train", "forward", "memory")
    generation = ("prefill", "decode", "prefill-merged", "decode-merged")
    cells = [
        *(replace(main, rank=rank) for rank in (4, 8, 16, 32, 64, 128, 256)),
        *(replace(main, hidden=hidden) for hidden in (256, 512, 2048)),
        replace(main, hidden=4096, layers=1),
        *(replace(main, tokens=tokens) for tokens in (64, 256, 4096)),
        *(replace(main, layers=layers) for layers in (1, 4, 8)),
        *(replace(main, checkpointing=how) for how in CHECKPOINTING[1:]),
        replace(main, accumulation=4),
        *(replace(main, dtype="bfloat16", hidden=hidden) for hidden in (512, 1024, 2048)),
        *(replace(main, model="stack", layers=4, hidden=hidden) for hidden in (64, 256, 1024, 4096)),
    ]
    return [
        *(Job(cell, kinds, rounds=11) for cell in cells),
        *(Job(replace(main, dtype=dtype), generation, rounds=11) for dtype in DTYPES),
        *(Job(replace(main, hidden=hidden), FILES, rounds=5) for hidden in (512, 2048)),
        *(Job(replace(Cell(), layers=layers), ("cayley",), OURS) for layers in (2, 8, 32)),
        *(Job(replace(main, compile=True, dtype=dtype), ("train", "forward"), OURS, 15) for dtype in DTYPES),
        whole_adapter(),
    ]


def gpu(sizes: Sequence[str], device: str) -> list[Job]:
    """Llamas of 1 and 8 billion parameters, bfloat16, with their real vocabulary."""
    jobs = []
    for size in sizes:
        hidden, intermediate, layers = {"1b": (2048, 8192, 16), "8b": (4096, 14336, 32)}[size]
        cell = Cell(
            hidden=hidden,
            intermediate=intermediate,
            layers=layers,
            kv_heads=8,
            vocabulary=128256,
            tokens=4096,
            dtype="bfloat16",
            device=device,
        )
        kinds = ("train", "forward", "memory", "prefill", "decode")
        # all of them at once do not fit beside full fine-tuning and BOFT in 8 billion parameters
        apart = (FULL, "BOFT") if size == "8b" else ()
        jobs += [
            Job(cell, kinds, tuple(name for name in METHODS if name not in apart), rounds=10),
            Job(cell, ("cayley",), OURS, 10),
            Job(cell, ("merge", "decode-merged", "create"), OURS, 5),
            *(Job(cell, kinds, (REFERENCE, name), 10) for name in apart),
        ]
    return jobs


def whole_adapter() -> Job:
    """224 layers of the shapes of a Llama with 1 billion parameters, twice as deep."""
    return Job(
        Cell(hidden=2048, intermediate=8192, kv_heads=8, layers=32), ("export+certify",), (JOINT, SVD), 3
    )


FILES = ("export", "certify", "load", "merge", "create")
DTYPES = ("float32", "bfloat16")
CHECKPOINTING = ("off", "non-reentrant", "reentrant")


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """The preset, or the cells of the command line; narrowed by `--what` and `--methods`."""
    if options.quick:
        jobs = quick()
    elif options.full:
        jobs = full()
    elif options.gpu is not None:
        jobs = gpu(options.gpu or ["1b", "8b"], options.device)
    else:
        axes = ("model", "hidden", "layers", "tokens", "rank", "dtype", "checkpointing", "accumulation")
        points = itertools.product(*(getattr(options, axis) for axis in axes))
        cells = (
            Cell(**dict(zip(axes, point)), compile=options.compile, device=options.device) for point in points
        )
        return [
            Job(
                cell,
                tuple(options.what or ("train",)),
                tuple(options.methods or METHODS),
                options.rounds or 9,
            )
            for cell in cells
        ]
    narrowed = []
    for job in jobs:
        kinds = tuple(kind for kind in job.kinds if not options.what or kind in options.what)
        methods = tuple(name for name in job.methods if not options.methods or name in options.methods)
        if kinds and methods:
            narrowed.append(Job(job.cell, kinds, methods, options.rounds or job.rounds))
    return narrowed


# ------------------------------------------------------------------------------------------ printing


def show(rows: Sequence[Row]) -> Iterator[str]:
    """Tables, one for each cell and kind."""
    for (cell, kind), group in itertools.groupby(rows, key=lambda row: (row.cell, row.kind)):
        yield f"\n{kind}: {cell}"
        these = list(group)
        yield from (_line(row) for row in these if row.reason != LEFT_OUT)
        if left_out := [row.method for row in these if row.reason == LEFT_OUT]:
            yield f"  {LEFT_OUT}: {', '.join(left_out)}"


def _line(row: Row) -> str:
    if row.figure is None:
        return f"  {row.method:<30} {row.reason}"
    scale, unit = (1e3, "ms") if row.unit == "s" else (2**-20, "MiB")
    low, middle, high = (scale * x for x in (row.figure.low, row.figure.median, row.figure.high))
    text = f"  {row.method:<30} {middle:>10.2f} {unit:<3}"
    if row.unit == "s":
        text += f" {low:>10.2f}–{high:<10.2f}"
    if row.ratio is not None:
        text += f" × {row.ratio.median:<7.3f}"
        text += f" {row.ratio.low:.3f}–{row.ratio.high:.3f}" if row.unit == "s" else ""
        text += "" if row.reference == REFERENCE else f" of the {row.reference}"
    if row.trainable is not None:
        text += f"  {row.trainable:,} trainable"
    for name, value in (row.more or {}).items():
        if isinstance(value, str):
            text += f"  {name}: {value}"
        else:
            text += f"  {name} {value:.1%}" if name.endswith("_share") else f"  {name} {value:,.6g}"
    return text


def show_growth(found: Sequence[Growth]) -> Iterator[str]:
    if found:
        yield "\nGrowth: the figure grows like axis ** slope"
    for line in found:
        values = ", ".join(map(str, line.values))
        yield f"  {line.kind:<8} {line.method:<18} {line.axis:<7} {line.slope:>6.2f}  ({values}; {line.cell})"


def show_targets(found: Sequence[Verdict]) -> Iterator[str]:
    yield f"\n{'target':<86} {'limit':>7} {'method':<14} {'reached':>8}  verdict"
    for line in found:
        yield f"{line.target:<86} {line.limit:>7} {line.method:<14} {line.shown:>8}  {line.verdict}"
        if line.where:
            yield (
                f"{'':<4}{line.cells} figures; the worst: {line.where}"
                if line.reached is not None
                else f"{'':<4}{line.where}"
            )


# ----------------------------------------------------------------------------------------- the machine


def machine(device: str) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers")}
    facts: dict[str, Any] = {
        **versions,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": _bf16_instructions(),
        "load_average": os.getloadavg()[0],
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def _bf16_instructions() -> list[str] | None:
    """Those that the CPU has, None where it does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    return sorted(set(re.findall(r"\b(?:amx_bf16|avx512_bf16|avx_ne_convert|bf16|svebf16)\b", text)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PEFT and transformers say about choices that are meant here."""
    with warnings.catch_warnings():
        for message, category in (
            (r".is_gradient_checkpointing. is deprecated", FutureWarning),
            (r".gradient_checkpointing_enable. is deprecated", FutureWarning),
            (r"None of the inputs have requires_grad", UserWarning),  # the frozen model under checkpointing
            (r".torch._prims_common.check. is deprecated", FutureWarning),
            (
                r"(Failed to load the CUDA extension|CUDA extension|Setting boft_n_butterfly_factor)",
                UserWarning,
            ),
            (r"Could not find a config file", UserWarning),
            (r"TensorFloat32 tensor cores", UserWarning),
        ):
            warnings.filterwarnings("ignore", message=message, category=category)
        yield


# ---------------------------------------------------------------------------------------------- main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    presets = parser.add_mutually_exclusive_group()
    presets.add_argument("--quick", action="store_true", help="minutes on two cores")
    presets.add_argument("--full", action="store_true", help="every axis, hours")
    presets.add_argument("--gpu", nargs="*", choices=["1b", "8b"], help="Llamas of these sizes in bfloat16")
    cell = parser.add_argument_group("the cells, without a preset: every combination")
    default = Cell()
    for name in ("hidden", "layers", "tokens", "rank", "accumulation"):
        cell.add_argument(f"--{name}", type=int, nargs="+", default=[getattr(default, name)])
    cell.add_argument("--model", nargs="+", choices=["llama", "stack"], default=[default.model])
    cell.add_argument("--dtype", nargs="+", choices=DTYPES, default=[default.dtype])
    cell.add_argument("--checkpointing", nargs="+", choices=CHECKPOINTING, default=[default.checkpointing])
    cell.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--what", nargs="+", choices=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument("--rounds", type=int, help="that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that do not count")
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds that a round of one method may take"
    )
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--device", help="cpu, or cuda, which --gpu takes by itself")
    parser.add_argument("--ceilings", action="store_true", help="measure them and tell shares; --gpu does")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser


def _positive(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if not options.patience > 0:
        parser.error(f"--patience must be positive, got {options.patience}")
    if options.warmup < 0:
        parser.error(f"--warmup must be at least 0, got {options.warmup}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    _positive(parser, options)
    if options.device is None:
        options.device = "cuda" if options.gpu is not None else "cpu"
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("a GPU must be there for --gpu or --device cuda, got none")
    if options.threads:
        torch.set_num_threads(options.threads)
    with _quiet():
        _run(options, sys.argv[1:] if arguments is None else arguments)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    start = time.perf_counter()
    content: dict[str, Any] = {
        "arguments": [str(argument) for argument in arguments],
        "machine": machine(options.device),
        "warmup": options.warmup,
        "notes": list(NOTES),
    }
    print(json.dumps(content["machine"]))
    print("\n".join(NOTES))
    bounds: dict[str, dict[str, float]] = {}
    rows: list[Row] = []
    for job in jobs_of(options):
        dtype = job.cell.dtype
        if (options.ceilings or options.gpu is not None) and dtype not in bounds:
            bounds[dtype] = ceilings(job.cell.device, job.cell.torch_dtype)
            print(f"ceilings, {dtype}: {bounds[dtype]}")
        found = _measured(job, options, bounds.get(dtype))
        print("\n".join(show(found)), flush=True)
        rows += found
        if options.json:  # after every cell: an interrupted run keeps what it has
            _write(options.json, content, rows, bounds, start)
    grown = growth(rows)
    print("\n".join(show_growth(grown)))
    if options.quick or options.full or options.gpu is not None:
        print("\n".join(show_targets(verdicts(rows, gpu=torch.cuda.is_available()))))
    print(f"\n{time.perf_counter() - start:.0f} s")


def _measured(job: Job, options: argparse.Namespace, bounds: dict[str, float] | None) -> list[Row]:
    bench = Bench(
        job.cell,
        job.methods,
        rounds=job.rounds,
        warmup=options.warmup,
        patience=options.patience,
        ceilings=bounds,
    )
    wanted = options.methods or METHODS
    rows = []
    for kind in job.kinds:
        found = attempt(functools.partial(KINDS[kind], bench))  # a cell that fails costs its own rows only
        found = bench.refused(kind, found.reason) if isinstance(found, Failure) else found
        for figure, group in itertools.groupby(found, key=lambda row: row.kind):
            rows += group
            left_out = [name for name in wanted if name not in job.methods]
            rows += [Row(figure, name, job.cell, reason=LEFT_OUT) for name in left_out]
    del bench
    gc.collect()
    if job.cell.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return rows


def _write(
    file: Path,
    content: dict[str, Any],
    rows: Sequence[Row],
    bounds: dict[str, dict[str, float]],
    start: float,
) -> None:
    whole = {
        **content,
        "ceilings": bounds,
        "seconds": time.perf_counter() - start,
        "rows": [row.to_json() for row in rows],
        "growth": [line.to_json() for line in growth(rows)],
        "targets": [line.to_json() for line in verdicts(rows, gpu=torch.cuda.is_available())],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(json.dumps(whole, indent=1) + "\n")
    temporary.replace(file)


if __name__ == "__main__":
    main()
