"""Overrides and YAML become one typed configuration, or one line that says what is wrong."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftstack.config.compose import choices, compose_job
from graftstack.config.docs import key_docs
from graftstack.config.jobs import JOBS
from graftstack.config.paths import conf_dir
from graftstack.config.plain import flatten, from_plain, to_plain
from graftstack.config.schema import (
    Augment,
    BackboneConfig,
    CheckpointConfig,
    ClusterConfig,
    ClusterKind,
    DataConfig,
    FinetuneConfig,
    OptimizerConfig,
    OptimizerName,
    Precision,
    PretrainConfig,
    RecipeConfig,
    ScheduleConfig,
    Source,
)
from graftstack.errors import ConfigError
from graftstack.report.explain import job_help

# What a job can't do without.
LEAST = {
    "sweep": ["space.lr=[1e-3]"],
    "stack": ["base_models=[SVC]"],
    "pipeline": ["space.lr=[1e-3]", "base_models=[SVC]"],
}

TEXT_KEYS = (
    *("data.path", "data.image", "data.label", "data.split", "data.group", "data.cache_dir"),
    *("backbone.name", "backbone.weights", "cluster.address", "runs_dir"),
)

TEXTS = (
    *("a b", " lead", "trail ", "a=b", "=", "a,b", "a:b", "#c", "*?", "@~%!", "(a)", "{a}", "[x]y", "[", "a\nb", "\t"),
    *("$HOME", "$", "$$", "${x}", "${", "\\${x}", "\\\\${x}", "'${x}", "${oc.env:HOME}", "${x}\\"),
    *("it's", "'tis", "a'", 'say "hi"', '"', "\\'", "a\\\\'b", "'a' or 'b'"),
    *("a\\b", "a\\\\b", "\\", "a\\", "C:\\data\\new", "\\n"),
    *("é漢字🙂", "\uff15", "e\u0301", "-0", "007", "1_000", "1e3", "-5", "1.50", "true", "None", "nan"),
)


def compose(*overrides: str) -> FinetuneConfig:
    return compose_job("finetune", overrides)


def complaint(*overrides: str, job: str = "finetune") -> str:
    with pytest.raises(ConfigError) as caught:
        compose_job(job, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_text_arrives_byte_for_byte() -> None:
    for start in range(0, len(TEXTS), len(TEXT_KEYS)):
        given = dict(zip(TEXT_KEYS, TEXTS[start:], strict=False))
        composed = flatten(to_plain(compose("data=csv", "data.image=x", "data.path=x", *map("=".join, given.items()))))
        assert {key: composed[key] for key in given} == given


def test_text_that_is_one_quoted_string_loses_its_quotes() -> None:
    config = compose("name='null'", 'data.cache_dir="a b"', "data.label=''")
    assert (config.name, config.data.cache_dir, config.data.label) == ("null", "a b", "")


def test_every_kind_of_value_composes_to_its_type() -> None:
    config = compose(
        *("data=torchvision", "data.path=x", "data.name=CIFAR10", "data.classes=[3,cat,'a b']", "data.image_size=null"),
        *("backbone=squeezenet1_0", "freeze_depth=all", "epochs=3", "optimizer=sgd", "optimizer.lr=1e-4"),
        *("augment=standard", "precision=bf16", "clip_grad_norm=1", "early_stop=2", "cluster=ray"),
        *("cluster.num_workers=[1,4]", "cluster.gpus_per_worker=1", "name=123", "resume=true"),
    )
    assert config.data == DataConfig(source=Source.torchvision, path="x", name="CIFAR10", classes=[3, "cat", "a b"])
    assert config.backbone == BackboneConfig(name="squeezenet1_0")
    assert config.freeze_depth == "all"
    assert config.epochs == 3
    assert config.optimizer.name is OptimizerName.sgd
    assert config.optimizer.lr == 1e-4
    assert (config.augment, config.precision) == (Augment.standard, Precision.bf16)
    assert config.clip_grad_norm == 1.0
    assert config.early_stop == 2
    assert config.cluster == ClusterConfig(kind=ClusterKind.ray, num_workers=[1, 4], gpus_per_worker=1.0)
    assert (config.cluster.min_workers, config.cluster.max_workers) == (1, 4)
    assert config.name == "123"
    assert config.resume is True


def test_a_freeze_depth_is_a_number_or_all() -> None:
    assert compose("freeze_depth=3").freeze_depth == 3
    assert compose("freeze_depth=all").freeze_depth == "all"
    for value in ("some", "1.5", "+3"):
        assert f"freeze_depth={value}: give a number of layer groups" in complaint(f"freeze_depth={value}")


def test_null_clears_a_key() -> None:
    config = compose("name=a", "name=null", "clip_grad_norm=null", "data.path=null")
    assert (config.name, config.clip_grad_norm, config.data.path) == (None, None, None)


def test_the_last_of_a_repeated_key_wins() -> None:
    assert compose("epochs=1", "seed=4", "epochs=2").epochs == 2
    assert compose("optimizer=sgd", "optimizer=adamw").optimizer.name is OptimizerName.adamw
    assert compose("backbone=conv4", "backbone=vgg11").backbone.name == "vgg11"


def test_the_short_and_the_long_key_of_the_backbone_are_one() -> None:
    assert compose("backbone=timm/vit_tiny_patch16_224").backbone.name == "timm/vit_tiny_patch16_224"
    assert compose("backbone.name=vgg11", "backbone=conv4").backbone.name == "conv4"
    assert compose("backbone.name=vgg11", "backbone=resnet18").backbone.name == "resnet18"
    assert compose("backbone.name=vgg16", "backbone=conv4", "backbone.name=vgg11").backbone.name == "vgg11"


def test_a_key_given_to_a_group_beats_its_file_wherever_it_stands() -> None:
    assert compose("optimizer.lr=0.5", "optimizer=sgd").optimizer.lr == 0.5


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("epoch=3", "epochs"),
        ("optimizer.l=1", "optimizer.lr"),
        ("freezedepth=2", "freeze_depth"),
        ("clustr=k8s", "cluster"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(override: str, nearest: str) -> None:
    message = complaint(override)
    assert message.startswith(f"{override}: unknown key; did you mean ")
    assert nearest in message


def test_an_unknown_choice_of_a_group_is_answered_with_the_known_ones() -> None:
    assert complaint("optimizer=sdg") == "optimizer=sdg: unknown choice; did you mean sgd?"
    assert complaint("data=zzz") == f"data=zzz: unknown choice; known: {', '.join(choices('data'))}"


@pytest.mark.parametrize("word", ["epochs", "+epochs=1", "~epochs", "++epochs=1", "=1", "a b=1", "--epochs=1", ""])
def test_what_is_no_override_is_refused(word: str) -> None:
    assert complaint(word) == f"{word}: not an override; write key=value"


@pytest.mark.parametrize(
    "override",
    [
        *("epochs=many", "epochs=1.5", "epochs=null", "epochs=[1]", "epochs=true", "optimizer.lr=fast"),
        *("resume=maybe", "precision=fp8", "data.drop=a", "data.features=[a", "cluster.kind=moon", "data={a:1}"),
        *("backbone.weights=null", "clip_grad_norm=[1]"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key(override: str) -> None:
    assert complaint(override).startswith(f"{override}: ")


def test_a_number_of_workers_is_a_number_or_a_pair() -> None:
    for value in ("many", [1, 2, 3], [1], 1.5, None, True, [1, "x"]):
        with pytest.raises(ConfigError, match=r"\Acluster\.num_workers=.+: give a whole number, or \[min,max\]"):
            ClusterConfig(num_workers=value)
    assert complaint("cluster.num_workers=[1,2,3]").startswith("cluster.num_workers=[1, 2, 3]: give a whole number")


INVALID: list[tuple[Callable[..., object], dict[str, Any], str]] = [
    (DataConfig, {"val_fraction": -0.1}, "data.val_fraction=-0.1: must lie in [0.0, 1.0)"),
    (DataConfig, {"val_fraction": 1.0}, "data.val_fraction=1.0: must lie in [0.0, 1.0)"),
    (DataConfig, {"image_size": 0}, "data.image_size=0: must be at least 1"),
    (DataConfig, {"num_train_per_class": 0}, "data.num_train_per_class=0: must be at least 1"),
    (DataConfig, {"cache_bytes": -1}, "data.cache_bytes=-1: must be at least 0"),
    (DataConfig, {"source": Source.image_folder}, "data.path is missing: data=image_folder needs it"),
    (DataConfig, {"source": Source.parquet}, "data.path is missing: data=parquet needs it"),
    (DataConfig, {"source": Source.csv}, "data.path is missing: data=csv needs it"),
    (DataConfig, {"source": Source.torchvision, "path": "x"}, "data.name is missing: data=torchvision needs it"),
    (DataConfig, {"source": Source.torchvision, "name": "x"}, "data.path is missing: data=torchvision needs it"),
    (DataConfig, {"image": "x"}, "data.image=x: data=digits has no columns"),
    (DataConfig, {"features": ["x"]}, "data.features=['x']: data=digits has no columns"),
    (DataConfig, {"split": "x"}, "data.split=x: data=digits has no columns"),
    (DataConfig, {"group": "x"}, "data.group=x: data=digits has no columns"),
    (OptimizerConfig, {"lr": 0.0}, "optimizer.lr=0.0: must be greater than 0"),
    (OptimizerConfig, {"lr": float("nan")}, "optimizer.lr=nan: must be a finite number"),
    (OptimizerConfig, {"weight_decay": -1.0}, "optimizer.weight_decay=-1.0: must be at least 0"),
    (OptimizerConfig, {"momentum": 1.0}, "optimizer.momentum=1.0: must lie in [0.0, 1.0)"),
    (OptimizerConfig, {"head_lr_multiplier": 0.0}, "optimizer.head_lr_multiplier=0.0: must be greater than 0"),
    (OptimizerConfig, {"layer_decay": 0.0}, "optimizer.layer_decay=0.0: must be greater than 0"),
    (ScheduleConfig, {"warmup_fraction": 1.0}, "schedule.warmup_fraction=1.0: must lie in [0.0, 1.0)"),
    (RecipeConfig, {"head_fraction": -0.5}, "recipe.head_fraction=-0.5: must lie in [0.0, 1.0)"),
    (CheckpointConfig, {"every_steps": 0}, "checkpoint.every_steps=0: must be at least 1"),
    (CheckpointConfig, {"num_to_keep": 0}, "checkpoint.num_to_keep=0: must be at least 1"),
    (ClusterConfig, {"num_workers": 0}, "cluster.num_workers=0: must be at least 1"),
    (ClusterConfig, {"num_workers": [3, 2]}, "cluster.num_workers=[3, 2]: the range is empty"),
    (ClusterConfig, {"gpus_per_worker": -1.0}, "cluster.gpus_per_worker=-1.0: must be at least 0"),
    (ClusterConfig, {"cpus_per_worker": 0}, "cluster.cpus_per_worker=0: must be at least 1"),
    (ClusterConfig, {"max_failures": -1}, "cluster.max_failures=-1: must be at least 0"),
    (ClusterConfig, {"kind": ClusterKind.inline, "num_workers": 2}, "cluster.num_workers=2: cluster=inline is one"),
    (DataConfig, {"image_size": 4097}, "data.image_size=4097: must be at most 4096"),
    (DataConfig, {"path": "flowers"}, "data.path=flowers: data=digits is bundled and reads no files"),
    (DataConfig, {"name": "CIFAR10"}, "data.name=CIFAR10: for data=torchvision only"),
    (FinetuneConfig, {"epochs": -1}, "epochs=-1: must be at least 0"),
    (FinetuneConfig, {"batch_size": 0}, "batch_size=0: must be at least 1"),
    (FinetuneConfig, {"accumulate": 0}, "accumulate=0: must be at least 1"),
    (FinetuneConfig, {"label_smoothing": 1.0}, "label_smoothing=1.0: must lie in [0.0, 1.0)"),
    (FinetuneConfig, {"clip_grad_norm": 0.0}, "clip_grad_norm=0.0: must be greater than 0"),
    (FinetuneConfig, {"early_stop": 0}, "early_stop=0: must be at least 1"),
    (FinetuneConfig, {"augment_views": 0, "augment": Augment.standard}, "augment_views=0: must be at least 1"),
    (FinetuneConfig, {"augment_views": 2}, "augment_views=2: augment=none changes nothing at random; leave it out"),
    (FinetuneConfig, {"seed": -1}, "seed=-1: must be at least 0"),
    (FinetuneConfig, {"freeze_depth": -1}, "freeze_depth=-1: must be at least 0"),
    (FinetuneConfig, {"freeze_depth": "most"}, "freeze_depth=most: give a number of layer groups"),
    (FinetuneConfig, {"batch_size": 3, "cluster": ClusterConfig(num_workers=4)}, "batch_size=3: fewer than one image"),
    (FinetuneConfig, {"resume": True}, "resume=true: which run?"),
    *(
        (FinetuneConfig, {"name": name}, f"name={name!r}: a run name")
        for name in ("", ".x", "a/b", "a\\b", "a:b", "a" * 201, "ü" * 101, " ", "a\nb", "\x1b[2J", "\udcff")
    ),
    (PretrainConfig, {"freeze_depth": 1}, "freeze_depth=1: pretrain trains every group"),
    (PretrainConfig, {"epochs": -1}, "epochs=-1: must be at least 0"),
]


@pytest.mark.parametrize(("make", "values", "message"), INVALID)
def test_a_value_out_of_range_is_named_with_its_key(
    make: Callable[..., object], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"\A{re.escape(message)}") as caught:
        make(**values)
    assert len(str(caught.value).splitlines()) == 1


def test_composing_checks_ranges_too() -> None:
    assert complaint("optimizer.momentum=2") == (
        "optimizer.momentum=2.0: must lie in [0.0, 1.0); choose a value in that range"
    )
    assert "freeze_depth=2: pretrain trains every group" in complaint("freeze_depth=2", job="pretrain")
    assert "data.path is missing: data=csv" in complaint("data=csv")


@pytest.fixture
def user_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    conf = tmp_path / "conf"
    shutil.copytree(conf_dir(), conf)
    monkeypatch.setattr("graftstack.config.compose.conf_dir", lambda: conf)
    return conf


def test_a_choice_that_the_user_adds_composes(user_conf: Path) -> None:
    (user_conf / "optimizer" / "slow.yaml").write_text("name: sgd\nlr: 1e-5\nmomentum: ${optimizer.weight_decay}\n")
    config = compose("optimizer=slow", "optimizer.weight_decay=0.25")
    assert (config.optimizer.lr, config.optimizer.momentum) == (1e-5, 0.25)


@pytest.mark.parametrize(
    ("file", "line", "parts"),
    [
        ("optimizer/adamw", "lrr: 1", ("conf/optimizer/adamw.yaml: optimizer.lrr: ", "'lrr' not in")),
        ("optimizer/adamw", "momentum: fast", ("conf/optimizer/adamw.yaml", "momentum", "fast")),
        ("finetune", "epoch: 3", ("conf/finetune.yaml", "epoch")),
        ("finetune", "epochs: few", ("conf/finetune.yaml", "epochs", "few")),
        ("optimizer/adamw", "momentum: [", ("conf/optimizer/adamw.yaml, line ", "not YAML")),
        ("optimizer/adamw", "momentum: 3.0", ("optimizer.momentum=3.0",)),
    ],
)
def test_a_mistake_in_a_users_yaml_is_named_with_its_file(
    user_conf: Path, file: str, line: str, parts: tuple[str, ...]
) -> None:
    path = user_conf / f"{file}.yaml"
    path.write_text(f"{path.read_text()}\n{line}\n")
    message = complaint()
    assert [part for part in parts if part not in message] == []


def test_composing_leaves_the_working_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = compose("seed=3")
    monkeypatch.chdir(tmp_path)
    assert compose("seed=3") == here
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_importing_the_configuration_loads_nothing_heavy() -> None:
    program = """
