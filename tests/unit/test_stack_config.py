"""The configuration of a stack: base models in every form, levels, meta-models, and what is refused."""

import pytest

from graftstack.config.base_models import finetune_config
from graftstack.config.compose import compose_job, known_to
from graftstack.config.schema import FinetuneConfig
from graftstack.config.stack import OnError, PipelineConfig, StackConfig
from graftstack.errors import ConfigError


def stack(*overrides: str) -> StackConfig:
    config = compose_job("stack", overrides)
    assert isinstance(config, StackConfig)
    return config


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        stack(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_base_model_is_a_name_or_a_name_with_parameters_and_a_name_of_its_own() -> None:
    config = stack(
        "base_models=[LogisticRegression,{RandomForestClassifier:{n_estimators:50,name:forest}},"
        "{finetune:{freeze_depth:2,lr:1e-3}},{probe:{}},run:flowers]"
    )
    (entries,) = config.entries
    assert [entry.name for entry in entries] == ["LogisticRegression", "forest", "finetune", "probe", "flowers"]
    assert [entry.kind for entry in entries][1:] == ["RandomForestClassifier", "finetune", "probe", "run:flowers"]
    assert entries[1].params == {"n_estimators": 50}
    assert [entry.takes_images for entry in entries] == [False, False, True, True, True]


def test_a_fine_tuning_takes_the_keys_of_the_stack_where_it_says_nothing_else() -> None:
    config = stack("epochs=3", "backbone=conv4", "base_models=[{finetune:{freeze_depth:2,lr:1e-2}}]")
    tuned = finetune_config(config, config.entries[0][0])
    assert type(tuned) is FinetuneConfig
    assert (tuned.epochs, tuned.backbone.name, tuned.freeze_depth, tuned.optimizer.lr) == (3, "conv4", 2, 1e-2)


def test_parameters_of_a_probes_estimator_are_no_keys_of_its_fine_tuning() -> None:
    config = stack("base_models=[{probe:{estimator:SVC,params:{C:0.1},freeze_depth:3}}]")
    tuned = finetune_config(config, config.entries[0][0], without=("estimator", "params"))
    assert tuned.freeze_depth == 3


def test_an_unknown_key_of_a_fine_tuning_is_named_with_its_base_model() -> None:
    config = stack("base_models=[{finetune:{freez_depth:2}}]")
    with pytest.raises(ConfigError, match=r"base model finetune: freez_depth: unknown key; did you mean freeze_depth"):
        finetune_config(config, config.entries[0][0])


def test_levels_repeat_the_base_models_or_have_their_own() -> None:
    repeated = stack("base_models=[A,{probe:{}}]", "levels=3").entries
    assert [[entry.name for entry in level] for level in repeated] == [["A", "probe"], ["A@2"], ["A@3"]]
    own = stack("base_models=[A]", "levels=[[A,B],[C]]").entries
    assert [[entry.name for entry in level] for level in own] == [["A"], ["A@2", "B@2"], ["C@3"]]


def test_a_meta_model_is_a_name_with_or_without_parameters() -> None:
    assert stack("base_models=[A]").meta == ("auto", {})
    assert stack("base_models=[A]", "meta_model=greedy").meta == ("greedy", {})
    assert stack("base_models=[A]", "meta_model={Ridge:{alpha:2.0}}").meta == ("Ridge", {"alpha": 2.0})


def test_on_error_is_raise_or_drop() -> None:
    assert stack("base_models=[A]").on_error is OnError["raise"]
    assert stack("base_models=[A]", "on_error=drop").on_error is OnError["drop"]
    assert "expected one of [raise, drop]" in refused("base_models=[A]", "on_error=ignore")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "base_models is empty: a stack needs something to stack"),
        (["base_models=[A,A]"], "two base models are called A; give one another name"),
        (["base_models=[{A:3}]"], "no base model; write NAME"),
        (["base_models=[{A:{},B:{}}]"], "no base model; write NAME"),
        (["base_models=[{A:{name:'a b'}}]"], "'a b' can't name a base model"),
        (["base_models=[A]", "levels=0"], "levels=0: must be at least 1"),
        (["base_models=[A]", "levels=[[]]"], "levels[0]=[]: a level needs base models"),
        (["base_models=[A]", "levels=[[{probe:{}}]]"], "levels[0]: probe learns from images"),
        (["base_models=[{probe:{}}]", "levels=2"], "no base model can stand above the first level"),
        (["base_models=[A]", "levels=abc"], "levels=abc: give a number, or a list"),
        (["base_models=[A]", "meta_model=[a,b]"], "give one name"),
        (["base_models=[A]", "folds.num=1"], "folds.num=1: must be at least 2"),
        (["base_models=[A]", "folds.kind=time", "folds.repeats=2"], "folds.repeats=2: folds.kind=time has one order"),
        (["base_models=[A]", "folds.kind=time", "levels=2"], "folds.kind=time leaves the first rows"),
        (["base_models=[A]", "time_limit_s=0"], "time_limit_s=0.0: must be greater than 0"),
        (["base_models=[A]", "task=regression", "calibration=isotonic"], "a regression has no probabilities"),
        (["base_models=[A]", "top=0"], "top=0: must be at least 1"),
    ],
)
def test_what_cant_be_stacked_is_refused_in_one_line(overrides: list[str], expected: str) -> None:
    assert expected in refused(*overrides)


def test_a_pipeline_has_the_keys_of_a_sweep_and_of_a_stack() -> None:
    config = compose_job("pipeline", ["space.lr=[1e-3,1e-2]", "top=2", "base_models=[SVC]", "time_limit_s=60"])
    assert isinstance(config, PipelineConfig)
    assert (config.top, config.space, config.time_limit_s) == (2, {"lr": [1e-3, 1e-2]}, 60)


def test_each_part_of_a_pipeline_is_given_the_keys_that_it_knows() -> None:
    given = ["data=digits", "space.lr=[1e-3]", "base_models=[SVC]", "top=2", "epochs=3", "search=grid"]
    assert known_to("sweep", given) == ["data=digits", "space.lr=[1e-3]", "epochs=3", "search=grid"]
    assert known_to("stack", given) == ["data=digits", "base_models=[SVC]", "top=2", "epochs=3"]


def test_a_run_is_taken_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r"base_models=run:x: a run is taken as it is; leave lr out"):
        StackConfig(base_models=[{"run:x": {"lr": 1}}])
