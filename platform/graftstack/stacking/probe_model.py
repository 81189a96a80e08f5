"""A classifier on what the frozen groups of a backbone make of images: a base model that trains in no time."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import ThreadpoolController

from graftstack.config.plain import from_plain, to_plain
from graftstack.config.schema import Augment, FinetuneConfig, Precision
from graftstack.config.sweep import TapsConfig
from graftstack.errors import ConfigError, WeightsError
from graftstack.finetune.artifact import ModelCard, load_model, save_model
from graftstack.finetune.inference import inference_batch_size
from graftstack.finetune.initial import weights_digest
from graftstack.finetune.model import GraftedModel
from graftstack.finetune.pooling import averaged
from graftstack.finetune.task import Task
from graftstack.reason import reason
from graftstack.stacking.backbone_model import (
    ESTIMATOR,
    FinetunedBackbone,
    key_params,
    labelled,
    plain_config,
    read_about,
    seen_by,
)
from graftstack.stacking.image_rows import ImageRows
from graftstack.stacking.model_file import UnstorableError, model_bytes, model_of
from graftstack.stacking.warm import device_of, fed_by_tap, lent_model, lent_task
from graftstack.storage import Folder

_CLASSIFIER = "classifier.skops"
_FEW_VALUES = 5_000_000

Values = npt.NDArray[Any]


def _when_it_has(name: str) -> Callable[["TapProbe"], bool]:
    return lambda probe: hasattr(probe.estimator, name)


class TapProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Learns from the outputs of the first `freeze_depth` layer groups, averaged over their places.

    They come from a tap where that is stored, of all rows of the data that train or validate; nothing in them depends
    on the fold. What is fitted to data, scaling to mean 0 and variance 1 included, is fitted to the rows of the fold.

    Attributes:
        classes_: int64 [C], ascending: the labels that were seen.
        classifier_: The scaler and the fitted classifier.
    """

    key_packages = FinetunedBackbone.key_packages

    def __init__(
        self,
        config: Mapping[str, Any],
        estimator: Any,
        taps: Mapping[str, Any] | None = None,
        weights_digest: str = "",
    ) -> None:
        """Reads nothing.

        Args:
            config: A `FinetuneConfig` as plain values, of which the images, the backbone and its freeze depth count.
            estimator: A classifier of scikit-learn's contract; it is cloned.
            taps: A `TapsConfig` as plain values; None: no tap is read.
            weights_digest: Of the file of initial weights, by which models from other weights are told apart.
        """
        self.config = config
        self.estimator = estimator
        self.taps = taps
        self.weights_digest = weights_digest

    @classmethod
    def of(cls, config: FinetuneConfig, estimator: Any, taps: TapsConfig | None = None) -> Self:
        """Returns a probe of the backbone of a training; its recipe, its optimiser and the like don't count."""
        plain = plain_config(
            FinetuneConfig(
                data=config.data,
                backbone=config.backbone,
                freeze_depth=config.freeze_depth,
                precision=config.precision,
                cluster=config.cluster,
                seed=config.seed,
                runs_dir=config.runs_dir,
                epochs=0,
            )
        )
        return cls(plain, estimator, None if taps is None else to_plain(taps), weights_digest(config))

    def key_params(self) -> dict[str, Any]:
        """Returns the parameters on which what is learnt depends."""
        return key_params(self)

    @property
    def finetuning(self) -> FinetuneConfig:
        """The training whose frozen groups are probed: nothing of it is trained, and images are seen as they are."""
        return replace(from_plain(FinetuneConfig, self.config), epochs=0, augment=Augment.none, augment_views=None)

    @property
    def taps_config(self) -> TapsConfig | None:
        """Where taps lie."""
        return None if self.taps is None else from_plain(TapsConfig, self.taps)

    def fit(self, X: ImageRows, y: npt.ArrayLike) -> Self:  # noqa: N803 - scikit-learn's name
        """Fits the classifier to the images `X` [N] and their labels `y` [N], positions in the data's class names.

        Raises:
            ConfigError, DataError, WeightsError: there is no such backbone, or it can't be fed these rows.
        """
        with lent_task(self.finetuning, labelled(X, y)) as task:
            check_boundary(task)
            self.card_: ModelCard = task.card
            self.network_: GraftedModel | None = None
            features = self._features(task, X)
        with _threads_for(features):
            self.classifier_ = make_pipeline(StandardScaler(), clone(self.estimator)).fit(features, y)
        self.classes_ = self.classifier_.classes_
        return self

    def features(self, X: ImageRows) -> npt.NDArray[np.float64]:  # noqa: N803
        """Returns what the classifier is fed, before scaling: [N, D]. Raises `DataError` for images of another size."""
        check_is_fitted(self)
        with self._lent_network() as model:
            return self._features(seen_by(self.finetuning, model, self.card_, X), X)

    @available_if(_when_it_has("predict_proba"))  # type: ignore[untyped-decorator]
    def predict_proba(self, X: ImageRows) -> Values:  # noqa: N803
        """Returns the probability of each of `classes_` for each image, [N, C]."""
        return self._ask("predict_proba", X)

    @available_if(_when_it_has("decision_function"))  # type: ignore[untyped-decorator]
    def decision_function(self, X: ImageRows) -> Values:  # noqa: N803
        """Returns the classifier's scores of each image, [N, C]; of two classes, [N]."""
        return self._ask("decision_function", X)

    def predict(self, X: ImageRows) -> Values:  # noqa: N803
        """Returns one of `classes_` for each image, [N]."""
        return self._ask("predict", X)

    def save_to(self, folder: Folder) -> None:
        """Writes the backbone as JSON and safetensors, and the classifier through skops.

        Raises `UnstorableError` for a classifier that skops doesn't take.
        """
        check_is_fitted(self)
        with self._lent_network() as model:
            save_model(folder, model, self.card_)
        folder.write(_CLASSIFIER, model_bytes([self.estimator, self.classifier_]))
        params = {name: value for name, value in self.get_params(deep=False).items() if name != "estimator"}
        folder.write(ESTIMATOR, json.dumps({"params": params}, indent=2).encode())

    @classmethod
    def load_from(cls, folder: Folder) -> Self:
        """Returns what `save_to` wrote; it needs no other file. Raises `WeightsError`."""
        about = read_about(folder)
        estimator, classifier = _read_classifier(folder)
        fitted = cls(estimator=estimator, **about["params"])
        fitted.network_, fitted.card_ = load_model(folder)
        fitted.classifier_, fitted.classes_ = classifier, classifier.classes_
        return fitted

    def _ask(self, method: str, X: ImageRows) -> Values:  # noqa: N803
        features = self.features(X)
        with _threads_for(features):
            return np.asarray(getattr(self.classifier_, method)(features))

    def _features(self, task: Task, X: ImageRows) -> npt.NDArray[np.float64]:  # noqa: N803
        with fed_by_tap(task, X.data, X.rows, self.taps_config) as fed:
            return _computed(fed, X)

    @contextmanager
    def _lent_network(self) -> Iterator[GraftedModel]:
        if self.network_ is not None:
            yield self.network_
            return
        with lent_model(self.finetuning, num_classes=len(self.card_.class_names)) as model:
            yield model


