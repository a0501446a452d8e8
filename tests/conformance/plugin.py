"""A pytest plugin that runs PEFT's tests with NB-LoRA in place of one of its methods.

The runner starts pytest with it and tells it by environment variables what to do: see `Order`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import peft
import pytest

from conformance import hub, substitution
from nblora import NBLoraConfig

STRICT = "[XPASS(strict)]"  # how pytest starts the report of a test that passes against expectation
ORDER_VARIABLE = "NBLORA_CONFORMANCE_ORDER"


@dataclasses.dataclass(frozen=True)
class Order:
    """What one run of pytest is to do, as JSON in the environment, where xdist's workers see it too."""

    method: str  # what NB-LoRA stands in for: "delora" or "lora"
    version: str  # PEFT's, which must be the one that is imported
    skips: dict[str, str]  # pattern of test names: why they are expected to fail
    never_run: list[str]  # those of the patterns whose tests are not even tried
    report: str  # path of the JSON file with the results

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def of_environment() -> Order:
        return Order(**json.loads(os.environ[ORDER_VARIABLE]))


def matching(name: str, patterns: Any) -> str | None:
    """The first of the patterns ("*" is anything, brackets are themselves) that matches the test's name."""
    for pattern in patterns:
        if fnmatch.fnmatchcase(name, pattern.replace("[", "[[]")):
            return str(pattern)
    return None


def test_name(nodeid: str) -> str:
    """A test's name without the folder: file::class::function[row]."""
    return nodeid.split("tests/", 1)[-1]


class _AllThere(defaultdict[str, int]):
    """Says of every model that it has been loaded before."""

    def __contains__(self, name: object) -> bool:
        return True


class _LoraModule(ModuleType):
    """peft.tuners.lora with NB-LoRA's layers in it."""

    def __getattr__(self, name: str) -> Any:
        return substitution.our_layer(getattr(peft.tuners.lora, name))


