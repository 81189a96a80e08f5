"""What is to be predicted: classes or numbers."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graftstack.errors import ConfigError, DataError

_MOST_CLASSES = 20
"""Whole numbers of so many distinct values or fewer are taken for classes."""
_WHOLE = re.compile(r"[+-]?\d+")


def is_classification(task: str, label: str, class_names: Sequence[str]) -> bool:
    """Returns whether the label names classes.

    Args:
        task: classification, regression, or auto: numbers with more than 20 distinct values, or with fractions, are
            targets of a regression; everything else is a class.
        label: the name of its column.
        class_names: its distinct values.

    Raises:
        ConfigError: a regression on a label that isn't a number.
    """
    if task not in ("auto", "classification", "regression"):
        raise ConfigError(f"task={task}: no such task; use auto, classification or regression")
    if task == "classification":
        return True
    words = [name for name in class_names if _number(name) is None]
    if task == "regression":
        if words:
            raise ConfigError(
                f'task=regression: data.label={label} holds text such as "{words[0]}"; use task=classification, or '
                "name a column of numbers"
            )
        return False
    return bool(words) or (len(class_names) <= _MOST_CLASSES and all(map(_WHOLE.fullmatch, class_names)))


def targets(table: pa.Table, label: str) -> npt.NDArray[np.float64]:
    """Returns the label of each row as a number, ``float64 [N]``; NaN where there is none.

    Raises:
        DataError: a number is infinite, or isn't one.
    """
    if "label" not in table.column_names:
        return np.full(table.num_rows, np.nan)
    encoded = pc.dictionary_encode(table["label"]).combine_chunks()
    words = encoded.dictionary.to_pylist()
    numbers = [_number(word) for word in words]
    for word, number in zip(words, numbers, strict=True):
        if number is None or np.isinf(number):
            row = table["row_id"][pc.index(table["label"], value=word).as_py()].as_py()
            what = "isn't a number" if number is None else "is infinite"
            raise DataError(f"row {row}: data.label={label} is {word}, which {what}; mend the row, or remove it")
    known = np.array([*numbers, np.nan], dtype=np.float64)
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    return np.asarray(known[codes])


def check_all_known(y: npt.NDArray[np.float64], row_ids: npt.NDArray[Any]) -> None:
    """Raises `DataError` naming the first row whose target is NaN."""
    missing = np.flatnonzero(np.isnan(y))
    if len(missing):
        raise DataError(
            f"row {row_ids[missing[0]]} has no label ({len(missing)} of {len(y)} rows); label the rows, or remove them"
        )


def check_varies(y: npt.NDArray[Any], label: str, class_names: Sequence[str]) -> None:
    """Raises `DataError` where all rows to learn from have the same label."""
    if len(y) and (y == y[0]).all():
        value = class_names[int(y[0])] if class_names else f"{y[0]:g}"
        what = "class" if class_names else "target"
        raise DataError(
            f"data.label={label}: the only {what} of the {len(y)} training rows is {value}; learning needs two or "
            "more, use another column or more rows"
        )


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
