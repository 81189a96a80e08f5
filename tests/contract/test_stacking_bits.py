"""Our stacks learn what scikit-learn's learn, to the bit, for base models that leave nothing to chance."""

# ruff: noqa: N803 - scikit-learn calls the rows X

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn import ensemble
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, make_multilabel_classification
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import ExtraTreesRegressor, GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from graftstack.executors import ProcessExecutor
from graftstack.stacking import StackingClassifier, StackingRegressor

IRIS, IRIS_CLASSES = load_iris(return_X_y=True)
IRIS_NAMES = np.array(["setosa", "versicolor", "virginica"])[IRIS_CLASSES]
DIABETES, DIABETES_TARGETS = load_diabetes(return_X_y=True)
TUMOURS, IS_BENIGN = load_breast_cancer(return_X_y=True)
INDICATED, INDICATORS = make_multilabel_classification(n_samples=80, n_classes=3, random_state=0)

CLASSIFIERS = [
    ("logistic", make_pipeline(StandardScaler(), LogisticRegression())),
    ("forest", RandomForestClassifier(n_estimators=7, random_state=0)),
    ("bayes", GaussianNB()),
    ("neighbours", KNeighborsClassifier()),
    ("discriminant", LinearDiscriminantAnalysis()),
    ("margin", LinearSVC(random_state=0)),
    ("kernel", SVC(random_state=0)),
    ("ridge", RidgeClassifier()),
]
BOOSTED = ("boosted", GradientBoostingClassifier(n_estimators=3, random_state=0))
FEW_CLASSIFIERS = [("tree", DecisionTreeClassifier(max_depth=3, random_state=0)), ("ridge", RidgeClassifier())]
REGRESSORS = [
    ("linear", LinearRegression()),
    ("trees", ExtraTreesRegressor(n_estimators=7, random_state=0)),
    ("neighbours", KNeighborsRegressor()),
    ("kernel", SVR()),
    ("tree", DecisionTreeRegressor(max_depth=4, random_state=0)),
]


class LogisticThatKeeps(LogisticRegression):
    """Remembers what it was taught."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "LogisticThatKeeps":
        self.taught_ = X.toarray() if sparse.issparse(X) else np.array(X)
        super().fit(X, y, sample_weight)
        return self


class NeighboursThatKeep(KNeighborsClassifier):
    """Remembers what they were taught."""

    def fit(self, X: Any, y: Any) -> "NeighboursThatKeep":
        self.taught_ = np.array(X)
        super().fit(X, y)
        return self


class RidgeThatKeeps(Ridge):
    """Remembers what it was taught."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "RidgeThatKeeps":
        self.taught_ = X.toarray() if sparse.issparse(X) else np.array(X)
        super().fit(X, y, sample_weight)
        return self


def assert_same_bits(ours: Any, theirs: Any, X: Any, y: Any, **fit_params: Any) -> None:
    """Fits both and compares what the final estimators were taught, and what both predict."""
    ours.fit(X, y, **fit_params)
    theirs.fit(X, y, **fit_params)
    np.testing.assert_array_equal(ours.final_estimator_.taught_, theirs.final_estimator_.taught_)
    assert_same_predictions(ours, theirs, X)


def assert_same_predictions(ours: Any, theirs: Any, X: Any) -> None:
    np.testing.assert_array_equal(_dense(ours.transform(X)), _dense(theirs.transform(X)))
    assert sparse.issparse(ours.transform(X)) == sparse.issparse(theirs.transform(X))
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    assert ours.predict(X).dtype == theirs.predict(X).dtype
    assert ours.stack_method_ == theirs.stack_method_
    assert list(ours.named_estimators_) == list(theirs.named_estimators_)
    if hasattr(theirs, "n_features_in_"):
        assert ours.n_features_in_ == theirs.n_features_in_
        # Theirs are too few where a base model has a list of outputs.
        if len(names := theirs.get_feature_names_out()) == ours.transform(X).shape[1]:
            np.testing.assert_array_equal(ours.get_feature_names_out(), names)
        assert len(ours.get_feature_names_out()) == ours.transform(X).shape[1]
    if hasattr(theirs, "predict_proba"):
        np.testing.assert_array_equal(ours.predict_proba(X), theirs.predict_proba(X))
        np.testing.assert_array_equal(ours.classes_, theirs.classes_)


