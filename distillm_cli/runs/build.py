"""Build the trainer of a prepared run: schedule, samplers, sequence pool, objective, validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from distillm_cli.config.derived import fixed_values
from distillm_cli.config.schedule import OUTPUT_LOSS
from distillm_cli.config.schema import RolloutConfig, chosen
from distillm_cli.data.batching import batches_by_length
from distillm_cli.extras import build_extras
from distillm_cli.losses import objectives
from distillm_cli.losses.extra import Extra
from distillm_cli.losses.fused import Kernel
from distillm_cli.losses.kernels import KERNELS, choose_kernel
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.sharded_student import ShardedStudent, check_can_shard, is_sharded
from distillm_cli.rollouts.interleaved import InterleavedSampler
from distillm_cli.rollouts.mixture import MixtureSampler
from distillm_cli.rollouts.pool import ResponseTable, SequencePool
from distillm_cli.rollouts.sampler import ModelSampler, Sampler
from distillm_cli.rollouts.scheduler import Scheduler, Source, build_scheduler
from distillm_cli.runs import output_dir
from distillm_cli.runs.divergence_probe import divergence_probe
from distillm_cli.runs.prepare import Prepared
from distillm_cli.runs.server_checks import rollout_server
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.training.checkpoint import Checkpoints
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Note
from distillm_cli.training.health import StepHealth
from distillm_cli.training.sharding import Sharding
from distillm_cli.training.state import RunInfo
from distillm_cli.training.trainer import Trainer
from distillm_cli.training.validation import ScheduleProbe, Validator
from distillm_cli.utils.modules import eval_mode

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone

_PROBE_ROWS = 128  # held-out rows by which a schedule sets φ: their forward pass costs less than a step
_PROBE_SEED = 1 << 33  # added to the seed for the outputs that are measured and not trained on
_TEACHER_SEED = 1 << 32  # added to the seed, since equal random numbers would make the two samples of a pair similar


def new_scheduler(run: Prepared) -> Scheduler:
    """Return the run's schedule in its initial state."""
    recipe, epoch_steps = run.recipe, run.order.steps_per_epoch
    return build_scheduler(
        recipe.schedule, steps=run.steps, seed=recipe.train.seed, batches=recipe.rollout.bulk, epoch_steps=epoch_steps
    )


def build_trainer(
    run: Prepared,
    output: Path,
    listener: Listener,
    *,
    teacher: LocalTeacher | None,
    score: Callable[[], dict[str, float | None]] | None = None,
    objective: objectives.Objective | None = None,
    extras: Mapping[str, Extra] | None = None,
) -> Trainer:
    """Return the trainer of a prepared run, with checkpoints under ``output``.

    teacher: None for SFT. score: see ``Validator``. objective, extras: of a stage, in place of the recipe's.
    """
    recipe = run.recipe
    if objective is None:
        epochs = run.steps / run.order.steps_per_epoch
        objective = objectives.build(None if run.sft else recipe.objective, epochs)
    student_loss = _student_loss(run, objective, teacher, extras, listener)
    info = _run_info(run)
    sampling = partial(_sampling_from_student, student_loss, info)

    def save_model(directory: Path) -> None:
        run.save_model(directory)
        student_loss.save_extra_weights(directory)

    scheduler = new_scheduler(run)
    pool = SequencePool(
        run.batch,
        scheduler,
        student=_student_sampler(run, listener) if recipe.schedule.uses_student_outputs else None,
        responses=_response_tables(run, scheduler, listener),
        bulk=recipe.rollout.bulk,
        rows_beside=objective.rows_beside,
        sampling=sampling,
        teacher_sampling=partial(_sampling_from_teacher, student_loss, run),
    )
    sharding = student_loss.sharding
    validator = Validator(
        batches_by_length(run.answered, max(recipe.train.batch_size, 16)),
        info,
        select=recipe.train.select,
        teacher=teacher,
        score=None if score is None else partial(_score_whole, sharding, score),
        # Shards are not replaced: the loss before training is measured before the first step.
        at_start=None if sharding.is_on else partial(_start_weights, student_loss, run),
        probe=_schedule_probe(run, info, teacher, sampling, listener),
        # A stage before the run, whose states are all cached, may have released the teacher.
        divergences=None if teacher is None or teacher.has_released_model else divergence_probe(run, info),
        listener=listener,
    )
    checkpoints = Checkpoints(output / output_dir.CHECKPOINTS, save_model, keep=recipe.train.keep, listener=listener)
    return Trainer(
        student_loss,
        pool,
        teacher,
        validator=validator,
        checkpoints=checkpoints,
        config=recipe.train,
        run=info,
        health=StepHealth(
            student_loss,
            pool,
            every=recipe.train.health_every,
            log_steps=recipe.train.log_steps,
            stop_ids=run.student.stop_ids,
        ),
        listener=listener,
    )


