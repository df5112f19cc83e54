"""What a run's models do on its held-out rows: measured once they are trained, or to select checkpoints.

Metrics are imported where something is scored: nobody waits for them before the first step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from distillm_cli.config.fields import MetricName
from distillm_cli.config.schema import Recipe
from distillm_cli.errors import ModelError, UsageError
from distillm_cli.evaluation.suites import HELD_OUT, Suite
from distillm_cli.losses.criterion import CROSS_ENTROPY, Objective
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.devices import dtype_name, resolve_dtype
from distillm_cli.runs import output_dir, samplers
from distillm_cli.runs.prepare import Prepared
from distillm_cli.training.engine import Engine, eval_mode
from distillm_cli.training.events import Warned
from distillm_cli.training.progress import TrainerState
from distillm_cli.ui.console import Console
from distillm_cli.utils.text import counted

if TYPE_CHECKING:
    from distillm_cli.evaluation.evaluate import SuiteResult
    from distillm_cli.models.backbone import Backbone

# Before anything; after the fine-tuning stage, where there is one; at the end.
BEFORE, FINE_TUNED, AFTER, TEACHER = "student before", "student after sft", "student after", "teacher"


@dataclass(frozen=True)
class Measured:
    """What one model did on the held-out rows: its figures, and what it answered to the first of them."""

    valid_loss: float | None
    scores: dict[str, float | None]
    answers: list[str]


def labels(reached: TrainerState, *, after_sft: bool) -> dict[str, str]:
    """Return the models' names with the step that their weights are of, for people. after_sft: of a stage before."""
    kept = reached.step if reached.best_step is None else reached.best_step
    begun = FINE_TUNED if after_sft else BEFORE
    return {BEFORE: BEFORE, TEACHER: TEACHER, begun: f"{begun}, step 0", AFTER: f"{AFTER}, step {kept:,}"}


def needs_metric(recipe: Recipe) -> bool:
    """Whether checkpoints are selected by what a metric says of generated answers."""
    return recipe.train.select in get_args(MetricName)


def check_metric(recipe: Recipe) -> None:
    """Raises UsageError where checkpoints are selected by a metric of no answers."""
    if needs_metric(recipe) and not recipe.eval.report_rows:
        what = f"train.select = {recipe.train.select} is measured on eval.report_rows held-out rows, and that is 0"
        raise UsageError(what, hint="try --set eval.report_rows=100, or --set train.select=valid_loss")


def check_answers(run: Prepared) -> None:
    """Raises ModelError where the run trains on samples of a model that cannot generate, or selects checkpoints by what it
    answers. The table at the end can do without.

    Raises UsageError where the metric that selects checkpoints is undefined on the held-out rows."""
    for model in samplers.samplers(run) + ([run.student] if needs_metric(run.recipe) else []):
        model.check_decoding()
    if needs_metric(run.recipe):
        from distillm_cli.evaluation.metrics import undefined_on

        select, config = run.recipe.train.select, run.recipe.eval
        references = [row.references for row in run.valid.rows[: config.report_rows]]
        if references and (why := undefined_on(select, references, config.rouge_tokenizer)) is not None:
            raise UsageError(f"train.select: {why}", where=run.valid_rows.name)


