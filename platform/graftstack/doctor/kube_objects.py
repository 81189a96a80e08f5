"""What must be there on Kubernetes, judged from the objects as the API server has them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graftstack.config.k8s import K8sConfig
from graftstack.config.kubernetes_syntax import version
from graftstack.doctor.finding import Finding
from graftstack.errors import some_of
from graftstack.submit.kube_api import KUEUE_GROUP, Access, Manifest
from graftstack.submit.manifest import spelt
from graftstack.submit.rayjob import RayCluster, RayJobSpec

_BASE = "kubectl apply -k k8s/base"
_INSTALL = "install the KubeRay operator, 1.4 or newer (k8s/README.md)"

# What an operator that knows none of the fields that came later may be, and the newest one whose fields are known here.
_OLDEST_KUBERAY = "1.4"
_NEWEST_KUBERAY = max(version(since)[:2] for kind in (RayJobSpec, RayCluster) for since in kind.SINCE.values())

OPERATOR_LABEL = "app.kubernetes.io/name in (kuberay-operator, kuberay)"
"""What the operator's deployment bears: by Helm the first, by kustomize the second."""


def needed_access(*, queue: bool) -> list[Access]:
    """Returns what a submission does, and following it; with `queue`, also what Kueue says of it."""
    needed = {
        "rayjobs": ("ray.io", "create get list delete"),
        "configmaps": ("", "create get patch delete"),
        "pods": ("", "list"),
        "pods/log": ("", "get"),
        "events": ("", "list"),
    }
    if queue:
        needed["workloads"] = (KUEUE_GROUP, "list")
    return [Access(verb, resource, group) for resource, (group, verbs) in needed.items() for verb in verbs.split()]


def check_access(namespace: str, denied: Sequence[Access]) -> Finding:
    """Who asks may do all that a submission does."""
    if not denied:
        return Finding("access", "ok", f"may submit, follow and stop jobs in {namespace}")
    verbs = [f"{access.verb} {access.resource}" for access in denied]
    fix = "ask for the role graftstack-submitter of k8s/base/rbac.yaml"
    return Finding("access", "broken", f"in {namespace} you may not {some_of(verbs)}", fix)


def check_namespace(name: str, found: Manifest | None) -> Finding:
    """The namespace is there, and stays."""
    if found is None:
        return Finding("namespace", "broken", f"there is no {name}", f"{_BASE} makes it, or give k8s.namespace=NAME")
    if found.get("status", {}).get("phase") == "Terminating":
        return Finding("namespace", "broken", f"{name} is being deleted", f"wait until it is gone, then {_BASE}")
    return Finding("namespace", "ok", name)


def check_definition(found: Manifest | None) -> Finding:
    """The cluster knows RayJobs."""
    name = "RayJobs"
    if found is None:
        return Finding(name, "broken", "the cluster has none of ray.io/v1", _INSTALL)
    if not _is_true(found, "Established", default=True):
        return Finding(
            name, "broken", "their definition is there and isn't in force", "kubectl describe crd rayjobs.ray.io"
        )
    if _schema(found) is None:
        return Finding(name, "broken", "the cluster has them in other versions than ray.io/v1", _INSTALL)
    return Finding(name, "ok", "ray.io/v1")


def kuberay_of(definition: Manifest) -> str | None:
    """Returns the KubeRay that a definition of RayJobs belongs to, such as ``1.6``, by the fields that it knows.

    Definitions bear no version of their own.
    """
    spec = _schema(definition)
    if spec is None:
        return None
    known = [*_since(RayJobSpec, spec), *_since(RayCluster, _properties(spec.get("rayClusterSpec")))]
    newest = max(map(version, known), default=version(_OLDEST_KUBERAY))
    return ".".join(map(str, newest[:2]))


def check_kuberay(found: str, config: K8sConfig) -> Finding:
    """The definition of RayJobs (`kuberay_of`) is that of the KubeRay which jobs are rendered for."""
    wanted = config.kuberay
    if version(found) >= min(version(wanted)[:2], _NEWEST_KUBERAY):
        return Finding("KubeRay's version", "ok", f"{found}, by the fields of a RayJob")
    or_older = " or older" if found == _OLDEST_KUBERAY else ""
    detail = f"RayJobs here are those of KubeRay {found}{or_older}, and jobs are rendered for {wanted}"
    fix = f"add k8s.kuberay={found} to each submit, which then says what else to leave out; or upgrade the CRDs"
    # A field that isn't known is refused.
    needed = [RayJobSpec.SINCE["pre_running_deadline_seconds"]] if config.pending_deadline_s is not None else []
    needed += [RayCluster.SINCE["auth_options"]] if config.token_auth else []
    knows_all = all(version(found) >= version(since)[:2] for since in needed)
    return Finding("KubeRay's version", "warn" if knows_all else "broken", detail, fix)


