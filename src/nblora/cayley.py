"""The Cayley transform of tall matrices and its inverse (MATH.md §1).

Pure functions of tensors, batched over leading axes, in float32 or float64. Wherever shapes are
given, k is the number of columns and p >= k the number of rows of a tall matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nblora.lowrank import full_precision, plain_operations_only, precise_dtype

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
#
# Where float32 products may be rounded to TF32 or bfloat16, all of this is done in float64: with bfloat16
# updates were measured to be off by 1 % (float32: 5e-6), and adapters to be others where they are loaded.


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
    p, k = _tall_shape(free, "free")
    batch_shape = free.shape[:-2]
    ((rows,),) = tall_cayleys([[free.mT.reshape(batch_shape.numel(), k, p)]])
    return rows.reshape(*batch_shape, k, p).mT


def tall_cayleys(batches: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Several batches of tall matrices through the Cayley transform, with one batched inverse for all.

    Matrices of one batch have one shape. Each is given transposed and in pieces along its long axis, since
    that is how adapters store it; so nothing is transposed or joined.

    Args:
        batches: of pieces (b, k, p_i), float32 or float64; k is the same for all, p_0 >= k.

    Returns:
        the results of `tall_cayley`, in the shapes of their pieces.
    """
    counts = [len(pieces) for pieces in batches]
    flat = [piece for pieces in batches for piece in pieces]
    own, dtype = flat[0].dtype, precise_dtype(flat[0])
    flat = [piece.to(dtype) for piece in flat]
    rows = _transform(counts, flat)[0] if plain_operations_only() else _Cayley.apply(counts, *flat)
    return _regrouped(counts, [piece.to(own) for piece in rows])


def _regrouped(counts: Sequence[int], flat: Sequence[Tensor]) -> list[list[Tensor]]:
    remaining = iter(flat)
    return [list(islice(remaining, count)) for count in counts]


def _transform(counts: Sequence[int], flat: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """The transformed pieces; N = (I + Z)^-T (L, k, k) and lengths (L, 1, 1) of all L matrices.

    In rows, with P the transpose of X: N = (I + P - P^T + Y^T Y)^-1, and the result is [2 N - I, -2 N Y^T].
    """
    batches = _regrouped(counts, [_clamped(piece) for piece in flat])
    k = flat[0].shape[-2]
    eps = torch.finfo(flat[0].dtype).eps
    skew = torch.cat([pieces[0][..., :k] for pieces in batches])  # (L, k, k)
    skew = skew - skew.mT
    gram = torch.cat([_gram(_below(pieces, k)) for pieces in batches])
    with torch.no_grad():
        sizes = k**0.5 * gram.diagonal(dim1=-2, dim2=-1) + skew.abs().amax(-1)  # (L, k)
        ridge = 4 * eps * sizes
    # inv_ex: the checked inverse would wait for the device; I + Z is invertible by construction
    inverse = torch.linalg.inv_ex(gram + skew + torch.diag_embed(1 + ridge)).inverse
    eye = torch.eye(k, dtype=inverse.dtype, device=inverse.device)
    results = []
    inverses = inverse.split([len(pieces[0]) for pieces in batches])
    for pieces, own in zip(batches, inverses):
        below = [(-2 * own) @ piece for piece in _below(pieces, k)]
        results.append([torch.cat([2 * own - eye, below[0]], dim=-1), *below[1:]])
    length = _length(torch.cat([_gram(rows) for rows in results]).detach())
    lengths = length.split([len(pieces[0]) for pieces in batches])
    rows = [piece.div_(own) for pieces, own in zip(results, lengths) for piece in pieces]
    return rows, inverse, length


class _Cayley(torch.autograd.Function):
    """`_transform` with its gradient written out, which keeps k x k matrices and nothing else."""

    @staticmethod
    def forward(ctx: Any, counts: Sequence[int], *flat: Tensor) -> tuple[Tensor, ...]:
        rows, inverse, length = _transform(counts, flat)
        ctx.counts = counts
        ctx.save_for_backward(*flat, inverse, length)
        return tuple(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grads[0]):
            return _Cayley._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *flat, inverse, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            return None, *torch.autograd.grad(_transform(ctx.counts, flat)[0], flat, grads, create_graph=True)
        k = inverse.shape[-1]
        batches = _regrouped(ctx.counts, [_clamped(piece) for piece in flat])
        by_batch = _regrouped(ctx.counts, grads)
        sizes = [len(pieces[0]) for pieces in batches]
        # what reaches N / length, the factor of every piece
        reached = [
            2 * own[0][..., :k] - 2 * sum(g @ y.mT for g, y in zip(_below(own, k), _below(pieces, k)))
            for own, pieces in zip(by_batch, batches)
        ]
        factor = inverse / length
        # what reaches the inverted matrix
        inner = -length * (factor.mT @ torch.cat(reached) @ factor.mT)
        skew, symmetric = inner - inner.mT, inner + inner.mT
        results: list[Tensor] = []
        for own, pieces, f, a, s in zip(
            by_batch, batches, factor.split(sizes), skew.split(sizes), symmetric.split(sizes)
        ):
            below = [(s @ y).baddbmm_(f.mT, g, alpha=-2) for g, y in zip(_below(own, k), _below(pieces, k))]
            results += [torch.cat([a, below[0]], dim=-1), *below[1:]]
        return None, *results


def _below(pieces: Sequence[Tensor], k: int) -> list[Tensor]:
    """The pieces without P, the first k columns."""
    return [pieces[0][..., k:], *pieces[1:]]


def _clamped(piece: Tensor) -> Tensor:
    largest = torch.finfo(piece.dtype).max ** 0.35
    return piece.clamp(-largest, largest)


def _gram(pieces: Sequence[Tensor]) -> Tensor:
    """The products (b, k, k) of the rows of (b, k, p_i) with each other."""
    gram = pieces[0] @ pieces[0].mT
    for piece in pieces[1:]:
        gram = torch.baddbmm(gram, piece, piece.mT)
    return gram


def _length(gram: Tensor) -> Tensor:
    """An upper bound (b, 1, 1) of the spectral norm, never below 1. See Note [Staying inside ...].

    Args:
        gram: (b, k, k) the products of the columns with each other.
    """
    # the largest absolute row sum bounds the spectral norm of a symmetric matrix
    squared = gram.abs().sum(-1).amax(-1)[..., None, None]
    return squared.clamp(min=1).sqrt() * (1 + 4 * torch.finfo(gram.dtype).eps)


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
    own = columns.dtype
    columns = columns.to(precise_dtype(columns))
    signs = _pivot_signs(columns[..., :k, :])
    flipped = columns * signs[..., None, :]
    eye = torch.eye(k, dtype=columns.dtype, device=columns.device)
    inverse = torch.linalg.inv_ex(eye + flipped[..., :k, :]).inverse  # (I + Q1)^-1 = (I + Z) / 2
    x = (inverse - inverse.mT) / 2  # (Z - Z^T) / 4
    y = -(flipped[..., k:, :] @ inverse)
    return torch.cat([x, y], dim=-2).to(own), signs.to(own)


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
