"""The command line answers at once: its exit status says how it went, and bad input is told in one line."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftstack import __version__
from graftstack.cli import main
from graftstack.config.docs import key_docs
from graftstack.config.jobs import JOBS
from graftstack.config.paths import jobs_dir
from graftstack.config.plain import to_plain
from graftstack.runs import MANIFEST, Manifest, Run

Capture = pytest.CaptureFixture[str]

# What a job can't do without.
LEAST = {"sweep": ["space.lr=[1e-3]"], "stack": ["base_models=[GaussianNB]"], "pipeline": ["space.lr=[1e-3]"]}


@pytest.fixture(autouse=True)
def quiet_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables are as wide as they like; the command line's handler for SIGTERM goes with the test."""
    monkeypatch.setenv("COLUMNS", "200")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """Two finished runs, the older `first` and the better `second`."""
    path = tmp_path / "runs"
    for day, (name, lr, accuracy) in enumerate((("first", 1e-3, 0.5), ("second", 1e-2, 0.75)), start=1):
        config = to_plain(JOBS["finetune"](name=name)) | {"optimizer": {"name": "adamw", "lr": lr}}
        manifest = Manifest(
            job="finetune", name=name, status="running", config=config, started=f"2026-01-0{day}T10:00:00+00:00"
        )
        Run.start(str(path), manifest, resume=False).update(
            status="done", metrics={"accuracy": accuracy, "loss": 1.0}, artifacts={"model": "model"}
        )
    return path


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def complaint(capsys: Capture, *words: str) -> str:
    """Returns the one line that bad input ends in."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("graftstack: ")
    return line.removeprefix("graftstack: ")


def python(program: str, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=cwd, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: COMMAND; see graftstack --help"),
        ("trian", "argument COMMAND: invalid choice: 'trian'"),
        ("finetune epoch=3", "epoch=3: unknown key; did you mean epochs?"),
        ("finetune epochs", "epochs: not an override; write key=value"),
        ("finetune epochs=x", "epochs=x: value 'x' of type 'str' could not be converted to Integer"),
        ("finetune epochs=-1", "epochs=-1: must be at least 0; raise it"),
        ("finetune optimizer=sdg", "optimizer=sdg: unknown choice; did you mean sgd?"),
        ("finetune data=csv", "data.path is missing: data=csv needs it"),
        ("finetune backbone=resnet81", "backbone=resnet81: unknown; did you mean resnet18"),
        ("finetune resume=true", "resume=true: which run? add name=RUN"),
        ("finetune name=a/b", "name='a/b': a run name"),
        ("finetune data.path=", "data.path=: has no value; give one, or leave the key out"),
        ("finetune data.classes=0,1", "data.classes=0,1: several values; give one, or a list in brackets"),
        ("finetune name=a\x1b[2Jb", r"name='a\x1b[2Jb': a run name has 1 to 200 bytes of printable"),
        ("finetune data.path=flowers", "data.path=flowers: data=digits is bundled and reads no files; add data=image_"),
        ("finetune data.image_size=1000000", "data.image_size=1000000: must be at most 4096; lower it"),
        (
            "finetune runs_dir=~nobody-here/x",
            "~nobody-here/x: no user of that name has a home here; give the whole path",
        ),
        ("finetune cluster.cpus_per_worker=4096", "cluster.cpus_per_worker=4096: this machine has "),
        ("finetune --epochs=3", "unrecognized arguments: --epochs=3"),
        ("finetune name=first runs_dir={runs_dir}", "name=first: a run of that name exists in {runs_dir}"),
        ("pretrain name=first resume=true runs_dir={runs_dir}", "name=first: is a finetune run; resume it with the"),
        ("finetune name=x runs_dir={runs_dir}/first/run.json", "runs_dir={runs_dir}/first/run.json: "),
        ("pretrain freeze_depth=2", "freeze_depth=2: pretrain trains every group"),
        ("sweep", "space is empty: a sweep needs something to vary; add e.g. space.lr=[1e-4,1e-3,1e-2]"),
        ("sweep space.lrr=[1]", "space.lrr: unknown key; did you mean lr?"),
        ("sweep space.lr=uniform(1,2)", "space.lr=uniform(1.0,2.0): search=grid needs values; give a list, or add"),
        ("stack", "base_models is empty: a stack needs something to stack; add e.g. "),
        ("stack base_models=GaussianNB", "base_models=GaussianNB: "),
        (
            "stack base_models=[SVC,SVC]",
            "base_models: two base models are called SVC; give one another name, as in ",
        ),
        ("stack base_models=[SVC] mode=bags", "mode=bags: "),
        ("stack base_models=[SVC] folds.num=1", "folds.num=1: must be at least 2; raise it"),
        ("stack base_models=[SVC] levels=0", "levels=0: must be at least 1; raise it"),
        ("stack base_model=[SVC]", "base_model=[SVC]: unknown key; did you mean base_models, "),
        ("stack base_models=[SVC] time_limit_s=-1", "time_limit_s=-1.0: must be greater than 0"),
        ("stack from_sweep=first runs_dir={runs_dir}", "from_sweep=first: a finetune run; give a sweep, or use base_m"),
        ("stack from_sweep=third runs_dir={runs_dir}", "from_sweep=third: no such run in {runs_dir}; "),
        ("stack base_models=[run:third] runs_dir={runs_dir}", "run:third: no such run in {runs_dir}; "),
        ("finetune --check-leakage", "--check-leakage: looks into a stack; use graftstack stack --check-leakage, not"),
        ("pipeline", "space is empty: a sweep needs something to vary; add e.g. space.lr="),
        ("pipeline space.lr=[1] top=0", "top=0: must be at least 1; raise it"),
        ("pipeline space.lr=[1] from_sweep=first", "from_sweep=first: unknown key; "),
        ("plan", "the following arguments are required: job, key=value; see graftstack plan --help"),
        ("plan nope", "argument job: invalid choice: 'nope'"),
        ("plan finetune epoch=3", "epoch=3: unknown key; did you mean epochs?"),
        ("plan pretrain backbone=resnet81", "backbone=resnet81: unknown; did you mean resnet18"),
        ("predict", "the following arguments are required: "),
        ("predict first digits", "the following arguments are required: --out"),
        ("plan stack base_models=[]", "base_models is empty: a stack needs something to stack; "),
        ("predict third digits --out x.parquet --runs-dir {runs_dir}", "third: no such run in {runs_dir}; "),
        ("evaluate third --runs-dir {runs_dir}", "third: no such run in {runs_dir}; "),
        ("evaluate first --split nope", "argument --split: invalid choice: 'nope'"),
        ("runs shwo", "argument action: invalid choice: 'shwo'"),
        ("runs show --runs-dir {runs_dir}", "runs show: takes one run; see graftstack runs --help"),
        ("runs show first second --runs-dir {runs_dir}", "runs show first second: takes one run"),
        ("runs list first --runs-dir {runs_dir}", "runs list first: takes no run"),
        ("runs compare first --runs-dir {runs_dir}", "runs compare first: takes two runs or more"),
        ("runs show frist --runs-dir {runs_dir}", "frist: no such run in {runs_dir}; did you mean first?"),
        ("runs compare first frist --runs-dir {runs_dir}", "frist: no such run in {runs_dir}; did you mean first?"),
        ("runs --runs-dir nosuch://x", "nosuch://x: can't be reached"),
        ("demo --runs-dir s3://bucket/runs", "--runs-dir s3://bucket/runs: the demo's runs lie on a disk; give a path"),
        (
            "runs --runs-dir {runs_dir}/first/run.json",
            "runs_dir={runs_dir}/first/run.json: a file, not a folder; choose",
        ),
        ("runs show a\x1b[2Jb --runs-dir {runs_dir}", r"a\x1b[2Jb: no such run in {runs_dir}"),
        ("demo --runs-dir {runs_dir}/first/run.json", "--runs-dir {runs_dir}/first/run.json: a file, not a folder; "),
    ],
)
def test_bad_input_ends_in_one_line_and_changes_nothing(
    runs_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(runs_dir.parent)
    before = tree(runs_dir.parent)
    assert complaint(capsys, *words.format(runs_dir=runs_dir).split()).startswith(message.format(runs_dir=runs_dir))
    assert tree(runs_dir.parent) == before


def test_verbose_shows_where_bad_input_was_met(capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert main(["finetune", "-v", "epoch=3"]) == 2
    assert capsys.readouterr().err == "graftstack: epoch=3: unknown key; did you mean epochs?\n"
    assert "Traceback (most recent call last)" in caplog.text


@pytest.mark.parametrize(
    "words",
    ["finetune -v epoch=3", "finetune epoch=3 -v", "finetune seed=1 -v epoch=3", "plan finetune --json epoch=3"],
)
def test_options_may_stand_anywhere(capsys: Capture, words: str) -> None:
    assert main(words.split()) == 2
    assert "epoch=3: unknown key" in capsys.readouterr().err


def test_names_may_stand_after_options(runs_dir: Path, capsys: Capture) -> None:
    for words in (["--json", "show", "first"], ["show", "--json", "first"], ["show", "first", "--json"]):
        assert main(["runs", "--runs-dir", str(runs_dir), *words]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == "first"


@pytest.mark.parametrize("command", ["", "plan", "predict", "evaluate", "runs", "demo", "doctor"])
def test_every_command_explains_itself(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: graftstack {command}".rstrip())
    assert captured.err == ""


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_job_explains_its_keys(capsys: Capture, job: str, flag: str) -> None:
    assert main([job, "epochs=3", flag]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: graftstack {job} [key=value ...]")
    assert [doc.key for doc in key_docs(JOBS[job]) if f"    {doc.key}={doc.default} " not in text] == []


def test_the_version_is_the_packages(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"graftstack {__version__}\n"


def test_runs_are_listed_oldest_first(runs_dir: Path, capsys: Capture) -> None:
    assert main(["runs", "--runs-dir", str(runs_dir)]) == 0
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["name", "job", "status", "accuracy", "seconds", "started", "(UTC)"]
    assert [row[:4] for row in rows] == [
        ["first", "finetune", "done", "0.5000"],
        ["second", "finetune", "done", "0.7500"],
    ]


def test_the_list_of_runs_as_json_holds_each(runs_dir: Path, capsys: Capture) -> None:
    assert main(["runs", "list", "--json", "--runs-dir", str(runs_dir)]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["first", "second"]


def test_a_folder_without_runs_says_so(tmp_path: Path, capsys: Capture) -> None:
    assert main(["runs", "--runs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert main(["runs", "--json", "--runs-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_folder_may_be_called_like_markup(tmp_path: Path, capsys: Capture) -> None:
    assert main(["runs", "--runs-dir", f"{tmp_path}/[bold]/[/x]:smile:"]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}/[bold]/[/x]:smile:\n"


def test_a_run_shown_as_json_has_the_keys_of_the_contract(runs_dir: Path, capsys: Capture) -> None:
    assert main(["runs", "show", "second", "--json", "--runs-dir", str(runs_dir)]) == 0
    shown = json.loads(capsys.readouterr().out)
    contract = {"job", "name", "status", "config", "metrics", "started", "seconds", "artifacts"}
    assert shown.keys() == contract | {"details", "error"}
    assert (shown["job"], shown["name"], shown["status"]) == ("finetune", "second", "done")
    assert shown["config"]["optimizer"]["lr"] == 1e-2
    assert shown["metrics"] == {"accuracy": 0.75, "loss": 1.0}
    assert shown["started"] == "2026-01-02T10:00:00+00:00"
    assert shown["seconds"] >= 0
    assert shown["artifacts"] == {"model": "model"}


def test_a_run_is_shown_by_name_and_by_path(runs_dir: Path, capsys: Capture) -> None:
    assert main(["runs", "show", "first", "--runs-dir", str(runs_dir)]) == 0
    by_name = capsys.readouterr().out
    assert main(["runs", "show", str(runs_dir / "first")]) == 0
    assert capsys.readouterr().out == by_name
    assert re.search(r"accuracy +0\.5000", by_name)
    assert re.search(r"model +model", by_name)


def test_compared_runs_show_their_metrics_and_only_the_keys_that_differ(runs_dir: Path, capsys: Capture) -> None:
    assert main(["runs", "compare", "first", "second", "--runs-dir", str(runs_dir)]) == 0
    rows = {words[0]: words[1:] for words in map(str.split, capsys.readouterr().out.splitlines()) if words}
    assert rows.keys() == {"first", "accuracy", "loss", "seconds", "optimizer.lr"}
    assert rows["accuracy"] == ["0.5000", "0.7500"]
    assert rows["optimizer.lr"] == ["0.0010", "0.0100"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_with_130(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "a").mkdir()
    pipe = tmp_path / "a" / MANIFEST
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "graftstack", "runs", "--runs-dir", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        with pipe.open("w"):  # opens once the command reads it, and so waits
            process.send_signal(number)
            assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "graftstack: interrupted\n"


def test_an_interrupt_waits_until_a_module_is_imported(tmp_path: Path) -> None:
    (tmp_path / "swallower.py").write_text("""
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
    print("whole")
