"""A figure of what private merges would look like, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from nblora.checkpoints.figures import blank_figure, save_figure
from nblora.checkpoints.storage import PathLike
from nblora.privacy import Plan

_COLOURS = ("#1f5fbf", "#c2410c", "#00795a", "#a8327e", "#8a6500", "#0e7fa8", "#5b5b5b", "#6b3fa0")
_BEYOND = 10  # the axis goes this factor beyond the numbers of clients that were asked for


def plot_plans(plans: Sequence[Plan], file: PathLike) -> None:
    """Draw the signal-to-noise of plans against the number of clients, which it is proportional to.

    Args:
        plans: a line for each epsilon, truncated solid and dense dashed, and a mark for each plan.
        file: to write, as PNG, PDF or SVG by its suffix.

    Raises:
        AdapterError: if it cannot be written, or its suffix is another.
    """
    counts = [plan.clients for plan in plans]
    ends = (max(1.0, min(counts) / _BEYOND), float(max(counts) * _BEYOND))
    figure = blank_figure(8, 5)
    axes = figure.subplots()
    for number, epsilon in enumerate(dict.fromkeys(plan.epsilon for plan in plans)):
        same = [plan for plan in plans if plan.epsilon == epsilon]
        look = {"color": _COLOURS[number % len(_COLOURS)]}
        first = same[0]
        curves = [("dense", "--", [plan.snr for plan in same])]
        if first.rank is not None:
            truncated = [plan.truncated_snr or 0.0 for plan in same]
            curves.append((f"rank {first.rank}", "-", truncated))
        for name, dash, values in curves:
            each = values[0] / first.clients
            axes.plot(ends, [each * end for end in ends], dash, label=f"epsilon {epsilon:g}, {name}", **look)
            axes.plot([plan.clients for plan in same], values, "o", markersize=5, **look)
    axes.axhline(1, color="#858c96", linewidth=0.8)
    first = plans[0]
    rounds = "" if first.rounds == 1 else f", {first.rounds} rounds"
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="clients",
        ylabel="largest merged update / noise (Frobenius norms)",
        title=f"delta {first.delta:g}, {first.adjacency}{rounds}",
    )
    axes.grid(which="major", color="#e6e8eb")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, file)
