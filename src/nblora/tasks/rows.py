"""Model inputs: data sets of rows, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

IGNORED = -100  # the label of what is not predicted, as everywhere in transformers


@dataclass(frozen=True)
class Ragged:
    """Sequences of different length, one after another.

    Attributes:
        values: (total,) of all of them.
        starts: (count + 1,) where each begins, and where the last one ends.
    """

    values: Tensor
    starts: Tensor

    @staticmethod
    def of(rows: Sequence[Any]) -> Ragged:
        """Of sequences of integers that 32 bits can hold."""
        lengths = np.asarray([0, *(len(row) for row in rows)], dtype=np.int64)
        values = np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32, copy=False)
        return Ragged(torch.from_numpy(values), torch.from_numpy(lengths.cumsum()))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self.values[self.starts[index] : self.starts[index + 1]].long()


class TensorRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Model inputs that are kept in memory.

    Attributes:
        columns: one entry per row for each model input.
    """

    def __init__(self, columns: Mapping[str, Tensor | Ragged]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}")
        return {name: column[index] for name, column in self.columns.items()}


class ImageRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images that are processed each time that they are asked for.

    Attributes:
        images: rows whose only column is "image".
        process: from a list of images to model inputs.
        labels: (count,)
    """

    def __init__(
        self, images: Dataset, process: Callable[[list[Any]], dict[str, Tensor]], labels: Tensor
    ) -> None:
        self.images = images
        self.process = process
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs = self.process([self.images[int(index)]["image"]])
        return {name: value[0] for name, value in inputs.items()} | {"labels": self.labels[index]}


Rows: TypeAlias = TensorRows | ImageRows


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows; sequences are padded on the right, and get their attention mask.

    Attributes:
        padding: what a sequence is filled up with, by the name of the model input.
    """

    padding: Mapping[str, int]

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name in self.padding and values[0].ndim == 1:
                batch[name] = nn.utils.rnn.pad_sequence(values, True, self.padding[name])
            else:
                batch[name] = torch.stack(values)
        if "input_ids" in batch:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return batch
