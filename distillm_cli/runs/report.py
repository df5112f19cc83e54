"""Measure a run's models on its held-out rows: at the end of training, or to select checkpoints.

Metrics are slow to import, so they are imported only to score responses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distillm_cli import plugins
from distillm_cli.config.schema import Recipe
from distillm_cli.errors import ModelError, UsageError
from distillm_cli.evaluation.suites import HELD_OUT, Suite
from distillm_cli.models.devices import dtype_name, resolve_dtype
from distillm_cli.runs import output_dir
from distillm_cli.runs.build import sampling_models
from distillm_cli.runs.prepare import Prepared
from distillm_cli.training.events import Event, Listener, Progress, Warned
from distillm_cli.training.sharding import NOT_SHARDED
from distillm_cli.training.state import TrainerState
from distillm_cli.training.trainer import Trainer
from distillm_cli.utils.modules import eval_mode
from distillm_cli.utils.text import counted

if TYPE_CHECKING:
    from distillm_cli.evaluation.evaluate import SuiteResult
    from distillm_cli.losses.extra import TrainedTeacher
    from distillm_cli.models.backbone import Backbone

# The models of a report. FINE_TUNED, PRE_TRAINED: after these stages, if there are any.
BEFORE = "student before"
FINE_TUNED = "student after sft"
PRE_TRAINED = "student after ptp"
AFTER = "student after"
TEACHER = "teacher"
# In place of TEACHER, if the run trains it.
TEACHER_BEFORE = "teacher before"
TEACHER_AFTER = "teacher after"
_DRIFT = "drift"  # KL(teacher before ‖ teacher after), a score of TEACHER_AFTER


@dataclass(frozen=True)
class ModelReport:
    """Hold one model's figures on the held-out rows, and its responses to the first of them."""

    valid_loss: float | None
    scores: dict[str, float | None]
    answers: list[str]


def labels(state: TrainerState, recipe: Recipe) -> dict[str, str]:
    """Return the models' display names with the step of their weights. Fine-tuning has no student: "model before"."""
    final_step = state.step if state.best_step is None else state.best_step
    start = PRE_TRAINED if recipe.student.ptp else FINE_TUNED if recipe.student.sft_epochs else BEFORE
    names = {name: name for name in (BEFORE, FINE_TUNED, TEACHER, TEACHER_BEFORE, TEACHER_AFTER)}
    names |= {start: f"{start}, step 0", AFTER: f"{AFTER}, step {final_step:,}"}
    return {name: model_title(label, recipe) for name, label in names.items()}


def model_title(name: str, recipe: Recipe) -> str:
    """Return a model's display name without its step."""
    if name == TEACHER and recipe.robustkd.blocks:
        return f"{name} with masks"
    return name.replace("student", "model", 1) if recipe.method == "sft" else name


def selects_by_metric(recipe: Recipe) -> bool:
    """Return whether checkpoints are selected by a metric of generated responses."""
    return recipe.train.select in plugins.metrics


def check_selection_metric(recipe: Recipe) -> None:
    """Raise UsageError if the metric that selects checkpoints has no direction, or no responses are generated."""
    if selects_by_metric(recipe) and plugins.metrics[recipe.train.select].higher_is_better is None:
        what = f"train.select = {recipe.train.select}, which is not better when it is higher or lower"
        raise UsageError("usage.invalid_selection", what, hint="try --set train.select=valid_loss")
    if selects_by_metric(recipe) and not recipe.eval.report_rows:
        what = f"train.select = {recipe.train.select} needs eval.report_rows held-out rows, but that is 0"
        raise UsageError(
            "usage.invalid_selection", what, hint="try --set eval.report_rows=100, or --set train.select=valid_loss"
        )


def check_can_generate(run: Prepared) -> None:
    """Raise ModelError if a model that the run samples from, or selects checkpoints by, cannot generate.

    The report at the end does not require responses. Raises UsageError if the metric that selects checkpoints is
    undefined on the held-out rows.
    """
    for model in sampling_models(run) + ([run.student] if selects_by_metric(run.recipe) else []):
        model.check_decoding()
    if selects_by_metric(run.recipe):
        from distillm_cli.evaluation.metrics import undefined_reason

        select = run.recipe.train.select
        config = run.recipe.eval
        references = [row.references for row in run.valid.rows[: config.report_rows]]
        if references and (why := undefined_reason(select, references, config.rouge_tokenizer)) is not None:
            raise UsageError("usage.invalid_selection", f"train.select: {why}", where=run.valid_rows.name)


