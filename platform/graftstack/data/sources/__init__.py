"""Where images and labels come from: one function a source, ``DataConfig -> pa.Table``.

The columns of the table, one row an image, nothing decoded:

=========== ======================= =================================================================
`row_id`    int64 or string         position in the source, or relative path
`image`     binary                  the encoded image; and/or
`path`      string                  its file: relative to the folder of `data.path`, absolute, or a URI
`version`   string                  with `path`: the file's size and modification time or ETag
`label`     string                  the class; null where it isn't known, no column where none is
`split`     string, optional        as the source says it
`group`     string, optional        rows that belong together
others      any                     `data.features`
=========== ======================= =================================================================

A new source is one module here, one line in `SOURCES` and one member of `config.schema.Source`.
"""

from collections.abc import Callable

import pyarrow as pa

from graftstack.config.schema import DataConfig, Source
from graftstack.data.sources import csv, digits, image_folder, omniglot, parquet, torchvision

SOURCES: dict[Source, Callable[[DataConfig], pa.Table]] = {
    Source.digits: digits.read,
    Source.image_folder: image_folder.read,
    Source.parquet: parquet.read,
    Source.csv: csv.read,
    Source.torchvision: torchvision.read,
    Source.omniglot: omniglot.read,
}
