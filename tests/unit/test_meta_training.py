"""The outer loop takes the steps of a plain training loop, and the same ones to the bit whoever computes what."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftstack.config.meta
from graftstack.backbones.backbone import Backbone
from graftstack.config.compose import compose_job
from graftstack.config.meta import MetaConfig
from graftstack.errors import TrainingError
from graftstack.meta.crew import Crew, InlineCrew
from graftstack.meta.episode_images import EpisodeBatch, EpisodeImages
from graftstack.meta.episodes import EpisodeSampler, training_shape
from graftstack.meta.model import MetaModel, MetaState
from graftstack.meta.runner import Block, BlockGradient, EpisodeRunner, RunnerSettings
from graftstack.meta.steps import blocks_of, gradient_of_step
from graftstack.meta.task import MetaTask, prepare_meta
from graftstack.meta.training import MetaTrained, MetaTraining
from graftstack.storage import Folder

DIGITS = ("data=digits", "data.image_size=16", "backbone=conv4", "num_ways=3", "num_queries=2", "cluster=inline")
# Steps whose size doesn't depend on when they are taken.
PLAIN = ("optimizer=sgd", "optimizer.momentum=0", "optimizer.weight_decay=0", "schedule=constant")
STEADY = "schedule.warmup_fraction=0"


@dataclass
class Setting:
    """A meta-training that is about to begin."""

    task: MetaTask
    settings: RunnerSettings
    model: MetaModel

    @classmethod
    def of(cls, *overrides: str) -> "Setting":
        config = compose_job("meta", list({word.partition("=")[0]: word for word in (*DIGITS, *overrides)}.values()))
        assert isinstance(config, MetaConfig)
        task = prepare_meta(config)
        settings = RunnerSettings(
            config=config, classes=task.classes, images=task.data.images, preprocessing=task.preprocessing
        )
        size, num_classes = task.preprocessing.image_size, len(task.classes.train)
        return cls(task, settings, MetaModel(config, image_size=size, num_classes=num_classes, device=CPU))

    @property
    def initial(self) -> MetaState:
        return self.model.initial(self.task.backbone)

    def inline(self) -> InlineCrew:
        return InlineCrew(EpisodeRunner(self.settings))

    def training(self, folder: Path, crew: Crew | None = None, **options: Any) -> MetaTraining:
        options = {"validate": None, **options}
        return MetaTraining(self.task, self.model, crew or self.inline(), Folder(str(folder)), **options)

    def trained(self, folder: Path, crew: Crew | None = None, **options: Any) -> MetaTrained:
        return self.training(folder, crew, **options).run()

    def batches(self, block: Block) -> Iterator[EpisodeBatch]:
        config = self.task.config
        sampler = EpisodeSampler(self.task.classes.train, training_shape(config), seed=config.seed, part="train")
        images = EpisodeImages(self.task.data.images, self.task.preprocessing, CPU)
        return (images.batch(sampler.episode(index)) for index in range(*block))


CPU = torch.device("cpu")


class Scattered:
    """Two runners, as two processes have them: each call takes the blocks in another order, gives each to either, and
    has some of them done again by the other, whose first one was lost. No array that travels can be written to."""

    num_workers = 2
    num_losses = 0
    waiting_for = None

    def __init__(self, settings: RunnerSettings) -> None:
        self._runners = [EpisodeRunner(settings), EpisodeRunner(settings)]
        self._rng = np.random.default_rng(0)
        self.done_by: list[list[tuple[int, int]]] = []
        """Of each call: which entry each runner took, in order."""

    def call(
        self,
        method: str,
        args_list: Sequence[Sequence[Any]],
        *,
        shared: Sequence[Any] = (),
        poll: Callable[[int], None] = lambda _: None,
    ) -> list[Any]:
        results: dict[int, Any] = {}
        done: list[tuple[int, int]] = []
        for index in self._rng.permutation(len(args_list)).tolist():
            first = int(self._rng.integers(2))
            for which in [first, 1 - first][: 1 + int(self._rng.integers(2))]:
                results[index] = frozen(
                    getattr(self._runners[which], method)(*frozen(shared), *frozen(args_list[index]))
                )
                done.append((index, which))
            poll(len(results))
        self.done_by.append(done)
        return [results[index] for index in range(len(args_list))]

    def close(self) -> None:
        """Has nothing to end."""


def frozen(value: Any) -> Any:
    """Returns copies of arrays that can't be written to, wherever they are in tuples and lists."""
    if isinstance(value, np.ndarray):
        copied = value.copy()
        copied.flags.writeable = False
        return copied
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(frozen, value))
    return [frozen(part) for part in value] if isinstance(value, list | tuple) else value


