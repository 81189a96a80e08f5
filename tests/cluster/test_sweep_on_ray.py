"""Sweeps in processes of a Ray cluster: lost processes, trials of several workers, lost and interrupted drivers."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.cluster.heads import wait_until

from graftstack.cluster.sweep import launch_sweep
from graftstack.cluster.train import train_in_group
from graftstack.config.compose import compose_job
from graftstack.finetune.predict import data_of_run, evaluate
from graftstack.finetune.tapping import tap_spec
from graftstack.finetune.task import prepare
from graftstack.runs import Run, find_run
from graftstack.storage import Folder
from graftstack.sweep.drive import Progress
from graftstack.sweep.trials import EpochEnd
from graftstack.taps.store import TapStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SMALL = (
    *("data=digits", "data.image_size=16", "backbone=conv4", "epochs=3", "batch_size=32"),
    "cluster.cpus_per_worker=1",  # as many threads everywhere: then sums are the same to the last bit
)
SPACE = ("space.freeze_depth=[0,2,all]", "space.lr=[1e-3,3e-3,1e-2]")
NUM_TRIALS = 9
PROCESSES = ("cluster=local", "max_concurrent_trials=2")


class Silent:
    """A display that shows nothing."""

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
        pass

    def say(self, text: str) -> None:
        pass


class Killer(Silent):
    """Kills a process of the pool while taps are made, and one while trials train after some are over."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.makers: set[int] = set()
        self.killed: list[int] = []
        self.rows_at_kill: dict[str, int] = {}

    def tapping(self, done: int, total: int) -> None:
        self.makers |= {process.pid for process in busy_processes()}
        if done and not self.killed:
            self._kill()

    def trials(self, progress: Progress, total: int) -> None:
        if progress.results and isinstance(progress.event, EpochEnd) and not self.rows_at_kill:
            self.rows_at_kill = rows_of(self.run)
            self._kill()

    def _kill(self) -> None:
        # Both may be between two calls just now; one that is killed there is missed by its next call.
        victim = (busy_processes() or processes("ray::_Process"))[0]
        victim.send_signal(signal.SIGKILL)
        self.killed.append(victim.pid)


def sweep(tmp_path: Path, *overrides: str, display: Silent | None = None) -> Run:
    everything = [*SMALL, f"runs_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache", *overrides]
    config = compose_job("sweep", everything)
    return launch_sweep(config, overrides=everything, display=display or Silent())  # type: ignore[arg-type]


def busy_processes() -> list[psutil.Process]:
    """The processes of a pool that do something right now."""
    return processes("ray::_Process.call")


