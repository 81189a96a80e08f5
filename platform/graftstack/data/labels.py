"""Classes have names; a label is the position of its name among them."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graftstack.errors import DataError, did_you_mean

UNKNOWN = -1
"""The label of a row whose class isn't known."""


def class_column(column: pa.ChunkedArray, key: str) -> pa.ChunkedArray:
    """Returns a column of any plain type as class names: ``3`` and ``3.0`` are "3", empty text is null.

    Raises:
        DataError: the column holds lists, structs or the like; `key` names it, e.g. ``data.label=tags``.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return class_column(column.cast(kind.value_type), key)
    if pa.types.is_boolean(kind):
        return pc.if_else(column, "True", "False")
    if pa.types.is_floating(kind):
        return _whole_floats(pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)).cast(pa.string())
    try:
        names = column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise DataError(f"{key}: values of type {kind} can't name classes; use a column of text or integers") from error
    return pc.if_else(pc.equal(names, ""), pa.scalar(None, pa.string()), names)


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the distinct `names`, by value where all are integers, else alphabetically."""
    distinct = set(names)
    if all(re.fullmatch(r"-?\d+", name) for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def keep_classes(table: pa.Table, classes: Sequence[Any]) -> pa.Table:
    """Returns the rows of `table` whose label is one of `classes`, compared as text; all rows if there are none.

    Raises:
        DataError: a class that no row has.
    """
    if not classes or "label" not in table.column_names:
        return table
    wanted = [str(name) for name in classes]
    known = set(pc.unique(table["label"]).drop_null().to_pylist())
    for name in wanted:
        if name not in known:
            raise DataError(f"data.classes={name}: no row has this class; {did_you_mean(name, known)}")
    return table.filter(pc.is_in(table["label"], value_set=pa.array(wanted, pa.string())))


def check_all_labelled(table: pa.Table) -> None:
    """Raises `DataError` naming the first row without a label."""
    nulls = table["label"].null_count
    if nulls:
        row = table["row_id"][pc.index(pc.is_null(table["label"]), value=True).as_py()].as_py()
        raise DataError(f"row {row} has no label ({nulls} of {table.num_rows} rows); label the rows, or remove them")


def to_integers(column: pa.ChunkedArray, class_names: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Returns the position in `class_names` of each name, ``int64 [N]``; `UNKNOWN` where it isn't among them."""
    found = pc.index_in(column, value_set=pa.array(class_names, pa.string()))
    return np.asarray(pc.fill_null(found, UNKNOWN).to_numpy(), dtype=np.int64)


def check_all_known(table: pa.Table, labels: npt.NDArray[np.int64], class_names: tuple[str, ...]) -> None:
    """Raises `DataError` listing the classes of `table` that aren't among `class_names`."""
    if (labels != UNKNOWN).all():
        return
    unknown = sorted_classes(set(table["label"].to_pylist()) - set(class_names))
    known = f"{', '.join(class_names[:12])}{', …' if len(class_names) > 12 else ''}"
    raise DataError(
        f"label {', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}: not a class of the model, which knows "
        f"{known}; keep those with data.classes"
    )


def _whole_floats(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Columns of integers with a missing value are often stored as floats."""
    whole = pc.all(pc.equal(pc.floor(column), column)).as_py()
    return column.cast(pa.int64()) if whole else column
