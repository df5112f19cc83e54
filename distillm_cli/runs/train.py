"""Train a model with ``sft`` or ``distill``, from a resolved recipe to a published model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distillm_cli.config.derived import sft_stage_recipe
from distillm_cli.config.load import Resolved, to_yaml, with_resolved_values
from distillm_cli.data.conversations import content_text
from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.data.rows import Row
from distillm_cli.errors import START_OVER, CheckpointError, Interrupted, UsageError, signal_number
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.runs import output_dir
from distillm_cli.runs.build import build_trainer
from distillm_cli.runs.cache_planning import TeacherHandle, open_teacher
from distillm_cli.runs.defaults import fitted
from distillm_cli.runs.prepare import Prepared, prepare
from distillm_cli.runs.publish import publish_model
from distillm_cli.runs.report import (
    AFTER,
    BEFORE,
    FINE_TUNED,
    TEACHER,
    ModelReport,
    Report,
    check_can_generate,
    check_selection_metric,
    labels,
    model_title,
    selects_by_metric,
)
from distillm_cli.runs.resume import (
    as_checkpoint_error,
    best_checkpoint,
    check_same_inputs,
    check_total_steps,
    checkpoint_weights,
    find_checkpoint,
    restore_student,
    with_recorded_values,
)
from distillm_cli.runs.run_results import FineTuned, Outcome, Sample, TrainResult, TrainSummary
from distillm_cli.runs.start import TrainOptions
from distillm_cli.training.checkpoint import Checkpoint, read_checkpoint, visible
from distillm_cli.training.events import Event, Listener, Note, Warned
from distillm_cli.training.metrics_log import MetricsLog
from distillm_cli.training.state import TrainerState
from distillm_cli.training.trainer import Trainer
from distillm_cli.utils.memory import keep_freed_memory
from distillm_cli.utils.signals import received_signal
from distillm_cli.utils.text import counted, format_bytes


@dataclass(frozen=True)
class _Training:
    """Hold the objects of a training that is ready to start: of a run, or of the fine-tuning stage before it.

    checkpoint: to resume from. started: start of the command, by ``time.perf_counter``.
    """

    command: str
    run: Prepared
    resolved: Resolved
    output: Path
    checkpoint: Checkpoint | None
    teacher: TeacherHandle | None
    started: float


@dataclass(frozen=True)
class _Checkpoints:
    """Hold the checkpoints from which a resumed run and its fine-tuning stage continue, None without one."""

    run: Checkpoint | None = None
    stage: Checkpoint | None = None


def train(
    command: str,
    resolved: Resolved,
    output: Path,
    listener: Listener,
    options: TrainOptions,
    prefetcher: Prefetcher | None = None,
    on_ready: Callable[[], None] | None = None,
) -> TrainResult:
    """Run a recipe into ``output``, after ``check_output``. command: "sft" or "distill".

    prefetcher: of its rows, if one is already running. on_ready: called when everything is prepared and ``output`` is
    cleared of an earlier run (or has the run to resume).
    """
    if resolved.recipe.disco.enabled:
        from distillm_cli.runs.embeddings import train_embeddings

        return train_embeddings(command, resolved, output, listener, options, on_ready)
    started = time.perf_counter()
    if options.resume:
        resolved = with_recorded_values(resolved, output)
    resolved = fitted(resolved)
    check_selection_metric(resolved.recipe)
    for note in resolved.notes:
        listener(Warned(note))
    _check_stage_directory(resolved, output)
    try:
        checkpoints = _checkpoints(resolved, output, options)
        run = prepare(resolved.recipe, listener, prefetcher)
        resolved = with_resolved_values(resolved, run.resolved_values)
        _check_resumable(run, checkpoints, listener)
        check_can_generate(run)
        teacher = _open_teacher(run, checkpoints.run, options, listener)
    except KeyboardInterrupt as stop:
        raise interrupted(None, stop) from None
    if options.overwrite:  # only now: an error in the input must not delete an earlier run
        for stuck in output_dir.clear(output):
            listener(Warned(f"cannot remove all of {stuck}, of an earlier run: it uses disk space"))
    if on_ready is not None:
        on_ready()
    stage = sft_stage_recipe(resolved)
    output_dir.write_recipe(output, to_yaml(resolved), stage=None if stage is None else output_dir.SFT)
    try:
        if stage is not None:
            run = _fine_tune(run, stage, output / output_dir.SFT, checkpoints, listener)
        training = _Training(command, run, resolved, output, checkpoints.run, teacher, started)
        result = _train(training, listener)
        report_checkpoints(output, resolved.recipe.train.keep, listener)
        return result
    except KeyboardInterrupt as stop:
        raise interrupted(output, stop) from None


def _check_stage_directory(resolved: Resolved, output: Path) -> None:
    """Raise UsageError if the fine-tuning stage would overwrite an ``sft/`` directory of the user."""
    place = output / output_dir.SFT
    if sft_stage_recipe(resolved) is not None and place.exists() and not output_dir.has_stage(output):
        what = f"{place} is not a stage of a run in {output}, but the run needs it for fine-tuning"
        raise UsageError("usage.output_exists", what, hint="choose another --output, or move it away")


def _checkpoints(resolved: Resolved, output: Path, options: TrainOptions) -> _Checkpoints:
    """Return the checkpoints to resume from. Raises CheckpointError."""
    if not options.resume:
        return _Checkpoints()
    stage, moved = sft_stage_recipe(resolved), options.moved_inputs
    checkpoint = find_checkpoint(output, resolved.recipe, is_required=stage is None, moved_inputs=moved)
    if checkpoint is not None or stage is None:
        return _Checkpoints(run=checkpoint)
    return _Checkpoints(stage=find_checkpoint(output / output_dir.SFT, stage.recipe, moved_inputs=moved))


def _check_resumable(run: Prepared, checkpoints: _Checkpoints, listener: Listener) -> None:
    """Raise CheckpointError if the run's inputs have changed, or it has fewer steps than at its start."""
    for checkpoint in (checkpoints.run, checkpoints.stage):
        if checkpoint is not None:
            check_same_inputs(checkpoint, run.inputs)
    if checkpoints.run is not None:
        check_total_steps(checkpoints.run, run.steps, run.order.steps_per_epoch, listener)


