"""The doctor on Kubernetes: each fault is put into a cluster that is sound otherwise; client and wire are real."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.findings import is_fault
from tests.unit.kube_server import ApiServer, serving, write_kubeconfig
from tests.unit.test_kustomize import of_kind

from graftstack.cli import main
from graftstack.doctor import kube_objects
from graftstack.doctor.finding import Finding
from graftstack.doctor.kubernetes import examine_kubernetes, read_words
from graftstack.submit.kube_api import Access

ROOT = Path(__file__).resolve().parents[2]
CRD_DIR = os.environ.get("KUBERAY_CRD_DIR")

CORE = "/api/v1/namespaces"
CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rayjobs.ray.io"
RAY = "/apis/ray.io/v1"
DEPLOYMENTS = "/apis/apps/v1/deployments"
KUEUE = "/apis/kueue.x-k8s.io/v1beta2"
QUEUE = f"{KUEUE}/namespaces/graftstack/localqueues/main"
CLUSTER_QUEUE = f"{KUEUE}/clusterqueues/shared"
CLAIM = f"{CORE}/graftstack/persistentvolumeclaims/graftstack-storage"
ACCOUNT = f"{CORE}/graftstack/serviceaccounts/graftstack"
PRIORITY = "/apis/scheduling.k8s.io/v1/priorityclasses/graftstack-batch"
JOBS = f"{RAY}/namespaces/graftstack/rayjobs"

FORBIDDEN = {"message": 'x is forbidden: User "ann" cannot get resource "x"', "reason": "Forbidden"}

# The fields that are in the definition of each release, next to those that all have.
SINCE = {"1.4": [], "1.5": ["authOptions"], "1.6": ["upgradeStrategy"], "1.7": ["networkPolicy", "tlsOptions"]}


def definition(kuberay: str = "1.7") -> dict[str, Any]:
    """A definition of RayJobs as a release has it, with as many fields as matter here."""
    releases = [release for release in SINCE if release <= kuberay]
    cluster = {field: {} for release in releases for field in SINCE[release]} | {"headGroupSpec": {}}
    job = {"entrypoint": {}, "rayClusterSpec": {"properties": cluster}}
    if kuberay >= "1.5":
        job["deletionStrategy"] = {}
    if kuberay >= "1.6":
        job["preRunningDeadlineSeconds"] = {}
    schema = {"openAPIV3Schema": {"properties": {"spec": {"properties": job}}}}
    return {
        "metadata": {"name": "rayjobs.ray.io"},
        "spec": {"versions": [{"name": "v1", "served": True, "schema": schema}]},
        "status": {"conditions": [{"type": "Established", "status": "True"}]},
    }


def operator(image: str = "quay.io/kuberay/operator:v1.7.0", available: int = 1) -> dict[str, Any]:
    return {
        "metadata": {"name": "kuberay-operator", "namespace": "kuberay"},
        "spec": {"template": {"spec": {"containers": [{"name": "kuberay-operator", "image": image}]}}},
        "status": {"availableReplicas": available} if available else {},
    }


def active(status: str, reason: str = "Ready", message: str = "Can admit new workloads") -> dict[str, Any]:
    return {"conditions": [{"type": "Active", "status": status, "reason": reason, "message": message}]}


def claim(phase: str = "Bound", mode: str = "ReadWriteMany") -> dict[str, Any]:
    return {"spec": {"accessModes": [mode]}, "status": {"phase": phase}}


def sound() -> dict[str, Any]:
    """What k8s/base and k8s/queues make, on a cluster with KubeRay and Kueue."""
    queue = {"metadata": {"name": "main"}, "spec": {"clusterQueue": "shared"}, "status": active("True")}
    return {
        "/version/": {"gitVersion": "v1.34.1", "major": "1", "minor": "34"},
        f"{CORE}/graftstack": {"metadata": {"name": "graftstack"}, "status": {"phase": "Active"}},
        CRD: definition(),
        RAY: {"resources": [{"name": "rayjobs"}, {"name": "rayjobs/status"}, {"name": "rayclusters"}]},
        DEPLOYMENTS: {"items": [operator()]},
        KUEUE: {"resources": [{"name": "localqueues"}, {"name": "clusterqueues"}]},
        QUEUE: queue,
        CLUSTER_QUEUE: {"metadata": {"name": "shared"}, "status": active("True")},
        CLAIM: claim(),
        ACCOUNT: {"metadata": {"name": "graftstack"}},
        PRIORITY: {"metadata": {"name": "graftstack-batch"}, "value": -100},
        JOBS: {"items": []},
    }


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with serving(tmp_path / "kubeconfig") as found:
        found.objects = sound()
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield found


def examine(*words: str) -> dict[str, Finding]:
    """The findings for jobs with these words, which wait in the queue ``main`` unless they say otherwise."""
    import kubernetes  # noqa: F401 - loading takes as long as the machine is busy; what is timed is the waiting

    began = time.monotonic()
    findings = examine_kubernetes(read_words(["k8s.queue=main", *words]))
    print(f"named after {time.monotonic() - began:.2f} s")
    assert time.monotonic() - began < 5
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


def test_a_sound_cluster_has_no_fault_and_keeps_nothing(server: ApiServer):
    found = examine()
    assert [finding for finding in found.values() if finding.status != "ok"] == []
    assert found["API server"].detail == "Kubernetes v1.34.1; it knows you as ann"
    assert list(found)[:5] == ["kubernetes client", "API server", "access", "namespace", "RayJobs"]
    assert {"KubeRay's version", "operator", "service account", "storage claim", "queue"} < found.keys()
    assert server.objects == sound()


class TestReaching:
    def test_the_client_is_not_installed(self):
        program = "import importlib.util as util, sys; find = util.find_spec; "
        program += "util.find_spec = lambda name, *_: None if name == 'kubernetes' else find(name); "
        program += "from graftstack.cli import main; sys.exit(main(['doctor', '--to', 'k8s', '--json']))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        (finding,) = json.loads(done.stdout)
        assert (finding["name"], finding["fix"]) == ("kubernetes client", "uv pip install 'graftstack[k8s]'")

    def test_no_kubeconfig(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
        is_fault(examine()["kubeconfig"], "broken", "no cluster is configured", "set KUBECONFIG")

    @pytest.mark.parametrize("text", ["[", "hello", "clusters: 3", "\0"])
    def test_a_kubeconfig_that_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
        (tmp_path / "kubeconfig").write_text(text)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        assert examine()["kubeconfig"].status == "broken"

    def test_nobody_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        write_kubeconfig(tmp_path / "kubeconfig", 1)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        is_fault(examine()["API server"], "broken", "doesn't answer (", "refused", "kubectl -n graftstack")

    def test_it_knows_nobody_of_that_name(self, server: ApiServer):
        server.refuse("POST", ".*/selfsubjectreviews", 401, {"message": "Unauthorized"})
        is_fault(examine()["API server"], "broken", "doesn't know who you are", "log in anew")

    def test_it_lets_in_those_whom_it_does_not_know(self, server: ApiServer):
        message = 'selfsubjectreviews is forbidden: User "system:anonymous" cannot create resource "selfsubjectreviews"'
        server.refuse("POST", ".*/selfsubjectreviews", 403, {"message": message, "reason": "Forbidden"})
        is_fault(examine()["API server"], "broken", "doesn't know who you are", "log in anew")

    def test_what_listens_never_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            write_kubeconfig(tmp_path / "kubeconfig", listener.getsockname()[1])
            monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
            is_fault(examine()["API server"], "broken", "doesn't answer (")

    def test_a_server_too_old_to_say_who_asks(self, server: ApiServer):
        server.refuse("POST", ".*/selfsubjectreviews", 404, "404 page not found")
        found = examine()
        assert found["API server"].detail == "Kubernetes v1.34.1; it knows you as somebody"
        assert all(finding.status == "ok" for finding in found.values())

    def test_another_server(self, server: ApiServer):
        server.objects["/version/"] = {"version": "12"}
        is_fault(examine()["API server"], "broken", "what answers is no API server")

    def test_an_object_that_is_none_hides_nothing_else(self, server: ApiServer):
        server.objects[DEPLOYMENTS] = {"items": [{"kind": "Deployment"}]}
        found = examine()
        is_fault(found["operator"], "broken", "can't be checked: KeyError")
        assert found["queue"].status == "ok"

    def test_what_fails_for_a_while_hides_nothing_else(self, server: ApiServer):
        server.refuse("GET", CLAIM, 503, "upstream gone")
        found = examine()
        is_fault(found["storage claim"], "broken", "fails with 503", "try again later")
        assert found["queue"].status == "ok"


class TestAccess:
    def test_a_right_is_missing(self, server: ApiServer):
        server.denied = {("create", "rayjobs"), ("get", "pods/log")}
        is_fault(examine()["access"], "broken", "may not create rayjobs, get pods/log", "the role graftstack-submitter")

    def test_the_role_of_the_repository_is_enough(self):
        objects = list(yaml.safe_load_all((ROOT / "k8s" / "base" / "rbac.yaml").read_text()))
        granted = {
            Access(verb, resource, group)
            for rule in next(found for found in objects if found["kind"] == "Role")["rules"]
            for verb in rule["verbs"]
            for resource in rule["resources"]
            for group in rule["apiGroups"]
        }
        assert set(kube_objects.needed_access(queue=True)) <= granted

    def test_what_may_not_be_read_is_said_once(self, server: ApiServer):
        for path in (DEPLOYMENTS, CLAIM, ACCOUNT, PRIORITY, CLUSTER_QUEUE):
            server.refuse("GET", path, 403, FORBIDDEN)
        found = examine("k8s.priority_class=graftstack-batch")
        names = "operator, priority class, service account, storage claim"
        is_fault(found["not looked at"], "warn", f"ann may not read: {names}", "ask an administrator")
        assert found["queue"].status == "ok"
        assert "operator" not in found

    def test_an_ordinary_user_learns_of_rayjobs_and_of_the_namespace(self, server: ApiServer):
        server.refuse("GET", CRD, 403, FORBIDDEN)
        server.refuse("GET", f"{CORE}/graftstack", 403, FORBIDDEN)
        found = examine()
        assert (found["RayJobs"].status, found["namespace"].status) == ("ok", "ok")
        is_fault(found["not looked at"], "warn", "KubeRay's version")
        del server.objects[RAY]
        is_fault(examine()["RayJobs"], "broken", "none of ray.io/v1")
        missing = {"message": 'namespaces "graftstack" not found', "details": {"kind": "namespaces"}}
        server.refuse("POST", f"{CORE}/graftstack/configmaps", 404, missing)
        is_fault(examine()["namespace"], "broken", "there is no graftstack")


class TestNamespace:
    def test_it_is_missing(self, server: ApiServer):
        found = examine("k8s.namespace=nowhere")
        is_fault(found["namespace"], "broken", "there is no nowhere", "kubectl apply -k k8s/base", "k8s.namespace=NAME")
        assert not {"storage claim", "service account", "queue"} & found.keys()

    def test_it_is_being_deleted(self, server: ApiServer):
        server.objects[f"{CORE}/graftstack"]["status"]["phase"] = "Terminating"
        is_fault(examine()["namespace"], "broken", "is being deleted")


class TestKubeRay:
    def test_it_is_not_installed(self, server: ApiServer):
        for path in (CRD, RAY, JOBS):
            del server.objects[path]
        server.objects[DEPLOYMENTS] = {"items": []}
        found = examine()
        is_fault(found["RayJobs"], "broken", "none of ray.io/v1", "install the KubeRay operator, 1.4 or newer")
        is_fault(found["operator"], "broken", "no deployment", "install the KubeRay operator")
        assert "KubeRay's version" not in found

    def test_only_an_older_version_of_rayjobs_is_served(self, server: ApiServer):
        server.objects[CRD]["spec"]["versions"][0]["name"] = "v1alpha1"
        is_fault(examine()["RayJobs"], "broken", "other versions than ray.io/v1")

    def test_the_definition_is_not_in_force(self, server: ApiServer):
        server.objects[CRD]["status"]["conditions"][0]["status"] = "False"
        is_fault(examine()["RayJobs"], "broken", "isn't in force", "kubectl describe crd")

    @pytest.mark.parametrize(("release", "status"), [("1.4", "broken"), ("1.5", "broken"), ("1.6", "warn")])
    def test_an_older_release_is_known_by_its_fields(self, server: ApiServer, release: str, status: str):
        server.objects[CRD] = definition(release)
        server.objects[DEPLOYMENTS] = {"items": [operator(f"kuberay/operator:v{release}.2")]}
        found = examine()
        is_fault(found["KubeRay's version"], status, f"KubeRay {release}", f"k8s.kuberay={release}")
        assert found["operator"].status == "ok"

    @pytest.mark.skipif(CRD_DIR is None, reason="needs the definitions of a KubeRay release in KUBERAY_CRD_DIR")
    def test_a_published_definition_is_that_of_its_release(self):
        folder = Path(str(CRD_DIR))
        documents = [found for path in folder.glob("*.yaml") for found in yaml.safe_load_all(path.read_text())]
        (found,) = [document for document in documents if document["metadata"]["name"] == "rayjobs.ray.io"]
        assert kube_objects.check_definition(found).status == "ok"
        release = re.search(r"\d+\.\d+", folder.name)
        assert kube_objects.kuberay_of(found) in ([release[0]] if release else SINCE)

    def test_helm_left_the_definitions_behind(self, server: ApiServer):
        server.objects[CRD] = definition("1.6")
        finding = examine()["operator"]
        is_fault(finding, "warn", "kuberay/kuberay-operator is 1.7.0", "that of 1.6", "kubectl apply --server-side")

    def test_a_newer_operator_whose_definitions_look_like_the_newest_known(self, server: ApiServer):
        server.objects[DEPLOYMENTS] = {"items": [operator("quay.io/kuberay/operator:v1.9.0")]}
        assert examine("k8s.kuberay=1.9")["operator"].status == "ok"
        assert examine("k8s.kuberay=1.9")["KubeRay's version"].status == "ok"

    def test_an_operator_that_is_older_than_the_definitions(self, server: ApiServer):
        server.objects[DEPLOYMENTS] = {"items": [operator("quay.io/kuberay/operator:v1.5.1")]}
        is_fault(examine()["operator"], "warn", "is 1.5.1", "that of 1.7", "upgrade the operator", "--version 1.7.0")

    def test_jobs_are_judged_by_the_release_that_they_are_rendered_for(self, server: ApiServer):
        server.objects[CRD] = definition("1.5")
        assert examine("k8s.kuberay=1.5")["KubeRay's version"].status == "ok"
        is_fault(examine("k8s.pending_deadline_s=null")["KubeRay's version"], "warn", "rendered for 1.7")
        server.objects[CRD] = definition("1.4")
        is_fault(examine("k8s.pending_deadline_s=null")["KubeRay's version"], "broken", "k8s.kuberay=1.4")

    def test_the_operator_is_down(self, server: ApiServer):
        server.objects[DEPLOYMENTS] = {"items": [operator(available=0)]}
        is_fault(examine()["operator"], "broken", "has no pod that is ready", "kubectl -n kuberay describe pods")

    def test_an_image_without_a_version(self, server: ApiServer):
        server.objects[DEPLOYMENTS] = {"items": [operator("registry:5000/operator@sha256:12")]}
        assert examine()["operator"].detail == "kuberay/kuberay-operator runs"


class TestQueue:
    def test_none_is_asked_for(self, server: ApiServer):
        assert "queue" not in examine("k8s.queue=null")

    def test_no_kueue(self, server: ApiServer):
        del server.objects[KUEUE]
        is_fault(examine()["queue"], "broken", "the cluster has no Kueue", "leave k8s.queue out")

    def test_an_older_kueue(self, server: ApiServer):
        for path in (KUEUE, QUEUE, CLUSTER_QUEUE):
            server.objects[path.replace("v1beta2", "v1beta1")] = server.objects.pop(path)
        assert examine()["queue"].status == "ok"

    def test_it_is_missing(self, server: ApiServer):
        is_fault(examine("k8s.queue=mian")["queue"], "broken", "no LocalQueue mian", "kubectl get localqueues")

    def test_its_cluster_queue_is_inactive(self, server: ApiServer):
        message = "Can't admit new workloads: references missing ResourceFlavor(s): gpu."
        server.objects[CLUSTER_QUEUE]["status"] = active("False", "FlavorNotFound", message)
        finding = examine()["queue"]
        is_fault(finding, "broken", f"ClusterQueue shared admits nothing: {message} (FlavorNotFound)")
        assert finding.fix == "kubectl describe clusterqueue shared"

    def test_its_cluster_queue_is_missing(self, server: ApiServer):
        del server.objects[CLUSTER_QUEUE]
        message = "Can't submit new workloads to clusterQueue"
        server.objects[QUEUE]["status"] = active("False", "ClusterQueueDoesNotExist", message)
        is_fault(examine()["queue"], "broken", "LocalQueue main admits nothing", "correct spec.clusterQueue")

    def test_it_is_stopped(self, server: ApiServer):
        server.objects[QUEUE]["status"] = active("False", "Stopped", "LocalQueue is stopped")
        is_fault(examine()["queue"], "broken", "LocalQueue is stopped", "spec.stopPolicy of LocalQueue main to None")


class TestObjects:
    def test_no_service_account(self, server: ApiServer):
        del server.objects[ACCOUNT]
        is_fault(examine()["service account"], "broken", "there is no graftstack", "k8s.service_account=null")

    @pytest.mark.parametrize(
        ("found", "status", "words"),
        [
            (None, "broken", "k8s.storage_claim=null"),
            (claim(phase="Pending"), "warn", "kubectl describe pvc graftstack-storage says what it waits for"),
            (claim(phase="Lost"), "broken", "has lost its volume"),
            (claim(mode="ReadWriteOnce"), "warn", "fine on a cluster of one node; pods on other nodes can't mount it"),
            (claim(mode="ReadWriteOncePod"), "broken", "ReadWriteOncePod: pods can't share it"),
        ],
    )
    def test_the_storage_claim(self, server: ApiServer, found: Any, status: str, words: str):
        del server.objects[CLAIM]
        if found is not None:
            server.objects[CLAIM] = found
        is_fault(examine()["storage claim"], status, words)

    def test_the_claim_of_a_cluster_on_one_machine(self, server: ApiServer):
        """As k8s/overlays/dev makes it, before and after its first pod."""
        (made,) = of_kind("overlays/dev", "PersistentVolumeClaim")
        server.objects[CLAIM] = made | {"status": {"phase": "Bound"}}
        finding = examine()["storage claim"]
        is_fault(finding, "warn", "fine on a cluster of one node")
        assert "Bound" not in finding.detail
        server.objects[CLAIM] = made | {"status": {"phase": "Pending"}}
        words = ("graftstack-storage is ReadWriteOnce: fine", "can't mount it, and Pending: no volume yet")
        is_fault(examine()["storage claim"], "warn", *words)

    def test_the_priority_class(self, server: ApiServer):
        assert "priority class" not in examine()
        word = "k8s.priority_class=graftstack-batch"
        assert examine(word)["priority class"].status == "ok"
        del server.objects[PRIORITY]
        is_fault(examine(word)["priority class"], "broken", "there is no graftstack-batch", "leave k8s.priority_class")

    def test_what_jobs_do_without_is_not_looked_for(self, server: ApiServer):
        del server.objects[CLAIM], server.objects[ACCOUNT]
        found = examine("k8s.storage_claim=null", "k8s.service_account=null", "k8s.image=mine:ray2.60.0")
        assert not {"storage claim", "service account"} & found.keys()
        assert all(finding.status == "ok" for finding in found.values())

    def test_what_jobs_call_otherwise_is_looked_for_by_that_name(self, server: ApiServer):
        server.objects[CLAIM.replace("graftstack-storage", "ours")] = server.objects.pop(CLAIM)
        assert examine()["storage claim"].status == "broken"
        assert examine("k8s.storage_claim=ours")["storage claim"].detail == "ours is bound"
        assert examine("k8s.service_account=ann")["service account"].detail == "there is no ann: no pod would start"

    def test_the_secret_with_a_token_is_missing(self, server: ApiServer):
        def job(cluster: str, **more: Any) -> dict[str, Any]:
            status = {"rayClusterName": cluster, "jobDeploymentStatus": "Running", **more}
            return {"spec": {"rayClusterSpec": {"authOptions": {"mode": "token"}}}, "status": status}

        open_job = {"spec": {"rayClusterSpec": {}}, "status": {"rayClusterName": "open"}}
        over = job("over", jobDeploymentStatus="Complete")
        server.objects[JOBS] = {"items": [job("first"), job("second"), open_job, over, {"spec": {}}]}
        server.objects[f"{CORE}/graftstack/secrets/first"] = {"data": {"auth_token": "c2VjcmV0"}}
        finding = examine()["token Secrets"]
        is_fault(finding, "broken", "no Secret second with an auth_token", "k8s.token_auth=false")
        server.objects[f"{CORE}/graftstack/secrets/second"] = {"data": {"auth_token": "c2VjcmV0"}}
        finding = examine()["token Secrets"]
        assert (finding.status, finding.detail) == ("ok", "2, one for each cluster")


def test_the_command_ends_with_what_it_found(server: ApiServer, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--to", "k8s", "k8s.queue=main", "--json"]) == 0
    assert all(finding["status"] == "ok" for finding in json.loads(capsys.readouterr().out))
    del server.objects[QUEUE]
    assert main(["doctor", "k8s.queue=main", "--to", "k8s"]) == 1
    assert "no LocalQueue main" in capsys.readouterr().out
