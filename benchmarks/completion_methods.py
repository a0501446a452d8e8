"""The methods of the completion benchmark behind one interface."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import completion_settings as settings
import numpy as np
from completion_peers import soft_impute_als, torch_factors
from completion_settings import Grids, Setting
from completion_tasks import Entries, Index, Task
from numpy.typing import NDArray

Values = NDArray[np.floating[Any]]


class Model(Protocol):
    def predict(self, rows: Index, cols: Index) -> Values: ...


@dataclass(frozen=True)
class Method:
    """`fit` gets what `prepare` made of the task before the clock started.

    `fold_in(model, given, shape, rows, cols)` predicts the entries at (rows, cols) of `shape[0]` rows that
    were not in the fit and of which `given` is known.
    """

    needs: str  # what has to be importable
    grids: Grids
    prepare: Callable[[Task], Any]
    fit: Callable[[Any, Setting, int], Model]
    fold_in: Callable[[Any, Entries, tuple[int, int], Index, Index], Values] | None = None
    slow: tuple[str, ...] = ()  # tasks that get one seed and one fit

    def missing(self) -> str | None:
        """Why it cannot run here."""
        try:
            importlib.import_module(self.needs)
        except ImportError as error:
            return f"not installed: {error}"
        return None


def _same(task: Task) -> Task:
    return task


def _sparse(entries: Entries, shape: tuple[int, int]) -> Any:
    from scipy.sparse import coo_matrix  # cmfrec takes no sparse arrays

    return coo_matrix((entries.values, (entries.rows, entries.cols)), shape=shape)


def _dense(task: Task) -> Values:
    matrix = np.full(task.shape, np.nan, dtype=np.float32)
    matrix[task.observed.rows, task.observed.cols] = task.observed.values
    return matrix


# ------------------------------------------------------------------------------------------ cmfrec


def _fit_cmfrec(data: Any, setting: Setting, seed: int) -> Any:
    from cmfrec import CMF

    # it takes 0 for "no seed"
    options = {"nthreads": 1, **setting}
    return CMF(method="als", verbose=False, random_state=seed + 1, **options).fit(data)


def _fold_in_cmfrec(model: Any, given: Entries, shape: tuple[int, int], rows: Index, cols: Index) -> Values:
    known = _sparse(given, shape).tocsr()
    found = np.empty(len(rows))
    # it wants a copy of the row for each entry
    for part in np.array_split(np.arange(len(rows)), max(len(rows) // 5000, 1)):
        found[part] = model.predict_warm_multiple(X=known[rows[part]], item=cols[part])
    return found


# -------------------------------------------------------------------------------------------- ours


def _fit_nblora(task: Task, setting: Setting, seed: int) -> Any:
    from nblora.completion import NBMatrixCompletion

    options = dict(setting)
    if "bound_scale" in options:
        options["bound"] = options.pop("bound_scale") * size_of(task)
    entries = task.observed
    model = NBMatrixCompletion(random_state=seed, **options)
    return model.fit_coo(entries.rows, entries.cols, entries.values, task.shape)


def size_of(task: Task) -> float:
    """The Frobenius norm of a full matrix whose entries spread like the observed ones."""
    return math.sqrt(task.shape[0] * task.shape[1]) * float(task.observed.values.std(dtype=np.float64))


def _fold_in_nblora(model: Any, given: Entries, shape: tuple[int, int], rows: Index, cols: Index) -> Values:
    return np.asarray(model.transform(_sparse(given, shape).tocsr()))[rows, cols]


# ------------------------------------------------------------------------- scikit-surprise, sklearn


@dataclass(frozen=True)
class _Surprise:
    model: Any

    def predict(self, rows: Index, cols: Index) -> Values:
        m = self.model  # its own predict takes one entry at a time
        offset = m.trainset.global_mean if m.biased else 0.0
        return offset + m.bu[rows] + m.bi[cols] + np.einsum("ek,ek->e", m.pu[rows], m.qi[cols])


def _surprise_input(task: Task) -> Any:
    from surprise import Trainset

    by_row: dict[int, list[Any]] = {row: [] for row in range(task.shape[0])}
    by_col: dict[int, list[Any]] = {col: [] for col in range(task.shape[1])}
    entries = task.observed
    for row, col, value in zip(entries.rows.tolist(), entries.cols.tolist(), entries.values.tolist()):
        by_row[row].append((col, value))
        by_col[col].append((row, value))
    extremes = (float(entries.values.min()), float(entries.values.max()))
    names = [{index: index for index in range(size)} for size in task.shape]
    return Trainset(by_row, by_col, *task.shape, len(entries), extremes, *names)


def _fit_surprise(data: Any, setting: Setting, seed: int) -> _Surprise:
    from surprise import SVD

    return _Surprise(SVD(random_state=seed, **setting).fit(data))


@dataclass(frozen=True)
class _Completed:
    matrix: Values

    def predict(self, rows: Index, cols: Index) -> Values:
        return self.matrix[rows, cols]


def _fit_neighbours(data: Values, setting: Setting, seed: int) -> _Completed:
    from sklearn.impute import KNNImputer

    return _Completed(KNNImputer(keep_empty_features=True, **setting).fit_transform(data))


def _fit_iterative(data: Values, setting: Setting, seed: int) -> _Completed:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of rounds is tuned
        imputer = IterativeImputer(keep_empty_features=True, random_state=seed, **setting)
        return _Completed(imputer.fit_transform(data))


def _fit_soft_impute(task: Task, setting: Setting, seed: int) -> Model:
    return soft_impute_als(task.observed, task.shape, seed=seed, **setting)


def _fit_torch(task: Task, setting: Setting, seed: int) -> Model:
    return torch_factors(task.observed, task.shape, seed=seed, **setting)


OURS, AUTO, CMFREC = "NB-LoRA", "NB-LoRA auto", "cmfrec"

METHODS: dict[str, Method] = {
    OURS: Method("nblora.completion", settings.NBLORA, _same, _fit_nblora, _fold_in_nblora),
    AUTO: Method("nblora.completion", settings.NBLORA_AUTO, _same, _fit_nblora, _fold_in_nblora),
    CMFREC: Method(
        "cmfrec",
        settings.CMFREC,
        lambda task: _sparse(task.observed, task.shape),
        _fit_cmfrec,
        _fold_in_cmfrec,
    ),
    "softImpute-ALS": Method("scipy", settings.SOFT_IMPUTE, _same, _fit_soft_impute),
    "torch factors": Method("torch", settings.TORCH, _same, _fit_torch),
    "Surprise SVD": Method("surprise", settings.SURPRISE, _surprise_input, _fit_surprise),
    "KNNImputer": Method("sklearn", settings.NEIGHBOURS, _dense, _fit_neighbours, slow=("T3",)),
    "IterativeImputer": Method("sklearn", settings.ITERATIVE, _dense, _fit_iterative, slow=("T3",)),
}
