"""The interactive figures of a fine-tuning job."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nblora.certificate import Certificate, LayerCertificate
from nblora.reporting.looks import Style
from nblora.reporting.plots import Plot, before_line, layout_of, plotly_text, wrapped_name
from nblora.reporting.sweep import both_text
from nblora.reporting.words import (
    Scale,
    finite_number,
    in_percent,
    levels,
    listed,
    look_up,
    plural,
    scales,
    share_text,
)


def _layer_hover(layer: LayerCertificate, norm_name: str) -> str:
    sigma = [f"{value:.3g}" for value in layer.singular_values[:6]]
    more = len(layer.singular_values) - len(sigma)
    lines = [
        f"<b>{wrapped_name(layer.name)}</b>",
        f"{layer.shape[0]} × {layer.shape[1]}, rank {layer.rank}",
        f"{plotly_text(norm_name)} norm {layer.norm:.4g}",
        f"bound {layer.bound:.4g}, used {share_text(layer.share)}" + ("" if layer.holds else ": BROKEN"),
        "singular values " + ", ".join(sigma[:3]) + ("," if len(sigma) > 3 else ""),
    ]
    if len(sigma) > 3:
        lines.append(", ".join(sigma[3:]) + (f" and {more} more" if more else ""))
    return "<br>".join(lines).replace("nan", "not a number")


def spectrum_plot(certificate: Certificate) -> Plot | None:
    """Every layer's norm as a bar and its singular values as dots, in per cent of its bound."""
    layers = certificate.layers
    if not layers:
        return None
    hover = [_layer_hover(layer, certificate.norm_name) for layer in layers]
    places = list(range(1, len(layers) + 1))
    dots = [
        (place, 100 * sigma / layer.bound)
        for place, layer in zip(places, layers)
        if layer.bound > 0
        for sigma in layer.singular_values
        if math.isfinite(sigma)
    ]
    broken = [
        (place, 100 * layer.share if math.isfinite(layer.share) else 100.0, text)
        for place, layer, text in zip(places, layers, hover)
        if not layer.holds
    ]
    data: list[dict[str, Any]] = [
        {
            "type": "bar",
            "name": f"{plotly_text(certificate.norm_name)} norm",
            "x": places,
            "y": [100 * layer.share if math.isfinite(layer.share) else None for layer in layers],
            "marker": {"color": "--bar"},
            "hoverinfo": "text",
            "hovertext": hover,
            "textposition": "none",
        },
        {
            "type": "scatter",
            "name": "singular values",
            "mode": "markers",
            "x": [x for x, _ in dots],
            "y": [y for _, y in dots],
            "marker": {"color": "--series-1", "size": 5 if len(layers) <= 60 else 3.5, "opacity": 0.85},
            "hoverinfo": "skip",
        },
    ]
    if broken:
        data.append(
            {
                "type": "scatter",
                "name": "bound broken",
                "mode": "markers",
                "x": [x for x, _, _ in broken],
                "y": [y for _, y, _ in broken],
                "marker": {"color": "--bad", "symbol": "x", "size": 10},
                "hoverinfo": "text",
                "hovertext": [text for _, _, text in broken],
            }
        )
    # few layers are not drawn as wide as the page
    middle, room = (len(layers) + 1) / 2, max(len(layers) + 0.2, 8) / 2
    highest = max([100.0, *(y for _, y, _ in broken)])
    line = before_line(100, "bound")
    line["shapes"][0]["line"] = {"color": "--series-2", "width": 2}
    line["annotations"][0]["font"] = {"color": "--series-2", "size": 12}
    return Plot(
        name="spectrum",
        title="Spectrum against bound",
        alt=f"{plural(len(layers), 'layer')}. {summary_of(certificate)}",
        caption="A bar for each layer, in the order of the certificate: how much of its bound its update's "
        "norm uses. Dots are singular values, in per cent of the same bound. Point at a bar for its numbers.",
        data=data,
        layout=layout_of(
            "layer",
            "% of the bound",
            x={
                "range": [middle - room, middle + room],
                "showgrid": False,
                "tickformat": "d",
                **({"dtick": 1} if len(layers) <= 8 else {}),
            },
            y={"range": [0, 1.12 * highest]},
            hovermode="closest",
            bargap=0.25 if len(layers) <= 100 else 0.05,
            showlegend=True,
            **line,
        ),
    )


