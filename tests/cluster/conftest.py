"""One embedded Ray, shared by all tests that need it: starting one costs seconds."""

from collections.abc import Iterator

import pytest

from graftstack.cluster.session import ray_session
from graftstack.config.schema import ClusterConfig


@pytest.fixture(scope="session")
def embedded_ray() -> Iterator[None]:
    """A running Ray on this machine, which jobs of the test process join."""
    with ray_session(ClusterConfig(), verbose=False):
        yield
