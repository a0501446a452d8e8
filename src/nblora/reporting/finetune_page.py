"""The report of a fine-tuning job."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nblora.certificate import Certificate, LayerCertificate
from nblora.checkpoints import PathLike
from nblora.reporting.finetune_plots import (
    depth_plot,
    loss_plot,
    path_plot,
    scores_plot,
    spectrum_plot,
    summary_of,
    used_plot,
)
from nblora.reporting.page import TASKS, Snippet, reproducing_snippets, write_page
from nblora.reporting.words import (
    count_text,
    duration_text,
    finite_number,
    fixed_text,
    levels,
    look_up,
    memory_text,
    plural,
    rate_text,
    share_text,
)


def _certificate(content: Mapping[str, Any]) -> Certificate:
    """What `Certificate.to_json` wrote; numbers that JSON could not hold are NaN again."""

    def number(value: Any) -> float:
        found = finite_number(value)
        return math.nan if found is None else found

    layers = tuple(
        LayerCertificate(
            name=str(layer["name"]),
            shape=(int(layer["shape"][0]), int(layer["shape"][1])),
            rank=int(layer["rank"]),
            singular_values=tuple(number(value) for value in layer["singular_values"]),
            norm=number(layer["norm"]),
            bound=number(layer["bound"]),
        )
        for layer in content.get("layers") or []
    )
    return Certificate(str(content.get("norm_name", "")), layers)


def _headline(metrics: Mapping[str, Any]) -> str:
    """What was learned and what was kept, in one sentence."""
    scale = levels(metrics["metric"])
    if finite_number(look_up(metrics, "after", "target", "score")) is None:
        return "The training diverged: what the model scores on the target is not a number."
    pieces = []
    for part, nothing in (
        ("target", "learned nothing on the target"),
        ("keep", "gave up nothing of what it must keep"),
    ):
        if part == "keep" and not (look_up(metrics, "after", "keep") or look_up(metrics, "before", "keep")):
            continue
        before, after = (finite_number(look_up(metrics, when, part, "score")) for when in ("before", "after"))
        if after is None:
            pieces.append("has no number for what it must keep")
        elif before is None:
            words = "on the target" if part == "target" else "on what it must keep"
            pieces.append(f"reaches {scale.measure(after)} {words}")
        else:
            change = abs(scale.factor) * (after - before)
            size = f"{fixed_text(abs(change), scale.digits)} {scale.difference}"
            if not float(f"{change:.{scale.digits}f}"):
                pieces.append(nothing)
            elif part == "target":
                pieces.append(f"learned {size} on the target" if change > 0 else f"lost {size} on the target")
            else:
                pieces.append(
                    f"gained {size} on what it must keep"
                    if change > 0
                    else f"gave up {size} of what it must keep"
                )
    sentence = "The model " + " and ".join(pieces)
    return sentence.replace("\u00a0", " ") + "."


def _change(metrics: Mapping[str, Any], part: str) -> str:
    scale = levels(metrics["metric"])
    before, after = (finite_number(look_up(metrics, when, part, "score")) for when in ("before", "after"))
    if before is None:
        return "before: not known"
    text = f"before {scale.measure(before)}"
    if after is None:
        return text
    change = abs(scale.factor) * (after - before)
    if metrics["metric"] == "accuracy":
        return f"{text}, {fixed_text(change, scale.digits, sign=True)} {scale.difference}"
    return f"{text}, {'gained' if change >= 0 else 'lost'} {fixed_text(abs(change), scale.digits)}"


def _cards(metrics: Mapping[str, Any], certificate: Certificate) -> list[dict[str, str]]:
    scale = levels(metrics["metric"])
    cards = []
    for name, part in (("Target, after", "target"), ("Kept, after", "keep")):
        if part == "target" or look_up(metrics, "after", part):
            score = look_up(metrics, "after", part, "score")
            missing = finite_number(score) is None
            cards.append(
                {
                    "name": name,
                    "value": "not a number" if missing else scale.measure(score),
                    "detail": _change(metrics, part),
                    "state": "bad" if missing else "",
                }
            )
    if certificate.layers:
        shares = [layer.share for layer in certificate.layers]
        fullest = max(shares, key=lambda share: -math.inf if math.isnan(share) else share)
        cards.append(
            {
                "name": f"Bound on {plural(len(shares), 'layer')}",
                "value": "✓ holds" if certificate.holds else "✗ broken",
                "detail": f"the fullest uses {share_text(fullest)}",
                "state": "good" if certificate.holds else "bad",
            }
        )
    cards.append(
        {
            "name": "Training",
            "value": duration_text(metrics.get("seconds")),
            "detail": f"{_trainable_share(metrics)} of the parameters trained",
            "state": "",
        }
    )
    return cards


def _trainable_share(metrics: Mapping[str, Any]) -> str:
    trainable, total = (
        finite_number(metrics.get("trainable_parameters")),
        finite_number(metrics.get("parameters")),
    )
    return "–" if trainable is None or not total else f"{100 * trainable / total:.3g}\u00a0%"


def _bound_in_words(metrics: Mapping[str, Any], certificate: Certificate) -> str:
    adapter = metrics.get("adapter") or {}
    name = certificate.norm_name or str(adapter.get("norm", ""))
    bound = adapter.get("bound")
    if bound is None:
        return "The bound of each layer is in the certificate."
    if adapter.get("bound_kind", "relative") == "absolute":
        return f"The {name} norm of every layer's update was to stay at or under {rate_text(bound)}."
    return (
        f"The {name} norm of every layer's update was to stay at or under {rate_text(bound)} times "
        "the spectral norm of that layer's weight."
    )


def _finetune_facts(metrics: Mapping[str, Any], certificate: Certificate) -> list[tuple[str, str, bool]]:
    """(name, value, whether it is code) of what was trained."""
    adapter, train = metrics.get("adapter") or {}, metrics.get("train") or {}
    samples = metrics.get("samples") or {}
    rates = [
        rate
        for e in metrics.get("history") or []
        if (rate := finite_number(e.get("learning_rate"))) is not None
    ]
    rate = finite_number(train.get("learning_rate"))
    kind = adapter.get("bound_kind", "relative")
    bound = adapter.get("bound")
    facts: list[tuple[str, str, bool]] = [
        ("Model", str(metrics["model"]), True),
        ("Task", TASKS.get(metrics["task"], (str(metrics["task"]),))[0], False),
        ("Data to learn", str(metrics["data"]), True),
    ]
    if metrics.get("keep"):
        facts.append(("Data to keep", str(metrics["keep"]), True))
    parametrization = adapter.get("parametrization")
    facts += [
        (
            "Method",
            str(metrics.get("method", "NB-LoRA"))
            + (f", {parametrization} parametrization" if parametrization else ""),
            False,
        ),
        ("Norm", certificate.norm_name or str(adapter.get("norm", "–")), False),
        (
            "Bound",
            "–"
            if bound is None
            else f"{rate_text(bound)}{' × ‖W₀‖₂ of each layer' if kind == 'relative' else ', absolute'}",
            False,
        ),
        ("Rank", rate_text(adapter.get("r")), False),
    ]
    if rate is not None:
        facts.append(("Learning rate", rate_text(rate), False))
    elif rates:
        facts.append(("Learning rate, highest logged", rate_text(max(rates)), False))
    named = [("train", "training"), ("validation", "validation"), ("test", "test"), ("keep", "kept")]
    counted = [f"{count_text(samples[key])} {name}" for key, name in named if samples.get(key) is not None]
    facts += [
        ("Samples", ", ".join(counted) or "–", False),
        ("Time", duration_text(metrics.get("seconds")), False),
        ("Peak memory", memory_text(metrics.get("peak_memory_bytes")), False),
        (
            "Trained parameters",
            f"{count_text(metrics.get('trainable_parameters'))} of {count_text(metrics.get('parameters'))} "
            f"({_trainable_share(metrics)})",
            False,
        ),
    ]
    if metrics.get("seed") is not None:
        facts.append(("Seed", str(metrics["seed"]), False))
    return facts


_MEASURES = {
    "accuracy": ("accuracy", 100, 1, "\u00a0%"),
    "f1": ("F1, macro", 100, 1, "\u00a0%"),
    "nats": ("nats per {unit} (lower is better)", 1, 3, ""),
    "perplexity": ("perplexity (lower is better)", 1, 2, ""),
}


def _score_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Every measure before and after, on target and kept data."""
    parts = [("target", "target"), ("keep", "kept")]
    present = [
        (key, name)
        for key, name in parts
        if key == "target" or look_up(metrics, "after", key) or look_up(metrics, "before", key)
    ]
    heading = ["", *(f"{name}, {when}" for _, name in present for when in ("before", "after", "change"))]
    rows = []
    for measure, (label, factor, digits, unit) in _MEASURES.items():
        scores = [
            [look_up(metrics, when, key, measure) for when in ("before", "after")] for key, _ in present
        ]
        if all(value is None for pair in scores for value in pair):
            continue
        row = [label.format(unit="sample" if metrics["task"] in ("seq-cls", "image-cls") else "token")]
        for pair in scores:
            before, after = (None if (n := finite_number(value)) is None else factor * n for value in pair)
            row += [
                f"{fixed_text(value, digits)}{unit if value is not None else ''}" for value in (before, after)
            ]
            change = None if before is None or after is None else after - before
            row.append(fixed_text(change, digits, sign=True))
        rows.append(row)
    return heading, rows


