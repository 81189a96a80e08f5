"""Ray on this machine, judged from metadata, files and the environment: only cluster/ imports it."""

from collections.abc import Collection, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from graftstack.cluster.job_address import TOKEN_FILE_VARIABLE, find_token
from graftstack.cluster.listening import listens
from graftstack.doctor.finding import Finding
from graftstack.doctor.packages import find_package

# Ray Train V2 is its default from here on.
MIN_RAY = "2.52"
_ANSWER_WITHIN_S = 0.5

_MODES = ("token", "disabled")


def check_ray(path: Sequence[str]) -> Finding:
    """Ray is installed on `path`, whole, and new enough."""
    from packaging.version import Version

    package = find_package("ray", path)
    fix = f"uv pip install 'ray[default,train,tune]>={MIN_RAY}'"
    if package is None:
        return Finding("Ray", "broken", "not installed", fix)
    if PathFinder.find_spec("ray", list(path)) is None:
        return Finding("Ray", "broken", f"{package.version} is installed and has no files", f"{fix} --reinstall")
    if Version(package.version) < Version(MIN_RAY):
        return Finding("Ray", "broken", f"{package.version} is older than {MIN_RAY}", fix)
    return Finding("Ray", "ok", package.version)


def address_file(environ: Mapping[str, str]) -> Path:
    """Returns the file in which Ray writes the address of the cluster that was last started on this machine."""
    return Path(environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # noqa: S108 - Ray's own default


class LastCluster(NamedTuple):
    """The cluster that was last started on this machine, as a file names it."""

    file: Path
    address: str
    """Empty where there is no file."""
    is_up: bool
    """Whether something answers there."""


def last_cluster(file: Path) -> LastCluster:
    """Reads the file in which Ray writes an address, and tries that."""
    try:
        address = file.read_text().strip()
    except OSError:
        address = ""
    return LastCluster(file, address, bool(address) and listens(address, within_s=_ANSWER_WITHIN_S))


def check_ray_clusters(running: Collection[str], last: LastCluster) -> Finding:
    """No other cluster takes this machine's CPUs, and it is plain which one ``address=auto`` means.

    Args:
        running: The addresses of the clusters that have a node here.
        last: Whom the file names; a cluster in another container may answer there, too.
    """
    name = "Ray clusters"
    found = sorted({*running, last.address} if last.is_up else running)
    if not found:
        stale = f"; {last.file} still names {last.address}, which doesn't answer" if last.address else ""
        return Finding(name, "ok", f"none runs on this machine{stale}")
    each = "cluster=local starts its own beside it, and each counts on all CPUs"
    if len(found) == 1:
        return Finding(
            name, "warn", f"one runs here, at {found[0]}; {each}", "join it with cluster=ray, or stop it with ray stop"
        )
    gone = "" if last.is_up or last.address in running else ", which is gone"
    auto = f"the one that was started last, {last.address}{gone}" if last.address else "any of them"
    return Finding(
        name,
        "warn",
        f"{len(found)} run here, at {' and '.join(found)}: address=auto means {auto}; {each}",
        f"name one, as in cluster=ray cluster.address={found[0]}, or stop them all with ray stop",
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


def check_token(environ: Mapping[str, str], home: Path) -> Finding:
    """Ray finds a token where it is told to use one, and can read the file that holds it."""
    mode = environ.get("RAY_AUTH_MODE", "")
    if mode and mode.lower() not in _MODES:
        fix = f"set it to {' or '.join(_MODES)}, or unset it"
        return Finding("token", "warn", f"RAY_AUTH_MODE={mode}: Ray doesn't know it, and asks for no token", fix)
    found = find_token(environ, home)
    if found.is_unreadable:
        fix = f"chmod 600 {found.place}, as its owner"
        return Finding("token", "broken", f"{found.place}: can't be read ({found.why_not})", fix)
    named = environ.get(TOKEN_FILE_VARIABLE)
    if found.token is None and named:
        fix = f"correct {TOKEN_FILE_VARIABLE}, or put the cluster's token there"
        return Finding("token", "broken", f"{TOKEN_FILE_VARIABLE}={named}: no token there ({found.why_not})", fix)
    if found.token is None and mode.lower() == "token":
        fix = "ray get-auth-token --generate makes one; for a cluster that is there, put its token in RAY_AUTH_TOKEN"
        return Finding("token", "broken", "RAY_AUTH_MODE=token, and there is none", fix)
    return Finding("token", "ok", f"in {found.place}" if found.token else "none, and none is asked for here")
