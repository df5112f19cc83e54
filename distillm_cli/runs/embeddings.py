"""Train sentence embeddings (``--method disco``): distillation, then fine-tuning on pairs if it is asked for.

The trainer is that of every run. Its batches are sentences, or pairs of them, and its loss is that of their embeddings
(``extras.disco``). With ``disco.pairs_epochs`` the distillation is a stage in ``OUTPUT/distilled``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillm_cli.config.derived import fixed_values
from distillm_cli.config.load import Resolved, to_yaml, with_resolved_values
from distillm_cli.config.schema import Recipe, TrainConfig
from distillm_cli.data.batching import Order, batches_by_length
from distillm_cli.data.sentences import with_score_scale
from distillm_cli.extras.disco import (
    Distillation,
    EmbeddingLoss,
    EmbeddingObjective,
    EmbeddingPart,
    PairTuning,
    TeacherEmbeddings,
    embed_together,
)
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.devices import dtype_name, resolve_dtype
from distillm_cli.models.sentence import SentenceEncoder, sentence
from distillm_cli.models.tokenizer_files import quiet
from distillm_cli.rollouts.pool import SequencePool
from distillm_cli.rollouts.scheduler import Source, build_scheduler
from distillm_cli.runs import output_dir
from distillm_cli.runs.defaults import fitted
from distillm_cli.runs.embedding_card import publish_embeddings
from distillm_cli.runs.embedding_inputs import EmbeddingRun, Figures, HeldOut, distinct_sentences, prepare_embeddings
from distillm_cli.runs.prepare import total_steps
from distillm_cli.runs.report import AFTER, BEFORE, TEACHER
from distillm_cli.runs.resume import as_checkpoint_error, best_checkpoint, check_same_inputs, check_total_steps
from distillm_cli.runs.run_results import FineTuned, Outcome, PlanResult, TrainResult, TrainSummary
from distillm_cli.runs.stages import check_directories, is_at_end, read_checkpoints, start_trainer, train_or_restore
from distillm_cli.runs.start import TrainOptions
from distillm_cli.runs.train import interrupted, report_checkpoints
from distillm_cli.training.checkpoint import Checkpoint, Checkpoints, read_checkpoint
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.training.state import RunInfo, TrainerState
from distillm_cli.training.trainer import Trainer
from distillm_cli.training.validation import Validator
from distillm_cli.types import Sequence, pass_overhead
from distillm_cli.utils.memory import keep_freed_memory
from distillm_cli.utils.signals import received_signal
from distillm_cli.utils.text import counted

DISTILLED_STUDENT = "student after distillation"
_PROJECTION = "projection.safetensors"  # in a checkpoint of the distillation: W
_TABLE_BYTES = 2**31  # of the teacher's embeddings, above which they are computed again in each epoch


@dataclass(frozen=True, eq=False)
class _Stage:
    """Hold one training: the distillation, or the fine-tuning on pairs.

    order: of ``sequences``. measure: from the embeddings of the held-out sentences, the validation loss and further
    figures. projection: W, which is trained in the distillation.
    """

    resolved: Resolved
    output: Path
    config: TrainConfig
    steps: int
    order: Order
    sequences: list[Sequence]
    loss: EmbeddingLoss
    measure: Callable[[Tensor], tuple[float, Figures]]
    projection: torch.nn.Linear | None
    checkpoint: Checkpoint | None


def train_embeddings(
    command: str,
    resolved: Resolved,
    output: Path,
    listener: Listener,
    options: TrainOptions,
    on_ready: Callable[[], None] | None = None,
) -> TrainResult:
    """Run a recipe with ``disco.enabled`` into ``output``. The arguments are those of ``runs.train.train``."""
    started = time.perf_counter()
    resolved = fitted(resolved)
    for note in resolved.notes:
        listener(Warned(note))
    stage = distillation_stage(resolved)
    stages = {} if stage is None else {output_dir.DISTILLED: stage}
    check_directories(stages, output)
    try:
        checkpoints = read_checkpoints(resolved, stages, output, options)
        run = prepare_embeddings(resolved.recipe, listener)
        if world().size > 1:
            world().check_same(run.inputs)
        for found in checkpoints.all:
            check_same_inputs(found, run.inputs)
    except KeyboardInterrupt as stop:
        raise interrupted(None, stop) from None
    if options.overwrite:  # only now: an error in the input must not delete an earlier run
        for stuck in output_dir.clear(output):
            listener(Warned(f"cannot remove all of {stuck}, of an earlier run: it uses disk space"))
    if on_ready is not None:
        on_ready()
    output_dir.write_recipe(output, to_yaml(resolved), stages=tuple(stages))
    try:
        if stage is None:
            result = _train(run, _distillation(run, resolved, output, checkpoints.run), command, started)
        else:
            place = output / output_dir.DISTILLED
            if checkpoints.run is None:
                _distill_first(run, stage, place, checkpoints.stages.get(output_dir.DISTILLED))
            else:
                _load_weights(run.student, best_checkpoint(place))
            result = _train(run, _pair_tuning(run, resolved, output, checkpoints.run), command, started)
        report_checkpoints(output, resolved.recipe.train.keep, listener)
        return result
    except KeyboardInterrupt as stop:
        raise interrupted(output, stop) from None


def distillation_stage(resolved: Resolved) -> Resolved | None:
    """Return the recipe of the distillation before the fine-tuning on pairs, None if there is none."""
    if not resolved.recipe.disco.pairs_epochs:
        return None
    return with_resolved_values(resolved, {"disco.pairs_epochs": (0.0, "disco.pairs_epochs")})


# ------------------------------------------------------------------------------------------------------------ stages


def _distillation(run: EmbeddingRun, resolved: Resolved, output: Path, checkpoint: Checkpoint | None) -> _Stage:
    recipe = run.recipe
    train = recipe.train
    order = _order(recipe, run.sequences)
    steps = total_steps(train, order.steps_per_epoch)
    if checkpoint is not None:
        check_total_steps(checkpoint, steps, order.steps_per_epoch, run.listener)
    size = len(run.sequences) * run.teacher.width * 4
    teacher = TeacherEmbeddings(
        run.teacher,
        run.teacher_sequences,
        listener=run.listener,
        all_once=steps >= order.steps_per_epoch
        and size <= _TABLE_BYTES,  # not by free memory: a resume needs the same bits
    )
    part = Distillation(teacher, run.student.width, recipe.disco, seed=train.seed)
    held_out = run.held_out

    def measure(states_NS: Tensor) -> tuple[float, Figures]:
        u_ND = part.project(states_NS.to(run.device)).cpu()
        closeness = (u_ND * held_out.teacher_ND).sum(1).mean().item()
        exported_N = u_ND if recipe.disco.keep_projection else states_NS
        return 1 - closeness, {**held_out.correlations(exported_N), "teacher_cosine": 100 * closeness}

    return _Stage(
        resolved=resolved,
        output=output,
        config=train,
        steps=steps,
        order=order,
        sequences=run.sequences,
        loss=_loss(run, part, recipe.disco.loss, "distance"),
        measure=measure,
        projection=part.projection,
        checkpoint=checkpoint,
    )


def _pair_tuning(run: EmbeddingRun, resolved: Resolved, output: Path, checkpoint: Checkpoint | None) -> _Stage:
    recipe = run.recipe
    held_out = run.held_out
    index = {text: i for i, text in enumerate(distinct_sentences(run.rows))}
    pairs = [[run.sequences[index[text]] for text in row.sentences] for row in run.rows]
    has_scores = run.rows[0].score is not None
    highest = max(row.score for row in run.rows if row.score is not None) if has_scores else 1.0
    scores = [row.score or 0.0 for row in with_score_scale(run.rows, highest)] if has_scores else None
    held_out_scores = [score / highest for score in held_out.scores] if has_scores else None
    part = PairTuning(pairs, scores)
    # A row is one sequence for the pool, so that its sentences are in the same micro-batch; they are not read as one text.
    sequences = [sentence(np.concatenate([_ids(one) for one in pair]).tolist(), row) for row, pair in enumerate(pairs)]
    order = _order(recipe, sequences)
    config = recipe.train.model_copy(update={"lr": recipe.disco.pairs_lr})

    def measure(states_NS: Tensor) -> tuple[float, Figures]:
        columns = [states_NS[column] for column in held_out.columns]
        loss = part.loss_of(columns, held_out_scores).item() / len(held_out.rows)
        return loss, held_out.correlations(states_NS)

    return _Stage(
        resolved=resolved,
        output=output,
        config=config,
        steps=max(1, math.ceil(recipe.disco.pairs_epochs * order.steps_per_epoch)),
        order=order,
        sequences=sequences,
        loss=_loss(run, part, "cosine MSE" if has_scores else "infonce", "pair loss"),
        measure=measure,
        projection=None,
        checkpoint=checkpoint,
    )


def _ids(one: Sequence) -> np.ndarray:
    """Return the tokens of a sentence."""
    return np.concatenate([one.prompt, one.response[:-1]])


def _loss(run: EmbeddingRun, part: EmbeddingPart, name: str, valid_name: str) -> EmbeddingLoss:
    return EmbeddingLoss(run.student, EmbeddingObjective(name, valid_name), part.to(run.device))


def _order(recipe: Recipe, sequences: SequenceOf[Sequence]) -> Order:
    train = recipe.train
    lengths = [len(sequence) for sequence in sequences]
    return Order(lengths, train.batch_size * train.accumulate, train.seed, bucket=recipe.data.bucket)


class EmbeddingValidator(Validator):
    """Measure the student's embeddings of the held-out sentences. measure: returns the validation loss and the figures."""

    def __init__(
        self,
        held_out: HeldOut,
        measure: Callable[[Tensor], tuple[float, Figures]],
        run: RunInfo,
        *,
        select: str,
        listener: Listener,
    ):
        super().__init__(batches_by_length(held_out.sequences, 64), run, select=select, listener=listener)
        self.held_out = held_out
        self.figures = measure

    def measure(self, student_loss: StudentLoss, step: int) -> tuple[float, Figures]:
        """Return the validation loss and the further figures by name."""
        return measure_student(student_loss.student, self.held_out, self.figures, self.run)  # type: ignore[arg-type]


