"""What the tasks of a stack are made of: views, targets and folds where workers see them, and the ledger's keys."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from graftstack.runtime import Executor
from graftstack.stacking.assemble import beside, meta_features, predictions_of, spread
from graftstack.stacking.folds import Folds
from graftstack.stacking.graph import BaseShape, Task
from graftstack.stacking.ledger import Ledger
from graftstack.stacking.ledger_keys import UnkeyableError, base_key, fingerprint, task_key
from graftstack.stacking.task_run import Done, Job, Target, encoded_target
from graftstack.stacking.work import BaseModel, FoldResult, RefitResult

log = logging.getLogger(__name__)


class Material:
    """Turns tasks into the arguments of `task_run.run`; shares each large value once."""

    def __init__(
        self,
        levels: Sequence[Sequence[BaseModel]],
        views: Mapping[str, Any],
        y: Any,
        folds: Folds,
        *,
        executor: Executor,
        ledger: Ledger | None,
        mode: str,
        passthrough: str | None,
        seed: int,
    ) -> None:
        from sklearn import get_config
        from sklearn.base import clone

        self.levels = levels
        self.folds = _folds_of_levels(folds, len(levels))
        self._estimators = [[clone(base.estimator) for base in level] for level in levels]
        self._views = dict(views)
        self._y = y
        self._is_bag = mode == "bag"
        self._passthrough = passthrough
        self._seed = seed
        self._executor = executor
        self._ledger = ledger
        self._config = get_config()
        self._below: Any = None
        """What the open level above the first learns from."""
        self._targets: dict[str, Target] = {}
        self._shared: dict[int, _Shared] = {}
        """By the identity of the value."""
        self._keys: dict[tuple[int, int], str] = {}
        self._fingerprints: dict[str, str] = {}

    @property
    def shapes(self) -> list[list[BaseShape]]:
        """What the graph has to know."""
        shapes = []
        for level, bases in enumerate(self.levels):
            sizes = tuple(len(fold.train) for fold in self.folds[level].folds)
            rows = self._refit_rows(level)
            num_rows = self.folds[level].num_rows if rows is None else len(rows)
            shapes.append(
                [
                    BaseShape(sizes, None if self._is_bag or base.refitted is not None else num_rows, base.num_threads)
                    for base in bases
                ]
            )
        return shapes

    def base(self, task: Task) -> BaseModel:
        """Returns whose task it is."""
        return self.levels[task.level][task.base]

    def name(self, task: Task) -> str:
        """Returns e.g. ``rf fold 2 of 5`` or ``rf refit``."""
        return f"{self.base(task).name} {self.part(task)}"

    def part(self, task: Task) -> str:
        """Returns e.g. ``fold 2 of 5`` or ``refit``."""
        return "refit" if task.fold is None else self.folds[task.level].folds[task.fold].name

    def begin(self, level: int) -> None:
        """Makes keys for the tasks of a level, whose view is there now."""
        if self._ledger is None:
            return
        for place, base in enumerate(self.levels[level]):
            try:
                self._keys[level, place] = base_key(
                    base,
                    view=self._fingerprint(self._view_name(level, base)),
                    y=self._fingerprint("y"),
                    seed=self._seed,
                )
            except UnkeyableError as error:
                log.warning("%s: not in the ledger, so another start fits it again (%s)", base.name, error)
                self._keys.pop((level, place), None)

    def learn_from(self, level: int, predicted: Mapping[int, Sequence[Any]]) -> None:
        """Makes the view of the level above `level` from the fold results of its bases, by their position."""
        bases, folds = self.levels[level], self.folds[level]
        found = [predictions_of(bases[base], results, folds) for base, results in predicted.items()]
        methods = [bases[base].method for base in predicted]
        features = spread(meta_features(found, methods, self._num_classes()), folds.covered, folds.num_rows)
        above = _level_view(level + 1)
        view = features if self._passthrough is None else beside(features, self._views[self._passthrough])
        self._views[above] = view
        self._fingerprints.pop(above, None)

    def known(self, task: Task) -> FoldResult | RefitResult | None:
        """Returns a task's result if the ledger has it."""
        key = self._key(task)
        if self._ledger is None or key is None:
            return None
        return self._ledger.find(key, self._estimators[task.level][task.base])

    def arguments(self, task: Task) -> tuple[Any, ...]:
        """Returns what `task_run.run` is called with."""
        base = self.base(task)
        is_refit = task.fold is None
        target = self._target("predict" if is_refit else base.method)
        view = self._view_name(task.level, base)
        job = Job(
            estimator=self._estimators[task.level][task.base],
            method=base.method,
            fold=task.fold,
            rows=self._refit_rows(task.level) if is_refit else None,
            keeps_model=self._is_bag,
            num_classes=target.num_classes,
            config=self._config,
            ledger=self._ledger,
            key=self._key(task),
            fit_params=tuple(base.fit_params),
        )
        shared = (self._views[view], target.values, self.folds[task.level].folds, *base.fit_params.values())
        return (job, *map(self._share, shared))

    def store(self, task: Task, done: Done) -> None:
        """Makes sure that the ledger has a result, even if the worker wrote it on a disk that is not this one's."""
        key = self._key(task)
        if self._ledger is None or key is None:
            return
        if done.not_stored is not None:
            log.warning("%s: not in the ledger, so another start fits it again (%s)", self.name(task), done.not_stored)
        elif not self._ledger.exists(key):
            self._ledger.write(key, done.result, self._estimators[task.level][task.base])

    def model(self, level: int, base: int, folds: Sequence[FoldResult], refit: Any) -> Any:
        """Returns what stands for a base in predictions: the model that was given, its refit, or its folds' models."""
        given = self.levels[level][base].refitted
        if given is not None or not self._is_bag:
            return refit if given is None else given
        from graftstack.stacking.bag import FoldBag

        target = self._target(self.levels[level][base].method)
        num_classes = target.num_classes
        has_classes = num_classes is not None and len(num_classes) == 1
        classes = np.arange(num_classes[0]) if num_classes is not None and has_classes else None
        return FoldBag([result.model for result in folds], classes)

    def _view_name(self, level: int, base: BaseModel) -> str:
        return base.view if level == 0 else _level_view(level)

    def _refit_rows(self, level: int) -> Any:
        """Returns the rows that have predictions of the level below; None: all."""
        covered = self.folds[level - 1].covered if level else None
        return None if covered is None or len(covered) == self.folds[level].num_rows else covered

    def _num_classes(self) -> int:
        """Returns the length of scikit-learn's `classes_`: of one output its classes, of several their number."""
        methods = [base.method for level in self.levels for base in level if base.method != "predict"]
        num_classes = self._target(methods[0]).num_classes if methods else None
        if num_classes is None:
            return 0
        return num_classes[0] if len(num_classes) == 1 else len(num_classes)

    def _target(self, method: str) -> Target:
        if method not in self._targets:
            self._targets[method] = encoded_target(self._y, method)
        return self._targets[method]

    def _key(self, task: Task) -> str | None:
        base = self._keys.get(task[:2])
        if base is None:
            return None
        if task.fold is None:
            return task_key(base, train=self._refit_rows(task.level), test=None, keeps_model=True)
        fold = self.folds[task.level].folds[task.fold]
        return task_key(base, train=fold.train, test=fold.test, keeps_model=self._is_bag)

    def _fingerprint(self, name: str) -> str:
        if name not in self._fingerprints:
            self._fingerprints[name] = fingerprint(self._y if name == "y" else self._views[name])
        return self._fingerprints[name]

    def _share(self, value: Any) -> Any:
        if id(value) not in self._shared:
            self._shared[id(value)] = _Shared(value, self._executor.share(value))
        return self._shared[id(value)].handle


class _Shared(NamedTuple):
    value: Any
    """Kept, so that its identity stays its own."""
    handle: Any
    """What stands for it in the arguments of calls."""


def _level_view(level: int) -> str:
    return f"predictions for level {level}"


def _folds_of_levels(folds: Folds, num_levels: int) -> tuple[Folds, ...]:
    found = [folds]
    while len(found) < num_levels:
        found.append(found[-1].above())
    return tuple(found)
