"""Kubernetes, as far as a submission needs it. Nothing is made there but questions, which the server doesn't keep."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec

from graftstack.config.k8s import PREFIX, K8sConfig, k8s_config
from graftstack.doctor import kube_objects
from graftstack.doctor.finding import Finding, from_error, not_checked
from graftstack.errors import BadInputError, ConfigError
from graftstack.submit import kube_api
from graftstack.submit.kube_api import (
    KUEUE_GROUP,
    KUEUE_VERSIONS,
    Kind,
    KubeApi,
    Manifest,
    Place,
    RefusedError,
    UnreachableError,
    connect,
    explained,
)

# A job must name its image, and nothing here depends on it.
_ANY_IMAGE = f"{PREFIX}image=graftstack:ray2.60.0"

_CLIENT = "kubernetes client"


def read_words(words: Sequence[str]) -> K8sConfig:
    """Returns how jobs are to run by their ``k8s.KEY=value`` words, which need not name an image.

    Raises:
        BadInputError: another word, an unknown key, or a value that can't be.
    """
    for word in words:
        if not word.startswith(PREFIX):
            raise BadInputError(f"{word}: no word of pods; give those of a job that begin with {PREFIX} alone")
    return k8s_config([_ANY_IMAGE, *words])


def examine_kubernetes(config: K8sConfig) -> list[Finding]:
    """Returns the findings of all checks on the cluster that the kubeconfig names, for jobs that are to run so."""
    if find_spec("kubernetes") is None:
        return [Finding(_CLIENT, "broken", "not installed", "uv pip install 'graftstack[k8s]'")]
    place = Place(config.namespace, config.context)
    findings = [Finding(_CLIENT, "ok", "installed")]
    try:
        api = connect(place)
    except ConfigError as error:
        return [*findings, from_error("kubeconfig", error)]
    try:
        server, user = api.server_version(), api.user()
    except (RefusedError, UnreachableError) as error:
        return [*findings, from_error("API server", explained(error, place))]
    findings.append(Finding("API server", "ok", f"Kubernetes {server}; it knows you as {user or 'somebody'}"))
    return findings + _Cluster(api, config, user or "you").examine()


class _Cluster:
    """A cluster that answers."""

    def __init__(self, api: KubeApi, config: K8sConfig, user: str) -> None:
        self._api = api
        self._config = config
        self._user = user
        self._hidden: list[str] = []

    def examine(self) -> list[Finding]:
        """Looks at everything that may be looked at; what the namespace holds only where there is one."""
        namespace = self._look("namespace", self._check_namespace)
        findings = [
            self._look("access", self._check_access),
            namespace,
            self._look("RayJobs", self._check_definition),
            self._look("KubeRay's version", self._check_kuberay),
            self._look("operator", self._check_operator),
            self._look("priority class", self._check_priority_class),
        ]
        if namespace is None or namespace.status != "broken":
            findings += [
                self._look("service account", self._check_service_account),
                self._look("storage claim", self._check_claim),
                self._look("token Secrets", self._check_tokens),
                self._look("queue", self._check_queue),
            ]
        found = [finding for finding in findings if finding is not None]
        return [*found, kube_objects.check_hidden(self._hidden, self._user)] if self._hidden else found

    def _look(self, name: str, check: Callable[[], Finding | None]) -> Finding | None:
        """Returns what a check finds; None where there is nothing to say, or where it may not look."""
        try:
            return check()
        except (RefusedError, UnreachableError) as error:
            if isinstance(error, RefusedError) and error.status == 403:
                self._hidden.append(name)
                return None
            return from_error(name, explained(error, self._api.place))
        except Exception as error:  # an object without what all of its kind have hides no other
            return not_checked(name, error)

    def _check_access(self) -> Finding:
        needed = kube_objects.needed_access(queue=self._config.queue is not None)
        denied = [access for access in needed if not self._api.may(access)]
        return kube_objects.check_access(self._api.place.namespace, denied)

    def _check_namespace(self) -> Finding:
        name = self._api.place.namespace
        try:
            return kube_objects.check_namespace(name, self._api.find(kube_api.NAMESPACE, name))
        except RefusedError as error:
            if error.status != 403:
                raise
        # Who may not read namespaces learns it from what the server says of an object that it isn't to make.
        asked = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "graftstack-doctor"}}
        try:
            self._api.create_config_map(asked, dry_run=True)
        except RefusedError as error:
            if error.status == 404 and error.kind == "namespaces":
                return kube_objects.check_namespace(name, None)
            raise
        return kube_objects.check_namespace(name, {})

    def _check_definition(self) -> Finding:
        try:
            return kube_objects.check_definition(self._definition)
        except RefusedError as error:
            if error.status != 403:
                raise
        # Whether it has such objects the server tells everybody.
        if self._api.serves(kube_api.RAY_JOB):
            return Finding("RayJobs", "ok", "ray.io/v1")
        return kube_objects.check_definition(None)

    def _check_kuberay(self) -> Finding | None:
        found = self._kuberay
        return None if found is None else kube_objects.check_kuberay(found, self._config)

    def _check_operator(self) -> Finding:
        deployments = self._api.everywhere(kube_api.DEPLOYMENT, kube_objects.OPERATOR_LABEL)
        try:
            return kube_objects.check_operator(deployments, self._kuberay)
        except RefusedError:  # that of the definition, of which it is said elsewhere
            return kube_objects.check_operator(deployments, None)

    def _check_priority_class(self) -> Finding | None:
        name = self._config.priority_class
        if name is None:
            return None
        return kube_objects.check_priority_class(name, self._api.find(kube_api.PRIORITY_CLASS, name))

    def _check_service_account(self) -> Finding | None:
        name = self._config.service_account
        if name is None:
            return None
        return kube_objects.check_service_account(name, self._api.find(kube_api.SERVICE_ACCOUNT, name))

    def _check_claim(self) -> Finding | None:
        name = self._config.storage_claim
        return None if name is None else kube_objects.check_claim(name, self._api.find(kube_api.CLAIM, name))

    def _check_tokens(self) -> Finding | None:
        jobs = self._api.ray_jobs() if self._api.serves(kube_api.RAY_JOB) else []
        names = kube_objects.secrets_with_token(jobs)
        return kube_objects.check_tokens({name: self._api.find(kube_api.SECRET, name) for name in names})

    def _check_queue(self) -> Finding | None:
        name = self._config.queue
        if name is None:
            return None
        kinds = [Kind("localqueues", KUEUE_GROUP, version) for version in KUEUE_VERSIONS]
        kind = next((kind for kind in kinds if self._api.serves(kind)), None)
        if kind is None:
            return kube_objects.check_kueue(name)
        local = self._api.find(kind, name)
        return kube_objects.check_queue(name, local, None if local is None else self._behind(kind, local))

    def _behind(self, kind: Kind, local: Manifest) -> Manifest | None:
        """Returns the ClusterQueue of a LocalQueue; None where it isn't there or may not be looked at."""
        try:
            return self._api.find(
                replace(kind, plural="clusterqueues", is_namespaced=False), local["spec"]["clusterQueue"]
            )
        except RefusedError as error:
            if error.status != 403:  # the LocalQueue itself says most of it
                raise
            return None

    @cached_property
    def _definition(self) -> Manifest | None:
        return self._api.find(kube_api.CUSTOM_RESOURCE, "rayjobs.ray.io")

    @property
    def _kuberay(self) -> str | None:
        return None if self._definition is None else kube_objects.kuberay_of(self._definition)
