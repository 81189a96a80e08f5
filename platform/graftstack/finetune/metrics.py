"""Validation metrics of a classifier, by torchmetrics."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Guo et al. 2017, "On calibration of modern neural networks": 15 bins of equal width.
_NUM_ECE_BINS = 15


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns loss (nats), accuracy, macro-averaged F1 and expected calibration error.

    Args:
        logits: fp32, [N, num_classes].
        labels: int64, [N].
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_f1_score,
    )

    num_classes = logits.shape[1]
    # Labels and shapes are our own: checking them again would take longer than the metrics.
    probabilities = logits.softmax(dim=1)
    values: dict[str, Tensor] = {
        "loss": F.cross_entropy(logits, labels),
        "accuracy": multiclass_accuracy(probabilities, labels, num_classes, average="micro", validate_args=False),
        "macro_f1": multiclass_f1_score(probabilities, labels, num_classes, average="macro", validate_args=False),
        "ece": multiclass_calibration_error(
            probabilities, labels, num_classes, n_bins=_NUM_ECE_BINS, norm="l1", validate_args=False
        ),
    }
    return {name: float(value) for name, value in values.items()}


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Returns num_rows / (num_classes * rows of the class) as fp32 [num_classes]; 0 for a class without rows.

    The same as scikit-learn's ``class_weight="balanced"``.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    weights = (len(labels) / (num_classes * counts)).float()
    return torch.where(counts > 0, weights, 0.0)
