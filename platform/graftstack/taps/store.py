"""Where taps lie: a folder each, bounded together in size; the least recently used ones go first, never one in use.

``LOCATION/DIGEST/`` holds ``shard-000.arrow`` and so on; ``tap.json``, which says what the tap is, and by its time when
it was last opened; and two locks, ``use.lock``, shared by readers and makers, and ``make.lock``, held by one maker.

Taps at a URI are fetched into this machine's cache, once, and read there. Who else reads them can't be known, so there
none is evicted; the fetched ones are.
"""

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from graftstack.errors import ConfigError, RunError
from graftstack.machine import cache_root, usable_cpus
from graftstack.reason import reason
from graftstack.storage import Folder
from graftstack.taps.eviction import ABOUT_FILE, USE_LOCK, make_room, taps_bytes
from graftstack.taps.key import DIGEST_PATTERN, TapSpec
from graftstack.taps.locks import lock_alone, lock_shared
from graftstack.taps.shards import ShardWriter, fault_in, shard_name
from graftstack.taps.tap import Tap, TapMissingError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_DAY_S = 86400.0

_MAKE_LOCK, _FETCH_LOCK = "make.lock", "fetch.lock"


class TapStore:
    """All taps at one place, a path or a URI. It pickles as its place."""

    def __init__(self, location: str | None, *, budget_bytes: int, cache_dir: str | None = None) -> None:
        """Looks at nothing yet.

        Args:
            location: a path or an fsspec URI; None: ``taps`` in the cache.
            budget_bytes: the size of all taps together.
            cache_dir: the cache of this machine, else $GRAFTSTACK_CACHE, else ~/.cache/graftstack.
        """
        self.budget_bytes = budget_bytes
        self._cache_dir = None if cache_dir is None else str(cache_root(cache_dir))
        self._folder = Folder(cache_root(cache_dir) / "taps" if location is None else location)

    @property
    def location(self) -> str:
        """The absolute path or the URI."""
        return self._folder.location

    def is_complete(self, spec: TapSpec) -> bool:
        """Returns whether the tap is there, whole; looks as closely as `missing_shards`."""
        return not self.missing_shards(spec)

    def is_listed(self, spec: TapSpec) -> bool:
        """Returns whether files for all shards of the tap are there, whatever they hold; nothing is read."""
        return set(map(shard_name, range(spec.num_shards))) <= set(self._far(spec).names())

    def missing_shards(self, spec: TapSpec) -> list[int]:
        """Returns the shards that aren't there, whole. Damaged ones are removed, with a warning that names them.

        All values are read and compared with their checksums, once a process; from a URI they are fetched for that.
        For the answer to stay true, ask while `making`.
        """
        _remove_damaged(self._near(spec), spec)
        if not self._folder.is_local:
            for shard, problem in self._fetch(spec).items():
                _warn_of_damage(self._far(spec).path(shard_name(shard)), problem)
                self._far(spec).remove(shard_name(shard))
        there = set(self._far(spec).names())
        return [shard for shard in range(spec.num_shards) if shard_name(shard) not in there]

    def write_shard(self, spec: TapSpec, shard: int, chunks: "Iterable[Tensor]") -> None:
        """Puts a shard into place, whole or not at all; `write_shards` for one tap.

        Args:
            spec: the tap.
            shard: which of its shards.
            chunks: its chunks in order, each ``[256, *shape]``, the tap's last one shorter.
        """
        self.write_shards([spec], shard, ([chunk] for chunk in chunks))

    def write_shards(self, specs: Sequence[TapSpec], shard: int, chunks: "Iterable[Sequence[Tensor]]") -> None:
        """Puts the same shard of several taps into place, each whole or not at all; one chunk of each is in memory.

        Args:
            specs: the taps, all with as many items.
            shard: which of their shards.
            chunks: its chunks in order: of each tap one, ``[256, *shape]``, the last one shorter.

        Raises:
            StorageFullError: the disk is full; what other shards there are stays.
            ConfigError: the place can't be written, or values are too large for fp16.
            ValueError: the chunks aren't those of the shard.
        """
        with ExitStack() as locks:
            for spec in specs:
                self._make_folder(spec)
                locks.enter_context(lock_shared(self._near(spec) / USE_LOCK))
                _describe(self._far(spec), spec)
            self._write_files(specs, shard, chunks, [])

    def _write_files(
        self, specs: Sequence[TapSpec], shard: int, chunks: "Iterable[Sequence[Tensor]]", paths: list[Path]
    ) -> None:
        """Opens a file for each tap, one within another, so that all get into place or none does; then fills them."""
        if len(paths) < len(specs):
            self._far(specs[len(paths)]).write_with(
                shard_name(shard), lambda path: self._write_files(specs, shard, chunks, [*paths, path])
            )
            return
        with ExitStack() as files:
            writers = [
                ShardWriter(files.enter_context(path.open("wb")), spec, shard)
                for spec, path in zip(specs, paths, strict=True)
            ]
            for of_taps in chunks:
                for writer, chunk in zip(writers, of_taps, strict=True):
                    writer.write(chunk)
            for writer in writers:
                writer.finish()

    def remove(self, spec: TapSpec) -> None:
        """Removes the shards of a tap, so that they take no room; who has it open reads on."""
        far = self._far(spec)
        for shard in range(spec.num_shards):
            far.remove(shard_name(shard))

    def open(self, spec: TapSpec) -> Tap:
        """Returns the tap, open. One at a URI is fetched and verified first, once on this machine.

        Raises:
            TapMissingError: a shard isn't there, or a fetched one is damaged.
            StorageFullError: the disk is too full to fetch it.
        """
        near = self._near(spec)
        if self._folder.is_local and not near.is_dir():
            raise TapMissingError(f"{near}: isn't there; run again with resume=true, which makes it again")
        with ExitStack() as undo:
            lock = undo.enter_context(lock_shared(near / USE_LOCK))
            damaged = {} if self._folder.is_local else self._fetch(spec)
            if damaged:
                paths = ", ".join(self._far(spec).path(shard_name(shard)) for shard in damaged)
                raise TapMissingError(f"{paths}: damaged; run again with resume=true, which makes it again")
            tap = Tap(near, spec, lock=lock, reopen=self.open)
            undo.pop_all()
        with suppress(OSError):  # where nothing can be written, nothing is evicted
            os.utime(near / ABOUT_FILE, ns=(time.time_ns(), time.time_ns()))
        return tap

    @contextmanager
    def making(self, specs: Iterable[TapSpec]) -> Iterator[None]:
        """Waits until no other process of this machine makes one of the taps; meanwhile none of them is evicted.

        What killed makers left is removed. Not to be nested for the same tap: the inner one waits for the outer one.

        Raises:
            ConfigError: the place can't be written.
        """
        by_digest = {spec.key.digest: spec for spec in specs}
        with ExitStack() as locks:
            # In one order for all: two makers that each waited for a tap of the other's would wait for ever.
            for digest in sorted(by_digest):
                spec = by_digest[digest]
                self._make_folder(spec)
                locks.enter_context(lock_shared(self._near(spec) / USE_LOCK))  # first: from now on the folder stays
                locks.enter_context(lock_alone(self._near(spec) / _MAKE_LOCK))
                Folder(self._near(spec)).sweep()
                if not self._folder.is_local:  # others may be uploading there
                    self._far(spec).sweep(older_than_s=_DAY_S)
            yield

    def make_room(self, num_bytes: int, keep: Collection[str]) -> bool:
        """Evicts the least recently used taps that nobody uses until `num_bytes` more fit into the budget and the disk.

        Args:
            num_bytes: what is to be written.
            keep: digests of taps that stay.

        Returns:
            Whether they fit; if not, nothing was evicted.
        """
        if not self._folder.is_local:
            return self.total_bytes() + num_bytes <= self.budget_bytes
        return make_room(Path(self.location), num_bytes=num_bytes, budget_bytes=self.budget_bytes, keep=keep)

    def total_bytes(self) -> int:
        """Returns the size of all taps, whole or not; of those at a URI, the size that they have when whole."""
        if self._folder.is_local:
            return taps_bytes(Path(self.location))
        digests = [name for name in self._folder.names() if DIGEST_PATTERN.fullmatch(name)]
        return sum(_described_bytes(self._folder / digest) for digest in digests)

    def _far(self, spec: TapSpec) -> Folder:
        """Returns the tap's folder where all machines see it."""
        return self._folder / spec.key.digest

    def _near(self, spec: TapSpec) -> Path:
        """Returns the tap's folder on this machine, where it is read and locked; without a URI it is the same."""
        return self._near_root / spec.key.digest

    @property
    def _near_root(self) -> Path:
        if self._folder.is_local:
            return Path(self.location)
        place = hashlib.blake2b(self.location.encode(), digest_size=8).hexdigest()
        return cache_root(self._cache_dir) / "fetched-taps" / place

    def _make_folder(self, spec: TapSpec) -> None:
        near = Folder(self._near(spec))
        try:
            near.make()
        except RunError as error:
            why = reason(error.__cause__ or error)
            raise ConfigError(f"{near.location}: can't be written ({why}); choose another taps.location") from error

    def _fetch(self, spec: TapSpec) -> dict[int, str]:
        """Brings what this machine lacks of a tap; returns shard -> problem of those that arrive damaged."""
        self._make_folder(spec)
        near = self._near(spec)
        with lock_shared(near / USE_LOCK), lock_alone(near / _FETCH_LOCK):
            there = set(self._far(spec).names()) - set(Folder(near).names())
            wanted = [shard for shard in range(spec.num_shards) if shard_name(shard) in there]
            if not wanted:
                return {}
            num_bytes = sum(len(spec.items_of(shard)) for shard in wanted) * spec.item_bytes
            make_room(self._near_root, num_bytes=num_bytes, budget_bytes=self.budget_bytes, keep=[spec.key.digest])
            _describe(Folder(near), spec)
            with ThreadPoolExecutor(usable_cpus()) as pool:
                problems = list(pool.map(lambda shard: self._fetch_shard(spec, shard), wanted))
        return {shard: problem for shard, problem in zip(wanted, problems, strict=True) if problem is not None}

    def _fetch_shard(self, spec: TapSpec, shard: int) -> str | None:
        """Brings a shard unless it is damaged; returns what is wrong with it."""
        data = self._far(spec).read(shard_name(shard))

        def put(path: Path) -> None:
            path.write_bytes(data)
            problem = fault_in(path, spec, shard)
            if problem is not None:
                raise _DamagedError(problem)

        try:
            Folder(self._near(spec)).write_with(shard_name(shard), put)
        except _DamagedError as error:
            return str(error)
        return None