def assert_bits(found: MetaState, wanted: MetaState) -> None:
    assert np.array_equal(found.parameters, wanted.parameters)
    assert np.array_equal(found.statistics, wanted.statistics)


# Whoever computes what


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=prototypes", "episodes_per_step=5", "num_episodes=20"],
        ["method=prototypes", "episodes_per_step=34", "num_episodes=68"],
        ["method=maml", "episodes_per_step=4", "num_episodes=12"],
        ["method=supcon", "episodes_per_step=4", "num_episodes=16"],
        ["method=triplet", "episodes_per_step=3", "num_episodes=9"],
        ["method=finetune_baseline", "episodes_per_step=3", "num_episodes=9"],
    ],
    ids=lambda overrides: "-".join(word.partition("=")[2] for word in overrides),
)
def test_parameters_are_the_same_to_the_bit_whoever_goes_through_which_block(
    tmp_path: Path, overrides: list[str]
) -> None:
    setting = Setting.of(*overrides)
    crew = Scattered(setting.settings)
    scattered = setting.trained(tmp_path / "scattered", crew)
    alone = setting.trained(tmp_path / "alone")
    assert_bits(scattered.state, alone.state)
    assert scattered.history == alone.history
    assert not np.array_equal(alone.state.parameters, setting.initial.parameters)
    assert any([index for index, _ in done] != sorted({index for index, _ in done}) for done in crew.done_by)
    assert {which for done in crew.done_by for _, which in done} == {0, 1}


def test_features_are_pulled_back_by_whoever_has_not_embedded_them() -> None:
    setting = Setting.of("method=supcon", "episodes_per_step=2", "num_episodes=2")
    first, second = EpisodeRunner(setting.settings), EpisodeRunner(setting.settings)
    state, block = setting.initial, Block(0, 2)
    features = first.embed(state, block).features
    slopes = np.random.default_rng(0).normal(size=features.shape).astype(np.float32)
    assert np.array_equal(first.pull_back(state, block, slopes), second.pull_back(state, block, slopes))
    assert np.array_equal(first.embed(state, block).features, second.embed(state, block).features)


@pytest.mark.parametrize("num", [1, 3, 32, 33, 100])
def test_blocks_depend_on_the_episodes_of_a_step_alone(num: int) -> None:
    configs = [
        MetaConfig(episodes_per_step=num, num_episodes=10 * num),
        compose_job("meta", [f"episodes_per_step={num}", f"num_episodes={num}", f"cluster.num_workers={min(num, 32)}"]),
    ]
    for step in (0, 7):
        blocks, others = (blocks_of(step, config) for config in configs)
        assert blocks == others
        assert [index for block in blocks for index in range(*block)] == list(range(step * num, (step + 1) * num))
        sizes = [block.stop - block.start for block in blocks]
        assert len(blocks) == min(num, 32)
        assert max(sizes) - min(sizes) <= 1


# The steps of a plain loop


def own(backbone: Backbone) -> dict[str, nn.Parameter]:
    """The parameters of a backbone, without its own head."""
    groups = range(backbone.num_groups)
    return {f"backbone.{name}": tensor for index in groups for name, tensor in backbone.group_parameters(index)}


def images_and_classes(batch: EpisodeBatch, num_queries: int) -> tuple[Tensor, Tensor]:
    classes = [batch.classes.repeat_interleave(num) for num in (batch.num_shots, num_queries)]
    return torch.cat([batch.support, batch.queries]), torch.cat(classes)


def prototype_loss(features: Tensor, batch: EpisodeBatch) -> Tensor:
    support, queries = features.split([len(batch.support), len(batch.queries)])
    means = torch.stack([support[batch.support_labels == label].mean(dim=0) for label in range(batch.num_ways)])
    return F.cross_entropy(-(queries[:, None] - means).square().sum(dim=2), batch.query_labels)


