"""What is wrong with a RayJob, said before it is sent: the API server knows its shape, not what the operator refuses.

Each rule is a small function of the job that yields findings: the path of a field, what is wrong, and the fix.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from graftstack.errors import ConfigError
from graftstack.submit.manifest import Finding, from_manifest
from graftstack.submit.rayjob import KIND, RayJob
from graftstack.submit.rules import advice, cluster, deletion, groups, identity, kueue, life, pods
from graftstack.submit.rules.newer import fields_newer_than

__all__ = ["NEWEST_KUBERAY", "Finding", "check", "check_file", "check_manifest"]

NEWEST_KUBERAY = "1.7"

RULES = [
    *identity.RULES,
    *life.RULES,
    *deletion.RULES,
    *cluster.RULES,
    *groups.RULES,
    *pods.RULES,
    *kueue.RULES,
    *advice.RULES,
]


def check(job: RayJob, *, kuberay: str = NEWEST_KUBERAY) -> list[Finding]:
    """Returns all that is wrong with a job, faults before advice.

    Args:
        job: As it would be applied.
        kuberay: The version of the operator on the cluster.
    """
    found = [finding for rule in RULES for finding in rule(job)]
    found += fields_newer_than(job, kuberay)
    unique = dict.fromkeys(found)
    return sorted(unique, key=lambda finding: finding.is_advice)


def check_manifest(manifest: Any, *, kuberay: str = NEWEST_KUBERAY) -> list[Finding]:
    """Returns all that is wrong with a job as YAML has it: fields that there aren't, and then what `check` says."""
    job, findings = from_manifest(RayJob, manifest)
    return findings if job is None else [*findings, *check(job, kuberay=kuberay)]


def check_file(path: str | Path, *, kuberay: str = NEWEST_KUBERAY) -> list[Finding]:
    """Returns all that is wrong with the RayJobs in a file of YAML or JSON; other objects in it are left alone.

    Raises:
        ConfigError: the file can't be read, or holds no RayJob.
    """
    jobs = [manifest for manifest in _documents(Path(path)) if manifest.get("kind") == KIND]
    if not jobs:
        raise ConfigError(f"{path}: holds no RayJob; give a file with kind: {KIND}")
    findings = [check_manifest(manifest, kuberay=kuberay) for manifest in jobs]
    if len(jobs) == 1:
        return findings[0]
    return [
        finding._replace(path=f"RayJob {number}: {finding.path}")
        for number, found in enumerate(findings, start=1)
        for finding in found
    ]


def _documents(path: Path) -> Iterator[dict[str, Any]]:
    try:
        documents = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_Loader))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); give a file of YAML") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not YAML ({error.problem}); correct the file") from error
    return (document for document in documents if isinstance(document, dict))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would keep the last; the API server refuses it too."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in found:
            raise yaml.constructor.ConstructorError(None, None, f"{key} is there twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
