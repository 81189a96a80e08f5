"""What scikit-learn's `_BaseStacking` does in two barriers, refits and then folds, done as one graph without any."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from inspect import Parameter, signature
from numbers import Integral
from os import PathLike, fspath
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np
from joblib import effective_n_jobs
from scipy import sparse
from sklearn.base import _fit_context, is_classifier, is_regressor
from sklearn.ensemble._base import _fit_single_estimator
from sklearn.ensemble._stacking import _BaseStacking
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, check_cv
from sklearn.utils import Bunch, _safe_indexing, indexable
from sklearn.utils.metadata_routing import (
    MetadataRouter,
    MethodMapping,
    _manual_routing,
    _routing_enabled,
    process_routing,
)
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import _check_feature_names_in, _check_method_params, check_is_fitted

from graftstack.errors import DataError
from graftstack.runtime import EXECUTORS, Executor, InlineExecutor
from graftstack.stacking.assemble import beside, meta_blocks, out_of_fold
from graftstack.stacking.crossfit import CrossFit, Progress, cross_fit
from graftstack.stacking.folds import Folds, from_splitter
from graftstack.stacking.inner_jobs import num_threads_of
from graftstack.stacking.ledger import Ledger
from graftstack.stacking.work import BaseModel
from graftstack.storage import Folder

Named = tuple[str, Any]
"""A base model's name, and its estimator or 'drop'."""

_VIEW = "X"

# What nobody has written to for so long, nobody will finish.
_UNFINISHED_S = 3600.0


class FittedLevel(NamedTuple):
    """The models of one level, and what each is asked."""

    names: tuple[str, ...]
    models: tuple[Any, ...]
    methods: tuple[str, ...]

    def predictions(self, inputs: Any) -> list[Any]:
        """Returns what each model says of X [N, F], or of the features [N, G] that the level below makes of it."""
        return [getattr(model, method)(inputs) for model, method in zip(self.models, self.methods, strict=True)]


