"""Sweeps that compute the frozen part once, beside a plain Ray Tune sweep of the same trials.

    python -m tests.bench.sweep_speed [head] [depth] [start] [memory] [--num-images 1500] [--rounds 1]

- head: 8 learning rates x 10 epochs of a head on a frozen ResNet-18. Both sides' metrics are compared, trial by trial.
- depth: freeze depth (only the head, last group, last two) x learning rate, with and without sharing, and with ASHA,
  beside the speed-up that the FLOPs of the cost model allow.
- start: what it costs to start one more trial, beside Tune with reuse_actors=True.
- memory: what a trial adds to its process, at two sizes of its tap.

Ray is started before all clocks; a side's time holds everything else: decoding, measuring, the pass, all trials. The
images are real ones of the test data, enlarged; `--gpu` trains both sides on a GPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tests.bench.measuring import REPOSITORY, Table, real_data, timed
from tests.bench.sweep_peer import problem_of, tune_sweep

from graftstack.cluster.finetune import launch
from graftstack.cluster.pool import RayPool
from graftstack.cluster.slots import RaySlots
from graftstack.cluster.sweep import launch_sweep
from graftstack.config.compose import compose_job
from graftstack.report.console import plain_console
from graftstack.report.progress import job_display
from graftstack.report.sweep_progress import sweep_display
from graftstack.runs import Run
from graftstack.sweep.inline_pool import InlinePool
from graftstack.sweep.trials import Pool, Trial, Unit, UnitEnd

HEAD_LRS = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
DEPTH_LRS = [1e-4, 1e-3, 1e-2]
# The product's groups are stem, layer1 .. layer4, pool; the peer's end with layer4.
PEER_DEPTHS = {"all": 5, 4: 4, 3: 3}


def images_file(folder: Path, num_images: int, *, classes: Sequence[int] = range(10, 20)) -> Path:
    """Writes `num_images` real images, equally many of each of ten of CIFAR-100's classes."""
    table = pq.read_table(real_data("cifar100_20classes.parquet"))
    labels = np.unique(table["label"].to_pylist(), return_inverse=True)[1]
    chosen = np.concatenate([np.flatnonzero(labels == label)[: num_images // len(classes)] for label in classes])
    path = folder / f"images-{num_images}-{classes[0]}.parquet"
    pq.write_table(table.select(["image", "label"]).take(pa.array(np.sort(chosen))), path)
    return path


def weights_file(folder: Path, size: int) -> Path:
    """Returns the weights of a ResNet-18 that was trained for a while on ten classes; the sweeps use ten others."""
    run = folder / "base"
    if not run.exists():
        overrides = [
            *("data=parquet", f"data.path={images_file(folder, 1500, classes=range(10))}", "data.image=image"),
            *(f"data.image_size={size}", f"data.cache_dir={folder}/base-cache", "backbone=resnet18", "epochs=6"),
            *("name=base", f"runs_dir={folder}", "cluster=inline"),
        ]
        with job_display(plain_console(stderr=True, quiet=True)) as display:
            launch("pretrain", compose_job("pretrain", overrides), overrides=overrides, display=display)
    return run / "model" / "model.safetensors"


def common(options: argparse.Namespace, images: Path, epochs: int) -> list[str]:
    """Returns what both sides of a comparison have in common."""
    weights = weights_file(images.parent, options.size)
    return [
        f"backbone.weights={weights}",
        *("data=parquet", f"data.path={images}", "data.image=image", f"data.image_size={options.size}"),
        *(
            "backbone=resnet18",
            "optimizer.head_lr_multiplier=1",
            f"epochs={epochs}",
            f"batch_size={options.batch_size}",
        ),
        f"cluster.gpus_per_worker={int(options.gpu)}",
    ]


def sweep(overrides: Sequence[str], folder: Path, *, verbose: bool = False) -> Run:
    """Runs one sweep of the product, from nothing: no decoded images, no taps."""
    cache = tempfile.mkdtemp(dir=folder)
    everything = [*overrides, f"runs_dir={cache}/runs", f"data.cache_dir={cache}/cache", "name=sweep"]
    with sweep_display(plain_console(stderr=True, quiet=not verbose)) as display:
        return launch_sweep(compose_job("sweep", everything), overrides=everything, display=display)


def as_list(values: Sequence[object]) -> str:
    """Returns values as they are typed on a command line."""
    return "[" + ",".join(map(str, values)) + "]"


def head(options: argparse.Namespace, folder: Path) -> None:
    """8 learning rates on one frozen backbone."""
    images = images_file(folder, options.num_images)
    base = common(options, images, options.epochs)
    fixed = compose_job("finetune", [*base, "freeze_depth=all", f"data.cache_dir={folder}/peer-cache"])
    table = Table(
        f"head-only: {len(HEAD_LRS)} learning rates x {options.epochs} epochs, ResNet-18, {options.num_images} images "
        f"of {options.size} px, {torch.get_num_threads()} threads, {device_name(options)}"
    )
    overrides = [*base, "freeze_depth=all", f"space.lr={as_list(HEAD_LRS)}"]
    ours = [timed(lambda: sweep(overrides, folder)) for _ in range(options.our_rounds)]
    ours_s, run = median(seconds for seconds, _ in ours), ours[-1][1]
    table.row("graftstack, seconds (median)", f"{ours_s:.2f}", " ".join(f"{seconds:.2f}" for seconds, _ in ours))
    problem = problem_of(fixed)
    peers = [timed(lambda: tune_sweep(problem, [5], HEAD_LRS, str(folder / "tune"))) for _ in range(options.rounds)]
    peer_s, found = median(seconds for seconds, _ in peers), peers[-1][1]
    table.row("Ray Tune, frozen backbone in each trial, seconds", f"{peer_s:.2f}")
    table.row("speed-up", f"{peer_s / ours_s:.1f}", "target >= 30")
    largest = largest_difference(run, {("all", lr): rows for (_, lr), rows in found.items()})
    table.row("largest difference of accuracy or loss, all epochs", f"{largest:.1e}", "target <= 1e-4")
    reuse = run.manifest.results["reuse"]
    table.row(
        "frozen forwards per unique sample", f"{reuse['backbone_forwards'] / reuse['unique_samples']:.2f}", "target 1.0"
    )
    table.row("predicted / measured", f"{reuse['predicted_s'] / reuse['actual_s']:.2f}", "target 0.7 .. 1.3")


def largest_difference(run: Run, found: dict[tuple[Any, float], list[dict[str, float]]]) -> float:
    """Returns the largest difference between the metrics of an epoch on the two sides."""
    ours = pq.read_table(run.artifact("metrics")).to_pylist()
    trials = {trial["trial"]: (trial["freeze_depth"], trial["lr"]) for trial in run.manifest.results["trials"]}
    differences = [
        abs(row[metric] - found[trials[row["trial"]]][row["epoch"] - 1][metric])
        for row in ours
        for metric in ("accuracy", "loss")
    ]
    assert len(differences) == 2 * sum(len(rows) for rows in found.values())
    return max(differences)


def depth(options: argparse.Namespace, folder: Path) -> None:
    """Freeze depth x learning rate: what FLOPs allow, and what is reached."""
    images = images_file(folder, options.depth_images)
    epochs, depths = options.depth_epochs, ["all", 4, 3]
    # As Tune has it: two trials at a time, of a thread each; another number of threads adds up in another order.
    base = [*common(options, images, epochs), "data.val_fraction=0.5"]
    two = f"max_concurrent_trials={torch.get_num_threads()}"
    space = [f"space.freeze_depth={as_list(depths)}", f"space.lr={as_list(DEPTH_LRS)}", two]
    table = Table(
        f"depth x lr: {as_list(depths)} x {len(DEPTH_LRS)} learning rates x {epochs} epochs, {options.depth_images} "
        f"images of {options.size} px, {device_name(options)}"
    )
    auto_s, auto = timed(lambda: sweep([*base, *space], folder))
    table.row("graftstack, reuse=auto, seconds", f"{auto_s:.1f}")
    asha_s, asha = timed(lambda: sweep([*base, *space, "scheduler=asha", f"asha.grace_epochs={epochs // 9}"], folder))
    table.row("graftstack, reuse=auto scheduler=asha, seconds", f"{asha_s:.1f}")
    off_s, off = timed(lambda: sweep([*base, *space, "reuse=off"], folder))
    table.row("graftstack, reuse=off, seconds", f"{off_s:.1f}")
    problem = problem_of(compose_job("finetune", [*base, f"data.cache_dir={folder}/peer-cache"]))
    peer_s, found = timed(
        lambda: tune_sweep(problem, [PEER_DEPTHS[depth] for depth in depths], DEPTH_LRS, str(folder / "tune"))
    )
    table.row("Ray Tune, the full uncached grid, seconds", f"{peer_s:.1f}")
    allowed = flops_speed_up(problem, epochs=epochs, num_lrs=len(DEPTH_LRS))
    table.row("speed-up that FLOPs allow", f"{allowed:.2f}")
    table.row("speed-up over reuse=off, share of the allowed", f"{off_s / auto_s:.2f}  {off_s / auto_s / allowed:.0%}")
    table.row(
        "speed-up over Ray Tune, share of the allowed",
        f"{peer_s / auto_s:.2f}  {peer_s / auto_s / allowed:.0%}",
        "target >= 85 %",
    )
    table.row("with ASHA over Ray Tune's full grid", f"{peer_s / asha_s:.1f}", "target >= 6")
    lost = auto.manifest.metrics["accuracy"] - asha.manifest.metrics["accuracy"]
    table.row("accuracy lost by ASHA, points", f"{100 * lost:.2f}", "target <= 0.5")
    same = max(
        abs(one["metrics"][name] - other["metrics"][name])
        for one, other in zip(auto.manifest.results["trials"], off.manifest.results["trials"], strict=True)
        for name in one["metrics"]
    )
    table.row("largest difference of any metric, reuse auto / off", f"{same:.1e}", "target <= 1e-4")
    by_peer = {(name, lr): found[PEER_DEPTHS[name], lr] for name in depths for lr in DEPTH_LRS}
    table.row("largest difference to Ray Tune's trials", f"{largest_difference(auto, by_peer):.1e}")
    reuse = auto.manifest.results["reuse"]
    table.row(
        "frozen forwards per unique sample", f"{reuse['backbone_forwards'] / reuse['unique_samples']:.2f}", "target 1.0"
    )
    table.row("predicted / measured", f"{reuse['predicted_s'] / reuse['actual_s']:.2f}", "target 0.7 .. 1.3")


def flops_speed_up(problem: Any, *, epochs: int, num_lrs: int) -> float:
    """Returns naive over shared work, by the cost model and counted FLOPs; decoding, reads and updates are free."""
    from tests.bench.sweep_peer import build_model
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.zeros(2, *problem.images.shape[1:])

    def flops(depth: int, *, trains: bool) -> float:
        model = build_model(problem, depth)
        with FlopCounterMode(display=False) as counter:
            loss = model(images).sum()
            if trains:
                loss.backward()
        return counter.get_total_flops() / len(images)

    forward = flops(5, trains=False)
    head = 2 * problem.head["weight"].numel()
    prefix = {5: forward - head}
    model = build_model(problem, 5)
    values = torch.zeros(2, *problem.images.shape[1:])
    values = model.maxpool(model.relu(model.bn1(model.conv1(values))))
    for index, stage in enumerate((model.layer1, model.layer2, model.layer3, model.layer4), start=1):
        with FlopCounterMode(display=False) as counter:
            values = stage(values)
        prefix[index] = counter.get_total_flops() / len(images)
    of_stage = {index: prefix[index] for index in range(1, 5)}
    before = {5: prefix[5], 4: prefix[5] - of_stage[4], 3: prefix[5] - of_stage[4] - of_stage[3]}
    num_train, num_val = len(problem.train), len(problem.val)
    naive = shared = 0.0
    for depth, prefix_flops in before.items():
        whole = epochs * (num_train * flops(depth, trains=True) + num_val * forward)
        suffix = whole - epochs * (num_train + num_val) * prefix_flops
        naive += num_lrs * whole
        shared += num_lrs * suffix
    return naive / (shared + (num_train + num_val) * before[5])


def start(options: argparse.Namespace, folder: Path) -> None:
    """What one more trial costs to start: the slope over the number of trials, everything warm."""
    import ray
    from ray import tune

    class Empty(tune.Trainable):
        """A Tune trial that does nothing, in an actor that is used again."""

        def setup(self, config: dict[str, Any]) -> None:
            pass

        def step(self) -> dict[str, Any]:
            return {"accuracy": 1.0, "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    def tune_s(num: int) -> float:
        tuner = tune.Tuner(
            tune.with_resources(Empty, {"cpu": 1}),
            param_space={"x": tune.grid_search(list(range(num)))},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=1),
            run_config=tune.RunConfig(storage_path=str(folder / "tune-start"), verbose=0),
        )
        return timed(tuner.fit)[0]

    ray.get(ray.remote(lambda: None).remote())
    images = images_file(folder, 200)
    few, many = 2, 102
    tune_one_s = (tune_s(many) - tune_s(few)) / (many - few)
    slot_one_s = (slot_s(many) - slot_s(few)) / (many - few)
    inline_one_s = seconds_of_units(InlinePool(EmptyRunner()), many) / many

    def fused_s(num: int) -> float:
        lrs = [1e-4 * (1 + index) for index in range(num)]
        overrides = [*common(options, images, 1), "freeze_depth=all", f"space.lr={as_list(lrs)}"]
        return timed(lambda: sweep(overrides, folder))[0]

    fused_s(few)  # imports
    fused_one_s = (fused_s(many) - fused_s(few)) / (many - few)
    table = Table(f"start of a trial: milliseconds for one more, from {few} to {many} trials")
    table.row("Tune with reuse_actors=True, a trial that does nothing", f"{1e3 * tune_one_s:.2f}")
    table.row("graftstack, a unit that does nothing, in a warm slot", f"{1e3 * slot_one_s:.2f}")
    table.row("ratio", f"{tune_one_s / slot_one_s:.1f}", "target >= 10")
    table.row("graftstack, the same in this process, as short sweeps", f"{1e3 * inline_one_s:.3f}")
    table.row("ratio", f"{tune_one_s / inline_one_s:.0f}", "target >= 10")
    table.row("graftstack, a fused trial: head, an epoch, weights, row", f"{1e3 * fused_one_s:.2f}")
    table.row("ratio", f"{tune_one_s / fused_one_s:.1f}")


class EmptyRunner:
    """Trains nothing."""

    def start(self, unit: Unit) -> UnitEnd:
        """Ends at once."""
        return UnitEnd(unit, ())

    def go_on(self, keep: Sequence[int]) -> UnitEnd:
        """Is never asked."""
        raise AssertionError(keep)


def slot_s(num: int) -> float:
    """Returns the seconds that `num` units take, one after another, in a slot that is warm."""
    pool = RayPool(RaySlots(EmptyRunner, num_slots=lambda: 1, num_cpus=1))
    seconds = seconds_of_units(pool, num)
    pool.close()
    return seconds


def seconds_of_units(pool: Pool, num: int) -> float:
    """Returns the seconds that `num` units take, one after another, once a first one has warmed up the pool."""
    unit = Unit((Trial(0, {}, compose_job("finetune", [])),), None)
    began = 0.0
    for number in range(num + 1):
        pool.start(unit)
        while not pool.wait(60.0):
            pass
        if number == 0:
            began = time.perf_counter()
    return time.perf_counter() - began


def memory(options: argparse.Namespace, folder: Path) -> None:
    """What a trial adds to its process, at two sizes of its tap."""
    table = Table("memory: growth of a process's resident memory by one epoch of a trial on its tap")
    for num_images in options.memory_images:
        images = images_file(folder, num_images)
        program = [sys.executable, "-m", "tests.bench.trial_memory", str(images), str(folder / "memory-cache")]
        done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True, timeout=600, cwd=REPOSITORY)
        tap_mib, before_mib, peak_mib = map(float, done.stdout.split())
        table.row(
            f"tap of {tap_mib:.0f} MiB: resident before, at most during, MiB", f"{before_mib:.0f}  {peak_mib:.0f}"
        )
        table.row("  growth, MiB", f"{peak_mib - before_mib:.0f}")


def device_name(options: argparse.Namespace) -> str:
    """Returns what trains."""
    return torch.cuda.get_device_name() if options.gpu else "CPU"


@contextmanager
def running_ray() -> Iterator[None]:
    """Starts Ray, as both sides find it."""
    import tests.bench.sweep_peer
    from ray import cloudpickle

    from graftstack.cluster.session import ray_session
    from graftstack.config.schema import ClusterConfig

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    with ray_session(ClusterConfig(), verbose=False):
        cloudpickle.register_pickle_by_value(tests.bench.sweep_peer)
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield


PARTS = {"head": head, "depth": depth, "start": start, "memory": memory}


def main() -> None:
    """Runs the parts that are asked for, all unless any is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--num-images", type=int, default=1500)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1, help="of the peer's head-only sweep, minutes each")
    parser.add_argument("--our-rounds", type=int, default=3)
    parser.add_argument("--depth-images", type=int, default=600)
    parser.add_argument("--depth-epochs", type=int, default=27)
    parser.add_argument("--memory-images", type=int, nargs=2, default=[1400, 5600])
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]}; use {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder, running_ray():
        for name in options.parts or PARTS:
            PARTS[name](options, Path(folder))


if __name__ == "__main__":
    main()
