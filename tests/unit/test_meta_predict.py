"""A meta run learns new classes from a support set, and is measured anew, as a person asks for it."""

import json
import shutil
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from graftstack.backbones.backbone import Backbone
from graftstack.backbones.registry import build
from graftstack.backbones.weights import load_weights
from graftstack.cli import main
from graftstack.config.schema import DataConfig, Source
from graftstack.data.table import read_table
from graftstack.finetune.model import without_prefix
from graftstack.finetune.predict import data_at
from graftstack.meta.artifact import load_meta
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.storage import Folder

DIGITS = load_digits()

Array = npt.NDArray[Any]


class Said(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, weights: str) -> Path:
    """A folder with finished runs, each named after what is special about it; 5-9 are held out."""
    folder = tmp_path_factory.mktemp("meta")
    write(folder / "digits.parquet", range(600))
    common = [
        "data=parquet", f"data.path={folder}/digits.parquet", "data.image=png", "data.label=digit",
        "data.image_size=8", "backbone=conv4", f"backbone.weights={weights}", "eval.classes=[5,6,7,8,9]", "num_ways=3",
        "num_queries=3", "eval.num_episodes=6", "cluster=inline", "cluster.cpus_per_worker=1",
        f"runs_dir={folder}/runs", f"taps.location={folder}/taps",
    ]  # fmt: skip
    runs = {
        "prototypes": [
            "num_episodes=40",
            "eval.num_ways=[2,5]",
            "eval.num_shots=[1,5]",
            "eval.val_fraction=0.3",
            "train.num_ways=2",
            "eval.num_val_episodes=5",
        ],
        "transductive": ["num_episodes=2", "eval.batchnorm=transductive"],
        "baseline": ["num_episodes=2", "method=finetune_baseline"],
        "maml": ["num_episodes=4", "method=maml", "num_shots=2", "inner_lr=0.1", "eval.inner_steps=3"],
        "maml-together": ["num_episodes=2", "method=maml", "eval.batchnorm=transductive"],
        "reptile": ["num_episodes=2", "method=reptile", "inner_batch_size=4", "inner_steps=2"],
        "measured": ["num_episodes=0", "eval.num_episodes=20", "num_shots=5", "taps.dtype=fp16"],
    }
    for name, options in runs.items():
        assert main(["meta", *common, f"name={name}", *options]) == 0
    shared = [word for word in common if not word.startswith(("eval.", "num_", "taps."))]
    assert main(["finetune", *shared, "name=finetuned", "epochs=0"]) == 0
    return folder


@pytest.fixture
def graftstack(place: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: str) -> Said:
        capsys.readouterr()
        status = main([*words, "--runs-dir", f"{place}/runs"])
        return Said(status, *capsys.readouterr())

    return run


def pixels(rows: Sequence[int]) -> Array:
    return np.asarray((DIGITS.images[list(rows)] * 15.9).astype(np.uint8))


def write(file: Path, rows: Sequence[int], *, names: Sequence[str | None] | None = None, labelled: bool = True) -> str:
    """Writes digits as a Parquet file; `names` are others for their classes."""
    encoded = []
    for image in pixels(rows):
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    named = DIGITS.target[list(rows)].astype(str) if names is None else names
    pq.write_table(pa.table({"png": encoded} | ({"digit": pa.array(named, pa.string())} if labelled else {})), file)
    return str(file)


def shots(**wanted: int) -> list[int]:
    """Returns rows of digits, e.g. five=2 of the first fives."""
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return [row for word, num in wanted.items() for row in np.flatnonzero(DIGITS.target == words.index(word))[:num]]


def predicted(graftstack: Command, run: str, data: str, support: str, out: Path) -> pa.Table:
    said = graftstack("predict", run, data, "--support", support, "--out", f"{out}/p.parquet")
    assert said.status == 0, said.err
    return pq.read_table(out / "p.parquet")


def probabilities(table: pa.Table) -> Array:
    return np.array(table["probabilities"].to_pylist())


