"""A fine-tuning as a base model: scikit-learn's contract, on rows of images."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from graftstack.backbones.backbone import resolve_depth
from graftstack.config.plain import from_plain, to_plain
from graftstack.config.schema import CheckpointConfig, ClusterConfig, ClusterKind, FinetuneConfig, Precision, Select
from graftstack.config.sweep import TapsConfig
from graftstack.data.labels import UNKNOWN
from graftstack.data.load import ImageData
from graftstack.data.splits import Splits
from graftstack.errors import DataError, WeightsError
from graftstack.finetune.artifact import CARD, ModelCard, load_model, read_trained, save_model
from graftstack.finetune.inference import predict_logits
from graftstack.finetune.initial import preprocessing_for, weights_digest
from graftstack.finetune.job import MODEL
from graftstack.finetune.model import GraftedModel
from graftstack.finetune.task import Task, check_size
from graftstack.finetune.training import Training
from graftstack.reason import reason
from graftstack.runtime import LocalWorker
from graftstack.stacking.image_rows import ImageRows, Rows
from graftstack.stacking.warm import data_of, device_of, fed_by_tap, lent_model, lent_task
from graftstack.storage import Folder

ESTIMATOR = "estimator.json"
"""Written last: a folder that has it is whole."""

# Of a configuration, its data and its taps: images are known by what they hold, and weights by their digest.
_PLACES = ("runs_dir", "path", "cache_dir", "cache_bytes", "location", "budget_bytes")

_NONE = np.empty(0, np.int64)
_NEVER_S = 1e9


class TrainedOn(NamedTuple):
    """What a training outside of a stack learnt from."""

    rows: Rows
    """int64 [N], ascending."""
    labels: Rows
    """int64 [N], positions in the class names."""
    fingerprint: str
    """Of the data."""
    class_names: tuple[str, ...]


def trained_on(config: Mapping[str, Any]) -> TrainedOn:
    """Returns the rows that a training of this configuration, as plain values, learns from. Raises `BadInputError`."""
    data = data_of(from_plain(FinetuneConfig, config))
    rows = data.splits.train
    return TrainedOn(rows, data.labels[rows], data.fingerprint, data.class_names)


def plain_config(config: FinetuneConfig) -> dict[str, Any]:
    """Returns a training as a base model holds it: plain values, without those that don't change what is learnt."""
    kept = {item.name: getattr(config, item.name) for item in fields(FinetuneConfig)}
    plain: dict[str, Any] = to_plain(_in_a_fold(FinetuneConfig(**{**kept, "name": None, "resume": False})))
    return plain


def key_params(model: BaseEstimator) -> dict[str, Any]:
    """Returns the parameters of a base model on images without those that say where something lies."""
    params: dict[str, Any] = model.get_params(deep=False)
    config, taps = dict(params["config"]), params["taps"]
    config["data"] = _without_places(config.get("data", {}))
    return params | {"config": _without_places(config), "taps": taps and _without_places(taps)}


