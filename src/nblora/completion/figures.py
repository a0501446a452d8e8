"""Figures of completions, with matplotlib: before and after, and what a fit found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nblora.bounds import parse_norm
from nblora.completion.pictures import PictureForm, to_pixels
from nblora.completion.table import Table, Values

_BLUE, _RED, _GREY = "#2a6fbb", "#c44e52", "#8a8a8a"
_MISSING = (0.91, 0.89, 0.86)  # a colour that a missing entry has in the figure of a matrix
_MOST_PIXELS = 1200  # a side of what is drawn; more cannot be seen


def plot_before_after(table: Table, completed: Values, file: Path, suffix: str) -> None:
    """Draw what was observed beside the completed matrix or picture.

    Args:
        table: of a picture, or a matrix without ids.
        completed: (m, n).
        file: to write.
        suffix: its format, ".png", ".pdf" or ".svg".
    """
    form = table.form
    observed = table.observed()
    share = len(table) / observed.size
    if isinstance(form, PictureForm):
        after = to_pixels(completed, form.channels) / form.depth
        seen = to_pixels(observed, form.channels).all(axis=2, keepdims=True)
        grey_after = form.channels == 1
        paper = 1.0 if np.median(table.values) < form.depth / 2 else 0.0  # what differs more from the picture
        before = np.where(seen, after, paper)
        pictures = [_thinned(picture[:, :, 0] if grey_after else picture) for picture in (before, after)]
        looks: list[dict[str, Any]] = [{"cmap": "gray", "vmin": 0, "vmax": 1}] * 2
        label = "pixels"
    else:
        low, high = np.percentile(table.values, [1, 99])
        if low == high:
            low, high = low - 0.5, high + 0.5
        pictures = [_thinned(np.where(observed, completed, np.nan)), _thinned(completed)]
        looks = [{"cmap": "viridis", "vmin": low, "vmax": high}] * 2
        label = "entries"
    height, width = pictures[0].shape[:2]
    side = float(np.clip(width / height, 0.4, 2.5))
    panel = 4.8 * min(1.0, side), 4.8 * min(1.0, 1 / side)  # inches
    labels = (0.2, 0.4) if isinstance(form, PictureForm) else (1.8, 0.8)
    figure = _figure((2 * panel[0] + labels[0], panel[1] + labels[1]))
    panels = figure.subplots(1, 2)
    drawn = None
    for axes, picture, look, title in zip(
        panels, pictures, looks, (f"observed: {share:.0%} of the {label}", "completed"), strict=True
    ):
        axes.set_facecolor(_MISSING)
        square = isinstance(form, PictureForm) or 0.4 <= width / height <= 2.5
        drawn = axes.imshow(
            picture,
            aspect="equal" if square else "auto",
            interpolation="nearest" if width < 600 else "none",
            **look,
        )
        axes.set_title(title, fontsize=11)
        if isinstance(form, PictureForm):
            axes.set_axis_off()
        else:
            axes.set(xlabel="column", ylabel="row")
    if not isinstance(form, PictureForm):
        figure.colorbar(drawn, ax=list(panels), label="value", shrink=0.85)
    figure.savefig(file, format=suffix[1:], dpi=140)


def _thinned(picture: NDArray[Any]) -> NDArray[Any]:
    """Every so many rows and columns of a large picture."""
    steps = (-(-side // _MOST_PIXELS) for side in picture.shape[:2])
    rows, columns = steps
    return picture[::rows, ::columns]


def plot_fit(estimator: Any, file: Path, suffix: str) -> None:
    """Draw the spectrum of a fitted `NBMatrixCompletion` against its bound, and how its bound was chosen.

    Args:
        file: to write.
        suffix: its format, ".png", ".pdf" or ".svg".
    """
    sigma = np.asarray(estimator.singular_values_, dtype=float)
    # a bound of 0, of a table without anything to explain, has no place on the logarithmic axis
    tried = [
        row for row in estimator.validation_table_ or () if np.isfinite(row["rmse"]) and row["bound"] > 0
    ]
    figure = _figure((10 if tried else 5.4, 4.2))
    axes = figure.subplots(1, 2 if tried else 1, squeeze=False)[0]
    spectrum = axes[0]
    spectrum.bar(range(1, len(sigma) + 1), sigma, color=_BLUE, width=0.8)
    norm = parse_norm(estimator.norm).name
    whole = f"{norm} norm {estimator.certificate_.norm:.4g}, bound {estimator.bound_:.4g}"
    if norm == "spectral":
        spectrum.axhline(estimator.bound_, color=_RED, linestyle="--", label="bound")
        spectrum.legend(frameon=False)
    spectrum.set_title(f"rank {estimator.rank_}: {whole}", fontsize=11)
    spectrum.set(xlabel="number", ylabel="singular value", ylim=(0, None))
    spectrum.xaxis.get_major_locator().set_params(integer=True)
    if tried:
        _draw_choices(axes[1], tried)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format=suffix[1:], dpi=140)


def _draw_choices(axes: Any, tried: list[Any]) -> None:
    """Validation RMSE against the bound, a line for each rank; the best setting is marked."""
    groups: dict[int, list[Any]] = {}
    for row in tried:
        groups.setdefault(int(row["rank"]), []).append(row)
    colours = (_BLUE, "#55a868", "#8172b2", "#dd8452", _GREY)
    for number, (rank, rows) in enumerate(groups.items()):
        rows = sorted(rows, key=lambda row: row["bound"])
        axes.plot(
            [row["bound"] for row in rows],
            [row["rmse"] for row in rows],
            marker="o",
            markersize=4,
            color=colours[number % len(colours)],
            label=f"rank {rank}",
        )
    best = min(tried, key=lambda row: row["rmse"])
    axes.plot(
        best["bound"], best["rmse"], marker="*", markersize=11, color=_RED, linestyle="none", label="best"
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # between powers of ten a few, which do not touch
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    axes.set_title("choice on validation entries", fontsize=11)
    axes.set(xlabel="bound", ylabel="RMSE")
    axes.legend(frameon=False, fontsize=8)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
