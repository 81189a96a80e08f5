"""RayJob of `ray.io/v1`, as the KubeRay operator 1.4 to 1.7 has it: all fields of Ray's own.

Fields are typed where something is rendered into them or checked in them. `SINCE` says which operator was the first to
know a field, `MOVED` what became of one that it knows no more.

Source: https://github.com/ray-project/kuberay, ray-operator/apis/ray/v1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graftstack.submit.pods import EnvVar, ObjectMeta, PodTemplate, Resources, SecurityContext

API_VERSION = "ray.io/v1"
KIND = "RayJob"

Policy = Literal["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]
ManagedBy = Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]


@dataclass(frozen=True, kw_only=True)
class AuthOptions:
    """Who may talk to Ray."""

    SINCE: ClassVar[Mapping[str, str]] = {"secret_name": "1.6", "enable_k8s_token_auth": "1.6"}

    mode: Literal["disabled", "token"] | None = None
    secret_name: str | None = None
    enable_k8s_token_auth: bool | None = None


@dataclass(frozen=True, kw_only=True)
class AutoscalerOptions:
    """The container beside the head that adds and removes workers."""

    SINCE: ClassVar[Mapping[str, str]] = {"command": "1.7", "args": "1.7"}

    version: Literal["v1", "v2"] | None = None
    idle_timeout_seconds: int | None = None
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] | None = None
    image: str | None = None
    image_pull_policy: str | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    env: list[EnvVar] | None = None
    env_from: list[dict[str, Any]] | None = None
    resources: Resources | None = None
    security_context: SecurityContext | None = None
    volume_mounts: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class GcsFaultToleranceOptions:
    """Where the head keeps what it must find again after a restart."""

    SINCE: ClassVar[Mapping[str, str]] = {"backend": "1.7", "storage": "1.7"}

    backend: Literal["redis", "rocksdb"] | None = None
    redis_username: dict[str, Any] | None = None
    redis_password: dict[str, Any] | None = None
    external_storage_namespace: str | None = None
    redis_address: str | None = None
    storage: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkRules:
    """What may reach pods, and what they may reach."""

    group_name: str | None = None
    ingress_rules: list[dict[str, Any]] | None = None
    egress_rules: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkPolicy:
    """The operator's own network policies."""

    mode: Literal["DenyAll", "DenyAllIngress", "DenyAllEgress"] | None = None
    head: NetworkRules | None = None
    worker: NetworkRules | None = None
    worker_groups: list[NetworkRules] | None = None


@dataclass(frozen=True, kw_only=True)
class HeadGroup:
    """The pod that leads."""

    SINCE: ClassVar[Mapping[str, str]] = {"resources": "1.5", "labels": "1.5", "ingress_options": "1.7"}

    ray_start_params: dict[str, str] | None = None
    resources: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    service_type: str | None = None
    head_service: dict[str, Any] | None = None
    enable_ingress: bool | None = None
    ingress_options: dict[str, Any] | None = None
    template: PodTemplate | None = None


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """Pods that are alike."""

    SINCE: ClassVar[Mapping[str, str]] = {"priority": "1.7", "resources": "1.5", "labels": "1.5"}

    group_name: str | None = None
    replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    num_of_hosts: int | None = None
    idle_timeout_seconds: int | None = None
    priority: int | None = None
    suspend: bool | None = None
    ray_start_params: dict[str, str] | None = None
    resources: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    scale_strategy: dict[str, Any] | None = None
    template: PodTemplate | None = None


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """`spec.rayClusterSpec`: the cluster that the job gets."""

    SINCE: ClassVar[Mapping[str, str]] = {
        "auth_options": "1.5.1",
        "upgrade_strategy": "1.6",
        "history_server_options": "1.7",
        "network_policy": "1.7",
        "tls_options": "1.7",
    }

    ray_version: str | None = None
    auth_options: AuthOptions | None = None
    enable_in_tree_autoscaling: bool | None = None
    autoscaler_options: AutoscalerOptions | None = None
    suspend: bool | None = None
    managed_by: ManagedBy | None = None
    upgrade_strategy: dict[str, Any] | None = None
    head_service_annotations: dict[str, str] | None = None
    gcs_fault_tolerance_options: GcsFaultToleranceOptions | None = None
    history_server_options: dict[str, Any] | None = None
    network_policy: NetworkPolicy | None = None
    tls_options: dict[str, Any] | None = None
    head_group_spec: HeadGroup | None = None
    worker_group_specs: list[WorkerGroup] | None = None


@dataclass(frozen=True, kw_only=True)
class DeletionPolicy:
    """What becomes of the pods of a job that ended well, or didn't."""

    policy: Policy | None = None


@dataclass(frozen=True, kw_only=True)
class DeletionCondition:
    """How a job ended, and how long ago."""

    SINCE: ClassVar[Mapping[str, str]] = {"job_deployment_status": "1.6"}

    job_status: Literal["SUCCEEDED", "FAILED"] | None = None
    job_deployment_status: Literal["Failed"] | None = None
    ttl_seconds: int | None = None


@dataclass(frozen=True, kw_only=True)
class DeletionRule:
    """What is deleted when."""

    policy: Policy | None = None
    condition: DeletionCondition | None = None


@dataclass(frozen=True, kw_only=True)
class DeletionStrategy:
    """What is deleted after the end of a job: by rules, or by the older pair of policies."""

    on_success: DeletionPolicy | None = None
    on_failure: DeletionPolicy | None = None
    deletion_rules: list[DeletionRule] | None = None


@dataclass(frozen=True, kw_only=True)
class SubmitterConfig:
    """The Kubernetes Job that hands the entrypoint to Ray."""

    backoff_limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class RayJobSpec:
    """The entrypoint, and the life of its cluster."""

    MOVED: ClassVar[Mapping[str, str]] = {"deletionPolicy": "KubeRay 1.5 replaced it; use deletionStrategy"}

    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] | None = None
    entrypoint: str | None = None
    entrypoint_num_cpus: float | None = None
    entrypoint_num_gpus: float | None = None
    entrypoint_resources: str | None = None
    runtime_env_yaml: str | None = None
    job_id: str | None = None
    metadata: dict[str, str] | None = None
    suspend: bool | None = None
    managed_by: ManagedBy | None = None
    active_deadline_seconds: int | None = None
    pre_running_deadline_seconds: int | None = None
    backoff_limit: int | None = None
    shutdown_after_job_finishes: bool | None = None
    ttl_seconds_after_finished: int | None = None
    deletion_strategy: DeletionStrategy | None = None
    cluster_selector: dict[str, str] | None = None
    submitter_config: SubmitterConfig | None = None
    submitter_pod_template: PodTemplate | None = None
    ray_cluster_spec: RayCluster | None = None
    SINCE: ClassVar[Mapping[str, str]] = {"pre_running_deadline_seconds": "1.6", "deletion_strategy": "1.5"}


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """A job with a Ray cluster of its own."""

    api_version: str | None = None
    kind: str | None = None
    metadata: ObjectMeta | None = None
    spec: RayJobSpec | None = None
    status: dict[str, Any] | None = None
