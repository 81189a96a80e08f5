"""Kueue, where a job names a queue: what its webhook refuses, what it never admits, and what outgrows its quota.

Source: https://github.com/kubernetes-sigs/kueue, pkg/controller/jobs/rayjob/rayjob_webhook.go.
"""

from collections.abc import Iterator

from graftstack.config.kubernetes_syntax import is_dns_1123_subdomain
from graftstack.submit.manifest import Finding
from graftstack.submit.rayjob import RayJob
from graftstack.submit.rules.view import CLUSTER, SPEC, WORKERS, Rule, autoscales, cluster, meta, spec

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
ELASTIC_ANNOTATION = "kueue.x-k8s.io/elastic-job"
_TIME_LABEL = "kueue.x-k8s.io/max-exec-time-seconds"

# A workload of Kueue's has at most so many sets of pods, one of which is the head.
_MOST_POD_SETS = 18


def names_a_queue(job: RayJob) -> Iterator[Finding]:
    """As Kubernetes names objects."""
    name = _queue(job)
    if name and not is_dns_1123_subdomain(name):
        path = f'metadata.labels["{QUEUE_LABEL}"]'
        yield Finding(
            path, f"{name} is no name of a LocalQueue", "use its name: lower-case letters, digits, dashes, dots"
        )


def brings_its_cluster(job: RayJob) -> Iterator[Finding]:
    """Kueue counts what a job brings, and nothing else."""
    if _queue(job) and spec(job).cluster_selector:
        message = "Kueue admits no job on a cluster that is there"
        yield Finding(
            f"{SPEC}.clusterSelector", message, f"describe a rayClusterSpec, or leave out the label {QUEUE_LABEL}"
        )


def gives_its_quota_back(job: RayJob) -> Iterator[Finding]:
    """The quota is free when the job has finished, whatever its pods do."""
    if not _queue(job) or spec(job).cluster_selector:
        return
    if not spec(job).shutdown_after_job_finishes:
        message = "Kueue takes only jobs that end their cluster"
        yield Finding(f"{SPEC}.shutdownAfterJobFinishes", message, "set it to true")
    if (ttl := spec(job).ttl_seconds_after_finished or 0) > 0:
        message = f"for {ttl} s the cluster would use quota that others have already"
        yield Finding(f"{SPEC}.ttlSecondsAfterFinished", message, "set it to 0")


def grows_only_if_elastic(job: RayJob) -> Iterator[Finding]:
    """A job that grows asks for more quota, which Kueue must expect."""
    if _queue(job) and autoscales(job) and (meta(job).annotations or {}).get(ELASTIC_ANNOTATION) != "true":
        message = "Kueue lets a job grow only if it is elastic"
        yield Finding(f"{CLUSTER}.enableInTreeAutoscaling", message, f'add the annotation {ELASTIC_ANNOTATION}: "true"')


def fits_into_a_workload(job: RayJob) -> Iterator[Finding]:
    """Head, submitter and each group of workers are sets of pods; the webhook doesn't count the submitter."""
    if not _queue(job):
        return
    has_submitter = spec(job).submission_mode in (None, "K8sJobMode")
    most = _MOST_POD_SETS - 1 - has_submitter
    num = len(cluster(job).worker_group_specs or [])
    if num > most + has_submitter:
        message = f"{num} groups, and Kueue refuses more than {most + has_submitter}"
        yield Finding(WORKERS, message, f"use {most} or fewer")
    elif num > most:
        message = (
            f"{num} groups, the head and the submitter are {num + 2} sets of pods; a workload has {_MOST_POD_SETS}"
        )
        yield Finding(WORKERS, message, f"use {most} or fewer, or submissionMode: HTTPMode")


def leaves_kueues_names_alone(job: RayJob) -> Iterator[Finding]:
    """They are those of the other sets of pods."""
    for index, group in enumerate(cluster(job).worker_group_specs or []):
        if _queue(job) and group.group_name in ("head", "submitter"):
            path = f"{WORKERS}[{index}].groupName"
            yield Finding(path, f"{group.group_name} is a set of pods of its own in Kueue", "call the group workers")


def has_a_time_that_counts(job: RayJob) -> Iterator[Finding]:
    """Kueue's own deadline is a positive number."""
    text = (meta(job).labels or {}).get(_TIME_LABEL)
    if text is not None and not (text.isdecimal() and int(text) > 0):
        yield Finding(f'metadata.labels["{_TIME_LABEL}"]', f"{text!r} isn't positive", "write whole seconds, 1 or more")


def _queue(job: RayJob) -> str | None:
    return (meta(job).labels or {}).get(QUEUE_LABEL)


RULES: list[Rule] = [
    names_a_queue,
    brings_its_cluster,
    gives_its_quota_back,
    grows_only_if_elastic,
    fits_into_a_workload,
    leaves_kueues_names_alone,
    has_a_time_that_counts,
]
