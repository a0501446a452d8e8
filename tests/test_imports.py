"""Importing the package is light, registers NB-LoRA with PEFT, and runs one way between modules."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nblora

HEAVY = ["peft", "transformers", "sklearn", "matplotlib", "scipy", "datasets", "dp_accounting", "typer"]


def run(code: str) -> Any:
    """The JSON value that a fresh interpreter prints last."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded_after(statement: str) -> set[str]:
    """Which of the heavy packages are loaded after a statement in a fresh interpreter."""
    return set(run(f"import json, sys; {statement}; print(json.dumps([*({set(HEAVY)} & {{*sys.modules}})]))"))


# the last two import all pure modules
@pytest.mark.parametrize(
    "statement", ["import nblora", "import nblora.parametrizations", "import nblora.privacy"]
)
def test_import_is_light(statement: str) -> None:
    assert not loaded_after(statement)


def test_loaded_packages_are_seen() -> None:
    """The test of the test above."""
    assert {"peft", "transformers"} <= loaded_after("import nblora.tuner")


STATE_AFTER_IMPORTS = """
import importlib.util, inspect, json, sys
def finders():
    return sum(type(finder).__module__.startswith("nblora") for finder in sys.meta_path)
import {first}
waiting = finders()
unrelated = bool(importlib.util.find_spec("json")) and not importlib.util.find_spec("no_such_module")
import {second}
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
methods = [method.value for method, config in known.items() if config.__module__.startswith("nblora")]
source = len(inspect.getsource(sys.modules["peft"]))
print(json.dumps(dict(methods=methods, waiting=waiting, left=finders(), unrelated=unrelated, source=source)))
"""


@pytest.mark.parametrize(("first", "second"), [("nblora", "peft"), ("peft", "nblora")])
def test_registration_in_both_import_orders(first: str, second: str) -> None:
    """NB-LoRA is a PEFT method afterwards. The finder that waits for PEFT answers for nothing else, and is
    gone once PEFT is there, which still finds its own source."""
    state = run(STATE_AFTER_IMPORTS.format(first=first, second=second))
    assert state["methods"] == ["NBLORA"]
    assert state["waiting"] == (1 if first == "nblora" else 0)
    assert state["left"] == 0
    assert state["unrelated"]
    assert state["source"] > 0


@pytest.mark.parametrize(
    "between",
    [
        "import importlib.util; assert importlib.util.find_spec('peft')",
        "from transformers.utils import is_peft_available; assert is_peft_available()",
    ],
)
def test_asking_whether_peft_is_there_does_not_use_up_the_registration(between: str) -> None:
    code = (
        f"import nblora\n{between}\nimport peft, sys\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\n"
        "assert known['NBLORA'].__name__ == 'NBLoraConfig'\n"
        "assert not any(type(finder).__name__ == '_PeftFinder' for finder in sys.meta_path)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_unknown_attributes_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'nblora' has no attribute 'no_such_name'"):
        _ = nblora.no_such_name


@pytest.mark.parametrize("name", nblora.__all__)
def test_promised_names_exist(name: str) -> None:
    assert getattr(nblora, name) is not None
    assert name in dir(nblora)


# --- imports run one way ---

PURE_MODULES = ["bounds", "cayley", "contract", "lowrank", "parametrizations", "privacy", "spectral"]
SOURCES = Path(nblora.__file__).parent
PACKAGE = "nblora"
LEVELS = dict.fromkeys(PURE_MODULES, 0) | {
    "tuner": 1,
    "checkpoints": 2,
    "certificate": 2,
    "completion": 2,
    "merging": 2,
    "federated": 3,
}
TOP = 4  # command line, demo and whatever is new
ROOTS = {"__init__", "_registration"}  # light doors: they load other modules only when asked


def imported_modules(source: str, known: set[str]) -> set[str]:
    """Dotted names of all modules that a source imports, anywhere in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute, so that their direction can be read"
            assert node.module is not None
            for alias in node.names:  # `from nblora import bounds` imports a module
                inner = f"{node.module}.{alias.name}"
                modules.add(inner if inner in known else node.module)
    return modules


def room(module: str) -> str:
    """The first name below the package, `__init__` for the package itself."""
    return [*module.split("."), "__init__"][1]


def level(module: str) -> int:
    return LEVELS.get(room(module), TOP)


def violations(module: str, source: str, known: set[str]) -> list[str]:
    """Imports of a module that run against the direction mathematics <- adapters <- jobs <- command line."""
    if room(module) in ROOTS:
        return []
    wrong = []
    for target in sorted(imported_modules(source, known)):
        package = target.split(".")[0]
        if package == PACKAGE:
            # the root may serve any name, so only the top level may ask it
            if level(target) > level(module) or (room(target) in ROOTS and level(module) < TOP):
                wrong.append(f"{module} imports {target}")
        elif level(module) == 0 and package in HEAVY and package not in ("scipy", "dp_accounting"):
            wrong.append(f"{module} imports {target}")
    return wrong


def module_name(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(SOURCES).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCES.rglob("*.py"))}


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module: str) -> None:
    assert not violations(module, FILES[module].read_text(), set(FILES))


def test_rooms_exist() -> None:
    """A renamed module must not slip to the top level, where everything is allowed."""
    assert {room(module) for module in FILES} >= {*LEVELS, *ROOTS}


def test_root_is_light_in_its_source_too() -> None:
    """At import time the doors import only the standard library and each other."""
    for name in (PACKAGE, f"{PACKAGE}._registration"):
        for node in ast.parse(FILES[name].read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for imported in names:
                first = imported.split(".")[0]
                assert first in sys.stdlib_module_names or imported == f"{PACKAGE}._registration"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nblora.cayley", "import peft"),
        ("nblora.cayley", "from transformers.pytorch_utils import Conv1D"),
        ("nblora.bounds", "def f():\n    from nblora.tuner import NBLoraConfig"),
        ("nblora.bounds", "from nblora import tuner"),
        ("nblora.lowrank", "from nblora import NBLoraConfig"),
        ("nblora.lowrank", "import nblora"),
        ("nblora.tuner.layer", "from nblora.checkpoints import export_lora"),
        ("nblora.tuner.layer", "from nblora.new_module import anything"),
        ("nblora.certificate", "import nblora.cli"),
        ("nblora.merging.merge", "from nblora.federated import Federation"),
        ("nblora.federated.client", "from nblora.training import finetune"),
        ("nblora.federated.client", "from nblora import NBLoraConfig"),
    ],
)
def test_violations_are_seen(module: str, source: str) -> None:
    """The test of the test above."""
    assert violations(module, source, set(FILES))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "nblora.parametrizations",
            "import torch\nfrom nblora.bounds import Norm\nfrom nblora import cayley",
        ),
        ("nblora.bounds", "def f():\n    from scipy.optimize import nnls"),
        (
            "nblora.tuner.layer",
            "import peft\nfrom nblora.bounds import Norm\nfrom nblora.tuner.config import X",
        ),
        ("nblora.certificate", "from nblora.tuner import X\nfrom nblora.checkpoints import read_adapter"),
        (
            "nblora.federated.flower",
            "import flwr\nfrom nblora.tuner import X\nfrom nblora.privacy import private_mean",
        ),
        ("nblora.cli", "import nblora, typer\nfrom nblora.demo import run_demo"),
        ("nblora.new_module", "import sklearn\nfrom nblora.certificate import certify"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert not violations(module, source, set(FILES))
