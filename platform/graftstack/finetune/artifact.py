"""The model that a run leaves: ``model.safetensors`` and ``model.json``; nothing in it is a pickle.

Tensor names are ``backbone.NAME`` and ``head.NAME``, where NAME is what the backbone's own library calls it.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, get_origin

from torch import Tensor

from graftstack.backbones.preprocessing import Preprocessing
from graftstack.backbones.registry import build
from graftstack.errors import WeightsError
from graftstack.finetune.model import GraftedModel, graft
from graftstack.storage import Folder

WEIGHTS = "model.safetensors"
CARD = "model.json"
TRAINED = "trained.safetensors"
"""What a training changed of a model whose frozen groups are still to be had elsewhere."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is needed to build the model again and to feed it."""

    backbone: str
    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    freeze_depth: int
    keeps_head: bool
    """Whether the head is the backbone's own, or a new linear layer."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are brought into the form that the model takes."""
        return Preprocessing(self.image_size, self.mean, self.std)


def save_model(folder: Folder, model: GraftedModel, card: ModelCard) -> None:
    """Writes the weights, then the card, so that a folder with a card is whole."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.named_state().items()}
    folder.write(WEIGHTS, save(tensors))
    folder.write(CARD, json.dumps(asdict(card), indent=2).encode())


def read_card(folder: Folder) -> ModelCard:
    """Returns the card of a model folder. Raises `WeightsError`."""
    try:
        card = ModelCard(**json.loads(folder.read(CARD), object_hook=_with_tuples))
        _check_types(card)
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{folder.location}: holds no readable {CARD}; give the folder of a finished run") from error
    return card


def load_model(folder: Folder) -> tuple[GraftedModel, ModelCard]:
    """Returns the model of a run, in eval mode on the CPU, and its card. Raises `WeightsError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    card = read_card(folder)
    num_classes = len(card.class_names)
    own_classes = num_classes if card.keeps_head else None
    backbone = build(card.backbone, num_classes=own_classes, image_size=card.image_size)
    model = graft(backbone, num_classes=num_classes, keep_head=card.keeps_head, seed=0)
    try:
        model.load_named_state(load(folder.read(WEIGHTS)))
    except OSError as error:
        raise WeightsError(f"{folder.path(WEIGHTS)}: can't be read ({error.strerror}); train the run again") from error
    except SafetensorError as error:
        raise WeightsError(f"{folder.path(WEIGHTS)}: damaged or cut short ({error}); train the run again") from error
    except (ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{folder.path(WEIGHTS)}: not the model that {CARD} says, {card.backbone} for {num_classes} classes; "
            "train the run again"
        ) from error
    return model.eval(), card


def save_trained(folder: Folder, model: GraftedModel, *, above: int) -> None:
    """Writes what training changed of a model: all but its first `above` groups, which are the backbone's own."""
    from safetensors.torch import save

    state = model.named_state(above=above)
    folder.write(TRAINED, save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}))


def read_trained(folder: Folder) -> dict[str, Tensor]:
    """Returns what `save_trained` wrote, as `GraftedModel.load_named_state` takes it. Raises `WeightsError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(folder.read(TRAINED))
    except OSError as error:
        raise WeightsError(f"{folder.path(TRAINED)}: can't be read ({error.strerror}); train it again") from error
    except SafetensorError as error:
        raise WeightsError(f"{folder.path(TRAINED)}: damaged or cut short ({error}); train it again") from error


def _check_types(card: ModelCard) -> None:
    """Raises `TypeError` where a value that was read isn't of its field's type."""
    for item in fields(ModelCard):
        value = getattr(card, item.name)
        if not isinstance(value, get_origin(item.type) or item.type):  # type: ignore[arg-type]
            raise TypeError(f"{item.name}: {value!r}")


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
