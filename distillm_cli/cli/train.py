"""``distillm sft`` and ``distillm distill``: fine-tune a model, or train a student against a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from distillm_cli.cli import options
from distillm_cli.cli.options import FieldFlags, command
from distillm_cli.cli.usage import check_complete, check_single_process
from distillm_cli.config.shortcuts import METHOD_PANEL
from distillm_cli.errors import CheckpointError, UsageError

WarmTeacherCache = Annotated[
    bool,
    typer.Option(
        "--warm-teacher-cache",
        metavar="",
        help="Only compute the teacher's hidden states of the rows and store them on disk for later runs.",
        rich_help_panel=METHOD_PANEL,
    ),
]
RebuildTeacherCache = Annotated[
    bool,
    typer.Option(
        "--rebuild-teacher-cache",
        metavar="",
        help="Replace a cache on disk that is stale or damaged.",
        rich_help_panel=METHOD_PANEL,
    ),
]


@dataclass(frozen=True)
class TrainingOptions:
    """Hold the options that both commands have, apart from the flags of fields."""

    recipe: options.RecipeOption = None
    sets: options.Set = None
    dry_run: options.DryRun = False
    output: options.Output = None
    resume: options.Resume = False
    overwrite: options.Overwrite = False
    json: options.Json = False
    quiet: options.Quiet = False
    debug: options.Debug = False


@command(
    "sft",
    panel=options.VERBS,
    examples=(
        "distillm sft --model gpt2-xl --data dolly --lr 5e-5 --epochs 10 --output runs/teacher",
        "distillm sft --model random:4x256 --tokenizer words --data words.jsonl --output runs/small",
        "distillm sft --recipe quickstart-teacher",
    ),
)
def sft(fields: FieldFlags, chosen: TrainingOptions) -> None:
    """Fine-tune one model on instruction data: the teacher, or the student's starting point.

    Every other field: [cyan]--set section.key=value[/]. All fields with their values: [cyan]--dry-run[/].
    """
    launch("sft", fields, chosen)


@command(
    "distill",
    panel=options.VERBS,
    examples=(
        "distillm distill --recipe quickstart",
        "distillm distill --teacher gpt2-xl --student gpt2 --alpha 0.1",
        "distillm distill --teacher runs/teacher --student random:2x128 --data rows.jsonl --divergence srkl",
        "distillm distill --recipe quickstart --method ab --schedule adaptive",
        "distillm distill --recipe quickstart --method gkd --set schedule.mix=0.3",
        "distillm distill --recipe quickstart --warm-teacher-cache",
        "distillm distill --resume --output runs/quickstart-distillm",
    ),
)
def distill(
    fields: FieldFlags,
    chosen: TrainingOptions,
    warm_teacher_cache: WarmTeacherCache = False,
    rebuild_teacher_cache: RebuildTeacherCache = False,
) -> None:
    """Train a student against a teacher: skew KL and adaptive off-policy rollouts.

    Every other field: [cyan]--set section.key=value[/]. All fields with their values: [cyan]--dry-run[/].
    """
    launch("distill", fields, chosen, only_warm=warm_teacher_cache, rebuild_teacher_cache=rebuild_teacher_cache)


def _refuse_resume(output: str | None, sets: list[str]) -> None:
    """Raise an error for ``--resume`` without a run: no directory is given, or it has no recipe."""
    from distillm_cli.runs.output_dir import RECIPE

    if any(text.startswith("student.path=") for text in sets):
        return
    if output is None:
        raise UsageError("--resume without a run", hint="give --output DIR, the directory of the run to resume")
    what = f"no {RECIPE} in it" if Path(output).is_dir() else "no such directory"
    raise CheckpointError(
        f"nothing to resume in {output}", where=what, hint="check the path, or start without --resume"
    )


def launch(
    verb: str,
    fields: FieldFlags,
    chosen: TrainingOptions,
    *,
    only_warm: bool = False,
    rebuild_teacher_cache: bool = False,
) -> None:
    """Resolve the recipe, then print it (``--dry-run``), warm the teacher cache, or train."""
    from distillm_cli.cli.streams import write_stdout
    from distillm_cli.config.load import resolve, to_yaml
    from distillm_cli.runs import output_dir
    from distillm_cli.runs.defaults import check_data, fitted, fitted_line

    output = chosen.output
    recipe_name = chosen.recipe
    if chosen.resume and recipe_name is None and output is not None:
        saved_recipe = Path(output) / output_dir.RECIPE
        recipe_name = str(saved_recipe) if saved_recipe.is_file() else None
    if chosen.resume and recipe_name is None and "student.path" not in fields:
        _refuse_resume(output, chosen.sets or [])
    resolved = fitted(resolve(command=verb, recipe=recipe_name, flags=fields, sets=chosen.sets))
    if chosen.dry_run:
        if chosen.json:
            from distillm_cli.ui.console import print_json

            print_json({"command": verb, "status": "ok", "recipe": resolved.recipe.model_dump(mode="json")})
        else:
            write_stdout(to_yaml(resolved))
        return
    check_complete(resolved.recipe)
    notes = [note for note in (check_data(resolved), fitted_line(resolved)) if note is not None]
    check_single_process()

    from distillm_cli.runs.start import TrainOptions, start_training, warm_teacher_cache
    from distillm_cli.ui.console import console

    if only_warm:
        if chosen.resume or chosen.overwrite or output is not None:
            what = "--warm-teacher-cache writes no output directory"
            raise UsageError(what, hint="drop --output, --resume and --overwrite")
        with console(json_mode=chosen.json, quiet=chosen.quiet) as ui:
            result = warm_teacher_cache(resolved, ui, rebuild=rebuild_teacher_cache, notes=notes)
            ui.result(result.as_json())
        return
    recipe = resolved.recipe
    place = Path(output) if output else None
    if place is None:
        student = recipe.student.path or "student"
        place = output_dir.default_name(resolved.name, recipe.data.source, student, recipe.method, resume=chosen.resume)
    run_options = TrainOptions(
        resume=chosen.resume, overwrite=chosen.overwrite, rebuild_teacher_cache=rebuild_teacher_cache
    )
    with console(json_mode=chosen.json, quiet=chosen.quiet) as ui:
        result = start_training(verb, resolved, place, ui, run_options, recipe_file=recipe_name, notes=notes)
        from distillm_cli.ui.summary import train_next_steps, train_summary

        ui.answer(*train_summary(result))
        ui.show(train_next_steps(result))
        ui.result(result.as_json())
