"""Limits of the spectral norm of base weights: they hold, are tight, and cost few passes over the weight."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import TwoLayers
from nblora import NBLoraConfig, certify, spectral
from nblora.spectral import spectral_norm, spectral_norm_interval
from nblora.tuner import layer as layer_module
from nblora.tuner import nblora_layers


def with_spectrum(m: int, n: int, spectrum: Tensor) -> Tensor:
    """A random float32 matrix with these leading singular values and zeros after them."""
    k = len(spectrum)
    u, v = (torch.linalg.qr(torch.randn(size, k, dtype=torch.float64)).Q for size in (m, n))
    return (u * spectrum.double() @ v.mT).float()


def one_entry(m: int, n: int) -> Tensor:
    matrix = torch.zeros(m, n)
    matrix[3, 7] = -2.5
    return matrix


def few_rows(m: int, n: int) -> Tensor:
    matrix = torch.zeros(m, n)
    matrix[:2] = torch.randn(2, n)
    return matrix


def power(m: int, n: int, exponent: float) -> Tensor:
    """Singular values that decay as in trained weights."""
    return with_spectrum(m, n, torch.arange(1.0, min(m, n) + 1) ** -exponent)


def exact_norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix.double(), 2)


# the smallest side decides between an exact and an iterative computation
SMALL, LARGE = (40, 70), (300, 420)
assert min(SMALL) <= spectral._EXACT_SIDE < min(LARGE)

# with a gap below the largest singular value, so that the limits are within 1e-3 of each other
APART: dict[str, Callable[[int, int], Tensor]] = {
    "positive": torch.rand,
    "integer, not centred": lambda m, n: torch.randint(-3, 9, (m, n)),
    "rank one": lambda m, n: with_spectrum(m, n, torch.tensor([3.0])),
    "rank two, equal": lambda m, n: with_spectrum(m, n, torch.tensor([3.0, 3.0])),
    "rank two, close": lambda m, n: with_spectrum(m, n, torch.tensor([3.0, 2.99])),
    "decaying": lambda m, n: power(m, n, 1.0),
    "decaying slowly": lambda m, n: power(m, n, 0.25),
    "rows of all sizes": lambda m, n: torch.randn(m, n) * torch.randn(m, 1).exp(),
    "outliers": lambda m, n: (
        torch.randn(m, n) + with_spectrum(m, n, torch.tensor([150.0, 130.0, 130.0, 100.0]))
    ),
    "one far above": lambda m, n: with_spectrum(m, n, torch.tensor([1e4] + [1.0] * (min(m, n) - 1))),
    "one entry": one_entry,
    "constant": torch.ones,
    "constant, float16": lambda m, n: torch.full((m, n), 0.1, dtype=torch.float16),
}
# without one; they may end within 1e-2 only
GAPLESS: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": torch.randn,
    "tall gaussian": lambda m, n: torch.randn(n, m),
    "bfloat16": lambda m, n: torch.randn(m, n, dtype=torch.bfloat16),
    "float16": lambda m, n: 1e3 * torch.randn(m, n, dtype=torch.float16),
    "float64": lambda m, n: torch.randn(m, n, dtype=torch.float64),
    "integer": lambda m, n: torch.randint(-3, 4, (m, n)),
    "transposed view": lambda m, n: torch.randn(n, m).mT,
    "strided view": lambda m, n: torch.randn(2 * m, 3 * n)[::2, ::3],
    "expanded view": lambda m, n: torch.randn(m, 1).expand(m, n),
    "orthogonal": lambda m, n: with_spectrum(m, n, torch.ones(min(m, n))),
    "close to orthogonal": lambda m, n: with_spectrum(m, n, torch.linspace(1, 0.999, min(m, n))),
    "evenly spaced": lambda m, n: with_spectrum(m, n, torch.linspace(1, 0, min(m, n))),
    "small gap": lambda m, n: with_spectrum(m, n, 1 - 1e-4 * torch.arange(min(m, n))),
    "identity": torch.eye,
    "few rows": few_rows,
    "few columns": lambda m, n: few_rows(n, m).mT,
}
MATRICES = APART | GAPLESS


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("kind", MATRICES)
def test_limits_hold_and_are_tight(kind: str, shape: tuple[int, int]) -> None:
    matrix = MATRICES[kind](*shape)
    lower, upper = spectral_norm_interval(matrix)
    exact = exact_norm(matrix)
    for limit in (lower, upper):
        assert limit.shape == ()
        assert limit.dtype == torch.float64
        assert limit.device.type == "cpu"
    assert lower <= exact <= upper
    assert upper <= lower * (1 + (1e-12 if shape == SMALL else 1e-3 if kind in APART else 1e-2))
    assert torch.equal(spectral_norm(matrix), upper)


@pytest.mark.parametrize("shape", [(257, 257), (257, 900), (900, 260)], ids=str)
def test_limits_hold_for_many_matrices(shape: tuple[int, int]) -> None:
    """Random spectra of all kinds."""
    q_left, q_right = (torch.linalg.qr(torch.randn(size, 257)).Q for size in shape)
    for _ in range(60):
        spectrum = torch.rand(257) ** torch.rand(1).mul(8).exp()
        spectrum[torch.randint(0, 257, (3,))] = 1 + 0.1 * torch.rand(3) * torch.rand(1) ** 8
        signs = torch.randn(257, 1).sign() * torch.randn(257, 257).mul(0.01).matrix_exp()
        matrix = q_left * spectrum @ signs @ q_right.mT
        lower, upper = spectral_norm_interval(matrix)
        assert lower <= exact_norm(matrix) <= upper <= lower * 1.01


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "decaying slowly", "rank one"])
def test_float64_is_as_exact_as_its_entries(kind: str) -> None:
    matrix = MATRICES[kind](*LARGE).double() + 1e-9 * torch.randn(LARGE, dtype=torch.float64)
    lower, upper = spectral_norm_interval(matrix)
    assert lower <= exact_norm(matrix) <= upper
    if kind in APART:
        matrix = matrix / upper * (1 - 1e-9)
        assert spectral_norm(matrix) < 1.0001


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e-11, 1e-9, 1e9, 1e11, 1e20, 1e30, 1e37])
def test_any_scale(size: float, shape: tuple[int, int]) -> None:
    """Squares of such entries are zero or infinite in float32. Zero or NaN would be a wrong bound."""
    matrix = size * torch.randn(shape)
    lower, upper = spectral_norm_interval(matrix)
    assert lower <= exact_norm(matrix) <= upper <= 1.01 * lower


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("size", [1e-320, 1e-300, 1e-160, 1e160, 1e300])
def test_any_scale_in_float64(size: float, shape: tuple[int, int]) -> None:
    matrix = size * torch.randn(shape, dtype=torch.float64)
    exact = (matrix / size).norm(2) if size < 1e-310 else exact_norm(matrix / size)
    lower, upper = spectral_norm_interval(matrix)
    if size > 1e-310:  # otherwise the entries have few digits
        assert lower / size <= exact * (1 + 1e-12)
        assert upper / size >= exact * (1 - 1e-12)
    assert 0 < lower <= upper <= 1.01 * lower


@pytest.mark.parametrize("shape", [SMALL, LARGE, (0, 5), (5, 0)], ids=str)
def test_zero(shape: tuple[int, int]) -> None:
    assert [limit.item() for limit in spectral_norm_interval(torch.zeros(shape))] == [0, 0]


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_batches_are_the_same_as_one_by_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(2, 3, *shape)
    matrices[0, 1] *= 100
    lower, upper = spectral_norm_interval(matrices)
    assert lower.shape == upper.shape == (2, 3)
    for i, j in ((0, 0), (0, 1), (1, 2)):
        assert (lower[i, j], upper[i, j]) == spectral_norm_interval(matrices[i, j])
    assert torch.equal(spectral_norm(matrices), upper)
    assert spectral_norm(matrices[:, :0]).shape == (2, 0)
    assert spectral_norm(matrices[..., :0]).tolist() == [[0] * 3] * 2


def test_parameters() -> None:
    """A base weight that trains: the result is a plain number, not part of a graph."""
    norm = spectral_norm(torch.nn.Parameter(2 * torch.eye(3)))
    assert not norm.requires_grad
    assert norm.item() == pytest.approx(2)
    assert spectral_norm(torch.nn.Parameter(2 * torch.eye(*LARGE))).item() == pytest.approx(2, rel=1e-2)


def test_reproducible_and_the_random_state_is_left_alone() -> None:
    matrix = torch.randn(LARGE)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = spectral_norm(matrix)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(spectral_norm(matrix), first)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_not_finite_is_refused(value: float, shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.zeros(shape, dtype=dtype)
    matrix[-1, -1] = value
    with pytest.raises(ValueError, match="needs finite entries, got NaN or infinity"):
        spectral_norm(matrix)


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(\.\.\., m, n\), got shape \("):
        spectral_norm(torch.zeros(shape))


# --- Note [An upper limit from a random start] ---


@pytest.mark.parametrize("n", [2, 257, 4096, 100_000])
def test_a_random_start_has_the_least_weight(n: int) -> None:
    """The probability of less is at most, and about, what it is said to be."""
    a, rest = spectral._VECTORS / 2, spectral._VECTORS * (n - 1) / 2
    probability = scipy.stats.beta.cdf(spectral._least_weight(n) ** 2, a, rest)
    assert 0.99 * spectral._FAILURE < probability <= spectral._FAILURE * (1 + 1e-6)


def recurrence(
    spectrum: Tensor, weight: float, steps: int, hiding: float
) -> tuple[list[float], list[float], list[Tensor]]:
    """Lanczos for diag(spectrum) from a start with a given weight on the first entry, the largest.

    Every product is wrong by `hiding` along that entry, so that less of it is seen.
    """
    start = torch.randn(len(spectrum), dtype=torch.float64)
    start[0] = 0
    now = math.sqrt(1 - weight**2) * start / start.norm()
    now[0] = weight
    before, beta = torch.zeros_like(now), 0.0
    diagonal, neighbours, vectors = [], [], [now]
    for _ in range(steps):
        after = spectrum * now
        alpha = float(now @ after)
        after = after - alpha * now - beta * before
        after[0] -= hiding * after[0].sign()
        beta = float(after.norm())
        before, now = now, after / beta
        diagonal.append(alpha)
        neighbours.append(beta)
        vectors.append(now)
    return diagonal, neighbours, vectors


SPECTRA = {
    "gapless": torch.linspace(1, 0, 400, dtype=torch.float64),
    "far above": torch.cat([torch.ones(1), 0.01 * torch.rand(399)]).double(),
    "slightly above": torch.cat([torch.ones(1), 0.97 * torch.rand(399)]).double(),
    "almost double": torch.cat([torch.tensor([1, 1 - 1e-7]), 0.5 * torch.rand(398)]).double(),
    "decaying": torch.arange(1, 401).double() ** -1,
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("weight", [1e-2, 1e-3, 3e-4])
def test_the_upper_limit_holds_for_the_unluckiest_start(kind: str, weight: float) -> None:
    """A start with the least weight that is assumed, and rounding that conspires against it."""
    eps = torch.finfo(torch.float32).eps
    for hiding in (0.0, spectral._ROUNDING * eps):
        for steps in (1, 2, 3, 6, 12, 24, 48):
            diagonal, neighbours, _ = recurrence(SPECTRA[kind], weight, steps, hiding)
            lower = spectral._largest_ritz_value(diagonal, neighbours, eps)
            assert hiding or lower <= 1 + 1e-12
            assert spectral._upper_limit(diagonal, neighbours, lower, weight * (1 - 1e-6), eps) >= 1


@pytest.mark.parametrize("kind", SPECTRA)
def test_the_upper_limit_fails_for_a_start_with_less_weight(kind: str) -> None:
    """The test of the test above."""
    eps = torch.finfo(torch.float32).eps
    limits = []
    for steps in range(1, 40):
        diagonal, neighbours, _ = recurrence(SPECTRA[kind], 3e-4, steps, 0.0)
        lower = spectral._largest_ritz_value(diagonal, neighbours, eps)
        limits.append(spectral._upper_limit(diagonal, neighbours, lower, 30 * 3e-4, eps))
    assert min(limits) < 1


@pytest.mark.parametrize("kind", ["far above", "decaying"])
@pytest.mark.parametrize("hiding", [2e-6, 2e-5, 2e-4])
def test_the_upper_limit_takes_rounding_into_account(
    kind: str, hiding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    eps = torch.finfo(torch.float32).eps

    def lowest_limit() -> float:
        limits = []
        for steps in range(1, 40):
            diagonal, neighbours, _ = recurrence(SPECTRA[kind], 3e-4, steps, hiding)
            lower = spectral._largest_ritz_value(diagonal, neighbours, eps)
            limits.append(spectral._upper_limit(diagonal, neighbours, lower, 3e-4 * (1 - 1e-6), eps))
        return min(limits)

    monkeypatch.setattr(spectral, "_ROUNDING", hiding / eps)
    assert lowest_limit() >= 1
    monkeypatch.setattr(spectral, "_ROUNDING", 0.0)
    assert lowest_limit() < 1


@pytest.mark.parametrize("kind", MATRICES)
def test_rounding_is_as_small_as_assumed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """|f_j| <= φ with room to spare, along the leading right singular vector, measured in float64."""
    matrix = MATRICES[kind](*LARGE)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    matrix = matrix.to(dtype) if matrix.is_floating_point() else matrix.float()
    _, sigma, vh = torch.linalg.svd(matrix.double())
    seen: list[tuple[Tensor, Tensor]] = []
    apply_gram = spectral._apply_gram

    def spy(weight: Tensor, vectors: Tensor) -> Tensor:
        product = apply_gram(weight, vectors)
        seen.append((vectors, product))
        return product

    monkeypatch.setattr(spectral, "_apply_gram", spy)
    spectral_norm(matrix)
    assert seen
    if seen[0][0].shape[1] != matrix.shape[1]:  # the iteration ran on the transpose
        vh = torch.linalg.svd(matrix.mT.double()).Vh
    along = seen[0][0].double() @ vh[0]
    for vectors, product in seen:
        error = (product.double() - sigma[0] ** 2 * vectors.double()) @ vh[0] @ (along / along.norm())
        assert error.abs() <= spectral._ROUNDING / 2 * torch.finfo(product.dtype).eps * sigma[0] ** 2


# --- what it costs ---


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by an entry for every pass over a weight."""
    counted: list[None] = []
    apply_gram = spectral._apply_gram

    def counting(matrix: Tensor, vectors: Tensor) -> Tensor:
        counted.append(None)
        return apply_gram(matrix, vectors)

    monkeypatch.setattr(spectral, "_apply_gram", counting)
    return counted


