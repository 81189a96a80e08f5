"""What the columns of a table are: kept with a model, so that new data is read in the same way, or refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from graftstack.errors import DataError, did_you_mean, some_of
from graftstack.stacking.columns import (
    NUMERIC_TYPES,
    Column,
    as_categories,
    as_numbers,
    distinct_share,
    holds_one_value,
    type_of,
)

if TYPE_CHECKING:
    import pandas as pd

_ID_SHARE, _ID_ROWS = 0.95, 20
"""Text is a name of its row, not a category, where this share of so many rows or more have values of their own."""


@dataclass(frozen=True)
class TableSchema:
    """The columns that models learn from, in order, and those that are there beside them."""

    columns: tuple[Column, ...]
    ignored: tuple[str, ...] = ()
    """Columns of the data learnt from that are no features: new data may have them or not."""

    @property
    def names(self) -> list[str]:
        """The features' names, in order."""
        return [column.name for column in self.columns]

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the features that are numbers."""
        return tuple(column.name for column in self.columns if column.type in NUMERIC_TYPES)

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the features that are categories."""
        return tuple(column.name for column in self.columns if column.type not in NUMERIC_TYPES)

    def frame(self, table: pa.Table) -> "pd.DataFrame":
        """Returns the features of `table` ``[N, F]``: numbers as float64, others as pandas categories; NaN is missing.

        A category that wasn't there before is fine: encoders know it as unknown.

        Raises:
            DataError: a feature is missing, holds an infinite number or values of another type.
        """
        import pandas as pd

        self.check_there(table.column_names)
        read = {
            column.name: as_numbers(column, table[column.name])
            if column.type in NUMERIC_TYPES
            else as_categories(column, table[column.name])
            for column in self.columns
        }
        return pd.DataFrame(read, copy=False)

    def check_there(self, names: Sequence[str]) -> None:
        """Raises `DataError` where a feature isn't among `names`."""
        missing = [name for name in self.names if name not in names]
        if missing:
            raise DataError(
                f"column {some_of(missing)} is missing, and the model learnt from it; add it "
                f"({did_you_mean(missing[0], names)})"
            )

    def check_extra(self, names: Sequence[str], others: Sequence[str] = ()) -> None:
        """Raises `DataError` for one of `names` that is neither a feature, nor ignored, nor one of `others`."""
        extra = [name for name in names if name not in {*self.names, *self.ignored, *others}]
        if extra:
            raise DataError(
                f"column {some_of(extra)}: the model didn't learn from it; remove it from the data, or train anew on "
                "data that has it"
            )

    def as_plain(self) -> dict[str, Any]:
        """Returns what `from_plain` takes, as JSON can hold it."""
        return {"columns": [list(column) for column in self.columns], "ignored": list(self.ignored)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "TableSchema":
        """Returns the schema that `as_plain` has written."""
        return cls(tuple(Column(*column) for column in plain["columns"]), tuple(plain["ignored"]))


class Inferred(NamedTuple):
    """A schema, and what people should know of how it came about."""

    schema: TableSchema
    notes: tuple[str, ...]


def infer_schema(table: pa.Table, features: Sequence[str], *, others: Sequence[str] = ()) -> Inferred:
    """Returns what the `features` of `table` are; those that can't tell anything are ignored, and the notes say so.

    Args:
        table: the rows to learn from.
        features: names of the columns to learn from.
        others: columns beside them, which new data may have as well.

    Raises:
        DataError: no feature is left, or one holds neither numbers nor text.
    """
    columns, ignored, notes = [], [name for name in others if name not in features], []
    for name in features:
        reading = type_of(name, table[name])
        column = Column(name, reading.type)
        why = _useless(column, table[name])
        if why:
            ignored.append(name)
            notes.append(f"column {name} is left out: {why}")
            continue
        columns.append(column)
        if reading.note:
            notes.append(f"column {name}: {reading.note}")
    if not columns:
        said = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(f"no column to learn from is left{said}; name some with data.features, or mend the data")
    return Inferred(TableSchema(tuple(columns), tuple(ignored)), tuple(notes))


def _useless(column: Column, values: pa.ChunkedArray) -> str | None:
    if values.null_count == len(values):
        return "it is empty"
    if holds_one_value(values):
        return "it holds one value"
    num_known = len(values) - values.null_count
    if column.type == "text" and num_known >= _ID_ROWS and distinct_share(values) >= _ID_SHARE:
        return "nearly every row has a text of its own, as names and ids do"
    return None
