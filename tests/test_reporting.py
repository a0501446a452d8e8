"""Reports: the right numbers in the right places, nothing from a network, figures that a browser draws."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nblora.certificate import Certificate, LayerCertificate
from nblora.reporting import (
    comparison_figures,
    comparison_report,
    comparison_rows,
    finetune_report,
    require_libraries,
    static,
)
from nblora.reporting.answers import answer_sentence, further_sentences
from nblora.reporting.comparison_plots import curve_plot, trade_off_plot
from nblora.reporting.finetune_plots import depth_plot
from nblora.reporting.looks import HEAT, PALETTE, Style
from nblora.reporting.sweep import fronts, heat_maps, learning_rate_curves, visible_range
from nblora.reporting.words import duration_text, fixed_text, memory_text, rate_labels, rate_text, scales
from report_samples import certificate, comparison, finetuning, language_finetuning

# --- reading a report -------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would find in a report, without running it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []  # scripts and styles
        self.texts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._cells: list[tuple[list[str], int, dict[str, str | None]]] = []
        self.snippets: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self._cells.append((self.tables[-1][-1], len(self.tables[-1][-1]) - 1, dict(attrs)))
        elif tag == "br" and self.tables:
            self.tables[-1][-1][-1] += " "
        elif tag == "pre":
            self.snippets.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("script", "style"):
            tag, attributes, text = self.raw[-1]
            self.raw[-1] = (tag, attributes, text + data)
            return
        self.texts.append(data)
        if "pre" in self._open:
            self.snippets[-1] += data
        if {"th", "td"} & {*self._open}:
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        """What a reader sees, in single spaces."""
        return " ".join(" ".join(self.texts).split())

    @property
    def cells(self) -> list[tuple[str, dict[str, str | None]]]:
        """Text and attributes of all cells of tables."""
        return [(" ".join(row[place].split()), attributes) for row, place, attributes in self._cells]

    @property
    def scripts(self) -> list[str]:
        return [text for tag, attributes, text in self.raw if tag == "script" and "type" not in attributes]

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """Plotly figures by name."""
        return {
            str(attributes["id"]).removeprefix("figure-"): json.loads(text)
            for tag, attributes, text in self.raw
            if tag == "script" and attributes.get("type") == "application/json"
        }

    def table(self, first_cell: str) -> list[list[str]]:
        """The rows of the table with a row that starts with a text."""
        for table in self.tables:
            rows = [[" ".join(cell.split()) for cell in row] for row in table]
            if any(row and row[0] == first_cell for row in rows):
                return rows
        raise AssertionError(f"no table has a row {first_cell!r}")

    def row(self, first_cell: str) -> list[str]:
        return next(row for row in self.table(first_cell) if row and row[0] == first_cell)


@pytest.fixture(autouse=True)
def _without_plotly_js(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five million characters less to read, for tests that do not ask for them."""
    if "plotly_js" not in request.fixturenames:
        monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly.js */")


@pytest.fixture
def plotly_js() -> None:
    """Reports have Plotly's script."""


def finetune_page(
    folder: Path, metrics: Mapping[str, Any] | None = None, measured: Certificate | None = None
) -> Page:
    content = json.loads((measured or certificate()).to_json())
    file = finetune_report(finetuning() if metrics is None else metrics, content, folder / "report.html")
    return Page(file.read_text(encoding="utf-8"))


def comparison_page(folder: Path, content: Mapping[str, Any]) -> Page:
    file = comparison_report(content, folder / "report.html")
    return Page(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def vision() -> dict[str, Any]:
    return comparison()


@pytest.fixture(scope="module")
def language() -> dict[str, Any]:
    return comparison("nats")


# --- the report of a fine-tuning job ----------------------------------------------------------------


def test_a_classifier_s_numbers(tmp_path: Path) -> None:
    page = finetune_page(tmp_path)
    assert (
        "The model learned 76.2 points on the target and gave up 5.3 points of what it must keep."
        in page.text
    )
    assert "Target, after 86.3 % before 10.1 %, +76.2 points" in page.text
    assert "Kept, after 93.2 % before 98.5 %, −5.3 points" in page.text
    assert page.row("accuracy") == ["accuracy", "10.1 %", "86.3 %", "+76.2", "98.5 %", "93.2 %", "−5.3"]
    nats = "nats per sample (lower is better)"
    assert page.row(nats) == [nats, "2.312", "0.571", "−1.741", "0.052", "0.241", "+0.189"]
    assert "Training 1 min 23 s 19.4 % of the parameters trained" in page.text
    for fact in (
        "Model models/digits-vit",
        "Data to learn data/rotated-digits",
        "Data to keep data/upright-digits",
        "Method NB-LoRA, joint parametrization",
        "Norm frobenius",
        "Bound 0.566 × ‖W₀‖₂ of each layer",
        "Rank 8",
        "Learning rate 0.01",
        "Samples 400 training, 200 validation, 397 test, 397 kept",
        "Peak memory 411 MiB",
        "Trained parameters 24 576 of 126 794 (19.4 %)",
        "Seed 0",
    ):
        assert fact in page.text


def test_a_language_model_s_numbers(tmp_path: Path) -> None:
    page = finetune_page(tmp_path, language_finetuning())
    assert (
        "The model learned 0.304 nats on the target and gave up 0.165 nats of what it must keep." in page.text
    )
    assert "Target, after 1.810 nats before 2.114 nats, gained 0.304" in page.text
    assert "Kept, after 1.567 nats before 1.402 nats, lost 0.165" in page.text
    nats = "nats per token (lower is better)"
    assert page.row(nats) == [nats, "2.114", "1.810", "−0.304", "1.402", "1.567", "+0.165"]
    perplexity = "perplexity (lower is better)"
    assert page.row(perplexity) == [perplexity, "8.28", "6.11", "−2.17", "4.06", "4.79", "+0.73"]
    assert "Training 4 h 12 min" in page.text
    assert "Peak memory 12.4 GiB" in page.text


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ((0.101, 0.985), "learned nothing on the target and gave up nothing of what it must keep"),
        ((0.05, 0.99), "lost 5.1 points on the target and gained 0.5 points on what it must keep"),
        ((0.2, math.nan), "learned 9.9 points on the target and has no number for what it must keep."),
        ((math.nan, 0.5), "The training diverged: what the model scores on the target is not a number."),
    ],
)
def test_headlines(after: tuple[float, float], words: str, tmp_path: Path) -> None:
    scores = {name: {"score": score} for name, score in zip(("target", "keep"), after)}
    assert words in finetune_page(tmp_path, finetuning(after=scores)).text


