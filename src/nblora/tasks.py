"""Tasks: from rows to what a transformers Trainer needs, and the model that goes with it.

`prepare` reads the data of a task, finds the columns and the classes, tokenises or processes every row once,
and returns a `TaskData`; `load_base_model` loads the model with a head for the target's classes.
"""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    ViTImageProcessorPil,
)
from transformers.models.auto import modeling_auto

from nblora.data import kept_rows, load_rows, one_line, quietly, split_rows

Task = Literal["causal-lm", "seq-cls", "token-cls", "seq2seq", "image-cls"]
TASKS: tuple[str, ...] = get_args(Task)
LANGUAGE_TASKS = ("causal-lm", "seq2seq")

IGNORED = -100  # the label of what is not predicted, as everywhere in transformers
IN_MEMORY = 2**30  # bytes of image tensors that are processed once and kept; more are processed on demand
LONGEST = 1024  # tokens of a row unless the caller asks for more
CHUNK = 1000  # rows that are tokenised together
LOGITS_AT_ONCE = 2**26  # numbers of which a float32 copy is made at a time

_LOADERS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "seq-cls": AutoModelForSequenceClassification,
    "token-cls": AutoModelForTokenClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
    "image-cls": AutoModelForImageClassification,
}
_KINDS: dict[str, Mapping[str, Any]] = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq-cls": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-cls": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-cls": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
# what the class of a model is called that has a trained head for the task
_ARCHITECTURES = {
    "seq-cls": "ForSequenceClassification",
    "token-cls": "ForTokenClassification",
    "image-cls": "ForImageClassification",
}

# what a column is for, and the names by which it is recognised; the first one always wins
_COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "text": (
        "text", "sentence", "content", "review", "sentence1", "premise", "question1", "text1", "comment",
        "tweet", "body", "article",
    ),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2", "text2"),
    "label": ("label", "labels", "class", "target", "category", "fine_label", "sentiment", "coarse_label"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialog"),
    "prompt": ("prompt", "question", "instruction", "query"),
    "context": ("context", "input"),
    "completion": (
        "completion", "answer", "response", "output", "solution", "canonical_solution", "code",
    ),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "labels", "pos_tags", "chunk_tags", "label"),
    "source": ("source", "input", "src", "question", "document", "article", "dialogue", "text", "prompt"),
    "target": ("target", "output", "tgt", "answer", "summary", "highlights", "completion", "response"),
    "image": ("image", "img", "picture", "photo"),
}  # fmt: skip

# for each task the sets of columns that describe its rows: required ones, then optional ones
_FORMS: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "causal-lm": ((("messages",), ()), (("prompt", "completion"), ("context",)), (("text",), ())),
    "seq-cls": ((("text", "label"), ("text_pair",)),),
    "token-cls": ((("tokens", "tags"), ()),),
    "seq2seq": ((("source", "target"), ()),),
    "image-cls": ((("image", "label"), ()),),
}
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TaskError(ValueError):
    """Data or a model that do not fit the task; the message is one line: the rule, then what was found."""


# --- data sets and batches ---


@dataclass(frozen=True)
class Ragged:
    """Rows of different length, one after another."""

    values: Tensor  # (total,)
    starts: Tensor  # (count + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self.values[self.starts[index] : self.starts[index + 1]].long()


class TensorRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Model inputs that are kept in memory; `columns` has them by name, each with one entry per row."""

    def __init__(self, columns: Mapping[str, Tensor | Ragged]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}, got {index}")
        return {name: column[index % len(self)] for name, column in self.columns.items()}


class ImageRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images that are processed each time that they are asked for."""

    def __init__(self, rows: Dataset, process: ImageProcess, labels: Tensor) -> None:
        self.rows = rows  # its only column is "image"
        self.process = process
        self.labels = labels  # (count,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        images = self.process([self.rows[int(index)]["image"]])
        return {name: value[0] for name, value in images.items()} | {"labels": self.labels[index]}


Rows: TypeAlias = TensorRows | ImageRows


@dataclass(frozen=True)
class Collator:
    """Stacks rows to a batch; sequences are padded on the right, and get their attention mask.

    Attributes:
        padding: what a sequence is filled up with, by the name of the model input.
    """

    padding: Mapping[str, int]

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if values[0].ndim == 1 and name in self.padding:
                batch[name] = nn.utils.rnn.pad_sequence(values, True, self.padding[name])
            else:
                batch[name] = torch.stack(values)
        if "input_ids" in batch:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return batch


# --- what a Trainer needs ---