def measure_student(
    student: SentenceEncoder,
    held_out: HeldOut,
    measure: Callable[[Tensor], tuple[float, Figures]],
    run: RunInfo,
) -> tuple[float, Figures]:
    """Return the validation loss and the figures of a student, in its training precision."""
    with torch.no_grad():
        with run.autocast():
            states_NS = embed_together(student, held_out.sequences)
        return measure(states_NS)


# ---------------------------------------------------------------------------------------------------------- training


def _distill_first(run: EmbeddingRun, stage: Resolved, output: Path, checkpoint: Checkpoint | None) -> None:
    """Distill the student, or resume that; the weights of a finished stage are read."""
    training = _distillation(run, stage, output, checkpoint)
    is_finished = is_at_end(checkpoint, training.steps) and (output / "model.safetensors").is_file()

    def train() -> None:
        run.listener(FineTuned(_train(run, training, "distill", time.perf_counter()), "Distillation"))

    def restore() -> None:
        _load_weights(run.student, best_checkpoint(output))

    train_or_restore(
        stage,
        output,
        run.listener,
        title="distilling the student first",
        done="already distilled",
        train=train,
        restore=restore if is_finished else None,
    )


def _train(run: EmbeddingRun, stage: _Stage, command: str, started: float) -> TrainResult:
    """Train, restore the best weights, measure the models and publish the student."""
    trainer = _trainer(run, stage)
    if (stop := received_signal()) is not None:  # an interrupt that a library swallowed while the run was prepared
        raise stop
    state = trainer.train()
    if trainer.checkpoints is not None and state.best_step not in (None, state.step):
        best = read_checkpoint(trainer.checkpoints.path(state.best_step or 0))
        _load_weights(run.student, best)
        if stage.projection is not None:
            with as_checkpoint_error(best), torch.no_grad():
                stage.projection.weight.copy_(load_file(best.path / _PROJECTION)["weight"])
        value = f"the best {run.recipe.train.select} was {state.best:.4g}, at step {state.best_step}"
        run.listener(Note(f"{value}: using these weights"))
    outcomes = _outcomes(run, stage, trainer.run, state)
    measured_on = _measured_on(run, stage)
    dense = stage.projection.weight if stage.projection is not None and run.recipe.disco.keep_projection else None
    publish_embeddings(
        run.student,
        stage.output,
        stage.resolved,
        state,
        {outcome.name: outcome.scores for outcome in outcomes.values()},
        measured_on,
        dtype=resolve_dtype(run.recipe.student.save_dtype, run.device),
        dense=dense,
    )
    result = _result(run, stage, trainer, command, started, outcomes, measured_on)
    output_dir.write_result(stage.output, result.as_json())
    return result