def test_curves_are_the_history(tmp_path: Path) -> None:
    metrics = finetuning()
    figures = finetune_page(tmp_path, metrics).figures
    losses = [entry for entry in metrics["history"] if "loss" in entry]
    (loss,) = figures["loss"]["data"]
    assert loss["x"] == [entry["step"] for entry in losses]
    assert loss["y"] == [entry["loss"] for entry in losses]
    target, kept = figures["scores"]["data"]
    scored = [entry for entry in metrics["history"] if "target" in entry]
    assert (target["name"], kept["name"]) == ("target", "kept")
    assert target["y"] == pytest.approx([100 * entry["target"]["score"] for entry in scored])
    assert kept["y"] == pytest.approx([100 * entry["keep"]["score"] for entry in scored])
    ends = figures["path"]["data"][-1]
    assert (ends["x"], ends["y"]) == (pytest.approx([10.1, 86.3]), pytest.approx([98.5, 93.2]))
    band, middle = figures["used"]["data"]
    last = sorted(100 * layer["share"] for layer in metrics["spectra"][-1]["layers"].values())
    assert max(band["y"]) == pytest.approx(last[-1])
    assert middle["y"][-1] == pytest.approx((last[8] + last[9]) / 2)


def test_the_path_of_a_language_model_goes_up_and_right_when_it_improves(tmp_path: Path) -> None:
    figure = finetune_page(tmp_path, language_finetuning()).figures["path"]
    ends = figure["data"][-1]
    assert ends["x"] == pytest.approx([0, 0.304])
    assert ends["y"] == pytest.approx([0, 0.165])
    low, high = figure["layout"]["xaxis"]["range"]
    assert low < 0 < 0.304 < high
    bottom, top = figure["layout"]["yaxis"]["range"]
    assert bottom > 0.165 > 0 > top, "losses grow downward"


def test_a_loss_that_is_not_a_number_is_a_gap(tmp_path: Path) -> None:
    history = [{"step": step, "loss": loss} for step, loss in ((1, 2.0), (2, math.nan), (3, math.inf))]
    figure = finetune_page(tmp_path, finetuning(history=history)).figures["loss"]
    assert figure["data"][0]["y"] == [2.0, None, None]


def test_the_spectrum_is_the_certificate(tmp_path: Path) -> None:
    measured = certificate()
    page = finetune_page(tmp_path, measured=measured)
    bars, dots = page.figures["spectrum"]["data"]
    assert bars["y"] == pytest.approx([100 * layer.share for layer in measured.layers])
    expected = [
        (place, 100 * sigma / layer.bound)
        for place, layer in enumerate(measured.layers, start=1)
        for sigma in layer.singular_values
    ]
    assert dots["x"] == [place for place, _ in expected]
    assert dots["y"] == pytest.approx([share for _, share in expected])
    for layer, hover in zip(measured.layers, bars["hovertext"]):
        assert layer.name in hover
        assert "64 × 64, rank 8" in hover
        assert f"frobenius norm {layer.norm:.4g}" in hover
        assert f"bound {layer.bound:.4g}, used {100 * layer.share:.1f}" in hover
        assert f"{layer.singular_values[0]:.3g}" in hover
        assert "and 2 more" in hover
    assert measured.summary in page.text
    for layer, row in zip(measured.layers, page.table(measured.layers[0].name)[1:]):
        assert row == [*measured.rows()[measured.layers.index(layer) + 1]]


def test_share_over_depth_has_a_line_for_each_kind_of_layer() -> None:
    measured = certificate(3)
    plot = depth_plot(measured)
    assert plot is not None
    assert [trace["name"] for trace in plot.data] == ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    by_name = {layer.name: layer for layer in measured.layers}
    assert plot.data[4]["x"] == [0, 1, 2]
    assert plot.data[4]["y"] == pytest.approx(
        [100 * by_name[f"vit.layers.{block}.mlp.fc1"].share for block in range(3)]
    )


def layer(name: str = "a.b", norm: float = 0.1, bound: float = 0.2, **changes: Any) -> LayerCertificate:
    values = {"shape": (4, 6), "rank": 1, "singular_values": (norm,)} | changes
    return LayerCertificate(name=name, norm=norm, bound=bound, **values)


@pytest.mark.parametrize(
    "names",
    [
        ["classifier"],
        ["a.0.query.dense", "a.1.query.dense", "a.0.key.dense", "a.1.key.dense", "pooler.dense"],
        [f"model.layers.{block}.mlp.experts.{expert}.up" for block in range(3) for expert in range(16)],
        ["0", "1", "2"],
    ],
)
def test_depth_of_any_names(names: list[str]) -> None:
    plot = depth_plot(Certificate("spectral", tuple(layer(name) for name in names)))
    if len(names) == 5:
        assert plot is not None
        assert [trace["name"] for trace in plot.data] == ["query.dense", "key.dense"]
    elif names == ["0", "1", "2"]:
        assert plot is None or len(plot.data) == 1
    else:
        assert plot is None, "nothing to tell apart, or too much"


def test_one_layer_and_300_with_long_names(tmp_path: Path) -> None:
    single = finetune_page(tmp_path / "one", measured=Certificate("spectral", (layer("head"),)))
    assert len(single.figures["spectrum"]["data"][0]["x"]) == 1
    long = "model.language_model.extraordinarily_long_module_name_without_any_dot" + "x" * 80
    names = [f"{long}.{index}.projection" for index in range(300)]
    many = finetune_page(tmp_path / "many", measured=Certificate("spectral", tuple(map(layer, names))))
    hovers = many.figures["spectrum"]["data"][0]["hovertext"]
    assert len(hovers) == 300
    assert re.sub(r"<.*?>", "", hovers[299]).startswith(names[299])
    lines = hovers[299].split("<br>")
    assert max(len(re.sub(r"<.*?>", "", line)) for line in lines) <= 60, "wider than a phone"
    assert len(many.table(names[0])) == 301
    assert ("details", {"class": "panel"}) in many.elements


