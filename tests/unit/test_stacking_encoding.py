"""Tables become numbers inside a fold, and nothing of the fold's other rows gets in."""

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import skops.io
from scipy import sparse
from sklearn.base import clone
from sklearn.ensemble import (
    AdaBoostClassifier,
    ExtraTreesRegressor,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

from graftstack.errors import DataError
from graftstack.stacking.encoding import TableEncoder, with_encoding
from graftstack.stacking.schema import TableSchema, infer_schema


def schema_of(**columns: Any) -> TableSchema:
    return infer_schema(pa.table(columns), list(columns)).schema


def frame(**columns: Any) -> pd.DataFrame:
    table = pa.table(columns)
    return infer_schema(table, list(columns)).schema.frame(table)


def encoder(data: pd.DataFrame, **options: Any) -> TableEncoder:
    numbers = [name for name in data if data[name].dtype == float]
    categories = [name for name in data if name not in numbers]
    return TableEncoder(tuple(numbers), tuple(categories), **options)


AGES = frame(age=[1.0, 3.0, None, 5.0], pet=["dog", "dog", "cat", None])


def test_trees_get_numbers_as_they_are_and_categories_by_frequency() -> None:
    found = encoder(AGES, kind="ordered", takes_missing=True).fit_transform(AGES)
    assert np.array_equal(found, [[1, 0], [3, 0], [np.nan, 1], [5, np.nan]], equal_nan=True)


def test_trees_that_take_no_gaps_get_the_median_a_mark_and_minus_one() -> None:
    found = encoder(AGES, kind="ordered").fit_transform(AGES)
    assert found.tolist() == [[1, 0, 0], [3, 0, 0], [3, 1, 1], [5, 0, -1]]


def test_others_get_one_scale_a_column_a_category_and_marks_for_gaps() -> None:
    data = frame(age=[1.0, 3.0, None, 5.0, *[3.0] * 8], pet=["dog"] * 5 + ["cat"] * 5 + ["eel", None])
    fitted = encoder(data).fit(data)
    names = ["age", "age is missing", "pet=cat", "pet=dog", "pet is rare", "pet is missing"]
    assert fitted.get_feature_names_out().tolist() == names
    found = fitted.transform(data)
    assert found[:, 0].mean() == pytest.approx(0)
    assert found[:, 0].std() == pytest.approx(1)
    assert found[[0, 2, 5, 10, 11], 1:].tolist() == [
        [0, 0, 1, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_linear_models_get_ranks_as_well() -> None:
    data = frame(age=[1.0, 2.0, 4.0, 1000.0, None])
    fitted = encoder(data, kind="ranked").fit(data)
    assert fitted.get_feature_names_out().tolist() == ["age", "rank of age", "age is missing"]
    ranks = fitted.transform(frame(age=[0.0, 1.0, 2.0, 4.0, 1000.0, 1e9, None]))[:, 1]
    assert (np.diff(ranks[:6]) > 0).all()
    assert ranks[6] == pytest.approx(ranks[1:5].mean())


def test_histogram_boosting_is_told_of_categories_unless_it_is_told_already() -> None:
    schema = schema_of(age=[1.0, 2.0], pet=["a", "b"])
    data = frame(age=np.arange(2000.0), pet=[f"pet {row % 400}" for row in range(2000)])
    plain = HistGradientBoostingClassifier(max_iter=2, max_bins=100)
    pipeline = with_encoding(plain, schema)
    assert pipeline["model"].categorical_features == [1]
    assert plain.categorical_features == "from_dtype"
    assert pipeline.fit(data, np.arange(2000) % 2).predict(data).shape == (2000,)
    assert pipeline["encode"].transform(data)[:, 1].max() == 99
    told = with_encoding(HistGradientBoostingClassifier(categorical_features=None), schema)
    assert told["model"].categorical_features is None
    assert with_encoding(plain, schema_of(age=[1.0, 2.0]))["model"].categorical_features is None


def test_an_unseen_category_is_unknown_whatever_other_categories_the_new_table_has() -> None:
    data = frame(pet=["dog"] * 6 + ["cat"] * 5)
    new = frame(pet=["axolotl", "dog", "cat", "zebu"])
    assert encoder(data).fit(data).transform(new).tolist() == [[0, 0], [1, 0], [0, 1], [0, 0]]
    trees = encoder(data, kind="ordered", takes_missing=True).fit(data)
    assert np.array_equal(trees.transform(new), [[np.nan], [0], [1], [np.nan]], equal_nan=True)
    assert encoder(data, kind="ordered").fit(data).transform(new).tolist() == [[-1], [0], [1], [-1]]
    rare = frame(pet=["dog"] * 6 + ["cat"] * 2)
    assert encoder(rare).fit(rare).transform(new).tolist() == [[0, 1], [1, 0], [0, 1], [0, 1]]


def test_only_the_rows_of_the_fold_are_learnt_from() -> None:
    data = frame(age=[1.0, 2.0, 3.0, 1000.0], pet=["a", "b", "a", "c"])
    fold = data.iloc[:3]
    alone = frame(age=[1.0, 2.0, 3.0], pet=["a", "b", "a"])
    for kind in ("ordered", "scaled", "ranked", "positive"):
        within, apart = encoder(data, kind=kind).fit(fold), encoder(data, kind=kind).fit(alone)
        assert np.array_equal(within.transform(data), apart.transform(data))


@pytest.mark.parametrize("kind", ["ordered", "scaled", "ranked", "positive"])
def test_columns_that_are_constant_or_empty_in_a_fold_do_no_harm(kind: str) -> None:
    data = frame(a=[0.1] * 9 + [2.0], b=[None] * 9 + [1.0], pet=["x"] * 9 + ["y"], rare=[None] * 9 + ["z"])
    found = encoder(data, kind=kind).fit(data.iloc[:9]).transform(data)
    assert np.isfinite(found).all()
    assert np.ptp(found[:9], axis=0).max() == 0


@pytest.mark.parametrize("estimator", [HistGradientBoostingClassifier(max_iter=2), RandomForestClassifier(3)])
def test_trees_take_a_fold_in_which_columns_are_empty(estimator: Any) -> None:
    data = frame(age=np.arange(41.0), b=[None] * 40 + [1.0], rare=[None] * 40 + ["z"])
    pipeline = with_encoding(estimator, schema_of(age=[1.0, 2.0], b=[1.0, 2.0], rare=["y", "z"]))
    assert len(pipeline.fit(data.iloc[:40], [0, 1] * 20).predict(data)) == 41


def test_huge_numbers_stay_within_what_estimators_count_in() -> None:
    data = frame(a=[1e300, -1e300, 1.0, 2.0])
    for kind in ("ordered", "scaled", "ranked"):
        assert np.isfinite(encoder(data, kind=kind).fit_transform(data).astype(np.float32)).all()


def test_many_columns_are_sparse_where_the_estimator_takes_it() -> None:
    words = [f"w{row // 5}" for row in range(1400)]
    data = frame(word=words, word2=words[::-1], age=np.arange(1400.0))
    found = encoder(data, takes_sparse=True).fit_transform(data)
    assert sparse.issparse(found)
    assert found.shape[1] == 1 + 2 * (255 + 1)
    assert np.array_equal(found.toarray(), encoder(data).fit_transform(data))


def test_infinity_is_refused_with_the_name_of_its_column() -> None:
    data = pd.DataFrame({"age": [1.0, np.inf]})
    with pytest.raises(DataError, match="column age holds an infinite number"):
        TableEncoder(("age",)).fit(data)


def test_a_missing_column_is_named() -> None:
    fitted = encoder(AGES).fit(AGES)
    with pytest.raises(DataError, match=r"column pet is missing; add it \(did you mean pets\?\)"):
        fitted.transform(AGES.rename(columns={"pet": "pets"}))


@pytest.mark.parametrize(
    ("estimator", "kind", "takes_missing"),
    [
        (RandomForestClassifier(), "ordered", True),
        (ExtraTreesRegressor(), "ordered", True),
        (LogisticRegression(), "ranked", False),
        (AdaBoostClassifier(), "scaled", False),
        (MultinomialNB(), "positive", False),
    ],
)
def test_each_estimator_gets_what_suits_it(estimator: Any, kind: str, takes_missing: bool) -> None:
    data = frame(age=[1.0, 2.0, None] * 10, pet=["a", "b", None] * 10)
    pipeline = with_encoding(estimator, schema_of(age=[1.0, 2.0], pet=["a", "b"]))
    assert (pipeline["encode"].kind, pipeline["encode"].takes_missing) == (kind, takes_missing)
    assert len(clone(pipeline).fit(data, [0, 1, 1] * 10).predict(data)) == 30


def test_boosted_trees_take_gaps() -> None:
    lightgbm = pytest.importorskip("lightgbm")
    xgboost = pytest.importorskip("xgboost")
    data = frame(**{"age <5> [x]": [1.0, 2.0, None] * 20, "pet": ["a", "b", None] * 20})
    schema = schema_of(**{"age <5> [x]": [1.0, 2.0], "pet": ["a", "b"]})
    for estimator in (lightgbm.LGBMClassifier(verbosity=-1), xgboost.XGBClassifier(n_estimators=3)):
        pipeline = with_encoding(estimator, schema)
        assert (pipeline["encode"].kind, pipeline["encode"].takes_missing) == ("ordered", True)
        assert pipeline.fit(data, [0, 1, 1] * 20).score(data, [0, 1, 1] * 20) > 0.6


def test_a_fitted_pipeline_travels_by_pickle_and_by_skops() -> None:
    data = frame(age=[1.0, 2.0, None] * 10, pet=["a", "b", None] * 10)
    pipeline = with_encoding(LogisticRegression(), schema_of(age=[1.0, 2.0], pet=["a", "b"]))
    pipeline.fit(data, [0, 1, 1] * 10)
    stored = skops.io.dumps(pipeline)
    untrusted = skops.io.get_untrusted_types(data=stored)
    assert all(name.startswith("graftstack.") for name in untrusted)
    for copy in (pickle.loads(pickle.dumps(pipeline)), skops.io.loads(stored, trusted=untrusted)):
        assert np.array_equal(copy.predict_proba(data), pipeline.predict_proba(data))
