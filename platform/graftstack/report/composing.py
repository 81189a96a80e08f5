"""What a person wrote of a job, and what it stands for in full."""

from collections.abc import Sequence
from typing import NamedTuple

from graftstack.cluster.launching import saved_overrides
from graftstack.cluster.trained import inherited_overrides
from graftstack.config.compose import compose_job
from graftstack.config.k8s import PREFIX
from graftstack.config.schema import ClusterKind, JobConfig
from graftstack.errors import BadInputError


class Composed(NamedTuple):
    """A job that a person asked for, with what it stands for in full."""

    config: JobConfig
    overrides: list[str]
    """The person's own, behind those of the run that is continued or built upon."""
    k8s_words: list[str]
    """Those of ``k8s.KEY=value``, for the pods of ``cluster=k8s``."""

    @property
    def is_for_kubernetes(self) -> bool:
        """Whether the job is to have pods of its own."""
        return self.config.cluster.kind is ClusterKind.k8s

    def refuse_k8s_words(self) -> None:
        """Raises `BadInputError` if there are words for pods, where the job gets none."""
        if self.k8s_words:
            raise BadInputError(
                f"{self.k8s_words[0]}: says how a job runs on Kubernetes; add cluster=k8s (or submit it --to k8s), or "
                "leave it out"
            )


def composed(job: str, overrides: Sequence[str]) -> Composed:
    """Returns a job as a person asked for it. Raises `BadInputError`."""
    words = [word for word in overrides if word.startswith(PREFIX)]
    own = [word for word in overrides if not word.startswith(PREFIX)]
    everything = [*saved_overrides(own), *own]
    if job == "stack":
        everything = [*inherited_overrides(everything), *everything]
    return Composed(compose_job(job, everything), everything, words)
