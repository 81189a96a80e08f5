"""Launching `finetune` and `pretrain`: check everything, open the run, train it wherever it is to run."""

import shlex
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from graftstack.backbones.catalog import require_known
from graftstack.config.plain import to_plain, to_yaml
from graftstack.config.schema import ClusterConfig, ClusterKind, FinetuneConfig
from graftstack.errors import BadInputError, TrainingError
from graftstack.runs import MANIFEST, Manifest, Run, now, read_progress
from graftstack.storage import Folder, is_uri

# What YAML reads as true.
_TRUE = {"true", "yes", "on", "1"}

# How often other hosts are given a sign of life.
_BEAT_EVERY_S = 10.0


class Display(Protocol):
    """What a launch tells a person; every call may be ignored."""

    def reading(self, done: int, total: int) -> None:
        """Images decoded, of all."""
        ...

    def training(self, progress: dict[str, Any]) -> None:
        """The fields of `finetune.training.Progress`."""
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
    config, manifest, existing = check(job, config, overrides)
    if existing is not None and existing.manifest.status == "done":
        return existing

    from graftstack.finetune.task import prepare

    with _session(config, verbose=verbose):
        return _run(config, manifest, prepare(config, progress=display.reading), display, verbose=verbose)


def _session(config: FinetuneConfig, *, verbose: bool) -> AbstractContextManager[None]:
    """Connects to the cluster, where one is needed, and checks that the workers fit on it."""
    if not needs_group(config.cluster):
        return nullcontext()
    from graftstack.cluster.train import cluster_session

    return cluster_session(config, verbose=verbose)


def needs_group(cluster: ClusterConfig) -> bool:
    """Returns whether the job trains in processes of a cluster; otherwise it does in this one."""
    return cluster.kind is ClusterKind.ray or (cluster.kind is ClusterKind.local and cluster.max_workers > 1)


def _run(config: FinetuneConfig, manifest: Manifest, task: Any, display: Display, *, verbose: bool) -> Run:
    run = Run.start(config.runs_dir, manifest, resume=config.resume)
    run.folder.write("config.yaml", to_yaml(config).encode())
    try:
        outcome = _train(run, task, display, verbose=verbose)
    except KeyboardInterrupt:
        run.update(status="interrupted", error="interrupted")
        where = [f"runs_dir={config.runs_dir}"] if config.runs_dir != _absolute(FinetuneConfig.runs_dir) else []
        command = shlex.join(["graftstack", manifest.job, f"name={config.name}", "resume=true", *where])
        raise KeyboardInterrupt(f"interrupted; continue with: {command}") from None
    except BadInputError as error:  # met too late to leave no trace, e.g. by an image that is decoded for its batch
        run.update(status="failed", error=str(error))
        raise TrainingError(str(error)) from error
    except BaseException as error:
        run.update(status="failed", error=str(error) or type(error).__name__)
        raise
    run.folder.sweep()  # a worker that was lost may have been writing
    run.update(status="done", metrics=outcome.metrics, artifacts=outcome.artifacts, details=outcome.details)
    return run


class Checked(NamedTuple):
    """A job whose name, place and machine are in order; its data and model are yet to be looked at."""

    config: FinetuneConfig
    """With a name, and with absolute paths: a worker on another node has another working folder."""
    manifest: Manifest
    existing: Run | None
    """The run that is to be continued."""


def check(job: str, config: FinetuneConfig, overrides: Sequence[str]) -> Checked:
    """Checks what can be checked at once, without torch. Raises `BadInputError`."""
    require_known(config.backbone.name)
    config = _with_absolute_paths(replace(config, name=config.name or _default_name(job)))
    manifest = Manifest(
        job=job,
        name=str(config.name),
        status="running",
        config=to_plain(config),
        started=now(),
        overrides=[*overrides, *_path_overrides(config)],
    )
    existing = Run.check(config.runs_dir, manifest, resume=config.resume)
    is_done = existing is not None and existing.manifest.status == "done"
    # What a cluster has is known once it is connected to.
    if not is_done and config.cluster.kind is not ClusterKind.ray:
        from graftstack.cluster.resources import check_resources, machine_resources

        check_resources(config.cluster, machine_resources())
    return Checked(config, manifest, existing)


def saved_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns what the run to resume was started with, so that its name is all that a user repeats."""
    given = dict(override.partition("=")[::2] for override in overrides)
    if given.get("resume", "").lower() not in _TRUE or "name" not in given:
        return []
    folder = Folder(given.get("runs_dir", FinetuneConfig.runs_dir)) / given["name"]
    return Run.open(folder).manifest.overrides if folder.exists(MANIFEST) else []


def _train(run: Run, task: Any, display: Display, *, verbose: bool) -> Any:
    from graftstack.cluster import train

    config: FinetuneConfig = task.config
    beat = _Heartbeat(run)

    def on_progress(progress: Any) -> None:
        beat()
        display.training(progress._asdict())

    def poll() -> None:
        beat()
        if progress := read_progress(run.folder):
            display.training(progress)

    if needs_group(config.cluster):
        return train.train_in_group(config, run.folder, poll=poll, verbose=verbose)
    if config.cluster.kind is ClusterKind.inline:
        return train.train_inline(task, run.folder, on_progress)
    return train.train_in_process(task, run.folder, on_progress)


class _Heartbeat:
    def __init__(self, run: Run) -> None:
        self._run = run
        self._last = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last >= _BEAT_EVERY_S:
            self._run.beat()
            self._last = time.monotonic()


def _default_name(job: str) -> str:
    return f"{job}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def _with_absolute_paths(config: FinetuneConfig) -> FinetuneConfig:
    data = replace(config.data, path=_absolute(config.data.path), cache_dir=_absolute(config.data.cache_dir))
    weights = config.backbone.weights
    if Path(file := str(_absolute(weights))).is_file():
        weights = file
    return replace(
        config,
        data=data,
        backbone=replace(config.backbone, weights=weights),
        runs_dir=str(_absolute(config.runs_dir)),
    )


def _path_overrides(config: FinetuneConfig) -> list[str]:
    """What makes a resumption from another working folder find the same files."""
    paths = {
        "data.path": config.data.path,
        "data.cache_dir": config.data.cache_dir,
        "backbone.weights": config.backbone.weights,
    }
    return [f"{key}={value}" for key, value in paths.items() if value is not None]


def _absolute(location: str | None) -> str | None:
    if location is None or is_uri(location):
        return location
    return Folder(location).location
