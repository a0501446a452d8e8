"""What all Plotly figures share. They are plain mappings, and their colours names of CSS variables."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nblora.certificate import finite
from nblora.reporting.words import rate_labels


@dataclass(frozen=True)
class Plot:
    """A Plotly figure with the words around it; colours are names of CSS variables.

    Attributes:
        alt: what a reader who does not see the figure should know.
    """

    name: str
    title: str
    alt: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 360

    @property
    def specification(self) -> object:
        """Plain JSON values: Plotly draws a gap for null."""
        return finite({"data": self.data, "layout": self.layout})


def _axis(**choices: Any) -> dict[str, Any]:
    return {
        "gridcolor": "--grid",
        "linecolor": "--axis",
        "tickcolor": "--axis",
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        **choices,
    }


def layout_of(
    x_title: str, y_title: str, *, x: Mapping[str, Any], y: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """A layout whose y title lies above the axis, where it can be read and takes no width."""
    title = {
        "text": plotly_text(y_title),
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "bottom",
        "yshift": 6,
        "font": {"color": "--muted"},
    }
    annotations = [title, *more.pop("annotations", [])]
    return {
        "font": {"color": "--text", "size": 13, "family": "sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 40, "r": 14, "t": 34, "b": 44},
        "xaxis": _axis(
            title={"text": plotly_text(x_title), "font": {"color": "--muted", "size": 13}, "standoff": 8},
            automargin="bottom",
            **x,
        ),
        "yaxis": _axis(automargin="left", **y),
        "hoverlabel": {
            "bgcolor": "--card",
            "bordercolor": "--axis",
            "font": {"color": "--text", "size": 12.5},
            "align": "left",
        },
        "hovermode": "closest",
        "showlegend": False,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.22, "yanchor": "top"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "--muted", "activecolor": "--text"},
        "annotations": annotations,
        **more,
    }


def plotly_text(text: Any) -> str:
    """Text that Plotly shows as it is; it reads some HTML tags itself."""
    return html.escape(str(text), quote=False)


def wrapped_name(name: str, width: int = 34) -> str:
    """A long module name in lines that fit a phone, for Plotly."""
    lines, line = [], ""
    for part in re.split(r"(?<=[./_-])", name):
        while len(part) > width:
            lines.append(line + part[: width - len(line)])
            line, part = "", part[width - len(line) :]
        if line and len(line) + len(part) > width:
            lines.append(line)
            line = ""
        line += part
    return "<br>".join(plotly_text(line) for line in [*lines, line] if line)


def rate_axis(rates: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis with the learning rates that ran as its ticks."""
    values = sorted({rate for rate in rates if rate > 0})
    axis: dict[str, Any] = {"type": "log"}
    if len(values) <= 9:
        axis |= {"tickvals": values, "ticktext": rate_labels(values)}
    return axis


def before_line(level: float | None, words: str) -> dict[str, Any]:
    """A dotted line where the score was before training."""
    if level is None:
        return {}
    return {
        "shapes": [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": level,
                "y1": level,
                "line": {"color": "--axis", "dash": "dot", "width": 1.5},
            }
        ],
        "annotations": [
            {
                "text": words,
                "showarrow": False,
                "xref": "paper",
                "x": 1,
                "xanchor": "right",
                "y": level,
                "yanchor": "bottom",
                "font": {"color": "--muted", "size": 12},
                "bgcolor": "--card",
                "borderpad": 0,
                "opacity": 0.9,
            }
        ],
    }
