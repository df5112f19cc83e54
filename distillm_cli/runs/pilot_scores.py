"""Score models on held-out rows, row by row, and compare two of them on the same rows."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from distillm_cli import plugins
from distillm_cli.config.schema import EvalConfig, Recipe
from distillm_cli.data.rows import Row
from distillm_cli.errors import DataError, UsageError
from distillm_cli.evaluation.bootstrap import paired_bootstrap
from distillm_cli.evaluation.evaluate import GREEDY, Answer, evaluate_suite
from distillm_cli.evaluation.metrics import Metric, RatioMetric, get_metric, undefined_reason
from distillm_cli.evaluation.predictions import PassSums
from distillm_cli.evaluation.suites import HELD_OUT, Suite
from distillm_cli.models.backbone import Backbone
from distillm_cli.runs.prepare import Prepared
from distillm_cli.utils.modules import eval_mode


@dataclass(frozen=True)
class RowScores:
    """Hold what each row adds to a ratio. The figure is 100 · Σ numerators / Σ denominators."""

    numerators: SequenceOf[float]
    denominators: SequenceOf[float]

    @property
    def figure(self) -> float:
        return 100 * sum(self.numerators) / sum(self.denominators)

    def sums(self) -> PassSums:
        """Return the numbers of the rows as those of one pass, [1, rows, 2]."""
        return np.stack([self.numerators, self.denominators], axis=-1)[None]


@dataclass(frozen=True)
class PairedDifference:
    """Hold a difference of two figures with its 95 % interval. positive is better for the first."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Return whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired_difference(first: RowScores, second: RowScores, *, lower_is_better: bool) -> PairedDifference:
    """Return by how much the first model is better than the second, on the same rows."""
    a, b = (first, second) if lower_is_better else (second, first)
    low, high, _ = paired_bootstrap(a.sums(), b.sums(), _percentages)
    return PairedDifference(b.figure - a.figure, low, high)


def _percentages(sums_RK: np.ndarray) -> np.ndarray:
    numerators_R, denominators_R = sums_RK.T
    return np.asarray(100 * numerators_R / denominators_R)


class HeldOutScorer:
    """Score the student's greedy answers to held-out rows by one metric.

    A metric of a whole set, such as BLEU, is the mean over rows here.
    """

    def __init__(self, run: Prepared, limit: int):
        answered = [row for row in run.valid.rows if row.references]
        if not answered:
            what = f"{run.valid_rows.name}: no held-out row has a response, and a pilot compares models on them"
            raise DataError("data.no_held_out_rows", what, hint="set rows with responses with --set data.valid=FILE")
        run.student.check_decoding()
        self.run = run
        self.rows = _spread(answered, limit)
        self.metric = choose_metric(run.recipe, self.rows, run.valid_rows.name)

    def limited(self, limit: int) -> HeldOutScorer:
        """Return a scorer of at most ``limit`` of the rows."""
        return HeldOutScorer(self.run, limit)

    def score(self, student: Backbone) -> RowScores:
        """Return the scores of the student's current weights."""
        changes = {"greedy": True, "metrics": (self.metric.name,), "trigger": None, "target": None, "limit": None}
        config = self.run.recipe.eval.model_copy(update=changes)
        with eval_mode(student):
            result = evaluate_suite(student, self.run.encoder, Suite(HELD_OUT, list(self.rows), ""), config)
        (answers,) = (result.answers[name] for name in [GREEDY])
        parts = [self._parts(answer, texts) for answer, texts in zip(answers, result.references, strict=True)]
        return RowScores([float(n) for n, _ in parts], [float(d) for _, d in parts])

    def _parts(self, answer: Answer, references: SequenceOf[str]) -> tuple[float, float]:
        if isinstance(self.metric, RatioMetric):
            return answer.counts[self.metric.name]
        return self.metric.score(answer.text, references) / 100, 1


def _spread(rows: SequenceOf[Row], limit: int) -> list[Row]:
    """Return at most ``limit`` rows, evenly spaced."""
    return [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(limit, len(rows)))]


def choose_metric(recipe: Recipe, rows: SequenceOf[Row], source: str) -> Metric:
    """Return the metric that trials are compared by: that of ``train.select``, else the first of ``eval.metrics``.

    A metric that is undefined on the rows is passed over. Raises UsageError if all are.
    """
    config: EvalConfig = recipe.eval
    names = [name for name in (recipe.train.select, *config.metrics) if name in plugins.metrics]
    references = [row.references for row in rows]
    reasons = {name: undefined_reason(name, references, config.rouge_tokenizer) for name in names}
    found = next((name for name, reason in reasons.items() if reason is None), None)
    if found is None:
        hint = "try --set eval.metrics=[exact_match]"
        raise UsageError("usage.invalid_selection", f"{next(iter(reasons.values()))}", where=source, hint=hint)
    return get_metric(found, config.rouge_tokenizer)
