"""What ``sft`` and ``distill`` share: claim the output, prepare, measure, train, publish, tell."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from distillm_cli.cli import outputs
from distillm_cli.cli.assembly import Prepared, build_engine, prepare, shaping
from distillm_cli.cli.card import model_card
from distillm_cli.cli.teaching import Opened, open_teacher
from distillm_cli.config.load import Resolved, to_yaml
from distillm_cli.core.checkpoint import Checkpoint, latest, read, visible
from distillm_cli.core.criterion import CROSS_ENTROPY, Criterion
from distillm_cli.core.engine import LOWER_IS_BETTER, Engine, eval_mode
from distillm_cli.core.engine import Progress as Reached
from distillm_cli.core.events import Note, Warned
from distillm_cli.core.metrics_log import MetricsLog
from distillm_cli.core.objective import Objective
from distillm_cli.data.prompts import render
from distillm_cli.errors import CheckpointError, Interrupted, signal_number
from distillm_cli.evaluation.evaluate import SuiteResult, evaluate
from distillm_cli.evaluation.suites import HELD_OUT, Suite
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.loading import quiet
from distillm_cli.models.pair import resolve_dtype, teacher_again
from distillm_cli.ui.console import Console
from distillm_cli.ui.summary import Outcome, Sample, next_steps, outcome_table, samples_table, sources_sentence

BEFORE, AFTER, TEACHER = "student before", "student after", "teacher"


@dataclass(frozen=True)
class Measured:
    """What one model did on the held-out rows: its figures, and what it answered to the first of them."""

    valid_loss: float | None
    scores: dict[str, float]
    answers: list[str]


def train(
    command: str,
    resolved: Resolved,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    rebuild_teacher_cache: bool = False,
    ui: Console,
) -> dict:
    """Runs the recipe into ``output`` and returns the result object of ``--json``."""
    recipe, began = resolved.recipe, time.perf_counter()
    outputs.check(output, resume=resume, overwrite=overwrite)
    for note in resolved.notes:
        ui(Warned(note))
    try:
        checkpoint = _checkpoint(output, recipe) if resume else None
        run = prepare(recipe, ui)
        before = None if checkpoint is None else checkpoint.state.get("teacher_cache")
        opened = open_teacher(run, ui, before=before, rebuild=rebuild_teacher_cache)
    except KeyboardInterrupt as stop:
        raise _stopped(None, stop) from None
    if overwrite:  # only now: bad input must not cost what an earlier run left
        outputs.clear(output)
    outputs.write_text(output / outputs.RECIPE, to_yaml(resolved))
    try:
        return _trained(command, run, opened, checkpoint, resolved, output, began, ui)
    except KeyboardInterrupt as stop:
        raise _stopped(output, stop) from None


def _trained(
    command: str,
    run: Prepared,
    opened: Opened | None,
    checkpoint: Checkpoint | None,
    resolved: Resolved,
    output: Path,
    began: float,
    ui: Console,
) -> dict:
    recipe = run.recipe
    if checkpoint is not None:
        _load_student(run.student, checkpoint)
    first_step = checkpoint.state["progress"]["step"] if checkpoint else 0
    log = MetricsLog(output / outputs.METRICS, log_steps=recipe.train.log_steps, first_step=first_step)

    def listener(event) -> None:
        log(event)
        ui(event)

    report = _Report(run, output / outputs.EVAL / "report", ui)
    score = report.score if _needs_metric(recipe) else None
    engine = build_engine(run, output, listener, teacher=None if opened is None else opened.teacher, score=score)
    if checkpoint is not None:
        engine.load(checkpoint)
    reached = engine.run()
    if reached.best_step not in (None, reached.step):
        _load_student(run.student, read(engine.checkpoints.path(reached.best_step)))
        best = f"the best {recipe.train.select} was {reached.best:.4g}, at step {reached.best_step}"
        ui(Note(f"{best}: those weights are kept"))
    measured = report.all(engine)
    publish(run, output, resolved, reached, measured)
    _tell(run, output, reached, engine, measured, ui)
    result = _result(command, output, reached, engine, measured, time.perf_counter() - began)
    if opened is not None:
        result |= {"teacher_cache": opened.facts(), "teacher_tokens": opened.teacher.tokens}
    return result


def _stopped(output: Path | None, stop: KeyboardInterrupt) -> Interrupted:
    """What is left of a run that was stopped outside its loop. output: None while nothing of the run was written."""
    number, kept = signal_number(stop), [] if output is None else visible(output / outputs.CHECKPOINTS)
    if output is None:
        return Interrupted(
            "interrupted before the first step: nothing was written", signal_number=number, hint="start it again"
        )
    if not kept:
        what = "interrupted before the first step: nothing was saved"
        return Interrupted(what, signal_number=number, where=str(output), hint="start it again with --overwrite")
    hint = f"{kept[-1]} is whole; go on with --resume"
    return Interrupted("interrupted between steps", signal_number=number, hint=hint)


def _needs_metric(recipe) -> bool:
    return recipe.train.select in ("rouge_l", "exact_match", "error_rate")


def _checkpoint(output: Path, recipe) -> Checkpoint:
    """The newest checkpoint, if it is this recipe's."""
    checkpoint = latest(output / outputs.CHECKPOINTS)
    if checkpoint is None:
        raise CheckpointError(f"no checkpoint in {output / outputs.CHECKPOINTS}", hint="start anew with --overwrite")
    then, now = checkpoint.state["recipe"], json.loads(json.dumps(shaping(recipe)))
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if changed:
        key, more = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise CheckpointError(
            f"the checkpoint is of another recipe: {key} was {then.get(key)!r}, now {now.get(key)!r}{more}",
            where=str(checkpoint.path),
            hint="resume with the settings it was started with, or choose another --output",
        )
    return checkpoint