def _loading(metrics: Mapping[str, Any], folder: Path) -> list[Snippet]:
    """How to load the result: with nblora, as a plain LoRA, merged."""
    task = str(metrics["task"])
    if task not in TASKS:
        return []
    auto, images = TASKS[task][1], task == "image-cls"
    processor = "AutoImageProcessor" if images else "AutoTokenizer"
    name = "processor" if images else "tokenizer"
    options = ""
    if metrics.get("new_head") and metrics.get("labels"):
        options = f", num_labels={len(metrics['labels'])}, ignore_mismatched_sizes=True"
    model = f"model = {auto}.from_pretrained({_quoted(metrics['model'])}{options})"

    def code(first: str, adapter: str) -> str:
        path = _quoted(folder / adapter)
        return (
            f"{first}from peft import PeftModel\n"
            f"from transformers import {', '.join(sorted((auto, processor)))}\n\n"
            f"{model}\n"
            f"model = PeftModel.from_pretrained(model, {path})\n"
            f"{name} = {processor}.from_pretrained({_quoted(folder / 'adapter')})"
        )

    merged = _quoted(folder / "merged")
    return [
        Snippet("With nblora", code("import nblora  # PEFT learns of NB-LoRA\n", "adapter")),
        Snippet("As a plain LoRA, without nblora", code("", "lora")),
        Snippet(
            "Merged into the weights",
            f"merged = model.merge_and_unload()  # either of the two models above\n"
            f"merged.save_pretrained({merged})\n{name}.save_pretrained({merged})",
        ),
        Snippet("Check the bound again", shlex.join(["nblora", "certify", str(folder / "adapter")])),
    ]


