"""The cluster as a whole: what the operator refuses in `spec.rayClusterSpec` outside the groups."""

from collections.abc import Iterator

from graftstack.config.kubernetes_syntax import is_dns_1123_label, version
from graftstack.submit.manifest import Finding
from graftstack.submit.rayjob import NetworkPolicy, NetworkRules, RayJob
from graftstack.submit.rules.view import CLUSTER, HEAD, Rule, autoscaler_v2, autoscales, cluster, groups, head_env, meta

AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
_ON = ("1", "true")

# The first Ray whose cluster can ask for a token.
_RAY_WITH_TOKENS = "2.52.0"

_FT_ANNOTATION = "ray.io/ft-enabled"
_STORAGE_ANNOTATION = "ray.io/external-storage-namespace"
_AUTOSCALER_COMMAND = "KUBERAY_GEN_AUTOSCALER_START_CMD"


def has_a_ray_that_knows_tokens(job: RayJob) -> Iterator[Finding]:
    """The operator looks at `rayVersion`, not at the image."""
    auth, given = cluster(job).auth_options, cluster(job).ray_version
    if auth is None or auth.mode != "token":
        return
    path = f"{CLUSTER}.rayVersion"
    if not given:
        yield Finding(
            path, "token authentication needs to know it", f"write Ray's version, {_RAY_WITH_TOKENS} or newer"
        )
        return
    try:
        is_old = version(given) < version(_RAY_WITH_TOKENS)
    except ValueError:
        yield Finding(path, f"{given} is no version", 'write it as "2.60.0"')
        return
    if is_old:
        message = f"Ray {given} has no token authentication"
        yield Finding(path, message, f"use an image with Ray {_RAY_WITH_TOKENS} or newer, or mode: disabled")


def asks_ray_for_tokens(job: RayJob) -> Iterator[Finding]:
    """Tokens of Kubernetes are for clusters of their own."""
    auth = cluster(job).auth_options
    if auth is not None and auth.enable_k8s_token_auth:
        message = "a RayJob can't authenticate with tokens of Kubernetes"
        yield Finding(f"{CLUSTER}.authOptions.enableK8sTokenAuth", message, "leave it out; mode: token makes a token")


def says_its_autoscaler_once(job: RayJob) -> Iterator[Finding]:
    """By `autoscalerOptions.version`, and only where there is one."""
    asked = head_env(job).get(AUTOSCALER_V2)
    options = cluster(job).autoscaler_options
    path = f"{HEAD}.template.spec.containers[0].env"
    if asked is not None and not autoscales(job) and asked.value in _ON:
        message = f"{AUTOSCALER_V2}={asked.value} and no autoscaling"
        yield Finding(path, message, "set enableInTreeAutoscaling: true, or leave the variable out")
    if asked is not None and autoscales(job) and options is not None and options.version is not None:
        message = f"{AUTOSCALER_V2} and autoscalerOptions.version say the same"
        yield Finding(path, message, "leave out the variable")


def has_autoscaler_options_that_hold(job: RayJob) -> Iterator[Finding]:
    """A time that has been, and nothing that the operator sets."""
    options = cluster(job).autoscaler_options
    if options is None:
        return
    if (seconds := options.idle_timeout_seconds or 0) < 0:
        path = f"{CLUSTER}.autoscalerOptions.idleTimeoutSeconds"
        yield Finding(path, f"{seconds} is negative", "use 60")
    if any(item.name == _AUTOSCALER_COMMAND for item in options.env or []):
        path = f"{CLUSTER}.autoscalerOptions.env"
        yield Finding(path, f"{_AUTOSCALER_COMMAND} is the operator's own", "leave it out")


def never_restarts_in_place(job: RayJob) -> Iterator[Finding]:
    """The second autoscaler knows a pod by its name, so one that ended must stay ended."""
    if not autoscales(job) or not autoscaler_v2(job):
        return
    for group in groups(job):
        if group.pod.restart_policy not in (None, "", "Never"):
            message = f"{group.pod.restart_policy}, and autoscaler v2 replaces pods"
            yield Finding(f"{group.pod_path}.restartPolicy", message, "write Never, or leave it out")


