"""``distillm plan``: what a run would need and do, before it is started."""

from __future__ import annotations

from typing import Any

import typer

from distillm_cli.cli import options


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        rich_help_panel=options.AROUND,
        epilog=options.examples(
            "distillm plan --recipe quickstart",
            "distillm plan --teacher gpt2-xl --student gpt2 --data rows.jsonl --batch-size 16",
            "distillm plan --method sft --student gpt2 --data rows.jsonl",
            "distillm plan --teacher configs/gpt2-xl --student configs/gpt2/config.json --data dolly",
            "distillm plan --recipe dolly-gpt2-pipeline",
        ),
    )(plan)


def plan(
    ctx: typer.Context,
    teacher: options.Teacher = None,
    student: options.Student = None,
    lora: options.Lora = None,
    data: options.Data = None,
    tokenizer: options.Tokenizer = None,
    max_length: options.MaxLength = None,
    skip_bad_rows: options.SkipBadRows = None,
    method: options.Method = None,
    divergence: options.Divergence = None,
    alpha: options.Alpha = None,
    schedule: options.Schedule = None,
    teacher_cache: options.TeacherCache = None,
    lr: options.Lr = None,
    batch_size: options.BatchSize = None,
    epochs: options.Epochs = None,
    steps: options.Steps = None,
    seed: options.Seed = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    recipe: options.Recipe = None,
    sets: options.Set = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """What a run would need: whether the pair fits, sizes, dropped rows, memory, FLOPs, time on known GPUs.

    Takes no step. Models whose weights are in a directory here are loaded as the run would; of others the config is enough
    (a directory with a config.json, the file itself, or a hub name), and no weights are downloaded. A recipe of stages
    is planned stage by stage.
    """
    from distillm_cli.cli.launch import check_complete
    from distillm_cli.config.load import resolve
    from distillm_cli.config.pipeline_recipe import is_pipeline
    from distillm_cli.runs.defaults import fitted, fitted_line
    from distillm_cli.training.events import Note
    from distillm_cli.ui.console import console

    if recipe is not None and is_pipeline(recipe):
        _plan_stages(recipe, options.given(ctx), sets, json, quiet)
        return
    resolved = fitted(resolve(command="plan", recipe=recipe, flags=options.given(ctx), sets=sets))
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
        ui.show(*plan_tables(result))
        ui.result(result.as_json())


def _plan_stages(recipe: str, flags: dict[str, Any], sets: list[str] | None, json: bool, quiet: bool) -> None:
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
        ui.show(*pipeline_tables(result))
        ui.result(result.as_json())
