"""Predictions as an Arrow table: the form that is kept, compared and stacked."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from graftstack.data.load import ImageData


def prediction_table(logits: Tensor, data: ImageData, rows: np.ndarray) -> pa.Table:
    """Returns one row for each of `rows`, in their order.

    Columns: `row_id`; `label` (the true class, null where unknown); `prediction` (a class name); `probability` (of the
    prediction); `probabilities` (list, in the order of the classes, which the schema's metadata names).

    Args:
        logits: fp32, [len(rows), num_classes].
        data: where the rows, their labels and the class names come from.
        rows: int64 indices into `data`.
    """
    return probability_table(logits.softmax(dim=1).numpy(), data.labels[rows], data.row_ids[rows], data.class_names)


def probability_table(
    probabilities: npt.NDArray[Any],
    labels: npt.NDArray[np.int64],
    row_ids: npt.NDArray[Any],
    class_names: Sequence[str],
) -> pa.Table:
    """Returns the same table for probabilities [N, num_classes], labels (-1: unknown) and ids of rows [N]."""
    names = np.asarray(class_names, dtype=object)
    table = pa.table(
        {
            "row_id": pa.array(row_ids),
            "label": pa.array([None if label < 0 else names[label] for label in labels], pa.string()),
            "prediction": pa.array(names[probabilities.argmax(axis=1)], pa.string()),
            "probability": pa.array(probabilities.max(axis=1)),
            "probabilities": pa.FixedSizeListArray.from_arrays(pa.array(probabilities.ravel()), len(names)),
        }
    )
    return table.replace_schema_metadata({f"class_{index}": name for index, name in enumerate(class_names)})


def parquet_bytes(table: pa.Table) -> bytes:
    """Returns `table` as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
