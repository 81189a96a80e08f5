"""Estimators are found by name, and what can't be is named with what can."""

import sys
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression

from graftstack.errors import ConfigError
from graftstack.stacking.catalog import estimator_named, known_names


def made(name: str, *, is_classification: bool = True, seed: int = 0, **params: Any) -> Any:
    return estimator_named(name, params, is_classification=is_classification, seed=seed)


def complaint(name: str, *, is_classification: bool = True, **params: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(name, is_classification=is_classification, **params)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_estimator_that_scikit_learn_lists_is_known_by_its_name() -> None:
    from sklearn.utils import all_estimators

    for kind, is_classification in (("classifier", True), ("regressor", False)):
        listed = {name for name, _ in all_estimators(kind)}
        known = set(known_names(is_classification=is_classification))
        # The ones that choose a threshold, or a target's transformation, wrap another estimator.
        assert listed - known <= {
            "FixedThresholdClassifier",
            "TunedThresholdClassifierCV",
            "TransformedTargetRegressor",
        }
        assert {name for name in known - listed if not name.startswith(("LGBM", "XGB"))} <= {
            "TransformedTargetRegressor"
        }


def test_parameters_are_handed_on_and_the_estimator_can_be_cloned() -> None:
    estimator = made("LogisticRegression", C=0.5, max_iter=7)
    assert isinstance(estimator, LogisticRegression)
    assert (clone(estimator).C, clone(estimator).max_iter) == (0.5, 7)


def test_the_seed_is_that_of_the_run_and_the_name_unless_one_is_given() -> None:
    first, again, other = (made("RandomForestClassifier", seed=seed).random_state for seed in (0, 0, 1))
    assert first == again != other
    assert 0 <= first < 2**31
    assert made("ExtraTreesClassifier").random_state != first
    assert made("RandomForestClassifier", random_state=3).random_state == 3
    assert not hasattr(made("GaussianNB"), "random_state")


@pytest.mark.parametrize("name", ["LGBMClassifier", "XGBClassifier"])
def test_boosted_trees_are_quiet_take_one_thread_and_repeat_themselves(name: str, capfd: Any) -> None:
    pytest.importorskip("lightgbm" if name.startswith("LGBM") else "xgboost")
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 3))
    features[rng.random(features.shape) < 0.1] = np.nan
    y = (np.nan_to_num(features[:, 0]) > 0).astype(int)
    first, again = (clone(made(name, n_estimators=5)).fit(features, y).predict_proba(features) for _ in range(2))
    assert made(name).n_jobs == 1
    assert np.array_equal(first, again)
    assert capfd.readouterr() == ("", "")


def test_boosted_trees_take_parameters_that_only_their_library_knows() -> None:
    pytest.importorskip("lightgbm")
    assert made("LGBMClassifier", max_bin=63).get_params()["max_bin"] == 63
    assert made("LGBMRegressor", is_classification=False, cat_smooth=1.0).get_params()["cat_smooth"] == 1.0
    assert "LGBMClassifier.max_bins: no such parameter; did you mean max_bin" in complaint("LGBMClassifier", max_bins=3)


def test_an_unknown_estimator_is_named_with_the_nearest() -> None:
    assert complaint("RandomForrestClassifier").startswith(
        "RandomForrestClassifier: no such estimator; did you mean RandomForestClassifier"
    )
    assert "XGBClassifier" in complaint("XGBoostClassifier")


def test_an_unknown_parameter_is_named_with_the_nearest() -> None:
    said = complaint("RandomForestClassifier", n_estimator=10)
    assert said == "RandomForestClassifier.n_estimator: no such parameter; did you mean n_estimators, random_state?"
    pytest.importorskip("xgboost")
    assert "XGBClassifier.max_deth: no such parameter; did you mean max_depth" in complaint("XGBClassifier", max_deth=2)


def test_a_value_that_the_estimator_can_not_take_is_named_before_anything_trains() -> None:
    said = complaint("RandomForestClassifier", n_estimators=-1)
    assert said.startswith("RandomForestClassifier.n_estimators=-1: The 'n_estimators' parameter")


def test_an_estimator_for_the_other_task_is_refused_with_its_twin() -> None:
    assert complaint("RandomForestRegressor").endswith("which needs a classifier; use RandomForestClassifier")
    said = complaint("RandomForestClassifier", is_classification=False)
    assert said.startswith("RandomForestClassifier: it is a classifier, and the task is regression")
    assert "LogisticRegression: it is a classifier" in complaint("LogisticRegression", is_classification=False)


def test_an_estimator_that_wraps_another_is_refused() -> None:
    assert complaint("OneVsRestClassifier").startswith("OneVsRestClassifier: it wraps another estimator (estimator)")


def test_a_library_that_is_not_installed_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    said = complaint("LGBMClassifier")
    assert said.startswith("LGBMClassifier: lightgbm isn't installed")
    assert "pip install 'graftstack[boosting]'" in said
