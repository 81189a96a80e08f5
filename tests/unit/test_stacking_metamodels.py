"""Meta-models weigh what base models say, and lose to none of them on rows like those they learnt from."""

from typing import Any

import numpy as np
import pytest
import skops.io
from scipy.special import softmax
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, mean_squared_error

from graftstack.errors import ConfigError
from graftstack.stacking.candidates import Candidates
from graftstack.stacking.greedy import greedy_weights
from graftstack.stacking.metamodels import META_MODELS, meta_model_named, weights_of
from graftstack.stacking.nonnegative import nonnegative_weights

CLASSIFIERS = ["blend", "logistic", "nonnegative", "greedy", "gbm"]
REGRESSORS = ["ridge", "nonnegative", "greedy", "gbm"]


def guesses(num_classes: int, *, seed: int = 0, num_rows: int = 600) -> tuple[list[np.ndarray], np.ndarray]:
    """Probabilities of a good, a fair and an overconfident base model, and the labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(num_classes, size=num_rows)
    truth = np.eye(num_classes)[y]
    noise = rng.normal(size=(3, num_rows, num_classes))
    scores = [2 * truth + noise[0], truth + noise[1], 6 * (truth + 2 * noise[2])]
    return [softmax(one, axis=1) for one in scores], y


def columns(probabilities: list[np.ndarray]) -> np.ndarray:
    return np.hstack([one[:, 1:] if one.shape[1] == 2 else one for one in probabilities])


def targets(seed: int = 0, num_rows: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.normal(size=num_rows) * 50 + 1000
    return y[:, None] + rng.normal(size=(num_rows, 3)) * [5, 10, 40], y


def classifier(name: str, num_classes: int, params: dict[str, Any] | None = None, **options: Any) -> Any:
    options.setdefault("num_outputs", [1 if num_classes == 2 else num_classes] * 3)
    return meta_model_named(name, params, is_classification=True, num_classes=num_classes, seed=0, **options)


def regressor(name: str, params: dict[str, Any] | None = None, **options: Any) -> Any:
    options.setdefault("num_outputs", [1, 1, 1])
    return meta_model_named(name, params, is_classification=False, seed=0, **options)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_classifier_beats_each_base_model_on_new_rows(name: str, num_classes: int) -> None:
    given, y = guesses(num_classes)
    later, later_y = guesses(num_classes, seed=1)
    meta = clone(classifier(name, num_classes)).fit(columns(given), y)
    found = meta.predict_proba(columns(later))
    assert found.shape == (600, num_classes)
    assert found.sum(axis=1) == pytest.approx(np.ones(600))
    slack = 1.15 if name == "gbm" else 1.001  # few rows for trees; an average may be of one base model
    assert log_loss(later_y, found) <= slack * min(log_loss(later_y, one) for one in later)


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_regressor_beats_each_base_model_on_new_rows(name: str) -> None:
    given, y = targets()
    later, later_y = targets(seed=1)
    meta = clone(regressor(name)).fit(given, y)
    slack = 10 if name == "gbm" else 1.0
    assert mean_squared_error(later_y, meta.predict(later)) < slack * mean_squared_error(later_y, later[:, 0])


def test_the_default_is_blend_or_ridge() -> None:
    assert repr(classifier("auto", 2)) == repr(classifier("blend", 2))
    assert list(regressor("auto").named_steps) == ["fill", "scale", "ridge"]


def test_logistic_is_logistic_regression_on_log_odds_where_there_are_two_classes() -> None:
    given, y = guesses(2)
    p = np.clip(columns(given), 1e-5, 1 - 1e-5)
    ours = classifier("logistic", 2, {"C": 1e6}).fit(columns(given), y)
    theirs = LogisticRegression(C=1e6, tol=1e-8).fit(np.log(p / (1 - p)), y)
    assert ours.weights_ == pytest.approx(theirs.coef_[0], rel=1e-3)


def test_logistic_returns_the_one_base_model_that_is_calibrated_and_alone() -> None:
    given, _ = guesses(3, num_rows=20000)
    rng = np.random.default_rng(1)
    y = np.array([rng.choice(3, p=row) for row in given[0]])
    meta = classifier("logistic", 3).fit(columns(given), y)
    assert meta.weights_ == pytest.approx([1, 0, 0], abs=0.05)


def test_with_few_rows_weights_stay_near_the_plain_average() -> None:
    given, y = guesses(2, num_rows=6)
    assert classifier("logistic", 2, {"C": 1e-4}).fit(columns(given), y).weights_ == pytest.approx(
        [1 / 3] * 3, abs=0.01
    )


@pytest.mark.parametrize("name", ["blend", "logistic", "nonnegative", "greedy"])
def test_base_models_without_probabilities_take_part(name: str) -> None:
    given, y = guesses(3)
    pairs = np.random.default_rng(0).normal(size=(len(y), 2))
    scores, labels = 100 * np.log(given[1]), given[2].argmax(axis=1)[:, None]
    features = np.hstack([given[0], scores, labels, pairs])
    meta = classifier(name, 3, num_outputs=[3, 3, 1, 2]).fit(features, y)
    assert log_loss(y, meta.predict_proba(features)) <= log_loss(y, given[0])
    decision = np.log(guesses(2)[0][0][:, 1:]) * 3
    two = classifier(name, 2, num_outputs=[1]).fit(decision, guesses(2)[1])
    assert two.score(decision, guesses(2)[1]) > 0.7


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_class_that_no_row_has_keeps_its_column(name: str) -> None:
    given, y = guesses(3)
    rows = y != 2
    meta = classifier(name, 3).fit(columns(given)[rows], y[rows])
    found = meta.predict_proba(columns(given))
    if name != "gbm":  # whose columns are those of `classes_`
        assert found.shape == (len(y), 3)
        assert meta.classes_.tolist() == [0, 1, 2]
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_columns_that_are_passed_through_help(name: str) -> None:
    (given, y), (later, later_y) = guesses(2), guesses(2, seed=1)
    rng = np.random.default_rng(2)

    def with_hint(probabilities: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
        hint = np.where(rng.random(len(labels)) < 0.1, np.nan, 1e4 * (labels + rng.normal(size=len(labels)) / 3))
        return np.column_stack([columns(probabilities), hint, np.ones(len(labels))])

    bare = classifier(name, 2).fit(columns(given), y).predict_proba(columns(later))
    meta = classifier(name, 2, passthrough=True).fit(with_hint(given, y), y)
    assert log_loss(later_y, meta.predict_proba(with_hint(later, later_y))) < 0.8 * log_loss(later_y, bare)


@pytest.mark.parametrize("name", REGRESSORS)
def test_columns_that_are_passed_through_help_a_regressor(name: str) -> None:
    given, y = targets()
    hint = np.column_stack([y + np.random.default_rng(0).normal(size=len(y)), np.ones(len(y))])
    bare = regressor(name).fit(given, y).predict(given)
    meta = regressor(name, passthrough=True).fit(np.hstack([given, hint]), y)
    assert mean_squared_error(y, meta.predict(np.hstack([given, hint]))) < mean_squared_error(y, bare)


def test_nonnegative_weights_are_the_best_of_all_averages() -> None:
    rng = np.random.default_rng(0)
    candidates = Candidates(rng.uniform(0.05, 0.95, size=(200, 3)), None)
    weights = nonnegative_weights(candidates)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    best = candidates.loss(candidates.values @ weights)
    others = rng.dirichlet(np.ones(3), size=500)
    assert best <= min(candidates.loss(candidates.values @ one) for one in [*others, *np.eye(3)]) + 1e-9


def test_the_slope_is_that_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    values, average = rng.uniform(0.1, 0.9, size=(5, 2)), rng.uniform(0.2, 0.8, size=5)
    for candidates in (Candidates(values, None), Candidates(values, rng.normal(size=5))):
        moved = [
            (candidates.loss(average + step) - candidates.loss(average - step)) / 2e-6 for step in 1e-6 * np.eye(5)
        ]
        assert candidates.slope(average) == pytest.approx(moved, rel=1e-4)


def test_greedy_selection_follows_the_paper() -> None:
    y = np.zeros(2)
    candidates = Candidates(np.array([[1.0, -2.0, 9.0], [1.0, -2.0, 9.0]]), y)
    # 1, then (1 - 2) / 2 = -.5, then (1 - 2 + 1) / 3 = 0: nothing beats that, whatever comes later.
    assert greedy_weights(candidates) == pytest.approx([2 / 3, 1 / 3, 0])
    assert greedy_weights(candidates, num_rounds=2) == pytest.approx([0.5, 0.5, 0])
    assert greedy_weights(candidates, num_rounds=1) == pytest.approx([1, 0, 0])
    assert greedy_weights(candidates, num_rounds=2, num_first=3) == pytest.approx([1 / 3] * 3)


def test_any_estimator_of_the_catalogue_is_a_meta_model() -> None:
    given, y = guesses(2)
    meta = classifier("RandomForestClassifier", 2, {"n_estimators": 5}).fit(columns(given), y)
    assert isinstance(meta, RandomForestClassifier)
    weights = weights_of(meta, [1, 1, 1])
    assert weights is not None
    assert weights.sum() == pytest.approx(1)


def test_weights_are_one_share_for_each_base_model() -> None:
    given, y = guesses(4)
    numbers, target = targets()
    for name in ("blend", "logistic", "nonnegative", "greedy", "LogisticRegression"):
        weights = weights_of(classifier(name, 4).fit(columns(given), y), [4, 4, 4])
        assert weights is not None
        assert weights.sum() == pytest.approx(1)
        assert weights.argmax() == 0
    for name in ("ridge", "nonnegative", "greedy", "LinearRegression"):
        weights = weights_of(regressor(name).fit(numbers, target), [1, 1, 1])
        assert weights is not None
        assert weights.sum() == pytest.approx(1)
        assert weights.argmax() == 0
    assert weights_of(classifier("gbm", 4).fit(columns(given), y), [4, 4, 4]) is None
    assert weights_of(classifier("KNeighborsClassifier", 4).fit(columns(given), y), [4, 4, 4]) is None


@pytest.mark.parametrize("name", [*CLASSIFIERS, "ridge"])
def test_a_fitted_meta_model_survives_skops(name: str) -> None:
    features, y = (columns(guesses(3)[0]), guesses(3)[1]) if name != "ridge" else targets()
    if name == "ridge":
        meta = regressor(name)
    else:
        features = np.column_stack([features, y + 0.5])
        meta = classifier(name, 3, passthrough=True)
    stored = skops.io.dumps(meta.fit(features, y))
    untrusted = skops.io.get_untrusted_types(data=stored)
    assert all(one.startswith(("graftstack.", "sklearn.", "numpy.")) for one in untrusted)
    copy = skops.io.loads(stored, trusted=untrusted)
    assert np.array_equal(copy.predict(features), meta.predict(features))


def complaint(name: str, *, is_classification: bool = True, **params: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        meta_model_named(name, params, is_classification=is_classification, num_classes=2, num_outputs=[1, 1])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_meta_model_or_parameter_is_named_with_the_nearest() -> None:
    assert complaint("logistics").startswith("meta_model=logistics: no such meta-model; did you mean logistic, ")
    assert complaint("logistic", c=1) == "meta_model.logistic.c: no such parameter; known: C"
    assert complaint("greedy", rounds=3).startswith(
        "meta_model.greedy.rounds: no such parameter; did you mean num_rounds"
    )
    assert complaint("nonnegative", C=3) == "meta_model.nonnegative.C: no such parameter; it has none"
    assert "max_iter" in complaint("gbm", max_iters=3)
    assert "n_estimators" in complaint("RandomForestClassifier", n_estimator=3)


def test_a_value_that_a_meta_model_can_not_take_is_named() -> None:
    assert complaint("logistic", C=0) == "meta_model.logistic.C=0: must be greater than 0"
    assert complaint("greedy", num_rounds=0) == "meta_model.greedy.num_rounds=0: must be a whole number, at least 1"
    assert complaint("gbm", max_iter=-1).startswith("meta_model=gbm: HistGradientBoostingClassifier.max_iter=-1")


@pytest.mark.parametrize("alphas", ["x", ["a"], [0], [], [float("inf")], [True]])
def test_strengths_of_ridge_are_numbers_above_0(alphas: Any) -> None:
    said = complaint("ridge", is_classification=False, alphas=alphas)
    assert said.startswith(f"meta_model.ridge.alphas={alphas}: must be a list of numbers greater than 0")


def test_other_values_of_ridge_are_checked_too() -> None:
    said = complaint("ridge", is_classification=False, fit_intercept="maybe")
    assert said.startswith("meta_model.ridge.fit_intercept=maybe: ")


def test_constraints_on_columns_are_not_taken() -> None:
    assert complaint("gbm", monotonic_cst=[1, 1]).startswith("meta_model.gbm.monotonic_cst=[1, 1]: which columns")
    free = meta_model_named("gbm", {"monotonic_cst": None}, is_classification=True, num_classes=2, num_outputs=[1, 1])
    assert free.monotonic_cst is None


def test_a_meta_model_without_probabilities_is_refused() -> None:
    for name in ("LinearSVC", "RidgeClassifier", "SGDClassifier"):
        assert complaint(name).startswith(f"meta_model={name}: it decides without probabilities")
    probable = {"loss": "log_loss"}
    assert meta_model_named("SGDClassifier", probable, is_classification=True, num_classes=2, num_outputs=[1])


def test_a_meta_model_for_the_other_task_is_refused() -> None:
    assert complaint("ridge").endswith("use logistic")
    assert complaint("logistic", is_classification=False).endswith("use ridge")
    assert "use RandomForestClassifier" in complaint("RandomForestRegressor")
    assert set(META_MODELS) == {*CLASSIFIERS, *REGRESSORS}
