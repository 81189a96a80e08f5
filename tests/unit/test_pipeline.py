"""A stack of what was trained before: a sweep's best trials and other runs, and both jobs in one, the pipeline."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.neighbors import KNeighborsClassifier

from graftstack.cli import main
from graftstack.cluster import launching, pipeline
from graftstack.cluster.trained import best_trials, inherited_overrides, trained_bases, trained_runs
from graftstack.config.compose import compose_job
from graftstack.config.stack import StackConfig
from graftstack.errors import ConfigError
from graftstack.stacking import job
from graftstack.stacking.bases import common_image_size
from graftstack.stacking.fitting import StackTask

DIGITS = ("data=digits", "data.image_size=16", "data.classes=[0,1,2]", "backbone=conv4", "batch_size=32", "epochs=1")
INLINE = ("cluster=inline", "cluster.cpus_per_worker=1")
SPACE = "space.freeze_depth=[2,4]"

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished sweep, `wide`, and a finished fine-tuning, `tuned`."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*DIGITS, *INLINE, f"runs_dir={folder}/runs"]
    assert main(["sweep", *common, f"taps.location={folder}/taps", SPACE, "name=wide"]) == 0
    assert main(["finetune", *common, "freeze_depth=2", "name=tuned"]) == 0
    return folder


@pytest.fixture
def shown(place: Path, capsys: Capture) -> Callable[..., dict[str, Any]]:
    """Runs a job that succeeds, under the name `last`, and returns what its run shows."""

    def run(*words: str, runs_dir: str = f"{place}/runs") -> dict[str, Any]:
        name = f"last-{len(list(place.glob('runs/last-*')))}"
        more = ["folds.num=2", *INLINE, f"taps.location={place}/taps", f"runs_dir={runs_dir}", f"name={name}"]
        given = {word.partition("=")[0]: word for word in (*more, *words[1:])}
        assert main([words[0], *given.values()]) == 0, capsys.readouterr().err
        capsys.readouterr()
        assert main(["runs", "show", name, "--json", "--runs-dir", runs_dir]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


Shown = Callable[..., dict[str, Any]]


def names_of(shown: dict[str, Any]) -> set[str]:
    return {row["name"] for row in shown["base_models"]}


def complaint(capsys: Capture, *words: str) -> str:
    """Returns the one line that bad input ends in."""
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def changed(file: Path, **changes: Any) -> None:
    """Changes what a JSON file says."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def stack_config(place: Path, *words: str) -> StackConfig:
    config = compose_job("stack", [*INLINE, f"runs_dir={place}/runs", f"taps.location={place}/taps", *words])
    assert isinstance(config, StackConfig)
    return config


def prepared(place: Path, *words: str) -> StackTask:
    config = stack_config(place, *words)
    return job.prepare_stack(config, trained_bases(config))


# A stack of what was trained before


def test_the_best_trial_of_a_sweep_becomes_a_base_model_that_isnt_trained_again(shown: Shown, place: Path) -> None:
    found = shown("stack", "from_sweep=wide", "top=1")
    trials = json.loads((place / "runs/wide/run.json").read_text())["results"]["trials"]
    index, best = max(enumerate(trials), key=lambda trial: trial[1]["metrics"]["accuracy"])
    assert names_of(found) == {f"trial-{index}"}
    assert found["details"]["num_tasks_run"] == 2, "each fold once, and no refit"
    (row,) = found["base_models"]
    assert row["held_out_score"] == pytest.approx(best["metrics"]["accuracy"])
    assert row["held_out_loss"] == pytest.approx(best["metrics"]["loss"], abs=1e-4)
    assert found["config"]["data"]["classes"] == [0, 1, 2], "the data are those of the sweep"


@pytest.mark.parametrize("change", ["data.val_fraction=0.3", "data.classes=[0,1]", "seed=1"])
def test_a_trial_on_other_rows_is_trained_again_on_these(shown: Shown, change: str) -> None:
    assert shown("stack", "from_sweep=wide", "top=1", change)["details"]["num_tasks_run"] == 3


def test_trials_stand_beside_other_base_models(shown: Shown) -> None:
    found = shown("stack", "from_sweep=wide", "top=9", "base_models=[GaussianNB,{probe:{}}]", "meta_model=greedy")
    assert names_of(found) == {"trial-0", "trial-1", "GaussianNB", "probe"}
    assert found["details"]["num_tasks_run"] == 2 * 4 + 2


