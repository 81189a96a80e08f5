"""Jobs as objects of Kubernetes: what the words say is in them, and nothing comes between a value and the job."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from graftstack.config.compose import compose_job
from graftstack.config.docs import key_docs
from graftstack.config.k8s import K8sConfig, k8s_config
from graftstack.config.kubernetes_syntax import (
    is_dns_1035_label,
    is_label_key,
    is_label_value,
    quantity,
    times,
    version,
)
from graftstack.config.spec import Spec, from_bytes
from graftstack.errors import ConfigError
from graftstack.finetune.memory import training_memory
from graftstack.report.composing import composed
from graftstack.submit.manifest import from_manifest, spelt, to_manifest, to_yaml
from graftstack.submit.rayjob import RayJob, RayJobSpec
from graftstack.submit.render import SPEC_FILE, Rendered, notes, render
from graftstack.submit.rules import check

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "k8s.image=graftstack:0.1.0-ray2.60.0"
NASTY = "$HOME `id` \"double\" 'single'; rm -rf / \n\ttab\r ünïcödé \u2028 🌱 ${oc.env:X} $$(Y) \\"


@cache
def rendered(*words: str, job: str = "finetune", name: str = "flowers") -> Rendered:
    found = composed(job, [IMAGE, *words, f"name={name}"])
    spec = Spec(job=job, config=replace(found.config, resume=True), overrides=[*found.overrides, "resume=true"])
    return render(spec, k8s_config(found.k8s_words))


def spec_of(*words: str, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = to_manifest(rendered(*words, **more).ray_job)["spec"]
    return found


def cluster(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = spec_of(*words)["rayClusterSpec"]
    return found


def head(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = cluster(*words)["headGroupSpec"]["template"]["spec"]
    return found


def workers(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = cluster(*words)["workerGroupSpecs"][0]
    return found


def pods(*words: str) -> list[dict[str, Any]]:
    submitter: dict[str, Any] = spec_of(*words)["submitterPodTemplate"]["spec"]
    return [head(*words), workers(*words)["template"]["spec"], submitter]


class TestWords:
    def test_they_are_told_from_those_of_the_job(self):
        found = composed("finetune", ["epochs=3", IMAGE, "k8s.spot=true", "name=k8s.queue"])
        assert found.overrides == ["epochs=3", "name=k8s.queue"]
        assert k8s_config(found.k8s_words) == K8sConfig(image="graftstack:0.1.0-ray2.60.0", spot=True)

    def test_each_takes_what_its_type_takes(self):
        words = [
            "k8s.pods=[1,4]",
            "k8s.queue=null",
            "k8s.ttl_s=60",
            "k8s.env.A=true $X",
            "k8s.env.B=b=c",
            "k8s.worker_nodes.cloud.google.com/gke-accelerator=nvidia-l4",
            "k8s.head_nodes={zone: a, fast: true}",
            "k8s.image_pull_secrets=[one,two]",
            "k8s.active_deadline_s=null",
        ]
        config = k8s_config([IMAGE, *words])
        assert config.pod_range == (1, 4)
        assert (config.queue, config.ttl_s, config.active_deadline_s) == (None, 60, None)
        assert config.env == {"A": "true $X", "B": "b=c"}
        assert config.worker_nodes == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
        assert config.head_nodes == {"zone": "a", "fast": "true"}
        assert config.image_pull_secrets == ["one", "two"]

    def test_of_a_key_that_is_given_twice_the_last_counts(self):
        assert k8s_config([IMAGE, "k8s.ttl_s=1", "k8s.ttl_s=2"]).ttl_s == 2

    @pytest.mark.parametrize(
        ("word", "words"),
        [
            ("k8s.imagee=x", r"unknown key; did you mean image"),
            ("k8s.image", r"not an override"),
            ("k8s.image=", r"which image\? build k8s/Dockerfile"),
            ("k8s.image=graftstack:0.1.0", r"its tag doesn't say which Ray .*k8s\.ray_version="),
            ("k8s.image=Graft:1-ray2.60.0", r"in lower case"),
            ("k8s.ray_version=new", r"give numbers with dots"),
            ("k8s.kuberay=1.3", r"upgrade the operator"),
            ("k8s.namespace=My_Space", r"lower-case letters"),
            ("k8s.queue=Main", r"use the name of the object"),
            ("k8s.queue_priority=high", r"orders the jobs of a queue; add k8s\.queue=NAME"),
            ("k8s.env_from=[A B]", r"use the name of the object"),
            ("k8s.worker_memory=16GB", r"give an amount such as 16Gi"),
            ("k8s.worker_memory=16", r"Ray and torch need 1Gi"),
            ("k8s.storage_mount=data", r"must be a whole path"),
            ("k8s.storage_mount=/tmp/x", r"has a use of its own"),
            ("k8s.pods=0", r"k8s\.pods=0: must be at least 1"),
            ("k8s.pods=[4,1]", r"the range is empty"),
            ("k8s.pods=[1", r"close its brackets"),
            ("k8s.pods=many", r"a whole number, or \[min,max\]"),
            ("k8s.spot=maybe", r"true or false"),
            ("k8s.ttl_s=null", r"takes a whole number"),
            ("k8s.ttl_s=true", r"takes a whole number"),
            ("k8s.backoff_limit=-1", r"must be at least 0"),
            ("k8s.user=0", r"k8s\.user=0: must be at least 1"),
            ("k8s.env.1A=x", r"no name of a variable"),
            ("k8s.spot_label=spot", r"a label of a node, KEY=VALUE"),
            ("k8s.image_pull_policy=Sometimes", r"use IfNotPresent, Always, Never"),
        ],
    )
    def test_what_cant_be_is_one_line(self, word: str, words: str):
        with pytest.raises(ConfigError, match=words) as caught:
            k8s_config([IMAGE, word])
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("image", "ray"),
        [
            ("rayproject/ray:2.60.0-py311-gpu", "2.60.0"),
            ("registry:5000/team/graftstack:0.1.0-ray2.52.1@sha256:0", "2.52.1"),
            ("graftstack:ray-2.60.0", "2.60.0"),
        ],
    )
    def test_one_image_says_which_ray(self, image: str, ray: str):
        assert K8sConfig(image=image).ray == ray

    def test_a_version_that_is_given_counts(self):
        assert cluster("k8s.image=mine:latest", "k8s.ray_version=2.60.1")["rayVersion"] == "2.60.1"

    def test_every_key_is_explained(self):
        assert all(doc.text for doc in key_docs(K8sConfig))


class TestSyntax:
    @pytest.mark.parametrize(
        ("text", "amount"),
        [("500m", 0.5), ("16Gi", 16 * 1024**3), ("1.5k", 1500), ("2", 2), ("1e3", 1000), ("1E", 10**18)],
    )
    def test_amounts(self, text: str, amount: float):
        assert float(quantity(text)) == amount

    @pytest.mark.parametrize("text", ["", "Gi", "16GB", "1 Gi", "--1", "1e", "nan"])
    def test_what_is_no_amount(self, text: str):
        with pytest.raises(ValueError, match="no quantity"):
            quantity(text)

    def test_multiples_keep_their_unit(self):
        assert (times("16Gi", 4), times("1.5Gi", 2), times("100M", 10)) == ("64Gi", "3Gi", "1000M")

    def test_versions_compare(self):
        assert version("2.9.0") < version("2.52.0rc1") < version("2.60")

    def test_names(self):
        assert [is_dns_1035_label(name) for name in ("a-1", "1a", "a-", "A", "", "a" * 64)] == [True] + [False] * 5
        assert [is_label_key(key) for key in ("a", "x.y/z_1", "/a", "a/", "a b")] == [True, True, False, False, False]
        assert [is_label_value(value) for value in ("", "A.b_c", "-a", "é")] == [True, True, False, False]


class TestData:
    @pytest.mark.parametrize("job", ["finetune", "sweep", "stack", "meta", "pretrain", "pipeline"])
    def test_the_spec_arrives_as_it_is(self, job: str):
        path = "data.path=" + NASTY.replace("\n", " ").replace("\r", " ")
        more = {
            "sweep": ["space.lr=[1e-3,1e-2]"],
            "stack": ["base_models=[LogisticRegression]"],
            "pipeline": ["space.lr=[1e-3,1e-2]", "base_models=[{probe:{}}]"],
        }
        known = ["data=parquet", path, "data.image=image", *more.get(job, [])]
        documents = list(yaml.safe_load_all(rendered(*known, job=job).yaml()))
        spec = from_bytes(documents[0]["data"][SPEC_FILE].encode())
        assert f"data.path={spec.config.data.path}" == path
        assert spec.overrides[: len(known)] == known

    def test_yaml_changes_no_text(self):
        found = yaml.safe_load(to_yaml({"text": NASTY, "lines": f"{NASTY}\n  {NASTY}\n\n"}))
        assert found == {"text": NASTY, "lines": f"{NASTY}\n  {NASTY}\n\n"}

    def test_nothing_of_the_users_stands_where_a_shell_reads(self):
        job = spec_of(name="a $(id) `id`; 'x'")
        assert job["entrypoint"] == "python /opt/graftstack/jobs/finetune.py --spec /etc/graftstack/spec.json"
        assert not {"runtimeEnvYAML", "metadata", "jobId"} & job.keys()

    def test_kubernetes_expands_nothing_in_variables(self):
        config = K8sConfig(image="a:ray2.60.0", env={"A": "$(HOME) $$ $x", "B": "$x ${y}"})
        spec = Spec(job="finetune", config=compose_job("finetune", ["name=a", "resume=true"]), overrides=[])
        (container,) = to_manifest(render(spec, config).ray_job)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"][
            "spec"
        ]["containers"]
        env = {item["name"]: item["value"] for item in container["env"]}
        assert (env["A"], env["B"]) == ("$$(HOME) $$$$ $$x", "$x ${y}")

    def test_the_spec_is_mounted_where_the_entrypoint_reads_it(self):
        pod = head()
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "spec"]
        assert volume["configMap"] == {"name": rendered().name}
        assert {"name": "spec", "mountPath": "/etc/graftstack", "readOnly": True} in pod["containers"][0][
            "volumeMounts"
        ]

    def test_a_spec_that_is_too_large_is_refused(self):
        config = compose_job("finetune", ["name=a", "resume=true"])
        spec = Spec(job="finetune", config=config, overrides=[f"data.label={'x' * 2**20}"])
        with pytest.raises(ConfigError, match="a ConfigMap holds 1048576"):
            render(spec, K8sConfig(image="a:ray2.60.0"))


class TestNames:
    @pytest.mark.parametrize("name", ["flowers", "Flowers 2", "🌱", "1" * 200, "a-" * 90, "ünïcödé", "-"])
    def test_any_run_has_a_name_that_kuberay_takes(self, name: str):
        for attempt in (1, 2, 998):
            spec = Spec(job="finetune", config=compose_job("finetune", [f"name={name}", "resume=true"]), overrides=[])
            found = render(spec, K8sConfig(image="a:ray2.60.0"), attempt=attempt)
            assert check(found.ray_job) == []

    def test_it_follows_from_the_configuration(self):
        assert rendered().name == rendered("k8s.worker_memory=32Gi").name != rendered("epochs=3").name

    def test_runs_are_told_apart_by_a_label(self):
        def label(*words: str, name: str = "flowers") -> str:
            found: str = to_manifest(rendered(*words, name=name).ray_job)["metadata"]["labels"]["graftstack.io/run"]
            return found

        assert label() == label("epochs=3") != label(name="Flowers")
        assert label() != label("runs_dir=s3://bucket/runs")


class TestPods:
    def test_workers_are_those_of_the_job(self):
        group = workers("cluster.num_workers=3", "cluster.cpus_per_worker=8", "k8s.worker_memory=24Gi")
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"] == {"cpu": "8", "memory": "24Gi"}

    def test_they_have_the_memory_that_plan_computes(self):
        def memory(*words: str) -> int:
            return int(quantity(workers(*words)["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]))

        config = compose_job("finetune", ["name=a", "resume=true", "batch_size=256"])
        needed = training_memory(config).worker_bytes
        # Ray's objects take a third of a pod, and a fifth more than is needed is left.
        assert 1.2 * 1.5 * needed < memory("batch_size=256") < 1.2 * 1.5 * (needed + 2**30) + 2**30
        assert memory("batch_size=256") > memory("batch_size=8")
        assert memory("cluster.num_workers=2", "k8s.workers_per_pod=2") > memory("cluster.num_workers=2")

    def test_the_head_has_what_the_driver_of_the_job_needs(self):
        def memory(*words: str, job: str = "finetune") -> int:
            found = spec_of(*words, job=job)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
            return int(quantity(found["containers"][0]["resources"]["limits"]["memory"]))

        assert memory("backbone=vit_l_16") > memory("backbone=resnet18") == memory("batch_size=256")
        # A sweep measures its trials there.
        assert memory("space.lr=[1e-3,1e-2]", "batch_size=256", job="sweep") > memory("batch_size=256")
        assert memory("k8s.head_memory=5Gi") == 5 * 1024**3

    @pytest.mark.parametrize("job", ["finetune", "sweep", "stack", "meta", "pretrain", "pipeline"])
    def test_the_memory_is_whole_gibibytes(self, job: str):
        more = {
            "sweep": ["space.lr=[1e-3,1e-2]"],
            "stack": ["base_models=[LogisticRegression]"],
            "pipeline": ["space.lr=[1e-3,1e-2]", "base_models=[{probe:{}}]"],
        }
        found = spec_of(*more.get(job, []), job=job)["rayClusterSpec"]
        for group in (found["headGroupSpec"], *found["workerGroupSpecs"]):
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert re.fullmatch(r"[1-9]\d*Gi", limits["memory"])

    def test_a_model_that_cant_be_made_here_is_one_line_with_what_helps(self):
        with pytest.raises(ConfigError, match=r"9: resnet18 has 6 layer groups.*or give k8s\.worker_memory=16Gi"):
            rendered("freeze_depth=9")

    def test_several_share_a_pod(self):
        words = ("cluster.num_workers=6", "cluster.gpus_per_worker=1", "k8s.workers_per_pod=4", "k8s.worker_memory=8Gi")
        group = workers(*words)
        assert group["replicas"] == 2
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits == {"cpu": "16", "memory": "32Gi", "nvidia.com/gpu": "4"}

    def test_a_range_of_workers_is_a_cluster_that_grows(self):
        found = cluster("cluster.num_workers=[1,5]")
        assert found["enableInTreeAutoscaling"]
        assert found["autoscalerOptions"]["version"] == "v2"
        assert (found["workerGroupSpecs"][0]["minReplicas"], found["workerGroupSpecs"][0]["maxReplicas"]) == (1, 5)

    def test_trials_and_folds_may_have_more_pods_than_a_training_has_workers(self):
        assert workers("k8s.pods=8")["replicas"] == 8

    def test_too_few_pods_are_refused(self):
        with pytest.raises(ConfigError, match=r"k8s\.pods=2: they hold 2 workers and cluster\.num_workers=4; use 4"):
            rendered("cluster.num_workers=4", "k8s.pods=2")

    def test_the_job_on_the_cluster_knows_its_cpus(self):
        spec = from_bytes(rendered("k8s.worker_cpus=6").config_map.data[SPEC_FILE].encode())
        assert (spec.config.cluster.kind.value, spec.config.cluster.address) == ("ray", "auto")
        assert spec.config.cluster.cpus_per_worker == 6

    def test_no_task_runs_on_the_head_and_no_head_on_a_node_that_goes(self):
        found = cluster("k8s.spot=true")
        assert found["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        terms = head("k8s.spot=true")["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert terms["nodeSelectorTerms"][0]["matchExpressions"] == [
            {"key": "karpenter.sh/capacity-type", "operator": "NotIn", "values": ["spot"]}
        ]

    def test_workers_may_run_on_nodes_that_go(self):
        pod = workers("k8s.spot=true", "k8s.spot_label=cloud.google.com/gke-spot=true")["template"]["spec"]
        assert pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
        assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"

    @pytest.mark.parametrize("words", [(), ("cluster.num_workers=[1,4]",)])
    def test_all_of_them_may_do_little(self, words: tuple[str, ...]):
        for pod in pods(*words):
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                own = container["securityContext"]
                assert own["capabilities"] == {"drop": ["ALL"]}
                assert not own["allowPrivilegeEscalation"]
                assert own["readOnlyRootFilesystem"]
                assert container["resources"]["requests"] == container["resources"]["limits"]

    def test_only_the_head_of_a_cluster_that_grows_gets_a_token_of_kubernetes(self):
        assert [pod["automountServiceAccountToken"] for pod in pods()] == [False] * 3
        growing = [pod["automountServiceAccountToken"] for pod in pods("cluster.num_workers=[1,4]")]
        assert growing == [True, False, False]

    def test_they_run_where_the_claim_is(self):
        (container,) = head("k8s.storage_mount=/data")["containers"]
        assert container["workingDir"] == "/data"
        assert {"name": "storage", "mountPath": "/data"} in container["volumeMounts"]


class TestLife:
    def test_the_defaults_end_and_go_on(self):
        job = spec_of()
        assert job["submissionMode"] == "K8sJobMode"
        assert job["shutdownAfterJobFinishes"]
        assert (job["activeDeadlineSeconds"], job["preRunningDeadlineSeconds"]) == (86_400, 3_600)
        assert (job["backoffLimit"], job["ttlSecondsAfterFinished"]) == (2, 0)
        assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
        assert job["rayClusterSpec"]["rayVersion"] == "2.60.0"

    def test_what_is_null_isnt_there(self):
        words = ("k8s.active_deadline_s=null", "k8s.pending_deadline_s=null", "k8s.token_auth=false")
        assert not {"activeDeadlineSeconds", "preRunningDeadlineSeconds", "suspend"} & spec_of(*words).keys()
        assert "authOptions" not in cluster(*words)

    def test_a_queue_is_a_label_and_growing_in_it_an_annotation(self):
        words = ("k8s.queue=main", "k8s.queue_priority=urgent", "cluster.num_workers=[1,4]")
        metadata = to_manifest(rendered(*words).ray_job)["metadata"]
        assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "main"
        assert metadata["labels"]["kueue.x-k8s.io/priority-class"] == "urgent"
        assert metadata["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"


class TestPlaces:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("k8s.storage_claim=null",), r"runs_dir=runs: pods have no storage to share; give a URI"),
            (("runs_dir=/home/me/runs",), r"not on the claim graftstack-storage; use a path below /storage"),
            (("runs_dir=../runs",), r"not on the claim"),
            (("cluster=inline",), r"cluster=inline: .*leave it out"),
        ],
    )
    def test_a_run_that_would_be_lost_with_its_pod_is_refused(self, words: tuple[str, ...], message: str):
        with pytest.raises(ConfigError, match=message):
            rendered(*words)

    @pytest.mark.parametrize("place", ["runs", "/storage/runs", "s3://bucket/runs"])
    def test_a_run_that_stays_is_fine(self, place: str):
        assert rendered(f"runs_dir={place}").name

    def test_it_is_said_where_paths_lead(self):
        overrides = ["data=image_folder", "data.path=flowers", "name=a", "resume=true"]
        spec = Spec(job="finetune", config=compose_job("finetune", overrides), overrides=overrides)
        assert notes(spec, K8sConfig(image="a:ray2.60.0")) == [
            "data.path=flowers: /storage/flowers, on the claim graftstack-storage",
            "runs_dir=runs: /storage/runs, on the claim graftstack-storage",
        ]


@pytest.mark.parametrize(
    ("memory", "needs_torch"), [("worker_memory='16Gi', head_memory='8Gi'", False), ("worker_memory=None", True)]
)
def test_rendering_takes_less_than_a_second_and_gives_the_same_bytes(memory: str, needs_torch: bool):
    program = f"""
