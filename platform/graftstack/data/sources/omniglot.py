"""Omniglot: hand-written characters of 50 alphabets, from a Parquet file or the folder that torchvision leaves.

Lake et al. 2015, Human-level concept learning through probabilistic program induction. Few-shot results are told on
the split of Vinyals et al. 2016, Matching Networks, whose classes only the Parquet file says.
"""

import re
from dataclasses import replace

import pyarrow as pa

from graftstack.config.schema import DataConfig, Source
from graftstack.data.location import Location, locate, version
from graftstack.data.sources import parquet
from graftstack.data.sources.tabular import MissingColumnError
from graftstack.errors import DataError

_COLUMNS = ("image", "alphabet", "character", "split")
_ROOTS = ("", "omniglot-py/")
"""Where the parts lie below `data.path`: `torchvision.datasets.Omniglot` makes a folder of its own below its root."""
_IMAGE = re.compile(r"(images_background|images_evaluation)/([^/]+)/([^/]+)/[^/]+")


def read(config: DataConfig) -> pa.Table:
    """Returns the images; their labels are ``ALPHABET/CHARACTER``.

    `config.path` is one of:

    - a Parquet file, or a folder of them, with columns image (encoded bytes), alphabet, character and split;
    - the root folder of `torchvision.datasets.Omniglot`: ``images_background/ALPHABET/CHARACTER/*.png``, which train,
      and ``images_evaluation``, which test. Where only one of these is there, nothing is said of a split.

    Raises:
        DataError: it is neither, or a column is missing.
    """
    location = locate(str(config.path))
    table = None if location.is_file else _read_folder(location)
    return _read_parquet(config, location) if table is None else table


def _read_folder(location: Location) -> pa.Table | None:
    """Returns the images below a folder; None where it isn't laid out as torchvision does."""
    files = location.find(frozenset({".png"}))
    for root in _ROOTS:
        found = {path: _IMAGE.fullmatch(path.removeprefix(root)) for path in files if path.startswith(root)}
        images = {path: image for path, image in found.items() if image is not None}
        if not images:
            continue
        columns = {
            "row_id": pa.array(images, pa.string()),
            "path": pa.array(images, pa.string()),
            "version": pa.array([version(files[path]) for path in images], pa.string()),
            "label": pa.array([f"{image[2]}/{image[3]}" for image in images.values()], pa.string()),
        }
        parts = [image[1] for image in images.values()]
        if len(set(parts)) == 2:
            splits = ["train" if part == "images_background" else "test" for part in parts]
            columns["split"] = pa.array(splits, pa.string())
        return pa.table(columns)
    return None


def _read_parquet(config: DataConfig, location: Location) -> pa.Table:
    if not location.is_file and not location.find(frozenset({".parquet"})):
        raise DataError(
            f"data.path={config.path}: the folder holds neither .parquet files nor images_background/ALPHABET/"
            "CHARACTER/*.png; give omniglot.parquet, or the root folder of torchvision.datasets.Omniglot"
        )
    named = replace(
        config,
        source=Source.parquet,
        image="image",
        split="split",
        label="label",
        features=["alphabet", "character"],
        drop=[],
    )
    try:
        table = parquet.read(named)
    except MissingColumnError as error:
        missing = next(name for name in _COLUMNS if name not in error.known)
        raise DataError(
            f"data.path={config.path}: no column {missing}; data=omniglot needs {', '.join(_COLUMNS)}, use "
            f"data=parquet for other columns (known: {', '.join(error.known)})"
        ) from error
    alphabets, characters = (table[name].cast(pa.string()).to_pylist() for name in ("alphabet", "character"))
    labels = [_label(alphabet, name) for alphabet, name in zip(alphabets, characters, strict=True)]
    return pa.table(
        {name: table[name] for name in table.column_names if name not in ("alphabet", "character", "label")}
        | {"label": pa.array(labels, pa.string())}
    )


def _label(alphabet: str | None, character: str | None) -> str | None:
    if not alphabet or not character:
        return None
    return character if character.startswith(f"{alphabet}/") else f"{alphabet}/{character}"
