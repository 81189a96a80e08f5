"""Stacks of models: bases cross-fitted on folds, and models that learn from their out-of-fold predictions; free of Ray.

- `folds`: which rows each fold trains on and tests
- `work`: base models and what comes of their tasks; `task_run`: what one task does in a worker; `inner_jobs`: how many
  threads and processes of its own a model may start there
- `graph`: which tasks there are, what they wait for, and which goes first; `crossfit`: all of them, run by `loop`;
  `material`: what their calls are made of; `faults`: how often they may fail
- `ledger`, `ledger_keys`: what is finished, on disk, under keys that say what it was made from; `model_file`: models
  as bytes that can be trusted when read
- `assemble`: out-of-fold predictions in row order, and the features that they make; `bag`: the folds' models as one
- `estimators`: scikit-learn's `StackingClassifier` and `StackingRegressor` on that graph, which are imported from here;
  `estimator_fit`: how they are fitted

Importing this package loads neither scikit-learn nor NumPy.
"""

from typing import Any

__all__ = ["StackingClassifier", "StackingRegressor"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from graftstack.stacking import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
