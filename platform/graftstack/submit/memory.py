"""The memory of pods: what their processes need, and what Ray needs beside them."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from graftstack.config.k8s import K8sConfig
from graftstack.config.kubernetes_syntax import times
from graftstack.config.spec import Spec
from graftstack.errors import BadInputError, ConfigError

if TYPE_CHECKING:
    from graftstack.finetune.memory import JobMemory

_MIB, _GIB = 2**20, 2**30

# Ray's own processes, shares of common pages included (PSS, Ray 2.60, Linux, x86): 250 MiB on a node, 44 MiB for each
# of the processes that it keeps ready, one a CPU, and 680 MiB on the head, which grows with what it is told of a job.
# The controller of a group of Ray Train, which lies beside the driver, takes 850 MiB more.
_NODE_BYTES, _NODE_BYTES_A_CPU, _HEAD_BYTES = 384 * _MIB, 64 * _MIB, 2304 * _MIB

# Ray's object store takes 30 % of the memory of its pod, once it is full.
_STORE_SHARE = 1 / 3

# For what other versions of libraries take; the rounding to whole GiB comes on top.
_SLACK = 1.2


class PodMemory(NamedTuple):
    """Requested as it is limited."""

    worker: str
    """Of a pod with all its workers, as Kubernetes writes it: 12Gi."""
    head: str


def pod_memory(spec: Spec, config: K8sConfig) -> PodMemory:
    """Returns the memory of the pods of a job: as `config` has it, else whole GiB from what `plan` says of a worker.

    The data may lie where this machine doesn't reach: `graftstack plan` there says more exactly what their classes and
    images need. The same configuration gets the same memory.

    Raises:
        BadInputError: the job's model can't be made here; one line.
    """
    num = config.workers_per_pod
    worker = None if config.worker_memory is None else times(config.worker_memory, num)
    head = config.head_memory
    if worker is not None and head is not None:
        return PodMemory(worker, head)
    try:
        needed = _NEEDED[spec.job](spec.config)
    except BadInputError as error:
        raise ConfigError(f"{error}; or give k8s.worker_memory=16Gi and k8s.head_memory=8Gi") from error
    cpus = num * (spec.config.cluster.cpus_per_worker or config.worker_cpus)
    of_node = _NODE_BYTES + cpus * _NODE_BYTES_A_CPU
    return PodMemory(
        worker or _amount(of_node + num * needed.worker_bytes), head or _amount(_HEAD_BYTES + needed.driver_bytes)
    )


def _amount(num_bytes: int) -> str:
    return f"{math.ceil(_SLACK * num_bytes / (1 - _STORE_SHARE) / _GIB)}Gi"


def _of_training(config: Any) -> "JobMemory":
    from graftstack.finetune.memory import training_memory

    return training_memory(config)


def _of_sweep(config: Any) -> "JobMemory":
    from graftstack.sweep.memory import sweep_memory

    return sweep_memory(config)


def _of_stack(config: Any) -> "JobMemory":
    from graftstack.stacking.memory import stack_memory

    return stack_memory(config)


def _of_meta(config: Any) -> "JobMemory":
    from graftstack.meta.memory import meta_memory

    return meta_memory(config)


def _of_pipeline(config: Any) -> "JobMemory":
    """One after the other, but processes that have trained keep what they hold: the larger one, of each."""
    sweep, stack = _of_sweep(config), _of_stack(config)
    return sweep._replace(
        worker_bytes=max(sweep.worker_bytes, stack.worker_bytes),
        driver_bytes=max(sweep.driver_bytes, stack.driver_bytes),
    )


_NEEDED: dict[str, Callable[[Any], "JobMemory"]] = {
    "finetune": _of_training,
    "pretrain": _of_training,
    "sweep": _of_sweep,
    "stack": _of_stack,
    "meta": _of_meta,
    "pipeline": _of_pipeline,
}
