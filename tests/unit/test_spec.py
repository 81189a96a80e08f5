"""A spec is a job as a file: every value comes back as it was, and whoever runs it twice goes on with one run."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftstack.cli import main
from graftstack.cluster.launching import await_owner, check
from graftstack.config.compose import compose_job
from graftstack.config.jobs import JOBS
from graftstack.config.plain import to_plain
from graftstack.config.schema import FinetuneConfig
from graftstack.config.spec import Spec, from_bytes, run_name, to_bytes
from graftstack.errors import ConfigError, RunError
from graftstack.runs import Manifest, Run, find_run
from graftstack.storage import Folder

Capture = pytest.CaptureFixture[str]

STRANGE = "$HOME ${seed} `id` \"two\" 'one' ; && | \\ \n\t é 漢字 🙂 #!*?~ \x7f"

OVERRIDES = {
    "finetune": ["optimizer.lr=1", "freeze_depth=all", "early_stop=3"],
    "pretrain": ["data.classes=[1,2]", "cluster.num_workers=[1,2]"],
    "sweep": ["space.lr=[1e-3,1e-2]", "space.freeze_depth=[2,all]", "space.batch_size=[32]", "space.epochs=[1]"],
    "stack": ["base_models=[{RandomForestClassifier:{class_weight:{0:1,1:2.5},name:forest}},{probe:{}}]"],
    "meta": ["eval.num_ways=[5,20]"],
    "pipeline": ["space.lr=[1e-3]", "base_models=[SVC]", "on_error=drop"],
}
SMALL = ("data=digits", "data.image_size=8", "backbone=conv4", "epochs=0", "cluster=inline")


def spec_of(job: str, *overrides: str) -> Spec:
    config = compose_job(job, overrides)
    named = replace(config, name=run_name(job, config), resume=True)
    return Spec(job=job, config=named, overrides=list(overrides))


@pytest.mark.parametrize("job", JOBS)
def test_every_job_comes_back_as_it_was(job: str) -> None:
    spec = spec_of(job, *OVERRIDES[job])
    content = to_bytes(spec)
    again = from_bytes(content)
    assert again == spec
    assert to_plain(again.config) == to_plain(spec.config)
    assert to_bytes(again) == content == to_bytes(spec_of(job, *OVERRIDES[job]))


def test_the_order_in_which_a_space_was_written_is_kept() -> None:
    """It is the order of trials."""
    spec = spec_of("sweep", *OVERRIDES["sweep"])
    assert isinstance(again := from_bytes(to_bytes(spec)).config, JOBS["sweep"])
    assert list(vars(again)["space"]) == ["lr", "freeze_depth", "batch_size", "epochs"]


@pytest.mark.parametrize("text", [STRANGE, "\udcff of no encoding", "", "null", "[1,2]", "1e-3", " "])
def test_text_is_text_whatever_it_holds(text: str) -> None:
    config = FinetuneConfig(name="x", resume=True)
    config = replace(config, data=replace(config.data, label=text, drop=[text]))
    spec = Spec(job="finetune", config=config, overrides=[f"data.label={text}"])
    assert from_bytes(to_bytes(spec)) == spec


def test_a_file_is_plain_ascii_in_the_order_of_its_keys() -> None:
    content = to_bytes(spec_of("finetune", f"data.label={STRANGE}", "data=csv", "data.path=x.csv"))
    text = content.decode("ascii")
    found = json.loads(text)
    assert text.endswith("}\n")
    assert list(found) == sorted(found)
    assert list(found["config"]["data"]) == sorted(found["config"]["data"])
    assert found["config"]["data"]["label"] == STRANGE


def changed(spec: Spec, *path: str, to: Any) -> bytes:
    """Returns the file of a spec with another value at a place."""
    content = json.loads(to_bytes(spec))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec",), 2, "spec=2: this version reads 1; use the graftstack that wrote it"),
        (("job",), "finetuen", "job=finetuen: unknown; did you mean finetune"),
        (("job",), ["finetune"], "job=['finetune']: isn't str; correct it"),
        (("job",), "sweep", "space is empty: a sweep needs something to vary"),
        (("more",), 1, "no spec: config, job, overrides and spec are its keys"),
        (("overrides",), "seed=1", "overrides='seed=1': isn't a list; correct it"),
        (("overrides",), [1], "overrides[0]=1: isn't str; correct it"),
        (("config",), [], "config=[]: isn't a section; correct it"),
        (("config", "epoch"), 1, "config.epoch: unknown key; use the graftstack that wrote it"),
        (("config", "epochs"), "3", "config.epochs='3': isn't int; correct it"),
        (("config", "epochs"), True, "config.epochs=True: isn't int; correct it"),
        (("config", "epochs"), -1, "epochs=-1: must be at least 0; raise it"),
        (("config", "augment"), "some", "config.augment='some': isn't Augment; correct it"),
        (("config", "data", "path"), 5, "config.data.path=5: isn't str | None; correct it"),
        (("config", "data", "drop"), [5], "config.data.drop[0]=5: isn't str; correct it"),
        (("config", "data"), None, "config.data=None: isn't a section; correct it"),
        (("config", "seed"), {"$pairs": 5}, "config: can't be read ("),
        (("config", "seed"), {"$pairs": [[[], 5]]}, "config: can't be read ("),
        (("config", "name"), None, "resume=true: which run? add name=RUN"),
        (("config", "resume"), False, "config: what may run twice needs a name and resume=true; set both"),
        (("config", "name"), "a/b", "name='a/b': a run name has 1 to 200 bytes"),
    ],
)
def test_what_is_no_spec_is_refused_in_one_line(path: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_bytes(changed(spec_of("finetune"), *path, to=value))
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"spec: 1", b"null"])
def test_what_is_no_json_object_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigError, match="no spec: "):
        from_bytes(content)


def test_what_an_older_version_didnt_say_has_its_default() -> None:
    content = json.loads(to_bytes(spec_of("finetune", "epochs=3")))
    del content["config"]["early_stop"]
    assert from_bytes(json.dumps(content).encode()) == spec_of("finetune", "epochs=3")


def test_a_run_is_named_after_all_that_the_configuration_says() -> None:
    def name(job: str, *overrides: str) -> str:
        return run_name(job, compose_job(job, overrides))

    plain = name("finetune")
    assert plain == name("finetune")
    assert plain.startswith("finetune-")
    assert len(plain) == len("finetune-") + 10
    others = [("pretrain",), ("finetune", "seed=1"), ("finetune", "data.val_fraction=0.3"), ("finetune", "runs_dir=x")]
    assert len({plain, *(name(*words) for words in others)}) == 5
    one, other = "space.lr=[1]", "space.epochs=[1]"
    assert name("sweep", one, other) != name("sweep", other, one)
    assert name("finetune", "name=mine") == "mine"
    assert run_name("finetune", spec_of("finetune").config) == plain


def written(tmp_path: Path, *overrides: str, job: str = "finetune") -> Path:
    path = tmp_path / "spec.json"
    path.write_bytes(to_bytes(spec_of(job, f"runs_dir={tmp_path}/runs", *overrides)))
    return path


def complaint(capsys: Capture, *words: str | Path) -> str:
    assert main(list(map(str, words))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("graftstack: ")


def test_a_job_runs_from_its_file_and_runs_once(tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path, *SMALL)
    assert main(["finetune", "--spec", str(path)]) == 0
    folder = capsys.readouterr().out.strip()
    run = find_run(folder, "")
    assert run.manifest.status == "done"
    assert set(SMALL) <= set(run.manifest.overrides)
    assert run.manifest.config == to_plain(from_bytes(path.read_bytes()).config)
    before = {file: file.stat().st_mtime_ns for file in Path(folder).rglob("*")}
    assert main(["finetune", f"--spec={path}"]) == 0
    assert capsys.readouterr().out.strip() == folder
    assert {file: file.stat().st_mtime_ns for file in Path(folder).rglob("*")} == before


def test_a_file_that_cant_be_run_is_refused_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path)
    assert complaint(capsys, "sweep", "--spec", path) == (
        f"--spec {path}: holds a finetune job; use graftstack finetune --spec"
    )
    assert complaint(capsys, "finetune", "--spec", path, "epochs=3") == (
        f"--spec {path}: says all of a job; leave epochs=3 out"
    )
    assert complaint(capsys, "finetune", "--spec", tmp_path / "no").startswith(f"--spec {tmp_path}/no: can't be read (")
    path.write_text("{}")
    assert complaint(capsys, "finetune", "--spec", path).startswith(f"--spec {path}: no spec: ")
    assert not (tmp_path / "runs").exists()


def begun_elsewhere(tmp_path: Path, name: str, *, beat: float, runs_dir: str = "runs") -> Folder:
    """Returns the folder of a run that a process on another host works on, or did."""
    config = to_plain(from_bytes((tmp_path / "spec.json").read_bytes()).config)
    manifest = Manifest(job="finetune", name=name, status="running", config=config, started="2026-01-01T00:00:00+00:00")
    run = Run.start(str(tmp_path / runs_dir), manifest, resume=False)
    run.update(process={"host": "a-lost-head", "pid": 5, "born": "1", "beat": beat})
    return run.folder


def test_a_run_whose_host_was_lost_a_moment_ago_is_taken_over(tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path, *SMALL, "name=lost")
    begun_elsewhere(tmp_path, "lost", beat=time.time() - 59.5)
    assert main(["finetune", "--spec", str(path)]) == 0
    assert capsys.readouterr().err.startswith(
        "lost: process 5 on a-lost-head worked on it a moment ago; waiting until it has been silent for long enough"
    )
    assert find_run("lost", str(tmp_path / "runs")).manifest.status == "done"


class Looks:
    """Stands for the time between looks at a run, in which its process does something."""

    def __init__(self, folder: Folder, *, beats: bool) -> None:
        self.run, self.beats, self.num, self.said = Run.open(folder), beats, 0, [""]

    def sleep(self, seconds: float) -> None:
        self.num += 1
        process = self.run.manifest.process
        if self.beats:
            self.run.update(process={**process, "beat": time.time()})
        elif self.num == 7:
            self.run.update(process={**process, "beat": time.time() - 61})


def test_a_run_that_is_worked_on_elsewhere_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, *SMALL, "name=busy")
    folder = begun_elsewhere(tmp_path, "busy", beat=time.time())
    looks = Looks(folder, beats=True)
    await_owner(from_bytes(path.read_bytes()).config, say=looks.said.append, sleep=looks.sleep)
    assert looks.num == 1
    with pytest.raises(RunError, match="name=busy: process 5 on a-lost-head works on it; wait for it, or stop it"):
        check("finetune", from_bytes(path.read_bytes()).config, [])


def test_the_wait_ends_when_the_silence_is_long_enough(tmp_path: Path) -> None:
    path = written(tmp_path, "name=silent")
    looks = Looks(begun_elsewhere(tmp_path, "silent", beat=time.time()), beats=False)
    await_owner(from_bytes(path.read_bytes()).config, say=looks.said.append, sleep=looks.sleep)
    assert looks.num == 7
    assert len(looks.said) == 2


def test_a_clock_that_is_wrong_doesnt_make_the_wait_endless(tmp_path: Path) -> None:
    path = written(tmp_path, "name=tomorrow")
    begun_elsewhere(tmp_path, "tomorrow", beat=time.time() + 86_400)
    slept: list[float] = []
    await_owner(from_bytes(path.read_bytes()).config, say=lambda _: None, sleep=slept.append)
    assert 60 < sum(slept) < 120


def test_the_parts_of_a_pipeline_are_waited_for_too(tmp_path: Path) -> None:
    path = written(tmp_path, "space.lr=[1e-3]", "name=both", job="pipeline")
    begun_elsewhere(tmp_path, "both", beat=time.time() - 90)
    looks = Looks(begun_elsewhere(tmp_path, "sweep", beat=time.time(), runs_dir="runs/both"), beats=False)
    await_owner(from_bytes(path.read_bytes()).config, say=looks.said.append, sleep=looks.sleep)
    assert looks.num == 7


def test_a_run_that_isnt_there_is_not_waited_for(tmp_path: Path) -> None:
    def sleep(_: float) -> None:
        raise AssertionError("waited")

    await_owner(spec_of("finetune", f"runs_dir={tmp_path}").config, say=lambda _: None, sleep=sleep)
