"""What a sweep leaves: the best trial's model as the run's own, and every trial's rows."""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import torch

from graftstack.config.schema import Precision
from graftstack.errors import TrainingError
from graftstack.finetune.artifact import load_model, read_trained, save_model
from graftstack.finetune.inference import predict_logits
from graftstack.finetune.job import METRICS, MODEL, VAL_PREDICTIONS
from graftstack.finetune.predictions import parquet_bytes, prediction_table
from graftstack.finetune.task import Task
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder
from graftstack.sweep.trials import Trial, TrialResult, best_first


def best_of(results: Iterable[TrialResult]) -> TrialResult:
    """Returns the result with the highest accuracy; of equal ones, the one with the lowest loss.

    Raises:
        TrainingError: no trial has ended with a model.
    """
    rows = list(results)
    ended = best_first(rows)
    if not ended:
        reasons = [result.error for result in rows if result.status == "failed"]
        raise TrainingError(
            f"no trial ended with a model; the first of {len(reasons)} failed ones: {reasons[0]}"
            if reasons
            else "no trial was begun within time_limit_s; raise it"
        )
    return ended[0]


def save_outcome(task: Task, best: Trial, results: Sequence[TrialResult], folder: Folder) -> dict[str, str]:
    """Writes the best trial's model and validation predictions, and the metrics of all epochs of all trials.

    Args:
        task: Of the best trial, with its tap if that is still there.
        best: The trial.
        results: Of all trials.
        folder: The run's.

    Returns:
        The artifacts, by name.
    """
    rows = [{"trial": result.index, **row} for result in results for row in result.history]
    if rows:
        folder.write(METRICS, parquet_bytes(pa.Table.from_pylist(rows)))
    model = _model_of(task, folder / "trials", best)
    val = task.data.splits.val
    with torch.autocast("cpu", torch.bfloat16, enabled=task.config.precision is Precision.bf16):
        logits = predict_logits(
            model,
            task.inputs,
            val,
            LocalWorker(),
            image_size=task.preprocessing.image_size,
            num_classes=len(task.data.class_names),
        )
    folder.write(VAL_PREDICTIONS, parquet_bytes(prediction_table(logits, task.data, val)))
    save_model(folder / MODEL, model, task.card)
    artifacts = {"model": MODEL, "val_predictions": VAL_PREDICTIONS, "trials": "trials"}
    return artifacts | ({"metrics": METRICS} if rows else {})


def _model_of(task: Task, trials: Folder, best: Trial) -> Any:
    """A trial of several workers leaves its whole model; others what they changed of it."""
    whole = trials / best.name / MODEL
    if whole.exists():
        return load_model(whole)[0]
    task.model.load_named_state(read_trained(trials / best.name), above=task.freeze_depth)
    return task.model.cpu()
