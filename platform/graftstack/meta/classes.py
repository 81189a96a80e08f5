"""Which classes train, which validate and which test: few-shot accuracy is told on classes that training never saw."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from graftstack.config.meta import MetaConfig
from graftstack.config.schema import Source
from graftstack.data.labels import UNKNOWN
from graftstack.data.load import ImageData
from graftstack.data.splits import Rows, Splits, limit_train
from graftstack.errors import DataError, did_you_mean, some_of
from graftstack.seeding import derive_seed

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of one part; the images of class i are ``rows[i, :counts[i]]``, each after ``turns[i]`` turns.

    A turn is a quarter of a full one, counter-clockwise.
    """

    names: tuple[str, ...]
    """E.g. ``Greek/character03``, or ``Greek/character03 turned 90`` (degrees)."""
    rows: npt.NDArray[np.int64]
    """``[C, most]``: rows of `ImageData`, ascending, then -1."""
    counts: npt.NDArray[np.int64]
    """``[C]``: images of each."""
    turns: npt.NDArray[np.int64]
    """``[C]``: 0..3."""
    labels: npt.NDArray[np.int64]
    """``[C]``: positions in `ImageData.class_names`, which a class shares with those that are turned from it."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """Differs where an episode could: it is of the images of each class, and of how they are turned."""
        digest = blake2b(digest_size=16)
        for array in (self.rows, self.turns):
            digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class ClassSplit(NamedTuple):
    """The parts; no class is in two, nor is one turned from a class of another part."""

    train: Classes
    val: Classes
    """May be empty."""
    test: Classes


class _Labels(NamedTuple):
    """Positions in `ImageData.class_names`, ``int64``."""

    train: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def split_classes(data: ImageData, config: MetaConfig) -> ClassSplit:
    """Returns the classes of each part.

    `eval.classes` test, and the rest trains; without them, the source's split holds; without that, a random share
    `eval.test_fraction` of the classes tests. Where nothing names classes that validate, a random share
    `eval.val_fraction` of all does, taken from those that would train. Random shares depend on the seed alone.

    Classes are those that have images. `data.num_train_per_class` limits the images of those that train.

    Raises:
        DataError: a row has no label, `eval.classes` names no class, a class lies in two parts, or a group does.
    """
    _check_labelled(data)
    labels = _split_labels(data, config)
    rows = Splits(*(np.flatnonzero(np.isin(data.labels, part)) for part in labels))
    if data.groups is not None and config.num_episodes:
        _check_groups_apart(data.groups, rows)
    rows = limit_train(rows, data.labels, config.data.num_train_per_class, seed=config.seed)
    turn = config.data.source is Source.omniglot if config.rotations is None else config.rotations
    return ClassSplit(*(_classes(data, part, num_turns=4 if turn else 1) for part in rows))


def check_episodes(split: ClassSplit, data: ImageData, config: MetaConfig) -> None:
    """Makes sure that there are classes and images enough for every episode that `config` asks for.

    Those are training episodes, episodes of `num_ways` and `num_shots` on the classes that validate, if there are
    any, and on those that test all of the table. With ``num_episodes=0`` nothing trains or validates.

    Raises:
        DataError: a part has fewer classes than ways, or a class fewer images than shots and queries.
    """
    for demand in _demands(split, config):
        if len(demand.classes) < demand.ways.value:
            raise _too_few_classes(demand, _remedy(demand.verb, data, config))
        if (demand.classes.counts < demand.shots.value + demand.queries.value).any():
            raise _too_few_images(demand)


def _check_labelled(data: ImageData) -> None:
    missing = np.flatnonzero(data.labels == UNKNOWN)
    if len(missing):
        raise DataError(
            f"row {data.row_ids[missing[0]]} has no label ({len(missing)} of {len(data)} rows); label the rows, or "
            "remove them"
        )


def _split_labels(data: ImageData, config: MetaConfig) -> _Labels:
    known = np.unique(data.labels)
    order = np.random.default_rng(derive_seed(config.seed, "classes")).permutation(known)
    if config.eval.classes:
        val, test = _NONE, _named(data, config, known)
    elif data.split is not None:
        val, test = _given(data, data.split, config)
    else:
        val, test = _NONE, order[: round(config.eval.test_fraction * len(known))]
    train = order[~np.isin(order, np.concatenate([val, test]))]
    if not len(val):
        num_val = round(config.eval.val_fraction * len(known))
        val, train = train[:num_val], train[num_val:]
    return _Labels(train, val, test)


def _named(data: ImageData, config: MetaConfig, known: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    label_of = {data.class_names[label]: label for label in known.tolist()}
    for name in map(str, config.eval.classes):
        if name not in label_of:
            raise DataError(f"eval.classes={name}: no row has this class; {did_you_mean(name, label_of)}")
    return np.unique([label_of[str(name)] for name in config.eval.classes])


class _Given(NamedTuple):
    """What a source says of its classes: positions in `ImageData.class_names`."""

    val: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def _given(data: ImageData, split: npt.NDArray[np.str_], config: MetaConfig) -> _Given:
    train, val, test = (np.unique(data.labels[split == name]) for name in ("train", "val", "test"))
    distinct, num_parts = np.unique(np.concatenate([train, val, test]), return_counts=True)
    if (num_parts > 1).any():
        leave_out = "leave data.split out, or " if config.data.has_columns else ""
        raise DataError(
            f"class {some_of([data.class_names[label] for label in distinct[num_parts > 1].tolist()])}: images in more "
            f"than one of train, val and test, but a class that tests must be new; {leave_out}list those that test in "
            "eval.classes"
        )
    return _Given(val, test)


def _check_groups_apart(groups: npt.NDArray[np.str_], rows: Splits) -> None:
    shared = np.intersect1d(groups[rows.train], groups[np.concatenate([rows.val, rows.test])])
    if len(shared):
        raise DataError(
            f"data.group: {some_of([str(group) for group in shared])} has images of classes that train and of classes "
            "that don't; list others in eval.classes, or leave data.group out"
        )


def _classes(data: ImageData, rows: Rows, *, num_turns: int) -> Classes:
    labels, counts = np.unique(data.labels[rows], return_counts=True)
    table = np.full((len(labels), counts.max(initial=0)), -1)
    by_class = rows[np.argsort(data.labels[rows], kind="stable")]
    table[np.arange(table.shape[1]) < counts[:, None]] = by_class
    suffixes = ["", *(f" turned {90 * turn}" for turn in range(1, num_turns))]
    return Classes(
        names=tuple(data.class_names[label] + suffix for label in labels.tolist() for suffix in suffixes),
        rows=np.repeat(table, num_turns, axis=0),
        counts=np.repeat(counts, num_turns),
        turns=np.tile(np.arange(num_turns), len(labels)),
        labels=np.repeat(labels, num_turns),
    )


class _Setting(NamedTuple):
    """A number of the configuration, and what it is called there."""

    key: str
    value: int

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


class _Demand(NamedTuple):
    """Episodes of one kind, and the classes that they are drawn from."""

    verb: str
    """What the classes do: train, validate or test."""
    classes: Classes
    ways: _Setting
    shots: _Setting
    queries: _Setting


def _demands(split: ClassSplit, config: MetaConfig) -> Iterator[_Demand]:
    ways, shots, queries = (_Setting(key, getattr(config, key)) for key in ("num_ways", "num_shots", "num_queries"))
    if config.num_episodes:
        yield _Demand("train", split.train, *(_in_training(setting, config) for setting in (ways, shots, queries)))
        if len(split.val):
            yield _Demand("validate", split.val, ways, shots, queries)
    for num_ways in config.eval_ways:
        for num_shots in config.eval_shots:
            yield _Demand(
                "test",
                split.test,
                ways if num_ways == ways.value else _Setting("eval.num_ways", num_ways),
                shots if num_shots == shots.value else _Setting("eval.num_shots", num_shots),
                queries,
            )


def _in_training(setting: _Setting, config: MetaConfig) -> _Setting:
    value = getattr(config.train, setting.key)
    return setting if value is None else _Setting(f"train.{setting.key}", value)


def _remedy(verb: str, data: ImageData, config: MetaConfig) -> str:
    """Names the keys that are read: a source that splits its classes itself leaves no share to set."""
    if config.eval.classes:
        testing, validating = "eval.classes", "eval.val_fraction"
    elif data.split is None:
        testing, validating = "eval.test_fraction or eval.classes", "eval.val_fraction"
    else:
        testing = "data.split or eval.classes" if config.data.has_columns else "eval.classes"
        validating = testing if (data.split == "val").any() else "eval.val_fraction"
    return {
        "train": f"let fewer test ({testing})",
        "validate": f"let more validate, or none ({validating})",
        "test": f"let more test ({testing})",
    }[verb]


def _too_few_classes(demand: _Demand, remedy: str) -> DataError:
    num = len(demand.classes)
    lower = f"use at most {num}, or " if num > 1 else ""
    return DataError(
        f"{demand.ways}: an episode takes more classes than {demand.verb}, which {num} {'does' if num == 1 else 'do'}; "
        f"{lower}{remedy}"
    )


def _too_few_images(demand: _Demand) -> DataError:
    needed = demand.shots.value + demand.queries.value
    classes = demand.classes
    few = np.flatnonzero((classes.counts < needed) & (classes.turns == 0)).tolist()
    return DataError(
        f"{demand.shots}, {demand.queries}: an episode takes {needed} images of each class, but there are fewer of "
        f"{some_of([f'{classes.names[index]} ({classes.counts[index]})' for index in few])}; lower them, or keep other "
        "classes with data.classes"
    )
