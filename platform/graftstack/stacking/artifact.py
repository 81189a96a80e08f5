"""The model that a stack leaves: base models, meta-model, and ``stack.json``, which says how they fit together.

scikit-learn's models lie there through skops, backbones as safetensors; nothing in it is a pickle.
"""

import json
from dataclasses import asdict, dataclass
from pkgutil import resolve_name
from typing import Any

from graftstack.errors import RunError, TrainingError
from graftstack.reason import reason
from graftstack.stacking.bag import FoldBag
from graftstack.stacking.fitting import StackTask
from graftstack.stacking.model import Member, Passthrough, StackModel
from graftstack.stacking.model_file import UnstorableError, model_bytes, model_of
from graftstack.stacking.schema import TableSchema
from graftstack.storage import Folder

CARD = "stack.json"

_BASES, _META, _ENCODER, _MODEL = "bases", "meta.skops", "passthrough.skops", "model.skops"

# What kinds of base models lie in a folder: one through skops, one for each fold, or what saves itself.
_SKOPS, _BAG = "skops", "bag"
_OWN = {
    "FinetunedBackbone": "graftstack.stacking.backbone_model:FinetunedBackbone",
    "TapProbe": "graftstack.stacking.probe_model:TapProbe",
}


@dataclass(frozen=True, kw_only=True)
class StackCard:
    """What is needed to put a stack together again and to feed it."""

    class_names: list[str]
    """Empty for a regression."""
    levels: list[list[dict[str, Any]]]
    """`name`, `method`, `view` and `kind` of each base model; of a bag, the kinds of its models."""
    passthrough_view: str | None
    schema: dict[str, Any] | None
    """Of the table that base models learn from."""
    image_size: int | None
    """Height and width in pixels of the images that they learn from."""
    num_channels: int | None
    """Of the pixels that they learn from."""

    @property
    def table_schema(self) -> TableSchema | None:
        """The columns of the table."""
        return None if self.schema is None else TableSchema.from_plain(self.schema)


def save_stack(folder: Folder, task: StackTask, model: StackModel) -> None:
    """Writes a stack, its card last, so that a folder with a card is whole.

    Raises:
        TrainingError: a base model can't be stored.
        StorageFullError, RunError: the folder can't be written.
    """
    levels = [
        [{**_facts(member), "kind": _save(folder / _BASES / member.name, member)} for member in level]
        for level in model.levels
    ]
    folder.write(_META, _bytes("the meta-model", model.meta))
    if model.passthrough and model.passthrough.encoder is not None:
        folder.write(_ENCODER, _bytes("the encoder of columns", model.passthrough.encoder))
    views = task.data.views
    card = StackCard(
        class_names=list(task.data.class_names),
        levels=levels,
        passthrough_view=model.passthrough.view if model.passthrough else None,
        schema=None if task.data.schema is None else task.data.schema.as_plain(),
        image_size=views["images"].image_size if "images" in views else None,
        num_channels=views["pixels"].num_channels if "pixels" in model.views else None,
    )
    folder.write(CARD, json.dumps(asdict(card), indent=2).encode())


def read_card(folder: Folder) -> StackCard:
    """Returns the card of a stack's model folder. Raises `RunError`."""
    try:
        return StackCard(**json.loads(folder.read(CARD)))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{folder.location}: holds no readable {CARD}; give the folder of a finished stack") from error


def load_stack(folder: Folder) -> StackModel:
    """Returns the stack that `save_stack` wrote. Raises `RunError` for one that is damaged."""
    card = read_card(folder)
    try:
        passthrough = None
        if card.passthrough_view is not None:
            encoder = model_of(folder.read(_ENCODER)) if folder.exists(_ENCODER) else None
            passthrough = Passthrough(card.passthrough_view, encoder)
        return StackModel(
            levels=tuple(tuple(_member(folder, facts) for facts in level) for level in card.levels),
            meta=model_of(folder.read(_META)),
            num_classes=len(card.class_names),
            passthrough=passthrough,
        )
    except (OSError, UnstorableError, KeyError) as error:
        raise RunError(f"{folder.location}: damaged or cut short ({reason(error)}); run the stack again") from error


def _facts(member: Member) -> dict[str, Any]:
    return {"name": member.name, "method": member.method, "view": member.view}


def _member(folder: Folder, facts: dict[str, Any]) -> Member:
    model = _load(folder / _BASES / facts["name"], facts["kind"])
    return Member(facts["name"], model, facts["method"], facts["view"])


def _save(folder: Folder, member: Member) -> Any:
    """Writes a fitted base model and returns its kind."""
    model = member.model
    if isinstance(model, FoldBag):
        parts = (member._replace(model=part) for part in model.models)
        return {_BAG: [_save(folder / f"fold-{index}", part) for index, part in enumerate(parts)]}
    kind = type(model).__name__
    if kind in _OWN:
        model.save_to(folder)
        return kind
    folder.write(_MODEL, _bytes(f"base model {member.name}", model))
    return _SKOPS


def _load(folder: Folder, kind: Any) -> Any:
    if isinstance(kind, dict):
        return FoldBag([_load(folder / f"fold-{index}", part) for index, part in enumerate(kind[_BAG])])
    if kind in _OWN:
        return resolve_name(_OWN[kind]).load_from(folder)
    return model_of(folder.read(_MODEL))


def _bytes(what: str, model: Any) -> bytes:
    try:
        return model_bytes(model)
    except UnstorableError as error:
        raise TrainingError(f"{what}: {error}; use another estimator") from error
