"""The Cayley transform: orthonormal for ordinary parameters, never too long for any (MATH.md §1)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nblora import cayley
from nblora.cayley import inverse_tall_cayley, random_frame, tall_cayley, tall_cayleys

SHAPES = [(1, 1), (7, 1), (2, 2), (8, 8), (9, 8), (30, 5), (3, 30, 5), (2, 3, 6, 6), (200, 64)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def slack(matrix: Tensor) -> float:
    return 10 * max(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps


def eye_like(columns: Tensor) -> Tensor:
    return torch.eye(columns.shape[-1], dtype=columns.dtype)


def free_matrix(shape: tuple[int, ...], *, size: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A Gaussian matrix of the given spectral norm."""
    free = torch.randn(shape, dtype=dtype)
    return size * free / torch.linalg.matrix_norm(free, 2, keepdim=True)


def rounding_of_z(size: float) -> float:
    """Rounding is relative to |I + Z| <= 1 + 2 |X| + |Y|^2, and |(I + Z)^-1| <= 1 passes it on."""
    return (1 + size) ** 2


def textbook_cayley(free: Tensor) -> Tensor:
    """MATH.md §1 to the letter: [(I - Z)(I + Z)^-1; -2 Y (I + Z)^-1]."""
    k = free.shape[-1]
    x, y = free[..., :k, :], free[..., k:, :]
    z = x - x.mT + y.mT @ y
    eye = eye_like(free)
    inverse = torch.linalg.inv_ex(eye + z).inverse
    return torch.cat([(eye - z) @ inverse, -2 * y @ inverse], dim=-2)


def excess_length(columns: Tensor) -> float:
    """How far the spectral norm is above one, measured in float64; infinite if it is not a number."""
    if not columns.isfinite().all():
        return float("inf")
    return float(torch.linalg.matrix_norm(columns.double(), 2).max()) - 1


# --- the transform ---


@every_dtype
@every_shape
@pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0, 2.0])
def test_columns_are_orthonormal(shape: tuple[int, ...], size: float, dtype: torch.dtype) -> None:
    columns = tall_cayley(free_matrix(shape, size=size, dtype=dtype))
    assert columns.shape == shape
    assert columns.dtype == dtype
    error = columns.mT @ columns - eye_like(columns)
    assert error.abs().max() <= slack(columns) * rounding_of_z(size)


@every_shape
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 10.0])
def test_is_the_formula_of_the_paper(shape: tuple[int, ...], size: float) -> None:
    """The ridge and the division are guards: they must not change an ordinary value."""
    free = free_matrix(shape, size=size)
    tolerance = slack(free) * rounding_of_z(size)
    torch.testing.assert_close(tall_cayley(free), textbook_cayley(free), rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("k", [1, 2, 5], ids=lambda k: f"k={k}")
def test_is_the_formula_of_the_paper_where_parameters_are_large(k: int, size: float) -> None:
    """Large but harmless: nearly orthogonal columns. A formula that rounds "1 + x - x" loses the one."""
    eye = torch.eye(k, dtype=torch.float64)
    free = size * torch.cat([eye, eye])
    z = size**2  # Z = z I
    expected = torch.cat([(1 - z) / (1 + z) * eye, -2 * size / (1 + z) * eye])
    torch.testing.assert_close(tall_cayley(free), expected, rtol=slack(free), atol=slack(free))


@every_dtype
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e9, 1e12])
def test_symmetric_top_block_drops_out(size: float, dtype: torch.dtype) -> None:
    """Only X - X^T enters, so a symmetric X without Y gives [I; 0] however large it is."""
    x = torch.randn(4, 4, dtype=dtype)
    columns = tall_cayley(torch.cat([size * (x + x.mT), torch.zeros(3, 4, dtype=dtype)]))
    expected = torch.cat([torch.eye(4, dtype=dtype), torch.zeros(3, 4, dtype=dtype)])
    torch.testing.assert_close(columns, expected, rtol=0, atol=slack(columns))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (4, 4), (7, 3), (2, 6, 3)], ids=str)
def test_gradient(shape: tuple[int, ...]) -> None:
    free = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tall_cayley, (free,))


def test_batch_axes_are_independent() -> None:
    free = torch.randn(2, 3, 9, 4, dtype=torch.float64)
    one_by_one = torch.stack([tall_cayley(matrix) for matrix in free.flatten(0, 1)]).reshape(free.shape)
    torch.testing.assert_close(tall_cayley(free), one_by_one, rtol=0, atol=slack(free))


