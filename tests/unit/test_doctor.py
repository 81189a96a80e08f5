"""The doctor says what is wrong, and only that: each check on a sound input and on a faulty one."""

import json
import os
import py_compile
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.cluster.heads import free_port
from tests.unit.findings import is_fault, is_ok

from graftstack.cli import main
from graftstack.doctor import clusters, machine, packages, run_doctor, sending, storage, this_machine
from graftstack.doctor.finding import Finding, examine
from graftstack.doctor.torch_facts import TorchFacts
from graftstack.machine import allowed_cpus

GIB = 1024**3
DiskUsage = namedtuple("DiskUsage", "total used free")


def install(
    site: Path, name: str, version: str = "1.0", *, requires: tuple[str, ...] = (), build: str | None = None
) -> None:
    """Lays down a package as an installer does: its metadata, and its code."""
    metadata = site / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata.write_text("\n".join([*lines, *(f"Requires-Dist: {needed}" for needed in requires)]) + "\n")
    (site / name).mkdir()
    (site / name / "__init__.py").write_text("")
    if build is not None:
        (site / name / "version.py").write_text(f"__version__ = '{version}+{build}'\n")


class TestPython:
    def test_new_enough(self):
        is_ok(packages.check_python((3, 11, 0)), "3.11.0")

    def test_too_old(self):
        is_fault(packages.check_python((3, 10, 14)), "broken", "3.10.14", "3.11")


class TestPackages:
    def test_all_there(self, tmp_path):
        install(tmp_path, "graftstack", requires=("torch>=2.8", "ray[train]>=2.52", 'timm>=1; extra == "timm"'))
        install(tmp_path, "torch", "2.15.0")
        install(tmp_path, "ray", "2.60.0", requires=('tensorboardx; extra == "train"', 'gymnasium; extra == "rllib"'))
        install(tmp_path, "tensorboardx")
        is_ok(packages.check_packages([str(tmp_path)]), "torch 2.15.0", "ray 2.60.0")

    def test_one_missing(self, tmp_path):
        install(tmp_path, "graftstack", requires=("skops>=0.11",))
        is_fault(packages.check_packages([str(tmp_path)]), "broken", "skops>=0.11 is missing", "'skops>=0.11'")

    def test_one_too_old(self, tmp_path):
        install(tmp_path, "graftstack", requires=("torch>=2.8", "skops"))
        install(tmp_path, "torch", "2.7.1")
        finding = packages.check_packages([str(tmp_path)])
        is_fault(finding, "broken", "torch 2.7.1 isn't >=2.8", "skops is missing", "'torch>=2.8' 'skops'")

    def test_an_extra_missing(self, tmp_path):
        install(tmp_path, "graftstack", requires=("ray[train]>=2.52",))
        install(tmp_path, "ray", "2.60.0", requires=('tensorboardx; extra == "train"', 'pandas; extra == "train"'))
        finding = packages.check_packages([str(tmp_path)])
        is_fault(finding, "broken", "tensorboardx is missing", "pandas is missing", "'ray[train]>=2.52'")

    def test_graftstack_itself_not_installed(self, tmp_path):
        is_fault(packages.check_packages([str(tmp_path)]), "warn", "isn't installed")


class TestTorchBuilds:
    @pytest.fixture
    def site(self, tmp_path):
        install(tmp_path, "torch", "2.15.0", build="cu132")
        return tmp_path

    def test_same_build(self, site):
        install(site, "torchvision", "0.29.2", requires=("torch (>=2.14.0)",), build="cu132")
        is_ok(packages.check_torch_builds([str(site)], None), "2.15.0+cu132", "0.29.2+cu132")

    def test_build_unknown(self, site):
        install(site, "torchvision", "0.29.2", requires=("torch==2.15.0",))
        is_ok(packages.check_torch_builds([str(site)], None))

    def test_other_build(self, site):
        install(site, "torchvision", "0.29.2", build="cpu")
        is_fault(packages.check_torch_builds([str(site)], None), "warn", "cpu and cu132", "same index")

    def test_other_release(self, site):
        install(site, "torchvision", "0.23.0", requires=("torch==2.8.0",), build="cu132")
        is_fault(packages.check_torch_builds([str(site)], None), "broken", "needs torch==2.8.0", "same index")

    def test_not_loadable(self, site):
        install(site, "torchvision", "0.29.2", build="cpu")
        error = "operator torchvision::nms does not exist"
        is_fault(packages.check_torch_builds([str(site)], error), "broken", error, "+cpu", "+cu132", "same index")

    def test_missing(self, site):
        is_fault(packages.check_torch_builds([str(site)], None), "broken", "torchvision missing")