def keeps_its_state_in_one_way(job: RayJob) -> Iterator[Finding]:
    """Options say where the head keeps its state; variables, parameters and annotations of older times don't."""
    options, env = cluster(job).gcs_fault_tolerance_options, head_env(job)
    annotations = meta(job).annotations or {}
    params = next((group.params for group in groups(job) if group.is_head), {})
    env_path, fix = f"{HEAD}.template.spec.containers[0].env", "use gcsFaultToleranceOptions instead"
    if options is None and "RAY_REDIS_ADDRESS" in env and annotations.get(_FT_ANNOTATION, "").lower() != "true":
        yield Finding(env_path, "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions", fix)
    if "redis-username" in params or "REDIS_USERNAME" in env:
        yield Finding(f"{HEAD}.rayStartParams", "names a user of Redis", fix)
    if options is None:
        return
    for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD"):
        if name in env:
            yield Finding(env_path, f"{name} and gcsFaultToleranceOptions", f"leave the variable out; {fix}")
    if params.get("redis-password"):
        yield Finding(f"{HEAD}.rayStartParams.redis-password", "stands beside gcsFaultToleranceOptions", fix)
    for name in (_FT_ANNOTATION, _STORAGE_ANNOTATION):
        if annotations.get(name):
            yield Finding(f'metadata.annotations["{name}"]', "stands beside gcsFaultToleranceOptions", fix)


def restricts_what_it_has_rules_for(job: RayJob) -> Iterator[Finding]:
    """Rules are exceptions from what the mode denies."""
    policy = cluster(job).network_policy
    if policy is None:
        return
    known = {group.group_name for group in cluster(job).worker_group_specs or []}
    for index, group in enumerate(policy.worker_groups or []):
        if group.group_name not in known:
            path = f"{CLUSTER}.networkPolicy.workerGroups[{index}].groupName"
            yield Finding(
                path, f"{group.group_name} is no worker group", f"use one of {', '.join(sorted(map(str, known)))}"
            )
    for path, rules in _rules(policy):
        if rules.ingress_rules and policy.mode == "DenyAllEgress":
            yield Finding(
                f"{path}.ingressRules", "DenyAllEgress denies no ingress", "leave it out, or use mode: DenyAll"
            )
        if rules.egress_rules and policy.mode == "DenyAllIngress":
            yield Finding(
                f"{path}.egressRules", "DenyAllIngress denies no egress", "leave it out, or use mode: DenyAll"
            )


def has_group_names_for_policies(job: RayJob) -> Iterator[Finding]:
    """The operator's network policies are called after the groups."""
    if cluster(job).network_policy is None:
        return
    for index, group in enumerate(cluster(job).worker_group_specs or []):
        if not is_dns_1123_label(group.group_name or ""):
            path = f"{CLUSTER}.workerGroupSpecs[{index}].groupName"
            yield Finding(path, f"{group.group_name} can't be in a name", "use lower-case letters, digits and dashes")


def finds_its_head(job: RayJob) -> Iterator[Finding]:
    """Workers look the head's name up, and the operator allows no DNS."""
    policy = cluster(job).network_policy
    if policy is None or policy.mode == "DenyAllIngress":
        return
    for key, rules in (("head", policy.head), ("worker", policy.worker)):
        if not _allows_dns(rules or NetworkRules()):
            message = f"{policy.mode or 'DenyAll'} lets nobody look up a name, so no worker finds the head"
            path = f"{CLUSTER}.networkPolicy.{key}.egressRules"
            yield Finding(path, message, "allow UDP and TCP port 53 to kube-system")


def _allows_dns(rules: NetworkRules) -> bool:
    egress = rules.egress_rules or []
    return any(not rule.get("ports") or any(port.get("port") == 53 for port in rule["ports"]) for rule in egress)


def _rules(policy: NetworkPolicy) -> Iterator[tuple[str, NetworkRules]]:
    path = f"{CLUSTER}.networkPolicy"
    for key, rules in (("head", policy.head), ("worker", policy.worker)):
        if rules is not None:
            yield f"{path}.{key}", rules
    for index, rules in enumerate(policy.worker_groups or []):
        yield f"{path}.workerGroups[{index}]", rules


RULES: list[Rule] = [
    has_a_ray_that_knows_tokens,
    asks_ray_for_tokens,
    says_its_autoscaler_once,
    has_autoscaler_options_that_hold,
    never_restarts_in_place,
    keeps_its_state_in_one_way,
    restricts_what_it_has_rules_for,
    has_group_names_for_policies,
    finds_its_head,
]
