"""What is deleted after the end: `spec.deletionStrategy`, which the operator checks once the job is there."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from graftstack.submit.manifest import Finding
from graftstack.submit.rayjob import DeletionStrategy, RayJob
from graftstack.submit.rules.view import SPEC, Rule, autoscales, spec

PATH = f"{SPEC}.deletionStrategy"
RULES_PATH = f"{PATH}.deletionRules"

# Workers go before their cluster, and that before the job.
_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def says_one_way(job: RayJob) -> Iterator[Finding]:
    """Rules, or a shutdown, or the older pair."""
    strategy = spec(job).deletion_strategy
    if strategy is None:
        return
    has_pair = strategy.on_success is not None or strategy.on_failure is not None
    if strategy.deletion_rules and spec(job).shutdown_after_job_finishes:
        message = "rules and shutdownAfterJobFinishes exclude each other"
        yield Finding(
            RULES_PATH, message, "leave shutdownAfterJobFinishes out, and add a rule with policy: DeleteCluster"
        )
    if strategy.deletion_rules and has_pair:
        yield Finding(
            RULES_PATH, "rules and onSuccess, onFailure exclude each other", "leave out onSuccess and onFailure"
        )
    if not strategy.deletion_rules and not has_pair:
        yield Finding(PATH, "says nothing", "add deletionRules, or leave it out")


def has_both_policies(job: RayJob) -> Iterator[Finding]:
    """The older pair is one."""
    strategy = _strategy(job)
    pair = {"onSuccess": strategy.on_success, "onFailure": strategy.on_failure}
    if strategy.deletion_rules or all(policy is None for policy in pair.values()):
        return
    for key, policy in pair.items():
        if policy is None or policy.policy is None:
            yield Finding(
                f"{PATH}.{key}", "has no policy, and the other needs it", f"write {key}: {{policy: DeleteCluster}}"
            )
        elif policy.policy == "DeleteNone" and spec(job).shutdown_after_job_finishes:
            message = "DeleteNone keeps what shutdownAfterJobFinishes deletes"
            yield Finding(f"{PATH}.{key}.policy", message, "leave one of them out")


def deletes_only_what_is_its_own(job: RayJob) -> Iterator[Finding]:
    """Clusters that were there stay; workers that an autoscaler manages are its own."""
    for path, policy in _policies(job):
        if spec(job).cluster_selector and policy in ("DeleteCluster", "DeleteWorkers"):
            yield Finding(path, f"{policy}, of a cluster that isn't the job's own", "leave it out")
        elif policy == "DeleteWorkers" and autoscales(job):
            yield Finding(path, "DeleteWorkers, which the autoscaler brings back", "use DeleteCluster")


def has_complete_rules(job: RayJob) -> Iterator[Finding]:
    """A policy, and one condition of two."""
    for index, rule in enumerate(_strategy(job).deletion_rules or []):
        path, condition = f"{RULES_PATH}[{index}]", rule.condition
        if rule.policy is None:
            yield Finding(f"{path}.policy", "what is to be deleted?", "write DeleteCluster")
        if condition is None or (condition.job_status is None and condition.job_deployment_status is None):
            yield Finding(f"{path}.condition", "has no status", "write jobStatus: SUCCEEDED, or FAILED")
        elif condition.job_status is not None and condition.job_deployment_status is not None:
            yield Finding(f"{path}.condition", "has two statuses", "leave out jobStatus or jobDeploymentStatus")
        if condition is not None and (condition.ttl_seconds or 0) < 0:
            yield Finding(f"{path}.condition.ttlSeconds", f"{condition.ttl_seconds} is negative", "use 0 for at once")


def deletes_in_order(job: RayJob) -> Iterator[Finding]:
    """The same is said once, and what holds another is deleted last."""
    by_status: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for index, rule in enumerate(_strategy(job).deletion_rules or []):
        condition = rule.condition
        if condition is None or rule.policy is None:
            continue
        status = str(condition.job_status or condition.job_deployment_status)
        if rule.policy in by_status[status]:
            first = by_status[status][rule.policy][0]
            message = f"says {rule.policy} after {status} as rule {first} does"
            yield Finding(f"{RULES_PATH}[{index}]", message, "leave one of them out")
        by_status[status].setdefault(rule.policy, (index, condition.ttl_seconds or 0))
    for status, found in by_status.items():
        for early, late in pairwise(policy for policy in _ORDER if policy in found):
            (_, early_ttl), (index, late_ttl) = found[early], found[late]
            if late_ttl < early_ttl:
                message = f"{late} after {late_ttl} s comes before {early} after {early_ttl} s of {status}"
                yield Finding(f"{RULES_PATH}[{index}].condition.ttlSeconds", message, f"raise it to {early_ttl}")


def _strategy(job: RayJob) -> DeletionStrategy:
    return spec(job).deletion_strategy or DeletionStrategy()


def _policies(job: RayJob) -> Iterator[tuple[str, str | None]]:
    strategy = _strategy(job)
    for key, policy in (("onSuccess", strategy.on_success), ("onFailure", strategy.on_failure)):
        if policy is not None:
            yield f"{PATH}.{key}.policy", policy.policy
    for index, rule in enumerate(strategy.deletion_rules or []):
        yield f"{RULES_PATH}[{index}].policy", rule.policy


RULES: list[Rule] = [
    says_one_way,
    has_both_policies,
    deletes_only_what_is_its_own,
    has_complete_rules,
    deletes_in_order,
]