class TestBytecode:
    @pytest.fixture
    def package_file(self, tmp_path):
        install(tmp_path, "torch")
        return tmp_path / "torch" / "__init__.py"

    def test_compiled(self, package_file):
        py_compile.compile(str(package_file))
        is_ok(packages.check_bytecode(package_file, {"PYTHONDONTWRITEBYTECODE": "1"}))

    def test_not_compiled(self, package_file):
        finding = packages.check_bytecode(package_file, {})
        is_fault(finding, "warn", "seconds more", "--compile-bytecode", f"compileall -q {package_file.parent.parent}")
        assert "PYTHONDONTWRITEBYTECODE" not in finding.detail

    def test_not_compiled_and_never_will_be(self, package_file):
        finding = packages.check_bytecode(package_file, {"PYTHONDONTWRITEBYTECODE": "1"})
        is_fault(finding, "warn", "PYTHONDONTWRITEBYTECODE")

    def test_compiled_by_another_interpreter(self, package_file):
        compiled = package_file.parent / "__pycache__" / "__init__.cpython-27.pyc"
        py_compile.compile(str(package_file), cfile=str(compiled))
        is_fault(packages.check_bytecode(package_file, {}), "warn", "isn't compiled")

    def test_no_torch(self):
        is_fault(packages.check_bytecode(None, {}), "warn", "isn't installed")


class TestGpus:
    DRIVER = "/proc/driver/nvidia"

    def test_usable(self):
        torch = TorchFacts(gpus=("H200", "H200"), cuda_build="13.2")
        is_ok(machine.check_gpus(torch, driver=self.DRIVER, environ={}), "2: H200, H200")

    def test_none(self):
        is_ok(machine.check_gpus(TorchFacts(cuda_build="13.2"), driver=None, environ={}), "CPU")

    def test_a_driver_and_a_cpu_build(self):
        finding = machine.check_gpus(TorchFacts(), driver=self.DRIVER, environ={})
        is_fault(finding, "broken", self.DRIVER, "CPU build", "CUDA builds of both")

    def test_a_driver_too_old(self):
        torch = TorchFacts(cuda_build="13.2", complaint="The NVIDIA driver on your system is too old")
        finding = machine.check_gpus(torch, driver=self.DRIVER, environ={"CUDA_VISIBLE_DEVICES": "0"})
        is_fault(finding, "broken", "too old", "13.2", "update the driver")

    @pytest.mark.parametrize("visible", ["", "-1"])
    def test_all_hidden(self, visible):
        torch = TorchFacts(cuda_build="13.2")
        finding = machine.check_gpus(torch, driver=self.DRIVER, environ={"CUDA_VISIBLE_DEVICES": visible})
        is_fault(finding, "warn", f"CUDA_VISIBLE_DEVICES={visible}", "unset")

    def test_torch_not_loadable(self):
        torch = TorchFacts(is_loaded=False, load_error="libc10.so: cannot open shared object file")
        is_fault(machine.check_gpus(torch, driver=self.DRIVER, environ={}), "warn", "can't be asked", "mend torch")

    def test_the_driver_is_found_by_the_kernels_folder_or_on_path(self, tmp_path):
        nowhere = tmp_path / "nowhere"
        command = tmp_path / "bin" / "nvidia-smi"
        command.parent.mkdir()
        command.touch(mode=0o755)
        assert machine.cuda_driver({"PATH": str(nowhere)}, kernel=tmp_path) == str(tmp_path)
        assert machine.cuda_driver({"PATH": str(command.parent)}, kernel=nowhere) == str(command)
        assert machine.cuda_driver({"PATH": str(nowhere)}, kernel=nowhere) is None


