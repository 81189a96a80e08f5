"""The wheel alone, installed into a new environment, is the whole program."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Installed:
    """A virtual environment that holds nothing but the wheel and what it requires."""

    def __init__(self, folder: Path, cwd: Path) -> None:
        self.bin = folder / "bin"
        self.cwd = cwd
        # No variable of this test's own environment may lead back to the checkout.
        self.env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.env["OMP_NUM_THREADS"] = "1"  # threads of tests side by side would wait for each other

    def run(self, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        program, *arguments = map(str, words)
        return subprocess.run(
            [str(self.bin / program), *arguments],
            cwd=self.cwd,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def evaluate(self, expression: str) -> Path:
        """Returns the path that a Python expression gives in this environment."""
        answer = self.run(
            "python", "-c", f"import graftstack; from graftstack.config import paths; print({expression})"
        )
        assert answer.returncode == 0, answer.stderr
        return Path(answer.stdout.strip())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    _succeed(sys.executable, "-m", "build", "--wheel", "--installer", "uv", "--outdir", out, REPOSITORY)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("environment") / "venv"
    uv = Path(sys.executable).with_name("uv")
    python = folder / "bin" / "python"
    _succeed(uv, "venv", "--quiet", "--python", sys.executable, folder)
    _succeed(
        *(uv, "pip", "install", "--quiet", "--python", python, "--compile-bytecode"),
        *("--constraint", REPOSITORY / "constraints.txt", wheel),
    )
    return Installed(folder, tmp_path_factory.mktemp("elsewhere"))


def _succeed(*words: str | Path) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_carries_configuration_and_jobs_but_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("conf", "jobs"):
        sources = [path for path in (REPOSITORY / folder).rglob("*") if path.suffix in {".yaml", ".py"}]
        assert sources
        missing = {f"graftstack/_bundled/{path.relative_to(REPOSITORY)}" for path in sources} - set(names)
        assert not missing
    modules = [path.relative_to(REPOSITORY / "platform") for path in (REPOSITORY / "platform").rglob("*.py")]
    assert {str(path) for path in modules} <= set(names)
    strange = [name for name in names if not name.startswith(("graftstack/", "graftstack-"))]
    assert not strange, "it would be installed beside the package"
    assert not [name for name in names if "test" in name or "__pycache__" in name]


def test_what_runs_is_what_was_installed(installed: Installed) -> None:
    site_packages = installed.evaluate("graftstack.__file__").parents[1]
    assert site_packages.name == "site-packages"
    assert site_packages.is_relative_to(installed.bin.parent)
    assert installed.evaluate("paths.conf_dir()") == site_packages / "graftstack" / "_bundled" / "conf"
    assert installed.evaluate("paths.jobs_dir()") == site_packages / "graftstack" / "_bundled" / "jobs"


def test_the_command_explains_itself_and_refuses_bad_input_in_one_line(installed: Installed) -> None:
    helped = installed.run("graftstack", "--help")
    assert helped.returncode == 0
    assert "fine-tune a pretrained backbone" in helped.stdout
    refused = installed.run("graftstack", "finetune", "backbone=nope")
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert line.startswith("graftstack: backbone=nope: ")
    assert not list(installed.cwd.iterdir()), "it wrote something"


def test_a_job_script_of_the_package_runs_as_it_is(installed: Installed) -> None:
    script = installed.evaluate("paths.jobs_dir() / 'finetune.py'")
    helped = installed.run("python", script, "--help")
    assert helped.returncode == 0, helped.stderr
    assert "freeze_depth" in helped.stdout


def test_the_demo_runs_to_its_table(installed: Installed, tmp_path: Path) -> None:
    shown = installed.run("graftstack", "demo", "--runs-dir", tmp_path / "runs")
    assert shown.returncode == 0, shown.stderr
    for title in ("accuracy", "from scratch", "only the head", "the head first, then all"):
        assert title in shown.stdout
    assert len(list((tmp_path / "runs").glob("*/model/model.safetensors"))) == 6
