"""Matrix completion as a scikit-learn estimator: its contract, what it takes, what it refuses.

What it computes is the business of test_completion.py.
"""

from __future__ import annotations

import contextlib
import doctest
import functools
import math
import pickle
import re
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import sklearn
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV, KFold, ShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nblora.completion.estimator
from completion_samples import Sample, rms, sample
from nblora.completion import NBMatrixCompletion, observations

NAMES = ["a", "b", "c", "d", "e", "f", "g", "h", "i"]
NO_ENTRY = "have no observed entry"


def estimator(**choices: Any) -> NBMatrixCompletion:
    """One that is fitted in a moment: a given bound, nothing selected, few iterations."""
    return NBMatrixCompletion(
        **({"rank": 3, "bound": 20.0, "rank_selection": None, "max_iter": 30} | choices)
    )


@functools.cache
def data() -> Sample:
    return sample(12, 9, 2, rate=0.7, effects=1.0)


@functools.cache
def fitted() -> NBMatrixCompletion:
    """Tests that share it must not change it."""
    return estimator().fit(data().X)


def frame() -> pd.DataFrame:
    return pd.DataFrame(data().X, columns=NAMES, index=[f"row {i}" for i in range(12)])


def everywhere(model: NBMatrixCompletion) -> np.ndarray:
    """The completed matrix of the last fit, by coordinates."""
    m, n = len(model.row_factors_), model.n_features_in_
    rows, columns = np.divmod(np.arange(m * n), n)
    return model.predict(rows, columns).reshape(m, n)


# --- scikit-learn's own contract ---


ONE_DIMENSIONAL = "wants predict(X) of sparse X to be (rows,), as of a regressor; here it completes the rows"


