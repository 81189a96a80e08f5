"""Nodes of Ray on loopback, started as a person or an operator starts them, each with a folder of its own."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import requests


class RunningHead(NamedTuple):
    """A head that answers."""

    dashboard: str
    """The URL that jobs are submitted to."""
    gcs: str
    """The address that nodes join."""
    token: str


@contextmanager
def running_head(
    token: str,
    options: Sequence[str] = ("--num-cpus=2",),
    *,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[RunningHead]:
    """A head that asks for a token, for the duration of the block."""
    port, dashboard = free_port(), free_port()
    found = RunningHead(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", token)
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
    words = ["--head", "--dashboard-host=127.0.0.1", *ports, *options]
    with _running_node(words, token, cwd=cwd, environ=environ or {}) as node:
        wait_until(lambda: node.process.poll() is not None or is_up(found), 90)
        assert node.process.poll() is None, node.log.read_text()
        yield found


@contextmanager
def running_worker(
    head: RunningHead,
    options: Sequence[str] = ("--num-cpus=1",),
    *,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Another node of the cluster, for the duration of the block; it may join a moment later."""
    with _running_node([f"--address={head.gcs}", *options], head.token, cwd=cwd, environ=environ or {}):
        yield


class _Node(NamedTuple):
    process: "subprocess.Popen[bytes]"
    log: Path


@contextmanager
def _running_node(words: Sequence[str], token: str, *, cwd: Path | None, environ: Mapping[str, str]) -> Iterator[_Node]:
    # Sockets lie in this folder, and the name of a socket is short.
    with tempfile.TemporaryDirectory(prefix="node-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        options = [
            *("--block", "--disable-usage-stats", f"--temp-dir={folder}", f"--object-store-memory={100 * 1024**2}"),
            *("--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}"),
        ]
        log = Path(folder, "node.log")
        with (
            log.open("wb") as out,
            subprocess.Popen(
                ["ray", "start", *options, *words],  # of one that is given twice the last counts
                cwd=cwd,
                env={**node_environment(token), **environ},
                stdout=out,
                stderr=out,
            ) as process,
        ):
            try:
                yield _Node(process, log)
            finally:
                kill_all(process.pid)


def node_environment(token: str) -> dict[str, str]:
    """The environment of a node, and of a shell beside it."""
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    return environment_without_ray() | own


def environment_without_ray() -> dict[str, str]:
    """What a person's shell has; a test of Ray may have left more in this process."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


def is_up(head: RunningHead) -> bool:
    """Whether the head takes jobs."""
    with suppress(requests.RequestException):
        headers = {"Authorization": f"Bearer {head.token}"}
        return requests.get(f"{head.dashboard}/api/jobs/", headers=headers, timeout=5).status_code == 200
    return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def kill_all(pid: int) -> None:
    """Kills a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:  # first who would replace the others
            with suppress(psutil.NoSuchProcess):
                one.kill()
