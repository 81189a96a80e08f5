"""Folds: which rows each one trains on, and which it tests."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graftstack.data.splits import Rows
from graftstack.errors import ConfigError, DataError
from graftstack.seeding import derive_seed

KINDS = ("stratified", "kfold", "group", "time")


class Fold(NamedTuple):
    """Row positions, ``int64``, in the order in which a model is given them."""

    train: Rows
    test: Rows
    name: str
    """E.g. ``fold 2 of 5`` or ``repeat 1, fold 2 of 5``."""


@dataclass(frozen=True, eq=False)
class Folds:
    """All folds of `num_rows` rows, repeat by repeat; each covered row is tested once in every repeat."""

    folds: tuple[Fold, ...]
    num_rows: int
    repeats: int = 1

    @property
    def covered(self) -> Rows:
        """The rows that are tested, ascending: all of them, but for the first block where folds go forward in time."""
        return np.unique(np.concatenate([fold.test for fold in self.folds]))

    @property
    def of_repeats(self) -> list[tuple[int, ...]]:
        """The positions of the folds of each repeat."""
        size = len(self.folds) // self.repeats
        return [tuple(range(start, start + size)) for start in range(0, len(self.folds), size)]

    def check(self, groups: Any = None) -> None:
        """Makes sure that every prediction is by a model that saw neither its row nor, with `groups` [N], its group.

        Raises:
            DataError: a covered row isn't tested once in each repeat, or a fold trains on what it tests.
        """
        codes = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        for fold in self.folds:
            _check_apart(fold, fold.train, fold.test, "row")
            if codes is not None:
                _check_apart(fold, codes[fold.train], codes[fold.test], "group")
        covered = self.covered
        for positions in self.of_repeats:
            tested = np.concatenate([self.folds[position].test for position in positions])
            counts = np.bincount(tested, minlength=self.num_rows)[covered]
            if (counts != 1).any():
                row = covered[np.flatnonzero(counts != 1)[0]]
                raise DataError(f"row {row} is tested {counts[counts != 1][0]} times; folds have to test each row once")

    def above(self) -> "Folds":
        """Returns the folds of models that learn from these folds' predictions: without rows that have none.

        That leaves folds as they are, unless they go forward in time: then the first has nothing to learn from, and
        goes.

        Raises:
            DataError: no fold is left.
        """
        covered = self.covered
        if len(covered) == self.num_rows:
            return self
        kept = [fold._replace(train=fold.train[np.isin(fold.train, covered)]) for fold in self.folds]
        kept = [fold for fold in kept if len(fold.train)]
        if not kept:
            raise DataError(
                f"{len(self.folds)} folds in time leave the level above no rows to learn from; use more folds"
            )
        return Folds(tuple(kept), self.num_rows)


def make_folds(
    kind: str,
    num: int,
    *,
    y: Any,
    groups: Any = None,
    repeats: int = 1,
    seed: int,
    is_classification: bool,
    class_names: Sequence[str] | None = None,
) -> Folds:
    """Returns `num` folds, `repeats` times, which depend on the arguments alone.

    Args:
        kind: ``stratified``: every class has the same share in all folds. ``kfold``: at random. ``group``: no group is
            in two folds, and classes are as even as that allows. ``time``: rows are in order of time, and each of
            `num` blocks is tested by a model of all earlier rows; the first of `num` + 1 blocks is never tested.
        num: At least 2.
        y: Labels or targets, [N].
        groups: What must not be split, [N]; for kind ``group``.
        repeats: How often all rows are dealt out anew; 1 for kind ``time``, where there is nothing to draw.
        seed: Of the draw.
        is_classification: Whether `y` are labels.
        class_names: For errors: the name of label 0, 1, ...; None: labels name themselves.

    Raises:
        ConfigError: an unknown kind, or a number that makes no folds of that kind.
        DataError: the rows, classes or groups are too few, or there is nothing to learn.
    """
    y = np.asarray(y)
    _check_numbers(kind, num, repeats, len(y))
    _check_target(y, is_classification=is_classification)
    if kind == "stratified":
        _check_classes(y, num, class_names, is_classification=is_classification)
    groups = _checked_groups(groups, num, len(y)) if kind == "group" else None  # others warn of groups
    folds: list[Fold] = []
    for repeat in range(repeats):
        splitter = _splitter(kind, num, derive_seed(seed, "folds", repeat) % 2**32, is_stratified=_is_labels(y))
        prefix = f"repeat {repeat + 1}, " if repeats > 1 else ""
        with warnings.catch_warnings():  # rare classes can't be in all folds of groups: nothing to be done about it
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            splits = list(splitter.split(y, y, groups))
        for position, (train, test) in enumerate(splits):
            folds.append(_fold(train, test, f"{prefix}fold {position + 1} of {num}"))
    for fold in folds:
        if not len(fold.test) or not len(fold.train):
            raise DataError(f"{fold.name} has no rows to {'train on' if len(fold.test) else 'test'}; use fewer folds")
    return Folds(tuple(folds), len(y), repeats)


def from_splitter(cv: Any, X: Any, y: Any, groups: Any = None) -> Folds:  # noqa: N803 - scikit-learn's name
    """Returns the folds of a scikit-learn splitter, or of an iterable of (train, test).

    Folds that go forward in time, such as those of `TimeSeriesSplit`, need not test all rows.

    Raises:
        ValueError: the folds don't test each row once, in scikit-learn's words.
    """
    splits = list(cv.split(X, y, groups) if hasattr(cv, "split") else cv)
    num_rows = X.shape[0] if hasattr(X, "shape") else len(X)
    folds = tuple(
        _fold(train, test, f"fold {place + 1} of {len(splits)}") for place, (train, test) in enumerate(splits)
    )
    tested = np.concatenate([fold.test for fold in folds]) if folds else np.empty(0, np.int64)
    is_once = bool(((tested >= 0) & (tested < num_rows)).all()) and len(np.unique(tested)) == len(tested)
    is_forward = all(len(fold.train) and len(fold.test) and fold.train.max() < fold.test.min() for fold in folds)
    if not folds or not is_once or (len(tested) != num_rows and not is_forward):
        raise ValueError("cross_val_predict only works for partitions")
    return Folds(folds, num_rows)


def _fold(train: Any, test: Any, name: str) -> Fold:
    return Fold(_rows(train), _rows(test), name)


def _rows(rows: Any) -> Rows:
    found = np.asarray(rows)
    return (np.flatnonzero(found) if found.dtype == bool else found).astype(np.int64, copy=False)


def _is_labels(y: npt.NDArray[Any]) -> bool:
    """Whether classes can be kept even over groups."""
    return y.ndim == 1 and y.dtype.kind not in "fc"


def _splitter(kind: str, num: int, random_state: int, *, is_stratified: bool) -> Any:
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold, TimeSeriesSplit

    if kind == "time":
        return TimeSeriesSplit(num)
    if kind == "group":
        of_groups = StratifiedGroupKFold if is_stratified else GroupKFold
        return of_groups(num, shuffle=True, random_state=random_state)
    at_random = StratifiedKFold if kind == "stratified" else KFold
    return at_random(num, shuffle=True, random_state=random_state)


def _check_numbers(kind: str, num: int, repeats: int, num_rows: int) -> None:
    if kind not in KINDS:
        raise ConfigError(f"folds of kind {kind!r}: unknown; use {', '.join(KINDS)}")
    if num < 2:
        raise ConfigError(f"{num} folds: what one fold tests, others have to train on; use 2 or more")
    if repeats < 1 or (repeats > 1 and kind == "time"):
        raise ConfigError(f"{repeats} repeats of {kind} folds: " + ("rows in time are dealt out one way; use 1"
                          if repeats > 1 else "use 1 or more"))  # fmt: skip
    needed = num + 1 if kind == "time" else num
    if num_rows < needed:
        raise DataError(f"{num} folds in {num_rows} rows: {kind} needs {needed} rows or more; use fewer folds")


def _check_target(y: npt.NDArray[Any], *, is_classification: bool) -> None:
    if len(y) and y.ndim == 1 and len(np.unique(y)) < 2:
        what = "class" if is_classification else "target"
        raise DataError(f"the only {what} is {y[0]}; learning needs two or more, check data.label")


def _check_classes(
    y: npt.NDArray[Any], num: int, class_names: Sequence[str] | None, *, is_classification: bool
) -> None:
    if not is_classification or y.ndim != 1:
        raise DataError("folds of kind stratified need one class for each row; use kfold")
    labels, counts = np.unique(y, return_counts=True)
    rarest = int(np.argmin(counts))
    if counts[rarest] < num:
        name = class_names[int(labels[rarest])] if class_names else labels[rarest]
        raise DataError(
            f"class {name} has {counts[rarest]} rows for {num} folds; use {max(2, counts[rarest])} folds"
            f"{' of kind kfold' if counts[rarest] < 2 else ''}, or leave the class out"
        )


def _checked_groups(groups: Any, num: int, num_rows: int) -> npt.NDArray[Any]:
    """Returns the groups as an array [N]."""
    if groups is None:
        raise DataError("folds of kind group need the group of each row; set data.group, or use another kind")
    found = np.asarray(groups)
    if len(found) != num_rows:
        raise DataError(f"{len(found)} groups for {num_rows} rows; give one for each row")
    num_groups = len(np.unique(found))
    if num_groups < num:
        raise DataError(f"{num_groups} groups for {num} folds: each fold tests whole groups; use fewer folds")
    return found


def _check_apart(fold: Fold, train: npt.NDArray[Any], test: npt.NDArray[Any], what: str) -> None:
    shared = np.flatnonzero(np.isin(test, train))
    if len(shared):
        raise DataError(
            f"{fold.name} trains on the {what} of row {fold.test[shared[0]]}, which it tests; "
            "use folds that keep them apart"
        )
