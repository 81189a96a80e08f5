"""A spec and the words for Kubernetes become two objects: a ConfigMap with the spec in it, and the RayJob that runs it.

Nothing of the user's stands in the entrypoint, which the shell of KubeRay's submitter reads: `$`, quotes and line
breaks of a configuration arrive in the mounted file.
"""

import hashlib
import math
import os
import re
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from graftstack.config.k8s import K8sConfig
from graftstack.config.schema import ClusterKind, JobConfig
from graftstack.config.spec import Spec, to_bytes
from graftstack.errors import ConfigError
from graftstack.storage import is_uri
from graftstack.submit.manifest import to_manifest, to_yaml
from graftstack.submit.memory import pod_memory
from graftstack.submit.pods import (
    Container,
    EnvVar,
    ObjectMeta,
    PodSecurityContext,
    PodSpec,
    PodTemplate,
    Resources,
    SecurityContext,
    Volume,
    VolumeMount,
)
from graftstack.submit.rayjob import (
    API_VERSION,
    KIND,
    AuthOptions,
    AutoscalerOptions,
    HeadGroup,
    RayCluster,
    RayJob,
    RayJobSpec,
    SubmitterConfig,
    WorkerGroup,
)
from graftstack.submit.rules.kueue import ELASTIC_ANNOTATION, PRIORITY_LABEL, QUEUE_LABEL

RUN_LABEL = "graftstack.io/run"
RUN_ANNOTATION = "graftstack.io/run-name"
SPEC_ANNOTATION = "graftstack.io/spec"
PART_OF = "app.kubernetes.io/part-of"

SPEC_FILE = "spec.json"
_SPEC_FOLDER = "/etc/graftstack"
_JOBS_FOLDER = "/opt/graftstack/jobs"

# What fits into a ConfigMap.
_LARGEST_SPEC = 1024 * 1024

# Of 47 characters, 10 are a digest, 4 are left for the number of a retry, and one is the dash between.
_SLUG_LENGTH = 32

_HOME = "/tmp"  # noqa: S108 - of a container that has it for itself


class Rendered(NamedTuple):
    """What is applied."""

    config_map: "ConfigMap"
    ray_job: RayJob

    @property
    def name(self) -> str:
        """The name of both."""
        assert self.ray_job.metadata is not None
        return str(self.ray_job.metadata.name)

    def yaml(self) -> str:
        """Returns both as YAML documents, the same bytes for the same job."""
        return to_yaml(to_manifest(self.config_map), to_manifest(self.ray_job))


@dataclass(frozen=True, kw_only=True)
class ConfigMap:
    """Files for pods to mount."""

    api_version: str = "v1"
    kind: str = "ConfigMap"
    metadata: ObjectMeta
    immutable: bool = True
    data: dict[str, str] = field(default_factory=dict)


def render(spec: Spec, config: K8sConfig, *, attempt: int = 1) -> Rendered:
    """Returns the objects that run `spec` on Kubernetes; a later attempt differs in their names alone.

    Raises:
        ConfigError: the job can't run there; one line with the key, the value and the remedy.
    """
    if spec.config.cluster.kind is ClusterKind.inline:
        raise ConfigError("cluster=inline: on Kubernetes pods of their own do the work; leave it out")
    _check_places(spec.config, config)
    placed = replace(spec, config=_on_the_cluster(spec.config, config))
    content = to_bytes(placed)
    if len(content) > _LARGEST_SPEC:
        message = f"the configuration has {len(content)} bytes and a ConfigMap holds {_LARGEST_SPEC}"
        raise ConfigError(f"job={spec.job}: {message}; shorten its lists")
    pods = _Pods(placed, config)
    name = _object_name(str(spec.config.name), content, attempt)
    metadata = ObjectMeta(
        name=name,
        namespace=config.namespace,
        labels=pods.labels
        | {RUN_LABEL: run_label(spec.config)}
        | ({QUEUE_LABEL: config.queue} if config.queue else {})
        | ({PRIORITY_LABEL: config.queue_priority} if config.queue_priority else {}),
        annotations={
            RUN_ANNOTATION: str(spec.config.name),
            SPEC_ANNOTATION: digest(content),
        }
        | ({ELASTIC_ANNOTATION: "true"} if config.queue and pods.autoscales else {}),
    )
    plain = replace(metadata, labels=pods.labels, annotations=None)
    config_map = ConfigMap(metadata=plain, data={SPEC_FILE: content.decode()})
    return Rendered(config_map, RayJob(api_version=API_VERSION, kind=KIND, metadata=metadata, spec=pods.job(name)))


