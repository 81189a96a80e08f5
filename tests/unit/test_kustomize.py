"""The objects around jobs: they render, fit each other, and fit what is rendered for a job."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftstack.config.k8s import K8sConfig, ray_version_of
from graftstack.config.kubernetes_syntax import quantity

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
FOLDERS = ("base", "queues", "overlays/dev", "overlays/gpu", "overlays/spot")
CLUSTER_WIDE = {"Namespace", "PriorityClass", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass"}

Manifest = dict[str, Any]


@cache
def kustomized(folder: str) -> list[Manifest]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl isn't installed")
    done = subprocess.run(["kubectl", "kustomize", str(K8S / folder)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def of_kind(folder: str, kind: str) -> list[Manifest]:
    return [manifest for manifest in kustomized(folder) if manifest["kind"] == kind]


def golden(name: str) -> Manifest:
    _, job = yaml.safe_load_all((K8S / f"rendered/{name}.yaml").read_text())
    found: Manifest = job
    return found


def templates(job: Manifest) -> Iterator[tuple[Manifest, int]]:
    """Yields the pods of a job, and how many of each there are at the least."""
    cluster = job["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"]["template"], 1
    yield job["spec"]["submitterPodTemplate"], 1
    for group in cluster["workerGroupSpecs"]:
        yield group["template"], group["replicas"]


def matches(selector: Manifest, labels: Manifest) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_renders_objects_of_one_name_each(folder: str):
    names = [(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in kustomized(folder)]
    assert len(names) >= 3
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_that_is_namespaced_is_in_the_namespace_of_the_jobs(folder: str):
    for item in kustomized(folder):
        wanted = None if item["kind"] in CLUSTER_WIDE else K8sConfig.namespace
        assert item["metadata"].get("namespace") == wanted, item


def test_every_folder_is_rendered():
    assert sorted(path.parent.relative_to(K8S).as_posix() for path in K8S.rglob("kustomization.yaml")) == sorted(
        FOLDERS
    )


@pytest.mark.parametrize("folder", ["base", "overlays/dev", "overlays/gpu", "overlays/spot"])
def test_a_job_finds_what_its_defaults_name(folder: str):
    found = {(item["kind"], item["metadata"]["name"]) for item in kustomized(folder)}
    assert ("Namespace", K8sConfig.namespace) in found
    assert ("ServiceAccount", K8sConfig.service_account) in found
    assert ("PersistentVolumeClaim", K8sConfig.storage_claim) in found
    assert (
        "PriorityClass",
        golden("finetune-gpu")["spec"]["submitterPodTemplate"]["spec"]["priorityClassName"],
    ) in found


def test_all_pods_of_a_job_can_write_to_the_claim():
    (claim,) = of_kind("base", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_machine_of_ones_own_needs_no_prometheus_and_no_shared_disk():
    assert of_kind("base", "PodMonitor") != []
    assert of_kind("overlays/dev", "PodMonitor") == []
    (claim,) = of_kind("overlays/dev", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_pods_get_no_token_by_default():
    (account,) = of_kind("base", "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def test_submitters_may_do_what_submitting_does_and_no_more():
    (role,) = of_kind("base", "Role")
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    needed = {
        *(("rayjobs", verb) for verb in ("create", "get", "list", "delete")),
        *(("configmaps", verb) for verb in ("create", "patch", "delete")),
        *((resource, "list") for resource in ("pods", "events", "workloads")),
        ("pods/log", "get"),
    }
    assert needed <= allowed
    assert not {("secrets", "get"), ("pods", "create"), ("pods/exec", "create")} & allowed
    assert "*" not in str(role["rules"])


class TestNetwork:
    def policies(self, labels: Manifest) -> list[Manifest]:
        found = [item["spec"] for item in of_kind("base", "NetworkPolicy")]
        return [policy for policy in found if matches(policy["podSelector"], labels)]

    def ports(self, labels: Manifest) -> set[tuple[str, int]]:
        rules = [rule for policy in self.policies(labels) for rule in policy.get("egress", [])]
        return {(port["protocol"], port["port"]) for rule in rules for port in rule.get("ports", [])}

    def test_every_pod_of_a_job_is_under_a_policy_and_can_look_up_names(self):
        for template, _ in templates(golden("finetune")):
            labels = template["metadata"]["labels"]
            assert {"Ingress", "Egress"} <= set(self.policies(labels)[0]["policyTypes"])
            assert {("UDP", 53), ("TCP", 53), ("TCP", 443)} <= self.ports(labels)

    def test_the_pods_of_a_job_reach_each_other_on_all_ports(self):
        labels = next(templates(golden("finetune")))[0]["metadata"]["labels"]
        (policy,) = self.policies(labels)
        for direction, peer in (("ingress", "from"), ("egress", "to")):
            assert any(
                "ports" not in rule and matches(rule[peer][0]["podSelector"], labels) for rule in policy[direction]
            )

    def test_only_a_head_reaches_the_api_server(self):
        labels = next(templates(golden("finetune")))[0]["metadata"]["labels"]
        assert ("TCP", 6443) in self.ports({**labels, "ray.io/node-type": "head"})
        assert ("TCP", 6443) not in self.ports({**labels, "ray.io/node-type": "worker"})

    def test_nobody_comes_in_from_anywhere(self):
        for policy in of_kind("base", "NetworkPolicy"):
            for rule in policy["spec"].get("ingress", []):
                assert all(peer["podSelector"]["matchLabels"] for peer in rule["from"])


class TestQueues:
    @pytest.mark.parametrize("folder", ["queues", "overlays/gpu", "overlays/spot"])
    def test_a_queue_has_flavors_that_are_there(self, folder: str):
        (local,), (queue,) = of_kind(folder, "LocalQueue"), of_kind(folder, "ClusterQueue")
        flavors = {flavor["metadata"]["name"] for flavor in of_kind(folder, "ResourceFlavor")}
        assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
        used = [flavor for group in queue["spec"]["resourceGroups"] for flavor in group["flavors"]]
        assert {flavor["name"] for flavor in used} == flavors
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]

    @pytest.mark.parametrize(
        ("folder", "name"), [("overlays/gpu", "finetune-gpu"), ("overlays/spot", "sweep-autoscaled-on-spot")]
    )
    def test_a_rendered_job_fits_into_its_quota(self, folder: str, name: str):
        job, (queue,), (local,) = golden(name), of_kind(folder, "ClusterQueue"), of_kind(folder, "LocalQueue")
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
        quota: dict[str, Any] = {}
        for group in queue["spec"]["resourceGroups"]:
            for resource in (each for flavor in group["flavors"] for each in flavor["resources"]):
                amount = quantity(resource["nominalQuota"])
                quota[resource["name"]] = quota.get(resource["name"], 0) + amount
        needed: dict[str, Any] = {}
        for template, num in templates(job):
            for key, amount in template["spec"]["containers"][0]["resources"]["requests"].items():
                needed[key] = needed.get(key, 0) + num * quantity(amount)
        assert needed.keys() <= quota.keys()
        assert [key for key in needed if needed[key] > quota[key]] == []

    def test_workers_on_spot_nodes_bear_their_taint_and_heads_keep_off(self):
        job = golden("sweep-autoscaled-on-spot")
        (flavor,) = [item for item in of_kind("overlays/spot", "ResourceFlavor") if "nodeTaints" in item["spec"]]
        worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
        assert worker["nodeSelector"] == flavor["spec"]["nodeLabels"]
        (taint,) = flavor["spec"]["nodeTaints"]
        assert {key: worker["tolerations"][0][key] for key in taint} == taint


class TestImage:
    def test_what_is_copied_is_there_and_isnt_ignored(self):
        copied = [
            source
            for line in (K8S / "Dockerfile").read_text().splitlines()
            if line.startswith("COPY ")
            for source in line.split()[1:-1]
        ]
        kept = (K8S / "Dockerfile.dockerignore").read_text().splitlines()
        assert "platform" in copied
        assert [source for source in copied if not (ROOT / source).exists() or f"!{source}" not in kept] == []

    def test_the_jobs_lie_where_the_entrypoint_looks(self):
        folder = re.search(r"^WORKDIR (\S+)$", (K8S / "Dockerfile").read_text(), re.MULTILINE)
        assert folder is not None
        for name in ("finetune", "stack-on-s3"):
            script = Path(golden(name)["spec"]["entrypoint"].split()[1])
            assert (ROOT / script.relative_to(folder[1])).is_file()

    @pytest.mark.parametrize("file", ["Dockerfile", "README.md", "rendered/finetune.yaml"])
    def test_tags_name_the_ray_that_is_pinned(self, file: str):
        pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        images = re.findall(r"\S+/graftstack:\S+", (K8S / file).read_text())
        assert pinned is not None
        assert images != []
        assert {ray_version_of(image.strip("'`")) for image in images} == {pinned[1]}


def test_the_readme_says_what_each_file_is_for():
    text = (K8S / "README.md").read_text()
    names = [path.relative_to(K8S).as_posix() for path in K8S.iterdir() if path.name not in ("README.md", "overlays")]
    names += [f"overlays/{path.name}" for path in (K8S / "overlays").iterdir()]
    names += [path.name for path in (K8S / "base").iterdir() if path.name != "kustomization.yaml"]
    assert [name for name in names if f"`{name}" not in text] == []
