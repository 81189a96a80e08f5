"""Stacks in processes of a Ray cluster: lost processes, threads, pipelines, lost and interrupted drivers."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import sklearn.linear_model  # noqa: F401 - brings BLAS and OpenMP, which are limited where they are loaded
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.datasets import make_classification
from tests.cluster.heads import wait_until
from threadpoolctl import threadpool_info

from graftstack.cluster.executor import RayExecutor
from graftstack.cluster.pipeline import PipelineDisplays, launch_pipeline
from graftstack.cluster.stack import launch_stack
from graftstack.config.compose import compose_job
from graftstack.runs import Run, find_run
from graftstack.stacking.crossfit import cross_fit
from graftstack.stacking.folds import make_folds
from graftstack.stacking.work import BaseModel

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

BASES = (
    "base_models=[{GradientBoostingClassifier:{n_estimators:50}},"
    "{RandomForestClassifier:{n_estimators:30,n_jobs:2}},LogisticRegression]"
)
STACK = (BASES, "folds.num=4", "levels=[[SVC]]", "passthrough=true")
NUM_TASKS = 4 * 5

# What a process is called while it works on a task.
BUSY = "ray::_perform"


class Silent:
    """A display that shows nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class Killer(threading.Thread):
    """Kills one process that works on a task, after some tasks are done."""

    def __init__(self, run: Path, *, after: int) -> None:
        super().__init__(daemon=True)
        self.run_folder = run
        self.after = after
        self.over = threading.Event()
        self.killed: int | None = None
        self.known: dict[str, int] = {}

    def __enter__(self) -> "Killer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join(10)

    def run(self) -> None:
        while self.killed is None and not self.over.wait(0.01):
            if len(known := entries_of(self.run_folder)) >= self.after:
                self.known = known
                self.killed = kill_busy(psutil.Process(os.getpid()))


