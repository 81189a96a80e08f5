"""Images per second of two workers of a graftstack job on Ray, beside the same training by hand under torchrun.

    python -m tests.bench.group_speed [--model cifar_resnet20] [--num-images 6000] [--size 32] [--rounds 3]

Both sides train the same network on the same images, with one thread a process and the same batch over both, in turn.
Clocks run from the first steps to the last of one epoch: neither side's start, validation or checkpoints count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.bench.measuring import REPOSITORY, load_average, write_images

from graftstack.runs import PROGRESS

_NUM_WORKERS = 2

# Both clocks start after so many steps.
_FIRST_STEP = 10

# What a person writes who knows PyTorch: images in memory, DDP, AdamW, a cosine. Its last line is the speed.
_BY_HAND = """
import sys, time
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from graftstack.backbones import registry
from graftstack.config.compose import compose_job
from graftstack.finetune.task import prepare

first, batch_size, *overrides = sys.argv[1:]
first, batch_size = int(first), int(batch_size)
torch.set_num_threads(1)
registry.keep_freed_memory = lambda: None  # memory is as torch has it where nobody sets anything
dist.init_process_group("gloo")
task = prepare(compose_job("finetune", overrides))
rows = task.data.splits.train
mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (task.preprocessing.mean, task.preprocessing.std))
images = (task.data.images.batch(rows).float() / 255 - mean) / std
dataset = TensorDataset(images, torch.from_numpy(task.data.labels[rows]))
sampler = DistributedSampler(dataset, drop_last=True)
loader = DataLoader(dataset, batch_size=batch_size // dist.get_world_size(), sampler=sampler, drop_last=True)
task.model.backbone.freeze(0)  # the recipe decides which groups train, and none does before
task.model.backbone.pretrained_head.requires_grad_(False)  # has no part in the model
model = DistributedDataParallel(task.model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(loader))
model.train()
for step, (batch, labels) in enumerate(loader, start=1):
    optimizer.zero_grad()
    F.cross_entropy(model(batch), labels).backward()
    optimizer.step()
    scheduler.step()
    if step == first:
        began = time.perf_counter()
seconds = time.perf_counter() - began
if dist.get_rank() == 0:
    print((step - first) * batch_size / seconds)
dist.destroy_process_group()
"""


def graftstack_speed(options: argparse.Namespace, overrides: list[str], folder: Path, name: str) -> float:
    """Returns images per second between two looks at what the job tells of its progress."""
    words = [
        *(sys.executable, "-m", "graftstack", "finetune", *overrides, f"runs_dir={folder}/runs", f"name={name}"),
        *("cluster=local", f"cluster.num_workers={_NUM_WORKERS}", "cluster.cpus_per_worker=1"),
    ]
    seen: dict[int, int] = {}
    told = folder / "runs" / name / PROGRESS
    with (folder / f"{name}.log").open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        while process.poll() is None:
            time.sleep(0.02)
            if told.exists():
                written = told.stat().st_mtime_ns
                progress = json.loads(told.read_bytes())
                if progress["step"] >= _FIRST_STEP and not progress["history"]:
                    seen.setdefault(progress["step"], written)
    if process.returncode or len(seen) < 2:
        raise SystemExit((folder / f"{name}.log").read_text())
    (first, began), *_, (last, ended) = seen.items()
    return (last - first) * options.batch_size / ((ended - began) / 1e9)


def torchrun_speed(options: argparse.Namespace, overrides: list[str], folder: Path) -> float:
    """Returns images per second of the loop by hand."""
    script = folder / "by_hand.py"
    script.write_text(_BY_HAND)
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_NUM_WORKERS}"),
        *(str(script), str(_FIRST_STEP), str(options.batch_size), *overrides, "cluster=inline"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs both sides in turn and prints a row for each round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--num-images", type=int, default=6000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(
        f"{options.model}, {options.size} px, batch {options.batch_size} over {_NUM_WORKERS} workers, one thread each"
    )
    print(f"{'round':>6} {'graftstack':>12} {'torchrun':>12} {'ratio':>8}   images/s")
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_images(folder, num_images=options.num_images, size=options.size)
        overrides = [*data, f"backbone={options.model}", f"batch_size={options.batch_size}", "epochs=1"]
        for number in range(1, options.rounds + 1):
            pairs.append(
                (
                    graftstack_speed(options, overrides, folder, f"round-{number}"),
                    torchrun_speed(options, overrides, folder),
                )
            )
            ours, plain = pairs[-1]
            print(f"{number:>6} {ours:>12.1f} {plain:>12.1f} {ours / plain:>8.3f}   {load_average()}", flush=True)
    ours, plain = (median(side) for side in zip(*pairs, strict=True))
    print(f"{'median':>6} {ours:>12.1f} {plain:>12.1f} {median(a / b for a, b in pairs):>8.3f}   target >= 0.95")


if __name__ == "__main__":
    main()
