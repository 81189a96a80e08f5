"""Trainings that were done before, as base models of a stack: the best trials of a sweep, and runs by their name."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftstack.config.base_models import RUN_PREFIX
from graftstack.config.compose import known_to
from graftstack.config.jobs import JOBS
from graftstack.config.plain import from_plain
from graftstack.config.schema import FinetuneConfig
from graftstack.config.space import full_key, trial_config
from graftstack.config.stack import StackConfig
from graftstack.config.sweep import SweepConfig
from graftstack.errors import ConfigError, RunError, StorageUnreachableError
from graftstack.reason import reason
from graftstack.runs import Run, find_run

if TYPE_CHECKING:  # the command line answers before scikit-learn is loaded
    from graftstack.stacking.bases import TrainedBase
    from graftstack.sweep.trials import TrialResult

# What a stack doesn't take over from its sweep: where and how long that ran, and what it is called.
_OWN = ("name", "runs_dir", "resume", "time_limit_s", "cluster", "checkpoint", "early_stop")


def trained_bases(config: StackConfig) -> "list[TrainedBase]":
    """Returns the base models that `from_sweep` and ``run:RUN`` name.

    Raises:
        RunError: there is no such run, it is of another job, or it has no trial that ended with a model.
    """
    found = [] if config.from_sweep is None else best_trials(config.from_sweep, config.runs_dir, top=config.top)
    return [*found, *trained_runs(config)]


def trained_runs(config: StackConfig) -> "list[TrainedBase]":
    """Returns the base models that ``run:RUN`` names. Raises `RunError` as `trained_bases`."""
    runs = [entry for entry in config.entries[0] if entry.kind.startswith(RUN_PREFIX)]
    return [_of_run(entry.name, entry.kind.removeprefix(RUN_PREFIX), config.runs_dir) for entry in runs]


def best_trials(reference: str, runs_dir: str, *, top: int) -> "list[TrainedBase]":
    """Returns the `top` trials of a sweep with the highest accuracy, of equal ones those with the lowest loss."""
    from graftstack.sweep.ledger import Ledger
    from graftstack.sweep.trials import best_first

    run = _sweep(reference, runs_dir)
    sweep = _config_of(run)
    assert isinstance(sweep, SweepConfig)
    trials = run.folder / "trials"
    best = best_first(Ledger(trials).read().values())[:top]
    if not best:
        raise RunError(f"from_sweep={reference}: none of its trials ended with a model; run the sweep first")
    return [_of_trial(row, trial_config(sweep, row.params), (trials / f"{row.index:05d}").location) for row in best]


def _of_trial(row: "TrialResult", config: FinetuneConfig, folder: str) -> "TrainedBase":
    from graftstack.stacking.bases import TrainedBase

    # One that was stopped, or ended early, hasn't seen the whole schedule.
    is_whole = row.status == "done" and config.epochs == row.epochs == row.details.get("best_epoch")
    return TrainedBase(name=f"trial-{row.index}", config=config, folder=folder if is_whole else None)


def inherited_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns what a stack takes over from the sweep that it is made of: its data, its backbone, its seed.

    A key of the data that varied in the sweep says nothing of its trials.
    """
    given = dict(override.partition("=")[::2] for override in overrides)
    if "from_sweep" not in given:
        return []
    run = _sweep(given["from_sweep"], given.get("runs_dir", FinetuneConfig.runs_dir))
    varied = {full_key(name) for name in run.manifest.config.get("space", {})}
    return [
        override
        for override in known_to("stack", run.manifest.overrides)
        if (key := override.partition("=")[0]).partition(".")[0] not in _OWN
        and not (key in varied and key.startswith("data."))
    ]


def _sweep(reference: str, runs_dir: str) -> Run:
    try:
        run = find_run(reference, runs_dir)
    except (RunError, StorageUnreachableError) as error:
        raise RunError(f"from_sweep={error}") from error
    if run.manifest.job == "pipeline":
        run = Run.open(run.folder / "sweep")
    if run.manifest.job != "sweep":
        raise RunError(f"from_sweep={reference}: a {run.manifest.job} run; give a sweep, or use base_models=[run:RUN]")
    return run


def _config_of(run: Run) -> FinetuneConfig:
    """Returns the configuration that a run was started with; its paths are whole."""
    try:
        config = from_plain(JOBS[run.manifest.job], run.manifest.config)
    except (ConfigError, ValueError, TypeError) as error:
        raise RunError(f"{run.folder.location}: no readable configuration ({reason(error)}); run it anew") from error
    assert isinstance(config, FinetuneConfig)
    return config


def _of_run(name: str, reference: str, runs_dir: str) -> "TrainedBase":
    try:
        run = find_run(reference, runs_dir)
    except (RunError, StorageUnreachableError) as error:
        raise RunError(f"{RUN_PREFIX}{error}") from error
    if run.manifest.job not in ("finetune", "pretrain"):
        raise RunError(
            f"{RUN_PREFIX}{run.manifest.name}: a {run.manifest.job} run; a base model is a finetune run, of a sweep "
            "use from_sweep=RUN"
        )
    from graftstack.stacking.bases import TrainedBase

    config, details, folder = _config_of(run), run.manifest.details, run.artifact("model")
    is_whole = config.epochs == details.get("num_epochs") == details.get("best_epoch")
    return TrainedBase(name=name, config=config, folder=folder if is_whole else None)
