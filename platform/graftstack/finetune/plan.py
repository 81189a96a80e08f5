"""What a training would do: nothing is trained, nothing is written but the image cache."""

import copy
import tempfile
import time
from dataclasses import dataclass, replace

from graftstack.finetune.inference import predict_logits
from graftstack.finetune.memory import DataFacts, training_memory
from graftstack.finetune.phases import Phase
from graftstack.finetune.task import Task
from graftstack.finetune.training import Training
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder

# Validation images that are timed; enough for a stable figure on any backbone.
_NUM_TIMED = 256


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """One layer group."""

    name: str
    num_parameters: int
    is_frozen: bool


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """One phase of the recipe."""

    first_step: int
    """Counted from 1."""
    last_step: int
    freeze_depth: int
    step_s: float
    """Seconds of one step, measured in this process."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A validated training in numbers."""

    backbone: str
    weights: str
    groups: tuple[GroupPlan, ...]
    num_classes: int
    num_train: int
    num_val: int
    num_test: int
    num_skipped_images: int
    image_size: int
    """Pixels."""
    steps_per_epoch: int
    phases: tuple[PhasePlan, ...]
    cache_bytes: int
    """Decoded images on disk."""
    checkpoint_bytes: int
    """One checkpoint, at its largest."""
    worker_memory_bytes: int
    """Memory of the machine that each worker needs, at the most."""
    device_memory_bytes: int | None
    """Memory of its GPU; None: it has none."""
    validation_s: float
    """Seconds of one validation, measured in this process on a sample."""
    predicted_s: float
    """Seconds of the whole training, in this process."""


def make_plan(task: Task) -> Plan:
    """Returns the plan of a prepared training; measures a few batches of it."""
    trial = replace(task, model=copy.deepcopy(task.model))
    with tempfile.TemporaryDirectory() as folder:
        training = Training(trial, LocalWorker(), Folder(folder))
        phases = tuple(_phase_plan(training, phase) for phase in task.phases)
    validation_s = _time_validation(trial)
    splits, size = task.data.splits, task.preprocessing.image_size
    facts = DataFacts(len(task.data.class_names), len(splits.val))
    memory = training_memory(task.config, facts, size_of=lambda _: size)
    training_s = sum(phase.step_s * (phase.last_step - phase.first_step + 1) for phase in phases)
    return Plan(
        backbone=task.config.backbone.name,
        weights=task.weights_used,
        groups=_groups(task),
        num_classes=len(task.data.class_names),
        num_train=len(splits.train),
        num_val=len(splits.val),
        num_test=len(splits.test),
        num_skipped_images=task.data.num_skipped,
        image_size=size,
        steps_per_epoch=task.steps_per_epoch,
        phases=phases,
        cache_bytes=len(task.data) * size * size * 3,
        checkpoint_bytes=_checkpoint_bytes(task),
        worker_memory_bytes=memory.worker_bytes,
        device_memory_bytes=memory.device_bytes,
        validation_s=validation_s,
        predicted_s=training_s + validation_s * max(1, task.config.epochs),
    )


def _phase_plan(training: Training, phase: Phase) -> PhasePlan:
    return PhasePlan(
        first_step=phase.start + 1,
        last_step=phase.stop,
        freeze_depth=phase.freeze_depth,
        step_s=training.time_step(phase),
    )


def _groups(task: Task) -> tuple[GroupPlan, ...]:
    backbone = task.model.backbone
    return tuple(
        GroupPlan(
            name=group.name,
            num_parameters=sum(parameter.numel() for _, parameter in backbone.group_parameters(index)),
            is_frozen=index < task.freeze_depth,
        )
        for index, group in enumerate(backbone.groups)
    )


def _checkpoint_bytes(task: Task) -> int:
    """What changes of the model, and two moments of whatever trains."""
    model = sum(tensor.nbytes for tensor in task.model.named_state(above=task.freeze_depth).values())
    backbone = task.model.backbone
    trained = [
        p for index in range(task.freeze_depth, backbone.num_groups) for _, p in backbone.group_parameters(index)
    ]
    return model + 2 * sum(parameter.nbytes for parameter in [*trained, *task.model.head.parameters()])


def _time_validation(task: Task) -> float:
    rows = task.data.splits.val
    sample = rows[:_NUM_TIMED]
    began = time.perf_counter()
    predict_logits(
        task.model,
        task.inputs,
        sample,
        LocalWorker(),
        image_size=task.preprocessing.image_size,
        num_classes=len(task.data.class_names),
    )
    return (time.perf_counter() - began) * len(rows) / max(1, len(sample))
