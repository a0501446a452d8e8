"""Spectral norms of large matrices between proven limits, from a few passes over the entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nblora.lowrank import full_precision, precise_dtype

# Note [An upper limit from a random start]
#
# The largest eigenvalue λ of A = WᵀW, ‖W‖₂² = λ, is to be bounded from above, and Ritz values only bound it
# from below. Kuczyński and Woźniakowski (SIAM J. Matrix Anal. Appl. 13, 1992) bound what a random start can
# miss, for the worst spectrum; here the same is done for the spectrum at hand, from Lanczos' coefficients.
#
# A is applied to b = 8 vectors at once, as if they were one vector of R^(bn): Lanczos on I ⊗ A, where every
# eigenvalue of A has b eigenvectors or more. Its start s is uniform on the sphere, so that the squared weight
# of s in the eigenspace of λ has the distribution Beta(b/2, b(n - 1)/2) or, with multiple eigenvalues, a
# larger one. The distribution function at x is at most x^a / (a B(a, β)), with a and β the two parameters
# and β >= 1. So but for a probability η the weight is at least w = (η a B(a, β))^(1/2a): `_least_weight`.
# With one vector w would be about η/√n, with eight it is 0.06/√n for η = 1e-9: then a third of the steps is
# enough, and a step costs little more, because it waits for the entries of W to arrive.
#
# Let v_1 = s, v_2, ... be the Lanczos vectors, u the unit vector along the part of s in the eigenspace, and
# y_j = u·v_j. From b_j v_{j+1} = A v_j - a_j v_j - b_{j-1} v_{j-1} follows
#     b_j y_{j+1} = (λ - a_j) y_j - b_{j-1} y_{j-1} - f_j
# with f_j = 0 but for rounding. If λ is above all Ritz values, the pivots of λ - T,
#     D_j = λ - a_j - b_{j-1}² / D_{j-1},
# are positive, and without rounding y_{j+1} = y_1 ∏_{i<=j} D_i / b_i. Since no |y_{j+1}| is above 1 and y_1
# is at least w,
#     w <= ∏_{i<=j} b_i / D_i     for every j.
# The right side falls as λ rises: the λ where this starts to fail is an upper limit, found by bisection. (The
# product of the D_i is det(λ - T): this is the monic orthogonal polynomial of degree j at λ.)
#
# Rounding: nothing above needs orthogonal vectors, only the recurrence and unit lengths. (What vectors that
# are not reorthogonalized cost is steps, and only after the leading Ritz value has converged.) Let
# |f_j| <= φ. By induction y_{j+1} = (∏_{i<=j} D_i / b_i) (y_1 + Σ_{i<=j} ±ε_i), where
#     ε_i <= (e_i / D_i) ∏_{l<i} b_l / D_l,     e_i = φ + e_{i-1} b_{i-1} / D_{i-1},
# so that w - Σ_i ε_i takes the place of w. All of it falls as λ rises. f_j is the part of the rounding
# errors of one product with A along one direction. Measured against float64, |f_j| was at most 0.7 eps λ
# for random and structured matrices of entries that vary, 2.4 eps λ where rows or columns are equal, and 19
# eps λ where all entries are, so that errors add up (300 x 420 to 11008 x 2048). φ = 32 eps λ: this
# constant is measured, not proven; the rest is. A wrong one would not make the limit worthless: errors k
# times as large only matter for starts of weight below about k w.
#
# The lower limit is the largest Ritz value. It exceeds λ by no more than rounding as long as neighbours are
# orthogonal (Paige, J. Inst. Maths Applics 18, 1976), so T ends where b_j is too small for that.

_VECTORS = 8
_FAILURE = 1e-9  # η, for each matrix
_ROUNDING = 32  # φ / (eps λ)
_EXACT_SIDE = 256  # up to here all eigenvalues of the Gram matrix cost less than the iteration
_CHECK_EVERY = 3  # steps; a check waits for the device
_MOST_STEPS = 96  # any spectrum is within 1 % after about 35
# a tight limit where it is cheap: steps done -> what is enough
_ENOUGH = ((9, 1e-4), (60, 1e-3), (_MOST_STEPS, 1e-2))
# entries at a time: on a CPU what stays in the cache of a thread, so that a step is one pass over the weight;
# elsewhere what a conversion may take of the memory
_CHUNK, _CHUNK_ELSEWHERE = 2**18, 2**26


def spectral_norm(matrix: Tensor) -> Tensor:
    """An upper limit (...,) of the largest singular value of (m, n) matrices, float64 on the CPU.

    Tight: the upper end of `spectral_norm_interval`, which says how it is found and what it raises.
    """
    return spectral_norm_interval(matrix)[1]


@torch.no_grad()
def spectral_norm_interval(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Limits (...,) of the largest singular value of (m, n) matrices, float64 on the CPU.

    Exact to rounding in float64 where m or n is at most 256. Otherwise a Lanczos iteration with a random
    start, whose upper limit fails with a probability of 1e-9: Note [An upper limit from a random start].
    upper/lower - 1 is at most 1e-3, and 1e-4 where few passes tell, as in trained weights, whose largest
    singular values are apart (1e-2 if 60 passes were not enough). Takes 6 to 60 passes and no memory
    to speak of. Reproducible; torch's global random state is left alone.

    Args:
        matrix: (..., m, n) of any dtype, in which it is read (half precision is converted as it goes);
            of a sharded one (DTensor) all is gathered, so all processes must call.

    Raises:
        ValueError: if the matrix has NaN or infinite entries.
    """
    if matrix.ndim < 2:
        raise ValueError(f"matrix must be (..., m, n), got shape {tuple(matrix.shape)}")
    matrix = matrix.detach()
    if (gather := getattr(matrix, "full_tensor", None)) is not None:
        matrix = gather()
    if matrix.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        matrix = matrix.float()
    limits = torch.zeros(2, *matrix.shape[:-2], dtype=torch.float64, device="cpu")
    if matrix.numel():
        each = [_interval(one) for one in matrix.reshape(-1, *matrix.shape[-2:])]
        limits = torch.tensor(each, dtype=torch.float64, device="cpu").mT.reshape(limits.shape)
    return limits[0], limits[1]


