"""Try settings with short runs before a distillation: ``distillm pilot``."""

from __future__ import annotations

from typing import Annotated

import typer

from distillm_cli.cli import options
from distillm_cli.cli.options import FieldFlags, command

PILOT_PANEL = "Pilot"

Minutes = Annotated[
    float,
    typer.Option(
        "--minutes",
        metavar="M",
        help=r"Budget, in minutes from the start of the command. [dim]\[default: 20][/]",
        show_default=False,
        rich_help_panel=PILOT_PANEL,
    ),
]
GridValues = Annotated[
    list[str] | None,
    typer.Option(
        "--grid",
        metavar="NAME=VALUE,…",
        help=(
            "Values to try for lr, divergence, temperature or schedule, the most important first. May be repeated. "
            r"[dim]\[default: around the recipe's values][/]"
        ),
        rich_help_panel=PILOT_PANEL,
    ),
]


@command(
    "pilot",
    panel=options.OTHER_COMMANDS,
    examples=(
        "distillm pilot --recipe quickstart --minutes 5",
        "distillm pilot --teacher runs/teacher --student gpt2 --data rows.jsonl --output runs/pilot",
        "distillm pilot --recipe g2p --grid lr=1e-3,2e-3,4e-3 --grid divergence=kl,ab --grid schedule=off,auto,on",
        "distillm distill --recipe runs/pilot/recipe.yaml --output runs/student",
    ),
)
def pilot(
    fields: FieldFlags,
    recipe: options.RecipeOption = None,
    sets: options.Set = None,
    minutes: Minutes = 20.0,
    grid: GridValues = None,
    output: options.Output = None,
    *,
    reporting: options.ReportingOptions,
) -> None:
    """Choose settings by short runs on held-out rows: learning rate, objective, temperature, schedule, plain SFT.

    The runs share models and teacher cache. The better half of them continues, until the budget is used. The result is a
    table, answers in sentences, and a recipe for `distillm distill`. To resume a stopped pilot, run the same command again.
    """
    from distillm_cli.api import pilot_recipe
    from distillm_cli.ui.console import console

    with console(json_mode=reporting.json, quiet=reporting.quiet) as ui:
        result = pilot_recipe(recipe, fields, sets or (), output, ui, minutes=minutes, grid=grid or ())
        from distillm_cli.ui.pilot_tables import pilot_next_steps, pilot_tables

        ui.answer(*pilot_tables(result))
        ui.show(pilot_next_steps(result))
        ui.result(result.as_json())
