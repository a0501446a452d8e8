"""The figures of a comparison for print, with matplotlib."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nblora.checkpoints import PathLike, atomic_file
from nblora.reporting.looks import HEAT
from nblora.reporting.sweep import (
    fronts,
    heat_cell,
    heat_ends,
    learning_rate_curves,
    scales_of,
    shared_maps,
    trade_off_ends,
    unbroken_parts,
    visible_range,
)
from nblora.reporting.words import finite_number, rate_labels, rate_text


def comparison_figures(comparison: Mapping[str, Any], folder: PathLike) -> list[Path]:
    """Draw a comparison for print: the trade-off front, learning-rate curves and heat maps.

    Args:
        comparison: as `comparison.json` holds it.
        folder: gets front, learning-rates and heatmaps, each as .png and .svg, but for those without data.

    Raises:
        ImportError: without matplotlib.
        OSError: if the folder cannot be written.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'nblora[plots]'") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "front": _draw_front(comparison),
        "learning-rates": _draw_curves(comparison),
        "heatmaps": _draw_heat_maps(comparison),
    }
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        for suffix in ("png", "svg"):  # the second has the layout of the first, which takes long to find
            with atomic_file(folder / f"{name}.{suffix}") as file:
                figure.savefig(file, format=suffix, dpi=150)
            written.append(folder / f"{name}.{suffix}")
            figure.set_layout_engine("none")
    return written


def _figure(width: float, height: float) -> Any:
    """A figure without pyplot, whose state the caller would share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _mathless(text: str) -> str:
    """Matplotlib reads $...$ as a formula."""
    return text.replace("$", r"\$")


def _draw_front(comparison: Mapping[str, Any]) -> Any:
    found, shown = fronts(comparison), scales_of(comparison)
    if not found:
        return None
    figure = _figure(8, 5.6)
    axes = figure.subplots()
    before = comparison.get("before") or {}
    start = (finite_number(before.get("target")), finite_number(before.get("kept")))

    def placed(pairs: Iterable[tuple[float, float]]) -> tuple[list[Any], list[Any]]:
        pairs = list(pairs)
        return [shown["target"].shown(t) for t, _ in pairs], [shown["kept"].shown(k) for _, k in pairs]

    for front in found:
        style = front.style
        look = {"color": style.light_color, "marker": style.marker[1]}
        axes.plot(*placed(pair for _, pair in front.runs), linestyle="", markersize=3, alpha=0.35, **look)
        axes.plot(
            *placed(front.points),
            drawstyle="steps-pre",
            linestyle=style.dash[1],
            linewidth=0.8 * style.width,
            markersize=5,
            label=_mathless(style.label),
            **look,
        )
        if front.picked:
            axes.plot(
                *placed([front.picked]),
                linestyle="",
                markersize=11,
                markeredgecolor="black",
                markeredgewidth=1.3,
                zorder=5,
                **look,
            )
    if start[0] is not None and start[1] is not None:
        axes.plot(*placed([(start[0], start[1])]), "k*", markersize=11, label="before", linestyle="")
    ends = trade_off_ends(found, start, shown)
    axes.set(
        xlabel=shown["target"].title,
        ylabel=shown["kept"].title,
        xlim=ends[0],
        ylim=ends[1],
        title="Learned against kept (outlined: picked on target validation)",
    )
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _draw_curves(comparison: Mapping[str, Any]) -> Any:
    shown = scales_of(comparison)
    curves = {score: learning_rate_curves(comparison, score) for score in ("target", "kept")}
    scored = {
        score: found
        for score, found in curves.items()
        if any(s.score(score) for curve in found for s in curve.settings)  # type: ignore[arg-type]
    }
    if not scored:
        return None
    figure = _figure(4.6 * len(scored) + 1.8, 4.2)
    for axes, (score, found) in zip(figure.subplots(1, len(scored), squeeze=False)[0], scored.items()):
        scale = shown[score]  # type: ignore[index]
        values: list[float | None] = []
        for curve in found:
            style = curve.style
            line = [(s.learning_rate, s.score(curve.score)) for s in curve.settings]
            for part in unbroken_parts(line):
                low, high = ([scale.shown(getattr(s, end)) for _, s in part] for end in ("low", "high"))
                values += [*low, *high]
                axes.fill_between(
                    [rate for rate, _ in part], low, high, color=style.light_color, alpha=0.14, linewidth=0
                )
            axes.plot(
                [rate for rate, _ in line],
                [math.nan if s is None else scale.shown(s.mean) for _, s in line],
                color=style.light_color,
                marker=style.marker[1],
                linestyle=style.dash[1],
                linewidth=0.8 * style.width,
                markersize=5,
                label=_mathless(style.label),
            )
        before = scale.shown((comparison.get("before") or {}).get(score))
        if before is not None:
            axes.axhline(before, color="0.5", linestyle=":", linewidth=1, label="before")
        axes.set(
            xscale="log",
            xlabel="learning rate",
            ylabel=scale.title,
            ylim=visible_range([*values, before], scale),
        )
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def _draw_heat_maps(comparison: Mapping[str, Any]) -> Any:
    shown, found = scales_of(comparison), shared_maps(comparison, "rank")
    if not found:
        return None
    from matplotlib.colors import ListedColormap

    colors = ListedColormap([color for color, _ in HEAT])
    scores = list(found)
    count = len(found[scores[0]])
    figure = _figure(4.8 * len(scores), 0.5 + 1.5 * count)
    grid = figure.subplots(count, len(scores), squeeze=False)
    for j, score in enumerate(scores):
        ends = heat_ends(found[score], shown[score])
        for i, heat_map in enumerate(found[score]):
            axes = grid[i][j]
            cells = [
                [heat_cell(setting, score, shown[score], ends) for setting in row] for row in heat_map.cells
            ]
            levels = [[math.nan if level is None else level for level, _ in row] for row in cells]
            axes.pcolormesh(levels, cmap=colors, vmin=-0.5, vmax=len(HEAT) - 0.5, edgecolors="w", linewidth=2)
            for y, row in enumerate(cells):
                for x, (level, text) in enumerate(row):
                    ink = "#000000" if level is None else HEAT[level][1]
                    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=ink, fontsize=8)
            axes.set(
                xticks=[x + 0.5 for x in range(len(heat_map.columns))],
                xticklabels=rate_labels(heat_map.columns),
                yticks=[y + 0.5 for y in range(len(heat_map.rows))],
                yticklabels=[rate_text(value) for value in heat_map.rows],
                ylabel=heat_map.along,
            )
            axes.tick_params(length=0, labelsize=8)
            axes.set_title(f"{_mathless(heat_map.style.label)}: {shown[score].title}", fontsize=9)
            for side in axes.spines.values():
                side.set_visible(False)
        grid[-1][j].set_xlabel("learning rate")
    return figure