def _open_teacher(
    run: Prepared, checkpoint: Checkpoint | None, options: TrainOptions, listener: Listener
) -> TeacherHandle | None:
    before = None if checkpoint is None else checkpoint.state.get("teacher_cache")
    return open_teacher(run, listener, started_mode=before, rebuild=options.rebuild_teacher_cache)


def _fine_tune(run: Prepared, stage: Resolved, output: Path, checkpoints: _Checkpoints, listener: Listener) -> Prepared:
    """Fine-tune the run's student; return the run that starts with the resulting weights, which are also in ``output``.

    An interrupted stage is resumed, and the weights of a finished one are read. Distillation starts with the same
    random state in either case. If the run itself is resumed, nothing is trained.
    """
    if checkpoints.run is None:
        seed = run.recipe.train.seed
        if _is_finished(run, stage, output, checkpoints.stage):
            restore_student(run.student, best_checkpoint(output))
            listener(Note(f"already fine-tuned: {output}"))
        else:
            epochs = stage.recipe.train.epochs
            listener(Note(f"fine-tuning the student first (student.sft_epochs = {epochs:g}), in {output}"))
            output.mkdir(parents=True, exist_ok=True)
            output_dir.write_recipe(output, to_yaml(stage))
            torch.manual_seed(seed)
            training = _stage_training(run, stage, output, checkpoints.stage)
            listener(FineTuned(_train(training, listener)))
        torch.manual_seed(seed)
    return replace(run, initial_weights=lambda: checkpoint_weights(run.student, best_checkpoint(output)))


def _stage_training(run: Prepared, stage: Resolved, output: Path, checkpoint: Checkpoint | None) -> _Training:
    without_teacher = replace(
        run, recipe=stage.recipe, pair=replace(run.pair, teacher=None), initial_weights=run.start_weights
    )
    return _Training("sft", without_teacher, stage, output, checkpoint, None, time.perf_counter())


