"""The configuration of a sweep: a fine-tuning, the space of its variations, and how to go through them."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from graftstack.config.checks import above, at_least, at_most, fraction
from graftstack.config.schema import CheckpointConfig, FinetuneConfig
from graftstack.config.space import Range, check_space, full_key, grid_size, parse_space
from graftstack.errors import ConfigError

MOST_TRIALS = 100_000


class SearchName(Enum):
    """How the space is gone through."""

    grid = "grid"
    random = "random"
    optuna = "optuna"


class SchedulerName(Enum):
    """Which trials end before their last epoch."""

    none = "none"
    asha = "asha"


class Reuse(Enum):
    """Whether trials share the outputs of their frozen layer groups."""

    auto = "auto"
    off = "off"


class Prune(Enum):
    """Which trials aren't begun at all."""

    none = "none"
    probe = "probe"


class TapDtype(Enum):
    """How a number of a tap is stored."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


@dataclass(frozen=True, kw_only=True)
class TapsConfig:
    """Where the outputs of frozen layer groups are stored, and how."""

    location: str | None = None
    """A folder or an fsspec URI that all workers reach; default: taps in $GRAFTSTACK_CACHE or ~/.cache/graftstack, and
    on a cluster .taps below runs_dir."""
    budget_bytes: int = 16 * 1024**3
    """Room for all taps, in bytes; the longest unused make way. A depth whose tap doesn't fit is computed anew."""
    dtype: TapDtype = TapDtype.fp32
    """fp32 (exact), or fp16 or bf16, which take half the room and half the reading."""

    def __post_init__(self) -> None:
        at_least("taps.budget_bytes", self.budget_bytes, 0)


@dataclass(frozen=True, kw_only=True)
class AshaConfig:
    """Asynchronous successive halving (Li et al. 2020): only the best of a rung train on to the next."""

    grace_epochs: int = 1
    """No trial is stopped before this epoch: the first rung."""
    reduction_factor: float = 3.0
    """One in so many trials goes on from each rung, and each rung is so many times as late as the one before."""

    def __post_init__(self) -> None:
        at_least("asha.grace_epochs", self.grace_epochs, 1)
        above("asha.reduction_factor", self.reduction_factor, 1)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(FinetuneConfig):
    """Many fine-tunings, over freeze depth, learning rate or anything else; what is frozen is computed once for all."""

    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(min_interval_s=30.0))
    """How often the state of each trial is saved: at the end of an epoch, at most every min_interval_s."""
    space: dict[str, Any] = field(default_factory=dict)
    """space.KEY=[VALUE,...] for each key that varies; all other keys are the same for each trial."""
    search: SearchName = SearchName.grid
    """grid (every combination), random, or optuna (learns from finished trials; needs graftstack[optuna])."""
    num_samples: int = 10
    """random, optuna: how many trials."""
    scheduler: SchedulerName = SchedulerName.none
    """none (every trial trains all its epochs), or asha (the worse ones stop early)."""
    asha: AshaConfig = field(default_factory=AshaConfig)
    """scheduler=asha: when trials are compared, and how many go on."""
    reuse: Reuse = Reuse.auto
    """auto: trials share the outputs of frozen layer groups where that is quicker; off: each begins with the images."""
    taps: TapsConfig = field(default_factory=TapsConfig)
    """Where those outputs are stored, and how."""
    prune: Prune = Prune.none
    """none, or probe: leave out freeze depths and backbones whose frozen features lag behind in a quick probe."""
    prune_margin: float = 0.1
    """prune=probe: by how much accuracy a freeze depth must lag behind to be left out; twice that for a backbone."""
    time_limit_s: float | None = None
    """After so many seconds no trial starts, and those that train end with their current epoch."""
    max_concurrent_trials: int | None = None
    """How many trials train at a time, each in a process if more than one; default: as many as there is room for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_samples", self.num_samples, 1)
        at_most("num_samples", self.num_samples, MOST_TRIALS)
        fraction("prune_margin", self.prune_margin)
        above("time_limit_s", self.time_limit_s, 0)
        at_least("max_concurrent_trials", self.max_concurrent_trials, 1)
        domains = parse_space(self.space)
        if self.search is SearchName.grid and (num := grid_size(domains)) > MOST_TRIALS:
            raise ConfigError(
                f"space: a grid of {num:,} trials, more than {MOST_TRIALS:,}; shorten a list, or add search=random"
            )
        check_space(self, domains)
        if self.cluster.max_workers > 1:
            self._check_groups()
        if self.prune is Prune.probe and self.search is SearchName.optuna:
            raise ConfigError(
                "prune=probe: search=optuna chooses its trials as it goes, so none can be left out beforehand; use "
                "prune=none, or search=grid or random"
            )
        if self.scheduler is SchedulerName.asha and self.asha.grace_epochs > self.most_epochs:
            raise ConfigError(
                f"asha.grace_epochs={self.asha.grace_epochs}: trials end after epochs={self.most_epochs}, before any "
                "could be stopped; lower it, or raise epochs"
            )

    def _check_groups(self) -> None:
        """Raises `ConfigError` for what would end a trial early, while its group of workers trains."""
        so = f"a trial of cluster.num_workers={self.cluster.num_workers} trains to its end"
        if self.scheduler is SchedulerName.asha:
            raise ConfigError(f"scheduler=asha: {so}; use scheduler=none, or cluster.num_workers=1")
        if self.time_limit_s is not None:
            raise ConfigError(f"time_limit_s={self.time_limit_s}: {so}; leave it out, or use cluster.num_workers=1")

    @property
    def most_epochs(self) -> int:
        """The epochs of the trial that has most."""
        domain = next((found for name, found in parse_space(self.space).items() if full_key(name) == "epochs"), None)
        if domain is None:
            return self.epochs
        return int(domain.high) if isinstance(domain, Range) else int(max(domain.values))
