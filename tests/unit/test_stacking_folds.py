"""Folds: each rule's error, and that nobody is tested by a model that saw it."""

from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import KFold, RepeatedKFold, ShuffleSplit, TimeSeriesSplit

from graftstack.errors import ConfigError, DataError
from graftstack.stacking.folds import Fold, Folds, from_splitter, make_folds

LABELS = np.repeat([0, 1, 2], [30, 20, 10])
GROUPS = np.arange(60) // 4


def folds_of(kind: str, num: int = 5, **changes: Any) -> Folds:
    options: dict[str, Any] = {"y": LABELS, "seed": 0, "is_classification": True}
    return make_folds(kind, num, **{**options, **changes})


@pytest.mark.parametrize("kind", ["stratified", "kfold", "group", "time"])
def test_every_covered_row_is_tested_once_by_a_fold_that_did_not_train_on_it(kind: str) -> None:
    folds = folds_of(kind, groups=GROUPS)
    folds.check(GROUPS if kind == "group" else None)
    tested = np.concatenate([fold.test for fold in folds.folds])
    assert sorted(tested) == folds.covered.tolist()
    assert len(folds.covered) == (50 if kind == "time" else 60)
    assert [fold.name for fold in folds.folds] == [f"fold {number} of 5" for number in range(1, 6)]


def test_stratified_folds_have_the_same_share_of_every_class() -> None:
    assert [np.bincount(LABELS[fold.test]).tolist() for fold in folds_of("stratified").folds] == [[6, 4, 2]] * 5


def test_repeats_deal_the_rows_out_anew() -> None:
    folds = folds_of("stratified", repeats=2)
    folds.check()
    assert [fold.name for fold in folds.folds][5:7] == ["repeat 2, fold 1 of 5", "repeat 2, fold 2 of 5"]
    assert folds.of_repeats == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    assert not np.array_equal(folds.folds[0].test, folds.folds[5].test)


def test_the_same_seed_draws_the_same_folds_and_another_seed_draws_others() -> None:
    first, same, other = (folds_of("kfold", seed=seed).folds[0].test.tolist() for seed in (3, 3, 4))
    assert first == same != other


def test_groups_are_whole_for_numbers_too() -> None:
    folds = folds_of("group", y=np.linspace(0, 1, 60), groups=GROUPS, is_classification=False)
    folds.check(GROUPS)


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        (
            "stratified",
            {"num": 11},
            DataError,
            "class 2 has 10 rows for 11 folds; use 10 folds, or leave the class out",
        ),
        ("stratified", {"num": 11, "class_names": ["cat", "dog", "emu"]}, DataError, "class emu has 10 rows"),
        ("stratified", {"y": np.linspace(0, 1, 9), "is_classification": False}, DataError, "use kfold"),
        ("group", {}, DataError, "set data.group"),
        ("group", {"groups": np.arange(60) // 20}, DataError, "3 groups for 5 folds"),
        ("group", {"groups": np.arange(59)}, DataError, "59 groups for 60 rows"),
        ("kfold", {"y": np.ones(9)}, DataError, r"the only class is 1\.0"),
        ("kfold", {"y": np.ones(9), "is_classification": False}, DataError, r"the only target is 1\.0"),
        ("kfold", {"num": 61}, DataError, "61 folds in 60 rows"),
        ("time", {"num": 60}, DataError, "time needs 61 rows"),
        ("time", {"repeats": 2}, ConfigError, "2 repeats of time folds"),
        ("kfold", {"repeats": 0}, ConfigError, "0 repeats of kfold folds"),
        ("kfold", {"num": 1}, ConfigError, "use 2 or more"),
        ("random", {}, ConfigError, "use stratified, kfold, group, time"),
    ],
)
def test_a_broken_rule_is_named_with_its_value_and_remedy(
    kind: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        folds_of(kind, **changes)


def test_a_fold_that_trains_on_what_it_tests_is_found() -> None:
    first, second = np.arange(3), np.arange(3, 6)
    leaking = Folds((Fold(np.append(second, 2), first, "fold 1 of 2"), Fold(first, second, "fold 2 of 2")), 6)
    with pytest.raises(DataError, match="fold 1 of 2 trains on the row of row 2"):
        leaking.check()


def test_a_group_in_training_and_test_is_found() -> None:
    with pytest.raises(DataError, match="trains on the group of row"):
        folds_of("kfold").check(GROUPS)


def test_a_row_that_is_tested_twice_is_found() -> None:
    first, second = np.arange(3), np.arange(3, 6)
    twice = Folds((Fold(second, first, "fold 1 of 2"), Fold(np.arange(2), np.arange(2, 6), "fold 2 of 2")), 6)
    with pytest.raises(DataError, match="row 2 is tested 2 times"):
        twice.check()


def test_a_splitter_gives_the_very_rows_in_their_order() -> None:
    splitter = KFold(4, shuffle=True, random_state=1)
    for fold, (train, test) in zip(from_splitter(splitter, LABELS, LABELS).folds, splitter.split(LABELS), strict=True):
        assert fold.train.tolist() == train.tolist()
        assert fold.test.tolist() == test.tolist()
    assert len(from_splitter(list(splitter.split(LABELS)), LABELS, LABELS).folds) == 4


def test_a_splitter_that_goes_forward_in_time_need_not_test_all_rows() -> None:
    folds = from_splitter(TimeSeriesSplit(4), LABELS, LABELS)
    folds.check()
    assert folds.covered.tolist() == list(range(12, 60))


@pytest.mark.parametrize("splitter", [RepeatedKFold(n_splits=2, n_repeats=2), ShuffleSplit(3), []])
def test_a_splitter_that_is_no_partition_is_refused_in_the_words_of_scikit_learn(splitter: Any) -> None:
    with pytest.raises(ValueError, match="cross_val_predict only works for partitions"):
        from_splitter(splitter, LABELS, LABELS)


def test_the_level_above_learns_only_from_rows_that_have_predictions() -> None:
    folds = folds_of("time")
    above = folds.above()
    assert len(above.folds) == 4
    assert all(np.isin(fold.train, folds.covered).all() for fold in above.folds)
    assert folds_of("kfold", seed=1).above().num_rows == 60
    with pytest.raises(DataError, match="use more folds"):
        Folds((Fold(np.arange(3), np.arange(3, 6), "fold 1 of 1"),), 6).above()
