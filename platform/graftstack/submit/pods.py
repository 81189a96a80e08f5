"""As much of Kubernetes' own objects as RayJobs are rendered with or checked for; other fields are kept in `rest`."""

from dataclasses import dataclass, field
from typing import Any

Quantity = str | int | float
Rest = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ObjectMeta:
    """The name of an object, and what is said about it."""

    name: str | None = None
    generate_name: str | None = None
    namespace: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    rest: Rest = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EnvVar:
    """An environment variable."""

    name: str | None = None
    value: str | None = None
    value_from: dict[str, Any] | None = None
    rest: Rest = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a container is given, and what it may use."""

    requests: dict[str, Quantity] | None = None
    limits: dict[str, Quantity] | None = None
    rest: Rest = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SecurityContext:
    """What a container may do."""

    allow_privilege_escalation: bool | None = None
    capabilities: dict[str, Any] | None = None
    read_only_root_filesystem: bool | None = None
    run_as_non_root: bool | None = None
    run_as_user: int | None = None
    privileged: bool | None = None
    seccomp_profile: dict[str, Any] | None = None
    rest: Rest = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PodSecurityContext:
    """As whom the containers of a pod run."""

    run_as_non_root: bool | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    fs_group: int | None = None
    fs_group_change_policy: str | None = None
    seccomp_profile: dict[str, Any] | None = None
    rest: Rest = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VolumeMount:
    """Where a container finds a volume."""

    name: str | None = None
    mount_path: str | None = None
    read_only: bool | None = None
    rest: Rest = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """What a pod mounts; which kind it is stands in one of its fields."""

    name: str | None = None
    empty_dir: dict[str, Any] | None = None
    config_map: dict[str, Any] | None = None
    persistent_volume_claim: dict[str, Any] | None = None
    rest: Rest = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Container:
    """One process of a pod."""

    name: str | None = None
    image: str | None = None
    image_pull_policy: str | None = None
    working_dir: str | None = None
    env: list[EnvVar] | None = None
    env_from: list[dict[str, Any]] | None = None
    resources: Resources | None = None
    security_context: SecurityContext | None = None
    volume_mounts: list[VolumeMount] | None = None
    rest: Rest = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PodSpec:
    """Containers that run on one node."""

    service_account_name: str | None = None
    automount_service_account_token: bool | None = None
    restart_policy: str | None = None
    priority_class_name: str | None = None
    image_pull_secrets: list[dict[str, Any]] | None = None
    security_context: PodSecurityContext | None = None
    node_selector: dict[str, str] | None = None
    affinity: dict[str, Any] | None = None
    tolerations: list[dict[str, Any]] | None = None
    init_containers: list[Container] | None = None
    containers: list[Container] | None = None
    volumes: list[Volume] | None = None
    rest: Rest = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PodTemplate:
    """What pods are made from."""

    metadata: ObjectMeta | None = None
    spec: PodSpec | None = None
    rest: Rest = field(default_factory=dict)
