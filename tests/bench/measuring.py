"""What benchmarks have in common: clocks, tables of figures, and where real data lies."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from graftstack.cluster.session import quiet_ray
from graftstack.data.sources.png import encode_png

REPOSITORY = Path(__file__).resolve().parents[2]


class Table:
    """Rows that are printed at once, so that a long benchmark can be watched."""

    def __init__(self, title: str) -> None:
        print(f"\n{title}", flush=True)

    def row(self, name: str, value: str, target: str = "") -> None:
        print(f"  {name:<58} {value:>16}   {target}", flush=True)


class Timed(NamedTuple):
    """What a piece of work took, and what it returned."""

    seconds: float
    result: Any


def timed(work: Callable[[], Any]) -> Timed:
    """Does the work."""
    began = time.perf_counter()
    result = work()
    return Timed(time.perf_counter() - began, result)


def real_data(name: str) -> Path:
    """Returns where a file of the test data lies."""
    return Path(os.environ.get("GRAFTSTACK_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / name


def write_images(folder: Path, *, num_images: int, size: int) -> list[str]:
    """Writes random images of two classes, and returns them as the data of a job."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (num_images, size, size, 3), dtype=np.uint8)
    table = pa.table(
        {
            "image": [encode_png(Image.fromarray(image)) for image in pixels],
            "label": generator.integers(0, 2, len(pixels)),
        }
    )
    pq.write_table(table, folder / "images.parquet")
    return [
        *("data=parquet", f"data.path={folder}/images.parquet", "data.image=image", "data.val_fraction=0.01"),
        *(f"data.cache_dir={folder}/cache", f"data.image_size={size}"),
    ]


def load_average() -> str:
    """Returns how busy the machine is with everything, over the last minute."""
    return f"load {os.getloadavg()[0]:.1f}"


@contextmanager
def running_ray(num_cpus: int) -> Iterator[None]:
    """Starts a Ray that believes in so many CPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    quiet_ray()
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()
