"""What all tests share."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data and weights, for tests marked `realdata`."""
    folder = Path(os.environ.get("GRAFTSTACK_TEST_DATA", REPOSITORY.parent / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder}: no real data there; set GRAFTSTACK_TEST_DATA")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _image_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps decoded images out of the user's own cache."""
    os.environ["GRAFTSTACK_CACHE"] = str(tmp_path_factory.mktemp("image-cache"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from threads, and pay for them where tests run side by side.

    Set for each test: a job that runs in this process leaves its own number behind, on which the last bits depend.
    """
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C interrupt: a shell that runs the tests in the background makes them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def embedded_ray() -> Iterator[None]:
    """A running Ray on this machine, which jobs of the test process join: starting one costs seconds."""
    from graftstack.cluster.session import ray_session
    from graftstack.config.schema import ClusterConfig

    with ray_session(ClusterConfig(), verbose=False):
        yield


class S3:
    """A server that speaks S3, `s3_server.py` in a process of its own, and a bucket there."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, REPOSITORY / "tests/s3_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        self.environ = {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "graftstack", "AWS_SECRET_ACCESS_KEY": "x"}
        self.bucket = ""

    @cached_property
    def fs(self) -> Any:
        """What a test looks into the buckets with."""
        from s3fs import S3FileSystem

        return S3FileSystem(key="graftstack", secret="x", endpoint_url=self.url, use_listings_cache=False)

    @property
    def uri(self) -> str:
        """Of the bucket."""
        return f"s3://{self.bucket}"

    def ask(self, command: str) -> Any:
        """Returns the answer of the server to one of its commands."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def requests(self) -> list[str]:
        """Returns what has been asked since the last time."""
        return list(self.ask("requests"))

    def close(self) -> None:
        """Ends the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3]:
    server = S3()
    yield server
    server.close()


@pytest.fixture
def s3(_s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A server with an empty bucket, which the environment leads to; nothing else there does."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in _s3_server.environ.items():
        monkeypatch.setenv(name, value)
    _s3_server.bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    _s3_server.fs.mkdir(_s3_server.bucket)
    _s3_server.requests()
    return _s3_server


@pytest.fixture
def start_driver() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts jobs as a person does: ``start_driver(job, *overrides)``. Their processes don't outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(job: str, *overrides: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "graftstack", job, *overrides],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # A shell that runs the tests in the background makes them, and so their children, ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
