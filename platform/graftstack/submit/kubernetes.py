"""A job on Kubernetes: submitted once however often that is tried, followed to its exit status, listed and stopped."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from queue import Empty
from typing import Any

from graftstack.config.k8s import K8sConfig
from graftstack.config.spec import Spec
from graftstack.errors import EXIT_DONE, EXIT_INTERRUPTED, BadInputError, ConfigError
from graftstack.submit.kube_api import KubeApi, Manifest, Place, RefusedError, UnreachableError, connect, explained
from graftstack.submit.kube_logs import LogReader
from graftstack.submit.kube_states import Phase, Reason, end, phase, reasons, retries
from graftstack.submit.manifest import to_manifest
from graftstack.submit.render import PART_OF, RUN_ANNOTATION, RUN_LABEL, SPEC_ANNOTATION, Rendered, notes, render
from graftstack.submit.rules import check

Say = Callable[[str], None]
"""Takes a line for the user."""
Write = Callable[[str], None]
"""Takes what was asked for: manifests, lists and logs, with line breaks."""


def to_stdout(text: str) -> None:
    """Writes at once: whoever reads a log waits for it."""
    sys.stdout.write(text)
    sys.stdout.flush()


# How often a job that is followed is looked at.
POLL_S = 2.0

# How long the rest of a log may take once the job is over.
_LAST_LINES_S = 20.0

# The words behind those fields that a rule may complain of, and the values that please it.
_WORDS = {
    "spec.preRunningDeadlineSeconds": "k8s.pending_deadline_s=null",
    "spec.rayClusterSpec.authOptions": "k8s.token_auth=false",
    "spec.rayClusterSpec.rayVersion": "k8s.image, or k8s.token_auth=false",
    "spec.ttlSecondsAfterFinished": "k8s.ttl_s=0",
}

# A retry that comes after so many has another reason.
_MOST_ATTEMPTS = 999


def submit_job(
    spec: Spec, config: K8sConfig, *, dry_run: str | None, follow: bool, say: Say, write: Write = to_stdout
) -> int:
    """Submits a job and returns the exit status: of the job where it is followed, else 0.

    A job that is there already, waiting, running or done, isn't submitted again; one that failed or was stopped is,
    under a name of its own, and goes on from what it had finished.

    Args:
        spec: The job.
        config: The pods.
        dry_run: ``client`` writes what would be applied, ``server`` asks the API server whether it would take it.
        follow: Write the log until the job is over.
        say: Gets what becomes of it, line by line.
        write: Gets manifests, or the log.

    Raises:
        BadInputError: the job can't run there; one line, and nothing is left on the cluster.
        KeyboardInterrupt: following was interrupted; the job goes on, and the message says how to come back.
    """
    rendered = _checked(render(spec, config), config)
    if dry_run == "client":
        write(rendered.yaml())
        return EXIT_DONE
    place = Place(config.namespace, config.context)
    api = connect(place)
    with _explaining(place):
        if dry_run == "server":
            _ask_whether(api, rendered)
            say(f"RayJob {rendered.name}: the API server takes it")
            return EXIT_DONE
        name = _submit(api, spec, config, rendered, say)
    if name is None:
        return EXIT_DONE
    if follow:
        return follow_job(api, name, say=say, write=write, is_ours=True)
    say(f"follow it with the same command and --follow, or: {place.kubectl(f'logs -f job/{name}')}")
    return EXIT_DONE


def list_jobs(place: Place, *, write: Write = to_stdout) -> int:
    """Writes which jobs of graftstack's there are, the newest last."""
    api = connect(place)
    with _explaining(place):
        found = api.ray_jobs(f"{PART_OF}=graftstack")
    for job in sorted(found, key=lambda job: str(job["metadata"].get("creationTimestamp"))):
        write(f"{_name(job)}  {phase(job).value}  {_annotations(job).get(RUN_ANNOTATION, '')}\n")
    if not found:
        write(f"no jobs in the namespace {place.namespace}\n")
    return EXIT_DONE


def job_status(name: str, place: Place, *, write: Write = to_stdout) -> int:
    """Writes how far a job is, why it waits, or how it ended."""
    api = connect(place)
    with _explaining(place):
        job = _found(api, name)
        where = phase(job)
        write(f"{name}: {end(job).text if where.is_over else where.value}\n")
        if where is Phase.waiting:
            for reason in _reasons(api, job):
                write(f"{_sentence(reason)}\n")
    return EXIT_DONE


