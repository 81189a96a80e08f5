import io
import os
import pickle
import resource
import shutil
import tempfile
import urllib.error
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file

from graftstack.backbones.backbone import Backbone
from graftstack.backbones.preprocessing import Preprocessing
from graftstack.backbones.registry import build
from graftstack.backbones.weight_files import digest_of
from graftstack.backbones.weights import hash_state, load_weights
from graftstack.config.compose import compose_job
from graftstack.errors import RunError, WeightsError
from graftstack.finetune.initial import preprocessing_for, weights_digest

REPOSITORY = Path(__file__).parents[2]
TEST_DATA = Path(os.environ.get("GRAFTSTACK_TEST_DATA", REPOSITORY / "../shared/data"))


@pytest.fixture
def backbone() -> Backbone:
    return build("cifar_resnet20").eval()


@pytest.fixture
def trained() -> dict[str, torch.Tensor]:
    """The state dict of another `cifar_resnet20` than `backbone`, head included."""
    state = build("cifar_resnet20").model.state_dict()
    return {key: tensor + 1 for key, tensor in state.items()}


@pytest.fixture
def real_data() -> Path:
    if not TEST_DATA.is_dir():
        pytest.skip(f"no real data at {TEST_DATA}; set GRAFTSTACK_TEST_DATA")
    return TEST_DATA


def refusal(backbone, spec, *, keep_head=False) -> str:
    """The message of the refusal, after a check that it is one line and that nothing was loaded."""
    before = hash_state(backbone.model.state_dict())
    with pytest.raises(WeightsError) as caught:
        load_weights(backbone, str(spec), keep_head=keep_head)
    assert hash_state(backbone.model.state_dict()) == before
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"backbone.weights={spec}: ")
    assert "; " in message
    return message


def holds(backbone, state) -> bool:
    own = backbone.model.state_dict()
    return all(torch.equal(own[key], state[key]) for key in own if key in state)


def test_none_leaves_the_random_weights(backbone):
    before = hash_state(backbone.state_dict())
    report = load_weights(backbone, "none")
    assert hash_state(backbone.state_dict()) == before
    assert not report.head_loaded
    assert report.preprocessing == Preprocessing(32)
    assert "keep_head=false" in refusal(backbone, "none", keep_head=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".th", ".bin"])
def test_a_file_is_loaded_with_its_head(backbone, trained, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file(trained, path) if suffix == ".safetensors" else torch.save(trained, path)
    report = load_weights(backbone, str(path), keep_head=True)
    assert holds(backbone, trained)
    assert report.head_loaded
    assert report.skipped_head is None


def test_a_file_of_the_old_format_is_loaded(backbone, trained, tmp_path):
    torch.save(trained, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(backbone, str(tmp_path / "old.pth"))
    assert holds(backbone, trained)


def test_a_torch_file_under_a_wrong_suffix_is_loaded(backbone, trained, tmp_path):
    torch.save(trained, tmp_path / "wrong.safetensors")
    load_weights(backbone, str(tmp_path / "wrong.safetensors"))
    assert holds(backbone, trained)


def test_a_uri_is_loaded(backbone, trained):
    content = io.BytesIO()
    torch.save(trained, content)
    with fsspec.open("memory://weights/resnet20.pth", "wb") as file:
        file.write(content.getvalue())
    load_weights(backbone, "memory://weights/resnet20.pth")
    assert holds(backbone, trained)
    assert "can't be fetched" in refusal(backbone, "memory://weights/missing.pth")


def test_a_file_in_an_archive_is_loaded(backbone, trained, tmp_path):
    torch.save(trained, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "w.pt", "deep/w.pt")
    chain = f"zip://deep/w.pt::{tmp_path}/all.zip"
    load_weights(backbone, chain)
    assert holds(backbone, trained)
    assert digest_of(chain) == digest_of(f"file://{tmp_path}/w.pt") == digest_of(f"{tmp_path}/w.pt") != ""
    assert "can't be " in refusal(backbone, f"zip://w.pt::{tmp_path}/none.zip")
    assert "can't be " in refusal(backbone, f"zip://none.pt::{tmp_path}/all.zip")


class InPieces(MemoryFileSystem):
    """A store whose files are never asked for as a whole."""

    protocol = "pieces"
    largest = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("pieces:/"))

    def cat_file(self, path, **_):
        raise AssertionError(f"{path} is held in memory")

    def _open(self, path, *args, **options):
        file = super()._open(path, *args, **options)

        class Reader(io.RawIOBase):
            def readable(self):
                return True

            def readinto(self, buffer):
                InPieces.largest = max(InPieces.largest, len(buffer))
                return file.readinto(buffer)

        return io.BufferedReader(Reader(), 2**16)


def test_a_large_file_is_never_held_in_memory(backbone, trained, tmp_path):
    fsspec.register_implementation("pieces", InPieces, clobber=True)
    torch.save({"model": trained, "ema": torch.zeros(2**22)}, tmp_path / "w.pt")
    location = "pieces://large/w.pt"
    MemoryFileSystem().put_file(str(tmp_path / "w.pt"), "/large/w.pt")
    load_weights(backbone, location)
    assert holds(backbone, trained)
    assert digest_of(location) == digest_of(str(tmp_path / "w.pt"))
    assert 0 < InPieces.largest <= 2**22 < (tmp_path / "w.pt").stat().st_size / 4


def test_a_temporary_folder_without_room_is_named(backbone, trained, tmp_path, monkeypatch):
    torch.save(trained, tmp_path / "w.pt")
    location = f"memory://{tmp_path.name}/w.pt"
    MemoryFileSystem().put_file(str(tmp_path / "w.pt"), f"/{tmp_path.name}/w.pt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # the kernel refuses to write on, as a full disk does
    try:
        message = refusal(backbone, location)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    place = tempfile.gettempdir()
    assert message.endswith(f": no space left for it in {place}; free some, or set TMPDIR to a folder with room")
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/none")
    message = refusal(backbone, location)
    assert ": no temporary file can be made for it (" in message
    assert message.endswith("; set TMPDIR to a folder that can be written")


def test_a_file_that_cant_be_read_has_no_digest(tmp_path):
    assert digest_of(f"{tmp_path}/none") == digest_of("memory://none/w.pt") == digest_of(str(tmp_path)) == ""
    with pytest.raises(WeightsError, match=r"\Abackbone\.weights=nosuch://x/w.pt: can't be reached \("):
        digest_of("nosuch://x/w.pt")


def test_a_run_in_a_store_that_is_out_of_reach_is_told_by_the_key_that_names_it():
    config = compose_job("finetune", ["data=digits", "backbone=conv4", "backbone.weights=run:nosuch://bucket/base"])
    for use in (preprocessing_for, weights_digest):
        with pytest.raises(RunError, match=r"\Abackbone\.weights=run:nosuch://bucket/base: can't be reached \("):
            use(config)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "model_ema", "net"])
