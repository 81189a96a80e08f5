"""One of several trials whose heads train fused: all that it has of its own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from graftstack.config.schema import Select
from graftstack.finetune.metrics import classification_metrics
from graftstack.finetune.optimizers import OPTIMIZERS, head_groups, set_lr
from graftstack.finetune.schedules import lr_factor
from graftstack.finetune.state import load_optimizer_slots, optimizer_slots
from graftstack.finetune.task import Task


class Member:
    """A trial's head, which lies in a stack of heads, its optimiser, and what it has reached."""

    def __init__(self, index: int, name: str, task: Task) -> None:
        self.index = index
        self.name = name
        """What tells it from another trial that may once have had its index."""
        self.task = task
        self.head_rate = 1.0
        self.history: list[dict[str, float]] = []
        self.best_epoch = 0
        self.params = {name: nn.Parameter(value.detach()) for name, value in task.model.head.named_parameters()}
        config = task.config.optimizer
        self.optimizer = OPTIMIZERS[config.name](head_groups(self.params.values(), config), config)

    @property
    def is_over(self) -> bool:
        """Whether it has gone without a better accuracy for as long as it may."""
        patience = self.task.config.early_stop
        return patience is not None and len(self.history) - self.best_epoch >= patience

    @property
    def selected_epoch(self) -> int:
        """The epoch whose weights are the result, counted from 1; 0 if there was none."""
        return self.best_epoch if self.task.config.select is Select.best else len(self.history)

    @property
    def selected_metrics(self) -> dict[str, float]:
        """The validation metrics of that epoch."""
        row = self.history[self.selected_epoch - 1]
        return {name: value for name, value in row.items() if name not in ("epoch", "train_loss")}

    def move_into(self, stack: Mapping[str, Tensor], position: int) -> None:
        """Makes the parameters the entries of a stack, [G, ...] each: who updates them updates the stack."""
        for name, param in self.params.items():
            param.data = stack[name].detach()[position]

    def lr_factor(self, step: int) -> float:
        """Returns the factor of the peak learning rate at `step`."""
        phase = next(phase for phase in self.task.phases if step < phase.stop)
        num_steps = phase.schedule_stop - phase.schedule_start
        return lr_factor(self.task.config.schedule, step=step - phase.schedule_start, num_steps=num_steps)

    def update(self, step: int, grads: Mapping[str, Tensor]) -> None:
        """Takes an optimiser's step along its own gradients, as a trial that trains alone."""
        for name, param in self.params.items():
            param.grad = grads[name]
        if self.task.config.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.params.values(), self.task.config.clip_grad_norm)
        set_lr(self.optimizer, self.lr_factor(step), head_multiplier=self.head_rate)
        self.optimizer.step()

    def end_epoch(self, train_loss: float, logits: Tensor, labels: Tensor) -> bool:
        """Adds a row to the history; returns whether it is the best."""
        row = {"epoch": len(self.history) + 1, "train_loss": train_loss, **classification_metrics(logits, labels)}
        best = self.history[self.best_epoch - 1]["accuracy"] if self.best_epoch else -1.0
        self.history.append(row)
        if row["accuracy"] > best:
            self.best_epoch = len(self.history)
        return self.best_epoch == len(self.history)

    def facts(self) -> dict[str, Any]:
        """Returns what of its state is no tensor, as JSON."""
        own = {key: getattr(self, key) for key in ("index", "name", "head_rate", "history", "best_epoch")}
        return {**own, "scalars": optimizer_slots(self.optimizer).scalars}

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of its optimiser, the live ones, by slot."""
        return optimizer_slots(self.optimizer).tensors

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `facts` and `tensors` returned."""
        self.head_rate, self.history = facts["head_rate"], list(facts["history"])
        self.best_epoch = facts["best_epoch"]
        load_optimizer_slots(self.optimizer, {**facts["scalars"], **tensors})
