"""A whole meta-training: train, measure, and leave a backbone and a few-shot learner in the run folder."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from graftstack.backbones.weights import hash_state
from graftstack.config.meta import MetaConfig
from graftstack.errors import RunError
from graftstack.finetune.artifact import ModelCard
from graftstack.finetune.predictions import parquet_bytes
from graftstack.meta.artifact import save_meta
from graftstack.meta.crew import Crew
from graftstack.meta.episodes import EpisodeShape
from graftstack.meta.evaluation import Evaluation, Measured, Rows
from graftstack.meta.model import Floats, MetaModel, MetaState
from graftstack.meta.runner import Block
from graftstack.meta.task import MetaTask
from graftstack.meta.training import MetaProgress, MetaTrained, MetaTraining
from graftstack.storage import Folder

CHECKPOINTS, MODEL = "checkpoints", "model"
CURVE = "metrics.parquet"
EVALUATION = "evaluation.json"

# Episodes whose moments stand for those of all, where training keeps no running statistics.
_NUM_MOMENT_EPISODES = 50


class MetaOutcome(NamedTuple):
    """What the manifest says of a finished meta-training."""

    metrics: dict[str, float]
    artifacts: dict[str, str]
    details: dict[str, Any]
    results: dict[str, Any]


class Listener(NamedTuple):
    """Whom a meta-training tells where it stands."""

    training: Callable[[MetaProgress], None] = lambda _: None
    evaluating: Callable[[int, int], None] = lambda _, __: None
    """Given (episodes scored, episodes in all)."""
    poll: Callable[[int], None] = lambda _: None
    """As `Crew.call` has it."""


class MetaJob:
    """Trains a task from wherever its checkpoints stand, and measures it on held-out classes.

    Args:
        task: What is trained.
        model: The method, in this process.
        crew: Goes through episodes.
        folder: The run folder. What is in it isn't done again.
        features_of: What embeds held-out images in place of the crew, if nothing is trained.
        listener: Told where it stands.
    """

    def __init__(
        self,
        task: MetaTask,
        model: MetaModel,
        crew: Crew,
        folder: Folder,
        *,
        features_of: Callable[[Rows], Floats] | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.task = task
        self.config = task.config
        self.model = model
        self.crew = crew
        self.folder = folder
        self.features_of = features_of
        self.listener = listener or Listener()

    def run(self) -> MetaOutcome:
        """Trains, measures, and writes the model.

        Raises:
            TrainingError: the training diverged; names the step.
            RunError: the data, the classes or the initial weights aren't those that the run began with.
            StorageFullError: nothing more can be written; what was saved before stays resumable.
        """
        trained = self._trained()
        table = self._measured(trained.state)
        state = trained.state
        if self.config.method.adapts and self.model.network.has_batchnorm:
            state = state._replace(statistics=self._estimated(state))
        save_meta(self.folder / MODEL, self.model, state, _card(self.task))
        artifacts = {"model": MODEL}
        if trained.history:
            artifacts |= {"metrics": CURVE, "checkpoints": CHECKPOINTS}
        first = table[0]
        metrics = {"accuracy": first.accuracy, "ci95": first.ci95}
        if first.nearest_neighbour is not None:
            metrics["nearest_neighbour_accuracy"] = first.nearest_neighbour
        results = {
            "accuracy": first.accuracy,
            "ci95": first.ci95,
            "batchnorm": first.batchnorm,
            "table": [row._asdict() for row in table],
            "curve": list(trained.history),
        }
        return MetaOutcome(metrics, artifacts, _details(self.task, trained), results)

    def _trained(self) -> MetaTrained:
        task, config = self.task, self.config
        if not config.num_episodes:
            return MetaTrained(self.model.initial(task.backbone), 0, ())
        training = MetaTraining(
            task,
            self.model,
            self.crew,
            self.folder / CHECKPOINTS,
            validate=self._validate if len(task.classes.val) else None,
            on_progress=_Told(self.folder, self.listener.training),
            poll=self.listener.poll,
        )
        trained = training.run()
        _write_curve(self.folder, trained.history)
        return trained

    def _validate(self, state: MetaState) -> dict[str, float]:
        config = self.config
        shape = EpisodeShape(config.num_ways, config.num_shots, config.num_queries)
        evaluation = Evaluation(self.model, self.crew, self.task.classes.val, "val", poll=self.listener.poll)
        (found,) = evaluation.measure(state, [shape], num_episodes=config.eval.num_val_episodes)
        return {"accuracy": found.accuracy, "ci95": found.ci95}

    def _measured(self, state: MetaState) -> list[Measured]:
        """Returns the table over ways and shots; what an earlier session has measured isn't measured again."""
        shapes = table_shapes(self.config)
        facts = self._facts()
        known = _read_evaluation(self.folder, facts)
        missing = [shape for shape in shapes if shape not in known]
        evaluation = Evaluation(
            self.model,
            self.crew,
            self.task.classes.test,
            "test",
            features_of=self.features_of,
            tell=self.listener.evaluating,
            poll=self.listener.poll,
        )
        # Features are computed once for all shapes; else each is measured, and kept, by itself.
        for some in [missing] if self.config.is_by_features and missing else [[shape] for shape in missing]:
            found = evaluation.measure(state, some, num_episodes=self.config.eval.num_episodes)
            known |= {row.shape: row for row in found}
            rows = [row._asdict() for row in known.values()]
            self.folder.write(EVALUATION, json.dumps({"facts": facts, "rows": rows}).encode())
        return [known[shape] for shape in shapes]

    def _facts(self) -> dict[str, str]:
        """What accuracies that are kept rely on beside the training, by the names that an error gives it."""
        return {
            "data": self.task.data.fingerprint,
            "test_classes": self.task.classes.test.digest,
            "initial_weights": hash_state(self.task.backbone.backbone_state()),
        }

    def _estimated(self, state: MetaState) -> Floats:
        """Returns running statistics for a network that has trained without any: the mean over training episodes.

        Who grafts onto the backbone, or freezes it, relies on them.
        """
        num = min(_NUM_MOMENT_EPISODES, self.config.num_episodes)
        blocks = [[Block(index, index + 1)] for index in range(num)]
        found: list[list[Floats]] = self.crew.call("moments", blocks, shared=[state])
        stacked = np.stack([moments for block in found for moments in block])
        return np.asarray(stacked.mean(axis=0, dtype=np.float64), dtype=np.float32)


