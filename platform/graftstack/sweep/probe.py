"""How much the frozen features of each depth already know, found without training anything by gradient.

A linear probe in closed form and a nearest-neighbour vote cost a fraction of one epoch and bound from below what a head
on those features reaches. A sweep uses them to leave out trials that can't win (`hopeless`).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graftstack.finetune.pooling import averaged
from graftstack.seeding import derive_seed

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the ridge penalty, as shares of the variance that all rows together have in one feature."""

MAX_DIM = 2048
"""Longest feature vector that a probe works on; what a closed form costs grows with its square."""

_TEMPERATURE = 0.07
_NUM_ROWS_AT_ONCE = 1024


class ProbeScore(NamedTuple):
    """What the features of one backbone know at one freeze depth: validation accuracies, 0..1."""

    backbone: str
    depth: int
    ridge: float
    knn: float

    @property
    def best(self) -> float:
        """The better of the two: what is found by either is there."""
        return max(self.ridge, self.knn)


def pooled(x: Tensor) -> Tensor:
    """Returns one fp32 feature vector for each item, [N, D] with D at most `MAX_DIM`.

    Maps and tokens are averaged over their places (`averaged`); longer vectors are projected at random, always in the
    same way.
    """
    x = averaged(x)
    return x if x.shape[1] <= MAX_DIM else _projected(x)


def ridge_accuracy(train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor, num_classes: int) -> float:
    """Returns the validation accuracy of ridge regression onto one target of -1 or 1 a class.

    Features are standardised by the training rows, and the bias isn't penalised. The penalty is the one of `PENALTIES`
    that does best on a fifth of the training rows after fitting the others; the validation rows have no say in it.
    Features that aren't finite teach nothing: 0.

    Args:
        train_x: [N, D], N at least 1.
        train_y: int64, [N], values 0..num_classes-1.
        val_x: [M, D], M at least 1.
        val_y: int64, [M].
        num_classes: how many classes there are; not all need be among the rows.
    """
    if not _is_finite(train_x, val_x):
        return 0.0
    penalty = _best_penalty(train_x, train_y, num_classes)
    (scores,) = _ridge_scores(train_x, train_y, val_x, num_classes, penalties=(penalty,))
    return _accuracy(scores, val_y)


def knn_accuracy(
    train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor, num_classes: int, *, num_neighbors: int = 20
) -> float:
    """Returns the validation accuracy of a vote of the nearest training rows, by cosine similarity.

    The nearer a row, the more its vote weighs: exp(similarity / 0.07) (Wu et al. 2018, "Unsupervised feature learning
    via non-parametric instance discrimination", section 3.4). Fewer training rows than `num_neighbors` all vote.
    Arguments and features that aren't finite as in `ridge_accuracy`.
    """
    if not _is_finite(train_x, val_x):
        return 0.0
    known = F.normalize(train_x.float(), dim=1)
    votes = []
    for rows in val_x.float().split(_NUM_ROWS_AT_ONCE):
        similarity = F.normalize(rows, dim=1) @ known.T
        nearest = similarity.topk(min(num_neighbors, len(known)), dim=1)
        empty = torch.zeros(len(rows), num_classes, device=rows.device)
        votes.append(empty.scatter_add_(1, train_y[nearest.indices], (nearest.values / _TEMPERATURE).exp()))
    return _accuracy(torch.cat(votes), val_y)


def hopeless(scores: Sequence[ProbeScore], *, margin: float) -> dict[tuple[str, int], str]:
    """Returns the (backbone, depth) that can't win, each with its evidence in one line.

    A depth is hopeless if a shallower one of the same backbone scores better by more than `margin`: freezing up to it
    loses what the features had before. A shallower one is never hopeless for scoring less than a deeper one, for what
    lies above it still trains. A backbone is hopeless at all depths if its best score is more than ``2 * margin`` below
    the best of all. The best of all scores is never among them.

    Args:
        scores: each backbone and depth once, in any order.
        margin: a difference of accuracies, at least 0.
    """
    assert margin >= 0, margin
    by_backbone: dict[str, list[ProbeScore]] = defaultdict(list)
    for score in sorted(scores, key=lambda score: score.depth):
        by_backbone[score.backbone].append(score)
    winner = max(scores, key=lambda score: score.best, default=None)
    evidence: dict[tuple[str, int], str] = {}
    for ordered in by_backbone.values():
        evidence |= _lost_on_the_way(ordered, margin)
        if winner is not None:
            evidence |= _far_behind(ordered, winner, margin)
    return evidence


