"""Runs, plans and results as tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from graftstack.amounts import size
from graftstack.config.plain import flatten
from graftstack.runs import Manifest

if TYPE_CHECKING:
    from graftstack.finetune.plan import Plan


def runs_table(manifests: Iterable[Manifest]) -> Table:
    """One row for each run, oldest first."""
    table = empty_table("name", "job", "status", "accuracy", "seconds", "started (UTC)")
    for run in manifests:
        accuracy = run.metrics.get("accuracy")
        table.add_row(run.name, run.job, run.status, number(accuracy), f"{run.seconds:.1f}", run.started[:19])
    return table


def run_table(run: Manifest) -> Table:
    """One run: what it is, its metrics and what it left."""
    table = empty_table(run.name, f"{run.job}, {run.status}")
    table.add_row("started (UTC)", run.started[:19])
    table.add_row("seconds", f"{run.seconds:.1f}")
    for group in (run.metrics, run.details, run.artifacts):
        for name, value in group.items():
            table.add_row(name, number(value))
    if run.error:
        table.add_row("error", run.error)
    return table


def comparison_table(runs: Sequence[Manifest]) -> Table:
    """Metrics side by side, and the configuration keys in which the runs differ."""
    table = empty_table("", *(run.name for run in runs))
    for metric in _union(run.metrics for run in runs):
        table.add_row(metric, *(number(run.metrics.get(metric)) for run in runs))
    table.add_row("seconds", *(f"{run.seconds:.1f}" for run in runs), end_section=True)
    flat = [flatten(run.config) for run in runs]
    for key in _union(flat):
        values = [config.get(key) for config in flat]
        if key not in ("name", "resume") and any(value != values[0] for value in values):
            table.add_row(key, *map(number, values))
    return table


def plan_tables(plan: "Plan") -> list[Table]:
    """The data, the layer groups and the phases of a plan."""
    data = empty_table("plan", "")
    data.add_row("backbone", f"{plan.backbone}, weights: {plan.weights}")
    data.add_row("images", f"{plan.num_train} train, {plan.num_val} validation, {plan.num_test} test")
    data.add_row("classes", str(plan.num_classes))
    data.add_row("image size", f"{plan.image_size} x {plan.image_size} pixels")
    data.add_row("skipped images", str(plan.num_skipped_images))
    data.add_row("decoded images", size(plan.cache_bytes))
    data.add_row("checkpoint, at most", size(plan.checkpoint_bytes))
    add_memory(data, plan.worker_memory_bytes, plan.device_memory_bytes)
    data.add_row("validation", f"{plan.validation_s:.2f} s")
    data.add_row("predicted, one worker here", f"{plan.predicted_s:.1f} s")

    groups = empty_table("group", "layers", "parameters", "")
    for index, group in enumerate(plan.groups):
        groups.add_row(str(index), group.name, f"{group.num_parameters:,}", "frozen" if group.is_frozen else "trains")
    groups.add_row("", "head", "", "trains")

    phases = empty_table("steps", "freeze depth", "seconds a step")
    for phase in plan.phases:
        phases.add_row(f"{phase.first_step}-{phase.last_step}", str(phase.freeze_depth), f"{phase.step_s:.3f}")
    return [data, groups, phases]


def add_memory(table: Table, worker_bytes: int, device_bytes: int | None) -> None:
    """Adds to a table of a plan what a worker needs of the machine, and of its GPU if it has one."""
    table.add_row("memory of a worker", size(worker_bytes))
    if device_bytes is not None:
        table.add_row("memory of its GPU", size(device_bytes))


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """One row for each metric."""
    table = empty_table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, number(value))
    return table


def number(value: object) -> str:
    """Returns a value as a table shows it: four decimals, and a dash for none."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _union(groups: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))


def empty_table(*columns: str) -> Table:
    """Returns a table without rows, in the style of all."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