def _is_finished(run: Prepared, stage: Resolved, output: Path, checkpoint: Checkpoint | None) -> bool:
    """Return whether a fine-tuning stage has finished its last step and published its model."""
    if checkpoint is None:
        return False
    steps = replace(run, recipe=stage.recipe).steps
    weights = ("model*.safetensors", "adapter_model.safetensors")
    is_published = any(next(output.glob(pattern), None) for pattern in weights)
    return checkpoint.state["progress"]["step"] == steps and is_published


def _train(training: _Training, listener: Listener) -> TrainResult:
    """Train, restore the best weights, measure the models and publish the student."""
    run = training.run
    output = training.output
    if training.checkpoint is not None:
        restore_student(run.student, training.checkpoint)
    report = Report(run, output / output_dir.EVAL / "report", listener)
    trainer = _trainer(training, report, listener)
    if (stop := received_signal()) is not None:  # an interrupt that a library swallowed while the run was prepared
        raise stop
    state = trainer.train()
    if trainer.checkpoints is not None and state.best_step not in (None, state.step):
        restore_student(run.student, read_checkpoint(trainer.checkpoints.path(state.best_step)))
        best = f"the best {run.recipe.train.select} was {state.best:.4g}, at step {state.best_step}"
        listener(Note(f"{best}: using these weights"))
    models = report.all(trainer)
    publish_model(run, output, training.resolved, state, models, report.measured_on)
    summary = _summary(run, state, models, report.measured_on)
    result = _result(training, trainer, state, models, summary)
    output_dir.write_result(output, result.as_json())
    return result


def report_checkpoints(output: Path, keep: int, listener: Listener) -> None:
    """Remove the checkpoints of a finished run if none are to be kept; report their size."""
    sizes = output_dir.checkpoint_sizes(output)
    if not sizes:
        return
    what = f"{counted(len(sizes), 'checkpoint')} ({format_bytes(sum(sizes))})"
    if keep:
        place = output / output_dir.CHECKPOINTS
        listener(Note(f"Kept {what} in {place}; train.keep 0 removes checkpoints at the end of a run"))
        return
    for stuck in output_dir.remove_checkpoints(output):
        listener(Warned(f"cannot remove {stuck}: it uses disk space"))
    listener(Note(f"Removed {what}: train.keep is 0"))


def _trainer(training: _Training, report: Report, listener: Listener) -> Trainer:
    """Return the trainer, with the state of the checkpoint if there is one."""
    run = training.run
    checkpoint = training.checkpoint
    if checkpoint is not None and not checkpoint.tensors:
        what = "the best checkpoint, older than the last ones, has weights only"
        hint = f"use it as a model, or {START_OVER}"
        raise CheckpointError("checkpoint.weights_only", what, where=str(checkpoint.path), hint=hint)
    teacher = training.teacher
    progress = {"step": 0} if checkpoint is None else checkpoint.state["progress"]
    log = MetricsLog(
        training.output / output_dir.METRICS,
        log_steps=run.recipe.train.log_steps,
        first_step=progress["step"],
        validated=progress.get("valid_loss") is not None,
    )

    def log_and_report(event: Event) -> None:
        log(event)
        listener(event)

    trainer = build_trainer(
        run,
        training.output,
        log_and_report,
        teacher=None if teacher is None else teacher.teacher,
        score=report.score if selects_by_metric(run.recipe) else None,
    )
    if run.device.type == "cpu":
        keep_freed_memory()
    if checkpoint is not None:
        with as_checkpoint_error(checkpoint):
            trainer.load(checkpoint)
    return trainer


def interrupted(output: Path | None, stop: KeyboardInterrupt) -> Interrupted:
    """Return the error of a run that was interrupted outside its loop. output: None before anything was written."""
    number = signal_number(stop)
    if output is None:
        return Interrupted(
            "interrupted before the first step: nothing was written", signal_number=number, hint="start again"
        )
    places = ("", output_dir.SFT, output_dir.DISTILLED)
    checkpoints = next(filter(None, (visible(output / place / output_dir.CHECKPOINTS) for place in places)), None)
    if not checkpoints:
        what = "interrupted before the first step: nothing was saved"
        return Interrupted(what, signal_number=number, where=str(output), hint="start again with --overwrite")
    hint = f"{checkpoints[-1]} is complete; continue with --resume"
    return Interrupted("interrupted between steps", signal_number=number, hint=hint)


