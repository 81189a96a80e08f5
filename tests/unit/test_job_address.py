"""What the environment says of a job server: its address, its token, and the headers that a proxy wants."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from graftstack.cluster.job_address import address_in, environment_for_ray, headers_in, token_in, url_of
from graftstack.cluster.submission import JobServer
from graftstack.errors import BadInputError

VERSION = b'{"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}'


class Proxy(ThreadingHTTPServer):
    """Answers only whoever says the word, as a proxy before a cluster does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        is_known = self.headers.get("X-Team") == "vision"
        body = VERSION if is_known else b"who are you?"
        self.send_response(200 if is_known else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("RAY_JOB_HEADERS", raising=False)
    with Proxy() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_proxy_gets_the_headers_that_it_wants(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(BadInputError, match=r"refused a request without a token \(403\); .* RAY_JOB_HEADERS"):
        JobServer(proxy)
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"X-Team": "vision"}')
    assert JobServer(proxy).ray_version() == "2.60.0"


@pytest.mark.parametrize("given", ["X-Team: vision", "[1]", '{"X-Team": 1}'])
def test_headers_that_cant_be_read_are_refused_and_not_shown(given: str) -> None:
    with pytest.raises(BadInputError) as caught:
        headers_in({"RAY_JOB_HEADERS": given})
    assert str(caught.value) == 'RAY_JOB_HEADERS: holds no JSON object of texts; write {"NAME": "VALUE"}'


def test_the_address_of_jobs_comes_before_that_of_ray() -> None:
    assert address_in({}) == "auto"
    assert address_in({"RAY_ADDRESS": "ray"}) == "ray"
    assert address_in({"RAY_ADDRESS": "ray", "RAY_API_SERVER_ADDRESS": "jobs"}) == "jobs"


def test_a_token_is_read_from_the_variable_or_the_file_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-file\n")
    named = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert token_in(named) == "from-file"
    assert token_in({**named, "RAY_AUTH_TOKEN": "given"}) == "given"
    assert token_in({**named, "RAY_AUTH_MODE": "disabled"}) is None
    with pytest.raises(BadInputError, match=r"RAY_AUTH_TOKEN_PATH=.*none: can't be read \(there is no such file\)"):
        token_in({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
    before = dict(os.environ)
    with environment_for_ray("a-token"):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert "RAY_ADDRESS" not in os.environ
    assert dict(os.environ) == before
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with environment_for_ray("a-token"):
        assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize("given", ["http://", "ray://", "tcp://here", "here:port"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(BadInputError, match="no address of a cluster"):
        url_of(given, None, 1.0)
