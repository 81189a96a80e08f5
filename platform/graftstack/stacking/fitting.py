"""From cross-fitted base models to a stack: the meta-model learns from what they say of rows they never saw."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graftstack.config.stack import StackConfig
from graftstack.errors import ConfigError, GraftstackError, TrainingError
from graftstack.reason import reason
from graftstack.runtime import Executor
from graftstack.stacking.assemble import beside, meta_blocks, out_of_fold
from graftstack.stacking.calibration import calibrated
from graftstack.stacking.crossfit import CrossFit, Progress, cross_fit
from graftstack.stacking.data import StackData
from graftstack.stacking.folds import Folds
from graftstack.stacking.ledger import Ledger
from graftstack.stacking.metamodels import meta_model_named
from graftstack.stacking.model import (
    PASSTHROUGH_VIEW,
    Member,
    Passthrough,
    StackModel,
    of_meta_model,
    passthrough_for,
    passthrough_view,
)
from graftstack.stacking.work import BaseModel, CrossFitted, RowSource

Values = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StackTask:
    """A validated stack: data, folds and base models."""

    config: StackConfig
    data: StackData
    folds: Folds
    """Of the rows that train: position i of theirs is row ``data.splits.train[i]``."""
    levels: list[list[BaseModel]]
    trained: frozenset[str] = frozenset()
    """Names of the base models that were trained before: trials of a sweep, and runs."""

    @property
    def flattered(self) -> frozenset[str]:
        """Those whose scores on rows held out say too much: it was there that they, or their epoch, did best."""
        return self.trained if len(self.data.splits.val) else frozenset()

    @property
    def num_classes(self) -> int:
        """0 for a regression."""
        return len(self.data.class_names)

    @property
    def y(self) -> Values:
        """Labels or targets of the rows that train."""
        return np.asarray(self.data.y[self.data.splits.train])

    def views(self, rows: Rows) -> dict[str, Any]:
        """Returns some rows in every form that a base model of the first level wants, or that is passed through."""
        wanted = {base.view for base in self.levels[0]}
        if self.config.passthrough:
            wanted.add(passthrough_view(self.data.schema))
        return {name: taken(view, rows) for name, view in self.data.views.items() if name in wanted}

    @cached_property
    def passthrough(self) -> Passthrough | None:
        """What gives the base models' own inputs to what stands above them, where that is asked for."""
        if not self.config.passthrough:
            return None
        name = passthrough_view(self.data.schema)
        return passthrough_for({name: taken(self.data.views[name], self.data.splits.train)}, self.data.schema)


def taken(view: Any, rows: Rows) -> Any:
    """Returns some rows of a view."""
    from sklearn.utils import _safe_indexing

    if isinstance(view, RowSource):
        return view.take(rows)
    return _safe_indexing(view, rows)


class FittedStack(NamedTuple):
    """A stack, and what it predicted of the rows that it was made from."""

    model: StackModel
    base_oof: list[list[Any]]
    """What each base model of each level says of the rows that its level covers."""
    num_outputs: list[int]
    """Columns of meta-features of each base model of the last level."""
    covered: Rows
    """Positions, among the rows that train, of those that the base models of the last level predict, ascending."""
    oof: Values
    """What a meta-model that never saw a row says of it: [num_covered, num_classes], or [num_covered]."""
    folds: Folds
    """By which `oof` was found. Where folds go forward in time, they cover fewer rows than those of the base models."""


def cross_fitted(
    task: StackTask,
    executor: Executor,
    *,
    y: Values | None = None,
    ledger: Ledger | None = None,
    time_left_s: float | None = None,
    tell: Callable[[Progress], None] = lambda _: None,
) -> CrossFit:
    """Cross-fits all base models of a stack, on its labels or on others, in `time_left_s`. Raises as `cross_fit`."""
    config = task.config
    views = task.views(task.data.splits.train)
    passthrough = task.passthrough
    if passthrough:
        views[PASSTHROUGH_VIEW] = passthrough.transform(views)
    # What people are told of is the limit that they have set, not what is left of it.
    limit_s = None if time_left_s is None else config.time_limit_s or time_left_s
    return cross_fit(
        task.levels,
        views,
        task.y if y is None else y,
        task.folds,
        executor=executor,
        ledger=ledger,
        mode=config.mode.value,
        passthrough=PASSTHROUGH_VIEW if passthrough else None,
        on_error=config.on_error.value,
        time_limit_s=limit_s,
        time_spent_s=0.0 if limit_s is None or time_left_s is None else limit_s - time_left_s,
        seed=config.seed,
        tell=tell,
    )


