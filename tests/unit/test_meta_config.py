"""The configuration of meta-learning, and what of configuration and data can't be trained: one line before any run."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graftstack.cli import main
from graftstack.config.compose import compose_job
from graftstack.config.meta import BatchNormMode, EvalConfig, Execution, MetaConfig, MethodName, TrainEpisodesConfig
from graftstack.config.plain import from_plain, to_plain
from graftstack.config.schema import Precision, Select, Source
from graftstack.errors import ConfigError

ADAPTING = ["maml", "fomaml", "anil", "reptile", "meta_sgd"]
EMBEDDING = ["prototypes", "supcon", "triplet", "finetune_baseline"]

Capture = pytest.CaptureFixture[str]


def compose(*overrides: str) -> MetaConfig:
    config = compose_job("meta", overrides)
    assert isinstance(config, MetaConfig)
    return config


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def complaint(capsys: Capture, folder: Path, *overrides: str) -> str:
    """Returns the one line that bad input ends in, which leaves no run."""
    words = ["meta", "cluster=inline", "cluster.cpus_per_worker=1", f"runs_dir={folder}/runs", *overrides]
    last = {word.partition("=")[0]: word for word in words}
    assert main(list(last.values())) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("decoded "))
    assert not (folder / "runs").exists()
    return line.removeprefix("graftstack: ")


# what is given


def test_every_kind_of_value_composes_to_its_type() -> None:
    config = compose(
        *("method=reptile", "num_ways=20", "episodes_per_step=4", "inner_lr=1e-2", "inner_steps=3", "precision=bf16"),
        *("inner_batch_size=10", "execution=vmap", "select=last", "eval.batchnorm=transductive", "eval.inner_steps=9"),
        *("eval.classes=[3,cat]", "rotations=true", "optimizer=sgd", "clip_grad_norm=1", "train.num_shots=5"),
    )
    assert (config.method, config.execution) == (MethodName.reptile, Execution.vmap)
    assert (config.precision, config.select) == (Precision.bf16, Select.last)
    assert config.eval.batchnorm is BatchNormMode.transductive
    assert config.eval.classes == [3, "cat"]
    assert (config.inner_lr, config.inner_steps, config.eval.inner_steps, config.inner_batch_size) == (0.01, 3, 9, 10)
    assert (config.train.num_ways, config.train.num_shots, config.rotations) == (None, 5, True)
    assert config.num_steps == 2500
    assert from_plain(MetaConfig, to_plain(config)) == config


def test_the_table_begins_with_what_the_run_reports() -> None:
    config = compose("num_ways=5", "num_shots=2", "eval.num_ways=[20,5]", "eval.num_shots=[1,2,1]")
    assert (config.eval_ways, config.eval_shots) == ([5, 20], [2, 1])
    assert (compose().eval_ways, compose().eval_shots) == ([5], [1])


def test_a_recipe_is_an_experiment_whose_keys_can_be_changed() -> None:
    config = compose("experiment=omniglot_prototypes", "data.path=omniglot.parquet", "train.num_ways=30")
    assert config.data.source is Source.omniglot
    assert (config.method, config.train.num_ways) == (MethodName.prototypes, 30)
    assert (config.eval_ways, config.eval_shots) == ([5, 20], [1, 5])
    assert config.num_episodes % config.episodes_per_step == 0


def test_methods_are_of_two_kinds() -> None:
    assert [method.value for method in MethodName if method.adapts] == ADAPTING
    assert [method.value for method in MethodName if not method.adapts] == EMBEDDING


def test_help_names_every_method_and_both_kinds_of_batchnorm(capsys: Capture) -> None:
    assert main(["meta", "--help"]) == 0
    text = capsys.readouterr().out
    for name in (*ADAPTING, *EMBEDDING, "inductive", "transductive", "num_episodes=0", "omniglot_prototypes"):
        assert name in text


# what the configuration alone can tell


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["num_ways=1"], "num_ways=1: must be at least 2; raise it"),
        (["num_shots=0"], "num_shots=0: must be at least 1; raise it"),
        (["num_queries=0"], "num_queries=0: must be at least 1; raise it"),
        (["num_episodes=-1"], "num_episodes=-1: must be at least 0; raise it"),
        (["episodes_per_step=0"], "episodes_per_step=0: must be at least 1; raise it"),
        (["train.num_ways=1"], "train.num_ways=1: must be at least 2; raise it"),
        (["train.num_shots=0"], "train.num_shots=0: must be at least 1; raise it"),
        (["train.num_queries=0"], "train.num_queries=0: must be at least 1; raise it"),
        (["eval.num_episodes=0"], "eval.num_episodes=0: must be at least 2; raise it"),
        (["eval.num_val_episodes=0"], "eval.num_val_episodes=0: must be at least 2; raise it"),
        (["eval.every_episodes=0"], "eval.every_episodes=0: must be at least 1; raise it"),
        (["eval.inner_steps=0"], "eval.inner_steps=0: must be at least 1; raise it"),
        (["eval.num_ways=[5,1]"], "eval.num_ways=1: must be at least 2; raise it"),
        (["eval.num_shots=[0]"], "eval.num_shots=0: must be at least 1; raise it"),
        (["eval.test_fraction=0"], "eval.test_fraction=0.0: must be greater than 0"),
        (["eval.test_fraction=1.5"], "eval.test_fraction=1.5: must be at most 1; lower it"),
        (["eval.test_fraction=0.7", "eval.val_fraction=0.3"], "eval.val_fraction=0.3: leave no class to train on; "),
        (["eval.batchnorm=both"], "eval.batchnorm=both: "),
        (["method=mamel"], "method=mamel: "),
        (["inner_lr=0"], "inner_lr=0.0: must be greater than 0"),
        (["inner_steps=0"], "inner_steps=0: must be at least 1; raise it"),
        (["temperature=0"], "temperature=0.0: must be greater than 0"),
        (["margin=-1"], "margin=-1.0: must be greater than 0"),
        (["clip_grad_norm=0"], "clip_grad_norm=0.0: must be greater than 0"),
        (["backbone.keep_head=true"], "backbone.keep_head=true: new classes come with each episode; leave it out"),
        (["method=reptile", "inner_batch_size=0"], "inner_batch_size=0: must be at least 1; raise it"),
        (["num_way=5"], "num_way=5: unknown key; did you mean num_ways"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_named_with_the_remedy(overrides: list[str], expected: str) -> None:
    assert expected in refused(*overrides)


def test_zero_episodes_measure_weights_that_are_given_and_no_random_ones() -> None:
    assert refused("num_episodes=0") == (
        "num_episodes=0: nothing is trained, and backbone.weights=none are random; give weights, or num_episodes=10000"
    )
    assert compose("num_episodes=0", "backbone.weights=conv4.safetensors").num_steps == 0


def test_a_head_that_adapts_is_nothing_without_training() -> None:
    assert refused("num_episodes=0", "backbone.weights=x.pth", "method=maml") == (
        "num_episodes=0: method=maml is nothing without training; use prototypes or finetune_baseline, or more episodes"
    )


@pytest.mark.parametrize(("num", "better"), [(10, 8), (3, 4)])
def test_episodes_fill_whole_steps(num: int, better: int) -> None:
    said = refused(f"num_episodes={num}", "episodes_per_step=4")
    assert said == f"num_episodes={num}: no multiple of episodes_per_step=4; use {better}"
    assert compose(f"num_episodes={better}", "episodes_per_step=4").num_steps == better // 4


def test_a_head_that_adapts_tells_one_number_of_classes_apart() -> None:
    others = ({"train": TrainEpisodesConfig(num_ways=3)}, {"eval": EvalConfig(num_ways=[3])})
    for method in MethodName:
        for other in (*others, {"eval": EvalConfig(num_ways=[5, 3])}):
            if not method.adapts:
                MetaConfig(method=method, **other)
                continue
            said = f"num_ways=3: the head of method={method.value} tells num_ways=5 classes apart"
            with pytest.raises(ConfigError, match=said):
                MetaConfig(method=method, **other)
    MetaConfig(method=MethodName.maml, train=TrainEpisodesConfig(num_ways=5), eval=EvalConfig(num_ways=[5]))


def test_minibatches_of_the_inner_loop_are_reptiles() -> None:
    for method in MethodName:
        if method is not MethodName.reptile:
            with pytest.raises(ConfigError, match=r"^inner_batch_size=5: for method=reptile only; leave it out$"):
                MetaConfig(method=method, inner_batch_size=5)


def test_only_what_adapts_has_episodes_to_vectorise() -> None:
    for method in MethodName:
        if method.adapts:
            MetaConfig(method=method, execution=Execution.vmap)
            continue
        with pytest.raises(ConfigError, match=f"^execution=vmap: method={method.value} feeds an episode as one batch"):
            MetaConfig(method=method, execution=Execution.vmap)


def test_no_worker_is_without_an_episode_of_a_step() -> None:
    assert refused("cluster.num_workers=6", "episodes_per_step=4") == (
        "cluster.num_workers=6: a step of episodes_per_step=4 is shared out in 4 parts, so 2 of them would idle; use 4 "
        "or fewer"
    )
    assert "in 32 parts, so 16 of them" in refused("cluster.num_workers=48", "episodes_per_step=64", "num_episodes=64")
    assert compose("cluster.num_workers=4", "episodes_per_step=4").cluster.max_workers == 4
    measured = compose("cluster.num_workers=4", "num_episodes=0", "backbone.weights=x.pth")
    assert measured.cluster.max_workers == 4, "evaluation has more to share out than a step"


# what only the data can tell


def write_table(file: Path, counts: Sequence[int], *, split: Sequence[str] = (), group: bool = False) -> list[str]:
    """Writes so many images of each class, and returns what reads them; `split` says where every other one belongs."""
    rng = np.random.default_rng(0)
    columns: dict[str, list[object]] = {"png": [], "kind": [], "part": [], "writer": []}
    for index, count in enumerate(counts):
        for number in range(count):
            buffer = BytesIO()
            Image.fromarray(rng.integers(0, 255, (6, 6), dtype=np.uint8)).save(buffer, "PNG")
            columns["png"].append(buffer.getvalue())
            columns["kind"].append(f"c{index:02}")
            columns["part"].append(split[(index + number) % len(split)] if split else None)
            columns["writer"].append(f"w{number % 3}")
    pq.write_table(pa.table(columns), file)
    return [
        *("data=parquet", f"data.path={file}", "data.image=png", "data.label=kind", "data.image_size=6"),
        *(["data.split=part"] if split else []),
        *(["data.group=writer"] if group else []),
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["num_ways=6"], "num_ways=6: an episode takes more classes than train, which 5 do; use at most 5, or let "),
        (["eval.num_ways=[2,6]"], "eval.num_ways=6: an episode takes more classes than test, which 5 do; use at most "),
        (["train.num_ways=6"], "train.num_ways=6: an episode takes more classes than train, which 5 do; use at most "),
        (["eval.val_fraction=0.1"], "num_ways=2: an episode takes more classes than validate, which 1 does; let "),
        (["eval.classes=[0,1,2,3,4,5,6,7,8]"], "num_ways=2: an episode takes more classes than train, which 1 does; l"),
        (["eval.classes=[0,11]"], "eval.classes=11: no row has this class; did you mean 1?"),
        (["num_shots=170"], "num_shots=170, num_queries=15: an episode takes 185 images of each class, but there are "),
        (["eval.num_shots=[1,170]"], "eval.num_shots=170, num_queries=15: an episode takes 185 images of each class, "),
        (["train.num_queries=182"], "num_shots=1, train.num_queries=182: an episode takes 183 images of each class, "),
        (["backbone=squeezenet1_1"], "data.image_size=8: squeezenet1_1 can't take images of 8x8 pixels ("),
        (["backbone=vit_b_16", "data.image_size=20"], "data.image_size=20: vit_b_16 can't take it (Input shape "),
        (["backbone=conv5"], "backbone=conv5: unknown; did you mean conv4"),
        (["backbone.weights=nowhere.pth"], "backbone.weights=nowhere.pth: "),
        (["backbone.weights=run:nowhere"], "backbone.weights=run:nowhere: no such run in "),
    ],
)  # fmt: skip
def test_what_cant_be_trained_ends_in_one_line_and_leaves_no_run(
    tmp_path: Path, capsys: Capture, overrides: list[str], expected: str
) -> None:
    digits = ("data=digits", "data.image_size=8", "num_ways=2")
    said = complaint(capsys, tmp_path, *digits, *overrides)
    assert said.startswith(expected)


def test_a_class_with_too_few_images_is_named(tmp_path: Path, capsys: Capture) -> None:
    data = write_table(tmp_path / "few.parquet", [8, 8, 3, 8, 8, 8])
    said = complaint(capsys, tmp_path, *data, "num_ways=2", "num_queries=3")
    assert said == (
        "num_shots=1, num_queries=3: an episode takes 4 images of each class, but there are fewer of c02 (3); lower "
        "them, or keep other classes with data.classes"
    )


def test_a_class_neither_trains_nor_tests_in_part(tmp_path: Path, capsys: Capture) -> None:
    data = write_table(tmp_path / "mixed.parquet", [8] * 6, split=["train", "test"])
    said = complaint(capsys, tmp_path, *data, "num_ways=2", "num_queries=3")
    assert said.startswith("class c00, c01, ")
    assert (
        "images in more than one of train, val and test, but a class that tests must be new; leave data.split" in said
    )


def test_a_group_neither_trains_nor_tests_in_part(tmp_path: Path, capsys: Capture) -> None:
    data = write_table(tmp_path / "groups.parquet", [8] * 6, group=True)
    said = complaint(capsys, tmp_path, *data, "num_ways=2", "num_queries=3")
    assert said.startswith("data.group: w0, w1, w2 has images of classes that train and of classes that don't; ")


def test_rows_without_images_are_no_episodes(tmp_path: Path, capsys: Capture) -> None:
    data = write_table(tmp_path / "table.parquet", [8] * 6)
    said = complaint(capsys, tmp_path, *(word for word in data if not word.startswith("data.image=")))
    assert said.startswith("data.image is missing: a backbone learns from images; name their column, data.image=COLUMN")
