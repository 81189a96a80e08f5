"""Ridge regression on what base models predict."""

from typing import Any

import numpy as np
from sklearn.impute import SimpleImputer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler


def linear_meta_model(**params: Any) -> Pipeline:
    """Returns a ridge regression on columns of one scale; its strength is chosen by leave-one-out error.

    Base models that agree are columns that are all but equal: without the penalty, weights of both signs and any size
    would fit them alike. Gaps, which only columns that are passed through have, are filled with their mean.
    """
    params.setdefault("alphas", np.logspace(-3, 4, 15).tolist())
    steps = [
        ("fill", SimpleImputer(keep_empty_features=True)),
        ("scale", StandardScaler()),
        ("ridge", RidgeCV(**params)),
    ]
    return Pipeline(steps)
