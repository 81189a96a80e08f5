"""From the entries of a configuration, and trainings that were done before, to base models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from graftstack.config.base_models import FINETUNE, OF_A_PROBE, PROBE, RUN_PREFIX, BaseEntry, finetune_config
from graftstack.config.schema import FinetuneConfig
from graftstack.config.stack import StackConfig, StackMode
from graftstack.errors import ConfigError
from graftstack.stacking.catalog import estimator_named
from graftstack.stacking.data import StackData
from graftstack.stacking.encoding import with_encoding
from graftstack.stacking.inner_jobs import num_threads_of
from graftstack.stacking.work import BaseModel

ABOVE = "predictions"
"""What base models above the first level learn from."""

# What a classifier is asked for, the first that it has.
_METHODS = ("predict_proba", "decision_function", "predict")


class TrainedBase(NamedTuple):
    """A fine-tuning that was done before, as a base model."""

    name: str
    config: FinetuneConfig
    folder: str | None
    """Where its weights lie, a trial's or a run's model, if they are those of the last of all its epochs, as those of
    any base model are; else None."""


def base_levels(config: StackConfig, data: StackData, trained: Sequence[TrainedBase]) -> list[list[BaseModel]]:
    """Returns the base models of each level.

    Args:
        config: Their entries.
        data: What they learn from.
        trained: Those that come with weights.

    Raises:
        ConfigError: an estimator or parameter that there isn't, one that doesn't suit the data, or two of one name.
    """
    first, *above = config.entries
    bases = [_first_level(entry, config, data) for entry in first if not entry.kind.startswith(RUN_PREFIX)]
    bases += [_trained(base, config, data) for base in trained]
    names = [base.name for base in bases]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"base_models: two base models are called {name}; give one another name")
    return [bases, *([_estimator(entry, config, data, view=ABOVE) for entry in entries] for entries in above)]


def common_image_size(trained: Sequence[TrainedBase]) -> int | None:
    """Returns the height and width of the images that all of them learnt from, in pixels; None if there are none.

    Raises:
        ConfigError: they are of several sizes.
    """
    from graftstack.finetune.initial import preprocessing_for

    sizes: dict[int, str] = {}
    for base in trained:
        sizes.setdefault(preprocessing_for(base.config).image_size, base.name)
    if len(sizes) > 1:
        (one, its), (other, others), *_ = sizes.items()
        raise ConfigError(
            f"data.image_size: {its} learnt from images of {one}x{one} pixels and {others} of {other}x{other}, and a "
            f"stack reads them in one size; add data.image_size={one} or data.image_size={other}"
        )
    return next(iter(sizes), None)


def _first_level(entry: BaseEntry, config: StackConfig, data: StackData) -> BaseModel:
    if not entry.takes_images:
        return _estimator(entry, config, data, view="table" if "table" in data.views else "pixels")
    _check_images(entry.name, data)

    from graftstack.stacking.backbone_model import FinetunedBackbone
    from graftstack.stacking.probe_model import TapProbe

    estimator: Any
    if entry.kind == FINETUNE:
        estimator = FinetunedBackbone.of(_on(config, data, finetune_config(config, entry)), config.taps)
    else:
        assert entry.kind == PROBE
        tuned = finetune_config(config, entry, without=OF_A_PROBE)
        if "freeze_depth" not in entry.params:
            tuned = replace(tuned, freeze_depth="all")
        estimator = TapProbe.of(_on(config, data, tuned), _classifier_of(entry, config), config.taps)
    return _on_images(entry.name, estimator, config)


def _classifier_of(entry: BaseEntry, config: StackConfig) -> Any:
    """Returns what a probe fits to features."""
    name, params = str(entry.params.get("estimator", "LogisticRegression")), entry.params.get("params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"base model {entry.name}: params={params}: write params:{{PARAMETER: value}}")
    return _named(entry._replace(kind=name, params=dict(params)), config, is_classification=True)


def _named(entry: BaseEntry, config: StackConfig, *, is_classification: bool) -> Any:
    """Returns the estimator of an entry. Raises `ConfigError` with the name of the base model."""
    try:
        return estimator_named(entry.kind, dict(entry.params), is_classification=is_classification, seed=config.seed)
    except ConfigError as error:
        raise ConfigError(f"base model {entry.name.partition('@')[0]}: {error}") from error


def _on_images(name: str, estimator: Any, config: StackConfig, *, refitted: Any = None) -> BaseModel:
    return BaseModel(
        name=name,
        estimator=estimator,
        method=_method_of(estimator),
        view="images",
        num_threads=config.cluster.cpus_per_worker or 1,
        refitted=refitted,
    )


def _trained(base: TrainedBase, config: StackConfig, data: StackData) -> BaseModel:
    """A training is what a refit would be if it was one on the very images that are cross-validated here."""
    _check_images(base.name, data)

    from graftstack.stacking.backbone_model import FinetunedBackbone

    here = _on(config, data, base.config)
    estimator = FinetunedBackbone.of(here, config.taps)
    refitted = None
    if config.mode is StackMode.refit and base.folder is not None and _learnt_the_same(base.config, here, data):
        refitted = estimator.from_trained(base.folder)
    return _on_images(base.name, estimator, config, refitted=refitted)


def _learnt_the_same(trained: FinetuneConfig, here: FinetuneConfig, data: StackData) -> bool:
    """Whether a training has seen the rows that train here, with their labels, and as they are seen here."""
    from graftstack.finetune.initial import preprocessing_for
    from graftstack.stacking.backbone_model import plain_config, trained_on

    if preprocessing_for(trained) != preprocessing_for(here):
        return False
    learnt_from, rows = trained_on(plain_config(trained)), data.splits.train
    return (
        learnt_from.fingerprint == data.fingerprint
        and learnt_from.class_names == data.class_names
        and np.array_equal(learnt_from.rows, rows)
        and np.array_equal(learnt_from.labels, data.y[rows])
    )


def _estimator(entry: BaseEntry, config: StackConfig, data: StackData, *, view: str) -> BaseModel:
    estimator = _named(entry, config, is_classification=data.is_classification)
    num_threads = num_threads_of(estimator)
    method = _method_of(estimator) if data.is_classification else "predict"
    if view == "table":
        assert data.schema is not None
        estimator = with_encoding(estimator, data.schema)
    return BaseModel(name=entry.name, estimator=estimator, method=method, view=view, num_threads=num_threads)


def _method_of(classifier: Any) -> str:
    return next(method for method in _METHODS if hasattr(classifier, method))


def _on(config: StackConfig, data: StackData, tuned: FinetuneConfig) -> FinetuneConfig:
    """Returns a fine-tuning on the images of the stack, in their size, and where the stack's base models train."""
    images = replace(config.data, image_size=data.views["images"].image_size)
    return replace(tuned, data=images, cluster=config.cluster)


def _check_images(name: str, data: StackData) -> None:
    if "images" not in data.views:
        raise ConfigError(f"base model {name}: learns from images and the data has none; add data.image=COLUMN")
    if not data.is_classification:
        raise ConfigError(f"base model {name}: tells classes apart and the label is a number; use task=classification")
