"""The memory that a worker of a training needs, found from shapes alone: no data is read, and nothing computed.

A process holds itself, the model in as many copies as the code keeps, what the optimiser remembers, and what comes and
goes with each batch. Only the last takes more than a sum: the forward and the backward pass of the largest batch run
once on tensors without values (`weightless`), which says what autograd keeps, to the byte. What the allocator loses
between blocks, and kernels take for themselves, is measured and added as a factor.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graftstack.backbones.backbone import resolve_depth
from graftstack.backbones.catalog import default_image_size, family_of, is_timm
from graftstack.backbones.preprocessing import Preprocessing, preprocessing_of
from graftstack.backbones.published import is_published
from graftstack.backbones.registry import build
from graftstack.config.schema import FinetuneConfig, JobConfig, OptimizerName, Precision, Select, Source
from graftstack.errors import ConfigError
from graftstack.finetune.inference import inference_batch_size
from graftstack.finetune.inputs import normalize
from graftstack.finetune.model import GraftedModel, graft
from graftstack.finetune.weightless import Unfilled, Weightless
from graftstack.reason import reason
from graftstack.taps.key import CHUNK_ITEMS

MIB, GIB = 2**20, 2**30

# Resident memory of a process that has imported torch (its CUDA build), torchvision, torchmetrics, ray.train and all of
# graftstack: 942 MiB (torch 2.15, Ray 2.60, Linux, x86); its kernels, once they have run, take 20 to 60 MiB.
PROCESS_BYTES = 1152 * MIB

# What CUDA adds to such a process, and its context and the workspaces of cuDNN and cuBLAS to its device: rules of
# thumb, and no measurements.
CUDA_HOST_BYTES, CUDA_DEVICE_BYTES = 2 * GIB, 1 * GIB

# Resident memory that a step took for what its tensors hold, measured on CPUs with 1 and 2 threads: oneDNN keeps copies
# in layouts of its own, and glibc, which keeps what is freed (`machine.keep_freed_memory`), leaves gaps as large as the
# largest tensors. conv4, which has few and large ones, took 2.1 to 3 times as much as they hold, resnet18 1.7 to 2
# times, resnet50, mobilenet_v2 and densenet121 1.2 to 1.5 times.
_HEAP_FACTOR, _HEAP_LARGEST = 2.0, 4.0

# CUDA's allocator hands out blocks of a few sizes.
DEVICE_FACTOR = 1.25

OPTIMIZER_SLOTS = {OptimizerName.adamw: 2, OptimizerName.sgd: 1}
"""The tensors that an optimiser remembers for each parameter."""

# Families of which models may leave attention to torch.
_ATTENDING = ("vit", "timm")

# Logits of the validation part that are there at once: those of the selected epoch, the newest, and their parts.
_VAL_LOGIT_COPIES = 3


class DataFacts(NamedTuple):
    """What of the data decides over memory.

    Decoded images and taps are mapped from files, and so the system's to drop. Encoded images of a parquet file, which
    are there while they are decoded for the first time, aren't counted.
    """

    num_classes: int
    num_val: int
    """Images that validate."""


class JobMemory(NamedTuple):
    """What the processes of a job need."""

    worker_bytes: int
    """Memory of the machine, for each worker."""
    device_bytes: int | None
    """Memory of a worker's GPU; None: it has none."""
    driver_bytes: int
    """Of the process that plans, hands out work and keeps what comes of it."""


# What is taken for granted of data that isn't at hand: that they are as large as ImageNet.
_ASSUMED = DataFacts(num_classes=1000, num_val=50_000)
_KNOWN = {Source.digits: DataFacts(num_classes=10, num_val=1797)}


def assumed_facts(config: JobConfig) -> DataFacts:
    """Returns what a configuration says of its data, which may lie elsewhere, and for the rest 1000 classes."""
    facts = _KNOWN.get(config.data.source, _ASSUMED)
    return facts._replace(num_classes=len(config.data.classes)) if config.data.classes else facts


