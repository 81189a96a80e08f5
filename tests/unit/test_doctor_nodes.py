"""The doctor on a Ray cluster: what nodes say of themselves, judged; a real cluster is asked elsewhere."""

import ast
import json
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.unit.findings import is_fault, is_ok

from graftstack.cluster import node_probe
from graftstack.cluster.submission import SlowError, Submission, UnreachableError
from graftstack.doctor import nodes, probing, ray_cluster, versions
from graftstack.doctor.finding import Finding
from graftstack.doctor.nodes import NodeFacts
from graftstack.doctor.probing import ProbeError, probe_nodes
from graftstack.doctor.ray_cluster import examine_cluster, examine_nodes

GIB = 1024**3
PLACE = "/shared/runs"

HEAD = NodeFacts(
    node_id="aaaaaaaaaa",
    ip="10.0.0.1",
    is_head=True,
    ray_cpus=4.0,
    ray_gpus=0.0,
    python="3.11.7",
    graftstack="0.1.0",
    torch="2.15.0+cu132",
    cuda_build="13.2",
    cpus=4,
    omp_threads=1,
    is_compiled=True,
    ray_free_bytes=50 * GIB,
    free_bytes=90 * GIB,
)
WORKER = replace(HEAD, node_id="bbbbbbbbbb", ip="10.0.0.2", is_head=False)
OTHER = replace(HEAD, node_id="cccccccccc", ip="10.0.0.3", is_head=False)
GPU = replace(WORKER, ray_gpus=2.0, cuda_driver="13.0")
SOUND = [HEAD, WORKER, OTHER]


class TestVersions:
    def test_of_ray(self):
        is_ok(versions.check_ray_version("2.60.0", "2.60.0"), "2.60.0")
        finding = versions.check_ray_version("2.60.0", "2.58.0")
        is_fault(finding, "warn", "2.58.0 on the cluster, 2.60.0 here", "'ray[default,train,tune]==2.58.0'")
        is_fault(versions.check_ray_version("2.60.0", "2.9.3"), "broken", "2.9.3, older than 2.52")
        is_fault(versions.check_ray_version("2.60.0", "dev"), "warn", "'dev', which is no version")

    def test_of_python(self):
        is_ok(versions.check_python_version((3, 11, 2), SOUND), "3.11.7")
        finding = versions.check_python_version((3, 12, 2), SOUND)
        is_fault(finding, "warn", "3.11.7 on the cluster, 3.12 here", "uv venv --python 3.11")
        old = [replace(node, python="3.10.14") for node in SOUND]
        is_fault(versions.check_python_version((3, 11, 2), old), "broken", "3.10.14", "older than 3.11")

    def test_of_graftstack(self):
        is_ok(versions.check_graftstack_version("0.1.0", SOUND), "0.1.0")
        finding = versions.check_graftstack_version("0.2.0", SOUND)
        is_fault(finding, "warn", "0.1.0 on 10.0.0.1, 10.0.0.2, 10.0.0.3", "0.2.0 here", "--with-code")
        mixed = [HEAD, replace(WORKER, graftstack=None)]
        is_fault(versions.check_graftstack_version("0.1.0", mixed), "warn", "none on 10.0.0.2", "--with-code")

    def test_graftstack_is_not_installed_there(self):
        none = [replace(node, graftstack=None) for node in SOUND]
        is_fault(versions.check_graftstack_version("0.1.0", none), "warn", "not installed", "--with-code")

    def test_of_torch(self):
        is_ok(versions.check_torch_version("2.15.0+cpu", SOUND), "2.15.0+cu132")
        finding = versions.check_torch_version("2.14.1+cpu", SOUND)
        is_fault(finding, "warn", "2.15.0 on the cluster, 2.14.1 here", "torch==2.15.0")
        mixed = [HEAD, WORKER, replace(OTHER, torch="2.8.0+cu126")]
        finding = versions.check_torch_version("2.15.0", mixed)
        is_fault(finding, "broken", "another than 2.15.0 on 10.0.0.3", "torch==2.15.0 there")

    def test_torch_is_not_installed_there(self):
        finding = versions.check_torch_version("2.15.0", [HEAD, replace(WORKER, torch=None)])
        is_fault(finding, "broken", "not installed on 10.0.0.2")


