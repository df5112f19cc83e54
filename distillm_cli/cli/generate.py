"""``distillm generate``: sample responses from a model."""

from __future__ import annotations

from typing import Annotated

import typer

from distillm_cli.cli import options

SAMPLING = "Sampling"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH|NAME",
        callback=options.named,
        help="An output directory, a model directory, a hub name, or builtin.",
        rich_help_panel=options.MODELS,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="PATH|NAME",
        callback=options.named,
        help="Prompts of a data set, file, directory, or builtin.",
        rich_help_panel=options.MODELS,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="NAME",
        help="train, valid or test of --data; else train, or the whole file.",
        rich_help_panel=options.MODELS,
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="An instruction; may be repeated.", rich_help_panel=options.MODELS),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="FILE|-",
        callback=options.named,
        help="Prompts of a text file (one a line), a data file, or stdin (-).",
        rich_help_panel=options.MODELS,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="The first prompts only.", rich_help_panel=options.MODELS),
]
Template = Annotated[
    str | None,
    typer.Option("--template", metavar="NAME", help="auto, alpaca, chat or plain.", rich_help_panel=options.MODELS),
]
Samples = Annotated[int, typer.Option("--n", metavar="N", help="Responses per prompt.", rich_help_panel=SAMPLING)]
Greedy = Annotated[
    bool, typer.Option("--greedy", metavar="", help="The likeliest tokens: --temperature 0.", rich_help_panel=SAMPLING)
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="0 is greedy.", rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Mass of likeliest tokens kept.", rich_help_panel=SAMPLING)
]
TopK = Annotated[
    int | None, typer.Option("--top-k", metavar="K", help="Likeliest tokens kept; 0 is all.", rich_help_panel=SAMPLING)
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", metavar="N", help="Longest response.", rich_help_panel=SAMPLING)
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Of every response's own randomness.", rich_help_panel=SAMPLING),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", help="Responses side by side.", rich_help_panel=SAMPLING),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="TYPE", help="auto, fp32 or bf16.", rich_help_panel=SAMPLING)
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=SAMPLING),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="FILE",
        callback=options.named,
        help="A .jsonl file; else stdout.",
        rich_help_panel=options.OUTPUT,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", metavar="", help="Go on where FILE stops.", rich_help_panel=options.OUTPUT)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", metavar="", help="Replace FILE.", rich_help_panel=options.OUTPUT)
]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        "generate",
        rich_help_panel=options.VERBS,
        epilog=options.examples(
            'distillm generate --model ckpt/ --prompt "Name three rivers."',
            "distillm generate --model gpt2-xl --data dolly --output teacher.jsonl",
            "distillm generate --model gpt2-xl --data dolly --output teacher.jsonl --resume",
            "cat questions.txt | distillm generate --model ckpt/ --input - --n 4 --temperature 0.7",
        ),
    )(generate)


def generate(
    model: Model = None,
    data: Data = None,
    split: Split = None,
    prompts: Prompts = None,
    input: Input = None,
    limit: Limit = None,
    template: Template = None,
    skip_bad_rows: options.SkipBadRows = None,
    n: Samples = 1,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    dtype: Dtype = None,
    device: Device = None,
    recipe: options.Recipe = None,
    sets: options.Set = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Sample responses from a model: rows of JSON that --data reads back, in the order of the prompts.

    Settings that no flag gives come from the model's own recipe, where there is one.
    """
    from distillm_cli.cli.launch import check_alone
    from distillm_cli.config.shortcuts import Flag
    from distillm_cli.errors import UsageError
    from distillm_cli.runs.generate import generate_responses
    from distillm_cli.runs.inference import Settings
    from distillm_cli.runs.prompt_source import PromptSource
    from distillm_cli.runs.run_results import Generated
    from distillm_cli.training.events import Event
    from distillm_cli.ui.console import console, write_rows

    if model is None:
        raise UsageError("no model to generate with", hint="give --model")
    if json and output is None:
        raise UsageError("--json without --output", where="the rows themselves go to stdout", hint="give --output FILE")
    if greedy and temperature:
        raise UsageError(f"--greedy and --temperature {temperature:g} exclude each other", hint="drop one of them")
    check_alone()
    given = {
        "rollout.temperature": ("--greedy", 0.0) if greedy else ("--temperature", temperature),
        "rollout.top_p": ("--top-p", top_p),
        "rollout.top_k": ("--top-k", top_k),
        "rollout.max_new_tokens": ("--max-new-tokens", max_new_tokens),
        "eval.batch_size": ("--batch-size", batch_size),
        "data.template": ("--template", template),
        "train.seed": ("--seed", seed),
    }
    flags = {key: Flag(*pair) for key, pair in given.items()}
    flags |= options.flags(dtype=dtype, device=device, skip_bad_rows=skip_bad_rows)
    source = PromptSource(data=data, split=split, prompts=prompts, input=input, limit=limit, samples=n)
    settings = Settings(recipe, flags, sets)
    with console(json_mode=json, quiet=quiet) as ui:

        def listen(event: Event) -> None:
            if isinstance(event, Generated):
                write_rows(event.rows)
            else:
                ui(event)

        result = generate_responses(model, source, settings, listen, output=output, resume=resume, overwrite=overwrite)
        ui.result(result.as_json())
