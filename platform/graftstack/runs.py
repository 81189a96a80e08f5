"""The run folder: one execution of a job, readable at any moment, whatever was killed.

``run.json`` (the manifest) and ``progress.json`` are rewritten atomically; everything else in the folder is named by
the manifest's `artifacts`.
"""

import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from graftstack import owners
from graftstack.config.plain import flatten
from graftstack.errors import RunError, TrainingError, did_you_mean
from graftstack.storage import Folder, is_uri

log = logging.getLogger(__name__)

Status = Literal["running", "done", "failed", "interrupted"]

MANIFEST = "run.json"
PROGRESS = "progress.json"

# Keys that say where and how often to run, not what to compute: they may differ between a run and its resumption.
_FREE_KEYS = (
    *("resume", "runs_dir", "cluster.", "checkpoint.", "name", "data.cache_dir", "data.cache_bytes"),
    *("reuse", "taps.location", "taps.budget_bytes", "max_concurrent_trials", "max_slots", "time_limit_s"),
    # A stack knows each finished task by all that it depends on: base models may join and leave.
    *("base_models", "top", "meta_model", "calibration", "on_error"),
)

# Keys that users make up: here one that is missing means something.
_OWN_KEYS = ("space.",)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``graftstack runs show RUN --json`` prints."""

    job: str
    name: str
    status: Status
    config: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    started: str
    """UTC, ISO 8601."""
    seconds: float = 0.0
    """Time spent, over all resumptions."""
    artifacts: dict[str, str] = field(default_factory=dict)
    """What the run made, by name; paths relative to the run folder."""
    overrides: list[str] = field(default_factory=list)
    """The configuration as the user wrote it; a resumption starts from it."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else is worth knowing of this job, e.g. skipped images."""
    results: dict[str, Any] = field(default_factory=dict)
    """What a finished job found, by the names that its kind of job gives it, e.g. the trials of a sweep."""
    error: str | None = None
    process: dict[str, Any] = field(default_factory=dict)
    """Host and process that work on the run, when that was last heard of, and how often the run was resumed."""


# What a manifest that was read must hold; damage that is still JSON is damage too.
_TYPES = {
    **dict.fromkeys(("job", "name", "status", "started"), str),
    **dict.fromkeys(("config", "metrics", "artifacts", "details", "results", "process"), dict),
    "seconds": int | float,
    "overrides": list,
    "error": str | None,
}


class Run:
    """An open run folder; its owner is the one process that may change the manifest."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._since = time.monotonic()
        self._seconds_before = manifest.seconds

    @classmethod
    def start(cls, runs_dir: str, manifest: Manifest, *, resume: bool) -> "Run":
        """Opens a new run folder, or the one to continue, for this process to own; of several that try, one does.

        Raises `RunError`.
        """
        while (run := cls.check(runs_dir, manifest, resume=resume)) is not None and run.manifest.status != "done":
            if run.take_over(manifest):
                return run
        if run is None:
            folder = Folder(runs_dir) / manifest.name
            run = cls(folder, replace(manifest, process=owners.this_process(resumption=0)))
            folder.claim(MANIFEST, run._json())
        return run

    @classmethod
    def check(cls, runs_dir: str, manifest: Manifest, *, resume: bool) -> "Run | None":
        """Returns the run to continue, or None if a new one can be started. Changes nothing.

        Raises:
            RunError: the name is taken, another process works on the run, its configuration is another one, or the
                folder can't be written.
        """
        folder = Folder(runs_dir) / manifest.name
        if not folder.exists(MANIFEST):
            if folder.names():
                raise RunError(f"name={manifest.name}: {folder.location} exists and is no run; choose another name")
            _check_writable(Folder(runs_dir))
            return None
        if not resume:
            raise RunError(
                f"name={manifest.name}: a run of that name exists in {runs_dir}; choose another name, "
                "or pass resume=true to continue it"
            )
        run = cls.open(folder)
        if run.manifest.status == "running":
            raise owners.in_use(manifest.name, run.manifest.process)
        _check_same(run.manifest, manifest)
        return run

    @classmethod
    def open(cls, folder: Folder) -> "Run":
        """Reads a run folder. A run whose process is gone reads as interrupted. Raises `RunError`."""
        try:
            manifest = Manifest(**json.loads(folder.read(MANIFEST)))
            _check_types(vars(manifest), _TYPES)
            if manifest.process:
                owners.check_process(manifest.process)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"{folder.location}: holds no readable {MANIFEST}; name another run") from error
        if manifest.status == "running" and owners.is_gone(manifest.process):
            manifest = replace(manifest, status="interrupted")
        return cls(folder, manifest)

    def take_over(self, wanted: Manifest) -> bool:
        """Makes this process the owner of a run that has none, with the settings of `wanted`.

        Returns:
            False: another process became the owner since the manifest was read.

        Raises:
            RunError: another process is about to, or nothing can be written.
        """
        before = self.manifest.process
        first = int(before.get("resumption", 0))
        try:
            number = owners.claim(self.folder, self.manifest.name, first + 1)
        except RunError:
            if self._stored_owner() == before:
                raise
            return False
        try:
            if self._stored_owner() != before:
                return False
            self.folder.sweep()
            self._write(
                status="running",
                error=None,
                config=wanted.config,
                overrides=wanted.overrides,
                process=owners.this_process(resumption=number),
            )
            for old in range(max(first, 1), number):  # what was left by processes that ended amid a resumption
                owners.release(self.folder, old)
        finally:
            owners.release(self.folder, number)
        return True

    @property
    def is_ours(self) -> bool:
        """Whether this process owns the run, or was the last to."""
        process = self.manifest.process
        return owners.is_same(process, owners.this_process(resumption=int(process.get("resumption", 0))))

    def beat(self) -> None:
        """Gives a sign of life, which other hosts go by. Raises `TrainingError` as `update`."""
        self.update(process=self.manifest.process | {"beat": time.time()})

    def update(self, **changes: Any) -> None:
        """Rewrites the manifest with `changes` and the time spent.

        Raises:
            TrainingError: another process took the run over, as this one had been silent for too long.
        """
        self._check_owner()
        self._write(**changes)

    def artifact(self, name: str) -> str:
        """Returns the location of an artifact. Raises `RunError` if the run hasn't made it."""
        try:
            return self.folder.path(self.manifest.artifacts[name])
        except KeyError:
            raise RunError(
                f"{self.manifest.name}: the run is {self.manifest.status} and has no {name}; finish it with resume=true"
            ) from None

    def _write(self, **changes: Any) -> None:
        seconds = self._seconds_before + time.monotonic() - self._since
        self.manifest = replace(self.manifest, seconds=round(seconds, 3), **changes)
        self.folder.write(MANIFEST, self._json())

    def _check_owner(self) -> None:
        owner = self._stored_owner()
        if owner is not None and not owners.is_same(owner, self.manifest.process):
            raise TrainingError(
                f"name={self.manifest.name}: another process took over the run ({owner.get('pid')} on "
                f"{owner.get('host')}), as this one gave no sign of life; let that one finish it"
            )

    def _stored_owner(self) -> dict[str, Any] | None:
        """Returns the owner that the folder names by now; None where it holds no readable manifest any more."""
        try:
            return Run.open(self.folder).manifest.process
        except RunError as error:
            log.debug("%s", error)
            return None

    def _json(self) -> bytes:
        return json.dumps(asdict(self.manifest), indent=2, sort_keys=True).encode()


