"""Jobs as a person meets them: composed, launched with a display, and summed up."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from graftstack.cluster.finetune import check, launch, saved_overrides
from graftstack.config.compose import compose_job
from graftstack.report import tables
from graftstack.report.console import plain_console
from graftstack.report.progress import job_display
from graftstack.runs import Run, find_run


def run_job(job: str, overrides: Sequence[str], *, verbose: bool = False) -> Run:
    """Runs a job to its end, showing its progress, and prints where its results lie."""
    console = plain_console(stderr=True)
    overrides = [*saved_overrides(overrides), *overrides]
    config = compose_job(job, overrides)
    with job_display(console) as display:
        run = launch(job, config, overrides=overrides, display=display, verbose=verbose)
    accuracy = tables.number(run.manifest.metrics.get("accuracy"))
    console.print(f"{run.manifest.name}: {run.manifest.status}, accuracy {accuracy}", highlight=False, soft_wrap=True)
    plain_console().print(run.folder.location, highlight=False, soft_wrap=True)
    return run


def plan_job(job: str, overrides: Sequence[str], *, as_json: bool) -> None:
    """Checks a job and prints what it would do."""
    config = check(job, compose_job(job, overrides), overrides).config

    from graftstack.finetune.plan import make_plan
    from graftstack.finetune.task import prepare

    with job_display(plain_console(stderr=True)) as display:
        plan = make_plan(prepare(config, progress=display.reading))
    if as_json:
        print(json.dumps(asdict(plan), indent=2))
        return
    for table in tables.plan_tables(plan):
        plain_console().print(table, "")


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
