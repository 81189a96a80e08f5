"""Which classes train and which test, the episodes that are drawn from them, and the images of those."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from graftstack.backbones.preprocessing import Preprocessing
from graftstack.config.meta import EvalConfig, MetaConfig, TrainEpisodesConfig
from graftstack.config.schema import BackboneConfig, DataConfig, Source
from graftstack.data.images import ArrayImages
from graftstack.data.load import ImageData
from graftstack.data.splits import Splits
from graftstack.errors import DataError
from graftstack.meta.classes import Classes, ClassSplit, check_episodes, split_classes
from graftstack.meta.episode_images import EpisodeImages
from graftstack.meta.episodes import Episode, EpisodeSampler, EpisodeShape, training_shape

SIZE = 4


def image_data(
    counts: Sequence[int], *, parts: Sequence[str] | None = None, groups: Sequence[str] | None = None
) -> ImageData:
    """Images of the classes c0, c1, ..., shuffled: so many of each, and each class in one of `parts`."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    none = np.empty(0, dtype=np.int64)
    return ImageData(
        images=ArrayImages(np.random.default_rng(1).integers(0, 256, (len(labels), SIZE, SIZE, 3), dtype=np.uint8)),
        labels=labels,
        row_ids=np.arange(len(labels)) + 100,
        class_names=tuple(f"c{index}" for index in range(len(counts))),
        splits=Splits(none, none, np.arange(len(labels))),
        fingerprint="",
        num_skipped=0,
        split=None if parts is None else np.array(parts)[labels],
        groups=None if groups is None else np.array(groups),
    )


def meta(*, data: DataConfig | None = None, train: Any = None, **options: Any) -> MetaConfig:
    of_eval = {key.removeprefix("eval_"): options.pop(key) for key in list(options) if key.startswith("eval_")}
    backbone = BackboneConfig(name="conv4", weights="conv4.safetensors")
    return MetaConfig(
        data=data or DataConfig(),
        backbone=backbone,
        eval=EvalConfig(**of_eval),
        train=TrainEpisodesConfig(**(train or {})),
        **options,
    )


def names(split: ClassSplit) -> list[list[str]]:
    return [sorted(part.names) for part in split]


def sampler(data: ImageData, shape: tuple[int, int, int], *, seed: int = 0, part: str = "train") -> EpisodeSampler:
    return EpisodeSampler(everything(data), EpisodeShape(*shape), seed=seed, part=part)


def everything(data: ImageData, **options: Any) -> Classes:
    """All classes in one part."""
    return split_classes(data, meta(eval_classes=list(data.class_names), **options)).test


def same(a: Episode, b: Episode) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))


# which classes train, validate and test


def test_named_classes_test_and_the_rest_trains_whatever_the_source_says() -> None:
    data = image_data([3, 4, 5], parts=["train", "val", "test"])
    split = split_classes(data, meta(eval_classes=["c1", "c0", "c1"]))
    assert names(split) == [["c2"], [], ["c0", "c1"]]


def test_a_class_may_be_named_by_a_number() -> None:
    data = image_data([3, 4])
    data = ImageData(**{**vars(data), "class_names": ("3", "7")})
    assert names(split_classes(data, meta(eval_classes=[7]))) == [["3"], [], ["7"]]


def test_the_split_of_the_source_is_kept() -> None:
    data = image_data([3] * 6, parts=["test", "train", "val", "train", "test", "val"])
    assert names(split_classes(data, meta(eval_val_fraction=0.4))) == [["c1", "c3"], ["c2", "c5"], ["c0", "c4"]]


def test_classes_validate_at_random_where_nothing_says_which() -> None:
    data = image_data([3] * 10, parts=["train"] * 6 + ["test"] * 4)
    for config in (meta(eval_val_fraction=0.2), meta(eval_val_fraction=0.2, eval_classes=["c6", "c7", "c8", "c9"])):
        train, val, test = names(split_classes(data, config))
        assert test == ["c6", "c7", "c8", "c9"]
        assert len(val) == 2
        assert sorted(train + val) == ["c0", "c1", "c2", "c3", "c4", "c5"]


