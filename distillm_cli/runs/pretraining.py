"""Pre-train a student on the teacher's confidence before distillation (``student.ptp``, see ``extras.ptp``)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from distillm_cli.config.derived import ptp_stage_recipe
from distillm_cli.config.load import Resolved
from distillm_cli.data.batching import batches_by_length
from distillm_cli.extras.ptp import CLASSES, ConfidenceHead, ConfidenceOnly, confidence_of, labels_of, medians
from distillm_cli.runs import output_dir
from distillm_cli.runs.build import build_trainer
from distillm_cli.runs.prepare import Prepared
from distillm_cli.runs.resume import best_checkpoint, checkpoint_weights, restore_student
from distillm_cli.runs.stages import PriorStage, StageJob, start_trainer
from distillm_cli.teachers.cached import CachedTeacher
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Note
from distillm_cli.training.trainer import Trainer
from distillm_cli.types import Sequence


class PreTraining(PriorStage):
    """Pre-train the student. The directory has recipe, metrics and checkpoints, whose weights distillation starts from."""

    name = output_dir.PTP
    done = "already pre-trained"

    def recipe(self, resolved: Resolved) -> Resolved | None:
        return ptp_stage_recipe(resolved)

    def title(self, resolved: Resolved) -> str:
        epochs = resolved.recipe.student.ptp
        return f"pre-training the student on the teacher's confidence (student.ptp = {epochs:g})"

    def train(self, job: StageJob) -> None:
        if job.checkpoint is not None:
            restore_student(job.run.student, job.checkpoint)
        build = partial(_trainer, job, _labels(job))
        trainer = start_trainer(build, job.output, job.run.recipe.train, job.checkpoint, job.listener)
        state = trainer.train()
        figures = [f"{name.removeprefix('ptp_').replace('_', ' ')} {share:.0%}" for name, share in state.scores.items()]
        job.listener(Note(f"pre-trained; predicted on held-out rows: {', '.join(figures) or 'no rows'}"))

    def restore(self, job: StageJob) -> None:
        restore_student(job.run.student, best_checkpoint(job.output))

    def following(self, run: Prepared, output: Path) -> Prepared:
        return replace(
            run, before=run, initial_weights=lambda: checkpoint_weights(run.student, best_checkpoint(output))
        )


def _trainer(job: StageJob, labels: dict[Sequence, Tensor], listener: Listener) -> Trainer:
    run = job.run
    extra = ConfidenceHead(run.student, labels, seed=run.recipe.train.seed, device=run.device)
    trainer = build_trainer(run, job.output, listener, teacher=None, objective=ConfidenceOnly(), extras={"ptp": extra})
    trainer.run = replace(trainer.run, method=output_dir.PTP)
    trainer.validator.at_start = None  # held-out rows are measured before the first step: the new layer is trained too
    return trainer


def _labels(job: StageJob) -> dict[Sequence, Tensor]:
    """Return the class of each supervised token of the rows. The teacher's states of training rows are cached as usual."""
    assert job.teacher is not None
    run = job.run
    teacher = job.teacher.teacher
    rows = max(run.recipe.train.batch_size, 16)
    # Held-out rows first: a teacher whose training rows are all cached may be released.
    held_out = confidence_of(
        batches_by_length(run.answered, rows),
        lambda batch, sequences: teacher.compute(teacher.seen(batch, sequences)),
        lambda: teacher.head,
        run.device,
    )
    batches = batches_by_length(run.train.sequences, rows)
    if world().size > 1 and isinstance(teacher, CachedTeacher) and teacher.composition is not None:
        batches = teacher.composition.batches_with(run.train.sequences)  # each is computed in one process
    training = confidence_of(batches, teacher.hidden, lambda: teacher.head, run.device)
    teacher.exchange((), run.device)
    thresholds = medians(training.values())
    labels = {s: labels_of(found, thresholds) for s, found in (held_out | training).items()}
    counts = Counter(label for s in run.train.sequences for label in labels[s].tolist())
    shown = ", ".join(f"{counts[i]:,} {name.replace('_', ' ')}" for i, name in enumerate(CLASSES))
    job.listener(Note(f"tokens by the teacher's confidence: {shown}"))
    return labels
