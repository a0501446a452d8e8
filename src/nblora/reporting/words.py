"""Numbers as text, and scores on the scale that a reader knows: per cent, or nats gained and lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Score = Literal["target", "kept"]


def finite_number(value: Any) -> float | None:
    """A finite number, or None for what is missing, not a number or infinite."""
    if value is None or isinstance(value, (bool, str)):
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def fixed_text(value: float | None, digits: int, *, sign: bool = False) -> str:
    """With a minus that has the width of a plus, and no negative zero."""
    if value is None:
        return "–"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if not float(text):
        text = text.replace("-", "±" if sign else "").replace("+", "±")
    return text.replace("-", "−")


def rate_text(value: Any) -> str:
    """A learning rate, bound or other setting in few characters."""
    number = finite_number(value)
    if number is None:
        return "–" if value is None else str(value)
    if 0 < abs(number) < 1e-3:
        mantissa, _, exponent = f"{number:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{number:g}"


def rate_labels(rates: Sequence[float]) -> list[str]:
    """Learning rates beside each other: all of them with an exponent where one of them needs it."""
    if not any(0 < rate < 1e-3 for rate in rates):
        return [rate_text(rate) for rate in rates]
    parts = [f"{rate:.3e}".partition("e") for rate in rates]
    return [f"{float(mantissa):g}e{int(exponent)}" for mantissa, _, exponent in parts]


def duration_text(value: Any) -> str:
    seconds = finite_number(value)
    if seconds is None:
        return "not measured"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if seconds < 3600 and minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def memory_text(value: Any) -> str:
    size = finite_number(value)
    if size is None:
        return "not measured"
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def count_text(value: Any) -> str:
    """With narrow spaces between thousands."""
    number = finite_number(value)
    return "–" if number is None else f"{int(number):,}".replace(",", "\u202f")


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


@dataclass(frozen=True)
class Scale:
    """How scores are shown: shown = factor * score + offset.

    Attributes:
        title: what is shown, with its unit.
        words: what is shown, after a number.
        unit: of a number.
        difference: of a difference of numbers.
        higher_is_better: of what is shown; scores themselves are always better when higher.
    """

    title: str
    words: str
    unit: str
    difference: str
    factor: float
    offset: float
    digits: int
    higher_is_better: bool

    def shown(self, score: Any) -> float | None:
        number = finite_number(score)
        return None if number is None else self.factor * number + self.offset

    def text(self, score: Any) -> str:
        """The number alone."""
        return fixed_text(self.shown(score), self.digits)

    def measure(self, score: Any) -> str:
        """The number with its unit."""
        return "–" if self.shown(score) is None else f"{self.text(score)}\u00a0{self.unit}"

    def phrase(self, score: Any) -> str:
        """The number with its unit and what it says."""
        return f"{self.measure(score)} {self.words}".rstrip()

    def spread(self, deviation: Any) -> float | None:
        """A standard deviation of scores, as shown."""
        number = finite_number(deviation)
        return None if number is None else abs(self.factor) * number

    def lost(self, difference: Any) -> str:
        """A difference of scores, with its unit."""
        number = finite_number(difference)
        if number is None:
            return "–"
        return f"{fixed_text(abs(self.factor) * number, self.digits)}\u00a0{self.difference}"


def levels(metric: str) -> Scale:
    """Scores as they are: accuracy in per cent, or nats per token (lower is better)."""
    if metric == "accuracy":
        return Scale("accuracy (%)", "", "%", "points", 100, 0, 1, True)
    return Scale("nats per token", "", "nats", "nats", -1, 0, 3, False)


def scales(metric: str, before: Mapping[str, Any] | None) -> dict[Score, Scale]:
    """How target and kept scores are shown: accuracy in per cent, or nats gained and lost by training.

    Args:
        metric: "accuracy" or "nats".
        before: "target" and "kept" scores before training; nats are shown as they are without them.
    """
    if metric == "accuracy":
        return {
            "target": Scale("target accuracy (%)", "on target", "%", "points", 100, 0, 1, True),
            "kept": Scale("kept accuracy (%)", "kept", "%", "points", 100, 0, 1, True),
        }
    target, kept = (finite_number((before or {}).get(score)) for score in ("target", "kept"))
    return {
        "target": Scale("target nats per token", "on target", "nats", "nats", -1, 0, 3, False)
        if target is None
        else Scale("gained on target (nats)", "gained on target", "nats", "nats", 1, -target, 3, True),
        "kept": Scale("kept nats per token", "on kept", "nats", "nats", -1, 0, 3, False)
        if kept is None
        else Scale("lost on kept (nats)", "lost on kept", "nats", "nats", -1, kept, 3, False),
    }


def epochs_text(epochs: Any) -> str:
    return f"{rate_text(epochs)} {'epoch' if epochs == 1 else 'epochs'}"


def look_up(value: Any, *keys: str) -> Any:
    """A value in nested mappings, None where one of them is missing."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def in_percent(share: Any) -> float | None:
    number = finite_number(share)
    return None if number is None else 100 * number


def share_text(share: float) -> str:
    return (
        f"{100 * share:.1f}\u00a0%" if math.isfinite(share) else "more than all" if share > 0 else "unknown"
    )
