"""What launching has in common for all jobs: a checked name and place, and a run folder that says how it ended."""

import logging
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any, Generic, NamedTuple, TypeVar

from graftstack.backbones.catalog import require_known
from graftstack.cluster.interrupting import interrupt_main
from graftstack.config.base_models import RUN_PREFIX, with_places
from graftstack.config.compose import quoted
from graftstack.config.meta import MetaConfig
from graftstack.config.plain import flatten, to_plain, to_yaml
from graftstack.config.schema import ClusterConfig, ClusterKind, JobConfig
from graftstack.config.space import full_key
from graftstack.config.stack import StackConfig, StackOptions
from graftstack.config.sweep import SweepConfig
from graftstack.errors import (
    BadInputError,
    ConfigError,
    GraftstackError,
    RunError,
    StorageUnreachableError,
    TrainingError,
)
from graftstack.runs import MANIFEST, Manifest, Run, Status, now
from graftstack.storage import Folder, is_uri

log = logging.getLogger(__name__)

# What YAML reads as true.
_TRUE = {"true", "yes", "on", "1"}

# Where the taps of a cluster lie unless it is said, below the runs; no name of a run begins with a dot.
_SHARED_TAPS = ".taps"

# How often other hosts are given a sign of life.
_BEAT_EVERY_S = 10.0

# How often a process on another host is looked for, and for how long: by then it is taken for gone, or has been heard.
_LOOK_EVERY_S = 2.0
_LOOK_FOR_S = 90.0

# How long Ray may take to end the processes of a driver that has left.
_WORKERS_END_S = 2.0

# What the key of a dictionary may consist of in an override, and what is escaped there.
_IN_KEY = re.compile(r"[\w/+.%*@?|\\()\[\]{}:=, \t-]+", flags=re.ASCII)
_ESCAPED_IN_KEY = re.compile(r"[\\()\[\]{}:=, \t]")

Config = TypeVar("Config", bound=JobConfig)


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
    given = replace(config, name=config.name or _default_name(job))
    config = with_absolute_paths(given)
    manifest = Manifest(
        job=job,
        name=str(config.name),
        status="running",
        config=to_plain(config),
        started=now(),
        overrides=_last_of_each_key([*overrides, *_path_overrides(config, given)]),
    )
    checked = Checked(config, manifest, Run.check(config.runs_dir, manifest, resume=config.resume))
    if not checked.is_done:
        _check_taps(config)
    # What a cluster has is known once it is connected to.
    if not checked.is_done and config.cluster.kind in (ClusterKind.inline, ClusterKind.local):
        from graftstack.cluster.resources import check_resources, machine_resources

        check_resources(config.cluster, machine_resources(config.cluster))
    return checked


def _check_taps(config: JobConfig) -> None:
    """Raises `ConfigError` where taps are to lie at a URI that can't be reached."""
    location = config.taps.location if isinstance(config, SweepConfig | StackOptions | MetaConfig) else None
    if location is not None and is_uri(location):
        try:
            Folder(location).names()
        except StorageUnreachableError as error:
            raise ConfigError(f"taps.location={error}") from error


def _last_of_each_key(overrides: Sequence[str]) -> list[str]:
    """Leaves out what is overridden later. Keys of a space stay in the order in which they first appear."""
    kept: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith("space"):
            kept.pop(key, None)
        kept[key] = override
    return list(kept.values())


