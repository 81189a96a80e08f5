"""Connecting to Ray: an embedded one on this machine, or a cluster that is there already."""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from graftstack.cluster.listening import check_listens
from graftstack.cluster.lost_head import minding_head
from graftstack.config.schema import ClusterConfig, ClusterKind
from graftstack.errors import ConfigError
from graftstack.machine import usable_cpus
from graftstack.reason import reason

# How long a cluster may take to accept a connection.
_PROBE_TIMEOUT_S = 5.0

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
        TrainingError: the cluster lost its head amid the block; not where a connection was joined.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray
    from ray.exceptions import RayError

    is_embedded = cluster.kind is ClusterKind.local
    if not is_embedded:
        _check_address(cluster.address)
    if ray.is_initialized():
        yield
        return
    if not verbose:
        quiet_ray()
    try:
        with _own_signal_handlers():
            # Ray Train's cleaner asks the dashboard for the cluster's state, and floods the log where there is none.
            ray.init(
                address="local" if is_embedded else cluster.address,
                num_cpus=cluster.cpus_of(usable_cpus()) if is_embedded else None,
                namespace=None if is_embedded else cluster.namespace,
                include_dashboard=True if is_embedded else None,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
                configure_logging=verbose,
            )
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        if is_embedded:
            raise ConfigError(
                f"cluster=local: Ray can't start on this machine ({reason(error)}); run graftstack doctor, or use "
                "cluster=inline"
            ) from error
        raise _no_cluster(cluster.address, reason(error)) from error
    with nullcontext() if is_embedded else minding_head(cluster, ray.get_runtime_context().gcs_address):
        try:
            yield
        finally:
            ray.shutdown()


def is_connected() -> bool:
    """Returns whether this process is connected to Ray; loads nothing for that."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keeps Ray from ending the process on SIGTERM, which is to leave the run resumable and say how."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:  # Ray's answer to a SIGTERM that comes before the handlers are ours again
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_address(address: str) -> None:
    """Raises `ConfigError` at once where nobody listens; Ray would try for minutes."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"cluster.address={address}: Ray's client knows too little of a cluster for this; submit the job to it "
            "(graftstack submit --to http://HOST:8265), or give HOST:6379 on one of its nodes"
        )
    if not re.search(r":\d+$", address):
        return
    try:
        check_listens(address, within_s=_PROBE_TIMEOUT_S)
    except OSError as error:
        raise _no_cluster(address, reason(error)) from error


def _no_cluster(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"cluster.address={address}: no Ray cluster answers there ({why}); start one with `ray start --head`, or use "
        "cluster=local"
    )


def quiet_ray() -> None:
    """Leaves only errors of Ray's own loggers."""
    for name in ("ray", "ray.train", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
