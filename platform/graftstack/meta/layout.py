"""Tensors of several names as one flat vector, which is what travels between processes."""

from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftstack.meta.network import Params


class Layout:
    """Where each tensor lies in the vector: in the order of their names in `like`."""

    def __init__(self, like: Params) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in like.items()}
        self._sizes = [prod(shape) for shape in self._shapes.values()]

    def flat(self, tensors: Params) -> npt.NDArray[np.float32]:
        """Returns a copy of the tensors as one vector, fp32 [P]."""
        if not self._shapes:
            return np.empty(0, np.float32)
        return torch.cat([tensors[name].detach().reshape(-1).float() for name in self._shapes]).cpu().numpy()

    def tensors(self, vector: Tensor) -> Params:
        """Returns the tensors of a vector [P], which they share the memory of."""
        pieces = vector.split(self._sizes)
        return {name: piece.view(shape) for piece, (name, shape) in zip(pieces, self._shapes.items(), strict=True)}