def saved_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns what the run to resume was started with, so that its name is all that a user repeats."""
    given = dict(override.partition("=")[::2] for override in overrides)
    if given.get("resume", "").lower() not in _TRUE or "name" not in given:
        return []
    folder = Folder(given.get("runs_dir", JobConfig.runs_dir)) / given["name"]
    return Run.open(folder).manifest.overrides if folder.exists(MANIFEST) else []


def await_owner(config: JobConfig, *, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep) -> None:
    """Waits as long as a run may or may not be worked on by the process that its folder names, on another host.

    That is how a run looks whose host was lost a moment ago. A process that gives a sign of life is at work, as is one
    on this host: the wait is over, and `check` refuses the run.

    Args:
        config: Has a name.
        say: Is told why there is a wait.
        sleep: Passes the time between two looks, in seconds.
    """
    root = Folder(config.runs_dir) / str(config.name)
    # The parts of a pipeline are runs too.
    for folder in (root, *(root / name for name in root.names())):
        if folder.exists(MANIFEST):
            _await_silence(folder, say, sleep)


def _await_silence(folder: Folder, say: Callable[[str], None], sleep: Callable[[float], None]) -> None:
    owner: dict[str, Any] | None = None
    for _ in range(round(_LOOK_FOR_S / _LOOK_EVERY_S)):
        manifest = Run.open(folder).manifest
        if manifest.status != "running" or manifest.process["host"] == socket.gethostname():
            return
        if owner is None:
            owner = manifest.process
            say(
                f"{manifest.name}: process {owner['pid']} on {owner['host']} worked on it a moment ago; waiting until "
                "it has been silent for long enough to be gone"
            )
        elif manifest.process != owner:
            return
        sleep(_LOOK_EVERY_S)


def needs_group(cluster: ClusterConfig) -> bool:
    """Returns whether a training takes processes of a cluster; otherwise it runs in this one."""
    return cluster.kind is ClusterKind.ray or (cluster.kind is ClusterKind.local and cluster.max_workers > 1)


@contextmanager
def open_run(checked: Checked[Config]) -> Iterator[Run]:
    """Opens the run folder for the block, which is to set the manifest to done, and says there how else it ended.

    Whatever ends the process, the run stays resumable.

    Raises:
        RunError: another process began it since it was checked.
        TrainingError: bad input that was met too late to leave no trace, a store that is out of reach, or another
            process that took the run over.
        KeyboardInterrupt: it was interrupted; the message says how to continue.
    """
    config, manifest = checked.config, checked.manifest
    run = Run.start(config.runs_dir, manifest, resume=config.resume)
    if run.manifest.status == "done":
        raise RunError(
            f"name={config.name}: another process finished it a moment ago; read it with graftstack runs show"
        )
    try:
        run.folder.write("config.yaml", to_yaml(config).encode())
        yield run
    except KeyboardInterrupt:
        _say_how_it_ended(run, status="interrupted", error="interrupted")
        where = [f"runs_dir={config.runs_dir}"] if config.runs_dir != _absolute(JobConfig.runs_dir) else []
        command = shlex.join(["graftstack", manifest.job, f"name={config.name}", "resume=true", *where])
        raise KeyboardInterrupt(f"interrupted; continue with: {command}") from None
    except BadInputError as error:  # e.g. an image that is decoded for its batch
        _say_how_it_ended(run, status="failed", error=str(error))
        raise TrainingError(str(error)) from error
    except StorageUnreachableError as error:
        _say_how_it_ended(run, status="failed", error=str(error))
        raise TrainingError(f"{error}, then continue with resume=true") from error
    except BaseException as error:
        _say_how_it_ended(run, status="failed", error=str(error) or type(error).__name__)
        raise


@contextmanager
def tidied(checked: Checked[Config]) -> Iterator[None]:
    """Removes what workers were writing to the run when the block failed or was interrupted.

    To be entered before their cluster is connected to: they end with the connection, a moment later.
    """
    try:
        yield
    except BaseException:
        # The error itself is what the user is to see, and another Ctrl-C only cuts this short.
        with suppress(GraftstackError, OSError, KeyboardInterrupt):
            _tidy(checked.config)
        raise


def _tidy(config: JobConfig) -> None:
    folder = Folder(config.runs_dir) / str(config.name)
    if not Run.open(folder).is_ours:  # it never began, or somebody took it over
        return
    has_workers = config.cluster.kind is ClusterKind.ray or config.cluster.max_workers > 1
    if has_workers:
        time.sleep(_WORKERS_END_S)
    if Run.open(folder).is_ours:
        # Young files may be those of a process that is about to take the run over.
        folder.sweep(older_than_s=_WORKERS_END_S / 2 if has_workers else 0.0)


def _say_how_it_ended(run: Run, *, status: Status, error: str) -> None:
    """Says it in the manifest, unless that can't be written: then the run is one whose process is gone."""
    try:
        run.update(status=status, error=error)
    except (GraftstackError, OSError) as fault:  # the error itself is what the user is to see
        log.debug("%s: doesn't say how it ended (%s)", run.folder.location, fault)


def heartbeat(run: Run) -> Callable[[], None]:
    """Returns what is to be called often, and now and then shows other hosts that the run is worked on."""
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= _BEAT_EVERY_S:
            with suppress(StorageUnreachableError):  # whoever has something to write finds out too
                run.beat()
            last = time.monotonic()

    return beat


@contextmanager
def beating(run: Run) -> Iterator[None]:
    """Shows other hosts now and then that the run is worked on, for the block, which leaves the manifest alone.

    Raises `TrainingError`, amid the block if that can be interrupted: another process took the run over.
    """
    is_over, taken = Event(), list[TrainingError]()

    def beat() -> None:
        while not is_over.wait(_BEAT_EVERY_S):
            try:
                run.beat()
            except TrainingError as error:
                taken.append(error)
                interrupt_main()
                return
            except (GraftstackError, OSError) as error:  # whoever has something to write finds out too
                log.debug("%s: no sign of life (%s)", run.folder.location, error)

    thread = Thread(target=beat, daemon=True, name="heartbeat")
    try:
        try:
            thread.start()
            yield
        finally:
            is_over.set()
            if thread.is_alive():
                thread.join()
    except KeyboardInterrupt:
        if taken:
            raise taken[0] from None
        raise
    if taken:
        raise taken[0]


