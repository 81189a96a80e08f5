"""``graftstack doctor``: what is wrong with a machine or a cluster, and the fix.

Each check is a small function of plain inputs that returns a `Finding`. What gathers those inputs lies apart:

- `this_machine`: for the checks in `packages`, `machine`, `clusters`, `storage` and `sending`
- `ray_cluster`: for those in `versions` and `nodes`; the nodes are asked by `probing`
- `kubernetes`: for those in `kube_objects`
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

from graftstack.doctor.finding import Finding
from graftstack.doctor.showing import say, show
from graftstack.errors import BadInputError

__all__ = ["Finding", "Target", "examine_target", "run_doctor"]

_KUBERNETES = "k8s"
_DEFAULT_RUNS_DIR = "runs"


class Target(NamedTuple):
    """Where jobs are to run."""

    to: str | None = None
    """The address of a Ray cluster, or ``k8s``; None: this machine."""
    runs_dir: str | None = None
    """Where the runs are to lie, a path or a URI; None: the default of all commands."""
    words: Sequence[str] = ()
    """How jobs are to run on Kubernetes, ``k8s.KEY=value``; what they don't say is as a submission has it."""


def run_doctor(target: Target | None = None, *, as_json: bool) -> bool:
    """Prints what was found, as a table or as a JSON list; returns whether nothing is broken. None: this machine.

    Raises:
        BadInputError: the target has parts that don't go together.
    """
    findings = examine_target(target or Target())
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        show(findings)
    return all(finding.status != "broken" for finding in findings)


def examine_target(target: Target) -> Sequence[Finding]:
    """Returns the findings of all checks of a target, in the order of a set-up. Raises `BadInputError`."""
    _check_target(target)
    if target.to is None:
        from graftstack.doctor.this_machine import examine_machine

        return examine_machine(target.runs_dir or _DEFAULT_RUNS_DIR)
    if target.to == _KUBERNETES:
        from graftstack.doctor.kubernetes import examine_kubernetes, read_words

        return examine_kubernetes(read_words(target.words))
    from graftstack.doctor.ray_cluster import examine_cluster

    return examine_cluster(target.to, target.runs_dir or _DEFAULT_RUNS_DIR, say=say)


def _check_target(target: Target) -> None:
    if target.to == _KUBERNETES:
        if target.runs_dir is not None:
            raise BadInputError(
                f"--runs-dir {target.runs_dir}: on Kubernetes runs lie on the claim of the pods, or at a URI that only "
                "they reach; leave it out"
            )
        return
    if target.words:
        words = " ".join(target.words)
        raise BadInputError(
            f"{words}: only Kubernetes is looked at by the words of a job; add --to k8s, or leave it out"
        )