class Threads(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Predicts how many threads the libraries had when it was fitted, and in which process that was."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def fit(self, rows: Any, targets: Any) -> "Threads":
        np.linalg.svd(np.eye(3))
        self.threads_ = max(library["num_threads"] for library in threadpool_info())
        self.process_ = os.getpid()
        return self

    def predict(self, rows: Any) -> Any:
        return np.full(len(rows), float(self.threads_))


@pytest.fixture(scope="module", autouse=True)
def _module_travels() -> Iterator[None]:
    """Workers of Ray can't import this file."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers, some of them missing, and a category that says something."""
    features, labels = make_classification(900, 12, n_informative=8, n_classes=3, random_state=0)
    frame = pd.DataFrame(features.astype(np.float32), columns=[f"number{i}" for i in range(12)])
    frame.loc[::7, "number0"] = np.nan
    frame["category"] = np.array(["low", "middle", "high"])[np.digitize(features[:, 1], [-1, 1])]
    frame["label"] = np.array(["ant", "bee", "cat"])[labels]
    path = tmp_path_factory.mktemp("table") / "table.parquet"
    frame.to_parquet(path)
    return path


@pytest.fixture(scope="module")
def unbroken(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the stack that no other may differ from, in this process."""
    path = tmp_path_factory.mktemp("unbroken")
    run = stack(table, path, "cluster=inline", "name=unbroken")
    assert run.manifest.details["num_tasks_run"] == NUM_TASKS
    return path / "unbroken"


def stack(table: Path, runs_dir: Path, *overrides: str) -> Run:
    everything = [*of_table(table), *STACK, f"runs_dir={runs_dir}", *overrides]
    config = compose_job("stack", everything)
    return launch_stack(config, overrides=everything, display=Silent())  # type: ignore[arg-type]


def of_table(table: Path) -> tuple[str, ...]:
    return ("data=parquet", f"data.path={table}", "data.label=label")


def kill_busy(parent: psutil.Process) -> int | None:
    """Kills a process below `parent` that is in the middle of a task; returns its id, or None where there is none."""
    for process in parent.children(recursive=True):
        try:
            if title(process) != BUSY:
                continue
            process.suspend()  # so that it stays what it is looked at for
            if title(process) == BUSY:
                process.kill()
                return int(process.pid)
            process.resume()
        except psutil.NoSuchProcess:
            continue
    return None


def title(process: psutil.Process) -> str:
    return "".join(process.cmdline()[:1])


def is_busy(parent: psutil.Process) -> bool:
    """Whether any process below `parent` works on a task."""
    for child in parent.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title(child) == BUSY:
                return True
    return False


def entries_of(run: Path) -> dict[str, int]:
    """When each entry of the ledger was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in (run / "ledger").glob("*.json")}


def digest_of(run: Path) -> str:
    return hashlib.sha256((run / "oof.parquet").read_bytes()).hexdigest()


def results_of(run: Path) -> dict[str, Any]:
    """All that isn't a time."""
    manifest = find_run(str(run), "").manifest
    rows = [*manifest.results["base_models"], manifest.results["stack"]]
    return {
        "metrics": manifest.metrics,
        "rows": [{key: value for key, value in row.items() if key not in ("fit_s", "predict_s")} for row in rows],
    }


def assert_same(run: Path, expected: Path) -> None:
    """Asserts that two runs have found the same, to the last bit, and keep the same files."""
    found, wanted = (pq.read_table(folder / "oof.parquet") for folder in (run, expected))
    assert found.column_names == wanted.column_names
    for name in wanted.column_names:
        assert found[name].equals(wanted[name]), name
    assert digest_of(run) == digest_of(expected)
    assert results_of(run) == results_of(expected)
    assert entries_of(run).keys() == entries_of(expected).keys()
    assert not list(run.rglob(".*")), "a killed writer's leftovers outlive the run"


def assert_cluster_is_clean() -> None:
    """Asserts that nothing runs, and that what was shared isn't held any more."""
    import ray
    from ray.util.state import list_actors, list_objects

    address = ray.get_runtime_context().gcs_address

    def left_behind() -> list[str]:
        # Without the address, another Ray that happens to run on this machine may answer.
        objects = [entry.object_id for entry in list_objects(address)]
        actors = [actor.class_name for actor in list_actors(address, filters=[("state", "!=", "DEAD")])]
        return objects + actors

    wait_until(lambda: not is_busy(psutil.Process(os.getpid())), timeout_s=20)
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], timeout_s=20)
    deadline = time.monotonic() + 20
    while left := left_behind():
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


@pytest.mark.usefixtures("embedded_ray")
def test_a_stack_on_ray_is_the_one_in_this_process_to_the_last_bit(table: Path, unbroken: Path, tmp_path: Path) -> None:
    stack(table, tmp_path, "name=whole")
    assert_same(tmp_path / "whole", unbroken)
    assert_cluster_is_clean()


