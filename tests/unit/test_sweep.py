"""Whole sweeps in this process: what they share, what they leave, and what happens when something goes wrong."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from graftstack.backbones.registry import build
from graftstack.cluster.sweep import launch_sweep
from graftstack.config.compose import compose_job
from graftstack.errors import ConfigError, TrainingError
from graftstack.finetune.predict import data_of_run, evaluate, predict
from graftstack.runs import Run
from graftstack.storage import Folder
from graftstack.sweep.drive import Progress
from graftstack.sweep.plan import SweepPlan
from graftstack.sweep.probe import ProbeScore

# The most epochs that stay quick, so that a tap pays whatever else the machine does.
SMALL = (
    "data=digits",
    "data.image_size=16",
    "data.num_train_per_class=13",
    "data.val_fraction=0.06",
    "backbone=conv4",
    "epochs=3",
    "batch_size=32",
    "cluster=inline",
    "cluster.cpus_per_worker=1",
)
NUM_ITEMS = 130 + 109
# Small steps: long ones of AdamW make much of the last digit of a gradient.
STEPS = "optimizer.head_lr_multiplier=2"
SPACE = ("space.freeze_depth=[2,all]", "space.lr=[1e-3,3e-3,1e-2]", STEPS)
# What tells trials from each other and isn't of the machine.
FACTS = ("trial", "freeze_depth", "lr", "status", "epochs")


class Silent:
    """A display that shows nothing and remembers what it was told."""

    def __init__(self) -> None:
        self.plans: list[SweepPlan] = []
        self.scores: list[ProbeScore] = []
        self.said: list[str] = []
        self.over: list[int] = []

    def reading(self, done: int, total: int) -> None:
        pass

    def training(self, progress: dict[str, Any]) -> None:
        pass

    def planned(self, plan: SweepPlan) -> None:
        self.plans.append(plan)

    def probed(self, scores: Sequence[ProbeScore]) -> None:
        self.scores += scores

    def tapping(self, done: int, total: int) -> None:
        assert 0 < done <= total

    def trials(self, progress: Progress, total: int) -> None:
        self.over = sorted(progress.results)

    def say(self, text: str) -> None:
        self.said.append(text)

    @property
    def actions(self) -> dict[int, str]:
        return {depth.freeze_depth: depth.action for depth in self.plans[-1].depths}


class Interrupting(Silent):
    """Somebody presses Ctrl-C once so many trials are over."""

    def __init__(self, num_trials: int) -> None:
        super().__init__()
        self._num_trials = num_trials

    def trials(self, progress: Progress, total: int) -> None:
        super().trials(progress, total)
        if len(progress.results) >= self._num_trials:
            raise KeyboardInterrupt


class Sweeps:
    """Sweeps below one folder, with taps of their own unless they are given some."""

    def __init__(self, folder: Path, *, taps: Path | None = None) -> None:
        self.folder = folder
        self.taps = taps or folder / "taps"

    def overrides(self, name: str, *overrides: str) -> list[str]:
        return [*SMALL, f"runs_dir={self.folder}/runs", f"taps.location={self.taps}", f"name={name}", *overrides]

    def run(self, name: str, *overrides: str, display: Silent | None = None) -> Run:
        everything = self.overrides(name, *overrides)
        return launch_sweep(compose_job("sweep", everything), overrides=everything, display=display or Silent())

    def manifest(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "runs" / name / "run.json").read_text())
        return found

    def files(self, name: str, pattern: str) -> dict[str, int]:
        """The files of a run's trials, and when they were written."""
        found = (self.folder / "runs" / name / "trials").glob(pattern)
        return {str(path): path.stat().st_mtime_ns for path in sorted(found)}

    @property
    def shards(self) -> list[Path]:
        return sorted(self.taps.glob("*/shard-*.arrow"))


@pytest.fixture
def sweeps(tmp_path: Path) -> Sweeps:
    return Sweeps(tmp_path)


def trials_of(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run.manifest.results["trials"]
    return found


def reuse_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = run.manifest.results["reuse"]
    return found


def statuses(run: Run) -> list[str]:
    return [trial["status"] for trial in trials_of(run)]


def assert_same_trials(one: Run, other: Run, *, tolerance: float = 1e-4) -> None:
    assert len(trials_of(one)) == len(trials_of(other))
    for found, expected in zip(trials_of(one), trials_of(other), strict=True):
        assert [found[name] for name in FACTS] == [expected[name] for name in FACTS]
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=tolerance)


