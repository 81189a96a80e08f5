"""What a meta-training leaves: a backbone that any run can begin with, and what the method needs beside it.

``model.safetensors`` and ``model.json`` are those of any model: the backbone and how it sees images. ``meta.json`` says
how the method learns, and ``meta.safetensors`` holds its other meta-parameters. Nothing in them is a pickle.
"""

import json
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from graftstack.config.meta import MetaConfig
from graftstack.config.plain import from_plain, to_plain
from graftstack.errors import ConfigError, WeightsError
from graftstack.finetune.artifact import CARD, WEIGHTS, ModelCard, read_card
from graftstack.meta.model import MetaModel, MetaState
from graftstack.meta.network import Params
from graftstack.reason import reason
from graftstack.storage import Folder

META_CARD, META_WEIGHTS = "meta.json", "meta.safetensors"

_BACKBONE = "backbone."


class LoadedMeta(NamedTuple):
    """A trained method, ready to learn new classes."""

    model: MetaModel
    params: Params
    statistics: Params
    card: ModelCard


def save_meta(folder: Folder, model: MetaModel, state: MetaState, card: ModelCard) -> None:
    """Writes the weights, then the cards, so that a folder with a meta card is whole."""
    from safetensors.torch import save

    params, statistics = model.parameters(state), model.statistics(state)
    learnt = {name: tensor for name, tensor in params.items() if name.startswith(_BACKBONE)}
    backbone = learnt | statistics | model.network.constants()  # all that its own library stores
    others = {name: tensor for name, tensor in params.items() if not name.startswith(_BACKBONE)}
    for name, tensors in ((WEIGHTS, backbone), (META_WEIGHTS, others)):
        folder.write(name, save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}))
    folder.write(CARD, json.dumps(asdict(card), indent=2).encode())
    about = {"config": to_plain(model.config), "num_classes": len(card.class_names)}
    folder.write(META_CARD, json.dumps(about, indent=2).encode())


def load_meta(folder: Folder) -> LoadedMeta:
    """Returns the method of a finished run, on the CPU. Raises `WeightsError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    card = read_card(folder)
    try:
        about: dict[str, Any] = json.loads(folder.read(META_CARD))
        config = from_plain(MetaConfig, about["config"])
        model = MetaModel(
            config, image_size=card.image_size, num_classes=about["num_classes"], device=torch.device("cpu")
        )
        tensors = load(folder.read(WEIGHTS)) | load(folder.read(META_WEIGHTS))
        state = model.pack(tensors, tensors)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, ConfigError) as error:
        raise WeightsError(
            f"{folder.location}: holds no whole method of meta-learning ({reason(error)}); give the folder of a "
            "finished run"
        ) from error
    return LoadedMeta(model, model.parameters(state), model.statistics(state), card)
