"""What is sent to a Ray cluster, and how a retry finds what the first attempt left there.

The name of a submission follows from all that is sent, so whoever submits the same again, after a lost connection or
by mistake, meets the first. One that failed or was stopped makes room for another attempt, whose run goes on where
that of the first was left.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from graftstack.backbones.catalog import require_known
from graftstack.cluster.launching import with_absolute_paths
from graftstack.cluster.submission import SUCCEEDED, JobServer, Submission, UnreachableError
from graftstack.config.base_models import RUN_PREFIX
from graftstack.config.plain import flatten, to_plain
from graftstack.config.schema import ClusterKind, JobConfig
from graftstack.config.spec import Spec, run_name, to_bytes
from graftstack.errors import RunError, StorageUnreachableError
from graftstack.runs import MANIFEST, Manifest, Run, now
from graftstack.storage import Folder
from graftstack.submit.packing import Package, code_files, job_files, pack

SPEC_FILE = "spec.json"

# What a submission says of itself on the cluster.
RUN, RUNS_DIR, JOB = "graftstack_run", "graftstack_runs_dir", "graftstack_job"

# The cluster that a job runs on, as Ray calls it there.
_ON_CLUSTER = ("cluster=ray", "cluster.address=auto")

_DIGEST_LENGTH = 12

# Keys whose values are files, folders and runs that all nodes share; those of lists that users fill come on top.
_PLACES = ("runs_dir", "data.path", "backbone.weights", "taps.location", "from_sweep")
_WITH_PLACES = ("space.", "base_models", "levels")


class Request(NamedTuple):
    """A job, ready to be sent."""

    spec: Spec
    package: Package
    submission_id: str
    """Of the first attempt; later ones have a number behind it."""
    entrypoint: str
    """It holds nothing of the user's: a shell reads it."""
    metadata: dict[str, str]


class Placed(NamedTuple):
    """What became of a request."""

    submission_id: str
    before: Submission | None
    """The same submission, made earlier; None: this one is new."""


def spec_on_cluster(job: str, config: JobConfig, overrides: list[str], *, has_our_paths: bool = True) -> Spec:
    """Returns the spec of a job that uses the Ray cluster which it runs on.

    ``cluster=inline`` stays what it is: the job runs in one process on the head, and starts none elsewhere.

    Args:
        job: What to run.
        config: As composed.
        overrides: As the user wrote them.
        has_our_paths: Whether files have the same paths there as here, so that relative ones begin here.

    Raises:
        BadInputError: the configuration is wrong, as far as that can be known without its data.
    """
    require_known(config.backbone.name)
    if has_our_paths:
        config = with_absolute_paths(config)
    if config.cluster.kind is not ClusterKind.inline:
        config = replace(config, cluster=replace(config.cluster, kind=ClusterKind.ray, address="auto"))
        # The parts of a pipeline are composed of them, and so is a resumption by name.
        overrides = [*overrides, *_ON_CLUSTER]
    return Spec(job=job, config=replace(config, name=run_name(job, config), resume=True), overrides=overrides)


def request(spec: Spec, *, with_code: bool = False) -> Request:
    """Packs a job.

    Args:
        spec: The job.
        with_code: Whether this graftstack goes along, and the cluster's own isn't used.

    Raises:
        BadInputError: it is too large.
    """
    code = code_files() if with_code else {}
    # How its user wrote it doesn't matter to a job.
    digest = hashlib.sha256(to_bytes(replace(spec, overrides=[])))
    if code:
        digest.update(pack(code).content)
    return Request(
        spec=spec,
        package=pack({**job_files(spec.job), **code, SPEC_FILE: to_bytes(spec)}),
        submission_id=f"graftstack-{spec.job}-{digest.hexdigest()[:_DIGEST_LENGTH]}",
        entrypoint=f"python jobs/{spec.job}.py --spec {SPEC_FILE}",
        metadata={RUN: str(spec.config.name), RUNS_DIR: spec.config.runs_dir, JOB: spec.job},
    )


def place(asked: Request, server: JobServer) -> Placed:
    """Submits a job, unless the cluster has it already: waiting, at work or done.

    Raises:
        RunError: another submission works on a run of that name.
        UnreachableError: the cluster doesn't answer, or refuses.
    """
    found = next_place(asked, server)
    if found.before is not None:
        return found
    with tempfile.TemporaryDirectory(prefix="graftstack-") as folder:
        file = Path(folder) / "package.zip"
        file.write_bytes(asked.package.content)
        try:
            server.submit(found.submission_id, entrypoint=asked.entrypoint, package=file, metadata=asked.metadata)
        except UnreachableError:
            # It may have been taken, and only the answer got lost; or somebody else has submitted the same meanwhile.
            if (taken := server.find(found.submission_id)) is None:
                raise
            return Placed(found.submission_id, taken)
    return found


def next_place(asked: Request, server: JobServer) -> Placed:
    """Returns where a request would be placed, and changes nothing. Raises as `place`."""
    there = {submission.id: submission for submission in server.submissions()}
    last: Submission | None = None
    for attempt in _attempts(asked.submission_id):
        if attempt not in there:
            break
        last = there[attempt]
    if last is not None and (not last.is_over or last.status == SUCCEEDED):
        return Placed(last.id, last)
    for other in there.values():
        if not other.is_over and all(other.metadata.get(key) == asked.metadata[key] for key in (RUN, RUNS_DIR)):
            raise RunError(
                f"name={asked.spec.config.name}: submission {other.id} works on a run of that name in "
                f"{asked.spec.config.runs_dir}; choose another name, or stop that one"
            )
    return Placed(attempt, None)


def check_name(spec: Spec) -> None:
    """Checks that the run can be begun or continued, if its folder can be looked at from here.

    Raises:
        RunError: the name is that of another job's run, of one with another configuration, or of no run at all.
    """
    folder = Folder(spec.config.runs_dir) / str(spec.config.name)
    is_there = False
    with suppress(StorageUnreachableError, OSError):  # what only the cluster reaches, only the job can check
        is_there = folder.exists()
    if not is_there:
        return
    if folder.exists(MANIFEST) and Run.open(folder).manifest.status == "running":
        return  # perhaps by an earlier attempt
    manifest = Manifest(job=spec.job, name=folder.name, status="running", config=to_plain(spec.config), started=now())
    Run.check(spec.config.runs_dir, manifest, resume=True)


def local_places(config: JobConfig) -> list[str]:
    """Returns, as ``key=path``, the paths that name something else on each machine unless all share a file system."""
    found = []
    for key, value in flatten(to_plain(config)).items():
        if key in _PLACES or key.startswith(_WITH_PLACES):
            found += [f"{key}={text}" for text in _texts(value) if text.removeprefix(RUN_PREFIX).startswith("/")]
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _attempts(submission_id: str) -> Iterator[str]:
    yield submission_id
    number = 2
    while True:
        yield f"{submission_id}-{number}"
        number += 1
