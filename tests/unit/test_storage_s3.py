"""Folders on a server that speaks S3, beside what `test_storage` has of all: claims, requests, faults in one line."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from graftstack.errors import RunError, StorageFullError, StorageUnreachableError
from graftstack.storage import Folder

PART = 50 * 2**20  # what s3fs uploads in parts is cut so; less than two of them go in one piece

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def folder(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """A folder in a bucket, which isn't there yet; whatever happens, no temporary file is left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield Folder(f"{s3.uri}/a/b/")
    assert list(scratch.iterdir()) == []


def uploads(s3: Any) -> list[str]:
    """Returns the names of what is uploaded in parts and not yet whole."""
    return [upload["Key"] for upload in s3.fs.call_s3("list_multipart_uploads", Bucket=s3.bucket).get("Uploads", [])]


def begin_upload(s3: Any, name: str) -> None:
    s3.fs.call_s3("create_multipart_upload", Bucket=s3.bucket, Key=name)


@contextmanager
def held(s3: Any, request: str, work: Callable[..., Any], *args: Any) -> Iterator[Future[Any]]:
    """Does some work, and holds its first such request on its way for as long as the block takes."""
    s3.ask(f"hold 1 {request}")
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(work, *args)
        while not s3.ask("held"):
            time.sleep(0.01)
        yield doing
        s3.ask("release")


# What is there


def test_names_are_of_files_and_folders_here_and_no_deeper(s3: Any, folder: Folder) -> None:
    s3.fs.pipe_file(f"{s3.bucket}/a/b/", b"")  # as the consoles of some vendors make a folder
    (folder / "best").write("x", b"1")
    folder.write("y", b"")
    folder.write(".hidden", b"")
    assert folder.names() == ["best", "y"]
    assert (folder / "best").names() == ["x"]


def test_what_another_writes_or_removes_is_seen_at_once(s3: Any, folder: Folder) -> None:
    folder.write("x", b"1")
    assert folder.names() == ["x"]
    s3.fs.pipe_file(f"{s3.bucket}/a/b/y", b"2")
    s3.fs.rm_file(f"{s3.bucket}/a/b/x")
    assert folder.names() == ["y"]
    assert not folder.exists("x")
    assert folder.exists("y")


def test_a_removed_file_is_gone_and_its_neighbours_are_not(folder: Folder) -> None:
    for name in ("x", "y"):
        folder.write(name, b"")
    (folder / "deep").write("z", b"")
    folder.remove("x")
    assert folder.names() == ["deep", "y"]
    (folder / "deep").remove_all()
    assert folder.names() == ["y"]
    folder.remove_all()
    assert not folder.exists()


def test_a_writer_that_fails_leaves_the_old_content(folder: Folder) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ZeroDivisionError

    def fill(path: Path) -> None:
        path.write_bytes(b"half")
        Path("/dev/full").write_bytes(b"x")

    folder.write("x", b"old")
    with pytest.raises(ZeroDivisionError):
        folder.write_with("x", fail)
    with pytest.raises(StorageFullError, match=r"/x: no space left"):
        folder.write_with("x", fill)
    assert folder.read("x") == b"old"


def test_reading_and_writing_take_one_request_each(s3: Any, folder: Folder) -> None:
    folder.write("x", b"1")
    folder.read("x")
    folder.names()
    folder.remove("x")
    path = f"{s3.bucket}/a/b"
    assert s3.requests() == [
        f"PUT {path}/x",
        f"GET {path}/x",
        f"GET {s3.bucket}?list-type=2&prefix=a%2Fb%2F&delimiter=%2F&encoding-type=url",
        f"DELETE {path}/x",
    ]


# Processes and threads


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_folder_works_in_a_child_of_a_process_that_used_it(folder: Folder, method: str) -> None:
    folder.write("x", b"1")
    child = multiprocessing.get_context(method).Process(target=folder.write, args=("y", b"1"))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert folder.read("y") == b"1"


def test_a_folder_pickles_as_its_location(folder: Folder) -> None:
    folder.write("x", b"1")
    pickled = pickle.dumps(folder)
    assert len(pickled) < 200
    assert pickle.loads(pickled).read("x") == b"1"


