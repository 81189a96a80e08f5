"""The ledger of a stack: what is finished isn't done again, what is damaged is, and keys say what results depend on."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import make_classification
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from graftstack.errors import StorageFullError, TrainingError, WeightsError
from graftstack.runtime import CallEnd, CallLost, InlineExecutor
from graftstack.stacking.assemble import out_of_fold
from graftstack.stacking.crossfit import CrossFit, cross_fit
from graftstack.stacking.folds import make_folds
from graftstack.stacking.ledger import Ledger
from graftstack.stacking.ledger_keys import UnkeyableError, fingerprint
from graftstack.stacking.model_file import UnstorableError, model_bytes, model_of
from graftstack.stacking.work import BaseModel, FoldResult, RefitResult
from graftstack.storage import Folder

X, Y = make_classification(120, 6, random_state=0)
FOLDS = make_folds("stratified", 3, y=Y, seed=0, is_classification=True)


class Killed(InlineExecutor):
    """Is interrupted after so many calls."""

    def __init__(self, num_calls: int) -> None:
        super().__init__()
        self.left = num_calls

    def wait(self, timeout_s: float) -> list[CallEnd]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().wait(timeout_s)


class LostAfterwards(InlineExecutor):
    """Loses each process between its task and the news of it."""

    def wait(self, timeout_s: float) -> list[CallEnd]:
        return [CallLost(end.key, "killed", is_out_of_memory=False) for end in super().wait(timeout_s)]


class Own(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Stores itself, as fine-tuned backbones do."""

    def fit(self, X: Any, y: Any) -> "Own":  # noqa: N803
        self.classes_, self.share_ = np.unique(y), float(np.mean(y))
        return self

    def predict_proba(self, X: Any) -> Any:  # noqa: N803
        return np.tile([1 - self.share_, self.share_], (len(X), 1))

    def save_to(self, folder: Folder) -> None:
        folder.write("own.json", json.dumps([self.classes_.tolist(), self.share_]).encode())

    @classmethod
    def load_from(cls, folder: Folder) -> "Own":
        model = cls()
        classes, model.share_ = json.loads(folder.read("own.json"))
        model.classes_ = np.array(classes)
        return model


def base(name: str, estimator: Any, **changes: Any) -> BaseModel:
    return BaseModel(**{"name": name, "estimator": estimator, "method": "predict_proba", **changes})


def bases() -> list[BaseModel]:
    return [
        base("forest", RandomForestClassifier(5, random_state=0)),
        base("linear", make_pipeline(StandardScaler(), LogisticRegression())),
    ]


def fit(folder: Path, models: Sequence[BaseModel] | None = None, **changes: Any) -> CrossFit:
    options = {"executor": InlineExecutor(), "ledger": Ledger(Folder(folder)), **changes}
    data = {"views": {"X": X}, "y": Y, "folds": FOLDS}
    data.update({key: options.pop(key) for key in data.keys() & options.keys()})
    levels = options.pop("levels", [models or bases()])
    return cross_fit(levels, data["views"], data["y"], data["folds"], **options)


def tables(fitted: CrossFit) -> list[Any]:
    return [out_of_fold(one, folds) for level, folds in zip(fitted.levels, fitted.folds, strict=True) for one in level]


def assert_same(first: CrossFit, second: CrossFit) -> None:
    for one, other in zip(tables(first), tables(second), strict=True):
        assert one.tobytes() == other.tobytes()
    for one, other in zip(first.levels[0], second.levels[0], strict=True):
        assert one.model.predict_proba(X).tobytes() == other.model.predict_proba(X).tobytes()


@pytest.mark.parametrize("mode", ["refit", "bag"])
def test_what_is_finished_is_not_done_again(tmp_path: Path, mode: str) -> None:
    first = fit(tmp_path, mode=mode)
    second = fit(tmp_path, mode=mode)
    assert (first.num_done, first.num_known) == (8 if mode == "refit" else 6, 0)
    assert (second.num_done, second.num_known) == (0, first.num_done)
    assert_same(first, second)


def test_after_an_interrupt_only_what_was_not_finished_is_done(tmp_path: Path) -> None:
    levels = [bases(), [base("above", LogisticRegression())]]
    whole = fit(tmp_path / "whole", levels=levels)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", levels=levels, executor=Killed(5))
    resumed = fit(tmp_path / "cut", levels=levels)
    assert (resumed.num_known, resumed.num_done) == (5, 12 - 5)
    assert_same(whole, resumed)


def test_a_process_that_is_lost_after_it_has_stored_its_result_is_not_missed(tmp_path: Path) -> None:
    levels = [bases(), [base("above", LogisticRegression())]]
    lost = fit(tmp_path / "lost", levels=levels, executor=LostAfterwards())
    assert (lost.num_known, lost.num_done) == (12, 0)
    assert_same(lost, fit(tmp_path / "whole", levels=levels))


