"""Jobs on a real head with tokens: what is submitted arrives byte for byte, and ends as it ends."""

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from tests.cluster.heads import running_head, wait_until

from graftstack.cli import main
from graftstack.cluster.submission import JobServer
from graftstack.config.compose import compose_job
from graftstack.runs import MANIFEST, find_run
from graftstack.submit.submissions import request, spec_on_cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

Capture = pytest.CaptureFixture[str]

TOKEN = "the-token-of-this-test-and-of-no-other-cluster"
# No Ray beside the driver: what matters here is how a job gets there and back.
SMALL = ("data=digits", "data.image_size=8", "backbone=conv4", "cluster=inline")
STRANGE = "$HOME ${seed} `id` \"two\" 'one' ; && | \\ \n é 漢字 🙂 #!*?~"

# Says many lines over a few seconds, some of them in parts, and ends with 7.
TALKER = """
import sys, time
for number in range(400):
    print(f"line {number} é", end="" if number % 3 else chr(10), flush=True)
    time.sleep(0.01)
    print(flush=True)
sys.exit(7)
"""


class Head(NamedTuple):
    """A head that was started with ``ray start``."""

    address: str

    @property
    def server(self) -> JobServer:
        return JobServer(self.address)

    def num_alive(self, kind: str) -> int:
        """How many actors or placement groups there are."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        answer = requests.get(f"{self.address}/api/v0/{kind}?limit=1000&detail=0", headers=headers, timeout=20)
        rows = answer.json()["data"]["result"]["result"]
        return sum(row["state"] not in ("DEAD", "REMOVED") for row in rows)


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture(scope="module")
def head(_environment: None) -> Iterator[Head]:
    with running_head(TOKEN) as found:
        yield Head(found.dashboard)


def graftstack(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "graftstack", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background makes them, and so their children, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table whose file and column have names that no shell would leave alone."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / STRANGE.replace("/", "") / "table.parquet"
    path.parent.mkdir()
    labels = random.integers(0, 2, 60)
    pq.write_table(pa.table({"one": labels + random.normal(size=60), STRANGE: labels}), path)
    return path


def test_a_job_arrives_byte_for_byte_and_runs_once(head: Head, table: Path, tmp_path: Path, capfd: Capture) -> None:
    words = [
        *("data=parquet", f"data.path={table}", f"data.label={STRANGE}", "base_models=[GaussianNB]", "folds.num=2"),
        *("name=it's $HOME; `id`", f"runs_dir={tmp_path}/runs"),
    ]
    assert main(["submit", "stack", *words, "--to", head.address, "--follow"]) == 0
    first = capfd.readouterr()
    assert first.out.splitlines()[-1] == f"{tmp_path}/runs/it's $HOME; `id`"
    assert "each node of the cluster must reach data.path=" in first.err
    assert f", runs_dir={tmp_path}/runs\n" in first.err
    run = find_run("it's $HOME; `id`", f"{tmp_path}/runs")
    assert run.manifest.status == "done"
    config = run.manifest.config
    assert (config["data"]["label"], config["data"]["path"]) == (STRANGE, str(table))
    assert (config["cluster"]["kind"], config["cluster"]["address"], config["resume"]) == ("ray", "auto", True)
    assert f"data.label={STRANGE}" in run.manifest.overrides
    (found,) = [one for one in head.server.submissions() if one.id.startswith("graftstack-stack-")]
    assert found.status == "SUCCEEDED"
    wait_until(lambda: head.num_alive("actors") == head.num_alive("placement_groups") == 0, 30)

    assert main(["submit", "stack", *words, "--to", head.address]) == 0
    again = capfd.readouterr()
    assert again.out.strip() == found.id
    assert f"{found.id}: was submitted before, and is done (SUCCEEDED); its run is it's $HOME; `id` in" in again.err
    assert len([one for one in head.server.submissions() if one.id.startswith(found.id)]) == 1


def test_a_cluster_that_wants_a_token_says_so_in_one_line(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps a token there, and in a process that is connected to another
    for token, why in (("", "it got none (401)"), ("another", "the one that it got isn't its own (403)")):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        for words in (["submit", "finetune", f"runs_dir={tmp_path}"], ["jobs"], ["jobs", "logs", "x", "--follow"]):
            process = graftstack(*words, "--to", head.address)
            out, said = process.communicate(timeout=60)
            assert process.returncode == 2
            assert out == ""
            assert said.splitlines()[-1] == (
                f"graftstack: --to {head.address}: the cluster asks for a token, and {why}; set RAY_AUTH_TOKEN to its "
                "token, or RAY_AUTH_TOKEN_PATH to a file that holds it"
            )
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert main(["jobs", "--to", head.address]) == 0


def test_an_explicit_address_wins_over_the_environment(
    head: Head, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert main(["jobs", "list", "--json", "--to", head.address]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)
    assert main(["jobs"]) == 2
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    assert main(["jobs"]) == 0
    assert main(["jobs", "--to", head.address.removeprefix("http://")]) == 0


def test_a_job_ends_with_its_own_exit_status(head: Head, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "file").touch()
    refused = ["submit", "finetune", *SMALL, "epochs=0", f"runs_dir={tmp_path}/file", "--to", head.address]
    assert main([*refused, "--follow"]) == 2
    captured = capfd.readouterr()
    assert captured.out.splitlines()[-1].startswith(f"graftstack: runs_dir={tmp_path}/file: ")
    assert re.search(r"\ngraftstack-finetune-\w+: FAILED, exit status 2\n", captured.err)
    assert main([*refused, "--dry-run=server"]) == 0
    assert capfd.readouterr().out.strip().endswith("-2")

    diverges = [*SMALL, "epochs=1", "optimizer.name=sgd", "optimizer.lr=1e30", f"runs_dir={tmp_path}/runs"]
    assert main(["submit", "finetune", *diverges, "name=nan", "--to", head.address, "-f"]) == 1
    assert capfd.readouterr().err.rstrip().endswith(": FAILED, exit status 1")
    assert find_run("nan", f"{tmp_path}/runs").manifest.status == "failed"


class CuttingProxy:
    """A proxy that closes each stream of logs after a while, and now and then a connection that asks for a status."""

    def __init__(self, port: int, stream_s: float) -> None:
        self.target, self.stream_s, self.num_cut, self.num_asked = port, stream_s, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self.connect, args=self.listener.accept()[:1], daemon=True).start()

    def connect(self, near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", self.target)) as far:
            asked = near.recv(65536)
            is_stream = b"/logs/tail" in asked
            self.num_asked += b"GET /api/jobs/" in asked and not is_stream
            if not is_stream and self.num_asked % 4 == 3:
                return
            far.sendall(asked)
            threading.Thread(target=self.pump, args=(near, far), daemon=True).start()
            if is_stream:
                timer = threading.Timer(self.stream_s, self.cut, (near,))
                timer.start()
            self.pump(far, near)

    def cut(self, near: socket.socket) -> None:
        with suppress(OSError):
            near.shutdown(socket.SHUT_RDWR)
            self.num_cut += 1

    @staticmethod
    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)


def test_a_log_is_whole_and_in_order_though_its_stream_is_cut(head: Head, tmp_path: Path, capfd: Capture) -> None:
    package = tmp_path / "empty.zip"
    package.write_bytes(b"PK\x05\x06" + bytes(18))
    entrypoint = f"python -u -c {shlex.quote(TALKER)}"
    head.server.submit("talker", entrypoint=entrypoint, package=package, metadata={})
    proxy = CuttingProxy(int(head.address.rpartition(":")[2]), stream_s=1.3)
    try:
        assert main(["jobs", "logs", "talker", "--follow", "--to", proxy.address]) == 7
    finally:
        proxy.listener.close()
    captured = capfd.readouterr()
    assert captured.out == head.server.logs("talker")
    said = captured.out[captured.out.index("\nline 0 ") :].split()
    assert said == " ".join(f"line {number} é" for number in range(400)).split()
    assert "talker: FAILED, exit status 7" in captured.err
    assert proxy.num_cut >= 3
    assert proxy.num_asked >= 4


def test_code_that_goes_along_is_what_runs(head: Head, tmp_path: Path, capfd: Capture) -> None:
    config = compose_job("finetune", [f"runs_dir={tmp_path}"])
    asked = request(spec_on_cluster("finetune", config, []), with_code=True)
    package = tmp_path / "package.zip"
    package.write_bytes(asked.package.content)
    program = "import os, graftstack, graftstack.config.paths as paths; print(graftstack.__file__, paths.conf_dir())"
    head.server.submit("code", entrypoint=f"cd / && python -c '{program}'", package=package, metadata={})
    head.server.submit("without-code", entrypoint="python -IS -c 'import graftstack'", package=package, metadata={})
    wait_until(lambda: (found := head.server.find("code")) is not None and found.is_over)
    code, conf = head.server.logs("code").split()[-2:]
    assert re.fullmatch(r".*/runtime_resources/working_dir_files/_ray_pkg_\w+/graftstack/__init__\.py", code)
    assert Path(conf) == Path(code).parent / "_bundled" / "conf"
    assert main(["jobs", "logs", "without-code", "--follow", "--to", head.address]) == 1
    assert capfd.readouterr().err.splitlines()[-1].endswith("install it there, or add --with-code")


def test_who_follows_may_leave_and_a_stopped_job_ends_with_130(head: Head, tmp_path: Path, capfd: Capture) -> None:
    long = [*SMALL, "epochs=1000000", "name=long", f"runs_dir={tmp_path}/runs", "--to", head.address]
    follower = graftstack("submit", "finetune", *long, "--follow")
    assert follower.stdout is not None
    for line in follower.stdout:
        if line.startswith("Running entrypoint"):
            break
    follower.send_signal(signal.SIGINT)
    _, said = follower.communicate(timeout=60)
    assert follower.returncode == 130
    (found,) = [one for one in head.server.submissions() if one.metadata.get("graftstack_run") == "long"]
    back = f"graftstack jobs logs {found.id} --follow --to {head.address}"
    assert f"no longer following; {found.id} goes on. Come back with: {back}; end it with: graftstack jobs stop" in said
    assert found.status == "RUNNING"

    follower = graftstack(*back.split()[1:])
    wait_until((tmp_path / "runs" / "long" / MANIFEST).exists)
    assert main(["submit", "finetune", *long]) == 0
    assert f"{found.id}: was submitted before, and is RUNNING; its run is long in " in capfd.readouterr().err
    assert main(["submit", "finetune", *long, "seed=1"]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("graftstack: name=long: submission graftstack-finetune-")
    assert main(["jobs", "stop", found.id, "--to", head.address]) == 0
    assert capfd.readouterr().err == f"{found.id}: stopped; submit the same again, and its run goes on\n"
    _, said = follower.communicate(timeout=60)
    assert follower.returncode == 130, said
    assert find_run("long", f"{tmp_path}/runs").manifest.status == "interrupted"
    assert main(["jobs", "stop", found.id, "--to", head.address]) == 0
    assert capfd.readouterr().err == f"{found.id}: is over already (STOPPED)\n"
    assert main(["submit", "finetune", *long, "--dry-run=server"]) == 0
    assert capfd.readouterr().out.strip() == f"{found.id}-2"
    wait_until(lambda: head.num_alive("actors") == 0, 30)


def test_what_was_submitted_is_listed_and_shown(head: Head, capsys: Capture) -> None:
    assert main(["jobs", "list", "--json", "--to", head.address]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {one["status"] for one in listed} == {"SUCCEEDED", "FAILED", "STOPPED"}
    one = next(one for one in listed if one["run"] == "nan")
    assert (one["exit_status"], one["status"]) == (1, "FAILED")
    assert main(["jobs", "status", one["id"], "--json", "--to", head.address]) == 0
    assert json.loads(capsys.readouterr().out) == one
    for words in (["list"], ["status", one["id"]]):
        assert main(["jobs", *words, "--to", head.address]) == 0
        assert one["id"] in capsys.readouterr().out
    assert main(["jobs", "logs", one["id"], "--to", head.address]) == 0
    assert "graftstack: " in capsys.readouterr().out
    assert main(["jobs", "status", "", "--to", head.address]) == 2
    assert main(["jobs", "status", "../version", "--to", head.address]) == 2
    capsys.readouterr()
    for words in (["status", "talkre"], ["logs", "talkre", "-f"], ["stop", "talkre"]):
        assert main(["jobs", *words, "--to", head.address]) == 2
        message = f"graftstack: talkre: no such submission on {head.address}; did you mean talker?\n"
        assert capsys.readouterr().err == message


class Odd(BaseHTTPRequestHandler):
    """A job server behind a proxy with words of its own, and without streams."""

    words: list[str]

    def do_GET(self) -> None:
        answers = {
            "/api/version": {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""},
            "/api/jobs/odd": {"submission_id": "odd", "status": self.words[0], "driver_exit_code": 3},
            "/api/jobs/odd/logs": {"logs": "one\ntwo\n"},
        }
        if self.path == "/api/jobs/odd" and len(self.words) > 1:
            del self.words[0]
        content = json.dumps(answers.get(self.path)).encode()
        self.send_response(200 if self.path in answers else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def serving(handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_word_that_ray_doesnt_know_is_no_end(capsys: Capture) -> None:
    Odd.words = ["RUNNING", "TRANSITIONING", "UNKNOWN", "FAILED"]
    with serving(Odd) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        assert main(["jobs", "logs", "odd", "--follow", "--to", address]) == 3
        server.shutdown()
    assert Odd.words == ["FAILED"]
    assert capsys.readouterr().out == "one\ntwo\n"


class Page(BaseHTTPRequestHandler):
    """Some other server."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"<html>Hello</html>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("status", [200, 404, 502])
def test_what_isnt_a_job_server_is_refused_in_one_line(capsys: Capture, status: int) -> None:
    Page.status = status
    with serving(Page) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        assert main(["jobs", "list", "--to", address]) == 2
        server.shutdown()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"graftstack: --to {address}: no Ray cluster takes jobs there (")
