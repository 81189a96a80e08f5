"""A job on Kubernetes. The API server is one that speaks as much as a submission needs; client and wire are real."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.kube_server import ApiServer, serving, write_kubeconfig

from graftstack.cli import main
from graftstack.config.compose import compose_job
from graftstack.config.k8s import K8sConfig
from graftstack.config.schema import ClusterKind
from graftstack.config.spec import Spec, from_bytes
from graftstack.errors import BadInputError, ConfigError
from graftstack.submit import kubernetes
from graftstack.submit.kube_api import Place, connect
from graftstack.submit.kubernetes import follow_job, job_log, job_status, list_jobs, stop_job, submit_job
from graftstack.submit.render import render

CONFIG = K8sConfig(image="graftstack:0.1.0-ray2.60.0")
JOBS = "/apis/ray.io/v1/namespaces/graftstack/rayjobs"
MAPS = "/api/v1/namespaces/graftstack/configmaps"
PODS = "/api/v1/namespaces/graftstack/pods"
LOG = f"{PODS}/submitter/log"

RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "rayClusterName": "cluster"}
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
WAITING = {"jobDeploymentStatus": "Initializing", "rayClusterName": "cluster"}

NO_NAMESPACE = {"message": 'namespaces "graftstack" not found', "details": {"name": "graftstack", "kind": "namespaces"}}


@cache
def spec(*overrides: str) -> Spec:
    words = ["name=flowers", "resume=true", *overrides]
    return Spec(job="finetune", config=compose_job("finetune", words), overrides=words)


def failed(message: str, reason: str = "AppFailed") -> dict[str, Any]:
    return {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": reason, "message": message}


def lines_into(said: list[str]) -> Callable[[str], None]:
    return lambda text: said.append(text.removesuffix("\n"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """An API server, which the kubeconfig names; jobs that are followed are looked at often."""
    monkeypatch.setattr(kubernetes, "POLL_S", 0.02)
    monkeypatch.setattr("graftstack.submit.kube_logs._AGAIN_S", 0.02)
    with serving(tmp_path / "kubeconfig") as found:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield found


def submit(said: list[str] | None = None, *overrides: str, follow: bool = False, dry_run: str | None = None) -> int:
    into = [] if said is None else said
    return submit_job(spec(*overrides), CONFIG, dry_run=dry_run, follow=follow, say=into.append, write=lines_into(into))


class TestSubmitting:
    def test_the_spec_arrives_byte_for_byte_and_goes_when_the_job_goes(self, server: ApiServer):
        wanted = spec("data=image_folder", "data.path=a $HOME `b` 'c' \"d\"; é")
        assert submit_job(wanted, CONFIG, dry_run=None, follow=False, say=lambda _: None) == 0
        name = render(wanted, CONFIG).name
        config_map = server.objects[f"{MAPS}/{name}"]
        assert from_bytes(config_map["data"]["spec.json"].encode()).config.data.path == "a $HOME `b` 'c' \"d\"; é"
        assert config_map["metadata"]["ownerReferences"][0]["uid"] == "uid-1"
        assert server.objects[f"{JOBS}/{name}"]["spec"]["entrypoint"].endswith("--spec /etc/graftstack/spec.json")

    def test_a_dry_run_prints_both_objects_and_needs_no_cluster(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
        said: list[str] = []
        assert submit(said, dry_run="client") == 0
        assert [item["kind"] for item in yaml.safe_load_all("\n".join(said))] == ["ConfigMap", "RayJob"]

    def test_a_dry_run_on_the_server_makes_nothing(self, server: ApiServer):
        said: list[str] = []
        assert submit(said, dry_run="server") == 0
        assert "takes it" in said[0]
        assert server.objects == {}

    def test_the_same_job_is_submitted_once(self, server: ApiServer):
        assert [submit(), submit()] == [0, 0]
        assert len(server.objects) == 2

    def test_a_job_that_is_done_is_done(self, server: ApiServer):
        submit()
        server.objects[f"{JOBS}/{render(spec(), CONFIG).name}"]["status"] = DONE
        said: list[str] = []
        assert submit(said, follow=True) == 0
        assert "done already" in said[0]

    def test_a_job_that_failed_is_submitted_under_another_name(self, server: ApiServer):
        submit()
        first = render(spec(), CONFIG).name
        server.objects[f"{JOBS}/{first}"]["status"] = failed("exit code 1")
        submit()
        assert f"{JOBS}/{first}-2" in server.objects

    def test_a_run_that_another_job_works_on_is_refused(self, server: ApiServer):
        submit()
        with pytest.raises(BadInputError, match=r"name=flowers: .* works on this run with another configuration; wait"):
            submit(None, "epochs=3")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ({"queue": "main", "ttl_s": 60}, r"spec\.ttlSecondsAfterFinished: .*; set it to 0: k8s\.ttl_s=0$"),
            ({"kuberay": "1.5"}, r"spec\.preRunningDeadlineSeconds: KubeRay 1\.5 .*: k8s\.pending_deadline_s=null$"),
            ({"kuberay": "1.4", "pending_deadline_s": None}, r"authOptions: KubeRay 1\.4 .*: k8s\.token_auth=false$"),
            ({"ray_version": "2.51.0", "image": "mine:1"}, r"rayVersion: Ray 2\.51\.0 has no token .*: k8s\.image"),
        ],
    )
    def test_what_breaks_a_rule_is_never_sent(self, server: ApiServer, words: dict[str, Any], message: str):
        config = K8sConfig(**{"image": "graftstack:0.1.0-ray2.60.0", **words})
        with pytest.raises(ConfigError, match=message):
            submit_job(spec(), config, dry_run=None, follow=False, say=print)
        assert server.asked == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("method", "path", "status", "body", "words"),
        [
            ("POST", MAPS, 404, NO_NAMESPACE, "k8s.namespace=graftstack: there is none; kubectl apply -k k8s/base"),
            ("GET", JOBS, 404, "404 page not found", "no RayJobs of ray.io/v1; install the KubeRay operator"),
            ("GET", JOBS, 401, {"message": "Unauthorized"}, "doesn't know who you are"),
            (
                "GET",
                JOBS,
                403,
                {"message": 'rayjobs.ray.io is forbidden: User "ann" cannot list resource "rayjobs"'},
                "ask for the role graftstack-submitter",
            ),
            (
                "POST",
                JOBS,
                403,
                {"message": 'rayjobs.ray.io "x" is forbidden: exceeded quota: few, requested: count/rayjobs=1'},
                "exceeded quota: few, requested: count/rayjobs=1.*ask for fewer",
            ),
            (
                "POST",
                JOBS,
                400,
                {"message": 'strict decoding error: unknown field "spec.preRunningDeadlineSeconds"'},
                "preRunningDeadlineSeconds.*k8s.kuberay=",
            ),
            (
                "POST",
                JOBS,
                403,
                {"message": 'admission webhook "vrayjob.kb.io" denied the request: no such queue'},
                "refused .*no such queue",
            ),
            ("GET", JOBS, 503, "upstream gone", "fails with 503 .*; try again later"),
        ],
    )
    def test_what_the_server_says_is_one_line_and_leaves_nothing(
        self, server: ApiServer, method: str, path: str, status: int, body: Any, words: str
    ):
        server.refuse(method, path, status, body)
        with pytest.raises(BadInputError, match=words) as caught:
            submit()
        assert "\n" not in str(caught.value)
        assert server.objects == {}

    def test_a_cluster_that_is_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        write_kubeconfig(tmp_path / "kubeconfig", 1)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        began = time.monotonic()
        with pytest.raises(BadInputError, match=r"the API server doesn't answer \(.*refused"):
            submit()
        assert time.monotonic() - began < 5

    def test_no_kubeconfig(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
        with pytest.raises(ConfigError, match=r"no cluster is configured .*set KUBECONFIG"):
            submit()

    def test_a_context_that_isnt_there(self, server: ApiServer):
        with pytest.raises(ConfigError, match=r"k8s\.context=there: .*kubectl config get-contexts"):
            connect(Place("graftstack", "there"))


class TestFollowing:
    def test_the_log_arrives_whole_over_broken_connections(self, server: ApiServer):
        stamps = [f"2026-01-01T00:00:0{second}.5Z" for second in range(6)]
        lines = [f"{stamp} line {number}" for number, stamp in enumerate(stamps)]
        # Two lines of one time, on either side of a break, and lines that the server repeats.
        twin = f"{stamps[2]} twin"
        server.submitter("submitter", lines[:3], [lines[1], lines[2], twin, lines[3]], [twin, *lines[3:]])
        server.statuses = [WAITING, RUNNING, RUNNING, DONE]
        said: list[str] = []
        assert submit(said, follow=True) == 0
        shown = [line for line in said if line.startswith(("line", "twin"))]
        assert shown == ["line 0", "line 1", "line 2", "twin", "line 3", "line 4", "line 5"]

    def test_a_second_submitter_repeats_nothing(self, server: ApiServer):
        stamp = "2026-01-01T00:00:00Z"
        first = [f"{stamp} Job 'id-1' submitted successfully", f"{stamp} epoch 1", f"{stamp} epoch 2"]
        server.submitter("a", first)
        server.submitter("b", [f"{stamp} Tailing", *first[1:], f"{stamp} epoch 3"])
        server.statuses = [RUNNING, RUNNING, DONE]
        said: list[str] = []
        submit(said, follow=True)
        assert [line for line in said if line.startswith("epoch")] == ["epoch 1", "epoch 2", "epoch 3"]

    def test_a_job_that_is_given_to_ray_anew_is_shown_anew(self, server: ApiServer):
        stamp = "2026-01-01T00:00:00Z"
        lines = [f"{stamp} Job 'id-1' submitted successfully", f"{stamp} epoch 1"]
        server.submitter("a", lines)
        server.submitter("b", lines)
        server.statuses = [RUNNING, DONE]
        said: list[str] = []
        submit(said, follow=True)
        assert said.count("epoch 1") == 2

    @pytest.mark.parametrize(
        ("status", "code", "words"),
        [
            (DONE, 0, "done"),
            (failed("Job entrypoint command failed with exit code 2, last available logs\nmore"), 2, "exit status 2"),
            (failed("Job entrypoint command failed with exit code -9, last"), 137, "exit status -9"),
            (failed("the head is gone"), 1, "the head is gone"),
            (failed("", "DeadlineExceeded"), 1, "k8s.active_deadline_s"),
            (failed("", "PreRunningDeadlineExceeded"), 1, "k8s.pending_deadline_s"),
            (
                {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "too long"},
                2,
                "too long",
            ),
            ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 130, "stopped"),
        ],
    )
    def test_the_exit_status_is_that_of_the_job(self, server: ApiServer, status: Any, code: int, words: str):
        server.statuses = [RUNNING, status]
        said: list[str] = []
        assert submit(said, follow=True) == code
        assert words in said[-1]

    def test_a_word_that_nobody_knows_is_no_end(self, server: ApiServer):
        server.statuses = [
            {"jobDeploymentStatus": "Complete", "jobStatus": "UNHEARD"},
            {"jobDeploymentStatus": "New"},
            DONE,
        ]
        assert submit(follow=True) == 0
        assert [asked for asked in server.asked if asked[1].startswith(f"{JOBS}/")] != []

    def test_an_outage_of_the_server_is_said_once_and_sat_out(self, server: ApiServer):
        submit()
        name = render(spec(), CONFIG).name
        server.statuses = [DONE]
        server.refuse("GET", f"{JOBS}/{name}", 503, "starting")
        threading.Timer(0.2, server.refusals.clear).start()
        said: list[str] = []
        assert follow_job(connect(Place("graftstack")), name, say=said.append) == 0
        assert said == [f"{name}: the API server fails with 503; still trying", f"{name}: done"]

    def test_a_retry_on_a_new_cluster_is_said(self, server: ApiServer):
        server.statuses = [RUNNING, {"jobDeploymentStatus": "Retrying", "failed": 1}, RUNNING | {"failed": 1}, DONE]
        said: list[str] = []
        assert submit(said, follow=True) == 0
        assert len([line for line in said if "retry 1 of 2" in line]) == 1

    def test_ctrl_c_leaves_the_job_and_says_how_to_come_back(self, server: ApiServer):
        server.statuses = [RUNNING]

        def interrupt(line: str) -> None:
            if "running" in line:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt, match=r"goes on; come back with .*logs -f job/.*delete rayjob"):
            submit_job(spec(), CONFIG, dry_run=None, follow=True, say=interrupt)
        assert len(server.objects) == 2

    def test_a_job_that_is_deleted_while_it_waits(self, server: ApiServer):
        server.statuses = [WAITING]
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            if "waiting" in line:
                server.objects.clear()

        assert submit_job(spec(), CONFIG, dry_run=None, follow=True, say=say) == 130
        assert "was deleted before it was over" in said[-1]


class TestWaiting:
    def waits(self, server: ApiServer, then: dict[str, Any] = DONE) -> list[str]:
        server.statuses = [WAITING, then]
        said: list[str] = []
        submit(said, follow=True)
        return [line for line in said if "waiting" in line]

    def pod(self, **status: Any) -> dict[str, Any]:
        return {"metadata": {"name": "head"}, "spec": {"containers": []}, "status": {"phase": "Pending", **status}}

    def test_no_room(self, server: ApiServer):
        message = "0/3 nodes are available: 3 Insufficient cpu."
        server.pods = [self.pod(conditions=[{"type": "PodScheduled", "status": "False", "message": message}])]
        assert f"no room for head: {message}" in self.waits(server)[0]

    def test_a_queue_without_quota(self, server: ApiServer):
        condition = {"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota for cpu"}
        server.workloads = [{"spec": {"queueName": "main"}, "status": {"conditions": [condition]}}]
        assert "queue main: insufficient unused quota for cpu" in self.waits(server)[0]

    def test_a_quota_that_others_use(self, server: ApiServer):
        message = 'pods "h" is forbidden: exceeded quota: q, requested: cpu=2, used: cpu=9, limited: cpu=10'
        server.events = [{"reason": "FailedToCreateHeadPod", "message": message}]
        assert "used: cpu=9" in self.waits(server)[0]

    def test_an_operator_that_isnt_there(self, server: ApiServer):
        server.statuses = [{}, DONE]
        said: list[str] = []
        submit(said, follow=True)
        assert any("see whether KubeRay runs" in line for line in said)

    @pytest.mark.parametrize("why", ["ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"])
    def test_an_image_that_isnt_there_ends_it(self, server: ApiServer, why: str):
        waiting = {"reason": why, "message": "manifest unknown"}
        server.pods = [self.pod(containerStatuses=[{"image": "graftstack:x", "state": {"waiting": waiting}}])]
        with pytest.raises(
            BadInputError, match=r"k8s\.image=graftstack:x: can't be pulled \(manifest unknown\); push it"
        ):
            self.waits(server)
        assert not [key for key in server.objects if key.startswith(JOBS)]

    def test_a_quota_that_is_too_small_for_it_ends_it(self, server: ApiServer):
        amounts = "requested: limits.memory=16Gi, used: limits.memory=0, limited: limits.memory=8Gi"
        message = f"pods is forbidden: exceeded quota: q, {amounts}"
        server.events = [{"reason": "FailedToCreateHeadPod", "message": message}]
        with pytest.raises(BadInputError, match=r"the namespace's quota: .*limited: limits\.memory=8Gi; ask for"):
            self.waits(server)

    def test_a_job_of_somebody_else_isnt_removed(self, server: ApiServer):
        submit()
        name = render(spec(), CONFIG).name
        waiting = {"reason": "InvalidImageName", "message": ""}
        server.pods = [self.pod(containerStatuses=[{"image": "X", "state": {"waiting": waiting}}])]
        with pytest.raises(BadInputError, match="remove it with kubectl"):
            follow_job(connect(Place("graftstack")), name, say=print)
        assert f"{JOBS}/{name}" in server.objects


class TestJobs:
    def test_jobs_are_listed_asked_about_and_stopped(self, server: ApiServer):
        place, name, said = Place("graftstack"), render(spec(), CONFIG).name, []
        submit()
        server.objects[f"{JOBS}/{name}"]["status"] = RUNNING
        assert list_jobs(place, write=lines_into(said)) == 0
        assert said[-1].split() == [name, "running", "flowers"]
        assert job_status(name, place, write=lines_into(said)) == 0
        assert said[-1] == f"{name}: running"
        assert stop_job(name, place, say=said.append) == 0
        assert f"{JOBS}/{name}" not in server.objects
        with pytest.raises(BadInputError, match="no such job"):
            job_status(name, place, write=lines_into(said))

    def test_a_log_is_shown_as_far_as_it_goes(self, server: ApiServer):
        submit()
        server.submitter("submitter", ["2026-01-01T00:00:00Z so far"])
        said: list[str] = []
        assert (
            job_log(render(spec(), CONFIG).name, Place("graftstack"), follow=False, say=print, write=lines_into(said))
            == 0
        )
        assert said == ["so far"]


class TestClusterK8s:
    WORDS = ("finetune", "data=digits", "backbone=conv4", "name=digits")
    IMAGE = "k8s.image=graftstack:0.1.0-ray2.60.0"

    def test_the_job_has_pods_of_its_own_and_ends_as_they_do(
        self, server: ApiServer, capsys: pytest.CaptureFixture[str]
    ):
        server.submitter("submitter", ["2026-01-01T00:00:00Z epoch 1"])
        server.statuses = [RUNNING, failed("Job entrypoint command failed with exit code 3, last")]
        assert main([*self.WORDS, "cluster=k8s", self.IMAGE]) == 3
        assert capsys.readouterr().out == "epoch 1\n"
        [sent] = [found for path, found in server.objects.items() if path.startswith(MAPS)]
        cluster = from_bytes(sent["data"]["spec.json"].encode()).config.cluster
        assert (cluster.kind, cluster.address) == (ClusterKind.ray, "auto")

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (("cluster=k8s",), "k8s.image=: which image? "),
            ((IMAGE,), f"{IMAGE}: says how a job runs on Kubernetes; add cluster=k8s "),
            (("cluster=k8s", IMAGE, "k8s.pood=1"), "k8s.pood=1: unknown key; "),
        ],
    )
    def test_what_doesnt_go_together_is_refused_and_asks_no_cluster(
        self, server: ApiServer, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], complaint: str
    ):
        assert main([*self.WORDS, *words]) == 2
        assert capsys.readouterr().err.startswith(f"graftstack: {complaint}")
        assert server.asked == []

    def test_a_ray_cluster_refuses_a_job_that_is_to_have_pods(self, capsys: pytest.CaptureFixture[str]):
        assert main(["submit", *self.WORDS, "cluster=k8s", "--to", "http://127.0.0.1:1"]) == 2
        assert "cluster=k8s: gets pods of its own" in capsys.readouterr().err
