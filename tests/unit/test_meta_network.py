"""A backbone as pure functions of its parameters gives what the backbone itself does, whatever its family."""

import copy

import pytest
import torch
from torch import Tensor
from torchvision.models import VisionTransformer

from graftstack.backbones.backbone import Backbone
from graftstack.backbones.families import vit
from graftstack.backbones.registry import build
from graftstack.config.meta import MetaConfig, MethodName
from graftstack.finetune.model import graft
from graftstack.meta.batchnorm import Found, batch_statistics
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.episodes import EpisodeShape
from graftstack.meta.methods import Adapting, Embedding, head_size, make_method
from graftstack.meta.network import Network

FAMILIES = {
    "conv4": 28,
    "resnet18": 64,
    "mobilenet_v3_small": 64,  # hard sigmoids, and BatchNorm with a momentum of its own
    "squeezenet1_1": 64,  # no BatchNorm, and features that its own head doesn't take
    "small_vit": 16,  # no BatchNorm, attention
}


def network(name: str = "conv4", *, head_size: int | None = 5) -> Network:
    torch.manual_seed(0)
    return Network(small_vit() if name == "small_vit" else build(name), head_size=head_size)


def small_vit() -> Backbone:
    """Of the family's kind, and of no size that it is published in: those have 86 million parameters or more."""
    model = VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
    )
    return Backbone("small_vit", model, vit.split(model))


def images(num: int, size: int = 28) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(num, 3, size, size).contiguous(memory_format=torch.channels_last)


def episode(size: int) -> EpisodeBatch:
    """Two classes, two support images and two queries of each."""
    labels = torch.tensor([0, 0, 1, 1])
    support, queries = images(8, size).split(4)
    return EpisodeBatch(support, labels, queries, labels, torch.arange(2), 2, 2)


def test_features_and_logits_are_those_of_the_model_in_eval_mode() -> None:
    torch.manual_seed(0)
    backbone = build("conv4")
    for name, buffer in backbone.model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2.0)
    model = graft(backbone, num_classes=5, keep_head=False, seed=0).eval()
    net = Network(copy.deepcopy(backbone).train(), head_size=5)
    params = net.parameters() | {f"head.{name}": value.detach() for name, value in model.head.named_parameters()}
    statistics, x = net.statistics(), images(4)
    assert torch.equal(net.features(params, statistics, x), backbone(x))
    assert torch.equal(net.logits(params, statistics, x), model(x))
    assert net.feature_dim == 64


def test_what_is_learnt_loads_into_a_grafted_model() -> None:
    net = network()
    params = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in net.parameters().items()}
    statistics = {name: tensor + 0.1 for name, tensor in net.statistics().items()}
    model = graft(build("conv4"), num_classes=5, keep_head=False, seed=1).eval()
    counts = {name: tensor for name, tensor in model.named_state().items() if name.endswith("num_batches_tracked")}
    assert model.named_state().keys() == params.keys() | statistics.keys() | counts.keys()
    model.load_named_state(counts | params | statistics)
    x = images(4)
    assert torch.equal(model(x), net.logits(params, statistics, x))


def test_parameters_and_statistics_are_copies() -> None:
    net = network()
    params, statistics = net.parameters(), net.statistics()
    x = images(2)
    before = net.logits(net.parameters(), net.statistics(), x)
    for tensor in [*params.values(), *statistics.values()]:
        assert not tensor.requires_grad
        tensor.fill_(7.0)
    assert torch.equal(net.logits(net.parameters(), net.statistics(), x), before)


def test_a_network_without_a_head_has_the_parameters_of_its_backbone_alone() -> None:
    assert all(name.startswith("backbone.") for name in network(head_size=None).parameters())


def test_frozen_groups_thaw() -> None:
    backbone = build("conv4")
    backbone.freeze(2)
    net = Network(backbone, head_size=None)
    params = {name: tensor.requires_grad_() for name, tensor in net.parameters().items()}
    net.features(params, net.statistics(), images(2)).sum().backward()
    assert all(tensor.grad is not None for tensor in params.values())


@pytest.mark.parametrize("name", ["conv4", "resnet18", "mobilenet_v3_small"])
def test_running_averages_move_as_in_training_mode(name: str) -> None:
    net = network(name, head_size=None)
    statistics = net.statistics()
    torch.manual_seed(0)
    model = build(name).train()
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn(4, 3, 64, 64)
        model(x)
        found: Found = {}
        with batch_statistics(found=found):
            net.features(net.parameters(), statistics, x)
        statistics = net.updated(statistics, net.moments(statistics, found))
    buffers = {f"backbone.{key}": value for key, value in model.model.named_buffers() if value.is_floating_point()}
    assert statistics.keys() == buffers.keys()
    for key, tensor in statistics.items():
        assert torch.allclose(tensor, buffers[key], rtol=1e-5, atol=1e-7), key


def test_statistics_that_no_batch_moved_stay() -> None:
    net = network()
    statistics = net.statistics()
    updated = net.updated(statistics, net.moments(statistics, {}))
    assert all(torch.allclose(updated[name], tensor) for name, tensor in statistics.items())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", [MethodName.maml, MethodName.prototypes])
def test_every_family_can_be_meta_trained(name: str, method: MethodName) -> None:
    config = MetaConfig(method=method, num_ways=2, **({"inner_lr": 0.01, "inner_steps": 1} if method.adapts else {}))
    net = network(name, head_size=head_size(config))
    learner: Adapting | Embedding = make_method(config, net, num_classes=2)
    params = {key: tensor.requires_grad_() for key, tensor in learner.meta_parameters().items()}
    statistics, batch = net.statistics(), episode(FAMILIES[name])
    if config.method.adapts:
        loss = learner.outcome(params, statistics, batch).objective
    else:
        with batch_statistics():
            features = net.features(params, statistics, torch.cat([batch.support, batch.queries]))
        loss = learner.loss(params, features, batch.classes.repeat_interleave(4), EpisodeShape(2, 2, 2)).loss
    gradient = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    assert all(tensor.isfinite().all() for tensor in gradient.values())
    first = next(iter(params))
    assert gradient[first].abs().max() > 0