def test_wrappers_are_opened(backbone, trained, tmp_path, wrapper):
    torch.save({"epoch": 3, "optimizer": {"state": {}}, wrapper: trained}, tmp_path / "wrapped.pth")
    load_weights(backbone, str(tmp_path / "wrapped.pth"))
    assert holds(backbone, trained)


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "backbone.", "_orig_mod.", "_orig_mod.module.", "module.model."]
)
def test_prefixes_are_stripped(backbone, trained, tmp_path, prefix):
    save_file({f"{prefix}{key}": tensor for key, tensor in trained.items()}, tmp_path / "prefixed.safetensors")
    load_weights(backbone, str(tmp_path / "prefixed.safetensors"), keep_head=True)
    assert holds(backbone, trained)


def test_a_graft_is_loaded_without_its_head(tmp_path):
    donor, backbone = build("resnet18"), build("resnet18")
    state = {f"backbone.{key}": tensor for key, tensor in donor.backbone_state().items()}
    save_file({**state, "head.weight": torch.ones(3, 512), "head.bias": torch.ones(3)}, tmp_path / "run.safetensors")
    report = load_weights(backbone, str(tmp_path / "run.safetensors"))
    assert hash_state(backbone.backbone_state()) == hash_state(donor.backbone_state())
    assert not report.head_loaded
    assert report.skipped_head == "fc.bias is missing there and [1000] here"


def test_counters_may_be_missing(backbone, trained, tmp_path):
    state = {key: tensor for key, tensor in trained.items() if not key.endswith("num_batches_tracked")}
    save_file({**state, "n_averaged": torch.tensor(5)}, tmp_path / "old.safetensors")
    load_weights(backbone, str(tmp_path / "old.safetensors"))
    assert holds(backbone, state)


def test_half_precision_weights_become_the_backbones_dtype(backbone, trained, tmp_path):
    save_file(
        {key: t.bfloat16() if t.is_floating_point() else t for key, t in trained.items()}, tmp_path / "b.safetensors"
    )
    load_weights(backbone, str(tmp_path / "b.safetensors"))
    assert all(p.dtype == torch.float32 for p in backbone.parameters())


def test_a_head_of_another_size_is_skipped_and_said_so(trained, tmp_path):
    backbone = build("cifar_resnet20", num_classes=3)
    save_file(trained, tmp_path / "w.safetensors")
    report = load_weights(backbone, str(tmp_path / "w.safetensors"))
    assert report.skipped_head == "linear.bias is [10] there and [3] here"
    assert not report.head_loaded
    assert holds(backbone, {"conv1.weight": trained["conv1.weight"]})
    message = refusal(backbone, tmp_path / "w.safetensors", keep_head=True)
    assert "its head can't be kept: linear.bias is [10] there and [3] here" in message


