"""How good predictions are: of a base model in a fold, out of fold, or on rows held out."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Of a probability, before its logarithm: one row that is surely wrong must not decide over all others.
_LEAST = 1e-15

_NUM_ECE_BINS = 15


class Score(NamedTuple):
    """Of the predictions of some rows."""

    score: float
    """Accuracy, or R² of a regression; the higher the better."""
    loss: float | None
    """Mean log loss in nats, or root mean squared error; None for classes without probabilities."""


def scored(predictions: npt.NDArray[Any], y: npt.NDArray[Any], *, method: str, num_classes: int) -> Score:
    """Returns how good the predictions of some rows are.

    Args:
        predictions: What `method` of a classifier or regressor returned: [N], or [N, num_classes].
        y: int64 labels or float64 targets, [N].
        method: predict_proba, decision_function or predict.
        num_classes: 0 for a regression.
    """
    if not num_classes:
        return _of_regression(predictions.reshape(len(y), -1)[:, 0], y)
    if method == "predict_proba":
        return Score(float(np.mean(predictions.argmax(axis=1) == y)), log_loss(predictions, y))
    if method == "decision_function":
        labels = predictions.argmax(axis=1) if predictions.ndim == 2 else (predictions > 0).astype(np.int64)
        return Score(float(np.mean(labels == y)), None)
    return Score(float(np.mean(predictions == y)), None)


def log_loss(probabilities: npt.NDArray[np.float64], y: npt.NDArray[np.int64]) -> float:
    """Returns the mean of minus the logarithm of each row's probability of its own class, in nats."""
    own = probabilities[np.arange(len(y)), y]
    return float(-np.mean(np.log(np.clip(own, _LEAST, 1))))


def _of_regression(predictions: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Score:
    squared = np.mean(np.square(predictions - y))
    variance = np.var(y)
    return Score(float(1 - squared / variance) if variance else 0.0, float(np.sqrt(squared)))


def metrics_of(predictions: npt.NDArray[Any], y: npt.NDArray[Any], num_classes: int) -> dict[str, float]:
    """Returns the metrics of a run: those of a fine-tuning for classes; `rmse`, `mae` and `r2` for a regression.

    Args:
        predictions: Probabilities [N, num_classes], or targets [N].
        y: int64 labels or float64 targets, [N].
        num_classes: 0 for a regression.
    """
    if not num_classes:
        score, loss = _of_regression(predictions, y)
        return {"rmse": loss or 0.0, "mae": float(np.mean(np.abs(predictions - y))), "r2": score}

    from sklearn.metrics import f1_score

    labels = predictions.argmax(axis=1)
    return {
        "loss": log_loss(predictions, y),
        "accuracy": float(np.mean(labels == y)),
        "macro_f1": float(f1_score(y, labels, labels=np.arange(num_classes), average="macro", zero_division=0.0)),
        "ece": _calibration_error(predictions, y),
    }


def _calibration_error(probabilities: npt.NDArray[np.float64], y: npt.NDArray[np.int64]) -> float:
    """Returns the expected calibration error (Guo et al. 2017) in bins of equal width, as `finetune.metrics` does."""
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    bins = np.minimum((confidence * _NUM_ECE_BINS).astype(np.int64), _NUM_ECE_BINS - 1)
    gaps = np.zeros(_NUM_ECE_BINS)
    np.add.at(gaps, bins, confidence - is_right)
    return float(np.abs(gaps).sum() / len(y))
