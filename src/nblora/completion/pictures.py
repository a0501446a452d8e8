"""Pictures as matrices: a row for each row of pixels, a column for each column of pixels and channel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from nblora.completion.table import Form, Table, TableError, Values

READ = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
WRITTEN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class PictureForm(Form):
    """How a picture was.

    Attributes:
        channels: 1 (grey) or 3 (red, green and blue).
        depth: largest value of a pixel, 255 or 65535.
        alpha: (height, width) how opaque pixels are, from 0 to 255, where it is not the same for all that
            are observed.
    """

    channels: int = 1
    depth: int = 255
    alpha: NDArray[np.uint8] | None = None


def read_picture(path: Path, missing: tuple[str, ...]) -> Table:
    """The pixels of a picture that are not missing: transparent (alpha 0), or of one of the given colours.

    Grey pictures become (height, width) matrices, coloured ones (height, 3 · width): the columns of the
    three channels side by side, so that they share what the rows have in common.

    Args:
        missing: colours: a grey value, "red,green,blue" or "#rrggbb".

    Raises:
        TableError: if the file is no picture, or no pixel is missing.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            picture: Image.Image = ImageOps.exif_transpose(opened)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise TableError(f"the file must be a picture: {' '.join(str(error).split())}") from error
    pixels, alpha, depth = _pixels(picture, path)
    observed = np.ones(pixels.shape[:2], dtype=bool) if alpha is None else alpha > 0
    for text in missing:
        colour = _colour(text, pixels.shape[2], depth)
        observed &= (pixels != colour).any(axis=2)
    if alpha is not None and (alpha[observed] == 255).all():
        alpha = None
    height, width, channels = pixels.shape
    matrix = to_matrix(pixels)
    rows, columns = np.nonzero(np.tile(observed, (1, channels)))
    return Table(
        source=path,
        layout="wide",
        row_ids=pd.RangeIndex(height),
        column_ids=pd.RangeIndex(width * channels),
        rows=rows,
        columns=columns,
        values=matrix[rows, columns].astype(np.float64),
        form=PictureForm(
            description=f"{'grey' if channels == 1 else 'coloured'} picture of {width} × {height} pixels",
            channels=channels,
            depth=depth,
            alpha=alpha,
        ),
        limits=(0.0, float(depth)),
        units=width,
    )


def _pixels(picture: Image.Image, path: Path) -> tuple[NDArray[Any], NDArray[np.uint8] | None, int]:
    """(height, width, channels), alpha (height, width) where there is some, and the largest value."""
    mode = picture.mode
    if mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        deep = np.asarray(picture).astype(np.int64)
        if deep.min() >= 0 and deep.max() <= 65535:
            return deep[:, :, None], None, 65535
    if mode in ("F", "I"):
        raise TableError(
            f"a picture must have pixels from 0 to 255 or to 65535, got mode {mode} in {path}; "
            "an .npy file takes any numbers"
        )
    clear = "A" in mode or "transparency" in picture.info
    grey = mode in ("1", "L", "LA", "La")
    if clear:
        pixels = np.asarray(picture.convert("LA" if grey else "RGBA"))
        return pixels[:, :, :-1], pixels[:, :, -1], 255
    pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1), None, 255


def _colour(text: str, channels: int, depth: int) -> NDArray[np.int64]:
    """(channels,)"""
    parts: list[int] = []
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        parts = [int(text[i : i + 2], 16) for i in (1, 3, 5)]
    elif re.fullmatch(r"\d+(,\d+,\d+)?", text):
        parts = [int(part) for part in text.split(",")]
    if len(parts) == 1:
        parts *= channels
    if len(parts) != channels or max(parts) > depth:
        raise TableError(
            f"a missing colour must be a number from 0 to {depth}"
            + (", red,green,blue or #rrggbb" if channels == 3 else "")
            + f", got {text!r}"
        )
    return np.array(parts)


def to_matrix(pixels: NDArray[Any]) -> NDArray[Any]:
    """(height, channels · width) from pixels (height, width, channels)."""
    height, width, channels = pixels.shape
    matrix: NDArray[Any] = pixels.transpose(0, 2, 1).reshape(height, channels * width)
    return matrix


def to_pixels(matrix: NDArray[Any], channels: int) -> NDArray[Any]:
    """(height, width, channels) from a matrix (height, channels · width)."""
    pixels: NDArray[Any] = matrix.reshape(len(matrix), channels, -1).transpose(0, 2, 1)
    return pixels


def write_picture(
    path: Path, suffix: str, form: PictureForm, completed: Values, filled: NDArray[np.bool_]
) -> None:
    """A completed picture; what was missing is opaque now.

    Args:
        completed: (height, channels · width), within the limits.
        filled: of the same shape, what was not observed.
    """
    kind = np.uint8 if form.depth == 255 else np.uint16
    pixels = to_pixels(np.rint(completed), form.channels).astype(kind)
    if form.alpha is not None:
        alpha = np.where(to_pixels(filled, form.channels).any(axis=2), 255, form.alpha).astype(np.uint8)
        pixels = np.concatenate([pixels, alpha[:, :, None]], axis=2)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
    options: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
    name = formats.get(suffix, suffix[1:].upper())
    picture.save(path, format=name, **options.get(name, {}))
