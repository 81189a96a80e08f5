"""Where the job server of a Ray cluster is, and what it asks of whom: addresses, tokens, and headers for a proxy.

They are found where Ray's own tools look for them.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from graftstack.cluster.node_probe import within
from graftstack.errors import BadInputError
from graftstack.reason import reason

# Ray's own tools look into these, in this order.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_HEADERS_VARIABLE = "RAY_JOB_HEADERS"
TOKEN_FILE_VARIABLE = "RAY_AUTH_TOKEN_PATH"  # noqa: S105 - a name
_DASHBOARD_PORT = 8265

# Those that are meant where an address names none.
_PORTS = {"http": 80, "https": 443, "ray": 10001}

# How long a server may take to accept a connection, in seconds.
ACCEPT_S = 5.0

# A server of Ray Client starts a process for each who connects, and then answers.
_CLIENT_ANSWER_S = 20.0


class TokenError(BadInputError):
    """The token can't be read, or a job server wants another one."""


def address_in(environ: Mapping[str, str]) -> str:
    """Returns the address that the environment names; ``auto``, the cluster on this machine, where it names none."""
    return next(filter(None, map(environ.get, _ADDRESS_VARIABLES)), "auto")


@contextmanager
def environment_for_ray(token: str | None = None) -> Iterator[None]:
    """Hides what Ray's client would prefer to the address that it is given, and lets Ray use a token that there is."""
    own = {"RAY_AUTH_MODE": "token"} if token and "RAY_AUTH_MODE" not in os.environ else {}
    hidden = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
        os.environ.update(hidden)


class FoundToken(NamedTuple):
    """What there is where Ray looks for a token."""

    token: str | None
    place: str
    """The variable that holds it, or the path of the file that does, or would."""
    why_not: str = ""
    """Why there is none."""
    is_unreadable: bool = False
    """Whether there is a file, and it can't be read."""


def find_token(environ: Mapping[str, str], home: Path | None = None) -> FoundToken:
    """Looks for a token as Ray does.

    Args:
        environ: The environment.
        home: Whose folder may hold one; None: that of who runs this.
    """
    if token := environ.get("RAY_AUTH_TOKEN", "").strip():
        return FoundToken(token, "RAY_AUTH_TOKEN")
    named = environ.get(TOKEN_FILE_VARIABLE)
    place = named or "~/.ray/auth_token"
    try:
        file = Path(named).expanduser() if named else (home or Path.home()) / ".ray" / "auth_token"
        place = str(file)
        token = file.read_text().strip()
    except FileNotFoundError:
        return FoundToken(None, place, "there is no such file")
    except (OSError, ValueError, RuntimeError) as error:
        return FoundToken(None, place, reason(error), is_unreadable=True)
    return FoundToken(token, place) if token else FoundToken(None, place, "it is empty")


def token_in(environ: Mapping[str, str]) -> str | None:
    """Returns the token that Ray would send, also where nothing says that it should: a cluster without ignores it.

    Raises:
        TokenError: a file is named that holds none.
    """
    if environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    found = find_token(environ)
    if found.token is None and (named := environ.get(TOKEN_FILE_VARIABLE)):
        raise TokenError(f"{TOKEN_FILE_VARIABLE}={named}: can't be read ({found.why_not}); correct it")
    return found.token


def headers_in(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the headers that requests are to have, such as those that a proxy wants. Raises `BadInputError`."""
    given = environ.get(_HEADERS_VARIABLE)
    if not given:
        return {}
    try:
        headers = json.loads(given)
    except ValueError:
        headers = None
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        # It may hold secrets, so it isn't shown.
        raise BadInputError(f'{_HEADERS_VARIABLE}: holds no JSON object of texts; write {{"NAME": "VALUE"}}')
    return headers


def url_of(given: str, token: str | None, answer_s: float) -> str:
    """Returns the URL of the job server at an address, whose cluster may take so long to answer.

    Raises:
        BadInputError: it is no address, or nobody listens there, or answers.
    """
    if given == "auto":
        return _asked_of_ray(given, token, answer_s)
    has_scheme = "://" in given
    parts = _parts(given if has_scheme else f"http://{given}")
    if parts is None or parts.scheme not in _PORTS:
        raise BadInputError(
            f"--to {given}: no address of a cluster; write http://HOST:{_DASHBOARD_PORT}, as its dashboard has it"
        )
    port = parts.port or (_PORTS[parts.scheme] if has_scheme else _DASHBOARD_PORT)
    try:
        socket.create_connection((str(parts.hostname), port), timeout=min(ACCEPT_S, answer_s)).close()
    except TimeoutError as error:
        raise no_answer(given) from error
    except (OSError, UnicodeError) as error:
        raise no_server(given, cause_of(error)) from error
    if parts.scheme == "ray":
        return _asked_of_ray(given, token, max(answer_s, _CLIENT_ANSWER_S))
    if has_scheme:
        return given.rstrip("/")
    url = f"http://{parts.netloc if parts.port else f'{parts.netloc}:{port}'}"
    return url if _speaks_http(url, given, answer_s) else _asked_of_ray(given, token, answer_s)


def _parts(url: str) -> SplitResult | None:
    """Returns the parts of a URL, or None if it has no host, or no port that could be one."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts if parts.hostname else None


def _speaks_http(url: str, given: str, answer_s: float) -> bool:
    """Returns whether what listens there is no cluster's own port, at which other requests than Ray's are hung up."""
    import requests

    try:
        requests.get(f"{url}/api/version", timeout=answer_s)
    except requests.exceptions.Timeout as error:
        raise no_answer(given) from error
    except requests.exceptions.RequestException:
        return False
    return True


def _asked_of_ray(given: str, token: str | None, answer_s: float) -> str:
    """Returns the URL of the dashboard of the cluster that Ray knows by another address."""
    with environment_for_ray(token), _no_warnings():
        from ray.dashboard.utils import get_address_for_submission_client
        from ray.exceptions import RayError

        try:
            # Ray itself tries for half a minute.
            return str(within(answer_s, lambda: get_address_for_submission_client(given)))
        except TimeoutError as error:
            raise no_answer(given) from error
        except (RayError, ConnectionError, ValueError, RuntimeError) as error:
            raise no_server(given, reason(error)) from error


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keeps Ray from telling users that only the main thread sets handlers of signals."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def no_answer(given: str) -> BadInputError:
    """Returns what the user is told who gave an address at which somebody listens, and says nothing."""
    return BadInputError(
        f"--to {given}: no answer in time; check that it is the address of a cluster's dashboard, as in "
        f"http://HOST:{_DASHBOARD_PORT}, and try again where its head is busy"
    )


def no_server(given: str, why: str) -> BadInputError:
    """Returns what the user is told who gave an address at which nothing takes jobs."""
    return BadInputError(
        f"--to {given}: no Ray cluster takes jobs there ({why.rstrip('.')}); check that it runs, and give the address "
        f"of its dashboard, as in http://HOST:{_DASHBOARD_PORT}"
    )


def cause_of(error: BaseException) -> str:
    """Returns the words of the operating system for a lost connection, where they are to be had."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__cause__ or found.__context__
    return reason(error)