@pytest.mark.parametrize(
    ("kind", "most"),
    [("decaying", 9), ("decaying slowly", 15), ("outliers", 9), ("gaussian", 45), ("orthogonal", 6)],
)
def test_few_passes(kind: str, most: int, passes: list[None]) -> None:
    spectral_norm(MATRICES[kind](*LARGE))
    assert 0 < len(passes) <= most


def test_any_matrix_takes_few_passes(passes: list[None]) -> None:
    for kind in MATRICES:
        before = len(passes)
        spectral_norm(MATRICES[kind](*LARGE))
        assert len(passes) - before <= 63, kind


class Sizes(TorchDispatchMode):
    """The number of elements of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        views = {"aten.split.Tensor", "aten.detach.default", "aten.transpose.int", "aten.view.default"}
        if isinstance(result, Tensor) and str(function) not in views | {"aten.select.int"}:
            self.made.append(result.numel() if result._base is None else 0)
        return result


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.mT, lambda x: x[None]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_is_not_copied(dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    matrix = view(torch.randn(1500, 700).to(dtype))
    with Sizes() as sizes:
        spectral_norm(matrix)
    assert sizes.made
    assert max(sizes.made) <= spectral._CHUNK * torch.get_num_threads() < matrix.numel() / 3


# --- precision ---


class Coarse(TorchFunctionMode):
    """Products of float32 in bfloat16, as tensor cores make them when they are allowed to."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.matmul, Tensor.__matmul__, Tensor.addmm_) and args[-1].dtype == torch.float32:
            args = (*args[:-2], *(arg.bfloat16().float() for arg in args[-2:]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["decaying", "gaussian", "constant"])
def test_limits_hold_where_products_are_less_precise_than_their_dtype(kind: str) -> None:
    matrix = MATRICES[kind](*LARGE) * 0.7123
    with Coarse():
        assert not torch.allclose(
            matrix @ matrix.mT, (matrix.double() @ matrix.double().mT).float(), rtol=1e-4
        )
        lower, upper = spectral_norm_interval(matrix)
    exact = exact_norm(matrix)  # which has rounding errors itself
    assert lower * (1 - 1e-12) <= exact <= upper * (1 + 1e-12) <= lower * 1.01


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_autocast_changes_nothing(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = spectral_norm(matrix)
    assert torch.equal(inside, spectral_norm(matrix))


def test_inference_tensors() -> None:
    with torch.inference_mode():
        matrix = torch.randn(LARGE)
    lower, upper = spectral_norm_interval(matrix)
    assert lower <= exact_norm(matrix) <= upper


def test_shards_are_gathered(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    matrix = torch.randn(LARGE)
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        sharded = distribute_tensor(matrix, init_device_mesh("cpu", (1,)), [Shard(0)])
        assert torch.equal(spectral_norm(torch.nn.Parameter(sharded)), spectral_norm(matrix))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MATRICES)
def test_on_a_gpu(kind: str) -> None:
    matrix = MATRICES[kind](*LARGE)
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        for torch.backends.cuda.matmul.allow_tf32 in (False, True):
            lower, upper = spectral_norm_interval(matrix.cuda())
            assert lower.device.type == upper.device.type == "cpu"
            exact = exact_norm(matrix)  # which has rounding errors itself
            assert lower * (1 - 1e-12) <= exact <= upper * (1 + 1e-12) <= lower * 1.01
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


# --- when it is measured ---


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights of which the adapter measures a spectral norm."""
    weights: list[Tensor] = []

    def spy(weight: Tensor) -> Tensor:
        weights.append(weight)
        return spectral_norm(weight)

    monkeypatch.setattr(layer_module, "spectral_norm", spy)
    return weights


def saved(folder: Path) -> PeftModel:
    model = get_peft_model(TwoLayers(), NBLoraConfig(r=3, target_modules=["first", "second"]))
    for layer in nblora_layers(model, "default").values():
        layer.nblora_radius["default"].weight.mul_(0.5)  # not what would be measured
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("low_memory", [False, True])
def test_loading_an_adapter_measures_nothing(
    low_memory: bool, measured: list[Tensor], tmp_path: Path
) -> None:
    before = saved(tmp_path)
    assert len(measured) == 2
    base = TwoLayers()
    base.load_state_dict(before.get_base_model().state_dict(), strict=False)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_memory)
    for layer in nblora_layers(loaded, "default").values():
        assert not layer._unmeasured
    assert len(measured) == 2
    for name in ("default", "other"):
        radii = [layer.radius(name) for layer in nblora_layers(loaded, name).values()]
        expected = [layer.radius("default") for layer in nblora_layers(before, "default").values()]
        assert radii == expected
    assert certify(loaded).holds
    assert len(measured) == 2


USES: dict[str, Callable[[PeftModel], object]] = {
    "forward": lambda model: model(torch.ones(2, 12)),
    "certify": certify,
    "state_dict": lambda model: model.state_dict(),
    "merge": lambda model: model.merge_adapter(),
    "copy": lambda model: copy.deepcopy(model)(torch.ones(2, 12)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model))(torch.ones(2, 12)),
    "radius": lambda model: [layer.radius("default") for layer in nblora_layers(model, "default").values()],
}


@pytest.mark.parametrize("use", USES)
def test_the_configuration_of_a_saved_adapter_also_starts_a_new_one(
    use: str, measured: list[Tensor], tmp_path: Path
) -> None:
    saved(tmp_path)
    measured.clear()
    config = NBLoraConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(TwoLayers(), config)
    USES[use](model)
    assert len(measured) == 2
    for layer in nblora_layers(model, "default").values():
        expected = 0.3 * torch.linalg.matrix_norm(layer.get_base_weight(), 2)
        torch.testing.assert_close(layer.radius("default"), expected)


def test_interrupted_measuring_is_taken_up_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved(tmp_path)
    model = get_peft_model(TwoLayers(), NBLoraConfig.from_pretrained(tmp_path))

    def interrupted(weight: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer_module, "spectral_norm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(2, 12))
    assert model(torch.ones(2, 12)).isfinite().all()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_transforms_of_what_is_not_measured_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    model = get_peft_model(TwoLayers(), NBLoraConfig.from_pretrained(tmp_path))
    with pytest.raises(RuntimeError, match="must have measured its bounds before it is compiled"):
        torch.func.vmap(model)(torch.ones(2, 3, 12))
