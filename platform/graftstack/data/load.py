"""Everything between a `DataConfig` and batches of pixels, in one call."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graftstack.config.schema import DataConfig, OnBadImage
from graftstack.data import splits as splitting
from graftstack.data.cache import cache_for
from graftstack.data.encoded import Decoded, EncodedImages
from graftstack.data.images import CachedImages, DecodeOnDemand, Images, encoded_images
from graftstack.data.splits import Splits
from graftstack.data.table import SourceTable, read_table
from graftstack.errors import DataError

Progress = Callable[[int, int], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images, labels and splits; row i of everything is the same image. Pickles without the pixels."""

    images: Images
    labels: npt.NDArray[np.int64]
    """``int64 [N]``: positions in `class_names`; -1 where the class isn't known."""
    row_ids: npt.NDArray[Any]
    """``int64 [N]`` positions in the source, or ``str [N]`` relative paths."""
    class_names: tuple[str, ...]
    splits: Splits
    fingerprint: str
    """Of the source's content, bad images included."""
    num_skipped: int
    """Images left out because they can't be decoded."""
    split: npt.NDArray[np.str_] | None
    """``str [N]``: what the source says of each row; None where it doesn't."""
    groups: npt.NDArray[np.str_] | None
    """``str [N]``: rows with the same value are on one side of a split."""

    def __len__(self) -> int:
        return len(self.labels)


def load_images(
    config: DataConfig,
    *,
    image_size: int,
    seed: int,
    class_names: tuple[str, ...] | None = None,
    require_labels: bool = True,
    progress: Progress | None = None,
) -> ImageData:
    """Reads, decodes and splits the images of `config`.

    Args:
        config: the source and what of it.
        image_size: height and width S that images are brought to, in pixels.
        seed: of the split.
        class_names: the classes of a model that is to see the images. The data need not suit learning then: one
            class, or rows that all test, will do.
        require_labels: without, rows may lack a label or have one that isn't in `class_names`; all rows test.
        progress: called with (images decoded, images in all) while a cache is made.

    Raises:
        DataError: the data can't be read, decoded or learnt from.
    """
    source = read_table(config, class_names=class_names, require_labels=require_labels)
    data = images_of(source, config, image_size=image_size, progress=progress)
    if not require_labels:
        return data
    return replace(data, splits=split_rows(data, config, seed=seed, for_training=class_names is None))


def images_of(
    source: SourceTable, config: DataConfig, *, image_size: int, progress: Progress | None = None
) -> ImageData:
    """Returns the images of a table that was read, as `load_images` does; all rows test.

    Raises:
        DataError: none of them can be decoded, or one can't and `config` doesn't skip it.
    """
    decoded = _decode(config, source, image_size, progress)
    kept = source.without(sorted(decoded.bad))
    if not len(kept):
        raise DataError(
            f"data={config.source.value}: none of the {len(source)} images can be decoded; check data.image"
        )
    none = np.empty(0, dtype=np.int64)
    return ImageData(
        images=decoded.images,
        labels=kept.labels,
        row_ids=kept.row_ids,
        class_names=kept.class_names,
        splits=Splits(none, none, np.arange(len(kept))),
        fingerprint=kept.fingerprint,
        num_skipped=len(decoded.bad),
        split=kept.split,
        groups=kept.groups,
    )


def split_again(data: ImageData, config: DataConfig, *, seed: int) -> ImageData:
    """Returns the same images split by another seed; nothing is read. Raises as `split_rows`."""
    return replace(data, splits=split_rows(data, config, seed=seed))


def split_rows(source: SourceTable | ImageData, config: DataConfig, *, seed: int, for_training: bool = True) -> Splits:
    """Returns the split that the source gives, or a random one by group or by class.

    Raises:
        DataError: `for_training`, and the rows can't be learnt from.
    """
    labels, groups = source.labels, source.groups
    if for_training:
        splitting.check_classes(labels, source.class_names)
    if source.split is not None:
        splits = splitting.given_split(source.split)
        if groups is not None:
            splitting.check_groups_apart(splits, groups)
    elif groups is not None:
        splits = splitting.group_split(labels, groups, config.val_fraction, seed=seed)
    else:
        if for_training:
            splitting.check_no_lone_rows(labels, source.class_names)
        splits = splitting.stratified_split(labels, config.val_fraction, seed=seed)
    if for_training:
        splitting.check_splits(splits, labels, source.class_names)
    return splitting.limit_train(splits, labels, config.num_train_per_class, seed=seed)


class _Outcome(NamedTuple):
    images: Images
    bad: dict[int, str]


def _decode(config: DataConfig, source: SourceTable, image_size: int, progress: Progress | None) -> _Outcome:
    encoded = encoded_images(config, source.table)
    may_skip = config.on_bad_image is OnBadImage.skip
    cache = cache_for(config.cache_dir, source.fingerprint, num_rows=len(source), image_size=image_size)
    if cache.num_bytes <= config.cache_bytes:
        try:
            bad = cache.open(lambda: _checked(encoded, image_size, may_skip=may_skip), progress)
            if bad and not may_skip:  # the cache was made by a run that may skip
                raise encoded.error(bad)
            return _Outcome(CachedImages(cache.pixels, sorted(bad)), bad)
        except OSError as error:
            _log.warning("decoded images aren't kept: %s; they are decoded anew in each epoch", error)
    bad = {}
    if may_skip:  # which rows there are must be known before they are split
        for chunk in encoded.decode_all(image_size):
            bad |= chunk.bad
    return _Outcome(DecodeOnDemand(encoded, config, image_size, sorted(bad)), bad)


def _checked(encoded: EncodedImages, image_size: int, *, may_skip: bool) -> Iterator[Decoded]:
    for chunk in encoded.decode_all(image_size):
        if chunk.bad and not may_skip:
            raise encoded.error(chunk.bad)
        yield chunk
