import subprocess
import sys

import pytest
import torch
from torch.func import functional_call, grad

from graftstack.backbones.backbone import resolve_depth
from graftstack.backbones.catalog import CATALOG, default_image_size, require_known
from graftstack.backbones.preprocessing import IMAGENET_MEAN, Preprocessing, preprocessing_of
from graftstack.backbones.registry import build
from graftstack.errors import ConfigError


def test_names_are_known_without_torch():
    check = (
        "import sys, graftstack.backbones, graftstack.backbones.catalog as c; c.default_image_size('resnet18');"
        "sys.exit(bool({'torch', 'torchvision', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_model_of_our_own_needs_no_torchvision():
    check = (
        "import sys; from graftstack.backbones.registry import build; build('conv4'); build('cifar_resnet20');"
        "import graftstack.backbones.weights; sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"^backbone=resnet81: unknown; did you mean resnet18, .*\?$"):
        require_known("resnet81")
    with pytest.raises(ConfigError, match="backbone=resnet81"):
        build("resnet81")


def test_timm_names_are_looked_up_when_built():
    pytest.importorskip("timm")
    require_known("timm/resnet81")
    with pytest.raises(ConfigError, match=r"^backbone=timm/resnet81: timm has no such model; did you mean resnet\w+, "):
        build("timm/resnet81")
    with pytest.raises(ConfigError, match="timm has no such weights"):
        build("timm/resnet18.no_such_tag")


def test_without_timm_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"timm is not installed; pip install 'graftstack\[timm\]'"):
        build("timm/resnet18")


def test_image_sizes():
    assert {default_image_size(name) for name in CATALOG} == {28, 32, 224}
    assert default_image_size("cifar_resnet56") == 32
    assert default_image_size("conv4") == 28


def test_timm_knows_the_image_size_of_its_models():
    pytest.importorskip("timm")
    assert default_image_size("timm/vit_base_patch16_384") == 384


def test_resnet18_has_six_groups():
    backbone = build("resnet18")
    assert [group.name for group in backbone.groups] == ["stem", "layer1", "layer2", "layer3", "layer4", "pool"]
    assert [key for key, _ in backbone.group_parameters(0)] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert backbone.feature_dim == 512


@pytest.mark.parametrize(("name", "num_parameters"), [("cifar_resnet20", 269_722), ("cifar_resnet56", 853_018)])
def test_cifar_resnets_have_the_size_that_their_paper_gives(name, num_parameters):
    assert sum(p.numel() for p in build(name).parameters()) == num_parameters


@pytest.mark.parametrize("size", [1, 8, 16, 28, 32, 84])
@torch.no_grad()
def test_conv4_gives_64_features_at_any_size(size):
    assert build("conv4")(torch.rand(2, 3, size, size)).shape == (2, 64)


@torch.no_grad()
def test_conv4_at_28_pixels_flattens_one_pixel():
    backbone = build("conv4").eval()
    feature_map = backbone.run_groups(torch.rand(2, 3, 28, 28), 0, 4)
    assert feature_map.shape == (2, 64, 1, 1)


@torch.no_grad()
def test_squeezenets_own_head_takes_the_map():
    backbone = build("squeezenet1_0").eval()
    assert (backbone.head_boundary, backbone.num_groups) == (4, 5)
    assert backbone(torch.rand(1, 3, 64, 64)).shape == (1, 512)


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18", "conv4", "mobilenet_v2", "squeezenet1_0"])
@torch.no_grad()
def test_num_classes_sets_the_models_own_head(name):
    assert build(name, num_classes=7).eval().pretrained_logits(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_the_random_weights_follow_torchs_seed():
    torch.manual_seed(3)
    first = build("cifar_resnet20")
    torch.manual_seed(3)
    second = build("cifar_resnet20")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_depths():
    backbone = build("resnet18")
    assert resolve_depth("all", backbone) == 6
    assert resolve_depth(0, backbone) == 0
    assert resolve_depth(6, backbone) == 6
    for wrong in (7, 9, -1, "some"):
        with pytest.raises(ConfigError) as caught:
            resolve_depth(wrong, backbone)
        assert str(caught.value) == f'freeze_depth={wrong}: resnet18 has 6 layer groups; use 0..6 or "all"'


def test_freezing_less_unfreezes():
    backbone = build("cifar_resnet20")
    backbone.freeze(5)
    backbone.freeze(1)
    backbone.train()
    assert backbone.freeze_depth == 1
    assert not backbone.model.bn1.training
    assert backbone.model.layer1[0].bn1.training
    assert all(p.requires_grad for _, p in backbone.group_parameters(1))


def test_a_frozen_prefix_keeps_no_graph():
    backbone = build("conv4")
    backbone.freeze(2)
    images = torch.rand(2, 3, 28, 28)
    assert not backbone.run_groups(images, 0, 2).requires_grad
    assert backbone.run_groups(images, 0, 3).requires_grad


def test_a_tap_continues_where_the_groups_stopped():
    backbone = build("resnet18").eval()
    images = torch.rand(2, 3, 32, 32)
    tap = backbone.run_groups(images, 0, 3)
    assert torch.equal(backbone.run_groups(tap, 3, 6), backbone(images))


def test_the_models_own_head_does_not_wait_for_gradients():
    backbone = build("resnet18")
    assert not any(p.requires_grad for p in backbone.pretrained_head.parameters())
    backbone(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


def test_gradients_pass_through_functional_call():
    backbone = build("conv4").eval()
    parameters = {key: p.detach() for key, p in backbone.named_parameters()}
    images = torch.rand(2, 3, 28, 28)
    grads = grad(lambda given: functional_call(backbone, given, (images,)).sum())(parameters)
    assert grads["model.block1.conv.weight"].abs().sum() > 0


def test_a_vit_says_which_images_it_takes():
    backbone = build("vit_b_32", image_size=64)
    with pytest.raises(ConfigError, match=r"^data.image_size=32: this ViT has positions for 64x64 images; use "):
        backbone(torch.rand(1, 3, 32, 32))
    with pytest.raises(ConfigError, match=r"^data.image_size=100: vit_b_32"):
        build("vit_b_32", image_size=100)


def test_preprocessing():
    assert preprocessing_of("cifar_resnet20") == Preprocessing(32)
    assert preprocessing_of("conv4", "some/file.pth").mean == IMAGENET_MEAN
    assert preprocessing_of("vit_b_16", "IMAGENET1K_SWAG_E2E_V1").image_size == 384
    assert preprocessing_of("resnet18", "DEFAULT") == Preprocessing(224)


def test_timm_knows_its_own_statistics():
    pytest.importorskip("timm")
    assert preprocessing_of("timm/vit_tiny_patch16_224") == Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
