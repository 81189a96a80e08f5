"""An executor that brings its own Ray: started once it is worth it, and gone when closed."""

import subprocess
import sys
import textwrap

import pytest

PATIENCE_S = 240

PROGRAM = """
    import os, sys, time
    from graftstack.cluster.executor import RayExecutor, connect
    from graftstack.config.schema import ClusterConfig, ClusterKind
    from graftstack.runtime import Call, CallDone, InlineExecutor

    def one(executor):
        executor.submit(Call("one", os.getpid, ()))
        while not (ends := executor.wait(1.0)):
            pass
        return ends[0].value

    assert isinstance(connect(1), InlineExecutor)
    executor = connect(2)
    assert one(executor) == os.getpid()
    assert "ray" not in sys.modules
    executor.expect(1000.0)
    deadline = time.monotonic() + 200
    while executor.num_slots == 1:
        assert executor.wait(1.0) == [] and time.monotonic() < deadline
    assert one(executor) != os.getpid()

    import ray
    joined = connect(2)
    assert isinstance(joined, RayExecutor)
    assert one(joined) != os.getpid()
    assert isinstance(connect(2, cluster=ClusterConfig(kind=ClusterKind.inline)), InlineExecutor)
    joined.close()
    assert ray.is_initialized()
    executor.close()
    assert not ray.is_initialized()
    print("all is well")
"""


@pytest.mark.ray
def test_an_executor_starts_ray_when_it_is_worth_it_and_ends_it_when_closed() -> None:
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["all is well"]), done.stderr
