"""Omniglot, from its Parquet file or from the folder that torchvision leaves."""

import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graftstack.config.schema import DataConfig, Source
from graftstack.data.load import images_of
from graftstack.data.table import read_table
from graftstack.errors import DataError


def png(value: int) -> bytes:
    file = BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def omniglot(path: Path | str, **options: Any) -> DataConfig:
    return DataConfig(source=Source.omniglot, path=str(path), **options)


def columns(**changes: Any) -> dict[str, Any]:
    return {
        "image": [png(1), png(2), png(3)],
        "alphabet": ["Greek", "Greek", "Latin"],
        "character": ["Greek/character01", "character02", "character01"],
        "split": ["train", "val", "test"],
    } | changes


def write_parquet(path: Path, **changes: Any) -> Path:
    pq.write_table(pa.table({name: values for name, values in columns(**changes).items() if values is not None}), path)
    return path


def write_images(path: Path, *parts: str, alphabets: tuple[str, str] = ("Greek", "Latin")) -> None:
    first, second = alphabets
    names = (f"{first}/character01/0001_01", f"{first}/character02/0002_01", f"{second}/character01/0003_01")
    for value, part in enumerate(parts):
        for name in names:
            file = path / part / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(value))


def fails(config: DataConfig, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_table(config)
    assert "\n" not in str(caught.value)


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()


# Parquet


def test_a_label_is_the_alphabet_and_the_character_which_may_name_the_alphabet_already(tmp_path: Path) -> None:
    table = read_table(omniglot(write_parquet(tmp_path / "omniglot.parquet", drawer=[1, 2, 3])))
    assert table.class_names == ("Greek/character01", "Greek/character02", "Latin/character01")
    assert table.labels.tolist() == [0, 1, 2]
    assert table.row_ids.tolist() == [0, 1, 2]
    assert table.split is not None
    assert table.split.tolist() == ["train", "val", "test"]
    assert table.table["image"].to_pylist() == columns()["image"]
    assert set(table.table.column_names) == {"row_id", "image", "label", "split"}


def test_columns_of_categories_and_numbers_name_classes_too(tmp_path: Path) -> None:
    alphabets = pa.array(columns()["alphabet"]).dictionary_encode()
    path = write_parquet(tmp_path / "t.parquet", alphabet=alphabets, character=[1, 2, 1], label=["x", "y", "z"])
    assert read_table(omniglot(path)).class_names == ("Greek/1", "Greek/2", "Latin/1")


def test_a_folder_of_parquet_files_and_a_uri_will_do(tmp_path: Path, memory: Any) -> None:
    for name in ("b", "a"):
        write_parquet(tmp_path / f"{name}.parquet", alphabet=[name] * 3, character=["x"] * 3)
        memory.pipe(f"/data/{name}.parquet", (tmp_path / f"{name}.parquet").read_bytes())
    for path in (tmp_path, "memory://data"):
        assert read_table(omniglot(path)).labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert read_table(omniglot("memory://data/b.parquet")).class_names == ("b/x",)


@pytest.mark.parametrize("name", ["image", "alphabet", "character", "split"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path, name: str) -> None:
    path = write_parquet(tmp_path / "t.parquet", **{name: None})
    known = ", ".join(known for known in columns() if known != name)
    fails(
        omniglot(path),
        rf"\Adata\.path={re.escape(str(path))}: no column {name}; data=omniglot needs image, alphabet, character, "
        rf"split, use data=parquet for other columns \(known: {known}\)\Z",
    )


def test_a_row_without_alphabet_or_character_has_no_label(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", alphabet=["Greek", None, "Latin"], character=["a", "b", ""])
    fails(omniglot(path), r"row 1 has no label \(2 of 3 rows\)")


# the folder of torchvision


@pytest.mark.parametrize("root", ["", "omniglot-py"])
def test_background_characters_train_and_those_of_the_evaluation_test(tmp_path: Path, root: str) -> None:
    write_images(tmp_path / root, "images_background")
    write_images(tmp_path / root, "images_evaluation", alphabets=("Tibetan", "Zulu"))
    (tmp_path / root / "images_evaluation.zip").write_bytes(b"")
    (tmp_path / root / "images_evaluation" / "stray.png").write_bytes(png(0))
    table = read_table(omniglot(tmp_path))
    prefix = f"{root}/" if root else ""
    assert table.row_ids.tolist() == [
        f"{prefix}images_background/Greek/character01/0001_01.png",
        f"{prefix}images_background/Greek/character02/0002_01.png",
        f"{prefix}images_background/Latin/character01/0003_01.png",
        f"{prefix}images_evaluation/Tibetan/character01/0001_01.png",
        f"{prefix}images_evaluation/Tibetan/character02/0002_01.png",
        f"{prefix}images_evaluation/Zulu/character01/0003_01.png",
    ]
    assert [table.class_names[label] for label in table.labels] == [
        *("Greek/character01", "Greek/character02", "Latin/character01"),
        *("Tibetan/character01", "Tibetan/character02", "Zulu/character01"),
    ]
    assert table.split is not None
    assert table.split.tolist() == ["train"] * 3 + ["test"] * 3
    assert "missing" not in table.table["version"].to_pylist()


def test_one_part_alone_says_nothing_of_a_split(tmp_path: Path) -> None:
    write_images(tmp_path / "omniglot-py", "images_background")
    assert read_table(omniglot(tmp_path)).split is None


def test_images_are_found_once_where_both_layouts_lie_in_one_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "images_background", "omniglot-py/images_background")
    assert len(read_table(omniglot(tmp_path))) == 3


def test_images_in_files_decode_wherever_they_lie(tmp_path: Path, memory: Any) -> None:
    write_images(tmp_path, "images_evaluation", "images_background")
    for file in tmp_path.rglob("*.png"):
        memory.pipe(f"/root/omniglot-py/{file.relative_to(tmp_path)}", file.read_bytes())
    for path in (tmp_path, "memory://root"):
        config = omniglot(path, cache_dir=str(tmp_path / "cache"))
        data = images_of(read_table(config), config, image_size=4)
        assert data.images.batch(np.arange(6))[:, 0, 0, 0].tolist() == [1, 1, 1, 0, 0, 0]


def test_the_classes_are_those_that_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Omniglot

    write_images(tmp_path / "omniglot-py", "images_background", "images_evaluation")
    monkeypatch.setattr(Omniglot, "_check_integrity", lambda self: True)  # which asks for the archives, 10 MB
    table = read_table(omniglot(tmp_path))
    ours = {(tmp_path / row, table.class_names[label]) for row, label in zip(table.row_ids, table.labels, strict=True)}
    theirs = set()
    for background in (True, False):
        dataset = Omniglot(tmp_path, background=background, loader=Path)
        items = [dataset[index] for index in range(len(dataset))]
        theirs |= {(path, dataset._characters[character]) for path, character in items}
    assert ours == theirs


# neither


def test_a_path_that_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(0))
    fails(omniglot(tmp_path), r"data\.path=.*: the folder holds neither \.parquet files nor images_background/.*; give")
    fails(omniglot(tmp_path / "images" / "a.png"), "can't be read as parquet")
    fails(omniglot(tmp_path / "nowhere"), "no such file or folder")


# the real thing


@pytest.mark.realdata
def test_the_real_file_has_the_split_of_vinyals(real_data: Path, tmp_path: Path) -> None:
    config = omniglot(real_data / "omniglot.parquet", cache_dir=str(tmp_path))
    table = read_table(config)
    assert len(table) == 32_460
    assert len(table.class_names) == 1_623
    assert (np.bincount(table.labels) == 20).all()
    assert table.split is not None
    of_split = {split: np.unique(table.labels[table.split == split]) for split in ("train", "val", "test")}
    assert {split: len(labels) for split, labels in of_split.items()} == {"train": 1_028, "val": 172, "test": 423}
    data = images_of(table, config, image_size=28)
    assert (len(data), data.images.image_size) == (32_460, 28)
    assert data.class_names[data.labels[0]] == "Alphabet_of_the_Magi/character01"
    # Thin dark strokes on white, grey where the scan of 105 pixels is made smaller.
    strokes = data.images.batch(np.arange(0, 32_460, 100)).float()
    assert 200 < strokes.mean() < 250
    assert (strokes.amax(dim=(1, 2, 3)) == 255).all()
