"""A damaged or half-written checkpoint is never loaded; the last good one survives a kill and a full disk."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftstack.checkpoint import Checkpoint, CheckpointStore
from graftstack.errors import StorageFullError
from graftstack.storage import Folder

META = {"position": {"step": 3, "loss_sum": 0.1 + 0.2, "history": [{"epoch": 1, "accuracy": 1 / 3}]}, "name": "é🙂"}


def state(step: int) -> Checkpoint:
    return Checkpoint(step, {"w": torch.full((7, 3), float(step)), "n": torch.tensor(step)}, {"step": step, **META})


def is_state(checkpoint: Checkpoint | None, step: int) -> bool:
    wanted = state(step)
    return (
        checkpoint is not None
        and checkpoint.step == step
        and checkpoint.meta == wanted.meta
        and checkpoint.tensors.keys() == wanted.tensors.keys()
        and all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in wanted.tensors.items())
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Two checkpoints, after 5 and after 10 steps."""
    store = CheckpointStore(Folder(tmp_path), num_to_keep=2)
    store.save(state(5))
    store.save(state(10))
    return store


def newest(tmp_path: Path, suffix: str) -> Path:
    return max(tmp_path.glob(f"step-*.{suffix}"))


@pytest.mark.parametrize("location", ["{tmp_path}/checkpoints", "memory://{tmp_path.name}/checkpoints"])
def test_a_checkpoint_is_read_back_bit_for_bit(tmp_path: Path, location: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "fp32": torch.randn(4, 5, generator=generator),
        "not contiguous": torch.randn(4, 5, generator=generator).T,
        "bf16": torch.randn(6, generator=generator).bfloat16(),
        "fp16": torch.tensor([1e-7, float("inf"), float("nan")]).half(),
        "int64": torch.tensor(2**53 + 1),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "needs grad": torch.ones(2, requires_grad=True),
    }
    store = CheckpointStore(Folder(location.format(tmp_path=tmp_path)), num_to_keep=1)
    store.save(Checkpoint(123, tensors, META))
    loaded = store.latest()
    assert loaded is not None
    assert loaded.step == 123
    assert loaded.meta == META
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype is tensor.dtype
        torch.testing.assert_close(loaded.tensors[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    store = CheckpointStore(Folder(tmp_path / "none"), num_to_keep=2)
    assert store.latest() is None
    assert store.load(1) is None


def test_only_the_newest_stay(tmp_path: Path) -> None:
    store = CheckpointStore(Folder(tmp_path), num_to_keep=2)
    for step in (1, 2, 10, 9_999_999):
        store.save(state(step))
    assert sorted({path.stem for path in tmp_path.iterdir()}) == ["step-000000010", "step-009999999"]
    assert len(list(tmp_path.iterdir())) == 4
    assert is_state(store.latest(), 9_999_999)
    assert is_state(store.load(10), 10)
    assert store.load(2) is None


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("size", [0, 1, 0.5, -1])
def test_a_truncated_file_makes_the_older_checkpoint_the_latest(
    store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, size: float
) -> None:
    path = newest(tmp_path, suffix)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * size) if size == 0.5 else int(size)])
    assert is_state(store.latest(), 5)
    assert "step-000000010: damaged, so an older checkpoint is used" in caplog.text
    assert store.load(10) is None


def test_no_flipped_bit_is_ever_loaded(store: CheckpointStore, tmp_path: Path) -> None:
    for path in (newest(tmp_path, "safetensors"), newest(tmp_path, "json")):
        whole = path.read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            loaded = store.load(10)
            assert loaded is None or is_state(loaded, 10), f"byte {position} of {path.name}"
        path.write_bytes(whole)
    assert is_state(store.latest(), 10)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"', "{}", '{"sha256": 1}', '{"sha256": null, "step": 10}'])
def test_a_header_of_another_shape_makes_the_older_checkpoint_the_latest(
    store: CheckpointStore, tmp_path: Path, content: str
) -> None:
    newest(tmp_path, "json").write_text(content)
    assert is_state(store.latest(), 5)


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_a_checkpoint_without_its_other_half_doesnt_count(
    store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    newest(tmp_path, suffix).unlink()
    assert is_state(store.latest(), 5)
    assert ("damaged" in caplog.text) == (suffix == "safetensors")


def test_halves_of_two_checkpoints_dont_make_one(store: CheckpointStore, tmp_path: Path) -> None:
    old, new = sorted(tmp_path.glob("*.safetensors"))
    new.write_bytes(old.read_bytes())
    assert is_state(store.latest(), 5)


def test_nothing_is_loaded_where_everything_is_damaged(store: CheckpointStore, tmp_path: Path) -> None:
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"")
    assert store.latest() is None


def test_a_new_checkpoint_stays_though_a_newer_one_is_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(Folder(tmp_path), num_to_keep=1)
    store.save(state(10))
    newest(tmp_path, "safetensors").write_bytes(b"")
    store.save(state(3))
    assert is_state(store.latest(), 3)
    store.save(state(10))
    assert is_state(store.latest(), 10)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_the_last_good_checkpoint(store: CheckpointStore, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = Checkpoint(15, {"w": torch.zeros(100_000)}, META)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(StorageFullError, match="no space left"):
            store.save(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_state(store.latest(), 10)
    assert is_state(store.load(5), 5)
    assert len(list(tmp_path.iterdir())) == 4
    store.save(large)
    assert (latest := store.latest()) is not None
    assert latest.step == 15


SAVE_LOOPS = """
import json, os, signal, sys, time
import torch
from graftstack.checkpoint import Checkpoint, CheckpointStore
from graftstack.storage import Folder

store = CheckpointStore(Folder(sys.argv[1]), num_to_keep=1)
results = []
for delay in (0.05, 0.08, 0.11, 0.15, 0.19, 0.24):
    latest = store.latest()
    step = latest.step if latest else 0
    child = os.fork()
    if child == 0:
        while True:
            step += 1
            store.save(Checkpoint(step, {"w": torch.full((500_000,), float(step))}, {"step": step}))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = store.latest()
    whole = found and found.meta == {"step": found.step} and bool((found.tensors["w"] == found.step).all())
    results.append([step, found.step if found else 0, whole])
print(json.dumps(results))
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAVE_LOOPS, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    results: list[list[Any]] = json.loads(done.stdout)
    assert len(results) == 6
    reached = 0
    for before, after, is_whole in results:
        assert before == reached
        assert after >= before
        assert is_whole or after == 0
        reached = after
    assert reached > 0