def _dense(features: Any) -> Any:
    return features.toarray() if sparse.issparse(features) else features


def assert_same_classifier(bases: Any, X: Any, y: Any, *, fit_params: Any = None, **params: Any) -> None:
    params = {"final_estimator": LogisticThatKeeps(max_iter=5000), "cv": 3} | params
    both = [
        kind(clone_all(bases), **{key: clone(value, safe=False) for key, value in params.items()})
        for kind in (StackingClassifier, ensemble.StackingClassifier)
    ]
    assert_same_bits(*both, X, y, **(fit_params or {}))


def assert_same_regressor(bases: Any, X: Any, y: Any, *, fit_params: Any = None, **params: Any) -> None:
    params = {"final_estimator": RidgeThatKeeps(), "cv": 3} | params
    both = [kind(clone_all(bases), **params) for kind in (StackingRegressor, ensemble.StackingRegressor)]
    assert_same_bits(*both, X, y, **(fit_params or {}))


def clone_all(bases: Any) -> Any:
    return [(name, base if base == "drop" else clone(base)) for name, base in bases]


@pytest.mark.parametrize("base", [*CLASSIFIERS, BOOSTED], ids=[name for name, _ in [*CLASSIFIERS, BOOSTED]])
def test_each_classifier_predicts_the_same_of_three_classes(base: Any) -> None:
    assert_same_classifier([base], IRIS, IRIS_CLASSES)


@pytest.mark.parametrize("base", REGRESSORS, ids=[name for name, _ in REGRESSORS])
def test_each_regressor_predicts_the_same(base: Any) -> None:
    assert_same_regressor([base], DIABETES, DIABETES_TARGETS)


def test_many_classifiers_together_learn_the_same() -> None:
    assert_same_classifier(CLASSIFIERS, IRIS, IRIS_CLASSES)


def test_many_regressors_together_learn_the_same() -> None:
    assert_same_regressor(REGRESSORS, DIABETES, DIABETES_TARGETS)


def test_labels_may_be_text() -> None:
    assert_same_classifier(FEW_CLASSIFIERS, IRIS, IRIS_NAMES)


def test_of_two_classes_one_column_is_dropped() -> None:
    assert_same_classifier(CLASSIFIERS[:5], TUMOURS, IS_BENIGN)


@pytest.mark.parametrize("method", ["predict_proba", "predict"])
def test_the_stack_method_may_be_chosen(method: str) -> None:
    assert_same_classifier(CLASSIFIERS[:4], IRIS, IRIS_CLASSES, stack_method=method)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("method", ["auto", "predict"])
def test_rows_may_have_several_labels(method: str) -> None:
    bases = [
        ("forest", RandomForestClassifier(n_estimators=5, random_state=0)),
        ("net", MLPClassifier((4,), max_iter=20, random_state=0)),
        ("ridge", RidgeClassifier()),
        ("neighbours", KNeighborsClassifier()),
    ]
    assert_same_classifier(
        bases, INDICATED, INDICATORS, stack_method=method, final_estimator=NeighboursThatKeep(), passthrough=True
    )


@pytest.mark.parametrize("passthrough", [False, True])
@pytest.mark.parametrize("as_sparse", [sparse.csr_array, sparse.csc_matrix, sparse.coo_array])
def test_rows_may_be_sparse(as_sparse: Any, passthrough: bool) -> None:
    assert_same_classifier(FEW_CLASSIFIERS, as_sparse(IRIS), IRIS_CLASSES, passthrough=passthrough)
    assert_same_regressor(
        [("linear", Ridge()), ("tree", REGRESSORS[-1][1])],
        as_sparse(DIABETES),
        DIABETES_TARGETS,
        passthrough=passthrough,
    )


