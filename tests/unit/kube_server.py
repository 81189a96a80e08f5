"""An API server on loopback that speaks as much of Kubernetes as tests need."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml


class ApiServer(ThreadingHTTPServer):
    """Keeps objects; a test says what it refuses, what becomes of a job, how logs arrive, and who may do what."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str]] = []
        self.refusals: list[tuple[str, str, int, Any]] = []
        self.statuses: list[dict[str, Any]] = []
        self.pods: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.workloads: list[dict[str, Any]] = []
        self.logs: dict[str, list[list[str]]] = {}
        self.user = "ann"
        self.denied: set[tuple[str, str]] = set()

    def refuse(self, method: str, path: str, status: int, body: Any) -> None:
        self.refusals.append((method, path, status, body))

    def submitter(self, name: str, *connections: list[str], submission: str = "id-1") -> dict[str, Any]:
        """A pod whose log comes in so many connections, all but the last of which break."""
        env = [{"name": "RAY_JOB_SUBMISSION_ID", "value": submission}]
        pod = {
            "metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:00:0{len(self.pods)}Z"},
            "spec": {"containers": [{"name": "ray-job-submitter", "env": env}]},
            "status": {"phase": "Running"},
        }
        self.pods.append(pod)
        self.logs[name] = list(connections)
        return pod


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        where = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(where.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_dry = query.get("dryRun") == "All"
        self.server.asked.append((self.command + (" dry" if is_dry else ""), where.path))
        for method, path, status, answer in self.server.refusals:
            if method == self.command and re.fullmatch(path, where.path):
                return self._answer(status, answer)
        if where.path.endswith("/log"):
            return self._log(where.path.split("/")[-2])
        return self._answer(*self._stored(where.path, query, json.loads(body or b"{}"), is_dry=is_dry))

    do_GET = do_POST = do_PATCH = do_DELETE = _handle  # noqa: N815 - names of the standard library

    def _stored(self, path: str, query: dict[str, str], body: Any, *, is_dry: bool) -> tuple[int, Any]:
        objects = self.server.objects
        if self.command == "POST" and path.endswith("reviews"):
            return 201, self._review(body)
        if self.command == "POST":
            return self._make(f"{path}/{body['metadata']['name']}", body, is_dry=is_dry)
        if path not in objects:
            return self._listed(path, query) if self.command == "GET" else self._missing(path)
        if self.command == "DELETE":
            return 200, objects.pop(path)
        if self.command == "PATCH":
            objects[path]["metadata"] |= body["metadata"]
        elif "/rayjobs/" in path and self.server.statuses:
            objects[path]["status"] = self.server.statuses[0]
            if len(self.server.statuses) > 1:
                self.server.statuses.pop(0)
        return 200, objects[path]

    def _review(self, body: Any) -> Any:
        if body["kind"] == "SelfSubjectReview":
            return body | {"status": {"userInfo": {"username": self.server.user, "groups": []}}}
        asked = body["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        return body | {"status": {"allowed": (asked["verb"], resource) not in self.server.denied}}

    def _make(self, key: str, body: Any, *, is_dry: bool) -> tuple[int, Any]:
        if key in self.server.objects:
            return 409, {"message": "already exists", "reason": "AlreadyExists"}
        made = body | {"metadata": body["metadata"] | {"uid": "uid-1"}}
        if not is_dry:
            self.server.objects[key] = made
        return 201, made

    def _listed(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        lists = {"pods": self.server.pods, "events": self.server.events, "workloads": self.server.workloads}
        kind = path.rpartition("/")[2]
        if kind in lists:
            return 200, {"items": lists[kind]}
        if kind != "rayjobs":
            return self._missing(path)
        label, _, value = query.get("labelSelector", "").partition("=")
        found = [item for key, item in self.server.objects.items() if key.startswith(path)]
        return 200, {"items": [item for item in found if item["metadata"]["labels"].get(label) == value]}

    def _missing(self, path: str) -> tuple[int, Any]:
        return 404, {"message": "not found", "details": {"kind": path.split("/")[-2]}}

    def _log(self, pod: str) -> None:
        connections = self.server.logs[pod]
        lines = connections[0]
        is_last = len(connections) == 1
        if not is_last:
            connections.pop(0)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            data = f"{line}\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if is_last:
            self.wfile.write(b"0\r\n\r\n")
            for found in self.server.pods:
                if found["metadata"]["name"] == pod:
                    found["status"]["phase"] = "Succeeded"
        else:
            self.close_connection = True

    def _answer(self, status: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def write_kubeconfig(path: Path, port: int) -> None:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
    }
    path.write_text(yaml.safe_dump(config))


@contextmanager
def serving(kubeconfig: Path) -> Iterator[ApiServer]:
    """A server that runs for the duration of the block; a file is written that says where."""
    found = ApiServer()
    thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    write_kubeconfig(kubeconfig, found.server_port)
    yield found
    found.shutdown()
    found.server_close()
    thread.join()
