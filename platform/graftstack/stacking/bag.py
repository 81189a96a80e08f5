"""The models of all folds as one: a stack predicts with it where nothing is refitted."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, is_classifier
from sklearn.utils import get_tags
from sklearn.utils.metaestimators import available_if

Values = npt.NDArray[Any]


def _have(method: str) -> Callable[["FoldBag"], bool]:
    return lambda bag: all(hasattr(model, method) for model in bag.models)


class FoldBag(BaseEstimator):  # type: ignore[misc]
    """Predicts the mean of its fitted models, or, of labels, what most of them predict."""

    def __init__(self, models: Sequence[Any], classes: Values | None = None) -> None:
        """Holds models that are fitted.

        Args:
            models: One or more; they may lack classes that weren't in their training rows.
            classes: What columns stand for, ascending [C]; None: the classes that any of the models knows.
        """
        self.models = models
        self.classes = classes

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        return get_tags(self.models[0])

    @property
    def classes_(self) -> Any:
        """The classes [C]; for several outputs, those of each."""
        known = [model.classes_ for model in self.models]
        if isinstance(known[0], list):
            return [np.unique(np.concatenate(of_output)) for of_output in zip(*known, strict=True)]
        return np.unique(np.concatenate(known)) if self.classes is None else self.classes

    @property
    def n_features_in_(self) -> int:
        """As the models say, where they do."""
        return int(self.models[0].n_features_in_)

    @property
    def feature_names_in_(self) -> Any:
        """As the models say, where they do."""
        return self.models[0].feature_names_in_

    @available_if(_have("predict_proba"))  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> Any:  # noqa: N803 - scikit-learn's name
        """Returns probabilities [N, C]: models give 0 to classes that they don't know."""
        return self._mean([self._aligned(model, model.predict_proba(X), missing=0.0) for model in self.models])

    @available_if(_have("decision_function"))  # type: ignore[untyped-decorator]
    def decision_function(self, X: Any) -> Any:  # noqa: N803
        """Returns scores [N, C] or [N], of each class the mean over the models that know it."""
        scores = [self._aligned(model, model.decision_function(X), missing=np.nan) for model in self.models]
        return np.nanmean(scores, axis=0) if np.isnan(scores).any() else self._mean(scores)

    def predict(self, X: Any) -> Values:  # noqa: N803
        """Returns the mean target, or the label that most models predict, the lowest of those that tie: [N, ...]."""
        found = np.stack([model.predict(X) for model in self.models])
        return _most_frequent(found) if is_classifier(self) else found.mean(axis=0)

    def _aligned(self, model: Any, found: Any, *, missing: float) -> Any:
        """Returns a model's columns at the places of their classes, for each output."""
        if isinstance(found, list):
            return [
                _spread(part, known, classes, missing=missing)
                for part, known, classes in zip(found, model.classes_, self.classes_, strict=True)
            ]
        if found.ndim == 1 or isinstance(model.classes_, list):
            return found
        return _spread(found, model.classes_, self.classes_, missing=missing)

    @staticmethod
    def _mean(found: Sequence[Any]) -> Any:
        if isinstance(found[0], list):
            return [np.mean(parts, axis=0) for parts in zip(*found, strict=True)]
        return np.mean(found, axis=0)


def _spread(found: Values, known: Values, classes: Values, *, missing: float) -> Values:
    """Returns columns for `known` classes [N, K] at their places among `classes` [N, C]."""
    if found.shape[1] == len(classes) or found.shape[1] != len(known):
        return found
    columns = np.full((len(found), len(classes)), missing, dtype=found.dtype)
    columns[:, np.searchsorted(classes, known)] = found
    return columns


def _most_frequent(votes: Values) -> Values:
    """Returns the most frequent value along the first axis of [M, N, ...]."""
    labels, codes = np.unique(votes, return_inverse=True)
    codes = codes.reshape(votes.shape)
    counts = np.stack([(codes == code).sum(axis=0) for code in range(len(labels))])
    winners: Values = labels[np.argmax(counts, axis=0)]
    return winners
