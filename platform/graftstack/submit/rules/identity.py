"""What an object is called."""

from collections.abc import Iterator

from graftstack.config.kubernetes_syntax import is_dns_1035_label, is_label_key, is_label_value
from graftstack.submit.manifest import Finding, join
from graftstack.submit.rayjob import API_VERSION, KIND, RayJob
from graftstack.submit.rules.view import Rule, meta

# The names of the cluster, its service and its pods are longer than that of the job.
LONGEST_NAME = 47


def is_a_ray_job(job: RayJob) -> Iterator[Finding]:
    """Other versions of the API are gone."""
    for path, given, right in (("apiVersion", job.api_version, API_VERSION), ("kind", job.kind, KIND)):
        if given != right:
            yield Finding(path, f"{given} isn't {right}", f"write {path}: {right}")


def has_a_name(job: RayJob) -> Iterator[Finding]:
    """Applying an object again is to find it again."""
    if meta(job).generate_name is not None:
        message = f"{meta(job).generate_name} makes another job each time, and kubectl apply refuses it"
        yield Finding("metadata.generateName", message, "write metadata.name")
    elif not meta(job).name:
        yield Finding("metadata.name", "the job has no name", "give it one")


def has_a_short_name(job: RayJob) -> Iterator[Finding]:
    """The operator refuses longer ones."""
    name = meta(job).name or ""
    if len(name) > LONGEST_NAME:
        message = f"{name} has {len(name)} characters, and the operator takes {LONGEST_NAME}"
        yield Finding("metadata.name", message, f"shorten it by {len(name) - LONGEST_NAME}")


def has_a_dns_name(job: RayJob) -> Iterator[Finding]:
    """The operator makes a service of it."""
    name = meta(job).name
    if name and not is_dns_1035_label(name):
        fix = "use lower-case letters, digits and dashes, beginning with a letter and not ending with a dash"
        yield Finding("metadata.name", f"{name} is no DNS-1035 label", fix)


def has_right_labels(job: RayJob) -> Iterator[Finding]:
    """As Kubernetes takes them."""
    for key, value in (meta(job).labels or {}).items():
        if not is_label_key(key) or not is_label_value(value):
            message = f"{key}: {value!r} is no label"
            yield Finding(join("metadata.labels", key), message, "use at most 63 letters, digits, -, _ and .")


RULES: list[Rule] = [is_a_ray_job, has_a_name, has_a_short_name, has_a_dns_name, has_right_labels]