class TestNodes:
    def test_all_answer(self):
        is_ok(nodes.check_nodes(SOUND), "3, with 12 CPUs and 0 GPUs")

    def test_one_does_not(self):
        silent = NodeFacts(node_id="d", ip="10.0.0.4", is_head=False, ray_cpus=4, ray_gpus=0, error="no worker started")
        is_fault(nodes.check_nodes([*SOUND, silent]), "broken", "1 of 4", "10.0.0.4: no worker started", "raylet.out")

    def test_several_at_one_address_are_told_apart(self):
        twins = [HEAD, replace(WORKER, ip=HEAD.ip, error="lost")]
        is_fault(nodes.check_nodes(twins), "broken", "10.0.0.1 (bbbbbb): lost")


class TestStorage:
    def test_all_write_and_see(self):
        is_ok(nodes.check_writing(PLACE, SOUND), PLACE)
        is_ok(nodes.check_sharing(PLACE, SOUND), "3 nodes see each other's files")
        is_ok(nodes.check_sharing(PLACE, [HEAD]), "one node writes there")

    def test_not_writable_from_one_node(self):
        mixed = [HEAD, replace(WORKER, storage_error="Permission denied"), OTHER]
        is_fault(nodes.check_writing(PLACE, mixed), "broken", f"{PLACE}: can't be written on 10.0.0.2: Permission")
        is_ok(nodes.check_sharing(PLACE, mixed), "2 nodes")

    def test_not_writable_for_two_reasons(self):
        mixed = [
            replace(HEAD, storage_error="Read-only file system"),
            *(replace(node, storage_error="Permission denied") for node in (WORKER, OTHER)),
        ]
        finding = nodes.check_writing(PLACE, mixed)
        is_fault(finding, "broken", "10.0.0.1: Read-only file system; 10.0.0.2, 10.0.0.3: Permission denied")

    def test_no_client_for_the_uri(self):
        mixed = [HEAD, replace(WORKER, storage_error="No module named 'fsspec'")]
        is_fault(nodes.check_writing("s3://b/runs", mixed), "broken", "10.0.0.2", "graftstack[s3]")

    def test_not_shared(self):
        apart = [HEAD, replace(WORKER, unseen=["aaaaaaaaaa", "cccccccccc"]), OTHER]
        finding = nodes.check_sharing(PLACE, apart)
        is_fault(finding, "broken", "10.0.0.2 doesn't see what 10.0.0.1, 10.0.0.3 wrote", "mount one file system")

    @pytest.mark.parametrize(("free", "status"), [(0.4, "broken"), (4.9, "warn"), (5.1, "ok")])
    def test_room(self, free: float, status: str):
        for changed in ({"free_bytes": int(free * GIB)}, {"ray_free_bytes": int(free * GIB)}):
            finding = nodes.check_disks(PLACE, [HEAD, replace(WORKER, **changed)])
            assert finding.status == status
            if status != "ok":
                is_fault(finding, status, f"of 10.0.0.2: {free} GiB")

    def test_an_object_store_has_room(self):
        is_ok(nodes.check_disks("s3://b/runs", [replace(HEAD, free_bytes=None)]), "50.0 GiB")


def test_a_check_of_the_nodes_that_fails_would_have_the_same_name(monkeypatch: pytest.MonkeyPatch):
    names: list[str] = []

    def examine(name: str, check: Callable[[], Finding]) -> Finding:
        names.append(name)
        return check()

    monkeypatch.setattr(ray_cluster, "examine", examine)
    assert [finding.name for finding in examine_nodes(SOUND, PLACE)] == ["nodes", *names]


