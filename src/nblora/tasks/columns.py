"""Columns: which of a data set's columns plays which role in a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, DatasetDict, Value

from nblora.data import Part, draw, load_rows
from nblora.tasks.kinds import LANGUAGE_TASKS, TaskError
from nblora.tasks.labels import has_labels, read_labels

# the names by which the column of a role is recognised; the role's own name always wins
_NAMES: dict[str, tuple[str, ...]] = {
    "text": (
        "text", "sentence", "content", "review", "sentence1", "premise", "question1", "text1", "comment",
        "tweet", "body", "article",
    ),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2", "text2"),
    "label": ("label", "labels", "class", "target", "category", "fine_label", "sentiment"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialog"),
    "prompt": ("prompt", "question", "instruction", "query"),
    "context": ("context", "input"),
    "completion": ("completion", "answer", "response", "output", "solution", "canonical_solution", "code"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels", "label"),
    "source": ("source", "input", "src", "question", "document", "article", "dialogue", "text", "prompt"),
    "target": ("target", "output", "tgt", "answer", "summary", "highlights", "completion", "response"),
    "image": ("image", "img", "picture", "photo"),
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One way to describe the rows of a task."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        return self.required + self.optional

    def __str__(self) -> str:
        return " + ".join(map(repr, self.required))


_FORMS: dict[str, tuple[Form, ...]] = {
    "causal-lm": (Form(("messages",)), Form(("prompt", "completion"), ("context",)), Form(("text",))),
    "seq-cls": (Form(("text", "label"), ("text_pair",)),),
    "token-cls": (Form(("tokens", "tags")),),
    "seq2seq": (Form(("source", "target")),),
    "image-cls": (Form(("image", "label")),),
}


def find_columns(task: str, present: Sequence[str], given: Mapping[str, str], source: str) -> dict[str, str]:
    """The column of each role, from those that the user named and those that are recognised.

    Raises:
        TaskError: if a column is missing, or more than one could be meant.
    """
    forms = _FORMS[task]
    found_in = f"got columns {list(present)} in {source}"
    roles = [role for form in forms for role in form.roles]
    for role, column in given.items():
        if role not in roles:
            raise TaskError(f"columns of {task} must be among {', '.join(roles)}, got {role!r}")
        if column not in present:
            raise TaskError(f"the data must have a column {column!r}, {found_in}")
    free = {name.lower(): name for name in reversed(present) if name not in given.values()}

    def candidates(role: str) -> list[str]:
        if role in given:
            return [given[role]]
        names = [free[name] for name in _NAMES[role] if name in free]
        return names[:1] if names and names[0].lower() == role else names

    allowed = [form for form in forms if set(given) <= set(form.roles)]
    if not allowed:
        ways = " or ".join(map(str, forms))
        raise TaskError(f"columns of {task} must name {ways}, got {', '.join(map(repr, given))}")
    complete = [form for form in allowed if all(map(candidates, form.required))]
    if len(complete) > 1:
        ways = " or ".join(map(str, complete))
        raise TaskError(f"it must be clear what describes a row, {ways}: name its columns; {found_in}")
    if not complete and len(allowed) > 1:
        raise TaskError(f"the data must have a column {' or '.join(map(str, allowed))}, {found_in}")
    columns: dict[str, str] = {}
    for role in (complete or allowed)[0].roles:
        names = [name for name in candidates(role) if name not in columns.values()]
        if len(names) > 1:
            raise TaskError(f"one column must be the {role!r}, not each of {names}: name it; {found_in}")
        if names:
            columns[role] = names[0]
        elif role in (complete or allowed)[0].required:
            raise TaskError(f"the data must have a column {role!r}, {found_in}")
    return columns


@dataclass(frozen=True)
class Piece:
    """The rows of one purpose, such as those to train on.

    Attributes:
        purpose: "train", "validation", "test", "keep_validation" or "keep_test".
        rows: only the columns that play a role.
        columns: role -> column.
        labels: of each row (a list of them for token-cls) the class as a string, later its number; None for
            language models.
        part: where the rows are in the source.
        place: what the source or its split is called in errors.
    """

    purpose: str
    rows: Dataset
    columns: Mapping[str, str]
    labels: list[Any] | None
    part: Part
    place: str

    def where(self, position: int) -> str:
        """What a row is called in errors; rows are counted from 1, as the source has them."""
        return f"row {self.part.indices[position] + 1} of {self.place}"

    def sample(self, count: int | None, *, seed: int) -> Piece:
        """At most `count` of the rows, drawn without replacement; all of them for None."""
        if count is None or count >= len(self.rows):
            return self
        drawn = draw(len(self.rows), count, seed=seed)
        return replace(
            self,
            rows=self.rows.select(drawn),
            labels=None if self.labels is None else [self.labels[position] for position in drawn],
            part=Part(self.part.split, self.part.indices[drawn]),
        )

    def batches(self, size: int) -> Iterator[tuple[int, dict[str, list[Any]]]]:
        """The values of each role, `size` rows at a time, after the position of the first row."""
        for start in range(0, len(self.rows), size):
            values = self.rows[start : start + size]
            yield start, {role: values[column] for role, column in self.columns.items()}


class Source:
    """A data set, its columns and its labels.

    Attributes:
        name: what the user called it.
        splits: those that can be used; without labels, classification cannot use one.
    """

    def __init__(
        self, task: str, name: str, given: Mapping[str, str] | None, *, where_present: bool = False
    ) -> None:
        """Read a data set.

        Args:
            task: what its columns are for.
            name: a file, folder or hub name.
            given: role -> column, where the user named it.
            where_present: leave out given columns that are not there, in place of an error.
        """
        self.task = task
        self.name = name
        rows = load_rows(name)
        # a split without labels lacks a column that the others have
        present = max((split.column_names for split in rows.values()), key=len)
        given = given or {}
        if where_present:
            given = {role: column for role, column in given.items() if column in present}
        self.columns = find_columns(task, present, given, name)
        self._label_role = None if task in LANGUAGE_TASKS else "tags" if task == "token-cls" else "label"
        for split, values in rows.items():
            for role, column in self.columns.items():
                if role != self._label_role and column not in values.column_names:
                    raise TaskError(
                        f"every split must have a column {column!r}, got columns {values.column_names} in "
                        f"split {split!r} of {name}"
                    )
        if self._label_role is not None:
            column = self.columns[self._label_role]
            rows = DatasetDict({key: split for key, split in rows.items() if has_labels(split, column)})
            if not rows:
                raise TaskError(f"the data must have labels in column {column!r}, got none in {name}")
        self.splits = rows

    @property
    def label_column(self) -> str:
        assert self._label_role is not None
        return self.columns[self._label_role]

    @property
    def label_feature(self) -> Any:
        """The feature of the labels, in the first split."""
        return next(iter(self.splits.values())).features[self.label_column]

    def pieces(self, parts: Mapping[str, Part]) -> list[Piece]:
        """The rows of each part, with their labels.

        Raises:
            TaskError: for a row whose label is missing or not a class.
        """
        labels: dict[str, list[Any]] = {}
        found = []
        for purpose, part in parts.items():
            rows = self.splits[part.split]
            place = self.name if len(self.splits) == 1 else f"split {part.split!r} of {self.name}"
            if self._label_role is not None and part.split not in labels:
                column = self.columns[self._label_role]
                labels[part.split] = read_labels(
                    rows, column, one_per_token=self.task == "token-cls", place=place
                )
            wanted = self._wanted(rows)
            values = labels.get(part.split)
            found.append(
                Piece(
                    purpose,
                    rows.select_columns(wanted).select(part.indices),
                    {role: column for role, column in self.columns.items() if role != self._label_role},
                    None if values is None else [values[row] for row in part.indices],
                    part,
                    place,
                )
            )
        return found

    def _wanted(self, rows: Dataset) -> list[str]:
        """The columns that are read beside the labels; of a text file also the places of its passages."""
        columns = [column for role, column in self.columns.items() if role != self._label_role]
        places = [name for name in ("document", "passage") if rows.features.get(name) == Value("int64")]
        return columns + places if len(places) == 2 and self.columns.get("text") == "text" else columns
