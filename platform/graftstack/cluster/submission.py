"""The job server of a Ray cluster: what is submitted there, how it does and what it says.

Ray is loaded once a server is asked. Where Ray's client and its server disagree with what they promise, this module
makes up for it: an explicit address wins over the environment, each request has its time limit, a status that Ray
doesn't know (a proxy's word) is passed on as it is, and a stream of logs just ends, whatever ended it.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from graftstack.cluster.job_address import (
    ACCEPT_S,
    TokenError,
    address_in,
    cause_of,
    environment_for_ray,
    headers_in,
    no_answer,
    no_server,
    token_in,
    url_of,
)
from graftstack.errors import GraftstackError
from graftstack.reason import reason

# How long a server may take to answer, and to take a part of an upload; in seconds.
_ANSWER_S = 20.0
_TAKE_S = 120.0

# A stream that says nothing is looked up from after so many seconds, and given up after so many: a connection that
# died without a word looks the same.
_LOOK_UP_S = 3.0
_SILENCE_S = 60.0

# They tell of uploads and closed sockets, at a level of their own.
_TALKATIVE = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")

STOPPED, SUCCEEDED, FAILED = "STOPPED", "SUCCEEDED", "FAILED"


class UnreachableError(GraftstackError):
    """A job server doesn't answer, or not as one does; it may a moment later."""


class SlowError(UnreachableError):
    """A job server took longer to answer than it may."""


class Submission(NamedTuple):
    """One time that a job was submitted."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED, or a word that only a proxy knows."""
    exit_code: int | None
    """What the job ended with; None where it hasn't, or where it ended otherwise."""
    message: str
    """The cluster's own words on the status."""
    metadata: dict[str, str]
    """What was given with the submission."""
    started: float | None
    """Seconds since 1970, by the cluster's clock."""
    ended: float | None

    @property
    def is_over(self) -> bool:
        """Whether the status can't change any more."""
        return self.status in (STOPPED, SUCCEEDED, FAILED)


class JobServer:
    """What takes submissions at an address.

    All methods raise `UnreachableError` where the server doesn't answer, and `BadInputError` where it wants another
    token.
    """

    def __init__(self, address: str | None, *, answer_s: float = _ANSWER_S) -> None:
        """Finds the server and asks it for its version.

        Args:
            address: ``http://HOST:PORT`` of the dashboard, ``HOST:PORT`` of the dashboard or the cluster, ``auto`` or
                ``ray://HOST:PORT``; None: what the environment says, else the cluster on this machine.
            answer_s: How long it may take to accept a connection, and to answer.

        Raises:
            BadInputError: it is no address, or nothing that takes jobs answers there.
        """
        given = address or address_in(os.environ)
        token = token_in(os.environ)
        self._has_token = token is not None
        self.address = url_of(given, token, answer_s)
        try:
            self._client: Any = _client(self.address, token, answer_s)
        except SlowError as error:
            raise no_answer(given) from error
        except UnreachableError as error:
            raise no_server(given, str(error)) from error
        except TokenError as error:
            raise TokenError(f"--to {given}: {error}") from error

    def ray_version(self) -> str:
        """Returns the version of Ray that the cluster runs."""
        with self._explained():
            return str(self._client.about()["ray_version"])

    def submit(self, submission_id: str, *, entrypoint: str, package: Path, metadata: Mapping[str, str]) -> None:
        """Sends a package, unless the cluster has it, and runs a command in its folder.

        Args:
            submission_id: Of no submission that is there.
            entrypoint: A shell command.
            package: A zip file.
            metadata: Is kept with the submission.

        Raises:
            UnreachableError: also where the server refuses; whether the submission was taken, `find` knows.
        """
        with self._explained():
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env={"working_dir": str(package)},
                metadata=dict(metadata),
            )

    def find(self, submission_id: str) -> Submission | None:
        """Returns a submission as it is now, or None where the cluster knows none of that name."""
        with self._explained():
            found = self._client.details(submission_id) if submission_id else None
            # Ray answers for drivers too, which nobody submitted.
            return _submission(found) if found and found.get("submission_id") else None

    def submissions(self) -> list[Submission]:
        """Returns all that was submitted, oldest first."""
        with self._explained():
            found = self._client.list_details()
            submissions = [_submission(details) for details in found if details.get("submission_id")]
        return sorted(submissions, key=lambda one: (one.started or 0.0, one.id))

    def stop(self, submission_id: str) -> bool:
        """Asks a job to stop; returns whether there was one to ask. It is over a few seconds later."""
        with self._explained():
            return bool(self._client.stop_job(submission_id))

    def delete(self, submission_id: str) -> None:
        """Makes the cluster forget a submission that is over; no other may have its name."""
        with self._explained():
            self._client.delete_job(submission_id)

    def logs(self, submission_id: str) -> str:
        """Returns all that a job has said so far."""
        with self._explained():
            return str(self._client.get_job_logs(submission_id))

    def stream(self, submission_id: str) -> Iterator[str]:
        """Yields what a job says, from its start on and as it comes; an empty string where it is silent for a while.

        The end of the stream says nothing of the job: it comes when a connection is lost too.
        """
        chunks = self._client.tail_job_logs(submission_id)
        loop = asyncio.new_event_loop()
        pending: asyncio.Task[str | None] | None = None
        silent_s = 0.0
        try:
            while silent_s < _SILENCE_S:
                pending = pending or loop.create_task(_next(chunks))
                done, _ = loop.run_until_complete(asyncio.wait({pending}, timeout=_LOOK_UP_S))
                if not done:
                    silent_s += _LOOK_UP_S
                    yield ""
                    continue
                chunk, pending, silent_s = pending.result(), None, 0.0
                if chunk is None:
                    return
                yield chunk
        finally:
            if pending is not None:
                pending.cancel()
                loop.run_until_complete(asyncio.wait({pending}))
            loop.run_until_complete(chunks.aclose())
            loop.close()

    def _explained(self) -> AbstractContextManager[None]:
        return _explained(has_token=self._has_token)