def assumed_image_size(config: JobConfig) -> int:
    """Returns the size that images are brought to, in pixels; the backbone's own where the weights lie elsewhere.

    Raises:
        ConfigError, WeightsError: there is no such backbone, or there are no such published weights.
    """
    if config.data.image_size is not None:
        return config.data.image_size
    name, weights = config.backbone.name, config.backbone.weights
    return preprocessing_of(name, weights).image_size if is_published(weights) else default_image_size(name)


SizeOf = Callable[[FinetuneConfig], int]
"""The size that the images of a training are brought to, in pixels."""


def training_memory(
    config: FinetuneConfig,
    facts: DataFacts | None = None,
    *,
    size_of: SizeOf = assumed_image_size,
) -> JobMemory:
    """Returns what the workers of a training need, and its driver, which prepares and trains nothing.

    Args:
        config: The training; a group that shrinks gives most images to each worker when it is smallest.
        facts: Of its data; None: as `assumed_facts` has them.
        size_of: Says how large images are.

    Raises:
        ConfigError, WeightsError: there is no such backbone, freeze depth or size of images.
    """
    facts = facts or assumed_facts(config)
    shape = shape_of(config, facts, size_of(config))
    step = step_of(shape) if config.epochs else None
    inference = inference_of(shape)
    trained = 0 if step is None else step.trained_bytes
    optimizer = OPTIMIZER_SLOTS[config.optimizer.name] * trained
    # What an epoch's best weights, and all ranks' gradients, are gathered in.
    copies = trained * ((config.select is Select.best) + (config.cluster.max_workers > 1))
    # As bytes, tensor by tensor, and as the bytes of a file. What steps have left in the heap doesn't hold large ones.
    checkpoint = 2 * (trained + optimizer)
    logits = _VAL_LOGIT_COPIES * 4 * facts.num_val * facts.num_classes
    # The batches of this step and of the next, while they are made and as they are.
    batches = 4 * config.accumulate * shape.num_images * 3 * shape.image_size**2
    # Gradients are there until the next step begins.
    passes = [inference._replace(peak_bytes=inference.peak_bytes + trained), *([step] if step else [])]
    # The backbone as it is, and as it was before the training.
    common = PROCESS_BYTES + 2 * inference.state_bytes + logits
    driver = common + heap_bytes(inference)
    if config.cluster.gpus_per_worker:
        tensors = inference.state_bytes + optimizer + copies + max(part.peak_bytes for part in passes)
        # On their way to and from the device, tensors are here too.
        host = common + CUDA_HOST_BYTES + checkpoint + trained + optimizer + 2 * batches
        return JobMemory(host, CUDA_DEVICE_BYTES + math.ceil(DEVICE_FACTOR * tensors), driver)
    heap = max(heap_bytes(part) for part in passes)
    return JobMemory(common + optimizer + copies + heap + checkpoint + batches, None, driver)


class PassShape(NamedTuple):
    """All that decides over what a batch holds."""

    backbone: str
    keep_head: bool
    image_size: int
    num_classes: int
    freeze_depth: int | str
    num_images: int
    is_bf16: bool


class PassBytes(NamedTuple):
    """What a model holds, and what comes and goes with a batch."""

    state_bytes: int
    """Parameters and buffers."""
    trained_bytes: int
    """Parameters and buffers above the freeze depth, and those of the head."""
    peak_bytes: int
    """The batch, all that is computed of it and kept for a while, and gradients, at the moment when that is most."""
    largest_bytes: int
    """Of the largest tensor."""


def shape_of(config: FinetuneConfig, facts: DataFacts, image_size: int) -> PassShape:
    """Returns the shape of the largest batch of a worker."""
    return PassShape(
        backbone=config.backbone.name,
        keep_head=config.backbone.keep_head,
        image_size=image_size,
        num_classes=facts.num_classes,
        freeze_depth=config.freeze_depth,
        num_images=-(-config.batch_size // config.cluster.min_workers),
        is_bf16=config.precision is Precision.bf16,
    )


def heap_bytes(part: PassBytes) -> int:
    """Returns the resident memory of a process that what comes and goes takes, gaps and copies of kernels included."""
    return math.ceil(_HEAP_FACTOR * part.peak_bytes + _HEAP_LARGEST * part.largest_bytes)


@cache
def step_of(shape: PassShape) -> PassBytes:
    """Returns what a step of training holds: its forward and its backward pass.

    Raises:
        ConfigError: the backbone can't take such images, or has no such freeze depth.
    """
    place = _place(shape)
    model = _model(place, shape)
    depth = resolve_depth(shape.freeze_depth, model.backbone)
    model.backbone.freeze(depth)
    model.train()
    with _checked(shape), place:
        images, labels = _images(shape), torch.empty(shape.num_images, dtype=torch.int64)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=shape.is_bf16):
            logits = model(normalize(images, Preprocessing(shape.image_size), images.device))
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        loss.backward()
    return _bytes(place, model, depth)


