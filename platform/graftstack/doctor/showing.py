"""Findings as a table, or as lines where there is nothing to draw one with."""

import sys
from collections.abc import Sequence

from graftstack.doctor.finding import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "broken": "bold red"}


def show(findings: Sequence[Finding]) -> None:
    """Prints all findings, and how many are of which kind."""
    try:
        _show_table(findings)
    except ModuleNotFoundError:  # rich itself may be what is missing
        for finding in findings:
            fix = f"; fix: {finding.fix}" if finding.fix else ""
            sys.stdout.write(f"{finding.status}: {finding.name}: {finding.detail}{fix}\n")


def say(line: str) -> None:
    """Prints what the doctor waits for, where it keeps nobody from reading the findings."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


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
