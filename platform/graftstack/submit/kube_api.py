"""The API server, as far as a submission needs it; the only module that imports the kubernetes client.

Objects are plain dictionaries, as the server's JSON has them.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from graftstack.errors import BadInputError, ConfigError, GraftstackError
from graftstack.reason import reason

Manifest = dict[str, Any]

_GROUP, _VERSION, _PLURAL = "ray.io", "v1", "rayjobs"

KUEUE_GROUP = "kueue.x-k8s.io"
KUEUE_VERSIONS = ("v1beta2", "v1beta1")
"""The newest first: an older Kueue has only the other."""

# What it says to whom it knows, and who may not; and to whom it doesn't know, where that is let in at all.
_FORBIDDEN = re.compile(r"forbidden: User|cannot \w+ resource")
_ANONYMOUS = "system:anonymous"

_CONNECT_S, _READ_S = 5.0, 30.0

# Who asks whether somebody is there wants to know soon; what comes later may take longer.
_FIRST_ANSWER_S = (2.5, 2.5)

# A log that says nothing for so long is asked for again: the connection may be gone without a word.
_LOG_READ_S = 60.0


@dataclass(frozen=True)
class Place:
    """Which cluster, and where in it."""

    namespace: str
    context: str | None = None
    """Of the kubeconfig; None: its current one, or that of the pod that this runs in."""

    def kubectl(self, words: str) -> str:
        """Returns the command that does the same by hand."""
        context = f" --context {self.context}" if self.context else ""
        return f"kubectl{context} -n {self.namespace} {words}"


@dataclass(frozen=True)
class Kind:
    """A kind of object, as the paths of the API have it."""

    plural: str
    group: str
    """Empty for the oldest ones, such as Secrets."""
    version: str = "v1"
    is_namespaced: bool = True


NAMESPACE = Kind("namespaces", "", is_namespaced=False)
SERVICE_ACCOUNT = Kind("serviceaccounts", "")
CLAIM = Kind("persistentvolumeclaims", "")
SECRET = Kind("secrets", "")
PRIORITY_CLASS = Kind("priorityclasses", "scheduling.k8s.io", is_namespaced=False)
DEPLOYMENT = Kind("deployments", "apps")
CUSTOM_RESOURCE = Kind("customresourcedefinitions", "apiextensions.k8s.io", is_namespaced=False)
RAY_JOB = Kind(_PLURAL, _GROUP, _VERSION)


@dataclass(frozen=True)
class Access:
    """Something that somebody may do in a namespace, or not."""

    verb: str
    resource: str
    """Such as ``pods``, or ``pods/log``."""
    group: str = ""


class RefusedError(GraftstackError):
    """The API server said no."""

    def __init__(self, status: int, message: str, *, kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        """What the answer is about, as the API calls it: ``namespaces``. Empty where it isn't the API that answers."""


class UnreachableError(GraftstackError):
    """Nobody answered, or not to the end."""


