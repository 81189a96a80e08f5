"""Splits are stratified, grouped or given; always the same for a seed; and refused where nothing can be learnt."""

import numpy as np
import pytest

from graftstack.data.splits import (
    Splits,
    check_classes,
    check_groups_apart,
    check_no_lone_rows,
    check_splits,
    given_split,
    group_split,
    limit_train,
    split_words,
    stratified_split,
)
from graftstack.errors import DataError

LABELS = np.repeat([0, 1, 2], [100, 50, 10])


def covers_all(splits: Splits, num_rows: int) -> bool:
    return sorted(np.concatenate(splits).tolist()) == list(range(num_rows))


def test_a_stratified_split_takes_the_same_share_of_each_class() -> None:
    splits = stratified_split(LABELS, 0.2, seed=0)
    assert np.bincount(LABELS[splits.val]).tolist() == [20, 10, 2]
    assert covers_all(splits, len(LABELS))
    assert len(splits.test) == 0


def test_a_split_depends_on_the_seed_alone() -> None:
    first, again, other = (stratified_split(LABELS, 0.2, seed=seed) for seed in (5, 5, 6))
    assert (first.val == again.val).all()
    assert (first.val != other.val).any()


@pytest.mark.parametrize("val_fraction", [0.01, 0.5, 0.99])
def test_each_class_of_two_rows_trains_and_validates(val_fraction: float) -> None:
    labels = np.repeat(np.arange(20), 2)
    splits = stratified_split(labels, val_fraction, seed=0)
    assert (np.bincount(labels[splits.train]) == 1).all()
    assert (np.bincount(labels[splits.val]) == 1).all()


def test_no_group_is_on_both_sides_and_classes_keep_their_share() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1000)
    groups = rng.integers(0, 60, 1000).astype(str)
    splits = group_split(labels, groups, 0.2, seed=1)
    check_groups_apart(splits, groups)
    assert covers_all(splits, 1000)
    shares = np.bincount(labels[splits.val]) / np.bincount(labels)
    assert shares == pytest.approx([0.2] * 4, abs=0.05)
    assert (splits.val == group_split(labels, groups, 0.2, seed=1).val).all()


def test_one_of_two_groups_validates_even_if_it_is_large() -> None:
    splits = group_split(np.array([0, 1, 0, 1]), np.array(["a", "a", "b", "b"]), 0.1, seed=0)
    assert len(splits.val) == 2


def test_one_group_can_not_be_split() -> None:
    with pytest.raises(DataError, match="only group is a"):
        group_split(np.array([0, 1]), np.array(["a", "a"]), 0.2, seed=0)


def test_words_for_splits_are_understood_in_any_case() -> None:
    words = np.array(["train", "VAL", "valid", "validation", "dev", "Test"])
    assert split_words(words).tolist() == ["train", "val", "val", "val", "val", "test"]


def test_words_that_name_no_split_are_listed() -> None:
    with pytest.raises(DataError, match='split "", "holdout": not a split; write train'):
        split_words(np.array(["train", "holdout", ""]))


def test_test_rows_validate_where_no_row_is_for_validation() -> None:
    splits = given_split(np.array(["train", "test", "train", "test"]))
    assert [rows.tolist() for rows in splits] == [[0, 2], [1, 3], []]


def test_a_given_split_is_taken_as_it_is() -> None:
    splits = given_split(np.array(["test", "train", "val"]))
    assert [rows.tolist() for rows in splits] == [[1], [2], [0]]


def test_training_rows_are_limited_class_by_class_and_the_rest_stays() -> None:
    splits = stratified_split(LABELS, 0.2, seed=0)
    limited = limit_train(splits, LABELS, 9, seed=0)
    assert np.bincount(LABELS[limited.train]).tolist() == [9, 9, 8]
    assert set(limited.train) <= set(splits.train)
    assert (limited.val == splits.val).all()
    assert (limited.train == limit_train(splits, LABELS, 9, seed=0).train).all()
    assert (limited.train != limit_train(splits, LABELS, 9, seed=1).train).any()


def test_rules_for_learning_name_what_breaks_them() -> None:
    none = np.empty(0, dtype=np.int64)
    names = ["cat", "dog"]
    labels = np.array([0, 1, 0])
    with pytest.raises(DataError, match="only class is cat"):
        check_classes(np.zeros(3, dtype=np.int64), names)
    with pytest.raises(DataError, match=r"class dog has a single image.*data\.classes"):
        check_no_lone_rows(labels, names)
    with pytest.raises(DataError, match="no row is for training"):
        check_splits(Splits(none, np.arange(3), none), labels, names)
    with pytest.raises(DataError, match="no row is for validation"):
        check_splits(Splits(np.arange(3), none, none), labels, names)
    with pytest.raises(DataError, match="class dog is in validation but not in training"):
        check_splits(Splits(np.array([0, 2]), np.array([1]), none), labels, names)
    with pytest.raises(DataError, match="group a is in training and outside"):
        check_groups_apart(Splits(np.array([0]), np.array([1]), none), np.array(["a", "a"]))
