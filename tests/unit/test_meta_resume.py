"""A meta-training that is broken off anywhere ends, once it is resumed, to the bit where an unbroken one does."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from graftstack.cluster.meta import launch_meta
from graftstack.config.compose import compose_job
from graftstack.config.meta import MetaConfig
from graftstack.errors import TrainingError
from graftstack.meta import task, training
from graftstack.meta.model import MetaState
from graftstack.meta.runner import Block, BlockGradient, EpisodeRunner
from graftstack.meta.training import MetaProgress
from graftstack.runs import Run, find_run

NUM_STEPS = 6
NUM_EPISODES = 10  # of each shape that accuracy is measured for
SMALL = (
    *("data=digits", "data.image_size=16", "backbone=conv4", "cluster=inline", "cluster.cpus_per_worker=1"),
    *(
        "num_ways=2",
        "num_queries=3",
        f"eval.num_episodes={NUM_EPISODES}",
        "eval.num_val_episodes=4",
        "eval.num_shots=[1,2]",
    ),
    *("eval.val_fraction=0.2", "checkpoint.every_steps=2"),
)
METHODS = {
    "prototypes": ("num_episodes=6", "eval.every_episodes=3"),
    "supcon": ("method=supcon", "episodes_per_step=4", "num_episodes=24", "eval.every_episodes=8"),
    "fomaml": (
        "method=fomaml",
        "inner_steps=1",
        "num_episodes=6",
        "eval.every_episodes=2",
        "optimizer=sgd",
        "clip_grad_norm=1",
    ),
}

# What goes through training episodes.
TRAINING = {"gradient", "embed", "pull_back"}

Unbroken = Callable[[str], Run]


class Moment(NamedTuple):
    """After a step of the outer loop; or, `is_validated`, once its validation is over, and before it is saved."""

    step: int
    is_validated: bool = False


class Display:
    """Shows nothing; somebody presses Ctrl-C at a moment of training, or when so many shapes have been evaluated."""

    def __init__(self, *, moment: Moment | None = None, num_evaluated: int | None = None) -> None:
        self._moment = moment
        self._num_evaluated = num_evaluated
        self._evaluated = 0

    def episodes(self, progress: MetaProgress) -> None:
        is_validated = bool(progress.history) and progress.history[-1]["episode"] == progress.episode
        if self._moment == (NUM_STEPS * progress.episode / progress.num_episodes, is_validated):
            raise KeyboardInterrupt

    def evaluating(self, done: int, total: int) -> None:
        self._evaluated += done % NUM_EPISODES == 0
        if self._evaluated == self._num_evaluated:
            raise KeyboardInterrupt

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@pytest.fixture(autouse=True)
def _tell_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_TELL_EVERY_S", 0.0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often episodes were gone through, by what for."""
    found: Counter[str] = Counter()

    def count(name: str) -> None:
        original = getattr(EpisodeRunner, name)

        def counted(*args: Any) -> Any:
            found[name] += 1
            return original(*args)

        monkeypatch.setattr(EpisodeRunner, name, counted)

    for name in ("gradient", "embed", "pull_back", "score", "features", "moments"):
        count(name)
    return found


