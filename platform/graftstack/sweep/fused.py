"""Many heads on one tap, trained as one: a batched matrix product takes the place of a product for each trial.

Each trial keeps what it would have alone: its batches, schedule, decay, clipping, early stop, best epoch and metrics.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from graftstack.checkpoint import Checkpoint, CheckpointStore
from graftstack.config.schema import Precision, Select
from graftstack.finetune.batches import step_rows
from graftstack.finetune.head_rate import head_rates
from graftstack.finetune.inference import inference_batch_size
from graftstack.finetune.metrics import classification_metrics
from graftstack.finetune.model import without_prefix
from graftstack.finetune.schedules import lr_factor
from graftstack.finetune.task import Task
from graftstack.finetune.training import not_finite
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder
from graftstack.sweep.fused_optimizers import FUSED_OPTIMIZERS

# What makes a head's output random, or a function of more than its input: such heads train alone.
_IMPURE = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)  # noqa: SLF001 - the public bases of none


def obstacle_to_fusing(task: Task) -> str | None:
    """Returns why a task's head can't be trained together with others, or None."""
    head = task.model.head
    if task.boundary < task.model.head_boundary:
        return "layer groups train too"
    if task.config.optimizer.name not in FUSED_OPTIMIZERS:
        return f"optimizer={task.config.optimizer.name.value} has no fused form"
    if any(isinstance(module, _IMPURE) for module in head.modules()) or next(head.buffers(), None) is not None:
        return "the head has dropout or statistics of its own"
    return None


def fusing_key(task: Task) -> tuple[Any, ...]:
    """Returns what must be the same for tasks to be trained together."""
    config = task.config
    shapes = tuple((name, tuple(value.shape)) for name, value in task.model.head.named_parameters())
    splits = task.data.splits
    return (
        *(config.optimizer.name, config.batch_size * config.accumulate, config.epochs, config.precision, shapes),
        *(len(splits.train), len(splits.val), task.preprocessing.image_size),
    )


class Ended(NamedTuple):
    """What a member has reached; its head holds the weights."""

    history: tuple[dict[str, float], ...]
    epoch: int
    """The epoch that the weights are from, counted from 1; 0 if there was none."""
    metrics: dict[str, float]
    """Validation metrics of the weights."""


class _Member:
    """One trial of the fused ones: what isn't a tensor."""

    def __init__(self, index: int, name: str, task: Task) -> None:
        self.index = index
        self.name = name
        self.task = task
        self.head_rate = 1.0
        self.history: list[dict[str, float]] = []
        self.best_epoch = 0

    @property
    def is_over(self) -> bool:
        """Whether it has gone without a better accuracy for as long as it may."""
        patience = self.task.config.early_stop
        return patience is not None and len(self.history) - self.best_epoch >= patience

    def lr(self, step: int) -> float:
        """Returns the learning rate of the last layer group at `step`."""
        phase = next(phase for phase in self.task.phases if step < phase.stop)
        num_steps = phase.schedule_stop - phase.schedule_start
        config = self.task.config
        return config.optimizer.lr * lr_factor(config.schedule, step=step - phase.schedule_start, num_steps=num_steps)

    @property
    def selected_epoch(self) -> int:
        """The epoch whose weights are the result, counted from 1; 0 if there was none."""
        return self.best_epoch if self.task.config.select is Select.best else len(self.history)

    @property
    def selected_metrics(self) -> dict[str, float]:
        """The validation metrics of that epoch."""
        row = self.history[self.selected_epoch - 1]
        return {name: value for name, value in row.items() if name not in ("epoch", "train_loss")}

    def end_epoch(self, train_loss: float, logits: Tensor, labels: Tensor) -> bool:
        """Adds a row to the history; returns whether it is the best."""
        row = {"epoch": len(self.history) + 1, "train_loss": train_loss, **classification_metrics(logits, labels)}
        best = self.history[self.best_epoch - 1]["accuracy"] if self.best_epoch else -1.0
        self.history.append(row)
        if row["accuracy"] > best:
            self.best_epoch = len(self.history)
        return self.best_epoch == len(self.history)


class _Cohort(NamedTuple):
    """Members that see the same rows in the same order."""

    task: Task
    positions: list[int]


