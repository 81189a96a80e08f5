"""The nodes of a Ray cluster: what is wrong with one of them, and with all of them together."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from graftstack.config.kubernetes_syntax import version
from graftstack.doctor.finding import Finding, gib
from graftstack.doctor.machine import room
from graftstack.errors import some_of
from graftstack.storage import is_uri


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a node said of itself (`graftstack.cluster.node_probe`)."""

    node_id: str
    ip: str
    is_head: bool
    ray_cpus: float
    """The CPUs that Ray counts there."""
    ray_gpus: float
    error: str | None = None
    """Why it said nothing else; None where it did."""
    python: str = ""
    graftstack: str | None = None
    """Its version there; None where there is none."""
    torch: str | None = None
    """With its build, such as ``2.15.0+cu132``."""
    cuda_build: str | None = None
    """The CUDA that torch is built for; None for a CPU build."""
    cuda_driver: str | None = None
    """The newest CUDA that the driver can run; None without a driver."""
    cpus: int = 0
    """The CPUs that a process may use there."""
    omp_threads: int | None = None
    """OMP_NUM_THREADS of its workers."""
    is_compiled: bool | None = None
    """Whether the bytecode of torch lies on its disk."""
    ray_free_bytes: int | None = None
    """On the disk of Ray's own files."""
    free_bytes: int | None = None
    """On the disk of the runs; None for an object store."""
    storage_error: str | None = None
    """Why it can't write where the runs lie; None where it can."""
    unseen: Sequence[str] = ()
    """The ids of the nodes whose files it doesn't see there."""


def check_nodes(nodes: Sequence[NodeFacts]) -> Finding:
    """Each node starts a worker."""
    silent = {_names(nodes)[node.node_id]: node.error for node in nodes if node.error is not None}
    if silent:
        why = "; ".join(f"{name}: {error}" for name, error in silent.items())
        fix = "see raylet.out and runtime_env_agent.log in Ray's log folder there, or take the node out: ray stop"
        return Finding("nodes", "broken", f"{len(silent)} of {len(nodes)} can't run a task: {why}", fix)
    cpus, gpus = sum(node.ray_cpus for node in nodes), sum(node.ray_gpus for node in nodes)
    return Finding("nodes", "ok", f"{len(nodes)}, with {cpus:g} CPUs and {gpus:g} GPUs")


def check_writing(place: str, nodes: Sequence[NodeFacts]) -> Finding:
    """Each node can write where runs lie."""
    refused = {node.node_id: node.storage_error for node in nodes if node.storage_error is not None}
    if not refused:
        return Finding("storage", "ok", f"{place}: each node can write there")
    names = _names(nodes)
    whys = "; ".join(
        f"{some_of([names[one] for one, other in refused.items() if other == why])}: {why}"
        for why in dict.fromkeys(refused.values())
    )
    fix = "give the workers' user the right to write there, or choose what all can: --runs-dir s3://BUCKET/runs"
    if is_uri(place):
        fix = (
            "let the nodes reach it (AWS_ENDPOINT_URL), make the bucket, and give ray start the package and the "
            "credentials there: graftstack[s3], AWS_…"
        )
    return Finding("storage", "broken", f"{place}: can't be written on {whys}", fix)


def check_sharing(place: str, nodes: Sequence[NodeFacts]) -> Finding:
    """What one node writes where runs lie, all others see."""
    writing = [node for node in nodes if node.error is None and node.storage_error is None]
    if len(writing) < 2:
        return Finding("shared storage", "ok", f"{place}: {'one node writes' if writing else 'nobody can write'} there")
    names = _names(nodes)
    apart = [
        f"{names[node.node_id]} doesn't see what {some_of([names[other] for other in node.unseen])} wrote"
        for node in writing
        if node.unseen
    ]
    if not apart:
        return Finding("shared storage", "ok", f"{place}: {len(writing)} nodes see each other's files")
    fix = "mount one file system there on all nodes (NFS, EFS, CephFS), or use --runs-dir s3://BUCKET/runs"
    return Finding("shared storage", "broken", f"{place}: each has its own: {some_of(apart)}", fix)


