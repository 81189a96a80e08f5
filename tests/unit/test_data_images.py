"""Images in an array: the same pixels as wherever they came from, and no copy where none is needed."""

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from graftstack.config.schema import DataConfig, OnBadImage, Source
from graftstack.data import images as images_module
from graftstack.data.images import ArrayImages, Images, in_memory
from graftstack.data.load import images_of
from graftstack.data.table import read_table

NUM_ROWS = 20


def png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 6, 6, 3), dtype=np.uint8)


def load(folder: Path, encoded: list[bytes], **options: Any) -> Images:
    pq.write_table(pa.table({"image": encoded, "label": ["a", "b"] * (len(encoded) // 2)}), folder / "t.parquet")
    config = DataConfig(
        source=Source.parquet, path=str(folder / "t.parquet"), image="image", cache_dir=str(folder / "cache"), **options
    )
    return images_of(read_table(config), config, image_size=6).images


def test_a_batch_holds_the_asked_images_in_their_order_as_a_copy_with_channels_first(pixels: np.ndarray) -> None:
    pixels.setflags(write=False)
    images = ArrayImages(pixels)
    assert (len(images), images.image_size) == (NUM_ROWS, 6)
    batch = images.batch(np.array([3, 0, 3]))
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous()
    assert (batch.permute(0, 2, 3, 1).numpy() == pixels[[3, 0, 3]]).all()
    batch.zero_()
    assert images.pixels[3].any()


def test_images_that_a_file_holds_whole_stay_in_its_memory_map(tmp_path: Path, pixels: np.ndarray) -> None:
    cached = load(tmp_path, [png(image) for image in pixels])
    images = in_memory(cached)
    assert (images.pixels == pixels).all()
    assert np.shares_memory(images.pixels, in_memory(cached).pixels)
    assert not images.pixels.flags.writeable
    assert in_memory(images) is images


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}], ids=["cached", "on demand"])
def test_images_less_the_bad_ones_are_copied(
    tmp_path: Path, pixels: np.ndarray, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "_COPY_BYTES", 3 * 6 * 6 * 7)  # seven rows at a time
    encoded = [png(image) for image in pixels]
    encoded[4] = b"broken"
    source = load(tmp_path, encoded, on_bad_image=OnBadImage.skip, **options)
    assert (in_memory(source).pixels == np.delete(pixels, 4, axis=0)).all()


def test_the_array_is_pickled_out_of_band(tmp_path: Path, pixels: np.ndarray) -> None:
    for images in (ArrayImages(pixels), in_memory(load(tmp_path, [png(image) for image in pixels]))):
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(images, protocol=5, buffer_callback=buffers.append)
        assert len(pickled) < 1000
        assert np.shares_memory(np.frombuffer(buffers[0].raw(), np.uint8), images.pixels)
        again = pickle.loads(pickled, buffers=[bytes(buffers[0].raw())])
        assert not again.pixels.flags.writeable
        assert (again.batch(np.arange(NUM_ROWS)) == images.batch(np.arange(NUM_ROWS))).all()
