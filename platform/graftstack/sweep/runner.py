"""Trains units of trials in one process, one after another; data, backbone and taps stay warm between them."""

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch

from graftstack.config.sweep import TapsConfig
from graftstack.errors import ConfigError, DataError, OutOfMemoryError, TrainingError
from graftstack.finetune.artifact import save_trained
from graftstack.finetune.counting import ForwardCount, counting_forwards
from graftstack.finetune.tapping import PassResult, make_shards, tap_inputs
from graftstack.finetune.task import Task, Workbench
from graftstack.finetune.training import Trained, Training
from graftstack.reason import reason
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder
from graftstack.sweep.fused import Ended, FusedTraining
from graftstack.sweep.ledger import Ledger
from graftstack.sweep.trials import EpochEnd, Row, Status, Trial, TrialResult, Unit, UnitEnd
from graftstack.taps.key import TapSpec
from graftstack.taps.store import TapStore
from graftstack.taps.tap import Tap, TapMissingError

FUSED = "fused-"
"""How the folders begin in which fused units save their state."""

_Answers = Generator[dict[int, dict[str, float]], Sequence[int], None]
"""Yields the rows of an epoch, is sent the trials that go on."""


@dataclass(frozen=True, kw_only=True)
class RunnerSettings:
    """What a process needs to know to train trials; pickles small."""

    trials_folder: str
    """Where rows and weights go."""
    taps: TapsConfig
    cache_dir: str | None
    is_on_gpu: bool
    may_promote: bool = False
    """Whether a trial that is stopped may be told later to train on."""

    @property
    def device_here(self) -> torch.device:
        """Where this process measures: a GPU if trials run on one and it has one too."""
        return torch.device("cuda" if self.is_on_gpu and torch.cuda.is_available() else "cpu")

    @property
    def store(self) -> TapStore:
        """The taps."""
        return TapStore(self.taps.location, budget_bytes=self.taps.budget_bytes, cache_dir=self.cache_dir)