def supcon_loss(features: Tensor, classes: Tensor) -> Tensor:
    """Khosla et al. 2020, equation 2, image by image."""
    z = F.normalize(features)
    terms = []
    for i in range(len(z)):
        others = torch.arange(len(z)) != i
        logits = z[others] @ z[i] / 0.1
        positive = classes[others] == classes[i]
        terms.append(-(logits[positive] - logits.logsumexp(dim=0)).mean())
    return torch.stack(terms).mean()


def triplet_loss(features: Tensor, classes: Tensor) -> Tensor:
    """Schroff et al. 2015: each image, the furthest of its class, and the nearest stranger further off."""
    distances = torch.cdist(F.normalize(features), F.normalize(features))
    terms = []
    for i in range(len(features)):
        is_own = (classes == classes[i]) & (torch.arange(len(classes)) != i)
        furthest = distances[i][is_own].max()
        further = distances[i][(classes != classes[i]) & (distances[i] > furthest)]
        if len(further):
            terms.append(F.relu(furthest - further.min() + 0.2))
    losses = torch.stack(terms)
    return losses.sum() / (losses > 0).sum()


JOINT = {"supcon": supcon_loss, "triplet": triplet_loss}


def assert_gradients(setting: Setting, found: np.ndarray[Any, Any], loss: Tensor) -> None:
    params = own(setting.task.backbone)
    slopes = setting.model.named_parameters(found)
    wanted = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    assert slopes.keys() == wanted.keys()
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    for name, tensor in wanted.items():
        assert float((slopes[name] - tensor).abs().max()) <= 1e-4 * scale, name


@pytest.mark.parametrize("method", JOINT)
def test_a_joint_loss_is_that_of_all_images_of_a_step_in_one_pass(method: str) -> None:
    setting = Setting.of(
        f"method={method}", "backbone=squeezenet1_1", "data.image_size=32", "episodes_per_step=3", "num_episodes=3"
    )
    found = gradient_of_step(0, setting.initial, setting.model, Scattered(setting.settings))
    episodes = [images_and_classes(batch, 2) for batch in setting.batches(Block(0, 3))]
    images, classes = (torch.cat(parts) for parts in zip(*episodes, strict=True))
    assert len(classes.unique()) < 9, "classes come back in other episodes"
    loss = JOINT[method](setting.task.backbone(images), classes)
    assert found.losses == [pytest.approx(float(loss.detach()), rel=1e-4)]
    assert_gradients(setting, found.gradient, loss)


@pytest.mark.parametrize("method", JOINT)
def test_a_joint_loss_normalises_the_images_of_each_episode_by_themselves(method: str) -> None:
    setting = Setting.of(f"method={method}", "episodes_per_step=3", "num_episodes=3")
    found = gradient_of_step(0, setting.initial, setting.model, Scattered(setting.settings))
    backbone = setting.task.backbone.train()
    episodes = [images_and_classes(batch, 2) for batch in setting.batches(Block(0, 3))]
    features = torch.cat([backbone(images) for images, _ in episodes])
    loss = JOINT[method](features, torch.cat([classes for _, classes in episodes]))
    assert found.losses == [pytest.approx(float(loss.detach()), rel=1e-4)]
    assert_gradients(setting, found.gradient, loss)


