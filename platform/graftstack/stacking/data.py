"""What a stack learns from: the rows of one source in every form that base models want."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graftstack.config.schema import DataConfig
from graftstack.data.images import encoded_images
from graftstack.data.load import ImageData, images_of
from graftstack.data.sources.tabular import OWN_COLUMNS, MissingColumnError
from graftstack.data.splits import (
    Splits,
    check_groups_apart,
    check_splits,
    given_split,
    group_split,
    limit_train,
    stratified_split,
)
from graftstack.data.table import SourceTable, read_table
from graftstack.errors import ConfigError, DataError, some_of
from graftstack.stacking.pixel_rows import PixelRows
from graftstack.stacking.schema import TableSchema, infer_schema
from graftstack.stacking.targets import check_all_known, check_varies, is_classification, targets

_LARGEST_OWN_SIZE = 64
"""Height and width that images are brought to, at most, where nobody asks for a size, in pixels."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class StackData:
    """N rows; row i of everything is the same one."""

    views: dict[str, Any]
    """What base models learn from, each with N rows.

    - table: DataFrame ``[N, F]``, as `TableSchema.frame` makes it
    - images: `ImageRows`
    - pixels: `PixelRows`, ``float32 [N, C * S * S]``
    """
    y: npt.NDArray[Any]
    """``int64 [N]``: positions in `class_names`, -1 where the class isn't known; or ``float64 [N]``: targets, NaN."""
    class_names: tuple[str, ...]
    """Empty for a regression."""
    row_ids: npt.NDArray[Any]
    """``int64 [N]`` positions in the source, or ``str [N]`` relative paths."""
    groups: npt.NDArray[np.str_] | None
    """``str [N]``: rows with the same value are on one side of every split."""
    splits: Splits
    """train: the rows that are cross-validated; val: those held out to judge by; test."""
    fingerprint: str
    """Of the source's content."""
    schema: TableSchema | None
    """None: there is no table."""
    notes: tuple[str, ...] = ()
    """What people should know of how the data was read."""

    def __len__(self) -> int:
        return len(self.y)

    @property
    def is_classification(self) -> bool:
        """Whether there are classes to tell apart, rather than numbers to predict."""
        return bool(self.class_names)


def load_stack_data(
    config: DataConfig,
    *,
    task: str = "auto",
    seed: int,
    image_size: int | None = None,
    class_names: tuple[str, ...] | None = None,
    require_labels: bool = True,
    schema: TableSchema | None = None,
    num_channels: int | None = None,
    last_validate: bool = False,
    progress: Progress | None = None,
) -> StackData:
    """Reads, decodes and splits the rows of `config`.

    Without a split and with ``data.val_fraction=0`` nothing is held out.

    Args:
        config: the source and what of it.
        task: classification, regression, or auto, which looks at the label: `targets.is_classification`.
        seed: of the split.
        image_size: height and width S that images are brought to, in pixels; None: as the first one is, 64 at most.
        class_names: the classes of a model that is to see the rows; () for a regression. The data need not suit
            learning then.
        require_labels: without, rows may lack a label or have one that isn't in `class_names`; all rows test.
        schema: how the table of a model was read; its columns have to be there, and no others.
        num_channels: how the pixels of a model were read, `PixelRows.num_channels`.
        last_validate: rows are in the order of time: the last ones are held out, rather than random ones.
        progress: called with (images decoded, images in all) while a cache is made.

    Raises:
        ConfigError: a task that the label doesn't suit.
        DataError: the data can't be read, decoded or learnt from.
    """
    dropped = config.drop
    if schema is not None:  # what else is there need not be read, nor be of a type that can be
        config = replace(config, features=schema.names, drop=[])
    source = _read(config, class_names or None, schema, require_labels=require_labels)
    by_class = _by_class(config, task, source, class_names)
    images = None
    if config.has_images:
        images = images_of(source, config, image_size=image_size or _own_size(config, source), progress=progress)
        source = source.without(np.flatnonzero(~np.isin(source.row_ids, images.row_ids)).tolist())
        if class_names is None:
            _check_all_there(source)
    table = _table(config, source, schema, dropped)
    y: npt.NDArray[Any] = source.labels if by_class else targets(source.table, config.label)
    names = source.class_names if by_class else ()
    if not by_class and require_labels:
        check_all_known(y, source.row_ids)
    splitting = _Splitting(config, source, y, names, seed)
    if class_names is None and require_labels:
        splits = splitting.to_learn_from(last_validate=last_validate)
    else:
        splits = splitting.of_a_model(require_labels=require_labels, last_validate=last_validate)
    views: dict[str, Any] = {} if table is None else {"table": table.frame}
    if images is not None:
        views |= _image_views(replace(images, splits=splits), num_channels)
    return StackData(
        views=views,
        y=y,
        class_names=names,
        row_ids=source.row_ids,
        groups=source.groups,
        splits=splits,
        fingerprint=source.fingerprint,
        schema=table.schema if table else None,
        notes=table.notes if table else (),
    )


