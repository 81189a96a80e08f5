"""A stack is made of its base models once: what it leaves, what it takes up again, and when it goes on with fewer."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftstack.cli import main
from graftstack.config.compose import compose_job
from graftstack.config.stack import StackConfig
from graftstack.errors import TrainingError
from graftstack.runtime import InlineExecutor
from graftstack.stacking.crossfit import CrossFit, Progress
from graftstack.stacking.fitting import FittedStack, StackTask, cross_fitted, fitted_stack
from graftstack.stacking.folds import Fold, Folds
from graftstack.stacking.job import StackOutcome, prepare_stack, run_stack
from graftstack.stacking.model import Predicted, StackModel
from graftstack.stacking.oof import oof_table
from graftstack.storage import Folder

NUM = 120

Capture = pytest.CaptureFixture[str]


def people(num: int = NUM, **changes: Any) -> dict[str, Any]:
    """Returns columns of numbers with gaps, of categories, and labels that they tell something about."""
    rng = np.random.default_rng(0)
    age, pay = rng.normal(size=num), rng.normal(size=num)
    town = rng.choice(["Bonn", "Rome", "Oslo"], num)
    won = np.where(age + pay + (town == "Rome") + rng.normal(size=num) > 0.3, "yes", "no")
    gaps = np.where(np.arange(num) % 7 == 0, np.nan, pay)
    columns = {"age": age, "pay": pa.array(gaps, from_pandas=True), "town": town, "won": won} | changes
    return {name: values for name, values in columns.items() if values is not None}


def overrides(folder: Path, columns: dict[str, Any], *more: str) -> list[str]:
    """Returns what stacks two base models on a table of these columns."""
    pq.write_table(pa.table(columns), folder / "people.parquet")
    given = [
        *("data=parquet", f"data.path={folder}/people.parquet", "data.label=won", "folds.num=3", "cluster=inline"),
        *("base_models=[GaussianNB,DecisionTreeClassifier]", f"runs_dir={folder}/runs", *more),
    ]
    last = {override.partition("=")[0]: override for override in given}
    return list(last.values())


def prepared(folder: Path, *more: str, columns: dict[str, Any] | None = None) -> StackTask:
    config = compose_job("stack", overrides(folder, columns or people(), *more))
    assert isinstance(config, StackConfig)
    return prepare_stack(config)


def stacked(task: StackTask, folder: Path, **options: Any) -> StackOutcome:
    return run_stack(task, Folder(str(folder)), InlineExecutor(), **options)


def oof_of(folder: Path) -> pa.Table:
    return pq.read_table(folder / "oof.parquet")


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# What a stack leaves


def test_each_row_that_trains_is_predicted_once_and_out_of_fold(tmp_path: Path) -> None:
    task = prepared(tmp_path)
    outcome = stacked(task, tmp_path / "run")
    table = oof_of(tmp_path / "run")
    assert table.column_names == [
        *("row_id", "label", "fold", "GaussianNB.no", "GaussianNB.yes"),
        *("DecisionTreeClassifier.no", "DecisionTreeClassifier.yes", "stack.no", "stack.yes"),
    ]
    rows = task.data.splits.train
    assert table["row_id"].to_pylist() == task.data.row_ids[rows].tolist()
    assert table["label"].to_pylist() == [task.data.class_names[label] for label in task.y]
    for index, fold in enumerate(task.folds.folds):
        assert np.flatnonzero(table["fold"].to_numpy() == index).tolist() == sorted(fold.test)
    for name in ("GaussianNB", "DecisionTreeClassifier", "stack"):
        np.testing.assert_allclose(table[f"{name}.no"].to_numpy() + table[f"{name}.yes"].to_numpy(), 1)
    assert outcome.artifacts == {"model": "model", "oof": "oof.parquet", "leaderboard": "leaderboard.json"}
    assert outcome.details["num_tasks_run"] == 2 * (3 + 1)


def test_what_a_fold_tests_is_predicted_by_a_model_of_the_other_folds(tmp_path: Path) -> None:
    from sklearn.base import clone

    task = prepared(tmp_path)
    stacked(task, tmp_path / "run")
    said = oof_of(tmp_path / "run")["GaussianNB.yes"].to_numpy()
    table = task.views(task.data.splits.train)["table"]
    for fold in task.folds.folds:
        alone = clone(task.levels[0][0].estimator).fit(table.iloc[fold.train], task.y[fold.train])
        np.testing.assert_array_equal(said[fold.test], alone.predict_proba(table.iloc[fold.test])[:, 1])


def test_dishonest_folds_leave_no_table(tmp_path: Path) -> None:
    task = prepared(tmp_path)
    everything = np.arange(task.folds.num_rows)
    peeking = replace(
        task, folds=Folds(tuple(fold._replace(train=everything) for fold in task.folds.folds), task.folds.num_rows)
    )
    with pytest.raises(TrainingError, match=r"can't be trusted: fold 1 of 3 trains on the row of row"):
        stacked(peeking, tmp_path / "run")
    twice = replace(task, folds=Folds((task.folds.folds[0], *task.folds.folds), task.folds.num_rows))
    with pytest.raises(TrainingError, match=r"can't be trusted: row \d+ is tested 2 times"):
        stacked(twice, tmp_path / "run")
    together = replace(task, data=replace(task.data, groups=np.full(len(task.data), "one house")))
    with pytest.raises(TrainingError, match=r"can't be trusted: fold 1 of 3 trains on the group of row"):
        stacked(together, tmp_path / "run")
    assert not list(tmp_path.rglob("oof.parquet"))
    assert not list(tmp_path.rglob("stack.json"))


class Assembled(NamedTuple):
    crossed: CrossFit
    stack: FittedStack


def assembled(task: StackTask) -> Assembled:
    crossed = cross_fitted(task, InlineExecutor())
    return Assembled(crossed, fitted_stack(task, crossed))


def test_a_table_that_lacks_rows_or_has_them_twice_is_not_trusted(tmp_path: Path) -> None:
    task = prepared(tmp_path)
    crossed, stack = assembled(task)
    assert oof_table(task, crossed, stack).num_rows == len(task.data.splits.train)
    kept = stack.covered[:-2]
    base_oof = [[found[:-2] for found in level] for level in stack.base_oof]
    fewer = stack._replace(covered=kept, base_oof=base_oof)
    short = replace(crossed, folds=(replace(crossed.folds[0], folds=short_folds(task, kept)),))
    fewer = fewer._replace(oof=stack.oof[:-2], folds=short.folds[0])
    with pytest.raises(TrainingError, match=r"can't be trusted: 2 rows have no prediction, such as row \d+"):
        oof_table(task, short, fewer)
    same = np.zeros_like(task.data.row_ids)
    with pytest.raises(TrainingError, match=r"can't be trusted: row 0 has \d+ predictions, and one is wanted"):
        oof_table(replace(task, data=replace(task.data, row_ids=same)), crossed, stack)


def short_folds(task: StackTask, kept: Any) -> tuple[Fold, ...]:
    """Returns the folds of a task that test no other rows than `kept`."""
    return tuple(fold._replace(test=fold.test[np.isin(fold.test, kept)]) for fold in task.folds.folds)


def test_a_table_of_folds_that_saw_a_row_or_its_group_is_not_trusted(tmp_path: Path) -> None:
    task = prepared(tmp_path)
    crossed, stack = assembled(task)
    seen = Folds(tuple(fold._replace(train=np.r_[fold.train, fold.test[:1]]) for fold in task.folds.folds), 96)
    with pytest.raises(
        TrainingError, match=r"can't be trusted: row \d+ was predicted by fold 1 of 3, which trained on"
    ):
        oof_table(task, replace(crossed, folds=(seen,)), stack)
    together = replace(task, data=replace(task.data, groups=np.full(len(task.data), "one house")))
    with pytest.raises(TrainingError, match=r"was predicted by fold 1 of 3, which trained on it or on its group"):
        oof_table(together, crossed, stack)


def test_rows_held_out_are_predicted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    predict_all = StackModel.predict_all

    def counted(self: StackModel, *args: Any, **options: Any) -> Predicted:
        calls.append(1)
        return predict_all(self, *args, **options)

    monkeypatch.setattr(StackModel, "predict_all", counted)
    stacked(prepared(tmp_path), tmp_path / "run")
    assert len(calls) == 1


def test_rows_of_a_group_are_in_one_fold(tmp_path: Path) -> None:
    columns = people(house=[f"h{row // 4}" for row in range(NUM)])
    task = prepared(tmp_path, "data.group=house", columns=columns)
    stacked(task, tmp_path / "run")
    table = oof_of(tmp_path / "run")
    folds: dict[int, set[int]] = {}
    for row_id, fold in zip(table["row_id"].to_pylist(), table["fold"].to_pylist(), strict=True):
        folds.setdefault(row_id // 4, set()).add(fold)
    assert all(len(found) == 1 for found in folds.values())
    assert "house" not in task.data.schema.names  # type: ignore[union-attr]


def test_folds_in_time_leave_out_the_rows_that_nothing_comes_before(tmp_path: Path) -> None:
    task = prepared(tmp_path, "folds.kind=time")
    stacked(task, tmp_path / "run")
    table = oof_of(tmp_path / "run")
    num_train = NUM - round(0.2 * NUM)
    first = num_train - 3 * (num_train // 4)
    assert table["row_id"].to_pylist() == list(range(first, num_train))
    assert table["fold"].to_pylist() == sorted(table["fold"].to_pylist())


def test_repeats_are_averaged(tmp_path: Path) -> None:
    task = prepared(tmp_path, "folds.repeats=2", "base_models=[GaussianNB]")
    outcome = stacked(task, tmp_path / "run")
    assert outcome.details["num_folds"] == 6
    assert outcome.details["num_tasks_run"] == 6 + 1
    table = oof_of(tmp_path / "run")
    assert table.num_rows == len(task.data.splits.train)
    assert set(table["fold"].to_pylist()) == {0, 1, 2}


def test_the_leaderboard_tells_score_spread_times_and_weight_of_each(tmp_path: Path) -> None:
    outcome = stacked(prepared(tmp_path), tmp_path / "run")
    board = json.loads((tmp_path / "run/leaderboard.json").read_text())
    assert {row["name"] for row in board} == {"GaussianNB", "DecisionTreeClassifier", "stack"}
    assert [row["cv_loss"] for row in board] == sorted(row["cv_loss"] for row in board)
    bases = [row for row in board if row["name"] != "stack"]
    assert outcome.results["base_models"] == bases
    assert sum(row["weight"] for row in bases) == pytest.approx(1)
    for row in bases:
        assert row["fit_s"] > 0
        assert 0 < row["cv_spread"] < 0.5
    table = oof_of(tmp_path / "run")
    won = np.array(table["label"].to_pylist()) == "yes"
    for row in board:
        said = table[f"{row['name']}.yes"].to_numpy() > 0.5
        assert row["cv_score"] == pytest.approx(np.mean(said == won))


def test_without_rows_held_out_the_stack_is_judged_out_of_fold(tmp_path: Path) -> None:
    outcome = stacked(prepared(tmp_path, "data.val_fraction=0"), tmp_path / "run")
    assert outcome.details["num_rows"] == NUM
    assert outcome.details["num_held_out"] == 0
    assert outcome.metrics["accuracy"] == pytest.approx(outcome.results["stack"]["cv_score"])
    assert all(row["held_out_score"] is None for row in outcome.results["base_models"])
    assert "better_base" not in outcome.details


def test_base_models_that_only_decide_have_no_loss(tmp_path: Path) -> None:
    outcome = stacked(prepared(tmp_path, "base_models=[RidgeClassifier,GaussianNB]"), tmp_path / "run")
    losses = {row["name"]: row["cv_loss"] for row in outcome.results["base_models"]}
    assert losses["RidgeClassifier"] is None
    assert losses["GaussianNB"] > 0
    assert "RidgeClassifier" in oof_of(tmp_path / "run").column_names


def test_a_base_model_that_beats_the_stack_is_offered(tmp_path: Path) -> None:
    said: list[str] = []
    task = prepared(tmp_path, "meta_model={DummyClassifier:{strategy:prior}}")
    outcome = stacked(task, tmp_path / "run", say=said.append)
    assert outcome.details["better_base"] == "GaussianNB"
    (line,) = said
    assert line.startswith("GaussianNB alone does better than the stack on held-out rows (loss ")
    assert f"graftstack predict {tmp_path}/run DATA --base GaussianNB --out FILE" in line


def test_a_base_model_that_held_out_rows_chose_isnt_offered_for_its_score_on_them(tmp_path: Path) -> None:
    said: list[str] = []
    task = prepared(tmp_path, "meta_model={DummyClassifier:{strategy:prior}}", "base_models=[GaussianNB]")
    outcome = stacked(replace(task, trained=frozenset({"GaussianNB"})), tmp_path / "run", say=said.append)
    assert "better_base" not in outcome.details
    assert said == ["held-out rows chose the trials or epochs of GaussianNB: their own scores there flatter them"]
    nothing_held_out = replace(task.data, splits=task.data.splits._replace(val=np.empty(0, dtype=np.int64)))
    assert not replace(task, trained=frozenset({"GaussianNB"}), data=nothing_held_out).flattered


def test_a_stack_that_beats_its_base_models_offers_none(tmp_path: Path) -> None:
    task = prepared(tmp_path, "base_models=[{DummyClassifier:{strategy:prior}},DecisionTreeClassifier]")
    assert "better_base" not in stacked(task, tmp_path / "run").details


def test_notes_on_the_columns_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    columns = people(ticket=[f"ticket {row}" for row in range(NUM)])
    stacked(prepared(tmp_path, columns=columns), tmp_path / "run", say=said.append)
    assert said[0].startswith("column ticket is left out")


# What is taken up again


def test_a_second_start_trains_nothing_and_says_the_same(tmp_path: Path) -> None:
    task = prepared(tmp_path)
    stacked(task, tmp_path / "run")
    first = (tmp_path / "run/oof.parquet").read_bytes()
    again = stacked(prepared(tmp_path), tmp_path / "run")
    assert (again.details["num_tasks_run"], again.details["num_tasks_known"]) == (0, 8)
    assert (tmp_path / "run/oof.parquet").read_bytes() == first


def test_a_changed_base_model_trains_only_itself(tmp_path: Path) -> None:
    stacked(prepared(tmp_path), tmp_path / "run")
    changed = prepared(tmp_path, "base_models=[GaussianNB,{DecisionTreeClassifier:{max_depth:2}}]")
    again = stacked(changed, tmp_path / "run")
    assert (again.details["num_tasks_run"], again.details["num_tasks_known"]) == (4, 4)


def test_another_name_or_meta_model_trains_no_base_model(tmp_path: Path) -> None:
    stacked(prepared(tmp_path), tmp_path / "run")
    renamed = prepared(
        tmp_path, "base_models=[{GaussianNB:{name:bayes}},DecisionTreeClassifier]", "meta_model=nonnegative"
    )
    assert stacked(renamed, tmp_path / "run").details["num_tasks_run"] == 0


@pytest.mark.parametrize("change", ["seed=1", "folds.num=4", "data.val_fraction=0.3"])
def test_other_folds_are_trained_anew(tmp_path: Path, change: str) -> None:
    stacked(prepared(tmp_path, "base_models=[GaussianNB]"), tmp_path / "run")
    again = stacked(prepared(tmp_path, "base_models=[GaussianNB]", change), tmp_path / "run")
    assert again.details["num_tasks_run"] >= 3


def test_an_interrupted_stack_goes_on_where_it_was(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stacked(prepared(tmp_path), tmp_path / "run", tell=interrupt)
    again = stacked(prepared(tmp_path), tmp_path / "run")
    assert (again.details["num_tasks_run"], again.details["num_tasks_known"]) == (3, 5)
    stacked(prepared(tmp_path), tmp_path / "unbroken")
    assert (tmp_path / "run/oof.parquet").read_bytes() == (tmp_path / "unbroken/oof.parquet").read_bytes()


# With fewer base models

FAILING = "base_models=[GaussianNB,{KNeighborsClassifier:{n_neighbors:500}}]"


def test_a_base_model_that_fails_twice_ends_the_stack_with_its_name_and_fold(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"base model KNeighborsClassifier fold 1 of 3: .*twice; .*on_error=drop"):
        stacked(prepared(tmp_path, FAILING), tmp_path / "run")


def test_a_base_model_that_fails_may_be_dropped(tmp_path: Path) -> None:
    said: list[str] = []
    outcome = stacked(prepared(tmp_path, FAILING, "on_error=drop"), tmp_path / "run", say=said.append)
    assert [row["name"] for row in outcome.results["base_models"]] == ["GaussianNB"]
    assert outcome.details["dropped"].keys() == {"KNeighborsClassifier"}
    assert any(line.startswith("KNeighborsClassifier is left out: fold 1 of 3: ") for line in said)
    assert "KNeighborsClassifier" not in " ".join(oof_of(tmp_path / "run").column_names)
    assert (tmp_path / "run/model/stack.json").exists()


def test_no_stack_is_made_of_no_base_model(tmp_path: Path) -> None:
    task = prepared(tmp_path, "base_models=[{KNeighborsClassifier:{n_neighbors:500}}]", "on_error=drop")
    with pytest.raises(TrainingError, match="no base model is left, the last was KNeighborsClassifier"):
        stacked(task, tmp_path / "run")


def test_a_time_limit_ends_with_the_base_models_that_are_finished(tmp_path: Path) -> None:
    def dawdle(progress: Progress) -> None:
        if progress.done >= 4:
            time.sleep(2)

    outcome = stacked(prepared(tmp_path), tmp_path / "run", time_left_s=2, tell=dawdle)
    assert [row["name"] for row in outcome.results["base_models"]] == ["GaussianNB"]
    assert outcome.details["dropped"]["DecisionTreeClassifier"].startswith("not finished within time_limit_s=")
    assert (tmp_path / "run/model/stack.json").exists()


def test_who_runs_out_of_time_is_told_the_limit_that_was_set(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^time_limit_s=77: no base model was finished in time"):
        stacked(prepared(tmp_path, "time_limit_s=77"), tmp_path / "run", time_left_s=0)


def test_a_meta_model_that_can_not_learn_is_named_with_the_remedy(tmp_path: Path) -> None:
    task = prepared(tmp_path, "meta_model={HistGradientBoostingClassifier:{monotonic_cst:[1,1,1,1]}}")
    with pytest.raises(
        TrainingError,
        match=r"^meta_model=HistGradientBoostingClassifier: can't learn .* \(ValueError\); use another meta_model with",
    ):
        stacked(task, tmp_path / "run")


def test_time_for_no_base_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no base model was finished in time"):
        stacked(prepared(tmp_path), tmp_path / "run", time_left_s=0)


# What can't be stacked is told before anything is written


def complaint(capsys: Capture, *words: str) -> str:
    """Returns the one line that bad input ends in."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