class FinetunedBackbone(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Fine-tunes a backbone on exactly the rows that it is given, from its initial weights and a fixed seed.

    Where a tap of the frozen groups is stored, of all rows of the data that train or validate, its values are read
    instead of images; they don't depend on the fold.

    The last epoch's weights are the model, and no epoch is the last before its time: what a fold holds out is there
    to be predicted by a model that it had no part in, and so can't choose the epoch.

    Parameters are plain values, so that they can be hashed, cloned and stored.

    Attributes:
        classes_: int64 [C], ascending: the labels that were seen, positions in the data's class names.
    """

    key_packages = ("torch", "torchvision")

    def __init__(
        self, config: Mapping[str, Any], taps: Mapping[str, Any] | None = None, weights_digest: str = ""
    ) -> None:
        """Reads nothing.

        Args:
            config: A `FinetuneConfig` as plain values.
            taps: A `TapsConfig` as plain values; None: no tap is read.
            weights_digest: Of the file of initial weights, by which models from other weights are told apart.
        """
        self.config = config
        self.taps = taps
        self.weights_digest = weights_digest

    @classmethod
    def of(cls, config: FinetuneConfig, taps: TapsConfig | None = None) -> Self:
        """Returns the base model of a training; two that would learn the same have the same parameters."""
        return cls(plain_config(config), None if taps is None else to_plain(taps), weights_digest(config))

    def key_params(self) -> dict[str, Any]:
        """Returns the parameters on which what is learnt depends."""
        return key_params(self)

    @property
    def finetuning(self) -> FinetuneConfig:
        """The training of a fold."""
        return _in_a_fold(from_plain(FinetuneConfig, self.config))

    @property
    def taps_config(self) -> TapsConfig | None:
        """Where taps lie."""
        return None if self.taps is None else from_plain(TapsConfig, self.taps)

    def fit(self, X: ImageRows, y: npt.ArrayLike) -> Self:  # noqa: N803 - scikit-learn's name
        """Trains on the images `X` [N] and their labels `y` [N], positions in the data's class names.

        Raises:
            ConfigError, DataError, WeightsError: these rows can't be trained on with this configuration.
            TrainingError: the loss became NaN or infinite.
            OutOfMemoryError: a step found no room.
        """
        data = labelled(X, y)
        config = self.finetuning
        with (
            TemporaryDirectory(prefix="graftstack-fold-") as checkpoints,
            lent_task(config, data) as task,
            fed_by_tap(task, X.data, data.splits.train, self.taps_config, trains=True) as fed,
        ):
            Training(fed, LocalWorker(device_of(config)), Folder(checkpoints)).run()
            self.card_ = task.card
            # Only what has changed: the frozen groups are in the backbone that every process keeps ready.
            state = task.model.named_state(above=task.freeze_depth)
            self.weights_ = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
            self.network_: GraftedModel | None = None
        self.classes_ = np.unique(data.labels[data.splits.train])
        return self

    def from_trained(self, location: str) -> Self:
        """Returns this base model as a training outside of the stack left it: fitted, on what that learnt from.

        Args:
            location: A folder with what the training changed of the backbone (a trial's), or with the whole model.

        Raises:
            WeightsError: there are no such weights, or they are of another model than the configuration says.
        """
        fitted = type(self)(self.config, self.taps, self.weights_digest)
        folder = Folder(location)
        whole = next((place for place in (folder, folder / MODEL) if place.exists(CARD)), None)
        class_names = trained_on(self.config).class_names
        if whole is not None:
            fitted.network_, fitted.card_ = load_model(whole)
            fitted.weights_ = {}
        else:
            fitted.network_, fitted.weights_ = None, read_trained(folder)
            fitted.card_ = _card_of_trained(self.finetuning, class_names, fitted.weights_, location)
        fitted.classes_ = np.arange(len(fitted.card_.class_names))
        return fitted

    def predict_proba(self, X: ImageRows) -> npt.NDArray[np.float64]:  # noqa: N803
        """Returns the probability of each of `classes_` for each image, [N, C].

        Raises:
            DataError: the images have another size than those that were learnt from.
        """
        check_is_fitted(self)
        config = self.finetuning
        device = device_of(config)
        with (
            self._lent_network() as model,
            fed_by_tap(seen_by(config, model, self.card_, X), X.data, X.rows, self.taps_config) as task,
            torch.autocast(device.type, torch.bfloat16, enabled=config.precision is Precision.bf16),
        ):
            logits = predict_logits(
                model.to(device),
                task.inputs,
                X.rows,
                LocalWorker(device),
                image_size=self.card_.image_size,
                num_classes=len(self.card_.class_names),
            )
        # A class that the fold lacks has no column; the others share its probability.
        seen = logits.double()[:, torch.from_numpy(self.classes_)]
        return np.asarray(seen.softmax(dim=1).numpy())

    def predict(self, X: ImageRows) -> npt.NDArray[np.int64]:  # noqa: N803
        """Returns the most probable of `classes_` for each image, [N]."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])

    def save_to(self, folder: Folder) -> None:
        """Writes the whole model, frozen groups too, as JSON and safetensors."""
        check_is_fitted(self)
        with self._lent_network() as model:
            save_model(folder, model, self.card_)
        about = {"params": self.get_params(deep=False), "classes": self.classes_.tolist()}
        folder.write(ESTIMATOR, json.dumps(about, indent=2).encode())

    @classmethod
    def load_from(cls, folder: Folder) -> Self:
        """Returns what `save_to` wrote; it needs no other file. Raises `WeightsError`."""
        about = read_about(folder)
        fitted = cls(**about["params"])
        fitted.network_, fitted.card_ = load_model(folder)
        fitted.weights_ = {}
        fitted.classes_ = np.asarray(about["classes"], dtype=np.int64)
        return fitted

    @contextmanager
    def _lent_network(self) -> Iterator[GraftedModel]:
        """Lends the fitted model, in eval mode."""
        if self.network_ is not None:
            yield self.network_.eval()
            return
        with lent_model(self.finetuning, num_classes=len(self.card_.class_names)) as model:
            yield _put(model, self.weights_, above=self.card_.freeze_depth).eval()


def labelled(X: ImageRows, y: npt.ArrayLike) -> ImageData:  # noqa: N803
    """Returns the data with the labels `y` [N] of the rows `X`, which alone train; all others have none.

    Raises:
        DataError: labels that aren't positions in the class names, or not one for each row, or of one class.
    """
    labels, num_classes = np.asarray(y), len(X.data.class_names)
    if labels.shape != (len(X),):
        raise DataError(f"y has shape {labels.shape}: {len(X)} images need one label each")
    if labels.dtype.kind not in "iu" or (len(labels) and not 0 <= labels.min() <= labels.max() < num_classes):
        raise DataError(f"y: a backbone learns labels 0..{num_classes - 1}, the positions of the classes; encode them")
    if len(np.unique(labels)) < 2:
        raise DataError(f"y: the only class of the {len(X)} rows is {labels[:1].tolist()}; learning needs two or more")
    everywhere = np.full(len(X.data), UNKNOWN, dtype=np.int64)
    everywhere[X.rows] = labels
    return replace(X.data, labels=everywhere, splits=Splits(np.sort(X.rows), _NONE, _NONE))


def seen_by(config: FinetuneConfig, model: GraftedModel, card: ModelCard, X: ImageRows) -> Task:  # noqa: N803
    """Returns a fitted model with images for it to predict. Raises `DataError` where they have another size."""
    check_size(X.data, card.preprocessing, backbone=card.backbone)
    return Task(
        config=config,
        data=replace(X.data, class_names=card.class_names, splits=Splits(_NONE, _NONE, X.rows)),
        model=model,
        preprocessing=card.preprocessing,
        freeze_depth=card.freeze_depth,
        weights_used=config.backbone.weights,
    )


def read_about(folder: Folder) -> dict[str, Any]:
    """Returns what `save_to` wrote of a base model beside its weights. Raises `WeightsError`."""
    try:
        about: dict[str, Any] = json.loads(folder.read(ESTIMATOR))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder.path(ESTIMATOR)}: can't be read ({reason(error)}); stack again") from error
    return about


def _without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _PLACES}


