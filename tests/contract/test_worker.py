"""What every `Worker` promises a training loop, shown in this process and inside a Ray Train group of two."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftstack.runtime import LocalWorker, Worker

Check = Callable[[Worker], None]
CHECKS: dict[str, Check] = {}
NUM_RAY_WORKERS = 2


def check(function: Check) -> Check:
    """Registers a promise: a function that every rank runs, and that raises where the promise is broken."""
    CHECKS[function.__name__] = function
    return function


def drawn(*shape: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that differ from rank to rank, and that every rank can draw for all others."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + rank), dtype=dtype)


def assert_same_on_all_ranks(worker: Worker, tensor: Tensor) -> None:
    for of_rank in worker.gather(tensor.detach()[None]):
        assert torch.equal(of_rank, tensor.detach().cpu())


@check
def ranks_count_from_zero_up_to_the_world_size(worker: Worker) -> None:
    ranks = worker.gather(torch.tensor([worker.rank]))
    assert ranks.tolist() == list(range(worker.world_size))
    assert isinstance(worker.device, torch.device)


@check
def mean_averages_tensors_of_all_shapes_and_precisions_in_place(worker: Worker) -> None:
    def tensors(rank: int) -> list[Tensor]:
        return [
            drawn(3, 4, rank=rank),
            drawn(2, 5, 1, 2, rank=rank, dtype=torch.float64),
            drawn(rank=rank),
            drawn(0, 3, rank=rank),
            drawn(4, 3, rank=rank).t(),
        ]

    mine = [tensor.to(worker.device) for tensor in tensors(worker.rank)]
    kept = list(mine)
    assert worker.mean_(mine) is None
    of_all = zip(*(tensors(rank) for rank in range(worker.world_size)), strict=True)
    for tensor, parts in zip(kept, of_all, strict=True):
        expected = torch.stack([part.double() for part in parts]).mean(dim=0)
        assert tensor.dtype == parts[0].dtype
        precision = {torch.float32: 1e-6, torch.float64: 1e-15}[tensor.dtype]
        torch.testing.assert_close(tensor.cpu().double(), expected, rtol=precision, atol=precision)
        assert_same_on_all_ranks(worker, tensor)


@check
def mean_takes_any_iterable_and_tensors_that_train(worker: Worker) -> None:
    parameter = nn.Parameter(torch.full((3,), float(worker.rank), device=worker.device))
    worker.mean_(tensor for tensor in [parameter])
    assert parameter.tolist() == [(worker.world_size - 1) / 2] * 3
    assert parameter.grad is None


@check
def mean_gives_the_same_bits_every_time(worker: Worker) -> None:
    results = []
    for _ in range(3):
        tensors = [drawn(1000, rank=worker.rank), drawn(7, 11, rank=worker.rank, dtype=torch.float64)]
        worker.mean_(tensors)
        results.append(tensors)
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


@check
def mean_of_nothing_is_nothing(worker: Worker) -> None:
    worker.mean_([])
    worker.mean_(tensor for tensor in ())


@check
def gather_joins_uneven_rows_in_rank_order_on_the_cpu(worker: Worker) -> None:
    def rows(rank: int) -> Tensor:
        return drawn(2 * rank + 1, 3, rank=rank)

    gathered = worker.gather(rows(worker.rank).to(worker.device))
    assert gathered.device.type == "cpu"
    assert torch.equal(gathered, torch.cat([rows(rank) for rank in range(worker.world_size)]))


@check
def gather_takes_ranks_without_rows(worker: Worker) -> None:
    # Every rank once has nothing; and at last nobody has anything.
    for empty in [{rank} for rank in range(worker.world_size)] + [set(range(worker.world_size))]:
        counts = [0 if rank in empty else 4 for rank in range(worker.world_size)]
        gathered = worker.gather(drawn(counts[worker.rank], 3, rank=worker.rank))
        assert gathered.shape == (sum(counts), 3)
        expected = torch.cat([drawn(num, 3, rank=rank) for rank, num in enumerate(counts)])
        assert torch.equal(gathered, expected)


@check
def gather_keeps_the_type(worker: Worker) -> None:
    for dtype in (torch.int64, torch.bool, torch.float64):
        rows = torch.full((2,), worker.rank, device=worker.device).to(dtype)
        gathered = worker.gather(rows)
        assert gathered.dtype == dtype
        expected = torch.arange(worker.world_size).repeat_interleave(2).to(dtype)
        assert torch.equal(gathered, expected)


class Frozen(nn.Module):
    """A frozen prefix with BatchNorm, and a head that trains: what a grafted model is."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.prefix = nn.Linear(4, 5)
            self.norm = nn.BatchNorm1d(5)
            self.head = nn.Linear(5, 2)
        self.prefix.requires_grad_(False)
        self.norm.requires_grad_(False).eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.prefix(inputs)))


