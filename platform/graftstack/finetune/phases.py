"""Recipes: which layer groups are frozen at which step, as a pure function of the step.

A resumed run asks the same question of the same step and so is exactly the unbroken one.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from graftstack.config.schema import RecipeConfig, RecipeName


class Phase(NamedTuple):
    """The steps ``start <= step < stop``, in which the first `freeze_depth` layer groups are frozen.

    `schedule_start` and `schedule_stop` bound the steps over which the learning rate runs through its schedule once.
    """

    start: int
    stop: int
    freeze_depth: int
    schedule_start: int
    schedule_stop: int


def plain(num_steps: int, depths: Sequence[int], _recipe: RecipeConfig) -> list[Phase]:
    """Everything above the freeze depth trains from the first step."""
    return [Phase(0, num_steps, depths[-1], 0, num_steps)]


def lp_ft(num_steps: int, depths: Sequence[int], recipe: RecipeConfig) -> list[Phase]:
    """The head first, then all, each with a schedule of its own.

    Kumar et al. 2022, "Fine-tuning can distort pretrained features", section 4.2: a head that fits already keeps the
    first fine-tuning steps from tearing the features apart.
    """
    head_steps = round(recipe.head_fraction * num_steps)
    return [
        Phase(0, head_steps, depths[0], 0, head_steps),
        Phase(head_steps, num_steps, depths[-1], head_steps, num_steps),
    ]


def gradual_unfreeze(num_steps: int, depths: Sequence[int], _recipe: RecipeConfig) -> list[Phase]:
    """One layer group more at a time, from the head down, in equal shares of the steps.

    Howard and Ruder 2018, "Universal language model fine-tuning for text classification", section 3.3.
    """
    bounds = [num_steps * index // len(depths) for index in range(len(depths) + 1)]
    return [
        Phase(start, stop, depth, 0, num_steps) for (start, stop), depth in zip(pairwise(bounds), depths, strict=True)
    ]


RECIPES: dict[RecipeName, Callable[[int, Sequence[int], RecipeConfig], list[Phase]]] = {
    RecipeName.plain: plain,
    RecipeName.lp_ft: lp_ft,
    RecipeName.gradual_unfreeze: gradual_unfreeze,
}


def phases(recipe: RecipeConfig, *, num_steps: int, depths: Sequence[int]) -> tuple[Phase, ...]:
    """Returns the phases that cover all steps, without empty ones.

    Args:
        recipe: the recipe and its numbers.
        num_steps: optimiser steps of the whole training.
        depths: the freeze depths that differ in what trains, from the deepest (only the head) to the wanted one.
    """
    found = RECIPES[recipe.name](num_steps, depths, recipe)
    return tuple(phase for phase in found if phase.stop > phase.start)
