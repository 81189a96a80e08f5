"""Running a model over images without training it."""

import numpy as np
import torch
from torch import Tensor

from graftstack.data.batches import shard
from graftstack.finetune.inputs import Inputs
from graftstack.finetune.model import GraftedModel
from graftstack.runtime import Worker

# So many images, or fewer where they are large. On a CPU more at once are slower: they leave its caches between layers.
_BATCH_SIZE, _BATCH_PIXELS = 128, 256 * 64 * 64


def inference_batch_size(image_size: int) -> int:
    """Returns how many images of `image_size` pixels go through a model at once where nothing trains."""
    return max(1, min(_BATCH_SIZE, _BATCH_PIXELS // image_size**2))


@torch.no_grad()
def predict_logits(
    model: GraftedModel, inputs: Inputs, rows: np.ndarray, worker: Worker, *, image_size: int, num_classes: int
) -> Tensor:
    """Returns the logits of `rows`, each rank computing its share: fp32, [len(rows), num_classes], on the CPU."""
    model.eval()
    mine = shard(rows, rank=worker.rank, world_size=worker.world_size)
    num = inference_batch_size(image_size)
    pieces = [
        model(inputs.prepared(inputs.plain(mine[start : start + num]), worker.device), inputs.boundary).float()
        for start in range(0, len(mine), num)
    ]
    return worker.gather(torch.cat(pieces) if pieces else torch.empty(0, num_classes, device=worker.device))