def test_a_random_split_has_the_shares_that_are_asked_for() -> None:
    split = split_classes(image_data([2] * 20), meta(eval_test_fraction=0.33, eval_val_fraction=0.1))
    assert [len(part) for part in split] == [11, 2, 7]
    assert len({name for part in names(split) for name in part}) == 20


def test_a_random_split_depends_on_the_seed_alone() -> None:
    data, more = image_data([2] * 20), image_data([5] * 20)
    first = names(split_classes(data, meta(seed=1)))
    assert names(split_classes(more, meta(seed=1, num_ways=7, num_shots=2, rotations=False))) == first
    assert names(split_classes(data, meta(seed=1, eval_val_fraction=0.1)))[2] == first[2]
    assert names(split_classes(data, meta(seed=2))) != first


def test_each_class_keeps_its_rows_and_no_others() -> None:
    data = image_data([3, 1, 5], parts=["train", "train", "test"])
    split = split_classes(data, meta())
    for part in split:
        for index in range(len(part)):
            count = part.counts[index]
            assert part.rows[index, :count].tolist() == np.flatnonzero(data.labels == part.labels[index]).tolist()
            assert (part.rows[index, count:] == -1).all()
    assert split.train.counts.tolist() == [3, 1]
    assert split.val.rows.shape == (0, 0)


def test_turned_classes_stay_in_the_part_of_theirs() -> None:
    data = image_data([3, 4], parts=["train", "test"])
    for config in (meta(rotations=True), meta(data=DataConfig(source=Source.omniglot, path="x"))):
        train, val, test = split_classes(data, config)
        assert train.names == ("c0", "c0 turned 90", "c0 turned 180", "c0 turned 270")
        assert train.turns.tolist() == [0, 1, 2, 3]
        assert test.labels.tolist() == [1] * 4
        assert test.counts.tolist() == [4] * 4
        assert (test.rows == np.flatnonzero(data.labels == 1)).all()
        assert len(val) == 0
    for config in (meta(), meta(rotations=False, data=DataConfig(source=Source.omniglot, path="x"))):
        assert names(split_classes(data, config)) == [["c0"], [], ["c1"]]


def test_a_class_without_images_is_none() -> None:
    assert names(split_classes(image_data([3, 0, 2]), meta(eval_classes=["c2"]))) == [["c0"], [], ["c2"]]


