"""What a cluster takes, and what ends badly on it: each is said, none is refused."""

import re
from collections.abc import Iterator

from graftstack.config.kubernetes_syntax import quantity
from graftstack.submit.manifest import Finding
from graftstack.submit.pods import PodSecurityContext, SecurityContext
from graftstack.submit.rayjob import RayJob
from graftstack.submit.rules.view import (
    CLUSTER,
    HEAD,
    SPEC,
    WORKERS,
    Group,
    Rule,
    autoscales,
    cluster,
    groups,
    pods,
    spec,
)

# What the shell of the submitter reads, which the operator hands the entrypoint to.
_OF_THE_SHELL = re.compile(r"[$`;]")


def _advice(path: str, message: str, fix: str) -> Finding:
    return Finding(path, message, fix, is_advice=True)


def says_nothing_to_the_shell(job: RayJob) -> Iterator[Finding]:
    """In K8sJobMode a shell that isn't the job's expands what it recognises."""
    if spec(job).submission_mode not in (None, "K8sJobMode"):
        return
    for key, text in (("entrypoint", spec(job).entrypoint), ("runtimeEnvYAML", spec(job).runtime_env_yaml)):
        if found := _OF_THE_SHELL.search(text or ""):
            message = f"the submitter's shell reads {found[0]} before the job does"
            yield _advice(f"{SPEC}.{key}", message, "send data as a file, from a ConfigMap")


def trains_on_no_head(job: RayJob) -> Iterator[Finding]:
    """A worker on the head that runs out of memory takes the whole cluster with it."""
    for group in groups(job):
        if group.is_head and not group.resources and group.params.get("num-cpus") != "0":
            path = f"{HEAD}.rayStartParams.num-cpus"
            yield _advice(path, "tasks may run on the head, and end the job if they end it", 'set it to "0"')


def runs_the_same_everywhere(job: RayJob) -> Iterator[Finding]:
    """Ray of one version, Python of one version."""
    found = groups(job)
    head = next((group.ray.image for group in found if group.is_head), None)
    for group in found:
        if head and group.ray.image and group.ray.image != head:
            path = f"{group.pod_path}.containers[0].image"
            yield _advice(path, f"{group.ray.image} isn't the head's, {head}", "use one image")


def has_memory_of_its_own(job: RayJob) -> Iterator[Finding]:
    """Ray reckons with the limit; a node reckons with the request, and kills whoever is above it."""
    for group in groups(job):
        path = f"{group.pod_path}.containers[0].resources"
        request, limit = _memory(group)
        if limit is None:
            yield _advice(f"{path}.limits.memory", "Ray takes the memory of the whole node for its own", "set a limit")
        elif request is not None and request != limit:
            yield _advice(
                f"{path}.requests.memory", "is less than the limit, and the node may be full", "make them equal"
            )


def asks_for_a_token(job: RayJob) -> Iterator[Finding]:
    """Whoever reaches Ray's ports may run anything."""
    auth = cluster(job).auth_options
    if spec(job).ray_cluster_spec is not None and (auth is None or auth.mode != "token"):
        yield _advice(
            f"{CLUSTER}.authOptions.mode", "whoever reaches the cluster may run code on it", "set it to token"
        )


def may_do_little(job: RayJob) -> Iterator[Finding]:
    """Not root, no capabilities, no other user, known system calls only."""
    for pod in pods(job):
        user = pod.spec.security_context or PodSecurityContext()
        for path, container in pod.containers():
            own, where = container.security_context or SecurityContext(), f"{path}.securityContext"
            if not (own.run_as_non_root or user.run_as_non_root):
                yield _advice(f"{pod.path}.securityContext.runAsNonRoot", "the pod may run as root", "set it to true")
            if not (own.seccomp_profile or user.seccomp_profile):
                whole = f"{pod.path}.securityContext.seccompProfile"
                yield _advice(whole, "all system calls are allowed", "set it to {type: RuntimeDefault}")
            if own.allow_privilege_escalation is not False:
                yield _advice(f"{where}.allowPrivilegeEscalation", "a process may become root", "set it to false")
            if "ALL" not in ((own.capabilities or {}).get("drop") or []):
                yield _advice(f"{where}.capabilities.drop", "processes keep capabilities of root", "set it to [ALL]")


def shows_its_token_to_few(job: RayJob) -> Iterator[Finding]:
    """Only the autoscaler talks to the API server."""
    for pod in pods(job):
        is_needed = autoscales(job) and pod.path.startswith(HEAD)
        if pod.spec.automount_service_account_token is not False and not is_needed:
            path = f"{pod.path}.automountServiceAccountToken"
            yield _advice(path, "the pod gets a token for the API server", "set it to false")


def starts_within_its_range(job: RayJob) -> Iterator[Finding]:
    """The operator goes to the nearer end without a word."""
    for index, group in enumerate(cluster(job).worker_group_specs or []):
        low, num = group.min_replicas or 0, group.replicas
        high = max(low, num or 0) if group.max_replicas is None else group.max_replicas
        if num is not None and low <= high and not low <= num <= high:
            path = f"{WORKERS}[{index}].replicas"
            yield _advice(path, f"{num} is outside of minReplicas and maxReplicas", f"use {low}..{high}")


def ends(job: RayJob) -> Iterator[Finding]:
    """Without deadlines a job that hangs holds its nodes for ever."""
    given = spec(job)
    if given.active_deadline_seconds is None:
        yield _advice(f"{SPEC}.activeDeadlineSeconds", "a job that hangs never ends", "set it, e.g. to 86400")
    if given.ray_cluster_spec is not None and given.pre_running_deadline_seconds is None:
        path = f"{SPEC}.preRunningDeadlineSeconds"
        yield _advice(path, "a job that finds no room waits for ever", "set it, e.g. to 3600 (KubeRay 1.6)")


def _memory(group: Group) -> tuple[object, object]:
    given = group.ray.resources
    amounts = [(given.requests if given else None) or {}, (given.limits if given else None) or {}]
    request, limit = (_read(found.get("memory")) for found in amounts)
    return request, limit


def _read(amount: str | float | None) -> object:
    try:
        return None if amount is None else quantity(amount)
    except ValueError:
        return None


RULES: list[Rule] = [
    says_nothing_to_the_shell,
    trains_on_no_head,
    runs_the_same_everywhere,
    has_memory_of_its_own,
    asks_for_a_token,
    may_do_little,
    shows_its_token_to_few,
    starts_within_its_range,
    ends,
]
