"""Predicting and evaluating as a person meets it: with any run's model, be it one network or a stack."""

import json
from dataclasses import replace

from graftstack.errors import BadInputError
from graftstack.report import tables
from graftstack.report.console import plain_console
from graftstack.report.progress import job_display
from graftstack.runs import Run, find_run
from graftstack.storage import Folder

_STACKS = ("stack", "pipeline")


def predict_run(reference: str, location: str, out: str, *, base: str | None, runs_dir: str) -> None:
    """Writes a prediction for every row of the data at `location` to the Parquet file `out`.

    Args:
        reference: The run.
        location: A Parquet or CSV file, a folder of images, or digits.
        out: A path or URI.
        base: The base model of a stack that is to predict alone.
        runs_dir: Where runs lie that are named.
    """
    run = find_run(reference, runs_dir)

    from graftstack.finetune import predict

    predict.check_out(out)
    data = predict.data_at(location, predict.data_of_run(run))
    with job_display(plain_console(stderr=True)) as display:
        if _is_stack(run):
            from graftstack.stacking.predict import predict_stack

            table = predict_stack(run, data, base=base, progress=display.reading)
        elif base is not None:
            raise BadInputError(f"--base {base}: {reference} is no stack; leave it out")
        else:
            table = predict.predict(run, data, progress=display.reading)
    predict.write_predictions(table, out)
    plain_console(stderr=True).print(f"{table.num_rows} predictions", highlight=False)
    plain_console().print(out, highlight=False, soft_wrap=True)


def evaluate_run(reference: str, location: str | None, *, part: str | None, as_json: bool, runs_dir: str) -> None:
    """Prints the metrics of a run's model on its own validation part, or on other data."""
    run = find_run(reference, runs_dir)

    from graftstack.finetune import predict

    data = own = predict.data_of_run(run)
    if location is not None:
        data = predict.data_at(location, own)
        if part not in (None, "all"):
            data = replace(data, split=own.split, group=own.group)
    wanted = part or ("val" if location is None else "all")
    with job_display(plain_console(stderr=True)) as display:
        if _is_stack(run):
            from graftstack.stacking.predict import evaluate_stack

            metrics = evaluate_stack(run, data, part=wanted, progress=display.reading)
        else:
            metrics = predict.evaluate(run, data, part=wanted, progress=display.reading)
    if as_json:
        print(json.dumps(metrics))
    else:
        plain_console().print(tables.metrics_table(metrics))


def _is_stack(run: Run) -> bool:
    from graftstack.stacking.artifact import CARD

    return run.manifest.job in _STACKS and Folder(run.artifact("model")).exists(CARD)