@every_dtype
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6, 1e12])
def test_zero_rows_stay_exactly_zero(size: float, dtype: torch.dtype) -> None:
    """What the zero start of the joint parametrization rests on."""
    free = size * torch.randn(12, 4, dtype=dtype)
    free[[4, 7, 11]] = 0
    columns = tall_cayley(free)
    assert (columns[[4, 7, 11]] == 0).all()
    assert (columns[[5, 6, 8, 9, 10]] != 0).any()


# --- at any size ---

EXPONENTS = st.floats(-8, 12, allow_nan=False)


@st.composite
def free_matrices(draw: st.DrawFn) -> Tensor:
    """Free matrices of every scale: mixed columns, mixed blocks, columns from independent to identical."""
    k = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16]))
    p = k + draw(st.sampled_from([0, 1, 5, 40, 300]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    apart = draw(st.sampled_from([0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1.0, float("inf")]))
    rows, noise = (torch.randn(p, c, generator=generator, dtype=torch.float64) for c in (1, k))
    free = noise if apart == float("inf") else rows + apart * noise
    if draw(st.booleans()):
        free = free.sign()  # what the first steps of Adam make
    if draw(st.booleans()):
        free[:k] = free[:k].triu(1)  # X - X^T as large as it can be: odd k has a null direction
    blocks = draw(st.tuples(EXPONENTS, EXPONENTS)) if draw(st.booleans()) else (draw(EXPONENTS),) * 2
    free = torch.cat([free[:k] * 10 ** blocks[0], free[k:] * 10 ** blocks[1]])
    if draw(st.booleans()):
        exponents = draw(st.lists(st.floats(-8, 0), min_size=k, max_size=k))
        free = free * 10 ** torch.tensor(exponents, dtype=torch.float64)
    return free.to(dtype)


@given(free_matrices())
@example(torch.full((1, 1), 1e8))
@example(torch.full((12, 4), 1e12))
@example(torch.cat([1e8 * torch.ones(3, 3).triu(1), torch.zeros(2, 3)]))
@example(torch.cat([1e12 * torch.ones(5, 5).triu(1), torch.ones(2, 5)]))
@settings(max_examples=300, deadline=None)
def test_columns_are_never_too_long(free: Tensor) -> None:
    columns = tall_cayley(free)
    assert columns.isfinite().all()
    assert excess_length(columns) <= slack(columns)


@every_dtype
@pytest.mark.parametrize("size", [1e4, 1e8, 1e12, 1e18, 1e25])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_large_skew_part_stays_finite(k: int, size: float, dtype: torch.dtype) -> None:
    """For odd k, X - X^T has a null direction in which the identity is all there is; beyond 1/eps it is
    rounded away. Gradients must survive too, or one step would end the training."""
    x = torch.ones(k, k, dtype=dtype).triu(1)
    free = torch.cat([size * x, torch.zeros(2, k, dtype=dtype)]).requires_grad_()
    columns = tall_cayley(free)
    columns.sum().backward()
    assert columns.isfinite().all()
    assert excess_length(columns.detach()) <= slack(columns)
    assert free.grad is not None
    assert free.grad.isfinite().all()


@every_dtype
@pytest.mark.parametrize("apart", [0.0, 1e-7, 1e-4, 1e-2])
@pytest.mark.parametrize("size", [1.0, 1e1, 1e2, 1e3, 1e4, 1e8, 1e12])
def test_nearly_parallel_columns_are_never_too_long(size: float, apart: float, dtype: torch.dtype) -> None:
    free = size * (torch.randn(50, 40, 1, dtype=dtype) + apart * torch.randn(50, 40, 8, dtype=dtype))
    free.requires_grad_()
    columns = tall_cayley(free)
    columns.sum().backward()
    assert columns.isfinite().all()
    assert excess_length(columns.detach()) <= slack(columns)
    assert free.grad is not None
    assert free.grad.isfinite().all()


@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-4])
def test_textbook_formula_fails_on_nearly_parallel_columns(apart: float) -> None:
    """Why the guards are there: of 1,000 draws the worst is 100 times too long, or infinite."""
    free = 1e3 * (torch.randn(1000, 40, 1) + apart * torch.randn(1000, 40, 8))
    assert excess_length(textbook_cayley(free)) > 100
    assert excess_length(tall_cayley(free)) <= slack(free)