@pytest.mark.parametrize("passthrough", [False, True])
def test_rows_may_be_a_frame_with_column_names(passthrough: bool) -> None:
    frame = pd.DataFrame(IRIS, columns=["a", "b", "c", "d"], index=np.arange(150)[::-1])
    assert_same_classifier(FEW_CLASSIFIERS, frame, pd.Series(IRIS_NAMES, index=frame.index), passthrough=passthrough)
    ours = StackingClassifier(FEW_CLASSIFIERS, cv=3).fit(frame, IRIS_NAMES)
    np.testing.assert_array_equal(ours.feature_names_in_, frame.columns)


def test_rows_may_be_a_frame_of_numbers_and_text() -> None:
    frame = pd.DataFrame({"length": IRIS[:, 0], "kind": np.where(IRIS[:, 1] > 3, "wide", "slim")})
    encoded = make_column_transformer((OneHotEncoder(), ["kind"]), remainder="passthrough")
    bases = [("tree", make_pipeline(encoded, DecisionTreeClassifier(max_depth=3, random_state=0)))]
    assert_same_classifier(bases, frame, IRIS_CLASSES)


def test_rows_may_be_lists() -> None:
    assert_same_classifier(FEW_CLASSIFIERS, IRIS.tolist(), IRIS_NAMES.tolist())


def test_rows_may_be_a_kernel_whose_columns_are_split_too() -> None:
    assert_same_classifier([("kernel", SVC(kernel="precomputed", random_state=0))], IRIS @ IRIS.T, IRIS_CLASSES)


def test_features_may_pass_through() -> None:
    assert_same_classifier(FEW_CLASSIFIERS, IRIS, IRIS_CLASSES, passthrough=True)
    assert_same_regressor(REGRESSORS[:2], DIABETES, DIABETES_TARGETS, passthrough=True)


def test_rows_may_have_weights() -> None:
    weights = np.linspace(0.1, 2, len(IRIS))
    bases = [("logistic", LogisticRegression(max_iter=5000)), *FEW_CLASSIFIERS]
    assert_same_classifier(bases, IRIS, IRIS_CLASSES, fit_params={"sample_weight": weights})
    weights = np.linspace(0.1, 2, len(DIABETES))
    assert_same_regressor(
        [("linear", LinearRegression()), ("tree", REGRESSORS[-1][1])],
        DIABETES,
        DIABETES_TARGETS,
        fit_params={"sample_weight": weights},
    )


def test_an_estimator_may_be_dropped_by_name() -> None:
    bases = [("tree", "drop"), ("ridge", RidgeClassifier()), ("bayes", GaussianNB())]
    assert_same_classifier(bases, IRIS, IRIS_CLASSES)


@pytest.mark.parametrize(
    "cv",
    [
        None,
        4,
        KFold(3, shuffle=True, random_state=0),
        StratifiedKFold(3, shuffle=True, random_state=1),
        list(KFold(5, shuffle=True, random_state=2).split(IRIS)),
    ],
    ids=["default", "number", "shuffled", "stratified", "list"],
)
def test_folds_are_made_in_the_same_way(cv: Any) -> None:
    assert_same_classifier(FEW_CLASSIFIERS, IRIS, IRIS_CLASSES, cv=cv)


@pytest.mark.filterwarnings("ignore:Number of classes in training fold:RuntimeWarning")
def test_a_class_that_a_fold_never_trains_on_is_predicted_in_the_same_way() -> None:
    bases = [("tree", DecisionTreeClassifier(random_state=0)), ("bayes", GaussianNB())]
    assert_same_classifier(bases, IRIS, IRIS_NAMES, cv=KFold(3))


def test_a_splitter_with_a_state_gives_the_same_folds_at_each_fit_and_keeps_its_state() -> None:
    ours = StackingClassifier(FEW_CLASSIFIERS, cv=KFold(3, shuffle=True, random_state=np.random.RandomState(0)))
    first = ours.fit(IRIS, IRIS_CLASSES).oof_
    np.testing.assert_array_equal(ours.fit(IRIS, IRIS_CLASSES).oof_, first)


