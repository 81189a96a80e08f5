"""Which trials there are when none learns from another: every combination of a grid, or samples of the space."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from graftstack.config.space import Choice, Domain, parse_space, trial_config
from graftstack.config.sweep import SearchName, SweepConfig
from graftstack.seeding import derive_seed
from graftstack.sweep.trials import Trial, TrialResult


class ListSearch:
    """The trials of search=grid and search=random: all known beforehand, and none depends on a result."""

    def __init__(self, config: SweepConfig) -> None:
        self._trials = list_trials(config)
        self._num_given = 0

    def next(self) -> Trial | None:
        """Returns the next trial in order, or None after the last."""
        if self.is_exhausted:
            return None
        self._num_given += 1
        return self._trials[self._num_given - 1]

    def tell(self, result: TrialResult) -> None:
        """Results change nothing."""

    @property
    def is_exhausted(self) -> bool:
        """Whether all trials were given."""
        return self._num_given == len(self._trials)


def list_trials(config: SweepConfig) -> list[Trial]:
    """Returns all trials of a sweep with search=grid or search=random, in order.

    Raises:
        ConfigError: values that no trial may have together.
    """
    space = parse_space(config.space)
    if config.search is SearchName.grid:
        params = grid_params(space)
    else:
        assert config.search is SearchName.random, config.search
        params = [sample_params(space, seed=config.seed, index=index) for index in range(config.num_samples)]
    return [Trial(index, values, trial_config(config, values)) for index, values in enumerate(params)]


def grid_params(space: Mapping[str, Domain]) -> list[dict[str, Any]]:
    """Returns every combination of the values of `space`, which holds no range; the first key varies slowest."""
    values = [_values(domain) for domain in space.values()]
    return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*values)]


def sample_params(space: Mapping[str, Domain], *, seed: int, index: int) -> dict[str, Any]:
    """Returns random values for the trial at `index`: of a list each as likely, of a range as `Range` says.

    The values of a key depend on `seed`, `index` and its name alone, so that more trials or another key leave them be.
    """
    return {name: _sampled(domain, derive_seed(seed, "trial", index, name)) for name, domain in space.items()}


def _values(domain: Domain) -> tuple[Any, ...]:
    assert isinstance(domain, Choice), domain
    return domain.values


def _sampled(domain: Domain, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    if isinstance(domain, Choice):
        return domain.values[rng.integers(len(domain.values))]
    if domain.integer:
        return int(rng.integers(int(domain.low), int(domain.high), endpoint=True))
    if not domain.log:
        return float(rng.uniform(domain.low, domain.high))
    value = math.exp(rng.uniform(math.log(domain.low), math.log(domain.high)))
    return min(max(value, domain.low), domain.high)  # exp of log may miss an end by its last bit