@cache
def inference_of(shape: PassShape) -> PassBytes:
    """Returns what a batch of inference holds, however many images a batch of training has. Raises as `step_of`."""
    place = _place(shape)
    model = _model(place, shape)
    depth = resolve_depth(shape.freeze_depth, model.backbone)
    model.eval()
    shape = shape._replace(num_images=inference_batch_size(shape.image_size))
    with _checked(shape), place, torch.no_grad():
        images = _images(shape)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=shape.is_bf16):
            model(normalize(images, Preprocessing(shape.image_size), images.device)).float()
    return _bytes(place, model, depth)


class TapBytes(NamedTuple):
    """What the outputs of layer groups hold, and the head above them."""

    items: tuple[int, ...]
    """Bytes of an image's output of each layer group, fp32."""
    head_boundary: int
    head_bytes: int

    def chunk_bytes(self, boundaries: Collection[int]) -> int:
        """Returns what a pass holds that makes taps: a chunk of each, in pieces and as a whole."""
        return 2 * CHUNK_ITEMS * sum(self.items[boundary - 1] for boundary in boundaries)


@cache
def taps_of(backbone: str, *, keep_head: bool, image_size: int, num_classes: int) -> TapBytes:
    """Returns how large the taps of a backbone are. Raises as `step_of`."""
    shape = PassShape(backbone, keep_head, image_size, num_classes, 0, 1, is_bf16=False)
    place = _place(shape)
    model = _model(place, shape)
    model.eval()
    items = []
    with _checked(shape), place, torch.no_grad():
        values = torch.empty(1, 3, image_size, image_size)
        for number in range(model.backbone.num_groups):
            values = model.backbone.run_groups(values, number, number + 1)
            items.append(values.nbytes)
    head_bytes = sum(parameter.nbytes for parameter in model.head.parameters())
    return TapBytes(tuple(items), model.head_boundary, head_bytes)


def _place(shape: PassShape) -> Weightless:
    return Weightless(on_cpu=shape.is_bf16 or family_of(shape.backbone) in _ATTENDING)


def _model(place: Weightless, shape: PassShape) -> GraftedModel:
    """Returns the model of a training in a place without values; reads no weights."""
    own_head = shape.num_classes if shape.keep_head else None
    with unfilled(shape.backbone):
        backbone = build(shape.backbone, num_classes=own_head, image_size=shape.image_size)
        model = graft(backbone, num_classes=shape.num_classes, keep_head=shape.keep_head, seed=0)
    place.adopt(model)
    return model


@contextmanager
def unfilled(backbone: str) -> Iterator[None]:
    """Inside, a backbone is built that a `Weightless` is going to adopt, and torch's random stream stays as it was."""
    # timm's models are taken apart by running them.
    with torch.random.fork_rng(devices=[]), nullcontext() if is_timm(backbone) else Unfilled():
        yield


def _images(shape: PassShape) -> Tensor:
    return torch.empty(shape.num_images, 3, shape.image_size, shape.image_size, dtype=torch.uint8)


@contextmanager
def _checked(shape: PassShape) -> Iterator[None]:
    """Says of which images a backbone complains."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"data.image_size={shape.image_size}: {shape.backbone} can't take {shape.num_images} images of that size "
            f"({reason(error)}); use its own {default_image_size(shape.backbone)}, or a larger batch_size"
        ) from error


def _bytes(place: Weightless, model: GraftedModel, depth: int) -> PassBytes:
    state = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trained = sum(tensor.nbytes for tensor in model.named_state(above=depth).values())
    return PassBytes(state, trained, place.peak_bytes - state, place.largest_bytes)
