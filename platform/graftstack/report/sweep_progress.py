"""A sweep's progress: a line for each trial that is over, and on a terminal a bar that shows the rest to come."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

from graftstack.report.progress import LiveDisplay, PlainDisplay, live_bars
from graftstack.report.sweep_tables import plan_tables
from graftstack.sweep.trials import TrialResult

if TYPE_CHECKING:
    from graftstack.cluster.sweep import SweepDisplay
    from graftstack.sweep.drive import Progress
    from graftstack.sweep.plan import SweepPlan
    from graftstack.sweep.probe import ProbeScore

# Without a terminal, taps say where they stand at most so often, in shares of the whole.
_PLAIN_PARTS = 4


@contextmanager
def sweep_display(console: Console, *, shows_plan: bool = True) -> Iterator["SweepDisplay"]:
    """Opens a live display on a terminal; elsewhere it prints plain lines."""
    if not console.is_terminal:
        yield _PlainSweep(console, PlainDisplay(console), shows_plan=shows_plan)
        return
    with live_bars(console) as bars:
        yield _LiveSweep(bars, shows_plan=shows_plan)


class _PlainSweep:
    """Lines, for logs, pipes and files."""

    def __init__(self, console: Console, job: PlainDisplay | LiveDisplay, *, shows_plan: bool) -> None:
        self._console = console
        self._job = job
        self._shows_plan = shows_plan
        self._told: dict[int, TrialResult] | None = None
        self._part = 0

    def reading(self, done: int, total: int) -> None:
        self._job.reading(done, total)

    def training(self, progress: dict[str, Any]) -> None:
        self._job.training(progress)

    def planned(self, plan: "SweepPlan") -> None:
        if self._shows_plan:
            for shown in plan_tables(plan):
                self._console.print(shown, "")

    def probed(self, scores: "Sequence[ProbeScore]") -> None:
        for score in scores:
            self.say(
                f"probe: {score.backbone}, {score.depth} groups frozen: ridge {score.ridge:.3f}, k-NN {score.knn:.3f}"
            )

    def tapping(self, done: int, total: int) -> None:
        part = _PLAIN_PARTS * done // total
        if part != self._part:
            self._part = part
            self.say(f"taps: {done}/{total} shards")

    def trials(self, progress: "Progress", total: int) -> None:
        if self._told is None:  # those of an earlier start
            new = {result.index for result in getattr(progress.event, "results", ())}
            self._told = {index: result for index, result in progress.results.items() if index not in new}
            if self._told:
                self.say(f"{len(self._told)} of {total} trials are over already")
        for index in sorted(progress.results):
            if progress.results[index] is not self._told.get(index):  # new, or promoted and over again
                self.say(trial_line(progress.results[index], total))
        self._told = dict(progress.results)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


class _LiveSweep(_PlainSweep):
    """Bars below the lines."""

    def __init__(self, bars: Bars, *, shows_plan: bool) -> None:
        super().__init__(bars.console, LiveDisplay(bars), shows_plan=shows_plan)
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def tapping(self, done: int, total: int) -> None:
        self._move("taps", done, total, "shards")

    def trials(self, progress: "Progress", total: int) -> None:
        super().trials(progress, total)
        running = sum(len(unit.trials) for unit in progress.running)
        self._move("trials", len(progress.results), total, f"{running} running" if running else "")

    def _move(self, what: str, done: int, total: int, note: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note="")
        self._bars.update(self._tasks[what], completed=done, note=note)


def trial_line(result: TrialResult, total: int) -> str:
    """Returns a trial that is over as one line."""
    params = " ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in result.params.items()
    )
    if result.error:
        return f"trial {result.index + 1}/{total}  {params}  {result.status}: {result.error}"
    stopped = ", stopped" if result.status == "stopped" else ""
    return (
        f"trial {result.index + 1}/{total}  {params}  accuracy {result.metrics['accuracy']:.4f}  "
        f"({result.epochs} epochs{stopped}, {result.seconds:.1f} s)"
    )