class TestDisk:
    @pytest.mark.parametrize(("free", "status"), [(0.4, "broken"), (0.6, "warn"), (4.9, "warn"), (5.1, "ok")])
    def test_room(self, tmp_path, free, status):
        finding = machine.check_disk("runs folder", tmp_path, usage=lambda _: DiskUsage(0, 0, int(free * GIB)))
        assert finding.status == status
        assert f"{free} GiB free" in finding.detail
        assert bool(finding.fix) == (status != "ok")

    def test_a_folder_to_be_made_is_judged_by_its_parent_and_not_made(self, tmp_path):
        asked = []

        def usage(folder: Path) -> DiskUsage:
            asked.append(folder)
            return DiskUsage(9 * GIB, 0, 9 * GIB)

        is_ok(machine.check_disk("runs folder", tmp_path / "a" / "b", usage=usage))
        assert asked == [tmp_path]
        assert not list(tmp_path.iterdir())

    def test_not_writable(self, tmp_path):
        (tmp_path / "file").touch()
        is_fault(
            machine.check_disk("runs folder", tmp_path / "file" / "runs"), "broken", "can't be written", "runs_dir"
        )


class TestSharedMemory:
    @pytest.mark.parametrize(
        ("total", "memory", "status"),
        [(10, 32, "ok"), (9, 32, "warn"), (0.5, 1, "warn"), (190, 2000, "ok"), (180, 2000, "warn")],
    )
    def test_room_for_the_object_store(self, tmp_path, total, memory, status):
        """30 % of the memory, at least 1 GiB, at most 200 GB; all in GiB here."""
        finding = machine.check_shared_memory(tmp_path, memory * GIB, usage=lambda _: DiskUsage(int(total * GIB), 0, 0))
        assert finding.status == status
        assert ("--shm-size" in finding.fix) == (status != "ok")

    def test_missing(self, tmp_path):
        is_fault(machine.check_shared_memory(tmp_path / "shm", GIB), "warn", "missing", "--shm-size=1g")

    def test_a_container_has_the_memory_of_its_limit(self, tmp_path):
        limit = tmp_path / "memory.max"
        physical = machine.memory_bytes(limit)
        for text, expected in (("max\n", physical), (f"{2**60}\n", physical), ("1048576\n", 1048576)):
            limit.write_text(text)
            assert machine.memory_bytes(limit) == expected


class TestThreads:
    def test_no_more_than_cpus(self):
        is_ok(machine.check_threads({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "soon"}, 4, 4))

    @pytest.mark.parametrize(
        ("environ", "torch_threads", "named"),
        [
            ({"OMP_NUM_THREADS": "64"}, 4, "OMP_NUM_THREADS=64"),
            ({"OMP_NUM_THREADS": "8,2"}, 4, "OMP_NUM_THREADS=8"),
            ({"MKL_NUM_THREADS": "5"}, 4, "MKL_NUM_THREADS=5"),
            ({}, 16, "torch=16"),
        ],
    )
    def test_more_than_cpus(self, environ, torch_threads, named):
        finding = machine.check_threads(environ, 4, torch_threads)
        is_fault(finding, "warn", named, "4 CPUs", "export OMP_NUM_THREADS=4")

    def test_this_process_may_use_a_cpu_at_least(self):
        assert 1 <= allowed_cpus() <= (os.cpu_count() or 1)


