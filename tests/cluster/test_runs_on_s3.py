"""Runs and taps on a server that speaks S3: equal to the bit to those on a disk, and resumed from them alone."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from graftstack.cli import main
from graftstack.storage import Folder

pytestmark = pytest.mark.timeout(300)

DIGITS = ("data=digits", "data.classes=[0,1,2]", "backbone=conv4", "batch_size=32")
INLINE = ("cluster=inline", "cluster.cpus_per_worker=1")

Capture = pytest.CaptureFixture[str]


class Case(NamedTuple):
    """A job, and the request in which it is killed."""

    words: tuple[str, ...]
    hold: str
    """What keeps the request that never gets its answer: a number and a pattern."""
    done: tuple[str, ...]
    """Patterns of what is finished by then: what it wrote is never written again."""


CASES = {
    "finetune": Case(
        ("finetune", *DIGITS, "data.image_size=8", "epochs=3", "freeze_depth=2"),
        hold="1 PUT .*/checkpoints/step-000000026.json",
        done=("/checkpoints/best/step-000000001", "/checkpoints/step-000000013"),
    ),
    "sweep": Case(
        ("sweep", *DIGITS, "data.image_size=16", "epochs=3", "space.freeze_depth=[2,4]", "space.lr=[1e-3,1e-2]"),
        hold="2 PUT .*/trials/0000..json",
        done=("/taps/", "/trials/00000.json"),
    ),
    "stack": Case(
        (
            *("stack", "data=digits", "data.image_size=8", "data.classes=[0,1,2]", "folds.num=2"),
            "base_models=[GaussianNB,DecisionTreeClassifier]",
        ),
        hold="3 PUT .*/ledger/.*json",
        done=("/ledger/.*json",),
    ),
    "meta": Case(
        (
            *("meta", "data=digits", "data.image_size=16", "backbone=conv4", "num_ways=2", "num_queries=3"),
            *("eval.num_episodes=10", "eval.num_val_episodes=4", "eval.val_fraction=0.2", "num_episodes=6"),
            *("eval.every_episodes=3", "checkpoint.every_steps=2"),
        ),
        hold="1 PUT .*/checkpoints/step-000000004.json",
        done=("/checkpoints/step-000000002",),
    ),
    "pipeline": Case(
        ("pipeline", *DIGITS, "data.image_size=16", "epochs=1", "space.freeze_depth=[2,4]", "folds.num=2"),
        hold="2 PUT .*/stack/ledger/.*json",
        done=("/taps/", "/sweep/", "/ledger/.*json"),
    ),
}


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folder]:
    """Returns the folder of a run on this machine's disk, unbroken: what all others are to equal."""
    place = tmp_path_factory.mktemp("disk")

    def run(job: str) -> Folder:
        folder = Folder(place / "runs" / job)
        if not folder.exists():
            assert main(words(job, f"{place}/runs", f"{place}/taps")) == 0
        return folder

    return run


def words(job: str, runs_dir: str, taps: str, *more: str) -> list[str]:
    """Returns what runs a case under its own name."""
    where = [f"runs_dir={runs_dir}", f"name={job}", *INLINE]
    return [*CASES[job].words, *where, *([] if job == "finetune" else [f"taps.location={taps}"]), *more]


def on_s3(s3: Any, job: str, *more: str) -> list[str]:
    return words(job, f"{s3.uri}/runs", f"{s3.uri}/taps", *more)


def files_of(folder: Folder) -> dict[str, Any]:
    """Returns what a run leaves, by name, but for times and places: models byte for byte, tables without seconds."""
    found: dict[str, Any] = {}
    for name in folder.names():
        if name in ("config.yaml", "plan.json", "progress.json", "trials", "ledger"):
            continue
        if name == "run.json":
            manifest = json.loads(folder.read(name))
            found[name] = {key: manifest[key] for key in ("status", "metrics", "artifacts", "error")}
        elif name.endswith(".parquet"):
            table = pq.read_table(BytesIO(folder.read(name)))
            found[name] = table.drop_columns([column for column in table.column_names if "_s" in column[-6:]])
        elif name.endswith(".safetensors"):
            found[name] = folder.read(name)
        elif name.endswith(".skops"):
            found[name] = parts_of(folder.read(name))
        elif "." not in name:
            found |= {f"{name}/{inner}": content for inner, content in files_of(folder / name).items()}
    return found


