"""Ray Tune's search behind the protocol of a sweep; no cluster is started."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from graftstack.cluster.tune import OptunaSearch
from graftstack.config.sweep import SearchName, SweepConfig
from graftstack.errors import ConfigError
from graftstack.sweep.trials import Trial, TrialResult

SPACE = {"lr": "loguniform(1e-5,1e-1)", "freeze_depth": [0, 2, "all"], "batch_size": "randint(16,64)"}


def optuna_search(*, max_open: int = 1, **changes: Any) -> OptunaSearch:
    values = {"space": SPACE, "search": SearchName.optuna, "num_samples": 20, "seed": 3, **changes}
    return OptunaSearch(SweepConfig(**values), max_open=max_open)


def ended(trial: Trial, **changes: Any) -> TrialResult:
    """The row of a trial, as a ledger gives it back; deeper freezing and a rate near 1e-2 are better."""
    accuracy = {0: 0.0, 2: 0.1, "all": 0.3}[trial.config.freeze_depth] + 0.5 - abs(trial.config.optimizer.lr - 1e-2)
    values = {"status": "done", "metrics": {"accuracy": accuracy}, **changes}
    result = TrialResult(index=trial.index, params=trial.params, **values)
    return TrialResult(**json.loads(json.dumps(asdict(result))))


def all_trials(search: OptunaSearch) -> list[Trial]:
    trials = []
    while (trial := search.next()) is not None:
        trials.append(trial)
        search.tell(ended(trial))
    assert search.is_exhausted
    return trials


def test_there_are_as_many_trials_as_asked_for_each_in_the_space_and_none_twice() -> None:
    trials = all_trials(optuna_search())
    assert [trial.index for trial in trials] == list(range(20))
    for trial in trials:
        assert list(trial.params) == list(SPACE)
        assert trial.config.optimizer.lr == trial.params["lr"]
        assert 1e-5 <= trial.params["lr"] < 1e-1
        assert trial.config.freeze_depth in (0, 2, "all")
        assert trial.config.batch_size in range(16, 65)
    assert len({json.dumps(trial.params) for trial in trials}) == 20


def test_it_learns() -> None:
    trials = all_trials(optuna_search(num_samples=30))
    late = [trial.params["freeze_depth"] for trial in trials[15:]]
    assert late.count("all") > len(late) / 2


def test_a_seed_gives_the_same_trials_again_and_another_seed_others() -> None:
    one, same, other = (all_trials(optuna_search(seed=seed)) for seed in (3, 3, 4))
    assert [trial.params for trial in one] == [trial.params for trial in same]
    assert [trial.params for trial in one] != [trial.params for trial in other]


def test_a_search_that_is_told_earlier_results_continues_as_if_unbroken() -> None:
    unbroken = all_trials(optuna_search())
    resumed = optuna_search()
    for trial in reversed(unbroken[:12]):
        resumed.tell(ended(trial))
    assert [trial.params for trial in all_trials(resumed)] == [trial.params for trial in unbroken[12:]]


def test_only_so_many_trials_are_open_at_a_time() -> None:
    search = optuna_search(max_open=2)
    first, second = search.next(), search.next()
    assert first is not None
    assert second is not None
    assert search.next() is None
    assert not search.is_exhausted
    search.tell(ended(second))
    third = search.next()
    assert third is not None
    assert third.index == 2
    assert search.next() is None


@pytest.mark.parametrize("changes", [{"status": "failed", "metrics": {}}, {"status": "pruned", "metrics": {}}])
def test_trials_without_an_accuracy_count_but_teach_nothing(changes: dict[str, Any]) -> None:
    search = optuna_search(num_samples=4)
    indices = []
    while (trial := search.next()) is not None:
        indices.append(trial.index)
        search.tell(ended(trial, **changes))
    assert indices == [0, 1, 2, 3]


def test_a_small_space_ends_with_its_last_combination() -> None:
    trials = all_trials(optuna_search(space={"freeze_depth": [0, 2, "all"], "batch_size": "randint(16,18)"}))
    assert len({json.dumps(trial.params) for trial in trials}) == len(trials) == 9


def test_choices_may_be_of_any_kind() -> None:
    space = {"data.classes": [[1, 2], [3]], "early_stop": [None, 2], "backbone": ["conv4", "resnet18"]}
    for trial in all_trials(optuna_search(space=space)):
        assert trial.params["data.classes"] in ([1, 2], [3])
        assert trial.config.backbone.name in ("conv4", "resnet18")


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "optuna").mkdir()
    (tmp_path / "optuna" / "__init__.py").write_text("raise ImportError('broken')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"^search=optuna: .*graftstack\[optuna\]"):
        optuna_search()