def test_fitted_estimators_are_taken_as_they_are() -> None:
    fitted = [(name, clone(base).fit(IRIS[::2], IRIS_CLASSES[::2])) for name, base in FEW_CLASSIFIERS]
    params = {"cv": "prefit", "final_estimator": LogisticThatKeeps(max_iter=5000)}
    ours, theirs = StackingClassifier(fitted, **params), ensemble.StackingClassifier(fitted, **params)
    assert_same_bits(ours, theirs, IRIS, IRIS_CLASSES)
    assert ours.estimators_ == [base for _, base in fitted]


def test_fitted_estimators_may_have_lists_of_outputs() -> None:
    fitted = [("forest", RandomForestClassifier(n_estimators=5, random_state=0).fit(INDICATED, INDICATORS))]
    params = {"cv": "prefit", "final_estimator": NeighboursThatKeep()}
    ours, theirs = StackingClassifier(fitted, **params), ensemble.StackingClassifier(fitted, **params)
    assert_same_bits(ours, theirs, INDICATED, INDICATORS)


def test_groups_give_the_folds_that_scikit_learn_would_have_to_be_given() -> None:
    groups = np.arange(150) % 7
    ours = StackingClassifier(FEW_CLASSIFIERS, cv=GroupKFold(3)).fit(IRIS, IRIS_NAMES, groups=groups)
    splits = list(GroupKFold(3).split(IRIS, IRIS_NAMES, groups))
    theirs = ensemble.StackingClassifier(FEW_CLASSIFIERS, cv=splits).fit(IRIS, IRIS_NAMES)
    np.testing.assert_array_equal(ours.final_estimator_.coef_, theirs.final_estimator_.coef_)
    for fold in ours.folds_.folds:
        assert not set(groups[fold.train]) & set(groups[fold.test])


@pytest.mark.parametrize("executor", ["inline", "processes"])
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_the_number_of_workers_changes_nothing(executor: str, n_jobs: int) -> None:
    bases, final = CLASSIFIERS[1:5], LogisticRegression(max_iter=5000)
    ours = StackingClassifier(bases, final, cv=3, executor=executor, n_jobs=n_jobs).fit(IRIS, IRIS_NAMES)
    theirs = ensemble.StackingClassifier(bases, final, cv=3).fit(IRIS, IRIS_NAMES)
    np.testing.assert_array_equal(ours.final_estimator_.coef_, theirs.final_estimator_.coef_)
    np.testing.assert_array_equal(ours.predict_proba(IRIS), theirs.predict_proba(IRIS))


def test_sums_of_blas_are_the_same_on_any_number_of_slots() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3000, 300))
    labels = (rows[:, 0] + rng.normal(size=3000) > 0).astype(int)
    bases = [
        ("logistic", LogisticRegression(max_iter=20, tol=1e-1)),
        ("components", make_pipeline(PCA(20, svd_solver="covariance_eigh"), GaussianNB())),
    ]
    found = [
        StackingClassifier(bases, GaussianNB(), cv=2, executor=executor, n_jobs=n_jobs).fit(rows, labels).oof_
        for executor, n_jobs in (("inline", None), ("processes", 1), ("processes", 2))
    ]
    other = ProcessExecutor(1)
    found.append(StackingClassifier(bases, GaussianNB(), cv=2, executor=other).fit(rows, labels).oof_)
    other.close()
    for each in found[1:]:
        assert each.tobytes() == found[0].tobytes()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_other_processes_change_nothing(num_workers: int) -> None:
    frame = pd.DataFrame(INDICATED, columns=[f"column{place}" for place in range(INDICATED.shape[1])])
    bases = [("forest", RandomForestClassifier(n_estimators=5, random_state=0)), ("ridge", RidgeClassifier())]
    executor = ProcessExecutor(num_workers)
    try:
        for rows, labels in ((frame, INDICATORS), (sparse.csr_array(IRIS), IRIS_NAMES)):
            ours = StackingClassifier(bases, KNeighborsClassifier(), cv=3, executor=executor)
            theirs = ensemble.StackingClassifier(bases, KNeighborsClassifier(), cv=3)
            assert_same_predictions(ours.fit(rows, labels), theirs.fit(rows, labels), rows)
    finally:
        executor.close()
