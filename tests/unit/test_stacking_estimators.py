"""What `StackingClassifier` and `StackingRegressor` do beyond scikit-learn's."""

# ruff: noqa: N803 - scikit-learn calls the rows X

import copy
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    ShuffleSplit,
    TimeSeriesSplit,
    cross_val_predict,
    cross_validate,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from graftstack.errors import GraftstackError, TrainingError
from graftstack.executors import ProcessExecutor
from graftstack.runtime import Call, InlineExecutor
from graftstack.stacking import StackingClassifier, StackingRegressor

IRIS, IRIS_CLASSES = load_iris(return_X_y=True)
DIABETES, DIABETES_TARGETS = load_diabetes(return_X_y=True)
CLASSIFIERS = [("tree", DecisionTreeClassifier(max_depth=3, random_state=0)), ("bayes", GaussianNB())]
REGRESSORS = [("tree", DecisionTreeRegressor(max_depth=3, random_state=0)), ("neighbours", KNeighborsRegressor())]


class Counting(InlineExecutor):
    """Counts calls; can't be copied or pickled, like everything that holds processes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0
        self.is_closed = False
        self._lock = threading.Lock()

    def submit(self, call: Call) -> None:
        self.num_calls += 1
        super().submit(call)

    def close(self) -> None:
        self.is_closed = True
        super().close()


class Failing(GaussianNB):
    """Can't learn."""

    def fit(self, X: Any, y: Any) -> "Failing":
        raise ZeroDivisionError("it broke")


class Slow(GaussianNB):
    """Takes its time."""

    def fit(self, X: Any, y: Any) -> "Slow":
        time.sleep(0.3)
        super().fit(X, y)
        return self


# Folds in time


def test_folds_in_time_teach_the_final_estimator_the_rows_that_they_test() -> None:
    folds = TimeSeriesSplit(4)
    stack = StackingRegressor(REGRESSORS, cv=folds).fit(DIABETES, DIABETES_TARGETS)
    tested = np.concatenate([test for _, test in folds.split(DIABETES)])
    expected = np.zeros((len(DIABETES), 2))
    for train, test in folds.split(DIABETES):
        for column, (_, base) in enumerate(REGRESSORS):
            expected[test, column] = clone(base).fit(DIABETES[train], DIABETES_TARGETS[train]).predict(DIABETES[test])
    np.testing.assert_array_equal(stack.folds_.covered, tested)
    np.testing.assert_array_equal(stack.oof_, expected[tested])
    final = RidgeCV().fit(expected[tested], DIABETES_TARGETS[tested])
    np.testing.assert_array_equal(stack.final_estimator_.coef_, final.coef_)


def test_folds_in_time_go_with_weights_and_passthrough() -> None:
    weights = np.linspace(0.5, 1, len(DIABETES))
    bases, folds = [("linear", Ridge())], TimeSeriesSplit(4)
    stack = StackingRegressor(bases, Ridge(), cv=folds, passthrough=True)
    stack.fit(DIABETES, DIABETES_TARGETS, sample_weight=weights)
    tested = stack.folds_.covered
    final = Ridge().fit(np.hstack([stack.oof_, DIABETES[tested]]), DIABETES_TARGETS[tested], weights[tested])
    np.testing.assert_array_equal(stack.final_estimator_.coef_, final.coef_)


def test_folds_in_time_leave_fewer_rows_to_each_level() -> None:
    stack = StackingRegressor(REGRESSORS, cv=TimeSeriesSplit(4), levels=[[("above", Ridge())]])
    stack.fit(DIABETES, DIABETES_TARGETS)
    first, *_, last = [test for _, test in TimeSeriesSplit(4).split(DIABETES)]
    np.testing.assert_array_equal(stack.folds_.covered, np.arange(first[-1] + 1, last[-1] + 1))
    assert len(stack.oof_) == len(stack.folds_.covered)
    assert stack.predict(DIABETES).shape == DIABETES_TARGETS.shape


def test_folds_that_test_some_rows_twice_are_refused_as_by_scikit_learn() -> None:
    stack = StackingClassifier(CLASSIFIERS, cv=ShuffleSplit(3, random_state=0))
    with pytest.raises(ValueError, match="only works for partitions"):
        stack.fit(IRIS, IRIS_CLASSES)


