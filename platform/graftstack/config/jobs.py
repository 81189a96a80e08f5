"""The jobs there are, and the dataclass that configures each."""

from graftstack.config.meta import MetaConfig
from graftstack.config.schema import FinetuneConfig, JobConfig, PretrainConfig
from graftstack.config.stack import PipelineConfig, StackConfig
from graftstack.config.sweep import SweepConfig

JOBS: dict[str, type[JobConfig]] = {
    "finetune": FinetuneConfig,
    "pretrain": PretrainConfig,
    "sweep": SweepConfig,
    "stack": StackConfig,
    "meta": MetaConfig,
    "pipeline": PipelineConfig,
}
