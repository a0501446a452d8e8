"""Colours, marks and dashes, the same in every figure, table and button."""

from __future__ import annotations

from dataclasses import dataclass

PALETTE: dict[str, tuple[str, str]] = {
    "--page": ("#f6f7f8", "#121417"),
    "--card": ("#ffffff", "#1b1e23"),
    "--text": ("#1b1e22", "#e9ebee"),
    "--muted": ("#59606a", "#a7afba"),
    "--line": ("#dfe2e6", "#343a42"),
    "--grid": ("#e6e8eb", "#2d3239"),
    "--axis": ("#858c96", "#7d8590"),
    "--link": ("#1a56b0", "#8ab8ff"),
    "--good": ("#0a6b4b", "#55d0a4"),
    "--bad": ("#b3261e", "#ff8f87"),
    "--bar": ("#a9c3ea", "#35507c"),
    "--series-1": ("#1f5fbf", "#7cb0ff"),
    "--series-2": ("#c2410c", "#ff9466"),
    "--series-3": ("#00795a", "#4fd1a5"),
    "--series-4": ("#a8327e", "#f08ccb"),
    "--series-5": ("#8a6500", "#e3bd4f"),
    "--series-6": ("#0e7fa8", "#6fd3f5"),
    "--series-7": ("#5b5b5b", "#c4c8ce"),
    "--series-8": ("#6b3fa0", "#c3a2f5"),
}
"""CSS variable -> colour in the light and in the dark scheme."""


_SERIES = [name for name in PALETTE if name.startswith("--series")]


# the map "cividis", which people with any colour vision order alike, and ink that can be read on it
HEAT = [
    ("#00224e", "#ffffff"),
    ("#1a386f", "#ffffff"),
    ("#434e6c", "#ffffff"),
    ("#61656f", "#ffffff"),
    ("#7d7c78", "#000000"),
    ("#9c9576", "#000000"),
    ("#bcae6c", "#000000"),
    ("#dfc959", "#000000"),
    ("#fee838", "#000000"),
]


_MARKERS = [  # Plotly's name, matplotlib's, and a character for tables and buttons
    ("circle", "o", "●"),
    ("square", "s", "■"),
    ("diamond", "D", "◆"),
    ("triangle-up", "^", "▲"),
    ("triangle-down", "v", "▼"),
    ("cross", "P", "✚"),
    ("x", "X", "✖"),
    ("star", "*", "★"),
    ("hexagon", "h", "⬢"),
    ("pentagon", "p", "⬟"),
]


_DASHES = [("solid", "-"), ("dash", "--"), ("dot", ":"), ("dashdot", "-.")]


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure and table: no two have the same marker and colour."""

    method: str
    label: str
    index: int

    @property
    def color(self) -> str:
        return _SERIES[self.index % len(_SERIES)]

    @property
    def light_color(self) -> str:
        return PALETTE[self.color][0]

    @property
    def marker(self) -> tuple[str, str, str]:
        return _MARKERS[self.index % len(_MARKERS)]

    @property
    def glyph(self) -> str:
        return self.marker[2]

    @property
    def dash(self) -> tuple[str, str]:
        return _DASHES[self.index // len(_SERIES) % len(_DASHES)]

    @property
    def width(self) -> float:
        """Our own method stands out a little."""
        return 3.0 if self.method.startswith("nblora") else 1.75
