"""Every shipped YAML composes, and so does the command in its first line."""

import shlex
from pathlib import Path

import pytest

from graftstack.config.compose import choices, compose_job
from graftstack.config.jobs import JOBS
from graftstack.config.paths import conf_dir

CONF = conf_dir()
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
CHOICES = [(group, name) for group in GROUPS for name in choices(group)]
FILES = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.y*ml"))

NEEDED = {
    ("data", "image_folder"): ["data.path=flowers"],
    ("data", "torchvision"): ["data.path=datasets", "data.name=CIFAR10"],
    ("data", "csv"): ["data.path=labels.csv", "data.image=file"],
    ("data", "parquet"): ["data.path=cifar.parquet", "data.image=image"],
}


def header_command(file: str) -> list[str]:
    first_line = (CONF / file).read_text().partition("\n")[0]
    assert first_line.startswith("# graftstack "), f"conf/{file}: the first line is no command"
    return shlex.split(first_line.removeprefix("# "), comments=True)


def test_no_file_is_left_out() -> None:
    assert {*(f"{job}.yaml" for job in JOBS), *(f"{group}/{name}.yaml" for group, name in CHOICES)} == set(FILES)
    assert len(FILES) >= 20


@pytest.mark.parametrize("job", JOBS)
def test_every_job_composes(job: str) -> None:
    assert type(compose_job(job, [])) is JOBS[job]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes(group: str, name: str) -> None:
    config = compose_job("finetune", [f"{group}={name}", *NEEDED.get((group, name), [])])
    section = getattr(config, group, None)
    chosen = {"data": "source", "cluster": "kind"}.get(group, "name")
    if section is not None:
        value = getattr(section, chosen)
        assert getattr(value, "value", value) == name


@pytest.mark.parametrize("file", FILES)
def test_the_command_of_each_file_composes_and_uses_it(file: str) -> None:
    program, job, *overrides = header_command(file)
    assert program == "graftstack"
    compose_job(job, overrides)
    path = Path(file)
    used = [job] if path.parent == Path() else overrides
    assert path.with_suffix("").as_posix().replace("/", "=", 1) in used