class TestCpuLimit:
    @pytest.mark.parametrize("text", ["max 100000\n", "400000 100000\n", "garbage\n", ""])
    def test_none_or_high_enough(self, tmp_path, text):
        (tmp_path / "cpu.max").write_text(text)
        is_ok(machine.check_cpu_limit(tmp_path / "cpu.max", 4), "4 CPUs")

    def test_no_control_group(self, tmp_path):
        is_ok(machine.check_cpu_limit(tmp_path / "cpu.max", 4), "none")

    def test_lower_than_the_cpus(self, tmp_path):
        (tmp_path / "cpu.max").write_text("150000 100000\n")
        finding = machine.check_cpu_limit(tmp_path / "cpu.max", 4)
        is_fault(finding, "warn", "1.5 for 4 CPUs", "cluster.cpus_per_worker=1")


class TestOpenFiles:
    @pytest.mark.parametrize("limit", [1024, 65536, -1])
    def test_enough(self, limit):
        is_ok(machine.check_open_files(limit))

    def test_too_few(self):
        is_fault(machine.check_open_files(256), "warn", "256", "ulimit -n")


class TestRay:
    def test_new_enough(self, tmp_path):
        install(tmp_path, "ray", "2.60.0")
        is_ok(clusters.check_ray([str(tmp_path)]), "2.60.0")

    def test_too_old(self, tmp_path):
        install(tmp_path, "ray", "2.9.3")
        is_fault(clusters.check_ray([str(tmp_path)]), "broken", "2.9.3 is older than 2.52", "ray[default,train,tune]")

    def test_not_installed(self, tmp_path):
        is_fault(clusters.check_ray([str(tmp_path)]), "broken", "not installed", "uv pip install")

    def test_metadata_without_files(self, tmp_path):
        install(tmp_path, "ray", "2.60.0")
        (tmp_path / "ray" / "__init__.py").unlink()
        (tmp_path / "ray").rmdir()
        is_fault(clusters.check_ray([str(tmp_path)]), "broken", "no files", "--reinstall")


