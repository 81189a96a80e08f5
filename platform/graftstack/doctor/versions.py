"""What runs on a cluster, compared with what runs here.

A job that is submitted runs with the cluster's own Ray, Python and torch, so it can do with others than those here. A
process that joins the cluster (``cluster=ray`` with its address) can't: Ray refuses it.
"""

from collections.abc import Sequence

from graftstack.config.kubernetes_syntax import version
from graftstack.doctor.clusters import MIN_RAY
from graftstack.doctor.finding import Finding
from graftstack.doctor.nodes import NodeFacts, most_common, where
from graftstack.doctor.packages import MIN_PYTHON

_JOINING = "submitted jobs run; cluster=ray from this machine is refused"


def check_ray_version(ours: str | None, theirs: str) -> Finding:
    """The cluster has the Ray that is installed here, and one that is new enough."""
    name = "Ray's version"
    try:
        is_old = version(theirs) < version(MIN_RAY)
    except ValueError:
        return Finding(
            name, "warn", f"the cluster says {theirs!r}, which is no version", "ask whether it is Ray at all"
        )
    if is_old:
        fix = f"start the cluster with ray[default,train,tune]>={MIN_RAY}"
        return Finding(name, "broken", f"the cluster has {theirs}, older than {MIN_RAY}", fix)
    if ours is not None and ours != theirs:
        detail = f"{theirs} on the cluster, {ours} here: {_JOINING}"
        return Finding(name, "warn", detail, f"uv pip install 'ray[default,train,tune]=={theirs}'")
    return Finding(name, "ok", theirs)


def check_python_version(ours: tuple[int, ...], nodes: Sequence[NodeFacts]) -> Finding:
    """The cluster has the Python that runs here, in its first two numbers, and one that is new enough."""
    name = "Python's version"
    wanted = ".".join(map(str, MIN_PYTHON))
    theirs = str(most_common(node.python for node in nodes))
    if version(theirs)[:2] < MIN_PYTHON:
        fix = f"start the cluster from an environment with Python {wanted} or newer"
        return Finding(name, "broken", f"{theirs} on the cluster is older than {wanted}", fix)
    if version(theirs)[:2] != ours[:2]:
        here = ".".join(map(str, ours[:2]))
        short = ".".join(map(str, version(theirs)[:2]))
        detail = f"{theirs} on the cluster, {here} here: {_JOINING}"
        return Finding(name, "warn", detail, f"uv venv --python {short} .venv, then install again")
    return Finding(name, "ok", theirs)


def check_graftstack_version(ours: str, nodes: Sequence[NodeFacts]) -> Finding:
    """Each node has the graftstack that runs here."""
    name = "graftstack there"
    if all(node.graftstack is None for node in nodes):
        fix = f"add --with-code to each submit, or uv pip install graftstack=={ours} on all nodes"
        return Finding(name, "warn", "not installed on the cluster: jobs need the code sent along", fix)
    others = {node.graftstack for node in nodes} - {ours}
    if not others:
        return Finding(name, "ok", ours)
    at = where(nodes, lambda node: node.graftstack != ours)
    found = " and ".join(sorted(other or "none" for other in others))
    detail = f"{found} on {at}, {ours} here: keys and defaults may be others"
    return Finding(name, "warn", detail, f"add --with-code to each submit, or install {ours} there")


def check_torch_version(ours: str | None, nodes: Sequence[NodeFacts]) -> Finding:
    """Each node has torch, all the same, and the one that is installed here; builds for other GPUs are the same."""
    name = "torch there"
    if any(node.torch is None for node in nodes):
        at = where(nodes, lambda node: node.torch is None)
        return Finding(name, "broken", f"not installed on {at}", "uv pip install torch torchvision there")
    releases = {str(node.torch).partition("+")[0] for node in nodes}
    theirs = " and ".join(sorted(releases))
    if len(releases) > 1:
        usual = str(most_common(str(node.torch).partition("+")[0] for node in nodes))
        at = where(nodes, lambda node: str(node.torch).partition("+")[0] != usual)
        detail = f"{theirs}; another than {usual} on {at}: workers of one job disagree"
        return Finding(name, "broken", detail, f"uv pip install torch=={usual} there, and the torchvision that fits")
    if ours is not None and ours.partition("+")[0] not in releases:
        here = ours.partition("+")[0]
        detail = f"{theirs} on the cluster, {here} here: the last digits of results may differ"
        return Finding(name, "warn", detail, f"uv pip install torch=={theirs}, and the torchvision that fits")
    return Finding(name, "ok", " and ".join(sorted({str(node.torch) for node in nodes})))
