"""Preparation: all the data of a task, and its scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from nblora.data import kept_parts, target_parts
from nblora.tasks.columns import Piece, Source
from nblora.tasks.images import ImageProcess
from nblora.tasks.kinds import LANGUAGE_TASKS, TASKS, Task, TaskError, load_config, own_labels
from nblora.tasks.labels import classes_of, leaves, listed, numbered, outputs_of
from nblora.tasks.rows import IGNORED, Collator, Rows
from nblora.tasks.text import TextProcess

LOGITS_AT_ONCE = 2**26  # of which a float32 copy is made


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
        keep_labels: the classes that the model already knows, in the order of its head; None if it knows
            none.
        new_head: whether the model's own classes lack one of the target's, so that it gets a new head. Then
            `keep_validation` and `keep_test` are labelled for the head that the model had.
        processor: tokenizer or image processor.
        collator: makes a batch of rows.
        metric: what `score` is: "accuracy", or "nats" (minus nats per predicted token).
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
            token-cls (batch, length, 2): of each token the nats and the predicted class.
        """
        if not isinstance(logits, Tensor):
            logits = logits[0]
        if self.task == "token-cls":
            nats, predicted = _judge(logits.flatten(0, 1), labels.flatten())
            return torch.stack([nats, predicted], -1).view(*labels.shape, 2)
        if labels.ndim == 1:
            nats, predicted = _judge(logits, labels)
            return torch.stack([nats, torch.ones_like(nats), (predicted == labels).float()], -1)
        if self.task == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        sums = []
        for row, wanted in zip(logits, labels):  # one by one, since a copy of all logits may not fit
            used = wanted != IGNORED
            nats, predicted = _judge(row[used], wanted[used])
            sums.append(torch.stack([nats.sum(), used.sum(), (predicted == wanted[used]).sum()]))
        return torch.stack(sums)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Scores over a whole set, from what `preprocess_logits` made of it.

        Returns:
            `score` (higher is better); `accuracy` in [0, 1] and `nats`, the mean of minus the log-likelihood,
            both over all predictions of all rows; for language models `perplexity`; for token-cls `f1`, the
            mean over the classes that occur or are predicted. NaN where the model's logits are.
        """
        found = np.asarray(prediction.predictions, dtype=np.float64)
        extra: dict[str, float] = {}
        if self.task == "token-cls":
            used = np.asarray(prediction.label_ids) != IGNORED
            wanted, predicted = np.asarray(prediction.label_ids)[used], found[used][:, 1]
            total, count, right = found[used][:, 0].sum(), len(wanted), (wanted == predicted).sum()
            extra["f1"] = _macro_f1(wanted, predicted)
        else:
            total, count, right = found.sum(0)
        nats = float(total / count) if count else math.nan
        accuracy = float(right / count) if count else math.nan
        if self.metric == "nats":
            extra["perplexity"] = math.exp(nats) if nats < 700 else math.inf
        if math.isnan(nats):
            accuracy, extra = math.nan, dict.fromkeys(extra, math.nan)
        score = accuracy if self.metric == "accuracy" else -nats
        return {"score": score, "accuracy": accuracy, "nats": nats, **extra}


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
        columns: role -> column of the target, where it is not recognised. Roles are, for causal-lm,
            `messages` (chats), or `prompt` and `completion` (and `context`, which follows the prompt), or
            `text`; for seq-cls `text` (and `text_pair`) and `label`; for token-cls `tokens` and `tags`; for
            seq2seq `source` and `target`; for image-cls `image` and `label`.
        keep_columns: the same for `keep`; without it those of `columns` that exist there.
        max_length: tokens of a row at most, and of a block of plain text; by default the model's maximum, but
            at most 1024.
        seed: of splits that are made and samples that are drawn.
        max_train_samples: how many rows (blocks, of plain text) to train on at most, drawn at random.
        max_eval_samples: the same for each other set.

    Plain text is tokenised, with an end-of-text token after each document, and cut into blocks of
    `max_length`; what is left makes a shorter block, but not for training. A prompt is followed by its
    completion, after a line break if there is no white space, and only the completion is predicted. Of a chat
    the parts are predicted that the chat template marks by `{% generation %}`; without marks all of it. Rows
    whose predicted part lies beyond `max_length` are left out.

    Labels are those of the model where it knows all of the target's classes by name, or numbers them
    ("LABEL_3" is 3); else the target's classes are new. Splits without any label are not used.

    Raises:
        DataError: for data that cannot be read or split.
        TaskError: for a task, a model and data that do not fit each other.
    """
    if task not in TASKS:
        raise TaskError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    for name, value, least in (
        ("max_length", max_length, 2),
        ("max_train_samples", max_train_samples, 1),
        ("max_eval_samples", max_eval_samples, 1),
    ):
        if value is not None and value < least:
            raise TaskError(f"{name} must be at least {least}, got {value}")
    config = load_config(task, model)
    process = (
        ImageProcess(model, config) if task == "image-cls" else TextProcess(task, model, config, max_length)
    )
    target = Source(task, data, columns)
    parts = target_parts({name: len(split) for name, split in target.splits.items()}, data, seed=seed)
    pieces = target.pieces(parts)
    own = labels = None
    new_head = False
    if task not in LANGUAGE_TASKS:
        own = own_labels(task, config)
        pieces, labels, new_head = _for_head(target, pieces, own)
    if keep is not None:
        inherited = keep_columns is None
        known = Source(task, keep, columns if inherited else keep_columns, where_present=inherited)
        kept_places = kept_parts({name: len(split) for name, split in known.splits.items()}, keep, seed=seed)
        kept = known.pieces({f"keep_{role}": part for role, part in kept_places.items()})
        if task not in LANGUAGE_TASKS:
            if own is None:
                raise TaskError(f"kept data need a model with a trained head for {task}, got none in {model}")
            kept = _for_own_head(known, kept, own)
        pieces += kept
    limits = {"train": max_train_samples}
    built: dict[str, Rows] = {}
    if isinstance(process, ImageProcess):
        drawn = [piece.sample(limits.get(piece.purpose, max_eval_samples), seed=seed) for piece in pieces]
        built = {piece.purpose: rows for piece, rows in zip(drawn, process(drawn))}
    else:
        for piece in pieces:
            built[piece.purpose] = process(piece, limits.get(piece.purpose, max_eval_samples), seed)
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
        processor=process.processor,
        collator=process.collator,
        metric="nats" if task in LANGUAGE_TASKS else "accuracy",
    )


