"""Pods: what the API server would refuse once the operator makes them, long after it took the job."""

from collections import Counter
from collections.abc import Iterator

from graftstack.config.k8s import ray_version_of
from graftstack.config.kubernetes_syntax import quantity, version
from graftstack.submit.manifest import Finding, join
from graftstack.submit.rayjob import RayJob
from graftstack.submit.rules.view import CLUSTER, Rule, cluster, groups, pods

# What is shared out in parts; anything else, such as a GPU, is requested as it is limited.
_DIVISIBLE = ("cpu", "memory", "ephemeral-storage")


def has_amounts(job: RayJob) -> Iterator[Finding]:
    """Quantities that Kubernetes can read, and no request above its limit."""
    for pod in pods(job):
        for path, container in pod.containers():
            given = container.resources
            if given is None:
                continue
            limits = given.limits or {}
            yield from _unreadable(f"{path}.resources.limits", limits)
            yield from _unreadable(f"{path}.resources.requests", given.requests or {})
            for key, request in (given.requests or {}).items():
                where = join(f"{path}.resources.requests", key)
                if key not in limits or not _is_quantity(request) or not _is_quantity(limits[key]):
                    continue
                if quantity(request) > quantity(limits[key]):
                    yield Finding(
                        where, f"{request} is more than the limit, {limits[key]}", f"lower it to {limits[key]}"
                    )
                elif key not in _DIVISIBLE and quantity(request) != quantity(limits[key]):
                    yield Finding(where, f"{request} isn't the limit, {limits[key]}", "write the same number in both")


def mounts_what_there_is(job: RayJob) -> Iterator[Finding]:
    """Each mount has its volume, and a place of its own."""
    for pod in pods(job):
        volumes = {str(volume.name) for volume in pod.spec.volumes or []}
        for path, container in pod.containers():
            places = Counter(mount.mount_path for mount in container.volume_mounts or [])
            for index, mount in enumerate(container.volume_mounts or []):
                where = f"{path}.volumeMounts[{index}]"
                if mount.name not in volumes:
                    known = ", ".join(sorted(volumes)) or "none"
                    message = f"the pod has no volume {mount.name}; it has {known}"
                    yield Finding(f"{where}.name", message, f"add it to {pod.path.removeprefix(CLUSTER + '.')}.volumes")
                if places[mount.mount_path] > 1:
                    places[mount.mount_path] = 0
                    yield Finding(f"{where}.mountPath", f"{mount.mount_path} is mounted twice", "leave one of them out")


def runs_the_ray_it_says(job: RayJob) -> Iterator[Finding]:
    """An image that is replaced leaves `rayVersion` as it was, and the operator goes by that."""
    said = cluster(job).ray_version
    for group in groups(job):
        found = ray_version_of(group.ray.image or "")
        if found and not _is_same(said, found):
            message = f"{said}, and {group.ray.image} holds Ray {found}"
            yield Finding(f"{CLUSTER}.rayVersion", message, f'write "{found}", or change the image')
            return


def _unreadable(path: str, amounts: dict[str, str | int | float]) -> Iterator[Finding]:
    for key, amount in amounts.items():
        if not _is_quantity(amount):
            yield Finding(join(path, key), f"{amount!r} is no amount", "write one such as 500m, 2 or 16Gi")
        elif quantity(amount) < 0:
            yield Finding(join(path, key), f"{amount} is negative", "write one such as 500m, 2 or 16Gi")


def _is_quantity(amount: str | float | None) -> bool:
    try:
        quantity(amount if amount is not None else "")
    except ValueError:
        return False
    return True


def _is_same(said: str | None, found: str) -> bool:
    """Whether a version is the one that is said, as far as it says anything: ``2.60`` is ``2.60.0`` too."""
    try:
        numbers = version(said or "")
    except ValueError:  # the rule of tokens complains where it matters
        return True
    return version(found)[: len(numbers)] == numbers


RULES: list[Rule] = [has_amounts, mounts_what_there_is, runs_the_ray_it_says]
