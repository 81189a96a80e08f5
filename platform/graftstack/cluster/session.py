"""Connecting to Ray: an embedded one on this machine, or a cluster that is there already."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from graftstack.config.schema import ClusterConfig, ClusterKind
from graftstack.errors import ConfigError

# Paths of a configuration are made absolute before they travel, so workers need no folder of their own; and Ray's
# own progress tables, usage messages and warnings about its future are not the user's business.
_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def ray_session(cluster: ClusterConfig, *, verbose: bool) -> Iterator[None]:
    """Connects to Ray for the duration of the block; joins a connection that is there already and leaves it open.

    Raises:
        ConfigError: no cluster answers at `cluster.address`.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        yield
        return
    if not verbose:
        quiet_ray()
    is_embedded = cluster.kind is ClusterKind.local
    try:
        # Ray Train's cleaner asks the dashboard for the cluster's state, and floods the log where there is none.
        ray.init(
            address="local" if is_embedded else cluster.address,
            include_dashboard=True if is_embedded else None,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            configure_logging=verbose,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"cluster.address={cluster.address}: no Ray cluster answers there ({reason}); start one with "
            "`ray start --head`, or use cluster=local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def quiet_ray() -> None:
    """Leaves only errors of Ray's own loggers."""
    for name in ("ray", "ray.train", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
