"""Jobs as a person meets them: composed, launched with a display, and summed up."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from graftstack.cluster.finetune import launch
from graftstack.cluster.launching import await_owner, check
from graftstack.cluster.meta import launch_meta, plan_meta
from graftstack.cluster.pipeline import PipelineDisplays, check_stack_part, launch_pipeline
from graftstack.cluster.stack import check_leakage, launch_stack, plan_stack
from graftstack.cluster.sweep import launch_sweep, plan_sweep
from graftstack.config.k8s import k8s_config
from graftstack.config.schema import ClusterKind
from graftstack.config.spec import Spec, from_bytes
from graftstack.errors import EXIT_DONE, BadInputError
from graftstack.report import meta_tables, stack_tables, sweep_tables, tables
from graftstack.report.composing import Composed, composed
from graftstack.report.console import plain_console
from graftstack.report.meta_progress import meta_display
from graftstack.report.progress import job_display
from graftstack.report.stack_progress import stack_display
from graftstack.report.sweep_progress import sweep_display
from graftstack.runs import Run


class _Asked(NamedTuple):
    """A job that a person has asked for."""

    job: str
    config: Any
    overrides: list[str]
    console: Console
    verbose: bool


def run_job(job: str, overrides: Sequence[str], *, verbose: bool = False) -> int:
    """Runs a job to its end, showing its progress, and prints where its results lie; returns its exit status."""
    found = composed(job, overrides)
    if found.is_for_kubernetes:
        from graftstack.report.kubernetes import run_on_kubernetes

        return run_on_kubernetes(job, found)
    _run(_asked_of(job, found, plain_console(stderr=True), verbose=verbose))
    return EXIT_DONE


def run_spec(job: str, path: str, *, verbose: bool = False) -> int:
    """Runs the job in a file as `run_job` does; one that was begun goes on, one that is done is found to be."""
    spec = _read_spec(job, path)
    console = plain_console(stderr=True)
    await_owner(spec.config, say=lambda text: console.print(text, highlight=False, soft_wrap=True))
    _run(_Asked(job, spec.config, spec.overrides, console, verbose))
    return EXIT_DONE


def _read_spec(job: str, path: str) -> Spec:
    try:
        spec = from_bytes(Path(path).read_bytes())
    except OSError as error:
        raise BadInputError(f"--spec {path}: can't be read ({error.strerror}); give the path of a spec") from error
    except BadInputError as error:
        raise BadInputError(f"--spec {path}: {error}") from error
    if spec.job != job:
        raise BadInputError(f"--spec {path}: holds a {spec.job} job; use graftstack {spec.job} --spec")
    return spec


def _run(asked: _Asked) -> None:
    console = asked.console
    run = _RUN[asked.job](asked)
    name, value = next(iter(_main_metric(run.manifest.metrics).items()))
    said = f"{run.manifest.name}: {run.manifest.status}, {name} {tables.number(value)}"
    console.print(said, highlight=False, soft_wrap=True)
    plain_console().print(run.folder.location, highlight=False, soft_wrap=True)


def plan_job(job: str, overrides: Sequence[str], *, as_json: bool) -> None:
    """Checks a job and prints what it would do."""
    planned = _PLAN[job](_asked(job, overrides, plain_console(stderr=True), verbose=False))
    if as_json:
        print(json.dumps(planned.found, indent=2))
        return
    for table in planned.tables:
        plain_console().print(table, "")


def check_job_for_leakage(job: str, overrides: Sequence[str], *, verbose: bool = False) -> bool:
    """Prints how a stack does on shuffled labels, and returns whether nothing does better than chance."""
    if job != "stack":
        raise BadInputError(f"--check-leakage: looks into a stack; use graftstack stack --check-leakage, not {job}")
    asked = _asked(job, overrides, plain_console(stderr=True), verbose=verbose)
    if asked.config.cluster.kind is ClusterKind.k8s:
        raise BadInputError("cluster=k8s: --check-leakage runs on this machine; leave it out, or use cluster=ray")
    with stack_display(asked.console) as display:
        report = check_leakage(asked.config, overrides=asked.overrides, display=display, verbose=verbose)
    console = plain_console()
    console.print(stack_tables.leakage_table(report))
    verdict = f"leaks: {', '.join(report.leaking)}" if report.leaking else "no leak: all is at chance"
    console.print(verdict, highlight=False, soft_wrap=True)
    return not report.leaking


def _asked(job: str, overrides: Sequence[str], console: Console, *, verbose: bool) -> _Asked:
    return _asked_of(job, composed(job, overrides), console, verbose=verbose)


def _asked_of(job: str, found: Composed, console: Console, *, verbose: bool) -> _Asked:
    if found.is_for_kubernetes:
        k8s_config(found.k8s_words)  # checks them
    else:
        found.refuse_k8s_words()
    return _Asked(job, found.config, found.overrides, console, verbose)


def _main_metric(metrics: dict[str, float]) -> dict[str, float | None]:
    """Returns the metric by which runs are compared: the accuracy; the error of a regression."""
    return {"rmse": metrics["rmse"]} if "rmse" in metrics else {"accuracy": metrics.get("accuracy")}


def _run_training(asked: _Asked) -> Run:
    with job_display(asked.console) as display:
        return launch(asked.job, asked.config, overrides=asked.overrides, display=display, verbose=asked.verbose)


def _run_sweep(asked: _Asked) -> Run:
    with sweep_display(asked.console) as display:
        run = launch_sweep(asked.config, overrides=asked.overrides, display=display, verbose=asked.verbose)
    _show_sweep(run, asked.console)
    return run


def _run_stack(asked: _Asked) -> Run:
    with stack_display(asked.console) as display:
        run = launch_stack(asked.config, overrides=asked.overrides, display=display, verbose=asked.verbose)
    _show_stack(run, asked.console)
    return run


def _run_meta(asked: _Asked) -> Run:
    with meta_display(asked.console) as display:
        run = launch_meta(asked.config, overrides=asked.overrides, display=display, verbose=asked.verbose)
    asked.console.print(meta_tables.few_shot_table(run.manifest.results["table"]))
    return run


def _run_pipeline(asked: _Asked) -> Run:
    with sweep_display(asked.console) as sweep, stack_display(asked.console) as stack:
        displays = PipelineDisplays(sweep, stack)
        run = launch_pipeline(asked.config, overrides=asked.overrides, displays=displays, verbose=asked.verbose)
    _show_sweep(run, asked.console)
    _show_stack(run, asked.console)
    return run


def _show_sweep(run: Run, console: Console) -> None:
    console.print(sweep_tables.trials_table(run.manifest.results["trials"]))
    console.print(sweep_tables.reuse_line(run.manifest.results["reuse"]), highlight=False, soft_wrap=True)


def _show_stack(run: Run, console: Console) -> None:
    results = run.manifest.results
    console.print(stack_tables.leaderboard_table(results["base_models"], results["stack"]))


class _Planned(NamedTuple):
    tables: list[Table]
    found: dict[str, Any]
    """For ``--json``."""


def _plan_training(asked: _Asked) -> _Planned:
    config = check(asked.job, asked.config, asked.overrides).config

    from graftstack.finetune.plan import make_plan
    from graftstack.finetune.task import prepare

    with job_display(asked.console) as display:
        plan = make_plan(prepare(config, progress=display.reading))
    return _Planned(tables.plan_tables(plan), asdict(plan))


def _plan_sweep(asked: _Asked) -> _Planned:
    with sweep_display(asked.console, shows_plan=False) as display:
        plan, probes = plan_sweep(asked.config, overrides=asked.overrides, display=display)
    found = {**asdict(plan), "predicted_s": plan.predicted_s, "probes": [score._asdict() for score in probes]}
    return _Planned(sweep_tables.plan_tables(plan, probes), found)


def _plan_stack(asked: _Asked) -> _Planned:
    with stack_display(asked.console) as display:
        plan = plan_stack(asked.config, overrides=asked.overrides, display=display)
    return _Planned(stack_tables.plan_tables(plan), asdict(plan))


def _plan_meta(asked: _Asked) -> _Planned:
    with meta_display(asked.console) as display:
        plan = plan_meta(asked.config, overrides=asked.overrides, display=display)
    return _Planned(meta_tables.plan_tables(plan), asdict(plan))


def _plan_pipeline(asked: _Asked) -> _Planned:
    """The stack depends on the trials that the sweep finds best; as far as it doesn't, it is checked."""
    with stack_display(asked.console) as display:
        check_stack_part(asked.config, asked.overrides, display)
    return _plan_sweep(asked)


_RUN: dict[str, Callable[[_Asked], Run]] = {
    "finetune": _run_training,
    "pretrain": _run_training,
    "sweep": _run_sweep,
    "stack": _run_stack,
    "meta": _run_meta,
    "pipeline": _run_pipeline,
}

_PLAN: dict[str, Callable[[_Asked], _Planned]] = {
    "finetune": _plan_training,
    "pretrain": _plan_training,
    "sweep": _plan_sweep,
    "stack": _plan_stack,
    "meta": _plan_meta,
    "pipeline": _plan_pipeline,
}
