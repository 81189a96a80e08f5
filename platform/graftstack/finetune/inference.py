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

# Without gradients there is room for larger batches than in training: so many images, or fewer where they are large.
_BATCH_SIZE, _BATCH_PIXELS = 256, 256 * 64 * 64


@torch.no_grad()
def predict_logits(
    model: GraftedModel, data: ImageData, rows: np.ndarray, preprocessing: Preprocessing, worker: Worker
) -> Tensor:
    """Returns the logits of `rows`, each rank computing its share: fp32, [len(rows), num_classes], on the CPU."""
    model.eval()
    mine = shard(rows, rank=worker.rank, world_size=worker.world_size)
    num = max(1, min(_BATCH_SIZE, _BATCH_PIXELS // preprocessing.image_size**2))
    pieces = [
        model(normalize(data.images.batch(mine[start : start + num]), preprocessing, worker.device)).float()
        for start in range(0, len(mine), num)
    ]
    num_classes = len(data.class_names)
    return worker.gather(torch.cat(pieces) if pieces else torch.empty(0, num_classes, device=worker.device))