class Conformance:
    def __init__(self, order: Order) -> None:
        self.order = order
        self.running = False
        self.made = 0  # NBLoraConfigs since the test began
        self.outcomes: dict[str, tuple[str, str]] = {}
        self.stand_in = substitution.stand_in(order.method, self.no_counterpart)
        self.original = substitution.ORIGINALS[order.method]
        self.word = re.compile(rf"\b{self.original.__name__}\b")

    def install(self) -> None:
        """Put the stand-in where PEFT's tests import the original from."""
        from nblora.tuner import NBLoraModel

        check = NBLoraConfig.__post_init__

        def counted(config: NBLoraConfig) -> None:
            self.made += 1
            check(config)

        NBLoraConfig.__post_init__ = counted
        setattr(peft, self.original.__name__, self.stand_in)
        datasets.load_dataset = hub.load_dataset
        if self.order.method == "delora":
            import peft.tuners.delora.model as model

            model.TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING = NBLoraModel.target_module_mapping
        elif self.order.method == "lora":
            import peft.tuners.lora.model as model

            NBLoraModel.target_module_mapping = model.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def substitute_in(self, module: ModuleType) -> None:
        """Make a test module look for NB-LoRA's layers where it looks for LoRA's."""
        if self.order.method != "lora":
            return
        for name, value in vars(module).items():
            if value is peft.tuners.lora:
                setattr(module, name, _LoraModule("peft.tuners.lora"))
            else:
                setattr(module, name, substitution.our_layer(value))

    def no_counterpart(self, error: substitution.NoCounterpartError) -> None:
        # rows of a matrix made on import stay the original's and are not collected
        if self.running:
            pytest.skip(f"no counterpart in NB-LoRA: {error}")

    def is_ours(self, value: Any) -> bool:
        return value is self.stand_in or isinstance(value, self.stand_in)

    def is_another_method(self, value: Any) -> bool:
        if isinstance(value, type):
            return issubclass(value, peft.PeftConfig) and value is not self.stand_in
        return isinstance(value, peft.PeftConfig) and not isinstance(value, self.stand_in)

    def concerns_us(self, item: pytest.Item) -> bool:
        """Whether a test is about the substituted method.

        A test with rows is, if its row names the method; one without, if its code does, or a fixture or
        helper that it uses.
        """
        values = item.callspec.params.values() if hasattr(item, "callspec") else []
        if substitution.holds(values, self.is_ours):
            return self.is_translatable(values)
        if substitution.holds(values, self.is_another_method):
            return False
        code = inspect.getsource(inspect.unwrap(item.function))
        fixtures = item._fixtureinfo.name2fixturedefs if hasattr(item, "_fixtureinfo") else {}
        for name in item.fixturenames if fixtures else ():
            for fixture in fixtures.get(name, ())[-1:]:
                code += _code(fixture.func)
        for name, helper in vars(item.cls or object).items():
            if re.search(rf"\bself\.{name}\b", code):
                code += _code(helper)
        return self.word.search(code) is not None

    def is_translatable(self, values: Any) -> bool:
        for value in values:
            if isinstance(value, dict) and value and all(isinstance(part, dict) for part in value.values()):
                if not self.is_translatable(value.values()):  # options for the parts of a pipeline
                    return False
            elif isinstance(value, dict):
                try:
                    substitution.translated(self.order.method, value)
                except substitution.NoCounterpartError:
                    return False
        return True

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        # PEFT's tests go online for the first use of every model; here all are in the cache
        sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = _AllThere(int)
        for name, module in list(sys.modules.items()):
            if name.startswith("tests."):
                self.substitute_in(module)
        kept = [item for item in items if self.concerns_us(item)]
        keeps = set(map(id, kept))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in keeps])
        items[:] = kept
        for item in items:
            pattern = matching(test_name(item.nodeid), self.order.skips)
            if pattern is not None:
                run = pattern not in self.order.never_run
                reason = self.order.skips[pattern]
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True, run=run))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.running = True
        self.made = 0
        try:
            return (yield)
        finally:
            self.running = False

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        values = item.callspec.params.values() if hasattr(item, "callspec") else []
        given = substitution.holds(values, lambda value: isinstance(value, NBLoraConfig))
        if not self.made and not given:
            raise AssertionError("the test must make an NBLoraConfig to say something of NB-LoRA")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        name = test_name(report.nodeid)
        if hasattr(report, "wasxfail"):
            outcome, why = "xfailed", report.wasxfail
        elif str(report.longrepr).startswith(STRICT):
            outcome, why = "xpassed", str(report.longrepr).removeprefix(STRICT).strip()
        elif report.skipped:
            outcome, why = "skipped", str(report.longrepr[-1]).removeprefix("Skipped: ")
        else:
            outcome, why = report.outcome, _last_line(report)
        if self.outcomes.get(name, ("passed", ""))[0] != "failed":
            self.outcomes[name] = (outcome, why)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            Path(self.order.report).write_text(json.dumps(self.outcomes, indent=1), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        reasons = Counter(why for outcome, why in self.outcomes.values() if outcome == "skipped")
        for why, count in reasons.most_common():
            terminalreporter.write_line(f"skipped by PEFT's rules: {count} x {why}")


def _code(function: Any) -> str:
    """The source of a function, if it has one."""
    try:
        return inspect.getsource(inspect.unwrap(getattr(function, "__func__", function)))
    except TypeError:
        return ""


def _last_line(report: pytest.TestReport) -> str:
    lines = str(getattr(report.longrepr, "reprcrash", report.longrepr) or "").strip().splitlines()
    return lines[0] if lines else ""


def pytest_configure(config: pytest.Config) -> None:
    order = Order.of_environment()
    if peft.__version__ != order.version:
        raise pytest.UsageError(f"PEFT must be {order.version}, got {peft.__version__} in {peft.__file__}")
    conformance = Conformance(order)
    conformance.install()
    config.pluginmanager.register(conformance, "nblora-conformance")
