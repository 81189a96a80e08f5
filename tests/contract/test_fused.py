"""Heads that train fused are those that train alone: `FusedTraining` against `Training`, trial by trial."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from graftstack.backbones.registry import build
from graftstack.config.compose import compose_job
from graftstack.errors import TrainingError
from graftstack.finetune.model import GraftedModel
from graftstack.finetune.tapping import make_shards, open_tap, tap_spec
from graftstack.finetune.task import Task, Workbench
from graftstack.finetune.training import Trained, Training
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder
from graftstack.sweep.fused import Ended, FusedTraining, fusing_key, obstacle_to_fusing
from graftstack.taps.store import TapStore

CPU = torch.device("cpu")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SMALL = (
    "data=digits",
    "data.image_size=16",
    "data.num_train_per_class=13",
    "data.val_fraction=0.06",
    "backbone=conv4",
    "freeze_depth=all",
    "epochs=3",
    "batch_size=32",
    "optimizer.lr=0.003",
    # Far below what suits the head: long steps of AdamW would make much of the last digit of a gradient.
    "optimizer.head_lr_multiplier=4",
    "cluster=inline",
)
# Every image trains or validates, whatever the seed, so that one tap serves all splits.
ALL_IMAGES = ("data.classes=[0,1,2]", "data.num_train_per_class=null", "data.val_fraction=0.2")

Overrides = tuple[str, ...]


class Alone(NamedTuple):
    """What a trial comes to when it trains for itself."""

    trained: Trained
    head: dict[str, Tensor]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights as a file: the same for all seeds, and with a head for ten classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "conv4.safetensors"
    save_file(build("conv4", num_classes=10).model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def workbench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TapStore:
    return TapStore(str(tmp_path_factory.mktemp("taps")), budget_bytes=2**30)


def tapped(tasks: Sequence[Task], store: TapStore) -> dict[int, Task]:
    """Returns the tasks with the tap that they share, and with a model of their own."""
    spec = tap_spec(tasks[0], tasks[0].boundary, dtype="fp32")
    if missing := store.missing_shards(spec):
        make_shards(tasks[0], store, [spec], {shard: [0] for shard in missing}, device=CPU)
    own = [replace(task, tap=open_tap(task, store, spec), model=copy.deepcopy(task.model)) for task in tasks]
    for task in own:
        task.model.backbone.freeze(task.freeze_depth)
    return dict(enumerate(own))


def members(workbench: Workbench, store: TapStore, common: Overrides, *each: Overrides) -> dict[int, Task]:
    return tapped([workbench.task(compose_job("finetune", [*SMALL, *common, *overrides])) for overrides in each], store)


def heads(task: Task) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in task.model.head.state_dict().items()}


def train_alone(task: Task, folder: Path) -> Alone:
    own = replace(task, model=copy.deepcopy(task.model))
    trained = Training(own, LocalWorker(CPU), Folder(folder)).run()
    return Alone(trained, heads(own))


def all_alone(tasks: Mapping[int, Task], folder: Path) -> dict[int, Alone]:
    return {index: train_alone(task, folder / str(index)) for index, task in tasks.items()}


def train_fused(fused: FusedTraining) -> dict[int, Ended]:
    """Trains as a runner does: who is over by its own rule leaves at once."""
    done = {}
    for _ in fused.epochs():
        done |= fused.finish(fused.over)
    return done | fused.finish(fused.indices)


def assert_same(ended: Ended, head: Mapping[str, Tensor], alone: Alone) -> None:
    assert ended.epoch == alone.trained.epoch
    assert len(ended.history) == len(alone.trained.history)
    for row, expected in zip(ended.history, alone.trained.history, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    assert ended.metrics == pytest.approx(alone.trained.metrics, abs=1e-5)
    assert head.keys() == alone.head.keys()
    for name, value in head.items():
        torch.testing.assert_close(value, alone.head[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def assert_fused_is_alone(tasks: Mapping[int, Task], folder: Path) -> dict[int, Ended]:
    assert len({fusing_key(task) for task in tasks.values()}) == 1
    assert {obstacle_to_fusing(task) for task in tasks.values()} == {None}
    expected = all_alone(tasks, folder)
    trained = train_fused(FusedTraining(tasks, CPU, Folder(folder / "fused")))
    assert trained.keys() == tasks.keys()
    for index, result in trained.items():
        assert_same(result, heads(tasks[index]), expected[index])
    return trained


SETTINGS: dict[str, tuple[Overrides, list[Overrides]]] = {
    "learning rates": ((), [("optimizer.lr=1e-4",), ("optimizer.lr=1e-3",), ("optimizer.lr=0.03",)]),
    "weight decay": ((), [("optimizer.weight_decay=0",), ("optimizer.weight_decay=0.5",)]),
    "head rates": (
        (),
        [("optimizer.lr=1e-4", "optimizer.head_lr_multiplier=null"), ("optimizer.head_lr_multiplier=7",)],
    ),
    "smoothing": ((), [("label_smoothing=0",), ("label_smoothing=0.2",)]),
    "clipping": ((), [(), ("clip_grad_norm=0.05",), ("clip_grad_norm=1",)]),
    "schedules": (
        (),
        [("schedule=cosine",), ("schedule=one_cycle",), ("schedule=constant", "schedule.warmup_fraction=0.4")],
    ),
    "accumulation": (("batch_size=16", "accumulate=2"), [("optimizer.lr=1e-3",), ("optimizer.lr=1e-2",)]),
    "accumulated alike": ((), [("accumulate=1",), ("batch_size=16", "accumulate=2")]),
    "the last epoch": (("select=last",), [("optimizer.lr=1e-3",), ("optimizer.lr=0.1",)]),
    "two phases": (("recipe=lp_ft",), [("recipe.head_fraction=0.3",), ("recipe.head_fraction=0.6",)]),
    "gradual": ((), [("recipe=gradual_unfreeze",), ("recipe=plain",)]),
    "everything": (
        (),
        [
            ("optimizer.lr=0.01", "label_smoothing=0.1", "clip_grad_norm=0.5", "schedule=constant"),
            ("optimizer.weight_decay=0.3", "select=last", "class_weights=balanced", "recipe=lp_ft"),
        ],
    ),
}


# What is not said by the optimiser needs to be seen with one only.
BOTH = ("learning rates", "weight decay", "head rates", "clipping", "everything")


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "adamw") for name in SETTINGS), *((name, "sgd") for name in BOTH)]
)
def test_fused_heads_are_the_heads_that_train_alone(
    name: str, optimizer: str, tmp_path: Path, store: TapStore, workbench: Workbench
) -> None:
    common, each = SETTINGS[name]
    tasks = members(workbench, store, (f"optimizer={optimizer}", *common), *each)
    assert_fused_is_alone(tasks, tmp_path)
    first, second = (heads(task) for task in list(tasks.values())[:2])
    if name not in ("accumulated alike", "gradual"):  # which come to the same, frozen as all groups are
        assert not all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_classes_weigh_in_each_fused_trial_as_they_do_alone(
    optimizer: str, tmp_path: Path, store: TapStore, workbench: Workbench
) -> None:
    each = [("class_weights=none",), ("class_weights=balanced",), ("class_weights=balanced", "label_smoothing=0.1")]
    tasks = []
    for overrides in each:
        task = workbench.task(compose_job("finetune", [*SMALL, f"optimizer={optimizer}", *overrides]))
        train = task.data.splits.train
        lopsided = train[(task.data.labels[train] < 3) | (train % 3 == 0)]
        tasks.append(replace(task, data=replace(task.data, splits=task.data.splits._replace(train=lopsided))))
    assert tasks[1].class_weights.max() > 2 * tasks[1].class_weights.min()
    assert_fused_is_alone(tapped(tasks, store), tmp_path)


def test_each_fused_trial_has_its_own_momentum(tmp_path: Path, store: TapStore, workbench: Workbench) -> None:
    each = [("optimizer.momentum=0",), ("optimizer.momentum=0.5",), ("optimizer.momentum=0.95",)]
    assert_fused_is_alone(members(workbench, store, ("optimizer=sgd",), *each), tmp_path)


def test_bf16_heads_are_alike_too(tmp_path: Path, store: TapStore, workbench: Workbench) -> None:
    each = [("optimizer.lr=1e-3",), ("optimizer.lr=1e-2",)]
    tasks = members(workbench, store, ("precision=bf16",), *each)
    expected = all_alone(tasks, tmp_path)
    trained = train_fused(FusedTraining(tasks, CPU, Folder(tmp_path / "fused")))
    for index, result in trained.items():
        assert result.metrics["loss"] == pytest.approx(expected[index].trained.metrics["loss"], abs=0.02)
        torch.testing.assert_close(heads(tasks[index])["weight"], expected[index].head["weight"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_each_seed_has_its_own_split_order_and_first_head(
    optimizer: str, tmp_path: Path, store: TapStore, workbench: Workbench, weights: str
) -> None:
    common = (f"optimizer={optimizer}", f"backbone.weights={weights}", *ALL_IMAGES, "epochs=2")
    tasks = members(workbench, store, common, ("seed=1",), ("seed=2", "optimizer.lr=0.01"), ("seed=1", "select=last"))
    assert tasks[0].data.splits.val.tolist() != tasks[1].data.splits.val.tolist()
    assert_fused_is_alone(tasks, tmp_path)
    assert not torch.allclose(heads(tasks[0])["weight"], heads(tasks[1])["weight"], atol=1e-3)


def test_a_trial_that_stops_early_leaves_the_others_to_train_on(
    tmp_path: Path, store: TapStore, workbench: Workbench
) -> None:
    each = [("optimizer.lr=1e-9", "early_stop=2"), ("optimizer.lr=0.003",), ("optimizer.lr=1e-9", "early_stop=3")]
    tasks = members(workbench, store, ("epochs=6",), *each)
    trained = assert_fused_is_alone(tasks, tmp_path)
    assert len(trained[0].history) < len(trained[2].history) < len(trained[1].history) == 6


def test_a_kept_head_begins_with_the_weights_it_came_with(
    tmp_path: Path, store: TapStore, workbench: Workbench, weights: str
) -> None:
    common = (f"backbone.weights={weights}", "backbone.keep_head=true")
    tasks = members(workbench, store, common, ("optimizer.lr=1e-3",), ("optimizer.lr=1e-2",))
    assert torch.equal(heads(tasks[0])["weight"], heads(tasks[1])["weight"])
    assert_fused_is_alone(tasks, tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_head_of_several_layers_on_a_map_is_fused_too(
    optimizer: str, tmp_path: Path, store: TapStore, workbench: Workbench
) -> None:
    tasks = []
    for seed, lr in enumerate((1e-3, 3e-3)):
        task = workbench.task(compose_job("finetune", [*SMALL, f"optimizer={optimizer}", f"optimizer.lr={lr}"]))
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Conv2d(64, 16, 1), nn.GroupNorm(2, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        head.extend([nn.Flatten(1), nn.Linear(16, 10)])
        tasks.append(replace(task, model=GraftedModel(task.model.backbone, head, head_boundary=4)))
    assert_fused_is_alone(tapped(tasks, store), tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_trial_that_diverges_fails_alone_with_the_words_it_would_have_alone(
    optimizer: str, tmp_path: Path, store: TapStore, workbench: Workbench
) -> None:
    common = (f"optimizer={optimizer}", "schedule=constant", "schedule.warmup_fraction=0")
    each = [("optimizer.lr=1e-3",), ("optimizer.lr=1e30",), ("optimizer.lr=1e-2",)]
    tasks = members(workbench, store, common, *each)
    expected = {index: train_alone(tasks[index], tmp_path / str(index)) for index in (0, 2)}
    with pytest.raises(TrainingError) as caught:
        train_alone(tasks[1], tmp_path / "1")
    fused = FusedTraining(tasks, CPU, Folder(tmp_path / "fused"))
    trained = train_fused(fused)
    assert trained.keys() == {0, 2}
    assert str(fused.failures[1]) == str(caught.value)
    for index, result in trained.items():
        assert_same(result, heads(tasks[index]), expected[index])


def test_when_all_diverge_nothing_is_left(tmp_path: Path, store: TapStore, workbench: Workbench) -> None:
    common = ("schedule=constant", "schedule.warmup_fraction=0")
    tasks = members(workbench, store, common, ("optimizer.lr=1e30",), ("optimizer.lr=1e31",))
    fused = FusedTraining(tasks, CPU, Folder(tmp_path / "fused"))
    assert list(fused.epochs()) == []
    assert fused.failures.keys() == {0, 1}
    assert fused.indices == []


def test_who_is_dropped_changes_nothing_for_the_others(tmp_path: Path, store: TapStore, workbench: Workbench) -> None:
    each = [(f"optimizer.lr={lr}", f"label_smoothing={smoothing}") for lr in (1e-3, 0.03) for smoothing in (0, 0.1)]
    tasks = members(workbench, store, (), *each)
    expected = all_alone(tasks, tmp_path)
    fused = FusedTraining(tasks, CPU, Folder(tmp_path / "fused"))
    stopped: dict[int, Ended] = {}
    for number, rows in enumerate(fused.epochs(), start=1):
        assert rows.keys() == set(fused.indices)
        if number == 1:
            fused.drop([0])
        if number == 2:
            stopped = fused.finish([2])
    trained = fused.finish(fused.indices)
    assert trained.keys() == {1, 3}
    for index, result in trained.items():
        assert_same(result, heads(tasks[index]), expected[index])
    assert [row["epoch"] for row in stopped[2].history] == [1, 2]
    assert list(stopped[2].history) == [pytest.approx(row, abs=1e-5) for row in expected[2].trained.history[:2]]


def test_no_epochs_leave_the_heads_as_they_were(tmp_path: Path, store: TapStore, workbench: Workbench) -> None:
    tasks = members(workbench, store, ("epochs=0",), ("optimizer.lr=1e-3",), ("optimizer.lr=1e-2",))
    before = heads(tasks[0])
    trained = assert_fused_is_alone(tasks, tmp_path)
    assert trained[0].epoch == 0
    assert torch.equal(heads(tasks[0])["weight"], before["weight"])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_training_is_the_unbroken_one(
    optimizer: str, tmp_path: Path, store: TapStore, workbench: Workbench
) -> None:
    common = (f"optimizer={optimizer}", "checkpoint.min_interval_s=0", "clip_grad_norm=1", "epochs=4")
    each = [("optimizer.lr=1e-3",), ("optimizer.lr=0.1",), ("optimizer.lr=0.01", "select=last")]
    unbroken = members(workbench, store, common, *each)
    expected = train_fused(FusedTraining(unbroken, CPU, Folder(tmp_path / "unbroken")))
    for _ in range(2):  # each start gets an epoch further, and is cut short in the next
        broken = FusedTraining(members(workbench, store, common, *each), CPU, Folder(tmp_path / "broken"))
        epochs = broken.epochs()
        next(epochs), next(epochs)
        epochs.close()
    tasks = members(workbench, store, common, *each)
    resumed = FusedTraining(tasks, CPU, Folder(tmp_path / "broken"))
    rows = list(resumed.epochs())
    assert [row[0]["epoch"] for row in rows] == [3, 4]
    for index, result in resumed.finish(resumed.indices).items():
        assert result.history == expected[index].history
        assert result.metrics == expected[index].metrics
        assert result.epoch == expected[index].epoch
        assert torch.equal(heads(tasks[index])["weight"], heads(unbroken[index])["weight"])


def test_those_that_are_left_resume_without_those_that_were_over(
    tmp_path: Path, store: TapStore, workbench: Workbench
) -> None:
    each = [("optimizer.lr=1e-3",), ("optimizer.lr=0.1",), ("optimizer.lr=0.01",)]
    names = {0: "a", 1: "b", 2: "c"}
    expected = all_alone(members(workbench, store, (), *each), tmp_path)
    folder = Folder(tmp_path / "fused")
    epochs = FusedTraining(members(workbench, store, (), *each), CPU, folder, names=names).epochs()
    next(epochs), next(epochs)
    tasks = members(workbench, store, (), *each)
    del tasks[1]
    resumed = FusedTraining(tasks, CPU, folder, names=names)
    assert [row.keys() for row in resumed.epochs()] == [{0, 2}] * 2
    for index, result in resumed.finish(resumed.indices).items():
        assert_same(result, heads(tasks[index]), expected[index])


def test_a_checkpoint_of_other_trials_is_left_alone(tmp_path: Path, store: TapStore, workbench: Workbench) -> None:
    each = [("optimizer.lr=1e-3",), ("optimizer.lr=0.1",)]
    folder = Folder(tmp_path / "fused")
    epochs = FusedTraining(members(workbench, store, (), *each), CPU, folder, names={0: "a", 1: "b"}).epochs()
    next(epochs), next(epochs)
    tasks = members(workbench, store, (), *each)
    others = FusedTraining(tasks, CPU, folder, names={0: "a", 1: "another"})
    assert [row[0]["epoch"] for row in others.epochs()] == [1, 2, 3]


def test_what_trains_groups_or_is_random_is_not_fused(workbench: Workbench) -> None:
    def obstacle(*overrides: str) -> str | None:
        return obstacle_to_fusing(workbench.task(compose_job("finetune", [*SMALL, *overrides])))

    assert obstacle() is None
    assert obstacle("freeze_depth=5") is None
    assert obstacle("freeze_depth=4") == "layer groups train too"
    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(64)):
        task = workbench.task(compose_job("finetune", SMALL))
        head = nn.Sequential(layer, nn.Linear(64, 10))
        task = replace(task, model=GraftedModel(task.model.backbone, head, head_boundary=5))
        assert obstacle_to_fusing(task) == "the head has dropout or statistics of its own"


@pytest.mark.parametrize("override", ["epochs=4", "batch_size=16", "precision=bf16", "data.num_train_per_class=12"])
def test_what_must_agree_keeps_trials_apart(override: str, workbench: Workbench) -> None:
    one, other = (
        workbench.task(compose_job("finetune", [*SMALL, *more])) for more in ([], ["optimizer.lr=0.1", override])
    )
    assert fusing_key(one) != fusing_key(other)
