"""Base models on images: fine-tuned backbones and probes learn from their fold alone, and share what is frozen."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from graftstack.backbones.registry import build
from graftstack.config.compose import compose_job
from graftstack.config.schema import FinetuneConfig
from graftstack.config.sweep import TapDtype, TapsConfig
from graftstack.data.load import ImageData, load_images
from graftstack.errors import ConfigError, DataError, WeightsError
from graftstack.finetune.artifact import save_trained
from graftstack.finetune.counting import counting_forwards
from graftstack.finetune.tapping import tap_spec
from graftstack.finetune.task import Workbench
from graftstack.finetune.training import Training
from graftstack.runtime import LocalWorker
from graftstack.stacking.backbone_model import FinetunedBackbone, trained_on
from graftstack.stacking.image_rows import ImageRows
from graftstack.stacking.ledger_keys import base_key
from graftstack.stacking.probe_model import TapProbe
from graftstack.stacking.taps import make_taps
from graftstack.stacking.warm import common_spec, lent_task
from graftstack.stacking.work import BaseModel
from graftstack.storage import Folder
from graftstack.taps.store import TapStore

SMALL = (
    *("data=digits", "data.image_size=16", "data.num_train_per_class=12", "data.val_fraction=0.03"),
    *("backbone=conv4", "epochs=2", "batch_size=16", "cluster=inline", "freeze_depth=3"),
)
NUM_FOLDS = 5

Make = Callable[..., FinetunedBackbone | TapProbe]


@pytest.fixture(scope="module")
def config(weights: str) -> FinetuneConfig:
    return compose_job("finetune", [*SMALL, f"backbone.weights={weights}"])


@pytest.fixture(scope="module")
def data(config: FinetuneConfig) -> ImageData:
    return load_images(config.data, image_size=16, seed=config.seed)


@pytest.fixture(scope="module")
def train(data: ImageData) -> ImageRows:
    return ImageRows(data, data.splits.train)


@pytest.fixture
def taps(tmp_path: Path) -> TapsConfig:
    return TapsConfig(location=str(tmp_path / "taps"))


def labels(rows: ImageRows) -> np.ndarray:
    return rows.data.labels[rows.rows]


def finetuned(config: FinetuneConfig, taps: TapsConfig | None = None) -> FinetunedBackbone:
    return FinetunedBackbone.of(config, taps)


def probe(config: FinetuneConfig, taps: TapsConfig | None = None) -> TapProbe:
    return TapProbe.of(config, LogisticRegression(C=0.1), taps)


KINDS = pytest.mark.parametrize("make", [finetuned, probe], ids=["finetuned", "probe"])


def fold_of(train: ImageRows, fold: int) -> tuple[ImageRows, ImageRows]:
    """Returns what a fold trains on, and what it tests."""
    positions = np.arange(len(train))
    return train.take(positions[positions % NUM_FOLDS != fold]), train.take(positions % NUM_FOLDS == fold)


class Corrupted:
    """Images of which some are noise."""

    def __init__(self, data: ImageData, rows: np.ndarray) -> None:
        self._images, self._rows = data.images, rows

    def __len__(self) -> int:
        return len(self._images)

    @property
    def image_size(self) -> int:
        return self._images.image_size

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        images = self._images.batch(indices)
        images[torch.from_numpy(np.isin(indices, self._rows))] = 137
        return images


# Rows of images


def test_rows_are_taken_from_rows(data: ImageData) -> None:
    rows = ImageRows(data, [5, 3, 9, 3])
    assert rows.shape == (4, 3, 16, 16)
    assert rows.take([2, 0]).rows.tolist() == [9, 5]
    assert rows.take(np.array([True, False, False, True])).rows.tolist() == [5, 3]
    assert torch.equal(rows.pixels(), data.images.batch(np.array([5, 3, 9, 3])))
    with pytest.raises(IndexError, match="the data has"):
        ImageRows(data, [len(data)])


def test_the_fingerprint_tells_rows_and_their_order_apart_and_travels(data: ImageData) -> None:
    rows = ImageRows(data, [5, 3, 9])
    content = pickle.dumps(rows)
    assert pickle.loads(content).fingerprint == rows.fingerprint == ImageRows(data, [5, 3, 9]).fingerprint
    assert len({rows.fingerprint, rows.take([1, 0, 2]).fingerprint, rows.take([0, 1]).fingerprint}) == 3
    assert len(content) < len(data) * 16 * 16
    assert replace_fingerprint(data, "other", [5, 3, 9]) != rows.fingerprint


def replace_fingerprint(data: ImageData, fingerprint: str, rows: list[int]) -> str:
    return ImageRows(replace(data, fingerprint=fingerprint), rows).fingerprint


# No leakage


@KINDS
def test_a_fold_never_reads_what_it_holds_out(make: Make, config: FinetuneConfig, train: ImageRows) -> None:
    learnt, held_out = fold_of(train, 0)
    model = make(config).fit(learnt, labels(learnt))
    noise = replace(train.data, images=Corrupted(train.data, held_out.rows), labels=np.zeros_like(train.data.labels))
    same = make(config).fit(ImageRows(noise, learnt.rows), labels(learnt))
    np.testing.assert_array_equal(model.predict_proba(held_out), same.predict_proba(held_out))
    seen = replace(train.data, images=Corrupted(train.data, learnt.rows[:20]))
    other = make(config).fit(ImageRows(seen, learnt.rows), labels(learnt))
    assert not np.array_equal(model.predict_proba(held_out), other.predict_proba(held_out))


@KINDS
def test_labels_are_those_that_are_given(make: Make, config: FinetuneConfig, train: ImageRows) -> None:
    shuffled = np.random.default_rng(0).permutation(labels(train))
    assert make(config).fit(train, shuffled).score(train, labels(train)) < 0.35
    assert probe(config).fit(train, labels(train)).score(train, labels(train)) > 0.9


def test_no_held_out_row_chooses_the_epoch(config: FinetuneConfig, train: ImageRows) -> None:
    """The last epoch is the model, whatever the configuration says."""
    eager = replace(config, early_stop=1, select=type(config.select).best)
    np.testing.assert_array_equal(
        FinetunedBackbone.of(eager).fit(train, labels(train)).predict_proba(train),
        FinetunedBackbone.of(config).fit(train, labels(train)).predict_proba(train),
    )


@KINDS
def test_the_same_rows_in_another_order_make_the_same_model(
    make: Make, config: FinetuneConfig, train: ImageRows
) -> None:
    backwards = train.take(np.arange(len(train))[::-1])
    first = make(config).fit(train, labels(train)).predict_proba(train)
    again = make(config).fit(backwards, labels(backwards)).predict_proba(train)
    np.testing.assert_allclose(first, again, atol=1e-6)


def test_fitting_again_after_another_model_changes_nothing(config: FinetuneConfig, train: ImageRows) -> None:
    learnt, held_out = fold_of(train, 1)
    model = finetuned(config).fit(learnt, labels(learnt))
    expected = model.predict_proba(held_out)
    deeper = finetuned(replace(config, freeze_depth=0)).fit(learnt, labels(learnt))
    probe(replace(config, freeze_depth="all")).fit(learnt, labels(learnt))
    np.testing.assert_array_equal(model.predict_proba(held_out), expected)
    np.testing.assert_array_equal(finetuned(config).fit(learnt, labels(learnt)).predict_proba(held_out), expected)
    assert not np.array_equal(deeper.predict_proba(held_out), expected)


# Predictions


@KINDS
def test_a_class_that_a_fold_lacks_has_no_column(make: Make, config: FinetuneConfig, train: ImageRows) -> None:
    some = train.take(np.isin(labels(train), [1, 4, 7]))
    for changes in ({}, {"class_weights": type(config.class_weights).balanced, "label_smoothing": 0.1}):
        model = make(replace(config, **changes)).fit(some, labels(some))  # type: ignore[arg-type]
        assert model.classes_.tolist() == [1, 4, 7]
        found = model.predict_proba(train)
        assert found.shape == (len(train), 3)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
        assert set(model.predict(train)) <= {1, 4, 7}


def test_a_probe_is_scikit_learns_on_the_averaged_outputs(config: FinetuneConfig, train: ImageRows) -> None:
    learnt, held_out = fold_of(train, 2)
    with lent_task(config, train.data) as task, torch.no_grad():
        task.model.backbone.eval()
        features = [
            task.model.backbone.run_groups(task.images.prepared(rows.pixels(), torch.device("cpu")), 0, 3)
            .mean(dim=(2, 3))
            .double()
            .numpy()
            for rows in (learnt, held_out)
        ]
    for estimator in (LogisticRegression(C=0.3), KNeighborsClassifier(), LinearSVC()):
        ours = TapProbe.of(config, estimator).fit(learnt, labels(learnt))
        theirs = make_pipeline(StandardScaler(), clone(estimator)).fit(features[0], labels(learnt))
        np.testing.assert_array_equal(ours.predict(held_out), theirs.predict(features[1]))
        for method in ("predict_proba", "decision_function"):
            assert hasattr(ours, method) is hasattr(theirs, method)
            if hasattr(ours, method):
                found, expected = getattr(ours, method)(held_out), getattr(theirs, method)(features[1])
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# Taps


@KINDS
def test_a_tap_changes_nothing_but_the_work(
    make: Make, config: FinetuneConfig, train: ImageRows, taps: TapsConfig
) -> None:
    learnt, held_out = fold_of(train, 3)
    without = make(config).fit(learnt, labels(learnt)).predict_proba(held_out)
    make_taps([make(config, taps)], train)
    with_tap = make(config, taps).fit(learnt, labels(learnt)).predict_proba(held_out)
    np.testing.assert_allclose(with_tap, without, atol=1e-5)


def test_each_image_goes_through_the_frozen_groups_once_over_all_folds(
    config: FinetuneConfig, train: ImageRows, taps: TapsConfig
) -> None:
    everything = replace(config, freeze_depth="all")
    models = [finetuned(config, taps), finetuned(everything, taps), probe(config, taps), probe(everything, taps)]
    for model in models:  # a blank image tells the shape of a tap
        with lent_task(model.finetuning, train.data) as task:
            common_spec(task, train.data, taps)
            backbone = task.model.backbone
    with counting_forwards(backbone, freeze_depth=backbone.num_groups) as count:
        made = make_taps(models, train)
        for model in models:
            for fold in range(NUM_FOLDS):
                learnt, held_out = fold_of(train, fold)
                clone(model).fit(learnt, labels(learnt)).predict_proba(held_out)
            clone(model).fit(train, labels(train))
        splits = train.data.splits
        assert count.num_images == made.num_forwards == len(splits.train) + len(splits.val)
        assert sorted(spec.key.boundary for _, spec in made.specs) == [3, 5]
        assert make_taps(models, train).num_forwards == 0
        unknown = ImageRows(replace(train.data, fingerprint="of other data"), train.rows[:7])
        models[2].fit(train, labels(train)).predict_proba(unknown)
        assert count.num_images == made.num_forwards + 7 + 1  # and a blank one, for the shape of a tap of that data


def test_the_tap_is_the_one_of_a_sweep_of_the_same_data(config: FinetuneConfig, taps: TapsConfig) -> None:
    of_sweep = Workbench().task(config)
    fold = replace(of_sweep.data, splits=of_sweep.data.splits._replace(train=of_sweep.data.splits.train[:50]))
    with lent_task(config, fold) as task:
        spec = common_spec(task, of_sweep.data, taps)
    assert spec == tap_spec(of_sweep, 3, dtype="fp32")


def test_a_damaged_or_missing_tap_is_replaced_by_the_images(
    config: FinetuneConfig, train: ImageRows, taps: TapsConfig, caplog: pytest.LogCaptureFixture
) -> None:
    learnt, held_out = fold_of(train, 4)
    expected = probe(config, taps).fit(learnt, labels(learnt)).predict_proba(held_out)
    made = make_taps([probe(config, taps)], train)
    for shard in Path(str(taps.location)).rglob("shard-*"):
        shard.unlink()
    again = probe(config, taps).fit(learnt, labels(learnt)).predict_proba(held_out)
    np.testing.assert_allclose(again, expected, atol=1e-5)
    assert made.specs
    assert not caplog.records


def test_taps_without_room_are_named_and_those_that_fit_are_made(
    config: FinetuneConfig, train: ImageRows, taps: TapsConfig
) -> None:
    num_items = len(train.data.splits.train) + len(train.data.splits.val)
    tight = replace(taps, budget_bytes=num_items * 64 * 4 + 20_000)
    said: list[str] = []
    models = [probe(replace(config, freeze_depth=depth), tight) for depth in (1, "all")]
    made = make_taps(models, train, say=said.append)
    assert [spec.key.boundary for spec in made.lacking] == [1]
    assert [spec.key.boundary for _, spec in made.specs] == [5]
    assert "conv4: no tap at 1" in said[0]
    assert models[0].fit(train, labels(train)).score(train, labels(train)) > 0.5


def test_held_taps_are_not_evicted(config: FinetuneConfig, train: ImageRows, taps: TapsConfig) -> None:
    made = make_taps([probe(config, taps)], train)
    (_, spec) = made.specs[0]
    store = TapStore(str(taps.location), budget_bytes=spec.num_bytes + 50_000)
    with made.hold():
        assert not store.make_room(spec.num_bytes, keep=[])
    assert store.make_room(spec.num_bytes, keep=[])


def test_augmented_views_are_read_from_a_tap_and_endless_ones_are_not(
    config: FinetuneConfig, train: ImageRows, taps: TapsConfig
) -> None:
    changed = replace(config, augment=type(config.augment).standard)
    endless, repeated = changed, replace(changed, augment_views=2)
    assert not make_taps([finetuned(endless, taps)], train).specs
    make_taps([finetuned(repeated, taps)], train)
    learnt, held_out = fold_of(train, 0)
    without = finetuned(repeated).fit(learnt, labels(learnt)).predict_proba(held_out)
    with_tap = finetuned(repeated, taps).fit(learnt, labels(learnt)).predict_proba(held_out)
    np.testing.assert_allclose(with_tap, without, atol=1e-5)
    plain = finetuned(config, taps).fit(learnt, labels(learnt)).predict_proba(held_out)
    assert not np.allclose(plain, with_tap, atol=1e-3)


# scikit-learn's contract, and travel


@KINDS
def test_clones_pickles_and_saved_models_predict_the_same(
    make: Make, config: FinetuneConfig, train: ImageRows, taps: TapsConfig, tmp_path: Path
) -> None:
    learnt, held_out = fold_of(train, 0)
    model = make(config, taps).fit(learnt, labels(learnt))
    expected = model.predict_proba(held_out)
    folder = Folder(tmp_path / "saved")
    model.save_to(folder)
    loaded = type(model).load_from(folder)
    copies: list[Any] = [
        clone(model).fit(learnt, labels(learnt)),
        pickle.loads(pickle.dumps(model)),
        loaded,
        pickle.loads(pickle.dumps(loaded)),
    ]
    loaded.save_to(Folder(tmp_path / "again"))
    copies.append(type(model).load_from(Folder(tmp_path / "again")))
    for copied in copies:
        np.testing.assert_array_equal(copied.predict_proba(held_out), expected)
        np.testing.assert_array_equal(copied.classes_, model.classes_)
        assert joblib.hash(copied.get_params()) == joblib.hash(model.get_params())
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_fitted_model_travels_without_its_frozen_groups(config: FinetuneConfig, train: ImageRows) -> None:
    model = finetuned(replace(config, freeze_depth="all")).fit(train, labels(train))
    assert set(model.weights_) == {"head.weight", "head.bias"}


def test_parameters_say_what_is_learnt_and_nothing_else(config: FinetuneConfig, tmp_path: Path) -> None:
    def key(changed: FinetuneConfig) -> str:
        return str(joblib.hash(finetuned(changed).get_params()))

    assert key(replace(config, name="a-run", early_stop=3)) == key(config)
    assert key(replace(config, seed=1)) != key(config)
    other = tmp_path / "other.safetensors"
    save_file(build("conv4").model.state_dict(), other)
    same_place = replace(config, backbone=replace(config.backbone, weights=str(other)))
    before = key(same_place)
    save_file(build("conv4").model.state_dict(), other)
    assert key(same_place) != before


def test_the_estimator_of_a_probe_can_be_set(config: FinetuneConfig) -> None:
    assert clone(probe(config)).set_params(estimator__C=7.0).estimator.C == 7.0


# What was trained before


def test_a_trial_on_all_rows_is_the_refit_already(config: FinetuneConfig, tmp_path: Path) -> None:
    trial = replace(config, select=type(config.select).last)
    task = Workbench().task(trial)
    Training(task, LocalWorker(), Folder(tmp_path / "checkpoints")).run()
    save_trained(Folder(tmp_path / "00000"), task.model, above=task.freeze_depth)
    base = FinetunedBackbone.of(trial)
    known = trained_on(base.config)
    rows = ImageRows(task.data, known.rows)
    assert known.fingerprint == task.data.fingerprint
    refit = base.fit(rows, labels(rows)).predict_proba(rows)
    np.testing.assert_array_equal(base.from_trained(str(tmp_path / "00000")).predict_proba(rows), refit)
    with pytest.raises(WeightsError, match="not the weights of conv4 with freeze_depth=2"):
        FinetunedBackbone.of(replace(trial, freeze_depth=2)).from_trained(str(tmp_path / "00000"))
    with pytest.raises(WeightsError, match="can't be read"):
        base.from_trained(str(tmp_path / "00001"))


# Bad input


def test_labels_that_are_no_classes_are_refused(config: FinetuneConfig, train: ImageRows) -> None:
    y = labels(train)
    for wrong, why in ((y + 5, "0..9"), (y / 2, "encode them"), (y[:-1], "one label each"), (y * 0, "only class")):
        with pytest.raises(DataError, match=why):
            finetuned(config).fit(train, wrong)


def test_a_batch_larger_than_a_fold_is_refused(config: FinetuneConfig, train: ImageRows) -> None:
    few = train.take(np.arange(15))
    with pytest.raises(ConfigError, match="a step takes 16 images and the training part has 15"):
        finetuned(config).fit(few, labels(few))


def test_images_of_another_size_are_refused(config: FinetuneConfig, train: ImageRows) -> None:
    large = ImageRows(load_images(config.data, image_size=24, seed=0), train.rows)
    for make in (finetuned, probe):
        with pytest.raises(DataError, match="the images have 24 pixels and conv4 is to see 16"):
            make(config).fit(large, labels(train))
        with pytest.raises(DataError, match="the images have 24 pixels and conv4 is to see 16"):
            make(config).fit(train, labels(train)).predict(large)


def test_a_probe_of_no_frozen_group_is_refused(config: FinetuneConfig, train: ImageRows) -> None:
    with pytest.raises(ConfigError, match="freeze_depth=0"):
        probe(replace(config, freeze_depth=0)).fit(train, labels(train))


def test_a_folder_that_holds_no_base_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"estimator\.json: can't be read"):
        FinetunedBackbone.load_from(Folder(tmp_path))


def test_where_images_and_taps_lie_is_no_part_of_what_is_learnt(config: FinetuneConfig, taps: TapsConfig) -> None:
    def key(estimator: FinetunedBackbone | TapProbe) -> str:
        return base_key(BaseModel(name="a", estimator=estimator, method="predict_proba"), view="", y="", seed=0)

    elsewhere = replace(config, runs_dir="other", data=replace(config.data, cache_dir="other"))
    more = replace(taps, location="other", budget_bytes=1)
    for make in (FinetunedBackbone.of, lambda config, taps: TapProbe.of(config, LogisticRegression(), taps)):
        moved = make(elsewhere, more)
        moved.config["data"]["path"] = "other"
        assert key(make(config, taps)) == key(moved)
        assert key(make(config, taps)) != key(make(replace(config, freeze_depth=2), taps))
        assert key(make(config, taps)) != key(make(config, replace(taps, dtype=TapDtype.fp16)))
        assert key(make(config, taps)) != key(make(config, None))
