"""Cross-fits the bases of a stack: every fold of every base, and every refit, in one graph without barriers."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from graftstack.errors import ConfigError
from graftstack.runtime import Executor
from graftstack.stacking.folds import Folds
from graftstack.stacking.ledger import Ledger
from graftstack.stacking.loop import CrossFit, Loop, OnError, Progress
from graftstack.stacking.material import Material
from graftstack.stacking.work import BaseModel

__all__ = ["CrossFit", "Mode", "OnError", "Progress", "cross_fit"]

Mode = Literal["refit", "bag"]


def cross_fit(
    levels: Sequence[Sequence[BaseModel]],
    views: Mapping[str, Any],
    y: Any,
    folds: Folds,
    *,
    executor: Executor,
    ledger: Ledger | None = None,
    mode: Mode = "refit",
    passthrough: str | None = None,
    on_error: OnError = "raise",
    raw_errors: bool = False,
    time_limit_s: float | None = None,
    time_spent_s: float = 0.0,
    seed: int = 0,
    tell: Callable[[Progress], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> CrossFit:
    """Fits every base on every fold, and again on all rows; results don't depend on the executor.

    Args:
        levels: The bases of each level; those above the first learn from the predictions of the level below.
        views: What bases of the first level learn from, by name; N rows each.
        y: Labels, targets, or label indicators: [N] or [N, L].
        folds: Of the N rows. They aren't checked: see `Folds.check`.
        executor: Where tasks run; stays open, and has none of them left at the end, whatever that is.
        ledger: Results that are there aren't computed again, and new ones are stored as they come. None: none is kept.
        mode: What stands for a base afterwards: a model of all rows (refit), or the models of all folds (bag).
        passthrough: The view whose columns levels above the first see beside predictions; None: none.
        on_error: Whether a base that fails ends everything (raise) or is left out (drop).
        raw_errors: Whether what ends everything is raised as the estimator raised it.
        time_limit_s: After it nothing starts, what runs is cancelled, and bases that aren't whole are left out; bases
            are fitted in their order, so that many are whole. None: no limit.
        time_spent_s: How much of the limit is over already.
        seed: Of the stack: part of the ledger's keys.
        tell: Called at each end of a task, and about once a second while there is none.
        clock: Seconds.

    Raises:
        ConfigError: two bases of one name, or a view that there isn't.
        TrainingError: a base failed twice, or lost its processes; no base is left; or none was whole in time.
        StorageFullError, RunError: the ledger can't be written.
        TypeError: rows, labels or a parameter of `fit` can't be sent to the workers of the executor.
        KeyboardInterrupt: it was interrupted; what is finished is in the ledger.
    """
    _check(levels, views, passthrough)
    material = Material(
        levels, views, y, folds, executor=executor, ledger=ledger, mode=mode, passthrough=passthrough, seed=seed
    )
    loop = Loop(
        material,
        executor,
        on_error=on_error,
        raw_errors=raw_errors,
        time_limit_s=time_limit_s,
        time_spent_s=time_spent_s,
        clock=clock,
    )
    loop.run(tell)
    return loop.outcome()


def _check(levels: Sequence[Sequence[BaseModel]], views: Mapping[str, Any], passthrough: str | None) -> None:
    if not levels or not all(levels):
        raise ConfigError("a level without base models; name one or more in each")
    names = Counter(base.name for level in levels for base in level)
    for name, num in names.items():
        if num > 1:
            raise ConfigError(f"base models: {num} are called {name}; give each its own name")
    wanted = {*(base.view for base in levels[0]), *([] if passthrough is None else [passthrough])}
    if missing := sorted(wanted - views.keys()):
        raise ConfigError(f"view {missing[0]}: base models learn from it, and there are only {', '.join(views)}")
