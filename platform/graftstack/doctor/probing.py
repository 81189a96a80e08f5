"""Asks the nodes of a Ray cluster, by a small job of its own that leaves nothing behind."""

import json
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from graftstack.cluster import node_probe
from graftstack.cluster.submission import SUCCEEDED, JobServer, Submission, UnreachableError
from graftstack.doctor.finding import Say
from graftstack.doctor.nodes import NodeFacts
from graftstack.errors import GraftstackError
from graftstack.submit.hints import hints_in
from graftstack.submit.packing import pack

_LOOK_EVERY_S = 0.5
# A driver starts in seconds, and then each step on all nodes has its own limit.
_DONE_WITHIN_S = 240.0
_STOPPED_WITHIN_S = 10.0
_MISSED_WITHIN_S = 2.5

# So many characters of what can't be read are shown.
_SHOWN = 40

_SCRIPT = "node_probe.py"


class ProbeError(GraftstackError):
    """The cluster took the probe, and nothing came back."""


def probe_nodes(server: JobServer, place: str, *, say: Say) -> list[NodeFacts]:
    """Returns what each node says of itself and of the folder at `place`, a path or a URI.

    Raises:
        ProbeError: the job failed, or took too long.
        UnreachableError: the cluster doesn't answer, or refuses the job.
    """
    nonce = uuid.uuid4().hex[:12]
    submission_id = f"graftstack-doctor-{nonce}"
    settings = json.dumps({"place": place, "nonce": nonce}).encode()
    package = pack({_SCRIPT: Path(node_probe.__file__), node_probe.SETTINGS_FILE: settings})
    try:
        with tempfile.TemporaryDirectory(prefix="graftstack-") as folder:
            file = Path(folder) / "package.zip"
            file.write_bytes(package.content)
            server.submit(submission_id, entrypoint=f"python {_SCRIPT}", package=file, metadata={})
        return [NodeFacts(**row) for row in _rows(server, submission_id, say)]
    finally:
        with suppress(UnreachableError):
            _forget(server, submission_id)


def said(log: str) -> dict[str, Any]:
    """Returns what the script has printed so far; a line without its end is still to come.

    Raises:
        ProbeError: a line isn't what the script prints.
    """
    found: dict[str, Any] = {}
    for line in log.splitlines(keepends=True):
        if line.startswith(node_probe.MARK) and line.endswith("\n"):
            found |= _object(line.removeprefix(node_probe.MARK).strip())
    return found


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ProbeError(f"what the job printed can't be read ({text[:_SHOWN]}); try again")
    return found


def _rows(server: JobServer, submission_id: str, say: Say) -> list[dict[str, Any]]:
    say("asking the nodes of the cluster by a job there, which takes some seconds")
    deadline = time.monotonic() + _DONE_WITHIN_S
    has_said = False
    lost: UnreachableError | None = None
    while time.monotonic() < deadline:
        try:
            found = server.find(submission_id)
            if found is not None and found.is_over:
                return _answered(found, server.logs(submission_id))
        except UnreachableError as error:  # a head that is busy answers a moment later
            if lost is None:
                say(f"the cluster doesn't answer ({error}); it is asked again")
            lost = error
            time.sleep(_LOOK_EVERY_S)
            continue
        lost = None
        if found is None:
            raise ProbeError("the cluster knows nothing of the job that was sent; see the log of its head")
        if not has_said and (num_nodes := _num_nodes(server, submission_id)) is not None:
            say(f"nodes: {num_nodes}; a worker starts on each")
            has_said = True
        time.sleep(_LOOK_EVERY_S)
    why = "" if lost is None else f" ({lost})"
    raise ProbeError(f"no answer in {_DONE_WITHIN_S:.0f} s{why}; see graftstack jobs list, whether other jobs run")


def _num_nodes(server: JobServer, submission_id: str) -> int | None:
    with suppress(UnreachableError, ProbeError):  # a job that waits has no log yet
        return said(server.logs(submission_id)).get("num_nodes")
    return None


def _answered(found: Submission, log: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] | None = said(log).get("nodes")
    if found.status == SUCCEEDED and rows is not None:
        return rows
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    why = lines[-1] if lines else " ".join(found.message.split())
    hints = hints_in(log)
    rest = f": {hints[0]}" if hints else "; see what its head says of it"
    raise ProbeError(f"the job that was sent is {found.status} ({why}){rest}")


def _forget(server: JobServer, submission_id: str) -> None:
    """Removes the submission from the cluster's list, once it is over."""
    found = server.find(submission_id)
    if found is None:
        return
    if not found.is_over:
        server.stop(submission_id)
        deadline = time.monotonic() + _STOPPED_WITHIN_S
        while found is not None and not found.is_over and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
            found = server.find(submission_id)
    server.delete(submission_id)
    # What watches over the job on the cluster may miss it, and once puts it back as one that failed.
    time.sleep(_MISSED_WITHIN_S)
    if server.find(submission_id) is not None:
        server.delete(submission_id)
