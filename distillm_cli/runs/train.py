"""Train a model with ``sft`` or ``distill``, from a resolved recipe to a published model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from distillm_cli.config.derived import sft_stage_recipe
from distillm_cli.config.load import Resolved, to_yaml, with_resolved_values
from distillm_cli.config.schema import Recipe
from distillm_cli.data.conversations import content_text
from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.data.rows import Row
from distillm_cli.errors import Interrupted, UsageError, signal_number
from distillm_cli.extras import check_extras
from distillm_cli.models.devices import dtype_name, resolve_dtype
from distillm_cli.models.sharded_student import is_sharded
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.runs import output_dir
from distillm_cli.runs.build import build_trainer
from distillm_cli.runs.cache_planning import TeacherHandle, check_rows, open_teacher, plan_cache
from distillm_cli.runs.defaults import fitted
from distillm_cli.runs.machine import machine_of_run, machine_title
from distillm_cli.runs.mask_stage import LearnMasks
from distillm_cli.runs.model_card import CardFacts
from distillm_cli.runs.preflight import Finding, check_strict, preflight, report_findings
from distillm_cli.runs.prepare import Prepared, prepare
from distillm_cli.runs.pretraining import PreTraining
from distillm_cli.runs.publish import publish_model
from distillm_cli.runs.report import (
    AFTER,
    BEFORE,
    FINE_TUNED,
    PRE_TRAINED,
    TEACHER,
    TEACHER_AFTER,
    TEACHER_BEFORE,
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
    restore_student,
    with_recorded_values,
)
from distillm_cli.runs.run_results import FineTuned, Outcome, Sample, TrainResult, TrainSummary
from distillm_cli.runs.server_checks import check_served_teacher, check_servers
from distillm_cli.runs.source_shares import source_figures
from distillm_cli.runs.stages import (
    PriorStage,
    StageCheckpoints,
    StageJob,
    check_directories,
    read_checkpoints,
    run_prior_stages,
    stages_of,
    start_trainer,
)
from distillm_cli.runs.start import TrainOptions
from distillm_cli.runs.trackers import RunTrackers
from distillm_cli.training.checkpoint import Checkpoint, read_checkpoint, visible
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.training.state import TrainerState
from distillm_cli.training.trainer import Trainer
from distillm_cli.utils.energy import EnergyMeter
from distillm_cli.utils.host_space import HostSpace
from distillm_cli.utils.memory import keep_freed_memory
from distillm_cli.utils.signals import received_signal
from distillm_cli.utils.text import counted, format_bytes


@dataclass(frozen=True)
class _Training:
    """Hold the objects of a training that is ready to start: of a run, or of the fine-tuning stage before it.

    checkpoint: to resume from. started: start of the command, by ``time.perf_counter``. findings: of the checks before it.
    energy: meter of the command.
    """

    command: str
    run: Prepared
    resolved: Resolved
    output: Path
    checkpoint: Checkpoint | None
    teacher: TeacherHandle | None
    started: float
    findings: SequenceOf[Finding] = ()
    energy: EnergyMeter | None = None


class FineTuning(PriorStage):
    """Fine-tune the student (``student.sft_epochs``). The directory is that of `distillm sft`, with a published model."""

    name = output_dir.SFT
    done = "already fine-tuned"

    def recipe(self, resolved: Resolved) -> Resolved | None:
        return sft_stage_recipe(resolved)

    def title(self, resolved: Resolved) -> str:
        epochs = resolved.recipe.student.sft_epochs
        return f"fine-tuning the student first (student.sft_epochs = {epochs:g})"

    def train(self, job: StageJob) -> None:
        run = job.run
        without_teacher = replace(run, pair=replace(run.pair, teacher=None), initial_weights=run.start_weights)
        training = _Training(
            "sft", without_teacher, job.resolved, job.output, job.checkpoint, None, time.perf_counter()
        )
        job.listener(FineTuned(_train(training, job.listener)))
        if is_sharded(job.run.recipe.train.shard):
            self.restore(job)  # the student has no weights after ``Sharding.end``

    def is_finished(self, job: StageJob) -> bool:
        weights = ("model*.safetensors", "adapter_model.safetensors")
        return job.is_at_end and any(next(job.output.glob(pattern), None) for pattern in weights)

    def restore(self, job: StageJob) -> None:
        restore_student(job.run.student, best_checkpoint(job.output))

    def following(self, run: Prepared, output: Path) -> Prepared:
        return replace(run, initial_weights=lambda: checkpoint_weights(run.student, best_checkpoint(output)))


PRIOR_STAGES: tuple[PriorStage, ...] = (FineTuning(), PreTraining(), LearnMasks())  # in the order in which they run


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

        result = train_embeddings(command, resolved, output, listener, options, on_ready)
        write_page(resolved.recipe, output, listener)
        return result
    started = time.perf_counter()
    if options.resume:
        resolved = with_recorded_values(resolved, output)
    resolved = fitted(resolved)
    check_selection_metric(resolved.recipe)
    for note in resolved.notes:
        listener(Warned(note))
    stages = stages_of(resolved, PRIOR_STAGES)
    check_directories((stage.name for stage in stages), output)
    _check_teacher_directory(resolved, output)
    if options.rebuild_teacher_cache:
        check_rows(resolved.recipe)
    check_servers(resolved.recipe, listener)
    try:
        recipes = {stage.name: recipe for stage, recipe in stages.items()}
        checkpoints = read_checkpoints(resolved, recipes, output, options)
        run = prepare(resolved.recipe, listener, prefetcher)
        if world().size > 1:
            world().check_same({**run.inputs, "precision": dtype_name(run.dtype), "device": run.device.type})
        resolved = with_resolved_values(resolved, run.resolved_values)
        _check_resumable(run, checkpoints, listener)
        check_can_generate(run)
        check_extras(run.recipe, run.pair)
        check_served_teacher(run)
        cache_plan = plan_cache(run, started_mode=_cache_mode(checkpoints.run), rebuild=options.rebuild_teacher_cache)
        findings = [] if options.resume else world().broadcast(partial(preflight, run, cache_plan, output))
        report_findings(findings, listener)
        check_strict(findings, strict=options.strict)
        teacher = open_teacher(run, cache_plan, listener, rebuild=options.rebuild_teacher_cache)
    except KeyboardInterrupt as stop:
        raise interrupted(None, stop) from None
    if options.overwrite:  # only now: an error in the input must not delete an earlier run
        for stuck in output_dir.clear(output):
            listener(Warned(f"cannot remove all of {stuck}, of an earlier run: it uses disk space"))
    if on_ready is not None:
        on_ready()
    stages = stages_of(resolved, PRIOR_STAGES)  # with the values that were chosen while the run was prepared
    output_dir.write_recipe(output, to_yaml(resolved), stages=[stage.name for stage in stages])
    try:
        with EnergyMeter() as energy:
            run = run_prior_stages(run, stages, resolved, output, checkpoints, teacher, listener)
            training = _Training(command, run, resolved, output, checkpoints.run, teacher, started, findings, energy)
            with RunTrackers(options.track, output, resolved, listener, options.resume).running() as trackers:
                result = _train(training, trackers)
                trackers.finish(result)
        report_checkpoints(output, resolved.recipe.train.keep, listener)
        write_page(resolved.recipe, output, listener)
        return result
    except KeyboardInterrupt as stop:
        raise interrupted(output, stop) from None


def write_page(recipe: Recipe, output: Path, listener: Listener) -> None:
    """Write the page of a finished run, if the recipe asks for it (``eval.report_page``)."""
    if recipe.eval.report_page:
        from distillm_cli.runs.report_runs import write_run_page

        write_run_page(output, listener)


def _check_teacher_directory(resolved: Resolved, output: Path) -> None:
    """Raise UsageError if a run that saves its teacher would write into a ``teacher/`` directory of the user."""
    if not resolved.recipe.ctcd.enabled or resolved.recipe.method == "sft":
        return
    if (path := output_dir.foreign_teacher(output)) is not None:
        what = (
            f"{path} was not written by a run, but the run saves its teacher in {output / output_dir.TRAINED_TEACHER}"
        )
        raise UsageError("usage.output_exists", what, hint="choose another --output, or move it away")


def _check_resumable(run: Prepared, checkpoints: StageCheckpoints, listener: Listener) -> None:
    """Raise CheckpointError if the run's inputs have changed, or it has fewer steps than at its start."""
    for checkpoint in checkpoints.all:
        check_same_inputs(checkpoint, run.inputs)
    if checkpoints.run is not None:
        check_total_steps(checkpoints.run, run.steps, run.order.steps_per_epoch, listener)


