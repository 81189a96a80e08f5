"""Where runs lie, tried from this machine: written, read and removed."""

import uuid
from dataclasses import replace
from pathlib import Path

from graftstack.cluster.node_probe import within
from graftstack.doctor.finding import Finding, from_error
from graftstack.doctor.machine import check_disk
from graftstack.errors import GraftstackError
from graftstack.reason import reason
from graftstack.storage import Folder

_NAME = "runs folder"

# Clients of object stores try for minutes where nobody answers.
_ANSWER_WITHIN_S = 4.0


def check_runs_folder(place: str) -> Finding:
    """Runs can be written at a path, which has room, or at a URI, which answers and whose package is installed."""
    folder = Folder(place)
    if folder.is_local:
        return check_disk(_NAME, Path(folder.location))
    try:
        return within(_ANSWER_WITHIN_S, lambda: check_place(folder))
    except TimeoutError as error:
        fix = "check the address (AWS_ENDPOINT_URL for a store of your own), and the way"
        return Finding(_NAME, "broken", f"{place}: {error}", fix)


def check_place(folder: Folder) -> Finding:
    """An object can be written, read back and removed at a URI."""
    name, content = f".graftstack-doctor-{uuid.uuid4().hex[:12]}", b"graftstack doctor"
    step = "reached"
    try:
        folder.exists()
        step = "written"
        folder.write(name, content)
        step = "read"
        is_same = folder.read(name) == content
        step = "removed"
        folder.remove(name)
        is_gone = not folder.exists(name)
    except GraftstackError as error:
        found = from_error(_NAME, error)
        return found if step == "reached" else replace(found, detail=f"{found.detail} when an object is {step}")
    except Exception as error:  # each store has exceptions of its own
        detail = f"{folder.location}: no object can be {step} ({reason(error)})"
        return Finding(_NAME, "broken", detail, "check the address, the credentials and their rights")
    if not (is_same and is_gone):
        fault = "what is read isn't what was written" if not is_same else "what was removed is still there"
        fix = "ask for the rights to read and to delete there, or choose another runs_dir"
        return Finding(_NAME, "broken", f"{folder.location}: {fault}", fix)
    return Finding(_NAME, "ok", f"{folder.location}: written, read and removed")
