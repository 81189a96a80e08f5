"""What an operator, a queue or an API server would refuse later is said at once, with the field and the fix."""

import copy
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from graftstack.config.compose import compose_job
from graftstack.config.k8s import K8sConfig
from graftstack.config.spec import Spec
from graftstack.errors import ConfigError
from graftstack.submit.manifest import to_manifest
from graftstack.submit.render import render
from graftstack.submit.rules import check_file, check_manifest

Manifest = dict[str, Any]

HEAD = "spec.rayClusterSpec.headGroupSpec"
WORKERS = "spec.rayClusterSpec.workerGroupSpecs"


@cache
def _sound(*, autoscales: bool, queue: str | None) -> Manifest:
    words = ["name=flowers", "resume=true", f"cluster.num_workers={'[1,4]' if autoscales else '2'}"]
    spec = Spec(job="finetune", config=compose_job("finetune", words), overrides=words)
    memory = {"worker_memory": "16Gi", "head_memory": "8Gi"}
    config = K8sConfig(image="graftstack:0.1.0-ray2.60.0", queue=queue, **memory)
    manifest: Manifest = to_manifest(render(spec, config).ray_job)
    return manifest


def sound(*, autoscales: bool = False, queue: str | None = None) -> Manifest:
    """A job in which nothing is wrong."""
    return copy.deepcopy(_sound(autoscales=autoscales, queue=queue))


def head(job: Manifest) -> Manifest:
    found: Manifest = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    return found


def workers(job: Manifest) -> Manifest:
    found: Manifest = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return found


def container(group: Manifest) -> Manifest:
    found: Manifest = group["template"]["spec"]["containers"][0]
    return found


def rule(policy: str, *, status: str = "SUCCEEDED", ttl: int = 0) -> Manifest:
    return {"policy": policy, "condition": {"jobStatus": status, "ttlSeconds": ttl}}


class Bad(NamedTuple):
    """A job with one fault."""

    damage: Callable[[Manifest], Any]
    path: str
    fix: str
    autoscales: bool = False
    queue: str | None = None


def put(path: str, value: Any) -> Callable[[Manifest], None]:
    """Sets the field at a dotted path, making what is on the way."""

    def damage(job: Manifest) -> None:
        *way, last = path.split(".")
        for key in way:
            job = job.setdefault(key, {})
        job[last] = value

    return damage


def rules(*given: Manifest, **more: Any) -> Callable[[Manifest], None]:
    """Gives the job rules of deletion in place of its shutdown."""

    def damage(job: Manifest) -> None:
        job["spec"] |= {"shutdownAfterJobFinishes": False, "deletionStrategy": {"deletionRules": list(given)}} | more

    return damage


def use_existing_cluster(job: Manifest) -> None:
    del job["spec"]["rayClusterSpec"]
    job["spec"] |= {"clusterSelector": {"ray.io/cluster": "shared"}, "backoffLimit": 0}


def more_groups(num: int) -> Callable[[Manifest], None]:
    def damage(job: Manifest) -> None:
        groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        groups += [groups[0] | {"groupName": f"more-{index}"} for index in range(num - 1)]

    return damage


NETWORK = "spec.rayClusterSpec.networkPolicy"
DNS = [{"ports": [{"port": 53, "protocol": "UDP"}]}]
ENV_V2 = {"name": "RAY_enable_autoscaler_v2", "value": "1"}