def _for_head(
    source: Source, pieces: Sequence[Piece], own: Sequence[str] | None
) -> tuple[list[Piece], tuple[str, ...], bool]:
    """Pieces with numbers for labels, the classes that they number, and whether these are not the model's."""
    occurring = {label for piece in pieces for label in leaves(piece.labels or [])}
    if own is not None:
        outputs = outputs_of(own, source.label_feature)
        if occurring <= set(outputs):
            return _numbered(pieces, outputs), tuple(own), False
    classes = classes_of(occurring, source.label_feature, source.label_column, source.name)
    return _numbered(pieces, {label: index for index, label in enumerate(classes)}), classes, True


def _for_own_head(source: Source, pieces: Sequence[Piece], own: Sequence[str]) -> list[Piece]:
    """Pieces with the model's own numbers for labels."""
    outputs = outputs_of(own, source.label_feature)
    strange = sorted({label for piece in pieces for label in leaves(piece.labels or [])} - set(outputs))
    if strange:
        raise TaskError(
            f"labels of kept data must be classes of the model, {listed(own)}, got {listed(strange)} in "
            f"{source.name}"
        )
    return _numbered(pieces, outputs)


def _numbered(pieces: Sequence[Piece], outputs: Mapping[str, int]) -> list[Piece]:
    return [replace(piece, labels=numbered(piece.labels or [], outputs)) for piece in pieces]


def _judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Nats and predicted class, both (count,) and float32, of logits (count, classes)."""
    at_once = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    nats = [
        cross_entropy(some.float(), wanted, ignore_index=IGNORED, reduction="none")
        for some, wanted in zip(logits.split(at_once), labels.split(at_once))
    ]
    return torch.cat(nats), logits.argmax(-1).float()


def _macro_f1(wanted: Any, predicted: Any) -> float:
    scores = []
    for label in np.union1d(wanted, predicted):
        both = ((wanted == label) & (predicted == label)).sum()
        scores.append(2 * both / ((wanted == label).sum() + (predicted == label).sum()))
    return float(np.mean(scores)) if scores else math.nan
