"""Fine-tune a model, or train a student against a teacher: ``distillm sft`` and ``distillm distill``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from distillm_cli.cli import options
from distillm_cli.cli.options import FieldFlags, command
from distillm_cli.config.shortcuts import METHOD_PANEL
from distillm_cli.errors import UsageError
from distillm_cli.utils.stdout import write_json, write_stdout

WarmTeacherCache = Annotated[
    bool,
    options.switch(
        "--warm-teacher-cache",
        "Only compute the teacher's hidden states for the rows and store them on disk for later runs.",
        METHOD_PANEL,
    ),
]
RebuildTeacherCache = Annotated[
    bool,
    options.switch("--rebuild-teacher-cache", "Replace a stale or damaged teacher cache on disk.", METHOD_PANEL),
]


Compare = Annotated[
    bool,
    options.switch(
        "--compare",
        "Also train plain SFT and off-policy distillation for the same seconds, in OUTPUT/compare.",
        METHOD_PANEL,
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
    track: options.Track = None
    push: options.Push = None
    push_dry_run: options.PushDryRun = False
    strict: options.Strict = False
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

    Set other fields with [cyan]--set section.key=value[/]. List all fields with [cyan]--dry-run[/].
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
    compare: Compare = False,
    warm_teacher_cache: WarmTeacherCache = False,
    rebuild_teacher_cache: RebuildTeacherCache = False,
) -> None:
    """Train a student against a teacher, by default with skew KL and adaptive off-policy rollouts.

    Set other fields with [cyan]--set section.key=value[/]. List all fields with [cyan]--dry-run[/].
    """
    launch(
        "distill",
        fields,
        chosen,
        compare=compare,
        only_warm=warm_teacher_cache,
        rebuild_teacher_cache=rebuild_teacher_cache,
    )


def launch(
    verb: str,
    fields: FieldFlags,
    chosen: TrainingOptions,
    *,
    compare: bool = False,
    only_warm: bool = False,
    rebuild_teacher_cache: bool = False,
) -> None:
    """Resolve the recipe, then print it (``--dry-run``), warm the teacher cache, or train."""
    from distillm_cli.api import check_training, resolve_training, train_recipe
    from distillm_cli.config.load import to_yaml

    output = chosen.output
    resolved = resolve_training(verb, chosen.recipe, fields, chosen.sets, output=output, resume=chosen.resume)
    if chosen.dry_run:
        if chosen.json:
            write_json({"command": verb, "status": "ok", "recipe": resolved.recipe.model_dump(mode="json")})
        else:
            write_stdout(to_yaml(resolved))
        return
    notes = check_training(resolved)

    from distillm_cli.runs.start import TrainOptions, warm_teacher_cache
    from distillm_cli.ui.console import console

    if only_warm:
        if chosen.resume or chosen.overwrite or compare or output is not None:
            what = "--warm-teacher-cache writes no output directory"
            raise UsageError("usage.exclusive_options", what, hint="drop --output, --resume, --overwrite and --compare")
        with console(json_mode=chosen.json, quiet=chosen.quiet) as ui:
            cache = warm_teacher_cache(resolved, ui, rebuild=rebuild_teacher_cache, notes=notes)
            ui.result(cache.as_json())
        return
    run_options = TrainOptions(
        resume=chosen.resume,
        overwrite=chosen.overwrite,
        rebuild_teacher_cache=rebuild_teacher_cache,
        compare=compare,
        strict=chosen.strict,
        track=tuple(chosen.track or ()),
        push=chosen.push,
        push_dry_run=chosen.push_dry_run,
    )
    with console(json_mode=chosen.json, quiet=chosen.quiet) as ui:
        result = train_recipe(verb, resolved, output, ui, run_options, chosen.recipe)
        from distillm_cli.ui.summary import train_next_steps, train_summary

        ui.answer(*train_summary(result))
        ui.show(train_next_steps(result))
        ui.result(result.as_json())