@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize("method", ["prototypes", "supcon"])
def test_training_is_what_a_plain_loop_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, num_blocks: int
) -> None:
    monkeypatch.setattr(graftstack.config.meta, "_MOST_BLOCKS", num_blocks)
    setting = Setting.of(
        f"method={method}", "episodes_per_step=2", "num_episodes=6", *PLAIN, STEADY, "optimizer.lr=0.01"
    )
    found = setting.trained(tmp_path).state
    backbone = setting.task.backbone.train()
    params = own(backbone)
    optimizer = torch.optim.SGD(params.values(), lr=0.01)
    for step in range(3):
        batches = list(setting.batches(Block(2 * step, 2 * step + 2)))
        episodes = [images_and_classes(batch, 2) for batch in batches]
        features = [backbone(images) for images, _ in episodes]
        if method == "prototypes":
            loss = torch.stack([*map(prototype_loss, features, batches)]).mean()
        else:
            loss = supcon_loss(torch.cat(features), torch.cat([classes for _, classes in episodes]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in setting.model.parameters(found).items():
        torch.testing.assert_close(tensor, params[name].detach(), rtol=1e-3, atol=1e-5)
    buffers = dict(backbone.model.named_buffers())
    statistics = setting.model.statistics(found)
    assert len(statistics) == 8
    for name, tensor in statistics.items():
        torch.testing.assert_close(tensor, buffers[name.removeprefix("backbone.")], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's vmap on a CPU
@pytest.mark.parametrize("method", ["maml", "reptile"])
def test_episodes_at_once_train_as_one_after_another(tmp_path: Path, method: str) -> None:
    gradients, states = {}, {}
    for execution in ("loop", "auto", "vmap"):
        more = (f"execution={execution}", "episodes_per_step=2", "num_episodes=2", *PLAIN, STEADY, "optimizer.lr=0.01")
        setting = Setting.of(f"method={method}", *more)
        gradients[execution] = EpisodeRunner(setting.settings).gradient(setting.initial, Block(0, 4)).gradient
        states[execution] = setting.trained(tmp_path / execution).state.parameters
    assert np.array_equal(gradients["auto"], gradients["loop"]), "on a CPU"
    distance = np.linalg.norm(gradients["vmap"] - gradients["loop"])
    assert 0 < distance < 1e-4 * np.linalg.norm(gradients["loop"])
    np.testing.assert_allclose(states["vmap"], states["loop"], rtol=1e-4, atol=1e-6)


def test_long_gradients_are_scaled_down(tmp_path: Path) -> None:
    setting = Setting.of("num_episodes=1", *PLAIN, STEADY, "optimizer.lr=1", "clip_grad_norm=1e-2")
    change = setting.trained(tmp_path).state.parameters - setting.initial.parameters
    assert np.linalg.norm(change) == pytest.approx(1e-2, rel=1e-2)


def test_learnt_rates_of_the_inner_loop_do_not_decay(tmp_path: Path) -> None:
    decay = ("num_episodes=1", "schedule=constant", STEADY, "optimizer.lr=1e-4", "optimizer.weight_decay=1e3")
    setting = Setting.of("method=meta_sgd", *decay)
    before, after = (setting.model.parameters(state) for state in (setting.initial, setting.trained(tmp_path).state))
    kernel = "backbone.block2.conv.weight"
    torch.testing.assert_close(after[kernel], 0.9 * before[kernel], rtol=0, atol=2e-4)
    name = f"inner_lr.{kernel}"
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=2e-4)


# What is kept


@pytest.mark.parametrize(
    ("select", "accuracies", "kept"),
    [
        ("best", [0.5, 0.7, 0.6, 0.7, 0.65], 1),
        ("best", [0.5, 0.4, 0.6, 0.7, 0.8], 4),
        ("best", [0.9, 0.4, 0.6, 0.7, 0.8], 0),
        ("last", [0.5, 0.7, 0.6, 0.7, 0.65], 4),
    ],
)
def test_the_state_that_is_kept_is_the_best_in_validation_or_the_last(
    tmp_path: Path, select: str, accuracies: list[float], kept: int
) -> None:
    setting = Setting.of("num_episodes=8", "eval.every_episodes=2", f"select={select}")
    seen: list[MetaState] = []

    def validate(state: MetaState) -> dict[str, float]:
        seen.append(state)
        return {"accuracy": accuracies[len(seen) - 1], "ci95": 0.0}

    trained = setting.trained(tmp_path, validate=validate)
    assert [row["accuracy"] for row in trained.history] == accuracies
    assert_bits(trained.state, seen[kept])
    assert trained.num_episodes == 2 * kept


def test_a_gradient_that_is_no_number_ends_the_training_before_its_step(tmp_path: Path) -> None:
    setting = Setting.of("method=maml", "inner_lr=0.5", "num_episodes=6", "episodes_per_step=2")

    class Broken(EpisodeRunner):
        def gradient(self, state: MetaState, block: Block) -> BlockGradient:
            found = super().gradient(state, block)
            return found if block.start < 2 else found._replace(gradient=found.gradient / np.float32(0))

    training = setting.training(tmp_path, InlineCrew(Broken(setting.settings)))
    expected = "step 2 of 3: inner_lr=0.5, optimizer.lr=0.001: the meta-gradient of episodes 2 to 3 isn't finite; lower"
    with np.errstate(all="ignore"), pytest.raises(TrainingError, match=expected):
        training.run()
    assert training.position.step == 1
    assert np.isfinite(training.state.parameters).all()
