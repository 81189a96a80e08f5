"""Logistic regression on what base models say of each class, with one weight a base model.

A logarithmic opinion pool (Genest & Zidek 1986, "Combining Probability Distributions", section 3) whose weights are
fitted to out-of-fold predictions, as stacking does (Wolpert 1992; Ting & Witten 1999):

    p(c | x) ~ exp( sum_b w_b log p_b(c | x)  +  b_c  +  sum_j V_jc x_j )

With two classes this is plain logistic regression on log-odds. Why not on the probabilities themselves: in those, no
weights reproduce a single base model that is right already, so the stack can lose to it; on logarithms w = (1, 0, ...)
does, and it is found because the loss is convex. Why one weight a base model rather than one for each pair of classes:
B + C numbers can be learnt from few rows, B * C * C can't.

The weights are drawn to 1/B each, the others to 0, as rows are few: the penalty is that of one observation of a normal
distribution, ``|w - 1/B|^2 / (2 C)``, as in scikit-learn's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from graftstack.stacking.blocks import Blocks, Numbers, block_kinds, dense, outputs_of, to_blocks

_FREE = 1e-3
"""Penalty on the offset of each class: enough that a class without rows has a finite one."""


class _Parameters(NamedTuple):
    weights: Numbers
    """``[B]``"""
    offsets: Numbers
    """``[C]``"""
    rest: Numbers
    """``[P, C]``"""


class LogisticPool(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifies meta-features ``[N, F]``: the columns of each base model, then those that are passed through.

    Args:
        num_outputs: columns of each base model; None: no column is passed through.
        num_classes: labels are 0..num_classes - 1; None: classes are those of the labels that it is fitted on.
        C: how little weights are held back; rows count against it.
    """

    def __init__(
        self,
        num_outputs: Sequence[int] | None = None,
        num_classes: int | None = None,
        C: float = 1.0,  # noqa: N803 - scikit-learn's name
    ) -> None:
        self.num_outputs = num_outputs
        self.num_classes = num_classes
        self.C = C

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Minimises the log loss of the rows."""
        X = dense(X)  # noqa: N806
        self.classes_ = np.unique(y) if self.num_classes is None else np.arange(self.num_classes)
        self.n_features_in_ = X.shape[1]
        num_classes = len(self.classes_)
        self.outputs_ = outputs_of(self.num_outputs, X.shape[1], num_classes)
        self.kinds_ = block_kinds(X, self.outputs_, num_classes)
        blocks = to_blocks(X, self.outputs_, self.kinds_, num_classes)
        known = [column[~np.isnan(column)] for column in blocks.rest.T]
        self.means_ = np.array([column.mean() if len(column) else 0.0 for column in known])
        deviations = np.array([column.std() if len(column) else 0.0 for column in known])
        self.scales_ = np.where(deviations > 1e-12 * np.abs(self.means_), deviations, 1.0)
        fitted = _fit(self._scaled(blocks), np.searchsorted(self.classes_, y), self.C)
        self.weights_, self.offsets_, self.rest_coef_ = fitted
        return self

    def predict_proba(self, X: Any) -> Numbers:  # noqa: N803
        """Returns the probability of each class, ``[N, C]``."""
        check_is_fitted(self, "weights_")
        blocks = self._scaled(to_blocks(dense(X), self.outputs_, self.kinds_, len(self.classes_)))
        found: Numbers = softmax(_logits(blocks, _Parameters(self.weights_, self.offsets_, self.rest_coef_)), axis=1)
        return found

    def predict(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803
        """Returns the likeliest class of each row, ``[N]``."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])

    def _scaled(self, blocks: Blocks) -> Blocks:
        return blocks._replace(rest=np.nan_to_num((blocks.rest - self.means_) / self.scales_, nan=0.0))


def _fit(blocks: Blocks, codes: npt.NDArray[np.int64], strength: float) -> _Parameters:
    num_bases, num_rows, num_classes = blocks.scores.shape
    num_rest = blocks.rest.shape[1]
    prior = np.zeros(num_bases + num_classes + num_rest * num_classes)
    prior[:num_bases] = 1 / max(1, num_bases)
    penalty = np.full(len(prior), 1 / strength)
    penalty[num_bases : num_bases + num_classes] = _FREE
    rows = np.arange(num_rows)

    def loss_and_slope(flat: Numbers) -> tuple[float, Numbers]:
        logs = log_softmax(_logits(blocks, _unpacked(flat, num_bases, num_classes)), axis=1)
        moved = flat - prior
        loss = -logs[rows, codes].sum() + (penalty * moved**2).sum() / 2
        error = np.exp(logs)
        error[rows, codes] -= 1
        slopes = [np.einsum("bnc,nc->b", blocks.scores, error), error.sum(axis=0), (blocks.rest.T @ error).ravel()]
        return loss / num_rows, (np.concatenate(slopes) + penalty * moved) / num_rows

    found = minimize(
        loss_and_slope, prior, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "gtol": 1e-7, "ftol": 1e-12}
    )
    return _unpacked(found.x, num_bases, num_classes)


def _unpacked(flat: Numbers, num_bases: int, num_classes: int) -> _Parameters:
    weights, offsets, rest = np.split(flat, [num_bases, num_bases + num_classes])
    return _Parameters(weights, offsets, rest.reshape(-1, num_classes))


def _logits(blocks: Blocks, parameters: _Parameters) -> Numbers:
    logits: Numbers = np.tensordot(parameters.weights, blocks.scores, axes=1)
    return logits + parameters.offsets + blocks.rest @ parameters.rest