def test_threads_share_connections(folder: Folder) -> None:
    from graftstack import file_systems

    folder.write("x", b"")
    num_systems = len(file_systems._systems)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: folder.write(str(number), bytes([number])), range(40)))
        found = list(pool.map(lambda number: folder.read(str(number)), range(40)))
    assert found == [bytes([number]) for number in range(40)]
    assert len(file_systems._systems) == num_systems


# Claims

CLAIM = """
import sys
from graftstack.errors import RunError
from graftstack.storage import Folder
folder = Folder(sys.argv[1])
folder.exists("warm")
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    try:
        folder.claim(f"claimed-{number}", sys.argv[2].encode())
        print(number)
    except RunError as error:
        assert "exists already; choose another name" in str(error), error
"""


def test_of_two_processes_that_claim_a_name_at_once_one_gets_it(folder: Folder) -> None:
    claimers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, folder.location, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for claimer in claimers:
        assert claimer.stdout is not None
        assert claimer.stdout.readline() == "ready\n"
    for claimer in claimers:
        assert claimer.stdin is not None
        claimer.stdin.write("\n")
        claimer.stdin.flush()
    won = [claimer.communicate(timeout=60)[0].split() for claimer in claimers]
    assert sorted(won[0] + won[1], key=int) == [str(number) for number in range(20)]
    for name, numbers in zip((b"one", b"two"), won, strict=True):
        assert all(folder.read(f"claimed-{number}") == name for number in numbers)


def test_a_claim_whose_answer_gets_lost_is_won_all_the_same(s3: Any, folder: Folder) -> None:
    """What the second attempt meets is the first one's file."""
    with held(s3, "PUT .*/x", folder.claim, "x", b"mine") as claiming:
        s3.fs.pipe_file(f"{s3.bucket}/a/b/x", b"mine")
    claiming.result()


def test_a_claim_that_meets_a_file_which_is_removed_at_once_is_lost(s3: Any, folder: Folder) -> None:
    folder.write("x", b"theirs")
    with held(s3, "GET .*/x", folder.claim, "x", b"mine") as claiming:
        s3.fs.rm_file(f"{s3.bucket}/a/b/x")
    with pytest.raises(RunError, match=r"/x: exists already; choose another name"):
        claiming.result()


