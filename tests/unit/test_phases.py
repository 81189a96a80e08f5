"""A recipe says of every step which layer groups are frozen, and never thaws more than was asked for."""

from itertools import pairwise

import pytest

from graftstack.config.schema import RecipeConfig, RecipeName
from graftstack.finetune.phases import Phase, phases

NUM_STEPS = [0, 1, 2, 3, 7, 10, 99, 1000]
DEPTHS = [[6], [6, 6], [6, 0], [6, 3], [6, 5, 4, 3], [6, 5, 4, 3, 2, 1, 0], [50, *range(48, 9, -1)]]


def plan(name: RecipeName, num_steps: int, depths: list[int], *, head_fraction: float = 0.3) -> tuple[Phase, ...]:
    return phases(RecipeConfig(name=name, head_fraction=head_fraction), num_steps=num_steps, depths=depths)


@pytest.mark.parametrize("name", RecipeName)
@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("depths", DEPTHS, ids=str)
def test_every_step_is_in_one_phase(name: RecipeName, num_steps: int, depths: list[int]) -> None:
    for head_fraction in (0.0, 0.3, 0.99):
        found = plan(name, num_steps, depths, head_fraction=head_fraction)
        assert [step for phase in found for step in range(phase.start, phase.stop)] == list(range(num_steps))
        assert all(phase.start < phase.stop for phase in found)
        assert {phase.freeze_depth for phase in found} <= set(depths)
        assert all(before.freeze_depth >= after.freeze_depth for before, after in pairwise(found))


@pytest.mark.parametrize("name", RecipeName)
@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("depths", DEPTHS, ids=str)
def test_each_schedule_runs_through_its_steps_once(name: RecipeName, num_steps: int, depths: list[int]) -> None:
    found = plan(name, num_steps, depths)
    schedules = list(dict.fromkeys((phase.schedule_start, phase.schedule_stop) for phase in found))
    assert [step for start, stop in schedules for step in range(start, stop)] == list(range(num_steps))
    assert all(phase.schedule_start <= phase.start and phase.stop <= phase.schedule_stop for phase in found)


def test_plain_trains_everything_from_the_first_step() -> None:
    assert plan(RecipeName.plain, 10, [6, 5, 4]) == (Phase(0, 10, 4, 0, 10),)


def test_lp_ft_trains_the_head_alone_and_then_everything_each_with_its_schedule() -> None:
    assert plan(RecipeName.lp_ft, 10, [6, 5, 4]) == (Phase(0, 3, 6, 0, 3), Phase(3, 10, 4, 3, 10))
    assert plan(RecipeName.lp_ft, 10, [6, 4], head_fraction=0.0) == (Phase(0, 10, 4, 0, 10),)


def test_gradual_unfreeze_thaws_one_group_at_a_time_in_equal_shares() -> None:
    depths = [6, 5, 4, 2]
    found = plan(RecipeName.gradual_unfreeze, 102, depths)
    assert [phase.freeze_depth for phase in found] == depths
    assert {phase.stop - phase.start for phase in found} <= {25, 26}


def test_gradual_unfreeze_of_fewer_steps_than_groups_still_ends_at_the_wanted_depth() -> None:
    found = plan(RecipeName.gradual_unfreeze, 2, [6, 5, 4, 3])
    assert [phase.freeze_depth for phase in found][-1] == 3
    assert len(found) == 2
