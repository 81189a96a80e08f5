"""Ray Tune's search, for the loop of a sweep; its own loop, processes and files stay out of it."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from graftstack.config.space import Choice, Domain, Range, parse_space, trial_config
from graftstack.errors import ConfigError
from graftstack.seeding import derive_seed
from graftstack.sweep.trials import Trial, TrialResult

if TYPE_CHECKING:
    from graftstack.config.schema import FinetuneConfig
    from graftstack.config.sweep import SweepConfig

log = logging.getLogger(__name__)

_METRIC = "accuracy"

# How often Optuna is asked, since it may suggest what some other trial has already.
_MAX_ATTEMPTS = 10


class OptunaSearch:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), by Ray Tune: learns from trials that are over.

    A suggestion depends on the sweep's seed, the index of its trial and the results told so far, in any order. No two
    trials are the same; a space with fewer combinations than `num_samples` ends with its last.

    Args:
        config: The sweep; at most `num_samples` trials are given.
        max_open: How many trials may be without a result: the fewer, the more each suggestion has learnt from.

    Raises:
        ConfigError: optuna isn't installed.
    """

    def __init__(self, config: "SweepConfig", *, max_open: int = 1) -> None:
        _check_installed()
        self._config = config
        self._max_open = max_open
        self._domains = parse_space(config.space)
        self._size = _size(self._domains)
        self._num_trials = min(config.num_samples, self._size or config.num_samples)
        self._given: dict[int, Trial] = {}
        self._told: dict[int, TrialResult] = {}

    @property
    def is_exhausted(self) -> bool:
        """Whether there will never be another trial."""
        return self._next_index() is None

    def next(self) -> Trial | None:
        """Returns a new trial, or None: there is none, or none until more results are told."""
        index = self._next_index()
        if index is None or len(self._given.keys() - self._told.keys()) >= self._max_open:
            return None
        taken = [trial.params for trial in self._given.values()] + [result.params for result in self._told.values()]
        for params in self._suggestions(index):
            if params not in taken and (config := self._config_of(params)) is not None:
                self._given[index] = Trial(index, params, config)
                return self._given[index]
        log.warning("search=optuna: found no more values that are new and fit together; it ends after %d trials", index)
        self._num_trials = index
        return None

    def tell(self, result: TrialResult) -> None:
        """Learns from a trial that is over; one that failed or wasn't begun teaches nothing but that it was there."""
        self._told[result.index] = result

    def _next_index(self) -> int | None:
        return next((i for i in range(self._num_trials) if i not in self._given and i not in self._told), None)

    def _config_of(self, params: dict[str, Any]) -> "FinetuneConfig | None":
        """Returns the fine-tuning of `params`; None if the values, each allowed by itself, don't go together."""
        try:
            return trial_config(self._config, params)
        except ConfigError as error:
            log.info("passed over: %s", error)
            return None

    def _suggestions(self, index: int) -> Iterator[dict[str, Any]]:
        """Yields values for a trial: a few that Optuna expects much of, then, of a finite space, whatever there is."""
        search = self._taught(derive_seed(self._config.seed, "trial", index) % 2**32)
        for attempt in range(_MAX_ATTEMPTS):
            suggested = search.suggest(str(attempt))
            yield {name: _decoded(domain, suggested[name]) for name, domain in self._domains.items()}
        if self._size is not None:
            for values in product(*(_values(domain) for domain in self._domains.values())):
                yield dict(zip(self._domains, values, strict=True))

    def _taught(self, seed: int) -> Any:
        """Returns a search that knows all results told: a fresh one, so that its answers depend on nothing else."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch as TuneSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Optuna guesses ten times before it learns; of a search for ten, that would be all.
        num_guesses = max(1, min(10, self._config.num_samples // 3))
        search = TuneSearch(
            space={name: _distribution(domain) for name, domain in self._domains.items()},
            metric=_METRIC,
            mode="max",
            sampler=optuna.samplers.TPESampler(n_startup_trials=num_guesses, seed=seed),
        )
        for _, result in sorted(self._told.items()):
            if result.status in ("done", "stopped") and _METRIC in result.metrics:
                point = {name: _encoded(domain, result.params[name]) for name, domain in self._domains.items()}
                search.add_evaluated_point(point, result.metrics[_METRIC])
        return search


def _check_installed() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "search=optuna: needs the package optuna; pip install graftstack[optuna], or use search=random"
        ) from error


def _distribution(domain: Domain) -> Any:
    """Returns a domain as Optuna knows it: of choices their places, since the values may be lists."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choice):
        return CategoricalDistribution(range(len(domain.values)))
    if domain.integer:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def _encoded(domain: Domain, value: Any) -> Any:
    return domain.values.index(value) if isinstance(domain, Choice) else value


def _decoded(domain: Domain, value: Any) -> Any:
    return domain.values[value] if isinstance(domain, Choice) else value


def _values(domain: Domain) -> Sequence[Any]:
    """Returns the values of a domain that has finitely many."""
    return domain.values if isinstance(domain, Choice) else range(int(domain.low), int(domain.high) + 1)


def _size(domains: Mapping[str, Domain]) -> int | None:
    """Returns the number of combinations; None if there is no end of them."""
    if any(isinstance(domain, Range) and not domain.integer for domain in domains.values()):
        return None
    return prod(len(_values(domain)) for domain in domains.values())
