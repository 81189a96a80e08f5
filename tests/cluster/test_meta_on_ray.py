"""Meta-learning in processes of a Ray cluster of two nodes: the same bits on any of them, and whoever is killed."""

import gc
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle
from tests.cluster.heads import wait_until

from graftstack.cli import main
from graftstack.cluster import patience
from graftstack.cluster.meta import launch_meta
from graftstack.config.compose import compose_job
from graftstack.meta import runner
from graftstack.meta.model import MetaState
from graftstack.meta.runner import Block, RunnerSettings
from graftstack.runs import find_run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PATIENCE_S = 120

PER_STEP = 4
SMALL = (
    *("data=digits", "data.image_size=16", "backbone=conv4", "num_ways=3", "num_queries=2", "eval.num_episodes=40"),
    *("eval.val_fraction=0.3", "eval.test_fraction=0.3", "eval.num_val_episodes=5", f"episodes_per_step={PER_STEP}"),
)
METHODS = {
    "prototypes": ("num_episodes=400", "eval.every_episodes=200"),
    "supcon": ("method=supcon", "num_episodes=400", "eval.every_episodes=200"),
    "fomaml": ("method=fomaml", "num_episodes=40", "eval.every_episodes=20", "eval.num_shots=[1,3]"),
}
NUM_STEPS = 100

Capture = pytest.CaptureFixture[str]


class Call(NamedTuple):
    """What a runner is asked: to go through the block of training episodes that begins with `start`."""

    method: str
    start: int


class Watched:
    """A runner that writes down what it is asked for.

    Args:
        folder: Where it writes.
        num_workers: How many there are to be before any goes through a training episode, so that each has its share.
        held: Amid each of these calls, the first process that is asked waits to be killed.
        settings: Of the real runner.
    """

    def __init__(self, folder: Path, num_workers: int, held: tuple[Call, ...], settings: RunnerSettings) -> None:
        from graftstack.meta.runner import EpisodeRunner  # of this process, where nothing is patched

        self._runner = EpisodeRunner(settings)
        self._folder = folder
        self._num_workers = num_workers
        self._held = held

    def gradient(self, *args: Any) -> Any:
        return self._trained("gradient", *args)

    def embed(self, *args: Any) -> Any:
        return self._trained("embed", *args)

    def pull_back(self, *args: Any) -> Any:
        return self._trained("pull_back", *args)

    def score(self, *args: Any) -> Any:
        (self._folder / f"{os.getpid()}.scores").touch()
        return self._runner.score(*args)

    def features(self, *args: Any) -> Any:
        return self._runner.features(*args)

    def moments(self, *args: Any) -> Any:
        return self._runner.moments(*args)

    def _trained(self, method: str, state: MetaState, block: Block, *args: Any) -> Any:
        with (self._folder / f"{os.getpid()}.calls").open("a") as calls:
            calls.write(f"{method} {block.start}\n")
        wait_until(lambda: len(list(self._folder.glob("*.calls"))) >= self._num_workers)
        if Call(method, block.start) in self._held:
            self._wait_to_be_killed(self._folder / f"{method}-{block.start}.held")
        return getattr(self._runner, method)(state, block, *args)

    @staticmethod
    def _wait_to_be_killed(place: Path) -> None:
        try:
            place.open("x").close()
        except FileExistsError:
            return
        place.write_text(f"{os.getpid()}\n")
        time.sleep(PATIENCE_S)


