"""The tree keeps its shape: `platform/` stays a source root, and every dependency is pinned by name and version."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from graftstack.config.compose import compose_job

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"([a-z0-9][a-z0-9.-]*)==([0-9][A-Za-z0-9.+!]*)")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(PIN.fullmatch(line).groups() for line in lines if PIN.fullmatch(line))  # type: ignore[union-attr, misc]


def requirements() -> list[str]:
    """Returns the normalised names of everything that the package and its extras ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    names = [re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0] for line in asked]
    return [re.sub(r"[-_.]+", "-", name).lower() for name in names if name != project["name"]]


def test_the_source_root_doesnt_shadow_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "platform" / "platform.py").exists()
    program = "import platform; print(platform.system(), platform.__file__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    system, file = done.stdout.split(maxsplit=1)
    assert system == os.uname().sysname
    assert Path(file.strip()).parent == Path(os.__file__).parent


def test_no_module_is_called_utils() -> None:
    modules = [path for top in ("platform", "jobs", "tests") for path in (ROOT / top).rglob("*.py")]
    assert len(modules) > 50
    assert [path for path in modules if path.stem in ("utils", "util", "helpers", "common", "misc")] == []


@pytest.mark.parametrize(
    "folder", ["platform/graftstack", "jobs", "conf", "tests/unit", "tests/contract", "tests/conf"]
)
def test_the_top_level_folders_hold_something(folder: str) -> None:
    assert [path for path in (ROOT / folder).iterdir() if path.name != "__pycache__"] != []


def test_constraints_are_names_and_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
    assert len(lines) > 50
    assert [line for line in lines if not PIN.fullmatch(line)] == []
    assert len(pins()) == len(lines)


def test_every_dependency_is_pinned() -> None:
    asked = requirements()
    assert {"torch", "ray", "scikit-learn", "hydra-core", "pytest"} <= set(asked)
    assert [name for name in asked if name not in pins()] == []


def test_the_kubernetes_job_runs_a_command_that_composes_and_resumes_by_itself() -> None:
    job = yaml.safe_load((ROOT / "k8s/job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    program, name = container["command"]
    config = compose_job(name, container["args"])
    assert program == "graftstack"
    assert config.resume
    assert config.name
    claimed = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(any(path.startswith(mount) for mount in claimed) for path in (config.runs_dir, str(config.data.path)))
