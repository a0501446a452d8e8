"""The interactive figures of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nblora.reporting.looks import Style
from nblora.reporting.plots import Plot, before_line, layout_of, plotly_text, rate_axis
from nblora.reporting.sweep import (
    Curve,
    Front,
    Setting,
    Spread,
    both_text,
    count_outside,
    fronts,
    learning_rate_curves,
    scales_of,
    setting_text,
    trade_off_ends,
    unbroken_parts,
    visible_range,
)
from nblora.reporting.words import Scale, Score, epochs_text, finite_number, plural, rate_text


def curve_plot(comparison: Mapping[str, Any], score: Score) -> Plot | None:
    """A score by learning rate with a line for each method and a band over its seeds."""
    curves, scale = learning_rate_curves(comparison, score), scales_of(comparison)[score]
    spreads = [spread for curve in curves for s in curve.settings if (spread := s.score(score))]
    if not spreads:
        return None
    before = scale.shown((comparison.get("before") or {}).get(score))
    values = [scale.shown(value) for s in spreads for value in (s.low, s.high)]
    ends = visible_range([*values, before], scale)
    data: list[dict[str, Any]] = []
    for curve in curves:
        data += _curve_traces(curve, scale, ends)
    best = max(
        ((spread.mean, curve, s) for curve in curves for s in curve.settings if (spread := s.score(score))),
        key=lambda found: found[0],
    )
    off = count_outside(values[::2], ends)
    lost = any(setting.lost_in_words for curve in curves for setting in curve.settings)
    reference = comparison["reference"]
    return Plot(
        name=f"{score}-by-learning-rate",
        title="Target by learning rate" if score == "target" else "Kept by learning rate",
        alt=f"{scale.title} by learning rate for {plural(len(curves), 'method')}; best is "
        f"{best[1].style.label} at {rate_text(best[2].learning_rate)} with {scale.measure(best[0])}.",
        caption=f"Rank {reference['rank']}, {epochs_text(reference['epochs'])}; lines are means over the "
        "seeds, bands go from the worst seed to the best."
        + (" Crosses at the bottom: runs that diverged or failed." if lost else "")
        + (
            f" {plural(off, 'value')} beyond the axis: the figure's Autoscale button shows all."
            if off
            else ""
        ),
        data=data,
        layout=layout_of(
            "learning rate",
            scale.title,
            x=rate_axis(s.learning_rate for curve in curves for s in curve.settings),
            y={"range": list(ends)},
            **before_line(before, "before"),
        ),
    )


def _curve_traces(curve: Curve, scale: Scale, ends: tuple[float, float]) -> list[dict[str, Any]]:
    style = curve.style
    meta = {"method": style.method}
    rates = [s.learning_rate for s in curve.settings]
    spreads = [s.score(curve.score) for s in curve.settings]
    outline: list[tuple[float | None, float | None]] = []
    for part in unbroken_parts(list(zip(rates, spreads))):
        outline += [(rate, scale.shown(spread.high)) for rate, spread in part]
        outline += [(rate, scale.shown(spread.low)) for rate, spread in reversed(part)]
        outline.append((None, None))
    band: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in outline],
        "y": [y for _, y in outline],
        "fill": "toself",
        "fillcolor": style.color,
        "line": {"width": 0, "color": style.color},
        "opacity": 0.16,
        "hoverinfo": "skip",
        "meta": meta,
    }
    line: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plotly_text(style.label),
        "x": rates,
        "y": [None if spread is None else scale.shown(spread.mean) for spread in spreads],
        "line": {"color": style.color, "width": style.width, "dash": style.dash[0]},
        "marker": {"symbol": style.marker[0], "size": 9, "color": style.color},
        "hoverinfo": "text",
        "hovertext": [_curve_hover(style, s, spread, scale) for s, spread in zip(curve.settings, spreads)],
        "meta": meta,
    }
    traces: list[dict[str, Any]] = [line]
    if any(spread is not None and spread.count > 1 for spread in spreads):
        traces.insert(0, band)
    lost = [s for s in curve.settings if s.diverged or s.failed]
    if lost:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [s.learning_rate for s in lost],
                "y": [ends[0]] * len(lost),
                "marker": {"symbol": "x-open", "size": 10, "color": style.color, "line": {"width": 2}},
                "cliponaxis": False,
                "hoverinfo": "text",
                "hovertext": [
                    f"<b>{plotly_text(style.label)}</b><br>{setting_text(s)}<br>{s.lost_in_words}"
                    for s in lost
                ],
                "meta": meta,
            }
        )
    return traces


def _curve_hover(style: Style, setting: Setting, spread: Spread | None, scale: Scale) -> str:
    lines = [f"<b>{plotly_text(style.label)}</b>", setting_text(setting)]
    if spread is not None:
        lines.append(scale.phrase(spread.mean))
        if spread.count > 1:
            ends = sorted((spread.low, spread.high))
            lines.append(f"{spread.count} seeds: {scale.text(ends[0])} to {scale.measure(ends[1])}")
    if setting.lost_in_words:
        lines.append(setting.lost_in_words)
    return "<br>".join(lines)


def trade_off_plot(comparison: Mapping[str, Any]) -> Plot | None:
    """Kept against target: every run, each method's front, and what a user would pick."""
    found, shown = fronts(comparison), scales_of(comparison)
    everything = [pair for front in found for pair in front.pairs]
    if not everything:
        return None
    before = comparison.get("before") or {}
    start = (finite_number(before.get("target")), finite_number(before.get("kept")))
    ends = trade_off_ends(found, start, shown)
    layers = zip(*(_front_traces(front, shown) for front in reversed(found)))
    data: list[dict[str, Any]] = [trace for layer in layers for trace in layer]
    if start[0] is not None and start[1] is not None:
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [shown["target"].shown(start[0])],
                "y": [shown["kept"].shown(start[1])],
                "text": ["before"],
                "textposition": "bottom right",
                "marker": {"symbol": "star-diamond", "size": 13, "color": "--text"},
                "hoverinfo": "text",
                "hovertext": [f"<b>Before training</b><br>{both_text(start, shown)}"],
            }
        )
    runs = [pair for front in found for _, pair in front.runs]
    drawn = [(shown["target"].shown(target), shown["kept"].shown(kept)) for target, kept in runs]
    off = sum(bool(count_outside([x], ends[0]) or count_outside([y], ends[1])) for x, y in drawn)
    picks = [f"{front.style.label} {both_text(front.picked, shown)}" for front in found if front.picked]
    reference = comparison["reference"]
    return Plot(
        name="trade-off",
        title="The trade-off: learned against kept",
        alt="Kept against target. At the learning rates that a user would pick: " + "; ".join(picks) + ".",
        caption="Small marks are runs, a line is a method's front: the runs that none of its others beats on "
        "both. A large outlined mark is what a user would pick on target validation, mean over the seeds, "
        f"at rank {reference['rank']} and {epochs_text(reference['epochs'])}."
        + (f" {plural(off, 'run')} beyond the axes: the figure's Autoscale button shows all." if off else ""),
        data=data,
        layout=layout_of(
            shown["target"].title,
            shown["kept"].title,
            x={"range": list(ends[0])},
            y={"range": list(ends[1])},
        ),
        height=480,
    )


