"""A source's rows in every form that base models want, and one line where they can't be had."""

from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graftstack.config.schema import DataConfig, OnBadImage, Source
from graftstack.errors import BadInputError, ConfigError, DataError
from graftstack.stacking.data import StackData, load_stack_data
from graftstack.stacking.schema import TableSchema, infer_schema

NUM = 40
AGE = np.arange(float(NUM))
PET = ["cat", "dog"] * (NUM // 2)
WON = ["no"] * 30 + ["yes"] * 10


def write(folder: Path, **columns: Any) -> DataConfig:
    path = folder / "t.parquet"
    pq.write_table(pa.table(columns), path)
    return DataConfig(source=Source.parquet, path=str(path), label="won")


def with_(config: DataConfig, **options: Any) -> DataConfig:
    from dataclasses import replace

    return replace(config, **options)


def load(config: DataConfig, **options: Any) -> StackData:
    return load_stack_data(config, seed=0, **options)


def complaint(config: DataConfig, kind: type[BadInputError] = DataError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load(config, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(**columns: Any) -> TableSchema:
    return infer_schema(pa.table(columns), list(columns)).schema


# What there is


def test_all_columns_without_another_use_are_features(tmp_path: Path) -> None:
    data = load(with_(write(tmp_path, age=AGE, pet=PET, won=WON, extra=AGE), drop=["extra"]))
    assert data.schema is not None
    assert data.schema.columns == (("age", "number"), ("pet", "text"))
    assert data.class_names == ("no", "yes")
    assert data.is_classification
    assert list(data.views) == ["table"]
    assert data.views["table"]["age"].tolist() == AGE.tolist()
    assert data.views["table"]["pet"].tolist() == PET
    assert data.y.tolist() == [0] * 30 + [1] * 10
    assert data.row_ids.tolist() == list(range(NUM))
    assert len(data) == NUM


def test_features_that_are_named_are_all(tmp_path: Path) -> None:
    data = load(with_(write(tmp_path, age=AGE, pet=PET, won=WON), features=["age"]))
    assert list(data.views["table"]) == ["age"]


def test_csv_is_read_alike(tmp_path: Path) -> None:
    lines = [f"{age},{pet},{won}" for age, pet, won in zip(AGE, PET, WON, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["age,pet,won", *lines]))
    data = load(DataConfig(source=Source.csv, path=str(tmp_path / "t.csv"), label="won"))
    assert data.schema is not None
    assert data.schema.columns == (("age", "number"), ("pet", "text"))


def test_held_out_rows_are_a_share_of_each_class(tmp_path: Path) -> None:
    config = write(tmp_path, age=AGE, won=WON)
    data = load(config)
    assert np.bincount(data.y[data.splits.val]).tolist() == [6, 2]
    assert sorted([*data.splits.train, *data.splits.val]) == list(range(NUM))
    assert data.splits.val.tolist() == load(config).splits.val.tolist()


def test_nothing_need_be_held_out(tmp_path: Path) -> None:
    splits = load(with_(write(tmp_path, age=AGE, won=WON), val_fraction=0.0)).splits
    assert (len(splits.train), len(splits.val)) == (NUM, 0)


def test_the_last_rows_are_held_out_where_rows_are_in_order_of_time(tmp_path: Path) -> None:
    data = load(write(tmp_path, age=AGE, won=["no", "yes"] * 20), last_validate=True)
    assert data.splits.val.tolist() == list(range(32, 40))


def test_groups_and_given_splits_are_kept(tmp_path: Path) -> None:
    group = [f"g{row // 4}" for row in range(NUM)]
    split = ["train"] * 32 + ["test"] * 8
    config = write(tmp_path, age=AGE, won=["no", "yes"] * 20, of=group, fold=split)
    grouped = load(with_(config, group="of", drop=["fold"]))
    assert grouped.groups is not None
    assert not {*grouped.groups[grouped.splits.train]} & {*grouped.groups[grouped.splits.val]}
    given = load(with_(config, split="fold", drop=["of"]))
    assert given.splits.val.tolist() == list(range(32, 40))
    assert list(given.views["table"]) == ["age"]


def test_images_are_there_as_images_and_as_pixels_of_one_channel_if_grey(tmp_path: Path) -> None:
    data = load(DataConfig(cache_dir=str(tmp_path), num_train_per_class=20))
    pixels = data.views["pixels"]
    assert (data.views["images"].image_size, pixels.num_channels, pixels.shape) == (8, 1, (1797, 64))
    rows = np.array([3, 5])
    assert pixels.take(rows).dtype == np.float32
    assert np.array_equal(pixels.take(rows), np.asarray(pixels)[rows])
    assert (np.asarray(pixels).min(), np.asarray(pixels).max()) == (0, 1)
    assert pixels.fingerprint != load(DataConfig(cache_dir=str(tmp_path)), num_channels=3).views["pixels"].fingerprint
    assert np.bincount(data.y[data.splits.train]).tolist() == [20] * 10
    assert data.schema is None


def test_a_class_that_no_image_is_left_of_is_refused(tmp_path: Path) -> None:
    png = BytesIO()
    Image.new("RGB", (8, 8), "red").save(png, "PNG")
    images = [png.getvalue()] * 30 + [b"no image"] * 10
    config = with_(write(tmp_path, image=images, won=["a", "b", "c"] * 10 + ["z"] * 10), image="image")
    config = with_(config, on_bad_image=OnBadImage.skip, cache_dir=str(tmp_path / "cache"))
    assert complaint(config) == (
        "class z: none of its images can be decoded; mend some, or keep other classes with data.classes"
    )
    data = load(with_(config, classes=["a", "b", "c"]))
    assert data.class_names == ("a", "b", "c")


# The target


@pytest.mark.parametrize(
    ("values", "by_class"),
    [
        (["a", "b"] * 30, True),
        ([True, False] * 30, True),
        ([1, 2, 3] * 20, True),
        ([1.0, 2.0, 3.0] * 20, True),
        (list(range(20)) * 3, True),
        (list(range(21)) * 3, False),
        ([0.5, 1.5, 2.5] * 20, False),
        (["1.5", "2.5", "3"] * 20, False),
    ],
)
def test_whole_numbers_of_few_values_and_text_are_classes(tmp_path: Path, values: list[Any], by_class: bool) -> None:
    data = load(write(tmp_path, age=np.arange(float(len(values))), won=values))
    assert data.is_classification is by_class
    assert data.y.dtype == (np.int64 if by_class else np.float64)


def test_the_task_may_be_told(tmp_path: Path) -> None:
    config = write(tmp_path, age=AGE, won=[1, 2] * 20)
    data = load(config, task="regression")
    assert (data.class_names, data.y[:3].tolist()) == ((), [1.0, 2.0, 1.0])
    assert len(data.splits.val) == 8
    config = write(tmp_path, age=AGE, won=np.arange(NUM) // 1 % 30)
    assert load(config, task="classification").is_classification


def test_targets_keep_every_bit(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=NUM) * 10.0 ** np.arange(-20, 20)
    assert np.array_equal(load(write(tmp_path, age=AGE, won=numbers)).y, numbers)


def test_a_target_that_does_not_suit_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path, age=AGE, won=PET)
    assert 'holds text such as "cat"' in complaint(config, ConfigError, task="regression")
    assert "task=regresion: no such task" in complaint(config, ConfigError, task="regresion")
    assert "models of images tell classes apart" in complaint(DataConfig(), ConfigError, task="regression")


def test_a_constant_target_is_refused(tmp_path: Path) -> None:
    said = complaint(write(tmp_path, age=AGE, won=["yes"] * NUM))
    assert said.startswith("data.label=won: the only class of the 40 training rows is yes; learning needs two")
    said = complaint(write(tmp_path, age=AGE, won=[2.5] * NUM))
    assert said.startswith("data.label=won: the only target of the 40 training rows is 2.5")
    held_out = with_(write(tmp_path, age=AGE, won=WON, fold=["train"] * 30 + ["val"] * 10), split="fold")
    assert "the only class of the 30 training rows is no" in complaint(held_out)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_row_without_target_is_named(tmp_path: Path, missing: Any) -> None:
    numbers = [*AGE[:-1] / 7, missing]
    assert complaint(write(tmp_path, age=AGE, won=numbers)).startswith("row 39 has no label (1 of 40 rows)")
    as_text = write(tmp_path, age=AGE, won=["nan", *map(str, AGE[1:])])
    assert complaint(as_text, task="regression").startswith("row 0 has no label (1 of 40 rows)")


def test_an_infinite_target_is_named(tmp_path: Path) -> None:
    said = complaint(write(tmp_path, age=AGE, won=[*AGE[:-1] / 7, np.inf]))
    assert said.startswith("row 39: data.label=won is inf, which is infinite")


def test_a_class_that_is_held_out_but_not_trained_is_refused(tmp_path: Path) -> None:
    split = ["train"] * 36 + ["val"] * 4
    config = with_(write(tmp_path, age=AGE, won=["a", "b"] * 18 + ["c"] * 4, fold=split), split="fold")
    assert "class c is in validation but not in training" in complaint(config)


# Columns


def test_numbers_held_as_text_are_numbers_and_their_blanks_missing() -> None:
    table = pa.table({"total": ["1.5", " ", "-2e3", "?", ".5", None]})
    inferred = infer_schema(table, ["total"])
    assert inferred.schema.numbers == ("total",)
    assert inferred.notes == ("column total: numbers held as text; 2 blank values are missing",)
    found = inferred.schema.frame(table)["total"].to_numpy()
    assert np.array_equal(found, [1.5, np.nan, -2000, np.nan, 0.5, np.nan], equal_nan=True)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["007", "008"], "text"),
        (["1", "two"], "text"),
        (["inf", "1"], "text"),
        (["", None, "x"], "text"),
        ([True, False], "boolean"),
        ([1, 2], "number"),
        ([date(2024, 1, 1), date(2024, 1, 2)], "time"),
    ],
)
def test_columns_are_what_they_hold(values: list[Any], kind: str) -> None:
    assert read(x=values).columns == (("x", kind),)


