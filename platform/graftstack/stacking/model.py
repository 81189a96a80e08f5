"""A fitted stack: base models in levels, and the meta-model that weighs what they predict."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graftstack.errors import BadInputError, did_you_mean
from graftstack.stacking.assemble import beside, meta_features
from graftstack.stacking.encoding import TableEncoder
from graftstack.stacking.schema import TableSchema

Values = npt.NDArray[Any]

PASSTHROUGH_VIEW = "passthrough"
"""The view of the base models' own inputs, as numbers, for what stands above them."""


class Member(NamedTuple):
    """A base model that is fitted on all rows, or once a fold."""

    name: str
    model: Any
    method: str
    """What of it is asked: predict_proba, decision_function or predict."""
    view: str
    """What it is fed; above the first level, what follows the predictions that it is fed, if anything does."""


class Passthrough(NamedTuple):
    """The base models' own inputs as numbers."""

    view: str
    """The columns of the table, or pixels."""
    encoder: Any
    """Turns the view into numbers; None: it is numbers."""

    def transform(self, views: Mapping[str, Any]) -> Values:
        """Returns the rows as numbers [N, F]."""
        found = views[self.view]
        return np.asarray(found if self.encoder is None else self.encoder.transform(found))


def passthrough_for(views: Mapping[str, Any], schema: TableSchema | None) -> Passthrough:
    """Returns what makes numbers of rows like those of `views`.

    The scales of columns are those of all training rows, the ones that a fold tests included; labels play no part in
    them, so that folds give nothing away by it.

    Args:
        views: Training rows; of them, only what `passthrough_view` names.
        schema: Of the table, if there is one.
    """
    if schema is None:
        return Passthrough(passthrough_view(schema), None)
    encoder = TableEncoder(schema.numbers, schema.categories, kind="scaled")
    view = passthrough_view(schema)
    return Passthrough(view, encoder.fit(views[view]))


def passthrough_view(schema: TableSchema | None) -> str:
    """Returns which view is passed through: the table if there is one, else pixels."""
    return "pixels" if schema is None else "table"


class Predicted(NamedTuple):
    """What a stack and all that it is made of say of N rows."""

    levels: list[list[Any]]
    """What each base model of each level returned."""
    stack: Values
    """Probabilities [N, num_classes], or targets [N]."""


@dataclass(frozen=True, kw_only=True)
class StackModel:
    """Predicts rows that no base model has seen."""

    levels: tuple[tuple[Member, ...], ...]
    meta: Any
    """scikit-learn's contract, on meta-features."""
    num_classes: int
    """0 for a regression."""
    passthrough: Passthrough | None = None
    """None: what stands above base models sees their predictions only."""

    @property
    def views(self) -> set[str]:
        """The names of the views that are needed to predict."""
        return {*(member.view for member in self.levels[0]), *([self.passthrough.view] if self.passthrough else [])}

    def predict(
        self, views: Mapping[str, Any], *, num_workers: int = 1, tell: Callable[[str], None] = lambda _: None
    ) -> Values:
        """Returns the stack's predictions: probabilities [N, num_classes], or targets [N]."""
        return self.predict_all(views, num_workers=num_workers, tell=tell).stack

    def predict_all(
        self, views: Mapping[str, Any], *, num_workers: int = 1, tell: Callable[[str], None] = lambda _: None
    ) -> Predicted:
        """Returns what the stack and each base model predict.

        Args:
            views: The rows, in every form that `views` names.
            num_workers: Base models that predict at once.
            tell: Given the name of each base model that is done.
        """
        extra = self.passthrough.transform(views) if self.passthrough else None
        levels: list[list[Any]] = []
        features: Any = None
        for level in self.levels:
            inputs = [views[member.view] if features is None else features for member in level]
            levels.append(_all(level, inputs, num_workers, tell))
            features = meta_features(levels[-1], [member.method for member in level], self.num_classes)
            features = features if extra is None else beside(features, extra)
        return Predicted(levels, of_meta_model(self.meta, features, num_classes=self.num_classes))

    def predict_with(self, name: str, views: Mapping[str, Any]) -> Values:
        """Returns what one base model predicts by itself, or from the levels below it: probabilities, or targets.

        Raises:
            BadInputError: there is none of that name, or it has no probabilities.
        """
        places = {
            member.name: (level, index) for level, row in enumerate(self.levels) for index, member in enumerate(row)
        }
        if name not in places:
            raise BadInputError(f"--base {name}: no such base model; {did_you_mean(name, places)}")
        level, index = places[name]
        member = self.levels[level][index]
        if self.num_classes and member.method != "predict_proba":
            raise BadInputError(f"--base {name}: predicts classes without probabilities; use another")
        if level:
            return np.asarray(self.predict_all(views).levels[level][index])
        return np.asarray(getattr(member.model, member.method)(views[member.view]))


def _all(level: Sequence[Member], inputs: Sequence[Any], num_workers: int, tell: Callable[[str], None]) -> list[Any]:
    def predicted(member: Member, rows: Any) -> Any:
        found = getattr(member.model, member.method)(rows)
        tell(member.name)
        return found

    # Threads: nearly all of the time is spent in compiled code, and models and rows need not travel.
    with ThreadPoolExecutor(num_workers) as workers:
        return list(workers.map(predicted, level, inputs))


def of_meta_model(meta: Any, features: Any, *, num_classes: int) -> Values:
    """Returns a meta-model's probabilities [N, num_classes], or targets [N]; a class that it never met gets 0."""
    if not num_classes:
        return np.asarray(meta.predict(features), dtype=np.float64)
    found = np.asarray(meta.predict_proba(features), dtype=np.float64)
    if found.shape[1] == num_classes:
        return found
    all_classes = np.zeros((len(found), num_classes))
    all_classes[:, meta.classes_] = found
    return all_classes
