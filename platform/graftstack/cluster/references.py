"""What becomes of calls that a Ray cluster makes."""

from collections.abc import Sequence
from typing import Any

from graftstack.errors import TrainingError
from graftstack.reason import reason

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


def result_of(reference: Any) -> Any:
    """Returns what a call returned; raises what it raised, or a `RayError` if its process is gone."""
    import ray
    from ray.exceptions import RayError, RayTaskError, UnserializableException

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if type(error.cause) is RayError:  # stands for what can't be pickled
            raise _unsendable(error) from error
        raise error.cause from error
    except UnserializableException as error:
        raise _unsendable(error) from error


def why_lost(error: Exception, *, memory_remedy: str) -> str:
    """Returns in one line what ended a call, or the process that made it."""
    from ray.exceptions import ActorUnavailableError, RayError

    if not isinstance(error, RayError):
        return reason(error)
    if isinstance(error, ActorUnavailableError):
        return "its process or node is out of reach"
    if is_out_of_memory(error):
        return f"its machine ran out of memory; {memory_remedy}"
    return f"its process ended without a word; if that was for want of memory, {memory_remedy}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether a process was ended because its machine had no memory left."""
    from ray.exceptions import OutOfMemoryError

    return isinstance(error, OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def last_line(error: Exception) -> str:
    """Returns what an error says at last, where its message holds the traceback of another process."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _unsendable(error: Exception) -> TrainingError:
    return TrainingError(f"a worker of Ray raised what can't be sent from there ({last_line(error)})")