def test_a_broken_bound_is_loud(tmp_path: Path) -> None:
    layers = (layer("fine"), layer("broken", norm=0.5), layer("zero", norm=0.0, bound=0.0))
    measured = Certificate("spectral", (*layers, layer("worse", norm=0.1, bound=0.0)))
    page = finetune_page(tmp_path, measured=measured)
    assert "Bound on 4 layers ✗ broken the fullest uses more than all" in page.text
    assert "✗ 2 of 4 layers break their bound, first 'broken'." in page.text
    assert page.row("broken")[-2:] == ["250.0%", "NO"]
    assert page.row("zero")[-2:] == ["0.0%", "yes"]
    assert sum(attributes.get("class") == "broken" for tag, attributes in page.elements if tag == "tr") == 2
    bars, _, broken = page.figures["spectrum"]["data"]
    assert bars["y"] == [pytest.approx(50), pytest.approx(250), 0, None]
    assert broken["x"] == [2, 4]
    assert broken["y"][0] == pytest.approx(250)
    assert page.figures["spectrum"]["layout"]["yaxis"]["range"][1] > 250


def test_an_unknown_bound_does_not_hold(tmp_path: Path) -> None:
    page = finetune_page(tmp_path, measured=Certificate("spectral", (layer("lost", bound=math.nan),)))
    assert "✗ 1 of 1 layers break their bound" in page.text
    assert "used unknown" in page.figures["spectrum"]["data"][0]["hovertext"][0]


def test_bounds_in_words(tmp_path: Path) -> None:
    adapter = {"norm": "spectral", "bound": 0.2, "bound_kind": "absolute", "r": 4}
    text = finetune_page(tmp_path, finetuning(adapter=adapter), Certificate("spectral", (layer(),))).text
    assert "Bound 0.2, absolute" in text
    assert "The spectral norm of every layer's update was to stay at or under 0.2." in text
    relative = finetune_page(tmp_path).text
    assert "at or under 0.566 times the spectral norm of that layer's weight." in relative


@pytest.mark.parametrize(
    "changes",
    [
        {
            "keep": None,
            "before": {"target": {"score": 0.1}, "keep": None},
            "after": {"target": {"score": 0.2}, "keep": None},
        },
        {"history": [], "spectra": []},
        {"history": [{"step": 1, "epoch": None, "loss": None}]},
        {"before": {"target": {"score": None}, "keep": {"score": None}}},
        {"after": {"target": {}, "keep": {}}, "before": {"target": {}, "keep": {}}},
        {"before": None, "after": None, "adapter": None, "samples": None, "train": None},
        {"seconds": None, "peak_memory_bytes": None, "trainable_parameters": None, "parameters": 0},
        {"task": "something-new", "method": "LoRA"},
        {"spectra": [{"step": 1, "layers": {"a": {"share": None}}}, {"step": 2, "layers": {}}]},
    ],
    ids=lambda changes: ",".join(changes),
)
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_what_is_not_there_is_left_out(changes: dict[str, Any], layers: int, tmp_path: Path) -> None:
    measured = Certificate("spectral", tuple(layer(f"l.{i}.x") for i in range(layers)))
    page = finetune_page(tmp_path, finetuning(**changes), measured)
    assert not re.search(r"\b(None|nan|NaN|null|inf)\b", page.text)
    if "keep" in changes:
        assert "No data to keep were given, so forgetting was not measured." in page.text
        assert "The model learned 10.0 points on the target." in page.text
        assert "path" not in page.figures
        assert "Kept, after" not in page.text
    if changes.get("history") == []:
        assert not {"loss", "scores", "used"} & {*page.figures}
    if not layers:
        assert "The certificate has no layers." in page.text


def test_optional_keys_may_be_missing(tmp_path: Path) -> None:
    needed = ("task", "model", "data", "metric")
    page = finetune_page(tmp_path, {name: finetuning()[name] for name in needed}, Certificate("spectral", ()))
    assert "models/digits-vit" in page.text


# --- snippets ---------------------------------------------------------------------------------------


def test_snippets_of_a_language_model(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    metrics = language_finetuning(adapter={"r": 12, "bound": 0.3})
    snippets = finetune_page(folder, metrics).snippets
    loading, plain, merging = snippets[:3]
    for code in (loading, plain, merging):
        compile(code, "snippet", "exec")
    assert loading.startswith("import nblora")
    assert 'AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")' in loading
    assert f'PeftModel.from_pretrained(model, "{folder}/adapter")' in loading
    assert "nblora" not in plain.replace(str(folder), "")
    assert f'PeftModel.from_pretrained(model, "{folder}/lora")' in plain
    assert f'merged.save_pretrained("{folder}/merged")' in merging
    everything = "\n".join(snippets)
    assert f"nblora certify '{folder}/adapter'" in everything
    assert "vllm serve meta-llama/Llama-3.2-1B --enable-lora --max-lora-rank 16" in everything
    assert f"--lora-modules 'my-run={folder}/lora'" in everything
    assert f"--lora-paths 'my-run={folder}/lora'" in everything
    assert "--base-model-id meta-llama/Llama-3.2-1B" in everything
    assert f"nblora finetune --config '{folder}/config.yaml'" in everything


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (65, 128), (257, 320), (512, 512), (513, None)]
)
def test_vllm_takes_few_ranks(rank: int, allowed: int | None, tmp_path: Path) -> None:
    page = finetune_page(tmp_path, language_finetuning(adapter={"r": rank}))
    found = re.search(r"--max-lora-rank (\d+)", "".join(page.snippets))
    assert (found and int(found[1])) == allowed
    assert "sglang" in "".join(page.snippets)


def test_a_local_base_model_is_converted_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    page = finetune_page(tmp_path, language_finetuning(model=str(tmp_path / "base")))
    assert f"--base {tmp_path}/base " in "".join(page.snippets)