# --- the way back ---


def awkward_frames() -> dict[str, Tensor]:
    """Frames for which I + Q1 is singular, or any choice of signs is tight."""
    eye = torch.eye(6, dtype=torch.float64)
    normal = torch.nn.functional.normalize(torch.ones(6, dtype=torch.float64), dim=0)
    quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    return {
        "identity": eye,
        "minus identity": -eye,
        "cyclic permutation": eye.roll(1, 0),
        "swaps": eye.flip(0),
        "reflection": eye - 2 * normal[:, None] * normal,
        "minus reflection": 2 * normal[:, None] * normal - eye,
        "quarter turns": torch.block_diag(quarter_turn, quarter_turn, quarter_turn),
        "nothing in the top block": torch.cat([0 * eye, eye]),
        "minus identity on top": torch.cat([-eye, 0 * eye]),
    }


@every_dtype
@every_shape
def test_inverse_round_trip(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *batch, p, k = shape
    columns = random_frame(p, k, batch_shape=tuple(batch), dtype=dtype)
    free, signs = inverse_tall_cayley(columns)
    assert free.shape == columns.shape
    assert signs.shape == (*batch, k)
    assert (signs.abs() == 1).all()
    error = tall_cayley(free) - columns * signs[..., None, :]
    assert error.abs().max() <= slack(columns)


@pytest.mark.parametrize("name", awkward_frames())
def test_inverse_round_trip_of_awkward_frames(name: str) -> None:
    columns = awkward_frames()[name]
    free, signs = inverse_tall_cayley(columns)
    error = tall_cayley(free) - columns * signs[..., None, :]
    assert error.abs().max() <= slack(columns)


def pivots(matrix: Tensor) -> Tensor:
    """Pivots (..., k) of Gaussian elimination without exchanges."""
    rest, found = matrix.clone(), []
    while rest.shape[-1]:
        found.append(rest[..., 0, 0])
        outer = rest[..., 1:, :1] * rest[..., :1, 1:] / rest[..., :1, :1]
        rest = rest[..., 1:, 1:] - outer
    return torch.stack(found, dim=-1)


@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 2), (3, 3), (8, 8), (9, 8), (30, 5), (64, 64), (128, 64)], ids=str
)
def test_inverse_is_well_conditioned(shape: tuple[int, int]) -> None:
    """Pivots of I + Q1 of at least 1 are the reason that the inverse exists. The condition number was
    measured below 2 for tall frames and below 2 k for square ones; 4 k leaves a factor of two."""
    p, k = shape
    columns = random_frame(p, k, batch_shape=(200,), dtype=torch.float64)
    _, signs = inverse_tall_cayley(columns)
    shifted = torch.eye(k, dtype=torch.float64) + (columns * signs[..., None, :])[..., :k, :]
    assert (pivots(shifted).abs() >= 1 - slack(columns)).all()
    assert (torch.linalg.cond(shifted) <= (1 + slack(columns) if k == 1 else 4 * k)).all()


@pytest.mark.parametrize("name", awkward_frames())
def test_inverse_of_awkward_frames_is_well_conditioned(name: str) -> None:
    columns = awkward_frames()[name]
    k = columns.shape[-1]
    _, signs = inverse_tall_cayley(columns)
    shifted = torch.eye(k, dtype=torch.float64) + (columns * signs)[:k]
    assert (pivots(shifted).abs() >= 1 - slack(columns)).all()
    assert torch.linalg.cond(shifted) <= 4 * k


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (30, 5), (3, 7, 2)], ids=str)
def test_inverse_recovers_free_matrices(shape: tuple[int, ...]) -> None:
    """Near X = Y = 0 no sign flips, and what the transform sees of X and Y (X - X^T and Y) comes back."""
    free = free_matrix(shape, size=0.1)
    k = shape[-1]
    back, signs = inverse_tall_cayley(tall_cayley(free))
    assert (signs == 1).all()
    x, x_back = free[..., :k, :], back[..., :k, :]
    torch.testing.assert_close(x_back - x_back.mT, x - x.mT, rtol=0, atol=slack(free))
    torch.testing.assert_close(back[..., k:, :], free[..., k:, :], rtol=0, atol=slack(free))


# --- random frames ---


