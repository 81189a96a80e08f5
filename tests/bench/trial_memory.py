"""The resident memory of a process that trains one trial on a tap: ``python -m tests.bench.trial_memory IMAGES CACHE``.

Prints MiB: the tap, the process before the trial, and at most during it. The tap is made by a process of its own.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

from graftstack.config.compose import compose_job
from graftstack.config.sweep import TapsConfig
from graftstack.finetune.tapping import make_shards, tap_spec
from graftstack.finetune.task import prepare
from graftstack.sweep.runner import RunnerSettings, TrialRunner
from graftstack.sweep.trials import EpochEnd, Trial, Unit

MIB = 2**20


def resident_bytes() -> int:
    """Returns what of this process is in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Makes the tap in a process of its own, then trains on it here."""
    images, cache, *makes = sys.argv[1:]
    overrides = [
        *("data=parquet", f"data.path={images}", "data.image=image", "data.image_size=64", f"data.cache_dir={cache}"),
        *("backbone=conv4", "freeze_depth=1", "epochs=1", "cluster=inline"),
    ]
    config = compose_job("finetune", overrides)
    settings = RunnerSettings(trials_folder=f"{cache}/trials", taps=TapsConfig(), cache_dir=cache, is_on_gpu=False)
    task = prepare(config)
    spec = tap_spec(task, 1, dtype="fp32")
    if makes:
        shards = {shard: [0] for shard in range(spec.num_shards)}
        make_shards(task, settings.store, [spec], shards, device=settings.device_here)
        return
    subprocess.run([sys.executable, "-m", "tests.bench.trial_memory", images, cache, "make"], check=True)
    runner = TrialRunner(settings)
    unit = Unit((Trial(0, {}, config),), spec)
    before = resident_bytes()
    peak, is_over = [before], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.005):
            peak.append(resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert isinstance(runner.start(unit), EpochEnd)
    (result,) = runner.go_on([0]).results  # type: ignore[union-attr]
    is_over.set()
    watcher.join()
    assert result.status == "done", result
    print(spec.num_bytes / MIB, before / MIB, max(peak) / MIB)


if __name__ == "__main__":
    main()
