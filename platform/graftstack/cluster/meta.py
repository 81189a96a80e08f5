"""Launching `meta`: check everything, open the run, train and measure wherever it is to run."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Protocol

from graftstack.cluster.admission import admit
from graftstack.cluster.finetune import Display
from graftstack.cluster.launching import beating, check, needs_group, open_run
from graftstack.cluster.resources import cpus_per_worker, most_workers
from graftstack.cluster.session import ray_session
from graftstack.config.meta import MetaConfig
from graftstack.config.schema import ClusterKind
from graftstack.machine import usable_cpus
from graftstack.runs import Run

if TYPE_CHECKING:
    from graftstack.data.images import Images
    from graftstack.meta.crew import Crew
    from graftstack.meta.job import Listener
    from graftstack.meta.model import MetaModel
    from graftstack.meta.plan import MetaPlan
    from graftstack.meta.tapped import TappedFeatures
    from graftstack.meta.task import MetaTask
    from graftstack.meta.training import MetaProgress


# Images take no more of a node's object store than this share: parameters and gradients pass through it too.
_SHARE_OF_STORE = 0.5

# Nobody is told of a wait shorter than this, in seconds: workers always take a while to start.
_LONG_WAIT_S = 10.0


class MetaDisplay(Display, Protocol):
    """What the launch of a meta-training tells a person."""

    def episodes(self, progress: "MetaProgress") -> None:
        """Where the training stands."""
        ...

    def tapping(self, done: int, total: int) -> None:
        """Shards of the tap made, of all."""
        ...

    def evaluating(self, done: int, total: int) -> None:
        """Held-out episodes scored, of all."""
        ...


def launch_meta(config: MetaConfig, *, overrides: Sequence[str], display: MetaDisplay, verbose: bool = False) -> Run:
    """Runs a meta-training to its end and returns its run; a run that is done already is returned as it is.

    Whatever ends the process, the run folder stays resumable. Errors before the start leave no folder behind.

    Raises:
        BadInputError: what the user gave can't be run.
        GraftstackError: the training failed; the manifest says so too.
        KeyboardInterrupt: it was interrupted; the manifest says so too.
    """
    checked = check("meta", config, overrides)
    if checked.is_done:
        assert checked.existing is not None
        return checked.existing

    from graftstack.meta.job import Listener, MetaJob
    from graftstack.meta.task import prepare_meta

    task = prepare_meta(checked.config, progress=display.reading)
    model = _model(task)
    if hint := _idle_cpus(checked.config):
        display.say(hint)
    with _crew(task, display, verbose=verbose) as crew, open_run(checked) as run:
        listener = Listener(display.episodes, display.evaluating, _Waiting(crew, display))
        with beating(run), _known_features(task, model, crew, listener, display) as features:
            outcome = MetaJob(task, model, crew, run.folder, features_of=features, listener=listener).run()
        run.folder.sweep()
        run.update(
            status="done",
            metrics=outcome.metrics,
            artifacts=outcome.artifacts,
            details=outcome.details | (features.details if features else {}),
            results=outcome.results,
        )
    return run


def _known_features(
    task: "MetaTask", model: "MetaModel", crew: "Crew", listener: "Listener", display: MetaDisplay
) -> "AbstractContextManager[TappedFeatures | None]":
    """Opens the tap of a backbone that nobody trains; None where there is none to read."""
    if task.config.num_episodes:
        return nullcontext()
    from graftstack.meta.tapped import tapped_features

    state = model.initial(task.backbone)
    return tapped_features(task, state, crew, tell=display.tapping, say=display.say, poll=listener.poll)


def plan_meta(config: MetaConfig, *, overrides: Sequence[str], display: MetaDisplay) -> "MetaPlan":
    """Checks a meta-training and returns what it would do; goes through a few episodes, to see how long they take."""
    from graftstack.meta.inline import inline_crew
    from graftstack.meta.plan import plan_of
    from graftstack.meta.task import prepare_meta

    checked = check("meta", config, overrides)
    task = prepare_meta(checked.config, progress=display.reading)
    return plan_of(task, _model(task), inline_crew(task))


def _idle_cpus(config: MetaConfig) -> str | None:
    """Returns how more workers would help, where each has one thread and CPUs are left over."""
    num_workers, num_cpus = config.cluster.max_workers, config.cluster.cpus_of(usable_cpus())
    most = min(num_cpus, config.num_blocks)
    if config.cluster.kind is not ClusterKind.local or config.num_threads(num_cpus) > 1 or most <= num_workers:
        return None
    return (
        f"{num_workers} of {num_cpus} CPUs at work; cluster.num_workers={most} shares out each step and ends in the "
        "same meta-parameters"
    )


class _Waiting:
    """Says what a crew waits for, once, where nothing has gone on for long."""

    def __init__(self, crew: "Crew", display: MetaDisplay) -> None:
        self._crew = crew
        self._display = display
        self._since: float | None = None
        self._said: str | None = None

    def __call__(self, _num_done: int) -> None:
        reason = self._crew.waiting_for
        if reason is None:
            self._since = self._said = None
            return
        if self._since is None:
            self._since = time.monotonic()
        if time.monotonic() - self._since >= _LONG_WAIT_S and reason != self._said:
            self._display.say(f"waiting for {reason}")
            self._said = reason


@contextmanager
def _crew(task: "MetaTask", display: MetaDisplay, *, verbose: bool) -> "Iterator[Crew]":
    """Opens what goes through the episodes, for the block: this process, or several of a cluster."""
    cluster = task.config.cluster
    if not needs_group(cluster):
        from graftstack.meta.inline import inline_crew

        yield inline_crew(task)
        return
    with ray_session(cluster, verbose=verbose):
        import torch

        from graftstack.cluster.crew import RayCrew
        from graftstack.meta.runner import EpisodeRunner, RunnerSettings

        num_threads = task.config.num_threads(cpus_per_worker(cluster))
        # The others join the first one once there is room for them.
        admit(cluster, num_cpus=num_threads, at_once=1, say=display.say)
        # What this process computes itself is to be the same on any number of workers too.
        torch.set_num_threads(num_threads)
        settings = RunnerSettings(
            config=task.config,
            classes=task.classes,
            images=_shared_images(task),
            preprocessing=task.preprocessing,
            device="cuda" if cluster.gpus_per_worker else "cpu",
        )
        crew = RayCrew(
            partial(EpisodeRunner, settings),
            num_workers=min(cluster.max_workers, most_workers(cluster, num_threads)),
            num_cpus=num_threads,
            num_gpus=cluster.gpus_per_worker,
            num_threads=num_threads,
            max_losses=cluster.max_failures,
            patience_s=cluster.max_wait_s,
            verbose=verbose,
        )
        try:
            yield crew
        finally:
            crew.close()


def _shared_images(task: "MetaTask") -> "Images":
    """Returns the images as one array, which each node holds once, unless they are too large for that.

    Then each process reads them from the file that the decoded images are kept in, which all nodes are to see.
    """
    import ray

    from graftstack.data.images import in_memory

    images = task.data.images
    num_bytes = len(images) * images.image_size**2 * 3
    rooms = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
    return in_memory(images) if num_bytes <= _SHARE_OF_STORE * min(rooms, default=0.0) else images


def _model(task: "MetaTask") -> "MetaModel":
    import torch

    from graftstack.meta.model import MetaModel

    return MetaModel(
        task.config,
        image_size=task.preprocessing.image_size,
        num_classes=len(task.classes.train),
        device=torch.device("cpu"),
    )
