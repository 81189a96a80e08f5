"""Cross-fitting within a meta-model: what a part of it says of rows that it hasn't seen."""

import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.base import clone
from sklearn.model_selection import StratifiedKFold

Numbers = npt.NDArray[np.float64]

_NUM_FOLDS = 5


class _InnerFold(NamedTuple):
    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def cross_fitted_probabilities(
    classifier: Any,
    X: Any,  # noqa: N803 - scikit-learn's contract
    y: npt.NDArray[Any],
    classes: npt.NDArray[Any],
) -> Numbers:
    """Returns the probability of each of `classes`, ``[N, C]``, by clones of `classifier` that haven't seen the row.

    A class that no clone's rows have gets 0. Rows are dealt to folds always alike, by class and without regard to
    groups: what is fitted here has but a few numbers to learn.
    """
    found = np.zeros((len(y), len(classes)))
    for train, test in _folds(np.searchsorted(classes, y)):
        fitted = clone(classifier).fit(X[train], y[train])
        found[np.ix_(test, np.searchsorted(classes, fitted.classes_))] = fitted.predict_proba(X[test])
    return found


def _folds(codes: npt.NDArray[np.int64]) -> list[_InnerFold]:
    num = max(2, min(_NUM_FOLDS, int(np.bincount(codes).max())))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        splits = StratifiedKFold(num, shuffle=True, random_state=0).split(np.zeros(len(codes)), codes)
        return [_InnerFold(*split) for split in splits]
