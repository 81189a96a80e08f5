"""What a sweep is made of: trials, the units in which they train, and what is told of them while they do."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from graftstack.config.schema import FinetuneConfig
from graftstack.taps.key import TapSpec

Row = Mapping[str, float]
"""The metrics of one epoch: `epoch`, `train_loss`, `loss`, `accuracy`, `macro_f1`, `ece`."""

Status = Literal["done", "stopped", "failed", "pruned"]
"""done: trained to its end; stopped: early, by the scheduler or the time limit; failed: see `error`; pruned: not begun,
by a probe."""


@dataclass(frozen=True)
class Trial:
    """One point of the search space, as a fine-tuning of its own."""

    index: int
    """Its place in the order of the search; with the sweep's seed, all that its random streams depend on."""
    params: dict[str, Any]
    """Its values of the keys in the space, by the names that the user gave."""
    config: FinetuneConfig

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.index:05d}"

    @property
    def facts(self) -> dict[str, Any]:
        """What every row says of its trial, whether or not it is in the space."""
        return {"freeze_depth": self.config.freeze_depth, "lr": self.config.optimizer.lr}


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """The row of a trial that is over; it is kept as JSON."""

    index: int
    params: dict[str, Any]
    status: Status
    metrics: dict[str, float] = field(default_factory=dict)
    """Validation metrics of the selected epoch."""
    history: tuple[dict[str, float], ...] = ()
    """One row for each epoch."""
    epochs: int = 0
    seconds: float = 0.0
    """Its share of the time that its unit took."""
    backbone_forwards: int = 0
    """Images that went through the frozen part, counted."""
    details: dict[str, Any] = field(default_factory=dict)
    """`Trial.facts`, and what else is worth knowing."""
    error: str | None = None


def best_first(results: Iterable[TrialResult]) -> list[TrialResult]:
    """Returns the trials that ended with a model: by accuracy, of equal ones by loss, and then in their order."""
    ended = [result for result in results if result.status in ("done", "stopped") and result.metrics]
    return sorted(ended, key=lambda result: (-result.metrics["accuracy"], result.metrics["loss"], result.index))


class Unit(NamedTuple):
    """Trials that train together in one process: one, or several heads fused on one tap."""

    trials: tuple[Trial, ...]
    tap: TapSpec | None
    """What they read; None: they begin with the images."""

    @property
    def name(self) -> str:
        """Distinct for each unit of a sweep."""
        return "-".join(dict.fromkeys((self.trials[0].name, self.trials[-1].name)))


class EpochEnd(NamedTuple):
    """A unit waits after an epoch to be told which of its trials go on."""

    unit: Unit
    rows: dict[int, dict[str, float]]
    """Of the trials that are still training, by their index."""


class UnitEnd(NamedTuple):
    """All trials of a unit are over, and their results are on disk."""

    unit: Unit
    results: tuple[TrialResult, ...]


class UnitLost(NamedTuple):
    """The process that trained a unit is gone; what was finished of it is on disk."""

    unit: Unit
    reason: str


Event = EpochEnd | UnitEnd | UnitLost


class Runner(Protocol):
    """Trains one unit at a time, epoch by epoch, in the process it lives in."""

    def start(self, unit: Unit) -> EpochEnd | UnitEnd:
        """Begins a unit, or continues it from its checkpoint, up to the end of an epoch."""
        ...

    def go_on(self, keep: Sequence[int]) -> EpochEnd | UnitEnd:
        """Trains another epoch of the trials whose index is in `keep`; the others are over, with what they have."""
        ...


class Pool(Protocol):
    """Slots in which units train side by side; each holds a `Runner` that stays warm between units."""

    @property
    def num_free(self) -> int:
        """How many units can be started now; where none runs at least one, though it may have to wait for its slot."""
        ...

    def start(self, unit: Unit) -> None:
        """Begins a unit in a free slot."""
        ...

    def wait(self, timeout_s: float) -> list[Event]:
        """Returns what has happened since, after at most `timeout_s`; empty if nothing has."""
        ...

    def go_on(self, unit: Unit, keep: Sequence[int]) -> None:
        """Answers an `EpochEnd` of `unit`."""
        ...

    def close(self) -> None:
        """Ends everything that runs and leaves nothing behind; may be called twice."""
        ...


class Scheduler(Protocol):
    """Decides after each epoch which trials are worth more of them."""

    def keep(self, rows: Mapping[int, Row], *, is_fused: bool) -> list[int]:
        """Returns those of the trials (index -> metrics of the epoch that has just ended) that go on; others stop.

        `is_fused` says that they began as trials that train fused, however many of them are left.
        """
        ...

    def promote(self, stopped: Collection[int], *, is_last_chance: bool) -> int | None:
        """Returns one of the stopped trials that is to train on after all, from where it stopped, or None.

        Asked whenever there is room and no unit waits; `is_last_chance` says that nothing else trains or can begin.
        """
        ...


class Search(Protocol):
    """Says which trial comes next."""

    def next(self) -> Trial | None:
        """Returns a new trial, or None: there is none, or none until more results are told."""
        ...

    def tell(self, result: TrialResult) -> None:
        """Learns from a trial that is over; also from those of an earlier start, before the first `next`."""
        ...

    @property
    def is_exhausted(self) -> bool:
        """Whether there will never be another trial."""
        ...