# Groups


def test_groups_are_split_through_the_tools_of_scikit_learn() -> None:
    groups = np.arange(150) % 10
    stack = StackingClassifier(CLASSIFIERS, cv=GroupKFold(3))
    scores = cross_validate(stack, IRIS, IRIS_CLASSES, cv=3, params={"groups": groups})
    assert scores["test_score"].min() > 0.8


def test_groups_go_to_the_splitter_where_metadata_is_routed() -> None:
    groups = np.arange(150) % 10
    with config_context(enable_metadata_routing=True):
        stack = StackingClassifier(CLASSIFIERS, cv=GroupKFold(3)).fit(IRIS, IRIS_CLASSES, groups=groups)
    for fold in stack.folds_.folds:
        assert not set(groups[fold.train]) & set(groups[fold.test])


@pytest.mark.parametrize("cv", [None, 4])
def test_a_number_of_folds_keeps_groups_together(cv: Any) -> None:
    groups = np.arange(len(DIABETES)) // 7
    classes = DIABETES_TARGETS > 140
    stacks = [
        StackingClassifier(CLASSIFIERS, cv=cv).fit(DIABETES, classes, groups=groups),
        StackingClassifier([("tree", DecisionTreeClassifier())], KNeighborsClassifier(), cv=cv).fit(
            DIABETES, np.stack([classes, ~classes], axis=1), groups=groups
        ),
        StackingRegressor(REGRESSORS, cv=cv).fit(DIABETES, DIABETES_TARGETS, groups=groups),
    ]
    for stack in stacks:
        assert len(stack.folds_.folds) == (cv or 5)
        for fold in stack.folds_.folds:
            assert not set(groups[fold.train]) & set(groups[fold.test])


@pytest.mark.filterwarnings("ignore:The groups parameter is ignored by KFold")
def test_folds_that_split_a_group_are_refused() -> None:
    stack = StackingClassifier(CLASSIFIERS, cv=KFold(3, shuffle=True, random_state=0))
    with pytest.raises(ValueError, match=r"trains on the group of row .*; use folds that keep them apart"):
        stack.fit(IRIS, IRIS_CLASSES, groups=np.arange(150) % 10)


def test_folds_that_train_on_what_they_test_are_refused() -> None:
    everything = np.arange(150)
    with pytest.raises(ValueError, match="fold 1 of 1 trains on the row of row 0, which it tests"):
        StackingClassifier(CLASSIFIERS, cv=[(everything, everything)]).fit(IRIS, IRIS_CLASSES)


def test_a_splitter_that_wants_groups_says_so() -> None:
    with pytest.raises(ValueError, match="groups"):
        StackingClassifier(CLASSIFIERS, cv=GroupKFold(3)).fit(IRIS, IRIS_CLASSES)


def test_groups_of_one_fit_are_forgotten_at_the_next() -> None:
    stack = StackingClassifier(CLASSIFIERS, cv=GroupKFold(3))
    stack.fit_transform(IRIS, IRIS_CLASSES, groups=np.arange(150) % 10)
    with pytest.raises(ValueError, match="groups"):
        stack.fit(IRIS, IRIS_CLASSES)


def test_metadata_that_is_not_routed_is_refused_as_by_scikit_learn() -> None:
    with pytest.raises(ValueError, match="only supported if enable_metadata_routing=True"):
        StackingClassifier(CLASSIFIERS).fit(IRIS, IRIS_CLASSES, groups=np.arange(150), colour="red")


# Bags


def test_a_bag_predicts_the_mean_of_the_models_of_its_folds() -> None:
    folds = KFold(3, shuffle=True, random_state=0)
    stack = StackingClassifier(CLASSIFIERS, cv=folds, mode="bag").fit(IRIS, IRIS_CLASSES)
    expected = []
    for _, base in CLASSIFIERS:
        models = [clone(base).fit(IRIS[train], IRIS_CLASSES[train]) for train, _ in folds.split(IRIS)]
        expected.append(np.mean([model.predict_proba(IRIS) for model in models], axis=0))
    np.testing.assert_allclose(stack.transform(IRIS), np.hstack(expected), rtol=1e-12)
    assert stack.n_features_in_ == 4