def digest(content: bytes) -> str:
    """Returns what tells specs apart."""
    return hashlib.sha256(content).hexdigest()


def run_label(config: JobConfig) -> str:
    """Returns the label that all jobs have which write to one run, however often it was submitted."""
    name = str(config.name)
    return f"{_slug(name)}-{digest(f'{config.runs_dir}/{name}'.encode())[:10]}"


def notes(spec: Spec, config: K8sConfig) -> list[str]:
    """Returns where the job looks for what its configuration names by a path."""
    paths = {"data.path": spec.config.data.path, "runs_dir": spec.config.runs_dir}
    found = []
    for key, path in paths.items():
        if path is None or is_uri(path):
            continue
        place = _place(path, config)
        if config.storage_claim is not None and _is_below(place, config.storage_mount):
            found.append(f"{key}={path}: {place}, on the claim {config.storage_claim}")
        else:
            found.append(f"{key}={path}: {place} in the image; it isn't on the claim")
    return found


def _place(path: str, config: K8sConfig) -> str:
    """Returns the path as pods see it, whose working folder is the claim."""
    return os.path.normpath(os.path.join(config.storage_mount, path))  # noqa: PTH118 - of another machine


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, os.path.normpath(folder)]) == os.path.normpath(folder)


def _check_places(job: JobConfig, config: K8sConfig) -> None:
    """Raises `ConfigError` where the run would lie in a pod, and be gone with it."""
    if is_uri(job.runs_dir):
        return
    if config.storage_claim is None:
        remedy = "give a URI such as s3://bucket/runs, or k8s.storage_claim"
        raise ConfigError(f"runs_dir={job.runs_dir}: pods have no storage to share; {remedy}")
    if not _is_below(_place(job.runs_dir, config), config.storage_mount):
        remedy = f"use a path below {config.storage_mount}, or a URI"
        raise ConfigError(f"runs_dir={job.runs_dir}: not on the claim {config.storage_claim}; {remedy}")


def _on_the_cluster(job: JobConfig, config: K8sConfig) -> JobConfig:
    """Returns the configuration as it holds inside of pods, where it is known how many CPUs a worker has."""
    cpus = job.cluster.cpus_per_worker or config.worker_cpus
    return replace(job, cluster=replace(job.cluster, kind=ClusterKind.ray, address="auto", cpus_per_worker=cpus))


def _object_name(run: str, content: bytes, attempt: int) -> str:
    retry = f"-{attempt}" if attempt > 1 else ""
    return f"{_slug(run)}-{digest(content)[:10]}{retry}"


