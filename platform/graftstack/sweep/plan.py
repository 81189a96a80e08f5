"""How a sweep will run: which taps are made, which trials share them and train together, and what it will take."""

from dataclasses import dataclass
from typing import NamedTuple

from graftstack.sweep.trials import Trial
from graftstack.taps.key import TapSpec


@dataclass(frozen=True, kw_only=True)
class DepthPlan:
    """The trials of one trunk that freeze equally many groups."""

    trunk: str
    """What of the space decides over backbone and data, e.g. the backbone's name."""
    freeze_depth: int
    boundary: int
    """Where they begin: at the output of so many groups, less than `freeze_depth` if the head takes what comes before
    the last ones; 0: at the images."""
    num_trials: int
    num_units: int
    """Trials that train together are one unit."""
    action: str
    """tap (made and read), stored (there already, or made for others, and read), recompute (the frozen part, each
    time), images."""
    reason: str
    tap_bytes: int
    seconds: float
    """Of all its trials, one after another, with what this process has of the machine."""
    uncached_s: float
    """The same without any sharing."""
    why_not_fused: str | None
    """Of trials of which only the head trains, if they train one by one all the same."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A validated sweep in numbers."""

    num_trials: int
    num_images: int
    """Distinct samples, cached views included, that the frozen parts have to see once."""
    depths: tuple[DepthPlan, ...]
    tap_bytes: int
    """To be written."""
    pass_s: float
    """Making the taps."""
    trials_s: float
    """All trials, one after another."""
    uncached_s: float
    """The whole sweep without any sharing, one trial after another."""
    rates: dict[str, float]
    """What was measured: decode_s, read_s_per_byte, write_s_per_byte."""
    worker_memory_bytes: int | None = None
    """Memory of the machine that each process needs in which trials train, at the most; None: nobody has asked."""
    device_memory_bytes: int | None = None
    """Memory of its GPU; None: it has none."""
    start_s: float = 0.0
    """Starting processes, where trials run in some of their own."""

    @property
    def predicted_s(self) -> float:
        """Seconds of the whole sweep on as many CPUs and GPUs as this process has."""
        return self.start_s + self.pass_s + self.trials_s


class Pass(NamedTuple):
    """Taps of one trunk, which one pass over the data can make."""

    trial: Trial
    """One of those that read them: it says which data and which backbone."""
    label: str
    """What tells it from other passes of the sweep."""
    specs: dict[int, TapSpec]
    """Boundary -> the tap there."""
    start: TapSpec | None = None
    """A tap that may be there, with which the pass can begin instead of the images; it isn't to be made."""
