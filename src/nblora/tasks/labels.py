"""Labels: from the values of a column to classes, and from classes to the outputs of a head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from nblora.tasks.kinds import TaskError


def read_labels(rows: Dataset, column: str, *, one_per_token: bool, place: str) -> list[Any]:
    """The class of each row as a string, or a list of those of its tokens.

    Args:
        rows: of one split.
        column: of the labels.
        one_per_token: whether each row has a list of classes.
        place: what the split is called in errors.

    Raises:
        TaskError: for the first row whose label is missing or not a class.
    """
    feature = _inner(rows.features[column])
    names = feature.names if isinstance(feature, ClassLabel) else None
    known: dict[Any, str] = {}

    def where(row: int) -> str:
        return f"column {column!r} of row {row + 1} of {place}"

    def name(value: Any, row: int) -> str:
        if isinstance(value, (list, dict)):
            raise TaskError(f"labels must be one class for each row, got {str(value)[:80]} in {where(row)}")
        if value not in known:
            known[value] = _class(value, names, lambda: where(row))
        return known[value]

    found: list[Any] = []
    for row, value in enumerate(rows[column][:]):
        if not one_per_token:
            found.append(name(value, row))
        elif isinstance(value, list):
            found.append([name(item, row) for item in value])
        else:
            raise TaskError(f"tags must be a list with a class for each token, got {value!r} in {where(row)}")
    return found


def has_labels(rows: Dataset, column: str) -> bool:
    """Whether any row has a label; benchmarks publish test sets without the column, or with -1 in it."""
    if column not in rows.column_names:
        return False
    return any(value not in (None, -1) for value in leaves(rows[column][:]))


def classes_of(labels: Iterable[str], feature: Any, column: str, source: str) -> tuple[str, ...]:
    """All classes: in the order that the data give, or numbers and names in theirs."""
    occurring = set(labels)
    inner = _inner(feature)
    if isinstance(inner, ClassLabel) and occurring <= set(inner.names):
        found = list(inner.names)
    elif all(re.fullmatch(r"-?\d+", label) for label in occurring):
        found = sorted(occurring, key=int)
    else:
        found = sorted(occurring)
    if len(found) < 2:
        raise TaskError(
            f"the data must have two classes or more in column {column!r}, got {found} in {source}"
        )
    return tuple(found)


def outputs_of(own: Sequence[str], feature: Any) -> dict[str, int]:
    """Which output of a head stands for a class of the data.

    Args:
        own: the classes of the head, in order. A generic name such as "LABEL_3" stands for "3" too.
        feature: of the column with the labels.
    """
    outputs: dict[str, int] = {}
    for index, name in enumerate(own):
        outputs.setdefault(name, index)
    for index, name in enumerate(own):
        generic = re.fullmatch(r"LABEL_(\d+)", name)
        if generic:
            outputs.setdefault(generic[1], index)
        elif name.isdecimal():
            outputs.setdefault(f"LABEL_{name}", index)
    inner = _inner(feature)
    if isinstance(inner, ClassLabel) and len(inner.names) == len(own):
        agreeing = sum(theirs == ours for theirs, ours in zip(inner.names, own))
        # ImageNet has two classes called "crane": by name they would be one
        if agreeing >= 0.95 * len(own):
            return {name: index for index, name in enumerate(inner.names)}
    return outputs


def leaves(values: Iterable[Any]) -> Iterator[Any]:
    """The values, those of lists one by one."""
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def numbered(labels: Sequence[Any], outputs: Mapping[str, int]) -> list[Any]:
    """Labels as numbers, in the same shape."""
    return [
        [outputs[item] for item in label] if isinstance(label, list) else outputs[label] for label in labels
    ]


def listed(names: Sequence[str]) -> str:
    """Names in an error: the first ones."""
    shown = ", ".join(map(repr, names[:8]))
    return f"[{shown}{', ...' if len(names) > 8 else ''}]"


def _inner(feature: Any) -> Any:
    """What a list holds, or the feature itself."""
    while True:
        if isinstance(feature, list):
            feature = feature[0]
        elif hasattr(feature, "feature"):
            feature = feature.feature
        else:
            return feature


def _class(value: Any, names: Sequence[str] | None, where: Callable[[], str]) -> str:
    """The class that a value of a label column stands for."""
    missing = value is None or value != value or (isinstance(value, str) and not value.strip())
    if missing or (names is not None and value == -1):
        raise TaskError(f"every row must have a label, got {value!r} in {where()}")
    if names is not None:
        return str(names[value])
    if isinstance(value, float):
        if not value.is_integer():
            raise TaskError(f"labels must be classes, got the number {value!r} in {where()}")
        return str(int(value))
    if isinstance(value, (str, bool, int)):
        return str(value).strip()
    raise TaskError(f"labels must be names or numbers of classes, got {value!r} in {where()}")
