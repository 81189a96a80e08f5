"""Predicting and evaluating as a person meets it: with any run's model, a network, a stack or a few-shot learner."""

import json
from dataclasses import replace

from graftstack.errors import BadInputError
from graftstack.report import meta_tables, tables
from graftstack.report.console import plain_console
from graftstack.report.meta_progress import meta_display
from graftstack.report.progress import job_display
from graftstack.runs import Run, find_run
from graftstack.storage import Folder

_STACKS = ("stack", "pipeline")


def predict_run(
    reference: str, location: str, out: str, *, base: str | None, support: str | None, runs_dir: str
) -> None:
    """Writes a prediction for every row of the data at `location` to the Parquet file `out`.

    Args:
        reference: The run.
        location: A Parquet or CSV file, a folder of images, or digits.
        out: A path or URI.
        base: The base model of a stack that is to predict alone.
        support: Labelled images, in any form that `location` may have, from which a few-shot learner learns classes.
        runs_dir: Where runs lie that are named.
    """
    run = find_run(reference, runs_dir)
    _check_support(run, reference, support)

    from graftstack.finetune import predict

    predict.check_out(out)
    data = predict.data_at(location, predict.data_of_run(run))
    with job_display(plain_console(stderr=True)) as display:
        if _is_stack(run):
            from graftstack.stacking.predict import predict_stack

            table = predict_stack(run, data, base=base, progress=display.reading)
        elif base is not None:
            raise BadInputError(f"--base {base}: {reference} is no stack; leave it out")
        elif support is not None:
            from graftstack.meta.predict import predict_meta

            shown = predict.data_at(support, predict.data_of_run(run))
            table = predict_meta(run, data, shown, progress=display.reading)
        else:
            table = predict.predict(run, data, progress=display.reading)
    predict.write_predictions(table, out)
    plain_console(stderr=True).print(f"{table.num_rows} predictions", highlight=False)
    plain_console().print(out, highlight=False, soft_wrap=True)


def evaluate_run(reference: str, location: str | None, *, part: str | None, as_json: bool, runs_dir: str) -> None:
    """Prints the metrics of a run's model on its own validation part, or on other data.

    Of a few-shot learner: its accuracy on its own held-out classes, or on those of other data.
    """
    run = find_run(reference, runs_dir)
    if _is_meta(run):
        _evaluate_meta(run, location, part=part, as_json=as_json)
        return

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


def _evaluate_meta(run: Run, location: str | None, *, part: str | None, as_json: bool) -> None:
    if location is None and part == "all":
        raise BadInputError(
            "--split all: few-shot accuracy is told on classes that no training has shown; use test, or train and val "
            "each by itself"
        )
    if location is not None and part not in (None, "all"):
        raise BadInputError(
            f"--split {part}: is of the run's own classes, and {location} is measured whole; leave it out"
        )

    from graftstack.finetune.predict import data_at, data_of_run
    from graftstack.meta.remeasure import evaluate_meta

    data = None if location is None else data_at(location, data_of_run(run))
    with meta_display(plain_console(stderr=True)) as display:
        found = evaluate_meta(
            run, data, part=part or "test", progress=display.reading, tell=display.evaluating, say=display.say
        )
    table = [row._asdict() for row in found]
    if as_json:
        first = {key: table[0][key] for key in ("accuracy", "ci95", "num_episodes", "batchnorm")}
        print(json.dumps({**first, "table": table}))
    else:
        plain_console().print(meta_tables.few_shot_table(table))


def _check_support(run: Run, reference: str, support: str | None) -> None:
    if _is_meta(run) and support is None:
        raise BadInputError(
            f"--support is missing: {reference} learns classes from a few images of each; add --support with labelled "
            "images of them"
        )
    if support is not None and not _is_meta(run):
        job = run.manifest.job
        few_shot = (
            f", or learn from it with a meta run (graftstack meta backbone.weights=run:{reference} num_episodes=0)"
        )
        raise BadInputError(
            f"--support {support}: {reference} is a {job} run, which knows its classes; leave it out"
            f"{'' if job in _STACKS else few_shot}"
        )


def _is_meta(run: Run) -> bool:
    return run.manifest.job == "meta"


def _is_stack(run: Run) -> bool:
    from graftstack.stacking.artifact import CARD

    return run.manifest.job in _STACKS and Folder(run.artifact("model")).exists(CARD)
