"""The outer loop: steps over blocks of episodes, on whatever crew goes through them."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from graftstack.backbones.weights import hash_state
from graftstack.checkpoint import Checkpoint, CheckpointStore
from graftstack.config.schema import Select
from graftstack.errors import RunError, TrainingError
from graftstack.finetune.model import without_prefix
from graftstack.finetune.optimizers import OPTIMIZERS, decay_groups, set_lr
from graftstack.finetune.schedules import lr_factor
from graftstack.finetune.state import load_optimizer_slots, optimizer_slots
from graftstack.meta.crew import Crew
from graftstack.meta.methods import meta_sgd
from graftstack.meta.model import MetaModel, MetaState
from graftstack.meta.network import Params
from graftstack.meta.steps import StepGradient, gradient_of_step
from graftstack.meta.task import MetaTask
from graftstack.storage import Folder

# How often people are told where the training stands, in seconds.
_TELL_EVERY_S = 0.5

# How often a training is validated, unless said otherwise.
_NUM_VALIDATIONS = 10


class Pace(NamedTuple):
    """How a few episodes went."""

    loss: float
    """Mean over them."""
    accuracy: float
    """Of their queries, likewise."""
    episodes_per_s: float
    """While training; validation doesn't count."""


class MetaProgress(NamedTuple):
    """Where a meta-training stands, for people."""

    episode: int
    num_episodes: int
    pace: Pace | None
    """Of the last episodes; None: this session has trained none yet."""
    history: tuple[dict[str, Any], ...]


class Position(NamedTuple):
    """Where a meta-training stands; with the tensors, all that the next step depends on."""

    step: int = 0
    """Steps of the outer loop that are done."""
    history: tuple[dict[str, Any], ...] = ()
    """The learning curve: a row for the untrained start, and one after each validation."""
    best_step: int = 0
    """After how many steps validation accuracy was best."""
    loss_sum: float = 0.0
    """Since the last row, over `num_losses` episodes."""
    accuracy_sum: float = 0.0
    num_losses: int = 0


class MetaTrained(NamedTuple):
    """The result of a meta-training."""

    state: MetaState
    num_episodes: int
    """Training episodes that the state has seen."""
    history: tuple[dict[str, Any], ...]


