"""Predicting and evaluating with the stack of a finished run."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa

from graftstack.config.schema import DataConfig
from graftstack.config.stack import FoldKind
from graftstack.errors import BadInputError, DataError
from graftstack.finetune.predictions import probability_table
from graftstack.machine import usable_cpus
from graftstack.runs import Run
from graftstack.stacking.artifact import StackCard, load_stack, read_card
from graftstack.stacking.data import StackData, load_stack_data
from graftstack.stacking.fitting import taken
from graftstack.stacking.scores import metrics_of
from graftstack.storage import Folder

Reading = Callable[[int, int], None]


def predict_stack(run: Run, data: DataConfig, *, base: str | None = None, progress: Reading | None = None) -> pa.Table:
    """Returns a prediction for every row of `data`, whatever its label, if any.

    For classes the table is as `probability_table` makes it; for a regression its columns are `row_id`, `label` (null
    where it isn't known) and `prediction`.

    Args:
        run: With a stack.
        data: Rows with the columns, or the images, that it learnt from.
        base: The base model that is to predict alone; None: the stack.
        progress: Told how many images are decoded, of all.

    Raises:
        BadInputError: the run has no model, the data can't be read or isn't what the stack learnt from, or there is no
            such base model.
    """
    folder = Folder(run.artifact("model"))
    card, stack = read_card(folder), load_stack(folder)
    rows = _rows(card, replace(data, classes=[]), seed=0, require_labels=False, progress=progress)
    if base is None:
        predictions = stack.predict(rows.views, num_workers=usable_cpus())
    else:
        predictions = stack.predict_with(base, rows.views)
    if card.class_names:
        return probability_table(predictions, rows.y, rows.row_ids, card.class_names)
    labels = pa.array(rows.y, from_pandas=True)  # NaN is null
    return pa.table({"row_id": pa.array(rows.row_ids), "label": labels, "prediction": pa.array(predictions)})


def evaluate_stack(run: Run, data: DataConfig, *, part: str, progress: Reading | None = None) -> dict[str, float]:
    """Returns the metrics of a stack on the train, val or test part of labelled data, or on all; and `num_rows`.

    Raises:
        BadInputError: as `predict_stack`, or the part is empty.
    """
    folder = Folder(run.artifact("model"))
    card = read_card(folder)
    config = run.manifest.config
    is_in_order = config["folds"]["kind"] == FoldKind.time.value
    rows = _rows(card, data, seed=config["seed"], require_labels=True, last_validate=is_in_order, progress=progress)
    chosen = np.arange(len(rows)) if part == "all" else getattr(rows.splits, part)
    if not len(chosen):
        raise DataError(f"--split {part}: holds no rows; use train, val, test or all")
    y = rows.y[chosen]
    if not card.class_names and np.isnan(y).any():
        raise BadInputError(f"data.label={data.label}: some rows have no target; label them, or remove them")
    stack = load_stack(folder)
    views = {name: taken(view, chosen) for name, view in rows.views.items() if name in stack.views}
    found = stack.predict(views, num_workers=usable_cpus())
    return metrics_of(found, y, len(card.class_names)) | {"num_rows": len(chosen)}


def _rows(
    card: StackCard,
    data: DataConfig,
    *,
    seed: int,
    require_labels: bool,
    last_validate: bool = False,
    progress: Reading | None,
) -> StackData:
    return load_stack_data(
        data,
        seed=seed,
        last_validate=last_validate,
        image_size=card.image_size,
        class_names=tuple(card.class_names),
        require_labels=require_labels,
        schema=card.table_schema,
        num_channels=card.num_channels,
        progress=progress,
    )