import sys, time
if {needs_torch}: import torch, torchvision.models, graftstack.finetune.memory
from graftstack.config.compose import compose_job
from graftstack.config.k8s import K8sConfig
from graftstack.config.spec import Spec
from graftstack.submit.render import render
spec = Spec(job="finetune", config=compose_job("finetune", ["name=a", "resume=true"]), overrides=[])
began = time.process_time()
sys.stdout.write(render(spec, K8sConfig(image="a:ray2.60.0", env={{"B": "2", "A": "1"}}, {memory})).yaml())
assert time.process_time() - began < 1
assert {needs_torch} == ("torch" in sys.modules)
assert not {{"ray", "kubernetes"}} & sys.modules.keys()
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != b""


def test_a_manifest_is_read_as_it_was_written():
    job = rendered("cluster.num_workers=[1,4]", "k8s.queue=main").ray_job
    manifest = to_manifest(job)
    assert from_manifest(RayJob, manifest) == (job, [])


@pytest.fixture(scope="module")
def ray_job_schema() -> dict[str, Any]:
    return crd_schemas()["ray.io/v1", "RayJob"]


class TestSchema:
    """The schemas that the API server checks with, where they are at hand."""

    @pytest.mark.parametrize(
        "words", [(), ("cluster.num_workers=[1,4]", "k8s.queue=a", "k8s.spot=true"), ("cluster.gpus_per_worker=1",)]
    )
    def test_what_is_rendered_has_the_shape_that_the_server_wants(
        self, ray_job_schema: dict[str, Any], words: tuple[str, ...]
    ):
        assert list(faults(ray_job_schema, to_manifest(rendered(*words).ray_job))) == []

    def test_a_misspelt_field_has_not(self, ray_job_schema: dict[str, Any]):
        job = to_manifest(rendered().ray_job)
        container = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        container["imagePullPolice"] = "Always"
        assert "imagePullPolice" in next(faults(ray_job_schema, job))

    def test_golden_jobs_have_it_too(self, ray_job_schema: dict[str, Any]):
        files = list((ROOT / "k8s/rendered").glob("*.yaml"))
        assert len(files) > 2
        for file in files:
            _, job = yaml.safe_load_all(file.read_text())
            assert list(faults(ray_job_schema, job)) == []

    def test_the_model_knows_every_field_of_rays(self, ray_job_schema: dict[str, Any]):
        def known(kind: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
            names = {spelt(item) for item in kind.__dataclass_fields__}
            yield from (f"{path}.{name}" for name in schema["properties"] if name not in names)

        spec = ray_job_schema["properties"]["spec"]
        assert list(known(RayJobSpec, spec, "spec")) == []
        sections: dict[str, Any] = {"spec": spec}
        from graftstack.submit import rayjob

        for field, kind in {
            "rayClusterSpec": rayjob.RayCluster,
            "rayClusterSpec.headGroupSpec": rayjob.HeadGroup,
            "rayClusterSpec.workerGroupSpecs": rayjob.WorkerGroup,
            "rayClusterSpec.autoscalerOptions": rayjob.AutoscalerOptions,
            "rayClusterSpec.gcsFaultToleranceOptions": rayjob.GcsFaultToleranceOptions,
        }.items():
            parent, _, name = field.rpartition(".")
            found = sections[parent or "spec"]["properties"][name]
            sections[field] = found.get("items", found)
            assert list(known(kind, sections[field], field)) == []


def crd_schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the schemas of all custom resources in the folder that KUBERAY_CRD_DIR names, by version and kind."""
    folder = os.environ.get("KUBERAY_CRD_DIR")
    if not folder:
        pytest.skip("KUBERAY_CRD_DIR names no folder with the CRDs of KubeRay")
    found = {}
    for file in sorted(Path(folder).rglob("*.yaml")):
        for crd in yaml.load_all(file.read_text(), Loader=yaml.CSafeLoader):
            if crd and crd.get("kind") == "CustomResourceDefinition":
                group, kind = crd["spec"]["group"], crd["spec"]["names"]["kind"]
                for each in crd["spec"]["versions"]:
                    found[f"{group}/{each['name']}", kind] = closed(each["schema"]["openAPIV3Schema"])
    return found


def closed(schema: Any) -> Any:
    """Returns a schema that refuses fields it doesn't know, as the server does when it is asked to be strict."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        found = {"type": ["integer", "string"]}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def faults(schema: dict[str, Any], manifest: dict[str, Any]) -> Iterator[str]:
    """Yields what a schema says against an object, without what all objects have."""
    inner = {key: value for key, value in schema.items() if key != "additionalProperties"}
    known = {
        "apiVersion": {},
        "kind": {},
        "metadata": {},
        **{k: v for k, v in inner["properties"].items() if k == "spec"},
    }
    for error in Draft202012Validator({**inner, "properties": known}).iter_errors(manifest):
        yield f"{error.json_path}: {error.message}"
