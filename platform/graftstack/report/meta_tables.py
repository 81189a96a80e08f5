"""The plan and the results of meta-learning as tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from graftstack.amounts import duration
from graftstack.report.tables import add_memory, empty_table

if TYPE_CHECKING:
    from graftstack.meta.plan import MetaPlan


def few_shot_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy over ways and shots, with 95 % confidence intervals."""
    found = empty_table("ways", "shots", "accuracy, %", "nearest neighbour, %", "BatchNorm", "episodes", "diverged")
    for row in rows:
        nearest = row["nearest_neighbour"]
        found.add_row(
            str(row["num_ways"]),
            str(row["num_shots"]),
            f"{100 * row['accuracy']:.2f} ± {100 * row['ci95']:.2f}",
            "-" if nearest is None else f"{100 * nearest:.2f}",
            row["batchnorm"],
            str(row["num_episodes"]),
            str(row["num_diverged"] or "-"),
        )
    return found


def plan_tables(plan: "MetaPlan") -> list[Table]:
    """The network and the classes, and the sums."""
    ways, shots, queries = plan.training
    found = empty_table("plan", "")
    found.add_row("method", f"{plan.method}, BatchNorm {plan.batchnorm}")
    found.add_row("backbone", f"{plan.backbone}, weights: {plan.weights}")
    found.add_row("meta-parameters", f"{plan.num_parameters:,}")
    found.add_row("images", f"{plan.num_images} of {plan.image_size} x {plan.image_size} pixels")
    found.add_row("skipped images", str(plan.num_skipped_images))
    found.add_row(
        "classes",
        f"{plan.num_train_classes} train, {plan.num_val_classes} validation, {plan.num_test_classes} held out",
    )
    found.add_row("training episodes", f"{plan.num_episodes} of {ways} ways, {shots} shots, {queries} queries")
    found.add_row("steps", f"{plan.num_steps}, each for {plan.num_blocks} workers at most; {plan.num_workers} work")
    table = ", ".join(f"{ways}-way {shots}-shot" for ways, shots in plan.evaluation)
    found.add_row("evaluation", f"{plan.num_eval_episodes} episodes each of {table}")
    add_memory(found, plan.worker_memory_bytes, plan.device_memory_bytes)
    found.add_row("a training episode here", f"{plan.episode_s:.3f} s")
    found.add_row("predicted", duration(plan.predicted_s))
    return [found]