def _interval(matrix: Tensor) -> tuple[float, float]:
    """Limits of the spectral norm of one (m, n) matrix with entries."""
    largest = torch.stack(matrix.aminmax()).abs().max().item()  # NaN if there is one
    if not math.isfinite(largest):
        raise ValueError("a spectral norm needs finite entries, got NaN or infinity")
    if largest == 0:
        return 0.0, 0.0
    if not 1e-10 < largest < 1e10:  # float32 cannot hold products of three
        if matrix.dtype != torch.float64:
            matrix = matrix.float()
        exponent = math.frexp(largest)[1]
        halves = (2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2))  # 2**-exponent may overflow
        lower, upper = _interval(matrix / halves[0] / halves[1])
        return lower * halves[0] * halves[1], upper * halves[0] * halves[1]
    if matrix.stride(-1) != 1 and matrix.stride(-2) == 1:
        matrix = matrix.mT  # rows that are contiguous
    if min(matrix.shape) <= _EXACT_SIDE:
        return _exact(matrix.cpu().double())
    scale = 2.0 ** math.frexp(largest)[1]
    with full_precision(matrix):
        lower, upper = _lanczos(matrix, scale)
    return lower * scale, upper * scale


def _exact(matrix: Tensor) -> tuple[float, float]:
    gram = matrix @ matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix.mT @ matrix
    norm = math.sqrt(max(torch.linalg.eigvalsh(gram)[-1].item(), 0.0))
    slack = 4 * max(matrix.shape) * torch.finfo(torch.float64).eps
    return norm * (1 - slack), norm * (1 + slack)


def _lanczos(matrix: Tensor, scale: float) -> tuple[float, float]:
    """Limits of the spectral norm of matrix / scale, whose entries are at most 1."""
    n = matrix.shape[1]
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    generator = torch.Generator("cpu").manual_seed(0)
    now = torch.randn(_VECTORS, n, generator=generator, dtype=dtype, device="cpu").to(matrix.device)
    now = now.to(precise_dtype(now))
    if not _is_precise(matrix, now):
        now = now.double()
    now = now / _length(now)
    eps = torch.finfo(now.dtype).eps
    weight = _least_weight(n) * (1 - math.sqrt(eps))  # vectors have unit length up to rounding
    before, beta = torch.zeros_like(now), now.new_zeros(())
    diagonal: list[Tensor] = []
    neighbours: list[Tensor] = []
    for steps in range(1, _MOST_STEPS + 1):
        after = _apply_gram(matrix, now) / scale**2
        diagonal.append((now * after).sum())
        after = after - diagonal[-1] * now - beta * before
        beta = _length(after)
        neighbours.append(beta)
        before, now = now, after / beta.clamp(min=torch.finfo(now.dtype).tiny)
        if steps % _CHECK_EVERY == 0:
            a, b = torch.stack([torch.stack(diagonal), torch.stack(neighbours)]).tolist()
            lower = _largest_ritz_value(a, b, eps)
            upper = _upper_limit(a, b, lower, weight, eps)
            enough = next(tolerance for most, tolerance in _ENOUGH if steps <= most)
            exhausted = min(b) <= _ROUNDING * eps * lower  # the rest is rounding
            if exhausted or math.sqrt(upper / lower) - 1 <= enough:
                break
    return math.sqrt(lower) * (1 - _ROUNDING * eps), math.sqrt(upper) * (1 + _ROUNDING * eps)