class FusedTraining:
    """The training of the heads of several tasks, which read the same tap and agree in `fusing_key`."""

    def __init__(
        self,
        tasks: Mapping[int, Task],
        device: torch.device,
        checkpoints: Folder,
        *,
        names: Mapping[int, str] | None = None,
    ) -> None:
        """Makes the heads, stacked.

        Args:
            tasks: By the index of their trial; each with its tap.
            device: Where they train.
            checkpoints: Where the state of all is kept.
            names: What tells a trial from another that may once have had its index.
        """
        self._members = [_Member(index, (names or {}).get(index, ""), task) for index, task in tasks.items()]
        self._device = device
        self._store = CheckpointStore(checkpoints, num_to_keep=1)
        self._saved_at = time.monotonic()
        heads = [dict(member.task.model.head.named_parameters()) for member in self._members]
        self._params = {
            name: torch.stack([head[name].detach() for head in heads]).to(device).requires_grad_() for name in heads[0]
        }
        self._best = {name: value.detach().clone() for name, value in self._params.items()}
        self._optimizer = FUSED_OPTIMIZERS[self._first.config.optimizer.name](
            self._params, [member.task.config.optimizer for member in self._members]
        )
        self._head = self._first.model.head.to(device)
        self._regroup()
        self.failures: dict[int, Exception] = {}
        """Members whose loss became NaN or infinite, by index; they are dropped already."""

    @property
    def indices(self) -> list[int]:
        """The members that are still training."""
        return [member.index for member in self._members]

    def epochs(self) -> Iterator[dict[int, dict[str, float]]]:
        """Trains, and yields at the end of each epoch the metrics of every member, by index.

        Between two epochs `drop` may take members out. Ends when no member has anything left to train.
        """
        self._resume()
        if self._optimizer.num_steps == 0:
            worker = LocalWorker(self._device)
            for member in self._members:
                member.head_rate = head_rates(member.task, worker)[1]
        first = self._first
        while self._members and self._optimizer.num_steps < first.num_steps:
            self._run_epoch()
            if self._members:
                yield {member.index: member.history[-1] for member in self._members}
            if self._members and time.monotonic() - self._saved_at >= first.config.checkpoint.min_interval_s:
                self._save()

    @property
    def over(self) -> list[int]:
        """The members that stop early by their own rule."""
        return [member.index for member in self._members if member.is_over]

    def finish(self, indices: Sequence[int]) -> dict[int, Ended]:
        """Puts the selected weights into the heads of some members, says what they reach, and drops them."""
        chosen = [position for position, member in enumerate(self._members) if member.index in indices]
        logits = self._validate(self._params) if any(not self._members[at].history for at in chosen) else None
        ended = {}
        for position in chosen:
            member = self._members[position]
            source = self._best if member.history and member.task.config.select is Select.best else self._params
            head = {name: value[position].detach().cpu() for name, value in source.items()}
            member.task.model.head.load_state_dict(head)
            if logits is not None and not member.history:
                metrics = classification_metrics(logits[position], _val_labels(member.task))
            else:
                metrics = member.selected_metrics
            ended[member.index] = Ended(tuple(member.history), member.selected_epoch, metrics)
        self.drop(indices)
        return ended

    def drop(self, indices: Sequence[int]) -> None:
        """Goes on without some members."""
        kept = [position for position, member in enumerate(self._members) if member.index not in indices]
        if len(kept) == len(self._members):
            return
        self._members = [self._members[position] for position in kept]
        positions = torch.tensor(kept, dtype=torch.long, device=self._device)
        self._params = {name: value.detach()[positions].requires_grad_() for name, value in self._params.items()}
        self._best = {name: value[positions] for name, value in self._best.items()}
        self._optimizer.narrow(positions)
        self._regroup()

    def time_step(self, *, num: int = 5) -> float:
        """Returns the seconds that a step of all members takes, after one to warm up. The members train."""
        times = [0.0]
        for step, values, labels in self._steps(range(min(num + 1, self._first.num_steps))):
            began = time.perf_counter()
            self._run_step(step, values, labels).sum().item()
            times.append(time.perf_counter() - began)
        warm = times[2:] or times[1:] or times
        return sum(warm) / len(warm)

    def time_validation(self, rows: np.ndarray) -> float:
        """Returns the seconds that a validation of all members on `rows` takes, metrics included."""
        labels = torch.zeros(len(rows), dtype=torch.long)

        def validate(members: slice) -> None:
            for logits in self._validate(self._params, rows=rows)[members]:
                classification_metrics(logits, labels)

        validate(slice(1))  # to warm up: the first metrics import their library
        began = time.perf_counter()
        validate(slice(None))
        return time.perf_counter() - began

    @property
    def _first(self) -> Task:
        return self._members[0].task

    def _regroup(self) -> None:
        """Notes who shares batches, and the settings of all as vectors [G]."""
        cohorts: dict[tuple[int, bytes, bytes], _Cohort] = {}
        for position, member in enumerate(self._members):
            data = member.task.data
            key = (member.task.config.seed, data.splits.train.tobytes(), data.splits.val.tobytes())
            cohorts.setdefault(key, _Cohort(member.task, [])).positions.append(position)
        self._cohorts = list(cohorts.values())
        configs = [member.task.config for member in self._members]
        self._smoothing = self._vector([config.label_smoothing for config in configs])
        self._max_norm = self._vector([config.clip_grad_norm or math.inf for config in configs])
        if configs:
            self._class_weights = torch.stack([member.task.class_weights for member in self._members]).to(self._device)

    def _vector(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def _run_epoch(self) -> None:
        begin = self._optimizer.num_steps
        steps = range(begin, begin + self._first.steps_per_epoch)
        losses = [self._run_step(step, values, labels) for step, values, labels in self._steps(steps)]
        self._end_epoch(torch.stack(losses).double().cpu(), begin)

    def _steps(self, steps: range) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
        """Yields the number of each step, and what each cohort sees in it: values [B, ...] and labels [B]."""
        streams = [step_rows(cohort.task.config, cohort.task.data.splits.train, steps) for cohort in self._cohorts]
        for step, rows in zip(steps, zip(*streams, strict=True), strict=True):
            values, labels = [], []
            for cohort, (_, epoch, chosen) in zip(self._cohorts, rows, strict=True):
                inputs = cohort.task.inputs
                values.append(inputs.prepared(inputs.training(chosen, epoch=epoch), self._device))
                labels.append(torch.from_numpy(cohort.task.data.labels[chosen]).to(self._device))
            yield step, values, labels

    def _run_step(self, step: int, values: list[Tensor], labels: list[Tensor]) -> Tensor:
        """Returns the losses of the members before the step: fp32, [G]."""
        logits = self._logits(self._params, values)
        loss = self._loss(logits, self._of_members(labels))
        names = list(self._params)
        found = torch.autograd.grad(loss.sum(), [self._params[name] for name in names])
        grads = dict(zip(names, found, strict=True))
        with torch.no_grad():
            self._clip(grads)
            rates = self._vector([member.lr(step) * member.head_rate for member in self._members])
            self._optimizer.step(self._params, grads, rates)
        return loss.detach()

    def _logits(self, params: Mapping[str, Tensor], values: list[Tensor]) -> Tensor:
        """Returns the logits of all members: fp32, [G, B, num_classes]; `values` are those of the cohorts, [B, ...]."""
        is_shared = len(values) == 1
        together = values[0] if is_shared else self._of_members(values)
        enabled = self._first.config.precision is Precision.bf16
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled):
            run = vmap(lambda own, x: functional_call(self._head, own, (x,)), in_dims=(0, None if is_shared else 0))
            logits: Tensor = run(dict(params), together)
        return logits.float()

    def _of_members(self, of_cohorts: list[Tensor]) -> Tensor:
        """Returns what each member sees, [G, ...], from what each cohort sees."""
        if len(of_cohorts) == 1:
            return of_cohorts[0].expand(len(self._members), *of_cohorts[0].shape)
        order = {position: number for number, cohort in enumerate(self._cohorts) for position in cohort.positions}
        return torch.stack([of_cohorts[order[position]] for position in range(len(self._members))])

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the weighted and smoothed cross-entropy of each member, as `F.cross_entropy` does: [G].

        Args:
            logits: fp32, [G, B, C].
            labels: int64, [G, B].
        """
        log_p = logits.log_softmax(dim=2)
        weights = self._class_weights  # [G, C]
        of_rows = weights.gather(1, labels)  # [G, B]
        of_label = -(log_p.gather(2, labels[:, :, None])[:, :, 0] * of_rows).sum(dim=1)
        of_all = -(log_p * weights[:, None, :]).sum(dim=(1, 2)) / logits.shape[2]
        total = (1 - self._smoothing) * of_label + self._smoothing * of_all
        return total / of_rows.sum(dim=1)

    def _clip(self, grads: dict[str, Tensor]) -> None:
        """Scales down each member's gradient to its largest norm, as `clip_grad_norm_` does."""
        if not torch.isfinite(self._max_norm).any():
            return
        norm = torch.stack([grad.flatten(1).square().sum(dim=1) for grad in grads.values()]).sum(dim=0).sqrt()
        factor = torch.where(torch.isinf(self._max_norm), 1.0, self._max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads.values():
            grad.mul_(factor.view(-1, *(1 for _ in grad.shape[1:])))

    def _end_epoch(self, losses: Tensor, first_step: int) -> None:
        """Takes out who diverged and adds a row for all others; `losses` is fp64, [steps, G]."""
        self._take_out_the_diverged(losses, first_step)
        alive = [number for number, is_finite in enumerate(torch.isfinite(losses).all(dim=0).tolist()) if is_finite]
        if not alive:
            return
        logits = self._validate(self._params)
        sums = losses[:, alive].sum(dim=0) / len(losses)
        better = [
            position
            for position, member in enumerate(self._members)
            if member.end_epoch(float(sums[position]), logits[position], _val_labels(member.task))
        ]
        for name, value in self._params.items():
            self._best[name][better] = value.detach()[better]

    def _take_out_the_diverged(self, losses: Tensor, first_step: int) -> None:
        for position, member in enumerate(self._members):
            of_member = losses[:, position]
            if not torch.isfinite(of_member).all():
                step = int((~torch.isfinite(of_member)).nonzero()[0])
                self.failures[member.index] = not_finite(
                    float(of_member[step]), step=first_step + step, lr=member.lr(first_step + step)
                )
        self.drop([index for index in self.failures if index in self.indices])

    @torch.no_grad()
    def _validate(self, params: Mapping[str, Tensor], *, rows: np.ndarray | None = None) -> Tensor:
        """Returns the logits of `rows`, else of every member's validation rows: fp32, [G, V, C], on the CPU."""
        rows_of = [cohort.task.data.splits.val if rows is None else rows for cohort in self._cohorts]
        num_rows = len(rows_of[0])
        size = inference_batch_size(self._first.preprocessing.image_size)
        pieces = []
        for start in range(0, num_rows, size):
            values = []
            for cohort, of_cohort in zip(self._cohorts, rows_of, strict=True):
                inputs = cohort.task.inputs
                values.append(inputs.prepared(inputs.plain(of_cohort[start : start + size]), self._device))
            pieces.append(self._logits(params, values).cpu())
        return torch.cat(pieces, dim=1)

    def _save(self) -> None:
        members = [
            {
                "index": m.index,
                "name": m.name,
                "history": m.history,
                "best_epoch": m.best_epoch,
                "head_rate": m.head_rate,
            }
            for m in self._members
        ]
        tensors = {f"params/{name}": value.detach() for name, value in self._params.items()}
        tensors |= {f"best/{name}": value for name, value in self._best.items()}
        for slot, values in self._optimizer.slots.items():
            tensors |= {f"{slot}/{name}": value for name, value in values.items()}
        meta = {"members": members, "fingerprint": self._first.data.fingerprint}
        self._store.save(Checkpoint(self._optimizer.num_steps, tensors, meta))
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        """Continues from the last checkpoint of these members, or of more: some may be over since."""
        checkpoint = self._store.latest()
        if checkpoint is None or checkpoint.meta["fingerprint"] != self._first.data.fingerprint:
            return
        saved = {
            (member["index"], member["name"]): (position, member)
            for position, member in enumerate(checkpoint.meta["members"])
        }
        wanted = [(member.index, member.name) for member in self._members]
        if not set(wanted) <= saved.keys():
            return
        positions = torch.tensor([saved[key][0] for key in wanted])

        def restored(prefix: str) -> dict[str, Tensor]:
            found = without_prefix(checkpoint.tensors, f"{prefix}/")
            return {name: value[positions].to(self._device) for name, value in found.items()}

        self._params = {name: value.requires_grad_() for name, value in restored("params").items()}
        self._best = restored("best")
        self._optimizer.num_steps = checkpoint.step
        self._optimizer.slots = {slot: restored(slot) for slot in self._optimizer.slots}
        for member, key in zip(self._members, wanted, strict=True):
            kept = saved[key][1]
            member.history, member.best_epoch = kept["history"], kept["best_epoch"]
            member.head_rate = kept["head_rate"]


def _val_labels(task: Task) -> Tensor:
    return torch.from_numpy(task.data.labels[task.data.splits.val])
