"""The CIFAR ResNets of He et al. 2015, section 4.2: 6n + 2 layers, 16-32-64 channels, option-A shortcuts.

Layer names are those of the widely used weights `cifar10_resnet20-12fca82f.th` and its siblings.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from graftstack.backbones.anatomy import Anatomy, chain


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: x[N, C_in, H, W] -> x[N, C, H / stride, W / stride].

    Option A: where the map shrinks, the shortcut takes each second pixel and pads the new channels with zeros, half
    of them on either side.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """x[N, C_in, H, W] -> x[N, C, H / stride, W / stride]."""
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + shortcut)


class CifarResNet(nn.Module):
    """images[N, 3, 32, 32] -> logits[N, num_classes]; `num_blocks` is n, the blocks of a stage."""

    def __init__(self, num_blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, num_blocks, stride=1)
        self.layer2 = _stage(16, 32, num_blocks, stride=2)
        self.layer3 = _stage(32, 64, num_blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """images[N, 3, H, W] -> logits[N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def make(name: str, num_classes: int | None = None) -> CifarResNet:
    """`cifar_resnet20` .. `cifar_resnet110`, randomly initialised, with 10 classes unless said otherwise."""
    num_layers = int(name.removeprefix("cifar_resnet"))
    return CifarResNet((num_layers - 2) // 6, 10 if num_classes is None else num_classes)


def split(model: CifarResNet) -> Anatomy:
    """Groups: stem | layer1 | layer2 | layer3 | pool."""
    groups = (
        chain("stem", model.conv1, model.bn1, nn.ReLU()),
        chain("layer1", model.layer1),
        chain("layer2", model.layer2),
        chain("layer3", model.layer3),
        chain("pool", nn.AdaptiveAvgPool2d(1), nn.Flatten(1)),
    )
    return Anatomy(groups, head=model.linear, head_names=("linear",), feature_dim=model.linear.in_features)


def _stage(in_channels: int, channels: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)))