def _default_name(job: str) -> str:
    return f"{job}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def with_absolute_paths(config: Config) -> Config:
    """Returns a configuration in which local files, folders and runs have their whole paths."""
    data = replace(config.data, path=_absolute(config.data.path), cache_dir=_absolute(config.data.cache_dir))
    runs_dir = str(_absolute(config.runs_dir))
    backbone = replace(config.backbone, weights=_absolute_weights(config.backbone.weights, runs_dir))
    changes: dict[str, Any] = {"data": data, "backbone": backbone, "runs_dir": runs_dir}
    more: object = config
    if isinstance(more, SweepConfig | StackOptions | MetaConfig):
        location = _absolute(more.taps.location)
        if location is None and config.cluster.kind is ClusterKind.ray:
            # The cache is each node's own; where the runs lie, all nodes find what one of them made.
            location = Folder(runs_dir).path(_SHARED_TAPS)
        changes["taps"] = replace(more.taps, location=location)
    if isinstance(more, SweepConfig):
        changes["space"] = flatten(more.space) | _path_domains(more.space, runs_dir)
    if isinstance(more, StackOptions):
        changes["base_models"] = with_places(more.base_models, lambda weights: _absolute_weights(weights, runs_dir))
    if isinstance(more, StackConfig) and more.from_sweep is not None:
        changes["from_sweep"] = _absolute_run(more.from_sweep, runs_dir)
    return replace(config, **changes)


def _path_overrides(config: JobConfig, given: JobConfig) -> list[str]:
    """What makes a resumption from another working folder find the same files.

    Args:
        config: With absolute paths.
        given: As the user wrote it.
    """
    paths = {
        "data.path": config.data.path,
        "data.cache_dir": config.data.cache_dir,
        "backbone.weights": config.backbone.weights,
    }
    domains: dict[str, Any] = {}
    if isinstance(config, SweepConfig | StackOptions | MetaConfig):
        paths["taps.location"] = config.taps.location
    if isinstance(config, SweepConfig):
        domains = _path_domains(config.space, config.runs_dir)
    if isinstance(config, StackConfig):
        paths["from_sweep"] = config.from_sweep
    overrides = [
        *(f"{key}={value}" for key, value in paths.items() if value is not None),
        *(f"space.{name}=[{','.join(map(_in_override, values))}]" for name, values in domains.items()),
    ]
    if isinstance(config, StackOptions) and isinstance(given, StackOptions):
        entries = config.base_models
        if entries != given.base_models and all(_IN_KEY.fullmatch(key) for entry in entries for key in _keys(entry)):
            overrides.append(f"base_models={_in_override(entries)}")
    return overrides


def _keys(entry: Any) -> list[str]:
    return list(entry) if isinstance(entry, Mapping) else []


def _path_domains(space: Mapping[str, Any], runs_dir: str) -> dict[str, list[Any]]:
    """Returns the choices of those keys of a space whose values are files or runs, with absolute paths."""

    def weights(given: str) -> str:
        return _absolute_weights(given, runs_dir)

    by_key: dict[str, Callable[[Any], Any]] = {"data.path": _absolute, "backbone.weights": weights}
    found = {}
    for name, domain in flatten(space).items():
        if (absolute := by_key.get(full_key(name))) is not None:
            values = domain if isinstance(domain, list) else [domain]
            found[name] = [absolute(value) for value in values]
    return found


def _in_override(value: Any) -> str:
    """Returns a plain value as it stands in brackets in an override."""
    if isinstance(value, Mapping):
        items = (f"{_ESCAPED_IN_KEY.sub(_escape, key)}:{_in_override(item)}" for key, item in value.items())
        return f"{{{','.join(items)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_in_override, value))}]"
    if isinstance(value, str):
        return quoted(value)
    return "null" if value is None else str(value).lower()


def _escape(found: re.Match[str]) -> str:
    return f"\\{found[0]}"


def _absolute_weights(weights: str, runs_dir: str) -> str:
    """Returns a file or ``run:RUN`` with its whole path, and a name of published weights as it is."""
    if weights.startswith(RUN_PREFIX):
        return f"{RUN_PREFIX}{_absolute_run(weights.removeprefix(RUN_PREFIX), runs_dir)}"
    file = str(_absolute(weights))
    return file if Path(file).is_file() else weights


def _absolute_run(reference: str, runs_dir: str) -> str:
    """Returns the folder of a run; of one that there isn't, what it was called: who needs it complains of that."""
    if is_uri(reference):
        return reference
    places = (Folder(reference), Folder(runs_dir) / reference)
    return next((place.location for place in places if place.exists(MANIFEST)), reference)


def _absolute(location: str | None) -> str | None:
    if location is None or is_uri(location):
        return location
    return Folder(location).location
