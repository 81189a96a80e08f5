"""A CSV file with a header line, or a folder of them; images are paths relative to their file's folder."""

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds

from graftstack.config.schema import DataConfig
from graftstack.data.sources.tabular import read_files


def read(config: DataConfig) -> pa.Table:
    """Returns the rows; labels, splits and groups are text, as written: ``01`` isn't ``1``."""
    as_text = [config.image, config.label, config.split, config.group]
    options = pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in as_text if name is not None})
    return read_files(config, ds.CsvFileFormat(convert_options=options), ".csv")
