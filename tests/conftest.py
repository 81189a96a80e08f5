"""What all tests share."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def embedded_ray() -> Iterator[None]:
    """A running Ray on this machine, which jobs of the test process join: starting one costs seconds."""
    from graftstack.cluster.session import ray_session
    from graftstack.config.schema import ClusterConfig

    with ray_session(ClusterConfig(), verbose=False):
        yield


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
