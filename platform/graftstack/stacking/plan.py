"""What a stack would do, and how long that takes: base models are fitted to a few rows to see."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from graftstack.config.schema import ClusterKind
from graftstack.config.stack import StackMode
from graftstack.finetune.memory import DataFacts, JobMemory, assumed_image_size
from graftstack.machine import usable_cpus
from graftstack.reason import reason
from graftstack.seeding import derive_seed
from graftstack.stacking.fitting import StackTask, taken
from graftstack.stacking.folds import Fold
from graftstack.stacking.memory import TableFacts, stack_memory
from graftstack.stacking.task_run import Job, encoded_target, run
from graftstack.stacking.work import BaseModel

# Rows of the smaller of two samples; the larger one has twice as many.
_NUM_SAMPLED = 300

# No more is measured of a base model whose smaller sample took so long.
_LONG_S = 2.0


@dataclass(frozen=True, kw_only=True)
class BasePlan:
    """One base model."""

    name: str
    estimator: str
    view: str
    """What it learns from: the table, pixels, images, or what the level below predicts."""
    method: str
    level: int
    """Counted from 1."""
    num_tasks: int
    """Its folds, and its refit where one is needed."""
    fit_s: float | None
    """Predicted seconds of a fold; None above the first level, where there is nothing to measure yet, and for what
    can't be fitted to a few rows: a note says why."""


@dataclass(frozen=True, kw_only=True)
class StackPlan:
    """A validated stack in numbers."""

    num_rows: int
    """That are cross-validated."""
    num_held_out: int
    num_features: int | None
    num_classes: int
    num_folds: int
    meta_model: str
    mode: str
    num_tasks: int
    num_slots: int
    tap_bytes: int
    """Of what is missing of the taps that backbones read."""
    worker_memory_bytes: int
    """Memory of the machine that the base models need which are fitted at once, at the most."""
    device_memory_bytes: int | None
    """Memory of the GPU of one that has a backbone; None: none has a GPU."""
    bases: tuple[BasePlan, ...]
    notes: tuple[str, ...]
    predicted_s: float | None
    """Seconds of all tasks on this machine's slots; None where a base model can't be timed."""


def _tap_bytes(task: StackTask) -> int:
    readers = [base.estimator for base in task.levels[0] if base.view == "images"]
    if not readers:
        return 0
    from graftstack.stacking.taps import bytes_to_make

    return bytes_to_make(readers, task.data.views["images"])


def _memory(task: StackTask, num_slots: int) -> JobMemory:
    data, schema, views = task.data, task.data.schema, task.data.views
    num_columns = len(schema.columns) if schema is not None else views["pixels"].shape[1] if "pixels" in views else 0
    table = TableFacts(len(data.splits.train), num_columns, task.num_classes)
    size = views["images"].image_size if "images" in views else None
    return stack_memory(
        task.config,
        table,
        num_slots=num_slots,
        facts=DataFacts(task.num_classes, len(data)),
        size_of=lambda config: size or assumed_image_size(config),
    )


class _Call(NamedTuple):
    seconds: float
    num_threads: int


class _Timing(NamedTuple):
    num_rows: int
    seconds: float


