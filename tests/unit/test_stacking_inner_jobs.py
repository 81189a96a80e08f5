"""What an estimator starts by itself stays within the slots of its call."""

from typing import Any

import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from graftstack.executors import inline, limit_threads
from graftstack.runtime import Executor, InlineExecutor
from graftstack.stacking import StackingClassifier
from graftstack.stacking.inner_jobs import limited_jobs

X, Y = np.arange(60.0).reshape(-1, 1), np.arange(60) % 2


class Greedy(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Keeps how many jobs it had when it was fitted and when it predicted."""

    def __init__(self, n_jobs: int | None = None) -> None:
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any) -> "Greedy":  # noqa: N803
        self.classes_ = np.unique(y)
        self.jobs_ = [self.n_jobs]
        return self

    def predict(self, X: Any) -> Any:  # noqa: N803
        self.jobs_.append(self.n_jobs)
        return np.zeros(len(X), dtype=int)


@pytest.mark.parametrize(("n_jobs", "within"), [(-1, 2), (8, 2), (2, 2), (1, 1), (None, None)])
def test_jobs_are_no_more_than_the_threads_of_the_call(n_jobs: int | None, within: int | None) -> None:
    model = Greedy(n_jobs)
    with limit_threads(2), limited_jobs(model):
        assert model.n_jobs == within
    assert model.n_jobs == n_jobs
    with limited_jobs(model):
        assert model.n_jobs == n_jobs


def test_parts_of_an_estimator_are_limited_too() -> None:
    columns = make_column_transformer((StandardScaler(), [0]), n_jobs=-1)
    model = make_pipeline(columns, RandomForestClassifier(3, n_jobs=-1), KNeighborsClassifier(n_jobs=3))
    with limit_threads(1), limited_jobs(model):
        assert [step.n_jobs for _, step in model.steps] == [1, 1, 1]
    assert [step.n_jobs for _, step in model.steps] == [-1, -1, 3]


def test_lightgbm_which_takes_all_cores_by_itself_is_limited() -> None:
    lightgbm = pytest.importorskip("lightgbm")
    model = lightgbm.LGBMClassifier(n_estimators=2, verbosity=-1)
    with limit_threads(1), limited_jobs(model):
        assert model.n_jobs == 1
        model.fit(X, Y)
    assert model.get_params()["n_jobs"] is None


@pytest.mark.parametrize(("executor", "jobs"), [(inline(), {1}), (InlineExecutor(), {-1})])
def test_models_of_a_stack_are_limited_where_the_executor_limits_threads(executor: Executor, jobs: set[int]) -> None:
    bases = [("greedy", Greedy(-1)), ("near", KNeighborsClassifier(n_jobs=-1))]
    fitted = StackingClassifier(bases, cv=3, executor=executor, mode="bag").fit(X, Y)
    assert {num for model in fitted.estimators_[0].models for num in model.jobs_} == jobs
    assert all(model.n_jobs == -1 for bag in fitted.estimators_ for model in bag.models)
