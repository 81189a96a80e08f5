"""What a sweep shares and what it computes anew, why, and which trials train together."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graftstack.backbones.registry import build
from graftstack.cluster.sweep import plan_sweep
from graftstack.config.compose import compose_job
from graftstack.config.sweep import SearchName
from graftstack.errors import ConfigError, StorageFullError
from graftstack.finetune.passes import NoRoomError
from graftstack.finetune.tapping import PassResult, make_shards
from graftstack.finetune.task import Workbench
from graftstack.report.sweep_tables import plan_tables
from graftstack.sweep.passes import ShardCall, make_pass
from graftstack.sweep.plan import DepthPlan, Pass, SweepPlan
from graftstack.sweep.planner import Planner
from graftstack.sweep.probe import ProbeScore
from graftstack.sweep.search import list_trials
from graftstack.sweep.trials import Unit
from graftstack.taps.store import TapStore

CPU = torch.device("cpu")
# Many epochs, so that what is measured here decides the same on any machine; nothing is trained.
SMALL = (
    "data=digits",
    "data.image_size=16",
    "data.num_train_per_class=13",
    "data.val_fraction=0.06",
    "backbone=conv4",
    "epochs=50",
    "batch_size=32",
    "cluster=inline",
)
NUM_ITEMS = 130 + 109
# What the output of a group takes for one image, in values.
NUM_VALUES = {1: 64 * 8 * 8, 2: 64 * 4 * 4, 3: 64 * 2 * 2, 4: 64, 5: 64}


class Silent:
    """A display that shows nothing."""

    def reading(self, done: int, total: int) -> None:
        pass

    def planned(self, plan: SweepPlan) -> None:
        pass


@pytest.fixture(scope="module")
def workbench() -> Workbench:
    return Workbench()


@pytest.fixture
def store(tmp_path: Path) -> TapStore:
    return TapStore(str(tmp_path / "taps"), budget_bytes=2**30)


class Planned:
    """A plan, and the planner that made it."""

    def __init__(self, store: TapStore, workbench: Workbench, *overrides: str) -> None:
        self.config = compose_job("sweep", [*SMALL, *overrides])
        self.workbench = workbench
        self.trials = list_trials(
            replace(self.config, search=SearchName.random) if self.config.search is SearchName.optuna else self.config
        )
        self.planner = Planner(self.config, store, workbench=workbench, device=CPU)
        self.plan = self.planner.plan(self.trials)

    @property
    def depths(self) -> dict[int, DepthPlan]:
        return {depth.freeze_depth: depth for depth in self.plan.depths}

    @property
    def actions(self) -> dict[int, str]:
        return {number: depth.action for number, depth in self.depths.items()}

    @property
    def units(self) -> list[Unit]:
        return self.planner.make_units(self.trials)

    @property
    def together(self) -> list[list[int]]:
        """The indices of the trials of each unit."""
        return sorted(sorted(trial.index for trial in unit.trials) for unit in self.units)


# Which depths have a tap


def test_frozen_parts_are_computed_once_and_images_need_no_tap(store: TapStore, workbench: Workbench) -> None:
    planned = Planned(store, workbench, "space.freeze_depth=[0,2,all]", "space.lr=[1e-3,1e-2]")
    assert planned.actions == {0: "images", 2: "tap", 5: "tap"}
    assert planned.depths[0].reason == "freeze_depth=0: nothing is frozen"
    assert "956.0 KiB, read in" in planned.depths[2].reason
    assert "of forward" in planned.depths[2].reason
    assert planned.plan.num_trials == 6
    assert planned.plan.num_images == NUM_ITEMS
    assert planned.plan.tap_bytes == 4 * NUM_ITEMS * (NUM_VALUES[2] + NUM_VALUES[5])
    (wanted,) = planned.planner.passes()
    assert list(wanted.specs) == [2, 5]
    assert [spec.shape for spec in wanted.specs.values()] == [(64, 4, 4), (64,)]


def test_what_is_predicted_is_positive_and_less_than_without_sharing(store: TapStore, workbench: Workbench) -> None:
    plan = Planned(store, workbench, "space.freeze_depth=[2,all]", "space.lr=[1e-3,1e-2,3e-2,1e-1]").plan
    assert plan.predicted_s > 0
    assert plan.predicted_s == plan.pass_s + plan.trials_s
    assert plan.trials_s == pytest.approx(sum(depth.seconds for depth in plan.depths))
    assert plan.predicted_s < plan.uncached_s
    assert all(rate > 0 for rate in plan.rates.values())


def test_more_epochs_and_more_trials_are_predicted_to_take_longer(store: TapStore, workbench: Workbench) -> None:
    base = Planned(store, workbench, "space.freeze_depth=[0]", "epochs=2").plan.trials_s
    assert Planned(store, workbench, "space.freeze_depth=[0]", "epochs=50").plan.trials_s > 2 * base
    assert Planned(store, workbench, "space.lr=[1,2,3,4,5,6,7,8]", "epochs=2").plan.trials_s > 2 * base


def test_a_tap_that_is_there_is_read_and_not_made_again(store: TapStore, workbench: Workbench) -> None:
    space = ("space.freeze_depth=[2,all]", "space.lr=[1e-3,1e-2]")
    first = Planned(store, workbench, *space)
    (wanted,) = first.planner.passes()
    spec = wanted.specs[2]
    make_shards(workbench.task(wanted.trial.config), store, [spec], {0: [0]}, device=CPU)
    second = Planned(store, workbench, *space)
    assert second.actions == {2: "stored", 5: "tap"}
    (wanted,) = second.planner.passes()
    assert wanted.start == spec
    (read,) = second.planner.tapped()
    assert list(read.specs) == [2, 5]
    assert second.plan.tap_bytes == 4 * NUM_ITEMS * NUM_VALUES[5]


def test_a_tap_that_is_read_less_often_than_it_has_items_is_not_made(store: TapStore, workbench: Workbench) -> None:
    planned = Planned(store, workbench, "space.freeze_depth=[1]", "epochs=0")  # a single validation
    assert planned.actions == {1: "recompute"}
    assert "making 3.7 MiB takes" in planned.depths[1].reason
    assert planned.planner.passes() == []


def test_a_budget_smaller_than_a_tap_says_what_it_holds(store: TapStore, workbench: Workbench) -> None:
    planned = Planned(store, workbench, "space.freeze_depth=[1,2,all]", "taps.budget_bytes=200000")
    assert planned.actions == {1: "recompute", 2: "recompute", 5: "tap"}
    assert planned.depths[2].reason == ("needs 956.0 KiB; taps.budget_bytes=195.3 KiB holds freeze_depth=5 (59.8 KiB)")
    assert planned.plan.tap_bytes <= 200_000
    nothing = Planned(store, workbench, "space.freeze_depth=[2,all]", "taps.budget_bytes=0")
    assert nothing.actions == {2: "recompute", 5: "recompute"}
    assert nothing.depths[2].reason.endswith("holds no tap")


def test_taps_of_all_backbones_share_the_budget(store: TapStore, workbench: Workbench) -> None:
    space = ("space.seed=[0,1]", "space.freeze_depth=[2]", "taps.budget_bytes=1500000")
    plan = Planned(store, workbench, *space).plan
    assert sorted(depth.action for depth in plan.depths) == ["recompute", "tap"]
    assert plan.tap_bytes <= 1_500_000


def test_half_the_bytes_hold_twice_the_taps(store: TapStore, workbench: Workbench) -> None:
    space = ("space.freeze_depth=[2]", "taps.budget_bytes=600000")
    assert Planned(store, workbench, *space).actions == {2: "recompute"}
    halved = Planned(store, workbench, *space, "taps.dtype=bf16")
    assert halved.actions == {2: "tap"}
    assert halved.plan.tap_bytes == 2 * NUM_ITEMS * NUM_VALUES[2]


def test_images_that_change_at_random_have_no_tap_unless_their_views_are_numbered(
    store: TapStore, workbench: Workbench
) -> None:
    space = ("space.freeze_depth=[0,2,all]", "space.lr=[1e-3,1e-2]", "augment=standard")
    planned = Planned(store, workbench, *space)
    assert planned.actions == {0: "images", 2: "recompute", 5: "recompute"}
    assert planned.depths[2].reason == (
        "augment=standard changes the images at random in each epoch; augment_views=V would cache V views of each"
    )
    assert all(unit.tap is None and len(unit.trials) == 1 for unit in planned.units)
    cached = Planned(store, workbench, *space, "augment_views=3")
    assert cached.actions == {0: "images", 2: "tap", 5: "tap"}
    assert cached.plan.num_images == NUM_ITEMS + 3 * 130


def test_without_reuse_every_trial_begins_with_the_images(store: TapStore, workbench: Workbench) -> None:
    planned = Planned(store, workbench, "space.freeze_depth=[2,all]", "space.lr=[1e-3,1e-2]", "reuse=off")
    assert {(depth.action, depth.reason) for depth in planned.plan.depths} == {("recompute", "reuse=off")}
    assert planned.planner.passes() == planned.planner.tapped() == []
    assert planned.together == [[0], [1], [2], [3]]
    assert planned.plan.predicted_s == pytest.approx(planned.plan.uncached_s)


def test_what_is_given_up_is_recomputed_and_no_longer_made(store: TapStore, workbench: Workbench) -> None:
    planned = Planned(store, workbench, "space.freeze_depth=[2,all]", "space.lr=[1e-3,1e-2]")
    (wanted,) = planned.planner.passes()
    planned.planner.give_up([wanted.specs[5]], "no room")
    (left,) = planned.planner.passes()
    assert list(left.specs) == [2]
    assert planned.together == [[0], [1], [2], [3]]
    assert [unit.tap is None for unit in sorted(planned.units, key=lambda unit: unit.name)] == [
        False,
        False,
        True,
        True,
    ]


def test_trials_of_several_backbones_have_taps_of_their_own(store: TapStore, workbench: Workbench) -> None:
    space = ("space.backbone=[conv4,cifar_resnet20]", "space.freeze_depth=[all]", "space.lr=[1e-3,1e-2]", "epochs=20")
    planned = Planned(store, workbench, *space)
    assert [depth.trunk for depth in planned.plan.depths] == ["conv4", "cifar_resnet20"]
    assert [list(wanted.specs) for wanted in planned.planner.passes()] == [[5], [5]]
    assert planned.together == [[0, 1], [2, 3]]
    assert planned.plan.num_images == 2 * NUM_ITEMS
    assert planned.planner.probed_as(planned.trials[2]) == ("cifar_resnet20", 5)


def test_seeds_share_taps_where_neither_rows_nor_weights_depend_on_them(
    store: TapStore, workbench: Workbench, weights: str
) -> None:
    space = ("space.seed=[1,2]", "space.freeze_depth=[all]", f"backbone.weights={weights}")
    apart = Planned(store, workbench, *space)
    assert len(apart.planner.passes()) == 2
    assert [depth.trunk for depth in apart.plan.depths] == ["conv4 seed=1", "conv4 seed=2"]
    assert apart.together == [[0], [1]]
    shared = Planned(store, workbench, *space, "data.num_train_per_class=null", "epochs=10")
    assert len(shared.planner.passes()) == 1
    assert shared.together == [[0, 1]]
    assert shared.plan.num_images == 1797


def test_labels_are_distinct_whatever_of_the_space_tells_taps_apart(
    store: TapStore, workbench: Workbench, weights: str
) -> None:
    own = (f"backbone.weights={weights}", "data.num_train_per_class=null", "epochs=0", "freeze_depth=2")

    def labels(*space: str) -> list[str]:
        return [depth.trunk for depth in Planned(store, workbench, *own, *space).plan.depths]

    assert labels("space.precision=[fp32,bf16]") == ["conv4 precision=fp32", "conv4 precision=bf16"]
    assert labels("space.seed=[1,2]") == ["conv4"], "taps don't depend on it"
    views = ("augment=standard", "space.augment_views=[1,2]", "space.seed=[1,2]")
    assert labels(*views) == [f"conv4 augment_views={num} seed={seed}" for num in (1, 2) for seed in (1, 2)]


def test_a_tap_that_two_trunks_read_is_made_and_paid_for_once(
    store: TapStore, workbench: Workbench, weights: str
) -> None:
    folds = ("space.data.val_fraction=[0.1,0.2]", f"backbone.weights={weights}", "data.num_train_per_class=null")
    planned = Planned(store, workbench, *folds, "freeze_depth=2", f"taps.budget_bytes={4 * 1797 * NUM_VALUES[2]}")
    assert [depth.action for depth in planned.plan.depths] == ["tap", "stored"]
    assert planned.plan.tap_bytes == 4 * 1797 * NUM_VALUES[2]
    (wanted,) = planned.planner.passes()
    planned.planner.give_up(wanted.specs.values(), "no room")
    assert planned.planner.tapped() == []


def test_taps_that_an_earlier_backbone_reads_leave_less_of_the_budget(store: TapStore, workbench: Workbench) -> None:
    one = 4 * NUM_ITEMS * NUM_VALUES[2]
    make_all(Planned(store, workbench, "space.seed=[0]", "freeze_depth=2"), store)
    space = ("space.seed=[0,1]", "freeze_depth=2", f"taps.budget_bytes={2 * one - 1}")
    plan = Planned(store, workbench, *space).plan
    assert [depth.action for depth in plan.depths] == ["stored", "recompute"]


# Making them


def maker(
    workbench: Workbench, store: TapStore, calls: list[ShardCall]
) -> Callable[[Sequence[ShardCall]], list[PassResult]]:
    """Returns what makes shards here, and remembers what it was asked for."""

    def make(asked: Sequence[ShardCall]) -> list[PassResult]:
        calls.extend(asked)
        return [
            make_shards(workbench.task(call.trial.config), store, call.specs, call.shards, device=CPU, start=call.start)
            for call in asked
        ]

    return make


def make_all(planned: Planned, store: TapStore) -> int:
    """Makes the taps of a plan; returns the forwards that it took."""
    make = maker(planned.workbench, store, [])
    return sum(make_pass(wanted, store, make=make) for wanted in planned.planner.passes())


def test_a_later_sweep_that_goes_deeper_begins_where_the_taps_end(store: TapStore, workbench: Workbench) -> None:
    assert make_all(Planned(store, workbench, "space.freeze_depth=[1,2]"), store) == NUM_ITEMS
    deeper = Planned(store, workbench, "space.freeze_depth=[4,all]")
    (wanted,) = deeper.planner.passes()
    assert list(wanted.specs) == [4, 5]
    assert wanted.start is not None
    assert wanted.start.key.boundary in (1, 2)
    assert deeper.plan.pass_s > 0
    assert make_all(deeper, store) == 0
    assert all(store.is_complete(spec) for spec in wanted.specs.values())
    assert make_all(Planned(store, workbench, "space.freeze_depth=[1,3,all]"), store) == 0


def test_a_damaged_tap_is_not_begun_with_and_not_made_for_that(store: TapStore, workbench: Workbench) -> None:
    first = Planned(store, workbench, "space.freeze_depth=[2]")
    make_all(first, store)
    (read,) = first.planner.tapped()
    deeper = Planned(store, workbench, "space.freeze_depth=[4]")
    file = Path(store.location) / read.specs[2].key.digest / "shard-000.arrow"
    file.write_bytes(file.read_bytes()[:-1])
    assert make_all(deeper, store) == NUM_ITEMS
    assert not store.is_listed(read.specs[2])


def test_a_tap_of_the_sweep_does_not_give_way_to_another_one(store: TapStore, workbench: Workbench) -> None:
    one = 4 * NUM_ITEMS * NUM_VALUES[2]
    planned = Planned(store, workbench, "space.seed=[0,1]", "freeze_depth=2")
    first, second = planned.planner.passes()
    make = maker(workbench, store, [])
    make_pass(first, store, make=make)
    small = TapStore(store.location, budget_bytes=one + 10_000)
    kept = [spec.key.digest for taps in planned.planner.tapped() for spec in taps.specs.values()]
    with pytest.raises(NoRoomError, match=r"taps in use leave too little of taps\.budget_bytes") as caught:
        make_pass(second, small, make=make, keep=kept)
    assert caught.value.lacking == list(second.specs.values())
    assert store.is_complete(first.specs[2])
    make_pass(second, small, make=make)
    assert not store.is_listed(first.specs[2])


def test_what_a_full_disk_leaves_undone_is_removed_and_named(store: TapStore, workbench: Workbench) -> None:
    planned = Planned(store, workbench, "space.freeze_depth=[2,all]")
    (wanted,) = planned.planner.passes()
    make = maker(workbench, store, [])
    make_pass(Pass(wanted.trial, wanted.label, {5: wanted.specs[5]}), store, make=make)

    def fill(calls: Sequence[ShardCall]) -> list[PassResult]:
        make(calls)
        raise StorageFullError("no space left")

    with pytest.raises(NoRoomError, match="no space left") as caught:
        make_pass(wanted, store, make=fill)
    assert caught.value.lacking == [wanted.specs[2]]
    assert store.missing_shards(wanted.specs[2]) == [0]
    assert store.is_complete(wanted.specs[5])


# What is predicted


def test_a_unit_of_more_heads_than_were_measured_takes_longer(store: TapStore, workbench: Workbench) -> None:
    space = ("space.lr=loguniform(1e-4,1e-1)", "search=random", "freeze_depth=all", "epochs=500")
    few = Planned(store, workbench, *space, "num_samples=32")
    many = Planned(store, workbench, *space, "num_samples=300")
    assert [few.depths[5].num_units, many.depths[5].num_units] == [1, len(many.units)] == [1, 2]
    assert many.plan.trials_s > 4 * few.plan.trials_s


def test_a_step_on_images_waits_for_their_decoding(store: TapStore, workbench: Workbench) -> None:
    plan = Planned(store, workbench, "space.freeze_depth=[0]").plan
    assert plan.trials_s > 50 * 4 * 32 * plan.rates["decode_s"]


def test_what_a_search_that_learns_suggests_is_predicted_one_by_one(store: TapStore, workbench: Workbench) -> None:
    space = ("space.lr=loguniform(1e-4,1e-1)", "freeze_depth=all", "num_samples=6", "search=optuna")
    alone = Planned(store, workbench, *space)
    assert alone.depths[5].num_units == 6
    assert alone.depths[5].why_not_fused is not None
    assert alone.depths[5].why_not_fused.startswith("search=optuna suggests them one by one")
    assert alone.together == [[0], [1], [2], [3], [4], [5]]
    three = Planned(store, workbench, *space, "max_concurrent_trials=3")
    assert three.depths[5].num_units == len(three.units) == 2
    assert three.depths[5].why_not_fused is None


# Which trials train together


def test_heads_on_one_tap_train_together_and_groups_that_train_alone(store: TapStore, workbench: Workbench) -> None:
    planned = Planned(store, workbench, "space.freeze_depth=[0,4,all]", "space.lr=[1e-3,1e-2,1e-1]")
    assert planned.together == [[0], [1], [2], [3], [4], [5], [6, 7, 8]]
    assert planned.depths[5].num_units == 1
    assert planned.depths[5].why_not_fused is None
    assert planned.depths[4].num_units == 3
    assert planned.depths[4].why_not_fused is None, "that groups train explains itself"


@pytest.mark.parametrize(
    ("space", "together"),
    [
        ("space.optimizer=[adamw,sgd]", [[0, 1, 2, 3]]),
        ("space.epochs=[50,60]", [[0, 1], [2, 3]]),
        ("space.batch_size=[16,32]", [[0, 1], [2, 3]]),
        ("space.weight_decay=[0,0.1]", [[0, 1, 2, 3]]),
        ("space.label_smoothing=[0,0.1]", [[0, 1, 2, 3]]),
        ("space.schedule=[cosine,constant]", [[0, 1, 2, 3]]),
        ("space.early_stop=[1,2]", [[0, 1, 2, 3]]),
    ],
)
def test_what_fused_trials_must_agree_in_splits_them(
    space: str, together: list[list[int]], store: TapStore, workbench: Workbench
) -> None:
    planned = Planned(store, workbench, space, "space.lr=[1e-3,1e-2]", "freeze_depth=all")
    assert planned.together == together
    assert planned.depths[5].num_units == len(together)


def test_numbers_and_all_are_one_depth(store: TapStore, workbench: Workbench) -> None:
    planned = Planned(store, workbench, "space.freeze_depth=[5,all]")
    assert planned.actions == {5: "tap"}
    assert planned.together == [[0, 1]]


def test_heads_with_dropout_train_alone_on_the_tap_that_they_share(
    tmp_path: Path, store: TapStore, workbench: Workbench
) -> None:
    torch.manual_seed(0)
    model = build("squeezenet1_1", num_classes=3, image_size=32).model
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    overrides = (
        "backbone=squeezenet1_1", f"backbone.weights={tmp_path}/own.safetensors", "backbone.keep_head=true",
        "data.image_size=32", "data.classes=[0,1,2]", "space.lr=[1e-3,1e-2]",
    )  # fmt: skip
    planned = Planned(store, workbench, *overrides, "space.freeze_depth=[4,all]", "epochs=20")
    assert {depth.action for depth in planned.plan.depths} == {"tap"}
    assert planned.together == [[0], [1], [2], [3]]
    assert {depth.why_not_fused for depth in planned.plan.depths} == {"the head has dropout or statistics of its own"}
    (wanted,) = planned.planner.passes()
    assert list(wanted.specs) == [4], "the head takes the map before the pool"
    assert {depth.freeze_depth: depth.boundary for depth in planned.plan.depths} == {4: 4, 5: 4}
    scores = [ProbeScore("squeezenet1_1", 4, ridge=0.875, knn=0.5)]
    by_depth = plan_tables(planned.plan, scores)[0]
    assert list(by_depth.columns[-2].cells) == ["0.8750", "0.8750"], "both depths show the probe of what they read"


def test_what_takes_longest_begins_first(store: TapStore, workbench: Workbench) -> None:
    planned = Planned(store, workbench, "space.freeze_depth=[all,4,2,0]", "space.lr=[1e-3,1e-2]")
    depths = [unit.trials[0].config.freeze_depth for unit in planned.units]
    assert depths == [0, 0, 2, 2, 4, 4, "all"]


def test_a_trial_alone_reads_the_tap_all_the_same(store: TapStore, workbench: Workbench) -> None:
    planned = Planned(store, workbench, "space.freeze_depth=[all]", "space.lr=[1e-3,1e-2]")
    (unit,) = planned.planner.make_units(planned.trials[1:])
    assert unit.tap is not None
    assert unit.tap.key.boundary == 5


def test_very_many_heads_are_split_into_several_units(store: TapStore, workbench: Workbench) -> None:
    planned = Planned(
        store, workbench, "space.lr=loguniform(1e-4,1e-1)", "search=random", "num_samples=300", "freeze_depth=all"
    )
    assert sorted(len(unit.trials) for unit in planned.units) == [44, 256]
    assert len({unit.name for unit in planned.units}) == 2


# From the command line


def test_a_depth_above_the_groups_of_the_backbone_is_bad_input(tmp_path: Path) -> None:
    overrides = [*SMALL, "space.freeze_depth=[0,9]", f"runs_dir={tmp_path}/runs", f"taps.location={tmp_path}/taps"]
    with pytest.raises(ConfigError) as caught:
        plan_sweep(compose_job("sweep", overrides), overrides=overrides, display=Silent())  # type: ignore[arg-type]
    assert str(caught.value) == 'freeze_depth=9: conv4 has 5 layer groups; use 0..5 or "all"'
    assert list(tmp_path.iterdir()) == []


def test_a_plan_probes_its_depths_and_leaves_nothing(tmp_path: Path) -> None:
    overrides = [
        *SMALL, "space.freeze_depth=[0,2,all]", f"runs_dir={tmp_path}/runs", f"taps.location={tmp_path}/taps"
    ]  # fmt: skip
    config = compose_job("sweep", overrides)
    planned = plan_sweep(config, overrides=overrides, display=Silent())  # type: ignore[arg-type]
    assert planned.plan.worker_memory_bytes is not None
    assert planned.plan.worker_memory_bytes > 2**30
    assert planned.plan.device_memory_bytes is None
    assert [(score.backbone, score.depth) for score in planned.probes] == [("conv4", 2), ("conv4", 5)]
    assert all(0.1 < score.best <= 1 for score in planned.probes)
    assert planned.plan.num_trials == 3
    assert list(tmp_path.iterdir()) == []


def test_a_plan_leaves_the_weights_of_the_backbone_as_they_are(store: TapStore, workbench: Workbench) -> None:
    config = compose_job("sweep", [*SMALL, "space.freeze_depth=[0,2,all]"])
    task = workbench.task(replace(list_trials(config)[0].config))
    before = {name: value.clone() for name, value in task.model.backbone.model.state_dict().items()}
    Planned(store, workbench, "space.freeze_depth=[0,2,all]", "space.lr=[1e-3,1e-2]")
    after = workbench.task(task.config).model.backbone.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
