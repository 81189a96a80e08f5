"""The configuration of meta-learning: which episodes, and what is learnt from them."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from graftstack.config.checks import above, at_least, at_most, fraction
from graftstack.config.schema import (
    BackboneConfig,
    CheckpointConfig,
    DataConfig,
    JobConfig,
    PlainOptimizerConfig,
    Precision,
    ScheduleConfig,
    Select,
)
from graftstack.config.sweep import TapsConfig
from graftstack.errors import ConfigError


class MethodName(Enum):
    """How a network learns to learn."""

    prototypes = "prototypes"
    supcon = "supcon"
    triplet = "triplet"
    finetune_baseline = "finetune_baseline"
    maml = "maml"
    fomaml = "fomaml"
    anil = "anil"
    reptile = "reptile"
    meta_sgd = "meta_sgd"

    @property
    def adapts(self) -> bool:
        """Whether the network itself learns from each support set; else only what stands on its features does."""
        return self in _ADAPTING


_ADAPTING = (MethodName.maml, MethodName.fomaml, MethodName.anil, MethodName.reptile, MethodName.meta_sgd)
# A step has no more blocks than these, and so feeds no more workers: each block sends one gradient.
_MOST_BLOCKS = 32

# Episodes that are gone through at once where they are vectorised.
_EPISODES_AT_ONCE = 8

_JOINT = (MethodName.supcon, MethodName.triplet)
_WITHOUT_INNER_LOOP = (MethodName.prototypes, *_JOINT)


class BatchNormMode(Enum):
    """What BatchNorm normalises queries with."""

    inductive = "inductive"
    transductive = "transductive"


class Execution(Enum):
    """How the episodes of a step are gone through."""

    auto = "auto"
    loop = "loop"
    vmap = "vmap"


@dataclass(frozen=True, kw_only=True)
class TrainEpisodesConfig:
    """Episodes of the training where they differ from those that accuracy is measured on."""

    num_ways: int | None = None
    """Classes of a training episode; null: num_ways. More of them make embeddings better."""
    num_shots: int | None = None
    """Support images of each class; null: num_shots."""
    num_queries: int | None = None
    """Query images of each class; null: num_queries."""

    def __post_init__(self) -> None:
        at_least("train.num_ways", self.num_ways, 2)
        at_least("train.num_shots", self.num_shots, 1)
        at_least("train.num_queries", self.num_queries, 1)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How few-shot accuracy is measured, on classes that no training episode has shown."""

    num_episodes: int = 600
    """Episodes of each way and shot, of whose accuracies the mean and its 95 % confidence interval are reported."""
    batchnorm: BatchNormMode = BatchNormMode.inductive
    """inductive (a query is classified as if it came alone: normalised with running statistics, or, where the network
    adapts, with the support set's) or transductive (with the episode's own; where the network adapts, the queries')."""
    num_ways: list[int] = field(default_factory=list)
    """A table over these ways; empty: num_ways alone."""
    num_shots: list[int] = field(default_factory=list)
    """A table over these shots; empty: num_shots alone."""
    inner_steps: int | None = None
    """Steps of the inner loop in evaluation; null: inner_steps if given, else as suits the method."""
    classes: list[Any] = field(default_factory=list)
    """Held-out classes; empty: those that the source says are for testing, or else a random share."""
    test_fraction: float = 0.5
    """Share of the classes that is held out where nothing says which; 1 with num_episodes=0: all."""
    val_fraction: float = 0.0
    """Share of the classes that validates where nothing says which; 0: the last step's model is kept."""
    every_episodes: int | None = None
    """Validate after so many training episodes; null: ten times."""
    num_val_episodes: int = 200
    """Episodes of each validation."""

    def __post_init__(self) -> None:
        at_least("eval.num_episodes", self.num_episodes, 2)  # one has no confidence interval
        at_least("eval.inner_steps", self.inner_steps, 1)
        at_least("eval.every_episodes", self.every_episodes, 1)
        at_least("eval.num_val_episodes", self.num_val_episodes, 2)
        above("eval.test_fraction", self.test_fraction, 0)
        at_most("eval.test_fraction", self.test_fraction, 1)
        fraction("eval.val_fraction", self.val_fraction)
        for ways in self.num_ways:
            at_least("eval.num_ways", ways, 2)
        for shots in self.num_shots:
            at_least("eval.num_shots", shots, 1)