BAD: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "unknown estimator": (
        {},
        ["base_models=[LogisticRegresion]"],
        "base model LogisticRegresion: LogisticRegresion: no such estimator; did you mean LogisticRegression",
    ),
    "unknown parameter": (
        {},
        ["base_models=[{LogisticRegression:{max_itr:3}}]"],
        "base model LogisticRegression: LogisticRegression.max_itr: no such parameter; did you mean max_iter",
    ),
    "value that a parameter doesn't take": (
        {},
        ["base_models=[{DecisionTreeClassifier:{max_depth:-1}}]"],
        "base model DecisionTreeClassifier: DecisionTreeClassifier.max_depth=-1: ",
    ),
    "regressor": (
        {},
        ["base_models=[RandomForestRegressor]"],
        "base model RandomForestRegressor: RandomForestRegressor: it is a regressor, and the task is classification",
    ),
    "unknown meta-model": ({}, ["meta_model=logistics"], "meta_model=logistics: no such meta-model; did you mean"),
    "meta-model without probabilities": (
        {},
        ["meta_model=LinearSVC"],
        "meta_model=LinearSVC: it decides without probabilities",
    ),
    "meta-model that takes no negative columns": (
        {},
        ["meta_model=MultinomialNB", "passthrough=true"],
        "meta_model=MultinomialNB: takes no negative numbers, as passthrough=true has",
    ),
    "meta-model that takes no negative decisions": (
        {},
        ["meta_model=MultinomialNB", "base_models=[GaussianNB,RidgeClassifier]"],
        "meta_model=MultinomialNB: takes no negative numbers, as RidgeClassifier decides by",
    ),
    "meta-model of more neighbours than there are": (
        {},
        ["meta_model={KNeighborsClassifier:{n_neighbors:65}}", "calibration=temperature"],
        "meta_model.KNeighborsClassifier.n_neighbors=65: a fold has 64 rows; use that or less",
    ),
    "meta-model of the other task": ({}, ["meta_model=ridge"], "meta_model=ridge: it predicts numbers"),
    "infinite number": (
        {"age": np.r_[np.inf, np.zeros(NUM - 1)]},
        [],
        "column age holds an infinite number (row 0, 1 in all)",
    ),
    "rare class": (
        {"won": ["yes"] * (NUM - 2) + ["no"] * 2},
        ["folds.num=5"],
        "class no has 1 rows for 5 folds; use ",
    ),
    "few groups": (
        {"house": ["a", "b", "c", "d"] * (NUM // 4)},
        ["data.group=house", "folds.num=5"],
        "groups for 5 folds: each fold tests whole groups; use fewer folds",
    ),
    "no groups": ({}, ["folds.kind=group"], "folds of kind group need the group of each row; set data.group"),
    "constant class": ({"won": ["yes"] * NUM}, [], "data.label=won: the only class of the 120 training rows is yes"),
    "constant target": (
        {"won": np.full(NUM, 1.5)},
        ["base_models=[Ridge]"],
        "data.label=won: the only target of the 120 training rows is 1.5",
    ),
    "missing target": (
        {"won": np.r_[np.arange(NUM - 1.0), np.nan]},
        ["base_models=[Ridge]"],
        "row 119 has no label (1 of 120 rows); label the rows, or remove them",
    ),
    "backbone without images": ({}, ["base_models=[{finetune:{}}]"], "base model finetune: learns from images and the"),
    "run that there isn't": ({}, ["base_models=[run:nope]"], "run:nope: no such run in "),
    "sweep that there isn't": ({}, ["from_sweep=nope"], "from_sweep=nope: no such run in "),
    "two of one name": (
        {},
        ["base_models=[GaussianNB,GaussianNB]"],
        "base_models: two base models are called GaussianNB; give one another name",
    ),
    "name of the stack": (
        {},
        ["base_models=[{GaussianNB:{name:stack}}]"],
        "base_models: a base model can't be called stack",
    ),
    "name of another column": (
        {},
        ["base_models=[{GaussianNB:{name:row_id}}]"],
        "base_models: a base model can't be called row_id",
    ),
    "name of a folder": ({}, ["base_models=[{GaussianNB:{name:..}}]"], "base_models: '..' can't name a base model"),
    "GPU": (
        {},
        ["cluster.gpus_per_worker=1"],
        "cluster.gpus_per_worker=1: ",
    ),
}


@pytest.mark.parametrize(("changes", "more", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line_and_leaves_nothing_behind(
    tmp_path: Path, capsys: Capture, changes: dict[str, Any], more: list[str], message: str
) -> None:
    words = overrides(tmp_path, people(**changes), *more)
    before = tree(tmp_path)
    assert message in complaint(capsys, "stack", *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{finetune:{freeze_depth:99}}", "freeze_depth=99: conv4 has "),
        ("{finetune:{backbone.name:resnet19}}", "resnet19"),
        ("{probe:{freeze_depth:0}}", "base model probe fold 1 of 3: freeze_depth=0: a probe learns from what frozen"),
        ("{finetune:{batch_size:200}}", "base model finetune fold 1 of 3: batch_size=200: a step takes 200 images and"),
    ],
)
def test_a_backbone_that_can_not_be_trained_is_told_before_anything_is_written(
    tmp_path: Path, capsys: Capture, entry: str, message: str
) -> None:
    words = ["data=digits", "data.image_size=16", "data.classes=[0,1]", "backbone=conv4", "folds.num=3", "epochs=1"]
    places = [f"runs_dir={tmp_path}/runs", f"taps.location={tmp_path}/taps", "cluster=inline", "batch_size=32"]
    assert main(["stack", *words, *places, f"base_models=[GaussianNB,{entry}]"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]  # above it, images are decoded
    assert not tree(tmp_path)


@pytest.mark.parametrize("command", [["plan", "stack"], ["stack", "--check-leakage"]], ids=" ".join)
def test_plans_and_leak_checks_refuse_bad_input_too(tmp_path: Path, capsys: Capture, command: list[str]) -> None:
    changes, more, message = BAD["unknown parameter"]
    assert message in complaint(capsys, *command, *overrides(tmp_path, people(**changes), *more))
    assert tree(tmp_path) == ["people.parquet"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([FAILING], "base model KNeighborsClassifier fold 1 of 3: "),
        (["base_models=[{KNeighborsClassifier:{n_neighbors:500}}]", "on_error=drop"], "no base model is left"),
        (["time_limit_s=0.001"], "no base model was finished in time"),
    ],
    ids=["a base model that fails", "no base model left", "no time"],
)
def test_a_stack_that_fails_ends_with_1_and_its_run_says_why(
    tmp_path: Path, capsys: Capture, more: list[str], message: str
) -> None:
    words = overrides(tmp_path, people(), "name=people", *more)
    assert main(["stack", *words]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    manifest = json.loads((tmp_path / "runs/people/run.json").read_text())
    assert manifest["status"] == "failed"
    assert message in manifest["error"]


def test_a_stack_that_failed_goes_on_without_the_base_model_that_did(tmp_path: Path) -> None:
    infeasible = "base_models=[GaussianNB,{NuSVC:{nu:0.999}}]"
    assert main(["stack", *overrides(tmp_path, people(), "name=s", infeasible)]) == 1
    again = ["stack", "name=s", f"runs_dir={tmp_path}/runs", "resume=true"]
    assert main([*again, "base_models=[GaussianNB,DecisionTreeClassifier]"]) == 0
    manifest = json.loads((tmp_path / "runs/s/run.json").read_text())
    assert [row["name"] for row in manifest["results"]["base_models"]] != []
    assert manifest["details"]["num_tasks_known"] > 0, "what was finished ran again"
    assert main(again) == 0, "the run was to be resumed by its name alone, as it is now"


def test_a_stack_that_had_too_little_time_goes_on_with_more(tmp_path: Path) -> None:
    words = overrides(tmp_path, people(), "name=people")
    assert main(["stack", *words, "time_limit_s=0.001"]) == 1
    assert main(["stack", "name=people", "resume=true", f"runs_dir={tmp_path}/runs", "time_limit_s=600"]) == 0
    assert json.loads((tmp_path / "runs/people/run.json").read_text())["details"]["num_base_models"] == 2


def test_a_column_of_one_value_in_a_fold_is_no_trouble(tmp_path: Path) -> None:
    odd = np.zeros(NUM)
    odd[0] = 1.0
    lone = ["only here" if row == 1 else "elsewhere" for row in range(NUM)]
    boosted = "{HistGradientBoostingClassifier:{max_iter:5}}"
    bases = f"base_models=[LogisticRegression,SVC,KNeighborsClassifier,GaussianNB,{boosted}]"
    outcome = stacked(prepared(tmp_path, bases, columns=people(odd=odd, lone=lone)), tmp_path / "run")
    assert outcome.details["num_base_models"] == 5


# As a person meets it


@pytest.fixture
def graftstack(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that succeeds and returns what it prints, its tables as wide as they like."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> str:
        assert main(words) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_a_run_shows_its_base_models_and_where_their_predictions_lie(
    tmp_path: Path, graftstack: Callable[..., str]
) -> None:
    out = graftstack("stack", *overrides(tmp_path, people(), "name=people"))
    assert out.splitlines()[-1] == f"{tmp_path}/runs/people"
    shown = json.loads(graftstack("runs", "show", "people", "--json", "--runs-dir", f"{tmp_path}/runs"))
    assert (shown["job"], shown["status"]) == ("stack", "done")
    assert [row.keys() >= {"name", "cv_score", "fit_s"} for row in shown["base_models"]] == [True, True]
    assert pq.read_table(tmp_path / "runs/people" / shown["oof_path"]).num_rows == shown["details"]["num_rows"]
    for name in shown["artifacts"].values():
        assert (tmp_path / "runs/people" / name).exists()
    text = graftstack("runs", "show", "people", "--runs-dir", f"{tmp_path}/runs")
    assert "GaussianNB" in text
    assert "cv score" in text


def test_a_stack_that_is_done_is_not_made_again(tmp_path: Path, graftstack: Callable[..., str]) -> None:
    graftstack("stack", *overrides(tmp_path, people(), "name=people"))
    before = (tmp_path / "runs/people/run.json").read_bytes()
    graftstack("stack", "name=people", "resume=true", f"runs_dir={tmp_path}/runs")
    assert (tmp_path / "runs/people/run.json").read_bytes() == before


def test_a_plan_says_what_would_be_trained_and_writes_nothing(tmp_path: Path, graftstack: Callable[..., str]) -> None:
    words = overrides(tmp_path, people(), "levels=[[LogisticRegression]]", "mode=bag")
    before = tree(tmp_path)
    plan = json.loads(graftstack("plan", "stack", "--json", *words))
    assert tree(tmp_path) == before
    assert [base["name"] for base in plan["bases"]] == ["GaussianNB", "DecisionTreeClassifier", "LogisticRegression@2"]
    assert [base["level"] for base in plan["bases"]] == [1, 1, 2]
    assert [base["num_tasks"] for base in plan["bases"]] == [3, 3, 3]
    assert (plan["num_tasks"], plan["num_folds"], plan["num_features"], plan["num_classes"]) == (9, 3, 3, 2)
    assert plan["num_rows"] + plan["num_held_out"] == NUM
    assert plan["bases"][0]["fit_s"] > 0
    assert plan["bases"][2]["fit_s"] is None
    assert plan["predicted_s"] is None
    assert plan["notes"] == [
        "base models above the first level can't be timed before there are predictions to learn from"
    ]
    assert plan["worker_memory_bytes"] > 8 * NUM * plan["num_features"]
    assert plan["device_memory_bytes"] is None
    text = graftstack("plan", "stack", *words)
    assert "9 on 1 slots" in text
    assert "memory of a worker" in text


def test_a_plan_counts_the_slots_that_threads_take(tmp_path: Path, graftstack: Callable[..., str]) -> None:
    def planned(*more: str) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads(graftstack("plan", "stack", "--json", *overrides(tmp_path, people(), *more)))
        return plan

    alone = planned("max_slots=4")
    assert alone["num_slots"] == 1, "cluster=inline has no more"
    assert alone["predicted_s"] >= sum(3 * base["fit_s"] for base in alone["bases"]) - 0.01
    wide = planned("max_slots=4", "cluster=local", "base_models=[{KNeighborsClassifier:{n_jobs:4}}]")
    assert wide["num_slots"] == 4
    assert wide["predicted_s"] >= 3.9 * wide["bases"][0]["fit_s"], "four fits, one after the other"


def test_a_plan_of_what_a_sample_is_too_small_for_goes_without_its_time(
    tmp_path: Path, graftstack: Callable[..., str]
) -> None:
    columns = people(1000, won=["yes" if row % 9 == 7 else "no" for row in range(1000)])
    bases = "base_models=[{KNeighborsClassifier:{n_neighbors:500}},LogisticRegression]"
    plan = json.loads(graftstack("plan", "stack", "--json", *overrides(tmp_path, columns, bases)))
    neighbours, logistic = plan["bases"]
    assert neighbours["fit_s"] is None
    assert plan["predicted_s"] is None
    assert logistic["fit_s"] > 0
    assert plan["notes"][0].startswith("KNeighborsClassifier can't be fitted to a few rows to see how long it takes: ")