def job_log(name: str, place: Place, *, follow: bool, say: Say, write: Write = to_stdout) -> int:
    """Writes the log of a job: what there is, or all of it to its end, with its exit status."""
    api = connect(place)
    with _explaining(place):
        _found(api, name)
    if follow:
        return follow_job(api, name, say=say, write=write)
    reader = LogReader(api, name, follow=False)
    reader.finish()
    reader.start()
    _write_rest(reader, write)
    return EXIT_DONE


def stop_job(name: str, place: Place, *, say: Say) -> int:
    """Ends a job and its cluster; its run stays, and goes on when the job is submitted again."""
    api = connect(place)
    with _explaining(place):
        _found(api, name)
        api.delete_ray_job(name)
    say(f"{name}: stopped and removed; its run stays, and goes on when it is submitted again")
    return EXIT_DONE


def follow_job(api: KubeApi, name: str, *, say: Say, write: Write = to_stdout, is_ours: bool = False) -> int:
    """Writes the log of a job until it is over, and returns its exit status.

    Args:
        api: Where it runs.
        name: The job.
        say: Gets what becomes of it.
        write: Gets the log.
        is_ours: We submitted it, so we remove it if it can never start.

    Raises:
        BadInputError: it can never start.
        KeyboardInterrupt: the job goes on; the message says how to come back.
    """
    reader = LogReader(api, name)
    reader.start()
    try:
        job = _watch(api, name, reader, say, write, is_ours=is_ours)
    except KeyboardInterrupt:
        place = api.place
        message = (
            f"{name} goes on; come back with the same command and --follow, or {place.kubectl(f'logs -f job/{name}')}"
        )
        raise KeyboardInterrupt(f"{message}; stop it with {place.kubectl(f'delete rayjob {name}')}") from None
    finally:
        reader.finish()
    _write_rest(reader, write)
    if job is None:
        say(f"{name}: was deleted before it was over")
        return EXIT_INTERRUPTED
    ended = end(job)
    say(f"{name}: {ended.text}")
    return ended.exit_status


def _watch(api: KubeApi, name: str, reader: LogReader, say: Say, write: Write, *, is_ours: bool) -> Manifest | None:
    """Returns the job once it is over, or None where it was deleted."""
    said, num_retries = "", 0
    while True:
        try:
            job = api.ray_job(name)
            if job is None or phase(job).is_over:
                return job
            if (num := retries(job)) > num_retries:
                say(f"{name}: failed, and gets a new cluster; retry {num} of {job['spec'].get('backoffLimit')}")
                num_retries = num
            state = _state(api, job, is_ours=is_ours)
        except UnreachableError as error:
            state = f"the API server doesn't answer ({error}); still trying"
        except RefusedError as error:
            if error.status < 500 and error.status != 429:
                raise explained(error, api.place) from error
            state = f"the API server fails with {error.status}; still trying"
        if state != said:
            say(f"{name}: {state}")
            said = state
        _write_for(reader, write, POLL_S)


def _state(api: KubeApi, job: Manifest, *, is_ours: bool) -> str:
    """Returns what to say of a job that isn't over. Raises `BadInputError` if it can never start."""
    if phase(job) is Phase.running:
        return "running"
    found = _reasons(api, job)
    if not found:
        return "waiting for its pods"
    if not found[0].is_final:
        return f"waiting: {_sentence(found[0])}"
    if is_ours:
        api.delete_ray_job(_name(job))
        raise BadInputError(f"{_sentence(found[0])}; {_name(job)} is removed")
    raise BadInputError(f"{_sentence(found[0])}; remove it with {api.place.kubectl(f'delete rayjob {_name(job)}')}")


def _reasons(api: KubeApi, job: Manifest) -> list[Reason]:
    """Returns why a job waits. Whoever may not see pods or events sees fewer reasons."""
    name, cluster = _name(job), (job.get("status") or {}).get("rayClusterName")
    pods: list[Manifest] = []
    warnings: list[Manifest] = []
    workloads: list[Manifest] = []
    with contextlib.suppress(RefusedError):
        pods = [*(api.pods(f"ray.io/cluster={cluster}") if cluster else []), *api.pods(f"job-name={name}")]
    with contextlib.suppress(RefusedError):
        warnings = [*api.warnings(name), *(api.warnings(cluster) if cluster else [])]
    with contextlib.suppress(RefusedError):
        workloads = api.workloads(str(job["metadata"].get("uid")))
    return reasons(job, pods, warnings, workloads)