import sys
import graftstack.config.schema, graftstack.config.docs, graftstack.config.checks
import graftstack.config.jobs, graftstack.config.plain, graftstack.config.paths, graftstack.config.sweep
print(*sorted({"torch", "ray", "hydra", "omegaconf", "sklearn", "pyarrow", "numpy"} & sys.modules.keys()))
import graftstack.config.compose
print(*sorted({"torch", "ray", "sklearn", "pyarrow", "numpy", "hydra"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "hydra"]


@pytest.mark.parametrize("job", JOBS)
def test_every_key_has_an_explanation_and_the_default_that_composes(job: str) -> None:
    docs = {doc.key: doc for doc in key_docs(JOBS[job])}
    composed = flatten(to_plain(compose_job(job, LEAST.get(job, []))))
    composed = {key: value for key, value in composed.items() if not key.startswith("space.")}
    docs.pop("space", None)
    if composed.pop("base_models", None) is not None:
        docs.pop("base_models")
    assert docs.keys() == composed.keys()
    assert [key for key, doc in docs.items() if len(doc.text.strip()) < 5] == []
    typed = {key: "null" if value is None else str(value) for key, value in composed.items()}
    typed |= {key: str(value).lower() for key, value in composed.items() if isinstance(value, bool)}
    assert {key: doc.default for key, doc in docs.items()} == typed


@pytest.mark.parametrize("job", JOBS)
def test_help_names_every_key_and_every_choice(job: str) -> None:
    lines = [line.split() for line in job_help(job).splitlines()]
    shown = {words[0].partition("=")[0] for words in lines if words}
    assert {doc.key for doc in key_docs(JOBS[job])} - shown == set()
    for group in ("data", "optimizer", "cluster", "recipe", "schedule"):
        assert [f"{group}={'|'.join(choices(group))}"] in lines


def test_a_default_that_isnt_there_is_named_with_its_file(user_conf: Path) -> None:
    path = user_conf / "finetune.yaml"
    path.write_text(path.read_text().replace("optimizer: adamw", "optimizer: adamwx"))
    assert complaint().startswith("conf/finetune.yaml: could not find 'optimizer/adamwx'")


def test_plain_values_become_the_configuration_that_they_came_from() -> None:
    overrides = ["data=digits", "data.classes=[1,2]", "recipe=lp_ft", "cluster=inline", "augment=standard", "epochs=3"]
    config = compose_job("finetune", overrides)
    assert from_plain(type(config), json.loads(json.dumps(to_plain(config)))) == config
    assert from_plain(type(config), {"seed": 3}) == replace(type(config)(), seed=3)
    with pytest.raises(ValueError, match="sideways"):
        from_plain(type(config), {"select": "sideways"})
