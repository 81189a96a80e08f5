"""Counting what frozen layer groups compute: the work that taps are there to spare."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from graftstack.backbones.backbone import Backbone


class ForwardCount:
    """How many images have gone through a backbone's first layer group while it was frozen."""

    num_images = 0


@contextmanager
def counting_forwards(backbone: Backbone) -> Iterator[ForwardCount]:
    """Counts, at the first layer group itself, the images whose frozen part is computed during the block."""
    count = ForwardCount()

    def see(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if backbone.freeze_depth > 0:
            count.num_images += len(arguments[0])

    handle = backbone.groups[0].module.register_forward_pre_hook(see)
    try:
        yield count
    finally:
        handle.remove()
