"""A figure of what is in LoRA files, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nblora.checkpoints.inspection import Inspection
from nblora.checkpoints.storage import AdapterError, PathLike, atomic_file, one_line

_MOST = 20  # layers with a bar of their own


def plot_spectra(inspections: Sequence[Inspection], file: PathLike) -> None:
    """Draw the spectra of all layers, and the most dangerous layers, of each inspected LoRA.

    Args:
        inspections: one row of panels for each.
        file: to write, as PNG, PDF or SVG by its suffix.

    Raises:
        AdapterError: if it cannot be written, or its suffix is another.
    """
    check_plot(file)
    figure = blank_figure(12, 5 * len(inspections))
    for (curves, bars), inspection in zip(
        figure.subplots(len(inspections), 2, squeeze=False), inspections, strict=True
    ):
        for layer in reversed(inspection.layers):  # the most dangerous on top
            most = layer is inspection.layers[0]
            curves.plot(
                range(1, len(layer.singular_values) + 1),
                [max(value, 1e-12) for value in layer.singular_values],
                color="#c44e52" if most else "#2a6fbb",
                alpha=1.0 if most else 0.35,
                marker=".",
                label=layer.name if most else None,
            )
        curves.set(title=inspection.source, xlabel="number", ylabel="singular value", yscale="log")
        curves.title.set_parse_math(False)  # "$" in a name is no formula
        for text in curves.legend(loc="upper right").get_texts():
            text.set_parse_math(False)
        first = inspection.layers[:_MOST][::-1]
        bars.barh([layer.name for layer in first], [layer.danger for layer in first], color="#2a6fbb")
        bars.tick_params(axis="y", labelsize=7)
        for text in bars.get_yticklabels():
            text.set_parse_math(False)
        what = "spectral norm / that of the base weight" if inspection.relative else "spectral norm"
        bars.set(title="most dangerous layers", xlabel=what)
    save_figure(figure, file)


def check_plot(file: PathLike) -> str:
    """The format of a plot, by the suffix of its file: png, pdf or svg."""
    suffix = Path(file).suffix.removeprefix(".").lower()
    if suffix not in ("png", "pdf", "svg"):
        raise AdapterError(f"a plot must be a .png, .pdf or .svg file, got {file}")
    return suffix


def blank_figure(width: float, height: float) -> Any:
    """A matplotlib figure without pyplot, whose state the caller would share; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, file: PathLike) -> None:
    """Write a figure, whole or not at all.

    Raises:
        AdapterError: if it cannot be written, or its suffix is another than .png, .pdf and .svg.
    """
    suffix = check_plot(file)
    try:
        with atomic_file(file) as temporary:
            figure.savefig(temporary, format=suffix, dpi=110)
    except OSError as error:
        raise AdapterError(f"{file} cannot be written: {one_line(error)}") from error
