"""The loop of a cross-fitting: starts what there is room for, and takes in how it ends."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple
from uuid import uuid4

from graftstack.errors import TrainingError
from graftstack.runtime import Call, CallDone, CallEnd, CallFailed, CallLost, Executor
from graftstack.stacking.faults import Faults, Hopeless, told
from graftstack.stacking.folds import Folds
from graftstack.stacking.graph import Graph, Task
from graftstack.stacking.material import Material
from graftstack.stacking.task_run import Done, run
from graftstack.stacking.work import CrossFitted, FoldResult, RefitResult

log = logging.getLogger(__name__)

OnError = Literal["raise", "drop"]

# How long to wait for an end before others are given a sign of life.
_POLL_S = 1.0


class Progress(NamedTuple):
    """How far a cross-fitting is."""

    done: int
    """Tasks, those of earlier starts among them."""
    total: int
    running: tuple[str, ...]
    """E.g. ``rf fold 2 of 5`` or ``rf refit``."""
    just_ended: str | None
    """None: nothing has, for a while."""
    seconds_left: float | None
    """None while nothing is known of a base."""


@dataclass(frozen=True, eq=False)
class CrossFit:
    """What `cross_fit` returns."""

    levels: tuple[tuple[CrossFitted, ...], ...]
    """At least one; from the first of which no base is whole, levels are left out."""
    folds: tuple[Folds, ...]
    """Those of each level: above the first, they have only rows that the level below predicts (see `Folds.above`)."""
    dropped: dict[str, str]
    """Name of a base -> why it isn't there."""
    num_done: int
    """Tasks that ran."""
    num_known: int
    """Tasks whose results were in the ledger."""


class _Running(NamedTuple):
    task: Task
    num_slots: int
    is_alone: bool


