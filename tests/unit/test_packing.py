"""What goes along with a job is small, chosen by git, and the same bytes for the same files."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import graftstack
from graftstack.config.paths import conf_dir, jobs_dir
from graftstack.errors import BadInputError
from graftstack.submit.packing import MOST_BYTES, code_files, job_files, pack, unignored

MIB = 1024**2


def sparse(path: Path, num_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(num_bytes)
    return path


def tree(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-C", root, "-c", "user.name=x", "-c", "user.email=x", *words], check=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tree(tmp_path / "tree", kept="1", gone="2", src__module="3", src__new="4", src__deep__log="5")
    (root / ".gitignore").write_text("*.log\nbuild/\n")
    (root / "src" / ".gitignore").write_text("!wanted.log\n")
    tree(root, build__made="6")
    (root / "src" / "some.log").write_text("7")
    (root / "src" / "wanted.log").write_text("8")
    git(root, "init", "--quiet")
    git(root, "add", "kept", "gone", "src/module")
    git(root, "commit", "--quiet", "-m", "x")
    (root / "gone").unlink()
    return root


def test_what_git_ignores_stays_here(repository: Path) -> None:
    names = {file.relative_to(repository).as_posix() for file in unignored(repository)}
    assert names == {
        *(".gitignore", "kept", "src/.gitignore", "src/module"),
        *("src/new", "src/deep/log", "src/wanted.log"),  # not yet added
    }
    assert {file.name for file in unignored(repository / "src" / "deep")} == {"log"}


def test_names_may_hold_anything(repository: Path) -> None:
    strange = repository / "a\nb 'c' \"d\" é"
    strange.write_text("x")
    assert strange in unignored(repository)


def test_a_folder_that_git_doesnt_know_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(BadInputError, match=r"--with-code: git can't list .*not a git repository.*; install git, or"):
        unignored(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInputError, match=r"--with-code: git can't list .*\(.*No such file.*git.*\); install git"):
        unignored(tmp_path)


def test_the_same_files_are_the_same_bytes(tmp_path: Path) -> None:
    files = {name: tree(tmp_path / where, **{name: name * 1000}) / name for name, where in (("b", "x"), ("a", "y"))}
    package = pack({**files, "c": b"\0\xff"})
    (tmp_path / "x" / "b").touch()
    (tmp_path / "y" / "a").chmod(0o600)
    again = pack({"c": b"\0\xff", **dict(sorted(files.items()))})
    assert again == package
    assert package.names == ["a", "b", "c"]
    assert package.num_bytes == 2002
    assert len(package.content) < 1000
    with zipfile.ZipFile(io.BytesIO(package.content)) as archive:
        assert archive.namelist() == package.names
        assert archive.read("a") == b"a" * 1000
        assert archive.read("c") == b"\0\xff"


def test_too_much_is_refused_and_the_largest_files_named(tmp_path: Path) -> None:
    sizes = {"small": 5, "largest.bin": 60 * MIB, "large.bin": 40 * MIB}
    files = {name: sparse(tmp_path / name, num_bytes) for name, num_bytes in sizes.items()}
    with pytest.raises(BadInputError) as refused:
        pack(files)
    assert str(refused.value) == (
        "100.0 MiB to send, more than 100.0 MiB: the largest files are largest.bin (60.0 MiB), large.bin (40.0 MiB), "
        "small (5 B); add them to .gitignore, or put them where the cluster reads them"
    )
    assert MOST_BYTES == 100 * MIB
    del files["small"]
    assert pack(files).num_bytes == MOST_BYTES


def test_a_file_that_cant_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"/gone: can't be read \(No such file or directory\)"):
        pack({"gone": tmp_path / "gone"})


@pytest.mark.parametrize("job", ["finetune", "meta"])
def test_a_job_alone_is_its_script(job: str) -> None:
    assert job_files(job) == {f"jobs/{job}.py": jobs_dir() / f"{job}.py"}


def test_the_code_that_goes_along_runs_by_itself(tmp_path: Path) -> None:
    """It is laid out as a wheel, so that the working folder of a job is all that Python needs to find it."""
    package = pack({**code_files(), **job_files("finetune")})
    assert package.num_bytes < 5 * MIB
    root = Path(graftstack.__file__).parent
    for folder, there in ((root, "graftstack"), (conf_dir(), "graftstack/_bundled/conf")):
        sources = [
            path for path in folder.rglob("*") if path.suffix in {".py", ".yaml"} and "_bundled" not in path.parts
        ]
        assert {f"{there}/{path.relative_to(folder).as_posix()}" for path in sources} <= set(package.names)
    assert not [name for name in package.names if "__pycache__" in name or name.startswith("tests")]
    with zipfile.ZipFile(io.BytesIO(package.content)) as archive:
        archive.extractall(tmp_path)
    program = "import graftstack, graftstack.config.paths as paths; print(graftstack.__file__, paths.conf_dir())"
    env = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, check=True)
    assert found.stdout.decode().split() == [
        f"{tmp_path}/graftstack/__init__.py",
        f"{tmp_path}/graftstack/_bundled/conf",
    ]
    words = [sys.executable, "jobs/finetune.py", "--help"]
    helped = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, check=True)
    assert b"freeze_depth" in helped.stdout
