"""The memory that a worker needs: what is counted is what tensors hold, and a real training keeps to it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tests.unit.memory_in_truth import wide_tasks
from torch import nn

from graftstack.checkpoint import Checkpoint, CheckpointStore
from graftstack.config.compose import compose_job
from graftstack.config.schema import OptimizerName
from graftstack.errors import ConfigError
from graftstack.finetune import memory
from graftstack.finetune.memory import (
    GIB,
    OPTIMIZER_SLOTS,
    PROCESS_BYTES,
    DataFacts,
    JobMemory,
    PassShape,
    assumed_facts,
    assumed_image_size,
    step_of,
    training_memory,
)
from graftstack.finetune.weightless import Unfilled, Weightless, _Count
from graftstack.meta.memory import meta_memory
from graftstack.stacking.memory import TableFacts, stack_memory
from graftstack.storage import Folder
from graftstack.sweep.fused import FusedTraining
from graftstack.sweep.memory import Heads, largest_trials, sweep_memory

FLOWERS = ("data=image_folder", "data.path=flowers")
SMALL = (*FLOWERS, "backbone=conv4")
# A step takes more than inference does.
LARGE_BATCH = (*SMALL, "batch_size=512")


def config_of(job: str, *words: str) -> Any:
    return compose_job(job, [*words, "name=a", "resume=true"])


def training(*words: str, facts: DataFacts | None = None) -> JobMemory:
    return training_memory(config_of("finetune", *words), facts)


def sweep(*words: str) -> JobMemory:
    return sweep_memory(config_of("sweep", *words))


def stack(*words: str, table: TableFacts | None = None, num_slots: int | None = None) -> JobMemory:
    return stack_memory(config_of("stack", *words), table, num_slots=num_slots)


def meta(*words: str) -> JobMemory:
    return meta_memory(config_of("meta", *words))


class TestCounting:
    def test_a_network_of_two_layers_holds_what_a_hand_count_says(self):
        place = Weightless()
        with Unfilled():
            network = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
        place.adopt(network)
        parameters = 4 * (100 * 50 + 50 + 50 * 10 + 10)
        assert place.live_bytes == parameters
        with place:
            images = torch.empty(8, 100)
            hidden = network[:2](images)
            # Both are saved: the images for the gradient of the first weight, and what ReLU returns for its own.
            assert place.live_bytes == parameters + 4 * 8 * (100 + 50)
            logits = network[2](hidden)
            del hidden
            total = logits.sum()
            kept = parameters + 4 * (8 * (100 + 50 + 10) + 1)
            assert place.live_bytes == kept
            total.backward()
        # A gradient for each parameter, and nothing that autograd had kept.
        assert place.live_bytes == 2 * parameters + 4 * (8 * (100 + 10) + 1)
        # The most was there when the first layer's gradients were.
        assert place.peak_bytes < kept + parameters + 4 * 8 * (50 + 50)

    @pytest.mark.parametrize("on_cpu", [False, True])
    def test_it_is_what_autograd_really_keeps(self, on_cpu: bool):
        def network() -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
            )

        real = network()
        images = torch.zeros(4, 3, 6, 6)
        known = {tensor.untyped_storage().data_ptr() for tensor in (*real.parameters(), *real.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = F.cross_entropy(real(images), torch.zeros(4, dtype=torch.int64))
        place = Weightless(on_cpu=on_cpu)
        with Unfilled():
            simulated = network()
        place.adopt(simulated)
        before = place.live_bytes
        with place:
            simulated_loss = F.cross_entropy(simulated(torch.empty(4, 3, 6, 6)), torch.empty(4, dtype=torch.int64))
        assert place.live_bytes - before == sum(kept.values()) + loss.nbytes
        assert simulated_loss.shape == loss.shape

    @pytest.mark.parametrize("backbone", ["resnet18", "swin_t", "convnext_tiny", "mobilenet_v3_small", "densenet121"])
    def test_a_step_holds_the_same_wherever_its_tensors_say_they_are(
        self, backbone: str, monkeypatch: pytest.MonkeyPatch
    ):
        step = step_of.__wrapped__
        shape = PassShape(backbone, False, 64, 10, 1, 8, is_bf16=False)
        found = step(shape)
        monkeypatch.setattr(memory, "_place", lambda _: Weightless(on_cpu=True))
        assert step(shape) == found

    def test_attention_keeps_no_matrix_of_scores(self, monkeypatch: pytest.MonkeyPatch):
        step = step_of.__wrapped__
        shape = PassShape("vit_b_32", False, 224, 10, 11, 8, is_bf16=False)
        found = step(shape)
        monkeypatch.setattr(memory, "_place", lambda _: Weightless())
        assert found.peak_bytes < step(shape).peak_bytes

    def test_frozen_parts_keep_nothing(self):
        place = Weightless()
        with Unfilled():
            layer = nn.Linear(10, 10)
        place.adopt(layer)
        before = place.live_bytes
        with place, torch.no_grad():
            result = layer(layer(torch.empty(4, 10)))
        assert place.live_bytes == before + result.nbytes

    def test_views_share_the_memory_of_what_they_are_of(self):
        place = Weightless()
        with place:
            whole = torch.empty(100)
            parts = [whole[:50], whole.view(10, 10), whole.detach()]
        assert (place.live_bytes, len(parts)) == (400, 3)

    def test_the_random_stream_and_the_modules_of_others_stay_as_they_were(self):
        before = torch.get_rng_state()
        training("backbone=conv4")
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.empty(2).device.type == "cpu"


class TestTrainings:
    def test_more_images_a_batch_take_more_and_more_workers_less_each(self):
        one, two = training(*LARGE_BATCH), training(*LARGE_BATCH, "cluster.num_workers=2")
        assert two.worker_bytes < one.worker_bytes < training(*SMALL, "batch_size=1024").worker_bytes

    def test_a_group_that_shrinks_counts_as_it_is_when_it_is_smallest(self):
        elastic = training(*LARGE_BATCH, "cluster.num_workers=[2,8]").worker_bytes
        assert elastic == training(*LARGE_BATCH, "cluster.num_workers=2").worker_bytes

    def test_what_is_frozen_keeps_no_activations(self):
        depths = [training(*LARGE_BATCH, f"freeze_depth={depth}").worker_bytes for depth in (0, 1, 2, "all")]
        assert depths == sorted(depths, reverse=True)
        assert len(set(depths)) == 4

    def test_half_precision_takes_less(self):
        assert training(*LARGE_BATCH, "precision=bf16").worker_bytes < training(*LARGE_BATCH).worker_bytes

    def test_momentum_takes_half_of_what_moments_take(self):
        adamw, sgd = (training(*FLOWERS, f"optimizer={name}").worker_bytes for name in ("adamw", "sgd"))
        parameters = 4 * (11_689_512 - 513_000 + 513 * 1000)
        # In memory, and twice where a checkpoint is written.
        assert adamw - sgd == pytest.approx(3 * parameters, rel=0.01)

    def test_a_gpu_holds_the_step_and_the_machine_what_comes_and_goes(self):
        cpu = training(*SMALL, "batch_size=512", "data.image_size=224")
        gpu = training(*SMALL, "batch_size=512", "data.image_size=224", "cluster.gpus_per_worker=1")
        assert cpu.device_bytes is None
        assert gpu.device_bytes is not None
        assert gpu.device_bytes > 10 * GIB > gpu.worker_bytes

    def test_a_driver_trains_nothing(self):
        small, large = training(*SMALL), training(*SMALL, "batch_size=512")
        assert small.driver_bytes == large.driver_bytes < small.worker_bytes

    def test_what_is_known_of_the_data_counts(self):
        few = training(*SMALL, facts=DataFacts(num_classes=5, num_val=100))
        many = training(*SMALL, facts=DataFacts(num_classes=5000, num_val=100_000))
        assert many.worker_bytes - few.worker_bytes > 4 * 5000 * 100_000

    def test_data_that_are_not_at_hand_are_as_large_as_imagenet(self):
        assert assumed_facts(config_of("finetune", *FLOWERS)) == DataFacts(num_classes=1000, num_val=50_000)
        assert assumed_facts(config_of("finetune", *FLOWERS, "data.classes=[a,b]")).num_classes == 2

    @pytest.mark.parametrize(
        ("words", "size"),
        [
            (("backbone=conv4",), 28),
            (("backbone=efficientnet_b1", "backbone.weights=IMAGENET1K_V2"), 240),
            (("backbone=resnet18", "backbone.weights=run:elsewhere"), 224),
            (("data.image_size=96",), 96),
        ],
    )
    def test_images_are_as_large_as_configuration_or_backbone_say(self, words: tuple[str, ...], size: int):
        assert assumed_image_size(config_of("finetune", *words)) == size

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("freeze_depth=9",), r"resnet18 has 6 layer groups"),
            (("backbone=vit_b_16", "data.image_size=50"), r"vit_b_16 can't take"),
            (("backbone=alexnet7",), r"alexnet7"),
        ],
    )
    def test_a_model_that_cant_be_is_one_line(self, words: tuple[str, ...], message: str):
        with pytest.raises(ConfigError, match=message) as caught:
            training(*FLOWERS, *words)
        assert "\n" not in str(caught.value)


class TestSweeps:
    def test_the_largest_trial_counts(self):
        one = training(*SMALL, "batch_size=640").worker_bytes
        both = sweep(*SMALL, "space.batch_size=[16,640]", "space.lr=[1e-3,1e-2]").worker_bytes
        assert both >= one
        assert both == sweep(*SMALL, "space.batch_size=[640,16]", "space.lr=[1e-2]").worker_bytes

    def test_only_keys_that_change_a_shape_make_trials_to_look_at(self):
        words = ("space.lr=loguniform(1e-4,1e-1)", "space.backbone=[resnet18,conv4]", "space.freeze_depth=[3,1,all]")
        trials = largest_trials(config_of("sweep", *words, "search=random"))
        assert {(trial.backbone.name, trial.freeze_depth) for trial in trials} == {("resnet18", 1), ("conv4", 1)}

    def test_no_size_of_images_counts_as_the_backbones_own(self):
        own, larger = sweep(*SMALL, "space.lr=[1e-3]"), sweep(*SMALL, "space.data.image_size=[24,null]")
        assert larger == own

    def test_the_largest_size_of_images_counts_where_it_is_larger_than_the_backbones_own(self):
        sizes = {
            trial.data.image_size for trial in largest_trials(config_of("sweep", "space.data.image_size=[64,null,256]"))
        }
        assert sizes == {256, None}

    def test_weights_that_are_for_larger_images_count(self):
        words = ("backbone=vit_b_16", "space.backbone.weights=[IMAGENET1K_V1,none,IMAGENET1K_SWAG_E2E_V1]")
        trials = largest_trials(config_of("sweep", *words))
        assert [assumed_image_size(trial) for trial in trials] == [224, 224, 384]

    def test_trials_of_the_same_shapes_are_counted_once(self):
        step_of.cache_clear()
        sweep(*SMALL, "search=random", "space.lr=uniform(0.1,0.2)", "space.batch_size=[7,11,13]", "space.epochs=[1,2]")
        assert step_of.cache_info().misses == 1

    def test_heads_that_train_as_one_are_counted_each(self):
        few, many = (
            sweep(*SMALL, "freeze_depth=all", "search=random", "space.lr=loguniform(1e-4,1e-1)", f"num_samples={num}")
            for num in (1, 2)
        )
        assert many.worker_bytes - few.worker_bytes > 4 * 513 * 1000 * 5

    def test_without_sharing_there_are_no_taps(self):
        words = (*SMALL, "space.freeze_depth=[2,all]")
        assert sweep(*words, "reuse=off").worker_bytes < sweep(*words).worker_bytes

    def test_heads_that_see_images_in_orders_of_their_own_hold_a_batch_each(self):
        words = (*SMALL, "data.classes=[a,b]", "freeze_depth=all", "data.image_size=64")
        one, many = (
            sweep(*words, "space.lr=[1e-3,2e-3,3e-3,4e-3]", *seeds).worker_bytes
            for seeds in ((), ("space.seed=[1,2,3,4]",))
        )
        assert many - one > (4 + 16) * 128 * 4 * 512

    def test_seeds_of_a_wide_range_are_not_gone_through(self):
        words = (*SMALL, "freeze_depth=all", "search=random", "num_samples=2", "space.seed=randint(0,1000000000000)")
        assert sweep(*words).worker_bytes < 8 * GIB


NUM_CLASSES, NUM_TRAIN = 10, 1437


class Counted(NamedTuple):
    """What tensors really held in a training of several heads."""

    saving: int
    """When it was saved."""
    saved: int
    peak: int


class TestHeads:
    """Real trainings, whose tensors are counted."""

    def count(self, heads: Heads, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Counted:
        num_features = heads.head_bytes // (4 * NUM_CLASSES) - 1
        common = ("data=digits", "backbone=conv4", "data.image_size=16", "freeze_depth=all", "epochs=2")
        rates = ("optimizer.head_lr_multiplier=1", f"batch_size={heads.batch_size}", f"data.cache_dir={folder}/cache")
        config = config_of("finetune", *common, *rates, f"runs_dir={folder}", *words)
        tasks = wide_tasks(config, num_heads=heads.num_heads, num_features=num_features, num_val=heads.num_val)
        saved: list[tuple[int, int]] = []

        def save(_: CheckpointStore, checkpoint: Checkpoint) -> None:
            saved.append((count.live_bytes, sum(tensor.nbytes for tensor in checkpoint.tensors.values())))

        monkeypatch.setattr(CheckpointStore, "save", save)
        with _Count() as count:
            for _ in FusedTraining(tasks, torch.device("cpu"), Folder(folder)).epochs():
                pass
        return Counted(*saved[-1], count.peak_bytes)

    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    def test_their_weights_are_there_as_often_as_is_said(
        self, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        slots = OPTIMIZER_SLOTS[OptimizerName(optimizer)]
        heads = Heads(4, 4 * NUM_CLASSES * 20_001, slots, 4 * NUM_CLASSES, batch_size=8, num_val=2)
        words = (f"optimizer={optimizer}", "data.num_train_per_class=8")
        found = self.count(heads, tmp_path, monkeypatch, *words)
        assert found.saving == pytest.approx(heads.kept_bytes, rel=0.05)
        assert found.saved == pytest.approx(heads.saved_bytes, rel=0.01)
        assert found.peak < heads.kept_bytes + 2 * heads.saved_bytes

    @pytest.mark.parametrize("words", [(), ("label_smoothing=0.1", "precision=bf16")])
    def test_logits_of_a_step_take_no_more_than_is_said(
        self, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        heads = Heads(16, 4 * NUM_CLASSES * 3, 2, 4 * NUM_CLASSES, batch_size=NUM_TRAIN, num_val=2)
        found = self.count(heads, tmp_path, monkeypatch, *words)
        assert 0.6 * heads.step_bytes < found.peak < heads.step_bytes + heads.kept_bytes

    def test_logits_of_a_validation_are_there_twice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        heads = Heads(16, 4 * NUM_CLASSES * 3, 2, 4 * NUM_CLASSES, batch_size=32, num_val=10_000)
        found = self.count(heads, tmp_path, monkeypatch)
        assert found.peak == pytest.approx(heads.val_bytes, rel=0.03)


class TestStacks:
    def test_estimators_that_are_fitted_at_once_add_up(self):
        table = TableFacts(num_rows=10**6, num_columns=100, num_classes=2)
        one, four = (
            stack("base_models=[LogisticRegression]", table=table, num_slots=num).worker_bytes for num in (1, 4)
        )
        assert four == 4 * one > 4 * 8 * 10**8

    def test_a_forest_takes_more_than_a_line(self):
        table = TableFacts(num_rows=50_000, num_columns=10, num_classes=2)
        line, forest = (
            stack(f"base_models=[{name}]", table=table).worker_bytes
            for name in ("LogisticRegression", "RandomForestClassifier")
        )
        assert forest > line + 10 * 8 * table.num_rows * table.num_columns

    def test_a_backbone_among_them_takes_what_its_training_takes(self):
        found = stack("base_models=[LogisticRegression,{finetune:{backbone:conv4}}]")
        assert (
            found.worker_bytes
            > training("backbone=conv4").worker_bytes
            > stack("base_models=[LogisticRegression]").worker_bytes
        )


class TestMeta:
    @pytest.mark.parametrize("method", ["prototypes", "supcon", "finetune_baseline"])
    def test_metric_methods_hold_an_episode(self, method: str):
        small, large = (meta(f"method={method}", f"num_queries={num}").worker_bytes for num in (5, 50))
        assert PROCESS_BYTES < small < large

    def test_second_derivatives_keep_every_inner_step(self):
        words = ("method=maml", "num_shots=20", "num_queries=1", "eval.inner_steps=1")
        one, two, three = (meta(*words, f"inner_steps={num}").worker_bytes for num in (1, 2, 3))
        assert two - one > 25 * 2**20
        assert three - two == pytest.approx(two - one, rel=0.2)

    def test_first_order_keeps_none(self):
        words = ("num_shots=20", "num_queries=1", "eval.inner_steps=1", "inner_steps=3")
        assert meta("method=fomaml", *words).worker_bytes < meta("method=maml", *words).worker_bytes - 50 * 2**20

    def test_a_joint_loss_keeps_the_episodes_of_a_workers_share(self):
        words = ("method=supcon", "episodes_per_step=8", "num_episodes=80")
        one, four = (meta(*words, f"cluster.num_workers={num}").worker_bytes for num in (1, 4))
        assert one > four


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of the peak of resident memory in /proc")
def test_a_real_training_takes_no_more_than_is_promised(tmp_path: Path):
    words = ("backbone=conv4", "batch_size=64", "data.classes=[0,1]", "data.num_train_per_class=32", "epochs=1")
    program = Path(__file__).with_name("memory_in_truth.py")
    arguments = [str(tmp_path), json.dumps([["finetune", *words]])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, str(program), *arguments], check=True, stdout=subprocess.PIPE, env=environment
    ).stdout
    [peak] = json.loads(found)
    assert peak < training("data=digits", *words, facts=DataFacts(num_classes=2, num_val=72)).worker_bytes
