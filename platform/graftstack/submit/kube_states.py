"""What the objects of a job say of it: how far it is, why it waits, and how it ended. Plain functions of manifests."""

import re
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

from graftstack.config.kubernetes_syntax import quantity
from graftstack.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED

Manifest = dict[str, Any]

# The image isn't there, and the node has tried more than once or needs no trying.
_NO_IMAGE = {"ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_NOT_YET = {"ErrImagePull", "CreateContainerConfigError", "CreateContainerError", "CrashLoopBackOff"}

_EXIT_STATUS = re.compile(r"failed with exit code (-?\d+)")


_DEADLINES = {
    "DeadlineExceeded": "k8s.active_deadline_s is over; raise it, and submit the job again to go on",
    "PreRunningDeadlineExceeded": "k8s.pending_deadline_s is over and its cluster isn't up; raise it, or ask for less",
}


class Phase(Enum):
    """How far a job is."""

    waiting = "waiting"
    running = "running"
    succeeded = "succeeded"
    failed = "failed"
    stopped = "stopped"

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self not in (Phase.waiting, Phase.running)


class Reason(NamedTuple):
    """Why a job waits."""

    text: str
    remedy: str = ""
    is_final: bool = False
    """It would wait for ever."""


class End(NamedTuple):
    """How a job ended."""

    exit_status: int
    text: str


def phase(job: Manifest) -> Phase:
    """Returns how far a RayJob is. A word that isn't known is no end."""
    status = job.get("status") or {}
    ended = {"SUCCEEDED": Phase.succeeded, "STOPPED": Phase.stopped, "FAILED": Phase.failed}
    match status.get("jobDeploymentStatus"):
        case "Complete":
            return ended.get(str(status.get("jobStatus")), Phase.running)
        case "Failed" | "ValidationFailed":
            return Phase.stopped if status.get("jobStatus") == "STOPPED" else Phase.failed
        case "Running":
            return Phase.running
    return Phase.waiting


def end(job: Manifest) -> End:
    """Returns how a RayJob that is over ended, with the exit status of its entrypoint."""
    match phase(job):
        case Phase.succeeded:
            return End(EXIT_DONE, "done")
        case Phase.stopped:
            return End(EXIT_INTERRUPTED, "stopped")
    status = job.get("status") or {}
    why, message = status.get("reason"), _first_line(status.get("message") or "")
    if why in _DEADLINES:
        return End(EXIT_FAILED, _DEADLINES[why])
    if why == "ValidationFailed":
        return End(EXIT_BAD_INPUT, f"the operator refused it: {message}")
    if found := _EXIT_STATUS.search(message):
        code = int(found[1])
        return End(128 - code if code < 0 else code or EXIT_FAILED, f"failed with exit status {code}")
    return End(EXIT_FAILED, f"failed ({why or 'no reason given'}): {message or 'see its log'}")


def reasons(
    job: Manifest, pods: Sequence[Manifest], warnings: Sequence[Manifest], workloads: Sequence[Manifest]
) -> list[Reason]:
    """Returns why a job waits, what matters most first.

    Args:
        job: The RayJob.
        pods: Those of its cluster and its submitter.
        warnings: Events of type Warning of the job and its cluster.
        workloads: What Kueue made of it.
    """
    found = [*_of_events(warnings), *_of_pods(pods), *_of_workloads(workloads)]
    status = job.get("status") or {}
    if not found and (job.get("spec") or {}).get("suspend") and not workloads:
        found.append(Reason("it is suspended", "set spec.suspend: false to let it start"))
    if not found and not status.get("jobDeploymentStatus"):
        found.append(Reason("the operator hasn't looked at it yet", "see whether KubeRay runs"))
    return sorted(dict.fromkeys(found), key=lambda reason: not reason.is_final)


def retries(job: Manifest) -> int:
    """Returns how often the job failed and was given a new cluster."""
    failed = (job.get("status") or {}).get("failed") or 0
    return int(failed)


def _of_pods(pods: Sequence[Manifest]) -> Iterator[Reason]:
    for pod in pods:
        status = pod.get("status") or {}
        for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
            waiting = (container.get("state") or {}).get("waiting") or {}
            why, message = waiting.get("reason"), _first_line(waiting.get("message") or "")
            if why in _NO_IMAGE:
                image = container.get("image")
                remedy = "push it, or give k8s.image and k8s.image_pull_secrets as the registry has them"
                yield Reason(f"k8s.image={image}: can't be pulled ({message or why})", remedy, is_final=True)
            elif why in _NOT_YET:
                yield Reason(f"{pod['metadata']['name']}: {why} ({message})")
        for condition in status.get("conditions") or []:
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                yield Reason(f"no room for {pod['metadata']['name']}: {_first_line(condition.get('message') or '')}")


def _of_events(warnings: Sequence[Manifest]) -> Iterator[Reason]:
    """The operator couldn't make an object; a quota that has room for it once others have left is none of the final."""
    for event in warnings:
        message = _first_line(event.get("message") or "")
        if not str(event.get("reason", "")).startswith("FailedToCreate") or "forbidden" not in message:
            continue
        if "exceeded quota" in message:
            never = _is_beyond(message)
            remedy = "ask for fewer or smaller pods, or for more quota" if never else ""
            yield Reason(f"the namespace's quota: {message}", remedy, is_final=never)
        else:
            yield Reason(f"a pod is refused: {message}", "correct that", is_final=True)


def _of_workloads(workloads: Sequence[Manifest]) -> Iterator[Reason]:
    for workload in workloads:
        for condition in (workload.get("status") or {}).get("conditions") or []:
            if condition.get("type") == "QuotaReserved" and condition.get("status") == "False":
                queue = (workload.get("spec") or {}).get("queueName")
                yield Reason(f"queue {queue}: {_first_line(condition.get('message') or '')}")


def _is_beyond(message: str) -> bool:
    """Whether more is requested than the quota has when nobody uses it."""
    amounts = {
        part: dict(item.split("=", 1) for item in found[1].split(",") if "=" in item)
        for part in ("requested", "limited")
        if (found := re.search(rf"{part}: ([^ ]+)", message))
    }
    try:
        limited = amounts.get("limited", {})
        return any(
            quantity(amount.rstrip(",")) > quantity(limited[key].rstrip(","))
            for key, amount in amounts.get("requested", {}).items()
            if key in limited
        )
    except ValueError:
        return False


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else ""