@pytest.mark.parametrize(
    ("task", "model_class", "processor"),
    [
        ("image-cls", "AutoModelForImageClassification", "AutoImageProcessor"),
        ("seq-cls", "AutoModelForSequenceClassification", "AutoTokenizer"),
        ("token-cls", "AutoModelForTokenClassification", "AutoTokenizer"),
        ("seq2seq", "AutoModelForSeq2SeqLM", "AutoTokenizer"),
    ],
)
def test_other_tasks_are_not_served_as_language_models(
    task: str, model_class: str, processor: str, tmp_path: Path
) -> None:
    import transformers

    page = finetune_page(tmp_path, finetuning(task=task, new_head=True, labels=["a", "b", "c"]))
    assert hasattr(transformers, model_class)
    assert hasattr(transformers, processor)
    assert f"{model_class}.from_pretrained" in page.snippets[0]
    assert f"{processor}.from_pretrained" in page.snippets[0]
    assert "num_labels=3, ignore_mismatched_sizes=True" in page.snippets[0]
    assert "vllm" not in "".join(page.snippets)
    assert "Serve it" not in page.text


def test_a_given_command_and_configuration_are_shown(tmp_path: Path) -> None:
    page = finetune_page(
        tmp_path,
        finetuning(
            command=["nblora", "finetune", "a b"],
            config={"r": 8, "adapter": {"norm": "spectral"}, "ranks": [2, 8]},
        ),
    )
    assert "nblora finetune 'a b'" in page.snippets
    assert page.snippets[-1] == "r: 8\nadapter: {norm: spectral}\nranks: [2, 8]"


# --- what users wrote cannot break a page -----------------------------------------------------------

EVIL = "<script>alert(1)</script>&amp;<b>\"'</pre></table>--><!-- \u2028 {{ 7 * 7 }} $x$ %{x}"


def test_what_users_wrote_is_text(tmp_path: Path) -> None:
    metrics = language_finetuning(model=EVIL, data=EVIL, keep=EVIL, method=EVIL, config=EVIL, command=EVIL)
    measured = Certificate("spectral", tuple(layer(f"{EVIL}.{i}.q") for i in range(3)))
    page, harmless = finetune_page(tmp_path / "a", metrics, measured), finetune_page(tmp_path / "b")
    assert page.text.count(" ".join(EVIL.split())) >= 6
    assert len(page.scripts) == len(harmless.scripts) == 2
    assert not any(tag == "b" and not attributes for tag, attributes in page.elements)
    compile(page.snippets[0], "snippet", "exec")
    hover = page.figures["spectrum"]["data"][0]["hovertext"][0]
    assert "&lt;script&gt;" in hover.replace("<br>", "")
    assert "<script" not in hover


def test_what_users_wrote_is_text_in_a_comparison(tmp_path: Path) -> None:
    content = small_comparison(model=EVIL, data=EVIL, keep=EVIL, command=EVIL, config=EVIL)
    for entry in content["methods"]:
        entry.update(label=EVIL, reason=EVIL)
    for run in content["runs"]:
        run["error"] = EVIL
    page = comparison_page(tmp_path, content)
    assert len(page.scripts) == 2
    assert "49" not in page.snippets[0]
    names = {trace.get("name") for trace in page.figures["target-by-learning-rate"]["data"]} - {None}
    assert all("<" not in name for name in names)
    assert len(comparison_figures(content, tmp_path)) == 6  # matplotlib would read $...$ as a formula


# --- the report of a comparison ---------------------------------------------------------------------


def small_comparison(**changes: Any) -> dict[str, Any]:
    """Two methods whose numbers can be followed by hand."""

    def run(
        method: str, rate: float, rank: int | None, target: float | None, kept: float | None, seed: int
    ) -> dict[str, Any]:
        return {
            "method": method,
            "learning_rate": rate,
            "rank": rank,
            "epochs": 5,
            "bound": 0.3 if method == "nblora" else None,
            "seed": seed,
            "status": "done" if target is not None else "diverged",
            "error": None,
            "validation": target,
            "target": target,
            "kept_validation": kept,
            "kept": kept,
            "seconds": 2.5,
            "peak_memory_bytes": 100 * 2**20,
        }

    runs = [
        run("full", 0.01, None, 0.90, 0.50, 0),
        run("full", 0.01, None, 0.92, 0.54, 1),
        run("full", 0.1, None, None, None, 0),
        run("full", 0.1, None, 0.20, 0.10, 1),
        run("nblora", 0.01, 8, 0.80, 0.95, 0),
        run("nblora", 0.01, 8, 0.82, 0.93, 1),
        run("nblora", 0.1, 8, 0.86, 0.90, 0),
        run("nblora", 0.1, 8, 0.88, 0.92, 1),
        run("nblora", 0.1, 2, 0.70, 0.91, 0),
        run("nblora", 0.01, 2, 0.60, 0.97, 0),
    ]
    methods = [
        {
            "method": "full",
            "label": "Full",
            "available": True,
            "picked": [picked(None, 0.01, None, (0.91, 0.0141), (0.52, 0.0283))],
            "whole_grid": {
                "target": {"mean": 0.55, "worst": 0.20},
                "kept": {"mean": 0.31, "worst": 0.10},
                "settings": 2,
                "diverged": 1,
                "failed": 0,
            },
            "near_best": {"target": 0.5, "both": 0.25},
            "transfer": [],
            "front": [[0.92, 0.54]],
            "hypervolume": {"mean": 0.47, "std": 0.034},
            "seconds": 2.25,
            "peak_memory_bytes": 200 * 2**20,
        },
        {
            "method": "nblora",
            "label": "NB",
            "available": True,
            "picked": [
                picked(2, 0.1, 0.3, (0.70, 0.0), (0.91, 0.0)),
                picked(8, 0.1, 0.3, (0.87, 0.0141), (0.91, 0.0141)),
            ],
            "whole_grid": {
                "target": {"mean": 0.78, "worst": 0.60},
                "kept": {"mean": 0.93, "worst": 0.90},
                "settings": 4,
                "diverged": 0,
                "failed": 0,
            },
            "near_best": {"target": 0.25, "both": 0.75},
            "transfer": [
                {
                    "rank": 2,
                    "epochs": 5,
                    "learning_rate": 0.1,
                    "target": {"mean": 0.70, "std": 0.0},
                    "kept": {"mean": 0.91, "std": 0.0},
                    "target_lost": 0.013,
                }
            ],
            "front": [[0.88, 0.92], [0.82, 0.93], [0.80, 0.95], [0.6, 0.97]],
            "hypervolume": {"mean": 0.84, "std": 0.012},
            "seconds": 3.25,
            "peak_memory_bytes": 150 * 2**20,
        },
        {"method": "rasa", "label": "RaSA", "available": False, "reason": "no library has it"},
    ]
    content = {
        "nblora": "0.1.0",
        "task": "image-cls",
        "model": "m",
        "data": "d",
        "keep": "k",
        "metric": "accuracy",
        "before": {"target": 0.10, "kept": 0.98},
        "reference": {"rank": 8, "epochs": 5},
        "tolerance": 0.02,
        "grid": {
            "learning_rates": [0.01, 0.1],
            "ranks": [2, 8],
            "epochs": [5],
            "bounds": [0.3],
            "seeds": [0, 1],
        },
        "runs": runs,
        "methods": methods,
    }
    return content | changes


