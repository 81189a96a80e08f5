"""scikit-learn's stacking estimators whose tasks run on a Ray cluster."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier

from graftstack.stacking import StackingClassifier

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("embedded_ray")]

IRIS, IRIS_CLASSES = load_iris(return_X_y=True)
BASES = [("forest", RandomForestClassifier(n_estimators=5, random_state=0)), ("near", KNeighborsClassifier())]


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_a_stack_on_ray_learns_what_one_in_this_process_does(n_jobs: int | None) -> None:
    levels = [[("bayes", GaussianNB())]]
    here, there = [
        StackingClassifier(BASES, cv=3, levels=levels, mode="bag", executor=name, n_jobs=jobs).fit(IRIS, IRIS_CLASSES)
        for name, jobs in (("inline", None), ("ray", n_jobs))
    ]
    np.testing.assert_array_equal(here.oof_, there.oof_)
    np.testing.assert_array_equal(here.predict_proba(IRIS), there.predict_proba(IRIS))


def test_sparse_rows_and_weights_travel_to_ray() -> None:
    weights = np.linspace(0.5, 1, 150)
    bases = [BASES[0]]
    here, there = [
        StackingClassifier(bases, cv=3, executor=name).fit(sparse.csr_array(IRIS), IRIS_CLASSES, sample_weight=weights)
        for name in ("inline", "ray")
    ]
    np.testing.assert_array_equal(here.oof_, there.oof_)
    np.testing.assert_array_equal(here.final_estimator_.coef_, there.final_estimator_.coef_)
