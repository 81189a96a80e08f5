"""Going through episodes in this process."""

import torch

from graftstack.config.meta import MetaConfig
from graftstack.machine import usable_cpus
from graftstack.meta.crew import InlineCrew
from graftstack.meta.runner import EpisodeRunner, RunnerSettings
from graftstack.meta.task import MetaTask


def inline_crew(task: MetaTask) -> InlineCrew:
    """Returns a crew of this process alone, whose threads are set for it, and stay so."""
    torch.set_num_threads(task.config.num_threads(task.config.cluster.cpus_of(usable_cpus())))
    settings = RunnerSettings(
        config=task.config,
        classes=task.classes,
        images=task.data.images,
        preprocessing=task.preprocessing,
        device=_device_here(task.config),
    )
    return InlineCrew(EpisodeRunner(settings))


def _device_here(config: MetaConfig) -> str:
    """A run on a cluster's GPUs may be planned, or measured again, on a machine without one."""
    return "cuda" if config.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu"
