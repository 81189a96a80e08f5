"""What an average is made of, and how much an average loses."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

_SMALLEST = 1e-12
"""Probabilities below count as this, lest one row decide by itself."""


class Candidates(NamedTuple):
    """What B candidates say of N rows."""

    values: Numbers
    """``[N, B]``: predicted targets, or probabilities of the row's own class: the log loss needs no others."""
    y: Numbers | None
    """``[N]``: the targets of a regression; None: `values` are probabilities."""

    @property
    def num(self) -> int:
        """How many candidates there are."""
        return int(self.values.shape[1])

    def loss(self, average: Numbers) -> float:
        """Returns the mean loss of an average ``[N]``: log loss, or squared error."""
        if self.y is None:
            return float(-np.log(np.maximum(average, _SMALLEST)).mean())
        return float(np.square(average - self.y).mean())

    def slope(self, average: Numbers) -> Numbers:
        """Returns how the loss moves with each row's average, ``[N]``."""
        if self.y is None:
            return -1 / (np.maximum(average, _SMALLEST) * len(average))
        return 2 * (average - self.y) / len(average)
