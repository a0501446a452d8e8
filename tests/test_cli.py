"""The command line: exit statuses, one-line errors, and the same numbers as the functions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import nblora
from conftest import TwoLayers
from nblora import NBLoraConfig, certify
from nblora.cli import app


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A saved adapter with an absolute bound and a random update."""
    config = NBLoraConfig(
        r=3,
        norm="spectral",
        bound=0.5,
        bound_kind="absolute",
        init_weights=False,
        target_modules=["first", "second"],
    )
    get_peft_model(TwoLayers(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter: Path, key: str, function) -> None:
    """Rewrite one tensor of a saved adapter."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    matching = [name for name in tensors if name.endswith(key)]
    assert matching, f"no tensor {key}"
    tensors[matching[0]] = function(tensors[matching[0]])
    save_file(tensors, file)


def test_certify_prints_every_layer_and_exits_0(adapter: Path) -> None:
    result = run("certify", adapter)
    assert result.exit_code == 0
    for layer in certify(adapter).layers:
        assert layer.name in result.stdout
        assert f"{layer.norm:.4g}" in result.stdout
    assert "All 2 layers keep their bound" in result.stdout


def test_certify_json_is_the_certificate(adapter: Path) -> None:
    result = run("certify", adapter, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(certify(adapter).to_json())


@pytest.mark.parametrize(
    ("key", "function"),
    [
        ("first.nblora_radius.weight", lambda t: 3 * t),
        ("first.nblora_in.weight", lambda t: torch.full_like(t, torch.nan)),
    ],
    ids=["radius above the promise", "NaN"],
)
def test_certify_exits_1_for_a_broken_bound(adapter: Path, key: str, function) -> None:
    change(adapter, key, function)
    result = run("certify", adapter)
    assert result.exit_code == 1
    assert "NO" in result.stdout
    assert "1 of 2 layers break their bound" in result.stdout
    assert json.loads(run("certify", adapter, "--json").stdout)["holds"] is False


def test_unreadable_input_is_one_line_on_stderr_and_exits_2(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for path in (tmp_path / "nowhere", tmp_path, adapter):
        result = run("certify", path)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("nblora: ")
        assert result.stderr.count("\n") == 1
        assert str(path) in result.stderr


def test_export_writes_a_lora_that_certifies(adapter: Path, tmp_path: Path) -> None:
    result = run("export", adapter, tmp_path / "lora", "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert certify(tmp_path / "lora").holds
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_export_refuses_an_unknown_dtype(adapter: Path, tmp_path: Path) -> None:
    result = run("export", adapter, tmp_path / "lora", "--dtype", "int8")
    assert result.exit_code == 2
    assert "int8" in result.stderr
    assert not (tmp_path / "lora").exists()


def test_demo_refuses_a_bad_bound_before_training(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path / "demo", "--bound", "-1")
    assert result.exit_code == 2
    assert "bound must be" in result.stderr
    assert not (tmp_path / "demo").exists()


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == f"nblora {nblora.__version__}"
    text = run("--help").stdout
    assert all(command in text for command in ("certify", "demo", "export"))


def test_module_runs_as_a_command_and_keeps_the_exit_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nblora", "certify", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("nblora: ")


def test_missing_typer_is_one_clear_line() -> None:
    """As where only the mathematics is installed."""
    code = "import sys; sys.modules['typer'] = None; from nblora.__main__ import main; main()"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stderr.strip() == "The nblora command needs Typer and Rich: pip install 'nblora[cli]'"