def test_training_images_may_be_limited() -> None:
    data = image_data([9] * 3, parts=["train", "val", "test"])
    limited = split_classes(data, meta(data=DataConfig(num_train_per_class=4)))
    assert [part.counts.tolist() for part in limited] == [[4], [9], [9]]
    assert set(limited.train.rows[0]) < set(np.flatnonzero(data.labels == 0))


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (
            image_data([3, 3]),
            meta(eval_classes=["c0", "d1"]),
            r"\Aeval\.classes=d1: no row has this class; did you mean c1\?\Z",
        ),
        (
            image_data([3, 3], groups=["g", "h", "g", "h", "g", "h"]),
            meta(eval_classes=["c0"]),
            r"\Adata\.group: g, h has images of classes that train and of classes that don't; .* data\.group out\Z",
        ),
    ],
)
def test_classes_that_can_not_be_told_apart_are_refused(data: ImageData, config: MetaConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_classes(data, config)


def test_classes_that_lie_in_two_parts_are_named() -> None:
    data = image_data([4] * 8)
    split = np.where(data.labels < 7, np.array(["train", "test"])[np.arange(32) % 2], "train")
    for label in range(7):
        split[np.flatnonzero(data.labels == label)[:2]] = ["train", "test"]
    torn = ImageData(**{**vars(data), "split": split})
    rule = "class c0, c1, c2, c3, c4 and 2 more: images in more than one of train, val and test"
    with pytest.raises(DataError, match=rf"{rule}, .* new; list those that test in eval\.classes\Z"):
        split_classes(torn, meta())
    columns = DataConfig(source=Source.parquet, path="x", image="image", split="split")
    with pytest.raises(DataError, match=rf"{rule}, .* new; leave data\.split out, or list"):
        split_classes(torn, meta(data=columns))
    assert names(split_classes(torn, meta(eval_classes=["c0"])))[2] == ["c0"]


def test_a_row_without_a_label_is_named() -> None:
    data = image_data([3, 3])
    data.labels[[2, 4]] = -1
    with pytest.raises(DataError, match=r"\Arow 102 has no label \(2 of 6 rows\); label the rows, or remove them\Z"):
        split_classes(data, meta())


# whether there is enough of everything


PARTS = ["train"] * 6 + ["val"] * 3 + ["test"] * 5


@pytest.mark.parametrize(
    ("options", "counts", "message"),
    [
        ({"num_ways": 3}, [16] * 14, None),
        (
            {"num_ways": 5},
            [16] * 14,
            r"num_ways=5: .* than validate, which 3 do; use at most 3, or let more validate, or none "
            r"\(eval\.classes\)\Z",
        ),
        ({"num_ways": 2, "eval_num_ways": [5]}, [16] * 14, None),
        (
            {"num_ways": 3, "eval_num_ways": [3, 6]},
            [16] * 14,
            r"eval\.num_ways=6: an episode takes more classes than test, which 5 do; use at most 5, or let more test "
            r"\(eval\.classes\)\Z",
        ),
        ({"num_ways": 3, "train": {"num_ways": 6}}, [16] * 14, None),
        (
            {"num_ways": 3, "train": {"num_ways": 7}},
            [16] * 14,
            r"train\.num_ways=7: .* than train, which 6 do; use at most 6, or let fewer test",
        ),
        (
            {"num_ways": 3},
            [16, 16, 15, 3] + [16] * 10,
            r"num_shots=1, num_queries=15: an episode takes 16 images of each class, but there are fewer of c2 \(15\), "
            r"c3 \(3\); lower them, or keep other classes with data\.classes",
        ),
        (
            {"num_ways": 3},
            [9] * 14,
            r"num_shots=1, num_queries=15: .* fewer of c0 \(9\), c1 \(9\), c2 \(9\), c3 \(9\), c4 \(9\) and 1 more;",
        ),
        ({"num_ways": 3, "train": {"num_queries": 2}}, [3] * 6 + [16] * 8, None),
        ({"num_ways": 3, "train": {"num_queries": 3}}, [3] * 6 + [16] * 8, r"num_shots=1, train\.num_queries=3: "),
        ({"num_ways": 3, "train": {"num_shots": 3}}, [17] * 14, r"train\.num_shots=3, num_queries=15: .* takes 18 "),
        ({"num_ways": 3}, [16] * 8 + [2] + [16] * 5, r"num_shots=1, num_queries=15: .* fewer of c8 \(2\);"),
        ({"num_ways": 3, "eval_num_shots": [5]}, [16] * 9 + [20] * 5, None),
        (
            {"num_ways": 3, "eval_num_shots": [1, 5]},
            [16] * 9 + [19] * 5,
            r"eval\.num_shots=5, num_queries=15: .* takes 20 images .* fewer of c9 \(19\), .*",
        ),
        ({"num_ways": 5, "num_episodes": 0}, [1] * 9 + [16] * 5, None),
        ({"num_ways": 6, "num_episodes": 0}, [16] * 14, r"num_ways=6: .* than test, which 5 do;"),
        ({"num_ways": 2, "eval_classes": ["c0"]}, [16] * 14, r"num_ways=2: .* which 1 does; let more test \(eval\.cl"),
    ],
)
def test_episodes_that_are_larger_than_the_data_are_refused(
    options: dict[str, Any], counts: list[int], message: str | None
) -> None:
    config = meta(**options)
    data = image_data(counts, parts=PARTS)
    split = split_classes(data, config)
    if message is None:
        check_episodes(split, data, config)
        return
    with pytest.raises(DataError, match=rf"\A{message}") as caught:
        check_episodes(split, data, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "parts", "options", "keys"),
    [
        (Source.digits, None, {}, r"eval\.test_fraction or eval\.classes"),
        (Source.omniglot, PARTS, {}, r"eval\.classes"),
        (Source.parquet, PARTS, {}, r"data\.split or eval\.classes"),
        (Source.parquet, PARTS, {"eval_classes": ["c0"]}, r"eval\.classes"),
    ],
)
def test_what_lets_more_classes_test_is_what_says_which_do(
    source: Source, parts: Sequence[str] | None, options: dict[str, Any], keys: str
) -> None:
    data_config = DataConfig(source=source, path=None if source is Source.digits else "x")
    config = meta(data=data_config, num_ways=8, num_episodes=0, rotations=False, **options)
    data = image_data([16] * 14, parts=parts)
    with pytest.raises(DataError, match=rf"let more test \({keys}\)\Z"):
        check_episodes(split_classes(data, config), data, config)