def _slug(text: str) -> str:
    """Returns the nearest DNS-1035 label."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (slug if slug[:1].isalpha() else f"run-{slug}")[:_SLUG_LENGTH].strip("-")


class _Pods:
    """The parts of a RayJob, for one spec."""

    def __init__(self, spec: Spec, config: K8sConfig) -> None:
        self._spec, self._config = spec, config
        self._memory = pod_memory(spec, config)
        cluster = spec.config.cluster
        per_pod = config.workers_per_pod
        self._min_pods, self._max_pods = config.pod_range or (
            math.ceil(cluster.min_workers / per_pod),
            math.ceil(cluster.max_workers / per_pod),
        )
        if self._max_pods * per_pod < cluster.max_workers:
            raise ConfigError(
                f"k8s.pods={config.pods}: they hold {self._max_pods * per_pod} workers and cluster.num_workers="
                f"{cluster.num_workers}; use {math.ceil(cluster.max_workers / per_pod)} or more"
            )
        self.labels = {
            "app.kubernetes.io/managed-by": "graftstack",
            PART_OF: "graftstack",
            "app.kubernetes.io/component": spec.job,
        }

    @property
    def autoscales(self) -> bool:
        """Whether Ray adds and removes pods."""
        return self._min_pods < self._max_pods

    def job(self, name: str) -> RayJobSpec:
        """Returns the spec of the job of that name, which is also the name of its ConfigMap."""
        config = self._config
        return RayJobSpec(
            submission_mode="K8sJobMode",
            entrypoint=f"python {_JOBS_FOLDER}/{self._spec.job}.py --spec {_SPEC_FOLDER}/{SPEC_FILE}",
            suspend=config.suspend or None,
            active_deadline_seconds=config.active_deadline_s,
            pre_running_deadline_seconds=config.pending_deadline_s,
            backoff_limit=config.backoff_limit,
            shutdown_after_job_finishes=True,
            ttl_seconds_after_finished=config.ttl_s,
            submitter_config=SubmitterConfig(backoff_limit=2),
            submitter_pod_template=self._submitter(),
            ray_cluster_spec=RayCluster(
                ray_version=config.ray,
                auth_options=AuthOptions(mode="token") if config.token_auth else None,
                enable_in_tree_autoscaling=True if self.autoscales else None,
                autoscaler_options=self._autoscaler() if self.autoscales else None,
                head_group_spec=self._head(name),
                worker_group_specs=[self._workers()],
            ),
        )

    def _head(self, config_map: str) -> HeadGroup:
        """The driver runs here, and nothing else: what runs out of memory elsewhere doesn't end the cluster."""
        config = self._config
        spec = Volume(name="spec", config_map={"name": config_map})
        resources = _both(cpu=config.head_cpus, memory=self._memory.head)
        container = self._container("ray-head", resources, spec_volume="spec")
        pod = self._pod([container], [*self._volumes(), spec])
        return HeadGroup(
            # A head that is lost takes the cluster with it; workers come back.
            ray_start_params={"dashboard-host": "0.0.0.0", "num-cpus": "0"},  # noqa: S104 - of a pod
            template=self._template(
                replace(
                    pod,
                    automount_service_account_token=self.autoscales,
                    node_selector=config.head_nodes or None,
                    affinity=_not_on(*config.spot_node),
                )
            ),
        )

    def _workers(self) -> WorkerGroup:
        config, cluster = self._config, self._spec.config.cluster
        num = config.workers_per_pod
        gpus = math.ceil(cluster.gpus_per_worker * num)
        amounts: dict[str, str | int | float] = {
            "cpu": str((cluster.cpus_per_worker or config.worker_cpus) * num),
            "memory": self._memory.worker,
        }
        if gpus:
            amounts[config.gpu_resource] = str(gpus)
        key, value = config.spot_node
        tolerations = [{"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}] if config.spot else []
        if gpus:
            tolerations.append({"key": config.gpu_resource, "operator": "Exists", "effect": "NoSchedule"})
        pod = self._pod([self._container("ray-worker", _both(**amounts))], self._volumes())
        return WorkerGroup(
            group_name="workers",
            replicas=self._min_pods,
            min_replicas=self._min_pods,
            max_replicas=self._max_pods,
            ray_start_params={},
            template=self._template(
                replace(
                    pod,
                    node_selector=config.worker_nodes | ({key: value} if config.spot else {}) or None,
                    tolerations=tolerations or None,
                )
            ),
        )

    def _submitter(self) -> PodTemplate:
        """It hands the entrypoint to Ray and shows its log. The operator's own template would let it do anything."""
        container = Container(
            name="ray-job-submitter",
            image=self._config.image,
            image_pull_policy=self._config.image_pull_policy,
            env=[EnvVar(name="HOME", value=_HOME)],
            resources=_both(cpu="500m", memory="1Gi"),
            security_context=_LOCKED,
            volume_mounts=[VolumeMount(name="scratch", mount_path=_HOME)],
        )
        pod = self._pod([container], [Volume(name="scratch", empty_dir={"sizeLimit": "1Gi"})])
        return self._template(replace(pod, affinity=_not_on(*self._config.spot_node)))

    def _autoscaler(self) -> AutoscalerOptions:
        return AutoscalerOptions(
            version="v2",
            idle_timeout_seconds=self._config.idle_timeout_s,
            image_pull_policy=self._config.image_pull_policy,
            resources=_both(cpu="500m", memory="1Gi"),
            # Ray's sessions, which it writes to, lie on a volume that the operator adds.
            security_context=replace(_LOCKED, read_only_root_filesystem=None),
        )

    def _container(self, name: str, resources: Resources, *, spec_volume: str | None = None) -> Container:
        config = self._config
        mounts = [VolumeMount(name="scratch", mount_path=_HOME)]
        # The name of a user whom the image may not know; torch and Ray ask for it.
        env = {"HOME": _HOME, "USER": "graftstack", "RAY_USAGE_STATS_ENABLED": "0"}
        if config.storage_claim is not None:
            mounts.append(VolumeMount(name="storage", mount_path=config.storage_mount))
            env["TORCH_HOME"] = f"{config.storage_mount}/.cache/torch"
        if spec_volume is not None:
            mounts.append(VolumeMount(name=spec_volume, mount_path=_SPEC_FOLDER, read_only=True))
        return Container(
            name=name,
            image=config.image,
            image_pull_policy=config.image_pull_policy,
            working_dir=config.storage_mount if config.storage_claim is not None else None,
            env=[EnvVar(name=key, value=_literal(value)) for key, value in sorted((env | config.env).items())],
            env_from=[{"secretRef": {"name": secret}} for secret in config.env_from] or None,
            resources=resources,
            security_context=_LOCKED,
            volume_mounts=mounts,
        )

    def _volumes(self) -> list[Volume]:
        found = [Volume(name="scratch", empty_dir={"sizeLimit": self._config.scratch})]
        if self._config.storage_claim is not None:
            claim = {"claimName": self._config.storage_claim}
            found.append(Volume(name="storage", persistent_volume_claim=claim))
        return found

    def _pod(self, containers: list[Container], volumes: list[Volume]) -> PodSpec:
        config = self._config
        return PodSpec(
            service_account_name=config.service_account,
            automount_service_account_token=False,
            # KubeRay makes a new pod in place of one that ended, with nothing left over from that.
            restart_policy="Never",
            priority_class_name=config.priority_class,
            image_pull_secrets=[{"name": secret} for secret in config.image_pull_secrets] or None,
            security_context=PodSecurityContext(
                run_as_non_root=True,
                run_as_user=config.user,
                run_as_group=config.user,
                fs_group=config.user,
                fs_group_change_policy="OnRootMismatch",
                seccomp_profile={"type": "RuntimeDefault"},
            ),
            containers=containers,
            volumes=volumes,
        )

    def _template(self, pod: PodSpec) -> PodTemplate:
        return PodTemplate(metadata=ObjectMeta(labels=self.labels), spec=pod)


def _both(**amounts: str | int | float) -> Resources:
    """Requested as it is limited: a node that is full kills nobody for what it promised."""
    return Resources(requests=amounts, limits=amounts)


def _literal(value: str) -> str:
    """Returns what Kubernetes makes `value` of: to it ``$(NAME)`` is another variable, and ``$$`` a single $."""
    return value.replace("$", "$$") if "$(" in value or "$$" in value else value


def _not_on(key: str, value: str) -> dict[str, Any]:
    """Keeps a pod off nodes that may be taken away."""
    expression = {"key": key, "operator": "NotIn", "values": [value]}
    terms = [{"matchExpressions": [expression]}]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


_LOCKED = SecurityContext(
    allow_privilege_escalation=False, capabilities={"drop": ["ALL"]}, read_only_root_filesystem=True
)