@every_dtype
@every_shape
def test_random_frames_are_orthonormal(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *batch, p, k = shape
    frame = random_frame(p, k, batch_shape=tuple(batch), dtype=dtype)
    assert frame.shape == shape
    assert frame.dtype == dtype
    assert (frame.mT @ frame - eye_like(frame)).abs().max() <= slack(frame)


def test_random_frames_follow_their_generator() -> None:
    def draw(seed: int) -> Tensor:
        return random_frame(9, 4, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    assert torch.equal(torch.get_rng_state(), state)  # a generator leaves the global state alone


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (6, 3)], ids=str)
def test_random_frames_are_unbiased(shape: tuple[int, int]) -> None:
    """Entries of uniform frames have mean 0 and mean square 1/p. Signs straight from a QR have neither
    property of the first column: its entries all lean one way."""
    count, (p, k) = 20_000, shape
    frames = random_frame(p, k, batch_shape=(count,), dtype=torch.float64)
    five_sigmas = 5 / count**0.5  # no entry is beyond 1, so neither is a standard deviation
    assert frames.mean(0).abs().max() <= five_sigmas
    assert (frames.square().mean(0) - 1 / p).abs().max() <= five_sigmas


# --- refusals ---


@pytest.mark.parametrize("function", [tall_cayley, inverse_tall_cayley])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (4,)], ids=str)
def test_wide_matrices_are_refused(function: object, shape: tuple[int, ...]) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=r"must be tall, \(..., p, k\) with p >= k, got .*shape=\(.*4"):
        function(torch.zeros(shape))


@pytest.mark.parametrize("function", [tall_cayley, inverse_tall_cayley])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.complex64], ids=str)
def test_other_dtypes_are_refused(function: object, dtype: torch.dtype) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=rf"must be float32 or float64, got .*dtype={dtype}"):
        function(torch.zeros(4, 2, dtype=dtype))


# --- the gradient that is written out, and several shapes at once ---


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (9, 3), (2, 7, 4)], ids=str)
@pytest.mark.parametrize("size", [1e-2, 1.0, 5.0])
def test_gradients_of_first_and_second_order(shape: tuple[int, ...], size: float) -> None:
    free = free_matrix(shape, size=size).requires_grad_()
    assert torch.autograd.gradcheck(tall_cayley, (free,))
    assert torch.autograd.gradgradcheck(tall_cayley, (free,))


@every_dtype
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e2, 1e4])
def test_the_gradient_is_that_of_the_operations(size: float, dtype: torch.dtype) -> None:
    free = free_matrix((3, 40, 6), size=size, dtype=dtype).requires_grad_()
    reached = torch.randn(free.shape, dtype=dtype)
    (written,) = torch.autograd.grad(tall_cayley(free), free, reached)
    rows, _, _ = cayley._transform([1], [free.mT])
    (expected,) = torch.autograd.grad(rows[0].mT, free, reached)
    scale = expected.abs().max()
    torch.testing.assert_close(written / scale, expected / scale, rtol=0, atol=slack(free) * 10)


def test_batches_of_several_shapes_are_each_alone() -> None:
    shapes = [((2, 4, 9),), ((1, 4, 4), (1, 4, 7)), ((5, 4, 6), (5, 4, 3), (5, 4, 8))]
    batches = [[torch.randn(shape, dtype=torch.float64) for shape in pieces] for pieces in shapes]
    flat = [piece.requires_grad_() for pieces in batches for piece in pieces]
    together = tall_cayleys(batches)
    alone = [tall_cayley(torch.cat(pieces, dim=-1).mT).mT for pieces in batches]
    for pieces, expected in zip(together, alone):
        torch.testing.assert_close(torch.cat(pieces, dim=-1), expected)
    loss = sum(
        (i + 1) * torch.cat(pieces, dim=-1).sum(-1).square().sum() for i, pieces in enumerate(together)
    )
    other = sum((i + 1) * one.sum(-1).square().sum() for i, one in enumerate(alone))
    for got, want in zip(torch.autograd.grad(loss, flat), torch.autograd.grad(other, flat)):
        torch.testing.assert_close(got, want)


def test_one_matrix_of_a_batch_cannot_spoil_the_others() -> None:
    good = torch.randn(1, 3, 8)
    bad = torch.full((1, 3, 8), torch.nan)
    ((rows,), (spoiled,)) = tall_cayleys([[good], [bad]])
    torch.testing.assert_close(rows, tall_cayley(good.mT).mT)
    assert spoiled.isnan().all()
