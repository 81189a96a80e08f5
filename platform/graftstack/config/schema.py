"""The configuration of a fine-tuning: frozen dataclasses, checked when made.

The string under each field is its documentation: ``graftstack finetune --help`` prints it.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from graftstack.config.checks import above, at_least, at_most, fraction
from graftstack.errors import ConfigError

_LARGEST_IMAGE_SIZE = 4096  # beyond what any backbone is made for; a batch of larger ones fits in no memory


class Source(Enum):
    """Where images and labels come from."""

    digits = "digits"
    image_folder = "image_folder"
    parquet = "parquet"
    csv = "csv"
    torchvision = "torchvision"
    omniglot = "omniglot"


class OnBadImage(Enum):
    """What to do with an image that can't be decoded."""

    error = "error"
    skip = "skip"


class ClusterKind(Enum):
    """Where a job runs."""

    inline = "inline"
    local = "local"
    ray = "ray"
    k8s = "k8s"


class OptimizerName(Enum):
    """The optimisers."""

    adamw = "adamw"
    sgd = "sgd"


class ScheduleName(Enum):
    """How the learning rate moves over the steps of a phase."""

    constant = "constant"
    cosine = "cosine"
    one_cycle = "one_cycle"


class RecipeName(Enum):
    """Which parts train when."""

    plain = "plain"
    lp_ft = "lp_ft"
    gradual_unfreeze = "gradual_unfreeze"


class Augment(Enum):
    """Random changes to training images."""

    none = "none"
    standard = "standard"


