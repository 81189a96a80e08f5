"""How a sweep will run: which taps are made, which trials share them and train together, and what it will take."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from graftstack.config.plain import to_plain
from graftstack.config.schema import Augment, FinetuneConfig
from graftstack.config.space import full_key
from graftstack.config.sweep import Reuse, SweepConfig
from graftstack.finetune.tapping import tap_items, tap_spec
from graftstack.finetune.task import Task, Workbench
from graftstack.sweep.fused import fusing_key, obstacle_to_fusing
from graftstack.sweep.measure import Forward, Suffix, measure_forward, measure_suffix
from graftstack.sweep.trials import Trial, Unit
from graftstack.taps.costs import Boundary, Choice, Demand, Rates, choose, making_s
from graftstack.taps.key import TapSpec
from graftstack.taps.store import TapStore

# Fused trials are split into units no larger than this, whose validation logits take no more than so many bytes.
_MOST_FUSED, _MOST_LOGIT_BYTES = 256, 2**29
# More members than this tell nothing new of what a fused step costs.
_MOST_MEASURED = 32

# What else an epoch costs: metrics and the row; and a trial: its head, its weights on disk.
_EPOCH_S, _TRIAL_S = 0.02, 0.03


@dataclass(frozen=True, kw_only=True)
class DepthPlan:
    """The trials of one backbone that freeze equally many groups."""

    family: str
    """What of the space decides over backbone and data, e.g. the backbone's name."""
    freeze_depth: int
    num_trials: int
    num_units: int
    """Trials that train together are one unit."""
    action: str
    """tap (made and read), stored (there already, and read), recompute (the frozen part, each time), images."""
    reason: str
    tap_bytes: int
    seconds: float
    """Of all its trials, one after another, with what this process has of the machine."""
    uncached_s: float
    """The same without any sharing."""
    why_not_fused: str | None
    """Of trials of which only the head trains, if they train one by one all the same."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A validated sweep in numbers."""

    num_trials: int
    num_images: int
    """Distinct samples, cached views included, that the frozen parts have to see once."""
    depths: tuple[DepthPlan, ...]
    tap_bytes: int
    """To be written."""
    pass_s: float
    """Making the taps."""
    trials_s: float
    """All trials, one after another."""
    uncached_s: float
    """The whole sweep without any sharing, one trial after another."""
    rates: dict[str, float]
    """What was measured: decode_s, read_s_per_byte, write_s_per_byte."""
    start_s: float = 0.0
    """Starting processes, where trials run in some of their own."""

    @property
    def predicted_s(self) -> float:
        """Seconds of the whole sweep on as many CPUs and GPUs as this process has."""
        return self.start_s + self.pass_s + self.trials_s


class Pass(NamedTuple):
    """Taps that one pass over the data makes."""

    trial: Trial
    """One of those that read them: it says which data and which backbone."""
    label: str
    """What tells it from other passes of the sweep."""
    specs: dict[int, TapSpec]
    """Boundary -> the tap there."""


@dataclass
class _Family:
    """Trials whose frozen parts see the same samples through the same backbone."""

    trial: Trial
    label: str = ""
    """What of the space tells it from the others."""
    trials: dict[int, list[Trial]] = field(default_factory=lambda: defaultdict(list))
    """Freeze depth -> those that freeze so many groups."""
    specs: dict[int, TapSpec] = field(default_factory=dict)
    """Boundary -> its tap."""
    num_items: int = 0
    choices: dict[int, Choice] = field(default_factory=dict)
    """Freeze depth -> what is done for it."""
    boundary_of: dict[int, int] = field(default_factory=dict)
    forward: Forward | None = None


class _Traits(NamedTuple):
    """What decides whether and with which others a trial's head can be fused."""

    obstacle: str | None
    fusing_key: tuple[Any, ...]


