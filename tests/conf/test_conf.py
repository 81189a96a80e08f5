"""Every shipped YAML composes, by the very command that it begins with."""

import shlex

import pytest

from graftstack.config.compose import choices
from graftstack.config.jobs import JOBS
from graftstack.config.k8s import k8s_config
from graftstack.config.paths import conf_dir
from graftstack.config.plain import to_plain
from graftstack.report.composing import composed

CONF = conf_dir()
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
CHOICES = [(group, name) for group in GROUPS for name in choices(group)]
FILES = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.y*ml"))


def header_command(file: str) -> list[str]:
    # Hydra wants its own header, where there is one, in the first line.
    lines = (line for line in (CONF / file).read_text().splitlines() if line != "# @package _global_")
    first_line = next(lines)
    assert first_line.startswith("# graftstack "), f"conf/{file}: it doesn't begin with a command"
    return shlex.split(first_line.removeprefix("# "), comments=True)


def test_no_file_is_left_out() -> None:
    assert {*(f"{job}.yaml" for job in JOBS), *(f"{group}/{name}.yaml" for group, name in CHOICES)} == set(FILES)
    assert len(FILES) > 20


@pytest.mark.parametrize("file", FILES)
def test_each_file_composes_by_the_command_that_it_begins_with(file: str) -> None:
    program, job, *overrides = header_command(file)
    found = composed(job, overrides)
    config = found.config
    k8s_config(found.k8s_words) if found.is_for_kubernetes else found.refuse_k8s_words()
    assert program == "graftstack"
    assert type(config) is JOBS[job]
    group, _, name = file.removesuffix(".yaml").rpartition("/")
    if not group:
        assert job == name
        return
    assert f"{group}={name}" in overrides
    if group != "experiment":
        section = to_plain(getattr(config, group))
        assert section[{"data": "source", "cluster": "kind"}.get(group, "name")] == name