class TestHardware:
    def test_threads(self):
        is_ok(nodes.check_threads(SOUND))
        is_ok(nodes.check_threads([replace(HEAD, omp_threads=None)]))
        finding = nodes.check_threads([HEAD, replace(WORKER, omp_threads=64)])
        is_fault(finding, "warn", "10.0.0.2 has OMP_NUM_THREADS=64 for 4 CPUs", "OMP_NUM_THREADS unset")
        finding = nodes.check_threads([HEAD, replace(WORKER, ray_cpus=16)])
        is_fault(finding, "warn", "Ray counts 16 CPUs on 10.0.0.2, which has 4", "--num-cpus")

    def test_bytecode(self):
        is_ok(nodes.check_bytecode(SOUND))
        is_ok(nodes.check_bytecode([replace(HEAD, torch=None, is_compiled=None)]))
        is_fault(nodes.check_bytecode([HEAD, replace(WORKER, is_compiled=False)]), "warn", "10.0.0.2", "compileall")

    def test_gpus(self):
        is_ok(nodes.check_gpus(SOUND), "none")
        is_ok(nodes.check_gpus([HEAD, GPU]), "2, which torch is built for")

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"cuda_build": None, "torch": "2.15.0+cpu"}, "10.0.0.2: torch 2.15.0+cpu is a CPU build"),
            ({"cuda_driver": "12.8"}, "is built for CUDA 13.2, and the driver ends at 12.8"),
            ({"cuda_driver": None}, "Ray counts 2 GPUs, and there is no driver"),
        ],
    )
    def test_a_torch_that_does_not_fit_the_driver(self, changed: dict[str, Any], words: str):
        is_fault(nodes.check_gpus([HEAD, replace(GPU, **changed)]), "broken", words, "that fits the driver")

    def test_gpus_that_ray_does_not_count(self):
        is_fault(nodes.check_gpus([HEAD, replace(GPU, ray_gpus=0.0)]), "warn", "10.0.0.2", "--num-gpus")


