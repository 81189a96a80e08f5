"""A source's table with integer labels, checked; the first stage of loading, in which no image is decoded."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graftstack.config.schema import DataConfig, Source
from graftstack.data.fingerprint import fingerprint
from graftstack.data.labels import (
    UNKNOWN,
    check_all_known,
    check_all_labelled,
    keep_classes,
    sorted_classes,
    to_integers,
)
from graftstack.data.sources import SOURCES
from graftstack.data.sources.tabular import missing_column
from graftstack.data.splits import split_words
from graftstack.errors import DataError


@dataclass(frozen=True, eq=False)
class SourceTable:
    """Encoded images and what is known of them; row i of everything is the same image."""

    table: pa.Table
    """The columns that `graftstack.data.sources` describes."""
    labels: npt.NDArray[np.int64]
    """``int64 [N]``: positions in `class_names`; -1 where the class isn't known."""
    class_names: tuple[str, ...]
    row_ids: npt.NDArray[Any]
    """``int64 [N]`` positions in the source, or ``str [N]`` relative paths."""
    split: npt.NDArray[np.str_] | None
    """``str [N]``: train, val or test; None where the source doesn't say."""
    groups: npt.NDArray[np.str_] | None
    """``str [N]``; None where the source doesn't say."""
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def without(self, rows: list[int]) -> "SourceTable":
        """Returns the table less `rows`; its fingerprint stays that of the whole."""
        if not rows:
            return self
        keep = np.ones(len(self), dtype=bool)
        keep[rows] = False
        return replace(
            self,
            table=self.table.filter(pa.array(keep)),
            labels=self.labels[keep],
            row_ids=self.row_ids[keep],
            split=None if self.split is None else self.split[keep],
            groups=None if self.groups is None else self.groups[keep],
        )


def read_table(
    config: DataConfig, *, class_names: tuple[str, ...] | None = None, require_labels: bool = True
) -> SourceTable:
    """Returns the rows of `config`'s source whose class is among `config.classes`.

    Args:
        config: which source, and what of it.
        class_names: the classes of a model; without them, those of the data.
        require_labels: a row without a label, or with one that isn't in `class_names`, is an error; else it gets -1.

    Raises:
        DataError: the source can't be read, is empty, or breaks a rule; one line that names rule, value and remedy.
    """
    table = SOURCES[config.source](config)
    if require_labels and "label" not in table.column_names:
        raise _no_labels(config, table)
    table = keep_classes(table, config.classes)
    if table.num_rows == 0:
        raise DataError(f"data={config.source.value}: no rows in {config.path}; give a source that holds some")
    if require_labels:
        check_all_labelled(table)
    labels, names = _label(table, class_names)
    if require_labels and class_names is not None:
        check_all_known(table, labels, names)
    columns = table.column_names
    return SourceTable(
        table=table,
        labels=labels,
        class_names=names,
        row_ids=_as_numpy(table["row_id"]),
        split=split_words(_as_numpy(table["split"])) if "split" in columns else None,
        groups=_groups(table) if "group" in columns else None,
        fingerprint=fingerprint(table),
    )


def _label(table: pa.Table, class_names: tuple[str, ...] | None) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    if "label" not in table.column_names:
        return np.full(table.num_rows, UNKNOWN, dtype=np.int64), class_names or ()
    if class_names is None:
        class_names = sorted_classes(pc.unique(table["label"]).drop_null().to_pylist())
    return to_integers(table["label"], class_names), class_names


def _groups(table: pa.Table) -> npt.NDArray[Any]:
    if table["group"].null_count:
        row = table["row_id"][pc.index(pc.is_null(table["group"]), value=True).as_py()].as_py()
        raise DataError(f"row {row} has no group; fill in the column that data.group names, or leave data.group out")
    return _as_numpy(table["group"])


def _as_numpy(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    if pa.types.is_integer(column.type):
        return np.asarray(column.to_numpy())
    return np.array([value or "" for value in column.to_pylist()], dtype=np.str_)


def _no_labels(config: DataConfig, table: pa.Table) -> DataError:
    if config.source is Source.image_folder:
        return DataError(
            f"data.path={config.path}: the folder has no class folders; put the images of each class into one, "
            "as CLASS/NAME.png"
        )
    known = table.schema.metadata[b"columns"].decode().split("\n")
    return missing_column("data.label", config.label, known)