def picked(
    rank: int | None, rate: float, bound: float | None, target: tuple[float, float], kept: tuple[float, float]
) -> dict[str, Any]:
    scores = {name: dict(zip(("mean", "std"), pair)) for name, pair in (("target", target), ("kept", kept))}
    return {"rank": rank, "epochs": 5, "learning_rate": rate, "bound": bound, **scores}


def test_rows_by_hand() -> None:
    heading, rows = comparison_rows(small_comparison())
    assert [dict(zip(heading, row)) for row in rows] == [
        {
            "method": "Full",
            "(a) learning rate": "0.01",
            "(a) target accuracy (%)": "91.0 ± 1.4",
            "(a) kept accuracy (%)": "52.0 ± 2.8",
            "(b) mean target accuracy (%)": "55.0",
            "(b) worst target accuracy (%)": "20.0",
            "(b) mean kept accuracy (%)": "31.0",
            "(b) worst kept accuracy (%)": "10.0",
            "(c) target (% of settings)": "50",
            "(c) both (% of settings)": "25",
            "(d) most lost on target (points)": "–",
            "(d) worst kept accuracy (%)": "–",
            "(e) hypervolume": "0.470 ± 0.034",
            "(f) seconds": "2.2",
            "(f) memory (MiB)": "200",
            "diverged runs": "1",
        },
        {
            "method": "NB",
            "(a) learning rate": "0.1",
            "(a) target accuracy (%)": "87.0 ± 1.4",
            "(a) kept accuracy (%)": "91.0 ± 1.4",
            "(b) mean target accuracy (%)": "78.0",
            "(b) worst target accuracy (%)": "60.0",
            "(b) mean kept accuracy (%)": "93.0",
            "(b) worst kept accuracy (%)": "90.0",
            "(c) target (% of settings)": "25",
            "(c) both (% of settings)": "75",
            "(d) most lost on target (points)": "1.3",
            "(d) worst kept accuracy (%)": "91.0",
            "(e) hypervolume": "0.840 ± 0.012",
            "(f) seconds": "3.2",
            "(f) memory (MiB)": "150",
            "diverged runs": "0",
        },
    ]


def test_brief_rows_fit_a_terminal(vision: dict[str, Any]) -> None:
    heading, rows = comparison_rows(vision, brief=True)
    assert heading == (
        "method",
        "(a) learning rate",
        "(a) target accuracy (%)",
        "(a) kept accuracy (%)",
        "(b) worst target accuracy (%)",
        "(b) worst kept accuracy (%)",
        "(f) seconds",
    )
    full_heading, full_rows = comparison_rows(vision)
    places = [full_heading.index(name) for name in heading]
    assert rows == [tuple(row[place] for place in places) for row in full_rows]
    assert sum(max(len(row[i]) for row in rows) + 2 for i in range(len(heading))) <= 80


def in_nats(content: dict[str, Any]) -> dict[str, Any]:
    """The same comparison with scores that are minus nats per token."""
    return content | {"metric": "nats", "task": "causal-lm", "before": {"target": 0.5, "kept": 0.98}}


def test_rows_in_nats_are_gained_and_lost() -> None:
    heading, rows = comparison_rows(in_nats(small_comparison()))
    row = dict(zip(heading, rows[1]))
    assert row["(a) gained on target (nats)"] == "0.370 ± 0.014"
    assert row["(a) lost on kept (nats)"] == "0.070 ± 0.014"
    assert row["(b) worst gained on target (nats)"] == "0.100"
    assert row["(b) worst lost on kept (nats)"] == "0.080"
    assert row["(d) most lost on target (nats)"] == "0.013"
    assert dict(zip(heading, rows[0]))["(b) worst gained on target (nats)"] == "-0.300"
    written = io.StringIO()
    csv.writer(written).writerows([heading, *rows])
    assert (
        float(next(itertools.islice(csv.DictReader(io.StringIO(written.getvalue())), 1))["(f) seconds"])
        == 2.2
    )


def test_the_main_table_is_the_rows_and_marks_the_best(tmp_path: Path, vision: dict[str, Any]) -> None:
    page = comparison_page(tmp_path, vision)
    _, rows = comparison_rows(vision)
    table = [row for row in page.tables[0] if len(row) == len(rows[0])][1:]
    shown = [[" ".join(re.sub(r"[●■◆▲▼✚✖★⬢⬟]\ufe0e", "", cell).split()) for cell in row] for row in table]
    assert shown == [
        [cell.replace("-", "−") if cell[1:2].isdigit() else cell for cell in row] for row in rows
    ]
    assert "(a) picked on target validation" in page.text
    marked = {cell for cell, attributes in page.cells if "best" in (attributes.get("class") or "").split()}
    assert max((row[2] for row in rows), key=lambda cell: float(cell.split()[0])) in marked
    assert max((row[6] for row in rows), key=float) in marked
    assert min((row[2] for row in rows), key=lambda cell: float(cell.split()[0])) not in marked


