"""Evaluate every checkpoint on every suite, and analyze the results: leakage, a judge, comparisons."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from distillm_cli.errors import DataError, Interrupted, UsageError, signal_number
from distillm_cli.evaluation.bootstrap import Difference
from distillm_cli.evaluation.likelihood import read_references
from distillm_cli.evaluation.suites import Suite
from distillm_cli.models.devices import dtype_name
from distillm_cli.runs import inference
from distillm_cli.runs.eval_analysis import (
    ScoredSuite,
    common_rows,
    compare_suite,
    comparison_sentence,
    leakage_of,
    training_data,
    without_leaked,
)
from distillm_cli.runs.eval_jobs import EvalJob, eval_jobs
from distillm_cli.runs.eval_judge import Judgments
from distillm_cli.runs.eval_options import NO_OPTIONS, EvalOptions, JudgeOptions
from distillm_cli.runs.eval_scoring import score_checkpoint
from distillm_cli.runs.eval_teacher import LoadedTeacher
from distillm_cli.runs.inference import Settings
from distillm_cli.runs.run_results import SERVER, CheckpointScores, EvalResult
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener


def evaluate_checkpoints(
    checkpoints: list[str],
    settings: Settings,
    listener: Listener,
    *,
    output: str | None = None,
    names: Mapping[str, str] | None = None,
    server: str | None = None,
    options: EvalOptions = NO_OPTIONS,
) -> EvalResult:
    """Score every checkpoint on every suite.

    Errors in names, rows and paths are reported before the first model is loaded. output: a directory; None for one in
    each checkpoint. names: directory names of the checkpoints, if there are several; by default from their paths. server:
    address of a server that generates, for one checkpoint: a directory with a tokenizer, or the name of a model on the
    server. options: what is measured beside the scores.
    """
    started = time.perf_counter()
    if server is not None and len(checkpoints) > 1:
        what = f"--server with {len(checkpoints)} checkpoints"
        raise UsageError("usage.exclusive_options", what, hint="score one model of a server at a time")
    options.check(len(set(map(Path, checkpoints))), on_server=server is not None)
    jobs = eval_jobs(checkpoints, settings, listener, output=output, names=names or {}, server=server, options=options)
    teacher = LoadedTeacher(options.teacher)
    try:
        for job in jobs:
            score_checkpoint(job, teacher, listener)
            if options.counts_leakage:
                _add_leakage(job, listener)
        judge = None if options.judge is None else world().broadcast(partial(_judge, jobs, options.judge, listener))
        for job, ratings in zip(jobs, () if judge is None else judge.ratings, strict=False):
            job.add_ratings(ratings)
        comparisons = tuple(_compare(jobs, listener)) if options.compare else ()
    except KeyboardInterrupt as stop:
        finished = sum(len(job.scores) for job in jobs)
        total = sum(len(job.suites) for job in jobs)
        where = f"results of {finished} of {total} are written" if finished else "no suite was finished"
        raise Interrupted("interrupted", signal_number=signal_number(stop), where=where) from None
    return EvalResult(
        checkpoints=tuple(_checkpoint_scores(job) for job in jobs),
        output=output or str(jobs[0].output),
        wall_s=round(time.perf_counter() - started, 3),
        comparisons=comparisons,
        judge=None if judge is None else judge.summary,
    )


@dataclass(frozen=True)
class _Judged:
    """Hold the ratings of each checkpoint by suite and row, and the object ``judge`` of ``--json``."""

    ratings: list[dict[str, dict[str, float]]]
    summary: Mapping[str, Any]


def _judge(jobs: list[EvalJob], options: JudgeOptions, listener: Listener) -> _Judged:
    """Ask the judge about the responses of all checkpoints, and with ``--compare`` about pairs of responses."""
    judgments = Judgments(options, listener)
    ratings = []
    for job in jobs:
        suites = [suite for suite in job.suites if suite.name in job.places]
        ratings.append({suite.name: judgments.rate(suite.name, job.predictions(suite)) for suite in suites})
    pairs = []
    for job, suite in _common_suites(jobs) if jobs[0].options.compare else ():
        first, second = (one.predictions(suite) for one in (jobs[0], job))
        rows = common_rows(first.where, second.where)
        sides = [(jobs[0].checkpoint, first.select(rows[0])), (job.checkpoint, second.select(rows[1]))]
        pairs.append(judgments.choose(suite.name, sides[0], sides[1]))
    return _Judged(ratings, {**judgments.summary(), "pairs": pairs})


def _add_leakage(job: EvalJob, listener: Listener) -> None:
    """Add counts of training rows to the scores of each suite of prompts, and the scores without these rows."""
    data = training_data(job.recipe.data, job.options.train_data, job.checkpoint, has_recipe=job.has_recipe)
    for suite in job.suites:
        if suite.is_pairs:
            continue
        predictions = job.predictions(suite)
        left = set(predictions.where)
        scored = replace(suite, rows=[row for row in suite.rows if row.where in left])
        found = world().broadcast(partial(leakage_of, scored, data, listener))
        job.scores[suite.name] = {**job.scores[suite.name], "leakage": without_leaked(found, predictions)}


def _scored(job: EvalJob, suite: Suite) -> ScoredSuite:
    references = read_references(job.output / suite.name) if job.options.measures_references else []
    return ScoredSuite(job.checkpoint, job.predictions(suite), references, job.ratings.get(suite.name, {}))


def _listed(make: Callable[[], Iterator[Difference]]) -> list[Difference]:
    return list(make())


def _common_suites(jobs: list[EvalJob]) -> Iterator[tuple[EvalJob, Suite]]:
    """Yield each checkpoint but the first with its suites of prompts that the first has too. Raises DataError for none."""
    first, *others = jobs
    for job in others:
        common = [suite for suite in job.suites if suite.name in first.places and suite.name in job.places]
        if not common:
            what = f"{first.checkpoint} and {job.checkpoint} have no suite in common"
            raise DataError("data.no_common_rows", what, hint="score both on the same rows: --suite NAME")
        for suite in common:
            yield job, suite


def _compare(jobs: list[EvalJob], listener: Listener) -> Iterator[Mapping[str, Any]]:
    """Yield the differences of each checkpoint and the first, by suite and metric."""
    for job, suite in _common_suites(jobs):
        compare = partial(compare_suite, suite.name, _scored(jobs[0], suite), _scored(job, suite), listener)
        for found in world().broadcast(partial(_listed, compare)):
            yield {**found.as_json(), "sentence": comparison_sentence(found)}


def _checkpoint_scores(job: EvalJob) -> CheckpointScores:
    return CheckpointScores(
        checkpoint=job.checkpoint,
        output=job.output,
        suites=job.scores,
        metrics=job.metrics,
        dtype=dtype_name(inference.precision(job.recipe)) if job.server is None else SERVER,
    )
