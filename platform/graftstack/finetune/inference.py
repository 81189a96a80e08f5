"""Running a model over images without training it."""

import numpy as np
import torch
from torch import Tensor

from graftstack.backbones.preprocessing import Preprocessing
from graftstack.data.batches import shard
from graftstack.data.load import ImageData
from graftstack.finetune.batches import normalize
from graftstack.finetune.model import GraftedModel
from graftstack.runtime import Worker

# Without gradients there is room for larger batches; more than this is no faster on any device measured.
_BATCH_SIZE = 256


@torch.no_grad()
def predict_logits(
    model: GraftedModel, data: ImageData, rows: np.ndarray, preprocessing: Preprocessing, worker: Worker
) -> Tensor:
    """Returns the logits of `rows`, each rank computing its share: fp32, [len(rows), num_classes], on the CPU."""
    model.eval()
    mine = shard(rows, rank=worker.rank, world_size=worker.world_size)
    pieces = [
        model(normalize(data.images.batch(mine[start : start + _BATCH_SIZE]), preprocessing, worker.device)).float()
        for start in range(0, len(mine), _BATCH_SIZE)
    ]
    num_classes = len(data.class_names)
    return worker.gather(torch.cat(pieces) if pieces else torch.empty(0, num_classes, device=worker.device))
