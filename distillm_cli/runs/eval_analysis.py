"""Analyze scored suites: compare checkpoints, and score suites without the rows that were trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.sources import load_rows
from distillm_cli.errors import DataError, UsageError
from distillm_cli.evaluation.bootstrap import ComparedSide, Difference, compare_sides
from distillm_cli.evaluation.leakage import Leakage, find_leakage
from distillm_cli.evaluation.likelihood import AGREEMENT, KL_STUDENT_TEACHER, KL_TEACHER_STUDENT, LOSS
from distillm_cli.evaluation.predictions import Predictions, mean_and_sd
from distillm_cli.evaluation.suites import Suite
from distillm_cli.training.events import Listener, Note, Warned


def training_data(own: DataConfig, source: str | None, checkpoint: str, *, has_recipe: bool) -> DataConfig:
    """Return the settings of the rows that a checkpoint was trained on: ``source``, else those of its own recipe."""
    if source is not None:
        # With held-out rows of its own, no row is held out of the source.
        return own.model_copy(update={"source": source, "valid": source, "limit": None})
    if not has_recipe:
        what = f"--leakage: {checkpoint} has no recipe that names its training rows"
        raise UsageError("usage.no_data", what, hint="use --train-data PATH")
    return own


def leakage_of(suite: Suite, data: DataConfig, listener: Listener) -> Leakage:
    """Compare a suite with training rows. Raises DataError if these cannot be read."""
    train = load_rows(data.model_copy(update={"skip_bad_rows": True}), "train", require_output=False)
    listener(Note(f"looking for {len(train):,} training rows of {train.name} in {suite.name}"))
    return find_leakage(suite.rows, train)


def without_leaked(found: Leakage, predictions: Predictions) -> dict[str, Any]:
    """Return the object ``leakage`` of a suite: counts, and the scores on the rows that were not trained on."""
    scores: dict[str, Any] = {}
    clean = predictions.select(found.clean)
    for name in predictions.config.metrics if found.clean else ():
        metric = clean.metric(name)
        if metric is None:
            continue
        mean, sd = mean_and_sd(clean.figures(metric))
        scores[name] = {"mean": mean, "sd": sd}
    return {**found.as_json(), "without": scores}


@dataclass(frozen=True)
class ScoredSuite:
    """Hold the results of a checkpoint on a suite. references: lines by row, none if they were not measured.

    ratings: of a judge, by row.
    """

    checkpoint: str
    predictions: Predictions
    references: list[dict[str, Any]]
    ratings: dict[str, float]


def compare_suite(suite: str, a: ScoredSuite, b: ScoredSuite, listener: Listener) -> Iterator[Difference]:
    """Yield the differences of two checkpoints on a suite, by every metric that both have."""
    names = (a.checkpoint, b.checkpoint)
    rows_a, rows_b = common_rows(a.predictions.where, b.predictions.where)
    if not rows_a:
        what = f"{names[0]} and {names[1]} have no common rows in {suite}"
        raise DataError("data.no_common_rows", what, hint="score both on the same rows: --suite NAME")
    if len(rows_a) < max(len(a.predictions.where), len(b.predictions.where)):
        listener(Warned(f"{suite}: compared on the {len(rows_a):,} rows that {names[0]} and {names[1]} have in common"))
    of_a, of_b = a.predictions.select(rows_a), b.predictions.select(rows_b)
    for name in of_a.config.metrics:
        metric = of_a.metric(name)
        if metric is None or name not in of_b.config.metrics:
            continue
        pairs = zip(names, (of_a, of_b), strict=True)
        sides = [ComparedSide(label, of.figures(metric), of.sums(metric)) for label, of in pairs]
        yield compare_sides(suite, name, sides, metric.figure_of_sums, higher_is_better=metric.higher_is_better)
    yield from _compare_references(suite, names, a.references, b.references)
    rated = [where for where in a.ratings if where in b.ratings]
    if rated:
        sides = []
        for label, ratings in zip(names, (a.ratings, b.ratings), strict=True):
            sums_1N2 = np.array([[(ratings[where], 1) for where in rated]], dtype=np.float64)
            sides.append(ComparedSide(label, [float(sums_1N2[0, :, 0].mean())], sums_1N2))
        yield compare_sides(suite, "judge", sides, partial(_ratio, 1), higher_is_better=True)


def common_rows(a: list[str], b: list[str]) -> tuple[list[int], list[int]]:
    """Return the indices of common rows in both lists, in order."""
    if a == b:
        return list(range(len(a))), list(range(len(b)))
    index = {where: i for i, where in enumerate(b)}
    pairs = [(i, index[where]) for i, where in enumerate(a) if where in index]
    return [i for i, _ in pairs], [j for _, j in pairs]


def _compare_references(
    suite: str, names: tuple[str, str], a: list[dict[str, Any]], b: list[dict[str, Any]]
) -> Iterator[Difference]:
    """Yield the differences of the figures of the references. a, b: their lines by row, none if they were not measured."""
    rows_a, rows_b = common_rows([line["where"] for line in a], [line["where"] for line in b])
    for name in (LOSS, KL_TEACHER_STUDENT, KL_STUDENT_TEACHER, AGREEMENT) if rows_a else ():
        if name not in a[0] or name not in b[0]:
            continue
        scale = 100 if name == AGREEMENT else 1
        sides = []
        for label, lines, rows in ((names[0], a, rows_a), (names[1], b, rows_b)):
            sums_1N2 = np.array([[(lines[i][name], lines[i]["tokens"]) for i in rows]], dtype=np.float64)
            figure = scale * sums_1N2[0, :, 0].sum() / sums_1N2[0, :, 1].sum()
            sides.append(ComparedSide(label, [float(figure)], sums_1N2))

        yield compare_sides(suite, name, sides, partial(_ratio, scale), higher_is_better=name == AGREEMENT)


def _ratio(scale: float, sums_RK: np.ndarray) -> np.ndarray:
    ratios: np.ndarray = scale * sums_RK[:, 0] / sums_RK[:, 1]
    return ratios


def comparison_sentence(found: Difference) -> str:
    """Return a comparison as a sentence."""
    direction = "higher" if found.difference > 0 else "lower"
    gap = f"{found.suite}, {found.metric}: {found.b} is {abs(found.difference):.2f} {direction} than {found.a}"
    if found.difference == 0:
        gap = f"{found.suite}, {found.metric}: {found.a} and {found.b} are equal"
    if found.low is None or found.high is None or found.p is None:
        return f"{gap}; no interval, since the metric has no figures of rows"
    interval = f"95 % interval {found.low:.2f} to {found.high:.2f}, p = {found.p:.2g}"
    is_noise = found.is_noise and found.difference != 0
    return f"{gap}, which is inside the noise ({interval})" if is_noise else f"{gap} ({interval})"
