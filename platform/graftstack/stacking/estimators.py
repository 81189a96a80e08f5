"""scikit-learn's stacking estimators, trained as one flat graph of tasks on any executor, with a ledger.

All that scikit-learn says of its own `StackingClassifier` and `StackingRegressor` holds for these, which are subclasses
with more keyword-only parameters: for deterministic base models they learn the same to the bit.
"""

from collections.abc import Sequence
from copy import copy
from numbers import Real
from os import PathLike
from typing import Any

from sklearn import ensemble
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions

from graftstack.runtime import EXECUTORS, Executor
from graftstack.stacking.crossfit import Mode, OnError
from graftstack.stacking.estimator_fit import GraphStacking, Named, is_level, named_above

_CONSTRAINTS = {
    "executor": [
        None,
        StrOptions(set(EXECUTORS)),
        HasMethods(["share", "submit", "wait", "cancel", "expect", "close"]),
    ],
    "mode": [StrOptions({"refit", "bag"})],
    "levels": [list, tuple],
    "ledger": [None, str, PathLike],
    "on_error": [StrOptions({"raise", "drop"})],
    "time_limit_s": [None, Interval(Real, 0, None, closed="neither")],
}


class _Stacking:
    """Stands before scikit-learn's two classes: what concerns parameters, groups and copies."""

    executor: Executor | str | None
    levels: Sequence[list[Named]]
    _groups: Any = None

    def fit(self, X: Any, y: Any, **fit_params: Any) -> Any:  # noqa: N803 - scikit-learn's name
        """Fits the base models and, on their out-of-fold predictions, the final estimator.

        Args:
            X: Rows [N, F]: an array, a sparse matrix or a DataFrame.
            y: Labels [N] or indicators [N, outputs], or targets [N].
            **fit_params: `groups` [N] says which rows belong together; the others, `sample_weight` [N] among them, are
                scikit-learn's.

        Raises:
            ValueError: a parameter breaks a rule, or the folds don't fit the rows.
            TrainingError: no base model is left, or none was finished within `time_limit_s`.
            Exception: what a base model raised twice, under on_error="raise".
        """
        # On its way through scikit-learn's own `fit`, which knows no groups.
        self._groups = fit_params.pop("groups", None)
        try:
            return super().fit(X, y, **fit_params)  # type: ignore[misc]
        finally:
            del self._groups

    def fit_transform(self, X: Any, y: Any, **fit_params: Any) -> Any:  # noqa: N803 - scikit-learn's name
        """Fits, and returns what the fitted base models say of the same rows: not the out-of-fold predictions."""
        return self.fit(X, y, **fit_params).transform(X)

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: FBT001, FBT002 - scikit-learn's signature
        """Returns the parameters; if deep, also the estimators of all levels by name, and their parameters."""
        params: dict[str, Any] = super().get_params(deep=deep)  # type: ignore[misc]
        for name, estimator in named_above(params["levels"]) if deep else ():
            params[name] = estimator
            if hasattr(estimator, "get_params"):
                params |= {f"{name}__{key}": value for key, value in estimator.get_params(deep=True).items()}
        return params

    def set_params(self, **params: Any) -> Any:
        """Sets parameters, estimators of any level by name, or parameters of these (``name__parameter``)."""
        levels: Any = params.pop("levels", self.levels)
        if any(name in params for name, _ in named_above(levels)):
            levels = [self._replaced(level, params) if is_level(level) else level for level in levels]
        self.levels = levels
        return super().set_params(**params)  # type: ignore[misc]

    @staticmethod
    def _replaced(level: list[Named], params: dict[str, Any]) -> list[Named]:
        return [(name, params.pop(name, estimator)) for name, estimator in level]

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out an executor, which lives in this process only; one given by name stays."""
        state: dict[str, Any] = dict(super().__getstate__())  # type: ignore[call-overload]
        return state if isinstance(self.executor, str) else state | {"executor": None}

    def __sklearn_clone__(self) -> Any:
        """Returns an unfitted copy that has this very executor: it can't be copied."""
        return BaseEstimator.__sklearn_clone__(copy(self)).set_params(executor=self.executor)


