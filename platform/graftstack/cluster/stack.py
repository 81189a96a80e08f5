"""Launching `stack`: prepare base models and folds, train them wherever they are to run, keep the stack."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from graftstack.cluster.admission import admit
from graftstack.cluster.executor import connect
from graftstack.cluster.finetune import Display
from graftstack.cluster.launching import beating, check, open_run, tidied
from graftstack.cluster.session import ray_session
from graftstack.cluster.trained import trained_bases, trained_runs
from graftstack.config.schema import ClusterKind
from graftstack.config.stack import StackConfig
from graftstack.errors import ConfigError
from graftstack.runs import Run
from graftstack.runtime import Executor

if TYPE_CHECKING:
    from graftstack.stacking.bases import TrainedBase
    from graftstack.stacking.crossfit import Progress
    from graftstack.stacking.fitting import StackTask
    from graftstack.stacking.leakage import LeakageReport
    from graftstack.stacking.plan import StackPlan


class StackDisplay(Display, Protocol):
    """What the launch of a stack tells a person."""

    def tapping(self, done: int, total: int) -> None:
        """Shards of taps made, of all."""
        ...

    def fitting(self, progress: "Progress") -> None:
        """Where the base models stand."""
        ...


def launch_stack(config: StackConfig, *, overrides: Sequence[str], display: StackDisplay, verbose: bool = False) -> Run:
    """Runs a stack to its end and returns its run; a run that is done already is returned as it is.

    Whatever ends the process, the run folder stays resumable, and folds that are over aren't trained again. Errors
    before the start leave no folder behind.

    Raises:
        BadInputError: what the user gave can't be run.
        GraftstackError: no base model was finished, or nothing can be written; the manifest says so too.
        KeyboardInterrupt: it was interrupted; the manifest says so too.
    """
    began = time.monotonic()
    checked = check("stack", config, overrides)
    if checked.is_done:
        assert checked.existing is not None
        return checked.existing
    task = _prepared(checked.config, display)

    from graftstack.stacking.job import run_stack

    with tidied(checked), _executor(checked.config, display, verbose=verbose) as executor, open_run(checked) as run:
        with beating(run):
            outcome = run_stack(
                task,
                run.folder,
                executor,
                time_left_s=_time_left(checked.config, began),
                tell=display.fitting,
                tell_taps=display.tapping,
                say=display.say,
            )
        run.folder.sweep()
        run.update(
            status="done",
            metrics=outcome.metrics,
            artifacts=outcome.artifacts,
            details=outcome.details,
            results=outcome.results,
        )
    return run


def plan_stack(config: StackConfig, *, overrides: Sequence[str], display: StackDisplay) -> "StackPlan":
    """Checks a stack and returns what it would do; fits base models to a few rows, to see how long they take."""
    from graftstack.stacking.plan import make_plan

    return make_plan(_prepared(check("stack", config, overrides).config, display))


def check_leakage(
    config: StackConfig, *, overrides: Sequence[str], display: StackDisplay, verbose: bool = False
) -> "LeakageReport":
    """Stacks on shuffled labels, of which nothing can be learnt, and returns how well that is predicted out of fold."""
    from graftstack.stacking.leakage import leakage

    config = check("stack", config, overrides).config
    task = _prepared(config, display)
    with _executor(config, display, verbose=verbose) as executor:
        return leakage(task, executor, tell=display.fitting)


def check_before_sweep(config: StackConfig, display: StackDisplay) -> None:
    """Checks all of a stack but the trials of its sweep, which are yet to be trained. Raises `BadInputError`."""
    _prepared_of(config, trained_runs(config), display)


def _prepared(config: StackConfig, display: StackDisplay) -> "StackTask":
    return _prepared_of(config, trained_bases(config), display)


def _prepared_of(config: StackConfig, trained: "Sequence[TrainedBase]", display: StackDisplay) -> "StackTask":
    from graftstack.stacking.job import prepare_stack

    if config.cluster.max_workers > 1:
        raise ConfigError(
            f"cluster.num_workers={config.cluster.num_workers}: a base model trains in one process, and many train at "
            "once; leave it out, and use max_slots for how many CPUs they take together"
        )
    if config.cluster.gpus_per_worker:
        raise ConfigError(
            f"cluster.gpus_per_worker={config.cluster.gpus_per_worker:g}: base models train on CPUs; leave it out, or "
            "train them in a sweep and use from_sweep=RUN"
        )
    return prepare_stack(config, trained, progress=display.reading)


def _time_left(config: StackConfig, began: float) -> float | None:
    if config.time_limit_s is None:
        return None
    return max(0.0, config.time_limit_s - (time.monotonic() - began))


@contextmanager
def _executor(config: StackConfig, display: StackDisplay, *, verbose: bool) -> Iterator[Executor]:
    """Opens what runs the tasks, for the block, once there is room for one."""
    is_elsewhere = config.cluster.kind is ClusterKind.ray
    session = ray_session(config.cluster, verbose=verbose) if is_elsewhere else nullcontext()
    with ExitStack() as afterwards, session:
        if is_elsewhere:
            admit(config.cluster, num_cpus=config.cluster.cpus_per_worker or 1, say=display.say)
        executor = connect(config.max_slots, cluster=config.cluster, verbose=verbose)
        # What runs in a session of our own has ended with it by then.
        afterwards.callback(executor.close)
        yield executor
