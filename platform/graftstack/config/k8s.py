"""How a job runs on Kubernetes: the ``k8s.KEY=value`` words beside those of the job.

The string under each field is its documentation. What is checked here needs no knowledge of the job.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

import yaml

from graftstack.config.checks import at_least
from graftstack.config.kubernetes_syntax import (
    is_dns_1123_label,
    is_dns_1123_subdomain,
    is_label_key,
    is_label_value,
    quantity,
    version,
)
from graftstack.errors import ConfigError, did_you_mean

PREFIX = "k8s."

# The images whose tag begins with Ray's version: those that Ray's makers publish.
_RAY_IMAGES = {"ray", "ray-ml", "ray-llm"}

_PULL_POLICIES = ("IfNotPresent", "Always", "Never")

# Where pods mount what is theirs.
_RESERVED = ("/tmp", "/dev", "/etc", "/proc", "/sys", "/usr", "/opt", "/var/run")  # noqa: S108


# What the values of keys that aren't texts must be, and how to say so.
_WANTED: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    int | None: ((int,), "a whole number, or null"),
    Any: ((int, list), "a whole number, or [min,max]"),
    list[str]: ((list,), "a list in brackets"),
    dict[str, str]: ((dict,), "{KEY: VALUE} in braces"),
}


@dataclass(frozen=True, kw_only=True)
class K8sConfig:
    """Pods and the life of their cluster. How many workers train, and on what, `cluster.*` of the job says."""

    image: str = ""
    """The image with graftstack and Ray (k8s/Dockerfile); all pods run it. There is no default."""
    ray_version: str | None = None
    """Ray's version in the image; null: as its tag says (graftstack:0.1.0-ray2.60.0, rayproject/ray:2.60.0)."""
    kuberay: str = "1.7"
    """The version of the KubeRay operator on the cluster, 1.4 or newer."""
    context: str | None = None
    """The context of the kubeconfig; null: its current one, or the service account of the pod that this runs in."""
    namespace: str = "graftstack"
    """Where the job runs."""
    queue: str | None = None
    """Kueue's LocalQueue in which the job waits for its quota; null: it doesn't go through Kueue."""
    queue_priority: str | None = None
    """Kueue's WorkloadPriorityClass: which job of the queue comes first, and whose pods make room for it."""
    priority_class: str | None = None
    """The PriorityClass of the pods."""
    service_account: str | None = "graftstack"
    """The service account of the pods, whose token only the autoscaler gets to see; null: the default one."""
    storage_claim: str | None = "graftstack-storage"
    """The PersistentVolumeClaim with data, weights and runs, which all pods can write to; null: all of it has URIs."""
    storage_mount: str = "/storage"
    """Where the claim is mounted. It is the working folder of the job: relative paths are below it."""
    pods: Any = None
    """Worker pods: a number, or [min,max] for the autoscaler to choose from; null: as cluster.num_workers needs."""
    workers_per_pod: int = 1
    """Workers that share a pod, such as those on the GPUs of one machine, which are then connected by NVLink."""
    worker_cpus: int = 4
    """CPUs of each worker unless cluster.cpus_per_worker says so."""
    worker_memory: str | None = None
    """Memory of each worker, a third of which holds Ray's objects; requested as it is limited; null: as plan has it."""
    head_cpus: str = "2"
    """CPUs of the head, which runs the driver, and no workers."""
    head_memory: str | None = None
    """Memory of the head; requested and limited alike; null: as the job's driver needs it."""
    scratch: str = "32Gi"
    """The most that a pod may write to /tmp, where decoded images and Ray's sessions lie."""
    gpu_resource: str = "nvidia.com/gpu"
    """What a GPU is called among the resources of a node."""
    spot: bool = False
    """Workers run on nodes that may be taken away; the head never does."""
    spot_label: str = "karpenter.sh/capacity-type=spot"
    """The label, and the taint, of those nodes; elsewhere cloud.google.com/gke-spot=true, for instance."""
    head_nodes: dict[str, str] = field(default_factory=dict)
    """Labels that the head's node must have: k8s.head_nodes.KEY=VALUE."""
    worker_nodes: dict[str, str] = field(default_factory=dict)
    """Labels that the workers' nodes must have: k8s.worker_nodes.KEY=VALUE."""
    active_deadline_s: int | None = 86_400
    """Seconds after which the job fails, whatever it does; null: never."""
    pending_deadline_s: int | None = 3_600
    """Seconds after which the job fails unless its cluster is up, KubeRay 1.6 or newer; null: never."""
    backoff_limit: int = 2
    """How often a job that failed gets a new cluster; it goes on from what is finished."""
    ttl_s: int = 0
    """Seconds for which the cluster of a finished job stays up, to be looked at."""
    suspend: bool = False
    """Make the job, and start it only once somebody clears spec.suspend."""
    idle_timeout_s: int = 60
    """Seconds without work after which the autoscaler removes a pod."""
    token_auth: bool = True
    """Ray answers only whoever knows the token that KubeRay makes for the cluster; KubeRay 1.5.1 or newer."""
    user: int = 1000
    """The user, and the group of files on the claim, as which everything runs; not root."""
    image_pull_policy: str = "IfNotPresent"
    """IfNotPresent, Always or Never."""
    image_pull_secrets: list[str] = field(default_factory=list)
    """Secrets with the registry's credentials."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job and its workers: k8s.env.NAME=VALUE. Anyone who may read the job sees them."""
    env_from: list[str] = field(default_factory=list)
    """Secrets whose keys are environment variables, such as the credentials of an object store."""

    def __post_init__(self) -> None:
        self._check_image()
        self._check_names()
        self._check_storage()
        self._check_sizes()
        self._check_nodes()
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ConfigError(f"k8s.env.{name}={self.env[name]}: no name of a variable; use letters, digits and _")

    @property
    def ray(self) -> str:
        """Ray's version in the image."""
        found = self.ray_version or ray_version_of(self.image)
        assert found is not None
        return found

    @property
    def pod_range(self) -> tuple[int, int] | None:
        """The least and the greatest number of worker pods; None where the job says how many."""
        match self.pods:
            case None:
                return None
            case int(num) if not isinstance(num, bool):
                return num, num
            case [int(low), int(high)]:
                return low, high
        raise ConfigError(f"k8s.pods={self.pods}: give a whole number, or [min,max]")

    @property
    def spot_node(self) -> tuple[str, str]:
        """The key and the value of the label of nodes that may be taken away."""
        key, _, value = self.spot_label.partition("=")
        return key, value

    def _check_image(self) -> None:
        if not self.image:
            raise ConfigError("k8s.image=: which image? build k8s/Dockerfile, push it, and add k8s.image=NAME:TAG")
        if not re.fullmatch(r"[a-z0-9]\S*", self.image):
            raise ConfigError(f"k8s.image={self.image}: no name of an image; give [REGISTRY/]NAME:TAG in lower case")
        if self.ray_version is None and ray_version_of(self.image) is None:
            raise ConfigError(
                f"k8s.image={self.image}: its tag doesn't say which Ray it holds; call it NAME:TAG-ray2.60.0, or add "
                "k8s.ray_version=2.60.0"
            )
        for key, given in {"ray_version": self.ray_version, "kuberay": self.kuberay}.items():
            if given is not None:
                _check(key, given, _is_version, "give numbers with dots, such as 1.7")
        if version(self.kuberay) < (1, 4):
            raise ConfigError(f"k8s.kuberay={self.kuberay}: jobs need KubeRay 1.4; upgrade the operator")
        _check(
            "image_pull_policy", self.image_pull_policy, _PULL_POLICIES.__contains__, f"use {', '.join(_PULL_POLICIES)}"
        )

    def _check_names(self) -> None:
        _check("namespace", self.namespace, is_dns_1123_label, "use lower-case letters, digits and dashes, at most 63")
        objects = {
            "queue": self.queue,
            "queue_priority": self.queue_priority,
            "priority_class": self.priority_class,
            "service_account": self.service_account,
            "storage_claim": self.storage_claim,
        }
        names = [(key, name) for key, name in objects.items() if name is not None]
        names += [("image_pull_secrets", name) for name in self.image_pull_secrets]
        names += [("env_from", name) for name in self.env_from]
        for key, name in names:
            _check(
                key, name, is_dns_1123_subdomain, "use the name of the object: lower-case letters, digits, dashes, dots"
            )

        if self.queue_priority is not None and self.queue is None:
            raise ConfigError(
                f"k8s.queue_priority={self.queue_priority}: orders the jobs of a queue; add k8s.queue=NAME"
            )

    def _check_storage(self) -> None:
        path = PurePosixPath(self.storage_mount)
        if not path.is_absolute() or path == PurePosixPath("/") or ".." in path.parts:
            raise ConfigError(f"k8s.storage_mount={self.storage_mount}: must be a whole path; use /storage")
        if any(path.is_relative_to(taken) for taken in _RESERVED):
            raise ConfigError(f"k8s.storage_mount={self.storage_mount}: has a use of its own in a pod; use /storage")

    def _check_sizes(self) -> None:
        memory = {key: getattr(self, key) for key in ("worker_memory", "head_memory") if getattr(self, key) is not None}
        for key, amount in {**memory, "scratch": self.scratch, "head_cpus": self.head_cpus}.items():
            _check(key, amount, _is_amount, "give an amount such as 16Gi")
        for key, amount in memory.items():
            if quantity(amount) < 1024**3:
                raise ConfigError(f"k8s.{key}={amount}: Ray and torch need 1Gi at the least; write 16Gi, or null")
        for key, least in {"workers_per_pod": 1, "worker_cpus": 1, "backoff_limit": 0, "ttl_s": 0, "user": 1}.items():
            at_least(f"{PREFIX}{key}", getattr(self, key), least)
        for key in ("active_deadline_s", "pending_deadline_s", "idle_timeout_s"):
            at_least(f"{PREFIX}{key}", getattr(self, key), 1)
        if (pods := self.pod_range) is not None:
            low, high = pods
            at_least(f"{PREFIX}pods", low, 0 if low < high else 1)
            if high < low:
                raise ConfigError(f"k8s.pods={self.pods}: the range is empty; give [min,max] with min <= max")

    def _check_nodes(self) -> None:
        labels = [("spot_label", self.spot_label)]
        labels += [("head_nodes", f"{key}={value}") for key, value in self.head_nodes.items()]
        labels += [("worker_nodes", f"{key}={value}") for key, value in self.worker_nodes.items()]
        for key, label in labels:
            _check(key, label, _is_label, "give a label of a node, KEY=VALUE")
        _check("gpu_resource", self.gpu_resource, is_label_key, "give the name of a resource, such as nvidia.com/gpu")