def test_a_bag_teaches_its_final_estimator_what_a_refit_does_and_trains_less() -> None:
    executors = [Counting(), Counting()]
    bag, refit = [
        StackingRegressor(REGRESSORS, cv=3, mode=mode, executor=executor).fit(DIABETES, DIABETES_TARGETS)
        for mode, executor in zip(["bag", "refit"], executors, strict=True)
    ]
    np.testing.assert_array_equal(bag.oof_, refit.oof_)
    np.testing.assert_array_equal(bag.final_estimator_.coef_, refit.final_estimator_.coef_)
    assert [executor.num_calls for executor in executors] == [6, 8]


# Levels


@pytest.mark.parametrize("passthrough", [False, True])
def test_a_level_learns_from_what_the_one_below_predicts_of_rows_it_never_saw(passthrough: bool) -> None:
    folds = KFold(3, shuffle=True, random_state=0)
    above = [("near", KNeighborsClassifier()), ("tall", DecisionTreeClassifier(random_state=0))]
    stack = StackingClassifier(CLASSIFIERS, cv=folds, levels=[above], passthrough=passthrough)
    stack.fit(IRIS, IRIS_CLASSES)

    def with_rows(*blocks: Any) -> Any:
        return np.hstack([*blocks, IRIS] if passthrough else blocks)

    def out_of_fold(base: Any, inputs: Any) -> Any:
        return cross_val_predict(base, inputs, IRIS_CLASSES, cv=folds, method="predict_proba")

    first = with_rows(*(out_of_fold(base, IRIS) for _, base in CLASSIFIERS))
    second = [out_of_fold(base, first) for _, base in above]
    np.testing.assert_array_equal(stack.oof_, np.hstack(second))
    final = LogisticRegression().fit(with_rows(*second), IRIS_CLASSES)
    np.testing.assert_array_equal(stack.final_estimator_.coef_, final.coef_)

    at_first = with_rows(*(clone(base).fit(IRIS, IRIS_CLASSES).predict_proba(IRIS) for _, base in CLASSIFIERS))
    at_second = with_rows(*(clone(base).fit(first, IRIS_CLASSES).predict_proba(at_first) for _, base in above))
    np.testing.assert_array_equal(stack.transform(IRIS), at_second)
    np.testing.assert_array_equal(stack.predict_proba(IRIS), final.predict_proba(at_second))


def test_features_are_named_after_the_highest_level() -> None:
    stack = StackingClassifier(CLASSIFIERS, cv=3, levels=[[("gone", "drop"), ("near", KNeighborsClassifier())]])
    names = stack.fit(IRIS, IRIS_CLASSES).get_feature_names_out()
    assert list(names) == [f"stackingclassifier_near{place}" for place in range(3)]
    assert list(stack.named_estimators_) == ["tree", "bayes", "gone", "near"]
    assert stack.named_estimators_["gone"] == "drop"


