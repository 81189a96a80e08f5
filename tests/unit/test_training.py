"""Training in this process: the loop, its resumption and what it leaves."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from graftstack.cluster.finetune import launch
from graftstack.config.compose import compose_job
from graftstack.config.schema import FinetuneConfig
from graftstack.data.load import ImageData
from graftstack.errors import ConfigError, RunError, TrainingError, WeightsError
from graftstack.finetune.job import train_rank
from graftstack.finetune.task import Task, prepare
from graftstack.finetune.training import Progress, Training
from graftstack.runs import Run
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder

SMALL = (
    "data=digits",
    "data.image_size=16",
    "data.num_train_per_class=13",
    "data.val_fraction=0.06",
    "backbone=conv4",
    "epochs=3",
    "batch_size=32",
    "cluster=inline",
)


class Killed(BaseException):
    """Stands for a kill: nothing of the training's own catches it."""


class Silent:
    """A display that shows nothing."""

    def reading(self, done: int, total: int) -> None:
        pass

    def training(self, progress: dict[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def config_of(*overrides: str) -> FinetuneConfig:
    return compose_job("finetune", [*SMALL, *overrides])


def run_job(tmp_path: Path, *overrides: str, job: str = "finetune") -> Run:
    everything = [*SMALL, f"runs_dir={tmp_path}/runs", *overrides]
    return launch(job, compose_job(job, everything), overrides=everything, display=Silent())


def train(
    task: Task, folder: Path, on_progress: Callable[[Progress], None] = lambda _: None
) -> dict[str, torch.Tensor]:
    """Trains as the only rank and returns the model it left."""
    train_rank(task, LocalWorker(), Folder(folder), on_progress=on_progress)
    return load_file(folder / "model" / "model.safetensors")


def killing_at(step: int) -> Callable[[Progress], None]:
    def kill(progress: Progress) -> None:
        if progress.step >= step:
            raise Killed

    return kill


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    "overrides",
    [
        ("recipe=plain", "freeze_depth=2", "checkpoint.every_steps=3"),
        ("recipe=gradual_unfreeze", "checkpoint.every_steps=5", "augment=standard"),
        ("recipe=lp_ft", "optimizer=sgd", "accumulate=2", "batch_size=16", "clip_grad_norm=1"),
    ],
)
def test_a_resumed_training_ends_in_exactly_the_weights_of_the_unbroken_one(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    unbroken = train(prepare(config_of(*overrides)), tmp_path / "unbroken")
    for step in (4, 8, 10):
        with pytest.raises(Killed):
            train(prepare(config_of(*overrides)), tmp_path / "broken", killing_at(step))
    assert_same(train(prepare(config_of(*overrides)), tmp_path / "broken"), unbroken)


def test_rows_that_validate_have_no_part_in_the_last_weights_and_needn_t_be_there(tmp_path: Path) -> None:
    task = prepare(config_of("select=last"))
    expected = train(task, tmp_path / "validated")
    alone = replace(prepare(config_of("select=last")), data=without_validation(task.data))
    trained = Training(alone, LocalWorker(), Folder(tmp_path / "alone")).run()
    assert trained.metrics == {}
    assert trained.val_logits.shape == (0, 10)
    assert [set(row) for row in trained.history] == [{"epoch", "train_loss"}] * 3
    assert_same(alone.model.named_state(), expected)
    for overrides in ((), ("select=last", "early_stop=1")):
        chosen = replace(prepare(config_of(*overrides)), data=without_validation(task.data))
        with pytest.raises(ValueError, match="no row validates"):
            Training(chosen, LocalWorker(), Folder(tmp_path / "chosen"))


def without_validation(data: ImageData) -> ImageData:
    return replace(data, splits=data.splits._replace(val=np.empty(0, np.int64)))


def test_a_checkpoint_in_mid_epoch_is_where_the_next_run_begins(tmp_path: Path) -> None:
    task = prepare(config_of("checkpoint.every_steps=3", "epochs=2"))
    with pytest.raises(Killed):
        train(task, tmp_path, killing_at(4))
    resumed = Training(prepare(task.config), LocalWorker(), Folder(tmp_path) / "checkpoints")
    steps: list[int] = []
    resumed.on_progress = lambda progress: steps.append(progress.step)
    resumed.run()
    assert min(steps) > 3
    assert task.steps_per_epoch == 4


def test_dropout_and_stochastic_depth_are_the_same_after_resuming(tmp_path: Path) -> None:
    # EfficientNet's blocks skip at random; the deeper half of them is enough.
    overrides = (
        "backbone=efficientnet_b0",
        "data.image_size=32",
        "epochs=1",
        "freeze_depth=6",
        "checkpoint.every_steps=2",
    )
    unbroken = train(prepare(config_of(*overrides)), tmp_path / "unbroken")
    with pytest.raises(Killed):
        train(prepare(config_of(*overrides)), tmp_path / "broken", killing_at(4))
    assert_same(train(prepare(config_of(*overrides)), tmp_path / "broken"), unbroken)


def test_frozen_groups_keep_their_weights_and_statistics(tmp_path: Path) -> None:
    task = prepare(config_of("freeze_depth=2", "optimizer.weight_decay=0.5"))
    before = {name: tensor.clone() for name, tensor in task.model.named_state().items()}
    after = train(task, tmp_path)
    groups = [group.name for group in task.model.backbone.groups]
    for name, tensor in after.items():
        is_frozen = any(name.startswith(f"backbone.{group}.") for group in groups[:2])
        if is_frozen:
            assert torch.equal(tensor, before[name]), name
        elif name.endswith(("weight", "running_mean")):
            assert not torch.equal(tensor, before[name]), name


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    # One step of each: BatchNorm sees other batches, so the comparison holds with its statistics frozen.
    common = ("freeze_depth=all", "epochs=1", "select=last")
    whole = train(prepare(config_of(*common, "batch_size=32")), tmp_path / "whole")
    parts = train(prepare(config_of(*common, "batch_size=8", "accumulate=4")), tmp_path / "parts")
    torch.testing.assert_close(parts["head.weight"], whole["head.weight"], rtol=1e-4, atol=1e-6)


def test_each_recipe_setting_learns(tmp_path: Path) -> None:
    settings = {
        "bf16": ("precision=bf16",),
        "smooth": ("schedule=one_cycle", "optimizer.lr=0.01", "label_smoothing=0.1", "class_weights=balanced"),
        "layerwise": ("optimizer.layer_decay=0.5", "optimizer.head_lr_multiplier=3"),
        "sgd": ("optimizer=sgd", "schedule=constant", "clip_grad_norm=5"),
    }
    for name, overrides in settings.items():
        run = run_job(tmp_path, f"name={name}", "epochs=5", *overrides)
        assert run.manifest.metrics["accuracy"] > 0.5, name


def test_a_loss_that_is_not_finite_names_the_step_and_the_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError,
        match=r"the loss is (nan|inf) at step \d+ \(learning rate 1e\+30\); start a new run with a lower optimizer.lr",
    ):
        run_job(tmp_path, "name=diverged", "optimizer.lr=1e30", "schedule=constant", "schedule.warmup_fraction=0")
    manifest = json.loads((tmp_path / "runs/diverged/run.json").read_text())
    assert manifest["status"] == "failed"
    assert "the loss is" in manifest["error"]


def test_early_stopping_ends_after_epochs_without_improvement(tmp_path: Path) -> None:
    run = run_job(tmp_path, "name=early", "epochs=40", "early_stop=2", "freeze_depth=all", "optimizer.lr=1e-9")
    assert run.manifest.details["num_epochs"] < 40
    accuracies = pq.read_table(tmp_path / "runs/early/metrics.parquet")["accuracy"].to_pylist()
    assert max(accuracies) == accuracies[-3]


def test_a_run_leaves_a_model_metrics_and_validation_predictions(tmp_path: Path) -> None:
    run = run_job(tmp_path, "name=full")
    folder = tmp_path / "runs/full"
    documents = {"run.json", "config.yaml", "progress.json", "metrics.parquet", "val_predictions.parquet"}
    assert {path.name for path in folder.iterdir()} == {*documents, "checkpoints", "model"}
    predictions = pq.read_table(folder / "val_predictions.parquet")
    assert predictions.num_rows == run.manifest.details["num_val"]
    right = np.equal(predictions["label"].to_pylist(), predictions["prediction"].to_pylist()).mean()
    assert right == pytest.approx(run.manifest.metrics["accuracy"])
    assert pq.read_table(folder / "metrics.parquet").num_rows == 3
    assert run.manifest.status == "done"


def test_the_selected_epoch_is_the_best_or_the_last(tmp_path: Path) -> None:
    best = run_job(tmp_path, "name=best", "epochs=5")
    history = pq.read_table(tmp_path / "runs/best/metrics.parquet")["accuracy"].to_pylist()
    assert best.manifest.metrics["accuracy"] == pytest.approx(max(history))
    last = run_job(tmp_path, "name=last", "epochs=5", "select=last")
    assert last.manifest.metrics["accuracy"] == pytest.approx(history[-1])


def test_zero_epochs_only_evaluate(tmp_path: Path) -> None:
    run = run_job(tmp_path, "name=none", "epochs=0")
    assert run.manifest.details["num_epochs"] == 0
    assert 0 <= run.manifest.metrics["accuracy"] < 0.4


def test_a_run_is_a_backbone_for_the_next(tmp_path: Path) -> None:
    run_job(tmp_path, "name=base", "data.classes=[0,1,2,3,4]", "epochs=8", job="pretrain")
    grafted = run_job(tmp_path, "name=grafted", "data.classes=[5,6,7]", "backbone.weights=run:base", "freeze_depth=all")
    base = load_file(tmp_path / "runs/base/model/model.safetensors")
    after = load_file(tmp_path / "runs/grafted/model/model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items() if name.startswith("backbone."))
    assert after["head.weight"].shape == (3, 64)
    assert grafted.manifest.details["weights"] == f"run:{tmp_path}/runs/base (conv4 trained on 5 classes)"
    with pytest.raises(WeightsError, match=r"backbone=resnet18: run:\S+/runs/base holds a conv4; add backbone=conv4"):
        run_job(tmp_path, "name=other", "backbone=resnet18", "backbone.weights=run:base")


def test_a_done_run_is_not_repeated_and_another_configuration_is_refused(tmp_path: Path) -> None:
    first = run_job(tmp_path, "name=once")
    written = (tmp_path / "runs/once/model/model.safetensors").stat().st_mtime_ns
    again = run_job(tmp_path, "name=once", "resume=true")
    assert again.manifest.metrics == first.manifest.metrics
    assert (tmp_path / "runs/once/model/model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(RunError, match=r"epochs=7: run once was started with 3"):
        run_job(tmp_path, "name=once", "resume=true", "epochs=7")


def test_bad_input_leaves_no_run_behind(tmp_path: Path) -> None:
    bad = {
        "freeze_depth=9": 'freeze_depth=9: conv4 has 5 layer groups; use 0..5 or "all"',
        "batch_size=5000": "batch_size=5000: a step takes 5000 images and the training part has 130",
        "cluster.gpus_per_worker=64": "cluster.gpus_per_worker=64.0: a worker trains on one GPU",
    }
    for override, message in bad.items():
        with pytest.raises(ConfigError) as caught:
            run_job(tmp_path, "name=bad", override)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"data.image_size=8: squeezenet1_0 can't take images of 8x8"):
        run_job(tmp_path, "name=bad", "backbone=squeezenet1_0", "data.image_size=8")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("accumulate", "remedy"),
    [(5, "batch_size=26 or less"), (130, "batch_size=1 or less"), (1000, "accumulate=4 or less")],
)
def test_a_step_larger_than_the_data_says_what_fits(accumulate: int, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(config_of(f"accumulate={accumulate}"))
    assert str(caught.value) == (
        f"batch_size=32, accumulate={accumulate}: a step takes {32 * accumulate} images and the training part has 130; "
        f"use {remedy}"
    )


def test_batchnorm_is_not_fed_single_values(tmp_path: Path) -> None:
    lone = ("backbone=resnet18", "data.image_size=32", "batch_size=1", "epochs=1", "data.classes=[0,1]")
    with pytest.raises(
        ConfigError, match=r"batch_size=1: BatchNorm of resnet18 needs two images or more .* batch_size=2"
    ):
        run_job(tmp_path, *lone)
    prepare(config_of(*lone, "freeze_depth=all"))  # frozen statistics are used, not computed
    prepare(config_of(*lone, "data.image_size=33"))  # four values a channel are enough
    assert not (tmp_path / "runs").exists()


def test_an_unknown_run_to_start_from_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"\Abackbone.weights=run:nope: no such run in .*/runs; it holds no runs"):
        run_job(tmp_path, "backbone.weights=run:nope")


def test_a_bad_image_that_only_training_meets_fails_the_run(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (20, 20)).save(tmp_path / "data" / label / f"{index}.png")
    (tmp_path / "data/a/3.png").write_bytes(b"damaged")
    with pytest.raises(
        TrainingError, match=r"image a/3\.png can't be decoded: not an image .*; fix the file"
    ) as caught:
        run_job(
            tmp_path, "name=late", "data=image_folder", f"data.path={tmp_path}/data", "data.cache_bytes=0",
            "batch_size=4", "data.val_fraction=0.3", "data.num_train_per_class=null",
        )  # fmt: skip
    assert caught.value.exit_status == 1
    manifest = json.loads((tmp_path / "runs/late/run.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", str(caught.value))
