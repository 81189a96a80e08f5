"""Losing the head of a cluster: a job ends with an error that says so, even while it waits where nothing is heard."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from graftstack.cluster import lost_head
from graftstack.cluster.lost_head import minding_head
from graftstack.config.schema import ClusterConfig, ClusterKind
from graftstack.errors import EXIT_FAILED, TrainingError

pytestmark = pytest.mark.usefixtures("interruptible")

CLUSTER = ClusterConfig(kind=ClusterKind.ray, address="head:6379")

# A main thread that is deaf to interrupts stands for one that waits inside Ray.
DEAF = """
import signal, socket, sys, time
from graftstack.cluster import lost_head
from graftstack.config.schema import ClusterConfig, ClusterKind

signal.signal(signal.SIGINT, lambda *_: None)
lost_head._LOOK_EVERY_S, lost_head._EARLIER_S, lost_head._END_S = 0.05, 0.5, 0.2
with socket.create_server(("127.0.0.1", 0)) as head:
    address = f"127.0.0.1:{head.getsockname()[1]}"
with lost_head.minding_head(ClusterConfig(kind=ClusterKind.ray, address="head:6379"), address):
    print("waits", file=sys.stderr)
    while True:
        time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would give up after a second."""
    monkeypatch.setattr(lost_head, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(lost_head, "_EARLIER_S", 0.5)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(head: socket.socket) -> str:
    return f"127.0.0.1:{head.getsockname()[1]}"


def hears_nothing(_: str, *, within_s: float) -> bool:
    """As where packets get lost: it takes its time."""
    time.sleep(min(within_s, 0.8))
    return False


def test_a_block_whose_head_is_there_is_left_alone(head: socket.socket) -> None:
    with minding_head(CLUSTER, address_of(head)):
        time.sleep(1)


def test_a_head_that_comes_back_in_time_ends_nothing(head: socket.socket) -> None:
    place = head.getsockname()
    with minding_head(CLUSTER, address_of(head)):
        head.close()
        time.sleep(0.2)
        with socket.create_server(place):
            time.sleep(1)
        time.sleep(0.2)  # silent again, for less than it may be


def test_who_is_through_is_left_alone_amid_a_look(head: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_head, "listens", hears_nothing)
    with minding_head(CLUSTER, address_of(head)):
        time.sleep(0.2)  # the first look is under way, and is to find that the head has been silent for long
    time.sleep(1)


def test_an_error_amid_a_look_is_the_only_one(head: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_head, "listens", hears_nothing)
    with pytest.raises(TrainingError, match="the cluster is gone"):
        lose(head, OSError("lost a pipe"))
    time.sleep(1)


@pytest.mark.parametrize(("tries", "silence_s"), [("60", 40.0), ("10", 5.0), ("soon", 40.0)])
def test_a_head_may_be_silent_for_less_than_ray_tries(
    tries: str, silence_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_head, "_EARLIER_S", 20.0)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", tries)
    assert lost_head._silence_s() == silence_s


def lose(head: socket.socket, error: BaseException | None = None) -> None:
    """A block whose head goes away, and which meets `error`, or waits."""
    with minding_head(CLUSTER, address_of(head)):
        head.close()
        if error is not None:
            raise error
        time.sleep(20)


def test_a_block_that_waits_is_interrupted_and_says_why(head: socket.socket) -> None:
    began = time.monotonic()
    with pytest.raises(
        TrainingError, match=r"^cluster\.address=head:6379: the cluster is gone \(nobody answers there\)"
    ):
        lose(head)
    assert time.monotonic() - began < 10


def test_what_is_met_first_says_why(head: socket.socket) -> None:
    with pytest.raises(TrainingError, match=r"the cluster is gone \(lost a pipe\); go on in another one"):
        lose(head, OSError("lost a pipe"))


@pytest.mark.parametrize("error", [TrainingError("the loss is nan"), OSError("no space"), KeyboardInterrupt()])
def test_other_errors_are_those_of_the_block(head: socket.socket, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, minding_head(CLUSTER, address_of(head)):
        raise error
    assert caught.value is error


def test_a_process_that_hears_nothing_ends_with_the_same_words() -> None:
    done = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == EXIT_FAILED
    assert done.stderr.splitlines()[-1] == (
        "graftstack: cluster.address=head:6379: the cluster is gone (nobody answers there); go on in another one with "
        "resume=true and its cluster.address"
    )
