"""``graftstack doctor``: what is wrong with this machine, and the fix.

Each check is a function of plain inputs that returns a `Finding`; here they get the inputs of this machine.
"""

import json
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from graftstack.doctor import clusters, machine, packages
from graftstack.doctor.finding import Finding
from graftstack.doctor.torch_facts import load_torch
from graftstack.machine import allowed_cpus

__all__ = ["Finding", "examine_machine", "run_doctor"]

_COLOURS = {"ok": "green", "warn": "yellow", "broken": "bold red"}
_CGROUP = Path("/sys/fs/cgroup")


def run_doctor(*, as_json: bool) -> bool:
    """Prints what was found, as a table or as a JSON list; returns whether nothing is broken."""
    findings = examine_machine()
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        _show(findings)
    return all(finding.status != "broken" for finding in findings)


def examine_machine() -> list[Finding]:
    """Returns the findings of all checks on this machine, in the order of a set-up: software, hardware, Ray."""
    environ, path = os.environ, sys.path
    num_cpus = allowed_cpus()
    installed = [
        partial(packages.check_python, sys.version_info[:3]),
        partial(packages.check_packages, path),
        # Before torch is loaded here, which may compile it.
        partial(packages.check_bytecode, _package_file("torch"), environ),
    ]
    findings = [_examine(check) for check in installed]
    torch = load_torch()
    checks = [
        partial(packages.check_torch_builds, path, torch.load_error),
        partial(machine.check_gpus, torch, driver=machine.cuda_driver(environ), environ=environ),
        partial(machine.check_threads, environ, num_cpus, torch.num_threads),
        partial(machine.check_cpu_limit, _CGROUP / "cpu.max", num_cpus),
        partial(machine.check_disk, "cache folder", _cache_folder()),
        partial(machine.check_disk, "runs folder", Path("runs")),
        partial(machine.check_shared_memory, Path("/dev/shm"), machine.memory_bytes(_CGROUP / "memory.max")),  # noqa: S108
        partial(machine.check_open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        partial(clusters.check_ray, path),
        partial(clusters.check_ray_cluster, clusters.address_file(environ)),
        partial(clusters.check_ray_address, environ),
    ]
    return findings + [_examine(check) for check in checks]


def _examine(check: "partial[Finding]") -> Finding:
    """Runs a check; one that fails is a finding too, and hides no other."""
    try:
        return check()
    except Exception as error:
        name = check.func.__name__.removeprefix("check_").replace("_", " ")
        return Finding(name, "broken", f"can't be checked: {type(error).__name__}: {error}", "mend that first")


def _package_file(name: str) -> Path | None:
    """Returns the ``__init__.py`` of a package, without importing it."""
    spec = find_spec(name)
    return Path(spec.origin) if spec and spec.origin else None


def _cache_folder() -> Path:
    return Path(os.environ.get("GRAFTSTACK_CACHE") or "~/.cache/graftstack")


def _show(findings: Sequence[Finding]) -> None:
    try:
        _show_table(findings)
    except ModuleNotFoundError:  # rich itself may be what is missing
        for finding in findings:
            fix = f"; fix: {finding.fix}" if finding.fix else ""
            sys.stdout.write(f"{finding.status}: {finding.name}: {finding.detail}{fix}\n")


def _show_table(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in ("status", "what", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        found = Text(finding.detail)
        if finding.fix:
            found.append(f"\nfix: {finding.fix}", style="bold")
        table.add_row(Text(finding.status, style=_COLOURS[finding.status]), finding.name, found)
    console = Console()
    console.print(table)
    num = {status: sum(finding.status == status for finding in findings) for status in _COLOURS}
    console.print(f"{num['broken']} broken, {num['warn']} to look at, {num['ok']} well", highlight=False)
