"""The plan and the results of a sweep as tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from graftstack.amounts import size
from graftstack.report.tables import add_memory, empty_table, number

if TYPE_CHECKING:
    from graftstack.sweep.plan import SweepPlan
    from graftstack.sweep.probe import ProbeScore

# The columns that every trial has; what else it has are its values of the keys in the space.
_COMMON = ("trial", "freeze_depth", "lr", "status", "metrics", "seconds", "epochs", "error")
_MOST_ROWS = 40


def plan_tables(plan: "SweepPlan", probes: Sequence["ProbeScore"] = ()) -> list[Table]:
    """What each depth costs and how it is shared; why; and the sums."""
    return [_depths(plan, probes), _reasons(plan), _sums(plan)]


def _depths(plan: "SweepPlan", probes: Sequence["ProbeScore"]) -> Table:
    known = {(score.backbone, score.depth): score for score in probes}
    columns = ["backbone", "depth", "trials", "frozen part", "tap", "seconds", "unshared"]
    found = empty_table(*columns, *(["ridge", "k-NN"] if probes else []))
    for row in plan.depths:
        score = known.get((row.trunk, row.boundary))
        scores = ["-", "-"] if score is None else [number(score.ridge), number(score.knn)]
        found.add_row(
            row.trunk,
            str(row.freeze_depth),
            f"{row.num_trials} fused" if row.num_units < row.num_trials else str(row.num_trials),
            _WORDS[row.action],
            size(row.tap_bytes) if row.tap_bytes else "-",
            f"{row.seconds:.1f}",
            f"{row.uncached_s:.1f}",
            *(scores if probes else []),
        )
    return found


def _reasons(plan: "SweepPlan") -> Table:
    found = empty_table("depth", "why")
    for row in plan.depths:
        alone = f"; not fused: {row.why_not_fused}" if row.why_not_fused and row.num_trials > 1 else ""
        found.add_row(str(row.freeze_depth), f"{row.reason}{alone}")
    return found


def _sums(plan: "SweepPlan") -> Table:
    found = empty_table("sweep", "")
    found.add_row("trials", str(plan.num_trials))
    found.add_row("images", str(plan.num_images))
    found.add_row("taps to write", size(plan.tap_bytes))
    found.add_row("one pass for them", f"{plan.pass_s:.1f} s")
    if plan.worker_memory_bytes is not None:
        add_memory(found, plan.worker_memory_bytes, plan.device_memory_bytes)
    if plan.start_s:
        found.add_row("starting processes", f"{plan.start_s:.1f} s")
    found.add_row("predicted", f"{plan.predicted_s:.1f} s")
    found.add_row("without sharing", f"{plan.uncached_s:.1f} s")
    return found


_WORDS = {
    "tap": "once",
    "stored": "stored already",
    "recompute": "each epoch",
    "images": "none",
}


def trials_table(trials: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each trial, the best first."""
    own = [key for key in dict.fromkeys(key for trial in trials for key in trial) if key not in _COMMON]
    shown = sorted(trials, key=_rank)[:_MOST_ROWS]
    found = empty_table("trial", "freeze depth", "lr", *own, "accuracy", "loss", "epochs", "seconds", "status")
    for trial in shown:
        metrics = trial["metrics"]
        status = f"{trial['status']}: {trial['error']}" if trial.get("error") else trial["status"]
        found.add_row(
            str(trial["trial"]),
            str(trial.get("freeze_depth", "-")),
            f"{trial['lr']:g}" if "lr" in trial else "-",
            *(number(trial.get(key)) for key in own),
            number(metrics.get("accuracy")),
            number(metrics.get("loss")),
            str(trial["epochs"]),
            f"{trial['seconds']:.2f}",
            status,
        )
    if len(trials) > len(shown):
        found.caption = f"and {len(trials) - len(shown)} more; graftstack runs show RUN --json has all"
    return found


def reuse_line(reuse: Mapping[str, float]) -> str:
    """What sharing came to, in one line."""
    per_sample = reuse["backbone_forwards"] / max(1, reuse["unique_samples"])
    return (
        f"frozen forwards per sample {per_sample:.2f}; predicted {reuse['predicted_s']:.1f} s, "
        f"took {reuse['actual_s']:.1f} s"
    )


def _rank(trial: Mapping[str, Any]) -> tuple[float, float, int]:
    metrics = trial["metrics"]
    return -metrics.get("accuracy", -1.0), metrics.get("loss", 0.0), trial["trial"]