@pytest.mark.parametrize(
    ("parts", "source", "key"),
    [
        (None, Source.digits, r"eval\.val_fraction"),
        (["train"] * 9 + ["test"] * 5, Source.parquet, r"eval\.val_fraction"),
        (PARTS, Source.parquet, r"data\.split or eval\.classes"),
    ],
)
def test_what_lets_more_classes_validate_is_what_says_which_do(
    parts: Sequence[str] | None, source: Source, key: str
) -> None:
    data_config = DataConfig(source=source, path=None if source is Source.digits else "x")
    config = meta(data=data_config, num_ways=4, eval_val_fraction=0.2, eval_test_fraction=0.4)
    data = image_data([16] * 14, parts=parts)
    with pytest.raises(DataError, match=rf"let more validate, or none \({key}\)\Z"):
        check_episodes(split_classes(data, config), data, config)


def test_turned_classes_count_but_are_not_named() -> None:
    data = image_data([16, 16, 15, 16], parts=["train", "train", "test", "test"])
    config = meta(num_ways=8, rotations=True)
    with pytest.raises(DataError, match=r"there are fewer of c2 \(15\);"):
        check_episodes(split_classes(data, config), data, config)
    config = meta(num_ways=9, rotations=True)
    with pytest.raises(DataError, match="which 8 do"):
        check_episodes(split_classes(data, config), data, config)


# episodes


def test_an_episode_is_a_function_of_seed_part_shape_and_index_alone() -> None:
    data = image_data([8] * 12)
    episodes = [sampler(data, (4, 1, 2)).episode(index) for index in range(20)]
    backwards = sampler(data, (4, 1, 2))
    assert all(same(backwards.episode(index), episodes[index]) for index in reversed(range(20)))
    others = [
        episodes[4],
        sampler(data, (4, 1, 2), seed=1).episode(3),
        sampler(data, (4, 1, 2), part="test").episode(3),
        sampler(data, (4, 2, 1)).episode(3),
    ]
    assert not any(np.array_equal(other.rows, episodes[3].rows) for other in others)


def test_classes_of_any_size_give_images_of_theirs_and_none_twice() -> None:
    data = image_data([6, 7, 30, 6, 11, 200])
    draw = sampler(data, (4, 2, 4))
    classes = everything(data)
    for index in range(200):
        episode = draw.episode(index)
        assert episode.rows.shape == (4, 6)
        assert episode.num_shots == 2
        assert len(set(episode.classes)) == 4
        assert len(set(episode.rows.ravel())) == 24
        assert (data.labels[episode.rows] == classes.labels[episode.classes][:, None]).all()


def test_all_classes_are_drawn_alike_and_in_any_order() -> None:
    draw = sampler(image_data([3] * 10), (4, 1, 2))
    drawn = np.stack([draw.episode(index).classes for index in range(5000)])
    for place in range(4):
        # A count of 5,000 draws with probability 1/10 has a standard deviation of 21.
        assert np.abs(np.bincount(drawn[:, place], minlength=10) - 500).max() < 100


