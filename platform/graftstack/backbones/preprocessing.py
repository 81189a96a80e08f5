"""The images that a backbone expects: size, mean and standard deviation."""

from typing import Final, NamedTuple

from graftstack.backbones.catalog import default_image_size, is_timm

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


class Preprocessing(NamedTuple):
    """Images are resized to `image_size`, scaled to 0..1, and per channel (RGB) ``(x - mean) / std``."""

    image_size: int
    """Height and width in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def preprocessing_of(name: str, spec: str = "none") -> Preprocessing:
    """What backbone `name` with the weights `spec` expects; downloads nothing.

    Published weights say it themselves; for a file, or none, it is the name's image size with ImageNet statistics.
    Raises `ConfigError` for an unknown name, `WeightsError` for published weights that don't exist.
    """
    from graftstack.backbones import published

    if is_timm(name):
        from graftstack.backbones.families.timm_models import pretrained_config

        config = pretrained_config(name)
        return Preprocessing(config.input_size[-1], _rgb(config.mean), _rgb(config.std))
    if not published.is_published(spec):
        return Preprocessing(default_image_size(name))
    transforms = published.torchvision_entry(name, spec).transforms()
    return Preprocessing(transforms.crop_size[0], _rgb(transforms.mean), _rgb(transforms.std))


def _rgb(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
