"""Where the trials of a sweep run: in this process, in processes of a cluster, or each in a group of workers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from graftstack.cluster.autoscaler import num_ahead
from graftstack.cluster.resources import (
    cluster_resources,
    cpus_per_worker,
    machine_resources,
    most_workers,
    node_slots,
    num_held,
)
from graftstack.config.schema import ClusterKind
from graftstack.config.sweep import SweepConfig
from graftstack.storage import Folder
from graftstack.sweep.trials import Pool

if TYPE_CHECKING:
    from graftstack.finetune.tapping import PassResult
    from graftstack.finetune.task import Workbench
    from graftstack.sweep.passes import ShardCall
    from graftstack.sweep.plan import SweepPlan
    from graftstack.sweep.runner import RunnerSettings

# What Ray and processes of their own cost before they are of use: shorter sweeps run in this one.
_PROCESSES_START_S = 12.0
# What the group of workers of each trial costs before it trains.
_GROUP_START_S = 20.0
# What several processes of few threads do more than one of many threads, at least.
_PROCESSES_GAIN = 0.2

OnShard = Callable[[int, int], None]
Make = Callable[["Sequence[ShardCall]", OnShard], "list[PassResult]"]


class Workplace(NamedTuple):
    """A pool for the trials, and what makes shards of taps before they begin."""

    pool: Pool
    num_slots: int
    """How many trials it has room for now; nodes may go and come."""
    make: Make
    """Makes shards, and tells how many of all are made."""


class Slots(NamedTuple):
    """Processes for trials."""

    num: int
    """On the nodes that were there at the start."""
    num_cpus: int
    """Of each, and so its threads."""


@contextmanager
def workplace(
    config: SweepConfig,
    plan: "SweepPlan",
    settings: "RunnerSettings",
    *,
    workbench: "Workbench",
    beat: Callable[[], None],
    say: Callable[[str], None],
    verbose: bool,
) -> Iterator[Workplace]:
    """Opens the place where a planned sweep runs; nothing of it is left behind. Trials in this process call `beat`."""
    with ExitStack() as stack:
        if config.cluster.max_workers > 1:
            yield _groups(config, settings, workbench, stack, verbose=verbose)
        elif _uses_processes(config, plan):
            yield _processes(config, plan, settings, workbench, stack, say=say, verbose=verbose)
        else:
            yield _here(settings, workbench, beat)


def at_its_place(config: SweepConfig, plan: "SweepPlan") -> "SweepPlan":
    """Returns a plan, which was measured in this process, with what it costs and gains to run where it will."""
    if config.cluster.max_workers > 1:
        return replace(plan, start_s=_GROUP_START_S * plan.num_trials)
    if not _uses_processes(config, plan):
        return plan
    return replace(plan, start_s=_PROCESSES_START_S, trials_s=plan.trials_s * (1 - _PROCESSES_GAIN))


def _uses_processes(config: SweepConfig, plan: "SweepPlan") -> bool:
    if config.cluster.kind is not ClusterKind.local:
        return config.cluster.kind is ClusterKind.ray
    slots = _local_slots(config, plan)
    if slots.num < 2:
        return False
    # Who says how many is not to be second-guessed by an estimate.
    if config.cluster.gpus_per_worker or config.max_concurrent_trials is not None:
        return True
    alone_s = sum(depth.seconds for depth in plan.depths if depth.num_units == depth.num_trials)
    return alone_s * _PROCESSES_GAIN > _PROCESSES_START_S


def _here(settings: "RunnerSettings", workbench: "Workbench", beat: Callable[[], None]) -> Workplace:
    from graftstack.sweep.inline_pool import InlinePool
    from graftstack.sweep.runner import TrialRunner

    runner = TrialRunner(settings, workbench=workbench, beat=beat)
    return Workplace(InlinePool(runner), 1, _make_here(settings, workbench))


def _make_here(settings: "RunnerSettings", workbench: "Workbench") -> Make:
    from graftstack.sweep.runner import TrialRunner

    # Where trials run elsewhere, they may have GPUs that this process hasn't.
    runner = TrialRunner(replace(settings, is_on_gpu=settings.device_here.type == "cuda"), workbench=workbench)

    def make(calls: "Sequence[ShardCall]", on_shard: OnShard) -> "list[PassResult]":
        results = []
        for number, call in enumerate(calls, start=1):
            results.append(runner.make_taps(*call))
            on_shard(number, len(calls))
        return results

    return make


def _processes(
    config: SweepConfig,
    plan: "SweepPlan",
    settings: "RunnerSettings",
    workbench: "Workbench",
    stack: ExitStack,
    *,
    say: Callable[[str], None],
    verbose: bool,
) -> Workplace:
    from graftstack.cluster.pool import RayPool
    from graftstack.cluster.session import ray_session
    from graftstack.cluster.slots import RaySlots
    from graftstack.sweep.runner import TrialRunner

    stack.enter_context(ray_session(config.cluster, verbose=verbose))
    slots = _cluster_slots(config, plan)
    processes = RaySlots(
        partial(TrialRunner, settings),
        num_slots=lambda: _num_now(slots, config, plan),
        num_cpus=slots.num_cpus,
        num_gpus=config.cluster.gpus_per_worker,
        num_threads=slots.num_cpus,
        patience_s=config.cluster.max_wait_s,
        say=say,
        verbose=verbose,
    )
    pool = RayPool(processes)
    stack.callback(pool.close)

    make_here = _make_here(settings, workbench)

    def make(calls: "Sequence[ShardCall]", on_shard: OnShard) -> "list[PassResult]":
        if not _share_taps(config):
            return make_here(calls, on_shard)
        return pool.call("make_taps", calls, poll=lambda done: on_shard(done, len(calls)))

    return Workplace(pool, slots.num, make)


def _share_taps(config: SweepConfig) -> bool:
    """Whether shards that processes on several nodes make are sure to meet in one place."""
    import ray

    location = config.taps.location
    is_remote = location is not None and not Folder(location).is_local
    return is_remote or sum(node["Alive"] for node in ray.nodes()) == 1


def _groups(
    config: SweepConfig, settings: "RunnerSettings", workbench: "Workbench", stack: ExitStack, *, verbose: bool
) -> Workplace:
    from graftstack.cluster.group_pool import GroupPool
    from graftstack.cluster.session import ray_session

    stack.enter_context(ray_session(config.cluster, verbose=verbose))
    # Of all groups alike, also where nodes come and go.
    num_cpus = cpus_per_worker(config.cluster)

    def num_slots() -> int:
        fitting = node_slots(config.cluster, num_cpus) // config.cluster.max_workers
        return max(1, min(fitting, config.max_concurrent_trials or fitting))

    pool = GroupPool(settings, num_slots=num_slots, num_cpus=num_cpus, verbose=verbose)
    stack.callback(pool.close)
    return Workplace(pool, num_slots(), _make_here(settings, workbench))


def _local_slots(config: SweepConfig, plan: "SweepPlan") -> Slots:
    cluster, there = config.cluster, machine_resources(config.cluster)
    num = num_held(there.num_cpus, there.num_gpus, cluster.cpus_per_worker or 1, cluster.gpus_per_worker)
    num = _limited(num, config, plan)
    return Slots(num, cluster.cpus_per_worker or max(1, there.num_cpus // num))


def _cluster_slots(config: SweepConfig, plan: "SweepPlan") -> Slots:
    """As many as fit; none waits for another's resources."""
    cluster = config.cluster
    if cluster.kind is ClusterKind.local:
        return _local_slots(config, plan)
    num = _limited(node_slots(cluster, cluster.cpus_per_worker or 1), config, plan)
    cpus = cluster.cpus_per_worker or max(1, cluster_resources(cluster).num_cpus // max(1, num))
    while cpus > 1 and node_slots(cluster, cpus) < num:  # nodes differ in size
        cpus -= 1
    return Slots(num, cpus)


def _num_now(slots: Slots, config: SweepConfig, plan: "SweepPlan") -> int:
    """Returns how many of these processes there are to be on the nodes that the cluster has now."""
    if config.cluster.kind is ClusterKind.local:
        return slots.num
    num = node_slots(config.cluster, slots.num_cpus) + num_ahead()
    return _limited(min(num, most_workers(config.cluster, slots.num_cpus)), config, plan)


def _limited(num: int, config: SweepConfig, plan: "SweepPlan") -> int:
    num_units = sum(depth.num_units for depth in plan.depths)
    return max(1, min(num, num_units, config.max_concurrent_trials or num))
