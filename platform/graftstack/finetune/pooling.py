"""One vector for each item, of whatever shape a layer group's output is."""

from torch import Tensor


def averaged(x: Tensor) -> Tensor:
    """Returns maps and tokens averaged over their places, and vectors as they are: fp32, [N, D].

    Maps are [N, C, H, W], or channels-last, as Swin has them, which are known by their first two extents being the
    equal ones; tokens are [N, T, D].
    """
    x = x.float()
    if x.ndim == 4:
        is_channels_last = x.shape[1] == x.shape[2] != x.shape[3]
        return x.mean(dim=(1, 2) if is_channels_last else (2, 3))
    return x.mean(dim=1) if x.ndim == 3 else x