except KeyboardInterrupt:
    print("swallowed")
""")
    program = f"""
import sys, time
from graftstack.cli import _interruptible
sys.path.insert(0, {str(tmp_path)!r})
try:
    with _interruptible():
        import swallower
        time.sleep(30)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert python(program).stdout.split() == ["whole", "interrupted"]


def test_a_full_stdout_is_told_in_one_line(runs_dir: Path) -> None:
    for flags in ([], ["--json"]):
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "graftstack", "runs", "--runs-dir", str(runs_dir), *flags]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert done.stderr == "graftstack: stdout: no space left; free some, or write elsewhere\n"


def test_a_name_that_the_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "graftstack", "runs", "--runs-dir", f"{tmp_path}/ö"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"no runs in {tmp_path}/\\xf6\n", "")


def test_a_closed_stdout_is_no_trouble(runs_dir: Path) -> None:
    command = f"{sys.executable} -m graftstack runs --runs-dir {runs_dir} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_leaves_is_no_trouble(runs_dir: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is buffered fails only at the end
    command = [sys.executable, "-m", "graftstack", "runs", "--runs-dir", str(runs_dir), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_mistake_is_told_before_torch_or_ray_are_loaded(tmp_path: Path) -> None:
    program = """
import sys
import graftstack
heavy = {"torch", "torchvision", "ray", "sklearn", "pyarrow"}
print(*sorted((heavy | {"hydra", "rich", "yaml"}) & sys.modules.keys()))
from graftstack.cli import main
jobs = ["finetune", "pretrain"]
print(*(main([*plan, job, "backbone=nope"]) for plan in ([], ["plan"]) for job in jobs))
print(main(["sweep"]), main(["sweep", "space.lr=[0]"]), main(["sweep", "--help"]))
print(main(["stack"]), main(["stack", "base_models=[A,A]"]), main(["pipeline"]), main(["stack", "--help"]))
print(main(["runs"]), main(["runs", "show", "nope"]), main(["evaluate", "nope"]), main(["finetune", "--help"]))
print(*sorted(heavy & sys.modules.keys()))
"""
    done = python(program, cwd=tmp_path)
    first, second, *_, before_last, last = done.stdout.splitlines()
    assert (first, second, before_last, last) == ("", "2 2 2 2", "0 2 2 0", "")
    assert "2 2 0" in done.stdout.splitlines()
    assert [line.split()[2] for line in done.stderr.splitlines()] == [
        *(["unknown;"] * 4 + ["is", "must"] + ["is", "two", "is"] + ["no"] * 2)
    ]
    assert tree(tmp_path) == {}


def test_there_is_a_script_for_each_job() -> None:
    assert {path.stem for path in jobs_dir().glob("*.py")} == set(JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_a_jobs_script_is_the_same_job(tmp_path: Path, job: str) -> None:
    script = [sys.executable, str(jobs_dir() / f"{job}.py"), "backbone=nope", *LEAST.get(job, [])]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("graftstack: backbone=nope: unknown; ")
