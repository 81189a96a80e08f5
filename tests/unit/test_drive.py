"""The loop of a sweep, its ledger, and the pool in this process; a runner that counts instead of training."""

import json
import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftstack.config.schema import FinetuneConfig
from graftstack.errors import StorageFullError
from graftstack.storage import Folder
from graftstack.sweep.drive import KeepAll, Progress, drive
from graftstack.sweep.inline_pool import InlinePool
from graftstack.sweep.ledger import Ledger
from graftstack.sweep.trials import EpochEnd, Row, Trial, TrialResult, Unit, UnitEnd

NUM_EPOCHS = 3


class Counting:
    """A runner whose trials reach the accuracy `params["value"]` times epochs, and fail as their params say.

    `raises`: so many times in epoch 2; `interrupts`, `fills`: in epoch 2; `epoch_s`: how long an epoch takes.
    Rows are written as a real runner's are, those of a fused unit as soon as each trial is over.
    """

    def __init__(self, ledger: Ledger, *, writes: bool = True) -> None:
        self.started: list[str] = []
        self.num_raised: Counter[int] = Counter()
        self._ledger = ledger
        self._writes = writes

    def start(self, unit: Unit) -> EpochEnd | UnitEnd:
        self.started.append(unit.name)
        self._unit, self._epoch = unit, 0
        self._active = list(unit.trials)
        self._results: list[TrialResult] = []
        return self._train()

    def go_on(self, keep: Sequence[int]) -> EpochEnd | UnitEnd:
        self._end([trial for trial in self._active if trial.index not in keep], "stopped")
        self._active = [trial for trial in self._active if trial.index in keep]
        return self._train() if self._active else UnitEnd(self._unit, tuple(self._results))

    def _train(self) -> EpochEnd | UnitEnd:
        self._epoch += 1
        for trial in self._active:
            self._fail(trial)
            time.sleep(trial.params.get("epoch_s", 0))
        early = [trial for trial in self._active if self._epoch >= trial.params.get("epochs", NUM_EPOCHS)]
        self._end(early, "done")
        self._active = [trial for trial in self._active if trial not in early]
        if not self._active:
            return UnitEnd(self._unit, tuple(self._results))
        return EpochEnd(self._unit, {trial.index: self._row(trial, self._epoch) for trial in self._active})

    def _fail(self, trial: Trial) -> None:
        if self._epoch != 2:
            return
        if self.num_raised[trial.index] < trial.params.get("raises", 0):
            self.num_raised[trial.index] += 1
            raise ValueError(f"fault {self.num_raised[trial.index]}\nand more of it")
        if trial.params.get("interrupts"):
            raise KeyboardInterrupt
        if trial.params.get("fills"):
            raise StorageFullError("no space left")

    def _row(self, trial: Trial, epoch: int) -> dict[str, float]:
        return {"epoch": epoch, "accuracy": trial.params["value"] * epoch}

    def _end(self, trials: list[Trial], status: Any) -> None:
        for trial in trials:
            history = tuple(self._row(trial, epoch) for epoch in range(1, self._epoch + 1))
            result = TrialResult(
                index=trial.index,
                params=trial.params,
                status=status,
                metrics={"accuracy": history[-1]["accuracy"]},
                history=history,
                epochs=self._epoch,
            )
            self._results.append(result)
            if self._writes:
                self._ledger.write(result)


class Listed:
    """A search that gives everything at once."""

    def __init__(self, *params: dict[str, Any]) -> None:
        self._trials = [Trial(index, {"value": 0.1, **each}, FinetuneConfig()) for index, each in enumerate(params)]
        self._next = 0
        self.told: list[int] = []

    @property
    def is_exhausted(self) -> bool:
        return self._next == len(self._trials)

    def next(self) -> Trial | None:
        self._next += 1
        return self._trials[self._next - 1] if self._next <= len(self._trials) else None

    def tell(self, result: TrialResult) -> None:
        self.told.append(result.index)


class Learning(Listed):
    """A search that gives a trial only when it knows how all before it ended."""

    def next(self) -> Trial | None:
        return super().next() if self._next == len(self.told) else None