@pytest.mark.filterwarnings(f"ignore:.*{NO_ENTRY}:UserWarning")  # scikit-learn's sparse samples
@parametrize_with_checks(
    [NBMatrixCompletion()],
    expected_failed_checks=lambda _: {
        "check_estimator_sparse_array": ONE_DIMENSIONAL,
        "check_estimator_sparse_matrix": ONE_DIMENSIONAL,
    },
)
def test_contract_of_scikit_learn(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


def test_example_in_the_docstring() -> None:
    results = doctest.testmod(nblora.completion.estimator)
    assert results.attempted >= 5
    assert results.failed == 0


def test_clone_and_parameters() -> None:
    model = estimator(norm=3.5, cv=KFold(3), missing_values=-1.0).fit(
        np.where(data().missing, -1.0, data().X)
    )
    copy = clone(model)
    assert not hasattr(copy, "components_")
    assert str(copy.get_params()) == str(model.get_params())
    assert clone(estimator(missing_values=math.nan))  # NaN is not equal to itself
    assert "rank=3" in repr(model)


def test_pickle_predicts_the_same() -> None:
    model = NBMatrixCompletion(rank=4, random_state=0).fit(data().X)
    model.on_progress = lambda stage, loss: None  # cannot be pickled
    model.transform(data().X[:2])
    loaded = pickle.loads(pickle.dumps(model))
    new = np.where(np.arange(9) % 2, data().truth, np.nan)
    np.testing.assert_array_equal(loaded.transform(new), model.transform(new))
    np.testing.assert_array_equal(loaded.transform(data().X), model.transform(data().X))
    places = [0, 5, 11], [8, 3, 0]
    np.testing.assert_array_equal(loaded.predict(*places), model.predict(*places))
    np.testing.assert_array_equal(
        loaded.predict_interval(*places, coverage=0.5), model.predict_interval(*places, coverage=0.5)
    )
    assert loaded.certificate_ == model.certificate_
    loaded.partial_fit(data().truth)
    model.partial_fit(data().truth)
    np.testing.assert_array_equal(everywhere(loaded), everywhere(model))


@pytest.mark.parametrize("use", [lambda e: e.transform(data().X), lambda e: e.predict([0], [0])])
@pytest.mark.parametrize("before", [estimator(), clone(estimator())])
def test_not_fitted(before: NBMatrixCompletion, use: Callable[[Any], Any]) -> None:
    with pytest.raises(NotFittedError):
        use(before)
    with pytest.raises(NotFittedError):
        before.predict_interval([0], [0])
    with pytest.raises(NotFittedError):
        before.score(data().X)


def test_names_of_columns() -> None:
    model = estimator().fit(frame())
    assert list(model.feature_names_in_) == NAMES
    assert list(model.get_feature_names_out()) == NAMES
    assert model.n_features_in_ == 9
    with pytest.raises(ValueError, match="feature names should match"):
        model.transform(frame().rename(columns={"a": "z"}))
    with pytest.raises(ValueError, match="feature names should match"):
        model.transform(frame()[NAMES[::-1]])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        model.transform(data().X)
    rows, columns, values = data().coordinates()
    assert not hasattr(model.fit_coo(rows, columns, values, (12, 9)), "feature_names_in_")
    model.transform(data().X)  # without a warning


def test_output_as_data_frame() -> None:
    model = estimator().set_output(transform="pandas")
    for completed in (model.fit_transform(frame()), model.transform(frame())):
        assert isinstance(completed, pd.DataFrame)
        assert list(completed.columns) == NAMES
        assert list(completed.index) == list(frame().index)
        np.testing.assert_allclose(completed.to_numpy(), estimator().fit_transform(data().X), rtol=1e-12)


@pytest.mark.skipif(sklearn.__version__ < "1.4", reason="metadata only from then on")
def test_pipelines() -> None:
    """As a step, between scaling and a regression, with labels that are no truth about X."""
    given = sample(60, 9, 2, rate=0.7, noise=0.01)
    label = given.truth @ np.arange(9.0)
    pipeline = make_pipeline(StandardScaler(), estimator(bound=60.0), LinearRegression())
    pipeline.fit(given.X[:40], label[:40])
    assert pipeline.score(given.X[40:], label[40:]) > 0.9  # of rows that completion has not seen
    completing = make_pipeline(StandardScaler(), estimator(bound=60.0)).fit(given.X, label)
    assert completing.score(given.X, label) < 0
    assert completing.predict(given.X[:3]).shape == (3, 9)


def test_grid_search_over_rows() -> None:
    given = sample(80, 20, 2, rate=0.6, noise=0.1)
    grid = {"rank": [1, 2], "bound": [1.0, 400.0]}
    search = GridSearchCV(estimator(bias=None), grid, cv=3).fit(given.X)
    assert search.best_params_ == {"rank": 2, "bound": 400.0}
    assert -0.3 < search.best_score_ < 0
    with_truth = GridSearchCV(estimator(bias=None), grid, cv=3).fit(given.X, given.truth)
    assert with_truth.best_params_ == {"rank": 2, "bound": 400.0}
    sparse = GridSearchCV(estimator(bias=None), grid, cv=3).fit(given.sparse())
    np.testing.assert_allclose(
        sparse.cv_results_["mean_test_score"], search.cv_results_["mean_test_score"], rtol=1e-6
    )
    scores = cross_val_score(
        estimator(bias=None, bound=400.0, rank=2), given.X, cv=ShuffleSplit(2, random_state=0)
    )
    assert (scores < 0).all()


# --- every kind of input ---

Given = Callable[[], Any]
KINDS: dict[str, Given] = {
    "list": lambda: data().X.tolist(),
    "objects": lambda: np.where(data().missing, None, data().X.astype(object)),
    "tensor": lambda: torch.tensor(data().X),
    "Fortran order": lambda: np.asfortranarray(data().X),
    "not contiguous": lambda: np.repeat(data().X, 2, axis=1)[:, ::2],
    "masked": lambda: np.ma.MaskedArray(np.nan_to_num(data().X, nan=7.0), mask=data().missing),
    "csr_array": lambda: data().sparse(),
    "csr_matrix": lambda: scipy.sparse.csr_matrix(data().sparse()),
    "csc": lambda: data().sparse().tocsc(),
    "coo": lambda: data().sparse().tocoo(),
    "lil": lambda: data().sparse().tolil(),
    "dok": lambda: data().sparse().todok(),
    "bsr of single entries": lambda: data().sparse().tobsr(blocksize=(1, 1)),
    "unsorted": lambda: shuffled_sparse(),
    "wide indices": lambda: with_wide_indices(),
    "frame": lambda: pd.DataFrame(data().X),
    "Float64 frame": lambda: pd.DataFrame(data().X).astype("Float64"),
    "arrow frame": lambda: pd.DataFrame(data().X).astype("double[pyarrow]"),
    "frame of objects with None": lambda: pd.DataFrame(data().X).astype(object).where(~data().missing, None),
    "frame of objects with NA": lambda: pd.DataFrame(data().X).astype(object).where(~data().missing, pd.NA),
    "sparse frame": lambda: pd.DataFrame(data().X).astype(pd.SparseDtype(float, np.nan)),
    "frame with a category": lambda: pd.DataFrame(data().X).astype({0: "category"}),
}


def shuffled_sparse() -> scipy.sparse.coo_array:
    rows, columns, values = data().coordinates()
    order = np.random.default_rng(0).permutation(len(rows))
    return scipy.sparse.coo_array((values[order], (rows[order], columns[order])), shape=(12, 9))


def with_wide_indices() -> scipy.sparse.csr_array:
    result = data().sparse()
    result.indices, result.indptr = result.indices.astype(np.int64), result.indptr.astype(np.int64)
    return result


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_input_gives_the_same(kind: str) -> None:
    model = estimator().fit(KINDS[kind]())
    np.testing.assert_allclose(everywhere(model), everywhere(fitted()), rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        model.transform(KINDS[kind]()), fitted().transform(data().X), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(model.predict(KINDS[kind]()), fitted().predict(data().X), rtol=0, atol=1e-6)
    assert model.score(KINDS[kind](), KINDS[kind]()) == pytest.approx(fitted().score(data().X, data().X))
    np.testing.assert_allclose(
        estimator().fit_transform(KINDS[kind]()), fitted().transform(data().X), rtol=0, atol=1e-6
    )
    assert model.partial_fit(KINDS[kind]()).rank_ == fitted().rank_


def test_coordinates_in_any_order_give_the_same() -> None:
    rows, columns, values = data().coordinates()
    order = np.random.default_rng(1).permutation(len(rows))
    expected = everywhere(estimator(max_iter=5).fit(data().X))
    for given in (
        (rows, columns, values),
        (rows[order], columns[order], values[order]),
        (rows[order].tolist(), columns[order].tolist(), values[order].tolist()),
        (rows.astype(float), columns.astype(np.uint8), values),
        (pd.Series(rows), pd.Series(columns), pd.Series(values)),
    ):
        for shape in (None, (np.int32(12), np.int64(9)), [12, 9]):
            model = estimator(max_iter=5).fit_coo(*given, shape)
            np.testing.assert_allclose(everywhere(model), expected, rtol=0, atol=1e-6)


def test_larger_shape_of_coordinates() -> None:
    rows, columns, values = data().coordinates()
    with pytest.warns(UserWarning, match=NO_ENTRY) as caught:
        model = estimator().fit_coo(rows, columns, values, (14, 10))
    assert [str(warning.message)[:36] for warning in caught] == [
        "2 rows have no observed entry and ar",
        "1 columns have no observed entry and",
    ]
    assert model.row_factors_.shape == (14, model.rank_)
    assert model.n_features_in_ == 10


@pytest.mark.parametrize("marker", [0, -1, -99.9])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_marker_for_missing_values(marker: float, dtype: type) -> None:
    """Also where the marker is rounded to the precision of X."""
    marked = np.where(data().missing, marker, data().X).astype(dtype)
    expected = everywhere(estimator().fit(np.where(data().missing, np.nan, marked.astype(np.float64))))
    for given in (marked, pd.DataFrame(marked), scipy.sparse.coo_array(marked), torch.tensor(marked)):
        model = estimator(missing_values=marker).fit(given)
        np.testing.assert_allclose(everywhere(model), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("marker", [math.nan, None, pd.NA, np.float32("nan")])
def test_markers_that_mean_nan(marker: Any) -> None:
    np.testing.assert_array_equal(
        everywhere(estimator(missing_values=marker).fit(data().X)), everywhere(fitted())
    )


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.float16])
def test_other_numbers(dtype: type) -> None:
    whole = np.round(np.abs(data().X))
    marked = np.where(data().missing, 100, whole).astype(dtype)
    model = estimator(missing_values=100).fit(marked)
    np.testing.assert_allclose(everywhere(model), everywhere(estimator().fit(whole)), rtol=0, atol=1e-6)


def test_stored_zeros_are_observed() -> None:
    whole = np.round(data().X)
    assert (whole == 0).sum() >= 3
    expected = everywhere(estimator().fit(whole))
    rows, columns = np.nonzero(~np.isnan(whole))
    values = whole[rows, columns]
    stored = scipy.sparse.coo_array((values, (rows, columns)), shape=whole.shape)
    for given in (stored, stored.tocsr(), stored.tocsc(), stored.tolil(), stored.todok()):
        np.testing.assert_allclose(everywhere(estimator().fit(given)), expected, rtol=0, atol=1e-6)
    # unless zero stands for missing
    dropped = stored.tocsr()
    dropped.eliminate_zeros()
    np.testing.assert_allclose(
        everywhere(estimator(missing_values=0).fit(stored)), everywhere(estimator().fit(dropped)), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["bsr", "dia"])
def test_formats_that_pad_are_not_misread(kind: str) -> None:
    """Where a stored zero may be padding: refused if there is one, and right if there is none."""
    given = data().sparse().asformat(kind) if kind == "dia" else data().sparse().tobsr(blocksize=(3, 3))
    with pytest.raises(ValueError, match=f'must tell an observed zero .* "{kind}"'):
        estimator().fit(given)
    full = scipy.sparse.csr_array(np.arange(1.0, 37).reshape(6, 6)).asformat(kind)
    np.testing.assert_array_equal(
        everywhere(estimator().fit(full)), everywhere(estimator().fit(np.arange(1.0, 37).reshape(6, 6)))
    )


@pytest.mark.parametrize("form", ["coordinates", "csr", "coo"])
def test_duplicates(form: str) -> None:
    rows, columns = np.array([0, 1, 1, 2, 0, 2]), np.array([1, 0, 0, 2, 1, 0])
    values = np.array([1.0, 2.0, 5.0, 3.0, 2.0, 4.0])

    def fit(**choices: Any) -> NBMatrixCompletion:
        model = estimator(bias=None, bound=100.0, **choices)
        if form == "coordinates":
            return model.fit_coo(rows, columns, values, (3, 3))
        if form == "coo":
            return model.fit(scipy.sparse.coo_array((values, (rows, columns)), shape=(3, 3)))
        order = np.argsort(rows, kind="stable")  # by hand, since conversions add up
        starts = np.searchsorted(rows[order], np.arange(4))
        return model.fit(scipy.sparse.csr_array((values[order], columns[order], starts), shape=(3, 3)))

    with pytest.raises(
        ValueError, match=r"each \(row, column\) must be given once, got .*\(0, 1\), \(1, 0\)"
    ):
        fit()
    mean = estimator(bias=None, bound=100.0).fit_coo([0, 1, 2, 2], [1, 0, 2, 0], [1.5, 3.5, 3.0, 4.0])
    np.testing.assert_allclose(everywhere(fit(duplicates="mean")), everywhere(mean), rtol=0, atol=1e-6)


def test_input_is_left_alone() -> None:
    dense, sparse = data().X.copy(), shuffled_sparse()
    values = sparse.data.copy()
    for part in (dense, sparse.data, *sparse.coords):
        part.flags.writeable = False
    model = estimator().fit(dense)
    completed = model.transform(dense)
    assert not np.shares_memory(completed, dense)
    estimator().fit(sparse).transform(sparse)
    np.testing.assert_array_equal(sparse.data, values)
    np.testing.assert_array_equal(dense, data().X)


# --- nothing dense ---


class Recorder(TorchDispatchMode):
    """Dense results with at least so many elements, and which operations give which precision."""

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit = limit
        self.large: list[str] = []
        self.dtypes: dict[torch.dtype, set[str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                if tensor.ndim:
                    self.dtypes.setdefault(tensor.dtype, set()).add(str(function))
                if tensor.layout == torch.strided and tensor.numel() >= self.limit:
                    self.large.append(f"{function} {tuple(tensor.shape)}")
        return result


M, N = 3000, 4000


def scattered(m: int = M, n: int = N, count: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries of a rank 1 matrix, few of them twice."""
    random = np.random.default_rng(0)
    rows, columns = random.integers(0, m, count), random.integers(0, n, count)
    places = np.unique(np.stack([rows, columns]), axis=1)
    return places[0], places[1], np.cos(places[0]) * np.sin(places[1]) + 1.0


SETTINGS = [{}, {"weighting": "popularity", "parametrization": "svd"}, {"norm": "spectral", "bias": None}]


@pytest.mark.filterwarnings(f"ignore:.*{NO_ENTRY}:UserWarning")
@pytest.mark.parametrize("choices", SETTINGS, ids=str)
@pytest.mark.parametrize("selected", [False, True])
def test_sparse_input_is_never_dense(choices: dict[str, Any], selected: bool) -> None:
    rows, columns, values = scattered()
    given = scipy.sparse.coo_array((values, (rows, columns)), shape=(M, N))
    model = estimator(max_iter=3, **choices)
    if selected:
        model.set_params(bound="auto", rank_selection="two-stage")
    thin = (M + N) * 20  # elements: a factor with room for all ranks and an oversampling
    assert thin < M * N / 50
    tracemalloc.start()  # what NumPy allocates
    try:
        with Recorder(thin) as recorder:
            model.fit(given)
            model.partial_fit(given)
        model.score(given, given)
        model.predict(rows, columns)
        model.transform(given.tocsr()[:2])
        assert tracemalloc.get_traced_memory()[1] < M * N * 8 / 4
    finally:
        tracemalloc.stop()
    assert recorder.large == []


def check_beyond_memory(size: int) -> None:
    rows, columns, values = scattered(size, size)
    model = estimator(rank=1, max_iter=2)
    with pytest.warns(UserWarning, match=NO_ENTRY):
        model.fit_coo(rows, columns, values, (size, size))
    assert model.certificate_.holds
    assert model.predict(rows[:5], columns[:5]).shape == (5,)
    given = scipy.sparse.coo_array((values, (rows, columns)), shape=(size, size))
    few = given.tocsr()[rows[:2]]
    assert model.transform(few).shape == (2, size)
    for use in (model.transform, model.predict, clone(model).fit_transform):
        with pytest.raises(MemoryError, match=rf"must fit into memory, got {size} x {size} entries"):
            use(given)


def test_matrix_that_could_not_be_allocated() -> None:
    check_beyond_memory(200_000)  # 320 GB


@pytest.mark.slow
def test_matrix_of_a_million_rows_and_columns() -> None:
    check_beyond_memory(1_000_000)  # 8 TB


def test_table_too_large_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is allocated or fitted."""
    model = estimator().fit(data().X)
    before = vars(model).copy()
    monkeypatch.setattr(observations, "free_memory", lambda: 12 * 9 * 8 - 1)
    for use in (model.transform, model.predict, model.fit_transform):
        with pytest.raises(
            MemoryError, match=r"must fit into memory, got 12 x 9 entries of .* GB where .* free"
        ):
            use(data().sparse())
    assert vars(model) == before
    assert model.transform(data().X[:11]).shape == (11, 9)
    monkeypatch.setattr(observations, "free_memory", lambda: None)  # a system that does not tell
    assert model.transform(data().sparse()).shape == (12, 9)


# --- completing ---


def test_observed_entries_are_kept_or_replaced() -> None:
    observed = ~data().missing
    kept = fitted().transform(data().X)
    np.testing.assert_array_equal(kept[observed], data().X[observed])
    replacing = estimator(keep_observed=False).fit(data().X)
    replaced = replacing.transform(data().X)
    np.testing.assert_array_equal(replaced, replacing.predict(data().X))
    np.testing.assert_array_equal(replaced[~observed], kept[~observed])
    assert (replaced[observed] != data().X[observed]).all()
    np.testing.assert_array_equal(replacing.fit_transform(data().X), replaced)
    assert kept.dtype == replaced.dtype == np.float64


@pytest.mark.parametrize("choices", [*SETTINGS, {"bias": None}, {"dtype": "float64"}], ids=str)
def test_learned_attributes_make_up_the_prediction(choices: dict[str, Any]) -> None:
    model = estimator(**choices).fit(data().X)
    composed = (
        model.row_factors_.astype(float) @ model.components_
        + model.row_bias_[:, None]
        + model.column_bias_
        + model.offset_
    )
    np.testing.assert_allclose(everywhere(model), composed, rtol=0, atol=1e-12)
    np.testing.assert_allclose(model.predict(data().X), composed, rtol=0, atol=1e-12)
    assert model.row_factors_.shape == (12, model.rank_)
    assert model.components_.shape == (model.rank_, 9)
    assert model.singular_values_.shape == (model.rank_,)
    assert (np.diff(model.singular_values_) <= 0).all()
    assert model.row_bias_.shape == (12,)
    assert model.column_bias_.shape == (9,)
    assert model.bound_ == 20.0
    assert model.n_features_in_ == 9
    assert model.components_.dtype == np.dtype(model.dtype)
    assert model.certificate_.holds
    assert model.validation_rmse_ is None
    assert model.validation_table_ == []
    if model.bias is None:
        assert not model.row_bias_.any()
        assert not model.column_bias_.any()
        assert model.offset_ == 0
    if model.weighting is None:
        gram = model.components_.astype(float) @ model.components_.T
        np.testing.assert_allclose(gram, np.eye(model.rank_), atol=100 * np.finfo(model.dtype).eps)
        sigma = np.linalg.svd(model.row_factors_.astype(float) @ model.components_, compute_uv=False)
        np.testing.assert_allclose(model.singular_values_, sigma[: model.rank_], rtol=1e-5)


def test_each_row_is_completed_by_itself() -> None:
    new = np.where(np.random.default_rng(5).random((7, 9)) < 0.5, data().noisy[:7], np.nan)
    together = fitted().transform(new)
    alone = np.concatenate([fitted().transform(new[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-10)
    mixed = np.concatenate([new, data().X])
    np.testing.assert_allclose(fitted().transform(mixed)[:7], together, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(fitted().transform(mixed)[7:], fitted().transform(data().X))


def test_equal_rows() -> None:
    """Each is its own row of the fit, and none is another one that differs in one entry."""
    X = data().X.copy()
    X[5] = X[2]
    X[6] = X[2]
    X[6, np.flatnonzero(~np.isnan(X[2]))[0]] += 2.0
    model = estimator()
    completed = model.fit_transform(X)
    # equal regressions of single precision, beside each other
    np.testing.assert_allclose(model.transform(X), completed, rtol=0, atol=1e-4)
    assert np.abs(completed[6] - completed[2]).max() > 0.1


def test_row_without_entries_gets_biases() -> None:
    nothing = np.full((2, 9), np.nan)
    expected = np.tile(fitted().offset_ + fitted().column_bias_, (2, 1))
    np.testing.assert_allclose(fitted().transform(nothing), expected, rtol=1e-12)
    np.testing.assert_allclose(fitted().transform(scipy.sparse.csr_array((2, 9))), expected, rtol=1e-12)


@pytest.mark.parametrize("bias", ["joint", None])
@pytest.mark.parametrize("weighting", ["popularity", None])
@pytest.mark.parametrize("norm", ["nuclear", "spectral"])
@pytest.mark.parametrize("parametrization", ["joint", "svd"])
def test_empty_rows_and_columns_are_predicted_by_biases(
    parametrization: Any, norm: str, weighting: Any, bias: Any
) -> None:
    X = data().X.copy()
    X[[0, 7]] = np.nan
    X[:, [0, 4]] = np.nan
    model = estimator(parametrization=parametrization, norm=norm, weighting=weighting, bias=bias, bound=10.0)
    with pytest.warns(UserWarning, match=NO_ENTRY) as caught:
        model.fit(X)
    assert [str(warning.message) for warning in caught] == [
        "2 rows have no observed entry and are predicted by biases alone: 0, 7",
        "2 columns have no observed entry and are predicted by biases alone: 0, 4",
    ]
    completed = everywhere(model)
    np.testing.assert_allclose(completed[0], model.offset_ + model.column_bias_, atol=1e-12)
    np.testing.assert_allclose(completed[:, 4], model.offset_ + model.row_bias_, atol=1e-12)
    assert model.row_bias_[[0, 7]].tolist() == [0, 0]
    assert model.column_bias_[[0, 4]].tolist() == [0, 0]
    np.testing.assert_allclose(model.predict(X), completed, atol=1e-12)


def test_many_empty_rows_are_not_all_named() -> None:
    with pytest.warns(UserWarning, match=r"9 rows have .* alone: 1, 2, 3, 4, 5, \.\.\.$"):
        estimator().fit_coo([0] * 3, [0, 1, 2], [1.0, 2.0, 4.0], (10, 3))


@pytest.mark.parametrize("value", [0.0, 4.0, -1e9, 1e-9])
@pytest.mark.parametrize("choices", [{}, {"bound": "auto", "rank_selection": "two-stage"}], ids=str)
def test_constant_data(value: float, choices: dict[str, Any]) -> None:
    given = np.where(data().missing, np.nan, value)
    for bias in ("joint", None):
        enough = {} if choices else {"bound": 100 * abs(value) + 1}
        model = estimator(**({"bias": bias} | choices | enough)).fit(given)
        np.testing.assert_allclose(everywhere(model), value, rtol=1e-2)
        assert model.certificate_.holds
        if bias == "joint" or value == 0:
            assert model.rank_ == 0
        else:
            assert (model.singular_values_[1:] < 0.01 * model.singular_values_[0]).all()


def test_data_that_biases_explain() -> None:
    """Nothing is left for the bounded matrix, whatever its bound."""
    given = sample(40, 30, 1, noise=0.0, effects=1.0)
    additive = given.truth - (
        given.truth - given.truth.mean(0) - given.truth.mean(1)[:, None] + given.truth.mean()
    )
    X = np.where(given.missing, np.nan, additive)
    for choices in ({"bound": 0.1}, {"bound": 1e6}, {"bound": "auto", "rank_selection": "two-stage"}):
        model = estimator(**choices).fit(X)
        assert rms(everywhere(model) - additive) < 1e-3


@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (12, 1), (2, 2), (3, 100)])
@pytest.mark.parametrize("count", [1, 2, 9, 10, 11])
def test_very_few_entries(shape: tuple[int, int], count: int) -> None:
    count = min(count, math.prod(shape))
    places = np.random.default_rng(0).choice(math.prod(shape), count, replace=False)
    rows, columns = np.divmod(places, shape[1])
    values = np.random.default_rng(1).normal(size=count)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{NO_ENTRY}", UserWarning)
        model = NBMatrixCompletion(random_state=0, max_iter=20).fit_coo(rows, columns, values, shape)
    assert np.isfinite(everywhere(model)).all()
    assert model.certificate_.holds
    assert model.rank_ <= min(shape)


# --- predicting and scoring ---


def test_predict_places() -> None:
    rows, columns = [3, 3, 0], [1, 1, 8]
    values = fitted().predict(rows, columns)
    np.testing.assert_array_equal(values, everywhere(fitted())[rows, columns])
    assert fitted().predict([], []).shape == (0,)
    assert fitted().predict(np.float64([3]), pd.Series([1])) == values[:1]


@functools.cache
def selected() -> NBMatrixCompletion:
    return NBMatrixCompletion(rank=4, cv=3, random_state=0).fit(data().X)


def test_predict_interval() -> None:
    rows, columns = [0, 1, 2], [0, 1, 2]
    middle = selected().predict(rows, columns)
    widths = []
    for coverage in (0.1, 0.5, 0.9):
        interval = selected().predict_interval(rows, columns, coverage)
        assert interval.shape == (3, 2)
        np.testing.assert_allclose(interval.mean(1), middle)
        widths.append(np.diff(interval)[0, 0])
    assert 0 < widths[0] < widths[1] < widths[2]
    np.testing.assert_array_equal(selected().predict_interval(rows, columns), interval)
    count = (~data().missing).sum()
    assert np.isfinite(selected().predict_interval([0], [0], count / (count + 1) - 1e-9)).all()
    assert np.isinf(selected().predict_interval([0], [0], 1 - 1e-6)).all()  # more than the entries can tell


@pytest.mark.parametrize("coverage", [0, 1, -0.1, math.nan, 90])
def test_coverage_must_be_a_probability(coverage: float) -> None:
    with pytest.raises(ValueError, match=rf"coverage must be in \(0, 1\), got coverage={coverage}"):
        selected().predict_interval([0], [0], coverage)


def test_interval_needs_held_out_entries() -> None:
    with pytest.raises(
        ValueError, match=r"needs entries that were held out: .* got bound=20.0, rank_selection=None"
    ):
        fitted().predict_interval([0], [0])
    too_few = NBMatrixCompletion().fit(np.eye(3))
    with pytest.raises(ValueError, match=r"at least 10 entries; .* and 9 entries"):
        too_few.predict_interval([0], [0])


def test_score_against_the_truth() -> None:
    expected = -rms(everywhere(fitted()) - data().truth)
    assert fitted().score(data().X, data().truth) == pytest.approx(expected, rel=1e-12)
    assert fitted().score(data().X, pd.DataFrame(data().truth)) == pytest.approx(expected, rel=1e-12)
    some = np.where(data().missing, data().truth, np.nan)
    expected = -rms((everywhere(fitted()) - data().truth)[data().missing])
    assert fitted().score(data().sparse(), some) == pytest.approx(expected, rel=1e-12)


def test_score_of_hidden_entries() -> None:
    """About the noise of rows that have the structure, and no better than chance for rows that have none."""
    given = sample(200, 30, 2, rate=0.7, noise=0.3)
    model = estimator(rank=2, bias=None, bound=1e4).fit(given.X[:100])
    assert -0.6 < model.score(given.X[100:]) < -0.3 * 0.9
    pure_noise = np.random.default_rng(0).normal(size=(100, 30))
    assert model.score(pure_noise) < -0.95  # its standard deviation is 1
    assert model.score(given.X[100:]) == model.score(given.X[100:])
    for labels in (np.zeros(100), np.zeros((100, 1)), pd.DataFrame({"label": np.zeros(100)})):
        assert model.score(given.X[100:], labels) == model.score(given.X[100:])  # labels of a pipeline


def test_scores_that_are_none() -> None:
    with pytest.raises(ValueError, match="needs a true value"):
        fitted().score(data().X, np.full((12, 9), np.nan))
    with pytest.raises(ValueError, match="needs a true value"):
        fitted().score(np.where(np.arange(9) == 0, 1.0, np.full((3, 9), np.nan)))
    with pytest.raises(ValueError, match=r"y must have the shape of X, \(12, 9\), got \(3, 9\)"):
        fitted().score(data().X, data().truth[:3])


# --- going on ---


def test_partial_fit_starts_as_fit() -> None:
    rows, columns, values = data().coordinates()
    for model in (estimator().partial_fit(data().X), estimator().partial_fit_coo(rows, columns, values)):
        np.testing.assert_array_equal(everywhere(model), everywhere(fitted()))


def test_partial_fit_adds_and_replaces_entries() -> None:
    """To the same solution as a fit of all entries: the squared error agrees, and so do predictions."""
    given = sample(30, 20, 2, rate=0.6, noise=0.3)
    choices: dict[str, Any] = {"bias": None, "bound": 60.0, "dtype": "float64", "tol": 1e-6, "max_iter": 200}
    first = given.X.copy()
    first[:, 1::2] += 5  # will be corrected
    first[given.missing | (np.random.default_rng(0).random((30, 20)) < 0.3)] = np.nan
    for shown in (given.X, given.sparse(), pd.DataFrame(given.X)):
        model = estimator(**choices).fit(first).partial_fit(shown)
        whole = estimator(**choices).fit(given.X)
        observed = ~given.missing
        errors = [rms((everywhere(one) - given.X)[observed]) for one in (model, whole)]
        assert errors[0] == pytest.approx(errors[1], rel=5e-3)
        assert given.error(everywhere(model)) <= 1.1 * given.error(everywhere(whole))
        assert model.bound_ == 60.0
        np.testing.assert_array_equal(model.transform(shown)[observed], given.X[observed])


def test_partial_fit_of_new_rows_and_columns() -> None:
    given = sample(30, 20, 2, rate=0.6, noise=0.1)
    model = estimator(bound=200.0).fit(given.X[:20])
    few = given.X.copy()
    few[:20] = np.nan  # only the new ones
    model.partial_fit(few)
    assert model.row_factors_.shape == (30, model.rank_)
    assert rms((everywhere(model) - given.truth)[20:]) < 0.5 * rms(given.truth)
    with pytest.raises(ValueError, match="X has 21 features, but NBMatrixCompletion is expecting 20"):
        model.partial_fit(np.ones((30, 21)))
    model.partial_fit_coo([0, 30], [20, 0], [1.0, 2.0], (31, 21))
    assert everywhere(model).shape == (31, 21)
    assert model.n_features_in_ == 21
    assert model.certificate_.holds


def test_partial_fit_after_constant_data() -> None:
    """A bound of zero is no bound to keep: nothing had been learned."""
    given = sample(30, 20, 1, noise=0.1, effects=2.0)
    model = NBMatrixCompletion(random_state=0).fit(np.where(given.missing, np.nan, 4.0))
    assert model.bound_ == 0
    model.partial_fit(given.X)
    assert model.bound_ > 0
    np.testing.assert_array_equal(
        everywhere(model), everywhere(NBMatrixCompletion(random_state=0).fit(given.X))
    )


def test_new_rows_after_constant_data() -> None:
    """Nothing was learned, and no row differs from another: new ones get the constant."""
    model = NBMatrixCompletion(random_state=0).fit(np.where(data().missing, np.nan, 4.0))
    np.testing.assert_allclose(model.predict(np.full((2, 9), [[4.0], [np.nan]])), 4.0)
    np.testing.assert_allclose(model.predict(np.where(np.arange(9) < 3, 4.0, np.nan)[None]), 4.0)


@pytest.mark.parametrize("norm", ["nuclear", "spectral"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_effects_alone(norm: str, dtype: str) -> None:
    """Biases explain all but rounding, so that no bound and no multiplier is the right size."""
    random = np.random.default_rng(0)
    for shape in ((7, 23), (20, 15)):
        truth = random.standard_normal((shape[0], 1)) + random.standard_normal(shape[1])
        X = np.where(random.random(shape) < 0.9, truth, np.nan)
        model = NBMatrixCompletion(rank=11, norm=norm, dtype=dtype, random_state=0, max_iter=30).fit(X)
        assert model.certificate_.holds
        assert rms(everywhere(model) - truth) < 1e-2 * rms(truth)


def test_partial_fit_in_another_norm() -> None:
    """The bound in the old norm means nothing then."""
    given = sample(30, 20, 2, noise=0.1)
    model = NBMatrixCompletion(rank=5, random_state=0).fit(given.X)
    nuclear = model.bound_
    model.set_params(norm="frobenius").partial_fit(given.X)
    assert model.certificate_.norm == pytest.approx(np.linalg.norm(model.singular_values_))
    assert model.bound_ < 0.9 * nuclear


def test_partial_fit_without_anything_new() -> None:
    given = sample(40, 30, 2, rate=0.6, noise=0.3, effects=1.0)
    model = estimator(bound=50.0, max_iter=200).fit(given.X)
    before = everywhere(model)
    model.partial_fit(given.X)
    model.partial_fit(np.full((40, 30), np.nan))
    model.partial_fit_coo([], [], [])
    assert rms(everywhere(model) - before) < 0.02 * np.nanstd(given.X)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rank": 2},
        {"rank": 8},
        {"bound": 5.0},
        {"bias": None},
        {"norm": "spectral"},
        {"weighting": "popularity"},
        {"dtype": "float64"},
        {"parametrization": "svd"},
        {"bound": "auto", "rank_selection": "two-stage"},
    ],
    ids=str,
)
def test_warm_start_with_other_parameters(change: dict[str, Any]) -> None:
    """As good as from the start, whatever was changed in between."""
    given = sample(30, 20, 2, rate=0.6, noise=0.3, effects=1.0)
    choices: dict[str, Any] = {
        "rank": 4,
        "bound": 80.0,
        "warm_start": True,
        "random_state": 0,
        "max_iter": 200,
    }
    warm = estimator(**choices).fit(given.X).set_params(**change).fit(given.X)
    cold = estimator(**(choices | change)).fit(given.X)
    observed = ~given.missing
    errors = [rms((everywhere(one) - given.X)[observed]) for one in (warm, cold)]
    assert errors[0] <= 1.02 * errors[1]
    assert warm.rank_ <= warm.rank
    assert warm.bound_ == pytest.approx(cold.bound_)
    if warm.bias is None:
        assert not warm.row_bias_.any()
        assert not warm.column_bias_.any()
        assert warm.offset_ == 0


def test_warm_start_with_another_shape() -> None:
    model = estimator(warm_start=True).fit(data().X)
    for part in (data().X[:8], data().X[:8, :5], data().X):
        np.testing.assert_array_equal(everywhere(model.fit(part)), everywhere(estimator().fit(part)))


# --- reproducible, precise, quiet ---


def test_random_state_decides() -> None:
    given = sample(30, 20, 2).X
    one, other = (NBMatrixCompletion(rank=5, random_state=3, max_iter=20) for _ in range(2))
    torch.manual_seed(1)
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    one.fit(given)
    np.testing.assert_array_equal(state[0], np.random.get_state()[1])
    assert torch.equal(state[1], torch.get_rng_state())  # nobody else's randomness is used
    torch.manual_seed(2)
    other.fit(given)
    np.testing.assert_array_equal(everywhere(one), everywhere(other))
    assert one.validation_table_ == other.validation_table_
    np.testing.assert_array_equal(everywhere(one.fit(given)), everywhere(other))  # and again
    seeded = [np.random.RandomState(3), np.random.RandomState(3)]
    errors = [one.set_params(random_state=state).fit(given).validation_rmse_ for state in seeded]
    assert errors[0] == errors[1]
    assert one.set_params(random_state=4).fit(given).validation_rmse_ != other.validation_rmse_


@pytest.mark.parametrize("choices", SETTINGS, ids=str)
def test_double_precision_is_double(choices: dict[str, Any]) -> None:
    for dtype, others in (("float64", {torch.float32}), ("float32", set())):
        model = estimator(dtype=dtype, max_iter=3, **choices)
        if not others:
            model.set_params(bound="auto", rank_selection="two-stage")
        with Recorder() as recorder:
            model.fit(data().X)
        assert not recorder.dtypes.keys() & {torch.float16, torch.bfloat16}
        for other in others:  # where an iteration starts may be random in any precision
            assert recorder.dtypes.get(other, set()) <= {"aten.randn.generator"}
        assert len(recorder.dtypes[getattr(torch, dtype)]) > 10


def test_double_precision_agrees_more_tightly() -> None:
    """With a full rank and no noise the data can be fitted to rounding, and single precision cannot."""
    given = sample(8, 6, 6, rate=0.5, noise=0.0)
    errors = {}
    for dtype in ("float32", "float64"):
        model = estimator(rank=6, bias=None, bound=1e3, dtype=dtype, tol=0.0, max_iter=300).fit(given.X)
        errors[dtype] = rms((everywhere(model) - given.X)[~given.missing])
    assert errors["float64"] < 1e-9
    assert errors["float64"] < errors["float32"] / 100


@pytest.mark.gpu
@pytest.mark.parametrize("choices", [*SETTINGS, {"bound": "auto", "rank_selection": "two-stage"}], ids=str)
def test_gpu_computes_the_same(choices: dict[str, Any]) -> None:
    given = sample(60, 50, 3, effects=1.0)
    for dtype, tolerance in (("float64", 1e-3), ("float32", 1e-2)):
        settings = {"rank": 6, "bound": 200.0, "dtype": dtype, "random_state": 0} | choices
        there, here = (estimator(device=device, **settings).fit(given.X) for device in ("cuda", "cpu"))
        assert there.certificate_.holds
        assert there.rank_ == here.rank_
        assert there.bound_ == pytest.approx(here.bound_, rel=tolerance)
        assert rms(everywhere(there) - everywhere(here)) < tolerance * rms(given.truth)
        assert isinstance(there.components_, np.ndarray)  # nothing is left on the device
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(there)).components_, there.components_)
        there.partial_fit(given.noisy)
        assert rms(everywhere(there) - given.truth) < rms(everywhere(here) - given.truth)


@pytest.mark.parametrize("max_iter", [1, 2, 9, 10, 11, 25])
@pytest.mark.parametrize("choices", SETTINGS, ids=str)
def test_few_iterations(choices: dict[str, Any], max_iter: int) -> None:
    model = estimator(max_iter=max_iter, tol=0.0, **choices).fit(data().X)
    assert 1 <= model.n_iter_ <= 3 * max_iter  # sweeps, L-BFGS and projected gradients
    assert model.n_evaluations_ >= model.n_iter_
    assert model.certificate_.holds
    assert np.isfinite(model.loss_curve_).all()
    assert len(model.loss_curve_) >= 1
    nothing = np.nanmean(data().X) if model.bias else 0.0
    observed = data().X[~data().missing]
    assert rms(everywhere(model)[~data().missing] - observed) < rms(observed - nothing)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    model = NBMatrixCompletion(rank=3, random_state=0, max_iter=5).fit(data().X)
    assert capsys.readouterr().out == ""
    seen: list[tuple[str, float]] = []
    model.on_progress = lambda stage, loss: seen.append((stage, loss))
    model.set_params(verbose=1).fit(data().X)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("[NBMatrixCompletion] ") for line in lines)
    assert lines[-1] == f"[NBMatrixCompletion] rank {model.rank_}, bound {model.bound_:.6g}"
    assert [stage for stage, _ in seen] == sorted([stage for stage, _ in seen])  # one after the other
    assert {f"[NBMatrixCompletion] {stage}" for stage, _ in seen} == set(lines[:-1])
    assert len(seen) > len(model.loss_curve_)
    assert clone(model).on_progress is None


def test_interrupted_fit_leaves_the_last_one() -> None:
    model = estimator().fit(data().X)
    before = everywhere(model)

    def interrupt(stage: str, loss: float) -> None:
        raise KeyboardInterrupt

    model.on_progress = interrupt
    for again in (model.fit, model.partial_fit, model.fit_transform):
        with pytest.raises(KeyboardInterrupt):
            again(data().truth)
    np.testing.assert_array_equal(everywhere(model), before)
    assert model.on_progress is interrupt


# --- refusals ---

OUTSIDE = data().X.copy()
OUTSIDE[3, 4] = math.inf
NOT_FINITE = r"observed entries must be finite numbers, got "

BAD_DATA: dict[str, tuple[Any, str]] = {
    "all missing": (np.full((4, 9), np.nan), r"at least one entry must be observed, got 0 .* \(4, 9\)"),
    "nothing stored": (scipy.sparse.csr_array((4, 9)), r"at least one entry must be observed, got 0"),
    "infinite": (OUTSIDE, NOT_FINITE + r"inf at \(3, 4\)"),
    "infinite in a frame": (pd.DataFrame(OUTSIDE), NOT_FINITE + r"inf at \(3, 4\)"),
    "minus infinity stored": (
        scipy.sparse.csr_array([[0, -math.inf] + [0] * 7]),
        NOT_FINITE + r"-inf at \(0, 1\)",
    ),
    "NaN stored": (
        scipy.sparse.csr_array(data().X),
        NOT_FINITE + r"nan at \(\d, \d\), nan at .* and \d+ more",
    ),
    "one row": (data().X[0], "Expected 2D array, got 1D array"),
    "three axes": (data().X[None], "Found array with dim 3"),
    "sparse with one axis": (scipy.sparse.coo_array(np.arange(9.0)), "Expected 2D input"),
    "no rows": (data().X[:0], r"0 sample\(s\)"),
    "no columns": (data().X[:, :0], r"0 feature\(s\)|9 features"),
    "a number": (3.0, "Expected 2D array, got scalar"),
    "none": (None, "Expected 2D array, got scalar|NoneType"),
    "complex": (data().X + 1j, "[Cc]omplex data not supported"),
    "complex and sparse": (data().sparse() * 1j, "[Cc]omplex data not supported"),
    "texts": (np.full((2, 9), "x"), "strings|could not convert string"),
    "text objects": (np.full((2, 9), "x", dtype=object), "could not convert string|must be numbers"),
    "ragged": ([[1.0, 2.0], [3.0]], "inhomogeneous"),
    "a column of text": (frame().assign(c="good"), r"columns must be numeric, got .*'good' in column 'c'"),
    "one text": (
        frame()
        .astype({"f": object})
        .set_axis(NAMES, axis=1)
        .replace({"f": {frame().f.dropna().iloc[-1]: "?"}}),
        r"columns must be numeric, got .*'\?' in column 'f'",
    ),
    "numbers as text": (frame().assign(d="1.5"), r"columns must be numeric, got .*'1.5' in column 'd'"),
    "dates": (frame().assign(e=pd.Timestamp("2020-02-01")), r"columns must be numeric, got .* in column 'e'"),
    "complex column": (frame().assign(e=1j), r"columns must be numeric, got .* in column 'e'"),
}


def unchanged(model: NBMatrixCompletion, before: dict[str, Any]) -> None:
    """Every attribute is what it was, and what it does also."""
    assert vars(model).keys() == before.keys()
    for name, value in vars(model).items():
        assert value is before[name], name
    np.testing.assert_array_equal(everywhere(model), everywhere(fitted()))
    np.testing.assert_array_equal(model.transform(data().X), fitted().transform(data().X))


@pytest.mark.filterwarnings("ignore:X has feature names:UserWarning")
@pytest.mark.parametrize("what", list(BAD_DATA))
def test_bad_data(what: str) -> None:
    """One clear error, through every door, and nothing is changed by it."""
    given, message = BAD_DATA[what]
    with pytest.raises(ValueError, match=message):
        estimator().fit(given)
    model = estimator().fit(data().X)
    before = vars(model).copy()
    for fit in (model.fit, model.fit_transform):
        with pytest.raises(ValueError, match=message):
            fit(given)
        unchanged(model, before)
    if what in ("all missing", "nothing stored"):
        return  # nothing to learn from, but rows that can be completed
    uses = [model.partial_fit, model.transform, model.predict, model.score]
    for use in uses:
        with pytest.raises(ValueError, match=f"{message}|features|Expected a 2-dimensional"):
            use(given)
        unchanged(model, before)


def test_marker_does_not_excuse_nan() -> None:
    with pytest.raises(ValueError, match=NOT_FINITE + r"nan at "):
        estimator(missing_values=-1).fit(data().X)


@pytest.mark.parametrize("use", ["transform", "partial_fit", "predict", "score"])
def test_another_number_of_columns(use: str) -> None:
    model = estimator().fit(data().X)
    before = vars(model).copy()
    for given in (data().X[:, :4], data().sparse()[:, :4], pd.DataFrame(data().X[:, :4]).to_numpy()):
        with pytest.raises(ValueError, match="X has 4 features, but NBMatrixCompletion is expecting 9"):
            getattr(model, use)(given)
        unchanged(model, before)


R, C, V = [0, 1, 2, 0], [0, 1, 2, 1], [1.0, 2.0, 3.0, 4.0]
BAD_COORDINATES: dict[str, tuple[tuple[Any, ...], str]] = {
    "lengths": (([0, 1], C, V), "rows, cols and values must have the same length, got 2, 4 and 4"),
    "negative": (([0, 1, 2, -1], C, V), "rows must be at least 0, got -1"),
    "negative column": ((R, [0, 1, -7, 1], V), "cols must be at least 0, got -7"),
    "fraction": ((R, [0, 1, 0.5, 1], V), "cols must be integers, got .*0.5"),
    "NaN": (([0, 1, math.nan, 0], C, V), "rows must be integers, got .*nan"),
    "text": ((["a", "b", "c", "d"], C, V), "rows must be integers, got .*a"),
    "objects": (([0, 1, None, 0], C, V), "rows must be integers, got .*None"),
    "mask": (([True] * 4, C, V), "rows must be integers, got .*True"),
    "beyond 64 bits": (
        ([0, 1, 2, 10**30], C, V),
        "rows must be below .*, got 1000000000000000000000000000000",
    ),
    "beyond signed": (
        (np.array([0, 1, 2, 2**63], np.uint64), C, V),
        "rows must be below .*, got 9223372036854775808",
    ),
    "beyond floats": (([0, 1, 2, 1e300], C, V), r"rows must be below .*, got 1e\+300"),
    "two axes": (([R], [C], [V]), r"rows must be one-dimensional, got shape \(1, 4\)"),
    "numbers": ((0, 0, 1.0), r"rows must be one-dimensional, got shape \(\)"),
    "value axes": ((R, C, [V]), r"values must be one-dimensional, got shape \(1, 4\)"),
    "NaN value": ((R, C, [1.0, 2.0, math.nan, 4.0]), NOT_FINITE + r"nan at \(2, 2\)"),
    "missing value": ((R, C, [1.0, 2.0, None, 4.0]), NOT_FINITE + r"nan at \(2, 2\)|values must be numbers"),
    "text value": ((R, C, ["a", "2", "3", "4"]), "values must be numbers"),
    "complex value": ((R, C, [1j, 2, 3, 4]), "values must be real numbers"),
    "nothing": (([], [], []), "at least one entry must be observed, got 0"),
    "nothing in a shape": (([], [], [], (3, 3)), r"at least one entry must be observed, got 0 .* \(3, 3\)"),
    "outside": ((R, C, V, (2, 5)), r"rows must be below 2, the size in shape=\(2, 5\), got 2"),
    "outside column": ((R, C, V, (5, 2)), r"cols must be below 2, the size in shape=\(5, 2\), got 2"),
    "shape of one": ((R, C, V, (3,)), r"shape must be two integers \(m, n\), got shape=\(3,\)"),
    "shape of three": ((R, C, V, (3, 3, 3)), r"shape must be two integers \(m, n\), got shape=\(3, 3, 3\)"),
    "shape is a number": ((R, C, V, 3), r"shape must be two integers \(m, n\), got shape=3"),
    "shape of fractions": ((R, C, V, (3.5, 4)), r"shape must be two integers \(m, n\), got shape=\(3.5, 4\)"),
    "shape is text": ((R, C, V, "34"), r"shape must be two integers \(m, n\), got shape='34'"),
    "negative shape": ((R, C, V, (-3, 4)), r"shape must not be negative, got shape=\(-3, 4\)"),
    "twice": (
        ([0, 0, 0, 0], [1, 1, 2, 1], V),
        r"must be given once, got more than one value for \(0, 1\), \(0, 1\)",
    ),
    "many times": (([0] * 9, [1] * 9, [0.0] * 9), r"\(0, 1\), \(0, 1\), \(0, 1\) and 5 more"),
}


@pytest.mark.parametrize("what", list(BAD_COORDINATES))
def test_bad_coordinates(what: str) -> None:
    given, message = BAD_COORDINATES[what]
    with pytest.raises(ValueError, match=message):
        estimator().fit_coo(*given)
    model = estimator().fit(data().X)
    before = vars(model).copy()
    with pytest.raises(ValueError, match=message):
        model.fit_coo(*given)
    unchanged(model, before)
    if not what.startswith("nothing"):
        with pytest.raises(ValueError, match=message):
            model.partial_fit_coo(*given)
        unchanged(model, before)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([0], [100], r"cols must be below 9, the size in shape=\(12, 9\), got 100"),
        ([12], [0], r"rows must be below 12, .* got 12"),
        ([-1], [0], "rows must be at least 0, got -1"),
        ([0, 1], [1], "rows and cols must have the same length, got 2 and 1"),
        (0, 1, r"rows must be one-dimensional, got shape \(\)"),
        ([0.5], [1], "rows must be integers, got .*0.5"),
        (["0"], [1], "rows must be integers, got .*0"),
    ],
)
def test_bad_places(rows: Any, columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted().predict(rows, columns)
    with pytest.raises(ValueError, match=message):
        selected().predict_interval(rows, columns)


def test_identifiers_in_place_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten digits make a matrix of so many rows, whose factors alone are too large: say so, don't die."""
    monkeypatch.setattr(observations, "free_memory", lambda: 10**9)
    with pytest.raises(MemoryError, match=r"9876543211"):
        estimator().fit_coo([9876543210, 3, 5, 0], C, V)


AUTO: dict[str, Any] = {"bound": "auto"}
BAD_PARAMETERS: list[dict[str, Any]] = [
    *({"bound": value} for value in (0, -1.0, math.nan, math.inf, "Auto", True, None, [1.0])),
    *({"rank": value} for value in (0, -3, 2.0, True, None, "3")),
    *({"max_iter": value} for value in (0, 2.5, None)),
    *({"tol": value} for value in (-1e-3, 1, math.nan, None, "x")),
    *({"norm": value} for value in ("foo", None, 0.5, math.nan, "ky-fan-0")),
    *({"parametrization": value} for value in ("qr", None)),
    *({"rank_selection": value} for value in ("one-stage", True)),
    *({"bias": value} for value in ("row", True)),
    *({"weighting": value} for value in ("uniform", True)),
    *({"duplicates": value} for value in ("sum", None)),
    *({"dtype": value} for value in ("float16", np.float32, None)),
    *({"device": value} for value in ("gpu", "meta", 1.5, None, "cuda:99")),
    *({"missing_values": value} for value in ("nan", math.inf, True)),
]


@pytest.mark.parametrize("bad", BAD_PARAMETERS, ids=str)
def test_bad_parameters(bad: dict[str, Any]) -> None:
    """The rule, then the value, from every method that uses parameters, and nothing is changed."""
    ((name, value),) = bad.items()
    message = rf"{name} must be .*got {name}={re.escape(repr(value))}"
    rows, columns, values = data().coordinates()
    model = estimator(**bad)
    for fit in (lambda: model.fit(data().X), lambda: model.fit_coo(rows, columns, values)):
        with pytest.raises(ValueError, match=message):
            fit()
    assert set(vars(model)) == set(model.get_params())
    model = estimator().fit(data().X).set_params(**bad)
    before = vars(model).copy()
    for fit in (model.fit, model.partial_fit):
        with pytest.raises(ValueError, match=message):
            fit(data().X)
        assert all(vars(model)[attribute] is before[attribute] for attribute in before)


@pytest.mark.parametrize(
    "cv",
    [
        1,
        -2,
        True,
        2.5,
        "foo",
        1000,
        [],
        [3, 4],
        [([0, 1], [1000])],
        [(range(30), [-1])],
        [(range(30), [])],
        [([], range(30))],
        [(range(30), range(20, 40))],
        [([0, 0, 1, 2, 3, 4, 5], [10, 11])],
        [(np.array([0.5, 1.0]), [2, 3])],
        [(["a", "b"], [2, 3])],
    ],
    ids=str,
)
def test_bad_cv(cv: Any) -> None:
    """Whose held-out entries would be none, or not held out."""
    with pytest.raises(ValueError, match=r"cv|n_splits"):
        estimator(cv=cv, bound="auto").fit(data().X)
    with pytest.raises(ValueError, match=r"cv|n_splits"):
        estimator(cv=cv, rank_selection="two-stage").fit(data().X)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bias", ["joint", None])
def test_values_beyond_the_precision(dtype: str, bias: Any) -> None:
    """Either right or refused, never zero or infinite without a word."""
    observed = ~data().missing
    reference = estimator(bias=bias, bound=20.0, dtype=dtype).fit(data().X)
    refused = []
    for exponent in (-308, -160, -60, -42, -30, 30, 38, 60, 160, 307):
        unit = 10.0**exponent
        given = np.where(observed, data().X * unit, np.nan)
        bound = min(20.0 * unit, 1e308)
        model = estimator(bias=bias, bound=bound, dtype=dtype)
        with contextlib.suppress(ValueError):
            model.fit(given)
        if hasattr(model, "components_"):
            assert rms(everywhere(model) / unit - everywhere(reference)) < 0.01 * np.nanstd(data().X)
        else:
            refused.append(exponent)
            with pytest.raises(ValueError, match=rf"must be in \[.*\] for {dtype}, got "):
                model.fit(given)
    assert not {-30, 30} & set(refused)
    assert dtype == "float32" or not {-60, 60} & set(refused)
