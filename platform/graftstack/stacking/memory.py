"""The memory that a worker of a stack needs: for the base models that are fitted at once on its CPUs.

Of estimators it is a rule of thumb, on the safe side: what they keep is up to each of them.
"""

from dataclasses import fields, replace
from typing import Any, NamedTuple

from graftstack.config.base_models import FINETUNE, OF_A_PROBE, PROBE, BaseEntry, finetune_config
from graftstack.config.schema import FinetuneConfig, Source
from graftstack.config.stack import StackConfig
from graftstack.finetune.memory import (
    MIB,
    DataFacts,
    JobMemory,
    SizeOf,
    assumed_facts,
    assumed_image_size,
    taps_of,
    training_memory,
)

# Resident memory of a process that has imported scikit-learn's usual modules and what fits them here, without torch:
# 193 MiB (scikit-learn 1.9, Linux, x86); what is fitted takes more of the library.
_PROCESS_BYTES = 320 * MIB

# Of the rows of a fold: as they are taken from the table, encoded, as the estimator has them, and once more.
_TABLE_COPIES = 4

# A node of a tree, without the values of its classes (sklearn.tree._tree.Node), and nodes for each row: a tree that
# grows to its end has a leaf for each of the 63 % of rows that a bootstrap draws, and as many nodes above them.
_NODE_BYTES, _NODES_A_ROW = 64, 1.3
_NUM_TREES = 100
_MODEL_COPIES = 2  # in memory, and as bytes on their way to the driver
_ROWS_SQUARED = ("GaussianProcess", "KernelRidge", "LabelPropagation", "LabelSpreading")

_MOST_FEATURES = 4096
"""Of a vector that a backbone returns, all but a few large ones."""


class TableFacts(NamedTuple):
    """How large a table is."""

    num_rows: int
    num_columns: int
    """Of numbers: a column for each value of a category, a pixel's channel for each of an image."""
    num_classes: int
    """0 for a regression."""


# What is taken for granted of tables that aren't at hand; of images, for estimators that see their pixels.
_ASSUMED_ROWS, _ASSUMED_IMAGES = 50_000, 10_000
_ASSUMED_COLUMNS, _PIXELS_A_SIDE = 100, 64
_KNOWN = {Source.digits: TableFacts(num_rows=1797, num_columns=192, num_classes=10)}


def assumed_table(config: StackConfig) -> TableFacts:
    """Returns what a configuration says of its rows, which may lie elsewhere, and for the rest a common size."""
    data, classes = config.data, assumed_facts(config).num_classes
    if data.source in _KNOWN:
        return _KNOWN[data.source]
    if not data.has_columns:
        side = min(data.image_size or _PIXELS_A_SIDE, _PIXELS_A_SIDE)
        return TableFacts(_ASSUMED_IMAGES, 3 * side**2, classes)
    # A table with a thousand classes is rare, and the forests that tell them apart aren't to be had by chance.
    return TableFacts(_ASSUMED_ROWS, max(_ASSUMED_COLUMNS, len(data.features)), min(classes, 10))


def stack_memory(
    config: StackConfig,
    table: TableFacts | None = None,
    *,
    num_slots: int | None = None,
    facts: DataFacts | None = None,
    size_of: SizeOf = assumed_image_size,
) -> JobMemory:
    """Returns what the workers of a stack need, and its driver, which holds the table and all models.

    Args:
        config: The stack, or a pipeline; base models that come from its sweep are fine-tunings as `config` has them.
        table: Its rows; None: as `assumed_table` has them.
        num_slots: Estimators that a worker fits at once; None: one on each of its CPUs.
        facts: Of its images; None: as `assumed_facts` has them.
        size_of: Says how large images are.

    Raises:
        ConfigError, WeightsError: a base model can't be.
    """
    table = table or assumed_table(config)
    facts = facts or assumed_facts(config)
    num_slots = num_slots or min(config.cluster.cpus_per_worker or 1, config.max_slots or 2**10)
    entries = [entry for level in config.entries for entry in level]
    of_images = [_on_images(config, entry, facts, size_of) for entry in entries if entry.takes_images]
    if getattr(config, "from_sweep", None) or hasattr(config, "space"):
        of_images.append(training_memory(_alone(config), facts, size_of=size_of))
    models = [_estimator_bytes(entry, table) for entry in entries if not entry.takes_images]
    table_bytes = 8 * table.num_rows * table.num_columns
    fitting = _PROCESS_BYTES + _TABLE_COPIES * table_bytes + max(models, default=0)
    # A backbone takes all CPUs of a worker, but processes that have fitted others keep what they hold.
    worker = num_slots * fitting * bool(models) + max((memory.worker_bytes for memory in of_images), default=0)
    driver = _PROCESS_BYTES + (2 + _TABLE_COPIES) * table_bytes + sum(models)
    driver += max((memory.driver_bytes for memory in of_images), default=0)
    device = max((memory.device_bytes or 0 for memory in of_images), default=0)
    return JobMemory(worker or fitting, device or None, driver)


def _on_images(config: StackConfig, entry: BaseEntry, facts: DataFacts, size_of: SizeOf) -> JobMemory:
    """Returns what a base model needs that learns from images; of a run it isn't known which backbone it has."""
    without = OF_A_PROBE if entry.kind == PROBE else ()
    tuned = finetune_config(config, entry, without=without) if entry.kind in (FINETUNE, PROBE) else config
    memory = training_memory(_alone(tuned, epochs=0 if entry.kind == PROBE else None), facts, size_of=size_of)
    taps = taps_of(
        tuned.backbone.name,
        keep_head=tuned.backbone.keep_head,
        image_size=size_of(tuned),
        num_classes=facts.num_classes,
    )
    # The driver makes taps, one at a time; a probe holds the features of all rows, and the folds of them.
    chunk = max(taps.chunk_bytes([boundary]) for boundary in range(1, len(taps.items) + 1))
    features = _TABLE_COPIES * 4 * facts.num_val * _MOST_FEATURES if entry.kind == PROBE else 0
    return memory._replace(
        worker_bytes=memory.worker_bytes + features, driver_bytes=memory.driver_bytes + chunk + features
    )


def _alone(config: FinetuneConfig, *, epochs: int | None = None) -> FinetuneConfig:
    """Returns the training of one process, which a base model's is, whatever else a configuration of a job says."""
    values: dict[str, Any] = {item.name: getattr(config, item.name) for item in fields(FinetuneConfig)}
    values |= {"cluster": replace(config.cluster, num_workers=1)}
    return FinetuneConfig(**values | ({} if epochs is None else {"epochs": epochs}))


def _estimator_bytes(entry: BaseEntry, table: TableFacts) -> int:
    """Returns what a fitted estimator holds beside its rows."""
    rows = table.num_rows
    if any(entry.kind.startswith(name) for name in _ROWS_SQUARED):
        return 3 * 8 * rows**2
    if "Forest" in entry.kind or "ExtraTrees" in entry.kind or "Bagging" in entry.kind:
        num_trees = entry.params.get("n_estimators", _NUM_TREES)
        nodes = _NODES_A_ROW * rows * (num_trees if isinstance(num_trees, int) else _NUM_TREES)
        return int(_MODEL_COPIES * nodes * (_NODE_BYTES + 8 * max(1, table.num_classes)))
    return 8 * table.num_columns * max(1, table.num_classes)