def test_a_trial_whose_batches_no_fold_fills_is_refused_at_once_or_left_out(shown: Shown, place: Path) -> None:
    few = ("from_sweep=wide", "top=1", "base_models=[GaussianNB]", "data.num_train_per_class=12")
    with pytest.raises(
        ConfigError, match=r"^base model trial-\d fold 1 of 5: batch_size=32: a step takes 32 images and"
    ):
        prepared(place, *DIGITS, *few)
    assert names_of(shown("stack", *few, "on_error=drop")) == {"GaussianNB"}


def test_a_run_becomes_a_base_model_by_its_name_or_another(shown: Shown, place: Path) -> None:
    found = shown("stack", *DIGITS, "base_models=[run:tuned,GaussianNB]")
    assert names_of(found) == {"tuned", "GaussianNB"}
    assert found["details"]["num_tasks_run"] == 2 * 2 + 1
    (tuned,) = [row for row in found["base_models"] if row["name"] == "tuned"]
    recorded = json.loads((place / "runs/tuned/run.json").read_text())
    assert tuned["held_out_score"] == pytest.approx(recorded["metrics"]["accuracy"])
    other = shown("stack", *DIGITS, f"base_models=[{{run\\:{place}/runs/tuned:{{name:mine}}}}]")
    assert names_of(other) == {"mine"}
    assert names_of(shown("stack", *DIGITS, f"base_models=[run:{place}/runs/tuned]")) == {"tuned"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["from_sweep=wild"], "from_sweep=wild: no such run in "),
        (["from_sweep=tuned"], "from_sweep=tuned: a finetune run; give a sweep, or use base_models=[run:RUN]"),
        (["base_models=[run:wide]"], "run:wide: a sweep run; a base model is a finetune run, of a sweep use"),
        (["base_models=[run:tund]"], "run:tund: no such run in "),
        (
            ["base_models=[run:tuned,run:tuned]"],
            "called tuned; give one another name, as in {run\\:tuned:{name:tuned-2}}",
        ),
        (["base_models=[{run\\:tuned:{lr:1}}]"], "base_models=run:tuned: a run is taken as it is; leave lr out"),
        (["from_sweep=wide", "base_models=[{GaussianNB:{name:trial-0}}]", "top=2"], "models are called trial-0; "),
        (["from_sweep=wide", "task=regression"], "task=regression: models of images tell classes apart"),
        (["from_sweep=wide", "folds.num=400"], "has "),
        (["from_sweep=wide", "base_models=[{probe:{params:3}}]"], "base model probe: params=3: write params:{"),
        (
            ["from_sweep=wide", "base_models=[{finetune:{image_size:8}}]"],
            "base model finetune: image_size: all base models learn from the same data; give data.image_size=...",
        ),
        (
            ["from_sweep=wide", "cluster=local", "cluster.num_workers=2"],
            "cluster.num_workers=2: a base model trains in",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_was_never_trained_is_named_in_one_line(
    place: Path, capsys: Capture, words: list[str], message: str
) -> None:
    before = sorted(path.name for path in (place / "runs").iterdir())
    line = complaint(capsys, "stack", *INLINE, *words, f"runs_dir={place}/runs", "name=never")
    assert message in line
    assert sorted(path.name for path in (place / "runs").iterdir()) == before


@pytest.mark.parametrize(
    "change",
    [
        {"status": "stopped"},
        {"details": {"best_epoch": 0}},
        {"epochs": 0, "details": {"best_epoch": 0}},
        {"details": {}},
    ],
    ids=str,
)
def test_a_trial_with_other_weights_than_of_its_last_epoch_is_no_refit(
    place: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(place / "runs/wide", tmp_path / "wide")
    before = best_trials("wide", str(tmp_path), top=1)[0]
    assert before.folder == f"{tmp_path}/wide/trials/0000{before.name[-1]}"
    changed(Path(f"{before.folder}.json"), **change)
    assert {base.name: base.folder for base in best_trials("wide", str(tmp_path), top=2)}[before.name] is None


def test_such_a_trial_is_trained_on_all_rows_and_for_all_its_epochs(place: Path, tmp_path: Path, shown: Shown) -> None:
    shutil.copytree(place / "runs/wide", tmp_path / "wide")
    for row in (tmp_path / "wide/trials").glob("*.json"):
        changed(row, status="stopped")
    assert shown("stack", f"from_sweep={tmp_path}/wide", "top=1")["details"]["num_tasks_run"] == 3


def test_a_run_with_other_weights_than_of_its_last_epoch_is_no_refit(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs/tuned", tmp_path / "runs/tuned")
    config = stack_config(tmp_path, "base_models=[run:tuned]")
    assert trained_runs(config)[0].folder == f"{tmp_path}/runs/tuned/model"
    changed(tmp_path / "runs/tuned/run.json", details={"num_epochs": 1, "best_epoch": 0})
    assert trained_runs(config)[0].folder is None


def test_a_sweep_is_what_its_manifest_says(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs/wide", tmp_path / "wide")
    changed(tmp_path / "wide/run.json", overrides=[])
    (best,) = best_trials("wide", str(tmp_path), top=1)
    assert (best.config.backbone.name, best.config.data.image_size) == ("conv4", 16)


def test_the_folds_of_a_bag_stand_for_a_trial_too(shown: Shown, place: Path) -> None:
    found = shown("stack", "from_sweep=wide", "top=1", "mode=bag")
    card = json.loads((place / "runs" / found["name"] / "model/stack.json").read_text())
    assert [list(base["kind"]) for base in card["levels"][0]] == [["bag"]]


def test_a_trial_of_a_gpu_sweep_trains_where_the_stack_does(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs/wide", tmp_path / "runs/wide")
    manifest = json.loads((tmp_path / "runs/wide/run.json").read_text())["config"]
    changed(
        tmp_path / "runs/wide/run.json", config=manifest | {"cluster": manifest["cluster"] | {"gpus_per_worker": 1.0}}
    )
    task = prepared(tmp_path, *DIGITS, "from_sweep=wide", "cluster.cpus_per_worker=2", "base_models=[{probe:{}}]")
    for base in task.levels[0]:
        assert base.estimator.finetuning.cluster.gpus_per_worker == 0
        assert base.num_threads == 2


def test_a_stack_reads_images_in_the_size_of_what_it_is_made_of(place: Path) -> None:
    for words in (["from_sweep=wide"], ["base_models=[run:tuned]"]):
        task = prepared(place, "data.classes=[0,1,2]", *words, "top=1")
        assert task.data.views["images"].image_size == 16
        assert task.levels[0][0].refitted is not None
    other = prepared(place, "data.classes=[0,1,2]", "data.image_size=20", "from_sweep=wide", "top=1")
    assert other.data.views["images"].image_size == 20
    assert other.levels[0][0].refitted is None


def test_images_of_two_sizes_are_refused_with_both_named(place: Path, tmp_path: Path, capsys: Capture) -> None:
    small, large = best_trials("wide", f"{place}/runs", top=2)
    data = {**vars(large.config.data), "image_size": 24}
    large = large._replace(config=type(large.config)(data=type(large.config.data)(**data)))
    with pytest.raises(ConfigError, match=rf"{small.name} learnt from images of 16x16 .* {large.name} of 24x24, and a"):
        common_image_size([small, large])
    words = [word for word in pipelined(tmp_path, "space.image_size=[16,24]", "top=2") if "data.image_size" not in word]
    line = complaint(capsys, *words)
    assert "image_size=16 sees images of 16x16 pixels and image_size=24 of 24x24" in line


def test_a_size_that_varied_is_none_of_the_stack(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs/wide", tmp_path / "wide")
    words = ["from_sweep=wide", f"runs_dir={tmp_path}"]
    assert "data.image_size=16" in inherited_overrides(words)
    config = json.loads((tmp_path / "wide/run.json").read_text())["config"]
    changed(tmp_path / "wide/run.json", config=config | {"space": {"image_size": [16, 24]}})
    assert not [word for word in inherited_overrides(words) if word.startswith("data.image_size")]


def test_paths_in_a_stack_are_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "some.pth").touch()
    entries = "{finetune:{weights:some.pth}},{probe:{backbone:{weights:'run:tuned'},params:{weights:some.pth}}}"
    given = [
        *(*DIGITS, *INLINE, "runs_dir=runs", "taps.location=taps", "from_sweep=wide", "backbone.weights=run:tuned"),
        f"base_models=[run:tuned,{{run\\:runs/tuned:{{name:mine}}}},{entries},{{GaussianNB:{{var_smoothing:1e-05}}}}]",
    ]
    checked = launching.check("stack", compose_job("stack", given), given)
    for config in (checked.config, compose_job("stack", checked.manifest.overrides)):
        assert isinstance(config, StackConfig)
        assert config.taps.location == f"{place}/taps"
        assert config.from_sweep == f"{place}/runs/wide"
        assert config.backbone.weights == f"run:{place}/runs/tuned"
        assert config.base_models == [
            f"run:{place}/runs/tuned",
            {f"run:{place}/runs/tuned": {"name": "mine"}},
            {"finetune": {"weights": f"{place}/some.pth"}},
            {"probe": {"backbone": {"weights": f"run:{place}/runs/tuned"}, "params": {"weights": "some.pth"}}},
            {"GaussianNB": {"var_smoothing": 1e-05}},
        ]


def test_a_plan_counts_no_refit_of_a_trial(place: Path, capsys: Capture) -> None:
    words = ["from_sweep=wide", "top=1", "base_models=[GaussianNB]", "folds.num=2", *INLINE, f"runs_dir={place}/runs"]
    assert main(["plan", "stack", "--json", *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(base["view"], base["num_tasks"]) for base in plan["bases"]] == [("pixels", 3), ("images", 2)]


# The pipeline


def pipelined(folder: Path, *more: str) -> list[str]:
    given = [
        *(*DIGITS, *INLINE, f"taps.location={folder}/taps", f"runs_dir={folder}/runs", SPACE, "name=whole"),
        *("folds.num=2", "top=1", "base_models=[GaussianNB]", *more),
    ]
    return ["pipeline", *{word.partition("=")[0]: word for word in given}.values()]


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def test_a_pipeline_is_a_sweep_and_a_stack_of_its_best_trial_in_one_folder(tmp_path: Path, capsys: Capture) -> None:
    assert main(pipelined(tmp_path, "time_limit_s=500")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/runs/whole"
    whole = tmp_path / "runs/whole"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["whole"]
    sweep, stack, both = manifest(whole / "sweep"), manifest(whole / "stack"), manifest(whole)
    assert (sweep["job"], stack["job"], both["job"]) == ("sweep", "stack", "pipeline")
    assert {part["status"] for part in (sweep, stack, both)} == {"done"}
    assert both["metrics"] == stack["metrics"]
    assert both["details"]["best_single"] == sweep["metrics"]["accuracy"]
    assert both["results"].keys() >= {"base_models", "stack", "trials", "reuse", "oof_path"}
    assert pq.read_table(whole / both["results"]["oof_path"]).num_rows == stack["details"]["num_rows"]
    for location in both["artifacts"].values():
        assert (whole / location).exists()
    assert stack["details"]["num_tasks_run"] == 2 + 3, "the trial isn't trained again on all rows"
    assert sweep["config"]["time_limit_s"] == pytest.approx(0.4 * 500)
    assert 400 < stack["config"]["time_limit_s"] < 500

    assert main(["evaluate", "whole", "--json", "--runs-dir", f"{tmp_path}/runs"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["accuracy"] == pytest.approx(both["metrics"]["accuracy"])
    out = f"{tmp_path}/out.parquet"
    words = ["predict", "whole", "digits", "--out", out, "--base", "GaussianNB", "--runs-dir", f"{tmp_path}/runs"]
    assert main(words) == 0
    assert pq.read_table(out).num_rows > 0

    assert main(["stack", "from_sweep=whole", "top=1", "folds.num=2", *INLINE, f"runs_dir={tmp_path}/runs"]) == 0


def test_a_pipeline_that_failed_in_its_stack_doesnt_sweep_again(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "base_models=[GaussianNB,{KNeighborsClassifier:{n_neighbors:5000}}]"
    assert main(pipelined(tmp_path, failing)) == 1
    whole = tmp_path / "runs/whole"
    assert "base model KNeighborsClassifier fold 1 of 2: " in capsys.readouterr().err.splitlines()[-1]
    assert "base model KNeighborsClassifier" in manifest(whole)["error"]
    assert [manifest(part)["status"] for part in (whole, whole / "sweep", whole / "stack")] == [
        *("failed", "done", "failed")
    ]
    swept = (whole / "sweep/run.json").read_bytes()
    ledger = list((whole / "stack/ledger").glob("*.json"))
    resume = ["pipeline", "name=whole", "resume=true", f"runs_dir={tmp_path}/runs"]
    monkeypatch.setattr(KNeighborsClassifier, "predict_proba", lambda _, images: np.full((len(images), 3), 1 / 3))
    assert main(resume) == 0
    assert (whole / "sweep/run.json").read_bytes() == swept
    assert manifest(whole)["status"] == "done"
    assert manifest(whole)["details"]["num_tasks_known"] >= len(ledger) > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["base_models=[GausianNB]"], "base model GausianNB: GausianNB: no such estimator; did you mean GaussianNB"),
        (["base_models=[{finetune:{lrr:1}}]"], "base model finetune: lrr: unknown key; did you mean lr"),
        (["meta_model=logistics"], "meta_model=logistics: no such meta-model"),
        (["base_models=[run:nobody]"], "run:nobody: no such run in "),
        (["folds.num=500"], "500 folds in 430 rows: stratified needs 500 rows or more; use fewer folds"),
        (["space.lrr=[1]"], "space.lrr: unknown key; did you mean lr?"),
        (["from_sweep=wide"], "from_sweep=wide: unknown key"),
        (["time_limit_s=0"], "time_limit_s=0.0: must be greater than 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", [[], ["plan"]], ids=["run", "plan"])
def test_a_pipeline_checks_its_stack_before_it_sweeps(
    tmp_path: Path, capsys: Capture, command: list[str], more: list[str], message: str
) -> None:
    assert message in complaint(capsys, *command, *pipelined(tmp_path, *more))
    assert not list(tmp_path.iterdir())


def test_a_pipeline_needs_no_base_models_but_its_trials_and_takes_runs_beside_it(place: Path, shown: Shown) -> None:
    only = shown("pipeline", *DIGITS, SPACE, "top=2")
    assert names_of(only) == {"trial-0", "trial-1"}
    mixed = shown("pipeline", *DIGITS, "space.lr=[1e-3]", "base_models=[run:tuned]")
    assert names_of(mixed) == {"trial-0", "tuned"}
    assert (place / "runs" / mixed["name"] / "stack" / "run.json").exists()


def test_a_pipeline_begins_with_the_weights_of_a_run_beside_it(shown: Shown) -> None:
    words = ["backbone.weights=run:tuned", "space.lr=[1e-3]", "base_models=[{probe:{weights:'run:tuned'}}]"]
    assert names_of(shown("pipeline", *DIGITS, *words)) == {"trial-0", "probe"}


def test_groups_of_workers_are_for_the_sweep_of_a_pipeline(tmp_path: Path) -> None:
    given = [word for word in pipelined(tmp_path, "cluster=local", "cluster.num_workers=2")[1:] if word[:5] != "name="]
    workers = [pipeline._part(job, given, str(tmp_path), None).config.cluster.num_workers for job in ("sweep", "stack")]
    assert workers == [2, 1]


class Stop(Exception):  # noqa: N818 - it is no error
    """Ends a job where it has got to."""


def wait_for_beat(folder: Path) -> None:
    """Waits until the run gives a sign of life, and ends its job."""
    last, deadline = manifest(folder)["process"]["beat"], time.monotonic() + 30
    while manifest(folder)["process"]["beat"] == last:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    raise Stop


def test_a_pipeline_gives_signs_of_life_while_its_parts_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_BEAT_EVERY_S", 0.02)
    monkeypatch.setattr(pipeline, "launch_sweep", lambda *_, **__: wait_for_beat(tmp_path / "runs/whole"))
    with pytest.raises(Stop):
        main(pipelined(tmp_path))
    assert manifest(tmp_path / "runs/whole")["status"] == "failed"


def test_a_stack_gives_signs_of_life_while_it_makes_taps(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_BEAT_EVERY_S", 0.02)
    monkeypatch.setattr(job, "_made_taps", lambda *_: wait_for_beat(tmp_path / "beaten"))
    words = [*DIGITS, *INLINE, "base_models=[GaussianNB]", "folds.num=2", "name=beaten", f"runs_dir={tmp_path}"]
    with pytest.raises(Stop):
        main(["stack", *words])
    assert manifest(tmp_path / "beaten")["status"] == "failed"


def test_what_the_sweep_leaves_of_the_time_is_the_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter((0.0, 30.0))
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    parts: dict[str, float | None] = {}

    class Swept:
        """A sweep that is over."""

    def sweep(config: Any, **_: Any) -> Swept:
        parts["sweep"] = config.time_limit_s
        return Swept()

    def stack(config: Any, **_: Any) -> None:
        parts["stack"] = config.time_limit_s
        raise Stop

    monkeypatch.setattr(pipeline, "launch_sweep", sweep)
    monkeypatch.setattr(pipeline, "launch_stack", stack)
    with pytest.raises(Stop):
        main(pipelined(tmp_path, "time_limit_s=100"))
    assert parts["sweep"] == pytest.approx(40)
    assert parts["stack"] == pytest.approx(70)
