"""Weighted averages of what base models predict: the weights are those of `nonnegative` or `greedy`.

A linear meta-model on all columns may join the base models as one more candidate: where columns are passed through it
is what makes use of them, and where base models are over- or underconfident it is what mends that, as no average does.
Its weight rests on predictions of rows that it hasn't seen: it is cross-fitted.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.utils.validation import check_is_fitted

from graftstack.stacking.blocks import PROBABILITY, Numbers, block_kinds, dense, outputs_of, probabilities, split
from graftstack.stacking.candidates import Candidates
from graftstack.stacking.greedy import greedy_weights
from graftstack.stacking.inner_folds import cross_fitted_probabilities
from graftstack.stacking.linear import linear_meta_model
from graftstack.stacking.logistic import LogisticPool
from graftstack.stacking.nonnegative import nonnegative_weights

RULES: dict[str, Callable[..., Numbers]] = {"nonnegative": nonnegative_weights, "greedy": greedy_weights}
"""Name of a rule -> ``Candidates, ... -> weights [B]``."""


class AveragingClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Averages probabilities: meta-features ``[N, F]`` are each base model's columns, then those passed through.

    Base models that decide without probabilities get some by a logistic regression on their columns.

    Args:
        rule: nonnegative or greedy.
        num_outputs: columns of each base model; None: no column is passed through.
        num_classes: labels are 0..num_classes - 1; None: classes are those of the labels that it is fitted on.
        rule_params: further arguments of the rule.
        with_linear: whether a `LogisticPool` is a candidate too; where columns are passed through it always is.
    """

    def __init__(
        self,
        rule: str = "nonnegative",
        num_outputs: Sequence[int] | None = None,
        num_classes: int | None = None,
        rule_params: dict[str, Any] | None = None,
        *,
        with_linear: bool = False,
    ) -> None:
        self.rule = rule
        self.num_outputs = num_outputs
        self.num_classes = num_classes
        self.rule_params = rule_params
        self.with_linear = with_linear

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803 - scikit-learn's contract
        """Finds the weights with the least log loss."""
        X = dense(X)  # noqa: N806
        self.classes_ = np.unique(y) if self.num_classes is None else np.arange(self.num_classes)
        self.n_features_in_ = X.shape[1]
        num_classes = len(self.classes_)
        codes = np.searchsorted(self.classes_, y)
        self.outputs_ = outputs_of(self.num_outputs, X.shape[1], num_classes)
        kinds = block_kinds(X, self.outputs_, num_classes)
        self.converters_ = [
            None if kind == PROBABILITY else LogisticPool([block.shape[1]], num_classes).fit(block, codes)
            for block, kind in zip(split(X, self.outputs_), kinds, strict=True)
        ]
        found = self._of_bases(X)
        self.linear_ = None
        if self.with_linear or X.shape[1] > sum(self.outputs_):
            linear = LogisticPool(self.outputs_, num_classes)
            found.append(cross_fitted_probabilities(linear, X, codes, np.arange(num_classes)))
            self.linear_ = linear.fit(X, codes)
        own = np.column_stack([one[np.arange(len(codes)), codes] for one in found])
        self.weights_ = RULES[self.rule](Candidates(own, None), **(self.rule_params or {}))
        return self

    def predict_proba(self, X: Any) -> Numbers:  # noqa: N803
        """Returns the probability of each class, ``[N, C]``."""
        check_is_fitted(self, "weights_")
        X = dense(X)  # noqa: N806
        found = self._of_bases(X)
        if self.linear_ is not None:
            found.append(self.linear_.predict_proba(X))
        average: Numbers = np.tensordot(self.weights_, np.array(found), axes=1)
        return np.asarray(average / average.sum(axis=1, keepdims=True))

    def predict(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803
        """Returns the likeliest class of each row, ``[N]``."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])

    def _of_bases(self, X: Numbers) -> list[Numbers]:  # noqa: N803
        return [
            probabilities(block) if converter is None else converter.predict_proba(block)
            for block, converter in zip(split(X, self.outputs_), self.converters_, strict=True)
        ]


class AveragingRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Averages targets: meta-features ``[N, F]`` are a column for each base model, then those passed through.

    Args:
        rule: nonnegative or greedy.
        num_bases: how many base models there are; None: no column is passed through.
        rule_params: further arguments of the rule.
    """

    def __init__(
        self, rule: str = "nonnegative", num_bases: int | None = None, rule_params: dict[str, Any] | None = None
    ) -> None:
        self.rule = rule
        self.num_bases = num_bases
        self.rule_params = rule_params

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Finds the weights with the least squared error."""
        X, y = dense(X), np.asarray(y, dtype=np.float64)  # noqa: N806
        self.n_features_in_ = X.shape[1]
        self.bases_ = X.shape[1] if self.num_bases is None else self.num_bases
        found = [X[:, : self.bases_]]
        self.linear_ = None
        if X.shape[1] > self.bases_:
            found.append(cross_val_predict(linear_meta_model(), X, y, cv=KFold(min(5, len(y)))))
            self.linear_ = linear_meta_model().fit(X, y)
        self.weights_ = RULES[self.rule](Candidates(np.column_stack(found), y), **(self.rule_params or {}))
        return self

    def predict(self, X: Any) -> Numbers:  # noqa: N803
        """Returns the target of each row, ``[N]``."""
        check_is_fitted(self, "weights_")
        X = dense(X)  # noqa: N806
        found = [X[:, : self.bases_], *([] if self.linear_ is None else [self.linear_.predict(X)])]
        average: Numbers = np.column_stack(found) @ self.weights_
        return average
