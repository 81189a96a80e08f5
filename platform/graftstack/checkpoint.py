"""Checkpoints that are atomic and verified: a damaged or half-written one is never loaded."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from graftstack.storage import Folder

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """The state of a training after `step` steps."""

    step: int
    tensors: "dict[str, Tensor]"
    meta: dict[str, Any]
    """Plain JSON values."""


class CheckpointStore:
    """The newest `num_to_keep` checkpoints of a folder, each a pair of files.

    ``step-N.safetensors`` is written first and ``step-N.json``, which holds the digest of both, last; only a pair that
    agrees counts. So a kill at any moment, or a full disk, leaves the last good checkpoint as it was.
    """

    def __init__(self, folder: Folder, *, num_to_keep: int) -> None:
        self.folder = folder
        self.num_to_keep = num_to_keep

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes `checkpoint`, then removes those that are too many. Raises `StorageFullError`."""
        from safetensors.torch import save

        stem = _stem(checkpoint.step)
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()})
        header: dict[str, Any] = {"step": checkpoint.step, "meta": checkpoint.meta}
        header["sha256"] = _digest(content, header)
        self.folder.write(f"{stem}.safetensors", content)
        self.folder.write(f"{stem}.json", json.dumps(header).encode())
        names = self.folder.names()
        stems = _stems(names)
        # Newer ones are damaged, else training would have begun there: they don't count.
        kept = set(stems[: stems.index(stem) + self.num_to_keep])
        for name in names:  # a header, which makes its checkpoint count, comes before its tensors
            if name.startswith("step-") and name.partition(".")[0] not in kept:
                self.folder.remove(name)

    def latest(self) -> Checkpoint | None:
        """Returns the newest checkpoint that verifies, or None. Raises `OSError` where the folder can't be read."""
        return next(filter(None, map(self._verified, _stems(self.folder.names()))), None)

    def load(self, step: int) -> Checkpoint | None:
        """Returns the checkpoint after `step` steps if it is there and verifies, or None."""
        stem = _stem(step)
        return self._verified(stem) if stem in _stems(self.folder.names()) else None

    def _verified(self, stem: str) -> Checkpoint | None:
        from safetensors.torch import load

        try:
            header = json.loads(self.folder.read(f"{stem}.json"))
            content = self.folder.read(f"{stem}.safetensors")
            if header.pop("sha256") == _digest(content, header):
                return Checkpoint(header["step"], load(content), header["meta"])
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            pass
        log.warning("%s: damaged, so an older checkpoint is used", self.folder.path(stem))
        return None


def _digest(content: bytes, header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(content)
    digest.update(json.dumps(header).encode())
    return digest.hexdigest()


def _stem(step: int) -> str:
    return f"step-{step:09d}"


def _stems(files: Iterable[str]) -> list[str]:
    """Returns the names of the checkpoints among the files of a folder, newest first."""
    names = (name.removesuffix(".json") for name in files if name.endswith(".json"))
    return sorted((name for name in names if name.startswith("step-")), reverse=True)
