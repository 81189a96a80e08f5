"""The learning rate at a step is a share of its peak, and depends on the step alone."""

from itertools import pairwise

import pytest
import torch

from graftstack.config.schema import ScheduleConfig, ScheduleName
from graftstack.finetune.schedules import lr_factor

FRACTIONS = [0.0, 0.05, 0.3, 0.99]
NUM_STEPS = [1, 2, 3, 10, 1000]


def curve(name: ScheduleName, num_steps: int, warmup_fraction: float) -> list[float]:
    schedule = ScheduleConfig(name=name, warmup_fraction=warmup_fraction)
    return [lr_factor(schedule, step=step, num_steps=num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("name", ScheduleName)
@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("warmup_fraction", FRACTIONS)
def test_every_step_learns_and_none_beyond_the_peak(name: ScheduleName, num_steps: int, warmup_fraction: float) -> None:
    assert all(0 < factor <= 1 for factor in curve(name, num_steps, warmup_fraction))


@pytest.mark.parametrize("name", ScheduleName)
@pytest.mark.parametrize("warmup_fraction", FRACTIONS)
def test_the_rate_rises_to_the_peak_and_never_again(name: ScheduleName, warmup_fraction: float) -> None:
    factors = curve(name, 1000, warmup_fraction)
    num_warmup = round(1000 * warmup_fraction)
    assert factors[num_warmup] == 1
    assert all(before < after for before, after in pairwise(factors[: num_warmup + 1]))
    assert all(before >= after for before, after in pairwise(factors[num_warmup:]))


def test_a_linear_warmup_takes_equal_steps_from_0() -> None:
    factors = curve(ScheduleName.constant, 20, 0.2)
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 16])


def test_a_constant_schedule_stays_at_the_peak() -> None:
    assert curve(ScheduleName.constant, 7, 0.0) == [1.0] * 7


def test_a_cosine_is_halfway_in_the_middle_and_near_0_at_the_end() -> None:
    factors = curve(ScheduleName.cosine, 1000, 0.0)
    assert factors[0] == 1
    assert factors[500] == pytest.approx(0.5)
    assert factors[-1] < 1e-5
    assert curve(ScheduleName.cosine, 1000, 0.05)[-1] < 1e-5


def test_a_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for factor in curve(ScheduleName.cosine, 50, 0.0):
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        peer.step()


@pytest.mark.parametrize("num_steps", [10, 100, 317])
@pytest.mark.parametrize("warmup_fraction", [0.1, 0.3, 0.5])
def test_one_cycle_is_torchs_that_reaches_its_end_with_the_training(num_steps: int, warmup_fraction: float) -> None:
    """torch counts the peak and the end as steps; here they are the moments at which a share of the steps is over."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=num_steps + 1,
        pct_start=(round(warmup_fraction * num_steps) + 1) / (num_steps + 1),
        cycle_momentum=False,
    )
    for factor in curve(ScheduleName.one_cycle, num_steps, warmup_fraction):
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        peer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 25 / 1e4)


@pytest.mark.parametrize("name", ScheduleName)
def test_a_factor_depends_on_its_step_alone(name: ScheduleName) -> None:
    schedule = ScheduleConfig(name=name, warmup_fraction=0.3)
    backwards = [lr_factor(schedule, step=step, num_steps=40) for step in reversed(range(40))]
    assert backwards[::-1] == curve(name, 40, 0.3)
