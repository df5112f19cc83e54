"""``distillm plan``: estimate what a run needs before it is started."""

from __future__ import annotations

from distillm_cli.cli import options
from distillm_cli.cli.options import FieldFlags, command
from distillm_cli.cli.usage import check_complete


@command(
    "plan",
    panel=options.OTHER_COMMANDS,
    examples=(
        "distillm plan --recipe quickstart",
        "distillm plan --teacher gpt2-xl --student gpt2 --data rows.jsonl --batch-size 16",
        "distillm plan --method sft --student gpt2 --data rows.jsonl",
        "distillm plan --teacher configs/gpt2-xl --student configs/gpt2/config.json --data dolly",
        "distillm plan --recipe dolly-gpt2-pipeline",
    ),
)
def plan(
    fields: FieldFlags,
    recipe: options.RecipeOption = None,
    sets: options.Set = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Estimate what a run needs: whether the pair fits, sizes, dropped rows, memory, FLOPs, time on known GPUs.

    No step is taken. Models whose weights are in a local directory are loaded. For others the config is enough (a
    directory with a config.json, the file itself, or a hub name), and no weights are downloaded. A pipeline is planned
    stage by stage.
    """
    from distillm_cli.config.load import resolve
    from distillm_cli.config.pipeline_recipe import is_pipeline
    from distillm_cli.runs.defaults import fitted, fitted_line
    from distillm_cli.training.events import Note
    from distillm_cli.ui.console import console

    if recipe is not None and is_pipeline(recipe):
        _plan_stages(recipe, fields, sets, json, quiet)
        return
    resolved = fitted(resolve(command="plan", recipe=recipe, flags=fields, sets=sets))
    check_complete(resolved.recipe)
    is_default = resolved.origin["data.source"] == "default"
    notes = ["no --data: planned for Dolly (data.source dolly)"] if is_default else []
    notes += filter(None, [fitted_line(resolved)])
    with console(json_mode=json, quiet=quiet) as ui:
        for note in notes:
            ui(Note(note))
        from distillm_cli.runs.plan import plan_run
        from distillm_cli.ui.plan_tables import plan_tables

        result = plan_run(resolved, ui)
        ui.answer(*plan_tables(result))
        ui.result(result.as_json())


def _plan_stages(recipe: str, flags: FieldFlags, sets: list[str] | None, json: bool, quiet: bool) -> None:
    from distillm_cli.config.pipeline_recipe import load_pipeline
    from distillm_cli.errors import UsageError
    from distillm_cli.runs.defaults import fitted_pipeline
    from distillm_cli.ui.console import console

    if flags:
        flag = next(iter(flags.values())).name
        raise UsageError(
            f"{flag} with {recipe}, a recipe of stages", hint="try --set stages.NAME.section.key=VALUE, or defaults.…"
        )
    pipeline = fitted_pipeline(load_pipeline(recipe, sets or ()))
    with console(json_mode=json, quiet=quiet) as ui:
        from distillm_cli.runs.plan_stages import plan_pipeline
        from distillm_cli.ui.plan_tables import pipeline_tables

        result = plan_pipeline(pipeline, ui)
        ui.answer(*pipeline_tables(result))
        ui.result(result.as_json())
