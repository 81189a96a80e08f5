"""What a meta-training would do: a few episodes are timed, nothing is kept."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from graftstack.meta.crew import Crew
from graftstack.meta.episodes import training_shape
from graftstack.meta.evaluation import Evaluation
from graftstack.meta.job import table_shapes
from graftstack.meta.model import MetaModel
from graftstack.meta.steps import blocks_of, gradient_of_step
from graftstack.meta.task import MetaTask

# Held-out episodes that are timed.
_NUM_TIMED = 10


@dataclass(frozen=True, kw_only=True)
class MetaPlan:
    """A validated meta-training in numbers."""

    method: str
    backbone: str
    weights: str
    num_parameters: int
    """Meta-parameters."""
    batchnorm: str
    image_size: int
    """Pixels."""
    num_images: int
    num_skipped_images: int
    num_train_classes: int
    num_val_classes: int
    num_test_classes: int
    training: tuple[int, int, int]
    """Ways, shots and queries of training episodes."""
    num_episodes: int
    num_steps: int
    num_blocks: int
    """Parts that a step can be shared out in; more workers than that would idle."""
    num_workers: int
    evaluation: tuple[tuple[int, int], ...]
    """Ways and shots of the table."""
    num_eval_episodes: int
    """For each of them."""
    episode_s: float
    """Of one training episode, measured in this process."""
    predicted_s: float
    """Training and the last evaluation, on all workers."""


def plan_of(task: MetaTask, model: MetaModel, crew: Crew) -> MetaPlan:
    """Times a step and a few held-out episodes, and returns what all of them would take."""
    config = task.config
    shapes = table_shapes(config)
    state = model.initial(task.backbone)
    step_s = _time(lambda: gradient_of_step(0, state, model, crew)) if config.num_episodes else 0.0
    evaluation = Evaluation(model, crew, task.classes.test, "test")
    eval_s = _time(lambda: evaluation.measure(state, shapes, num_episodes=_NUM_TIMED))
    num_workers = config.cluster.max_workers
    return MetaPlan(
        method=config.method.value,
        backbone=config.backbone.name,
        weights=task.weights_used,
        num_parameters=len(state.parameters),
        batchnorm=config.eval.batchnorm.value,
        image_size=task.preprocessing.image_size,
        num_images=len(task.data),
        num_skipped_images=task.data.num_skipped,
        num_train_classes=len(task.classes.train),
        num_val_classes=len(task.classes.val),
        num_test_classes=len(task.classes.test),
        training=training_shape(config),
        num_episodes=config.num_episodes,
        num_steps=config.num_steps,
        num_blocks=len(blocks_of(0, config)),
        num_workers=num_workers,
        evaluation=tuple(shape[:2] for shape in shapes),
        num_eval_episodes=config.eval.num_episodes,
        episode_s=step_s / config.episodes_per_step,
        predicted_s=(config.num_steps * step_s + eval_s * config.eval.num_episodes / _NUM_TIMED) / num_workers,
    )


def _time(work: Callable[[], object]) -> float:
    """Returns the seconds that `work` takes the second time: the first also pays for what libraries set up."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