class TestProbe:
    """The script that nodes run, without a cluster."""

    def test_it_needs_nothing_but_the_standard_library_and_ray(self):
        program = (
            "import sys, runpy; before = set(sys.modules); runpy.run_path(sys.argv[1]); "
            "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
        )
        done = subprocess.run(
            [sys.executable, "-IS", "-c", program, node_probe.__file__], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == []

    def test_a_python_too_old_for_graftstack_can_read_it(self):
        ast.parse(Path(node_probe.__file__).read_text(), feature_version=(3, 8))

    def test_its_rows_are_what_the_doctor_reads(self, tmp_path: Path):
        names = {item.name for item in fields(NodeFacts)}
        node = {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 4.0}}
        rows = [node_probe._row(node, {}, {}), node_probe._row(node, RuntimeError("no\nmore"), {})]
        assert all(row.keys() <= names for row in rows)
        assert NodeFacts(**rows[1]).error == "no"
        settings = {"place": str(tmp_path), "nonce": "n"}
        assert set(node_probe.Prober(settings, "a").__dict__) == {"_settings", "_node_id", "_place", "_is_late"}

    def test_a_folder_is_left_as_it_was(self, tmp_path: Path):
        disk = node_probe.Disk(str(tmp_path / "a" / "b"))
        disk.write("file", b"content")
        assert disk.sees("file", b"content")
        assert not disk.sees("file", b"other")
        assert not disk.sees("gone", b"content")
        disk.remove("file")
        disk.remove("file")
        disk.tidy()
        assert list(tmp_path.iterdir()) == []

    def test_folders_go_that_two_nodes_made_at_once(self, tmp_path: Path):
        """The second found the outer one there already, and was the first to tidy."""
        first, second = node_probe.Disk(str(tmp_path / "a" / "b")), node_probe.Disk(str(tmp_path / "a" / "b"))
        (tmp_path / "a").mkdir()
        second.write("second", b"content")
        second.remove("second")
        second.tidy()
        (tmp_path / "a").rmdir()
        first.write("first", b"content")
        first.remove("first")
        (tmp_path / "a" / "b").rmdir()
        first.tidy()
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_is_an_answer(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(node_probe, "node_facts", dict)
        prober = node_probe.Prober({"place": "/dev/null/runs", "nonce": "n"}, "a")
        assert prober.look() == {"storage_error": "Not a directory"}
        prober.remove()
        prober.tidy()

    def test_a_store_that_never_answers_is_an_answer(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(node_probe, "node_facts", dict)
        monkeypatch.setattr(node_probe, "_STORAGE_WITHIN_S", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = f"http://127.0.0.1:{server.getsockname()[1]}/runs"
            began = time.monotonic()
            assert node_probe.Prober({"place": place, "nonce": "n"}, "a").look() == {
                "storage_error": "no answer in 0.3 s"
            }
        assert time.monotonic() - began < 5

    def test_what_is_written_too_late_is_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(node_probe, "node_facts", dict)
        monkeypatch.setattr(node_probe, "_STORAGE_WITHIN_S", 0.05)
        goes_on, is_done, write, tidy = (
            threading.Event(),
            threading.Event(),
            node_probe.Disk.write,
            node_probe.Disk.tidy,
        )

        def write_later(disk: node_probe.Disk, name: str, content: bytes) -> None:
            assert goes_on.wait(10)
            write(disk, name, content)

        def tidy_and_say(disk: node_probe.Disk) -> None:
            tidy(disk)
            is_done.set()

        monkeypatch.setattr(node_probe.Disk, "write", write_later)
        monkeypatch.setattr(node_probe.Disk, "tidy", tidy_and_say)
        prober = node_probe.Prober({"place": str(tmp_path / "runs"), "nonce": "n"}, "a")
        assert "no answer" in prober.look()["storage_error"]
        goes_on.set()
        assert is_done.wait(10)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_others_use_by_now_stays(self, tmp_path: Path):
        disk = node_probe.Disk(str(tmp_path / "a" / "b"))
        disk.write("file", b"content")
        disk.remove("file")
        (tmp_path / "a" / "of-others").touch()
        disk.tidy()
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["of-others"]

    def test_an_object_store_is_left_as_it_was(self):
        import fsspec

        store = node_probe.Store("memory://probe/runs/")
        store.write("file", b"content")
        assert store.sees("file", b"content")
        assert not store.sees("gone", b"content")
        store.remove("file")
        store.remove("file")
        assert not fsspec.filesystem("memory").find("/probe")

    @pytest.mark.parametrize(("status", "number", "found"), [(0, 12080, "12.8"), (0, 13000, "13.0"), (3, 0, None)])
    def test_the_driver_says_which_cuda_it_runs(
        self, monkeypatch: pytest.MonkeyPatch, status: int, number: int, found: str | None
    ):
        """`cuDriverGetVersion` gives 1000 times the major and 10 times the minor version (CUDA driver API, 6.3)."""

        class Driver:
            def cuDriverGetVersion(self, reference: Any) -> int:  # noqa: N802 - as CUDA has it
                reference._obj.value = number
                return status

        monkeypatch.setattr(node_probe.ctypes, "CDLL", {"libcuda.so.1": Driver()}.__getitem__)
        assert node_probe.cuda_driver() == found

    def test_versions_are_read_without_importing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        package = tmp_path / "of_a_test"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
        text = (
            "from typing import Optional\n__version__ = '2.15.0+cu132'\ncuda: Optional[str] = '13.2'\nhip: str = None\n"
        )
        (package / "version.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        found = [node_probe.stated("of_a_test", "version.py", name) for name in ("__version__", "cuda", "hip")]
        assert found == ["2.15.0+cu132", "13.2", None]
        assert node_probe.stated("not_there", "version.py", "cuda") is None
        assert (node_probe.is_compiled("of_a_test"), node_probe.is_compiled("not_there")) == (False, None)


class Cluster:
    """A job server that runs nothing."""

    def __init__(self, statuses: list[str], log: str) -> None:
        self.statuses, self.log, self.calls = statuses, log, []
        self.is_there = True

    def submit(self, submission_id: str, **_: Any) -> None:
        self.calls.append("submit")

    def find(self, submission_id: str) -> Submission | None:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        found = Submission(submission_id, status, 0, "the\nmessage", {}, 1.0, None)
        return found if self.is_there else None

    def logs(self, submission_id: str) -> str:
        return self.log

    def stop(self, submission_id: str) -> bool:
        self.calls.append("stop")
        self.statuses = ["STOPPED"]
        return True

    def delete(self, submission_id: str) -> None:
        self.calls.append("delete")
        self.is_there = False


ROW = {"node_id": "a", "ip": "10.0.0.1", "is_head": True, "ray_cpus": 2.0, "ray_gpus": 0.0}
LOG = (
    f"noise\n{node_probe.MARK}{json.dumps({'num_nodes': 1})}\nnoise\n{node_probe.MARK}{json.dumps({'nodes': [ROW]})}\n"
)


class TestProbing:
    @pytest.fixture(autouse=True)
    def _quickly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probing, "_LOOK_EVERY_S", 0.01)
        monkeypatch.setattr(probing, "_MISSED_WITHIN_S", 0.01)

    def test_what_the_nodes_say_is_read_and_the_job_forgotten(self):
        cluster, said = Cluster(["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"], LOG), []
        assert probe_nodes(cluster, PLACE, say=said.append) == [NodeFacts(**ROW)]
        assert cluster.calls == ["submit", "delete"]
        assert said[1:] == ["nodes: 1; a worker starts on each"]

    def test_a_job_that_fails_is_a_fault_in_its_last_words(self):
        cluster = Cluster(["FAILED"], "Traceback\nModuleNotFoundError: No module named 'ray'\n")
        with pytest.raises(ProbeError, match=r"is FAILED \(ModuleNotFoundError: No module named 'ray'\): "):
            probe_nodes(cluster, PLACE, say=lambda _: None)
        assert cluster.calls == ["submit", "delete"]

    @pytest.mark.parametrize("log", ["ModuleNotFoundError: No module named 'ray'\n", "/bin/sh: 1: python: not found\n"])
    def test_a_head_without_ray_on_its_path_gets_a_remedy(self, log: str):
        with pytest.raises(ProbeError, match=r"; start ray with the bin folder of its environment first on PATH$"):
            probe_nodes(Cluster(["FAILED"], log), PLACE, say=lambda _: None)

    @pytest.mark.parametrize("rest", ['{"num_nod', '{"num_nodes": 1}', "[3]\n", "{\n"])
    def test_a_line_that_is_half_written_is_read_once_it_is_whole(self, rest: str):
        class Writing(Cluster):
            def logs(self, submission_id: str) -> str:
                return LOG if self.statuses == ["SUCCEEDED"] else f"{node_probe.MARK}{rest}"

        assert probe_nodes(Writing(["RUNNING", "RUNNING", "SUCCEEDED"], ""), PLACE, say=lambda _: None)

    def test_a_line_that_cannot_be_read_at_the_end_is_a_fault(self):
        with pytest.raises(ProbeError, match=r'what the job printed can\'t be read \({"nodes":\); try again'):
            probe_nodes(Cluster(["SUCCEEDED"], f'{node_probe.MARK}{{"nodes": \n'), PLACE, say=lambda _: None)

    def test_a_cluster_that_does_not_answer_for_a_while_is_asked_again(self):
        class Busy(Cluster):
            failures = 3

            def find(self, submission_id: str) -> Submission | None:
                self.failures -= 1
                if self.failures >= 0:
                    raise SlowError("no answer in time")
                return super().find(submission_id)

        said: list[str] = []
        assert probe_nodes(Busy(["RUNNING", "SUCCEEDED"], LOG), PLACE, say=said.append) == [NodeFacts(**ROW)]
        assert said[1] == "the cluster doesn't answer (no answer in time); it is asked again"

    def test_a_cluster_that_is_lost_is_named_in_the_end(self, monkeypatch: pytest.MonkeyPatch):
        class Lost(Cluster):
            def find(self, submission_id: str) -> Submission | None:
                raise UnreachableError("Connection refused")

        monkeypatch.setattr(probing, "_DONE_WITHIN_S", 0.05)
        with pytest.raises(ProbeError, match=r"^no answer in 0 s \(Connection refused\); "):
            probe_nodes(Lost(["RUNNING"], ""), PLACE, say=lambda _: None)

    def test_a_job_that_never_starts_is_stopped(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(probing, "_DONE_WITHIN_S", 0.05)
        cluster = Cluster(["PENDING"], "")
        with pytest.raises(ProbeError, match="no answer in"):
            probe_nodes(cluster, PLACE, say=lambda _: None)
        assert cluster.calls == ["submit", "stop", "delete"]

    def test_who_interrupts_it_leaves_nothing_behind(self):
        def interrupt(_: str) -> None:
            raise KeyboardInterrupt

        cluster = Cluster(["RUNNING"], "")
        with pytest.raises(KeyboardInterrupt):
            probe_nodes(cluster, PLACE, say=interrupt)
        assert cluster.calls == ["submit", "stop", "delete"]


class Dashboard(NamedTuple):
    """What a server answers to the path of a request."""

    answers: dict[str, tuple[int, Any]]

    def serve(self) -> ThreadingHTTPServer:
        answers = self.answers

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, content = answers.get(self.path, (404, "404: Not Found"))
                content = content() if callable(content) else content
                body = json.dumps(content).encode() if not isinstance(content, str) else content.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


VERSION = {"version": "4", "ray_version": "2.58.1", "ray_commit": "", "session_name": ""}


@pytest.fixture(scope="module")
def loaded_ray() -> None:
    """Loading Ray takes as long as the machine is busy; what is timed is how long an answer is waited for."""
    import ray.dashboard.utils
    import ray.job_submission  # noqa: F401


@pytest.mark.usefixtures("loaded_ray")
class TestReaching:
    @pytest.fixture
    def serve(self) -> Iterator[Any]:
        started: list[ThreadingHTTPServer] = []

        def start(**answers: tuple[int, Any]) -> str:
            server = Dashboard({f"/api/{path}": answer for path, answer in answers.items()}).serve()
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            started.append(server)
            return f"http://127.0.0.1:{server.server_port}"

        yield start
        for server in started:
            server.shutdown()
            server.server_close()

    def found(self, address: str) -> list[Finding]:
        began = time.monotonic()
        findings = examine_cluster(address, "runs", say=lambda _: None)
        print(f"named after {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began < 5
        return findings

    def test_nobody_listens(self):
        (finding,) = self.found("http://127.0.0.1:1")
        is_fault(
            finding, "broken", "http://127.0.0.1:1: no Ray cluster takes jobs there (Connection refused)", "check that"
        )

    def test_no_address(self):
        (finding,) = self.found("ftp://here")
        is_fault(finding, "broken", "no address of a cluster", "http://HOST:8265")

    def test_what_listens_never_answers(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            (finding,) = self.found(f"http://127.0.0.1:{server.getsockname()[1]}")
        is_fault(finding, "broken", "no answer in time")

    def test_what_listens_speaks_something_else(self):
        """Ray itself would try for half a minute."""

        class Echo(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.sendall(self.request.recv(64)[:3])

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            (finding,) = self.found(f"127.0.0.1:{server.server_address[1]}")
            server.shutdown()
        is_fault(finding, "broken", "no answer in time", "the address of a cluster's dashboard")

    def test_nobody_listens_for_ray_client(self):
        (finding,) = self.found("ray://127.0.0.1:1")
        is_fault(finding, "broken", "no Ray cluster takes jobs there (Connection refused)")

    def test_another_server(self, serve: Any):
        (finding,) = self.found(serve())
        is_fault(finding, "broken", "no Ray cluster takes jobs there")

    @pytest.mark.parametrize(("status", "words"), [(401, "it got none (401)"), (403, "isn't its own (403)")])
    def test_the_token(self, serve: Any, monkeypatch: pytest.MonkeyPatch, status: int, words: str):
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
        (finding,) = self.found(serve(version=(status, "Unauthorized")))
        assert finding.name == "token"
        is_fault(finding, "broken", words, "set RAY_AUTH_TOKEN")

    def test_the_file_of_the_token(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
        (finding,) = self.found("http://127.0.0.1:1")
        assert finding.name == "token"
        is_fault(
            finding,
            "broken",
            f"RAY_AUTH_TOKEN_PATH={tmp_path}/none: can't be read (there is no such file)",
            "correct it",
        )

    def test_a_proxy_that_lets_no_jobs_through(self, serve: Any):
        (finding,) = self.found(serve(version=(200, VERSION)))
        assert finding.name == "jobs"
        is_fault(finding, "broken", "takes no jobs (404", "the address of Ray's dashboard itself")

    def test_a_server_that_takes_longer_over_its_jobs_than_over_its_version(self, serve: Any, monkeypatch: Any):
        monkeypatch.setattr(ray_cluster, "_FIRST_ANSWER_S", 0.5)

        def slow() -> list[Any]:
            time.sleep(1)
            return []

        findings = self.found(serve(version=(200, VERSION), **{"jobs/": (200, slow)}))
        assert [finding.name for finding in findings] == ["cluster", "token", "Ray's version", "jobs"]
        is_fault(findings[-1], "broken", "takes no jobs")  # it takes none that are sent

    def test_a_server_that_is_too_slow_is_called_slow(self):
        finding = ray_cluster._no_jobs("http://head:8265", SlowError("no answer in time"))
        is_fault(finding, "broken", "takes too long", "try again later")

    def test_another_version_of_ray_is_named_even_where_no_job_is_taken(self, serve: Any):
        findings = self.found(serve(version=(200, VERSION), **{"jobs/": (200, [])}))
        assert [finding.name for finding in findings] == ["cluster", "token", "Ray's version", "jobs"]
        is_fault(findings[2], "warn", "2.58.1 on the cluster", "==2.58.1'")

    def test_torch_is_not_loaded(self):
        program = (
            "import sys; from graftstack.cli import main; status = main(sys.argv[1:]); "
            "print(status, 'torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, "doctor", "--to", "http://127.0.0.1:1", "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "1 False"
