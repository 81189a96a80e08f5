"""The memory that a process of meta-learning needs: for the episodes of a block, and for those that it scores.

The methods themselves run, on episodes without values: inner loops and their higher derivatives keep what they keep.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from graftstack.backbones.registry import build
from graftstack.config.meta import MetaConfig
from graftstack.errors import ConfigError
from graftstack.finetune.inference import inference_batch_size
from graftstack.finetune.memory import (
    CUDA_DEVICE_BYTES,
    CUDA_HOST_BYTES,
    DEVICE_FACTOR,
    PROCESS_BYTES,
    DataFacts,
    JobMemory,
    PassBytes,
    assumed_facts,
    assumed_image_size,
    heap_bytes,
    unfilled,
)
from graftstack.finetune.weightless import Weightless
from graftstack.meta.batchnorm import batch_statistics
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.episodes import EpisodeShape, training_shape
from graftstack.meta.gradients import as_leaves, embed, looped, of_embeddings, pulled_back, vectorised
from graftstack.meta.job import table_shapes
from graftstack.meta.methods import inner_settings
from graftstack.meta.model import MetaModel
from graftstack.meta.network import Params
from graftstack.meta.steps import blocks_of
from graftstack.reason import reason

# The meta-parameters beside those that a pass holds: as they came, and a gradient as it leaves, before and after.
_VECTORS = 3
# In the driver: parameters, gradient, moments, those of the best validation, and a file's bytes of all that.
_DRIVER_VECTORS = 10
# A joint loss compares all images of a step with each other, in so many matrices at once.
_COMPARISONS = 8


def meta_memory(config: MetaConfig, facts: DataFacts | None = None, *, image_size: int | None = None) -> JobMemory:
    """Returns what the workers of a meta-training need, and its driver, which steps, and scores what they embed.

    Args:
        config: The meta-training; with a group that changes its size, a block is no larger for it.
        facts: Of its data, `num_val` being the images that are evaluated on; None: as `assumed_facts` has them.
        image_size: Of the images, in pixels; None: as `assumed_image_size` has it.

    Raises:
        ConfigError, WeightsError: the backbone can't take such images, or there is none of that name.
    """
    facts = facts or assumed_facts(config)
    size = image_size or assumed_image_size(config)
    try:
        passes = [_training(config, facts, size)] if config.num_episodes else []
        passes.append(_scoring(config, facts, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"data.image_size={size}: {config.backbone.name} can't take such images ({reason(error)}); use another size"
        ) from error
    state, vector = passes[0].state_bytes, passes[0].trained_bytes
    own = PROCESS_BYTES + state + _VECTORS * vector
    features = 2 * 4 * facts.num_val * _feature_dim(config, size)
    driver = PROCESS_BYTES + 2 * state + (_DRIVER_VECTORS + config.num_blocks) * vector + features
    if config.is_joint:
        driver += _COMPARISONS * 4 * (config.episodes_per_step * _num_images(training_shape(config))) ** 2
    if config.cluster.gpus_per_worker:
        device = CUDA_DEVICE_BYTES + math.ceil(DEVICE_FACTOR * (state + max(part.peak_bytes for part in passes)))
        num_images = max(_num_images(shape) for shape in (training_shape(config), *table_shapes(config)))
        batch = 4 * 4 * num_images * 3 * size**2  # as floats, in both layouts, this one and the next
        return JobMemory(own + CUDA_HOST_BYTES + batch, device, driver)
    return JobMemory(own + max(heap_bytes(part) for part in passes), None, driver)


def _training(config: MetaConfig, facts: DataFacts, size: int) -> PassBytes:
    """Returns what the episodes of a worker's share of a step hold, as far as they are there at once."""
    num = max(block.stop - block.start for block in blocks_of(0, config))
    if config.is_joint:  # their graphs are kept until the gradient of the loss comes
        num = -(-config.episodes_per_step // config.cluster.min_workers)
    elif not config.is_vectorised:
        num = min(num, 2)  # one after another

    def run(tuned: MetaConfig, num: int) -> PassBytes:
        def gradients(model: MetaModel, params: Params, statistics: Params) -> None:
            batches = [_episode(training_shape(config), size) for _ in range(num)]
            if config.is_joint:
                leaves = as_leaves(params)
                embedded = [embed(model, leaves, statistics, batch) for batch in batches]
                pulled_back(leaves, embedded, torch.cat([torch.empty_like(part.features) for part in embedded]))
            elif config.method.adapts:
                with model.arithmetic():
                    (vectorised if config.is_vectorised else looped)(model.adapting, params, statistics, batches)
            else:
                of_embeddings(model, params, statistics, batches)

        return _bytes(tuned, facts, size, gradients)

    if not config.method.adapts:
        return _extended(lambda few: run(config, few), num)
    steps = inner_settings(config).num_steps
    return _extended(lambda few: run(replace(config, inner_steps=few), num), steps)


def _scoring(config: MetaConfig, facts: DataFacts, size: int) -> PassBytes:
    """Returns what scoring an episode of the largest shape holds, or a batch of images of which features are wanted."""
    shape = max(table_shapes(config), key=_num_images)
    if config.method.adapts:

        def adapt(model: MetaModel, params: Params, statistics: Params) -> None:
            with model.arithmetic():
                model.adapting.query_logits(params, statistics, _episode(shape, size))

        steps = inner_settings(config).num_eval_steps
        return _extended(
            lambda few: _bytes(replace(config, eval=replace(config.eval, inner_steps=few)), facts, size, adapt), steps
        )
    num = inference_batch_size(size) if config.is_by_features else _num_images(shape)

    def features(model: MetaModel, params: Params, statistics: Params) -> None:
        with torch.no_grad(), batch_statistics():
            model.features(params, statistics, _images(num, size))

    return _bytes(config, facts, size, features)


def _extended(run: Callable[[int], PassBytes], num: int) -> PassBytes:
    """Returns what `num` of something hold, each of which adds as much as the second one does."""
    if num <= 2:
        return run(num)
    one, two = run(1), run(2)
    return two._replace(peak_bytes=two.peak_bytes + (num - 2) * max(0, two.peak_bytes - one.peak_bytes))


def _bytes(
    config: MetaConfig, facts: DataFacts, size: int, run: Callable[[MetaModel, Params, Params], None]
) -> PassBytes:
    """Runs a part of a method on tensors without values."""
    place = Weightless(on_cpu=True)
    with unfilled(config.backbone.name):
        backbone = build(config.backbone.name, image_size=size)
    place.adopt(backbone)
    state = place.live_bytes
    with place:
        model = MetaModel(
            config, image_size=size, num_classes=facts.num_classes, device=torch.device("cpu"), backbone=backbone
        )
        params, statistics = model.method.meta_parameters(), model.network.statistics()
        run(model, params, statistics)
    trained = sum(tensor.nbytes for tensor in params.values())
    return PassBytes(state, trained, place.peak_bytes - state, place.largest_bytes)


def _episode(shape: EpisodeShape, size: int) -> EpisodeBatch:
    ways, shots, queries = shape
    return EpisodeBatch(
        support=_images(ways * shots, size),
        support_labels=torch.empty(ways * shots, dtype=torch.int64),
        queries=_images(ways * queries, size),
        query_labels=torch.empty(ways * queries, dtype=torch.int64),
        classes=torch.empty(ways, dtype=torch.int64),
        num_ways=ways,
        num_shots=shots,
    )


def _images(num: int, size: int) -> Tensor:
    return torch.empty(num, 3, size, size, memory_format=torch.channels_last)


def _num_images(shape: EpisodeShape) -> int:
    return shape.num_ways * (shape.num_shots + shape.num_queries)


def _feature_dim(config: MetaConfig, size: int) -> int:
    with unfilled(config.backbone.name):
        return build(config.backbone.name, image_size=size).feature_dim