def test_the_answer_by_hand(tmp_path: Path) -> None:
    content = small_comparison()
    text = comparison_page(tmp_path, content).text
    assert (
        "NB at learning rate 0.1 is best on target and kept together: 87.0 % on target and 91.0 % kept, "
        "of 98.0 % before."
    ) in text
    # means of target and kept 89 against 71.5; spread sqrt(1.41² + 1.41² + 1.41² + 2.83²) / 2
    assert (
        "Next is Full, 17.5 points behind in the mean of target and kept; the seeds spread by 1.9 points."
        in text
    )
    assert "On the target alone Full leads at learning rate 0.01: 91.0 % on target, 52.0 % kept." in text
    assert "Worst run anywhere in the grid: NB 90.0 % kept, then Full 10.0 %." in text
    assert "2 methods, 2 learning rates, 2 ranks, 1 bound, 2 seeds and 1 epoch count, 10 runs" in text
    assert "Before training: target 10.0 % and kept 98.0 %." in text


def test_the_answer_changes_with_the_numbers() -> None:
    content = small_comparison()
    content["methods"][0]["picked"] = [picked(None, 0.01, None, (0.91, 0.01), (0.88, 0.02))]
    assert answer_sentence(content).startswith(
        "Full at learning rate 0.01 is best on the target, and on target and"
    )
    assert "0.5\u00a0points behind" in further_sentences(content)[0]
    assert "a tie" in further_sentences(content)[0]
    content["runs"] = [run for run in content["runs"] if run["seed"] == 0]
    assert "with one seed" in further_sentences(content)[0]
    assert not any("±" in cell for row in comparison_rows(content)[1] for cell in row)
    content["methods"][1]["picked"] = []
    assert answer_sentence(content).startswith(
        "Full at learning rate 0.01 has 91.0\u00a0% on target and 88.0"
    )
    content["methods"][0]["picked"] = []
    assert answer_sentence(content).startswith("No method finished a run at the reference")


def test_without_kept_data_the_target_decides(tmp_path: Path) -> None:
    content = comparison(kept=False, seeds=1)
    page = comparison_page(tmp_path, content)
    assert re.search(
        r"(LoRA|DoRA|Full|full fine-tuning) at learning rate 0.00\d learns most: 9\d.\d % on target\.",
        page.text,
    )
    assert "No data to keep were given" in page.text
    assert not any("kept" in name or "hypervolume" in name for name in comparison_rows(content)[0])
    assert {*page.figures} == {"target-by-learning-rate"}
    assert static._draw_front(content) is None
    assert len(static._draw_curves(content).axes) == 1


def test_curves_by_hand() -> None:
    full, nblora = learning_rate_curves(small_comparison(), "target")
    assert [s.learning_rate for s in full.settings] == [0.01, 0.1]
    assert full.settings[0].target is not None
    assert full.settings[1].target is not None
    assert (full.settings[0].target.mean, full.settings[0].target.low) == (pytest.approx(0.91), 0.90)
    assert (full.settings[1].target.mean, full.settings[1].diverged) == (0.20, 1)
    assert [s.rank for s in nblora.settings] == [8, 8], "the reference's rank only"
    assert [s.kept.mean for s in nblora.settings if s.kept] == pytest.approx([0.94, 0.91])


def test_curves_use_the_bound_that_was_picked() -> None:
    content = small_comparison()
    for bound in (0.1, 0.9):
        content["runs"].append({**content["runs"][6], "bound": bound, "target": 0.0})
    (_, nblora) = learning_rate_curves(content, "target")
    assert {s.bound for s in nblora.settings} == {0.3}
    (heat_map,) = heat_maps(content, "bound", "target")
    assert heat_map.rows == (0.1, 0.3, 0.9)
    assert heat_map.cells[0][0] is None, "did not run"


def test_fronts_by_hand() -> None:
    full, nblora = fronts(small_comparison())
    assert nblora.points == ((0.6, 0.97), (0.80, 0.95), (0.82, 0.93), (0.88, 0.92))
    assert nblora.picked == (0.87, 0.91)
    assert "learning rate 0.1, rank 8, 5 epochs, bound 0.3" in nblora.picked_text
    assert len(full.runs) == 3, "a diverged run has no place"


def test_heat_maps_by_hand(tmp_path: Path) -> None:
    (heat_map,) = heat_maps(small_comparison(), "rank", "target")
    assert (heat_map.style.label, heat_map.rows, heat_map.columns) == ("NB", (2, 8), (0.01, 0.1))
    means = [[cell.target.mean for cell in row if cell and cell.target] for row in heat_map.cells]
    assert means == [[0.60, 0.70], [pytest.approx(0.81), pytest.approx(0.87)]]
    assert not heat_maps(small_comparison(), "epochs", "target")
    page = comparison_page(tmp_path, small_comparison())
    heats = [table for table in page.tables if table[0][0] == "rank"]
    assert heats == [
        [["rank", "0.01", "0.1"], ["2", "60", "70"], ["8", "81", "87"]],
        [["rank", "0.01", "0.1"], ["2", "97", "91"], ["8", "94", "91"]],
    ]


def test_lost_runs_are_listed_and_marked(tmp_path: Path, vision: dict[str, Any]) -> None:
    page = comparison_page(tmp_path, vision)
    lost = [run for run in vision["runs"] if run["status"] != "done"]
    heading = ["method", "learning rate", "rank", "epochs", "bound", "seed", "what happened"]
    rows = next(table for table in page.tables if table[0] == heading)[1:]
    assert len(rows) == len(lost) == 24
    assert "Of 1386 runs 21 diverged and 3 failed." in page.text
    failed = next(row for row in rows if row[-1].startswith("failed"))
    assert failed == [
        "OFT",
        "1e-4",
        "32",
        "1",
        "–",
        "1",
        "failed: CUDA out of memory: tried to allocate 2 GiB",
    ]
    traces = page.figures["target-by-learning-rate"]["data"]
    crosses = [trace for trace in traces if trace.get("marker", {}).get("symbol") == "x-open"]
    assert {trace["meta"]["method"] for trace in crosses} == {"lora", "pissa", "full"}
    assert all(trace["x"] == [0.1] for trace in crosses)
    heats = [table for table in page.tables if table[0][0] in ("rank", "epochs")]
    assert any(cell.endswith("*") for table in heats for row in table for cell in row)