def check_disks(place: str, nodes: Sequence[NodeFacts]) -> Finding:
    """The disks of runs and of Ray's own files have room."""
    found = [
        (free, f"{what} of {name}: {gib(free)}")
        for node, name in _named(nodes)
        for what, free in ((place, node.free_bytes), ("Ray's folder", node.ray_free_bytes))
        if free is not None
    ]
    low = [(free, text) for free, text in found if room(free) != "ok"]
    if not found or not low:
        least = f"{gib(min(free for free, _ in found))} or more free on each" if found else "not known"
        return Finding("disks", "ok", least)
    status = room(min(free for free, _ in low))
    fix = "free some space there, or start the node with another ray start --temp-dir"
    shown = some_of([text for _, text in sorted(low)])
    return Finding("disks", status, f"little is free: {shown}", fix)


def check_threads(nodes: Sequence[NodeFacts]) -> Finding:
    """No worker computes with more threads than its node has CPUs, and Ray counts on no more CPUs than there are."""
    threads = [
        f"{name} has OMP_NUM_THREADS={node.omp_threads} for {node.cpus} CPUs"
        for node, name in _named(nodes)
        if node.omp_threads is not None and node.omp_threads > node.cpus
    ]
    counted = [
        f"Ray counts {node.ray_cpus:g} CPUs on {name}, which has {node.cpus}"
        for node, name in _named(nodes)
        if node.ray_cpus > node.cpus
    ]
    if not threads and not counted:
        return Finding("threads", "ok", "no more than CPUs on each node")
    fixes = ["OMP_NUM_THREADS unset"] if threads else []
    fixes += ["--num-cpus as many as there are"] if counted else []
    return Finding(
        "threads", "warn", some_of([*threads, *counted]), f"start ray again there with {' and '.join(fixes)}"
    )


def check_bytecode(nodes: Sequence[NodeFacts]) -> Finding:
    """The bytecode of torch lies on the disk of each node."""
    slow = [name for node, name in _named(nodes) if node.is_compiled is False]
    if not slow:
        return Finding("bytecode", "ok", "torch is compiled wherever it is")
    detail = f"torch isn't compiled on {some_of(slow)}: every start of a worker costs seconds more"
    fix = "python -m compileall -q on its site-packages there, or uv pip install --compile-bytecode in the image"
    return Finding("bytecode", "warn", detail, fix)


def check_gpus(nodes: Sequence[NodeFacts]) -> Finding:
    """Torch is built for the GPUs of each node, and its driver can run that build."""
    faults = [f"{name}: {fault}" for node, name in _named(nodes) if (fault := _gpu_fault(node)) is not None]
    if faults:
        fix = "install the build of torch and torchvision that fits the driver there, or update the driver"
        return Finding("GPUs", "broken", some_of(faults), fix)
    idle = [name for node, name in _named(nodes) if node.cuda_driver is not None and not node.ray_gpus]
    if idle:
        detail = f"{some_of(idle)}: a driver for CUDA is there, and Ray counts no GPU"
        return Finding("GPUs", "warn", detail, "start ray again there with --num-gpus, if jobs may use them")
    num = sum(node.ray_gpus for node in nodes)
    return Finding("GPUs", "ok", f"{num:g}, which torch is built for" if num else "none: jobs train on the CPU")


def _gpu_fault(node: NodeFacts) -> str | None:
    if not node.ray_gpus or node.torch is None:
        return None
    if node.cuda_driver is None:
        return f"Ray counts {node.ray_gpus:g} GPUs, and there is no driver for CUDA"
    if node.cuda_build is None:
        return f"torch {node.torch} is a CPU build, and there are GPUs"
    # Within a major version, an older driver runs what a newer CUDA built.
    if version(node.cuda_build)[0] > version(node.cuda_driver)[0]:
        return f"torch {node.torch} is built for CUDA {node.cuda_build}, and the driver ends at {node.cuda_driver}"
    return None


def most_common(values: Iterable[str | None]) -> str | None:
    """Returns the value that most nodes have."""
    return Counter(values).most_common(1)[0][0]


def where(nodes: Sequence[NodeFacts], is_so: Callable[[NodeFacts], bool]) -> str:
    """Returns the names of the nodes of which something is so."""
    return some_of([name for node, name in _named(nodes) if is_so(node)])


def _named(nodes: Sequence[NodeFacts]) -> list[tuple[NodeFacts, str]]:
    """Returns the nodes that answered, with their names."""
    names = _names(nodes)
    return [(node, names[node.node_id]) for node in nodes if node.error is None]


def _names(nodes: Sequence[NodeFacts]) -> dict[str, str]:
    """Returns what a node is called: its address, with some of its id where several have the same."""
    num = Counter(node.ip for node in nodes)
    return {node.node_id: node.ip if num[node.ip] == 1 else f"{node.ip} ({node.node_id[:6]})" for node in nodes}