# What a sweep shares, and what it leaves


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Sweeps:
    return Sweeps(tmp_path_factory.mktemp("sweeps"))


@pytest.fixture
def warm(place: Sweeps, tmp_path: Path) -> Sweeps:
    """Sweeps that may find their taps made."""
    return Sweeps(tmp_path, taps=place.taps)


@pytest.fixture(scope="module")
def display() -> Silent:
    """What `run` told."""
    return Silent()


@pytest.fixture(scope="module")
def run(place: Sweeps, display: Silent) -> Run:
    """A sweep with all that it can share."""
    return place.run("auto", *SPACE, display=display)


def test_every_sample_goes_through_the_frozen_groups_once(run: Run, display: Silent) -> None:
    assert display.actions == {2: "tap", 5: "tap"}
    assert reuse_of(run)["backbone_forwards"] == reuse_of(run)["unique_samples"] == NUM_ITEMS


def test_results_are_those_of_trials_that_share_nothing(run: Run, place: Sweeps) -> None:
    off = place.run("off", *SPACE, "reuse=off")
    assert_same_trials(run, off)
    assert off.manifest.details["best_trial"] == run.manifest.details["best_trial"]
    num_epochs, num_trials, steps = 3, 6, 130 // 32
    assert reuse_of(off)["backbone_forwards"] == num_trials * num_epochs * (steps * 32 + 109)


def test_a_second_sweep_on_the_same_data_makes_no_forward(run: Run, place: Sweeps) -> None:
    display = Silent()
    again = place.run("again", *SPACE, display=display)
    assert display.actions == {2: "stored", 5: "stored"}
    assert reuse_of(again)["backbone_forwards"] == 0
    assert_same_trials(again, run, tolerance=0)


def test_the_manifest_tells_of_each_trial_and_of_what_was_shared(run: Run, place: Sweeps) -> None:
    shown = place.manifest("auto")
    assert (shown["job"], shown["status"], shown["error"]) == ("sweep", "done", None)
    trials = shown["results"]["trials"]
    assert [(trial["freeze_depth"], trial["lr"]) for trial in trials] == [
        (depth, lr) for depth in (2, "all") for lr in (1e-3, 3e-3, 1e-2)
    ]
    assert {(trial["status"], trial["epochs"]) for trial in trials} == {("done", 3)}
    assert all(trial["seconds"] > 0 for trial in trials)
    assert all(trial["metrics"].keys() == {"loss", "accuracy", "macro_f1", "ece"} for trial in trials)
    reuse = shown["results"]["reuse"]
    assert reuse.keys() == {"backbone_forwards", "unique_samples", "predicted_s", "actual_s"}
    assert reuse["predicted_s"] > 0
    assert reuse["actual_s"] > 0
    best = trials[shown["details"]["best_trial"]]
    assert best["metrics"] == shown["metrics"]
    assert best["metrics"]["accuracy"] == max(trial["metrics"]["accuracy"] for trial in trials)
    assert (shown["details"]["best_lr"], shown["details"]["num_done"]) == (best["lr"], 6)


