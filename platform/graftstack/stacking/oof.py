"""Out-of-fold predictions as an Arrow table: what the meta-model has learnt from, for anyone to look at."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graftstack.config.stack import FoldKind
from graftstack.errors import DataError, TrainingError
from graftstack.stacking.crossfit import CrossFit
from graftstack.stacking.fitting import FittedStack, StackTask
from graftstack.stacking.folds import Folds
from graftstack.stacking.leaderboard import STACK


def oof_table(task: StackTask, crossed: CrossFit, stack: FittedStack) -> pa.Table:
    """Returns one row for each row that is cross-validated, in the order of the data.

    Columns: `row_id`; `label` (a class name, or the target); `fold` (that didn't train on the row, counted from 0; of
    the first repeat); for each base model and for the stack ``NAME.CLASS`` (a probability or a decision), or ``NAME``
    where it says one number or one class. The stack's are null where folds go forward in time and no meta-model had
    earlier rows to learn from.

    Raises:
        TrainingError: a row isn't predicted once, or by a model that had seen it, or its group.
    """
    folds, covered = crossed.folds[0], stack.covered
    rows = task.data.splits.train[covered]
    names = np.asarray(task.data.class_names, dtype=object)
    y = task.data.y[rows]
    columns: dict[str, Any] = {
        "row_id": pa.array(task.data.row_ids[rows]),
        "label": pa.array(names[y], pa.string()) if task.num_classes else pa.array(y),
        "fold": pa.array(_fold_of(folds)[covered]),
    }
    for bases, level_folds, predictions in zip(crossed.levels, crossed.folds, stack.base_oof, strict=True):
        inside = np.isin(level_folds.covered, covered)
        for fitted, found in zip(bases, predictions, strict=True):
            columns |= _columns(fitted.base.name, np.asarray(found)[inside], task.data.class_names)
    known = np.isin(covered, stack.folds.covered)
    of_stack = np.full((len(covered), *stack.oof.shape[1:]), np.nan)
    of_stack[known] = stack.oof
    columns |= _columns(STACK, of_stack, task.data.class_names)
    table = pa.table(columns)
    _check_table(table, task, folds)
    return table


def _columns(name: str, values: npt.NDArray[Any], class_names: tuple[str, ...]) -> dict[str, Any]:
    if values.ndim == 2 and values.shape[1] == len(class_names):
        return {
            f"{name}.{label}": pa.array(values[:, index], from_pandas=True) for index, label in enumerate(class_names)
        }
    if class_names and np.issubdtype(values.dtype, np.integer):  # classes by themselves
        return {name: pa.array(np.asarray(class_names, dtype=object)[values], pa.string())}
    return {name: pa.array(values.reshape(len(values), -1)[:, 0], from_pandas=True)}


def check_honest(task: StackTask, crossed: CrossFit) -> None:
    """Makes sure that the folds of every level can be put together: see `Folds.check`.

    Raises:
        TrainingError: a fold breaks a rule: what is stacked on its predictions would be worthless.
    """
    groups = None if task.data.groups is None else task.data.groups[task.data.splits.train]
    for folds in crossed.folds:
        try:
            folds.check(groups)
        except DataError as error:
            raise _distrust(str(error)) from error


def _check_table(table: pa.Table, task: StackTask, folds: Folds) -> None:
    """Makes sure that the table has each row once, predicted by a fold that saw neither it nor its group."""
    table = table.filter(pc.greater_equal(table["fold"], 0))
    train = task.data.splits.train
    position = {row_id: index for index, row_id in enumerate(task.data.row_ids[train].tolist())}
    ids = table["row_id"].to_pylist()
    counts = Counter(ids)
    wrong = [row_id for row_id, num in counts.items() if num != 1 or row_id not in position]
    if wrong:
        raise _distrust(f"row {wrong[0]} has {counts[wrong[0]]} predictions, and one is wanted of each row that trains")
    missing = position.keys() - counts.keys()
    if missing and task.config.folds.kind is not FoldKind.time:
        raise _distrust(f"{len(missing)} rows have no prediction, such as row {min(missing)}")
    rows = np.array([position[row_id] for row_id in ids])
    by_fold = table["fold"].to_numpy()
    groups = None if task.data.groups is None else task.data.groups[train]
    for index in np.unique(by_fold):
        fold, tested = folds.folds[index], rows[by_fold == index]
        seen = np.isin(tested, fold.train)
        if groups is not None:
            seen |= np.isin(groups[tested], groups[fold.train])
        if seen.any():
            row_id = task.data.row_ids[train][tested[seen.argmax()]]
            raise _distrust(f"row {row_id} was predicted by {fold.name}, which trained on it or on its group")


def _distrust(why: str) -> TrainingError:
    return TrainingError(f"out-of-fold predictions can't be trusted: {why}")


def _fold_of(folds: Folds) -> npt.NDArray[np.int64]:
    """Returns the fold of the first repeat that tests each row; -1 for none."""
    found = np.full(folds.num_rows, -1)
    for index in folds.of_repeats[0]:
        found[folds.folds[index].test] = index
    return found
