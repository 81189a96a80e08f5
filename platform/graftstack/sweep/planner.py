"""Planning a sweep: what each freeze depth costs, which taps are worth it, and which trials train together."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from graftstack.config.schema import Augment, FinetuneConfig
from graftstack.config.sweep import Reuse, SchedulerName, SearchName, SweepConfig
from graftstack.finetune.initial import preprocessing_for
from graftstack.finetune.memory import DataFacts
from graftstack.finetune.tapping import tap_items, tap_spec
from graftstack.finetune.task import Workbench
from graftstack.sweep.fused import MOST_FUSED, MOST_LOGIT_BYTES, fusing_key, obstacle_to_fusing
from graftstack.sweep.measure import measure_forward, measure_suffix
from graftstack.sweep.memory import sweep_memory
from graftstack.sweep.plan import DepthPlan, Pass, SweepPlan
from graftstack.sweep.prediction import DepthCost, depth_demand, depth_plan, reads_tap
from graftstack.sweep.trials import Trial, Unit
from graftstack.sweep.trunks import Trunk, Trunks, trunk_key
from graftstack.taps.costs import Boundary, choose, making_s
from graftstack.taps.key import TapSpec
from graftstack.taps.store import TapStore

# A fused step of more members than this costs as much more as there are more of them.
_MOST_MEASURED = 32


class _Traits(NamedTuple):
    """What decides whether and with which others a trial's head can be fused."""

    obstacle: str | None
    fusing_key: tuple[Any, ...]