def _run_info(run: Prepared) -> RunInfo:
    """Return what the training loop needs to know of a run."""
    recipe = run.recipe
    return RunInfo(
        steps=run.steps,
        steps_per_epoch=run.order.steps_per_epoch,
        method=recipe.method,
        device=run.device,
        dtype=run.dtype,
        pass_overhead=run.pass_overhead,
        cuts_outputs=recipe.rollout.prefix is not None,
        identity=lambda: {"recipe": fixed_values(recipe), "inputs": run.inputs},
    )


@contextmanager
def _sampling_from_student(student_loss: StudentLoss, info: RunInfo) -> Iterator[None]:
    """Sample from the student inside the block, with all of its weights."""
    with eval_mode(student_loss), info.autocast(), student_loss.sharding.whole():
        yield


@contextmanager
def _sampling_from_teacher(student_loss: StudentLoss, run: Prepared) -> Iterator[None]:
    """Sample from the teacher inside the block. A teacher that is trained has dropout."""
    with eval_mode(student_loss), run.teacher.on_device():
        yield


@contextmanager
def _start_weights(student_loss: StudentLoss, run: Prepared) -> Iterator[None]:
    """Give the student, and a teacher that is trained, their weights from before training inside the block."""
    trained = student_loss.trained_teacher
    with run.with_start_weights(), nullcontext() if trained is None else trained.with_start_weights():
        yield


def _score_whole(sharding: Sharding, score: Callable[[], dict[str, float | None]]) -> dict[str, float | None]:
    """Return the scores of the student with all of its weights."""
    with sharding.whole():
        return score()


def _student_loss(
    run: Prepared,
    objective: objectives.Objective,
    teacher: LocalTeacher | None,
    extras: Mapping[str, Extra] | None,
    listener: Listener,
) -> StudentLoss:
    """Return the loss with its kernel, and with the student's shards if it is sharded. extras: None for the recipe's."""
    recipe = run.recipe
    student_loss = StudentLoss(
        run.student,
        objective,
        teacher_head=None if teacher is None else teacher.head,
        matmul_dtype=None if run.dtype == torch.float32 else run.dtype,
        router_aux=run.router_aux,
        extras=build_extras(recipe, run.pair, run.stages, listener) if extras is None else extras,
    )
    student_loss.kernel = _loss_kernel(run, student_loss, teacher, listener)
    if is_sharded(recipe.train.shard):
        check_can_shard(run.student, student_loss.extras.keys())
        student_loss.sharding = ShardedStudent(run.student, student_loss, run.device, ("log_probs",))
        listener(Note(f"the student is distributed over {world().size} processes (FSDP)"))
    return student_loss


def _schedule_probe(
    run: Prepared,
    info: RunInfo,
    teacher: LocalTeacher | None,
    sampling: Callable[[], AbstractContextManager[None]],
    listener: Listener,
) -> ScheduleProbe | None:
    """Return what measures the figures that set φ, on evenly spaced held-out rows; None if the schedule needs none."""
    recipe = run.recipe
    if not recipe.schedule.measures or teacher is None or not run.answered:
        return None
    spread = np.linspace(0, len(run.answered) - 1, min(_PROBE_ROWS, len(run.answered)))
    sampler = None
    if OUTPUT_LOSS in recipe.schedule.measures:
        sampler = _plain_sampler(run, listener, seed=recipe.train.seed + _PROBE_SEED, steps=run.steps, by_row=True)
    return ScheduleProbe(
        [run.answered[int(i)] for i in spread],
        info,
        teacher,
        batch_rows=_PROBE_ROWS,
        figures=recipe.schedule.measures,
        sampler=sampler,
        sampling=sampling,
    )


def _loss_kernel(
    run: Prepared, student_loss: StudentLoss, teacher: LocalTeacher | None, listener: Listener
) -> Kernel | None:
    """Return the kernel that computes the loss, checked on the device of the run; None for torch's operations."""
    if teacher is None or run.recipe.train.loss_kernel == "eager":
        return None
    head = run.student.head()
    find = partial(
        choose_kernel,
        run.recipe.train.loss_kernel,
        head.to(run.device, torch.float32) if run.student.is_to_be_sharded else head,
        teacher.head,
        student_loss.criterion.weights(Source.DATASET).divergence,
        run.dtype,
    )
    name, found = world().broadcast(find)  # by the clock
    if found:
        listener(Note(found))
    return None if name == "eager" else KERNELS[name]()