def check_boundary(task: Task) -> None:
    """Raises `ConfigError` where no group is frozen."""
    if task.boundary < 1:
        raise ConfigError("freeze_depth=0: a probe learns from what frozen groups put out; use 1 or more, or all")


def _threads_for(features: Values) -> AbstractContextManager[Any]:
    """Limits linear algebra to one thread where there is little of it.

    Threads that wait for each other make a fit of 30 ms take a second on a machine that is busy.
    """
    return _libraries().limit(limits=1, user_api="blas") if features.size < _FEW_VALUES else nullcontext()


@cache
def _libraries() -> ThreadpoolController:
    """Looking for them takes as long as a small fit."""
    return ThreadpoolController()


@torch.no_grad()
def _computed(task: Task, X: ImageRows) -> npt.NDArray[np.float64]:  # noqa: N803
    """Returns the averaged outputs at the task's boundary, from wherever its inputs begin: [N, D]."""
    device, inputs = device_of(task.config), task.inputs
    backbone = task.model.to(device).backbone
    backbone.freeze(backbone.num_groups)
    backbone.eval()
    size = inference_batch_size(task.preprocessing.image_size)
    pieces = []
    for begin in range(0, max(1, len(X)), size):
        with torch.autocast(device.type, torch.bfloat16, enabled=task.config.precision is Precision.bf16):
            values = inputs.prepared(inputs.plain(X.rows[begin : begin + size]), device)
            values = backbone.run_groups(values, inputs.boundary, task.boundary)
        pieces.append(averaged(values).cpu().numpy())
    # Not by torch, whose threads it would wake for a few kilobytes.
    return np.concatenate(pieces).astype(np.float64)


def _read_classifier(folder: Folder) -> list[Any]:
    """Returns the unfitted estimator and the fitted pipeline."""
    try:
        found: list[Any] = model_of(folder.read(_CLASSIFIER))
    except (OSError, UnstorableError) as error:
        raise WeightsError(f"{folder.path(_CLASSIFIER)}: {reason(error)}; stack again") from error
    return found
