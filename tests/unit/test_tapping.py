"""One pass through the frozen groups leaves taps that are what the images would have come to, view by view."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftstack.config.compose import compose_job
from graftstack.finetune.counting import counting_forwards
from graftstack.finetune.inputs import Inputs
from graftstack.finetune.job import train_rank
from graftstack.finetune.tapping import PassResult, make_shards, open_tap, tap_items, tap_spec
from graftstack.finetune.task import Task, Workbench
from graftstack.finetune.training import Training
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder
from graftstack.taps.key import TapSpec
from graftstack.taps.store import TapStore
from graftstack.taps.tap import TapMissingError

CPU = torch.device("cpu")
SMALL = (
    "data=digits",
    "data.image_size=16",
    "data.num_train_per_class=13",
    "data.val_fraction=0.06",
    "backbone=conv4",
    "epochs=3",
    "batch_size=32",
    "cluster=inline",
)
VIEWS = ("augment=standard", "augment_views=2")


@pytest.fixture
def store(tmp_path: Path) -> TapStore:
    return TapStore(str(tmp_path / "taps"), budget_bytes=2**30)


@pytest.fixture(scope="module")
def workbench() -> Workbench:
    return Workbench()


def task_of(workbench: Workbench, *overrides: str) -> Task:
    return workbench.task(compose_job("finetune", [*SMALL, *overrides]))


def specs_of(task: Task, *boundaries: int, dtype: str = "fp32") -> list[TapSpec]:
    return [tap_spec(task, boundary, dtype=dtype) for boundary in boundaries]


def make(task: Task, store: TapStore, specs: Sequence[TapSpec], start: TapSpec | None = None) -> PassResult:
    """Makes whatever is missing of some taps."""
    missing = [store.missing_shards(spec) for spec in specs]
    shards = {
        shard: [position for position, lacking in enumerate(missing) if shard in lacking]
        for shard in sorted(set().union(*missing))
    }
    return make_shards(task, store, specs, shards, device=CPU, start=start)


@torch.no_grad()
def forward(task: Task, images: Tensor, boundary: int) -> Tensor:
    """Returns what the frozen groups make of uint8 images."""
    task.model.backbone.freeze(task.model.backbone.num_groups)
    return task.model.backbone.run_groups(task.images.prepared(images, CPU), 0, boundary)


def shard_file(store: TapStore, spec: TapSpec, shard: int) -> Path:
    return Path(store.location) / spec.key.digest / f"shard-{shard:03d}.arrow"


# What a pass leaves


def test_taps_at_all_boundaries_hold_what_the_images_come_to(store: TapStore, workbench: Workbench) -> None:
    task = task_of(workbench)
    specs = specs_of(task, 1, 2, 3, 4, 5)
    result = make(task, store, specs)
    rows = np.concatenate([task.data.splits.val[::-1], task.data.splits.train[3:20], task.data.splits.val[:1]])
    for spec in specs:
        tap = open_tap(task, store, spec)
        expected = forward(task, task.data.images.batch(rows), spec.key.boundary)
        assert tap.boundary == spec.key.boundary
        torch.testing.assert_close(tap.prepared(tap.plain(rows), CPU), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(tap.training(rows[:5], epoch=7), tap.plain(rows[:5]))
    assert result.num_forwards == len(tap_items(task)) == len(task.data.splits.train) + len(task.data.splits.val)
    assert result.seconds > 0


def test_a_tap_covers_no_row_that_neither_trains_nor_validates(store: TapStore, workbench: Workbench) -> None:
    task = task_of(workbench)
    rows = tap_items(task).rows
    assert len(rows) < len(task.data)
    assert rows.tolist() == sorted({*task.data.splits.train.tolist(), *task.data.splits.val.tolist()})


def test_each_image_goes_through_the_frozen_groups_once_whatever_the_number_of_taps(
    store: TapStore, workbench: Workbench
) -> None:
    task = task_of(workbench, *VIEWS)
    specs = specs_of(task, 2, 4, 5)
    assert specs[0].num_shards == 2
    made: list[int] = []
    result = make_shards(task, store, specs, {0: [0, 1, 2], 1: [0, 1, 2]}, device=CPU, on_shard=made.append)
    assert result.num_forwards == sum(made) == len(tap_items(task)) == specs[0].num_items
    assert make(task, store, specs).num_forwards == 0


def test_a_shard_that_is_missing_is_made_again_alone(store: TapStore, workbench: Workbench) -> None:
    task = task_of(workbench, *VIEWS)
    specs = specs_of(task, 2, 5)
    make(task, store, specs)
    before = {(spec, shard): shard_file(store, spec, shard).read_bytes() for spec in specs for shard in (0, 1)}
    times = {key: shard_file(store, *key).stat().st_mtime_ns for key in before}
    shard_file(store, specs[1], 1).unlink()
    with pytest.raises(TapMissingError):
        open_tap(task, store, specs[1])
    result = make(task, store, specs)
    assert result.num_forwards == len(specs[1].items_of(1))
    assert {key: shard_file(store, *key).read_bytes() for key in before} == before
    changed = {key for key in before if shard_file(store, *key).stat().st_mtime_ns != times[key]}
    assert changed == {(specs[1], 1)}


def test_a_damaged_shard_is_made_again_as_it_was(
    store: TapStore, workbench: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(workbench)
    (spec,) = specs_of(task, 3)
    make(task, store, [spec])
    file = shard_file(store, spec, 0)
    whole = file.read_bytes()
    file.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert make(task, store, [spec]).num_forwards == spec.num_items
    assert "shard-000.arrow: damaged" in caplog.text
    assert file.read_bytes() == whole


def test_a_deeper_tap_made_from_a_shallower_one_needs_no_image(store: TapStore, workbench: Workbench) -> None:
    task = task_of(workbench, *VIEWS)
    shallow, deep = specs_of(task, 2, 4)
    make(task, store, [shallow])
    with counting_forwards(task.model.backbone, freeze_depth=task.freeze_depth) as count:
        result = make(task, store, [deep], start=shallow)
    assert result.num_forwards == count.num_images == 0
    rows = task.data.splits.train[::3]
    tap = open_tap(task, store, deep)
    for epoch in (0, 1):
        expected = forward(task, task.images.training(rows, epoch=epoch), 4)
        torch.testing.assert_close(tap.prepared(tap.training(rows, epoch=epoch), CPU), expected, rtol=1e-5, atol=1e-6)


def test_a_pass_closes_the_tap_that_it_begins_with(store: TapStore, workbench: Workbench) -> None:
    task = task_of(workbench)
    shallow, deep = specs_of(task, 2, 4)
    make(task, store, [shallow])
    make(task, store, [deep], start=shallow)
    assert TapStore(store.location, budget_bytes=deep.num_bytes + 5000).make_room(0, keep=[deep.key.digest])
    assert not store.is_listed(shallow), "nobody had it in use, so that it could go"
    assert store.is_complete(deep)


def test_a_pass_begins_with_the_images_where_the_shallower_tap_is_not(store: TapStore, workbench: Workbench) -> None:
    task = task_of(workbench)
    shallow, deep = specs_of(task, 2, 4)
    assert make(task, store, [deep], start=shallow).num_forwards == deep.num_items
    assert store.is_complete(deep)


def test_a_pass_leaves_the_backbone_as_it_was(store: TapStore, workbench: Workbench) -> None:
    task = task_of(workbench, "freeze_depth=2")
    before = {name: value.clone() for name, value in task.model.named_state().items()}
    task.model.train()
    make(task, store, specs_of(task, 2, 5))
    assert all(torch.equal(value, before[name]) for name, value in task.model.named_state().items())


@pytest.mark.parametrize(("dtype", "digits"), [("fp32", 24), ("fp16", 11), ("bf16", 8)])
def test_stored_values_are_rounded_as_their_type_says(
    dtype: str, digits: int, store: TapStore, workbench: Workbench
) -> None:
    task = task_of(workbench)
    (spec,) = specs_of(task, 3, dtype=dtype)
    make(task, store, [spec])
    rows = task.data.splits.train
    tap = open_tap(task, store, spec)
    stored = tap.plain(rows)
    assert stored.element_size() == (4 if dtype == "fp32" else 2)
    assert spec.num_bytes == spec.num_items * 64 * 2 * 2 * stored.element_size()
    values = tap.prepared(stored, CPU)
    assert values.dtype == torch.float32
    expected = forward(task, task.data.images.batch(rows), 3)
    torch.testing.assert_close(values, expected, rtol=max(2.0**-digits, 1e-5), atol=1e-6)


# Training with taps


def train(task: Task, folder: Path) -> dict[str, Tensor]:
    train_rank(task, LocalWorker(), Folder(folder), on_progress=lambda _: None)
    return load_file(folder / "model" / "model.safetensors")


def tapped(task: Task, store: TapStore, boundary: int) -> Task:
    (spec,) = specs_of(task, boundary)
    make(task, store, [spec])
    return replace(task, tap=open_tap(task, store, spec))


@pytest.mark.parametrize(
    "overrides",
    [
        ("freeze_depth=2",),
        ("freeze_depth=all", "optimizer=sgd", "accumulate=2", "batch_size=16"),
        ("freeze_depth=3", "recipe=lp_ft", "epochs=2"),
        ("freeze_depth=2", "epochs=5", *VIEWS),
        ("freeze_depth=4", "recipe=gradual_unfreeze", *VIEWS),
    ],
)
def test_a_training_that_reads_a_tap_is_the_one_that_begins_with_images(
    overrides: tuple[str, ...], tmp_path: Path, store: TapStore, workbench: Workbench
) -> None:
    # Small steps: long ones of AdamW make much of the last digit of a gradient.
    small = ("optimizer.head_lr_multiplier=1", *overrides)
    expected = train(task_of(workbench, *small), tmp_path / "images")
    task = task_of(workbench, *small)
    task = tapped(task, store, task.boundary)
    with counting_forwards(task.model.backbone, freeze_depth=task.freeze_depth) as count:
        found = train(task, tmp_path / "tap")
    assert count.num_images == 0
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


def test_a_tap_shallower_than_the_frozen_groups_will_do(tmp_path: Path, store: TapStore, workbench: Workbench) -> None:
    override = "optimizer.head_lr_multiplier=1"
    expected = train(task_of(workbench, "freeze_depth=all", override), tmp_path / "images")
    found = train(tapped(task_of(workbench, "freeze_depth=all", override), store, 2), tmp_path / "tap")
    torch.testing.assert_close(found["head.weight"], expected["head.weight"], rtol=1e-4, atol=1e-5)


def test_a_training_without_a_tap_computes_what_is_frozen_each_time(tmp_path: Path, workbench: Workbench) -> None:
    def num_forwards(depth: int) -> int:
        task = task_of(workbench, f"freeze_depth={depth}", "optimizer.head_lr_multiplier=1")
        with counting_forwards(task.model.backbone, freeze_depth=task.freeze_depth) as count:
            Training(task, LocalWorker(CPU), Folder(tmp_path / str(depth))).run()
        return count.num_images

    task = task_of(workbench)
    assert num_forwards(0) == 0
    assert num_forwards(2) == 3 * (task.steps_per_epoch * 32 + len(task.data.splits.val))


# Views


def view_of(inputs: Inputs, rows: np.ndarray, epoch: int) -> Tensor:
    return inputs.prepared(inputs.training(rows, epoch=epoch), CPU)


def test_each_epoch_reads_the_view_that_it_would_have_made(store: TapStore, workbench: Workbench) -> None:
    task = task_of(workbench, *VIEWS)
    tap = tapped(task, store, 3).tap
    assert tap is not None
    rows = task.data.splits.train[::-2]
    for epoch in range(5):
        expected = forward(task, task.images.training(rows, epoch=epoch), 3)
        torch.testing.assert_close(view_of(tap, rows, epoch), expected, rtol=1e-5, atol=1e-6)
    first, second, plain = view_of(tap, rows, 0), view_of(tap, rows, 1), tap.prepared(tap.plain(rows), CPU)
    assert torch.equal(first, view_of(tap, rows, 2))
    for one, other in ((first, second), (first, plain), (second, plain)):
        assert not torch.allclose(one, other, atol=1e-2)


def test_validation_rows_have_no_views(store: TapStore, workbench: Workbench) -> None:
    task = task_of(workbench, *VIEWS)
    splits = task.data.splits
    assert len(tap_items(task)) == len(splits.train) + len(splits.val) + 2 * len(splits.train)
    tap = tapped(task, store, 5).tap
    assert tap is not None
    expected = forward(task, task.data.images.batch(splits.val), 5)
    torch.testing.assert_close(tap.prepared(tap.plain(splits.val), CPU), expected, rtol=1e-5, atol=1e-6)


def test_without_a_number_of_views_each_epoch_changes_the_images_anew(workbench: Workbench) -> None:
    task = task_of(workbench, "augment=standard")
    rows = task.data.splits.train[:8]
    seen = [task.images.training(rows, epoch=epoch) for epoch in range(4)]
    assert all(not torch.equal(one, other) for at, one in enumerate(seen) for other in seen[at + 1 :])


# Keys


def key_of(workbench: Workbench, *overrides: str, boundary: int = 2, dtype: str = "fp32") -> str:
    return specs_of(task_of(workbench, *overrides), boundary, dtype=dtype)[0].key.digest


def test_what_the_values_depend_on_is_in_the_key(workbench: Workbench, weights: str) -> None:
    other_statistics = dict(load_file(weights))
    other_statistics["block1.norm.running_mean"] = other_statistics["block1.norm.running_mean"] + 0.1
    other = str(Path(weights).with_name("other.safetensors"))
    save_file(other_statistics, other)
    file = f"backbone.weights={weights}"
    task = task_of(workbench, file)
    other_data = replace(task, data=replace(task.data, fingerprint="of other images, in the same rows"))
    digests = {
        "as it is": key_of(workbench, file),
        "weights": key_of(workbench, "backbone.weights=none"),
        "statistics of BatchNorm": key_of(workbench, f"backbone.weights={other}"),
        "boundary": key_of(workbench, file, boundary=3),
        "preprocessing": key_of(workbench, file, "data.image_size=20"),
        "precision": key_of(workbench, file, "precision=bf16"),
        "stored type": key_of(workbench, file, dtype="bf16"),
        "rows": key_of(workbench, file, "data.num_train_per_class=12"),
        "rows by the seed": key_of(workbench, file, "seed=1"),
        "data": tap_spec(other_data, 2, dtype="fp32").key.digest,
        "views": key_of(workbench, file, *VIEWS),
        "more views": key_of(workbench, file, "augment=standard", "augment_views=3"),
        "views by the seed": key_of(workbench, file, *VIEWS, "seed=1"),
    }
    assert len(set(digests.values())) == len(digests)


def test_what_the_values_do_not_depend_on_is_not_in_the_key(workbench: Workbench, weights: str) -> None:
    deeper = dict(load_file(weights))
    deeper["block3.conv.weight"] = deeper["block3.conv.weight"] * 2
    other = str(Path(weights).with_name("deeper.safetensors"))
    save_file(deeper, other)
    file = f"backbone.weights={weights}"
    same = [
        (file,),
        (f"backbone.weights={other}",),
        (file, "freeze_depth=3"),
        (file, "optimizer.lr=0.5", "optimizer=sgd", "schedule=constant", "recipe=lp_ft"),
        (file, "epochs=9", "batch_size=16", "accumulate=2", "label_smoothing=0.1", "early_stop=1"),
    ]
    assert len({key_of(workbench, *overrides) for overrides in same}) == 1
    assert key_of(workbench, f"backbone.weights={other}", boundary=3) != key_of(workbench, file, boundary=3)


def test_splits_of_the_same_rows_share_a_tap(workbench: Workbench, weights: str) -> None:
    all_rows = (f"backbone.weights={weights}", "data.num_train_per_class=null")
    assert key_of(workbench, *all_rows, "seed=1") == key_of(workbench, *all_rows, "seed=2")


def test_training_what_lies_above_changes_no_key(tmp_path: Path, workbench: Workbench) -> None:
    task = task_of(workbench, "freeze_depth=2", "epochs=1")
    before = specs_of(task, 2)[0].key.digest
    train(task, tmp_path)
    assert specs_of(task, 2)[0].key.digest == before
