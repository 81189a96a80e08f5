"""A run folder tells the truth after any kill, and is refused to whoever may not have it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftstack.cluster import launching
from graftstack.cluster.trained import best_trials, inherited_overrides, trained_runs
from graftstack.config.compose import compose_job
from graftstack.config.stack import StackConfig
from graftstack.errors import RunError, TrainingError
from graftstack.runs import MANIFEST, PROGRESS, Manifest, Run, find_run, list_runs, now, read_progress
from graftstack.storage import Folder

CONFIG: dict[str, Any] = {
    "data": {"source": "digits", "classes": [1, 2]},
    "epochs": 3,
    "cluster": {"kind": "local", "num_workers": 1},
    "checkpoint": {"num_to_keep": 2},
    "runs_dir": "runs",
    "resume": False,
    "name": "a",
}


def manifest(name: str = "a", **changes: Any) -> Manifest:
    return replace(Manifest(job="finetune", name=name, status="running", config=CONFIG, started=now()), **changes)


def start(runs_dir: Path | str, wanted: Manifest | None = None, *, resume: bool = False) -> Run:
    return Run.start(str(runs_dir), wanted or manifest(), resume=resume)


def finished(runs_dir: Path | str, name: str = "a", *, status: str = "interrupted", **changes: Any) -> Run:
    run = start(runs_dir, manifest(name))
    run.update(status=status, **changes)
    return run


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def stored(runs_dir: Path, name: str = "a") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((runs_dir / name / MANIFEST).read_text())
    return content


def with_process(runs_dir: Path, **process: Any) -> str:
    """Gives a running run another owner and returns the status that it then reads as."""
    start(runs_dir)
    content = stored(runs_dir)
    content["process"] |= process
    (runs_dir / "a" / MANIFEST).write_text(json.dumps(content))
    return find_run("a", str(runs_dir)).manifest.status


def refusal(runs_dir: Path | str, wanted: Manifest | None = None, *, resume: bool = False) -> str:
    """Returns why a start is refused, by `check` and by `start` alike."""
    messages = []
    for attempt in (Run.check, Run.start):
        with pytest.raises(RunError) as caught:
            attempt(str(runs_dir), wanted or manifest(), resume=resume)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert len(messages[0].splitlines()) == 1
    return messages[0]


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_run_has_a_folder_and_a_manifest(tmp_path: Path, resume: bool) -> None:
    runs_dir = tmp_path / "deep" / "runs"
    assert Run.check(str(runs_dir), manifest(), resume=resume) is None
    assert tree(tmp_path) == {}
    run = start(runs_dir, resume=resume)
    assert Path(run.folder.location) == runs_dir / "a"
    assert stored(runs_dir)["config"] == CONFIG
    assert stored(runs_dir)["process"]["pid"] == os.getpid()
    assert find_run("a", str(runs_dir)).manifest == run.manifest
    assert run.manifest.status == "running"


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    assert refusal(tmp_path) == (
        f"name=a: a run of that name exists in {tmp_path}; choose another name, or pass resume=true to continue it"
    )


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "photos.txt").write_text("mine")
    assert "exists and is no run; choose another name" in refusal(tmp_path, resume=True)
    (tmp_path / "b").mkdir()
    assert start(tmp_path, manifest("b")).manifest.status == "running"


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_stopped_run_continues(tmp_path: Path, status: str) -> None:
    before = finished(tmp_path, status=status, error="loss is nan", metrics={"accuracy": 0.5}).manifest
    run = start(tmp_path, replace(manifest(), started="2099-01-01T00:00:00+00:00"), resume=True)
    assert run.manifest.status == "running"
    assert run.manifest.error is None
    assert run.manifest.started == before.started
    assert run.manifest.metrics == {"accuracy": 0.5}
    assert find_run("a", str(tmp_path)).manifest == run.manifest


def test_a_done_run_is_returned_as_it_is(tmp_path: Path) -> None:
    finished(tmp_path, status="done", metrics={"accuracy": 0.9})
    before = tree(tmp_path)
    assert start(tmp_path, resume=True).manifest.metrics == {"accuracy": 0.9}
    assert tree(tmp_path) == before


def test_a_run_of_another_job_is_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    assert refusal(tmp_path, manifest(job="pretrain"), resume=True) == (
        "name=a: is a finetune run; resume it with the finetune job"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 4}, "epochs=4: run a was started with 3; leave the key out to continue it"),
        ({"data": {"source": "digits", "classes": [1]}}, r"data.classes=[1]: run a was started with [1, 2]; "),
        ({"data": {"source": "csv", "classes": [1, 2]}}, "data.source=csv: run a was started with digits; "),
    ],
)
def test_a_resumption_with_another_configuration_names_the_key(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    finished(tmp_path)
    before = tree(tmp_path)
    assert refusal(tmp_path, manifest(config=CONFIG | change), resume=True).startswith(message)
    assert tree(tmp_path) == before


def test_a_key_that_the_run_doesnt_know_says_nothing(tmp_path: Path) -> None:
    finished(tmp_path)
    assert start(tmp_path, manifest(config=CONFIG | {"batch_size": 64}), resume=True).manifest.status == "running"


@pytest.mark.parametrize(
    ("before", "after", "how"),
    [
        ({}, {"weight_decay": [0, 0.1]}, "without it; leave it out to continue the run"),
        ({"weight_decay": [0, 0.1]}, {}, "with it; give it to continue the run"),
    ],
)
def test_in_another_space_the_same_number_is_another_trial(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], how: str
) -> None:
    started, resumed = (manifest(config=CONFIG | {"space": {"lr": [1]} | varied}) for varied in (before, after))
    start(tmp_path, started).update(status="interrupted")
    assert refusal(tmp_path, resumed, resume=True) == (
        f"space.weight_decay=[0, 0.1]: run a was started {how}, or choose another name"
    )
    assert start(tmp_path, started, resume=True).manifest.status == "running"


def test_a_resumption_may_run_elsewhere(tmp_path: Path) -> None:
    finished(tmp_path)
    elsewhere = {
        "cluster": {"kind": "ray", "num_workers": [1, 4]},
        "checkpoint": {"num_to_keep": 5},
        "runs_dir": str(tmp_path),
        "resume": True,
    }
    run = start(tmp_path, manifest(config=CONFIG | elsewhere), resume=True)
    assert stored(tmp_path)["config"]["cluster"] == run.manifest.config["cluster"] == elsewhere["cluster"]


def test_the_seconds_of_all_resumptions_add_up(tmp_path: Path) -> None:
    first = finished(tmp_path)
    content = stored(tmp_path)
    assert content["seconds"] == first.manifest.seconds
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(content | {"seconds": 100.0}))
    run = start(tmp_path, resume=True)
    time.sleep(0.02)
    run.beat()
    assert 100.02 <= run.manifest.seconds < 110


def test_a_run_is_refused_while_its_process_lives_and_interrupted_once_it_is_killed(tmp_path: Path) -> None:
    program = """