def test_a_method_whose_every_run_failed(tmp_path: Path) -> None:
    content = small_comparison()
    for run in content["runs"]:
        if run["method"] == "full":
            run.update(status="failed", error="no such layer", target=None, kept=None)
    content["methods"][0].update(
        picked=[],
        whole_grid={"target": None, "kept": None, "settings": 2, "diverged": 0, "failed": 4},
        near_best={"target": None, "both": None},
        transfer=[],
        front=[],
        hypervolume=None,
        seconds=None,
        peak_memory_bytes=None,
    )
    page = comparison_page(tmp_path, content)
    heading, rows = comparison_rows(content)
    row = dict(zip(heading, rows[0]))
    assert row.pop("method") == "Full"
    assert row.pop("failed runs") == "4"
    assert {*row.values()} == {"–"}
    assert "NB at learning rate 0.1 has 87.0 % on target and 91.0 % kept, of 98.0 % before." in page.text
    assert "no such layer" in page.text
    assert len(comparison_figures(content, tmp_path)) == 6


@pytest.mark.parametrize("nothing", ["runs", "methods", "grid", "before"])
def test_a_comparison_without(nothing: str, tmp_path: Path) -> None:
    content = small_comparison()
    if nothing == "runs":
        content["runs"] = []
        for entry in content["methods"]:
            entry.update(picked=[], front=[], transfer=[], whole_grid=None)
    elif nothing == "methods":
        content.update(methods=content["methods"][2:], runs=[])
    elif nothing == "grid":
        del content["grid"]
    else:
        content["before"] = {"target": None, "kept": None}
    page = comparison_page(tmp_path, content)
    assert "RaSA no library has it" in page.text
    assert not re.search(r"\b(None|nan|NaN|null)\b", page.text)
    comparison_figures(content, tmp_path)


def test_transfer_by_hand(tmp_path: Path) -> None:
    page = comparison_page(tmp_path, small_comparison())
    table = next(
        table for table in page.tables if table[0] == ["method", "learning rate", "rank 2, 5 epochs"]
    )
    assert [" ".join(cell.split()) for cell in table[1]] == [
        "●\ufe0e NB",
        "0.1",
        "70.0 / 91.0 lost 1.3 points",
    ]


def test_a_comparison_can_be_run_again(tmp_path: Path) -> None:
    assert not comparison_page(tmp_path, small_comparison()).snippets
    (tmp_path / "config.yaml").touch()
    (command,) = comparison_page(tmp_path, small_comparison()).snippets
    assert command == f"nblora compare --config {tmp_path}/config.yaml --out {tmp_path}-again"


def test_several_bounds_have_a_column_and_a_map(tmp_path: Path) -> None:
    content = small_comparison()
    content["grid"]["bounds"] = [0.3, 0.6]
    content["runs"] += [{**run, "bound": 0.6} for run in content["runs"] if run["method"] == "nblora"]
    heading, rows = comparison_rows(content)
    assert dict(zip(heading, rows[1]))["(a) bound"] == "0.3"
    page = comparison_page(tmp_path, content)
    assert "NB at learning rate 0.1 and bound 0.3 is best" in page.text
    assert "Bound × learning rate" in page.text


# --- scales, words and looks ------------------------------------------------------------------------


def test_scales_of_nats() -> None:
    shown = scales("nats", {"target": -2.1, "kept": -1.4})
    assert shown["target"].phrase(-1.8) == "0.300\u00a0nats gained on target"
    assert shown["kept"].phrase(-1.6) == "0.200\u00a0nats lost on kept"
    assert shown["kept"].phrase(-1.3) == "−0.100\u00a0nats lost on kept"
    assert not shown["kept"].higher_is_better
    bare = scales("nats", None)
    assert bare["target"].phrase(-1.8) == "1.800\u00a0nats on target"
    assert scales("accuracy", None)["kept"].phrase(0.5) == "50.0\u00a0% kept"
    assert shown["target"].phrase(math.nan) == shown["target"].phrase(None) == "– gained on target"


def test_numbers_in_words() -> None:
    assert [rate_text(x) for x in (1e-4, 3e-5, 0.001, 0.3, 8, 2.5e-4, None)] == [
        "1e-4", "3e-5", "0.001", "0.3", "8", "2.5e-4", "–",
    ]  # fmt: skip
    assert rate_labels([1e-4, 1e-3, 0.1]) == ["1e-4", "1e-3", "1e-1"]
    assert rate_labels([0.01, 0.1]) == ["0.01", "0.1"]
    assert [fixed_text(x, 1) for x in (-0.04, -0.06, 2, None)] == ["0.0", "−0.1", "2.0", "–"]
    assert [fixed_text(x, 1, sign=True) for x in (-0.04, -0.06, 2)] == ["±0.0", "−0.1", "+2.0"]
    assert [duration_text(x) for x in (0.44, 9.99, 59.4, 83, 3599, 15_130, math.nan)] == [
        "0.44 s", "10 s", "59 s", "1 min 23 s", "1 h 0 min", "4 h 12 min", "not measured",
    ]  # fmt: skip
    assert [memory_text(x) for x in (12, 431e6, 13.3e9, None)] == [
        "12 bytes",
        "411 MiB",
        "12.4 GiB",
        "not measured",
    ]


def test_an_outlier_does_not_flatten_the_chart() -> None:
    lost = scales("nats", {"target": -2.0, "kept": -1.0})["kept"]
    worst, best = visible_range([0.01 * i for i in range(20)] + [8.0], lost)
    assert 0.19 < worst < 1.5
    assert -0.1 < best < 0
    assert visible_range([0.5, 50.0, 99.0] * 5, scales("accuracy", None)["kept"]) == (
        pytest.approx(-2), pytest.approx(102),
    )  # fmt: skip
    assert visible_range([], lost)[0] > visible_range([], lost)[1]
    assert len({*visible_range([0.3], lost)}) == 2


