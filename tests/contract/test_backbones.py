"""What every backbone family promises: layer groups that are the model, and freezing that holds."""

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from graftstack.backbones.backbone import Backbone
from graftstack.backbones.catalog import CATALOG
from graftstack.backbones.registry import FAMILIES, build

# The smallest member of each family, with an image size in pixels that it takes.
MEMBERS = {
    "cifar_resnet20": 32,
    "conv4": 28,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_0": 48,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 32,
    "vit_b_32": 64,
    "timm/convnext_atto": 32,
    "timm/densenet121": 32,
    "timm/efficientnet_b0": 32,
    "timm/eva02_tiny_patch14_224": 224,
    "timm/resnet18": 32,
    "timm/vit_tiny_patch16_224": 224,
}

members = pytest.mark.parametrize("name", MEMBERS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Images this small gain nothing from threads, and threads that wait for each other cost minutes."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@functools.cache
def original(name: str) -> Backbone:
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="needs the extra: pip install 'graftstack[timm]'")
    torch.manual_seed(0)
    return build(name, image_size=MEMBERS[name]).eval()


@pytest.fixture
def backbone(name: str) -> Backbone:
    """In eval mode, and shared by the tests: not to be changed."""
    return original(name)


@pytest.fixture
def own_backbone(name: str) -> Backbone:
    """A copy that the test may change."""
    return copy.deepcopy(original(name))


@pytest.fixture
def images(name: str) -> Tensor:
    return torch.rand(2, 3, MEMBERS[name], MEMBERS[name], generator=torch.Generator().manual_seed(1))


def test_every_family_has_a_member_here():
    families = {"timm" if name.startswith("timm/") else CATALOG[name] for name in MEMBERS}
    assert families == set(FAMILIES)


def test_the_catalog_is_what_torchvision_registers():
    from torchvision import models

    modules = {
        models.get_model_builder(name).__module__ for name in CATALOG if CATALOG[name] not in ("cifar_resnet", "conv4")
    }
    registered = {name for name in models.list_models(models) if models.get_model_builder(name).__module__ in modules}
    ours = {name for name in CATALOG if CATALOG[name] not in ("cifar_resnet", "conv4")}
    assert ours == registered
    assert len(modules) == 13


@members
@torch.no_grad()
def test_groups_then_head_equal_the_model_bit_for_bit(backbone, images):
    assert torch.equal(backbone.pretrained_logits(images), backbone.model(images))


@members
@torch.no_grad()
def test_groups_are_pure_and_end_in_a_feature_vector(backbone, images):
    x = images
    for index in range(backbone.num_groups):
        before = x.clone()
        after = backbone.run_groups(x, index, index + 1)
        assert torch.equal(x, before), f"{backbone.groups[index].name} changes its input"
        x = after
    assert x.shape == (2, backbone.feature_dim)
    assert torch.equal(x, backbone(images))


@members
def test_every_parameter_before_the_head_is_in_one_group(backbone):
    grouped = [key for index in range(backbone.num_groups) for key, _ in backbone.group_parameters(index)]
    expected = [key for key, _ in backbone.model.named_parameters() if not backbone.is_head_key(key)]
    assert sorted(grouped) == sorted(expected)


@members
def test_the_state_dict_is_the_models_own(backbone):
    assert list(backbone.state_dict()) == [f"model.{key}" for key in backbone.model.state_dict()]
    head = {key for key in backbone.model.state_dict() if backbone.is_head_key(key)}
    assert len({g.name for g in backbone.groups}) == backbone.num_groups
    assert backbone.backbone_state().keys() == backbone.model.state_dict().keys() - head


@members
def test_freezing_keeps_gradients_and_statistics_away(own_backbone, images):
    for depth in sorted({0, own_backbone.num_groups // 2, own_backbone.num_groups}):
        with torch.no_grad():
            expected_tap = own_backbone.eval().run_groups(images, 0, depth)
        frozen = [group.module for group in own_backbone.groups[:depth]]
        statistics = [buffer.clone() for module in frozen for buffer in module.buffers()]

        own_backbone.freeze(depth)
        own_backbone.train()
        own_backbone.zero_grad()
        features = own_backbone(images)
        if features.requires_grad:
            features.sum().backward()

        for index, group in enumerate(own_backbone.groups):
            trains = index >= depth
            assert all(module.training == trains for module in group.module.modules())
            for _, parameter in own_backbone.group_parameters(index):
                assert parameter.requires_grad == trains
                assert (parameter.grad is not None) == trains
        now = [buffer for module in frozen for buffer in module.buffers()]
        assert all(torch.equal(before, after) for before, after in zip(statistics, now, strict=True))
        assert torch.equal(own_backbone.run_groups(images, 0, depth), expected_tap)


@members
@torch.no_grad()
def test_a_copy_shares_its_own_parts_and_functional_call_reaches_them_all(backbone, images):
    expected = backbone(images)
    twin = copy.deepcopy(backbone)
    for parameter in twin.model.parameters():
        parameter.zero_()
    assert all(not p.any() for group in twin.groups for p in group.module.parameters())
    of_zeros = twin(images)
    assert not torch.equal(of_zeros, expected)
    assert torch.equal(functional_call(backbone, dict(twin.named_parameters()), (images,)), of_zeros)
    assert torch.equal(backbone(images), expected)


@pytest.mark.parametrize("name", ["conv4", "resnet18", "vit_b_32", "squeezenet1_0"])
@torch.no_grad()
def test_pickle_keeps_the_sharing(own_backbone, images):
    own_backbone.freeze(2)
    twin = pickle.loads(pickle.dumps(own_backbone))
    assert torch.equal(twin(images), own_backbone(images))
    assert twin.freeze_depth == 2
    for parameter in twin.model.parameters():
        parameter.zero_()
    assert all(not p.any() for group in twin.groups for p in group.module.parameters())


@pytest.mark.parametrize("name", [name for name in MEMBERS if name.startswith("timm/")])
def test_a_timm_model_of_the_usual_layout_has_several_groups(name, backbone):
    fallback = {"timm/eva02_tiny_patch14_224": 1, "timm/densenet121": 2}
    assert backbone.num_groups == fallback.get(name, backbone.num_groups)
    assert name in fallback or backbone.num_groups >= 6
