"""A pool whose trials train with several workers each: a Ray Train group for every trial."""

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from graftstack.cluster.train import GroupStop, train_in_group
from graftstack.errors import GraftstackError, StorageError
from graftstack.finetune.job import CHECKPOINTS
from graftstack.reason import reason
from graftstack.storage import Folder
from graftstack.sweep.ledger import Ledger
from graftstack.sweep.trials import Event, Trial, TrialResult, Unit, UnitEnd, UnitLost

if TYPE_CHECKING:
    from graftstack.finetune.job import Outcome
    from graftstack.sweep.runner import RunnerSettings

PARAMS = "params.json"

# How long a thread may take to see that it is to stop, and to remove what its group has written for Ray.
_STOP_S = 10.0


class _Group(NamedTuple):
    thread: threading.Thread
    stop: GroupStop


class GroupPool:
    """Trains each unit, a single trial, to its end; the groups of `num_slots()` trials fit on the cluster together.

    The trials themselves hold no resources, only their groups do: none waits for what a waiting one holds. Where a
    node goes, a group waits in Ray until another has ended, or another node has come.
    """

    def __init__(
        self, settings: "RunnerSettings", *, num_slots: Callable[[], int], num_cpus: int, verbose: bool
    ) -> None:
        self._settings = settings
        self._folder = Folder(settings.trials_folder)
        self._num_slots = num_slots
        self._num_cpus = num_cpus
        self._verbose = verbose
        self._running: dict[str, _Group] = {}
        self._events: queue.Queue[Event | StorageError] = queue.Queue()

    @property
    def num_free(self) -> int:
        """How many trials can be started now. Where none runs, one may wait for its group."""
        return max(self._num_slots() - len(self._running), 0 if self._running else 1)

    def start(self, unit: Unit) -> None:
        """Begins the trial of `unit`."""
        stop = GroupStop()
        thread = threading.Thread(target=self._train, args=(unit, stop), name=f"trial-{unit.name}", daemon=True)
        self._running[unit.name] = _Group(thread, stop)
        thread.start()

    def wait(self, timeout_s: float) -> list[Event]:
        """Returns what has happened since, after at most `timeout_s`. Raises `StorageError`."""
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return []
        if isinstance(event, StorageError):
            raise event
        self._running.pop(event.unit.name, None)
        return [event]

    def go_on(self, unit: Unit, keep: Sequence[int]) -> None:
        """Is never needed: a group trains to its end."""
        raise AssertionError(f"unit {unit.name} asked nothing of {keep}")

    def close(self) -> None:
        """Lets go of all groups. Their processes belong to the connection to Ray, and end with it at the latest."""
        for group in self._running.values():
            group.stop.set()
        for group in self._running.values():
            group.thread.join(_STOP_S)
        self._running.clear()

    def _train(self, unit: Unit, stop: GroupStop) -> None:
        event: UnitEnd | UnitLost | StorageError
        try:
            event = self._end_of(unit, stop)
        except KeyboardInterrupt:  # the pool is closed
            return
        except StorageError as error:
            event = error
        except Exception as error:  # a fault of one trial is not one of the sweep
            event = UnitLost(unit, reason(error))
        self._events.put(event)

    def _end_of(self, unit: Unit, stop: GroupStop) -> UnitEnd:
        """Trains the trial of `unit`, and puts its row on disk."""
        (trial,) = unit.trials
        began = time.monotonic()
        folder = self._folder / trial.name
        try:
            _make_own(folder, trial)
            outcome = train_in_group(
                trial.config,
                folder,
                num_cpus=self._num_cpus,
                poll=stop.check,
                verbose=self._verbose,
                tap=None if unit.tap is None else (self._settings.store, unit.tap),
            )
            result = _result(trial, outcome, time.monotonic() - began)
        except StorageError:
            raise
        except GraftstackError as error:
            result = TrialResult(
                index=trial.index, params=trial.params, details=trial.facts, status="failed", error=str(error)
            )
        Ledger(self._folder).write(result)
        (folder / CHECKPOINTS).remove_all()
        return UnitEnd(unit, (result,))


def _make_own(folder: Folder, trial: Trial) -> None:
    """Removes what is another trial's: after an interrupt, a search that learns may give the same number again."""
    params = json.dumps(trial.params).encode()
    if not folder.exists(PARAMS) or folder.read(PARAMS) != params:
        folder.remove_all()
        folder.write(PARAMS, params)


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
        details={**trial.facts, "best_epoch": outcome.details["best_epoch"]},
    )
