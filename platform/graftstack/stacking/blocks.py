"""Meta-features taken apart: which columns each base model has made, and what they say of each class."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.utils.validation import check_array

Numbers = npt.NDArray[np.float64]

PROBABILITY, SCORE, LABEL, OTHER = "probability", "score", "label", "other"

_SMALLEST = 1e-5
"""Probabilities below count as this: a forest of 100 trees says 0 where it means less than 1 %."""
_LARGEST_SCORE = 100.0
"""Scores beyond are cut: a base model whose fold lacked a class gives it the least number that there is."""


class Blocks(NamedTuple):
    """Meta-features of N rows, B base models and C classes."""

    scores: Numbers
    """``[B', N, C]``: log-probabilities, or what stands in their place; of base models whose columns are classes."""
    rest: Numbers
    """``[N, P]``: all other columns, those of passthrough among them."""


def dense(X: Any) -> Numbers:  # noqa: N803 - scikit-learn's contract
    """Returns meta-features as ``float64 [N, F]``; NaN may be in passed-through columns."""
    X = X.toarray() if sparse.issparse(X) else X  # noqa: N806
    checked: Numbers = check_array(X, dtype=np.float64, ensure_all_finite="allow-nan")
    return checked


def outputs_of(num_outputs: Sequence[int] | None, num_features: int, num_classes: int) -> list[int]:
    """Returns how many columns each base model has; unless told, as many as probabilities need, in all columns."""
    if num_outputs is not None:
        return list(num_outputs)
    width = 1 if num_classes == 2 or num_features % num_classes else num_classes
    return [width] * (num_features // width)


def block_kinds(X: Numbers, num_outputs: Sequence[int], num_classes: int) -> list[str]:  # noqa: N803
    """Returns what each base model's columns hold, by the looks of them.

    - probability: of each class, or of the second of two
    - score: a decision of each class, or of the second of two
    - label: the position of a class
    - other: columns that aren't of one class each, such as decisions between pairs
    """
    return [_kind(block, num_classes) for block in split(X, num_outputs)]


def split(X: Numbers, num_outputs: Sequence[int]) -> list[Numbers]:  # noqa: N803
    """Returns the columns of each base model."""
    return np.split(X[:, : sum(num_outputs)], np.cumsum(num_outputs)[:-1], axis=1)


def to_blocks(X: Numbers, num_outputs: Sequence[int], kinds: Sequence[str], num_classes: int) -> Blocks:  # noqa: N803
    """Returns what base models say of each class, and the columns that say nothing of one class each."""
    found = list(zip(split(X, num_outputs), kinds, strict=True))
    scores = [_scores(block, kind, num_classes) for block, kind in found if kind != OTHER]
    rest = [block for block, kind in found if kind == OTHER]
    shape = (len(scores), len(X), num_classes)
    return Blocks(np.array(scores).reshape(shape), np.column_stack([*rest, X[:, sum(num_outputs) :]]))


def probabilities(block: Numbers) -> Numbers:
    """Returns a block of probabilities with a column for each class, ``[N, C]``."""
    return np.column_stack([1 - block[:, 0], block[:, 0]]) if block.shape[1] == 1 else block


def _kind(block: Numbers, num_classes: int) -> str:
    width = block.shape[1]
    in_range = bool(((block >= 0) & (block <= 1)).all())
    if width == 1 and num_classes == 2:
        return PROBABILITY if in_range else SCORE
    if width == 1:
        return LABEL
    if width != num_classes:
        return OTHER
    return PROBABILITY if in_range and np.allclose(block.sum(axis=1), 1, atol=1e-3) else SCORE


def _scores(block: Numbers, kind: str, num_classes: int) -> Numbers:
    if kind == PROBABILITY:
        return np.log(np.maximum(probabilities(block), _SMALLEST))
    if kind == LABEL:
        return np.asarray(block == np.arange(num_classes), dtype=np.float64)
    block = np.clip(block, -_LARGEST_SCORE, _LARGEST_SCORE)
    return np.column_stack([np.zeros(len(block)), block[:, 0]]) if block.shape[1] == 1 else block
