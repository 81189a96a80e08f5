"""Whole sweeps that learn from their trials (optuna) or stop the worse ones (asha), in this process."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from graftstack.cluster.sweep import launch_sweep
from graftstack.config.compose import compose_job
from graftstack.runs import Run, find_run
from graftstack.sweep.drive import Progress

SMALL = (
    *("data=digits", "data.image_size=8", "data.classes=[0,1,2,3]", "backbone=conv4", "batch_size=32"),
    *("cluster=inline", "cluster.cpus_per_worker=1"),
)
OPTUNA = ("search=optuna", "num_samples=6", "epochs=2", "space.lr=loguniform(1e-4,1e-1)")


class Quiet:
    """Shows nothing, but remembers the plan and which trials trained together."""

    def __init__(self) -> None:
        self.units: set[tuple[int, ...]] = set()

    def reading(self, done: int, total: int) -> None:
        pass

    def training(self, progress: dict[str, Any]) -> None:
        pass

    def planned(self, plan: Any) -> None:
        pass

    def probed(self, scores: Sequence[Any]) -> None:
        pass

    def tapping(self, done: int, total: int) -> None:
        pass

    def trials(self, progress: Progress, total: int) -> None:
        self.units |= {tuple(trial.index for trial in unit.trials) for unit in progress.running}
        if progress.event is not None:
            self.units.add(tuple(trial.index for trial in progress.event.unit.trials))

    def say(self, text: str) -> None:
        pass


class Interrupting(Quiet):
    """Interrupts the sweep as soon as `num_over` trials are over."""

    def __init__(self, num_over: int) -> None:
        super().__init__()
        self.num_over = num_over

    def trials(self, progress: Progress, total: int) -> None:
        super().trials(progress, total)
        if len(progress.results) >= self.num_over:
            raise KeyboardInterrupt


def sweep(tmp_path: Path, *overrides: str, display: Quiet | None = None) -> Run:
    everything = [*SMALL, f"runs_dir={tmp_path}", *overrides]
    return launch_sweep(compose_job("sweep", everything), overrides=everything, display=display or Quiet())


def rows_of(run: Run) -> list[dict[str, Any]]:
    """The trials, without their times."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.manifest.results["trials"]]


def times_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}


def test_a_sweep_by_optuna_that_is_interrupted_continues_as_the_unbroken_one(tmp_path: Path) -> None:
    space = (*OPTUNA, "space.freeze_depth=[2,all]")
    unbroken = sweep(tmp_path, *space, "name=unbroken")
    assert [row["trial"] for row in rows_of(unbroken)] == list(range(6))
    assert len({json.dumps(row["lr"]) for row in rows_of(unbroken)}) == 6
    with pytest.raises(KeyboardInterrupt, match="graftstack sweep name=broken resume=true"):
        sweep(tmp_path, *space, "name=broken", display=Interrupting(3))
    assert find_run("broken", str(tmp_path)).manifest.status == "interrupted"
    before = times_of(tmp_path / "broken")
    assert len(before) == 3
    broken = sweep(tmp_path, *space, "name=broken", "resume=true")
    assert before.items() <= times_of(tmp_path / "broken").items(), "a finished trial ran again"
    assert rows_of(broken) == rows_of(unbroken)
    assert broken.manifest.details == unbroken.manifest.details


@pytest.mark.parametrize(("most_open", "together"), [(None, 1), (3, 3), (6, 6)])
def test_heads_that_optuna_suggests_at_a_time_train_together(
    tmp_path: Path, most_open: int | None, together: int
) -> None:
    display = Quiet()
    limit = () if most_open is None else (f"max_concurrent_trials={most_open}",)
    run = sweep(tmp_path, *OPTUNA, "freeze_depth=all", *limit, "name=heads", display=display)
    assert display.units == {tuple(range(first, first + together)) for first in range(0, 6, together)}
    assert [row["status"] for row in rows_of(run)] == ["done"] * 6


def test_the_heads_of_a_grid_are_one_unit_and_train_as_each_would_alone(tmp_path: Path) -> None:
    fused, alone = Quiet(), Quiet()
    space = ("freeze_depth=all", "epochs=2", "space.lr=[1e-4,1e-3,1e-2]", "space.weight_decay=[0,0.1]")
    one = sweep(tmp_path, *space, "name=fused", display=fused)
    other = sweep(tmp_path, *space, "reuse=off", "name=alone", display=alone)
    assert fused.units == {tuple(range(6))}
    assert alone.units == {(index,) for index in range(6)}
    for row, expected in zip(rows_of(one), rows_of(other), strict=True):
        assert row["metrics"] == pytest.approx(expected["metrics"], abs=1e-4), row


def test_asha_stops_the_worse_trials_early_and_keeps_the_best(tmp_path: Path) -> None:
    space = ("freeze_depth=4", "epochs=4", "space.lr=[1e-2,1e-4,1e-5,1e-6]", "asha.reduction_factor=2")
    full = sweep(tmp_path, *space, "name=full")
    run = sweep(tmp_path, *space, "scheduler=asha", "name=asha")
    epochs = [row["epochs"] for row in rows_of(run)]
    status = [row["status"] for row in rows_of(run)]
    assert sorted(epochs) == [1, 1, 2, 4]
    assert epochs[0] == 4
    assert status == ["done" if num == 4 else "stopped" for num in epochs]
    assert not list(tmp_path.rglob("checkpoints*")), "what promotions needed outlives the sweep"
    assert run.manifest.details["best_trial"] == full.manifest.details["best_trial"] == 0
    assert run.manifest.metrics == pytest.approx(full.manifest.metrics, abs=1e-4)


def test_a_sweep_with_asha_that_is_interrupted_stops_the_same_trials(tmp_path: Path) -> None:
    space = ("freeze_depth=4", "epochs=4", "space.lr=[1e-2,1e-3,1e-4,1e-5]", "scheduler=asha")
    unbroken = sweep(tmp_path, *space, "name=unbroken")
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, *space, "name=broken", display=Interrupting(2))
    broken = sweep(tmp_path, *space, "name=broken", "resume=true")
    assert rows_of(broken) == rows_of(unbroken)
    assert "stopped" in {row["status"] for row in rows_of(unbroken)}
