"""One rank's whole job: train, then leave the artifacts in the run folder."""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from graftstack.finetune.artifact import save_model
from graftstack.finetune.counting import counting_forwards
from graftstack.finetune.predictions import parquet_bytes, prediction_table
from graftstack.finetune.task import Task
from graftstack.finetune.training import Progress, Trained, Training
from graftstack.runs import PROGRESS
from graftstack.runtime import Worker
from graftstack.storage import Folder

METRICS = "metrics.parquet"
VAL_PREDICTIONS = "val_predictions.parquet"
CHECKPOINTS = "checkpoints"
MODEL = "model"


class Outcome(NamedTuple):
    """What the manifest says of a finished training."""

    metrics: dict[str, float]
    artifacts: dict[str, str]
    details: dict[str, Any]
    history: tuple[dict[str, float], ...]
    """One row of metrics for each epoch."""
    backbone_forwards: int
    """Images that went through frozen groups, counted, on all ranks together."""


class ProgressFile:
    """Writes the progress to the run folder, where any process can follow it, and each epoch's metrics."""

    # An object store is asked less often: each write is a request.
    _LOCAL_EVERY_S, _REMOTE_EVERY_S = 0.5, 5.0

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._every_s = self._LOCAL_EVERY_S if folder.is_local else self._REMOTE_EVERY_S
        self._written_at = 0.0
        self._num_rows = 0

    def __call__(self, progress: Progress) -> None:
        """Writes `progress` if it is due, and the metrics if an epoch has ended."""
        is_new_epoch = len(progress.history) > self._num_rows
        if is_new_epoch:
            self._num_rows = len(progress.history)
            self._folder.write(METRICS, parquet_bytes(pa.Table.from_pylist(list(progress.history))))
        if is_new_epoch or time.monotonic() - self._written_at >= self._every_s:
            self._folder.write(PROGRESS, json.dumps(progress._asdict()).encode())
            self._written_at = time.monotonic()


def train_rank(
    task: Task, worker: Worker, folder: Folder, *, on_progress: Callable[[Progress], None] = lambda _: None
) -> Outcome:
    """Trains `task` as one rank and, on rank 0, writes the model and the validation predictions to `folder`.

    Raises:
        TrainingError, StorageFullError: as `Training.run`; what was saved before stays resumable.
    """
    to_file = ProgressFile(folder)

    def tell(progress: Progress) -> None:
        to_file(progress)
        on_progress(progress)

    with counting_forwards(task.model.backbone, freeze_depth=task.freeze_depth) as count:
        trained = Training(task, worker, folder / CHECKPOINTS, on_progress=tell).run()
    num_forwards = int(worker.gather(torch.tensor([count.num_images])).sum())
    if worker.rank == 0:
        _save_artifacts(task, trained, folder)
    worker.report(trained.metrics)
    artifacts = {"model": MODEL, "val_predictions": VAL_PREDICTIONS}
    if trained.history:
        artifacts |= {"metrics": METRICS, "checkpoints": CHECKPOINTS}
    return Outcome(trained.metrics, artifacts, _details(task, trained), trained.history, num_forwards)


def _save_artifacts(task: Task, trained: Trained, folder: Folder) -> None:
    if trained.history:  # again: a kill may have come between the last checkpoint and the last row
        folder.write(METRICS, parquet_bytes(pa.Table.from_pylist(list(trained.history))))
    rows = task.data.splits.val
    table = prediction_table(trained.val_logits, task.data, rows)
    folder.write(VAL_PREDICTIONS, parquet_bytes(table))
    save_model(folder / MODEL, task.model, task.card)


def _details(task: Task, trained: Trained) -> dict[str, Any]:
    return {"num_epochs": len(trained.history), "best_epoch": trained.epoch, **task_details(task)}


def task_details(task: Task) -> dict[str, Any]:
    """Returns what a manifest says of the data and the backbone."""
    return {
        "num_train": len(task.data.splits.train),
        "num_val": len(task.data.splits.val),
        "num_skipped_images": task.data.num_skipped,
        "data_fingerprint": task.data.fingerprint,
        "weights": task.weights_used,
        "freeze_depth": task.freeze_depth,
    }
