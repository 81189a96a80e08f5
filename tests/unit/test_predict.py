"""Plans, predictions and evaluations of a run, as a person asks for them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from graftstack.cli import main

COMMON = ("data.image_size=16", "backbone=conv4", "epochs=8", "batch_size=16", "cluster=inline")


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, `seven`, trained on a Parquet file beside it."""
    folder = tmp_path_factory.mktemp("predict")
    write_digits(folder / "digits.parquet", range(300))
    status = main(
        ["finetune", "data=parquet", f"data.path={folder}/digits.parquet", "data.image=png", "data.label=digit",
         "data.classes=[1,3,5,7]", *COMMON, f"runs_dir={folder}/runs", "name=seven"]
    )  # fmt: skip
    assert status == 0
    return folder


def pictures(rows: range) -> list[Image.Image]:
    images = load_digits().images[list(rows)]
    return [Image.fromarray((image * 15.9).astype(np.uint8)) for image in images]


def write_digits(file: Path, rows: range, *, with_labels: bool = True) -> None:
    from io import BytesIO

    encoded = []
    for picture in pictures(rows):
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    columns = {"png": encoded, "digit": load_digits().target[list(rows)]}
    pq.write_table(pa.table(columns if with_labels else {"png": encoded}), file)


@pytest.fixture
def graftstack(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str) -> tuple[int, str, str]:
        status = main([*words, "--runs-dir", f"{runs_dir}/runs"])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


Command = Callable[..., tuple[int, str, str]]


def test_unlabelled_rows_are_predicted_with_probabilities(graftstack: Command, runs_dir: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "new.parquet", range(300, 400), with_labels=False)
    status, out, _ = graftstack("predict", "seven", f"{tmp_path}/new.parquet", "--out", f"{tmp_path}/p.parquet")
    assert status == 0
    assert out.strip() == f"{tmp_path}/p.parquet"
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.column_names == ["row_id", "label", "prediction", "probability", "probabilities"]
    assert table.num_rows == 100
    assert set(table["prediction"].to_pylist()) <= {"1", "3", "5", "7"}
    assert table["label"].null_count == 100
    sums = np.array(table["probabilities"].to_pylist()).sum(axis=1)
    np.testing.assert_allclose(sums, 1, rtol=1e-5)
    truth = load_digits().target[300:400]
    known = np.isin(truth, [1, 3, 5, 7])
    right = np.array(table["prediction"].to_pylist(), dtype=int)[known] == truth[known]
    assert right.mean() > 0.8


def test_images_in_a_folder_or_listed_in_a_file_are_predicted_too(graftstack: Command, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for index, picture in enumerate(pictures(range(5))):
        picture.save(tmp_path / "pictures" / f"{index}.png")
    (tmp_path / "list.csv").write_text("png,digit\n" + "".join(f"pictures/{i}.png,{i}\n" for i in range(5)))
    predictions = []
    for location in ("pictures", "list.csv"):
        status, _, err = graftstack("predict", "seven", f"{tmp_path}/{location}", "--out", f"{tmp_path}/p.parquet")
        assert status == 0, err
        predictions.append(pq.read_table(tmp_path / "p.parquet")["prediction"].to_pylist())
    assert predictions[0] == predictions[1]
    assert len(predictions[0]) == 5


def test_an_evaluation_of_the_validation_part_repeats_the_metrics_of_the_run(
    graftstack: Command, runs_dir: Path
) -> None:
    status, out, _ = graftstack("evaluate", "seven", "--json")
    measured = json.loads(out)
    recorded = json.loads((runs_dir / "runs/seven/run.json").read_text())
    assert status == 0
    assert measured.pop("num_rows") == recorded["details"]["num_val"]
    assert measured == pytest.approx(recorded["metrics"], abs=1e-6)


def test_other_labelled_data_are_evaluated_whole(graftstack: Command, tmp_path: Path) -> None:
    write_digits(tmp_path / "new.parquet", range(300, 400))
    num_known = int(np.isin(load_digits().target[300:400], [1, 3, 5, 7]).sum())
    status, out, _ = graftstack("evaluate", "seven", f"{tmp_path}/new.parquet", "--json")
    assert status == 0
    assert json.loads(out)["num_rows"] == num_known
    assert json.loads(out)["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("predict", "eight", "digits", "--out", "p.parquet"), "eight: no such run"),
        (("predict", "seven", "digits", "--out", "p.csv"), "--out p.csv: predictions are written as Parquet"),
        (
            ("predict", "seven", "digits", "--out", "/dev/null/p.parquet"),
            "p.parquet: /dev/null can't be written; choose",
        ),
        (("predict", "seven", "nowhere.parquet", "--out", "p.parquet"), "nowhere.parquet"),
        (("evaluate", "seven", "--split", "test"), "--split test: holds no rows; use train, val, test or all"),
    ],
)
def test_what_cannot_be_predicted_is_one_line_and_exit_2(
    graftstack: Command, words: tuple[str, ...], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = graftstack(*words)
    assert status == 2
    assert complaint in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "damage", "complaint"),
    [
        ("model.safetensors", lambda content: content[:1000], "model.safetensors: damaged or cut short"),
        (
            "model.safetensors",
            None,
            "model.safetensors: can't be read (No such file or directory); train the run again",
        ),
        ("model.json", None, "model: holds no readable model.json"),
        ("model.json", lambda content: content[:20], "model: holds no readable model.json"),
        ("model.json", lambda content: content.replace(b'"conv4"', b"3"), "model: holds no readable model.json"),
        (
            "model.json",
            lambda content: content.replace(b'"7"', b'"7", "8"'),
            "says, conv4 for 5 classes; train the run",
        ),
    ],
)
def test_a_damaged_model_is_named(
    runs_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: Callable[[bytes], bytes] | None,
    complaint: str,
) -> None:
    shutil.copytree(runs_dir / "runs/seven", tmp_path / "seven")
    path = tmp_path / "seven/model" / file
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    assert main(["evaluate", str(tmp_path / "seven")]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1


def test_a_plan_says_what_would_run_and_leaves_nothing(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("data=digits", *COMMON, "freeze_depth=2", "recipe=lp_ft", f"runs_dir={tmp_path}/runs")
    assert main(["plan", "finetune", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [group["is_frozen"] for group in plan["groups"]] == [True, True, False, False, False]
    assert plan["num_train"] + plan["num_val"] == 1797
    assert plan["phases"][0]["first_step"] == 1
    assert plan["phases"][-1]["last_step"] == 8 * plan["steps_per_epoch"]
    assert [phase["freeze_depth"] for phase in plan["phases"]] == [5, 2]
    assert plan["predicted_s"] > 0
    assert plan["worker_memory_bytes"] > plan["checkpoint_bytes"]
    assert plan["device_memory_bytes"] is None
    assert not (tmp_path / "runs").exists()
    assert main(["plan", "finetune", *words]) == 0
    assert "predicted" in capsys.readouterr().out
