"""A product of two thin factors behaves as the matrix that it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nblora.lowrank import LowRank

SIZES = [  # leading axes, m, n, columns of the left factor
    ((), 9, 6, 3),
    ((), 1, 7, 1),
    ((), 7, 1, 1),
    ((), 8, 8, 8),
    ((2, 3), 6, 9, 2),
    ((), 5, 12, 20),  # more columns than the product has singular values
    ((4,), 3, 2, 5),
]
every_size = pytest.mark.parametrize(("batch", "m", "n", "k"), SIZES)


def random_factors(
    batch: tuple[int, ...], m: int, n: int, k: int, dtype: torch.dtype = torch.float64
) -> LowRank:
    return LowRank(torch.randn(*batch, m, k, dtype=dtype), torch.randn(*batch, k, n, dtype=dtype))


def slack(matrix: Tensor) -> float:
    """Rounding of a decomposition of `matrix`, in the units of its entries."""
    largest = torch.linalg.matrix_norm(matrix.double(), 2).max().item()
    return 10 * max(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps * largest


def is_orthonormal(columns: Tensor) -> bool:
    error = columns.mT @ columns - torch.eye(columns.shape[-1], dtype=columns.dtype)
    return bool(error.abs().max() <= 10 * max(columns.shape[-2:]) * torch.finfo(columns.dtype).eps)


@every_size
def test_shape_rank_and_product(batch: tuple[int, ...], m: int, n: int, k: int) -> None:
    factors = random_factors(batch, m, n, k)
    assert factors.shape == (*batch, m, n)
    assert factors.rank == k
    expected = torch.einsum("...mk,...kn->...mn", factors.left, factors.right)
    torch.testing.assert_close(factors.dense(), expected)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_apply_is_multiplication(leading: tuple[int, ...]) -> None:
    factors, x = random_factors((), 9, 6, 3), torch.randn(*leading, 6, dtype=torch.float64)
    torch.testing.assert_close(factors.apply(x), x @ factors.dense().mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_apply_works_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    factors = random_factors((), 9, 6, 3, torch.float32)
    x = torch.randn(4, 6).to(dtype)
    result = factors.apply(x)
    assert result.dtype == dtype
    left, right, x = factors.left.double(), factors.right.double(), x.double()
    rounding = 10 * torch.finfo(dtype).eps * (x.abs() @ right.abs().mT @ left.abs().mT)  # per entry
    assert ((result.double() - x @ right.mT @ left.mT).abs() <= rounding).all()


@every_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_svd(batch: tuple[int, ...], m: int, n: int, k: int, dtype: torch.dtype) -> None:
    factors = random_factors(batch, m, n, k, dtype)
    dense = factors.dense()
    u, sigma, v = factors.svd()
    count = min(m, n, k)
    assert (u.shape, sigma.shape, v.shape) == ((*batch, m, count), (*batch, count), (*batch, n, count))
    assert is_orthonormal(u)
    assert is_orthonormal(v)
    assert (sigma.diff(dim=-1) <= 0).all()
    assert (sigma - torch.linalg.svdvals(dense)[..., :count]).abs().max() <= slack(dense)
    assert (u * sigma[..., None, :] @ v.mT - dense).abs().max() <= slack(dense)


def test_autocast_has_no_effect() -> None:
    """A merge or a certificate inside a mixed-precision training step is as exact as elsewhere."""
    factors = random_factors((2,), 9, 6, 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense, svd, sigma = factors.dense(), factors.svd(), factors.singular_values()
    assert torch.equal(dense, factors.dense())
    assert all(torch.equal(inside, outside) for inside, outside in zip(svd, factors.svd()))
    assert torch.equal(sigma, factors.singular_values())


def deficient() -> LowRank:
    """Rank 1 out of 3 columns, by a repeated and a zero column."""
    factors = random_factors((), 9, 6, 3)
    return LowRank(factors.left[:, [0, 0, 1]], factors.right * torch.tensor([[1.0], [2.0], [0.0]]))


@pytest.mark.parametrize(
    "factors",
    [
        LowRank(torch.zeros(9, 3), torch.randn(3, 6)),
        LowRank(torch.zeros(9, 3), torch.zeros(3, 6)),
        LowRank(torch.randn(2, 4, 7), torch.zeros(2, 7, 5)),
        deficient(),
    ],
    ids=["zero left", "zero", "zero right, batched", "rank one of three"],
)
def test_singular_vectors_are_orthonormal_where_the_matrix_is_deficient(factors: LowRank) -> None:
    u, sigma, v = factors.svd()
    assert is_orthonormal(u)
    assert is_orthonormal(v)
    dense = factors.dense()
    assert (u * sigma[..., None, :] @ v.mT - dense).abs().max() <= slack(dense)


@every_size
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_singular_values_are_measured_in_float64(
    batch: tuple[int, ...], m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    """Exactly those of the product of the given entries: a certificate may not round."""
    factors = random_factors(batch, m, n, k, dtype)
    exact = factors.left.double() @ factors.right.double()
    sigma = factors.singular_values()
    assert sigma.dtype == torch.float64
    assert sigma.shape == (*batch, min(m, n, k))
    assert (sigma - torch.linalg.svdvals(exact)[..., : min(m, n, k)]).abs().max() <= slack(exact)


def test_singular_values_carry_no_graph() -> None:
    factors = LowRank(torch.randn(4, 2, requires_grad=True), torch.randn(2, 3, requires_grad=True))
    assert not factors.singular_values().requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["left", "right"])
def test_singular_values_of_what_is_not_finite(side: str, value: float) -> None:
    """NaN for that matrix, not an exception and never a number; its neighbours are measured."""
    factors = random_factors((3,), 6, 5, 2)
    expected = factors.singular_values()
    getattr(factors, side)[1, 0, 0] = value
    sigma = factors.singular_values()
    assert sigma[1].isnan().all()
    assert torch.equal(sigma[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (8, 8), (5, 12), (2, 3, 12, 5)], ids=str)
def test_from_dense(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    factors = LowRank.from_dense(matrix)
    assert factors.shape == shape
    assert factors.rank == min(shape[-2:])
    assert (factors.dense() - matrix).abs().max() <= slack(matrix)


@pytest.mark.parametrize(
    ("left", "right"),
    [((9, 3), (4, 6)), ((9, 3), (6,)), ((3,), (3, 6)), ((2, 9, 3), (3, 6)), ((2, 9, 3), (4, 3, 6))],
)
def test_factors_that_do_not_fit_are_refused(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="with the same k and leading axes, got ") as error:
        LowRank(torch.zeros(left), torch.zeros(right))
    assert str(error.value).endswith(f"got left.shape={left} and right.shape={right}")
