"""Probabilities brought in line with how often what they say comes true.

The calibration is fitted to predictions of rows that the meta-model hasn't seen: the meta-model is cross-fitted once
more, on its own meta-features.
"""

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.isotonic import IsotonicRegression
from sklearn.utils.validation import check_is_fitted

from graftstack.errors import ConfigError, did_you_mean
from graftstack.stacking.inner_folds import cross_fitted_probabilities

Numbers = npt.NDArray[np.float64]

CALIBRATIONS = ("none", "temperature", "isotonic")
_SMALLEST = 1e-7
_LOG_TEMPERATURES = (-3.0, 3.0)


def calibrated(name: str, meta: Any) -> Any:
    """Returns an unfitted `meta` whose probabilities are calibrated when it is fitted; ``none``: itself.

    Raises:
        ConfigError: no such calibration, or a meta-model without probabilities.
    """
    if name not in CALIBRATIONS:
        raise ConfigError(f"calibration={name}: no such calibration; {did_you_mean(name, CALIBRATIONS)}")
    if name == "none":
        return meta
    if not hasattr(meta, "predict_proba"):
        raise ConfigError(
            f"calibration={name}: {type(meta).__name__} has no probabilities; use another meta_model, or leave it out"
        )
    return CalibratedMetaModel(meta, name)


class CalibratedMetaModel(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier and what corrects its probabilities.

    - temperature: log-probabilities are divided by one number, that with the least log loss (Guo, Pleiss, Sun &
      Weinberger 2017, "On Calibration of Modern Neural Networks", section 4.2); which class is likeliest stays.
    - isotonic: the probability of each class becomes a rising function of itself, and all are brought to sum 1
      (Zadrozny & Elkan 2002, "Transforming Classifier Scores into Accurate Multiclass Probability Estimates"); wants
      some thousand rows.

    Args:
        meta: the classifier; a clone of it is fitted.
        kind: temperature or isotonic.
    """

    def __init__(self, meta: Any, kind: str = "temperature") -> None:
        self.meta = meta
        self.kind = kind

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803 - scikit-learn's contract
        """Fits the calibration to cross-fitted probabilities, and the classifier to all rows."""
        self.meta_ = clone(self.meta).fit(X, y)
        self.classes_ = self.meta_.classes_
        codes = np.searchsorted(self.classes_, y)
        found = cross_fitted_probabilities(self.meta, X, np.asarray(y), self.classes_)
        if self.kind == "temperature":
            self.temperature_ = _temperature(_logs(found), codes)
        else:
            self.curves_ = [
                IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(column, codes == position)
                for position, column in enumerate(found.T)
            ]
        return self

    def predict_proba(self, X: Any) -> Numbers:  # noqa: N803
        """Returns the probability of each class, ``[N, C]``."""
        check_is_fitted(self, "meta_")
        found = self.meta_.predict_proba(X)
        if self.kind == "temperature":
            return np.asarray(softmax(_logs(found) / self.temperature_, axis=1))
        curved = np.column_stack([curve.predict(column) for curve, column in zip(self.curves_, found.T, strict=True)])
        # Never quite 0: curves are flat at their ends, and one surprise would cost all that they gain.
        curved = np.maximum(curved, 1e-4)
        return np.asarray(curved / curved.sum(axis=1, keepdims=True))

    def predict(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803
        """Returns the likeliest class of each row, ``[N]``."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])


def _logs(probabilities: Numbers) -> Numbers:
    return np.log(np.maximum(probabilities, _SMALLEST))


def _temperature(logs: Numbers, codes: npt.NDArray[np.int64]) -> float:
    rows = np.arange(len(codes))
    found = minimize_scalar(
        lambda log_t: -log_softmax(logs / np.exp(log_t), axis=1)[rows, codes].mean(),
        bounds=_LOG_TEMPERATURES,
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(np.exp(found.x))