def fitted_stack(task: StackTask, crossed: CrossFit, y: Values | None = None) -> FittedStack:
    """Fits the meta-model on out-of-fold predictions, and once more in each fold, to see how it does.

    Raises `TrainingError` where the meta-model can't learn from them.
    """
    y = task.y if y is None else y
    base_oof = [
        [out_of_fold(fitted, folds) for fitted in bases]
        for bases, folds in zip(crossed.levels, crossed.folds, strict=True)
    ]
    last, folds = crossed.levels[-1], crossed.folds[-1]
    blocks = meta_blocks(base_oof[-1], [fitted.base.method for fitted in last], task.num_classes)
    features, covered = np.hstack(blocks), folds.covered
    passthrough = task.passthrough
    if passthrough:
        rows = task.data.splits.train[covered]
        features = beside(
            features, passthrough.transform({passthrough.view: taken(task.data.views[passthrough.view], rows)})
        )
    num_outputs = [block.shape[1] for block in blocks]
    meta = meta_model(task, num_outputs)
    with _one_blas_thread(), _named(task):
        oof = _cross_predicted(meta, features, y[covered], covered, folds.above(), num_classes=task.num_classes)
        meta.fit(features, y[covered])
    model = StackModel(
        levels=tuple(tuple(map(_member, bases)) for bases in crossed.levels),
        meta=meta,
        num_classes=task.num_classes,
        passthrough=passthrough,
    )
    return FittedStack(model, base_oof, num_outputs, covered, oof, folds.above())


def check_meta_model(task: StackTask) -> None:
    """Raises `ConfigError` for a meta-model that there isn't, or that can't learn from these base models."""
    from sklearn.utils import get_tags

    name, _ = task.config.meta
    meta = meta_model(task, [1] * len(task.levels[-1]))
    meta = getattr(meta, "meta", meta)  # what is calibrated
    takes_all = not get_tags(meta).input_tags.positive_only
    decides = next((base.name for base in task.levels[-1] if base.method == "decision_function"), None)
    if not takes_all and not task.config.passthrough and decides:
        raise ConfigError(f"meta_model={name}: takes no negative numbers, as {decides} decides by; use another")
    if not takes_all and task.config.passthrough and task.data.schema is not None:
        raise ConfigError(f"meta_model={name}: takes no negative numbers, as passthrough=true has; use another")
    num_rows = min(len(fold.train) for fold in task.folds.above().folds)
    neighbors = getattr(meta, "n_neighbors", None)
    if neighbors is not None and neighbors > num_rows:
        raise ConfigError(f"meta_model.{name}.n_neighbors={neighbors}: a fold has {num_rows} rows; use that or less")


def meta_model(task: StackTask, num_outputs: list[int]) -> Any:
    """Returns the unfitted meta-model of a stack. Raises `ConfigError` for one that there isn't.

    Args:
        task: The stack.
        num_outputs: Columns of meta-features of each base model.
    """
    name, params = task.config.meta
    meta = meta_model_named(
        name,
        params,
        is_classification=task.data.is_classification,
        num_classes=task.num_classes,
        seed=task.config.seed,
        num_outputs=num_outputs,
        passthrough=task.config.passthrough,
    )
    return calibrated(task.config.calibration.value, meta)


def _one_blas_thread() -> AbstractContextManager[Any]:
    """Columns are few: threads would wait for each other for longer than they compute."""
    from threadpoolctl import threadpool_limits

    limited: AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limited


@contextmanager
def _named(task: StackTask) -> Iterator[None]:
    """Makes one error, which says what to do, of whatever a meta-model raises in the block."""
    try:
        yield
    except GraftstackError:
        raise
    except Exception as error:  # estimators raise what they like
        name, _ = task.config.meta
        raise TrainingError(
            f"meta_model={name}: can't learn from what the base models predict: {reason(error)} "
            f"({type(error).__name__}); use another meta_model with resume=true, no base model is trained again"
        ) from error


def _member(fitted: CrossFitted) -> Member:
    return Member(fitted.base.name, fitted.model, fitted.base.method, fitted.base.view)


def _cross_predicted(meta: Any, features: Any, y: Values, covered: Rows, folds: Folds, *, num_classes: int) -> Values:
    """Returns what meta-models that learnt from the training rows of a fold predict of each row that `folds` cover."""
    from sklearn.base import clone

    found = np.zeros((len(y), num_classes) if num_classes else len(y))
    for index in folds.of_repeats[0]:
        fold = folds.folds[index]
        train, test = np.searchsorted(covered, fold.train), np.searchsorted(covered, fold.test)
        fitted = clone(meta).fit(features[train], y[train])
        found[test] = of_meta_model(fitted, features[test], num_classes=num_classes)
    return np.asarray(found[np.searchsorted(covered, folds.covered)])
