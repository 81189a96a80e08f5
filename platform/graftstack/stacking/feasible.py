"""Whether base models on images can be trained: each is built before anything is trained or written."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graftstack.config.plain import to_plain
from graftstack.data.splits import Rows, Splits
from graftstack.errors import BadInputError
from graftstack.stacking.folds import Folds
from graftstack.stacking.image_rows import ImageRows
from graftstack.stacking.probe_model import TapProbe, check_boundary
from graftstack.stacking.warm import lent_task
from graftstack.stacking.work import BaseModel

_NONE = np.empty(0, np.int64)


def check_backbones(bases: Sequence[BaseModel], images: ImageRows, folds: Folds, train: Rows) -> None:
    """Builds the training of each base model in the fold with the fewest rows; those of one backbone share it.

    Args:
        bases: Fine-tuned backbones and probes.
        images: All rows of the data.
        folds: Of the rows that train.
        train: Which those are, int64 [N].

    Raises:
        BadInputError: there is no such backbone, or it can't be trained on so few rows or with these settings.
    """
    fewest = min(folds.folds, key=lambda fold: len(fold.train))
    data = replace(images.data, splits=Splits(np.sort(train[fewest.train]), _NONE, _NONE))
    # One backbone is kept at a time.
    for base in sorted(bases, key=lambda base: json.dumps(to_plain(base.estimator.finetuning.backbone))):
        try:
            with lent_task(base.estimator.finetuning, data) as task:
                _ = task.phases
                if isinstance(base.estimator, TapProbe):
                    check_boundary(task)
        except BadInputError as error:
            raise type(error)(f"base model {base.name} {fewest.name}: {error}") from error
