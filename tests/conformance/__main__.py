"""Runs PEFT's own tests with NB-LoRA in place of other methods: `make conformance`."""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from conformance import fetch, hub, substitution
from conformance.matrices import MATRICES, SKIPS, Matrix, Skip
from conformance.plugin import ORDER_VARIABLE, Order, matching

HERE = Path(__file__).parent
Outcomes = dict[str, tuple[str, str]]  # test name: outcome, why


def skips_of(method: str) -> dict[str, Skip]:
    return {skip.pattern: skip for skip in SKIPS if method in skip.methods}


def renamed_copy(tests: Path, method: str) -> Path:
    """A folder with a copy of tests/ in which NB-LoRA's names replace the method's."""
    folder = tests / method
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tests").mkdir(parents=True)
    for file in (tests / "tests").glob("*.py"):
        source = substitution.renamed(file.read_text(encoding="utf-8"), method)
        (folder / "tests" / file.name).write_text(source, encoding="utf-8")
    return folder


def run_matrix(
    name: str, matrix: Matrix, version: str, tests: Path, home: Path, paths: list[Path], options: list[str]
) -> Outcomes:
    """Run one matrix in a pytest of its own and return what became of each test."""
    tests = renamed_copy(tests, matrix.method)
    report = tests / f"{name}.json"
    report.unlink(missing_ok=True)
    skips = skips_of(matrix.method)
    order = Order(
        method=matrix.method,
        version=version,
        skips={pattern: skip.reason for pattern, skip in skips.items()},
        never_run=[pattern for pattern, skip in skips.items() if not skip.run],
        report=str(report),
    )
    environment = {
        **os.environ,
        **matrix.environment,
        ORDER_VARIABLE: order.to_json(),
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tests / "inductor"),
    }
    command = [
        *(sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tests), "-q", "-W", "ignore"),
        *("-p", "no:cacheprovider", "-p", "conformance.plugin", "--tb", "short"),
        *options,
        *(str(tests / "tests" / file) for file in matrix.least),
    ]
    status = subprocess.run(command, cwd=tests, env=environment, check=False).returncode
    if not report.exists():
        raise RuntimeError(f"pytest must write its results of {name!r}, got status {status} and none")
    return {test: tuple(outcome) for test, outcome in json.loads(report.read_text(encoding="utf-8")).items()}


def models_home(cache: Path) -> Path:
    """Where the models of this version of the recipes are."""
    key = hashlib.sha256(Path(hub.__file__).read_bytes()).hexdigest()[:12]
    return cache / f"models-{importlib.metadata.version('transformers')}-{key}"


def faults(matrix: Matrix, outcomes: Outcomes) -> list[str]:
    """Everything for which a matrix counts as failed, in a line each."""
    found = [f"failed: {test}: {why}" for test, (outcome, why) in outcomes.items() if outcome == "failed"]
    found += [
        f"passed, though expected to fail ({why}): {test}"
        for test, (outcome, why) in outcomes.items()
        if outcome == "xpassed"
    ]
    for file, least in matrix.least.items():
        passed = sum(test.startswith(file) and outcome == "passed" for test, (outcome, _) in outcomes.items())
        if passed < least:
            found.append(f"of {file} at least {least} tests must pass, got {passed}")
    return found


def stale(results: dict[str, Outcomes]) -> list[str]:
    """Skips that excuse nothing in the matrices that were run."""
    found = []
    for skip in SKIPS:
        file = skip.pattern.split("::")[0]
        concerned = [
            outcomes
            for name, outcomes in results.items()
            if MATRICES[name].method in skip.methods and fnmatch.filter(MATRICES[name].least, file)
        ]
        excused = any(
            (outcome == "xfailed" or not skip.run) and matching(test, [skip.pattern])
            for outcomes in concerned
            for test, (outcome, _) in outcomes.items()
        )
        if concerned and not excused:
            found.append(f"stale skip, no failing test matches: {skip.pattern}")
    return found


def table(results: dict[str, Outcomes]) -> str:
    """How many tests of each file passed, and what of the others."""
    row = "{:10} {:34} {:>7} {:>14} {:>11} {:>7}"
    lines = [row.format("matrix", "file", "passed", "known to fail", "not for us", "failed")]
    for name, outcomes in results.items():
        for file in MATRICES[name].least:
            count = Counter(outcome for test, (outcome, _) in outcomes.items() if test.startswith(file))
            failed = count["failed"] + count["xpassed"]
            lines.append(row.format(name, file, count["passed"], count["xfailed"], count["skipped"], failed))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__)
    parser.add_argument(
        "--peft",
        default=importlib.metadata.version("peft"),
        help='version of PEFT, or "newest"; the installed one without it',
    )
    parser.add_argument("--matrix", choices=list(MATRICES), action="append", help="only this one")
    parser.add_argument(
        "--cache", type=Path, default=HERE / "cache", help="folder for what is fetched and made"
    )
    parser.add_argument("--workers", default="auto", help="processes, as pytest-xdist's -n")
    parser.add_argument("-k", default="", help="only tests whose names match; no counts are checked then")
    arguments = parser.parse_args()

    requirement = "peft" if arguments.peft == "newest" else f"peft=={arguments.peft}"
    version, tests = fetch.fetch_tests(requirement, arguments.cache.resolve())
    paths = [HERE.parent]
    if version != importlib.metadata.version("peft"):
        paths.insert(0, fetch.fetch_release(version, arguments.cache.resolve()))
    home = models_home(arguments.cache.resolve())
    hub.make(home)

    options = ["-n", arguments.workers, *(["-k", arguments.k] if arguments.k else [])]
    results = {
        name: run_matrix(name, MATRICES[name], version, tests, home, paths, options)
        for name in arguments.matrix or MATRICES
    }
    print(f"\nPEFT {version} with NB-LoRA in the place of other methods")
    print(table(results))
    if arguments.k:
        found = [fault for outcomes in results.values() for fault in faults(Matrix("", {}), outcomes)]
    else:
        found = [fault for name, outcomes in results.items() for fault in faults(MATRICES[name], outcomes)]
        found += stale(results)
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
