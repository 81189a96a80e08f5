"""Ray, judged from metadata, files and the environment: only cluster/ imports it."""

import socket
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from graftstack.doctor.finding import Finding
from graftstack.doctor.packages import find_package

# Ray Train V2 is its default from here on.
_MIN_RAY = "2.52"
_ANSWER_WITHIN_S = 0.5


def check_ray(path: Sequence[str]) -> Finding:
    """Ray is installed on `path`, whole, and new enough."""
    from packaging.version import Version

    package = find_package("ray", path)
    fix = f"uv pip install 'ray[default,train,tune]>={_MIN_RAY}'"
    if package is None:
        return Finding("Ray", "broken", "not installed", fix)
    if PathFinder.find_spec("ray", list(path)) is None:
        return Finding("Ray", "broken", f"{package.version} is installed and has no files", f"{fix} --reinstall")
    if Version(package.version) < Version(_MIN_RAY):
        return Finding("Ray", "broken", f"{package.version} is older than {_MIN_RAY}", fix)
    return Finding("Ray", "ok", package.version)


def address_file(environ: Mapping[str, str]) -> Path:
    """Returns the file in which Ray writes the address of the cluster that was last started on this machine."""
    return Path(environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # noqa: S108 - Ray's own default


def check_ray_cluster(file: Path) -> Finding:
    """No other cluster takes this machine's CPUs; `file` names the last one that was started here."""
    name = "Ray clusters"
    try:
        address = file.read_text().strip()
    except OSError:
        address = ""
    if not address:
        return Finding(name, "ok", "none runs on this machine")
    if not _answers(address):
        return Finding(name, "ok", f"none runs on this machine; {file} still names {address}, which doesn't answer")
    return Finding(
        name,
        "warn",
        f"one runs here, at {address}; cluster=local starts its own beside it, and each counts on all CPUs",
        "join it with cluster=ray, or stop it with ray stop",
    )


def check_ray_address(environ: Mapping[str, str]) -> Finding:
    """No environment variable leads Ray to another cluster."""
    address = environ.get("RAY_ADDRESS")
    if not address:
        return Finding("RAY_ADDRESS", "ok", "not set")
    return Finding(
        "RAY_ADDRESS",
        "warn",
        f"{address}: diverts to that cluster what names none, such as cluster=ray with cluster.address=auto",
        "unset RAY_ADDRESS, and give cluster.address instead",
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_WITHIN_S):
            return True
    except (OSError, ValueError, OverflowError):
        return False
