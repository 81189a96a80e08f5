"""Weights by name: torchvision's enums, and timm's own."""

import io
import logging
import pickle
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftstack.backbones.catalog import TIMM_PREFIX, family_of, is_timm
from graftstack.errors import WeightsError

_ENUM_NAME = re.compile(r"(\w+_Weights\.)?[A-Z][A-Z0-9_]*")
_NOT_TORCHVISION = {"cifar_resnet", "conv4", "timm"}


def is_published(spec: str) -> bool:
    """Whether `spec` is written like the name of published weights: DEFAULT, IMAGENET1K_V1, X_Weights.IMAGENET1K_V1."""
    return _ENUM_NAME.fullmatch(spec) is not None and not Path(spec).exists()


def read_published(name: str, spec: str) -> dict[str, Tensor]:
    """The state dict of published weights, downloaded or from the cache.

    Raises `WeightsError` for a name that doesn't exist and where the download fails, with the file to fetch.
    """
    return _read_timm(name, spec) if is_timm(name) else _read_torchvision(name, spec)


def torchvision_entry(name: str, spec: str) -> Any:
    """The member of torchvision's weights enum; raises `WeightsError` with the members that exist."""
    if family_of(name) in _NOT_TORCHVISION:
        raise WeightsError(f"backbone.weights={spec}: nobody publishes weights for {name} by name; use none, or a file")
    from torchvision.models import get_model_weights

    members = get_model_weights(name)
    prefix, _, member = spec.rpartition(".")
    if member in members.__members__ and prefix in ("", members.__name__):
        return members[member]
    known = ", ".join(members.__members__) or "none"
    raise WeightsError(f"backbone.weights={spec}: {name} has no such weights; use one of {known}")


def _read_torchvision(name: str, spec: str) -> dict[str, Tensor]:
    entry = torchvision_entry(name, spec)
    filename = entry.url.rpartition("/")[2]
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    remedy = f"put the file into {cache}/{filename}, or give backbone.weights=/path/to/{filename}"
    try:
        with redirect_stdout(io.StringIO()):  # torch.hub announces downloads there, amid what others parse
            state: dict[str, Tensor] = entry.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True
            )
    except OSError as error:  # URLError, HTTPError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise WeightsError(f"backbone.weights={spec}: can't download {entry.url} ({reason}); {remedy}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise WeightsError(
            f"backbone.weights={spec}: {cache}/{filename} is damaged, or not the file from {entry.url}; "
            "delete it and try again, or fetch it by hand"
        ) from error
    return state


def _read_timm(name: str, spec: str) -> dict[str, Tensor]:
    from graftstack.backbones.families.timm_models import pretrained_config

    config = pretrained_config(name)
    if spec != "DEFAULT":
        raise WeightsError(
            f"backbone.weights={spec}: weights of timm are part of the name; use DEFAULT with timm/NAME.TAG"
        )
    if not (config.hf_hub_id or config.url):
        raise WeightsError(f"backbone.weights={spec}: timm has no weights for {name}; use none, or a file")
    import timm

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each retry
    try:
        model = timm.create_model(name.removeprefix(TIMM_PREFIX), pretrained=True)
    except Exception as error:
        # Downloads raise the errors of several clients, which share no base class but this one.
        reason = str(error).strip().splitlines()[:1]
        raise WeightsError(
            f"backbone.weights={spec}: can't download {name} ({type(error).__name__}: {' '.join(reason)}); "
            f"fetch the file from {config.hf_hub_id or config.url} and give backbone.weights=/path/to/model.safetensors"
        ) from error
    state: dict[str, Tensor] = model.state_dict()
    return state