class TrialRunner:
    """The `Runner` of this package: a single trial trains as any fine-tuning, several as fused heads."""

    def __init__(
        self, settings: RunnerSettings, *, workbench: Workbench | None = None, beat: Callable[[], None] = lambda: None
    ) -> None:
        """Reads nothing yet.

        Args:
            settings: What trains where.
            workbench: Data and backbones that were read before.
            beat: Called often while a trial trains.
        """
        self._beat = beat
        self._folder = Folder(settings.trials_folder)
        self._ledger = Ledger(self._folder)
        self._store = settings.store
        self._may_promote = settings.may_promote
        self._device = torch.device("cuda" if settings.is_on_gpu else "cpu")
        self._workbench = workbench or Workbench()
        self._unit: Unit | None = None
        self._answers: _Answers | None = None
        self._results: dict[int, TrialResult] = {}
        self._forwards_of_taps = 0

    def start(self, unit: Unit) -> EpochEnd | UnitEnd:
        """Begins a unit, or continues it from its checkpoint, up to the end of an epoch."""
        self._unit, self._results = unit, {}
        train = self._train_one if len(unit.trials) == 1 else self._train_fused
        self._answers = train(unit)
        return self._advance(None)

    def go_on(self, keep: Sequence[int]) -> EpochEnd | UnitEnd:
        """Trains another epoch of the trials whose index is in `keep`; the others are over, with what they have."""
        return self._advance(keep)

    def make_taps(
        self, trial: Trial, specs: Sequence[TapSpec], shards: Mapping[int, Sequence[int]], start: TapSpec | None
    ) -> PassResult:
        """Makes some shards of the taps that `trial` and its like read; the arguments are those of `make_shards`."""
        task = self._workbench.task(trial.config)
        return make_shards(task, self._store, specs, shards, device=self._device, start=start)

    def _advance(self, keep: Sequence[int] | None) -> EpochEnd | UnitEnd:
        assert self._unit is not None
        assert self._answers is not None
        try:
            rows = next(self._answers) if keep is None else self._answers.send(keep)
        except StopIteration:
            return UnitEnd(self._unit, tuple(self._results.values()))
        except (TrainingError, OutOfMemoryError, ConfigError, DataError) as error:
            # It would meet the same again. All else is raised: another process, or half of the unit, may do better.
            if isinstance(error, OutOfMemoryError) and len(self._unit.trials) > 1:
                raise
            for trial in self._unit.trials:
                if trial.index not in self._results:
                    self._record(trial, _failed(trial, error))
            return UnitEnd(self._unit, tuple(self._results.values()))
        return EpochEnd(self._unit, rows)

    def _train_one(self, unit: Unit) -> _Answers:
        (trial,) = unit.trials
        began = time.perf_counter()
        # After an interrupt, a search that learns may give the same number to another trial.
        checkpoints = self._folder / trial.name / f"checkpoints-{_digest(trial.params)}"
        with ExitStack() as stack:
            task = self._task(trial, self._tap(unit, stack))
            count = stack.enter_context(counting_forwards(task.model.backbone, freeze_depth=task.freeze_depth))
            training = Training(task, LocalWorker(self._device), checkpoints, on_progress=lambda _: self._beat())
            status: Status = "done"
            for row in training.epochs():
                if trial.index not in (yield {trial.index: row}):
                    status = _status(len(training.position.history), task)
                    break
            if status == "stopped" and self._may_promote:
                training.save()
            trained = training.finish()
            save_trained(self._folder / trial.name, task.model, above=task.freeze_depth)
            self._record(trial, _result(trial, status, trained, time.perf_counter() - began, count))
        if status == "done" or not self._may_promote:
            checkpoints.remove_all()

    def _train_fused(self, unit: Unit) -> _Answers:
        began = time.perf_counter()
        by_index = {trial.index: trial for trial in unit.trials}
        names = {trial.index: _digest(trial.params) for trial in unit.trials}
        checkpoints = self._folder / f"{FUSED}{_digest({str(index): name for index, name in names.items()})}"
        with ExitStack() as stack:
            tap = self._tap(unit, stack)
            tasks = {index: self._task(trial, tap) for index, trial in by_index.items()}
            others = [self._folder / name for name in self._folder.names() if name.startswith(FUSED)]
            fused = FusedTraining(tasks, self._device, checkpoints, names=names, others=others)

            def end(indices: Sequence[int], status: Status) -> None:
                share_s = (time.perf_counter() - began) / len(by_index)
                for index, trained in fused.finish(indices).items():
                    folder = self._folder / by_index[index].name
                    save_trained(folder, tasks[index].model, above=tasks[index].freeze_depth)
                    self._record(by_index[index], _result(by_index[index], status, trained, share_s, ForwardCount()))

            def fail() -> None:
                for index, error in fused.failures.items():
                    if index not in self._results:
                        self._record(by_index[index], _failed(by_index[index], error))

            for rows in fused.epochs():
                keep = yield rows
                fail()
                is_last = next(iter(rows.values()))["epoch"] >= unit.trials[0].config.epochs
                end([index for index in fused.over if index in keep], "done")
                if not is_last:
                    end([index for index in fused.indices if index not in keep], "stopped")
            fail()
            end(fused.indices, "done")
        checkpoints.remove_all()

    def _tap(self, unit: Unit, stack: ExitStack) -> Tap | None:
        if unit.tap is None:
            return None
        try:
            tap = self._store.open(unit.tap)
        except TapMissingError:  # on a node that doesn't share the driver's disk, or after somebody removed it
            tap = self._made(unit.trials[0], unit.tap)
        return stack.enter_context(tap)

    def _made(self, trial: Trial, spec: TapSpec) -> Tap:
        """Makes what this node lacks of a tap; once, whichever process needs it first."""
        with self._store.making([spec]):
            missing = {shard: [0] for shard in self._store.missing_shards(spec)}
            if missing:
                task = self._workbench.task(trial.config)
                made = make_shards(task, self._store, [spec], missing, device=self._device)
                self._forwards_of_taps += made.num_forwards
            return self._store.open(spec)

    def _task(self, trial: Trial, tap: Tap | None) -> Task:
        task = self._workbench.task(trial.config)
        return task if tap is None else replace(task, tap=tap_inputs(task, tap))

    def _record(self, trial: Trial, result: TrialResult) -> None:
        made, self._forwards_of_taps = self._forwards_of_taps, 0
        before = self._ledger.find(trial.index) if self._may_promote else None
        if before is not None and before.params == trial.params and before.status == "stopped":
            result = replace(result, seconds=before.seconds + result.seconds)
            made += before.backbone_forwards
        result = replace(result, backbone_forwards=result.backbone_forwards + made)
        self._ledger.write(result)
        self._results[trial.index] = result


def _digest(params: Mapping[str, object]) -> str:
    return blake2b(json.dumps(params).encode(), digest_size=4).hexdigest()


def _status(num_epochs: int, task: Task) -> Status:
    """A trial that is told to stop after its last epoch is done all the same."""
    return "done" if num_epochs >= task.config.epochs else "stopped"


def _result(trial: Trial, status: Status, trained: Trained | Ended, seconds: float, count: ForwardCount) -> TrialResult:
    history: tuple[Row, ...] = trained.history
    return TrialResult(
        index=trial.index,
        params=trial.params,
        status=status,
        metrics=trained.metrics,
        history=tuple(dict(row) for row in history),
        epochs=len(history),
        seconds=round(seconds, 4),
        backbone_forwards=count.num_images,
        details={**trial.facts, "best_epoch": trained.epoch},
    )


def _failed(trial: Trial, error: BaseException) -> TrialResult:
    return TrialResult(
        index=trial.index, params=trial.params, details=trial.facts, status="failed", error=reason(error)
    )
