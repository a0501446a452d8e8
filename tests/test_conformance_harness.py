"""The harness that runs PEFT's own tests, itself tested: without network and without those tests."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import peft
import pytest
from peft.tuners import lora

from conformance import __main__ as runner
from conformance import fetch, matrices, plugin, substitution
from conformance.matrices import Matrix, Skip
from conformance.plugin import Order, matching
from nblora import NBLoraConfig, tuner


def raise_it(error: substitution.NoCounterpartError) -> None:
    raise error


class TestTranslation:
    def test_options_of_delora(self):
        options = {"r": 2, "delora_lambda": 7.0, "module_dropout": 0.1, "bias": "delora_only"}
        expected = {"r": 2, "bound": 7.0, "dropout": 0.1, "bias": "nblora_only"}
        assert substitution.translated("delora", options) == expected

    def test_options_of_lora(self):
        options = {
            "r": 2,
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "init_lora_weights": False,
            "use_dora": False,
        }
        ours = substitution.translated("lora", options)
        assert ours == {**substitution.DEFAULTS["lora"], "r": 2, "dropout": 0.1, "init_weights": False}

    @pytest.mark.parametrize(
        "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"alpha_pattern": {"lin0": 3}}]
    )
    def test_options_without_counterpart_are_refused(self, options):
        with pytest.raises(substitution.NoCounterpartError):
            substitution.translated("lora", options)

    @pytest.mark.parametrize("method", ["delora", "lora", "lokr"])
    def test_every_target_is_an_option_of_ours_or_the_row_is_dropped(self, method):
        ours = NBLoraConfig.__dataclass_fields__
        missing = {name for name in substitution.NAMES[method].values() if name not in ours}
        assert missing <= {"ensure_weight_tying"}

    def test_stand_in_makes_our_configuration_and_recognises_it(self):
        stand_in = substitution.stand_in("lora", raise_it)
        config = stand_in(r=3, lora_dropout=0.25, target_modules=["lin0"])
        assert type(config) is NBLoraConfig
        assert (config.r, config.dropout) == (3, 0.25)
        assert isinstance(config, stand_in)
        assert issubclass(stand_in, peft.PeftConfig)
        assert not isinstance(peft.LoraConfig(), stand_in)
        assert not issubclass(peft.AdaLoraConfig, stand_in)

    def test_stand_in_falls_back_to_the_original_where_that_is_allowed(self):
        stand_in = substitution.stand_in("lora", lambda error: None)
        assert type(stand_in(use_dora=True)) is peft.LoraConfig
        with pytest.raises(substitution.NoCounterpartError):
            substitution.stand_in("lora", raise_it)(use_dora=True)

    def test_names_and_layers(self):
        source = 'assert "lin0.lora_A.default" in x and layer.lora_B and "delora_A" and kind == "lora.Linear"'
        expected = (
            'assert "lin0.nblora_in.default" in x and layer.nblora_out and "delora_A" '
            'and kind == "nblora.NBLoraLinear"'
        )
        assert substitution.renamed(source, "lora") == expected
        assert substitution.renamed(source, "delora") == source
        assert substitution.our_layer(lora.Linear) is tuner.NBLoraLinear
        assert substitution.our_layer(lora.LoraConfig) is lora.LoraConfig


class TestVerdict:
    MATRIX = Matrix("lora", {"test_a.py": 2})

    def test_enough_passed(self):
        outcomes = {"test_a.py::one": ("passed", ""), "test_a.py::two": ("passed", "")}
        assert runner.faults(self.MATRIX, outcomes) == []

    def test_nothing_collected_fails(self):
        assert runner.faults(self.MATRIX, {}) == ["of test_a.py at least 2 tests must pass, got 0"]

    def test_failures_and_unexpected_passes_fail(self):
        outcomes = {
            "test_a.py::one": ("failed", "why"),
            "test_a.py::two": ("xpassed", "known"),
            "test_a.py::three": ("passed", ""),
            "test_a.py::four": ("passed", ""),
        }
        assert runner.faults(self.MATRIX, outcomes) == [
            "failed: test_a.py::one: why",
            "passed, though expected to fail (known): test_a.py::two",
        ]

    @pytest.mark.parametrize("outcome", ["passed", "skipped", None])
    def test_a_skip_that_excuses_nothing_is_stale(self, monkeypatch, outcome):
        monkeypatch.setattr(runner, "MATRICES", {"m": self.MATRIX})
        monkeypatch.setattr(runner, "SKIPS", (Skip("*::one", "reason", ("lora",)),))
        outcomes = {} if outcome is None else {"test_a.py::one": (outcome, "")}
        assert runner.stale({"m": outcomes}) == ["stale skip, no failing test matches: *::one"]

    @pytest.mark.parametrize("outcome", ["xfailed", "skipped"])
    def test_a_skip_that_is_never_run_needs_only_a_match(self, monkeypatch, outcome):
        monkeypatch.setattr(runner, "MATRICES", {"m": self.MATRIX})
        monkeypatch.setattr(runner, "SKIPS", (Skip("test_a.py::one", "reason", ("lora",), run=False),))
        assert runner.stale({"m": {"test_a.py::one": (outcome, "")}}) == []
        assert runner.stale({"m": {"test_a.py::two": (outcome, "")}})

    def test_a_skip_is_not_stale_where_it_is_needed_or_not_concerned(self, monkeypatch):
        monkeypatch.setattr(runner, "MATRICES", {"m": self.MATRIX})
        skips = (
            Skip("test_a.py::one", "needed", ("lora",)),
            Skip("test_a.py::one", "of another method", ("delora",)),
            Skip("test_b.py::one", "of another file", ("lora",)),
        )
        monkeypatch.setattr(runner, "SKIPS", skips)
        assert runner.stale({"m": {"test_a.py::one": ("xfailed", "needed")}}) == []

    def test_patterns_take_brackets_as_they_are(self):
        assert matching("test_a.py::C::one[x-y]", ["test_a.py::C::one[x*"]) == "test_a.py::C::one[x*"
        assert matching("test_a.py::C::onex", ["test_a.py::C::one[x*"]) is None

    def test_every_skip_has_a_reason_a_place_and_no_double(self):
        places = {matrix.method for matrix in matrices.MATRICES.values()}
        for skip in matrices.SKIPS:
            assert skip.reason
            assert set(skip.methods) <= places
        for method in places:
            patterns = [skip.pattern for skip in matrices.SKIPS if method in skip.methods]
            assert len(patterns) == len(set(patterns))


TESTS = """
import pytest
import peft
from peft import DeloraConfig, LoraConfig, get_peft_model
from torch import nn

