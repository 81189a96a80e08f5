"""Out-of-fold predictions in row order, and the features that models above learn from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graftstack.data.splits import Rows
from graftstack.stacking.folds import Folds
from graftstack.stacking.work import BaseModel, CrossFitted, FoldResult


def out_of_fold(fitted: CrossFitted, folds: Folds) -> Any:
    """Returns what `predictions_of` makes of a base, `folds` being those of its level."""
    return predictions_of(fitted.base, fitted.folds, folds)


def predictions_of(base: BaseModel, results: Sequence[FoldResult], folds: Folds) -> Any:
    """Returns what models that never saw a row predict of it, for the covered rows in ascending order.

    Args:
        base: Whose predictions they are.
        results: One for each fold, in their order.
        folds: With repeats, a row's predictions are averaged; labels can't be, so those of the first repeat count.

    Returns:
        An array or sparse matrix [num_covered, ...]; for several outputs a list of them.
    """
    repeats = [
        _in_row_order(
            [results[position].predictions for position in positions],
            np.concatenate([folds.folds[position].test for position in positions]),
        )
        for positions in folds.of_repeats
    ]
    if len(repeats) == 1 or _are_labels(base):
        return repeats[0]
    if isinstance(repeats[0], list):
        return [np.mean(parts, axis=0) for parts in zip(*repeats, strict=True)]
    return np.mean(repeats, axis=0)


def meta_blocks(predictions: Sequence[Any], methods: Sequence[str], num_classes: int) -> list[npt.NDArray[Any]]:
    """Returns each base's columns [N, F_b], exactly as scikit-learn's `StackingClassifier` makes them.

    Of two probabilities that sum to 1, the first is left out.

    Args:
        predictions: Of each base: [N], [N, C], or for several outputs a list of [N, C].
        methods: By which each base predicted.
        num_classes: In the whole data; of several outputs, their number; 0 for a regression.
    """
    blocks = []
    for found, method in zip(predictions, methods, strict=True):
        if isinstance(found, list):
            blocks.append(np.hstack([part[:, 1:] for part in found]))
        elif found.ndim == 1:
            blocks.append(found.reshape(-1, 1))
        elif method == "predict_proba" and num_classes == 2:
            blocks.append(found[:, 1:])
        else:
            blocks.append(found)
    return blocks


def meta_features(predictions: Sequence[Any], methods: Sequence[str], num_classes: int) -> npt.NDArray[Any]:
    """Returns the columns of all bases side by side, [N, F]; see `meta_blocks`."""
    return np.hstack(meta_blocks(predictions, methods, num_classes))


def beside(features: npt.NDArray[Any], view: Any) -> Any:
    """Returns features [N, F] followed by the columns of a view [N, V]: sparse if the view is, else an array."""
    from scipy import sparse

    if sparse.issparse(view):
        return sparse.hstack([features, view], format=view.format)
    return np.hstack([features, np.asarray(view)])


def spread(features: npt.NDArray[Any], covered: Rows, num_rows: int) -> npt.NDArray[Any]:
    """Returns features [num_covered, F] at the places of their rows, [num_rows, F]; other rows are NaN."""
    if len(covered) == num_rows:
        return features
    places = np.full((num_rows, features.shape[1]), np.nan)
    places[covered] = features
    return places


def _in_row_order(parts: Sequence[Any], tested: Rows) -> Any:
    """Returns the predictions of all folds of a repeat, in the order of the rows that they tested."""
    from scipy import sparse

    order = np.argsort(tested)
    if sparse.issparse(parts[0]):
        return sparse.vstack(parts, format=parts[0].format)[order]
    if isinstance(parts[0], list):
        return [np.concatenate(outputs)[order] for outputs in zip(*parts, strict=True)]
    return np.concatenate(parts)[order]


def _are_labels(base: BaseModel) -> bool:
    from sklearn.base import is_classifier

    return base.method == "predict" and bool(is_classifier(base.estimator))
