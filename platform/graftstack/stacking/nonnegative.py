"""Weights that are 0 or more and sum to 1, such that the average of all candidates loses least.

Breiman 1996, "Stacked Regressions" (weights >= 0 keep the average within what candidates say, however alike they are);
van der Laan, Polley & Hubbard 2007, "Super Learner" (they sum to 1). For classes, the average is of probabilities, and
the loss the log loss: both losses are convex in the weights, and any single candidate is among the averages.
"""

import numpy as np
from scipy.optimize import minimize

from graftstack.stacking.candidates import Candidates, Numbers


def nonnegative_weights(candidates: Candidates) -> Numbers:
    """Returns the weight of each of B candidates, ``[B]``."""
    num = candidates.num
    if num == 1:
        return np.ones(1)
    equal = np.full(num, 1 / num)
    # In units of the loss that it starts from: the solver's steps and tolerances are those of numbers near 1.
    unit = candidates.loss(candidates.values @ equal) or 1.0
    found = minimize(
        lambda weights: candidates.loss(candidates.values @ weights) / unit,
        equal,
        jac=lambda weights: candidates.values.T @ candidates.slope(candidates.values @ weights) / unit,
        bounds=[(0.0, 1.0)] * num,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-10},
    )
    weights = np.maximum(found.x, 0.0)
    weights[weights < 1e-6] = 0.0
    weights /= weights.sum()
    # The solver may give up where candidates are all but the same.
    return np.asarray(min([weights, *np.eye(num)], key=lambda one: candidates.loss(candidates.values @ one)))
