"""What each part of a sweep costs on this machine, found by running a few batches of it."""

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graftstack.config.schema import Precision
from graftstack.finetune.inference import inference_batch_size, predict_logits
from graftstack.finetune.inputs import Rows
from graftstack.finetune.tapping import tap_spec
from graftstack.finetune.task import Task
from graftstack.finetune.training import Training
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder
from graftstack.sweep.fused import FusedTraining
from graftstack.taps.costs import Rates
from graftstack.taps.key import CHUNK_ITEMS
from graftstack.taps.store import TapStore

# Images that are run through the backbone: enough for a stable figure on any.
_NUM_IMAGES = 64
_NUM_REPEATS = 3
# Of a tap that is written and read for the rates.
_RATE_BYTES = 2**24


class Forward(NamedTuple):
    """What comes before the part that trains."""

    rates: Rates
    prefix_s: dict[int, float]
    """Boundary -> seconds an image, from its pixels to there; of all boundaries down to the deepest asked for."""
    samples: dict[int, Tensor]
    """Boundary asked for -> the values of the images that were measured, [B, ...]."""


class Suffix(NamedTuple):
    """What comes after a boundary."""

    step_s: float
    """Seconds of a step, all fused trials together; reading or computing its inputs is left out."""
    val_s: float
    """Seconds a validation row, all fused trials together."""

    def scaled(self, factor: float) -> "Suffix":
        """Returns what `factor` times as many fused trials cost."""
        return Suffix(self.step_s * factor, self.val_s * factor)


@dataclass(frozen=True)
class _SampleInputs:
    """A few values that stand for those of any rows."""

    values: Tensor
    boundary: int

    def training(self, rows: Rows, *, epoch: int) -> Tensor:  # noqa: ARG002 - no view differs from another
        """Returns as many values as there are `rows`."""
        return self.plain(rows)

    def plain(self, rows: Rows) -> Tensor:
        """Returns as many values as there are `rows`."""
        return self.values[torch.arange(len(rows)) % len(self.values)]

    def prepared(self, values: Tensor, device: torch.device) -> Tensor:
        """Returns the values on `device`."""
        return values.to(device).float()


@torch.no_grad()
def measure_forward(task: Task, boundaries: Sequence[int], *, dtype: str, device: torch.device) -> Forward:
    """Returns what it costs to bring images to each of the `boundaries`, and to store and read what comes out there."""
    model = task.model.to(device)
    backbone = model.backbone
    backbone.freeze(backbone.num_groups)
    rows = np.resize(task.data.splits.train, min(_NUM_IMAGES, inference_batch_size(task.preprocessing.image_size)))
    images = task.images
    decode_s = _seconds(lambda: images.prepared(images.plain(rows), device), device) / len(rows)
    values, samples, prefix_s = images.prepared(images.plain(rows), device), {}, {0: 0.0}
    reached, elapsed = 0, 0.0
    with torch.autocast(device.type, torch.bfloat16, enabled=task.config.precision is Precision.bf16):
        for boundary in range(1, max(boundaries, default=0) + 1):
            before, begin = values, reached
            elapsed += _seconds(lambda: backbone.run_groups(before, begin, boundary), device) / len(rows)  # noqa: B023 - called at once
            values, reached = backbone.run_groups(values, reached, boundary), boundary
            prefix_s[boundary] = elapsed
            if boundary in boundaries:
                samples[boundary] = values.cpu()
    read_s, write_s = _rates(task, samples, dtype)
    return Forward(Rates(decode_s=decode_s, read_s_per_byte=read_s, write_s_per_byte=write_s), prefix_s, samples)


def measure_suffix(tasks: Mapping[int, Task], sample: Tensor | None, boundary: int, device: torch.device) -> Suffix:
    """Returns what a step and a validation cost from a boundary on, for one task or for fused ones.

    Args:
        tasks: By the index of their trial. Their model trains; it is copied first.
        sample: Values at the boundary, [B, ...]; None: the images themselves.
        boundary: Where the tasks begin.
        device: Where they train.
    """
    first = next(iter(tasks.values()))
    tap = None if sample is None else _SampleInputs(sample, boundary)
    model = first.model if len(tasks) > 1 else copy.deepcopy(first.model)
    sampled = {
        index: replace(task, tap=tap, model=task.model if len(tasks) > 1 else model) for index, task in tasks.items()
    }
    size = first.preprocessing.image_size
    rows = np.resize(first.data.splits.val, inference_batch_size(size))
    with tempfile.TemporaryDirectory() as folder:
        if len(tasks) > 1:
            fused = FusedTraining(sampled, device, Folder(folder))
            return Suffix(fused.time_step(), fused.time_validation(rows) / len(rows))
        (task,) = sampled.values()
        training = Training(task, LocalWorker(device), Folder(folder))
        num_steps = max(1, task.num_steps)
        step_s = sum(training.time_step(phase) * (phase.stop - phase.start) / num_steps for phase in task.phases)

    def validate() -> Tensor:
        num_classes = len(task.data.class_names)
        return predict_logits(model, task.inputs, rows, LocalWorker(device), image_size=size, num_classes=num_classes)

    return Suffix(step_s, _seconds(validate, device) / len(rows))


def _rates(task: Task, samples: Mapping[int, Tensor], dtype: str) -> tuple[float, float]:
    """Returns seconds a byte of reading a tap and of writing it, found on a small one in a folder of its own."""
    if not samples:
        return 0.0, 0.0
    # The largest one: of a few bytes, what a file costs whatever its size would count as the cost of a byte.
    largest = max(samples, key=lambda boundary: samples[boundary][0].numel())
    spec = replace(tap_spec(task, largest, dtype=dtype), num_items=CHUNK_ITEMS)
    if spec.num_bytes > _RATE_BYTES:
        spec = replace(spec, num_items=max(1, _RATE_BYTES // spec.item_bytes))
    values = samples[largest][torch.arange(spec.num_items) % len(samples[largest])]
    with tempfile.TemporaryDirectory() as folder:
        store = TapStore(folder, budget_bytes=spec.num_bytes)
        began = time.perf_counter()
        store.write_shard(spec, 0, [values])
        write_s = time.perf_counter() - began
        with store.open(spec) as tap:
            items = np.random.default_rng(0).permutation(spec.num_items)[: task.config.batch_size]
            read_s = _seconds(lambda: tap.gather(items), torch.device("cpu"))
    return read_s / (len(items) * spec.item_bytes), write_s / spec.num_bytes


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Returns the median time of `work`, after once to warm up."""
    times = []
    for _ in range(_NUM_REPEATS + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return median(times[1:])
