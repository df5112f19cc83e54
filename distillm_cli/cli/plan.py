"""Estimate the requirements of a run before it starts: ``distillm plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from distillm_cli.cli import options
from distillm_cli.cli.options import FieldFlags, command
from distillm_cli.config.shortcuts import TRAINING_PANEL

ProcessNumber = Annotated[
    int,
    typer.Option(
        "--processes",
        metavar="N",
        min=1,
        help=r"Number of processes, each with a GPU of its own. [dim]\[default: 1][/]",
        show_default=False,
        rich_help_panel=TRAINING_PANEL,
    ),
]


@command(
    "plan",
    panel=options.OTHER_COMMANDS,
    examples=(
        "distillm plan --recipe quickstart",
        "distillm plan --teacher gpt2-xl --student gpt2 --data rows.jsonl --batch-size 16",
        "distillm plan --method sft --student gpt2 --data rows.jsonl",
        "distillm plan --teacher configs/gpt2-xl --student configs/gpt2/config.json --data dolly",
        "distillm plan --recipe dolly-gpt2-pipeline",
        "distillm plan --recipe dolly-gpt2 --processes 8",
    ),
)
def plan(
    fields: FieldFlags,
    recipe: options.RecipeOption = None,
    sets: options.Set = None,
    processes: ProcessNumber = 1,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Estimate the requirements of a run: compatibility, sizes, dropped rows, memory, FLOPs, and time on known GPUs.

    Nothing is trained. Models whose weights are in a local directory are loaded. For other models a config suffices (a
    directory with a config.json, the file itself, or a hub name), and no weights are downloaded. A pipeline is planned
    stage by stage.
    """
    from distillm_cli.api import plan_recipe
    from distillm_cli.ui.console import console

    with console(json_mode=json, quiet=quiet) as ui:
        result = plan_recipe(recipe, fields, sets or (), ui, processes)
        from distillm_cli.ui.plan_tables import tables_of

        ui.answer(*tables_of(result))
        ui.result(result.as_json())
