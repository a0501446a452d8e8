"""The commands for LoRA files: what they say, and one line for what they cannot use."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

from conftest import TwoLayers
from lora_samples import CONFIG, WEIGHTS, change_config, factors, peft_folder
from nblora import NBLoraConfig, certify, clip_lora, inspect_lora
from nblora.cli import app
from nblora.demo import small_vit


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A PEFT LoRA on the two layers of `TwoLayers`, one of them far too large."""
    base = TwoLayers()
    layers = {
        name: factors(*getattr(base, name).weight.shape, 2, size, seed=i)
        for i, (name, size) in enumerate([("first", 0.5), ("second", 50.0)])
    }
    return peft_folder(tmp_path / "lora", layers, r=2, lora_alpha=2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(TwoLayers().state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = NBLoraConfig(r=3, init_weights=False, target_modules=["first", "second"])
    get_peft_model(TwoLayers(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_inspect_shows_the_most_dangerous_layer_first(
    lora: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    result = run("inspect", lora, "--base", base, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    assert result.stdout.index("second") < result.stdout.index("first")
    assert "Most dangerous is 'second'" in result.stdout
    assert "vLLM" in result.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    both = run("inspect", lora, adapter, "--json")
    assert both.exit_code == 0
    first, second = json.loads(both.stdout)
    assert first == json.loads(inspect_lora(lora).to_json())
    assert (first["layout"], second["layout"]) == ("peft", "nblora")


def test_clip_is_the_function(lora: Path, base: Path, tmp_path: Path) -> None:
    result = run("clip", lora, tmp_path / "out", "--bound", 1)
    assert result.exit_code == 0, result.output
    assert "1 of 2 layers were outside their bound" in result.stdout
    clip_lora(lora, tmp_path / "same", bound=1.0)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "same" / WEIGHTS).read_bytes()
    options = ["--bound", 0.3, "--norm", 2, "--relative", "--base", base, "--json"]
    result = run("clip", lora, *options)  # in place
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["norm_name"] == "frobenius"
    assert all(layer["after"] <= layer["bound"] for layer in report["layers"])
    assert not any(layer["changed"] for layer in json.loads(run("clip", lora, *options).stdout)["layers"])


def test_import_writes_an_adapter_that_loads(lora: Path, base: Path, tmp_path: Path) -> None:
    result = run("import", lora, tmp_path / "out", "--bound", 0.5, "--base", base, "--parametrization", "svd")
    assert result.exit_code == 0, result.output
    assert "2 of 2 layers were outside" in result.stdout or "1 of 2 layers were outside" in result.stdout
    model = PeftModel.from_pretrained(TwoLayers(), tmp_path / "out")
    assert model.peft_config["default"].parametrization == "svd"
    assert certify(model).holds
    result = run("import", lora, tmp_path / "out", "--bound", 9, "--absolute", "--norm", "spectral", "--json")
    assert [layer["changed"] for layer in json.loads(result.stdout)["layers"]] == [False, True]


def test_export_says_which_engines_take_it(adapter: Path, tmp_path: Path) -> None:
    result = run("export", adapter, tmp_path / "lora", "--rank", 8)
    assert result.exit_code == 0, result.output
    assert all(engine in result.stdout for engine in ("vLLM", "SGLang", "llama.cpp"))
    assert "keep their bound" in result.stdout
    result = run("export", adapter, tmp_path / "lora", "--json", "--dtype", "bfloat16")
    parsed = json.loads(result.stdout)
    assert parsed["certificate"]["holds"] is True
    assert [verdict["accepts"] for verdict in parsed["engines"]] == [True, True, True]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_export_for_pipelines(layout: str, adapter: Path, tmp_path: Path) -> None:
    missing = run("export", adapter, tmp_path / "lora", "--layout", layout)
    assert missing.exit_code == 2
    assert "component must name the component of the pipeline" in missing.stderr
    assert not (tmp_path / "lora").exists()
    result = run("export", adapter, tmp_path / "lora", "--layout", layout, "--component", "unet")
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "lora").iterdir()
    assert all(key.startswith(("unet.", "lora_unet_")) for key in load_file(file))
    assert certify(file).holds


# --- mistakes ---


@pytest.fixture
def broken(lora: Path, adapter: Path, base: Path, tmp_path: Path) -> Iterator[Path]:
    """Files with one mistake each; nothing of them changes and nothing is added."""
    tensors = load_file(lora / WEIGHTS)
    key = "base_model.model.second.lora_B.weight"

    def peft(name: str, change: dict[str, torch.Tensor] | None = None, **config: object) -> None:
        (tmp_path / name).mkdir()
        save_file(tensors | (change or {}), tmp_path / name / WEIGHTS)
        (tmp_path / name / CONFIG).write_text((lora / CONFIG).read_text())
        change_config(tmp_path / name, **config)

    peft("nan", {key: torch.full_like(tensors[key], torch.nan)})
    peft("shapes", {key: tensors[key][:, :1].clone()})
    peft("rank", r=0)
    peft("dora", use_dora=True)
    peft("fields")
    config = json.loads((tmp_path / "fields" / CONFIG).read_text())
    del config["lora_alpha"]
    (tmp_path / "fields" / CONFIG).write_text(json.dumps(config))
    (tmp_path / "cut.safetensors").write_bytes((lora / WEIGHTS).read_bytes()[:-9])
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)))
    save_file({"a.weight": torch.ones(2)}, tmp_path / "none.safetensors")
    save_file({"first.weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    torch.save({}, tmp_path / "pickle.bin")

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    before = contents()
    yield tmp_path
    assert contents() == before, "nothing is written"


MISTAKES = {
    "nan": ("nan", ["second.lora_B.weight"]),
    "mismatched shapes": ("shapes", ["second.lora_B.weight", "with the same k"]),
    "rank 0": ("rank", ["must have an integer r >= 1, got r=0"]),
    "DoRA": ("dora", ["must not use DoRA"]),
    "missing field": ("fields", ["must have r and lora_alpha, got none of lora_alpha"]),
    "truncated": ("cut.safetensors", ["must be an intact safetensors file"]),
    "corrupt": ("noise.safetensors", ["must be an intact safetensors file"]),
    "no LoRA": ("none.safetensors", ["must have LoRA factors"]),
    "pickle": ("pickle.bin", ["pickled weights are never loaded"]),
    "nowhere": ("no such file", ["must be a folder or a hub repository"]),
}


@pytest.mark.parametrize("command", ["inspect", "clip", "import"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_file(mistake: str, command: str, broken: Path) -> None:
    name, parts = MISTAKES[mistake]
    options = {
        "inspect": [],
        "clip": [broken / "out", "--bound", 1],
        "import": [broken / "out", "--bound", 1, "--absolute"],
    }[command]
    one_line(run(command, broken / name, *options), name, *parts)


def one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout.strip() == ""
    assert result.stderr.startswith("nblora: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def test_other_mistakes(broken: Path, lora: Path, adapter: Path) -> None:
    target = broken / "out"
    one_line(run("clip", lora, target, "--bound", 1, "--relative"), "a relative bound needs the base model")
    one_line(
        run("clip", lora, target, "--bound", 1, "--relative", "--base", broken / "other.safetensors"),
        "other.safetensors",
        "'first'",
        "is it the base model of this adapter?",
    )
    one_line(run("clip", lora, target, "--bound", -1), "bound must be a number, positive and finite")
    one_line(run("clip", lora, target, "--bound", 1, "--norm", "frob"), "norm must be")
    one_line(run("clip", adapter, target, "--bound", 1), "must be of a LoRA, got peft_type='NBLORA'")
    one_line(run("clip", lora, "/proc/no/such", "--bound", 1), "/proc/no/such cannot be written")
    one_line(
        run("import", lora, "/proc/no/such", "--bound", 1, "--absolute"), "/proc/no/such cannot be written"
    )
    one_line(
        run("export", adapter, target, "--layout", "webui"), "layout must be one of peft, diffusers, kohya"
    )
    one_line(run("export", adapter, target, "--rank", 0), "rank must be an integer >= 1, got rank=0")
    one_line(run("export", adapter, target, "--rank", 1), "rank must be at least the rank of every update")
    one_line(run("inspect", lora, "--plot", broken / "plot.doc"), "a plot must be a .png, .pdf or .svg file")


def test_names_with_brackets_are_printed_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In colours too, where Rich would take them for its markup."""
    monkeypatch.chdir(tmp_path)
    name = "br[/x]ack"
    config = NBLoraConfig(r=2, init_weights=False, target_modules=["0"])
    get_peft_model(nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4))}), config).save_pretrained("a[/b]")
    for colours in ({}, {"FORCE_COLOR": "1", "COLUMNS": "150"}):
        for command in (["certify", "a[/b]"], ["export", "a[/b]", "out[/c]"], ["inspect", "out[/c]"]):
            result = CliRunner().invoke(app, command, env=colours)
            assert result.exit_code == 0, result.output
            assert name in result.stdout
            assert command[-1] in result.stdout


def test_certify_is_plain_text_in_a_pipe(adapter: Path) -> None:
    certificate = certify(adapter)
    assert run("certify", adapter).stdout == f"Certificate of {adapter}\n\n{certificate.to_table()}\n"


def test_a_crash_is_no_broken_bound(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(path: str) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr("nblora.certify", crash)
    result = run("certify", adapter)
    assert result.exit_code == 2
    assert "ZeroDivisionError: a mistake of ours" in result.stderr


def test_a_hub_name_cannot_be_clipped_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(run("clip", "someone/lora", "--bound", 1), "OUT must be given", "got 'someone/lora'")
    assert not list(tmp_path.iterdir())


def test_help_says_defaults_and_limits() -> None:
    """In brackets they would be markup, and not be there."""
    helps = {command: run(command, "--help").stdout for command in ("compare", "export")}
    texts = {command: " ".join(re.sub(r"[│\n]", " ", text).split()) for command, text in helps.items()}
    assert all(f"Default: {value}." in texts["compare"] for value in ("nblora,lora", "8", "full"))
    assert "Default: the largest of the adapter." in texts["export"]
    assert "Not for convolutions with groups, dilation or padding other than with zeros" in texts["export"]


def test_the_commands_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "lora-files.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("nblora ")]
    assert [command.split()[1] for command in commands] == ["inspect", "clip", "import", "export"]
    monkeypatch.chdir(tmp_path)
    small_vit().save_pretrained("model")
    name = "vit.layers.1.attention.k_proj"
    peft_folder(Path("lora"), {name: factors(64, 64, 2, 50.0)}, r=2, lora_alpha=2)
    for command in commands:
        result = run(*shlex.split(command, comments=True)[1:])
        assert result.exit_code == 0, result.output
    assert inspect_lora("clipped", base="model").layers[0].frobenius > 0
    assert certify("adapter").holds
    assert certify("exported").holds
