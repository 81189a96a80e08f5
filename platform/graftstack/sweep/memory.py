"""The memory that a process of a sweep needs: its largest trial, its largest pass, or heads that train as one."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from graftstack.config.schema import FinetuneConfig
from graftstack.config.space import Choice, Domain, full_key, grid_size, parse_space, trial_config
from graftstack.config.sweep import Reuse, SearchName, SweepConfig
from graftstack.finetune.inference import inference_batch_size
from graftstack.finetune.memory import (
    OPTIMIZER_SLOTS,
    DataFacts,
    JobMemory,
    SizeOf,
    TapBytes,
    assumed_facts,
    assumed_image_size,
    taps_of,
    training_memory,
)
from graftstack.sweep.fused import MOST_FUSED, MOST_LOGIT_BYTES

# Keys of which every value counts; of the others in the space the first one does, as they change no shape.
_OF_ALL = ("backbone.name", "backbone.weights", "backbone.keep_head", "optimizer.name", "precision", "select")
# Keys of which the largest value takes most, and the one of which the smallest does: more layer groups train.
_OF_LARGEST = ("batch_size", "accumulate", "data.image_size", "epochs")
_OF_SMALLEST = "freeze_depth"

# Resident memory that heads took for what their tensors hold: 1.02 to 1.15 times as much, freed memory kept or not.
_HEADS_FACTOR = 1.25


class Heads(NamedTuple):
    """Heads that train as one (`sweep.fused.FusedTraining`)."""

    num_heads: int
    head_bytes: int
    """Of the parameters of a head."""
    num_slots: int
    """What their optimiser remembers of each parameter."""
    row_bytes: int
    """Of a head's logits of an image, fp32."""
    batch_size: int
    """Images of a step."""
    num_val: int

    @property
    def kept_bytes(self) -> int:
        """What is there between steps: heads as their models began with, as they are, at their best, and gradients."""
        return self.num_heads * (4 + self.num_slots) * self.head_bytes

    @property
    def saved_bytes(self) -> int:
        """Of a checkpoint."""
        return self.num_heads * (2 + self.num_slots) * self.head_bytes

    @property
    def step_bytes(self) -> int:
        """What logits of a step take: they, their logarithms, the gradients of both, smoothed ones, and labels."""
        return self.num_heads * 6 * self.batch_size * self.row_bytes

    @property
    def val_bytes(self) -> int:
        """What logits of a validation take: in pieces, and as a whole."""
        return self.num_heads * 2 * self.num_val * self.row_bytes

    @property
    def resident_bytes(self) -> int:
        """Resident memory of all of it at its peak.

        A checkpoint is made tensor by tensor and then one piece. It is more than a step takes for new gradients, which
        are there twice, beside the old ones.
        """
        logits = max(self.step_bytes, self.val_bytes)
        return math.ceil(_HEADS_FACTOR * (self.kept_bytes + 2 * self.saved_bytes + logits))


def sweep_memory(
    config: SweepConfig, facts: DataFacts | None = None, *, size_of: SizeOf = assumed_image_size
) -> JobMemory:
    """Returns what the processes of a sweep need, and its driver, which measures and, on one machine, makes taps.

    Args:
        config: The sweep; a value of the space that no trial draws counts all the same.
        facts: Of its data; None: as `assumed_facts` has them.
        size_of: Says how large the images of a trial are.

    Raises:
        ConfigError, WeightsError: a trial can't be.
    """
    facts = facts or assumed_facts(config)
    worker = driver = device = 0
    for trial in largest_trials(config):
        alone = training_memory(trial, facts, size_of=size_of)
        more = _shared_bytes(config, trial, facts, size_of(trial))
        worker = max(worker, alone.worker_bytes + more)
        device = max(device, alone.device_bytes + more if alone.device_bytes else 0)
        # It measures each trial as a worker would train it.
        here = replace(trial, cluster=replace(trial.cluster, gpus_per_worker=0, num_workers=1))
        driver = max(driver, training_memory(here, facts, size_of=size_of).worker_bytes + more)
    return JobMemory(worker, device or None, driver)


def largest_trials(config: SweepConfig) -> list[FinetuneConfig]:
    """Returns trials of which one takes most, whatever else the space holds."""
    domains = parse_space(config.space)
    choices = {name: _counting(full_key(name), domain) for name, domain in domains.items()}
    return [trial_config(config, dict(zip(choices, values, strict=True))) for values in product(*choices.values())]


def _counting(key: str, domain: Domain) -> list[Any]:
    values = list(domain.values) if isinstance(domain, Choice) else [domain.low, domain.high]
    if key in _OF_ALL:
        return values
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    others = [value for value in values if value not in numbers]
    if key in _OF_LARGEST and numbers:
        # No size of images stands for the backbone's own, which may be larger.
        return [max(numbers), *others]
    if key == _OF_SMALLEST and numbers:
        return [min(numbers)]
    return values[:1]


def _whole_values(config: SweepConfig, key: str) -> Sequence[Any]:
    """Returns the values that trials have of a key, which takes whole numbers and no range of others."""
    domain = parse_space(config.space).get(key)
    if domain is None:
        return [getattr(config, key)]
    return domain.values if isinstance(domain, Choice) else range(int(domain.low), int(domain.high) + 1)


def _shared_bytes(config: SweepConfig, trial: FinetuneConfig, facts: DataFacts, image_size: int) -> int:
    """Returns what taps take where trials share the outputs of frozen groups, and heads that train as one on them."""
    if config.reuse is Reuse.off:
        return 0
    backbone = trial.backbone
    taps = taps_of(backbone.name, keep_head=backbone.keep_head, image_size=image_size, num_classes=facts.num_classes)
    depths = [len(taps.items) if depth == "all" else int(depth) for depth in _whole_values(config, "freeze_depth")]
    boundaries = {min(depth, taps.head_boundary) for depth in depths} - {0}
    # A batch that is read, as it is stored and as floats, and the one after it.
    largest = max((taps.items[boundary - 1] for boundary in boundaries), default=0)
    num_rows = max(trial.batch_size * trial.accumulate, inference_batch_size(image_size))
    reading = 4 * num_rows * largest
    share_of_heads = sum(depth >= taps.head_boundary for depth in depths) / len(depths)
    if share_of_heads:
        heads = _heads(config, trial, taps, facts, share=share_of_heads)
        num_orders = min(heads.num_heads, len(_whole_values(config, "seed")))
        # Where heads see images in orders of their own: the batch of each order, and once more that of each head.
        if num_orders > 1:
            reading += (num_orders + heads.num_heads) * num_rows * taps.items[taps.head_boundary - 1]
        reading += heads.resident_bytes
    return max(taps.chunk_bytes(boundaries), reading)


def _heads(config: SweepConfig, trial: FinetuneConfig, taps: TapBytes, facts: DataFacts, *, share: float) -> Heads:
    """Returns the heads that train as one, if `share` of all freeze depths leave nothing but them to train."""
    num_trials = config.num_samples
    if config.search is SearchName.grid:
        num_trials = math.ceil(share * grid_size(parse_space(config.space)))
    elif config.search is SearchName.optuna:
        num_trials = config.max_concurrent_trials or 1
    row_bytes = 4 * facts.num_classes
    return Heads(
        num_heads=max(1, min(num_trials, MOST_FUSED, MOST_LOGIT_BYTES // max(1, row_bytes * facts.num_val))),
        head_bytes=taps.head_bytes,
        num_slots=OPTIMIZER_SLOTS[trial.optimizer.name],
        row_bytes=row_bytes,
        batch_size=trial.batch_size * trial.accumulate,
        num_val=facts.num_val,
    )
