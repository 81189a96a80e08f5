"""A backbone that isn't trained is measured on taps: each image goes through it once, whatever is asked afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftstack.backbones.backbone import Backbone
from graftstack.cli import main
from graftstack.config.compose import compose_job
from graftstack.config.meta import MetaConfig
from graftstack.config.schema import FinetuneConfig
from graftstack.finetune.tapping import make_shards, tap_spec
from graftstack.finetune.task import Workbench
from graftstack.meta.crew import InlineCrew
from graftstack.meta.evaluation import Rows
from graftstack.meta.job import MetaJob
from graftstack.meta.model import MetaModel, MetaState
from graftstack.meta.runner import EpisodeRunner, RunnerSettings
from graftstack.meta.tapped import TappedFeatures, tapped_features
from graftstack.meta.task import MetaTask, prepare_meta
from graftstack.storage import Folder
from graftstack.taps.store import TapStore

NUM_DIGITS = 1797


@dataclass
class Measuring:
    """A backbone that is about to be measured, in this process."""

    task: MetaTask
    model: MetaModel
    crew: InlineCrew

    @property
    def state(self) -> MetaState:
        return self.model.initial(self.task.backbone)

    def rows(self, part: str = "test") -> np.ndarray[Any, Any]:
        rows = np.unique(getattr(self.task.classes, part).rows)
        return rows[rows >= 0]


@pytest.fixture
def common(weights: str, tmp_path: Path) -> list[str]:
    return [
        "data=digits", "data.image_size=16", "backbone=conv4", f"backbone.weights={weights}", "num_episodes=0",
        "num_ways=3", "num_queries=5", "eval.num_episodes=20", "cluster=inline", f"taps.location={tmp_path}/taps",
    ]  # fmt: skip


def measuring(overrides: Sequence[str], crew: type[InlineCrew] = InlineCrew) -> Measuring:
    config = compose_job("meta", overrides)
    assert isinstance(config, MetaConfig)
    task = prepare_meta(config)
    cpu = torch.device("cpu")
    model = MetaModel(config, image_size=16, num_classes=len(task.classes.train), device=cpu)
    settings = RunnerSettings(
        config=config, classes=task.classes, images=task.data.images, preprocessing=task.preprocessing
    )
    return Measuring(task, model, crew(EpisodeRunner(settings)))


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the images that go through any backbone, batch by batch."""
    found: list[int] = []

    def see(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, Backbone):
            found.append(len(args[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        yield found
    finally:
        handle.remove()


def details(found: TappedFeatures | None) -> dict[str, int]:
    assert found is not None
    return found.details


def test_what_a_tap_holds_is_what_the_crew_computes(common: list[str]) -> None:
    one = measuring(common)
    with tapped_features(one.task, one.state, one.crew) as features:
        rows = one.rows()[::-3]
        assert features is not None
        found = features(Rows(rows, np.zeros_like(rows)))
    (wanted,) = one.crew.call("features", [[rows, np.zeros_like(rows)]], shared=[one.state])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert found.dtype == np.float32


def test_each_image_goes_through_the_backbone_once_and_then_never_again(common: list[str], tmp_path: Path) -> None:
    first = measuring(common)
    with counted() as forwards, tapped_features(first.task, first.state, first.crew) as features:
        outcome = MetaJob(first.task, first.model, first.crew, Folder(tmp_path / "a"), features_of=features).run()
    assert details(features) == {"backbone_forwards": NUM_DIGITS, "unique_images": NUM_DIGITS}
    assert sum(forwards) == NUM_DIGITS
    plain = MetaJob(first.task, first.model, first.crew, Folder(tmp_path / "b")).run()
    assert outcome.results == plain.results
    assert outcome.results["accuracy"] > 0.5

    others = (["num_ways=2", "num_shots=7"], ["method=finetune_baseline"], ["seed=3", "eval.num_shots=[1,2,3]"])
    for number, other in enumerate(others):
        again = measuring([*common, *other])
        with counted() as forwards, tapped_features(again.task, again.state, again.crew) as features:
            MetaJob(again.task, again.model, again.crew, Folder(tmp_path / str(number)), features_of=features).run()
        assert forwards == []
        assert details(features) == {"backbone_forwards": 0, "unique_images": NUM_DIGITS}


def test_other_weights_or_images_are_never_mistaken_for_known_ones(common: list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    one = measuring([*common, "data.classes=[0,1,2,3,4,5]"])
    state = load_file(one.task.config.backbone.weights)
    state["block4.norm.running_var"] *= 2
    save_file(state, tmp_path / "other.safetensors")
    with tapped_features(one.task, one.state, one.crew) as features:
        assert details(features)["backbone_forwards"] == len(one.task.data) < NUM_DIGITS
    for change in (f"backbone.weights={tmp_path}/other.safetensors", "data.classes=[1,2,3,4,5,6]"):
        other = measuring([*common, "data.classes=[0,1,2,3,4,5]", change])
        with tapped_features(other.task, other.state, other.crew) as features:
            assert details(features)["backbone_forwards"] == len(other.task.data)


def test_classes_that_are_held_out_by_name_are_all_that_is_kept(common: list[str]) -> None:
    one = measuring([*common, "eval.classes=[2,5,7]"])
    with tapped_features(one.task, one.state, one.crew) as features:
        assert details(features) == {"backbone_forwards": len(one.rows()), "unique_images": len(one.rows())}
        rows = one.rows()[5:40]
        assert features is not None
        found = features(Rows(rows, np.zeros_like(rows)))
    (wanted,) = one.crew.call("features", [[rows, np.zeros_like(rows)]], shared=[one.state])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    with tapped_features(one.task, one.state, one.crew, part="train") as features:
        assert features is None
    again = measuring([*common, "eval.classes=[7,2,5]", "seed=5"])
    with tapped_features(again.task, again.state, again.crew) as features:
        assert details(features)["backbone_forwards"] == 0


def test_what_a_sweep_has_stored_is_read(common: list[str], weights: str, tmp_path: Path) -> None:
    head_only = [
        "data=digits",
        "data.image_size=16",
        "backbone=conv4",
        f"backbone.weights={weights}",
        "freeze_depth=all",
    ]
    config = compose_job("finetune", [*head_only, "cluster=inline"])
    assert isinstance(config, FinetuneConfig)
    task = Workbench().task(config)
    spec = tap_spec(task, 5, dtype="fp32")
    store = TapStore(str(tmp_path / "taps"), budget_bytes=2**30)
    make_shards(task, store, [spec], {shard: [0] for shard in range(spec.num_shards)}, device=torch.device("cpu"))
    one = measuring(common)
    with tapped_features(one.task, one.state, one.crew) as features:
        assert details(features) == {"backbone_forwards": 0, "unique_images": NUM_DIGITS}
        rows = one.rows()[::7]
        assert features is not None
        found = features(Rows(rows, np.zeros_like(rows)))
    (wanted,) = one.crew.call("features", [[rows, np.zeros_like(rows)]], shared=[one.state])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("option", ["eval.batchnorm=transductive", "rotations=true"])
def test_features_that_depend_on_the_episode_or_are_of_no_row_are_not_kept(
    common: list[str], option: str, tmp_path: Path
) -> None:
    one = measuring([*common, option])
    with tapped_features(one.task, one.state, one.crew) as features:
        assert features is None
    assert not (tmp_path / "taps").exists()


def test_without_room_the_crew_is_left_to_its_own_and_a_line_says_so(common: list[str], tmp_path: Path) -> None:
    one = measuring([*common, "taps.budget_bytes=1000"])
    said: list[str] = []
    with tapped_features(one.task, one.state, one.crew, say=said.append) as features:
        assert features is None
    assert said == [
        "conv4: no tap (449.2 KiB): taps in use leave too little of taps.budget_bytes; its features are computed anew "
        "each time"
    ]
    assert not list((tmp_path / "taps").rglob("*.arrow"))


def test_half_precision_takes_half_the_room(common: list[str]) -> None:
    one = measuring([*common, "taps.dtype=fp16"])
    rows = one.rows()
    with tapped_features(one.task, one.state, one.crew) as features:
        assert features is not None
        found = features(Rows(rows, np.zeros_like(rows)))
        assert features.tap.num_bytes == NUM_DIGITS * 64 * 2
    (wanted,) = one.crew.call("features", [[rows, np.zeros_like(rows)]], shared=[one.state])
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)
    assert found.dtype == np.float32


class _Crew(InlineCrew):
    """Takes note of how many calls come at once, and hands out what can't be written to, as other processes do."""

    num_workers = 3
    sizes: list[int]

    def call(self, method: str, args_list: Sequence[Sequence[Any]], **options: Any) -> list[Any]:
        if method == "features":
            self.sizes = [*getattr(self, "sizes", []), len(args_list)]
        found = super().call(method, args_list, **options)
        for features in found:
            features.setflags(write=False)
        return found


def test_several_workers_all_have_work_and_progress_is_told(common: list[str]) -> None:
    one = measuring(common, _Crew)
    told: list[tuple[int, int]] = []
    with tapped_features(
        one.task, one.state, one.crew, tell=lambda done, total: told.append((done, total))
    ) as features:
        assert details(features)["backbone_forwards"] == NUM_DIGITS
    assert one.crew.sizes == [6, 2]  # type: ignore[attr-defined]
    assert told == [(6, 8), (8, 8)]


def test_a_pass_that_was_cut_short_goes_on_where_it_was(common: list[str]) -> None:
    one = measuring(common)

    def stop(done: int, _total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), tapped_features(one.task, one.state, one.crew, tell=stop):
        pass
    with tapped_features(one.task, one.state, one.crew) as features:
        assert details(features) == {"backbone_forwards": NUM_DIGITS - 4 * 256, "unique_images": NUM_DIGITS}


def test_an_evaluation_of_the_run_reads_the_tap_too(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["meta", *common, f"runs_dir={tmp_path}/runs", "name=known"]) == 0
    assert main(["evaluate", f"{tmp_path}/runs/known", "--json"]) == 0
    capsys.readouterr()
    for words in ([], ["--split", "train"], ["digits"]):
        with counted() as forwards:
            assert main(["evaluate", f"{tmp_path}/runs/known", *words, "--json"]) == 0
        assert forwards == []
    assert len(list((tmp_path / "taps").iterdir())) == 1
