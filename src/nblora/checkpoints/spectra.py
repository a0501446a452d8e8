"""Spectra of factor pairs in little memory: measured, projected and rounded, chunk by chunk (MATH.md §5).

The factors of a file are of half precision and as large as memory allows; the arithmetic is float64. So a
tall factor is never converted as a whole. Its QR triangle R is all that the spectrum needs, the triangle of
[R; next chunk of rows] is that of the longer matrix, and a new factor is the old one times a k x k matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nblora.bounds import Norm

_CHUNK = 1 << 16  # entries of a factor that are in float64 at a time
_NEGLIGIBLE = 1e-10  # of the product of the factors' norms; below it directions are rounding


def _chunks(matrix: Tensor) -> Iterator[Tensor]:
    """Views of some rows of (p, k) after each other."""
    k = matrix.shape[1]
    yield from matrix.split(max(k, _CHUNK // k))


def triangle(matrix: Tensor, transform: Tensor | None = None) -> Tensor:
    """R (min(p, k), k) of the QR decomposition of (p, k), in float64.

    Args:
        transform: (k, k); the matrix is then matrix @ transform, rounded to the type of matrix.
    """
    result = torch.empty(0, matrix.shape[1], dtype=torch.float64)
    for rows in _chunks(matrix):
        block = rows.double()
        if transform is not None:
            block = (block @ transform).to(matrix.dtype).double()
        result = torch.linalg.qr(torch.cat([result, block]), mode="r").R
    return result


def product_spectrum(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of left @ right from their triangles, NaN where a factor is not finite."""
    product = left @ right.mT
    if not bool(product.isfinite().all()):
        return torch.full((min(product.shape),), torch.nan, dtype=torch.float64)
    values: Tensor = torch.linalg.svdvals(product)
    return values


def spectrum(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Singular values of scale * left @ right, of factors (m, k) and (k, n), in float64."""
    return product_spectrum(triangle(left), triangle(right.mT)) * abs(scale)


def clip_in_place(
    left: Tensor, right: Tensor, scale: float, norm: Norm, radius: float
) -> tuple[Tensor, Tensor]:
    """Project scale * left @ right onto the ball of a norm, rounded into the factors' own memory.

    Factors whose product is inside are left as they are, bit for bit. Otherwise the singular values become
    those of the Euclidean projection, shared evenly between both sides, and shrunk by the little that
    makes the rounded product, measured in float64, keep the bound.

    Args:
        left: (m, k), overwritten.
        right: (k, n), overwritten.
        scale: what the product is multiplied by.
        norm: of the ball.
        radius: of the ball, >= 0.

    Returns:
        The singular values before, and after.

    Raises:
        ArithmeticError: if the update is not finite, before or after rounding.
    """
    r_left, r_right = triangle(left), triangle(right.mT)
    before = product_spectrum(r_left, r_right) * abs(scale)
    value = norm.value(before).item()
    if not value < math.inf:
        raise ArithmeticError(f"got norm {value!r}")
    if value <= radius:
        return before, before
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    kept = sigma > _NEGLIGIBLE * torch.linalg.matrix_norm(r_left) * torch.linalg.matrix_norm(r_right)
    target = norm.project(before, torch.tensor(radius, dtype=torch.float64)) / abs(scale)
    # With left = Q R, Q' R' for right: left @ (R'^T v_j / sigma_j) = Q u_j, since R R'^T v_j = sigma_j u_j
    root = (target[kept].sqrt() / sigma[kept])[:, None]
    k = left.shape[1]
    to_left, to_right = (torch.zeros(k, k, dtype=torch.float64) for _ in range(2))
    count = int(kept.sum())
    to_left[:count] = root * (vh[kept] @ r_right)
    to_right[:count] = root * (u[:, kept].mT @ r_left)
    for rows in _chunks(right.mT):
        rows.copy_(rows.double() @ to_right.mT)
    r_right = triangle(right.mT)
    shrink = 1.0
    while True:
        after = product_spectrum(triangle(left, to_left.mT * shrink), r_right) * abs(scale)
        value = norm.value(after).item()
        if value <= radius:
            break
        if not value < math.inf:
            raise ArithmeticError(f"got norm {value!r} in {left.dtype}")
        shrink *= radius / value * (1 - torch.finfo(left.dtype).eps / 8)
    for rows in _chunks(left):
        rows.copy_(rows.double() @ (to_left.mT * shrink))
    return before, after
