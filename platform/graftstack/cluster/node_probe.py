"""What each node of a Ray cluster is like, and whether all nodes share a folder.

This file is sent to the cluster as it is, and runs there as a job of its own: it needs no graftstack, and imports the
standard library and ray alone (and fsspec, for a folder that is a URI). It is written for any Python that Ray has ever
had, since a Python too old is among the things to be found. So what it shares with the rest of graftstack is defined
here: `leading_number` and `within`.

Beside it lies ``probe.json``: ``{"place": ..., "nonce": ...}``. It prints two lines that begin with `MARK`, each with a
JSON object behind it: first ``{"num_nodes": 3}``, and at its end ``{"nodes": [...]}``, a row for each node that is
alive. What it writes into the folder it removes, whatever happens.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Answer = TypeVar("Answer")

MARK = "graftstack-probe: "
SETTINGS_FILE = "probe.json"

# Workers start in seconds; on a node that takes so long, no job would start either.
_ANSWER_WITHIN_S = 60.0
# What was started answers at once.
_TIDY_WITHIN_S = 10.0
# Clients of object stores try for minutes where nobody answers, and a network file system waits for ever.
_STORAGE_WITHIN_S = 10.0

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


class Disk:
    """A folder at a path."""

    def __init__(self, location: str) -> None:
        self._folder = Path(location)
        self._made: list[Path] = []

    def write(self, name: str, content: bytes) -> None:
        """Makes the folder, as a job would, and a file in it."""
        self._made = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def sees(self, name: str, content: bytes) -> bool:
        """Returns whether the file is there. It is opened, not listed: network file systems keep lists for a while."""
        try:
            return (self._folder / name).read_bytes() == content
        except OSError:
            return False

    def remove(self, name: str) -> None:
        """Removes the file if it is there."""
        with suppress(FileNotFoundError, NotADirectoryError):
            (self._folder / name).unlink()

    def tidy(self) -> None:
        """Removes the folders that were made, unless somebody uses them by now."""
        with suppress(OSError):
            for folder in self._made:
                with suppress(FileNotFoundError):  # another node made it too, and was first
                    folder.rmdir()

    def free_bytes(self) -> int | None:
        """Returns what the disk of the folder has room for."""
        there = next(folder for folder in (self._folder, *self._folder.parents) if folder.exists())
        return shutil.disk_usage(there).free


class Store:
    """A folder at a URI."""

    def __init__(self, location: str) -> None:
        import fsspec

        self._files, self._root = fsspec.core.url_to_fs(location.rstrip("/"))

    def write(self, name: str, content: bytes) -> None:
        """Makes an object."""
        self._files.pipe_file(self._root + "/" + name, content)

    def sees(self, name: str, content: bytes) -> bool:
        """Returns whether the object is there."""
        try:
            return bool(self._files.cat_file(self._root + "/" + name) == content)
        except OSError:
            return False

    def remove(self, name: str) -> None:
        """Removes the object if it is there."""
        with suppress(FileNotFoundError):
            self._files.rm_file(self._root + "/" + name)

    def tidy(self) -> None:
        """An object store has no folders."""

    def free_bytes(self) -> int | None:
        """An object store has room."""
        return None


class Prober:
    """An actor on one node."""

    def __init__(self, settings: Mapping[str, str], node_id: str) -> None:
        self._settings = settings
        self._node_id = node_id
        self._place: Disk | Store | None = None
        self._is_late = False

    def look(self) -> dict[str, Any]:
        """Returns what this node is like, and leaves a file in the folder."""
        facts = node_facts()
        try:
            facts["free_bytes"] = within(_STORAGE_WITHIN_S, self._write)
        except TimeoutError as error:
            self._is_late = True
            facts["storage_error"] = one_line(error)
        except Exception as error:  # each store has exceptions of its own
            facts["storage_error"] = one_line(error)
        return facts

    def unseen(self, node_ids: Sequence[str]) -> list[str]:
        """Returns the nodes whose files aren't in the folder, as this node sees it."""
        place = self._place
        if place is None:
            return []
        return [node for node in node_ids if not place.sees(self._name(node), self._content(node))]

    def remove(self) -> None:
        """Removes the file of this node."""
        if self._place is not None:
            self._place.remove(self._name(self._node_id))

    def tidy(self) -> None:
        """Removes the folders that this node made."""
        if self._place is not None:
            self._place.tidy()

    def _write(self) -> int | None:
        """Leaves a file in the folder, and returns what there is room for; one that nobody waits for any more goes."""
        where = self._settings["place"]
        place: Disk | Store = Store(where) if "://" in where else Disk(where)
        try:
            place.write(self._name(self._node_id), self._content(self._node_id))
            return place.free_bytes()
        finally:
            self._place = place
            if self._is_late:
                self.remove()
                self.tidy()

    def _name(self, node_id: str) -> str:
        return f".graftstack-doctor-{self._settings['nonce']}-{node_id[:16]}"

    def _content(self, node_id: str) -> bytes:
        return f"{self._settings['nonce']} {node_id}".encode()


