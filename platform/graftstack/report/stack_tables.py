"""The plan and the results of a stack as tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from graftstack.amounts import size
from graftstack.report.tables import add_memory, empty_table, number

if TYPE_CHECKING:
    from graftstack.stacking.leakage import LeakageReport
    from graftstack.stacking.plan import StackPlan


def plan_tables(plan: "StackPlan") -> list[Table]:
    """The base models, and the sums."""
    bases = empty_table("base model", "estimator", "level", "learns from", "is asked for", "tasks", "seconds a fold")
    for row in plan.bases:
        bases.add_row(
            row.name, row.estimator, str(row.level), row.view, row.method, str(row.num_tasks), _seconds(row.fit_s)
        )
    sums = empty_table("stack", "")
    sums.add_row("rows", f"{plan.num_rows} in {plan.num_folds} folds, {plan.num_held_out} held out")
    if plan.num_features is not None:
        sums.add_row("columns", str(plan.num_features))
    sums.add_row("classes", str(plan.num_classes) if plan.num_classes else "none: a regression")
    sums.add_row("meta-model", plan.meta_model)
    sums.add_row("mode", plan.mode)
    sums.add_row("tasks", f"{plan.num_tasks} on {plan.num_slots} slots")
    if plan.tap_bytes:
        sums.add_row("taps to write", size(plan.tap_bytes))
    add_memory(sums, plan.worker_memory_bytes, plan.device_memory_bytes)
    sums.add_row("predicted", "-" if plan.predicted_s is None else f"{plan.predicted_s:.1f} s")
    for note in plan.notes:
        sums.add_row("note", note)
    return [bases, sums]


def leaderboard_table(bases: Sequence[Mapping[str, Any]], stack: Mapping[str, Any]) -> Table:
    """One row for each base model, the best first, and the stack on top."""
    found = empty_table("model", "cv score", "spread", "cv loss", "held out", "loss", "weight", "fit s", "predict s")
    for column in found.columns[1:]:
        column.no_wrap = True  # where room is short, names give way
    for row in (stack, *bases):
        scores = ("cv_score", "cv_spread", "cv_loss", "held_out_score", "held_out_loss")
        own = (number(row["weight"]), _seconds(row["fit_s"]), _seconds(row["predict_s"])) if row is not stack else ()
        found.add_row(row["name"], *(number(row[key]) for key in scores), *own, end_section=row is stack)
    return found


def leakage_table(report: "LeakageReport") -> Table:
    """Each base model and the stack on shuffled labels, against what chance explains."""
    found = empty_table("on shuffled labels", "score", "chance, at most", "")
    for row in report.rows:
        found.add_row(row.name, number(row.score), number(row.bound), "leaks" if row.leaks else "at chance")
    return found


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
