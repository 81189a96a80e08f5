"""The classification data sets of torchvision.datasets, from files that are already there: nothing is downloaded."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from graftstack.config.schema import DataConfig
from graftstack.data.location import locate
from graftstack.data.sources.png import encode_png
from graftstack.errors import DataError, did_you_mean
from graftstack.reason import reason

# The words that torchvision's classes have for each split; of each, the first that the class knows.
_SPLIT_WORDS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}


def read(config: DataConfig) -> pa.Table:
    """Returns all splits of the data set that `config.name` names, below the root folder `config.path`.

    Classes are called as the data set calls them. Images in files of their own stay there; others become PNG bytes.
    """
    factory = _factory(str(config.name))
    location = locate(str(config.path))
    if "file" not in np.atleast_1d(location.fs.protocol):
        raise DataError(
            f"data.path={config.path}: torchvision reads local folders only; copy the data, give its folder"
        )
    images, labels, splits = [], [], []
    for split, dataset in _parts(config, factory, location.folder):
        for image, label in _items(config, dataset):
            images.append(image)
            labels.append(label)
            splits.append(split)
    columns: dict[str, Any] = {"row_id": np.arange(len(labels)), "label": pa.array(labels, pa.string())}
    paths = [location.relative(image.as_posix()) for image in images if isinstance(image, Path)]
    if paths:
        columns |= {"path": pa.array(paths, pa.string()), "version": pa.array(location.versions(paths))}
    else:
        columns["image"] = pa.array(images, pa.binary())
    if None not in splits:
        columns["split"] = pa.array(splits, pa.string())
    return pa.table(columns)


def _factory(name: str) -> Callable[..., Any]:
    from torchvision import datasets

    known = [known for known in datasets.__all__ if inspect.isclass(getattr(datasets, known))]
    if name not in known:
        raise DataError(f"data.name={name}: torchvision.datasets has no such class; {did_you_mean(name, known)}")
    return getattr(datasets, name)  # type: ignore[no-any-return]


def _parts(config: DataConfig, factory: Callable[..., Any], root: str) -> Iterator[tuple[str | None, Any]]:
    parameters = inspect.signature(factory).parameters
    common: dict[str, Any] = {"root": root, "download": False, "loader": Path}
    common = {key: value for key, value in common.items() if key in parameters}
    if "train" in parameters:
        yield "train", _make(config, factory, common | {"train": True})
        yield "test", _make(config, factory, common | {"train": False})
    elif "split" in parameters:
        parts = [(split, _first(config, factory, common, words)) for split, words in _SPLIT_WORDS.items()]
        if parts[0][1] is None:
            raise DataError(f"data.name={config.name}: it has no train split; use data=image_folder or data=parquet")
        yield from ((split, dataset) for split, dataset in parts if dataset is not None)
    else:
        yield None, _make(config, factory, common)


def _first(config: DataConfig, factory: Callable[..., Any], common: dict[str, Any], words: Sequence[str]) -> Any:
    """Returns the data set of the first of `words` that the class knows; None if it knows none."""
    for word in words:
        try:
            return _make(config, factory, common | {"split": word})
        except ValueError:  # how torchvision refuses a word
            continue
    return None


def _make(config: DataConfig, factory: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return factory(**arguments)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"data.name={config.name}: its files aren't under data.path={config.path}; put them there with "
            f"torchvision.datasets.{config.name}(root, download=True) where there is a network"
        ) from error
    except (TypeError, ImportError) as error:
        raise DataError(f"data.name={config.name}: {reason(error)}; use data=image_folder or data=parquet") from error


def _items(config: DataConfig, dataset: Any) -> Iterator[tuple[Path | bytes, str]]:
    classes = getattr(dataset, "classes", None)
    for position in range(len(dataset)):
        image, target = dataset[position][:2]
        is_number = isinstance(target, int | np.integer) or (hasattr(target, "ndim") and target.ndim == 0)
        if not is_number or not isinstance(image, Image.Image | Path):
            raise DataError(
                f"data.name={config.name}: its items aren't an image and a class; use one that is for classification"
            )
        yield (
            image if isinstance(image, Path) else encode_png(image),
            _class_name(int(target), classes),
        )


def _class_name(target: int, classes: Any) -> str:
    if not isinstance(classes, list | tuple) or not 0 <= target < len(classes):
        return str(target)
    name = classes[target]
    return ", ".join(name) if isinstance(name, tuple) else str(name)  # ImageNet's classes have several names