def _in_a_fold(config: FinetuneConfig) -> FinetuneConfig:
    """One process trains, and begins again if it is killed; no held-out row has a say."""
    return replace(
        config,
        select=Select.last,
        early_stop=None,
        checkpoint=CheckpointConfig(min_interval_s=_NEVER_S),
        cluster=ClusterConfig(kind=ClusterKind.inline, gpus_per_worker=config.cluster.gpus_per_worker),
    )


def _card_of_trained(
    config: FinetuneConfig, class_names: tuple[str, ...], state: Mapping[str, Tensor], location: str
) -> ModelCard:
    """Returns the card of a model of which `state` is what was trained. Raises `WeightsError` where it doesn't fit."""
    size, mean, std = preprocessing_for(config)
    with lent_model(config, num_classes=len(class_names)) as model:
        depth = resolve_depth(config.freeze_depth, model.backbone)
        try:
            _put(model, state, above=depth)
        except (RuntimeError, ValueError) as error:
            raise WeightsError(
                f"{location}: not the weights of {config.backbone.name} with freeze_depth={depth} and "
                f"{len(class_names)} classes ({reason(error)}); train it again"
            ) from error
    return ModelCard(
        backbone=config.backbone.name,
        class_names=class_names,
        image_size=size,
        mean=mean,
        std=std,
        freeze_depth=depth,
        keeps_head=config.backbone.keep_head,
    )


def _put(model: GraftedModel, state: Mapping[str, Tensor], *, above: int) -> GraftedModel:
    """Puts weights into a lent model, whose other groups, which have their initial ones, count as frozen."""
    model.backbone.freeze(above)
    model.load_named_state(state, above=above)
    return model