class Loop:
    """Works on the tasks of one cross-fitting. What it does with each option is said at `cross_fit`."""

    def __init__(
        self,
        material: Material,
        executor: Executor,
        *,
        on_error: OnError,
        raw_errors: bool,
        time_limit_s: float | None,
        time_spent_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._material = material
        self._executor = executor
        self._on_error = on_error
        self._raw_errors = raw_errors
        self._limit_s = time_limit_s
        self._clock = clock
        self._deadline = None if time_limit_s is None else clock() + time_limit_s - time_spent_s
        self._graph = Graph(material.shapes, base_by_base=time_limit_s is not None)
        self._results: dict[Task, FoldResult | RefitResult] = {}
        self._running: dict[str, _Running] = {}
        """By the key of the call."""
        self._alone: deque[Task] = deque()
        """What may be too large to run beside others, or may take them down with it."""
        self._faults: Faults[Task] = Faults()
        self._dropped: dict[str, str] = {}
        self._num_calls = self._num_done = self._num_known = 0
        # Others may have used the same executor before, or do so still.
        self._token = uuid4().hex[:8]

    def run(self, tell: Callable[[Progress], None]) -> None:
        """Works until every task is done or out; leaves nothing under way, whatever ends it."""
        try:
            self._work(tell)
        finally:
            self._cancel(list(self._running))

    def _work(self, tell: Callable[[Progress], None]) -> None:
        self._open(0)
        while self._graph.num_done < self._graph.num_tasks:
            now = self._clock()
            if self._deadline is not None and now >= self._deadline:
                self._run_out_of_time()
                return
            self._start(now)
            if (waiting_s := self._graph.waiting_s()) is not None:
                self._executor.expect(waiting_s)
            timeout_s = _POLL_S if self._deadline is None else min(_POLL_S, self._deadline - now)
            ends: list[CallEnd | None] = [*self._executor.wait(timeout_s)] or [None]
            for end in ends:
                ended = None if end is None else self._handle(end)
                tell(self._progress(ended))

    def outcome(self) -> CrossFit:
        """Returns what is whole."""
        levels: list[tuple[CrossFitted, ...]] = []
        for level in range(len(self._material.levels)):
            fitted = tuple(
                self._fitted(level, base) for base in self._graph.bases(level) if self._graph.is_whole(level, base)
            )
            if not fitted:
                break
            levels.append(fitted)
        if not levels:
            raise TrainingError(
                f"time_limit_s={self._limit_s:g}: no base model was finished in time; "
                "give it more, or use fewer folds or faster base models"
            )
        return CrossFit(
            tuple(levels), self._material.folds[: len(levels)], self._dropped, self._num_done, self._num_known
        )

    def _open(self, level: int) -> None:
        """Lets the tasks of a level run, and looks in the ledger which of them need not."""
        self._graph.num_open = level + 1
        self._material.begin(level)
        for task in self._graph.tasks(level):
            if task in self._results:
                continue
            known = self._material.known(task)
            if known is not None:
                self._num_known += 1
                self._finish(task, known)
        self._open_next()

    def _open_next(self) -> None:
        """Opens the level that waits for predictions, if they are all there."""
        top = self._graph.num_open - 1
        if top + 1 == len(self._material.levels) or not self._graph.is_predicted(top):
            return
        predicted = {
            base: [
                self._results[task] for task in self._graph.tasks(top) if task.base == base and task.fold is not None
            ]
            for base in self._graph.bases(top)
        }
        self._material.learn_from(top, predicted)
        self._open(top + 1)

    def _start(self, now: float) -> None:
        """Starts what there is room for."""
        num_slots = max(1, self._executor.num_slots)
        if any(running.is_alone for running in self._running.values()):
            return
        if self._alone:
            if not self._running:
                self._submit(self._alone.popleft(), num_slots, is_alone=True)
            return
        room = num_slots - sum(min(running.num_slots, num_slots) for running in self._running.values())
        while room > 0 and (task := self._graph.next(room, num_slots, now)) is not None:
            self._graph.start(task, now)
            room -= self._submit(task, num_slots, is_alone=False)

    def _submit(self, task: Task, num_slots: int, *, is_alone: bool) -> int:
        """Begins a call; returns the slots that it takes."""
        taken = self._graph.slots(task, num_slots)
        self._num_calls += 1
        key = f"{self._material.name(task)} #{self._token}.{self._num_calls}"
        self._running[key] = _Running(task, taken, is_alone)
        self._executor.submit(Call(key, run, self._material.arguments(task), taken))
        return taken

    def _handle(self, end: CallEnd) -> str | None:
        """Takes in how a call ended; returns the name of its task, if that still matters."""
        running = self._running.pop(end.key, None)
        if running is None:  # cancelled, or somebody else's
            return None
        task = running.task
        if isinstance(end, CallDone):
            done: Done = end.value
            self._material.store(task, done)
            self._num_done += 1
            self._finish(task, done.result)
            self._open_next()
        elif isinstance(end, CallLost) and (known := self._material.known(task)) is not None:
            # It had stored its result, and was lost with the news of it.
            self._num_known += 1
            self._finish(task, known)
            self._open_next()
        else:
            self._judge(task, end)
        return self._material.name(task)

    def _judge(self, task: Task, end: CallFailed | CallLost) -> None:
        """Lets a task that has no result run again, or gives its base up."""
        verdict = self._faults.judged(task, end)
        if isinstance(verdict, Hopeless):
            self._give_up(task, verdict)
            return
        log.warning("%s: %s; once more", self._material.name(task), told(end))
        if verdict == "alone":
            self._alone.append(task)
        else:
            self._graph.put_back(task)

    def _finish(self, task: Task, result: FoldResult | RefitResult) -> None:
        self._results[task] = result
        self._graph.finish(task, result.fit_s + (result.predict_s if isinstance(result, FoldResult) else 0.0))

    def _give_up(self, task: Task, verdict: Hopeless) -> None:
        """Leaves a base out, or ends everything. Raises `TrainingError`, or the error itself where errors are raw."""
        name = self._material.base(task).name
        if self._on_error == "raise":
            if self._raw_errors:
                raise verdict.error
            raise TrainingError(
                f"base model {self._material.name(task)}: {verdict.why}; mend it, leave it out, or set on_error=drop"
            ) from verdict.error
        log.warning("%s: left out (%s)", self._material.name(task), verdict.why)
        self._drop(task.level, task.base, f"{self._material.part(task)}: {verdict.why}")
        if not self._graph.bases(task.level):
            raise TrainingError(f"no base model is left, the last was {name} ({self._dropped[name]}); mend one of them")
        self._open_next()

    def _drop(self, level: int, base: int, why: str) -> None:
        """Takes a base out; levels above that have learnt from it begin again without it."""
        self._dropped[self._material.levels[level][base].name] = why
        self._graph.drop(level, base)
        if self._graph.num_open > level + 1:
            self._graph.close_above(level)
            self._results = {task: result for task, result in self._results.items() if task.level <= level}
        self._results = {task: result for task, result in self._results.items() if task[:2] != (level, base)}
        self._alone = deque(task for task in self._alone if self._is_wanted(task))
        self._cancel([key for key, running in self._running.items() if not self._is_wanted(running.task)])

    def _cancel(self, keys: list[str]) -> None:
        for key in keys:
            self._executor.cancel(key)
            del self._running[key]

    def _is_wanted(self, task: Task) -> bool:
        return task.level < self._graph.num_open and task.base in self._graph.bases(task.level)

    def _run_out_of_time(self) -> None:
        """Leaves out all bases that aren't whole, and levels that have learnt from one of them."""
        why = f"not finished within time_limit_s={self._limit_s:g}"
        for level in range(len(self._material.levels)):
            for base in self._graph.bases(level):
                if not self._graph.is_whole(level, base):
                    self._drop(level, base, why)

    def _fitted(self, level: int, base: int) -> CrossFitted:
        results = [self._results[task] for task in self._graph.tasks(level) if task.base == base]
        folds = tuple(result for result in results if isinstance(result, FoldResult))
        refits = [result.model for result in results if isinstance(result, RefitResult)]
        return CrossFitted(
            self._material.levels[level][base],
            folds,
            self._material.model(level, base, folds, refits[0] if refits else None),
            median(result.fit_s for result in folds),
            median(result.predict_s for result in folds),
        )

    def _progress(self, just_ended: str | None) -> Progress:
        left_s = self._graph.left_s(self._clock())
        return Progress(
            self._graph.num_done,
            self._graph.num_tasks,
            tuple(self._material.name(running.task) for running in self._running.values()),
            just_ended,
            None if left_s is None else left_s / max(1, self._executor.num_slots),
        )
