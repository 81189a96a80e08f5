"""The loop of a sweep: keeps all slots of a pool busy until every trial is over."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from graftstack.sweep.ledger import Ledger
from graftstack.sweep.trials import EpochEnd, Event, Pool, Row, Scheduler, Search, Trial, TrialResult, Unit, UnitEnd

log = logging.getLogger(__name__)

# How long to wait for an event before others are given a sign of life.
_POLL_S = 1.0

MakeUnits = Callable[[list[Trial]], list[Unit]]


class Progress(NamedTuple):
    """How far a sweep is."""

    results: Mapping[int, TrialResult]
    """Of the trials that are over, those of earlier starts among them."""
    running: tuple[Unit, ...]
    waiting: tuple[Unit, ...]
    """Made of trials that the search has given so far."""
    event: Event | None
    """What has just happened; None: nothing, for a while."""


class KeepAll:
    """The scheduler that lets every trial train to its end."""

    def keep(self, rows: Mapping[int, Row], *, is_fused: bool) -> list[int]:  # noqa: ARG002 - all alike
        """Returns all of them."""
        return list(rows)

    def promote(self, stopped: Collection[int], *, is_last_chance: bool) -> int | None:  # noqa: ARG002 - none is
        """Returns None."""
        return None


def drive(
    search: Search,
    pool: Pool,
    scheduler: Scheduler,
    ledger: Ledger,
    *,
    make_units: MakeUnits,
    trial_of: Callable[[TrialResult], Trial],
    finished: Mapping[int, TrialResult],
    time_limit_s: float | None,
    max_losses: int,
    tell: Callable[[Progress], None],
) -> list[TrialResult]:
    """Runs the trials of `search` in the slots of `pool`, and returns the rows of those that are over, in their order.

    Args:
        search: Asked for trials as long as it gives some, and again after each result.
        pool: Stays open at the end, and is closed if anything is raised.
        scheduler: Asked at the end of each epoch; first it is shown the epochs of `finished`.
        ledger: Holds the row of every trial that is over before the search hears of it.
        make_units: Puts trials that the search gave together into units, the first to start first.
        trial_of: Makes a trial again from its row.
        finished: Rows of an earlier start: these trials don't run again. Other rows in the ledger count for nothing.
        time_limit_s: After it no unit starts, and those that run end with their epoch. A trial that never started
            has no row. None: no limit.
        max_losses: How often a trial may lose its process; once more, and its row says that it failed.
        tell: Called at each event, and about once a second while none comes.

    Raises:
        StorageFullError: no more rows can be written.
        KeyboardInterrupt: it was interrupted; what is over is on disk.
    """
    loop = _Loop(search, pool, scheduler, ledger, make_units=make_units, trial_of=trial_of, max_losses=max_losses)
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    try:
        loop.recall(finished)
        return loop.run(deadline, tell)
    except BaseException:
        pool.close()
        raise


class _Loop:
    def __init__(
        self,
        search: Search,
        pool: Pool,
        scheduler: Scheduler,
        ledger: Ledger,
        *,
        make_units: MakeUnits,
        trial_of: Callable[[TrialResult], Trial],
        max_losses: int,
    ) -> None:
        self._search = search
        self._pool = pool
        self._scheduler = scheduler
        self._ledger = ledger
        self._make_units = make_units
        self._max_losses = max_losses
        self._results: dict[int, TrialResult] = {}
        self._outdated: dict[int, TrialResult] = {}
        self._trial_of = trial_of
        self._promoted: dict[int, TrialResult] = {}
        """What trials had reached that were stopped and now train on."""
        self._losses: Counter[int] = Counter()
        self._waiting: deque[Unit] = deque()
        self._running: dict[str, Unit] = {}

    def recall(self, finished: Mapping[int, TrialResult]) -> None:
        """Tells search and scheduler what an earlier start has learnt. What else has a row is to run again."""
        self._outdated = {index: row for index, row in self._ledger.read().items() if index not in finished}
        for index in sorted(finished):
            self._results[index] = finished[index]
            self._search.tell(finished[index])
        for rows in _by_epoch(finished.values()):
            self._scheduler.keep(rows, is_fused=False)

    def run(self, deadline: float | None, tell: Callable[[Progress], None]) -> list[TrialResult]:
        """Works until nothing runs and nothing can start; `deadline` is on the clock of `time.monotonic`."""
        while True:
            is_late = deadline is not None and time.monotonic() >= deadline
            if not is_late:
                self._ask()
                self._start()
            if not self._running:
                results = {**self._promoted, **self._results}
                return [results[index] for index in sorted(results)]
            events: list[Event | None] = [*self._pool.wait(_POLL_S)] or [None]
            for event in events:
                if event is not None:
                    self._handle(event, is_late=deadline is not None and time.monotonic() >= deadline)
                tell(Progress(self._results, tuple(self._running.values()), tuple(self._waiting), event))

    def _ask(self) -> None:
        """Takes all trials that the search gives now."""
        trials = []
        while (trial := self._search.next()) is not None:
            if trial.index not in self._results and trial.index not in self._promoted:
                trials.append(trial)
        if trials:
            self._waiting.extend(self._make_units(trials))

    def _start(self) -> None:
        while self._pool.num_free and (unit := self._next_unit()) is not None:
            self._running[unit.name] = unit
            self._pool.start(unit)

    def _next_unit(self) -> Unit | None:
        """Returns the first unit that waits; if there is none, a trial that was stopped and is promoted."""
        if self._waiting:
            return self._waiting.popleft()
        stopped = [index for index, result in self._results.items() if result.status == "stopped"]
        is_last_chance = not self._running and self._search.is_exhausted
        promoted = self._scheduler.promote(stopped, is_last_chance=is_last_chance)
        if promoted is None:
            return None
        row = self._results.pop(promoted)
        self._outdated[promoted] = self._promoted[promoted] = row
        (unit,) = self._make_units([self._trial_of(row)])
        return unit

    def _handle(self, event: Event, *, is_late: bool) -> None:
        if isinstance(event, EpochEnd):
            is_fused = len(event.unit.trials) > 1
            self._pool.go_on(event.unit, [] if is_late else self._scheduler.keep(event.rows, is_fused=is_fused))
            return
        del self._running[event.unit.name]
        if isinstance(event, UnitEnd):
            for result in event.results:
                self._record(result)
            self._settle(event.unit, "it ended without a result")
        else:
            log.warning("trials %s: lost their process (%s)", event.unit.name, event.reason)
            self._settle(event.unit, event.reason)

    def _settle(self, unit: Unit, reason: str) -> None:
        """Looks on disk for results of `unit` that were not told, and lets the trials without one begin again."""
        again = []
        for trial in unit.trials:
            if trial.index in self._results:
                continue
            result = self._ledger.find(trial.index)
            if result is not None and result != self._outdated.get(trial.index):
                self._record(result)
                continue
            if len(unit.trials) == 1:
                self._losses[trial.index] += 1
            if self._losses[trial.index] > self._max_losses:
                self._record(self._lost(trial, reason))
            else:
                again.append(trial)
        # Trials that lost their process together may have been too many for its memory: next time they are fewer.
        half = -(-len(again) // 2)
        parts = (again[:half], again[half:]) if len(again) > 1 else (again,)
        self._waiting.extendleft(unit._replace(trials=tuple(part)) for part in reversed(parts) if part)

    def _lost(self, trial: Trial, reason: str) -> TrialResult:
        """Returns the row of a trial that lost its process too often: what it had before its promotion, if anything."""
        if trial.index in self._promoted:
            return self._promoted[trial.index]
        error = f"lost {self._losses[trial.index]} times; at last: {reason}"
        return TrialResult(index=trial.index, params=trial.params, details=trial.facts, status="failed", error=error)

    def _record(self, result: TrialResult) -> None:
        """Makes sure that the row is on disk before anything follows from it."""
        if self._ledger.find(result.index) != result:
            self._ledger.write(result)
        self._results[result.index] = result
        self._promoted.pop(result.index, None)
        self._search.tell(result)


def _by_epoch(results: Iterable[TrialResult]) -> list[dict[int, Row]]:
    """Returns the rows of all histories, epoch by epoch."""
    epochs: dict[float, dict[int, Row]] = {}
    for result in results:
        for row in result.history:
            epochs.setdefault(row["epoch"], {})[result.index] = row
    return [epochs[epoch] for epoch in sorted(epochs)]