class GraphStacking(_BaseStacking):  # type: ignore[misc]
    """Stands right before `_BaseStacking` in the order of bases, and replaces its `fit`."""

    levels_: tuple[FittedLevel, ...]
    dropped_: dict[str, str]
    estimators_: list[Any]
    stack_method_: list[str]

    @_fit_context(prefer_skip_nested_validation=False)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any, **fit_params: Any) -> Any:  # noqa: N803 - scikit-learn's name
        """Fits base models on X [N, F] and y [N] or [N, outputs], and the final estimator on what they predict."""
        levels = self._named_levels()
        self._validate_final_estimator()
        if isinstance(self.cv, str) and self.cv == "prefit":
            return self._fit_on_prefit(X, y, fit_params)
        routed = self._routed(fit_params, [name for level in levels for name, _ in level])
        bases = [[self._base(name, model, routed[name]["fit"]) for name, model in _kept(level)] for level in levels]
        rows, _ = indexable(X, y)
        folds = self._folds(rows, y)
        with _opened(self.executor, self.n_jobs) as executor:
            fitted = cross_fit(
                bases,
                {_VIEW: rows},
                y,
                folds,
                executor=executor,
                ledger=None if self.ledger is None else _ledger_at(self.ledger),
                mode=self.mode,
                passthrough=_VIEW if self.passthrough else None,
                on_error=self.on_error,
                raw_errors=True,
                time_limit_s=self.time_limit_s,
                tell=_say if self.verbose else lambda _: None,
            )
        self._keep(levels, fitted)
        return self._fit_final_estimator(rows, y, fit_params, fitted)

    def _folds(self, rows: Any, y: Any) -> Folds:
        """Returns folds that keep groups together. Raises `ValueError`."""
        folds = from_splitter(self._splitter(y), rows, y, self._groups)
        try:
            folds.check(self._groups)
        except DataError as error:
            raise ValueError(str(error)) from error
        return folds

    def _splitter(self, y: Any) -> Any:
        num = 5 if self.cv is None else self.cv
        if self._groups is None or not isinstance(num, Integral):
            # A copy: the random state of the caller's splitter stays where it is, as it does in scikit-learn.
            return deepcopy(check_cv(self.cv, y=y, classifier=is_classifier(self)))
        has_one_label = is_classifier(self) and type_of_target(y) in {"binary", "multiclass"}
        return StratifiedGroupKFold(num) if has_one_label else GroupKFold(num)

    def _named_levels(self) -> list[list[Named]]:
        """Returns the estimators of every level. Raises `ValueError`."""
        names, estimators = self._validate_estimators()
        above = [self._checked(level) for level in self.levels]
        if above:
            self._validate_names([*names, *(name for level in above for name, _ in level)])
        return [list(zip(names, estimators, strict=True)), *above]

    def _checked(self, level: Any) -> list[Named]:
        if not is_level(level):
            raise ValueError(
                f"Invalid 'levels' attribute, each level should be a non-empty list of (string, estimator) tuples. "
                f"Got {level!r}"
            )
        if not _kept(level):
            raise ValueError("All estimators of a level are dropped. At least one is required to be an estimator.")
        for _, estimator in _kept(level):
            if is_regressor(self) and not is_regressor(estimator):
                raise ValueError(f"The estimator {type(estimator).__name__} should be a regressor.")
        return [(name, estimator) for name, estimator in level]

    def _fit_on_prefit(self, X: Any, y: Any, fit_params: dict[str, Any]) -> Any:  # noqa: N803
        """Fits the final estimator alone, as scikit-learn does; there are no folds."""
        if self.mode == "bag":
            raise ValueError("mode='bag' keeps the models of folds and cv='prefit' has no folds; use mode='refit'")
        if self.levels:
            raise ValueError("levels above the first learn from folds and cv='prefit' has no folds; use levels=()")
        self._forget("oof_", "folds_")
        self.dropped_ = {}
        super().fit(X, y, **fit_params)
        names = tuple(name for name, _ in _kept(self.estimators))
        self.levels_ = (FittedLevel(names, tuple(self.estimators_), tuple(self.stack_method_)),)
        return self

    def _routed(self, fit_params: dict[str, Any], names: Iterable[str]) -> Any:
        """Returns what of `fit_params` each estimator's `fit` gets."""
        if _routing_enabled():
            return process_routing(self, "fit", **fit_params)
        weights = {key: value for key, value in fit_params.items() if key == "sample_weight"}
        return _manual_routing({name: {"fit": weights} for name in names})

    def _base(self, name: str, estimator: Any, fit_params: dict[str, Any]) -> BaseModel:
        if "sample_weight" in fit_params and not _takes(estimator.fit, "sample_weight"):
            raise TypeError(f"Underlying estimator {type(estimator).__name__} does not support sample weights.")
        return BaseModel(
            name=name,
            estimator=estimator,
            method=self._method_name(name, estimator, self.stack_method),
            view=_VIEW,
            fit_params=fit_params,
            num_threads=num_threads_of(estimator),
        )

    def _keep(self, levels: Sequence[Sequence[Named]], fitted: CrossFit) -> None:
        """Takes over the fitted models, under scikit-learn's names for those of the first level."""
        self.levels_ = tuple(
            FittedLevel(
                tuple(one.base.name for one in level),
                tuple(one.model for one in level),
                tuple(one.base.method for one in level),
            )
            for level in fitted.levels
        )
        self.folds_ = fitted.folds[-1]
        self.dropped_ = dict(fitted.dropped)
        first = self.levels_[0]
        self.estimators_ = list(first.models)
        self.stack_method_ = list(first.methods)
        models = {name: model for level in self.levels_ for name, model in zip(level.names, level.models, strict=True)}
        self.named_estimators_ = Bunch(**{name: models.get(name, "drop") for level in levels for name, _ in level})
        self._forget("feature_names_in_")
        for model in first.models:
            if hasattr(model, "feature_names_in_"):
                self.feature_names_in_ = model.feature_names_in_

    def _forget(self, *attributes: str) -> None:
        """Takes away what an earlier fit left."""
        for name in attributes:
            if hasattr(self, name):
                delattr(self, name)

    def _fit_final_estimator(self, rows: Any, y: Any, fit_params: dict[str, Any], fitted: CrossFit) -> Any:
        """Fits it on the rows that the folds of the highest level cover."""
        predictions = [out_of_fold(one, self.folds_) for one in fitted.levels[-1]]
        blocks = self._blocks(self.levels_[-1].methods, predictions)
        self._n_feature_outs = [block.shape[1] for block in blocks]
        self.oof_ = np.hstack(blocks)
        covered = self.folds_.covered
        if len(covered) < self.folds_.num_rows:
            fit_params = _check_method_params(rows, params=fit_params, indices=covered)
            rows, y = _safe_indexing(rows, covered), _safe_indexing(y, covered)
        features = self._with_passthrough(self.oof_, rows)
        _fit_single_estimator(self.final_estimator_, features, y, fit_params=fit_params)
        return self

    def _blocks(self, methods: Sequence[str], predictions: Sequence[Any]) -> Any:
        return meta_blocks(predictions, methods, len(self.classes_) if is_classifier(self) else 0)

    def _concatenate_predictions(self, X: Any, predictions: Sequence[Any]) -> Any:  # noqa: N803
        """Returns what the final estimator is fed; scikit-learn asks for it where estimators are fitted already."""
        blocks = self._blocks(self.stack_method_, predictions)
        self._n_feature_outs = [block.shape[1] for block in blocks]
        return self._with_passthrough(np.hstack(blocks), X)

    def _with_passthrough(self, features: Any, rows: Any) -> Any:
        """Returns what the final estimator is fed, as scikit-learn makes it: of a DataFrame, too, an array."""
        return beside(features, rows if sparse.issparse(rows) else np.asarray(rows)) if self.passthrough else features

    def _transform(self, X: Any) -> Any:  # noqa: N803 - scikit-learn's name
        """Returns what the final estimator is fed, [N, G]."""
        check_is_fitted(self)
        below, highest = self.levels_[:-1], self.levels_[-1]
        inputs = X
        for level in below:
            features = np.hstack(self._blocks(level.methods, level.predictions(inputs)))
            inputs = beside(features, X) if self.passthrough else features
        return self._with_passthrough(np.hstack(self._blocks(highest.methods, highest.predictions(inputs))), X)

    def get_feature_names_out(self, input_features: Any = None) -> Any:
        """Returns scikit-learn's names of the features that the final estimator is fed, [G]."""
        check_is_fitted(self, "n_features_in_")
        input_features = _check_feature_names_in(self, input_features, generate_names=self.passthrough)
        prefix = type(self).__name__.lower()
        names = []
        for name, width in zip(self.levels_[-1].names, self._n_feature_outs, strict=True):
            names += [f"{prefix}_{name}{place if width > 1 else ''}" for place in range(width)]
        return np.concatenate((names, input_features)) if self.passthrough else np.asarray(names, dtype=object)

    def get_metadata_routing(self) -> MetadataRouter:
        """Returns where metadata goes: to the `fit` of base models, and the `predict` of the final estimator."""
        router = super().get_metadata_routing()
        for name, estimator in named_above(self.levels):
            router.add(**{name: estimator}, method_mapping=MethodMapping().add(callee="fit", caller="fit"))
        return router


