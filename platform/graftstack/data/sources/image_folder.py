"""A folder of image files, named by class: ``PATH/CLASS/*.png`` or ``PATH/{train,val,test}/CLASS/*.png``."""

from collections.abc import Sequence

import pyarrow as pa

from graftstack.config.schema import DataConfig
from graftstack.data.location import locate, version
from graftstack.data.splits import SPLIT_WORDS
from graftstack.errors import DataError

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".avif"}
)


def read(config: DataConfig) -> pa.Table:
    """Returns the images below `config.path`, at any depth, in the order of their relative paths.

    The first folder is the class. Where all first folders are called train, val, valid, validation, dev or test,
    they are the splits, and the second is the class. Hidden files, and files that aren't images, are left out.
    Images that lie in no class folder have no label.
    """
    location = locate(str(config.path))
    if location.is_file:
        raise DataError(f"data.path={config.path}: a file, not a folder; data=image_folder needs a folder of images")
    files = location.find(SUFFIXES)
    if not files:
        raise DataError(
            f"data.path={config.path}: the folder holds no images ({', '.join(sorted(SUFFIXES))}); "
            "add some, as CLASS/NAME.png"
        )
    parts = [path.split("/") for path in files]
    has_splits = all(folders and folders[0].lower() in SPLIT_WORDS for *folders, _ in parts)
    depth = 1 if has_splits else 0
    columns = {
        "row_id": pa.array(files, pa.string()),
        "path": pa.array(files, pa.string()),
        "version": pa.array([version(info) for info in files.values()], pa.string()),
    }
    labels = [_folder(folders, depth) for *folders, _ in parts]
    if any(label is not None for label in labels):
        columns["label"] = pa.array(labels, pa.string())
    if has_splits:
        columns["split"] = pa.array([folders[0] for folders in parts], pa.string())
    return pa.table(columns)


def _folder(folders: Sequence[str], depth: int) -> str | None:
    return folders[depth] if len(folders) > depth else None
