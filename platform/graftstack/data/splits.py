"""Which rows train, which validate and which test."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graftstack.errors import DataError, some_of
from graftstack.seeding import derive_seed

Rows = npt.NDArray[np.int64]

SPLIT_WORDS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""What columns and folders say -> the split."""


class Splits(NamedTuple):
    """Row positions, ascending, ``int64``; no row is in two."""

    train: Rows
    val: Rows
    test: Rows


def split_words(words: npt.NDArray[np.str_]) -> npt.NDArray[np.str_]:
    """Returns train, val or test for each of `words`, ``str [N]``.

    Raises:
        DataError: a word that isn't in `SPLIT_WORDS`.
    """
    distinct, positions = np.unique(words, return_inverse=True)
    unknown = [f'"{word}"' for word in distinct if word.lower() not in SPLIT_WORDS]
    if unknown:
        raise DataError(
            f"split {some_of(unknown)}: not a split; write train, val (valid, validation, dev) or test, "
            "or leave data.split out"
        )
    return np.array([SPLIT_WORDS[word.lower()] for word in distinct], dtype=np.str_)[positions]


def given_split(split: npt.NDArray[np.str_]) -> Splits:
    """Returns the split that the source says; without a row for val, the rows for test validate, and none test."""
    train, val, test = (np.flatnonzero(split == name) for name in ("train", "val", "test"))
    return Splits(train, val, test) if len(val) else Splits(train, test, val)


def stratified_split(labels: npt.NDArray[np.int64], val_fraction: float, *, seed: int) -> Splits:
    """Returns a random split in which each class validates with the same share of its rows.

    Every class keeps a row in training, and, where it has two or more, one in validation.
    """
    rng = np.random.default_rng(derive_seed(seed, "split"))
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        num_val = min(max(round(val_fraction * len(rows)), 1), len(rows) - 1) if val_fraction else 0
        chosen.append(rng.permutation(rows)[:num_val])
    return _split_off(len(labels), np.concatenate(chosen) if chosen else np.empty(0, np.int64))


def group_split(labels: npt.NDArray[np.int64], groups: npt.NDArray[Any], val_fraction: float, *, seed: int) -> Splits:
    """Returns a random split that keeps each group whole, and near `val_fraction` in every class.

    Greedy, after scikit-learn's `StratifiedGroupKFold`: from the most lopsided group to the most even, a group joins
    validation if that brings the classes nearer to their share and leaves each a row in training.

    Raises:
        DataError: fewer than two groups.
    """
    names, group_of = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise DataError(f"data.group: the only group is {names[0]}; it needs two or more, to train and to validate")
    counts = np.zeros((len(names), int(labels.max()) + 1))  # [G, C] rows of each class in each group
    np.add.at(counts, (group_of, labels), 1)
    total = counts.sum(axis=0)
    wanted, scale = val_fraction * total, np.maximum(total, 1)
    order = np.random.default_rng(derive_seed(seed, "split")).permutation(len(names))
    order = order[np.argsort(-counts[order].std(axis=1), kind="stable")]
    val = np.zeros_like(total)
    chosen: list[int] = []
    for group in order:
        after = val + counts[group]
        nearer = np.square((after - wanted) / scale).sum() < np.square((val - wanted) / scale).sum()
        if nearer and ((after < total) | (total == 0)).all():
            val = after
            chosen.append(int(group))
    if not chosen and val_fraction:  # every group is larger than the share: the smallest validates
        chosen.append(int(order[np.argmin(counts[order].sum(axis=1))]))
    return _split_off(len(labels), np.flatnonzero(np.isin(group_of, chosen)))


def limit_train(splits: Splits, labels: npt.NDArray[np.int64], num_per_class: int | None, *, seed: int) -> Splits:
    """Returns `splits` with at most `num_per_class` random training rows of each class; None keeps all."""
    if num_per_class is None:
        return splits
    rng = np.random.default_rng(derive_seed(seed, "num_train_per_class"))
    of_class = [splits.train[labels[splits.train] == label] for label in np.unique(labels[splits.train])]
    kept = [rng.permutation(rows)[:num_per_class] for rows in of_class]
    return splits._replace(train=np.sort(np.concatenate(kept))) if kept else splits


def check_classes(labels: npt.NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Raises `DataError` where there is nothing to tell apart."""
    if len(np.unique(labels)) < 2:
        raise DataError(
            f"the only class is {class_names[int(labels[0])]}; learning needs two or more, check data.label"
        )


def check_no_lone_rows(labels: npt.NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Raises `DataError` where a class has one row, which can't both train and validate."""
    lone = [class_names[label] for label in np.flatnonzero(np.bincount(labels) == 1).tolist()]
    if lone:
        raise DataError(
            f"class {some_of(lone)} has a single image, which can't both train and "
            "validate; add more images, or keep other classes with data.classes"
        )


def check_splits(splits: Splits, labels: npt.NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Raises `DataError` unless there are rows to train on, rows to validate on, and all their classes are trained."""
    if not len(splits.train):
        raise DataError(
            "no row is for training; mark some rows train, or leave the split out (data.split, folder names)"
        )
    if not len(splits.val):
        raise DataError(
            "no row is for validation; mark some rows val, or leave the split out and set data.val_fraction"
        )
    for name, rows in (("validation", splits.val), ("test", splits.test)):
        missing = np.setdiff1d(labels[rows], labels[splits.train])
        if len(missing):
            classes = some_of([class_names[label] for label in missing.tolist()])
            raise DataError(
                f"class {classes} is in {name} but not in training; "
                "add training rows, or keep other classes with data.classes"
            )


def check_groups_apart(splits: Splits, groups: npt.NDArray[Any]) -> None:
    """Raises `DataError` where a group has rows both in training and elsewhere."""
    shared = np.intersect1d(groups[splits.train], groups[np.concatenate([splits.val, splits.test])])
    if len(shared):
        raise DataError(
            f"group {some_of([str(group) for group in shared])} is in training and outside it; "
            "mend the split, or leave data.split out to split by data.group"
        )


def _split_off(num_rows: int, val: Rows) -> Splits:
    val = np.sort(val)
    return Splits(train=np.setdiff1d(np.arange(num_rows), val), val=val, test=np.empty(0, np.int64))
