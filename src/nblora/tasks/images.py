"""Images: rows of pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, ViTImageProcessorPil

from nblora.data import one_line, quietly
from nblora.tasks.columns import Piece
from nblora.tasks.kinds import TaskError
from nblora.tasks.rows import Collator, ImageRows, Rows, TensorRows

IN_MEMORY = (
    2**30
)  # bytes of tensors that are made once and kept; more are made each time that they are asked for
AT_ONCE = 64  # images that are processed together


@dataclass(frozen=True)
class Pixels:
    """From images, as files hold them or as numbers, to model inputs.

    Attributes:
        processor: the image processor.
        channels: of the model: 1 (gray) or 3.
    """

    processor: Any
    channels: int

    def __call__(self, images: Sequence[Any]) -> dict[str, Tensor]:
        converted = [self.picture(image) for image in images]
        options = {"do_convert_rgb": False} if self.channels == 1 else {}
        return dict(self.processor(images=converted, return_tensors="pt", **options))

    def picture(self, image: Any) -> Image.Image:
        """The image with 8 bits per channel, in gray or RGB as the model wants it."""
        return image if isinstance(image, Image.Image) else _convert(_open(image), self.channels)


class ImageProcess:
    """Makes rows of pixels.

    Attributes:
        processor: the image processor.
        collator: stacks images.
    """

    def __init__(self, model: str, config: Any) -> None:
        channels = _channels(config, model)
        self.processor = _load_processor(model, config, channels)
        self.collator = Collator({})
        self._pixels = Pixels(self.processor, channels)

    def __call__(self, pieces: Sequence[Piece]) -> list[Rows]:
        """The rows of each piece; kept in memory if all of them fit.

        Raises:
            TaskError: if a row has no image or an unreadable one.
        """
        with quietly():
            images = [_only_images(piece) for piece in pieces]
            first = self._process(pieces[0], images[0], 0, 1)
            total = sum(map(len, images)) * sum(value.nbytes for value in first.values())
            if total < IN_MEMORY:
                return [self._in_memory(piece, rows) for piece, rows in zip(pieces, images)]
        return [
            ImageRows(rows, self._pixels, torch.tensor(piece.labels)) for piece, rows in zip(pieces, images)
        ]

    def _in_memory(self, piece: Piece, images: Dataset) -> TensorRows:
        parts = [
            self._process(piece, images, start, min(start + AT_ONCE, len(images)))
            for start in range(0, len(images), AT_ONCE)
        ]
        try:
            inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        except RuntimeError as error:
            raise TaskError(
                f"the image processor must make all images of one size: {one_line(error)} in {piece.place}"
            ) from error
        return TensorRows({**inputs, "labels": torch.tensor(piece.labels)})

    def _process(self, piece: Piece, images: Dataset, start: int, stop: int) -> dict[str, Tensor]:
        rows = images.select(range(start, stop))
        found = [self._picture(piece, position, row["image"]) for position, row in enumerate(rows, start)]
        try:
            return self._pixels(found)
        except (ValueError, TypeError, RuntimeError) as error:
            raise TaskError(
                f"images must suit the image processor: {one_line(error)}, got {piece.where(start)} and after"
            ) from error

    def _picture(self, piece: Piece, position: int, image: Any) -> Image.Image:
        try:
            return self._pixels.picture(image)
        except Exception as error:  # PIL raises nearly everything for broken files
            reason, where = one_line(error), piece.where(position)
            file = image["path"] if isinstance(image, dict) else None
            named = f" ({file})" if file and file not in reason else ""
            raise TaskError(f"images must be readable: {reason}, got {where}{named}") from error


def _only_images(piece: Piece) -> Dataset:
    """Rows with the images as their only column, "image"."""
    column = piece.columns["image"]
    rows = piece.rows.select_columns([column])
    feature = rows.features[column]
    if column != "image":
        rows = rows.rename_column(column, "image")
    encoded = isinstance(feature, datasets.Image) or (
        isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    )
    if encoded or getattr(feature, "dtype", "") in ("binary", "large_binary"):
        return rows.cast_column("image", datasets.Image(decode=False))  # see `_open`
    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return rows
    number = feature
    while hasattr(number, "feature"):
        number = number.feature
    if number is not feature and number.dtype.startswith(("int", "uint", "float")):
        return rows  # lists of lists of numbers
    raise TaskError(
        f"column {column!r} must hold images, got {feature} in {piece.place}; for image "
        "files use a folder of them"
    )


def _open(image: Any) -> Image.Image:
    """The PIL image of a file, upright, or of numbers.

    Files are opened here and not by `datasets`, which leaves those open that are broken or have more frames.
    """
    if image is None:
        raise ValueError("every row must have an image, got None")
    if not isinstance(image, dict):
        return _from_numbers(image)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata and the like: it can be read or not
        with Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as opened:
            return ImageOps.exif_transpose(opened)


def _convert(picture: Image.Image, channels: int) -> Image.Image:
    """The image with 8 bits per channel, gray or RGB; transparency is dropped."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture, dtype=np.float64)
        if values.max(initial=0) > 255:
            values = values / 257  # of 16 bits
        picture = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")  # PIL warns otherwise
    wanted = "L" if channels == 1 else "RGB"
    return picture if picture.mode == wanted else picture.convert(wanted)


def _from_numbers(image: Any) -> Image.Image:
    """An image of (height, width), (height, width, channels) or (channels, height, width) numbers."""
    values = np.asarray(image)
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.size == 0 or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
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


def _load_processor(model: str, config: Any, channels: int) -> Any:
    """The model's image processor; for a model without, one that scales to its size and to [-1, 1].

    Always the PIL variant: the torchvision one resizes differently, and a result must not depend on whether
    torchvision is installed.
    """
    with quietly():
        try:
            processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        except (OSError, ValueError) as error:
            size = getattr(config, "image_size", None)
            if not size:
                raise TaskError(
                    f"the model must have an image processor, got {model}: {one_line(error)}"
                ) from error
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