from . import testing_utils

ROWS = [(DeloraConfig, {"delora_lambda": 2.0}), (LoraConfig, {})]


@pytest.mark.parametrize("config_cls, options", ROWS)
def test_rows(config_cls, options):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config_cls(target_modules=["0"], **options))
    assert type(model.peft_config["default"]).__name__ == "NBLoraConfig"
    assert model.peft_config["default"].bound == 2.0


def test_without_rows():
    assert DeloraConfig(r=2).peft_type.value == "NBLORA"


def test_of_something_else():
    raise RuntimeError


def test_vacuous():
    assert "DeloraConfig"


def test_known():
    assert DeloraConfig() is None


def test_known_no_longer():
    assert DeloraConfig()
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What becomes of a test module like PEFT's, in a pytest with the plugin."""
    root = tmp_path_factory.mktemp("peft")
    (root / "tests").mkdir()
    (root / "tests" / "__init__.py").touch()
    (root / "tests" / "testing_utils.py").write_text("_HUB_MODEL_ACCESSES = {}\n")
    (root / "tests" / "test_a.py").write_text(TESTS)
    with pytest.MonkeyPatch.context() as patch:
        skips = tuple(Skip(f"test_a.py::{name}", "known") for name in ("test_known", "test_known_*"))
        patch.setattr(runner, "SKIPS", skips)
        return runner.run_matrix(
            "m",
            Matrix("delora", {"test_a.py": 2}),
            peft.__version__,
            root,
            root / "home",
            [Path(runner.__file__).parent.parent],
            [],
        )


class TestRun:
    def test_our_rows_and_tests_pass_and_others_are_not_run(self, outcomes):
        passed = {test for test, (outcome, _) in outcomes.items() if outcome == "passed"}
        assert passed == {"test_a.py::test_rows[NBLoraConfig-options0]", "test_a.py::test_without_rows"}
        assert "test_a.py::test_of_something_else" not in outcomes

    def test_a_test_that_never_meets_us_fails(self, outcomes):
        outcome, why = outcomes["test_a.py::test_vacuous"]
        assert outcome == "failed"
        assert "must make an NBLoraConfig" in why

    def test_known_failures_are_excused_only_while_they_fail(self, outcomes):
        assert outcomes["test_a.py::test_known"] == ("xfailed", "known")
        assert outcomes["test_a.py::test_known_no_longer"] == ("xpassed", "known")

    def test_another_version_of_peft_is_refused(self, tmp_path, monkeypatch, pytestconfig):
        order = Order("delora", "0.0.1", {}, [], str(tmp_path / "report.json"))
        monkeypatch.setenv(plugin.ORDER_VARIABLE, order.to_json())
        with pytest.raises(pytest.UsageError, match=r"PEFT must be 0\.0\.1, got"):
            plugin.pytest_configure(pytestconfig)


class TestFetch:
    @pytest.fixture
    def archive(self, tmp_path):
        """Like a source distribution of a version that is not pinned."""
        path = tmp_path / "peft-9.9.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name in ("tests/test_a.py", "src/peft/__init__.py", "README.md"):
                member = tarfile.TarInfo(f"peft-9.9/{name}")
                tar.addfile(member, io.BytesIO(b""))
        return path

    def test_only_the_tests_are_unpacked(self, archive, tmp_path):
        fetch.unpack_tests(archive, tmp_path / "there")
        files = {str(path.relative_to(tmp_path / "there")) for path in (tmp_path / "there").rglob("*.py")}
        assert files == {"tests/test_a.py", "tests/__init__.py"}

    def test_what_pip_resolved_is_checked(self, archive):
        fetch.check(archive, "9.9", hashlib.sha256(archive.read_bytes()).hexdigest())
        with pytest.raises(fetch.FetchError, match="which pip resolved"):
            fetch.check(archive, "9.9", "0" * 64)

    def test_what_is_pinned_is_checked(self, archive):
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        with pytest.raises(fetch.FetchError, match="which is pinned"):
            fetch.check(archive, "0.21.2", digest)

    def test_the_installed_version_is_pinned(self):
        assert peft.__version__ in fetch.SUPPORTED

    def test_fetched_tests_are_not_fetched_again(self, tmp_path, monkeypatch):
        (tmp_path / "peft-9.9" / "tests").mkdir(parents=True)
        (tmp_path / "peft-9.9" / "tests" / "__init__.py").touch()
        monkeypatch.setattr(fetch, "pip", lambda *arguments: pytest.fail("no network"))
        assert fetch.fetch_tests("peft==9.9", tmp_path) == ("9.9", tmp_path / "peft-9.9")

    def test_a_failing_pip_is_reported(self):
        with pytest.raises(fetch.FetchError, match="pip must succeed, got status"):
            fetch.pip("no-such-command")
