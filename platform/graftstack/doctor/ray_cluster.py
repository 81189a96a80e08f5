"""A Ray cluster, reached as a submission reaches it, by the address of its dashboard."""

import sys
from functools import partial
from importlib.metadata import Distribution

from graftstack import __version__
from graftstack.cluster.job_address import TokenError
from graftstack.cluster.submission import JobServer, SlowError, UnreachableError
from graftstack.doctor import nodes, versions
from graftstack.doctor.finding import Finding, Say, examine, from_error
from graftstack.doctor.nodes import NodeFacts
from graftstack.doctor.packages import built_version, find_package
from graftstack.doctor.probing import ProbeError, probe_nodes
from graftstack.errors import BadInputError
from graftstack.storage import Folder

# Who asks whether somebody is there wants to know soon; what comes later may take longer.
_FIRST_ANSWER_S = 3.0


def examine_cluster(address: str, runs_dir: str, *, say: Say) -> list[Finding]:
    """Returns the findings of all checks on a cluster, as far as it can be reached.

    Args:
        address: As `JobServer` takes it.
        runs_dir: Where runs are to lie, as a submission would send it: a relative path begins here.
        say: Is told what takes time.
    """
    place = Folder(runs_dir).location
    try:
        first = JobServer(address, answer_s=_FIRST_ANSWER_S)
        first.ray_version()
        server = JobServer(first.address)
        server.submissions()
    except TokenError as error:
        return [from_error("token", error)]
    except BadInputError as error:
        return [from_error("cluster", error)]
    except UnreachableError as error:
        return [_no_jobs(address, error)]
    findings = [Finding("cluster", "ok", f"takes jobs at {server.address}"), _token_is_fine()]
    findings.append(examine("Ray's version", partial(_check_ray_version, server)))
    try:
        found = probe_nodes(server, place, say=say)
    except UnreachableError as error:
        return [*findings, _no_jobs(address, error)]
    except ProbeError as error:
        return [*findings, from_error("nodes", error)]
    return [*findings, *examine_nodes(found, place)]


def examine_nodes(found: list[NodeFacts], place: str) -> list[Finding]:
    """Returns the findings on the nodes of a cluster."""
    answered = [node for node in found if node.error is None]
    findings = [nodes.check_nodes(found)]
    if not answered:
        return findings
    checks = {
        "Python's version": partial(versions.check_python_version, sys.version_info[:3], answered),
        "graftstack there": partial(versions.check_graftstack_version, __version__, answered),
        "torch there": partial(versions.check_torch_version, _ours("torch"), answered),
        "storage": partial(nodes.check_writing, place, found),
        "shared storage": partial(nodes.check_sharing, place, found),
        "disks": partial(nodes.check_disks, place, found),
        "GPUs": partial(nodes.check_gpus, found),
        "threads": partial(nodes.check_threads, found),
        "bytecode": partial(nodes.check_bytecode, found),
    }
    return findings + [examine(name, check) for name, check in checks.items()]


def _check_ray_version(server: JobServer) -> Finding:
    return versions.check_ray_version(_version(find_package("ray", sys.path)), server.ray_version())


def _no_jobs(address: str, error: UnreachableError) -> Finding:
    if isinstance(error, SlowError):
        fix = "try again later, and see whether the cluster's head is out of CPU or memory"
        return Finding("jobs", "broken", f"{address}: Ray answers there, and takes too long over its jobs", fix)
    detail = f"{address}: what answers takes no jobs ({error})"
    return Finding("jobs", "broken", detail, "give the address of Ray's dashboard itself, as in http://HOST:8265")


def _token_is_fine() -> Finding:
    return Finding("token", "ok", "the cluster takes it, or asks for none")


def _ours(name: str) -> str | None:
    package = find_package(name, sys.path)
    return None if package is None else built_version(package)


def _version(package: Distribution | None) -> str | None:
    return None if package is None else package.version