def backbone_of(place: Path, run: str) -> Backbone:
    backbone = build("conv4", image_size=8)
    load_weights(backbone, f"{place}/runs/{run}/model/model.safetensors")
    return backbone.eval()


def images_of(place: Path, run: str, rows: Sequence[int]) -> torch.Tensor:
    """Returns digits as the backbone of a run sees them."""
    card = json.loads((place / "runs" / run / "model/model.json").read_text())
    shown = [np.asarray(Image.fromarray(image).convert("RGB")) for image in pixels(rows)]
    mean, std = (torch.tensor(card[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float() / 255 - mean) / std


def by_distance(known: torch.Tensor, labels: Array, new: torch.Tensor) -> Array:
    """Softmax over minus squared distances to the mean of each class."""
    means = torch.stack([known[labels == label].mean(dim=0) for label in np.unique(labels)])
    return (-torch.cdist(new, means).square()).softmax(dim=1).numpy()


# predicting


@pytest.mark.parametrize("wanted", [{"five": 1, "seven": 1}, {"nine": 7, "six": 1, "five": 3}, {"one": 3, "two": 2}])
def test_queries_are_compared_with_the_mean_features_of_each_class(
    graftstack: Command, place: Path, tmp_path: Path, wanted: dict[str, int]
) -> None:
    rows, queries = shots(**wanted), range(600, 750)
    support = write(tmp_path / "support.parquet", rows)
    data = write(tmp_path / "data.parquet", queries)
    table = predicted(graftstack, "prototypes", data, support, tmp_path)
    assert table.column_names == ["row_id", "label", "prediction", "probability", "probabilities"]
    backbone = backbone_of(place, "prototypes")
    with torch.no_grad():
        known, new = backbone(images_of(place, "prototypes", rows)), backbone(images_of(place, "prototypes", queries))
    wanted_probabilities = by_distance(known, DIGITS.target[rows], new)
    np.testing.assert_allclose(probabilities(table), wanted_probabilities, rtol=1e-3, atol=1e-3)
    names = np.unique(DIGITS.target[rows]).astype(str)
    assert table["prediction"].to_pylist() == names[probabilities(table).argmax(axis=1)].tolist()
    assert table.schema.metadata == {f"class_{i}".encode(): name.encode() for i, name in enumerate(names)}
    shown = [str(label) if str(label) in names else None for label in DIGITS.target[list(queries)]]
    assert table["label"].to_pylist() == shown


def test_what_is_learnt_is_right_more_often_than_not(graftstack: Command, tmp_path: Path) -> None:
    support = write(tmp_path / "support.parquet", shots(five=5, six=5, seven=5, eight=5, nine=5))
    queries = [row for row in range(600, 1200) if DIGITS.target[row] >= 5]
    table = predicted(graftstack, "prototypes", write(tmp_path / "data.parquet", queries), support, tmp_path)
    assert (
        np.mean([a == b for a, b in zip(table["label"].to_pylist(), table["prediction"].to_pylist(), strict=True)])
        > 0.55
    )


@pytest.mark.parametrize("run", ["prototypes", "baseline", "maml", "reptile"])
def test_an_inductive_answer_depends_on_no_other_query(graftstack: Command, tmp_path: Path, run: str) -> None:
    support = write(tmp_path / "support.parquet", shots(five=2, seven=2, nine=2))
    table = predicted(graftstack, run, write(tmp_path / "data.parquet", range(600, 800)), support, tmp_path)
    for row in (0, 199):
        data = write(tmp_path / "one.parquet", [600 + row], labelled=False)
        alone = predicted(graftstack, run, data, support, tmp_path)
        assert alone.num_rows == 1
        np.testing.assert_allclose(probabilities(alone)[0], probabilities(table)[row], rtol=1e-3, atol=1e-5)


def test_transductive_queries_are_normalised_together_with_the_support_set(
    graftstack: Command, place: Path, tmp_path: Path
) -> None:
    rows, queries = shots(five=2, seven=3, nine=1), range(600, 640)
    support = write(tmp_path / "support.parquet", rows)
    table = predicted(graftstack, "transductive", write(tmp_path / "all.parquet", queries), support, tmp_path)
    backbone = backbone_of(place, "transductive").train()
    together = torch.cat([images_of(place, "transductive", rows), images_of(place, "transductive", queries)])
    with torch.no_grad():
        known, new = backbone(together).split([len(rows), len(queries)])
    expected = by_distance(known, DIGITS.target[rows], new)
    np.testing.assert_allclose(probabilities(table), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("run", ["transductive", "maml-together"])
def test_a_transductive_answer_depends_on_its_company(graftstack: Command, tmp_path: Path, run: str) -> None:
    support = write(tmp_path / "support.parquet", shots(five=2, seven=2, nine=2))
    whole = predicted(graftstack, run, write(tmp_path / "all.parquet", range(600, 640)), support, tmp_path)
    few = predicted(graftstack, run, write(tmp_path / "few.parquet", range(600, 610)), support, tmp_path)
    ratio = np.log(probabilities(whole)[:10] + 1e-30) - np.log(probabilities(few) + 1e-30)
    assert np.abs(ratio).max() > 0.01


def test_maml_takes_steps_of_gradient_descent_on_the_support_set(
    graftstack: Command, place: Path, tmp_path: Path
) -> None:
    rows, queries = shots(seven=1, nine=4, five=2), range(600, 650)  # uneven, and not in the order of the classes
    support = write(tmp_path / "support.parquet", rows)
    table = predicted(graftstack, "maml", write(tmp_path / "data.parquet", queries), support, tmp_path)
    head = without_prefix(load_file(place / "runs/maml/model/meta.safetensors"), "head.")
    backbone = backbone_of(place, "maml").train()  # batches are normalised with their own moments
    classifier = torch.nn.Linear(64, 3)
    classifier.load_state_dict(head)
    network = torch.nn.Sequential(backbone, classifier)
    shown, labels = images_of(place, "maml", rows), torch.tensor(np.unique(DIGITS.target[rows], return_inverse=True)[1])
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(shown), labels).backward()
        optimizer.step()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # what the support set is normalised with, queries are too
    with torch.no_grad():
        moments = _moments_of(backbone, shown)
        expected = _with_moments(network, moments, images_of(place, "maml", queries)).softmax(dim=1)
    np.testing.assert_allclose(probabilities(table), expected.numpy(), rtol=1e-2, atol=2e-3)


def _moments_of(backbone: Backbone, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append((args[0].mean(dim=(0, 2, 3)), args[0].var(dim=(0, 2, 3), unbiased=False)))

    layers = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    handles = [layer.register_forward_pre_hook(see) for layer in layers]
    backbone(images)
    for handle in handles:
        handle.remove()
    return found


def _with_moments(
    network: torch.nn.Sequential, moments: list[tuple[torch.Tensor, torch.Tensor]], images: torch.Tensor
) -> torch.Tensor:
    layers = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for layer, (mean, variance) in zip(layers, moments, strict=True):
        layer.running_mean, layer.running_var = mean, variance
    logits: torch.Tensor = network.eval()(images)
    return logits


def test_reptile_takes_the_minibatches_of_an_episode(graftstack: Command, place: Path, tmp_path: Path) -> None:
    rows, queries = shots(five=4, seven=4, nine=4), range(600, 620)
    support = write(tmp_path / "support.parquet", rows)
    table = predicted(graftstack, "reptile", write(tmp_path / "data.parquet", queries), support, tmp_path)
    model, params, statistics, _ = load_meta(Folder(place / "runs/reptile/model"))
    episode = EpisodeBatch(
        support=images_of(place, "reptile", rows),
        support_labels=torch.arange(3).repeat_interleave(4),
        queries=images_of(place, "reptile", queries),
        query_labels=torch.zeros(20, dtype=torch.int64),
        classes=torch.arange(3),
        num_ways=3,
        num_shots=4,
    )
    expected = model.adapting.query_logits(params, statistics, episode).logits.softmax(dim=1)
    np.testing.assert_allclose(probabilities(table), expected.detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("run", ["baseline", "maml", "reptile"])
def test_classes_may_have_uneven_numbers_of_shots(graftstack: Command, tmp_path: Path, run: str) -> None:
    support = write(tmp_path / "support.parquet", shots(five=1, seven=4, nine=2))
    table = predicted(graftstack, run, write(tmp_path / "data.parquet", range(600, 620)), support, tmp_path)
    np.testing.assert_allclose(probabilities(table).sum(axis=1), 1, rtol=1e-5)
    assert set(table["prediction"].to_pylist()) <= {"5", "7", "9"}


def test_support_set_and_queries_may_lie_in_folders(graftstack: Command, tmp_path: Path) -> None:
    for name, rows in {"support/a": shots(five=2), "support/b": shots(seven=2), "new": shots(seven=5)[2:]}.items():
        (tmp_path / name).mkdir(parents=True)
        for row in rows:
            Image.fromarray(pixels([row])[0]).save(tmp_path / name / f"{row}.png")
    table = predicted(graftstack, "prototypes", f"{tmp_path}/new", f"{tmp_path}/support", tmp_path)
    assert table["label"].to_pylist() == [None] * 3
    assert table.schema.metadata == {b"class_0": b"a", b"class_1": b"b"}


def test_the_classes_are_in_the_order_of_the_house(graftstack: Command, tmp_path: Path) -> None:
    support = write(tmp_path / "s.parquet", shots(five=1, seven=1, nine=1), names=["10", "9", "2"])
    table = predicted(graftstack, "prototypes", "digits", support, tmp_path)
    assert table.schema.metadata == {b"class_0": b"2", b"class_1": b"9", b"class_2": b"10"}
    assert table.num_rows == len(DIGITS.target)
    assert set(table["label"].to_pylist()) == {None, "2", "9"}


def test_a_class_of_which_every_image_is_skipped_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "runs/prototypes", tmp_path / "run")
    manifest = tmp_path / "run/run.json"
    manifest.write_text(manifest.read_text().replace('"on_bad_image": "error"', '"on_bad_image": "skip"'))
    good = pq.read_table(write(tmp_path / "good.parquet", shots(five=2, seven=1)))
    bad = pa.table({"png": [b"no image"], "digit": ["9"]})
    pq.write_table(pa.concat_tables([good, bad]), tmp_path / "support.parquet")
    support = f"{tmp_path}/support.parquet"
    words = ["predict", f"{tmp_path}/run", "digits", "--support", support, "--out", f"{tmp_path}/p.parquet"]
    assert main(words) == 2
    assert "--support: none of the images of class 9 can be decoded; give others" in capsys.readouterr().err


@pytest.mark.parametrize(("rate", "steps", "named"), [(1e30, 1, 1), (1e30, 3, 1), (1e10, 3, 2)])
def test_an_inner_loop_that_diverges_names_the_step_that_leaves_the_numbers(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: float, steps: int, named: int
) -> None:
    shutil.copytree(place / "runs/maml", tmp_path / "maml")
    card = tmp_path / "maml/model/meta.json"
    about = json.loads(card.read_text())
    about["config"] |= {"inner_lr": rate}
    about["config"]["eval"] |= {"inner_steps": steps}
    card.write_text(json.dumps(about))
    support = write(tmp_path / "s.parquet", shots(five=1, seven=1, nine=1))
    words = ["predict", f"{tmp_path}/maml", "digits", "--support", support, "--out", f"{tmp_path}/p.parquet"]
    assert main(words) == 1
    said = f"inner_lr={rate:g}: the inner loop diverged at its step {named} on this support set; use"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "p.parquet").exists()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Files that bad input names."""
    write(tmp_path / "three.parquet", shots(five=1, seven=1, nine=1))
    write(tmp_path / "two.parquet", shots(five=1, seven=2))
    write(tmp_path / "one.parquet", shots(five=3))
    write(tmp_path / "bare.parquet", shots(five=1, seven=1), labelled=False)
    write(tmp_path / "gap.parquet", shots(five=1, seven=1), names=["5", None])
    return tmp_path


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["prototypes", "digits"],
            "--support is missing: prototypes learns classes from a few images of each; add --s",
        ),
        (
            ["finetuned", "digits", "--support", "three.parquet"],
            "--support three.parquet: finetuned is a finetune run, which knows its classes; leave it out, or learn "
            "from it with a meta run (graftstack meta backbone.weights=run:finetuned num_episodes=0)",
        ),
        (["prototypes", "digits", "--support", "bare.parquet"], "--support: data.label=digit: "),
        (
            ["prototypes", "digits", "--support", "gap.parquet"],
            "--support: row 1 has no label (1 of 2 rows); label the rows, or remove them",
        ),
        (
            ["prototypes", "digits", "--support", "one.parquet"],
            "--support: all images are of class 5; give images of two classes or more",
        ),
        (
            ["maml", "digits", "--support", "two.parquet"],
            "--support: has 2 classes, and the head of method=maml tells num_ways=3 apart; give images of 3 classes, "
            "or use a run with method=prototypes",
        ),
        (
            ["transductive", "single.parquet", "--support", "three.parquet"],
            "eval.batchnorm=transductive: BatchNorm normalises queries together, and there is a single one; predict "
            "several at once, or use a run with eval.batchnorm=inductive",
        ),
        (
            ["maml-together", "single.parquet", "--support", "three.parquet"],
            "eval.batchnorm=transductive: BatchNorm normalises queries together, and there is a single one; ",
        ),
        (
            ["prototypes", "digits", "--support", "three.parquet", "--base", "x"],
            "--base x: prototypes is no stack; leave it out",
        ),
        (["prototypes", "digits", "--support", "nowhere.parquet"], "--support: data.path=nowhere.parquet: "),
    ],
)
def test_what_can_not_be_learnt_or_predicted_is_one_line_and_exit_2(
    graftstack: Command, inputs: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], complaint: str
) -> None:
    write(inputs / "single.parquet", [700], labelled=False)
    monkeypatch.chdir(inputs)
    said = graftstack("predict", *words, "--out", "p.parquet")
    assert said.status == 2
    assert complaint in said.err
    assert said.err.count("\n") == 1
    assert not (inputs / "p.parquet").exists()


# evaluating


@pytest.mark.parametrize("run", ["prototypes", "transductive", "baseline", "maml", "reptile", "measured"])
def test_an_evaluation_repeats_the_numbers_of_the_run(graftstack: Command, place: Path, run: str) -> None:
    said = graftstack("evaluate", run, "--json")
    assert said.status == 0
    found = json.loads(said.out)
    results = json.loads((place / "runs" / run / "run.json").read_text())["results"]
    assert found["table"] == results["table"]
    assert {key: found[key] for key in ("accuracy", "ci95", "batchnorm")} == {
        key: results[key] for key in ("accuracy", "ci95", "batchnorm")
    }
    assert found["num_episodes"] == (20 if run == "measured" else 6)
    assert len(found["table"]) == (6 if run == "prototypes" else 1)


def test_other_parts_and_other_data_have_classes_of_their_own(graftstack: Command, tmp_path: Path) -> None:
    data = write(tmp_path / "new.parquet", range(1200, 1500))
    found = {}
    for words in ([], ["--split", "train"], [data], [data, "--split", "all"], ["digits"]):
        said = graftstack("evaluate", "baseline", *words, "--json")
        assert said.status == 0, said.err
        found[" ".join(words)] = json.loads(said.out)["accuracy"]
    assert found[data] == found[f"{data} --split all"]
    assert len(set(found.values())) == 4
    assert all(0.4 < accuracy <= 1 for accuracy in found.values())


@pytest.fixture
def characters(tmp_path: Path) -> dict[str, str]:
    """Where the same images lie: in Omniglot's Parquet file, a folder of such, as torchvision leaves it, and else."""
    images = pq.read_table(write(tmp_path / "plain.parquet", range(4)))["png"]
    columns = {"image": images, "alphabet": ["Greek"] * 4, "character": ["a", "a", "b", "b"], "split": ["train"] * 4}
    (tmp_path / "folder").mkdir()
    for name in ("own.parquet", "folder/part.parquet"):
        pq.write_table(pa.table(columns), tmp_path / name)
    for kind, parent in (("torchvision", "omniglot-py/images_background/Greek"), ("images", ".")):
        for image, character, index in zip(images.to_pylist(), "aabb", range(4), strict=True):
            folder = tmp_path / kind / parent / character
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index}.png").write_bytes(image)
    return {name: f"{tmp_path}/{name}" for name in ("own.parquet", "folder", "torchvision", "images", "plain.parquet")}


@pytest.mark.parametrize("name", ["own.parquet", "folder", "torchvision"])
def test_a_run_of_omniglot_takes_other_data_of_its_kind(characters: dict[str, str], name: str) -> None:
    own = DataConfig(source=Source.omniglot, path="mine.parquet", num_train_per_class=3)
    data = data_at(characters[name], own)
    assert (data.source, data.num_train_per_class) == (Source.omniglot, None)
    assert read_table(data).class_names == ("Greek/a", "Greek/b")
    assert data_at(characters[name], DataConfig()).source is not Source.omniglot


def test_a_run_of_omniglot_takes_other_data_as_they_are(characters: dict[str, str]) -> None:
    own = DataConfig(source=Source.omniglot, path="mine.parquet")
    assert read_table(data_at(characters["images"], own)).class_names == ("a", "b")
    assert data_at(characters["plain.parquet"], own).source is Source.parquet


def test_a_table_is_what_a_person_sees(graftstack: Command) -> None:
    said = graftstack("evaluate", "prototypes")
    lines = said.out.splitlines()
    assert lines[0].split()[:2] == ["ways", "shots"]
    assert [line.split()[:2] for line in lines[1:]] == [[w, s] for w in "325" for s in "15"]
    assert all("inductive" in line and "±" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["prototypes", "--split", "all"],
            "--split all: few-shot accuracy is told on classes that no training has shown",
        ),
        (
            ["prototypes", "--split", "val"],
            "num_ways=5: an episode takes more classes than the 3 of --split val; measure on",
        ),
        (
            ["baseline", "--split", "val"],
            "num_ways=3: an episode takes more classes than the 0 of --split val; measure o",
        ),
        (["baseline", "two.parquet"], "num_ways=3: an episode takes more classes than the 2 of data=parquet; me"),
        (
            ["baseline", "three.parquet"],
            "num_shots=1, num_queries=3: an episode takes 4 images of each class, but of data=parquet there "
            "are fewer of 5 (1), 7 (1), 9 (1); measure on others",
        ),
        (
            ["baseline", "three.parquet", "--split", "val"],
            "--split val: is of the run's own classes, and three.parquet i",
        ),
        (["baseline", "bare.parquet"], "data.label=digit: "),
    ],
)
def test_what_can_not_be_measured_is_one_line_and_exit_2(
    graftstack: Command, inputs: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], complaint: str
) -> None:
    monkeypatch.chdir(inputs)
    said = graftstack("evaluate", *words)
    assert said.status == 2
    assert said.err.splitlines()[-1].startswith(f"graftstack: {complaint}")


def test_data_whose_classes_have_changed_since_are_not_measured(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "runs/prototypes", tmp_path / "moved")
    manifest = tmp_path / "moved/run.json"
    data = write(tmp_path / "other.parquet", [row for row in range(600) if DIGITS.target[row] != 3])
    manifest.write_text(manifest.read_text().replace(f"{place}/digits.parquet", data))
    assert main(["evaluate", f"{tmp_path}/moved"]) == 2
    assert "its classes aren't those that the run was trained with" in capsys.readouterr().err
