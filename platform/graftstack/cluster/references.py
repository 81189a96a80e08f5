"""What becomes of calls that a Ray cluster makes."""

from collections.abc import Sequence
from typing import Any

# What Ray says of a process that its memory monitor ended, before the kernel would have had to.
_OUT_OF_MEMORY = ("OUT_OF_MEMORY", "running low on memory")


def done(references: Sequence[Any], timeout_s: float) -> list[Any]:
    """Returns those that have an answer: at least one, unless none comes in time."""
    import ray

    if not references:
        return []
    first, others = ray.wait(list(references), timeout=timeout_s)
    if first and others:
        first = first + ray.wait(others, num_returns=len(others), timeout=0)[0]
    return list(first)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a process was ended because its machine had no memory left."""
    from ray.exceptions import OutOfMemoryError

    return isinstance(error, OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
