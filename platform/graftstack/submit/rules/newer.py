"""Fields that the operator on the cluster doesn't know yet: the API server drops them, or refuses the job."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from graftstack.config.kubernetes_syntax import version
from graftstack.submit.manifest import Finding, join, spelt
from graftstack.submit.rayjob import RayJob


def fields_newer_than(job: RayJob, kuberay: str) -> Iterator[Finding]:
    """Yields those fields that a KubeRay of version `kuberay` doesn't have."""
    for path, since in _dated("", job):
        if not _is_known(since, kuberay):
            message = f"KubeRay {kuberay} doesn't know it"
            yield Finding(path, message, f"leave it out, or upgrade the operator to {since}")


def _is_known(since: str, kuberay: str) -> bool:
    """``1.5`` stands for the last of its releases."""
    first, there = version(since), version(kuberay)
    return first[: len(there)] <= there


def _dated(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _dated(f"{path}[{index}]", item)
    if not is_dataclass(value):
        return
    since: Mapping[str, str] = getattr(value, "SINCE", {})
    for item in fields(value):
        inner = getattr(value, item.name)
        if inner is not None:
            where = join(path, spelt(item.name))
            if item.name in since:
                yield where, since[item.name]
            yield from _dated(where, inner)
