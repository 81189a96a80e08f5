"""Estimators by name: all classifiers and regressors of scikit-learn, LightGBM's and XGBoost's."""

import inspect
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import InvalidParameterError, validate_parameter_constraints

from graftstack.errors import ConfigError, did_you_mean
from graftstack.reason import reason
from graftstack.seeding import derive_seed

_SKLEARN_MODULES = (
    "calibration",
    "compose",
    "cross_decomposition",
    "discriminant_analysis",
    "dummy",
    "ensemble",
    "gaussian_process",
    "isotonic",
    "kernel_ridge",
    "linear_model",
    "multiclass",
    "multioutput",
    "naive_bayes",
    "neighbors",
    "neural_network",
    "semi_supervised",
    "svm",
    "tree",
)
_LARGEST_SEED = 2**31
"""Seeds of scikit-learn, LightGBM and XGBoost lie below."""


class _Booster(NamedTuple):
    """An estimator of a boosting library, which isn't always installed."""

    module: str
    package: str
    is_classifier: bool
    defaults: Mapping[str, Any]
    more_params: frozenset[str] = frozenset()
    """Parameters that aren't in its signature, as it hands them on to its library."""


# One thread unless told otherwise: how much runs at once is the executor's to say. LightGBM would try out whether to
# go by rows or by columns, and add up in another order each time.
_LIGHTGBM = {"n_jobs": 1, "verbosity": -1, "deterministic": True, "force_col_wise": True}
_LIGHTGBM_PARAMS = frozenset(
    [
        "alpha",
        "bagging_by_query",
        "bin_construct_sample_cnt",
        "boost_from_average",
        "cat_l2",
        "cat_smooth",
        "data_sample_strategy",
        "deterministic",
        "drop_rate",
        "drop_seed",
        "extra_seed",
        "extra_trees",
        "fair_c",
        "feature_fraction_bynode",
        "force_col_wise",
        "force_row_wise",
        "is_unbalance",
        "linear_lambda",
        "linear_tree",
        "max_bin",
        "max_cat_threshold",
        "max_cat_to_onehot",
        "max_delta_step",
        "max_drop",
        "min_data_in_bin",
        "min_data_per_group",
        "monotone_constraints",
        "monotone_constraints_method",
        "monotone_penalty",
        "other_rate",
        "path_smooth",
        "poisson_max_delta_step",
        "quantile",
        "scale_pos_weight",
        "skip_drop",
        "top_rate",
        "tweedie_variance_power",
        "uniform_drop",
        "use_quantized_grad",
        "verbosity",
        "xgboost_dart_mode",
        "zero_as_missing",
    ]
)
_XGBOOST = {"n_jobs": 1, "verbosity": 0}
_BOOSTERS = {
    "LGBMClassifier": _Booster("lightgbm", "lightgbm", True, _LIGHTGBM, _LIGHTGBM_PARAMS),  # noqa: FBT003
    "LGBMRegressor": _Booster("lightgbm", "lightgbm", False, _LIGHTGBM, _LIGHTGBM_PARAMS),  # noqa: FBT003
    "XGBClassifier": _Booster("xgboost", "xgboost", True, _XGBOOST),  # noqa: FBT003
    "XGBRegressor": _Booster("xgboost", "xgboost", False, _XGBOOST),  # noqa: FBT003
}


def estimator_named(
    name: str, params: Mapping[str, Any] | None = None, *, is_classification: bool, seed: int
) -> BaseEstimator:
    """Returns a new, unfitted estimator; it draws from `seed` unless its parameters say otherwise.

    Args:
        name: the name of its class, e.g. ``RandomForestClassifier``.
        params: its parameters.
        is_classification: whether it is to tell classes apart, or to predict numbers.
        seed: of the run; the estimator gets a seed of its own, made of this one and its name.

    Raises:
        ConfigError: no such estimator or parameter, a value that it can't take, an estimator for the other task, or
            one whose library isn't installed.
    """
    kind = _class_named(name, is_classification=is_classification)
    booster = _BOOSTERS.get(name)
    given = {**(booster.defaults if booster else {}), **(params or {})}
    signature = inspect.signature(kind.__init__).parameters
    _check_names(name, kind, given, booster.more_params if booster else frozenset())
    for parameter in list(signature.values())[1:]:
        is_required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if is_required and parameter.name not in given:
            raise ConfigError(
                f"{name}: it wraps another estimator ({parameter.name}), which a configuration can't hold; "
                "use one that stands alone"
            )
    if ("random_state" in signature or booster) and given.get("random_state") is None:
        given["random_state"] = derive_seed(seed, "base", name) % _LARGEST_SEED
    estimator: BaseEstimator = kind(**given)
    check_values(name, estimator, params or {})
    return estimator


