"""Class names come from columns of any plain type, in an order that people expect."""

from typing import Any

import pyarrow as pa
import pytest

from graftstack.data.labels import class_column, keep_classes, sorted_classes, to_integers
from graftstack.errors import DataError


def names(values: list[Any], kind: pa.DataType | None = None) -> list[str | None]:
    return class_column(pa.chunked_array([pa.array(values, kind)]), "data.label=x").to_pylist()


def test_columns_of_any_plain_type_name_classes() -> None:
    assert names([3, 11]) == ["3", "11"]
    assert names([3.0, None]) == ["3", None]
    assert names([0.5, 2.0]) == ["0.5", "2"]
    assert names([True, False]) == ["True", "False"]
    assert names(["b", "a"], pa.dictionary(pa.int8(), pa.string())) == ["b", "a"]


def test_nan_and_empty_text_are_no_label() -> None:
    assert names([float("nan"), 1.0]) == [None, "1"]
    assert names(["", "a"]) == [None, "a"]


def test_lists_can_not_name_classes() -> None:
    with pytest.raises(DataError, match=r"data\.label=x: values of type list"):
        names([[1], [2]])


def test_classes_are_sorted_by_value_if_all_are_integers() -> None:
    assert sorted_classes(["10", "9", "-1"]) == ("-1", "9", "10")
    assert sorted_classes(["10", "9", "x"]) == ("10", "9", "x")


def test_a_subset_of_classes_is_compared_as_text() -> None:
    table = pa.table({"label": ["1", "2", "3", "1"]})
    assert keep_classes(table, [1, "3"])["label"].to_pylist() == ["1", "3", "1"]
    assert keep_classes(table, []) is table


def test_a_class_that_no_row_has_is_refused_with_the_nearest() -> None:
    table = pa.table({"label": ["wolf", "cat"]})
    with pytest.raises(DataError, match=r"data\.classes=wolv: .*did you mean wolf\?"):
        keep_classes(table, ["wolv"])


def test_labels_are_positions_among_the_class_names() -> None:
    column = pa.chunked_array([["b", None], ["a", "z"]])
    assert to_integers(column, ("a", "b")).tolist() == [1, -1, 0, -1]
