"""Probing the features of each freeze depth: on a sample for a plan, on whole taps before trials are left out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graftstack.data.batches import epoch_order
from graftstack.finetune.inference import inference_batch_size
from graftstack.finetune.inputs import Inputs, Rows
from graftstack.finetune.tapping import open_tap
from graftstack.finetune.task import Task, Workbench
from graftstack.sweep.plan import Pass
from graftstack.sweep.planner import Planner
from graftstack.sweep.probe import ProbeScore, hopeless, knn_accuracy, pooled, ridge_accuracy
from graftstack.sweep.trials import Trial, TrialResult
from graftstack.taps.store import TapStore

# What a closed form costs grows with the rows, and what it tells soon doesn't.
_MOST_TRAIN, _MOST_VAL = 10_000, 5_000
# For a plan, which makes no pass: a few seconds of forward on any backbone.
_SAMPLED_TRAIN, _SAMPLED_VAL = 384, 128


class _Part(NamedTuple):
    """Rows that a probe learns from, or is judged on."""

    rows: Rows
    labels: Tensor
    """int64, [N]"""


def probe_sample(task: Task, boundaries: Sequence[int], *, label: str) -> list[ProbeScore]:
    """Returns the scores of some boundaries on a few hundred images, which go through the backbone for it."""
    train, val = _parts(task, _SAMPLED_TRAIN, _SAMPLED_VAL)
    task.model.backbone.freeze(task.model.backbone.num_groups)
    features = [_features_of_images(task, part.rows, boundaries) for part in (train, val)]
    return [
        _score(task, label, boundary, (features[0][boundary], train.labels), (features[1][boundary], val.labels))
        for boundary in boundaries
    ]


def probe_taps(task: Task, taps: Mapping[int, Inputs], *, label: str) -> list[ProbeScore]:
    """Returns the scores of the boundaries at which `taps` lie."""
    train, val = _parts(task, _MOST_TRAIN, _MOST_VAL)
    return [
        _score(
            task,
            label,
            boundary,
            (_features_of_tap(task, tap, train.rows), train.labels),
            (_features_of_tap(task, tap, val.rows), val.labels),
        )
        for boundary, tap in taps.items()
    ]


def probe_stored(read: Iterable[Pass], store: TapStore, workbench: Workbench) -> list[ProbeScore]:
    """Returns the scores of all taps that the trials of a sweep read; they are whole."""
    scores = []
    for taps in read:
        task = workbench.task(taps.trial.config)
        opened = {boundary: open_tap(task, store, spec) for boundary, spec in taps.specs.items()}
        scores += probe_taps(task, opened, label=taps.label)
        for tap in opened.values():
            tap.tap.close()
    return scores


def pruned_rows(
    planner: Planner, scores: Sequence[ProbeScore], trials: Iterable[Trial], *, margin: float
) -> dict[int, TrialResult]:
    """Returns a row for each trial that can't win by the evidence of the probes, which the row holds."""
    evidence = hopeless(scores, margin=margin)
    rows = {}
    for trial in trials:
        why = evidence.get(planner.probed_as(trial))
        if why is not None:
            rows[trial.index] = TrialResult(
                index=trial.index, params=trial.params, details=trial.facts, status="pruned", error=why
            )
    return rows


def _parts(task: Task, most_train: int, most_val: int) -> tuple[_Part, _Part]:
    splits, seed = task.data.splits, task.config.seed
    parts = []
    for rows, most in ((splits.train, most_train), (splits.val, most_val)):
        chosen = np.sort(rows[epoch_order(len(rows), seed=seed, epoch=0)[:most]])
        parts.append(_Part(chosen, torch.from_numpy(task.data.labels[chosen])))
    return parts[0], parts[1]


def _score(
    task: Task, label: str, boundary: int, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]
) -> ProbeScore:
    num_classes = len(task.data.class_names)
    return ProbeScore(
        backbone=label,
        depth=boundary,
        ridge=ridge_accuracy(*train, *val, num_classes),
        knn=knn_accuracy(*train, *val, num_classes),
    )


@torch.no_grad()
def _features_of_images(task: Task, rows: Rows, boundaries: Sequence[int]) -> dict[int, Tensor]:
    """Returns one feature vector for each of `rows` at each boundary: fp32, [N, D], on the CPU."""
    device = next(task.model.parameters()).device
    pieces: dict[int, list[Tensor]] = {boundary: [] for boundary in boundaries}
    for batch in _batches(task, rows):
        values, reached = task.images.prepared(task.images.plain(batch), device), 0
        for boundary in sorted(boundaries):
            values, reached = task.model.backbone.run_groups(values, reached, boundary), boundary
            pieces[boundary].append(pooled(values).cpu())
    return {boundary: torch.cat(piece) for boundary, piece in pieces.items()}


def _features_of_tap(task: Task, tap: Inputs, rows: Rows) -> Tensor:
    cpu = torch.device("cpu")
    return torch.cat([pooled(tap.prepared(tap.plain(batch), cpu)) for batch in _batches(task, rows)])


def _batches(task: Task, rows: Rows) -> list[Rows]:
    size = inference_batch_size(task.preprocessing.image_size)
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]
