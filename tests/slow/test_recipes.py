"""The shipped experiments reach their accuracies on real images, those that need weights with real public ones."""

import json
from pathlib import Path

import pytest

from graftstack.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.realdata, pytest.mark.timeout(1800)]

RESNET20 = "cifar10_resnet20-12fca82f.th"
SQUEEZENET = "imagenet_squeezenet1_0.safetensors"


@pytest.mark.parametrize(
    ("experiment", "weights", "least_accuracy"),
    [
        ("cifar_probe", RESNET20, 0.59),  # a logistic regression on the same features: 0.5975
        ("cifar_finetune", RESNET20, 0.70),  # a plain PyTorch loop of 6 epochs: 0.7145
        ("squeezenet_probe", SQUEEZENET, 0.77),  # a logistic regression on the same features: 0.783
    ],
)
def test_an_experiment_reaches_its_accuracy(
    tmp_path: Path, real_data: Path, experiment: str, weights: str, least_accuracy: float
) -> None:
    status = main(
        [
            "finetune",
            f"experiment={experiment}",
            f"data.path={real_data}/cifar100_20classes.parquet",
            f"backbone.weights={real_data}/weights/{weights}",
            f"runs_dir={tmp_path}",
            "name=run",
            "cluster=inline",
            "cluster.cpus_per_worker=2",
        ]
    )
    assert status == 0
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    assert manifest["metrics"]["accuracy"] >= least_accuracy
    print(f"{experiment}: accuracy {manifest['metrics']['accuracy']:.4f} in {manifest['seconds']:.0f} s")


@pytest.mark.timeout(5400)
def test_the_prototypes_of_omniglot_reach_their_accuracies(tmp_path: Path, real_data: Path) -> None:
    status = main(
        [
            "meta",
            "experiment=omniglot_prototypes",
            f"data.path={real_data}/omniglot.parquet",
            f"runs_dir={tmp_path}",
            "name=run",
            "cluster=inline",
        ]
    )
    assert status == 0
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    table = {(row["num_ways"], row["num_shots"]): row for row in manifest["results"]["table"]}
    for (ways, shots), row in table.items():
        assert row["batchnorm"] == "inductive"
        assert row["num_episodes"] >= 600
        assert 0 < row["ci95"] < 0.01
        print(f"omniglot_prototypes: {ways} ways, {shots} shots: {row['accuracy']:.4f} ± {row['ci95']:.4f}")
    assert table[5, 1]["accuracy"] >= 0.97
    assert table[5, 5]["accuracy"] >= 0.99