def _load_student(student: Backbone, checkpoint: Checkpoint) -> None:
    with quiet():
        saved = type(student.model).from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
    student.model.load_state_dict(saved.state_dict())


class _Report:
    """Student before, student after and teacher on the same held-out rows, one pass of generation each.

    All of it after the last step, so that nobody waits for it before the first: the student's first weights are loaded or
    built again, and so is the teacher where it has left memory. Figures and answers are kept under ``directory``.
    """

    def __init__(self, run: Prepared, directory: Path, ui: Console):
        config, self.run, self.directory, self.ui = run.recipe.eval, run, directory, ui
        rows = run.valid.rows[: config.report_rows]
        self.suite = Suite(HELD_OUT, list(rows), run.valid_rows.name)
        self.config = config.model_copy(update={"seeds": config.seeds[:1]})

    def all(self, engine: Engine) -> dict[str, Measured]:
        run = self.run
        engine.optimizer.state.clear()  # its work is done, and the teacher may be needed once more
        found = {AFTER: self._measure(run.student, AFTER, _valid_loss(run.student, engine))}
        if run.pair.teacher is not None:
            has_left = engine.teacher.has_left
            teacher = teacher_again(run.recipe, run.pair, run.device) if has_left else run.pair.teacher
            found[TEACHER] = self._measure(teacher, TEACHER, _valid_loss(teacher, engine))
        with run.as_at_start() if self.suite.rows else nullcontext():
            found[BEFORE] = self._measure(run.student, BEFORE, engine.at.first_valid_loss)
        return found

    def _measure(self, model: Backbone, name: str, valid_loss: float | None) -> Measured:
        result = self._generate(model, name) if self.suite.rows else None
        scores = {} if result is None else {metric: score.mean for metric, score in result.scores.items()}
        answers = [] if result is None else next(iter(result.outputs.values()))
        measured = Measured(valid_loss, scores, answers)
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / f"{name.replace(' ', '-')}.json"
        outputs.write_text(file, json.dumps(vars(measured), ensure_ascii=False, indent=1))
        return measured

    def score(self) -> dict[str, float]:
        """The figure that selects checkpoints, for the student as it is now."""
        result = self._generate(self.run.student, "validating")
        return {metric: score.mean for metric, score in result.scores.items()}

    def _generate(self, model: Backbone, name: str) -> SuiteResult:
        with eval_mode(model):
            return evaluate(model, self.run.encoder, self.suite, self.config, _titled(self.ui, name))


def _titled(ui: Console, name: str):
    """Scoring's progress, with the name of who is scored."""

    def listener(event) -> None:
        task = getattr(event, "task", None)
        ui(event if task is None else type(event)(name, event.done, event.total, event.unit))

    return listener


def _valid_loss(model: Backbone, engine: Engine) -> float:
    """Mean cross-entropy per token on the validation rows, nats: the student's own measure, for any model."""
    objective = Objective(model, Criterion(None), matmul_dtype=engine.objective.matmul_dtype)
    with eval_mode(objective), torch.no_grad():
        return engine.mean_over_validation(CROSS_ENTROPY, objective)


def publish(run: Prepared, output: Path, resolved: Resolved, reached: Reached, measured: dict[str, Measured]) -> None:
    """The student, its tokenizer and its card into ``output``: from now on ``from_pretrained(output)`` works."""
    staged = output / ".staging-model"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    dtype = resolve_dtype(run.recipe.student.save_dtype, run.device)
    run.student.model.to(dtype)
    run.save_model(staged)
    run.student.model.float()
    (staged / "README.md").write_text(model_card(resolved, reached, measured), encoding="utf-8")
    outputs.publish(staged, output)


def _tell(
    run: Prepared, output: Path, reached: Reached, engine: Engine, measured: dict[str, Measured], ui: Console
) -> None:
    order = [name for name in (BEFORE, AFTER, TEACHER) if name in measured]
    table = [Outcome(name, measured[name].valid_loss, measured[name].scores) for name in order]
    ui.show(outcome_table(table, lower_is_better=LOWER_IS_BETTER))
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
    suites = run.recipe.eval.suites or ((run.recipe.data.source,) if run.recipe.data.source else ())
    ui.show(next_steps(output, suites=suites, prompt=samples[0].prompt if samples else None))


def _asked(run: Prepared, row) -> str:
    """What a row asks, without the words of a template where it has an instruction of its own."""
    if row.instruction is None:
        return render(row, run.encoder.template, run.encoder.tokenizer)
    return "\n".join(filter(None, (row.instruction, row.input)))


def _result(command: str, output: Path, reached: Reached, engine: Engine, measured, wall: float) -> dict:
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
        "rollout_steps": reached.sources["rollout"],
        "replay_steps": reached.sources["replay"],
        "dataset_steps": reached.sources["dataset"],
        "sampled_sequences": reached.sampled,
        "train_s": round(reached.seconds, 3),
        "stopped": reached.reason,
        "best_step": reached.best_step,
        "report": {name.replace(" ", "_"): {"valid_loss": m.valid_loss} | m.scores for name, m in measured.items()},
    }