def _quoted(value: Any) -> str:
    """A string literal of Python."""
    return json.dumps(str(value), ensure_ascii=False)


_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def _serving(metrics: Mapping[str, Any], folder: Path) -> list[Snippet]:
    """How to serve the plain-LoRA export; engines serve adapters of language models only."""
    if metrics["task"] != "causal-lm":
        return []
    model, lora = str(metrics["model"]), folder / "lora"
    name = re.sub(r"[^\w.-]+", "-", folder.resolve().name) or "adapter"
    named = shlex.quote(f"{name}={lora}")
    base = shlex.quote(model)
    rank = int(finite_number((metrics.get("adapter") or {}).get("r")) or 16)
    allowed = next((allowed for allowed in _VLLM_RANKS if allowed >= rank), None)
    snippets = []
    if allowed is not None:
        snippets.append(
            Snippet(
                "vLLM",
                f"vllm serve {base} --enable-lora --max-lora-rank {allowed} \\\n"
                f"    --lora-modules {named}\n"
                f"# then ask for the model {json.dumps(name)}",
            )
        )
    gguf = shlex.quote(str(folder / "lora.gguf"))
    source = "--base" if Path(model).is_dir() else "--base-model-id"
    return [
        *snippets,
        Snippet(
            "SGLang",
            f"python -m sglang.launch_server --model-path {base} --enable-lora \\\n    --lora-paths {named}",
        ),
        Snippet(
            "llama.cpp",
            f"python convert_lora_to_gguf.py {source} {base} --outfile {gguf} {shlex.quote(str(lora))}\n"
            f"llama-server -m base-model.gguf --lora {gguf}",
        ),
    ]


def finetune_report(metrics: Mapping[str, Any], certificate: Mapping[str, Any], out: PathLike) -> Path:
    """Write the report of a fine-tuning job.

    Args:
        metrics: as `metrics.json` holds it.
        certificate: as `Certificate.to_json` writes it.
        out: the HTML file, in the folder of the job; snippets name the adapters beside it.

    Returns:
        The file.

    Raises:
        ImportError: without plotly or jinja2.
        OSError: if the file cannot be written; one that was there stays whole.
    """
    measured, folder = _certificate(certificate), Path(out).parent
    heading, rows = _score_table(metrics)
    cells = measured.rows()
    plots = [spectrum_plot(measured), depth_plot(measured)]
    curves = [loss_plot(metrics), scores_plot(metrics), used_plot(metrics)]
    return write_page(
        out,
        "finetune.html",
        title=f"Fine-tuning report: {metrics['model']}",
        headline=_headline(metrics),
        method=str(metrics.get("method", "NB-LoRA")),
        model=str(metrics["model"]),
        data=str(metrics["data"]),
        keep=metrics.get("keep"),
        cards=_cards(metrics, measured),
        facts=_finetune_facts(metrics, measured),
        scores_heading=heading,
        scores=rows,
        trade_off=path_plot(metrics),
        curves=[plot for plot in curves if plot],
        certificate={
            "holds": measured.holds and bool(measured.layers),
            "summary": summary_of(measured),
            "heading": cells[0],
            "rows": cells[1:],
        },
        bound_in_words=_bound_in_words(metrics, measured),
        layer_plots=[plot for plot in plots if plot],
        loading=_loading(metrics, folder),
        serving=_serving(metrics, folder),
        reproducing=reproducing_snippets(
            metrics,
            shlex.join(
                ["nblora", "finetune", "--config", str(folder / "config.yaml"), "--out", f"{folder}-again"]
            ),
        ),
    )
