"""The kinds of tasks, and which models are made for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from nblora.data import one_line, quietly

Task = Literal["causal-lm", "seq-cls", "token-cls", "seq2seq", "image-cls"]
TASKS: tuple[str, ...] = get_args(Task)
LANGUAGE_TASKS = ("causal-lm", "seq2seq")

LOADERS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "seq-cls": AutoModelForSequenceClassification,
    "token-cls": AutoModelForTokenClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
    "image-cls": AutoModelForImageClassification,
}
# classes of models by model type
_MADE_FOR: dict[str, Mapping[str, Any]] = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq-cls": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-cls": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-cls": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
# what the class of a model is called that has a trained head for the task
_WITH_HEAD = {
    "seq-cls": "ForSequenceClassification",
    "token-cls": "ForTokenClassification",
    "image-cls": "ForImageClassification",
}


class TaskError(ValueError):
    """Data or a model that do not fit the task; the message is one line: the rule, then what was found."""


def load_config(task: str, model: str) -> Any:
    """The configuration of a model that is made for a task."""
    with quietly(), model_errors(f"the model must be a folder or a hub name, got {model}"):
        config = AutoConfig.from_pretrained(model)
    if config.model_type not in _MADE_FOR[task] and not getattr(config, "auto_map", None):
        raise TaskError(f"the model must be made for {task}, got a {config.model_type!r} model in {model}")
    return config


def own_labels(task: str, config: Any) -> tuple[str, ...] | None:
    """The classes of a model's trained head, or None if it has none."""
    if not any(_WITH_HEAD[task] in name for name in config.architectures or []):
        return None  # a backbone or a language model, whose configuration has two classes all the same
    count = config.num_labels
    if count < 2:
        return None  # regression
    return tuple(str(config.id2label.get(index, f"LABEL_{index}")) for index in range(count))


@contextmanager
def model_errors(rule: str) -> Iterator[None]:
    """Errors of libraries about a model become one line."""
    try:
        yield
    except TaskError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise TaskError(f"{rule}: {one_line(error)}") from error