def _front_traces(front: Front, shown: Mapping[Score, Scale]) -> list[dict[str, Any]]:
    """Three layers, the last on top: the runs, the front, and what was picked."""
    style = front.style
    meta, name = {"method": style.method}, plotly_text(style.label)

    def placed(pairs: Iterable[tuple[float, float]]) -> dict[str, Any]:
        pairs = list(pairs)
        return {
            "type": "scatter",
            "x": [shown["target"].shown(target) for target, _ in pairs],
            "y": [shown["kept"].shown(kept) for _, kept in pairs],
            "hoverinfo": "text",
            "meta": meta,
        }

    traces = [
        placed(pair for _, pair in front.runs)
        | {
            "mode": "markers",
            "marker": {"symbol": style.marker[0], "size": 5, "color": style.color, "opacity": 0.4},
            "hovertext": [
                f"<b>{name}</b><br>{text}<br>{both_text(pair, shown)}" for text, pair in front.runs
            ],
        },
        placed(front.points)
        | {
            "mode": "lines+markers",
            # down from a point, then to the next: what lies below and left of the line is beaten
            "line": {"shape": "vh", "color": style.color, "width": style.width, "dash": style.dash[0]},
            "marker": {"symbol": style.marker[0], "size": 7, "color": style.color},
            "hovertext": [
                f"<b>{name}</b>, on its front<br>{both_text(pair, shown)}" for pair in front.points
            ],
        },
    ]
    picked = [front.picked] if front.picked else []
    traces.append(
        placed(picked)
        | {
            "mode": "markers",
            "marker": {
                "symbol": style.marker[0],
                "size": 14,
                "color": style.color,
                "line": {"color": "--text", "width": 2},
            },
            "hovertext": [
                f"<b>{name}</b>, picked<br>{front.picked_text}<br>{both_text(pair, shown)}" for pair in picked
            ],
        }
    )
    return traces