class Log:
    """What the watched runners of a run were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def calls(self) -> dict[int, list[Call]]:
        """What each process was asked, in order."""
        return {
            int(path.stem): [
                Call(method, int(start)) for method, start in map(str.split, path.read_text().splitlines())
            ]
            for path in self.folder.glob("*.calls")
        }

    @property
    def num_each(self) -> Counter[Call]:
        """How often each was asked."""
        return Counter(call for calls in self.calls.values() for call in calls)

    @property
    def num_scoring(self) -> int:
        """How many processes took part in evaluations."""
        return len(list(self.folder.glob("*.scores")))

    def askers(self, call: Call) -> set[int]:
        return {process for process, calls in self.calls.items() if call in calls}


class Killer(threading.Thread):
    """Kills the processes that wait for it, one after another."""

    def __init__(self, folder: Path, held: tuple[Call, ...]) -> None:
        super().__init__(daemon=True)
        self.places = [folder / f"{method}-{start}.held" for method, start in held]
        self.killed: list[int] = []
        self.titles: list[str] = []

    def run(self) -> None:
        for place in self.places:
            wait_until(lambda place=place: place.exists() and place.read_text().endswith("\n"))  # type: ignore[misc]
            process = psutil.Process(int(place.read_text()))
            self.titles.append(title(process))
            process.kill()
            self.killed.append(process.pid)


class Freeing:
    """A display that shows nothing, and makes room once it is told that a training waits for some."""

    def __init__(self, free: Callable[[], None]) -> None:
        self._free = free
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
        if text.startswith("waiting for room"):
            self._free()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@pytest.fixture(scope="module", autouse=True)
def _module_travels() -> Iterator[None]:
    """Workers of Ray can't import this file."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def cluster(embedded_ray: None) -> Iterator[tuple[str, str]]:
    """The Ray that runs and, so that four workers find room wherever this is, a second node; how jobs join them."""
    import ray

    num_cpus, address = ray.cluster_resources()["CPU"], ray.get_runtime_context().gcs_address
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=2", "--block"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as node:
        try:
            wait_until(lambda: ray.cluster_resources()["CPU"] == num_cpus + 2)
            yield "cluster=ray", f"cluster.address={address}"
        finally:
            node.terminate()
    wait_until(lambda: ray.cluster_resources()["CPU"] == num_cpus)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The runs of each method that no other may differ from, in this process."""
    folder = tmp_path_factory.mktemp("unbroken")

    def run(method: str) -> Path:
        if not (folder / method).exists():
            assert meta(folder, method, *METHODS[method], "cluster=inline") == 0
        return folder / method

    return run


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Log]:
    """Has the next crew watched: ``watch(num_workers, *held)``."""

    def watch(num_workers: int, *held: Call) -> Log:
        (tmp_path / "watched").mkdir()
        monkeypatch.setattr(runner, "EpisodeRunner", partial(Watched, tmp_path / "watched", num_workers, held))
        return Log(tmp_path / "watched")

    return watch


@pytest.fixture
def free(cluster: tuple[str, str]) -> Iterator[Callable[[], None]]:
    """Takes all CPUs of the cluster until it is called."""
    import ray

    class Occupant:
        def is_there(self) -> bool:
            return True

    sizes = sorted((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), reverse=True)
    occupants = [ray.remote(Occupant).options(num_cpus=size).remote() for size in sizes]
    assert all(ray.get([occupant.is_there.remote() for occupant in occupants], timeout=PATIENCE_S))
    wait_until(lambda: not ray.available_resources().get("CPU"))

    def free() -> None:
        while occupants:
            ray.kill(occupants.pop())

    yield free
    free()


def words(runs_dir: Path, name: str, *overrides: str) -> list[str]:
    """What makes a meta-training; what is given twice counts as it is given last."""
    given = [*SMALL, *overrides, f"name={name}", f"runs_dir={runs_dir}"]
    return list({word.partition("=")[0]: word for word in given}.values())


def meta(runs_dir: Path, name: str, *overrides: str) -> int:
    """Runs a meta-training in this process, as a person starts it; returns its exit status."""
    return main(["meta", *words(runs_dir, name, *overrides)])


def title(process: psutil.Process) -> str:
    return "".join(process.cmdline()[:1])


def workers() -> list[str]:
    """What the processes of crews below this one are called: ``ray::_CrewProcess``, and what they do."""
    titles = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            titles.append(title(process))
        except psutil.NoSuchProcess:
            continue
    return [each for each in titles if each.startswith("ray::_CrewProcess")]


def newest_step(run: Path) -> int:
    return max((int(path.stem.removeprefix("step-")) for path in run.glob("checkpoints/step-*.json")), default=0)


def assert_same(run: Path, expected: Path) -> None:
    """Asserts that two runs have found the same, to the last bit, and keep the same files."""
    found, wanted = (find_run(str(folder), "").manifest for folder in (run, expected))
    assert found.status == wanted.status == "done"
    assert (found.metrics, found.details, found.results) == (wanted.metrics, wanted.details, wanted.results)
    curve = pq.read_table(expected / "metrics.parquet")
    assert curve.num_rows == 3
    assert pq.read_table(run / "metrics.parquet").equals(curve)
    # The last checkpoint holds the running statistics and the optimiser's state too.
    last = f"checkpoints/step-{wanted.config['num_episodes'] // PER_STEP:09}.safetensors"
    for file in ("model/model.safetensors", "model/meta.safetensors", last):
        assert (run / file).read_bytes() == (expected / file).read_bytes(), file
    assert not list(run.rglob(".*")), "a killed writer's leftovers outlive the run"


def assert_cluster_is_clean() -> None:
    """Asserts that no worker is left, and that what they shared isn't held any more."""
    import ray
    from ray.util.state import list_actors, list_objects

    address = ray.get_runtime_context().gcs_address

    def left_behind() -> list[str]:
        # Without the address, another Ray that happens to run on this machine may answer.
        objects = [entry.object_id for entry in list_objects(address)]
        actors = [actor.class_name for actor in list_actors(address, filters=[("state", "!=", "DEAD")])]
        return objects + actors

    gc.collect()  # what an error has come through holds what it has seen
    wait_until(lambda: not workers(), timeout_s=30)
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], timeout_s=30)
    deadline = time.monotonic() + 30
    while left := left_behind():
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