@dataclass(frozen=True, kw_only=True)
class MetaConfig(JobConfig):
    """A network learns from many small tasks how to tell new classes apart from a few images of each."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(name="conv4"))
    """The network and its weights."""
    method: MethodName = MethodName.prototypes
    """Metric: prototypes, supcon, triplet; optimisers: maml, fomaml, anil, reptile, meta_sgd; or finetune_baseline."""
    num_ways: int = 5
    """Classes of an episode."""
    num_shots: int = 1
    """Support images of each class: what is learnt from."""
    num_queries: int = 15
    """Query images of each class: what is classified."""
    num_episodes: int = 10_000
    """Training episodes; 0 only measures backbone.weights as a few-shot learner."""
    episodes_per_step: int = 1
    """Episodes whose gradients make one step of the outer loop; workers share them out."""
    train: TrainEpisodesConfig = field(default_factory=TrainEpisodesConfig)
    """Training episodes, where they differ."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """How accuracy is measured."""
    rotations: bool | None = None
    """Whether each class, turned by 90, 180 and 270 degrees, is three more; null: for data=omniglot."""
    inner_lr: float | None = None
    """Learning rate of the inner loop; null: as suits the method."""
    inner_steps: int | None = None
    """Steps of the inner loop in training; null: as suits the method."""
    inner_batch_size: int | None = None
    """reptile: support images of an inner step; null: all."""
    temperature: float = 0.1
    """supcon: what cosine similarities are divided by."""
    margin: float = 0.2
    """triplet: by how much a stranger is to lie further off than a relative."""
    optimizer: PlainOptimizerConfig = field(default_factory=PlainOptimizerConfig)
    """The optimiser of the outer loop."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate of the outer loop over its steps."""
    clip_grad_norm: float | None = None
    """Largest norm of a step's gradient; longer ones are scaled down."""
    precision: Precision = Precision.fp32
    """fp32 or bf16 (autocast)."""
    execution: Execution = Execution.auto
    """loop (one episode after another), vmap (eight at once), or auto: vmap on a GPU; on a CPU the loop is quicker."""
    select: Select = Select.best
    """The run's model: the best in validation, if there are classes for it, or the last."""
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(min_interval_s=30.0))
    """How often the state is saved: at most every min_interval_s, and after every_steps."""
    taps: TapsConfig = field(default_factory=TapsConfig)
    """num_episodes=0: where the backbone's features are stored, so that they are computed once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_ways", self.num_ways, 2)
        at_least("num_shots", self.num_shots, 1)
        at_least("num_queries", self.num_queries, 1)
        at_least("num_episodes", self.num_episodes, 0)
        at_least("episodes_per_step", self.episodes_per_step, 1)
        above("inner_lr", self.inner_lr, 0)
        at_least("inner_steps", self.inner_steps, 1)
        at_least("inner_batch_size", self.inner_batch_size, 1)
        above("temperature", self.temperature, 0)
        above("margin", self.margin, 0)
        above("clip_grad_norm", self.clip_grad_norm, 0)
        if self.backbone.keep_head:
            raise ConfigError("backbone.keep_head=true: new classes come with each episode; leave it out")
        self._check_episodes()
        self._check_method()
        self._check_workers()
        self._check_fractions()
        if self.data.val_fraction != DataConfig.val_fraction:
            raise ConfigError(
                f"data.val_fraction={self.data.val_fraction}: whole classes validate, not a share of the images; use "
                "eval.val_fraction"
            )

    def _check_episodes(self) -> None:
        if not self.num_episodes and self.backbone.weights == "none":
            raise ConfigError(
                "num_episodes=0: nothing is trained, and backbone.weights=none are random; give weights, or "
                "num_episodes=10000"
            )
        if self.num_episodes % self.episodes_per_step:
            raise ConfigError(
                f"num_episodes={self.num_episodes}: no multiple of episodes_per_step={self.episodes_per_step}; use "
                f"{self.num_episodes // self.episodes_per_step * self.episodes_per_step or self.episodes_per_step}"
            )

    def _check_method(self) -> None:
        method = self.method
        if method.adapts:
            others = [ways for ways in [self.train.num_ways, *self.eval.num_ways] if ways not in (None, self.num_ways)]
            if others:
                raise ConfigError(
                    f"num_ways={others[0]}: the head of method={method.value} tells num_ways={self.num_ways} classes "
                    "apart, in training and evaluation; use one number of ways"
                )
            if not self.num_episodes:
                raise ConfigError(
                    f"num_episodes=0: method={method.value} is nothing without training; use prototypes or "
                    "finetune_baseline, or more episodes"
                )
        inner = {
            "inner_lr": self.inner_lr,
            "inner_steps": self.inner_steps,
            "eval.inner_steps": self.eval.inner_steps,
        }
        for key, value in inner.items():
            if value is not None and method in _WITHOUT_INNER_LOOP:
                raise ConfigError(f"{key}={value}: method={method.value} has no inner loop; leave it out")
        if self.inner_batch_size is not None and method is not MethodName.reptile:
            raise ConfigError(f"inner_batch_size={self.inner_batch_size}: for method=reptile only; leave it out")
        if self.execution is Execution.vmap and not method.adapts:
            raise ConfigError(
                f"execution=vmap: method={method.value} feeds an episode as one batch as it is; leave it out"
            )

    def _check_workers(self) -> None:
        num, parts = self.cluster.max_workers, self.num_blocks
        if num > parts and self.num_episodes:
            raise ConfigError(
                f"cluster.num_workers={num}: a step of episodes_per_step={self.episodes_per_step} is shared out in "
                f"{parts} parts, so {num - parts} of them would idle; use {parts} or fewer"
            )

    def _check_fractions(self) -> None:
        """Where other things say which classes are held out, or nothing trains, the fractions aren't read together."""
        test, val = self.eval.test_fraction, self.eval.val_fraction
        if self.num_episodes and not self.eval.classes and test + val >= 1:
            raise ConfigError(
                f"eval.test_fraction={test}, eval.val_fraction={val}: leave no class to train on; lower one of them"
            )

    def num_threads(self, share: int) -> int:
        """Returns the threads of each worker, of which an even share of the CPUs would be `share`.

        Sums of torch depend on them in their last bits. So that these are the same on any number of workers, each has
        one where a step can be shared out, and as many workers use all CPUs.
        """
        return self.cluster.cpus_per_worker or (share if self.episodes_per_step == 1 else 1)

    @property
    def num_blocks(self) -> int:
        """In how many parts a step can be shared out: the same for any number of workers."""
        num_at_once = _EPISODES_AT_ONCE if self.is_vectorised else 1
        return min(-(-self.episodes_per_step // num_at_once), _MOST_BLOCKS)

    @property
    def is_vectorised(self) -> bool:
        """Whether the episodes of a block are gone through at once."""
        on_gpu = self.execution is Execution.auto and self.cluster.gpus_per_worker > 0
        return self.method.adapts and (self.execution is Execution.vmap or on_gpu)

    @property
    def is_by_features(self) -> bool:
        """Whether no query depends on another in evaluation, so that each image is embedded once for all episodes."""
        return not self.method.adapts and self.eval.batchnorm is BatchNormMode.inductive

    @property
    def num_steps(self) -> int:
        """Steps of the outer loop."""
        return self.num_episodes // self.episodes_per_step

    @property
    def is_joint(self) -> bool:
        """Whether the loss of a step is one over all its images, and no sum over its episodes."""
        return self.method in _JOINT

    @property
    def eval_ways(self) -> list[int]:
        """The ways that accuracy is measured for; the first of them is what the run reports."""
        return list(dict.fromkeys([self.num_ways, *self.eval.num_ways]))

    @property
    def eval_shots(self) -> list[int]:
        """The shots that accuracy is measured for; the first of them is what the run reports."""
        return list(dict.fromkeys([self.num_shots, *self.eval.num_shots]))
