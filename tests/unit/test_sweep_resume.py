"""A trial that is resumed leaves nothing behind for the next, whose backbone is the same one in memory."""

from pathlib import Path
from typing import Any

import pytest

from graftstack.cluster.sweep import launch_sweep
from graftstack.config.compose import compose_job
from graftstack.runs import Run
from graftstack.sweep.drive import Progress
from graftstack.sweep.trials import EpochEnd

SMALL = (
    *("data=digits", "data.image_size=8", "data.classes=[0,1,2,3]", "backbone=conv4", "batch_size=32", "epochs=2"),
    *("space.freeze_depth=[0,2,4]", "cluster=inline", "cluster.cpus_per_worker=1"),
)


class Interrupting:
    """Interrupts the sweep after an epoch of a trial: its checkpoint is on disk, and its row is not."""

    def __init__(self, trial: int, epoch: int) -> None:
        self.moment = (trial, epoch)

    def trials(self, progress: Progress, total: int) -> None:
        event = progress.event
        if isinstance(event, EpochEnd):
            [(trial, row)] = event.rows.items()
            if (trial, row["epoch"]) == self.moment:
                raise KeyboardInterrupt

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def sweep(tmp_path: Path, *overrides: str, display: Interrupting) -> Run:
    everything = [*SMALL, f"runs_dir={tmp_path}", *overrides]
    return launch_sweep(compose_job("sweep", everything), overrides=everything, display=display)


def rows_of(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.manifest.results["trials"]]


@pytest.mark.parametrize("epoch", [1, 2], ids=["in the middle", "at its end"])
@pytest.mark.parametrize("trial", [0, 1])
def test_a_trial_interrupted_between_two_epochs_and_all_after_it_end_as_unbroken_ones(
    tmp_path: Path, trial: int, epoch: int
) -> None:
    never = Interrupting(0, 0)
    unbroken = sweep(tmp_path, "name=unbroken", display=never)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, "name=broken", display=Interrupting(trial, epoch))
    broken = sweep(tmp_path, "name=broken", "resume=true", display=never)
    assert rows_of(broken) == rows_of(unbroken)
    reuse = broken.manifest.results["reuse"]
    assert reuse["backbone_forwards"] <= reuse["unique_samples"], "what trains counts as frozen"
