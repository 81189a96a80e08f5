"""Many heads on one tap, trained as one: a batched matrix product takes the place of a product for each trial.

Each trial keeps what it would have alone: its batches, schedule, decay, clipping, early stop, best epoch and metrics.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from graftstack.checkpoint import Checkpoint, CheckpointStore
from graftstack.config.schema import Precision, Select
from graftstack.finetune.batches import step_rows
from graftstack.finetune.head_rate import head_rates
from graftstack.finetune.inference import inference_batch_size
from graftstack.finetune.metrics import classification_metrics
from graftstack.finetune.model import without_prefix
from graftstack.finetune.task import Task
from graftstack.finetune.training import not_finite
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder
from graftstack.sweep.fused_member import Member

MOST_FUSED, MOST_LOGIT_BYTES = 256, 2**29
"""Trials are split into units no larger than this, whose validation logits take no more than so many bytes."""

# What makes a head's output random, or a function of more than its input: such heads train alone.
_IMPURE = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)  # noqa: SLF001 - the public bases of none


def obstacle_to_fusing(task: Task) -> str | None:
    """Returns why a task's head can't be trained together with others, or None."""
    head = task.model.head
    if task.boundary < task.model.head_boundary:
        return "layer groups train too"
    if any(isinstance(module, _IMPURE) for module in head.modules()) or next(head.buffers(), None) is not None:
        return "the head has dropout or statistics of its own"
    return None


def fusing_key(task: Task) -> tuple[Any, ...]:
    """Returns what must be the same for tasks to be trained together."""
    config = task.config
    shapes = tuple((name, tuple(value.shape)) for name, value in task.model.head.named_parameters())
    splits = task.data.splits
    return (
        *(config.batch_size * config.accumulate, config.epochs, config.precision, shapes),
        *(len(splits.train), len(splits.val), task.preprocessing.image_size),
    )


class Ended(NamedTuple):
    """What a member has reached; its head holds the weights."""

    history: tuple[dict[str, float], ...]
    epoch: int
    """The epoch that the weights are from, counted from 1; 0 if there was none."""
    metrics: dict[str, float]
    """Validation metrics of the weights."""


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
        others: Sequence[Folder] = (),
    ) -> None:
        """Makes the heads, stacked.

        Args:
            tasks: By the index of their trial; each with its tap.
            device: Where they train.
            checkpoints: Where the state of all is kept.
            names: What tells a trial from another that may once have had its index.
            others: Where other units keep theirs: from that of one that these trials were part of, they go on too.
        """
        self._members = [Member(index, (names or {}).get(index, ""), task) for index, task in tasks.items()]
        self._device = device
        self._store = CheckpointStore(checkpoints, num_to_keep=1)
        self._others = [CheckpointStore(folder, num_to_keep=1) for folder in others]
        self._saved_at = time.monotonic()
        self._step = 0
        names_of_params = self._members[0].params
        self._stack_up(
            {name: torch.stack([member.params[name].detach() for member in self._members]) for name in names_of_params}
        )
        self._best = {name: value.detach().clone() for name, value in self._params.items()}
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
        if self._step == 0:
            worker = LocalWorker(self._device)
            for member in self._members:
                member.head_rate = head_rates(member.task, worker)[1]
        first = self._first
        while self._members and self._step < first.num_steps:
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
        self._stack_up({name: value.detach()[positions] for name, value in self._params.items()})
        self._best = {name: value[positions] for name, value in self._best.items()}
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

    def _stack_up(self, params: Mapping[str, Tensor]) -> None:
        """Takes the heads of all members, [G, ...], and makes the members' own parameters their entries."""
        self._params = {name: value.to(self._device).requires_grad_() for name, value in params.items()}
        for position, member in enumerate(self._members):
            member.move_into(self._params, position)

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
        if configs:
            self._class_weights = torch.stack([member.task.class_weights for member in self._members]).to(self._device)

    def _vector(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def _run_epoch(self) -> None:
        begin = self._step
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
        # Fused optimisers go through parameter and gradient in the order of their memory, and never ask.
        found = tuple(grad.contiguous() for grad in found)
        for position, member in enumerate(self._members):
            member.update(step, {name: grad[position] for name, grad in zip(names, found, strict=True)})
        self._step = step + 1
        return loss.detach()

    def _logits(self, params: Mapping[str, Tensor], values: list[Tensor]) -> Tensor:
        """Returns the logits of all members: fp32, [G, B, num_classes]; `values` are those of the cohorts, [B, ...]."""
        enabled = self._first.config.precision is Precision.bf16
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled):
            if type(self._head) is nn.Linear:
                return self._linear(params["weight"], params["bias"], values).float()
            is_shared = len(values) == 1
            run = vmap(lambda own, x: functional_call(self._head, own, (x,)), in_dims=(0, None if is_shared else 0))
            logits: Tensor = run(dict(params), values[0] if is_shared else self._of_members(values))
            return logits.float()

    def _linear(self, weight: Tensor, bias: Tensor, values: list[Tensor]) -> Tensor:
        """Returns what `vmap` of a linear layer would, in the very bits of the layers one by one.

        Members that see the same rows are one layer of G * num_classes outputs; others are one batched product.

        Args:
            weight: [G, num_classes, D].
            bias: [G, num_classes].
            values: Of each cohort, [B, D].
        """
        if len(values) == 1:
            together = F.linear(values[0], weight.flatten(0, 1), bias.flatten())
            return together.view(-1, *bias.shape).transpose(0, 1)
        return torch.baddbmm(bias[:, None, :], self._of_members(values), weight.transpose(1, 2))

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
        total = -(log_p.gather(2, labels[:, :, None])[:, :, 0] * of_rows).sum(dim=1)
        if self._smoothing.any():
            of_all = -(log_p * weights[:, None, :]).sum(dim=(1, 2)) / logits.shape[2]
            total = (1 - self._smoothing) * total + self._smoothing * of_all
        return total * of_rows.sum(dim=1).double().reciprocal().float()  # a factor, as the loop of one trial has it

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
                lr = member.task.config.optimizer.lr * member.lr_factor(first_step + step)
                self.failures[member.index] = not_finite(float(of_member[step]), step=first_step + step, lr=lr)
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
        tensors = {f"params/{name}": value.detach() for name, value in self._params.items()}
        tensors |= {f"best/{name}": value for name, value in self._best.items()}
        for member in self._members:
            tensors |= {f"member/{member.index}/{slot}": value for slot, value in member.tensors().items()}
        meta = {"members": [member.facts() for member in self._members], "fingerprint": self._first.data.fingerprint}
        self._store.save(Checkpoint(self._step, tensors, meta))
        self._saved_at = time.monotonic()

    def _usable(self, store: CheckpointStore, wanted: Sequence[tuple[int, str]]) -> Checkpoint | None:
        checkpoint = store.latest()
        if checkpoint is None or checkpoint.meta["fingerprint"] != self._first.data.fingerprint:
            return None
        return checkpoint if set(wanted) <= set(_identities(checkpoint)) else None

    def _resume(self) -> None:
        """Continues from the furthest checkpoint of these members, or of more: some may be over since."""
        wanted = [(member.index, member.name) for member in self._members]
        found = [checkpoint for store in (self._store, *self._others) if (checkpoint := self._usable(store, wanted))]
        if not found:
            return
        checkpoint = max(found, key=lambda checkpoint: checkpoint.step)
        saved = _identities(checkpoint)
        positions = torch.tensor([saved.index(key) for key in wanted])
        params, best = (without_prefix(checkpoint.tensors, prefix) for prefix in ("params/", "best/"))
        self._step = checkpoint.step
        self._stack_up({name: value[positions] for name, value in params.items()})
        self._best = {name: value[positions].to(self._device) for name, value in best.items()}
        for member, position in zip(self._members, positions.tolist(), strict=True):
            own = without_prefix(checkpoint.tensors, f"member/{member.index}/")
            member.restore(checkpoint.meta["members"][position], own)


def _identities(checkpoint: Checkpoint) -> list[tuple[int, str]]:
    return [(facts["index"], facts["name"]) for facts in checkpoint.meta["members"]]


def _val_labels(task: Task) -> Tensor:
    return torch.from_numpy(task.data.labels[task.data.splits.val])