def sampling_models(run: Prepared) -> list[Backbone]:
    """Return the models that must be able to generate for the run to train."""
    recipe = run.recipe
    schedule = recipe.schedule
    models = []
    if not run.sft and schedule.uses_student_outputs:
        models.append(run.student)
    decodes_too = schedule.uses_student_outputs and recipe.decodes_with_teacher
    samples = schedule.uses_teacher_samples and run.teacher_samples is None
    if run.pair.teacher is not None and (decodes_too or samples):
        models.append(run.pair.teacher)
    return models


def _teacher_sampling(rollout: RolloutConfig) -> RolloutConfig:
    """Return the ``rollout`` section with the teacher's sampling settings in place of the student's."""
    return rollout.model_copy(
        update={"temperature": rollout.teacher_temperature, "top_p": rollout.teacher_top_p, "top_k": 0}
    )


def _student_sampler(run: Prepared, listener: Listener) -> Sampler:
    """Return the source of student outputs."""
    recipe = run.recipe
    teacher = run.pair.teacher
    rollout = recipe.rollout
    max_length = _max_length(run)
    seed = recipe.train.seed
    if teacher is not None and recipe.schedule.drafts:
        correcting = _teacher_sampling(rollout)
        return InterleavedSampler(
            run.student, teacher, rollout, correcting, max_length=max_length, seed=seed, listener=listener
        )
    if teacher is not None and recipe.samples_from_mixture:
        return MixtureSampler(
            run.student, teacher, rollout, max_length=max_length, seed=seed, steps=run.steps, listener=listener
        )
    return _plain_sampler(run, listener, seed=seed, steps=run.steps, with_log_probs=recipe.schedule.weights_replay)


def _plain_sampler(
    run: Prepared, listener: Listener, *, seed: int, steps: int, by_row: bool = False, with_log_probs: bool = False
) -> Sampler:
    """Return the sampler of the student alone: in this process, or by the server of ``rollout.server``."""
    rollout = run.recipe.rollout
    max_length = _max_length(run)
    if rollout.server is None:
        return ModelSampler(
            run.student,
            rollout,
            max_length=max_length,
            seed=seed,
            steps=steps,
            by_row=by_row,
            with_log_probs=with_log_probs,
            listener=listener,
        )
    from distillm_cli.models.served import StudentFiles
    from distillm_cli.rollouts.server_sampler import ServerSampler

    server, model = rollout_server(run.recipe)
    student = StudentFiles(run.student, run.dtype)
    return ServerSampler(
        student, server, model, rollout, max_length=max_length, seed=seed, steps=steps, by_row=by_row, listener=listener
    )


def _response_tables(run: Prepared, scheduler: Scheduler, listener: Listener) -> dict[Source, ResponseTable]:
    """Return the tables of responses by row: the teacher's, and the student's if it samples an epoch in advance."""
    rollout = run.recipe.rollout
    seed = run.recipe.train.seed
    new_sampler = partial(ModelSampler, max_length=_max_length(run), by_row=True, listener=listener)
    new_table = partial(
        ResponseTable,
        rows=run.batch,
        steps=run.steps,
        steps_per_epoch=run.order.steps_per_epoch,
        bulk=rollout.bulk,
        listener=listener,
    )
    tables: dict[Source, ResponseTable] = {}
    sampler: Sampler
    if scheduler.config.uses_teacher_samples:
        sampler = new_sampler(run.teacher, _teacher_sampling(rollout), seed=seed + _TEACHER_SEED, is_teacher=True)
        redraw = not scheduler.reuses_teacher_samples
        tables[Source.TEACHER] = new_table(sampler, given=run.teacher_samples, redraw=redraw, name="teacher samples")
    if scheduler.samples_student_by_epoch:
        sampler = _plain_sampler(run, listener, seed=seed, steps=1, by_row=True)
        tables[Source.ROLLOUT] = new_table(sampler, redraw=True, whole_epochs=True, name="student samples")
    return tables


def _max_length(run: Prepared) -> int:
    context = run.student.context
    longest = chosen(run.recipe.data.max_length)
    return longest if context is None else min(longest, context)
