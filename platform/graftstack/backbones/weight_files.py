"""Weights from a file, read as data: no file can run code here."""

import contextlib
import hashlib
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from graftstack.errors import StorageUnreachableError, WeightsError
from graftstack.file_systems import opened, reaching
from graftstack.reason import reason
from graftstack.storage import FULL, is_uri

_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "net")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_weights_file(location: str) -> dict[str, Tensor]:
    """The tensors in a safetensors file or a torch checkpoint, unwrapped; on the CPU, mapped from disk where possible.

    `location` is a local path or an fsspec URI; the content decides the format, not the suffix. Raises
    `WeightsError`, in one line that names the file, for whatever is not a readable set of tensors.
    """
    with _local_copy(location) as path:
        return _read_local(path, location)


def _read_local(path: Path, location: str) -> dict[str, Tensor]:
    start = _start_of(path, location)
    if start[8:9] == b"{":
        return _read_safetensors(path, location)
    if start.startswith((_ZIP, _PICKLE)):
        # torch.load maps archives only, and takes a path that ends in .safetensors for what it says.
        mapped = start.startswith(_ZIP) and path.suffix != ".safetensors"
        return _tensors_in(_read_torch(path, location, mapped=mapped), location)
    found = "a web page" if re.match(rb"\s*<(!doctype|html|\?xml)", start, re.IGNORECASE) else "not a weights file"
    if start.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer"
    raise _error(location, f"it is {found}", "fetch the file itself again (.safetensors, .pth, .pt, .th or .bin)")


@contextlib.contextmanager
def _local_copy(location: str) -> Iterator[Path]:
    """A local path to the file: itself, or a copy that lasts as long as the context."""
    if not is_uri(location):
        yield Path(location).expanduser()
        return
    with _scratch_file(location) as file:
        path = Path(f"/dev/fd/{file.fileno()}")
        _fetch(location, path)
        yield path


@contextlib.contextmanager
def _scratch_file(location: str) -> Iterator[IO[bytes]]:
    """A temporary file without a name: a kill leaves nothing of it."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - what is raised in the block is none of its faults
    except OSError as error:
        raise _error(
            location,
            f"no temporary file can be made for it ({reason(error)})",
            "set TMPDIR to a folder that can be written",
        ) from error
    with file:
        yield file


def _fetch(location: str, path: Path) -> None:
    """Copies a file to a local `path`, part by part. Raises `WeightsError`."""
    try:
        fs, name = opened(location)
        with reaching(location):
            try:
                fs.get_file(name, str(path))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise _error(
                    location,
                    f"no space left for it in {tempfile.gettempdir()}",
                    "free some, or set TMPDIR to a folder with room",
                ) from error
    except StorageUnreachableError as error:
        raise WeightsError(f"backbone.weights={error}") from error
    except OSError as error:
        raise _error(location, f"can't be fetched ({reason(error)})", "check the address") from error


def digest_of(location: str) -> str:
    """Returns a hash of a local file or of one at a URI; empty if it can't be read, as whoever loads it will say.

    Raises `WeightsError` where that can't be known, for the store is out of reach.
    """
    try:
        with reaching(location) if is_uri(location) else contextlib.nullcontext():
            fs, name = opened(location)
            with fs.open(name, "rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except StorageUnreachableError as error:
        raise WeightsError(f"backbone.weights={error}") from error
    except OSError:
        return ""


def _start_of(path: Path, location: str) -> bytes:
    """The first bytes of the file; raises `WeightsError` where there are none."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError as error:
        raise _error(
            location, "no such file", "check the path, or use none or the name of published weights"
        ) from error
    except IsADirectoryError as error:
        raise _error(location, "is a folder", "give the weights file in it") from error
    except OSError as error:
        raise _error(location, f"can't be read ({error.strerror})", "check the path and its permissions") from error
    if not start:
        raise _error(location, "the file is empty", "fetch it again")
    return start


def _read_safetensors(path: Path, location: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise _error(location, f"damaged or cut short ({error})", "fetch it again") from error
    if not state:
        raise _error(location, "it holds no tensors", "give a file with a state dict")
    return state


def _read_torch(path: Path, location: str, *, mapped: bool) -> Any:
    try:
        if not mapped:
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        if not re.search(r"Unsupported|GLOBAL|not an allowed global", str(error)):
            raise _error(location, "damaged or cut short", "fetch it again") from error
        raise _error(
            location,
            "it holds more than tensors, and unpickling such untrusted content could run any code",
            "convert it to safetensors where you trust it, with safetensors.torch.save_file(state_dict, FILE)",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        # A pickle that is cut or altered fails wherever the reader happens to be.
        raise _error(location, "damaged, cut short, or not a torch checkpoint", "fetch it again") from error


def _tensors_in(content: Any, location: str) -> dict[str, Tensor]:
    """The state dict inside the usual wrappers; entries that aren't tensors (epochs, optimisers) stay behind."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    state = dict(content) if isinstance(content, Mapping) else {}
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise _error(location, "it holds no tensors by name", "save model.state_dict(), and give that file")
    return tensors


def _error(location: str, fault: str, remedy: str) -> WeightsError:
    fault = " ".join(fault.split())
    return WeightsError(f"backbone.weights={location}: {fault}; {remedy}")