def _read(
    config: DataConfig, class_names: tuple[str, ...] | None, schema: TableSchema | None, *, require_labels: bool
) -> SourceTable:
    try:
        return read_table(config, class_names=class_names, require_labels=require_labels)
    except MissingColumnError as error:
        if schema is not None and error.key == "data.features":  # which the model names, and no person
            schema.check_there(error.known)
        raise


def _check_all_there(source: SourceTable) -> None:
    """Raises `DataError` for a class that no image is left of: labels are positions, and one would never occur."""
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.class_names))
    gone = [source.class_names[label] for label in np.flatnonzero(counts == 0).tolist()]
    if gone:
        raise DataError(
            f"class {some_of(gone)}: none of its images can be decoded; mend some, or keep other classes with "
            "data.classes"
        )


def _by_class(config: DataConfig, task: str, source: SourceTable, class_names: tuple[str, ...] | None) -> bool:
    if class_names is not None:
        return bool(class_names)
    if not config.has_images:
        return is_classification(task, config.label, source.class_names)
    if task == "regression":
        raise ConfigError("task=regression: models of images tell classes apart; use task=classification")
    return True


def _own_size(config: DataConfig, source: SourceTable) -> int:
    encoded = encoded_images(config, source.table)
    sides = (encoded.shorter_side(row) for row in range(len(source)))
    return min(next((side for side in sides if side is not None), _LARGEST_OWN_SIZE), _LARGEST_OWN_SIZE)


def _image_views(images: ImageData, num_channels: int | None) -> dict[str, Any]:
    from graftstack.stacking.image_rows import ImageRows

    rows = ImageRows(images)
    return {"images": rows, "pixels": PixelRows(rows, num_channels)}


class _Table(NamedTuple):
    frame: Any
    schema: TableSchema
    notes: tuple[str, ...]


def _table(config: DataConfig, source: SourceTable, schema: TableSchema | None, dropped: list[str]) -> _Table | None:
    """Returns the table's features, read as `schema` says, or as what they are; None where there are none."""
    there = (source.table.schema.metadata or {}).get(b"columns", b"").decode().split("\n")
    if schema is not None:
        used = (config.label, config.split, config.group, config.image, *dropped)
        schema.check_extra([name for name in there if name], [name for name in used if name])
        return _Table(schema.frame(source.table), schema, ())
    features = [name for name in source.table.column_names if name not in OWN_COLUMNS]
    if not features and config.has_images:
        return None
    inferred = infer_schema(source.table, features, others=there)
    return _Table(inferred.schema.frame(source.table), inferred.schema, inferred.notes)


class _Splitting(NamedTuple):
    config: DataConfig
    source: SourceTable
    y: npt.NDArray[Any]
    class_names: tuple[str, ...]
    seed: int

    def of_a_model(self, *, require_labels: bool, last_validate: bool) -> Splits:
        """Returns the split for a model that is there already: nothing has to suit learning."""
        if require_labels:
            return self._split(last_validate=last_validate)
        none = np.empty(0, dtype=np.int64)
        return Splits(none, none, np.arange(len(self.y)))

    def to_learn_from(self, *, last_validate: bool) -> Splits:
        """Returns the split. Raises `DataError` where its training rows can't be learnt from."""
        label, names = self.config.label, self.class_names
        check_varies(self.y, label, names)
        splits = self._split(last_validate=last_validate)
        if not len(splits.train):
            raise DataError("no row is for training; mark some rows train, or leave data.split out")
        check_varies(self.y[splits.train], label, names)
        if names and len(splits.val):
            check_splits(splits, self.y, names)
        if self.config.num_train_per_class is not None and not names:
            raise ConfigError(
                f"data.num_train_per_class={self.config.num_train_per_class}: data.label={label} is a number and has "
                "no classes; leave it out"
            )
        return limit_train(splits, self.y, self.config.num_train_per_class, seed=self.seed)

    def _split(self, *, last_validate: bool) -> Splits:
        split, groups = self.source.split, self.source.groups
        fraction, seed = self.config.val_fraction, self.seed
        # Rows of a regression are all of one class here: only how many of them are held out matters.
        labels = self.y if self.class_names else np.zeros(len(self.y), dtype=np.int64)
        if split is not None:
            splits = given_split(split)
            if groups is not None:
                check_groups_apart(splits, groups)
            return splits
        if last_validate:
            num_train = len(labels) - round(fraction * len(labels))
            return Splits(np.arange(num_train), np.arange(num_train, len(labels)), np.empty(0, dtype=np.int64))
        if groups is not None:
            return group_split(labels, groups, fraction, seed=seed)
        return stratified_split(labels, fraction, seed=seed)
