"""How far and how often the inner loop of each method steps, unless the user says so."""

from typing import NamedTuple

from graftstack.config.meta import MetaConfig, MethodName


class InnerSettings(NamedTuple):
    """The inner loop of a method."""

    lr: float
    """Learning rate."""
    num_steps: int
    """In training."""
    num_eval_steps: int
    """In evaluation."""


# From a few tries with conv4 on Omniglot: 480 episodes, then 5-way 1-shot on its validation classes, inductive.
INNER_DEFAULTS: dict[MethodName, InnerSettings] = {
    MethodName.maml: InnerSettings(0.1, 1, 5),
    MethodName.fomaml: InnerSettings(0.1, 3, 5),
    MethodName.anil: InnerSettings(0.1, 5, 10),
    MethodName.meta_sgd: InnerSettings(0.1, 1, 3),
    MethodName.reptile: InnerSettings(0.1, 5, 20),
    # In units that suit the features, in which rates below 4 can't diverge.
    MethodName.finetune_baseline: InnerSettings(3.0, 100, 100),
}


def inner_settings(config: MetaConfig) -> InnerSettings:
    """Returns the inner loop of a configuration whose method has one.

    Steps of evaluation that aren't given are those of training, if these are.
    """
    usual = INNER_DEFAULTS[config.method]
    return InnerSettings(
        lr=usual.lr if config.inner_lr is None else config.inner_lr,
        num_steps=config.inner_steps or usual.num_steps,
        num_eval_steps=config.eval.inner_steps or config.inner_steps or usual.num_eval_steps,
    )
