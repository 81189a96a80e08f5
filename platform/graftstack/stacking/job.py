"""The stack job, free of Ray: from a configuration to base models and folds, and from those to what a run leaves."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple

from graftstack.config.stack import FoldKind, StackConfig
from graftstack.data.load import Progress as Reading
from graftstack.finetune.predictions import parquet_bytes
from graftstack.runtime import Executor
from graftstack.seeding import derive_seed
from graftstack.stacking.artifact import save_stack
from graftstack.stacking.bases import TrainedBase, base_levels, common_image_size
from graftstack.stacking.crossfit import CrossFit, Progress
from graftstack.stacking.data import StackData, load_stack_data
from graftstack.stacking.fitting import FittedStack, StackTask, check_meta_model, cross_fitted, fitted_stack
from graftstack.stacking.folds import Folds, make_folds
from graftstack.stacking.leaderboard import STACK, better_base, leaderboard, predicted_outside, stack_metrics
from graftstack.stacking.ledger import Ledger
from graftstack.stacking.oof import check_honest, oof_table
from graftstack.storage import Folder

LEDGER, MODEL, OOF, LEADERBOARD = "ledger", "model", "oof.parquet", "leaderboard.json"


class StackOutcome(NamedTuple):
    """What a stack leaves in its run."""

    metrics: dict[str, float]
    artifacts: dict[str, str]
    details: dict[str, Any]
    results: dict[str, Any]


def prepare_stack(
    config: StackConfig, trained: Sequence[TrainedBase] = (), *, progress: Reading | None = None
) -> StackTask:
    """Reads the data, deals its rows to folds and checks each base model. Writes only to the image cache.

    Raises:
        BadInputError: what the user gave can't be stacked; one line with the remedy.
    """
    data = load_stack_data(
        config.data,
        task=config.task.value,
        seed=config.seed,
        image_size=_image_size(config, trained),
        last_validate=config.folds.kind is FoldKind.time,
        progress=progress,
    )
    task = StackTask(
        config=config,
        data=data,
        folds=_folds(config, data),
        levels=base_levels(config, data, trained),
        trained=frozenset(base.name for base in trained),
    )
    check_meta_model(task)
    # A trial of a sweep that no fold has the rows for is left out where base models that fail are.
    spared = task.trained if config.on_error.value == "drop" else ()
    if readers := [base for base in task.levels[0] if base.view == "images" and base.name not in spared]:
        from graftstack.stacking.feasible import check_backbones

        check_backbones(readers, data.views["images"], task.folds, data.splits.train)
    return task


def _folds(config: StackConfig, data: StackData) -> Folds:
    """Returns the folds of the rows that train, checked: none trains on a row or a group that it tests."""
    train, kind = data.splits.train, config.folds.kind
    groups = None if data.groups is None else data.groups[train]
    if kind is FoldKind.auto:
        kind = FoldKind.group if groups is not None else FoldKind.stratified
    if kind is FoldKind.stratified and not data.is_classification:
        kind = FoldKind.kfold
    folds = make_folds(
        kind.value,
        config.folds.num,
        y=data.y[train],
        groups=groups,
        repeats=config.folds.repeats,
        seed=derive_seed(config.seed, "folds"),
        is_classification=data.is_classification,
        class_names=data.class_names or None,
    )
    folds.check(groups)
    return folds


def run_stack(
    task: StackTask,
    folder: Folder,
    executor: Executor,
    *,
    time_left_s: float | None = None,
    tell: Callable[[Progress], None] = lambda _: None,
    tell_taps: Callable[[int, int], None] = lambda _, __: None,
    say: Callable[[str], None] = lambda _: None,
) -> StackOutcome:
    """Trains what isn't in the ledger of `folder`, fits the meta-model, and writes everything that a run leaves.

    Args:
        task: What is stacked.
        folder: The run's.
        executor: Where base models train.
        time_left_s: After so many seconds the stack is made of the base models that are finished.
        tell: Told how far the base models are.
        tell_taps: Told how many shards of taps are made, of all.
        say: Given a line that a person should read.

    Raises:
        TrainingError: no base model is left, one failed twice where `on_error` is raise, or folds aren't honest.
        StorageFullError, RunError: the ledger or an artifact can't be written.
    """
    began = time.monotonic()
    for note in task.data.notes:
        say(note)
    if task.flattered:
        say(
            f"held-out rows chose the trials or epochs of {', '.join(sorted(task.flattered))}: their own scores there "
            "flatter them"
        )
    with _made_taps(task, tell_taps, say):
        if time_left_s is not None:
            time_left_s = max(0.0, time_left_s - (time.monotonic() - began))
        crossed = cross_fitted(task, executor, ledger=Ledger(folder / LEDGER), time_left_s=time_left_s, tell=tell)
    check_honest(task, crossed)
    for name, why in crossed.dropped.items():
        say(f"{name} is left out: {why}")
    return _kept(task, crossed, fitted_stack(task, crossed), folder, say)


def _made_taps(
    task: StackTask, tell: Callable[[int, int], None], say: Callable[[str], None]
) -> AbstractContextManager[Any]:
    """Makes the taps that backbones read in all folds, in one pass, and holds them for the block."""
    readers = [base.estimator for base in task.levels[0] if base.view == "images"]
    if not readers:
        return nullcontext()
    from graftstack.stacking.taps import make_taps

    return make_taps(readers, task.data.views["images"], tell=tell, say=say).hold()


def _image_size(config: StackConfig, trained: Sequence[TrainedBase]) -> int | None:
    """Height and width of the images: as configured, as those of trainings are, or as the stack's backbone has them.

    Raises:
        ConfigError: trainings learnt from images of several sizes.
    """
    if config.data.image_size is not None:
        return config.data.image_size
    if trained:
        return common_image_size(trained)
    if all(not entry.takes_images for entry in config.entries[0]) and config.from_sweep is None:
        return None
    from graftstack.finetune.initial import preprocessing_for

    return preprocessing_for(config).image_size


def _kept(
    task: StackTask, crossed: CrossFit, stack: FittedStack, folder: Folder, say: Callable[[str], None]
) -> StackOutcome:
    table = oof_table(task, crossed, stack)
    outside = predicted_outside(task, stack)
    board = leaderboard(task, crossed, stack, outside)
    bases = [row for row in board if row.name != STACK]
    (own,) = (row for row in board if row.name == STACK)
    details: dict[str, Any] = {
        "num_base_models": len(bases),
        "num_folds": len(task.folds.folds),
        "num_rows": len(task.data.splits.train),
        "num_held_out": len(task.data.splits.val),
        "num_tasks_run": crossed.num_done,
        "num_tasks_known": crossed.num_known,
    }
    if crossed.dropped:
        details["dropped"] = crossed.dropped
    if better := better_base(own, [row for row in bases if row.name not in task.flattered]):
        details["better_base"] = better.name
        say(
            f"{better.name} alone does better than the stack on held-out rows (loss {better.held_out_loss:.4f} against "
            f"{own.held_out_loss:.4f}); predict with it: graftstack predict {folder.location} DATA --base "
            f"{better.name} --out FILE"
        )
    folder.write(OOF, parquet_bytes(table))
    folder.write(LEADERBOARD, json.dumps([asdict(row) for row in board], indent=2).encode())
    save_stack(folder / MODEL, task, stack.model)
    return StackOutcome(
        metrics=stack_metrics(task, stack, outside),
        artifacts={"model": MODEL, "oof": OOF, "leaderboard": LEADERBOARD},
        details=details,
        results={"base_models": [asdict(row) for row in bases], "stack": asdict(own), "oof_path": OOF},
    )
