"""An S3-compatible server on loopback: ``python s3_server.py``, for tests and their drivers.

It says its address on its first line of output. Each line of its input is a command, each answered in one line of JSON:

- ``down``: refuses connections from now on; what it holds stays
- ``up``: takes them again, at the same address
- ``requests``: the requests since the last question, each as ``PUT bucket/name?query``
- ``hold NUM PATTERN``: the NUM-th request from now on in which the regular expression is found gets no answer
- ``held``: whether that one has arrived
- ``release``: asks that it be sent again later

It ends with its input. The one access key that it takes is `KEY`, with whatever secret.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from threading import Event, Lock, Thread
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

KEY = "graftstack"

_FORBIDDEN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>InvalidAccessKeyId</Code><Message>The AWS Access Key Id you provided does not exist.</Message></Error>"""


class _QuietHandler(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass


class Hold:
    """Keeps one request waiting."""

    def __init__(self, num: int = 0, pattern: str = "") -> None:
        self._num, self._pattern = num, re.compile(pattern)
        self.arrived, self.is_over = Event(), Event()

    def keeps(self, request: str) -> bool:
        """Returns whether it was this one, after the wait; at once if not."""
        if not self._num or not self._pattern.search(request):
            return False
        self._num -= 1
        if self._num:
            return False
        self.arrived.set()
        return self.is_over.wait()


class Store:
    """What the server holds and was asked, whether it is up or down."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.hold = Hold()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO'].lstrip('/')}{query}"
        self.requests.append(request)
        if self.hold.keeps(request):
            start_response("503 Slow Down", [])
            return []
        if not re.search(rf"Credential={KEY}/", environ.get("HTTP_AUTHORIZATION", "")):
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [_FORBIDDEN]
        with self._lock:  # one at a time: moto looks whether an object is there, then puts it
            return list(self._app(environ, start_response))


class Listener:
    """The open port."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._server: BaseWSGIServer | None = None
        self.port = 0

    def open(self) -> None:
        """Takes connections, at the same port as before."""
        self._server = make_server("127.0.0.1", self.port, self._store, threaded=True, request_handler=_QuietHandler)
        self.port = self._server.port
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        """Refuses connections."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()


def main() -> None:
    store = Store()
    listener = Listener(store)
    listener.open()
    print(f"http://127.0.0.1:{listener.port}", flush=True)
    for line in sys.stdin:
        answer: object = None
        match line.split(maxsplit=2):
            case ["up"]:
                listener.open()
            case ["down"]:
                listener.close()
            case ["requests"]:
                answer, store.requests = store.requests, []
            case ["hold", num, pattern]:
                store.hold = Hold(int(num), pattern.rstrip())
            case ["held"]:
                answer = store.hold.arrived.is_set()
            case ["release"]:
                store.hold.is_over.set()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