def answered(code: str) -> Exception:
    """Returns what s3fs makes of an answer with nothing in it but a code."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    return translate_boto_error(ClientError({"Error": {"Code": code, "Message": "no"}}, "PutObject"))


def conditional_puts_fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from s3fs import S3FileSystem

    pipe = S3FileSystem._pipe_file

    async def piped(self: Any, path: str, data: bytes, mode: str = "overwrite", **options: Any) -> Any:
        if mode == "create":
            raise error
        return await pipe(self, path, data, **options)

    monkeypatch.setattr(S3FileSystem, "_pipe_file", piped)


@pytest.mark.parametrize("error", [NotImplementedError("If-None-Match"), answered("NotImplemented"), answered("501")])
def test_a_store_that_puts_on_no_condition_is_asked_first(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    conditional_puts_fail(monkeypatch, error)
    folder.claim("x", b"mine")
    with pytest.raises(RunError, match=r"/x: exists already; choose another name"):
        folder.claim("x", b"yours")
    assert folder.read("x") == b"mine"


@pytest.mark.parametrize("code", ["PreconditionFailed", "412"])
def test_a_store_that_says_less_of_a_condition_is_understood(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    folder.write("x", b"mine")
    conditional_puts_fail(monkeypatch, answered(code))
    with pytest.raises(RunError, match=r"/x: exists already; choose another name"):
        folder.claim("x", b"yours")
    assert folder.read("x") == b"mine"


def test_a_claim_that_fails_for_another_reason_writes_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    conditional_puts_fail(monkeypatch, answered("InternalError"))
    with pytest.raises(StorageUnreachableError, match="can't be reached"):
        folder.claim("x", b"mine")
    assert not folder.exists("x")


# Uploads in parts


def test_a_large_file_goes_in_parts_and_leaves_none_behind(s3: Any, folder: Folder) -> None:
    data = os.urandom(2**20) * 101
    assert len(data) > 2 * PART
    folder.write_with("large", lambda path: path.write_bytes(data))
    assert folder.read("large") == data
    assert any("uploadId" in request for request in s3.requests())
    assert uploads(s3) == []


def test_the_parts_of_a_large_file_go_side_by_side(s3: Any, folder: Folder) -> None:
    s3.ask("hold 1 PUT .*partNumber=1")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(folder.write_with, "large", lambda path: path.write_bytes(bytes(2 * PART + 1)))
        while not s3.ask("held"):
            time.sleep(0.01)
        deadline, others = time.monotonic() + 30, 0
        while others < 2 and time.monotonic() < deadline:
            others += sum("partNumber=1" not in request for request in s3.requests() if "partNumber" in request)
        s3.ask("release")
        writing.result()
    assert others == 2
    assert uploads(s3) == []


def test_sweeping_ends_uploads_that_were_begun_here_and_nowhere_else(s3: Any, folder: Folder) -> None:
    for name in ("a/b/x", "a/b/deep/y", "a/bystander", "c"):
        begin_upload(s3, name)
    folder.sweep(older_than_s=1e9)  # the server says of all that they were begun in 2010
    assert sorted(uploads(s3)) == ["a/b/deep/y", "a/b/x", "a/bystander", "c"]
    folder.sweep()
    assert sorted(uploads(s3)) == ["a/bystander", "c"]


# Faults


def attempts(folder: Folder) -> list[Any]:
    return [
        lambda: folder.read("x"),
        lambda: folder.write("x", b""),
        lambda: folder.write_with("x", lambda path: path.write_bytes(b"")),
        lambda: folder.claim("x", b""),
        folder.names,
        lambda: folder.remove("x"),
        folder.remove_all,
    ]


def assert_refused(uses: list[Any], message: str) -> None:
    for use in uses:
        with pytest.raises(StorageUnreachableError, match=message) as caught:
            use()
        assert len(str(caught.value).splitlines()) == 1


def test_a_bucket_that_isnt_there_is_named(s3: Any) -> None:
    folder = Folder(f"{s3.uri}-none/runs")
    assert_refused(attempts(folder)[:5], rf"\A{folder.location}: there is no such bucket; make it, or choose another")


def test_a_key_that_isnt_known_is_refused(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    folder = Folder(f"{s3.uri}/runs")
    uses = [*attempts(folder), lambda: folder.exists("x")]
    assert_refused(uses, rf"\A{folder.location}: access is refused \(.+\); check the credentials and their rights\Z")


def test_no_key_at_all_is_named(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = Folder(f"{s3.uri}/runs")
    assert_refused(
        attempts(folder)[:5], rf"\A{folder.location}: can't be reached \(Unable to locate credentials\); check"
    )


def test_a_server_that_is_gone_is_tried_again_then_named_and_used_again_when_it_is_back(
    s3: Any, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    folder.write("x", b"1")
    s3.ask("down")
    try:
        assert_refused(
            attempts(folder)[:5], rf"\A{folder.location}: can't be reached \(Could not connect to .+\); check"
        )
    finally:
        s3.ask("up")
    assert folder.read("x") == b"1"


def test_a_server_that_is_busy_for_a_while_is_waited_for(s3: Any, folder: Folder) -> None:
    with held(s3, "PUT .*/x", folder.write, "x", b"1") as writing:
        pass
    writing.result()
    assert folder.read("x") == b"1"
    assert [request.partition("?")[0] for request in s3.requests()].count(f"PUT {s3.bucket}/a/b/x") == 2


def test_a_package_that_isnt_installed_is_named(tmp_path: Path) -> None:
    """In a process of its own, which hasn't loaded it."""
    code = "import sys; sys.modules['s3fs'] = None; from graftstack.cli import main; sys.exit(main())"
    words = ["runs", "--runs-dir", "s3://bucket/runs"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "s3://bucket/runs: can't be reached (" in line
    assert line.endswith("pip install 'graftstack[s3]'")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FSSPEC_S3_ENDPOINT_URL"])
def test_the_environment_says_where_the_server_is(s3: Any, name: str) -> None:
    """In a process of its own: fsspec reads its part of the environment once."""
    environ = {**os.environ, name: s3.url, "FSSPEC_S3_KEY": "graftstack", "FSSPEC_S3_SECRET": "x"}
    if name != "AWS_ENDPOINT_URL":
        del environ["AWS_ENDPOINT_URL"]
    code = f"from graftstack.storage import Folder; Folder('{s3.uri}').write('x', b'1')"
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert s3.fs.cat_file(f"{s3.bucket}/x") == b"1"
