"""The log of a job, which KubeRay's submitter prints: each line once, whatever becomes of connections and pods."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from queue import Queue
from threading import Event, Thread
from typing import Any

from graftstack.submit.kube_api import KubeApi, Manifest, RefusedError, UnreachableError

# What the submitter prints when it has given the job to Ray; what follows is the log of a run of the entrypoint that
# nobody has seen yet.
_SUBMITTED = "submitted successfully"

_SUBMISSION = "RAY_JOB_SUBMISSION_ID"
_AGAIN_S = 1.0

# Clocks of nodes, and lines on their way when a connection broke.
_OVERLAP_S = 10


class LogReader(Thread):
    """Reads the log of a job in the background, into a queue of lines."""

    def __init__(self, api: KubeApi, job: str, *, follow: bool = True) -> None:
        super().__init__(daemon=True, name=f"log of {job}")
        self.lines: Queue[str] = Queue()
        self._api, self._job, self._follow = api, job, follow
        self._is_over = Event()
        self._finished: set[str] = set()
        self._shown: dict[str, list[int]] = {}

    def finish(self) -> None:
        """The job is over: read what is left, and end."""
        self._is_over.set()

    def run(self) -> None:
        """Reads pod after pod."""
        while True:
            was_over = self._is_over.is_set()
            for pod in self._pods():
                self._read(pod)
            if was_over:
                return
            self._is_over.wait(_AGAIN_S)

    def _pods(self) -> list[Manifest]:
        with contextlib.suppress(RefusedError, UnreachableError):  # the one who follows says so, or will be answered
            return [
                pod
                for pod in self._api.pods(f"job-name={self._job}")
                if pod["metadata"]["name"] not in self._finished and _has_log(pod)
            ]
        return []

    def _read(self, pod: Manifest) -> None:
        """Reads the log of one pod to its end. What an earlier pod showed of the same submission isn't shown again."""
        name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]
        shown = self._shown.setdefault(_submission(container), [])
        seen = deque(shown)
        for line in self._lines(name, container["name"]):
            if _SUBMITTED in line:
                shown.clear()
                seen.clear()
            mark = hash(line)
            if mark in seen:
                while seen.popleft() != mark:
                    pass
                continue
            shown.append(mark)
            self.lines.put(line)
        self._finished.add(name)

    def _lines(self, pod: str, container: str) -> Iterator[str]:
        """Yields each line of a container's log once, over as many connections as it takes."""
        cursor = _Cursor()
        while True:
            try:
                with self._api.log(pod, container, since_s=cursor.since_s(), follow=self._follow) as lines:
                    yield from cursor.unread(lines)
                if not self._follow or self._has_ended(pod):
                    return
            except RefusedError as error:
                is_passing = error.status >= 500 or error.status == 429
                if error.status == 404 or (not is_passing and self._has_ended(pod)):
                    return
            except UnreachableError:  # the line that was on its way comes again
                pass
            if self._is_over.wait(_AGAIN_S) and self._has_ended(pod):
                return

    def _has_ended(self, pod: str) -> bool:
        """Whether a pod prints nothing more; one that can't be asked about may."""
        try:
            found = [item for item in self._api.pods(f"job-name={self._job}") if item["metadata"]["name"] == pod]
        except (RefusedError, UnreachableError):
            return False
        return not found or (found[0].get("status") or {}).get("phase") in ("Succeeded", "Failed")


class _Cursor:
    """Where a log was left when the connection broke: at the last of the lines that have one time."""

    def __init__(self) -> None:
        self._last, self._num_last = "", 0
        self._heard: float | None = None

    def since_s(self) -> int | None:
        """Returns how many seconds to ask for; None: all."""
        return None if self._heard is None else math.ceil(time.monotonic() - self._heard) + _OVERLAP_S

    def unread(self, lines: Iterator[str]) -> Iterator[str]:
        """Yields those lines of a new connection that are new, without their times."""
        is_new, num_same = self._heard is None, 0
        for line in lines:
            stamp, _, text = line.partition(" ")
            when = _sortable(stamp)
            num_same += when == self._last
            # Past what is known nothing is left out, even if the clock of the node is set back.
            is_new = is_new or when > self._last or (when == self._last and num_same > self._num_last)
            if is_new:
                self._num_last = self._num_last + 1 if when == self._last else 1
                self._last, self._heard = when, time.monotonic()
                yield text


def _has_log(pod: Manifest) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Running", "Succeeded", "Failed")


def _submission(container: dict[str, Any]) -> str:
    """Returns Ray's id of what a submitter submits."""
    return next((str(item.get("value")) for item in container.get("env") or [] if item.get("name") == _SUBMISSION), "")


def _sortable(stamp: str) -> str:
    """Returns a time of a log as a text that sorts: its fractions of a second have up to nine digits."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return f"{whole}.{fraction:0<9}"