class Report:
    """Measure student before, student after and teacher on the same held-out rows, one pass of generation each.

    Everything is measured after the last step: the student's initial weights are loaded or built again, and the teacher
    is loaded again if it was released. Figures, prompts, references and responses are saved under ``directory``. After
    a fine-tuning stage, "student before" and the fine-tuned student are read from that stage's report.
    """

    def __init__(self, run: Prepared, directory: Path, listener: Listener):
        self.run = run
        self.directory = directory
        self.listener = listener
        config = run.recipe.eval
        rows = [row for row in run.valid.rows if row.references][: config.report_rows]
        self.suite = Suite(HELD_OUT, list(rows), run.valid_rows.name)
        metrics = dict.fromkeys(config.metrics)
        if selects_by_metric(run.recipe):
            metrics[run.recipe.train.select] = None
        changes = {"seeds": config.seeds[:1], "metrics": tuple(metrics), "trigger": None, "target": None}
        self.config = config.model_copy(update=changes)
        self.measures_drift = False
        self.sharding = NOT_SHARDED  # of the student

    def all(self, trainer: Trainer) -> dict[str, ModelReport]:
        """Measure every model; return their reports by name."""
        from distillm_cli.models.pair import reload_teacher

        run = self.run
        self.labels = labels(trainer.state, run.recipe)
        self.sharding = trainer.student_loss.sharding
        trainer.optimizer.state.clear()  # no longer needed; frees memory for the teacher, which may be loaded again
        teacher = run.pair.teacher if _measures_teacher(run.recipe) else None
        if teacher is not None and trainer.teacher is not None and trainer.teacher.has_released_model:
            teacher = reload_teacher(run.recipe, run.pair, run.device)
        generates = None if teacher is None or teacher.is_served else teacher
        if not self._all_can_generate({"student": run.student, "teacher": generates}):
            self.suite = replace(self.suite, rows=[])
        reports = {AFTER: self._measure(run.student, AFTER, _valid_loss(run.student, trainer))}
        trained = trainer.student_loss.trained_teacher
        if trained is not None:
            reports |= self._trained_teacher(trained, trainer)
        elif teacher is not None:
            with teacher.on_device():
                reports[TEACHER] = self._measure(teacher, TEACHER, _valid_loss(teacher, trainer))
        start = BEFORE
        if run.recipe.student.sft_epochs:
            reports |= self._stage_reports({BEFORE: BEFORE, AFTER: FINE_TUNED})
            start = FINE_TUNED
        if run.before is not None:
            if start == BEFORE:
                with run.before.with_start_weights():
                    reports[BEFORE] = self._measure(run.student, BEFORE, _valid_loss(run.student, trainer))
            start = PRE_TRAINED
        if start != FINE_TUNED:
            with run.with_start_weights() if self.suite.rows else nullcontext():
                reports[start] = self._measure(run.student, start, trainer.state.first_valid_loss)
        return reports

    def _trained_teacher(self, trained: TrainedTeacher, trainer: Trainer) -> dict[str, ModelReport]:
        """Return the reports of a teacher that the run trains, after training and before."""
        teacher = trained.teacher
        drift: dict[str, float] = {}
        if trainer.validator.batches:
            with eval_mode(trained), torch.no_grad():
                figures = trained.measure(trainer.validator.batches, trainer.run)
            self.measures_drift = "teacher_drift" in figures
            if self.measures_drift:
                drift[_DRIFT] = figures["teacher_drift"]
        after = self._measure(teacher, TEACHER_AFTER, _valid_loss(teacher, trainer), drift)
        with trained.with_start_weights():
            before = self._measure(teacher, TEACHER_BEFORE, _valid_loss(teacher, trainer))
        return {TEACHER_BEFORE: before, TEACHER_AFTER: after}

    def _all_can_generate(self, models: Mapping[str, Backbone | None]) -> bool:
        """Return whether there are rows to respond to and every model can generate; warn if one cannot."""
        for name, model in models.items() if self.suite.rows else ():
            try:
                if model is not None:
                    with model.on_device(), self._whole(model):
                        model.check_decoding()
            except ModelError as error:
                self.listener(Warned(f"no responses in the table, only losses; {name}: {error.what}"))
                return False
        return bool(self.suite.rows)

    def _measure(
        self, model: Backbone, name: str, valid_loss: float | None, figures: Mapping[str, float] | None = None
    ) -> ModelReport:
        """Return the report of a model. figures: more of its scores."""
        if not self.suite.rows or model.is_served:
            return self._save(name, ModelReport(valid_loss, dict(figures or {}), []))
        with self._whole(model):
            result = self._generate(model, self.labels[name])
        if name == AFTER:
            for score in result.scores.values():
                if score.undefined is not None:
                    self.listener(Warned(score.undefined))
        scores = {metric: score.mean for metric, score in result.scores.items()} | dict(figures or {})
        answers = next(iter(result.outputs.values()))
        return self._save(name, ModelReport(valid_loss, scores, answers))

    def _whole(self, model: Backbone) -> AbstractContextManager[None]:
        """Return a context in which each process has all weights of a model."""
        return self.sharding.whole() if model is self.run.student else nullcontext()

    def _stage_reports(self, names: dict[str, str]) -> dict[str, ModelReport]:
        """Return the reports of the fine-tuning stage that still exist, and save them in this directory too.

        names: from a model's name in the stage to its name in this report.
        """
        place = self.directory.parents[1] / output_dir.SFT / output_dir.EVAL / self.directory.name
        reports = {}
        for stage_name, name in names.items():
            file = place / _file_name(stage_name)
            if file.is_file():
                saved = json.loads(file.read_text(encoding="utf-8"))
                figures = {item.name: saved[item.name] for item in fields(ModelReport)}
                reports[name] = self._save(name, ModelReport(**figures))
        return reports

    def _save(self, name: str, report: ModelReport) -> ModelReport:
        rows = self.suite.rows[: len(report.answers)]
        encoder = self.run.encoder
        if name == TEACHER and self.run.teacher_encoder is not None:
            encoder = self.run.teacher_encoder
        content = {
            **vars(report),
            "prompts": [encoder.renderer.prompt(row) for row in rows],
            "references": [list(row.references) for row in rows],
        }
        text = json.dumps(content, ensure_ascii=False, indent=1)
        output_dir.write_file(self.directory.parents[1], f"{output_dir.EVAL}/report/{_file_name(name)}", text)
        return report

    @property
    def measured_on(self) -> str:
        """Describe the measured rows and the decoding of responses."""
        rows = counted(len(self.run.valid), "held-out row")
        answered = len(self.suite.rows)
        config = self.config
        drift = "; drift: KL(teacher before ‖ teacher after), nats per token" if self.measures_drift else ""
        if not answered:
            return f"on {rows}{drift}"
        if config.greedy or config.temperature == 0:
            decoding = "decoded greedily"
        else:
            decoding = f"sampled at T = {config.temperature:g}"
            decoding += f", top-p {config.top_p:g}" if config.top_p < 1 else ""
            decoding += f", top-k {config.top_k}" if config.top_k else ""
        subset = "" if answered == len(self.run.valid) else f" on the first {answered:,} of them,"
        return f"valid CE on {rows}; scores{subset} {decoding}, in {self._precision()}{drift}"

    def _precision(self) -> str:
        """Describe the dtype that the models decode in: that of their weights."""
        run = self.run
        student = dtype_name(run.student.model.dtype)
        if run.pair.teacher is None:
            return student
        teacher = dtype_name(resolve_dtype(run.recipe.teacher_dtype, run.device))
        return student if student == teacher else f"{student} (teacher: {teacher})"

    def score(self) -> dict[str, float | None]:
        """Return the metric that selects checkpoints, for the student's current weights."""
        result = self._generate(self.run.student, "validating")
        return {metric: score.mean for metric, score in result.scores.items()}

    def _generate(self, model: Backbone, name: str) -> SuiteResult:
        from distillm_cli.evaluation.evaluate import evaluate_suite  # slow: imports the libraries of the metrics

        with eval_mode(model):
            listener = _renamed_progress(self.listener, name)
            return evaluate_suite(model, self.run.encoder_of(model), self.suite, self.config, listener)


def _measures_teacher(recipe: Recipe) -> bool:
    """Return whether the teacher is measured. One that a run trains always is, since it is part of the result."""
    if recipe.teacher_trainer is not None:
        return True
    return recipe.eval.report_teacher and recipe.teacher.device_map == "none"


def _file_name(name: str) -> str:
    return f"{name.replace(' ', '-')}.json"


def _renamed_progress(listener: Listener, name: str) -> Listener:
    """Return a listener that reports progress under another name: the model that is scored."""

    def listen(event: Event) -> None:
        listener(replace(event, task=name) if isinstance(event, Progress) else event)

    return listen


def _valid_loss(model: Backbone, trainer: Trainer) -> float | None:
    """Return the mean cross-entropy per token on the validation rows, nats; None without validation rows."""
    return trainer.validator.cross_entropy(model, trainer.student_loss) if trainer.validator.batches else None
