"""A sweep is a fine-tuning and a space; whatever no trial could train with is told before anything starts."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftstack.cluster.launching import check, saved_overrides
from graftstack.config.compose import compose_job
from graftstack.config.docs import key_docs
from graftstack.config.paths import conf_dir
from graftstack.config.plain import key_types, to_plain, to_yaml
from graftstack.config.schema import (
    Augment,
    BackboneConfig,
    ClusterConfig,
    FinetuneConfig,
    OptimizerConfig,
    OptimizerName,
    Precision,
    RecipeName,
)
from graftstack.config.space import Choice, Range, full_key, parse_space, trial_config
from graftstack.config.sweep import (
    AshaConfig,
    Prune,
    Reuse,
    SchedulerName,
    SearchName,
    SweepConfig,
    TapDtype,
    TapsConfig,
)
from graftstack.errors import ConfigError
from graftstack.report.explain import job_help
from graftstack.runs import Run

LR = {"lr": [1e-3]}


def compose(*overrides: str) -> SweepConfig:
    config = compose_job("sweep", overrides)
    assert type(config) is SweepConfig
    return config


def one_line(error: BaseException) -> str:
    (line,) = str(error).splitlines()
    return line


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        SweepConfig(**values)
    return one_line(caught.value)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_job("sweep", overrides)
    return one_line(caught.value)


def test_lists_on_the_command_line_are_choices() -> None:
    config = compose("space.lr=[1e-4,1e-3]", "space.freeze_depth=[0,2,all]", "space.clip_grad_norm=[null,1]")
    assert parse_space(config.space) == {
        "lr": Choice(values=(1e-4, 1e-3)),
        "freeze_depth": Choice(values=(0, 2, "all")),
        "clip_grad_norm": Choice(values=(None, 1.0)),
    }


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("uniform(0.1,0.5)", Range(low=0.1, high=0.5)),
        ("loguniform(1e-5, 1e-2)", Range(low=1e-5, high=1e-2, log=True)),
        ("'loguniform(1e-5,1e-2)'", Range(low=1e-5, high=1e-2, log=True)),
        ("randint(1,3)", Range(low=1, high=3, integer=True)),
        ("1e-3", Choice(values=(1e-3,))),
    ],
)
def test_a_range_arrives_as_text_and_a_scalar_is_the_only_choice(text: str, domain: object) -> None:
    assert parse_space(compose(f"space.lr={text}", "search=random").space) == {"lr": domain}


def test_text_in_a_space_arrives_as_it_is() -> None:
    for text in ("a b.pth", "run:base", "~/w(1).pth", "C:\\data\\new", "it's", "${x}", "007x"):
        assert compose(f"space.weights={text}").space == {"weights": text}
    assert compose("space.weights=['a (1).pth',run:base,DEFAULT]").space == {
        "weights": ["a (1).pth", "run:base", "DEFAULT"]
    }


def test_a_section_may_vary_by_name_beside_its_keys() -> None:
    config = compose("space.optimizer=[adamw,sgd]", "space.optimizer.lr=[1,2]", "optimizer.momentum=0.5")
    assert config.space == {"optimizer": ["adamw", "sgd"], "optimizer.lr": [1, 2]}
    trial = trial_config(config, {"optimizer": "sgd", "optimizer.lr": 2})
    assert trial.optimizer == OptimizerConfig(name=OptimizerName.sgd, lr=2.0, momentum=0.5)


def test_the_last_of_a_repeated_domain_wins() -> None:
    assert compose("space.lr=[1]", "space={epochs:[1,2]}", "space.lr=[2]").space == {"epochs": [1, 2], "lr": [2]}


def test_a_domain_that_is_given_again_keeps_its_place() -> None:
    again = compose("space.lr=[1]", "space.epochs=[1,2]", "space.lr=[2]", "space.seed=[0]")
    assert list(again.space.items()) == [("lr", [2]), ("epochs", [1, 2]), ("seed", [0])]


def test_a_sweep_is_resumed_from_another_folder_with_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "it's a.pth").touch()
    monkeypatch.chdir(tmp_path)
    overrides = [
        *(f"runs_dir={tmp_path}/runs", "name=a", "data=csv", "data.image=x", "data.path=a.csv", "taps.location=taps"),
        *('space.weights=["it\'s a.pth",run:base,DEFAULT]', "space.data.path=[a.csv,s3://b/b.csv]", "space.lr=[1,2]"),
    ]
    checked = check("sweep", compose(*overrides), overrides)
    assert checked.config.taps.location == f"{tmp_path}/taps"
    assert checked.config.space == {
        "weights": [f"{tmp_path}/it's a.pth", "run:base", "DEFAULT"],
        "data.path": [f"{tmp_path}/a.csv", "s3://b/b.csv"],
        "lr": [1, 2],
    }
    run = Run.start(f"{tmp_path}/runs", checked.manifest, resume=False)
    run.update(status="interrupted")
    monkeypatch.chdir("/")
    resume = [f"runs_dir={tmp_path}/runs", "name=a", "resume=true"]
    overrides = [*saved_overrides(resume), *resume]
    resumed = check("sweep", compose(*overrides), overrides).config
    assert (resumed.space, resumed.taps) == (checked.config.space, checked.config.taps)
    assert list(resumed.space) == list(checked.config.space)


def test_a_single_path_in_a_nested_space_is_absolute_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nested = SweepConfig(space={"data": {"path": "photos", "source": ["image_folder"]}})
    assert check("sweep", nested, []).config.space == {
        "data.path": [f"{tmp_path}/photos"],
        "data.source": ["image_folder"],
    }


def test_a_space_in_yaml_may_be_nested_and_gives_way_to_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(conf_dir(), tmp_path / "conf")
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\nspace:\n  optimizer: {lr: [1e-4, 1e-3], momentum: [0.9]}\n  freeze_depth: [0, all]\n"
    )
    monkeypatch.setattr("graftstack.config.compose.conf_dir", lambda: tmp_path / "conf")
    assert compose("experiment=mine", "space.optimizer.lr=[0.5]").space == {
        "optimizer.lr": [0.5],
        "optimizer.momentum": [0.9],
        "freeze_depth": [0, "all"],
    }
    (tmp_path / "conf/experiment/mine.yaml").write_text("# @package _global_\nspace: {lr: [1e-4, fast]}\n")
    assert refused("experiment=mine") == "space.lr=fast: the key takes a number; correct it"


def test_every_key_of_a_sweep_composes_to_its_type() -> None:
    config = compose(
        *("space.lr=[1e-3]", "search=random", "num_samples=7", "scheduler=asha", "asha.grace_epochs=2"),
        *("asha.reduction_factor=4", "reuse=off", "taps.location=s3://a/b", "taps.budget_bytes=0", "taps.dtype=bf16"),
        *("prune=probe", "prune_margin=0.2", "time_limit_s=60", "max_concurrent_trials=3", "freeze_depth=all"),
    )
    assert config == SweepConfig(
        space=LR,
        search=SearchName.random,
        num_samples=7,
        scheduler=SchedulerName.asha,
        asha=AshaConfig(grace_epochs=2, reduction_factor=4.0),
        reuse=Reuse.off,
        taps=TapsConfig(location="s3://a/b", budget_bytes=0, dtype=TapDtype.bf16),
        prune=Prune.probe,
        prune_margin=0.2,
        time_limit_s=60.0,
        max_concurrent_trials=3,
        freeze_depth="all",
    )


def test_a_sweep_is_written_as_plain_yaml() -> None:
    text = to_yaml(compose("space.lr=[1e-3]", "space.freeze_depth=[0,all]"))
    assert "\nspace:\n  lr:\n  - 0.001\n  freeze_depth:\n  - 0\n  - all\n" in text


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("lr", "optimizer.lr"), ("optimizer.lr", "optimizer.lr"), ("weight_decay", "optimizer.weight_decay")),
        *(("image_size", "data.image_size"), ("warmup_fraction", "schedule.warmup_fraction"), ("seed", "seed")),
        *((section, f"{section}.name") for section in ("backbone", "optimizer", "schedule", "recipe")),
        *(("weights", "backbone.weights"), ("freeze_depth", "freeze_depth"), ("augment_views", "augment_views")),
    ],
)
def test_a_key_may_go_by_its_last_part(name: str, key: str) -> None:
    assert full_key(name) == key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("name", "name"), ("resume", "resume"), ("runs_dir", "runs_dir"), ("cluster", "cluster")),
        *(("cluster.num_workers", "cluster.num_workers"), ("num_workers", "cluster.num_workers")),
        *(("checkpoint.every_steps", "checkpoint.every_steps"), ("cache_dir", "data.cache_dir")),
        ("data.cache_bytes", "data.cache_bytes"),
    ],
)
def test_a_key_that_says_where_to_run_is_the_sweeps(name: str, key: str) -> None:
    expected = f"space.{name}: says where trials run, not what they train; give {key}=... to the sweep itself"
    assert refusal(space={name: [1]}) == expected


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space is empty: a sweep needs something to vary; add e.g. space.lr="),
        ({"optimizer": {}}, "space is empty"),
        ({"lrr": [1]}, "space.lrr: unknown key; did you mean lr?"),
        ({"freezedepth": [1]}, "space.freezedepth: unknown key; did you mean freeze_depth"),
        ({"num_samples": [1]}, "space.num_samples: unknown key; "),
        ({"optimizer": {"lrr": [1]}}, "space.optimizer.lrr: unknown key; did you mean optimizer.lr"),
        ({"lr": [1], "optimizer.lr": [2]}, "space.optimizer.lr: the same key as space.lr; leave one of them out"),
        ({"lr": []}, "space.lr=[]: the list is empty; give it values, or leave the key out"),
        ({"lr": [1, 2, 1.0]}, "space.lr: 1.0 is in the list twice; leave one out"),
        ({"freeze_depth": [0, "all", "all"]}, "space.freeze_depth: all is in the list twice"),
        ({"lr": [1e-3, 0]}, "space.lr=0.0: must be greater than 0; raise it"),
        ({"lr": ["fast"]}, "space.lr=fast: the key takes a number; correct it"),
        ({"lr": None}, "space.lr=null: the key takes a number; correct it"),
        ({"lr": [10**400]}, "space.lr=1000"),
        ({"epochs": [1.5]}, "space.epochs=1.5: the key takes a whole number; correct it"),
        ({"epochs": [True]}, "space.epochs=true: the key takes a whole number; correct it"),
        ({"keep_head": [1]}, "space.keep_head=1: the key takes true or false; correct it"),
        ({"clip_grad_norm": ["x"]}, "space.clip_grad_norm=x: the key takes a number or null; correct it"),
        ({"data.classes": [0, 1]}, "space.data.classes=0: the key takes a list; correct it"),
        ({"optimizer": ["adamw", "sdg"]}, "space.optimizer=sdg: unknown choice; did you mean sgd?"),
        ({"freeze_depth": ["some"]}, "space.freeze_depth=some: give a number of layer groups"),
        ({"freeze_depth": [-1]}, "space.freeze_depth=-1: must be at least 0"),
        ({"data.source": ["csv"]}, "space.data.source=csv: data.path is missing: data=csv needs it"),
        ({"augment_views": [None, 4]}, "space.augment_views=4: augment=none changes nothing at random"),
        (
            {"seed": [*range(400)], "epochs": [*range(400)]},
            "space: a grid of 160,000 trials, more than 100,000; shorten",
        ),
        (
            {"lr": "uniform(0.1,1)"},
            "space.lr=uniform(0.1,1.0): search=grid needs values; give a list, or add search=ra",
        ),
    ],
)
def test_a_space_that_cant_be_trained_is_refused(space: dict[str, Any], message: str) -> None:
    assert refusal(space=space).startswith(message)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lr", "uniform(1)", "takes two numbers; write uniform(low,high)"),
        ("lr", "uniform(1,2,3)", "takes two numbers; write uniform(low,high)"),
        ("lr", "uniform(a,b)", "takes two numbers; write uniform(low,high)"),
        ("epochs", "randint(1,2.5)", "takes two whole numbers; write randint(low,high)"),
        ("lr", "uniform(2,1)", "the range is empty; write uniform(low,high) with low < high"),
        ("lr", "uniform(1,1)", "the range is empty; write uniform(low,high) with low < high"),
        ("lr", "uniform(1,inf)", "must have finite ends; give numbers"),
        ("lr", "uniform(nan,1)", "must have finite ends; give numbers"),
        ("lr", "loguniform(0,1)", "a logarithm needs low > 0; raise it, or use uniform"),
        ("lr", "lognormal(0,1)", "unknown range; did you mean loguniform"),
        ("epochs", "uniform(1,3)", "the key takes a whole number; write randint(low,high)"),
        ("backbone", "uniform(1,3)", "the key takes text; give a list"),
    ],
)
def test_a_range_that_holds_nothing_is_refused(name: str, text: str, message: str) -> None:
    assert refusal(space={name: text}, search=SearchName.random).startswith(f"space.{name}={text}: {message}")


def test_both_ends_of_a_range_are_tried() -> None:
    refused_low = refusal(space={"lr": "uniform(-1,1)"}, search=SearchName.random)
    refused_high = refusal(space={"momentum": "uniform(0,1)"}, search=SearchName.random)
    assert refused_low == "space.lr=-1.0: must be greater than 0; raise it"
    assert refused_high == "space.momentum=1.0: must lie in [0.0, 1.0); choose a value in that range"


def test_a_value_is_tried_beside_those_it_will_train_with() -> None:
    config = SweepConfig(space={"augment_views": [2, 4], "augment": ["standard"]})
    assert trial_config(config, {"augment": "standard", "augment_views": 4}).augment_views == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_samples": 0}, "num_samples=0: must be at least 1"),
        ({"num_samples": 100_001}, "num_samples=100001: must be at most 100000"),
        ({"prune_margin": -0.1}, "prune_margin=-0.1: must lie in [0.0, 1.0)"),
        ({"time_limit_s": 0.0}, "time_limit_s=0.0: must be greater than 0"),
        ({"max_concurrent_trials": 0}, "max_concurrent_trials=0: must be at least 1"),
        ({"epochs": -1}, "epochs=-1: must be at least 0"),
        (
            {"scheduler": SchedulerName.asha, "asha": AshaConfig(grace_epochs=5), "epochs": 3},
            "asha.grace_epochs=5: trials end after epochs=3, before any could be stopped; lower it, or raise epochs",
        ),
        (
            {"search": SearchName.optuna, "prune": Prune.probe},
            "prune=probe: search=optuna chooses its trials as it goes, so none can be left out beforehand; use prune=n",
        ),
        (
            {"scheduler": SchedulerName.asha, "cluster": ClusterConfig(num_workers=2)},
            "scheduler=asha: a trial of cluster.num_workers=2 trains to its end; use scheduler=none, or cluster.num_w",
        ),
        (
            {"time_limit_s": 60.0, "cluster": ClusterConfig(num_workers=[1, 2])},
            "time_limit_s=60.0: a trial of cluster.num_workers=[1, 2] trains to its end; leave it out, or use cluster",
        ),
        ({"scheduler": SchedulerName.asha, "epochs": 0}, "asha.grace_epochs=1: trials end after epochs=0"),
    ],
)
def test_a_key_of_the_sweep_out_of_range_is_named(values: dict[str, Any], message: str) -> None:
    assert refusal(space=LR, **values).startswith(message)


def test_the_sections_of_a_sweep_check_their_ranges() -> None:
    assert refused("space.lr=[1]", "taps.budget_bytes=-1") == "taps.budget_bytes=-1: must be at least 0; raise it"
    assert refused("space.lr=[1]", "asha.grace_epochs=0") == "asha.grace_epochs=0: must be at least 1; raise it"
    message = "asha.reduction_factor=1.0: must be greater than 1; raise it"
    assert refused("space.lr=[1]", "asha.reduction_factor=1") == message


def test_asha_compares_with_the_epochs_of_the_space() -> None:
    assert SweepConfig(
        space={"epochs": [1, 9]}, scheduler=SchedulerName.asha, asha=AshaConfig(grace_epochs=5), epochs=3
    )


def test_a_trial_is_a_plain_fine_tuning_with_the_values_of_its_keys() -> None:
    space = {"freeze_depth": [0, "all"], "lr": [1], "backbone": ["conv4"], "recipe": ["lp_ft"], "precision": ["bf16"]}
    sweep = SweepConfig(space=space, epochs=3, augment=Augment.standard, optimizer=OptimizerConfig(momentum=0.5))
    params = {"freeze_depth": "all", "lr": 1, "backbone": "conv4", "recipe": "lp_ft", "precision": "bf16"}
    trial = trial_config(sweep, params)
    assert type(trial) is FinetuneConfig
    assert (trial.freeze_depth, trial.epochs, trial.augment) == ("all", 3, Augment.standard)
    assert trial.optimizer == OptimizerConfig(lr=1.0, momentum=0.5)
    assert type(trial.optimizer.lr) is float
    assert trial.backbone == BackboneConfig(name="conv4")
    assert (trial.recipe.name, trial.precision) == (RecipeName.lp_ft, Precision.bf16)


def test_without_values_a_trial_is_the_sweep_itself() -> None:
    sweep = SweepConfig(space=LR, seed=4, name="a", epochs=2)
    assert trial_config(sweep, {}) == FinetuneConfig(seed=4, name="a", epochs=2, checkpoint=sweep.checkpoint)


def test_values_that_dont_go_together_are_named_with_the_trial() -> None:
    sweep = SweepConfig(space=LR, augment=Augment.standard, augment_views=2)
    with pytest.raises(ConfigError) as caught:
        trial_config(sweep, {"augment": "none", "lr": 1})
    assert one_line(caught.value).startswith("space.augment=none space.lr=1: augment_views=2: augment=none changes")


def test_every_other_key_of_a_fine_tuning_can_be_in_a_space() -> None:
    for key, value in vary_all().items():
        assert trial_config(SweepConfig(space={key: [value]}), {key: value}) is not None


def vary_all() -> dict[str, Any]:
    """The default of every key that isn't the sweep's own."""
    plain = to_plain(FinetuneConfig())
    found = {}
    for key in key_types(FinetuneConfig):
        section, _, last = key.rpartition(".")
        try:
            found[full_key(key)] = plain[section][last] if section else plain[key]
        except ConfigError:
            continue
    assert len(found) > 30
    return found


@pytest.mark.parametrize("override", ["space.lr=1e-3,1e-2", "space.backbone=conv4,vgg11"])
def test_forgotten_brackets_are_named(override: str) -> None:
    assert refused(override) == f"{override}: several values; put them in brackets"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space.lr=[1", "space.lr=[1: the value can't be read; close its brackets, or put it in quotes"),
        ("space.lr=", "space.lr=: has no value; give one, or leave the key out"),
        ("space=3", "space=3: vary which key? write space.KEY=[VALUE,...]"),
        ("spce.lr=[1]", "spce.lr=[1]: unknown key; did you mean space"),
        ("reuse=maybe", "reuse=maybe: invalid value 'maybe', expected one of [auto, off]"),
        ("num_sample=3", "num_sample=3: unknown key; did you mean num_samples"),
    ],
)
def test_what_cant_be_read_is_named(override: str, message: str) -> None:
    assert refused(override).startswith(message)


def test_only_a_sweep_has_a_space() -> None:
    with pytest.raises(ConfigError, match=r"\Aspace\.lr=\[1\]: unknown key; "):
        compose_job("finetune", ["space.lr=[1]"])


def test_help_teaches_how_a_space_is_written() -> None:
    text = job_help("sweep")
    for example in ("space.lr=[1e-4,1e-3,1e-2]", "space.freeze_depth=[0,2,all]", "'space.lr=loguniform(1e-5,1e-2)'"):
        assert f"\n  {example}  " in text
    assert "space.KEY" not in job_help("finetune")


def test_help_shows_the_defaults_that_a_sweep_has_and_a_fine_tuning_hasnt() -> None:
    defaults = [
        {doc.key: doc.default for doc in key_docs(config)}["checkpoint.min_interval_s"]
        for config in (FinetuneConfig, SweepConfig)
    ]
    assert defaults == ["0.0", "30.0"]


def test_checking_a_sweep_loads_nothing_heavy() -> None:
    program = """
import sys
from graftstack.config.sweep import SweepConfig
SweepConfig(space={"lr": [1e-3]})
print(*sorted({"torch", "ray", "hydra", "omegaconf", "sklearn", "pyarrow", "numpy", "optuna"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
