"""A whole meta-training, as a person starts it: what it says, what it measures and what it leaves."""

import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier

from graftstack.backbones.registry import build
from graftstack.backbones.weights import load_weights
from graftstack.cli import main
from graftstack.config.compose import compose_job
from graftstack.config.meta import MetaConfig, MethodName
from graftstack.meta import plan, training
from graftstack.meta.artifact import load_meta
from graftstack.meta.episodes import EpisodeSampler, EpisodeShape
from graftstack.meta.model import MetaModel
from graftstack.meta.runner import BlockGradient
from graftstack.meta.scoring import Score
from graftstack.meta.task import prepare_meta
from graftstack.meta.training import MetaProgress, Pace
from graftstack.report.meta_progress import meta_display
from graftstack.storage import Folder

SMALL = (
    *("data=digits", "data.image_size=16", "backbone=conv4", "cluster=inline", "cluster.cpus_per_worker=1"),
    *("num_ways=2", "num_queries=5", "eval.num_episodes=20", "eval.num_val_episodes=5"),
)

Capture = pytest.CaptureFixture[str]


def words(folder: Path, name: str, *overrides: str) -> list[str]:
    """Returns what starts a small meta-training; what is given twice counts as it is given last."""
    given = [*SMALL, f"runs_dir={folder}/runs", f"taps.location={folder}/taps", f"name={name}", *overrides]
    return ["meta", *{word.partition("=")[0]: word for word in given}.values()]


