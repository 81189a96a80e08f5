"""One call from a configuration to images, labels and splits."""

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import graftstack.data
from graftstack.config.schema import DataConfig, FinetuneConfig, OnBadImage, Source
from graftstack.data.load import ImageData, load_images, split_rows
from graftstack.data.table import read_table
from graftstack.errors import DataError
from graftstack.finetune.task import prepare


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTSTACK_CACHE", str(tmp_path / "cache"))


def png(value: int) -> bytes:
    file = BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def parquet(tmp_path: Path, labels: list[Any], **columns: Any) -> DataConfig:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [png(row) for row in range(len(labels))], "label": labels} | columns), path)
    given = {name: name for name in columns}
    return DataConfig(source=Source.parquet, path=str(path), image="image", **given)


def load(config: DataConfig, **options: Any) -> ImageData:
    return load_images(config, image_size=4, seed=0, **options)


def test_importing_the_package_loads_neither_torch_nor_pyarrow_and_loading_images_no_torch() -> None:
    script = (
        "import sys, graftstack.data\n"
        "assert not {'torch', 'pyarrow', 'PIL', 'numpy'} & set(sys.modules)\n"
        "import graftstack.data.load\n"
        "assert not {'torch', 'torchvision', 'sklearn', 'ray', 'hydra'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(graftstack.data.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_digits_load_with_a_stratified_split() -> None:
    data = load_images(DataConfig(), image_size=8, seed=0)
    assert [len(rows) for rows in data.splits] == [1438, 359, 0]
    shares = np.bincount(data.labels[data.splits.val]) / np.bincount(data.labels)
    assert shares == pytest.approx([0.2] * 10, abs=0.01)
    assert data.num_skipped == 0
    assert data.groups is None


def test_planning_and_loading_split_alike(tmp_path: Path) -> None:
    config = parquet(tmp_path, [row % 3 for row in range(60)])
    planned = split_rows(read_table(config), config, seed=0)
    assert all((a == b).all() for a, b in zip(planned, load(config).splits, strict=True))


def test_a_split_column_is_obeyed(tmp_path: Path) -> None:
    data = load(parquet(tmp_path, ["a", "b"] * 3, split=["train", "train", "test", "test", "val", "val"]))
    assert [rows.tolist() for rows in data.splits] == [[0, 1], [4, 5], [2, 3]]


def test_groups_stay_whole(tmp_path: Path) -> None:
    groups = [row // 6 for row in range(60)]
    data = load(parquet(tmp_path, [row % 2 for row in range(60)], group=groups))
    assert data.groups is not None
    assert not set(data.groups[data.splits.train]) & set(data.groups[data.splits.val])
    assert len(data.splits.val) == 12


def test_a_given_split_that_tears_a_group_is_refused(tmp_path: Path) -> None:
    config = parquet(tmp_path, ["a", "b"] * 2, split=["train", "train", "val", "val"], group=["x", "y", "x", "z"])
    with pytest.raises(DataError, match="group x is in training and outside it"):
        load(config)


@pytest.mark.parametrize(
    ("labels", "columns", "message"),
    [
        (["a"] * 4, {}, "the only class is a"),
        (["a", "a", "b", "b", "c"], {}, "class c has a single image"),
        (["a", "b"], {"split": ["val", "test"]}, "no row is for training"),
        (["a", "b"], {"split": ["train", "train"]}, "no row is for validation"),
        (["a", "b"], {"split": ["train", "val"]}, "class b is in validation but not in training"),
        (["a", "b"], {"split": ["train", "holdout"]}, 'split "holdout": not a split'),
        (["a", "b"], {"group": ["g", "g"]}, "the only group is g"),
    ],
)
def test_data_that_can_not_be_learnt_from_is_refused(
    tmp_path: Path, labels: list[str], columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(parquet(tmp_path, labels, **columns))
    assert "\n" not in str(caught.value)


def test_no_share_for_validation_is_refused() -> None:
    with pytest.raises(DataError, match=r"no row is for validation; .* data\.val_fraction"):
        load(DataConfig(val_fraction=0))


def test_a_table_without_an_image_column_has_no_images_to_load(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"age": [1, 2], "label": ["a", "b"]}), path)
    config = DataConfig(source=Source.parquet, path=str(path), features=["age"])
    assert read_table(config).labels.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"data\.image is missing"):
        load(config)
    with pytest.raises(DataError, match=r"data\.image is missing: a backbone learns from images"):
        prepare(FinetuneConfig(data=config))


def test_a_model_judges_data_that_it_could_not_learn_from(tmp_path: Path) -> None:
    data = load(parquet(tmp_path, ["b"], split=["test"]), class_names=("a", "b"))
    assert data.labels.tolist() == [1]
    assert data.class_names == ("a", "b")
    assert [rows.tolist() for rows in data.splits] == [[], [0], []]


def test_a_model_predicts_images_without_labels(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for value in range(3):
        (tmp_path / "images" / f"{value}.png").write_bytes(png(value))
    config = DataConfig(source=Source.image_folder, path=str(tmp_path / "images"))
    data = load(config, class_names=("a", "b"), require_labels=False)
    assert data.labels.tolist() == [-1, -1, -1]
    assert data.row_ids.tolist() == ["0.png", "1.png", "2.png"]
    assert [rows.tolist() for rows in data.splits] == [[], [], [0, 1, 2]]
    assert data.images.batch(np.array([2]))[0, 0, 0, 0] == 2


def test_images_behind_a_uri_are_read_and_a_missing_file_can_be_skipped() -> None:
    fs = fsspec.filesystem("memory")
    rows = [(f"{label}{row}.png", label) for label in "ab" for row in range(3)]
    for path, _ in rows:
        fs.pipe(f"/load/{path}", png(9))
    fs.rm("/load/a1.png")
    fs.pipe("/load/t.csv", "\n".join(["image,label", *(f"{path},{label}" for path, label in rows)]).encode())
    options: dict[str, Any] = {"source": Source.csv, "path": "memory://load/t.csv", "image": "image"}
    with pytest.raises(DataError, match=r"image 1 \(a1\.png\) can't be decoded: no such file"):
        load(DataConfig(**options))
    data = load(DataConfig(**options, on_bad_image=OnBadImage.skip))
    assert data.row_ids.tolist() == [0, 2, 3, 4, 5]
    assert data.images.batch(np.arange(5)).unique().tolist() == [9]
    fs.rm("/load", recursive=True)


@pytest.mark.realdata
def test_twenty_classes_of_cifar100_load_whole() -> None:
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    path = Path(os.environ.get("GRAFTSTACK_TEST_DATA", default)) / "cifar100_20classes.parquet"
    if not path.exists():
        pytest.skip(f"{path} is absent; set GRAFTSTACK_TEST_DATA to the folder that holds it")
    config = DataConfig(source=Source.parquet, path=str(path), image="image", split="split")
    data = load_images(config, image_size=32, seed=0)
    assert (len(data.splits.train), len(data.splits.val), len(data.splits.test)) == (10_000, 2_000, 0)
    assert len(data.class_names) == 20
    assert (np.bincount(data.labels[data.splits.train]) == 500).all()
    assert data.images.batch(data.splits.val[:64]).float().std() > 30
