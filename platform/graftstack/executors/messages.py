"""How a call travels to another process, and its end back.

Both are pickled here, as bytes, rather than by what carries them: so whatever can't be pickled, or not be read on the
other side, is the failure of one call with a message that says so, on every executor alike.
"""

import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from graftstack.executors.threads import limit_threads, limit_threads_of_libraries_to_come
from graftstack.reason import reason
from graftstack.runtime import Call, CallDone, CallFailed


class Packed(NamedTuple):
    """A call on its way."""

    payload: bytes
    handles: list[Any]
    """Of its arguments, those that stand for shared values."""


@dataclass(frozen=True)
class _Place:
    """Stands in a payload for the shared value of this number."""

    number: int


def pack(call: Call, is_handle: Callable[[Any], bool]) -> Packed | CallFailed:
    """Returns `call` ready to travel, or its end if it can't."""
    import cloudpickle

    handles: list[Any] = []
    args: list[Any] = []
    for arg in call.args:
        if is_handle(arg):
            args.append(_Place(len(handles)))
            handles.append(arg)
        else:
            args.append(arg)
    try:
        return Packed(cloudpickle.dumps((call.function, args)), handles)
    except Exception as error:  # whatever the pickling of a user's object raises
        message = (
            f"the call can't be sent to a worker ({reason(error)}); use classes and functions at the top level "
            "of a module, without open files, locks or generators, or an executor in this process"
        )
        failure = TypeError(message)
        failure.__cause__ = error
        return CallFailed(call.key, failure)


def perform(payload: bytes, read_held: Callable[[], Sequence[Any]], num_threads: int) -> bytes:
    """Makes a packed call, in a worker, with the shared values that its handles stand for; returns how it ended.

    Whatever an `Exception` is comes back in the reply; others, like SystemExit, end the worker.
    """
    limit_threads_of_libraries_to_come(num_threads)
    try:
        function, args = _loads(payload)
        held = read_held()
    except Exception as error:  # whatever the module of a user's object raises
        return _failure(
            TypeError(
                f"a worker can't read the call or what is shared ({reason(error)}); install the same packages there"
            )
        )
    values = [held[arg.number] if isinstance(arg, _Place) else arg for arg in args]
    try:
        with limit_threads(num_threads):
            value = function(*values)
    except Exception as error:  # the caller judges it
        return _failure(error)
    try:
        return _dumps((value, None))
    except Exception as error:  # whatever the pickling of a user's object raises
        return _failure(TypeError(f"what it returned can't be sent back from a worker ({reason(error)})"))


def unpack(key: str, reply: bytes) -> CallDone | CallFailed:
    """Returns what `perform` tells."""
    try:
        value, error = _loads(reply)
    except Exception as unreadable:
        failure = TypeError(f"what it returned can't be read outside of its worker ({reason(unreadable)})")
        failure.__cause__ = unreadable
        return CallFailed(key, failure)
    return CallDone(key, value) if error is None else CallFailed(key, error)


def _failure(error: Exception) -> bytes:
    """Returns a reply with `error`, or with its text if it doesn't survive the way."""
    where = f"In the worker:\n{traceback.format_exc().rstrip()}"
    error.add_note(where)
    with suppress(Exception):  # errors that don't pickle raise errors of all kinds
        reply = _dumps((None, error))
        if type(_loads(reply)[1]) is type(error):
            return reply
    text = RuntimeError(f"{type(error).__name__}: {error}")
    text.add_note(where)
    return _dumps((None, text))


def _dumps(value: Any) -> bytes:
    import cloudpickle

    dumped: bytes = cloudpickle.dumps(value)
    return dumped


def _loads(dumped: bytes) -> Any:
    import cloudpickle

    return cloudpickle.loads(dumped)
