"""The whole story on one page, offline: pretrain on some digits, graft onto others, sweep, stack, learn to learn."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from graftstack.cluster.finetune import launch
from graftstack.cluster.meta import launch_meta
from graftstack.cluster.stack import launch_stack
from graftstack.cluster.sweep import launch_sweep
from graftstack.cluster.trained import inherited_overrides
from graftstack.config.compose import compose_job
from graftstack.config.meta import MetaConfig
from graftstack.config.schema import FinetuneConfig
from graftstack.config.stack import StackConfig
from graftstack.config.sweep import SweepConfig
from graftstack.errors import RunError
from graftstack.report.console import plain_console
from graftstack.report.meta_progress import meta_display
from graftstack.report.progress import job_display
from graftstack.report.stack_progress import stack_display
from graftstack.report.stack_tables import leaderboard_table
from graftstack.report.sweep_progress import sweep_display
from graftstack.report.sweep_tables import reuse_line, trials_table
from graftstack.report.tables import empty_table, number
from graftstack.runs import Run, list_runs
from graftstack.storage import is_uri

# Eight by eight pixels say little at their own size to a network with four poolings.
_COMMON = ("data=digits", "data.image_size=16", "backbone=conv4")
_BASE = ("name=digits-0-4", "data.classes=[0,1,2,3,4]", "epochs=12", "batch_size=64")
_FEW = (
    "data.classes=[5,6,7,8,9]",
    "data.num_train_per_class=20",
    "data.val_fraction=0.5",
    "epochs=25",
    "batch_size=20",
)


class _Contender(NamedTuple):
    name: str
    title: str
    overrides: tuple[str, ...]


_SWEEP = ("space.freeze_depth=[0,2,3,all]", "space.lr=[3e-4,1e-3,3e-3,1e-2]")

# Three fine-tunings of the sweep and two models of scikit-learn on pixels, which err in other places.
_STACK = ("name=stack", "top=3", "base_models=[SVC,ExtraTreesClassifier]", "folds.num=4")

_PRETRAINED = "backbone.weights=run:digits-0-4"
_CONTENDERS = (
    _Contender("scratch", "from scratch", ("backbone.weights=none",)),
    _Contender("depth-0", "fine-tuned, nothing frozen", (_PRETRAINED, "freeze_depth=0")),
    _Contender("depth-2", "fine-tuned, two groups frozen", (_PRETRAINED, "freeze_depth=2")),
    _Contender("depth-all", "only the head", (_PRETRAINED, "freeze_depth=all")),
    _Contender("lp-ft", "the head first, then all", (_PRETRAINED, "freeze_depth=0", "recipe=lp_ft")),
)


_META = (
    "eval.classes=[5,6,7,8,9]",
    "eval.num_shots=[5]",
    "num_queries=10",
    _PRETRAINED,
)
_FEW_SHOT = (
    _Contender("few-shot-head", "a linear head on each support set", ("method=finetune_baseline", "num_episodes=0")),
    _Contender("few-shot-prototypes", "nearest prototype", ("method=prototypes", "num_episodes=0")),
    _Contender("few-shot-trained", "nearest prototype, meta-trained on 0-4", ("method=prototypes", "num_episodes=200")),
)


def run_demo(runs_dir: str) -> None:
    """Runs the demo in `runs_dir`, which holds nothing but earlier demos, and prints its table.

    Raises:
        RunError: the folder holds something else, or is no local one.
    """
    if is_uri(runs_dir):
        raise RunError(f"--runs-dir {runs_dir}: the demo's runs lie on a disk; give a path")
    _clear(Path(runs_dir))
    console = plain_console(stderr=True)
    console.print("1. pretraining a conv4 on the digits 0-4", highlight=False)
    base = _run("pretrain", runs_dir, _BASE, console)
    accuracy = number(base.manifest.metrics["accuracy"])
    console.print(f"   accuracy {accuracy} on held-out 0-4, {base.manifest.seconds:.1f} s", highlight=False)
    console.print("2. learning the digits 5-9 from 20 images each", highlight=False)
    runs = []
    for contender in _CONTENDERS:
        runs.append(_run("finetune", runs_dir, (f"name={contender.name}", *_FEW, *contender.overrides), console))
        console.print(
            f"   {contender.title}: accuracy {number(runs[-1].manifest.metrics['accuracy'])}", highlight=False
        )
    plain_console().print(_table(runs))
    console.print("3. sweeping over freeze depth and learning rate, the frozen part computed once", highlight=False)
    sweep = _run("sweep", runs_dir, ("name=sweep", *_FEW, _PRETRAINED, *_SWEEP), console)
    plain_console().print(trials_table(sweep.manifest.results["trials"]))
    plain_console().print(reuse_line(sweep.manifest.results["reuse"]), highlight=False, soft_wrap=True)
    console.print("4. stacking the sweep's best trials with models of pixels", highlight=False)
    stack = _run("stack", runs_dir, (*_STACK, f"from_sweep={sweep.folder.location}"), console)
    results = stack.manifest.results
    plain_console().print(leaderboard_table(results["base_models"], results["stack"]))
    console.print("5. telling 5-9 apart from 1 or 5 images of each", highlight=False)
    learners = [
        _run("meta", runs_dir, (f"name={learner.name}", *_META, *learner.overrides), console) for learner in _FEW_SHOT
    ]
    plain_console().print(_few_shot_table(learners))
    plain_console().print(
        f"runs: {runs_dir} (graftstack runs --runs-dir {runs_dir}; graftstack runs show lp-ft --runs-dir {runs_dir})",
        highlight=False,
        soft_wrap=True,
    )


def _run(job: str, runs_dir: str, overrides: Sequence[str], console: Console) -> Run:
    everything = [*_COMMON, f"runs_dir={runs_dir}", *inherited_overrides(overrides), *overrides]
    config = compose_job(job, everything)
    quiet = plain_console(stderr=True, quiet=not console.is_terminal)
    if isinstance(config, SweepConfig):
        with sweep_display(quiet) as display:
            return launch_sweep(config, overrides=everything, display=display)
    if isinstance(config, StackConfig):
        with stack_display(quiet) as display:
            return launch_stack(config, overrides=everything, display=display)
    if isinstance(config, MetaConfig):
        with meta_display(quiet) as display:
            return launch_meta(config, overrides=everything, display=display)
    assert isinstance(config, FinetuneConfig)
    with job_display(quiet) as display:
        return launch(job, config, overrides=everything, display=display)


def _clear(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"--runs-dir {folder}: a file, not a folder; choose another")
    known = {"digits-0-4", "sweep", "stack", *(contender.name for contender in (*_CONTENDERS, *_FEW_SHOT))}
    found = {run.manifest.name for run in list_runs(str(folder))}
    if strange := {path.name for path in folder.iterdir()} - (known & found):
        raise RunError(f"--runs-dir {folder}: holds {sorted(strange)[0]}, which is no demo run; choose another folder")
    shutil.rmtree(folder)


def _few_shot_table(runs: Sequence[Run]) -> Table:
    table = empty_table("5-way, of the pretrained backbone", "1 image each, %", "5 images each, %", "seconds")
    for learner, run in zip(_FEW_SHOT, runs, strict=True):
        rows = run.manifest.results["table"]
        accuracies = (f"{100 * row['accuracy']:.1f} ± {100 * row['ci95']:.1f}" for row in rows)
        table.add_row(learner.title, *accuracies, f"{run.manifest.seconds:.1f}")
    return table


def _table(runs: Sequence[Run]) -> Table:
    table = Table(title="digits 5-9 from 20 images each", header_style="bold", box=None, pad_edge=False)
    for column in ("start", "frozen groups", "accuracy", "macro F1", "ECE", "seconds"):
        table.add_column(column)
    for contender, run in zip(_CONTENDERS, runs, strict=True):
        manifest = run.manifest
        metrics = (number(manifest.metrics[name]) for name in ("accuracy", "macro_f1", "ece"))
        table.add_row(contender.title, str(manifest.details["freeze_depth"]), *metrics, f"{manifest.seconds:.1f}")
    return table
