"""What parquet and csv share: files become one Arrow table, and its columns get the names that `sources` promises."""

import posixpath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

from graftstack.config.schema import DataConfig
from graftstack.data.labels import class_column
from graftstack.data.location import Location, locate
from graftstack.errors import DataError, did_you_mean
from graftstack.reason import reason
from graftstack.storage import is_uri

_FILE = "__filename"  # pyarrow's name for the column that says which file a row comes from

OWN_COLUMNS = frozenset({"row_id", "image", "path", "version", "label", "split", "group"})
"""Names of columns that no feature can have: `sources` gives them to what has another use."""


def read_files(config: DataConfig, file_format: Any, suffix: str) -> pa.Table:
    """Returns the rows of a file, or of all files with `suffix` below a folder in the order of their names.

    Raises:
        DataError: a file isn't in the format, a column is missing, or its type can't serve.
    """
    location = locate(str(config.path))
    dataset = _open(config, location, file_format, suffix)
    columns = _columns(config, dataset.schema.names)
    try:
        table = dataset.to_table(columns=[*columns, _FILE])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(config, error) from error
    return _normalise(config, table, location).replace_schema_metadata({"columns": "\n".join(dataset.schema.names)})


class MissingColumnError(DataError):
    """A key names a column that isn't there."""

    key: str
    known: list[str]
    """The columns that are there."""


def missing_column(key: str, name: str, known: list[str]) -> MissingColumnError:
    """Returns the error for a column that isn't there."""
    hint = did_you_mean(name, known)
    listed = "" if hint.startswith("known") else f" ({did_you_mean('', known)})"
    error = MissingColumnError(f"{key}={name}: no such column; {hint}{listed}")
    error.key, error.known = key, known
    return error


def _open(config: DataConfig, location: Location, file_format: Any, suffix: str) -> Any:
    if location.is_file:
        files = [location.path]
    else:
        files = [location.full(path) for path in location.find(frozenset({suffix}))]
    if not files:
        raise DataError(f"data.path={config.path}: the folder holds no {suffix} files; add some, or name one file")
    is_local = "file" in np.atleast_1d(location.fs.protocol)
    filesystem = LocalFileSystem() if is_local else PyFileSystem(FSSpecHandler(location.fs))
    try:
        return ds.dataset(files, format=file_format, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(config, error) from error


def _columns(config: DataConfig, known: list[str]) -> list[str]:
    """Returns the columns to read: those that keys name; the label only if it is there."""
    wanted = {"data.image": config.image, "data.split": config.split, "data.group": config.group}
    named = [(key, name) for key, name in wanted.items() if name is not None]
    if config.label in known:
        named.append(("data.label", config.label))
    for key, name in named:
        if name in config.drop:
            raise DataError(f"data.drop={name}: {key} uses this column; take it out of one of them")
    if config.label in config.features:
        raise DataError(f"data.features={config.label}: data.label uses this column; take it out of one of them")
    named += [("data.features", name) for name in _features(config, known)]
    for key, name in [*named, *(("data.drop", name) for name in config.drop)]:
        if name not in known:
            raise missing_column(key, name, known)
    return list(dict.fromkeys(name for _, name in named))


def _features(config: DataConfig, known: list[str]) -> list[str]:
    """Returns the columns to learn from: those that are named, or, without images, all that have no other use."""
    if config.features or config.image is not None:
        return [name for name in config.features if name not in config.drop]
    used = {config.label, config.split, config.group, *config.drop}
    return [name for name in known if name not in used]


def _normalise(config: DataConfig, table: pa.Table, location: Location) -> pa.Table:
    columns: dict[str, Any] = {"row_id": pa.array(np.arange(table.num_rows))}
    if config.image is not None:
        columns |= _images(config, table, location)
    if config.label in table.column_names:
        columns["label"] = class_column(table[config.label], f"data.label={config.label}")
    if config.split is not None:
        columns["split"] = class_column(table[config.split], f"data.split={config.split}")
    if config.group is not None:
        columns["group"] = class_column(table[config.group], f"data.group={config.group}")
    for name in _features(config, [name for name in table.column_names if name != _FILE]):
        columns[name] = _feature(name, table[name])
    return pa.table(columns)


def _feature(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if name in OWN_COLUMNS:
        raise DataError(
            f"data.features={name}: the name is taken for another use; rename the column, or add data.drop=[{name}]"
        )
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind) or _holds_bytes(kind):
        raise DataError(
            f"data.features={name}: values of type {kind} are neither numbers nor text; add data.drop=[{name}], "
            f"or data.image={name} if they are images"
        )
    return column


def _images(config: DataConfig, table: pa.Table, location: Location) -> dict[str, Any]:
    column = table[config.image]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_struct(kind):  # as the `datasets` library of Hugging Face stores images
        fields = {field.name: pc.struct_field(column, field.name) for field in kind}
        content, paths = fields.get("bytes"), fields.get("path")
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        content, paths = None, column
    else:
        content, paths = column, None
    images: dict[str, Any] = {}
    if content is not None and content.null_count < len(content):
        if not _holds_bytes(content.type):
            raise DataError(
                f"data.image={config.image}: values of type {content.type} aren't images; "
                "use a column of encoded images (bytes), or of paths to them"
            )
        images["image"] = content
    # Where the bytes are there, a path beside them is but a name; it need not exist.
    if paths is not None and (content is None or content.null_count):
        images["path"] = _relative_paths(paths.cast(pa.string()), table[_FILE], location)
        images["version"] = pa.array(location.versions([path or "" for path in images["path"].to_pylist()]))
    return images or {"image": pa.nulls(table.num_rows, pa.binary())}


def _holds_bytes(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _relative_paths(paths: pa.ChunkedArray, files: pa.ChunkedArray, location: Location) -> pa.Array:
    """Paths are relative to the file that holds them; from here on, to the folder of `data.path`."""
    folders = {file: posixpath.dirname(location.relative(file)) for file in pc.unique(files).to_pylist()}
    return pa.array(
        [
            path if path is None or is_uri(path) else posixpath.join(folders[file], path)
            for path, file in zip(paths.to_pylist(), files.to_pylist(), strict=True)
        ],
        pa.string(),
    )


def _unreadable(config: DataConfig, error: Exception) -> DataError:
    return DataError(
        f"data.path={config.path}: can't be read as {config.source.value}: {reason(error)}; check the file, or data=..."
    )
