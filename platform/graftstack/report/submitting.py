"""Jobs on other machines as a person meets them: submitted, listed, followed and stopped."""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

from rich.table import Table

from graftstack.amounts import size
from graftstack.cluster.submission import FAILED, STOPPED, JobServer, Submission, UnreachableError
from graftstack.config.spec import to_bytes
from graftstack.errors import EXIT_DONE, BadInputError, GraftstackError, did_you_mean
from graftstack.report import tables
from graftstack.report.composing import composed
from graftstack.report.console import plain_console
from graftstack.submit.following import LostError, exit_status, follow
from graftstack.submit.hints import hints_in
from graftstack.submit.submissions import (
    RUN,
    RUNS_DIR,
    Placed,
    Request,
    check_name,
    local_places,
    next_place,
    place,
    request,
    spec_on_cluster,
)

# How long `stop` waits for the end of a job, and how often it looks, in seconds. Ray kills after three.
_STOPPED_WITHIN_S = 20.0
_LOOK_EVERY_S = 0.5


class _Asked(NamedTuple):
    """A submission of a cluster, as `follow` asks for it."""

    server: JobServer
    submission_id: str

    def find(self) -> Submission | None:
        return self.server.find(self.submission_id)

    def stream(self) -> Iterator[str]:
        return self.server.stream(self.submission_id)

    def logs(self) -> str:
        return self.server.logs(self.submission_id)


def say(text: str) -> None:
    """Prints one line on stderr, in which names and paths with line breaks and control characters are escaped."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    plain_console(stderr=True).print(line, highlight=False, soft_wrap=True)


def submit_job(
    job: str,
    overrides: Sequence[str],
    *,
    to: str | None,
    with_code: bool,
    dry_run: str | None,
    follows: bool,
) -> int:
    """Submits a job to a Ray cluster, says what became of it, and returns the exit status.

    Args:
        job: What to run.
        overrides: As for the job itself.
        to: The cluster's address; None: what the environment says.
        with_code: Whether this graftstack goes along.
        dry_run: ``client`` prints what would be sent, and asks no cluster; ``server`` asks whether it is there already.
        follows: Whether to write its log until it is over, and end as it does.
    """
    found = composed(job, overrides)
    if found.is_for_kubernetes:
        raise BadInputError("cluster=k8s: gets pods of its own, and this is a Ray cluster; submit it --to k8s")
    found.refuse_k8s_words()
    spec = spec_on_cluster(job, found.config, found.overrides)
    check_name(spec)
    asked = request(spec, with_code=with_code)
    say(f"packed {len(asked.package.names)} files, {size(asked.package.num_bytes)}")
    if places := local_places(spec.config):
        say(f"each node of the cluster must reach {', '.join(places)}")
    if dry_run == "client":
        print(json.dumps(_shown_request(asked), indent=2))
        return EXIT_DONE
    server = JobServer(to)
    with _asking(server):
        placed = (next_place if dry_run else place)(asked, server)
    _say_placed(placed, asked, is_dry_run=dry_run is not None)
    if follows and not dry_run:
        return _follow(server, placed.submission_id, to)
    if not dry_run:
        say(f"follow it with: {_command('logs', placed.submission_id, to, '--follow')}")
    print(placed.submission_id)
    return EXIT_DONE


def list_jobs(*, to: str | None, as_json: bool) -> int:
    """Prints what was submitted to a cluster, oldest first."""
    server = JobServer(to)
    with _asking(server):
        found = server.submissions()
    if as_json:
        print(json.dumps([_shown(submission) for submission in found], indent=2))
    elif found:
        plain_console().print(_list_table(found))
    else:
        plain_console().print(f"no submissions on {server.address}", highlight=False, soft_wrap=True)
    return EXIT_DONE


def show_job(submission_id: str, *, to: str | None, as_json: bool) -> int:
    """Prints how a submission does."""
    server = JobServer(to)
    found = _find(server, submission_id)
    if as_json:
        print(json.dumps(_shown(found), indent=2))
    else:
        plain_console().print(_table(found))
    return EXIT_DONE


def show_logs(submission_id: str, *, to: str | None, follows: bool) -> int:
    """Prints what a submission has said; with `follows`, until it is over, and returns what it ended with."""
    server = JobServer(to)
    _find(server, submission_id)
    if follows:
        return _follow(server, submission_id, to)
    with _asking(server):
        _write(server.logs(submission_id))
    return EXIT_DONE


def stop_job(submission_id: str, *, to: str | None) -> int:
    """Stops a submission, and waits a little for its end."""
    server = JobServer(to)
    found = _find(server, submission_id)
    if found.is_over:
        say(f"{submission_id}: is over already ({found.status})")
        return EXIT_DONE
    with _asking(server):
        server.stop(submission_id)
    deadline = time.monotonic() + _STOPPED_WITHIN_S
    while not (found := _find(server, submission_id)).is_over and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
    if not found.is_over:
        say(f"{submission_id}: was asked to stop, and is {found.status} still")
    elif found.status == STOPPED:
        say(f"{submission_id}: stopped; submit the same again, and its run goes on")
    else:
        say(f"{submission_id}: ended by itself meanwhile ({found.status})")
    return EXIT_DONE


def _follow(server: JobServer, submission_id: str, to: str | None) -> int:
    tail = _Tail()

    def write(part: str) -> None:
        _write(part)
        tail.take(part)

    try:
        over = follow(_Asked(server, submission_id), write=write, say=say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"no longer following; {submission_id} goes on. Come back with: "
            f"{_command('logs', submission_id, to, '--follow')}; end it with: {_command('stop', submission_id, to)}"
        ) from None
    except LostError as error:
        raise LostError(f"{submission_id}: {error}") from error
    status = exit_status(over)
    say(f"{submission_id}: {over.status}, exit status {status}")
    if over.status == FAILED:
        if over.exit_code is None and over.message:
            for line in over.message.strip().splitlines():
                say(line)
        for hint in tail.hints():
            say(hint)
    return status


class _Tail:
    """The last of a log, in which a known cause may stand."""

    _LENGTH = 4000

    def __init__(self) -> None:
        self._text = ""

    def take(self, part: str) -> None:
        self._text = (self._text + part)[-self._LENGTH :]

    def hints(self) -> list[str]:
        """Returns what to do about the causes that it names."""
        return hints_in(self._text)


def _say_placed(placed: Placed, asked: Request, *, is_dry_run: bool) -> None:
    run = f"its run is {asked.metadata[RUN]} in {asked.metadata[RUNS_DIR]}"
    if placed.before is None:
        say(f"{placed.submission_id}: {'would be ' if is_dry_run else ''}submitted; {run}")
    elif placed.before.is_over:
        say(f"{placed.submission_id}: was submitted before, and is done ({placed.before.status}); {run}")
    else:
        say(f"{placed.submission_id}: was submitted before, and is {placed.before.status}; {run}")


def _command(action: str, submission_id: str, to: str | None, *options: str) -> str:
    where = ["--to", to] if to else []
    return shlex.join(["graftstack", "jobs", action, submission_id, *options, *where])


def _find(server: JobServer, submission_id: str) -> Submission:
    with _asking(server):
        found = server.find(submission_id)
        if found is None:
            known = [submission.id for submission in server.submissions()]
            hint = did_you_mean(submission_id, known) if known else "nothing was submitted there"
            raise BadInputError(f"{submission_id}: no such submission on {server.address}; {hint}")
    return found


@contextmanager
def _asking(server: JobServer) -> Iterator[None]:
    """Names the server that can't be reached any more."""
    try:
        yield
    except UnreachableError as error:
        raise GraftstackError(f"{server.address}: {error}; try again, it does no harm") from error


