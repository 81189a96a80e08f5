"""Puts pretrained weights into a backbone: everything is checked before anything changes."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from graftstack.backbones.backbone import Backbone
from graftstack.backbones.catalog import family_of
from graftstack.backbones.preprocessing import Preprocessing, preprocessing_of
from graftstack.backbones.published import is_published, read_published
from graftstack.backbones.registry import FAMILIES
from graftstack.backbones.weight_files import read_weights_file
from graftstack.errors import WeightsError

_PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")
_NUM_FAULTS_SHOWN = 3


class WeightsReport(NamedTuple):
    """What was loaded."""

    description: str
    """For people, e.g. ``resnet18 with IMAGENET1K_V1``."""
    preprocessing: Preprocessing
    head_loaded: bool
    """Whether the model's own head came with the weights."""
    skipped_head: str | None = None
    """Why it did not, if there was one to load or one was missing."""


def load_weights(backbone: Backbone, spec: str, *, keep_head: bool = False) -> WeightsReport:
    """Loads the weights that `spec` names into `backbone`, or raises and leaves it as it was.

    Args:
        backbone: Gets the weights in place; its dtype and device stay.
        spec: `none`; the name of published weights (DEFAULT, IMAGENET1K_V1, ResNet18_Weights.IMAGENET1K_V1); or a
            file, as a local path or an fsspec URI.
        keep_head: The weights must bring the model's own head, of the size that `backbone` has. Otherwise a head of
            another size, or none, is skipped and reported.

    Raises:
        WeightsError: The weights can't be had, can't be trusted, are damaged, or are made for another architecture.
    """
    preprocessing = preprocessing_of(backbone.name, spec)
    if spec == "none":
        if keep_head:
            raise WeightsError("backbone.weights=none: brings no head to keep; give weights, or keep_head=false")
        return WeightsReport(f"{backbone.name} with random weights", preprocessing, head_loaded=False)
    found = read_published(backbone.name, spec) if is_published(spec) else read_weights_file(spec)
    expected: dict[str, Tensor] = backbone.model.state_dict()
    given = _by_own_names(found, backbone.name, expected)
    body = {key: tensor for key, tensor in expected.items() if not backbone.is_head_key(key)}
    head = {key: tensor for key, tensor in expected.items() if backbone.is_head_key(key)}
    given_head = {key: tensor for key, tensor in given.items() if backbone.is_head_key(key)}
    given_body = {key: tensor for key, tensor in given.items() if key not in given_head}

    _require_fit(spec, backbone.name, given_body, body)
    head_fault = next(_faults(given_head, head), None)
    if head_fault is not None:
        if keep_head:
            raise WeightsError(
                f"backbone.weights={spec}: its head can't be kept: {head_fault}; "
                "use keep_head=false, or weights trained for these classes"
            )
        given_head = {}
    loaded = {key: tensor for key, tensor in {**given_body, **given_head}.items() if key in expected}
    _require_finite(spec, loaded)

    # Copied by hand: load_state_dict may convert old layouts module by module, and so fail half-way.
    with torch.no_grad():
        for key, tensor in loaded.items():
            expected[key].copy_(tensor)
    return WeightsReport(f"{backbone.name} with {spec}", preprocessing, bool(given_head), head_fault)


def hash_state(state: Mapping[str, Tensor]) -> str:
    """A hash of what a state dict holds, independent of its order and device: names, dtypes, shapes and bytes.

    Counters are left out: they don't affect what a model computes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(state.items()):
        if _is_counter(key):
            continue
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def _by_own_names(found: Mapping[str, Tensor], name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reading of `found` that shares most names with the model; of equals, the one least stripped."""
    current_name = FAMILIES[family_of(name)].current_name
    named = {current_name(key): tensor for key, tensor in found.items()}
    return max(_readings(named), key=lambda reading: len(reading.keys() & expected.keys()))


def _readings(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """`state` as it is, then with each prefix that occurs in it stripped, again and again.

    What lies beside a stripped prefix (the head of a graft, a loss) is no part of the model and is left out.
    """
    yield state
    for prefix in _PREFIXES:
        inner = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        if inner:
            yield from _readings(inner)


def _require_fit(spec: str, name: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    faults = list(_faults(given, expected))
    if faults:
        shown = "; ".join(faults[:_NUM_FAULTS_SHOWN])
        more = f"; and {len(faults) - _NUM_FAULTS_SHOWN} more" if len(faults) > _NUM_FAULTS_SHOWN else ""
        raise WeightsError(
            f"backbone.weights={spec}: made for another architecture than {name}: {shown}{more}; "
            f"give weights of {name}, or the backbone they were made for"
        )


def _faults(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """What keeps `given` from being loaded where `expected` is: shapes first, then missing and unknown names."""
    for key in sorted(given.keys() & expected.keys()):
        there, here = given[key], expected[key]
        if there.shape != here.shape:
            yield f"{key} is {list(there.shape)} there and {list(here.shape)} here"
        elif there.is_floating_point() != here.is_floating_point():
            yield f"{key} is {there.dtype} there and {here.dtype} here"
        elif there.is_meta or there.layout != torch.strided:
            yield f"{key} is a {'meta' if there.is_meta else 'sparse'} tensor there and a dense one here"
    for key in sorted(expected.keys() - given.keys()):
        if not _is_counter(key):
            yield f"{key} is missing there and {list(expected[key].shape)} here"
    for key in sorted(given.keys() - expected.keys()):
        if not _is_counter(key):
            yield f"{key} is {list(given[key].shape)} there and missing here"


def _is_counter(key: str) -> bool:
    """Counts of batches or averages don't affect what a model computes; old files lack them, averaged ones add one."""
    return key.endswith("num_batches_tracked") or key == "n_averaged"


def _require_finite(spec: str, state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if not torch.isfinite(tensor.float()).all():
            raise WeightsError(
                f"backbone.weights={spec}: {key} holds NaN or infinite values; use weights saved before that happened"
            )