def _lost_on_the_way(ordered: Sequence[ProbeScore], margin: float) -> dict[tuple[str, int], str]:
    """The depths of one backbone, shallowest first, at which features know less than at a shallower one."""
    lost: dict[tuple[str, int], str] = {}
    best = ordered[0]
    for score in ordered:
        if best.best - score.best > margin:
            lost[score.backbone, score.depth] = (
                f"features at freeze_depth={score.depth} score {score.best:.3f}, those at freeze_depth={best.depth} "
                f"{best.best:.3f}: more than prune_margin={margin:g} better"
            )
        best = max(best, score, key=lambda score: score.best)
    return lost


def _far_behind(ordered: Sequence[ProbeScore], winner: ProbeScore, margin: float) -> dict[tuple[str, int], str]:
    """All depths of a backbone whose features know much less than those of the best one."""
    best = max(ordered, key=lambda score: score.best)
    if winner.best - best.best <= 2 * margin:
        return {}
    text = (
        f"features of {best.backbone} score {best.best:.3f} at best, those of {winner.backbone} at "
        f"freeze_depth={winner.depth} {winner.best:.3f}: more than twice prune_margin={margin:g} better"
    )
    return {(score.backbone, score.depth): text for score in ordered}


def _projected(x: Tensor) -> Tensor:
    """Feature hashing: each feature is added, with a random sign, to one of `MAX_DIM` sums.

    Inner products are kept in expectation (Weinberger et al. 2009, "Feature hashing for large scale multitask
    learning", lemma 2), without a matrix as long as the features.
    """
    dim = x.shape[1]
    generator = torch.Generator().manual_seed(derive_seed(0, "probe", "projection", dim))
    place = torch.randint(MAX_DIM, (dim,), generator=generator).to(x.device)
    sign = (2 * torch.randint(2, (dim,), generator=generator) - 1).to(x.device)
    return x.new_zeros(len(x), MAX_DIM).index_add_(1, place, x * sign)


def _best_penalty(x: Tensor, y: Tensor, num_classes: int) -> float:
    """The penalty that does best on held-out rows; the largest of equal ones, and where no row can be spared."""
    fitted, held_out = _held_out_rows(len(x))
    if len(held_out) == 0:
        return PENALTIES[-1]
    candidates = _ridge_scores(x[fitted], y[fitted], x[held_out], num_classes, penalties=PENALTIES)
    accuracies = {
        penalty: _accuracy(scores, y[held_out]) for penalty, scores in zip(PENALTIES, candidates, strict=True)
    }
    return max(reversed(PENALTIES), key=accuracies.__getitem__)


def _held_out_rows(num_rows: int) -> tuple[Tensor, Tensor]:
    """Returns the training rows, int64, that are fitted and the fifth that then chooses the penalty."""
    generator = torch.Generator().manual_seed(derive_seed(0, "probe", "held out", num_rows))
    order = torch.randperm(num_rows, generator=generator)
    return order[num_rows // 5 :], order[: num_rows // 5]


def _ridge_scores(
    train_x: Tensor, train_y: Tensor, val_x: Tensor, num_classes: int, *, penalties: Sequence[float]
) -> list[Tensor]:
    """Returns fp64 scores [M, num_classes] for each penalty.

    With standardised X and centred Y: W = (X'X + p I)^-1 X'Y = X' (XX' + p I)^-1 Y (Hastie et al. 2009, "The elements
    of statistical learning", sections 3.4.1 and 18.3.5); the smaller of the two systems is solved.
    """
    train_x = train_x.double()
    spread, mean = torch.std_mean(train_x, dim=0, correction=0)
    spread[spread <= mean.abs() * torch.finfo(torch.float32).eps] = 1.0
    x, val = (train_x - mean) / spread, (val_x.double() - mean) / spread
    target = 2.0 * F.one_hot(train_y, num_classes).double() - 1.0
    bias = target.mean(dim=0)
    num_rows, dim = x.shape
    gram = x @ x.T if num_rows < dim else x.T @ x
    scores = []
    for penalty in penalties:
        factor = torch.linalg.cholesky(gram + penalty * num_rows * torch.eye(len(gram), dtype=x.dtype, device=x.device))
        if num_rows < dim:
            weight = x.T @ torch.cholesky_solve(target - bias, factor)
        else:
            weight = torch.cholesky_solve(x.T @ (target - bias), factor)
        scores.append(val @ weight + bias)
    return scores


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).double().mean())


def _is_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
