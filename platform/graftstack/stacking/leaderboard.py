"""The base models and their stack, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from graftstack.stacking.crossfit import CrossFit
from graftstack.stacking.fitting import FittedStack, StackTask
from graftstack.stacking.folds import Folds
from graftstack.stacking.metamodels import weights_of
from graftstack.stacking.model import Predicted
from graftstack.stacking.scores import Score, metrics_of, scored
from graftstack.stacking.work import CrossFitted

STACK = "stack"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a base model, or the stack, does."""

    name: str
    cv_score: float
    """Accuracy, or R² of a regression, of all out-of-fold predictions."""
    cv_loss: float | None
    """Log loss in nats, or root mean squared error; None for classes without probabilities."""
    cv_spread: float
    """Standard deviation of the score over the folds."""
    held_out_score: float | None
    held_out_loss: float | None
    """On rows that no base model and no meta-model has learnt from; None where there are none. Of `StackTask.flattered`
    base models they say too much: there they were chosen."""
    fit_s: float
    """Seconds of training in a fold, the median."""
    predict_s: float
    """Seconds of predicting a fold's rows, the median."""
    weight: float | None
    """Its share in the meta-model; None where that has no meaning."""


def predicted_outside(task: StackTask, stack: FittedStack) -> Predicted | None:
    """Returns what a stack and its base models say of the rows held out; None where there are none."""
    held_out = task.data.splits.val
    return stack.model.predict_all(task.views(held_out)) if len(held_out) else None


def leaderboard(task: StackTask, crossed: CrossFit, stack: FittedStack, predicted: Predicted | None) -> list[Standing]:
    """Returns how every base model and the stack do, the best first: by loss where all have one, else by score.

    Args:
        task: What was stacked.
        crossed: Its base models.
        stack: Made of them.
        predicted: What `predicted_outside` found.
    """
    weights = weights_of(stack.model.meta, stack.num_outputs)
    rows = []
    for level, (bases, folds) in enumerate(zip(crossed.levels, crossed.folds, strict=True)):
        is_last = level == len(crossed.levels) - 1
        for index, fitted in enumerate(bases):
            said = _Said(stack.base_oof[level][index], predicted.levels[level][index] if predicted else None)
            weight = float(weights[index]) if is_last and weights is not None else None
            rows.append(_standing_of(task, fitted, folds, said, weight))
    rows.append(_standing_of_stack(task, stack, predicted.stack if predicted else None))
    by_loss = all(row.cv_loss is not None for row in rows)
    return sorted(rows, key=lambda row: (row.cv_loss or 0.0) if by_loss else -row.cv_score)


def stack_metrics(task: StackTask, stack: FittedStack, predicted: Predicted | None) -> dict[str, float]:
    """Returns the metrics of the stack on the rows held out; without any, on those that are cross-validated."""
    if predicted:
        return metrics_of(predicted.stack, task.data.y[task.data.splits.val], task.num_classes)
    return metrics_of(stack.oof, task.y[stack.folds.covered], task.num_classes)


def better_base(stack: Standing, bases: Sequence[Standing]) -> Standing | None:
    """Returns the base model with a lower loss than the stack's on held-out rows, the best of them; None if none has.

    One that has no probabilities has no loss, and can't predict alone.
    """
    if stack.held_out_loss is None:
        return None
    better = [row for row in bases if row.held_out_loss is not None and row.held_out_loss < stack.held_out_loss]
    return min(better, key=lambda row: row.held_out_loss or 0.0, default=None)


class _Said(NamedTuple):
    """What a base model predicts."""

    oof: Any
    outside: Any
    """Of the rows held out; None where there are none."""


def _standing_of(task: StackTask, fitted: CrossFitted, folds: Folds, said: _Said, weight: float | None) -> Standing:
    method, y = fitted.base.method, task.y
    of_folds = [
        scored(result.predictions, y[fold.test], method=method, num_classes=task.num_classes)
        for fold, result in zip(folds.folds, fitted.folds, strict=True)
    ]
    return _standing(
        fitted.base.name,
        scored(said.oof, y[folds.covered], method=method, num_classes=task.num_classes),
        of_folds,
        None
        if said.outside is None
        else scored(said.outside, task.data.y[task.data.splits.val], method=method, num_classes=task.num_classes),
        fit_s=fitted.fit_s,
        predict_s=fitted.predict_s,
        weight=weight,
    )


def _standing_of_stack(task: StackTask, stack: FittedStack, outside: Any) -> Standing:
    method = "predict_proba" if task.num_classes else "predict"
    y, folds = task.y, stack.folds
    of_folds = [
        scored(
            stack.oof[np.searchsorted(folds.covered, fold.test)],
            y[fold.test],
            method=method,
            num_classes=task.num_classes,
        )
        for fold in (folds.folds[index] for index in folds.of_repeats[0])
    ]
    return _standing(
        STACK,
        scored(stack.oof, y[folds.covered], method=method, num_classes=task.num_classes),
        of_folds,
        None
        if outside is None
        else scored(outside, task.data.y[task.data.splits.val], method=method, num_classes=task.num_classes),
    )


def _standing(
    name: str,
    cv: Score,
    folds: Sequence[Score],
    held_out: Score | None,
    *,
    fit_s: float = 0.0,
    predict_s: float = 0.0,
    weight: float | None = None,
) -> Standing:
    return Standing(
        name=name,
        cv_score=cv.score,
        cv_loss=cv.loss,
        cv_spread=float(np.std([fold.score for fold in folds])),
        held_out_score=held_out.score if held_out else None,
        held_out_loss=held_out.loss if held_out else None,
        fit_s=round(fit_s, 4),
        predict_s=round(predict_s, 4),
        weight=weight,
    )
