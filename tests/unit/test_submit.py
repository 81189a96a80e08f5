"""Submitting: a retry finds the first attempt, and a log is followed to its end through lost connections."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from graftstack.cli import main
from graftstack.cluster.submission import Submission, UnreachableError
from graftstack.config.compose import compose_job
from graftstack.config.k8s import K8sConfig
from graftstack.config.plain import to_plain
from graftstack.config.spec import Spec, from_bytes, to_bytes
from graftstack.errors import ConfigError, RunError
from graftstack.runs import Manifest, Run
from graftstack.submit.following import LostError, exit_status, follow
from graftstack.submit.submissions import (
    Placed,
    Request,
    check_name,
    local_places,
    next_place,
    place,
    request,
    spec_on_cluster,
)

Capture = pytest.CaptureFixture[str]

LOG = "".join(f"line {number} é\n" for number in range(40)) + "no end of line"


def submission(name: str = "x", status: str = "RUNNING", exit_code: int | None = None, **metadata: str) -> Submission:
    return Submission(name, status, exit_code, "", metadata, 0.0, None)


class Scripted:
    """A submission whose streams and answers are written down; time passes as it is told to."""

    def __init__(self, *streams: list[str], answers: list[Any], logs: Any = LOG) -> None:
        self.streams, self.answers, self.whole = list(streams), answers, logs
        self.written, self.said = "", list[str]()
        self.now = 0.0

    def find(self) -> Submission | None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return submission(status=answer) if isinstance(answer, str) else answer

    def stream(self) -> Iterator[str]:
        yield from self.streams.pop(0)

    def logs(self) -> str:
        if isinstance(self.whole, Exception):
            raise self.whole
        return str(self.whole)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def write(self, text: str) -> None:
        assert text
        self.written += text

    def follow(self) -> Submission:
        return follow(self, write=self.write, say=self.said.append, sleep=self.sleep, clock=lambda: self.now)


def cut(text: str, at: int, size: int = 7) -> list[str]:
    """Returns the start of a text, in parts."""
    return [text[start : min(start + size, at)] for start in range(0, at, size)]


@pytest.mark.parametrize("cuts", [(len(LOG),), (0, 3, 3, 100, 99, 200), (1, len(LOG)), (50, 10, 0, 51)])
def test_a_log_is_written_once_and_in_order_however_often_it_is_cut(cuts: tuple[int, ...]) -> None:
    streams = [cut(LOG, at, size=7 + number) for number, at in enumerate(cuts)]
    source = Scripted(*streams, answers=[*["RUNNING"] * len(cuts), "SUCCEEDED"])
    assert source.follow().status == "SUCCEEDED"
    assert source.written == LOG
    assert source.streams == []


def test_what_a_stream_didnt_tell_before_the_job_was_over_is_fetched() -> None:
    source = Scripted(answers=["FAILED"])
    source.follow()
    assert source.written == LOG


@pytest.mark.parametrize("word", ["TRANSITIONING", "", "succeeded"])
def test_a_status_that_ray_doesnt_know_is_no_end(word: str) -> None:
    source = Scripted([], cut(LOG, 20), answers=["PENDING", word, "SUCCEEDED"])
    source.follow()
    assert source.written == LOG


def test_a_silent_stream_of_a_job_that_is_over_is_left() -> None:
    def endless() -> Iterator[str]:
        yield LOG[:9]
        while True:
            yield ""

    source = Scripted(answers=["RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"])
    source.streams = [endless()]  # type: ignore[list-item]
    source.follow()
    assert source.written == LOG


def test_a_cluster_that_answers_again_is_believed() -> None:
    silent = [UnreachableError("no answer")] * 100
    source = Scripted([], answers=[*silent, "RUNNING", *silent, "SUCCEEDED"])
    source.follow()
    assert source.written == LOG
    assert source.said == ["the cluster doesn't answer (no answer); trying on"] * 2


def test_a_cluster_that_never_answers_again_is_given_up() -> None:
    source = Scripted([LOG[:5]], answers=["RUNNING", UnreachableError("Connection refused")])
    with pytest.raises(
        LostError, match=r"no answer of the cluster for 120 s \(Connection refused\); the job may go on"
    ):
        source.follow()
    assert 120 < source.now < 130
    assert source.written == LOG[:5]


def test_a_submission_that_was_forgotten_is_lost() -> None:
    with pytest.raises(LostError, match="knows no such submission any more, as after a restart; submit the job again"):
        Scripted([], answers=["RUNNING", None]).follow()


def test_a_log_whose_end_cant_be_read_is_no_reason_to_fail() -> None:
    source = Scripted([LOG[:5]], answers=["RUNNING", "SUCCEEDED"], logs=UnreachableError("500: not UTF-8"))
    assert source.follow().status == "SUCCEEDED"
    assert source.said == ["x: the end of its log can't be read (500: not UTF-8)"]


def test_streams_that_bring_nothing_are_opened_less_and_less_often() -> None:
    source = Scripted(*[[]] * 40, answers=[*["RUNNING"] * 40, "SUCCEEDED"])
    source.follow()
    assert 300 < source.now < 400


@pytest.mark.parametrize(
    ("status", "exit_code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("SUCCEEDED", None, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 130, 130),
        ("FAILED", None, 1),
        ("FAILED", 0, 1),
        ("FAILED", -9, 137),
        ("STOPPED", None, 130),
        ("STOPPED", 0, 130),
    ],
)
def test_the_exit_status_is_the_jobs_own(status: str, exit_code: int | None, expected: int) -> None:
    assert exit_status(submission(status=status, exit_code=exit_code)) == expected


class MemoryServer:
    """Keeps submissions as a cluster does."""

    def __init__(self, *there: Submission, loses: bool = False) -> None:
        self.there, self.loses = list(there), loses
        self.packages: list[bytes] = []

    def submissions(self) -> list[Submission]:
        return self.there

    def find(self, submission_id: str) -> Submission | None:
        return next((one for one in self.there if one.id == submission_id), None)

    def submit(self, submission_id: str, *, entrypoint: str, package: Path, metadata: dict[str, str]) -> None:
        if self.find(submission_id) is not None:
            raise UnreachableError("500: already exists")
        self.packages.append(package.read_bytes())
        self.there.append(submission(submission_id, "PENDING", **metadata))
        if self.loses:
            raise UnreachableError("no answer in time")

    def ends(self, status: str) -> None:
        self.there[-1] = self.there[-1]._replace(status=status)


def spec(tmp_path: Path, *overrides: str, job: str = "finetune") -> Spec:
    words = [f"runs_dir={tmp_path}/runs", *overrides]
    return spec_on_cluster(job, compose_job(job, words), words)


def asked(tmp_path: Path, *overrides: str) -> Request:
    return request(spec(tmp_path, *overrides))


def test_a_job_is_made_for_the_cluster_that_it_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["runs_dir=runs", "data=csv", "data.path=x.csv", "cluster.num_workers=4", "cluster.address=elsewhere:6379"]
    found = spec_on_cluster("finetune", compose_job("finetune", words), words)
    assert to_plain(found.config.cluster) | {"kind": "ray", "address": "auto", "num_workers": 4} == to_plain(
        found.config.cluster
    )
    assert found.config.resume
    assert (found.config.name or "").startswith("finetune-")
    assert (found.config.runs_dir, found.config.data.path) == (f"{tmp_path}/runs", f"{tmp_path}/x.csv")
    assert found.overrides == [*words, "cluster=ray", "cluster.address=auto"]
    assert to_plain(compose_job("finetune", found.overrides).cluster) == to_plain(found.config.cluster)
    away = spec_on_cluster("finetune", compose_job("finetune", words), words, has_our_paths=False)
    assert (away.config.runs_dir, away.config.data.path) == ("runs", "x.csv")
    inline = spec_on_cluster("finetune", compose_job("finetune", ["cluster=inline"]), [])
    assert inline.config.cluster.kind.value == "inline"
    assert inline.overrides == []


def test_a_backbone_that_there_isnt_is_refused_here(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backbone=resnet81: unknown; did you mean resnet18"):
        spec(tmp_path, "backbone=resnet81")


def test_paths_that_all_nodes_must_reach_are_named(tmp_path: Path) -> None:
    found = spec(
        tmp_path,
        *("data=csv", "data.path=/d/x.csv", "backbone.weights=/w.pth", "data.label=/no/path", "data.cache_dir=/c"),
        *("taps.location=s3://bucket/taps", "base_models=[{probe:{weights:run:/r/one}},run:/r/two,SVC]"),
        job="stack",
    )
    assert set(local_places(found.config)) == {
        *(f"runs_dir={tmp_path}/runs", "data.path=/d/x.csv", "backbone.weights=/w.pth"),
        *("base_models=run:/r/one", "base_models=run:/r/two"),
    }
    assert local_places(spec(tmp_path, "runs_dir=s3://bucket/runs").config) == []


def test_nothing_of_the_users_is_read_by_a_shell(tmp_path: Path) -> None:
    found = asked(tmp_path, "name=$(rm) `x` ;", "data=csv", "data.path=$HOME\n", "data.label='\"")
    assert found.entrypoint == "python jobs/finetune.py --spec spec.json"
    assert found.package.names == ["jobs/finetune.py", "spec.json"]
    assert found.submission_id.replace("graftstack-finetune-", "").isalnum()


def test_a_retried_submission_finds_the_first(tmp_path: Path) -> None:
    server: Any = MemoryServer()
    first = place(asked(tmp_path), server)
    assert first == Placed(asked(tmp_path).submission_id, None)
    for status in ("PENDING", "RUNNING", "TRANSITIONING", "SUCCEEDED"):
        server.ends(status)
        again = place(asked(tmp_path), server)
        assert again.submission_id == first.submission_id
        assert again.before is not None
        assert again.before.status == status
    assert len(server.packages) == 1
    assert place(asked(tmp_path, "seed=1"), server).before is None


def test_the_same_job_in_other_words_is_the_same_submission(tmp_path: Path) -> None:
    one = asked(tmp_path, "seed=1", "data.val_fraction=0.3")
    other = asked(tmp_path, "data.val_fraction=0.3", "seed=2", "seed=1")
    assert one.spec.overrides != other.spec.overrides
    assert one.submission_id == other.submission_id
    assert one.metadata == other.metadata


def test_one_that_failed_or_was_stopped_makes_room_for_another_attempt(tmp_path: Path) -> None:
    server: Any = MemoryServer()
    base = asked(tmp_path).submission_id
    for attempt, status in ((base, "FAILED"), (f"{base}-2", "STOPPED"), (f"{base}-3", "SUCCEEDED")):
        assert next_place(asked(tmp_path), server) == Placed(attempt, None)
        assert place(asked(tmp_path), server) == Placed(attempt, None)
        server.ends(status)
    again = place(asked(tmp_path), server)
    assert again.submission_id == f"{base}-3"
    assert again.before is not None
    assert len(set(server.packages)) == 1


def test_a_submission_whose_answer_got_lost_is_found(tmp_path: Path) -> None:
    server: Any = MemoryServer(loses=True)
    found = place(asked(tmp_path), server)
    assert found.before is not None
    assert found.before.status == "PENDING"


def test_a_refusal_is_passed_on(tmp_path: Path) -> None:
    class Full(MemoryServer):
        def submit(self, submission_id: str, **more: Any) -> None:
            raise UnreachableError("500: no room")

    server: Any = Full()
    with pytest.raises(UnreachableError, match="500: no room"):
        place(asked(tmp_path), server)


def test_a_run_that_another_submission_works_on_is_refused(tmp_path: Path) -> None:
    server: Any = MemoryServer()
    first = place(asked(tmp_path, "name=mine"), server)
    for other in (asked(tmp_path, "name=mine", "seed=1"), request(spec(tmp_path, "name=mine", job="pretrain"))):
        with pytest.raises(RunError, match=f"name=mine: submission {first.submission_id} works on a run of that name"):
            place(other, server)
    assert place(asked(tmp_path, "name=mine", "seed=1", f"runs_dir={tmp_path}/others"), server).before is None
    server.there[0] = server.there[0]._replace(status="STOPPED")
    assert place(asked(tmp_path, "name=mine", "seed=2"), server).before is None


def begun(tmp_path: Path, *overrides: str, status: Any) -> None:
    found = spec(tmp_path, *overrides)
    manifest = Manifest(
        job="finetune",
        name=str(found.config.name),
        status="running",
        config=to_plain(found.config),
        started="2026-01-01T00:00:00+00:00",
    )
    Run.start(found.config.runs_dir, manifest, resume=False).update(status=status)


@pytest.mark.parametrize("status", ["done", "failed", "interrupted", "running"])
def test_a_run_of_the_same_configuration_may_be_gone_on_with(tmp_path: Path, status: str) -> None:
    begun(tmp_path, "name=mine", status=status)
    check_name(spec(tmp_path, "name=mine", "cluster.num_workers=2"))


def test_a_name_that_is_taken_is_refused_here_where_that_can_be_seen(tmp_path: Path) -> None:
    begun(tmp_path, "name=mine", status="done")
    with pytest.raises(RunError, match="seed=1: run mine was started with 0; leave the key out to continue it, or"):
        check_name(spec(tmp_path, "name=mine", "seed=1"))
    with pytest.raises(RunError, match="name=mine: is a finetune run; resume it with the finetune job"):
        check_name(spec(tmp_path, "name=mine", job="pretrain"))
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "file").touch()
    with pytest.raises(RunError, match=r"name=other: .*/runs/other exists and is no run; choose another name"):
        check_name(spec(tmp_path, "name=other"))
    check_name(spec(tmp_path, "runs_dir=nosuch://bucket/runs"))
    check_name(spec(tmp_path, "runs_dir=/not/of/this/machine"))


def test_code_that_goes_along_is_part_of_the_submission(tmp_path: Path) -> None:
    alone, together = (request(spec(tmp_path), with_code=with_code) for with_code in (False, True))
    assert "graftstack/cli.py" in together.package.names
    assert alone.submission_id != together.submission_id == request(spec(tmp_path), with_code=True).submission_id


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("submit", "submit: which job? finetune, meta, pipeline, pretrain, stack, sweep; see graftstack submit --help"),
        ("submit finetuen", "argument job: invalid choice: 'finetuen'"),
        ("submit finetune epoch=3 --to http://127.0.0.1:1", "epoch=3: unknown key; did you mean epochs?"),
        ("submit finetune k8s.image=x --to http://127.0.0.1:1", "k8s.image=x: says how a job runs on Kubernetes; add"),
        ("submit finetune --to http://127.0.0.1:1 runs_dir={runs}", "--to http://127.0.0.1:1: no Ray cluster takes "),
        ("submit finetune --to nowhere.invalid:8265 runs_dir={runs}", "--to nowhere.invalid:8265: no Ray cluster tak"),
        ("submit finetune --to 127.0.0.1:1 runs_dir={runs}", "--to 127.0.0.1:1: no Ray cluster takes jobs there (Con"),
        ("submit finetune --to ftp://127.0.0.1 runs_dir={runs}", "--to ftp://127.0.0.1: no address of a cluster; wri"),
        ("submit finetune --to http:// runs_dir={runs}", "--to http://: no address of a cluster; write http://HOST:8"),
        ("submit finetune --to http://x:99999 runs_dir={runs}", "--to http://x:99999: no address of a cluster; write "),
        ("submit stack base_models=[SVC] from_sweep=none --to x", "from_sweep=none: no such run in runs; "),
        ("jobs lits", "argument action: invalid choice: 'lits'"),
        ("jobs list x --to http://127.0.0.1:1", "jobs list x: takes no submission; see graftstack jobs --help"),
        ("jobs status --to http://127.0.0.1:1", "jobs status: takes one submission; see graftstack jobs --help"),
        ("jobs logs x y --to http://127.0.0.1:1", "jobs logs x y: takes one submission; see graftstack jobs --help"),
        ("jobs status x -f --to http://127.0.0.1:1", "jobs status x: follows nothing; use graftstack jobs logs --fo"),
        ("jobs logs x --json --to http://127.0.0.1:1", "jobs logs x: has no JSON here; leave --json out"),
        ("jobs list --json --to k8s", "jobs list: has no JSON here; leave --json out"),
        ("jobs list --namespace x --to http://127.0.0.1:1", "jobs list: a namespace and a context are Kubernetes'; "),
        ("submit finetune --to k8s", "k8s.image=: which image? "),
        (
            "submit finetune --to k8s --with-code",
            "--with-code: pods run what their image holds; build one with it, and",
        ),
        ("submit --check {runs}/job.yaml", "{runs}/job.yaml: can't be read"),
        ("submit finetune --check {runs}/job.yaml", "--check {runs}/job.yaml: looks at a file; leave finetune out"),
        ("jobs list --to http://127.0.0.1:1", "--to http://127.0.0.1:1: no Ray cluster takes jobs there (Connection"),
    ],
)
def test_bad_input_ends_in_one_line(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.format(runs=tmp_path / "runs").split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(f"graftstack: {message.format(runs=tmp_path / 'runs')}")
    assert list(tmp_path.iterdir()) == []


def test_a_token_file_that_there_isnt_is_named(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/token")
    assert main(["jobs", "--to", "http://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err.startswith("graftstack: RAY_AUTH_TOKEN_PATH=/no/token: can't be read (")


@pytest.mark.parametrize("options", [["--dry-run"], ["--dry-run", "--follow"], ["--with-code", "--dry-run"]])
def test_a_dry_run_prints_what_would_be_sent(tmp_path: Path, capsys: Capture, options: list[str]) -> None:
    words = [f"runs_dir={tmp_path}/runs", "name=mine"]
    assert main(["submit", "finetune", *options, *words, "--to", "http://127.0.0.1:1"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    sent = request(spec(tmp_path, "name=mine"), with_code="--with-code" in options)
    assert found["submission_id"] == sent.submission_id
    assert found["entrypoint"] == sent.entrypoint
    assert found["files"] == sent.package.names
    assert from_bytes(json.dumps(found["spec"]).encode()) == sent.spec
    packed, reached = captured.err.splitlines()
    assert packed.startswith(f"packed {len(sent.package.names)} files, ")
    assert reached == f"each node of the cluster must reach runs_dir={tmp_path}/runs"


def test_jobs_explains_itself(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["jobs", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: graftstack jobs")


def test_submit_explains_itself_and_every_key_of_pods(capsys: Capture) -> None:
    assert main(["submit", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: graftstack submit")
    for key in fields(K8sConfig):
        assert f"    k8s.{key.name}=" in said
    assert max(map(len, said.splitlines())) <= 120


@pytest.mark.parametrize(
    "program",
    [
        "from graftstack.cli import main\ntry: main(['submit', '--help'])\nexcept SystemExit: pass",
        "from graftstack.cli import main\nmain(['submit', 'finetune', '--dry-run', 'runs_dir=/x'])",
        "from graftstack.cli import main\nmain(['jobs', 'list', '--to', 'http://127.0.0.1:1'])",
        "import graftstack.submit.submissions, graftstack.submit.following, graftstack.cluster.submission",
        "import graftstack.config.spec",
    ],
    ids=["help", "dry run", "dead cluster", "modules", "spec"],
)
def test_neither_ray_nor_torch_is_loaded_before_a_cluster_is_asked(program: str) -> None:
    check = "\nimport sys; assert not {'ray', 'torch', 'kubernetes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program + check], check=True, capture_output=True, timeout=60)


def test_manifests_of_the_users_own_are_checked(tmp_path: Path, capsys: Capture) -> None:
    words = ["submit", "finetune", "--to", "k8s", "--dry-run", "k8s.image=graftstack:0.1.0-ray2.60.0", "name=mine"]
    assert main(words) == 0
    path = tmp_path / "job.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["submit", "--check", str(path)]) == 0
    assert f"{path}: no rule is broken" in capsys.readouterr().err
    path.write_text(path.read_text().replace("ttlSecondsAfterFinished: 0", "ttlSecondsAfterFinished: -1"))
    assert main(["submit", "--check", str(path)]) == 2
    assert capsys.readouterr().err.startswith("spec.ttlSecondsAfterFinished: ")


def test_a_spec_travels_in_its_file(tmp_path: Path) -> None:
    import io
    import zipfile

    found = asked(tmp_path, "seed=3")
    with zipfile.ZipFile(io.BytesIO(found.package.content)) as archive:
        assert archive.read("spec.json") == to_bytes(found.spec)
        assert b'main(["finetune", *sys.argv[1:]])' in archive.read("jobs/finetune.py")