@pytest.mark.parametrize("suffix", [".json", ".npz", ".skops"])
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "gone"])
def test_a_damaged_entry_is_done_again(
    tmp_path: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = fit(tmp_path)
    victim = sorted(tmp_path.glob(f"*{suffix}"))[0]
    data = victim.read_bytes()
    if damage == "gone":
        victim.unlink()
    else:
        flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        victim.write_bytes({"cut": data[: len(data) // 2], "changed": flipped, "empty": b""}[damage])
    second = fit(tmp_path)
    assert (second.num_done, second.num_known) == (1, 7)
    assert ("runs again" in caplog.text) == ((suffix, damage) != (".json", "gone"))
    assert_same(first, second)
    assert fit(tmp_path).num_done == 0


def test_a_name_is_no_part_of_a_key_and_all_that_matters_is(tmp_path: Path) -> None:
    def known(model: BaseModel, **changes: Any) -> int:
        return fit(tmp_path, [model], **changes).num_known

    forest = RandomForestClassifier(5, random_state=0)
    weights = {"sample_weight": np.linspace(1, 2, 120)}
    fit(tmp_path, [base("forest", forest)])
    assert known(base("renamed", RandomForestClassifier(5, random_state=0))) == 4
    assert known(base("forest", RandomForestClassifier(6, random_state=0))) == 0
    assert known(base("forest", RandomForestClassifier(5, random_state=1))) == 0
    assert known(base("forest", forest, method="predict")) == 0
    assert known(base("forest", forest, fit_params=weights)) == 0
    assert known(base("forest", forest), views={"X": X + 1e-9}) == 0
    assert known(base("forest", forest), y=1 - Y) == 0
    assert known(base("forest", forest), seed=1) == 0
    others = make_folds("stratified", 3, y=Y, seed=1, is_classification=True)
    assert known(base("forest", forest), folds=others) == 1  # the refit learns from all rows in any case


def test_a_model_of_its_own_kind_is_stored_by_itself(tmp_path: Path) -> None:
    first = fit(tmp_path, [base("own", Own())])
    assert sorted(path.name for path in tmp_path.glob("*.model/*")) == ["own.json"]
    second = fit(tmp_path, [base("own", Own())])
    assert second.num_done == 0
    assert_same(first, second)
    next(tmp_path.glob("*.model/own.json")).write_text("[[0, 1], 0.25]")
    assert fit(tmp_path, [base("own", Own())]).num_done == 1


def test_a_model_of_its_own_kind_that_can_not_be_read_is_fitted_again(tmp_path: Path) -> None:
    class Unreadable(Own):
        @classmethod
        def load_from(cls, folder: Folder) -> "Own":
            raise WeightsError(f"{folder}: of another model; train it again")

    assert fit(tmp_path, [base("own", Unreadable())]).num_done == 4
    assert fit(tmp_path, [base("own", Unreadable())]).num_done == 1


def test_a_worker_that_cannot_write_leaves_it_to_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, inside = Ledger.write, []

    def refused(*args: Any) -> Any:
        inside.append("the worker's disk")
        monkeypatch.setattr(Ledger, "write", write)
        raise StorageFullError("no space left")

    monkeypatch.setattr(Ledger, "write", refused)
    assert fit(tmp_path).num_done == 8
    assert inside
    assert fit(tmp_path).num_done == 0


def test_where_something_lies_is_no_part_of_a_key_and_versions_of_packages_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Located(Own):
        key_packages = ("packaging",)

        def __init__(self, path: str = "", depth: int = 0) -> None:
            self.path, self.depth = path, depth

        def key_params(self) -> dict[str, Any]:
            return {"depth": self.depth}

    import packaging
    import scipy

    def known(model: Located) -> int:
        return fit(tmp_path, [base("own", model)]).num_known

    assert known(Located("here")) == 0
    assert known(Located("there")) == 4
    assert known(Located("here", 1)) == 0
    for package in (packaging, scipy):
        monkeypatch.setattr(package, "__version__", "0.0")
        assert known(Located("here")) == 0
        assert known(Located("here")) == 4


def test_a_frame_with_a_column_called_fingerprint_is_a_frame() -> None:
    frame = pd.DataFrame({"fingerprint": ["one", "one"], "value": [1.0, 2.0]})
    frame.take([0])
    assert fingerprint(frame) != fingerprint(frame.assign(value=[1.0, 3.0]))
    y = np.arange(60) % 2
    rows = pd.DataFrame({"fingerprint": np.arange(60.0), "value": np.arange(60.0) % 7})
    folds = make_folds("stratified", 3, y=y, seed=0, is_classification=True)
    fitted = cross_fit([[base("one", LogisticRegression())]], {"X": rows}, y, folds, executor=InlineExecutor())
    assert fitted.levels[0][0].model.feature_names_in_.tolist() == ["fingerprint", "value"]


def test_a_model_that_cannot_be_stored_is_fitted_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Local(DummyClassifier):  # type: ignore[misc]
        def __getstate__(self) -> Any:
            raise TypeError("holds a socket")

    ledger = Ledger(Folder(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert "can't store Local" in str(ledger.write("key", RefitResult(Local(), 1.0), Local()))
    assert ledger.find("key", Local()) is None
    assert ledger.write("text", FoldResult(np.array(["a", None], dtype=object), 1.0, 1.0, None), Local()) is not None


def test_a_parameter_that_cannot_be_told_from_others_keeps_a_base_out_of_the_ledger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_pipeline(FunctionTransformer(lambda rows: rows), LogisticRegression())
    assert fit(tmp_path, [base("odd", model)]).num_done == 4
    assert fit(tmp_path, [base("odd", model)]).num_known == 0
    assert "odd: not in the ledger" in caplog.text


@pytest.mark.parametrize("shape", [(4,), (4, 3), (0, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "<U5"])
def test_predictions_come_back_to_the_bit(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    ledger = Ledger(Folder(tmp_path))
    found = np.random.default_rng(0).normal(size=shape).astype(dtype)
    ledger.write("one", FoldResult(found, 0.1, 0.2, None), DummyClassifier())
    ledger.write("several", FoldResult([found, found + found if dtype != "<U5" else found], 0.1, 0.2, None), None)
    one, several = ledger.find("one", DummyClassifier()), ledger.find("several", None)
    assert isinstance(one, FoldResult)
    assert isinstance(several, FoldResult)
    assert (one.predictions.dtype, one.predictions.shape) == (found.dtype, shape)
    assert one.predictions.tobytes() == found.tobytes()
    assert (one.fit_s, one.predict_s) == (0.1, 0.2)
    assert isinstance(several.predictions, list)
    assert len(several.predictions) == 2


def test_a_full_disk_ends_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Folder, name: str, data: bytes) -> None:
        raise StorageFullError("no space left")

    monkeypatch.setattr(Folder, "write", full)
    with pytest.raises(StorageFullError):
        fit(tmp_path, on_error="drop")


def test_the_rest_is_kept_when_a_base_fails(tmp_path: Path) -> None:
    bad = base("bad", LogisticRegression(C=-1.0))
    with pytest.raises(TrainingError, match="base model bad fold 1 of 3"):
        fit(tmp_path, [*bases(), bad])
    assert fit(tmp_path, [*bases(), bad], on_error="drop").num_known >= 1


@pytest.mark.parametrize(
    "estimator", [HistGradientBoostingClassifier(max_iter=3), make_pipeline(StandardScaler(), LogisticRegression())]
)
def test_models_are_stored_as_data(estimator: Any) -> None:
    fitted = estimator.fit(X, Y)
    assert model_of(model_bytes(fitted)).predict_proba(X).tobytes() == fitted.predict_proba(X).tobytes()


def test_types_of_strangers_are_not_made() -> None:
    with pytest.raises(UnstorableError, match=r"it holds .*Own"):
        model_bytes(Own().fit(X, Y))
    with pytest.raises(UnstorableError, match="can't be read"):
        model_of(b"not a model")
    with pytest.raises(UnstorableError, match=r"builtins\.eval"):
        model_bytes(FunctionTransformer(eval))
    with pytest.raises(UnstorableError, match="numpy"):
        model_bytes(FunctionTransformer(np.load))


def test_fingerprints_tell_values_apart_and_know_equal_ones() -> None:
    from scipy import sparse

    frame = pd.DataFrame({"a": [1.0, np.nan], "b": ["x", None], "c": pd.Categorical(["u", "v"])})
    assert fingerprint(frame) == fingerprint(frame.copy()) != fingerprint(frame.rename(columns={"a": "d"}))
    assert fingerprint(frame) != fingerprint(frame.fillna({"b": "y"}))
    matrix = sparse.csr_matrix(X)
    before = fingerprint(matrix)
    assert matrix.has_canonical_format
    assert fingerprint(matrix) == before != fingerprint(sparse.csr_matrix(X + 1))
    assert fingerprint([1, 2]) != fingerprint([12]) != fingerprint([1.0, 2])
    assert fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
    text = "ab"
    assert fingerprint(np.array([text, text], dtype=object)) == fingerprint(np.array(["ab", "a" + "b"], dtype=object))
    cells = pd.Series([1, "a"], dtype=object)
    assert fingerprint(cells) == fingerprint(cells.copy()) != fingerprint(pd.Series(["1", "a"], dtype=object))
    with pytest.raises(UnkeyableError, match="lambda"):
        fingerprint(lambda: 0)
    with pytest.raises(UnkeyableError, match="column 'a' can't be hashed"):
        fingerprint(pd.DataFrame({"a": [[1], [2]]}))
