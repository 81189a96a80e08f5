"""From tables with categories and gaps to the numbers that an estimator takes; fitted inside each fold."""

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.pipeline import Pipeline
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted

from graftstack.errors import DataError, did_you_mean
from graftstack.stacking.schema import TableSchema

if TYPE_CHECKING:
    import pandas as pd

Numbers = npt.NDArray[np.float64]

_ORDERED = ("DecisionTree", "ExtraTree", "RandomForest", "GradientBoosting", "HistGradientBoosting", "LGBM", "XGB")
"""What the names of estimators that split the values of one column at a time begin with."""
_LINEAR_MODULES = ("sklearn.linear_model", "sklearn.neural_network", "sklearn.discriminant_analysis")
"""Where estimators come from that weigh columns; `LinearSVC` and the like are known by their names."""
_HISTOGRAM = "HistGradientBoosting"
_NUM_KNOTS = 1000
"""Quantiles that ranks are told by."""
_LARGEST = 1e38
"""Numbers beyond it are cut to it: estimators that count in float32 can't hold them, and squares stay finite."""
_MIN_COUNT, _MAX_WORDS = 5, 255
"""Categories of fewer rows than this, and all but so many of the commonest, share one column: they are rare."""
_UNKNOWN, _MISSING = -2, -1
_DENSE_COLUMNS = 256
"""Up to so many columns a dense array is handled faster than a sparse one."""


def with_encoding(estimator: Any, schema: TableSchema) -> Pipeline:
    """Returns `estimator` behind an encoder of tables: a pipeline of the steps ``encode`` and ``model``.

    Trees and boosted trees get codes in the order of frequency, all others columns of one scale and a column for each
    category; linear models and networks get the ranks of numbers as well. scikit-learn's histogram gradient boosting is
    told which columns are categories, unless its parameters say so already: it groups them better than any order.
    Parameters of `fit` go to the estimator as ``model__NAME``.
    """
    tags = get_tags(estimator)
    encoder = TableEncoder(
        numbers=schema.numbers,
        categories=schema.categories,
        kind=_kind_for(estimator),
        takes_missing=tags.input_tags.allow_nan,
        takes_sparse=tags.input_tags.sparse,
    )
    if type(estimator).__name__.startswith(_HISTOGRAM) and estimator.categorical_features == "from_dtype":
        encoder.set_params(num_codes=estimator.max_bins)
        first = len(schema.numbers)
        estimator = clone(estimator).set_params(
            categorical_features=list(range(first, first + len(schema.categories))) or None
        )
    return Pipeline([("encode", encoder), ("model", estimator)])


def _kind_for(estimator: Any) -> str:
    kind = type(estimator)
    if kind.__name__.startswith(_ORDERED):
        return "ordered"
    if get_tags(estimator).input_tags.positive_only:
        return "positive"
    is_linear = kind.__module__.startswith(_LINEAR_MODULES) or kind.__name__.startswith("Linear")
    return "ranked" if is_linear else "scaled"