def test_the_best_model_is_that_of_the_run(run: Run, place: Sweeps) -> None:
    accuracy = run.manifest.metrics["accuracy"]
    assert evaluate(run, data_of_run(run), part="val")["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert predict(run, data_of_run(run)).num_rows == 1797
    kept = pq.read_table(place.folder / "runs/auto/val_predictions.parquet")
    assert np.equal(kept["label"].to_pylist(), kept["prediction"].to_pylist()).mean() == pytest.approx(accuracy)


def test_the_folder_holds_what_the_manifest_names_and_no_state_of_training(run: Run, place: Sweeps) -> None:
    folder = place.folder / "runs/auto"
    documents = {"run.json", "config.yaml", "plan.json", "metrics.parquet", "val_predictions.parquet"}
    assert {path.name for path in folder.iterdir()} == {*documents, "trials", "model"}
    assert all((folder / artifact).exists() for artifact in run.manifest.artifacts.values())
    numbers = [f"{index:05d}" for index in range(6)]
    names = {path.name for path in (folder / "trials").iterdir()}
    assert names == {*numbers, *(f"{number}.json" for number in numbers)}
    assert {path.name for path in (folder / "trials").glob("*/*")} == {"trained.safetensors"}
    assert not list(folder.rglob(".*"))
    metrics = pq.read_table(folder / "metrics.parquet")
    assert metrics.num_rows == 6 * 3
    assert set(metrics["trial"].to_pylist()) == set(range(6))


def test_trials_keep_what_trained_and_not_what_is_frozen(run: Run, place: Sweeps) -> None:
    folder = place.folder / "runs/auto/trials"
    alone, fused = (load_file(folder / name / "trained.safetensors") for name in ("00000", "00003"))
    assert set(fused) == {"head.weight", "head.bias"}
    assert set(fused) < set(alone)
    assert not [name for name in alone if name.startswith(("backbone.block1", "backbone.block2"))]


def test_a_done_sweep_is_not_repeated(run: Run, place: Sweeps) -> None:
    before = place.files("auto", "*.json")
    again = place.run("auto", *SPACE, "resume=true")
    assert again.manifest.metrics == run.manifest.metrics
    assert place.files("auto", "*.json") == before


def test_a_damaged_shard_is_made_again_and_changes_nothing(run: Run, place: Sweeps) -> None:
    # Two more sweeps of the first one's taps, between which a byte turns over.
    largest = max(place.shards, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)
    mended = place.run("mended", *SPACE)
    assert reuse_of(mended)["backbone_forwards"] == NUM_ITEMS
    assert_same_trials(mended, run, tolerance=0)


def test_a_sweep_over_backbones_keeps_the_best_of_all(sweeps: Sweeps) -> None:
    run = sweeps.run("both", "space.backbone=[conv4,cifar_resnet20]", "space.lr=[1e-3,1e-2]", "freeze_depth=all")
    assert [trial["backbone"] for trial in trials_of(run)] == ["conv4", "conv4", "cifar_resnet20", "cifar_resnet20"]
    best = trials_of(run)[run.manifest.details["best_trial"]]
    card = json.loads((sweeps.folder / "runs/both/model/model.json").read_text())
    assert card["backbone"] == best["backbone"]
    accuracy = evaluate(run, data_of_run(run), part="val")["accuracy"]
    assert accuracy == pytest.approx(run.manifest.metrics["accuracy"], abs=1e-6)


def test_cached_views_are_what_each_trial_would_have_made(sweeps: Sweeps) -> None:
    space = ("space.lr=[1e-3,3e-3]", "freeze_depth=2", "augment=standard", "augment_views=2", "epochs=5")
    small = "optimizer.head_lr_multiplier=1"
    shared, off = (sweeps.run(reuse, *space, small, f"reuse={reuse}") for reuse in ("auto", "off"))
    assert reuse_of(shared)["backbone_forwards"] == NUM_ITEMS + 2 * 130
    assert_same_trials(shared, off, tolerance=1e-3)


def test_random_trials_are_the_same_for_the_same_seed(warm: Sweeps) -> None:
    space = ("space.lr=loguniform(1e-4,1e-1)", "space.weight_decay=uniform(0,0.3)", "space.freeze_depth=[4,all]")
    options = ("search=random", "num_samples=6", "epochs=2")
    run = warm.run("random", *space, *options)
    assert len(trials_of(run)) == 6
    assert all(1e-4 <= trial["lr"] <= 1e-1 and 0 <= trial["weight_decay"] <= 0.3 for trial in trials_of(run))
    assert len({trial["lr"] for trial in trials_of(run)}) == 6
    again = warm.run("again", *space, *options)
    assert_same_trials(again, run, tolerance=0)
    other = warm.run("other", *space, *options, "seed=1")
    assert trials_of(other)[0]["lr"] != trials_of(run)[0]["lr"]


def test_asha_leaves_heads_that_train_fused_alone(warm: Sweeps) -> None:
    run = warm.run("asha", "space.lr=[1e-8,1e-5,1e-2]", "freeze_depth=all", "epochs=9", "scheduler=asha")
    assert [trial["epochs"] for trial in trials_of(run)] == [9, 9, 9]
    assert statuses(run) == ["done"] * 3


def test_asha_ends_the_worse_trials_early(warm: Sweeps) -> None:
    run = warm.run("asha", "space.lr=[3e-3,1e-9,1e-8,1e-7]", "freeze_depth=2", "epochs=3", "scheduler=asha")
    assert [trial["epochs"] for trial in trials_of(run)] == [3, 1, 1, 1]
    assert statuses(run) == ["done", "stopped", "stopped", "stopped"]
    assert run.manifest.details["num_stopped"] == 3
    assert all((warm.folder / f"runs/asha/trials/{index:05d}/trained.safetensors").exists() for index in range(4))


def test_a_probe_leaves_out_depths_whose_features_know_too_little(sweeps: Sweeps, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = build("conv4").model.state_dict()
    state["block4.conv.weight"].zero_()  # what is frozen behind it knows nothing
    save_file(state, tmp_path / "dull.safetensors")
    display = Silent()
    space = ("space.freeze_depth=[1,3,all]", "space.lr=[1e-3,1e-2]", f"backbone.weights={tmp_path}/dull.safetensors")
    run = sweeps.run("probed", *space, "prune=probe", "epochs=5", display=display)
    assert display.actions == {1: "tap", 3: "tap", 5: "tap"}
    assert [(score.backbone, score.depth) for score in display.scores] == [("conv4", 1), ("conv4", 3), ("conv4", 5)]
    assert statuses(run)[-2:] == ["pruned", "pruned"]
    assert statuses(run)[:2] == ["done", "done"]
    last = trials_of(run)[-1]
    assert (last["epochs"], last["metrics"], last["seconds"]) == (0, {}, 0)
    assert re.match(
        r"features at freeze_depth=5 score 0\.\d+, those at freeze_depth=\d 0\.\d+: more than", last["error"]
    )
    assert f"pruned: {last['error']}" in display.said
    assert run.manifest.details["num_pruned"] == statuses(run).count("pruned")
    assert not (sweeps.folder / "runs/probed/trials/00005").exists()


def test_a_probe_that_finds_all_alike_leaves_nothing_out(warm: Sweeps) -> None:
    display = Silent()
    run = warm.run("probed", *SPACE, "prune=probe", "prune_margin=0.9", display=display)
    assert set(statuses(run)) == {"done"}
    assert display.said == []
    assert len(display.scores) == 2


def test_a_probed_sweep_goes_on_where_it_was_interrupted(place: Sweeps, warm: Sweeps) -> None:
    with pytest.raises(KeyboardInterrupt):
        warm.run("cut", *SPACE, "prune=probe", "prune_margin=0.9", display=Interrupting(3))
    display = Silent()
    resumed = warm.run("cut", *SPACE, "prune=probe", "prune_margin=0.9", "resume=true", display=display)
    assert display.actions.keys() == {5}, "the other depth is over"
    assert statuses(resumed) == ["done"] * 6


# What goes wrong


@pytest.mark.parametrize("depth", ["2", "all"])
def test_a_trial_that_diverges_is_a_failed_row_and_the_others_go_on(depth: str, warm: Sweeps) -> None:
    options = ("schedule=constant", "schedule.warmup_fraction=0", f"freeze_depth={depth}")
    run = warm.run("nan", "space.lr=[1e-3,1e30,3e-3]", *options)
    assert statuses(run) == ["done", "failed", "done"]
    failed = trials_of(run)[1]
    assert re.match(
        r"the loss is (nan|inf) at step \d+ \(learning rate 1e\+30\); start a new run with", failed["error"]
    )
    assert failed["metrics"] == {}
    assert run.manifest.status == "done"
    assert run.manifest.details["num_failed"] == 1
    without = warm.run("without", "space.lr=[1e-3,3e-3]", *options)
    for found, expected in zip((trials_of(run)[0], trials_of(run)[2]), trials_of(without), strict=True):
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-4)


def test_a_sweep_without_a_single_model_fails_with_the_reason(warm: Sweeps) -> None:
    with pytest.raises(TrainingError, match=r"no trial ended with a model; the first of 2 failed ones: the loss is"):
        warm.run("hopeless", "space.lr=[1e30,1e31]", "schedule=constant", "schedule.warmup_fraction=0", "epochs=1")
    manifest = warm.manifest("hopeless")
    assert manifest["status"] == "failed"
    assert manifest["error"].startswith("no trial ended with a model")


def test_an_interrupted_sweep_goes_on_with_what_is_left(run: Run, place: Sweeps) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"continue with: graftstack sweep name=cut resume=true runs_dir="):
        place.run("cut", *SPACE, display=Interrupting(2))
    assert place.manifest("cut")["status"] == "interrupted"
    rows, weights = (place.files("cut", pattern) for pattern in ("*.json", "*/trained.safetensors"))
    assert len(rows) == len(weights) == 2
    display = Silent()
    resumed = place.run("cut", *SPACE, "resume=true", display=display)
    assert display.plans[0].num_trials == 4
    assert len(place.files("cut", "*.json")) == 6
    assert rows.items() <= place.files("cut", "*.json").items()
    assert weights.items() <= place.files("cut", "*/trained.safetensors").items()
    assert resumed.manifest.status == "done"
    assert_same_trials(resumed, run)


