"""Sample responses from a model: ``distillm generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

import typer

from distillm_cli.cli import options
from distillm_cli.cli.options import FieldFlags, command
from distillm_cli.cli.usage import check_sampling_inputs
from distillm_cli.config.shortcuts import MODELS_PANEL, SAMPLING_PANEL
from distillm_cli.errors import UsageError
from distillm_cli.utils.stdout import write_rows

if TYPE_CHECKING:
    from distillm_cli.data.rows import Split

SampledModel = Annotated[
    str | None,
    options.named(
        "--model", "PATH|NAME", "Model: an output directory, a model directory, a hub name, or builtin.", MODELS_PANEL
    ),
]
PromptData = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="PATH|NAME",
        callback=options.check_named,
        help="Prompts, as a file, a directory, a hub name or a known data set.",
        autocompletion=options.complete_data,
        rich_help_panel=MODELS_PANEL,
    ),
]
PromptSplit = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="NAME",
        help=r"Split of --data: train, valid or test. [dim]\[default: train, or the whole file][/]",
        rich_help_panel=MODELS_PANEL,
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="Prompt text. May be repeated.", rich_help_panel=MODELS_PANEL),
]
PromptFile = Annotated[
    str | None,
    options.named(
        "--input", "FILE|-", "File of prompts: a text file (one per line), a data file, or stdin (-).", MODELS_PANEL
    ),
]
PromptLimit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="Use only the first N prompts.", rich_help_panel=MODELS_PANEL),
]
ServedBy = Annotated[
    str | None,
    options.named(
        "--server",
        "URL",
        "OpenAI-compatible server that generates. --model: a directory with the tokenizer, or a name on the server.",
        MODELS_PANEL,
    ),
]
ResponsesPerPrompt = Annotated[
    int,
    typer.Option(
        "--n",
        metavar="N",
        help=r"Number of responses per prompt. [dim]\[default: 1][/]",
        show_default=False,
        rich_help_panel=SAMPLING_PANEL,
    ),
]
GreedyDecoding = Annotated[
    bool,
    options.switch("--greedy", "Greedy decoding, as --temperature 0.", SAMPLING_PANEL),
]
RowsFile = Annotated[
    str | None,
    options.named("--output", "FILE", r"Output file, .jsonl. [dim]\[default: stdout][/]", options.OUTPUT_PANEL),
]
ResumeFile = Annotated[
    bool,
    options.switch("--resume", "Continue an incomplete FILE.", options.OUTPUT_PANEL),
]
OverwriteFile = Annotated[
    bool,
    options.switch("--overwrite", "Replace an existing FILE.", options.OUTPUT_PANEL),
]


@dataclass(frozen=True)
class PromptOptions:
    """Hold the options for the model, its prompts and the number of responses."""

    model: SampledModel = None
    server: ServedBy = None
    data: PromptData = None
    split: PromptSplit = None
    prompts: Prompt = None
    input: PromptFile = None
    limit: PromptLimit = None
    n: ResponsesPerPrompt = 1
    greedy: GreedyDecoding = False


@dataclass(frozen=True)
class RowsOptions:
    """Hold the options for the output file."""

    output: RowsFile = None
    resume: ResumeFile = False
    overwrite: OverwriteFile = False


@command(
    "generate",
    panel=options.VERBS,
    examples=(
        'distillm generate --model ckpt/ --prompt "Name three rivers."',
        "distillm generate --model gpt2-xl --data dolly --output teacher.jsonl",
        "distillm generate --model gpt2-xl --data dolly --output teacher.jsonl --resume",
        "distillm generate --server http://127.0.0.1:8000 --model ckpt/ --data dolly --output teacher.jsonl",
        "cat questions.txt | distillm generate --model ckpt/ --input - --n 4 --temperature 0.7",
    ),
)
def generate(
    *,
    chosen: PromptOptions,
    fields: FieldFlags,
    recipe: options.RecipeOption = None,
    sets: options.Set = None,
    file: RowsOptions,
    reporting: options.ReportingOptions,
) -> None:
    """Sample responses from a model, as JSON rows in the order of the prompts that --data can read.

    Options that are not given come from the model's recipe. Without a recipe, the defaults below apply.
    """
    from distillm_cli.api import generation_flags
    from distillm_cli.runs.prompt_source import PromptSource, check_request

    if chosen.model is None:
        raise UsageError("usage.no_model", "no model", hint="give --model")
    if reporting.json and file.output is None:
        raise UsageError(
            "usage.no_output",
            "--json without --output",
            where="the rows themselves go to stdout",
            hint="give --output FILE",
        )
    flags = generation_flags(fields, greedy=chosen.greedy)
    source = PromptSource(
        data=chosen.data,
        split=cast("Split | None", chosen.split),  # another name is an error of check_request
        prompts=chosen.prompts,
        input=chosen.input,
        limit=chosen.limit,
        samples=chosen.n,
    )
    check_request(source, file.output, resume=file.resume, overwrite=file.overwrite)
    sources = [] if chosen.data is None else [chosen.data]
    models = [chosen.model] if chosen.server is None else []
    check_sampling_inputs("generate", models, sources, recipe, flags, sets)

    from distillm_cli.runs.generate import generate_responses  # imports torch
    from distillm_cli.runs.inference import Settings
    from distillm_cli.runs.run_results import Generated
    from distillm_cli.training.events import Event
    from distillm_cli.ui.console import console

    settings = Settings(recipe, flags, sets)
    with console(json_mode=reporting.json, quiet=reporting.quiet) as ui:

        def listen(event: Event) -> None:
            if isinstance(event, Generated):
                write_rows(event.rows)
            else:
                ui(event)

        result = generate_responses(chosen.model, source, settings, listen, server=chosen.server, **vars(file))
        ui.result(result.as_json())