def _cache_mode(checkpoint: Checkpoint | None) -> str | None:
    """Return the mode of the teacher cache of an interrupted run; None for a new run."""
    return None if checkpoint is None else checkpoint.state.get("teacher_cache")


def _train(training: _Training, listener: Listener) -> TrainResult:
    """Run a training that is ready to start."""
    run = training.run
    output = training.output
    if training.checkpoint is not None:
        restore_student(run.student, training.checkpoint)
    from distillm_cli.runs.plan import step_flops  # not at the top: it imports models, which rows do not need

    cache_plan = None if training.teacher is None else training.teacher.cache_plan
    flops = world().broadcast(partial(step_flops, run, cache_plan))
    report = Report(run, output / output_dir.EVAL / "report", listener)
    trainer = _trainer(training, report, listener)
    if (stop := received_signal()) is not None:  # an interrupt that a library swallowed while the run was prepared
        raise stop
    try:
        return _finish(training, trainer, report, flops, listener)
    finally:
        trainer.student_loss.release()


def _finish(
    training: _Training, trainer: Trainer, report: Report, flops: Mapping[str, float], listener: Listener
) -> TrainResult:
    """Train to the end, restore the best weights, measure the models and publish the student.

    flops: of a step, by source.
    """
    from distillm_cli.runs.plan import training_flops

    run = training.run
    output = training.output
    sharding = trainer.student_loss.sharding
    state = trainer.train()
    if trainer.checkpoints is not None and state.best_step not in (None, state.step):
        best = read_checkpoint(trainer.checkpoints.path(state.best_step))
        restore_student(run.student, best)
        with as_checkpoint_error(best):
            trainer.student_loss.load_extra_weights(best.path)
        figure = f"the best {run.recipe.train.select} was {state.best:.4g}, at step {state.best_step}"
        listener(Note(f"{figure}: using these weights"))
    models = report.all(trainer)
    machine = machine_of_run(str(run.device))
    energy = None if training.energy is None else training.energy.joules()
    findings = tuple(finding.as_json() for finding in training.findings)
    about = CardFacts(report.measured_on, findings, energy, machine=machine_title(machine))
    export_dtype = resolve_dtype(run.recipe.student.save_dtype, run.device)
    with sharding.whole(to_save=HostSpace(output / output_dir.CHECKPOINTS), dtype=export_dtype):
        publish_model(run, output, training.resolved, state, models, about, trainer.student_loss.export_extras)
    sharding.end()
    summary = _summary(run, state, models, report.measured_on)
    result = _result(training, trainer, state, models, summary)
    result = replace(
        result,
        flops=training_flops(flops, state.sources, run.order.steps_per_epoch),
        energy_j=None if training.energy is None else training.energy.joules(),
        machine=machine,
    )
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
    teacher = training.teacher
    trainer = start_trainer(
        lambda log: build_trainer(
            run,
            training.output,
            log,
            teacher=None if teacher is None else teacher.teacher,
            score=report.score if selects_by_metric(run.recipe) else None,
        ),
        training.output,
        run.recipe.train,
        training.checkpoint,
        listener,
    )
    if run.device.type == "cpu":
        keep_freed_memory()
    return trainer


