"""Consoles that print text as it is: names and paths may hold what rich reads as markup."""

from rich.console import Console


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Returns a console on stdout or stderr."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False)
