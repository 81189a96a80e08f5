"""Counting what frozen layer groups compute: the work that taps are there to spare."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from graftstack.backbones.backbone import Backbone


class ForwardCount:
    """How many images have gone through the frozen part of a backbone."""

    num_images = 0


@contextmanager
def counting_forwards(backbone: Backbone, *, freeze_depth: int) -> Iterator[ForwardCount]:
    """Counts, at the first layer group itself, the images whose frozen part is computed during the block.

    Args:
        backbone: Whose first layer group is watched.
        freeze_depth: How many groups stay frozen throughout; of 0, there is no frozen part, and nothing counts.
    """
    count = ForwardCount()

    def see(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if freeze_depth > 0:
            count.num_images += len(arguments[0])

    handle = backbone.groups[0].module.register_forward_pre_hook(see)
    try:
        yield count
    finally:
        handle.remove()
