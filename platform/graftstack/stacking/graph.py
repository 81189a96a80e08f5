"""The tasks of a stack: which there are, what they wait for, and which goes first."""

from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple


class Task(NamedTuple):
    """A fit of one base."""

    level: int
    base: int
    """Position in its level."""
    fold: int | None
    """Position among the level's folds; None: the refit on all rows."""


class BaseShape(NamedTuple):
    """What the graph has to know of a base."""

    folds: tuple[int, ...]
    """Rows that each fold trains on."""
    refit: int | None
    """Rows that the refit trains on; None: there is no refit."""
    num_threads: int = 1


class Graph:
    """Every fold and every refit of every base is a task; folds of a level wait for the folds of the level below.

    Nothing else waits: not a refit for its folds, nor a level for the refits below it.

    What goes first is what other levels wait for, and then what takes longest (Graham 1969: so the last task to end is
    a short one). A base takes as long for each row as its tasks have taken; one that is unknown sends one task ahead
    of all others, and counts for what that has taken so far, twice, until it ends.
    """

    def __init__(self, levels: Sequence[Sequence[BaseShape]], *, base_by_base: bool) -> None:
        """Makes the graph, of which the first level is open.

        Args:
            levels: The bases of each level.
            base_by_base: Bases end one after another in their order, so that many are whole when time is up.
        """
        self._shapes = [list(level) for level in levels]
        self._base_by_base = base_by_base
        self._queues: dict[tuple[int, int, bool], list[Task]] = {}
        """What waits, for each base and whether it is the refit; the largest first."""
        self._waiting_rows: Counter[tuple[int, int]] = Counter()
        """Training rows of what waits, of each base."""
        self._running: dict[Task, float] = {}
        self._done: set[Task] = set()
        self._dropped: set[tuple[int, int]] = set()
        self._rates: dict[tuple[int, int], float] = {}
        """Seconds for each training row, of the tasks of each base that are done, in the mean."""
        self._num_rates: dict[tuple[int, int], int] = {}
        self.num_open = 1
        """Levels whose tasks may run."""
        for level, shapes in enumerate(self._shapes):
            for base in range(len(shapes)):
                for task in self._tasks_of(level, base):
                    self._let_wait(task)

    def bases(self, level: int) -> list[int]:
        """Returns the positions of a level's bases that weren't dropped."""
        return [base for base in range(len(self._shapes[level])) if (level, base) not in self._dropped]

    def tasks(self, level: int) -> list[Task]:
        """Returns the tasks of these bases."""
        return [task for base in self.bases(level) for task in self._tasks_of(level, base)]

    @property
    def num_tasks(self) -> int:
        """How many tasks there are in all, without those of dropped bases."""
        return sum(map(len, self._queues.values())) + len(self._running) + len(self._done)

    @property
    def num_done(self) -> int:
        """How many tasks are done."""
        return len(self._done)

    def is_predicted(self, level: int) -> bool:
        """Whether all folds of a level's bases are done: the level above may open."""
        return all(task in self._done for task in self.tasks(level) if task.fold is not None)

    def is_whole(self, level: int, base: int) -> bool:
        """Whether all tasks of a base are done."""
        return (level, base) not in self._dropped and self._done.issuperset(self._tasks_of(level, base))

    def next(self, room: int, num_slots: int, now: float) -> Task | None:
        """Returns the task to start now; None if none that waits fits into `room` slots of `num_slots`."""
        heads = [
            queue[0]
            for (level, *_), queue in self._queues.items()
            if queue and level < self.num_open and self.slots(queue[0], num_slots) <= room
        ]
        return min(heads, key=lambda task: self._rank(task, now), default=None)

    def slots(self, task: Task, num_slots: int) -> int:
        """Returns how many slots a task takes where there are `num_slots`."""
        return max(1, min(self._shapes[task.level][task.base].num_threads, num_slots))

    def start(self, task: Task, now: float) -> None:
        """Says that a task runs."""
        self._forget(task)
        self._running[task] = now

    def finish(self, task: Task, seconds: float) -> None:
        """Says that a task is done, and how long its fit and prediction took; it need not have run here."""
        self._forget(task)
        self._done.add(task)
        base, rate = task[:2], seconds / max(self._rows(task), 1)
        num = self._num_rates.get(base, 0)
        self._rates[base] = (self._rates.get(base, 0.0) * num + rate) / (num + 1)
        self._num_rates[base] = num + 1

    def put_back(self, task: Task) -> None:
        """Says that a task has ended without a result and is to run again."""
        del self._running[task]
        self._let_wait(task)

    def drop(self, level: int, base: int) -> None:
        """Takes a base and all its tasks out."""
        self._dropped.add((level, base))
        for task in self._tasks_of(level, base):
            self._forget(task)

    def close_above(self, level: int) -> None:
        """Closes all levels above one, and lets what ran there wait again."""
        self.num_open = min(self.num_open, level + 1)
        for above in range(level + 1, len(self._shapes)):
            for task in self.tasks(above):
                self._forget(task)
                self._let_wait(task)

    def waiting_s(self) -> float | None:
        """Returns how long all that waits would take in one slot; None if no task has ended.

        What is unknown takes as long as what is known on average.
        """
        if not self._rates:
            return None
        usual = fmean(self._rates.values())
        return sum(self._rates.get(base, usual) * rows for base, rows in self._waiting_rows.items())

    def left_s(self, now: float) -> float | None:
        """Returns how long all that waits or runs still takes in one slot; None while a base is unknown."""
        bases = {base for base, rows in self._waiting_rows.items() if rows} | {task[:2] for task in self._running}
        if bases - self._rates.keys():
            return None
        running = (
            max(0.0, self._rates[task[:2]] * self._rows(task) - (now - began)) for task, began in self._running.items()
        )
        return (self.waiting_s() or 0.0) + sum(running)

    def _rank(self, task: Task, now: float) -> tuple[float, ...]:
        """Returns what is lowest for the task that goes first."""
        if self._base_by_base:
            return (task.level, task.base, -self._rows(task))
        expected = self._expected_s(task, now)
        levels_that_wait = 0 if task.fold is None else len(self._shapes) - 1 - task.level
        return (-levels_that_wait, expected is not None, -(expected or 0.0), task.level, task.base)

    def _expected_s(self, task: Task, now: float) -> float | None:
        """Returns how long a task takes; None if nothing is known of its base."""
        if (rate := self._rates.get(task[:2])) is not None:
            return rate * self._rows(task)
        of_base = [(other, began) for other, began in self._running.items() if other[:2] == task[:2]]
        rates = [(now - began) / max(self._rows(other), 1) for other, began in of_base]
        return 2 * max(rates) * self._rows(task) if rates else None

    def _let_wait(self, task: Task) -> None:
        queue = self._queues.setdefault(_queue_of(task), [])
        insort(queue, task, key=lambda other: (-self._rows(other), other.fold or 0))
        self._waiting_rows[task[:2]] += self._rows(task)

    def _forget(self, task: Task) -> None:
        queue = self._queues[_queue_of(task)]
        if task in queue:
            queue.remove(task)
            self._waiting_rows[task[:2]] -= self._rows(task)
        self._running.pop(task, None)
        self._done.discard(task)

    def _rows(self, task: Task) -> int:
        shape = self._shapes[task.level][task.base]
        return (shape.refit or 0) if task.fold is None else shape.folds[task.fold]

    def _tasks_of(self, level: int, base: int) -> Iterator[Task]:
        shape = self._shapes[level][base]
        for fold in range(len(shape.folds)):
            yield Task(level, base, fold)
        if shape.refit is not None:
            yield Task(level, base, None)


def _queue_of(task: Task) -> tuple[int, int, bool]:
    return (task.level, task.base, task.fold is None)
