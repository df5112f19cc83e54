"""Learn the masks of ``robustkd`` on a share of the rows, in a stage before the distillation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from distillm_cli.config.derived import fixed_values, mask_stage_recipe
from distillm_cli.config.load import Resolved
from distillm_cli.data.batching import Examples, batches_by_length
from distillm_cli.extras import MASK_FILE, MASK_STAGE
from distillm_cli.losses.objectives import CrossEntropy
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.rollouts.pool import SequencePool
from distillm_cli.runs import output_dir
from distillm_cli.runs.build import new_scheduler
from distillm_cli.runs.prepare import Prepared
from distillm_cli.runs.stages import PriorStage, StageJob, start_trainer
from distillm_cli.training.checkpoint import Checkpoints
from distillm_cli.training.distributed import in_first_process
from distillm_cli.training.events import Listener, Note
from distillm_cli.training.state import RunInfo
from distillm_cli.training.trainer import Trainer
from distillm_cli.training.validation import Validator
from distillm_cli.utils import manifest
from distillm_cli.utils.storage import staging_directory, storing
from distillm_cli.utils.text import counted

if TYPE_CHECKING:
    from distillm_cli.extras.robustkd import MaskTraining

_SEED = 0x6D61736B  # added to the run's seed for the choice of rows


class LearnMasks(PriorStage):
    """Train masks and detoxified features of the frozen teacher (``robustkd.blocks``). They are in ``mask.safetensors``."""

    name = MASK_STAGE
    done = "masks already learned"

    def recipe(self, resolved: Resolved) -> Resolved | None:
        return mask_stage_recipe(resolved)

    def title(self, resolved: Resolved) -> str:
        blocks = counted(resolved.recipe.robustkd.blocks, "block")
        return f"learning masks for the teacher's last {blocks} first (robustkd.blocks)"

    def train(self, job: StageJob) -> None:
        from distillm_cli.extras.robustkd import MaskTraining, mean_features  # imports the models

        run = with_mask_rows(job.run)
        teacher = run.teacher
        config = run.recipe.robustkd
        rows = batches_by_length(run.train.sequences, max(run.recipe.train.batch_size, 16))
        masks = MaskTraining(teacher, mean_features(teacher, config.blocks, rows), config)
        try:
            trainer = start_trainer(
                lambda listener: _trainer(run, job, masks, listener),
                job.output,
                run.recipe.train,
                job.checkpoint,
                job.listener,
            )
            state = trainer.train()
            _publish(job.output, masks)
        finally:
            masks.release()
        loss = "" if state.valid_loss is None else f", valid CE of the teacher with masks {state.valid_loss:.4f}"
        rows_used = counted(len(run.train), "row")
        job.listener(Note(f"learned masks on {rows_used}: mean m = {masks.mask_KD.mean().item():.3f}{loss}"))

    def is_finished(self, job: StageJob) -> bool:
        at_end = replace(job, run=with_mask_rows(job.run)).is_at_end
        return at_end and (job.output / MASK_FILE).is_file()

    def restore(self, job: StageJob) -> None:
        """Load nothing: the extra of the run that follows reads the masks."""

    def following(self, run: Prepared, output: Path) -> Prepared:
        return replace(run, stages={**run.stages, self.name: output})


def with_mask_rows(run: Prepared) -> Prepared:
    """Return the run with the share of its training rows on which masks are learned, drawn by the seed."""
    count = max(1, round(run.recipe.robustkd.mask_rows * len(run.train)))
    chosen = np.random.default_rng(run.recipe.train.seed + _SEED).choice(len(run.train), count, replace=False)
    chosen.sort()
    sequences = [replace(run.train.sequences[i], row=row) for row, i in enumerate(chosen)]
    return replace(run, train=Examples(sequences, [run.train.rows[i] for i in chosen]))


def _trainer(run: Prepared, job: StageJob, masks: MaskTraining, listener: Listener) -> Trainer:
    """Return a trainer of the masks alone: the teacher with masks is the model, and its parameters are frozen."""
    from distillm_cli.extras.robustkd import write_masks

    train = run.recipe.train
    info = RunInfo(
        steps=run.steps,
        steps_per_epoch=run.order.steps_per_epoch,
        method=run.recipe.method,
        device=run.device,
        dtype=torch.float32,  # no autocast: the teacher computes in its own dtype
        pass_overhead=run.pass_overhead,
        identity=lambda: {"recipe": fixed_values(job.run.recipe), "inputs": job.run.inputs},
    )

    def save(directory: Path) -> None:
        write_masks(directory, masks.mask_KD, masks.feature_KD)

    return Trainer(
        StudentLoss(run.teacher, CrossEntropy(), extras={MASK_STAGE: masks}),
        SequencePool(run.batch, new_scheduler(run)),
        None,
        validator=Validator(batches_by_length(run.answered, max(train.batch_size, 16)), info, listener=listener),
        checkpoints=Checkpoints(job.output / output_dir.CHECKPOINTS, save, keep=train.keep, listener=listener),
        config=train,
        run=info,
        listener=listener,
    )


@in_first_process
def _publish(output: Path, masks: MaskTraining) -> None:
    """Write the masks into the stage's directory: a complete file or none."""
    from distillm_cli.extras.robustkd import write_masks

    with storing(f"cannot write to {output}", "free disk space and continue with --resume"):
        manifest.record(output, [MASK_FILE])
        with staging_directory(output / MASK_FILE) as staged:
            write_masks(staged, masks.mask_KD, masks.feature_KD)
            (staged / MASK_FILE).replace(output / MASK_FILE)
