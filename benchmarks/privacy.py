"""Accuracy of private merging: NB-LoRA against clipping, at the same (epsilon, delta), on one thread.

    python benchmarks/privacy.py --quick        # the two cells with gates, the methods that matter: minutes
    python benchmarks/privacy.py --json benchmarks/results/privacy.json --resume      # everything
    python benchmarks/privacy.py --blocks "rotated, N = 20 IID" --seeds 0 1 --draws 3

A small network is trained on public digits as they are. N clients have others, turned by 20 degrees (or
without three rows or columns), and fine-tune it, once; `private_mean` publishes the merged update, for
add-or-remove of one client at delta = 1e-5. Every method chooses bound, optimizer, learning rate and number
of steps on a public validation part, for each cell and seed, under noise of its own; test data are looked
at once, with the draws that are reported. Exits with 1 if a gate is missed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import privacy_tasks as tasks
import torch
from privacy_methods import (
    BALL,
    CEILING,
    CLIPPED,
    LORA,
    METHODS,
    OURS,
    OURS_JOINT,
    OURS_STARTED,
    STARTED,
    choose,
    final,
)
from privacy_report import Block, Row, gates, show, show_verdicts, verdicts

MAIN = "rotated"
"""The task that is measured in full and has the gates."""
EPSILONS = (1.0, 4.0, 8.0)
BASE = "base model"
QUICK = (CEILING, CLIPPED, BALL, LORA, STARTED, OURS, OURS_STARTED, OURS_JOINT)


Plan = tuple[Block, tuple[float, ...], tuple[str, ...]]
"""What is measured of a block: its epsilons and methods."""


def _cells(task: str) -> dict[str, Plan]:
    return {str(gate.block): (gate.block, (gate.epsilon,), QUICK) for gate in gates(task)}


GATED = _cells(MAIN)
BLOCKS: dict[str, Plan] = {
    str(block): (block, EPSILONS, tuple(METHODS))
    for clients in (20, 100)
    for skewed in (False, True)
    for block in [Block(MAIN, clients, skewed)]
}
for _other in tasks.CHANGES:
    if _other != MAIN:
        BLOCKS.update(_cells(_other))


def measure(
    block: Block, epsilons: tuple[float, ...], seed: int, methods: Iterable[str], draws: int
) -> list[Row]:
    """All rows of a block with one seed. `test` is used where settings are chosen already."""
    task, test = tasks.make(block.task, seed, block.clients, block.skewed)
    where = (block.task, block.clients, block.skewed)
    nothing = [torch.zeros(m, n) for m, n in task.shapes.values()]
    before = [task.accuracy(part, nothing).item() for part in (task.validation, test)]
    rows = [Row(*where, None, BASE, seed, 0, {}, before[0], [before[1]], 0)]
    groups: dict[Any, dict[str, Any]] = {}
    for name in methods:
        groups.setdefault(METHODS[name].adapter, {})[name] = METHODS[name]
    for adapter, group in groups.items():
        chosen = choose(task, adapter, group, epsilons, seed)
        for name, method in group.items():
            for epsilon in epsilons if method.private else (None,):
                one = chosen[name, epsilon]
                accuracies, changed = final(task, test, method, one, epsilon, draws, seed)
                count, setting = method.settings(block.clients), asdict(one.setting)
                setting = {key: None if value == float("inf") else value for key, value in setting.items()}
                rows.append(
                    Row(*where, epsilon, name, seed, count, setting, one.validation, accuracies, changed)
                )
    order = [BASE, *METHODS]
    return sorted(rows, key=lambda row: order.index(row.method))


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn", "torch")}
    return {"python": platform.python_version(), **versions, "load_average": os.getloadavg()[0]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="the two cells with gates, eight methods")
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), metavar="BLOCK", help="; ".join(BLOCKS))
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), metavar="NAME", help="; ".join(METHODS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="0 1 2 3 4")
    parser.add_argument("--draws", type=int, default=10, help="of the noise, for each seed; 10")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in that file")
    return parser


def _checked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.resume and not options.json:
        parser.error("--resume needs --json, the file to resume")
    if options.draws < 1:
        parser.error(f"--draws must be at least 1, got {options.draws}")
    known = GATED if options.quick else BLOCKS
    if unknown := [name for name in options.blocks or () if name not in known]:
        parser.error(f"--quick has {' and '.join(known)} only, got {', '.join(unknown)}")
    options.blocks = {name: known[name] for name in options.blocks or known}
    options.seeds = list(dict.fromkeys(options.seeds))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _checked(arguments)
    torch.set_num_threads(1)
    logging.getLogger("nblora.privacy.release").setLevel(logging.ERROR)  # clipping is what some rows do
    start = time.process_time()
    rows: list[Row] = []
    if options.resume and options.json.exists():
        rows = [Row(**row) for row in json.loads(options.json.read_text())["rows"]]
    for seed in options.seeds:
        for name, (block, epsilons, methods) in options.blocks.items():
            done = {row.method for row in rows if (row.block, row.seed) == (block, seed)}
            wanted = [method for method in options.methods or methods if method not in done]
            if not wanted:
                continue
            print(f"{name}, seed {seed}: {', '.join(wanted)}", file=sys.stderr, flush=True)
            found = measure(block, epsilons, seed, wanted, options.draws)
            rows += [row for row in found if row.method not in done]
            if options.json:  # after each: an interrupted run keeps what it has
                _write(options.json, options, rows)
    judged = verdicts(rows, MAIN)
    print("\n".join(show(rows)))
    print("\n".join(show_verdicts(judged)))
    print(f"\n{time.process_time() - start:.0f} s of one core")
    return 0 if all(verdict.met for verdict in judged) else 1


def _write(file: Path, options: argparse.Namespace, rows: Sequence[Row]) -> None:
    content = {"machine": machine(), "quick": options.quick, "draws": options.draws}
    judged = [verdict.to_json() for verdict in verdicts(rows, MAIN)]
    lines = ",\n".join(json.dumps(row.to_json(), ensure_ascii=False) for row in rows)
    text = json.dumps({**content, "gates": judged}, indent=1, ensure_ascii=False).removesuffix("\n}")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(f'{text},\n "rows": [\n{lines}\n]}}\n')
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())