class TestRayClusters:
    def last(self, folder: Path, address: str | None) -> clusters.LastCluster:
        file = folder / "ray_current_cluster"
        if address is not None:
            file.write_text(f"{address}\n")
        return clusters.last_cluster(file)

    def test_none_was_started(self, tmp_path):
        is_ok(clusters.check_ray_clusters([], self.last(tmp_path, None)), "none")

    def test_one_runs(self, tmp_path):
        finding = clusters.check_ray_clusters(["10.0.0.1:6379"], self.last(tmp_path, None))
        is_fault(finding, "warn", "one runs here, at 10.0.0.1:6379", "ray stop")

    def test_one_runs_that_only_the_file_names(self, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            last = self.last(tmp_path, address)
            is_fault(clusters.check_ray_clusters([], last), "warn", f"one runs here, at {address};")
            is_fault(clusters.check_ray_clusters([address], last), "warn", f"one runs here, at {address};")

    def test_two_run(self, tmp_path):
        running = ["10.0.0.2:6379", "10.0.0.1:6379"]
        last = clusters.LastCluster(tmp_path / "ray_current_cluster", "10.0.0.2:6379", is_up=True)
        finding = clusters.check_ray_clusters(running, last)
        is_fault(finding, "warn", "2 run here, at 10.0.0.1:6379 and 10.0.0.2:6379", "started last, 10.0.0.2:6379;")
        assert "cluster.address=10.0.0.1:6379" in finding.fix
        is_fault(clusters.check_ray_clusters(running, self.last(tmp_path, None)), "warn", "auto means any of them")
        finding = clusters.check_ray_clusters(running, self.last(tmp_path, "127.0.0.1:1"))
        is_fault(finding, "warn", "started last, 127.0.0.1:1, which is gone")

    @pytest.mark.parametrize("address", ["127.0.0.1:{port}", "garbage", "127.0.0.1:99999999"])
    def test_one_ran(self, tmp_path, address):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = address.format(port=server.getsockname()[1])
        is_ok(clusters.check_ray_clusters([], self.last(tmp_path, address)), address, "doesn't answer")

    def test_the_file_lies_where_ray_writes_it(self):
        assert clusters.address_file({}) == Path("/tmp/ray/ray_current_cluster")
        assert clusters.address_file({"RAY_TMPDIR": "/scratch"}) == Path("/scratch/ray/ray_current_cluster")

    def test_address_of_another_cluster_in_the_environment(self):
        is_ok(clusters.check_ray_address({}))
        is_fault(clusters.check_ray_address({"RAY_ADDRESS": "10.0.0.1:6379"}), "warn", "10.0.0.1:6379", "unset")


class TestToken:
    def test_none_is_asked_for(self, tmp_path):
        is_ok(clusters.check_token({}, tmp_path), "none")
        is_ok(clusters.check_token({"RAY_AUTH_MODE": "disabled"}, tmp_path), "none")

    def test_it_is_where_ray_looks(self, tmp_path):
        is_ok(clusters.check_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, tmp_path), "RAY_AUTH_TOKEN")
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret\n")
        finding = clusters.check_token({"RAY_AUTH_MODE": "token"}, tmp_path)
        is_ok(finding, str(tmp_path / ".ray" / "auth_token"))
        assert "secret" not in finding.detail

    def test_a_token_is_asked_for_and_there_is_none(self, tmp_path):
        finding = clusters.check_token({"RAY_AUTH_MODE": "Token", "RAY_AUTH_TOKEN": " "}, tmp_path)
        is_fault(finding, "broken", "RAY_AUTH_MODE=token", "ray get-auth-token --generate")

    def test_the_file_is_missing_or_empty(self, tmp_path):
        file = tmp_path / "token"
        environ = {"RAY_AUTH_TOKEN_PATH": str(file)}
        is_fault(clusters.check_token(environ, tmp_path), "broken", f"RAY_AUTH_TOKEN_PATH={file}", "no such file")
        file.write_text("\n")
        is_fault(clusters.check_token(environ, tmp_path), "broken", "empty", "put the cluster's token there")

    def test_the_file_cannot_be_read(self, tmp_path):
        (tmp_path / ".ray" / "auth_token").mkdir(parents=True)
        is_fault(clusters.check_token({}, tmp_path), "broken", "auth_token", "can't be read", "chmod 600")

    def test_a_mode_that_ray_does_not_know(self, tmp_path):
        is_fault(clusters.check_token({"RAY_AUTH_MODE": "tokens"}, tmp_path), "warn", "RAY_AUTH_MODE=tokens", "unset")


def test_a_check_that_fails_is_a_finding():
    def fail() -> Finding:
        raise ModuleNotFoundError("No module named 'ray'")

    finding = examine("Ray clusters", fail)
    is_fault(finding, "broken", "can't be checked: ModuleNotFoundError: No module named 'ray'")
    assert finding.name == "Ray clusters"


