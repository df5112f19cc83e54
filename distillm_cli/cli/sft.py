"""``distillm sft``: fine-tune one model on instruction data."""

from __future__ import annotations

import typer

from distillm_cli.cli import options
from distillm_cli.cli.launch import launch


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        rich_help_panel=options.VERBS,
        epilog=options.examples(
            "distillm sft --model gpt2-xl --data dolly --lr 5e-5 --epochs 10 --output runs/teacher",
            "distillm sft --model random:4x256 --tokenizer words --data words.jsonl --output runs/small",
            "distillm sft --recipe quickstart-teacher",
        ),
    )(sft)


def sft(
    ctx: typer.Context,
    model: options.Model = None,
    lora: options.Lora = None,
    data: options.Data = None,
    tokenizer: options.Tokenizer = None,
    max_length: options.MaxLength = None,
    skip_bad_rows: options.SkipBadRows = None,
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
    output: options.Output = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fine-tune one model on instruction data: the teacher, or the student's starting point.

    Every other field: [cyan]--set section.key=value[/]. All of them, with their values: [cyan]--dry-run[/].
    """
    launch(ctx)