def test_times_are_seconds_and_booleans_are_categories() -> None:
    table = pa.table({"when": [date(1970, 1, 2), None, date(1970, 1, 1)], "is": [True, None, False]})
    found = infer_schema(table, ["when", "is"]).schema.frame(table)
    assert np.array_equal(found["when"], [86400.0, np.nan, 0.0], equal_nan=True)
    assert found["is"].cat.categories.tolist() == ["false", "true"]
    assert found["is"].isna().tolist() == [False, True, False]


def test_columns_that_tell_nothing_are_left_out_and_the_notes_say_why(tmp_path: Path) -> None:
    ids = [f"id-{row}" for row in range(NUM)]
    data = load(write(tmp_path, age=AGE, id=ids, same=["x"] * NUM, none=pa.nulls(NUM), won=WON))
    assert list(data.views["table"]) == ["age"]
    assert [note.split(": ")[0] for note in data.notes] == [
        f"column {name} is left out" for name in ("id", "same", "none")
    ]
    assert "no column to learn from is left (column id is left out" in complaint(write(tmp_path, id=ids, won=WON))


def test_an_infinite_number_is_named_with_its_column_and_row(tmp_path: Path) -> None:
    said = complaint(write(tmp_path, age=[*AGE[:-1], -np.inf], won=WON))
    assert said.startswith("column age holds an infinite number (row 39, 1 in all)")
    assert "data.drop=[age]" in said