class StackingClassifier(_Stacking, ensemble.StackingClassifier, GraphStacking):  # type: ignore[misc]
    """scikit-learn's `StackingClassifier`, whose base models and folds are trained as one graph of tasks.

    ```
    stack = StackingClassifier([("svm", SVC()), ("forest", RandomForestClassifier())], n_jobs=4, ledger="ledger")
    stack.fit(X, y).predict_proba(X_new)
    ```

    Args:
        estimators: As in scikit-learn: names and estimators, or 'drop'.
        final_estimator: As in scikit-learn; None: logistic regression.
        cv: As in scikit-learn; of a number of folds, none splits a group if `fit` is given groups. A splitter that goes
            forward in time, e.g. `TimeSeriesSplit`, is taken too: the final estimator then learns from the rows that it
            tests. Folds that train on a row that they test, or on its group, are refused.
        stack_method: As in scikit-learn.
        n_jobs: Slots, each one thread. None: 1 in this process, and all that there are for a named executor.
        passthrough: As in scikit-learn; levels above the first also see X.
        verbose: Whether a line on stderr tells of each task that ends.
        executor: Where tasks run: "inline", "processes", "ray" or an `Executor`, which is not closed. Those three learn
            the same to the bit, on any number of slots. None: "processes" if `n_jobs` comes to 2 or more, else this
            process with all the threads that libraries take by themselves, as in scikit-learn: on many cores sums of
            BLAS may differ from the others' in their last bits.
        mode: "refit": after cross-validation each base model is fitted on all rows. "bag": the folds' models predict
            together instead.
        levels: Further lists of names and estimators; each level learns from the out-of-fold predictions of the one
            below, and `final_estimator` from those of the highest.
        ledger: A folder that keeps finished tasks: what it holds of the same data and parameters is not trained again.
        on_error: What becomes of a base model that fails twice: "raise", or "drop" it.
        time_limit_s: Seconds after which base models that aren't finished are dropped; None: no limit.

    Attributes:
        oof_: Out-of-fold predictions of the highest level as its final estimator sees them, without X:
            [num_covered, columns]. Like `folds_` there is none if cv="prefit".
        folds_: The folds of the highest level.
        levels_: The fitted models of each level; scikit-learn's `estimators_` and `stack_method_` are the first's.
        dropped_: Names of base models that were dropped, and why; `named_estimators_` has 'drop' for them.
    """

    _parameter_constraints = ensemble.StackingClassifier._parameter_constraints | _CONSTRAINTS  # noqa: SLF001

    def __init__(
        self,
        estimators: list[Named],
        final_estimator: Any = None,
        *,
        cv: Any = None,
        stack_method: str = "auto",
        n_jobs: int | None = None,
        passthrough: bool = False,
        verbose: int = 0,
        executor: Executor | str | None = None,
        mode: Mode = "refit",
        levels: Sequence[list[Named]] = (),
        ledger: str | PathLike[str] | None = None,
        on_error: OnError = "raise",
        time_limit_s: float | None = None,
    ) -> None:
        super().__init__(
            estimators,
            final_estimator,
            cv=cv,
            stack_method=stack_method,
            n_jobs=n_jobs,
            passthrough=passthrough,
            verbose=verbose,
        )
        self.executor = executor
        self.mode = mode
        self.levels = levels
        self.ledger = ledger
        self.on_error = on_error
        self.time_limit_s = time_limit_s


class StackingRegressor(_Stacking, ensemble.StackingRegressor, GraphStacking):  # type: ignore[misc]
    """scikit-learn's `StackingRegressor`; what it has beyond that is as in `StackingClassifier`."""

    _parameter_constraints = ensemble.StackingRegressor._parameter_constraints | _CONSTRAINTS  # noqa: SLF001

    def __init__(
        self,
        estimators: list[Named],
        final_estimator: Any = None,
        *,
        cv: Any = None,
        n_jobs: int | None = None,
        passthrough: bool = False,
        verbose: int = 0,
        executor: Executor | str | None = None,
        mode: Mode = "refit",
        levels: Sequence[list[Named]] = (),
        ledger: str | PathLike[str] | None = None,
        on_error: OnError = "raise",
        time_limit_s: float | None = None,
    ) -> None:
        super().__init__(estimators, final_estimator, cv=cv, n_jobs=n_jobs, passthrough=passthrough, verbose=verbose)
        self.executor = executor
        self.mode = mode
        self.levels = levels
        self.ledger = ledger
        self.on_error = on_error
        self.time_limit_s = time_limit_s
