"""What a meta-training would do: a few episodes are timed, nothing is kept."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graftstack.finetune.memory import DataFacts
from graftstack.meta.classes import Classes
from graftstack.meta.crew import Crew
from graftstack.meta.episodes import EpisodeShape, training_shape
from graftstack.meta.evaluation import Evaluation, Rows
from graftstack.meta.job import table_shapes
from graftstack.meta.memory import meta_memory
from graftstack.meta.model import Floats, MetaModel, MetaState
from graftstack.meta.steps import blocks_of, gradient_of_step
from graftstack.meta.task import MetaTask

# Held-out episodes, and images of them, that are timed.
_NUM_TIMED = 10
_NUM_TIMED_IMAGES = 100


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
    worker_memory_bytes: int
    """Memory of the machine that each worker needs, at the most."""
    device_memory_bytes: int | None
    """Memory of its GPU; None: it has none."""
    episode_s: float
    """Of one training episode, measured in this process."""
    predicted_s: float
    """Training, its validations and the last evaluation, on all workers."""


def plan_of(task: MetaTask, model: MetaModel, crew: Crew) -> MetaPlan:
    """Times a step and a few episodes and images of other parts, and returns what all of them would take."""
    config = task.config
    shapes = table_shapes(config)
    state = model.initial(task.backbone)
    step_s = _time(lambda: gradient_of_step(0, state, model, crew)) if config.num_episodes else 0.0
    stopwatch = _Stopwatch(task, model, crew, state)
    eval_s = stopwatch.evaluation_s("test", shapes, config.eval.num_episodes)
    if num_validations := _num_validations(task):
        shape = EpisodeShape(config.num_ways, config.num_shots, config.num_queries)
        eval_s += num_validations * stopwatch.evaluation_s("val", [shape], config.eval.num_val_episodes)
    facts = DataFacts(len(task.classes.train), int(task.classes.test.counts.sum()))
    memory = meta_memory(config, facts, image_size=task.preprocessing.image_size)
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
        num_workers=config.cluster.max_workers,
        evaluation=tuple(shape[:2] for shape in shapes),
        num_eval_episodes=config.eval.num_episodes,
        worker_memory_bytes=memory.worker_bytes,
        device_memory_bytes=memory.device_bytes,
        episode_s=step_s / config.episodes_per_step,
        predicted_s=config.num_steps * step_s / config.cluster.max_workers + eval_s,
    )


@dataclass(frozen=True)
class _Stopwatch:
    """Times evaluations of a state."""

    task: MetaTask
    model: MetaModel
    crew: Crew
    state: MetaState

    def evaluation_s(self, part: str, shapes: Sequence[EpisodeShape], num_episodes: int) -> float:
        """Returns the seconds of one evaluation on all workers."""
        if self.task.config.is_by_features:
            return self._embedding_s(part, shapes, num_episodes) + self._scoring_s(part, shapes, num_episodes)
        evaluation = Evaluation(self.model, self.crew, self._classes(part), part)
        some_s = _time(lambda: evaluation.measure(self.state, shapes, num_episodes=_NUM_TIMED))
        return some_s * num_episodes / _NUM_TIMED / self.task.config.cluster.max_workers

    def _embedding_s(self, part: str, shapes: Sequence[EpisodeShape], num_episodes: int) -> float:
        """Each image is embedded once, in however many episodes it is."""
        classes = self._classes(part)
        num_drawn = num_episodes * sum(shape.num_ways * (shape.num_shots + shape.num_queries) for shape in shapes)
        rows = classes.rows[classes.rows >= 0][:_NUM_TIMED_IMAGES]
        turns = np.repeat(classes.turns, classes.counts)[:_NUM_TIMED_IMAGES]
        some_s = _time(lambda: self.crew.call("features", [[rows, turns]], shared=[self.state]))
        num_images = min(int(classes.counts.sum()), num_drawn)
        return some_s * num_images / len(rows) / self.task.config.cluster.max_workers

    def _scoring_s(self, part: str, shapes: Sequence[EpisodeShape], num_episodes: int) -> float:
        """Once images are embedded, this process alone goes through the episodes."""

        def features_of(images: Rows) -> Floats:
            return np.zeros((len(images.rows), self.model.network.feature_dim), np.float32)

        evaluation = Evaluation(self.model, self.crew, self._classes(part), part, features_of=features_of)
        some_s = _time(lambda: evaluation.measure(self.state, shapes, num_episodes=_NUM_TIMED))
        return some_s * num_episodes / _NUM_TIMED

    def _classes(self, part: str) -> Classes:
        classes: Classes = getattr(self.task.classes, part)
        return classes


def _num_validations(task: MetaTask) -> int:
    """Returns how often a training is validated, its untrained start included."""
    config = task.config
    if not config.num_episodes or not len(task.classes.val):
        return 0
    every = config.eval.every_episodes
    return 1 + (min(10, config.num_steps) if every is None else math.ceil(config.num_episodes / every))


def _time(work: Callable[[], object]) -> float:
    """Returns the seconds that `work` takes the second time: the first also pays for what libraries set up."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
