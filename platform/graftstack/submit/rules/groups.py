"""The head and the groups of workers: what the operator refuses in each."""

from collections.abc import Iterator

from graftstack.config.kubernetes_syntax import is_label_key, is_label_value, version
from graftstack.submit.manifest import Finding, join
from graftstack.submit.rayjob import RayJob
from graftstack.submit.rules.cluster import AUTOSCALER_V2
from graftstack.submit.rules.view import WORKERS, Rule, autoscaler_v2, cluster, groups, head_env

_SIZES = ("num-cpus", "num-gpus", "memory", "resources")
_RAY_WITH_PRIORITIES = "2.56.0"


def has_a_container(job: RayJob) -> Iterator[Finding]:
    """Ray runs in the first."""
    for group in groups(job):
        if not group.pod.containers:
            yield Finding(f"{group.pod_path}.containers", "there is none", "add the container in which Ray runs")


def says_its_size_once(job: RayJob) -> Iterator[Finding]:
    """Either `resources` or parameters of ``ray start``."""
    for group in groups(job):
        twice = [key for key in _SIZES if group.params.get(key)]
        if twice and group.resources:
            message = f"says what rayStartParams.{twice[0]} says"
            yield Finding(f"{group.path}.resources", message, "leave one of them out")


def has_right_labels(job: RayJob) -> Iterator[Finding]:
    """Labels of a group are labels of its pods."""
    for group in groups(job):
        if "labels" in group.params:
            path = f"{group.path}.rayStartParams.labels"
            yield Finding(path, "the operator takes no labels here", f"use {group.path.rpartition('.')[2]}.labels")
        for key, value in group.labels.items():
            if not is_label_key(key) or not is_label_value(value):
                message = f"{key}: {value!r} is no label"
                yield Finding(join(f"{group.path}.labels", key), message, "use at most 63 letters, digits, -, _ and .")


def has_its_own_name(job: RayJob) -> Iterator[Finding]:
    """Two groups of one name share their pods."""
    seen: set[str] = set()
    for index, group in enumerate(cluster(job).worker_group_specs or []):
        path, name = f"{WORKERS}[{index}].groupName", group.group_name
        if not name:
            yield Finding(path, "the group has no name", "give it one")
        elif name in seen:
            yield Finding(path, f"{name} is the name of another group", "give each its own")
        seen.add(name or "")


def has_a_range(job: RayJob) -> Iterator[Finding]:
    """From `minReplicas`, 0 by default, to `maxReplicas`."""
    for index, group in enumerate(cluster(job).worker_group_specs or []):
        path, low, high = f"{WORKERS}[{index}]", group.min_replicas, group.max_replicas
        for key, num in (("minReplicas", low), ("maxReplicas", high)):
            if num is not None and num < 0:
                yield Finding(f"{path}.{key}", f"{num} is negative", "use 0 or more")
        if low is not None and high is not None and low > high:
            yield Finding(f"{path}.minReplicas", f"{low} is more than maxReplicas, {high}", f"lower it to {high}")


def asks_the_second_autoscaler(job: RayJob) -> Iterator[Finding]:
    """A time of its own, and a priority, are things of autoscaler v2."""
    asked = head_env(job).get(AUTOSCALER_V2)
    is_v2 = autoscaler_v2(job) or (asked is not None and asked.value in ("1", "true"))
    fix = "set autoscalerOptions.version: v2, or leave it out"
    for index, group in enumerate(cluster(job).worker_group_specs or []):
        path = f"{WORKERS}[{index}]"
        if (seconds := group.idle_timeout_seconds) is not None:
            if seconds < 0:
                yield Finding(f"{path}.idleTimeoutSeconds", f"{seconds} is negative", "use 60")
            elif not is_v2:
                yield Finding(f"{path}.idleTimeoutSeconds", "needs autoscaler v2", fix)
        if group.priority:
            if not is_v2:
                yield Finding(f"{path}.priority", "needs autoscaler v2", fix)
            if not _is_at_least(cluster(job).ray_version, _RAY_WITH_PRIORITIES):
                message = f"needs Ray {_RAY_WITH_PRIORITIES}, and rayVersion is {cluster(job).ray_version}"
                yield Finding(f"{path}.priority", message, "leave it out, or use a newer image")


def suspends_no_group(job: RayJob) -> Iterator[Finding]:
    """The operator does that, to delete workers."""
    for index, group in enumerate(cluster(job).worker_group_specs or []):
        if group.suspend:
            yield Finding(f"{WORKERS}[{index}].suspend", "is the operator's own", "leave it out; use spec.suspend")


def _is_at_least(given: str | None, least: str) -> bool:
    try:
        return version(given or "") >= version(least)
    except ValueError:
        return False


RULES: list[Rule] = [
    has_a_container,
    says_its_size_once,
    has_right_labels,
    has_its_own_name,
    has_a_range,
    asks_the_second_autoscaler,
    suspends_no_group,
]