class _Told:
    """Keeps the learning curve in the run folder up to date, and passes on where the training stands."""

    def __init__(self, folder: Folder, tell: Callable[[MetaProgress], None]) -> None:
        self._folder = folder
        self._tell = tell
        self._num_rows = 0

    def __call__(self, progress: MetaProgress) -> None:
        if len(progress.history) > self._num_rows:
            self._num_rows = len(progress.history)
            _write_curve(self._folder, progress.history)
        self._tell(progress)


def table_shapes(config: MetaConfig) -> list[EpisodeShape]:
    """Returns the episodes that accuracy is measured on; the first are those that the run reports."""
    return [EpisodeShape(ways, shots, config.num_queries) for ways in config.eval_ways for shots in config.eval_shots]


def _read_evaluation(folder: Folder, facts: dict[str, str]) -> dict[EpisodeShape, Measured]:
    """Returns what was measured. Raises `RunError` if that was with other `facts`."""
    try:
        kept = json.loads(folder.read(EVALUATION))
    except FileNotFoundError:
        return {}
    for name, value in facts.items():
        if kept["facts"][name] != value:
            raise RunError(
                f"{folder.location}: the {name.replace('_', ' ')} have changed since accuracy was measured; start a "
                "new run"
            )
    rows = [Measured(**row) for row in kept["rows"]]
    return {row.shape: row for row in rows}


def _write_curve(folder: Folder, history: tuple[dict[str, Any], ...]) -> None:
    if history:
        folder.write(CURVE, parquet_bytes(pa.Table.from_pylist(list(history))))


def _card(task: MetaTask) -> ModelCard:
    return ModelCard(
        backbone=task.config.backbone.name,
        class_names=task.classes.train.names,
        image_size=task.preprocessing.image_size,
        mean=task.preprocessing.mean,
        std=task.preprocessing.std,
        freeze_depth=0,
        keeps_head=False,
    )


def _details(task: MetaTask, trained: MetaTrained) -> dict[str, Any]:
    return {
        "num_train_classes": len(task.classes.train),
        "num_val_classes": len(task.classes.val),
        "num_test_classes": len(task.classes.test),
        "num_episodes": trained.num_episodes,
        "num_skipped_images": task.data.num_skipped,
        "data_fingerprint": task.data.fingerprint,
        "weights": task.weights_used,
    }
