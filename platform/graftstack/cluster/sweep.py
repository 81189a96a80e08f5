"""Launching `sweep`: plan it, make the taps, train the trials wherever they are to run, keep the best model."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from graftstack.cluster.finetune import Display
from graftstack.cluster.launching import Checked, check, heartbeat, open_run, tidied
from graftstack.cluster.workplace import Workplace, at_its_place, workplace
from graftstack.config.schema import ClusterKind
from graftstack.config.space import Choice, parse_space, trial_config
from graftstack.config.sweep import Prune, SchedulerName, SearchName, SweepConfig
from graftstack.errors import RunError
from graftstack.machine import usable_cpus
from graftstack.reason import reason
from graftstack.runs import Run
from graftstack.storage import Folder
from graftstack.sweep.asha import Asha
from graftstack.sweep.drive import KeepAll, drive
from graftstack.sweep.ledger import Ledger, trial_rows
from graftstack.sweep.search import ListSearch, list_trials
from graftstack.sweep.trials import Scheduler, Search, Trial, TrialResult

if TYPE_CHECKING:
    from graftstack.finetune.task import Task
    from graftstack.sweep.drive import Progress
    from graftstack.sweep.plan import SweepPlan
    from graftstack.sweep.probe import ProbeScore

PLAN = "plan.json"
TRIALS = "trials"

_ANEW = "the trials that would read them compute the frozen part anew"

# How often a trial may lose its process.
_MAX_LOSSES = 2


class SweepDisplay(Display, Protocol):
    """What the launch of a sweep tells a person."""

    def planned(self, plan: "SweepPlan") -> None:
        """What will run."""
        ...

    def probed(self, scores: "Sequence[ProbeScore]") -> None:
        """How much the features of each depth know."""
        ...

    def tapping(self, done: int, total: int) -> None:
        """Shards of taps made, of all."""
        ...

    def trials(self, progress: "Progress", total: int) -> None:
        """Where the trials stand."""
        ...


def launch_sweep(config: SweepConfig, *, overrides: Sequence[str], display: SweepDisplay, verbose: bool = False) -> Run:
    """Runs a sweep to its end and returns its run; a run that is done already is returned as it is.

    Whatever ends the process, the run folder stays resumable, and trials that are over don't run again. Errors before
    the start leave no folder behind.

    Raises:
        BadInputError: what the user gave can't be run.
        GraftstackError: no trial ended with a model, or nothing can be written; the manifest says so too.
        KeyboardInterrupt: it was interrupted; the manifest says so too.
    """
    checked = check("sweep", config, overrides)
    if checked.is_done:
        assert checked.existing is not None
        return checked.existing
    with tidied(checked), _cluster(checked.config, display, verbose=verbose):
        sweep = _Sweep(checked, display, verbose=verbose)
        plan = sweep.plan()
        with open_run(checked) as run:
            sweep.run(run, plan)
    return run


class PlannedSweep(NamedTuple):
    """What a sweep would do, and what its frozen features know."""

    plan: "SweepPlan"
    probes: "list[ProbeScore]"
    """On a sample of the images."""


def plan_sweep(config: SweepConfig, *, overrides: Sequence[str], display: SweepDisplay) -> PlannedSweep:
    """Checks a sweep and returns what it would do: trains nothing and makes no tap.

    It decodes images into their cache, and verifies taps that are there: those at a URI are fetched, and damaged shards
    removed.
    """
    sweep = _Sweep(check("sweep", config, overrides), display, verbose=False)
    return PlannedSweep(sweep.with_memory(sweep.plan()), sweep.probe())


@contextmanager
def _cluster(config: SweepConfig, display: SweepDisplay, *, verbose: bool) -> Iterator[None]:
    """Connects to a cluster that is there, and waits for room for a trial.

    An embedded one is started once processes are worth it.
    """
    if config.cluster.kind is not ClusterKind.ray:
        yield
        return
    from graftstack.cluster.admission import admit
    from graftstack.cluster.session import ray_session
    from graftstack.cluster.train import cluster_session

    if config.cluster.max_workers > 1:
        with cluster_session(config, say=display.say, verbose=verbose):
            yield
        return
    with ray_session(config.cluster, verbose=verbose):
        admit(config.cluster, num_cpus=config.cluster.cpus_per_worker or 1, say=display.say)
        yield


class _Sweep:
    """One start of a sweep, from its plan to its model."""

    def __init__(self, checked: Checked[SweepConfig], display: SweepDisplay, *, verbose: bool) -> None:
        from graftstack.finetune.task import Workbench
        from graftstack.sweep.planner import Planner
        from graftstack.sweep.runner import RunnerSettings

        self._config = config = checked.config
        self._display = display
        self._verbose = verbose
        self._began = time.monotonic()
        self._ledger = Ledger(Folder(config.runs_dir) / str(config.name) / TRIALS)
        self._finished = self._ledger.read() if config.resume else {}
        self._settings = RunnerSettings(
            trials_folder=self._ledger.folder.location,
            taps=config.taps,
            cache_dir=config.data.cache_dir,
            is_on_gpu=config.cluster.gpus_per_worker > 0,
            may_promote=config.scheduler is SchedulerName.asha,
        )
        self._store = self._settings.store
        self._workbench = Workbench(progress=display.reading)
        self._planner = Planner(config, self._store, workbench=self._workbench, device=self._settings.device_here)
        self._trials = _known_trials(config)
        self._check_finished()

    def _check_finished(self) -> None:
        """Raises `RunError` if a row isn't that of the trial of its number: the space has another order."""
        if self._config.search is SearchName.optuna:
            return
        params = {trial.index: trial.params for trial in self._trials}
        for index, row in self._finished.items():
            if row.params != params.get(index):
                raise RunError(
                    f"name={self._config.name}: its trial {index} was {row.params}, and now is {params.get(index)}; "
                    "give the keys of the space in their first order, or choose another name"
                )

    def plan(self) -> "SweepPlan":
        """Returns what is left to do, in numbers. Raises `BadInputError` for a trial that can't be trained."""
        import torch

        torch.set_num_threads(self._config.cluster.own_threads(usable_cpus()))
        left = [trial for trial in self._trials if not self._is_over(trial)]
        plan = self._planner.plan(left or self._trials[:1])
        plan = at_its_place(self._config, plan)
        self._display.planned(plan)
        return plan

    def with_memory(self, plan: "SweepPlan") -> "SweepPlan":
        """Returns a plan with the memory that processes of the sweep need."""
        return self._planner.with_memory(plan, self._trials[0])

    def _is_over(self, trial: Trial) -> bool:
        """Whether nothing is left to train of it; one that was stopped may be promoted."""
        row = self._finished.get(trial.index)
        return row is not None and not (row.status == "stopped" and self._settings.may_promote)

    def probe(self) -> "list[ProbeScore]":
        """Returns what the frozen features of each depth know, found on a sample."""
        from graftstack.sweep.probing import probe_sample

        scores = []
        for trial, label, boundaries in self._planner.probe_places():
            scores += probe_sample(self._workbench.task(trial.config), boundaries, label=label)
        return scores

    def run(self, run: Run, plan: "SweepPlan") -> None:
        """Does all of it, and sets the manifest to done."""
        from graftstack.sweep.outcome import best_of, save_outcome

        began = time.monotonic()
        run.folder.write(PLAN, json.dumps({**asdict(plan), "predicted_s": plan.predicted_s}, indent=2).encode())
        beat = heartbeat(run)
        with workplace(
            self._config,
            plan,
            self._settings,
            workbench=self._workbench,
            beat=beat,
            say=self._display.say,
            verbose=self._verbose,
        ) as place:
            forwards = self._make_taps(place, run, plan.num_images, beat)
            with ExitStack() as taps:
                self._hold_taps(taps)
                results = self._train(place, beat)
                actual_s = time.monotonic() - began
                trials = {result.index: self._trial_of(result) for result in results}
                best = best_of(results)
                task = self._task_of(trials[best.index], taps)
                artifacts = save_outcome(task, trials[best.index], results, run.folder)
        self._remove_checkpoints(results)
        run.folder.sweep()
        run.update(
            status="done",
            metrics=best.metrics,
            artifacts={**artifacts, "plan": PLAN},
            details=_details(best, results, task),
            results={
                "trials": trial_rows(results),
                "reuse": {
                    "backbone_forwards": forwards + sum(result.backbone_forwards for result in results),
                    "unique_samples": run.manifest.results["reuse"]["unique_samples"],
                    "predicted_s": round(plan.predicted_s, 3),
                    "actual_s": round(actual_s, 3),
                },
            },
        )

    def _remove_checkpoints(self, results: Sequence[TrialResult]) -> None:
        """Removes what only a resumption or a promotion would have needed."""
        from graftstack.sweep.runner import FUSED

        folder = self._ledger.folder
        leftovers = [folder / name for name in folder.names() if name.startswith(FUSED)]
        for result in results:
            if result.status in ("stopped", "failed"):
                of_trial = folder / self._trial_of(result).name
                leftovers += [of_trial / name for name in of_trial.names() if name.startswith("checkpoints")]
        for leftover in leftovers:
            leftover.remove_all()

    def _make_taps(self, place: Workplace, run: Run, num_images: int, beat: Callable[[], None]) -> int:
        """Makes all taps that the plan asks for; where that can't be, their trials compute what they need.

        Returns:
            How many images went through the frozen part for it, in earlier starts too.
        """
        from graftstack.finetune.passes import NoRoomError
        from graftstack.sweep.passes import make_pass

        def on_shard(done: int, total: int) -> None:
            beat()
            self._display.tapping(done, total)

        before = run.manifest.results.get("reuse", {})
        forwards, samples = int(before.get("backbone_forwards", 0)), int(before.get("unique_samples", 0))
        reuse = {"backbone_forwards": forwards, "unique_samples": max(samples, num_images)}
        run.update(results={"reuse": reuse})
        keep = {spec.key.digest for read in self._planner.tapped() for spec in read.specs.values()}
        for wanted in self._planner.passes():
            try:
                forwards += make_pass(wanted, self._store, make=lambda calls: place.make(calls, on_shard), keep=keep)
                run.update(results={"reuse": {**reuse, "backbone_forwards": forwards}})
            except NoRoomError as error:
                depths = ", ".join(str(spec.key.boundary) for spec in error.lacking)
                self._display.say(f"no taps at {depths}: {error}; {_ANEW}")
                self._planner.give_up(error.lacking, str(error))
        return forwards

    def _hold_taps(self, taps: ExitStack) -> None:
        """Keeps the taps from eviction until the last trial is over. One that is gone is recomputed."""
        from graftstack.taps.tap import TapMissingError

        for read in self._planner.tapped():
            for spec in read.specs.values():
                try:
                    taps.enter_context(self._store.open(spec))
                except TapMissingError as error:
                    self._display.say(f"{reason(error)}; {_ANEW}")
                    self._planner.give_up([spec], "gone")

    def _train(self, place: Workplace, beat: Callable[[], None]) -> list[TrialResult]:
        config = self._config
        total = len(self._trials)

        def tell(progress: "Progress") -> None:
            beat()
            self._display.trials(progress, total)

        limit_s = config.time_limit_s
        return drive(
            self._search(place.num_slots),
            place.pool,
            _scheduler(config),
            self._ledger,
            make_units=self._planner.make_units,
            trial_of=self._trial_of,
            finished={**self._finished, **self._pruned()},
            time_limit_s=None if limit_s is None else max(0.0, limit_s - (time.monotonic() - self._began)),
            max_losses=_MAX_LOSSES,
            tell=tell,
        )

    def _pruned(self) -> dict[int, TrialResult]:
        """Returns rows of the trials that a probe leaves out, which are on disk then; says on what evidence."""
        if self._config.prune is Prune.none:
            return {}
        from graftstack.sweep.probing import probe_stored, pruned_rows

        scores = probe_stored(self._planner.tapped(), self._store, self._workbench)
        self._display.probed(scores)
        left = [trial for trial in self._trials if trial.index not in self._finished]
        rows = pruned_rows(self._planner, scores, left, margin=self._config.prune_margin)
        for text in dict.fromkeys(str(row.error) for row in rows.values()):
            self._display.say(f"pruned: {text}")
        for row in rows.values():
            self._ledger.write(row)
        return rows

    def _search(self, num_slots: int) -> Search:
        if self._config.search is not SearchName.optuna:
            return ListSearch(self._config)
        from graftstack.cluster.tune import OptunaSearch

        return OptunaSearch(self._config, max_open=max(num_slots, self._config.max_concurrent_trials or 1))

    def _trial_of(self, result: TrialResult) -> Trial:
        return Trial(result.index, result.params, trial_config(self._config, result.params))

    def _task_of(self, trial: Trial, taps: ExitStack) -> "Task":
        """Returns the task of a trial, with its tap if it has one."""
        from graftstack.finetune.tapping import open_tap

        (unit,) = self._planner.make_units([trial])
        task = self._workbench.task(trial.config)
        if unit.tap is None:
            return task
        inputs = open_tap(task, self._store, unit.tap)
        taps.callback(inputs.tap.close)
        return replace(task, tap=inputs)


