"""1,797 handwritten digits, 8 x 8 pixels, ten classes: bundled with scikit-learn, so they need no network.

Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (its test part).
"""

import numpy as np
import pyarrow as pa
from PIL import Image

from graftstack.config.schema import DataConfig
from graftstack.data.sources.png import encode_png


def read(_config: DataConfig) -> pa.Table:
    """Returns the digits; their 17 grey levels, 0..16, spread over 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    return pa.table(
        {
            "row_id": pa.array(np.arange(len(pixels))),
            "image": pa.array([encode_png(Image.fromarray(image)) for image in pixels], pa.binary()),
            "label": pa.array([str(target) for target in digits.target], pa.string()),
        }
    )