def test_fused_trials_go_on_from_the_epoch_that_was_saved(warm: Sweeps) -> None:
    class Early(Silent):
        """Interrupts after the third epoch of the only unit."""

        num_epochs = 0

        def trials(self, progress: Progress, total: int) -> None:
            self.num_epochs += 1
            if self.num_epochs == 3:
                raise KeyboardInterrupt

    space = ("space.lr=[1e-3,3e-3,1e-2]", "freeze_depth=all", "epochs=5", "checkpoint.min_interval_s=0")
    with pytest.raises(KeyboardInterrupt):
        warm.run("cut", *space, display=Early())
    kept = list((warm.folder / "runs/cut/trials").glob("fused-*/step-*.json"))
    assert [json.loads(path.read_text())["step"] for path in kept] == [2 * (130 // 32)]
    resumed = warm.run("cut", *space, "resume=true")
    assert_same_trials(resumed, warm.run("unbroken", *space), tolerance=0)
    assert not list((warm.folder / "runs/cut/trials").glob("fused-*"))


def test_a_pass_that_was_interrupted_goes_on_from_its_last_whole_shard(sweeps: Sweeps) -> None:
    class Impatient(Silent):
        def tapping(self, done: int, total: int) -> None:
            assert total == 2
            raise KeyboardInterrupt

    space = (*SPACE, "augment=standard", "augment_views=2")
    with pytest.raises(KeyboardInterrupt):
        sweeps.run("cut", *space, display=Impatient())
    assert [path.name for path in sweeps.shards] == ["shard-000.arrow"] * 2
    resumed = sweeps.run("cut", *space, "resume=true")
    assert reuse_of(resumed)["backbone_forwards"] == NUM_ITEMS + 2 * 130 - 256
    assert statuses(resumed) == ["done"] * 6


def test_a_sweep_that_was_interrupted_after_its_last_trial_needs_its_model_only(run: Run, warm: Sweeps) -> None:
    with pytest.raises(KeyboardInterrupt):
        warm.run("cut", *SPACE, display=Interrupting(6))
    rows = warm.files("cut", "*.json")
    resumed = warm.run("cut", *SPACE, "resume=true")
    assert warm.files("cut", "*.json") == rows
    assert_same_trials(resumed, run, tolerance=0)
    accuracy = evaluate(resumed, data_of_run(resumed), part="val")["accuracy"]
    assert accuracy == pytest.approx(run.manifest.metrics["accuracy"], abs=1e-6)


def test_a_damaged_row_runs_again(warm: Sweeps) -> None:
    with pytest.raises(KeyboardInterrupt):
        warm.run("cut", *SPACE, display=Interrupting(3))
    (warm.folder / "runs/cut/trials/00001.json").write_text('{"index": 1, "sta')
    display = Silent()
    resumed = warm.run("cut", *SPACE, "resume=true", display=display)
    assert display.plans[0].num_trials == 4
    assert statuses(resumed) == ["done"] * 6


def test_a_sweep_of_another_space_is_not_continued(warm: Sweeps) -> None:
    warm.run("one", "space.lr=[1e-3]", "epochs=1")
    with pytest.raises(Exception, match=r"space.*: run one was started with") as caught:
        warm.run("one", "space.lr=[1e-3,1e-2]", "epochs=1", "resume=true")
    assert "\n" not in str(caught.value)


def test_at_the_time_limit_nothing_starts_and_what_runs_ends_with_its_epoch(warm: Sweeps) -> None:
    class Slow(Silent):
        """Shows each epoch for a while."""

        def trials(self, progress: Progress, total: int) -> None:
            super().trials(progress, total)
            time.sleep(0.5)

    limit = ("epochs=500", "space.lr=[1e-3,1e-4]", "freeze_depth=4")
    run = warm.run("limited", *limit, "time_limit_s=3", display=Slow())
    assert statuses(run) == ["stopped"]
    assert 1 <= trials_of(run)[0]["epochs"] < 20
    assert run.manifest.status == "done"
    with pytest.raises(TrainingError, match=r"no trial was begun within time_limit_s; raise it"):
        warm.run("none", *limit, "time_limit_s=0.001")
    assert warm.manifest("none")["status"] == "failed"


def test_a_disk_that_is_full_of_taps_costs_sharing_and_nothing_else(sweeps: Sweeps) -> None:
    class Filling(Silent):
        """From the end of the plan on no file grows beyond half the tap at depth 1; any other has room."""

        def planned(self, plan: SweepPlan) -> None:
            super().planned(plan)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))

    space = ("space.freeze_depth=[1,4]", "space.lr=[1e-3,3e-3]", STEPS)
    display = Filling()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        full = sweeps.run("full", *space, display=display)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert display.actions == {1: "tap", 4: "tap"}
    (said,) = display.said
    assert said.startswith("no taps at 1, 4: ")
    assert "no space left" in said
    assert said.endswith("the trials that would read them compute the frozen part anew")
    assert statuses(full) == ["done"] * 4
    assert reuse_of(full)["backbone_forwards"] > NUM_ITEMS
    assert sweeps.shards == []
    assert not list(sweeps.taps.glob("*/.*"))
    with_room = sweeps.run("room", *space)
    assert reuse_of(with_room)["backbone_forwards"] == NUM_ITEMS
    assert_same_trials(full, with_room)


