"""What one task of a stack does in a worker: fits a clone of a base model, and predicts the rows that it never saw.

Step by step as scikit-learn's `cross_val_predict` and `StackingClassifier.fit` do it, so that results are theirs to the
bit.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graftstack.data.splits import Rows
from graftstack.errors import RunError, StorageError
from graftstack.stacking.folds import Fold
from graftstack.stacking.inner_jobs import limited_jobs
from graftstack.stacking.ledger import Ledger
from graftstack.stacking.work import FoldResult, RefitResult, RowSource

# Methods with a column for each class: they learn from encoded labels, so that columns are alike in all folds.
_BY_CLASS = ("decision_function", "predict_proba", "predict_log_proba")


class Target(NamedTuple):
    """What a base learns to predict."""

    values: Any
    num_classes: tuple[int, ...] | None
    """Classes in all rows, one number for labels [N], one for each column of labels [N, L]; None: not encoded."""


class Job(NamedTuple):
    """One fit, but for the large values that all of them share."""

    estimator: Any
    """Unfitted."""
    method: str
    fold: int | None
    """Position among the folds; None: all rows, or `rows`."""
    rows: Rows | None
    """What a refit learns from; None: all rows."""
    keeps_model: bool
    """Whether a fold's model is wanted too."""
    num_classes: tuple[int, ...] | None
    config: Mapping[str, Any]
    """scikit-learn's configuration where the stack is made; workers have their own."""
    ledger: Ledger | None
    key: str | None
    """Under which the ledger stores the result; None: nowhere."""
    fit_params: tuple[str, ...] = ()
    """Names of what `fit` gets beside X and y."""


class Done(NamedTuple):
    """A fit that succeeded."""

    result: FoldResult | RefitResult
    not_stored: str | None
    """Why the ledger can't take the result, wherever it is written; None: it can, though it need not be there yet."""


def encoded_target(y: Any, method: str) -> Target:
    """Returns `y` as fold models learn it: as positions of classes where `method` has a column for each class."""
    if method not in _BY_CLASS or y is None:
        return Target(y, None)
    labels = np.asarray(y)
    if labels.ndim == 1:
        classes, codes = np.unique(labels, return_inverse=True)
        is_encoded = isinstance(y, np.ndarray) and y.dtype == codes.dtype and np.array_equal(y, codes)
        return Target(y if is_encoded else codes, (len(classes),))  # the same object is shared once
    codes = np.zeros_like(labels, dtype=int)
    num_classes = []
    for column in range(labels.shape[1]):
        classes, codes[:, column] = np.unique(labels[:, column], return_inverse=True)
        num_classes.append(len(classes))
    return Target(codes, tuple(num_classes))


def run(job: Job, X: Any, y: Any, folds: Sequence[Fold], *fit_params: Any) -> Done:  # noqa: N803
    """Fits a base, predicts a fold's rows unless it is a refit, and stores the result where there is a ledger.

    A ledger that can't be written from here is left to the driver, which can't go on without it.

    Args:
        job: What is fitted.
        X: All rows of the view.
        y: What each row is to be predicted as.
        folds: All of the level.
        *fit_params: Values, in the order of `job.fit_params`.

    Raises:
        Exception: what the estimator raises.
    """
    from sklearn import config_context

    params = dict(zip(job.fit_params, fit_params, strict=True))
    with config_context(**job.config):
        result = _refitted(job, X, y, params) if job.fold is None else _of_fold(job, X, y, folds, params)
    if job.ledger is None or job.key is None:
        return Done(result, None)
    try:
        return Done(result, job.ledger.write(job.key, result, job.estimator))
    except (StorageError, RunError, OSError):
        return Done(result, None)


def _of_fold(job: Job, X: Any, y: Any, folds: Sequence[Fold], fit_params: Mapping[str, Any]) -> FoldResult:  # noqa: N803
    from sklearn.base import clone

    assert job.fold is not None
    fold, estimator = folds[job.fold], clone(job.estimator)
    with limited_jobs(estimator):
        fit_s = _fit(estimator, X, y, fold.train, fit_params)
        tested = _split(estimator, X, None, fold.test, fold.train)[0]
        began = time.perf_counter()
        predictions = getattr(estimator, job.method)(tested)
        predict_s = time.perf_counter() - began
    if job.num_classes is not None:
        predictions = _in_order(estimator, predictions, job.num_classes, job.method)
    for part in predictions if isinstance(predictions, list) else [predictions]:
        num = part.shape[0] if hasattr(part, "shape") else len(part)
        if num != len(fold.test):
            raise ValueError(f"{job.method} of {len(fold.test)} rows returned {num}")
    return FoldResult(predictions, fit_s, predict_s, estimator if job.keeps_model else None)


def _refitted(job: Job, X: Any, y: Any, fit_params: Mapping[str, Any]) -> RefitResult:  # noqa: N803
    from sklearn.base import clone

    estimator = clone(job.estimator)
    with limited_jobs(estimator):
        fit_s = _fit(estimator, X, y, job.rows, fit_params)
    return RefitResult(estimator, fit_s)


def _fit(estimator: Any, X: Any, y: Any, rows: Rows | None, fit_params: Mapping[str, Any]) -> float:  # noqa: N803
    """Fits an estimator to `rows`, or to `X` and `y` as they are; returns how many seconds that took."""
    from sklearn.utils.validation import _check_method_params

    params = dict(fit_params)
    if rows is not None:
        params = _check_method_params(X, params=params, indices=rows) if params else {}
        X, y = _split(estimator, X, y, rows)  # noqa: N806
    began = time.perf_counter()
    try:
        # What it returns isn't asked: some estimators forget to return themselves.
        estimator.fit(X, **params) if y is None else estimator.fit(X, y, **params)
    except TypeError as error:
        if "unexpected keyword argument 'sample_weight'" in str(error):
            name = type(estimator).__name__
            raise TypeError(f"Underlying estimator {name} does not support sample weights.") from error
        raise
    return time.perf_counter() - began


def _split(estimator: Any, X: Any, y: Any, rows: Rows, train: Rows | None = None) -> tuple[Any, Any]:  # noqa: N803
    """Returns `rows` of X and y; `train`: the columns of a precomputed kernel."""
    from sklearn.utils._indexing import _safe_indexing
    from sklearn.utils.metaestimators import _safe_split

    if isinstance(X, RowSource):
        return X.take(rows), None if y is None else _safe_indexing(y, rows)
    split: tuple[Any, Any] = _safe_split(estimator, X, y, rows, train)
    return split


def _in_order(fitted: Any, predictions: Any, num_classes: tuple[int, ...], method: str) -> Any:
    """Returns predictions with a column for each class, those that the fold's training rows lack among them."""
    from sklearn.model_selection._validation import _enforce_prediction_order as in_order

    if isinstance(predictions, list):
        return [
            in_order(fitted.classes_[column], part, n_classes=num_classes[column], method=method)
            for column, part in enumerate(predictions)
        ]
    total = num_classes[0] if len(num_classes) == 1 else len(num_classes)
    found: npt.NDArray[Any] = in_order(fitted.classes_, predictions, total, method)
    return found