class MetaTraining:
    """A meta-training, from wherever its checkpoints say it stands.

    Args:
        task: What is trained.
        model: The method.
        crew: Goes through the episodes.
        checkpoints: Where the state is saved.
        validate: Returns columns of the learning curve that say how good a state is, `accuracy` among them; None: no
            class validates.
        on_progress: Told now and then where the training stands.
        poll: As `Crew.call` has it.
    """

    def __init__(
        self,
        task: MetaTask,
        model: MetaModel,
        crew: Crew,
        checkpoints: Folder,
        *,
        validate: Callable[[MetaState], dict[str, float]] | None,
        on_progress: Callable[[MetaProgress], None] = lambda _: None,
        poll: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.task = task
        self.config = task.config
        self.model = model
        self.crew = crew
        self.validate = validate
        self.on_progress = on_progress
        self.poll = poll
        initial = model.initial(task.backbone)
        self.parameters = {name: nn.Parameter(tensor) for name, tensor in model.parameters(initial).items()}
        self.statistics = model.statistics(initial)
        self.optimizer = self._optimizer()
        self.store = CheckpointStore(checkpoints, num_to_keep=self.config.checkpoint.num_to_keep)
        # Two, because the newest may be of a validation that a resumed run has yet to repeat.
        self.best = CheckpointStore(checkpoints / "best", num_to_keep=2)
        self.position = Position()
        self._saved_at = time.monotonic()
        self._pace: Pace | None = None
        self._timed_at = time.perf_counter()
        self._losses: list[float] = []
        self._accuracies: list[float] = []
        self._num_timed = 0

    @property
    def state(self) -> MetaState:
        """The meta-parameters and running statistics as they are now."""
        return self.model.pack({**self.parameters}, self.statistics)

    def run(self) -> MetaTrained:
        """Trains to the end and returns the selected state.

        Raises:
            TrainingError: an inner loop diverged, or a loss isn't finite; names the step.
            StorageFullError: a checkpoint can't be saved; the last good one is still there.
        """
        self._resume()
        if not self.position.history and self.validate is not None:
            self._validate()
        self._timed_at = time.perf_counter()
        for step in range(self.position.step, self.config.num_steps):
            try:
                found = gradient_of_step(step, self.state, self.model, self.crew, poll=self.poll)
            except TrainingError as error:
                raise TrainingError(f"step {step + 1} of {self.config.num_steps}: {error}") from error
            self._update(step, found)
            if self._is_validation_due():
                self._validate()
            if self._is_save_due():
                self.save()
        return self._selected()

    def _update(self, step: int, found: StepGradient) -> None:
        """Moves the meta-parameters, and the running statistics episode by episode."""
        factor = lr_factor(self.config.schedule, step=step, num_steps=self.config.num_steps)
        set_lr(self.optimizer, factor, head_multiplier=1.0)
        for name, slope in self.model.named_parameters(found.gradient).items():
            self.parameters[name].grad = slope
        if self.config.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_grad_norm)
        self.optimizer.step()
        for moments in found.moments:
            self.statistics = self.model.network.updated(self.statistics, self.model.named_statistics(moments))
        position = self.position
        self.position = position._replace(
            step=step + 1,
            loss_sum=position.loss_sum + sum(found.losses),
            accuracy_sum=position.accuracy_sum + sum(found.accuracies),
            num_losses=position.num_losses + len(found.losses),
        )
        self._losses += found.losses
        self._accuracies += found.accuracies
        self._num_timed += self.config.episodes_per_step
        if time.perf_counter() - self._timed_at >= _TELL_EVERY_S:
            self._take_pace()
            self._tell()

    def _take_pace(self) -> None:
        """Sums up the episodes since the last time."""
        now = time.perf_counter()
        self._pace = Pace(
            loss=sum(self._losses) / len(self._losses),
            accuracy=sum(self._accuracies) / len(self._accuracies),
            episodes_per_s=self._num_timed / (now - self._timed_at),
        )
        self._losses, self._accuracies, self._num_timed, self._timed_at = [], [], 0, now

    def _tell(self) -> None:
        episode = self.position.step * self.config.episodes_per_step
        self.on_progress(MetaProgress(episode, self.config.num_episodes, self._pace, self.position.history))

    def _is_validation_due(self) -> bool:
        return self.position.step in self._validation_steps

    @cached_property
    def _validation_steps(self) -> frozenset[int]:
        """After how many steps each validation comes; the last is at the end."""
        num_steps, per_step = self.config.num_steps, self.config.episodes_per_step
        every = self.config.eval.every_episodes
        interval = math.ceil(num_steps / _NUM_VALIDATIONS) if every is None else math.ceil(every / per_step)
        return frozenset({*range(interval, num_steps, interval), num_steps})

    def _validate(self) -> None:
        """Adds a row to the learning curve; of what was trained since the last, and of how good the state is now."""
        if self._losses:
            self._take_pace()
        position = self.position
        num = position.num_losses
        row: dict[str, Any] = {
            "episode": position.step * self.config.episodes_per_step,
            "train_loss": position.loss_sum / num if num else None,
            "train_accuracy": position.accuracy_sum / num if num else None,
        }
        is_best = False
        if self.validate is not None:
            row |= self.validate(self.state)
            is_best = row["accuracy"] > max((found["accuracy"] for found in position.history), default=-1.0)
        self.position = position._replace(
            history=(*position.history, row),
            best_step=position.step if is_best else position.best_step,
            loss_sum=0.0,
            accuracy_sum=0.0,
            num_losses=0,
        )
        if is_best and self.config.select is Select.best:
            self.best.save(Checkpoint(position.step, self._tensors(), {}))
        self._tell()
        self._timed_at = time.perf_counter()  # validation is no part of the pace

    def _selected(self) -> MetaTrained:
        position = self.position
        step = position.best_step if self.config.select is Select.best and self.validate is not None else position.step
        state = self.state
        if step != position.step:
            best = self.best.load(step)
            if best is None:
                raise RunError(f"{self.best.folder.location}: the state after step {step} is gone; start a new run")
            tensors = best.tensors
            state = self.model.pack(without_prefix(tensors, "parameters/"), without_prefix(tensors, "statistics/"))
        return MetaTrained(state, step * self.config.episodes_per_step, position.history)

    def _is_save_due(self) -> bool:
        step, every = self.position.step, self.config.checkpoint.every_steps
        is_old = time.monotonic() - self._saved_at >= self.config.checkpoint.min_interval_s
        return is_old or step == self.config.num_steps or (every is not None and step % every == 0)

    def save(self) -> None:
        """Saves all that the next step depends on. Raises `StorageFullError`."""
        slots, scalars = optimizer_slots(self.optimizer)
        tensors = self._tensors() | {f"optimizer/{name}": tensor for name, tensor in slots.items()}
        meta = {"position": self.position._asdict(), "optimizer": scalars, "facts": self._facts}
        self.store.save(Checkpoint(self.position.step, tensors, meta))
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        newest = self.store.latest()
        if newest is None:
            return
        for name, value in self._facts.items():
            if newest.meta["facts"].get(name) != value:
                raise RunError(
                    f"{self.store.folder.location}: the {name.replace('_', ' ')} have changed since the checkpoint was "
                    "made; start a new run"
                )
        with torch.no_grad():
            for name, tensor in without_prefix(newest.tensors, "parameters/").items():
                self.parameters[name].copy_(tensor)
        self.statistics = without_prefix(newest.tensors, "statistics/")
        slots = without_prefix(newest.tensors, "optimizer/")
        load_optimizer_slots(self.optimizer, slots | newest.meta["optimizer"])
        position = newest.meta["position"]
        self.position = Position(**{**position, "history": tuple(position["history"])})

    @cached_property
    def _facts(self) -> dict[str, str | int]:
        """What a checkpoint leaves out and relies on, by the names that an error gives it."""
        return {
            "data": self.task.data.fingerprint,
            "training_classes": self.task.classes.train.digest,
            "initial_weights": hash_state(self.task.backbone.backbone_state()),
        }

    def _tensors(self) -> Params:
        named = {f"parameters/{name}": tensor.detach() for name, tensor in self.parameters.items()}
        return named | {f"statistics/{name}": tensor for name, tensor in self.statistics.items()}

    def _optimizer(self) -> torch.optim.Optimizer:
        """Learnt rates of an inner loop are no weights, and so don't decay."""
        config = self.config.optimizer
        weights = (tensor for name, tensor in self.parameters.items() if not name.startswith(meta_sgd.PREFIX))
        rates = (tensor for name, tensor in self.parameters.items() if name.startswith(meta_sgd.PREFIX))
        groups = decay_groups(weights, config.lr, config)
        groups += decay_groups(rates, config.lr, replace(config, weight_decay=0.0))
        return OPTIMIZERS[config.name](groups, config)
