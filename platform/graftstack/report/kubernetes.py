"""Jobs on Kubernetes as a person meets them: submitted, listed, followed, stopped, and manifests that are checked."""

from collections.abc import Sequence

from graftstack.config.k8s import K8sConfig, k8s_config
from graftstack.errors import EXIT_BAD_INPUT, EXIT_DONE
from graftstack.report.composing import Composed, composed
from graftstack.report.submitting import say
from graftstack.submit import kubernetes
from graftstack.submit.kube_api import Place
from graftstack.submit.rules import check_file
from graftstack.submit.submissions import spec_on_cluster


def submit_job(job: str, overrides: Sequence[str], *, dry_run: str | None, follows: bool) -> int:
    """Submits a job, says what became of it, and returns the exit status.

    Args:
        job: What to run.
        overrides: As for the job itself, and ``k8s.KEY=value`` for its pods. Relative paths begin at their storage.
        dry_run: ``client`` writes what would be applied, ``server`` asks the API server whether it would take that.
        follows: Whether to write its log until it is over, and end as it does.
    """
    return _submit(job, composed(job, overrides), dry_run=dry_run, follows=follows)


def run_on_kubernetes(job: str, found: Composed) -> int:
    """Submits a job that says ``cluster=k8s``, follows it, and returns the exit status that it ends with."""
    return _submit(job, found, dry_run=None, follows=True)


def _submit(job: str, found: Composed, *, dry_run: str | None, follows: bool) -> int:
    config = k8s_config(found.k8s_words)
    spec = spec_on_cluster(job, found.config, found.overrides, has_our_paths=False)
    return kubernetes.submit_job(spec, config, dry_run=dry_run, follow=follows, say=say)


def run_action(action: str, names: Sequence[str], *, namespace: str | None, context: str | None, follows: bool) -> int:
    """Lists jobs, or shows, follows or stops the one that is named."""
    place = Place(namespace or K8sConfig.namespace, context)
    match action:
        case "list":
            return kubernetes.list_jobs(place)
        case "status":
            return kubernetes.job_status(names[0], place)
        case "logs":
            return kubernetes.job_log(names[0], place, follow=follows, say=say)
        case _:
            return kubernetes.stop_job(names[0], place, say=say)


def check_manifests(path: str) -> int:
    """Prints what is wrong with the RayJobs of a file, a line each; returns 2 if the cluster would refuse one."""
    findings = check_file(path)
    for finding in findings:
        say(f"advice: {finding}" if finding.is_advice else str(finding))
    if any(not finding.is_advice for finding in findings):
        return EXIT_BAD_INPUT
    say(f"{path}: no rule is broken")
    return EXIT_DONE