class Precision(Enum):
    """The arithmetic of the forward and backward pass; weights stay in fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class ClassWeights(Enum):
    """How much each class counts in the loss."""

    none = "none"
    balanced = "balanced"


class Select(Enum):
    """Which epoch's weights become the run's model."""

    best = "best"
    last = "last"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images or tables with labels, from one source, as one Arrow table."""

    source: Source = Source.digits
    """Set by `data=NAME`: digits (bundled), image_folder, parquet, csv, torchvision or omniglot."""
    path: str | None = None
    """The folder or file, a local path or an fsspec URI (s3://, gs://, memory://)."""
    name: str | None = None
    """torchvision: the class of torchvision.datasets, e.g. CIFAR10; `path` is its root folder."""
    image: str | None = None
    """parquet, csv: the column with encoded images (bytes), or with paths relative to the file's folder."""
    features: list[str] = field(default_factory=list)
    """parquet, csv: columns that jobs on tables learn from; empty, and no data.image: all that have no other use."""
    label: str = "label"
    """parquet, csv: the column with the class of each row, or with the number to predict."""
    split: str | None = None
    """parquet, csv: a column that says train, val or test for each row; without a val row, test rows validate."""
    val_fraction: float = 0.2
    """Share of the rows that validates when no split is given; stratified by class, whole groups with `group`."""
    group: str | None = None
    """parquet, csv: rows with the same value here never lie on both sides of a split."""
    classes: list[Any] = field(default_factory=list)
    """Keep only these classes; empty keeps all."""
    image_size: int | None = None
    """Height and width in pixels that images are brought to; default: what the backbone expects."""
    drop: list[str] = field(default_factory=list)
    """parquet, csv: columns to leave out."""
    num_train_per_class: int | None = None
    """Keep at most this many training images of each class, chosen by `seed`."""
    on_bad_image: OnBadImage = OnBadImage.error
    """An image that can't be decoded ends the job (error), or is left out and counted (skip)."""
    cache_dir: str | None = None
    """Where decoded images are kept, memory-mapped; default: $GRAFTSTACK_CACHE or ~/.cache/graftstack."""
    cache_bytes: int = 16 * 1024**3
    """Largest decoded cache, in bytes; images that don't fit are decoded anew in each epoch. 0 turns it off."""

    def __post_init__(self) -> None:
        fraction("data.val_fraction", self.val_fraction)
        at_least("data.image_size", self.image_size, 1)
        at_most("data.image_size", self.image_size, _LARGEST_IMAGE_SIZE)
        at_least("data.num_train_per_class", self.num_train_per_class, 1)
        at_least("data.cache_bytes", self.cache_bytes, 0)
        needs = {
            Source.image_folder: ("path",),
            Source.parquet: ("path",),
            Source.csv: ("path",),
            Source.torchvision: ("name", "path"),
            Source.omniglot: ("path",),
        }
        for key in needs.get(self.source, ()):
            if getattr(self, key) is None:
                raise ConfigError(f"data.{key} is missing: data={self.source.value} needs it; add data.{key}=...")
        if self.source is Source.digits and self.path is not None:
            raise ConfigError(
                f"data.path={self.path}: data=digits is bundled and reads no files; add data=image_folder, "
                "data=parquet or data=csv"
            )
        if self.source is not Source.torchvision and self.name is not None:
            raise ConfigError(f"data.name={self.name}: for data=torchvision only; add it, or leave the name out")
        self._check_columns()

    @property
    def has_columns(self) -> bool:
        """Whether the source is a table, whose columns have names."""
        return self.source in (Source.parquet, Source.csv)

    @property
    def has_images(self) -> bool:
        """Whether there are images to learn from."""
        return not self.has_columns or self.image is not None

    def _check_columns(self) -> None:
        if self.has_columns:
            return
        given = {"image": self.image, "features": self.features, "split": self.split, "group": self.group}
        for key, value in given.items():
            if value:
                raise ConfigError(
                    f"data.{key}={value}: data={self.source.value} has no columns; leave it out, or use data=parquet"
                )


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The network that is grafted upon."""

    name: str = "resnet18"
    """`backbone=NAME`: a torchvision name, cifar_resnet20|32|44|56|110, conv4, or timm/NAME."""
    weights: str = "none"
    """A torchvision enum name (DEFAULT, IMAGENET1K_V2, ...), none, a file (.safetensors, .pth, .th), or run:RUN."""
    keep_head: bool = False
    """Start from the head in the weights instead of a new one; it must have one output for each class."""


@dataclass(frozen=True, kw_only=True)
class PlainOptimizerConfig:
    """An optimiser that treats all parameters alike."""

    name: OptimizerName = OptimizerName.adamw
    """adamw or sgd (Nesterov)."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled from the gradient for adamw; not applied to biases and norms."""
    momentum: float = 0.9
    """sgd only."""

    def __post_init__(self) -> None:
        above("optimizer.lr", self.lr, 0)
        at_least("optimizer.weight_decay", self.weight_decay, 0)
        fraction("optimizer.momentum", self.momentum)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(PlainOptimizerConfig):
    """The optimiser and its learning rates."""

    lr: float = 1e-3
    """Peak learning rate of the last layer group."""
    head_lr_multiplier: float | None = None
    """The head learns at lr * head_lr_multiplier; null: as suits the scale of the features."""
    layer_decay: float = 1.0
    """Layer group i of n learns at lr * layer_decay ** (n - 1 - i): discriminative learning rates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above("optimizer.head_lr_multiplier", self.head_lr_multiplier, 0)
        above("optimizer.layer_decay", self.layer_decay, 0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps of a phase."""

    name: ScheduleName = ScheduleName.cosine
    """cosine, one_cycle or constant."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly from 0 (one_cycle: in a cosine)."""

    def __post_init__(self) -> None:
        fraction("schedule.warmup_fraction", self.warmup_fraction)


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Which parts train when."""

    name: RecipeName = RecipeName.plain
    """plain; lp_ft (head first, then all above the freeze depth); gradual_unfreeze (one group more at a time)."""
    head_fraction: float = 0.3
    """lp_ft: share of the steps in which only the head trains."""

    def __post_init__(self) -> None:
        fraction("recipe.head_fraction", self.head_fraction)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often the state of training is saved."""

    every_steps: int | None = None
    """Save after this many steps as well as at the end of each epoch."""
    min_interval_s: float = 0.0
    """At the end of an epoch save only if the last save is this old, in seconds."""
    num_to_keep: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        at_least("checkpoint.every_steps", self.every_steps, 1)
        at_least("checkpoint.min_interval_s", self.min_interval_s, 0)
        at_least("checkpoint.num_to_keep", self.num_to_keep, 1)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the job runs and with how many workers."""

    kind: ClusterKind = ClusterKind.local
    """Set by `cluster=NAME`: local (an embedded Ray), inline (no Ray, this process), ray (a cluster that is there), or
    k8s (pods of its own, as the k8s.KEY=value words say; see graftstack submit --help)."""
    address: str = "auto"
    """cluster=ray: the cluster's address."""
    namespace: str | None = None
    """cluster=ray: the namespace of the job's actors, by which Ray's tools tell users apart; null: one of its own."""
    num_workers: Any = 1
    """Training processes: a number, or [min,max] for a group that shrinks and grows with the cluster."""
    gpus_per_worker: float = 0.0
    """GPUs of each worker; 0 trains on the CPU."""
    cpus_per_worker: int | None = None
    """CPUs, and so threads, of each worker; default: the machine's, shared out evenly."""
    max_cpus: int | None = None
    """The most CPUs that the job takes at once, so that others have some too; null: all that are free."""
    max_gpus: float | None = None
    """The most GPUs that the job takes at once; null: all that are free."""
    max_wait_s: float = 900.0
    """cluster=ray: seconds to wait for room that others hold, or that an autoscaler is to bring."""
    max_failures: int = 3
    """How often a lost worker is replaced before the job fails."""

    def __post_init__(self) -> None:
        low, high = self.min_workers, self.max_workers
        at_least("cluster.num_workers", low, 1)
        if high < low:
            raise ConfigError(f"cluster.num_workers={[low, high]}: the range is empty; give [min,max] with min <= max")
        at_least("cluster.gpus_per_worker", self.gpus_per_worker, 0)
        at_least("cluster.cpus_per_worker", self.cpus_per_worker, 1)
        if self.gpus_per_worker > 1 or (0 < self.gpus_per_worker < 1 and high > 1):
            raise ConfigError(
                f"cluster.gpus_per_worker={self.gpus_per_worker}: a worker trains on one GPU of its own; use 0 or 1, "
                "and cluster.num_workers for more"
            )
        at_least("cluster.max_cpus", self.max_cpus, 1)
        at_least("cluster.max_gpus", self.max_gpus, 0)
        self._check_limits()
        at_least("cluster.max_wait_s", self.max_wait_s, 0)
        at_least("cluster.max_failures", self.max_failures, 0)
        if self.kind is ClusterKind.inline and high > 1:
            raise ConfigError(f"cluster.num_workers={high}: cluster=inline is one process; use cluster=local")

    @property
    def min_workers(self) -> int:
        """The least number of workers to train with."""
        return self._worker_range()[0]

    @property
    def max_workers(self) -> int:
        """The greatest number of workers to train with."""
        return self._worker_range()[1]

    def cpus_of(self, num_cpus: int) -> int:
        """Returns how many of so many CPUs the job may take."""
        return num_cpus if self.max_cpus is None else min(num_cpus, self.max_cpus)

    def own_threads(self, num_cpus: int) -> int:
        """Returns the threads of a worker that has so many CPUs for itself."""
        return self.cpus_per_worker or self.cpus_of(num_cpus)

    def _check_limits(self) -> None:
        num_cpus = self.min_workers * (self.cpus_per_worker or 1)
        if self.max_cpus is not None and num_cpus > self.max_cpus:
            raise ConfigError(
                f"cluster.max_cpus={self.max_cpus}: {self.min_workers} worker(s) take {num_cpus} CPUs; raise it, or "
                "use fewer or smaller workers"
            )
        num_gpus = self.min_workers * self.gpus_per_worker
        if self.max_gpus is not None and num_gpus > self.max_gpus:
            raise ConfigError(
                f"cluster.max_gpus={self.max_gpus:g}: {self.min_workers} worker(s) take {num_gpus:g} GPUs; raise it, "
                "or use fewer workers"
            )

    def _worker_range(self) -> tuple[int, int]:
        match self.num_workers:
            case bool():
                pass
            case int(num):
                return num, num
            case [int(low), int(high)]:
                return low, high
        raise ConfigError(f"cluster.num_workers={self.num_workers}: give a whole number, or [min,max]")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every job has."""

    data: DataConfig = field(default_factory=DataConfig)
    """Images and labels."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The network and its weights."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the job runs."""
    name: str | None = None
    """The run's name; default: the job and the time. Refused if it exists, unless resume=true."""
    seed: int = 0
    """All random streams derive from it."""
    runs_dir: str = "runs"
    """Where run folders lie: a path or an fsspec URI."""
    resume: bool = False
    """Continue the run of this name where it was left; its stored configuration is used."""

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)
        if self.name is not None and (
            not 0 < len(self.name.encode(errors="surrogatepass")) <= 200
            or self.name.startswith(".")
            or set(self.name) & set("/\\:")
            or self.name.isspace()
            or not self.name.isprintable()
        ):
            raise ConfigError(
                f"name={self.name!r}: a run name has 1 to 200 bytes of printable characters, none of them /, \\ or :, "
                "and doesn't start with a dot; rename it"
            )
        if self.resume and self.name is None:
            raise ConfigError("resume=true: which run? add name=RUN")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(JobConfig):
    """A pretrained backbone gets a new head; the groups above the freeze depth are fine-tuned with it."""

    freeze_depth: int | str = 0
    """How many leading layer groups keep their weights: 0..num_groups, or all (only the head trains)."""
    epochs: int = 10
    """Passes over the training images; 0 only evaluates."""
    batch_size: int = 64
    """Images a step takes over all workers together, before accumulation."""
    accumulate: int = 1
    """Batches whose gradients add up to one step."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimiser and its learning rates."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the steps."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """Which parts train when."""
    augment: Augment = Augment.none
    """none, or standard (random crop and horizontal flip)."""
    augment_views: int | None = None
    """Epochs after which the random changes repeat, so that taps can hold them; null: never."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    class_weights: ClassWeights = ClassWeights.none
    """balanced: each class weighs num_rows / (num_classes * rows of the class)."""
    clip_grad_norm: float | None = None
    """Largest norm of the gradient; longer ones are scaled down."""
    precision: Precision = Precision.fp32
    """fp32 or bf16 (autocast)."""
    early_stop: int | None = None
    """End after this many epochs without a better validation accuracy."""
    select: Select = Select.best
    """The run's model: the epoch with the best validation accuracy, or the last."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How often the state is saved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("epochs", self.epochs, 0)
        at_least("batch_size", self.batch_size, 1)
        at_least("accumulate", self.accumulate, 1)
        at_least("augment_views", self.augment_views, 1)
        if self.augment is Augment.none and self.augment_views is not None:
            raise ConfigError(
                f"augment_views={self.augment_views}: augment=none changes nothing at random; leave it out, or add "
                "augment=standard"
            )
        fraction("label_smoothing", self.label_smoothing)
        above("clip_grad_norm", self.clip_grad_norm, 0)
        at_least("early_stop", self.early_stop, 1)
        if isinstance(self.freeze_depth, str) and self.freeze_depth != "all":
            raise ConfigError(f'freeze_depth={self.freeze_depth}: give a number of layer groups, or "all"')
        if isinstance(self.freeze_depth, int):
            at_least("freeze_depth", self.freeze_depth, 0)
        if self.batch_size < self.cluster.max_workers:
            raise ConfigError(
                f"batch_size={self.batch_size}: fewer than one image for each of {self.cluster.max_workers} workers; "
                "raise it, or lower cluster.num_workers"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(FinetuneConfig):
    """A backbone is trained from its initial weights, for later runs to graft upon (backbone.weights=run:NAME)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_depth != 0:
            raise ConfigError(f"freeze_depth={self.freeze_depth}: pretrain trains every group; use the finetune job")
