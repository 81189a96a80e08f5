"""Calibrated probabilities say how often what they say comes true."""

import numpy as np
import pytest
import skops.io
from scipy.special import softmax
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import LinearSVC

from graftstack.errors import ConfigError
from graftstack.stacking.calibration import calibrated
from graftstack.stacking.metamodels import meta_model_named, weights_of


def rows(seed: int, num_classes: int, num_rows: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Columns that repeat one another, which naive Bayes takes for so many proofs."""
    rng = np.random.default_rng(seed)
    y = rng.integers(num_classes, size=num_rows)
    one = np.eye(num_classes)[y] + rng.normal(size=(num_rows, num_classes))
    return np.hstack([one] * 6), y


@pytest.mark.parametrize("name", ["temperature", "isotonic"])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_overconfidence_is_mended(name: str, num_classes: int) -> None:
    (features, y), (later, later_y) = rows(0, num_classes), rows(1, num_classes)
    bare = GaussianNB().fit(features, y)
    meta = clone(calibrated(name, GaussianNB())).fit(features, y)
    found = meta.predict_proba(later)
    assert found.sum(axis=1) == pytest.approx(np.ones(len(later)))
    assert log_loss(later_y, found) < 0.8 * log_loss(later_y, bare.predict_proba(later))


def test_temperature_is_that_of_the_least_loss_and_keeps_the_likeliest_class() -> None:
    rng = np.random.default_rng(0)
    features, y = rows(0, 3)
    meta = calibrated("temperature", GaussianNB()).fit(features, y)
    assert meta.temperature_ > 2
    assert np.array_equal(meta.predict(features), GaussianNB().fit(features, y).predict(features))
    scores = rng.normal(size=(5000, 3))
    honest = np.array([rng.choice(3, p=row) for row in softmax(scores, axis=1)])
    assert calibrated("temperature", LogisticRegression()).fit(scores, honest).temperature_ == pytest.approx(1, abs=0.1)


def test_labels_keep_their_names() -> None:
    features, y = rows(0, 2, 100)
    meta = calibrated("isotonic", GaussianNB()).fit(features, y + 5)
    assert meta.classes_.tolist() == [5, 6]
    assert set(meta.predict(features)) == {5, 6}


def test_a_class_that_is_rare_or_absent_does_no_harm() -> None:
    features = np.random.default_rng(0).uniform(size=(40, 6))
    y = np.array([0, 1] * 19 + [2, 0])
    for name in ("temperature", "isotonic"):
        meta = meta_model_named("logistic", is_classification=True, num_classes=4, num_outputs=[4])
        found = calibrated(name, meta).fit(features[:, :4], y).predict_proba(features[:, :4])
        assert found.shape == (40, 4)
        assert np.isfinite(found).all()


def test_none_is_the_meta_model_itself() -> None:
    meta = GaussianNB()
    assert calibrated("none", meta) is meta


def test_a_calibrated_meta_model_survives_skops_and_shows_its_weights() -> None:
    features, y = rows(0, 2, 200)
    features = 1 / (1 + np.exp(-features[:, :2]))
    for name in ("temperature", "isotonic"):
        inner = meta_model_named("logistic", is_classification=True, num_classes=2, num_outputs=[1, 1])
        meta = calibrated(name, inner).fit(features, y)
        weights = weights_of(meta, [1, 1])
        assert weights is not None
        assert weights.sum() == pytest.approx(1)
        stored = skops.io.dumps(meta)
        copy = skops.io.loads(stored, trusted=skops.io.get_untrusted_types(data=stored))
        assert np.array_equal(copy.predict_proba(features), meta.predict_proba(features))


def test_what_can_not_be_calibrated_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"calibration=temprature: no such calibration; did you mean temperature\?"):
        calibrated("temprature", GaussianNB())
    with pytest.raises(ConfigError, match="calibration=isotonic: LinearSVC has no probabilities"):
        calibrated("isotonic", LinearSVC())
