"""The configuration of a stack, and of a sweep that ends in one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from graftstack.config.base_models import BaseEntry, parse_entries
from graftstack.config.checks import above, at_least
from graftstack.config.schema import FinetuneConfig
from graftstack.config.sweep import SweepConfig, TapsConfig
from graftstack.errors import ConfigError


class FoldKind(Enum):
    """How rows are dealt to folds."""

    auto = "auto"
    stratified = "stratified"
    kfold = "kfold"
    group = "group"
    time = "time"


class StackMode(Enum):
    """What predicts new rows."""

    refit = "refit"
    bag = "bag"


# What a base model that fails twice in a fold means; `raise` is a word of the language and no name in a class body.
OnError = Enum("OnError", {"raise": "raise", "drop": "drop"})


class Calibration(Enum):
    """How the probabilities of the stack are brought in line with frequencies."""

    none = "none"
    temperature = "temperature"
    isotonic = "isotonic"


class TaskKind(Enum):
    """What the label is."""

    auto = "auto"
    classification = "classification"
    regression = "regression"


@dataclass(frozen=True, kw_only=True)
class FoldsConfig:
    """The folds of cross-validation."""

    kind: FoldKind = FoldKind.auto
    """stratified (by class), kfold, group (by data.group) or time (rows are in its order); auto: as suits the data."""
    num: int = 5
    """How many."""
    repeats: int = 1
    """How often, each time dealt anew; predictions are averaged."""

    def __post_init__(self) -> None:
        at_least("folds.num", self.num, 2)
        at_least("folds.repeats", self.repeats, 1)
        if self.kind is FoldKind.time and self.repeats > 1:
            raise ConfigError(f"folds.repeats={self.repeats}: folds.kind=time has one order only; leave it out")


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """What a stack is made of."""

    base_models: list[Any] = field(default_factory=list)
    """NAME of an estimator, {NAME: {PARAMETER: value}}, {finetune: {KEY: value}}, {probe: {KEY: value}} or run:RUN."""
    top: int = 3
    """How many of the sweep's best trials become base models."""
    meta_model: Any = "auto"
    """blend, logistic, ridge, nonnegative, greedy, gbm, or an estimator as in base_models; auto: blend or ridge."""
    folds: FoldsConfig = field(default_factory=FoldsConfig)
    """How rows are dealt to folds."""
    mode: StackMode = StackMode.refit
    """refit (each base model learns from all rows once more), or bag (the models of its folds are averaged)."""
    levels: Any = 1
    """How often base models are stacked on base models, or [[BASE_MODEL,...],...] for the levels above the first."""
    passthrough: bool = False
    """Whether what stands above base models sees their own inputs too: the columns of the table, or pixels."""
    calibration: Calibration = Calibration.none
    """none, temperature or isotonic, fitted to out-of-fold predictions."""
    task: TaskKind = TaskKind.auto
    """classification, regression, or auto: a number with more than 20 values is a target."""
    on_error: OnError = OnError["raise"]
    """A base model that fails twice in a fold ends the job (raise), or is left out (drop)."""
    taps: TapsConfig = field(default_factory=TapsConfig)
    """Where outputs of frozen layer groups are stored, and how."""
    time_limit_s: float | None = None
    """After so many seconds the stack is made of the base models that are finished."""
    max_slots: int | None = None
    """CPUs that base models take at once, their threads included; default: as many as there are."""

    @property
    def entries(self) -> list[list[BaseEntry]]:
        """The base models of each level, without those of a sweep. Raises `ConfigError`."""
        first = parse_entries("base_models", self.base_models)
        if isinstance(self.levels, int) and not isinstance(self.levels, bool):
            at_least("levels", self.levels, 1)
            others = [entry for entry in first if not entry.takes_images]
            return [first, *(_of_level(others, level) for level in range(2, self.levels + 1))]
        if not isinstance(self.levels, list) or not all(isinstance(level, list) for level in self.levels):
            raise ConfigError(f"levels={self.levels}: give a number, or a list of base models for each level")
        above_first = [parse_entries(f"levels[{index}]", level) for index, level in enumerate(self.levels)]
        for index, level in enumerate(above_first):
            if not level:
                raise ConfigError(f"levels[{index}]=[]: a level needs base models; give it some, or leave it out")
            for entry in level:
                if entry.takes_images:
                    raise ConfigError(
                        f"levels[{index}]: {entry.name} learns from images; above the first level there are only "
                        "predictions, use an estimator"
                    )
        return [first, *(_of_level(entries, level) for level, entries in enumerate(above_first, start=2))]

    @property
    def meta(self) -> tuple[str, dict[str, Any]]:
        """The name of the meta-model and its parameters. Raises `ConfigError`."""
        if isinstance(self.meta_model, str):
            return self.meta_model, {}
        if isinstance(self.meta_model, Mapping) and len(self.meta_model) == 1:
            ((name, params),) = self.meta_model.items()
            if isinstance(name, str) and (params is None or isinstance(params, Mapping)):
                return name, {str(key): value for key, value in (params or {}).items()}
        raise ConfigError(f"meta_model={self.meta_model}: give one name, or {{NAME: {{PARAMETER: value}}}}")

    def _check_stack(self) -> None:
        at_least("top", self.top, 1)
        above("time_limit_s", self.time_limit_s, 0)
        at_least("max_slots", self.max_slots, 1)
        entries = self.entries
        if len(entries) > 1 and not all(entries):
            raise ConfigError(f"levels={self.levels}: no base model can stand above the first level; give estimators")
        if len(entries) > 1 and self.folds.kind is FoldKind.time:
            raise ConfigError("levels: folds.kind=time leaves the first rows without predictions; use one level")
        _ = self.meta
        if self.task is TaskKind.regression and self.calibration is not Calibration.none:
            raise ConfigError(f"calibration={self.calibration.value}: a regression has no probabilities; leave it out")


def _of_level(entries: list[BaseEntry], level: int) -> list[BaseEntry]:
    """Returns the base models of a level above the first, with names that no user gives."""
    return [entry._replace(name=f"{entry.name}@{level}") for entry in entries]


@dataclass(frozen=True, kw_only=True)
class StackConfig(StackOptions, FinetuneConfig):
    """Base models predict what they haven't seen, fold by fold; a meta-model learns to weigh their predictions."""

    from_sweep: str | None = None
    """The run of a sweep whose best trials become base models."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_stack()
        if not self.base_models and self.from_sweep is None:
            raise ConfigError(
                "base_models is empty: a stack needs something to stack; add e.g. "
                "base_models=[LogisticRegression,RandomForestClassifier], or from_sweep=RUN"
            )


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(StackOptions, SweepConfig):
    """A sweep, and a stack of its best trials and other base models, within one time limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_stack()
