"""`nblora merge` and `nblora privacy`: what they say, what of it may be published, one line for mistakes."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from conftest import TwoLayers, tiny_llama
from lora_samples import WEIGHTS, change_config
from nblora import NBLoraConfig, certify, merge_adapters
from nblora.cli import app
from nblora.merging import public_layers, writing
from nblora.privacy import PrivacyLedger

ROOT = Path(__file__).parent.parent
ISSUE = (
    "nblora merge A B C -o OUT --private --epsilon 4 --delta 1e-5 --adjacency add-remove "
    "--ledger ledger.json --rank 16"
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def command(text: str, *more: object) -> Result:
    return run(*shlex.split(text)[1:], *more)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters A, B, C and what the server handed out."""
    folder = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(["A", "B", "C", "reference"]):
        torch.manual_seed(7)
        base = TwoLayers()
        torch.manual_seed(seed)
        config = NBLoraConfig(r=3, bound=0.5, init_weights=False, target_modules=["first", "second"])
        get_peft_model(base, config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with them in it."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- plain ---


def test_merge_is_the_function(here: Path) -> None:
    result = command("nblora merge A B C -o OUT")
    assert result.exit_code == 0, result.output
    assert "3 adapters are merged into 2 layers of rank 9. Wrote a plain LoRA to OUT." in result.stdout
    assert "Merged into OUT" in result.stdout
    merge_adapters(["A", "B", "C"], "same")
    assert Path("OUT", WEIGHTS).read_bytes() == Path("same", WEIGHTS).read_bytes()


def test_options_of_a_plain_merge(here: Path) -> None:
    options: dict[str, Any] = {"rank": 2, "bound": 0.01, "norm": "spectral", "dtype": "bfloat16"}
    result = command(
        "nblora merge A B C -o OUT --weights=-0.5,2,1 --rank 2 --bound 0.01 --norm spectral "
        "--dtype bfloat16 --layout kohya --component unet --json"
    )
    assert result.exit_code == 0, result.output
    report = merge_adapters(
        ["A", "B", "C"], "same", weights=[-0.5, 2, 1], layout="kohya", component="unet", **options
    )
    assert json.loads(result.stdout) == json.loads(report.to_json())
    (file,) = Path("OUT").iterdir()
    assert file.read_bytes() == Path("same", file.name).read_bytes()
    save_file(TwoLayers().state_dict(), "base.safetensors")
    result = command(
        "nblora merge A B -o pruned --method dare_ties --density 0.5 --seed 3 --rank 0.99 --relative "
        "--bound 0.1 --base base.safetensors"
    )
    assert result.exit_code == 0, result.output
    merge_adapters(
        ["A", "B"],
        "same-pruned",
        method="dare_ties",
        density=0.5,
        seed=3,
        rank=0.99,
        bound=0.1,
        bound_kind="relative",
        base="base.safetensors",
    )
    assert Path("pruned", WEIGHTS).read_bytes() == Path("same-pruned", WEIGHTS).read_bytes()


# --- private ---


def test_the_command_of_the_issue(here: Path) -> None:
    result = command(ISSUE)
    assert result.exit_code == 0, result.output
    started = "Started the ledger"
    for text in (
        f"{started} {here / 'ledger.json'} with the budget epsilon 4 at delta 1e-05 under add-remove.",
        "2 noised layers of rank 12.",  # of 16 that a layer of 20 × 12 has
        "(4, 1e-05)-differentially private under add-remove; mu 0.9249",
        "Spent so far: epsilon 4 of 4 at delta 1e-05, in 1 releases.",
        "Wrote OUT.",
        "sensitivity",
        "noise τ",
    ):
        assert text in result.stdout
    assert "accepted" not in result.stdout
    assert "PRIVATE, do not publish: what the guard found" in result.stderr
    assert "PRIVATE, do not publish: 3 accepted." in result.stderr
    assert certify("OUT").holds
    assert PrivacyLedger("ledger.json").spent().releases == 1
    again = command(ISSUE.replace("OUT", "again"))
    assert again.exit_code == 2
    assert again.stderr.splitlines()[-1].startswith("nblora: the total epsilon must stay within 4.0")
    assert not Path("again").exists()


def test_the_command_of_the_issue_without_its_options(here: Path) -> None:
    """No --private; and private without --rank, with the base model that the adapters name."""
    assert command("nblora merge A B C -o plain --rank 16").exit_code == 0
    tiny_llama().save_pretrained("model")
    for seed, name in enumerate("DEF"):
        torch.manual_seed(seed)
        config = NBLoraConfig(r=3, init_weights=False, target_modules=["q_proj"])
        get_peft_model(tiny_llama(), config).save_pretrained(name)
        change_config(Path(name), base_model_name_or_path="model")
    result = command(
        "nblora merge D E F -o OUT --private --epsilon 4 --delta 1e-5 --adjacency add-remove "
        "--ledger ledger.json"
    )
    assert result.exit_code == 0, result.output
    assert "The base weights of model with 2 noised updates." in result.stdout
    before, after = load_file("model/model.safetensors"), load_file("OUT/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_options_of_a_private_merge(here: Path) -> None:
    Path("C", WEIGHTS).write_bytes(b"nothing")
    result = command(
        "nblora merge A B C gone -o OUT --private --epsilon 2 --delta 1e-6 --adjacency add-remove "
        "--rank 4 --reference reference --on-excess project --clients 8 --budget 9 --ledger l.json "
        "--sampling-probability 0.5 --no-project --dtype float16 --json"
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert (content["n_total"], content["budget"], content["rank"]) == (8, 9.0, 4)
    assert (content["projected"], content["started"], content["sampling_probability"]) == (False, True, 0.5)
    assert content["spent"]["epsilon"] < 2
    assert "clients" not in json.dumps(content)
    lines = {line.split()[0]: line for line in result.stderr.splitlines() if line.startswith(("A", "C", "g"))}
    assert "accepted" in lines["A"]
    assert "refused" in lines["C"]
    assert "absent" in lines["gone"]
    bounds = public_layers("reference").frobenius
    assert [layer["bound"] for layer in content["layers"]] == pytest.approx(list(bounds.values()))
    tensors = load_file(Path("OUT", WEIGHTS))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.mark.filterwarnings("default:seeded noise:UserWarning")
def test_seeded_noise_is_loud(here: Path) -> None:
    private = "--private --epsilon 4 --delta 1e-5 --adjacency add-remove --rank 4 --seed-noise 1"
    results = [command(f"nblora merge A B -o {name} {private} --ledger {name}.json") for name in "xy"]
    for result in results:
        assert result.exit_code == 0, result.output
        assert "nblora: seeded noise is for tests and studies" in result.stderr
        assert "SEEDED NOISE: whoever knows the seed subtracts it" in result.stdout
    assert Path("x", WEIGHTS).read_bytes() == Path("y", WEIGHTS).read_bytes()
    assert "SEEDED NOISE was among them" in run("privacy", "--ledger", "x.json").stdout


def test_a_release_that_is_lost_ends_with_1(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(writing.LoraWriter, "finish", fails)
    result = command(ISSUE)
    assert result.exit_code == 1
    assert "its budget stays spent" in result.stderr
    assert "disk full" in result.stderr
    assert PrivacyLedger("ledger.json").spent().releases == 1
    assert not Path("OUT").exists()


def test_ctrl_c_says_what_stays_spent(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.LoraWriter, "add", stopped)
    result = command(ISSUE)
    assert result.exit_code == 130
    assert (
        "nblora: stopped; nothing is written, and what the ledger counts as spent stays spent"
        in result.stderr
    )
    assert not Path("OUT").exists()
    assert PrivacyLedger("ledger.json").spent().releases == 1


# --- mistakes ---

PRIVATE = "--private --epsilon 4 --delta 1e-5 --adjacency add-remove --rank 4"
MISTAKES = {
    "privacy without asking": ("A B -o OUT --epsilon 4", "--epsilon needs --private"),
    "a ledger without asking": ("A B -o OUT --ledger l.json", "--ledger needs --private"),
    "a reference without asking": ("A B -o OUT --reference C", "--reference needs --private"),
    "seeded noise without asking": ("A B -o OUT --seed-noise 0", "--seed-noise needs --private"),
    "no projection without asking": ("A B -o OUT --no-project", "--project needs --private"),
    "private without a guarantee": ("A B -o OUT --private", "--private needs --epsilon and --delta and"),
    "private without neighbours": (
        "A B -o OUT --private --epsilon 1 --delta 1e-5",
        "--private needs --adjacency",
    ),
    "a method that has no sensitivity": (
        f"A B -o OUT {PRIVATE} --method ties",
        "--method must not be given with --private",
    ),
    "a density": (f"A B -o OUT {PRIVATE} --density 0.5", "--density must not be given with --private"),
    "a seed of DARE": (f"A B -o OUT {PRIVATE} --seed 1", "--seed must not be given with --private"),
    "a relative bound": (f"A B -o OUT {PRIVATE} --relative", "--relative must not be given with --private"),
    "a share as a private rank": (f"A B -o OUT {PRIVATE} --rank 0.9", "rank must be an integer >= 1"),
    "no rank and no base": (
        "A B -o OUT --private --epsilon 1 --delta 1e-5 --adjacency add-remove",
        "rank must be given for an adapter, or for base weights a folder as base",
    ),
    "no number as a weight": ("A B -o OUT --weights 1,many", "--weights must be of numbers, got 'many'"),
    "no number as a rank": ("A B -o OUT --rank many", "--rank must be of numbers, got 'many'"),
    "too few weights": ("A B -o OUT --weights 1", "weights must be one finite number for each of 2"),
    "an epsilon that is none": (f"A B -o OUT {PRIVATE} --epsilon nan", "epsilon must be positive and finite"),
    "unknown neighbours": (f"A B -o OUT {PRIVATE} --adjacency both", "adjacency must be"),
    "another budget": (
        f"A B -o OUT {PRIVATE} --ledger old.json --budget 5",
        "budget must be left out or that of the ledger, 4.0, got budget=5.0",
    ),
    "no ledger": (f"A B -o OUT {PRIVATE} --ledger broken.json", "a ledger must be whole and valid"),
    "no adapter": ("A nothing -o OUT", "must be a folder or a hub repository, got 'nothing'"),
    "sampling without a denominator": (
        f"A B -o OUT {PRIVATE} --sampling-probability 0.5",
        "n_total must be given where clients are sampled",
    ),
}
PLAN = "--epsilon 4 --delta 1e-5 --clients 100 --adjacency add-remove --shape 20x30 --bound 1"
PLAN_MISTAKES = {
    "nothing": ("", "a plan needs --epsilon and --delta and --clients and --adjacency and --shape or"),
    "half a plan": ("--epsilon 4 --delta 1e-5 --ledger old.json", "a plan needs --clients and"),
    "no bound": (PLAN.replace("--bound 1", ""), "--shape needs --bound"),
    "no shape": (PLAN.replace("20x30", "20"), "--shape must be MxN, got '20'"),
    "no number": (PLAN.replace("20x30", "20xn"), "--shape must be of integers, got 'n'"),
    "both": (f"{PLAN} --reference reference", "--shape must not be given with --reference"),
    "no epsilon": (PLAN.replace("--epsilon 4", "--epsilon 4,x"), "--epsilon must be of numbers, got 'x'"),
    "no clients": (PLAN.replace("100", "1e3"), "--clients must be of integers, got '1e3'"),
    "no epsilon that is one": (PLAN.replace("--epsilon 4", "--epsilon nan"), "epsilon must be positive"),
    "a guarantee beyond float64": (
        PLAN.replace("--epsilon 4 --delta 1e-5", "--epsilon 1e-10 --delta 1e-30"),
        "tau / Delta must give at most the asked delta",
    ),
    "another picture": (f"{PLAN} --plot plot.bmp", "a plot must be a .png, .pdf or .svg file"),
    "no ledger there": ("--ledger nowhere.json", "nowhere.json"),
}


@pytest.fixture
def mistaken(here: Path) -> Iterator[Path]:
    PrivacyLedger.create("old.json", epsilon=4, delta=1e-5, adjacency="add-remove")
    Path("broken.json").write_text("{}")
    before = contents(here), {path.name for path in here.iterdir()}
    yield here
    assert (contents(here), {path.name for path in here.iterdir()}) == before, "nothing is written"


@pytest.mark.parametrize(
    ("name", "mistake"),
    [*(("merge", name) for name in MISTAKES), *(("privacy", name) for name in PLAN_MISTAKES)],
)
def test_a_mistake_is_one_line(name: str, mistake: str, mistaken: Path) -> None:
    arguments, message = (MISTAKES if name == "merge" else PLAN_MISTAKES)[mistake]
    result = run(name, *shlex.split(arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout.strip() == ""
    assert result.stderr.startswith("nblora: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


# --- plans ---


def test_a_plan_says_what_it_would_cost_and_spends_nothing(here: Path) -> None:
    result = command(
        "nblora privacy --epsilon 1,4,8 --delta 1e-5 --clients 100,500 --adjacency add-remove "
        "--shape 512x512 --bound 0.3 --norm spectral --rank 8 --plot plot.png"
    )
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    values = [row for row in rows if row and row[0] in ("1", "4", "8")]
    assert [row[:3] for row in values] == [
        [epsilon, clients, multiplier]
        for epsilon, multiplier in (("1", "3.7306"), ("4", "1.0812"), ("8", "0.6002"))
        for clients in ("100", "500")
    ]
    assert values[0][-3] == "0.8485"  # 0.3 sqrt(8)
    assert "SNR: the largest Frobenius norm that the merged update can have" in result.stdout
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")
    assert "Drew plot.png." in result.stdout


def test_a_plan_from_an_adapter_layer_by_layer(here: Path) -> None:
    options = "--delta 1e-5 --adjacency replace-one --reference reference --rounds 10"
    result = command(f"nblora privacy --epsilon 4 --clients 1000 {options}")
    assert result.exit_code == 0, result.output
    assert "Layer by layer" in result.stdout
    assert "epsilon of one" in result.stdout
    parsed = command(f"nblora privacy --epsilon 4 --clients 1000 {options} --json")
    (plan,) = json.loads(parsed.stdout)["plans"]
    public = public_layers("reference")
    assert {layer["name"]: layer["bound"] for layer in plan["layers"]} == pytest.approx(public.frobenius)
    assert plan["sensitivity"] == pytest.approx(2 * plan["signal"] / 1000)
    spectral = command(f"nblora privacy --epsilon 4 --clients 9 {options} --bound 1 --norm spectral --json")
    bounds = [layer["bound"] for layer in json.loads(spectral.stdout)["plans"][0]["layers"]]
    assert bounds == pytest.approx([3**0.5] * 2)


def test_a_ledger_is_shown(here: Path) -> None:
    command(ISSUE, "--budget", 10)
    result = run("privacy", "--ledger", "ledger.json")
    assert result.exit_code == 0, result.output
    assert (
        "ledger.json: epsilon 4 of 10 is spent at delta 1e-05 under add-remove (mu 0.9249)" in result.stdout
    )
    account = json.loads(run("privacy", "--ledger", "ledger.json", "--json").stdout)["ledger"]
    assert 7 < account["left"] < 9
    again = command(ISSUE.replace("OUT", "again").replace("epsilon 4", f"epsilon {account['left']}"))
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("name", ["merge", "privacy"])
def test_help_names_what_is_asked_for(name: str) -> None:
    text = run(name, "--help").stdout
    for option in ("--epsilon", "--delta", "--clients", "--adjacency", "--reference", "--ledger"):
        assert option in text


def test_the_commands_of_the_documentation_run(here: Path) -> None:
    """Those of docs/merging.md, docs/privacy.md and the README, as they stand there."""
    tiny_llama().save_pretrained("model")
    for seed, name in enumerate(["client-1", "client-2", "client-3", "handed-out", "adapter-a", "adapter-b"]):
        torch.manual_seed(seed)
        config = NBLoraConfig(r=4, init_weights=False, target_modules=["q_proj"])
        get_peft_model(tiny_llama(), config).save_pretrained(name)
    run_here = 0
    for page in ("README.md", "docs/merging.md", "docs/privacy.md"):
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [line for line in text.splitlines() if line.startswith(("nblora merge", "nblora privacy"))]
        assert lines, page
        for number, line in enumerate(lines):
            words = shlex.split(line, comments=True)[1:]
            if "ledger.json" in words and words[0] == "merge":
                Path("ledger.json").unlink(missing_ok=True)
            words = [f"{page[-9:-3]}-{number}" if word == "merged-model" else word for word in words]
            result = run(*words)
            assert result.exit_code == 0, f"{line}\n{result.output}"
            run_here += 1
    assert run_here >= 6
