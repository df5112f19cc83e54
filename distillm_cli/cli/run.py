"""Run the stages of a pipeline: ``distillm run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distillm_cli.cli import options
from distillm_cli.cli.options import command
from distillm_cli.utils.stdout import write_json, write_stdout

PIPELINE_PANEL = "Pipeline"

PipelineRecipe = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        help="Pipeline recipe: a shipped name or a file.",
        autocompletion=options.complete_pipelines,
        show_default=False,
    ),
]
OnlyStages = Annotated[
    str | None,
    typer.Option("--only", metavar="STAGE,…", help="Run only these stages.", rich_help_panel=PIPELINE_PANEL),
]
FirstStage = Annotated[
    str | None,
    typer.Option("--from", metavar="STAGE", help="Run this stage and the later ones.", rich_help_panel=PIPELINE_PANEL),
]
PipelineSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a field, stages.NAME.section.key or defaults.section.key. May be repeated.",
        autocompletion=options.complete_pipeline_set,
        rich_help_panel=PIPELINE_PANEL,
    ),
]
PipelineDryRun = Annotated[
    bool,
    options.switch(
        "--dry-run",
        "Print the recipe of every stage with the origin of each value, and which stages would run.",
        PIPELINE_PANEL,
    ),
]
PipelineOutput = Annotated[
    str | None,
    options.named(
        "--output",
        "DIR",
        r"Output directory, with one subdirectory per stage. [dim]\[default: runs/<name>][/]",
        options.OUTPUT_PANEL,
    ),
]


@command(
    "run",
    panel=options.OTHER_COMMANDS,
    examples=(
        "distillm run quickstart-pipeline",
        "distillm run quickstart-pipeline --dry-run",
        "distillm run my.yaml --output runs/my --set stages.distill.objective.alpha=0.3",
        "distillm run dolly-gpt2-pipeline --only teacher,student-120m,distill-120m,eval-120m",
        "distillm run my.yaml --output runs/my --from distill",
    ),
)
def run_stages(
    recipe: PipelineRecipe,
    only: OnlyStages = None,
    start: FirstStage = None,
    sets: PipelineSet = None,
    dry_run: PipelineDryRun = False,
    output: PipelineOutput = None,
    *,
    reporting: options.ReportingOptions,
) -> None:
    """Run a pipeline: teacher SFT, student SFT, teacher samples, distillation, evaluation.

    Finished stages are skipped. A stage runs again when its recipe, its data or a stage that it reads has changed. To
    resume a stopped pipeline, run the same command again. To start a stage over, remove its directory.
    """
    from distillm_cli.config.pipeline_recipe import load_pipeline
    from distillm_cli.runs.defaults import fitted_pipeline
    from distillm_cli.ui.console import console

    pipeline = fitted_pipeline(load_pipeline(recipe, sets or ()))
    place = Path(output) if output else Path("runs") / pipeline.name
    if dry_run:
        from distillm_cli.runs.pipeline import choose_stages, resolved_yaml, stage_states

        states = stage_states(pipeline, place, choose_stages(pipeline, only, start))
        if not reporting.json:
            write_stdout(resolved_yaml(pipeline, states))
            return
        stages = {
            stage.name: {"verb": stage.verb, "state": states[stage.name].kind, "why": states[stage.name].why}
            | {"recipe": stage.config.model_dump(mode="json") | stage.resolved.recipe.model_dump(mode="json")}
            for stage in pipeline.stages
        }
        write_json({"command": "run", "status": "ok", "output": str(place), "stages": stages})
        return
    with console(json_mode=reporting.json, quiet=reporting.quiet) as ui:
        from distillm_cli.runs.pipeline import run_pipeline
        from distillm_cli.ui.summary import pipeline_next_steps, pipeline_summary

        result = run_pipeline(pipeline, place, ui, only=only, start=start)
        ui.answer(*pipeline_summary(result))
        if (commands := pipeline_next_steps(result)) is not None:
            ui.show(commands)
        ui.result(result.as_json())