def test_columns_of_lists_or_bytes_are_refused_with_the_remedy(tmp_path: Path) -> None:
    said = complaint(write(tmp_path, tags=[[1]] * NUM, won=WON))
    assert said.startswith("data.features=tags: values of type list<")
    assert "data.drop=[tags]" in said
    assert "data.image=png" in complaint(write(tmp_path, png=[b"x"] * NUM, won=WON))


# New data for a model


def trained(tmp_path: Path) -> StackData:
    return load(with_(write(tmp_path, age=AGE, pet=PET, id=[f"id-{row}" for row in range(NUM)], won=WON), drop=[]))


def new(tmp_path: Path, model: StackData, **columns: Any) -> Any:
    return load(write(tmp_path, **columns), class_names=model.class_names, schema=model.schema, require_labels=False)


def test_new_data_may_lack_labels_and_ids_and_have_unseen_categories(tmp_path: Path) -> None:
    model = trained(tmp_path)
    data = new(tmp_path, model, pet=["eel", None], age=[1, None])
    assert list(data.views["table"]) == ["age", "pet"]
    assert data.views["table"]["pet"].cat.categories.tolist() == ["eel"]
    assert data.y.tolist() == [-1, -1]
    assert [rows.tolist() for rows in data.splits] == [[], [], [0, 1]]
    assert len(new(tmp_path, model, pet=["eel"], age=[1], won=["maybe"], id=["x"])) == 1


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"column pet is missing, and the model learnt from it; add it \(did you mean pets\?\)"
    ):
        new(tmp_path, trained(tmp_path), age=[1.0], pets=["dog"])
    with pytest.raises(DataError, match=r"column pet is missing, and the model learnt from it; add it \(known: age\)"):
        read(age=[1.0, 2.0], pet=["a", "b"]).frame(pa.table({"age": [1.0]}))


def test_an_extra_column_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"column size, colour: the model didn't learn from it; remove it from the data"
    ):
        new(tmp_path, trained(tmp_path), age=[1.0], pet=["dog"], size=[3], colour=["red"])
    model = trained(tmp_path)
    config = with_(write(tmp_path, age=[1.0], pet=["dog"], size=[3]), drop=["size"])
    assert len(load(config, class_names=model.class_names, schema=model.schema, require_labels=False)) == 1


def test_values_of_another_type_are_named(tmp_path: Path) -> None:
    model = trained(tmp_path)
    with pytest.raises(DataError, match='column age holds text such as "old", and the model learnt from numbers'):
        new(tmp_path, model, age=["old"], pet=["dog"])
    with pytest.raises(DataError, match="column pet holds values of type double, and the model learnt from text"):
        new(tmp_path, model, age=[1.0], pet=[2.0])
    assert new(tmp_path, model, age=["7"], pet=["dog"]).views["table"]["age"].tolist() == [7.0]


def test_a_regression_judges_new_rows_with_or_without_targets(tmp_path: Path) -> None:
    model = load(write(tmp_path, age=AGE, won=AGE / 3))
    options: dict[str, Any] = {"class_names": (), "schema": model.schema}
    assert load(write(tmp_path, age=[1.0], won=[2.5]), **options).y.tolist() == [2.5]
    bare = load(write(tmp_path, age=[1.0]), require_labels=False, **options)
    assert np.isnan(bare.y).all()


def test_a_schema_survives_as_plain_values() -> None:
    schema = infer_schema(pa.table({"a": [1, 2], "b": ["x", "y"]}), ["a", "b"], others=["id", "a"]).schema
    assert schema.ignored == ("id",)
    assert TableSchema.from_plain(schema.as_plain()) == schema
