"""What ``sft`` and ``distill`` share: claim the output, prepare, measure, train, publish, tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import torch

from distillm_cli.config.load import Resolved, settled, to_yaml
from distillm_cli.config.sft_stage import sft_before
from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.data.templates import text_of_content
from distillm_cli.errors import Interrupted, UsageError, signal_number
from distillm_cli.models.composite import is_composite
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.runs import output_dir
from distillm_cli.runs.card import model_card
from distillm_cli.runs.defaults import fitted
from distillm_cli.runs.prepare import Prepared, build_engine, prepare
from distillm_cli.runs.report import (
    AFTER,
    BEFORE,
    FINE_TUNED,
    TEACHER,
    Measured,
    Report,
    check_answers,
    check_metric,
    labels,
    needs_metric,
)
from distillm_cli.runs.resume import (
    as_checkpoint_error,
    as_recorded,
    best_of,
    check_inputs,
    check_length,
    checkpoint_of,
    load_student,
    weights_in,
)
from distillm_cli.runs.teacher_states import TeacherHandle, open_teacher
from distillm_cli.training.checkpoint import Checkpoint, read_checkpoint, visible
from distillm_cli.training.engine import LOWER_IS_BETTER, Engine
from distillm_cli.training.events import Note, Warned
from distillm_cli.training.metrics_log import MetricsLog
from distillm_cli.training.progress import TrainerState
from distillm_cli.ui.console import Console
from distillm_cli.ui.summary import (
    OUTPUT_FILES,
    Outcome,
    Sample,
    next_steps,
    outcome_table,
    samples_table,
    sources_sentence,
)
from distillm_cli.utils.memory import keep_freed_memory
from distillm_cli.utils.signals import received_signal
from distillm_cli.utils.storage import storing


def train(
    command: str,
    resolved: Resolved,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    rebuild_teacher_cache: bool = False,
    prefetcher: Prefetcher | None = None,
    movable: Collection[str] = (),
    begun: Callable[[], None] = lambda: None,
    ui: Console,
) -> dict:
    """Run the recipe into ``output``, which ``check_output`` has passed, and return the result object of ``--json``.

    prefetcher: of its rows, where it is running already. movable: as of ``checkpoint_of``. begun: called once everything is
    prepared and ``output`` holds nothing of an earlier run any more (or its resume).
    """
    began = time.perf_counter()
    if resume:
        resolved = as_recorded(resolved, output)
    resolved = fitted(resolved)
    recipe = resolved.recipe
    check_metric(recipe)
    for note in resolved.notes:
        ui(Warned(note))
    stage = sft_before(resolved)
    if stage is not None and (output / output_dir.SFT).exists() and not output_dir.has_stage(output):
        what = f"{output / output_dir.SFT} is no stage of a run in {output}, which would put its fine-tuning there"
        raise UsageError(what, hint="choose another --output, or move it away")
    try:
        checkpoint = checkpoint_of(output, recipe, started=stage is None, movable=movable) if resume else None
        of_stage = None
        if resume and stage and not checkpoint:
            of_stage = checkpoint_of(output / output_dir.SFT, stage.recipe, movable=movable)
        run = prepare(recipe, ui, prefetcher)
        resolved = settled(resolved, run.settled)
        stage = sft_before(resolved)
        for earlier in filter(None, (checkpoint, of_stage)):
            check_inputs(earlier, run.inputs)
        if checkpoint is not None:
            check_length(checkpoint, run.steps, run.order.steps_per_epoch, ui)
        before = None if checkpoint is None else checkpoint.state.get("teacher_cache")
        check_answers(run)
        opened = open_teacher(run, ui, before=before, rebuild=rebuild_teacher_cache)
    except KeyboardInterrupt as stop:
        raise _stopped(None, stop) from None
    if overwrite:  # only now: bad input must not cost what an earlier run left
        for stuck in output_dir.clear(output):
            ui(Warned(f"cannot remove all of {stuck}, of an earlier run: it takes up space"))
    begun()
    output_dir.write_recipe(output, to_yaml(resolved), has_stage=stage is not None)
    try:
        if stage is not None:
            if checkpoint is None:
                _fine_tune(run, stage, of_stage, output / output_dir.SFT, ui)
            run = replace(run, begins=lambda: weights_in(run.student, best_of(output / output_dir.SFT)))
        return _trained(command, run, opened, checkpoint, resolved, output, began, ui)
    except KeyboardInterrupt as stop:
        raise _stopped(output, stop) from None


def _fine_tune(run: Prepared, stage: Resolved, checkpoint: Checkpoint | None, output: Path, ui: Console) -> None:
    """The stage before distillation: afterwards the run's student has the fine-tuned weights, also in ``output``.

    checkpoint: of a stage that was begun; of a finished one the weights are read, and nothing is done again. Distillation
    starts with the random state that it would have had without what came before, whichever way the stage went.
    """
    seed = run.recipe.train.seed
    begin = replace(run, recipe=stage.recipe, pair=replace(run.pair, teacher=None), begins=run.first_weights)
    progress = None if checkpoint is None else checkpoint.state["progress"]
    if progress is not None and progress["step"] == begin.steps and _is_published(output):
        load_student(run.student, best_of(output))
        ui(Note(f"fine-tuned already: {output}"))
    else:
        ui(Note(f"first the student is fine-tuned (student.sft_epochs = {stage.recipe.train.epochs:g}), in {output}"))
        output.mkdir(parents=True, exist_ok=True)
        output_dir.write_recipe(output, to_yaml(stage))
        torch.manual_seed(seed)
        _trained("sft", begin, None, checkpoint, stage, output, time.perf_counter(), ui, is_stage=True)
    torch.manual_seed(seed)


def _is_published(output: Path) -> bool:
    return any(next(output.glob(pattern), None) for pattern in ("model*.safetensors", "adapter_model.safetensors"))


def _trained(
    command: str,
    run: Prepared,
    opened: TeacherHandle | None,
    checkpoint: Checkpoint | None,
    resolved: Resolved,
    output: Path,
    began: float,
    ui: Console,
    is_stage: bool = False,
) -> dict:
    recipe = run.recipe
    if checkpoint is not None:
        load_student(run.student, checkpoint)
    before = checkpoint.state["progress"] if checkpoint else {"step": 0, "valid_loss": None}
    validated = before.get("valid_loss") is not None
    log = MetricsLog(
        output / output_dir.METRICS, log_steps=recipe.train.log_steps, first_step=before["step"], validated=validated
    )

    def listener(event) -> None:
        log(event)
        ui(event)

    report = Report(run, output / output_dir.EVAL / "report", ui)
    score = report.score if needs_metric(recipe) else None
    engine = build_engine(run, output, listener, teacher=None if opened is None else opened.teacher, score=score)
    if run.device.type == "cpu":
        keep_freed_memory()
    if checkpoint is not None:
        with as_checkpoint_error(checkpoint):
            engine.load(checkpoint)
    if (stop := received_signal()) is not None:
        raise stop  # whoever took it for another error may have chosen another way for this run
    reached = engine.run()
    if reached.best_step not in (None, reached.step):
        load_student(run.student, read_checkpoint(engine.checkpoints.path(reached.best_step)))
        best = f"the best {recipe.train.select} was {reached.best:.4g}, at step {reached.best_step}"
        ui(Note(f"{best}: those weights are kept"))
    measured = report.all(engine)
    publish(run, output, resolved, reached, measured, report.measured_on)
    _tell(run, output, reached, engine, measured, report.measured_on, ui, is_stage)
    result = _result(command, output, reached, engine, measured, time.perf_counter() - began)
    if opened is not None:
        result |= {"teacher_cache": opened.facts(), "teacher_tokens": opened.teacher.tokens}
    return result


def _stopped(output: Path | None, stop: KeyboardInterrupt) -> Interrupted:
    """What is left of a run that was stopped outside its loop. output: None while nothing of the run was written."""
    number = signal_number(stop)
    places = [] if output is None else [output, output / output_dir.SFT]
    kept = next(filter(None, (visible(place / output_dir.CHECKPOINTS) for place in places)), [])
    if output is None:
        return Interrupted(
            "interrupted before the first step: nothing was written", signal_number=number, hint="start it again"
        )
    if not kept:
        what = "interrupted before the first step: nothing was saved"
        return Interrupted(what, signal_number=number, where=str(output), hint="start it again with --overwrite")
    hint = f"{kept[-1]} is whole; go on with --resume"
    return Interrupted("interrupted between steps", signal_number=number, hint=hint)


def publish(
    run: Prepared,
    output: Path,
    resolved: Resolved,
    reached: TrainerState,
    measured: dict[str, Measured],
    measured_on: str,
) -> None:
    """The student, its tokenizer and its card into ``output``: from now on ``from_pretrained(output)`` works.

    measured_on: the rows, and how they were answered, in words.
    """
    hint = "free some space, then type the command again with --resume: nothing is trained again"
    with storing(f"cannot write the model into {output}", hint), output_dir.publishing(output) as staged:
        run.export_model(staged)
        task = "text2text-generation" if run.student.is_encoder_decoder else "text-generation"
        task = "image-text-to-text" if is_composite(run.student.model.config) else task
        card = model_card(resolved, reached, measured, task=task, measured_on=measured_on)
        (staged / output_dir.CARD).write_text(card, encoding="utf-8")


def _tell(
    run: Prepared,
    output: Path,
    reached: TrainerState,
    engine: Engine,
    measured: dict[str, Measured],
    measured_on: str,
    ui: Console,
    is_stage: bool,
) -> None:
    order = [name for name in (BEFORE, FINE_TUNED, AFTER, TEACHER) if name in measured]
    label = labels(reached, after_sft=bool(run.recipe.student.sft_epochs))
    table = [Outcome(label[name], measured[name].valid_loss, measured[name].scores) for name in order]
    title = "Fine-tuning" if is_stage else "Outcome"
    if any(outcome.valid_loss is not None or outcome.scores for outcome in table):
        ui.show(outcome_table(table, lower_is_better=LOWER_IS_BETTER, title=title, caption=measured_on))
    if is_stage:
        return
    answered = min(len(measured[name].answers) for name in order)
    samples = [
        Sample(_asked(run, row), row.references, {name: measured[name].answers[i] for name in order})
        for i in sorted({0, answered // 3, 2 * answered // 3} if answered else ())
        for row in [run.valid.rows[i]]
    ]
    if samples:
        ui.show(samples_table(samples))
    if not run.sft:
        phis = [phi for _, phi in reached.phis]
        ui.show(sources_sentence(reached.sources, phis, run.recipe.schedule.kind))
        if (weight := run.recipe.objective.row_weight) and reached.sources["rollout"]:
            ui.show(f"Beside the student's outputs each step used as many data set rows, with weight {weight:g}.")
    if ui.in_pipeline:
        return
    # Of a source without test rows `--suite` takes all, rows trained on included; the command without it, those held out.
    suites = run.recipe.eval.suites or ((run.recipe.data.source,) if "test" in run.train_rows.splits else ())
    files = OUTPUT_FILES | ({"student after sft": f"{output_dir.SFT}/"} if run.recipe.student.sft_epochs else {})
    asked = samples[0].prompt if samples else next((_asked(run, row) for row in run.valid.rows), None)
    scored = bool(suites) or any(row.is_answered for row in run.valid.rows)
    ui.show(next_steps(output, suites=suites, prompt=asked, files=files, scored=scored))


def _asked(run: Prepared, row) -> str:
    """What a row asks, without the words of a template where it has an instruction of its own."""
    if row.instruction is not None:
        return "\n".join(filter(None, (row.instruction, row.input)))
    if row.messages is not None and row.messages[-1]["role"] == "user":
        question = text_of_content(row.messages[-1].get("content"))
        if question is not None:
            return question
    return run.encoder.renderer.prompt(row)


def _result(command: str, output: Path, reached: TrainerState, engine: Engine, measured, wall: float) -> dict:
    return {
        "command": command,
        "status": "ok",
        "output": str(output),
        "wall_s": round(wall, 3),
        "steps": reached.step,
        "tokens": reached.tokens,
        "tokens_per_s": round(reached.tokens / max(reached.seconds, 1e-9), 1),
        "train_loss": reached.train_loss,
        "valid_loss": measured[AFTER].valid_loss,
        "phi": engine.scheduler.phi,
        "rollout_steps": reached.steps_with(Source.ROLLOUT),
        "replay_steps": reached.steps_with(Source.REPLAY),
        "dataset_steps": reached.steps_with(Source.DATASET),
        "teacher_steps": reached.steps_with(Source.TEACHER),
        "sampled_sequences": reached.sampled,
        "sampled_tokens": reached.sampled_tokens,
        "teacher_sampled_sequences": reached.teacher_sampled,
        "teacher_sampled_tokens": reached.teacher_sampled_tokens,
        "train_s": round(reached.seconds, 3),
        "stopped": reached.reason,
        "best_step": reached.best_step,
        "report": {name.replace(" ", "_"): {"valid_loss": m.valid_loss} | m.scores for name, m in measured.items()},
    }