def shown(folder: Path, name: str, capsys: Capture) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["runs", "show", name, "--json", "--runs-dir", f"{folder}/runs"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


class Finished(NamedTuple):
    folder: Path
    overrides: list[str]
    lines: list[str]
    """What it said."""

    @property
    def run(self) -> Path:
        return self.folder / "runs/whole"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with classes that validate and a table, which says where it stands after each step."""
    folder = tmp_path_factory.mktemp("meta")
    given = words(
        folder, "whole", "num_episodes=24", "episodes_per_step=2", "eval.val_fraction=0.2", "eval.test_fraction=0.4",
        "eval.every_episodes=8", "eval.num_ways=[2,3]", "eval.num_shots=[1,4]", "select=last",
    )  # fmt: skip
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(training, "_TELL_EVERY_S", 0.0)
        patch.setenv("COLUMNS", "200")
        assert main(given) == 0
    return Finished(folder, given[1:], said.getvalue().splitlines())


# What a run leaves and says


def test_the_run_shows_its_accuracy_its_interval_and_how_batchnorm_normalised(
    finished: Finished, capsys: Capture
) -> None:
    found = shown(finished.folder, "whole", capsys)
    assert (found["job"], found["status"], found["batchnorm"]) == ("meta", "done", "inductive")
    assert 0.5 < found["accuracy"] <= 1
    assert 0 < found["ci95"] < 0.1
    assert found["metrics"] == {
        "accuracy": found["accuracy"],
        "ci95": found["ci95"],
        "nearest_neighbour_accuracy": found["table"][0]["nearest_neighbour"],
    }
    assert {name: found["details"][name] for name in ("num_train_classes", "num_val_classes", "num_test_classes")} == {
        "num_train_classes": 4,
        "num_val_classes": 2,
        "num_test_classes": 4,
    }
    assert found["details"]["num_episodes"] == 24
    for location in found["artifacts"].values():
        assert (finished.run / location).exists()


def test_the_table_goes_over_ways_and_shots(finished: Finished, capsys: Capture) -> None:
    found = shown(finished.folder, "whole", capsys)
    assert [(row["num_ways"], row["num_shots"]) for row in found["table"]] == [(2, 1), (2, 4), (3, 1), (3, 4)]
    assert {(row["batchnorm"], row["num_episodes"], row["num_queries"]) for row in found["table"]} == {
        ("inductive", 20, 5)
    }
    assert (found["accuracy"], found["ci95"]) == (found["table"][0]["accuracy"], found["table"][0]["ci95"])
    *_, header, first, _, _, last, _ = finished.lines
    assert header.split()[:4] == ["ways", "shots", "accuracy,", "%"]
    assert first.split()[:3] == ["2", "1", f"{100 * found['accuracy']:.2f}"]
    assert last.split()[-3:] == ["inductive", "20", "-"]
    capsys.readouterr()
    assert main(["runs", "show", "whole", "--runs-dir", f"{finished.folder}/runs"]) == 0
    assert f"{100 * found['accuracy']:.2f} ± {100 * found['ci95']:.2f}" in capsys.readouterr().out


def test_accuracy_and_its_interval_are_those_of_the_episodes(finished: Finished, capsys: Capture) -> None:
    config = compose_job("meta", finished.overrides)
    assert isinstance(config, MetaConfig)
    task = prepare_meta(config)
    backbone = build("conv4", image_size=16)
    load_weights(backbone, f"{finished.run}/model/model.safetensors")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in task.preprocessing[1:])
    with torch.no_grad():
        pixels = task.data.images.batch(np.arange(len(task.data))).float() / 255
        features = backbone.eval()((pixels - mean) / std).numpy()
    for row in shown(finished.folder, "whole", capsys)["table"]:
        ways, shots = row["num_ways"], row["num_shots"]
        sampler = EpisodeSampler(task.classes.test, EpisodeShape(ways, shots, 5), seed=0, part="test")
        accuracies, nearest = [], []
        for index in range(20):
            rows = sampler.episode(index).rows
            support, queries = features[rows[:, :shots].ravel()], features[rows[:, shots:].ravel()]
            known, wanted = np.repeat(range(ways), shots), np.repeat(range(ways), 5)
            means = np.stack([support[known == label].mean(axis=0) for label in range(ways)])
            distances = np.linalg.norm(queries[:, None] - means, axis=2)
            accuracies.append(np.mean(distances.argmin(axis=1) == wanted))
            nearest.append(KNeighborsClassifier(1).fit(support, known).score(queries, wanted))
        assert row["accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-6)
        assert row["ci95"] == pytest.approx(1.96 * np.std(accuracies, ddof=1) / np.sqrt(20), abs=1e-6)
        assert row["nearest_neighbour"] == pytest.approx(np.mean(nearest), abs=1e-6)


def test_the_learning_curve_begins_with_the_untrained_start(finished: Finished, capsys: Capture) -> None:
    rows = pq.read_table(finished.run / "metrics.parquet").to_pylist()
    assert rows == shown(finished.folder, "whole", capsys)["curve"]
    assert [row["episode"] for row in rows] == [0, 8, 16, 24]
    assert (rows[0]["train_loss"], rows[0]["train_accuracy"]) == (None, None)
    assert all(row["train_loss"] > 0 and 0.5 < row["train_accuracy"] <= 1 for row in rows[1:])
    assert all(0.5 < row["accuracy"] <= 1 and 0 <= row["ci95"] < 0.5 for row in rows)


def test_each_line_says_where_training_stands_and_how_fast_it_goes(finished: Finished) -> None:
    first, *others = [line for line in finished.lines if line.startswith("episode ")]
    assert first.startswith("episode 0/24  validation accuracy ")
    assert "episodes/s" not in first
    assert len(others) > 3
    for line in others:
        assert float(line.removesuffix(" episodes/s").split()[-1]) > 0
    curve = [line for line in others if "validation accuracy" in line]
    assert [line.split()[1] for line in curve] == ["8/24", "16/24", "24/24"]
    assert "evaluated 80/80 episodes" in finished.lines


def test_a_terminal_shows_lines_above_bars_that_say_how_training_goes() -> None:
    screen = StringIO()
    start = {"episode": 0, "train_loss": None, "train_accuracy": None, "accuracy": 0.5, "ci95": 0.01}
    with meta_display(Console(file=screen, force_terminal=True, width=200)) as display:
        display.episodes(MetaProgress(0, 20, None, (start,)))
        display.episodes(MetaProgress(8, 20, Pace(loss=1.5, accuracy=0.625, episodes_per_s=12.0), (start,)))
        display.evaluating(5, 10)
    text = screen.getvalue()
    assert text.count("episode 0/20  validation accuracy 0.5000 ± 0.0100") == 1
    assert "loss 1.5000  accuracy 0.6250  12.0 episodes/s" in text
    assert "nan" not in text


def test_without_classes_that_validate_the_curve_is_of_training_alone(tmp_path: Path, capsys: Capture) -> None:
    assert main(words(tmp_path, "short", "num_episodes=6", "eval.every_episodes=4")) == 0
    curve = shown(tmp_path, "short", capsys)["curve"]
    assert [row.keys() for row in curve] == [{"episode", "train_loss", "train_accuracy"}] * 2
    assert [row["episode"] for row in curve] == [4, 6]


def test_a_plan_tells_what_would_be_trained_and_leaves_nothing(tmp_path: Path, capsys: Capture) -> None:
    given = ["plan", *words(tmp_path, "planned", "num_episodes=24", "episodes_per_step=4", "eval.num_ways=[2,3]")]
    assert main(given) == 0
    text = capsys.readouterr().out
    for said in ("prototypes, BatchNorm inductive", "5 train, 0 validation, 5 held out", "2-way 1-shot, 3-way 1-shot"):
        assert said in text
    assert "memory of a worker" in text
    assert main([*given, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["worker_memory_bytes"] > 2**30
    assert planned["device_memory_bytes"] is None
    assert (planned["num_episodes"], planned["num_steps"], planned["num_blocks"], planned["num_images"]) == (
        24,
        6,
        4,
        1797,
    )
    assert planned["evaluation"] == [[2, 1], [3, 1]]
    assert planned["num_parameters"] == 3 * 64 * 9 + 3 * (64 * 64 * 9) + 4 * (64 + 64 + 64), (
        "kernels, biases, BatchNorm"
    )
    assert planned["predicted_s"] > 24 * planned["episode_s"] > 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # 3 steps at 2 * 5 s on 2 workers. The start and 3 validations embed all images of their classes, and so
        # does the evaluation, at 1 s for each, however many episodes there are.
        (["eval.num_episodes=1000", "eval.num_val_episodes=1000"], lambda val, test: 3 * 5 + (4 * val + test) / 2),
        (["eval.num_episodes=9000", "eval.num_val_episodes=5000"], lambda val, test: 3 * 5 + (4 * val + test) / 2),
        # 5 and 20 episodes of 2 classes, 1 shot and 5 queries don't get round to all images.
        ([], lambda _, __: 3 * 5 + (4 * 5 + 20) * 2 * 6 / 2),
        # Where each is normalised by itself, it embeds its own, in 1 s.
        (["eval.batchnorm=transductive"], lambda _, __: 3 * 5 + (4 * 5 + 20) / 2),
    ],
)
def test_a_plan_embeds_each_image_once_where_episodes_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], expected: Callable[[int, int], float]
) -> None:
    config = compose_job(
        "meta", words(tmp_path, "planned", "num_episodes=6", "episodes_per_step=2", "eval.every_episodes=2",
                      "eval.val_fraction=0.2", "cluster=local", "cluster.num_workers=2", *overrides)[1:]
    )  # fmt: skip
    assert isinstance(config, MetaConfig)
    task = prepare_meta(config)
    clock = Clock()
    monkeypatch.setattr(plan, "time", clock)
    model = MetaModel(config, image_size=16, num_classes=len(task.classes.train), device=torch.device("cpu"))
    found = plan.plan_of(task, model, clock)
    val, test = (int(part.counts.sum()) for part in task.classes[1:])
    assert found.predicted_s == pytest.approx(expected(val, test))


class Clock:
    """A crew that takes 5 s for each block of a training step, and 1 s for each image and each episode."""

    num_workers = 1
    waiting_for = None

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def call(
        self, method: str, args_list: Sequence[Any], *, shared: Sequence[Any], poll: Callable[[int], None] = id
    ) -> list[Any]:
        state = shared[0]
        if method == "gradient":
            self.now += 5 * len(args_list)
            return [BlockGradient(state.parameters, [0.0], [0.0], []) for _ in args_list]
        if method == "features":
            self.now += sum(len(rows) for rows, _ in args_list)
            return [np.zeros((len(rows), 64), np.float32) for rows, _ in args_list]
        blocks = [args[-1] for args in args_list]
        self.now += sum(block.stop - block.start for block in blocks)
        return [[Score(0.5, 0.5)] * (block.stop - block.start) for block in blocks]

    def close(self) -> None:
        pass


# Every method


@pytest.mark.parametrize(
    ("method", "batchnorm"),
    [
        *((method, "inductive") for method in MethodName),
        *((method, "transductive") for method in (MethodName.prototypes, MethodName.maml, MethodName.anil)),
    ],
)
def test_every_method_trains_and_leaves_a_model(
    tmp_path: Path, capsys: Capture, method: MethodName, batchnorm: str
) -> None:
    small: tuple[str, ...] = ("num_episodes=4", "episodes_per_step=2", "eval.num_episodes=4", "num_shots=2")
    if method.adapts or method is MethodName.finetune_baseline:
        small += ("inner_steps=1",)
    given = words(tmp_path, "run", f"method={method.value}", f"eval.batchnorm={batchnorm}", *small)
    assert main(given) == 0
    assert f" {batchnorm} " in capsys.readouterr().err
    found = shown(tmp_path, "run", capsys)
    assert found["batchnorm"] == found["table"][0]["batchnorm"] == batchnorm
    assert 0 <= found["accuracy"] <= 1
    assert found["table"][0]["num_diverged"] == 0
    assert (found["table"][0]["nearest_neighbour"] is None) == method.adapts
    config = compose_job("meta", given[1:])
    assert isinstance(config, MetaConfig)
    task = prepare_meta(config)
    learner = load_meta(Folder(f"{tmp_path}/runs/run/model"))
    assert learner.card.class_names == task.classes.train.names
    initial = learner.model.parameters(learner.model.initial(task.backbone))
    assert learner.params.keys() == initial.keys()
    for name, tensor in learner.params.items():
        assert tensor.isfinite().all(), name
        if name.endswith(".weight"):  # BatchNorm takes from biases what they add
            assert not torch.equal(tensor, initial[name]), name
    assert ("head.weight" in learner.params) == method.adapts


# Divergence


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["method=maml", "inner_lr=1e10", "inner_steps=3"],
            "step 1 of 4: inner_lr=1e+10: the inner loop of episode 0 diverged at its step 2 (loss nan); lower it",
        ),
        (
            ["method=reptile", "inner_lr=1e30", "episodes_per_step=2"],
            "step 1 of 4: inner_lr=1e+30: the inner loop of episode 0 diverged at its step 1 (loss nan); lower it",
        ),
        (
            ["method=prototypes", "optimizer.lr=1e30"],
            "step 2 of 4: optimizer.lr=1e+30: the loss of episode 1 is nan; lower it, or set clip_grad_norm",
        ),
        (
            ["method=supcon", "optimizer.lr=1e30", "episodes_per_step=2"],
            "step 2 of 4: optimizer.lr=1e+30: the loss of episodes 2 to 3 is nan; lower it, or set clip_grad_norm",
        ),
    ],
)
def test_a_training_that_diverges_fails_says_where_and_can_be_resumed(
    tmp_path: Path, capsys: Capture, overrides: list[str], expected: str
) -> None:
    num_episodes = 8 if "episodes_per_step=2" in overrides else 4
    given = words(tmp_path, "run", f"num_episodes={num_episodes}", *overrides)
    assert main(given) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"graftstack: {expected}"
    manifest = json.loads((tmp_path / "runs/run/run.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", expected)
    assert main(["meta", "name=run", "resume=true", f"runs_dir={tmp_path}/runs"]) == 1, "nothing has changed"
    assert capsys.readouterr().err.splitlines()[-1] == f"graftstack: {expected}"


# A backbone that nothing trains


def test_zero_episodes_measure_a_backbone_on_one_tap(tmp_path: Path, capsys: Capture, weights: str) -> None:
    given = ("num_episodes=0", f"backbone.weights={weights}", "num_shots=5")
    forwards = []
    for method in ("prototypes", "finetune_baseline"):
        assert main(words(tmp_path, method, *given, f"method={method}")) == 0
        found = shown(tmp_path, method, capsys)
        assert found["accuracy"] > 0.7
        assert (found["curve"], found["artifacts"]) == ([], {"model": "model"})
        assert found["details"]["num_episodes"] == 0
        assert found["details"]["weights"] == f"conv4 with {weights}"
        forwards.append(found["details"]["backbone_forwards"])
        given_weights, kept = load_file(weights), load_file(tmp_path / f"runs/{method}/model/model.safetensors")
        assert len(kept) == 4 * (2 + 5)
        assert all(torch.equal(given_weights[name.removeprefix("backbone.")], tensor) for name, tensor in kept.items())
    assert forwards == [1797, 0], "the second reads what the first has stored"


def test_a_trained_backbone_is_measured_as_its_own_run_measured_it(finished: Finished, capsys: Capture) -> None:
    given = ("num_episodes=0", "backbone.weights=run:whole", "eval.test_fraction=0.4", "eval.num_ways=[3]")
    assert main(words(finished.folder, "again", *given)) == 0
    own, again = (shown(finished.folder, name, capsys)["table"] for name in ("whole", "again"))
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in own if row["num_shots"] == 1]
