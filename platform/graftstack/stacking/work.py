"""Base models, what they learn from, and what comes of each of their tasks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from graftstack.data.splits import Rows


class RowSource(ABC):
    """Data of our own that a base learns from, e.g. images: indexed by `take`, and known by its `fingerprint`."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Says what the rows hold: equal for equal rows."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, rows: Rows) -> Any:
        """Returns the rows at these positions, in their order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """A model that a stack cross-fits."""

    name: str
    """Unlike that of every other base of the stack."""
    estimator: Any
    """Unfitted, of scikit-learn's contract; clones of it are fitted."""
    method: str
    """What is asked of it: predict_proba, decision_function or predict."""
    view: str = "X"
    """Which view of the data it learns from; above the first level it counts for nothing: there is one for all."""
    fit_params: Mapping[str, Any] = field(default_factory=dict)
    """What `fit` gets beside X and y; values that have a row for each row of X are split with it."""
    num_threads: int = 1
    refitted: Any = None
    """A model that has learnt from all rows already, if there is one: then none is refitted."""


class FoldResult(NamedTuple):
    """What a base makes of one fold."""

    predictions: Any
    """What `method` returned for the fold's test rows: an array [T, ...], or a list of them (multilabel)."""
    fit_s: float
    predict_s: float
    model: Any
    """The fitted estimator where fold models are kept (mode="bag"), else None."""


class RefitResult(NamedTuple):
    """A base that has learnt from all rows."""

    model: Any
    fit_s: float


@dataclass(frozen=True, eq=False)
class CrossFitted:
    """A base and what it made of all folds."""

    base: BaseModel
    folds: tuple[FoldResult, ...]
    """In the order of the level's folds."""
    model: Any
    """The refitted model, or a `FoldBag` in mode="bag"."""
    fit_s: float
    """Median over folds."""
    predict_s: float
    """Median over folds."""