class Planner:
    """Decides for each family of trials and each freeze depth, and puts trials into units accordingly."""

    def __init__(self, config: SweepConfig, store: TapStore, *, workbench: Workbench, device: torch.device) -> None:
        self._config = config
        self._store = store
        self._workbench = workbench
        self._device = device
        self._families: dict[str, _Family] = {}
        self._group_counts: dict[str, int] = {}
        self._traits_of: dict[tuple[Any, ...], _Traits] = {}
        self._uses_taps = config.reuse is Reuse.auto

    def plan(self, trials: Sequence[Trial]) -> SweepPlan:
        """Measures what each depth costs and decides. Trains nothing, and writes to the image cache alone.

        Raises:
            ConfigError, DataError, WeightsError: a trial that can't be trained.
        """
        for trial in trials:
            self._family(trial).trials[self._depth(trial)].append(trial)
        for label, family in zip(self._labels(), self._families.values(), strict=True):
            family.label = label
        left = self._config.taps.budget_bytes
        depths, passes_s, made_bytes, rates = [], 0.0, 0, None
        for family in self._families.values():
            rows, made = self._plan_family(family, budget_bytes=left)
            assert family.forward is not None
            depths += rows
            rates = rates or family.forward.rates
            passes_s += making_s(made, family.forward.rates, num_items=family.num_items)
            made_bytes += sum(tap.item_bytes for tap in made) * family.num_items
            left = self._config.taps.budget_bytes - made_bytes
        return SweepPlan(
            num_trials=len(trials),
            num_images=sum({self._samples_of(family): family.num_items for family in self._families.values()}.values()),
            depths=tuple(depths),
            tap_bytes=made_bytes,
            pass_s=passes_s,
            trials_s=sum(row.seconds for row in depths),
            uncached_s=sum(row.uncached_s for row in depths),
            rates=vars(rates) if rates else {},
        )

    def passes(self) -> list[Pass]:
        """Returns the taps to be made, those of a pass together."""
        found = []
        for family in self._families.values():
            made = [family.boundary_of[depth] for depth, choice in family.choices.items() if choice.action == "tap"]
            if made:
                found.append(
                    Pass(
                        family.trial, family.label, {boundary: family.specs[boundary] for boundary in sorted(set(made))}
                    )
                )
        return found

    def tapped(self) -> list[Pass]:
        """Returns all taps that trials read, those stored before among them."""
        found = []
        for family in self._families.values():
            read = {family.boundary_of[depth] for depth, choice in family.choices.items() if _reads(choice)}
            if read:
                found.append(
                    Pass(family.trial, family.label, {boundary: family.specs[boundary] for boundary in sorted(read)})
                )
        return found

    def give_up(self, specs: Iterable[TapSpec], reason: str) -> None:
        """Recomputes the frozen part of the trials that were to read these taps."""
        digests = {spec.key.digest for spec in specs}
        for family in self._families.values():
            for depth, choice in family.choices.items():
                if _reads(choice) and family.specs[family.boundary_of[depth]].key.digest in digests:
                    family.choices[depth] = choice._replace(action="recompute", reason=reason, bytes=0)

    def make_units(self, trials: Sequence[Trial]) -> list[Unit]:
        """Returns the units in which `trials` train, those that take longest first."""
        groups: dict[tuple[Any, ...], list[Trial]] = defaultdict(list)
        for trial in trials:
            groups[self._group(trial)].append(trial)
        units = []
        for members in groups.values():
            size = self._most_fused(members[0]) if len(members) > 1 else 1
            tap = self._tap(members[0])
            units += [Unit(tuple(members[at : at + size]), tap) for at in range(0, len(members), size)]
        return sorted(units, key=self._weight, reverse=True)

    def probed_as(self, trial: Trial) -> tuple[str, int]:
        """Returns what a probe calls the features that a trial freezes: its family's label, and the boundary."""
        family = self._family(trial)
        return family.label, family.boundary_of[self._depth(trial)]

    def probe_places(self) -> list[tuple[Trial, str, list[int]]]:
        """Returns a trial, the label and the boundaries of each family."""
        return [
            (family.trial, family.label, sorted(set(family.boundary_of.values()) - {0}))
            for family in self._families.values()
        ]

    def _tap(self, trial: Trial) -> TapSpec | None:
        """Returns the tap that a trial reads, or None."""
        family, depth = self._family(trial), self._depth(trial)
        choice = family.choices.get(depth)
        return family.specs[family.boundary_of[depth]] if choice is not None and _reads(choice) else None

    def _group(self, trial: Trial) -> tuple[Any, ...]:
        """Returns what trials that train as one unit have in common."""
        tap = self._tap(trial)
        traits = None if tap is None else self._traits(trial)
        if tap is None or traits is None or traits.obstacle is not None:
            return ("alone", trial.index)
        return (tap.key.digest, traits.fusing_key)

    def _traits(self, trial: Trial) -> "_Traits":
        """Returns how a trial can be fused; trials that differ in rates and the like have the same traits."""
        config = trial.config
        key = (
            *(self._family_key(config), config.freeze_depth, config.seed, config.optimizer.name, config.epochs),
            *(config.batch_size, config.accumulate),
        )
        if key not in self._traits_of:
            task = self._workbench.task(config)
            self._traits_of[key] = _Traits(obstacle_to_fusing(task), fusing_key(task))
        return self._traits_of[key]

    def _most_fused(self, trial: Trial) -> int:
        data = self._workbench.task(trial.config).data
        logit_bytes = 4 * len(data.splits.val) * len(data.class_names)
        return max(1, min(_MOST_FUSED, _MOST_LOGIT_BYTES // max(1, logit_bytes)))

    def _weight(self, unit: Unit) -> float:
        """Returns about how long a unit takes, in any measure: what trains is dearer the fewer groups are frozen."""
        trial = unit.trials[0]
        family, depth = self._family(trial), self._depth(trial)
        is_cheap = len(unit.trials) > 1
        return trial.config.epochs * (0.0 if is_cheap else 1.0 + max(family.boundary_of.values(), default=0) - depth)

    # What trials have in common

    def _family(self, trial: Trial) -> _Family:
        key = self._family_key(trial.config)
        if key not in self._families:
            self._families[key] = _Family(trial)
        return self._families[key]

    def _family_key(self, config: FinetuneConfig) -> str:
        """All that the values of a tap depend on, and on what rows they are of."""
        augmented = config.augment is not Augment.none
        return json.dumps(
            [
                *(to_plain(part) for part in (config.data, config.backbone, config.precision, config.augment)),
                config.augment_views,
                config.seed if augmented or self._seed_matters(config) else None,
            ]
        )

    @staticmethod
    def _seed_matters(config: FinetuneConfig) -> bool:
        """Whether it decides over the backbone's weights, or over which rows there are."""
        return config.backbone.weights == "none" or config.data.num_train_per_class is not None

    @staticmethod
    def _samples_of(family: _Family) -> str:
        """Returns what tells the samples of families apart, as their backbones see them."""
        key = family.specs[min(family.specs)].key if family.specs else None
        if key is None:
            return json.dumps([to_plain(family.trial.config.backbone), to_plain(family.trial.config.data)])
        return json.dumps([key.backbone, key.weights, key.preprocessing, key.precision, key.data, key.rows, key.views])

    def _depth(self, trial: Trial) -> int:
        depth = trial.config.freeze_depth
        return self._num_groups(trial) if isinstance(depth, str) else depth

    def _num_groups(self, trial: Trial) -> int:
        key = trial.config.backbone.name
        if key not in self._group_counts:
            self._group_counts[key] = self._workbench.task(trial.config).model.backbone.num_groups
        return self._group_counts[key]

    def _labels(self) -> list[str]:
        """Returns what tells the families apart, in the words of the space."""
        families = list(self._families.values())
        names = [family.trial.config.backbone.name for family in families]
        if len(set(names)) == len(names):
            return names
        keys = [name for name in families[0].trial.params if full_key(name).startswith(("data.", "backbone.", "seed"))]
        return [
            " ".join([name, *(f"{key}={family.trial.params[key]}" for key in keys if full_key(key) != "backbone.name")])
            for name, family in zip(names, families, strict=True)
        ]

    # What is done for each depth

    def _plan_family(self, family: _Family, *, budget_bytes: int) -> tuple[list[DepthPlan], list[Boundary]]:
        task = self._workbench.task(family.trial.config)
        family.num_items = len(tap_items(task))
        head_boundary = task.model.head_boundary
        family.boundary_of = {depth: min(depth, head_boundary) for depth in family.trials}
        numbers = sorted(set(family.boundary_of.values()) - {0})
        dtype = self._config.taps.dtype.value
        family.specs = {number: tap_spec(task, number, dtype=dtype) for number in numbers}
        forward = measure_forward(task, numbers, dtype=dtype, device=self._device)
        family.forward = forward
        boundaries = [self._boundary(family, forward, number) for number in numbers]
        costs = {depth: self._depth_cost(family, depth) for depth in sorted(family.trials)}
        demands = [cost.demand for cost in costs.values()]
        found = choose(boundaries, demands, forward.rates, num_items=family.num_items, budget_bytes=budget_bytes)
        family.choices = dict(zip(costs, found, strict=True))
        made = [
            boundary
            for boundary in boundaries
            if any(choice.action == "tap" and choice.boundary == boundary.boundary for choice in found)
        ]
        by_number = {boundary.boundary: boundary for boundary in boundaries}
        rows = [
            _depth_plan(
                family.label,
                depth,
                cost,
                choice=family.choices[depth],
                boundary=by_number.get(cost.demand.boundary),
                rates=forward.rates,
            )
            for depth, cost in costs.items()
        ]
        return rows, made

    def _boundary(self, family: _Family, forward: Forward, number: int) -> Boundary:
        spec = family.specs[number]
        return Boundary(
            boundary=number,
            prefix_s=forward.prefix_s[number],
            item_bytes=spec.item_bytes,
            is_stored=self._uses_taps and self._store.is_complete(spec),
        )

    def _depth_cost(self, family: _Family, depth: int) -> "_DepthCost":
        trials, boundary = family.trials[depth], family.boundary_of[depth]
        assert family.forward is not None
        obstacle = self._obstacle(trials[0].config, depth)
        for trial in {_step_of(trial.config): trial for trial in trials}.values():
            self._workbench.task(trial.config)  # which complains of a step that can't be
        task = self._workbench.task(trials[0].config)
        alone = measure_suffix({0: task}, family.forward.samples.get(boundary), boundary, self._device)
        units, why_not = [[trial] for trial in trials], None
        if depth >= task.model.head_boundary:
            why_not = obstacle_to_fusing(task)
            if obstacle is None and why_not is None:
                units = self._fused(trials)
        together = alone
        if any(len(unit) > 1 for unit in units):
            measured = max(units, key=len)[:_MOST_MEASURED]
            tasks = {trial.index: self._workbench.task(trial.config) for trial in measured}
            together = measure_suffix(tasks, family.forward.samples[boundary], boundary, self._device)
        splits = task.data.splits
        uses = [
            (
                sum(trial.config.epochs for trial in members) * task.steps_per_epoch * _rows_per_step(task),
                sum(max(1, trial.config.epochs) for trial in members) * len(splits.val),
            )
            for members in (trials, [unit[0] for unit in units])
        ]
        demand = Demand(boundary, *uses[1], *uses[0], obstacle)
        return _DepthCost(trials, units, task, alone, together, demand, why_not)

    def _fused(self, trials: Sequence[Trial]) -> list[list[Trial]]:
        groups: dict[tuple[Any, ...], list[Trial]] = defaultdict(list)
        for trial in trials:
            groups[self._traits(trial).fusing_key].append(trial)
        return list(groups.values())

    def _obstacle(self, config: FinetuneConfig, depth: int) -> str | None:
        """Returns why no tap is valid for trials like this one, or None."""
        if depth == 0:
            return "freeze_depth=0: nothing is frozen"
        if not self._uses_taps:
            return "reuse=off"
        if config.augment is not Augment.none and config.augment_views is None:
            return (
                f"augment={config.augment.value} changes the images at random in each epoch; augment_views=V would "
                "cache V views of each"
            )
        return None


class _DepthCost(NamedTuple):
    """What was found out of the trials of one depth."""

    trials: list[Trial]
    units: list[list[Trial]]
    task: Task
    """Of the first trial."""
    alone: Suffix
    together: Suffix
    demand: Demand
    why_not_fused: str | None

    def suffix_s(self, suffix: Suffix, members: Iterable[Trial]) -> float:
        """Returns the seconds that the parts that train take, for one trial, or unit, after another."""
        epochs = [trial.config.epochs for trial in members]
        num_val = len(self.task.data.splits.val)
        steps_s = sum(epochs) * self.task.steps_per_epoch * suffix.step_s
        validation_s = sum(max(1, epoch) for epoch in epochs) * (num_val * suffix.val_s + _EPOCH_S)
        return steps_s + validation_s + len(epochs) * _TRIAL_S


def _depth_plan(
    label: str, depth: int, cost: _DepthCost, *, choice: Choice, boundary: Boundary | None, rates: Rates
) -> DepthPlan:
    demand, num_units = cost.demand, len(cost.units)
    image_s = 0.0 if boundary is None else rates.decode_s + boundary.prefix_s
    uncached_s = cost.suffix_s(cost.alone, cost.trials)
    uncached_s += (demand.uncached_train_uses + demand.uncached_val_uses) * image_s
    seconds = uncached_s
    if _reads(choice) and boundary is not None:
        read_s = boundary.item_bytes * rates.read_s_per_byte
        seconds = cost.suffix_s(cost.together, [unit[0] for unit in cost.units])
        seconds += (demand.train_uses + demand.val_uses) * read_s + (len(cost.trials) - num_units) * _TRIAL_S
    else:
        num_units = len(cost.trials)
    return DepthPlan(
        family=label,
        freeze_depth=depth,
        num_trials=len(cost.trials),
        num_units=num_units,
        action=choice.action,
        reason=choice.reason,
        tap_bytes=choice.bytes,
        seconds=seconds,
        uncached_s=uncached_s,
        why_not_fused=cost.why_not_fused,
    )


def _reads(choice: Choice) -> bool:
    return choice.action in ("tap", "stored")


def _step_of(config: FinetuneConfig) -> tuple[int, int, bool]:
    """Returns all that decides whether a step can be, on one backbone at one depth and on data of one size."""
    return config.batch_size, config.accumulate, config.epochs > 0


def _rows_per_step(task: Task) -> int:
    return task.config.batch_size * task.config.accumulate
