"""Predicting and evaluating with a stack, or with one of its base models, as a person asks for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftstack.cli import main

NUM = 120


def people(rows: range = range(NUM)) -> dict[str, Any]:
    """Returns columns of numbers with gaps and of categories, and a label that they tell something about."""
    rng = np.random.default_rng(0)
    age, pay = rng.normal(size=1000), rng.normal(size=1000)
    town = rng.choice(["Bonn", "Rome", "Oslo"], 1000)
    won = np.where(age + pay + (town == "Rome") + 0.5 * rng.normal(size=1000) > 0.3, "yes", "no")
    pay[::7] = np.nan
    taken = list(rows)
    return {
        "age": age[taken],
        "pay": pa.array(pay[taken], from_pandas=True),
        "town": town[taken],
        "id": [f"id-{row}" for row in taken],
        "won": won[taken],
    }


def write(file: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), file)
    return str(file)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished stacks: `people`, of a table; `target`, a regression; `digits`, of images."""
    folder = tmp_path_factory.mktemp("predict")
    data = write(folder / "people.parquet", people())
    common = ["cluster=inline", "folds.num=3", f"runs_dir={folder}/runs"]
    table = ["data=parquet", f"data.path={data}", *common]
    three = "base_models=[GaussianNB,{DecisionTreeClassifier:{name:tree}},RidgeClassifier]"
    stacks = [
        ["name=people", "data.label=won", three],
        ["name=target", "data.label=age", "data.drop=[won]", "base_models=[Ridge,DecisionTreeRegressor]"],
        ["name=ordered", "data.label=won", "folds.kind=time", "base_models=[DecisionTreeClassifier]"],
        ["name=deep", "data.label=won", "base_models=[GaussianNB]", "levels=[[DecisionTreeClassifier]]"],
    ]
    for stack in stacks:
        assert main(["stack", *table, *stack]) == 0
    images = ["data=digits", "data.image_size=8", "data.classes=[0,1,2]", "base_models=[GaussianNB]", "name=digits"]
    assert main(["stack", *images, *common]) == 0
    return folder