class KubeApi:
    """One namespace of a cluster.

    Every call raises `RefusedError` or `UnreachableError`.
    """

    def __init__(self, configuration: Any, place: Place) -> None:
        from kubernetes import client

        api_client = client.ApiClient(configuration)
        self.place = place
        self._core, self._custom = client.CoreV1Api(api_client), client.CustomObjectsApi(api_client)
        self._version = client.VersionApi(api_client)

    def ray_jobs(self, selector: str = "") -> list[Manifest]:
        """Returns the RayJobs with those labels."""
        return self._list(self._custom.list_namespaced_custom_object, selector, _GROUP, _VERSION, plural=_PLURAL)

    def ray_job(self, name: str) -> Manifest | None:
        """Returns one RayJob, or None where there is none of that name."""
        try:
            found: Manifest = self._ask(
                self._custom.get_namespaced_custom_object,
                group=_GROUP,
                version=_VERSION,
                namespace=self.place.namespace,
                plural=_PLURAL,
                name=name,
            )
        except RefusedError as error:
            if error.status == 404 and error.kind == _PLURAL:
                return None
            raise
        return found

    def create_ray_job(self, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        """Makes a RayJob and returns what the server made of it; a field that it doesn't know is an error."""
        found: Manifest = self._ask(
            self._custom.create_namespaced_custom_object,
            group=_GROUP,
            version=_VERSION,
            namespace=self.place.namespace,
            plural=_PLURAL,
            body=manifest,
            field_validation="Strict",
            **_dry(dry_run),
        )
        return found

    def delete_ray_job(self, name: str) -> None:
        """Deletes a RayJob and, with it, all that it owns. One that is gone is fine."""
        self._delete(
            self._custom.delete_namespaced_custom_object,
            group=_GROUP,
            version=_VERSION,
            namespace=self.place.namespace,
            plural=_PLURAL,
            name=name,
        )

    def create_config_map(self, manifest: Manifest, *, dry_run: bool = False) -> None:
        """Makes a ConfigMap; one of that name that is there already is fine, since names say what is in them."""
        try:
            self._ask(
                self._core.create_namespaced_config_map,
                namespace=self.place.namespace,
                body=manifest,
                _preload_content=False,
                **_dry(dry_run),
            )
        except RefusedError as error:
            if error.status != 409:
                raise

    def own_config_map(self, name: str, owner: Manifest) -> None:
        """Lets a ConfigMap go when `owner` goes."""
        meta = owner["metadata"]
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": meta["name"],
            "uid": meta["uid"],
        }
        self._ask(
            self._core.patch_namespaced_config_map,
            name=name,
            namespace=self.place.namespace,
            body={"metadata": {"ownerReferences": [reference]}},
            _preload_content=False,
        )

    def delete_config_map(self, name: str) -> None:
        """Deletes a ConfigMap. One that is gone is fine."""
        self._delete(
            self._core.delete_namespaced_config_map, name=name, namespace=self.place.namespace, _preload_content=False
        )

    def pods(self, selector: str) -> list[Manifest]:
        """Returns the pods with those labels, the oldest first."""
        found = self._list(self._core.list_namespaced_pod, selector, _preload_content=False)
        return sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))

    def warnings(self, name: str) -> list[Manifest]:
        """Returns the events that warn of the object of that name, the oldest first."""
        found = self._ask(
            self._core.list_namespaced_event,
            namespace=self.place.namespace,
            field_selector=f"involvedObject.name={name},type=Warning",
            _preload_content=False,
        )
        return sorted(found["items"], key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime")))

    def workloads(self, uid: str) -> list[Manifest]:
        """Returns what Kueue made of the job with that uid; nothing where there is no Kueue."""
        selector = f"{KUEUE_GROUP}/job-uid={uid}"
        for version in KUEUE_VERSIONS:
            list_them = self._custom.list_namespaced_custom_object
            try:
                return self._list(list_them, selector, KUEUE_GROUP, version, plural="workloads")
            except RefusedError as error:
                if error.status != 404:
                    raise
        return []

    @contextmanager
    def log(self, pod: str, container: str, *, since_s: int | None, follow: bool) -> Iterator[Iterator[str]]:
        """Yields the lines of a container's log as they come, each after its time; first those of the last seconds."""
        response = self._ask(
            self._core.read_namespaced_pod_log,
            name=pod,
            namespace=self.place.namespace,
            container=container,
            follow=follow,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(_CONNECT_S, _LOG_READ_S),
            is_text=True,
            **({} if since_s is None else {"since_seconds": since_s}),
        )
        try:
            yield _lines(response)
        finally:
            response.close()

    def server_version(self) -> str:
        """Returns the version of Kubernetes. Most servers tell it to anyone."""
        found = self._ask(self._version.get_code, _preload_content=False, _request_timeout=_FIRST_ANSWER_S)
        if not isinstance(found, dict) or "gitVersion" not in found:
            raise UnreachableError("what answers is no API server")
        return str(found["gitVersion"])

    def user(self) -> str | None:
        """Returns the name by which the server knows who asks; None where it can't say (before Kubernetes 1.28)."""
        try:
            found = self._review("authentication.k8s.io", "SelfSubjectReview", {})
        except RefusedError as error:
            if error.status != 404:
                raise
            return None
        return str(found["status"]["userInfo"]["username"])

    def may(self, access: Access) -> bool:
        """Returns whether who asks may do that in the namespace."""
        resource, _, part = access.resource.partition("/")
        attributes = {
            "namespace": self.place.namespace,
            "verb": access.verb,
            "group": access.group,
            "resource": resource,
            **({"subresource": part} if part else {}),
        }
        found = self._review("authorization.k8s.io", "SelfSubjectAccessReview", {"resourceAttributes": attributes})
        return bool(found["status"]["allowed"])

    def serves(self, kind: Kind) -> bool:
        """Returns whether the server has objects of that kind, which must not be one of the oldest."""
        try:
            found = self._ask(
                self._custom.get_api_resources, group=kind.group, version=kind.version, _preload_content=False
            )
        except RefusedError as error:
            if error.status != 404:
                raise
            return False
        return any(resource["name"] == kind.plural for resource in found.get("resources") or [])

    def find(self, kind: Kind, name: str) -> Manifest | None:
        """Returns an object of the namespace, or of the cluster; None where there is none of that name."""
        path: dict[str, Any] = {"namespace": self.place.namespace} if kind.is_namespaced else {}
        if kind.group:
            path |= {"group": kind.group, "version": kind.version, "plural": kind.plural}
        functions: dict[Kind, Callable[..., Any]] = {
            NAMESPACE: self._core.read_namespace,
            SERVICE_ACCOUNT: self._core.read_namespaced_service_account,
            CLAIM: self._core.read_namespaced_persistent_volume_claim,
            SECRET: self._core.read_namespaced_secret,
        }
        custom = self._custom
        of_group = custom.get_namespaced_custom_object if kind.is_namespaced else custom.get_cluster_custom_object
        try:
            found: Manifest = self._ask(functions.get(kind, of_group), name=name, _preload_content=False, **path)
        except RefusedError as error:
            if error.status != 404:
                raise
            return None
        return found

    def everywhere(self, kind: Kind, selector: str) -> list[Manifest]:
        """Returns the objects with those labels in all namespaces; of a kind that isn't one of the oldest."""
        found = self._ask(
            self._custom.list_cluster_custom_object,
            group=kind.group,
            version=kind.version,
            plural=kind.plural,
            label_selector=selector,
            _preload_content=False,
        )
        items: list[Manifest] = found.get("items") or []
        return items

    def _review(self, group: str, kind: str, spec: Manifest) -> Manifest:
        """Returns what the server answers to a question that is asked by making an object, which it doesn't keep."""
        found: Manifest = self._ask(
            self._custom.create_cluster_custom_object,
            group=group,
            version="v1",
            plural=f"{kind.lower()}s",
            body={"apiVersion": f"{group}/v1", "kind": kind, "spec": spec},
            _preload_content=False,
        )
        return found

    def _list(self, function: Callable[..., Any], selector: str, *group: str, **more: Any) -> list[Manifest]:
        if group:
            more |= {"group": group[0], "version": group[1]}
        found = self._ask(function, namespace=self.place.namespace, label_selector=selector, **more)
        items: list[Manifest] = found.get("items") or []
        return items

    def _delete(self, function: Callable[..., Any], **arguments: Any) -> None:
        try:
            self._ask(function, **arguments)
        except RefusedError as error:
            if error.status != 404:
                raise

    def _ask(self, function: Callable[..., Any], *, is_text: bool = False, **arguments: Any) -> Any:
        """Returns the answer: JSON as plain values, or the open response where it is a text."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        arguments.setdefault("_request_timeout", (_CONNECT_S, _READ_S))
        try:
            response = function(**arguments)
            if arguments.get("_preload_content", True):
                return response
            if response.status >= 400:
                raise _refused(response.status, response.read())
            return response if is_text else json.loads(response.read())
        except ApiException as error:
            raise _refused(error.status or 0, str(error.body or error.reason).encode()) from error
        except (HTTPError, OSError, ValueError) as error:
            raise UnreachableError(_cause(error)) from error


def connect(place: Place) -> KubeApi:
    """Returns the API server that the kubeconfig names, or the one of the pod that this runs in.

    Raises:
        ConfigError: the client isn't installed, or it isn't said where the server is.
    """
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise ConfigError("--to k8s: needs the kubernetes client; pip install 'graftstack[k8s]'") from error
    configuration = client.Configuration()
    try:
        # What the client takes for the default was read when it was imported.
        file = os.environ.get("KUBECONFIG")
        config.load_kube_config(file, context=place.context, client_configuration=configuration)
    except (yaml.YAMLError, OSError, TypeError, AttributeError, ValueError) as error:  # what it holds is no kubeconfig
        where = f"KUBECONFIG={file}" if file else "~/.kube/config"
        raise ConfigError(f"--to k8s: {where} can't be read ({reason(error)}); correct it") from error
    except config.ConfigException as error:
        if place.context is not None:
            raise ConfigError(
                f"k8s.context={place.context}: {reason(error)}; see kubectl config get-contexts"
            ) from error
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            message = f"no cluster is configured ({reason(error)})"
            raise ConfigError(f"--to k8s: {message}; set KUBECONFIG, or ask for a kubeconfig") from error
    configuration.retries = False  # a cluster that isn't there is said at once; whoever follows a job tries again
    return KubeApi(configuration, place)


def explained(error: RefusedError | UnreachableError, place: Place) -> GraftstackError:
    """Returns what the user is told of an answer: one line with the key and the remedy."""
    text = reason(error)
    if isinstance(error, UnreachableError):
        return BadInputError(f"--to k8s: the API server doesn't answer ({text}); see {place.kubectl('get rayjobs')}")
    subject, problem, remedy = "--to k8s", f"refused ({text})", "correct that"
    is_stranger = error.status == 401 or (error.status == 403 and _ANONYMOUS in text)
    match error.status:
        case _ if is_stranger:
            problem = f"the API server doesn't know who you are ({text})"
            remedy = f"log in anew, until {place.kubectl('get rayjobs')} works"
        case 404 if error.kind == "namespaces":
            subject, problem = f"k8s.namespace={place.namespace}", "there is none"
            remedy = "kubectl apply -k k8s/base makes it, or name another"
        case 404:
            problem = "the cluster has no RayJobs of ray.io/v1"
            remedy = "install the KubeRay operator, 1.4 or newer (k8s/README.md)"
        case 403 if "exceeded quota" in text:
            subject, remedy = f"k8s.namespace={place.namespace}", "ask for fewer or smaller pods, or for more quota"
        case 403 if _FORBIDDEN.search(text):
            subject, remedy = f"k8s.namespace={place.namespace}", "ask for the role graftstack-submitter of k8s/base"
        case 400 if "unknown field" in text:
            remedy = "say which KubeRay it is, such as k8s.kuberay=1.5, or upgrade its CRDs"
        case status if status >= 500 or status == 429:
            problem, remedy = f"the API server fails with {status} ({text})", "try again later"
    return BadInputError(f"{subject}: {problem}; {remedy}")


def _dry(dry_run: bool) -> dict[str, Any]:  # noqa: FBT001 - named where it is called
    return {"dry_run": "All"} if dry_run else {}


def _refused(status: int, body: bytes) -> RefusedError:
    """Reads a Status of the API; what isn't one comes from a proxy, or from a server that has no such API."""
    text = body.decode(errors="replace").strip()
    try:
        found = json.loads(text)
        message, details = str(found.get("message") or found.get("reason")), found.get("details") or {}
    except (ValueError, AttributeError):
        return RefusedError(status, text or "no answer")
    kind = str(details.get("kind") or "")
    if status == 404 and re.match(r'namespaces "', message):
        kind = "namespaces"
    return RefusedError(status, " ".join(message.split()), kind=kind)


def _lines(response: Any) -> Iterator[str]:
    """Yields whole lines of a body that comes in pieces."""
    from urllib3.exceptions import HTTPError

    rest = b""
    try:
        for piece in response.stream(amt=None, decode_content=False):
            *whole, rest = (rest + piece).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
    except (HTTPError, OSError) as error:
        raise UnreachableError(_cause(error)) from error
    if rest:
        yield rest.decode(errors="replace")


def _cause(error: BaseException) -> str:
    """Returns what lies at the bottom of an error of a connection."""
    inner = getattr(error, "reason", None)
    return _cause(inner) if isinstance(inner, BaseException) else reason(error)