def parts_of(skops: bytes) -> list[bytes]:
    """Returns what a scikit-learn model consists of, without the addresses in memory that it was written from."""
    with ZipFile(BytesIO(skops)) as archive:
        return sorted(
            re.sub(rb'(?<="__id__": )\d+|\d+(?=\.npy")', b"", archive.read(name)) for name in archive.namelist()
        )


def uploads(s3: Any) -> list[Any]:
    """Returns what is uploaded in parts and not yet whole."""
    return list(s3.fs.call_s3("list_multipart_uploads", Bucket=s3.bucket).get("Uploads", []))


def written(requests: Sequence[str]) -> list[str]:
    return [request for request in requests if request.startswith("PUT")]


class Machine:
    """A machine with nothing on it: an empty home, cache and temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("home", "cache", "tmp", "work"):
            (folder / name).mkdir(parents=True)
        self.environ = {
            **os.environ,
            "HOME": f"{folder}/home",
            "GRAFTSTACK_CACHE": f"{folder}/cache",
            "TMPDIR": f"{folder}/tmp",
            "AWS_MAX_ATTEMPTS": "2",
        }
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Starts a job as a person does."""
        return self.run("-m", "graftstack", *words)

    def run(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts Python."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder / "work",
            env=self.environ,
            # A shell that runs the tests in the background makes them, and so their children, ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()

    @property
    def temporary(self) -> list[str]:
        """What lies in the temporary folder but the cache of compiled code that torch makes for each user."""
        names = (path.name for path in (self.folder / "tmp").iterdir())
        return sorted(name for name in names if not name.startswith("torchinductor_"))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    """Makes machines by name; their processes don't outlive the test."""
    made: dict[str, Machine] = {}

    def make(name: str) -> Machine:
        if name not in made:
            made[name] = Machine(tmp_path / name)
        return made[name]

    yield make
    for each in made.values():
        each.close()


def await_held(s3: Any, process: subprocess.Popen[str]) -> None:
    """Waits until the request has arrived that gets no answer."""
    deadline = time.monotonic() + 120
    while not s3.ask("held"):
        if process.poll() is not None:
            pytest.fail(f"it ended before: {process.communicate()[1]}")
        assert time.monotonic() < deadline
        time.sleep(0.05)


# To the bit


@pytest.mark.parametrize("job", CASES)
def test_a_job_ends_as_it_does_on_a_disk(s3: Any, on_disk: Callable[[str], Folder], capsys: Capture, job: str) -> None:
    assert main(on_s3(s3, job)) == 0, capsys.readouterr().err
    found, wanted = files_of(Folder(f"{s3.uri}/runs/{job}")), files_of(on_disk(job))
    assert any(name.endswith((".safetensors", ".skops")) for name in found)
    assert found == wanted
    assert uploads(s3) == []
    if job != "finetune":
        assert sum(name.endswith(".arrow") for name in s3.fs.find(f"{s3.bucket}/taps")) == {
            "sweep": 6,
            "pipeline": 6,
        }.get(job, 0)


@pytest.mark.parametrize("job", CASES)
def test_a_job_that_was_killed_goes_on_from_storage_alone(
    s3: Any, on_disk: Callable[[str], Folder], machine: Callable[[str], Machine], job: str
) -> None:
    case = CASES[job]
    s3.ask(f"hold {case.hold}")
    driver = machine("lost").start(*on_s3(s3, job))
    await_held(s3, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    s3.ask("release")
    before = {line.partition("?")[0] for line in written(s3.requests()[:-1])}
    finished = [line for line in before if any(re.search(pattern, line) for pattern in case.done)]
    assert finished

    again = machine("new").start(job, f"name={job}", "resume=true", f"runs_dir={s3.uri}/runs")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert not re.search("Traceback|nclosed|destroyed", err)
    assert not set(written(s3.requests())) & set(finished)
    assert files_of(Folder(f"{s3.uri}/runs/{job}")) == files_of(on_disk(job))
    assert uploads(s3) == []
    assert machine("lost").temporary == machine("new").temporary == []


# Whatever names a run or data


def printed(capsys: Capture, *words: str) -> str:
    """Returns what a command that succeeds prints."""
    capsys.readouterr()
    assert main(words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def complaint(capsys: Capture, *words: str) -> str:
    """Returns the one line that bad input ends in."""
    capsys.readouterr()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_runs_are_named_by_uri_or_by_name(s3: Any, capsys: Capture, tmp_path: Path) -> None:
    runs, common = f"{s3.uri}/runs", [*DIGITS, *INLINE, "data.image_size=16", "epochs=1", f"runs_dir={s3.uri}/runs"]
    where = ["--runs-dir", runs]
    assert main(["finetune", *common, "name=base", "freeze_depth=2"]) == 0
    assert main(["sweep", *common, "name=wide", f"taps.location={s3.uri}/taps", "space.freeze_depth=[2,4]"]) == 0

    assert {"base", "wide"} <= set(printed(capsys, "runs", *where).split())
    by_name = json.loads(printed(capsys, "runs", "show", "base", "--json", *where))
    assert by_name == json.loads(printed(capsys, "runs", "show", f"{runs}/base", "--json"))
    assert by_name["artifacts"]["model"] == "model"
    assert len(json.loads(printed(capsys, "runs", "show", f"{runs}/wide", "--json"))["trials"]) == 2
    assert "freeze_depth" in printed(capsys, "runs", "compare", "base", f"{runs}/wide", *where)

    measured = json.loads(printed(capsys, "evaluate", f"{runs}/base", "--json"))
    assert measured["accuracy"] == by_name["metrics"]["accuracy"]
    assert json.loads(printed(capsys, "evaluate", "base", "--json", *where)) == measured
    for out in (f"{s3.uri}/out/predictions.parquet", f"{tmp_path}/predictions.parquet"):
        assert printed(capsys, "predict", "base", "digits", "--out", out, *where).split() == [out]
    assert s3.fs.cat_file(f"{s3.bucket}/out/predictions.parquet") == (tmp_path / "predictions.parquet").read_bytes()

    for name, run in (("by-name", "run:base"), ("by-uri", f"run:{runs}/base")):
        assert main(["finetune", *common, f"name={name}", f"backbone.weights={run}", "epochs=1"]) == 0
    assert files_of(Folder(f"{runs}/by-name")) == files_of(Folder(f"{runs}/by-uri"))
    stack = [*INLINE, "folds.num=2", f"taps.location={s3.uri}/taps"]
    assert main(["stack", *stack, f"runs_dir={runs}", "name=of-sweep", "from_sweep=wide"]) == 0
    away = [f"from_sweep={runs}/wide", f"base_models=[run:{runs}/base]"]
    assert main(["stack", *stack, f"runs_dir={tmp_path}/runs", "name=away", *away]) == 0
    assert "did you mean base?" in complaint(capsys, "runs", "show", "bas", *where)


def test_weights_and_data_are_read_from_a_bucket(s3: Any, capsys: Capture, tmp_path: Path) -> None:
    from PIL import Image
    from safetensors.torch import save_file
    from sklearn.datasets import load_digits

    from graftstack.backbones.registry import build

    digits = load_digits(n_class=3)
    local = tmp_path / "data"
    rows: dict[str, list[Any]] = {"image": [], "path": [], "label": []}
    for number, (pixels, label) in enumerate(zip(digits.images[:120], digits.target[:120], strict=True)):
        file = local / "images" / f"digit-{label}" / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).save(file)
        rows["image"].append(file.read_bytes())
        rows["path"].append(str(file.relative_to(local)))
        rows["label"].append(f"digit-{label}")
    table = pa.table(rows)
    pq.write_table(table, local / "digits.parquet")
    csv.write_csv(table.drop_columns(["image"]), local / "digits.csv")
    s3.fs.put(f"{local}/", f"{s3.bucket}/data/", recursive=True)
    weights = str(tmp_path / "conv4.safetensors")
    save_file(build("conv4").model.state_dict(), weights)
    s3.fs.put_file(weights, f"{s3.bucket}/conv4.safetensors")

    sources = {
        "images": ("data=image_folder", "data.path={}/images"),
        "parquet": ("data=parquet", "data.path={}/digits.parquet", "data.image=image", "data.label=label"),
        "csv": ("data=csv", "data.path={}/digits.csv", "data.image=path", "data.label=label"),
    }
    for name, words in sources.items():
        found = []
        for place, file in ((f"{s3.uri}/data", f"{s3.uri}/conv4.safetensors"), (str(local), weights)):
            runs_dir = tmp_path / f"runs-{len(found)}"
            given = [word.format(place) for word in words]
            model = ["backbone=conv4", f"backbone.weights={file}", "data.image_size=8", "batch_size=32", "epochs=1"]
            assert main(["finetune", *given, *model, *INLINE, f"runs_dir={runs_dir}", f"name={name}"]) == 0
            found.append(files_of(Folder(runs_dir / name)))
        assert found[0] == found[1]
    predict = ["predict", f"{tmp_path}/runs-0/images", f"{s3.uri}/data/digits.parquet"]
    assert printed(capsys, *predict, "--out", f"{tmp_path}/predictions.parquet")
    assert pq.read_metadata(tmp_path / "predictions.parquet").num_rows == 120


# Faults


@pytest.fixture
def tuned(s3: Any) -> list[str]:
    """What fine-tunes with its run in the bucket."""
    return on_s3(s3, "finetune")


def test_a_bucket_that_isnt_there_is_named_before_anything_starts(s3: Any, capsys: Capture) -> None:
    none = f"{s3.uri}-none"
    fault = ": there is no such bucket; make it, or choose another one"
    assert complaint(capsys, *words("finetune", f"{none}/runs", "")).endswith(f"{none}/runs/finetune{fault}")
    for job in ("sweep", "stack", "meta", "pipeline"):
        line = complaint(capsys, *words(job, f"{s3.uri}/runs", f"{none}/taps"))
        assert line.endswith(f"taps.location={none}/taps{fault}")
    for command in (["runs"], ["runs", "show", "x"], ["predict", "x", "digits", "--out", "x.parquet"]):
        assert complaint(capsys, *command, "--runs-dir", f"{none}/runs").endswith(f"{none}/runs{fault}")
    data = ["data=parquet", f"data.path={none}/x.parquet", "data.image=image"]
    assert f"data.path={none}/x.parquet" in complaint(capsys, *words("finetune", f"{s3.uri}/runs", "", *data))
    assert s3.fs.find(s3.bucket) == []


def test_a_wrong_key_is_named_before_anything_starts(s3: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    for command in (words("finetune", f"{s3.uri}/runs", ""), ["runs", "--runs-dir", f"{s3.uri}/runs"]):
        line = complaint(capsys, *command)
        assert f"{s3.uri}/runs" in line
        assert "access is refused (" in line
        assert line.endswith("; check the credentials and their rights")


def test_a_server_that_is_down_is_named_before_anything_starts(
    s3: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.ask("down")
    try:
        for command in (words("finetune", f"{s3.uri}/runs", ""), ["runs", "--runs-dir", f"{s3.uri}/runs"]):
            line = complaint(capsys, *command)
            assert f"can't be reached (Could not connect to the endpoint URL: \"{s3.url}/" in line
            assert line.endswith("; check the address and the access")
    finally:
        s3.ask("up")
    assert s3.fs.find(s3.bucket) == []


@pytest.mark.parametrize("job", ["finetune", "sweep", "stack"])
def test_a_server_that_goes_away_ends_the_run_in_one_line_and_it_goes_on_once_it_is_back(
    s3: Any, on_disk: Callable[[str], Folder], machine: Callable[[str], Machine], capsys: Capture, job: str
) -> None:
    s3.ask(f"hold {CASES[job].hold}")
    driver = machine("driver").start(*on_s3(s3, job))
    await_held(s3, driver)
    s3.ask("down")
    try:
        s3.ask("release")
        _, err = driver.communicate(timeout=120)
    finally:
        s3.ask("up")
    assert driver.returncode == 1
    assert not re.search("Traceback|nclosed|destroyed", err)
    last = err.splitlines()[-1]
    assert "can't be reached (Could not connect to the endpoint URL" in last
    assert last.endswith("; check the address and the access, then continue with resume=true")
    assert machine("driver").temporary == []
    assert main([job, f"name={job}", "resume=true", f"runs_dir={s3.uri}/runs"]) == 0, capsys.readouterr().err
    assert files_of(Folder(f"{s3.uri}/runs/{job}")) == files_of(on_disk(job))


def test_an_interrupt_amid_an_upload_ends_the_run_at_once_and_leaves_it_resumable(
    s3: Any, on_disk: Callable[[str], Folder], machine: Callable[[str], Machine], tuned: list[str], capsys: Capture
) -> None:
    s3.ask(f"hold {CASES['finetune'].hold}")
    driver = machine("driver").start(*tuned)
    await_held(s3, driver)
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=30)
    s3.ask("release")
    assert driver.returncode == 130
    assert err.splitlines()[-1].endswith(f"graftstack finetune name=finetune resume=true runs_dir={s3.uri}/runs")
    assert not re.search("Traceback|nclosed|destroyed", err)
    assert json.loads(printed(capsys, "runs", "show", f"{s3.uri}/runs/finetune", "--json"))["status"] == "interrupted"
    assert main(["finetune", "name=finetune", "resume=true", f"runs_dir={s3.uri}/runs"]) == 0
    assert files_of(Folder(f"{s3.uri}/runs/finetune")) == files_of(on_disk("finetune"))


def test_of_two_drivers_that_begin_one_run_at_once_the_second_is_told_so(
    s3: Any, machine: Callable[[str], Machine], tuned: list[str], capsys: Capture
) -> None:
    s3.ask("hold 1 PUT .*/run.json")
    late = machine("late").start(*tuned)
    await_held(s3, late)  # it has seen that the name is free
    assert main(tuned) == 0, capsys.readouterr().err
    first = files_of(Folder(f"{s3.uri}/runs/finetune"))
    s3.ask("release")
    _, err = late.communicate(timeout=60)
    assert late.returncode == 2
    assert err.splitlines()[-1].endswith("runs/finetune/run.json: exists already; choose another name")
    assert not re.search("Traceback|nclosed|destroyed", err)
    assert files_of(Folder(f"{s3.uri}/runs/finetune")) == first


def test_of_two_drivers_that_resume_one_run_at_once_the_second_is_told_so(
    s3: Any, machine: Callable[[str], Machine], tuned: list[str], capsys: Capture
) -> None:
    assert main(tuned) == 0
    folder = Folder(f"{s3.uri}/runs/finetune")
    folder.write("run.json", json.dumps({**json.loads(folder.read("run.json")), "status": "interrupted"}).encode())
    s3.ask("hold 1 PUT .*/.resumption-1")
    resume = ["finetune", "name=finetune", "resume=true", f"runs_dir={s3.uri}/runs"]
    late = machine("late").start(*resume)
    await_held(s3, late)  # it has seen that nobody works on it
    assert main(resume) == 0, capsys.readouterr().err
    first = folder.read("run.json")
    s3.ask("release")
    _, err = late.communicate(timeout=60)
    assert late.returncode == 2
    assert "name=finetune: another process finished it a moment ago; " in err.splitlines()[-1]
    assert folder.read("run.json") == first
    assert ".resumption" not in str(s3.fs.find(s3.bucket))


def test_a_small_run_asks_little(s3: Any, tuned: list[str]) -> None:
    assert main(tuned) == 0
    requests = s3.requests()
    num_epochs, num_files = 3, len(s3.fs.find(s3.bucket))
    assert len(requests) < 4 * num_files
    listings = [request for request in requests if "list-type=2" in request]
    assert len(listings) <= 8 + 2 * num_epochs
    assert not [request for request in requests if "delimiter=&" in request], "a whole prefix was listed"


# Workers

WORKERS = """
from graftstack.cli import main
from graftstack.cluster.session import ray_session
from graftstack.config.schema import ClusterConfig

with ray_session(ClusterConfig(), verbose=False):
    assert main({sweep}) == 0
    assert main({group}) == 0
"""


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_processes_of_a_cluster_read_and_write_there_too(
    s3: Any, on_disk: Callable[[str], Folder], machine: Callable[[str], Machine]
) -> None:
    """Ray begins in a process that has the environment of this test, which its workers inherit."""
    cluster = ["cluster=local", "cluster.cpus_per_worker=1", f"runs_dir={s3.uri}/runs"]
    taps = [f"taps.location={s3.uri}/taps", "max_concurrent_trials=2"]
    sweep = [*CASES["sweep"].words, *cluster, *taps, "name=sweep"]
    group = [*CASES["finetune"].words, *cluster, "cluster.num_workers=2", "name=group"]
    machine("driver").environ["RAY_TMPDIR"] = tempfile.gettempdir()  # Ray's sockets need a short path
    driver = machine("driver").run("-c", WORKERS.format(sweep=sweep, group=group))
    _, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    assert not re.search("Traceback|nclosed|destroyed", err)
    assert files_of(Folder(f"{s3.uri}/runs/sweep")) == files_of(on_disk("sweep"))
    assert sum(name.endswith(".arrow") for name in s3.fs.find(f"{s3.bucket}/taps")) == 6
    shown = json.loads(Folder(f"{s3.uri}/runs/group").read("run.json"))
    assert shown["status"] == "done"
    assert shown["metrics"].keys() == json.loads(on_disk("finetune").read("run.json"))["metrics"].keys()
    assert ".ray" not in str(s3.fs.find(s3.bucket, withdirs=True))
    assert uploads(s3) == []
