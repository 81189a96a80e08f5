"""How well stacks do on real data, beside the best of what they are made of; parts of `stacking_speed`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.measuring import Table, real_data, timed

from graftstack.cluster.stack import launch_stack
from graftstack.cluster.sweep import launch_sweep
from graftstack.cluster.trained import inherited_overrides
from graftstack.config.compose import compose_job
from graftstack.report.console import plain_console
from graftstack.report.stack_progress import stack_display
from graftstack.report.sweep_progress import sweep_display
from graftstack.runs import Run

TABLE_BASES = [
    "LogisticRegression",
    "ExtraTreesClassifier",
    "HistGradientBoostingClassifier",
    "LGBMClassifier",
    "XGBClassifier",
]
RESNET20 = "weights/cifar10_resnet20-12fca82f.th"
FREEZE_DEPTHS = [2, 3, "all"]
LRS = [1e-3, 3e-3]
PROBES = [
    "{probe: {name: probe-all}}",
    "{probe: {name: probe-3, freeze_depth: 3, params: {C: 0.1}}}",
]


def stack(overrides: Sequence[str]) -> Run:
    """Runs a stack job."""
    everything = [*inherited_overrides(overrides), *overrides]
    with stack_display(plain_console(stderr=True, quiet=True)) as display:
        return launch_stack(compose_job("stack", everything), overrides=everything, display=display)


def sweep(overrides: Sequence[str]) -> Run:
    """Runs a sweep job."""
    with sweep_display(plain_console(stderr=True, quiet=True)) as display:
        return launch_sweep(compose_job("sweep", overrides), overrides=overrides, display=display)


def show(table: Table, run: Run) -> None:
    """Prints what a stack and its base models reach, the best by cross-validation first."""
    for row in [run.manifest.results["stack"], *run.manifest.results["base_models"]]:
        weight = "" if row["weight"] is None else f"weight {row['weight']:.2f}"
        table.row(
            f"{row['name']}: held-out log loss, accuracy",
            f"{row['held_out_loss']:.4f}  {row['held_out_score']:.4f}",
            weight,
        )


def tables(options: argparse.Namespace, folder: Path) -> None:
    """Census and churn data: the stack beside its best base model, on rows that neither has seen."""
    given = {"adult": ["data.label=income", "data.split=split"], "telco_churn": ["data.label=Churn"]}
    for name, columns in given.items():
        overrides = [
            *("data=parquet", f"data.path={real_data(f'{name}.parquet')}", *columns),
            f"base_models=[{','.join(TABLE_BASES)}]",
            *(f"runs_dir={folder}/runs", f"name={name}", "cluster=inline"),
        ]
        seconds, run = timed(lambda overrides=overrides: stack(overrides))
        details = run.manifest.details
        table = Table(
            f"tables: {name}, {details['num_rows']} rows, {details['num_held_out']} held out, {seconds:.0f} s"
        )
        show(table, run)
        own, bases = run.manifest.results["stack"], run.manifest.results["base_models"]
        best = min(base["held_out_loss"] for base in bases)
        table.row(
            "log loss of the stack - of its best base model", f"{own['held_out_loss'] - best:+.4f}", "target <= 0"
        )
        accuracy = run.manifest.metrics["accuracy"]
        table.row("accuracy of the stack", f"{accuracy:.4f}", "target >= 0.87" if name == "adult" else "")


def images(options: argparse.Namespace, folder: Path) -> None:
    """A sweep over freeze depth and learning rate, and a stack of its best trials and of probes."""
    common = [
        *("data=parquet", f"data.path={real_data('cifar100_20classes.parquet')}", "data.image=image"),
        *("data.split=split", f"data.num_train_per_class={options.per_class}", f"data.cache_dir={folder}/cache"),
        *("backbone=cifar_resnet20", f"backbone.weights={real_data(RESNET20)}", f"epochs={options.epochs}"),
        *(f"runs_dir={folder}/runs", f"taps.location={folder}/taps"),
    ]
    space = [f"space.freeze_depth=[{','.join(map(str, FREEZE_DEPTHS))}]", f"space.lr=[{','.join(map(str, LRS))}]"]
    sweep_s, swept = timed(lambda: sweep([*common, *space, "name=sweep"]))
    trials = swept.manifest.results["trials"]
    best = max(trials, key=lambda trial: trial["metrics"]["accuracy"])
    table = Table(
        f"images: {options.per_class} a class of cifar100_20classes, resnet20 of CIFAR-10, {options.epochs} epochs"
    )
    for trial in trials:
        table.row(f"trial {_point(trial)}: held-out accuracy", f"{trial['metrics']['accuracy']:.4f}")
    made_from = [f"from_sweep={swept.folder.location}", f"top={options.top}", f"base_models=[{','.join(PROBES)}]"]
    stack_s, run = timed(
        lambda: stack([*made_from, f"folds.num={options.folds}", f"runs_dir={folder}/runs", "name=stack"])
    )
    show(table, run)
    table.row("sweep, stack: seconds", f"{sweep_s:.0f}  {stack_s:.0f}")
    gained = run.manifest.metrics["accuracy"] - best["metrics"]["accuracy"]
    table.row("accuracy of the stack - of the sweep's best trial", f"{gained:+.4f}", "target > 0")


def _point(trial: Mapping[str, Any]) -> str:
    return f"freeze_depth={trial['freeze_depth']} lr={trial['lr']:g}"
