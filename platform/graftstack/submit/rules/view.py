"""What rules look at: a RayJob in which what isn't there is empty."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from graftstack.submit.manifest import Finding, join
from graftstack.submit.pods import Container, EnvVar, ObjectMeta, PodSpec, PodTemplate
from graftstack.submit.rayjob import HeadGroup, RayCluster, RayJob, RayJobSpec, WorkerGroup

Rule = Callable[[RayJob], Iterator[Finding]]

SPEC = "spec"
CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec"
WORKERS = f"{CLUSTER}.workerGroupSpecs"
SUBMITTER = "spec.submitterPodTemplate"


class Group(NamedTuple):
    """The head, or a group of workers."""

    path: str
    params: dict[str, str]
    """`rayStartParams`."""
    resources: dict[str, str]
    labels: dict[str, str]
    pod: PodSpec

    @property
    def is_head(self) -> bool:
        """Whether it is the pod that leads."""
        return self.path == HEAD

    @property
    def pod_path(self) -> str:
        """Of the pods' own spec."""
        return f"{self.path}.template.spec"

    @property
    def ray(self) -> Container:
        """The container in which Ray runs: the first."""
        return (self.pod.containers or [Container()])[0]


class Pod(NamedTuple):
    """The spec of a pod, wherever it stands."""

    path: str
    spec: PodSpec

    def containers(self) -> Iterator[tuple[str, Container]]:
        """Yields all containers with their paths."""
        for key, found in (("initContainers", self.spec.init_containers), ("containers", self.spec.containers)):
            for index, container in enumerate(found or []):
                yield f"{join(self.path, key)}[{index}]", container


def meta(job: RayJob) -> ObjectMeta:
    """Returns the metadata."""
    return job.metadata or ObjectMeta()


def spec(job: RayJob) -> RayJobSpec:
    """Returns the spec."""
    return job.spec or RayJobSpec()


def cluster(job: RayJob) -> RayCluster:
    """Returns the cluster that the job gets."""
    return spec(job).ray_cluster_spec or RayCluster()


def groups(job: RayJob) -> list[Group]:
    """Returns the head and the groups of workers."""
    head, workers = cluster(job).head_group_spec, cluster(job).worker_group_specs or []
    found = [] if head is None else [_group(HEAD, head)]
    return [*found, *(_group(f"{WORKERS}[{index}]", group) for index, group in enumerate(workers))]


def pods(job: RayJob) -> list[Pod]:
    """Returns the specs of all pods: the head's, the workers' and the submitter's."""
    found = [Pod(group.pod_path, group.pod) for group in groups(job)]
    if (template := spec(job).submitter_pod_template) is not None:
        found.append(Pod(f"{SUBMITTER}.spec", _pod(template)))
    return found


def head_env(job: RayJob) -> dict[str, EnvVar]:
    """Returns the environment of Ray's container in the head."""
    return {str(item.name): item for group in groups(job) if group.is_head for item in group.ray.env or []}


def autoscales(job: RayJob) -> bool:
    """Whether Ray adds and removes workers."""
    return bool(cluster(job).enable_in_tree_autoscaling)


def autoscaler_v2(job: RayJob) -> bool:
    """Whether the second autoscaler is asked for by its version."""
    options = cluster(job).autoscaler_options
    return options is not None and options.version == "v2"


def _group(path: str, group: HeadGroup | WorkerGroup) -> Group:
    return Group(path, group.ray_start_params or {}, group.resources or {}, group.labels or {}, _pod(group.template))


def _pod(template: PodTemplate | None) -> PodSpec:
    return (template.spec if template else None) or PodSpec()
