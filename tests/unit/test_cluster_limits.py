"""How much of a machine a job may take, so that others have some of it too."""

from pathlib import Path
from typing import Any

import pytest

from graftstack.cli import main
from graftstack.cluster.resources import cpus_per_worker, machine_resources, node_slots
from graftstack.config.schema import ClusterConfig, ClusterKind
from graftstack.errors import ConfigError
from graftstack.machine import usable_cpus

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("cluster", "complaint"),
    [
        ({"max_cpus": 0}, "cluster.max_cpus=0: must be at least 1; raise it"),
        ({"max_gpus": -1.0}, "cluster.max_gpus=-1.0: must be at least 0; raise it"),
        ({"max_wait_s": -1.0}, "cluster.max_wait_s=-1.0: must be at least 0; raise it"),
    ],
)
def test_limits_that_cant_be_are_refused(cluster: dict[str, float], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig(**cluster)
    assert str(caught.value) == complaint


def test_a_job_has_what_there_is_up_to_its_limit() -> None:
    assert machine_resources(ClusterConfig()).num_cpus == usable_cpus()
    assert machine_resources(ClusterConfig(max_cpus=1)).num_cpus == 1
    assert machine_resources(ClusterConfig(max_cpus=10**6)) == machine_resources(ClusterConfig())


def test_more_workers_than_the_limit_lets_run_are_refused_by_it(tmp_path: Path, capsys: Capture) -> None:
    words = ["finetune", "data=digits", "backbone=conv4", f"runs_dir={tmp_path}"]
    assert main([*words, "cluster.num_workers=2", "cluster.max_cpus=1"]) == 2
    said = "graftstack: cluster.max_cpus=1: 2 worker(s) take 2 CPUs; raise it, or use fewer or smaller workers\n"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("nodes", "cluster", "num_cpus", "slots"),
    [
        ([4, 4], {"num_workers": 2}, 4, 2),
        ([4, 4, 4], {"num_workers": 2}, 4, 3),  # an even share of 6 would fit on none
        ([8, 4], {"num_workers": 2}, 4, 3),
        ([8], {"num_workers": [1, 4]}, 2, 4),
        ([8], {"num_workers": [1, 4], "max_cpus": 2}, 1, 2),
        ([8], {"max_cpus": 5, "cpus_per_worker": 2}, 2, 2),
        ([0], {}, 1, 0),
    ],
)
def test_no_node_is_cut_in_two_and_no_limit_exceeded(
    monkeypatch: pytest.MonkeyPatch, nodes: list[int], cluster: dict[str, Any], num_cpus: int, slots: int
) -> None:
    there = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in nodes]
    monkeypatch.setattr("ray.nodes", lambda: there)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": sum(nodes)})
    config = ClusterConfig(kind=ClusterKind.ray, **cluster)
    assert cpus_per_worker(config) == num_cpus
    assert node_slots(config, num_cpus) == slots


@pytest.mark.parametrize(
    ("per_worker", "limit", "slots"), [(1.0, None, 2), (0.5, None, 4), (0.2, None, 10), (0.1, None, 20), (0.1, 0.3, 3)]
)
def test_fractions_of_gpus_add_up(
    monkeypatch: pytest.MonkeyPatch, per_worker: float, limit: float | None, slots: int
) -> None:
    there = [{"Alive": True, "Resources": {"CPU": 64, "GPU": 1.0}} for _ in range(2)]
    monkeypatch.setattr("ray.nodes", lambda: there)
    config = ClusterConfig(kind=ClusterKind.ray, gpus_per_worker=per_worker, max_gpus=limit)
    assert node_slots(config, 1) == slots


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("ray://127.0.0.1:10001", "Ray's client knows too little of a cluster"),
        ("127.0.0.1:1", "no Ray cluster answers there"),
    ],
)
def test_an_address_at_which_no_job_can_run_is_refused_at_once(
    tmp_path: Path, capsys: Capture, address: str, complaint: str
) -> None:
    words = ["finetune", "data=digits", "backbone=conv4", f"runs_dir={tmp_path}"]
    assert main([*words, "cluster=ray", f"cluster.address={address}"]) == 2
    assert capsys.readouterr().err.startswith(f"graftstack: cluster.address={address}: {complaint}")


def test_one_cpu_is_one_slot_for_the_tasks_of_a_stack() -> None:
    from graftstack.cluster.executor import connect

    executor = connect(cluster=ClusterConfig(max_cpus=1))
    assert executor.num_slots == 1
    executor.close()
