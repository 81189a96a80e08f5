"""How many threads and processes of its own an estimator may start: no more than its call has slots."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from joblib import effective_n_jobs

from graftstack.runtime import THREADS


@contextmanager
def limited_jobs(estimator: Any) -> Iterator[None]:
    """Limits every `n_jobs` of an estimator and of its parts to the threads of the call, for the block.

    What was fitted says afterwards what it said before. A limit on BLAS and OpenMP isn't enough: LightGBM asks for
    threads itself, and joblib starts pools.
    """
    limit = THREADS.get()
    before = [] if limit is None else [(part, part.n_jobs) for part in _parts(estimator) if _exceeds(part, limit)]
    for part, _ in before:
        part.set_params(n_jobs=limit)
    try:
        yield
    finally:
        for part, n_jobs in before:
            part.set_params(n_jobs=n_jobs)


def num_threads_of(estimator: Any) -> int:
    """Returns how many threads an estimator asks for, itself or in its parts, by `n_jobs`."""
    params = estimator.get_params(deep=True)
    asked = [value for key, value in params.items() if key.rpartition("__")[2] == "n_jobs" and value is not None]
    return max((effective_n_jobs(num) for num in asked), default=1)


def _parts(estimator: Any) -> list[Any]:
    """Returns the estimator, and those among its parameters, that have a parameter `n_jobs`."""
    if not hasattr(estimator, "get_params"):
        return []
    params = estimator.get_params(deep=True)
    held = {"": estimator} | {f"{name}__": value for name, value in params.items()}
    return [value for prefix, value in held.items() if f"{prefix}n_jobs" in params and hasattr(value, "set_params")]


def _exceeds(part: Any, limit: int) -> bool:
    if part.n_jobs is None:  # one to scikit-learn, and all cores to LightGBM
        return type(part).__module__.startswith("lightgbm.")
    return bool(part.n_jobs < 0 or part.n_jobs > limit)
