"""Jobs as a person meets them: composed, launched with a display, and summed up."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.table import Table

from graftstack.cluster.finetune import launch
from graftstack.cluster.launching import check, saved_overrides
from graftstack.cluster.sweep import launch_sweep, plan_sweep
from graftstack.config.compose import compose_job
from graftstack.config.schema import FinetuneConfig
from graftstack.config.sweep import SweepConfig
from graftstack.report import sweep_tables, tables
from graftstack.report.console import plain_console
from graftstack.report.progress import job_display
from graftstack.report.sweep_progress import sweep_display
from graftstack.runs import Run, find_run


def run_job(job: str, overrides: Sequence[str], *, verbose: bool = False) -> Run:
    """Runs a job to its end, showing its progress, and prints where its results lie."""
    console = plain_console(stderr=True)
    overrides = [*saved_overrides(overrides), *overrides]
    config = compose_job(job, overrides)
    if isinstance(config, SweepConfig):
        with sweep_display(console) as display:
            run = launch_sweep(config, overrides=overrides, display=display, verbose=verbose)
        console.print(sweep_tables.trials_table(run.manifest.results["trials"]))
        console.print(sweep_tables.reuse_line(run.manifest.results["reuse"]), highlight=False, soft_wrap=True)
    else:
        with job_display(console) as display:
            run = launch(job, config, overrides=overrides, display=display, verbose=verbose)
    accuracy = tables.number(run.manifest.metrics.get("accuracy"))
    console.print(f"{run.manifest.name}: {run.manifest.status}, accuracy {accuracy}", highlight=False, soft_wrap=True)
    plain_console().print(run.folder.location, highlight=False, soft_wrap=True)
    return run


def plan_job(job: str, overrides: Sequence[str], *, as_json: bool) -> None:
    """Checks a job and prints what it would do."""
    config = compose_job(job, overrides)
    shown, found = (
        _plan_of_sweep(config, overrides) if isinstance(config, SweepConfig) else _plan(job, config, overrides)
    )
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for table in shown:
        plain_console().print(table, "")


def _plan(job: str, config: FinetuneConfig, overrides: Sequence[str]) -> tuple[list[Table], dict[str, Any]]:
    config = check(job, config, overrides).config

    from graftstack.finetune.plan import make_plan
    from graftstack.finetune.task import prepare

    with job_display(plain_console(stderr=True)) as display:
        plan = make_plan(prepare(config, progress=display.reading))
    return tables.plan_tables(plan), asdict(plan)


def _plan_of_sweep(config: SweepConfig, overrides: Sequence[str]) -> tuple[list[Table], dict[str, Any]]:
    with sweep_display(plain_console(stderr=True), shows_plan=False) as display:
        plan, probes = plan_sweep(config, overrides=overrides, display=display)
    found = {**asdict(plan), "predicted_s": plan.predicted_s, "probes": [score._asdict() for score in probes]}
    return sweep_tables.plan_tables(plan, probes), found


def predict_run(reference: str, location: str, out: str, *, runs_dir: str) -> None:
    """Writes a prediction for every row of the data at `location` to the Parquet file `out`."""
    run = find_run(reference, runs_dir)

    from graftstack.finetune import predict

    predict.check_out(out)
    with job_display(plain_console(stderr=True)) as display:
        table = predict.predict(run, predict.data_at(location, predict.data_of_run(run)), progress=display.reading)
    predict.write_predictions(table, out)
    plain_console(stderr=True).print(f"{table.num_rows} predictions", highlight=False)
    plain_console().print(out, highlight=False, soft_wrap=True)


def evaluate_run(reference: str, location: str | None, *, part: str | None, as_json: bool, runs_dir: str) -> None:
    """Prints the metrics of a run's model on its own validation part, or on other data."""
    run = find_run(reference, runs_dir)

    from graftstack.finetune import predict

    own = predict.data_of_run(run)
    data = own if location is None else predict.data_at(location, own)
    if location is not None and part not in (None, "all"):
        data = replace(data, split=own.split, group=own.group)
    with job_display(plain_console(stderr=True)) as display:
        default_part = "val" if location is None else "all"
        metrics = predict.evaluate(run, data, part=part or default_part, progress=display.reading)
    if as_json:
        print(json.dumps(metrics))
    else:
        plain_console().print(tables.metrics_table(metrics))
