"""What trials share below the groups that they train: a trunk, one backbone that sees one set of samples."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from graftstack.config.plain import to_plain
from graftstack.config.schema import Augment, FinetuneConfig
from graftstack.config.space import full_key
from graftstack.finetune.task import Workbench
from graftstack.sweep.measure import Forward
from graftstack.sweep.trials import Trial
from graftstack.taps.costs import Boundary, Choice
from graftstack.taps.key import TapSpec

_SHARED_KEYS = ("data.", "backbone.", "precision", "augment")
"""How the keys begin on which a tap's values depend, whatever else the configuration says."""


@dataclass
class Trunk:
    """Trials whose frozen parts see the same samples through the same backbone, and what was decided for them."""

    trial: Trial
    label: str = ""
    """What of the space tells it from the others."""
    trials: dict[int, list[Trial]] = field(default_factory=lambda: defaultdict(list))
    """Freeze depth -> those that freeze so many groups."""
    boundary_of: dict[int, int] = field(default_factory=dict)
    """Freeze depth -> where its trials begin at the deepest."""
    specs: dict[int, TapSpec] = field(default_factory=dict)
    """Boundary -> its tap."""
    num_items: int = 0
    forward: Forward | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    """Freeze depth -> what is done for it."""
    start: TapSpec | None = None
    """A stored tap with which the pass that makes the others may begin."""

    @property
    def boundaries(self) -> list[int]:
        """Where trials begin that freeze something, ascending."""
        return sorted(set(self.boundary_of.values()) - {0})

    def where(self, *actions: str) -> list[int]:
        """Returns the boundaries for which one of `actions` was chosen, ascending."""
        return sorted({self.boundary_of[depth] for depth, choice in self.choices.items() if choice.action in actions})

    def at(self, spec: TapSpec, *, is_stored: bool) -> Boundary:
        """Returns what the tap costs."""
        assert self.forward is not None
        number = spec.key.boundary
        prefix_s = self.forward.prefix_s[number]
        return Boundary(boundary=number, prefix_s=prefix_s, item_bytes=spec.item_bytes, is_stored=is_stored)

    @property
    def samples(self) -> str:
        """What tells its samples from those of others, as its backbone sees them."""
        if not self.boundaries:
            return json.dumps([to_plain(self.trial.config.backbone), to_plain(self.trial.config.data)])
        key = self.specs[self.boundaries[0]].key
        return json.dumps([key.backbone, key.weights, key.preprocessing, key.precision, key.data, key.rows, key.views])


class Trunks:
    """All trunks of a sweep, in the order of their first trials."""

    def __init__(self, workbench: Workbench) -> None:
        self._workbench = workbench
        self._by_key: dict[str, Trunk] = {}
        self._group_counts: dict[str, int] = {}

    def __iter__(self) -> Iterator[Trunk]:
        return iter(self._by_key.values())

    def add(self, trials: Iterable[Trial]) -> None:
        """Puts trials where they belong, and names the trunks. Raises `ConfigError`: a backbone can't be made."""
        for trial in trials:
            self.of(trial).trials[self.depth(trial)].append(trial)
        for trunk, label in zip(self, _labels(list(self)), strict=True):
            trunk.label = label

    def of(self, trial: Trial) -> Trunk:
        """Returns the trunk of a trial."""
        return self._by_key.setdefault(trunk_key(trial.config), Trunk(trial))

    def depth(self, trial: Trial) -> int:
        """Returns how many groups a trial freezes."""
        depth = trial.config.freeze_depth
        return self._num_groups(trial) if isinstance(depth, str) else depth

    def _num_groups(self, trial: Trial) -> int:
        key = trial.config.backbone.name
        if key not in self._group_counts:
            self._group_counts[key] = self._workbench.task(trial.config).model.backbone.num_groups
        return self._group_counts[key]


def trunk_key(config: FinetuneConfig) -> str:
    """Returns all that the values of a tap depend on, and on what rows they are of."""
    parts = [to_plain(part) for part in (config.data, config.backbone, config.precision, config.augment)]
    return json.dumps([*parts, config.augment_views, config.seed if _seed_matters(config) else None])


def _seed_matters(config: FinetuneConfig) -> bool:
    """Whether it decides over the backbone's weights, over which rows there are, or over how images change."""
    is_drawn = config.backbone.weights == "none" or config.data.num_train_per_class is not None
    return is_drawn or config.augment is not Augment.none


def _labels(trunks: Sequence[Trunk]) -> list[str]:
    """Returns what tells the trunks apart, in the words of the space."""
    names = [trunk.trial.config.backbone.name for trunk in trunks]
    if len(set(names)) == len(names):
        return names
    return [" ".join([name, *_own_values(trunk.trial)]) for name, trunk in zip(names, trunks, strict=True)]


def _own_values(trial: Trial) -> list[str]:
    """Returns the values, with their keys, that enter a trial's `trunk_key` beside the backbone's name."""
    keys = {name: full_key(name) for name in trial.params}
    return [
        f"{name}={trial.params[name]}"
        for name, key in keys.items()
        if key != "backbone.name" and (key.startswith(_SHARED_KEYS) or (key == "seed" and _seed_matters(trial.config)))
    ]