def test_a_missing_head_is_refused_only_if_kept(backbone, trained, tmp_path):
    save_file({k: t for k, t in trained.items() if not k.startswith("linear")}, tmp_path / "w.safetensors")
    assert "linear.bias is missing there" in refusal(backbone, tmp_path / "w.safetensors", keep_head=True)
    assert load_weights(backbone, str(tmp_path / "w.safetensors")).skipped_head


def test_another_architecture_is_refused_with_the_first_differences(tmp_path):
    torch.save(build("resnet50").model.state_dict(), tmp_path / "resnet50.pth")
    message = refusal(build("resnet18"), tmp_path / "resnet50.pth")
    assert (
        ": made for another architecture than resnet18: layer1.0.conv1.weight is [64, 64, 1, 1] there and "
        "[64, 64, 3, 3] here; "
    ) in message
    assert "more; " in message


def test_unknown_and_missing_weights_are_refused(backbone, trained, tmp_path):
    save_file({**trained, "conv9.weight": torch.ones(2)}, tmp_path / "more.safetensors")
    assert "conv9.weight is [2] there and missing here" in refusal(backbone, tmp_path / "more.safetensors")
    del trained["layer3.2.bn2.running_var"]
    save_file(trained, tmp_path / "less.safetensors")
    assert "layer3.2.bn2.running_var is missing there and [64] here" in refusal(backbone, tmp_path / "less.safetensors")