import sys, time
from graftstack.runs import Manifest, Run
Run.start(sys.argv[1], Manifest(job="finetune", name="a", status="running", config={}, started="2026"), resume=False)
print("started", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "started\n"
            before = tree(tmp_path)
            assert find_run("a", str(tmp_path)).manifest.status == "running"
            assert refusal(tmp_path, manifest(config={}), resume=True) == (
                f"name=a: process {owner.pid} on {socket.gethostname()} works on it; wait for it, or stop it"
            )
            assert tree(tmp_path) == before
        finally:
            owner.send_signal(signal.SIGKILL)
    assert find_run("a", str(tmp_path)).manifest.status == "interrupted"
    assert stored(tmp_path)["status"] == "running"
    assert start(tmp_path, manifest(config={}), resume=True).manifest.status == "running"
    assert stored(tmp_path)["process"]["pid"] == os.getpid()


def test_a_pid_used_again_isnt_the_owner(tmp_path: Path) -> None:
    assert with_process(tmp_path / "same") == "running"
    assert with_process(tmp_path / "reused", born="1") == "interrupted"


def test_a_run_of_another_host_goes_by_its_last_sign_of_life(tmp_path: Path) -> None:
    assert with_process(tmp_path / "alive", host="elsewhere", beat=time.time() - 30) == "running"
    assert with_process(tmp_path / "silent", host="elsewhere", beat=time.time() - 90) == "interrupted"


def test_a_beat_is_a_sign_of_life(tmp_path: Path) -> None:
    run = start(tmp_path)
    before = stored(tmp_path)["process"]["beat"]
    time.sleep(0.01)
    run.beat()
    assert stored(tmp_path)["process"]["beat"] > before
    assert stored(tmp_path)["status"] == "running"


# Owners


@pytest.fixture(params=["disk", "s3"])
def runs_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where runs lie, on a disk and in a bucket."""
    return f"{request.getfixturevalue('s3').uri}/runs" if request.param == "s3" else str(tmp_path)


def content_of(runs_dir: str) -> dict[str, bytes]:
    """Returns the files of the run, hidden ones too."""
    if "://" not in runs_dir:
        return {path.name: path.read_bytes() for path in Path(runs_dir, "a").iterdir()}
    from s3fs import S3FileSystem

    fs = S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    return {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find(f"{runs_dir}/a")}


def claimed(folder: Folder, number: int, **process: Any) -> None:
    """Leaves what a process leaves that ends amid a resumption."""
    owner = {"host": "elsewhere", "pid": 7, "born": "1", "beat": time.time() - 90, "resumption": number}
    folder.write(f".resumption-{number}", json.dumps(owner | process).encode())


def lost(runs_dir: str) -> Run:
    """Returns a run as its process on another host has it, which was silent for too long."""
    run = start(runs_dir)
    run.update(process={**run.manifest.process, "host": "elsewhere", "beat": time.time() - 90})
    return Run(run.folder, run.manifest)


def test_of_two_that_resume_a_run_at_once_one_gets_it(runs_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(runs_dir)
    both_have_looked = threading.Barrier(2)
    look, looked = Run.check, threading.local()

    def check(*arguments: Any, **options: Any) -> Run | None:
        found = look(*arguments, **options)
        if not hasattr(looked, "once"):
            looked.once = True
            both_have_looked.wait(30)
        return found

    def resume() -> str:
        try:
            return start(runs_dir, resume=True).manifest.status
        except RunError as error:
            return str(error)

    monkeypatch.setattr(Run, "check", check)
    with ThreadPoolExecutor(2) as pool:
        ends = sorted(future.result() for future in [pool.submit(resume), pool.submit(resume)])
    in_use = f"process {os.getpid()} on {socket.gethostname()} works on it; wait for it, or stop it"
    assert ends == [f"name=a: {in_use}", "running"]
    assert content_of(runs_dir).keys() == {MANIFEST}


RESUME = """
import sys
from graftstack.errors import RunError
from graftstack.runs import Manifest, Run

look, has_looked = Run.check, set()

def check(runs_dir, manifest, **options):
    found = look(runs_dir, manifest, **options)
    if manifest.name not in has_looked:
        has_looked.add(manifest.name)
        print("looked", flush=True)
        sys.stdin.readline()
    return found

Run.check = check
for name in sys.argv[2:]:
    sys.stdin.readline()
    manifest = Manifest(job="finetune", name=name, status="running", config={}, started="2026")
    try:
        Run.start(sys.argv[1], manifest, resume=True)
        print("won", flush=True)
    except RunError as error:
        print(error, flush=True)
"""


class Driver:
    """A process that resumes run after run, step by step."""

    def __init__(self, runs_dir: Path, names: list[str]) -> None:
        command = [sys.executable, "-c", RESUME, str(runs_dir), *names]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def test_of_two_processes_that_saw_a_run_without_an_owner_one_gets_it(tmp_path: Path) -> None:
    names = [f"run-{number}" for number in range(10)]
    for name in names:
        start(tmp_path, manifest(name, config={})).update(status="interrupted")
    drivers = [Driver(tmp_path, names), Driver(tmp_path, names)]
    try:
        for name in names:
            for expected in ("looked", None):
                for driver in drivers:
                    driver.go_on()
                said = [driver.says() for driver in drivers]
                assert expected is None or said == [expected, expected]
            (winner,) = (driver.process.pid for driver, word in zip(drivers, said, strict=True) if word == "won")
            in_use = f"process {winner} on {socket.gethostname()} works on it; wait for it, or stop it"
            assert f"name={name}: {in_use}" in said
            assert stored(tmp_path, name)["process"]["pid"] == winner
            assert tree(tmp_path / name).keys() == {MANIFEST}
    finally:
        for driver in drivers:
            driver.process.kill()
            driver.process.communicate()


def test_whoever_looked_before_another_one_resumed_and_stopped_looks_again(runs_dir: str) -> None:
    finished(runs_dir)
    late = find_run("a", runs_dir)
    start(runs_dir, resume=True).update(status="failed", error="loss is nan")
    before = content_of(runs_dir)
    assert late.take_over(manifest()) is False
    assert content_of(runs_dir) == before
    assert start(runs_dir, resume=True).manifest.process["resumption"] == 2


def test_claims_of_processes_that_are_gone_are_skipped_and_removed(runs_dir: str) -> None:
    run = finished(runs_dir)
    claimed(run.folder, 1)
    claimed(run.folder, 2, host=socket.gethostname(), pid=os.getpid())
    run.folder.write(".resumption-3", b"{")
    run = start(runs_dir, resume=True)
    assert run.manifest.process["resumption"] == 4
    assert content_of(runs_dir).keys() == {MANIFEST}
    claimed(run.folder, 4)  # it was killed before it removed its own
    run.update(status="interrupted")
    assert start(runs_dir, resume=True).manifest.process["resumption"] == 5
    assert content_of(runs_dir).keys() == {MANIFEST}


def test_a_run_that_a_living_process_is_about_to_resume_is_refused(runs_dir: str) -> None:
    run = finished(runs_dir)
    claimed(run.folder, 1, beat=time.time())
    before = content_of(runs_dir)
    with pytest.raises(RunError, match=r"\Aname=a: process 7 on elsewhere works on it; wait for it, or stop it\Z"):
        start(runs_dir, resume=True)
    assert content_of(runs_dir) == before


def test_a_run_of_an_earlier_version_can_be_resumed(tmp_path: Path) -> None:
    finished(tmp_path)
    content = stored(tmp_path)
    del content["process"]["resumption"]
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(content))
    assert start(tmp_path, resume=True).manifest.process["resumption"] == 1


TAKEN = (
    rf"\Aname=a: another process took over the run \({os.getpid()} on {socket.gethostname()}\), as this one gave no "
    r"sign of life; let that one finish it\Z"
)


def test_a_process_whose_run_was_taken_over_writes_no_more(runs_dir: str) -> None:
    asleep = lost(runs_dir)
    owner = start(runs_dir, resume=True)
    for write in (asleep.beat, lambda: asleep.update(status="done"), asleep.beat):
        before = content_of(runs_dir)
        with pytest.raises(TrainingError, match=TAKEN):
            write()
        assert content_of(runs_dir) == before
    owner.beat()
    owner.update(status="done")
    with pytest.raises(TrainingError, match=TAKEN):
        asleep.beat()
    assert find_run("a", runs_dir).manifest.status == "done"


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_BEAT_EVERY_S", 0.1)


@pytest.mark.usefixtures("often", "interruptible")
def test_work_on_a_run_that_was_taken_over_ends_at_once(tmp_path: Path) -> None:
    asleep, began = lost(str(tmp_path)), time.monotonic()
    owner = start(tmp_path, resume=True)
    with pytest.raises(TrainingError, match=TAKEN), launching.beating(asleep):
        time.sleep(20)
    assert time.monotonic() - began < 10
    beat = launching.heartbeat(asleep)
    time.sleep(0.2)
    with pytest.raises(TrainingError, match=TAKEN):
        beat()
    assert stored(tmp_path)["process"] == owner.manifest.process


@pytest.mark.usefixtures("often")
def test_work_that_cant_be_interrupted_ends_with_the_same_words(tmp_path: Path) -> None:
    asleep = lost(str(tmp_path))
    start(tmp_path, resume=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(TrainingError, match=TAKEN), launching.beating(asleep):
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("often", "interruptible")
def test_an_interrupt_of_the_user_stays_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), launching.beating(start(tmp_path)):
        signal.raise_signal(signal.SIGINT)


def job(tmp_path: Path) -> launching.Checked[Any]:
    words = ["data=digits", "backbone=conv4", "name=a", f"runs_dir={tmp_path}", "resume=true", "cluster=inline"]
    return launching.check("finetune", compose_job("finetune", words), words)


def test_a_job_whose_run_was_taken_over_leaves_the_manifest_to_the_new_owner(tmp_path: Path) -> None:
    trees = []

    def work() -> None:
        with launching.open_run(job(tmp_path)) as run:
            content = stored(tmp_path)
            content["process"] |= {"host": "elsewhere", "pid": 3, "resumption": 1}
            (tmp_path / "a" / MANIFEST).write_text(json.dumps(content))
            trees.append(tree(tmp_path))
            run.update(status="done")

    with pytest.raises(TrainingError, match=r"another process took over the run \(3 on elsewhere\)"):
        work()
    assert tree(tmp_path) == trees[0]


def break_off(tmp_path: Path, owner: dict[str, Any]) -> Path:
    """A job that is interrupted while a worker of its writes, on a run that then has `owner`; returns what is left."""
    checked = job(tmp_path)
    unfinished = tmp_path / "a" / "checkpoints" / ".step-000000020.safetensors.0123.tmp"

    def work() -> None:
        with launching.tidied(checked), launching.open_run(checked):
            unfinished.parent.mkdir()
            unfinished.write_bytes(b"half of it")
            content = stored(tmp_path)
            content["process"] |= owner
            (tmp_path / "a" / MANIFEST).write_text(json.dumps(content))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    return unfinished


def test_what_a_worker_was_writing_when_its_job_was_interrupted_is_removed(tmp_path: Path) -> None:
    unfinished = break_off(tmp_path, owner={})
    assert not unfinished.exists()
    assert unfinished.parent.exists()
    assert stored(tmp_path)["status"] == "interrupted"


def test_what_workers_of_another_owner_are_writing_is_left_alone(tmp_path: Path) -> None:
    assert break_off(tmp_path, owner={"host": "elsewhere", "pid": 3, "resumption": 1}).exists()


def test_a_job_that_another_process_finished_since_it_was_checked_isnt_done_again(tmp_path: Path) -> None:
    early = job(tmp_path)
    with launching.open_run(job(tmp_path)) as run:
        run.update(status="done")
    before = tree(tmp_path)
    with (
        pytest.raises(RunError, match=r"\Aname=a: another process finished it a moment ago; "),
        launching.open_run(early),
    ):
        pytest.fail("it is done again")
    assert tree(tmp_path) == before


def test_whoever_names_a_run_in_a_store_that_is_out_of_reach_is_told_which_key_names_it() -> None:
    away = "nosuch://bucket/wide"
    for use in (lambda: best_trials(away, "runs", top=1), lambda: inherited_overrides([f"from_sweep={away}"])):
        with pytest.raises(RunError, match=rf"\Afrom_sweep={away}: can't be reached \("):
            use()
    stack = compose_job("stack", ["data=digits", f"base_models=[run:{away}]"])
    assert isinstance(stack, StackConfig)
    with pytest.raises(RunError, match=rf"\Arun:{away}: can't be reached \("):
        trained_runs(stack)


VALID = {"job": "finetune", "name": "a", "status": "running", "config": {}, "started": "2026-01-01T00:00:00+00:00"}
DAMAGED = [
    *("", "{", "[]", "null", '{"job": "finetune"}', '{"job": "finetune", "planet": 3}', "\xff"),
    *(json.dumps(VALID | damage) for damage in ({"started": 5}, {"config": []}, {"metrics": None}, {"seconds": "1"})),
    *(json.dumps(VALID | {"process": process}) for process in ({"host": "h"}, {"host": "h", "pid": "1", "beat": 0.0})),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_manifest_is_said_to_be_unreadable(tmp_path: Path, content: str) -> None:
    finished(tmp_path)
    (tmp_path / "a" / MANIFEST).write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=r"/a: holds no readable run\.json; name another run"):
        find_run("a", str(tmp_path))
    assert "holds no readable run.json" in refusal(tmp_path, resume=True)


def test_a_damaged_run_doesnt_hide_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    finished(tmp_path, "a")
    finished(tmp_path, "b")
    (tmp_path / "a" / MANIFEST).write_text("{")
    assert [run.manifest.name for run in list_runs(str(tmp_path))] == ["b"]
    assert f"{tmp_path}/a: holds no readable run.json" in caplog.text


def test_a_run_is_found_by_name_path_and_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_dir = tmp_path / "runs"
    uri = f"memory://{tmp_path.name}/runs"
    made = finished(runs_dir, "flowers", status="done")
    remote = finished(uri, "flowers", status="done", metrics={"accuracy": 0.25})
    monkeypatch.chdir(tmp_path)
    for reference in ("flowers", str(runs_dir / "flowers"), "runs/flowers", "./runs/flowers/"):
        assert find_run(reference, "runs").manifest == made.manifest
    assert find_run(f"{uri}/flowers", "runs").manifest == remote.manifest
    assert find_run("flowers", uri).manifest == remote.manifest


def test_an_unknown_run_is_answered_with_the_nearest(tmp_path: Path) -> None:
    for name in ("flowers-1", "birds"):
        finished(tmp_path, name)
    (tmp_path / "flower").mkdir()
    with pytest.raises(RunError, match=r"\Aflowers: no such run in .*; did you mean flowers-1\?\Z"):
        find_run("flowers", str(tmp_path))
    with pytest.raises(RunError, match=r"zzzz: no such run in .*; known: birds, flowers-1\Z"):
        find_run("zzzz", str(tmp_path))
    with pytest.raises(RunError, match="it holds no runs"):
        find_run("a", str(tmp_path / "none"))
    with pytest.raises(RunError, match=r"holds no readable run\.json"):
        find_run(f"memory://{tmp_path.name}/none", str(tmp_path))


@pytest.mark.parametrize("location", ["{0}", "memory://{0.name}/runs"])
def test_runs_are_listed_from_the_oldest(tmp_path: Path, location: str) -> None:
    runs_dir = location.format(tmp_path)
    assert list_runs(runs_dir) == []
    for name, day in (("b", 2), ("c", 1), ("a", 3)):
        start(runs_dir, manifest(name, started=f"2026-01-0{day}T00:00:00+00:00"))
    Folder(runs_dir).write("notes.txt", b"")
    assert [run.manifest.name for run in list_runs(runs_dir)] == ["c", "b", "a"]


def test_a_runs_dir_that_cant_be_written_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "runs"
    blocker.write_text("a file")
    for runs_dir in (blocker, blocker / "deeper"):
        assert refusal(runs_dir) == (f"runs_dir={runs_dir}: {blocker} can't be written; choose another runs_dir")
    assert tree(tmp_path) == {"runs": b"a file"}


def test_an_artifact_is_located_or_said_to_be_missing(tmp_path: Path) -> None:
    run = finished(tmp_path, artifacts={"model": "model"})
    assert run.artifact("model") == f"{tmp_path}/a/model"
    with pytest.raises(RunError, match="a: the run is interrupted and has no predictions; finish it with resume=true"):
        run.artifact("predictions")


def test_progress_that_cant_be_read_is_none(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert read_progress(folder) is None
    folder.write(PROGRESS, b'{"step"')
    assert read_progress(folder) is None
    folder.write(PROGRESS, b'{"step": 3}')
    assert read_progress(folder) == {"step": 3}
