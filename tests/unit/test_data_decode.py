"""Every format and mode of image comes out as the right RGB pixels; what isn't an image is refused."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from graftstack.data import decode as decoding
from graftstack.data.decode import BadImageError, decode


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pixel(data: bytes, size: int = 2) -> list[int]:
    image = decode(data, size)
    assert image.dtype == np.uint8
    assert image.shape == (size, size, 3)
    return image[0, 0].tolist()


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("LA", (0, 0), [255, 255, 255]),
        ("LA", (90, 255), [90, 90, 90]),
    ],
)
def test_each_mode_becomes_rgb_with_transparency_over_white(mode: str, colour: Any, rgb: list[int]) -> None:
    assert pixel(encode(Image.new(mode, (2, 2), colour))) == rgb


def test_half_transparent_black_is_mid_grey() -> None:
    assert pixel(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))) == pytest.approx([127, 127, 127], abs=1)


def test_a_palette_gives_its_colours_and_its_transparent_entry_is_white() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50, 9, 9, 9])
    assert pixel(encode(image)) == [200, 100, 50]
    assert pixel(encode(image, transparency=1)) == [255, 255, 255]
    assert pixel(encode(image, transparency=bytes([255, 0, 255]))) == [255, 255, 255]


def test_a_colour_declared_transparent_is_white() -> None:
    assert pixel(encode(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))) == [255, 255, 255]


def test_cmyk_is_neither_inverted_nor_washed_out() -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert pixel(encode(cyan, "JPEG", quality=100), 8) == pytest.approx([0, 255, 255], abs=3)
    assert pixel(encode(cyan, "TIFF"), 8) == [0, 255, 255]


@pytest.mark.parametrize("file_format", ["PNG", "PPM", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(file_format: str) -> None:
    values = np.array([[0, 257], [32896, 65535]], dtype=np.uint16)
    grey = decode(encode(Image.fromarray(values), file_format), 2)
    assert grey[:, :, 0].tolist() == [[0, 1], [128, 255]]
    assert (grey == grey[:, :, :1]).all()


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floats_hold_fractions_or_bytes(top: float) -> None:
    values = np.array([[0, top / 2], [top, top]], dtype=np.float32)
    assert decode(encode(Image.fromarray(values), "TIFF"), 2)[:, :, 1].tolist() == [[0, 128], [255, 255]]


def test_floats_with_nan_are_bad() -> None:
    values = np.array([[0, np.nan], [1, 1]], dtype=np.float32)
    with pytest.raises(BadImageError, match="NaN"):
        decode(encode(Image.fromarray(values), "TIFF"), 2)


def test_the_exif_orientation_is_applied() -> None:
    pixels = np.array([[[255, 0, 0], [0, 0, 255]], [[255, 0, 0], [0, 0, 255]]], dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    turned = decode(encode(Image.fromarray(pixels), "PNG", exif=exif), 2)
    assert turned[0].tolist() == [[255, 0, 0], [255, 0, 0]]
    assert turned[1].tolist() == [[0, 0, 255], [0, 0, 255]]


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    assert (decode(encode(Image.fromarray(pixels)), 5) == pixels).all()


@pytest.mark.parametrize("size", [(30, 10), (10, 30), (10, 10)])
def test_an_image_is_resized_by_its_shorter_side_and_cropped_at_the_centre(size: tuple[int, int]) -> None:
    width, height = size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    halved = np.asarray(image.resize((width // 2, height // 2), Image.Resampling.BILINEAR)).astype(int)
    top, left = (height // 2 - 5) // 2, (width // 2 - 5) // 2
    assert np.abs(decode(encode(image), 5) - halved[top : top + 5, left : left + 5]).max() <= 1


def test_shrinking_averages_over_what_it_shrinks() -> None:
    checks = np.indices((512, 512)).sum(axis=0) % 2 * 255
    small = decode(encode(Image.fromarray(checks.astype(np.uint8))), 4)
    assert np.abs(small.astype(int) - 127).max() <= 1


@pytest.mark.parametrize("file_format", ["JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_formats_other_than_png_are_read(file_format: str) -> None:
    assert pixel(encode(Image.new("RGB", (2, 2), (250, 250, 250)), file_format)) == pytest.approx([250] * 3, abs=2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"not an image at all", "known format"), (encode(Image.new("RGB", (64, 64)))[:60], "\\w")],
)
def test_what_is_not_an_image_is_refused_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason) as caught:
        decode(data, 8)
    assert "\n" not in str(caught.value)


def test_a_truncated_photograph_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "JPEG")
    with pytest.raises(BadImageError, match="truncated"):
        decode(data[: len(data) // 2], 8)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 99)
    with pytest.raises(BadImageError, match="10x10 pixels"):
        decode(encode(Image.new("L", (10, 10))), 8)
