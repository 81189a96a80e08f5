"""Each source becomes the same kind of table; what can't be read is named in one line."""

import gzip
import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graftstack.config.schema import DataConfig, Source
from graftstack.data.decode import decode
from graftstack.data.load import load_images
from graftstack.data.table import read_table
from graftstack.errors import DataError


def png(value: int, size: int = 4) -> bytes:
    file = BytesIO()
    Image.new("L", (size, size), value).save(file, "PNG")
    return file.getvalue()


def write(path: Path, data: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or png(len(path.name)))


def folder(path: Path | str) -> DataConfig:
    return DataConfig(source=Source.image_folder, path=str(path))


def parquet(path: Path | str, **options: Any) -> DataConfig:
    return DataConfig(source=Source.parquet, path=str(path), image="image", **options)


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def fails(config: DataConfig, message: str, **options: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_table(config, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()


# digits


def test_the_digits_are_bundled_and_span_all_grey_levels() -> None:
    table = read_table(DataConfig())
    assert len(table) == 1797
    assert table.class_names == tuple("0123456789")
    assert table.row_ids.dtype == np.int64
    first = decode(table.table["image"][0].as_py(), 8)
    assert (first.min(), first.max()) == (0, 239)


# image folders


def test_class_folders_are_found_at_any_depth_and_in_order(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/deep/er/a.JPG", "cat/z.webp", "cat/notes.txt", "cat/.hidden.png", ".git/x/y.png"):
        write(tmp_path / name)
    table = read_table(folder(tmp_path))
    assert table.row_ids.tolist() == ["cat/deep/er/a.JPG", "cat/z.webp", "dog/b.png"]
    assert table.class_names == ("cat", "dog")
    assert table.labels.tolist() == [0, 0, 1]
    assert table.split is None


@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev"])
def test_split_folders_are_recognised(tmp_path: Path, val: str) -> None:
    for name in ("train/cat/a.png", f"{val}/cat/a.png", "test/dog/a.png"):
        write(tmp_path / name)
    table = read_table(folder(tmp_path))
    assert table.split is not None
    assert dict(zip(table.row_ids, table.split, strict=True)) == {
        "train/cat/a.png": "train",
        f"{val}/cat/a.png": "val",
        "test/dog/a.png": "test",
    }
    assert table.class_names == ("cat", "dog")


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    write(tmp_path / "test/a.png")
    write(tmp_path / "other/a.png")
    assert read_table(folder(tmp_path)).class_names == ("other", "test")


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    fails(folder(tmp_path), "no class folders; put the images of each class into one")
    table = read_table(folder(tmp_path), require_labels=False)
    assert table.labels.tolist() == [-1]
    assert table.class_names == ()


def test_an_image_outside_the_class_folders_is_named(tmp_path: Path) -> None:
    write(tmp_path / "cat/a.png")
    write(tmp_path / "stray.png")
    fails(folder(tmp_path), r"row stray\.png has no label \(1 of 2 rows\)")


def test_a_folder_without_images_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    fails(folder(tmp_path), "holds no images")
    fails(folder(tmp_path / "nowhere"), "nowhere: no such file or folder; check the spelling")
    write(tmp_path / "a.png")
    fails(folder(tmp_path / "a.png"), "a file, not a folder")


def test_an_unknown_protocol_is_refused() -> None:
    fails(folder("teapot://bucket/images"), "teapot://bucket/images: can't be reached")


def test_a_folder_may_lie_behind_a_uri(memory: Any) -> None:
    memory.pipe("/images/cat/a.png", png(1))
    memory.pipe("/images/dog/b.png", png(2))
    assert read_table(folder("memory://images")).row_ids.tolist() == ["cat/a.png", "dog/b.png"]


# parquet


def test_a_column_may_hold_bytes_or_structs_of_bytes_and_path(tmp_path: Path) -> None:
    plain = write_parquet(tmp_path / "plain.parquet", image=[png(1), png(2)], label=["b", "a"])
    structs = write_parquet(
        tmp_path / "structs.parquet",
        image=[{"bytes": png(1), "path": "x.png"}, {"bytes": png(2), "path": None}],
        label=pa.array(["b", "a"]).dictionary_encode(),
    )
    for path in (plain, structs):
        table = read_table(parquet(path))
        assert table.table["image"].to_pylist() == [png(1), png(2)]
        assert table.labels.tolist() == [1, 0]
        assert table.row_ids.tolist() == [0, 1]


def test_a_folder_is_read_in_the_order_of_its_files_and_paths_start_at_each(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "part.parquet", image=["img/1.png", "/abs/2.png"], label=[name, name])
    write(tmp_path / "a/img/1.png")
    table = read_table(parquet(tmp_path))
    assert table.table["path"].to_pylist() == ["a/img/1.png", "/abs/2.png", "b/img/1.png", "/abs/2.png"]
    assert [version == "missing" for version in table.table["version"].to_pylist()] == [False, True, True, True]
    assert table.class_names == ("a", "b")


def test_parquet_may_lie_behind_a_uri(memory: Any) -> None:
    file = BytesIO()
    pq.write_table(pa.table({"image": [png(1)], "label": [7]}), file)
    memory.pipe("/data/train/0.parquet", file.getvalue())
    for path in ("memory://data/train/0.parquet", "memory://data"):
        assert read_table(parquet(path)).class_names == ("7",)


def test_splits_groups_and_features_come_along_and_dropped_columns_do_not(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "t.parquet", image=[png(1)], label=[1], fold=["dev"], patient=[12], age=[3.5], secret=["s"]
    )
    config = parquet(path, split="fold", group="patient", features=["age", "secret"], drop=["secret"])
    table = read_table(config)
    assert table.split is not None
    assert table.split.tolist() == ["val"]
    assert table.groups is not None
    assert table.groups.tolist() == ["12"]
    assert table.table["age"].to_pylist() == [3.5]
    assert "secret" not in table.table.column_names


def test_without_images_all_columns_that_have_no_other_use_are_features(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", age=[3.5], lbl=[1], fold=["dev"], who=[12], pet=["x"], secret=["s"])
    config = DataConfig(source=Source.parquet, path=str(path), label="lbl", split="fold", group="who", drop=["secret"])
    known = {"row_id", "label", "split", "group"}
    assert set(read_table(config).table.column_names) == {*known, "age", "pet"}
    only = DataConfig(source=Source.parquet, path=str(path), label="lbl", features=["pet"])
    assert set(read_table(only).table.column_names) == {"row_id", "label", "pet"}


def test_a_feature_that_is_no_number_or_text_or_has_a_taken_name_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", label=[1], tags=[[1]], png=[png(1)], version=[3])
    leaky = DataConfig(source=Source.parquet, path=str(path), features=["label", "version"])
    fails(leaky, r"data\.features=label: data\.label uses this column")
    for name, drop, message in (
        ("tags", ["png", "version"], r"values of type list<.*add data\.drop=\[tags\]"),
        ("png", ["tags", "version"], r"values of type binary .* data\.image=png if they are images"),
        ("version", ["tags", "png"], r"the name is taken .* add data\.drop=\[version\]"),
    ):
        config = DataConfig(source=Source.parquet, path=str(path), drop=drop)
        fails(config, rf"data\.features={name}: {message}")


def test_classes_keep_a_subset_whose_rows_keep_their_ids(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", image=[png(i) for i in range(4)], label=[2, 10, 3, 10])
    table = read_table(parquet(path, classes=[10, "2"]))
    assert table.class_names == ("2", "10")
    assert table.row_ids.tolist() == [0, 1, 3]


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", image=[png(1)], lable=["a"])
    fails(parquet(path), r"data\.label=label: no such column; did you mean lable\? \(known: image, lable\)")
    fails(parquet(path, split="fold"), r"data\.split=fold: no such column; known: image, lable$")
    fails(parquet(path, features=["age"]), r"data\.features=age: no such column")
    fails(parquet(path, drop=["age"]), r"data\.drop=age: no such column")
    fails(parquet(path, drop=["image"]), r"data\.drop=image: data\.image uses this column")
    assert read_table(parquet(path), require_labels=False).labels.tolist() == [-1]


def test_a_row_without_label_or_group_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", image=[png(1)] * 3, label=["a", None, ""], group=["g", None, "g"])
    fails(parquet(path), r"row 1 has no label \(2 of 3 rows\); label the rows, or remove them")
    assert read_table(parquet(path), require_labels=False).labels.tolist() == [0, -1, -1]
    fails(parquet(path, group="group"), "row 1 has no group", require_labels=False)


def test_labels_are_mapped_onto_the_classes_of_a_model(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", image=[png(1)] * 2, label=["dog", "cat"])
    known = ("cat", "cow", "dog")
    assert read_table(parquet(path), class_names=known).labels.tolist() == [2, 0]
    fails(parquet(path), "label dog: not a class of the model, which knows cat, cow", class_names=("cat", "cow"))
    assert read_table(parquet(path), class_names=("cat",), require_labels=False).labels.tolist() == [-1, 0]


def test_what_is_not_parquet_or_holds_no_rows_or_no_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_text("hello")
    fails(parquet(tmp_path / "t.parquet"), "can't be read as parquet")
    (tmp_path / "empty").mkdir()
    fails(parquet(tmp_path / "empty"), r"holds no \.parquet files")
    fails(parquet(write_parquet(tmp_path / "none.parquet", image=pa.array([], pa.binary()), label=[])), "no rows in")
    fails(
        parquet(write_parquet(tmp_path / "int.parquet", image=[1], label=["a"])), "values of type int64 aren't images"
    )


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", image=[np.random.default_rng(0).bytes(9999)], label=["a"])
    data = bytearray(path.read_bytes())
    data[10:600] = bytes(590)
    path.write_bytes(data)
    fails(parquet(path), "can't be read as parquet")


# csv


def test_csv_holds_paths_relative_to_itself_and_labels_as_written(tmp_path: Path) -> None:
    write(tmp_path / "img/1.png")
    (tmp_path / "t.csv").write_text("image,label,age\nimg/1.png,01,3\nimg/2.png,NA,\n")
    config = DataConfig(source=Source.csv, path=str(tmp_path / "t.csv"), image="image", features=["age"])
    table = read_table(config)
    assert table.table["path"].to_pylist() == ["img/1.png", "img/2.png"]
    assert table.class_names == ("01", "NA")
    assert table.table["age"].to_pylist() == [3, None]


def test_csv_may_lie_behind_a_uri(memory: Any) -> None:
    memory.pipe("/data/t.csv", b"image,label\na.png,x\n")
    memory.pipe("/data/a.png", png(9))
    table = read_table(DataConfig(source=Source.csv, path="memory://data/t.csv", image="image"))
    assert table.table["version"].to_pylist() != ["missing"]


def test_a_csv_row_without_a_path_is_said_to_have_none(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,label\n,x\n,y\n")
    config = DataConfig(source=Source.csv, path=str(tmp_path / "t.csv"), image="image")
    with pytest.raises(DataError, match=r"\Aimage 0 can't be decoded: the row has neither bytes nor a path; "):
        load_images(config, image_size=8, seed=0)


def test_a_ragged_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,label\na.png,x,y,z\n")
    fails(DataConfig(source=Source.csv, path=str(tmp_path / "t.csv"), image="image"), "can't be read as csv")


# torchvision


def write_mnist(root: Path, name: str, pixels: np.ndarray, labels: list[int]) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *pixels.shape) + pixels.tobytes())
    (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(labels)) + bytes(labels))


def torchvision(name: str, path: Path | str) -> DataConfig:
    return DataConfig(source=Source.torchvision, name=name, path=str(path))


def test_mnist_is_read_with_its_own_split(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    write_mnist(tmp_path, "train", pixels[:2], [5, 0])
    write_mnist(tmp_path, "t10k", pixels[2:], [5])
    table = read_table(torchvision("MNIST", tmp_path))
    assert table.class_names == ("0 - zero", "5 - five")
    assert table.split is not None
    assert table.split.tolist() == ["train", "train", "test"]
    assert (decode(table.table["image"][2].as_py(), 28)[:, :, 0] == pixels[2]).all()


def test_images_in_files_stay_where_they_are(tmp_path: Path) -> None:
    for split, name in (("train", "n1/a.JPEG"), ("val", "n2/b.JPEG")):
        write(tmp_path / "imagenette2" / split / name.replace("n1", "n01440764").replace("n2", "n03888257"))
    table = read_table(torchvision("Imagenette", tmp_path))
    assert table.table["path"].to_pylist() == [
        "imagenette2/train/n01440764/a.JPEG",
        "imagenette2/val/n03888257/b.JPEG",
    ]
    assert table.split is not None
    assert table.split.tolist() == ["train", "val"]


def test_torchvision_data_that_is_not_there_is_never_downloaded(tmp_path: Path) -> None:
    fails(torchvision("CIFAR10", tmp_path), r"CIFAR10: its files aren't under data\.path=.*download=True")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(b"broken"))
    fails(torchvision("CIFAR10", tmp_path), "its files aren't under")


def test_torchvision_classes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    fails(torchvision("CIFAR1O", tmp_path), r"no such class; did you mean CIFAR10")
    fails(torchvision("PhotoTour", tmp_path), "PhotoTour: .*use data=image_folder")
    fails(torchvision("MNIST", "memory://x"), "no such file|local folders only")