def _known_trials(config: SweepConfig) -> list[Trial]:
    """Returns all trials; for a search that learns, random ones that stand for those to come."""
    if config.search is SearchName.optuna:
        from graftstack.cluster.tune import OptunaSearch

        OptunaSearch(config)  # complains at once if optuna is missing
        return _one_of_each_depth(config, list_trials(replace(config, search=SearchName.random)))
    return list_trials(config)


def _one_of_each_depth(config: SweepConfig, trials: list[Trial]) -> list[Trial]:
    """Gives the freeze depths in the space to random trials in turn: what isn't planned for would share nothing."""
    depths = parse_space(config.space).get("freeze_depth")
    if not isinstance(depths, Choice):
        return trials
    params = [{**trial.params, "freeze_depth": depths.values[trial.index % len(depths.values)]} for trial in trials]
    return [Trial(index, values, trial_config(config, values)) for index, values in enumerate(params)]


def _scheduler(config: SweepConfig) -> Scheduler:
    if config.scheduler is SchedulerName.none:
        return KeepAll()
    return Asha(
        grace_epochs=config.asha.grace_epochs,
        reduction_factor=config.asha.reduction_factor,
        most_epochs=config.most_epochs,
    )


def _details(best: TrialResult, results: Sequence[TrialResult], task: "Task") -> dict[str, Any]:
    from graftstack.finetune.job import task_details

    counts = Counter(result.status for result in results)
    return {
        "best_trial": best.index,
        **{f"best_{name}": value for name, value in best.params.items()},
        **{f"num_{status}": num for status, num in sorted(counts.items())},
        **task_details(task),
    }