class Said(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def graftstack(place: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: str) -> Said:
        capsys.readouterr()
        status = main([*words, "--runs-dir", f"{place}/runs"])
        return Said(status, *capsys.readouterr())

    return run


@pytest.fixture
def predicted(graftstack: Command, tmp_path: Path) -> Callable[..., pa.Table]:
    """Predicts with a run, which has to succeed."""

    def predict(run: str, data: str, *more: str) -> pa.Table:
        out = f"{tmp_path}/predictions.parquet"
        said = graftstack("predict", run, data, "--out", out, *more)
        assert said.status == 0, said.err
        assert said.out == f"{out}\n"
        return pq.read_table(out)

    return predict


Predict = Callable[..., pa.Table]


def test_new_rows_are_predicted_with_probabilities(predicted: Predict, tmp_path: Path) -> None:
    columns = people(range(200, 260))
    won = columns.pop("won")
    table = predicted("people", write(tmp_path / "new.parquet", columns))
    assert table.column_names == ["row_id", "label", "prediction", "probability", "probabilities"]
    assert table["row_id"].to_pylist() == list(range(60))
    assert table["label"].null_count == 60
    assert (np.array(table["prediction"].to_pylist()) == won).mean() > 0.7
    np.testing.assert_allclose(np.array(table["probabilities"].to_pylist()).sum(axis=1), 1, rtol=1e-5)


def test_columns_may_stand_in_another_order_and_lack_ids_labels_and_values(predicted: Predict, tmp_path: Path) -> None:
    columns = people(range(200, 230))
    whole = predicted("people", write(tmp_path / "whole.parquet", columns))
    turned = {name: columns[name] for name in ("town", "pay", "age")}
    table = predicted("people", write(tmp_path / "turned.parquet", turned))
    assert table["probabilities"].to_pylist() == whole["probabilities"].to_pylist()
    assert whole["label"].to_pylist() == columns["won"].tolist()
    bare = {"age": [None, 1.0], "pay": pa.array([None, None], pa.float64()), "town": [None, "Rome"]}
    assert predicted("people", write(tmp_path / "bare.parquet", bare)).num_rows == 2


def test_a_category_that_was_never_seen_is_predicted(predicted: Predict, tmp_path: Path) -> None:
    columns = people(range(200, 230)) | {"town": ["Lima"] * 30}
    assert predicted("people", write(tmp_path / "new.parquet", columns)).num_rows == 30


def test_csv_is_predicted_by_a_stack_of_parquet(predicted: Predict, tmp_path: Path) -> None:
    columns = people(range(200, 230))
    del columns["id"]
    whole = predicted("people", write(tmp_path / "new.parquet", columns))
    table = pa.table(columns)
    from pyarrow import csv

    csv.write_csv(table, tmp_path / "new.csv")
    said = predicted("people", str(tmp_path / "new.csv"))
    assert said["prediction"].to_pylist() == whole["prediction"].to_pylist()


def test_one_base_model_predicts_alone(predicted: Predict, tmp_path: Path) -> None:
    data = write(tmp_path / "new.parquet", people(range(200, 260)))
    stack, tree = predicted("people", data), predicted("people", data, "--base", "tree")
    assert stack.column_names == tree.column_names
    assert set(tree["probability"].to_pylist()) == {1.0}, "a tree that is grown out is always sure"
    assert stack["probability"].to_pylist() != tree["probability"].to_pylist()
    assert predicted("deep", data, "--base", "DecisionTreeClassifier@2").num_rows == 60


def test_a_regression_predicts_numbers(predicted: Predict, tmp_path: Path) -> None:
    columns = people(range(200, 260))
    del columns["won"]
    table = predicted("target", write(tmp_path / "new.parquet", columns))
    assert table.column_names == ["row_id", "label", "prediction"]
    assert table["label"].to_pylist() == columns["age"].tolist()
    assert table["prediction"].type == pa.float64()
    del columns["age"]
    bare = predicted("target", write(tmp_path / "bare.parquet", columns), "--base", "Ridge")
    assert bare["label"].null_count == 60


def test_images_are_predicted_from_pixels(predicted: Predict) -> None:
    table = predicted("digits", "digits")
    said, labels = np.array(table["prediction"].to_pylist()), np.array(table["label"].to_pylist())
    known = np.isin(labels, ["0", "1", "2"])
    assert table.num_rows > known.sum()
    assert (said == labels)[known].mean() > 0.9


@pytest.mark.parametrize("run", ["people", "target", "ordered", "deep", "digits"])
def test_an_evaluation_of_the_rows_held_out_repeats_the_metrics_of_the_run(
    graftstack: Command, place: Path, run: str
) -> None:
    said = graftstack("evaluate", run, "--json")
    assert said.status == 0, said.err
    measured = json.loads(said.out)
    recorded = json.loads((place / "runs" / run / "run.json").read_text())
    assert measured.pop("num_rows") == recorded["details"]["num_held_out"]
    assert measured == pytest.approx(recorded["metrics"])


def test_other_labelled_data_are_evaluated_whole(graftstack: Command, tmp_path: Path) -> None:
    said = graftstack("evaluate", "people", write(tmp_path / "new.parquet", people(range(200, 300))), "--json")
    assert said.status == 0, said.err
    measured = json.loads(said.out)
    assert measured["num_rows"] == 100
    assert measured["accuracy"] > 0.7
    table = graftstack("evaluate", "people", "--split", "train")
    assert "accuracy" in table.out


def without(name: str) -> dict[str, Any]:
    return {key: values for key, values in people(range(200, 220)).items() if key != name}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (without("pay"), "column pay is missing, and the model learnt from it; add it"),
        (
            people(range(20)) | {"height": np.ones(20)},
            "column height: the model didn't learn from it; remove it from the data",
        ),
        (people(range(20)) | {"age": ["old"] * 20}, 'column age holds text such as "old", and the model learnt from '),
        (people(range(20)) | {"town": np.arange(20)}, "column town holds values of type int64, and the model learnt "),
        (people(range(20)) | {"age": np.full(20, np.inf)}, "column age holds an infinite number (row 0, 20 in all)"),
    ],
    ids=["missing", "extra", "text for numbers", "numbers for text", "infinite"],
)
def test_columns_that_dont_match_are_named_in_one_line(
    graftstack: Command, tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    data = write(tmp_path / "new.parquet", columns)
    for words in (["predict", "people", data, "--out", f"{tmp_path}/out.parquet"], ["evaluate", "people", data]):
        said = graftstack(*words)
        assert said.status == 2
        (line,) = said.err.splitlines()
        assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["new.parquet"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "people", "{data}", "--base", "trees"], "--base trees: no such base model; did you mean tree"),
        (["predict", "people", "{data}", "--base", "RidgeClassifier"], "--base RidgeClassifier: predicts classes with"),
        (["predict", "people", "digits"], "data=digits has no columns"),
        (["predict", "people", "{data}.nope.parquet"], "nope.parquet: "),
        (["predict", "nobody", "{data}"], "nobody: no such run in "),
        (["evaluate", "people", "--split", "test"], "--split test: holds no rows; use train, val, test or all"),
    ],
)
def test_what_cant_be_predicted_is_told_in_one_line(
    graftstack: Command, place: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    out = ["--out", f"{tmp_path}/out.parquet"] if words[0] == "predict" else []
    said = graftstack(*(word.format(data=place / "people.parquet") for word in words), *out)
    assert said.status == 2
    (line,) = said.err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_damaged_stack_is_told_in_one_line(graftstack: Command, place: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(place / "runs/people", tmp_path / "broken")
    (tmp_path / "broken/model/bases/tree/model.skops").write_bytes(b"PK")
    said = graftstack("predict", f"{tmp_path}/broken", f"{place}/people.parquet", "--out", f"{tmp_path}/out.parquet")
    assert said.status == 2
    (line,) = said.err.splitlines()
    assert "damaged or cut short" in line
