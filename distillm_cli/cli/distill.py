"""``distillm distill``: train a student against a teacher."""

from __future__ import annotations

import typer

from distillm_cli.cli import options
from distillm_cli.cli.launch import launch


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        rich_help_panel=options.VERBS,
        epilog=options.examples(
            "distillm distill --recipe quickstart",
            "distillm distill --teacher gpt2-xl --student gpt2 --alpha 0.1",
            "distillm distill --teacher runs/teacher --student random:2x128 --data rows.jsonl --divergence srkl",
            "distillm distill --recipe quickstart --method ab --schedule adaptive",
            "distillm distill --recipe quickstart --method gkd --set schedule.mix=0.3",
            "distillm distill --recipe quickstart --warm-teacher-cache",
            "distillm distill --resume --output runs/quickstart-distillm",
        ),
    )(distill)


def distill(
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
    dry_run: options.DryRun = False,
    warm_teacher_cache: options.WarmTeacherCache = False,
    rebuild_teacher_cache: options.RebuildTeacherCache = False,
    output: options.Output = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a student against a teacher: skew KL and adaptive off-policy rollouts.

    Every other field: [cyan]--set section.key=value[/]. All of them, with their values: [cyan]--dry-run[/].
    """
    launch(ctx)
