"""Predicting and evaluating with the model of a finished run."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from graftstack.config.schema import DataConfig, OnBadImage, Source
from graftstack.data.load import ImageData, load_images
from graftstack.data.location import locate
from graftstack.errors import BadInputError, DataError
from graftstack.finetune.artifact import ModelCard, load_model
from graftstack.finetune.inference import predict_logits
from graftstack.finetune.inputs import ImageInputs
from graftstack.finetune.metrics import classification_metrics
from graftstack.finetune.model import GraftedModel
from graftstack.finetune.predictions import parquet_bytes, prediction_table
from graftstack.runs import Run
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder

_SOURCE_OF_SUFFIX = {".parquet": Source.parquet, ".pq": Source.parquet, ".csv": Source.csv}
_OMNIGLOT_FOLDERS = {"images_background", "images_evaluation", "omniglot-py"}


def data_of_run(run: Run) -> DataConfig:
    """Returns the data configuration that a run was trained with."""
    stored: dict[str, Any] = run.manifest.config["data"]
    values = {item.name: stored[item.name] for item in fields(DataConfig) if item.name in stored}
    return DataConfig(
        **{**values, "source": Source(stored["source"]), "on_bad_image": OnBadImage(stored["on_bad_image"])}
    )


def data_at(location: str, like: DataConfig) -> DataConfig:
    """Returns all rows at `location`, their images and labels found as in the run's own data where that applies.

    `location` is a Parquet or CSV file, a folder of images, or `digits`; a folder is one of Parquet files if it
    holds some and the run learnt from such. It is read as Omniglot if the run learnt from that and it is laid out so.
    """
    if location == Source.digits.value:
        return DataConfig(source=Source.digits, classes=like.classes if like.source is Source.digits else [])
    source = _SOURCE_OF_SUFFIX.get(PurePosixPath(location).suffix.lower(), Source.image_folder)
    if source is Source.image_folder and like.source is Source.parquet and _holds_parquet(location):
        source = Source.parquet
    if like.source is Source.omniglot and _is_omniglot(location):
        source = Source.omniglot
    if source is like.source:
        return replace(like, path=location, split=None, group=None, features=[], drop=[], num_train_per_class=None)
    if source is Source.image_folder:
        return DataConfig(source=source, path=location, cache_dir=like.cache_dir, on_bad_image=like.on_bad_image)
    # What learnt from a table without images needs none; who learnt from a folder of images finds them so.
    image = like.image if like.source in _SOURCE_OF_SUFFIX.values() else "image"
    return DataConfig(source=source, path=location, image=image, label=like.label)


def predict(run: Run, data: DataConfig, *, progress: Callable[[int, int], None] | None = None) -> pa.Table:
    """Returns a prediction for every row of `data`, as `predictions.prediction_table`, whatever its label, if any.

    Raises:
        BadInputError: the run has no model, or the data can't be read.
    """
    model, card = load_model(Folder(run.artifact("model")))
    images = load_images(
        replace(data, classes=[]),
        image_size=card.image_size,
        seed=0,
        class_names=card.class_names,
        require_labels=False,
        progress=progress,
    )
    rows = np.arange(len(images))
    return prediction_table(_logits(model, card, images, rows), images, rows)


def evaluate(
    run: Run, data: DataConfig, *, part: str, progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """Returns the metrics of a run's model on the train, val or test part of labelled data, or on all; and `num_rows`.

    Raises:
        BadInputError: the run has no model, the data can't be read, or the part is empty.
    """
    model, card = load_model(Folder(run.artifact("model")))
    seed = run.manifest.config["seed"]
    images = load_images(data, image_size=card.image_size, seed=seed, class_names=card.class_names, progress=progress)
    rows = _rows_of(images, part)
    logits = _logits(model, card, images, rows)
    return classification_metrics(logits, torch.from_numpy(images.labels[rows])) | {"num_rows": len(rows)}


def check_out(out: str) -> None:
    """Raises `BadInputError` if predictions can't be written there; to be asked before they are computed."""
    if not out.endswith(".parquet"):
        raise BadInputError(f"--out {out}: predictions are written as Parquet; end the name with .parquet")
    folder, name = _place(out)
    if obstacle := folder.obstacle():
        raise BadInputError(f"--out {out}: {obstacle} can't be written; choose another place")
    if folder.is_local and Path(folder.path(name)).is_dir():
        raise BadInputError(f"--out {out}: a folder; name a file in it")


def write_predictions(table: pa.Table, out: str) -> None:
    """Writes the Parquet file `out`, a path or URI, whole or not at all."""
    folder, name = _place(out)
    folder.write(name, parquet_bytes(table))


def _logits(model: GraftedModel, card: ModelCard, images: ImageData, rows: np.ndarray) -> Tensor:
    inputs = ImageInputs(images.images, card.preprocessing)
    return predict_logits(
        model, inputs, rows, LocalWorker(), image_size=card.image_size, num_classes=len(card.class_names)
    )


def _place(out: str) -> tuple[Folder, str]:
    parent, slash, name = out.rpartition("/")
    return Folder(parent or slash or "."), name


def _holds_parquet(location: str) -> bool:
    return any(name.endswith(".parquet") for name in Folder(location).names())


def _is_omniglot(location: str) -> bool:
    """Whether there is what `graftstack.data.sources.omniglot` reads: alphabets and characters."""
    if _OMNIGLOT_FOLDERS & set(Folder(location).names()):
        return True
    try:
        place = locate(location)
        files = [place.path] if place.is_file else [place.full(path) for path in place.find(frozenset({".parquet"}))]
        with place.fs.open(files[0], "rb") as file:
            return {"alphabet", "character"} <= set(pq.read_schema(file).names)
    except (DataError, IndexError, pa.ArrowException, OSError):  # nothing, a folder of other things, another format
        return False


def _rows_of(images: ImageData, part: str) -> np.ndarray:
    rows = np.arange(len(images)) if part == "all" else getattr(images.splits, part)
    if not len(rows):
        raise DataError(f"--split {part}: holds no rows; use train, val, test or all")
    return np.asarray(rows)