def processes(title: str) -> list[psutil.Process]:
    """The processes below this one that Ray gave a title."""
    found = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if process.cmdline()[:1] == [title]:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def rows_of(run: Path) -> dict[str, int]:
    """When the row of each finished trial was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in (run / "trials").glob("*.json")}


def trials_of(run: Run) -> list[dict[str, Any]]:
    """All that isn't a time."""
    rows = run.manifest.results["trials"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def histories_of(folder: Path) -> list[Any]:
    return [json.loads(path.read_text())["history"] for path in sorted((folder / "trials").glob("*.json"))]


def model_of(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def assert_cluster_is_clean() -> None:
    import ray
    from ray.util import placement_group_table
    from ray.util.state import list_actors

    def left_behind() -> list[str]:
        # Without the address, another Ray that happens to run on this machine may answer.
        alive = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "!=", "DEAD")])
        # The coordinator is Ray's own: one for each cluster, made by its first trainer.
        return [actor.class_name for actor in alive if actor.class_name != "_AutoscalingCoordinatorActor"]

    wait_until(lambda: left_behind() == [], timeout_s=60)
    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The sweep that no other may differ from, in this process."""
    return sweep(tmp_path_factory.mktemp("unbroken"), *SPACE, "cluster=inline", "name=unbroken")


@pytest.mark.usefixtures("embedded_ray")
def test_a_sweep_in_processes_of_which_two_are_killed_is_the_one_in_this_process(unbroken: Run, tmp_path: Path) -> None:
    killer = Killer(tmp_path / "broken")
    broken = sweep(tmp_path, *SPACE, *PROCESSES, "name=broken", display=killer)
    assert len(killer.makers) >= 2, "the pool's processes didn't make the taps side by side"
    assert len(killer.killed) == 2
    assert 0 < len(killer.rows_at_kill) < NUM_TRIALS
    assert killer.rows_at_kill.items() <= rows_of(tmp_path / "broken").items(), "a finished trial ran again"
    assert trials_of(broken) == trials_of(unbroken)
    assert histories_of(tmp_path / "broken") == histories_of(Path(unbroken.folder.location))
    assert model_of(tmp_path / "broken") == model_of(Path(unbroken.folder.location))
    reuse = broken.manifest.results["reuse"]
    assert reuse["backbone_forwards"] == reuse["unique_samples"], "a shard that was lost counts once"
    assert_cluster_is_clean()


@pytest.mark.usefixtures("embedded_ray")
def test_trials_of_two_workers_each_take_turns_and_end_as_those_of_one(unbroken: Run, tmp_path: Path) -> None:
    space = ("space.freeze_depth=[2,all]", "optimizer.lr=1e-2")
    two = sweep(tmp_path, *space, "cluster=local", "cluster.num_workers=2", "name=two")
    assert two.manifest.status == "done"
    partly, head_only = two.manifest.results["trials"]
    assert (partly["freeze_depth"], head_only["freeze_depth"]) == (2, "all")
    assert partly["status"] == head_only["status"] == "done"
    assert partly["metrics"]["accuracy"] > 0.9
    # Behind frozen BatchNorm any number of workers takes the same steps, up to rounding.
    (alone,) = [row for row in trials_of(unbroken) if (row["freeze_depth"], row["lr"]) == ("all", 1e-2)]
    assert head_only["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-3)
    assert head_only["metrics"]["accuracy"] == pytest.approx(alone["metrics"]["accuracy"], abs=0.006)
    reuse = two.manifest.results["reuse"]
    assert reuse["backbone_forwards"] == reuse["unique_samples"], "the groups didn't read the taps"
    assert not list(tmp_path.glob("two/trials/*/.ray")), "Ray's own records outlive the trial"
    assert not list(tmp_path.glob("two/trials/*/checkpoints"))
    found = evaluate(two, data_of_run(two), part="val", progress=lambda done, total: None)
    assert found["accuracy"] == pytest.approx(two.manifest.metrics["accuracy"])
    assert_cluster_is_clean()


@pytest.mark.usefixtures("embedded_ray")
def test_a_group_that_doesnt_reach_its_tap_begins_with_the_images(tmp_path: Path) -> None:
    of_two = ("cluster=local", "cluster.num_workers=2", "freeze_depth=all", "optimizer.head_lr_multiplier=1")
    config = compose_job("finetune", [*SMALL, *of_two, "epochs=1", f"data.cache_dir={tmp_path}/cache"])
    task = prepare(config)
    elsewhere = TapStore(f"{tmp_path}/elsewhere", budget_bytes=2**30)
    tap = (elsewhere, tap_spec(task, task.boundary, dtype="fp32"))
    outcome = train_in_group(config, Folder(tmp_path / "run"), num_cpus=1, poll=lambda: None, verbose=False, tap=tap)
    assert outcome.history
    assert outcome.backbone_forwards == task.steps_per_epoch * config.batch_size + len(task.data.splits.val)


def test_a_killed_driver_and_an_interrupted_one_leave_a_sweep_that_continues(
    unbroken: Run, tmp_path: Path, start_driver: Callable[..., subprocess.Popen[bytes]]
) -> None:
    run = tmp_path / "sweep"
    places = (f"runs_dir={tmp_path}", "name=sweep")
    begin = (*SMALL, *SPACE, *PROCESSES, *places, f"data.cache_dir={tmp_path}/cache")

    killed = start_driver("sweep", *begin)
    wait_until(lambda: len(rows_of(run)) > 0)
    orphans = family_of(killed)
    killed.kill()
    assert killed.wait(60) == -signal.SIGKILL
    assert any("ray::_Process" in name for name in orphans.values()), "it was in one process"
    wait_until(lambda: all_gone({process: name for process, name in orphans.items() if "Agent" not in name}))
    assert find_run("sweep", str(tmp_path)).manifest.status == "interrupted"
    rows = rows_of(run)

    interrupted = start_driver("sweep", *places, "resume=true")
    wait_until(lambda: len(rows_of(run)) > len(rows))
    family = family_of(interrupted)
    interrupted.send_signal(signal.SIGINT)
    _, complaint = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, complaint.decode()
    way_back = f"graftstack: interrupted; continue with: graftstack sweep name=sweep resume=true runs_dir={tmp_path}"
    assert complaint.decode().splitlines()[-1] == way_back
    wait_until(lambda: all_gone(family), timeout_s=60)
    assert find_run("sweep", str(tmp_path)).manifest.status == "interrupted"
    assert rows.items() <= rows_of(run).items(), "a finished trial ran again"
    rows = rows_of(run)
    assert len(rows) < NUM_TRIALS, "it was over already"

    resumed = start_driver("sweep", *places, "resume=true")
    _, complaint = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, complaint.decode()
    assert rows.items() <= rows_of(run).items(), "a finished trial ran again"
    assert trials_of(find_run("sweep", str(tmp_path))) == trials_of(unbroken)
    assert histories_of(run) == histories_of(Path(unbroken.folder.location))
    assert model_of(run) == model_of(Path(unbroken.folder.location))
    assert not list(run.rglob(".*")), "a killed writer's leftovers outlive the run"
    assert not list(run.glob("trials/*/checkpoints*"))
    wait_until(lambda: all_gone(orphans))  # Ray's agents look for their cluster for a minute


def family_of(process: subprocess.Popen[bytes]) -> dict[psutil.Process, str]:
    """All that a process has started, by its command."""
    names = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            names[child] = " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue
    return names


def all_gone(family: dict[psutil.Process, str]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