def test_weights_of_whole_numbers_are_refused(backbone, trained, tmp_path):
    save_file({**trained, "conv1.weight": trained["conv1.weight"].to(torch.int8)}, tmp_path / "w.safetensors")
    assert "conv1.weight is torch.int8 there" in refusal(backbone, tmp_path / "w.safetensors")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_a_sparse_tensor_is_refused(backbone, trained, tmp_path):
    torch.save({**trained, "conv1.weight": trained["conv1.weight"].to_sparse()}, tmp_path / "w.pth")
    assert "conv1.weight is a sparse tensor there" in refusal(backbone, tmp_path / "w.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_weights_are_refused(backbone, trained, tmp_path, value):
    trained["layer2.0.conv1.weight"][3, 2, 1, 0] = value
    save_file(trained, tmp_path / "nan.safetensors")
    assert "layer2.0.conv1.weight holds NaN or infinite values" in refusal(backbone, tmp_path / "nan.safetensors")


def test_a_file_that_runs_code_is_refused_and_not_run(backbone, tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was-run",))

    torch.save({"state_dict": {}, "extra": Attack()}, tmp_path / "attack.pth")
    (tmp_path / "attack.bin").write_bytes(pickle.dumps(Attack(), protocol=2))
    for name in ("attack.pth", "attack.bin"):
        message = refusal(backbone, tmp_path / name)
        assert "untrusted content" in message
        assert "convert it to safetensors" in message
    assert not (tmp_path / "was-run").exists()


def test_a_whole_pickled_model_is_refused(backbone, tmp_path):
    torch.save(build("conv4").model, tmp_path / "model.pt")
    assert "untrusted content" in refusal(backbone, tmp_path / "model.pt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_a_truncated_file_is_refused(backbone, trained, tmp_path, kind, share):
    path = tmp_path / "cut"
    if kind == "safetensors":
        save_file(trained, path)
    else:
        torch.save(trained, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = refusal(backbone, path)
    assert "cut short" in message
    assert "fetch it again" in message


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"\n<html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"hello, world, this is text", "not a weights file"),
        (b"PK\x03\x04 but no archive behind it", "damaged"),
        (b"\x80", "damaged"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "holds no tensors"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_weights_file_is_named(backbone, tmp_path, content, fault, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    assert fault in refusal(backbone, path)


def test_a_checkpoint_without_tensors_is_refused(backbone, tmp_path):
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "empty.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    assert "no tensors" in refusal(backbone, tmp_path / "empty.pth")
    assert "no tensors" in refusal(backbone, tmp_path / "list.pth")


def test_a_folder_or_a_missing_path_is_named(backbone, tmp_path):
    assert "is a folder" in refusal(backbone, tmp_path)
    assert "no such file" in refusal(backbone, tmp_path / "missing.pth")
    assert "no such file" in refusal(backbone, "missing.pth")


def test_published_names_are_checked_before_any_download(backbone):
    assert "use one of IMAGENET1K_V1, DEFAULT" in refusal(build("resnet18"), "IMAGENET21K_V1")
    assert "use one of IMAGENET1K_V1, IMAGENET1K_V2" in refusal(build("resnet50"), "ResNet18_Weights.IMAGENET1K_V1")
    assert "use none, or a file" in refusal(backbone, "DEFAULT")


@pytest.mark.parametrize("spec", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
def test_without_a_network_the_file_to_fetch_is_named(monkeypatch, tmp_path, capsys, spec):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    message = refusal(build("resnet18"), spec)
    assert "can't download https://download.pytorch.org/models/resnet18-f37072fd.pth (Temporary failure" in message
    assert f"put the file into {tmp_path}/checkpoints/resnet18-f37072fd.pth" in message
    assert "or give backbone.weights=/path/to/resnet18-f37072fd.pth" in message
    assert capsys.readouterr().out == ""  # what others may parse


def test_published_weights_are_taken_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    donor, backbone = build("mnasnet0_5"), build("mnasnet0_5")
    cached = tmp_path / "checkpoints" / "mnasnet0.5_top1_67.823-3ffadce67e.pth"
    torch.save(donor.model.state_dict(), cached)
    report = load_weights(backbone, "DEFAULT", keep_head=True)
    assert holds(backbone, donor.model.state_dict())
    assert report.preprocessing.image_size == 224
    cached.write_bytes(cached.read_bytes()[:1000])
    assert "is damaged" in refusal(backbone, "DEFAULT")


def test_old_published_names_are_understood(tmp_path):
    donor, backbone = build("densenet121"), build("densenet121")
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): tensor
        for key, tensor in donor.model.state_dict().items()
    }
    torch.save(old, tmp_path / "densenet.pth")
    load_weights(backbone, str(tmp_path / "densenet.pth"), keep_head=True)
    assert holds(backbone, donor.model.state_dict())


def test_timm_weights_without_a_network(monkeypatch):
    timm = pytest.importorskip("timm")
    backbone = build("timm/resnet18")

    def no_network(*args, **kwargs):
        raise RuntimeError("no route to host\nand a long story")

    monkeypatch.setattr(timm, "create_model", no_network)
    message = refusal(backbone, "DEFAULT")
    assert "timm/resnet18.a1_in1k" in message
    assert "or give" in message or "and give backbone.weights=" in message
    assert "timm/NAME.TAG" in refusal(backbone, "IMAGENET1K_V1")


def test_the_hash_follows_names_dtypes_shapes_and_bytes():
    state = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    assert hash_state(state) == hash_state({"b": state["b"].clone(), "a": state["a"].clone()})
    others = [
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"].double(), "b": state["b"]},
        {"a": state["a"].reshape(2, 3), "b": state["b"]},
        {"a": state["a"] + 1e-6, "b": state["b"]},
        {"a": state["a"]},
    ]
    assert len({hash_state(other) for other in [state, *others]}) == 6
    assert hash_state({"a": torch.ones(2, 3).t()}) == hash_state({"a": torch.ones(3, 2)})
    assert hash_state({"a": torch.ones(2, dtype=torch.bfloat16)}) != hash_state(
        {"a": torch.zeros(2, dtype=torch.bfloat16)}
    )


@pytest.mark.realdata
@torch.no_grad()
def test_real_cifar_weights_classify_real_images(backbone, real_data):
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    report = load_weights(backbone, str(real_data / "weights/cifar10_resnet20-12fca82f.th"), keep_head=True)
    table = pq.read_table(real_data / "cifar10_test1000.parquet")
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in table["image"].to_pylist()])
    mean, std = torch.tensor(report.preprocessing.mean), torch.tensor(report.preprocessing.std)
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    classes = sorted(set(table["label"].to_pylist()))
    labels = torch.tensor([classes.index(label) for label in table["label"].to_pylist()])
    accuracy = (backbone.pretrained_logits(images).argmax(1) == labels).float().mean().item()
    assert 0.90 <= accuracy <= 0.94


@pytest.mark.realdata
def test_real_squeezenet_weights_fit(real_data):
    backbone = build("squeezenet1_0")
    report = load_weights(backbone, str(real_data / "weights/imagenet_squeezenet1_0.safetensors"), keep_head=True)
    assert report.head_loaded
    assert sum(p.numel() for p in backbone.parameters()) == 1_248_424


@pytest.mark.realdata
def test_real_weights_are_refused_where_they_do_not_fit(real_data, tmp_path):
    shutil.copy(real_data / "weights/cifar10_resnet56-4bfd9763.th", tmp_path / "resnet56.th")
    message = refusal(build("cifar_resnet20"), tmp_path / "resnet56.th")
    assert "layer1.3.bn1.bias is [16] there and missing here" in message