# Two workers of supcon: below, where they are killed.
@pytest.mark.parametrize(
    ("method", "num_workers"), [("prototypes", 2), ("prototypes", 4), ("supcon", 4), ("fomaml", 2), ("fomaml", 4)]
)
def test_workers_that_share_each_step_end_in_the_meta_parameters_of_one_process(
    cluster: tuple[str, str],
    unbroken: Callable[[str], Path],
    watch: Callable[..., Log],
    tmp_path: Path,
    method: str,
    num_workers: int,
) -> None:
    expected, log = unbroken(method), watch(num_workers)
    assert meta(tmp_path, "shared", *METHODS[method], *cluster, f"cluster.num_workers={num_workers}") == 0
    assert len(log.calls) == num_workers
    assert set(log.num_each.values()) == {1}, "a block was gone through twice"
    assert_same(tmp_path / "shared", expected)
    if method == "fomaml":  # which is evaluated episode by episode
        assert log.num_scoring == num_workers
    assert_cluster_is_clean()


def test_the_block_of_a_killed_worker_goes_to_the_survivor_and_no_other_is_gone_through_again(
    cluster: tuple[str, str],
    unbroken: Callable[[str], Path],
    watch: Callable[..., Log],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The survivor is killed as well, while it holds features of that step.
    held = Call("embed", 10 * PER_STEP + 1), Call("pull_back", 10 * PER_STEP + 2)
    expected, log, killer = unbroken("supcon"), watch(2, *held), Killer(tmp_path / "watched", held)
    killer.start()
    assert meta(tmp_path, "broken", *METHODS["supcon"], *cluster, "cluster.num_workers=2") == 0
    assert killer.titles == ["ray::_CrewProcess.go_through"] * 2
    first, second = killer.killed
    assert log.askers(held[0]) == {first, second}, "it waited for a replacement"
    assert len(log.askers(held[1]) - {first, second}) == 1
    assert log.calls[first][-1] == held[0]
    assert log.calls[second][-1] == held[1]
    assert len([said for said in caplog.messages if said.startswith("lost a worker (its process ended")]) == 2
    assert log.num_each == Counter(
        [Call(method, start) for method in ("embed", "pull_back") for start in range(NUM_STEPS * PER_STEP)] + [*held]
    )
    assert_same(tmp_path / "broken", expected)
    assert_cluster_is_clean()


def test_a_killed_driver_and_an_interrupted_one_leave_a_training_that_continues(
    cluster: tuple[str, str],
    unbroken: Callable[[str], Path],
    watch: Callable[..., Log],
    start_driver: Callable[..., subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    run, expected = tmp_path / "training", unbroken("prototypes")
    places = (f"runs_dir={tmp_path}", "name=training")
    often = ("cluster.num_workers=2", "checkpoint.every_steps=1")

    killed = start_driver("meta", *SMALL, *METHODS["prototypes"], *cluster, *often, *places)
    wait_until(lambda: newest_step(run) >= 2)
    assert workers(), "it is in one process"
    killed.kill()
    assert killed.wait(60) == -signal.SIGKILL
    assert find_run("training", str(tmp_path)).manifest.status == "interrupted"
    wait_until(lambda: not workers(), timeout_s=60)
    step = newest_step(run)

    interrupted = start_driver("meta", *places, "resume=true")
    wait_until(lambda: newest_step(run) > step)
    interrupted.send_signal(signal.SIGINT)
    _, complaint = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, complaint.decode()
    *_, said = complaint.decode().splitlines()
    before, way_back = said.split("with: ")
    assert before == "graftstack: interrupted; continue "
    assert way_back == f"graftstack meta name=training resume=true runs_dir={tmp_path}"
    assert find_run("training", str(tmp_path)).manifest.status == "interrupted"
    assert_cluster_is_clean()
    step = newest_step(run)
    assert step < NUM_STEPS, "it was over already"

    log = watch(2)
    assert main(shlex.split(way_back)[1:]) == 0
    left = range(step * PER_STEP, NUM_STEPS * PER_STEP)
    assert log.num_each == Counter(Call("gradient", start) for start in left), "more is done again than wasn't saved"
    assert_same(run, expected)
    assert_cluster_is_clean()


def test_workers_say_what_one_process_says_of_a_training_that_diverges_and_leave_nothing_running(
    cluster: tuple[str, str], tmp_path: Path, capsys: Capture
) -> None:
    said = []
    for name, place in (("inline", ("cluster=inline",)), ("workers", (*cluster, "cluster.num_workers=2"))):
        assert meta(tmp_path, name, *METHODS["fomaml"], "inner_lr=1e30", *place) == 1
        said.append(capsys.readouterr().err.splitlines()[-1])
        assert find_run(name, str(tmp_path)).manifest.status == "failed"
    assert said[0].startswith("graftstack: step 1 of 10: inner_lr=1e+30: the inner loop of episode 0 diverged at its ")
    assert said[1] == said[0]
    assert_cluster_is_clean()


def test_a_training_waits_for_room_in_a_full_cluster_and_says_so(
    cluster: tuple[str, str],
    free: Callable[[], None],
    unbroken: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(patience, "LONG_WAIT_S", 0.0)
    expected, num = unbroken("fomaml"), ray.cluster_resources()["CPU"]
    given = words(tmp_path, "late", *METHODS["fomaml"], *cluster)
    display = Freeing(free)
    launch_meta(compose_job("meta", given), overrides=given, display=display)  # type: ignore[arg-type]
    amount = f"{num:g} CPUs, 0 of them free and 0 GPUs, 0 of them free"
    assert re.fullmatch(
        rf"waiting for room for a worker of 1 CPUs and 0 GPUs, \d+ s more: the 2 nodes of the cluster have {amount}",
        display.said[0],
    )
    assert_same(tmp_path / "late", expected)
    assert_cluster_is_clean()


def test_more_workers_than_the_cluster_has_room_for_are_refused_at_once(
    cluster: tuple[str, str], tmp_path: Path, capsys: Capture
) -> None:
    import ray

    num = int(ray.cluster_resources()["CPU"])
    for num_workers, complaint in (
        (2, f"needs {2 * num} CPUs and the cluster has {num}; use cluster.num_workers=1 or less"),
        (1, f"the nodes there are hold 0 workers of {num} CPUs and 0 GPUs; use fewer"),  # together they have as many
    ):
        wide = (f"cluster.num_workers={num_workers}", f"cluster.cpus_per_worker={num}")
        assert meta(tmp_path / "runs", "refused", *METHODS["fomaml"], *cluster, *wide) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"graftstack: cluster.num_workers={num_workers}: {complaint}")
    assert not (tmp_path / "runs").exists()
    assert_cluster_is_clean()