def make_plan(task: StackTask) -> StackPlan:
    """Returns the plan of a prepared stack; fits each base model of the first level to a sample, twice."""
    config = task.config
    num_slots = (
        1 if config.cluster.kind is ClusterKind.inline else config.cluster.cpus_of(config.max_slots or usable_cpus())
    )
    num_rows = len(task.data.splits.train)
    fold_rows = int(np.mean([len(fold.train) for fold in task.folds.folds]))
    plans: list[BasePlan] = []
    calls: list[_Call] = []
    notes = [*task.data.notes]
    for level, bases in enumerate(task.levels):
        for base in bases:
            has_refit = config.mode is StackMode.refit and base.refitted is None
            fit_s = None
            if level == 0:
                try:
                    fit_s = _predicted(task, base, fold_rows)
                except Exception as error:  # estimators raise what they like, be it for want of rows or for good
                    notes.append(f"{base.name} can't be fitted to a few rows to see how long it takes: {reason(error)}")
            plans.append(
                BasePlan(
                    name=base.name,
                    estimator=_named(base.estimator),
                    view=base.view,
                    method=base.method,
                    level=level + 1,
                    num_tasks=len(task.folds.folds) + has_refit,
                    fit_s=None if fit_s is None else round(fit_s, 4),
                )
            )
            if fit_s is not None:
                calls += [_Call(fit_s, base.num_threads)] * len(task.folds.folds)
                calls += [_Call(fit_s * num_rows / max(1, fold_rows), base.num_threads)] * has_refit
    if len(task.levels) > 1:
        notes.append("base models above the first level can't be timed before there are predictions to learn from")
    is_timed = all(plan.fit_s is not None for plan in plans)
    schema = task.data.schema
    memory = _memory(task, num_slots)
    return StackPlan(
        num_rows=num_rows,
        num_held_out=len(task.data.splits.val),
        num_features=None if schema is None else len(schema.columns),
        num_classes=task.num_classes,
        num_folds=len(task.folds.folds),
        meta_model=config.meta[0],
        mode=config.mode.value,
        num_tasks=sum(plan.num_tasks for plan in plans),
        num_slots=num_slots,
        tap_bytes=_tap_bytes(task),
        worker_memory_bytes=memory.worker_bytes,
        device_memory_bytes=memory.device_bytes,
        bases=tuple(plans),
        notes=tuple(notes),
        predicted_s=round(_makespan(calls, num_slots), 3) if is_timed else None,
    )


def _predicted(task: StackTask, base: BaseModel, fold_rows: int) -> float:
    """Returns the seconds of a fold: between two samples time grows with a power of the rows, and goes on so."""
    rng = np.random.default_rng(derive_seed(task.config.seed, "plan"))
    order = rng.permutation(len(task.data.splits.train))
    small = _timed(task, base, order[: min(_NUM_SAMPLED, fold_rows)])
    if small.seconds > _LONG_S or 2 * small.num_rows > fold_rows:
        return small.seconds * fold_rows / small.num_rows
    large = _timed(task, base, order[: 2 * small.num_rows])
    power = min(2.0, max(0.0, log2(large.seconds / small.seconds)))
    return float(large.seconds * (fold_rows / large.num_rows) ** power)


def _timed(task: StackTask, base: BaseModel, sample: npt.NDArray[np.int64]) -> _Timing:
    """Fits a base model to some rows, and lets it predict as many as a fold of so many would test."""
    rows = np.sort(sample)
    view = taken(task.data.views[base.view], task.data.splits.train[rows])
    everything = np.arange(len(rows))
    fold = Fold(everything, everything[:: max(2, len(task.folds.folds) - 1)], "sample")
    target = encoded_target(task.y[rows], base.method)
    job = Job(
        estimator=base.estimator,
        method=base.method,
        fold=0,
        rows=None,
        keeps_model=False,
        num_classes=target.num_classes,
        config={},
        ledger=None,
        key=None,
    )
    began = time.perf_counter()
    run(job, view, target.values, [fold])
    return _Timing(len(rows), time.perf_counter() - began)


def _makespan(calls: Sequence[_Call], num_slots: int) -> float:
    """Returns how long all calls take, the longest first, each on as many slots as it has threads, or on all."""
    ends = [0.0] * num_slots
    for seconds, num_threads in sorted(calls, reverse=True):
        num = min(num_threads, num_slots)
        ends.sort()
        ends[:num] = [ends[num - 1] + seconds] * num
    return max(ends)


def _named(estimator: object) -> str:
    """Returns the class of an estimator, past what encodes its columns."""
    steps = getattr(estimator, "steps", None)
    return type(steps[-1][1] if steps else estimator).__name__
