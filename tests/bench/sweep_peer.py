"""The peer of the sweep benchmarks: a Ray Tune sweep of a partly frozen backbone, as Ray's own documentation writes it.

What makes its metrics comparable is handed to it as data: the initial weights, the order of the rows in each epoch, and
the factor of the learning rate at each step.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftstack.finetune.schedules import lr_factor
from graftstack.finetune.task import Task, prepare


class Problem(NamedTuple):
    """What a trial learns from, as plain tensors."""

    images: Tensor
    """uint8, [N, 3, S, S]"""
    labels: Tensor
    train: np.ndarray
    val: np.ndarray
    num_classes: int
    batch_size: int
    epochs: int
    orders: list[np.ndarray]
    """The rows of each epoch, in their order."""
    factors: list[float]
    """Of the peak learning rate, at each step."""
    backbone: dict[str, Tensor]
    """State of torchvision's ResNet-18, without its head."""
    head: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def problem_of(config: Any) -> Problem:
    """Returns the problem that a graftstack configuration poses."""
    from graftstack.data.batches import epoch_order

    task: Task = prepare(config)
    data, splits = task.data, task.data.splits
    rows = splits.train
    return Problem(
        images=data.images.batch(np.arange(len(data))),
        labels=torch.from_numpy(data.labels),
        train=rows,
        val=splits.val,
        num_classes=len(data.class_names),
        batch_size=config.batch_size,
        epochs=config.epochs,
        orders=[rows[epoch_order(len(rows), seed=config.seed, epoch=epoch)] for epoch in range(config.epochs)],
        factors=[lr_factor(config.schedule, step=step, num_steps=task.num_steps) for step in range(task.num_steps)],
        backbone={name: tensor.clone() for name, tensor in task.model.backbone.backbone_state().items()},
        head={name: tensor.clone() for name, tensor in task.model.head.state_dict().items()},
        mean=task.preprocessing.mean,
        std=task.preprocessing.std,
    )


def frozen_modules(model: nn.Module, depth: int) -> list[nn.Module]:
    """Returns the first `depth` layer groups of a ResNet: stem, layer1 .. layer4."""
    stem = [model.conv1, model.bn1]
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    return [*(stem if depth else []), *stages[: max(0, depth - 1)]]


def build_model(problem: Problem, depth: int) -> nn.Module:
    """Returns a ResNet-18 with a new head, whose first `depth` groups are frozen."""
    from torchvision.models import resnet18

    model = resnet18(weights=None)
    model.load_state_dict(problem.backbone, strict=False)
    model.fc = nn.Linear(model.fc.in_features, problem.num_classes)
    model.fc.load_state_dict(problem.head)
    for module in frozen_modules(model, depth):
        module.requires_grad_(requires_grad=False)
    return model


def train_trial(config: dict[str, Any], problem: Problem | None = None) -> None:
    """One trial: a plain PyTorch loop that reports to Tune after each epoch."""
    from ray import tune

    assert problem is not None
    torch.set_num_threads(1)
    model = build_model(problem, config["depth"])
    decayed = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=config["lr"],
        fused=True,
    )
    mean, std = (torch.tensor(values).mul(255).view(1, 3, 1, 1) for values in (problem.mean, problem.std))

    def inputs(rows: np.ndarray) -> Tensor:
        return (problem.images[torch.from_numpy(rows)].float() - mean) / std

    step = 0
    for order in problem.orders:
        model.train()
        for module in frozen_modules(model, config["depth"]):
            module.eval()
        for batch in range(len(order) // problem.batch_size):
            rows = order[batch * problem.batch_size : (batch + 1) * problem.batch_size]
            for group in optimizer.param_groups:
                group["lr"] = config["lr"] * problem.factors[step]
            loss = F.cross_entropy(model(inputs(rows)), problem.labels[torch.from_numpy(rows)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
        tune.report(evaluate(model, problem, inputs))


@torch.no_grad()
def evaluate(model: nn.Module, problem: Problem, inputs: Any) -> dict[str, float]:
    """Returns accuracy and loss on the validation rows."""
    model.eval()
    pieces = [model(inputs(problem.val[at : at + 256])) for at in range(0, len(problem.val), 256)]
    logits, labels = torch.cat(pieces), problem.labels[torch.from_numpy(problem.val)]
    accuracy = float((logits.argmax(dim=1) == labels).double().mean())
    return {"accuracy": accuracy, "loss": float(F.cross_entropy(logits, labels))}


def tune_sweep(problem: Problem, depths: list[int], lrs: list[float], storage: str) -> dict[tuple[int, float], Any]:
    """Runs the grid on the connected Ray, a CPU a trial; returns (depth, lr) -> the metrics of its epochs."""
    from ray import tune

    trainable = tune.with_resources(tune.with_parameters(train_trial, problem=problem), {"cpu": 1})
    tuner = tune.Tuner(
        trainable,
        param_space={"depth": tune.grid_search(depths), "lr": tune.grid_search(lrs)},
        tune_config=tune.TuneConfig(metric="accuracy", mode="max"),
        run_config=tune.RunConfig(storage_path=storage, verbose=0),
    )
    found = tuner.fit()
    assert not found.errors, found.errors
    return {
        (result.config["depth"], result.config["lr"]): result.metrics_dataframe[["accuracy", "loss"]].to_dict("records")
        for result in found
    }
