"""The Cayley transform of tall matrices and its inverse (MATH.md §1).

Pure functions of tensors, batched over leading axes, in float32 or float64. Wherever shapes are
given, k is the number of columns and p >= k the number of rows of a tall matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Note [Staying inside in floating point]
#
# In exact arithmetic the Cayley transform has orthonormal columns. In floating point the textbook
# formula does not: the Gram matrix Y^T Y of nearly parallel columns of length 1e2 or more (what a
# large learning rate with Adam produces, since all columns then follow the same signs) is rounded
# by more than the identity that it is added to, and the "orthonormal" result was measured to be 100
# times too long in float32, or infinite. Three measures keep the promise at every scale:
#
# 1. A ridge of a few rounding errors of Y^T Y and of X - X^T on the diagonal. It is relative to each
#    column, so it is invisible at ordinary scales (1e-6 in float32, 1e-15 in float64), and it keeps the
#    rounded matrix invertible.
# 2. Entries are clamped far beyond any useful size, where their squares would overflow.
# 3. The result is divided by an upper bound of its own measured spectral norm, wherever that exceeds
#    one. So the columns that come out are never longer than orthonormal ones, whatever was rounded.
#    The divisor is 1 up to rounding except where the formula would have failed, and is a constant to
#    autograd.


def tall_cayley(free: Tensor) -> Tensor:
    """Map a free tall matrix to one with orthonormal columns.

    With free = [X; Y], X the first k rows, and Z = X - X^T + Y^T Y, the result is
    [(I - Z)(I + Z)^-1; -2 Y (I + Z)^-1]. MATH.md §1.

    Args:
        free: (..., p, k) with p >= k, float32 or float64, any real values.

    Returns:
        (..., p, k) with orthonormal columns up to rounding, of spectral norm at most 1. Rows of Y
        that are exactly zero stay exactly zero.

    Raises:
        ValueError: if p < k, or the dtype is neither float32 nor float64.
    """
    _, k = _tall_shape(free, "free")
    eps = torch.finfo(free.dtype).eps
    largest = torch.finfo(free.dtype).max ** 0.35
    free = free.clamp(-largest, largest)
    x, y = free[..., :k, :], free[..., k:, :]  # (..., k, k), (..., p - k, k)
    gram = y.mT @ y
    skew = x - x.mT
    with torch.no_grad():
        sizes = k**0.5 * gram.diagonal(dim1=-2, dim2=-1) + skew.abs().amax(-2)  # (..., k)
        ridge = 4 * eps * sizes
    # inv_ex: the checked inverse would wait for the device; I + Z is invertible by construction
    inverse = torch.linalg.inv_ex(gram + skew + torch.diag_embed(1 + ridge)).inverse
    eye = torch.eye(k, dtype=free.dtype, device=free.device)
    columns = torch.cat([2 * inverse - eye, -2 * (y @ inverse)], dim=-2)
    return columns / _length(columns)


@torch.no_grad()
def _length(columns: Tensor) -> Tensor:
    """An upper bound (..., 1, 1) of the spectral norm, never below 1. See Note [Staying inside ...]."""
    gram = columns.mT @ columns
    # the largest absolute row sum bounds the spectral norm of a symmetric matrix
    squared = gram.abs().sum(-1).amax(-1)[..., None, None]
    return squared.clamp(min=1).sqrt() * (1 + 4 * torch.finfo(columns.dtype).eps)


def inverse_tall_cayley(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Right inverse of `tall_cayley`, up to the signs of columns.

    Not every matrix with orthonormal columns is a Cayley transform: I + Q1 must be non-singular, Q1
    being the top (k, k) block. Flipping signs of columns always reaches a well-conditioned one: walk
    down the columns as in Gaussian elimination and give each pivot the sign that makes it at least 1
    in absolute value.

    Args:
        columns: (..., p, k) with orthonormal columns, p >= k.

    Returns:
        free (..., p, k) and signs (..., k), each +1 or -1, with
        tall_cayley(free) = columns * signs[..., None, :] up to rounding.

    Raises:
        ValueError: as `tall_cayley`.
    """
    _, k = _tall_shape(columns, "columns")
    signs = _pivot_signs(columns[..., :k, :])
    flipped = columns * signs[..., None, :]
    eye = torch.eye(k, dtype=columns.dtype, device=columns.device)
    inverse = torch.linalg.inv_ex(eye + flipped[..., :k, :]).inverse  # (I + Q1)^-1 = (I + Z) / 2
    x = (inverse - inverse.mT) / 2  # (Z - Z^T) / 4
    y = -(flipped[..., k:, :] @ inverse)
    return torch.cat([x, y], dim=-2), signs


def _pivot_signs(block: Tensor) -> Tensor:
    """Signs (..., k) that make every pivot of I + block * signs at least 1 in absolute value."""
    k = block.shape[-1]
    rest = block.clone()  # column j becomes L^-1 block[:, j], L the eliminations of earlier columns
    signs = torch.ones_like(block[..., 0, :])
    for j in range(k):
        pivot = rest[..., j, j]
        sign = torch.where(pivot < 0, -1.0, 1.0).to(block.dtype)
        signs[..., j] = sign
        if j + 1 < k:
            column = rest[..., j + 1 :, j] * sign[..., None] / (1 + sign * pivot)[..., None]
            rest[..., j + 1 :, j + 1 :] -= column[..., :, None] * rest[..., j, None, j + 1 :]
    return signs


def random_frame(
    p: int,
    k: int,
    *,
    batch_shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw (..., p, k) with orthonormal columns, uniformly (Haar); p >= k."""
    gaussian = torch.randn(*batch_shape, p, k, dtype=dtype, device=device, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    # the sign convention of the factorization would otherwise bias the frame
    frame: Tensor = q * torch.where(diagonal < 0, -1.0, 1.0).to(dtype)[..., None, :]
    return frame


def _tall_shape(matrix: Tensor, name: str) -> tuple[int, int]:
    if matrix.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {name}.dtype={matrix.dtype}")
    if matrix.ndim < 2 or matrix.shape[-2] < matrix.shape[-1]:
        raise ValueError(
            f"{name} must be tall, (..., p, k) with p >= k, got {name}.shape={tuple(matrix.shape)}"
        )
    return matrix.shape[-2], matrix.shape[-1]
