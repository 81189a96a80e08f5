"""On shuffled labels an honest stack is at chance, and one that peeks is found."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftstack.cli import main
from graftstack.config.compose import compose_job
from graftstack.config.stack import StackConfig
from graftstack.runtime import InlineExecutor
from graftstack.stacking import job
from graftstack.stacking.fitting import StackTask
from graftstack.stacking.folds import Folds
from graftstack.stacking.job import prepare_stack
from graftstack.stacking.leakage import LeakageReport, leakage

NUM = 200

Capture = pytest.CaptureFixture[str]


def overrides(folder: Path, *more: str) -> list[str]:
    rng = np.random.default_rng(0)
    age, pay = rng.normal(size=NUM), rng.normal(size=NUM)
    score = age + pay + 0.3 * rng.normal(size=NUM)
    columns: dict[str, Any] = {"age": age, "pay": pay, "score": score, "won": np.where(score > 0, "yes", "no")}
    columns["house"] = [f"h{row // 4}" for row in range(NUM)]
    pq.write_table(pa.table(columns), folder / "people.parquet")
    given = [
        *("data=parquet", f"data.path={folder}/people.parquet", "data.label=won", "data.drop=[score,house]"),
        *("folds.num=3", "cluster=inline", "base_models=[GaussianNB,DecisionTreeClassifier]", *more),
        f"runs_dir={folder}/runs",
    ]
    return list({override.partition("=")[0]: override for override in given}.values())


def prepared(folder: Path, *more: str) -> StackTask:
    config = compose_job("stack", overrides(folder, *more))
    assert isinstance(config, StackConfig)
    return prepare_stack(config)


def checked(task: StackTask) -> LeakageReport:
    return leakage(task, InlineExecutor())


def peeking(task: StackTask) -> StackTask:
    """Returns the stack with base models that train on what they are to predict."""
    everything = np.arange(task.folds.num_rows)
    folds = tuple(fold._replace(train=everything) for fold in task.folds.folds)
    return replace(task, folds=Folds(folds, task.folds.num_rows))


REGRESSION = ("data.label=score", "data.drop=[won,house]", "base_models=[Ridge,DecisionTreeRegressor]")


@pytest.mark.parametrize(
    "more",
    [
        (),
        REGRESSION,
        ("mode=bag", "levels=2", "passthrough=true"),
        ("folds.kind=time",),
        ("data.group=house", "data.drop=[score]"),
        ("folds.repeats=2", "meta_model=greedy", "calibration=isotonic"),
        ("base_models=[RidgeClassifier,KNeighborsClassifier]",),
    ],
    ids=lambda more: " ".join(more) or "as it is",
)
def test_an_honest_stack_is_at_chance(tmp_path: Path, more: tuple[str, ...]) -> None:
    report = checked(prepared(tmp_path, *more))
    assert report.leaking == []
    assert report.rows[-1].name == "stack"
    assert 0 <= report.chance < 0.7
    assert all(row.bound > report.chance for row in report.rows)


@pytest.mark.parametrize(
    ("more", "peeker"),
    [((), "DecisionTreeClassifier"), (REGRESSION, "DecisionTreeRegressor")],
    ids=["classes", "number"],
)
def test_a_base_model_that_peeks_is_found_and_so_is_its_stack(
    tmp_path: Path, more: tuple[str, ...], peeker: str
) -> None:
    report = checked(peeking(prepared(tmp_path, *more)))
    assert report.leaking == [peeker, "stack"]
    rows = {row.name: row for row in report.rows}
    assert rows[peeker].score == pytest.approx(1)


def test_a_column_that_holds_the_label_is_no_leak_of_the_machinery(tmp_path: Path) -> None:
    task = prepared(tmp_path, "data.drop=[house]")
    assert task.data.schema is not None
    assert "score" in task.data.schema.names
    assert checked(task).leaking == []


def test_a_check_doesnt_depend_on_what_was_trained_and_repeats_itself(tmp_path: Path) -> None:
    task = prepared(tmp_path)
    first = checked(task)
    fitted = [[replace(base, refitted="what knows the true labels") for base in bases] for bases in task.levels]
    assert checked(replace(task, levels=fitted)) == first


def test_a_clean_check_ends_with_0_and_leaves_nothing_behind(tmp_path: Path, capsys: Capture) -> None:
    words = overrides(tmp_path)
    assert main(["stack", "--check-leakage", *words]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "no leak: all is at chance"
    assert "GaussianNB" in out
    assert [path.name for path in tmp_path.iterdir()] == ["people.parquet"]


def test_a_leak_ends_with_1_and_is_named(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = job.prepare_stack
    monkeypatch.setattr(job, "prepare_stack", lambda *args, **options: peeking(honest(*args, **options)))
    assert main(["stack", "--check-leakage", *overrides(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "leaks: DecisionTreeClassifier, stack"
    assert [path.name for path in tmp_path.iterdir()] == ["people.parquet"]


@pytest.mark.parametrize("name", ["finetune", "sweep", "pipeline"])
def test_only_a_stack_is_checked(capsys: Capture, name: str) -> None:
    assert main([name, "--check-leakage"]) == 2
    assert "--check-leakage: looks into a stack; use graftstack stack --check-leakage" in capsys.readouterr().err


def test_a_finished_run_may_be_checked_by_what_it_was_started_with(tmp_path: Path, capsys: Capture) -> None:
    assert main(["stack", *overrides(tmp_path, "name=people")]) == 0
    before = (tmp_path / "runs/people/run.json").read_bytes()
    capsys.readouterr()
    assert main(["stack", "--check-leakage", "name=people", "resume=true", f"runs_dir={tmp_path}/runs"]) == 0
    assert (tmp_path / "runs/people/run.json").read_bytes() == before
    assert json.loads(before)["status"] == "done"
