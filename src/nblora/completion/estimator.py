"""`NBMatrixCompletion`, the scikit-learn estimator."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import scipy.sparse
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.model_selection import KFold, ShuffleSplit, check_cv
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from nblora.bounds import Norm, parse_norm
from nblora.completion import fitting, selection
from nblora.completion.entries import Entries, torch_sparse
from nblora.completion.fitting import Model, Problem, Watch, Weights
from nblora.completion.folding import RowPrior, fold_in
from nblora.completion.observations import (
    Duplicates,
    Observations,
    frame_as_array,
    from_coordinates,
    from_dense,
    from_places,
    from_sparse,
    refuse_what_does_not_fit,
    row_keys,
)
from nblora.contract import LayerCertificate
from nblora.lowrank import LowRank
from nblora.parametrizations import Parametrization

Array = NDArray[Any]
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class NBMatrixCompletion(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Complete a matrix by one of low rank in a norm ball (MATH.md §8).

    Fits X = row_factors_ @ components_ + row_bias_ + column_bias_ + offset_ to the observed entries by least
    squares. The norm of the first term is at most `bound_`, by construction and measured after the fit.

    Parameters
    ----------
    rank : int, default=20
        Largest rank; min(rank, m, n) counts.
    norm : str, float or nblora.bounds.Norm, default="nuclear"
        Which norm is bounded: "nuclear", "frobenius", "spectral", "ky-fan-q" or p >= 1 of a Schatten norm.
    bound : float or "auto", default="auto"
        On that norm, in units of the data. "auto" takes the one that predicts held-out entries best.
    parametrization : {"joint", "svd"}, default="joint"
        Of the matrices in the ball, MATH.md §2 and §3.
    rank_selection : {"two-stage", None}, default="two-stage"
        "two-stage" also tries the number of singular values above 5 % of the largest as rank, and takes what
        predicts held-out entries better. None keeps `rank`.
    bias : {"joint", None}, default="joint"
        "joint" learns an offset and row and column biases together with the matrix. They have no bound, but
        a ridge, which is the ratio of the variances of an entry and of a bias that the data show.
    weighting : {None, "popularity"}, default=None
        "popularity" bounds D_r^1/2 X D_c^1/2 instead of X, D being the number of observed entries of each row
        and column over their mean. For ratings, where some have far more entries than others.
    missing_values : float, default=nan
        What stands for a missing entry in dense input. Sparse input is observed where it is stored.
    duplicates : {"error", "mean"}, default="error"
        What to do with entries that are given more than once, in coordinates and sparse input.
    keep_observed : bool, default=True
        Whether `transform` leaves observed entries as they are.
    cv : int, splitter, iterable of (fit, held out) positions or None, default=None
        How entries are held out for "auto" and "two-stage", over the N observed entries sorted by row and
        column, so that a splitter should shuffle: KFold(5) would hold out whole rows, which says how new rows
        are completed. None holds out 10 % once.
    max_iter : int, default=200
        Most sweeps of alternating regressions, most iterations of L-BFGS, and most steps of projected
        gradients, of each fit.
    tol : float, default=1e-4
        A solver stops where an iteration improves the squared error by a smaller share.
    warm_start : bool, default=False
        Whether `fit` starts at the last solution where rank and shape are the same.
    device : str or torch.device, default="cpu"
        Where to compute.
    dtype : {"float32", "float64"}, default="float32"
        In which precision.
    random_state : int, RandomState or None, default=None
        Of the held-out entries.
    verbose : int, default=0
        1 prints a line for each stage.

    Attributes
    ----------
    components_ : (rank_, n) rows that span the rows of the matrix; orthonormal unless weighted.
    row_factors_ : (m, rank_).
    singular_values_ : (rank_,) of the bounded matrix, descending.
    bound_ : float, on its norm.
    rank_ : int.
    row_bias_ : (m,), column_bias_ : (n,), offset_ : float. Zero where there are none.
    n_iter_ : int, sweeps and iterations of L-BFGS in the last call, all fits of a selection included.
    n_evaluations_ : int, passes over the observed entries in the last call.
    loss_curve_ : list of float, half the mean squared error during the final fit.
    certificate_ : nblora.contract.LayerCertificate, the measured norm against the bound.
    validation_rmse_ : float or None, of the held-out entries at the chosen rank and bound. As it was used to
        choose, it is slightly too good.
    validation_table_ : list of dict with rank, bound and rmse of all that was tried.
    n_features_in_ : int, n. feature_names_in_ : names of columns, where X has them.

    Examples
    --------
    >>> import numpy as np
    >>> from nblora.completion import NBMatrixCompletion
    >>> truth = np.outer(np.arange(1.0, 31.0), np.arange(1.0, 21.0))
    >>> X = np.where(np.random.default_rng(0).random(truth.shape) < 0.5, truth, np.nan)
    >>> completed = NBMatrixCompletion(rank=5, bias=None, random_state=0).fit_transform(X)
    >>> bool(abs(completed - truth).max() < 0.05 * truth.max())
    True
    """

    _observations: Observations
    _norm: Norm
    _k: int
    _share: float
    _largest: float  # in the units of the values, as all of these
    _ridge: fitting.Ridge | None
    _biased: bool
    _made_once: dict[str, Any]  # what only new rows need

    on_progress: Callable[[str, float], None] | None = None
    """Called with a stage and the half mean squared error; not a parameter, and not kept by `clone`."""

    def __init__(
        self,
        rank: int = 20,
        *,
        norm: str | float | Norm = "nuclear",
        bound: float | Literal["auto"] = "auto",
        parametrization: Parametrization = "joint",
        rank_selection: Literal["two-stage"] | None = "two-stage",
        bias: Literal["joint"] | None = "joint",
        weighting: Literal["popularity"] | None = None,
        missing_values: float = math.nan,
        duplicates: Duplicates = "error",
        keep_observed: bool = True,
        cv: Any = None,
        max_iter: int = 200,
        tol: float = 1e-4,
        warm_start: bool = False,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.rank = rank
        self.norm = norm
        self.bound = bound
        self.parametrization = parametrization
        self.rank_selection = rank_selection
        self.bias = bias
        self.weighting = weighting
        self.missing_values = missing_values
        self.duplicates = duplicates
        self.keep_observed = keep_observed
        self.cv = cv
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    # --- fitting ---------------------------------------------------------------------------------

    def fit(self, X: Any, y: None = None) -> NBMatrixCompletion:
        """Complete a matrix.

        Parameters
        ----------
        X : (m, n) array or data frame with `missing_values`, or scipy sparse matrix whose stored entries,
            explicit zeros included, are observed. Never made dense.
        y : ignored.
        """
        with self._as_before_on_failure():
            return self._fit(self._observe(X, reset=True))

    @contextmanager
    def _as_before_on_failure(self) -> Iterator[None]:
        """A fit that fails leaves the last one as it was."""
        before = self.__dict__.copy()
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def fit_coo(
        self, rows: ArrayLike, cols: ArrayLike, values: ArrayLike, shape: tuple[int, int] | None = None
    ) -> NBMatrixCompletion:
        """As `fit`, from the coordinates (N,), (N,) and values (N,) of observed entries, in any order.

        Parameters
        ----------
        shape : (m, n); by default as small as the coordinates allow.
        """
        self._check_parameters()
        observed = from_coordinates(rows, cols, values, shape, duplicates=self.duplicates)
        with self._as_before_on_failure():
            self._forget_names(observed.shape[1])
            return self._fit(observed)

    def partial_fit(self, X: Any, y: None = None) -> NBMatrixCompletion:
        """Add the observed entries of X to those known, and go on from the last solution.

        Rank and bound stay, unless the bound is zero (all values were the same) or the norm was set to
        another one since: then all is fitted anew. An entry that was known already takes its new value.

        Parameters
        ----------
        X : (m', n) as for `fit`; its rows are those of the last fit, in their order, and new ones after them.
        """
        if not hasattr(self, "components_"):
            return self.fit(X)
        with self._as_before_on_failure():
            return self._continue(self._observe(X, reset=False))

    def partial_fit_coo(
        self, rows: ArrayLike, cols: ArrayLike, values: ArrayLike, shape: tuple[int, int] | None = None
    ) -> NBMatrixCompletion:
        """As `partial_fit`, from coordinates; rows and columns may be new."""
        if not hasattr(self, "components_"):
            return self.fit_coo(rows, cols, values, shape)
        self._check_parameters()
        new = from_coordinates(rows, cols, values, shape, duplicates=self.duplicates)
        with self._as_before_on_failure():
            if new.shape[1] > self.n_features_in_:
                self._forget_names(new.shape[1])
            return self._continue(new)

    def _continue(self, new: Observations) -> NBMatrixCompletion:
        # a bound in another norm means nothing now, and neither does one of zero, which constant values gave
        same = self._norm == parse_norm(self.norm) and self.bound_ > 0
        return self._fit(self._observations.updated(new), again=same)

    def _fit(self, observed: Observations, again: bool = False) -> NBMatrixCompletion:
        """Fit, from the last solution if `again`: then also with its rank and bound."""
        norm, bound = self._check_parameters()
        m, n = observed.shape
        if len(observed) == 0:
            raise ValueError(f"at least one entry must be observed, got 0 in a matrix of shape ({m}, {n})")
        _warn_of_empty(observed)
        restart = again or (
            self.warm_start and hasattr(self, "components_") and self._observations.shape == observed.shape
        )
        largest = float(np.abs(observed.values).max()) or 1.0
        # in parts of the largest, since the sum could overflow
        centre = float((observed.values / largest).mean()) * largest if self.bias == "joint" else 0.0
        unit = self._unit(observed.values - centre)
        standard = Observations(
            observed.shape, observed.rows, observed.columns, (observed.values - centre) / unit
        )
        watch = Watch()
        k = min(self.rank, m, n)
        if again:
            k, bound = min(self._k, m, n), self.bound_
        chosen: selection.Selection | None = None
        with torch_sparse():
            share, ridge, radius = 0.1, None, None if bound is None else bound / unit
            if not again and (bound is None or self.rank_selection == "two-stage"):
                self._say("choosing the rank and the bound", watch)
                chosen = self._select(standard, norm, k, radius, watch)
                if chosen is not None:
                    best = chosen.best
                    if radius is None:
                        radius = best.radius * (selection.ROOM if best.k < k else 1.0)
                    k, share, ridge = best.k, best.multiplier, best.ridge
            self._say("fitting", watch)
            watch.curve.clear()
            problem = self._problem(standard, norm, k)
            if ridge is not None:
                problem = replace(problem, ridge=ridge)
            del standard
            if radius is None:  # too little data to hold any out
                radius = _cautious_radius(problem, watch)
            if not radius > 0:
                solved = selection.Solution.of(problem, fitting.barely(problem, 0.0, watch), share, 0.0)
            elif restart and (again or self._k == k):
                last = self._last_solution(problem, unit, centre)
                if not again:  # parameters may be others
                    last = last._replace(ridge=problem.ridge)
                solved = selection.resume(problem, radius, last, watch)
            else:
                solved = selection.solve(problem, radius, watch, share=share)
        model, self._share, largest, ridge = solved
        self._observations, self._norm, self._k, self._largest = observed, norm, k, largest * unit
        self._ridge = None if ridge is None else ridge.scaled(unit**2)
        self._store(problem, model, radius, unit, centre)
        if not again:
            self._store_selection(chosen, unit)
        self.n_iter_ = watch.iterations
        self.n_evaluations_ = watch.evaluations
        self.loss_curve_ = [loss * unit**2 for loss in watch.curve]
        self.n_features_in_ = n
        self._made_once = {}
        if self.verbose:
            print(f"[NBMatrixCompletion] rank {self.rank_}, bound {self.bound_:.6g}")
        return self

    def _unit(self, values: NDArray[np.float64]) -> float:
        """The root mean square of the values, 1 if they are zero; what is fitted has this as its unit."""
        largest = float(np.abs(values).max())  # first, since squares could overflow
        limits = np.finfo(self.dtype)
        low, high = max(float(limits.tiny) * 1e6, 1e-150), min(float(limits.max) / 1e6, 1e150)
        if largest == 0:
            return 1.0
        if not low <= largest <= high:
            raise ValueError(
                f"the largest distance of an observed entry from their mean (from 0 without bias) must be in "
                f"[{low:.3g}, {high:.3g}] for {self.dtype}, got {largest:.3g}"
            )
        return largest * float(np.sqrt(np.mean((values / largest) ** 2)))

    def _check_parameters(self) -> tuple[Norm, float | None]:
        """Refuse parameters that mean nothing; the norm and the bound, None for "auto"."""
        norm = parse_norm(self.norm)
        bound: Any = self.bound
        if isinstance(bound, str) and bound == "auto":
            bound = None
        elif not _is_real(bound) or not 0 < float(bound) < math.inf:
            raise ValueError(f'bound must be "auto" or a finite number > 0, got bound={bound!r}')
        for name in ("rank", "max_iter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {name}={value!r}")
        tol: Any = self.tol
        if not _is_real(tol) or not 0 <= float(tol) < 1:
            raise ValueError(f"tol must be in [0, 1), got tol={tol!r}")
        for name, allowed in (
            ("parametrization", ("joint", "svd")),
            ("rank_selection", ("two-stage", None)),
            ("bias", ("joint", None)),
            ("weighting", (None, "popularity")),
            ("duplicates", ("error", "mean")),
            ("dtype", tuple(_DTYPES)),
        ):
            if getattr(self, name) not in allowed:
                names = " or ".join(repr(value) for value in allowed)
                raise ValueError(f"{name} must be {names}, got {name}={getattr(self, name)!r}")
        self._missing()
        try:
            if not isinstance(self.device, (str, torch.device)):
                raise TypeError(f"a {type(self.device).__name__} is no device")
            float(torch.zeros((), device=self.device))  # "meta" has no values
        except (AssertionError, RuntimeError, NotImplementedError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device must be one that PyTorch can use here, got device={self.device!r}: {reason}"
            ) from None
        return norm, None if bound is None else float(bound)

    def _missing(self) -> float:
        missing: Any = self.missing_values
        if missing is None or type(missing).__name__ == "NAType":  # pandas' NA
            return math.nan
        if not _is_real(missing) or math.isinf(missing):
            raise ValueError(f"missing_values must be NaN or a finite number, got missing_values={missing!r}")
        return float(missing)

    def _observe(self, X: Any, *, reset: bool) -> Observations:
        """The observed entries of X (m, n), with n as fitted unless `reset`."""
        self._check_parameters()
        missing = self._missing()
        if scipy.sparse.issparse(X):
            X = validate_data(
                self, X, accept_sparse=True, dtype="numeric", ensure_all_finite=False, reset=reset
            )
            return from_sparse(X, missing_values=missing, duplicates=self.duplicates)
        if hasattr(X, "iloc") and hasattr(X, "columns"):  # a data frame
            dense = type(X)(frame_as_array(X, missing), index=X.index, columns=X.columns)
            X, missing = dense, math.nan
        elif isinstance(X, np.ma.MaskedArray):
            X = np.ma.filled(X.astype(np.float64), missing)
        X = validate_data(self, X, dtype="numeric", ensure_all_finite=False, reset=reset)
        return from_dense(X, missing_values=missing)

    def _forget_names(self, n: int) -> None:
        self.n_features_in_ = n
        if hasattr(self, "feature_names_in_"):
            del self.feature_names_in_

    def _problem(self, standard: Observations, norm: Norm, k: int) -> Problem:
        entries = Entries.of(standard, device=torch.device(self.device), dtype=_DTYPES[self.dtype])
        popular = self.weighting == "popularity"
        return Problem(
            entries=entries,
            k=k,
            norm=norm,
            parametrization=self.parametrization,
            weights=Weights.by_popularity(entries) if popular else Weights.ones(entries),
            ridge=selection.bias_ridge(entries) if self.bias == "joint" else None,
            max_iter=int(self.max_iter),
            tol=float(self.tol),
        )

    def _select(
        self, standard: Observations, norm: Norm, k: int, radius: float | None, watch: Watch
    ) -> selection.Selection | None:
        """The rank and the bound by held-out entries; None where there are too few to hold any out."""
        if self.cv is None and len(standard) < _FEWEST:
            return None
        splits = []
        for fitted, held_out in self._held_out(len(standard)):
            if len(fitted) == 0 or len(held_out) == 0:
                raise ValueError(
                    "cv must leave entries on both sides of every split, "
                    f"got {len(fitted)} to fit and {len(held_out)} held out"
                )
            problem = self._problem(standard.only(fitted), norm, k)
            rest = Entries.of(
                standard.only(held_out), device=torch.device(self.device), dtype=_DTYPES[self.dtype]
            )
            splits.append(selection.Split(problem, rest))
        return selection.select(
            splits, two_stage=self.rank_selection == "two-stage", radius=radius, watch=watch
        )

    def _held_out(self, count: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Pairs of positions, to fit and to hold out."""
        cv = self.cv
        random_state = check_random_state(self.random_state)
        if cv is None:
            cv = ShuffleSplit(1, test_size=0.1, random_state=random_state)
        elif isinstance(cv, numbers.Integral):
            cv = KFold(int(cv), shuffle=True, random_state=random_state)
        try:
            splits = [
                (np.asarray(fitted), np.asarray(held_out))
                for fitted, held_out in check_cv(cv).split(np.arange(count)[:, None])
            ]
        except TypeError as error:
            raise ValueError(
                f"cv must be a number of folds, a splitter or pairs of positions, got cv={self.cv!r}: {error}"
            ) from None
        if not splits:
            raise ValueError(f"cv must give at least one split, got cv={self.cv!r}")
        for fitted, held_out in splits:
            both = np.concatenate([fitted, held_out])
            inside = both.dtype.kind in "iu" and len(both) and both.min() >= 0 and both.max() < count
            if not inside or len(np.unique(both)) < len(both):
                raise ValueError(
                    f"cv must split positions from 0 to {count - 1}, each at most once, got a split of "
                    f"{len(fitted)} and {len(held_out)} that does not"
                )
        return splits

    def _last_solution(self, problem: Problem, unit: float, centre: float) -> selection.Solution:
        """In the units of this problem; what is new in rows, columns and rank is zero."""
        (m, n), k = problem.entries.shape, problem.k
        biased = problem.ridge is not None
        like = problem.entries.values

        def padded(array: Any, length: int) -> torch.Tensor:
            old = torch.as_tensor(array).to(like)[:length]
            result = like.new_zeros(length, *old.shape[1:])
            result[: len(old)] = old
            return result

        left = padded(padded(self.row_factors_.T, k).T, m) / (unit * problem.weights.row[:, None])
        right = padded(padded(self.components_, k).T, n) / problem.weights.column[:, None]
        model = Model.balanced(
            LowRank(left, right.mT),
            padded(self.row_bias_, m) / unit * biased,
            padded(self.column_bias_, n) / unit * biased,
            like.new_tensor((self.offset_ - centre) / unit * biased),
        )
        # a multiplier goes with the number of entries
        largest = self._largest / unit * len(problem.entries) / len(self._observations)
        ridge = problem.ridge
        if ridge is not None and self._ridge is not None:
            ridge = self._ridge.scaled(unit**-2)
        return selection.Solution(model, self._share, largest, ridge)

    def _store(self, problem: Problem, model: Model, radius: float, unit: float, centre: float) -> None:
        """The learned attributes, with the norm measured and below the bound."""
        row_weight, column_weight = (w.double().cpu() for w in vars(problem.weights).values())
        # what was never observed is left to the biases; that makes no norm larger
        left, right, row_bias, column_bias = (
            torch.where(count[:, None] > 0, factor.reshape(len(count), -1), 0.0).double().cpu()
            for factor, count in (
                (model.left, problem.entries.row_counts),
                (model.right, problem.entries.mT.row_counts),
                (model.row_bias, problem.entries.row_counts),
                (model.column_bias, problem.entries.mT.row_counts),
            )
        )
        u, sigma, v = LowRank(left, right.mT).svd()
        # inside by what rounding to the stored precision may add
        rounding = 4 * torch.finfo(_DTYPES[self.dtype]).eps
        sigma = problem.norm.project(sigma, torch.tensor(radius * (1 - rounding), dtype=torch.float64))
        largest = float(sigma[0])
        kept = sigma > max(*problem.entries.shape) * torch.finfo(_DTYPES[self.dtype]).eps * largest
        u, sigma, v = u[:, kept], sigma[kept], v[:, kept]
        dtype = np.dtype(self.dtype)
        self.row_factors_ = (u * sigma * unit * row_weight[:, None]).numpy().astype(dtype)
        self.components_ = (v * column_weight[:, None]).mT.numpy().astype(dtype)
        self.singular_values_ = (sigma * unit).numpy()
        self.rank_ = int(kept.sum())
        self.bound_ = float(radius * unit)
        self._biased = biased = problem.ridge is not None
        self.row_bias_ = row_bias[:, 0].numpy() * unit
        self.column_bias_ = column_bias[:, 0].numpy() * unit
        self.offset_ = float(model.offset) * unit + centre if biased else 0.0
        self.certificate_ = _certificate(
            problem.norm,
            self.row_factors_ / row_weight.numpy()[:, None],
            self.components_ / column_weight.numpy(),
            self.bound_,
        )
        if not self.certificate_.holds:
            raise ArithmeticError(
                f"the {problem.norm.name} norm must be at most the bound {self.bound_:.9g}, "
                f"got {self.certificate_.norm:.9g}"
            )

    def _store_selection(self, chosen: selection.Selection | None, unit: float) -> None:
        self.validation_rmse_: float | None = None
        self.validation_table_: list[dict[str, float]] = []
        self._errors: Array | None = None
        if chosen is not None:
            self.validation_rmse_ = chosen.best.rmse * unit
            self.validation_table_ = [
                {"rank": one.k, "bound": one.radius * unit, "rmse": one.rmse * unit}
                for one in chosen.candidates
            ]
            self._errors = np.sort(chosen.best.errors) * unit

    def _say(self, stage: str, watch: Watch) -> None:
        if self.verbose:
            print(f"[NBMatrixCompletion] {stage}")
        report = self.on_progress
        if report is not None:
            watch.report = lambda loss: report(stage, loss)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name != "on_progress"}

    # --- using -----------------------------------------------------------------------------------

    def predict(self, rows: Any, cols: ArrayLike | None = None) -> NDArray[np.float64]:
        """The completed matrix at some places, also observed ones; or all of it for the rows of a matrix.

        Parameters
        ----------
        rows, cols : (N,) indices of the matrix of the last fit. Without `cols`, the first argument is a
            matrix (rows, n) as for `transform`.

        Returns
        -------
        (N,), or (rows, n): what `transform` gives with `keep_observed=False`.
        """
        check_is_fitted(self)
        if cols is None:
            given = self._observe(rows, reset=False)
            return self._dense(self._recognised(given))
        places = from_places(rows, cols, self._observations.shape)
        return self._values(self._row_coefficients(), *places)

    def predict_interval(
        self, rows: ArrayLike, cols: ArrayLike, coverage: float = 0.9
    ) -> NDArray[np.float64]:
        """Intervals that contain an entry, as it would be observed, with some probability.

        Split conformal prediction: `predict` plus or minus a quantile of the absolute errors of the entries
        that were held out to choose rank and bound, as measured by the fit without them. The probability is
        over entries drawn like the observed ones, and an average over all of them. It is exact for that fit;
        the one on all entries, in whose middle the intervals lie, is at least as good.

        Parameters
        ----------
        rows, cols : (N,) indices of the matrix of the last fit.
        coverage : in (0, 1).

        Returns
        -------
        (N, 2) lower and upper ends, infinite where too few entries were held out for the coverage.
        """
        check_is_fitted(self)
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must be in (0, 1), got coverage={coverage!r}")
        if self._errors is None:
            raise ValueError(
                'an interval needs entries that were held out: bound="auto" or rank_selection="two-stage", '
                f"and at least {_FEWEST} entries; got bound={self.bound!r}, "
                f"rank_selection={self.rank_selection!r} and {len(self._observations)} entries"
            )
        place = math.ceil((len(self._errors) + 1) * coverage)
        width = self._errors[place - 1] if place <= len(self._errors) else math.inf
        middle = self.predict(rows, cols)
        return np.stack([middle - width, middle + width], axis=1)

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Complete rows.

        A row with the very entries of a row of the last fit is that row. Others are folded in: a ridge
        regression on the columns' factors, whose ridge is the prior that the fitted rows suggest. Each row
        by itself. A row without entries gets offset and column biases.

        Parameters
        ----------
        X : (rows, n) as for `fit`.

        Returns
        -------
        (rows, n) without missing entries; observed ones as they are, if `keep_observed`.
        """
        check_is_fitted(self)
        given = self._observe(X, reset=False)
        return self._completed(given, self._recognised(given))

    def fit_transform(self, X: Any, y: None = None) -> NDArray[np.float64]:
        """Fit to X and complete it."""
        if hasattr(X, "shape") and len(X.shape) == 2:
            refuse_what_does_not_fit(X.shape, np.dtype(np.float64).itemsize)
        self.fit(X)
        return self._completed(self._observations, self._row_coefficients())

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the root mean squared error, for model selection over rows.

        Parameters
        ----------
        X : (rows, n) as for `transform`.
        y : (rows, n) true values of some entries, in any form that `fit` takes. Without it a fifth of each
            row's entries, at least one of two, is hidden, predicted from the others and scored; rows should
            then be new. Labels as a pipeline has them, one-dimensional or one column where X has several, are
            no truth about X and ignored.

        Returns
        -------
        minus the error at the entries of y, or the hidden ones.
        """
        check_is_fitted(self)
        given = self._observe(X, reset=False)
        shape = None if y is None else getattr(y, "shape", np.shape(y))
        if shape is None or len(shape) == 1 or shape[1:] == (1,) != given.shape[1:]:
            hidden = _hidden(given)
            given, truth = given.only(~hidden), given.only(hidden)
        else:
            truth = self._observe(y, reset=False)
            if truth.shape != given.shape:
                raise ValueError(f"y must have the shape of X, {given.shape}, got {truth.shape}")
        if len(truth) == 0:
            raise ValueError(
                "a score needs a true value to compare with: y with entries, or a row of X with two; got none"
            )
        predicted = self._values(self._recognised(given), truth.rows, truth.columns)
        return -float(np.sqrt(np.mean((predicted - truth.values) ** 2)))

    def _design(self) -> tuple[Array, Array]:
        """(n, d) factors of the columns, and (n,) what every row has; the coefficients of rows are (m, d)."""
        design = self.components_.T.astype(np.float64)
        if self._biased:
            design = np.concatenate([design, np.ones((len(design), 1))], axis=1)
        return design, self.column_bias_ + self.offset_

    def _row_coefficients(self) -> Array:
        """(m, d) of the fitted rows."""
        left: Array = self.row_factors_.astype(np.float64)
        if self._biased:
            left = np.concatenate([left, self.row_bias_[:, None]], axis=1)
        return left

    def _values(self, coefficients: Array, rows: Array, columns: Array) -> NDArray[np.float64]:
        design, known = self._design()
        values = known[columns].astype(np.float64)
        for first in range(0, len(rows), _BATCH):
            part = slice(first, first + _BATCH)
            values[part] += np.einsum("nd,nd->n", coefficients[rows[part]], design[columns[part]])
        return values

    def _dense(self, coefficients: Array) -> NDArray[np.float64]:
        design, known = self._design()
        refuse_what_does_not_fit((len(coefficients), len(design)), np.dtype(np.float64).itemsize)
        completed: NDArray[np.float64] = coefficients @ design.T
        completed += known
        return completed

    def _completed(self, given: Observations, coefficients: Array) -> NDArray[np.float64]:
        completed = self._dense(coefficients)
        if self.keep_observed:
            completed[given.rows, given.columns] = given.values
        return completed

    def _recognised(self, given: Observations) -> Array:
        """(rows, d) coefficients: those of the fit for its own rows, and folded in for others."""
        coefficients = np.zeros((given.shape[0], len(self._design()[0].T)))
        known = self._find_rows(given)
        coefficients[known >= 0] = self._row_coefficients()[known[known >= 0]]
        starts = given.row_starts()
        new = np.flatnonzero((known < 0) & (np.diff(starts) > 0))
        if len(new):
            place = np.full(given.shape[0], -1)
            place[new] = np.arange(len(new))
            chosen = place[given.rows] >= 0
            rows = Observations(
                (len(new), given.shape[1]),
                place[given.rows[chosen]],
                given.columns[chosen],
                given.values[chosen],
            )
            coefficients[new] = fold_in(rows, *self._design(), self._row_prior())
        return coefficients

    def _find_rows(self, given: Observations) -> NDArray[np.int64]:
        """(rows,) the row of the last fit with exactly these entries, or -1; -1 without entries."""
        fitted = self._observations
        fitted_starts, starts = fitted.row_starts(), given.row_starts()
        if "rows" not in self._made_once:
            rows_of: dict[int, list[int]] = {}
            for row, key in enumerate(row_keys(fitted)):
                rows_of.setdefault(int(key), []).append(row)
            self._made_once["rows"] = rows_of
        known_rows = cast("dict[int, list[int]]", self._made_once["rows"])
        found = np.full(given.shape[0], -1)
        for row, key in enumerate(row_keys(given)):
            entries = slice(starts[row], starts[row + 1])
            if starts[row] == starts[row + 1]:
                continue
            for candidate in known_rows.get(int(key), ()):
                there = slice(fitted_starts[candidate], fitted_starts[candidate + 1])
                if np.array_equal(fitted.columns[there], given.columns[entries]) and np.array_equal(
                    fitted.values[there], given.values[entries]
                ):
                    found[row] = candidate
                    break
        return found

    def _row_prior(self) -> RowPrior:
        if "prior" not in self._made_once:
            observed = self._observations
            filled = np.diff(observed.row_starts()) > 0
            coefficients = self._row_coefficients()
            residual = observed.values - self._values(coefficients, observed.rows, observed.columns)
            free = (self.rank_ + self._biased) * sum(observed.shape)
            noise = fitting.residual_variance(float(residual @ residual), len(residual), free)
            if self.validation_rmse_ is not None:
                noise = max(noise, self.validation_rmse_**2)
            self._made_once["prior"] = RowPrior.of(coefficients[filled], noise)
        return cast(RowPrior, self._made_once["prior"])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.allow_nan = True
        return tags


_FEWEST = 10  # entries of which some can be held out
_BATCH = 1 << 18  # places predicted at once


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _certificate(norm: Norm, left: Array, right: Array, bound: float) -> LayerCertificate:
    update = LowRank(torch.as_tensor(left), torch.as_tensor(right))
    sigma = update.singular_values()
    return LayerCertificate(
        name="completed matrix",
        shape=(update.shape[0], update.shape[1]),
        rank=update.rank,
        singular_values=tuple(sigma.tolist()),
        norm=norm.value(sigma).item() if len(sigma) else 0.0,
        bound=bound,
    )


def _cautious_radius(problem: Problem, watch: Watch) -> float:
    """A norm for where no entry can be held out: at a tenth of the multiplier from which on Y is zero."""
    model = fitting.spectral_start(problem, watch)
    largest = fitting.largest_multiplier(problem, model)
    if not largest > 0:
        return 0.0
    problem = replace(problem, size=float(problem.norm.value(model.sigma)))
    _, model = fitting.settle(problem, model, 0.1 * largest, watch, selection.SWEEPS, learn=True)
    return float(problem.norm.value(model.sigma))


def _hidden(given: Observations) -> NDArray[np.bool_]:
    """(N,) a fifth of the entries of each row, at least one where there are two; always the same."""
    order = np.random.default_rng(0).random(len(given))
    starts = given.row_starts()
    counts = np.diff(starts)
    place = np.empty(len(given), dtype=np.int64)
    place[np.lexsort((order, given.rows))] = np.arange(len(given))
    within = place - starts[given.rows]
    quota = np.where(counts >= 2, np.maximum(counts // 5, 1), 0)
    hidden: NDArray[np.bool_] = within < quota[given.rows]
    return hidden


def _warn_of_empty(observed: Observations) -> None:
    m, n = observed.shape
    for name, count, index in (("rows", m, observed.rows), ("columns", n, observed.columns)):
        empty = np.flatnonzero(np.bincount(index, minlength=count) == 0)
        if len(empty):
            named = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            warnings.warn(
                f"{len(empty)} {name} have no observed entry and are predicted by biases alone: {named}",
                UserWarning,
                stacklevel=4,
            )
