"""Keeping the taps below a folder within a size: the least recently used go, whole, and never one in use."""

import shutil
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

from graftstack.taps.key import DIGEST_PATTERN
from graftstack.taps.locks import lock_at_once

ABOUT_FILE = "tap.json"
"""Its time says when the tap was last opened."""
USE_LOCK = "use.lock"
"""Shared by whoever reads or makes the tap."""

_GOING = ".evicted-"
_SPARE_BYTES = 2**26
"""What taps leave free on the disk."""


def taps_bytes(root: Path) -> int:
    """Returns the size of all taps below a folder, half-made ones too."""
    return sum(_size(folder) for folder in _taps_in(root))


def make_room(root: Path, *, num_bytes: int, budget_bytes: int, keep: Collection[str]) -> bool:
    """Evicts taps below `root` until `num_bytes` more fit into the budget and onto the disk.

    Args:
        root: holds a folder for each tap.
        num_bytes: what is to be written.
        budget_bytes: what all taps may take together.
        keep: names of folders that stay.

    Returns:
        Whether they fit; if not, nothing was evicted.
    """
    for leftover in root.glob(f"{_GOING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    sizes = {folder: _size(folder) for folder in _taps_in(root)}
    total = sum(sizes.values())
    excess = total + num_bytes - min(budget_bytes, total + _free_bytes(root))
    with ExitStack() as locks:
        going = []
        for folder in sorted(sizes, key=_last_used):
            if excess <= 0:
                break
            lock = None if folder.name in keep else lock_at_once(folder / USE_LOCK)
            if lock is not None:
                locks.enter_context(lock)
                going.append(folder)
                excess -= sizes[folder]
        if excess > 0:
            return False
        for folder in going:
            _remove(folder)
    return True


def _remove(folder: Path) -> None:
    """Removes a tap: it is gone at once, so that a new one of that name may begin while its files are deleted."""
    going = folder.rename(folder.with_name(f"{_GOING}{uuid4().hex}"))
    shutil.rmtree(going, ignore_errors=True)


def _taps_in(root: Path) -> list[Path]:
    return [entry for entry in root.iterdir() if DIGEST_PATTERN.fullmatch(entry.name)] if root.is_dir() else []


def _size(folder: Path) -> int:
    sizes = []
    for file in folder.glob("*"):
        try:
            sizes.append(file.stat().st_size)
        except FileNotFoundError:  # written under another name until now, or evicted
            continue
    return sum(sizes)


def _last_used(folder: Path) -> int:
    for path in (folder / ABOUT_FILE, folder):
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return 0


def _free_bytes(root: Path) -> int:
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    return shutil.disk_usage(existing).free - _SPARE_BYTES