class _DamagedError(Exception):
    """A fetched shard isn't whole."""


def _describe(folder: Folder, spec: TapSpec) -> None:
    """Says in plain JSON what the tap of a folder is, unless that is said."""
    about = {**dataclasses.asdict(spec.key), "shape": spec.shape, "num_items": spec.num_items}
    text = json.dumps({**about, "num_bytes": spec.num_bytes}, indent=2).encode()
    with suppress(FileNotFoundError):
        if folder.read(ABOUT_FILE) == text:
            return
    folder.write(ABOUT_FILE, text)


def _described_bytes(folder: Folder) -> int:
    """Returns the size of a tap according to its description; 0 if it has none that can be read."""
    try:
        return int(json.loads(folder.read(ABOUT_FILE))["num_bytes"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0


def _remove_damaged(folder: Path, spec: TapSpec) -> None:
    """Reads all shards of a tap, and removes those that aren't whole."""

    def remove_if_damaged(shard: int) -> None:
        path = folder / shard_name(shard)
        try:
            problem = fault_in(path, spec, shard)
        except (FileNotFoundError, NotADirectoryError):
            return
        if problem is not None:
            _warn_of_damage(str(path), problem)
            path.unlink(missing_ok=True)

    with ThreadPoolExecutor(usable_cpus()) as pool:  # checksums let go of the interpreter's lock
        list(pool.map(remove_if_damaged, range(spec.num_shards)))


def _warn_of_damage(path: str, problem: str) -> None:
    log.warning("%s: damaged (%s); removed, to be made again", path, problem)