def _submit(api: KubeApi, spec: Spec, config: K8sConfig, rendered: Rendered, say: Say) -> str | None:
    """Returns the name of the job to follow; None where it is done already."""
    wanted = to_manifest(rendered.ray_job)
    others = api.ray_jobs(f"{RUN_LABEL}={wanted['metadata']['labels'][RUN_LABEL]}")
    same = [job for job in others if _annotations(job).get(SPEC_ANNOTATION) == _annotations(wanted)[SPEC_ANNOTATION]]
    for job in others:
        if job not in same and not phase(job).is_over:
            message = f"{_name(job)} works on this run with another configuration"
            remedy = f"wait for it, choose another name, or {api.place.kubectl(f'delete rayjob {_name(job)}')}"
            raise BadInputError(f"name={spec.config.name}: {message}; {remedy}")
    for job in same:
        if phase(job) is Phase.succeeded:
            say(f"{_name(job)}: done already; its run is {spec.config.name} in {spec.config.runs_dir}")
            return None
        if not phase(job).is_over:
            say(f"{_name(job)}: submitted already, and {phase(job).value}")
            return _name(job)
    taken = {_name(job) for job in others}
    for attempt in range(1, _MOST_ATTEMPTS):
        rendered = render(spec, config, attempt=attempt)
        if rendered.name not in taken:
            break
    _create(api, rendered)
    say(f"{rendered.name}: submitted to the namespace {config.namespace}")
    for note in notes(spec, config):
        say(note)
    return rendered.name


def _create(api: KubeApi, rendered: Rendered) -> None:
    """Makes both objects, or neither: what the server would refuse is known before the first is there."""
    _ask_whether(api, rendered)
    api.create_config_map(to_manifest(rendered.config_map))
    try:
        job = api.create_ray_job(to_manifest(rendered.ray_job))
    except RefusedError as error:
        if error.status == 409:  # somebody submitted the same a moment ago
            return
        api.delete_config_map(rendered.name)
        raise
    api.own_config_map(rendered.name, job)


def _ask_whether(api: KubeApi, rendered: Rendered) -> None:
    api.create_config_map(to_manifest(rendered.config_map), dry_run=True)
    try:
        api.create_ray_job(to_manifest(rendered.ray_job), dry_run=True)
    except RefusedError as error:
        if error.status != 409:
            raise


def _checked(rendered: Rendered, config: K8sConfig) -> Rendered:
    faults = [finding for finding in check(rendered.ray_job, kuberay=config.kuberay) if not finding.is_advice]
    if faults:
        first = faults[0]
        words = f": {_WORDS[first.path]}" if first.path in _WORDS else ""
        more = f" ({len(faults) - 1} more after that)" if len(faults) > 1 else ""
        raise ConfigError(f"{first}{words}{more}")
    return rendered


def _found(api: KubeApi, name: str) -> Manifest:
    job = api.ray_job(name)
    if job is None:
        raise BadInputError(f"{name}: no such job in the namespace {api.place.namespace}; see graftstack jobs list")
    return job


def _write_for(reader: LogReader, write: Write, seconds: float) -> None:
    """Writes lines as they come, for some time."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(Empty):
            write(reader.lines.get(timeout=left) + "\n")


def _write_rest(reader: LogReader, write: Write) -> None:
    """Writes the lines that are left of a job that is over."""
    until = time.monotonic() + _LAST_LINES_S
    while reader.is_alive() and time.monotonic() < until:
        _write_for(reader, write, 0.05)
    while not reader.lines.empty():
        write(reader.lines.get() + "\n")


def _sentence(reason: Reason) -> str:
    return f"{reason.text}; {reason.remedy}" if reason.remedy else reason.text


def _name(job: Manifest) -> str:
    return str(job["metadata"]["name"])


def _annotations(job: Manifest) -> dict[str, Any]:
    return job["metadata"].get("annotations") or {}


@contextlib.contextmanager
def _explaining(place: Place) -> Iterator[None]:
    """Says what the API server answered in a line for the user."""
    try:
        yield
    except (RefusedError, UnreachableError) as error:
        raise explained(error, place) from error