def launch(folder: Path, name: str, *overrides: str, display: Display | None = None) -> Run:
    everything = [*SMALL, f"runs_dir={folder}", f"name={name}", *overrides]
    last = {word.partition("=")[0]: word for word in everything}
    config = compose_job("meta", list(last.values()))
    assert isinstance(config, MetaConfig)
    return launch_meta(config, overrides=list(last.values()), display=display or Display())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Runs of each method that nobody breaks off."""
    runs: dict[str, Run] = {}
    folder = tmp_path_factory.mktemp("unbroken")

    def run(method: str) -> Run:
        if method not in runs:
            runs[method] = launch(folder, method, *METHODS[method])
        return runs[method]

    return run


def assert_same(run: Run, other: Run) -> None:
    assert run.manifest.status == other.manifest.status == "done"
    assert run.manifest.results == other.manifest.results
    folders = [Path(each.folder.location) for each in (run, other)]
    last = f"checkpoints/step-{NUM_STEPS:09}.safetensors"
    for file in ("model/model.safetensors", "model/meta.safetensors", last):
        tensors, wanted = (load_file(folder / file) for folder in folders)
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
    curves = [pq.read_table(folder / "metrics.parquet") for folder in folders]
    assert curves[0].equals(curves[1])
    assert curves[0].num_rows > 2


def broken(folder: Path, method: str, display: Display) -> None:
    with pytest.raises(KeyboardInterrupt, match="continue with: graftstack meta name=broken resume=true "):
        launch(folder, "broken", *METHODS[method], display=display)
    assert find_run("broken", str(folder)).manifest.status == "interrupted"


def resumed(folder: Path, method: str) -> Run:
    return launch(folder, "broken", *METHODS[method], "resume=true")


@pytest.mark.parametrize(
    ("method", "moment", "num_left"),
    [
        ("prototypes", Moment(0, is_validated=True), 6),
        ("prototypes", Moment(1), 6),
        ("prototypes", Moment(5), 2),
        ("prototypes", Moment(3, is_validated=True), 4),
        ("prototypes", Moment(6), 2),
        ("supcon", Moment(3), 4),
        ("supcon", Moment(4, is_validated=True), 4),
        ("fomaml", Moment(3), 4),
        ("fomaml", Moment(6, is_validated=True), 2),
    ],
)
def test_a_training_broken_off_at_any_step_ends_as_an_unbroken_one(
    tmp_path: Path, unbroken: Unbroken, calls: Counter[str], method: str, moment: Moment, num_left: int
) -> None:
    wanted = unbroken(method)
    broken(tmp_path, method, Display(moment=moment))
    calls.clear()
    assert_same(resumed(tmp_path, method), wanted)
    num_calls = {"embed": 4 * num_left, "pull_back": 4 * num_left} if method == "supcon" else {"gradient": num_left}
    assert {name: num for name, num in calls.items() if name in TRAINING} == num_calls, "the rest was saved"


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_trained_twice_where_the_evaluation_was_broken_off(
    tmp_path: Path, unbroken: Unbroken, calls: Counter[str], method: str
) -> None:
    wanted = unbroken(method)
    broken(tmp_path, method, Display(num_evaluated=2))
    calls.clear()
    assert_same(resumed(tmp_path, method), wanted)
    assert not calls.keys() & TRAINING
    assert calls["score"] == (1 if method == "fomaml" else 0), "of two shapes one was measured already"


def test_a_run_that_is_done_is_returned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = launch(tmp_path, "broken", *METHODS["prototypes"])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(task, "prepare_meta", None)
    assert resumed(tmp_path, "prototypes").manifest == run.manifest
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_training_that_failed_goes_on_where_it_was_saved(
    tmp_path: Path, unbroken: Unbroken, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EpisodeRunner.gradient

    def failing(self: EpisodeRunner, state: MetaState, block: Block) -> BlockGradient:
        if block.start == 4:
            raise TrainingError("something is wrong with episode 4")
        return whole(self, state, block)

    monkeypatch.setattr(EpisodeRunner, "gradient", failing)
    with pytest.raises(TrainingError, match=r"^step 5 of 6: something is wrong with episode 4$"):
        launch(tmp_path, "broken", *METHODS["fomaml"])
    assert find_run("broken", str(tmp_path)).manifest.status == "failed"
    monkeypatch.setattr(EpisodeRunner, "gradient", whole)
    wanted = unbroken("fomaml")
    calls.clear()
    assert_same(resumed(tmp_path, "fomaml"), wanted)
    assert calls["gradient"] == 2


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path: Path, unbroken: Unbroken, calls: Counter[str]
) -> None:
    broken(tmp_path, "prototypes", Display(moment=Moment(5)))
    newest = tmp_path / f"broken/checkpoints/step-{4:09}.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    wanted = unbroken("prototypes")
    calls.clear()
    assert_same(resumed(tmp_path, "prototypes"), wanted)
    assert calls["gradient"] == 4


def test_accuracies_of_other_weights_arent_kept(tmp_path: Path, weights: str) -> None:
    tensors = load_file(weights)
    file = tmp_path / "mine.safetensors"
    save_file(tensors, file)
    overrides = ("num_episodes=0", "eval.batchnorm=transductive", f"backbone.weights={file}")
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path, "broken", *overrides, display=Display(num_evaluated=2))
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(
        TrainingError, match="the initial weights have changed since accuracy was measured; start a new run"
    ):
        launch(tmp_path, "broken", *overrides, "resume=true")


def test_a_training_isnt_resumed_from_other_weights(tmp_path: Path, weights: str) -> None:
    tensors = load_file(weights)
    file = tmp_path / "mine.safetensors"
    save_file(tensors, file)
    overrides = ("num_episodes=6", f"backbone.weights={file}")
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path, "broken", *overrides, display=Display(moment=Moment(3)))
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(
        TrainingError, match="the initial weights have changed since the checkpoint was made; start a new"
    ):
        launch(tmp_path, "broken", *overrides, "resume=true")
