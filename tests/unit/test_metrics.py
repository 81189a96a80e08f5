"""Metrics are scikit-learn's, and the calibration error is the one that its definition gives by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from graftstack.finetune.metrics import balanced_weights, classification_metrics


def predictions(num_rows: int, num_classes: int, *, seed: int, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    noise = torch.randn(num_rows, num_classes, generator=generator)
    return sharpness * (noise + torch.nn.functional.one_hot(labels, num_classes)), labels


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Guo et al. 2017, equation 3: the mean over 15 bins, weighted by their rows, of |accuracy - confidence|."""
    probabilities = logits.softmax(dim=1).numpy().astype(np.float64)
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels.numpy()
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [
        abs(is_right[bins == index].mean() - confidence[bins == index].mean()) * (bins == index).mean()
        for index in np.unique(bins)
    ]
    return float(sum(gaps))


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("num_rows", [1, 7, 1000])
def test_metrics_are_those_of_scikit_learn(num_classes: int, num_rows: int) -> None:
    logits, labels = predictions(num_rows, num_classes, seed=num_rows)
    found = classification_metrics(logits, labels)
    predicted = logits.argmax(dim=1).numpy()
    probabilities = logits.double().softmax(dim=1).numpy()
    assert found.keys() == {"loss", "accuracy", "macro_f1", "ece"}
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-6)
    assert found["loss"] == pytest.approx(log_loss(labels, probabilities, labels=range(num_classes)), rel=1e-5)
    assert found["ece"] == pytest.approx(calibration_error(logits, labels), abs=1e-5)


def test_a_class_that_is_neither_there_nor_predicted_doesnt_count() -> None:
    logits, labels = predictions(200, 4, seed=0)
    logits = torch.cat([logits, torch.full((200, 2), -50.0)], dim=1)
    found = classification_metrics(logits, labels)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, logits.argmax(dim=1), average="macro"), abs=1e-6)


def test_sure_and_right_is_perfect_and_sure_and_wrong_is_as_bad_as_it_gets() -> None:
    labels = torch.tensor([0, 1, 2, 1])
    sure = 100.0 * torch.nn.functional.one_hot(labels, 3)
    assert classification_metrics(sure, labels) == pytest.approx(
        {"loss": 0.0, "accuracy": 1.0, "macro_f1": 1.0, "ece": 0.0}, abs=1e-6
    )
    assert classification_metrics(sure, (labels + 1) % 3) == pytest.approx(
        {"loss": 100.0, "accuracy": 0.0, "macro_f1": 0.0, "ece": 1.0}, abs=1e-6
    )


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 50, 7, 1])
    weights = balanced_weights(torch.from_numpy(labels), 4)
    assert weights.dtype is torch.float32
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    assert weights.numpy() == pytest.approx(expected, rel=1e-6)
