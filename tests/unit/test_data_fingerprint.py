"""A fingerprint names content, wherever and in whatever pieces it lies."""

import os
import shutil
from pathlib import Path

import pyarrow as pa

from graftstack.config.schema import DataConfig, Source
from graftstack.data.fingerprint import fingerprint
from graftstack.data.table import read_table

TABLE = pa.table({"image": [b"abc", b"", b"de", None], "label": ["x", "y", "x", "y"], "age": [1.5, 2.0, None, 4.0]})


def test_chunks_slices_and_the_width_of_offsets_leave_no_trace() -> None:
    expected = fingerprint(TABLE)
    assert fingerprint(pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1, 0), TABLE.slice(1)])) == expected
    assert fingerprint(pa.concat_tables([TABLE, TABLE]).slice(4)) == expected
    assert fingerprint(TABLE.set_column(0, "image", TABLE["image"].cast(pa.large_binary()))) == expected
    assert fingerprint(TABLE.set_column(1, "label", TABLE["label"].dictionary_encode())) == expected
    assert fingerprint(TABLE.select(["label", "age", "image"])) == expected


def test_values_nulls_names_order_and_boundaries_matter() -> None:
    changed = [
        TABLE.set_column(0, "image", pa.array([b"abX", b"", b"de", None])),
        TABLE.set_column(0, "image", pa.array([b"ab", b"c", b"de", None])),
        TABLE.set_column(0, "image", pa.array([b"abc", None, b"de", b""])),
        TABLE.rename_columns(["image", "label", "size"]),
        TABLE.take([1, 0, 2, 3]),
        TABLE.slice(0, 3),
    ]
    assert len({fingerprint(table) for table in [TABLE, *changed]}) == 7


def test_moving_a_folder_keeps_its_fingerprint_and_changing_a_file_does_not(tmp_path: Path) -> None:
    for name in ("cat/a.png", "dog/b.png"):
        (tmp_path / "here" / name).parent.mkdir(parents=True)
        (tmp_path / "here" / name).write_bytes(b"not read")

    def of(name: str) -> str:
        return read_table(DataConfig(source=Source.image_folder, path=str(tmp_path / name))).fingerprint

    before = of("here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert of("there") == before
    shutil.copytree(tmp_path / "there", tmp_path / "copy")  # keeps modification times
    assert of("copy") == before
    os.utime(tmp_path / "there/cat/a.png", (1, 1))
    assert of("there") != before
