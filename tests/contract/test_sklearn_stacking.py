"""scikit-learn's own tests of stacking, taken from where it is installed, and its checks of any estimator."""

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import sklearn.ensemble
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils.estimator_checks import parametrize_with_checks

from graftstack.stacking import StackingClassifier, StackingRegressor

# Its tests are many more once pytest has spread their parameters.
FEWEST_TEST_FUNCTIONS = 20

# It tests with estimators that don't converge, and with targets that are infinite.
pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]


def _tests_with(**classes: type) -> ModuleType:
    """Returns a second copy of scikit-learn's test module, which got `classes` when it imported them."""
    spec = importlib.util.find_spec("sklearn.ensemble.tests.test_stacking")
    assert spec is not None
    assert spec.origin is not None
    renamed = importlib.util.spec_from_file_location("sklearn_stacking_tests_with_ours", spec.origin)
    assert renamed is not None
    assert renamed.loader is not None
    module = importlib.util.module_from_spec(renamed)
    with pytest.MonkeyPatch.context() as patch:
        for name, ours in classes.items():
            patch.setattr(sklearn.ensemble, name, ours)
        renamed.loader.exec_module(module)
    return module


_module = _tests_with(StackingClassifier=StackingClassifier, StackingRegressor=StackingRegressor)
_their_tests: dict[str, Callable[..., Any]] = {
    name: function for name, function in vars(_module).items() if name.startswith("test_")
}
globals().update(_their_tests)


def test_their_tests_are_found_and_test_our_classes() -> None:
    assert len(_their_tests) >= FEWEST_TEST_FUNCTIONS
    assert _module.StackingClassifier is StackingClassifier
    assert _module.StackingRegressor is StackingRegressor
    assert sklearn.ensemble.StackingClassifier is not StackingClassifier


@parametrize_with_checks(
    [
        StackingClassifier(
            [("tree", DecisionTreeClassifier(max_depth=3, random_state=0)), ("logistic", LogisticRegression())], cv=3
        ),
        StackingRegressor([("tree", DecisionTreeRegressor(max_depth=3, random_state=0)), ("ridge", Ridge())], cv=3),
        StackingClassifier(
            [("tree", DecisionTreeClassifier(max_depth=3, random_state=0))],
            DecisionTreeClassifier(max_depth=3, random_state=0),
            cv=2,
            mode="bag",
            passthrough=True,
            levels=[[("above", DecisionTreeClassifier(max_depth=2, random_state=0))]],
        ),
        StackingRegressor(
            [("tree", DecisionTreeRegressor(max_depth=3, random_state=0))],
            DecisionTreeRegressor(max_depth=3, random_state=0),
            cv=2,
            mode="bag",
            passthrough=True,
            levels=[[("above", DecisionTreeRegressor(max_depth=2, random_state=0))]],
        ),
    ]
)
def test_it_is_an_estimator_as_scikit_learn_checks_them(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)