class KeepBest:
    """A scheduler that lets the best trial of a unit go on, and remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[dict[int, float]] = []

    def keep(self, rows: Mapping[int, Row], *, is_fused: bool) -> list[int]:
        self.shown.append({index: row["epoch"] for index, row in rows.items()})
        return [max(rows, key=lambda index: rows[index]["accuracy"])]

    def promote(self, stopped: Collection[int], *, is_last_chance: bool) -> int | None:
        return None


class Sweep:
    """All that `drive` takes, to be changed by a test before it runs."""

    def __init__(self, tmp_path: Path, search: Listed, **changes: Any) -> None:
        self.ledger = Ledger(Folder(tmp_path / "trials"))
        self.runner = Counting(self.ledger, writes=changes.pop("writes", True))
        self.search = search
        self.scheduler = changes.pop("scheduler", KeepAll())
        self.heard: list[Progress] = []
        self.settings = {"finished": {}, "time_limit_s": None, "max_losses": 1, "make_units": one_each, **changes}
        self.settings["trial_of"] = lambda row: Trial(row.index, row.params, FinetuneConfig())

    def run(self) -> list[TrialResult]:
        pool = InlinePool(self.runner)
        return drive(self.search, pool, self.scheduler, self.ledger, tell=self.heard.append, **self.settings)


def one_each(trials: list[Trial]) -> list[Unit]:
    return [Unit((trial,), None) for trial in trials]


def fused(trials: list[Trial]) -> list[Unit]:
    return [Unit(tuple(trials), None)]


def finished(index: int, value: float = 0.1) -> TrialResult:
    history = tuple({"epoch": epoch, "accuracy": value * epoch} for epoch in range(1, NUM_EPOCHS + 1))
    return TrialResult(index=index, params={"value": value}, status="done", history=history, epochs=NUM_EPOCHS)


def statuses(results: list[TrialResult]) -> dict[int, str]:
    return {result.index: result.status for result in results}


def test_every_trial_runs_once_and_its_row_is_on_disk(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Listed({}, {}, {}))
    results = sweep.run()
    assert statuses(results) == {0: "done", 1: "done", 2: "done"}
    assert sweep.runner.started == ["00000", "00001", "00002"]
    assert sweep.search.told == [0, 1, 2]
    assert list(sweep.ledger.read().values()) == results


def test_an_empty_search_ends_at_once(tmp_path: Path) -> None:
    assert Sweep(tmp_path, Listed()).run() == []


def test_rows_that_the_runner_did_not_write_are_written(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Listed({}, {}), writes=False)
    results = sweep.run()
    assert list(sweep.ledger.read().values()) == results


def test_finished_trials_are_told_and_do_not_run_again(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Listed({}, {}, {}), finished={2: finished(2), 0: finished(0)})
    results = sweep.run()
    assert sweep.runner.started == ["00001"]
    assert sweep.search.told == [0, 2, 1]
    assert statuses(results) == {0: "done", 1: "done", 2: "done"}


def test_the_scheduler_is_shown_the_epochs_of_finished_trials_before_any_other(tmp_path: Path) -> None:
    scheduler = KeepBest()
    Sweep(tmp_path, Listed({}, {}, {}), finished={0: finished(0), 1: finished(1)}, scheduler=scheduler).run()
    of_earlier_start = [{0: epoch, 1: epoch} for epoch in (1, 2, 3)]
    assert scheduler.shown == [*of_earlier_start, {2: 1}, {2: 2}]


def test_a_search_that_learns_gives_each_trial_after_the_last_has_ended(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Learning({}, {}, {}))
    sweep.run()
    assert sweep.search.told == [0, 1, 2]
    assert all(len(progress.running) + len(progress.waiting) <= 1 for progress in sweep.heard)


def test_the_scheduler_stops_trials_of_a_fused_unit(tmp_path: Path) -> None:
    search = Listed({"value": 0.1}, {"value": 0.3}, {"value": 0.2})
    results = Sweep(tmp_path, search, scheduler=KeepBest(), make_units=fused).run()
    assert statuses(results) == {0: "stopped", 1: "done", 2: "stopped"}
    assert [result.epochs for result in results] == [1, NUM_EPOCHS, 1]


def test_a_lost_unit_starts_again_before_others_do(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Listed({"raises": 1}, {}))
    assert statuses(sweep.run()) == {0: "done", 1: "done"}
    assert sweep.runner.started == ["00000", "00000", "00001"]


def test_a_trial_that_is_lost_too_often_fails_with_the_reason_and_the_others_go_on(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Listed({"raises": 9}, {}), max_losses=2)
    failed, other = sweep.run()
    assert sweep.runner.started == ["00000"] * 3 + ["00001"]
    assert (failed.status, failed.error) == ("failed", "lost 3 times; at last: fault 3")
    assert other.status == "done"
    assert sweep.search.told == [0, 1]
    assert sweep.ledger.find(0) == failed


def test_what_a_lost_unit_had_finished_is_not_done_again(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Listed({"epochs": 1}, {"raises": 1}), make_units=fused)
    results = sweep.run()
    assert sweep.runner.started == ["00000-00001", "00001"]
    assert statuses(results) == {0: "done", 1: "done"}


def test_a_row_that_is_to_be_made_again_counts_for_nothing(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Listed({"raises": 1}), writes=False)
    sweep.ledger.write(replace(finished(0), status="failed", error="by an earlier start"))
    (result,) = sweep.run()
    assert sweep.runner.started == ["00000", "00000"]
    assert result.status == "done"
    assert sweep.ledger.find(0) == result


def test_at_the_time_limit_nothing_starts_and_what_runs_ends_with_its_epoch(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Listed({"epoch_s": 0.2}, {}, {}), time_limit_s=0.1)
    results = sweep.run()
    assert [(result.index, result.status, result.epochs) for result in results] == [(0, "stopped", 1)]
    assert list(sweep.ledger.read()) == [0]


def test_a_unit_lost_after_the_time_limit_has_no_row(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Listed({"epoch_s": 0.2, "epochs": 2}, {"raises": 1}), time_limit_s=0.3, make_units=fused)
    assert sweep.run() == []
    assert sweep.ledger.read() == {}


@pytest.mark.parametrize(("fault", "error"), [("interrupts", KeyboardInterrupt), ("fills", StorageFullError)])
def test_interrupts_and_a_full_disk_end_the_sweep_with_what_is_over_on_disk(
    tmp_path: Path, fault: str, error: type[BaseException]
) -> None:
    sweep = Sweep(tmp_path, Listed({}, {fault: True}, {}))
    with pytest.raises(error):
        sweep.run()
    assert list(sweep.ledger.read()) == [0]


def test_it_tells_of_each_event_and_of_what_is_left(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Listed({}, {}), make_units=one_each)
    sweep.run()
    kinds = [type(progress.event).__name__ for progress in sweep.heard]
    assert kinds == ["EpochEnd", "EpochEnd", "UnitEnd"] * 2
    assert [len(progress.waiting) for progress in sweep.heard] == [1, 1, 1, 0, 0, 0]
    assert [len(progress.running) for progress in sweep.heard] == [1, 1, 0, 1, 1, 0]


def test_a_row_reads_as_it_was_written(tmp_path: Path) -> None:
    ledger = Ledger(Folder(tmp_path / "trials"))
    rows = [
        finished(3),
        replace(finished(100_000), params={"freeze_depth": "all", "lr": 1e-3, "weights": None}, details={"a": [1]}),
        TrialResult(index=0, params={}, status="failed", error="why"),
    ]
    for row in rows:
        ledger.write(row)
    assert ledger.read() == {row.index: row for row in rows}
    assert list(ledger.read()) == [0, 3, 100_000]
    assert ledger.find(3) == rows[0]
    assert ledger.find(4) is None


def test_a_remote_ledger_reads_as_a_local_one() -> None:
    ledger = Ledger(Folder("memory://sweep-ledger/trials"))
    rows = {index: finished(index) for index in range(40)}
    for row in rows.values():
        ledger.write(row)
    assert ledger.read() == rows
    assert ledger.find(41) is None


DAMAGE = {
    "cut": lambda data: data[:20],
    "not UTF-8": lambda data: b"\xff" + data,
    "no row": lambda data: b"[]",
    "a row of another trial": lambda data: data.replace(b'"index": 1', b'"index": 2'),
    "an unknown status": lambda data: data.replace(b'"done"', b'"over"'),
    "an unknown key": lambda data: data.replace(b"{", b'{"colour": 1, ', 1),
    "a missing key": lambda data: json.dumps({"index": 1}).encode(),
    "a history of numbers": lambda data: json.dumps({**json.loads(data), "history": [1, 2]}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_is_named_and_its_trial_counts_as_unfinished(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(Folder(tmp_path))
    for index in range(3):
        ledger.write(finished(index))
    path = tmp_path / "00001.json"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert list(ledger.read()) == [0, 2]
    assert str(path) in caplog.text


def test_what_else_lies_among_the_rows_is_left_alone(tmp_path: Path) -> None:
    ledger = Ledger(Folder(tmp_path))
    ledger.write(finished(0))
    (tmp_path / "00000").mkdir()
    (tmp_path / "notes.json").write_text("{}")
    assert list(ledger.read()) == [0]