def backward(module: nn.Module, inputs: Tensor) -> None:
    module(inputs).square().sum().backward()


@check
def gradients_of_what_trains_are_the_mean_over_the_ranks(worker: Worker) -> None:
    model = Frozen().to(worker.device)
    wrapped = worker.prepare_model(model)
    for step in range(2):
        inputs = [drawn(6, 4, rank=10 * step + rank).to(worker.device) for rank in range(worker.world_size)]
        model.zero_grad(set_to_none=True)
        backward(wrapped, inputs[worker.rank])
        alone = []
        for of_rank in inputs:
            reference = Frozen().to(worker.device)
            backward(reference, of_rank)
            alone.append([parameter.grad for parameter in reference.head.parameters()])
        for parameter, grads in zip(model.head.parameters(), zip(*alone, strict=True), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, torch.stack(grads).mean(dim=0))
            assert_same_on_all_ranks(worker, parameter.grad)


@check
def what_is_frozen_gets_no_gradient_and_is_not_touched(worker: Worker) -> None:
    model = Frozen().to(worker.device)
    # Different on each rank: were it sent around, ranks would end with each other's.
    mine = float(worker.rank + 1)
    frozen = [model.prefix.weight, model.norm.weight, model.norm.running_mean, model.norm.running_var]
    with torch.no_grad():
        for tensor in frozen:
            assert tensor is not None
            tensor.fill_(mine)
    wrapped = worker.prepare_model(model)
    for _ in range(2):
        backward(wrapped, drawn(6, 4, rank=worker.rank).to(worker.device))
    for tensor in frozen:
        assert tensor is not None
        assert torch.equal(tensor, torch.full_like(tensor, mine))
        assert tensor.grad is None
    assert model.norm.num_batches_tracked == 0


@check
def the_prepared_model_computes_what_the_model_does_and_shares_its_parameters(worker: Worker) -> None:
    model = Frozen().to(worker.device)
    wrapped = worker.prepare_model(model)
    inputs = drawn(6, 4, rank=worker.rank).to(worker.device)
    assert torch.equal(wrapped(inputs), model(inputs))
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable
    assert {id(parameter) for parameter in wrapped.parameters() if parameter.requires_grad} == trainable


@check
def reports_are_accepted(worker: Worker) -> None:
    for epoch in (1, 2):
        assert worker.report({"epoch": epoch, "accuracy": 0.5}) is None


def complaint_of(promise: Check, worker: Worker) -> str | None:
    try:
        promise(worker)
    except Exception:
        return traceback.format_exc()
    return None


def run_all_checks(settings: dict[str, Any]) -> None:
    """Runs in each Ray worker, and leaves what it found where the test process reads it."""
    from graftstack.cluster.worker import RayWorker

    worker = RayWorker()
    found = {name: complaint_of(promise, worker) for name, promise in CHECKS.items()}
    answer = {"world_size": worker.world_size, "complaints": found}
    Path(settings["folder"], f"rank-{worker.rank}.json").write_text(json.dumps(answer))


@pytest.fixture(scope="module")
def ray_answers(embedded_ray: None, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of one group found, check by check: a group costs seconds to start."""
    from ray import cloudpickle
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    folder = tmp_path_factory.mktemp("worker-contract")
    this_module = sys.modules[__name__]
    # The workers can't import the tests.
    cloudpickle.register_pickle_by_value(this_module)
    try:
        TorchTrainer(
            run_all_checks,
            train_loop_config={"folder": str(folder)},
            scaling_config=ScalingConfig(num_workers=NUM_RAY_WORKERS),
            run_config=RunConfig(name="worker-contract", storage_path=str(folder / "records")),
        ).fit()
    finally:
        cloudpickle.unregister_pickle_by_value(this_module)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.mark.parametrize("name", CHECKS)
def test_a_local_worker_keeps_the_promise(name: str) -> None:
    CHECKS[name](LocalWorker())


@pytest.mark.ray
@pytest.mark.parametrize("name", CHECKS)
def test_ray_workers_keep_the_promise(name: str, ray_answers: list[dict[str, Any]]) -> None:
    assert [answer["world_size"] for answer in ray_answers] == [NUM_RAY_WORKERS] * NUM_RAY_WORKERS
    for rank, answer in enumerate(ray_answers):
        assert answer["complaints"][name] is None, f"rank {rank}:\n{answer['complaints'][name]}"
