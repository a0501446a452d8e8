"""Plain-text tables and JSON of reports."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first of them the heading, in aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def json_text(content: Any) -> str:
    """JSON in which numbers that are not finite are null."""
    return json.dumps(finite(content), indent=2, allow_nan=False)


def finite(value: object) -> object:
    """The same with None in place of numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