def _trainer(run: EmbeddingRun, stage: _Stage) -> Trainer:
    """Return the trainer of a stage, with the state of the checkpoint if there is one."""
    checkpoint = stage.checkpoint
    if checkpoint is not None and checkpoint.tensors:
        _load_weights(run.student, checkpoint)
    trainer = start_trainer(partial(_new_trainer, run, stage), stage.output, stage.config, checkpoint, run.listener)
    if run.device.type == "cpu":
        keep_freed_memory()
    return trainer


def _new_trainer(run: EmbeddingRun, stage: _Stage, listener: Listener) -> Trainer:
    recipe = stage.resolved.recipe

    def save_model(directory: Path) -> None:
        run.student.save(directory)
        if stage.projection is not None:
            save_file({"weight": stage.projection.weight.detach().cpu().contiguous()}, directory / _PROJECTION)

    info = RunInfo(
        steps=stage.steps,
        steps_per_epoch=stage.order.steps_per_epoch,
        method=recipe.method,
        device=run.device,
        dtype=run.dtype,
        pass_overhead=pass_overhead(run.device.type, run.student.width),
        identity=lambda: {"recipe": fixed_values(recipe), "inputs": run.inputs},
    )
    return Trainer(
        stage.loss,
        SequencePool(
            lambda step: [stage.sequences[i] for i in stage.order.batch(step)],
            build_scheduler(recipe.schedule, steps=stage.steps, seed=recipe.train.seed),
        ),
        None,
        validator=EmbeddingValidator(run.held_out, stage.measure, info, select=recipe.train.select, listener=listener),
        checkpoints=Checkpoints(
            stage.output / output_dir.CHECKPOINTS, save_model, keep=recipe.train.keep, listener=listener
        ),
        config=stage.config,
        run=info,
        listener=listener,
    )