class Report:
    """Student before, student after and teacher on the same held-out rows, one pass of generation each.

    All of it after the last step, so that nobody waits for it before the first: the student's first weights are loaded or
    built again, and so is the teacher where it has left memory. Figures and answers are kept under ``directory``. After a
    fine-tuning stage the student before is the one before that, and the fine-tuned one has a name of its own: both were
    measured then.
    """

    def __init__(self, run: Prepared, directory: Path, ui: Console):
        config, self.run, self.directory, self.ui = run.recipe.eval, run, directory, ui
        rows = [row for row in run.valid.rows if row.references][: config.report_rows]
        self.suite = Suite(HELD_OUT, list(rows), run.valid_rows.name)
        metrics = dict.fromkeys([*config.metrics, *([run.recipe.train.select] if needs_metric(run.recipe) else [])])
        self.config = config.model_copy(update={"seeds": config.seeds[:1], "metrics": tuple(metrics)})

    def all(self, engine: Engine) -> dict[str, Measured]:
        from distillm_cli.models.pair import teacher_again

        run = self.run
        self.labels = labels(engine.at, after_sft=bool(run.recipe.student.sft_epochs))
        engine.optimizer.state.clear()  # its work is done, and the teacher may be needed once more
        teacher = run.pair.teacher
        if teacher is not None and engine.teacher.has_left:
            teacher = teacher_again(run.recipe, run.pair, run.device)
        if not self._all_answer({"student": run.student, "teacher": teacher}):
            self.suite = replace(self.suite, rows=[])
        found = {AFTER: self._measure(run.student, AFTER, _valid_loss(run.student, engine))}
        if teacher is not None:
            found[TEACHER] = self._measure(teacher, TEACHER, _valid_loss(teacher, engine))
        if run.recipe.student.sft_epochs:
            return found | self._of_stage({BEFORE: BEFORE, AFTER: FINE_TUNED})
        with run.as_at_start() if self.suite.rows else nullcontext():
            found[BEFORE] = self._measure(run.student, BEFORE, engine.at.first_valid_loss)
        return found

    def _all_answer(self, models: Mapping[str, Backbone | None]) -> bool:
        """Whether there are rows to answer, and every model can; where one cannot, that is said."""
        for name, model in models.items() if self.suite.rows else ():
            try:
                if model is not None:
                    model.check_decoding()
            except ModelError as error:
                self.ui(Warned(f"no answers in the table, losses only: the {name} has none ({error.what})"))
                return False
        return bool(self.suite.rows)

    def _measure(self, model: Backbone, name: str, valid_loss: float | None) -> Measured:
        result = self._generate(model, self.labels[name]) if self.suite.rows else None
        scores = {} if result is None else {metric: score.mean for metric, score in result.scores.items()}
        for told in {} if result is None or name != AFTER else result.scores.values():
            if told.undefined is not None:
                self.ui(Warned(told.undefined))
        answers = [] if result is None else next(iter(result.outputs.values()))
        return self._keep(name, Measured(valid_loss, scores, answers))

    def _of_stage(self, names: dict[str, str]) -> dict[str, Measured]:
        """What the stage before measured, as far as it is there still, kept here too. names: there → here."""
        place = self.directory.parents[1] / output_dir.SFT / output_dir.EVAL / self.directory.name
        files = {here: place / _file(there) for there, here in names.items()}
        return {
            here: self._keep(here, Measured(**json.loads(file.read_text(encoding="utf-8"))))
            for here, file in files.items()
            if file.is_file()
        }

    def _keep(self, name: str, measured: Measured) -> Measured:
        text = json.dumps(vars(measured), ensure_ascii=False, indent=1)
        output_dir.write_file(self.directory.parents[1], f"{output_dir.EVAL}/report/{_file(name)}", text)
        return measured

    @property
    def measured_on(self) -> str:
        """Which rows the figures are of, and how those were answered, in words."""
        rows, answered, config = counted(len(self.run.valid), "held-out row"), len(self.suite.rows), self.config
        if not answered:
            return f"on {rows}"
        narrowed = [f"top-p {config.top_p:g}"] if config.top_p < 1 else []
        narrowed += [f"top-k {config.top_k}"] if config.top_k else []
        sampled = ", ".join([f"sampled at T = {config.temperature:g}", *narrowed])
        how = "decoded greedily" if config.greedy or config.temperature == 0 else sampled
        which = "" if answered == len(self.run.valid) else f" on the first {answered:,} of them,"
        return f"valid CE on {rows}; scores{which} {how}, in {self._precision()}"

    def _precision(self) -> str:
        """Each model decodes in the precision of its weights, the student in that of training, whatever `eval` takes."""
        run = self.run
        own = dtype_name(run.student.model.dtype)
        teachers = own if run.pair.teacher is None else dtype_name(resolve_dtype(run.recipe.teacher.dtype, run.device))
        return own if own == teachers else f"{own} (teacher: {teachers})"

    def score(self) -> dict[str, float]:
        """The figure that selects checkpoints, for the student as it is now."""
        result = self._generate(self.run.student, "validating")
        return {metric: score.mean for metric, score in result.scores.items()}

    def _generate(self, model: Backbone, name: str) -> SuiteResult:
        from distillm_cli.evaluation.evaluate import evaluate  # with its metrics, whose libraries take long to import

        with eval_mode(model):
            return evaluate(model, self.run.encoder, self.suite, self.config, _titled(self.ui, name))


def _file(name: str) -> str:
    return f"{name.replace(' ', '-')}.json"


def _titled(ui: Console, name: str):
    """Scoring's progress, with the name of who is scored."""

    def listener(event) -> None:
        task = getattr(event, "task", None)
        ui(event if task is None else type(event)(name, event.done, event.total, event.unit))

    return listener


def _valid_loss(model: Backbone, engine: Engine) -> float | None:
    """Return the mean cross-entropy per token on the validation rows, nats, as measured for the student. The student is
    measured as it computed in training, the teacher in its own dtype, as it taught. None without validation rows."""
    if not engine.held_out.batches:
        return None
    dtype = engine.objective.matmul_dtype if model is engine.objective.student else None
    objective = StudentLoss(model, Objective(None), matmul_dtype=dtype)
    with eval_mode(objective), torch.no_grad():
        return engine.held_out.mean(CROSS_ENTROPY, objective)