def _summary(run: Prepared, state: TrainerState, models: Mapping[str, ModelReport], measured_on: str) -> TrainSummary:
    recipe = run.recipe
    order = [name for name in (BEFORE, FINE_TUNED, AFTER, TEACHER) if name in models]
    label = labels(state, recipe)
    samples = _samples(run, {model_title(name, recipe): models[name].answers for name in order})
    # Without test rows, `--suite SOURCE` would score training rows too; without `--suite`, held-out rows are scored.
    suites = recipe.eval.suites or ((recipe.data.source,) if "test" in run.train_rows.splits else ())
    first_row = next(iter(run.valid.rows), None)
    prompt = None if first_row is None else _question(run, first_row)
    return TrainSummary(
        outcomes=tuple(
            Outcome(label[name], models[name].valid_loss, models[name].scores, is_trained=name == AFTER)
            for name in order
        ),
        measured_on=measured_on,
        samples=samples,
        sources=dict(state.sources),
        source_seconds=dict(state.source_seconds),
        phi_history=tuple(phi for _, phi in state.phis) if recipe.schedule.has_phi else None,
        schedule=None if run.sft else recipe.schedule.kind,
        row_weight=recipe.objective.row_weight if not run.sft and state.sources["rollout"] else 0.0,
        suites=tuple(suites),
        prompt=samples[0].prompt if samples else prompt,
        has_sft_stage=bool(recipe.student.sft_epochs),
        has_answers=bool(suites) or any(row.is_answered for row in run.valid.rows),
    )


def _samples(run: Prepared, answers: Mapping[str, list[str]]) -> tuple[Sample, ...]:
    """Return three evenly spaced held-out rows with the response of every model."""
    answered = min(len(texts) for texts in answers.values())
    indices = sorted({0, answered // 3, 2 * answered // 3}) if answered else []
    return tuple(
        Sample(
            _question(run, run.valid.rows[i]),
            run.valid.rows[i].references,
            {name: texts[i] for name, texts in answers.items()},
        )
        for i in indices
    )


def _question(run: Prepared, row: Row) -> str:
    """Return the prompt of a row, without the text of a template if the row has an instruction or messages."""
    if row.instruction is not None:
        return "\n".join(filter(None, (row.instruction, row.input)))
    if row.messages is not None and row.messages[-1]["role"] == "user":
        question = content_text(row.messages[-1].get("content"))
        if question is not None:
            return question
    return run.encoder.renderer.prompt(row)


def _result(
    training: _Training,
    trainer: Trainer,
    state: TrainerState,
    models: Mapping[str, ModelReport],
    summary: TrainSummary,
) -> TrainResult:
    teacher = training.teacher
    counts = trainer.pool.counts
    return TrainResult(
        command=training.command,
        output=training.output,
        wall_s=round(time.perf_counter() - training.started, 3),
        steps=state.step,
        tokens=state.tokens,
        tokens_per_s=round(state.tokens / max(state.seconds, 1e-9), 1),
        train_loss=state.train_loss,
        valid_loss=models[AFTER].valid_loss,
        phi=trainer.scheduler.phi,
        rollout_steps=state.steps_with(Source.ROLLOUT),
        replay_steps=state.steps_with(Source.REPLAY),
        dataset_steps=state.steps_with(Source.DATASET),
        teacher_steps=state.steps_with(Source.TEACHER),
        sampled_sequences=counts.student_sequences,
        sampled_tokens=counts.student_tokens,
        teacher_sampled_sequences=counts.teacher_sequences,
        teacher_sampled_tokens=counts.teacher_tokens,
        train_s=round(state.seconds, 3),
        stopped=state.reason,
        best_step=state.best_step,
        report={name.replace(" ", "_"): {"valid_loss": m.valid_loss} | m.scores for name, m in models.items()},
        summary=summary,
        teacher_cache=None if teacher is None else teacher.facts(),
        teacher_tokens=None if teacher is None else teacher.teacher.tokens,
    )
