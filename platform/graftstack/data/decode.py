"""The bytes of an image, in any format and mode that Pillow knows, become ``uint8 [S, S, 3]``.

- grey, palette, CMYK and the like become RGB; transparency is composited over white
- 16-bit grey (``I;16``, and ``I``, which holds the same range) is scaled by 1/257: 65535 becomes 255
- floats hold 0..1, or 0..255 where any value exceeds 1
- the EXIF orientation is applied
- the largest centred square is resized to S x S, bilinear with antialiasing; an image of S x S stays as it is
"""

from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from graftstack.errors import DataError
from graftstack.reason import reason

DECODER_VERSION = 1
"""Raised whenever the same bytes come to give other pixels: decoded caches are keyed by it."""

MAX_PIXELS = 2**26
"""Larger images are taken for decompression bombs."""


class BadImageError(DataError):
    """The bytes aren't an image; the message is the bare reason, for the caller to name the row."""


def decode(data: bytes, image_size: int) -> npt.NDArray[np.uint8]:
    """Returns the image as RGB.

    Args:
        data: an encoded image.
        image_size: height and width S of the result, in pixels.

    Returns:
        ``uint8 [S, S, 3]``.

    Raises:
        BadImageError: unknown format, truncated, damaged, or more than `MAX_PIXELS`.
    """
    if not data:
        raise BadImageError("it's empty")
    try:
        with Image.open(BytesIO(data)) as image:
            _check_size(image)
            rgb = _to_rgb(ImageOps.exif_transpose(image))
        return np.asarray(_to_square(rgb, image_size))
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError("not an image in a known format") from error
    except Exception as error:  # a decoder given damaged bytes may raise anything
        raise BadImageError(reason(error)) from error


def shorter_side(data: bytes) -> int:
    """Returns the shorter of an encoded image's height and width, in pixels; its pixels aren't read.

    Raises:
        BadImageError: it isn't an image.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            return min(image.size)
    except Exception as error:  # as in `decode`
        raise BadImageError(reason(error)) from error


def _check_size(image: Image.Image) -> None:
    """Runs while only the header is read, before any pixel takes memory."""
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_grey(np.asarray(image).astype(np.float64) / 257)
    if image.mode == "F":
        return _from_float(np.asarray(image))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_float(pixels: npt.NDArray[np.float32]) -> Image.Image:
    if not np.isfinite(pixels).all():
        raise BadImageError("it holds NaN or infinite pixels")
    return _from_grey(pixels * 255.0 if pixels.max() <= 1 else pixels)


def _from_grey(pixels: npt.NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _to_square(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # One call crops and resizes; a reducing gap of 3 is, to the eye, exact, and several times faster on large images.
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
