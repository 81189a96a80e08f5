"""What launching has in common for all jobs: a checked name and place, and a run folder that says how it ended."""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from graftstack.backbones.catalog import require_known
from graftstack.config.compose import quoted
from graftstack.config.plain import flatten, to_plain, to_yaml
from graftstack.config.schema import ClusterConfig, ClusterKind, FinetuneConfig
from graftstack.config.space import full_key
from graftstack.config.sweep import SweepConfig
from graftstack.errors import BadInputError, TrainingError
from graftstack.runs import MANIFEST, Manifest, Run, now
from graftstack.storage import Folder, is_uri

# What YAML reads as true.
_TRUE = {"true", "yes", "on", "1"}

# How often other hosts are given a sign of life.
_BEAT_EVERY_S = 10.0


Config = TypeVar("Config", bound=FinetuneConfig)


class Checked(NamedTuple, Generic[Config]):
    """A job whose name, place and machine are in order; its data and model are yet to be looked at."""

    config: Config
    """With a name, and with absolute paths: a worker on another node has another working folder."""
    manifest: Manifest
    existing: Run | None
    """The run that is to be continued."""

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.existing is not None and self.existing.manifest.status == "done"


def check(job: str, config: Config, overrides: Sequence[str]) -> Checked[Config]:
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
    checked = Checked(config, manifest, Run.check(config.runs_dir, manifest, resume=config.resume))
    # What a cluster has is known once it is connected to.
    if not checked.is_done and config.cluster.kind is not ClusterKind.ray:
        from graftstack.cluster.resources import check_resources, machine_resources

        check_resources(config.cluster, machine_resources())
    return checked


def saved_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns what the run to resume was started with, so that its name is all that a user repeats."""
    given = dict(override.partition("=")[::2] for override in overrides)
    if given.get("resume", "").lower() not in _TRUE or "name" not in given:
        return []
    folder = Folder(given.get("runs_dir", FinetuneConfig.runs_dir)) / given["name"]
    return Run.open(folder).manifest.overrides if folder.exists(MANIFEST) else []


def needs_group(cluster: ClusterConfig) -> bool:
    """Returns whether a training takes processes of a cluster; otherwise it runs in this one."""
    return cluster.kind is ClusterKind.ray or (cluster.kind is ClusterKind.local and cluster.max_workers > 1)


@contextmanager
def open_run(checked: Checked[Config]) -> Iterator[Run]:
    """Opens the run folder for the block, which is to set the manifest to done, and says there how else it ended.

    Whatever ends the process, the run stays resumable.

    Raises:
        TrainingError: bad input that was met too late to leave no trace.
        KeyboardInterrupt: it was interrupted; the message says how to continue.
    """
    config, manifest = checked.config, checked.manifest
    run = Run.start(config.runs_dir, manifest, resume=config.resume)
    run.folder.write("config.yaml", to_yaml(config).encode())
    try:
        yield run
    except KeyboardInterrupt:
        run.update(status="interrupted", error="interrupted")
        where = [f"runs_dir={config.runs_dir}"] if config.runs_dir != _absolute(FinetuneConfig.runs_dir) else []
        command = shlex.join(["graftstack", manifest.job, f"name={config.name}", "resume=true", *where])
        raise KeyboardInterrupt(f"interrupted; continue with: {command}") from None
    except BadInputError as error:  # e.g. an image that is decoded for its batch
        run.update(status="failed", error=str(error))
        raise TrainingError(str(error)) from error
    except BaseException as error:
        run.update(status="failed", error=str(error) or type(error).__name__)
        raise


def heartbeat(run: Run) -> Callable[[], None]:
    """Returns what is to be called often, and now and then shows other hosts that the run is worked on."""
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= _BEAT_EVERY_S:
            run.beat()
            last = time.monotonic()

    return beat


def _default_name(job: str) -> str:
    return f"{job}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def _with_absolute_paths(config: Config) -> Config:
    data = replace(config.data, path=_absolute(config.data.path), cache_dir=_absolute(config.data.cache_dir))
    backbone = replace(config.backbone, weights=_absolute_if_file(config.backbone.weights))
    config = replace(config, data=data, backbone=backbone, runs_dir=str(_absolute(config.runs_dir)))
    if isinstance(config, SweepConfig):
        taps = replace(config.taps, location=_absolute(config.taps.location))
        config = replace(config, taps=taps, space=flatten(config.space) | _path_domains(config.space))
    return config


def _path_overrides(config: FinetuneConfig) -> list[str]:
    """What makes a resumption from another working folder find the same files."""
    paths = {
        "data.path": config.data.path,
        "data.cache_dir": config.data.cache_dir,
        "backbone.weights": config.backbone.weights,
    }
    domains: dict[str, Any] = {}
    if isinstance(config, SweepConfig):
        paths["taps.location"] = config.taps.location
        domains = _path_domains(config.space)
    return [
        *(f"{key}={value}" for key, value in paths.items() if value is not None),
        *(f"space.{name}=[{','.join(map(_in_list, values))}]" for name, values in domains.items()),
    ]


def _path_domains(space: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns the choices of those keys of a space whose values are files, with absolute paths."""
    by_key = {"data.path": _absolute, "backbone.weights": _absolute_if_file}
    found = {}
    for name, domain in flatten(space).items():
        if (absolute := by_key.get(full_key(name))) is not None:
            values = domain if isinstance(domain, list) else [domain]
            found[name] = [absolute(value) for value in values]
    return found


def _in_list(value: str | None) -> str:
    return "null" if value is None else quoted(value)


def _absolute_if_file(weights: str) -> str:
    file = str(_absolute(weights))
    return file if Path(file).is_file() else weights


def _absolute(location: str | None) -> str | None:
    if location is None or is_uri(location):
        return location
    return Folder(location).location
