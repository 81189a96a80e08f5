"""What the log of a job says that did not even begin, and what to do about it."""

_NO_RAY = "start ray with the bin folder of its environment first on PATH"

_HINTS = {
    "No module named 'graftstack'": "the cluster's Python has no graftstack; install it there, or add --with-code",
    "No module named 'ray'": f"the first python on the PATH of the cluster's head has no ray; {_NO_RAY}",
    "python: not found": f"the head of the cluster has no python on its PATH; {_NO_RAY}",
    "python: command not found": f"the head of the cluster has no python on its PATH; {_NO_RAY}",
}


def hints_in(log: str) -> list[str]:
    """Returns the cause and the remedy of each known fault that a log names, such as ``no ray there; install it``."""
    return [hint for sign, hint in _HINTS.items() if sign in log]