@dataclass(frozen=True)
class TaskData:
    """Everything about the data of a task.

    Attributes:
        task: its name.
        train: rows of the target to train on, as model inputs.
        validation: rows of the target to choose by.
        test: rows of the target to report on.
        keep_validation: rows of what must not be forgotten, to choose by, or None.
        keep_test: and to report on.
        labels: the target's classes in the order of the head; None for language models.
        keep_labels: the classes that the model already knows in the order of its head; None if it knows none.
        new_head: whether the model's own classes lack one of the target's, so that it gets a new head. Then
            `keep_*` are labelled for the model's own head, the `original_head` of `load_base_model`.
        processor: tokenizer or image processor.
        collator: makes batches of rows.
        metric: what `score` is: "accuracy" (a share), or "nats" (minus nats per predicted token).
    """

    task: Task
    train: Rows
    validation: Rows
    test: Rows
    keep_validation: Rows | None
    keep_test: Rows | None
    labels: tuple[str, ...] | None
    keep_labels: tuple[str, ...] | None
    new_head: bool
    processor: Any
    collator: Collator
    metric: Literal["accuracy", "nats"]

    def preprocess_logits(self, logits: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        """What `compute_metrics` needs of the logits of a batch, for `preprocess_logits_for_metrics`.

        Args:
            logits: (batch, classes) or (batch, length, classes), or a tuple that starts with them.
            labels: (batch,) or (batch, length), `IGNORED` where nothing is predicted.

        Returns:
            (batch, 3): of each row the sum of nats, the number of predictions and how many are right; for
            token-cls (batch, length, 2): of each token nats and the predicted class.
        """
        if not isinstance(logits, Tensor):
            logits = logits[0]
        if self.task == "token-cls":
            nats, predicted = _score(logits.flatten(0, 1), labels.flatten())
            return torch.stack([nats, predicted], -1).view(*labels.shape, 2)
        if self.task == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        elif labels.ndim == 1:
            logits, labels = logits[:, None], labels[:, None]
        sums = []
        for row, wanted in zip(logits, labels):
            used = wanted != IGNORED
            nats, predicted = _score(row[used], wanted[used])
            sums.append(torch.stack([nats.sum(), used.sum(), (predicted == wanted[used]).sum()]).float())
        return torch.stack(sums)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Scores over a whole set, from what `preprocess_logits` made of it.

        Returns:
            `score` (higher is better), `accuracy` in [0, 1], and `nats`, minus the mean log-likelihood of a
            prediction; for language models `perplexity`; for token-cls `f1`, the mean over the classes that
            occur or are predicted. All are NaN where the model's logits are.
        """
        found = np.asarray(prediction.predictions, dtype=np.float64)
        extra: dict[str, float] = {}
        if self.task == "token-cls":
            wanted = np.asarray(prediction.label_ids)
            used = wanted != IGNORED
            wanted, predicted = wanted[used], found[used][:, 1]
            nats, count, right = found[used][:, 0].sum(), len(wanted), (wanted == predicted).sum()
            extra["f1"] = _macro_f1(wanted, predicted)
        else:
            nats, count, right = found.sum(0)
        nats = float(nats / count) if count else math.nan
        accuracy = float(right / count) if count else math.nan
        if math.isnan(nats):
            accuracy = math.nan
            extra = dict.fromkeys(extra, math.nan)
        if self.metric == "nats":
            extra["perplexity"] = math.exp(nats) if nats < 700 else math.inf if nats == nats else math.nan
        score = accuracy if self.metric == "accuracy" else -nats
        return {"score": score, "accuracy": accuracy, "nats": nats, **extra}


def _score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Nats and predicted class, both (count,), of logits (count, classes); in parts, to spare memory."""
    at_once = max(1, LOGITS_AT_ONCE // max(1, logits.shape[-1]))
    nats, predicted = [], []
    for some, wanted in zip(logits.split(at_once), labels.split(at_once)):
        nats.append(cross_entropy(some.float(), wanted, ignore_index=IGNORED, reduction="none"))
        predicted.append(some.argmax(-1).float())
    return torch.cat(nats), torch.cat(predicted)


def _macro_f1(wanted: Any, predicted: Any) -> float:
    scores = []
    for label in np.union1d(wanted, predicted):
        both = ((wanted == label) & (predicted == label)).sum()
        scores.append(2 * both / ((wanted == label).sum() + (predicted == label).sum()))
    return float(np.mean(scores)) if scores else math.nan


def prepare(
    task: Task,
    model: str,
    data: str,
    keep: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    keep_columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    seed: int = 0,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> TaskData:
    """Read the data of a task and make it ready for a model.

    Args:
        task: "causal-lm", "seq-cls", "token-cls", "seq2seq" or "image-cls".
        model: a folder or hub name; only its configuration and its tokenizer or image processor are read.
        data: the target; a file, folder or hub name, see `nblora.data.load_rows`.
        keep: the same for what the model must not forget.
        columns: column names of the target by role, where they are not recognised. Roles are, for causal-lm,
            `messages` (chats), or `prompt` and `completion` (and `context`, which follows the prompt), or
            `text`; for seq-cls `text`, `label` (and `text_pair`); for token-cls `tokens`, `tags`; for seq2seq
            `source`, `target`; for image-cls `image`, `label`.
        keep_columns: the same for `keep`; without it those of `columns` that exist there.
        max_length: tokens of a row at most, and of a block of plain text; by default the model's maximum, but
            at most 1024.
        seed: of splits that are made and samples that are drawn.
        max_train_samples: how many rows (blocks, for plain text) to train on at most, drawn at random.
        max_eval_samples: the same for each other set.

    Plain text is tokenised, an end-of-text token after each document, and cut into blocks of `max_length`;
    what is left at the end makes a shorter block, except in the training set. A prompt is followed by its
    completion, with a line break between them if there is no white space, and only the completion is
    predicted. Of chats the parts are predicted that the chat template marks by `{% generation %}`; without
    marks everything is.

    Raises:
        TaskError, DataError: for a task, model or data that do not fit each other.
    """
    if task not in TASKS:
        raise TaskError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    for name, value in (
        ("max_length", max_length),
        ("max_train_samples", max_train_samples),
        ("max_eval_samples", max_eval_samples),
    ):
        if value is not None and value < 1:
            raise TaskError(f"{name} must be at least 1, got {value}")
    config = _load_config(task, model)
    target = _Source(task, data, load_rows(data), columns)
    kept = None
    if keep is not None:
        kept_data = load_rows(keep)
        if keep_columns is None:
            present = {name for split in kept_data.values() for name in split.column_names}
            keep_columns = {role: name for role, name in (columns or {}).items() if name in present}
        kept = _Source(task, keep, kept_data, keep_columns)

    labels: tuple[str, ...] | None = None
    own: tuple[str, ...] | None = None
    new_head = False
    if task not in LANGUAGE_TASKS:
        own = _own_labels(task, config)
        target.drop_unlabelled_splits()
    parts = split_rows(target.rows, data, seed=seed)
    sets = {"train": parts.train, "validation": parts.validation, "test": parts.test}
    target_labels: dict[str, Any] = {}
    keep_sets: dict[str, Dataset] = {}
    keep_labels: dict[str, Any] = {}
    if kept is not None:
        if task not in LANGUAGE_TASKS:
            kept.drop_unlabelled_splits()
        keep_sets = dict(zip(("validation", "test"), kept_rows(kept.rows, kept.name, seed=seed)))
    if task not in LANGUAGE_TASKS:
        target_labels = {name: target.labels(rows) for name, rows in sets.items()}
        found = _match(own, target, target_labels) if own else None
        if found is None:
            new_head = True
            labels = target.classes(target_labels)
            found = {name: _indices(values, labels) for name, values in target_labels.items()}
        else:
            labels = own
        target_labels = found
        if kept is not None:
            if own is None:
                raise TaskError(
                    f"kept data need a model with trained classes of its own for {task}, got {model}, "
                    "which has none"
                )
            values = {name: kept.labels(rows) for name, rows in keep_sets.items()}
            matched = _match(own, kept, values)
            if matched is None:
                strange = sorted(set(_flat(values)) - set(own))
                raise TaskError(
                    f"labels of kept data must be among the model's classes {_shown(own)}, got "
                    f"{_shown(strange)} in {kept.name}"
                )
            keep_labels = matched
    limits = {"train": max_train_samples}
    make: _ImageMaker | _TextMaker
    if task == "image-cls":
        make = _ImageMaker(_load_image_processor(model, config), _channels(config, model))
    else:
        make = _TextMaker(task, model, config, max_length)
    built: dict[str, Rows] = {}
    jobs = [(name, target, rows, target_labels.get(name)) for name, rows in sets.items()]
    if kept is not None:
        jobs += [(f"keep_{name}", kept, rows, keep_labels.get(name)) for name, rows in keep_sets.items()]
    plans = []
    for name, source, rows, indices in jobs:
        limit = limits.get(name, max_eval_samples)
        if not (source.plain_text or limit is None or limit >= len(rows)):
            order = _drawn(len(rows), limit, seed)
            rows = rows.select(order)
            indices = None if indices is None else [indices[position] for position in order]
        plans.append((name, source, rows, indices, limit))
    if isinstance(make, _ImageMaker):
        make.plan([(source, rows) for _, source, rows, _, _ in plans])
    for name, source, rows, indices, limit in plans:
        with quietly():
            built[name] = make(name, source, rows, indices, limit, seed)
    return TaskData(
        task=task,
        train=built["train"],
        validation=built["validation"],
        test=built["test"],
        keep_validation=built.get("keep_validation"),
        keep_test=built.get("keep_test"),
        labels=labels,
        keep_labels=own,
        new_head=new_head,
        processor=make.processor,
        collator=make.collator,
        metric="nats" if task in LANGUAGE_TASKS else "accuracy",
    )


def _drawn(count: int, limit: int, seed: int) -> Any:
    """Which `limit` of `count` rows are used, in their order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


# --- columns ---


class _Source:
    """A data set with the columns that matter for a task."""

    def __init__(self, task: str, name: str, rows: DatasetDict, columns: Mapping[str, str] | None) -> None:
        self.task = task
        self.name = name
        self.rows = rows
        first = next(
            (split for key, split in rows.items() if key.lower().startswith("train")),
            next(iter(rows.values())),
        )
        self.features = first.features
        self.columns = _find_columns(task, first.column_names, columns or {}, name)
        label = self.columns.get("label") or self.columns.get("tags")
        for key, split in rows.items():
            for column in self.columns.values():
                if column not in split.column_names and column != label:
                    raise TaskError(
                        f"every split must have a column {column!r}, got columns {split.column_names} in "
                        f"split {key!r} of {name}"
                    )
        self.plain_text = task == "causal-lm" and "text" in self.columns
        self.label_column = label

    def drop_unlabelled_splits(self) -> None:
        """Leave out splits without any label, which benchmarks publish for their test sets."""
        column = self.label_column
        assert column is not None

        def labelled(rows: Dataset) -> bool:
            if column not in rows.column_names:
                return False
            feature = _inner(rows.features[column])
            return not isinstance(feature, ClassLabel) or any(
                value != -1 for value in _leaves(rows[column][:])
            )

        self.rows = DatasetDict({key: split for key, split in self.rows.items() if labelled(split)})
        if not self.rows:
            raise TaskError(f"the data must have labels in column {column!r}, got none in {self.name}")

    def labels(self, rows: Dataset) -> list[Any]:
        """The label of every row as a string, or the labels of its tokens; errors name the row."""
        column = self.label_column
        assert column is not None
        feature = _inner(rows.features[column])
        names = feature.names if isinstance(feature, ClassLabel) else None
        nested = self.task == "token-cls"
        values = rows[column][:]
        found: list[Any] = []
        for position, value in enumerate(values):
            where = f"column {column!r} of row {position + 1} of {self.name}"
            if nested != isinstance(value, list):
                rule = "a list of classes, one for each token" if nested else "one class for each row"
                raise TaskError(f"labels must be {rule}, got {value!r} in {where}")
            if nested:
                found.append([_class(item, names, where) for item in value])
            else:
                found.append(_class(value, names, where))
        return found

    def classes(self, values: Mapping[str, list[Any]]) -> tuple[str, ...]:
        """The target's classes, in the order that the data give or sorted."""
        assert self.label_column is not None
        feature = _inner(self.features[self.label_column])
        occurring = set(_flat(values))
        if isinstance(feature, ClassLabel) and occurring <= set(feature.names):
            found = list(feature.names)
        elif all(re.fullmatch(r"-?\d+", value) for value in occurring):
            found = sorted(occurring, key=int)
        else:
            found = sorted(occurring)
        if len(found) < 2:
            raise TaskError(
                f"the data must have at least two classes in column {self.label_column!r}, got {found} "
                f"in {self.name}"
            )
        return tuple(found)


def _find_columns(task: str, present: Sequence[str], given: Mapping[str, str], source: str) -> dict[str, str]:
    """The column of each role."""
    forms = _FORMS[task]
    roles = [role for required, optional in forms for role in (*required, *optional)]
    for role, column in given.items():
        if role not in roles:
            raise TaskError(f"columns of {task} must be among {', '.join(roles)}, got {role!r}")
        if column not in present:
            raise TaskError(
                f"the data must have a column {column!r}, got columns {list(present)} in {source}"
            )

    def find(role: str, taken: Mapping[str, str]) -> list[str]:
        if role in given:
            return [given[role]]
        used = {*given.values(), *taken.values()}
        free = {name.lower(): name for name in reversed(present) if name not in used}
        names = [free[name] for name in _COLUMN_NAMES[role] if name in free]
        return names[:1] if names and names[0].lower() == role else names

    def resolve(required: Sequence[str], optional: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for role in (*required, *optional):
            names = find(role, found)
            if len(names) > 1:
                raise TaskError(
                    f"one column must be the {role!r}, got {names} of columns {list(present)} in {source}: "
                    "name it"
                )
            if names:
                found[role] = names[0]
            elif role in required:
                raise TaskError(
                    f"the data must have a column {role!r}, got columns {list(present)} in {source}"
                )
        return found

    fitting = [
        form
        for form in forms
        if set(given) <= {*form[0], *form[1]} and all(find(role, {}) for role in form[0])
    ]
    if len(fitting) > 1:
        alternatives = " or ".join(" + ".join(map(repr, required)) for required, _ in fitting)
        raise TaskError(
            f"one set of columns must describe a row, got {alternatives} by columns {list(present)} in "
            f"{source}: name the ones to use"
        )
    if not fitting and len(forms) > 1:
        asked = [form for form in forms if given and set(given) <= {*form[0], *form[1]}] or list(forms)
        alternatives = " or ".join(" + ".join(map(repr, required)) for required, _ in asked)
        raise TaskError(
            f"the data must have a column {alternatives}, got columns {list(present)} in {source}"
        )
    return resolve(*(fitting or forms)[0])


# --- labels ---


def _inner(feature: Any) -> Any:
    """What a list holds, or the feature itself."""
    while True:
        if isinstance(feature, list):
            feature = feature[0]
        elif hasattr(feature, "feature"):
            feature = feature.feature
        else:
            return feature


def _leaves(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def _flat(values: Mapping[str, list[Any]]) -> Iterator[str]:
    for rows in values.values():
        yield from _leaves(rows)


def _class(value: Any, names: Sequence[str] | None, where: str) -> str:
    """The class that a value of a label column stands for."""
    if value is None or value == "" or value != value or (names is not None and value == -1):
        raise TaskError(f"every row must have a label, got {value!r} in {where}")
    if names is not None:
        return str(names[value])
    if isinstance(value, float):
        if not value.is_integer():
            raise TaskError(f"labels must be classes, got the number {value!r} in {where}")
        return str(int(value))
    if isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, str):
        return value.strip()
    raise TaskError(f"labels must be one class for each row, got {value!r} in {where}")


def _own_labels(task: str, config: Any) -> tuple[str, ...] | None:
    """The classes of a model's trained head, or None if it has none."""
    if not any(_ARCHITECTURES[task] in name for name in config.architectures or []):
        return None  # a backbone or a language model, whose configuration has two classes all the same
    count = config.num_labels
    if count < 2:
        return None
    return tuple(str(config.id2label.get(index, f"LABEL_{index}")) for index in range(count))


def _match(
    own: Sequence[str], source: _Source, values: Mapping[str, list[Any]]
) -> dict[str, list[Any]] | None:
    """Labels as the model's class numbers, or None if one of them is not among its classes."""
    numbers: dict[str, int] = {}
    for index, name in reversed([*enumerate(own)]):
        generic = re.fullmatch(r"LABEL_(\d+)", name)
        if generic:
            numbers.setdefault(generic[1], index)
        numbers[name] = index
    assert source.label_column is not None
    feature = _inner(source.features[source.label_column])
    if isinstance(feature, ClassLabel) and len(feature.names) == len(own):
        agreeing = sum(a == b for a, b in zip(feature.names, own))
        # ImageNet has two classes called "crane": by name they would be one
        if agreeing >= 0.95 * len(own):
            numbers = {name: index for index, name in enumerate(feature.names)}
    if any(value not in numbers for value in set(_flat(values))):
        return None
    return {
        name: [[numbers[v] for v in row] if isinstance(row, list) else numbers[row] for row in rows]
        for name, rows in values.items()
    }


def _indices(values: list[Any], labels: Sequence[str]) -> list[Any]:
    numbers = {name: index for index, name in enumerate(labels)}
    return [[numbers[v] for v in row] if isinstance(row, list) else numbers[row] for row in values]


def _shown(names: Sequence[str]) -> str:
    listed = ", ".join(map(repr, names[:8]))
    return f"[{listed}{', ...' if len(names) > 8 else ''}]"


# --- text ---


class _TextMaker:
    """Makes token rows."""

    def __init__(self, task: str, model: str, config: Any, max_length: int | None) -> None:
        self.task = task
        self.model = model
        self.processor = _load_tokenizer(model, task)
        self.given_length = max_length
        self.max_length = _max_length(config, self.processor, max_length, model)
        self.collator = Collator(
            {
                "input_ids": _pad_token(config, self.processor),
                "token_type_ids": getattr(self.processor, "pad_token_type_id", 0),
                "labels": IGNORED,
            }
        )

    def __call__(
        self,
        name: str,
        source: _Source,
        rows: Dataset,
        labels: list[Any] | None,
        limit: int | None,
        seed: int,
    ) -> TensorRows:
        with _tokenizing():
            if source.plain_text:
                return self._blocks(name, source, rows, limit, seed)
            return self._rows(name, source, rows, labels)

    def _rows(self, name: str, source: _Source, rows: Dataset, labels: list[Any] | None) -> TensorRows:
        encode = {
            "seq-cls": self._texts,
            "token-cls": self._tags,
            "seq2seq": self._pairs,
            "causal-lm": self._chats if "messages" in source.columns else self._completions,
        }[self.task]
        wanted = [column for role, column in source.columns.items() if role not in ("label", "tags")]
        rows = rows.select_columns(wanted)
        for role, column in source.columns.items():
            if role not in ("label", "tags", "messages", "tokens"):
                _require_text(rows, column, source.name)
        pieces: dict[str, list[Any]] = {}
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            batch = {role: part[column] for role, column in source.columns.items() if column in part}
            some = None if labels is None else labels[start : start + CHUNK]
            for key, values in encode(batch, some, start, source).items():
                pieces.setdefault(key, []).extend(
                    [np.asarray(value, dtype=np.int32) for value in values] if key != "label" else values
                )
        sequences = {key: values for key, values in pieces.items() if key != "label"}
        if self.task != "seq-cls":
            shifted = 1 if self.task == "causal-lm" else 0  # the first token of a row is never predicted
            used = [bool((row[shifted:] != IGNORED).any()) for row in sequences["labels"]]
            if not any(used):
                raise TaskError(
                    f"rows must have a token to predict within max_length={self.max_length}, got none in the "
                    f"{name} rows of {source.name}"
                )
            sequences = {
                key: [row for row, useful in zip(values, used) if useful] for key, values in sequences.items()
            }
        found: dict[str, Tensor | Ragged] = {key: _ragged(values) for key, values in sequences.items()}
        if self.task == "seq-cls":
            found["labels"] = torch.tensor(labels)
        return TensorRows(found)

    def _texts(
        self, batch: dict[str, list[Any]], labels: list[Any] | None, start: int, source: _Source
    ) -> dict[str, list[Any]]:
        pairs = [_strings(batch["text_pair"])] if "text_pair" in batch else []
        encoded = self.processor(
            _strings(batch["text"]), *pairs, truncation=True, max_length=self.max_length, verbose=False
        )
        return {key: encoded[key] for key in ("input_ids", "token_type_ids") if key in encoded}

    def _tags(
        self, batch: dict[str, list[Any]], labels: list[Any] | None, start: int, source: _Source
    ) -> dict[str, list[Any]]:
        assert labels is not None
        for offset, (words, tags) in enumerate(zip(batch["tokens"], labels)):
            where = f"row {start + offset + 1} of {source.name}"
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise TaskError(f"tokens must be a list of strings, got {str(words)[:80]!r} in {where}")
            if len(words) != len(tags):
                raise TaskError(
                    f"a row must have one tag per token, got {len(words)} and {len(tags)} in {where}"
                )
        encoded = self.processor(
            batch["tokens"],
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
            verbose=False,
        )
        rows = []
        for offset, tags in enumerate(labels):
            words = encoded.word_ids(offset)
            rows.append(
                [
                    tags[word] if word is not None and (not place or words[place - 1] != word) else IGNORED
                    for place, word in enumerate(words)
                ]
            )
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
        return {key: encoded[key] for key in keys} | {"labels": rows}

    def _pairs(
        self, batch: dict[str, list[Any]], labels: list[Any] | None, start: int, source: _Source
    ) -> dict[str, list[Any]]:
        _require_all(batch["target"], source.columns["target"], start, source.name)
        options = {"truncation": True, "max_length": self.max_length, "verbose": False}
        inputs = self.processor(_strings(batch["source"]), **options)
        outputs = self.processor(text_target=_strings(batch["target"]), **options)
        return {"input_ids": inputs["input_ids"], "labels": outputs["input_ids"]}

    def _completions(
        self, batch: dict[str, list[Any]], labels: list[Any] | None, start: int, source: _Source
    ) -> dict[str, list[Any]]:
        _require_all(batch["completion"], source.columns["completion"], start, source.name)
        prompts, completions = _strings(batch["prompt"]), _strings(batch["completion"])
        if "context" in batch:
            contexts = _strings(batch["context"])
            prompts = [f"{prompt}\n\n{more}" if more else prompt for prompt, more in zip(prompts, contexts)]
        prompts = [
            prompt + "\n" if prompt and not prompt[-1].isspace() and not completion[:1].isspace() else prompt
            for prompt, completion in zip(prompts, completions)
        ]
        heads = self.processor(prompts, verbose=False)["input_ids"]
        tails = self.processor(completions, add_special_tokens=False, verbose=False)["input_ids"]
        end = self.processor.eos_token_id
        ending = [] if end is None else [end]
        closing = {end, self.processor.sep_token_id} - {None}
        rows, wanted = [], []
        for head, tail in zip(heads, tails):
            while head and head[-1] in closing:  # some tokenizers end every text
                head = head[:-1]
            rows.append([*head, *tail, *ending][: self.max_length])
            wanted.append([*[IGNORED] * len(head), *tail, *ending][: self.max_length])
        return {"input_ids": rows, "labels": wanted}

    def _chats(
        self, batch: dict[str, list[Any]], labels: list[Any] | None, start: int, source: _Source
    ) -> dict[str, list[Any]]:
        template = self.processor.chat_template
        if not template:
            raise TaskError(f"chats need a tokenizer with a chat template, got none in {self.model}")
        marked = _GENERATION_MARK.search(self.processor.get_chat_template()) is not None
        rows, wanted = [], []
        for offset, value in enumerate(batch["messages"]):
            where = f"column {source.columns['messages']!r} of row {start + offset + 1} of {source.name}"
            messages = _messages(value, where)
            try:
                encoded = self.processor.apply_chat_template(
                    messages,
                    tokenize=True,
                    return_dict=True,
                    return_assistant_tokens_mask=marked,
                    tokenizer_kwargs={"verbose": False},
                )
            except Exception as error:
                if isinstance(error, ImportError):
                    raise
                raise TaskError(
                    f"chats must fit the chat template: {one_line(error)}, got {where}"
                ) from error
            tokens = encoded["input_ids"][: self.max_length]
            mask = encoded["assistant_masks"] if marked else [1] * len(tokens)
            rows.append(tokens)
            wanted.append([token if used else IGNORED for token, used in zip(tokens, mask)])
        return {"input_ids": rows, "labels": wanted}

    def _blocks(self, name: str, source: _Source, rows: Dataset, limit: int | None, seed: int) -> TensorRows:
        """Documents one after another, cut into blocks."""
        column = source.columns["text"]
        passages = {"document", "passage"} <= set(rows.column_names)
        rows = rows.select_columns([column, "document", "passage"] if passages else [column])
        _require_text(rows, column, source.name)
        end = self.processor.eos_token_id
        pieces: list[Any] = []
        before: tuple[int, int] | None = None
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            texts = _strings(part[column])
            places = list(zip(part["document"], part["passage"])) if passages else [None] * len(texts)
            whole = self.processor(texts, verbose=False)["input_ids"]
            inner = (
                self.processor(texts, add_special_tokens=False, verbose=False)["input_ids"]
                if passages
                else whole
            )
            for tokens, middle, text, place in zip(whole, inner, texts, places):
                if not text:
                    continue
                goes_on = place is not None and before == (place[0], place[1] - 1)
                if pieces and not goes_on and end is not None and pieces[-1][-1:] != [end]:
                    pieces.append(np.asarray([end], np.int32))
                chosen = middle if goes_on else tokens
                if chosen:
                    pieces.append(np.asarray(chosen, np.int32))
                before = place
        if pieces and end is not None and pieces[-1][-1] != end:
            pieces.append(np.asarray([end], np.int32))
        tokens = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0, dtype=torch.int32)
        length = self.max_length
        count = len(tokens) // length
        if name == "train":
            if not count:
                hint = f"; set it to {len(tokens)} or less" if len(tokens) > 1 else ""
                raise TaskError(
                    f"the text to train on must fill a block of max_length={length} tokens, got "
                    f"{len(tokens)} tokens in {source.name}{hint}"
                )
            tokens = tokens[: count * length]
        elif len(tokens) < 2:
            raise TaskError(
                f"the text must have a token to predict, got none in the {name} rows of {source.name}"
            )
        elif len(tokens) - count * length == 1:
            tokens = tokens[: count * length]  # nothing is predicted in a block of one token
        starts = [*range(0, len(tokens), length), len(tokens)]
        blocks = range(len(starts) - 1)
        if limit is not None and limit < len(blocks):
            drawn = _drawn(len(blocks), limit, seed)
            found = _ragged([tokens[starts[block] : starts[block + 1]].numpy() for block in drawn])
        else:
            found = Ragged(tokens, torch.tensor(starts))
        return TensorRows({"input_ids": found, "labels": found})


def _ragged(rows: Sequence[Any]) -> Ragged:
    lengths = np.asarray([0, *(len(row) for row in rows)], dtype=np.int64)
    values = np.concatenate(rows) if rows else np.empty(0, np.int32)
    return Ragged(torch.from_numpy(values.astype(np.int32, copy=False)), torch.from_numpy(lengths.cumsum()))


def _strings(values: Sequence[Any]) -> list[str]:
    return ["" if value is None else str(value) for value in values]


def _require_text(rows: Dataset, column: str, source: str) -> None:
    kind = getattr(rows.features[column], "dtype", None)
    if kind not in ("string", "large_string", "int64", "int32"):
        shown = "only empty cells" if kind == "null" else str(rows.features[column])
        raise TaskError(f"column {column!r} must hold text, got {shown} in {source}")


def _require_all(values: Sequence[Any], column: str, start: int, source: str) -> None:
    for offset, value in enumerate(values):
        if value is None or value == "":
            raise TaskError(
                f"every row must have a text to predict, got none in column {column!r} of row "
                f"{start + offset + 1} of {source}"
            )


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A chat as a list of messages with role and content; that with "from" and "value" is understood too."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise TaskError(f"a chat must be a list of messages, got {str(value)[:80]!r} in {where}")
    speakers = {"human": "user", "gpt": "assistant"}
    found = []
    for message in value:
        if "role" not in message and {"from", "value"} <= message.keys():
            message = {"role": speakers.get(message["from"], message["from"]), "content": message["value"]}
        if not message.get("role"):
            raise TaskError(
                f"every message must have a 'role' and a 'content', got {str(message)[:80]!r} in {where}"
            )
        found.append(message)
    return found


@contextmanager
def _tokenizing() -> Iterator[None]:
    """Tokenizers work in parallel inside, and one at a time afterwards.

    Otherwise they warn whenever a data loader forks, and switch themselves off in the fork anyway.
    """
    if "TOKENIZERS_PARALLELISM" in os.environ and os.environ.get("_NBLORA_TOKENIZERS") is None:
        yield  # the user's choice
        return
    os.environ["_NBLORA_TOKENIZERS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _load_tokenizer(model: str, task: str) -> Any:
    with quietly(), _model_errors(f"{model} must have a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        if task == "token-cls":
            if not tokenizer.is_fast:
                raise TaskError(
                    f"token-cls needs a fast tokenizer, got {type(tokenizer).__name__} of {model}"
                )
            if getattr(tokenizer, "add_prefix_space", None) is False:
                # words come one by one, and those inside a sentence follow a space
                tokenizer = AutoTokenizer.from_pretrained(model, add_prefix_space=True)
    return tokenizer


def _max_length(config: Any, tokenizer: Any, asked: int | None, model: str) -> int:
    text = config.get_text_config()
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < 10**9 else []
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0 and not config.is_encoder_decoder:
            # RoBERTa and its kin count positions from the padding token on
            roberta = "roberta" in text.model_type or text.model_type == "camembert"
            limits.append(value - (text.pad_token_id + 1 if roberta else 0))
            break
    longest = min(limits, default=LONGEST)
    if asked is None:
        return min(longest, LONGEST)
    if asked > longest and limits:
        raise TaskError(f"max_length must be at most {longest} for {model}, got {asked}")
    return asked


def _pad_token(config: Any, tokenizer: Any) -> int:
    """A token to fill up with; any will do, since attention and loss leave it out."""
    for value in (config.get_text_config().pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(value, int) and value >= 0:
            return value
    return 0


# --- images ---


@dataclass(frozen=True)
class ImageProcess:
    """From PIL images or arrays to model inputs."""

    processor: Any
    channels: int  # 1 or 3

    def __call__(self, images: Sequence[Any]) -> dict[str, Tensor]:
        converted = [_convert(image, self.channels) for image in images]
        options = {"do_convert_rgb": False} if self.channels == 1 else {}
        return dict(self.processor(images=converted, return_tensors="pt", **options))


class _ImageMaker:
    """Makes rows of pixels."""

    def __init__(self, processor: Any, channels: int) -> None:
        self.processor = processor
        self.process = ImageProcess(processor, channels)
        self.collator = Collator({})
        self.eager = True

    def plan(self, sets: Sequence[tuple[_Source, Dataset]]) -> None:
        """Decide whether all sets together fit into memory."""
        source, rows = sets[0]
        with quietly():
            first = self._pixels(source, _images(rows.select([0]), source), 0)
        size = sum(value.nbytes for value in first.values())
        self.eager = size * sum(len(rows) for _, rows in sets) < IN_MEMORY

    def __call__(
        self,
        name: str,
        source: _Source,
        rows: Dataset,
        labels: list[Any] | None,
        limit: int | None,
        seed: int,
    ) -> Rows:
        images = _images(rows, source)
        found = torch.tensor(labels)
        if not self.eager:
            return ImageRows(images, self.process, found)
        parts = [self._pixels(source, images, start) for start in range(0, len(images), 64)]
        try:
            columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        except RuntimeError as error:
            raise TaskError(
                f"the image processor must make all images equally large: {one_line(error)} in {source.name}"
            ) from error
        return TensorRows({**columns, "labels": found})

    def _pixels(self, source: _Source, images: Dataset, start: int) -> dict[str, Tensor]:
        found: list[Any] = []
        try:
            stop = min(start + 64, len(images))
            for position in range(start, stop):
                found.append(images[position]["image"])  # noqa: PERF401 - the count is told in the error
        except Exception as error:
            raise TaskError(
                f"images must be readable: {one_line(error)}, got row {start + len(found) + 1} of "
                f"{source.name}"
            ) from error
        try:
            return self.process(found)
        except (ValueError, TypeError, RuntimeError) as error:
            raise TaskError(
                f"images must suit the image processor: {one_line(error)} in rows {start + 1} to {stop} of "
                f"{source.name}"
            ) from error


def _images(rows: Dataset, source: _Source) -> Dataset:
    """Rows with the images as only column, called "image"."""
    column = source.columns["image"]
    feature = rows.features[column]
    rows = rows.select_columns([column])
    if column != "image":
        rows = rows.rename_column(column, "image")
    if isinstance(feature, datasets.Image):
        return rows
    kind = getattr(feature, "dtype", None)
    encoded = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if encoded or kind in ("binary", "large_binary"):
        return rows.cast_column("image", datasets.Image())
    inner = getattr(_inner(feature), "dtype", "")
    if kind not in ("string", "large_string") and inner.startswith(("int", "uint", "float")):
        return rows  # numbers, as a list of lists
    raise TaskError(
        f"column {column!r} must hold images, got {feature} in {source.name} "
        "(for image files use an image folder)"
    )


def _convert(image: Any, channels: int) -> Image.Image:
    """A PIL image with one or three channels of 8 bits; transparency is dropped."""
    if image is None:
        raise ValueError("an image must not be missing, got None")
    picture = image if isinstance(image, Image.Image) else _from_numbers(image)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture, dtype=np.float64)
        if values.max(initial=0) > 255:
            values = values / 257  # of 16 bits
        picture = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    wanted = "L" if channels == 1 else "RGB"
    return picture if picture.mode == wanted else picture.convert(wanted)


def _from_numbers(image: Any) -> Image.Image:
    values = np.asarray(image)
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise ValueError(f"an image must have 1, 3 or 4 channels, got numbers of shape {values.shape}")
    if not ((values == values.round()).all() and values.min() >= 0 and values.max() <= 255):
        raise ValueError(
            f"images as numbers must be integers from 0 to 255, got {values.min():g} to {values.max():g}"
        )
    return Image.fromarray(values.astype(np.uint8))


def _channels(config: Any, model: str) -> int:
    vision = getattr(config, "vision_config", None)
    count = getattr(config, "num_channels", None) or getattr(vision, "num_channels", None) or 3
    if count not in (1, 3):
        raise TaskError(f"a model for images must have 1 or 3 channels, got {count} in {model}")
    return int(count)


def _load_image_processor(model: str, config: Any) -> Any:
    """The model's image processor; a plain one to [-1, 1] for a model that was saved without.

    Always the PIL variant: the torchvision one scales differently, and a result must not depend on whether
    torchvision is installed.
    """
    channels = _channels(config, model)
    with quietly():
        try:
            processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        except (OSError, ValueError) as error:
            size = getattr(config, "image_size", None)
            if not size:
                raise TaskError(f"{model} must have an image processor: {one_line(error)}") from error
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            processor = ViTImageProcessorPil(
                size={"height": height, "width": width},
                image_mean=[0.5] * channels,
                image_std=[0.5] * channels,
            )
    for name in ("image_mean", "image_std"):
        value = getattr(processor, name, None)
        if channels == 1 and isinstance(value, (list, tuple)) and len(value) == 3:
            setattr(processor, name, [sum(value) / 3])
    return processor


# --- models ---


@dataclass
class BaseModel:
    """A model with a head for the target's classes.

    Attributes:
        model: the model.
        head: name of the module that classifies ("classifier", "score"); None for language models.
        original_head: the model's own trained head where `model` has got a new one, else None.
    """

    model: PreTrainedModel
    head: str | None
    original_head: nn.Module | None


def load_base_model(task_data: TaskData, model: str, **from_pretrained_kwargs: Any) -> BaseModel:
    """Load a model for the data of a task.

    A new head is drawn from torch's global random numbers: seed them first.

    Args:
        task_data: from `prepare` with the same model.
        model: a folder or hub name.
        from_pretrained_kwargs: passed on (dtype, device_map, quantization_config, ...).

    Raises:
        TaskError: if there is no such model or its head is not found.
    """
    loader = _LOADERS[task_data.task]
    options: dict[str, Any] = dict(from_pretrained_kwargs)
    labels = task_data.labels
    fresh = task_data.new_head and task_data.keep_labels is None
    if labels is not None:
        options["problem_type"] = "single_label_classification"
    if labels is not None and fresh:
        options |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {name: index for index, name in enumerate(labels)},
            "ignore_mismatched_sizes": True,
        }
    with quietly(), _model_errors(f"{model} must be a model for {task_data.task}"):
        loaded, report = loader.from_pretrained(model, output_loading_info=True, **options)
    loaded = cast(PreTrainedModel, loaded)
    head = original = None
    if labels is not None:
        own = len(labels) if fresh else len(cast("tuple[str, ...]", task_data.keep_labels))
        head = _find_head(loaded, own)
        if head is None:
            raise TaskError(
                f"a model for {task_data.task} must have a head, got none in {type(loaded).__name__}"
            )
    missing = [
        name
        for name in report["missing_keys"]
        if not (fresh and head is not None and name.startswith(f"{head}."))
    ]
    if missing:
        warnings.warn(
            f"{model} has no values for {', '.join(sorted(missing)[:4])}{', ...' if len(missing) > 4 else ''}"
            ": they start at random",
            stacklevel=2,
        )
    if labels is not None and task_data.new_head and not fresh:
        assert head is not None
        original = loaded.get_submodule(head)
        _replace_head(loaded, head, labels)
    if task_data.task == "seq-cls":
        # classifiers on a language model find the end of a text by this token
        loaded.config.get_text_config().pad_token_id = task_data.collator.padding["input_ids"]
    return BaseModel(loaded, head, original)


def _find_head(model: nn.Module, classes: int) -> str | None:
    """The last child beside the backbone that has a parameter with a row for each class."""
    prefix = getattr(model, "base_model_prefix", "")
    found = None
    for name, child in model.named_children():
        if name != prefix and any(
            parameter.ndim and parameter.shape[0] == classes for parameter in child.parameters()
        ):
            found = name
    return found


def _replace_head(model: Any, name: str, labels: Sequence[str]) -> None:
    """Put a freshly drawn head for other classes into a model."""
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.num_labels = len(labels)
    with torch.device("meta"):  # only the shapes are wanted
        skeleton = type(model)(config)
    head = skeleton.get_submodule(name)
    reference = next(model.get_submodule(name).parameters())
    head.to_empty(device=reference.device)
    with torch.no_grad():
        for module in head.modules():
            skeleton._init_weights(module)
    head.to(reference.dtype).train(model.training)
    setattr(model, name, head)
    model.config = config
    if hasattr(model, "num_labels"):
        model.num_labels = len(labels)


def _load_config(task: str, model: str) -> Any:
    with quietly(), _model_errors(f"the model must be a folder or a hub name, got {model}"):
        config = AutoConfig.from_pretrained(model)
    if config.model_type not in _KINDS[task] and not getattr(config, "auto_map", None):
        raise TaskError(
            f"a model for {task} must be of a kind made for it, got {config.model_type!r} in {model}"
        )
    return config


@contextmanager
def _model_errors(rule: str) -> Iterator[None]:
    try:
        yield
    except TaskError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise TaskError(f"{rule}: {one_line(error)}") from error
