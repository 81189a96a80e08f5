"""What a meta-training leaves is a backbone: other jobs fine-tune it, sweep over it and stack on it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from graftstack.backbones.registry import build
from graftstack.backbones.weights import load_weights
from graftstack.cli import main
from graftstack.config.compose import compose_job
from graftstack.config.meta import MetaConfig, MethodName
from graftstack.config.schema import BackboneConfig
from graftstack.finetune.artifact import ModelCard
from graftstack.meta.artifact import save_meta
from graftstack.meta.episodes import EpisodeSampler, training_shape
from graftstack.meta.model import MetaModel, MetaState
from graftstack.meta.task import prepare_meta
from graftstack.storage import Folder

NUM_EPISODES = 16
COMMON = ("data=digits", "data.image_size=16", "backbone=conv4", "cluster=inline", "cluster.cpus_per_worker=1")
META = ("num_ways=2", "num_queries=3", f"num_episodes={NUM_EPISODES}", "eval.num_episodes=10", "episodes_per_step=2")
# Classes that no training episode has shown.
NEW = ("data.classes=[0,1,2]", "data.num_train_per_class=26", "data.val_fraction=0.3", "batch_size=26", "epochs=2")
HELD_OUT = "eval.classes=[0,1,2]"

Capture = pytest.CaptureFixture[str]


def words(folder: Path, job: str, name: str, *overrides: str) -> list[str]:
    given = [*COMMON, f"runs_dir={folder}/runs", f"name={name}", *overrides]
    return [job, *{word.partition("=")[0]: word for word in given}.values()]


@pytest.fixture(scope="module", params=["maml", "prototypes"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the method, called `meta`."""
    folder: Path = tmp_path_factory.mktemp("meta")
    assert main(words(folder, "meta", "meta", *META, HELD_OUT, f"method={request.param}")) == 0
    return folder


def used(folder: Path, job: str, *overrides: str) -> dict[str, Any]:
    """Returns the manifest of a job on the new classes that begins with the run's weights."""
    taps = () if job == "finetune" else (f"taps.location={folder}/taps",)
    weights = "backbone.weights=run:meta"
    assert main(words(folder, job, job, *NEW, weights, *taps, *overrides)) == 0
    found: dict[str, Any] = json.loads((folder / f"runs/{job}/run.json").read_text())
    return found


def weights_in(place: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in load_file(place).items() if name.startswith("backbone.")}


def assert_frozen(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, blocks: str) -> None:
    """The named blocks are as they were, statistics included, and no others."""
    frozen = {name for name, tensor in wanted.items() if torch.equal(found[name], tensor)}
    expected = {name for name in wanted if name.split(".")[1].removeprefix("block") in blocks}
    assert expected <= frozen
    kernels = {name for name in frozen - expected if name.endswith("conv.weight")}
    assert not kernels


def test_a_head_is_grafted_onto_it(trained: Path) -> None:
    found = used(trained, "finetune", "freeze_depth=all")
    assert found["details"]["weights"] == f"run:{trained}/runs/meta (conv4 trained on 7 classes)"
    of_meta = weights_in(trained / "runs/meta/model/model.safetensors")
    assert_frozen(weights_in(trained / "runs/finetune/model/model.safetensors"), of_meta, blocks="1234")


def test_its_freeze_depth_is_swept_over(trained: Path) -> None:
    found = used(trained, "sweep", "space.freeze_depth=[2,all]", "space.lr=[1e-3]")
    assert [trial["status"] for trial in found["results"]["trials"]] == ["done", "done"]
    assert found["results"]["reuse"]["backbone_forwards"] == found["results"]["reuse"]["unique_samples"]
    of_meta = weights_in(trained / "runs/meta/model/model.safetensors")
    blocks = {2: "12", "all": "1234"}[found["details"]["best_freeze_depth"]]
    assert_frozen(weights_in(trained / "runs/sweep/model/model.safetensors"), of_meta, blocks=blocks)


