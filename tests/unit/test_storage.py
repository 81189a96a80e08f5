"""A file of a folder is whole or not there, on a disk and at a URI; what can't be written is said in one line."""

import errno
import pickle
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from graftstack.errors import RunError, StorageFullError, StorageUnreachableError
from graftstack.storage import Folder


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """A folder of each kind, which isn't there yet; temporary files of uploads go to an own place."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    if request.param == "local":
        yield Folder(tmp_path / "a" / "b")
    else:
        root = f"memory://{tmp_path.name}" if request.param == "memory" else request.getfixturevalue("s3").uri
        yield Folder(f"{root}/a/b/")
    assert list(scratch.iterdir()) == []


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Lets no file grow beyond `num_bytes`: the kernel refuses the write half-way, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files_below(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_what_is_written_is_read_back(folder: Folder) -> None:
    folder.write("x.json", b"one")
    folder.write("x.json", b"two")
    folder.write("y", b"")
    folder.write_with("z", lambda path: path.write_bytes(b"three"))
    assert [folder.read(name) for name in ("x.json", "y", "z")] == [b"two", b"", b"three"]
    assert folder.names() == ["x.json", "y", "z"]
    assert folder.exists()
    assert folder.exists("x.json")


def test_what_isnt_there_has_no_names_and_no_content(folder: Folder) -> None:
    assert folder.names() == []
    assert not folder.exists()
    assert not folder.exists("x")
    folder.remove("x")
    folder.remove_all()
    with pytest.raises(FileNotFoundError):
        folder.read("x")


def test_a_removed_file_is_gone_and_may_be_removed_again(folder: Folder) -> None:
    folder.write("x", b"1")
    folder.write("y", b"2")
    folder.remove("x")
    folder.remove("x")
    assert folder.names() == ["y"]


def test_a_folder_inside_a_folder_is_one_of_its_names(folder: Folder) -> None:
    (folder / "best").write("x", b"1")
    assert folder.names() == ["best"]
    assert (folder / "best").read("x") == b"1"
    assert (folder / "best").name == "best"


def test_a_writer_that_fails_half_way_leaves_the_old_content_and_nothing_else(folder: Folder) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ZeroDivisionError

    folder.write("x", b"old")
    with pytest.raises(ZeroDivisionError):
        folder.write_with("x", fail)
    with pytest.raises(ZeroDivisionError):
        folder.write_with("new", fail)
    assert folder.read("x") == b"old"
    assert folder.names() == ["x"]
    if folder.is_local:
        assert files_below(Path(folder.location)) == ["x"]


def test_a_full_disk_leaves_the_old_content_and_nothing_else(folder: Folder) -> None:
    folder.write("x", b"old")
    with largest_file(1000), pytest.raises(StorageFullError, match=r"/x: no space left; free some.*resume=true"):
        folder.write_with("x", lambda path: path.write_bytes(bytes(5000)))
    assert folder.read("x") == b"old"
    assert folder.names() == ["x"]
    if folder.is_local:
        assert files_below(Path(folder.location)) == ["x"]
    folder.write("x", bytes(5000))
    assert folder.read("x") == bytes(5000)


def test_a_device_without_space_is_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(StorageFullError, match="no space left") as caught:
        Folder(tmp_path).write_with("x", lambda _: Path("/dev/full").write_bytes(b"x"))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_bytes(b"")
    blocked = Folder(tmp_path / "runs" / "x")
    with pytest.raises(RunError, match=r"runs/x: can't be written .*; choose another runs_dir"):
        blocked.make()
    with pytest.raises(RunError, match=r"runs/x: can't be written"):
        blocked.write("run.json", b"")
    with pytest.raises(RunError, match=r"runs: exists already"):
        Folder(tmp_path / "runs").make()
    assert files_below(tmp_path) == ["runs"]


@pytest.mark.parametrize("location", ["/proc/runs", "/dev/null/runs", "/tmp/" + "x" * 300])
def test_a_place_that_takes_no_folder_is_named(location: str) -> None:
    with pytest.raises(RunError, match=r": can't be written \(.+\); choose another runs_dir"):
        Folder(location).write("x", b"")


def test_a_tilde_of_nobody_is_refused() -> None:
    with pytest.raises(RunError, match=r"\A~nobody-here/x: no user of that name has a home here; give the whole path"):
        Folder("~nobody-here/x")


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    folder = Folder(f"file://{tmp_path}/a")
    assert (folder.location, folder.is_local) == (f"{tmp_path}/a", True)
    folder.write("x", b"1")
    assert (tmp_path / "a/x").read_bytes() == b"1"


def test_an_obstacle_is_the_nearest_thing_that_forbids_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert Folder(tmp_path / "a/b").obstacle() is None
    assert Folder(tmp_path / "file/b/c").obstacle() == tmp_path / "file"
    assert Folder("memory://x").obstacle() is None


class Unreachable(fsspec.AbstractFileSystem):
    """A file system that fails in its own way."""

    protocol = "unreachable"

    def exists(self, path: str, **_: object) -> bool:
        raise ArithmeticError("no route\nsecond line")

    def ls(self, path: str, **_: object) -> list[object]:
        raise ArithmeticError("no route\nsecond line")


def test_a_file_system_that_cant_be_asked_is_named() -> None:
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    for use in (Folder("unreachable://x").exists, Folder("unreachable://x").names):
        with pytest.raises(
            StorageUnreachableError, match=r"\Aunreachable://x: can't be reached \(no route\); check the address"
        ):
            use()


@pytest.mark.parametrize("location", ["nosuch://bucket/runs", "memory2://x"])
def test_a_uri_of_an_unknown_kind_is_refused_in_one_line(location: str) -> None:
    for use in (Folder(location).names, Folder(location).exists, lambda: Folder(location).write("x", b"")):
        with pytest.raises(StorageUnreachableError, match=rf"\A{location}: can't be reached .*; ") as caught:
            use()
        assert len(str(caught.value).splitlines()) == 1


def test_names_leave_out_what_is_half_written(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def write(path: Path) -> None:
        path.write_bytes(b"half")
        seen.append(folder.names())
        assert len(files_below(tmp_path)) == 2

    folder = Folder(tmp_path)
    folder.write("x", b"1")
    folder.write_with("y", write)
    assert seen == [["x"]]
    assert folder.names() == ["x", "y"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    contents = [bytes([value]) * 200_000 for value in range(30)]
    folder.write("x", contents[0])
    seen: list[bytes] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            seen.append(folder.read("x"))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        folder.write("x", content)
    is_over.set()
    reader.join()
    assert len(set(seen)) > 1
    assert set(seen) <= set(contents)


def test_a_folder_pickles_as_its_location(folder: Folder) -> None:
    folder.write("x", b"1")
    pickled = pickle.dumps(folder)
    assert len(pickled) < 500
    assert pickle.loads(pickled).read("x") == b"1"


def test_a_relative_folder_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Folder("runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    folder.write("x", b"1")
    assert (tmp_path / "runs" / "x").read_bytes() == b"1"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("~/runs").location == f"{tmp_path}/runs"