def test_methods_look_different(vision: dict[str, Any]) -> None:
    looks = [Style("", "", index) for index in range(40)]
    assert len({(look.color, look.marker, look.dash) for look in looks}) == 40
    assert len({look.color for look in looks[:8]}) == len({look.marker for look in looks[:10]}) - 2 == 8
    assert len({front.style.color for front in fronts(vision)}) == 8


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_can_be_told_from_their_ground(scheme: int) -> None:
    """WCAG 2.2: 4.5 for text, 3 for marks."""
    color = {name: pair[scheme] for name, pair in PALETTE.items()}
    for ground in (color["--card"], color["--page"]):
        for text in ("--text", "--muted", "--link", "--good", "--bad"):
            assert contrast(color[text], ground) >= 4.5
        for name, mark in color.items():
            if name.startswith("--series") or name == "--axis":
                assert contrast(mark, ground) >= 3, name
    assert all(contrast(ink, ground) >= 4.5 for ground, ink in HEAT)


def test_matplotlib_draws_what_plotly_draws(vision: dict[str, Any]) -> None:
    """One home for what is drawn: the same points in both."""
    figure = static._draw_curves(vision)
    for axes, score in zip(figure.axes, ("target", "kept")):
        plot = curve_plot(vision, score)  # type: ignore[arg-type]
        assert plot is not None
        lines = {line.get_label(): line for line in axes.lines}
        for trace in plot.data:
            if trace.get("name"):
                drawn = lines[trace["name"]]
                assert [*drawn.get_xdata()] == trace["x"]
                assert [*drawn.get_ydata()] == pytest.approx(trace["y"])
        assert [*axes.get_ylim()] == pytest.approx(plot.layout["yaxis"]["range"])
    front, plot = static._draw_front(vision), trade_off_plot(vision)
    assert plot is not None
    drawn = [[*line.get_ydata()] for line in front.axes[0].lines]
    for trace in plot.data:
        assert any(y == pytest.approx(trace["y"]) for y in drawn if len(y) == len(trace["y"]))


def test_figures_are_whole_files(tmp_path: Path) -> None:
    files = comparison_figures(small_comparison(), tmp_path / "new" / "figures")
    names = ["front", "learning-rates", "heatmaps"]
    assert [file.name for file in files] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for file in files:
        if file.suffix == ".png":
            assert file.read_bytes().startswith(b"\x89PNG")
        else:
            assert xml.etree.ElementTree.parse(file).getroot().tag.endswith("svg")
    assert {path.name for path in (tmp_path / "new" / "figures").iterdir()} == {file.name for file in files}


@pytest.mark.parametrize("page", ["finetune", "comparison"])
def test_figures_are_valid_for_plotly(page: str, tmp_path: Path, vision: dict[str, Any]) -> None:
    """Every property has a name and a value that Plotly knows; every colour is one of the palette."""
    import plotly.graph_objects

    def colored(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: colored(item) for key, item in value.items() if key != "meta"}
        if isinstance(value, list):
            return [colored(item) for item in value]
        return PALETTE[value][0] if isinstance(value, str) and value.startswith("--") else value

    found = finetune_page(tmp_path) if page == "finetune" else comparison_page(tmp_path, vision)
    assert len(found.figures) == (6 if page == "finetune" else 3)
    for figure in found.figures.values():
        plotly.graph_objects.Figure(colored(figure))


# --- a file that is complete in itself --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["finetune", "comparison"])
@pytest.mark.usefixtures("plotly_js")
def test_nothing_is_loaded_from_anywhere(kind: str, tmp_path: Path, vision: dict[str, Any]) -> None:
    page = finetune_page(tmp_path) if kind == "finetune" else comparison_page(tmp_path, vision)
    loading = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href"}
    for tag, attributes in page.elements:
        for name in loading & {*attributes}:
            if tag != "a":
                assert str(attributes[name]).startswith("data:,"), (tag, name)
        assert "url(" not in (attributes.get("style") or "")
        assert not any(name.startswith("on") for name in attributes), "handlers in markup"
    assert {tag for tag, _ in page.elements}.isdisjoint({"iframe", "object", "embed", "img", "base", "audio"})
    (style,) = (text for tag, _, text in page.raw if tag == "style")
    assert not re.search(r"url\(|@import|@font-face", style)
    _, own = page.scripts
    assert not re.search(r"https?:|fetch|XMLHttp|import\b|WebSocket|eval|Function\(", own)
    assert 'plotlyServerURL: ""' in own


@pytest.mark.usefixtures("plotly_js")
def test_the_policy_admits_two_scripts_and_no_connection(tmp_path: Path) -> None:
    page = finetune_page(tmp_path)
    (policy,) = (
        str(attributes["content"])
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in page.scripts
    ]
    assert rules["script-src"].split() == hashes
    assert {*rules} == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}


@pytest.mark.usefixtures("plotly_js")
def test_plotly_is_there_once(tmp_path: Path) -> None:
    finetune_page(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("* plotly.js v") == 1
    assert len(text) < 6_000_000


def test_a_page_is_well_formed_and_for_everybody(tmp_path: Path, vision: dict[str, Any]) -> None:
    for page in (finetune_page(tmp_path / "a"), comparison_page(tmp_path / "b", vision)):
        tags = [tag for tag, _ in page.elements]
        assert tags.count("h1") == tags.count("main") == tags.count("title") == 1
        assert ("html", {"lang": "en"}) in page.elements
        assert any(attributes.get("name") == "viewport" for tag, attributes in page.elements)
        identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(identities) == len({*identities})
        described = [attributes for tag, attributes in page.elements if attributes.get("role") == "img"]
        assert len(described) == len(page.figures) == tags.count("figcaption")
        assert all(len(str(attributes["aria-label"])) > 20 for attributes in described)
        regions = [a for _, a in page.elements if a.get("role") == "region"]
        assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in regions), "reachable by keyboard"


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    for action in (require_libraries, lambda: finetune_page(tmp_path)):
        with pytest.raises(
            ImportError, match=r"^reports need plotly and jinja2: pip install 'nblora\[train\]'$"
        ):
            action()
    assert not (tmp_path / "report.html").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^figures need matplotlib: pip install 'nblora\[plots\]'$"):
        comparison_figures(small_comparison(), tmp_path)


def test_a_report_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        finetune_page(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_importing_is_light() -> None:
    code = "import sys, nblora.reporting; print({'plotly', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
