"""What the trials of one freeze depth will take, from what was measured of them."""

from typing import NamedTuple

from graftstack.finetune.task import Task
from graftstack.sweep.measure import Suffix
from graftstack.sweep.plan import DepthPlan
from graftstack.sweep.trials import Trial
from graftstack.taps.costs import Boundary, Choice, Demand, Rates, compute_s, read_s

# What else an epoch costs: metrics and the row; and a trial: its model, its weights and its row on disk.
_EPOCH_S, _TRIAL_S, _FUSED_TRIAL_S = 0.005, 0.03, 0.004


class DepthCost(NamedTuple):
    """What was found out of the trials of one depth."""

    trials: list[Trial]
    units: list[tuple[Trial, ...]]
    """Those that would train together on a tap."""
    task: Task
    """Of the first trial."""
    alone: Suffix
    """Of one trial."""
    together: Suffix
    """Of `num_measured` fused ones."""
    num_measured: int
    demand: Demand
    why_not_fused: str | None

    @property
    def alone_s(self) -> float:
        """Seconds that the parts that train take, one trial after another."""
        return sum(self._suffix_s(self.alone, trial) for trial in self.trials)

    @property
    def together_s(self) -> float:
        """The same, one unit after another."""
        return sum(self._suffix_s(self._of(unit), unit[0]) + (len(unit) - 1) * _FUSED_TRIAL_S for unit in self.units)

    def _of(self, unit: tuple[Trial, ...]) -> Suffix:
        if len(unit) == 1:
            return self.alone
        return self.together.scaled(max(1.0, len(unit) / self.num_measured))

    def _suffix_s(self, suffix: Suffix, trial: Trial) -> float:
        epochs, num_val = trial.config.epochs, len(self.task.data.splits.val)
        steps_s = epochs * self.task.steps_per_epoch * suffix.step_s
        return steps_s + max(1, epochs) * (num_val * suffix.val_s + _EPOCH_S) + _TRIAL_S


def depth_demand(
    boundary: int, trials: list[Trial], units: list[tuple[Trial, ...]], task: Task, obstacle: str | None
) -> Demand:
    """Returns how often the trials of a depth need items, all for themselves or once a unit."""
    rows_per_epoch = task.steps_per_epoch * task.config.batch_size * task.config.accumulate
    num_val = len(task.data.splits.val)
    shared = [unit[0].config.epochs for unit in units]
    own = [trial.config.epochs for trial in trials]
    return Demand(
        boundary,
        train_uses=sum(shared) * rows_per_epoch,
        val_uses=sum(max(1, epochs) for epochs in shared) * num_val,
        uncached_train_uses=sum(own) * rows_per_epoch,
        uncached_val_uses=sum(max(1, epochs) for epochs in own) * num_val,
        obstacle=obstacle,
    )


def depth_plan(
    label: str, depth: int, cost: DepthCost, *, choice: Choice, boundary: Boundary | None, rates: Rates
) -> DepthPlan:
    """Returns the numbers of a depth.

    Args:
        label: Of its trunk.
        depth: How many groups its trials freeze.
        cost: What was found out of them.
        choice: What is done for them.
        boundary: Where they begin; None: with the images.
        rates: Of this machine.
    """
    demand = cost.demand
    # A validation that begins with images was measured with their decoding, a step wasn't.
    before_s = demand.uncached_train_uses * rates.decode_s if boundary is None else compute_s(boundary, demand, rates)
    uncached_s = cost.alone_s + before_s
    is_read = boundary is not None and reads_tap(choice)
    return DepthPlan(
        trunk=label,
        freeze_depth=depth,
        boundary=demand.boundary,
        num_trials=len(cost.trials),
        num_units=len(cost.units) if is_read else len(cost.trials),
        action=choice.action,
        reason=choice.reason,
        tap_bytes=choice.bytes,
        seconds=cost.together_s + read_s(boundary, demand, rates) if boundary is not None and is_read else uncached_s,
        uncached_s=uncached_s,
        why_not_fused=cost.why_not_fused,
    )


def reads_tap(choice: Choice) -> bool:
    """Returns whether trials begin with a tap."""
    return choice.action in ("tap", "stored")