BAD = {
    # Names
    "long name": Bad(put("metadata.name", "a" * 48), "metadata.name", "shorten it by 1"),
    "name of capitals": Bad(put("metadata.name", "Flowers"), "metadata.name", "lower-case letters"),
    "name that begins with a digit": Bad(put("metadata.name", "1-flower"), "metadata.name", "beginning with a letter"),
    "generated name": Bad(put("metadata.generateName", "x-"), "metadata.generateName", "write metadata.name"),
    "old version": Bad(put("apiVersion", "ray.io/v1alpha1"), "apiVersion", "write apiVersion: ray.io/v1"),
    # The shape
    "misspelt field": Bad(put("spec.backofLimit", 2), "spec.backofLimit", "did you mean backoffLimit"),
    "number as text": Bad(put("spec.backoffLimit", "2"), "spec.backoffLimit", "a whole number, without quotes"),
    "text as number": Bad(
        lambda job: head(job)["rayStartParams"].update({"num-cpus": 0}), f"{HEAD}.rayStartParams.num-cpus", "in quotes"
    ),
    "unknown mode": Bad(put("spec.submissionMode", "Job"), "spec.submissionMode", "use K8sJobMode, HTTPMode"),
    "field that is gone": Bad(put("spec.deletionPolicy", "DeleteSelf"), "spec.deletionPolicy", "use deletionStrategy"),
    # The life of a job
    "shutdown and rules": Bad(
        rules(rule("DeleteCluster"), shutdownAfterJobFinishes=True),
        "spec.deletionStrategy.deletionRules",
        "leave shutdownAfterJobFinishes out",
    ),
    "both kinds of deletion": Bad(
        put("spec.deletionStrategy", {"deletionRules": [rule("DeleteSelf")], "onSuccess": {"policy": "DeleteSelf"}}),
        "spec.deletionStrategy.deletionRules",
        "leave out onSuccess and onFailure",
    ),
    "half of a pair": Bad(
        put("spec.deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}}),
        "spec.deletionStrategy.onFailure",
        "write onFailure",
    ),
    "empty deletion": Bad(put("spec.deletionStrategy", {}), "spec.deletionStrategy", "add deletionRules"),
    "deletion of nothing": Bad(
        put("spec.deletionStrategy", {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {"policy": "DeleteSelf"}}),
        "spec.deletionStrategy.onSuccess.policy",
        "leave one of them out",
    ),
    "job before its cluster": Bad(
        rules(rule("DeleteCluster", ttl=60), rule("DeleteSelf", ttl=10)),
        "spec.deletionStrategy.deletionRules[1].condition.ttlSeconds",
        "raise it to 60",
    ),
    "the same rule twice": Bad(
        rules(rule("DeleteSelf"), rule("DeleteSelf", ttl=9)), "spec.deletionStrategy.deletionRules[1]", "leave one"
    ),
    "rule of two conditions": Bad(
        rules({"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}),
        "spec.deletionStrategy.deletionRules[0].condition",
        "leave out jobStatus",
    ),
    "workers of an autoscaler": Bad(
        rules(rule("DeleteWorkers")),
        "spec.deletionStrategy.deletionRules[0].policy",
        "use DeleteCluster",
        autoscales=True,
    ),
    "time to live without shutdown": Bad(
        lambda job: job["spec"].update(shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=60),
        "spec.ttlSecondsAfterFinished",
        "set shutdownAfterJobFinishes: true",
    ),
    "negative time to live": Bad(put("spec.ttlSecondsAfterFinished", -1), "spec.ttlSecondsAfterFinished", "use 0"),
    "suspended without shutdown": Bad(
        lambda job: job["spec"].update(shutdownAfterJobFinishes=False, suspend=True),
        "spec.suspend",
        "set shutdownAfterJobFinishes: true",
    ),
    "suspended on a cluster that is there": Bad(
        lambda job: (use_existing_cluster(job), job["spec"].update(suspend=True)),
        "spec.clusterSelector",
        "leave out suspend",
    ),
    "retries on a cluster that is there": Bad(
        lambda job: (use_existing_cluster(job), job["spec"].update(backoffLimit=1)), "spec.backoffLimit", "set it to 0"
    ),
    "selector of nothing": Bad(
        lambda job: (use_existing_cluster(job), job["spec"].update(clusterSelector={"name": "x"})),
        "spec.clusterSelector",
        "write ray.io/cluster: NAME",
    ),
    "no cluster": Bad(lambda job: job["spec"].pop("rayClusterSpec"), "spec.rayClusterSpec", "describe one"),
    "retries of what isn't submitted": Bad(
        put("spec.submissionMode", "InteractiveMode"), "spec.backoffLimit", "use K8sJobMode"
    ),
    "submitter beside a sidecar": Bad(
        put("spec.submissionMode", "SidecarMode"), "spec.submitterPodTemplate", "leave it out"
    ),
    "deadline of nothing": Bad(put("spec.activeDeadlineSeconds", 0), "spec.activeDeadlineSeconds", "raise it"),
    "no entrypoint": Bad(put("spec.entrypoint", " "), "spec.entrypoint", "write the command"),
    "environment that isn't YAML": Bad(put("spec.runtimeEnvYAML", "a: [b"), "spec.runtimeEnvYAML", "KEY: VALUE"),
    "upgrade of a cluster of a job": Bad(
        put("spec.rayClusterSpec.upgradeStrategy", {"type": "Recreate"}),
        "spec.rayClusterSpec.upgradeStrategy",
        "leave it out",
    ),
    # The cluster
    "token without a version": Bad(
        lambda job: job["spec"]["rayClusterSpec"].pop("rayVersion"),
        "spec.rayClusterSpec.rayVersion",
        "write Ray's version, 2.52.0 or newer",
    ),
    "token with an old Ray": Bad(
        put("spec.rayClusterSpec.rayVersion", "2.51.1"), "spec.rayClusterSpec.rayVersion", "2.52.0 or newer"
    ),
    "version that an image left behind": Bad(
        lambda job: container(head(job)).update(image="graftstack:0.2.0-ray2.61.0"),
        "spec.rayClusterSpec.rayVersion",
        'write "2.61.0"',
    ),
    "token of Kubernetes": Bad(
        put("spec.rayClusterSpec.authOptions", {"mode": "token", "enableK8sTokenAuth": True}),
        "spec.rayClusterSpec.authOptions.enableK8sTokenAuth",
        "mode: token makes a token",
    ),
    "restart under autoscaler v2": Bad(
        lambda job: workers(job)["template"]["spec"].update(restartPolicy="Always"),
        f"{WORKERS}[0].template.spec.restartPolicy",
        "write Never",
        autoscales=True,
    ),
    "autoscaler v2 and no autoscaling": Bad(
        lambda job: container(head(job))["env"].append(ENV_V2),
        f"{HEAD}.template.spec.containers[0].env",
        "set enableInTreeAutoscaling: true",
    ),
    "autoscaler v2 twice": Bad(
        lambda job: container(head(job))["env"].append(ENV_V2),
        f"{HEAD}.template.spec.containers[0].env",
        "leave out the variable",
        autoscales=True,
    ),
    "idle time without autoscaler": Bad(
        lambda job: workers(job).update(idleTimeoutSeconds=9), f"{WORKERS}[0].idleTimeoutSeconds", "version: v2"
    ),
    "policy without names": Bad(
        put(NETWORK, {"mode": "DenyAll", "head": {"egressRules": DNS}}), f"{NETWORK}.worker.egressRules", "port 53"
    ),
    "rules that a policy doesn't need": Bad(
        put(NETWORK, {"mode": "DenyAllIngress", "head": {"egressRules": DNS}}), f"{NETWORK}.head.egressRules", "DenyAll"
    ),
    "policy of a group that isn't there": Bad(
        put(NETWORK, {"mode": "DenyAllIngress", "workerGroups": [{"groupName": "gpus"}]}),
        f"{NETWORK}.workerGroups[0].groupName",
        "use one of workers",
    ),
    "Redis by a variable": Bad(
        lambda job: container(head(job))["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}),
        f"{HEAD}.template.spec.containers[0].env",
        "use gcsFaultToleranceOptions",
    ),
    # The groups
    "no containers": Bad(
        lambda job: workers(job)["template"]["spec"].update(containers=[]),
        f"{WORKERS}[0].template.spec.containers",
        "add the container",
    ),
    "size said twice": Bad(lambda job: head(job).update(resources={"CPU": "1"}), f"{HEAD}.resources", "leave one"),
    "labels for ray start": Bad(
        lambda job: workers(job)["rayStartParams"].update(labels="a=b"),
        f"{WORKERS}[0].rayStartParams.labels",
        "workerGroupSpecs[0].labels",
    ),
    "label that is none": Bad(lambda job: head(job).update(labels={"a b": "c"}), f'{HEAD}.labels["a b"]', "letters"),
    "least above most": Bad(
        lambda job: workers(job).update(minReplicas=3), f"{WORKERS}[0].minReplicas", "lower it to 2"
    ),
    "negative most": Bad(lambda job: workers(job).update(maxReplicas=-1), f"{WORKERS}[0].maxReplicas", "use 0 or more"),
    "two groups of one name": Bad(
        lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"].append(workers(job)),
        f"{WORKERS}[1].groupName",
        "give each its own",
    ),
    "suspended group": Bad(lambda job: workers(job).update(suspend=True), f"{WORKERS}[0].suspend", "use spec.suspend"),
    # The pods
    "amount that is none": Bad(
        lambda job: container(workers(job))["resources"]["limits"].update(memory="16 GB"),
        f"{WORKERS}[0].template.spec.containers[0].resources.limits.memory",
        "16Gi",
    ),
    "request above the limit": Bad(
        lambda job: container(workers(job))["resources"].update(requests={"memory": "32Gi"}),
        f"{WORKERS}[0].template.spec.containers[0].resources.requests.memory",
        "lower it to 16Gi",
    ),
    "half of a GPU": Bad(
        lambda job: container(workers(job)).update(
            resources={"requests": {"nvidia.com/gpu": 1}, "limits": {"nvidia.com/gpu": 2, "memory": "1Gi"}}
        ),
        f'{WORKERS}[0].template.spec.containers[0].resources.requests["nvidia.com/gpu"]',
        "same number",
    ),
    "mount of nothing": Bad(
        lambda job: workers(job)["template"]["spec"].pop("volumes"),
        f"{WORKERS}[0].template.spec.containers[0].volumeMounts[0].name",
        "add it to",
    ),
    # Kueue
    "autoscaling in a queue": Bad(
        lambda job: job["metadata"]["annotations"].pop("kueue.x-k8s.io/elastic-job"),
        "spec.rayClusterSpec.enableInTreeAutoscaling",
        'add the annotation kueue.x-k8s.io/elastic-job: "true"',
        autoscales=True,
        queue="main",
    ),
    "18 groups in a queue": Bad(more_groups(18), WORKERS, "use 16 or fewer", queue="main"),
    "17 groups and a submitter": Bad(more_groups(17), WORKERS, "HTTPMode", queue="main"),
    "time to live in a queue": Bad(
        put("spec.ttlSecondsAfterFinished", 60), "spec.ttlSecondsAfterFinished", "set it to 0", queue="main"
    ),
    "no shutdown in a queue": Bad(
        put("spec.shutdownAfterJobFinishes", False), "spec.shutdownAfterJobFinishes", "set it to true", queue="main"
    ),
    "cluster that is there in a queue": Bad(
        use_existing_cluster, "spec.clusterSelector", "leave out the label", queue="main"
    ),
    "group called head": Bad(
        lambda job: workers(job).update(groupName="head"), f"{WORKERS}[0].groupName", "workers", queue="main"
    ),
    "queue that can't be": Bad(
        lambda job: job["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "Main"}),
        'metadata.labels["kueue.x-k8s.io/queue-name"]',
        "use its name",
    ),
}


def faults(job: Manifest, **more: Any) -> list[Any]:
    return [finding for finding in check_manifest(job, **more) if not finding.is_advice]


@pytest.mark.parametrize("autoscales", [False, True])
@pytest.mark.parametrize("queue", [None, "main"])
def test_nothing_is_wrong_with_what_is_rendered(autoscales: bool, queue: str | None):
    assert check_manifest(sound(autoscales=autoscales, queue=queue)) == []


@pytest.mark.parametrize("name", BAD)
def test_a_fault_is_said_with_its_field_and_its_fix(name: str):
    bad = BAD[name]
    job = sound(autoscales=bad.autoscales, queue=bad.queue)
    bad.damage(job)
    found = [finding for finding in faults(job) if finding.path == bad.path and bad.fix in finding.fix]
    assert len(found) == 1, faults(job)
    assert re.fullmatch(r"[^\n]+: [^\n]+; [^\n]+", str(found[0]))


def test_all_of_them_take_less_than_three_seconds():
    assert len(BAD) >= 25
    jobs = [sound(autoscales=bad.autoscales, queue=bad.queue) for bad in BAD.values()]
    for job, bad in zip(jobs, BAD.values(), strict=True):
        bad.damage(job)
    began = time.monotonic()
    assert all(faults(job) for job in jobs)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("kuberay", "path"),
    [
        ("1.5", "spec.preRunningDeadlineSeconds"),
        ("1.5.0", "spec.rayClusterSpec.authOptions"),
        ("1.4", "spec.rayClusterSpec.authOptions"),
    ],
)
def test_a_field_that_an_older_operator_doesnt_know_is_a_fault(kuberay: str, path: str):
    found = {finding.path: finding for finding in faults(sound(), kuberay=kuberay)}
    assert f"KubeRay {kuberay} doesn't know it" in found[path].message
    assert "upgrade the operator to" in found[path].fix


def test_kuberay_1_6_knows_all_that_is_rendered():
    assert faults(sound(autoscales=True), kuberay="1.6") == []


@pytest.mark.parametrize(
    ("damage", "path", "fix"),
    [
        (put("spec.entrypoint", "python a.py $HOME"), "spec.entrypoint", "as a file"),
        (lambda job: head(job)["rayStartParams"].clear(), f"{HEAD}.rayStartParams.num-cpus", 'set it to "0"'),
        (put("spec.rayClusterSpec.authOptions", None), "spec.rayClusterSpec.authOptions.mode", "token"),
        (
            lambda job: container(workers(job))["resources"].update(requests={"memory": "1Gi"}),
            f"{WORKERS}[0].template.spec.containers[0].resources.requests.memory",
            "make them equal",
        ),
        (
            lambda job: container(workers(job)).pop("securityContext"),
            f"{WORKERS}[0].template.spec.containers[0].securityContext.capabilities.drop",
            "set it to [ALL]",
        ),
        (
            lambda job: workers(job)["template"]["spec"].pop("automountServiceAccountToken"),
            f"{WORKERS}[0].template.spec.automountServiceAccountToken",
            "false",
        ),
        (lambda job: workers(job).update(replicas=3), f"{WORKERS}[0].replicas", "use 2..2"),
        (lambda job: job["spec"].pop("activeDeadlineSeconds"), "spec.activeDeadlineSeconds", "86400"),
        (
            lambda job: container(workers(job)).update(image="other:1-ray2.60.0"),
            f"{WORKERS}[0].template.spec.containers[0].image",
            "use one image",
        ),
    ],
)
def test_what_the_cluster_takes_and_ends_badly_is_advised_against(damage: Any, path: str, fix: str):
    job = sound()
    damage(job)
    found = [finding for finding in check_manifest(job) if finding.path == path and fix in finding.fix]
    assert [finding.is_advice for finding in found] == [True]
    assert faults(job) == []


def test_what_has_a_default_may_be_left_out():
    job = sound()
    for key in ("replicas", "minReplicas", "maxReplicas"):
        workers(job).pop(key)
    job["spec"].pop("submissionMode")
    assert faults(job) == []


def test_a_submitter_with_a_command_of_its_own_needs_no_entrypoint():
    job = sound()
    job["spec"].pop("entrypoint")
    job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["command"] = ["bash", "-c", "ray job submit -- true"]
    assert faults(job) == []


class TestFiles:
    def test_a_file_of_the_users_own(self, tmp_path: Path):
        job = sound()
        job["spec"]["ttlSecondsAfterFinished"] = -1
        (tmp_path / "job.yaml").write_text(yaml.safe_dump_all([{"kind": "ConfigMap"}, job]))
        assert [finding.path for finding in check_file(tmp_path / "job.yaml")] == ["spec.ttlSecondsAfterFinished"]

    def test_several_jobs_are_told_apart(self, tmp_path: Path):
        job = sound()
        job["spec"]["ttlSecondsAfterFinished"] = -1
        (tmp_path / "jobs.yaml").write_text(yaml.safe_dump_all([sound(), job]))
        (finding,) = check_file(tmp_path / "jobs.yaml")
        assert finding.path == "RayJob 2: spec.ttlSecondsAfterFinished"

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("kind: Pod\n", "holds no RayJob"),
            ("a: [b\n", "line 2: not YAML"),
            ("a: 1\na: 2\n", "line 2: not YAML .*a is there twice"),
            (None, "can't be read"),
        ],
    )
    def test_a_file_that_cant_be_checked(self, tmp_path: Path, content: str | None, words: str):
        if content is not None:
            (tmp_path / "job.yaml").write_text(content)
        with pytest.raises(ConfigError, match=words):
            check_file(tmp_path / "job.yaml")
