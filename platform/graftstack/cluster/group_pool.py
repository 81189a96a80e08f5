"""A pool whose trials train with several workers each: a Ray Train group for every trial."""

import queue
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftstack.cluster.train import GroupStop, train_in_group
from graftstack.errors import GraftstackError, StorageFullError
from graftstack.reason import reason
from graftstack.storage import Folder
from graftstack.sweep.ledger import Ledger
from graftstack.sweep.trials import Event, Trial, TrialResult, Unit, UnitEnd, UnitLost

if TYPE_CHECKING:
    from graftstack.finetune.job import Outcome
    from graftstack.sweep.runner import RunnerSettings


class GroupPool:
    """Trains each unit, a single trial, to its end; the groups of `num_slots` trials fit on the cluster together.

    The trials themselves hold no resources, only their groups do: none waits for what a waiting one holds.
    """

    def __init__(self, settings: "RunnerSettings", *, num_slots: int, verbose: bool) -> None:
        self._settings = settings
        self._folder = Folder(settings.trials_folder)
        self._num_slots = num_slots
        self._verbose = verbose
        self._running: dict[str, GroupStop] = {}
        self._events: queue.Queue[Event | StorageFullError] = queue.Queue()

    @property
    def num_free(self) -> int:
        """How many trials can be started now."""
        return self._num_slots - len(self._running)

    def start(self, unit: Unit) -> None:
        """Begins the trial of `unit`."""
        stop = GroupStop()
        self._running[unit.name] = stop
        threading.Thread(target=self._train, args=(unit, stop), name=f"trial-{unit.name}", daemon=True).start()

    def wait(self, timeout_s: float) -> list[Event]:
        """Returns what has happened since, after at most `timeout_s`. Raises `StorageFullError`."""
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return []
        if isinstance(event, StorageFullError):
            raise event
        self._running.pop(event.unit.name, None)
        return [event]

    def go_on(self, unit: Unit, keep: Sequence[int]) -> None:
        """Is never needed: a group trains to its end."""
        raise AssertionError(f"unit {unit.name} asked nothing of {keep}")

    def close(self) -> None:
        """Ends all groups and waits until they are gone."""
        for stop in self._running.values():
            stop.set()
        self._running.clear()

    def _train(self, unit: Unit, stop: GroupStop) -> None:
        (trial,) = unit.trials
        began = time.monotonic()
        try:
            outcome = train_in_group(
                trial.config,
                self._folder / trial.name,
                poll=stop.check,
                verbose=self._verbose,
                tap=None if unit.tap is None else (self._settings.store, unit.tap),
            )
            result = _result(trial, outcome, time.monotonic() - began)
        except KeyboardInterrupt:  # the pool is closed
            return
        except StorageFullError as error:
            self._events.put(error)
            return
        except GraftstackError as error:
            result = TrialResult(index=trial.index, params=trial.params, status="failed", error=str(error))
        except Exception as error:  # a fault of one trial is not one of the sweep
            self._events.put(UnitLost(unit, reason(error)))
            return
        Ledger(self._folder).write(result)
        self._events.put(UnitEnd(unit, (result,)))


def _result(trial: Trial, outcome: "Outcome", seconds: float) -> TrialResult:
    return TrialResult(
        index=trial.index,
        params=trial.params,
        status="done",
        metrics=outcome.metrics,
        history=outcome.history,
        epochs=len(outcome.history),
        seconds=round(seconds, 4),
        backbone_forwards=outcome.backbone_forwards,
        details={"best_epoch": outcome.details["best_epoch"]},
    )
