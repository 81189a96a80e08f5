"""The four-block embedding of few-shot learning (Vinyals et al. 2016, section 4.1; Snell et al. 2017, section 3.1)."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from graftstack.backbones.anatomy import Anatomy, chain

NUM_CHANNELS = 64


class HalvingPool(nn.Module):
    """2x2 max-pool that leaves a side of one pixel alone, so that images under 16x16 pass four of them.

    8x8 images become maps of 4, 2, 1 and 1 pixels; from 16x16 on it is the papers' pool, which drops an odd last row.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x[N, C, H, W] -> x[N, C, max(H // 2, 1), max(W // 2, 1)]."""
        height, width = x.shape[-2:]
        return F.max_pool2d(x, (min(height, 2), min(width, 2)))


class Conv4(nn.Module):
    """images[N, 3, H, W] -> logits[N, num_classes], through 64 features.

    For 28x28 images the last map is one pixel, and the features are its 64 channels, as in the papers. For larger
    images the features are the mean over the map, where Snell et al. flatten it (84x84: 1600 features).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.block1 = _block(3)
        self.block2 = _block(NUM_CHANNELS)
        self.block3 = _block(NUM_CHANNELS)
        self.block4 = _block(NUM_CHANNELS)
        self.linear = nn.Linear(NUM_CHANNELS, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images[N, 3, H, W] -> logits[N, num_classes]."""
        x = self.block4(self.block3(self.block2(self.block1(images))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def make(_name: str, num_classes: int | None = None) -> Conv4:
    """`conv4`, randomly initialised, with a head for 5 classes (the usual 5-way task) unless said otherwise."""
    return Conv4(5 if num_classes is None else num_classes)


def split(model: Conv4) -> Anatomy:
    """Groups: block1 | block2 | block3 | block4 | pool."""
    groups = (
        chain("block1", model.block1),
        chain("block2", model.block2),
        chain("block3", model.block3),
        chain("block4", model.block4),
        chain("pool", nn.AdaptiveAvgPool2d(1), nn.Flatten(1)),
    )
    return Anatomy(groups, head=model.linear, head_names=("linear",), feature_dim=NUM_CHANNELS)


def _block(in_channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, NUM_CHANNELS, 3, padding=1),
            norm=nn.BatchNorm2d(NUM_CHANNELS),
            relu=nn.ReLU(inplace=True),
            pool=HalvingPool(),
        )
    )
