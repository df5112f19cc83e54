"""``distillm eval``: score checkpoints on instruction-following suites."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from distillm_cli.cli import options

SAMPLING = "Sampling"

Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT...",
        callback=options.named,
        help="Output directories, model directories or hub names.",
        show_default=False,
    ),
]
Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        metavar="NAME|FILE",
        callback=options.named,
        help="dolly, self-inst, vicuna, sni, unni, samsum, xsum, wmt14-de-en, iwslt, gsm8k, builtin, or data.",
        autocompletion=lambda incomplete: options.suites_like(incomplete),
        rich_help_panel=options.MODELS,
    ),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        callback=options.named,
        help="rouge_l, rouge_1, rouge_2, bleu, chrf, exact_match, error_rate, final_number; may be repeated.",
        autocompletion=lambda incomplete: options.words_like(incomplete, "eval.metrics"),
        rich_help_panel=options.MODELS,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="The first rows of each suite only.", rich_help_panel=options.MODELS),
]
Template = Annotated[
    str | None,
    typer.Option("--template", metavar="NAME", help="auto, alpaca, chat or plain.", rich_help_panel=options.MODELS),
]
Seeds = Annotated[
    str | None,
    typer.Option("--seeds", metavar="N,N,…", help="One sampled pass each.", rich_help_panel=SAMPLING),
]
Greedy = Annotated[
    bool | None,
    typer.Option(
        "--greedy/--sampled", metavar="", help="One pass of likeliest tokens, or sampling.", rich_help_panel=SAMPLING
    ),
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="1 is the paper's.", rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Mass of likeliest tokens kept.", rich_help_panel=SAMPLING)
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", metavar="N", help="Longest response.", rich_help_panel=SAMPLING),
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
        metavar="DIR",
        callback=options.named,
        help="Where results go; else CKPT/eval/.",
        rich_help_panel=options.OUTPUT,
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        "eval",
        rich_help_panel=options.VERBS,
        epilog=options.examples(
            "distillm eval ckpt/ --suite dolly",
            "distillm eval runs/a runs/b --suite dolly,self-inst,vicuna --json",
            "distillm eval ckpt/ --suite words/test.jsonl --metric error_rate --greedy",
            "distillm eval gpt2 --suite sni --limit 100 --seeds 10",
        ),
    )(evaluate)


def evaluate(
    checkpoints: Checkpoints,
    suites: Suites = None,
    metrics: Metrics = None,
    limit: Limit = None,
    template: Template = None,
    skip_bad_rows: options.SkipBadRows = None,
    seeds: Seeds = None,
    greedy: Greedy = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = None,
    dtype: Dtype = None,
    device: Device = None,
    recipe: options.Recipe = None,
    sets: options.Set = None,
    output: Output = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Score checkpoints on instruction-following suites: mean ± sd over seeds, results in CKPT/eval/.

    Without --suite: the suites of the checkpoint's own recipe, or the rows its run held out. Its recipe also gives the
    template and every setting that no flag gives.
    """
    from distillm_cli.cli.launch import check_alone
    from distillm_cli.config.shortcuts import Flag
    from distillm_cli.errors import UsageError
    from distillm_cli.runs.eval import evaluate_checkpoints
    from distillm_cli.runs.inference import Settings
    from distillm_cli.ui.console import console
    from distillm_cli.ui.summary import eval_summary

    sampling = {"--seeds": seeds, "--temperature": temperature, "--top-p": top_p}
    wish = next((flag for flag, value in sampling.items() if value is not None), None)
    if greedy and wish:
        raise UsageError(f"--greedy and {wish} exclude each other", hint="drop one of them")
    if temperature == 0 and seeds is not None:
        raise UsageError("--temperature 0 and --seeds exclude each other", where="there is nothing random")
    check_alone()
    if greedy is None and wish:
        greedy = False  # whatever the checkpoint's own recipe says
    given: dict[str, Any] = {
        "eval.suites": ("--suite", _listed(suites)),
        "eval.metrics": ("--metric", _listed(metrics)),
        "eval.limit": ("--limit", limit),
        "eval.seeds": ("--seeds", _listed([seeds] if seeds is not None else None)),
        "eval.greedy": ("--greedy", greedy),
        "eval.temperature": ("--temperature", temperature),
        "eval.top_p": ("--top-p", top_p),
        "eval.max_new_tokens": ("--max-new-tokens", max_new_tokens),
        "eval.batch_size": ("--batch-size", batch_size),
        "data.template": ("--template", template),
    }
    flags = {key: Flag(*pair) for key, pair in given.items()}
    flags |= options.flags(dtype=dtype, device=device, skip_bad_rows=skip_bad_rows)
    with console(json_mode=json, quiet=quiet) as ui:
        result = evaluate_checkpoints(checkpoints, Settings(recipe, flags, sets), ui, output=output)
        ui.show(*eval_summary(result))
        ui.result(result.as_json())


def _listed(values: list[str] | None) -> list[str] | None:
    """Repeated or separated by commas: a,b c → a b c."""
    return None if values is None else [part.strip() for value in values for part in value.split(",") if part.strip()]
