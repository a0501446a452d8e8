"""Models: the base model of a task, with a head for the target's classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from nblora.data import quietly
from nblora.tasks.kinds import LOADERS, TaskError, model_errors
from nblora.tasks.preparation import TaskData


@dataclass
class BaseModel:
    """A model with a head for the target's classes.

    Attributes:
        model: the model.
        head: name of the module that classifies ("classifier", "score"); None for language models.
        original_head: the trained head that the model had where it has got a new one; None where it keeps it,
            or never had one.
        untrained: names of the modules that start at random, a new head among them: what has to be trained in
            full, because an adapter would adapt noise.
    """

    model: PreTrainedModel
    head: str | None
    original_head: nn.Module | None
    untrained: tuple[str, ...] = ()


def load_base_model(task_data: TaskData, model: str, **from_pretrained_kwargs: Any) -> BaseModel:
    """Load a model for the data of a task.

    What starts at random is drawn from torch's global generator: seed it first.

    Args:
        task_data: from `prepare` with the same model.
        model: a folder or hub name.
        from_pretrained_kwargs: passed on (dtype, device_map, quantization_config, ...).

    Raises:
        TaskError: if there is no such model, it lacks its weights, or its head is not found.
    """
    labels, own = task_data.labels, task_data.keep_labels
    options: dict[str, Any] = dict(from_pretrained_kwargs)
    if labels is not None:
        options["problem_type"] = "single_label_classification"
    if labels is not None and own is None:
        options |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,
        }
    with quietly(), model_errors(f"the model must be one for {task_data.task}, got {model}"):
        loaded, report = LOADERS[task_data.task].from_pretrained(model, output_loading_info=True, **options)
    loaded = cast(PreTrainedModel, loaded)
    head = None if labels is None else _find_head(loaded, len(own or labels))
    if labels is not None and head is None:
        raise TaskError(f"a model for {task_data.task} must have a head, got none in {type(loaded).__name__}")
    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    total = len(list(loaded.parameters()))
    if 2 * len(missing) > total:
        raise TaskError(
            f"a model must have weights for {type(loaded).__name__}, got none for {len(missing)} of {total} "
            f"parameters in {model}"
        )
    untrained = {_module_of(name, head) for name in missing}
    original = None
    if head is not None and own is not None:
        if head in untrained:
            raise TaskError(
                f"a model with classes of its own must have weights for {head!r}, got none in {model}"
            )
        if task_data.new_head:
            original = loaded.get_submodule(head)
            _replace_head(loaded, head, cast("tuple[str, ...]", labels))
            untrained.add(head)
    if task_data.task == "seq-cls":
        # classifiers on a language model find the end of a text by this token
        loaded.config.get_text_config().pad_token_id = task_data.collator.padding["input_ids"]
    return BaseModel(loaded, head, original, tuple(sorted(untrained)))


def _module_of(parameter: str, head: str | None) -> str:
    """The module that a parameter belongs to; the whole head for its parts."""
    if head is not None and parameter.startswith(f"{head}."):
        return head
    return parameter.rpartition(".")[0]


def _find_head(model: nn.Module, classes: int) -> str | None:
    """The last child beside the backbone that has a parameter with a row for each class."""
    found = None
    for name, child in model.named_children():
        shapes = [parameter.shape for parameter in child.parameters()]
        if name != getattr(model, "base_model_prefix", "") and any(
            shape[:1] == (classes,) for shape in shapes
        ):
            found = name
    return found


def _replace_head(model: Any, name: str, labels: Sequence[str]) -> None:
    """Put a head for other classes, drawn at random, into a model.

    Taken from a model of the same class without memory: loading the checkpoint again with other classes would
    keep the trained head where the number of classes is the same.
    """
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.num_labels = len(labels)
    with torch.device("meta"):
        skeleton = type(model)(config)
    head = skeleton.get_submodule(name)
    reference = next(model.get_submodule(name).parameters())
    head.to_empty(device=reference.device)
    with torch.no_grad():
        for module in head.modules():
            skeleton._init_weights(module)
    model.set_submodule(name, head.to(reference.dtype).train(model.training))
    model.config = config
    model.num_labels = len(labels)
