"""A crew on two nodes, of which one goes and another comes: no block is lost, and who comes works too."""

import subprocess
import sys
import textwrap

import pytest
from tests.cluster.heads import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

PROGRAM = """
    import logging, os, tempfile, time
    from collections import Counter
    from functools import partial
    from pathlib import Path

    import numpy as np
    import ray
    from ray.cluster_utils import Cluster
    from ray.util import placement_group_table

    from graftstack.cluster.crew import RayCrew

    NUM_IMAGES, PATIENCE_S = 20_000_000, 120

    class Looking:
        # A runner that says where it is, and where its images lie.

        def __init__(self, images):
            self.images = images

        def look(self, seconds):
            time.sleep(seconds)
            address = self.images.__array_interface__["data"][0]
            for line in Path("/proc/self/maps").read_text().splitlines():
                bounds, _, offset, device, inode, *_ = line.split()
                begin, end = (int(bound, 16) for bound in bounds.split("-"))
                if begin <= address < end:
                    place = device, inode, address - begin + int(offset, 16)
            assert not self.images.flags.writeable and self.images.sum() == NUM_IMAGES
            return ray.get_runtime_context().get_node_id(), os.getpid(), place

    def workers_per_node(crew, num):
        deadline = time.monotonic() + PATIENCE_S
        while len(pids := {pid: node for node, pid, _ in crew.call("look", [[0.1]] * 6)}) < num:
            assert time.monotonic() < deadline, pids
        return Counter(pids.values())

    def num_actors():
        from ray.util.state import list_actors

        return len(list_actors(filters=[("state", "!=", "DEAD")]))

    def wait_until(condition):
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def run(cluster, second, folder):
        images = np.ones(NUM_IMAGES, np.uint8)
        crew = RayCrew(partial(Looking, images), num_workers=3, num_cpus=1, num_threads=None, max_losses=2)
        assert sorted(workers_per_node(crew, 3).values()) == [1, 2]
        places = {(node, place) for node, _, place in crew.call("look", [[0.1]] * 6)}
        assert len(places) == 2, "the images lie once on each node"

        lost_at = []
        def lose(num_done):
            if num_done and not lost_at:
                lost_at.append(time.monotonic())
                cluster.remove_node(second, allow_graceful=False)
            # The survivor goes on at once, and replacements wait for room without anybody waiting for them.
            assert crew.waiting_for is None

        results = crew.call("look", [[0.5]] * 8, poll=lose)
        assert len(results) == 8
        assert time.monotonic() - lost_at[0] < 8 * 0.5 + 5, "it took too long to see that a node is gone"
        assert crew.num_workers == 3
        assert sum(workers_per_node(crew, 1).values()) == 1

        third = cluster.add_node(num_cpus=2, temp_dir=f"{folder}/third")
        assert sorted(workers_per_node(crew, 3).values()) == [1, 2]
        # A node is one loss, however many workers it had: once Ray knows that it is the node.
        wait_until(lambda: crew.num_losses == 1)

        # One that goes between two steps is no fault of the blocks of the next.
        cluster.remove_node(third, allow_graceful=False)
        assert len(crew.call("look", [[0.01]] * 4)) == 4
        crew.close()
        wait_until(lambda: num_actors() == 0)
        assert all(group["state"] == "REMOVED" for group in placement_group_table().values())

    # Sockets lie in this folder, and the name of a socket is short.
    with tempfile.TemporaryDirectory(prefix="crew-nodes-", ignore_cleanup_errors=True) as folder:
        head = {"num_cpus": 1, "temp_dir": f"{folder}/head", "include_dashboard": True, "dashboard_port": FREE_PORT}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            second = cluster.add_node(num_cpus=2, temp_dir=f"{folder}/second")
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            run(cluster, second, folder)
        finally:
            ray.shutdown()
            cluster.shutdown()
    print("all is well")
"""


def test_a_crew_outlives_a_node_and_uses_one_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    program = textwrap.dedent(PROGRAM).replace("FREE_PORT", str(free_port()))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["all is well"]), done.stderr