def k8s_config(words: Sequence[str]) -> K8sConfig:
    """Returns what ``k8s.KEY=value`` words say; of a key that is given twice the last one counts.

    Raises:
        ConfigError: an unknown key, or a value that can't be; one line.
    """
    kinds = {item.name: item.type for item in fields(K8sConfig)}
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.removeprefix(PREFIX).partition("=")
        if not equals:
            raise ConfigError(f"{word}: not an override; write k8s.KEY=value")
        section, _, name = key.partition(".")
        if name and kinds.get(section) == dict[str, str]:
            given[section] = {**given.get(section, {}), name: text}
        elif key in kinds:
            given[key] = _value(word, kinds[key], text)
        else:
            raise ConfigError(f"{word}: unknown key; {did_you_mean(key, kinds)}")
    return K8sConfig(**given)


def _value(word: str, kind: Any, text: str) -> Any:
    """Returns `text` as the type of its key takes it."""
    if text == "null" and kind in (str | None, int | None, Any):
        return None
    if kind in (str, str | None):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{word}: the value can't be read; close its brackets") from error
    wanted, remedy = _WANTED[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise ConfigError(f"{word}: takes {remedy}; give that")
    if kind == list[str] and isinstance(value, list):
        return [str(item) for item in value]
    return _texts(value) if isinstance(value, Mapping) else value


def _texts(values: Mapping[Any, Any]) -> dict[str, str]:
    """Returns YAML's values as texts: ``true`` and ``1`` are no texts to YAML, and nothing else to Kubernetes."""
    return {str(key): str(value).lower() if isinstance(value, bool) else str(value) for key, value in values.items()}


def ray_version_of(image: str) -> str | None:
    """Returns the version of Ray that the tag of an image says."""
    name, colon, tag = image.partition("@")[0].rpartition("/")[2].partition(":")
    if not colon:
        return None
    pattern = r"(\d+\.\d+\.\d+)" if name in _RAY_IMAGES else r".*(?<![a-z])ray[-_.]?v?(\d+\.\d+\.\d+)"
    found = re.match(pattern, tag)
    return found[1] if found else None


def _check(key: str, value: str, is_right: Callable[[str], bool], remedy: str) -> None:
    if not is_right(value):
        raise ConfigError(f"k8s.{key}={value}: can't be; {remedy}")


def _is_amount(text: str) -> bool:
    try:
        return quantity(text) > 0
    except ValueError:
        return False


def _is_version(text: str) -> bool:
    try:
        return bool(version(text))
    except ValueError:
        return False


def _is_label(text: str) -> bool:
    key, equals, value = text.partition("=")
    return bool(equals) and is_label_key(key) and is_label_value(value)