def test_parameters_of_a_level_are_found_by_name() -> None:
    stack = StackingClassifier(CLASSIFIERS, cv=3, levels=[[("near", KNeighborsClassifier())]])
    search = GridSearchCV(stack, {"near__n_neighbors": [2, 30], "tree__max_depth": [1]}, cv=2, error_score="raise")
    assert search.fit(IRIS, IRIS_CLASSES).best_estimator_.get_params()["tree__max_depth"] == 1
    stack.set_params(near=GaussianNB(), passthrough=True)
    assert isinstance(stack.levels[0][0][1], GaussianNB)
    assert stack.passthrough


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([[]], "each level should be a non-empty list"),
        ([("near", GaussianNB())], "each level should be a non-empty list"),
        ([[("near", "drop")]], "All estimators of a level are dropped"),
        ([[("tree", GaussianNB())]], "not unique"),
        ([[("mode", GaussianNB())]], "conflict with constructor arguments"),
        ([[("a__b", GaussianNB())]], "must not contain __"),
    ],
)
def test_a_level_that_breaks_a_rule_is_refused(levels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StackingClassifier(CLASSIFIERS, levels=levels).fit(IRIS, IRIS_CLASSES)


def test_a_level_of_a_regressor_takes_regressors_only() -> None:
    with pytest.raises(ValueError, match="The estimator GaussianNB should be a regressor"):
        StackingRegressor(REGRESSORS, levels=[[("bayes", GaussianNB())]]).fit(DIABETES, DIABETES_TARGETS)


# The ledger


def test_a_second_fit_with_the_same_ledger_trains_nothing(tmp_path: Path) -> None:
    executor = Counting()
    stack = StackingClassifier(
        CLASSIFIERS, cv=3, executor=executor, ledger=tmp_path / "ledger", levels=[[("near", KNeighborsClassifier())]]
    )
    first = stack.fit(IRIS, IRIS_CLASSES).predict_proba(IRIS)
    num_trained = executor.num_calls
    again = clone(stack).fit(IRIS, IRIS_CLASSES)
    assert num_trained == 12
    assert executor.num_calls == num_trained
    np.testing.assert_array_equal(again.oof_, stack.oof_)
    np.testing.assert_array_equal(again.predict_proba(IRIS), first)


def test_what_killed_writers_left_in_a_ledger_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    left, written = tmp_path / ".left.npz.1.tmp", tmp_path / ".written.npz.2.tmp"
    for path in (left, written):
        path.touch()
    os.utime(left, (0, 0))
    StackingClassifier(CLASSIFIERS, cv=3, ledger=tmp_path).fit(IRIS, IRIS_CLASSES)
    assert not left.exists()
    assert written.exists()


def test_a_ledger_trains_only_what_is_new(tmp_path: Path) -> None:
    executor = Counting()
    StackingClassifier(CLASSIFIERS, cv=3, executor=executor, ledger=str(tmp_path)).fit(IRIS, IRIS_CLASSES)
    more = [*CLASSIFIERS, ("near", KNeighborsClassifier())]
    num_trained = executor.num_calls
    StackingClassifier(more, cv=3, executor=executor, ledger=str(tmp_path)).fit(IRIS, IRIS_CLASSES)
    assert executor.num_calls == num_trained + 4
    StackingClassifier(more, cv=3, executor=executor, ledger=str(tmp_path)).fit(IRIS * 2, IRIS_CLASSES)
    assert executor.num_calls == num_trained + 4 + 12


# Failures


def test_an_error_of_a_base_model_comes_as_it_was_raised() -> None:
    with pytest.raises(ZeroDivisionError, match="it broke"):
        StackingClassifier([*CLASSIFIERS, ("bad", Failing())], cv=3).fit(IRIS, IRIS_CLASSES)


def test_a_base_model_that_fails_is_dropped_on_request() -> None:
    bad = ("bad", Failing())
    stack = StackingClassifier([CLASSIFIERS[0], bad, CLASSIFIERS[1]], cv=3, on_error="drop").fit(IRIS, IRIS_CLASSES)
    without = StackingClassifier(CLASSIFIERS, cv=3).fit(IRIS, IRIS_CLASSES)
    np.testing.assert_array_equal(stack.predict_proba(IRIS), without.predict_proba(IRIS))
    np.testing.assert_array_equal(stack.get_feature_names_out(), without.get_feature_names_out())
    assert list(stack.dropped_) == ["bad"]
    assert "it broke" in stack.dropped_["bad"]
    assert stack.named_estimators_["bad"] == "drop"
    assert len(stack.estimators_) == len(stack.stack_method_) == 2
    assert without.dropped_ == {}


def test_dropping_the_last_base_model_is_an_error() -> None:
    with pytest.raises(TrainingError, match="bad"):
        StackingClassifier([("bad", Failing())], cv=3, on_error="drop").fit(IRIS, IRIS_CLASSES)


def test_a_limit_of_time_drops_what_it_leaves_unfinished() -> None:
    bases = [("bayes", GaussianNB()), ("slow", Slow())]
    stack = StackingClassifier(bases, cv=3, time_limit_s=0.25).fit(IRIS, IRIS_CLASSES)
    assert list(stack.dropped_) == ["slow"]
    assert "time_limit_s" in stack.dropped_["slow"]
    assert stack.transform(IRIS).shape == (150, 3)


def test_a_limit_of_time_that_nothing_meets_is_named() -> None:
    with pytest.raises(GraftstackError, match="time_limit_s"):
        StackingClassifier([("slow", Slow())], cv=3, time_limit_s=0.01).fit(IRIS, IRIS_CLASSES)


# Executors


def test_an_executor_of_the_caller_stays_open() -> None:
    executor = Counting()
    StackingClassifier(CLASSIFIERS, cv=3, executor=executor).fit(IRIS, IRIS_CLASSES)
    assert executor.num_calls == 8
    assert not executor.is_closed


def test_an_executor_goes_to_clones_and_not_into_files() -> None:
    executor = Counting()
    stack = StackingClassifier(CLASSIFIERS, cv=3, executor=executor).fit(IRIS, IRIS_CLASSES)
    assert clone(stack).executor is executor
    assert stack.executor is executor
    for copied in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert copied.executor is None
        np.testing.assert_array_equal(copied.predict_proba(IRIS), stack.predict_proba(IRIS))
    named = StackingClassifier(CLASSIFIERS, executor="inline")
    assert clone(named).executor == pickle.loads(pickle.dumps(named)).executor == "inline"


def test_metadata_is_routed_in_other_processes_too() -> None:
    weights = np.linspace(0.1, 2, len(DIABETES))
    executor = ProcessExecutor(2)
    try:
        with config_context(enable_metadata_routing=True):
            scaler = StandardScaler().set_fit_request(sample_weight=False)
            inner = make_pipeline(scaler, Ridge().set_fit_request(sample_weight=True))
            stacks = [
                StackingRegressor([("inner", inner)], Ridge(), cv=3, executor=each) for each in ("inline", executor)
            ]
            here, there = [stack.fit(DIABETES, DIABETES_TARGETS, sample_weight=weights) for stack in stacks]
    finally:
        executor.close()
    np.testing.assert_array_equal(here.oof_, there.oof_)


def test_tasks_are_told_of_when_verbose(capfd: pytest.CaptureFixture[str]) -> None:
    StackingClassifier(CLASSIFIERS, cv=3, verbose=1).fit(IRIS, IRIS_CLASSES)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 8
    assert re.search(r"^8 of 8: (tree|bayes) ", lines[-1])
    StackingClassifier(CLASSIFIERS, cv=3).fit(IRIS, IRIS_CLASSES)
    assert capfd.readouterr().err == ""


# Parameters


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"mode": "bagging"}, "The 'mode' parameter of StackingClassifier must be a str among {'(refit|bag)"),
        ({"executor": "dask"}, "The 'executor' parameter .*'inline'"),
        ({"executor": 3}, "The 'executor' parameter"),
        ({"levels": None}, "The 'levels' parameter"),
        ({"ledger": 3}, "The 'ledger' parameter"),
        ({"on_error": "ignore"}, "The 'on_error' parameter"),
        ({"time_limit_s": 0}, "The 'time_limit_s' parameter"),
        ({"n_jobs": 0}, "n_jobs == 0"),
        ({"cv": 1}, "The 'cv' parameter .* an int in the range"),
        ({"stack_method": "transform"}, "The 'stack_method' parameter"),
        ({"cv": "prefit", "mode": "bag"}, "mode='bag' .* cv='prefit'"),
        ({"cv": "prefit", "levels": [[("near", GaussianNB())]]}, "levels .* cv='prefit'"),
        ({"final_estimator": Ridge()}, "'final_estimator' parameter should be a classifier"),
    ],
)
def test_a_parameter_that_breaks_a_rule_is_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StackingClassifier(CLASSIFIERS).set_params(**params).fit(IRIS, IRIS_CLASSES)


def test_fitting_on_fitted_estimators_leaves_no_folds_of_an_earlier_fit() -> None:
    stack = StackingClassifier(CLASSIFIERS, cv=3).fit(IRIS, IRIS_CLASSES)
    stack.set_params(cv="prefit", estimators=list(stack.named_estimators_.items())).fit(IRIS, IRIS_CLASSES)
    assert not hasattr(stack, "oof_")
    assert not hasattr(stack, "folds_")
    assert stack.predict(IRIS).shape == (150,)


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, graftstack.stacking\n"
        "assert not {'torch', 'ray', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "from graftstack.stacking import StackingClassifier\n"
        "assert not {'torch', 'ray', 'hydra'} & set(sys.modules)\n"
        "assert not hasattr(graftstack.stacking, 'Stacking')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
