"""Pixels become PNG bytes, so that one decoder serves every source."""

from io import BytesIO

from PIL import Image


def encode_png(image: Image.Image) -> bytes:
    """Returns `image` without loss, compressed lightly: it is decoded again soon."""
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
