"""Launching `finetune` and `pretrain`: check everything, open the run, train it wherever it is to run."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from graftstack.cluster.launching import check, heartbeat, needs_group, open_run, tidied
from graftstack.config.schema import ClusterKind, FinetuneConfig
from graftstack.runs import Run, read_progress


class Display(Protocol):
    """What a launch tells a person; every call may be ignored."""

    def reading(self, done: int, total: int) -> None:
        """Images decoded, of all."""
        ...

    def training(self, progress: dict[str, Any]) -> None:
        """The fields of `finetune.training.Progress`."""
        ...

    def say(self, text: str) -> None:
        """A line worth reading."""
        ...


def launch(
    job: str, config: FinetuneConfig, *, overrides: Sequence[str], display: Display, verbose: bool = False
) -> Run:
    """Runs a training to its end and returns its run; a run that is done already is returned as it is.

    Whatever ends the process, the run folder stays resumable. Errors before the start leave no folder behind.

    Raises:
        BadInputError: what the user gave can't be run.
        GraftstackError: the training failed; the manifest says so too.
        KeyboardInterrupt: it was interrupted; the manifest says so too.
    """
    checked = check(job, config, overrides)
    if checked.is_done:
        assert checked.existing is not None
        return checked.existing

    from graftstack.finetune.task import prepare

    with tidied(checked), _session(checked.config, display, verbose=verbose) as num_cpus:
        task = prepare(checked.config, progress=display.reading)
        with open_run(checked) as run:
            outcome = _train(run, task, display, num_cpus, verbose=verbose)
            run.folder.sweep()  # a worker that was lost may have been writing
            run.update(status="done", metrics=outcome.metrics, artifacts=outcome.artifacts, details=outcome.details)
    return run


def _session(config: FinetuneConfig, display: Display, *, verbose: bool) -> AbstractContextManager[int | None]:
    """Connects to the cluster, where one is needed, and waits for room for the workers; yields the CPUs of each."""
    if not needs_group(config.cluster):
        return nullcontext()
    from graftstack.cluster.train import cluster_session

    return cluster_session(config, say=display.say, verbose=verbose)


def _train(run: Run, task: Any, display: Display, num_cpus: int | None, *, verbose: bool) -> Any:
    from graftstack.cluster import train

    config: FinetuneConfig = task.config
    beat = heartbeat(run)

    def on_progress(progress: Any) -> None:
        beat()
        display.training(progress._asdict())

    def poll() -> None:
        beat()
        if progress := read_progress(run.folder):
            display.training(progress)

    if num_cpus is not None:
        return train.train_in_group(config, run.folder, num_cpus=num_cpus, poll=poll, verbose=verbose, say=display.say)
    if config.cluster.kind is ClusterKind.inline:
        return train.train_inline(task, run.folder, on_progress)
    return train.train_in_process(task, run.folder, on_progress)
