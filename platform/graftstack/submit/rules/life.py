"""How a job starts, ends, fails and waits: what the operator refuses in `spec`."""

from collections.abc import Iterator

import yaml

from graftstack.submit.manifest import Finding
from graftstack.submit.rayjob import RayJob
from graftstack.submit.rules.view import HEAD, SPEC, SUBMITTER, Rule, cluster, groups, spec

_SELECTOR_KEY = "ray.io/cluster"


def has_one_cluster(job: RayJob) -> Iterator[Finding]:
    """A cluster of its own, or one that is there."""
    given = spec(job)
    if given.ray_cluster_spec is None and not given.cluster_selector:
        yield Finding(
            f"{SPEC}.rayClusterSpec", "the job has no cluster", "describe one, or name one in clusterSelector"
        )
    if given.ray_cluster_spec is not None and given.ray_cluster_spec.head_group_spec is None:
        yield Finding(HEAD, "the cluster has no head", "describe it")
    if given.cluster_selector and not given.cluster_selector.get(_SELECTOR_KEY):
        yield Finding(f"{SPEC}.clusterSelector", "names no cluster", f"write {_SELECTOR_KEY}: NAME")


def suspends_only_what_it_can_end(job: RayJob) -> Iterator[Finding]:
    """A suspended job has no cluster."""
    given = spec(job)
    if given.suspend and not given.shutdown_after_job_finishes:
        message = "a job that keeps its cluster can't be suspended"
        yield Finding(f"{SPEC}.suspend", message, "set shutdownAfterJobFinishes: true")
    if given.suspend and given.cluster_selector:
        message = "a job on a cluster that is there can't be suspended"
        yield Finding(f"{SPEC}.clusterSelector", message, "leave out suspend, or describe a rayClusterSpec")


def retries_only_what_it_can(job: RayJob) -> Iterator[Finding]:
    """A retry is a new cluster and a new submission."""
    given, limit = spec(job), spec(job).backoff_limit or 0
    if limit < 0:
        yield Finding(f"{SPEC}.backoffLimit", f"{limit} is negative", "use 0 for no retries")
    if limit > 0 and given.cluster_selector:
        message = f"{limit} retries, and a cluster that is there can't be made anew"
        yield Finding(
            f"{SPEC}.backoffLimit", message, "set it to 0, or describe a rayClusterSpec instead of clusterSelector"
        )
    if limit > 0 and given.submission_mode == "InteractiveMode":
        yield Finding(f"{SPEC}.backoffLimit", f"{limit} retries in InteractiveMode", "set it to 0, or use K8sJobMode")


def counts_from_zero(job: RayJob) -> Iterator[Finding]:
    """Deadlines are positive, a time to live isn't negative."""
    deadlines = {
        "activeDeadlineSeconds": spec(job).active_deadline_seconds,
        "preRunningDeadlineSeconds": spec(job).pre_running_deadline_seconds,
    }
    for key, seconds in deadlines.items():
        if seconds is not None and seconds <= 0:
            yield Finding(f"{SPEC}.{key}", f"{seconds} isn't positive", "raise it, or leave it out for no deadline")
    if (ttl := spec(job).ttl_seconds_after_finished or 0) < 0:
        yield Finding(f"{SPEC}.ttlSecondsAfterFinished", f"{ttl} is negative", "use 0 to delete the cluster at once")


def lives_on_only_until_shutdown(job: RayJob) -> Iterator[Finding]:
    """Without a shutdown there is nothing to wait for."""
    ttl = spec(job).ttl_seconds_after_finished or 0
    if ttl > 0 and not spec(job).shutdown_after_job_finishes:
        message = f"{ttl} s after the end nothing is shut down"
        yield Finding(f"{SPEC}.ttlSecondsAfterFinished", message, "set shutdownAfterJobFinishes: true, or leave it out")


def submits_something(job: RayJob) -> Iterator[Finding]:
    """The entrypoint, unless somebody submits by hand, or a submitter has a command of its own."""
    template = spec(job).submitter_pod_template
    submitters = (template.spec and template.spec.containers) if template else None
    has_command = bool(submitters and submitters[0].rest.get("command"))
    is_by_hand = spec(job).submission_mode == "InteractiveMode"
    if not is_by_hand and not has_command and not (spec(job).entrypoint or "").strip():
        yield Finding(f"{SPEC}.entrypoint", "there is nothing to run", "write the command")


def sidecar_submits_by_itself(job: RayJob) -> Iterator[Finding]:
    """In SidecarMode the submitter is a container of the head."""
    given = spec(job)
    if given.submission_mode != "SidecarMode":
        return
    if given.cluster_selector:
        yield Finding(f"{SPEC}.clusterSelector", "SidecarMode needs a head of its own", "use K8sJobMode")
    if given.submitter_pod_template is not None:
        yield Finding(SUBMITTER, "SidecarMode has no submitter pod", "leave it out, or use K8sJobMode")
    if given.submitter_config is not None:
        yield Finding(f"{SPEC}.submitterConfig", "SidecarMode has no submitter job", "leave it out, or use K8sJobMode")
    for group in groups(job):
        if group.is_head and group.pod.restart_policy not in (None, "", "Never"):
            message = f"{group.pod.restart_policy} would submit the job again and again in SidecarMode"
            yield Finding(f"{group.pod_path}.restartPolicy", message, "write Never, or leave it out")


def has_a_runtime_environment_of_yaml(job: RayJob) -> Iterator[Finding]:
    """It is read before anything starts."""
    try:
        found = yaml.safe_load(spec(job).runtime_env_yaml or "{}")
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        yield Finding(f"{SPEC}.runtimeEnvYAML", "isn't YAML of a mapping", "write KEY: VALUE lines after a |")


def is_of_the_jobs_own_making(job: RayJob) -> Iterator[Finding]:
    """What a RayCluster may have, and one that a RayJob makes may not."""
    if (cluster(job).upgrade_strategy or {}).get("type") is not None:
        message = "a cluster that a job makes isn't upgraded"
        yield Finding("spec.rayClusterSpec.upgradeStrategy", message, "leave it out")


RULES: list[Rule] = [
    has_one_cluster,
    suspends_only_what_it_can_end,
    retries_only_what_it_can,
    counts_from_zero,
    lives_on_only_until_shutdown,
    submits_something,
    sidecar_submits_by_itself,
    has_a_runtime_environment_of_yaml,
    is_of_the_jobs_own_making,
]
