"""Runs as a person meets them: listed, shown and compared."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.table import Table

from graftstack.errors import BadInputError
from graftstack.report import tables
from graftstack.report.console import plain_console
from graftstack.runs import Manifest, Run, find_run, list_runs

# How many runs each action takes, at least and at most, and how to say so.
_NUM_NAMES = {"list": (0, 0, "no run"), "show": (1, 1, "one run"), "compare": (2, 99, "two runs or more")}


def show_runs(action: str, names: Sequence[str], *, runs_dir: str, as_json: bool) -> None:
    """Prints all runs (list), one (show), or several side by side (compare).

    Raises:
        BadInputError: not as many names as the action takes, or there is no such run.
    """
    least, most, wanted = _NUM_NAMES[action]
    if not least <= len(names) <= most:
        raise BadInputError(f"{' '.join(('runs', action, *names))}: takes {wanted}; see graftstack runs --help")
    if action == "list":
        manifests = [run.manifest for run in list_runs(runs_dir)]
    else:
        manifests = [_with_trials(find_run(name, runs_dir)) for name in names]
    if as_json:
        shown = [_shown(manifest) for manifest in manifests]
        print(json.dumps(shown[0] if action == "show" else shown, indent=2))
        return
    console = plain_console()
    match action:
        case "list" if not manifests:
            console.print(f"no runs in {runs_dir}", highlight=False)
        case "list":
            console.print(tables.runs_table(manifests))
        case "show":
            console.print(tables.run_table(manifests[0]))
            for table in _job_tables(manifests[0].results):
                console.print("", table)
        case _:
            console.print(tables.comparison_table(manifests))


def _job_tables(results: dict[str, Any]) -> Iterator[Table]:
    """Yields what the job of a run has to show beside its metrics."""
    if trials := results.get("trials"):
        from graftstack.report.sweep_tables import trials_table

        yield trials_table(trials)
    if bases := results.get("base_models"):
        from graftstack.report.stack_tables import leaderboard_table

        yield leaderboard_table(bases, results["stack"])
    if rows := results.get("table"):
        from graftstack.report.meta_tables import few_shot_table

        yield few_shot_table(rows)


def _with_trials(run: Run) -> Manifest:
    """Returns the manifest of a run; that of a sweep which isn't done gets the trials that are over."""
    if run.manifest.job != "sweep" or "trials" in run.manifest.results:
        return run.manifest
    from graftstack.sweep.ledger import Ledger, trial_rows

    trials = trial_rows(Ledger(run.folder / "trials").read().values())
    return replace(run.manifest, results={**run.manifest.results, "trials": trials})


def _shown(manifest: Manifest) -> dict[str, Any]:
    """Returns what ``--json`` prints of a run: the results of its job stand beside what all jobs have."""
    shown = {key: value for key, value in asdict(manifest).items() if key not in ("overrides", "process", "results")}
    return {**shown, **manifest.results}