def _load_weights(student: SentenceEncoder, checkpoint: Checkpoint) -> None:
    """Load the weights of a checkpoint into the student. Raises CheckpointError."""
    with as_checkpoint_error(checkpoint), quiet():
        model = type(student.model).from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
        student.load_weights(model.state_dict())


def _outcomes(run: EmbeddingRun, stage: _Stage, info: RunInfo, state: TrainerState) -> dict[str, Outcome]:
    """Measure the models on the held-out rows: the student at the start, after each stage, and the teacher."""
    held_out = run.held_out
    before = run.new_student()
    figures = _distillation(run, stage.resolved, stage.output, None).measure  # with the initial W
    step = state.step if state.best_step is None else state.best_step
    loss, after = measure_student(run.student, held_out, stage.measure, info)
    found = {BEFORE: Outcome(f"{BEFORE}, step 0", None, measure_student(before, held_out, figures, info)[1])}
    if stage.projection is None:
        _load_weights(before, best_checkpoint(stage.output / output_dir.DISTILLED))
        found[BEFORE].scores.pop("teacher_cosine")  # type: ignore[attr-defined]
        distilled = measure_student(before, held_out, stage.measure, info)[1]
        found[DISTILLED_STUDENT] = Outcome(DISTILLED_STUDENT, None, distilled)
    found[AFTER] = Outcome(f"{AFTER}, step {step:,}", None, after, is_trained=True)
    found[TEACHER] = Outcome(TEACHER, None, held_out.correlations(held_out.teacher_ND))
    state.valid_loss = loss
    return {name: outcome for name, outcome in found.items() if outcome.scores}


