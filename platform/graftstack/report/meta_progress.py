"""The progress of a meta-training: a line for each row of the learning curve, and on a terminal a bar."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

from graftstack.report.progress import LiveDisplay, PlainDisplay, live_bars

if TYPE_CHECKING:
    from graftstack.cluster.meta import MetaDisplay
    from graftstack.meta.training import MetaProgress, Pace

# Without a terminal, episodes say where they stand at most so often, in shares of the whole.
_PLAIN_PARTS = 10


@contextmanager
def meta_display(console: Console) -> Iterator["MetaDisplay"]:
    """Opens a live display on a terminal; elsewhere it prints plain lines."""
    if not console.is_terminal:
        yield _PlainMeta(console, PlainDisplay(console))
        return
    with live_bars(console) as bars:
        yield _LiveMeta(bars)


class _PlainMeta:
    """Lines, for logs, pipes and files."""

    def __init__(self, console: Console, job: PlainDisplay | LiveDisplay) -> None:
        self._console = console
        self._job = job
        self._num_rows = 0
        self._part = 0

    def reading(self, done: int, total: int) -> None:
        self._job.reading(done, total)

    def training(self, progress: dict[str, Any]) -> None:
        self._job.training(progress)

    def tapping(self, done: int, total: int) -> None:
        """Features that are made come quickly: no line."""

    def episodes(self, progress: "MetaProgress") -> None:
        has_news = len(progress.history) > self._num_rows
        self._say_news(progress)
        part = _PLAIN_PARTS * progress.episode // progress.num_episodes
        if part != self._part and not has_news and progress.pace is not None:
            self.say(f"episode {progress.episode}/{progress.num_episodes}  {pace_text(progress.pace)}")
        self._part = part

    def evaluating(self, done: int, total: int) -> None:
        if done == total:
            self.say(f"evaluated {done}/{total} episodes")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _say_news(self, progress: "MetaProgress") -> None:
        """Prints the rows of the learning curve that are new."""
        for row in progress.history[self._num_rows :]:
            is_of_now = row["episode"] == progress.episode
            self.say(curve_line(row, progress.num_episodes, progress.pace if is_of_now else None))
        self._num_rows = len(progress.history)


class _LiveMeta(_PlainMeta):
    """Bars below the lines."""

    def __init__(self, bars: Bars) -> None:
        super().__init__(bars.console, LiveDisplay(bars))
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def tapping(self, done: int, total: int) -> None:
        self._move("features", done, total, "shards")

    def episodes(self, progress: "MetaProgress") -> None:
        self._say_news(progress)
        note = "" if progress.pace is None else pace_text(progress.pace)
        self._move("training", progress.episode, progress.num_episodes, note)

    def evaluating(self, done: int, total: int) -> None:
        self._move("evaluating", done, total, "episodes")

    def _move(self, what: str, done: int, total: int, note: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note="")
        self._bars.update(self._tasks[what], completed=done, total=total, note=note)


def curve_line(row: Mapping[str, Any], num_episodes: int, pace: "Pace | None") -> str:
    """Returns a row of the learning curve as one line; `pace`: of the training before it, where that is known."""
    said = [f"episode {row['episode']}/{num_episodes}"]
    if row["train_loss"] is not None:
        said.append(f"train loss {row['train_loss']:.4f}  train accuracy {row['train_accuracy']:.4f}")
    if "accuracy" in row:
        said.append(f"validation accuracy {row['accuracy']:.4f} ± {row['ci95']:.4f}")
    if pace is not None:
        said.append(_speed(pace))
    return "  ".join(said)


def pace_text(pace: "Pace") -> str:
    """Returns how training goes as a few words."""
    return f"loss {pace.loss:.4f}  accuracy {pace.accuracy:.4f}  {_speed(pace)}"


def _speed(pace: "Pace") -> str:
    return f"{pace.episodes_per_s:.1f} episodes/s"