def known_names(*, is_classification: bool) -> list[str]:
    """Returns the names of all estimators for the task, those of libraries that aren't installed included."""
    known = [*_sklearn_classes(is_classification=is_classification)]
    return sorted(known + [name for name, one in _BOOSTERS.items() if one.is_classifier == is_classification])


def _class_named(name: str, *, is_classification: bool) -> type[BaseEstimator]:
    booster = _BOOSTERS.get(name)
    if booster is not None and booster.is_classifier == is_classification:
        try:
            return getattr(import_module(booster.module), name)  # type: ignore[no-any-return]
        except ImportError as error:
            raise ConfigError(
                f"{name}: {booster.package} isn't installed ({reason(error)}); run "
                f"pip install 'graftstack[boosting]', or pip install {booster.package}"
            ) from error
    if booster is None:
        found = _sklearn_classes(is_classification=is_classification).get(name)
        if found is not None:
            return found
    known = known_names(is_classification=is_classification)
    if name in known_names(is_classification=not is_classification):
        is_a, needed = ("regressor", "classifier") if is_classification else ("classifier", "regressor")
        twin = name.replace("Regressor" if is_classification else "Classifier", needed.capitalize())
        remedy = f"use {twin}" if twin in known else did_you_mean(name, known)
        task = "classification" if is_classification else "regression"
        raise ConfigError(f"{name}: it is a {is_a}, and the task is {task}, which needs a {needed}; {remedy}")
    raise ConfigError(f"{name}: no such estimator; {did_you_mean(name, known)}")


@cache
def _sklearn_classes(*, is_classification: bool) -> dict[str, type[BaseEstimator]]:
    """Returns scikit-learn's classifiers or regressors that its public modules name."""
    # `sklearn.utils.all_estimators` would import every module there is, the private ones too.
    found = {}
    for module_name in _SKLEARN_MODULES:
        module = import_module(f"sklearn.{module_name}")
        for name in getattr(module, "__all__", dir(module)):
            kind = getattr(module, name)
            if inspect.isclass(kind) and issubclass(kind, BaseEstimator) and _is_for(kind, is_classification):
                found[name] = kind
    return found


def _is_for(kind: type[BaseEstimator], is_classification: bool) -> bool:  # noqa: FBT001
    from sklearn.base import ClassifierMixin, RegressorMixin

    mixin = ClassifierMixin if is_classification else RegressorMixin
    return issubclass(kind, mixin) and not inspect.isabstract(kind) and not kind.__name__.startswith(("Base", "_"))


def _check_names(name: str, kind: type[BaseEstimator], given: Mapping[str, Any], more: frozenset[str]) -> None:
    takes = set(kind._get_param_names()) | more  # noqa: SLF001 - an instance can't be had before its parameters
    if name.startswith("XGB"):  # its own signature hides those of its base
        takes |= {one for base in kind.__mro__ if base is not object for one in inspect.signature(base).parameters}
    for parameter in given:
        if parameter not in takes:
            raise ConfigError(f"{name}.{parameter}: no such parameter; {did_you_mean(parameter, takes)}")


def check_values(name: str, estimator: BaseEstimator, given: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for a value that scikit-learn would refuse when it fits."""
    constraints = getattr(estimator, "_parameter_constraints", None)
    if not isinstance(constraints, dict):
        return
    try:
        validate_parameter_constraints(constraints, estimator.get_params(deep=False), caller_name=name)
    except InvalidParameterError as error:
        wrong = [key for key in given if f"'{key}' parameter" in str(error)]
        shown = f"{name}.{wrong[0]}={given[wrong[0]]}" if wrong else name
        raise ConfigError(f"{shown}: {reason(error)}; change the value, or leave it out") from error