async def _next(chunks: AsyncIterator[str]) -> str | None:
    """Returns the next part of a stream, or None at its end."""
    import aiohttp

    try:
        return await anext(chunks)
    except StopAsyncIteration:
        return None
    except (aiohttp.ClientError, RuntimeError, OSError) as error:  # refused, cut or garbled
        logging.getLogger(__name__).debug("the stream of logs ended: %s", error)
        return None


def _submission(details: Mapping[str, Any]) -> Submission:
    def seconds(key: str) -> float | None:
        return details[key] / 1000 if details.get(key) else None

    return Submission(
        id=str(details["submission_id"]),
        status=str(details["status"]),
        exit_code=details.get("driver_exit_code"),
        message=details.get("message") or "",
        metadata=details.get("metadata") or {},
        started=seconds("start_time"),
        ended=seconds("end_time"),
    )


def _client(url: str, token: str | None, answer_s: float) -> Any:
    headers = headers_in(os.environ) | ({"Authorization": f"Bearer {token}"} if token else {})
    with _explained(has_token=token is not None), environment_for_ray():
        return _client_type(answer_s)(url, headers=headers)


@cache
def _client_type(answer_s: float) -> type:
    """Returns Ray's client, with time limits and with answers as they are."""
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)

    class Client(JobSubmissionClient):  # type: ignore[misc]  # ray has no types
        def details(self, submission_id: str) -> Any:
            answer = self._do_request("GET", f"/api/jobs/{quote(submission_id, safe='')}")
            return None if answer.status_code == 404 else self._content(answer)

        def about(self) -> Any:
            return self._content(self._do_request("GET", "/api/version"))

        def list_details(self) -> Any:
            return self._content(self._do_request("GET", "/api/jobs/"))

        def _content(self, answer: Any) -> Any:
            if answer.status_code != 200:
                self._raise_error(answer)
            return answer.json()

        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            limits = (min(ACCEPT_S, answer_s), answer_s if method == "GET" else _TAKE_S)
            return super()._do_request(method, endpoint, timeout=limits, **more)

        def _raise_error(self, answer: Any) -> None:
            lines = [line for line in answer.text.splitlines() if line.strip(" .")]
            raise UnreachableError(f"{answer.status_code}: {lines[-1].strip() if lines else answer.reason}")

    return Client


@contextmanager
def _explained(*, has_token: bool) -> Iterator[None]:
    """Turns what Ray's client and the libraries below it raise into errors of ours."""
    import requests
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:  # of tokens: this client has no others
        is_refused = "failed" in str(error)
        if is_refused and not has_token:  # Ray itself says 401 to that
            raise TokenError(
                "what answers refused a request without a token (403); a proxy in front may want headers: set "
                "RAY_JOB_HEADERS to them, or RAY_AUTH_TOKEN to the cluster's token"
            ) from error
        why = "the one that it got isn't its own (403)" if is_refused else "it got none (401)"
        raise TokenError(
            f"the cluster asks for a token, and {why}; set RAY_AUTH_TOKEN to its token, or RAY_AUTH_TOKEN_PATH to a "
            "file that holds it"
        ) from error
    except requests.exceptions.Timeout as error:
        raise SlowError("no answer in time") from error
    except (requests.exceptions.RequestException, ConnectionError) as error:
        raise UnreachableError(cause_of(error)) from error
    except (
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # an answer, and not in the words of Ray
        raise UnreachableError(f"what answers isn't Ray's job server: {reason(error)}") from error