class TestUpload:
    def test_what_submissions_send(self):
        is_ok(sending.check_upload(sending.everything_sent), "100.0 MiB")
        assert {"jobs/finetune.py", "graftstack/cli.py"} <= set(sending.everything_sent())

    def test_too_large(self, tmp_path):
        (tmp_path / "weights.bin").write_bytes(bytes(3000))
        files = {"graftstack/weights.bin": tmp_path / "weights.bin", "graftstack/cli.py": b"print()"}
        finding = sending.check_upload(lambda: files, most_bytes=2000)
        is_fault(
            finding, "broken", "2.9 KiB to send, more than 2.0 KiB", "graftstack/weights.bin (2.9 KiB)", ".gitignore"
        )

    def test_git_is_not_there(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        is_fault(sending.check_upload(sending.everything_sent), "warn", "--with-code: git can't list", "install git")

    def test_not_readable(self, tmp_path):
        finding = sending.check_upload(lambda: {"gone.py": tmp_path / "gone.py"})
        is_fault(finding, "broken", "gone.py: can't be read", "mend that")


class TestRunsFolder:
    def test_a_path(self, tmp_path):
        is_ok(storage.check_runs_folder(str(tmp_path)), "free")
        (tmp_path / "file").touch()
        is_fault(storage.check_runs_folder(str(tmp_path / "file" / "runs")), "broken", "can't be written", "runs_dir")

    def test_a_uri_is_written_read_and_left_as_it_was(self):
        import fsspec

        is_ok(storage.check_runs_folder("memory://doctor/runs"), "written, read and removed")
        assert not fsspec.filesystem("memory").find("/doctor")

    def test_the_package_of_the_scheme_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        is_fault(storage.check_runs_folder("gs://bucket/runs"), "broken", "gcsfs", "'graftstack[gcs]'")

    def test_nobody_knows_the_scheme(self):
        is_fault(storage.check_runs_folder("s4://bucket/runs"), "broken", "Protocol not known: s4", "or use a path")

    def test_nobody_answers(self):
        finding = storage.check_runs_folder(f"http://127.0.0.1:{free_port()}/runs")
        is_fault(finding, "broken", "runs: ", "127.0.0.1", "check the address")

    def test_what_listens_says_nothing(self, monkeypatch):
        monkeypatch.setattr(storage, "_ANSWER_WITHIN_S", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as server:
            finding = storage.check_runs_folder(f"http://127.0.0.1:{server.getsockname()[1]}/runs")
        is_fault(finding, "broken", "no answer in", "check the address")

    def test_it_can_only_be_read(self):
        class Pages(SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            finding = storage.check_runs_folder(f"http://127.0.0.1:{server.server_port}/")
            server.shutdown()
        is_fault(finding, "broken", "when an object is written", "check the address and the access")

    @pytest.mark.parametrize(
        ("method", "broken", "words"),
        [
            ("cat_file", lambda *_, **__: b"another", "what is read isn't what was written"),
            ("rm_file", lambda *_: None, "what was removed is still there"),
        ],
    )
    def test_a_store_that_forgets_or_keeps(self, monkeypatch, method, broken, words):
        from fsspec.implementations.memory import MemoryFileSystem

        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, method, broken)
            is_fault(storage.check_runs_folder("memory://doctor/kept"), "broken", words, "ask for the rights")
        for left in MemoryFileSystem().find("/doctor"):
            MemoryFileSystem().rm_file(left)


class TestTarget:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["k8s.queue=x"], "k8s.queue=x: only Kubernetes is looked at by the words of a job; add --to k8s"),
            (["k8s.queue=x", "--to", "http://127.0.0.1:1"], "k8s.queue=x: only Kubernetes"),
            (["--to", "k8s", "data=digits"], "data=digits: no word of pods"),
            (["--to", "k8s", "k8s.qeue=x"], "k8s.qeue=x: unknown key; did you mean queue"),
            (["--to", "k8s", "k8s.namespace=_"], "k8s.namespace=_: can't be"),
            (["--to", "k8s", "--runs-dir", "x"], "--runs-dir x: on Kubernetes runs lie on the claim of the pods"),
        ],
    )
    def test_parts_that_do_not_go_together_are_refused(self, capsys, words, message):
        assert main(["doctor", *words]) == 2
        assert f"graftstack: {message}" in capsys.readouterr().err