def node_facts() -> dict[str, Any]:
    """Returns what can be said of this node without loading anything large."""
    import ray

    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "graftstack": stated("graftstack", "__init__.py", "__version__"),
        "torch": stated("torch", "version.py", "__version__"),
        "cuda_build": stated("torch", "version.py", "cuda"),
        "cuda_driver": cuda_driver(),
        "cpus": usable_cpus(),
        "omp_threads": leading_number(os.environ.get("OMP_NUM_THREADS", "")),
        "is_compiled": is_compiled("torch"),
        "ray_free_bytes": shutil.disk_usage(ray._private.worker._global_node.get_session_dir_path()).free,  # noqa: SLF001
    }


def stated(package: str, file: str, name: str) -> str | None:
    """Returns the text that a file of a package gives to a name, without importing the package."""
    found = find_spec(package)
    if found is None or not found.origin:
        return None
    path = Path(found.origin).with_name(file)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    match = re.search(r"^" + name + r"(?:\s*:[^=\n]*)?\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return match.group(1) if match else None


def is_compiled(package: str) -> bool | None:
    """Returns whether the bytecode of a package lies on the disk; None where there is no such package."""
    found = find_spec(package)
    return Path(cache_from_source(found.origin)).is_file() if found is not None and found.origin else None


def cuda_driver() -> str | None:
    """Returns the newest CUDA that the driver of this node can run, such as ``12.8``; None without a driver."""
    number = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if status == 0 and number.value else None


def usable_cpus() -> int:
    """Returns the CPUs that this process may use, within the limit of its container."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = (_CPU_MAX.read_text().strip() if _CPU_MAX.is_file() else "").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        return max(1, min(num_cpus, int(quota) // int(period)))
    return num_cpus


def within(seconds: float, function: Callable[[], Answer]) -> Answer:
    """Returns what a function returns, or raises what it raises.

    Raises:
        TimeoutError: it takes longer. It is left alone then, and keeps no process from ending.
    """
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # whoever waits raises it
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not future.done():
        raise TimeoutError(f"no answer in {seconds:g} s")
    return future.result()


def leading_number(text: str) -> int | None:
    """``4,2`` is a number for each level of nesting: the first counts."""
    found = re.match(r"\s*(\d+)", text)
    return int(found.group(1)) if found else None


def one_line(error: BaseException) -> str:
    """Returns the first line of what an exception says."""
    error = getattr(error, "cause", None) or error  # what a task raised lies inside of what Ray raises
    text = str(getattr(error, "strerror", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def ask(probers: Mapping[str, Any], method: str, *arguments: Any, within_s: float) -> dict[str, Any]:
    """Returns what each node answered; an exception where it didn't."""
    import ray

    asked = {node: getattr(prober, method).remote(*arguments) for node, prober in probers.items()}
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=within_s) if asked else ([], [])
    answers: dict[str, Any] = {}
    for node, answer in asked.items():
        if answer not in ready:
            answers[node] = TimeoutError(f"no answer of a worker there in {within_s:.0f} s")
            continue
        try:
            answers[node] = ray.get(answer)
        except Exception as error:  # whatever it is, it is the finding
            answers[node] = error
    return answers


def probe(settings: Mapping[str, str], say: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Returns a row for each node that is alive."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    say({"num_nodes": len(nodes)})
    remote = ray.remote(num_cpus=0)(Prober)
    probers = {
        node: remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            settings, node
        )
        for node in nodes
    }
    try:
        rows = ask(probers, "look", within_s=_ANSWER_WITHIN_S)
        written = [node for node, row in rows.items() if isinstance(row, dict) and "storage_error" not in row]
        unseen = ask({node: probers[node] for node in written}, "unseen", written, within_s=_ANSWER_WITHIN_S)
    finally:
        ask(probers, "remove", within_s=_TIDY_WITHIN_S)
        ask(probers, "tidy", within_s=_TIDY_WITHIN_S)
    return [_row(node, rows[node["NodeID"]], unseen) for node in nodes.values()]


def _row(node: Mapping[str, Any], answer: Any, unseen: Mapping[str, Any]) -> dict[str, Any]:
    resources = node["Resources"]
    row: dict[str, Any] = {
        "node_id": node["NodeID"],
        "ip": node["NodeManagerAddress"],
        "is_head": "node:__internal_head__" in resources,
        "ray_cpus": resources.get("CPU", 0.0),
        "ray_gpus": resources.get("GPU", 0.0),
    }
    if isinstance(answer, BaseException):
        return dict(row, error=one_line(answer))
    others = unseen.get(node["NodeID"], [])
    if isinstance(others, BaseException):
        return dict(row, error=one_line(others))
    return dict(row, unseen=others, **answer)


def main() -> None:
    """Looks at all nodes of the cluster that this runs on."""
    import ray

    settings = json.loads(Path(__file__).with_name(SETTINGS_FILE).read_text(encoding="utf-8"))
    ray.init(log_to_driver=False, logging_level="ERROR")
    # Who stops the job mustn't leave files behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    say({"nodes": probe(settings, say)})


def say(what: dict[str, Any]) -> None:
    """Prints a line for whoever reads the log."""
    sys.stdout.write(MARK + json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
