"""Asynchronous successive halving: algorithm 2 of Li et al. 2020.

"A system for massively parallel hyperparameter tuning", MLSys.

Trials stop at rungs: after `grace_epochs` epochs, and that times powers of `reduction_factor`. Of those that have
reached a rung, one in `reduction_factor` is promoted and trains on to the next, from the highest rung where one can be.
The paper promotes before it begins new trials, of which it has no end; here those that wait begin first, so that none
trains on for want of others to be compared with.
"""

import math
from collections.abc import Collection, Mapping

from graftstack.sweep.trials import Row

_Value = tuple[float, float]
"""Accuracy and minus the loss: the larger, the better."""


class Asha:
    """The scheduler of scheduler=asha.

    Trials that train fused pass all rungs, since to stop them would spare next to nothing. Others have to be better to
    be promoted, but how many are doesn't grow by their number.
    """

    def __init__(self, *, grace_epochs: int, reduction_factor: float, most_epochs: int) -> None:
        self._factor = reduction_factor
        self._rungs = _rungs(grace_epochs, reduction_factor, most_epochs)
        self._reached: list[dict[int, _Value]] = [{} for _ in self._rungs]
        self._promoted: list[set[int]] = [set() for _ in self._rungs]
        self._fused: set[int] = set()

    def keep(self, rows: Mapping[int, Row], *, is_fused: bool) -> list[int]:
        """Returns the trials that aren't at a rung, are fused with others, or were promoted from that rung before."""
        self._fused |= set(rows) if is_fused else set()
        going_on = []
        for index, row in rows.items():
            number = self._rungs.index(int(row["epoch"])) if row["epoch"] in self._rungs else None
            if number is not None:
                self._reached[number][index] = (row["accuracy"], -row["loss"])
            if number is None or is_fused or index in self._promoted[number]:
                going_on.append(index)
        return going_on

    def promote(self, stopped: Collection[int], *, is_last_chance: bool) -> int | None:
        """Returns one of the `stopped` trials that is to train on, or None.

        Args:
            stopped: Trials that were stopped, at a rung or otherwise.
            is_last_chance: Nothing else trains or can begin: then the best of a rung goes on even where there are
                fewer than `reduction_factor` trials.
        """
        for number in reversed(range(len(self._rungs))):
            reached, promoted = self._reached[number], self._promoted[number]
            num = max(int(len(reached.keys() - self._fused) / self._factor), int(is_last_chance and bool(reached)))
            best = sorted(reached, key=lambda index: (self._reached[number][index], -index), reverse=True)[:num]
            above = self._reached[number + 1] if number + 1 < len(self._rungs) else {}
            for index in best:
                if index in stopped and index not in above and index not in promoted:
                    promoted.add(index)
                    return index
        return None


def _rungs(grace_epochs: int, factor: float, most_epochs: int) -> list[int]:
    """Returns the epochs at which trials stop, ascending, all before the last epoch."""
    if grace_epochs >= most_epochs:
        return []
    num = 1 + math.floor(math.log((most_epochs - 1) / grace_epochs, factor) + 1e-9)
    rungs = [round(grace_epochs * factor**power) for power in range(num)]
    return sorted({rung for rung in rungs if rung < most_epochs})
