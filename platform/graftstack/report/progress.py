"""Live progress on a terminal; one line an epoch where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from graftstack.cluster.finetune import Display

# Without a terminal the first decoding says where it stands at most this often, in images.
_PLAIN_EVERY_IMAGES = 20_000


@contextmanager
def job_display(console: Console) -> Iterator[Display]:
    """Opens a live display on a terminal; elsewhere it prints plain lines."""
    if not console.is_terminal:
        yield PlainDisplay(console)
        return
    with live_bars(console) as bars:
        yield LiveDisplay(bars)


@contextmanager
def live_bars(console: Console) -> Iterator[Progress]:
    """Shows bars below the lines that are printed meanwhile; each task has a `note`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        yield bars


class PlainDisplay:
    """One line an epoch: for logs, pipes and files."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._num_rows = 0
        self._said = 0

    def reading(self, done: int, total: int) -> None:
        """Says where decoding stands, now and then."""
        if done == total or done - self._said >= _PLAIN_EVERY_IMAGES:
            self._said = done
            self._console.print(f"decoded {done}/{total} images", highlight=False)

    def training(self, progress: dict[str, Any]) -> None:
        """Says each new epoch once."""
        for row in progress["history"][self._num_rows :]:
            self._console.print(epoch_line(row, progress["num_epochs"]), highlight=False, soft_wrap=True)
        self._num_rows = len(progress["history"])

    def say(self, text: str) -> None:
        """Says a line."""
        self._console.print(text, highlight=False, soft_wrap=True)


class LiveDisplay:
    """Bars for decoding and training, with a line above them for each finished epoch."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._plain = PlainDisplay(bars.console)
        self._reading: TaskID | None = None
        self._training: TaskID | None = None

    def reading(self, done: int, total: int) -> None:
        """Moves the bar of the images."""
        if self._reading is None:
            self._reading = self._bars.add_task("decoding", total=total, note="images")
        self._bars.update(self._reading, completed=done)

    def training(self, progress: dict[str, Any]) -> None:
        """Moves the bar of the steps and prints new epochs."""
        if self._training is None:
            self._training = self._bars.add_task("training", total=progress["num_steps"], note="")
        note = f"epoch {progress['epoch']}/{progress['num_epochs']}  loss {progress['loss']:.3f}"
        if progress["images_per_s"] is not None:
            note += f"  {progress['images_per_s']:.0f} images/s"
        self._bars.update(self._training, completed=progress["step"], note=note)
        self._plain.training(progress)

    def say(self, text: str) -> None:
        """Says a line, above the bars."""
        self._plain.say(text)


def epoch_line(row: dict[str, float], num_epochs: int) -> str:
    """Returns an epoch's metrics as one line."""
    return (
        f"epoch {row['epoch']}/{num_epochs}  train loss {row['train_loss']:.4f}  val loss {row['loss']:.4f}  "
        f"accuracy {row['accuracy']:.4f}  macro F1 {row['macro_f1']:.4f}  ECE {row['ece']:.4f}"
    )
