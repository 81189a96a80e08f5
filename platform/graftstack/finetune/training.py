"""The training loop. It knows a `Worker`, not what lies behind it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftstack.backbones.weights import hash_state
from graftstack.checkpoint import Checkpoint, CheckpointStore
from graftstack.config.schema import Precision, Select
from graftstack.errors import OutOfMemoryError, RunError, TrainingError
from graftstack.finetune.batches import Sharding, StepBatches, prefetch, step_batches
from graftstack.finetune.head_rate import head_rates
from graftstack.finetune.inference import predict_logits
from graftstack.finetune.metrics import classification_metrics
from graftstack.finetune.optimizers import build_optimizer, set_lr
from graftstack.finetune.phases import Phase
from graftstack.finetune.schedules import lr_factor
from graftstack.finetune.state import Position, pack, unpack
from graftstack.finetune.task import Task
from graftstack.runtime import Worker
from graftstack.seeding import derive_seed
from graftstack.storage import Folder

# Losses are looked at together after this many steps: reading each would make an accelerator wait.
_LOOK_EVERY_STEPS = 10


class Progress(NamedTuple):
    """Where a training stands, for people."""

    step: int
    num_steps: int
    epoch: int
    num_epochs: int
    loss: float
    """Mean over the last steps."""
    lr: float | None
    """Of the last layer group at the last step; None when an epoch has just ended."""
    images_per_s: float | None
    """Since the last report; None when an epoch has just ended."""
    history: tuple[dict[str, float], ...]


class Trained(NamedTuple):
    """The result of a training."""

    history: tuple[dict[str, float], ...]
    epoch: int
    """The epoch that the model is from, counted from 1; 0 if there was none."""
    metrics: dict[str, float]
    """Validation metrics of the model; empty where no row validates."""
    val_logits: Tensor
    """fp32, [num_val, num_classes], in the order of the validation split."""


class Training:
    """One rank's share of a training, from wherever its checkpoints say it stands.

    Where no row validates there are no metrics, and nothing that could choose an epoch: ``select=last``.
    """

    def __init__(
        self,
        task: Task,
        worker: Worker,
        checkpoints: Folder,
        *,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        by_metrics = task.config.select is Select.best or task.config.early_stop is not None
        if by_metrics and task.config.epochs and not len(task.data.splits.val):
            raise ValueError("select=best, early_stop: no row validates; use select=last, and no early_stop")
        self.task = task
        self.config = task.config
        self.worker = worker
        self.on_progress = on_progress
        self.model = task.model.to(worker.device)
        # Before a checkpoint changes any weights: whoever lent the backbone restores those that aren't frozen.
        self.model.backbone.freeze(task.freeze_depth)
        self.optimizer = build_optimizer(self.model, self.config.optimizer, freeze_depth=task.freeze_depth)
        self.class_weights = task.class_weights.to(worker.device)
        self.store = CheckpointStore(checkpoints, num_to_keep=self.config.checkpoint.num_to_keep)
        # Two, because the newest may be of an epoch that a resumed run has yet to repeat.
        self.best = CheckpointStore(checkpoints / "best", num_to_keep=2)
        self.position = Position()
        self._best_state: dict[str, Tensor] = {}
        """Of the best epoch; empty where that was before this process began."""
        self._saved_best_epoch = 0
        self._selected_logits: Tensor | None = None
        """Of the epoch that is selected so far, if this process has seen it."""
        self._saved_at = time.monotonic()
        self._losses: list[Tensor] = []
        self._looked_at = time.perf_counter()
        self._images_since = 0

    def run(self) -> Trained:
        """Trains to the end and returns the model's metrics; `task.model` then holds the selected weights.

        Raises:
            TrainingError: the loss became NaN or infinite; names the step and the learning rate. On all ranks.
            StorageFullError: a checkpoint could not be saved; the last good one is still there.
        """
        for _ in self.epochs():
            pass
        return self.finish()

    def epochs(self) -> Iterator[dict[str, float]]:
        """Trains, and yields the metrics of each epoch at its end; who has seen enough asks for no more.

        Raises as `run`.
        """
        self._resume()
        for phase in self.task.phases:
            if self.position.step < phase.stop and not self._is_over():
                yield from self._run_phase(phase)

    def finish(self) -> Trained:
        """Puts the selected weights into the model and returns what they reach."""
        epoch = len(self.position.history)
        if epoch and self.config.select is Select.best:
            epoch = self.position.best_epoch
            self.model.load_named_state(self._best_state or self._saved_best(epoch), above=self.task.freeze_depth)
        logits = self._selected_logits
        if logits is None:  # the epoch was before this process began, or there was none
            logits = self._validate()
        return Trained(self.position.history, epoch, self._metrics(logits), logits)

    def _saved_best(self, epoch: int) -> dict[str, Tensor]:
        best = self.best.load(epoch)
        if best is None:
            raise RunError(f"{self.best.folder.location}: the weights of epoch {epoch} are gone; start a new run")
        return best.tensors

    def _resume(self) -> None:
        """Starts from the checkpoint that rank 0 chooses: ranks that chose for themselves might not agree."""
        newest = self.store.latest()
        chosen = int(self.worker.gather(torch.tensor([newest.step if newest else -1]))[0])
        if chosen < 0:
            self.position = Position(head_rates=head_rates(self.task, self.worker))
            return
        checkpoint = newest if newest and newest.step == chosen else self.store.load(chosen)
        if checkpoint is None:
            raise RunError(f"{self.store.folder.location}: step {chosen} can't be read by rank {self.worker.rank}")
        for name, value in self._facts.items():
            if checkpoint.meta.get("facts", {}).get(name) != value:
                raise RunError(
                    f"{self.store.folder.location}: the {name.replace('_', ' ')} have changed since the checkpoint was "
                    "made; start a new run"
                )
        self.position = unpack(checkpoint, self.model, self.optimizer, freeze_depth=self.task.freeze_depth)

    @cached_property
    def _facts(self) -> dict[str, str | int]:
        """What a checkpoint leaves out and relies on, by the names that an error gives it."""
        return {
            "data": self.task.data.fingerprint,
            "training_rows": len(self.task.data.splits.train),
            "frozen_weights": hash_state(self.model.backbone.group_state(0, self.task.freeze_depth)),
        }

    def time_step(self, phase: Phase) -> float:
        """Returns the seconds that a step of `phase` takes, after one to warm up. The model trains: give it a copy."""
        self.model.backbone.freeze(phase.freeze_depth)
        self.model.train()
        for batches in self._step_batches(range(2), Sharding(rank=0, world_size=1)):
            began = time.perf_counter()
            self._backward(self.model, batches)
            self.optimizer.step()
        return time.perf_counter() - began

    def _step_batches(self, steps: range, part: Sharding) -> Iterator[StepBatches]:
        task = self.task
        return step_batches(self.config, task.data, task.inputs, task.class_weights, steps=steps, part=part)

    def _run_phase(self, phase: Phase) -> Iterator[dict[str, float]]:
        self.model.backbone.freeze(phase.freeze_depth)
        # Wrapped anew in each phase, so that only what trains in it is reduced over the ranks.
        wrapped = self.worker.prepare_model(self.model)
        steps = range(max(phase.start, self.position.step), phase.stop)
        part = Sharding(self.worker.rank, self.worker.world_size)
        self._looked_at = time.perf_counter()
        self.model.train()
        for batches in prefetch(self._step_batches(steps, part)):
            self._run_step(wrapped, batches, phase)
            if self.position.step % self.task.steps_per_epoch == 0:
                yield self.position.history[-1]
                self.model.train()
                self._looked_at = time.perf_counter()
            if self._is_over():
                break

    def _run_step(self, wrapped: nn.Module, batches: StepBatches, phase: Phase) -> None:
        factor = self._lr_factor(phase, batches.step)
        set_lr(self.optimizer, factor, head_multiplier=self._head_multiplier(phase))
        try:
            # Dropout is a function of the step and not of what ran before it, so that resuming changes nothing.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.config.seed, "step", batches.step, self.worker.rank))
                self._losses.append(self._backward(wrapped, batches))
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"batch_size={self.config.batch_size}: {self.worker.device} has no room for a step; halve it and "
                f"double accumulate={self.config.accumulate}, or use precision=bf16"
            ) from error
        if self.config.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        self.optimizer.step()
        self._images_since += batches.num_images
        self.position = self.position._replace(step=batches.step + 1)
        self._after_step(phase)

    def _lr_factor(self, phase: Phase, step: int) -> float:
        num_steps = phase.schedule_stop - phase.schedule_start
        return lr_factor(self.config.schedule, step=step - phase.schedule_start, num_steps=num_steps)

    def _head_multiplier(self, phase: Phase) -> float:
        trains_alone = phase.freeze_depth >= self.model.head_boundary
        with_backbone, alone = self.position.head_rates
        return alone if trains_alone else with_backbone

    def _backward(self, wrapped: nn.Module, batches: StepBatches) -> Tensor:
        """Adds up the gradients of a step and returns this rank's part of its loss, of which the mean is the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.worker.device)
        scale = self.worker.world_size / batches.total_weight
        for index, batch in enumerate(batches.batches):
            is_last = index + 1 == len(batches.batches)
            with _without_reduction(wrapped, unless=is_last), self._autocast():
                values = self.task.inputs.prepared(batch.values, self.worker.device)
                logits = wrapped(values, self.task.inputs.boundary)
                loss = scale * F.cross_entropy(
                    logits.float(),
                    batch.labels.to(self.worker.device),
                    weight=self.class_weights,
                    label_smoothing=self.config.label_smoothing,
                    reduction="sum",
                )
            with _without_reduction(wrapped, unless=is_last):
                loss.backward()
            total += loss.detach()
        return total

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.config.precision is Precision.bf16
        return torch.autocast(self.worker.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _after_step(self, phase: Phase) -> None:
        step = self.position.step
        ends_epoch = step % self.task.steps_per_epoch == 0
        every = self.config.checkpoint.every_steps
        saves = every is not None and step % every == 0
        if ends_epoch or saves or step % _LOOK_EVERY_STEPS == 0:
            self._look_at_losses(phase)
        if ends_epoch or saves:
            self._average_buffers()
        if ends_epoch:
            self._end_epoch()
        elif saves:
            self.save()

    def _look_at_losses(self, phase: Phase) -> None:
        """Adds up the losses since the last look; all ranks see the same ones and so fail together."""
        losses = torch.stack(self._losses)
        self._losses = []
        self.worker.mean_([losses])
        values = losses.double().tolist()
        first = self.position.step - len(values)
        peak_lr = self.config.optimizer.lr
        for step, value in enumerate(values, start=first):
            if not math.isfinite(value):
                raise not_finite(value, step=step, lr=peak_lr * self._lr_factor(phase, step))
        self.position = self.position._replace(loss_sum=self.position.loss_sum + sum(values))
        elapsed = time.perf_counter() - self._looked_at
        lr = peak_lr * self._lr_factor(phase, self.position.step - 1)
        self._tell(loss=sum(values) / len(values), lr=lr, images_per_s=self._images_since / elapsed)
        self._looked_at, self._images_since = time.perf_counter(), 0

    def _end_epoch(self) -> None:
        epoch = self.position.step // self.task.steps_per_epoch
        logits = self._validate()
        metrics = self._metrics(logits)
        row = {"epoch": epoch, "train_loss": self.position.loss_sum / self.task.steps_per_epoch, **metrics}
        is_best = bool(metrics) and metrics["accuracy"] > self.position.best_accuracy
        self.position = self.position._replace(
            history=(*self.position.history, row),
            best_epoch=epoch if is_best else self.position.best_epoch,
            loss_sum=0.0,
        )
        if is_best and self.config.select is Select.best:
            state = self.model.named_state(above=self.task.freeze_depth)
            self._best_state = {name: tensor.detach().clone() for name, tensor in state.items()}
        if is_best or self.config.select is Select.last:
            self._selected_logits = logits
        if self._is_save_due():
            self.save()
        self._tell(loss=row["train_loss"], lr=None, images_per_s=None)
        self.worker.report(row)

    def _is_save_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.config.checkpoint.min_interval_s

    def save(self) -> None:
        """Saves a checkpoint, on rank 0, of all that the next step depends on. Raises `StorageFullError`."""
        self._saved_at = time.monotonic()
        if self.worker.rank != 0:
            return
        depth, best_epoch = self.task.freeze_depth, self.position.best_epoch
        if self._best_state and best_epoch != self._saved_best_epoch:  # before the position that relies on it
            self.best.save(Checkpoint(best_epoch, self._best_state, {}))
            self._saved_best_epoch = best_epoch
        self.store.save(pack(self.position, self.model, self.optimizer, freeze_depth=depth, facts=self._facts))

    def _average_buffers(self) -> None:
        """Makes the BatchNorm statistics of all ranks the same: each has seen its own part of the images."""
        self.worker.mean_(buffer for buffer in self.model.buffers() if buffer.is_floating_point())

    def _is_over(self) -> bool:
        patience = self.config.early_stop
        return patience is not None and len(self.position.history) - self.position.best_epoch >= patience > 0

    def _validate(self) -> Tensor:
        """Returns the logits of the whole validation part; each rank computes its share."""
        with self._autocast():
            return predict_logits(
                self.model,
                self.task.inputs,
                self.task.data.splits.val,
                self.worker,
                image_size=self.task.preprocessing.image_size,
                num_classes=len(self.task.data.class_names),
            )

    def _metrics(self, logits: Tensor) -> dict[str, float]:
        """Returns the metrics of the validation part's logits; none where nothing validates."""
        labels = torch.from_numpy(self.task.data.labels[self.task.data.splits.val])
        return classification_metrics(logits, labels) if len(labels) else {}

    def _tell(self, *, loss: float, lr: float | None, images_per_s: float | None) -> None:
        if self.worker.rank != 0:
            return
        self.on_progress(
            Progress(
                step=self.position.step,
                num_steps=self.task.num_steps,
                epoch=min(self.config.epochs, self.position.step // self.task.steps_per_epoch + 1),
                num_epochs=self.config.epochs,
                loss=loss,
                lr=lr,
                images_per_s=images_per_s,
                history=self.position.history,
            )
        )


def not_finite(loss: float, *, step: int, lr: float) -> TrainingError:
    """Returns the error of a loss that became NaN or infinite at `step`, counted from 0."""
    return TrainingError(
        f"the loss is {loss} at step {step + 1} (learning rate {lr:.3g}); start a new run with a lower optimizer.lr, "
        "clip_grad_norm=1 or precision=fp32"
    )


def _without_reduction(wrapped: nn.Module, *, unless: bool) -> AbstractContextManager[Any]:
    """While gradients accumulate, ranks keep them to themselves; the last batch of a step averages the sum."""
    no_sync: Callable[[], AbstractContextManager[Any]] | None = getattr(wrapped, "no_sync", None)
    return nullcontext() if unless or no_sync is None else no_sync()
