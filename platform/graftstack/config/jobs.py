"""The jobs there are, and the dataclass that configures each."""

from graftstack.config.schema import FinetuneConfig, PretrainConfig
from graftstack.config.stack import PipelineConfig, StackConfig
from graftstack.config.sweep import SweepConfig

JOBS: dict[str, type[FinetuneConfig]] = {
    "finetune": FinetuneConfig,
    "pretrain": PretrainConfig,
    "sweep": SweepConfig,
    "stack": StackConfig,
    "pipeline": PipelineConfig,
}