def _length(vectors: Tensor) -> Tensor:
    return vectors.square().sum().sqrt()  # sums in pairs; norm() adds up one by one, and loses digits


def _apply_gram(matrix: Tensor, vectors: Tensor) -> Tensor:
    """vectors (b, n) times WᵀW for W (m, n), in the dtype of the vectors."""
    m, n = matrix.shape
    product = torch.zeros_like(vectors)
    rows = _rows_at_once(matrix)
    as_is = matrix.dtype == vectors.dtype and matrix.stride(-1) == 1
    buffer = None if as_is else vectors.new_empty(min(rows, m), n)
    for chunk in matrix.split(rows):
        if buffer is not None:
            chunk = buffer[: len(chunk)].copy_(chunk)
        product.addmm_(vectors @ chunk.mT, chunk)
    return product


def _rows_at_once(matrix: Tensor) -> int:
    entries = _CHUNK * torch.get_num_threads() if matrix.device.type == "cpu" else _CHUNK_ELSEWHERE
    return max(16, entries // matrix.shape[1])


def _is_precise(matrix: Tensor, vectors: Tensor) -> bool:
    """Whether products are as precise as their dtype, for devices with settings of their own."""
    if vectors.dtype == torch.float64:
        return True
    chunk = matrix[: _rows_at_once(matrix)].to(vectors.dtype)  # small ones may be computed otherwise
    some = slice(None, None, max(1, len(chunk) // 64))
    product = (vectors @ chunk.mT)[:, some].cpu().double()
    exact = vectors.cpu().double() @ chunk[some].cpu().double().mT
    return bool((product - exact).norm() <= 1e-5 * exact.norm())


def _least_weight(n: int) -> float:
    """What the part of a random start in an eigenspace of I ⊗ A exceeds but for a probability of 1e-9."""
    a, rest = _VECTORS / 2, _VECTORS * (n - 1) / 2
    log_beta = math.lgamma(a) + math.lgamma(rest) - math.lgamma(a + rest)
    return math.exp((math.log(_FAILURE * a) + log_beta) / (2 * a))


def _largest_ritz_value(diagonal: list[float], neighbours: list[float], eps: float) -> float:
    """The largest eigenvalue of T up to where the vectors stop being orthogonal to their neighbours."""
    size = len(diagonal)
    lost = math.sqrt(eps) * max(diagonal)
    size = next((j + 1 for j, b in enumerate(neighbours) if b <= lost), size)
    off = torch.tensor(neighbours[: size - 1], dtype=torch.float64, device="cpu")
    on = torch.tensor(diagonal[:size], dtype=torch.float64, device="cpu")
    tridiagonal = torch.diag(on) + torch.diag(off, 1) + torch.diag(off, -1)
    largest: float = torch.linalg.eigvalsh(tridiagonal)[-1].item()
    return largest


def _upper_limit(
    diagonal: list[float], neighbours: list[float], lower: float, weight: float, eps: float
) -> float:
    """Where an eigenvalue starts to be excluded, to a millionth of its distance from `lower`."""

    def excluded(value: float) -> bool:
        rounding = _ROUNDING * eps * value
        before, lost, error, product, least = 1.0, 0.0, 0.0, 1.0, 1.0
        b_before = 0.0
        for a, b in zip(diagonal, neighbours):
            pivot = value - a - b_before * (b_before / before)
            if pivot <= 0:
                return False
            error = rounding + error * b_before / before
            lost += error / pivot * product
            product *= b / pivot
            least = min(least, product)
            before, b_before = pivot, b
        return least < weight - lost

    high = eps
    while not excluded(lower * (1 + high)):
        high *= 16
    low = high / 16
    while high > low * (1 + 1e-6):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if excluded(lower * (1 + middle)) else (middle, high)
    return lower * (1 + high)
