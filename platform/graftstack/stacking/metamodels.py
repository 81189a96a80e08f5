"""Meta-models by name: what learns from the out-of-fold predictions of base models."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV

from graftstack.errors import ConfigError, did_you_mean
from graftstack.seeding import derive_seed
from graftstack.stacking.averages import AveragingClassifier, AveragingRegressor
from graftstack.stacking.calibration import CalibratedMetaModel
from graftstack.stacking.catalog import check_values, estimator_named, known_names
from graftstack.stacking.greedy import greedy_weights
from graftstack.stacking.linear import linear_meta_model
from graftstack.stacking.logistic import LogisticPool

AUTO = "auto"


class _Shape(NamedTuple):
    """What a meta-model is to learn from."""

    num_classes: int
    """0 for a regression."""
    num_outputs: list[int]
    passthrough: bool
    seed: int

    @property
    def is_classification(self) -> bool:
        return self.num_classes > 0


def meta_model_named(
    name: str,
    params: Mapping[str, Any] | None = None,
    *,
    is_classification: bool,
    num_classes: int = 0,
    seed: int = 0,
    num_outputs: Sequence[int],
    passthrough: bool = False,
) -> Any:
    """Returns a new, unfitted meta-model, an estimator of scikit-learn's contract on meta-features ``[N, F]``.

    Args:
        name: one of `META_MODELS`, an estimator of the catalogue, or auto: blend, or ridge for a regression.
        params: its parameters.
        is_classification: whether it tells classes apart, with `predict_proba`, or predicts numbers.
        num_classes: labels are 0..num_classes - 1.
        seed: of the run.
        num_outputs: how many columns each base model has, in their order.
        passthrough: whether other columns follow.

    Raises:
        ConfigError: no such meta-model or parameter, a value that it can't take, one for the other task, or a
            classifier without probabilities.
    """
    shape = _Shape(num_classes if is_classification else 0, list(num_outputs), passthrough, seed)
    if name == AUTO:
        name = "blend" if is_classification else "ridge"
    if name in META_MODELS:
        return META_MODELS[name](shape, dict(params or {}))
    known = {*META_MODELS, *known_names(is_classification=True), *known_names(is_classification=False)}
    if name not in known:
        raise ConfigError(f"meta_model={name}: no such meta-model; {did_you_mean(name, known)}")
    try:
        found = estimator_named(
            name, params, is_classification=is_classification, seed=derive_seed(seed, "meta-model", name)
        )
    except ConfigError as error:
        raise ConfigError(f"meta_model={name}: {error}") from error
    if is_classification and not hasattr(found, "predict_proba"):
        raise ConfigError(f"meta_model={name}: it decides without probabilities, as it is set; use e.g. logistic")
    return found


def weights_of(fitted: Any, num_outputs: Sequence[int]) -> npt.NDArray[np.float64] | None:
    """Returns how much a fitted meta-model relies on each base model, ``[num_bases]``, 0 or more.

    The weights of averages; of others, the sum of the absolute coefficients, or importances, of a base model's columns,
    of all base models' sum. Where an average is of a linear meta-model too, that one's weight is dealt out by its own
    weights. None where nothing of the kind is known.
    """
    if isinstance(fitted, CalibratedMetaModel):
        return weights_of(fitted.meta_, num_outputs)
    num_bases = len(num_outputs)
    if isinstance(fitted, AveragingClassifier | AveragingRegressor):
        weights = np.asarray(fitted.weights_[:num_bases])
        inner = None if fitted.linear_ is None else weights_of(fitted.linear_, num_outputs)
        return _shares(weights) if inner is None else weights + fitted.weights_[num_bases] * inner
    if isinstance(fitted, LogisticPool):
        return _shares(np.abs(fitted.weights_)) if len(fitted.weights_) == num_bases else None
    last = fitted.steps[-1][1] if hasattr(fitted, "steps") else fitted
    found = getattr(last, "coef_", getattr(last, "feature_importances_", None))
    if found is None:
        return None
    of_column = np.abs(np.atleast_2d(np.asarray(found))).sum(axis=0)
    if len(of_column) < sum(num_outputs):
        return None
    starts = np.cumsum([0, *num_outputs[:-1]])
    return _shares(np.add.reduceat(of_column[: sum(num_outputs)], starts))


def _shares(sizes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total = sizes.sum()
    return sizes / total if total > 0 else np.full(len(sizes), 1 / len(sizes))


def _logistic(shape: _Shape, params: dict[str, Any]) -> Any:
    if not shape.is_classification:
        raise ConfigError("meta_model=logistic: it tells classes apart, and the label is a number; use ridge")
    _check("logistic", params, ("C",))
    strength = params.get("C", 1.0)
    if not _is_positive(strength):
        raise ConfigError(f"meta_model.logistic.C={strength}: must be greater than 0")
    return LogisticPool(shape.num_outputs, shape.num_classes, C=float(strength))


def _ridge(shape: _Shape, params: dict[str, Any]) -> Any:
    if shape.is_classification:
        raise ConfigError("meta_model=ridge: it predicts numbers, and the label is a class; use logistic")
    _check("ridge", params, RidgeCV._get_param_names())  # noqa: SLF001
    alphas = params.get("alphas", [1.0])
    if not isinstance(alphas, list) or not alphas or not all(_is_positive(value) for value in alphas):
        raise ConfigError(f"meta_model.ridge.alphas={alphas}: must be a list of numbers greater than 0")
    check_values("meta_model.ridge", RidgeCV(**params), params)
    return linear_meta_model(**params)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _nonnegative(shape: _Shape, params: dict[str, Any]) -> Any:
    _check("nonnegative", params, ())
    return _average("nonnegative", shape, params)


def _blend(shape: _Shape, params: dict[str, Any]) -> Any:
    """Nonnegative weights of the base models and of the logistic meta-model on them.

    Averages of probabilities do best where base models are calibrated, products where they aren't, and rows say which:
    on tables of mixed columns it loses less than either on held-out rows, and seldom more than the best base model.
    """
    if not shape.is_classification:
        raise ConfigError("meta_model=blend: it tells classes apart, and the label is a number; use nonnegative")
    _check("blend", params, ())
    return AveragingClassifier("nonnegative", shape.num_outputs, shape.num_classes, with_linear=True)


def _greedy(shape: _Shape, params: dict[str, Any]) -> Any:
    _check("greedy", params, tuple(inspect.signature(greedy_weights).parameters)[1:])
    for name, value in params.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"meta_model.greedy.{name}={value}: must be a whole number, at least 1")
    return _average("greedy", shape, params)


def _average(rule: str, shape: _Shape, params: dict[str, Any]) -> Any:
    if shape.is_classification:
        return AveragingClassifier(rule, shape.num_outputs, shape.num_classes, rule_params=params)
    return AveragingRegressor(rule, sum(shape.num_outputs), rule_params=params)


def _gbm(shape: _Shape, params: dict[str, Any]) -> Any:
    """Shallow trees that learn slowly: what base models say is nearly the answer, and little is left to be found.

    Where there is one answer, more of a base model's column never means less of it.
    """
    kind = HistGradientBoostingClassifier if shape.is_classification else HistGradientBoostingRegressor
    defaults: dict[str, Any] = {
        "learning_rate": 0.05,
        "max_iter": 300,
        "max_leaf_nodes": 8,
        "min_samples_leaf": 50,
        "l2_regularization": 1.0,
        "early_stopping": True,
        "n_iter_no_change": 20,
    }
    if params.get("monotonic_cst") is not None:
        raise ConfigError(
            f"meta_model.gbm.monotonic_cst={params['monotonic_cst']}: which columns there are is settled by the base "
            "models; leave it out, or set null for none"
        )
    if shape.num_classes <= 2 and not shape.passthrough:
        defaults["monotonic_cst"] = [1] * sum(shape.num_outputs)
    try:
        return estimator_named(
            kind.__name__, {**defaults, **params}, is_classification=shape.is_classification, seed=shape.seed
        )
    except ConfigError as error:
        raise ConfigError(f"meta_model=gbm: {error}") from error


def _check(name: str, params: Mapping[str, Any], known: Sequence[str]) -> None:
    for param in params:
        if param not in known:
            hint = did_you_mean(param, known) if known else "it has none"
            raise ConfigError(f"meta_model.{name}.{param}: no such parameter; {hint}")


META_MODELS: dict[str, Callable[[_Shape, dict[str, Any]], Any]] = {
    "blend": _blend,
    "logistic": _logistic,
    "ridge": _ridge,
    "nonnegative": _nonnegative,
    "greedy": _greedy,
    "gbm": _gbm,
}