def test_base_models_stand_on_it_and_see_classes_that_it_never_saw(trained: Path) -> None:
    bases = "base_models=[{probe:{}},{finetune:{freeze_depth:2}}]"
    found = used(trained, "stack", bases, "folds.num=2")
    of_meta = weights_in(trained / "runs/meta/model/model.safetensors")
    for base, blocks in (("probe", "1234"), ("finetune", "12")):
        assert_frozen(weights_in(trained / f"runs/stack/model/bases/{base}/model.safetensors"), of_meta, blocks=blocks)
    scores = {row["name"]: row["held_out_score"] for row in found["results"]["base_models"]}
    assert scores["probe"] > 0.85, "where chance is 1/3"


def test_its_running_statistics_are_not_the_initial_ones(trained: Path) -> None:
    kept = weights_in(trained / "runs/meta/model/model.safetensors")
    for block in (f"backbone.block{index}.norm.running_" for index in (1, 2, 3, 4)):
        assert not torch.allclose(kept[f"{block}mean"], torch.zeros(64), atol=1e-2)
        assert not torch.allclose(kept[f"{block}var"], torch.ones(64), atol=1e-2)


@pytest.mark.parametrize("trained", ["maml"], indirect=True)
def test_where_training_keeps_no_running_statistics_they_are_those_of_its_episodes(trained: Path) -> None:
    config = compose_job("meta", words(trained, "meta", "meta", *META, HELD_OUT)[1:])
    assert isinstance(config, MetaConfig)
    task = prepare_meta(config)
    kept = weights_in(trained / "runs/meta/model/model.safetensors")
    sampler = EpisodeSampler(task.classes.train, training_shape(config), seed=config.seed, part="train")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in task.preprocessing[1:])
    moments = []
    for index in range(NUM_EPISODES):
        images = (task.data.images.batch(np.sort(sampler.episode(index).rows.ravel())).float() / 255 - mean) / std
        seen = F.conv2d(images, kept["backbone.block1.conv.weight"], kept["backbone.block1.conv.bias"], padding=1)
        moments.append(torch.stack([seen.mean(dim=(0, 2, 3)), seen.var(dim=(0, 2, 3))]))
    for name, expected in zip(("mean", "var"), torch.stack(moments).mean(dim=0), strict=True):
        torch.testing.assert_close(kept[f"backbone.block1.norm.running_{name}"], expected, rtol=1e-4, atol=1e-5)


def test_tables_of_positions_are_kept_beside_what_is_learnt(tmp_path: Path) -> None:
    config = MetaConfig(backbone=BackboneConfig(name="swin_t"), method=MethodName.prototypes)
    model = MetaModel(config, image_size=32, num_classes=2, device=torch.device("cpu"))
    state = MetaState(np.zeros_like(model.initial(build("swin_t")).parameters), np.empty(0, np.float32))
    card = ModelCard(
        backbone="swin_t",
        class_names=("a", "b"),
        image_size=32,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        freeze_depth=0,
        keeps_head=False,
    )
    save_meta(Folder(tmp_path), model, state, card)
    backbone = build("swin_t")
    table = backbone.backbone_state()["features.1.0.attn.relative_position_index"]
    expected = table.clone()
    table.zero_()
    load_weights(backbone, f"{tmp_path}/model.safetensors")
    assert torch.equal(table, expected)
    assert not any(parameter.any() for parameter in backbone.parameters() if parameter.requires_grad)


def test_another_backbone_doesnt_take_its_weights(trained: Path, capsys: Capture) -> None:
    other = words(trained, "meta", "other", *META, "backbone=resnet18", "backbone.weights=run:meta")
    assert main(other) == 2
    said = f"graftstack: backbone=resnet18: run:{trained}/runs/meta holds a conv4; add backbone=conv4"
    assert capsys.readouterr().err.splitlines() == [said]
