"""Whether a stack learns what it can't know: on shuffled labels, predictions out of fold are to be at chance."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from graftstack.config.stack import StackMode
from graftstack.runtime import Executor
from graftstack.seeding import derive_seed
from graftstack.stacking.crossfit import Progress
from graftstack.stacking.fitting import StackTask, cross_fitted, fitted_stack
from graftstack.stacking.leaderboard import STACK
from graftstack.stacking.scores import scored

# Standard deviations above chance that luck doesn't explain, however many base models there are.
_NUM_SIGMAS = 4.0


class LeakageRow(NamedTuple):
    """A base model, or the stack, on shuffled labels."""

    name: str
    score: float
    """Accuracy, or R² of a regression, of out-of-fold predictions."""
    bound: float
    """The most that chance explains."""

    @property
    def leaks(self) -> bool:
        """Whether it knows of labels that it wasn't shown."""
        return self.score > self.bound


@dataclass(frozen=True)
class LeakageReport:
    """All base models and the stack on shuffled labels."""

    chance: float
    """The score of who knows how frequent each class is and nothing else; 0 for a regression."""
    rows: tuple[LeakageRow, ...]

    @property
    def leaking(self) -> list[str]:
        """The names of those that do better than chance."""
        return [row.name for row in self.rows if row.leaks]


def leakage(task: StackTask, executor: Executor, *, tell: Callable[[Progress], None] = lambda _: None) -> LeakageReport:
    """Stacks on labels that were shuffled among the rows, and compares what it predicts of them with chance.

    Nothing is read from a ledger or written to one. Raises as `cross_fit`.
    """
    y = np.random.default_rng(derive_seed(task.config.seed, "leakage")).permutation(task.y)
    # What was trained on the true labels isn't asked, and no refit is needed for predictions out of fold.
    levels = [[replace(base, refitted=None) for base in bases] for bases in task.levels]
    shuffled = replace(task, config=replace(task.config, mode=StackMode.bag), levels=levels)
    crossed = cross_fitted(shuffled, executor, y=y, tell=tell)
    stack = fitted_stack(shuffled, crossed, y)
    chance, sigma = _chance(y[stack.covered], task.num_classes)
    bound = chance + _NUM_SIGMAS * sigma
    rows = []
    for bases, folds, found in zip(crossed.levels, crossed.folds, stack.base_oof, strict=True):
        for fitted, predictions in zip(bases, found, strict=True):
            score = scored(predictions, y[folds.covered], method=fitted.base.method, num_classes=task.num_classes).score
            rows.append(LeakageRow(fitted.base.name, score, bound))
    method = "predict_proba" if task.num_classes else "predict"
    score = scored(stack.oof, y[stack.folds.covered], method=method, num_classes=task.num_classes).score
    return LeakageReport(chance, (*rows, LeakageRow(STACK, score, bound)))


def _chance(y: np.ndarray[Any, Any], num_classes: int) -> tuple[float, float]:
    """Returns the best score without knowledge, and its standard deviation over so many rows."""
    if not num_classes:
        return 0.0, 1 / np.sqrt(len(y))
    share = float(np.bincount(y, minlength=num_classes).max() / len(y))
    return share, float(np.sqrt(share * (1 - share) / len(y)))
