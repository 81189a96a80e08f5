"""A stack's model is put down and taken up again, whatever it is made of, and says the same of the same rows."""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import check_array
from threadpoolctl import threadpool_limits

from graftstack.config.compose import compose_job
from graftstack.config.stack import StackConfig
from graftstack.errors import BadInputError, RunError
from graftstack.runtime import InlineExecutor
from graftstack.stacking.artifact import load_stack, read_card, save_stack
from graftstack.stacking.fitting import FittedStack, StackTask, cross_fitted, fitted_stack
from graftstack.stacking.job import prepare_stack
from graftstack.stacking.model import Predicted
from graftstack.stacking.model_file import UnstorableError, model_bytes
from graftstack.storage import Folder

NUM = 120


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small fits gain nothing from threads."""
    with threadpool_limits(1):
        yield


def people(kind: str = "classes") -> pa.Table:
    """Returns columns of numbers with gaps, of categories and of houses, and a label of some kind."""
    rng = np.random.default_rng(0)
    age, pay = rng.normal(size=NUM), rng.normal(size=NUM)
    town = rng.choice(["Bonn", "Rome", "Oslo"], NUM)
    score = age + pay + (town == "Rome") + 0.5 * rng.normal(size=NUM)
    labels: dict[str, Any] = {
        "classes": np.where(score > 0.3, "yes", "no"),
        "three": np.select([score < -0.5, score < 1], ["low", "mid"], "top"),
        "number": score,
    }
    gaps = pa.array(np.where(np.arange(NUM) % 7 == 0, np.nan, pay), from_pandas=True)
    house = [f"h{row // 3}" for row in range(NUM)]
    return pa.table({"age": age, "pay": gaps, "town": town, "house": house, "won": labels[kind]})


def prepared(folder: Path, *more: str, kind: str = "classes") -> StackTask:
    pq.write_table(people(kind), folder / "people.parquet")
    bases = {"number": "[Ridge,DecisionTreeRegressor]"}.get(kind, "[LogisticRegression,DecisionTreeClassifier]")
    given = [
        *("data=parquet", f"data.path={folder}/people.parquet", "data.label=won", "folds.num=3", "cluster=inline"),
        *("data.drop=[house]", f"base_models={bases}", *more),
    ]
    if "data.group=house" in more:
        given.remove("data.drop=[house]")
    config = compose_job("stack", list({override.partition("=")[0]: override for override in given}.values()))
    assert isinstance(config, StackConfig)
    return prepare_stack(config)


def fitted(task: StackTask) -> FittedStack:
    return fitted_stack(task, cross_fitted(task, InlineExecutor()))


def assert_survives(task: StackTask, stack: FittedStack, folder: Path) -> Predicted:
    """Saves and loads a stack; returns what it says of the rows held out."""
    views = task.views(task.data.splits.val)
    before = stack.model.predict_all(views)
    save_stack(Folder(str(folder)), task, stack.model)
    after = load_stack(Folder(str(folder))).predict_all(views, num_workers=2)
    np.testing.assert_array_equal(after.stack, before.stack)
    for level_after, level_before in zip(after.levels, before.levels, strict=True):
        for said_after, said_before in zip(level_after, level_before, strict=True):
            np.testing.assert_array_equal(said_after, said_before)
    assert np.isfinite(before.stack).all()
    return before


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("classes", []),
        ("three", []),
        ("number", []),
        ("classes", ["mode=bag"]),
        ("three", ["mode=bag", "folds.repeats=2"]),
        ("number", ["mode=bag"]),
        ("classes", ["levels=2"]),
        ("three", ["levels=[[GaussianNB,DecisionTreeClassifier],[LogisticRegression]]", "passthrough=true"]),
        ("number", ["levels=2", "mode=bag", "passthrough=true"]),
        ("classes", ["passthrough=true"]),
        ("three", ["passthrough=true", "meta_model=greedy"]),
        ("number", ["passthrough=true", "meta_model=nonnegative"]),
        ("classes", ["calibration=temperature"]),
        ("three", ["calibration=isotonic", "meta_model=nonnegative"]),
        ("classes", ["meta_model=gbm"]),
        ("number", ["meta_model={gbm:{min_samples_leaf:10}}"]),
        ("number", ["meta_model=greedy"]),
        ("three", ["meta_model={RandomForestClassifier:{n_estimators:5}}"]),
        ("classes", ["data.group=house"]),
        ("number", ["data.group=house"]),
        ("classes", ["folds.kind=time"]),
        ("number", ["folds.kind=time", "mode=bag"]),
        ("classes", ["base_models=[RidgeClassifier,SVC,LinearSVC]"]),
        ("three", ["base_models=[RidgeClassifier,SVC,KNeighborsClassifier]", "mode=bag"]),
        (
            "three",
            [
                "base_models=[{HistGradientBoostingClassifier:{max_iter:5}},{RandomForestClassifier:{n_estimators:5}},MLPClassifier]"
            ],
        ),
        ("number", ["base_models=[{HistGradientBoostingRegressor:{max_iter:5}},SVR,KNeighborsRegressor]"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "as it is",
)
@pytest.mark.filterwarnings("ignore:.*Maximum iterations")
def test_a_stack_says_the_same_after_it_was_stored(tmp_path: Path, kind: str, more: list[str]) -> None:
    task = prepared(tmp_path, *more, kind=kind)
    said = assert_survives(task, fitted(task), tmp_path / "model").stack
    held_out = task.data.y[task.data.splits.val]
    if kind == "number":
        assert np.corrcoef(said, held_out)[0, 1] > 0.4
    else:
        np.testing.assert_allclose(said.sum(axis=1), 1)
        assert (said.argmax(axis=1) == held_out).mean() > 0.5


@pytest.mark.parametrize("names", ["LGBM", "XGB"])
def test_boosted_trees_of_other_libraries_are_stored_too(tmp_path: Path, names: str) -> None:
    pytest.importorskip({"LGBM": "lightgbm", "XGB": "xgboost"}[names])
    for kind, base in (("three", f"{names}Classifier"), ("number", f"{names}Regressor")):
        task = prepared(tmp_path, f"base_models=[{{{base}:{{n_estimators:5}}}}]", kind=kind)
        assert_survives(task, fitted(task), tmp_path / kind)


@pytest.mark.parametrize("mode", ["refit", "bag"])
def test_a_stack_of_images_is_stored_with_its_backbones(tmp_path: Path, mode: str) -> None:
    config = compose_job(
        "stack",
        [
            *("data=digits", "data.image_size=16", "data.classes=[0,1,2]", "backbone=conv4", "epochs=1"),
            *("batch_size=32", "cluster=inline", f"taps.location={tmp_path}/taps", "folds.num=2", f"mode={mode}"),
            "base_models=[{finetune:{freeze_depth:2}},{probe:{}},GaussianNB]",
        ],
    )
    assert isinstance(config, StackConfig)
    task = prepare_stack(config)
    assert [base.view for base in task.levels[0]] == ["images", "images", "pixels"]
    stack = fitted(task)
    assert stack.model.views == {"images", "pixels"}
    said = assert_survives(task, stack, tmp_path / "model").stack
    assert (said.argmax(axis=1) == task.data.y[task.data.splits.val]).mean() > 0.8
    assert list((tmp_path / "model").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["base_models=[{probe:{}}]"], {"images"}),
        (["base_models=[GaussianNB]"], {"pixels"}),
        (["base_models=[{probe:{}}]", "passthrough=true"], {"images", "pixels"}),
    ],
)
def test_rows_come_in_no_form_that_nobody_wants(tmp_path: Path, more: list[str], wanted: set[str]) -> None:
    common = ("data=digits", "data.image_size=16", "data.classes=[0,1]", "backbone=conv4", "folds.num=2")
    config = compose_job("stack", [*common, "cluster=inline", f"taps.location={tmp_path}/taps", *more])
    assert isinstance(config, StackConfig)
    task = prepare_stack(config)
    assert task.views(np.arange(4)).keys() == wanted


def test_nothing_in_a_model_is_a_pickle(tmp_path: Path) -> None:
    task = prepared(tmp_path, "passthrough=true")
    assert_survives(task, fitted(task), tmp_path / "model")
    kinds = {path.suffix for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert kinds == {".skops", ".json"}


def test_a_function_of_another_package_is_refused_in_whatever_it_is_wrapped() -> None:
    assert model_bytes(FunctionTransformer(partial(check_array, ensure_all_finite=False)))
    with pytest.raises(UnstorableError, match=r"it holds posix\.system"):
        model_bytes(FunctionTransformer(partial(os.system, "true")))


def test_one_base_model_predicts_alone_in_any_level(tmp_path: Path) -> None:
    task = prepared(tmp_path, "levels=[[GaussianNB,RidgeClassifier]]")
    stack = fitted(task).model
    views = task.views(task.data.splits.val)
    said = stack.predict_all(views)
    np.testing.assert_array_equal(stack.predict_with("LogisticRegression", views), said.levels[0][0])
    np.testing.assert_array_equal(stack.predict_with("GaussianNB@2", views), said.levels[1][0])
    with pytest.raises(BadInputError, match=r"--base Logistic: no such base model; did you mean LogisticRegression"):
        stack.predict_with("Logistic", views)
    with pytest.raises(BadInputError, match=r"--base RidgeClassifier@2: predicts classes without probabilities"):
        stack.predict_with("RidgeClassifier@2", views)


def test_a_refit_has_learnt_from_every_row_and_a_bag_from_those_of_each_fold(tmp_path: Path) -> None:
    from sklearn.base import clone

    task = prepared(tmp_path)
    table = task.views(task.data.splits.train)["table"]
    held_out = task.views(task.data.splits.val)
    tree = task.levels[0][1].estimator
    whole = clone(tree).fit(table, task.y)
    parts = [clone(tree).fit(table.iloc[fold.train], task.y[fold.train]) for fold in task.folds.folds]
    refit = fitted(task).model.predict_with("DecisionTreeClassifier", held_out)
    np.testing.assert_array_equal(refit, whole.predict_proba(held_out["table"]))
    bagged = replace(task, config=replace(task.config, mode=type(task.config.mode).bag))
    bag = fitted(bagged).model.predict_with("DecisionTreeClassifier", held_out)
    np.testing.assert_allclose(bag, np.mean([part.predict_proba(held_out["table"]) for part in parts], axis=0))


def test_a_class_that_some_folds_lack_is_predicted_by_the_others(tmp_path: Path) -> None:
    task = prepared(tmp_path, "folds.kind=time", "mode=bag", kind="three")
    y = task.data.y.copy()
    y[:60][y[:60] == 2] = 1  # the first folds in time don't know the last class
    late = replace(task, data=replace(task.data, y=y))
    with pytest.warns(RuntimeWarning, match="Number of classes in training fold"):
        stack = fitted(late)
    assert_survives(late, stack, tmp_path / "model")
    assert stack.oof.shape[1] == 3


def test_a_damaged_model_is_refused_in_one_line(tmp_path: Path) -> None:
    task = prepared(tmp_path)
    folder = Folder(str(tmp_path / "model"))
    with pytest.raises(RunError, match=r"holds no readable stack\.json; give the folder of a finished stack"):
        load_stack(folder)
    save_stack(folder, task, fitted(task).model)
    meta = tmp_path / "model/meta.skops"
    whole = meta.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        meta.write_bytes(damaged)
        with pytest.raises(RunError, match=r"damaged or cut short \(.*\); run the stack again"):
            load_stack(folder)
    meta.write_bytes(whole)
    (tmp_path / "model/bases/DecisionTreeClassifier/model.skops").unlink()
    with pytest.raises(RunError, match=r"damaged or cut short \(.*\); run the stack again"):
        load_stack(folder)
    (tmp_path / "model/stack.json").write_text("{}")
    with pytest.raises(RunError, match=r"holds no readable stack\.json"):
        read_card(folder)
