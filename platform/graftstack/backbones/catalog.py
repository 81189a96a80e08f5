"""The names that `backbone=NAME` takes, known without loading torch."""

from typing import Final

from graftstack.errors import ConfigError, did_you_mean

TIMM_PREFIX: Final = "timm/"

_NAMES: Final = {
    "resnet": "resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d "
    "wide_resnet50_2 wide_resnet101_2",
    "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3": "mobilenet_v3_small mobilenet_v3_large",
    "efficientnet": "efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 "
    "efficientnet_b6 efficientnet_b7 efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l",
    "convnext": "convnext_tiny convnext_small convnext_base convnext_large",
    "vit": "vit_b_16 vit_b_32 vit_l_16 vit_l_32 vit_h_14",
    "swin": "swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b",
    "densenet": "densenet121 densenet161 densenet169 densenet201",
    "regnet": "regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf "
    "regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf "
    "regnet_y_128gf",
    "squeezenet": "squeezenet1_0 squeezenet1_1",
    "vgg": "vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn",
    "shufflenet_v2": "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0",
    "mnasnet": "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3",
    "cifar_resnet": "cifar_resnet20 cifar_resnet32 cifar_resnet44 cifar_resnet56 cifar_resnet110",
    "conv4": "conv4",
}

CATALOG: Final[dict[str, str]] = {name: family for family, names in _NAMES.items() for name in names.split()}
"""Every name -> its family; names that start with `timm/` come on top."""

_IMAGE_SIZES: Final = {"cifar_resnet": 32, "conv4": 28}
_IMAGENET_IMAGE_SIZE: Final = 224


def require_known(name: str) -> None:
    """Raises `ConfigError` unless `name` is in the catalog or starts with `timm/`, which is looked up when built."""
    if name not in CATALOG and not is_timm(name):
        raise ConfigError(f"backbone={name}: unknown; {did_you_mean(name, CATALOG)}")


def is_timm(name: str) -> bool:
    """Whether `name` is `timm/NAME`."""
    return name.startswith(TIMM_PREFIX)


def family_of(name: str) -> str:
    """The family of `name`; raises `ConfigError` for an unknown one."""
    require_known(name)
    return "timm" if is_timm(name) else CATALOG[name]


def default_image_size(name: str) -> int:
    """Height and width in pixels that backbone `name` is made for.

    For `timm/NAME` this asks timm, and so loads torch. Raises `ConfigError` for an unknown name.
    """
    family = family_of(name)
    if family == "timm":
        from graftstack.backbones.families.timm_models import pretrained_config

        return int(pretrained_config(name).input_size[-1])
    return _IMAGE_SIZES.get(family, _IMAGENET_IMAGE_SIZE)
