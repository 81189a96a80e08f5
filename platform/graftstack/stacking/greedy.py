"""Ensemble selection: candidates are added one at a time, again and again, whichever helps most.

Caruana, Niculescu-Mizil, Crew & Ksikes 2004, "Ensemble Selection from Libraries of Models", sections 2 and 2.1
(selection with replacement), 2.2 (sorted initialisation: the `num_first` best are in from the start). Of all rounds
the one with the least loss counts, so more rounds never do harm on the rows that are selected on.
"""

import numpy as np

from graftstack.stacking.candidates import Candidates, Numbers


def greedy_weights(candidates: Candidates, *, num_rounds: int = 100, num_first: int = 1) -> Numbers:
    """Returns the share of each of B candidates in the best ensemble, ``[B]``.

    Args:
        candidates: what there is to choose from.
        num_rounds: how many are added at most, with those that are in from the start.
        num_first: how many of the best are in from the start.
    """
    values = candidates.values
    alone = np.array([candidates.loss(values[:, one]) for one in range(candidates.num)])
    first = np.argsort(alone, kind="stable")[: max(1, num_first)]
    counts = np.bincount(first, minlength=candidates.num)
    total = values[:, first].sum(axis=1)
    best_loss, best_counts = candidates.loss(total / counts.sum()), counts.copy()
    for size in range(counts.sum() + 1, num_rounds + 1):
        losses = [candidates.loss((total + values[:, one]) / size) for one in range(candidates.num)]
        chosen = int(np.argmin(losses))
        counts[chosen] += 1
        total += values[:, chosen]
        if losses[chosen] < best_loss:
            best_loss, best_counts = losses[chosen], counts.copy()
    return np.asarray(best_counts / best_counts.sum())