def _shown_request(asked: Request) -> dict[str, Any]:
    return {
        "submission_id": asked.submission_id,
        "entrypoint": asked.entrypoint,
        "files": asked.package.names,
        "num_bytes": asked.package.num_bytes,
        "metadata": asked.metadata,
        "spec": json.loads(to_bytes(asked.spec)),
    }


def _shown(submission: Submission) -> dict[str, Any]:
    return {
        "id": submission.id,
        "status": submission.status,
        "exit_status": exit_status(submission) if submission.is_over else None,
        "run": submission.metadata.get(RUN),
        "runs_dir": submission.metadata.get(RUNS_DIR),
        "started": _time(submission.started),
        "seconds": _seconds(submission),
        "message": submission.message,
    }


def _list_table(submissions: Sequence[Submission]) -> Table:
    table = tables.empty_table("submission", "status", "exit", "run", "seconds")
    for shown in map(_shown, submissions):
        seconds = "-" if shown["seconds"] is None else f"{shown['seconds']:.1f}"
        table.add_row(shown["id"], shown["status"], *map(tables.number, (shown["exit_status"], shown["run"])), seconds)
    return table


def _table(submission: Submission) -> Table:
    shown = _shown(submission)
    table = tables.empty_table(submission.id, submission.status)
    for key, value in shown.items():
        if key not in ("id", "status") and value:
            table.add_row(key.replace("_", " "), str(value).strip())
    return table


def _seconds(submission: Submission) -> float | None:
    if submission.started is None:
        return None
    return round((submission.ended or time.time()) - submission.started, 1)


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