def _kinds(names: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Layers of one kind in different blocks: label -> (block, index in `names`).

    The block is the first number in a name.
    """
    kinds: dict[str, list[tuple[int, int]]] = {}
    for index, name in enumerate(names):
        match = re.search(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", name)
        if match:
            kind = f"{name[: match.start()]}*{name[match.end() :]}"
            kinds.setdefault(kind, []).append((int(match[0]), index))
    parts = {kind: kind.split(".") for kind in kinds}
    for count in range(1, max((len(found) for found in parts.values()), default=0) + 1):
        labels = {kind: ".".join(found[-count:]) for kind, found in parts.items()}
        if len(set(labels.values())) == len(labels):
            return {labels[kind]: places for kind, places in kinds.items()}
    return kinds


def depth_plot(certificate: Certificate) -> Plot | None:
    """The share of the bound that is used, by block, with a line for each kind of layer."""
    kinds = {
        kind: places
        for kind, places in _kinds([layer.name for layer in certificate.layers]).items()
        if len(places) > 1
    }
    if not kinds or len(kinds) > 10:
        return None
    data = []
    for index, (kind, places) in enumerate(kinds.items()):
        style = Style("", kind, index)
        layers = [certificate.layers[i] for _, i in sorted(places)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plotly_text(kind),
                "x": [block for block, _ in sorted(places)],
                "y": [in_percent(layer.share) for layer in layers],
                "line": {"color": style.color, "width": 1.75},
                "marker": {"symbol": style.marker[0], "size": 7, "color": style.color},
                "hoverinfo": "text",
                "hovertext": [_layer_hover(layer, certificate.norm_name) for layer in layers],
            }
        )
    fullest = max(
        kinds,
        key=lambda kind: statistics.fmean(
            in_percent(certificate.layers[i].share) or 0 for _, i in kinds[kind]
        ),
    )
    return Plot(
        name="depth",
        title="Share of the bound used over depth",
        alt=f"Share of the bound used by block for {plural(len(kinds), 'kind')} of layers; {fullest} uses "
        "most.",
        caption="Lines at 100 % may want a larger bound; lines far below do not feel theirs.",
        data=data,
        layout=layout_of(
            "block",
            "% of the bound",
            x={"tickformat": "d", **({"dtick": 1} if len(data[0]["x"]) <= 12 else {})},
            y={"rangemode": "tozero"},
            showlegend=True,
        ),
        height=400,
    )


def _history_lines(metrics: Mapping[str, Any], keys: Sequence[str]) -> tuple[list[float], list[float | None]]:
    """(steps, values) of what the history holds under nested keys; a gap where a number is not finite."""
    steps, values = [], []
    for entry in metrics.get("history") or []:
        found: Any = entry
        for key in keys:
            found = found.get(key, _ABSENT) if isinstance(found, Mapping) else _ABSENT
        step = finite_number(entry.get("step"))
        if found is not _ABSENT and step is not None:
            steps.append(step)
            values.append(finite_number(found))
    return steps, values


_ABSENT = object()


def loss_plot(metrics: Mapping[str, Any]) -> Plot | None:
    steps, losses = _history_lines(metrics, ["loss"])
    known = [loss for loss in losses if loss is not None]
    if not known:
        return None
    return Plot(
        name="loss",
        title="Training loss",
        alt=f"Training loss from {known[0]:.3g} to {known[-1]:.3g} over {steps[-1]:g} steps.",
        caption="Mean over the steps since the point before."
        + (" Gaps are losses that were not a number." if len(known) < len(losses) else ""),
        data=[
            {
                "type": "scatter",
                "mode": "lines" if len(steps) > 40 else "lines+markers",
                "x": steps,
                "y": losses,
                "line": {"color": "--series-1", "width": 2},
                "marker": {"size": 6, "color": "--series-1"},
                "hovertemplate": "step %{x}<br>loss %{y:.4g}<extra></extra>",
            }
        ],
        layout=layout_of("step", "loss", x={}, y={}),
    )


def scores_plot(metrics: Mapping[str, Any]) -> Plot | None:
    """Target and kept score by step, as evaluated during training."""
    scale = levels(metrics["metric"])
    data, known = [], []
    for name, key, color, symbol, dash in (
        ("target", "target", "--series-1", "circle", "solid"),
        ("kept", "keep", "--series-2", "square", "dash"),
    ):
        steps, scores = _history_lines(metrics, [key, "score"])
        shown = [scale.shown(score) for score in scores]
        if all(value is None for value in shown):
            continue
        known.append(f"{name} ends at {scale.measure(scores[-1])}")
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": steps,
                "y": shown,
                "line": {"color": color, "width": 2, "dash": dash},
                "marker": {"symbol": symbol, "size": 8, "color": color},
                "hoverinfo": "text",
                "hovertext": [
                    f"<b>{name}</b>, step {step:g}<br>{scale.measure(score)}"
                    for step, score in zip(steps, scores)
                ],
            }
        )
    if not data:
        return None
    return Plot(
        name="scores",
        title="Scores while training",
        alt=f"Scores by step: {listed(known)}.",
        caption=f"On validation data; {'higher' if scale.higher_is_better else 'lower'} is better.",
        data=data,
        layout=layout_of(
            "step",
            scale.title,
            x={"rangemode": "tozero"},
            y={},
            showlegend=len(data) > 1,
        ),
    )


def used_plot(metrics: Mapping[str, Any]) -> Plot | None:
    """How much of the bound the layers used, by step: the fullest, the median and the emptiest."""
    rows = []
    for entry in metrics.get("spectra") or []:
        shares = sorted(
            100 * share
            for layer in (entry.get("layers") or {}).values()
            if (share := finite_number(layer.get("share"))) is not None
        )
        if shares:
            rows.append((entry["step"], shares[0], statistics.median(shares), shares[-1]))
    if len(rows) < 2:
        return None
    steps = [row[0] for row in rows]
    return Plot(
        name="used",
        title="Share of the bound used while training",
        alt=f"In the end the fullest layer uses {rows[-1][3]:.0f} % of its bound, the median "
        f"{rows[-1][2]:.0f} %.",
        caption="Line: the median layer. Band: from the emptiest to the fullest.",
        data=[
            {
                "type": "scatter",
                "mode": "lines",
                "x": [*steps, *reversed(steps)],
                "y": [*(row[3] for row in rows), *(row[1] for row in reversed(rows))],
                "fill": "toself",
                "fillcolor": "--series-3",
                "opacity": 0.18,
                "line": {"width": 0, "color": "--series-3"},
                "hoverinfo": "skip",
            },
            {
                "type": "scatter",
                "mode": "lines",
                "x": steps,
                "y": [row[2] for row in rows],
                "line": {"color": "--series-3", "width": 2.5},
                "hoverinfo": "text",
                "hovertext": [
                    f"step {step:g}<br>fullest {high:.1f} %<br>median {middle:.1f} %<br>emptiest {low:.1f} %"
                    for step, low, middle, high in rows
                ],
            },
        ],
        layout=layout_of(
            "step",
            "% of the bound",
            x={"rangemode": "tozero"},
            y={"rangemode": "tozero"},
            **before_line(100, "bound"),
        ),
    )


def path_plot(metrics: Mapping[str, Any]) -> Plot | None:
    """From before to after in the plane of target and kept, with the evaluations in between."""
    ends = [
        tuple(finite_number(look_up(metrics, when, part, "score")) for part in ("target", "keep"))
        for when in ("before", "after")
    ]
    (start, finish) = ends
    if None in (*start, *finish):
        return None
    shown = scales(metrics["metric"], {"target": start[0], "kept": start[1]})
    path = [
        (entry["step"], target, kept)
        for entry in metrics.get("history") or []
        if (target := finite_number(look_up(entry, "target", "score"))) is not None
        and (kept := finite_number(look_up(entry, "keep", "score"))) is not None
    ]

    def placed(pairs: Sequence[Sequence[Any]]) -> dict[str, Any]:
        return {
            "type": "scatter",
            "x": [shown["target"].shown(pair[0]) for pair in pairs],
            "y": [shown["kept"].shown(pair[1]) for pair in pairs],
            "hoverinfo": "text",
        }

    data: list[dict[str, Any]] = [
        placed([start, finish])
        | {
            "mode": "lines",
            "line": {"color": "--axis", "width": 1.5, "dash": "dot"},
            "hoverinfo": "skip",
        }
    ]
    if path:
        data.append(
            placed([pair[1:] for pair in path])
            | {
                "mode": "lines+markers",
                "line": {"color": "--series-1", "width": 1.5},
                "marker": {"size": 6, "color": "--series-1"},
                "hovertext": [
                    f"step {step:g}, validation data<br>{both_text((target, kept), shown)}"
                    for step, target, kept in path
                ],
            }
        )
    data.append(
        placed([start, finish])
        | {
            "mode": "markers+text",
            "text": ["before", "after"],
            "textposition": ["bottom center", "bottom center"],
            "textfont": {"size": 14, "color": "--text"},
            "marker": {
                "symbol": ["star-diamond", "circle"],
                "size": 14,
                "color": ["--text", "--series-1"],
                "line": {"color": "--text", "width": 2},
            },
            "cliponaxis": False,
            "hovertext": [
                f"<b>{name}</b>, test data<br>{both_text(pair, shown)}"
                for name, pair in (("Before", start), ("After", finish))
            ],
        }
    )
    pairs = [start, finish, *(pair[1:] for pair in path)]
    xs, ys = ([shown[n].shown(pair[i]) for pair in pairs] for i, n in enumerate(("target", "kept")))  # type: ignore[index]
    return Plot(
        name="path",
        title="From before to after",
        alt=f"Before: {both_text(start, shown)}. After: {both_text(finish, shown)}.",
        caption="Up and to the right is better. Large marks are test data; the line is the path over the "
        "evaluations while training, on validation data.",
        data=data,
        layout=layout_of(
            shown["target"].title,
            shown["kept"].title,
            x={"range": _padded(xs, shown["target"])},
            y={"range": _padded(ys, shown["kept"])},
        ),
        height=380,
    )


def _padded(values: Sequence[float | None], scale: Scale) -> list[float]:
    """(worst, best) end of an axis with room for words, and no less than ten points or a tenth of a nat."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    room = max(0.14 * (high - low), 5.0 if scale.unit == "%" else 0.05)
    low, high = low - room, high + room
    if scale.unit == "%":
        low, high = max(low, -2.0), min(high, 101.0)
    return [low, high] if scale.higher_is_better else [high, low]


def summary_of(certificate: Certificate) -> str:
    return certificate.summary if certificate.layers else "The certificate has no layers."
