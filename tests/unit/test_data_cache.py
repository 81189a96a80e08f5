"""Images are decoded once, whoever asks; a damaged cache is made again; and without a cache nothing else changes."""

import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from graftstack.config.schema import DataConfig, OnBadImage, Source
from graftstack.data import cache, encoded
from graftstack.data.decode import decode
from graftstack.data.images import CachedImages, DecodeOnDemand
from graftstack.data.load import ImageData, load_images
from graftstack.errors import DataError

NUM_ROWS = 200


def png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def config(tmp_path: Path, pixels: np.ndarray) -> DataConfig:
    labels = [f"class {row % 2}" for row in range(NUM_ROWS)]
    pq.write_table(pa.table({"image": [png(image) for image in pixels], "label": labels}), tmp_path / "t.parquet")
    return DataConfig(
        source=Source.parquet, path=str(tmp_path / "t.parquet"), image="image", cache_dir=str(tmp_path / "cache")
    )


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each image that is decoded."""
    calls: list[int] = []

    def counting(data: bytes, image_size: int) -> np.ndarray:
        calls.append(1)
        return decode(data, image_size)

    monkeypatch.setattr(encoded, "decode", counting)
    return calls


def load(config: DataConfig, image_size: int = 8) -> ImageData:
    return load_images(config, image_size=image_size, seed=0)


def pixels_file(config: DataConfig) -> Path:
    (path,) = Path(str(config.cache_dir)).glob("images/*.npy")
    return path


def with_bad_rows(config: DataConfig, *rows: int) -> DataConfig:
    table = pq.read_table(config.path)
    images = [b"broken" if row in rows else image for row, image in enumerate(table["image"].to_pylist())]
    pq.write_table(table.set_column(0, "image", pa.array(images)), config.path)
    return config


def test_a_batch_holds_the_pixels_channels_first_in_the_order_asked_for(config: DataConfig, pixels: np.ndarray) -> None:
    images = load(config).images
    assert len(images) == NUM_ROWS
    assert images.image_size == 8
    batch = images.batch(np.array([7, 3, 7]))
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous()
    assert (batch.numpy() == pixels[[7, 3, 7]].transpose(0, 3, 1, 2)).all()
    batch.zero_()  # a batch is its owner's: the cache doesn't change
    assert (images.batch(np.array([7]))[0].numpy() == pixels[7].transpose(2, 0, 1)).all()
    assert images.batch(np.array([], dtype=np.int64)).shape == (0, 3, 8, 8)


def test_each_image_is_decoded_once(config: DataConfig, decoded: list[int]) -> None:
    load(config)
    assert len(decoded) == NUM_ROWS
    load(config)
    load(dataclasses.replace(config, val_fraction=0.5))
    assert len(decoded) == NUM_ROWS
    load(config, image_size=4)
    assert len(decoded) == 2 * NUM_ROWS


def test_the_cache_lies_where_the_environment_says(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTSTACK_CACHE", str(tmp_path / "elsewhere"))
    load(dataclasses.replace(config, cache_dir=None))
    assert len(list((tmp_path / "elsewhere/images").glob("*.npy"))) == 1


def test_progress_counts_up_to_all_rows_and_a_cache_needs_none(config: DataConfig) -> None:
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        load_images(config, image_size=8, seed=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 200), (128, 200), (192, 200), (200, 200)]


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


def damage_note(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


def damage_shape_of_note(path: Path) -> None:
    path.with_suffix(".json").write_text(json.dumps([1]))


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_note, damage_shape_of_note, Path.unlink])
def test_a_damaged_cache_is_made_again(
    config: DataConfig, pixels: np.ndarray, decoded: list[int], damage: Callable[[Path], None]
) -> None:
    load(config)
    damage(pixels_file(config))
    images = load(config).images
    assert len(decoded) == 2 * NUM_ROWS
    assert (images.batch(np.arange(NUM_ROWS)).numpy() == pixels.transpose(0, 3, 1, 2)).all()


def test_a_large_cache_is_checked_by_blocks(
    config: DataConfig, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(cache, "_BLOCK_BYTES", 600)
    load(config)
    load(config)
    assert len(decoded) == NUM_ROWS
    damage_flip(pixels_file(config))
    load(config)
    assert len(decoded) == 2 * NUM_ROWS


def test_an_interrupted_run_leaves_no_cache_and_no_litter(config: DataConfig) -> None:
    def stop(done: int, _total: int) -> None:
        if done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_images(config, image_size=8, seed=0, progress=stop)
    assert {path.suffix for path in Path(str(config.cache_dir)).glob("images/*")} == {".lock"}


def test_processes_that_start_together_make_one_cache(config: DataConfig) -> None:
    script = (
        "import sys, time\n"
        "from graftstack.config.schema import DataConfig, Source\n"
        "from graftstack.data.load import load_images\n"
        "config = DataConfig(source=Source.parquet, path=sys.argv[1], image='image', cache_dir=sys.argv[2])\n"
        "made = []\n"
        "def slow(done, total):\n"
        "    made.append(done)\n"
        "    time.sleep(0.2)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "data = load_images(config, image_size=8, seed=0, progress=slow)\n"
        "print(len(made), int(data.images._array.sum()))\n"
    )
    command = [sys.executable, "-c", script, str(config.path), str(config.cache_dir)]
    source_root = str(Path(encoded.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": source_root}
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    answers = [process.communicate("go\n")[0].split() for process in processes]
    assert sorted(made for made, _ in answers) == ["0", "4"]
    assert answers[0][1] == answers[1][1]


@pytest.mark.parametrize("cache_bytes", [0, NUM_ROWS * 8 * 8 * 3 - 1])
def test_images_over_budget_are_decoded_on_demand_and_are_the_same(config: DataConfig, cache_bytes: int) -> None:
    cached = load(config)
    on_demand = load(dataclasses.replace(config, cache_bytes=cache_bytes))
    assert isinstance(cached.images, CachedImages)
    assert isinstance(on_demand.images, DecodeOnDemand)
    assert len(on_demand.images) == NUM_ROWS
    indices = np.random.default_rng(0).permutation(NUM_ROWS)
    assert torch.equal(on_demand.images.batch(indices), cached.images.batch(indices))
    assert on_demand.images.batch(indices[:1]).is_contiguous()
    assert (on_demand.splits.val == cached.splits.val).all()


@pytest.mark.parametrize("trouble", ["unwritable", "full"])
def test_where_no_cache_can_be_written_images_are_decoded_on_demand(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    if trouble == "full":
        monkeypatch.setattr(cache, "_SPARE_BYTES", 2**62)
    else:
        Path(str(config.cache_dir)).write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        assert isinstance(load(config).images, DecodeOnDemand)
    assert "decoded anew in each epoch" in caplog.text


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_image_data_pickles_to_its_labels_and_no_pixels(config: DataConfig, cache_bytes: int) -> None:
    data = load(dataclasses.replace(with_bad_rows(config, 5), cache_bytes=cache_bytes, on_bad_image=OnBadImage.skip))
    pickled = pickle.dumps(data)
    assert len(pickled) < data.labels.nbytes * 4 + 4000
    again = pickle.loads(pickled)
    indices = np.arange(len(data))
    assert torch.equal(again.images.batch(indices), data.images.batch(indices))
    assert again.class_names == data.class_names


def test_a_pickle_that_outlives_its_cache_says_what_to_do(config: DataConfig) -> None:
    pickled = pickle.dumps(load(config))
    pixels_file(config).unlink()
    with pytest.raises(DataError, match=r"aren't on this machine; set data\.cache_dir"):
        pickle.loads(pickled)


def test_a_bad_image_ends_loading_and_is_named(config: DataConfig) -> None:
    message = r"image 70 can't be decoded: not an image in a known format; .* set data\.on_bad_image=skip"
    with pytest.raises(DataError, match=message):
        load(with_bad_rows(config, 70, 90))


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_skipped_images_are_counted_and_leave_no_gap(config: DataConfig, pixels: np.ndarray, cache_bytes: int) -> None:
    config = dataclasses.replace(with_bad_rows(config, 1, 199), on_bad_image=OnBadImage.skip, cache_bytes=cache_bytes)
    for _ in range(2):  # made, then found
        data = load(config)
        assert data.num_skipped == 2
        assert len(data) == len(data.images) == NUM_ROWS - 2
        assert data.row_ids.tolist() == [0, *range(2, 199)]
        assert sum(len(rows) for rows in data.splits) == NUM_ROWS - 2
        batch = data.images.batch(np.arange(NUM_ROWS - 2))
        assert (batch.numpy() == np.delete(pixels, [1, 199], axis=0).transpose(0, 3, 1, 2)).all()


def test_a_cache_made_by_a_run_that_skips_does_not_hide_the_bad_image(config: DataConfig) -> None:
    load(dataclasses.replace(with_bad_rows(config, 3), on_bad_image=OnBadImage.skip))
    with pytest.raises(DataError, match="image 3 can't be decoded"):
        load(config)


def test_on_demand_a_bad_image_surfaces_in_the_batch_that_holds_it(config: DataConfig) -> None:
    images = load(dataclasses.replace(with_bad_rows(config, 3), cache_bytes=0)).images
    images.batch(np.array([0, 1]))
    with pytest.raises(DataError, match="image 3 can't be decoded"):
        images.batch(np.array([1, 3]))


def test_no_image_that_can_be_decoded_is_an_error(config: DataConfig) -> None:
    with pytest.raises(DataError, match="none of the 200 images can be decoded"):
        load(dataclasses.replace(with_bad_rows(config, *range(NUM_ROWS)), on_bad_image=OnBadImage.skip))
