"""Which trials a grid and a random search have is a function of the configuration alone."""

import json
import math
from collections import Counter
from typing import Any

import pytest

from graftstack.config.schema import Augment
from graftstack.config.space import Choice, Range, parse_space
from graftstack.config.sweep import SearchName, SweepConfig
from graftstack.errors import ConfigError
from graftstack.sweep.search import ListSearch, grid_params, list_trials, sample_params
from graftstack.sweep.trials import Trial, TrialResult

SPACE: dict[str, Any] = {
    "freeze_depth": [0, "all"],
    "lr": "loguniform(1e-5,1e-1)",
    "momentum": "uniform(0.5,0.9)",
    "epochs": "randint(1,3)",
}


def all_of(search: ListSearch) -> list[Trial]:
    trials = []
    while (trial := search.next()) is not None:
        trials.append(trial)
    assert search.is_exhausted
    assert search.next() is None
    return trials


def random_sweep(num_samples: int = 200, *, seed: int = 0, space: dict[str, Any] = SPACE) -> SweepConfig:
    return SweepConfig(space=space, search=SearchName.random, num_samples=num_samples, seed=seed)


def test_a_grid_has_every_combination_the_first_key_slowest() -> None:
    space = parse_space({"freeze_depth": [0, "all"], "lr": [1e-3, 1e-2, 1]})
    assert grid_params(space) == [
        *({"freeze_depth": 0, "lr": lr} for lr in (1e-3, 1e-2, 1.0)),
        *({"freeze_depth": "all", "lr": lr} for lr in (1e-3, 1e-2, 1.0)),
    ]


def test_the_trials_of_a_grid_come_in_order_with_their_configurations() -> None:
    trials = all_of(ListSearch(SweepConfig(space={"freeze_depth": [0, "all"], "lr": [1e-3, 1e-2]}, seed=7, epochs=2)))
    assert [trial.index for trial in trials] == [0, 1, 2, 3]
    assert [(trial.config.freeze_depth, trial.config.optimizer.lr) for trial in trials] == [
        *((0, 1e-3), (0, 1e-2), ("all", 1e-3), ("all", 1e-2))
    ]
    assert {(trial.config.seed, trial.config.epochs) for trial in trials} == {(7, 2)}


def test_a_seed_in_the_space_is_the_trials() -> None:
    trials = all_of(ListSearch(SweepConfig(space={"seed": [1, 2]}, seed=7)))
    assert [trial.config.seed for trial in trials] == [1, 2]


def test_samples_lie_in_their_domains() -> None:
    trials = all_of(ListSearch(random_sweep()))
    assert len(trials) == 200
    assert all(1e-5 <= trial.params["lr"] <= 1e-1 for trial in trials)
    assert all(0.5 <= trial.params["momentum"] < 0.9 for trial in trials)
    assert {trial.params["epochs"] for trial in trials} == {1, 2, 3}
    assert {trial.params["freeze_depth"] for trial in trials} == {0, "all"}
    assert all(trial.config.optimizer.lr == trial.params["lr"] for trial in trials)


def test_samples_are_spread_as_their_domains_say() -> None:
    space = parse_space(SPACE)
    samples = [sample_params(space, seed=0, index=index) for index in range(4000)]
    decades = Counter(math.floor(math.log10(sample["lr"])) for sample in samples)
    assert all(abs(decades[decade] / 4000 - 1 / 4) < 0.03 for decade in (-5, -4, -3, -2))
    assert abs(sum(sample["momentum"] for sample in samples) / 4000 - 0.7) < 0.01
    epochs = Counter(sample["epochs"] for sample in samples)
    assert all(abs(epochs[num] / 4000 - 1 / 3) < 0.03 for num in (1, 2, 3))
    depths = Counter(sample["freeze_depth"] for sample in samples)
    assert abs(depths[0] / 4000 - 1 / 2) < 0.03


def test_a_sample_is_a_function_of_seed_index_and_key() -> None:
    few, many = list_trials(random_sweep(5)), list_trials(random_sweep(50))
    assert few == many[:5]
    assert list_trials(random_sweep(5, seed=1)) != few
    reordered = list_trials(random_sweep(5, space=dict(reversed(SPACE.items())) | {"weight_decay": "uniform(0,1)"}))
    assert [trial.params["lr"] for trial in reordered] == [trial.params["lr"] for trial in few]
    assert len({trial.params["lr"] for trial in many}) == 50


def test_params_are_plain_values_named_as_the_user_did() -> None:
    space = SPACE | {"optimizer": ["sgd"], "data.classes": [[0, 1], [2, 3]]}
    for trial in list_trials(random_sweep(5, space=space)):
        assert list(trial.params) == list(space)
        assert json.loads(json.dumps(trial.params)) == trial.params


def test_a_result_changes_nothing() -> None:
    told, untold = ListSearch(random_sweep(5)), ListSearch(random_sweep(5))
    told.tell(TrialResult(index=0, params={}, status="done", metrics={"accuracy": 1.0}))
    assert all_of(told) == all_of(untold)


def test_values_that_no_trial_may_have_together_are_told_before_the_first() -> None:
    config = SweepConfig(space={"augment_views": [None, 4], "augment": ["standard", "none"]}, augment=Augment.standard)
    with pytest.raises(ConfigError, match=r"\Aspace\.augment_views=4: augment=none changes nothing at random"):
        ListSearch(config)


def test_a_logarithmic_sample_never_leaves_its_range() -> None:
    narrow = Range(low=0.1, high=math.nextafter(0.1, 1), log=True)
    space = {"lr": narrow, "seed": Choice(values=(1,))}
    assert {sample_params(space, seed=0, index=index)["lr"] for index in range(100)} <= {narrow.low, narrow.high}
