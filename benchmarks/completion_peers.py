"""Peers that no well-kept package has, written plainly: softImpute-ALS, and free factors trained by torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from completion_tasks import Entries, Index
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Factors:
    """offset + row_bias[i] + col_bias[j] + left[i] @ right[j]."""

    left: Matrix  # (m, k)
    right: Matrix  # (n, k)
    row_bias: Matrix  # (m,)
    col_bias: Matrix  # (n,)
    offset: float

    def predict(self, rows: Index, cols: Index) -> Matrix:
        return self.offset + self.row_bias[rows] + self.col_bias[cols] + _products(self, rows, cols)


def _products(factors: Factors, rows: Index, cols: Index, block: int = 100_000) -> Matrix:
    """left[rows] · right[cols], (e,); in blocks, because two gathered copies of the factors are large."""
    found = np.empty(len(rows))
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        found[part] = np.einsum("ek,ek->e", factors.left[rows[part]], factors.right[cols[part]])
    return found


def biases(observed: Entries, shape: tuple[int, int], ridge: float = 1.0) -> tuple[Matrix, Matrix, float]:
    """Row and column effects by alternating ridge regressions, and the mean."""
    offset = float(observed.values.mean(dtype=np.float64))
    effects = [np.zeros(size) for size in shape]
    places = (observed.rows, observed.cols)
    counts = [np.bincount(place, minlength=size) for place, size in zip(places, shape)]
    for _ in range(5):
        for axis in (1, 0):
            rest = observed.values - offset - effects[1 - axis][places[1 - axis]]
            effects[axis] = np.bincount(places[axis], rest, shape[axis]) / (counts[axis] + ridge)
    return effects[0], effects[1], offset


def soft_impute_als(
    observed: Entries,
    shape: tuple[int, int],
    *,
    rank: int,
    penalty: float,
    bias: bool = False,
    max_iter: int = 100,
    tol: float = 1e-5,
    seed: int = 0,
) -> Factors:
    """Algorithm 3.1 of Hastie, Mazumder, Lee and Zadeh (2015), on a matrix that is sparse plus low rank.

    Minimizes ½ ‖observed − low rank‖² + penalty · its nuclear norm. The filled-in matrix is never formed: it
    is S + left rightᵀ, S the sparse residual. `tol` is the relative change of the squared Frobenius norm,
    as in the authors' R package.
    """
    from scipy import sparse

    rank = min(rank, *shape)
    row_bias, col_bias = np.zeros(shape[0]), np.zeros(shape[1])
    offset = 0.0
    if bias:
        row_bias, col_bias, offset = biases(observed, shape)
    target = observed.values - offset - row_bias[observed.rows] - col_bias[observed.cols]
    # the sorted order of CSR, so that new residuals go straight into its data
    order = np.lexsort((observed.cols, observed.rows))
    rows, cols, target = observed.rows[order], observed.cols[order], target[order]
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    residual = sparse.csr_array((np.empty_like(target), cols, starts), shape=shape)

    u = np.linalg.qr(np.random.default_rng(seed).standard_normal((shape[0], rank)))[0]
    v, d = np.zeros((shape[1], rank)), np.ones(rank)
    right = v * d

    def refresh(left: Matrix, right: Matrix) -> None:
        residual.data[:] = target - _products(Factors(left, right, row_bias, col_bias, 0.0), rows, cols)

    for _ in range(max_iter):
        old_u, old_d, old_v = u, d, v
        refresh(u * d, right)
        # ridge regression of the filled-in matrix on U D; U stays orthonormal
        shrink = d / (d**2 + penalty)
        right = (residual.T @ u) * shrink + right * (shrink * d)
        v, squared, turn = np.linalg.svd(right * d, full_matrices=False)
        d, u = np.sqrt(squared), u @ turn.T
        left = u * d
        refresh(left, v * d)
        shrink = d / (d**2 + penalty)
        left = (residual @ v) * shrink + left * (shrink * d)
        u, squared, turn = np.linalg.svd(left * d, full_matrices=False)
        d, v = np.sqrt(squared), v @ turn.T
        right = v * d
        if _change(old_u, old_d, old_v, u, d, v) < tol:
            break
    refresh(u * d, right)
    # the last step is softImpute's own: the soft-thresholded SVD of the filled-in matrix in this row space
    u, singular, turn = np.linalg.svd(residual @ v + u * d**2, full_matrices=False)
    kept = np.maximum(singular - penalty, 0)
    return Factors(u * kept, v @ turn.T, row_bias, col_bias, offset)


def _change(u0: Matrix, d0: Matrix, v0: Matrix, u: Matrix, d: Matrix, v: Matrix) -> float:
    """‖new − old‖² / ‖old‖² of two matrices U D² Vᵀ, from their factors."""
    before = float((d0**4).sum())
    between = float(((d0[:, None] ** 2 * (u0.T @ u)) * (d**2 * (v0.T @ v))).sum())
    return max(before + float((d**4).sum()) - 2 * between, 0.0) / max(before, 1e-300)


def torch_factors(
    observed: Entries,
    shape: tuple[int, int],
    *,
    rank: int,
    penalty: float,
    bias: bool = False,
    steps: int = 100,
    seed: int = 0,
) -> Factors:
    """What one writes in an afternoon: two free factors and biases, weight decay, all entries at once.

    Minimizes the sum of squared errors + penalty · the squares of the factors and biases, by L-BFGS; Adam
    took longer to a larger error on each of the tasks.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows, cols = (torch.from_numpy(index.astype(np.int64)) for index in (observed.rows, observed.cols))
    values = torch.from_numpy(observed.values)
    offset = float(values.mean()) if bias else 0.0
    scale = float((values - offset).std()) ** 0.5 / rank**0.25  # the products start as large as the values
    parameters = [scale * torch.randn(size, rank, generator=generator) for size in shape]
    parameters += [torch.zeros(size) for size in shape if bias]
    for parameter in parameters:
        parameter.requires_grad_()
    embed = torch.nn.functional.embedding  # its backward is faster than that of indexing

    def loss() -> torch.Tensor:
        left, right, *effects = parameters
        fitted = (embed(rows, left) * embed(cols, right)).sum(1) + offset
        if effects:
            fitted = fitted + effects[0][rows] + effects[1][cols]
        decay = sum((parameter.square().sum() for parameter in parameters), torch.zeros(()))
        # the mean, because the first step of L-BFGS has the length of the gradient
        return ((values - fitted).square().sum() + penalty * decay) / len(values)

    solver = torch.optim.LBFGS(
        parameters, max_iter=steps, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(closure)  # type: ignore[arg-type]
    left, right, *effects = (parameter.detach().double().numpy() for parameter in parameters)
    row_bias, col_bias = effects or [np.zeros(size) for size in shape]
    return Factors(left, right, row_bias, col_bias, offset)