class TableEncoder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Encodes a DataFrame as `TableSchema.frame` makes it, ``[N, F] -> float64 [N, F']``.

    All that it knows, categories included, is from the rows it was fitted on: a category that they lack is unknown, and
    a number that they lack is 0. A column of one value becomes a column of one value.

    Args:
        numbers: names of the columns that are numbers.
        categories: names of those that are categories.
        kind: see below.
        takes_missing: whether the estimator takes NaN.
        takes_sparse: whether it takes sparse matrices.
        num_codes: ordered: how many categories a column may have; the rarest share the last code.

    Kinds:
        - ordered: numbers as they are; category i of a column, from the commonest (0) to the rarest, as i: neighbours
          are alike in how much is known of them, which trees split better than the alphabet. Missing and unknown are
          NaN, or, for estimators that can't take it, the median of numbers, with a column that says so, and -1.
        - scaled: numbers with mean 0 and deviation 1, the median where missing, with a column that says so; a column
          of 0 and 1 for each category, for missing, and for all rare ones together, among which unknown ones are
          counted; without rare ones they are 0 throughout.
        - ranked: as scaled, and behind the columns of numbers one for the rank of each among the rows fitted on, which
          bends where a straight line is wrong, and which no outlier moves.
        - positive: as scaled, but numbers lie in 0..1, cut off there for later rows.
    """

    key_packages = ("pandas",)

    def __init__(
        self,
        numbers: tuple[str, ...] = (),
        categories: tuple[str, ...] = (),
        *,
        kind: str = "scaled",
        takes_missing: bool = False,
        takes_sparse: bool = False,
        num_codes: int | None = None,
    ) -> None:
        self.numbers = numbers
        self.categories = categories
        self.kind = kind
        self.takes_missing = takes_missing
        self.takes_sparse = takes_sparse
        self.num_codes = num_codes

    def fit(self, X: "pd.DataFrame", y: Any = None) -> Self:  # noqa: ARG002, N803 - scikit-learn's contract
        """Learns medians, scales and categories from the rows of `X`."""
        numbers = self._numbers(X)
        self.medians_ = np.array([_median(column) for column in numbers.T])
        self.gaps_ = np.flatnonzero(np.isnan(numbers).any(axis=0))
        self.empty_ = np.flatnonzero(np.isnan(numbers).all(axis=0))
        filled = np.where(np.isnan(numbers), self.medians_, numbers)
        if self.kind == "positive":
            self.shifts_, spans = filled.min(axis=0), np.ptp(filled, axis=0)
        else:
            self.shifts_, spans = filled.mean(axis=0), filled.std(axis=0)
        # A column of one value may deviate from its mean by rounding alone.
        noise = 1e-12 * np.abs(self.shifts_)
        self.scales_ = np.where(spans > noise, spans, 1.0)
        self.knots_ = np.quantile(filled, np.linspace(0, 1, min(_NUM_KNOTS, len(filled))), axis=0)
        counted = [_counted(self._column(X, name)) for name in self.categories]
        self.words_ = [one.words for one in counted]
        self.num_common_ = [min(int((one.counts >= _MIN_COUNT).sum()), _MAX_WORDS) for one in counted]
        self.has_missing_ = [bool(self._column(X, name).isna().any()) for name in self.categories]
        self.n_features_in_ = X.shape[1]
        self.feature_names_in_ = np.array(list(X.columns), dtype=object)
        return self

    def transform(self, X: "pd.DataFrame") -> Any:  # noqa: N803
        """Returns the rows of `X` encoded: an array, or a CSR matrix where the columns are many.

        Raises:
            DataError: a column is missing, or holds an infinite number.
        """
        check_is_fitted(self, "words_")
        numbers = self._numbers(X)
        missing = np.isnan(numbers)
        gaps = missing[:, self.gaps_].astype(float)
        codes = [_codes(self._column(X, name), words) for name, words in zip(self.categories, self.words_, strict=True)]
        if self.num_codes is not None:
            codes = [np.minimum(column, self.num_codes - 1) for column in codes]
        if self.kind == "ordered" and self.takes_missing:
            numbers[:, self.empty_] = 0.0  # a column of nothing but gaps is more than histogram boosting can take
            gappy = [
                np.where(column < 0, np.nan if len(self.words_[at]) else 0.0, column) for at, column in enumerate(codes)
            ]
            return np.column_stack([numbers, *gappy])
        filled = np.where(missing, self.medians_, numbers)
        if self.kind == "ordered":
            return np.column_stack([filled, gaps, *(np.maximum(column, -1) for column in codes)])
        scaled = (filled - self.shifts_) / self.scales_
        if self.kind == "positive":
            scaled = np.clip(scaled, 0, 1)
        if self.kind == "ranked":
            scaled = np.column_stack([scaled, self._ranks(filled)])
        num_columns = len(self.get_feature_names_out())
        if self.takes_sparse and num_columns > _DENSE_COLUMNS:
            ones = [self._indicators(position, column) for position, column in enumerate(codes)]
            return sparse.hstack([scaled, gaps, *ones], format="csr")
        ones = [self._indicators(position, column).toarray() for position, column in enumerate(codes)]
        return np.column_stack([scaled, gaps, *ones])

    def get_feature_names_out(self, input_features: Any = None) -> npt.NDArray[np.object_]:  # noqa: ARG002
        """Returns a name for each column of what `transform` returns."""
        check_is_fitted(self, "words_")
        names = list(self.numbers)
        if self.kind == "ranked":
            names += [f"rank of {name}" for name in self.numbers]
        if self.kind != "ordered" or not self.takes_missing:
            names += [f"{self.numbers[gap]} is missing" for gap in self.gaps_]
        if self.kind == "ordered":
            return np.array([*names, *self.categories], dtype=object)
        for position, name in enumerate(self.categories):
            num_common = self.num_common_[position]
            names += [f"{name}={word}" for word in self.words_[position][:num_common]]
            names += [f"{name} is rare"] if num_common < len(self.words_[position]) else []
            names += [f"{name} is missing"] if self.has_missing_[position] else []
        return np.array(names, dtype=object)

    def _ranks(self, numbers: Numbers) -> Numbers:
        """Returns ranks that are 0 in the middle and deviate by about 1, ``[N, A]``."""
        ranks = np.empty_like(numbers)
        for position, knots in enumerate(self.knots_.T):
            column = numbers[:, position]
            below, at_most = np.searchsorted(knots, column, "left"), np.searchsorted(knots, column, "right")
            ranks[:, position] = ((below + at_most) / (2 * len(knots)) - 0.5) * np.sqrt(12)
        return ranks

    def _indicators(self, position: int, codes: npt.NDArray[np.int64]) -> sparse.csr_matrix:
        """Returns a column for each common category, for rare ones and for missing, as far as fitting has seen them."""
        num_common, num_words = self.num_common_[position], len(self.words_[position])
        has_rare, has_missing = num_common < num_words, self.has_missing_[position]
        columns = codes.copy()
        rare = (codes >= num_common) | (codes == _UNKNOWN)
        columns[rare] = num_common if has_rare else -1
        columns[codes == _MISSING] = num_common + has_rare if has_missing else -1
        rows = np.flatnonzero(columns >= 0)
        shape = (len(codes), num_common + has_rare + has_missing)
        return sparse.csr_matrix((np.ones(len(rows)), (rows, columns[rows])), shape=shape)

    def _numbers(self, frame: "pd.DataFrame") -> Numbers:
        numbers = np.empty((len(frame), len(self.numbers)))
        for position, name in enumerate(self.numbers):
            column = self._column(frame, name).to_numpy(dtype=np.float64, na_value=np.nan)
            if np.isinf(column).any():
                raise DataError(f"column {name} holds an infinite number; put a number or nothing in its place")
            numbers[:, position] = np.clip(column, -_LARGEST, _LARGEST)
        return numbers

    def _column(self, frame: "pd.DataFrame", name: str) -> "pd.Series[Any]":
        if name not in frame.columns:
            raise DataError(f"column {name} is missing; add it ({did_you_mean(name, map(str, frame.columns))})")
        return frame[name]


def _median(column: Numbers) -> float:
    known = column[~np.isnan(column)]
    return float(np.median(known)) if len(known) else 0.0


def _categorical(column: "pd.Series[Any]") -> "pd.Categorical":
    import pandas as pd

    return pd.Categorical(column.array)


class _Counted(NamedTuple):
    words: npt.NDArray[np.str_]
    counts: npt.NDArray[np.int64]


def _counted(column: "pd.Series[Any]") -> _Counted:
    """Returns the categories that rows have, the commonest first, then alphabetical, and how many rows have each."""
    values = _categorical(column)
    counts = np.bincount(values.codes[values.codes >= 0], minlength=len(values.categories))
    words = np.array([str(word) for word in values.categories], dtype=np.str_)
    order = np.lexsort((words, -counts))
    order = order[counts[order] > 0]
    return _Counted(words[order], counts[order])


def _codes(column: "pd.Series[Any]", words: npt.NDArray[np.str_]) -> npt.NDArray[np.int64]:
    """Returns the position of each row's category in `words`, `_UNKNOWN` or `_MISSING`."""
    values = _categorical(column)
    position = {word: code for code, word in enumerate(words.tolist())}
    code_of = [position.get(str(word), _UNKNOWN) for word in values.categories]
    return np.asarray(np.array([*code_of, _MISSING], dtype=np.int64)[values.codes])
