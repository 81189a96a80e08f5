"""Base models of a known duration, and an executor that adds up what tasks take; where workers can import them."""

import time
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model import LogisticRegression, RidgeCV

from graftstack.runtime import Call, CallDone, CallEnd, Executor


class Sleeper(RegressorMixin, BaseEstimator):
    """Learns the mean, and takes its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803 - scikit-learn's contract
        time.sleep(self.seconds)
        self.mean_ = float(np.mean(y))
        return self

    def predict(self, X: Any) -> Any:  # noqa: N803
        return np.full(len(X), self.mean_)


class RememberingLogistic(LogisticRegression):
    """A final estimator that keeps what it was fed: the out-of-fold predictions."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803
        self.fed_ = np.array(X)
        return super().fit(X, y, sample_weight)


class RememberingRidge(RidgeCV):
    """The same for regressions."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803
        self.fed_ = np.array(X)
        return super().fit(X, y, sample_weight)


class Recorder:
    """Passes everything on to an executor, and keeps how long each task fitted and predicted."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.seconds: list[float] = []

    @property
    def num_slots(self) -> int:
        return self._executor.num_slots

    def share(self, value: Any) -> Any:
        return self._executor.share(value)

    def submit(self, call: Call) -> None:
        self._executor.submit(call)

    def wait(self, timeout_s: float) -> list[CallEnd]:
        ends = self._executor.wait(timeout_s)
        results = [end.value.result for end in ends if isinstance(end, CallDone)]
        self.seconds += [result.fit_s + getattr(result, "predict_s", 0.0) for result in results]
        return ends

    def cancel(self, key: str) -> None:
        self._executor.cancel(key)

    def expect(self, seconds: float) -> None:
        self._executor.expect(seconds)

    def close(self) -> None:
        self._executor.close()

    def best_possible(self, num_slots: int) -> float:
        """Returns the seconds below which no order of the tasks can come."""
        return max(sum(self.seconds) / num_slots, *self.seconds)