def check_operator(deployments: Sequence[Manifest], definition: str | None) -> Finding:
    """An operator runs, in the version of the definition of RayJobs (`kuberay_of`, None: not known).

    A definition newer than all that are known here looks like the newest of those.
    """
    name = "operator"
    if not deployments:
        detail = "no deployment bears the label of the KubeRay operator: RayJobs would wait for ever"
        return Finding(name, "broken", detail, _INSTALL)
    found = deployments[0]
    where = f"{found['metadata'].get('namespace')}/{found['metadata']['name']}"
    if not found.get("status", {}).get("availableReplicas"):
        detail = f"{where} has no pod that is ready: RayJobs wait until it has"
        namespace = found["metadata"].get("namespace")
        return Finding(name, "broken", detail, f"kubectl -n {namespace} describe pods -l '{OPERATOR_LABEL}'")
    release = _release(found)
    if release is not None and definition is not None:
        runs, defined = version(release)[:2], version(definition)
        differs = f"{where} is {release}, and the definition of RayJobs that of {definition}"
        if defined < min(runs, _NEWEST_KUBERAY):
            chart = f"helm pull kuberay/kuberay-operator --version {release} --untar"
            fix = f"{chart} && kubectl apply --server-side --force-conflicts -f kuberay-operator/crds"
            return Finding(name, "warn", f"{differs}: Helm upgrades no CRDs", fix)
        if runs < defined:
            fix = f"upgrade the operator: helm upgrade {found['metadata']['name']} kuberay/kuberay-operator"
            return Finding(name, "warn", f"{differs}: it ignores what is new there", f"{fix} --version {definition}.0")
    return Finding(name, "ok", f"{where} runs{f' {release}' if release else ''}")


def check_queue(name: str, local: Manifest | None, cluster: Manifest | None) -> Finding:
    """Kueue admits jobs of the queue.

    Args:
        name: Of the LocalQueue.
        local: The LocalQueue; None: there is none.
        cluster: Its ClusterQueue; None: it isn't there, or may not be looked at.
    """
    if local is None:
        fix = "kubectl apply -k k8s/queues makes graftstack, or see kubectl get localqueues"
        return Finding("queue", "broken", f"no LocalQueue {name} in the namespace", fix)
    behind = local["spec"]["clusterQueue"]
    see = f"kubectl describe clusterqueue {behind}"
    for found, what in ((cluster, f"ClusterQueue {behind}"), (local, f"LocalQueue {name}")):
        condition = _condition(found or {}, "Active")
        if condition is not None and condition["status"] != "True":
            why = condition.get("reason") or "no reason given"
            said = f"{condition['message']} ({why})" if condition.get("message") else why
            fix = see if why != "Stopped" else f"set spec.stopPolicy of {what} to None"
            if why == "ClusterQueueDoesNotExist":
                fix = "kubectl apply -k k8s/queues makes graftstack, or correct spec.clusterQueue"
            return Finding("queue", "broken", f"{what} admits nothing: {said}", fix)
    return Finding("queue", "ok", f"{name}, of ClusterQueue {behind}")


def check_kueue(name: str) -> Finding:
    """Jobs can't wait in the queue of that name, for want of Kueue."""
    return Finding(
        "queue", "broken", f"{name}: the cluster has no Kueue", "install Kueue (k8s/README.md), or leave k8s.queue out"
    )


def check_service_account(name: str, found: Manifest | None) -> Finding:
    """The account of the pods is there: without it none is made."""
    if found is None:
        fix = f"{_BASE}, or add k8s.service_account=null to each submit"
        return Finding("service account", "broken", f"there is no {name}: no pod would start", fix)
    return Finding("service account", "ok", name)


