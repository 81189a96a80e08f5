"""Stacks of models: base models cross-fitted on folds, and what learns from their out-of-fold predictions; no Ray.

The engine, which knows scikit-learn's contract and nothing of where data comes from:

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

What it is fed:

- `data`: rows in every form that base models want; `schema`, `columns`, `targets`: what a table's columns and labels
  are; `encoding`: from tables to numbers, inside each fold; `image_rows`, `pixel_rows`: images
- `catalog`: estimators by name; `backbone_model`, `probe_model`: fine-tunings and probes as base models; `warm`:
  what their processes keep ready; `taps`: what they read; `bases`: from the entries of a configuration to all these
- `metamodels`: meta-models by name, an algorithm a file; `calibration`: of their probabilities

The job:

- `job`: from a configuration to what a run leaves; `feasible`: what is checked of backbones before; `plan`
- `fitting`: the meta-model on out-of-fold predictions; `model`, `artifact`: the fitted stack, and as files; `predict`
- `leaderboard`, `scores`, `oof`, `leakage`: how good it all is, and whether that can be trusted

Importing this package loads neither scikit-learn nor NumPy.
"""

from typing import Any

__all__ = ["StackingClassifier", "StackingRegressor"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from graftstack.stacking import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
