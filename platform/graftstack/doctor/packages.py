"""What is installed, read from package metadata: nothing is imported, so that nothing broken can hide the rest."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, distributions
from importlib.util import cache_from_source
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from graftstack.doctor.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

MIN_PYTHON = (3, 11)


def check_python(version: tuple[int, int, int]) -> Finding:
    """The interpreter is new enough."""
    text = ".".join(map(str, version))
    if version[:2] >= MIN_PYTHON:
        return Finding("Python", "ok", text)
    wanted = ".".join(map(str, MIN_PYTHON))
    return Finding(
        "Python", "broken", f"{text} is older than {wanted}", f"uv venv --python {wanted} .venv, then install again"
    )


def check_packages(path: Sequence[str]) -> Finding:
    """Everything that graftstack requires is on `path`, in a version that it takes, extras included."""
    own = find_package("graftstack", path)
    if own is None:
        return Finding(
            "packages",
            "warn",
            "graftstack isn't installed: what it requires is unknown",
            "make setup, or uv pip install .",
        )
    required = list(_requirements(own, extra=""))
    lacks = {str(requirement): reasons for requirement in required if (reasons := _lacks(requirement, path))}
    if lacks:
        quoted = " ".join(f"'{requirement}'" for requirement in lacks)
        return Finding("packages", "broken", "; ".join(chain(*lacks.values())), f"uv pip install {quoted}")
    versions = [f"{requirement.name} {_version(requirement.name, path)}" for requirement in required]
    return Finding("packages", "ok", ", ".join(versions))


def check_torch_builds(path: Sequence[str], load_error: str | None) -> Finding:
    """Torch and torchvision are built for each other; `load_error` is what importing both raised, if anything.

    The metadata of the two wheels name no build, so it is read from the ``version.py`` that each was built with.
    """
    name = "torch builds"
    torch, torchvision = find_package("torch", path), find_package("torchvision", path)
    if torch is None or torchvision is None:
        missing = [package for package, found in (("torch", torch), ("torchvision", torchvision)) if found is None]
        return Finding(name, "broken", f"{' and '.join(missing)} missing", "uv pip install torch torchvision")
    fix = "install both from the same index: uv pip install --reinstall torch torchvision"
    described = f"torch {built_version(torch)}, torchvision {built_version(torchvision)}"
    if load_error:
        return Finding(name, "broken", f"{described} can't be loaded: {load_error}", fix)
    for requirement in _requirements(torchvision, extra=""):
        if requirement.name == "torch" and not requirement.specifier.contains(torch.version, prereleases=True):
            return Finding(name, "broken", f"{described}: torchvision needs torch{requirement.specifier}", fix)
    builds = {_build(torch), _build(torchvision)} - {""}
    if len(builds) > 1:
        return Finding(name, "warn", f"{described}: two builds, {' and '.join(sorted(builds))}", fix)
    return Finding(name, "ok", described)


def check_bytecode(package_file: Path | None, environ: Mapping[str, str]) -> Finding:
    """The bytecode of torch lies on the disk; `package_file` is the ``__init__.py`` of torch."""
    if package_file is None:
        return Finding("bytecode", "warn", "torch isn't installed", "uv pip install torch torchvision")
    if Path(cache_from_source(str(package_file))).is_file():
        return Finding("bytecode", "ok", "torch is compiled")
    detail = "torch isn't compiled: every start of a worker costs seconds more"
    if environ.get("PYTHONDONTWRITEBYTECODE"):
        detail += ", and PYTHONDONTWRITEBYTECODE keeps Python from storing what it compiles"
    return Finding(
        "bytecode",
        "warn",
        detail,
        "reinstall with uv pip install --reinstall --compile-bytecode, or python -m compileall -q "
        f"{package_file.parent.parent}",
    )


def find_package(name: str, path: Sequence[str]) -> Distribution | None:
    """Returns the distribution that importing from `path` finds first."""
    return next(iter(distributions(name=name, path=list(path))), None)


def _lacks(requirement: "Requirement", path: Sequence[str]) -> list[str]:
    """Returns why `requirement` doesn't hold on `path`; nothing where it does."""
    found = find_package(requirement.name, path)
    if found is None:
        return [f"{requirement} is missing"]
    if not requirement.specifier.contains(found.version, prereleases=True):
        return [f"{found.name} {found.version} isn't {requirement.specifier}"]
    return [
        f"{needed.name} is missing, which {found.name}[{extra}] needs"
        for extra in sorted(requirement.extras)
        for needed in _requirements(found, extra=extra)
        if find_package(needed.name, path) is None
    ]


def _requirements(package: Distribution, *, extra: str) -> Iterator["Requirement"]:
    """Yields what `package` requires on this machine with one of its extras; "" is none."""
    from packaging.requirements import Requirement

    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def _version(name: str, path: Sequence[str]) -> str:
    found = find_package(name, path)
    return found.version if found else "missing"


def built_version(package: Distribution) -> str:
    """Returns the version with the build that it was made as, such as ``2.15.0+cu132``."""
    file = Path(str(package.locate_file(f"{package.name}/version.py")))
    found = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", file.read_text(), re.MULTILINE) if file.is_file() else None
    return found.group(1) if found else package.version


def _build(package: Distribution) -> str:
    return built_version(package).partition("+")[2]
