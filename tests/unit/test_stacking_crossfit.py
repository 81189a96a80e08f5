"""Cross-fitting: scikit-learn's results to the bit, no barriers, the longest first, and what befalls tasks."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_iris, make_multilabel_classification, make_regression
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import KFold, TimeSeriesSplit, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import scale
from sklearn.svm import SVC, LinearSVC

from graftstack.errors import ConfigError, StorageFullError, TrainingError
from graftstack.runtime import Call, CallDone, CallEnd, CallFailed, CallLost, InlineExecutor
from graftstack.stacking.assemble import beside, meta_features, out_of_fold
from graftstack.stacking.bag import FoldBag
from graftstack.stacking.crossfit import CrossFit, Progress, cross_fit
from graftstack.stacking.folds import Folds, from_splitter, make_folds
from graftstack.stacking.task_run import Done
from graftstack.stacking.work import BaseModel, FoldResult, RefitResult, RowSource

Bits = Any
IRIS = load_iris()
X, Y = scale(IRIS.data), IRIS.target
NUM_ROWS = 50
Y_SMALL = np.arange(NUM_ROWS) % 2
FIVE = make_folds("stratified", 5, y=Y_SMALL, seed=0, is_classification=True)


class Began(NamedTuple):
    name: str
    at: float
    end: float
    num_threads: int


class Scripted:
    """Slots on a clock of its own, in which tasks take as long as their name says, or the first word of it.

    `faults`: what befalls the first, second, ... call of each task: ``fail``, ``lost`` or ``oom``; then all is well.
    """

    def __init__(self, num_slots: int, seconds: dict[str, float], faults: dict[str, list[str]] | None = None) -> None:
        self.num_slots = num_slots
        self.now = 0.0
        self.began: list[Began] = []
        self.expected: list[float] = []
        self.most_in_use = 0
        self.shared: list[Any] = []
        self._seconds = seconds
        self._faults = {name: list(kinds) for name, kinds in (faults or {}).items()}
        self._under_way: list[tuple[float, int, Call]] = []

    def share(self, value: Any) -> Any:
        self.shared.append(value)
        return value

    def submit(self, call: Call) -> None:
        name = call.key.partition(" #")[0]
        seconds = self._takes(name)
        self.began.append(Began(name, self.now, self.now + seconds, call.num_threads))
        heapq.heappush(self._under_way, (self.now + seconds, len(self.began), call))
        in_use = sum(call.num_threads for *_, call in self._under_way)
        assert in_use <= self.num_slots
        self.most_in_use = max(self.most_in_use, in_use)

    def wait(self, timeout_s: float) -> list[CallEnd]:
        if not self._under_way or self._under_way[0][0] > self.now + timeout_s:
            self.now += timeout_s
            return []
        self.now = self._under_way[0][0]
        ends = []
        while self._under_way and self._under_way[0][0] <= self.now:
            ends.append(self._end(heapq.heappop(self._under_way)[-1]))
        return ends

    def _end(self, call: Call) -> CallEnd:
        name = call.key.partition(" #")[0]
        kinds = self._faults.get(name)
        match kinds.pop(0) if kinds else "well":
            case "fail":
                return CallFailed(call.key, ValueError("diverged"))
            case "lost":
                return CallLost(call.key, "killed", is_out_of_memory=False)
            case "no room":
                return CallFailed(call.key, MemoryError("no 8 GiB"))
            case "storage":
                return CallFailed(call.key, StorageFullError("the base's own disk is full"))
            case "oom":
                return CallLost(call.key, "no memory", is_out_of_memory=True)
        job, folds = call.args[0], call.args[3]
        seconds = self._takes(name)
        if job.fold is None:
            return CallDone(call.key, Done(RefitResult(name, seconds), None))
        found = np.full((len(folds[job.fold].test), 2), 0.5)
        return CallDone(call.key, Done(FoldResult(found, seconds, 0.0, name if job.keeps_model else None), None))

    def _takes(self, name: str) -> float:
        return self._seconds.get(name, self._seconds[name.split(maxsplit=1)[0]])

    def cancel(self, key: str) -> None:
        self._under_way = [entry for entry in self._under_way if entry[-1].key != key]
        heapq.heapify(self._under_way)

    def expect(self, seconds: float) -> None:
        self.expected.append(seconds)

    def close(self) -> None:
        self._under_way.clear()

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def starts(self, word: str) -> list[float]:
        return [began.at for began in self.began if word in began.name]

    def named(self, name: str) -> list[Began]:
        return [began for began in self.began if began.name == name]


def base(name: str, estimator: Any = None, **changes: Any) -> BaseModel:
    options = {
        "name": name,
        "estimator": LogisticRegression() if estimator is None else estimator,
        "method": "predict_proba",
        **changes,
    }
    return BaseModel(**options)


def script(executor: Scripted, levels: Sequence[Sequence[BaseModel]], folds: Folds = FIVE, **changes: Any) -> CrossFit:
    views = {"X": np.zeros((NUM_ROWS, 2))}
    return cross_fit(levels, views, Y_SMALL, folds, executor=executor, clock=lambda: executor.now, **changes)


def fit(models: Sequence[BaseModel], rows: Any, y: Any, splitter: Any, **changes: Any) -> CrossFit:
    folds = splitter if isinstance(splitter, Folds) else from_splitter(splitter, rows, y)
    return cross_fit([models], {"X": rows}, y, folds, executor=InlineExecutor(), **changes)


def assert_bits(found: Any, expected: Any) -> None:
    if isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_bits(one, other)
    elif sparse.issparse(expected):
        assert_bits(found.toarray(), expected.toarray())
    else:
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()


# As scikit-learn has it


@pytest.mark.parametrize(
    ("estimator", "method"),
    [
        (LogisticRegression(), "predict_proba"),
        (RandomForestClassifier(5, random_state=0), "predict_proba"),
        (RandomForestClassifier(5, random_state=np.random.RandomState(3)), "predict"),
        (LinearSVC(random_state=0), "decision_function"),
        (SVC(), "predict"),
    ],
)
@pytest.mark.parametrize("rows", [X, sparse.csr_matrix(X)], ids=["dense", "sparse"])
@pytest.mark.parametrize("y", [Y, np.array(["b", "c", "a"])[Y]], ids=["numbers", "text"])
def test_a_classifier_predicts_as_in_cross_val_predict(estimator: Any, method: str, rows: Any, y: Any) -> None:
    splitter = KFold(4, shuffle=True, random_state=0)
    fitted = fit([base("one", estimator, method=method)], rows, y, splitter)
    expected = cross_val_predict(clone(estimator), rows, y, cv=splitter, method=method)
    assert_bits(out_of_fold(fitted.levels[0][0], fitted.folds[0]), expected)
    refitted = clone(estimator).fit(rows, y)
    assert_bits(getattr(fitted.levels[0][0].model, method)(rows), getattr(refitted, method)(rows))


@pytest.mark.parametrize(
    ("estimator", "method"),
    [
        (KNeighborsClassifier(), "predict_proba"),
        (MLPClassifier((4,), max_iter=500, tol=1e-1, random_state=0), "predict_proba"),
        (RandomForestClassifier(5, random_state=0), "predict"),
    ],
)
def test_several_labels_are_predicted_as_in_cross_val_predict(estimator: Any, method: str) -> None:
    rows, labels = make_multilabel_classification(80, n_classes=3, random_state=0)
    fitted = fit([base("one", estimator, method=method)], rows, labels, KFold(3))
    expected = cross_val_predict(clone(estimator), rows, labels, cv=KFold(3), method=method)
    assert_bits(out_of_fold(fitted.levels[0][0], fitted.folds[0]), expected)


@pytest.mark.filterwarnings("ignore:Number of classes in training fold:RuntimeWarning")
@pytest.mark.parametrize(
    ("estimator", "method"), [(RandomForestClassifier(3, random_state=0), "predict_proba"), (SVC(), "predict")]
)
def test_a_class_that_a_fold_lacks_keeps_its_column(estimator: Any, method: str) -> None:
    fitted = fit([base("one", estimator, method=method)], X, Y, KFold(3))  # sorted: no fold trains on what it tests
    expected = cross_val_predict(clone(estimator), X, Y, cv=KFold(3), method=method)
    assert_bits(out_of_fold(fitted.levels[0][0], fitted.folds[0]), expected)


def test_weights_are_split_with_their_rows() -> None:
    rows, targets = make_regression(60, 4, noise=1, random_state=0)
    weights = {"sample_weight": np.linspace(0.1, 2, 60)}
    fitted = fit([base("one", Ridge(), method="predict", fit_params=weights)], rows, targets, KFold(4))
    expected = cross_val_predict(Ridge(), rows, targets, cv=KFold(4), params=weights)
    assert_bits(out_of_fold(fitted.levels[0][0], fitted.folds[0]), expected)
    assert_bits(fitted.levels[0][0].model.coef_, Ridge().fit(rows, targets, **weights).coef_)


def test_a_base_without_weights_says_so_in_the_words_of_scikit_learn() -> None:
    model = base("one", KNeighborsClassifier(), fit_params={"sample_weight": np.ones(150)})
    with pytest.raises(TypeError, match="KNeighborsClassifier does not support sample weights"):
        fit([model], X, Y, KFold(3, shuffle=True), raw_errors=True)


def test_a_precomputed_kernel_is_split_in_rows_and_columns() -> None:
    kernel = X @ X.T
    splitter = KFold(3, shuffle=True, random_state=0)
    fitted = fit([base("one", SVC(kernel="precomputed"), method="predict")], kernel, Y, splitter)
    expected = cross_val_predict(SVC(kernel="precomputed"), kernel, Y, cv=splitter)
    assert_bits(out_of_fold(fitted.levels[0][0], fitted.folds[0]), expected)


def test_rows_of_our_own_kind_are_taken() -> None:
    class Source(RowSource):
        fingerprint = "iris"

        def __len__(self) -> int:
            return len(X)

        def take(self, rows: Any) -> Any:
            return X[rows]

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return X

    splitter = KFold(3, shuffle=True, random_state=0)
    own = fit([base("one")], Source(), Y, from_splitter(splitter, X, Y))
    plain = fit([base("one")], X, Y, splitter)
    assert_bits(*(out_of_fold(one.levels[0][0], one.folds[0]) for one in (own, plain)))


def test_repeats_are_averaged_and_labels_are_those_of_the_first() -> None:
    folds = make_folds("stratified", 3, y=Y, repeats=2, seed=0, is_classification=True)
    models = [base("mean", LogisticRegression()), base("label", LogisticRegression(), method="predict")]
    fitted = fit(models, X, Y, folds)
    splits = [(fold.train, fold.test) for fold in folds.folds]
    parts = [cross_val_predict(LogisticRegression(), X, Y, cv=part, method="predict_proba") for part in (
        splits[:3], splits[3:])]  # fmt: skip
    assert_bits(out_of_fold(fitted.levels[0][0], folds), np.mean(parts, axis=0))
    expected = cross_val_predict(LogisticRegression(), X, Y, cv=splits[:3])
    assert_bits(out_of_fold(fitted.levels[0][1], folds), expected)


def test_levels_learn_from_out_of_fold_predictions() -> None:
    splitter = KFold(3, shuffle=True, random_state=0)
    levels = [
        [base("a"), base("b", KNeighborsClassifier())],
        [base("above", RandomForestClassifier(3, random_state=0))],
    ]
    folds = from_splitter(splitter, X, Y)
    fitted = cross_fit(levels, {"X": X}, Y, folds, executor=InlineExecutor(), passthrough="X")
    below = [cross_val_predict(one.estimator, X, Y, cv=splitter, method="predict_proba") for one in levels[0]]
    inputs = np.hstack([*below, X])
    expected = cross_val_predict(levels[1][0].estimator, inputs, Y, cv=splitter, method="predict_proba")
    assert_bits(out_of_fold(fitted.levels[1][0], fitted.folds[1]), expected)
    refitted = clone(levels[1][0].estimator).fit(inputs, Y)
    assert_bits(fitted.levels[1][0].model.predict_proba(inputs), refitted.predict_proba(inputs))


def test_levels_over_folds_in_time_learn_from_rows_that_have_predictions() -> None:
    rows, targets = make_regression(60, 4, noise=1, random_state=0)
    levels = [[base("a", Ridge(), method="predict")], [base("above", LinearRegression(), method="predict")]]
    folds = from_splitter(TimeSeriesSplit(4), rows, targets)
    fitted = cross_fit(levels, {"X": rows}, targets, folds, executor=InlineExecutor())
    below = out_of_fold(fitted.levels[0][0], fitted.folds[0])
    assert [len(folds.folds) for folds in fitted.folds] == [4, 3]
    assert out_of_fold(fitted.levels[1][0], fitted.folds[1]).shape == (36,)
    expected = LinearRegression().fit(below.reshape(-1, 1), targets[12:])
    assert_bits(fitted.levels[1][0].model.coef_, expected.coef_)


def test_a_bag_predicts_the_mean_of_its_folds_models() -> None:
    fitted = fit([base("one"), base("two", LinearSVC(random_state=0), method="decision_function")], X, Y, KFold(
        3, shuffle=True, random_state=0), mode="bag")  # fmt: skip
    one, two = fitted.levels[0]
    assert isinstance(one.model, FoldBag)
    assert_bits(one.model.predict_proba(X), np.mean([fold.model.predict_proba(X) for fold in one.folds], axis=0))
    assert_bits(two.model.decision_function(X), np.mean([fold.model.decision_function(X) for fold in two.folds], 0))
    assert (one.model.n_features_in_, one.model.classes_.tolist()) == (4, [0, 1, 2])
    assert not hasattr(two.model, "predict_proba")
    assert fitted.num_done == 6


@pytest.mark.filterwarnings("ignore:Number of classes in training fold:RuntimeWarning")
def test_models_of_a_bag_may_lack_classes() -> None:
    fitted = fit([base("one", RandomForestClassifier(3, random_state=0))], X, Y, KFold(3), mode="bag")
    found = fitted.levels[0][0].model.predict_proba(X)
    assert found.shape == (150, 3)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert fitted.levels[0][0].model.predict(X).tolist() == np.argmax(found, axis=1).tolist()


def test_models_of_a_bag_may_lack_classes_of_one_of_several_outputs() -> None:
    labels = np.column_stack([np.arange(6) % 2, np.arange(6) % 3])
    rows = np.arange(6.0).reshape(-1, 1)
    models = [
        RandomForestClassifier(3, random_state=0).fit(rows[part], labels[part]) for part in ([0, 1, 3], [1, 2, 5])
    ]
    bag = FoldBag(models)
    assert [classes.tolist() for classes in bag.classes_] == [[0, 1], [0, 1, 2]]
    found = bag.predict_proba(rows)
    assert [part.shape for part in found] == [(6, 2), (6, 3)]
    np.testing.assert_allclose(found[1].sum(axis=1), 1)
    np.testing.assert_array_equal(found[1][:, 0], models[0].predict_proba(rows)[1][:, 0] / 2)


def test_a_bag_votes_for_the_lowest_of_labels_that_tie_and_averages_targets() -> None:
    voters = [KNeighborsClassifier(1).fit([[0.0]], [label]) for label in ("b", "a", "b", "a")]
    assert FoldBag(voters).predict([[1.0]]).tolist() == ["a"]
    guessers = [Ridge().fit([[0.0], [1.0]], [target, target]) for target in (1.0, 2.0)]
    assert FoldBag(guessers).predict([[1.0]]).tolist() == [1.5]


def test_of_two_probabilities_one_is_a_feature() -> None:
    pair, single = np.array([[0.3, 0.7]]), np.array([2.0])
    assert meta_features([pair, single], ["predict_proba", "predict"], 2).tolist() == [[0.7, 2.0]]
    assert meta_features([[pair, pair]], ["predict_proba"], 3).tolist() == [[0.7, 0.7]]
    assert sparse.issparse(beside(pair, sparse.csr_matrix([[1.0]])))


def test_a_model_that_is_known_is_not_refitted() -> None:
    known = LogisticRegression().fit(X, Y)
    fitted = fit([base("one", refitted=known)], X, Y, KFold(3, shuffle=True))
    assert fitted.levels[0][0].model is known
    assert fitted.num_done == 3


# Order


def test_the_longest_go_first_and_no_slot_idles() -> None:
    executor = Scripted(6, {"slow": 2.0, "quick": 0.2, "fast": 0.2})
    script(executor, [[base("quick"), base("slow"), base("fast")]])
    assert executor.now <= 1.1 * 2.4
    assert len(executor.began) == 18


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4, 5, 7, 12])
def test_makespan_is_near_its_bound(num_slots: int) -> None:
    seconds = {"a": 0.3, "b": 0.1, "c": 1.0, "d": 0.05, "e": 0.4, "f": 0.2}
    executor = Scripted(num_slots, seconds)
    script(executor, [[base(name) for name in seconds]])
    total = 6 * sum(seconds.values())
    assert executor.now <= 1.1 * max(total / num_slots, 1.0) + max(0.0, 1.0 - total / num_slots / 6)


def test_each_unknown_base_sends_one_task_ahead() -> None:
    executor = Scripted(3, {"a": 1.0, "b": 1.0, "c": 1.0})
    script(executor, [[base("a"), base("b"), base("c")]])
    assert [began.name.split()[0] for began in executor.began[:3]] == ["a", "b", "c"]


def test_a_level_waits_for_folds_and_never_for_refits() -> None:
    executor = Scripted(2, {"low": 1.0, "low refit": 4.0, "high": 1.0})
    script(executor, [[base("low")], [base("high")]])
    folds_end = max(began.end for began in executor.began if "low fold" in began.name)
    assert folds_end == 3.0
    assert min(executor.starts("high")) == folds_end
    assert executor.named("low refit")[0].end == 6.0
    assert executor.now <= 1.1 * 15 / 2


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_inner_threads_count_as_slots(num_slots: int) -> None:
    executor = Scripted(num_slots, {"wide": 1.0, "narrow": 0.5, "huge": 0.7})
    script(executor, [[base("wide", num_threads=2), base("narrow"), base("huge", num_threads=64)]])
    assert executor.most_in_use <= num_slots
    assert {began.num_threads for began in executor.began if "huge" in began.name} == {num_slots}
    assert len(executor.began) == 18


def test_fewer_slots_are_heeded_at_once() -> None:
    class Shrinking(Scripted):
        def wait(self, timeout_s: float) -> list[CallEnd]:
            self.num_slots = 1 if self.now >= 1 else 4
            return super().wait(timeout_s)

    executor = Shrinking(4, {"a": 1.0})
    script(executor, [[base("a")]])
    late = sorted((began for began in executor.began if began.at >= 2), key=lambda began: began.at)
    assert len(executor.began) == 6
    assert all(one.end <= other.at for one, other in pairwise(late))


def test_large_values_are_shared_once() -> None:
    executor, weights = Scripted(2, {"a": 1.0, "b": 1.0}), {"sample_weight": np.ones(NUM_ROWS)}
    script(executor, [[base("a", fit_params=weights), base("b", fit_params=weights)]])
    assert len(executor.shared) == 4  # rows, labels that are numbers already, folds, weights


def test_the_executor_hears_how_much_work_is_left() -> None:
    executor = Scripted(1, {"a": 1.0, "b": 1.0})
    script(executor, [[base("a"), base("b")]])
    assert executor.expected[0] == pytest.approx(10.25, abs=0.3)
    assert executor.expected == sorted(executor.expected, reverse=True)


def test_progress_says_what_runs_and_what_is_left() -> None:
    told: list[Progress] = []
    executor = Scripted(2, {"a": 3.0, "b": 0.5})
    script(executor, [[base("a"), base("b")]], tell=told.append)
    assert told[0].running == ("a fold 1 of 5",)
    assert any(progress.just_ended is None for progress in told)
    assert told[0].seconds_left is None
    assert (told[-1].done, told[-1].total, told[-1].running, told[-1].seconds_left) == (12, 12, (), 0)
    ended = Counter(progress.just_ended for progress in told if progress.just_ended)
    assert set(ended.values()) == {1}
    assert len(ended) == 12


# Faults


def test_a_failure_is_tried_once_more() -> None:
    executor = Scripted(2, {"a": 1.0}, {"a fold 2 of 5": ["fail"]})
    fitted = script(executor, [[base("a")]])
    assert len(executor.named("a fold 2 of 5")) == 2
    assert fitted.num_done == 6


def test_a_second_failure_names_base_fold_and_error() -> None:
    executor = Scripted(2, {"a": 1.0}, {"a fold 2 of 5": ["fail", "fail"]})
    with pytest.raises(
        TrainingError, match=r"base model a fold 2 of 5: diverged \(ValueError\), twice; .*on_error=drop"
    ):
        script(executor, [[base("a")]])


def test_raw_errors_are_those_of_the_estimator() -> None:
    executor = Scripted(2, {"a": 1.0}, {"a refit": ["fail", "fail"]})
    with pytest.raises(ValueError, match="diverged"):
        script(executor, [[base("a")]], raw_errors=True)


def test_a_base_that_fails_is_left_out_and_nothing_more_of_it_starts() -> None:
    executor = Scripted(1, {"a": 1.0, "b": 1.0}, {"a fold 1 of 5": ["fail", "fail"]})
    fitted = script(executor, [[base("a"), base("b")]], on_error="drop")
    assert [one.base.name for one in fitted.levels[0]] == ["b"]
    assert fitted.dropped == {"a": "fold 1 of 5: diverged (ValueError), twice"}
    failed_at = executor.named("a fold 1 of 5")[1].end
    assert all(began.at < failed_at for began in executor.began if began.name.startswith("a "))


def test_without_a_base_left_there_is_no_stack() -> None:
    executor = Scripted(2, {"a": 1.0}, {"a fold 1 of 5": ["fail", "fail"]})
    with pytest.raises(TrainingError, match=r"no base model is left, the last was a \(fold 1 of 5"):
        script(executor, [[base("a")]], on_error="drop")


def test_a_level_begins_again_without_a_base_whose_refit_fails_late() -> None:
    executor = Scripted(2, {"a": 1.0, "b": 1.0, "high": 3.0}, {"a refit": ["fail", "fail"]})
    levels = [[base("a"), base("b")], [base("high")]]
    fitted = script(executor, levels, on_error="drop")
    assert [[one.base.name for one in level] for level in fitted.levels] == [["b"], ["high"]]
    assert "a" in fitted.dropped
    assert max(Counter(began.name for began in executor.began if "high" in began.name).values()) == 2


def test_a_lost_process_is_not_the_fault_of_the_base() -> None:
    executor = Scripted(2, {"a": 1.0}, {"a fold 1 of 5": ["lost"] * 3})
    assert script(executor, [[base("a")]]).num_done == 6
    losses = Scripted(2, {"a": 1.0}, {"a fold 1 of 5": ["lost"] * 4})
    with pytest.raises(TrainingError, match="a fold 1 of 5: lost its process 4 times, at last: killed"):
        script(losses, [[base("a")]])


@pytest.mark.parametrize("faults", [["oom"], ["no room"], ["lost", "lost"]])
def test_what_may_harm_its_neighbours_runs_alone(faults: list[str]) -> None:
    executor = Scripted(3, {"a": 1.0, "b": 0.7}, {"a fold 1 of 5": faults})
    script(executor, [[base("a"), base("b")]])
    alone = executor.named("a fold 1 of 5")[-1]
    beside_it = [
        other for other in executor.began if other is not alone and alone.at < other.end and other.at < alone.end
    ]
    assert beside_it == []
    assert executor.most_in_use == 3


@pytest.mark.parametrize("fault", ["oom", "no room"])
def test_out_of_memory_alone_is_a_failure(fault: str) -> None:
    executor = Scripted(3, {"a": 1.0, "b": 1.0}, {"a fold 1 of 5": [fault, fault]})
    fitted = script(executor, [[base("a"), base("b")]], on_error="drop")
    assert "out of memory with nothing beside it" in fitted.dropped["a"]


def test_what_a_base_itself_can_not_store_is_its_own_failure() -> None:
    executor = Scripted(1, {"a": 1.0, "b": 1.0}, {"a fold 1 of 5": ["storage", "storage"]})
    fitted = script(executor, [[base("a"), base("b")]], on_error="drop")
    assert "the base's own disk is full" in fitted.dropped["a"]


# What is left on the executor


class Interrupted(Scripted):
    """Is interrupted by Ctrl-C at a time."""

    def wait(self, timeout_s: float) -> list[CallEnd]:
        if self.now >= 2:
            raise KeyboardInterrupt
        return super().wait(timeout_s)


@pytest.mark.parametrize("how", ["interrupt", "failure", "time"])
def test_nothing_is_left_under_way_however_it_ends(how: str) -> None:
    make = Interrupted if how == "interrupt" else Scripted
    faults = {"a fold 1 of 5": ["fail", "fail"]} if how == "failure" else {}
    executor = make(3, {"a": 1.0, "b": 7.0}, faults)
    ends = {"interrupt": pytest.raises(KeyboardInterrupt), "failure": pytest.raises(TrainingError)}
    with ends.get(how, nullcontext()):
        script(executor, [[base("a"), base("b")]], time_limit_s=5.0 if how == "time" else None)
    assert len(executor.began) > 3
    assert executor.num_under_way == 0


def test_slots_of_a_base_that_is_left_out_are_free_at_once() -> None:
    executor = Scripted(2, {"a": 9.0, "a fold 1 of 5": 1.0, "b": 1.0}, {"a fold 1 of 5": ["fail", "fail"]})
    script(executor, [[base("a"), base("b")]], on_error="drop")
    assert executor.now < 9.0


def test_ends_of_calls_of_others_are_not_taken_for_its_own() -> None:
    class Shared(Scripted):
        def wait(self, timeout_s: float) -> list[CallEnd]:
            others = [CallDone(f"a fold 1 of 5 #{number}", "not ours") for number in range(3)]
            return [*others, *super().wait(timeout_s)]

    fitted = script(Shared(2, {"a": 1.0}), [[base("a")]])
    assert (fitted.num_done, len(fitted.levels[0][0].folds)) == (6, 5)


# Time


def test_bases_are_made_whole_one_after_another_when_time_is_limited() -> None:
    executor = Scripted(2, {"a": 1.0, "b": 1.0, "c": 1.0})
    fitted = script(executor, [[base("a"), base("b"), base("c")]], time_limit_s=7.0)
    assert [one.base.name for one in fitted.levels[0]] == ["a", "b"]
    assert fitted.dropped == {"c": "not finished within time_limit_s=7"}
    assert executor.now == 7.0
    assert max(executor.starts("")) < 7.0


def test_levels_that_are_not_finished_in_time_are_left_out() -> None:
    executor = Scripted(1, {"a": 1.0, "b": 1.0, "high": 10.0})
    fitted = script(executor, [[base("a"), base("b")], [base("high")]], time_limit_s=15.0)
    assert [[one.base.name for one in level] for level in fitted.levels] == [["a", "b"]]
    assert set(fitted.dropped) == {"high"}


def test_a_level_that_learnt_from_an_unfinished_base_is_left_out() -> None:
    executor = Scripted(8, {"a": 1.0, "b": 1.0, "high": 0.1}, {"b refit": ["lost"] * 3})
    fitted = script(executor, [[base("a"), base("b")], [base("high")]], time_limit_s=3.5)
    assert [[one.base.name for one in level] for level in fitted.levels] == [["a"]]
    assert set(fitted.dropped) == {"b", "high"}


def test_no_base_in_time_is_an_error() -> None:
    with pytest.raises(TrainingError, match="time_limit_s=2: no base model was finished in time"):
        script(Scripted(2, {"a": 1.0}), [[base("a")]], time_limit_s=2.0)


def test_time_that_suffices_changes_nothing() -> None:
    fitted = script(Scripted(2, {"a": 1.0}), [[base("a")]], time_limit_s=60.0)
    assert fitted.dropped == {}
    assert fitted.num_done == 6


# Input


def test_names_are_distinct_and_views_are_there() -> None:
    executor = Scripted(1, defaultdict(float))
    with pytest.raises(ConfigError, match="2 are called a"):
        script(executor, [[base("a")], [base("a")]])
    with pytest.raises(ConfigError, match=r"view table: .* only X"):
        script(executor, [[base("a", view="table")]])
    with pytest.raises(ConfigError, match="without base models"):
        script(executor, [[]])
