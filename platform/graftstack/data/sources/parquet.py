"""A parquet file, or a folder of them."""

import pyarrow as pa
import pyarrow.dataset as ds

from graftstack.config.schema import DataConfig
from graftstack.data.sources.tabular import read_files


def read(config: DataConfig) -> pa.Table:
    """Returns the rows; images are bytes, structs of bytes and path, or paths relative to their file's folder."""
    return read_files(config, ds.ParquetFileFormat(), ".parquet")