class TestCommand:
    FAKE_TORCH = """
class version: cuda = None
class cuda:
    is_available = staticmethod(lambda: False)
def get_num_threads(): return 1
"""

    def doctor(self, site: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """``graftstack doctor`` in a process that finds the packages in `site` first."""
        command = "import sys; from graftstack.cli import main; sys.exit(main(sys.argv[1:]))"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return subprocess.run(
            [sys.executable, "-c", command, "doctor", *words],
            env={**inherited, "PYTHONPATH": str(site), "COLUMNS": "120", **environ},
            cwd=site,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    @pytest.fixture
    def site(self, tmp_path):
        """A torch and a torchvision that load in no time."""
        install(tmp_path, "torch", "2.15.0", build="cpu")
        install(tmp_path, "torchvision", "0.29.2", requires=("torch>=2.14.0",), build="cpu")
        (tmp_path / "torch" / "__init__.py").write_text(self.FAKE_TORCH)
        (tmp_path / "torchvision" / "ops.py").touch()
        return tmp_path

    def test_json_says_what_the_exit_status_says(self, site):
        done = self.doctor(site, "--json")
        findings = json.loads(done.stdout)
        assert all(finding.keys() == {"name", "status", "detail", "fix"} for finding in findings)
        assert {finding["name"]: finding for finding in findings}["torch builds"]["status"] == "ok"
        assert done.returncode == int(any(finding["status"] == "broken" for finding in findings))
        assert not done.stderr

    def test_a_mismatched_torchvision_is_named_and_fails(self, site):
        error = "operator torchvision::nms does not exist"
        (site / "torchvision" / "ops.py").write_text(f"raise RuntimeError({error!r})")
        done = self.doctor(site)
        assert done.returncode == 1
        text = " ".join(done.stdout.split())
        assert error in text
        assert "install both from the same index" in text
        assert not done.stderr

    def test_a_torch_that_does_not_load_hides_nothing_else(self, site):
        (site / "torch" / "__init__.py").write_text("raise OSError('libcudart.so: cannot open shared object file')")
        done = self.doctor(site, "--json")
        found = {finding["name"]: finding for finding in json.loads(done.stdout)}
        assert done.returncode == 1
        assert "libcudart.so" in found["torch builds"]["detail"]
        assert found["Ray"]["status"] == "ok"

    def test_what_torch_says_of_an_old_driver_is_quoted(self, site):
        warning = "The NVIDIA driver on your system is too old"
        is_available = f"import warnings\nclass cuda:\n  def is_available(): warnings.warn({warning!r})\n"
        (site / "torch" / "__init__.py").write_text(f"{self.FAKE_TORCH}{is_available}version.cuda = '13.2'\n")
        (site / "bin").mkdir()
        (site / "bin" / "nvidia-smi").touch(mode=0o755)
        done = self.doctor(site, "--json", PATH=str(site / "bin"), CUDA_VISIBLE_DEVICES="0")
        found = {finding["name"]: finding for finding in json.loads(done.stdout)}
        assert done.returncode == 1
        assert warning in found["GPUs"]["detail"]
        assert not done.stderr

    def test_a_missing_rich_leaves_plain_lines(self, site):
        (site / "rich").mkdir()
        (site / "rich" / "__init__.py").touch()
        done = self.doctor(site)
        assert "ok: Python: 3." in done.stdout
        assert not done.stderr

    def test_metadata_that_cannot_be_read_is_a_finding(self, site):
        (site / "torchvision-0.29.2.dist-info" / "METADATA").write_text(
            "Name: torchvision\nVersion: 1\nRequires-Dist: ?"
        )
        done = self.doctor(site, "--json")
        found = {finding["name"]: finding for finding in json.loads(done.stdout)}
        assert done.returncode == 1
        assert found["torch builds"]["detail"].startswith("can't be checked: InvalidRequirement")

    def test_a_cache_folder_that_cannot_be_made_fails(self, site):
        (site / "file").touch()
        done = self.doctor(site, "--json", GRAFTSTACK_CACHE=str(site / "file" / "cache"))
        found = {finding["name"]: finding for finding in json.loads(done.stdout)}
        assert done.returncode == 1
        assert found["cache folder"]["status"] == "broken"

    def test_the_real_torch_loads_and_a_check_that_fails_would_have_the_same_name(self, tmp_path, monkeypatch, capsys):
        names = []

        def examine(name: str, check: Callable[[], Finding]) -> Finding:
            names.append(name)
            return check()

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(this_machine, "examine", examine)
        run_doctor(as_json=True)
        found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
        assert found["torch builds"]["status"] == "ok", found["torch builds"]
        assert found["packages"]["status"] == "ok", found["packages"]
        assert list(found) == names
