"""A tap gives back what was stored, however it was read; what is damaged, half-made or too large is found and said."""

import dataclasses
import json
import logging
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from graftstack.errors import ConfigError, StorageFullError
from graftstack.taps import readers
from graftstack.taps.key import TapKey, TapSpec
from graftstack.taps.shards import ShardFile, fault_in
from graftstack.taps.store import TapStore
from graftstack.taps.tap import TapMissingError

KEY = TapKey(
    backbone="conv4",
    weights="w0",
    boundary=2,
    preprocessing="p",
    precision="fp32",
    data="d",
    rows="r",
    views="none",
    dtype="fp32",
)
TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

PRELUDE = """
import sys, time
import torch
from graftstack.taps.key import TapKey, TapSpec
from graftstack.taps.store import TapStore
store = TapStore(sys.argv[1], budget_bytes=2**40)
spec = eval(sys.argv[2])
def chunks(shard):
    for items in spec.chunks_of(shard):
        yield torch.full((len(items), *spec.shape), float(shard))
"""


def small(num_items: int = 600, shape: tuple[int, ...] = (3, 2), **key: Any) -> TapSpec:
    return TapSpec(key=dataclasses.replace(KEY, **key), num_items=num_items, shape=shape)


def values_of(spec: TapSpec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(spec.num_items, *spec.shape, generator=generator).to(TORCH_TYPES[spec.key.dtype])


def write(store: TapStore, spec: TapSpec, shards: list[int] | None = None) -> torch.Tensor:
    """Stores random values, and returns them."""
    values = values_of(spec)
    for shard in range(spec.num_shards) if shards is None else shards:
        store.write_shard(spec, shard, (values[chunk.start : chunk.stop] for chunk in spec.chunks_of(shard)))
    return values


def file_of(store: TapStore, spec: TapSpec, shard: int) -> Path:
    return Path(store.location) / spec.key.digest / f"shard-{shard:03d}.arrow"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def start(program: str, store: TapStore, spec: TapSpec) -> "subprocess.Popen[str]":
    """Runs `program` in another process, where `store`, `spec` and `chunks` are known."""
    source = PRELUDE + textwrap.dedent(program)
    command = [sys.executable, "-c", source, store.location, repr(spec)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def output_of(process: "subprocess.Popen[str]") -> str:
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return shown


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Lets no file grow beyond `num_bytes`: the kernel refuses the write half-way, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def store(tmp_path: Path) -> TapStore:
    return TapStore(str(tmp_path / "taps"), budget_bytes=2**30)


# Keys and shapes


def test_a_tap_is_named_by_everything_that_its_values_depend_on() -> None:
    names = [field.name for field in dataclasses.fields(KEY)]
    others: list[Any] = [3 if name == "boundary" else "bf16" for name in names]
    changed = [dataclasses.replace(KEY, **{name: other}) for name, other in zip(names, others, strict=True)]
    digests = {key.digest for key in (KEY, *changed)}
    assert len(digests) == 1 + len(changed)
    assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in digests)
    assert dataclasses.replace(KEY).digest == KEY.digest


def test_a_name_is_the_same_on_every_machine_and_in_every_release() -> None:
    assert KEY.digest == "49442043f4711fb1daba633fed7fdbda"


@pytest.mark.parametrize("num_items", [1, 255, 256, 257, 65_536, 65_537, 1_000_000, 50_000_000])
def test_the_shards_hold_each_item_once_and_are_few(num_items: int) -> None:
    spec = small(num_items)
    items = [spec.items_of(shard) for shard in range(spec.num_shards)]
    assert len(items) <= 256
    assert items[0].start == 0
    assert items[-1].stop == num_items
    assert all(before.stop == after.start for before, after in pairwise(items))
    assert all(len(chunk) == 256 for shard in range(spec.num_shards - 1) for chunk in spec.chunks_of(shard))
    assert sum(len(spec.chunks_of(shard)) for shard in range(spec.num_shards)) == -(-num_items // 256)
    with pytest.raises(IndexError):
        spec.items_of(spec.num_shards)


@pytest.mark.parametrize(
    ("dtype", "num_items", "shape"), [("fp64", 1, (1,)), ("fp32", 0, (1,)), ("fp32", 1, (3, 0)), ("fp32", 1, (-1,))]
)
def test_a_tap_of_nothing_or_of_an_unknown_type_is_refused(dtype: str, num_items: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a tap holds"):
        small(num_items, shape, dtype=dtype)


# Reading


@pytest.mark.parametrize("dtype", list(TORCH_TYPES))
@pytest.mark.parametrize(("num_items", "shape"), [(1, (5,)), (256, ()), (700, (3, 2, 2)), (66_000, (2,))])
def test_what_is_stored_is_given_back_in_any_order(
    store: TapStore, dtype: str, num_items: int, shape: tuple[int, ...]
) -> None:
    spec = small(num_items, shape, dtype=dtype)
    values = write(store, spec)
    assert store.missing_shards(spec) == []
    shuffled = np.random.default_rng(0).permutation(num_items)
    with store.open(spec) as tap:
        assert (len(tap), tap.shape, tap.num_bytes) == (num_items, shape, values.nbytes)
        for items in (shuffled, np.arange(num_items), shuffled[:64], shuffled[:1], np.array([0, 0]), shuffled[:0]):
            gathered = tap.gather(items)
            assert gathered.dtype == TORCH_TYPES[dtype]
            assert gathered.is_contiguous()
            assert torch.equal(gathered, values[torch.from_numpy(items)])
        assert torch.equal(tap[num_items - 1], values[-1])


@pytest.mark.parametrize("dtype", list(TORCH_TYPES))
def test_a_large_tap_that_isnt_mapped_gives_the_same(
    store: TapStore, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAPPED_BYTES", 0)
    spec = small(66_000, (3,), dtype=dtype)
    values = write(store, spec)
    items = np.random.default_rng(0).permutation(66_000)
    with store.open(spec) as tap:
        assert isinstance(tap._reader, readers.FileReader)
        assert torch.equal(tap.gather(items), values[torch.from_numpy(items)])
        assert torch.equal(tap.gather(np.arange(66_000)), values)
        os.truncate(file_of(store, spec, 128), 1000)
        with pytest.raises(OSError, match="cut short"):
            tap.gather(np.array([65_999]))


def test_values_are_stored_in_the_type_of_the_tap(store: TapStore) -> None:
    spec = small(10, (4,), dtype="bf16")
    values = torch.randn(4, 10).T  # not contiguous, and wider
    store.write_shard(spec, 0, [values.requires_grad_()])
    with store.open(spec) as tap:
        assert torch.equal(tap.gather(np.arange(10)), values.detach().bfloat16())


def test_what_was_gathered_is_a_copy(store: TapStore) -> None:
    spec = small()
    values = write(store, spec)
    with store.open(spec) as tap:
        first = tap.gather(np.arange(3)).zero_()
        second = tap.gather(np.arange(3))
    assert torch.equal(second, values[:3])
    assert not first.any()


@pytest.mark.parametrize("items", [[-1], [600], [0, 599, 600]])
def test_an_item_beyond_the_tap_is_refused(store: TapStore, items: list[int]) -> None:
    spec = small(600)
    write(store, spec)
    with store.open(spec) as tap, pytest.raises(IndexError, match=r"the tap holds 0\.\.599"):
        tap.gather(np.array(items))


def test_a_closed_tap_says_so(store: TapStore) -> None:
    spec = small()
    write(store, spec)
    tap = store.open(spec)
    tap.close()
    tap.close()
    with pytest.raises(TapMissingError, match="closed; open it again"):
        tap.gather(np.array([0]))


def test_a_file_is_plain_arrow_that_anyone_can_read(store: TapStore) -> None:
    spec = small(300, (2, 2))
    values = write(store, spec)
    table = pa.ipc.open_file(file_of(store, spec, 1)).read_all()
    assert table.column_names == ["value"]
    assert table["value"].to_pylist() == values[256:].reshape(-1, 4).tolist()
    about = json.loads((file_of(store, spec, 0).parent / "tap.json").read_text())
    assert about == {**dataclasses.asdict(KEY), "shape": [2, 2], "num_items": 300, "num_bytes": 300 * 16}


def test_a_tap_pickles_as_its_place_and_opens_again(
    store: TapStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = small()
    values = write(store, spec)
    with TapStore("taps", budget_bytes=1).open(spec) as tap:
        pickled = pickle.dumps(tap)
    assert len(pickled) < 2000
    program = "import pickle, sys, numpy; print(pickle.load(sys.stdin.buffer).gather(numpy.array([599])).tolist())"
    done = subprocess.run([sys.executable, "-c", program], input=pickled, capture_output=True, cwd="/", check=True)
    assert json.loads(done.stdout) == values[599:].tolist()


def test_many_threads_may_read_one_tap(store: TapStore) -> None:
    spec = small(3000)
    values = write(store, spec)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for _ in range(50):
            items = np.random.default_rng(seed).integers(0, 3000, 64)
            if not torch.equal(tap.gather(items), values[torch.from_numpy(items)]):
                wrong.append(seed)

    with store.open(spec) as tap:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells what is resident")
def test_a_process_doesnt_grow_with_the_tap_that_it_reads(store: TapStore) -> None:
    program = """
        import numpy as np
        def resident_mib():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
        with store.making([spec]):
            for shard in store.missing_shards(spec):
                store.write_shard(spec, shard, chunks(shard))
        tap = store.open(spec)
        tap.gather(np.arange(64))
        before = most = resident_mib()
        for items in np.random.default_rng(0).permutation(spec.num_items).reshape(-1, 64):
            tap.gather(items)
            most = max(most, resident_mib())
        print(most - before, spec.num_bytes / 2**20)
    """
    grown = {}
    for num_items in (6_400, 19_200):
        grew_mib, size_mib = map(float, output_of(start(program, store, small(num_items, (4096,)))).split())
        grown[size_mib] = grew_mib
    assert sorted(grown) == [100, 300]
    assert max(grown.values()) < 32, grown


# Damage


def test_nothing_is_missing_of_a_whole_tap_and_everything_of_none(
    store: TapStore, caplog: pytest.LogCaptureFixture
) -> None:
    spec = small()
    assert store.missing_shards(spec) == [0, 1, 2]
    assert not Path(store.location).exists()
    write(store, spec, [1])
    assert store.missing_shards(spec) == [0, 2]
    write(store, spec, [0, 2])
    assert store.is_complete(spec)
    assert store.missing_shards(small(weights="w1")) == [0, 1, 2]
    assert caplog.messages == []


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_cut_the_end(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_flip_in_the_first_chunk(path: Path) -> None:
    flip(path, path.stat().st_size // 4)


def damage_flip_in_the_last_chunk(path: Path) -> None:
    flip(path, path.stat().st_size * 2 // 3)


def damage_foreign(path: Path) -> None:
    path.write_bytes(b"something else" * 1000)


def damage_neighbour(path: Path) -> None:
    path.write_bytes(path.with_name("shard-000.arrow").read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_cut_the_end,
        damage_empty,
        damage_flip_in_the_first_chunk,
        damage_flip_in_the_last_chunk,
        damage_foreign,
        damage_neighbour,
    ],
)
def test_a_damaged_shard_is_removed_named_and_made_again(
    store: TapStore, caplog: pytest.LogCaptureFixture, damage: "object"
) -> None:
    spec = small(66_000, (3,))  # two chunks a shard
    assert len(spec.chunks_of(1)) == 2
    values = write(store, spec)
    path = file_of(store, spec, 1)
    damage(path)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert store.missing_shards(spec) == [1]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{path}: damaged (")
    assert not path.exists()
    with pytest.raises(TapMissingError, match=r"shard-001\.arrow: isn't there; run again with resume=true"):
        store.open(spec)
    write(store, spec, [1])
    assert store.is_complete(spec)
    with store.open(spec) as tap:
        assert torch.equal(tap.gather(np.arange(len(tap))), values)


def test_any_flipped_byte_is_found_or_changes_no_value(store: TapStore) -> None:
    spec = small(5, (3,))
    values = write(store, spec).numpy()
    path = file_of(store, spec, 0)
    original = path.read_bytes()
    harmless = 0
    for position in range(len(original)):
        copy = path.with_name(f"copy-{position}")
        copy.write_bytes(original)
        flip(copy, position)
        if fault_in(copy, spec, 0) is None:
            harmless += 1
            with copy.open("rb") as file:
                assert np.array_equal(ShardFile(file, spec, 0).chunks[0], values)
    assert harmless < len(original) / 2


def test_a_file_that_cant_be_read_isnt_taken_for_a_damaged_one(store: TapStore) -> None:
    spec = small()
    write(store, spec)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            store.missing_shards(spec)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert store.is_complete(spec)


def test_a_second_look_reads_nothing_unless_the_file_changed(store: TapStore) -> None:
    spec = small(600, (1000,))
    write(store, spec)
    assert store.is_complete(spec)
    path = file_of(store, spec, 2)
    about = path.stat()
    flip(path, about.st_size // 2)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert store.missing_shards(spec) == []
    os.utime(path)
    assert store.missing_shards(spec) == [2]


@pytest.mark.parametrize("num_items", [[256, 44], [256], [44, 256], [256, 44, 1], [300], []])
def test_chunks_that_arent_those_of_the_shard_are_refused(store: TapStore, num_items: list[int]) -> None:
    spec = small(65_836, (2,))
    last = spec.num_shards - 1
    assert [len(chunk) for chunk in spec.chunks_of(last)] == [256, 44]
    chunks = [torch.zeros(num, 2) for num in num_items]
    if num_items == [256, 44]:
        store.write_shard(spec, last, chunks)
        assert file_of(store, spec, last).exists()
    else:
        with pytest.raises(ValueError, match=r"chunk of shape|chunks of the shard"):
            store.write_shard(spec, last, chunks)
        assert not file_of(store, spec, last).exists()


def test_values_beyond_fp16_are_refused_with_the_remedy(store: TapStore) -> None:
    spec = small(2, (1,), dtype="fp16")
    with pytest.raises(ConfigError, match=r"\Ataps.dtype=fp16: boundary 2 of conv4 .* 65504.*; use bf16 or fp32\Z"):
        store.write_shard(spec, 0, [torch.tensor([[1.0], [1e5]])])
    store.write_shard(spec, 0, [torch.tensor([[1.0], [torch.inf]])])
    assert store.is_complete(spec)


# Makers


def test_a_killed_maker_costs_the_shard_that_it_was_writing(store: TapStore) -> None:
    spec = small(66_000, (2,))
    program = """
        def half(shard):
            whole = chunks(shard)
            yield next(whole)
            print("half", flush=True)
            time.sleep(60)
        with store.making([spec]):
            for shard in (0, 1, 5):
                store.write_shard(spec, shard, chunks(shard))
            store.write_shard(spec, 2, half(2))
    """
    maker = start(program, store, spec)
    assert maker.stdout is not None
    assert maker.stdout.readline() == "half\n"
    maker.kill()
    maker.wait()
    folder = file_of(store, spec, 0).parent
    assert len(list(folder.glob(".*.tmp"))) == 1
    with store.making([spec]):
        assert list(folder.glob(".*.tmp")) == []
        assert store.missing_shards(spec) == [2, 3, 4, *range(6, spec.num_shards)]


def test_a_pass_that_fails_leaves_no_half_shard(store: TapStore) -> None:
    def fail() -> Iterator[torch.Tensor]:
        yield torch.zeros(256, 2)
        raise ZeroDivisionError

    spec = small(66_000, (2,))
    with pytest.raises(ZeroDivisionError):
        store.write_shard(spec, 0, fail())
    assert sorted(path.name for path in file_of(store, spec, 0).parent.iterdir()) == ["tap.json", "use.lock"]


def test_a_shard_of_several_taps_is_written_chunk_by_chunk_and_all_or_none_get_into_place(store: TapStore) -> None:
    specs = [small(66_000, (64,), boundary=boundary) for boundary in (1, 2)]
    files = [file_of(store, spec, 0) for spec in specs]
    chunk = [torch.full((256, 64), float(spec.key.boundary)) for spec in specs]
    sizes: list[int] = []

    def chunks(num: int) -> Iterator[list[torch.Tensor]]:
        for _ in range(num):
            sizes.append(sum(path.stat().st_size for path in Path(store.location).rglob(".*.tmp")))
            yield chunk

    with pytest.raises(ValueError, match="1 of the 2 chunks of the shard"):
        store.write_shards(specs, 0, chunks(1))
    assert [path.exists() for path in files] == [False, False]
    store.write_shards(specs, 0, chunks(2))
    assert [path.exists() for path in files] == [True, True]
    assert sizes[2] > sizes[1] + 256 * 64 * 4, "the first chunk of both is on the disk before the second is asked for"
    assert list(Path(store.location).rglob(".*")) == []
    assert all(store.missing_shards(spec) == list(range(1, spec.num_shards)) for spec in specs)


def test_a_tap_is_listed_once_all_its_files_are_there_whatever_they_hold(store: TapStore) -> None:
    spec = small()
    assert not store.is_listed(spec)
    write(store, spec, [0])
    assert not store.is_listed(spec)
    write(store, spec, [1, 2])
    flip(file_of(store, spec, 1), 1000)
    assert store.is_listed(spec)
    assert not store.is_complete(spec)
    assert not store.is_listed(spec)


def test_processes_that_need_the_same_taps_make_them_once(store: TapStore) -> None:
    one, two = small(2000, boundary=1), small(2000, boundary=2)
    program = f"""
        specs = [spec, {one!r}, {two!r}]
        with store.making(specs):
            for spec in specs:
                for shard in store.missing_shards(spec):
                    time.sleep(0.02)
                    store.write_shard(spec, shard, chunks(shard))
                    print(spec.key.boundary, shard)
    """
    makers = [start(program, store, first) for first in (one, two, one)]
    made = [line for maker in makers for line in output_of(maker).splitlines()]
    assert sorted(made) == [f"{boundary} {shard}" for boundary in (1, 2) for shard in range(8)]
    assert store.is_complete(one)
    assert store.is_complete(two)


def test_makers_dont_wait_for_readers(store: TapStore) -> None:
    spec = small()
    values = write(store, spec)
    with store.open(spec) as tap, store.making([spec]):
        write(store, spec, [0])
        assert torch.equal(tap.gather(np.arange(600)), values)


def test_a_full_disk_leaves_what_was_there_and_nothing_half(store: TapStore) -> None:
    spec = small(600, (1000,))
    write(store, spec, [0])
    with largest_file(100_000), pytest.raises(StorageFullError, match=r"shard-001\.arrow: no space left; free some"):
        write(store, spec, [1])
    assert store.missing_shards(spec) == [1, 2]
    assert list(Path(store.location).rglob(".*")) == []
    write(store, spec, [1, 2])
    assert store.is_complete(spec)


@pytest.mark.parametrize("location", ["/proc/taps", "/dev/null/taps"])
def test_a_place_that_takes_no_taps_is_named(location: str) -> None:
    store = TapStore(location, budget_bytes=1)
    for use in (lambda: write(store, small()), lambda: store.making([small()]).__enter__()):
        with pytest.raises(
            ConfigError, match=rf"\A{location}/\w+: can't be written \(.+\); choose another taps.location"
        ):
            use()
    with pytest.raises(TapMissingError, match=rf"\A{location}/\w+: isn't there; run again"):
        store.open(small())
    assert store.missing_shards(small()) == [0, 1, 2]
    assert store.total_bytes() == 0


# Eviction


@pytest.fixture
def three(tmp_path: Path) -> tuple[TapStore, list[TapSpec]]:
    """A store that three taps of about 240 kB nearly fill, the first of which was used last."""
    store = TapStore(str(tmp_path / "taps"), budget_bytes=800_000)
    specs = [small(600, (100,), weights=name) for name in "abc"]
    for spec in specs:
        write(store, spec)
        store.open(spec).close()
    store.open(specs[0]).close()
    return store, specs


def there(store: TapStore, specs: list[TapSpec]) -> str:
    return "".join(spec.key.weights for spec in specs if store.is_complete(spec))


def test_the_least_recently_used_tap_goes_first(three: tuple[TapStore, list[TapSpec]]) -> None:
    store, specs = three
    assert 720_000 < store.total_bytes() < 730_000
    assert store.make_room(10_000, keep=[])
    assert there(store, specs) == "abc"
    assert store.make_room(200_000, keep=[])
    assert there(store, specs) == "ac"
    assert not (Path(store.location) / specs[1].key.digest).exists()
    assert store.make_room(500_000, keep=[])
    assert there(store, specs) == "a"
    assert store.make_room(800_000, keep=[])
    assert store.total_bytes() == 0
    assert list(Path(store.location).iterdir()) == []


def test_what_is_to_stay_stays(three: tuple[TapStore, list[TapSpec]]) -> None:
    store, specs = three
    assert store.make_room(300_000, keep={specs[1].key.digest})
    assert there(store, specs) == "ab"


def test_a_tap_in_use_stays_until_it_is_closed(three: tuple[TapStore, list[TapSpec]]) -> None:
    store, specs = three
    with store.open(specs[1]) as tap, store.making([specs[2]]):
        assert store.make_room(300_000, keep=[])
        assert there(store, specs) == "bc"
        assert not store.make_room(700_000, keep=[])
        assert there(store, specs) == "bc"
        assert torch.equal(tap[599], values_of(specs[1])[599])
    assert store.make_room(700_000, keep=[])
    assert there(store, specs) == ""


def test_a_tap_in_use_by_another_process_stays_until_that_dies(three: tuple[TapStore, list[TapSpec]]) -> None:
    store, specs = three
    reader = start('tap = store.open(spec); print("open", flush=True); time.sleep(60)', store, specs[2])
    assert reader.stdout is not None
    assert reader.stdout.readline() == "open\n"
    assert not store.make_room(700_000, keep=[])
    assert there(store, specs) == "abc"
    reader.kill()
    reader.wait()
    assert store.make_room(700_000, keep=[])


def test_what_is_larger_than_the_budget_evicts_nothing(three: tuple[TapStore, list[TapSpec]]) -> None:
    store, specs = three
    assert not store.make_room(800_001, keep=[])
    assert there(store, specs) == "abc"


def test_what_is_larger_than_the_disk_doesnt_fit_into_any_budget(three: tuple[TapStore, list[TapSpec]]) -> None:
    store, specs = three
    assert not TapStore(store.location, budget_bytes=2**80).make_room(2**70, keep=[])
    assert TapStore(f"{store.location}/not/there", budget_bytes=2**80).make_room(1, keep=[])
    assert there(store, specs) == "abc"


def test_folders_that_are_no_taps_are_left_alone(three: tuple[TapStore, list[TapSpec]]) -> None:
    store, _ = three
    own = Path(store.location) / "my-thesis"
    own.mkdir()
    (own / "chapter").write_bytes(bytes(10**6))
    assert store.make_room(800_000, keep=[])
    assert list(Path(store.location).iterdir()) == [own]


def test_taps_lie_in_the_cache_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTSTACK_CACHE", str(tmp_path / "env"))
    assert TapStore(None, budget_bytes=1).location == f"{tmp_path}/env/taps"
    assert TapStore(None, budget_bytes=1, cache_dir=str(tmp_path)).location == f"{tmp_path}/taps"


# At a URI


@pytest.fixture
def remote(tmp_path: Path) -> TapStore:
    return TapStore(f"memory://{tmp_path.name}/taps", budget_bytes=2**30, cache_dir=str(tmp_path / "cache"))


def test_a_tap_at_a_uri_is_fetched_once_a_machine(remote: TapStore, tmp_path: Path) -> None:
    spec = small()
    assert remote.missing_shards(spec) == [0, 1, 2]
    with remote.making([spec]):
        values = write(remote, spec, [0, 2])
        assert remote.missing_shards(spec) == [1]
        write(remote, spec, [1])
    assert remote.is_complete(spec)
    assert remote.total_bytes() == spec.num_bytes
    elsewhere = TapStore(remote.location, budget_bytes=2**30, cache_dir=str(tmp_path / "other machine"))
    for _ in range(2):
        with elsewhere.open(spec) as tap:
            assert torch.equal(tap.gather(np.arange(600)), values)
        fetched = list((tmp_path / "other machine").rglob("*.arrow"))
        assert len(fetched) == 3
        for path in fetched:
            remote._folder.remove(f"{spec.key.digest}/{path.name}")  # it is read from the copy from now on
    with remote.open(spec) as tap:
        copy = pickle.loads(pickle.dumps(tap))
        assert torch.equal(copy.gather(np.arange(600)), values)
    assert remote.missing_shards(spec) == [0, 1, 2]


class Counting(MemoryFileSystem):  # type: ignore[misc]
    """A remote file system that is slow, and knows what was asked of it."""

    protocol = "counting"
    fetched: ClassVar[list[str]] = []

    def cat_file(self, path: str, **options: Any) -> bytes:
        time.sleep(0.02)
        self.fetched.append(path)
        content: bytes = super().cat_file(path, **options)
        return content


def test_readers_that_begin_together_fetch_each_shard_once(tmp_path: Path) -> None:
    fsspec.register_implementation("counting", Counting, clobber=True)
    spec = small()
    store = TapStore(f"counting://{tmp_path.name}", budget_bytes=2**30, cache_dir=str(tmp_path))
    write(store, spec)
    Counting.fetched.clear()
    with ThreadPoolExecutor(4) as pool:
        taps = list(pool.map(store.open, [spec] * 4))
    assert all(torch.equal(tap.gather(np.arange(600)), values_of(spec)) for tap in taps)
    assert sorted(Path(path).name for path in Counting.fetched) == [f"shard-00{shard}.arrow" for shard in range(3)]


def test_a_shard_that_is_damaged_at_a_uri_is_removed_there(
    remote: TapStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = small()
    values = write(remote, spec)
    name = f"{spec.key.digest}/shard-001.arrow"
    content = bytearray(remote._folder.read(name))
    content[len(content) // 2] ^= 1
    remote._folder.write(name, bytes(content))
    with pytest.raises(TapMissingError, match=rf"{remote.location}/{name}: damaged; run again with resume=true"):
        remote.open(spec)
    assert remote.missing_shards(spec) == [1]
    assert [message.split(" (")[0] for message in caplog.messages] == [f"{remote.location}/{name}: damaged"]
    with pytest.raises(TapMissingError, match=r"shard-001\.arrow: isn't there"):
        remote.open(spec)
    write(remote, spec, [1])
    with remote.open(spec) as tap:
        assert torch.equal(tap.gather(np.arange(600)), values)


def test_at_a_uri_nothing_is_evicted_but_fetched_copies_are(remote: TapStore, tmp_path: Path) -> None:
    specs = [small(600, (100,), weights=name) for name in "abc"]
    for spec in specs:
        write(remote, spec)
    tight = TapStore(remote.location, budget_bytes=500_000, cache_dir=str(tmp_path / "cache"))
    assert not tight.make_room(1, keep=[])
    assert remote.make_room(1, keep=[])
    for spec in specs:
        tight.open(spec).close()
    fetched = {path.parent.name for path in (tmp_path / "cache").rglob("*.arrow")}
    assert fetched == {spec.key.digest for spec in specs[1:]}
    assert there(remote, specs) == "abc"


def test_importing_the_store_loads_neither_torch_nor_ray() -> None:
    program = "import sys, graftstack.taps.store; print([name for name in ('torch', 'ray') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
