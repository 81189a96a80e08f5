"""Memory that a process frees stays with it once it has a backbone: the next step takes it without the system."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from graftstack.backbones.registry import build

if sys.argv[1] == "backbone":
    build("conv4")

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def fill():
    torch.ones(64 * 2**20 // 4)  # and free it

for _ in range(4):  # aligned, it may lie in one of two places
    fill()
before = faults()
fill()
print(faults() - before)
"""


def faults(with_what: str) -> int:
    """Pages that a tensor of 64 MiB takes from the system after several of them."""
    words = [sys.executable, "-c", PROGRAM, with_what]
    return int(subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_process_with_a_backbone_keeps_what_it_frees() -> None:
    assert 2 * faults("backbone") < faults("nothing")
