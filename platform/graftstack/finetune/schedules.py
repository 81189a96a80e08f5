"""Learning-rate schedules: the share of the peak learning rate at a step, in (0, 1]."""

import math
from collections.abc import Callable

from graftstack.config.schema import ScheduleConfig, ScheduleName

# torch's OneCycleLR: begin at 1/25 of the peak, end at 1/10,000 of the beginning (Smith and Topin 2018).
_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = _ONE_CYCLE_START / 1e4


def constant(_progress: float) -> float:
    """The peak, throughout."""
    return 1.0


def cosine(progress: float) -> float:
    """Half a cosine from the peak to 0 (Loshchilov and Hutter 2017, SGDR, equation 5, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


AFTER_WARMUP: dict[ScheduleName, Callable[[float], float]] = {
    ScheduleName.constant: constant,
    ScheduleName.cosine: cosine,
    ScheduleName.one_cycle: lambda progress: _ONE_CYCLE_END + (1 - _ONE_CYCLE_END) * cosine(progress),
}


def lr_factor(schedule: ScheduleConfig, *, step: int, num_steps: int) -> float:
    """Returns the factor of the peak learning rate at `step` of `num_steps`; warm-up first, then the named curve."""
    warmup_steps = round(schedule.warmup_fraction * num_steps)
    if step < warmup_steps:
        if schedule.name is ScheduleName.one_cycle:
            return _ONE_CYCLE_START + (1 - _ONE_CYCLE_START) * (1 - cosine(step / warmup_steps))
        return (step + 1) / (warmup_steps + 1)
    return AFTER_WARMUP[schedule.name]((step - warmup_steps) / max(1, num_steps - warmup_steps))
