"""Run the stages that train something before a distillation: each in a directory of its own within the output directory.

To add one: a subclass of ``PriorStage``, its entry in ``train.PRIOR_STAGES``, and its name in ``output_dir.STAGES``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from distillm_cli.config.load import Resolved, to_yaml
from distillm_cli.config.schema import TrainConfig
from distillm_cli.errors import START_OVER, CheckpointError, UsageError
from distillm_cli.runs import output_dir
from distillm_cli.runs.cache_planning import TeacherHandle
from distillm_cli.runs.prepare import Prepared
from distillm_cli.runs.resume import as_checkpoint_error, find_checkpoint
from distillm_cli.runs.start import TrainOptions
from distillm_cli.training.checkpoint import Checkpoint
from distillm_cli.training.events import Event, Listener, Note
from distillm_cli.training.metrics_log import new_metrics_log
from distillm_cli.training.trainer import Trainer


@dataclass(frozen=True)
class StageJob:
    """Hold what a stage works with.

    run: with the stage's recipe, and with what earlier stages have trained. resolved: the stage's recipe. output: its
    directory. checkpoint: to resume from. teacher: the run's.
    """

    run: Prepared
    resolved: Resolved
    output: Path
    checkpoint: Checkpoint | None
    teacher: TeacherHandle | None
    listener: Listener

    @property
    def is_at_end(self) -> bool:
        """Return whether the checkpoint is that of the last step."""
        return is_at_end(self.checkpoint, self.run.steps)


def is_at_end(checkpoint: Checkpoint | None, steps: int) -> bool:
    """Return whether the checkpoint is that of the last of ``steps`` steps."""
    return checkpoint is not None and checkpoint.state["progress"]["step"] == steps


class PriorStage(ABC):
    """Train something before a distillation.

    The stage has a recipe of its own, derived from the run's, and with it its own rows, steps, metrics and checkpoints.
    An interrupted stage is resumed, a finished one is not repeated. It starts with the random state of the run's seed, and
    so does what follows, so that the result does not depend on where a run was interrupted.

    name: of its directory. done: describes a finished stage in a note.
    """

    name: ClassVar[str]
    done: ClassVar[str]

    @abstractmethod
    def recipe(self, resolved: Resolved) -> Resolved | None:
        """Return the stage's recipe for a run; None if the run does not have this stage."""

    @abstractmethod
    def title(self, resolved: Resolved) -> str:
        """Return what the stage does, for a note at its start. resolved: the run's recipe."""

    @abstractmethod
    def train(self, job: StageJob) -> None:
        """Train from the job's checkpoint, if there is one, to the end."""

    def is_finished(self, job: StageJob) -> bool:
        """Return whether nothing is left to train."""
        return job.is_at_end

    @abstractmethod
    def restore(self, job: StageJob) -> None:
        """Load what a finished stage has trained, as ``train`` leaves it."""

    def following(self, run: Prepared, output: Path) -> Prepared:
        """Return the run that follows, also on a resume of the run itself. It must not change the random state."""
        return run


@dataclass(frozen=True)
class StageCheckpoints:
    """Hold the checkpoints from which a resumed run and its stages continue. run: None until the stages are finished."""

    run: Checkpoint | None
    stages: Mapping[str, Checkpoint]

    @property
    def all(self) -> list[Checkpoint]:
        """Return every checkpoint."""
        return [*([] if self.run is None else [self.run]), *self.stages.values()]


def stages_of(resolved: Resolved, stages: Iterable[PriorStage]) -> dict[PriorStage, Resolved]:
    """Return the stages that a run has, in order, with their recipes."""
    recipes = {stage: stage.recipe(resolved) for stage in stages}
    return {stage: recipe for stage, recipe in recipes.items() if recipe is not None}


def check_directories(names: Iterable[str], output: Path) -> None:
    """Raise UsageError if a stage, which has the name of its directory, would overwrite a directory of the user."""
    for name in names:
        place = output / name
        if place.exists() and not output_dir.has_stage(output, name):
            what = f"{place} is not a stage of a run in {output}, but the run needs it"
            raise UsageError("usage.output_exists", what, hint="choose another --output, or move it away")


def read_checkpoints(
    resolved: Resolved, stages: Mapping[str, Resolved], output: Path, options: TrainOptions
) -> StageCheckpoints:
    """Return the checkpoints to resume from. stages: recipes by name. Raises CheckpointError if there are none."""
    if not options.resume:
        return StageCheckpoints(None, {})
    moved = options.moved_inputs
    checkpoint = find_checkpoint(output, resolved.recipe, is_required=not stages, moved_inputs=moved)
    if checkpoint is not None:
        return StageCheckpoints(checkpoint, {})
    found: dict[str, Checkpoint] = {}
    for name, recipe in stages.items():
        place = output / name
        checkpoint = find_checkpoint(place, recipe.recipe, is_required=not found, moved_inputs=moved)
        if checkpoint is None:
            break
        found[name] = checkpoint
    return StageCheckpoints(None, found)


def run_prior_stages(
    run: Prepared,
    stages: Mapping[PriorStage, Resolved],
    resolved: Resolved,
    output: Path,
    checkpoints: StageCheckpoints,
    teacher: TeacherHandle | None,
    listener: Listener,
) -> Prepared:
    """Run the stages of a run into ``output``; return the run that follows. If it is resumed itself, nothing is trained."""
    for stage, recipe in stages.items():
        place = output / stage.name
        if checkpoints.run is None:
            of_stage = replace(run, recipe=recipe.recipe)
            job = StageJob(of_stage, recipe, place, checkpoints.stages.get(stage.name), teacher, listener)
            train_or_restore(
                recipe,
                place,
                listener,
                title=stage.title(resolved),
                done=stage.done,
                train=partial(stage.train, job),
                restore=partial(stage.restore, job) if stage.is_finished(job) else None,
            )
        run = stage.following(run, place)
    return run


def train_or_restore(
    recipe: Resolved,
    output: Path,
    listener: Listener,
    *,
    title: str,
    done: str,
    train: Callable[[], object],
    restore: Callable[[], None] | None,
) -> None:
    """Train a stage into ``output``, or restore a finished one. The random state is that of the seed before and after.

    title, done: describe the stage in a note, at its start and if it is finished. restore: None if it is not finished.
    """
    seed = recipe.recipe.train.seed
    if restore is not None:
        restore()
        listener(Note(f"{done}: {output}"))
    else:
        listener(Note(f"{title}, in {output}"))
        output_dir.write_recipe(output, to_yaml(recipe))
        torch.manual_seed(seed)
        train()
    torch.manual_seed(seed)


def start_trainer(
    build: Callable[[Listener], Trainer],
    output: Path,
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    listener: Listener,
) -> Trainer:
    """Return the trainer that ``build`` makes with its listener, with the state of the checkpoint if there is one.

    Its events go to ``OUTPUT/metrics.jsonl`` and to ``listener``. The caller loads the student's weights. Raises
    CheckpointError.
    """
    if checkpoint is not None and not checkpoint.tensors:
        what = "the best checkpoint, older than the last ones, has weights only"
        hint = f"use it as a model, or {START_OVER}"
        raise CheckpointError("checkpoint.weights_only", what, where=str(checkpoint.path), hint=hint)
    progress = {"step": 0} if checkpoint is None else checkpoint.state["progress"]
    log = new_metrics_log(output / output_dir.METRICS, config, progress)

    def log_and_report(event: Event) -> None:
        log(event)
        listener(event)

    trainer = build(log_and_report)
    if checkpoint is not None:
        with as_checkpoint_error(checkpoint):
            trainer.load(checkpoint)
    return trainer