def find_run(reference: str, runs_dir: str) -> Run:
    """Opens the run named or located by `reference`: a name under `runs_dir`, or a path or URI of a run folder."""
    if is_uri(reference) or (Path(reference) / MANIFEST).exists():
        return Run.open(Folder(reference))
    folder = Folder(runs_dir) / reference
    if not folder.exists(MANIFEST):
        names = _run_names(Folder(runs_dir))
        hint = did_you_mean(reference, names) if names else "it holds no runs; choose another runs_dir"
        raise RunError(f"{reference}: no such run in {runs_dir}; {hint}")
    return Run.open(folder)


def list_runs(runs_dir: str) -> list[Run]:
    """Returns the runs of a folder, oldest first; warns of those that can't be read."""
    root = Folder(runs_dir)
    if root.is_local and Path(root.location).is_file():
        raise RunError(f"runs_dir={root.location}: a file, not a folder; choose another runs_dir")
    runs = root.of_each(_run_names(root), lambda name: _readable(root / name))
    return sorted(filter(None, runs), key=lambda run: run.manifest.started)


def read_progress(folder: Folder) -> dict[str, Any] | None:
    """Returns what a running job last said of its progress, or None."""
    with suppress(OSError, ValueError):
        progress: dict[str, Any] = json.loads(folder.read(PROGRESS))
        return progress
    return None


def now() -> str:
    """Returns the current time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _run_names(root: Folder) -> list[str]:
    names = root.names()
    are_runs = root.of_each(names, lambda name: root.exists(f"{name}/{MANIFEST}"))
    return [name for name, is_run in zip(names, are_runs, strict=True) if is_run]


def _readable(folder: Folder) -> Run | None:
    """Opens a run, or warns that it can't be read and returns None."""
    try:
        return Run.open(folder)
    except RunError as error:
        log.warning("%s", error)
        return None


def _check_types(values: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raises `TypeError` where a value that was read isn't of its type."""
    for key, kind in types.items():
        if not isinstance(values[key], kind):
            raise TypeError(f"{key}: {values[key]!r}")


def _check_writable(root: Folder) -> None:
    if obstacle := root.obstacle():
        raise RunError(f"runs_dir={root.location}: {obstacle} can't be written; choose another runs_dir")


def _check_same(old: Manifest, new: Manifest) -> None:
    if old.job != new.job:
        raise RunError(f"name={new.name}: is a {old.job} run; resume it with the {old.job} job")
    before, after = flatten(old.config), flatten(new.config)
    for key in sorted(before.keys() & after.keys()):  # a key that only one version knows says nothing
        if not key.startswith(_FREE_KEYS) and before[key] != after[key]:
            raise RunError(
                f"{key}={after[key]}: run {new.name} was started with {before[key]}; leave the key out to "
                "continue it, or choose another name"
            )
    for key in sorted(before.keys() ^ after.keys()):
        if key.startswith(_OWN_KEYS):
            started = "without" if key in after else "with"
            remedy = "leave it out" if key in after else "give it"
            raise RunError(
                f"{key}={(before | after)[key]}: run {new.name} was started {started} it; {remedy} to continue the "
                "run, or choose another name"
            )