def named_above(levels: Any) -> list[Named]:
    """Returns names and estimators of the levels above the first; those of a malformed level are left out."""
    known = levels if isinstance(levels, list | tuple) else ()
    return [(name, estimator) for level in known if is_level(level) for name, estimator in level]


def is_level(level: Any) -> bool:
    """Returns whether `level` lists names and estimators."""
    return (
        isinstance(level, list | tuple)
        and len(level) > 0
        and all(isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str) for entry in level)
    )


def _kept(level: Sequence[Named]) -> list[Named]:
    return [(name, estimator) for name, estimator in level if not (isinstance(estimator, str) and estimator == "drop")]


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = signature(function).parameters
    return name in parameters or any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())


def _ledger_at(path: str | PathLike[str]) -> Ledger:
    """Opens a ledger, which others may have open too; removes what killed writers left there."""
    folder = Folder(fspath(path))
    folder.sweep(older_than_s=_UNFINISHED_S)
    return Ledger(folder)


@contextmanager
def _opened(executor: Executor | str | None, n_jobs: int | None) -> Iterator[Executor]:
    """Gives an executor; one that is made here is closed at the end."""
    if executor is not None and not isinstance(executor, str):
        yield executor
        return
    num_slots = effective_n_jobs(n_jobs)
    if executor is None and num_slots == 1:
        yield InlineExecutor()
        return
    name = executor or "processes"
    takes_all = name == "inline" or (executor is not None and n_jobs in {None, -1})
    opened = resolve_name(EXECUTORS[name])(*([] if takes_all else [num_slots]))
    try:
        yield opened
    finally:
        opened.close()


def _say(progress: Progress) -> None:
    if progress.just_ended:
        sys.stderr.write(f"{progress.done} of {progress.total}: {progress.just_ended}\n")
