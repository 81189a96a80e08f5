"""A stack's progress: lines where there is no terminal, bars where there is one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

from graftstack.amounts import duration
from graftstack.report.progress import LiveDisplay, PlainDisplay, live_bars

if TYPE_CHECKING:
    from graftstack.cluster.stack import StackDisplay
    from graftstack.stacking.crossfit import Progress

# Without a terminal, tasks say where they stand at most so often, in shares of the whole.
_PLAIN_PARTS = 10


@contextmanager
def stack_display(console: Console) -> Iterator["StackDisplay"]:
    """Opens a live display on a terminal; elsewhere it prints plain lines."""
    if not console.is_terminal:
        yield _PlainStack(console, PlainDisplay(console))
        return
    with live_bars(console) as bars:
        yield _LiveStack(bars)


class _PlainStack:
    """Lines, for logs, pipes and files."""

    def __init__(self, console: Console, job: PlainDisplay | LiveDisplay) -> None:
        self._console = console
        self._job = job
        self._parts: dict[str, int] = {}

    def reading(self, done: int, total: int) -> None:
        self._job.reading(done, total)

    def training(self, progress: dict[str, Any]) -> None:
        self._job.training(progress)

    def tapping(self, done: int, total: int) -> None:
        self._say_part("taps", done, total, f"taps: {done}/{total} shards")

    def fitting(self, progress: "Progress") -> None:
        left = f", {duration(progress.seconds_left)} left" if progress.seconds_left else ""
        text = f"base models: {progress.done}/{progress.total} tasks{left}"
        self._say_part("base models", progress.done, progress.total, text)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _say_part(self, what: str, done: int, total: int, text: str) -> None:
        part = _PLAIN_PARTS * done // max(1, total)
        if part != self._parts.get(what, 0):
            self._parts[what] = part
            self.say(text)


class _LiveStack(_PlainStack):
    """Bars below the lines."""

    def __init__(self, bars: Bars) -> None:
        super().__init__(bars.console, LiveDisplay(bars))
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def tapping(self, done: int, total: int) -> None:
        self._move("taps", done, total, "shards")

    def fitting(self, progress: "Progress") -> None:
        self._move("base models", progress.done, progress.total, ", ".join(progress.running[:3]))

    def _move(self, what: str, done: int, total: int, note: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note="")
        self._bars.update(self._tasks[what], completed=done, note=note)