def _measured_on(run: EmbeddingRun, stage: _Stage) -> str:
    held_out = run.held_out
    parts = []
    if held_out.scores:
        pairs = counted(len(held_out.rows), "held-out pair")
        parts.append(f"correlations (×100) of cosines with the scores of {pairs}")
    if stage.projection is not None:
        sentences = counted(len(held_out.sequences), "held-out sentence")
        parts.append(f"mean cosine (×100) of the projected student and the teacher on {sentences}")
    return f"{'; '.join(parts) or 'nothing was measured'}, in {dtype_name(run.dtype)}"


def _result(
    run: EmbeddingRun,
    stage: _Stage,
    trainer: Trainer,
    command: str,
    started: float,
    outcomes: Mapping[str, Outcome],
    measured_on: str,
) -> TrainResult:
    state = trainer.state
    recipe = run.recipe
    has_stage = stage.projection is None
    valid_loss = state.valid_loss
    report = {name.replace(" ", "_"): {"valid_loss": None, **outcome.scores} for name, outcome in outcomes.items()}
    report.setdefault("student_after", {})
    report["student_after"] |= {"valid_loss": valid_loss}
    return TrainResult(
        command=command,
        output=stage.output,
        wall_s=round(time.perf_counter() - started, 3),
        steps=state.step,
        tokens=state.tokens,
        tokens_per_s=round(state.tokens / max(state.seconds, 1e-9), 1),
        train_loss=state.train_loss,
        valid_loss=valid_loss,
        phi=trainer.scheduler.phi,
        rollout_steps=0,
        replay_steps=0,
        dataset_steps=state.steps_with(Source.DATASET),
        teacher_steps=0,
        sampled_sequences=0,
        sampled_tokens=0,
        teacher_sampled_sequences=0,
        teacher_sampled_tokens=0,
        train_s=round(state.seconds, 3),
        stopped=state.reason,
        best_step=state.best_step,
        report=report,
        summary=TrainSummary(
            outcomes=tuple(outcomes.values()),
            measured_on=measured_on,
            sources=dict(state.sources),
            source_seconds=dict(state.source_seconds),
            schedule=recipe.schedule.kind,
            suites=(recipe.data.source,) if run.has_test_rows else (),
            has_answers=bool(run.held_out.scores),
            generates=False,
            stage=(output_dir.DISTILLED, DISTILLED_STUDENT) if has_stage else None,
        ),
    )


def plan_embeddings(resolved: Resolved, listener: Listener) -> PlanResult:
    """Plan a run from its rows and models, which are loaded. Memory and time are not estimated."""
    run = prepare_embeddings(resolved.recipe, listener)
    stage = _distillation(run, resolved, Path(), None)
    models = {}
    for name, model in (("student", run.student), ("teacher", run.teacher)):
        config = model.model.config.get_text_config()
        models[name] = {
            "kind": config.model_type,
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "layers": config.num_hidden_layers,
            "width": model.width,
            "pooling": model.pooling,
        }
    train = run.recipe.train
    negatives = 0
    if run.recipe.disco.loss == "infonce":
        negatives = min(train.batch_size * train.accumulate, len(run.sequences)) - 1 + run.recipe.disco.queue
    figures = {
        "method": run.recipe.method,
        "device": str(run.device),
        "models": models,
        "steps": stage.steps,
        "steps_per_epoch": stage.order.steps_per_epoch,
        "sequences_per_step": train.batch_size * train.accumulate,
        "negatives": negatives,
        "data": {
            "rows": len(run.rows),
            "sentences": len(run.sequences),
            "valid_rows": len(run.held_out.rows),
            "mean_length": round(float(np.mean([len(s) - 1 for s in run.sequences])), 1),
        },
        "notes": ["memory and time are not estimated for sentence embeddings"],
    }
    if run.recipe.disco.pairs_epochs:
        figures["pair_steps"] = _pair_tuning(run, resolved, Path(), None).steps
    return PlanResult(figures)
