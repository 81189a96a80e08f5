"""Stacks of models as one graph of tasks, beside scikit-learn's own.

    python -m tests.bench.stacking_speed [makespan] [workloads] [overhead] [bits] [tables] [images] [--rounds 3]

- makespan: sleeping base models of 2, 0.2 and 0.2 s in six slots, and census data in as many as there are CPUs, beside
  the time below which no order of their tasks can come.
- workloads: base models of 20 ms to 5 s a fit, beside scikit-learn in one process and in two.
- overhead: what 100 fits of 50 ms take on top of themselves, in warm workers of Ray.
- bits: whether out-of-fold predictions and predictions are scikit-learn's, whatever the number of workers.
- tables: stacks of census and churn data, beside their best base models, on rows that are held out.
- images: a stack of fine-tuned depths and probes, beside the best trial of the sweep that it is made of.

Workers of every side are started, and have made a small stack, before its clock. Where sides are compared they run in
turns, so that what else the machine does meets them all.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from sklearn import ensemble
from sklearn.base import is_classifier
from sklearn.datasets import make_classification, make_regression
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.svm import SVC, SVR
from tests.bench.measuring import Table, load_average, real_data, running_ray, timed
from tests.bench.stacking_bases import Recorder, RememberingLogistic, RememberingRidge, Sleeper
from tests.bench.stacking_scores import images, tables

from graftstack.cluster.executor import RayExecutor
from graftstack.cluster.session import ray_session
from graftstack.config.compose import compose_job
from graftstack.config.schema import ClusterConfig
from graftstack.executors import ProcessExecutor, limit_threads, warm
from graftstack.machine import usable_cpus
from graftstack.stacking import StackingClassifier, StackingRegressor

NUM_FOLDS = 5
NUM_FITS = NUM_FOLDS + 1
"""Of each base model: its folds and its refit."""

Bases = list[tuple[str, Any]]
Side = Callable[[Bases], Any]
"""Makes an unfitted stack."""


class Problem(NamedTuple):
    """What is learnt."""

    X: Any
    y: Any
    bases: Bases


def compare(table: Table, sides: Mapping[str, Side], problem: Problem, *, small: Problem, rounds: int) -> np.ndarray:
    """Fits the stack of each side in turns; prints medians and returns the seconds, [sides, rounds]."""
    for stack in sides.values():
        stack(small.bases).fit(small.X, small.y)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, stack in sides.items():
            seconds[name].append(timed(lambda stack=stack: stack(problem.bases).fit(problem.X, problem.y)).seconds)
    for name, each in seconds.items():
        table.row(f"{name}, seconds (median)", f"{median(each):.3f}", " ".join(f"{value:.3f}" for value in each))
    return np.array(list(seconds.values()))


def makespan(options: argparse.Namespace, folder: Path) -> None:
    """How far from the best possible the last task ends."""
    sleeping(options)
    census(options)


def sleeping(options: argparse.Namespace) -> None:
    """Base models that take no CPU, so that six slots need no six CPUs."""
    num_slots, seconds = 6, [2.0, 0.2, 0.2]

    def problem(seconds: list[float]) -> Problem:
        bases = [(f"base {number}", Sleeper(each)) for number, each in enumerate(seconds)]
        return Problem(np.zeros((100, 2)), np.arange(100.0), bases)

    table = Table(f"makespan: sleeping base models of {seconds} s, {NUM_FOLDS} folds, {num_slots} slots")
    ideal_s = max(NUM_FITS * sum(seconds) / num_slots, *seconds)
    with running_ray(num_slots), closing(warm(ProcessExecutor(num_slots))) as processes:
        sides = {
            "scikit-learn n_jobs=6": lambda bases: ensemble.StackingRegressor(bases, Ridge(), n_jobs=num_slots),
            "graftstack, processes": lambda bases: StackingRegressor(bases, Ridge(), executor=processes),
            "graftstack, ray": lambda bases: StackingRegressor(bases, Ridge(), executor="ray"),
        }
        found = compare(table, sides, problem(seconds), small=problem([0.2] * 3), rounds=options.rounds)
    table.row("best possible, seconds", f"{ideal_s:.3f}")
    for name, each in zip(sides, found, strict=True):
        table.row(
            f"{name} / best possible", f"{median(each) / ideal_s:.3f}", "" if "scikit" in name else "target <= 1.10"
        )


def census(options: argparse.Namespace) -> None:
    """Real data and base models, in a process for each CPU."""
    from graftstack.stacking.fitting import cross_fitted
    from graftstack.stacking.job import prepare_stack

    num_slots = usable_cpus()
    overrides = [
        *("data=parquet", f"data.path={real_data('adult.parquet')}", "data.label=income", "data.split=split"),
        f"data.num_train_per_class={options.census_rows // 2}",
        "base_models=[LogisticRegression,RandomForestClassifier,HistGradientBoostingClassifier,LGBMClassifier]",
    ]
    task = prepare_stack(compose_job("stack", overrides))
    table = Table(f"makespan: {len(task.y)} rows of adult, {len(task.levels[0])} base models, {num_slots} processes")
    with closing(warm(ProcessExecutor(num_slots))) as processes:
        cross_fitted(task, processes)
        ratios = []
        for _ in range(options.rounds):
            recorder = Recorder(processes)
            seconds = timed(lambda recorder=recorder: cross_fitted(task, recorder)).seconds
            best_s = recorder.best_possible(num_slots)
            ratios.append(seconds / best_s)
            longest = f"{len(recorder.seconds)} tasks, the longest {max(recorder.seconds):.2f}, {load_average()}"
            table.row("seconds, best possible by the tasks' own", f"{seconds:.2f}  {best_s:.2f}", longest)
    table.row("graftstack / best possible (median)", f"{median(ratios):.3f}", "target <= 1.10")


class Workload(NamedTuple):
    """Base models that take so long to fit."""

    seconds: float
    num_rows: int
    rounds: int


WORKLOADS = [
    Workload(0.02, 400, 7),
    Workload(0.1, 1000, 5),
    Workload(0.3, 2000, 3),
    Workload(1.0, 4000, 2),
    Workload(5.0, 10000, 1),
]


def workloads(options: argparse.Namespace, folder: Path) -> None:
    """Our executors beside the better of scikit-learn's two ways, on real estimators."""

    final = LogisticRegression()
    sides = {
        "scikit-learn": lambda bases: ensemble.StackingClassifier(bases, final),
        "scikit-learn n_jobs=2": lambda bases: ensemble.StackingClassifier(bases, final, n_jobs=2),
        "graftstack, processes": lambda bases: StackingClassifier(bases, final, executor="processes", n_jobs=2),
        "graftstack, ray": lambda bases: StackingClassifier(bases, final, executor="ray", n_jobs=2),
    }
    small = workload(Workload(0.02, 200, 1))
    warm(ProcessExecutor(2)).close()  # its processes stay, and "processes" finds them warm
    with ray_session(ClusterConfig(), verbose=False):
        for each in WORKLOADS:
            if each.seconds > options.longest:
                continue
            problem = workload(each)
            parts = ", ".join(f"{type(base).__name__}({size_of(base)})" for _, base in problem.bases)
            table = Table(f"workload of {1e3 * each.seconds:.0f} ms a fit: {parts}, {each.num_rows} rows")
            rounds = max(1, each.rounds * options.rounds // 3)
            *theirs, processes_s, ray_s = compare(table, sides, problem, small=small, rounds=rounds)
            for name, ours in (("processes", processes_s), ("ray", ray_s)):
                ratio = median(ours / np.min(theirs, axis=0))
                table.row(f"{name} / the better of scikit-learn's (median)", f"{ratio:.3f}", "target <= 1.05")
            table.row("the machine", load_average())


def workload(wanted: Workload) -> Problem:
    """Returns ensembles of so many trees that a fit to a fold takes the seconds that are wanted, in one thread."""
    X, y = make_classification(wanted.num_rows, 20, n_informative=8, n_classes=3, random_state=0)  # noqa: N806
    fold = slice(wanted.num_rows * (NUM_FOLDS - 1) // NUM_FOLDS)

    def sized(base: Any, size: str) -> Any:
        base.set_params(**{size: 4})
        with limit_threads(1):
            tree_s = min(timed(lambda: base.fit(X[fold], y[fold])).seconds for _ in range(3)) / 4
        return base.set_params(**{size: max(1, round(wanted.seconds / tree_s))})

    bases = [
        ("forest", sized(RandomForestClassifier(random_state=0), "n_estimators")),
        ("boosting", sized(GradientBoostingClassifier(random_state=0), "n_estimators")),
        ("histograms", sized(HistGradientBoostingClassifier(random_state=0, early_stopping=False), "max_iter")),
    ]
    return Problem(X, y, bases)


def size_of(base: Any) -> int:
    """Returns how many trees an ensemble is made of."""
    return int(getattr(base, "n_estimators", None) or base.max_iter)


def overhead(options: argparse.Namespace, folder: Path) -> None:
    """100 fits of 50 ms: what is left of slots times makespan when the fits' own seconds are taken away."""

    num_bases, num_folds = 20, 4
    problem = workload(Workload(0.05, 1000, 1))
    bases = [(f"base {number}", problem.bases[number % 2][1]) for number in range(num_bases)]
    table = Table(f"overhead: {num_bases} base models x ({num_folds} folds + refit) of 50 ms in warm workers of Ray")
    with ray_session(ClusterConfig(), verbose=False):
        for num_slots in sorted({1, usable_cpus()}):
            executor = RayExecutor(num_slots)
            extras = []
            for round_ in range(options.rounds + 1):
                recorder = Recorder(executor)
                stack = StackingClassifier(bases, LogisticRegression(), cv=num_folds, executor=recorder)
                seconds = timed(lambda stack=stack: stack.fit(problem.X, problem.y)).seconds
                extra_ms = 1e3 * (num_slots * seconds - sum(recorder.seconds)) / len(recorder.seconds)
                if round_:  # the first one warms the workers up
                    extras.append(extra_ms)
            fit_ms = 1e3 * sum(recorder.seconds) / len(recorder.seconds)
            each = " ".join(f"{extra:.1f}" for extra in extras)
            table.row(
                f"{num_slots} slots: extra ms per fit (median), fits of {fit_ms:.0f} ms",
                f"{median(extras):.1f}",
                f"target <= 20   {each}, {load_average()}",
            )


def bits(options: argparse.Namespace, folder: Path) -> None:
    """What final estimators are fed, and what stacks predict, in every bit."""

    with ray_session(ClusterConfig(), verbose=False):
        for name, problem in learnable().items():
            table = Table(f"bits: {name}, {', '.join(base for base, _ in problem.bases)}")
            theirs = stack_of(problem).fit(problem.X, problem.y)
            for where, num_workers in (("inline", 1), ("processes", 2), ("processes", 4), ("ray", 1), ("ray", 2)):
                ours = stack_of(problem, executor=where, n_jobs=num_workers).fit(problem.X, problem.y)
                fed, their_fed = ours.final_estimator_.fed_, theirs.final_estimator_.fed_
                assert fed.shape == their_fed.shape
                same = sum(map(np.array_equal, fed.T, their_fed.T))
                largest = np.abs(predictions(ours, problem) - predictions(theirs, problem)).max()
                table.row(
                    f"{where}, {num_workers} workers: OOF columns that differ", f"{fed.shape[1] - same}", "target 0"
                )
                table.row("  largest difference of a prediction", f"{largest:.1e}", "target 0")


def learnable() -> dict[str, Problem]:
    """Returns problems with two classes, three classes, and numbers."""
    rows = {"n_samples": 600, "n_features": 12, "n_informative": 6, "random_state": 0}
    classifiers: Bases = [
        ("logistic", LogisticRegression()),
        ("forest", RandomForestClassifier(50, random_state=0)),
        ("boosting", GradientBoostingClassifier(n_estimators=30, random_state=0)),
        ("histograms", HistGradientBoostingClassifier(max_iter=30, random_state=0)),
        ("vectors", SVC()),
        ("near", KNeighborsClassifier()),
    ]
    regressors: Bases = [
        ("ridge", Ridge()),
        ("forest", RandomForestRegressor(50, random_state=0)),
        ("boosting", GradientBoostingRegressor(n_estimators=30, random_state=0)),
        ("histograms", HistGradientBoostingRegressor(max_iter=30, random_state=0)),
        ("vectors", SVR()),
        ("near", KNeighborsRegressor()),
    ]
    return {
        "two classes": Problem(*make_classification(n_classes=2, **rows), classifiers),
        "three classes": Problem(*make_classification(n_classes=3, **rows), classifiers),
        "numbers": Problem(*make_regression(noise=1.0, **rows), regressors),
    }


def stack_of(problem: Problem, **ours: Any) -> Any:
    """Returns an unfitted stack of this project, or without further arguments one of scikit-learn's."""
    if is_classifier(problem.bases[0][1]):
        kind = StackingClassifier if ours else ensemble.StackingClassifier
        return kind(problem.bases, RememberingLogistic(max_iter=1000), **ours)
    kind = StackingRegressor if ours else ensemble.StackingRegressor
    return kind(problem.bases, RememberingRidge(), **ours)


def predictions(stack: Any, problem: Problem) -> np.ndarray:
    """Returns what a fitted stack says of the rows that it learnt from."""
    return np.asarray((stack.predict_proba if is_classifier(stack) else stack.predict)(problem.X))


PARTS = {
    "makespan": makespan,
    "workloads": workloads,
    "overhead": overhead,
    "bits": bits,
    "tables": tables,
    "images": images,
}


def main() -> None:
    """Runs the parts that are asked for, all unless any is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of each comparison; of short ones more, of long ones less"
    )
    parser.add_argument("--longest", type=float, default=5.0, help="workloads: seconds of a fit")
    parser.add_argument("--census-rows", type=int, default=6000, help="makespan: rows of adult")
    parser.add_argument("--per-class", type=int, default=100, help="images: training images of each class")
    parser.add_argument("--epochs", type=int, default=5, help="images: of each training")
    parser.add_argument("--top", type=int, default=4, help="images: trials of the sweep that are stacked")
    parser.add_argument("--folds", type=int, default=5, help="images: of the stack")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]}; use {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts or PARTS:
            PARTS[name](options, Path(folder))


if __name__ == "__main__":
    main()