class Planner:
    """Decides for each trunk and each freeze depth, and puts trials into units accordingly."""

    def __init__(self, config: SweepConfig, store: TapStore, *, workbench: Workbench, device: torch.device) -> None:
        self._config = config
        self._store = store
        self._workbench = workbench
        self._device = device
        self._trunks = Trunks(workbench)
        self._traits_of: dict[tuple[Any, ...], _Traits] = {}
        self._uses_taps = config.reuse is Reuse.auto
        self._held: dict[str, int] = {}
        """Digest -> bytes of the taps that trials planned so far read."""

    def plan(self, trials: Sequence[Trial]) -> SweepPlan:
        """Measures what each depth costs and decides. Trains nothing and makes no tap.

        Images are decoded into their cache, stored taps are read to see that they are whole, for which those at a URI
        are fetched, and damaged shards are removed.

        Raises:
            ConfigError, DataError, WeightsError: a trial that can't be trained.
        """
        self._trunks.add(trials)
        depths: list[DepthPlan] = []
        passes_s, made_bytes = 0.0, 0
        rates: dict[str, float] = {}
        for trunk in self._trunks:
            depths += self._plan_trunk(trunk)
            assert trunk.forward is not None
            rates = rates or vars(trunk.forward.rates)
            passes_s += self._pass_s(trunk)
            made_bytes += sum(trunk.specs[number].num_bytes for number in trunk.where("tap"))
        return SweepPlan(
            num_trials=len(trials),
            num_images=sum({trunk.samples: trunk.num_items for trunk in self._trunks}.values()),
            depths=tuple(depths),
            tap_bytes=made_bytes,
            pass_s=passes_s,
            trials_s=sum(row.seconds for row in depths),
            uncached_s=sum(row.uncached_s for row in depths),
            rates=rates,
        )

    def with_memory(self, plan: SweepPlan, trial: Trial) -> SweepPlan:
        """Returns a plan with what processes of the sweep need, given the data of one of its trials.

        It takes a second or more, which a sweep that is to run has a better use for.
        """
        data = self._workbench.task(trial.config).data
        facts = DataFacts(len(data.class_names), len(data.splits.val))
        memory = sweep_memory(self._config, facts, size_of=lambda config: preprocessing_for(config).image_size)
        return replace(plan, worker_memory_bytes=memory.worker_bytes, device_memory_bytes=memory.device_bytes)

    def passes(self) -> list[Pass]:
        """Returns for each trunk of which a tap is to be made all those that its trials read, stored ones too."""
        return [
            Pass(trunk.trial, trunk.label, _read_taps(trunk), trunk.start)
            for trunk in self._trunks
            if trunk.where("tap")
        ]

    def tapped(self) -> list[Pass]:
        """Returns all taps that trials read, those stored before among them."""
        return [
            Pass(trunk.trial, trunk.label, _read_taps(trunk)) for trunk in self._trunks if trunk.where("tap", "stored")
        ]

    def give_up(self, specs: Iterable[TapSpec], reason: str) -> None:
        """Recomputes the frozen part of the trials that were to read these taps."""
        digests = {spec.key.digest for spec in specs}
        for trunk in self._trunks:
            for depth, choice in trunk.choices.items():
                if reads_tap(choice) and trunk.specs[choice.boundary].key.digest in digests:
                    trunk.choices[depth] = choice._replace(action="recompute", reason=reason, bytes=0)

    def make_units(self, trials: Sequence[Trial]) -> list[Unit]:
        """Returns the units in which `trials` train, those that take longest first, or with ASHA those that don't."""
        units = [Unit(members, self._tap(members[0])) for members in self._together(trials, self._group)]
        # With ASHA trials wait at rungs for others: the rungs of cheap ones fill soonest.
        return sorted(units, key=self._weight, reverse=self._config.scheduler is SchedulerName.none)

    def probed_as(self, trial: Trial) -> tuple[str, int]:
        """Returns what a probe calls the features that a trial freezes: its trunk's label, and the boundary."""
        trunk = self._trunks.of(trial)
        return trunk.label, trunk.boundary_of[self._trunks.depth(trial)]

    def probe_places(self) -> list[tuple[Trial, str, list[int]]]:
        """Returns a trial, the label and the boundaries of each trunk."""
        return [(trunk.trial, trunk.label, trunk.boundaries) for trunk in self._trunks]

    def _tap(self, trial: Trial) -> TapSpec | None:
        """Returns the tap that a trial reads, or None."""
        trunk = self._trunks.of(trial)
        choice = trunk.choices.get(self._trunks.depth(trial))
        return trunk.specs[choice.boundary] if choice is not None and reads_tap(choice) else None

    def _group(self, trial: Trial) -> Hashable:
        """Returns what trials that train as one unit have in common."""
        tap = self._tap(trial)
        traits = None if tap is None else self._traits(trial)
        if tap is None or traits is None or traits.obstacle is not None:
            return "alone", trial.index
        return tap.key.digest, traits.fusing_key

    def _together(self, trials: Sequence[Trial], group: Callable[[Trial], Hashable]) -> list[tuple[Trial, ...]]:
        """Returns the trials of one group together, cut where they are more than train at a time."""
        groups: dict[Hashable, list[Trial]] = defaultdict(list)
        for trial in trials:
            groups[group(trial)].append(trial)
        units: list[tuple[Trial, ...]] = []
        for members in groups.values():
            size = self._most_fused(members[0]) if len(members) > 1 else 1
            units += [tuple(members[begin : begin + size]) for begin in range(0, len(members), size)]
        return units

    def _most_fused(self, trial: Trial) -> int:
        data = self._workbench.task(trial.config).data
        logit_bytes = 4 * len(data.splits.val) * len(data.class_names)
        most = max(1, min(MOST_FUSED, MOST_LOGIT_BYTES // max(1, logit_bytes)))
        return min(most, self._most_at_a_time or most)

    @property
    def _most_at_a_time(self) -> int | None:
        """How many trials there are before the results of earlier ones; None: all."""
        return (self._config.max_concurrent_trials or 1) if self._config.search is SearchName.optuna else None

    def _traits(self, trial: Trial) -> _Traits:
        """Returns how a trial can be fused; trials that differ in rates and the like have the same traits."""
        config = trial.config
        key = (
            *(trunk_key(config), config.freeze_depth, config.seed, config.optimizer.name, config.epochs),
            *(config.batch_size, config.accumulate),
        )
        if key not in self._traits_of:
            task = self._workbench.task(config)
            self._traits_of[key] = _Traits(obstacle_to_fusing(task), fusing_key(task))
        return self._traits_of[key]

    def _weight(self, unit: Unit) -> float:
        """Returns about how long a unit takes, in any measure: what trains is dearer the fewer groups are frozen."""
        trial = unit.trials[0]
        deepest = max(self._trunks.of(trial).boundaries, default=0)
        is_cheap = len(unit.trials) > 1
        return trial.config.epochs * (0.0 if is_cheap else 1.0 + deepest - self._trunks.depth(trial))

    def _plan_trunk(self, trunk: Trunk) -> list[DepthPlan]:
        """Measures and decides for each depth of a trunk, with what earlier ones leave of the budget."""
        self._measure(trunk)
        assert trunk.forward is not None
        places = {number: trunk.at(spec, is_stored=self._is_stored(spec)) for number, spec in trunk.specs.items()}
        costs = {depth: self._depth_cost(trunk, depth) for depth in sorted(trunk.trials)}
        found = choose(
            places.values(),
            [cost.demand for cost in costs.values()],
            trunk.forward.rates,
            num_items=trunk.num_items,
            budget_bytes=self._left_bytes(trunk),
        )
        trunk.choices = dict(zip(costs, found, strict=True))
        trunk.start = self._start(trunk)
        self._held |= {spec.key.digest: spec.num_bytes for spec in _read_taps(trunk).values()}
        return [
            depth_plan(
                *(trunk.label, depth, cost),
                choice=trunk.choices[depth],
                boundary=places.get(cost.demand.boundary),
                rates=trunk.forward.rates,
            )
            for depth, cost in costs.items()
        ]

    def _measure(self, trunk: Trunk) -> None:
        task = self._workbench.task(trunk.trial.config)
        trunk.num_items = len(tap_items(task))
        trunk.boundary_of = {depth: min(depth, task.model.head_boundary) for depth in trunk.trials}
        dtype = self._config.taps.dtype.value
        trunk.specs = {number: tap_spec(task, number, dtype=dtype) for number in trunk.boundaries}
        trunk.forward = measure_forward(task, trunk.boundaries, dtype=dtype, device=self._device)

    def _is_stored(self, spec: TapSpec) -> bool:
        """Whether a tap is there, or will be once those of earlier trunks are made."""
        return self._uses_taps and (spec.key.digest in self._held or self._store.is_complete(spec))

    def _left_bytes(self, trunk: Trunk) -> int:
        """Returns what the taps that other trunks alone read leave of the budget."""
        own = {spec.key.digest for spec in trunk.specs.values()}
        of_others = sum(num_bytes for digest, num_bytes in self._held.items() if digest not in own)
        return max(0, self._config.taps.budget_bytes - of_others)

    def _start(self, trunk: Trunk) -> TapSpec | None:
        """Returns the deepest tap to begin a trunk's pass with: shallower than what it makes, and quicker than images.

        Taps are found by their names alone: those that prove damaged are left out when the pass begins.
        """
        assert trunk.forward is not None
        task, rates = self._workbench.task(trunk.trial.config), trunk.forward.rates
        for number in reversed(range(1, min(trunk.where("tap"), default=0))):
            spec = trunk.specs.get(number) or tap_spec(task, number, dtype=self._config.taps.dtype.value)
            is_there = spec.key.digest in self._held or self._store.is_listed(spec)
            if is_there and spec.item_bytes * rates.read_s_per_byte < rates.decode_s + trunk.forward.prefix_s[number]:
                return spec
        return None

    def _pass_s(self, trunk: Trunk) -> float:
        assert trunk.forward is not None
        start: Boundary | None = None if trunk.start is None else trunk.at(trunk.start, is_stored=True)
        made = [trunk.at(trunk.specs[number], is_stored=False) for number in trunk.where("tap")]
        return making_s(made, trunk.forward.rates, num_items=trunk.num_items, start=start)

    def _depth_cost(self, trunk: Trunk, depth: int) -> DepthCost:
        trials, boundary = trunk.trials[depth], trunk.boundary_of[depth]
        assert trunk.forward is not None
        for trial in {_step_of(trial.config): trial for trial in trials}.values():
            self._workbench.task(trial.config)  # which complains of a step that can't be
        task = self._workbench.task(trials[0].config)
        sample = trunk.forward.samples.get(boundary)
        obstacle, why_not = self._obstacle(trials[0].config, depth), None
        units: list[tuple[Trial, ...]] = [(trial,) for trial in trials]
        if depth >= task.model.head_boundary:
            why_not = self._why_not_fused(trials[0])
            if obstacle is None and why_not is None:
                units = self._together(trials, lambda trial: self._traits(trial).fusing_key)
        alone = together = measure_suffix({0: task}, sample, boundary, self._device)
        measured = max(units, key=len)[:_MOST_MEASURED]
        if len(measured) > 1:
            tasks = {trial.index: self._workbench.task(trial.config) for trial in measured}
            together = measure_suffix(tasks, sample, boundary, self._device)
        demand = depth_demand(boundary, trials, units, task, obstacle)
        return DepthCost(trials, units, task, alone, together, len(measured), demand, why_not)

    def _why_not_fused(self, trial: Trial) -> str | None:
        """Returns why trials of which only the head trains train one by one, or None."""
        obstacle = self._traits(trial).obstacle
        if obstacle is None and self._most_at_a_time == 1:
            return "search=optuna suggests them one by one; max_concurrent_trials=N suggests N at a time"
        return obstacle

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


def _read_taps(trunk: Trunk) -> dict[int, TapSpec]:
    return {number: trunk.specs[number] for number in trunk.where("tap", "stored")}


def _step_of(config: FinetuneConfig) -> tuple[int, int, bool]:
    """Returns all that decides whether a step can be, on one backbone at one depth and on data of one size."""
    return config.batch_size, config.accumulate, config.epochs > 0