def check_claim(name: str, found: Manifest | None) -> Finding:
    """The claim of the pods is bound to storage that they can write to from several nodes."""
    if found is None:
        fix = f"{_BASE}, or k8s.storage_claim=null with URIs for runs_dir and data.path"
        return Finding("storage claim", "broken", f"there is no {name}: pods would wait for ever", fix)
    modes = found.get("spec", {}).get("accessModes") or []
    phase = found.get("status", {}).get("phase")
    see = f"kubectl describe pvc {name}"
    if phase == "Lost":
        return Finding("storage claim", "broken", f"{name} has lost its volume", f"{see}; restore it, or make another")
    fixes: dict[str, str] = {}
    if "ReadWriteMany" not in modes:
        shared = "make it ReadWriteMany, with a class that has that (NFS, CephFS, EFS)"
        if "ReadWriteOnce" not in modes:
            return Finding("storage claim", "broken", f"{name} is {', '.join(modes)}: pods can't share it", shared)
        what = "ReadWriteOnce: fine on a cluster of one node; pods on other nodes can't mount it"
        fixes[what] = f"for several nodes {shared}"
    if phase != "Bound":
        fixes[f"{phase}: no volume yet, which its first pod may bring"] = f"{see} says what it waits for"
    if fixes:
        return Finding("storage claim", "warn", f"{name} is {', and '.join(fixes)}", "; ".join(fixes.values()))
    return Finding("storage claim", "ok", f"{name} is bound")


def check_priority_class(name: str, found: Manifest | None) -> Finding:
    """The priority class of the pods is there: without it none is made."""
    if found is None:
        fix = f"{_BASE} makes graftstack-batch, or leave k8s.priority_class out"
        return Finding("priority class", "broken", f"there is no {name}: no pod would start", fix)
    return Finding("priority class", "ok", f"{name} ({found.get('value')})")


def secrets_with_token(jobs: Sequence[Manifest]) -> list[str]:
    """Returns the names of the Secrets with the tokens of the RayClusters that jobs have at present.

    KubeRay gives such a Secret the name of its RayCluster, unless a job names another.
    """
    found = []
    for job in jobs:
        cluster = job.get("status", {}).get("rayClusterName")
        auth = job["spec"].get("rayClusterSpec", {}).get("authOptions") or {}
        is_over = job.get("status", {}).get("jobDeploymentStatus") in ("Complete", "Failed")
        if cluster and auth.get("mode") == "token" and not is_over:
            found.append(auth.get("secretName") or cluster)
    return found


def check_tokens(secrets: Mapping[str, Manifest | None]) -> Finding:
    """Each cluster of a job has the Secret that holds its token; given by the names of the Secrets."""
    missing = [name for name, found in secrets.items() if not ((found or {}).get("data") or {}).get("auth_token")]
    if missing:
        detail = f"no Secret {some_of(missing)} with an auth_token: pods of that cluster can't start"
        fix = "see the operator's log; KubeRay before 1.5.1 makes none: k8s.token_auth=false"
        return Finding("token Secrets", "broken", detail, fix)
    return Finding("token Secrets", "ok", f"{len(secrets)}, one for each cluster" if secrets else "no job runs")


def check_hidden(names: Sequence[str], user: str) -> Finding:
    """What may not be looked at was not."""
    shown = ", ".join(names)
    fix = "ask an administrator to run graftstack doctor --to k8s; jobs need no such rights"
    return Finding("not looked at", "warn", f"{user} may not read: {shown}", fix)


def _is_true(found: Manifest, kind: str, *, default: bool) -> bool:
    condition = _condition(found, kind)
    return default if condition is None else bool(condition["status"] == "True")


def _condition(found: Manifest, kind: str) -> Manifest | None:
    conditions = found.get("status", {}).get("conditions") or []
    return next((condition for condition in conditions if condition.get("type") == kind), None)


def _schema(definition: Manifest) -> Mapping[str, Any] | None:
    """Returns the fields of the spec of a RayJob of v1, or None where that isn't served."""
    for found in definition["spec"].get("versions") or []:
        if found["name"] == "v1" and found.get("served"):
            return _properties(_properties(found.get("schema", {}).get("openAPIV3Schema")).get("spec"))
    return None


def _properties(schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (schema or {}).get("properties") or {}


def _since(kind: type, fields: Mapping[str, Any]) -> Iterator[str]:
    """Yields since when those fields of a type are known that a schema has."""
    since: Mapping[str, str] = getattr(kind, "SINCE", {})
    return (release for name, release in since.items() if spelt(name) in fields)


def _release(deployment: Manifest) -> str | None:
    """Returns the version that the tag of the operator's image says."""
    for container in deployment["spec"]["template"]["spec"]["containers"]:
        tag = container["image"].partition("@")[0].rpartition("/")[2].partition(":")[2]
        try:
            return ".".join(map(str, version(tag)))
        except ValueError:
            continue
    return None
