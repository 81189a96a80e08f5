"""Training a task on Ray Train: in this process for one worker, else in a group of worker processes."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from graftstack.cluster.admission import admit
from graftstack.cluster.patience import Patience, needed_by
from graftstack.cluster.resources import cpus_per_worker, most_workers, needs_of, node_slots
from graftstack.cluster.session import quiet_ray, ray_session
from graftstack.cluster.worker import RayWorker
from graftstack.config.schema import ClusterConfig, FinetuneConfig
from graftstack.errors import GraftstackError, StorageFullError, TrainingError
from graftstack.finetune.job import Outcome, train_rank
from graftstack.finetune.tapping import open_tap
from graftstack.finetune.task import Task, prepare
from graftstack.finetune.training import Progress
from graftstack.machine import usable_cpus
from graftstack.reason import reason
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder
from graftstack.taps.key import TapSpec
from graftstack.taps.store import TapStore
from graftstack.taps.tap import TapMissingError

log = logging.getLogger(__name__)

# How often the driver looks at what the workers wrote of their progress.
_POLL_S = 0.5


@dataclass(frozen=True)
class _Share:
    """What each worker of a group is sent: plain values that pickle small."""

    config: FinetuneConfig
    location: str
    num_threads: int
    verbose: bool
    tap: tuple[TapStore, TapSpec] | None = None
    """What the frozen groups make of the images, where that is stored."""


class GroupStop(threading.Event):
    """Ends a group from another thread."""

    def check(self) -> None:
        """Raises `KeyboardInterrupt` once the group is to end."""
        if self.is_set():
            raise KeyboardInterrupt


def device_of(config: FinetuneConfig) -> torch.device:
    """Returns the device of a training in this process."""
    return torch.device("cuda" if config.cluster.gpus_per_worker > 0 else "cpu")


def train_inline(task: Task, folder: Folder, on_progress: Callable[[Progress], None]) -> Outcome:
    """Trains in this process, without Ray."""
    torch.set_num_threads(task.config.cluster.own_threads(usable_cpus()))
    return train_rank(task, LocalWorker(device_of(task.config)), folder, on_progress=on_progress)


def train_in_process(task: Task, folder: Folder, on_progress: Callable[[Progress], None]) -> Outcome:
    """Trains as Ray Train's only worker, in this process: no worker group, no processes to start."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    quiet_ray()
    result = TorchTrainer(
        lambda: train_inline(task, folder, on_progress),
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(name=folder.name),
    ).fit()
    outcome: Outcome = result.return_value
    return outcome


@contextmanager
def cluster_session(config: FinetuneConfig, *, say: Callable[[str], None], verbose: bool) -> Iterator[int]:
    """Connects to Ray and waits for room for the group, before anything of the job has begun. Raises as `admit`.

    Yields:
        The CPUs of each worker.
    """
    with ray_session(config.cluster, verbose=verbose):
        num_cpus = cpus_per_worker(config.cluster)
        admit(config.cluster, num_cpus=num_cpus, say=say)
        yield num_cpus


def train_in_group(
    config: FinetuneConfig,
    folder: Folder,
    *,
    num_cpus: int,
    poll: Callable[[], None],
    verbose: bool,
    say: Callable[[str], None] = lambda _: None,
    tap: tuple[TapStore, TapSpec] | None = None,
) -> Outcome:
    """Trains with several workers, each a process of the connected cluster, and calls `poll` while they work.

    A worker that is lost is replaced and the group continues from its last checkpoint, `cluster.max_failures` times.

    Args:
        config: The training.
        folder: Of its run.
        num_cpus: CPUs, and so threads, of each worker.
        poll: Called now and then; may raise to end the group.
        verbose: Whether Ray's own loggers speak.
        say: Is told what the group waits for where nodes are gone.
        tap: What the frozen groups make of the images, where that is stored.

    Raises:
        TrainingError: the training failed, too many workers were lost, or the cluster had no room for the group for
            `cluster.max_wait_s`.
    """
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    cluster = config.cluster
    records = folder / ".ray"
    place = records.for_arrow()
    most = min(cluster.max_workers, most_workers(cluster, num_cpus))
    trainer = TorchTrainer(
        _train_share,
        train_loop_config={"share": _Share(config, folder.location, num_cpus, verbose, tap)},
        scaling_config=ScalingConfig(
            num_workers=most if cluster.min_workers == most else (cluster.min_workers, most),
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=needs_of(cluster, num_cpus),
        ),
        run_config=RunConfig(
            # Ray resumes a name it has seen from its own records; ours are the only truth, so each fit is new.
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=place.path,
            storage_filesystem=place.filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    try:
        result = _fit(trainer, _waiting(cluster, num_cpus, poll, say))
    except TrainingFailedError as error:
        raise _cause_of(error) from error
    except RayActorError as error:  # the group's controller
        raise TrainingError(
            f"the process that leads the workers is gone ({reason(error)}); go on with resume=true"
        ) from error
    finally:
        records.remove_all()
    outcome: Outcome | GraftstackError = result.return_value
    if isinstance(outcome, GraftstackError):
        raise outcome
    return outcome


def _train_share(settings: dict[str, Any]) -> Outcome | GraftstackError:
    """Runs in each worker. An error that a restart would only repeat is returned: raised, it would be retried."""
    share: _Share = settings["share"]
    torch.set_num_threads(share.num_threads)
    if not share.verbose:
        quiet_ray()
    task = prepare(share.config)
    if share.tap is not None:
        task = _tapped(task, *share.tap)
    try:
        return train_rank(task, RayWorker(), Folder(share.location))
    except (TrainingError, StorageFullError) as error:
        return error


def _waiting(
    cluster: ClusterConfig, num_cpus: int, poll: Callable[[], None], say: Callable[[str], None]
) -> Callable[[], None]:
    """Returns a `poll` that ends a group for which the nodes that are left have no room, and none come in time."""
    patience = Patience(cluster.max_wait_s, needed_by(cluster, cluster.min_workers, num_cpus), say)

    def poll_and_look() -> None:
        poll()
        if node_slots(cluster, num_cpus) >= cluster.min_workers:
            patience.renew()
        patience.check()

    return poll_and_look


def _tapped(task: Task, store: TapStore, spec: TapSpec) -> Task:
    """Returns the task with its tap, or as it is on a node that doesn't reach the tap."""
    try:
        return replace(task, tap=open_tap(task, store, spec))
    except TapMissingError as error:
        log.warning("%s; this worker begins with the images; choose a taps.location that all nodes reach", error)
        return task


def _fit(trainer: Any, poll: Callable[[], None]) -> Any:
    """Runs ``trainer.fit()`` in a thread, so that this one can show progress and be interrupted."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            results.append(trainer.fit())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit, name="graftstack-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        poll()
    if errors:
        raise errors[0]
    return results[0]


def _cause_of(error: BaseException) -> GraftstackError:
    """Returns the error of graftstack's own that made Ray Train fail, or one that quotes Ray's."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, GraftstackError):
            return cause
    last = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return TrainingError(f"the workers failed: {last.strip()}; run again with -v to see their logs, then resume=true")