def interrupted(output: Path | None, stop: KeyboardInterrupt) -> Interrupted:
    """Return the error of a run that was interrupted outside its loop. output: None before anything was written."""
    number = signal_number(stop)
    if output is None:
        return Interrupted(
            "interrupted before the first step: nothing was written", signal_number=number, hint="start again"
        )
    own, *stages = output_dir.places(output)
    found = (visible(place / output_dir.CHECKPOINTS) for place in (own, *reversed(stages)))
    checkpoints = next(filter(None, found), None)
    if checkpoints is None:
        what = "interrupted before the first step: nothing was saved"
        return Interrupted(what, signal_number=number, where=str(output), hint="start again with --overwrite")
    hint = f"{checkpoints[-1]} is complete; continue with --resume"
    return Interrupted("interrupted between steps", signal_number=number, hint=hint)


def _summary(run: Prepared, state: TrainerState, models: Mapping[str, ModelReport], measured_on: str) -> TrainSummary:
    recipe = run.recipe
    models_in_order = (BEFORE, FINE_TUNED, PRE_TRAINED, AFTER, TEACHER, TEACHER_BEFORE, TEACHER_AFTER)
    order = [name for name in models_in_order if name in models]
    label = labels(state, recipe)
    hidden = TEACHER if recipe.teacher.server is not None else TEACHER_BEFORE  # a teacher on a server does not respond
    samples = _samples(run, {model_title(name, recipe): models[name].answers for name in order if name != hidden})
    # Without test rows, `--suite SOURCE` would score training rows too; without `--suite`, held-out rows are scored.
    suites = recipe.eval.suites or (recipe.data.names if "test" in run.train_rows.splits else ())
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
        has_teacher=recipe.ctcd.enabled,
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
        findings=tuple(finding.as_json() for finding in training.findings),
        alarms=tuple(alarm.as_json() for alarm in trainer.alarms.raised),
        mixture=source_figures(training.run.recipe.data, training.run.train, training.run.order),
        teacher_cache=None if teacher is None else teacher.facts(),
        teacher_tokens=None if teacher is None else teacher.teacher.total_tokens(),
    )
