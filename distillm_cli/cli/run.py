"""``distillm run``: a recipe of stages, each done once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distillm_cli.cli import options
from distillm_cli.cli.streams import write_stdout

PIPELINE = "Pipeline"

Recipe = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        help="A recipe of stages, shipped or a file.",
        autocompletion=lambda incomplete: options.recipes_like(incomplete, of_stages=True),
        show_default=False,
    ),
]
Only = Annotated[
    str | None, typer.Option("--only", metavar="STAGE,…", help="These stages alone.", rich_help_panel=PIPELINE)
]
From = Annotated[
    str | None,
    typer.Option("--from", metavar="STAGE", help="This stage and those after it.", rich_help_panel=PIPELINE),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="stages.NAME.section.key or defaults.section.key; may be repeated.",
        rich_help_panel=PIPELINE,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        metavar="",
        help="Print every stage's recipe, where each value comes from, and what would run.",
        rich_help_panel=PIPELINE,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="DIR",
        callback=options.named,
        help="A directory for each stage goes there; else runs/NAME.",
        rich_help_panel=options.OUTPUT,
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        "run",
        rich_help_panel=options.AROUND,
        epilog=options.examples(
            "distillm run quickstart-pipeline",
            "distillm run quickstart-pipeline --dry-run",
            "distillm run my.yaml --output runs/my --set stages.distill.objective.alpha=0.3",
            "distillm run dolly-gpt2-pipeline --only teacher,student-120m,distill-120m,eval-120m",
            "distillm run my.yaml --output runs/my --from distill",
        ),
    )(run)


def run(
    recipe: Recipe,
    only: Only = None,
    start: From = None,
    sets: Set = None,
    dry_run: DryRun = False,
    output: Output = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """A recipe of stages: teacher SFT, student SFT, teacher samples, distill, eval, in one go.

    What is done is skipped: a stage runs again when its recipe, its data or a stage that it reads has changed. A stopped
    run goes on when the same command is typed again. To make a stage anew, remove its directory.
    """
    from distillm_cli.cli.launch import check_alone
    from distillm_cli.config.pipeline_recipe import load_pipeline
    from distillm_cli.runs.defaults import fitted_pipeline
    from distillm_cli.ui.console import console, print_json

    pipeline = fitted_pipeline(load_pipeline(recipe, sets or ()))
    place = Path(output) if output else Path("runs") / pipeline.name
    if dry_run:
        from distillm_cli.runs.pipeline import choose_stages, resolved_yaml, stage_states

        states = stage_states(pipeline, place, choose_stages(pipeline, only, start))
        if not json:
            write_stdout(resolved_yaml(pipeline, states))
            return
        told = {
            stage.name: {"verb": stage.verb, "state": states[stage.name].kind, "why": states[stage.name].why}
            | {"recipe": stage.own.model_dump(mode="json") | stage.resolved.recipe.model_dump(mode="json")}
            for stage in pipeline.stages
        }
        print_json({"command": "run", "status": "ok", "output": str(place), "stages": told})
        return
    check_alone()
    with console(json_mode=json, quiet=quiet) as ui:
        from distillm_cli.runs.pipeline import run_pipeline
        from distillm_cli.ui.summary import stage_table

        result = run_pipeline(pipeline, place, ui, only=only, start=start)
        ui.show(stage_table(result))
        ui.result(result.as_json())