def test_a_budget_that_holds_some_taps_is_kept(sweeps: Sweeps) -> None:
    run = sweeps.run("bounded", "space.freeze_depth=[1,2,all]", "space.lr=[1e-3,1e-2]", "taps.budget_bytes=200000")
    assert statuses(run) == ["done"] * 6
    assert len(sweeps.shards) == 1
    assert sum(path.stat().st_size for path in sweeps.taps.rglob("*")) <= 200_000 + 4096 * 4


def test_bad_input_leaves_no_run_behind(sweeps: Sweeps) -> None:
    for override, message in {
        "space.freeze_depth=[0,9]": 'freeze_depth=9: conv4 has 5 layer groups; use 0..5 or "all"',
        "space.batch_size=[32,5000]": "batch_size=5000: a step takes 5000 images and the training part has 130",
    }.items():
        with pytest.raises(ConfigError) as caught:
            sweeps.run("bad", override)
        assert str(caught.value).startswith(message)
    assert not (sweeps.folder / "runs").exists()


def test_two_sweeps_at_once_make_their_taps_once(sweeps: Sweeps) -> None:
    space = ("space.freeze_depth=[2,all]", "space.lr=[1e-3,3e-3]", STEPS, "epochs=8")
    environment = {**os.environ, "GRAFTSTACK_CACHE": str(sweeps.folder / "cache")}
    sides = [
        subprocess.Popen(
            [sys.executable, "-m", "graftstack", "sweep", *sweeps.overrides(name, *space)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for name in ("left", "right")
    ]  # fmt: skip
    for side in sides:
        _, complaint = side.communicate(timeout=120)
        assert side.returncode == 0, complaint
    left, right = (Run.open(Folder(sweeps.folder / "runs" / name)) for name in ("left", "right"))
    assert reuse_of(left)["backbone_forwards"] + reuse_of(right)["backbone_forwards"] == NUM_ITEMS
    assert_same_trials(left, right, tolerance=0)


def test_rows_are_on_disk_as_they_are_told(sweeps: Sweeps) -> None:
    seen: list[int] = []

    class Watching(Silent):
        def trials(self, progress: Progress, total: int) -> None:
            folder = sweeps.folder / "runs/told/trials"
            on_disk = {int(path.stem) for path in folder.glob("*.json")}
            assert set(progress.results) <= on_disk
            assert total == 6
            seen.append(len(progress.results))

    sweeps.run("told", *SPACE, display=Watching())
    assert seen == sorted(seen)
    assert seen[-1] == 6
