"""One column of an Arrow table as numbers or categories."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graftstack.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

NUMERIC_TYPES = frozenset({"number", "time"})

# Without leading zeros: 007 is a name. Without inf and nan, which are words here.
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*|0?\.\d+|(0|[1-9]\d*)\.\d*)([eE][+-]?\d+)?")
_BLANKS = frozenset({"", "?", "-", "na", "n/a", "nan", "null", "none"})
"""What stands for a missing number in text, in lower case."""


class Column(NamedTuple):
    """A column that models learn from."""

    name: str
    type: str
    """number, time (as seconds since 1970, or seconds), text or boolean."""


class Reading(NamedTuple):
    """What a column holds."""

    type: str
    note: str = ""
    """What people should know of it."""


def type_of(name: str, values: pa.ChunkedArray) -> Reading:
    """Returns what the column holds. Text that is all numbers and blanks is a number.

    Raises:
        DataError: its values are neither numbers nor text.
    """
    values = _plain(values)
    kind = values.type
    if pa.types.is_boolean(kind):
        return Reading("boolean")
    if _is_number(kind) or pa.types.is_null(kind):
        return Reading("number")
    if pa.types.is_temporal(kind):
        return Reading("time", "times are learnt from as seconds")
    if not _is_text(kind):
        raise _not_a_feature(name, kind)
    parsed = _parsed(values)
    if parsed is None:
        return Reading("text")
    num_blank = int(np.isnan(parsed).sum()) - values.null_count
    return Reading("number", f"numbers held as text; {num_blank} blank values are missing")


def as_numbers(column: Column, values: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Returns the column as ``float64 [N]``, NaN where it is missing.

    Raises:
        DataError: the values are of another type, or one is infinite.
    """
    values = _plain(values)
    kind = values.type
    if pa.types.is_temporal(kind) and column.type == "time":
        numbers = _seconds(values)
    elif _is_number(kind) and column.type == "number":
        numbers = np.asarray(values.cast(pa.float64(), safe=False).to_numpy())
    elif pa.types.is_null(kind):
        numbers = np.full(len(values), np.nan)
    elif _is_text(kind) and column.type == "number":
        parsed = _parsed(values)
        if parsed is None:
            if pc.all(pc.is_in(_lowered(values), value_set=pa.array(sorted(_BLANKS)))).as_py():
                return np.full(len(values), np.nan)
            raise _other_type(column, f'text such as "{_first_word(values)}"')
        numbers = parsed
    else:
        raise _other_type(column, f"values of type {kind}")
    infinite = np.flatnonzero(np.isinf(numbers))
    if len(infinite):
        raise DataError(
            f"column {column.name} holds an infinite number (row {infinite[0]}, {len(infinite)} in all), which models "
            f"can't learn from; put a number or nothing in its place, or add data.drop=[{column.name}]"
        )
    return numbers


def as_categories(column: Column, values: pa.ChunkedArray) -> "pd.Categorical":
    """Returns the column as a pandas categorical of N rows, its categories in alphabetical order, blanks as missing.

    Raises:
        DataError: the values are of another type.
    """
    import pandas as pd

    values = _plain(values)
    kind = values.type
    if pa.types.is_null(kind):
        return pd.Categorical.from_codes(np.full(len(values), -1), categories=pd.Index([], dtype=object))
    if pa.types.is_boolean(kind) and column.type == "boolean":
        values = pc.if_else(values, "true", "false")
    elif _is_text(kind) and column.type == "boolean":
        values = pc.utf8_lower(values)
    elif not (_is_text(kind) and column.type == "text"):
        raise _other_type(column, f"values of type {kind}")
    blank = pc.equal(pc.utf8_trim_whitespace(values), "")
    encoded = pc.dictionary_encode(pc.if_else(blank, pa.scalar(None, values.type), values)).combine_chunks()
    words = np.array(encoded.dictionary.to_pylist(), dtype=object)
    order = np.argsort(words.astype(str), kind="stable")
    rank = np.empty(len(words) + 1, dtype=np.int64)
    rank[order], rank[-1] = np.arange(len(words)), -1
    codes = rank[np.asarray(pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False))]
    return pd.Categorical.from_codes(codes, categories=pd.Index(words[order], dtype=object))


def holds_one_value(values: pa.ChunkedArray) -> bool:
    """Whether all rows hold the same value, and none is missing."""
    return bool(values.null_count == 0 and pc.count_distinct(_plain(values)).as_py() == 1)


def distinct_share(values: pa.ChunkedArray) -> float:
    """Returns how many distinct values there are for each that isn't missing."""
    num = len(values) - values.null_count
    return float(pc.count_distinct(_plain(values)).as_py() / num) if num else 0.0


def _plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns dictionaries decoded, and text in one type."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.cast(pa.large_string()) if _is_text(values.type) else values


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _seconds(values: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    kind = values.type
    if pa.types.is_date(kind):
        values, kind = values.cast(pa.timestamp("ms")), pa.timestamp("ms")
    per_second = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}[kind.unit]
    whole = values.cast(pa.int32()).cast(pa.int64()) if pa.types.is_time32(kind) else values.cast(pa.int64())
    return np.asarray(whole.cast(pa.float64(), safe=False).to_numpy()) / per_second


def _lowered(values: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(values, "").cast(pa.string())))


def _parsed(values: pa.ChunkedArray) -> npt.NDArray[np.float64] | None:
    """Returns text as numbers, NaN where it is blank; None where some of it is another word, or all is blank."""
    encoded = pc.dictionary_encode(_lowered(values)).combine_chunks()
    words = encoded.dictionary.to_pylist()
    numbers = [float(word) if _NUMBER.fullmatch(word) else float("nan") for word in words]
    are_words = [np.isnan(number) and word not in _BLANKS for word, number in zip(words, numbers, strict=True)]
    if any(are_words) or all(np.isnan(number) for number in numbers):
        return None
    return np.asarray(np.array(numbers)[np.asarray(encoded.indices)])


def _first_word(values: pa.ChunkedArray) -> Any:
    words = (word.strip() for word in values.to_pylist() if word is not None)
    return next(word for word in words if not _NUMBER.fullmatch(word) and word.lower() not in _BLANKS)


def _other_type(column: Column, found: str) -> DataError:
    learnt = {"number": "numbers", "time": "times", "text": "text", "boolean": "true and false"}[column.type]
    return DataError(f"column {column.name} holds {found}, and the model learnt from {learnt}; convert the column")


def _not_a_feature(name: str, kind: pa.DataType) -> DataError:
    return DataError(
        f"column {name}: values of type {kind} are neither numbers nor text; add data.drop=[{name}], or convert it"
    )