def test_all_images_of_a_class_are_drawn_alike_as_support_and_as_queries() -> None:
    draw = sampler(image_data([7, 5]), (2, 1, 3))
    episodes = [draw.episode(index) for index in range(5000)]
    rows = np.stack([episode.rows[np.argsort(episode.classes)] for episode in episodes])  # [episodes, classes, images]
    for label, count in enumerate((7, 5)):
        for place in range(4):
            drawn = np.unique(rows[:, label, place], return_counts=True)[1]
            assert len(drawn) == count
            assert np.abs(drawn - 5000 / count).max() < 150


def test_which_images_come_together_is_even_too() -> None:
    draw = sampler(image_data([5, 5]), (2, 1, 1))
    pairs = [tuple(draw.episode(index).rows[0]) for index in range(8000)]
    counts = np.unique(pairs, axis=0, return_counts=True)[1]
    assert len(counts) == 40  # ordered pairs of different images, of two classes
    assert np.abs(counts - 200).max() < 70


def test_training_episodes_have_a_shape_of_their_own_where_one_is_given() -> None:
    assert training_shape(meta()) == (5, 1, 15)
    assert training_shape(meta(train={"num_ways": 60, "num_queries": 5})) == (60, 1, 5)


# their images

PREPROCESSING = Preprocessing(SIZE, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def by_hand(pixels: np.ndarray, turns: int) -> torch.Tensor:
    """An image, turned by Pillow, as a network takes it: [3, S, S]."""
    turned = Image.fromarray(pixels)
    for _ in range(turns):
        turned = turned.transpose(Image.Transpose.ROTATE_90)  # counter-clockwise
    scaled = torch.from_numpy(np.asarray(turned).copy()).permute(2, 0, 1).double() / 255
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in PREPROCESSING[1:])
    return ((scaled - mean) / std).float()


@pytest.mark.parametrize("rotations", [False, True])
def test_a_batch_holds_support_and_queries_with_their_labels_class_by_class(rotations: bool) -> None:
    data = image_data([6] * 5)
    classes = everything(data, rotations=rotations)
    images = EpisodeImages(data.images, PREPROCESSING, torch.device("cpu"))
    assert isinstance(data.images, ArrayImages)
    seen_turns = set()
    for index in range(10):
        episode = EpisodeSampler(classes, EpisodeShape(4, 2, 3), seed=0, part="train").episode(index)
        batch = images.batch(episode)
        assert (batch.num_ways, batch.num_shots) == (4, 2)
        assert batch.classes.tolist() == episode.classes.tolist()
        assert batch.support_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert batch.query_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        seen_turns |= set(episode.turns.tolist())
        for found, labels, rows in (
            (batch.support, batch.support_labels, episode.rows[:, :2].ravel()),
            (batch.queries, batch.query_labels, episode.rows[:, 2:].ravel()),
        ):
            assert found.dtype == torch.float32
            assert found.is_contiguous(memory_format=torch.channels_last)
            for image, label, row in zip(found, labels, rows, strict=True):
                assert data.labels[row] == classes.labels[batch.classes[label]]
                turns = classes.turns[batch.classes[label]]
                torch.testing.assert_close(image, by_hand(data.images.pixels[row], turns))
    assert seen_turns == ({0, 1, 2, 3} if rotations else {0})


def test_any_images_come_in_the_order_that_they_are_asked_for_in() -> None:
    data = image_data([6] * 2)
    assert isinstance(data.images, ArrayImages)
    rows, turns = np.array([7, 0, 7, 3]), np.array([0, 3, 2, 1])
    found = EpisodeImages(data.images, PREPROCESSING, torch.device("cpu")).items(rows, turns)
    wanted = [by_hand(data.images.pixels[row], turn) for row, turn in zip(rows, turns, strict=True)]
    torch.testing.assert_close(found.contiguous(), torch.stack(wanted))