@pytest.mark.usefixtures("embedded_ray")
def test_a_process_that_is_killed_amid_a_task_changes_nothing(
    table: Path, unbroken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "broken"
    with Killer(run, after=3) as killer:
        broken = stack(table, tmp_path, "name=broken")
    assert killer.killed is not None, "nobody was killed"
    assert killer.known.items() <= entries_of(run).items(), "a finished task ran again"
    redone = [record for record in caplog.messages if "its process or node is gone" in record]
    # None, if it had just stored its result.
    assert len(redone) + broken.manifest.details["num_tasks_known"] == 1
    assert broken.manifest.details["num_tasks_run"] + broken.manifest.details["num_tasks_known"] == NUM_TASKS
    assert_same(run, unbroken)
    assert_cluster_is_clean()


@pytest.mark.usefixtures("embedded_ray")
def test_tasks_have_their_threads_in_the_processes_of_ray() -> None:
    rows, y = np.zeros((40, 2)), np.linspace(0, 1, 40)
    folds = make_folds("kfold", 4, y=y, seed=0, is_classification=False)
    bases = [
        BaseModel(name=f"threads{num}", estimator=Threads(num), method="predict", num_threads=num) for num in (1, 2)
    ]
    executor = RayExecutor(2)
    try:
        crossed = cross_fit([bases], {"X": rows}, y, folds, executor=executor, mode="bag")
    finally:
        executor.close()
    for num, fitted in zip((1, 2), crossed.levels[0], strict=True):
        assert {float(value) for fold in fitted.folds for value in fold.predictions} == {num}
        assert os.getpid() not in {fold.model.process_ for fold in fitted.folds}
    assert_cluster_is_clean()


@pytest.mark.usefixtures("embedded_ray")
def test_a_pipeline_runs_on_ray(tmp_path: Path) -> None:
    overrides = [
        *("data=digits", "data.image_size=16", "data.num_train_per_class=15", "backbone=conv4", "epochs=1"),
        *("space.freeze_depth=[all]", "space.lr=[1e-3,1e-2]", "cluster.cpus_per_worker=1"),
        *("base_models=[LogisticRegression]", "top=1", "folds.num=2"),
        *("name=both", f"runs_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"),
    ]
    config: Any = compose_job("pipeline", overrides)
    displays: Any = PipelineDisplays(Silent(), Silent())
    run = launch_pipeline(config, overrides=overrides, displays=displays)
    assert run.manifest.status == "done"
    assert len(run.manifest.results["trials"]) == 2
    names = [row["name"] for row in run.manifest.results["base_models"]]
    assert len(names) == 2
    assert "LogisticRegression" in names
    assert pq.read_table(tmp_path / "both" / run.manifest.results["oof_path"]).num_rows > 0
    # The refit of the trial is the trial itself.
    assert run.manifest.details["num_tasks_run"] == 2 + 3
    assert not is_busy(psutil.Process(os.getpid()))


@pytest.mark.usefixtures("embedded_ray")
def test_a_killed_driver_and_an_interrupted_one_leave_a_stack_that_continues(
    table: Path, unbroken: Path, tmp_path: Path, start_driver: Callable[..., subprocess.Popen[bytes]]
) -> None:
    import ray

    this, run = psutil.Process(os.getpid()), tmp_path / "stack"
    # Drivers come and go; the cluster stays.
    cluster = ("cluster=ray", f"cluster.address={ray.get_runtime_context().gcs_address}")
    places = (f"runs_dir={tmp_path}", "name=stack")

    killed = start_driver("stack", *of_table(table), *STACK, *places, *cluster)
    wait_until(lambda: len(entries_of(run)) >= 2 and is_busy(this))
    killed.kill()
    assert killed.wait(60) == -signal.SIGKILL
    wait_until(lambda: not is_busy(this), timeout_s=30)
    assert find_run("stack", str(tmp_path)).manifest.status == "interrupted"
    entries = entries_of(run)

    interrupted = start_driver("stack", *places, "resume=true")
    wait_until(lambda: len(entries_of(run)) > len(entries) and is_busy(this))
    interrupted.send_signal(signal.SIGINT)
    _, complaint = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, complaint.decode()
    wait_until(lambda: not is_busy(this), timeout_s=20)  # Ray ends the processes of a driver that has left
    way_back = f"graftstack: interrupted; continue with: graftstack stack name=stack resume=true runs_dir={tmp_path}"
    assert complaint.decode().splitlines()[-1] == way_back
    assert find_run("stack", str(tmp_path)).manifest.status == "interrupted"
    assert entries.items() <= entries_of(run).items(), "a finished task ran again"
    entries = entries_of(run)
    assert len(entries) < NUM_TASKS, "it was over already"

    resumed = start_driver("stack", *places, "resume=true")
    _, complaint = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, complaint.decode()
    assert entries.items() <= entries_of(run).items(), "a finished task ran again"
    details = find_run("stack", str(tmp_path)).manifest.details
    assert details["num_tasks_known"] == len(entries)
    assert details["num_tasks_run"] == NUM_TASKS - len(entries)
    assert_same(run, unbroken)
    assert_cluster_is_clean()
