"""Train the baselines of a distillation (``--compare``): plain SFT and off-policy distillation, for the same seconds.

Both start from the same student, use the same rows, and are complete runs in ``OUTPUT/compare``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from distillm_cli.config.derived import baseline_recipes
from distillm_cli.config.fields import is_lower_better
from distillm_cli.config.load import Resolved
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.runs import output_dir
from distillm_cli.runs.run_results import Baseline, Outcome, TrainResult, TrainSummary
from distillm_cli.runs.start import TrainOptions, start_training
from distillm_cli.runs.train import write_page
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Note
from distillm_cli.utils.text import format_duration


def compare(resolved: Resolved, result: TrainResult, listener: Listener, options: TrainOptions) -> TrainResult:
    """Train the baselines of a finished run; return its result with them, which is also written to its directory.

    resolved: the recipe of the run. options: of the run; a resume continues the baselines too.
    """
    steps = world().broadcast(lambda: equal_steps(result))  # by the clock
    baselines = []
    stage = result.output / output_dir.SFT
    stage_steps = (
        json.loads((stage / output_dir.RESULT).read_text())["steps"] if resolved.recipe.student.sft_epochs else 0
    )
    for name, recipe in baseline_recipes(resolved, result.steps, steps, str(stage), stage_steps).items():
        place = result.output / output_dir.COMPARE / name
        listener(Note(f"comparing with {name}: {recipe.recipe.train.steps:,} steps on data set rows, in {place}"))
        can_resume = options.resume and output_dir.may_resume(place)
        place_options = TrainOptions(
            resume=can_resume, overwrite=options.overwrite or (options.resume and not can_resume)
        )
        trained = start_training("distill", recipe, place, listener, place_options)
        figures = trained.report["student_after"]
        baselines.append(Baseline(name, str(place), trained.steps, trained.train_s, figures))
    result = replace(result, baselines=tuple(baselines), summary=_with_baselines(result, baselines))
    output_dir.write_result(result.output, result.as_json())
    write_page(resolved.recipe, result.output, listener)  # again, with the baselines
    return result


def equal_steps(result: TrainResult) -> int:
    """Return how many steps on data set rows take the seconds of a run: its seconds / the mean step on rows.

    Without a step on rows, it is the number of steps of the run.
    """
    steps = result.summary.sources.get(Source.DATASET, 0)
    if not steps:
        return result.steps
    return round(result.train_s * steps / result.summary.source_seconds[Source.DATASET])


def _with_baselines(result: TrainResult, baselines: list[Baseline]) -> TrainSummary:
    """Return the summary with the baselines before the trained student, and how much of the gap to the teacher is closed."""
    rows: list[Outcome] = []
    for outcome in result.summary.outcomes:
        if not outcome.is_trained:
            rows.append(outcome)
            continue
        for baseline in baselines:
            scores = {name: value for name, value in baseline.figures.items() if name != "valid_loss"}
            label = f"{baseline.name}, {format_duration(baseline.train_s)}"
            rows.append(Outcome(label, baseline.figures["valid_loss"], scores))
        rows.append(replace(outcome, name=f"{outcome.name}, {format_duration(result.train_s)}"))
    figures = {baseline.name: baseline.figures for baseline in baselines}
    teacher = result.report["teacher_after" if "teacher_after" in result.report else "teacher"]
    covered = gap(figures, result.report["student_after"], teacher)
    return replace(result.summary, outcomes=tuple(rows), gap=covered)


def gap(
    baselines: Mapping[str, Mapping[str, float | None]],
    after: Mapping[str, float | None],
    teacher: Mapping[str, float | None],
) -> str | None:
    """Describe which share of the distance from the first baseline to the teacher each model covers, by the first metric.

    None without a metric, or if the teacher is not better than that baseline.
    """
    metric = next((name for name in after if name != "valid_loss"), None)
    if metric is None:
        return None
    first, *others = baselines
    start, end = baselines[first][metric], teacher.get(metric)  # a teacher on a server has no responses to score
    if start is None or end is None or start == end or (end > start) == is_lower_better(metric):
        return None
    models = {name: baselines[name][metric] for name in others} | {"this run": after[metric]}
    covered = [f"{name} {(value - start) / (end - start):.0%}" for name, value in models.items() if value is not None]
    return f"Of the gap in {metric.replace('_', ' ')} between {first} and the teacher, closed: {', '.join(covered)}."
